"""figures.py: what is drawn against hand-worked numbers, and the command on a small results folder."""
import csv
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install '.[plots]'")
pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install '.[plots]'")

from dml_common import files  # noqa: E402
from dml_common import pictures as data  # noqa: E402
import figures  # noqa: E402
from dml_common import results  # noqa: E402
from conftest import ROOT, SHARED  # noqa: E402

NETWORKS = [(name, name.lower()) for name in ("Contrastive", "Triplet", "ArcFace", "CosFace", "None")]
EVERYTHING = ["profile", "correlation", "jsd", "gallery", "gallery_2", "tsne", "samples", "pairs", "pairs_all", "training"]
PROPERTIES = ["model", "rotation_z", "color_hue", "camera_loc_z"]


def write_rows(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header.split(","), *rows])


def make_results(folder, networks=NETWORKS, folds=2, n=24):
    """results/cars, models/trained/cars and pictures/cars, small and complete; fold k has every folds-th picture."""
    rng = np.random.default_rng(5)
    pictures, results = folder / "pictures" / "cars", folder / "results" / "cars"
    (pictures / "images").mkdir(parents=True)
    props = [[i, ("suv", "van", "coupe")[i % 3], 90 * int(rng.integers(4)), i % 5 / 10, [0.5, 1.5][i // 2 % 2]] for i in range(n)]
    write_rows(pictures / "props.csv", f"frame,{','.join(PROPERTIES)}", props)
    for i in range(n):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(pictures / "images" / f"{i:06d}.png")
    for name, slug in networks:
        for fold in range(folds):
            rows = list(range(n))[fold::folds]
            paths = [f"images/{row:06d}.png" for row in rows]
            place = results / slug / f"fold{fold}"
            place.mkdir(parents=True)
            codes = np.array([row % 3 for row in rows])
            embeddings = np.eye(3)[codes] @ rng.normal(size=(3, 6)) + rng.normal(size=(len(rows), 6))
            np.save(place / "emb.npy", embeddings.astype(np.float32))
            np.save(place / "maps.npy", rng.random((8, 16, 16)).astype(np.float16))
            write_rows(place / "labels.csv", "path", [[path] for path in paths])
            write_rows(place / "props.csv", f"frame,{','.join(PROPERTIES)}", [props[row] for row in rows])
            about = {"dataset": "cars", "loss": name, "fold": fold, "backbone": "efficientnet_lite0",
                     "preprocessing": {"resize": 18, "crop": 16}}
            for stem, listed, options in ("emb", paths, {}), ("maps", paths[:8], {"limit": 8, "pick": None}):
                (place / f"{stem}.json").write_text(json.dumps({**about, "options": options, "pictures": {
                    "number": len(listed), "sha256": data.pictures_sha256(listed)}}))
    tables(results, [name for name, _ in networks], folds)
    for _, slug in networks[:-1]:
        for fold in range(folds):
            place = folder / "models" / "trained" / "cars" / slug / f"fold{fold}"
            place.mkdir(parents=True)
            write_rows(place / "history.csv", "epoch,split,loss,positive_mean,negative_mean,jsd,recall_at_1,map_at_r,seconds", [
                [epoch, split, "" if split == "test" else 2 - epoch / 4, .3 + epoch / 20, .2, .1 + epoch / 10, .5, .2, 1]
                for epoch in range(4) for split in ("train", "validation", "test") if split != "test" or epoch in (0, 3)])
    return folder


def tables(results, names, folds):
    rng = np.random.default_rng(6)
    results.mkdir(parents=True, exist_ok=True)
    write_rows(results / "nrprec.csv", "loss,fold,embeddings,property,distance,null,max_neighbours,nr_precision,p_value", [
        [name, fold, "emb.npy", key, "euclidean", "binomial", "", 10 / (k + 1) + rng.random(), ""]
        for name in names for fold in range(folds) for k, key in enumerate(PROPERTIES)])
    write_rows(results / "compare.csv", "model_a,fold_a,model_b,fold_b,n,left_out,correlation,correlation_std,correlation_low,"
               "correlation_high,jsd,jsd_std,ceiling,corrected", [
                   [a, fold, b, fold, 8, 0, r, .1, r - .05, r + .05, 1 - r, .1, .8, r / .8]
                   for fold in range(folds) for i, a in enumerate(names) for b in names[:i] for r in [.4 + .3 * rng.random()]])
    write_rows(results / "pairs.csv", "loss,fold,embeddings,label,n,jsd,jsd_null,bins", [
        [name, fold, "emb.npy", "model", 12, .3 + fold / 10, .1, 200] for name in names for fold in range(folds)])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, CompletedProcess): a small results folder and everything drawn from it."""
    folder = make_results(tmp_path_factory.mktemp("figures"))
    return folder, draw(folder)


def draw(folder, *arguments, out="out", **options):
    command = [sys.executable, str(ROOT / "figures.py"), str(folder / "results"), "--out", str(folder / out), "--dataset",
               str(folder / "pictures" / "cars"), "--models", str(folder / "models"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture
def small(tmp_path):
    """A results folder of one's own, to be spoiled."""
    return make_results(tmp_path, NETWORKS[:2], folds=1, n=12)


def refused(folder, *arguments):
    """The one line on stderr of a command that has to end with status 2 and to leave nothing behind."""
    done = draw(folder, *arguments, out="refused")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("figures.py: "), lines
    assert not [path for path in (folder / "refused").glob("*.part")] and not (folder / "refused" / "figures.json").exists()
    return lines[0]


@pytest.fixture
def styled():
    with figures.style.context(figures.STYLE):
        yield


# ---------------------------------------------------------------- numbers


def test_pairs_of_three_vectors():
    x = np.array([[2, 0], [0, 3], [-1, 0]], dtype=np.float32)  # products 0, -1, 0
    counts = figures.pair_histograms(x, np.array(["a", "a", "b"]), bins=4)
    assert counts.tolist() == [[0, 0, 1, 0], [1, 0, 1, 0]]
    counts = figures.pair_histograms(x[[0, 0]], np.array([1, 1]), bins=4)
    assert counts.tolist() == [[0, 0, 0, 1], [0, 0, 0, 0]]  # 1 is in the last bin


def test_pairs_do_not_depend_on_the_block():
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(50, 4)), rng.integers(0, 3, 50)
    one = figures.pair_histograms(x, labels)
    assert one.sum() == 50 * 49 // 2
    same = sum(count * (count - 1) // 2 for count in np.bincount(labels))
    assert one[0].sum() == same
    for block in 1, 7, 50:
        np.testing.assert_array_equal(figures.pair_histograms(x, labels, block=block), one)


def test_coarser_keeps_every_pair_and_finds_common_bins():
    a, b = np.zeros((2, 200), int), np.zeros((2, 100), int)
    a[0, 150], a[1, 199], b[0, 60] = 5, 2, 3
    edges, (first, second) = figures.coarser([a, b])
    assert first.sum() == 7 and second.sum() == 3 and first.shape == second.shape == (2, len(edges) - 1)
    assert edges[0] <= 0.2 and edges[-1] == 1 and len(edges) <= 41
    np.testing.assert_allclose(edges[:-1][first[0] > 0] <= 0.5, True)  # bin 150 of 200 begins at 0.5


def test_clusters_stand_together():
    near, far = 0.1, 0.9
    group = np.array([0, 1, 0, 1, 0, 1])
    distances = np.where(group[:, None] == group, near, far).astype(float)
    np.fill_diagonal(distances, np.nan)
    tree, order = figures.cluster(distances)
    assert sorted(order) == list(range(6)) and len(set(group[order][:3])) == 1
    assert tree[-1, 2] == pytest.approx(far)  # average linkage joins the groups at their mean distance
    distances[0, 1] = np.nan
    tree, order = figures.cluster(distances)
    assert tree is None and order.tolist() == list(range(6))


def test_heat_grows_lighter_and_marks_nan():
    ramp = figures.heat(np.linspace(0, 1, 50)[None])[0].astype(float) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(ramp) >= 0).all() and ramp[0] < 5 and ramp[-1] > 240
    assert figures.heat(np.array([[np.nan]]))[0, 0].tolist() == [128, 128, 128]


def test_samples_are_nearest_the_middle():
    properties = {"size": np.array(["1", "1", "2", "2", "10", "10"]), "angle": np.array(["0", "180", "0", "90", "0", "0"]),
                  "kind": np.array(["b", "b", "b", "b", "b", "a"])}
    chosen = figures.choose_samples(properties, {"angle"})
    assert chosen["size"] == (["1", "2", "10"], [0, 2, 4], 3)   # of 1 the row whose angle is the usual one
    assert chosen["angle"] == (["0", "90", "180"], [2, 3, 1], 3)  # of 0 the row whose size is in the middle
    assert chosen["kind"][0] == ["a", "b"]
    many = figures.choose_samples({"n": np.arange(100).astype(str)}, set())["n"]
    assert many[2] == 100 and len(many[0]) == 10 and many[0][0] == "0" and many[0][-1] == "99"


def test_circular_properties_by_name_or_option():
    names = ["rotation_z", "bg_color_hue", "sun_rotation", "sun_elevation", "model"]
    assert figures.circular_names(names, None) == {"rotation_z", "bg_color_hue", "sun_rotation"}
    assert figures.circular_names(names, "model, x") == {"model", "x"}
    assert figures.period(np.array([0, .9])) == 1 and figures.period(np.array([0, 315])) == 360


def test_cyclic_colours_close_and_show_on_white():
    assert figures.CIRCLE[0] == figures.CIRCLE[-1]
    light = [np.array([int(colour[i:i + 2], 16) for i in (1, 3, 5)]) @ [0.2126, 0.7152, 0.0722] for colour in figures.CIRCLE]
    assert np.argmax(light) == 4 and max(light) < 210


def test_profile_draws_means_whiskers_and_groups(styled):
    values = np.array([[1.0, 20], [3, 22], [2, 30], [4, 34], [0, 1]])
    kinds = ["ranking"] * 2 + ["classification"] * 2 + ["none"]
    fig = figures.draw_profile(values, values - 0.5, values + 0.5, ["low", "high"], kinds)
    ax, = fig.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["high", "low"]
    dots = [line.get_xdata().tolist() for line in ax.lines if line.get_linestyle() == "None"]
    assert dots == [[20, 22], [30, 34], [1], [1, 3], [2, 4], [0]]
    ends = [segment[:, 0].tolist() for lines in ax.collections for segment in lines.get_segments()]
    assert [19.5, 20.5] in ends and [21.0, 21.0] in ends and [32.0, 32.0] in ends
    half = 12.706 * np.sqrt(2) / np.sqrt(2)  # Student's t with one degree of freedom times sd / sqrt(2)
    assert any(np.allclose(one, [21 - half, 21 + half], rtol=1e-3) for one in ends)
    assert any(np.allclose(line.get_xdata(), 2.576) for line in ax.lines)


def test_published_group_means(styled):
    path = SHARED / "reference" / "kobs_table6_nrprec_cars.csv"
    if not path.is_file():
        pytest.skip("../shared/reference is not here: the published Table 6")
    table = files.read_table(path)
    types = {row["name"]: row["type"] for row in results.losses()}
    rows = [row for row, name in enumerate(table["loss"]) if name in types]
    properties = [name for name in table if name != "loss"]
    values = np.array([[float(table[name][row] or "nan") for name in properties] for row in rows])
    fig = figures.draw_profile(values, values, values, properties, [types[table["loss"][row]] for row in rows])
    strokes = np.array([one[0, 0] for lines in fig.axes[0].collections for one in lines.get_segments() if one[0, 0] == one[1, 0]])
    for name in "Ranking Mean", "Classification Mean":
        published = [float(table[key][table["loss"].index(name)]) for key in properties]
        assert all(np.abs(strokes - value).min() < 0.0101 for value in published), name


def test_folds_are_averaged_by_fishers_z(tmp_path, monkeypatch, styled):
    write_rows(tmp_path / "compare.csv", "model_a,model_b,n,correlation,correlation_low,correlation_high,jsd,ceiling,corrected", [
        ["Triplet", "ArcFace", 8, .2, .1, .3, .4, .8, .25], ["ArcFace", "Triplet", 8, .9, .8, 1, .2, .8, 1.1],
        ["Triplet", "Contrastive", 8, .5, .4, .6, .3, "", ""], ["ArcFace", "Contrastive", 8, "", "", "", "", "", ""],
        ["Triplet", "Triplet", 8, .99, .9, 1, 0, "", ""]])
    seen = []
    monkeypatch.setattr(figures, "draw_heat_map", lambda *arguments: seen.append(arguments))
    found = {"folder": tmp_path, "networks": []}
    for measure in "correlation", "jsd":
        (_, _, caption, _), = figures.make_heat_map(found, None, measure)
    values, names, kinds, tree, order, *_ = seen[0]
    assert names == ["Contrastive", "Triplet", "ArcFace"] and kinds == ["ranking", "ranking", "classification"]
    assert values[1, 2] == pytest.approx(100 * np.tanh((np.arctanh(.2) + np.arctanh(.9)) / 2)) and values[1, 2] == values[2, 1]
    assert values[0, 1] == pytest.approx(50) and np.isnan(values[0, 2]) and tree is None  # a pair is missing
    assert seen[1][0][1, 2] == pytest.approx(30)


def test_heat_map_shows_what_it_was_given(styled):
    values = np.array([[np.nan, 61.4, 12], [61.4, np.nan, 33], [12, 33, np.nan]])
    fig = figures.draw_heat_map(values, ["a", "b", "c"], ["ranking", "none", "other"], None, np.array([2, 0, 1]))
    ax = fig.axes[0]
    texts = {tuple(text.get_position()): text.get_text() for text in ax.texts}
    assert texts == {(1.5, .5): "12", (2.5, .5): "33", (.5, 1.5): "12", (2.5, 1.5): "61", (.5, 2.5): "33", (1.5, 2.5): "61"}
    assert [label.get_text() for label in ax.get_yticklabels()] == ["c", "a", "b"]


def test_tsne_is_repeatable_whatever_the_threads():
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import figures, numpy as np, hashlib;"
            "x = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32);"
            "print(hashlib.sha256(figures.embed_2d(x, 3).tobytes()).hexdigest())")
    found = {subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, check=True,
                            env={**os.environ, "OMP_NUM_THREADS": threads}).stdout for threads in "12"}
    assert len(found) == 1


def test_rows_of_other_pictures_are_refused(small):
    about = {"path": small / "maps.npy", "pictures": {"sha256": "0" * 64}, "options": {"limit": 2, "pick": None}}
    with pytest.raises(ValueError, match="maps.npy has 2 rows of other pictures than"):
        figures.picture_names(about, 2, data.open_dataset(small / "pictures" / "cars"))


# ---------------------------------------------------------------- the command


def test_everything_is_drawn(made):
    folder, done = made
    assert done.returncode == 0 and done.stderr == "", done.stderr
    about = json.loads((folder / "out" / "figures.json").read_text())
    assert [one["name"] for one in about["figures"]] == [f"{name}_cars" for name in EVERYTHING] and about["missing"] == []
    for one in about["figures"]:
        assert set(one) == {"name", "title", "caption", "dataset", "svg", "png"}
        assert one["dataset"] == "cars" and one["title"] and one["caption"].endswith(".") and "  " not in one["caption"], one
        assert one["png"] == f"{one['name']}.png" and (folder / "out" / f"{one['name']}.pdf").read_bytes().startswith(b"%PDF")
        photograph = one["name"].startswith(("gallery", "samples"))
        assert one["svg"] == (None if photograph else f"{one['name']}.svg")
        with Image.open(folder / "out" / one["png"]) as image:
            assert image.width <= 1100
    written = {path.name for path in (folder / "out").iterdir()}
    assert written == {"figures.json"} | {f"{one['name']}.{suffix}" for one in about["figures"]
                                         for suffix in (["png", "pdf"] + ["svg"] * bool(one["svg"]))}


def test_captions_say_what_a_reader_needs(made):
    captions = {one["name"]: one["caption"] for one in json.loads((made[0] / "out" / "figures.json").read_text())["figures"]}
    assert all(part in captions["profile_cars"] for part in ("2.576", "2 folds", "null binomial"))
    assert "Ceiling" in captions["correlation_cars"] and "average linkage on 1 − r" in captions["correlation_cars"].lower()
    assert "seed 0" in captions["tsne_cars"] and "rotation_z, color_hue" in captions["tsne_cars"]
    assert "(c) the same before training" in captions["pairs_cars"] and "fold 0" in captions["gallery_cars"]


def test_svgs_are_xml_light_and_alone(made):
    told = [one["title"] for one in json.loads((made[0] / "out" / "figures.json").read_text())["figures"]]
    for path in (made[0] / "out").glob("*.svg"):
        text = path.read_text()
        root = ET.fromstring(text)
        assert len(text) < 400_000 and root.tag.endswith("svg"), path
        assert [one.text for one in root.iter() if one.tag.endswith("}title")][0] in told
        for element in root.iter():
            assert not element.tag.endswith("script")
            for key, value in element.attrib.items():
                assert not key.lower().startswith("on")
                if key.endswith("href"):
                    assert value.startswith(("#", "data:image/png;base64,")), value
        assert "date" not in re.sub(r"<image[^>]*>", "", text.lower()).split("</metadata>")[0].replace("update", ""), path


def test_same_input_same_bytes(made, tmp_path):
    (tmp_path / "matplotlibrc").write_text("font.size: 30\nsvg.fonttype: none\n")
    done = draw(made[0], out="again", cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1", "SOURCE_DATE_EPOCH": "7"})
    assert done.returncode == 0, done.stderr
    for path in (made[0] / "out").iterdir():
        assert path.read_bytes() == (made[0] / "again" / path.name).read_bytes(), path.name


def test_gallery_shows_each_map_under_its_picture(small):
    place = small / "results" / "cars"
    for slug, bright in ("contrastive", 2), ("triplet", 5):
        maps = np.zeros((8, 16, 16), np.float16)
        maps[bright] = 1
        np.save(place / slug / "fold0" / "maps.npy", maps)
    for i in range(12):
        Image.new("RGB", (20, 20), (10 * i, 200, 0)).save(small / "pictures" / "cars" / "images" / f"{i:06d}.png")
    assert draw(small, "--only", "gallery", "--pictures", "6").returncode == 0
    with Image.open(small / "out" / "gallery_cars.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    # six columns of rows 0, 1, 3, 4, 6, 7: not 2 or 5, whose maps are bright
    wanted = np.unique(np.linspace(0, 7, 6).round().astype(int))
    lines = np.flatnonzero((pixels[:, :, 1] == 200).any(axis=1))
    columns = pixels[lines[len(lines) // 2]]
    seen = [int(red) for red in dict.fromkeys(columns[columns[:, 1] == 200][:, 0])]
    assert seen == [10 * row for row in wanted]
    light = (pixels == [252, 255, 164]).all(axis=2).any()
    assert light == bool({2, 5} & set(wanted.tolist()))


def test_a_network_of_choice_and_a_part(made):
    done = draw(made[0], "--only", "pairs,tsne", "--network", "arcface/fold1", "--points", "10", out="part")
    assert done.returncode == 0, done.stderr
    about = {one["name"]: one for one in json.loads((made[0] / "part" / "figures.json").read_text())["figures"]}
    assert list(about) == ["tsne_cars", "pairs_cars", "pairs_all_cars"]
    assert "10 of 12 embeddings of ArcFace, fold 1" in about["tsne_cars"]["caption"]
    assert "ArcFace, fold 1" in about["pairs_cars"]["caption"]


def test_names_with_special_letters(tmp_path, styled):
    names = [("$x_1$ & <b>", "dollar"), ("_under_", "under"), ("\\frac{1}{2}--", "frac")]
    folder = make_results(tmp_path, names, folds=1, n=12)
    for path in [folder / "pictures" / "cars" / "props.csv", *folder.glob("results/cars/*/fold0/props.csv")]:
        path.write_text(path.read_text().replace("rotation_z", "$rot_z <i>&").replace("suv", "$u$ <v>").replace("van", "_van"))
    done = draw(folder, "--only", "profile,correlation,tsne,samples,pairs")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    for path in (folder / "out").glob("*.svg"):
        ET.fromstring(path.read_text())
    assert figures.plain("a\nb\x00") == "a\ufffdb\ufffd" and figures.plain("") == "–"
    assert figures.plain("x" * 50, 10) == "x" * 9 + "…"


def test_letters_without_a_glyph_are_told(small):
    path = small / "results" / "cars" / "nrprec.csv"
    path.write_text(path.read_text().replace("rotation_z", "回転"), encoding="utf-8")
    done = draw(small, "--only", "profile")
    assert done.returncode == 0 and "drawn as boxes" in done.stderr and len(done.stderr.splitlines()) == 1


def test_what_is_missing_is_left_out_and_listed(tmp_path, run_script):
    folder = make_results(tmp_path, NETWORKS[:2], folds=1, n=12)
    (folder / "results" / "cars" / "compare.csv").unlink()
    (folder / "results" / "cars" / "triplet" / "fold0" / "emb.npy.part").touch()
    (folder / "results" / "cars" / "triplet" / "fold0" / "emb.npy").unlink()
    done = run_script("figures.py", folder / "results", "--out", folder / "out", "--models", folder)
    assert done.returncode == 0, done.stderr
    about = json.loads((folder / "out" / "figures.json").read_text())
    assert [one["figure"] for one in about["missing"]] == ["", "correlation", "jsd", "gallery", "samples", "training"]
    assert [one["name"] for one in about["figures"]] == ["profile_cars", "tsne_cars", "pairs_cars"]
    lines = done.stderr.splitlines()
    assert "half-finished" in lines[0] and len(lines) == 6 and all(line.startswith("figures.py: ") for line in lines)
    assert "--dataset" in lines[3] and "compare.csv" in lines[1]


def test_one_network_without_a_loss(tmp_path, run_script):
    place = tmp_path / "results" / "mine"
    place.mkdir(parents=True)
    rows = [["e.npy", "a", 4, .5], ["e.npy", "b", 1, .2]]
    write_rows(place / "nrprec.csv", "embeddings,property,nr_precision,nr_precision_se", rows)
    done = run_script("figures.py", place, "--out", tmp_path / "out", "--only", "profile")
    assert done.returncode == 0, done.stderr
    one, = json.loads((tmp_path / "out" / "figures.json").read_text())["figures"]
    assert one["name"] == "profile_mine" and "e.npy" in one["caption"] and "95 % interval" in one["caption"]


def test_histograms_before_training_come_from_the_training(small):
    place = small / "models" / "trained" / "cars" / "contrastive" / "fold0"
    rows = [[epoch, "test", 4, -1 + i / 2, -.5 + i / 2, [1, 0, 2, 7][i], 3] for epoch in (0, 5) for i in range(4)]
    place.mkdir(parents=True, exist_ok=True)
    write_rows(place / "histograms.csv", "epoch,split,bins,low,high,positive,negative", rows)
    import argparse

    folder = small / "results" / "cars"
    found = {"name": "cars", "folder": folder, "networks": figures.find_networks(folder, small / "models")[0]}
    started = figures.read_started(found, argparse.Namespace(models=small / "models"))
    assert {key: value.tolist() for key, value in started.items()} == {("Contrastive", "0"): [[1, 0, 2, 7], [3, 3, 3, 3]]}


# ---------------------------------------------------------------- bad input


def test_no_results(tmp_path):
    (tmp_path / "results" / "cars").mkdir(parents=True)
    (tmp_path / "pictures" / "cars").mkdir(parents=True)
    assert "no results" in refused(tmp_path)
    (tmp_path / "results" / "cars").rmdir()
    (tmp_path / "results").rmdir()
    assert "no such folder" in refused(tmp_path)


def spoil_list(place):
    about = json.loads((place / "emb.json").read_text())
    about["pictures"]["sha256"] = "0" * 64
    (place / "emb.json").write_text(json.dumps(about))


def spoil_pictures(place):
    for path in (place.parents[3] / "pictures" / "cars" / "images").glob("00000[0-9].png"):
        path.write_bytes(b"no picture")


def spoil_table(*lines):
    return lambda place: (place.parents[1] / "nrprec.csv").write_text("\n".join(lines))


SPOILS = {
    "other lists": (spoil_list, "profile", "other lists of pictures"),
    "maps of another shape": (lambda place: np.save(place / "maps.npy", np.zeros((8, 9, 9))), "gallery", "differ in shape"),
    "maps beyond 1": (lambda place: np.save(place / "maps.npy", np.full((8, 16, 16), 2.0)), "gallery", "expected maps in [0, 1]"),
    "unreadable picture": (spoil_pictures, "gallery", "can't be read as a picture"),
    "missing picture": (lambda place: (place.parents[3] / "pictures/cars/images/000000.png").unlink(), "gallery", "not in"),
    "short properties": (lambda place: write_rows(place.parents[1] / "contrastive/fold0/props.csv", "frame,a", [[1, 2]]),
                         "tsne", "rows"),
    "no number": (spoil_table("embeddings,property,nr_precision", "e,a,x"), "profile", "expected a number"),
    "no column": (spoil_table("a,b", "1,2"), "profile", "lacks the columns embeddings, property"),
    "mixed options": (spoil_table("embeddings,property,nr_precision,null", "e,a,1,binomial", "f,a,1,hypergeometric"), "profile",
                      "mixes null"),
}


@pytest.mark.parametrize("spoil, told", [
    (lambda path: path.write_bytes(b"maps"), "not a .npy file"),
    (lambda path: os.truncate(path, 300), "truncated"),
    (lambda path: np.save(path, np.array([{}]), allow_pickle=True), "could run code")])
def test_arrays_that_are_none_are_left_out_and_listed(small, spoil, told):
    spoil(small / "results/cars/triplet/fold0/maps.npy")
    done = draw(small, "--only", "gallery")
    assert done.returncode == 0 and told in done.stderr and "Traceback" not in done.stderr
    about = json.loads((small / "out/figures.json").read_text())
    assert [one["figure"] for one in about["missing"]] == [""] and told in about["missing"][0]["what"]
    assert about["figures"][0]["name"] == "gallery_cars"


def test_what_is_not_above_chance_is_hollow(styled):
    table = {"nr_precision": np.array([3.0, 2, 4, -9]), "p_holm": ["0.001", "0.02", "0.001", "0.001"],
             "property": ["a", "a", "b", "c"]}
    clear = figures.above_chance(table, ["x"] * 4, ["x"], ["a", "b", "c"])
    assert clear.tolist() == [[False, True, False]]  # one fold of a is not below 0.01, c lies below chance
    assert figures.above_chance({**table, "p_holm": ["0.001", "", "0.001", "0.001"]}, ["x"] * 4, ["x"], ["a", "b", "c"]) is None
    values = np.array([[3.0, 4, -9]])
    ax, = figures.draw_profile(values, values, values, ["a", "b", "c"], ["ranking"], clear).axes
    white = [line.get_xdata().tolist() for line in ax.lines if line.get_color() == "white"]
    assert white == [[3.0], [-9.0]]


@pytest.mark.parametrize("name", SPOILS)
def test_spoilt_results(small, name):
    spoil, only, told = SPOILS[name]
    spoil(small / "results" / "cars" / "triplet" / "fold0")
    assert told in refused(small, "--only", only)


@pytest.mark.parametrize("arguments, told", [
    (["--only", "profil"], "expected names among profile"), (["--points", "1"], "at least 4"),
    (["--network", "tripl"], "triplet/fold0"), (["--seed", "-1"], "at least 0"), (["--pictures", "x"], "invalid int"),
    (["--label", "colour", "--only", "pairs"], "no property 'colour'"), (["--dataset", "nowhere"], "no such folder")])
def test_options_that_do_not_fit(small, arguments, told):
    assert told in refused(small, *arguments)


@pytest.mark.parametrize("package", ["matplotlib", "sklearn"])
def test_packages_that_are_missing(small, package):
    code = ("import runpy, sys; sys.modules[sys.argv[1]] = None; script = sys.argv[2]; sys.argv = sys.argv[2:];"
            "runpy.run_path(script, run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code, package, str(ROOT / "figures.py"), str(small / "results"), "--out",
                           str(small / "out")], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "pip install '.[plots]'" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (small / "out").exists()


def test_the_output_is_no_folder(small):
    (small / "file").write_text("")
    done = draw(small, out="file")
    assert done.returncode == 2 and "is a file" in done.stderr and (small / "file").read_text() == ""


def test_help_names_every_figure(run_script):
    done = run_script("figures.py", "--help")
    assert done.returncode == 0 and all(f"    {name}" in done.stdout for name in figures.FIGURES if name != "jsd")
