"""The papers' own data sets, from the published layouts to the page.

Miniatures of Cars196 (both layouts), CUB200 and SOP, with checkpoints in the published layout for three
losses and two folds, go through every script.
"""
import csv
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from dml_common import networks
from dml_common.files import losses, read_table

LOSSES = ("Triplet", "Normalized Softmax", "SNR Contrastive")  # two ranking losses and a classification loss
CLASSES = (2, 98, 101, 120, 150, 196)  # numbered from 1: two to train on, four to test on
EACH = 3  # pictures of a class
CARS = np.array([[f"Car {i}" for i in range(1, 197)]], object)


def pictures(folder, names, size=(96, 64)):
    """A coloured rectangle on noise for every (class, name); the class sets its colour and place."""
    rng = np.random.default_rng(0)
    for label, name in names:
        pixels = rng.integers(90, 160, (size[1], size[0], 3))
        left = label * 7 % (size[0] - 40)
        pixels[16:48, left:left + 32] = [label * 37 % 256, label * 91 % 256, label * 53 % 256]
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path, quality=95)


def annotations(rows, fields):
    """MATLAB's struct array as scipy reads the published files'."""
    array = np.empty((1, len(rows)), [(field, object) for field in fields])
    for i, row in enumerate(rows):
        array[0, i] = row
    return array


def make_cars(root):
    """cars_annos.mat and car_ims/."""
    labels = [label for label in CLASSES for _ in range(EACH)]
    names = [(label, f"car_ims/{i:06d}.jpg") for i, label in enumerate(labels, 1)]
    pictures(root / "cars196", names)
    rows = [(name, 1, 1, 5, 5, label, int(label > 98)) for label, name in names]
    fields = ["relative_im_path", "bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "test"]
    content = {"annotations": annotations(rows, fields), "class_names": CARS}
    savemat(root / "cars196" / "cars_annos.mat", content)


def make_stanford(root):
    """The same in torchvision's layout: every class in both halves."""
    home = root / "stanford_cars"
    fields = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"]
    for half, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        kept = range(2) if half == "train" else range(2, EACH)
        names = [(label, f"{EACH * i + j + 1:05d}.jpg") for i, label in enumerate(CLASSES) for j in kept]
        pictures(home / f"cars_{half}", names)
        (home / "devkit").mkdir(exist_ok=True)
        savemat(home / file, {"annotations": annotations([(1, 1, 5, 5, *one) for one in names], fields)})
    savemat(home / "devkit" / "cars_meta.mat", {"class_names": CARS})


def make_cub(root):
    """images.txt, image_class_labels.txt, images/ and segmentations/."""
    home = root / "cub200" / "CUB_200_2011"
    names = [(label, f"{label:03d}.Bird_{label}/bird_{i}.jpg") for label in CLASSES for i in range(EACH)]
    pictures(home / "images", names)
    (home / "images.txt").write_text("".join(f"{i} {name}\n" for i, (_, name) in enumerate(names, 1)))
    labels = "".join(f"{i} {label}\n" for i, (label, _) in enumerate(names, 1))
    (home / "image_class_labels.txt").write_text(labels)
    for label, name in names:
        mask = np.zeros((64, 96), np.uint8)
        mask[16:48, label * 7 % 56:label * 7 % 56 + 32] = 255
        path = (home / "segmentations" / name).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)


def make_sop(root):
    """Ebay_train.txt, Ebay_test.txt and the folders of the super-classes."""
    home = root / "sop" / "Stanford_Online_Products"
    for split, kept in (("train", CLASSES[:2]), ("test", CLASSES[2:])):
        lines = [(label, 1 + label % 2, f"{('bicycle', 'toaster')[label % 2]}_final/{label}_{i}.JPG")
                 for label in kept for i in range(EACH)]
        pictures(home, [(label, name) for label, _, name in lines])
        rows = [f"{i} {label} {kind} {name}" for i, (label, kind, name) in enumerate(lines, 1)]
        text = "\n".join(["image_id class_id super_class_id path", *rows]) + "\n"
        (home / f"Ebay_{split}.txt").write_text(text)


def publish(folder, dataset):
    """Checkpoints of three losses and two folds, where and as the published ones are."""
    rows = {row["name"]: row for row in losses()}
    torch.manual_seed(0)
    trunk = networks.bninception()
    for name, tensor in trunk.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
    for number, loss in enumerate(LOSSES):
        for fold in (0, 1):
            place = folder / rows[loss][dataset] / f"Test50_50_Partitions4_{fold}" / "saved_models"
            place.mkdir(parents=True)
            torch.save(trunk.state_dict(), place / "trunk_best.pth")
            torch.manual_seed(10 * number + fold)
            layer = torch.nn.Linear(1024, 128)
            state = {f"{prefix}.{key}": value.detach() for prefix in ("net.0", "last_linear")
                     for key, value in layer.named_parameters()}
            torch.save(state, place / "embedder_best.pth")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The checkout's scripts would look into models/ and data/: here both are a temporary folder's."""
    home = tmp_path_factory.mktemp("published")
    for make in (make_cars, make_cub, make_sop):
        make(home / "data")
    make_stanford(home / "torchvision")
    for dataset in ("cars196", "cub200", "sop"):
        publish(home / "models", dataset)
    return home


@pytest.mark.parametrize("dataset", ["cars196", "cub200", "sop"])
def test_a_published_data_set_from_its_archives_to_the_page(home, run_script, dataset):
    """The card's own commands first, then the others, as one would type them but for the folders."""
    results = home / "results" / dataset
    folders = ["--data-root", home / "data", "--models", home / "models"]
    shown = ["--dataset", dataset, "--data-root", home / "data"]

    def run(script, *arguments):
        done = run_script(script, *arguments, cwd=home)
        assert done.returncode == 0, f"{script} {' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stdout

    chosen = ["--dataset", dataset, *folders]
    maps = ["--samples", 1, "--limit", 3, "--map-size", 28, "--shared-noise", "--out", "results"]
    run("saliency.py", *chosen, *maps, "--ceiling")
    run("embed.py", *chosen, "--out", "results")
    embeddings = sorted(results.glob("*/fold*/emb.npy"))
    assert len(embeddings) == len(LOSSES) * 2
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


def test_tables_of_the_published_numbers_stand_beside(home, run_script):
    done = run_script("tables.py", home / "results", "--published", "--out", home / "beside", "--models",
                      home / "models")
    assert done.returncode == 0, done.stderr
    with open(home / "beside" / "missing.csv", newline="") as file:
        assert next(csv.reader(file)) == ["dataset", "table", "what"]
