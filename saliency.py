"""Which pixels an embedding depends on: SmoothGrad maps of d(f(I), f(black)) (Kobs et al. 2021, section 3).

Input:  pictures (a data set's name, a folder, a CSV) and networks, named as for embed.py
Output: maps.npy, float16 (n, H, W), values in [0, 1], row i is picture i, at the network's input size;
        maps.json beside it; with --ceiling maps_ceiling.npy, the same with other noise;
        with --gallery a PNG; with --randomise sanity.csv

    python saliency.py --dataset pictures/ --model efficientnet_lite0 --out maps.npy
    python saliency.py --dataset cars196 --loss all --fold 0 --limit 500 --out results
    python saliency.py --dataset pictures/ --model efficientnet_lite0 --pick 0,7 --out two.npy --gallery two.png
    torchrun --nproc-per-node 2 saliency.py --dataset cars196 --loss all --out results

An interrupted run goes on where it stopped when the same command runs again.

A map depends on the picture, the network, the options and the seed, not on batch size, order, process or restart:
the noise of picture i comes from (seed, name of the network, i) alone. What remains is the order of float32 sums.
Measured, EfficientNet-Lite0, 50 copies: another batch size moves no value of a map by more than 1e-6; another number
of threads moves single values by up to 0.008 (where a unit sits on the kink of its ReLU, rounding decides the
gradient), at a correlation of 0.9999997. CPU and CUDA draw different noise.

The paper says: absolute value of the averaged gradient, then the mean over channels (--order paper).
The authors' code says: mean over channels, absolute value of every copy, then the sum (--order released).
The two give different maps (README); the default is the paper's.
"""
if __name__ == "__main__":  # before torch is imported: Ctrl-C ends in one line from here on
    import sys
    try:
        from dml_common import command
    except ModuleNotFoundError:
        print("saliency.py: the command needs the folder dml_common/ beside it; copy that too", file=sys.stderr)
        sys.exit(2)
    command.begin()

import contextlib
import copy
import hashlib
import io
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d
from torch.nn.utils.fusion import fuse_conv_bn_eval

# ---------------------------------------------------------------- SmoothGrad


def smoothgrad(network, pictures, baseline, distance, *, samples=50, noise=0.15, order="paper", percentile=99.0,
               seeds=None, antithetic=False, batch=10, autocast=None, stem=None):
    """SmoothGrad maps of the distance between each picture's embedding and its baseline's (Kobs et al. 2021, Eq. 1-2).

    network: callable, pictures (B, C, H, W) -> embeddings (B, m), in eval mode; needs no preparation, but
        fold_batchnorm and requires_grad_(False) make it faster
    pictures: floating (n, C, H, W), as the network takes them; baseline: (C, H, W), or (n, C, H, W) for one each
    distance: callable, embeddings a (B, m) of pictures and b (B, m) of baselines -> (B,); differentiable. Or a list of
        k such callables, for networks that share a trunk: the network is the trunk, each callable applies its own
        head to both sides, and the trunk's forward passes are made once for all
    samples: noisy copies of a picture, l in Eq. 2
    noise: standard deviation of the noise as a share of max - min of each picture
    order: "paper" (mean over copies, absolute value, mean over channels) or "released" (mean over channels,
        absolute value of each copy, sum over copies)
    percentile: values above this percentile of a map are cut to it, before the map is scaled to [0, 1]
    seeds: an integer for each picture, of which alone its noise is made (default 0 … n - 1)
    antithetic: every second copy takes the negative noise of the one before it
    batch: copies in one pass, across pictures
    autocast: torch.bfloat16 or torch.float16 for mixed precision
    stem: the network's first convolution where the picture enters through it alone (linear_stem finds it):
        with order "paper" its backward pass, linear, runs once a picture instead of once a copy

    Returns maps (n, H, W), or (k, n, H, W), of the pictures' dtype, in [0, 1]: all zeros where a map is constant, all
    nan where a gradient is not finite. A constant picture that equals its baseline has distance 0 and no gradient: zeros.
    Raises ValueError for options out of range, when the network returns no 2-D embeddings, and when no gradient
    reaches the pictures.
    """
    check_options(samples, noise, order, percentile, batch)
    n = len(pictures)
    baseline = baseline[None] if baseline.ndim == 3 else baseline  # one for all is embedded once
    with torch.no_grad():
        origins = torch.cat([embed(network, part, autocast) for part in baseline.split(batch)])  # (n, m) or (1, m)
        origins = origins.expand(n, -1)
    spans = pictures.amax(dim=(1, 2, 3)) - pictures.amin(dim=(1, 2, 3))  # (n,)
    copies = noisy_copies(pictures, noise * spans, range(n) if seeds is None else seeds, samples, antithetic)
    through = stem if order == "paper" else None
    distances = [distance] if callable(distance) else list(distance)
    totals = [[0] * n for _ in distances]
    while chunk := list(itertools.islice(copies, batch)):
        which, noisy = zip(*chunk)
        found = distance_gradients(network, torch.stack(noisy), origins[list(which)], distances, autocast, through)
        for total, gradients in zip(totals, found):
            gradients = gradients.to(pictures.dtype)  # a stem's are bfloat16 under autocast: too coarse to be summed
            if order == "released":
                gradients = gradients.mean(dim=1).abs()  # (B, H, W)
            for i in dict.fromkeys(which):
                first = which.index(i)
                total[i] = total[i] + sum_copies(gradients[first:first + which.count(i)])
    nothing = (spans == 0) & (pictures == baseline).flatten(1).all(dim=1)
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
    """Sum over dim 0, in the order of memory: torch's own sum is 18 times as slow on channels-last tensors."""
    if gradients.ndim == 4 and gradients.is_contiguous(memory_format=torch.channels_last):
        return gradients.permute(0, 2, 3, 1).sum(dim=0).permute(2, 0, 1)
    return gradients.sum(dim=0)


def check_options(samples, noise, order, percentile, batch):
    """Raise ValueError for options of smoothgrad that are out of range."""
    if samples < 1:
        raise ValueError(f"samples is {samples}; expected at least 1 noisy copy")
    if not 0 <= noise < float("inf"):
        raise ValueError(f"noise is {noise}; expected a standard deviation of 0 or more, as a share of max - min (0.15)")
    if order not in ("paper", "released"):
        raise ValueError(f"order is {order!r}; expected 'paper' or 'released'")
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile is {percentile}; expected a number above 0, at most 100")
    if batch < 1:
        raise ValueError(f"batch is {batch}; expected at least 1 copy at a time")


def noisy_copies(pictures, sigmas, seeds, samples, antithetic=False):
    """Yield (number of the picture, noisy copy (C, H, W)), `samples` times for each picture in turn.

    One draw a copy: copy j of a picture is the same whatever follows, in any batch.
    """
    for i, seed in enumerate(seeds):
        generator = torch.Generator(pictures.device).manual_seed(int(seed))
        for j in range(samples):
            if not (antithetic and j % 2):
                drawn = torch.randn(pictures.shape[1:], generator=generator, device=pictures.device, dtype=pictures.dtype)
            else:
                drawn = -drawn
            yield i, pictures[i] + sigmas[i] * drawn


def noise_seed(seed, name, index):
    """The seed of picture index's noise for the network of that name: an integer of 63 bits."""
    digest = hashlib.sha256(f"{seed}\0{name}\0{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def embed(network, pictures, autocast=None):
    """Embeddings (B, m) of pictures (B, C, H, W), in float32 at least. Raises ValueError when they are not 2-D."""
    with torch.autocast(pictures.device.type, dtype=autocast, enabled=autocast is not None):
        embeddings = network(pictures)
    if not isinstance(embeddings, torch.Tensor) or embeddings.ndim != 2 or len(embeddings) != len(pictures):
        shape = tuple(embeddings.shape) if isinstance(embeddings, torch.Tensor) else type(embeddings).__name__
        raise ValueError(f"the network returned {shape} for {len(pictures)} pictures; expected embeddings of shape "
                         f"({len(pictures)}, m): take the output of its last pooled or linear layer")
    return embeddings if autocast is None else embeddings.float()


def distance_gradients(network, pictures, origins, distances, autocast=None, stem=None):
    """Yield each distance's gradient with respect to the pictures (B, C, H, W) or, with a stem, to the stem's output."""
    held = []

    def hold(module, given, output):
        held.append(output.detach().requires_grad_())
        return held[0].clone()  # a layer that writes in place must not write into a leaf

    if stem is None:
        held.append(pictures.requires_grad_())
        embeddings = embed(network, pictures, autocast)
    else:
        hook = stem.register_forward_hook(hold)
        try:
            embeddings = embed(network, pictures, autocast)
        finally:
            hook.remove()
    for left, distance in zip(reversed(range(len(distances))), distances):
        values, gradient = distance(embeddings, origins), None
        if values.requires_grad:
            gradient, = torch.autograd.grad(values.sum(), held[0], allow_unused=True, retain_graph=left > 0)
        if gradient is None:
            raise ValueError("no gradient reaches the pictures: the network detaches, quantises or leaves torch "
                             + gradient_break(network, pictures.detach()))
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


def module_calls(network, picture):
    """[(name, module, input, output, versions)] of one forward pass of picture (1, C, H, W), in the order they end.

    versions: of the input and output tensors then (they change when something writes into them in place).
    """
    calls, hooks = [], []
    for name, module in network.named_modules():
        def record(module, given, output, name=name):
            if given and isinstance(given[0], torch.Tensor) and isinstance(output, torch.Tensor):
                calls.append((name, module, given[0], output, (given[0]._version, output._version)))
        hooks.append(module.register_forward_hook(record))
    try:
        output = network(picture)
    finally:
        for hook in hooks:
            hook.remove()
    return calls, output


def fold_batchnorm(network, picture):
    """A copy of the network in eval mode, each batch norm folded into the convolution before it where there is one.

    The pairs are found by following picture (1, C, H, W) through the network; the folded copy must return the same
    embedding (to 1e-4 of its norm), else a copy that is not folded is returned.
    """
    plain = copy.deepcopy(network).eval()
    folded = copy.deepcopy(plain)
    with torch.no_grad():
        calls, expected = module_calls(folded, picture)
        count = Counter(id(module) for _, module, *_ in calls)
        made = {(id(output), versions[1]): (name, module) for name, module, _, output, versions in calls
                if isinstance(module, nn.Conv2d) and count[id(module)] == 1}
        for name, module, given, _, versions in calls:
            source = made.get((id(given), versions[0]))
            if isinstance(module, nn.BatchNorm2d) and count[id(module)] == 1 and source:
                replace(folded, source[0], fuse_conv_bn_eval(source[1], module))
                replace(folded, name, nn.Identity())
        same = isinstance(expected, torch.Tensor) and (folded(picture) - expected).norm() <= 1e-4 * expected.norm()
    return folded if same else plain


def replace(network, name, module):
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


def linear_stem(network, picture):
    """The convolution through which alone a picture (1, C, H, W) enters the network, or None.

    Tried out: the gradient through it must be the picture's own.
    """
    with torch.no_grad():
        calls, output = module_calls(network, picture)
    stem = next((module for _, module, given, *_ in calls if given is picture and isinstance(module, nn.Conv2d)), None)
    if stem is None:
        return None
    try:
        whole = next(distance_gradients(network, picture.clone(), output, [lambda a, b: a.sum(dim=1)]))[0]
        held = next(distance_gradients(network, picture.clone(), output, [lambda a, b: a.sum(dim=1)], stem=stem))[0]
    except ValueError:  # no gradient at all: smoothgrad says so
        return None
    return stem if (pull_back(stem, held, picture[0]) - whole).norm() <= 1e-4 * whole.norm() else None


def gradient_break(network, picture):
    """Where the gradient of a picture (1, C, H, W) stops: "inside layer X", "before layer X" or "after layer X"."""
    picture = picture[:1].clone().requires_grad_()
    last = None
    if isinstance(network, nn.Module):
        for name, module, given, output, _ in module_calls(network, picture)[0]:
            if any(module.children()):
                continue
            if not given.requires_grad:
                return f"before layer {name} ({type(module).__name__})"
            if not output.requires_grad:
                return f"inside layer {name} ({type(module).__name__})"
            last = f"after layer {name} ({type(module).__name__})"
    return last or "(no layer can be named)"


# ---------------------------------------------------------------- the sanity check: randomised layers


def weighted_layers(network, picture):
    """Names of the layers with parameters of their own, in the order a picture (1, C, H, W) passes them."""
    with torch.no_grad():
        calls, _ = module_calls(network, picture)
    return list(dict.fromkeys(name for name, module, *_ in calls if any(True for _ in module.parameters(recurse=False))))


def randomise(network, layers, pictures, seed):
    """A copy of the network whose `layers` are as before any training (Adebayo et al. 2018, cascading when layers
    are the topmost ones).

    Convolutions and linear layers draw He-normal weights and zero biases, from (seed, layer) alone; batch norms get
    weight 1 and bias 0 and take their statistics from one pass of pictures (B, C, H, W): with those of the trained
    network, which no longer fit, activations would die or explode. Other layers use their own reset_parameters.
    """
    network = copy.deepcopy(network).eval()
    fresh = []
    for name in layers:
        module = network.get_submodule(name)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(noise_seed(seed, name, 0))
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.reset_parameters()
                fresh.append((module, module.momentum))
                module.train().momentum = 1.0
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif hasattr(module, "reset_parameters"):
                module.reset_parameters()
    with torch.no_grad():
        network(pictures)
    for module, momentum in fresh:
        module.eval().momentum = momentum
    return network


# ---------------------------------------------------------------- the gallery

# Dark violet over red to light yellow: lightness grows evenly, so it survives colour blindness and grey printing.
HEAT = np.array([[0, 0, 4], [31, 12, 72], [85, 15, 109], [136, 34, 106], [186, 54, 85], [227, 89, 51],
                 [249, 142, 9], [249, 203, 53], [252, 255, 164]], dtype=np.float64)


def heat(saliency_map, picture=None):
    """Map (H, W) in [0, 1] in colour, uint8 (H, W, 3); over the grey picture (H, W, 3) if there is one. nan is grey."""
    known = np.isfinite(saliency_map)
    values = np.where(known, saliency_map, 0).astype(np.float64)
    colours = np.stack([np.interp(values * (len(HEAT) - 1), range(len(HEAT)), ramp) for ramp in HEAT.T], axis=-1)
    colours[~known] = 128
    if picture is not None:
        strength = 0.25 + 0.75 * values[..., None]
        colours = strength * colours + (1 - strength) * picture.mean(axis=2, keepdims=True)
    return colours.round().astype(np.uint8)


def draw_gallery(columns, names, titles, side=168, gap=8):
    """Pictures × networks as one PIL image: a column for each picture under its title, a row for each name.

    columns: for each picture its cells, uint8 (H, W, 3): itself, then a map of each network; names: of the cells.
    """
    font = ImageFont.load_default(size=13)
    left, top, step = 2 * gap + int(max(map(font.getlength, names))), 24, side + gap
    sheet = Image.new("RGB", (left + len(columns) * step, top + len(names) * step), "white")
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(names):
        draw.text((gap, top + row * step + side / 2), name, fill="black", font=font, anchor="lm")
    for column, (cells, title) in enumerate(zip(columns, titles)):
        while font.getlength(title) > side:
            title = "…" + title[2:]
        draw.text((left + column * step, top / 2), title, fill="black", font=font, anchor="lm")
        for row, pixels in enumerate(cells):
            cell = Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(cell, (left + column * step, top + row * step))
    return sheet


# ---------------------------------------------------------------- the command


class Mapper:
    """smoothgrad with a command's options; where the device's memory does not suffice, with half the batch."""

    def __init__(self, device, args):
        self.device, self.map_size, self.halved = device, args.map_size, False
        self.batch = (10 if device.type == "cpu" else 250) if args.batch is None else args.batch
        check_options(args.samples, args.noise, args.order, args.percentile, self.batch)
        self.options = {name: getattr(args, name) for name in ("samples", "noise", "order", "percentile", "antithetic")}
        self.options["autocast"] = torch.bfloat16 if args.precision == "bf16" else None

    def __call__(self, ready, pictures, baselines, distance, seeds):
        """Maps of a network that prepare made ready -> float16 array (b, H, W), or (k, b, H, W) of k distances."""
        from dml_common import command

        network, stem = ready
        pictures, baselines = pictures.to(self.device), baselines.to(self.device)
        while True:
            try:
                maps = smoothgrad(network, pictures, baselines, distance, seeds=seeds, stem=stem, batch=self.batch,
                                  **self.options)
                if self.map_size:
                    maps = adaptive_avg_pool2d(maps, self.map_size)  # of finished maps: still in [0, 1]
                return maps.half().cpu().numpy()
            except (RuntimeError, MemoryError) as error:
                if not command.out_of_memory(error):
                    raise
            if self.batch == 1:
                raise ValueError(f"out of memory on {self.device} with a single copy; use a smaller network or another "
                                 "--device")
            if not self.halved:
                command.say(f"out of memory with {self.batch} copies at a time: going on with {self.batch // 2} "
                            "(--batch), or fewer")
            self.batch, self.halved = self.batch // 2, True
            if self.device.type == "cuda":
                torch.cuda.empty_cache()


def prepare(network, example):
    """(network folded, frozen, channels-last; its linear stem or None), found with an example (1, C, H, W) on its device."""
    ready = fold_batchnorm(network.to(example.device), example).requires_grad_(False)
    ready = ready.to(memory_format=torch.channels_last)
    return ready, linear_stem(ready, example)


def baseline_of(pixels, kind):
    """The picture, uint8 (H, W, 3), that stands for nothing: "black", its "mean" colour, or its "blur" (side / 16)."""
    if kind == "black":
        return np.zeros_like(pixels)
    if kind == "mean":
        return np.broadcast_to(pixels.mean(axis=(0, 1)).round().astype(np.uint8), pixels.shape)
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(min(pixels.shape[:2]) / 16)))


def loader(preprocessing, baseline):
    """(load, stack) of pictures: path -> a picture and its baseline (2, 3, H, W); list of them -> (2, B, 3, H, W)."""
    from dml_common import pictures

    def load(path):
        pixels = pictures.load_pixels(path, preprocessing)
        return pictures.normalise(np.stack([pixels, baseline_of(pixels, baseline)]), preprocessing)

    def stack(pairs):
        return torch.from_numpy(np.stack(pairs, axis=1))

    return load, stack


def made_ready(module, preprocessing, device):
    """prepare, with a random picture."""
    from dml_common import pictures

    pixels = np.random.default_rng(0).integers(0, 256, (1, *pictures.input_size(preprocessing), 3), dtype=np.uint8)
    return prepare(module, torch.from_numpy(pictures.normalise(pixels, preprocessing)).to(device))


def with_head(head, distance):
    """The distance of two trunk's outputs through one network's own head."""
    return lambda a, b: distance(head(a), head(b))


def make_maps(jobs, mapper, args):
    """Maps for jobs that share their pictures: of one network, or of several that share their trunk and the noise."""
    from dml_common import command, networks, pictures, rowfile

    trunks, options = {}, jobs[0].about["options"]
    loaded = [networks.load(job.spec, trunks) for job in jobs]
    distances = [networks.distance(job.about["distance"]) for job in jobs]
    module, preprocessing, what = loaded[0].module, loaded[0].preprocessing, loaded[0].name
    if len(jobs) > 1:
        module, what = module[0], f"{len(jobs)} networks"
        heads = [network.module[1].to(mapper.device).requires_grad_(False) for network in loaded]
        distances = [with_head(head, distance) for head, distance in zip(heads, distances)]
    ready = made_ready(module, preprocessing, mapper.device)
    seed = f"{args.seed} ceiling" if options["ceiling"] else args.seed
    counts = {"nan (a gradient is not finite)": 0, "all zeros (a constant map)": 0}

    def compute(which, rows, both):
        numbers = [jobs[0].numbers[row] for row in rows]
        seeds = [noise_seed(seed, options["noise_of"], number) for number in numbers]
        try:
            maps = mapper(ready, *both, [distances[k] for k in which], seeds)
        except ValueError as error:
            raise ValueError(f"{what}: {error}") from None
        for k, i in itertools.product(range(len(which)), range(len(rows))):
            if np.isnan(maps[k, i]).any():
                command.say(f"{loaded[which[k]].name}: {jobs[0].dataset.paths[numbers[i]]}: a gradient is not finite; "
                            "its map is nan, compare.py leaves it out")
                counts["nan (a gradient is not finite)"] += 1
            counts["all zeros (a constant map)"] += not maps[k, i].any()
        return maps

    size = (args.map_size, args.map_size) if args.map_size else pictures.input_size(preprocessing)
    together = max(1, round(4 * mapper.batch / args.samples))  # pictures in one call
    # few are claimed at a time: maps are slow, and processes shall end together
    rowfile.fill(jobs, [size] * len(jobs), np.float16, *loader(preprocessing, args.baseline), compute, together, 4, args,
                 "maps")
    for kind, count in counts.items():
        if count:
            command.say(f"{what}: {count:,} maps are {kind}")


def chosen(n, limit, pick):
    """Numbers of the pictures asked for. Raises ValueError for numbers that are not there."""
    if pick is None:
        return range(n)[:limit]
    bad = [i for i in pick if not 0 <= i < n]
    if bad:
        raise ValueError(f"--pick {bad[0]}: there are {n:,} pictures; expected numbers from 0 to {n - 1}")
    return dict.fromkeys(pick)


def make_gallery(jobs, args):
    """Write the gallery of the first eight pictures, or of all of --pick, eight on a page."""
    from dml_common import files, pictures

    dataset, arrays, columns, titles = jobs[0].dataset, [], [], []
    for job in jobs:
        left_out = files.read_sidecar(job.path)["pictures"].get("left_out", [])
        there = [number for number in job.numbers if dataset.relative[number] not in left_out]
        arrays.append((files.read_array(job.path), there, job.about["preprocessing"]))
    for number in jobs[0].numbers[:None if args.pick else 8]:
        if not all(number in there for _, there, _ in arrays):
            continue
        cells = []
        for array, there, preprocessing in arrays:
            pixels = pictures.load_pixels(dataset.paths[number], preprocessing)
            one = Image.fromarray(np.float32(array[there.index(number)]))
            one = np.asarray(one.resize(pixels.shape[1::-1], Image.Resampling.BILINEAR))
            cells = (cells or [pixels]) + [heat(one, pixels if args.overlay else None)]
        columns.append(cells)
        titles.append(dataset.relative[number])
    one_fold = len({job.spec["fold"] for job in jobs}) == 1
    names = [job.spec["loss"] if one_fold and job.spec["loss"] else job.spec["name"] for job in jobs]
    for page, start in enumerate(range(0, len(columns), 8), 1):
        png = io.BytesIO()
        draw_gallery(columns[start:start + 8], ["Picture", *names], titles[start:start + 8]).save(png, "PNG")
        suffix = f"_{page}{args.gallery.suffix}" if page > 1 else args.gallery.suffix
        files.write_file(args.gallery.with_name(args.gallery.stem + suffix), png.getvalue())


def check_gallery(args, jobs):
    """Raise ValueError unless the gallery can be drawn and written, over nothing that is needed."""
    from dml_common import files

    held_out = {job.spec["fold"] for job in jobs if job.dataset.split == "held out"}
    if len(held_out) > 1:
        raise ValueError(f"--gallery: folds {', '.join(map(str, sorted(held_out)))} are analysed on different pictures; "
                         "give one --fold")
    files.check_output(args.gallery, [jobs[0].path, jobs[0].dataset.folder / "props.csv", *jobs[0].dataset.paths])


def sanity(job, mapper, args, most=16):
    """Rows of sanity.csv: how the maps' correlation with the trained network's falls as layers are randomised."""
    from dml_common import command, networks

    network = networks.load(job.spec)
    distance = networks.distance(job.about["distance"])
    load, stack = loader(network.preprocessing, args.baseline)
    numbers, loaded, rows, trained = [], [], [], None
    for number in job.numbers[:most]:
        with contextlib.suppress(ValueError, OSError):  # left out with --skip-unreadable
            loaded.append(load(job.dataset.paths[number]))
            numbers.append(number)
    inputs, baselines = stack(loaded)
    layers = weighted_layers(network.module, inputs[:1])
    steps = np.unique(np.linspace(0, len(layers), args.randomise + 1).round().astype(int)).tolist()
    with command.bar(len(steps) + 1, f"{network.name}, randomised", " steps") as bar:
        for step in [None, *steps]:
            module = randomise(network.module, layers[len(layers) - (step or 0):], inputs, args.seed)
            # the trained map has other noise than all that it is compared with: 0 layers gives the noise ceiling
            seed = f"{args.seed} ceiling" if step is None else args.seed
            seeds = [noise_seed(seed, network.name, number) for number in numbers]
            ready = made_ready(module, network.preprocessing, mapper.device)
            maps = mapper(ready, inputs, baselines, distance, seeds).reshape(len(inputs), -1).astype(np.float64)
            bar.update()
            if step is None:
                trained = maps
                continue
            with np.errstate(invalid="ignore"):
                r = np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(maps, trained)])
            z = np.arctanh(np.clip(r[np.isfinite(r)], -0.999999, 0.999999))
            rows.append([job.spec["loss"] or job.spec["name"], job.spec["fold"], step, len(layers),
                         layers[-step] if step else None, len(z),
                         *([float(np.tanh(z.mean())), float(np.tanh(z.std()))] if len(z) else [None, None])])
    return rows


def integers(text):
    return [int(part) for part in text.split(",")]


def parse(argv):
    from dml_common import command, networks

    parser = command.parser(__doc__)
    add = parser.add_argument_group("pictures and networks, as embed.py names them").add_argument
    command.add_pictures(add)
    command.add_networks(add, networks.MODELS)
    add("--network-seed", type=int, default=0, metavar="N", help="of the random layer of --loss None: embed.py's --seed (0)")
    add("--out", type=Path, default=Path("results"), metavar="FILE.npy|DIR",
        help="one network's array, or the folder of all: DIR/<dataset>/<slug>/fold<k>/maps.npy (results)")
    add("--skip-unreadable", action="store_true", help="leave pictures out that can't be read, and name them (stop there)")
    add("--limit", type=int, metavar="N", help="only the first N pictures")
    add("--pick", type=integers, metavar="I,J,K", help="only the pictures of these numbers, counted from 0")
    add = parser.add_argument_group("maps").add_argument
    add("--samples", type=int, default=50, metavar="L", help="noisy copies of a picture (50)")
    add("--noise", type=float, default=0.15, metavar="S",
        help="standard deviation, as a share of the picture's max - min (0.15)")
    add("--order", default="paper", choices=["paper", "released"], help="of absolute value and averages, see above (paper)")
    add("--distance", choices=list(networks.DISTANCES), help="of l2-normalised embeddings (the loss's own)")
    add("--baseline", default="black", choices=["black", "mean", "blur"], help="whose embedding the distance is to: a "
        "black picture, the picture's mean colour, the picture blurred (black)")
    add("--map-size", type=int, metavar="N", help="store maps averaged to N × N pixels: 57 instead of 227 takes a 16th "
        "of the space (the network's input size)")
    add("--percentile", type=float, default=99.0, metavar="P", help="values above it are cut to it (99)")
    add("--seed", type=int, default=0, metavar="N", help="of the noise (0)")
    add("--shared-noise", action="store_true", help="the same noise for all networks: networks of one trunk (train.py "
        "--freeze-trunk) then share its passes; raises correlations, but with --ceiling compare.py takes one map of each "
        "noise (independent)")
    add("--antithetic", action="store_true", help="every second copy takes the negative noise of the one before: in the "
        "paper's order 50 copies then serve like 62, in the released order there is nothing to gain (independent noise)")
    add = parser.add_argument_group("can the maps be trusted").add_argument
    add("--ceiling", action="store_true", help="also maps_ceiling.npy, with other noise: compare.py then gives the noise "
        "ceiling")
    add("--randomise", type=int, nargs="?", const=8, metavar="STEPS", help="also sanity.csv: the first 16 pictures' maps "
        "after re-initialising ever more layers from the top (8 steps)")
    add = parser.add_argument_group("picture × network").add_argument
    add("--gallery", type=Path, metavar="FILE.png", help="the first 8 pictures, or all of --pick; 8 on a page, further "
        "pages FILE_2.png …")
    add("--overlay", action="store_true", help="the maps over the grey pictures")
    add = parser.add_argument_group("speed").add_argument
    command.add_speed(add)
    add("--batch", type=int, metavar="N", help="copies at a time (10 on a CPU, 250 on a GPU; halved when memory runs out)")
    args = parser.parse_args(argv)
    for name in ("limit", "randomise", "workers", "map_size"):
        command.at_least(name.replace("_", "-"), getattr(args, name))
    return args


def main(argv=None):
    from dml_common import command, files, networks, pictures, rowfile

    args = parse(argv)
    device = command.torch_device(args.device, args.precision)
    mapper = Mapper(device, args)
    names = ("samples", "noise", "order", "baseline", "percentile", "seed", "shared_noise", "antithetic", "precision",
             "limit", "pick", "map_size")
    options, jobs, ceilings = {name: getattr(args, name) for name in names}, [], []
    for job in rowfile.jobs(args, "maps.npy", options, args.network_seed, lambda n: chosen(n, args.limit, args.pick)):
        size = pictures.input_size(job.about["preprocessing"])
        if args.map_size and args.map_size > min(size):
            raise ValueError(f"--map-size {args.map_size}: the maps have {size[1]} × {size[0]} pixels; give fewer")
        about = {**job.about, "distance": args.distance or job.spec["distance"], "options": {
            **options, "ceiling": False, "noise_of": "" if args.shared_noise else job.spec["name"]}}
        jobs.append(job._replace(about=about))
        about = {**about, "options": {**about["options"], "ceiling": True}}
        path = job.path.with_name(f"{job.path.stem}_ceiling.npy")
        ceilings.append(job._replace(path=path, about=about))
    if args.gallery:
        check_gallery(args, jobs)

    def alike(job):  # jobs that are take the same passes
        trunk = args.shared_noise and job.spec["files"] and networks.files_sha256(job.spec["files"][:1])
        about = job.about
        return (about["options"]["ceiling"], about["pictures"], about["preprocessing"], trunk or job.path)

    for group in rowfile.incomplete(jobs + ceilings if args.ceiling else jobs, alike):
        make_maps(group, mapper, args)
    if command.my_share()[0] > 0:
        return
    if args.randomise:
        rows = [row for job in jobs for row in sanity(job, mapper, args)]
        header = ["model", "fold", "layers", "of", "lowest", "n", "correlation", "correlation_std"]
        files.write_table(jobs[0].folder / "sanity.csv", header, rows)
    if args.gallery:
        make_gallery(jobs, args)


if __name__ == "__main__":
    command.run(main)
