"""Embed a data set's pictures: pictures through one or many networks into emb.npy.

Input: a folder of pictures, a rendered set, a CSV with a path column, or a published data set (cars196,
cub200, sop), and networks: ImageNet backbones, your own, or the papers' checkpoints (models/README.md: where
to put them).
Output: emb.npy, float32 (n, m), the raw output, row i is picture i; emb.json beside it says how it was made;
labels.csv lists the pictures, with their classes where the data set has them (names in classes.csv).

    python embed.py --dataset my_pictures --model efficientnet_lite0 --out emb.npy
    python embed.py --dataset my_pictures --model timm:vit_small_patch14_dinov2 --out emb.npy
    python embed.py --dataset my_pictures --model my_package.networks:resnet --weights mine.pth \
        --as "My loss" --type ranking --fold 0 --out results
    python embed.py --dataset cars196 --loss all --fold all --out results
    torchrun --nproc-per-node 2 embed.py --dataset cars196 --loss all --fold all --out results

Stop it as you like: the same command continues, with any number of processes. The values depend on pictures
and network alone: batch, workers and ranks change them by at most 1e-5.
"""
if __name__ == "__main__":  # before torch is imported: Ctrl-C ends in one line from here on
    import sys
    try:
        from dml_common import command
    except ImportError:
        print("embed.py: the command needs the folder dml_common/ beside it; copy that too", file=sys.stderr)
        sys.exit(2)
    command.begin()

import os
from collections import Counter
from functools import partial

import numpy as np
import torch


@torch.inference_mode()
def embed(module, pictures, precision="fp32"):
    """Embeddings of one batch: pictures (B, 3, H, W) on the module's device -> float32 array (B, m).

    precision: "bf16" for autocast. Raises ValueError when the output is not (B, m).
    """
    with torch.autocast(pictures.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        try:
            output = module(pictures.clone())  # it may write into what it is given
        except Exception as error:  # out of memory; whatever a factory's network does with pictures
            raise ValueError(f"the network fails on {len(pictures)} pictures {tuple(pictures.shape[1:])}: "
                             f"{type(error).__name__}: {error} (a smaller --batch? another preprocessing?)"
                             ) from None
    if not isinstance(output, torch.Tensor) or output.ndim != 2 or len(output) != len(pictures):
        shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
        raise ValueError(f"the network gives {shape} for {len(pictures)} pictures; expected a tensor "
                         "(pictures, dimension)")
    return output.float().cpu().numpy()


def batch_size(module, picture):
    """Pictures (1, 3, H, W) that fit into half the free memory: a power of two, up to 256 (32 on a CPU)."""
    device = picture.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        embed(module, picture.expand(8, -1, -1, -1))
        each = (torch.cuda.max_memory_allocated(device) - before) / 8
        free, most = torch.cuda.mem_get_info(device)[0], 256
    else:
        each = 120 * picture.numel() * 4  # measured with BN-Inception: 70 MB a picture
        free, most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2, 32
    fits = max(1, int(free / 2 / each))
    return min(most, 1 << (fits.bit_length() - 1))


# ---------------------------------------------------------------- the command


def embed_all(jobs, args, device):
    """Make the arrays of networks that share their pictures and a preprocessing."""
    from dml_common import arrays, networks, pictures, rowfile

    trunks, preprocessing = {}, jobs[0].about["preprocessing"]
    modules = [networks.load(job.spec, trunks).module.to(device) for job in jobs]
    black = torch.from_numpy(pictures.black_picture(preprocessing))[None].to(device)
    shapes = [embed(module, black).shape[1:] for module in modules]
    batch = args.batch or batch_size(modules[0], black)
    own = {job.spec["backbone"]: module for job, module in zip(jobs, modules) if ":" in job.spec["backbone"]}
    for name, module in own.items():
        if arrays.depends_on_batch(partial(embed, module), black, name):
            batch = 1
    shared = Counter(module[0] for module in modules if isinstance(module, torch.nn.Sequential))

    def load(row):
        path = jobs[0].dataset.paths[jobs[0].numbers[row]]
        pixels = pictures.load_pixels(path, preprocessing, args.draft)
        return preprocessing(pixels) if callable(preprocessing) else pixels

    def stack(pixels):
        return networks.to_input(torch.from_numpy(np.stack(pixels)).to(device), preprocessing)

    def compute(which, rows, batch):
        features = {}  # of this batch, of each trunk that several networks share
        for k in which:
            module, given = modules[k], batch
            if isinstance(module, torch.nn.Sequential) and shared[module[0]] > 1:
                trunk, module = module
                if trunk not in features:
                    features[trunk] = torch.from_numpy(embed(trunk, batch, args.precision)).to(device)
                given = features[trunk]
            values = embed(module, given, args.precision)
            for row in np.array(rows)[~np.isfinite(values).all(axis=1)]:
                name, path = jobs[k].spec["name"], jobs[k].dataset.paths[row]
                raise ValueError(f"{name} gives nan or infinity for {path}; check weights and preprocessing")
            yield values

    rowfile.fill(jobs, shapes, np.float32, load, stack, compute, batch, rowfile.BLOCK, args, "pictures")


def write_labels(job, prefix):
    """Of a complete array labels.csv (which picture a row is, and its class), classes.csv and props.csv."""
    from dml_common import arrays, files

    dataset, kept = job.dataset, arrays.kept_rows(job)
    labels = {"path": dataset.relative}
    if dataset.labels is not None:
        labels["class"] = dataset.labels.tolist()
        files.write_table(f"{prefix}classes.csv", ["class", "name"], list(enumerate(dataset.classes)))
    if dataset.super_labels is not None:
        labels["super_class"] = [dataset.super_classes[label] for label in dataset.super_labels]
    for name, table in ("labels", labels), ("props", dataset.properties):
        if table:
            rows = list(zip(*table.values()))
            files.write_table(f"{prefix}{name}.csv", list(table), [rows[row] for row in kept])


def main(argv=None):
    from dml_common import arrays, command

    parser = command.parser(__doc__)
    add = parser.add_argument
    arrays.add_options(add, "emb.npy")
    add("--seed", type=int, default=0, help="of the random layer of --loss None (0)")
    add("--batch", type=int, metavar="N", help="pictures at a time (from the memory)")
    add("--draft", action="store_true", help="let the decoder shrink large JPEGs: faster, other values")
    args = parser.parse_args(argv)
    command.at_least(args, batch=1, workers=1)
    device = command.torch_device(args.device, args.precision)
    jobs = arrays.jobs(args, "emb.npy", {"precision": args.precision, "draft": args.draft}, args.seed)
    for group in arrays.incomplete(jobs, lambda job: (job.about["preprocessing"], job.about["pictures"])):
        embed_all(group, args, device)
    for job in jobs:
        if job.path == args.out:
            write_labels(job, f"{job.path.with_suffix('')}.")
        else:  # networks that were trained on some of the pictures have their own ones
            write_labels(job, f"{job.path.parent if job.dataset.split == 'held out' else job.folder}/")


if __name__ == "__main__":
    command.run(main)
