"""Speed of embed.py against the bare forward pass: same network, batch, device and threads, tensors in memory.

    python benchmarks/embed.py --dataset ../shared/renders
    python benchmarks/embed.py --dataset ../shared/renders --model bninception --repeat 4 --precision bf16

Prints the time and the processor time a picture of both (on a machine in use by others only the latter tells much),
their ratio, decodes for each picture and the peak memory of a short and a long run.
The whole command is timed from main() to its end: listing, loading the network, hashing, decoding, writing, renaming.
bninception and inception_v3 get random weights where the real ones are not at hand: they take the same time.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch

from dml_common import pictures as data
import embed
from dml_common import networks as models


def bare(module, preprocessing, batch, device, precision, seconds):
    """Seconds and processor seconds a picture of the forward pass alone, in the memory layout that embed.py uses."""
    pictures = embed.to_input(torch.randint(0, 256, (batch, *data.input_size(preprocessing), 3), dtype=torch.uint8).to(device), preprocessing)
    embed.embed(module, pictures, precision)
    start, processor, done = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds:
        embed.embed(module, pictures, precision)
        done += batch
    return (time.perf_counter() - start) / done, (time.process_time() - processor) / done


def whole(arguments, n):
    """Seconds, processor seconds and decodes a picture of embed.main()."""
    decodes, read = [0], data.load_pixels

    def counted(*rest):
        decodes[0] += 1
        return read(*rest)

    data.load_pixels, sys.argv = counted, ["embed.py", *map(str, arguments)]
    start, processor = time.perf_counter(), time.process_time()
    embed.main()
    data.load_pixels = read
    return (time.perf_counter() - start) / n, (time.process_time() - processor) / n, decodes[0] / n


def repeat(paths, times, folder):
    """A folder with every picture `times` times (links), so that a small set makes a long run."""
    for copy in range(times):
        for number, path in enumerate(paths):
            os.symlink(path.resolve(), folder / f"{copy:03d}_{number:06d}{path.suffix}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    paths = data.open_dataset(args.dataset).paths[:args.pictures]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "pictures").mkdir()
        repeat(paths, args.repeat, folder / "pictures")
        weights = []
        if args.model in models.WEIGHTS and not models.hub_file(args.model).is_file():
            torch.save(models.BACKBONES[args.model]().state_dict(), folder / "weights.pth")
            weights = ["--weights", folder / "weights.pth"]
        command = ["--dataset", folder / "pictures", "--model", args.model, *weights, "--device", args.device,
                   "--precision", args.precision]
        command += ["--workers", args.workers] if args.workers else []
        network = models.load(models.find(model=args.model, weights=weights[1] if weights else None)[0])
        device = embed.device(args.device)
        network = network._replace(module=network.module.to(device))
        batch = args.batch or embed.batch_size(network, device)
        command += ["--batch", batch]
        n = len(paths) * args.repeat
        print(f"{args.model}, {args.precision}, {device}, {torch.get_num_threads()} threads, batch {batch}, {n} pictures")
        ratios = []
        for turn in range(args.rounds):
            before = bare(network.module, network.preprocessing, batch, device, args.precision, args.seconds)
            seconds, processor, decodes = whole([*command, "--out", folder / f"{turn}.npy"], n)
            after = bare(network.module, network.preprocessing, batch, device, args.precision, args.seconds)
            ratios.append([(before[0] + after[0]) / 2 / seconds, (before[1] + after[1]) / 2 / processor])
            print(f"ms a picture: bare {before[0] * 1e3:.1f} and {after[0] * 1e3:.1f} (processor {before[1] * 1e3:.1f} and "
                  f"{after[1] * 1e3:.1f}), whole {seconds * 1e3:.1f} (processor {processor * 1e3:.1f}); "
                  f"ratio {ratios[-1][0]:.3f} (processor {ratios[-1][1]:.3f}); {decodes:.2f} decodes a picture", flush=True)
        print("median ratio {:.3f}, of processor time {:.3f}".format(*np.median(ratios, axis=0)))
        for times in (1, 4):  # peak memory of processes of their own
            code = "import resource, sys; sys.path.insert(0, sys.argv.pop(1)); import embed; embed.main(); " \
                   "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
            part = folder / f"part{times}"
            part.mkdir()
            repeat(paths[:100], times, part)
            arguments = [*map(str, command), "--dataset", str(part), "--out", str(folder / f"peak{times}.npy")]
            done = subprocess.run([sys.executable, "-c", code, str(Path(embed.__file__).parent), *arguments],
                                  capture_output=True, text=True, check=True)
            print(f"{100 * times} pictures: peak {done.stdout.strip()} MiB")


if __name__ == "__main__":
    main()
