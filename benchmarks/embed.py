"""Speed of embed.py against the bare forward pass: same network, batch, device, threads, tensors in memory.

    python benchmarks/embed.py --dataset ../shared/renders
    python benchmarks/embed.py --dataset ../shared/renders --model bninception --repeat 4 --precision bf16

Prints the time and the processor time a picture of both (on a machine in use by others only the latter tells
much), their ratio, decodes for each picture and the peak memory of a short and a long run. The whole command
is timed from main() to its end: listing, loading the network, hashing, decoding, writing, renaming.
bninception and inception_v3 get random weights where the real ones are not at hand: they take the same time.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import embed  # noqa: E402
from dml_common import command, networks, pictures  # noqa: E402


def bare(module, preprocessing, batch, device, precision, seconds):
    """Seconds and processor seconds a picture of the forward pass alone, in embed.py's memory layout."""
    shape = (batch, *pictures.input_size(preprocessing), 3)
    given = networks.to_input(torch.randint(0, 256, shape, dtype=torch.uint8).to(device), preprocessing)
    embed.embed(module, given, precision)
    start, processor, done = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds:
        embed.embed(module, given, precision)
        done += batch
    return (time.perf_counter() - start) / done, (time.process_time() - processor) / done


def whole(arguments, n):
    """Seconds, processor seconds and decodes a picture of embed.main()."""
    decodes, read = [0], pictures.load_pixels

    def counted(*rest):
        decodes[0] += 1
        return read(*rest)

    pictures.load_pixels = counted
    start, processor = time.perf_counter(), time.process_time()
    embed.main([str(argument) for argument in arguments])
    pictures.load_pixels = read
    return (time.perf_counter() - start) / n, (time.process_time() - processor) / n, decodes[0] / n


def repeat(paths, times, folder):
    """A folder with every picture `times` times (links), so that a small set makes a long run."""
    for copy in range(times):
        for number, path in enumerate(paths):
            os.symlink(path.resolve(), folder / f"{copy:03d}_{number:06d}{path.suffix}")


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--dataset", required=True, help="a folder of pictures or a rendered set")
    add("--model", default="efficientnet_lite0")
    add("--repeat", type=int, default=1, metavar="N", help="take every picture N times (1)")
    add("--pictures", type=int, metavar="N", help="the first N (all)")
    add("--seconds", type=float, default=5, help="of each bare measurement (5)")
    add("--rounds", type=int, default=3, help="alternations of bare and whole (3)")
    add("--batch", type=int, help="as embed.py chooses")
    add("--workers", type=int, default=None)
    add("--device", default="auto")
    add("--precision", default="fp32", choices=["fp32", "tf32", "bf16"])
    args = parser.parse_args()
    device = command.torch_device(args.device, args.precision)
    paths = pictures.open_dataset(args.dataset).paths[:args.pictures]
    with tempfile.TemporaryDirectory() as name:
        folder, weights = Path(name), []
        (folder / "pictures").mkdir()
        repeat(paths, args.repeat, folder / "pictures")
        if args.model in networks.WEIGHTS and not networks.hub_file(args.model).is_file():
            torch.save(networks.BACKBONES[args.model]().state_dict(), folder / "weights.pth")
            weights = ["--weights", folder / "weights.pth"]
        network = networks.load(networks.find(model=args.model, weights=weights[1] if weights else None)[0])
        module, preprocessing = network.module.to(device), network.preprocessing
        black = torch.from_numpy(pictures.black_picture(preprocessing))[None].to(device)
        batch = args.batch or embed.batch_size(module, black)
        line = ["--dataset", folder / "pictures", "--model", args.model, *weights, "--device", args.device,
                "--precision", args.precision, "--batch", batch]
        line += ["--workers", args.workers] if args.workers else []
        n, ratios = len(paths) * args.repeat, []
        print(f"{args.model}, {args.precision}, {device}, {torch.get_num_threads()} threads, batch {batch}, "
              f"{n} pictures")
        for turn in range(args.rounds):
            before = bare(module, preprocessing, batch, device, args.precision, args.seconds)
            seconds, processor, decodes = whole([*line, "--out", folder / f"{turn}.npy"], n)
            after = bare(module, preprocessing, batch, device, args.precision, args.seconds)
            ratios.append([(before[0] + after[0]) / 2 / seconds, (before[1] + after[1]) / 2 / processor])
            print(f"ms a picture: bare {before[0] * 1e3:.1f} and {after[0] * 1e3:.1f} (processor "
                  f"{before[1] * 1e3:.1f} and {after[1] * 1e3:.1f}), whole {seconds * 1e3:.1f} (processor "
                  f"{processor * 1e3:.1f}); ratio {ratios[-1][0]:.3f} (processor {ratios[-1][1]:.3f}); "
                  f"{decodes:.2f} decodes a picture", flush=True)
        print("median ratio {:.3f}, of processor time {:.3f}".format(*np.median(ratios, axis=0)))
        for times in (1, 4):  # peak memory of processes of their own
            part = folder / f"part{times}"
            part.mkdir()
            repeat(paths[:100], times, part)
            code = ("import resource, sys; sys.path.insert(0, sys.argv.pop(1)); import embed; embed.main(); "
                    "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)")
            more = ["--dataset", part, "--out", folder / f"peak{times}.npy"]
            home = str(Path(embed.__file__).parent)
            process = [sys.executable, "-c", code, home, *map(str, [*line, *more])]
            done = subprocess.run(process, capture_output=True, text=True, check=True)
            print(f"{100 * times} pictures: peak {done.stdout.strip()} MiB")


if __name__ == "__main__":
    main()
