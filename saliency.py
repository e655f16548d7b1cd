"""Which pixels an embedding depends on: SmoothGrad maps of d(f(I), f(black)) (Kobs et al. 2021, section 3).

Input:  pictures (a data set's name, a folder, a CSV) and networks, named as for embed.py
Output: maps.npy, float16 (n, H, W), values in [0, 1], row i is picture i, at the network's input size;
        maps.json beside it; with --ceiling maps_ceiling.npy, the same with other noise; with --gallery a PNG;
        with --randomise sanity.csv, with --faithfulness faithfulness.csv; with --against maps of pairs

    python saliency.py --dataset pictures/ --model efficientnet_lite0 --out maps.npy
    python saliency.py --dataset cars196 --loss all --fold 0 --limit 500 --out results
    python saliency.py --dataset pictures/ --model efficientnet_lite0 --limit 8 --out 8.npy --gallery 8.png
    torchrun --nproc-per-node 2 saliency.py --dataset cars196 --loss all --out results

The same command continues an interrupted run. A map depends on picture, network, options and seed, not on
batch, order, process or restart: the noise of picture i comes from (seed, name of the network, i) alone. Of
the order of float32 sums another batch size moves no value by more than 1e-6, another number of threads
single ones by up to 0.008 (a unit on the kink of its ReLU), at a correlation of 0.9999997. CPU and CUDA draw
other noise.

The paper says: absolute value of the averaged gradient, then the mean over channels (--order paper). Its
code: mean over channels, absolute value of every copy, then the sum (--order released). The maps differ
(docs/saliency.md).
"""
if __name__ == "__main__":  # before torch is imported: Ctrl-C ends in one line from here on
    import sys
    try:
        from dml_common import command
    except ImportError:
        print("saliency.py: the command needs the folder dml_common/ beside it; copy that too",
              file=sys.stderr)
        sys.exit(2)
    command.begin()

import contextlib
import copy
import hashlib
import itertools
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, interpolate
from torch.nn.utils.fusion import fuse_conv_bn_eval

# ---------------------------------------------------------------- SmoothGrad


def smoothgrad(network, pictures, baseline, distance, *, samples=50, noise=0.15, order="paper",
               percentile=99.0, seeds=None, antithetic=False, batch=10, autocast=None, stem=None):
    """SmoothGrad maps of each picture's distance from its baseline (Kobs et al. 2021, Eq. 1-2).

    network: callable, pictures (B, C, H, W) -> embeddings (B, m), in eval mode; needs no preparation, but
        fold_batchnorm and requires_grad_(False) make it faster
    pictures: floating (n, C, H, W), as the network takes them; baseline: (C, H, W) or one each (n, C, H, W)
    distance: callable, embeddings a (B, m) of pictures, b (B, m) of baselines -> (B,), differentiable. Or k
        of them, for networks that share a trunk: the network is the trunk, each callable applies its own head
        to both sides, and the trunk's forward passes are made once for all
    samples: noisy copies of a picture, l in Eq. 2
    noise: standard deviation of the noise as a share of max - min of each picture
    order: "paper" (mean over copies, absolute value, mean over channels) or "released" (mean over channels,
        absolute value of each copy, sum over copies)
    percentile: values above this percentile of a map are cut to it, before the map is scaled to [0, 1]
    seeds: an integer for each picture, of which alone its noise is made (default 0 … n - 1)
    antithetic: every second copy takes the negative noise of the one before it
    batch: copies in one pass, across pictures; autocast: torch.bfloat16 or float16 for mixed precision
    stem: the network's first convolution where the picture enters through it alone (linear_stem finds it):
        with order "paper" its backward pass, linear, runs once a picture instead of once a copy

    Returns maps (n, H, W) or (k, n, H, W), of the pictures' dtype, in [0, 1]: zeros where a map is constant,
    or the picture is its own baseline (no distance, no gradient), nan where a gradient is not finite.
    Raises ValueError for options out of range, a network without 2-D embeddings or without a gradient.
    """
    check_options(samples, noise, order, percentile, batch)
    n = len(pictures)
    baseline = baseline[None] if baseline.ndim == 3 else baseline  # one for all is embedded once
    with torch.no_grad():
        origins = torch.cat([embed(network, part, autocast) for part in baseline.split(batch)])
        origins = origins.expand(n, -1)  # (n, m)
    spans = pictures.amax(dim=(1, 2, 3)) - pictures.amin(dim=(1, 2, 3))  # (n,)
    copies = noisy_copies(pictures, noise * spans, range(n) if seeds is None else seeds, samples, antithetic)
    through = stem if order == "paper" else None
    distances = [distance] if callable(distance) else list(distance)
    totals = [[0] * n for _ in distances]
    while chunk := list(itertools.islice(copies, batch)):
        which, noisy = zip(*chunk)
        noisy, there = torch.stack(noisy), origins[list(which)]
        of_each = distance_gradients(network, noisy, there, distances, autocast, through)
        for total, gradients in zip(totals, of_each):
            gradients = gradients.to(pictures.dtype)  # under autocast a stem's are too coarse to be summed
            if order == "released":
                gradients = gradients.mean(dim=1).abs()  # (B, H, W)
            for i in dict.fromkeys(which):
                first = which.index(i)
                total[i] = total[i] + sum_copies(gradients[first:first + which.count(i)])
    nothing = (pictures == baseline).flatten(1).all(dim=1)  # a picture against itself
    maps = []
    for total in totals:
        if through is not None:
            total = [pull_back(stem, one, picture) for one, picture in zip(total, pictures)]
        saliency = torch.stack(total)
        if order == "paper":
            saliency = (saliency / samples).abs().mean(dim=1)  # (n, H, W)
        # what is left of `nothing` is rounding, which min-max scaling would blow up to a map
        maps.append(scale_maps(saliency.masked_fill(nothing[:, None, None], 0), percentile))
    return maps[0] if callable(distance) else torch.stack(maps)


def sum_copies(gradients):
    """Sum over dim 0, in the order of memory: torch's own is 18 times as slow on channels-last tensors."""
    if gradients.ndim == 4 and gradients.is_contiguous(memory_format=torch.channels_last):
        return gradients.permute(0, 2, 3, 1).sum(dim=0).permute(2, 0, 1)
    return gradients.sum(dim=0)


def check_options(samples, noise, order, percentile, batch):
    """Raise ValueError for options of smoothgrad that are out of range."""
    for good, text in (
            (samples >= 1, f"samples is {samples}; expected at least 1 noisy copy"),
            (0 <= noise < float("inf"), f"noise is {noise}; expected 0 or more: a deviation, as a share of "
             "max - min (0.15)"),
            (order in ("paper", "released"), f"order is {order!r}; expected 'paper' or 'released'"),
            (0 < percentile <= 100, f"percentile is {percentile}; expected a number above 0, at most 100"),
            (batch >= 1, f"batch is {batch}; expected at least 1 copy at a time")):
        if not good:
            raise ValueError(text)


def noisy_copies(pictures, sigmas, seeds, samples, antithetic=False):
    """Yield (number of the picture, noisy copy (C, H, W)), `samples` times for each picture in turn.

    One draw a copy: copy j of a picture is the same whatever follows, in any batch.
    """
    for i, seed in enumerate(seeds):
        generator = torch.Generator(pictures.device).manual_seed(int(seed))
        for j in range(samples):
            if not (antithetic and j % 2):
                drawn = torch.randn(pictures.shape[1:], generator=generator, device=pictures.device,
                                    dtype=pictures.dtype)
            else:
                drawn = -drawn
            yield i, pictures[i] + sigmas[i] * drawn


def noise_seed(seed, name, index):
    """The seed of picture index's noise for the network of that name: an integer of 63 bits."""
    digest = hashlib.sha256(f"{seed}\0{name}\0{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def embed(network, pictures, autocast=None):
    """Embeddings (B, m) of pictures (B, C, H, W), in float32 at least. Raises ValueError when not 2-D."""
    with torch.autocast(pictures.device.type, dtype=autocast, enabled=autocast is not None):
        embeddings = network(pictures.clone())  # it may write into what it is given
    if not isinstance(embeddings, torch.Tensor) or embeddings.ndim != 2 or len(embeddings) != len(pictures):
        shape = tuple(embeddings.shape) if isinstance(embeddings, torch.Tensor) else type(embeddings).__name__
        raise ValueError(f"the network returned {shape} for {len(pictures)} pictures; expected embeddings of "
                         f"shape ({len(pictures)}, m): take the output of its last pooled or linear layer")
    return embeddings.float() if embeddings.dtype.itemsize < 4 else embeddings


def distance_gradients(network, pictures, origins, distances, autocast=None, stem=None):
    """Yield each distance's gradient with respect to the pictures (B, C, H, W), or to the stem's output."""
    held = []

    def hold(module, given, output):
        held.append(output.detach().requires_grad_())
        return held[0].clone()  # a layer that writes in place must not write into a leaf

    if stem is None:
        held.append(pictures.requires_grad_())
        embeddings = embed(network, pictures, autocast)
    else:
        with stem.register_forward_hook(hold):
            embeddings = embed(network, pictures, autocast)
    for left, distance in zip(reversed(range(len(distances))), distances):
        values, gradient = distance(embeddings, origins), None
        if values.requires_grad:
            gradient, = torch.autograd.grad(values.sum(), held[0], allow_unused=True, retain_graph=left > 0)
        if gradient is None:
            is_module = isinstance(network, nn.Module)
            where = gradient_break(network, pictures.detach()) if is_module else "somewhere"
            raise ValueError("no gradient reaches the pictures: the network detaches, quantises or leaves "
                             f"torch {where}")
        yield gradient


def pull_back(stem, gradient, picture):
    """Gradient (C, H, W) with respect to a picture from the one with respect to the linear stem's output."""
    picture = picture.detach()[None].requires_grad_()
    return torch.autograd.grad(stem(picture), picture, gradient[None])[0][0]


def scale_maps(saliency, percentile=99.0):
    """Cut each map (n, H, W) at its percentile (linear between order statistics), then min-max to [0, 1].

    A constant map becomes zeros, one with a value that is not finite becomes all nan.
    """
    flat = saliency.flatten(1)
    ranked = flat.sort(dim=1).values  # torch.quantile refuses more than 16 million values
    position = (flat.shape[1] - 1) * percentile / 100
    below = int(position)
    above = min(below + 1, flat.shape[1] - 1)
    top = torch.lerp(ranked[:, below], ranked[:, above], position - below)[:, None]
    low = ranked[:, :1]
    span = top - low
    maps = (flat.minimum(top) - low) / torch.where(span > 0, span, 1)
    return torch.where(flat.isfinite().all(dim=1, keepdim=True), maps, torch.nan).view_as(saliency)


# ---------------------------------------------------------------- a network made ready


@contextlib.contextmanager
def without_tf32():
    """Checks in full float32: tf32, torch's default for a GPU's convolutions, rounds by 1e-3."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def module_calls(network, picture):
    """[(name, module, input, output, versions)] of a picture's forward pass (1, C, H, W), as modules end.

    The last is the network itself, of which a copy of the picture is the input. versions: of the input and
    output then (they change when something writes into them in place; None of what is no tensor).
    """
    calls = []
    with contextlib.ExitStack() as hooks:
        for name, module in network.named_modules():
            def record(module, given, options, output, name=name):
                given = next(iter([*given, *options.values()]), None)
                versions = [getattr(one, "_version", None) for one in (given, output)]
                calls.append((name, module, given, output, versions))
            hooks.enter_context(module.register_forward_hook(record, with_kwargs=True))
        network(picture.clone())
    return calls


def copied(network, picture):
    """A deep copy in eval mode."""
    try:
        return copy.deepcopy(network).eval()
    except RuntimeError:  # of what hooks compute with a gradient (weight_norm): now without one
        with torch.no_grad():
            network.eval()(picture.clone())
        return copy.deepcopy(network)


@without_tf32()
def fold_batchnorm(network, picture):
    """A copy of the network in eval mode, with each batch norm folded into a convolution before it.

    The pairs are found by following picture (1, C, H, W) through the network; the folded copy must return the
    same embedding (to 1e-4 of its norm), else a copy that is not folded is returned.
    """
    plain = copied(network, picture)
    folded = copy.deepcopy(plain)
    with torch.no_grad():
        calls = module_calls(folded, picture)
        expected = calls[-1][3]
        count = Counter(id(module) for _, module, *_ in calls)
        made = {(id(output), versions[1]): (name, module) for name, module, _, output, versions in calls
                if isinstance(module, nn.Conv2d) and count[id(module)] == 1}
        for name, module, given, _, versions in calls:
            source = made.get((id(given), versions[0]))
            normed = isinstance(module, nn.BatchNorm2d) and module.running_mean is not None
            if normed and count[id(module)] == 1 and source:
                replace(folded, source[0], fuse_conv_bn_eval(source[1], module))
                replace(folded, name, nn.Identity())
        is_tensor = isinstance(expected, torch.Tensor)
        same = is_tensor and (folded(picture.clone()) - expected).norm() <= 1e-4 * expected.norm()
    return folded if same else plain


def replace(network, name, module):
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


@without_tf32()
def linear_stem(network, picture):
    """The convolution through which alone a picture (1, C, H, W) enters the network, or None.

    Tried out: the gradient through it must be the picture's own.
    """
    with torch.no_grad():
        calls = module_calls(network, picture)
    *_, entered, output, _ = calls[-1]
    stems = [module for _, module, given, *_ in calls if given is entered and isinstance(module, nn.Conv2d)]
    if not stems:
        return None
    stem, total = stems[0], [lambda a, b: a.sum(dim=1)]
    try:
        whole = next(distance_gradients(network, picture.clone(), output, total))[0]
        held = next(distance_gradients(network, picture.clone(), output, total, stem=stem))[0]
    except ValueError:  # no gradient at all: smoothgrad says so
        return None
    back = pull_back(stem, held, -picture[0])  # the same anywhere, if the stem is linear
    return stem if (back - whole).norm() <= 1e-4 * whole.norm() else None


def gradient_break(network, picture):
    """Where a picture's gradient (1, C, H, W) stops: "inside", "before" or "after layer X"."""
    where, picture = "(no layer can be named)", picture[:1].clone().requires_grad_()
    for name, module, given, output, versions in module_calls(network, picture):
        if any(module.children()) or None in versions:
            continue
        place = "before" if not given.requires_grad else "after" if output.requires_grad else "inside"
        where = f"{place} layer {name} ({type(module).__name__})"
        if place != "after":
            break
    return where


@without_tf32()
def prepare(network, example):
    """(network folded, frozen, channels-last; its linear stem or None); example: a picture on its device.

    What a network does not bear is left out; where it bears nothing it is itself.
    """
    try:
        network = network.to(example.device).eval()
        with torch.no_grad():
            expected = embed(network, example)
        for layout in (torch.channels_last, torch.contiguous_format):  # .view() does not bear the first
            with contextlib.suppress(Exception):
                ready = fold_batchnorm(network, example).requires_grad_(False).to(memory_format=layout)
                stem = linear_stem(ready, example)
                if (embed(ready, example) - expected).norm() <= 1e-3 * expected.norm():
                    return ready, stem
    except Exception as error:  # whatever a factory's network does with a picture
        from dml_common.command import out_of_memory
        if out_of_memory(error):
            raise
        raise ValueError(f"the network fails on a picture {tuple(example.shape[1:])}: "
                         f"{type(error).__name__}: {error}") from None
    with contextlib.suppress(RuntimeError):  # TorchScript keeps its weights' gradients: slower, the same maps
        network.requires_grad_(False)
    return network, None


def baseline_of(pixels, kind):
    """A picture's, uint8 (H, W, 3), of a kind: "black", its "mean" colour or its "blur" (side / 16; or σ)."""
    if kind == "black":
        return np.zeros_like(pixels)
    if kind == "mean":
        return np.broadcast_to(pixels.mean(axis=(0, 1)).round().astype(np.uint8), pixels.shape)
    radius = min(pixels.shape[:2]) / 16 if kind == "blur" else kind
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


# ---------------------------------------------------------------- the sanity check: randomised layers


def weighted_layers(network, picture):
    """{layer: names of its parameters}, in the order a picture (1, C, H, W) passes them.

    A layer is a module that is called, and none with parameters inside it is. Below all stands the rest, what
    belongs to none of them: class tokens, position embeddings, scales of blocks.
    """
    if any(isinstance(module, torch.jit.ScriptModule) for module in network.modules()):
        raise ValueError("layers of a TorchScript network can't be re-initialised; give it as Python code")
    parameters = [name for name, _ in network.named_parameters()]
    with torch.no_grad():
        calls = [name for name, *_ in module_calls(network, picture) if ".parametrizations." not in name]
    inside = {name: [one for one in parameters if one.startswith(name and f"{name}.")] for name in calls}
    layers, rest = {}, dict.fromkeys(parameters)
    for name, own in inside.items():  # what ends first is inside of what ends later, if it is inside at all
        if own and rest.keys() >= set(own) and name:
            layers[name] = own
            rest = {one: None for one in rest if one not in own}
    if not layers:
        return {"": parameters}
    named = ", ".join([*rest][:3]) + (", …" if len(rest) > 3 else "")
    return {f"the rest: {named}": list(rest), **layers} if rest else layers


def randomise(network, layers, pictures, seed):
    """A copy of the network with untrained `layers` (Adebayo et al. 2018; cascading for the topmost layers).

    layers: some of weighted_layers. Weights of two dimensions or more are drawn He-normal from (seed, layer)
    alone, biases are 0, other vectors 1; other layers than Conv2d and Linear use their reset_parameters, if
    any. Batch norms take their statistics from one pass of pictures (B, C, H, W): with the trained network's,
    which no longer fit, activations would die or explode.
    """
    network, fresh = copied(network, pictures[:1]), []
    gpus = [pictures.device] if pictures.is_cuda else []
    for layer, names in layers.items():
        with torch.random.fork_rng(devices=gpus), torch.no_grad():
            torch.manual_seed(noise_seed(seed, layer, 0))
            for owner in dict.fromkeys(name.rpartition(".")[0] for name in names):
                module = network.get_submodule(owner)
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                    fresh.append((module, module.momentum))
                    module.train().momentum = 1.0
                draw(module)
    with torch.no_grad():
        network(pictures.clone())
    for module, momentum in fresh:
        module.eval().momentum = momentum
    return network


def draw(module):
    """New values for a module's own parameters."""
    if hasattr(module, "reset_parameters") and not isinstance(module, (nn.Conv2d, nn.Linear)):
        return module.reset_parameters()
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
        else:
            nn.init.constant_(parameter, 0.0 if "bias" in name else 1.0)


# ---------------------------------------------------------------- are the maps faithful?


def block_order(saliency_map, size, block=8):
    """The blocks of a picture of size (H, W), numbered row by row, the most salient first: int64 (blocks,).

    saliency_map: (h, w), stretched to the size; a block counts by its mean, and is cut off at the edge.
    """
    stretched = interpolate(saliency_map[None, None], size, mode="bilinear")
    return avg_pool2d(stretched, block, ceil_mode=True).flatten().argsort(descending=True, stable=True)


def replaced_blocks(order, size, steps=20, block=8):
    """Where the first k / steps of the blocks are, k = 0 … steps: bool (steps + 1, H, W)."""
    rank = order.argsort()  # of a permutation its inverse
    rank = rank.view(-(-size[0] // block), -1).repeat_interleave(block, 0).repeat_interleave(block, 1)
    counts = torch.linspace(0, len(order), steps + 1, device=order.device).round()
    return rank[:size[0], :size[1]] < counts[:, None, None]


@torch.no_grad()
def faithfulness(network, picture, blurred, orders, distance, *, steps=20, block=8, batch=10, autocast=None):
    """Areas under the deletion and the insertion curve of each order of a picture's blocks: (orders, 2).

    picture: (C, H, W); blurred: what replaces its blocks in `steps` steps (deletion), or is replaced by them
    (insertion; Petsiuk et al. 2018); orders: of block_order, or any others. A curve is the distance to the
    picture's embedding, less the picture's own, as a share of that of the wholly blurred one; its area the
    trapezium rule's: large of deletion and small of insertion for a faithful map. nan: blurring does nothing.
    """
    origin, whole = embed(network, torch.stack([picture, blurred]), autocast)
    least, most = distance(torch.stack([origin, origin]), torch.stack([origin, whole]))
    areas = []
    for order in orders:
        there = replaced_blocks(order, picture.shape[1:], steps, block)[:, None]  # (steps + 1, 1, H, W)
        mixed = torch.cat([torch.where(there, blurred, picture), torch.where(there, picture, blurred)])
        embeddings = torch.cat([embed(network, part, autocast) for part in mixed.split(batch)])
        values = distance(origin.expand_as(embeddings), embeddings).view(2, -1)  # it is the SNR's anchor
        areas.append(torch.trapezoid((values - least) / (most - least), dx=1 / steps))
    return torch.stack(areas).masked_fill(most - least <= 1e-6, torch.nan)


# ---------------------------------------------------------------- the command

# What --as-published sets: how the maps of the published Tables 2-4 were made, each with its loss's distance.
PUBLISHED = {"order": "released", "samples": 50, "fold": "0", "noise": 0.15, "percentile": 99.0,
             "baseline": "black", "antithetic": False, "shared_noise": False, "map_size": None,
             "distance": None}


class Mapper:
    """smoothgrad with the command's options, and half the batch when the device's memory does not suffice."""

    def __init__(self, device, args):
        self.device, self.map_size, self.halved = device, args.map_size, False
        self.batch = (10 if device.type == "cpu" else 250) if args.batch is None else args.batch
        check_options(args.samples, args.noise, args.order, args.percentile, self.batch)
        self.options = {"autocast": torch.bfloat16 if args.precision == "bf16" else None}
        for name in ("samples", "noise", "order", "percentile", "antithetic"):
            self.options[name] = getattr(args, name)

    def __call__(self, what, ready, pictures, baselines, distance, seeds):
        """Maps of what prepare gave -> float16 array (b, H, W), or (k, b, H, W) of k distances."""
        from dml_common import command
        (network, stem), on_device = ready, (pictures.to(self.device), baselines.to(self.device))
        try:
            maps = smoothgrad(network, *on_device, distance, seeds=seeds, stem=stem, batch=self.batch,
                              **self.options)
            if self.map_size:
                maps = adaptive_avg_pool2d(maps, self.map_size)  # of finished maps: still in [0, 1]
            return maps.half().cpu().numpy()
        except Exception as error:  # whatever a factory's network does with pictures
            if not command.out_of_memory(error):
                kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
                raise ValueError(f"{what}: {kind}{error}") from None
        if self.batch == 1:
            raise ValueError(f"out of memory on {self.device} with a single copy; take a smaller network")
        if not self.halved:
            command.say(f"out of memory with {self.batch} copies at a time: going on with half, or fewer")
        self.batch, self.halved = self.batch // 2, True
        torch.cuda.empty_cache()
        return self(what, ready, pictures, baselines, distance, seeds)


def reader(job, kind, device):
    """load: row -> its picture and baseline (2, 3, H, W); stack: these -> (2, B, 3, H, W); an example."""
    from dml_common import pictures
    preprocessing = job.about["preprocessing"]

    def pixels_of(row):
        return pictures.load_pixels(job.dataset.paths[job.numbers[row]], preprocessing)

    def load(row):
        pixels = pixels_of(row)
        other = pixels_of(row ^ 1) if kind is None else baseline_of(pixels, kind)  # the other of the pair
        return pictures.normalise(np.stack([pixels, other]), preprocessing)

    def stack(pairs):
        return torch.from_numpy(np.stack(pairs, axis=1))

    size = pictures.input_size(preprocessing)
    pixels = np.random.default_rng(0).integers(0, 256, (1, *size, 3), dtype=np.uint8)
    return load, stack, torch.from_numpy(pictures.normalise(pixels, preprocessing)).to(device)


def make_maps(jobs, mapper, args):
    """The maps of one network, or of several that share their pictures, their trunk and the noise."""
    from dml_common import arrays, command, networks, rowfile
    trunks, options, counts = {}, jobs[0].about["options"], Counter()
    loaded = [networks.load(job.spec, trunks) for job in jobs]
    distances = [networks.distance(job.about["distance"]) for job in jobs]
    module, what = loaded[0].module, loaded[0].name
    if len(jobs) > 1:
        def through_head(head, distance, a, b):
            return distance(head(a), head(b))

        heads = [network.module[1].to(mapper.device).requires_grad_(False) for network in loaded]
        distances = [partial(through_head, *both) for both in zip(heads, distances)]
        module, what = module[0], f"{len(jobs)} networks"
    load, stack, example = reader(jobs[0], options["baseline"], mapper.device)
    ready = prepare(module, example)
    if ":" in loaded[0].backbone and arrays.depends_on_batch(partial(embed, ready[0]), example, what):
        mapper.batch = 1
    seed = f"{args.seed} ceiling" if options["ceiling"] else args.seed

    def compute(which, rows, both):
        numbers = [jobs[0].numbers[row] for row in rows]
        seeds = [noise_seed(seed, options["noise_of"], number) for number in numbers]
        maps = mapper(what, ready, *both, [distances[k] for k in which], seeds)
        for k, of_network in zip(which, maps):
            for row, number, one in zip(rows, numbers, of_network):
                if np.isnan(one).any():
                    path = jobs[0].dataset.paths[number]
                    command.say(f"{loaded[k].name}: {path}: a gradient is not finite; its map is nan")
                    counts["nan (a gradient is not finite)"] += 1
                elif options["against"] and jobs[0].numbers[row ^ 1] == number:
                    counts["all zeros (a picture against itself)"] += 1
                elif not one.any():
                    counts["all zeros (a constant map)"] += 1
        return maps

    size = (args.map_size, args.map_size) if args.map_size else tuple(example.shape[2:])
    together = max(1, round(4 * mapper.batch / args.samples))  # pictures in one call
    # few are claimed at a time: maps are slow, and processes shall end together
    rowfile.fill(jobs, [size] * len(jobs), np.float16, load, stack, compute, together, 4, args, "maps")
    for kind, count in sorted(counts.items(), reverse=True):
        command.say(f"{what}: {count:,} maps are {kind}")


def sanity(job, mapper, args, most=16):
    """Rows of sanity.csv: how the maps' correlation with the trained one's falls with randomised layers."""
    from dml_common import command, networks
    network, distance = networks.load(job.spec), networks.distance(job.about["distance"])
    load, stack, example = reader(job, args.baseline, mapper.device)
    loaded, rows, name = {}, [], job.spec["loss"] or job.spec["name"]
    for row, number in enumerate(job.numbers[:most]):
        with contextlib.suppress(ValueError, OSError):  # left out with --skip-unreadable
            loaded[number] = load(row)
    inputs, baselines = stack(list(loaded.values()))
    layers = list(weighted_layers(network.module, inputs[:1]).items())
    counts = np.unique(np.linspace(0, len(layers), args.randomise + 1).round().astype(int)).tolist()
    sizes = {key: parameter.numel() for key, parameter in network.module.named_parameters()}

    def maps(count, seed):
        module = randomise(network.module, dict(layers[len(layers) - count:]), inputs, args.seed)
        seeds = [noise_seed(seed, network.name, number) for number in loaded]
        made = mapper(network.name, prepare(module, example), inputs, baselines, distance, seeds)
        bar.update()
        return made.reshape(len(inputs), -1).astype(np.float64)

    with command.bar(len(counts) + 1, f"{network.name}, randomised", " steps") as bar:
        # the trained map has other noise than all that it is compared with: 0 layers gives the noise ceiling
        trained = maps(0, f"{args.seed} ceiling")
        for count in counts:
            with np.errstate(invalid="ignore"):
                r = np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(maps(count, args.seed), trained)])
            z = np.arctanh(np.clip(r[np.isfinite(r)], -0.999999, 0.999999))
            means = [float(np.tanh(z.mean())), float(np.tanh(z.std()))] if len(z) else [None, None]
            lowest = layers[-count][0] if count else None
            fresh = [sizes[key] for _, keys in layers[len(layers) - count:] for key in keys]
            share = sum(fresh) / max(1, sum(sizes.values()))
            rows.append([name, job.spec["fold"], count, len(layers), lowest, len(z), *means, share])
    return rows


FAITHFULNESS = ["model", "fold", "measure", "n", "left_out", "mean", "std", "low", "high"]


def check_faithfulness(job, mapper, args):
    """Rows of faithfulness.csv of a network's maps; each picture's areas are in maps_faithfulness.npy."""
    from dml_common import arrays, conclusions, files, networks, rowfile
    kept, maps = arrays.kept_rows(job), files.read_array(job.path)
    job = job._replace(numbers=[job.numbers[row] for row in kept],
                       path=job.path.with_stem(f"{job.path.stem}_faithfulness"))
    network, distance = networks.load(job.spec), networks.distance(job.about["distance"])
    load, stack, example = reader(job, 10, mapper.device)  # blurred with σ = 10 pixels
    ready, _ = prepare(network.module, example)

    def areas(row, picture, blurred):
        own, other = (torch.from_numpy(np.float32(maps[k])).to(mapper.device)
                      for k in (row, (row + 1) % len(maps)))
        orders = [block_order(one, picture.shape[1:]) for one in (own, other)]
        seed = noise_seed(args.seed, f"{network.name}, order of blocks", job.numbers[row])
        generator = torch.Generator().manual_seed(seed)
        orders += [torch.randperm(len(orders[0]), generator=generator).to(mapper.device)
                   for _ in range(5)]
        values = faithfulness(ready, picture, blurred, orders, distance, batch=mapper.batch,
                              autocast=mapper.options["autocast"]).cpu().numpy()
        if not own.isfinite().all() or not own.any():
            values[0] = np.nan
        if len(maps) == 1:
            values[1] = np.nan  # there is no other
        return np.stack([values[0], values[1], values[2:].mean(axis=0)])

    def compute(which, rows, both):
        return [np.stack([areas(row, *pair) for row, *pair in zip(rows, *both.to(mapper.device))])]

    for group in arrays.incomplete([job], str):
        rowfile.fill(group, [(3, 2)], np.float32, load, stack, compute, 1, 4, args, "pictures")
    rows, name = [], job.spec["loss"] or job.spec["name"]
    orders = files.read_array(job.path).astype(np.float64).transpose(2, 1, 0)  # own, another map's, random
    for curve, (own, other, by_chance) in zip(("deletion", "insertion"), orders):
        for measure, values in (("", own), ("_random", by_chance), ("_less_random", own - by_chance),
                                ("_other", other), ("_less_other", own - other)):
            n, *numbers = conclusions.mean_interval(values)
            rows.append([name, job.spec["fold"], curve + measure, n, len(maps) - n, *numbers])
    return rows


def parse(argv):
    from dml_common import arrays, command, networks
    parser = command.parser(__doc__)
    add = parser.add_argument_group("pictures and networks, as embed.py names them").add_argument
    arrays.add_options(add, "maps.npy")
    add("--network-seed", type=int, default=0, metavar="N", help="embed.py's --seed, of --loss None (0)")
    arrays.add_choice(add)
    add = parser.add_argument_group("maps").add_argument
    add("--samples", type=int, default=50, metavar="L", help="noisy copies of a picture (50)")
    add("--noise", type=float, default=0.15, metavar="S", help="deviation, as a share of max - min (0.15)")
    add("--order", default="paper", choices=["paper", "released"], help="of mean and abs, see above (paper)")
    add("--distance", choices=list(networks.DISTANCES), help="of l2-normalised embeddings (the loss's own)")
    add("--baseline", default="black", choices=["black", "mean", "blur"],
        help="whose embedding the distance is to: the picture all black, its mean colour, or blurred (black)")
    add("--map-size", type=int, metavar="N", help="average maps to N × N pixels (the network's input size)")
    add("--percentile", type=float, default=99.0, metavar="P", help="values above it are cut to it (99)")
    add("--seed", type=int, default=0, metavar="N", help="of the noise (0)")
    add("--shared-noise", action="store_true", help="the same noise for all networks: those of one trunk "
        "then share its passes; with --ceiling compare.py takes one map of each noise (independent)")
    add("--antithetic", action="store_true", help="every second copy takes the noise before it, negative")
    add("--ceiling", action="store_true", help="also maps_ceiling.npy, with other noise, for compare.py")
    add("--randomise", type=int, nargs="?", const=8, metavar="STEPS",
        help="also sanity.csv: the first 16 maps with ever more layers re-initialised from the top (8 steps)")
    add("--faithfulness", action="store_true", help="also faithfulness.csv: does the embedding move sooner "
        "when the most salient blocks are blurred, than in random order or in that of another picture's map?")
    add("--gallery", type=Path, metavar="FILE.png", help="the first 8 pictures or all of --pick: FILE_2 …")
    add("--as-published", action="store_true", help="as Tables 2-4: --order released --samples 50 --fold 0")
    add("--overlay", action="store_true", help="the maps over the grey pictures")
    add("--batch", type=int, metavar="N", help="copies at a time (10, on a GPU 250; fewer if memory ends)")
    args = command.parse_as_published(parser, argv, PUBLISHED)
    command.at_least(args, limit=1, randomise=1, workers=1, map_size=1)
    if args.against and (args.baseline != "black" or args.randomise or args.faithfulness):
        raise ValueError("--against has the other picture for a baseline, and no --randomise, --faithfulness")
    return args


def main(argv=None):
    from dml_common import arrays, command, files, gallery, pictures
    args = parse(argv)
    mapper = Mapper(command.torch_device(args.device, args.precision), args)
    names = ("samples", "noise", "order", "baseline", "percentile", "seed", "shared_noise", "antithetic",
             "precision", "limit", "pick", "map_size", "against")
    options = {name: getattr(args, name) for name in names}
    if args.against:
        options["baseline"] = None  # the other picture
    jobs, ceilings = [], []
    name = "pair_maps.npy" if args.against else "maps.npy"
    for job in arrays.jobs(args, name, options, args.network_seed, partial(arrays.chosen, args)):
        size = pictures.input_size(job.about["preprocessing"])
        if args.map_size and args.map_size > min(size):
            raise ValueError(f"--map-size {args.map_size}: the maps have {size[1]} × {size[0]} pixels")
        for ceiling, group in (False, jobs), (True, ceilings):
            path = job.path.with_stem(f"{job.path.stem}_ceiling") if ceiling else job.path
            noise_of = "" if args.shared_noise else job.spec["name"]
            group.append(job._replace(path=path, about={
                **job.about, "distance": args.distance or job.spec["distance"],
                "part": pictures.part_shown(job.about["preprocessing"]),
                "options": {**options, "ceiling": ceiling, "noise_of": noise_of}}))
    if args.gallery:
        gallery.check(jobs, args)

    def alike(job):  # jobs that share their passes
        trunk = args.shared_noise and job.spec["files"] and files.files_digest(job.spec["files"][:1])
        about = job.about
        return about["options"]["ceiling"], about["pictures"], about["preprocessing"], trunk or job.path

    for group in arrays.incomplete(jobs + ceilings if args.ceiling else jobs, alike):
        make_maps(group, mapper, args)
    if command.my_share()[0] == 0 and args.randomise:
        rows = [row for job in jobs for row in sanity(job, mapper, args)]
        header = ["model", "fold", "layers", "of", "lowest", "n", "correlation", "correlation_std", "share"]
        files.write_table(jobs[0].folder / "sanity.csv", header, rows)
    if args.faithfulness:
        rows = [row for job in jobs for row in check_faithfulness(job, mapper, args)]
        if command.my_share()[0] == 0:
            files.write_table(jobs[0].folder / "faithfulness.csv", FAITHFULNESS, rows)
            command.print_rows(FAITHFULNESS, rows)
    if command.my_share()[0] == 0 and args.gallery:
        gallery.make_gallery(jobs, args)


if __name__ == "__main__":
    command.run(main)
