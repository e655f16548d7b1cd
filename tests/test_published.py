"""The papers' own data sets, from the published layouts to the page.

Miniatures of Cars196 (both layouts), CUB200 and SOP, with checkpoints in the published layout for three
losses and two folds, go through every script.
"""
import itertools
import json
import re

import numpy as np
import pytest
from PIL import Image
from published_sets import embedder_state, make_cars, make_cub, make_sop, make_stanford, publish, trunk_state

from dml_common.files import losses, read_table

LOSSES = ("Triplet", "Normalized Softmax", "SNR Contrastive")  # two ranking losses and a classification loss
CLASSES = (2, 98, 101, 120, 150, 196)  # numbered from 1: two to train on, four to test on
EACH = 3  # pictures of a class
@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The checkout's scripts would look into models/ and data/: here both are a temporary folder's."""
    home, trunk = tmp_path_factory.mktemp("published"), trunk_state()
    make_cars(home / "data", [label for label in CLASSES for _ in range(EACH)])
    make_stanford(home / "torchvision", train=[label for label in CLASSES for _ in range(EACH - 1)],
                  test=CLASSES)  # every class in both halves
    names = [f"{label:03d}.Bird_{label}/bird_{i}.jpg" for label in CLASSES for i in range(EACH)]
    make_cub(home / "data/cub200/CUB_200_2011", names)
    for name in names:
        mask, left = np.zeros((64, 96), np.uint8), int(name[:3]) * 7 % 56
        mask[16:48, left:left + 32] = 255
        path = (home / "data/cub200/CUB_200_2011/segmentations" / name).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)
    lines = [(label, 1 + label % 2, f"{('bicycle', 'toaster')[label % 2]}_final/{label}_{i}.JPG")
             for label in CLASSES for i in range(EACH)]
    make_sop(home / "data", train=lines[:2 * EACH], test=lines[2 * EACH:])
    for row in losses():
        if row["name"] in LOSSES:
            for dataset, fold in itertools.product(("cars196", "cub200", "sop"), (0, 1)):
                embedder = embedder_state(10 * LOSSES.index(row["name"]) + fold)
                publish(home / "models", trunk, embedder, fold, row[dataset])
    return home


@pytest.mark.parametrize("dataset", ["cars196", "cub200", "sop"])
def test_a_published_data_set_from_its_archives_to_the_page(home, run_script, run_main, monkeypatch, dataset):
    """The card's own commands first, then the others, as one would type them but for the folders. What takes
    time is done for one: both folds, and each command in a process of its own."""
    monkeypatch.chdir(home)
    command, fold = (run_script, []) if dataset == "cub200" else (run_main, ["--fold", "0"])
    results = home / "results" / dataset
    folders = ["--data-root", home / "data", "--models", home / "models"]
    shown = ["--dataset", dataset, "--data-root", home / "data"]

    def run(script, *arguments):
        done = command(script, *arguments)
        assert done.returncode == 0, f"{script} {' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stdout

    chosen = ["--dataset", dataset, *folders, *fold]
    maps = ["--samples", 1, "--limit", 3, "--map-size", 28, "--shared-noise", "--out", "results"]
    run("saliency.py", *chosen, *maps, "--ceiling")
    run("embed.py", *chosen, "--out", "results")
    embeddings = sorted(results.glob("*/fold*/emb.npy"))
    assert len(embeddings) == len(LOSSES) * (1 if fold else 2)
    assert all(np.load(path).shape == (4 * EACH, 128) for path in embeddings)
    run("nrprec.py", embeddings[0], results / "labels.csv")
    run("nrprec.py", *embeddings, results / "labels.csv", "--permutations", 20,
        "--out", results / "nrprec.csv")
    run("pairs.py", *embeddings, "--out", results / "pairs.csv", "--histograms", results / "histograms.csv")
    masks = ["--masks"] if dataset == "cub200" else []
    run("compare.py", *shown, "--results", "results", "--embeddings", *masks)
    run("tables.py", "results/" + dataset, "--models", home / "models", "--out", results / "tables")
    run("figures.py", "results/" + dataset, "--dataset", dataset, *folders, "--out", results / "figures")
    run("report.py", "results/" + dataset, "--tables", results / "tables", "--figures", results / "figures",
        *shown, "--out", results / "report.html")

    rows = read_table(results / "nrprec.csv")
    assert set(rows["property"]) >= {"class"} and len(set(rows["embeddings"])) == len(embeddings)
    tables = json.loads((results / "tables" / "tables.json").read_text())["tables"]
    papers = {table["name"]: table["paper"] for table in tables}
    expected = {"sop": ("correlation_sop", "Table 2"), "cars196": ("correlation_by_type_cars196", "Table 3"),
                "cub200": ("correlation_by_type_cub200", "Table 4")}[dataset]
    assert papers[expected[0]] == expected[1]
    figures = json.loads((results / "figures" / "figures.json").read_text())
    drawn = {one["name"].removesuffix(f"_{dataset}") for one in figures["figures"]}
    assert drawn >= {"profile", "correlation", "gallery", "pairs"}, figures["missing"]
    page = (results / "report.html").read_text()
    assert len(re.findall(r"data:image/(?:webp|png|jpeg)", page)) > 3  # pictures, not maps alone
    assert "Traceback" not in page


def test_both_layouts_of_cars196_list_the_same_pictures_in_the_same_classes(home):
    from dml_common.pictures import open_dataset

    one, other = open_dataset("cars196", home / "data"), open_dataset("cars196", home / "torchvision")
    assert sorted(one.labels.tolist()) == sorted(other.labels.tolist()) and one.classes == other.classes


def test_tables_of_the_published_numbers_stand_beside(home, run_main):
    done = run_main("tables.py", home / "results", "--published", "--out", home / "beside", "--models",
                    home / "models")
    assert done.returncode == 0, done.stderr
    assert (home / "beside" / "missing.csv").read_text().startswith("dataset,table,what\n")
