"""Embed a data set's pictures: pictures through one or many networks into emb.npy.

Input: a folder of pictures, a rendered set, a CSV with a path column, or a published data set (cars196, cub200, sop),
and networks: ImageNet backbones, your own, or the papers' checkpoints (models/README.md says where to put them).
Output: emb.npy, float32 (n, m), the raw output, row i is picture i; emb.json beside it says how it was made;
labels.csv lists the pictures, with their classes where the data set has them (names in classes.csv).

    python embed.py --dataset my_pictures --model efficientnet_lite0 --out emb.npy
    python embed.py --dataset my_pictures --model my_package.networks:resnet --out emb.npy
    python embed.py --dataset cars196 --loss all --fold all --out results
    torchrun --nproc-per-node 2 embed.py --dataset cars196 --loss all --fold all --out results

Stop it as you like: the same command continues, with any number of processes, and does nothing when all is there.
The values depend on pictures and network alone: batch, workers and ranks change them by at most 1e-5.
"""
import argparse
import os
import sys
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import PIL
import torch
from tqdm import tqdm

from dml_common import files
from dml_common import pictures as data
from dml_common import networks as models
from dml_common import rowfile


def to_input(pixels, preprocessing):
    """uint8 RGB (B, H, W, 3) -> float32 (B, 3, H, W), channels-last in memory: data.normalise on the network's device."""
    if preprocessing["channels"] == "BGR":
        pixels = pixels.flip(-1)
    values = pixels.float() / 255
    if preprocessing["scale"] != 1:
        values *= preprocessing["scale"]
    mean, std = (torch.tensor(preprocessing[key], dtype=torch.float32, device=values.device) for key in ("mean", "std"))
    return ((values - mean) / std).permute(0, 3, 1, 2)


@torch.inference_mode()
def embed(module, pictures, precision="fp32"):
    """Embeddings of one batch: pictures (B, 3, H, W) on the module's device -> float32 array (B, m).

    precision: "fp32", "tf32" (GPU) or "bf16" (autocast). Raises ValueError when the output is not (B, m).
    """
    device = pictures.device.type
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16"):
        try:
            output = module(pictures)
        except (RuntimeError, TypeError) as error:  # out of memory; a factory's network made for other inputs
            raise ValueError(f"the network fails on {len(pictures)} pictures {tuple(pictures.shape[1:])}: "
                             f"{error} (a smaller --batch? another preprocessing?)") from None
    if not isinstance(output, torch.Tensor) or output.ndim != 2 or len(output) != len(pictures):
        shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise ValueError(f"the network gives {shape} for {len(pictures)} pictures; expected a tensor (pictures, dimension)")
    return output.float().cpu().numpy()


def decoded(paths, wanted, preprocessing, ahead, workers, draft=False):
    """Decode in threads, up to `ahead` pictures before they are asked for, each picture once.

    wanted: iterable of (row of paths, networks that want it). Yields (row, networks, pixels); pixels is uint8 (H, W, 3),
    or the ValueError or OSError of a picture that can't be read.
    """
    def decode(row):
        try:
            return data.load_pixels(paths[row], preprocessing, draft)
        except (ValueError, OSError) as error:
            return error

    pool, queue = ThreadPoolExecutor(workers), deque()
    try:
        for row, networks in wanted:
            queue.append((row, networks, pool.submit(decode, row)))
            if len(queue) > ahead:
                row, networks, future = queue.popleft()
                yield row, networks, future.result()
        while queue:
            row, networks, future = queue.popleft()
            yield row, networks, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def batches(items, size, preprocessing, device):
    """Batches of decoded's items on the device, the next one being made while this one is used.

    Yields ([(row, networks)], float32 (B, 3, H, W), [(row, networks, error)]); B may be 0.
    """
    def make():
        batch = list(islice(items, size))
        good = [item for item in batch if not isinstance(item[2], Exception)]
        pixels = torch.from_numpy(np.stack([item[2] for item in good])).to(device) if good else None
        bad = [item for item in batch if isinstance(item[2], Exception)]
        return [item[:2] for item in good], to_input(pixels, preprocessing) if good else None, bad

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(make)
        while True:
            rows, pictures, bad = following.result()
            if not rows and not bad:
                return
            following = pool.submit(make)
            yield rows, pictures, bad


def claimed(files, shares):
    """Rows to do now: (row, numbers of the files that lack it), claimed block by block as they are asked for."""
    for start, stop in shares:
        lacking = {}
        for number, file in enumerate(files):
            for row in file.claim(start, stop).tolist():
                lacking.setdefault(row, []).append(number)
        yield from sorted(lacking.items())


def fill(networks, files, paths, shares, options, bar):
    """Embed the pictures the files lack, for networks that share a preprocessing."""
    preprocessing, size = networks[0].preprocessing, options.batch or batch_size(networks[0], options.device)
    trunks = Counter(network.module[0] for network in networks if isinstance(network.module, torch.nn.Sequential))
    items = decoded(paths, claimed(files, shares), preprocessing, size + options.workers, options.workers, options.draft)
    for rows, pictures, bad in batches(items, size, preprocessing, options.device):
        for row, lacking, error in bad:
            if not options.skip_unreadable:
                raise ValueError(f"{error}, or leave it out with --skip-unreadable")
            print(f"embed.py: left out: {error}", file=sys.stderr)
            for number in lacking:
                files[number].leave_out([row])
        features = {}  # of this batch, of each trunk that several networks share
        for number, (network, file) in enumerate(zip(networks, files)):
            mine = [i for i, (_, lacking) in enumerate(rows) if number in lacking]
            if not mine:
                continue
            bar.set_description(network.name, refresh=False)
            module, given = network.module, pictures
            if isinstance(module, torch.nn.Sequential) and trunks[module[0]] > 1:
                trunk, module = module
                if trunk not in features:
                    features[trunk] = torch.from_numpy(embed(trunk, pictures, options.precision)).to(options.device)
                given = features[trunk]
            values = embed(module, given if len(mine) == len(rows) else given[mine], options.precision)
            numbers = [rows[i][0] for i in mine]
            if not np.isfinite(values).all():
                nan = numbers[int(np.isfinite(values).all(axis=1).argmin())]
                raise ValueError(f"{network.name} gives nan or infinity for {paths[nan]}; check its weights and preprocessing")
            file.write(numbers, values)
            bar.update(len(numbers))


def batch_size(network, device):
    """Pictures in a batch: what fits into half the free memory, a power of two, at most 256 (32 on a CPU)."""
    picture = torch.from_numpy(data.black_picture(network.preprocessing))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        embed(network.module, picture.expand(8, -1, -1, -1).to(device))
        each = (torch.cuda.max_memory_allocated(device) - before) / 8
        free, most = torch.cuda.mem_get_info(device)[0], 256
    else:
        each = 120 * picture.numel() * 4  # measured with BN-Inception: 70 MB a picture
        free, most = free_memory(), 32
    fits = max(1, int(free / 2 / each))
    return min(most, 1 << (fits.bit_length() - 1))


def free_memory():
    """Bytes of main memory that may be used: what Linux calls available, elsewhere half of all."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def about(dataset, spec, args):
    """The JSON beside the array."""
    rows = {"rows": spec["config"]["split"]["test"]} if dataset.split == "held out" else {}  # of the whole data set
    return {"dataset": dataset.name, "split": dataset.split, **rows, **models.describe(spec),
            "options": {"precision": args.precision, "draft": args.draft},
            "versions": {"torch": torch.__version__, "numpy": np.__version__, "pillow": PIL.__version__},
            "pictures": listed(dataset.relative)}


def listed(relative):
    return {"number": len(relative), "sha256": data.pictures_sha256(relative)}


def write_labels(dataset, array, prefix):
    """Of a complete array <prefix>labels.csv (which picture each row is, and its class), <prefix>classes.csv and <prefix>props.csv."""
    left_out = set(files.read_sidecar(array)["pictures"].get("left_out", []))
    header, columns = ["path"], [dataset.relative]
    if dataset.labels is not None:
        header.append("class")
        columns.append(dataset.labels.tolist())
        files.write_table(Path(f"{prefix}classes.csv"), ["class", "name"], list(enumerate(dataset.classes)))
    if dataset.super_labels is not None:
        header.append("super_class")
        columns.append([dataset.super_classes[label] for label in dataset.super_labels])
    keep = [row for row, name in enumerate(dataset.relative) if name not in left_out]
    files.write_table(Path(f"{prefix}labels.csv"), header, [[column[row] for column in columns] for row in keep])
    if dataset.properties:
        files.write_table(Path(f"{prefix}props.csv"), list(dataset.properties),
                         [[values[row] for values in dataset.properties.values()] for row in keep])


def finish(dataset, file):
    """Rename the array if it is complete; pictures left out are missing from its JSON's list too, and named there."""
    def about(left_out):
        rows = set(left_out)
        keep = [name for row, name in enumerate(dataset.relative) if row not in rows]
        return {**file.about, "pictures": {**listed(keep), "left_out": [dataset.relative[row] for row in left_out],
                                           "listed": listed(dataset.relative)}}

    return file.finish(about)


def place(dataset, spec, out):
    """Where a network's array goes: the file itself, or results/<dataset>/<slug>/fold<k>/emb.npy."""
    if out.suffix == ".npy":
        return out
    return out / dataset.name / spec["slug"] / f"fold{spec['fold'] or 0}" / "emb.npy"


def fill_all(todo, args, rank, ranks):
    """Embed for every (dataset, spec, path, JSON) of todo, which share their pictures and a preprocessing."""
    trunks, dataset = {}, todo[0][0]
    networks = [models.load(spec, trunks) for _, spec, _, _ in todo]
    networks = [network._replace(module=network.module.to(args.device)) for network in networks]
    dimensions = [embed(n.module, torch.from_numpy(data.black_picture(n.preprocessing))[None].to(args.device)).shape[1]
                  for n in networks]
    n, files = len(dataset.paths), []
    try:
        for (_, _, path, content), dimension in zip(todo, dimensions):
            files.append(rowfile.RowFile(path, (n, dimension), np.float32, content, retry=not args.skip_unreadable))
        at_work = [(network, file) for network, file in zip(networks, files) if not file.complete]
        total = sum(file.missing() for _, file in at_work)
        with tqdm(total=total, delay=2, unit=" pictures", disable=rank > 0 or not sys.stderr.isatty()) as bar:
            if at_work:
                # Twice: the second round takes over what a process left that died after the first came by.
                fill(*zip(*at_work), dataset.paths, 2 * rowfile.shares(n, rank, ranks), args, bar)
        for file in files:
            if not finish(dataset, file) and ranks == 1:
                print(f"embed.py: {file.path}: {file.missing():,} rows are left to other processes; "
                      "run the command again if one of them was stopped", file=sys.stderr)
    finally:
        for file in files:
            if not file.complete:
                file.give_up(alone=ranks == 1)


def device(name):
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


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = fail
    add = parser.add_argument
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
    add("--seed", type=int, default=0, help="of the random layer of --loss None (0)")
    add("--out", type=Path, default=Path("results"), metavar="FILE.npy|DIR",
        help="one network's array, or the folder of all: DIR/<dataset>/<slug>/fold<k>/emb.npy (results)")
    add("--skip-unreadable", action="store_true", help="leave pictures out that can't be read, and name them (stop there)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    add("--precision", default="fp32", choices=["fp32", "tf32", "bf16"], help="of the network's arithmetic (fp32)")
    add("--batch", type=int, metavar="N", help="pictures at a time (from the free memory)")
    add("--workers", type=int, metavar="N", help="threads that decode (CPUs of this rank, at most 16)")
    add("--draft", action="store_true", help="let the JPEG decoder shrink large pictures: faster, other values (README)")
    args = parser.parse_args()
    for name in ("batch", "workers"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected at least 1")
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # what a scheduler grants
    cpus = available // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    args.workers = args.workers or min(16, max(1, cpus))
    args.device = device(args.device)
    if args.precision == "tf32" and args.device.type == "cpu":
        parser.error("--precision tf32 is an NVIDIA GPU's; on a CPU give fp32 or bf16")
    return args


def main():
    args = parse()
    if args.out.suffix == ".npy":
        files.check_output(args.out)
    rank, ranks = rowfile.my_share()
    dataset = data.open_dataset(args.dataset, args.data_root, args.split)
    loss = args.loss or (None if args.model or args.checkpoint else "all")
    specs = models.find(args.trained_on or dataset.name, loss, args.fold, args.model, args.checkpoint, args.weights,
                        args.seed, args.models)
    if args.out.suffix == ".npy" and len(specs) > 1:
        raise ValueError(f"--out {args.out} is one array, but {len(specs)} networks were asked for "
                         f"({specs[0]['name']}, {specs[1]['name']}, …); give a folder")
    wanted = []
    for spec in specs:
        own = data.own_pictures(dataset, spec["config"], args.dataset, args.data_root, args.split)
        wanted.append((own, spec, place(dataset, spec, args.out), about(own, spec, args)))
    todo = [item for item in wanted if not rowfile.is_complete(*item[2:])]
    for note in [*dataset.notes, *(spec["note"] for spec in specs)]:
        if note and rank == 0:
            print(f"embed.py: {note}", file=sys.stderr)
    key = lambda item: repr((item[3]["preprocessing"], item[3]["pictures"]))
    for _, group in groupby(sorted(todo, key=key), key=key):
        fill_all(list(group), args, rank, ranks)
    for own, _, path, _ in wanted:
        if path.exists():
            folder = path.parent if own.split == "held out" else args.out / dataset.name
            write_labels(own, path, f"{path.with_suffix('')}." if path == args.out else f"{folder}/")
    if rank == 0 and not todo:
        print(f"embed.py: nothing to do: {len(wanted)} of {len(wanted)} arrays are there", file=sys.stderr)


def fail(message):
    print("embed.py:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        print("embed.py: stopped; the same command continues", file=sys.stderr)
        sys.exit(130)
