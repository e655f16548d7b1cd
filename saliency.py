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
the noise of picture i comes from (seed, name of the network, i) alone. What remains is the order of float32 sums
inside the convolutions, which follows batch size and threads: maps then differ by less than 1e-3, nearly always
by the last bit of float16. CPU and CUDA draw different noise.

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

# ---------------------------------------------------------------- SmoothGrad


def smoothgrad(network, pictures, baseline, distance, *, samples=50, noise=0.15, order="paper", percentile=99.0,
               seeds=None, antithetic=False, batch=10, autocast=None, stem=None):
    """SmoothGrad maps of the distance between each picture's embedding and its baseline's (Kobs et al. 2021, Eq. 1-2).

    network: callable, pictures (B, C, H, W) -> embeddings (B, m), in eval mode; needs no preparation, but
        fold_batchnorm and requires_grad_(False) make it faster
    pictures: floating (n, C, H, W), as the network takes them; baseline: (C, H, W), or (n, C, H, W) for one each
    distance: callable, embeddings a (B, m) of pictures and b (B, m) of baselines -> (B,); differentiable
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

    Returns maps (n, H, W) of the pictures' dtype, in [0, 1]: all zeros where a map is constant, all nan where a
    gradient is not finite. A constant picture that equals its baseline has distance 0 and no gradient: zeros.
    Raises ValueError for options out of range, when the network returns no 2-D embeddings, and when no gradient
    reaches the pictures.
    """
    check_options(samples, noise, order, percentile, batch)
    n = len(pictures)
    baseline = baseline.expand_as(pictures)
    with torch.no_grad():
        origins = torch.cat([embed(network, part, autocast) for part in baseline.split(batch)])  # (n, m)
    spans = pictures.amax(dim=(1, 2, 3)) - pictures.amin(dim=(1, 2, 3))  # (n,)
    copies = noisy_copies(pictures, noise * spans, range(n) if seeds is None else seeds, samples, antithetic)
    through = stem if order == "paper" else None
    totals = [0] * n
    while chunk := list(itertools.islice(copies, batch)):
        which, noisy = zip(*chunk)
        gradients = distance_gradients(network, torch.stack(noisy), origins[list(which)], distance, autocast, through)
        if order == "released":
            gradients = gradients.mean(dim=1).abs()  # (B, H, W)
        for i in dict.fromkeys(which):
            first = which.index(i)
            totals[i] = totals[i] + gradients[first:first + which.count(i)].sum(dim=0)
    if through is not None:
        totals = [pull_back(stem, total, picture) for total, picture in zip(totals, pictures)]
    saliency = torch.stack(totals)
    if order == "paper":
        saliency = (saliency / samples).abs().mean(dim=1)  # (n, H, W)
    nothing = (spans == 0) & (pictures == baseline).flatten(1).all(dim=1)
    # what is left there is rounding, which min-max scaling would blow up to a map
    return scale_maps(saliency.masked_fill(nothing[:, None, None], 0), percentile)


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


def distance_gradients(network, pictures, origins, distance, autocast=None, stem=None):
    """Gradient of each distance with respect to its picture (B, C, H, W) or, with a stem, to the stem's output."""
    held = []

    def hold(module, given, output):
        held.append(output.detach().requires_grad_())
        return held[0].clone()  # a layer that writes in place must not write into a leaf

    if stem is None:
        held.append(pictures.requires_grad_())
        distances = distance(embed(network, pictures, autocast), origins)
    else:
        hook = stem.register_forward_hook(hold)
        try:
            distances = distance(embed(network, pictures, autocast), origins)
        finally:
            hook.remove()
    gradient = None
    if distances.requires_grad:
        gradient, = torch.autograd.grad(distances.sum(), held[0], allow_unused=True)
    if gradient is None:
        raise ValueError("no gradient reaches the pictures: the network detaches, quantises or leaves torch "
                         + gradient_break(network, pictures.detach()))
    return gradient


def pull_back(stem, gradient, picture):
    """Gradient (C, H, W) with respect to a picture from the one with respect to the linear stem's output."""
    picture = picture.detach()[None].requires_grad_()
    return torch.autograd.grad(stem(picture), picture, gradient[None].to(picture.dtype))[0][0]


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
        whole = distance_gradients(network, picture.clone(), output, lambda a, b: a.sum(dim=1))[0]
        held = distance_gradients(network, picture.clone(), output, lambda a, b: a.sum(dim=1), stem=stem)[0]
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
    """Rows of cells under their names as one PIL image: Figure 2's picture, then a map for each network.

    rows: for each picture the list of its cells, uint8 (H, W, 3); names: of the cells; titles: of the pictures.
    Rows longer than `across` are broken, and the names then stand above every line.
    """
    font, small = ImageFont.load_default(size=15), ImageFont.load_default(size=12)
    gap, caption = 8, 18
    columns = min(across, len(names))
    lines = [range(start, min(start + across, len(names))) for start in range(0, len(names), across)]
    wrapped = [wrap(name, font, cell) for name in names]
    heads = [caption * max(len(wrapped[i]) for i in line) + 4 for line in lines]
    per_row = sum(heads) + len(lines) * (cell + gap) + caption + gap if len(lines) > 1 else cell + caption + 2 * gap
    top = heads[0] if len(lines) == 1 else 0
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, gap + top + len(rows) * per_row), "white")
    draw = ImageDraw.Draw(sheet)

    def head(line, y, height):
        for column, i in enumerate(line):
            x = gap + column * (cell + gap) + cell / 2
            for number, text in enumerate(reversed(wrapped[i])):
                draw.text((x, y + height - 4 - number * caption), text, fill="black", font=font, anchor="ms")

    y = gap
    if len(lines) == 1:
        head(lines[0], y, top)
        y += top
    for cells, title in zip(rows, titles):
        for line, height in zip(lines, heads):
            if len(lines) > 1:
                head(line, y, height)
                y += height
            for column, i in enumerate(line):
                image = Image.fromarray(cells[i]).resize((cell, cell), Image.Resampling.LANCZOS)
                sheet.paste(image, (gap + column * (cell + gap), y))
            y += cell + gap
        draw.text((gap, y + 6), shorten(title, small, cell * columns), fill=(90, 90, 90), font=small, anchor="ls")
        y += caption + gap
    return sheet


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
    """(folded, frozen, channels-last network on the device, its linear stem or None)."""
    example = torch.from_numpy(data.normalise(EXAMPLE.integers(0, 256, (1, *data.input_size(preprocessing), 3), dtype=np.uint8),
                                              preprocessing)).to(device)
    ready = fold_batchnorm(module.to(device), example).requires_grad_(False).to(memory_format=torch.channels_last)
    return ready, linear_stem(ready, example)
