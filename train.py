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
Every random number comes from (--seed, fold, epoch), a picture's crop from (--seed, epoch, picture): workers, processes
and restarts change nothing. On a GPU, sums in another order do.

--split  default   the classes in order, 4:1:5 into training, validation and test (Oi et al.); a fold is a repetition
         random    the same, the classes shuffled by --seed
         pictures  all classes in every part: fold k holds out the k-th quarter of the pictures, a tenth of the rest is
                   the validation part (the default for rendered sets, whose six models no split by class survives)
         folds     the second half of the classes is the test part, of four runs of the first half fold k validates on
                   run k and trains on the others (Kobs et al.: the published checkpoints' Test50_50_Partitions4_k)

--freeze-trunk trains the linear layer alone, on features computed once for all losses and folds, without crops.
"""
import argparse
import hashlib
import inspect
import io
import json
import math
import os
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from tqdm import tqdm

import data
import models
import pairs
import rowfile

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
    classes, number = np.unique(labels, return_inverse=True)
    c, n = len(classes), len(labels)
    if c < 2 or c == n:
        raise ValueError(f"the {n:,} labels are {'all distinct: no two pictures belong together' if c > 1 else 'one class'}; "
                         "choose a label with several values of several pictures each")
    if kind == "pictures":  # class by class in shuffled order, dealt to the quarters in turn; then every tenth of the rest
        order = np.lexsort((np.random.default_rng(seed).permutation(n), number))
        held_out = np.arange(n) % FOLDS == fold
        rest = order[~held_out]
        tenth = np.arange(len(rest)) % 10 == 9
        parts = rest[~tenth], rest[tenth], order[held_out]
    else:
        turn = np.random.default_rng(seed).permutation(c) if kind == "random" else np.arange(c)
        if kind == "folds":
            runs = np.array_split(turn[:c // 2], FOLDS)
            of_classes = np.concatenate(runs[:fold] + runs[fold + 1:]), runs[fold], turn[c // 2:]
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
    """feed(batches, epoch): for each int array of rows, float32 (B, 3, H, W) on the device.

    With an epoch, training crops; with None, the preprocessing's own geometry. Pictures are decoded in threads ahead of
    their use; what this waits for them is added to feed.waited, in seconds.
    """
    size = data.input_size(preprocessing)

    def load(row, epoch):
        if epoch is None:
            return data.load_pixels(paths[row], preprocessing)
        return augment(data.read_rgb(paths[row]), size, np.random.default_rng([seed, epoch, row]))

    def feed(batches, epoch=None):
        with ThreadPoolExecutor(workers) as pool:
            queue = deque()
            try:
                for rows in batches:
                    queue.append([pool.submit(load, int(row), epoch) for row in rows])
                    if sum(map(len, queue)) > 2 * (workers + len(rows)):
                        yield ready(queue.popleft())
                while queue:
                    yield ready(queue.popleft())
            finally:
                pool.shutdown(cancel_futures=True)

    def ready(futures):
        start = time.perf_counter()
        pixels = torch.from_numpy(np.stack([future.result() for future in futures]))
        feed.waited += time.perf_counter() - start
        return to_input(pixels.to(device), preprocessing)

    feed.waited = 0.0
    return feed


def feed_features(features, device):
    """The same from features (n, f), computed once."""
    features = torch.from_numpy(features).to(device)

    def feed(batches, epoch=None):
        for rows in batches:
            yield features[torch.from_numpy(rows).to(device)]

    feed.waited = 0.0
    return feed


def trunk_features(trunk, paths, folder, content, preprocessing, args, rank, ranks):
    """The frozen trunk's output for every picture, (n, f) float32, filled into folder/features.npy by all processes."""
    trunk = trunk.to(args.device).eval()
    feed = feed_pictures(paths, preprocessing, args.device, args.workers, args.seed)
    with torch.inference_mode():
        width = trunk(torch.from_numpy(data.black_picture(preprocessing))[None].to(args.device)).shape[1]
    file = rowfile.RowFile(folder / "features.npy", (len(paths), width), np.float32, content)
    with tqdm(total=len(paths), desc="features", unit=" pictures", delay=2, disable=rank > 0 or not sys.stderr.isatty()) as bar:
        try:
            while not file.complete:  # round after round: what a process left that died is done by the others
                claimed = (rows for a, b in rowfile.shares(len(paths), rank, ranks) if len(rows := file.claim(a, b)))
                claimed = list(claimed) if ranks == 1 else claimed
                numbers = deque()
                for pictures in feed(numbers.append(rows) or rows for rows in claimed):
                    with torch.inference_mode(), autocast(args):
                        file.write(numbers[0], trunk(pictures).float().cpu().numpy())
                    bar.update(len(numbers.popleft()))
                if not file.finish():
                    time.sleep(0.5)
        finally:
            if not file.complete:
                file.give_up(alone=ranks == 1)
    return np.array(data.read_array(file.path))


# ---------------------------------------------------------------- one step, one score


def autocast(args):
    return torch.autocast(args.device.type, dtype=torch.bfloat16, enabled=args.precision == "bf16")


def gather(values, mine, number):
    """Every rank's rows (len(mine), m) put together: (number, m)."""
    if not dist.is_initialized() or len(mine) == number:
        return values
    whole = values.new_zeros(number, values.shape[1])
    whole[mine] = values
    dist.all_reduce(whole)
    return whole


def step(network, criterion, miner, pictures, labels, mine, args):
    """Gradients of one batch; the loss as a float. pictures: the rank's share `mine` of the batch that labels (B,) list.

    A loss of pairs needs the whole batch, so every rank computes it from all embeddings and sends back its own share of
    the gradient: the same as one process with that batch.
    """
    with autocast(args):
        embeddings = network(pictures)
    whole = gather(embeddings.detach().float(), mine, len(labels)).requires_grad_()
    loss = criterion(whole, labels, miner(whole, labels) if miner else None)
    loss.backward()
    ranks = dist.get_world_size() if len(mine) < len(labels) else 1  # DistributedDataParallel averages over them
    embeddings.backward((whole.grad[mine] * ranks).to(embeddings.dtype))
    return loss.item()


@torch.no_grad()
def embed(network, feed, rows, args, team):
    """Embeddings of rows in eval mode: float32 (len(rows), m) on the CPU, each rank of the team doing its share."""
    network.eval()
    mine = np.array_split(np.arange(len(rows)), team[1])[team[0]]
    size, parts = max(args.batch, 64), []
    for pictures in feed(rows[part] for part in np.array_split(mine, max(1, math.ceil(len(mine) / size)))):
        with autocast(args):
            parts.append(network(pictures).float())
    return gather(torch.cat(parts), mine, len(rows)).cpu()


@torch.no_grad()
def mean_loss(criterion, miner, embeddings, labels, args, seed):
    """The loss over one epoch's batches, always the same, of embeddings (n, m) as they are: comparable between epochs."""
    found, device = [], args.device
    for batch in epoch_batches(labels, args.batch, args.per_class, np.random.default_rng(seed)):
        x, y = embeddings[batch].to(device), torch.from_numpy(labels[batch]).to(device)
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


def save(path, content):
    """torch.save that leaves the old file or the new one."""
    file = io.BytesIO()
    torch.save(content, file)
    data.write_file(path, file.getvalue())


def read_checkpoint(run):
    """The state after the last epoch that ended, or None; ValueError names the options it was made with otherwise."""
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


def refuse_other(path, old, new):
    """Raise ValueError unless two config.json agree, versions aside."""
    old, new = ({**config, "split": {**config.get("split", {}), "test": None}} for config in (old, json.loads(json.dumps(new))))
    different = rowfile.differences(old, new)
    if different:
        raise ValueError(f"{path} was made with other options ({'; '.join(different)}): give them again, "
                         f"remove {path.parent}, or train elsewhere (--models)")


def is_finished(run):
    """embedder_best.pth is written last."""
    if not (run.folder / "embedder_best.pth").exists():
        return False
    refuse_other(run.folder / "config.json", models.read_config(run.folder / "config.json"), run.about)
    return True


def train(run, trunk, features, feed, labels, args, team, bar):
    """Train one network, after each epoch saving what the same command needs to continue; then write the best epoch's.

    trunk: nn.Module, or None when feed gives its features; labels (n,) of the whole data set; team: (rank, ranks) that
    work on this network together.
    """
    embedder = models.random_linear(features, args.dim, args.seed, run.fold)  # the same for all losses of a fold
    network = (nn.Sequential(trunk, embedder) if trunk else embedder).to(args.device)
    classes = np.unique(labels[run.parts["train"]])
    codes = {part: np.searchsorted(classes, labels[rows]) if np.isin(labels[rows], classes).all()
             else np.unique(labels[rows], return_inverse=True)[1] for part, rows in run.parts.items()}
    criterion = miner = None
    if run.row["class"]:
        torch.manual_seed(random_seed(args.seed, run.fold))
        criterion, miner, _ = make_loss(run.row, len(classes), args.dim, args.scale)
        criterion.to(args.device)
    groups = [{"params": list(network.parameters()), "lr": args.lr, "initial_lr": args.lr}]
    if criterion and list(criterion.parameters()):
        groups.append({"params": list(criterion.parameters()), "lr": args.loss_lr, "initial_lr": args.loss_lr})
    optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay)

    def scored(epoch, part):
        """(row of history.csv but for the seconds, pairs.Score) of one part; (None, None) on the ranks that only help."""
        rows = run.parts[part]
        if part == "train" and args.train_sample and args.train_sample < len(rows):
            kept = np.sort(np.random.default_rng([args.seed, run.fold]).permutation(len(rows))[:args.train_sample])
        else:
            kept = np.arange(len(rows))
        x = embed(network, feed, rows[kept], args, team)
        if not torch.isfinite(x).all():
            raise ValueError(diverged(run, epoch, "an embedding", optimizer))
        if team[0] > 0:
            return None, None
        y = codes[part][kept]
        per_class = criterion and "num_classes" in run.row["parameters"]
        loss = None if criterion is None or per_class and not np.isin(labels[rows], classes).all() else \
            mean_loss(criterion, miner, x, y, args, [args.seed, run.fold])
        score = pairs.pair_scores(x.numpy(), y, bins=(BINS,), recall=(1,), permutations=0, threads=1 if len(x) < 1000 else None)
        return [epoch, part, loss, score.positive_mean, score.negative_mean, score.jsd[BINS], score.recall[1],
                score.map_at_r], score

    state = read_checkpoint(run)
    if state:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        if criterion:
            criterion.load_state_dict(state["criterion"])
        first, history, best = state["epoch"] + 1, state["history"], state["best"]
        before = [np.array(counts) for counts in state["before"]]
    else:
        start, first, best = time.perf_counter(), 1, None
        found = [scored(0, part) for part in run.parts]
        history = [[*row, time.perf_counter() - start] for row, _ in found if row]
        before = found[-1][1] and found[-1][1].histograms[BINS]
    bar.update(first - 1)
    parallel = torch.compile(network) if args.compile else network
    if team[1] > 1:
        parallel = nn.parallel.DistributedDataParallel(parallel, static_graph=True,
                                                       device_ids=[args.device] if args.device.type == "cuda" else None)
    for epoch in range(first, args.epochs * bool(criterion) + 1):
        start = time.perf_counter()
        train_epoch(run, parallel, criterion, miner, optimizer, feed, codes["train"], epoch, args, team)
        found = [scored(epoch, part)[0] for part in ("train", "validation")]
        if team[0] == 0:
            history += [[*row, time.perf_counter() - start] for row in found]
            score = found[1][HEADER.index(args.select)]
            if best is None or score > best["score"]:
                best = {"epoch": epoch, "score": score,
                        "network": {name: value.cpu().clone() for name, value in network.state_dict().items()}}
            save(run.folder / "checkpoint.pth", {
                "about": json.dumps(run.about), "epoch": epoch, "history": history, "best": best,
                "before": [counts.tolist() for counts in before], "network": network.state_dict(),
                "criterion": criterion.state_dict(), "optimizer": optimizer.state_dict()})
        bar.update()
    if team[1] > 1:
        kept = [best and {**best, "network": None}]
        dist.broadcast_object_list(kept, 0)
        best = {**kept[0], "network": best["network"]} if team[0] == 0 else kept[0]
        if team[0] == 0:
            network.load_state_dict(best["network"])
        for tensor in network.state_dict().values():
            dist.broadcast(tensor, 0)
    elif best:
        network.load_state_dict(best["network"])
    after = None
    if best:
        start = time.perf_counter()
        row, after = scored(best["epoch"], "test")
        history += [[*row, time.perf_counter() - start]] if row else []
    if team[0] == 0:
        write_run(run, network, trunk, history, before, after, args)
    bar.update(args.epochs * (criterion is None))


def train_epoch(run, network, criterion, miner, optimizer, feed, codes, epoch, args, team):
    """The steps of one epoch. Raises ValueError where the loss is no number any more."""
    rank, ranks = team
    torch.manual_seed(random_seed(args.seed, run.fold, epoch, rank))  # for what the network draws: dropout
    batches = list(epoch_batches(codes, args.batch, args.per_class, np.random.default_rng([args.seed, run.fold, epoch])))
    if len(batches[0]) < ranks:
        raise ValueError(f"batches of {len(batches[0])} pictures for {ranks} processes; start fewer, or raise --batch")
    shares = [np.array_split(np.arange(len(batch)), ranks)[rank] for batch in batches]
    rows, network = run.parts["train"], network.train()
    for number, (batch, mine, pictures) in enumerate(
            zip(batches, shares, feed((rows[batch[mine]] for batch, mine in zip(batches, shares)), epoch))):
        done = ((epoch - 1) * len(batches) + number) / (args.epochs * len(batches))
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * ((1 + math.cos(math.pi * done)) / 2 if args.schedule == "cosine" else 1)
        optimizer.zero_grad()
        loss = step(network, criterion, miner, pictures, torch.from_numpy(codes[batch]).to(args.device), mine, args)
        if not math.isfinite(loss):
            raise ValueError(diverged(run, epoch, f"the loss of step {number + 1} of {len(batches)}", optimizer))
        optimizer.step()


def diverged(run, epoch, what, optimizer):
    rates = " and ".join(f"{group['lr']:g}" for group in optimizer.param_groups)
    kept = f"the state after epoch {epoch - 1} is kept in {run.folder / 'checkpoint.pth'}" if epoch > 1 else "nothing was saved"
    return (f"{run.name}: {what} is no finite number any more in epoch {epoch}, at learning rate {rates}; {kept}; "
            "train elsewhere (--models) with a smaller --lr or --loss-lr")


def random_seed(*numbers):
    """One 32-bit seed of torch's generator from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def write_run(run, network, trunk, history, before, after, args):
    """The files of a finished run; embedder_best.pth comes last, so that nobody takes half of them for a network."""
    state = {name: value.cpu() for name, value in network.state_dict().items()}
    if trunk:
        save(run.folder / "trunk_best.pth", {name[2:]: value for name, value in state.items() if name.startswith("0.")})
        state = {name[2:]: value for name, value in state.items() if name.startswith("1.")}
    else:  # one file for all networks on this trunk: its bytes, and passes through it, are shared
        link = run.folder / "trunk_best.pth"
        link.unlink(missing_ok=True)
        try:
            os.link(run.folder.parent.parent / "trunk.pth", link)
        except OSError:
            data.write_file(link, (run.folder.parent.parent / "trunk.pth").read_bytes())
    counts = [(0, before)] + ([(history[-1][0], after.histograms[BINS])] if after else [])
    data.write_table(run.folder / "histograms.csv", ["epoch", "split", "bins", "low", "high", "positive", "negative"], [
        [epoch, "test", BINS, 2 * i / BINS - 1, 2 * (i + 1) / BINS - 1, int(p), int(q)]
        for epoch, both in counts for i, (p, q) in enumerate(zip(*both))])
    if after:
        row = next(row for row in history if row[:2] == [0, "test"])
        old = after._replace(histograms={BINS: before}, jsd={BINS: row[5]}, positive_mean=row[3], negative_mean=row[4])
        data.write_file(run.folder / "histograms.png",
                        pairs.pairs_figure([("test, epoch 0", old), (f"test, epoch {history[-1][0]}", after)], BINS))
    data.write_table(run.folder / "history.csv", HEADER, history)
    data.write_file(run.folder / "config.json", (json.dumps(run.about, indent=2) + "\n").encode())
    save(run.folder / "embedder_best.pth", state)
    (run.folder / "checkpoint.pth").unlink(missing_ok=True)


# ---------------------------------------------------------------- the command


def read_labels(dataset, args):
    """(labels (n,) int, the name of what they are), from the data set or from a column of --labels or props.csv."""
    table = args.labels or (dataset.folder / "props.csv" if dataset.labels is None else None)
    if table is None or args.label in ("class", "super_class") and not args.labels:
        name = args.label or "class"
        labels = {"class": dataset.labels, "super_class": dataset.super_labels}.get(name)
        if labels is None:
            raise ValueError(f"{dataset.name} has no label {name!r}; it has class"
                             + " and super_class" * (dataset.super_labels is not None) + ", or give a table with --labels FILE.csv")
        return labels, name
    if not args.labels and not table.is_file():
        raise ValueError(f"{dataset.name} has no labels; put each class's pictures into a folder of its own, or give a table "
                         "with a row for each picture: --labels FILE.csv --label COLUMN")
    name = args.label or ("class" if args.labels else "model")
    try:
        values = data.read_properties(table, [name])[name]
    except ValueError as error:
        raise ValueError(f"{error} (--label chooses the column)" if "no property" in str(error) else error) from None
    if len(values) != len(dataset.paths):
        raise ValueError(f"{table} has {len(values):,} labels, {dataset.name} {len(dataset.paths):,} pictures; "
                         "expected a row for each, in the same order")
    names = sorted(set(values), key=data.natural_key)
    return np.array([names.index(value) for value in values]) if len(names) < 1000 else \
        np.unique(values, return_inverse=True)[1], name


def wanted(args):
    """(rows of losses.csv, folds) that were asked for."""
    rows = []
    for name in args.loss.split(","):
        rows += [row for row in models.losses() if row["class"]] if name.strip() == "all" else \
            models.wanted_losses(name, None, args.models)
    rows = [row for i, row in enumerate(rows) if row not in rows[:i]]
    return rows, models.wanted_folds(args.fold, rows[0], "", args.models)


def plan(dataset, labels, label, own_test, network, features, rows, folds, args):
    """The runs, with what config.json will say of each."""
    runs = []
    for fold in folds:
        parts = dict(zip(("train", "validation", "test"), split_rows(labels, args.split, fold, args.seed)))
        classes = len(np.unique(labels[parts["train"]]))
        for row in rows:
            split = {"kind": args.split, "label": label, "seed": args.seed,
                     "pictures": {"number": len(labels), "sha256": data.pictures_sha256(dataset.relative)},
                     "labels_sha256": hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest(),
                     "train": len(parts["train"]), "validation": len(parts["validation"])}
            if parts["test"].tolist() != own_test:
                split["test"] = parts["test"].tolist()
            about = {
                "dataset": dataset.name, "loss": row["name"], "type": row["type"], "fold": fold, "backbone": args.model,
                "dimension": args.dim, "distance": row["distance"], "preprocessing": network.preprocessing,
                "frozen_trunk": args.freeze_trunk, "weights_sha256": network.checkpoint_sha256,
                "loss_parameters": make_loss(row, classes, args.dim, args.scale)[2] if row["class"] else None,
                "split": split, "options": {name: getattr(args, name) for name in (
                    "epochs", "batch", "per_class", "lr", "loss_lr", "weight_decay", "schedule", "select", "train_sample",
                    "seed", "precision", "compile")},
                "versions": {"torch": torch.__version__, "numpy": np.__version__, "pillow": PIL.__version__,
                             "pytorch_metric_learning": version_of_losses(), "device": str(args.device)}}
            folder = args.models / "trained" / dataset.name / row["slug"] / f"fold{fold}"
            runs.append(Run(f"{row['name']} fold {fold}", row, fold, folder, parts, about))
    return runs


def version_of_losses():
    import pytorch_metric_learning
    return pytorch_metric_learning.__version__


def print_scores(runs):
    """Table 1: the test part's scores of each run, at its best epoch and before training."""
    lines = [["", "", "", "test", "", "", "before", "", ""],
             ["loss", "fold", "epoch", "Recall@1", "MAP@R", "JSD", "Recall@1", "MAP@R", "JSD"]]
    for run in runs:
        table = data.read_table(run.folder / "history.csv")
        tests = [i for i, split in enumerate(table["split"]) if split == "test"]
        cells = lambda i: [f"{float(table[name][i]):.3f}" for name in ("recall_at_1", "map_at_r", "jsd")]
        lines.append([run.row["name"], str(run.fold), table["epoch"][tests[-1]], *cells(tests[-1]), *cells(tests[0])])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join([line[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]).rstrip())


def device(name):
    """torch.device from --device; each rank of a machine takes its own GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU that torch can use; give --device cpu")
    if name == "cuda":
        name = f"cuda:{int(os.environ.get('LOCAL_RANK') or 0) % torch.cuda.device_count()}"
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: unknown; expected auto, cpu, cuda or cuda:N") from None


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
    add("--split", choices=["default", "random", "pictures", "folds"], help="see above (default; of rendered sets: pictures)")
    add("--model", default="inception_v3", help="inception_v3, bninception, efficientnet_lite0 or package.module:factory (inception_v3)")
    add("--weights", metavar="FILE", help="ImageNet weights of the backbone (torch's hub cache)")
    add("--dim", type=int, default=64, metavar="M", help="dimension of the embedding (64)")
    add("--freeze-trunk", action="store_true", help="train the embedder alone, on features computed once")
    add("--epochs", type=int, metavar="N", help="(20)")
    add("--lr", type=float, metavar="X", help="learning rate of the network (1e-4)")
    add("--loss-lr", type=float, default=1e-2, metavar="X", help="learning rate of the loss's own parameters (1e-2)")
    add("--scale", type=float, default=10.0, metavar="S", help="of Normalized Softmax, Eq. 3 (10; the library's default is 20)")
    add("--weight-decay", type=float, default=0.01, metavar="X", help="of AdamW (0.01, torch's default; the paper states none)")
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
    args.epochs = args.epochs if args.epochs is not None else 20
    args.lr = args.lr if args.lr is not None else 1e-4
    for name, least in (("epochs", 1), ("batch", 1), ("dim", 1), ("seed", 0), ("train_sample", 0), ("workers", 1), ("per_class", 2)):
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


def main(argv=None):
    args = parse(argv)
    rows, folds = wanted(args)
    rank, ranks = rowfile.my_share()
    dataset = data.open_dataset(args.dataset, args.data_root, "all")
    labels, label = read_labels(dataset, args)
    args.split = args.split or ("default" if dataset.labels is not None and not args.labels else "pictures")
    for fold in folds:
        split_rows(labels, args.split, fold, args.seed)  # said before a network is loaded
    own = data.open_dataset(args.dataset, args.data_root, "test")
    position = {name: i for i, name in enumerate(dataset.relative)}
    own_test = [position[name] for name in own.relative]
    network = models.load(models.find(model=args.model, weights=args.weights)[0])
    with torch.inference_mode():
        black = torch.from_numpy(data.black_picture(network.preprocessing))[None]
        width = network.module.eval()(black).shape[1]
    runs = plan(dataset, labels, label, own_test, network, width, rows, folds, args)
    todo = [run for run in runs if not is_finished(run)]
    for run in todo:
        read_checkpoint(run)
    if not todo:
        say(f"nothing to do: {len(runs)} of {len(runs)} networks are there") if rank == 0 else None
        return print_scores(runs) if rank == 0 else None
    if "RANK" in os.environ and ranks > 1:
        cuda = args.device.type == "cuda"
        if cuda:
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if cuda and not args.freeze_trunk else "gloo", timeout=timedelta(days=7))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision == "tf32"
    for run in todo:
        run.folder.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    if args.freeze_trunk:
        home = todo[0].folder.parent.parent
        content = {"dataset": dataset.name, "backbone": args.model, "checkpoint_sha256": network.checkpoint_sha256,
                   "preprocessing": network.preprocessing, "precision": args.precision,
                   "pictures": {"number": len(labels), "sha256": data.pictures_sha256(dataset.relative)}}
        features = trunk_features(network.module, dataset.paths, home, content, network.preprocessing, args, rank, ranks)
        if not (home / "trunk.pth").exists():
            save(home / "trunk.pth", network.module.cpu().state_dict())
        feed, mine, team, trunk = feed_features(features, args.device), todo[rank::ranks], (0, 1), None
        if args.device.type == "cpu":
            torch.set_num_threads(1)  # for matrices this small more threads cost more than they save
    else:
        feed = feed_pictures(dataset.paths, network.preprocessing, args.device, args.workers, args.seed)
        mine, team, trunk = todo, (rank, ranks), network.module
    start = {name: value.clone() for name, value in trunk.state_dict().items()} if trunk else None
    with tqdm(total=len(mine) * args.epochs, unit=" epochs", delay=2, disable=rank > 0 or not sys.stderr.isatty()) as bar:
        for run in mine:
            bar.set_description(run.name)
            if trunk:
                trunk.load_state_dict(start)
            train(run, trunk, width, feed, labels, args, team, bar)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        print_scores([run for run in runs if is_finished(run)])
        if trunk:
            took = time.perf_counter() - begin
            say(f"waited for pictures {feed.waited:.1f} of {took:.1f} s ({feed.waited / took:.1%})")


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
    except KeyboardInterrupt:
        say("stopped; the same command continues")
        sys.exit(130)
