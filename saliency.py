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
import copy
import hashlib
import itertools
from collections import Counter

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

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
    if samples < 1:
        raise ValueError(f"samples is {samples}; expected at least 1 noisy copy")
    if not 0 <= noise < float("inf"):
        raise ValueError(f"noise is {noise}; expected a standard deviation of 0 or more, as a share of max - min (0.15)")
    if order not in ("paper", "released"):
        raise ValueError(f"order is {order!r}; expected 'paper' or 'released'")
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile is {percentile}; expected a number above 0, at most 100")
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
