"""How fast is saliency.py, and how many noisy copies does a map need? Figures from one run; asserts nothing.

    python benchmarks/saliency.py                                  # BN-Inception, seeded random weights, 50 copies
    python benchmarks/saliency.py --precision bf16
    python benchmarks/saliency.py --backbone efficientnet_lite0 --pictures FOLDER
    python benchmarks/saliency.py --ceiling --backbone efficientnet_lite0 --pictures FOLDER --number 12

The straightforward way: one picture at a time, its copies one batch, parameters requiring gradients, batch norm as it
is, NCHW float32, loss.backward(). Ours: smoothgrad on a folded, frozen, channels-last network. Both get the same noise;
they take turns, and medians are printed, also of processor time (all threads), which other programs disturb less.
On a GPU also: the share of the card's measured matrix rate, the time split
and the best batch.

--ceiling: for each number of copies the mean correlation (Fisher z) of two maps of one picture with independent noise,
the most that two networks can agree, and of one such map with a map of --reference copies; for both orders, with
independent and with antithetic noise.
"""
import argparse
import itertools
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dml_common import pictures as data  # noqa: E402
from dml_common import networks as models  # noqa: E402
import saliency  # noqa: E402

COPIES = (10, 20, 50, 100, 200, 300)


def network(backbone, seed=0):
    """(module, preprocessing): EfficientNet-Lite0 with its weights; BN-Inception + linear 1024 -> 128, random, seeded."""
    if backbone == "efficientnet_lite0":
        loaded = models.load(models.find(model=backbone)[0])
        return loaded.module, loaded.preprocessing
    torch.manual_seed(seed)
    module = nn.Sequential(models.BACKBONES[backbone](), nn.Linear(1024, 128)).eval()
    return module, models.PREPROCESSING[backbone]


def inputs(folder, preprocessing, number):
    """Pictures (number, 3, H, W) and the black one; smooth random ones without a folder."""
    if folder:
        dataset = data.open_dataset(folder)
        pixels = [data.load_pixels(path, preprocessing) for path in dataset.paths[:number]]
    else:
        coarse = torch.rand(number, 3, 9, 9, generator=torch.Generator().manual_seed(0))
        smooth = nn.functional.interpolate(coarse, data.input_size(preprocessing), mode="bicubic").clamp(0, 1)
        pixels = (smooth * 255).byte().permute(0, 2, 3, 1).numpy()
    return torch.from_numpy(data.normalise(np.stack(pixels), preprocessing)), torch.from_numpy(data.black_picture(preprocessing))


def straightforward(module, picture, black, distance, samples, seed):
    """Order "paper", as one would write it. picture (3, H, W) -> map (H, W)."""
    sigma = 0.15 * (picture.max() - picture.min())
    copies = saliency.noisy_copies(picture[None], sigma[None], [seed], samples)
    batch = torch.stack([noisy for _, noisy in copies]).requires_grad_()
    distance(module(batch), module(black[None])).sum().backward()
    found = batch.grad.mean(dim=0).abs().mean(dim=0)
    found = found.clamp(max=torch.quantile(found, 0.99))
    module.zero_grad()
    return (found - found.min()) / (found.max() - found.min())


def clock(function, device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def processor_clock(function, device):
    """((seconds, processor seconds), result)."""
    start = time.process_time()
    seconds, result = clock(function, device)
    return (seconds, time.process_time() - start), result


def peak_mib(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def correlation(a, b):
    return np.corrcoef(a.double().cpu().flatten(), b.double().cpu().flatten())[0, 1]


def compare_speed(args, device):
    module, preprocessing = network(args.backbone)
    pictures, black = (tensor.to(device) for tensor in inputs(args.pictures, preprocessing, args.number))
    distance = models.distance("euclidean")
    took_prepare, (ready, stem) = clock(lambda: saliency.prepare(module, preprocessing, device), device)
    module = module.to(device)
    autocast = torch.bfloat16 if args.precision == "bf16" else None
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision == "tf32"

    def ours(i, batch=args.batch):
        return saliency.smoothgrad(ready, pictures[i:i + 1], black, distance, samples=args.samples, seeds=[i], stem=stem,
                                   batch=batch, autocast=autocast)[0]

    ours(0)
    ours_peak = peak_mib(device)
    straightforward(module, pictures[0], black, distance, args.samples, 0)
    times, agreement = [], []
    for i in itertools.islice(itertools.cycle(range(len(pictures))), args.repeat):
        fast, a = processor_clock(lambda: ours(i), device)
        slow, b = processor_clock(lambda: straightforward(module, pictures[i], black, distance, args.samples, i), device)
        times.append((fast, slow))
        agreement.append(correlation(a, b))
    times = np.array(times)  # (turns, ours or not, wall or processor)
    fast, slow = np.median(times, axis=0)
    print(f"{args.backbone}, {args.samples} copies of {tuple(pictures.shape[1:])}, {args.precision}, {device}, "
          f"{torch.get_num_threads()} threads, batch {args.batch}, median of {args.repeat}")
    for name, (wall, processor), all_times, peak in [("straightforward", slow, times[:, 1, 0], peak_mib(device)),
                                                     ("smoothgrad", fast, times[:, 0, 0], ours_peak)]:
        print(f"{name:16} {wall:.3f} s a picture ({all_times.min():.3f} to {all_times.max():.3f}), {processor:.3f} processor seconds, "
              f"peak memory of the process by then {peak:,.0f} MiB")
    print(f"ratio            {slow[0] / fast[0]:.2f} ×, of processor time {slow[1] / fast[1]:.2f} ×; correlation of the maps "
          f"{min(agreement):.6f} or more; {took_prepare:.1f} s to prepare a network")
    if device.type == "cuda":
        on_gpu(ours, ready, preprocessing, args, device)


def on_gpu(ours, ready, preprocessing, args, device):
    """Best batch, matrix rate, forward and backward apart. Not tried: no GPU was at hand when this was written."""
    for batch in (25, 50, 100, 250, 500):
        print(f"batch {batch}: {clock(lambda: ours(0, batch), device)[0]:.4f} s a picture")
    size = 8192
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if args.precision == "bf16" else torch.float32)
    a @ a
    rate = 2 * size**3 * 10 / clock(lambda: [a @ a for _ in range(10)], device)[0]
    pictures = torch.randn(args.samples, 3, *data.input_size(preprocessing), device=device)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
        ready(pictures)
    operations = 2 * counter.get_total_flops()  # the backward pass to the picture costs another forward pass
    print(f"matrix products reach {rate / 1e12:.1f} Tflop/s; maps {operations / clock(lambda: ours(0), device)[0] / rate:.1%} of it")
    forward = clock(lambda: ready(pictures), device)[0]
    noise = clock(lambda: list(saliency.noisy_copies(pictures[:1], pictures.new_ones(1), [0], args.samples)), device)[0]
    post = clock(lambda: saliency.scale_maps(pictures[:1, 0]), device)[0]
    print(f"forward {forward:.4f} s, noise {noise:.4f} s, percentile and scaling {post:.4f} s, the rest is the backward pass")


def running_maps(ready, picture, black, distance, seed, antithetic, checkpoints, batch):
    """Maps of one picture after each number of copies, both orders from the same gradients: {(order, copies): (H, W)}."""
    spans = (picture.max() - picture.min())[None]
    copies = saliency.noisy_copies(picture[None], 0.15 * spans, [seed], checkpoints[-1], antithetic)
    with torch.no_grad():
        origin = ready(black[None])
    signed, absolute, done, maps = 0, 0, 0, {}
    for goal in checkpoints:
        while chunk := [noisy for _, noisy in itertools.islice(copies, min(batch, goal - done))]:
            gradient = next(saliency.distance_gradients(ready, torch.stack(chunk), origin, [distance]))
            signed, absolute = signed + gradient.sum(dim=0), absolute + gradient.mean(dim=1).abs().sum(dim=0)
            done += len(chunk)
        maps["paper", goal] = saliency.scale_maps(signed.abs().mean(dim=0)[None])[0]
        maps["released", goal] = saliency.scale_maps(absolute[None])[0]
    return maps


def ceiling_table(args, device):
    module, preprocessing = network(args.backbone)
    pictures, black = (tensor.to(device) for tensor in inputs(args.pictures, preprocessing, args.number))
    distance = models.distance("euclidean")
    ready, _ = saliency.prepare(module, preprocessing, device)
    copies = [count for count in COPIES if count <= args.reference]
    z = {}
    for i, picture in enumerate(pictures):
        run = lambda seed, antithetic, goals: running_maps(
            ready, picture, black, distance, saliency.noise_seed(seed, "benchmark", i), antithetic, goals, args.batch)
        reference = run(9, False, [args.reference])
        for antithetic in (False, True):
            one, two = run(1, antithetic, copies), run(2, antithetic, copies)
            for key in one:
                long = reference[key[0], args.reference]
                pair = correlation(one[key], two[key]), correlation(one[key], long)
                z.setdefault((*key, antithetic), []).append(np.arctanh(np.clip(pair, -0.999999, 0.999999)))
        print(f"picture {i + 1} of {len(pictures)}", file=sys.stderr)
    print(f"{args.backbone}, {len(pictures)} pictures: two maps with independent noise · a map and one of {args.reference} copies")
    print("copies  " + "".join(f"{order + suffix:>22}" for order in ("paper", "released") for suffix in ("", ", antithetic")))
    for count in copies:
        cells = [np.tanh(np.mean(z[order, count, anti], axis=0)) for order in ("paper", "released") for anti in (False, True)]
        print(f"{count:6}  " + "".join(f"{f'{pair:.3f} · {long:.3f}':>22}" for pair, long in cells))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
