"""Train an embedding network with a deep-metric-learning loss, or one with each of 14 under equal conditions.

Input:  a data set with classes (cars196, cub200, sop, a folder, a CSV) or rendered cars, and a backbone.
Output: models/trained/<dataset>[@<split>]/<slug>/fold<k>[.seed<s>]/ (a split or a seed other than the
        default is in the name): trunk_best.pth, embedder_best.pth, config.json for the other scripts;
        history.csv, a row for each epoch and part, epoch 0 before training; histograms.csv, the pairs of the
        test part before and after. Its scores on stdout.

    python train.py --dataset cars196                    # Oi et al. 2022: all their settings are the defaults
    python train.py --dataset cars196 --split random --seed 2            # beside it: cars196@random, .seed2
    python train.py --dataset cars196 --recipe musgrave --loss all --fold all      # as the published networks
    python train.py --dataset cars_train --test cars_test --loss all      # learns from one, tested on another
    python train.py --dataset examples/cars --model efficientnet_lite0 --dim 128 --freeze-trunk --loss all
    torchrun --nproc-per-node 4 train.py --dataset cars196 --precision bf16

Stopped anywhere, the same command continues after the last epoch that ended, to the same numbers. A loss that
diverges does not stop the others: it is named, marked in the table and in config.json, leaves no network, and
the exit status is 3. Where the paper states nothing docs/train.md says what is ours.

--split  default   the classes in order, 4:1:5 into training, validation and test; a fold is a repetition
         random    the same, the classes shuffled by --seed
         pictures  all classes in every part: fold k tests the k-th quarter of the pictures, a tenth of the
                   rest validates (the default for rendered sets, whose six models no split by class survives)
         folds     the second half of the classes is tested; of the first half's four runs fold k validates on
                   the one before run k and trains on the others (the published Test50_50_Partitions4_k)
With --test the classes (or pictures) are split into training and validation alone, 5:1 (9:1).
"""
if __name__ == "__main__":  # before torch is imported: Ctrl-C ends in one line from here on
    import sys
    try:
        from dml_common import command
    except ImportError:
        print("train.py: the command needs the folder dml_common/ beside it; copy that too", file=sys.stderr)
        sys.exit(2)
    command.begin()

import hashlib
import importlib.util
import math
import os
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import groupby, product, repeat
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

FOLDS, BINS, SEED = 4, 200, 1
LR = {False: 1e-4, True: 1e-3}  # of the network, without and with --freeze-trunk
RECIPES = {  # Oi et al. 2022; Musgrave et al., A Metric Learning Reality Check (ECCV 2020): docs/train.md
    "oi": {"model": "inception_v3", "dim": 64, "split": None, "per_class": 4, "crop": 1 / 8, "steps": 0,
           "epochs": 20, "patience": 0, "optimizer": "AdamW", "lr": None, "weight_decay": 0.01,
           "freeze_norm": False},
    "musgrave": {"model": "bninception", "dim": 128, "split": "folds", "per_class": None, "crop": 0.16,
                 "steps": 100, "epochs": 1000, "patience": 9, "optimizer": "RMSprop", "lr": 1e-6,
                 "weight_decay": 1e-4, "freeze_norm": True}}
SCORES = ("recall_at_1", "map_at_r", "jsd")
HEADER = ("epoch", "split", "loss", "positive_mean", "negative_mean", "jsd", "jsd_null", "recall_at_1",
          "map_at_r", "seconds")
LATER = {"recipe": "oi", **{name: RECIPES["oi"][name] for name in (  # networks of older versions have these
    "optimizer", "crop", "steps", "patience", "freeze_norm")}}
OPTIONS = ("epochs", "batch", "per_class", "lr", "loss_lr", "weight_decay", "schedule", "select",
           "train_sample", "seed", "precision", "compile", *LATER)

# ---------------------------------------------------------------- which pictures, in which batches


def split_rows(labels, kind, fold=0, seed=1, test=True):
    """The rows of the training, the validation and the test part, ascending: three int arrays.

    labels (n,): classes, in the data set's order when sorted. kind: default, random, folds or pictures.
    test: is a part held out for it? If not, a sixth of the classes or a tenth of the pictures validates.
    Raises ValueError when a part has no positive or no negative pair.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not len(labels) or fold not in range(FOLDS):
        raise ValueError(f"labels {labels.shape}, fold {fold}: expected (n,), and 0 to {FOLDS - 1}")
    classes, number = np.unique(labels, return_inverse=True)
    c, n = len(classes), len(labels)
    if c in (1, n):
        raise ValueError(f"the {n:,} labels are {'one class' if c == 1 else 'all distinct'}; choose a label "
                         "with several values of several pictures each")
    if kind == "folds" and not test:
        raise ValueError("--split folds tests half of the classes; for another data set's test take --split "
                         "default, random or pictures")
    if kind == "pictures":  # class by class, shuffled, dealt to the quarters; of the rest a tenth, in pairs
        order = np.lexsort((np.random.default_rng(seed).permutation(n), number))
        held_out = (np.arange(n) % FOLDS == fold) & test
        rest = order[~held_out]
        tenth = np.arange(len(rest)) % 20 >= 18
        parts = rest[~tenth], rest[tenth], order[held_out]
    else:
        turn = np.random.default_rng(seed).permutation(c) if kind == "random" else np.arange(c)
        if kind == "folds":  # the first half as a ring from its k-th quarter on; an eighth of all ends it
            half = c // 2
            ring, train = np.roll(turn[:half], -(fold * half // FOLDS)), half - c // 8
            of_classes = ring[:train], ring[train:], turn[half:]
        else:
            train, tested = (round(0.4 * c), round(0.5 * c)) if test else (round(5 / 6 * c), 0)
            of_classes = turn[:train], turn[train:c - tested], turn[c - tested:]
        parts = [np.flatnonzero(np.isin(number, chosen)) for chosen in of_classes]
    for name, rows in zip(("training", "validation", "test")[:2 + test], parts):
        what = f"split {kind} of {n:,} pictures in {c:,} classes: the {name} part"
        refuse_without_pairs(labels[rows], what)
    return tuple(map(np.sort, parts))


def refuse_without_pairs(labels, name):
    sizes = np.unique(labels, return_counts=True)[1]
    if len(sizes) < 2 or sizes.max() < 2:
        raise ValueError(f"{name} has {len(labels)} pictures of {len(sizes)} classes; expected two classes or"
                         " more, one with two pictures (--split pictures keeps all classes in every part)")


def epoch_batches(labels, size, each, rng, number=0):
    """An epoch's batches: int arrays of positions in labels, size // each classes (or all) × `each` pictures.

    The classes of a batch are drawn at random; a class's pictures come in shuffled order and again when they
    are used up, so a smaller class gives all it has. `number` batches, or as many as the pictures fill.
    """
    order = np.argsort(labels, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    waiting, width = [np.empty(0, np.int64)] * len(members), min(size // each, len(members))
    for _ in range(number or max(1, len(labels) // (width * each))):
        batch = []
        for c in rng.permutation(len(members))[:width]:
            if len(waiting[c]) < min(each, len(members[c])):
                waiting[c] = rng.permutation(members[c])
            batch.append(waiting[c][:each])
            waiting[c] = waiting[c][each:]
        yield np.concatenate(batch)


def augment(image, size, rng, scale=(1 / 8, 1), ratio=(3 / 4, 4 / 3)):
    """A random crop resized to `size` (H, W), mirrored half the time (Oi et al.): PIL RGB -> uint8 (H, W, 3).

    scale: share of the picture's area; ratio: width / height, drawn on a logarithmic scale. What does not fit
    into the picture is drawn again, at last the largest central crop within the ratio is taken.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            break
    else:
        w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
        left, top = (width - w) // 2, (height - h) // 2
    crop = image.crop((left, top, left + w, top + h)).resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(crop)[:, ::-1] if rng.random() < 0.5 else np.asarray(crop)


# ---------------------------------------------------------------- steps


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
    """Gradients of a batch's loss; the loss as a float. pictures: this rank's share `mine` of labels (B,).

    A loss of pairs needs the whole batch: every rank computes it from all embeddings and sends its own share
    of the gradient back through its network, which makes what one process with that batch would.
    """
    with autocast(pictures, precision):
        embeddings = network(pictures)
    whole = gather(embeddings.detach().float(), mine, len(labels)).requires_grad_()
    loss = criterion(whole, labels, miner(whole, labels) if miner else None)
    loss.backward()
    ranks = dist.get_world_size() if len(mine) < len(labels) else 1  # DistributedDataParallel takes the mean
    embeddings.backward((whole.grad[mine] * ranks).to(embeddings.dtype))
    return loss.item()


@torch.no_grad()
def embed(network, feed, rows, size, team=(0, 1), precision="fp32"):
    """Embeddings of rows in eval mode, `size` at a time: float32 (len(rows), m); each rank does its share.

    feed(batches): yields (rows, the network's input) for each int array of rows.
    """
    network.eval()
    mine, parts = np.array_split(np.arange(len(rows)), team[1])[team[0]], []
    own = rows[mine] if len(mine) else rows[:1]  # fewer rows than ranks: the sum needs a width of all
    for _, pictures in feed(own[at:at + size] for at in range(0, len(own), size)):
        with autocast(pictures, precision):
            parts.append(network(pictures).float())
    return gather(torch.cat(parts)[:len(mine)], mine, len(rows))


@torch.no_grad()
def mean_loss(criterion, miner, embeddings, labels, batches):
    """The mean loss of embeddings (n, m) over batches, all as they are: comparable between epochs."""
    pairs = [(embeddings[batch], labels[batch]) for batch in batches]
    return float(np.mean([float(criterion(x, y, miner(x, y) if miner else None)) for x, y in pairs]))


def seed_of(*numbers):
    """One seed of torch's generator from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


# ---------------------------------------------------------------- the command: pictures, and one network


def feed_pictures(paths, preprocessing, device, workers, seed, crop):
    """feed(batches, epoch): yields (rows, float32 (B, 3, H, W) on the device) for each int array of rows.

    With an epoch, training crops of at least this share; without, the preprocessing's own geometry. Pictures
    are decoded in threads ahead of their use; feed.waited counts the seconds that this waits for them.
    """
    from dml_common.networks import to_input
    from dml_common.pictures import input_size, load_pixels, read_rgb

    def load(row, epoch):
        if epoch is None:
            return load_pixels(paths[row], preprocessing)
        rng = np.random.default_rng([seed, epoch, row])
        return augment(read_rgb(paths[row]), input_size(preprocessing), rng, (crop, 1))

    def ready(rows, decoded):
        start = time.perf_counter()
        pixels = np.stack(list(decoded))
        feed.waited += time.perf_counter() - start
        return rows, to_input(torch.from_numpy(pixels).to(device), preprocessing)

    def feed(batches, epoch=None):
        with ThreadPoolExecutor(workers) as pool:
            ahead = deque()
            for rows in batches:
                ahead.append((rows, pool.map(load, rows.tolist(), repeat(epoch))))
                if len(ahead) > 2:
                    yield ready(*ahead.popleft())
            while ahead:
                yield ready(*ahead.popleft())

    feed.waited = 0.0
    return feed


class Diverged(Exception):
    """A loss or an embedding is no finite number any more."""


class Run:
    """The training of one network as its config.json, `config`, says, with the loss of a row of losses.csv.

    parts: rows by part: train, scored (those of train whose scores are taken), validation, test.
    team: (rank, ranks) that train it together.
    """

    device, team = torch.device("cpu"), (0, 1)

    def __init__(self, config, row, parts, labels, folder):
        self.config, self.row, self.parts, self.folder = config, row, parts, folder
        self.options, self.fold = config["options"], folder.name.removeprefix("fold")
        self.name = f"{row['name']} fold {self.fold}"
        classes = np.unique(labels[parts["train"]])
        self.known, self.codes = {}, {}  # have its classes proxies? their numbers
        for part, rows in parts.items():
            self.known[part] = np.isin(labels[rows], classes).all()
            self.codes[part] = np.searchsorted(classes, labels[rows]) if self.known[part] else labels[rows]

    def begin(self, trunk, width, feed):
        """Network, loss and optimizer before the first epoch; trunk: None where feed gives its features."""
        from dml_common.losses import make_loss
        from dml_common.networks import random_linear
        self.feed, self.epoch, self.history, self.counts, self.best = feed, 0, [], {}, None
        seed, fold, dimension = self.options["seed"], self.config["fold"], self.config["dimension"]
        embedder = random_linear(width, dimension, seed, fold)  # the same for all losses of a fold
        network = nn.Sequential(trunk, embedder) if trunk else embedder
        self.network = network.to(self.device, memory_format=torch.channels_last)
        self.criterion = self.miner = None
        groups = [{"params": list(network.parameters()), "lr": self.options["lr"]}]
        if self.row["class"]:
            torch.manual_seed(seed_of(seed, fold))
            criterion, self.miner, _ = make_loss(self.row, int(self.codes["train"].max()) + 1, dimension)
            self.criterion = criterion.to(self.device)
            proxies = list(criterion.parameters())
            groups += [{"params": proxies, "lr": self.options["loss_lr"]}] if proxies else []
        settings = {"momentum": 0.9} if self.options["optimizer"] == "RMSprop" else {}  # as in Musgrave's
        self.optimizer = getattr(torch.optim, self.options["optimizer"])(
            groups, weight_decay=self.options["weight_decay"], **settings)

    def score(self, part):
        """Add a row to the history and, of the test part, histograms of its pairs; on the first rank."""
        from pairs import pair_scores
        start, options, codes, loss = time.perf_counter(), self.options, self.codes[part], None
        x = embed(self.network, self.feed, self.parts[part], max(64, options["batch"]), self.team,
                  options["precision"])
        if not x.isfinite().all():
            if self.epoch == 0:
                raise ValueError("before any training the network gives embeddings that are no numbers")
            raise Diverged(f"epoch {self.epoch}: an embedding is no number")
        if self.team[0] > 0:
            return
        proxies = {"classes", "num_classes"} & {*(self.config["loss_parameters"] or ())}
        if self.criterion and (self.known[part] or not proxies):
            rng = np.random.default_rng([options["seed"], self.config["fold"]])
            batches = epoch_batches(codes, options["batch"], options["per_class"], rng)
            labels = torch.from_numpy(codes).to(x.device)
            loss = mean_loss(self.criterion, self.miner, x, labels, batches)
        scores = pair_scores(x.cpu().numpy(), codes, bins=(BINS,), recall=(1,), seed=options["seed"],
                             threads=1 if len(x) < 1000 else None)
        self.history.append([
            self.epoch, part.replace("scored", "train"), loss, scores.positive_mean, scores.negative_mean,
            scores.jsd[BINS], scores.jsd_null[BINS], scores.recall[1], scores.map_at_r,
            time.perf_counter() - start])
        if part == "test":
            self.counts[self.epoch] = [counts.tolist() for counts in scores.histograms[BINS]]

    def train_epoch(self, network):
        """One epoch's steps; network: this one's, perhaps wrapped."""
        (rank, ranks), codes, options = self.team, self.codes["train"], self.options
        seeds = options["seed"], self.config["fold"], self.epoch
        torch.manual_seed(seed_of(*seeds, rank))  # for what a network draws itself: dropout
        rng = np.random.default_rng(seeds)
        sizes = options["batch"], options["per_class"]
        batches = list(epoch_batches(codes, *sizes, rng, options["steps"]))
        least = min(map(len, batches))
        if least < ranks:
            raise ValueError(f"batches of {least} pictures for {ranks} processes: start fewer, raise --batch")
        shares = [np.array_split(np.arange(len(batch)), ranks)[rank] for batch in batches]
        mine = [self.parts["train"][batch[share]] for batch, share in zip(batches, shares)]
        network.train()
        for module in network.modules():
            if options["freeze_norm"] and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()  # the statistics stay, weight and bias learn: as pytorch-metric-learning's
        for number, (_, pictures) in enumerate(self.feed(mine, self.epoch)):
            if options["schedule"] == "cosine":
                done = (self.epoch - 1 + number / len(batches)) / options["epochs"]
                for group, name in zip(self.optimizer.param_groups, ("lr", "loss_lr")):
                    group["lr"] = options[name] * ((1 + math.cos(math.pi * done)) / 2)
            self.optimizer.zero_grad()
            labels = torch.from_numpy(codes[batches[number]]).to(self.device)
            loss = step(network, self.criterion, self.miner, pictures, labels, shares[number],
                        options["precision"])
            loss = torch.tensor(loss, device=self.device)
            if ranks > 1:  # which stop together
                dist.all_reduce(loss)
            if not loss.isfinite():
                raise Diverged(
                    f"epoch {self.epoch}, step {number + 1} of {len(batches)}: the loss is no number, at "
                    f"learning rates {options['lr']:g} and {options['loss_lr']:g}")
            self.optimizer.step()

    def train(self, bar):
        """All epochs, from the last one that was saved; then the test, with the best one's network."""
        first = self.team[0] == 0
        self.resume()
        if not self.history:
            for part in ("scored", "validation", "test"):
                self.score(part)
        bar.update(self.epoch)
        network = self.wrapped() if self.criterion else None
        while self.criterion and self.goes_on():
            start = time.perf_counter()
            self.epoch += 1
            self.train_epoch(network)
            self.spread(self.network.state_dict().values())  # batch norm's statistics were each rank's own
            took = time.perf_counter() - start
            self.score("scored")
            self.score("validation")
            if first:
                self.history[-2][-1] += took  # the steps' seconds count with the training part's scores
                value = self.history[-1][HEADER.index(self.options["select"])]
                if self.best is None or value > self.best["value"]:
                    self.best = {"epoch": self.epoch, "value": value, "network": on_cpu(self.network),
                                 "criterion": on_cpu(self.criterion)}
                self.save()
            bar.update()
        if self.criterion:
            for name in ("network", "criterion"):
                if first:
                    getattr(self, name).load_state_dict(self.best[name])
                self.spread(getattr(self, name).state_dict().values())
            self.epoch = self.best["epoch"] if first else None
            self.score("test")

    def goes_on(self):
        """Is there one more epoch? The first rank alone knows the scores."""
        patience, waited = self.options["patience"], self.epoch - self.best["epoch"] if self.best else 0
        return self.agreed(self.epoch < self.options["epochs"] and not (patience and waited > patience))

    def agreed(self, answer):
        """The first rank's answer, to all."""
        answer = torch.tensor(int(answer), device=self.device)
        self.spread([answer])
        return bool(answer)

    def wrapped(self):
        """The network as the steps call it: compiled, and of several ranks with their gradients' mean."""
        if self.team[1] > 1 and self.device.type == "cuda":  # the whole batch's statistics, as in one process
            nn.SyncBatchNorm.convert_sync_batchnorm(self.network)
        network = torch.compile(self.network) if self.options["compile"] else self.network
        if self.team[1] > 1:
            network = nn.parallel.DistributedDataParallel(network, static_graph=True)
        return network

    def spread(self, tensors):
        """Give every rank what the first one's tensors hold."""
        for tensor in tensors if self.team[1] > 1 else ():
            dist.broadcast(tensor, 0)

    @contextmanager
    def turn(self, wait, device, team):
        """A block in which no other process or team trains this network: is it to be trained here, now?"""
        from dml_common import command, rowfile
        self.folder.mkdir(parents=True, exist_ok=True)
        self.device, self.team, first = device, team, team[0] == 0
        lock = rowfile.only_one(self.folder / "checkpoint.pth.lock", wait) if first else nullcontext(True)
        with lock as ours:
            if not ours:
                command.say(f"{self.name} is trained by another process; waiting for that in the end")
            elif first and self.progress() in ("finished", "diverged"):
                ours = False
                self.tidy()
            yield self.agreed(ours)

    def progress(self):
        """"finished", "diverged", "begun" or None: what is there. ValueError where it was made otherwise."""
        from dml_common import files, rowfile
        there = files.read_sidecar(self.folder / "config.json")
        finished, diverged = (self.folder / "embedder_best.pth").exists(), there.get("diverged")
        if not (finished or diverged or (self.folder / "checkpoint.pth").exists()):
            return None
        there["options"] = {**LATER, **there.get("options", {})}
        rowfile.refuse_other(self.folder, there, {**self.config, "diverged": diverged})
        return "finished" if finished else "diverged" if diverged else "begun"

    def save(self):
        """What the same command needs to continue; random numbers come from (seed, fold, epoch)."""
        from dml_common.checkpoints import write_state
        modules = {name: getattr(self, name).state_dict() for name in ("network", "criterion", "optimizer")}
        state = {name: getattr(self, name) for name in ("epoch", "history", "counts", "best")}
        write_state(self.folder / "checkpoint.pth", {"modules": modules, "state": state})

    def resume(self):
        path = self.folder / "checkpoint.pth"
        if not path.exists():
            return
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            if any(len(row) != len(HEADER) for row in content["state"]["history"]):
                raise ValueError("of an older version")
        except Exception as error:  # whatever damaged bytes provoke
            raise ValueError(f"{path}: damaged ({error!r:.80}); remove it to begin anew") from None
        for name, values in content["modules"].items():
            getattr(self, name).load_state_dict(values)
        vars(self).update(content["state"])

    def write_config(self, **more):
        from dml_common.rowfile import write_json
        write_json(self.folder / "config.json", {**self.config, **more})

    def write(self, diverged=None):
        """The files of a run that has ended. embedder_best.pth is the last: with it there is a network."""
        from dml_common import checkpoints, command, files
        files.write_table(self.folder / "history.csv", HEADER, self.history)
        header = ["epoch", "split", "bins", "low", "high", "positive", "negative"]
        files.write_table(self.folder / "histograms.csv", header, [
            [epoch, "test", BINS, 2 * i / BINS - 1, 2 * (i + 1) / BINS - 1, *pair]
            for epoch, counts in self.counts.items() for i, pair in enumerate(zip(*counts))])
        if diverged:
            self.write_config(diverged=diverged)
            command.say(f"{self.name} diverged in {diverged}; it has no network, the others go on")
        else:
            cut = None if self.config["frozen_trunk"] else "train_from" in self.config
            checkpoints.write_trained(self.folder, on_cpu(self.network), cut)
        self.tidy()

    def tidy(self):
        """Remove what a run that has ended needed to continue, and what a kill left of it half-written."""
        for path in self.folder.glob("*checkpoint.pth*"):
            path.unlink(missing_ok=True)


def on_cpu(module):
    return {name: tensor.cpu().clone() for name, tensor in module.state_dict().items()}


# ---------------------------------------------------------------- the command


def print_scores(runs):
    """Table 1: the test part's scores and JSD's null, at the best epoch and before training; their means."""
    from dml_common import command, files
    names = (*SCORES, "jsd_null")
    lines = [["", "", "", "test", "", "", "", "before", "", "", ""],
             ["loss", "fold", "epoch", *("Recall@1", "MAP@R", "JSD", "null") * 2]]
    for _, folds in groupby(runs, key=lambda run: run.row["slug"]):
        scores = []
        for run in folds:
            table = files.read_table(run.folder / "history.csv")
            tests = [i for i, split in enumerate(table["split"]) if split == "test"]
            none = ["nan"] * len(table["split"])  # of older versions: they wrote no jsd_null
            values = [float(table.get(name, none)[i]) for i in (tests[-1], tests[0]) for name in names]
            cells = [table["epoch"][tests[-1]], *(f"{value:.3f}" for value in values)]
            if run.progress() == "diverged":
                cells[:5] = ["", "diverged", "", "", ""]
            else:
                scores.append(values)
            lines.append([run.row["name"], run.fold, *cells])
        if len(scores) > 1:
            means = np.mean(scores, axis=0)
            lines.append([run.row["name"], "mean", "", *(f"{value:.3f}" for value in means)])
    command.print_aligned(lines)


def parse(argv):
    from dml_common import command, networks
    parser = command.parser(__doc__)
    add = parser.add_argument
    add("--dataset", required=True, metavar="NAME|FOLDER|CSV", help="cars196, cub200, sop, a folder or a CSV")
    add("--test", metavar="NAME|FOLDER|CSV", help="test on another data set's pictures, by the same label")
    add("--data-root", metavar="DIR", help="folder of the published data sets (DML_DATA_ROOT, else data/)")
    add("--labels", type=Path, metavar="FILE",
        help="a row for each picture, .csv or .npy (the data set's own classes)")
    add("--label", help="makes pictures alike: class, super_class or a column of the table (class; model)")
    add("--loss", default="Normalized Softmax", help="of models/losses.csv or --losses, with commas; "
        "package.module:Class; all; None (%(default)s)")
    add("--type", choices=["ranking", "classification"], help="of a loss package.module:Class (other)")
    add("--losses", type=Path, metavar="FILE.csv", help="more losses, as in models/losses.csv")
    add("--fold", default="0", help="0, 1, 2, 3, several with commas, or all (%(default)s)")
    add("--split", choices=["default", "random", "pictures", "folds"], help="see above (default, "
        "or pictures by a label other than class and super_class)")
    add("--recipe", choices=RECIPES, default="oi", help="defaults of the others: docs/train.md (%(default)s)")
    add("--model", help="a backbone, such as bninception, or package.module:factory (%(default)s)")
    add("--weights", metavar="FILE", help="ImageNet weights of the backbone (torch's hub cache)")
    add("--dim", type=int, metavar="M", help="dimension of the embedding (%(default)s)")
    add("--freeze-trunk", action="store_true", help="train the linear layer alone, on features computed once")
    add("--train-from", metavar="BLOCK", help="train the network from this module on; what comes before is "
        "computed once, of each picture and its mirror image: no crops")
    add("--input-size", type=int, metavar="N", help="side of the input; resize and crop in proportion")
    add("--epochs", type=int, metavar="N", help="at most (%(default)s)")
    add("--steps", type=int, metavar="N", help="of an epoch (as many as the pictures fill)")
    add("--patience", type=int, metavar="N", help="stop when the best epoch is more than N ago (never)")
    add("--crop", type=float, metavar="SHARE", help="of the picture, the least in training (%(default)s)")
    add("--optimizer", choices=["AdamW", "RMSprop"], help="(%(default)s)")
    add("--freeze-norm", action="store_true", help="batch norms keep their statistics")
    add("--lr", type=float, metavar="X", help="learning rate of the network (1e-4; with --freeze-trunk 1e-3)")
    add("--loss-lr", type=float, default=0.01, metavar="X", help="of the loss's own parameters (%(default)s)")
    add("--scale", type=float, default=10, metavar="S", help="of Normalized Softmax, Eq. 3 (%(default)s)")
    add("--weight-decay", type=float, metavar="X", help="of all parameters (%(default)s)")
    add("--schedule", default="constant", choices=["constant", "cosine"], help="of the rates (%(default)s)")
    add("--batch", type=int, default=32, metavar="N", help="pictures in a batch (%(default)s)")
    add("--per-class", type=int, metavar="N", help="of them of one class (%(default)s)")
    add("--select", default="map_at_r", choices=SCORES, help="score that tells the best epoch (%(default)s)")
    add("--train-sample", type=int, default=0, metavar="N", help="score so few training pictures only (all)")
    add("--seed", type=int, default=SEED, help="of splits, crops, batches and initial weights (%(default)s)")
    add("--models", type=Path, default=networks.MODELS, metavar="DIR", help="writes to DIR/trained (models/)")
    add("--compile", action="store_true", help="torch.compile the network for the training steps")
    command.add_speed(add)
    parser.set_defaults(skip_unreadable=None, **RECIPES["oi"])
    recipe = RECIPES[parser.parse_args(argv).recipe]
    parser.set_defaults(**recipe)
    args = parser.parse_args(argv)
    changed = [f"{name} {getattr(args, name)}" for name in recipe if getattr(args, name) != recipe[name]]
    if args.recipe != "oi" and changed:
        command.say(f"the recipe of {args.recipe}, but {', '.join(changed)}")
    command.at_least(args, epochs=1, dim=1, per_class=2, seed=0, steps=0, patience=0, train_sample=0,
                     workers=1, input_size=1, batch=2 * (args.per_class or 4))  # two classes, to compare
    for name in ("lr", "loss_lr", "scale", "weight_decay", "crop"):
        value = getattr(args, name)
        if value is not None and not (0 < value < math.inf or (name == "weight_decay" and value == 0)):
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected a positive number")
    if args.crop > 1:
        raise ValueError(f"--crop {args.crop}: expected a share of the picture, at most 1")
    if args.type and ":" not in args.loss:
        raise ValueError(f"--type {args.type} is of a loss package.module:Class; --losses has a column")
    if args.freeze_trunk and args.train_from:
        raise ValueError("--freeze-trunk trains none of the trunk, --train-from a part: give one of them")
    return args


def add_test(dataset, labels, label, args, notes):
    """A data set and its labels with the pictures and labels of --test behind them."""
    from dml_common import pictures
    other = pictures.open_dataset(args.test, args.data_root)
    if other.folder.resolve() == dataset.folder.resolve():
        raise ValueError(f"--test {args.test} is the data set itself; without it a part of it is held out")
    more, _ = pictures.labels_of(other, None, label, notes)
    notes += other.notes
    refuse_without_pairs(more, f"--test {args.test}")
    both = {name: [*getattr(dataset, name), *getattr(other, name)] for name in ("paths", "relative")}
    return dataset._replace(**both), np.concatenate([labels, labels.max() + 1 + more])


def plan(args, dataset, device):
    """The runs asked for, each with its config.json, the network that they begin with, and all pictures."""
    from dml_common import command, losses, networks, pictures
    labels, label = pictures.labels_of(dataset, args.labels, args.label, notes := [*dataset.notes])
    n = len(labels)
    if args.test:
        dataset, labels = add_test(dataset, labels, label, args, notes)
    for note in notes if command.my_share()[0] == 0 else ():
        command.say(note)
    usual = "default" if label in ("class", "super_class") else "pictures"
    kind = args.split or usual
    home = args.models / "trained" / (dataset.name if kind == usual else f"{dataset.name}@{kind}")
    rows, parts, runs, published = [], {}, [], None
    more = losses.read(args.losses) if args.losses else []
    for name in map(str.strip, args.loss.split(",")):
        if ":" in name:
            more.append(losses.own(name, args.type))
        chosen = networks.wanted_losses(name, None, args.models, more)
        rows += [row for row in chosen if row not in rows and (row["class"] or name != "all")]
    for fold in networks.wanted_folds(args.fold, rows[0], "", args.models):
        train, validation, test = split_rows(labels[:n], kind, fold, args.seed, test=not args.test)
        test = np.arange(n, len(labels)) if args.test else test
        scored = train
        if 0 < args.train_sample < len(train):
            order = np.random.default_rng([args.seed, fold]).permutation(len(train))
            scored = train[np.sort(order[:args.train_sample])]
            refuse_without_pairs(labels[scored], f"--train-sample {args.train_sample} of fold {fold}")
        parts[fold] = {"train": train, "scored": scored, "validation": validation, "test": test}
    network = networks.load(networks.find(model=args.model, weights=args.weights)[0])
    if "transform" in network.preprocessing:
        raise ValueError(f"--model {args.model} has a transform of its own, which can't be cut at random; "
                         "give it an attribute preprocessing instead")
    if args.input_size:
        network = network._replace(preprocessing=pictures.resized(network.preprocessing, args.input_size))
    options = {name: getattr(args, name) for name in OPTIONS}
    options["lr"], each = args.lr or LR[args.freeze_trunk], {"classification": 1}  # as Musgrave et al.
    if args.dataset in pictures.PUBLISHED:
        published = pictures.open_dataset(args.dataset, args.data_root, "test").relative
    listed = {"number": len(labels), "sha256": pictures.pictures_sha256(dataset.relative)}
    digest = hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()
    for row, fold in product(rows, parts):
        train, _, validation, test = parts[fold].values()
        split = {"kind": kind, "label": label, "seed": args.seed, "pictures": listed, "labels_sha256": digest,
                 "train": len(train), "validation": len(validation)}
        if args.test:  # other scripts find it with --trained-on
            split["tested_on"] = Path(args.test).name
        elif [dataset.relative[i] for i in test] != published:
            split["test"] = test.tolist()
        if row["slug"] == "normalized_softmax":
            row = {**row, "parameters": f"{row['parameters']} temperature={1 / args.scale}"}
        parameters, library = losses.tried(row, len(np.unique(labels[train])), args.dim)
        versions = {"torch": torch.__version__, "numpy": np.__version__, "pillow": PIL.__version__,
                    "pytorch_metric_learning": library, "device": str(device),
                    "threads": torch.get_num_threads()}
        config = {
            "dataset": dataset.name, "loss": row["name"], "type": row["type"], "fold": fold,
            "backbone": args.model, "dimension": args.dim, "distance": row["distance"],
            "preprocessing": network.preprocessing, "frozen_trunk": args.freeze_trunk,
            **({"train_from": args.train_from} if args.train_from else {}),
            "weights_sha256": network.checkpoint_sha256, "loss_parameters": parameters, "split": split,
            "options": {**options, "per_class": args.per_class or each.get(row["type"], 4)},
            "versions": versions}
        folder = f"fold{fold}" if args.seed == SEED else f"fold{fold}.seed{args.seed}"
        runs.append(Run(config, row, parts[fold], labels, home / row["slug"] / folder))
    return runs, network, dataset


def work(mine, trunk, width, feed, device, team, bar):
    """Train one network after the other, first what no other process or team is at."""
    weights = {name: value.clone() for name, value in trunk.state_dict().items()} if trunk else {}
    for wait, run in product((False, True), mine):
        bar.set_description_str(run.name, refresh=False)
        with run.turn(wait, device, team) as ours:
            if not ours:  # another process's, which ends it
                bar.update(0 if wait else run.options["epochs"])
                continue
            if trunk:
                trunk.load_state_dict(weights)
            run.begin(trunk, width, feed)
            if team[0] == 0:
                run.write_config()
            diverged = None
            try:
                run.train(bar)
            except Diverged as error:
                diverged = str(error)
            if team[0] == 0:
                run.write(diverged)
            run.network = run.criterion = run.optimizer = run.best = None  # their memory is the next one's


def main(argv=None):
    from dml_common import command, cut, networks, pictures
    args = parse(argv)
    found = importlib.util.find_spec("pairs")
    if found is None or found.origin is None:  # a folder of that name has no origin
        raise ValueError("the scores are those of pairs.py; copy that too, beside train.py")
    device, (rank, ranks) = command.torch_device(args.device, args.precision), command.my_share()
    if "@" in args.dataset and not Path(args.dataset).exists():
        raise ValueError(f"--dataset {args.dataset}: give the name alone, and --split beside it")
    dataset = pictures.open_dataset(args.dataset, args.data_root, "all")
    runs, network, dataset = plan(args, dataset, device)
    todo = [run for run in runs if run.progress() in (None, "begun")]
    for run in set(runs) - set(todo):  # ended, but perhaps killed before it had tidied up
        run.tidy()
    if not todo and rank == 0:
        command.say(f"nothing to do: {len(runs)} of {len(runs)} networks are there")
    together = "RANK" in os.environ and ranks > 1 and todo  # by torchrun: all train the same network
    if together:
        command.join_ranks(device, args.device)
    if todo:
        trunk, width, start = network.module, networks.features_of(network), time.perf_counter()
        workers = args.workers or min(16, command.available_cpus())
        feed = feed_pictures(dataset.paths, network.preprocessing, device, workers, args.seed, args.crop)
        if args.freeze_trunk or args.train_from:
            home = todo[0].folder.parent.parent
            features, trunk = cut.cached(trunk, width, todo[0].config, dataset, args, device, home)
            feed = cut.feed(features, device, args.seed)
            if device.type == "cpu" and args.freeze_trunk:
                torch.set_num_threads(1)  # for matrices this small a second thread costs more than it saves
        mine, team = todo, (rank, ranks)
        if args.freeze_trunk or not together:  # shares of all runs: processes agree whenever they start
            mine, team = [run for run in runs[rank::ranks] if run in todo], (0, 1)
        with command.bar(len(mine) * args.epochs, "training", " epochs") as bar:
            bar.disable |= rank > 0
            work(mine, trunk, width, feed, device, team, bar)
        if rank == 0 and not (args.freeze_trunk or args.train_from):
            took = time.perf_counter() - start
            command.say(f"waited for pictures {feed.waited:.1f} of {took:.1f} s ({feed.waited / took:.1%})")
    if together:
        dist.barrier()
        dist.destroy_process_group()
    ended = [run for run in runs if run.progress() in ("finished", "diverged")]
    if rank == 0:
        print_scores(ended)
    return 3 if any(run.progress() == "diverged" for run in ended) else 0


if __name__ == "__main__":
    command.run(main)
