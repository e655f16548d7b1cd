"""train.py: splits, batches, crops and losses by hand; whole runs on tiny pictures, through main() and the command line."""
import csv
import inspect
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dml_common import files
from dml_common import pictures as data
import embed
from dml_common import networks as models
import saliency
import train

pytest.importorskip("pytorch_metric_learning")
ROOT = Path(train.__file__).parent
LOSSES = [row for row in models.losses() if row["class"]]
TINY = """
import os, time, torch
from torch import nn

class Tiny(nn.Module):
    preprocessing = {"resize": 40, "crop": 32, "mean": [0.5, 0.5, 0.5]}
    def __init__(self, dropout=0.0, norm=False):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 5, 4), *[nn.BatchNorm2d(8)] * norm, nn.ReLU(),
                                    nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Dropout(dropout))
    def forward(self, x):
        time.sleep(float(os.environ.get("SLOW", 0)))
        return self.layers(x)

def tiny(): return Tiny()
def dropping(): return Tiny(0.3)
def norm(): return Tiny(norm=True)
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Run in an empty folder, with factories in tiny_for_test.py, no rank in the environment and no cached weights."""
    (tmp_path / "tiny_for_test.py").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in [name for name in os.environ if name.startswith("SLURM") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]:
        monkeypatch.delenv(name)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def pictures(tmp_path):
    """80 noisy pictures of 4 classes that differ a little in colour: p/0 … p/3."""
    return make_pictures(tmp_path / "p", 4, 20)


def make_pictures(folder, classes, each):
    for c in range(classes):
        (folder / str(c)).mkdir(parents=True)
        for i in range(each):
            rng = np.random.default_rng([c, i])
            tint = 128 + 6 * np.array([math.cos(2 * math.pi * (c / classes + k / 3)) for k in range(3)])
            pixels = rng.normal(tint, 60, (44, 50, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / str(c) / f"{i}.png")
    return folder


OPTIONS = ("--model", "tiny_for_test:tiny", "--dim", "8", "--split", "pictures", "--batch", "16", "--epochs", "2",
           "--models", "m", "--device", "cpu")


def run(*arguments):
    train.main([*map(str, OPTIONS), *map(str, arguments)])


def history(folder):
    """history.csv without the seconds: {(epoch, split): [values]}."""
    with open(Path(folder) / "history.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == train.HEADER
    return {(int(row[0]), row[1]): [float(value) if value else None for value in row[2:-1]] for row in rows[1:]}


def place(loss, fold=0, dataset="p", root="m"):
    return Path(root) / "trained" / dataset / loss / f"fold{fold}"


# ---------------------------------------------------------------- splits, batches, crops


def test_classes_are_split_four_to_one_to_five():
    labels = np.repeat(np.arange(196), 3)
    parts = train.split_rows(labels, "default")
    chosen = [np.unique(labels[rows]).tolist() for rows in parts]
    assert chosen == [list(range(78)), list(range(78, 98)), list(range(98, 196))]
    assert sum(map(len, parts)) == len(labels)
    labels = np.repeat(np.arange(200), 2)
    assert [len(np.unique(labels[rows])) for rows in train.split_rows(labels, "default")] == [80, 20, 100]


def test_random_order_follows_the_seed_alone():
    labels = np.repeat(np.arange(196), 2)[::-1]
    turn = np.random.default_rng(1).permutation(196)
    for fold in (0, 3):
        chosen = [set(labels[rows].tolist()) for rows in train.split_rows(labels, "random", fold, seed=1)]
        assert chosen == [set(turn[:78].tolist()), set(turn[78:98].tolist()), set(turn[98:].tolist())]
    other = train.split_rows(labels, "random", seed=2)
    assert set(labels[other[0]].tolist()) != chosen[0]


def test_folds_are_the_published_ones():
    """The checkpoints' splits (powerful-benchmarker's MLRCSplitManager): fold k trains from the k-th quarter of the first
    half on, round its end, and validates on what is left."""
    labels = np.tile(np.arange(16), 2)  # classes 8–15 are tested; runs 0 1 | 2 3 | 4 5 | 6 7
    rest, validation, test = train.split_rows(labels, "folds", 2)
    assert [sorted(set(labels[rows].tolist())) for rows in (rest, validation, test)] == \
        [[0, 1, 4, 5, 6, 7], [2, 3], list(range(8, 16))]
    assert rest.tolist() == [0, 1, 4, 5, 6, 7, 16, 17, 20, 21, 22, 23]
    for classes, runs in ((196, [(74, 98), (0, 24), (25, 49), (49, 73)]), (200, [(75, 100), (0, 25), (25, 50), (50, 75)]),
                          (22634, [(8488, 11317), (0, 2829), (2829, 5658), (5658, 8487)])):
        labels = np.repeat(np.arange(classes), 2)
        for fold, run in enumerate(runs):
            rest, validation, test = (np.unique(labels[rows]).tolist() for rows in train.split_rows(labels, "folds", fold))
            assert validation == list(range(*run)) and test == list(range(classes // 2, classes))
            assert sorted(rest + validation) == list(range(classes // 2))


def test_quarters_of_the_pictures():
    labels = np.random.default_rng(0).integers(0, 6, 300)
    quarters = []
    for fold in range(4):
        rest, validation, test = train.split_rows(labels, "pictures", fold)
        assert (len(rest), len(validation), len(test)) == (203, 22, 75)
        assert sorted([*rest, *validation, *test]) == list(range(300))
        for rows, share, most in ((test, 4, 1), (validation, 300 / 22, 2), (rest, 300 / 203, 3)):
            assert np.abs(np.bincount(labels[rows], minlength=6) - np.bincount(labels) / share).max() < most
        quarters.append(test)
    assert sorted(np.concatenate(quarters).tolist()) == list(range(300))
    assert not np.array_equal(quarters[0], train.split_rows(labels, "pictures", 0, seed=2)[2])
    np.testing.assert_array_equal(quarters[0], train.split_rows(np.array(list("abcdef"))[labels], "pictures", 0)[2])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=400), st.sampled_from(["default", "random", "folds", "pictures"]),
       st.integers(0, 3), st.integers(0, 5))
def test_parts_never_overlap(labels, kind, fold, seed):
    labels = np.array(labels)
    try:
        parts = train.split_rows(labels, kind, fold, seed)
    except ValueError:
        return
    rows = np.concatenate(parts)
    assert sorted(rows.tolist()) == list(range(len(labels)))
    for part in parts:
        assert (np.diff(part) > 0).all() and np.unique(labels[part], return_counts=True)[1].max() > 1
    if kind != "pictures":
        assert sum(len(np.unique(labels[part])) for part in parts) == len(np.unique(labels))


def test_batches_have_equal_classes():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 20))
    batches = list(train.epoch_batches(labels, 32, 4, np.random.default_rng(0)))
    assert len(batches) == 200 // 32
    for batch in batches:
        assert len(set(batch.tolist())) == 32 and np.unique(labels[batch], return_counts=True)[1].tolist() == [4] * 8
    again = list(train.epoch_batches(labels, 32, 4, np.random.default_rng(0)))
    assert all(map(np.array_equal, batches, again))
    # six classes for eight places: 24 pictures; a class of three gives three; all of an epoch's pictures come once
    labels = np.repeat([0, 1, 2, 3, 4, 5], [8, 8, 8, 8, 8, 3])
    batches = list(train.epoch_batches(labels, 32, 4, np.random.default_rng(1)))
    assert len(batches) == 43 // 24 and np.unique(labels[batches[0]], return_counts=True)[1].tolist() == [4, 4, 4, 4, 4, 3]
    labels = np.repeat(np.arange(4), 8)
    assert sorted(np.concatenate(list(train.epoch_batches(labels, 16, 4, np.random.default_rng(2)))).tolist()) == list(range(32))
    assert len(list(train.epoch_batches(np.array([0, 1]), 32, 4, np.random.default_rng(0)))) == 1


def test_crops_are_as_published():
    """A picture whose red is x and whose green is y shows what was cut out of it."""
    width, height = 240, 200
    y, x = np.mgrid[:height, :width]
    image = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    areas, aspects, flips = [], [], 0
    for i in range(400):
        crop = train.augment(image, (64, 48), np.random.default_rng(i)).astype(float)
        assert crop.shape == (64, 48, 3)
        row, column = crop[32, :, 0], crop[:, 24, 1]
        flips += row[0] > row[-1]
        w, h = abs(row[-6] - row[5]) / 37 * 48, (column[-6] - column[5]) / 53 * 64
        areas.append(w * h / (width * height))
        aspects.append(w / h)
    assert 1 / 8 * 0.9 < min(areas) < 0.16 and 0.9 < max(areas) < 1.1
    assert 0.75 * 0.9 < min(aspects) < 0.8 and 1.25 < max(aspects) < 4 / 3 * 1.1
    assert 160 < flips < 240 and abs(np.mean(areas) - 0.5) < 0.07  # large crops of a wide ratio do not fit
    thread = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[:, None, None], (1, 2, 3)))
    middle = train.augment(thread, (3, 3), np.random.default_rng(0))  # 2 × 200: the central 2 × 3
    assert 98 <= middle.min() and middle.max() <= 102


def test_crops_are_torchvisions(monkeypatch):
    """The same box, resized by torchvision's resized_crop, gives the same bytes."""
    from torchvision.transforms import functional
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8))
    boxes, crop = [], Image.Image.crop
    monkeypatch.setattr(Image.Image, "crop", lambda self, box: boxes.append(box) or crop(self, box))
    for i in range(20):
        mine = train.augment(image, (32, 32), np.random.default_rng(i))
        left, top, right, bottom = boxes[0]
        boxes.clear()
        theirs = np.asarray(functional.resized_crop(image, top, left, bottom - top, right - left, [32, 32]))
        boxes.clear()
        assert np.array_equal(mine, theirs) or np.array_equal(mine, theirs[:, ::-1])


# ---------------------------------------------------------------- losses


def test_the_table_has_the_librarys_defaults():
    """losses.csv names every number that the library's signature has, with two exceptions, which the README gives."""
    from pytorch_metric_learning import losses, miners
    special = {("Normalized Softmax", "temperature"): 0.1, ("Margin / class", "learn_beta"): True}
    assert len(LOSSES) == 14
    for row in LOSSES:
        for library, text in ((losses, f"{row['class']} {row['parameters']}"), (miners, row["miner"])):
            if not text:
                continue
            name, *given_ = text.split()
            given_ = dict(setting.split("=") for setting in given_)
            mro = [kind for kind in inspect.getmro(getattr(library, name)) if kind.__module__.startswith("pytorch_metric")]
            signature = {k: p.default for kind in reversed(mro) for k, p in inspect.signature(kind.__init__).parameters.items()}
            for key, value in given_.items():
                if value in ("classes", "dimension", "SNRDistance"):
                    assert key in ("num_classes", "embedding_size", "distance")
                else:
                    expected = special.get((row["name"], key), signature[key])
                    assert (value == "True") if expected is True else float(value) == expected, (row["name"], key)
            numbers = {k for k, v in inspect.signature(getattr(library, name).__init__).parameters.items()
                       if type(v.default) in (int, float)}
            assert numbers <= set(given_), row["name"]


def test_what_the_losses_are():
    from pytorch_metric_learning import distances
    made = {row["name"]: train.make_loss(row, 6, 8) for row in LOSSES}
    assert made["Margin / class"][0].beta.shape == (6,) and made["Margin / class"][0].beta.requires_grad
    assert made["Margin"][0].beta.shape == (1,) and not list(made["Margin"][0].parameters())
    assert isinstance(made["SNR Contrastive"][0].distance, distances.SNRDistance)
    assert isinstance(made["Contrastive"][0].distance, distances.LpDistance)
    assert made["Multi Similarity"][1] is None and made["Multi Similarity + Miner"][1].epsilon == 0.1
    assert made["ArcFace"][2] == {"class": "ArcFaceLoss", "num_classes": 6, "embedding_size": 8, "margin": 28.6, "scale": 64}
    assert made["Multi Similarity + Miner"][2]["miner"] == {"class": "MultiSimilarityMiner", "epsilon": 0.1}
    json.dumps([about for _, _, about in made.values()])


def test_the_papers_settings_are_the_defaults():
    args = train.parse(["--dataset", "cars196", "--device", "cpu"])
    assert (args.loss, args.model, args.dim, args.epochs, args.scale, args.seed, args.precision, args.fold) == \
        ("Normalized Softmax", "inception_v3", 64, 20, 10, 1, "fp32", "0")
    row = next(row for row in LOSSES if row["slug"] == "normalized_softmax")
    labels, trunk = np.repeat(np.arange(196), 2), torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    parts = dict(zip(("train", "validation", "test"), train.split_rows(labels, "default")))
    job = train.begin(train.Run("", row, 0, None, parts, {}), trunk, 4, None, labels, args, (0, 1))
    network, loss = job.optimizer.param_groups
    assert isinstance(job.optimizer, torch.optim.AdamW) and (network["lr"], loss["lr"]) == (1e-4, 1e-2)
    assert {id(p) for p in network["params"]} == {id(p) for p in job.network.parameters()} and len(network["params"]) == 6
    assert loss["params"] == [job.criterion.W] and job.criterion.W.shape == (64, 78)
    row = next(row for row in LOSSES if row["slug"] == "margin_per_class")
    job = train.begin(train.Run("", row, 0, None, parts, {}), trunk, 4, None, labels, args, (0, 1))
    assert job.optimizer.param_groups[1]["params"][0] is job.criterion.beta and job.criterion.beta.shape == (78,)
    network = models.inception_v3()
    assert network.transform_input and models.PREPROCESSING["inception_v3"] == {
        "resize": [299, 299], "crop": None, "channels": "RGB", "scale": 1, "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225]}


def test_normalized_softmax_is_equation_3():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(5, 4)), np.array([0, 2, 1, 2, 0])
    row = next(row for row in LOSSES if row["slug"] == "normalized_softmax")
    for s in (10.0, 3.0):
        criterion, _, about = train.make_loss(row, 3, 4, s)
        w = criterion.W.detach().double().numpy()  # (d, C)
        w, unit = w / np.linalg.norm(w, axis=0), x / np.linalg.norm(x, axis=1, keepdims=True)
        terms = [-math.log(math.exp(s * w[:, y] @ v) / sum(math.exp(s * w[:, j] @ v) for j in range(3)))
                 for v, y in zip(unit, labels)]
        assert criterion(torch.tensor(x), torch.tensor(labels)).item() == pytest.approx(np.mean(terms), rel=1e-6)
        assert about["temperature"] == pytest.approx(1 / s)


def test_gradients_of_a_step_are_the_losses(pictures):
    """step() cuts the graph at the embeddings; the gradients equal those of the plain way."""
    torch.manual_seed(0)
    x, y = torch.randn(12, 6), torch.arange(12) // 3
    for row in LOSSES:
        grads = []
        for plain in (True, False):
            torch.manual_seed(1)
            network, (criterion, miner, _) = torch.nn.Linear(6, 5), train.make_loss(row, 4, 5)
            if plain:
                e = network(x)
                criterion(e, y, miner(e, y) if miner else None).backward()
            else:
                train.step(network, criterion, miner, x, y, np.arange(12))
            grads.append([p.grad for p in [*network.parameters(), *criterion.parameters()]])
        for a, b in zip(*grads):
            torch.testing.assert_close(a, b)
        assert grads[0][0].abs().sum() > 0


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("frozen", [False, True])
def test_two_epochs_lower_every_loss(pictures, frozen, capsys):
    run("--dataset", "p", "--loss", "all,None", "--epochs", 2, "--lr", 1e-3, *["--freeze-trunk"] * frozen)
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + 15 and table[1].split() == ["loss", "fold", "epoch"] + ["Recall@1", "MAP@R", "JSD"] * 2
    start, trunks = None, set()
    for row in LOSSES:
        rows = history(place(row["slug"]))
        assert list(rows) == [(0, "train"), (0, "validation"), (0, "test"), (1, "train"), (1, "validation"), (2, "train"),
                              (2, "validation"), rows and list(rows)[-1]] and list(rows)[-1][1] == "test"
        assert rows[2, "train"][0] < rows[0, "train"][0], row["name"]
        start = start or rows
        for part in ("train", "validation", "test"):  # every loss begins with the same network
            assert rows[0, part][1:] == start[0, part][1:]
        trunks.add((place(row["slug"]) / "trunk_best.pth").read_bytes())
    assert (len(trunks) == 1) == frozen
    if frozen:
        assert len({os.stat(place(row["slug"]) / "trunk_best.pth").st_ino for row in LOSSES}) == 1
    assert history(place("none")) == {key: [None, *value[1:]] for key, value in start.items() if key[0] == 0}
    linear = models.load_linear(place("none") / "embedder_best.pth")
    torch.testing.assert_close(linear.weight, models.random_linear(72, 8, 1, 0).weight)


def test_what_a_run_writes(pictures, capsys):
    run("--dataset", "p", "--loss", "Triplet", "--fold", 2)
    folder = place("triplet", 2)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "embedder_best.pth", "histograms.csv", "histograms.png", "history.csv", "trunk_best.pth"]
    config = json.loads((folder / "config.json").read_text())
    dataset = data.open_dataset("p")
    test = train.split_rows(dataset.labels, "pictures", 2)[2]
    assert config["split"] == {
        **config["split"], "kind": "pictures", "label": "class", "seed": 1, "train": 54, "validation": 6, "test": test.tolist(),
        "pictures": {"number": 80, "sha256": data.pictures_sha256(dataset.relative)}}
    assert {key: config[key] for key in ("dataset", "loss", "type", "fold", "backbone", "dimension", "distance", "frozen_trunk",
                                         "loss_parameters")} == {
        "dataset": "p", "loss": "Triplet", "type": "ranking", "fold": 2, "backbone": "tiny_for_test:tiny", "dimension": 8,
        "distance": "euclidean", "frozen_trunk": False, "loss_parameters": {"class": "TripletMarginLoss", "margin": 0.05}}
    rows = history(folder)
    network = models.load(models.find("p", "Triplet", "2", folder=Path("m"))[0])
    inputs = [torch.from_numpy(data.load_picture(dataset.paths[i], network.preprocessing)) for i in test]
    with torch.inference_mode():
        x = network.module(torch.stack(inputs))
    score = train.pairs.pair_scores(x.numpy(), dataset.labels[test], recall=(1,), permutations=0)
    best = list(rows)[-1]
    assert rows[best][1:] == pytest.approx([score.positive_mean, score.negative_mean, score.jsd[200], score.recall[1],
                                            score.map_at_r], abs=1e-5)
    assert best[0] == max((1, 2), key=lambda epoch: (rows[epoch, "validation"][5], -epoch))
    bins = files.read_table(folder / "histograms.csv")
    for epoch in {"0", str(best[0])}:
        chosen = [i for i, e in enumerate(bins["epoch"]) if e == epoch]
        assert sum(int(bins["positive"][i]) + int(bins["negative"][i]) for i in chosen) == 20 * 19 // 2 and len(chosen) == 200
    assert Image.open(folder / "histograms.png").size == (1800, 1280)


def test_a_rendered_set_is_split_by_pictures(renders, monkeypatch, tmp_path, capsys):
    """Fold by fold on six of the real models; held-out rows partition the pictures, whoever trains."""
    few = tmp_path / "cars"
    (few / "images").mkdir(parents=True)
    with open(renders / "props.csv") as file:
        lines = file.read().splitlines()[:121]
    (few / "props.csv").write_text("\n".join(lines) + "\n")
    for line in lines[1:]:
        name = f"{int(line.split(',')[0]):06d}.jpg"
        os.symlink(renders / "images" / name, few / "images" / name)
    arguments = [*OPTIONS[:4], *OPTIONS[6:], "--dataset", "cars", "--loss", "Contrastive,None", "--fold", "all", "--freeze-trunk"]
    train.main(arguments)
    held_out = []
    for fold in range(4):
        config = json.loads((place("none", fold, "cars") / "config.json").read_text())
        assert config["split"]["kind"] == "pictures" and config["split"]["label"] == "model"
        held_out += config["split"]["test"]
    assert sorted(held_out) == list(range(120))
    assert "mean" in capsys.readouterr().out


def test_the_trained_files_load_in_every_script(pictures, monkeypatch, capsys):
    run("--dataset", "p", "--loss", "NTXent,None", "--freeze-trunk")
    arguments = ["--dataset", "p", "--loss", "all", "--fold", "all", "--models", "m", "--out", "r"]
    monkeypatch.setattr(sys, "argv", ["embed.py", *arguments])
    embed.main()
    arrays = {slug: np.load(f"r/p/{slug}/fold0/emb.npy") for slug in ("ntxent", "none")}
    assert arrays["ntxent"].shape[1] == 8 and not np.allclose(arrays["ntxent"], arrays["none"])
    beside = json.loads(Path("r/p/ntxent/fold0/emb.json").read_text())
    assert beside["loss"] == "NTXent" and beside["distance"] == "cosine" and beside["preprocessing"]["crop"] == 32
    monkeypatch.setattr(sys, "argv", ["saliency.py", *arguments, "--limit", "2", "--samples", "2"])
    saliency.main()
    assert np.load("r/p/ntxent/fold0/maps.npy").shape[1:] == (32, 32)
    assert np.load("r/p/none/fold0/maps.npy").shape[1:] == (32, 32)


def test_bfloat16_and_the_other_options(pictures):
    run("--dataset", "p", "--loss", "ArcFace", "--precision", "bf16", "--schedule", "cosine", "--select", "jsd",
        "--train-sample", 20, "--weight-decay", 0, "--per-class", 2)
    options = json.loads((place("arcface") / "config.json").read_text())["options"]
    chosen = ("precision", "schedule", "select", "train_sample", "per_class")
    assert [options[name] for name in chosen] == ["bf16", "cosine", "jsd", 20, 2]
    rows = history(place("arcface"))
    assert list(rows)[-1][0] == max((1, 2), key=lambda epoch: (rows[epoch, "validation"][3], -epoch))


def test_what_is_tested_is_the_best_epoch_with_its_own_proxies(pictures):
    """Stopped at that epoch, a run tests the same network and the same loss."""
    options = ("--dataset", "p", "--loss", "ProxyNCA", "--freeze-trunk", "--lr", 0.03)
    run(*options, "--epochs", 12)
    rows = history(place("proxy_nca"))
    best = list(rows)[-1][0]
    assert best < 12
    run(*options, "--epochs", best, "--models", "short")
    short = history(place("proxy_nca", root="short"))
    assert short[best, "test"] == rows[best, "test"] and short[best, "test"][0] is not None
    assert short[best, "train"] == rows[best, "train"]


def test_classes_that_were_not_trained_have_no_proxy_loss(tmp_path):
    make_pictures(tmp_path / "p", 20, 4)
    run("--dataset", "p", "--split", "default", "--loss", "Normalized Softmax,Contrastive", "--batch", 8, "--per-class", 2)
    for slug, known in (("normalized_softmax", False), ("contrastive", True)):
        rows = history(place(slug))
        assert rows[1, "train"][0] is not None and (rows[1, "validation"][0] is not None) == known


# ---------------------------------------------------------------- long runs


def same(a, b):
    """Two runs' folders hold the same numbers."""
    assert history(a) == history(b)
    for name in ("trunk_best.pth", "embedder_best.pth", "histograms.csv"):
        assert (Path(a) / name).read_bytes() == (Path(b) / name).read_bytes(), name


@pytest.mark.parametrize("frozen", [False, True])
def test_a_killed_run_continues_to_the_same_numbers(pictures, frozen):
    """Killed in the third epoch or later; dropout draws random numbers of its own."""
    options = [*OPTIONS, "--dataset", "p", "--model", "tiny_for_test:dropping", "--loss", "ProxyNCA", "--epochs", "8",
               "--schedule", "cosine", *["--freeze-trunk"] * frozen]
    checkpoint = place("proxy_nca") / "checkpoint.pth"
    if frozen:  # an epoch takes milliseconds: what a kill leaves is made from the state after the third
        kept, whole = {}, train.save

        def save(path, content):
            whole(path, content)
            if content.get("epoch") == 3:
                kept["bytes"] = Path(path).read_bytes()
        train.save = save
        try:
            train.main(options)
        finally:
            train.save = whole
        os.rename("m", "uninterrupted")
        place("proxy_nca").mkdir(parents=True)
        checkpoint.write_bytes(kept["bytes"])
    else:
        process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *options], env={**os.environ, "SLOW": "0.1"},
                                   stderr=subprocess.PIPE)
        while process.poll() is None:
            if checkpoint.exists() and torch.load(checkpoint, weights_only=True)["epoch"] >= 3:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.02)
        assert process.wait() == -signal.SIGKILL, process.stderr.read()
        train.main([*options[:options.index("m")], "uninterrupted", *options[options.index("m") + 1:]])
    epoch = torch.load(checkpoint, weights_only=True)["epoch"]
    assert 3 <= epoch < 8 and not (place("proxy_nca") / "embedder_best.pth").exists()
    train.main(options)
    same(place("proxy_nca"), place("proxy_nca", root="uninterrupted"))
    assert not checkpoint.exists()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_run_killed_at_any_write_continues_to_the_same_numbers(pictures, monkeypatch, frozen):
    """As a kill leaves it: no file after the n-th is written, and of that one a temporary name stays."""
    options = ["--dataset", "p", "--model", "tiny_for_test:dropping", "--loss", "Margin / class", *["--freeze-trunk"] * frozen]
    names, whole = [], files.write_file
    monkeypatch.setattr(data, "write_file", lambda path, content: names.append(Path(path).name) or whole(path, content))
    run(*options, "--models", "uninterrupted")
    assert names[-5:] == ["histograms.csv", "histograms.png", "history.csv", "config.json", "embedder_best.pth"]

    def dies(path, content):
        names.append(Path(path).name)
        if len(names) == at:
            Path(path).with_name(f".{Path(path).name}.x.part").write_bytes(content[:9])
            raise KeyboardInterrupt
        whole(path, content)

    for at in range(1, len(names) + 1):
        names = []
        monkeypatch.setattr(data, "write_file", dies)
        with pytest.raises(KeyboardInterrupt):
            run(*options, "--models", f"m{at}")
        assert not (place("margin_per_class", root=f"m{at}") / "embedder_best.pth").exists()
        monkeypatch.setattr(data, "write_file", whole)
        run(*options, "--models", f"m{at}")
        same(place("margin_per_class", root=f"m{at}"), place("margin_per_class", root="uninterrupted"))
        assert not list(place("margin_per_class", root=f"m{at}").glob("*checkpoint*"))


def test_a_state_left_beside_a_finished_run_goes(pictures):
    run("--dataset", "p", "--loss", "None", "--freeze-trunk")
    (place("none") / "checkpoint.pth").write_bytes(b"killed before it was removed")
    run("--dataset", "p", "--loss", "None", "--freeze-trunk")
    assert not (place("none") / "checkpoint.pth").exists() and (place("none") / "embedder_best.pth").exists()


def test_another_frozen_trunk_takes_nothing_of_the_last(pictures, refused, capsys):
    """Features and trunk stay beside the networks; neither another backbone nor pictures made anew may use them."""
    run("--dataset", "p", "--loss", "None", "--freeze-trunk")
    capsys.readouterr()
    refused("features.npy was made with other options .*backbone", "--dataset", "p", "--loss", "Triplet", "--freeze-trunk",
            "--model", "tiny_for_test:norm")
    Path("m/trained/p/features.npy").unlink()
    run("--dataset", "p", "--loss", "Triplet", "--freeze-trunk", "--model", "tiny_for_test:norm")
    assert "layers.1.running_var" in models.read_state(place("triplet") / "trunk_best.pth")
    capsys.readouterr()
    Image.new("RGB", (44, 50)).save(pictures / "0" / "0.png")
    refused(r"features.npy was made with other options \(bytes: ", "--dataset", "p", "--loss", "Contrastive", "--freeze-trunk",
            "--model", "tiny_for_test:norm")


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "localhost:0", str(ROOT / "train.py"), *map(str, OPTIONS), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_two_processes_train_what_one_does(pictures):
    """DistributedDataParallel: the same batches, gradients added in another order; within 1e-4 after two epochs."""
    done = torchrun("--dataset", "p", "--loss", "Multi Similarity + Miner,SoftTriple", "--models", "two")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4
    run("--dataset", "p", "--loss", "Multi Similarity + Miner,SoftTriple")
    for slug in ("multi_similarity_miner", "soft_triple"):
        ours, theirs = history(place(slug)), history(place(slug, root="two"))
        assert list(ours) == list(theirs)
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), atol=1e-4)
        for name in ("trunk_best.pth", "embedder_best.pth"):
            a, b = (models.read_state(place(slug, root=root) / name) for root in ("m", "two"))
            for key in a:
                torch.testing.assert_close(a[key], b[key], atol=1e-4, rtol=0)


def test_two_processes_score_the_network_they_save(pictures):
    """Batch norm's running statistics are each process's own while it trains; scored and saved are the first one's."""
    done = torchrun("--dataset", "p", "--model", "tiny_for_test:norm", "--loss", "Triplet", "--lr", 1e-2)
    assert done.returncode == 0, done.stderr
    rows, dataset = history(place("triplet")), data.open_dataset("p")
    network = models.load(models.find("p", "Triplet", "0", folder=Path("m"))[0])
    chosen = train.split_rows(dataset.labels, "pictures", 0)[0]
    inputs = [torch.from_numpy(data.load_picture(dataset.paths[i], network.preprocessing)) for i in chosen]
    with torch.inference_mode():
        x = network.module(torch.stack(inputs))
    score = train.pairs.pair_scores(x.numpy(), dataset.labels[chosen], recall=(1,), permutations=0)
    assert rows[list(rows)[-1][0], "train"][1:3] == pytest.approx([score.positive_mean, score.negative_mean], abs=1e-6)


def test_two_processes_share_frozen_runs(pictures):
    done = torchrun("--dataset", "p", "--loss", "Contrastive,FastAP,CosFace", "--freeze-trunk", "--models", "two")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5
    run("--dataset", "p", "--loss", "Contrastive,FastAP,CosFace", "--freeze-trunk")
    np.testing.assert_allclose(np.load("m/trained/p/features.npy"), np.load("two/trained/p/features.npy"), atol=1e-5)
    for slug in ("contrastive", "fastap", "cosface"):
        ours, theirs = history(place(slug)), history(place(slug, root="two"))
        assert list(ours) == list(theirs)
        np.testing.assert_allclose([v[1:] for v in ours.values()], [v[1:] for v in theirs.values()], atol=1e-4)


def test_nothing_is_done_twice(pictures, capsys, monkeypatch):
    run("--dataset", "p", "--loss", "Triplet", "--freeze-trunk")
    first = capsys.readouterr().out
    monkeypatch.setattr(train, "train", None)
    run("--dataset", "p", "--loss", "Triplet", "--freeze-trunk")
    again = capsys.readouterr()
    assert again.out == first and again.err == "train.py: nothing to do: 1 of 1 networks are there\n"


def test_crops_do_not_depend_on_workers(pictures):
    run("--dataset", "p", "--loss", "Triplet", "--workers", 1)
    run("--dataset", "p", "--loss", "Triplet", "--workers", 5, "--models", "other")
    same(place("triplet"), place("triplet", root="other"))


def test_a_frozen_trunks_runs_do_not_depend_on_threads(pictures):
    options = ["--dataset", "p", "--loss", "SoftTriple", "--freeze-trunk"]
    run(*options)
    Path("two/trained/p").mkdir(parents=True)
    for name in ("features.npy", "features.json", "trunk.pth"):  # whose convolutions may add in another order
        os.link(Path("m/trained/p") / name, Path("two/trained/p") / name)
    subprocess.run([sys.executable, str(ROOT / "train.py"), *OPTIONS, *options, "--models", "two"],
                   env={**os.environ, "OMP_NUM_THREADS": "3"}, check=True, capture_output=True)
    same(place("soft_triple"), place("soft_triple", root="two"))
    versions = json.loads((place("soft_triple", root="two") / "config.json").read_text())["versions"]
    assert versions["threads"] in (2, 3) or os.cpu_count() == 1  # torch takes no more than there are cores


# ---------------------------------------------------------------- bad input


@pytest.fixture
def refused(capsys):
    """refused(pattern, arguments …): exit status 2 and one line on stderr that matches; nothing on stdout."""
    def refused(pattern, *arguments):
        import re
        with pytest.raises(SystemExit) as end:
            try:
                run(*arguments)
            except (ValueError, OSError) as error:
                train.fail(error)
        captured = capsys.readouterr()
        assert end.value.code == 2 and captured.out == ""
        assert captured.err.startswith("train.py: ") and captured.err.count("\n") == 1
        assert re.search(pattern, captured.err), captured.err
    return refused


def test_labels_that_do_not_fit(pictures, refused, tmp_path):
    def table(name, values):
        (tmp_path / name).write_text("\n".join(["label", *map(str, values)]) + "\n")
        return name
    for pattern, labels in (("labels.csv has 79 labels, p 80 pictures; expected a row for each", [1] * 79),
                            ("the 80 labels are all distinct", range(80)), ("the 80 labels are one class", [1] * 80)):
        refused(pattern, "--dataset", "p", "--labels", table("labels.csv", labels), "--label", "label")
    refused(r"no property .model.; it has label \(--label chooses", "--dataset", "p", "--labels", "labels.csv",
            "--label", "model")
    refused("p has no label 'super_class'; it has class", "--dataset", "p", "--label", "super_class")
    refused(r"props.csv has no property 'class'; it has model, .*\(--label chooses", "--dataset", ROOT / "examples/cars",
            "--label", "class")
    assert not Path("m").exists()


def test_a_data_set_without_labels(tmp_path, refused):
    make_pictures(tmp_path / "q", 1, 3)
    for path in (tmp_path / "q" / "0").iterdir():
        path.rename(tmp_path / "q" / path.name)
    (tmp_path / "q" / "0").rmdir()
    refused("q has no labels; .*--labels FILE.csv", "--dataset", "q")


def test_splits_that_are_too_small(pictures, refused):
    refused(r"split default of 80 pictures in 4 classes: the validation part has 0 pictures of 0 classes; .*--split pictures "
            "keeps", "--dataset", "p", "--split", "default")
    refused("split folds of .* the validation part has 0 pictures of 0 classes", "--dataset", "p", "--split", "folds")
    make_pictures(Path("few"), 2, 3)
    refused("the validation part has 0 pictures of 0 classes", "--dataset", "few")


def test_options_that_can_not_be(pictures, refused):
    refused("--batch 4 with --per-class 4: a batch of 1 classes; losses and miners", "--dataset", "p", "--batch", 4)
    refused("--per-class 1: expected at least 2", "--dataset", "p", "--per-class", 1)
    refused("unknown loss 'tripplet': did you mean Triplet", "--dataset", "p", "--loss", "tripplet")
    refused("fold 4: expected 0, 1, 2 or 3", "--dataset", "p", "--fold", 4)
    refused("--lr 0.0: expected a positive number", "--dataset", "p", "--lr", 0)
    refused("--lr nan: expected a positive number", "--dataset", "p", "--lr", "nan")
    refused("invalid float value: 'fast'", "--dataset", "p", "--lr", "fast")
    refused("--epochs 0: expected at least 1", "--dataset", "p", "--epochs", 0)
    refused("nowhere: no such folder", "--dataset", "nowhere")
    refused("--train-sample 2 of fold 0's 54 training pictures: 2 classes, at most 1 pictures of one; expected two and two",
            "--dataset", "p", "--train-sample", 2)
    refused("--device mps: unknown; expected auto, cpu, cuda", "--dataset", "p", "--device", "mps")
    refused("--device cuda:99: (no GPU that torch|torch can use)", "--dataset", "p", "--device", "cuda:99")
    refused("--precision tf32 is an NVIDIA GPU's", "--dataset", "p", "--precision", "tf32")


def test_networks_that_are_no_trunk(pictures, refused):
    Path("odd_for_test.py").write_text("from torch import nn\ndef image(): return nn.Identity()\n"
                                       "def broken(): return nn.Sequential(nn.Flatten(), nn.Linear(5, 3))\n")
    refused(r"odd_for_test:image gives \(1, 3, 224, 224\) for one picture; expected \(1, features\)", "--dataset", "p",
            "--model", "odd_for_test:image")
    refused(r"odd_for_test:broken fails on a picture \(3, 224, 224\): ", "--dataset", "p", "--model", "odd_for_test:broken")


def test_missing_weights(pictures, refused):
    refused(r"the ImageNet weights of inception_v3 are not at .*inception_v3_google-0cc3c7bd.pth: download https://.* --weights "
            "FILE", "--dataset", "p", "--model", "inception_v3")
    refused("--weights none.pth: no such file", "--dataset", "p", "--model", "bninception", "--weights", "none.pth")


def test_other_options_are_named(pictures, refused, monkeypatch, capsys):
    def stop(run, job, network, epoch, args):
        if epoch == 2:
            raise KeyboardInterrupt
        return whole(run, job, network, epoch, args)
    whole = train.train_epoch
    monkeypatch.setattr(train, "train_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        run("--dataset", "p", "--loss", "Triplet")
    monkeypatch.setattr(train, "train_epoch", whole)
    refused(r"checkpoint.pth was made with other options \(options.lr: 0.0001 there, 0.001 now\)", "--dataset", "p",
            "--loss", "Triplet", "--lr", 1e-3)
    run("--dataset", "p", "--loss", "Triplet")
    capsys.readouterr()
    refused(r"config.json was made with other options \(.*dimension: 8 there, 4 now.*\)", "--dataset", "p",
            "--loss", "Triplet", "--dim", 4)
    checkpoint = place("contrastive") / "checkpoint.pth"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"broken")
    refused("checkpoint.pth: damaged .*remove it to begin anew", "--dataset", "p", "--loss", "Contrastive")


def test_a_loss_that_is_no_number_stops(pictures, refused, monkeypatch):
    """The state after the last good epoch stays, and nobody takes it for a network."""
    def poison(network, criterion, *rest):
        calls.append(1)
        if len(calls) == 4:
            with torch.no_grad():
                criterion.proxies.fill_(float("nan"))
        return whole(network, criterion, *rest)
    calls, whole = [], train.step
    monkeypatch.setattr(train, "step", poison)
    refused(r"ProxyNCA fold 0, epoch 2, step 1 of 3: the loss is no finite number, at learning rate 0.0001 and 0.01; the state "
            r"after epoch 1 is kept in m/trained/p/proxy_nca/fold0/checkpoint.pth",
            "--dataset", "p", "--loss", "ProxyNCA", "--epochs", 3)
    assert [path.name for path in place("proxy_nca").iterdir()] == ["checkpoint.pth"]
    assert torch.load(place("proxy_nca") / "checkpoint.pth", weights_only=True)["epoch"] == 1
    with pytest.raises(FileNotFoundError):
        models.find("p", "ProxyNCA", "0", folder=Path("m"))
    refused("Triplet fold 0, epoch 1, .* no finite number, at learning rate 1e.30; nothing was saved",
            "--dataset", "p", "--loss", "Triplet", "--lr", 1e30)


def test_a_picture_that_breaks(pictures, refused):
    (pictures / "1" / "3.png").write_bytes(b"no picture")
    refused("p/1/3.png: can't be read as a picture", "--dataset", "p", "--freeze-trunk")
    refused("p/1/3.png: can't be read as a picture", "--dataset", "p")


def test_the_command_line(pictures, run_script):
    help_ = run_script("train.py", "--help")
    assert help_.returncode == 0 and "--freeze-trunk" in help_.stdout and "python train.py --dataset cars196" in help_.stdout
    bad = run_script("train.py", "--dataset", "p", "--loss", "x")
    assert bad.returncode == 2 and bad.stdout == "" and bad.stderr.count("\n") == 1
