"""What does training wait for, and what does a frozen trunk save? Whole commands on made-up pictures.

    python benchmarks/train.py                                     # frozen trunk: 14 losses × 4 folds
    python benchmarks/train.py --pictures 256
    python benchmarks/train.py --pictures 4096 --device cuda --precision bf16

With --pictures, that many JPEGs of --width × --height (Cars196's mean is 700 × 480) in 16 classes are made,
and the whole network is fine-tuned for two epochs. train.py says how long it waited for decoded pictures; the
decoding threads' own speed, in pictures a second, stands beside. The default network is Inception v3 with
random weights, so that nothing has to be downloaded. Asserts nothing.
"""
import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from measure import measured, print_header, print_table, script
from PIL import Image

import train
from dml_common import command
from dml_common.files import read_table
from dml_common.pictures import read_rgb


def make_pictures(folder, number, width, height):
    """JPEGs of smooth noise with some grain: about as large as photographs."""
    for i in range(number):
        rng = np.random.default_rng(i)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
        pixels = (smooth + rng.normal(0, 6, (height, width, 1))).clip(0, 255).astype(np.uint8)
        (folder / str(i % 16)).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / str(i % 16) / f"{i}.jpg", quality=90)


def decoding_speed(paths, workers):
    """Training crops a second, by the threads alone."""
    def crop(i):
        return train.augment(read_rgb(paths[i]), (299, 299), np.random.default_rng(i))

    with ThreadPoolExecutor(workers) as pool:
        cost, _ = measured(lambda: list(pool.map(crop, range(len(paths)))))
    return len(paths) / cost.wall


def fine_tuning(args, folder):
    pictures = folder / "pictures"
    pictures.mkdir()
    make_pictures(pictures, args.pictures, args.width, args.height)
    paths = sorted(pictures.rglob("*.jpg"))
    speed = decoding_speed(paths[:1024], args.workers)
    cost, said = script("train.py", "--dataset", pictures, "--split", "pictures", "--model", args.model,
                        "--device", args.device, "--epochs", 2, "--precision", args.precision,
                        "--batch", args.batch, "--workers", args.workers, "--models", folder,
                        *(["--compile"] if args.compile else []))
    rows = read_table(folder / "trained/pictures@pictures/normalized_softmax/fold0/history.csv")
    epoch = list(zip(rows["epoch"], rows["split"])).index(("2", "train"))
    return [(f"{len(paths):,} pictures, 2 epochs, {args.model.rpartition(':')[2]}, {args.precision}", {
        "ours": cost, "second epoch s": f"{float(rows['seconds'][epoch]):.1f}",
        "waited": re.search(r"waited.*\((.*)\)", said)[1], "decoded a second": f"{speed:.0f}"})]


def frozen(args, folder):
    arguments = ("--dataset", "examples/cars", "--model", "efficientnet_lite0", "--dim", 128,
                 "--freeze-trunk", "--models", folder, "--device", args.device,
                 "--precision", args.precision)
    return [(what, {"ours": script("train.py", *arguments, *options)[0]}) for what, options in (
        ("frozen trunk: features of 300 pictures, and the start", ("--loss", "None")),
        ("14 losses × 4 folds on them", ("--loss", "all", "--fold", "all")))]


def main():
    parser = command.parser(__doc__)
    add = parser.add_argument
    add("--pictures", type=int, metavar="N", help="fine-tune on so many made-up pictures, 128 or more "
        "(instead: the frozen trunk)")
    add("--width", type=int, default=700, help="of a picture (700)")
    add("--height", type=int, default=480, help="of a picture (480)")
    add("--model", default="dml_common.networks:inception_v3", help="as for train.py (%(default)s)")
    add("--batch", type=int, default=32, help="(32)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (cpu)")
    add("--precision", default="fp32", help="(fp32)")
    add("--compile", action="store_true", help="torch.compile")
    add("--workers", type=int, default=min(16, os.cpu_count() or 1), help="threads that decode (%(default)s)")
    args = parser.parse_args()
    print_header(command.torch_device(args.device))
    with tempfile.TemporaryDirectory() as folder:
        print_table((fine_tuning if args.pictures else frozen)(args, Path(folder)))


if __name__ == "__main__":
    command.run(main, stopped="stopped")
