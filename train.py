"""Train an embedding network with a deep-metric-learning loss, or one with each of 14 losses under equal conditions.

Input:  a data set with classes (cars196, cub200, sop, a folder, a CSV) or rendered cars (props.csv), a backbone.
Output: models/trained/<dataset>/<slug>/fold<k>/: trunk_best.pth, embedder_best.pth, config.json, read by every other
        script (embed.py --dataset X --loss all); history.csv, a row for each epoch and split, epoch 0 before training;
        histograms.csv and histograms.png, the test split's pairs before and after. The test scores on stdout.

    python train.py --dataset cars196                                # Oi et al. 2022: all their settings are the defaults
    python train.py --dataset cub200 --split random --loss "Normalized Softmax" --model inception_v3 --dim 64 --epochs 20
    python train.py --dataset examples/cars --model efficientnet_lite0 --dim 128 --freeze-trunk --loss all,None --fold all
    python train.py --dataset cars196 --split folds --model bninception --dim 128 --loss all --fold all
    torchrun --nproc-per-node 4 train.py --dataset cars196 --precision bf16

Stop it as you like, with kill -9 too: the same command continues after the last epoch that ended, to the same numbers.
Every random number comes from (--seed, fold, epoch), a picture's crop from (--seed, epoch, picture): workers and restarts
change nothing. On a CPU the same command with as many threads (OMP_NUM_THREADS) gives the same bytes. Other threads, several
processes and a GPU add in another order, and AdamW's first steps magnify that: fine-tuning EfficientNet-Lite0 with 1 and 2
threads, the pairs' means were 0.001 apart after an epoch, and another epoch was best. --freeze-trunk trains in one thread:
from the same features.npy threads and processes change nothing.

--split  default   the classes in order, 4:1:5 into training, validation and test (Oi et al.); a fold is a repetition
         random    the same, the classes shuffled by --seed
         pictures  all classes in every part: fold k holds out the k-th quarter of the pictures, a tenth of the rest is
                   the validation part (the default for rendered sets, whose six models no split by class survives)
         folds     the second half of the classes is the test part; of four runs of the first half fold k validates on the
                   one before run k, fold 0 on the last, and trains on the others (Kobs et al.: the published checkpoints'
                   Test50_50_Partitions4_k: 74, 24 and 98 of Cars196's classes)

--freeze-trunk trains the linear layer alone, on features computed once for all losses and folds, without crops.
"""
import argparse
import hashlib
import io
import json
import math
import os
import re
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from importlib import metadata
from itertools import groupby, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from tqdm import tqdm

from dml_common import files
from dml_common import pictures as data
from dml_common import networks as models
import pairs
from dml_common import rowfile

BINS = 200
HEADER = ["epoch", "split", "loss", "positive_mean", "negative_mean", "jsd", "recall_at_1", "map_at_r", "seconds"]
FOLDS = 4


# ---------------------------------------------------------------- which pictures, in which batches


def split_rows(labels, kind, fold=0, seed=1):
    """The rows of the training, the validation and the test part, ascending: three int arrays.

    labels (n,): classes, in the data set's order of classes when sorted. kind: default, random, folds or pictures.
    Raises ValueError when a part has no positive or no negative pair.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not len(labels):
        raise ValueError(f"labels have shape {labels.shape}; expected (n,), one for each picture")
    if fold not in range(FOLDS):
        raise ValueError(f"fold {fold}: expected 0 to {FOLDS - 1}")
    classes, number = np.unique(labels, return_inverse=True)
    c, n = len(classes), len(labels)
    if c < 2 or c == n:
        raise ValueError(f"the {n:,} labels are {'all distinct: no two pictures belong together' if c > 1 else 'one class'}; "
                         "choose a label with several values of several pictures each")
    if kind == "pictures":  # class by class in shuffled order, dealt to the quarters in turn; of the rest a tenth, in pairs
        order = np.lexsort((np.random.default_rng(seed).permutation(n), number))
        held_out = np.arange(n) % FOLDS == fold
        rest = order[~held_out]
        tenth = np.arange(len(rest)) % 20 >= 18
        parts = rest[~tenth], rest[tenth], order[held_out]
    else:
        turn = np.random.default_rng(seed).permutation(c) if kind == "random" else np.arange(c)
        if kind == "folds":  # the first half as a ring, from its k-th quarter on; an eighth of all classes ends it
            half = c // 2
            ring, train = np.roll(turn[:half], -(fold * half // FOLDS)), half - c // 8
            of_classes = ring[:train], ring[train:], turn[half:]
        else:
            train, test = round(0.4 * c), round(0.5 * c)
            of_classes = turn[:train], turn[train:c - test], turn[c - test:]
        parts = [np.flatnonzero(np.isin(number, chosen)) for chosen in of_classes]
    for name, rows in zip(("training", "validation", "test"), parts):
        sizes = np.bincount(number[rows]) if len(rows) else np.zeros(1, int)
        if (sizes > 0).sum() < 2 or sizes.max() < 2:
            raise ValueError(f"split {kind} of {n:,} pictures in {c:,} classes: the {name} part has {len(rows)} pictures of "
                             f"{(sizes > 0).sum()} classes; expected two classes or more, one of them with two pictures"
                             + "; --split pictures keeps all classes in every part" * (kind != "pictures"))
    return tuple(np.sort(rows) for rows in parts)


def epoch_batches(labels, size, each, rng):
    """An epoch's batches: yields int arrays of positions in labels, size // each classes (or all) × `each` pictures.

    The classes of a batch are drawn at random; a class's pictures come in shuffled order and again when they are used
    up, so a smaller class gives all it has. As many batches as the pictures fill, at least one.
    """
    order = np.argsort(labels, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    waiting, width = [np.empty(0, np.int64)] * len(members), min(size // each, len(members))
    for _ in range(max(1, len(labels) // (width * each))):
        batch = []
        for c in rng.permutation(len(members))[:width]:
            if len(waiting[c]) < min(each, len(members[c])):
                waiting[c] = rng.permutation(members[c])
            batch.append(waiting[c][:each])
            waiting[c] = waiting[c][each:]
        yield np.concatenate(batch)


def augment(image, size, rng, scale=(1 / 8, 1), ratio=(3 / 4, 4 / 3)):
    """A random crop resized to `size` (H, W) and flipped half the time (Oi et al., section 4): PIL RGB -> uint8 (H, W, 3).

    scale: share of the picture's area; ratio: width / height, drawn on a logarithmic scale. What does not fit into the
    picture is drawn again, at last the largest central crop within the ratio is taken.
    """
    width, height = image.size
    for _ in range(10):
        area, aspect = width * height * rng.uniform(*scale), math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            break
    else:
        w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
        left, top = (width - w) // 2, (height - h) // 2
    crop = image.crop((left, top, left + w, top + h)).resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(crop)[:, ::-1] if rng.random() < 0.5 else np.asarray(crop)


# ---------------------------------------------------------------- losses


def make_loss(row, classes, dimension, scale=10.0):
    """pytorch-metric-learning's loss of a row of losses.csv -> (criterion, miner or None, what config.json says of it).

    scale: Normalized Softmax's s (Eq. 3), the library's 1 / temperature. Proxies are drawn from torch's generator.
    """
    try:
        from pytorch_metric_learning import distances, losses, miners
    except ImportError:
        raise ValueError("training needs the package pytorch-metric-learning: pip install '.[train]'") from None
    known = {"classes": classes, "dimension": dimension, "True": True}

    def make(library, text):
        name, *settings = text.split()
        settings = {key: known[value] if value in known else value if value[0].isalpha() else float(value)
                    for key, value in (setting.split("=") for setting in settings)}
        if name == "NormalizedSoftmaxLoss":
            settings["temperature"] = 1 / scale
        objects = {key: getattr(distances, value)() for key, value in settings.items() if isinstance(value, str)}
        whole = {key: int(value) for key, value in settings.items() if isinstance(value, float) and value == int(value)}
        return getattr(library, name)(**{**settings, **whole, **objects}), {"class": name, **settings, **whole}

    criterion, about = make(losses, f"{row['class']} {row['parameters']}")
    miner, of_miner = make(miners, row["miner"]) if row["miner"] else (None, None)
    return criterion, miner, {**about, "miner": of_miner} if miner else about


# ---------------------------------------------------------------- pictures as a network's input


def to_input(pixels, preprocessing):
    """uint8 RGB (B, H, W, 3) -> float32 (B, 3, H, W), channels-last in memory: data.normalise on the network's device."""
    if preprocessing["channels"] == "BGR":
        pixels = pixels.flip(-1)
    values = pixels.float() / 255 * preprocessing["scale"]
    mean, std = (torch.tensor(preprocessing[key], dtype=torch.float32, device=values.device) for key in ("mean", "std"))
    return ((values - mean) / std).permute(0, 3, 1, 2)


def feed_pictures(paths, preprocessing, device, workers, seed):
    """feed(batches, epoch): yields (rows, float32 (B, 3, H, W) on the device) for each int array of rows.

    With an epoch, training crops; with None, the preprocessing's own geometry. Pictures are decoded in threads ahead of
    their use; feed.waited counts the seconds that this waits for them.
    """
    size = data.input_size(preprocessing)

    def load(row, epoch):
        if epoch is None:
            return data.load_pixels(paths[row], preprocessing)
        return augment(data.read_rgb(paths[row]), size, np.random.default_rng([seed, epoch, row]))

    def ready(rows, futures):
        start = time.perf_counter()
        pixels = np.stack([future.result() for future in futures])
        feed.waited += time.perf_counter() - start
        return rows, to_input(torch.from_numpy(pixels).to(device), preprocessing)

    def feed(batches, epoch=None):
        pool, queue = ThreadPoolExecutor(workers), deque()
        try:
            for rows in batches:
                queue.append((rows, [pool.submit(load, int(row), epoch) for row in rows]))
                if sum(len(rows) for rows, _ in queue) > 2 * (workers + len(rows)):
                    yield ready(*queue.popleft())
            while queue:
                yield ready(*queue.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    feed.waited = 0.0
    return feed


def feed_features(features, device):
    """The same from a frozen trunk's features (n, f)."""
    features = torch.from_numpy(features).to(device)
    return lambda batches, epoch=None: ((rows, features[torch.from_numpy(rows).to(device)]) for rows in batches)


def frozen_features(trunk, feed, file, share, precision):
    """The trunk's output (n, f) for every picture, written to a rowfile.RowFile by all processes together."""
    with tqdm(total=file.shape[0], desc="features", unit=" pictures", delay=2, disable=None if share[0] == 0 else True) as bar:
        try:
            while not file.complete:  # again and again: what a process left that died is done by the others
                claimed = (file.claim(*block) for block in rowfile.shares(file.shape[0], *share))
                for rows, pictures in feed(rows for rows in claimed if len(rows)):
                    with torch.inference_mode(), autocast(pictures, precision):
                        file.write(rows, trunk(pictures).float().cpu().numpy())
                    bar.update(len(rows))
                if not file.finish():
                    time.sleep(0.5)
        finally:
            if not file.complete:
                file.give_up(alone=share[1] == 1)
    return np.array(files.read_array(file.path))


# ---------------------------------------------------------------- one step


def autocast(pictures, precision):
    return torch.autocast(pictures.device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def gather(values, mine, number):
    """Every rank's rows `mine` (len(mine), m) put together: (number, m)."""
    if len(mine) == number:
        return values
    whole = values.new_zeros(number, values.shape[1])
    whole[mine] = values
    dist.all_reduce(whole)
    return whole


def step(network, criterion, miner, pictures, labels, mine, precision="fp32"):
    """Gradients of one batch's loss, and the loss as a float. pictures: this rank's share `mine` of what labels (B,) list.

    A loss of pairs needs the whole batch: every rank computes it from all embeddings and sends its own share of the
    gradient back through its network, which makes what one process with that batch would.
    """
    with autocast(pictures, precision):
        embeddings = network(pictures)
    whole = gather(embeddings.detach().float(), mine, len(labels)).requires_grad_()
    loss = criterion(whole, labels, miner(whole, labels) if miner else None)
    loss.backward()
    ranks = dist.get_world_size() if len(mine) < len(labels) else 1  # DistributedDataParallel takes their mean
    embeddings.backward((whole.grad[mine] * ranks).to(embeddings.dtype))
    return loss.item()


@torch.no_grad()
def embed(network, feed, rows, size, team=(0, 1), precision="fp32"):
    """Embeddings of rows in eval mode, `size` at a time: float32 (len(rows), m) on the device; each rank does its share."""
    network.eval()
    mine, parts = np.array_split(np.arange(len(rows)), team[1])[team[0]], []
    for _, pictures in feed(rows[mine[at:at + size]] for at in range(0, len(mine), size)):
        with autocast(pictures, precision):
            parts.append(network(pictures).float())
    return gather(torch.cat(parts), mine, len(rows))


@torch.no_grad()
def mean_loss(criterion, miner, embeddings, labels, batches):
    """The mean loss of embeddings (n, m) over batches (int arrays of rows), all as they are: comparable between epochs."""
    found = []
    for batch in batches:
        x, y = embeddings[batch], labels[batch]
        found.append(float(criterion(x, y, miner(x, y) if miner else None)))
    return float(np.mean(found))


# ---------------------------------------------------------------- one run: a loss and a fold


class Run(NamedTuple):
    """A network to train."""

    name: str
    row: dict  # of losses.csv
    fold: int
    folder: Path
    parts: dict  # {"train": rows, "validation": rows, "test": rows}
    about: dict  # config.json


class Job(NamedTuple):
    """What works on a run."""

    network: nn.Module  # trunk and embedder, or the embedder alone
    criterion: nn.Module | None
    miner: nn.Module | None
    optimizer: torch.optim.Optimizer
    feed: object  # of feed_pictures or feed_features
    codes: dict  # {part: class numbers of its rows}
    known: list  # the parts whose classes are among the training part's, with the same numbers
    team: tuple  # (rank, ranks) that train this network together


def begin(run, trunk, width, feed, labels, args, team):
    """The run's Job at epoch 0. trunk: nn.Module, or None where feed gives its features; width: their number."""
    embedder = models.random_linear(width, args.dim, args.seed, run.fold)  # the same for all losses of a fold
    network = (nn.Sequential(trunk, embedder) if trunk else embedder).to(args.device, memory_format=torch.channels_last)
    classes = np.unique(labels[run.parts["train"]])
    known = [part for part, rows in run.parts.items() if np.isin(labels[rows], classes).all()]
    codes = {part: np.searchsorted(classes if part in known else np.unique(labels[rows]), labels[rows])
             for part, rows in run.parts.items()}
    groups, criterion, miner = [{"params": list(network.parameters()), "lr": args.lr}], None, None
    if run.row["class"]:
        torch.manual_seed(seed_of(args.seed, run.fold))
        criterion, miner, _ = make_loss(run.row, len(classes), args.dim, args.scale)
        proxies = list(criterion.to(args.device).parameters())
        groups += [{"params": proxies, "lr": args.loss_lr}] if proxies else []
    for group in groups:
        group["initial_lr"] = group["lr"]
    optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay)
    return Job(network, criterion, miner, optimizer, feed, codes, known, team)


def sampled(n, fold, args):
    """Which of the n training pictures are scored: all, or --train-sample of them."""
    if not 0 < args.train_sample < n:
        return np.arange(n)
    return np.sort(np.random.default_rng([args.seed, fold]).permutation(n)[:args.train_sample])


def score(run, job, epoch, part, args):
    """(a row of history.csv, pairs.Score) of one part; the ranks that only help to embed get (None, None)."""
    start, rows, codes = time.perf_counter(), run.parts[part], job.codes[part]
    if part == "train":
        kept = sampled(len(rows), run.fold, args)
        rows, codes = rows[kept], codes[kept]
    x = embed(job.network, job.feed, rows, max(64, args.batch), job.team, args.precision)
    if not torch.isfinite(x).all():
        raise ValueError(diverged(run, job, epoch, "an embedding"))
    if job.team[0] > 0:
        return None, None
    loss = None
    if job.criterion and (part in job.known or "num_classes" not in run.row["parameters"]):  # no proxies for other classes
        batches = epoch_batches(codes, args.batch, args.per_class, np.random.default_rng([args.seed, run.fold]))
        loss = mean_loss(job.criterion, job.miner, x, torch.from_numpy(codes).to(x.device), batches)
    found = pairs.pair_scores(x.cpu().numpy(), codes, bins=(BINS,), recall=(1,), permutations=0,
                              threads=1 if len(x) < 1000 else None)
    return [epoch, part, loss, found.positive_mean, found.negative_mean, found.jsd[BINS], found.recall[1], found.map_at_r,
            time.perf_counter() - start], found


def train_epoch(run, job, network, epoch, args):
    """One epoch's steps; network: the job's, perhaps wrapped. Raises ValueError where the loss is no number any more."""
    (rank, ranks), rows, codes = job.team, run.parts["train"], job.codes["train"]
    torch.manual_seed(seed_of(args.seed, run.fold, epoch, rank))  # for what a network draws itself: dropout
    batches = list(epoch_batches(codes, args.batch, args.per_class, np.random.default_rng([args.seed, run.fold, epoch])))
    if min(map(len, batches)) < ranks:
        raise ValueError(f"batches of {min(map(len, batches))} pictures for {ranks} processes: start fewer, or raise --batch")
    shares = [np.array_split(np.arange(len(batch)), ranks)[rank] for batch in batches]
    fed = job.feed([rows[batch[mine]] for batch, mine in zip(batches, shares)], epoch)
    network.train()
    for number, (batch, mine, (_, pictures)) in enumerate(zip(batches, shares, fed)):
        done = (epoch - 1 + number / len(batches)) / args.epochs
        for group in job.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * ((1 + math.cos(math.pi * done)) / 2 if args.schedule == "cosine" else 1)
        job.optimizer.zero_grad()
        answers = torch.from_numpy(codes[batch]).to(args.device)
        loss = step(network, job.criterion, job.miner, pictures, answers, mine, args.precision)
        if not math.isfinite(loss):
            raise ValueError(diverged(run, job, epoch, f"step {number + 1} of {len(batches)}: the loss"))
        job.optimizer.step()


def diverged(run, job, epoch, what):
    rates = " and ".join(f"{group['lr']:g}" for group in job.optimizer.param_groups)
    kept = f"the state after epoch {epoch - 1} is kept in {run.folder / 'checkpoint.pth'}" if epoch > 1 else "nothing was saved"
    return (f"{run.name}, epoch {epoch}, {what} is no finite number, at learning rate {rates}; {kept}; "
            "train elsewhere (--models) with a smaller --lr or --loss-lr")


def train(run, job, args, bar):
    """Train one network; after each epoch what the same command needs to continue is saved, at the end the best epoch's."""
    first, history, best, before = resume(run, job)
    if first == 0:
        found = [score(run, job, 0, part, args) for part in run.parts]
        history, first, before = [row for row, _ in found], 1, found[-1][1] and found[-1][1].histograms[BINS]
    bar.update(first - 1)
    network = wrapped(job, args)
    for epoch in range(first, args.epochs + 1 if job.criterion else 0):
        start = time.perf_counter()
        train_epoch(run, job, network, epoch, args)
        spread(job.network, job.team)  # batch norm's running statistics were each rank's own
        took = time.perf_counter() - start
        rows = [score(run, job, epoch, part, args)[0] for part in ("train", "validation")]
        if job.team[0] == 0:
            rows[0][-1] += took  # the steps' seconds count with the training part's scores
            history += rows
            value = rows[1][HEADER.index(args.select)]
            if best is None or value > best["value"]:
                best = {"epoch": epoch, "value": value, "network": on_cpu(job.network), "criterion": on_cpu(job.criterion)}
            save(run.folder / "checkpoint.pth", {
                "about": json.dumps(run.about), "epoch": epoch, "history": history, "best": best,
                "before": [counts.tolist() for counts in before], "network": job.network.state_dict(),
                "criterion": job.criterion.state_dict(), "optimizer": job.optimizer.state_dict()})
        bar.update()
    after = None
    if job.criterion:
        take(best, job)
        row, after = score(run, job, best and best["epoch"], "test", args)
        history.append(row)
    if job.team[0] == 0:
        write_run(run, job.network, history, before, after)
    bar.update(0 if job.criterion else args.epochs)


def wrapped(job, args):
    """The network as the training steps call it: compiled, and of several processes with their gradients' mean."""
    if job.team[1] > 1 and args.device.type == "cuda":  # the whole batch's statistics, as in one process
        nn.SyncBatchNorm.convert_sync_batchnorm(job.network)
    network = torch.compile(job.network) if args.compile else job.network
    if job.team[1] > 1 and job.criterion:
        network = nn.parallel.DistributedDataParallel(network, static_graph=True)
    return network


def take(best, job):
    """Put the best epoch's state, which rank 0 has, into every rank's network and loss."""
    for module, name in ((job.network, "network"), (job.criterion, "criterion")):
        if job.team[0] == 0:
            module.load_state_dict(best[name])
        spread(module, job.team)


def spread(module, team):
    """Give every rank what rank 0's module holds."""
    for tensor in module.state_dict().values() if team[1] > 1 else ():
        dist.broadcast(tensor, 0)


def on_cpu(module):
    return {name: tensor.cpu().clone() for name, tensor in module.state_dict().items()}


# ---------------------------------------------------------------- files


def save(path, content):
    """torch.save that leaves the old file or the new one, never half of it."""
    file = io.BytesIO()
    torch.save(content, file)
    files.write_file(path, file.getvalue())


def read_checkpoint(run):
    """The state after the last epoch that ended, or None. ValueError names the options that it was made with otherwise."""
    path = run.folder / "checkpoint.pth"
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        old = json.loads(state["about"])
    except Exception as error:  # whatever damaged bytes provoke
        raise ValueError(f"{path}: damaged ({type(error).__name__}); remove it to begin anew") from None
    refuse_other(path, old, run.about)
    return state


def resume(run, job):
    """Put the saved state into the job: (the next epoch, history, best, histograms before), from 0 where nothing is saved.

    No generator is saved: an epoch's random numbers come from (seed, fold, epoch).
    """
    state = read_checkpoint(run)
    if state is None:
        return 0, [], None, None
    job.network.load_state_dict(state["network"])
    job.criterion.load_state_dict(state["criterion"])
    job.optimizer.load_state_dict(state["optimizer"])
    return state["epoch"] + 1, state["history"], state["best"], [np.array(counts) for counts in state["before"]]


def refuse_other(path, old, new):
    """Raise ValueError unless two config.json agree, versions aside."""
    if not old:
        raise ValueError(f"{path}: not there, so how the network beside it was made is unknown; remove {path.parent}")
    old, new = ({**config, "split": {**config.get("split", {}), "test": None}} for config in (old, json.loads(json.dumps(new))))
    different = rowfile.differences(old, new)
    if different:
        raise ValueError(f"{path} was made with other options ({'; '.join(different)}): give those again, "
                         f"remove {path.parent}, or train elsewhere (--models)")


def is_finished(run):
    """Is the network there, made with these options? embedder_best.pth is written last."""
    if not (run.folder / "embedder_best.pth").exists():
        return False
    refuse_other(run.folder / "config.json", models.read_config(run.folder / "config.json"), run.about)
    tidy(run)
    return True


def tidy(run):
    """Remove the state of a run that has ended, and what a kill left of it half-written."""
    for path in run.folder.glob("*checkpoint.pth*"):
        path.unlink(missing_ok=True)


def write_run(run, network, history, before, after):
    """The files of a finished run. embedder_best.pth comes last, so that nobody takes a part of them for a network."""
    state = {name: value.cpu() for name, value in network.state_dict().items()}
    trunk, common = run.folder / "trunk_best.pth", run.folder.parent.parent / "trunk.pth"
    if not run.about["frozen_trunk"]:
        save(trunk, {name[2:]: value for name, value in state.items() if name.startswith("0.")})
        state = {name[2:]: value for name, value in state.items() if name.startswith("1.")}
    else:  # one file, so that other scripts see the same bytes and share the trunk's work
        trunk.unlink(missing_ok=True)
        try:
            os.link(common, trunk)
        except OSError:
            files.write_file(trunk, common.read_bytes())
    counts = [(0, before)] + ([(history[-1][0], after.histograms[BINS])] if after else [])
    files.write_table(run.folder / "histograms.csv", ["epoch", "split", "bins", "low", "high", "positive", "negative"], [
        [epoch, "test", BINS, 2 * i / BINS - 1, 2 * (i + 1) / BINS - 1, int(p), int(q)]
        for epoch, both in counts for i, (p, q) in enumerate(zip(*both))])
    if after:
        row = dict(zip(HEADER, next(row for row in history if row[:2] == [0, "test"])))
        first = after._replace(histograms={BINS: before}, jsd={BINS: row["jsd"]},
                               positive_mean=row["positive_mean"], negative_mean=row["negative_mean"])
        files.write_file(run.folder / "histograms.png",
                        pairs.pairs_figure([("test, epoch 0", first), (f"test, epoch {history[-1][0]}", after)], BINS))
    files.write_table(run.folder / "history.csv", HEADER, history)
    files.write_file(run.folder / "config.json", (json.dumps(run.about, indent=2) + "\n").encode())
    save(run.folder / "embedder_best.pth", state)
    tidy(run)


def seed_of(*numbers):
    """One seed of torch's generator from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


# ---------------------------------------------------------------- the command


def read_labels(dataset, args):
    """(labels (n,) int, the name of what they are), from the data set or from a column of --labels or props.csv."""
    table = args.labels or (dataset.folder / "props.csv" if dataset.labels is None else None)
    if table is None:
        name = args.label or "class"
        labels = {"class": dataset.labels, "super_class": dataset.super_labels}.get(name)
        if labels is None:
            raise ValueError(f"{dataset.name} has no label {name!r}; it has class"
                             + " and super_class" * (dataset.super_labels is not None) + ", or give --labels FILE.csv")
        return labels, name
    if not args.labels and not table.is_file():
        raise ValueError(f"{dataset.name} has no labels; put each class's pictures into a folder of its own, or give a table "
                         "with a row for each picture: --labels FILE.csv --label COLUMN")
    name = args.label or ("class" if args.labels else "model")
    try:
        values = files.read_properties(table, [name])[name]
    except ValueError as error:
        raise ValueError(f"{error} (--label chooses the column)" if "no property" in str(error) else error) from None
    if len(values) != len(dataset.paths):
        raise ValueError(f"{table} has {len(values):,} labels, {dataset.name} {len(dataset.paths):,} pictures; "
                         "expected a row for each, in the same order")
    number = {value: i for i, value in enumerate(sorted(set(values), key=data.natural_key))}
    return np.array([number[value] for value in values]), name


def wanted(args):
    """(rows of losses.csv, folds) that were asked for."""
    rows = []
    for name in args.loss.split(","):
        rows += [row for row in models.losses() if row["class"]] if name.strip() == "all" else \
            models.wanted_losses(name, None, args.models)
    rows = [row for i, row in enumerate(rows) if row not in rows[:i]]
    return rows, models.wanted_folds(args.fold, rows[0], "", args.models)


def plan(dataset, labels, label, network, rows, args):
    """The runs, each with what its config.json will say."""
    own = data.open_dataset(args.dataset, args.data_root, "test").relative if args.dataset in data.PUBLISHED else None
    pictures = {"number": len(labels), "sha256": data.pictures_sha256(dataset.relative)}
    digest, runs = hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest(), []
    options = ("epochs", "batch", "per_class", "lr", "loss_lr", "weight_decay", "schedule", "select", "train_sample", "seed",
               "precision", "compile")
    for row, fold in product(rows, args.folds):
        parts = dict(zip(("train", "validation", "test"), split_rows(labels, args.split, fold, args.seed)))
        split = {"kind": args.split, "label": label, "seed": args.seed, "pictures": pictures, "labels_sha256": digest,
                 "train": len(parts["train"]), "validation": len(parts["validation"])}
        if [dataset.relative[i] for i in parts["test"]] != own:
            split["test"] = parts["test"].tolist()
        parameters = row["class"] and make_loss(row, len(np.unique(labels[parts["train"]])), args.dim, args.scale)[2]
        runs.append(Run(f"{row['name']} fold {fold}", row, fold,
                        args.models / "trained" / dataset.name / row["slug"] / f"fold{fold}", parts, {
            "dataset": dataset.name, "loss": row["name"], "type": row["type"], "fold": fold, "backbone": args.model,
            "dimension": args.dim, "distance": row["distance"], "preprocessing": network.preprocessing,
            "frozen_trunk": args.freeze_trunk, "weights_sha256": network.checkpoint_sha256,
            "loss_parameters": parameters or None, "split": split, "options": {name: getattr(args, name) for name in options},
            "versions": {"torch": torch.__version__, "numpy": np.__version__, "pillow": PIL.__version__,
                         "pytorch_metric_learning": metadata.version("pytorch-metric-learning") if parameters else None,
                         "device": str(args.device), "threads": torch.get_num_threads()}}))
    return runs


def print_scores(runs):
    """Table 1: the test part's scores of each run, at its best epoch and before training; of several folds the mean too."""
    names, lines = ("recall_at_1", "map_at_r", "jsd"), []
    for slug, folds in groupby(runs, key=lambda run: run.row["slug"]):
        found = []
        for run in folds:
            table = files.read_table(run.folder / "history.csv")
            tests = [i for i, split in enumerate(table["split"]) if split == "test"]
            found.append([float(table[name][i]) for i in (tests[-1], tests[0]) for name in names])
            lines.append([run.row["name"], str(run.fold), table["epoch"][tests[-1]], *(f"{value:.3f}" for value in found[-1])])
        if len(found) > 1:
            lines.append([run.row["name"], "mean", "", *(f"{value:.3f}" for value in np.mean(found, axis=0))])
    lines = [["", "", "", "test", "", "", "before", "", ""],
             ["loss", "fold", "epoch", *("Recall@1", "MAP@R", "JSD") * 2]] + lines
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join([line[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]).rstrip())


def device(name):
    """torch.device from --device; each rank of a machine takes its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device {name}: unknown; expected auto, cpu, cuda or cuda:N")
    if name != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: no GPU that torch can use; give --device cpu")
    if name == "cuda":
        name = f"cuda:{int(os.environ.get('LOCAL_RANK') or 0) % torch.cuda.device_count()}"
    if name != "cpu" and int(name[5:]) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch can use {torch.cuda.device_count()}, counted from cuda:0")
    return torch.device(name)


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = fail
    add = parser.add_argument
    add("--dataset", required=True, metavar="NAME|FOLDER|CSV", help="cars196, cub200, sop, a folder or a CSV with a path column")
    add("--data-root", metavar="DIR", help="folder of the published data sets (DML_DATA_ROOT, else data/)")
    add("--labels", type=Path, metavar="FILE.csv", help="a row for each picture, in their order (the data set's own classes)")
    add("--label", metavar="COLUMN", help="what makes two pictures alike: class, super_class, or a column of --labels or of "
        "a rendered set's props.csv (class; model)")
    add("--loss", default="Normalized Softmax", help="of models/losses.csv, several with commas; all: the 14; None: the "
        "untrained network (Normalized Softmax)")
    add("--fold", default="0", help="0, 1, 2, 3, several with commas, or all (0)")
    add("--split", choices=["default", "random", "pictures", "folds"], help="see above (default; by a label other "
        "than class and super_class, as for rendered sets: pictures)")
    add("--model", default="inception_v3", help="inception_v3, bninception, efficientnet_lite0 or package.module:factory "
        "(inception_v3)")
    add("--weights", metavar="FILE", help="ImageNet weights of the backbone (torch's hub cache)")
    add("--dim", type=int, default=64, metavar="M", help="dimension of the embedding (64)")
    add("--freeze-trunk", action="store_true", help="train the embedder alone, on features computed once")
    add("--epochs", type=int, default=20, metavar="N", help="(20)")
    add("--lr", type=float, metavar="X", help="learning rate of the network (1e-4; with --freeze-trunk 1e-3: at 1e-4 one "
        "linear layer does not come far in 20 epochs)")
    add("--loss-lr", type=float, default=1e-2, metavar="X", help="learning rate of the loss's own parameters (1e-2)")
    add("--scale", type=float, default=10.0, metavar="S", help="of Normalized Softmax, Eq. 3 (10; the library's default is 20)")
    add("--weight-decay", type=float, default=0.01, metavar="X", help="of AdamW, on all parameters, "
        "proxies and β too (0.01, torch's default; the paper states none)")
    add("--schedule", default="constant", choices=["constant", "cosine"], help="of both learning rates (constant; not stated)")
    add("--batch", type=int, default=32, metavar="N", help="pictures in a batch (32; not stated)")
    add("--per-class", type=int, default=4, metavar="N", help="of them of one class (4; not stated); with fewer than batch / "
        "per-class classes a batch is smaller")
    add("--select", default="map_at_r", choices=["map_at_r", "recall_at_1", "jsd"],
        help="the validation score whose best epoch is kept and tested (map_at_r; not stated)")
    add("--train-sample", type=int, default=0, metavar="N", help="score only so many training pictures after each epoch (all)")
    add("--seed", type=int, default=1, help="of splits, crops, batches and initial weights (1)")
    add("--models", type=Path, default=models.MODELS, metavar="DIR", help="writes to DIR/trained/<dataset>/… (models/)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    add("--precision", default="fp32", choices=["fp32", "tf32", "bf16"], help="of the network's arithmetic (fp32)")
    add("--compile", action="store_true", help="torch.compile the network for the training steps")
    add("--workers", type=int, metavar="N", help="threads that decode (CPUs of this rank, at most 16)")
    args = parser.parse_args(argv)
    args.lr = (1e-3 if args.freeze_trunk else 1e-4) if args.lr is None else args.lr
    for name, least in (("epochs", 1), ("batch", 1), ("dim", 1), ("per_class", 2), ("seed", 0), ("train_sample", 0),
                        ("workers", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            fail(f"--{name.replace('_', '-')} {value}: expected at least {least}")
    for name in ("lr", "loss_lr", "scale", "weight_decay"):
        if not (0 <= getattr(args, name) < math.inf) or not getattr(args, name) and name != "weight_decay":
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: expected a positive number")
    if args.batch < 2 * args.per_class:
        fail(f"--batch {args.batch} with --per-class {args.per_class}: a batch of {args.batch // args.per_class} classes; losses "
             "and miners compare pictures of two classes or more: expected --batch of at least twice --per-class")
    args.workers = args.workers or min(16, max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)))
    args.device = device(args.device)
    if args.precision == "tf32" and args.device.type == "cpu":
        fail("--precision tf32 is an NVIDIA GPU's; on a CPU give fp32 or bf16")
    return args


def freeze(runs, trunk, dataset, args, share):
    """The feed of the frozen trunk's features, for all runs: features.npy and trunk.pth are there after this."""
    home, about = runs[0].folder.parent.parent, runs[0].about
    content = {**{key: about[key] for key in ("dataset", "backbone", "preprocessing")},
               "checkpoint_sha256": about["weights_sha256"], "precision": args.precision, "pictures": about["split"]["pictures"],
               "bytes": sum(path.stat().st_size for path in dataset.paths)}  # rendered anew, pictures keep their names
    feed = feed_pictures(dataset.paths, about["preprocessing"], args.device, args.workers, args.seed)
    file = rowfile.RowFile(home / "features.npy", (len(dataset.paths), args.width), np.float32, content)
    if not (file.complete and (home / "trunk.pth").exists()):  # before the features, so that theirs is never another's
        save(home / "trunk.pth", trunk.state_dict())
    features = frozen_features(trunk.to(args.device), feed, file, share, args.precision)
    if args.device.type == "cpu":
        torch.set_num_threads(1)  # for matrices this small a second thread costs more than it saves
    return feed_features(features, args.device)


def main(argv=None):
    args = parse(argv)
    rows, args.folds = wanted(args)
    dataset = data.open_dataset(args.dataset, args.data_root, "all")
    labels, label = read_labels(dataset, args)
    args.split = args.split or ("default" if label in ("class", "super_class") else "pictures")
    for fold in args.folds:  # what is wrong is said before a network is loaded
        rest = labels[split_rows(labels, args.split, fold, args.seed)[0]]
        sizes = np.unique(rest[sampled(len(rest), fold, args)], return_counts=True)[1]
        if len(sizes) < 2 or sizes.max() < 2:
            raise ValueError(f"--train-sample {args.train_sample} of fold {fold}'s {len(rest):,} training pictures: "
                             f"{len(sizes)} classes, at most {sizes.max()} pictures of one; expected two and two, sample more")
    network = models.load(models.find(model=args.model, weights=args.weights)[0])
    args.width = features_of(network)
    runs = plan(dataset, labels, label, network, rows, args)
    for run in (todo := [run for run in runs if not is_finished(run)]):
        read_checkpoint(run)
    rank, ranks = rowfile.my_share()
    if todo:
        train_all(runs, todo, network.module, dataset, labels, args, rank, ranks)
    elif rank == 0:
        say(f"nothing to do: {len(runs)} of {len(runs)} networks are there")
    if rank == 0:
        print_scores([run for run in runs if is_finished(run)])


def features_of(network):
    """How many features a trunk gives for a picture."""
    black = torch.from_numpy(data.black_picture(network.preprocessing))[None]
    try:
        with torch.inference_mode():
            shape = tuple(network.module(black).shape)
    except (RuntimeError, TypeError, AttributeError) as error:  # a factory's network, made for other inputs
        raise ValueError(f"{network.name} fails on a picture {tuple(black.shape[1:])}: {error}") from None
    if len(shape) != 2 or shape[0] != 1:
        raise ValueError(f"{network.name} gives {shape} for one picture; expected (1, features)")
    return shape[1]


def train_all(runs, todo, trunk, dataset, labels, args, rank, ranks):
    """Train what is to do. Processes of torchrun work on one run after the other together; frozen runs are shared out."""
    together = "RANK" in os.environ and ranks > 1  # started by torchrun
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    if together:
        if args.device.type == "cuda":
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo", timeout=timedelta(days=7))
    if args.freeze_trunk:
        feed, trunk = freeze(todo, trunk, dataset, args, (rank, ranks)), None
    else:
        feed = feed_pictures(dataset.paths, todo[0].about["preprocessing"], args.device, args.workers, args.seed)
        weights = {name: value.clone() for name, value in trunk.state_dict().items()}
    mine, team = todo, (rank, ranks)
    if not (trunk and together):  # shares of all runs, so that processes agree whenever they start
        names = {run.name for run in todo}
        mine, team = [run for run in runs[rank::ranks] if run.name in names], (0, 1)
    start = time.perf_counter()
    with tqdm(total=len(mine) * args.epochs, unit=" epochs", delay=2, disable=None if rank == 0 else True) as bar:
        for run in mine:
            bar.set_description(run.name)
            run.folder.mkdir(parents=True, exist_ok=True)
            if trunk:
                trunk.load_state_dict(weights)
            train(run, begin(run, trunk, args.width, feed, labels, args, team), args, bar)
    if trunk and rank == 0:
        took = time.perf_counter() - start
        say(f"waited for pictures {feed.waited:.1f} of {took:.1f} s ({feed.waited / took:.1%})")
    if together:
        dist.barrier()
        dist.destroy_process_group()


def say(text):
    print("train.py:", text, file=sys.stderr)


def fail(message):
    say(" ".join(str(message).split()))
    sys.exit(2)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        fail(error)
    except torch.cuda.OutOfMemoryError:
        fail("out of GPU memory; give a smaller --batch, or --precision bf16")
    except KeyboardInterrupt:
        say("stopped; the same command continues")
        sys.exit(130)
