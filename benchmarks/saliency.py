"""How fast is saliency.py, and how many noisy copies does a map need? Figures from one run; asserts nothing.

    python benchmarks/saliency.py                             # BN-Inception, seeded random weights, 50 copies
    python benchmarks/saliency.py --precision bf16
    python benchmarks/saliency.py --backbone efficientnet_lite0 --pictures FOLDER
    python benchmarks/saliency.py --ceiling --backbone efficientnet_lite0 --pictures FOLDER --number 12

The straightforward way: one picture at a time, its copies one batch, parameters requiring gradients, batch
norm as it is, NCHW float32, loss.backward(). Ours: smoothgrad on a folded, frozen, channels-last network.
Both get the same noise; they take turns, and medians are printed, also of processor time (all threads),
which other programs disturb less. On a GPU also: the share of the card's measured matrix rate, the time
split and the best batch.

--ceiling: for each number of copies the mean correlation (Fisher z) of two maps of one picture with
independent noise, the most that two networks can agree, and of one such map with a map of --reference
copies; for both orders, with independent and with antithetic noise.
"""
import argparse
import itertools
import resource
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import saliency  # noqa: E402
from dml_common import networks, pictures  # noqa: E402

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


def clock(device, function, *arguments, **options):
    """((seconds, processor seconds), result)."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start, processor = time.perf_counter(), time.process_time()
    result = function(*arguments, **options)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start, time.process_time() - processor), result


def peak_mib(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def correlation(a, b):
    return np.corrcoef(a.double().cpu().flatten(), b.double().cpu().flatten())[0, 1]


def prepared(args, device):
    """(module, its network made ready, pictures, black picture), on the device."""
    module, preprocessing = network(args.backbone)
    given, black = (tensor.to(device) for tensor in inputs(args.pictures, preprocessing, args.number))
    return module, saliency.prepare(module, given[:1]), given, black


def compare_speed(args, device):
    distance = networks.distance("euclidean")
    (took, _), (module, (ready, stem), given, black) = clock(device, prepared, args, device)
    module = module.to(device)
    autocast = torch.bfloat16 if args.precision == "bf16" else None
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision == "tf32"

    def ours(i, batch=args.batch):
        return saliency.smoothgrad(ready, given[i:i + 1], black, distance, samples=args.samples, seeds=[i],
                                   stem=stem, batch=batch, autocast=autocast)[0]

    ours(0)
    ours_peak = peak_mib(device)
    straightforward(module, given[0], black, distance, args.samples, 0)
    times, agreement = [], []
    for i in itertools.islice(itertools.cycle(range(len(given))), args.repeat):
        fast, a = clock(device, ours, i)
        slow, b = clock(device, straightforward, module, given[i], black, distance, args.samples, i)
        times.append((fast, slow))
        agreement.append(correlation(a, b))
    times = np.array(times)  # (turns, ours or not, wall or processor)
    fast, slow = np.median(times, axis=0)
    print(f"{args.backbone}, {args.samples} copies of {tuple(given.shape[1:])}, {args.precision}, {device}, "
          f"{torch.get_num_threads()} threads, batch {args.batch}, median of {args.repeat}")
    for name, median, turns, peak in [("straightforward", slow, times[:, 1, 0], peak_mib(device)),
                                      ("smoothgrad", fast, times[:, 0, 0], ours_peak)]:
        print(f"{name:16} {median[0]:.3f} s a picture ({turns.min():.3f} to {turns.max():.3f}), "
              f"{median[1]:.3f} processor seconds, peak memory of the process by then {peak:,.0f} MiB")
    print(f"ratio            {slow[0] / fast[0]:.2f} ×, of processor time {slow[1] / fast[1]:.2f} ×; "
          f"correlation of the maps {min(agreement):.6f} or more; {took:.1f} s to load and prepare a network")
    if device.type == "cuda":
        on_gpu(ours, ready, given, args, device)


def on_gpu(ours, ready, given, args, device):
    """Best batch, matrix rate, forward and backward apart. Not tried: no GPU was at hand."""
    for batch in (25, 50, 100, 250, 500):
        print(f"batch {batch}: {clock(device, ours, 0, batch)[0][0]:.4f} s a picture")
    kind = torch.bfloat16 if args.precision == "bf16" else torch.float32
    a = torch.randn(8192, 8192, device=device, dtype=kind)
    a @ a
    rate = 2 * 8192**3 * 10 / clock(device, lambda: [a @ a for _ in range(10)])[0][0]
    copies = torch.randn(args.samples, *given.shape[1:], device=device)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
        ready(copies)
    operations = 2 * counter.get_total_flops()  # the backward pass costs another forward pass
    share = operations / clock(device, ours, 0)[0][0] / rate
    print(f"matrix products reach {rate / 1e12:.1f} Tflop/s; maps {share:.1%} of it")
    ones = copies.new_ones(1)
    forward = clock(device, ready, copies)[0][0]
    noise = clock(device, lambda: list(saliency.noisy_copies(copies[:1], ones, [0], args.samples)))[0][0]
    post = clock(device, saliency.scale_maps, copies[:1, 0])[0][0]
    print(f"forward {forward:.4f} s, noise {noise:.4f} s, percentile and scaling {post:.4f} s, the rest is "
          "the backward pass")


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
            batch=args.batch) for seed in (1, 2, 9))
        reference = reference(antithetic=False, checkpoints=[args.reference])
        for antithetic in (False, True):
            first, second = (maps(antithetic=antithetic, checkpoints=copies) for maps in (one, two))
            for key in first:
                long = reference[key[0], args.reference]
                pair = correlation(first[key], second[key]), correlation(first[key], long)
                z.setdefault((*key, antithetic), []).append(np.arctanh(np.clip(pair, -0.999999, 0.999999)))
        print(f"picture {i + 1} of {len(given)}", file=sys.stderr)
    print(f"{args.backbone}, {len(given)} pictures: two maps with independent noise · a map and one of "
          f"{args.reference} copies")
    kinds = list(itertools.product(("paper", "released"), (False, True)))
    names = [f"{order}, antithetic" if anti else order for order, anti in kinds]
    print("copies  " + "".join(f"{name:>22}" for name in names))
    for count in copies:
        cells = [np.tanh(np.mean(z[order, count, anti], axis=0)) for order, anti in kinds]
        texts = [f"{pair:.3f} · {long:.3f}" for pair, long in cells]
        print(f"{count:6}  " + "".join(f"{text:>22}" for text in texts))


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--backbone", default="bninception", choices=["bninception", "efficientnet_lite0"])
    add("--pictures", metavar="FOLDER", help="real pictures (smooth random ones)")
    add("--number", type=int, default=3, help="of pictures (3)")
    add("--samples", type=int, default=50, help="noisy copies (50)")
    add("--precision", default="fp32", choices=["fp32", "tf32", "bf16"])
    add("--batch", type=int, default=10, help="copies at a time (10)")
    add("--repeat", type=int, default=5, help="turns of each way (5)")
    add("--device", default="cpu")
    add("--ceiling", action="store_true", help="copies against noise ceiling instead of speed")
    add("--reference", type=int, default=600, help="copies of the long map (600)")
    args = parser.parse_args()
    (ceiling_table if args.ceiling else compare_speed)(args, torch.device(args.device))


if __name__ == "__main__":
    main()
