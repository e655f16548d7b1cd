"""Which pixels an embedding depends on: SmoothGrad maps of d(f(I), f(black)) (Kobs et al. 2021, section 3).

Input:  pictures (a data set's name, a folder, a CSV) and networks, named as for embed.py
Output: maps.npy, float16 (n, H, W), values in [0, 1], row i is picture i, at the network's input size;
        maps.json beside it; with --ceiling maps_ceiling.npy, the same with other noise;
        with --gallery a PNG; with --randomise sanity.csv

    python saliency.py --dataset pictures/ --model efficientnet_lite0 --out maps.npy
    python saliency.py --dataset cars196 --loss all --fold 0 --limit 500 --out results
    python saliency.py --dataset pictures/ --model efficientnet_lite0 --pick 0,7,21 --out three.npy --gallery three.png
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
import argparse
import copy
import hashlib
import io
import itertools
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from dml_common import files
from dml_common import pictures as data
from dml_common import networks as models
from dml_common import rowfile

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
HEAT = np.array([[0, 0, 4], [31, 12, 72], [85, 15, 109], [136, 34, 106], [186, 54, 85], [227, 89, 51], [249, 142, 9],
                 [249, 203, 53], [252, 255, 164]], dtype=np.float64)


def heat(saliency_map, picture=None):
    """Map (H, W) in [0, 1] in colour, uint8 (H, W, 3); over the grey picture (H, W, 3) if one is given. nan is grey."""
    known = np.isfinite(saliency_map)
    position = np.where(known, saliency_map, 0).astype(np.float64) * (len(HEAT) - 1)
    colours = np.stack([np.interp(position, range(len(HEAT)), channel) for channel in HEAT.T], axis=-1)
    colours[~known] = 128
    if picture is not None:
        strength = (0.25 + 0.75 * np.where(known, saliency_map, 0).astype(np.float64))[..., None]
        colours = strength * colours + (1 - strength) * picture.mean(axis=2, keepdims=True)
    return colours.round().astype(np.uint8)


def draw_gallery(rows, names, titles, cell=168, across=8):
    """Figure 2 for several pictures, as one PIL image: each picture's cells under their names, its title below.

    rows: for each picture the list of its cells, uint8 (H, W, 3): the picture, then a map for each network;
    names: of the cells; titles: of the pictures. Lines have up to `across` cells: a longer row is broken, and
    several short rows stand side by side.
    """
    strips = [draw_strip(cells, names, title, cell, across) for cells, title in zip(rows, titles)]
    width, height = strips[0].size
    beside = min(max(1, across // len(names)), len(strips))
    lines = -(-len(strips) // beside)
    sheet = Image.new("RGB", (beside * width, lines * height), "white")
    for number, strip in enumerate(strips):
        sheet.paste(strip, (number % beside * width, number // beside * height))
    return sheet


def draw_strip(cells, names, title, cell, across, gap=8, text=18):
    """One picture's part of the gallery."""
    font, small = ImageFont.load_default(size=15), ImageFont.load_default(size=12)
    wrapped = [wrap(name, font, cell) for name in names]
    head = text * max(len(lines) for lines in wrapped) + 4
    columns, lines = min(across, len(cells)), -(-len(cells) // across)
    strip = Image.new("RGB", (columns * (cell + gap) + 2 * gap, lines * (head + cell + gap) + text + 2 * gap), "white")
    draw = ImageDraw.Draw(strip)
    for i, pixels in enumerate(cells):
        x, y = 2 * gap + i % across * (cell + gap), gap + i // across * (head + cell + gap) + head
        strip.paste(Image.fromarray(pixels).resize((cell, cell), Image.Resampling.LANCZOS), (x, y))
        for number, line in enumerate(reversed(wrapped[i])):
            draw.text((x + cell / 2, y - 5 - number * text), line, fill="black", font=font, anchor="ms")
    draw.text((2 * gap, strip.height - 2 * gap), shorten(title, small, cell * columns), fill=(90, 90, 90), font=small, anchor="ls")
    return strip


def wrap(text, font, width):
    """Words in lines no wider than width pixels; a word that is too long is shortened."""
    lines = [""]
    for word in text.replace("_", " ").split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return [shorten(line, font, width) for line in lines]


def shorten(text, font, width):
    while font.getlength(text) > width:
        text = "…" + text[2:]
    return text


# ---------------------------------------------------------------- the command


def say(text):
    print(f"saliency.py: {text}", file=sys.stderr)


def out_of_memory(error):
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)


def maps_of(ready, stem, pictures, baselines, distance, seeds, args):
    """smoothgrad on the device, with half the batch when its memory does not suffice -> float16 array (b, H, W)."""
    while True:
        try:
            maps = smoothgrad(ready, pictures.to(args.device), baselines.to(args.device), distance, samples=args.samples,
                              noise=args.noise, order=args.order, percentile=args.percentile, seeds=seeds,
                              antithetic=args.antithetic, batch=args.batch, stem=stem,
                              autocast=torch.bfloat16 if args.precision == "bf16" else None)
            if args.map_size:
                maps = torch.nn.functional.adaptive_avg_pool2d(maps, args.map_size)  # of finished maps: still in [0, 1]
            return maps.half().cpu().numpy()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        if args.batch == 1:
            raise ValueError(f"out of memory on {args.device} with a single copy; use a smaller network or another --device")
        if not args.halved:
            say(f"out of memory with {args.batch} copies at a time: going on with {args.batch // 2} (--batch), or fewer")
        args.batch, args.halved = args.batch // 2, True
        if args.device.type == "cuda":
            torch.cuda.empty_cache()


def prepare(module, preprocessing, device):
    """The network on the device, folded, frozen, channels-last, and its linear stem (None where it has none)."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, *data.input_size(preprocessing), 3), dtype=np.uint8)
    example = torch.from_numpy(data.normalise(pixels, preprocessing)).to(device)
    ready = fold_batchnorm(module.to(device), example).requires_grad_(False).to(memory_format=torch.channels_last)
    return ready, linear_stem(ready, example)


def load(path, preprocessing, baseline):
    """A picture and its baseline as the network's input, float32 (3, H, W) each; or the error of one that can't be read.

    baseline: "black"; "mean", the picture's own mean colour; "blur", the picture under a Gaussian of 1/16 of its side.
    """
    try:
        pixels = data.load_pixels(path, preprocessing)
    except (ValueError, OSError) as error:
        return error
    if baseline == "black":
        start = np.zeros_like(pixels)
    elif baseline == "mean":
        start = np.broadcast_to(pixels.mean(axis=(0, 1)).round().astype(np.uint8), pixels.shape)
    else:
        start = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(min(pixels.shape[:2]) / 16)))
    return torch.from_numpy(data.normalise(pixels, preprocessing)), torch.from_numpy(data.normalise(start, preprocessing))


def claimed(files, shares, paths, preprocessing, baseline, workers):
    """Yield (rows, for each the numbers of the files that lack it, what load returns for each); the next block is decoded meanwhile."""
    with ThreadPoolExecutor(workers) as pool:
        blocks = []
        for start, stop in shares:
            lacking = {}
            for number, file in enumerate(files):
                for row in file.claim(start, stop).tolist():
                    lacking.setdefault(row, []).append(number)
            rows = sorted(lacking)
            blocks.append((rows, lacking, [pool.submit(load, paths[row], preprocessing, baseline) for row in rows]))
            if len(blocks) == 2:
                rows, lacking, futures = blocks.pop(0)
                yield rows, lacking, [future.result() for future in futures]
        for rows, lacking, futures in blocks:
            yield rows, lacking, [future.result() for future in futures]


def with_head(head, distance):
    """The distance of two trunk's outputs through one network's own head."""
    return lambda a, b: distance(head(a), head(b))


def fill(files, specs, pictures, distances, name, seed, args, share):
    """Compute the maps missing in RowFiles of the same pictures: one network's, or those of several that share trunk and noise.

    pictures: [(number in the data set, path)] of the rows.
    """
    paths, trunks = [path for _, path in pictures], {}
    networks = [models.load(spec, trunks) for spec in specs]
    preprocessing, module = networks[0].preprocessing, networks[0].module
    if len(networks) > 1:
        module = networks[0].module[0]
        heads = [network.module[1].to(args.device).requires_grad_(False) for network in networks]
        distances = [with_head(head, distance) for head, distance in zip(heads, distances)]
    ready, stem = prepare(module, preprocessing, args.device)
    together = max(1, round(4 * args.batch / args.samples))  # pictures in one call
    nans, zeros, what = 0, 0, networks[0].name if len(networks) == 1 else f"{len(networks)} networks"
    bar = tqdm(total=sum(file.missing() for file in files), desc=what, delay=2, unit=" maps",
               disable=share[0] > 0 or not sys.stderr.isatty())
    shares = rowfile.shares(len(paths), *share, block=max(4, together))  # small: maps are slow, ranks end together
    with bar:
        for rows, lacking, loaded in claimed(files, shares, paths, preprocessing, args.baseline, args.workers):
            for row, error in [item for item in zip(rows, loaded) if isinstance(item[1], Exception)]:
                if not args.skip_unreadable:
                    raise ValueError(f"{error}, or leave it out with --skip-unreadable")
                say(f"left out: {error}")
                for number in lacking[row]:
                    files[number].leave_out([row])
            good = [item for item in zip(rows, loaded) if not isinstance(item[1], Exception)]
            for numbers, group in itertools.groupby(good, key=lambda item: lacking[item[0]]):
                group = list(group)
                wanted = [distances[number] for number in numbers] if len(networks) > 1 else distances[0]
                for part in [group[start:start + together] for start in range(0, len(group), together)]:
                    inputs, baselines = (torch.stack(tensors) for tensors in zip(*(pair for _, pair in part)))
                    part = [row for row, _ in part]
                    seeds = [noise_seed(seed, name, pictures[row][0]) for row in part]
                    try:
                        maps = maps_of(ready, stem, inputs, baselines, wanted, seeds, args)
                    except ValueError as error:
                        raise ValueError(f"{what}: {error}") from None
                    for number, of_one in zip(numbers, maps if len(networks) > 1 else [maps]):
                        for row, found in zip(part, of_one):
                            if np.isnan(found).any():
                                say(f"{networks[number].name}: {paths[row]}: a gradient is not finite; its map is nan, compare.py leaves it out")
                                nans += 1
                            zeros += not found.any()
                        files[number].write(part, of_one)
                        bar.update(len(part))
    for count, kind in (nans, "nan (a gradient is not finite)"), (zeros, "all zeros (a constant map)"):
        if count:
            say(f"{what}: {count:,} maps are {kind}")


def listed(relative):
    return {"number": len(relative), "sha256": data.pictures_sha256(relative)}


def finish(file, relative):
    """Rename the complete array; pictures that could not be read are left out of array and JSON alike."""
    left_out = set(file.left_out().tolist())
    if not left_out:
        return file.finish()
    keep = [name for row, name in enumerate(relative) if row not in left_out]
    pictures = {**listed(keep), "left_out": [relative[row] for row in sorted(left_out)], "listed": listed(relative)}
    return file.finish({**file.about, "pictures": pictures})


def about(dataset, spec, chosen, relative, distance, ceiling, args):
    """The JSON beside the array."""
    rows = {"rows": [spec["config"]["split"]["test"][i] for i in chosen]} if dataset.split == "held out" else {}  # of the whole
    options = {key: getattr(args, key) for key in ("samples", "noise", "order", "baseline", "percentile", "seed", "shared_noise",
                                                   "antithetic", "precision", "limit", "pick", "map_size")}
    return {"dataset": dataset.name, "split": dataset.split, **rows, **models.describe(spec), "distance": distance,
            "options": {**options, "ceiling": ceiling, "noise_of": "" if args.shared_noise else spec["name"]},
            "versions": {"torch": torch.__version__, "numpy": np.__version__, "pillow": PIL.__version__},
            "pictures": listed(relative)}


def chosen_rows(n, limit, pick):
    """Numbers of the pictures asked for. Raises ValueError for numbers that are not there."""
    if pick is None:
        return list(range(n if limit is None else min(limit, n)))
    bad = [i for i in pick if not 0 <= i < n]
    if bad:
        raise ValueError(f"--pick {bad[0]}: there are {n:,} pictures; expected numbers from 0 to {n - 1}")
    return list(dict.fromkeys(pick))


def make_gallery(path, arrays, preprocessings, names, pictures, relative, overlay, most):
    """Write the gallery of the first `most` pictures as one PNG or, eight pictures each, several."""
    rows = []
    for i in range(min(most, len(pictures))):
        cells = []
        for array, preprocessing in zip(arrays, preprocessings):
            kept = files.read_sidecar(array)["pictures"].get("left_out", [])
            if relative[i] in kept:
                break
            row = i - sum(name in kept for name in relative[:i])
            pixels = data.load_pixels(pictures[i][1], preprocessing)
            cells = cells or [pixels]
            found = Image.fromarray(np.float32(files.read_array(array)[row])).resize(pixels.shape[1::-1], Image.Resampling.BILINEAR)
            cells.append(heat(np.asarray(found), pixels if overlay else None))
        else:
            rows.append((cells, relative[i]))
    for page, start in enumerate(range(0, len(rows), 8)):
        cells, titles = zip(*rows[start:start + 8])
        png = io.BytesIO()
        draw_gallery(cells, ["Picture", *names], titles).save(png, "PNG")
        files.write_file(path if page == 0 else path.with_name(f"{path.stem}_{page + 1}{path.suffix}"), png.getvalue())


def sanity(spec, pictures, distance, args, most=16):
    """Rows of sanity.csv: how the maps' correlation with the trained network's falls as layers are randomised."""
    network = models.load(spec)
    loaded = [(number, load(path, network.preprocessing, args.baseline)) for number, path in pictures[:most]]
    loaded = [(number, pair) for number, pair in loaded if not isinstance(pair, Exception)]
    inputs, baselines = (torch.stack(tensors) for tensors in zip(*(pair for _, pair in loaded)))
    layers = weighted_layers(network.module, inputs[:1])
    counts = np.unique(np.linspace(0, len(layers), args.randomise + 1).round().astype(int))
    found = []
    for step in tqdm([None, *counts.tolist()], desc=f"{network.name}, randomised", delay=2, disable=not sys.stderr.isatty()):
        module = randomise(network.module, layers[len(layers) - (step or 0):], inputs, args.seed)
        ready, stem = prepare(module, network.preprocessing, args.device)
        # the trained map has other noise than all that it is compared with: 0 layers gives the noise ceiling
        seeds = [noise_seed(f"{args.seed} ceiling" if step is None else args.seed, network.name, number) for number, _ in loaded]
        maps = maps_of(ready, stem, inputs, baselines, distance, seeds, args).reshape(len(inputs), -1).astype(np.float64)
        if step is None:
            trained = maps
            continue
        with np.errstate(invalid="ignore"):
            r = np.array([np.corrcoef(a, b)[0, 1] for a, b in zip(maps, trained)])
        z = np.arctanh(np.clip(r[np.isfinite(r)], -0.999999, 0.999999))
        found.append([spec["loss"] or spec["name"], spec["fold"], step, len(layers), layers[-step] if step else None, len(z),
                      *([float(np.tanh(z.mean())), float(np.tanh(z.std()))] if len(z) else [None, None])])
    return found


def torch_device(name):
    """torch.device from --device; each rank of a machine takes its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU that torch can use; give --device cpu")
    if name == "cuda":
        local = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
        name = f"cuda:{local % torch.cuda.device_count()}"
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: unknown; expected auto, cpu, cuda or cuda:N") from None


def fail(message):
    say(" ".join(str(message).split()))
    sys.exit(2)


def integers(text):
    return [int(part) for part in text.split(",")]


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = fail
    add = parser.add_argument_group("pictures and networks, as embed.py names them").add_argument
    add("--dataset", required=True, metavar="NAME|FOLDER|CSV", help="cars196, cub200, sop, a folder or a CSV with a path column")
    add("--split", default="test", choices=["train", "test", "all"], help="of a data set with splits (test)")
    add("--data-root", metavar="DIR", help="folder of the published data sets (DML_DATA_ROOT, else data/)")
    add("--model", help="a network without a loss: bninception, inception_v3, efficientnet_lite0 or package.module:factory")
    add("--loss", help="a loss of models/losses.csv (name or slug), several with commas, None, or all: what is there (all)")
    add("--fold", default="all", help="0, 1, 2, 3, several with commas, or all (all)")
    add("--trained-on", metavar="DATASET", help="the data set whose checkpoints are taken (--dataset)")
    add("--checkpoint", metavar="DIR", help="a folder with trunk_best.pth and embedder_best.pth")
    add("--models", default=models.MODELS, metavar="DIR", help="folder of the checkpoints (models/)")
    add("--weights", metavar="FILE", help="ImageNet weights of the backbone (torch's hub cache)")
    add("--network-seed", type=int, default=0, metavar="N", help="of the random layer of --loss None: embed.py's --seed (0)")
    add("--out", type=Path, default=Path("results"), metavar="FILE.npy|DIR",
        help="one network's array, or the folder of all: DIR/<dataset>/<slug>/fold<k>/maps.npy (results)")
    add("--skip-unreadable", action="store_true", help="leave pictures out that can't be read, and name them (stop there)")
    add("--limit", type=int, metavar="N", help="only the first N pictures")
    add("--pick", type=integers, metavar="I,J,K", help="only the pictures of these numbers, counted from 0")
    add = parser.add_argument_group("maps").add_argument
    add("--samples", type=int, default=50, metavar="L", help="noisy copies of a picture (50)")
    add("--noise", type=float, default=0.15, metavar="S", help="standard deviation, as a share of the picture's max - min (0.15)")
    add("--order", default="paper", choices=["paper", "released"], help="of absolute value and averages, see above (paper)")
    add("--distance", choices=list(models.DISTANCES), help="of l2-normalised embeddings (the loss's own)")
    add("--baseline", default="black", choices=["black", "mean", "blur"],
        help="whose embedding the distance is to: a black picture, the picture's mean colour, the picture blurred (black)")
    add("--map-size", type=int, metavar="N", help="store maps averaged to N × N pixels: 57 instead of 227 takes a 16th of the "
        "space (the network's input size)")
    add("--percentile", type=float, default=99.0, metavar="P", help="values above it are cut to it (99)")
    add("--seed", type=int, default=0, metavar="N", help="of the noise (0)")
    add("--shared-noise", action="store_true", help="the same noise for all networks: networks of one trunk (train.py --freeze-trunk) then share "
        "its passes; raises correlations, but with --ceiling compare.py takes one map of each noise (independent)")
    add("--antithetic", action="store_true", help="every second copy takes the negative noise of the one before: in the paper's order "
        "50 copies then serve like 62, in the released order there is nothing to gain (independent noise)")
    add = parser.add_argument_group("can the maps be trusted").add_argument
    add("--ceiling", action="store_true", help="also maps_ceiling.npy, with other noise: compare.py then gives the noise ceiling")
    add("--randomise", type=int, nargs="?", const=8, metavar="STEPS",
        help="also sanity.csv: the first 16 pictures' maps after re-initialising ever more layers from the top (8 steps)")
    add = parser.add_argument_group("picture × network").add_argument
    add("--gallery", type=Path, metavar="FILE.png", help="the first 8 pictures, or all of --pick; 8 on a page, further pages FILE_2.png …")
    add("--overlay", action="store_true", help="the maps over the grey pictures")
    add = parser.add_argument_group("speed").add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    add("--precision", default="fp32", choices=["fp32", "tf32", "bf16"], help="of the network's arithmetic (fp32)")
    add("--batch", type=int, metavar="N", help="copies at a time (10 on a CPU, 250 on a GPU; halved when memory runs out)")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add("--workers", type=int, default=min(16, cpus), metavar="N", help="threads that decode (CPUs this process may use, at most 16)")
    return parser.parse_args(argv)


def check(args):
    """Settle the arguments that depend on each other; raises ValueError before anything is read or written."""
    args.device = torch_device(args.device)
    args.halved = False
    if args.batch is None:
        args.batch = 10 if args.device.type == "cpu" else 250
    check_options(args.samples, args.noise, args.order, args.percentile, args.batch)
    for name in ("limit", "randomise", "workers", "map_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: expected at least 1")
    if args.gallery:
        files.check_output(args.gallery)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision == "tf32"


def main(argv=None):
    args = parse(argv)
    check(args)
    rank, ranks = rowfile.my_share()
    dataset = data.open_dataset(args.dataset, args.data_root, args.split)
    loss = args.loss or (None if args.model or args.checkpoint else "all")
    specs = models.find(args.trained_on or dataset.name, loss, args.fold, args.model, args.checkpoint,
                        args.weights, args.network_seed, args.models)
    for note in [*dataset.notes, *(spec["note"] for spec in specs)]:
        if note and rank == 0:
            say(note)
    one = args.out.suffix == ".npy"
    held_out = {spec["fold"] for spec in specs if "test" in spec["config"].get("split", {})}
    if args.gallery and len(held_out) > 1:
        raise ValueError(f"--gallery: folds {', '.join(map(str, sorted(held_out)))} are analysed on different pictures; give one --fold")
    if one and len(specs) > 1:
        raise ValueError(f"--out {args.out} is one array, but {len(specs)} networks were asked for "
                         f"({specs[0]['name']}, {specs[1]['name']}, …); give a folder")
    pictures, relative, arrays, groups = [], [], [], {}
    for spec in specs:
        own = data.own_pictures(dataset, spec["config"], args.dataset, args.data_root, args.split)
        chosen = chosen_rows(len(own.paths), args.limit, args.pick)
        pictures.append([(i, own.paths[i]) for i in chosen])
        relative.append([own.relative[i] for i in chosen])
        arrays.append(args.out if one else args.out / dataset.name / spec["slug"] / f"fold{spec['fold'] or 0}" / "maps.npy")
        for ceiling in [False, True][:1 + args.ceiling]:
            path = arrays[-1].with_name(f"{arrays[-1].stem}_ceiling.npy") if ceiling else arrays[-1]
            description = about(own, spec, chosen, relative[-1], args.distance or spec["distance"], ceiling, args)
            key = [ceiling, description["pictures"]["sha256"], description["preprocessing"]]  # of what shares its passes
            key += [models.files_sha256(spec["files"][:1])] if args.shared_noise and spec["files"] else [len(arrays)]
            groups.setdefault(repr(key), []).append((ceiling, len(arrays) - 1, path, description))
    done = 0
    for group in groups.values():
        (ceiling, *_), numbers, paths, descriptions = zip(*group)
        first, files = numbers[0], []
        try:
            for path, description in zip(paths, descriptions):
                size = data.input_size(description["preprocessing"])
                if args.map_size and args.map_size > min(size):
                    raise ValueError(f"--map-size {args.map_size}: the maps have {size[1]} × {size[0]} pixels; give fewer")
                size = [args.map_size] * 2 if args.map_size else size
                shape = (len(pictures[first]), *size)
                files.append(rowfile.RowFile(path, shape, np.float16, description, retry=not args.skip_unreadable))
            done += sum(file.complete for file in files)
            at_work = [(file, specs[number], models.distance(description["distance"]))
                       for file, number, description in zip(files, numbers, descriptions) if not file.complete]
            if at_work:
                todo, chosen, distances = zip(*at_work)
                fill(todo, chosen, pictures[first], distances, "" if args.shared_noise else chosen[0]["name"],
                     f"{args.seed} ceiling" if ceiling else args.seed, args, (rank, ranks))
            for file in files:
                if not file.complete and not finish(file, relative[first]) and ranks == 1:
                    say(f"{file.path}: {file.missing():,} rows are left to other processes; "
                        "run the command again if one of them was stopped")
        finally:
            for file in files:
                if not file.complete:
                    file.give_up(alone=ranks == 1)
    if rank == 0 and done == sum(map(len, groups.values())):
        say(f"all {done} arrays are there already")
    if rank == 0 and args.randomise:
        rows = [row for spec, own in zip(specs, pictures)
                for row in sanity(spec, own, models.distance(args.distance or spec["distance"]), args)]
        folder = args.out.parent if one else args.out / dataset.name
        files.write_table(folder / "sanity.csv", ["model", "fold", "layers", "of", "lowest", "n", "correlation", "correlation_std"], rows)
    if rank == 0 and args.gallery and all(path.exists() for path in arrays):
        one_fold = len({spec["fold"] for spec in specs}) == 1
        names = [spec["loss"] if one_fold and spec["loss"] else spec["name"] for spec in specs]
        preprocessings = [files.read_sidecar(path)["preprocessing"] for path in arrays]
        make_gallery(args.gallery, arrays, preprocessings, names, pictures[0], relative[0], args.overlay,
                     len(pictures[0]) if args.pick else 8)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        fail(error)
    except (MemoryError, torch.cuda.OutOfMemoryError) as error:
        fail(f"out of memory: {error}; use a smaller network or another --device")
    except KeyboardInterrupt:
        say("stopped; the same command continues")
        sys.exit(130)
