"""report.py: what stands on the page, that nothing read can run there, that it works in a browser, every bad input."""
import base64
import csv
import hashlib
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import report
from dml_common.pictures import pictures_sha256

ROOT = Path(__file__).resolve().parent.parent
# Names that close what they stand in, in HTML, in attributes, in scripts, in JSON and in templates.
NASTY = ["</script><script>window.pwned=1</script>", '"><img src=x onerror="window.pwned=1">', "<!--<script>",
         "a\u2028b&amp;'`${window.pwned=1}{{ 7 * 7 }}"]


# ---------------------------------------------------------------- small results to report on


def write_json(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")


def about_of(loss, fold, names, **options):
    return {
        "dataset": "cars", "split": "test", "loss": loss, "fold": fold, "distance": "euclidean",
        "backbone": "efficientnet_lite0", "checkpoint": f"models/trained/cars/{loss}/fold{fold}",
        "checkpoint_sha256": f"{fold}abcdef0123456789", "seed": None, "versions": {"numpy": "2.0"},
        "preprocessing": {"resize": 12, "crop": 10, "channels": "RGB", "scale": 1, "mean": [0, 0, 0], "std": [1, 1, 1]},
        "options": {"samples": 20, "order": "paper", "seed": 0, "shared_noise": False, **options},
        "pictures": {"number": len(names), "sha256": pictures_sha256(names)},
    }


def write_csv(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def add_network(results, slug, loss, fold, names, ceiling=True, **options):
    folder = results / "cars" / slug / f"fold{fold}"
    folder.mkdir(parents=True)
    random = np.random.default_rng(len(slug) + fold)
    arrays = {"emb": random.normal(size=(len(names), 4)).astype(np.float32),
              "maps": random.random((len(names), 10, 10)).astype(np.float16)}
    if ceiling:
        arrays["maps_ceiling"] = arrays["maps"][::-1]
    for stem, array in arrays.items():
        np.save(folder / f"{stem}.npy", array)
        write_json(folder / f"{stem}.json", about_of(loss, fold, names, **(options if stem != "emb" else {})))
    write_csv(folder / "labels.csv", ["path"], [[name] for name in names])
    write_csv(folder / "props.csv", ["frame", "model"], [[i, f"model {i}"] for i in range(len(names))])
    return folder


def add_pictures(folder, names):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 12), (40 * number % 256, 200, 90)).save(path, "PNG")


def cell(text, value=None, shade=None, hint=None, bold=False):
    return {"text": text, "value": value, "shade": shade, "bold": bold, "hint": hint}


def some_tables(names=("Triplet", "Margin", "ArcFace"), title="NR-Prec"):
    """tables.json: a table of rows, a heat map, a training table, three findings."""
    rows = [[cell(name), cell(f"{2.5 * k:.1f}", 2.5 * k, k / 3, f"fold 0: {k}", k == 2),
             cell("") if k == 1 else cell(str(k), k)] for k, name in enumerate(names)]
    heat = [[cell(name)] for name in names]
    for k, i in np.ndindex(3, 3):
        heat[k].append(cell("") if i == k else cell(f".{5 + i + k}", (5 + i + k) / 10, (i + k) / 4, "4 folds"))
    table = {"caption": "", "dataset": "cars", "paper": None, "kind": "rows", "notes": []}
    topics = ("property level", "ranking against classification", "pixel level")
    return {
        "tables": [
            {**table, "name": "nrprec_cars", "title": title, "caption": "Means.", "notes": ["A note."], "rows": rows,
             "header": ["Loss", "model", names[0]]},
            {**table, "name": "correlation_cars", "title": "Correlation", "kind": "matrix", "header": ["", *names],
             "rows": heat},
            {**table, "name": "training_cars", "title": "Before and after", "header": ["Loss", "JSD"],
             "rows": [[cell(names[0]), cell("0.30 → 0.65", 0.65)]]},
            {**table, "name": "errata", "title": "Errata", "header": ["Published"], "rows": [[cell("elsewhere")]]},
        ],
        "findings": [{"dataset": "cars", "topic": topic, "text": f"Finding {k} of {names[k]}.", "test": "permutations",
                      "p_value": 0.01} for k, topic in enumerate(topics)],
        "warnings": [f"cars: {names[1]} is odd"],
        "missing": [{"dataset": "cars", "table": "pairs", "what": "pairs.csv is not there"}],
        "made_with": {"versions": {"numpy": "2.0"}, "options": {}},
    }


def some_figures(folder, title="Profile"):
    folder.mkdir()
    (folder / "profile_cars.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="90" height="40">'
                                             '<rect width="50" height="20"/></svg>')
    for name in ("profile_cars.png", "samples_cars.png"):
        Image.new("RGB", (30, 20), (9, 90, 200)).save(folder / name)
    write_json(folder / "figures.json", {
        "figures": [
            {"name": "samples_cars", "title": "Samples", "caption": "Cars.", "dataset": "cars", "svg": None,
             "png": "samples_cars.png"},
            {"name": "profile_cars", "title": title, "caption": "Dots.", "dataset": "cars", "svg": "profile_cars.svg",
             "png": "profile_cars.png"}],
        "missing": [{"dataset": "cars", "figure": "tsne", "what": "scikit-learn is not installed"}]})


LOSSES = [("triplet", "Triplet"), ("arcface", "ArcFace"), ("my_own", "My own")]
FOLDS = [["images/0.png", "images/2.png", "images/4.png"], ["images/1.png", "images/3.png", "images/5.png"]]


@pytest.fixture
def place(tmp_path):
    """A folder with results of three networks in two folds, their pictures, tables and figures."""
    for slug, loss in LOSSES:
        for fold, names in enumerate(FOLDS):
            add_network(tmp_path / "results", slug, loss, fold, names)
    add_pictures(tmp_path / "cars", FOLDS[0] + FOLDS[1])
    (tmp_path / "tables").mkdir()
    write_json(tmp_path / "tables" / "tables.json", some_tables())
    some_figures(tmp_path / "figures")
    return tmp_path


@pytest.fixture
def make(place, run_script):
    """make("--dataset", "cars", …) -> (CompletedProcess, the page or None), the command run inside the folder."""

    def run(*options, results="results", **more):
        (place / "report.html").unlink(missing_ok=True)
        done = run_script("report.py", results, *options, cwd=place, **more)
        page = place / "report.html"
        return done, page.read_text(encoding="utf-8") if page.exists() else None

    return run


@pytest.fixture
def written(place, monkeypatch):
    """written("--dataset", "cars", …) -> the page, without a new process."""

    def run(*options, results="results"):
        monkeypatch.chdir(place)
        report.main([results, *options])
        return (place / "report.html").read_text(encoding="utf-8")

    return run


class Page(HTMLParser):
    """A strict reading: elements in the order they open, every one closed where it must, no attribute twice."""

    VOID = {"meta", "link", "img", "input", "br"}

    def __init__(self, content):
        super().__init__()
        self.open, self.elements, self.words, self.scripts = [], [], [], []
        self.feed(content)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        assert len({name for name, _ in attributes}) == len(attributes), (tag, attributes)
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append([dict(attributes), ""])

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:])
        self.open.pop()

    def handle_data(self, words):
        if self.open and self.open[-1] == "script":
            self.scripts[-1][1] += words
        elif self.open and self.open[-1] != "style":
            self.words.append(words)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def of(self, tag, **wanted):
        return [attributes for name, attributes in self.elements if name == tag
                and all(attributes.get(key) == value for key, value in wanted.items())]

    def groups(self):
        return [json.loads(words) for about, words in self.scripts if about.get("class") == "group"]

    def pictures(self):
        """The pictures' JSON blocks by id."""
        return {about["id"]: json.loads(words) for about, words in self.scripts if "id" in about}


def pixels(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/webp;base64,")))))


# ---------------------------------------------------------------- what stands on the page


def test_page_in_full(make):
    done, content = make("--dataset", "cars")
    assert done.returncode == 0, done.stderr
    page = Page(content)
    for words in ("Networks 3 Folds 2 Pictures each 3 Saliency maps 18", "Finding 0 of Triplet. permutations",
                  "resize 12, crop 10, channels RGB", "cars: Margin is odd", "cars pairs.csv is not there",
                  "cars scikit-learn is not installed", "0.30 → 0.65", "A note.", "How to read it Dots.", "Samples. Cars.",
                  "σ = R·p·(1 − p) in Eq. 5"):
        assert words in page.text, words
    sections = ["overview", "tables", "gallery", "training", "figures", "settings", "warnings", "errata"]
    assert [section["id"] for section in page.of("section")] == sections
    assert "elsewhere" not in page.text  # the errata are the project's own
    pictures = [image for image in page.of("img") if image.get("class") != "map"]
    assert [image["alt"] for image in pictures] == ["Profile"] + [""] * 4 + ["Samples"]
    assert {image["src"].split(";")[0] for image in pictures} == {"data:image/svg+xml", "data:image/webp"}


def test_it_opens_with_pictures_and_their_findings(written):
    content = written("--dataset", "cars")
    opening = Page(re.search(r'<div class="overview">.*?</figure>\n</div>', content, re.S).group())
    assert [opening.words.index(f"Finding {k} of {name}.") for k, name in enumerate(("Triplet", "Margin", "ArcFace"))]
    assert len(opening.of("figure")) == 3 and opening.of("button", **{"class": "chart"})
    own, *maps = [pixels(image["src"]) for image in opening.of("img") if image["alt"] == ""]
    assert opening.text.count("Picture Triplet ArcFace My own") == 1
    assert np.abs(own.mean(axis=(0, 1)) - (0, 200, 90)).max() < 6  # picture 0's colour
    assert [one.shape for one in maps] == [own.shape, (224, 224, 3)] * 3  # each map over the picture


def test_golden_table(written):
    shown = re.search(r'<article class="table" id="table-nrprec_cars">.*?</article>', written(), re.S).group()
    assert shown == """<article class="table" id="table-nrprec_cars">
<h3 id="table-nrprec_cars-title">NR-Prec</h3><p>Means.</p>
<div class="scroll" role="region" tabindex="0" aria-labelledby="table-nrprec_cars-title">
<table class="rows" aria-labelledby="table-nrprec_cars-title" role="grid">
<thead><tr>
<th scope="col" aria-sort="none"><button type="button">Loss</button></th>
<th scope="col" aria-sort="none" class="n"><button type="button">model</button></th>
<th scope="col" aria-sort="none" class="n"><button type="button">Triplet</button></th></tr></thead>
<tbody>
<tr><th scope="row">Triplet</th>
<td class="n s0" data-value="0.0" data-hint="fold 0: 0">0.0</td>
<td class="n" data-value="0">0</td></tr>
<tr><th scope="row">Margin</th>
<td class="n s7" data-value="2.5" data-hint="fold 0: 1">2.5</td>
<td></td></tr>
<tr><th scope="row">ArcFace</th>
<td class="n s13" data-value="5.0" data-hint="fold 0: 2"><strong>5.0</strong></td>
<td class="n" data-value="2">2</td></tr>
</tbody></table></div><ul class="notes"><li>A note.</li></ul>
</article>"""


def test_heat_map_is_a_grid_without_sorting(written):
    shown = re.search(r'<article class="table" id="table-correlation_cars">.*?</article>', written(), re.S).group()
    assert "<button" not in shown and 'role="grid"' in shown
    assert shown.count('class="n s5"') == 2 and shown.count('class="n s15"') == 2  # shades ¼ and ¾, both sides


def test_gallery_holds_each_fold_with_its_pictures_and_properties(written):
    page = Page(written("--dataset", "cars"))
    assert page.groups() == [
        {"label": f"cars, fold {fold}", "names": FOLDS[fold], "networks": [
            {"name": "Triplet", "type": "ranking"}, {"name": "ArcFace", "type": "classification"},
            {"name": "My own", "type": "other"}]} for fold in (0, 1)]
    last = page.pictures()["picture-1-2"]
    image = pixels(last.pop("picture"))
    assert image.shape == (10, 10, 3) and np.abs(image.mean(axis=(0, 1)) - (200, 200, 90)).max() < 6  # picture 5's
    assert last["name"] == "images/5.png" and last["properties"] == [["model", "model 2"]] and last["blank"] == []
    assert pixels(last["maps"]).shape == pixels(last["second"]).shape == (224, 224, 3) and len(page.pictures()) == 6


def test_sprite_lays_maps_out_by_rows():
    maps = np.zeros((3, 2, 4), np.float32)
    maps[0], maps[1], maps[2, :, :2] = 1, np.nan, 0.5
    expected = np.array([[255, 255, 255, 255, 0, 0, 0, 0]] * 2 + [[128, 128, 0, 0, 0, 0, 0, 0]] * 2)
    assert np.asarray(report.sprite(maps, 4)).tolist() == expected.tolist()
    assert np.asarray(report.sprite(np.ones((5, 30, 10)), 12)).shape == (2 * 12, 3 * 4)


def test_blank_maps_are_named(place, written):
    path = place / "results/cars/arcface/fold0/maps.npy"
    maps = np.load(path)
    maps[0], maps[2, 0, 0] = 0, np.nan
    np.save(path, maps)
    page = Page(written("--dataset", "cars"))
    assert [page.pictures()[f"picture-0-{k}"]["blank"] for k in range(3)] == [[1], [], [1]]
    assert "Maps constant or nan 2" in page.text
    first = [image for image in page.of("img") if image["alt"] == ""][0]
    assert np.abs(pixels(first["src"]).mean(axis=(0, 1)) - (80, 200, 90)).max() < 6  # it opens with picture 2


def test_fewer_pictures_are_taken_evenly_and_said(written):
    page = Page(written("--dataset", "cars", "--pictures", "4"))
    assert [group["names"] for group in page.groups()] == [[names[0], names[2]] for names in FOLDS]
    assert "Pictures 4 of 6 (report.py --pictures)" in page.text


def test_without_pictures_the_maps_stand_alone(place, written):
    page = Page(written())
    assert "Not found 6 (report.py --dataset)" in page.text
    assert not any("picture" in picture for picture in page.pictures().values())
    (place / "cars/images/2.png").write_bytes(b"broken")
    page = Page(written("--dataset", "cars"))
    assert "Not found 1 (report.py --dataset)" in page.text
    assert [name for name, one in page.pictures().items() if "picture" not in one] == ["picture-0-1"]


def test_without_tables_and_figures_the_page_says_so(place, make):
    shutil.rmtree(place / "tables")
    shutil.rmtree(place / "figures")
    done, content = make("--dataset", "cars")
    page = Page(content)
    assert "No tables: python tables.py RESULTS" in page.text and "No figures: python figures.py RESULTS" in page.text
    assert done.returncode == 0 and not page.of("section", id="tables") and page.of("section", id="gallery")


def test_one_data_sets_folder_gives_the_same_gallery(written):
    pages = [Page(written("--dataset", "cars", results=results)) for results in ("results", "results/cars")]
    assert pages[0].pictures() == pages[1].pictures()


def test_two_data_sets_each_open_with_their_own(place, written):
    shutil.copytree(place / "results/cars", place / "results/birds")
    page = Page(written("--dataset", "cars"))
    assert [group["label"] for group in page.groups()] == [f"{name}, fold {k}" for name in ("birds", "cars") for k in (0, 1)]
    assert len(page.of("div", **{"class": "overview"})) == 2 and len(page.of("article", **{"id": "table-settings-birds"})) == 1


def test_same_input_same_bytes_and_what_it_prints(make, written):
    done, content = make("--dataset", "cars")
    assert content == written("--dataset", "cars")  # in another process too
    first, *findings = done.stdout.splitlines()
    assert first.startswith("report.html  6 networks, 4 tables, 2 figures, 0.")
    assert findings == ["1. Finding 0 of Triplet.", "2. Finding 1 of Margin.", "3. Finding 2 of ArcFace."]


def test_settings_tell_every_value_once(place, written):
    for fold in (0, 1):
        folder = place / f"models/trained/cars/Triplet/fold{fold}"
        folder.mkdir(parents=True)
        write_json(folder / "config.json", {
            "loss_parameters": {"class": "TripletMarginLoss", "margin": 0.05}, "frozen_trunk": True,
            "split": {"kind": "pictures", "train": 4, "test": [1]}, "options": {"epochs": 1 + fold}})
    page = Page(written("--dataset", "cars"))
    for words in ("Setting Training Embeddings Saliency maps", "split kind pictures, train 4 test test", "frozen trunk yes",
                  "loss parameters class TripletMarginLoss, margin 0.05", "epochs 1 2", "samples 20 20"):
        assert words in page.text, words


def test_arrays_without_json_and_a_backbone_alone(place, written):
    folder = add_network(place / "results", "efficientnet_lite0", None, 0, FOLDS[0])
    bare = add_network(place / "results", "margin", "Margin", 1, FOLDS[1])
    for path in bare.glob("*.json"):
        path.unlink()
    groups = Page(written("--dataset", "cars")).groups()
    assert [group["label"] for group in groups] == ["cars, fold 1", "cars, fold 0", "cars, fold 1", "cars"]
    assert {"name": "Margin", "type": "ranking"} in [one for group in groups for one in group["networks"]]
    assert groups[-1]["networks"] == [{"name": folder.parent.name, "type": "none"}]


def test_tables_alone(place, written):
    """Someone else's CSV files and tables, without arrays."""
    shutil.rmtree(place / "results")
    (place / "results/cars").mkdir(parents=True)
    write_csv(place / "results/cars/nrprec.csv", ["embeddings", "property", "queries", "r_precision", "nr_precision"],
              [["triplet/fold0/emb.npy", "model", 3, 0.5, 2.5]])
    page = Page(written())
    assert "Finding 0" in page.text and page.of("table")
    assert not page.of("section", id="gallery") and not page.of("section", id="settings")
