"""report.py: what stands on the page, that nothing read can run there, bad input, a browser's view."""
import base64
import hashlib
import io
import json
import os
import re
import shutil
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, one_line, read_rows, turn_rows, write_json, write_rows
from PIL import Image

import report
from dml_common.pictures import pictures_sha256
from tables import cell, table

# Names that close what they stand in, in HTML, in attributes, in scripts, in JSON and in templates.
NASTY = ["</script><script>window.pwned=1</script>", '"><img src=x onerror="window.pwned=1">', "<!--<script>",
         "a\u2028b&amp;'`${window.pwned=1}{{ 7 * 7 }}"]


# ---------------------------------------------------------------- small results to report on


def about_of(loss, fold, names, **options):
    return {"dataset": "cars", "split": "test", "loss": loss, "fold": fold, "distance": "euclidean",
            "backbone": "efficientnet_lite0", "checkpoint": f"models/trained/cars/{loss}/fold{fold}",
            "preprocessing": {"resize": 12, "crop": 10, "channels": "RGB"},
            "options": {"samples": 20, "order": "paper", "seed": 0, **options},
            "pictures": {"number": len(names), "sha256": pictures_sha256(names)}}


def add_network(results, slug, loss, fold, names, **options):
    folder = results / "cars" / slug / f"fold{fold}"
    folder.mkdir(parents=True)
    random = np.random.default_rng(len(slug) + fold)
    maps = random.random((len(names), 10, 10)).astype(np.float16)
    emb = random.normal(size=(len(names), 4)).astype(np.float32)
    for stem, array in {"emb": emb, "maps": maps, "maps_ceiling": maps[::-1]}.items():
        np.save(folder / f"{stem}.npy", array)
        write_json(folder / f"{stem}.json", about_of(loss, fold, names, **(options if stem != "emb" else {})))
    write_rows(folder / "labels.csv", "path", [[name] for name in names])
    rows = [[Path(name).stem, f"model {i}"] for i, name in enumerate(names)]
    write_rows(folder / "props.csv", "frame,model", rows)
    return folder


def add_pictures(folder, names):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 12), (40 * number % 256, 200, 90)).save(path, "PNG")


def some_tables(names=("Triplet", "Margin", "ArcFace"), title="NR-Prec"):
    """tables.json: a table of rows, a heat map, a training table, three findings."""
    rows = [[name, cell(f"{2.5 * k:.1f}", 2.5 * k, shade=k / 3, hint=f"fold 0: {k}", bold=k == 2),
             "" if k == 1 else cell(k, k)] for k, name in enumerate(names)]
    heat = [[name] for name in names]
    for k, i in np.ndindex(3, 3):
        shown = cell(f".{5 + i + k}", (5 + i + k) / 10, shade=(i + k) / 4, hint="4 folds")
        heat[k].append("" if i == k else shown)
    after = [[names[0], cell("0.30 → 0.65", 0.65)]]
    listed = [("nrprec_cars", title, "rows", ["Loss", "model", names[0]], rows),
              ("correlation_cars", "Correlation", "matrix", ["", *names], heat),
              ("training_cars", "Training", "rows", ["Loss", "JSD"], after),
              ("errata", "Errata", "rows", ["Published"], [["elsewhere"]])]
    return {
        "tables": [table(name, heading, "Means", header, lines, kind=kind, notes=["A note."])
                   for name, heading, kind, header, lines in listed],
        "findings": [{"dataset": "cars", "text": f"Finding {k} of {name}.", "test": "permutations"}
                     for k, name in enumerate(names[:3])],
        "warnings": [f"cars: {names[1]} is odd"],
        "missing": [{"dataset": "cars", "table": "pairs", "what": "pairs.csv is not there"}]}


def some_figures(folder, title="Profile"):
    folder.mkdir()
    svg = '<svg xmlns="http://www.w3.org/2000/svg" width="90" height="40"><circle r="9"/></svg>'
    (folder / "profile_cars.svg").write_text(svg)
    Image.new("RGB", (30, 20), (9, 90, 200)).save(folder / "samples_cars.png")
    figures = [("samples_cars", "Samples", "Cars.", None, "samples_cars.png"),
               ("profile_cars", title, "Dots.", "profile_cars.svg", "profile_cars.png")]
    write_json(folder / "figures.json", {
        "figures": [dict(zip(("name", "title", "caption", "svg", "png"), figure)) for figure in figures],
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
def make(place, run_main, monkeypatch):
    """make("--dataset", "cars", …) -> (CompletedProcess, the page or None), run inside the folder."""
    def run(*options, results="results", run=run_main):
        monkeypatch.chdir(place)
        page = place / "report.html"
        page.unlink(missing_ok=True)
        done = run("report.py", results, *options)
        return done, page.read_text(encoding="utf-8") if page.exists() else None

    return run


@pytest.fixture
def written(make):
    """written("--dataset", "cars", …) -> the Page."""
    def run(*options, **more):
        done, page = make(*options, **more)
        assert done.returncode == 0, done.stderr
        return Page(page)

    return run


class Page(HTMLParser):
    """The page's elements, its words but for style and scripts, and its scripts."""

    def __init__(self, content):
        super().__init__()
        self.content = content
        self.elements, self.words, self.scripts, self.last = [], [], [], ""
        self.feed(content)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        assert len({name for name, _ in attributes}) == len(attributes), (tag, attributes)
        self.elements.append((tag, dict(attributes)))
        self.last = tag

    def handle_endtag(self, tag):
        self.last = ""

    def handle_data(self, words):
        if self.last == "script":
            self.scripts.append((self.elements[-1][1], words))
        elif self.last != "style":
            self.words.append(words)

    def of(self, tag, **wanted):
        return [attributes for name, attributes in self.elements if name == tag
                and all(attributes.get(key) == value for key, value in wanted.items())]

    def groups(self):
        return [json.loads(words) for about, words in self.scripts if about.get("class") == "group"]

    def pictures(self):
        """The pictures' JSON blocks by id."""
        return {about["id"]: json.loads(words) for about, words in self.scripts if "id" in about}


def pixels(uri):
    content = base64.b64decode(uri.removeprefix("data:image/webp;base64,"))
    return np.asarray(Image.open(io.BytesIO(content)))


# ---------------------------------------------------------------- what stands on the page


def test_page_in_full(written):
    page = written("--dataset", "cars")
    for words in ("Networks 3 Folds 2 Pictures each 3 Saliency maps 18", "resize 12, crop 10, channels RGB",
                  "cars: Margin is odd", "cars pairs.csv is not there", "cars scikit-learn is not installed",
                  "0.30 → 0.65", "A note.", "Samples. Cars.", "σ = R·p·(1 − p) in Eq. 5"):
        assert words in page.text, words
    sections = ["overview", "tables", "gallery", "training", "figures", "settings", "warnings", "errata"]
    assert [section["id"] for section in page.of("section")] == sections
    assert "elsewhere" not in page.text  # the errata are the project's own
    pictures = [image for image in page.of("img") if image.get("class") != "map"]
    assert [image["alt"] for image in pictures] == ["Profile"] + [""] * 4 + ["Samples"]
    assert {image["src"].split(";")[0] for image in pictures} == {"data:image/svg+xml", "data:image/webp"}


def test_it_opens_with_pictures_and_their_findings(written):
    content = written("--dataset", "cars").content
    opening = Page(re.search(r'<div class="overview">.*?</figure>\n</div>', content, re.S).group())
    assert "0 of Triplet. permutations Finding 1 of Margin. permutations How to read it Dots." in opening.text
    assert len(opening.of("figure")) == 3 and opening.of("button", **{"class": "chart"})
    own, *maps = [pixels(image["src"]) for image in opening.of("img") if image["alt"] == ""]
    assert opening.text.count("Picture Triplet ArcFace My own") == 1
    assert np.abs(own.mean(axis=(0, 1)) - (0, 200, 90)).max() < 6  # picture 0's colour
    assert [one.shape for one in maps] == [own.shape, (224, 224, 3)] * 3  # each map over the picture


def test_golden_tables(written):
    content = written().content
    assert """<table class="rows" aria-labelledby="table-nrprec_cars-title" role="grid">
<thead><tr>
<th scope="col" aria-sort="none"><button type="button">Loss</button></th>
<th scope="col" aria-sort="none" class="n"><button type="button">model</button></th>""" in content
    assert """<tr>
<th scope="row">ArcFace</th>
<td class="n s13 bold" data-value="5.0" data-hint="fold 0: 2">5.0</td>
<td class="n" data-value="2.0">2</td></tr>
</tbody></table></div><ul class="notes"><li>A note.</li></ul>
</article>""" in content
    heat = re.search(r'<table class="matrix".*?</table>', content, re.S).group()
    assert "<button" not in heat and 'role="grid"' in heat
    assert heat.count('class="n s5"') == 2 and heat.count('class="n s15"') == 2  # shades ¼ and ¾


def test_gallery_holds_each_fold_with_its_pictures_and_properties(written):
    page = written("--dataset", "cars")
    networks = [{"name": "Triplet", "type": "ranking"}, {"name": "ArcFace", "type": "classification"},
                {"name": "My own", "type": "other"}]
    assert page.groups() == [{"label": f"cars, fold {fold}", "names": FOLDS[fold], "networks": networks}
                             for fold in (0, 1)]
    last = page.pictures()["picture-1-2"]
    image = pixels(last.pop("picture"))
    assert image.shape == (10, 10, 3)
    assert np.abs(image.mean(axis=(0, 1)) - (200, 200, 90)).max() < 6  # picture 5's colour
    assert pixels(last.pop("maps")).shape == pixels(last.pop("second")).shape == (224, 224, 3)
    assert last == {"name": "images/5.png", "properties": [["model", "model 2"]], "blank": []}
    assert len(page.pictures()) == 6


def test_properties_are_joined_by_name(place, written):
    """Another order of props.csv's rows gives the same page."""
    page = written("--dataset", "cars")
    for path in place.glob("results/cars/*/fold*/props.csv"):
        turn_rows(path)
    assert written("--dataset", "cars").content == page.content


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
    page = written("--dataset", "cars")
    assert [page.pictures()[f"picture-0-{k}"]["blank"] for k in range(3)] == [[1], [], [1]]
    assert "Maps constant or nan 2" in page.text
    first = [image for image in page.of("img") if image["alt"] == ""][0]
    assert np.abs(pixels(first["src"]).mean(axis=(0, 1)) - (40, 200, 90)).max() < 6  # the second picture


def test_fewer_pictures_are_taken_evenly_and_said(written):
    page = written("--dataset", "cars", "--pictures", "4")
    assert [group["names"] for group in page.groups()] == [[names[0], names[2]] for names in FOLDS]
    assert "Pictures (--pictures) 4 of 6" in page.text


def test_a_picture_of_several_folds_and_seeds_counts_once(place, written):
    """12 pictures × 4 folds are 12 pictures."""
    shutil.rmtree(place / "results")
    for fold in (0, 1):
        folder = add_network(place / "results", "triplet", "Triplet", fold, FOLDS[0])
        shutil.copytree(folder, folder.with_name(f"fold{fold}.seed2"))
    page = written()
    assert "Pictures (--pictures) 3 of 3 Not found (--dataset) 3" in page.text
    assert [group["label"] for group in page.groups()] == [
        "cars, fold 0", "cars, fold 0, seed 2", "cars, fold 1", "cars, fold 1, seed 2"]
    assert "Pictures (--pictures) 2 of 3 Not found" in written("--pictures", "8").text


def test_without_pictures_the_maps_stand_alone(place, written):
    page = written()
    assert "Not found (--dataset) 6" in page.text
    assert not any("picture" in picture for picture in page.pictures().values())
    (place / "cars/images/2.png").write_bytes(b"broken")
    page = written("--dataset", "cars")
    assert "Not found (--dataset) 1" in page.text
    assert [name for name, one in page.pictures().items() if "picture" not in one] == ["picture-0-1"]


def test_without_tables_and_figures_the_page_says_so(place, written):
    shutil.rmtree(place / "tables")
    shutil.rmtree(place / "figures")
    page = written("--dataset", "cars")
    assert "No tables: python tables.py RESULTS" in page.text
    assert "No figures: python figures.py RESULTS" in page.text
    assert not page.of("section", id="tables") and page.of("section", id="gallery")


def test_one_data_set_and_two(place, written):
    pages = [written("--dataset", "cars", results=results) for results in ("results", "results/cars")]
    assert pages[0].pictures() == pages[1].pictures()
    shutil.copytree(place / "results/cars", place / "results/birds")
    page = written("--dataset", "cars")
    labels = ["birds, fold 0", "birds, fold 1", "cars, fold 0", "cars, fold 1"]
    assert [group["label"] for group in page.groups()] == labels
    assert len(page.of("div", **{"class": "overview"})) == 2 and page.of("article", id="table-settings-birds")


def test_same_input_same_bytes_and_what_it_prints(make, written, run_script):
    done, content = make("--dataset", "cars", run=run_script)
    assert content == written("--dataset", "cars").content  # in another process too
    first, *findings = done.stdout.splitlines()
    assert first.startswith("report.html  6 networks, 4 tables, 2 figures, 0.")
    assert findings == ["1. Finding 0 of Triplet.", "2. Finding 1 of Margin.", "3. Finding 2 of ArcFace."]


def test_settings_tell_every_value_once(place, written):
    for fold in (0, 1):
        write_json(place / f"models/trained/cars/Triplet/fold{fold}/config.json", {
            "loss_parameters": {"class": "TripletMarginLoss", "margin": 0.05}, "frozen_trunk": True,
            "split": {"kind": "pictures", "train": 4, "test": [1]}, "options": {"epochs": 1 + fold}})
    page = written("--dataset", "cars")
    for words in ("Setting Training Embeddings Saliency maps", "split kind pictures, train 4 test test",
                  "frozen trunk yes", "loss parameters class TripletMarginLoss, margin 0.05", "epochs 1 2",
                  "samples 20 20"):
        assert words in page.text, words


def test_arrays_without_json_and_a_backbone_alone(place, written):
    for slug, _ in LOSSES:
        shutil.rmtree(place / f"results/cars/{slug}/fold1")
    add_network(place / "results", "efficientnet_lite0", None, 0, FOLDS[0])
    bare = add_network(place / "results", "margin", "Margin", 0, FOLDS[0])
    for path in bare.glob("*.json"):
        path.unlink()
    groups = written("--dataset", "cars").groups()
    assert [(group["label"], [one["name"] for one in group["networks"]]) for group in groups] == [
        ("cars, fold 0", ["Triplet", "ArcFace", "My own"]), ("cars, fold 0", ["Margin"]),  # crop unknown
        ("cars", ["efficientnet_lite0"])]
    assert [group["networks"][-1]["type"] for group in groups] == ["other", "ranking", "none"]


def test_tables_alone(place, written):
    """Someone else's CSV files and tables, without arrays."""
    shutil.rmtree(place / "results")
    write_rows(place / "results/cars/nrprec.csv", "embeddings", [["triplet/fold0/emb.npy"]])
    page = written()
    assert "Finding 0" in page.text and page.of("table")
    assert not page.of("section", id="gallery") and not page.of("section", id="settings")


# ---------------------------------------------------------------- nothing read can run


@pytest.fixture
def nasty(place):
    """The same with names that try to break out of where they stand; the pictures' names."""
    names = [f"images/{i} {name.replace('/', '∕')}.png" for i, name in enumerate(NASTY)]
    shutil.rmtree(place / "results")
    for number, loss in enumerate(NASTY[:3]):
        folder = add_network(place / "results", f"slug{number}", loss, 0, names)
        write_rows(folder / "props.csv", f"frame,{NASTY[0]}", enumerate(NASTY))
    add_pictures(place / "cars", names)
    write_json(place / "tables/tables.json", some_tables(NASTY, NASTY[1]))
    shutil.rmtree(place / "figures")
    some_figures(place / "figures", NASTY[1])
    return names


def test_nasty_names_are_text(nasty, written):
    page = written("--dataset", "cars")
    script = (ROOT / "templates/report.js").read_text(encoding="utf-8")
    assert [words for about, words in page.scripts if "type" not in about] == [script]
    assert all(not name.startswith("on") and name != "style" for _, found in page.elements for name in found)
    assert {image["src"].split(":")[0] for image in page.of("img")} == {"data"}
    assert page.groups()[0]["names"] == nasty
    assert page.pictures()["picture-0-1"]["properties"] == [[NASTY[0], NASTY[1]]]
    for name in NASTY[:2]:
        assert " ".join(name.split()) in page.text
    assert page.of("img")[0]["alt"] == NASTY[1]
    stored = [words for about, words in page.scripts if "type" in about]
    assert all(words.isascii() and not set("<>&") & set(words) for words in stored)


def test_what_html_does_not_allow_is_replaced(place, written):
    tables = some_tables()
    tables["warnings"] = ["a\x00b\x1b\ud800\uffff\x85é\u2028"]
    write_json(place / "tables/tables.json", tables)
    assert "<li>a\ufffdb\ufffd\ufffd\ufffd\ufffdé\u2028</li>" in written().content


def test_policy_passes_only_the_pages_own_style_and_script(written):
    page = written("--dataset", "cars")
    policy = page.of("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    style = re.search(r"<style>(.*?)</style>", page.content, re.S).group(1)
    digests = [hashlib.sha256(words.encode()).digest() for words in (style, page.scripts[-1][1])]
    hashes = [base64.b64encode(digest).decode() for digest in digests]
    assert dict(part.split(" ", 1) for part in policy.split("; ")) == {
        "default-src": "'none'", "img-src": "data:", "style-src": f"'sha256-{hashes[0]}'",
        "script-src": f"'sha256-{hashes[1]}'", "base-uri": "'none'", "form-action": "'none'"}


def test_no_reference_to_anything_outside(written):
    page = written("--dataset", "cars")
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    own = re.sub(r'"data:[^"]*"|sha256-[\w+/=]*', "", page.content)
    assert not re.search(r"\w+://|//\w", own)  # a comment has a blank after its slashes
    assert set(re.findall(r"url\([^)]*\)", own)) == {"url(#heat)", "url(#heat-gallery)"}
    for words in ("@import", "fetch(", "XMLHttpRequest", "WebSocket", "sendBeacon", "import(", "Storage"):
        assert words not in own, words


def test_document_is_sound(nasty, written):
    page = written("--dataset", "cars")
    assert page.content.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert len(page.of("h1")) == len(page.of("main")) == len(page.of("title")) == 1
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for _, attributes in page.elements:
        for name in ("aria-labelledby", "href"):
            target = attributes.get(name, "data:")
            assert target.startswith("data:") or target.removeprefix("#") in ids, attributes
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert all(below - above <= 1 for above, below in zip(levels, levels[1:]))
    html5lib = pytest.importorskip("html5lib", reason="html5lib is not installed: pip install html5lib")
    html5lib.HTMLParser(strict=True).parse(page.content)


def test_no_figure_from_outside_the_folder(place, make):
    """figures.json of a stranger must not put a private file into a page that is passed on."""
    (place / "private.svg").write_text("<svg>secret</svg>")
    content = json.loads((place / "figures/figures.json").read_text())
    content["figures"][1]["svg"] = "../private.svg"
    write_json(place / "figures/figures.json", content)
    one_line(make()[0], "private.svg")


# ---------------------------------------------------------------- bad input


def test_arrays_that_do_not_belong_together(place, make):
    add_network(place / "results", "margin", "Margin", 0, FOLDS[0], samples=50)
    one_line(make()[0], "triplet/fold0/maps.npy and results/cars/margin/fold0/maps.npy",
             "(samples: 20, 50)")


def test_half_finished_and_broken_arrays_are_left_out_and_listed(place, written):
    half, broken = (place / f"results/cars/{slug}/fold0/maps.npy" for slug in ("triplet", "my_own"))
    half.rename(f"{half}.part")
    broken.write_bytes(broken.read_bytes()[:-10])
    page = written("--dataset", "cars")
    assert "triplet/fold0/maps.npy is half-finished" in page.text
    assert "my_own/fold0/maps.npy is truncated" in page.text
    assert [[one["name"] for one in group["networks"]] for group in page.groups()] == [
        ["Triplet", "ArcFace", "My own"], ["ArcFace"]]


@pytest.mark.parametrize("name", ["tables", "figures"])
@pytest.mark.parametrize("content", ["", "[1, 2", "[" * 100_000, "[1, 2]", "{}", '{"missing": []}', "\ud800",
                                     '{"tables": 5, "figures": 5, "findings": []}',
                                     '{"tables": [{}], "figures": [1], "findings": [], "missing": []}',
                                     '{"tables": [], "statements": []}'])
def test_what_the_scripts_of_this_version_did_not_write(place, name, content):
    (place / name / f"{name}.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=f"{name}.json is not what this version of {name}.py writes"):
        report.read_json(place / name, name)


@pytest.mark.parametrize("results, options, words", [
    ("cars", "", "cars: no results; expected cars/<dataset>/<loss>/fold<k>/emb.npy"),
    ("results/cars/triplet", "", "results/cars/triplet: no results"),  # a folder too deep
    ("results", "--tables figures", "figures/tables.json is not what this version of tables.py writes"),
    ("results", "--figures nowhere", "python figures.py RESULTS --out nowhere makes it"),
    ("results", "--dataset nowhere", "nowhere: no such folder"),
    ("results", "--pictures 0", "--pictures 0: expected at least 1"),
    ("results", "--size 9", "--size 9: expected at least 16"),
    ("results", "--out nowhere/report.html", "does not exist"),
    ("results", "--out page.html", "expected a name ending in .html"),
    ("results", "--out tables/tables.json", "expected a name ending in .html"),
    ("results", "--out results/cars/triplet/fold0/emb.npy", "expected a name ending in .html"),
    ("results", "--out tables", "expected a name ending in .html")])
def test_bad_input_is_refused_and_nothing_written_over(place, make, results, options, words):
    (place / "page.html").symlink_to(place / "tables/tables.json")
    before = {path: path.is_file() and path.read_bytes() for path in place.rglob("*")}
    one_line(make(*options.split(), results=results)[0], words)
    assert {path: path.is_file() and path.read_bytes() for path in place.rglob("*")} == before


def test_data_set_of_another_name_among_several(place, make):
    shutil.copytree(place / "results/cars", place / "results/birds")
    (place / "cars").rename(place / "planes")
    one_line(make("--dataset", "planes")[0], "--dataset planes", "RESULTS has birds, cars")


# ---------------------------------------------------------------- in a browser


def axe_core():
    """The source of axe-core, $AXE_CORE or where npm installed it; None where it is not."""
    path = Path(os.environ.get("AXE_CORE") or ROOT / "node_modules/axe-core/axe.min.js")
    return path.read_text(encoding="utf-8") if path.is_file() else None


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("chromium or chromedriver is not here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in "headless=new no-sandbox disable-gpu disable-dev-shm-usage window-size=1400,1000".split():
        options.add_argument(f"--{argument}")
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
        size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        browser.get((path or place / "report.html").as_uri())
        shown(browser, "0-0")
        return browser

    return go


def shown(driver, which):
    """Wait until the gallery shows this set and picture."""
    until = time.monotonic() + 20
    while run(driver, "document.body.dataset.shown") != which:
        assert time.monotonic() < until, run(driver, "document.body.dataset.shown")
        time.sleep(0.01)


def run(driver, script, *arguments):
    return driver.execute_script(f"return {script}", *arguments)


def column(driver, table, number):
    rows = f"[...document.querySelectorAll('#table-{table} tbody tr')]"
    return run(driver, f"{rows}.map(row => row.cells[{number}].textContent)")


def live(driver):
    return run(driver, "document.querySelector('#live').textContent")


def press(driver, *names):
    from selenium.webdriver import ActionChains, Keys

    ActionChains(driver).send_keys(*(getattr(Keys, name) for name in names)).perform()


def find(driver, selector):
    return driver.find_element("css selector", selector)


def slide(driver, value):
    driver.execute_script("const slider = document.querySelector('#overlay'); slider.value = arguments[0];"
                          "slider.dispatchEvent(new Event('input'))", value)


def test_browser_no_errors_no_requests_and_the_policy_stops_what_would_run(visit, nasty):
    driver = visit()
    assert driver.get_log("browser") == []
    requests = run(driver, "performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in requests if not name.startswith("data:")] == []
    find(driver, "#film").send_keys("\ue014")  # the right arrow
    shown(driver, "0-1")
    assert run(driver, "document.querySelector('#which').textContent") == f"2 of 4: {nasty[1]}"
    assert run(driver, "window.pwned") is None and driver.get_log("browser") == []
    driver.execute_script("""const image = document.createElement("div");
        image.innerHTML = '<img src="x" onerror="window.pwned=1">';
        const script = document.createElement("script"); script.textContent = "window.pwned = 2";
        document.body.append(image, script)""")
    time.sleep(0.3)
    assert run(driver, "window.pwned") is None
    assert any("Content Security Policy" in entry["message"] for entry in driver.get_log("browser"))


def test_browser_sorts_by_click_and_by_keyboard(place, visit):
    tables = some_tables()
    tables["tables"][0]["rows"].append([cell("Mean", bold=True), cell("9.9", 9.9), cell("")])
    write_json(place / "tables/tables.json", tables)
    driver = visit()

    def sorting():
        heads = driver.find_elements("css selector", "#table-nrprec_cars th[aria-sort]")
        return [head.get_attribute("aria-sort") for head in heads]

    loss, model, holes = driver.find_elements("css selector", "#table-nrprec_cars th button")
    for order, values in ("descending", ["5.0", "2.5", "0.0"]), ("ascending", ["0.0", "2.5", "5.0"]):
        model.click()  # the mean stays below
        assert column(driver, "nrprec_cars", 1) == values + ["9.9"] and sorting() == ["none", order, "none"]
    driver.execute_script("arguments[0].focus()", loss)
    press(driver, "ENTER")
    assert column(driver, "nrprec_cars", 0) == ["ArcFace", "Margin", "Triplet", "Mean"]
    assert sorting() == ["ascending", "none", "none"] and live(driver) == "Sorted by Loss, ascending"
    press(driver, "SPACE", "SPACE")
    assert column(driver, "nrprec_cars", 0) == ["Triplet", "Margin", "ArcFace", "Mean"]
    assert sorting() == ["none"] * 3
    for values in (["2", "0", "", ""], ["0", "2", "", ""]):  # an empty cell is last, whichever way
        holes.click()
        assert column(driver, "nrprec_cars", 2) == values


def test_browser_heat_map_by_keyboard_and_hover(visit):
    from selenium.webdriver import ActionChains

    driver = visit()
    cells = driver.find_elements("css selector", "#table-correlation_cars tbody td")
    assert [one.get_attribute("tabindex") for one in cells] == ["0"] + ["-1"] * 8  # one stop for the tab key
    driver.execute_script("arguments[0].focus()", cells[0])
    for keys, words in [(["ARROW_RIGHT"], "Triplet · Margin: .6. 4 folds"),
                        (["ARROW_DOWN"] * 3, "ArcFace · Margin: .8. 4 folds"),
                        (["HOME"], "ArcFace · Triplet: .7. 4 folds")]:
        press(driver, *keys)
        assert live(driver) == words
    press(driver, "CONTROL", "END")
    assert "ArcFace · ArcFace" in live(driver) and find(driver, "#tip").text == live(driver).strip()
    press(driver, "NULL", "ESCAPE")
    assert find(driver, "#tip").text == ""
    assert [one.get_attribute("tabindex") for one in cells] == ["-1"] * 8 + ["0"]
    ActionChains(driver).move_to_element(cells[1]).perform()
    assert find(driver, "#tip").text == "Triplet · Margin: .6\n4 folds"
    tip = find(driver, "#tip").rect
    assert tip["x"] >= 0 and tip["x"] + tip["width"] <= 1400


def test_browser_enlarges_charts(visit):
    driver = visit()
    for way in (lambda: press(driver, "ESCAPE"), lambda: find(driver, "dialog").click()):
        find(driver, ".overview .chart").click()
        assert find(driver, "dialog img").rect["height"] > 600
        way()
        assert not find(driver, "dialog").is_displayed()


def test_browser_gallery(place, visit):
    driver = visit()

    def tile(number):
        """What a tile shows, in the middle of each of its map's 10 × 10 values."""
        element = driver.find_elements("css selector", "#tiles .over")[number]
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        image = Image.open(io.BytesIO(element.screenshot_as_png)).convert("RGB")
        return np.asarray(image.resize((100, 100)), float)[5::10, 5::10].reshape(100, 3)

    words = [one.text.split("\n")[0] for one in driver.find_elements("css selector", "#tiles li")]
    assert words == ["Picture", "Triplet ranking", "ArcFace classification", "My own other"]
    assert np.abs(tile(0) - (0, 200, 90)).max() < 9  # picture 0's colour
    mixed = tile(1)
    slide(driver, 0)
    assert np.abs(tile(1) - tile(0)).max() < 3 < np.abs(mixed - tile(0)).max()  # nothing of the map
    values = np.load(place / "results/cars/triplet/fold0/maps.npy")[0].astype(float).ravel()
    slide(driver, 50)
    away = np.abs(tile(1) - tile(0)).sum(axis=1)
    assert away[values < 0.05].max() < 60 < away[values > 0.5].min()  # the salient parts alone
    slide(driver, 100)
    alone = tile(1)
    expected = np.stack([np.interp(values, np.linspace(0, 1, 5), channel) for channel in zip(
        (0, 0, 4), (85, 15, 109), (186, 54, 85), (249, 142, 9), (252, 255, 164))], axis=1)
    assert np.abs(alone - expected).mean() < 20  # the map alone, in saliency.py's colours
    assert np.corrcoef(alone.sum(axis=1), values)[0, 1] > 0.9
    find(driver, "#second").click()
    time.sleep(0.3)
    assert np.abs(tile(1) - alone).max() > 50
    find(driver, "#film").send_keys("\ue010")  # the end key
    shown(driver, "0-2")
    assert find(driver, "#film").get_attribute("aria-activedescendant") == "film-2"
    assert find(driver, "#about").text.split() == ["model", "model", "2"]
    driver.execute_script("const set = document.querySelector('#set'); set.value = 1;"
                          "set.dispatchEvent(new Event('change'))")
    shown(driver, "1-0")
    assert find(driver, "#which").text == "1 of 3: images/1.png"
    assert len(driver.find_elements("css selector", "#film img[src^='data:']")) == 3


def test_browser_long_names_stay_on_a_phone(place, visit):
    long = "a" * 300
    shutil.rmtree(place / "results")
    names = [f"images/{k}{long[:200]}.png" for k in range(2)]
    add_pictures(place / "cars", names)
    add_network(place / "results", "my_own", long, 0, names)
    write_json(place / "tables/tables.json", some_tables([long, long + "b", long + "c"], long))
    assert run(visit(360), "document.documentElement.scrollWidth") == 360


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 800, 2400])
def test_browser_axe_and_width(place, visit, scheme, width):
    tables = some_tables()
    tables["tables"][0]["rows"] += [[cell("shade"), cell(k, k, shade=k / 20), cell("")] for k in range(21)]
    write_json(place / "tables/tables.json", tables)
    driver = visit(width, scheme)
    assert run(driver, "document.documentElement.scrollWidth <= innerWidth")
    dark = run(driver, "getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 26)"
    assert dark == (scheme == "dark") and find(driver, "#theme").text == ("Light" if dark else "Dark")
    axe = axe_core()
    if axe is None:
        pytest.skip("axe-core is not here: npm install axe-core (or its axe.min.js in $AXE_CORE)")
    driver.execute_cdp_cmd("Runtime.evaluate", {"expression": axe})
    results = driver.execute_async_script("axe.run().then(arguments[0])")
    assert [(one["id"], one["nodes"][0]["html"][:200]) for one in results["violations"]] == []
    assert len(results["passes"]) > 30
    find(driver, "#theme").click()
    other = driver.execute_async_script("axe.run({runOnly: ['color-contrast']}).then(arguments[0])")
    now = run(driver, "getComputedStyle(document.body).backgroundColor")
    assert other["violations"] == [] and (now == "rgb(20, 22, 26)") != dark


def test_browser_opens_15_networks_and_300_pictures_in_two_seconds(visit, tmp_path, run_script):
    names = [f"images/{i:03d}.png" for i in range(300)]
    for row in read_rows(ROOT / "models/losses.csv"):
        add_network(tmp_path / "many", row["slug"], row["name"], 0, names)
    add_pictures(tmp_path / "pictures", names)
    page = tmp_path / "many.html"
    done = run_script("report.py", tmp_path / "many", "--dataset", tmp_path / "pictures", "--out", page)
    assert done.returncode == 0, done.stderr
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        driver = visit(path=page)
        seconds.append(time.monotonic() - start)
    assert len(driver.find_elements("css selector", "#film li")) == 300
    assert len(driver.find_elements("css selector", "#film img[src]")) < 60  # lazily
    assert min(seconds) < 2, (seconds, page.stat().st_size)
