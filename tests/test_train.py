"""train.py: splits, batches, crops and losses by hand; whole runs on tiny pictures."""
import csv
import inspect
import io
import json
import math
import os
import re
import signal
import subprocess
import time
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TORCHRUN, noise, one_line, settle, start
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import embed
import pairs
import saliency
import train
from dml_common import checkpoints, files, losses, networks, pictures, results

pytest.importorskip("pytorch_metric_learning")
ROOT = Path(train.__file__).parent
LOSSES = {row["slug"]: row for row in files.losses() if row["class"]}
OPTIONS = ("--model", "tiny_networks:tiny", "--dim", "8", "--split", "pictures", "--batch", "16",
           "--epochs", "2", "--models", "m", "--device", "cpu")


def settle_alone(folder, patch):
    """As settle, on one thread."""
    settle(folder, patch)
    patch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    settle_alone(tmp_path, monkeypatch)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """{frozen: what was printed} of all losses and None after two epochs, in the folders m and frozen."""
    folder, printed = tmp_path_factory.mktemp("everything"), {}
    make_pictures(folder / "p", 4, 20)
    with pytest.MonkeyPatch.context() as patch:
        settle_alone(folder, patch)
        for frozen, more in (False, ()), (True, ("--freeze-trunk", "--models", "frozen")):
            with redirect_stdout(io.StringIO()) as out:
                assert run("--loss", "all,None", "--lr", 1e-3, *more) == 0
            printed[frozen] = out.getvalue().splitlines()
    return folder, printed


@pytest.fixture
def p(tmp_path):
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


def run(*arguments):
    return train.main([*map(str, OPTIONS), "--dataset", "p", *map(str, arguments)])


def history(folder):
    """history.csv without the seconds: {(epoch, split): [values]}."""
    with open(Path(folder) / "history.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == list(train.HEADER)
    return {(int(epoch), part): [float(value) if value else None for value in values]
            for epoch, part, *values, _ in rows[1:]}


def place(slug, fold=0, dataset="p@pictures", root="m"):
    return Path(root) / "trained" / dataset / slug / f"fold{fold}"


def config_of(slug, *more, **where):
    return json.loads((place(slug, *more, **where) / "config.json").read_text())


def scores(x, labels):
    """What pairs.py says of embeddings, in the order of history.csv."""
    score = pairs.pair_scores(x, labels, recall=(1,), seed=1)
    return [score.positive_mean, score.negative_mean, score.jsd[200], score.jsd_null[200], score.recall[1],
            score.map_at_r]


def scores_of(slug, rows, factory="tiny"):
    """Of the saved network's embeddings of these pictures."""
    spec, = networks.find("p@pictures", slug, "0", f"tiny_networks:{factory}", folder=Path("m"))
    network = networks.load(spec)
    dataset = pictures.open_dataset("p")
    pixels = np.stack([pictures.load_pixels(dataset.paths[i], network.preprocessing) for i in rows])
    with torch.inference_mode():
        x = network.module(networks.to_input(torch.from_numpy(pixels), network.preprocessing)).numpy()
    return scores(x, dataset.labels[rows])


# ---------------------------------------------------------------- splits, batches, crops


def classes_of(labels, parts):
    return [np.unique(np.asarray(labels)[rows]).tolist() for rows in parts]


def test_classes_are_split_four_to_one_to_five():
    labels = np.repeat(np.arange(196), 3)
    parts = train.split_rows(labels, "default")
    assert classes_of(labels, parts) == [list(range(78)), list(range(78, 98)), list(range(98, 196))]
    assert sum(map(len, parts)) == len(labels)
    labels = np.repeat(np.arange(200), 2)
    assert list(map(len, classes_of(labels, train.split_rows(labels, "default")))) == [80, 20, 100]


def test_random_order_follows_the_seed_alone():
    labels = np.repeat(np.arange(196), 2)[::-1]
    turn = np.random.default_rng(1).permutation(196)
    for fold in (0, 3):
        chosen = classes_of(labels, train.split_rows(labels, "random", fold, seed=1))
        assert chosen == [sorted(turn[:78]), sorted(turn[78:98]), sorted(turn[98:])]
    assert classes_of(labels, train.split_rows(labels, "random", seed=2)) != chosen


def test_folds_are_the_published_ones():
    """The checkpoints' splits (powerful-benchmarker's MLRCSplitManager): fold k trains from the k-th quarter
    of the first half on, round its end, and validates on what is left."""
    labels = np.tile(np.arange(16), 2)  # classes 8–15 are tested; runs 0 1 | 2 3 | 4 5 | 6 7
    parts = train.split_rows(labels, "folds", 2)
    assert classes_of(labels, parts) == [[0, 1, 4, 5, 6, 7], [2, 3], list(range(8, 16))]
    assert parts[0].tolist() == [0, 1, 4, 5, 6, 7, 16, 17, 20, 21, 22, 23]
    published = {196: [(74, 98), (0, 24), (25, 49), (49, 73)], 200: [(75, 100), (0, 25), (25, 50), (50, 75)],
                 22634: [(8488, 11317), (0, 2829), (2829, 5658), (5658, 8487)]}
    for n, runs in published.items():
        labels = np.repeat(np.arange(n), 2)
        for fold, held in enumerate(runs):
            rest, validation, test = classes_of(labels, train.split_rows(labels, "folds", fold))
            assert validation == list(range(*held)) and test == list(range(n // 2, n))
            assert sorted(rest + validation) == list(range(n // 2))


def test_quarters_of_the_pictures():
    labels = np.random.default_rng(0).integers(0, 6, 300)
    quarters = []
    for fold in range(4):
        rest, validation, test = train.split_rows(labels, "pictures", fold)
        assert (len(rest), len(validation), len(test)) == (203, 22, 75)
        assert sorted([*rest, *validation, *test]) == list(range(300))
        for rows, most in ((test, 1), (validation, 2), (rest, 3)):
            expected = np.bincount(labels) * len(rows) / 300
            assert np.abs(np.bincount(labels[rows], minlength=6) - expected).max() < most
        quarters.append(test)
    assert sorted(np.concatenate(quarters).tolist()) == list(range(300))
    assert not np.array_equal(quarters[0], train.split_rows(labels, "pictures", 0, seed=2)[2])
    letters = np.array(list("abcdef"))[labels]
    np.testing.assert_array_equal(quarters[0], train.split_rows(letters, "pictures", 0)[2])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=400),
       st.sampled_from(["default", "random", "folds", "pictures"]), st.integers(0, 3), st.integers(0, 5))
def test_parts_never_overlap(labels, kind, fold, seed):
    labels = np.array(labels)
    try:
        parts = train.split_rows(labels, kind, fold, seed)
    except ValueError:
        return
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    for part in parts:
        assert (np.diff(part) > 0).all() and np.unique(labels[part], return_counts=True)[1].max() > 1
    if kind != "pictures":
        assert sum(map(len, classes_of(labels, parts))) == len(np.unique(labels))


def test_without_a_test_part_the_rest_is_split_five_to_one():
    labels = np.repeat(np.arange(60), 4)
    train_part, validation, test = train.split_rows(labels, "default", test=False)
    assert train_part.tolist() == list(range(200)) and validation.tolist() == list(range(200, 240))
    assert not len(test)
    parts = train.split_rows(labels, "random", seed=2, test=False)
    assert list(map(len, classes_of(labels, parts))) == [50, 10, 0]
    parts = train.split_rows(labels, "pictures", 3, test=False)
    assert list(map(len, parts)) == [216, 24, 0] and list(map(len, classes_of(labels, parts)))[0] == 60
    with pytest.raises(ValueError, match="folds tests half of the classes"):
        train.split_rows(labels, "folds", test=False)


def test_batches_have_equal_classes():
    def batches(labels, seed, size=32):
        return list(train.epoch_batches(labels, size, 4, np.random.default_rng(seed)))

    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 20))
    first = batches(labels, 0)
    assert len(first) == 200 // 32 and all(map(np.array_equal, first, batches(labels, 0)))
    for batch in first:
        assert len(set(batch.tolist())) == 32
        assert np.unique(labels[batch], return_counts=True)[1].tolist() == [4] * 8
    # six classes for eight places: 24 pictures; a class of three gives three; an epoch has each once
    labels = np.repeat([0, 1, 2, 3, 4, 5], [8, 8, 8, 8, 8, 3])
    first = batches(labels, 1)
    assert len(first) == 43 // 24
    assert np.unique(labels[first[0]], return_counts=True)[1].tolist() == [4, 4, 4, 4, 4, 3]
    assert sorted(np.concatenate(batches(np.repeat(np.arange(4), 8), 2, 16)).tolist()) == list(range(32))
    assert len(batches(np.array([0, 1]), 0)) == 1


def test_crops_are_as_published_and_torchvisions(monkeypatch):
    """The boxes' shares and ratios; the same box, resized by torchvision's resized_crop: the same bytes."""
    from torchvision.transforms import functional
    image, boxes, crop, flips = noise(240, 200), [], Image.Image.crop, 0
    monkeypatch.setattr(Image.Image, "crop", lambda self, box: boxes.append(box) or crop(self, box))
    for i in range(400):
        mine = train.augment(image, (64, 48), np.random.default_rng(i))
        left, top, right, bottom = boxes[2 * i]
        theirs = functional.resized_crop(image, top, left, bottom - top, right - left, [64, 48])
        flipped = np.array_equal(mine, np.asarray(theirs)[:, ::-1])
        assert flipped or np.array_equal(mine, theirs)
        flips += flipped
    left, top, right, bottom = np.transpose(boxes[::2])
    width, height = right - left, bottom - top
    areas, aspects = width * height / (240 * 200), width / height
    assert 1 / 8 * 0.9 < min(areas) < 0.16 and 0.9 < max(areas) < 1.1
    assert 0.75 * 0.9 < min(aspects) < 0.8 and 1.25 < max(aspects) < 4 / 3 * 1.1
    assert 160 < flips < 240 and abs(np.mean(areas) - 0.5) < 0.07  # large crops of a wide ratio do not fit
    thread = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8)[:, None, None], (1, 2, 3)))
    middle = train.augment(thread, (3, 3), np.random.default_rng(0))  # 2 × 200: the central 2 × 3
    assert 98 <= middle.min() and middle.max() <= 102


# ---------------------------------------------------------------- losses


def test_the_table_has_the_librarys_defaults():
    """losses.csv names every number of the library's signatures, with two exceptions (docs/train.md)."""
    from pytorch_metric_learning import losses, miners
    special = {("Normalized Softmax", "temperature"): 0.1, ("Margin / class", "learn_beta"): True}
    assert len(LOSSES) == 14
    for row in LOSSES.values():
        for library, text in ((losses, f"{row['class']} {row['parameters']}"), (miners, row["miner"])):
            if not text:
                continue
            name, *stated = text.split()
            stated, cls = dict(setting.split("=") for setting in stated), getattr(library, name)
            ours = [kind for kind in inspect.getmro(cls) if kind.__module__.startswith("pytorch_metric")]
            signature = {key: parameter.default for kind in reversed(ours)
                         for key, parameter in inspect.signature(kind.__init__).parameters.items()}
            for key, value in stated.items():
                if value in ("classes", "dimension", "SNRDistance"):
                    assert key in ("num_classes", "embedding_size", "distance")
                else:
                    expected = special.get((row["name"], key), signature[key])
                    assert (value == "True") if expected is True else float(value) == expected, (name, key)
            own = inspect.signature(cls.__init__).parameters.items()
            assert {key for key, parameter in own if type(parameter.default) in (int, float)} <= set(stated)


def test_what_the_losses_are():
    from pytorch_metric_learning import distances
    made = {slug: losses.make_loss(row, 6, 8) for slug, row in LOSSES.items()}
    beta = made["margin_per_class"][0].beta
    assert beta.shape == (6,) and beta.requires_grad
    assert made["margin"][0].beta.shape == (1,) and not list(made["margin"][0].parameters())
    assert isinstance(made["snr_contrastive"][0].distance, distances.SNRDistance)
    assert isinstance(made["contrastive"][0].distance, distances.LpDistance)
    assert made["multi_similarity"][1] is None and made["multi_similarity_miner"][1].epsilon == 0.1
    arcface = {"class": "ArcFaceLoss", "num_classes": 6, "embedding_size": 8, "margin": 28.6, "scale": 64}
    assert made["arcface"][2] == arcface
    assert made["multi_similarity_miner"][2]["miner"] == {"class": "MultiSimilarityMiner", "epsilon": 0.1}


def test_the_papers_settings_are_the_defaults():
    args = train.parse(["--dataset", "cars196", "--device", "cpu"])
    assert (args.loss, args.model, args.precision) == ("Normalized Softmax", "inception_v3", "fp32")
    assert (args.dim, args.epochs, args.scale, args.seed) == (64, 20, 10, 1)
    labels = np.repeat(np.arange(196), 2)
    trunk = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    parts = dict(zip(("train", "validation", "test"), train.split_rows(labels, "default")))
    options = {**{name: getattr(args, name) for name in train.OPTIONS}, "lr": train.LR[False]}
    for slug, name, shape in (("normalized_softmax", "W", (64, 78)), ("margin_per_class", "beta", (78,))):
        config = {"options": options, "fold": 0, "dimension": args.dim}
        one = train.Run(config, LOSSES[slug], parts, labels, place(slug))
        one.begin(trunk, 4, None)
        network, loss = one.optimizer.param_groups
        assert isinstance(one.optimizer, torch.optim.AdamW) and (network["lr"], loss["lr"]) == (1e-4, 1e-2)
        assert {*network["params"]} == {*one.network.parameters()} and len(network["params"]) == 6
        own = getattr(one.criterion, name)
        assert len(loss["params"]) == 1 and loss["params"][0] is own and own.shape == shape
    assert networks.inception_v3().transform_input and networks.PREPROCESSING["inception_v3"] == {
        "resize": [299, 299], "crop": None, "channels": "RGB", "scale": 1, "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225]}


def test_normalized_softmax_is_equation_3(p, s=3.0):
    run("--loss", "Normalized Softmax", "--scale", s, "--freeze-trunk", "--epochs", 1)
    parameters = config_of("normalized_softmax")["loss_parameters"]
    assert parameters["temperature"] == pytest.approx(1 / s)
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(5, 4)), np.array([0, 2, 1, 2, 0])
    row = {**LOSSES["normalized_softmax"],
           "parameters": f"num_classes=classes embedding_size=dimension temperature={1 / s}"}
    criterion = losses.make_loss(row, 3, 4)[0]
    w = criterion.W.detach().double().numpy()  # (d, C)
    w, unit = w / np.linalg.norm(w, axis=0), x / np.linalg.norm(x, axis=1, keepdims=True)
    terms = [-math.log(math.exp(s * w[:, y] @ v) / sum(math.exp(s * w[:, j] @ v) for j in range(3)))
             for v, y in zip(unit, labels)]
    assert criterion(torch.tensor(x), torch.tensor(labels)).item() == pytest.approx(np.mean(terms), rel=1e-6)


@pytest.mark.parametrize("slug", LOSSES)
def test_gradients_of_a_step_are_the_losses(slug):
    """step() cuts the graph at the embeddings; the gradients equal those of the plain way."""
    torch.manual_seed(0)
    x, y, grads = torch.randn(12, 6), torch.arange(12) // 3, []
    for plain in (True, False):
        torch.manual_seed(1)
        network, (criterion, miner, _) = torch.nn.Linear(6, 5), losses.make_loss(LOSSES[slug], 4, 5)
        if plain:
            e = network(x)
            criterion(e, y, miner(e, y) if miner else None).backward()
        else:
            train.step(network, criterion, miner, x, y, np.arange(12))
        grads.append([parameter.grad for parameter in [*network.parameters(), *criterion.parameters()]])
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)
    assert grads[0][0].abs().sum() > 0


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("frozen, root", [(False, "m"), (True, "frozen")])
def test_two_epochs_lower_every_loss(everything, monkeypatch, frozen, root):
    folder, printed = everything
    monkeypatch.chdir(folder)
    assert len(printed[frozen]) == 2 + 15
    assert printed[frozen][1].split() == ["loss", "fold", "epoch"] + ["Recall@1", "MAP@R", "JSD", "null"] * 2
    start, trunks, parts = None, set(), ("train", "validation")
    for slug in LOSSES:
        rows, here = history(place(slug, root=root)), place(slug, root=root)
        best = list(rows)[-1]
        assert list(rows) == [(0, "train"), (0, "validation"), (0, "test"), *((1, part) for part in parts),
                              *((2, part) for part in parts), (best[0], "test")]
        assert best[0] == max((1, 2), key=lambda epoch: (rows[epoch, "validation"][6], -epoch))
        assert rows[2, "train"][0] < rows[0, "train"][0], slug
        start = start or rows
        for part in (*parts, "test"):  # every loss begins with the same network
            assert rows[0, part][1:] == start[0, part][1:]
        trunks.add((here / "trunk_best.pth").read_bytes())
        assert sorted(path.name for path in here.iterdir()) == [
            "config.json", "embedder_best.pth", "histograms.csv", "history.csv", "trunk_best.pth"]
    assert (len(trunks) == 1) == frozen
    if frozen:
        assert len({os.stat(place(slug, root=root) / "trunk_best.pth").st_ino for slug in LOSSES}) == 1
    none = {key: [None, *value[1:]] for key, value in start.items() if key[0] == 0}
    assert history(place("none", root=root)) == none
    linear = checkpoints.load_embedder(place("none", root=root) / "embedder_best.pth")
    torch.testing.assert_close(linear.weight, networks.random_linear(72, 8, 1, 0).weight)


def test_what_a_run_writes(everything, monkeypatch):
    monkeypatch.chdir(everything[0])
    folder, config, dataset = place("triplet"), config_of("triplet"), pictures.open_dataset("p")
    test = train.split_rows(dataset.labels, "pictures")[2]
    listed = {"number": 80, "sha256": pictures.pictures_sha256(dataset.relative)}
    split = {"kind": "pictures", "label": "class", "seed": 1, "train": 54, "validation": 6,
             "test": test.tolist(), "pictures": listed}
    expected = {
        "dataset": "p", "loss": "Triplet", "type": "ranking", "fold": 0, "backbone": "tiny_networks:tiny",
        "dimension": 8, "distance": "euclidean", "frozen_trunk": False, "split": {**config["split"], **split},
        "loss_parameters": {"class": "TripletMarginLoss", "margin": 0.05}}
    assert {**config, **expected} == config
    assert config_of("normalized_softmax")["loss_parameters"]["temperature"] == 0.1
    rows = history(folder)
    assert list(rows.values())[-1][1:] == pytest.approx(scores_of("triplet", test), abs=1e-5)
    bins = files.read_table(folder / "histograms.csv")
    for epoch in {"0", str(list(rows)[-1][0])}:
        chosen = [i for i, e in enumerate(bins["epoch"]) if e == epoch]
        assert sum(int(bins[sign][i]) for sign in ("positive", "negative") for i in chosen) == 20 * 19 // 2
        assert len(chosen) == 200


def test_what_is_tested_is_the_best_epoch_with_its_own_proxies(p):
    """Stopped at that epoch, a run tests the same network and the same loss."""
    options = ("--loss", "ProxyNCA", "--freeze-trunk", "--lr", 0.03)
    run(*options, "--epochs", 12)
    rows = history(place("proxy_nca"))
    best = list(rows)[-1][0]
    assert best < 12
    run(*options, "--epochs", best, "--models", "short")
    short = history(place("proxy_nca", root="short"))
    assert short[best, "test"] == rows[best, "test"] and short[best, "test"][0] is not None
    assert short[best, "train"] == rows[best, "train"]


def test_classes_that_were_not_trained_have_no_proxy_loss(tmp_path):
    """By class, in bfloat16, with what else there is to choose."""
    make_pictures(tmp_path / "p", 20, 4)
    chosen = {"precision": "bf16", "schedule": "cosine", "select": "jsd", "train_sample": 20, "per_class": 2,
              "batch": 8, "weight_decay": 0.0}
    more = [str(text) for name, value in chosen.items() for text in (f"--{name.replace('_', '-')}", value)]
    run("--split", "default", "--loss", "Normalized Softmax,Contrastive", *more)
    for slug, known in (("normalized_softmax", False), ("contrastive", True)):
        rows, options = history(place(slug, 0, "p")), config_of(slug, 0, "p")["options"]
        assert rows[1, "train"][0] is not None and (rows[1, "validation"][0] is not None) == known
        assert {**options, **chosen} == options
        assert list(rows)[-1][0] == max((1, 2), key=lambda epoch: (rows[epoch, "validation"][3], -epoch))


def test_other_splits_and_seeds_live_side_by_side(tmp_path):
    """Oi's Table 1: default and random order of the classes, two seeds each, to the results of both."""
    make_pictures(tmp_path / "p", 20, 4)
    for split, seed in product(("default", "random"), (1, 2)):
        run("--split", split, "--seed", seed, "--loss", "Triplet", "--freeze-trunk", "--epochs", 1)
    for dataset in ("p", "p@random"):
        arguments = ["--dataset", dataset, "--models", "m", "--out", "r", "--model", "tiny_networks:tiny"]
        embed.main([*arguments, "--loss", "Triplet"])
        saliency.main([*arguments, "--loss", "Triplet", "--limit", "2", "--samples", "2"])
        names = sorted(path.name for path in Path("r", dataset, "triplet").iterdir())
        assert names == ["fold0", "fold0.seed2"]
        for fold in (0, "0.seed2"):
            config, folder = config_of("triplet", fold, dataset), Path(f"r/{dataset}/triplet/fold{fold}")
            beside = files.read_sidecar(folder / "emb.npy")
            assert (beside["rows"], beside["fold"]) == (config["split"]["test"], fold)
            assert beside["checkpoint"] == str(place("triplet", fold, dataset))
            assert (beside["distance"], beside["preprocessing"]["crop"]) == ("euclidean", 32)
            assert np.load(folder / "emb.npy").shape == (len(config["split"]["test"]), 8)
            assert np.load(folder / "maps.npy").shape == (2, 32, 32)
        noise = [files.read_sidecar(f"r/{dataset}/triplet/fold{fold}/maps.npy")["options"]["noise_of"]
                 for fold in (0, "0.seed2")]
        assert noise == ["Triplet fold 0", "Triplet fold 0.seed2"]  # independent of one another
    places = product((0, "0.seed2"), ("p", "p@random"))
    tests = [config_of("triplet", *where)["split"]["test"] for where in places]
    assert tests[0] == tests[2] == list(range(40, 80)) and len({*map(str, tests)}) == 3
    default, random = results.read_all(Path("r"), Path("m"))
    for one, split in (default, "default"), (random, "random"):
        rows = one.select("training", key="map_at_r", part="test", epoch="best")
        assert {(row.split, row.fold, row.seed) for row in rows if row.fold == 0} >= {
            (split, 0, None), (split, 0, 2)}
    assert run("--split", "random", "--seed", 2, "--loss", "Triplet", "--freeze-trunk", "--epochs", 1) == 0
    assert [spec["name"] for spec in networks.find("p@random", "Triplet", "0.seed2", "tiny_networks:tiny",
                                                   folder="m")] == ["Triplet fold 0.seed2"]


def test_the_recipe_of_the_published_networks(tmp_path, capsys):
    """Musgrave et al.'s: their configuration files' numbers; what differs from it is said."""
    args = train.parse(["--dataset", "cars196", "--recipe", "musgrave", "--device", "cpu"])
    assert (args.model, args.dim, args.split, args.batch) == ("bninception", 128, "folds", 32)
    assert (args.optimizer, args.lr, args.weight_decay, args.crop) == ("RMSprop", 1e-6, 1e-4, 0.16)
    assert (args.epochs, args.steps, args.patience, args.select) == (1000, 100, 9, "map_at_r")
    assert args.freeze_norm and args.per_class is None
    make_pictures(tmp_path / "p", 20, 4)
    arguments = ["--dataset", "p", "--recipe", "musgrave", "--model", "tiny_networks:norm", "--dim", "8",
                 "--models", "m", "--device", "cpu", "--patience", "2", "--steps", "3", "--batch", "8",
                 "--lr", "1e-3"]
    capsys.readouterr()
    assert train.main([*arguments, "--loss", "Triplet,Normalized Softmax"]) == 0
    assert "the recipe of musgrave, but model tiny_networks:norm, dim 8, steps 3, patience 2, lr 0.001\n" in (
        capsys.readouterr().err)
    for slug, each in ("triplet", 4), ("normalized_softmax", 1):
        rows, options = history(place(slug, 0, "p@folds")), config_of(slug, 0, "p@folds")["options"]
        assert (options["recipe"], options["per_class"], options["crop"]) == ("musgrave", each, 0.16)
        best, last = list(rows)[-1][0], list(rows)[-2][0]
        assert last - best == 3 and last < 100  # stopped: the best epoch is more than two ago
        untrained = networks.from_factory("tiny_networks:norm").state_dict()
        trained = checkpoints.read_state(place(slug, 0, "p@folds") / "trunk_best.pth")
        for name in ("running_mean", "running_var", "num_batches_tracked", "weight", "bias"):
            same = torch.equal(untrained[f"layers.1.{name}"], trained[f"layers.1.{name}"])
            assert same == (name not in ("weight", "bias")), name


# ---------------------------------------------------------------- long runs


def same(slug, root, other="m"):
    """Two runs' folders hold the same numbers."""
    a, b = place(slug, root=root), place(slug, root=other)
    assert history(a) == history(b)
    for name in ("trunk_best.pth", "embedder_best.pth", "histograms.csv"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_a_killed_run_continues_to_the_same_numbers(p):
    """kill -9 in the third epoch or later; dropout draws its own numbers; workers change no crop."""
    options = ["--model", "tiny_networks:dropping", "--loss", "ProxyNCA", "--epochs", "8", "--workers", "1"]
    checkpoint = place("proxy_nca") / "checkpoint.pth"

    def epoch():
        return torch.load(checkpoint, weights_only=True)["state"]["epoch"] if checkpoint.exists() else 0

    process = start("train.py", *OPTIONS, "--dataset", "p", *options, slow=0.1)
    while process.poll() is None and epoch() < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    assert 3 <= epoch() < 8 and not (place("proxy_nca") / "embedder_best.pth").exists()
    run(*options)
    run(*options, "--models", "uninterrupted", "--workers", 5)
    same("proxy_nca", "uninterrupted")
    assert not checkpoint.exists()


def test_commands_at_one_moment_train_one_network(p):
    """Three at once, one of them with another rate: no network is of two; who comes too late is refused."""
    command = ("train.py", *OPTIONS, "--dataset", "p", "--loss", "Triplet", "--lr")
    processes = {name: start(*command, rate, stdout=subprocess.DEVNULL)
                 for name, rate in (("a", 0.001), ("b", 0.001), ("c", 0.01))}
    said = {name: process.communicate()[1] for name, process in processes.items()}
    rate = config_of("triplet")["options"]["lr"]
    statuses = {name: process.returncode for name, process in processes.items()}
    assert statuses == ({"a": 0, "b": 0, "c": 2} if rate == 0.001 else {"a": 2, "b": 2, "c": 0}), said
    assert all("made with other options" in said[name] for name in said if statuses[name])
    run("--loss", "Triplet", "--lr", rate, "--models", "alone")
    same("triplet", "alone")
    assert not list(place("triplet").glob("*checkpoint*"))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_run_killed_at_any_write_continues_to_the_same_numbers(p, monkeypatch, frozen):
    """As a kill leaves it: no file after the n-th is written, and of that one a temporary name stays."""
    options = ["--model", "tiny_networks:dropping", "--loss", "Margin / class", *["--freeze-trunk"] * frozen]
    names, whole = [], files.write_file

    def patch(write):
        for module in (files, checkpoints):
            monkeypatch.setattr(module, "write_file", write)

    patch(lambda path, content: names.append(path.name) or whole(path, content))
    run(*options, "--models", "uninterrupted")
    last = ["history.csv", "histograms.csv", *["trunk_best.pth"] * (not frozen), "embedder_best.pth"]
    assert names[-len(last):] == last and names.count("checkpoint.pth") == 2

    def dies(path, content):
        names.append(path.name)
        if len(names) == at:
            path.with_name(f".{path.name}.x.part").write_bytes(content[:9])
            raise KeyboardInterrupt
        whole(path, content)

    for at in range(1, len(names) + 1):
        names = []
        patch(dies)
        with pytest.raises(KeyboardInterrupt):
            run(*options, "--models", f"m{at}")
        assert not (place("margin_per_class", root=f"m{at}") / "embedder_best.pth").exists()
        patch(whole)
        run(*options, "--models", f"m{at}")
        same("margin_per_class", f"m{at}", "uninterrupted")
        assert not list(place("margin_per_class", root=f"m{at}").glob("*checkpoint*"))
    left = place("margin_per_class", root="uninterrupted") / "checkpoint.pth"
    left.write_bytes(b"killed before this was removed")
    run(*options, "--models", "uninterrupted")
    assert not left.exists()


def test_another_frozen_trunk_takes_nothing_of_the_last(p, refused):
    """Features and trunk stay beside the networks; no other backbone, no pictures made anew may use them."""
    other = ("--freeze-trunk", "--model", "tiny_networks:norm")
    run("--loss", "None", "--freeze-trunk")
    refused("features.npy was made with other options .*backbone", "--loss", "Triplet", *other)
    Path("m/trained/p@pictures/features.npy").unlink()
    run("--loss", "Triplet", *other)
    assert "layers.1.running_var" in checkpoints.read_state(place("triplet") / "trunk_best.pth")
    Image.new("RGB", (44, 50)).save(p / "0" / "0.png")
    refused(r"features.npy was made with other options \(bytes: ", "--loss", "Contrastive", *other)


def torchrun(*arguments):
    """The lines that two processes print."""
    process = start("train.py", *OPTIONS, "--dataset", "p", *arguments, before=[*TORCHRUN, "2"],
                    stdout=subprocess.PIPE)
    printed, said = process.communicate()
    assert process.returncode == 0, said
    return printed.splitlines()


@pytest.mark.parametrize("slugs, more, first", [
    (["multi_similarity_miner", "soft_triple"], [], 0),
    (["contrastive", "fastap", "cosface"], ["--freeze-trunk"], 1)])
def test_two_processes_train_what_one_does(p, slugs, more, first):
    """DistributedDataParallel, or shares of the frozen runs: sums in another order."""
    options = ("--loss", ",".join(LOSSES[slug]["name"] for slug in slugs), *more)
    assert len(torchrun(*options, "--models", "two")) == 2 + len(slugs)
    run(*options)
    if more:
        features = [np.load(f"{root}/trained/p@pictures/features.npy") for root in ("m", "two")]
        np.testing.assert_allclose(*features, atol=1e-5)
    for slug in slugs:
        ours, theirs = history(place(slug)), history(place(slug, root="two"))
        assert list(ours) == list(theirs)
        for key in ours:
            np.testing.assert_allclose(ours[key][first:], theirs[key][first:], atol=1e-4)
        for name in () if more else ("trunk_best.pth", "embedder_best.pth"):
            a, b = (checkpoints.read_state(place(slug, root=root) / name) for root in ("m", "two"))
            for key in a:
                torch.testing.assert_close(a[key], b[key], atol=1e-4, rtol=0)


def test_two_processes_score_the_network_they_save(p):
    """Batch norm's running statistics are each process's own in training; the first one's are kept."""
    torchrun("--model", "tiny_networks:norm", "--loss", "Triplet", "--lr", "1e-2", "--epochs", "4",
             "--patience", "1")
    rows = history(place("triplet"))
    chosen = train.split_rows(pictures.open_dataset("p").labels, "pictures", 0)[0]
    scores = scores_of("triplet", chosen, "norm")
    assert rows[list(rows)[-1][0], "train"][1:3] == pytest.approx(scores[:2], abs=1e-6)


def test_a_part_may_have_fewer_pictures_than_ranks(monkeypatch):
    monkeypatch.setattr(train, "gather", lambda values, mine, number: (values, mine))
    network, rows, table = torch.nn.Linear(4, 3), np.array([5, 2, 7]), torch.randn(9, 4)

    def feed(batches):
        return ((batch, table[batch]) for batch in batches)

    shares = [train.embed(network, feed, rows, 2, (k, 5)) for k in range(5)]
    assert [len(mine) for _, mine in shares] == [1, 1, 1, 0, 0]
    torch.testing.assert_close(torch.cat([values for values, _ in shares]), network(table[rows]).detach())


def test_nothing_is_done_twice(p, capsys, monkeypatch):
    """All folds, whose test parts are all pictures; of another version of torch or of train.py too."""
    options = ("--loss", "Triplet,None", "--freeze-trunk", "--fold", "all", "--epochs", 1)
    run(*options)
    first = capsys.readouterr().out
    assert len(first.splitlines()) == 2 + 2 * 5 and first.count(" mean ") == 2
    held_out = [row for fold in range(4) for row in config_of("none", fold)["split"]["test"]]
    assert sorted(held_out) == list(range(80))
    path, config = place("triplet") / "config.json", config_of("triplet")
    config["versions"]["torch"] = "0.1"
    for name in train.LATER:  # which older versions did not write
        del config["options"][name]
    path.write_text(json.dumps(config))
    monkeypatch.setattr(train.Run, "train", None)
    run(*options)
    again = capsys.readouterr()
    assert again.out == first and "nothing to do: 8 of 8 networks are there" in again.err


def test_a_frozen_trunks_runs_do_not_depend_on_threads(p, run_script):
    options = ["--dataset", "p", "--loss", "SoftTriple", "--freeze-trunk"]
    run(*options)
    Path("two/trained/p@pictures").mkdir(parents=True)
    for name in ("features.npy", "features.json", "trunk.pth"):  # whose convolutions may add in another order
        os.link(Path("m/trained/p@pictures") / name, Path("two/trained/p@pictures") / name)
    run_script("train.py", *OPTIONS, *options, "--models", "two",
               env={**os.environ, "OMP_NUM_THREADS": "3"}).check_returncode()
    same("soft_triple", "two")
    threads = config_of("soft_triple", root="two")["versions"]["threads"]
    assert threads in (2, 3) or os.cpu_count() == 1  # torch takes no more than there are cores


def test_a_loss_that_diverges_does_not_stop_the_others(p, monkeypatch, capsys):
    """It is named, marked and not tried again; nobody takes what is left for a network."""
    def poison(network, criterion, *rest):
        steps.append(1)
        if len(steps) == 4:
            with torch.no_grad():
                criterion.proxies.fill_(float("nan"))
        return whole(network, criterion, *rest)

    steps, whole = [], train.step
    monkeypatch.setattr(train, "step", poison)
    assert run("--loss", "ProxyNCA,Triplet", "--epochs", 3) == 3
    told = capsys.readouterr()
    reason = "epoch 2, step 1 of 3: the loss is no number, at learning rates 0.0001 and 0.01"
    assert f"ProxyNCA fold 0 diverged in {reason}" in told.err
    assert told.out.splitlines()[2].split()[:3] == ["ProxyNCA", "0", "diverged"]
    assert config_of("proxy_nca")["diverged"] == reason
    assert list(history(place("proxy_nca")))[-1] == (1, "validation")
    assert list(history(place("triplet")))[-1][1] == "test"
    assert sorted(path.name for path in place("proxy_nca").iterdir()) == [
        "config.json", "histograms.csv", "history.csv"]
    with pytest.raises(FileNotFoundError):
        networks.find("p@pictures", "ProxyNCA", "0", folder=Path("m"))
    done = len(steps)
    assert run("--loss", "ProxyNCA,Triplet", "--epochs", 3) == 3 and len(steps) == done
    assert capsys.readouterr().out == told.out
    assert run("--loss", "Triplet", "--lr", 1e30, "--models", "n") == 3
    assert "Triplet fold 0 diverged in epoch 1" in capsys.readouterr().err


# ---------------------------------------------------------------- bad input


@pytest.fixture
def refused(capsys):
    """refused(pattern, arguments …): ends with one line that matches, and nothing on stdout."""
    def refused(pattern, *arguments):
        capsys.readouterr()
        with pytest.raises((ValueError, OSError, SystemExit)) as end:
            run(*arguments)
        captured = capsys.readouterr()
        assert captured.out == "" and getattr(end.value, "code", 2) == 2
        line = captured.err if isinstance(end.value, SystemExit) else f"{end.value}\n"
        assert line.count("\n") == 1 and re.search(pattern, line), line
    return refused


def test_labels_that_do_not_fit(p, refused, tmp_path):
    make_pictures(tmp_path / "q", 1, 3)
    for path in (tmp_path / "q" / "0").iterdir():
        path.rename(tmp_path / "q" / path.name)
    (tmp_path / "q" / "0").rmdir()
    table = tmp_path / "labels.csv"
    for pattern, labels in (("labels.csv has 79 labels, p 80 pictures; expected a row for each", [1] * 79),
                            ("the 80 labels are all distinct", range(80)),
                            ("the 80 labels are one class", [1] * 80)):
        table.write_text("\n".join(["label", *map(str, labels)]) + "\n")
        refused(pattern, "--labels", table, "--label", "label")
    refused("no property .model.; it has label", "--labels", "labels.csv", "--label", "model")
    refused("p has no label 'super_class'; it has class", "--label", "super_class")
    cars = ROOT / "examples/cars"
    refused("props.csv has no property 'class'; it has model, ", "--dataset", cars, "--label", "class")
    refused("q has no labels; .*--labels FILE.csv", "--dataset", "q")
    assert not Path("m").exists()


@pytest.mark.parametrize("pattern, arguments", [
    ("split default of 80 pictures in 4 classes: the validation part has 0 pictures of 0 classes; .*--split "
     "pictures keeps", ("--split", "default")),
    ("split folds of .* the validation part has 0 pictures of 0 classes", ("--split", "folds")),
    ("the validation part has 0 pictures of 0 classes", ("--dataset", "few")),
    ("--batch 4: expected at least 8", ("--batch", 4)),
    ("--per-class 1: expected at least 2", ("--per-class", 1)),
    ("fold 4: expected 0, 1, 2 or 3", ("--fold", 4)),
    ("--lr 0.0: expected a positive number", ("--lr", 0)),
    ("--lr nan: expected a positive number", ("--lr", "nan")),
    ("invalid float value: 'fast'", ("--lr", "fast")),
    ("--epochs 0: expected at least 1", ("--epochs", 0)),
    ("--train-sample 2 of fold 0 has 2 pictures of 2 classes; expected two", ("--train-sample", 2)),
    ("odd:whole gives torch.int64; expected floating-point", ("--model", "odd:whole")),
    ("--freeze-trunk trains none .* --train-from a part", ("--freeze-trunk", "--train-from", "layers.1")),
    ("no block 'layer' in the network; did you mean layers", ("--train-from", "layer")),
    ("--input-size 0: expected at least 1", ("--input-size", 0)),
    (r"tiny_networks:tiny fails on a picture \(3, 4, 4\): .*size", ("--input-size", 4)),
    ("--crop 1.5: expected a share of the picture, at most 1", ("--crop", 1.5)),
    ("--patience -1: expected at least 0", ("--patience", -1)),
    ("invalid choice: 'kobs'", ("--recipe", "kobs")),
    ("--type ranking is of a loss package.module:Class", ("--type", "ranking", "--loss", "Triplet")),
    ("--dataset p@random: give the name alone, and --split beside it", ("--dataset", "p@random")),
    ("fold 0.seed2: expected", ("--fold", "0.seed2")),
    ("p/1/3.png: can't be read as a picture", ("--freeze-trunk",)),
    ("p/1/3.png: can't be read as a picture", ())])
def test_what_can_not_be(p, refused, pattern, arguments):
    make_pictures(Path("few"), 2, 3)
    Path("odd.py").write_text("from torch import nn\nclass whole(nn.Flatten):\n"
                              "    def forward(self, x): return super().forward(x).long()\n")
    if "png" in pattern:
        (p / "1" / "3.png").write_bytes(b"no picture")
    refused(pattern, *arguments)


def test_other_options_are_named(p, refused, monkeypatch):
    def stop(self, network):
        if self.epoch == 2:
            raise KeyboardInterrupt
        return whole(self, network)

    whole = train.Run.train_epoch
    monkeypatch.setattr(train.Run, "train_epoch", stop)
    with pytest.raises(KeyboardInterrupt):
        run("--loss", "Triplet")
    monkeypatch.setattr(train.Run, "train_epoch", whole)
    refused(r"triplet/fold0 was made with other options \(options.lr: 0.0001 there, 0.001 now\)",
            "--loss", "Triplet", "--lr", 1e-3)
    run("--loss", "Triplet")
    refused(r"was made with other options \(.*dimension: 8 there, 4 now.*\)", "--loss", "Triplet", "--dim", 4)
    place("contrastive").mkdir(parents=True)
    (place("contrastive") / "config.json").write_text((place("triplet") / "config.json").read_text())
    run("--loss", "Contrastive")  # of nothing begun a config.json does not count
    (place("contrastive") / "embedder_best.pth").unlink()
    (place("contrastive") / "checkpoint.pth").write_bytes(b"broken")
    refused("checkpoint.pth: damaged .*remove it to begin anew", "--loss", "Contrastive")


def test_the_command_line(p, run_script):
    one_line(run_script("train.py", "--dataset", "p", "--loss", "tripplet"),
             "unknown loss 'tripplet': did you mean Triplet")


def test_learns_from_one_data_set_and_is_tested_on_another(p, tmp_path):
    make_pictures(tmp_path / "q", 3, 5)
    for more in (), ("--train-from", "layers.2", "--models", "f"):
        assert run("--loss", "Triplet", "--test", "q", *more) == 0
        root = "f" if more else "m"
        config = config_of("triplet", root=root)["split"]
        assert (config["train"], config["validation"], config["tested_on"]) == (72, 8, "q")
        assert "test" not in config and config["pictures"]["number"] == 95
        embed.main(["--dataset", "q", "--trained-on", "p@pictures", "--loss", "Triplet", "--fold", "0",
                    "--model", "tiny_networks:tiny", "--models", root, "--out", f"r{root}"])
        x = np.load(f"r{root}/q/triplet/fold0/emb.npy")
        told = history(place("triplet", root=root))
        best = max(epoch for epoch, part in told if part == "test")
        expected = scores(x, np.repeat([0, 1, 2], 5))
        np.testing.assert_allclose(told[best, "test"][1:], expected, atol=1e-5)
    for wrong, words in (("p", "is the data set itself"), ("nothing", "no such folder")):
        with pytest.raises((ValueError, OSError), match=words):
            run("--loss", "Triplet", "--test", wrong)
