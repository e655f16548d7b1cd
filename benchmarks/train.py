"""What does training wait for, and what does a frozen trunk save? Whole commands on made-up pictures.

    python benchmarks/train.py                                     # frozen trunk: 14 losses × 4 folds
    python benchmarks/train.py --pictures 256 --device cpu
    python benchmarks/train.py --pictures 4096 --precision tf32    # on a GPU

With --pictures, that many JPEGs of --width × --height (Cars196's mean is 700 × 480) in 16 classes are made,
and the whole network is fine-tuned for two epochs. train.py says how long it waited for decoded pictures; the
decoding threads' own speed stands beside. The default network is Inception v3 with random weights, so that
nothing has to be downloaded. Asserts nothing.
"""
import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from dml_common.files import read_table  # noqa: E402
from dml_common.pictures import read_rgb  # noqa: E402


def make_pictures(folder, number, width, height):
    """JPEGs of smooth noise with some grain: about as large as photographs."""
    for i in range(number):
        rng = np.random.default_rng(i)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
        pixels = (smooth + rng.normal(0, 6, (height, width, 1))).clip(0, 255).astype(np.uint8)
        (folder / str(i % 16)).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / str(i % 16) / f"{i}.jpg", quality=90)


def command(*arguments):
    """(seconds, CPU seconds, stderr) of one train.py."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *map(str, arguments)], cwd=ROOT,
                          capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, processor, done.stderr


def decoding_speed(paths, workers):
    """Training crops a second, by the threads alone."""
    def crop(i):
        return train.augment(read_rgb(paths[i]), (299, 299), np.random.default_rng(i))

    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(crop, range(len(paths))))
    return len(paths) / (time.perf_counter() - start)


def fine_tuning(args, folder):
    pictures = folder / "pictures"
    pictures.mkdir()
    make_pictures(pictures, args.pictures, args.width, args.height)
    paths = sorted(pictures.rglob("*.jpg"))
    size = sum(path.stat().st_size for path in paths) / len(paths) / 1024
    speed = decoding_speed(paths[:1024], args.workers)
    print(f"{len(paths):,} JPEGs of {args.width} × {args.height}, {size:.0f} KiB each; {args.workers} "
          f"threads decode and crop {speed:.0f} pictures a second")
    took, _, said = command("--dataset", pictures, "--split", "pictures", "--model", args.model,
                            "--device", args.device, "--epochs", 2, "--precision", args.precision,
                            "--batch", args.batch, "--workers", args.workers, "--models", folder,
                            *(["--compile"] if args.compile else []))
    rows = read_table(folder / "trained/pictures@pictures/normalized_softmax/fold0/history.csv")
    epoch = list(zip(rows["epoch"], rows["split"])).index(("2", "train"))
    print(f"{args.model}, {args.precision}, {args.device}: {took:.1f} s for the command, "
          f"{float(rows['seconds'][epoch]):.1f} s for the second epoch and the scores of its pictures; "
          f"{re.search('waited.*', said).group()}")


def frozen(folder):
    arguments = ("--dataset", "examples/cars", "--model", "efficientnet_lite0", "--dim", 128,
                 "--freeze-trunk", "--models", folder)
    for what, options in (("features of 300 pictures, and the start", ("--loss", "None")),
                          ("14 losses × 4 folds, in one thread", ("--loss", "all", "--fold", "all"))):
        took, cpu, _ = command(*arguments, *options)
        print(f"frozen trunk: {what}: {took:.1f} s ({cpu:.1f} s of the CPU)", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pictures", type=int, metavar="N", help="fine-tune on so many made-up pictures, 128 or more "
        "(instead: the frozen trunk)")
    add("--width", type=int, default=700, help="of a picture (700)")
    add("--height", type=int, default=480, help="of a picture (480)")
    add("--model", default="dml_common.networks:inception_v3", help="as for train.py (%(default)s)")
    add("--batch", type=int, default=32, help="(32)")
    add("--device", default="auto", help="(auto)")
    add("--precision", default="fp32", help="(fp32)")
    add("--compile", action="store_true", help="torch.compile")
    add("--workers", type=int, default=min(16, os.cpu_count() or 1), help="threads that decode (%(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.pictures:
            fine_tuning(args, Path(folder))
        else:
            frozen(Path(folder))


if __name__ == "__main__":
    main()
