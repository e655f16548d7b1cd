"""How fast is saliency.py, and how many noisy copies does a map need? Figures from one run; asserts nothing.

    python benchmarks/saliency.py                             # BN-Inception, seeded random weights, 50 copies
    python benchmarks/saliency.py --device cuda               # all figures of a GPU
    python benchmarks/saliency.py --backbone efficientnet_lite0 --pictures FOLDER --precision fp32
    python benchmarks/saliency.py --ceiling --backbone efficientnet_lite0 --pictures FOLDER --number 12

The straightforward way: one picture at a time, its copies one batch, parameters requiring gradients, batch
norm as it is, NCHW float32, loss.backward(). Ours: smoothgrad on a folded, frozen, channels-last network, as
many pictures at a time as --batch holds. Both get the same noise; they take turns, and medians are printed,
of a picture. The floor: two passes of the folded network a copy at the rate of the best matrix product of
that precision. The loop: bare forward and backward passes of it, channels-last, its weights and random input
of that precision's type; share: what maps reach of it. Without --precision a row for each that is fast here:
bf16 on a processor that has it (AVX512-BF16, AMX), tf32 and bf16 on a GPU.

--ceiling: for each number of copies the mean correlation (Fisher z) of two maps of one picture with
independent noise, the most that two networks can agree, and of one such map with a map of --reference
copies; for both orders, with independent and with antithetic noise.
"""
import copy
import itertools
import sys
from functools import partial

import numpy as np
import torch
from measure import Cost, instruction_sets, measured, print_header, print_table, typical
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import saliency
from dml_common import command, networks, pictures

COPIES = (10, 20, 50, 100, 200, 300)


def network(backbone, seed=0):
    """(module, preprocessing): EfficientNet-Lite0 with its weights, or BN-Inception and a linear layer."""
    if backbone == "efficientnet_lite0":
        loaded = networks.load(networks.find(model=backbone)[0])
        return loaded.module, loaded.preprocessing
    torch.manual_seed(seed)
    module = nn.Sequential(networks.BACKBONES[backbone](), nn.Linear(1024, 128)).eval()
    return module, networks.PREPROCESSING[backbone]


def inputs(folder, preprocessing, number):
    """Pictures (number, 3, H, W) and the black one; smooth random ones without a folder."""
    if folder:
        paths = pictures.open_dataset(folder).paths[:number]
        pixels = [pictures.load_pixels(path, preprocessing) for path in paths]
    else:
        coarse = torch.rand(number, 3, 9, 9, generator=torch.Generator().manual_seed(0))
        size = pictures.input_size(preprocessing)
        smooth = nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1)
        pixels = (smooth * 255).byte().permute(0, 2, 3, 1).numpy()
    black = pictures.black_picture(preprocessing)
    return torch.from_numpy(pictures.normalise(np.stack(pixels), preprocessing)), torch.from_numpy(black)


def straightforward(module, picture, black, distance, samples, seed):
    """Order "paper", as one would write it. picture (3, H, W) -> map (H, W)."""
    sigma = 0.15 * (picture.max() - picture.min())
    copies = saliency.noisy_copies(picture[None], sigma[None], [seed], samples)
    batch = torch.stack([noisy for _, noisy in copies]).requires_grad_()
    distance(module(batch), module(black[None])).sum().backward()
    values = batch.grad.mean(dim=0).abs().mean(dim=0)
    values = values.clamp(max=torch.quantile(values, 0.99))
    module.zero_grad()
    return (values - values.min()) / (values.max() - values.min())


def correlation(a, b):
    return np.corrcoef(a.double().cpu().flatten(), b.double().cpu().flatten())[0, 1]


def prepared(args, device):
    """(module, its network made ready, pictures, black picture), on the device."""
    module, preprocessing = network(args.backbone)
    given, black = (tensor.to(device) for tensor in inputs(args.pictures, preprocessing, args.number))
    return module, saliency.prepare(module, given[:1]), given, black


def precisions(device):
    """Those in which this device is fast."""
    if device.type == "cuda":
        return ["fp32", "tf32", "bf16"]
    has_bf16 = {"avx512_bf16", "amx_bf16", "bf16"} & {*instruction_sets()}
    return ["fp32", "bf16"] if has_bf16 else ["fp32"]


def floor(ready, given, samples, device, kind):
    """The cost of a picture's copies, forward and back, at the rate of this device's matrix products."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ready(given[:1])
    side = 2048 if device.type == "cpu" else 8192
    a = torch.randn(side, side, device=device, dtype=kind)
    products = min(measured(lambda: a @ a, device)[0] for _ in range(9))
    work = 2 * counter.get_total_flops() * samples / (2 * side**3)  # backward costs what forward does
    return Cost(products.wall * work, products.processor * work)


def loop(ready, given, copies, device, kind):
    """A function: the bare passes, forward and back, of so many random copies."""
    network = copy.deepcopy(ready).to(kind)
    noise = torch.randn(copies, *given.shape[1:], device=device, dtype=kind)
    noise = noise.to(memory_format=torch.channels_last).requires_grad_()
    return lambda: torch.autograd.grad(network(noise).sum(), noise)


def speed_row(args, device, precision, batch, made):
    """Of one precision and batch: (what, its cells)."""
    module, (ready, stem), given, black = made
    command.torch_device(args.device, precision)  # tf32 on or off
    distance, kind = networks.distance("euclidean"), torch.float32
    options = {"samples": args.samples, "stem": stem, "batch": batch}
    if precision == "bf16":
        options["autocast"] = kind = torch.bfloat16
    together = max(1, batch // args.samples)  # pictures in one call

    def ours(i):
        which = [k % len(given) for k in range(i, i + together)]
        return saliency.smoothgrad(ready, given[which], black, distance, seeds=which, **options)

    def plain(i):
        return straightforward(module, given[i], black, distance, args.samples, i)

    copies = min(batch, together * args.samples)
    bare = loop(ready, given, copies, device, kind)
    turns, agreement = [], []
    for turn in range(-1, args.repeat):  # the first one warms up
        i = turn % len(given)
        (fast, maps), (slow, expected), (passes, _) = (
            measured(work, device) for work in (partial(ours, i), partial(plain, i), bare))
        turns.append((fast.each(together), slow, passes.each(copies / args.samples)))
        agreement.append(correlation(maps[0], expected))
    fast, slow, passes = map(typical, zip(*turns[1:]))
    return f"{args.backbone}, {args.samples} copies, {precision}, batch {batch}", {
        "ours": fast, "straightforward": slow, "floor": floor(ready, given, args.samples, device, kind),
        "their MiB": f"{slow.gpu or slow.peak:,.0f}",
        "loop": f"{passes.wall:.2g}", "share": f"{passes.wall / fast.wall:.0%}",
        "r of the maps": f"{min(agreement):.6f}"}


def speed(args, device):
    took, made = measured(lambda: prepared(args, device), device)
    rows = [("network loaded and prepared", {"ours": took})]
    wanted = [args.precision] if args.precision else precisions(device)
    for precision, batch in itertools.product(wanted, args.batch):
        rows.append(speed_row(args, device, precision, batch, made))
    print_table(rows)


def running_maps(ready, picture, black, distance, seed, antithetic, checkpoints, batch):
    """Maps of one picture after each number of copies, both orders: {(order, copies): (H, W)}."""
    spans = (picture.max() - picture.min())[None]
    copies = saliency.noisy_copies(picture[None], 0.15 * spans, [seed], checkpoints[-1], antithetic)
    with torch.no_grad():
        origin = ready(black[None])
    signed, absolute, done, maps = 0, 0, 0, {}
    for goal in checkpoints:
        while chunk := [noisy for _, noisy in itertools.islice(copies, min(batch, goal - done))]:
            gradient = next(saliency.distance_gradients(ready, torch.stack(chunk), origin, [distance]))
            signed = signed + gradient.sum(dim=0)
            absolute = absolute + gradient.mean(dim=1).abs().sum(dim=0)
            done += len(chunk)
        maps["paper", goal] = saliency.scale_maps(signed.abs().mean(dim=0)[None])[0]
        maps["released", goal] = saliency.scale_maps(absolute[None])[0]
    return maps


def ceiling_table(args, device):
    _, (ready, _), given, black = prepared(args, device)
    distance = networks.distance("euclidean")
    copies = [count for count in COPIES if count <= args.reference]
    z = {}
    for i, picture in enumerate(given):
        one, two, reference = (partial(
            running_maps, ready, picture, black, distance, saliency.noise_seed(seed, "benchmark", i),
            batch=args.batch[0]) for seed in (1, 2, 9))
        reference = reference(antithetic=False, checkpoints=[args.reference])
        for antithetic in (False, True):
            first, second = (maps(antithetic=antithetic, checkpoints=copies) for maps in (one, two))
            for key in first:
                long = reference[key[0], args.reference]
                pair = correlation(first[key], second[key]), correlation(first[key], long)
                z.setdefault((*key, antithetic), []).append(np.arctanh(np.clip(pair, -0.999999, 0.999999)))
        print(f"picture {i + 1} of {len(given)}", file=sys.stderr)
    kinds = list(itertools.product(("paper", "released"), (False, True)))
    lines = [["copies", *(f"{order}, antithetic" if anti else order for order, anti in kinds)]]
    for count in copies:
        cells = [np.tanh(np.mean(z[order, count, anti], axis=0)) for order, anti in kinds]
        lines.append([str(count), *(f"{pair:.3f} · {long:.3f}" for pair, long in cells)])
    command.print_aligned(lines)


def main():
    parser = command.parser(__doc__)
    add = parser.add_argument
    add("--backbone", default="bninception", choices=["bninception", "efficientnet_lite0"])
    add("--pictures", metavar="FOLDER", help="real pictures (smooth random ones)")
    add("--number", type=int, default=3, help="of pictures (3)")
    add("--samples", type=int, default=50, help="noisy copies (50)")
    add("--precision", choices=["fp32", "tf32", "bf16"], help="(all that are fast here)")
    add("--batch", type=int, nargs="+", help="copies at a time, one or several numbers (10; on a GPU 250)")
    add("--repeat", type=int, default=5, help="turns of each way (5)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    add("--ceiling", action="store_true", help="copies against noise ceiling instead of speed")
    add("--reference", type=int, default=600, help="copies of the long map (600)")
    args = parser.parse_args()
    device = command.torch_device(args.device)
    args.batch = args.batch or [10 if device.type == "cpu" else 250]
    print_header(device, f"{torch.get_num_threads()} threads")
    (ceiling_table if args.ceiling else speed)(args, device)


if __name__ == "__main__":
    command.run(main, stopped="stopped")
