"""report.py: what stands on the page, that nothing read can run there, that it opens in a browser, and every bad input."""
import base64
import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dml_common import pictures as data
import report

ROOT = Path(__file__).resolve().parent.parent
# Names that close what they stand in, in HTML, in attributes, in scripts and in JSON.
NASTY = [
    "</script><script>window.pwned=1</script>",
    '"><img src=x onerror="window.pwned=1">',
    "<!--<script>",
    "a\u2028b&amp;'`${window.pwned=1}",
]


# ---------------------------------------------------------------- small results to report on


def write_json(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")


def about_of(loss, fold, names, **options):
    return {
        "dataset": "cars",
        "split": "test",
        "loss": loss,
        "fold": fold,
        "distance": "euclidean",
        "backbone": "efficientnet_lite0",
        "checkpoint": f"models/trained/cars/{loss}/fold{fold}",
        "checkpoint_sha256": f"{fold}abcdef0123456789",
        "seed": None,
        "preprocessing": {"resize": 12, "crop": 10, "channels": "RGB", "scale": 1, "mean": [0, 0, 0], "std": [1, 1, 1]},
        "options": {"samples": 20, "order": "paper", "seed": 0, "shared_noise": False, **options},
        "versions": {"numpy": "2.0"},
        "pictures": {"number": len(names), "sha256": data.pictures_sha256(names)},
    }


def add_network(results, slug, loss, fold, names, ceiling=True, **options):
    folder = results / "cars" / slug / f"fold{fold}"
    folder.mkdir(parents=True)
    random = np.random.default_rng(len(slug) + fold)
    arrays = {
        "emb": random.normal(size=(len(names), 4)).astype(np.float32),
        "maps": random.random((len(names), 10, 10)).astype(np.float16),
    }
    if ceiling:
        arrays["maps_ceiling"] = arrays["maps"][::-1]
    for stem, array in arrays.items():
        np.save(folder / f"{stem}.npy", array)
        write_json(folder / f"{stem}.json", about_of(loss, fold, names, **(options if stem != "emb" else {})))
    with open(folder / "labels.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["path"], *([name] for name in names)])
    with open(folder / "props.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["frame", "model"], *([i, f"model {i}"] for i in range(len(names)))])
    return folder


def add_pictures(folder, names):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 12), (40 * number % 256, 200, 90)).save(path, "PNG")


def cell(text, value=None, shade=None, hint=None, bold=False):
    return {"text": text, "value": value, "shade": shade, "bold": bold, "hint": hint}


def some_tables(names=("Triplet", "Margin", "ArcFace"), title="NR-Prec"):
    rows = [
        [
            cell(name),
            cell(f"{2.5 * k:.1f}", 2.5 * k, k / 3, f"fold 0: {k}", k == 2),
            cell("" if k == 1 else str(k), None if k == 1 else k),
        ]
        for k, name in enumerate(names)
    ]
    heat = [
        [
            cell(name),
            *(
                cell(
                    "" if i == k else f".{5 + i + k}",
                    None if i == k else (5 + i + k) / 10,
                    None if i == k else (i + k) / 4,
                    None if i == k else "4 folds",
                )
                for i in range(len(names))
            ),
        ]
        for k, name in enumerate(names)
    ]
    return {
        "tables": [
            {
                "name": "nrprec_cars",
                "title": title,
                "caption": "Means.",
                "dataset": "cars",
                "paper": "Table 6",
                "kind": "rows",
                "header": ["Loss", "model", names[0]],
                "rows": rows,
                "notes": ["A note."],
            },
            {
                "name": "correlation_cars",
                "title": "Correlation",
                "caption": "",
                "dataset": "cars",
                "paper": None,
                "kind": "matrix",
                "header": ["", *names],
                "rows": heat,
                "notes": [],
            },
            {
                "name": "errata",
                "title": "Errata",
                "caption": "",
                "dataset": None,
                "paper": None,
                "kind": "rows",
                "header": ["Published", "Here"],
                "rows": [[cell("σ in Eq. 5"), cell("the square root")]],
                "notes": [],
            },
        ],
        "statements": [
            {
                "dataset": "cars",
                "topic": f"topic {k % 2}",
                "text": f"Finding {k} of {names[k % 3]}.",
                "test": "permutations",
                "p_value": 0.01 if k else None,
                "main": k < 3,
            }
            for k in range(4)
        ],
        "warnings": [f"cars: {names[1]} is odd"],
        "missing": [{"dataset": "cars", "table": "pairs", "what": "pairs.csv is not there"}],
        "made_with": {"versions": {"numpy": "2.0"}, "options": {}},
    }


def some_figures(folder, title="Profile"):
    folder.mkdir()
    (folder / "profile.svg").write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" width="90" height="40"><rect width="50" height="20"/></svg>'
    )
    for name in ("profile.png", "photograph.png"):
        Image.new("RGB", (30, 20), (9, 90, 200)).save(folder / name)
    write_json(
        folder / "figures.json",
        {
            "figures": [
                {
                    "name": "profile",
                    "title": title,
                    "caption": "Dots.",
                    "dataset": "cars",
                    "svg": "profile.svg",
                    "png": "profile.png",
                },
                {
                    "name": "photograph",
                    "title": "Samples",
                    "caption": "Cars.",
                    "dataset": None,
                    "svg": None,
                    "png": "photograph.png",
                },
            ],
            "missing": [{"dataset": "cars", "figure": "tsne", "what": "scikit-learn is not installed"}],
        },
    )


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
        return done, (place / "report.html").read_text(encoding="utf-8") if (place / "report.html").exists() else None

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
        return [
            found
            for name, found in self.elements
            if name == tag and all(found.get(key) == value for key, value in wanted.items())
        ]

    def stored(self):
        """The JSON blocks by id."""
        return {about["id"]: json.loads(words) for about, words in self.scripts if about.get("type") == "application/json"}


def pixels(uri):
    kind, content = re.fullmatch(r"data:image/(webp);base64,(.*)", uri).groups()
    from io import BytesIO

    return np.asarray(Image.open(BytesIO(base64.b64decode(content))))


# ---------------------------------------------------------------- what stands on the page


def test_page_in_full(make):
    done, content = make("--dataset", "cars")
    assert done.returncode == 0, done.stderr
    page = Page(content)
    for words in (
        "3 networks × 2 folds on cars, 3 pictures each, 18 saliency maps, efficientnet_lite0.",
        "Finding 0 of Triplet.",
        "Permutations; p = 0.01",
        "resize 12, crop 10, channels RGB",
        "0abcdef0 1abcdef0",
        "cars: Margin is odd",
        "cars: pairs: pairs.csv is not there",
        "cars: tsne: scikit-learn is not installed",
        "σ in Eq. 5",
        "A note.",
        "numpy 2.0",
        "3 × 10 × 10",
    ):
        assert words in page.text, words
    assert [found["id"] for found in page.of("section")] == [
        "findings",
        "warnings",
        "statements",
        "gallery",
        "tables",
        "figures",
        "analysed",
        "errata",
    ]
    assert len(page.of("ol", **{"class": "findings"})) == 1
    kinds = [uri.split(";")[0] for uri in (image["src"] for image in page.of("img"))]
    assert kinds == ["data:image/svg+xml", "data:image/webp"]
    assert [image["alt"] for image in page.of("img")] == ["Profile", "Samples"]


def test_golden_table():
    table = some_tables()["tables"][0]
    assert report.table_html({**table, "rows": table["rows"][1:2]}) == (
        '<article class="table" id="table-nrprec_cars"><h3 id="table-nrprec_cars-title">NR-Prec</h3><p>Means.</p>'
        '<div class="scroll" role="region" tabindex="0" aria-labelledby="table-nrprec_cars-title">'
        '<table aria-labelledby="table-nrprec_cars-title" role="grid" class="rows short">\n'
        '<thead><tr><th scope="col" aria-sort="none"><button type="button">Loss</button></th>'
        '<th scope="col" aria-sort="none" class="n"><button type="button">model</button></th>'
        '<th scope="col" aria-sort="none"><button type="button">Triplet</button></th></tr></thead>\n'
        '<tbody>\n<tr><th scope="row">Margin</th><td class="n s7" data-value="2.5" data-hint="fold 0: 1">2.5</td><td></td></tr>\n'
        "</tbody></table></div>"
        '<ul class="notes"><li>A note.</li></ul></article>'
    )


def test_heat_map_has_a_legend_and_no_sorting():
    shown = report.table_html(some_tables()["tables"][1])
    assert '<p class="legend">.6 <span class="ramp"' in shown and shown.count("</span> .8</p>") == 1
    assert "<button" not in shown and 'role="grid"' in shown
    assert shown.count('class="n s5"') == 2 and shown.count('class="n s15"') == 2  # shades ¼ and ¾, on both sides of the diagonal


def test_gallery_holds_each_fold_with_its_pictures_and_properties(written):
    stored = Page(written("--dataset", "cars")).stored()
    sets = stored["gallery-sets"]
    assert [one["label"] for one in sets] == ["cars, fold 0", "cars, fold 1"]
    assert [one["name"] for one in sets[1]["pictures"]] == FOLDS[1]
    assert sets[1]["pictures"][2] == {"name": "images/5.png", "properties": [["model", "model 2"]], "blank": []}
    assert sets[0]["networks"] == [
        {"name": "Triplet", "type": "ranking"},
        {"name": "ArcFace", "type": "classification"},
        {"name": "My own", "type": "other"},
    ]
    image = pixels(stored["picture-1-2"]["picture"])
    assert image.shape == (10, 10, 3) and np.abs(image.mean(axis=(0, 1)) - (200, 200, 90)).max() < 6  # picture 5's colour
    assert set(stored["picture-0-0"]) == {"maps", "second", "picture"} and len(stored) == 1 + 6


def test_sprite_lays_maps_out_by_rows():
    maps = np.zeros((3, 2, 4), np.float32)
    maps[0], maps[1], maps[2, :, :2] = 1, np.nan, 0.5
    expected = np.array([[255, 255, 255, 255, 0, 0, 0, 0]] * 2 + [[128, 128, 0, 0, 0, 0, 0, 0]] * 2)
    assert report.sprite(maps, 4).tolist() == expected.tolist()
    assert report.sprite(np.ones((5, 30, 10)), 12).shape == (2 * 12, 3 * 4)


def test_blank_maps_are_named(place, written):
    path = place / "results/cars/arcface/fold0/maps.npy"
    maps = np.load(path)
    maps[1], maps[2, 0, 0] = 0, np.nan
    np.save(path, maps)
    page = Page(written("--dataset", "cars"))
    assert [one["blank"] for one in page.stored()["gallery-sets"][0]["pictures"]] == [[], [1], [1]]
    assert "cars, fold 0: 2 maps in the gallery constant or nan" in page.text


def test_fewer_pictures_are_taken_evenly_and_said(written):
    page = Page(written("--dataset", "cars", "--pictures", "4"))
    assert [[one["name"] for one in found["pictures"]] for found in page.stored()["gallery-sets"]] == [
        [names[0], names[2]] for names in FOLDS
    ]
    assert "The gallery shows 4 of 6 pictures" in page.text


def test_without_pictures_the_maps_stand_alone(place, written):
    page = Page(written())
    assert "cars, fold 1: 3 of 3 pictures can't be shown" in page.text
    assert set(page.stored()["picture-0-0"]) == {"maps", "second"}
    (place / "cars/images/2.png").write_bytes(b"broken")
    page = Page(written("--dataset", "cars"))
    assert "cars, fold 0: 1 of 3 pictures can't be shown" in page.text and "fold 1: 3 of 3" not in page.text


def test_without_tables_and_figures_the_page_says_so(place, make):
    shutil.rmtree(place / "tables")
    shutil.rmtree(place / "figures")
    done, content = make("--dataset", "cars")
    page = Page(content)
    assert "No statements: tables.py makes them" in page.text and "No figures: python figures.py RESULTS" in page.text
    assert "no main findings" in done.stdout and done.returncode == 0


def test_one_data_sets_folder_gives_the_same_gallery(written):
    one, other = (Page(written("--dataset", "cars", results=results)).stored() for results in ("results", "results/cars"))
    assert one == other


def test_same_input_same_bytes(make, written):
    assert make("--dataset", "cars")[1] == written("--dataset", "cars")  # in another process too


def test_stdout_names_path_and_findings_within_the_terminal(make):
    done, _ = make("--dataset", "cars", env={**os.environ, "COLUMNS": "44"})
    assert done.stdout.startswith("report.html  6 networks, 6 pictures, 2 tables, 2")
    assert (
        "1. Finding 0 of Triplet.\n   Permutations" in done.stdout
        and "3. Finding 2" in done.stdout
        and "Finding 3" not in done.stdout
    )
    assert max(map(len, done.stdout.splitlines()[3:])) <= 44


def test_properties_of_the_pictures(place):
    names = [f"{i}.png" for i in range(6)]
    folder = add_network(place / "results", "margin", "Margin", 7, names)
    assert report.picture_properties(folder) == {name: [("model", f"model {i}")] for i, name in enumerate(names)}


def test_networks_of_a_backbone_alone_and_arrays_without_json(place):
    folder = add_network(place / "results", "efficientnet_lite0", None, 0, FOLDS[0])
    write_json(folder / "emb.json", {**about_of(None, None, FOLDS[0]), "backbone": "efficientnet_lite0"})
    bare = add_network(place / "results", "margin", "Margin", 1, FOLDS[1])
    for path in bare.glob("*.json"):
        path.unlink()
    networks, left_out = report.find_networks(place / "results")
    assert {
        (one["slug"], one["name"], one["type"], one["fold"])
        for one in networks["cars"]
        if one["slug"] in ("margin", "efficientnet_lite0")
    } == {("efficientnet_lite0", "efficientnet_lite0", "none", None), ("margin", "Margin", "ranking", 1)}
    assert left_out == []


def test_training_history_is_averaged_over_folds(place, written):
    for fold, (first, last) in enumerate([(0.2, 0.6), (0.4, 0.7)]):
        folder = place / f"models/trained/cars/Triplet/fold{fold}"
        folder.mkdir(parents=True)
        write_json(
            folder / "config.json",
            {
                "loss_parameters": {"class": "TripletMarginLoss", "margin": 0.05},
                "frozen_trunk": True,
                "split": {"kind": "pictures", "train": 4, "test": [1]},
                "options": {"epochs": 1 + fold},
            },
        )
        (folder / "history.csv").write_text(
            "epoch,split,loss,positive_mean,negative_mean,jsd,recall_at_1,map_at_r,seconds\n"
            f"1,validation,1,,,0.5,{last},0.1,1\n0,validation,2,,,0.1,{first},0.1,1\n1,train,nan,,,,,,1\n"
        )
    page = Page(written("--dataset", "cars"))
    assert "Triplet 2 1 0.300 0.650 0.100 0.100 0.100 0.500" in page.text  # no training loss that is a number
    assert "Triplet ranking 0 1 euclidean 3 × 4 3 × 10 × 10 3 × 10 × 10 0abcdef0 1abcdef0" in page.text
    assert "Class and parameters Triplet class TripletMarginLoss, margin 0.05" in page.text
    for words in (
        "Setting Training Embeddings Saliency maps",
        "frozen trunk yes",
        "kind pictures, train 4",
        "epochs 1 (1 of 2); 2 (1 of 2)",
    ):
        assert words in page.text, words
    hints = [found["data-hint"] for found in page.of("td") if found.get("data-hint")]
    assert "0.6000, 0.7000" in hints


def test_warnings_of_the_arrays(place, written):
    folder = add_network(place / "results", "margin", "Margin", 1, FOLDS[1], ceiling=False)
    about = about_of("Margin", 1, FOLDS[1])
    about["pictures"]["left_out"] = ["images/broken.png"]
    write_json(folder / "emb.json", about)
    page = Page(written("--dataset", "cars"))
    assert "cars: images/broken.png could not be read: not in cars/margin/fold1/emb.npy" in page.text
    assert page.stored()["gallery-sets"][1]["second"] is False
    assert "have no second map" not in page.text  # tables.py says it, where there are tables
    shutil.rmtree(place / "tables")
    write_json(folder / "maps.json", about_of("Margin", 1, FOLDS[1]))
    assert "cars: 1 of 7 networks have no second map" in Page(written("--dataset", "cars")).text


def test_tables_of_other_results_are_said(place, written):
    shutil.move(place / "results/cars", place / "results/birds")
    assert "tables/tables.json tells of cars, of which results has no arrays." in Page(written()).text


def test_tables_alone(place, written):
    """Someone else's CSV files and tables, without arrays."""
    shutil.rmtree(place / "results")
    (place / "results/cars").mkdir(parents=True)
    (place / "results/cars/nrprec.csv").write_text("loss,fold\n")
    page = Page(written())
    assert "Tables alone: no arrays are beside them." in page.text and "Finding 0" in page.text
    assert not page.of("section", id="gallery") and page.of("table", id=None)


# ---------------------------------------------------------------- nothing read can run, nothing is asked of a network


@pytest.fixture
def nasty(place):
    """The same with names that try to break out of where they stand."""
    results, names = place / "results", [f"images/{i} {name.replace('/', '∕')}.png" for i, name in enumerate(NASTY)]
    shutil.rmtree(results)
    for number, loss in enumerate(NASTY[:3]):
        folder = add_network(results, f"slug{number}", loss, 0, names)
        (folder / "props.csv").write_text(
            "frame,"
            + '"'
            + NASTY[0]
            + '"\n'
            + "".join(f'{i},"{name.replace(chr(34), chr(34) * 2)}"\n' for i, name in enumerate(NASTY)),
            encoding="utf-8",
        )
    add_pictures(place / "cars", names)
    write_json(place / "tables/tables.json", some_tables(NASTY, NASTY[1]))
    shutil.rmtree(place / "figures")
    some_figures(place / "figures", NASTY[1])
    return names


def test_nasty_names_are_text(nasty, make):
    done, content = make("--dataset", "cars")
    assert done.returncode == 0, done.stderr
    page = Page(content)
    assert [about.get("type") for about, _ in page.scripts].count(None) == 1 and page.scripts[-1] == [
        {},
        (ROOT / "report.js").read_text(encoding="utf-8"),
    ]
    assert "window.pwned" not in page.scripts[-1][1]
    assert all(not name.startswith("on") and name != "style" for _, found in page.elements for name in found)
    assert {found["src"].split(":")[0] for found in page.of("img")} == {"data"}
    stored = page.stored()
    assert [one["name"] for one in stored["gallery-sets"][0]["pictures"]] == nasty
    assert stored["gallery-sets"][0]["pictures"][1]["properties"] == [[NASTY[0], NASTY[1]]]
    for name in NASTY[:2]:
        assert " ".join(name.split()) in page.text
    assert page.of("img")[0]["alt"] == NASTY[1]
    assert "\u2028" not in "".join(words for _, words in page.scripts)


def test_policy_passes_only_the_pages_own_style_and_script(written):
    content = written("--dataset", "cars")
    page = Page(content)
    policy = dict(
        part.split(" ", 1) for part in page.of("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"].split("; ")
    )
    style = re.search(r"<style>(.*?)</style>", content, re.S).group(1)
    digest = lambda words: f"'sha256-{base64.b64encode(hashlib.sha256(words.encode()).digest()).decode()}'"
    assert policy == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": digest(style),
        "script-src": digest(page.scripts[-1][1]),
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_no_reference_to_anything_outside(written):
    content = written("--dataset", "cars")
    page = Page(content)
    for tag, found in page.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert found.get(name, "#").startswith(("#", "data:")), (tag, found)
    own = re.sub(r'"data:[^"]*"', "", content)
    assert not re.search(r"\w+://|//\w", own)  # a comment has a blank after its slashes
    for words in ("url(", "@import", "fetch(", "XMLHttpRequest", "WebSocket", "sendBeacon", "import(", "localStorage"):
        assert words not in own, words


def test_document_is_sound(written):
    content = written("--dataset", "cars")
    page = Page(content)
    assert (
        content.startswith('<!DOCTYPE html>\n<html lang="en">')
        and len(page.of("h1")) == len(page.of("main")) == len(page.of("title")) == 1
    )
    ids = [found["id"] for _, found in page.elements if "id" in found]
    assert len(set(ids)) == len(ids)
    for _, found in page.elements:
        for name in ("aria-labelledby", "href"):
            target = found.get(name, "")
            assert target.removeprefix("#") in ids if target and not target.startswith("data:") else True, found
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert all(below - above <= 1 for above, below in zip(levels, levels[1:]))


def test_html5_parser_finds_no_error(nasty, written):
    html5lib = pytest.importorskip("html5lib", reason="html5lib is not installed: pip install html5lib")
    html5lib.HTMLParser(strict=True).parse(written("--dataset", "cars"))


@given(st.text())
def test_any_text_is_read_back_from_the_page(words):
    page = Page(f'<p title="{report.text(words)}">{report.text(words)}</p>')
    allowed = "".join(
        "\ufffd"
        if unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\t\n\r" or letter in "\ufffe\uffff"
        else letter
        for letter in words
    )
    assert page.of("p")[0]["title"] == "".join(page.words) == allowed
    shown = report.script_json({words: [words]})
    assert json.loads(shown) == {words: [words]} and shown.isascii() and not set("<>&") & set(shown)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return sum(
        weight * (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4)
        for weight, part in zip((0.2126, 0.7152, 0.0722), parts)
    )


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_text_is_readable_on_every_ground_in_both_schemes():
    """WCAG 2 AA: 4.5 to 1."""
    colours = {
        name: pair
        for name, *pair in re.findall(
            r"--(\w+): light-dark\((#\w{6}), (#\w{6})\)", (ROOT / "report.css").read_text(encoding="utf-8")
        )
    }
    shades = [re.findall(r"#\w{6}", rule) for rule in report.shade_rules().splitlines()]
    assert len(shades) == 21 and {"page", "panel", "ink", "soft", "strong", "mark"} <= set(colours)
    for scheme in (0, 1):
        for ground in [colours[name][scheme] for name in ("page", "panel", "mark")] + [shade[scheme] for shade in shades]:
            assert contrast(colours["ink"][scheme], ground) >= 4.5, ground
        for ground in ("page", "panel"):
            for name in ("soft", "strong"):
                assert contrast(colours[name][scheme], colours[ground][scheme]) >= 4.5, (name, ground)


# ---------------------------------------------------------------- bad input


def refused(done, *words):
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.startswith("report.py: ") and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def test_no_results(place, make):
    (place / "empty").mkdir()
    refused(make(results="empty")[0], "empty: no results; expected empty/<dataset>/<loss>/fold<k>/emb.npy")
    refused(make(results="nowhere")[0], "nowhere: no such folder")
    refused(make(results="results/cars/triplet")[0], "results/cars/triplet: no results")  # a folder too deep
    assert not (place / "report.html").exists()


def test_other_pictures_are_named(place, make):
    add_network(place / "results", "margin", "Margin", 0, ["images/0.png", "images/2.png", "images/1.png"])
    done, content = make()
    refused(done, "cars/triplet/fold0/emb.npy and results/cars/margin/fold0/emb.npy don't belong together: other lists of "
            "pictures (3, 3); make both from the same pictures")
    assert content is None


def test_other_options_are_named(place, make):
    add_network(place / "results", "margin", "Margin", 1, FOLDS[1], samples=50, seed=3, limit=3)
    refused(make()[0], "cars/triplet/fold0/maps.npy and results/cars/margin/fold1/maps.npy don't belong together: other options "
            "(samples: 20, 50); make both")


def test_another_seed_belongs_together(place, make):
    add_network(place / "results", "margin", "Margin", 1, FOLDS[1], seed=3, ceiling=True)
    assert make()[0].returncode == 0


def test_half_finished_and_broken_arrays_are_left_out_and_listed(place, make):
    folder = place / "results/cars/triplet/fold0"
    (folder / "maps.npy").rename(folder / "maps.npy.part")
    broken = place / "results/cars/triplet/fold1/maps.npy"
    broken.write_bytes(broken.read_bytes()[:-10])
    short = place / "results/cars/arcface/fold1/emb.npy"
    np.save(short, np.load(short)[:2])
    odd = place / "results/cars/arcface/fold0/maps.json"
    write_json(odd, {**about_of("ArcFace", 0, FOLDS[0]), "options": {"pick": "all"}})
    np.save(place / "results/cars/my_own/fold0/maps.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    done, content = make("--dataset", "cars")
    assert done.returncode == 0, done.stderr
    page = Page(content)
    for words in (
        "cars/triplet/fold0/maps.npy is half-finished",
        "cars/triplet/fold1/maps.npy is truncated",
        "cars/arcface/fold1/emb.npy: shape (2, 4)",
        "cars/arcface/fold0/maps.npy: the lists in its JSON",
        "cars/my_own/fold0/maps.npy holds Python objects",
    ):
        assert words in page.text, words
    assert [[one["name"] for one in found["networks"]] for found in page.stored()["gallery-sets"]] == [["ArcFace", "My own"]]


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: "[1, 2", "no JSON"),
        (lambda t: "[" * 100_000, "no JSON"),
        (lambda t: [1, 2], "holds list"),
        (lambda t: {**t, "statements": "none"}, "statements of the file is 'none', expected list"),
        (lambda t: {key: t[key] for key in t if key != "tables"}, "tables of the file is 'missing'"),
        (lambda t: {**t, "warnings": [{}]}, "a warning, header or note is no text"),
        (lambda t: {**t, "tables": [5]}, "table 0 is int"),
        (lambda t: {**t, "tables": [{**t["tables"][0], "kind": "bars"}]}, "of kind 'bars'"),
        (lambda t: {**t, "tables": [t["tables"][0], t["tables"][0]]}, "table 'nrprec_cars' is there twice"),
        (
            lambda t: {**t, "tables": [{**t["tables"][0], "header": ["Loss", "model"]}]},
            "a row of another length than its header, 2",
        ),
        (
            lambda t: {**t, "tables": [{**t["tables"][0], "rows": [[cell("a"), cell("b", "x"), cell("c")]]}]},
            "value of a cell of table 'nrprec_cars' is 'x', expected int or float or null",
        ),
        (lambda t: {**t, "tables": [{**t["tables"][0], "rows": [[cell("a"), cell("b", True), cell("c")]]}]}, "value of a cell"),
        (lambda t: {**t, "statements": [{"text": 5}]}, "of statement 0"),
    ],
)
def test_malformed_tables(place, change, words):
    content = change(some_tables())
    (place / "tables/tables.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=f"tables.json: .*{re.escape(words)}"):
        report.read_tables(place / "tables")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda f: {"figures": {}}, "figures of the file is '{}', expected list"),
        (lambda f: {"figures": [{**f, "svg": "../cars/images/0.png"}]}, "0.png is not in "),  # though it is there
        (lambda f: {"figures": [{**f, "png": "none.png"}]}, "none.png is not in "),
        (lambda f: {"figures": [{**f, "svg": None, "png": None}]}, "its file is not in "),
        (lambda f: {"figures": [{**f, "title": None}]}, "title of figure 0"),
    ],
)
def test_malformed_figures(place, change, words):
    figure = json.loads((place / "figures/figures.json").read_text())["figures"][0]
    write_json(place / "figures/figures.json", change(figure))
    with pytest.raises(ValueError, match=f"figures.json: .*{re.escape(words)}"):
        report.read_figures(place / "figures")


def test_malformed_files_are_one_line_on_the_terminal(place, make):
    (place / "figures/figures.json").write_text('{"figures":\n\n5}')
    done, content = make()
    refused(done, "figures/figures.json: figures of the file is '5', expected list")
    (place / "tables/tables.json").write_text("{\n")
    refused(make()[0], "tables/tables.json: no JSON")
    assert content is None


@pytest.mark.parametrize(
    "options, words",
    [
        (["--tables", "figures"], "no tables.json there; python tables.py results"),
        (["--figures", "nowhere"], "no figures.json there"),
        (["--dataset", "nowhere"], "nowhere: no such folder"),
        (["--pictures", "0"], "--pictures 0: expected 1"),
        (["--size", "9999"], "--size 9999"),
        (["--out", "nowhere/report.html"], "does not exist"),
        (["--out", "tables/tables.json"], "is an input"),
        (["--out", "tables"], "is a folder"),
        (["--no-such-option"], "unrecognized arguments"),
    ],
)
def test_bad_options(make, options, words):
    refused(make(*options)[0], words)


def test_data_set_of_another_name_among_several(place, make):
    shutil.copytree(place / "results/cars", place / "results/birds")
    (place / "cars").rename(place / "planes")
    refused(make("--dataset", "planes")[0], "--dataset planes is the data set planes; RESULTS has birds, cars")


# ---------------------------------------------------------------- in a browser


def axe_core():
    """The source of axe-core: $AXE_CORE, or where npm installed it, here or globally."""
    places = [os.environ.get("AXE_CORE"), ROOT / "node_modules/axe-core/axe.min.js"]
    npm = shutil.which("npm")
    if npm:
        places.append(
            Path(subprocess.run([npm, "root", "-g"], capture_output=True, text=True).stdout.strip()) / "axe-core/axe.min.js"
        )
    return next((Path(place).read_text(encoding="utf-8") for place in places if place and Path(place).is_file()), None)


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("chromium or chromedriver is not here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1400,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


@pytest.fixture
def visit(browser, place, written):
    """visit(width, scheme, path) -> the driver, on a fresh page whose gallery shows its first picture."""

    def go(width=1400, scheme="light", path=None):
        if path is None:
            written("--dataset", "cars")
            path = place / "report.html"
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 500}
        )
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        browser.get(path.as_uri())
        shown(browser, "0-0")
        return browser

    return go


def shown(driver, which):
    """Wait until the gallery shows this set and picture."""
    until = time.monotonic() + 20
    while driver.execute_script("return document.body.dataset.shown") != which:
        assert time.monotonic() < until, driver.execute_script("return document.body.dataset.shown")
        time.sleep(0.01)


def column(driver, table, number):
    return driver.execute_script(
        "const rows = document.querySelectorAll(`#table-${arguments[0]} tbody tr`);"
        "return [...rows].map(row => row.cells[arguments[1]].textContent)",
        table,
        number,
    )


def press(driver, *keys):
    from selenium.webdriver import ActionChains

    ActionChains(driver).send_keys(*keys).perform()


def find(driver, selector):
    return driver.find_element("css selector", selector)


def test_browser_no_errors_no_requests(visit, nasty):
    driver = visit()
    assert driver.get_log("browser") == []
    assert (
        driver.execute_script(
            "return performance.getEntriesByType('resource').map(entry => entry.name).filter(name => !name.startsWith('data:'))"
        )
        == []
    )
    assert driver.execute_script("return window.pwned") is None
    find(driver, "#film").send_keys("\ue014")  # the right arrow
    shown(driver, "0-1")
    assert driver.execute_script("return document.querySelector('#which').textContent") == f"2 of 4: {nasty[1]}"
    assert driver.execute_script("return window.pwned") is None and driver.get_log("browser") == []


def test_browser_policy_stops_what_would_run(visit):
    driver = visit()
    driver.execute_script("""const image = document.createElement("div"); 
        image.innerHTML = '<img src="x" onerror="window.pwned=1">';
        const script = document.createElement("script"); script.textContent = "window.pwned = 2";
        document.body.append(image, script)""")
    time.sleep(0.3)
    assert driver.execute_script("return window.pwned") is None
    assert any("Content Security Policy" in entry["message"] for entry in driver.get_log("browser"))


def test_browser_sorts_by_click_and_by_keyboard(visit):
    from selenium.webdriver import Keys

    driver = visit()
    state = lambda: [
        head.get_attribute("aria-sort") for head in driver.find_elements("css selector", "#table-nrprec_cars th[aria-sort]")
    ]
    loss, model, holes = driver.find_elements("css selector", "#table-nrprec_cars th button")
    model.click()
    assert column(driver, "nrprec_cars", 1) == ["5.0", "2.5", "0.0"] and state() == ["none", "descending", "none"]
    model.click()
    assert column(driver, "nrprec_cars", 1) == ["0.0", "2.5", "5.0"] and state() == ["none", "ascending", "none"]
    driver.execute_script("arguments[0].focus()", loss)
    press(driver, Keys.ENTER)
    assert column(driver, "nrprec_cars", 0) == ["ArcFace", "Margin", "Triplet"] and state() == ["ascending", "none", "none"]
    assert driver.execute_script("return document.querySelector('#live').textContent") == "Sorted by Loss, ascending"
    press(driver, Keys.SPACE, Keys.SPACE)
    assert column(driver, "nrprec_cars", 0) == ["Triplet", "Margin", "ArcFace"] and state() == ["none"] * 3
    holes.click()
    assert column(driver, "nrprec_cars", 2) == ["2", "0", ""]  # an empty cell is last, whichever way
    holes.click()
    assert column(driver, "nrprec_cars", 2) == ["0", "2", ""]


def test_browser_keeps_means_below(place, visit):
    tables = some_tables()
    tables["tables"][0]["rows"].append([cell("Mean", bold=True), cell("9.9", 9.9), cell("")])
    write_json(place / "tables/tables.json", tables)
    driver = visit()
    for expected in (["ArcFace", "Margin", "Triplet", "Mean"], ["Triplet", "Margin", "ArcFace", "Mean"]):
        driver.find_elements("css selector", "#table-nrprec_cars th button")[1].click()
        assert column(driver, "nrprec_cars", 0) == expected


def test_browser_heat_map_by_keyboard_and_hover(visit):
    from selenium.webdriver import ActionChains, Keys

    driver = visit()
    live = lambda: driver.execute_script("return document.querySelector('#live').textContent")
    cells = driver.find_elements("css selector", "#table-correlation_cars tbody td")
    assert [one.get_attribute("tabindex") for one in cells] == ["0"] + ["-1"] * 8  # one stop for the tab key
    driver.execute_script("arguments[0].focus()", cells[0])
    press(driver, Keys.ARROW_RIGHT)
    assert live() == "Triplet · Margin: .6. 4 folds"
    press(driver, Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    assert live() == "ArcFace · Margin: .8. 4 folds"
    press(driver, Keys.HOME)
    assert live() == "ArcFace · Triplet: .7. 4 folds"
    press(driver, Keys.CONTROL, Keys.END)
    assert "ArcFace · ArcFace" in live() and find(driver, "#tip").text == live().strip()
    press(driver, Keys.NULL, Keys.ESCAPE)
    assert find(driver, "#tip").text == ""
    assert [one.get_attribute("tabindex") for one in cells] == ["-1"] * 8 + ["0"]
    ActionChains(driver).move_to_element(cells[1]).perform()
    assert find(driver, "#tip").text == "Triplet · Margin: .6\n4 folds"
    tip = find(driver, "#tip").rect
    assert tip["x"] >= 0 and tip["x"] + tip["width"] <= 1400


def test_browser_gallery(place, visit):
    from selenium.webdriver import Keys

    driver = visit()
    tile = lambda number: driver.execute_script(
        "const c = document.querySelectorAll('#tiles canvas')[arguments[0]];"
        "return [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]",
        number,
    )
    words = [one.text.split("\n")[0] for one in driver.find_elements("css selector", "#tiles li")]
    assert words == ["Picture", "Triplet ranking", "ArcFace classification", "My own other"]
    assert tile(0)[:4] == pytest.approx([0, 200, 90, 255], abs=8)  # picture 0's colour
    mixed = tile(1)
    driver.execute_script("const s = document.querySelector('#overlay'); s.value = 0; s.dispatchEvent(new Event('input'))")
    assert tile(1) == tile(0) != mixed  # nothing of the map
    values = np.load(place / "results/cars/triplet/fold0/maps.npy")[0].astype(float).ravel()
    at = lambda: (
        np.array(tile(1)).reshape(224, 224, 4)[11:224:22, 11:224:22, :3][:10, :10].reshape(100, 3)
    )  # the middle of each value
    driver.execute_script("const s = document.querySelector('#overlay'); s.value = 49; s.dispatchEvent(new Event('input'))")
    away = np.abs(at() - tile(0)[:3]).sum(axis=1)
    assert away[values < 0.05].max() < 60 < away[values > 0.5].min()  # the salient parts alone
    driver.execute_script("const s = document.querySelector('#overlay'); s.value = 100; s.dispatchEvent(new Event('input'))")
    alone = np.array(tile(1)).reshape(224, 224, 4)
    assert np.corrcoef(at().sum(axis=1), values)[0, 1] > 0.9  # the map alone: the brighter the more salient
    find(driver, "#second").click()
    shown(driver, "0-0")
    time.sleep(0.3)
    assert np.array(tile(1)).reshape(224, 224, 4).tolist() != alone.tolist()
    find(driver, "#next").click()
    shown(driver, "0-1")
    find(driver, "#film").send_keys(Keys.END)
    shown(driver, "0-2")
    assert find(driver, "#film").get_attribute("aria-activedescendant") == "film-2" and not find(driver, "#next").is_enabled()
    assert find(driver, "#about").text.split() == ["model", "model", "2"]
    driver.execute_script("const s = document.querySelector('#set'); s.value = 1; s.dispatchEvent(new Event('change'))")
    shown(driver, "1-0")
    assert find(driver, "#which").text == "1 of 3: images/1.png"
    assert len(driver.find_elements("css selector", "#film img[src^='data:']")) == 3


def test_browser_long_names_stay_on_a_phone(place, visit):
    long = "a" * 300
    shutil.rmtree(place / "results")
    add_pictures(place / "cars", [f"images/{k}{long[:200]}.png" for k in range(2)])
    add_network(place / "results", "my_own", long, 0, [f"images/{k}{long[:200]}.png" for k in range(2)])
    write_json(place / "tables/tables.json", some_tables([long, long + "b", long + "c"], long))
    driver = visit(360)
    assert driver.execute_script("return document.documentElement.scrollWidth") == 360


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 800, 2400])
def test_browser_axe_and_width(visit, scheme, width):
    driver = visit(width, scheme)
    assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    dark = driver.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
    assert dark == (scheme == "dark")
    assert find(driver, "#theme").text == ("Light" if dark else "Dark")
    axe = axe_core()
    if axe is None:
        pytest.skip("axe-core is not here: npm install axe-core (or its axe.min.js in $AXE_CORE)")
    driver.execute_cdp_cmd("Runtime.evaluate", {"expression": axe})
    results = driver.execute_async_script("axe.run().then(arguments[0])")
    assert [(one["id"], one["nodes"][0]["html"][:200]) for one in results["violations"]] == []
    assert len(results["passes"]) > 30
    find(driver, "#theme").click()
    other = driver.execute_async_script("axe.run({runOnly: ['color-contrast']}).then(arguments[0])")
    assert (
        other["violations"] == []
        and (driver.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)") != dark
    )


def test_browser_opens_15_networks_and_300_pictures_in_two_seconds(visit, tmp_path, run_script):
    names = [f"images/{i:03d}.png" for i in range(300)]
    with open(ROOT / "models/losses.csv", encoding="utf-8") as file:
        losses = list(csv.DictReader(file))
    random = np.random.default_rng(0)
    for row in losses:
        folder = tmp_path / "many/cars" / row["slug"] / "fold0"
        folder.mkdir(parents=True)
        np.save(folder / "maps.npy", random.random((300, 16, 16)).astype(np.float16))
        write_json(folder / "maps.json", about_of(row["name"], 0, names))
        (folder / "labels.csv").write_text("path\n" + "\n".join(names) + "\n")
    add_pictures(tmp_path / "many_pictures", names)
    done = run_script("report.py", tmp_path / "many", "--dataset", tmp_path / "many_pictures", "--out", tmp_path / "many.html")
    assert done.returncode == 0, done.stderr
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        driver = visit(path=tmp_path / "many.html")
        seconds.append(time.monotonic() - start)
    assert len(driver.find_elements("css selector", "#film li")) == 300
    assert len(driver.find_elements("css selector", "#film img[src]")) < 60  # lazily
    assert min(seconds) < 2, (seconds, (tmp_path / "many.html").stat().st_size)
