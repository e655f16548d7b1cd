"""figures.py: what is drawn against hand-worked numbers, and the command on a small results folder."""
import itertools
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install '.[report]'")
pytest.importorskip("sklearn", reason="scikit-learn is not installed: pip install '.[report]'")

from conftest import ROOT, noise, one_line, turn_rows, write_json, write_rows  # noqa: E402

import figures  # noqa: E402
from dml_common import pictures, results  # noqa: E402

NETWORKS = [(name, name.lower()) for name in ("Contrastive", "Triplet", "ArcFace", "CosFace", "None")]
EVERYTHING = ["profile", "values_1", "correlation", "jsd", "gallery", "gallery_2", "tsne", "samples", "pairs",
              "training"]
PROPERTIES = ["model", "rotation_z", "color_hue", "camera_loc_z"]
LUMINANCE = [0.2126, 0.7152, 0.0722]


def make_results(folder, networks=NETWORKS, folds=2, n=24):
    """results/cars, models/trained/cars and pictures/cars, complete; fold k has every folds-th picture."""
    rng, header = np.random.default_rng(5), f"frame,{','.join(PROPERTIES)}"
    props = [[i, ("suv", "van", "coupe")[i % 3], 90 * (i**2 % 4), i % 5 / 10, i // 2 % 2] for i in range(n)]
    write_rows(folder / "pictures/cars/props.csv", header, props)
    (folder / "pictures/cars/images").mkdir()
    for i in range(n):
        noise(20, 20, i).save(folder / f"pictures/cars/images/{i:06d}.png")
    for (name, slug), fold in itertools.product(networks, range(folds)):
        place, rows = folder / f"results/cars/{slug}/fold{fold}", range(n)[fold::folds]
        names = [f"images/{row:06d}.png" for row in rows]
        write_rows(place / "props.csv", header, [props[row] for row in rows])
        write_rows(place / "labels.csv", "path", [[name] for name in names])
        np.save(place / "emb.npy", rng.normal(size=(len(rows), 6)).astype(np.float32))
        np.save(place / "maps.npy", rng.random((8, 16, 16)).astype(np.float16))
        for stem, limit in ("emb", None), ("maps", 8):
            same = {"number": len(names[:limit]), "sha256": pictures.pictures_sha256(names[:limit])}
            write_json(place / f"{stem}.json", {
                "loss": name, "preprocessing": {"resize": 18, "crop": 16}, "options": {"limit": limit},
                "pictures": same})
        if slug != "none":
            write_rows(folder / f"models/trained/cars/{slug}/fold{fold}/history.csv",
                       "epoch,split,loss,positive_mean,negative_mean,jsd,recall_at_1,map_at_r,jsd_null", [
                           [epoch, part, 2 - epoch / 4, .3 + epoch / 20, .2, .1 + epoch / 10, .5, .2, .05]
                           for epoch in (0, 1, 2) for part in ("train", "validation", "test")])
    make_tables(folder / "results/cars", networks, folds, n // folds)
    return folder


def make_tables(place, networks, folds, n):
    arrays = [f"results/cars/{slug}/fold{fold}/emb.npy" for _, slug in networks for fold in range(folds)]
    header, rows = "embeddings,property,value,queries,distance,null,r_precision,nr_precision,p_holm", []
    for (i, array), (k, key) in itertools.product(enumerate(arrays), enumerate(PROPERTIES)):
        values = ["", "suv", "van", "coupe"] if key == "model" else [""]  # behind the whole property
        rows += [[array, key, value, n // len(values), "euclidean", "binomial", .5, 10 / (k + 1) + i / 10,
                  .001 if k < 2 else .5] for value in values]
        rows[-len(values)][3] = n
    write_rows(place / "nrprec.csv", header, rows)
    header = "model_a,fold_a,model_b,fold_b,n,left_out,correlation,correlation_std,jsd,ceiling"
    write_rows(place / "compare.csv", header, [
        [a, fold, b, fold, 8, 0, .4 + i / 50, .1, .6 - i / 50, .8]
        for fold in range(folds) for i, (a, _) in enumerate(networks) for b, _ in networks[:i]])
    header = "embeddings,label,n,positive_mean,negative_mean,jsd,bins,r_precision,map_at_r"
    rows = [[array, "model", n, .5, 0, .3, 20, .5, .5, .1] for array in arrays]
    write_rows(place / "pairs.csv", f"{header},jsd_null", rows)
    write_rows(place / "histograms.csv", "embeddings,label,bins,positive,negative", [
        [array, "model", 20, b // 5, 20 - b] for array in arrays for b in range(20)])


def options(folder, *arguments, out="out"):
    known = ["--dataset", folder / "pictures/cars", "--models", folder / "models", "--out", folder / out]
    return [str(part) for part in (folder / "results", *known, *arguments)]


def listed(folder, out="out"):
    """figures.json: ({name: figure}, what is missing)."""
    content = json.loads((folder / out / "figures.json").read_text())
    return {figure["name"]: figure for figure in content["figures"]}, content["missing"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A small results folder and everything drawn from it."""
    folder = make_results(tmp_path_factory.mktemp("figures"))
    command = [sys.executable, str(ROOT / "figures.py"), *options(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return folder


@pytest.fixture
def small(tmp_path):
    """A results folder of one's own, to be spoiled."""
    return make_results(tmp_path, NETWORKS[:2], folds=1, n=12)


def fact(network, key, value, low=None, high=None, mark="*", **columns):
    return SimpleNamespace(network=network, key=key, value=value, low=low, high=high, mark=mark, **columns)


def segments(ax):
    lines = [one for one in ax.collections if hasattr(one, "get_segments")]
    return [segment[:, 0].tolist() for one in lines for segment in one.get_segments()]


def test_profile_draws_means_whiskers_groups_and_what_is_not_above_chance():
    types = {"a": "ranking", "b": "ranking", "c": "classification", "d": "none"}
    values = {"low": [1, 3, 2, 0], "high": [20, 22, 30, 1]}
    rows = [fact(name, key, value, value - .5, value + .5, "*" if value > 2 else "")
            for key in values for name, value in zip(types, values[key])]
    means = [fact("ranking", "high", 21, 8.3, 33.7), fact("classification", "high", 30)]
    ax, = figures.draw_profile(rows, types, ["high", "low"], means).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["high", "low"]
    dots = [line for line in ax.lines if line.get_linestyle() == "None"]
    places = [(line.get_xdata()[0], round(line.get_ydata()[0], 9)) for line in dots]
    assert places == [(1, .7), (3, .9), (2, 1.1), (0, 1.3), (20, -.3), (22, -.1), (30, .1), (1, .3)]
    assert [line.get_xdata()[0] for line in dots if line.get_color() == "white"] == [1, 2, 0, 1]
    assert [19.5, 20.5] in segments(ax) and [21, 21] in segments(ax) and [30, 30] not in segments(ax)
    assert any(np.allclose(line.get_xdata(), 2.576) for line in ax.lines)


def test_heat_map_shows_what_it_was_given():
    values = np.array([[np.nan, 61.4, 12], [61.4, np.nan, 33], [12, 33, 90]])
    for kinds in None, ["ranking", "none", "other"]:
        ax = figures.draw_heat_map(values, "abc", kinds, order=np.array([2, 0, 1]), title="t").axes[0]
        texts = {tuple(text.get_position()): text.get_text() for text in ax.texts if text.get_text()[0] < "a"}
        assert texts == {(.5, .5): "90", (1.5, .5): "12", (2.5, .5): "33", (.5, 1.5): "12", (2.5, 1.5): "61",
                         (.5, 2.5): "33", (1.5, 2.5): "61"}
        assert [label.get_text() for label in ax.get_yticklabels()] == ["c", "a", "b"]


def test_clusters_stand_together():
    group = np.array([0, 1, 0, 1, 0, 1])
    distances = np.where(group[:, None] == group, 0.1, 0.9)
    np.fill_diagonal(distances, np.nan)
    tree, order = results.cluster(distances)
    assert sorted(order) == list(range(6)) and len(set(group[order][:3])) == 1
    assert tree[-1, 2] == pytest.approx(0.9)  # average linkage joins the groups at their mean distance
    assert len(figures.draw_heat_map(distances, "abcdef", tree=tree, order=order).axes[0].child_axes) == 1
    distances[0, 1] = np.nan
    assert results.cluster(distances) == (None, None)


def test_heat_grows_lighter_and_marks_nan():
    ramp = figures.heat(np.linspace(0, 1, 50)[None])[0].astype(float) @ LUMINANCE
    assert (np.diff(ramp) >= 0).all() and ramp[0] < 5 and ramp[-1] > 240
    assert figures.heat(np.array([[np.nan]]))[0, 0].tolist() == [128, 128, 128]


def test_coarser_keeps_every_pair_and_finds_common_bins():
    a, b = np.zeros((2, 200), int), np.zeros((2, 100), int)
    a[0, 150], a[1, 199], b[0, 60] = 5, 2, 3
    edges, (first, second) = figures.coarser([a, b], 40)
    assert first.sum() == 7 and second.sum() == 3 and first.shape == second.shape == (2, len(edges) - 1)
    assert edges[0] <= 0.2 and edges[-1] == 1 and len(edges) <= 41
    np.testing.assert_allclose(edges[:-1][first[0] > 0] <= 0.5, True)  # bin 150 of 200 begins at 0.5


@pytest.mark.parametrize("counted", [True, False])
def test_pairs_are_drawn_as_counted_and_of_area_1(counted):
    panel = {"name": "$a$", "positive": np.array([0, 0, 1, 3]), "negative": np.array([4, 4, 0, 0]),
             "jsd": .25, "positive_mean": None, "negative_mean": None}
    other = {**panel, "before": [np.ones((2, 4), int)], "positive_mean": .5, "negative_mean": -.25}
    axes = figures.draw_pair_histograms([panel, other], counted).axes
    heights = [[patch.get_data().values.tolist() for patch in ax.patches] for ax in axes]  # area, outline …
    pairs, density = [[0, 0, 1, 3], [4, 4, 0, 0]], [[0, 0, .5, 1.5], [1, 1, 0, 0]]
    assert heights[0][1::2] == (pairs if counted else density) and heights[-1][1:4:2] == density
    assert heights[-1][4:] == [[.5] * 4] * 2  # before
    left, right = "$a$\n4 and 8 pairs", "JSD 0.250 in 4 bins"
    assert [ax.get_title() for ax in axes] == (
        [left, right, left, f"{right}\nmeans 0.500, −0.250"] if counted else [f"$a$\n{right}"] * 2)


def test_class_curves_by_hand():
    curves = [("net", {"JSD": ([.7, .35], [.1, 0]), "JSD, labels permuted": ([.2, .1], [0, 0])})]
    left, right = figures.draw_class_curves(curves, [2, 10]).axes
    assert left.lines[0].get_ydata() == pytest.approx([.7, .35]) and segments(left)[0] == [2, 2]
    assert left.collections[0].get_segments()[0][:, 1] == pytest.approx([.6, .8])
    line, = right.lines
    assert line.get_ydata() == pytest.approx([1, .5]) and line.get_xdata().tolist() == [2, 10]


def test_training_draws_before_and_after_and_one_networks_loss():
    rows = [fact(name, key, epoch, epoch - 1, epoch + 1, part="train", epoch=epoch)
            for name in "ab" for key in ("loss", "jsd") for epoch in (0, 1, 2)]
    rows += [fact("a", "jsd", .1, part="test", epoch=0), fact("a", "jsd", .9, part="test", epoch="best")]
    axes = figures.draw_training(rows, {"a": "ranking", "b": "none"}, "a").axes
    assert [len(ax.lines) for ax in axes] == [1, 0, 2, 1] and axes[2].get_ylabel() == "JSD"
    assert axes[3].lines[0].get_xydata().tolist() == [[0, .1], [1, .9]]
    assert [label.get_text() for label in axes[3].get_xticklabels()] == ["before", "after"]


def test_samples_are_nearest_the_middle():
    chosen = figures.choose_samples({
        "size": np.array(["1", "1", "2", "2", "10", "10"]), "kind": np.array(list("bbbbba")),
        "angle": np.array(["0", "180", "0", "90", "0", "0"])})
    assert chosen["size"] == ([0, 3, 4], 3)   # of 2 the row whose angle is the middle one; 10 comes behind 2
    assert chosen["angle"] == ([2, 3, 1], 3)  # of 0 the row whose size is in the middle
    assert chosen["kind"] == ([5, 3], 2)
    rows, n = figures.choose_samples({"n": np.arange(100).astype(str)})["n"]
    assert n == 100 and len(rows) == 10 and rows[0] == 0 and rows[-1] == 99


def test_tsne_colours_numbers_circles_and_names():
    light = 255 * figures.CIRCLE(np.linspace(0, 1, 101))[:, :3] @ LUMINANCE
    assert light[0] == light[-1] and np.argmax(light) == 50 and light.max() < 210  # closes, shows on white
    places = np.random.default_rng(0).normal(size=(10, 2))
    n = np.arange(10)
    values = {"height": n - 5, "rotation (0.3)": 45 * n, "color_hue": n / 10, "model (1.2)": n,
              "kind": [f"k{i % 9}" for i in n], "constant": n * 0}
    fig = figures.draw_tsne(places, {name: np.array(column).astype(str) for name, column in values.items()})
    panels = {ax.get_title(): ax for ax in fig.axes if ax.get_title()}
    limits = [panels[name].collections[0].get_clim() for name in ("height", "rotation (0.3)", "color_hue")]
    assert limits == [(-5, 4), (0, 360), (0, 1)]
    turned = panels["rotation (0.3)"].collections[0]
    assert turned.get_cmap().name == "circle" and turned.get_array().tolist() == (45 * n % 360).tolist()
    for name, more in ("model (1.2)", "3 more"), ("kind", "2 more"):
        assert [text.get_text() for text in panels[name].get_legend().texts][-1] == more


def test_tsne_is_repeatable_whatever_the_threads():
    code = ("import figures, numpy as np; x = np.random.default_rng(0).normal(size=(60, 8));"
            "print(figures.embed_2d(x.astype(np.float32), 3).tolist())")
    one, two = (subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT,
                               env={**os.environ, "OMP_NUM_THREADS": threads}).stdout for threads in "12")
    assert one == two


def test_names_are_plain_and_the_callers_style_stays():
    assert figures.plain("a\nb\x00") == "a\ufffdb\ufffd" and figures.plain("") == "–"
    assert figures.plain("x" * 50, 10) == "x" * 9 + "…"
    with matplotlib.rc_context({"font.size": 30}):
        png = figures.png(figures.draw_heat_map(np.eye(2), "ab"))
        assert matplotlib.rcParams["font.size"] == 30
    assert png == figures.png(figures.draw_heat_map(np.eye(2), "ab"))


def test_everything_is_drawn_and_said(made):
    drawn, missing = listed(made)
    assert list(drawn) == [f"{name}_cars" for name in EVERYTHING] and missing == []
    expected = {"figures.json"}
    for name, figure in drawn.items():
        assert [*figure] == ["name", "title", "caption", "dataset", "svg", "png"]
        assert figure["title"] and figure["caption"].endswith(".") and "  " not in figure["caption"], figure
        assert figure["svg"] == (None if name.startswith(("gallery", "samples")) else f"{name}.svg")
        assert (made / f"out/{name}.pdf").read_bytes().startswith(b"%PDF")
        assert Image.open(made / "out" / figure["png"]).width <= 1100
        expected |= {f"{name}.pdf", figure["png"], figure["svg"]} - {None}
    assert {path.name for path in (made / "out").iterdir()} == expected
    for name, parts in {"profile": ["2 folds", "null binomial", "p_holm", "CosFace"], "tsne": ["seed 0"],
                        "correlation": ["correlation of 80", "8 pictures"], "gallery": ["fold0"],
                        "pairs": ["one model"]}.items():
        assert all(part in drawn[f"{name}_cars"]["caption"] for part in parts), name


def test_svgs_are_xml_light_and_alone(made):
    titles = [figure["title"] for figure in listed(made)[0].values()]
    for path in (made / "out").glob("*.svg"):
        text = path.read_text()
        elements = list(ET.fromstring(text).iter())
        assert len(text) < 400_000 and not [one for one in elements if one.tag.endswith("script")], path
        assert [one.text for one in elements if one.tag.endswith("}title")][0] in titles
        for key, value in itertools.chain(*(element.attrib.items() for element in elements)):
            assert not key.lower().startswith("on")
            assert not key.endswith("href") or value.startswith(("#", "data:image/png;base64,")), value
        head = re.sub(r"<image[^>]*>", "", text.lower()).split("</metadata>")[0]
        assert "date" not in head.replace("update", ""), path


def test_same_input_same_bytes(made, tmp_path):
    (tmp_path / "matplotlibrc").write_text("font.size: 30\nsvg.fonttype: none\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SOURCE_DATE_EPOCH": "7"}
    command = [sys.executable, str(ROOT / "figures.py"), *options(made, out="again")]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, env=environment)
    for path in (made / "out").iterdir():
        assert path.read_bytes() == (made / "again" / path.name).read_bytes(), path.name


def test_gallery_shows_each_map_under_its_picture(small):
    for slug, bright in ("contrastive", 2), ("triplet", 5):
        maps = np.zeros((8, 16, 16), np.float16)
        maps[bright] = 1
        np.save(small / f"results/cars/{slug}/fold0/maps.npy", maps)
    for i in range(12):
        Image.new("RGB", (20, 20), (10 * i, 200, 0)).save(small / f"pictures/cars/images/{i:06d}.png")
    figures.main(options(small, "--only", "gallery", "--pictures", "8"))
    for page, rows in ("gallery", [0, 1, 2, 3]), ("gallery_2", [4, 5, 6, 7]):
        with Image.open(small / "out" / f"{page}_cars.png") as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)
        lines = np.flatnonzero((pixels[:, :, 1] == 200).sum(axis=1) > 40)
        columns = pixels[lines[len(lines) // 2]]
        x = {row: int(np.flatnonzero((columns == [10 * row, 200, 0]).all(axis=1)).mean()) for row in rows}
        assert list(x.values()) == sorted(x.values())
        light = np.abs(pixels - [252, 255, 164]).max(axis=2) <= 2  # the end of the ramp
        assert [row for row in rows if light[:, x[row]].any()] == sorted({2, 5} & set(rows))


def test_a_network_of_choice_and_a_part(made):
    only = ["--only", "pairs,tsne", "--network", "arcface/fold1", "--points", "10"]
    figures.main(options(made, *only, out="part"))
    tsne, pairs = listed(made, "part")[0].values()
    assert tsne["name"] == "tsne_cars" and "10 of 12 embeddings of ArcFace, fold1" in tsne["caption"]
    assert pairs["name"] == "pairs_cars" and "fold1;" in pairs["caption"]


def test_rows_of_properties_are_joined_by_name(small):
    """Another order of props.csv's rows changes nothing."""
    figures.main(options(small, "--only", "tsne"))
    for path in small.glob("**/props.csv"):
        turn_rows(path)
    figures.main(options(small, "--only", "tsne", out="turned"))
    assert (small / "out/tsne_cars.svg").read_bytes() == (small / "turned/tsne_cars.svg").read_bytes()


def test_values_and_jsd_above_its_null_are_drawn(small, monkeypatch):
    drawn = {}
    for name in "draw_profile", "draw_training", "draw_pair_histograms":
        original = getattr(figures, name)
        monkeypatch.setattr(figures, name, lambda *given, original=original, name=name, **more: (
            drawn.setdefault(name, []).append(given[0]), original(*given, **more))[1])
    one, = results.read_all(small / "results", small / "models")
    args = SimpleNamespace(network=None)
    titles = [facts["what"] for _, facts, _ in figures.make_profile(one, None, args)]
    assert titles == ["Which properties", "Which values of model"]
    whole, values = drawn["draw_profile"]
    assert {row.key for row in whole} == {*PROPERTIES}
    assert {row.key for row in values} == {"model = suv", "model = van", "model = coupe"}
    list(figures.make_training(one, None, args))
    rows = [row for row in drawn["draw_training"][0] if row.key.startswith("jsd") and row.part == "train"]
    assert {row.key for row in rows} == {"jsd_above"} and rows[0].value == pytest.approx(.05)
    (_, _, fig), = figures.make_pairs(one, None, args)
    assert [ax.get_title() for ax in fig.axes][1] == (
        "JSD 0.300 (null 0.100) in 20 bins\nmeans 0.500, 0.000")


def test_names_with_special_letters(tmp_path, capsys):
    names = [("$x_1$ & <b>", "dollar"), ("_under_", "under"), ("\\frac{1}{2}--", "frac")]
    folder = make_results(tmp_path, names, folds=1, n=12)
    for path in [*folder.glob("*/cars/props.csv"), *folder.glob("results/cars/**/*.csv")]:
        text = path.read_text()
        text = text.replace("rotation_z", "$rot_z <i>&").replace("suv", "$u$ <v>").replace("van", "_van")
        path.write_text(text.replace("color_hue", "回"), encoding="utf-8")
    figures.main(options(folder, "--only", "profile,correlation,tsne,samples,pairs"))
    for path in (folder / "out").glob("*.svg"):
        ET.fromstring(path.read_text())
    line, = capsys.readouterr().err.splitlines()
    assert ": note: Glyph" in line and "missing from" in line


def test_what_is_missing_is_left_out_and_listed(small, capsys):
    place = small / "results/cars"
    (place / "compare.csv").unlink()
    (place / "triplet/fold0/emb.npy").rename(place / "triplet/fold0/emb.npy.part")
    figures.main([str(small / "results"), "--out", str(small / "out"), "--models", str(small)])
    drawn, missing = listed(small)
    assert [gap["figure"] for gap in missing] == ["", "correlation", "jsd", "gallery", "samples", "training"]
    assert list(drawn) == ["profile_cars", "values_1_cars", "tsne_cars", "pairs_cars"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    assert "half-finished" in lines[0] and "compare.csv" in lines[1] and "--dataset" in lines[3]


def test_tables_alone_without_a_loss(tmp_path):
    rows = [["e.npy", "a", 9, .4, 4, .5], ["e.npy", "b", 9, .4, 1, .2]]
    header = "embeddings,property,queries,r_precision,nr_precision,nr_precision_se"
    write_rows(tmp_path / "mine/nrprec.csv", header, rows)
    figures.main([str(tmp_path / "mine"), "--out", str(tmp_path / "out"), "--only", "profile,pairs"])
    drawn, missing = listed(tmp_path)
    assert "e.npy" in drawn["profile_mine"]["caption"] and [gap["figure"] for gap in missing] == ["pairs"]


def test_histograms_before_training_come_from_the_training(small):
    rows = [[epoch, "test", count, 3] for epoch in (0, 5) for count in (1, 0, 2, 7)]
    home = small / "models/trained/cars/contrastive/fold0"
    write_rows(home / "histograms.csv", "epoch,split,positive,negative", rows)
    one, = results.read_all(small / "results", small / "models")
    label, histograms = results.pair_histograms(one.folder, one.networks)
    after, before = histograms["Contrastive"]
    assert label == "model" and before.tolist() == [[1, 0, 2, 7], [3, 3, 3, 3]]
    assert after[0].sum() == 30 and len(histograms["Triplet"]) == 1
    figures.main(options(small, "--only", "pairs"))


def refused(folder, *arguments):
    """What a command says that has to fail and to leave nothing half-written behind."""
    with pytest.raises((ValueError, OSError)) as error:
        figures.main(options(folder, *arguments, out="refused"))
    assert not list((folder / "refused").glob("*.part")) and not (folder / "refused/figures.json").exists()
    return str(error.value)


def spoil_lists(*places):
    for path in (place / f"{stem}.json" for place in places for stem in ("emb", "maps")):
        path.write_text(path.read_text().replace('"sha256": "', '"sha256": "0'))


def spoil_pictures(place):
    for path in (place.parents[3] / "pictures/cars/images").glob("00000[0-9].png"):
        path.write_bytes(b"no picture")


@pytest.mark.parametrize("only, told, spoil", [
    ("profile", "other lists of pictures", spoil_lists),
    ("gallery", "its pictures are not in", lambda place: spoil_lists(*place.parents[1].glob("*/fold0"))),
    ("gallery", "expected (8, 16, 16) in", lambda place: np.save(place / "maps.npy", np.zeros((8, 9, 9)))),
    ("gallery", "in [0, 1]", lambda place: np.save(place / "maps.npy", np.full((8, 16, 16), 2.0))),
    ("gallery", "can't be read as a picture", spoil_pictures),
    ("gallery", "lacks 1 of", lambda place: (place.parents[3] / "pictures/cars/images/000000.png").unlink()),
    ("tsne", "differ in rows", lambda at: write_rows(at / "../../contrastive/fold0/props.csv", "a", "1")),
    ("profile", "lacks embeddings", lambda place: write_rows(place / "../../nrprec.csv", "a,b", ["12"]))])
def test_spoilt_results(small, only, told, spoil):
    spoil(small / "results/cars/triplet/fold0")
    assert told in refused(small, "--only", only)


@pytest.mark.parametrize("arguments, told", [
    (["--only", "profil"], "expected names among profile"), (["--points", "1"], "at least 4"),
    (["--network", "tripl"], "triplet/fold0"), (["--seed", "-1"], "at least 0"),
    (["--pictures", "0"], "at least 1"), (["--dataset", "nowhere"], "no such folder"),
    (["--out", str(ROOT / "README.md")], "is a file; give a folder")])
def test_options_that_do_not_fit(small, arguments, told):
    assert told in refused(small, *arguments)


def test_the_command_line(run_script, run_main, tmp_path):
    done = run_main("figures.py", "--help")
    assert done.returncode == 0 and all(f"    {name}" in done.stdout for name in {*figures.FIGURES} - {"jsd"})
    one_line(run_script("figures.py", tmp_path / "nowhere", "--out", tmp_path / "out"))
