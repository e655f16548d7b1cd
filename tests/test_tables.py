"""tables.py: golden tables, the papers' own numbers, findings, special characters, bad input."""
import csv
import itertools
import json
import re
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
from conftest import ROOT, SHARED, one_line, write_json
from scipy import stats
from test_results import CLASSIFICATION, RANKING, add_network, add_training, compare_row, nrprec_row, write

import tables
from dml_common import conclusions, files, folders, results

NASTY = r'50%_{\input}$ & <script>'


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def run(run_main, out):
    """run(results, option, …) -> what is printed; with status 2 the one line that says why not."""
    def run(*arguments, status=0):
        done = run_main("tables.py", "--out", out, *arguments)
        if status:
            one_line(done)
        assert done.returncode == status, done.stderr
        return done.stderr if status else done.stdout

    return run


@pytest.fixture
def tabled(run, out):
    """tabled(results, option, …) -> tables.json that comes of it, and its tables by name."""
    def table(*arguments):
        run(*arguments)
        return read_tables(out)

    return table


def read_tables(out):
    content = json.loads((out / "tables.json").read_text(encoding="utf-8"))
    return content, {one["name"]: one for one in content["tables"]}


def texts(table):
    return [[one["text"] for one in row] for row in table["rows"]]


@pytest.fixture
def small(tmp_path):
    """Two ranking losses, one classification loss and None, two folds, in results/cars."""
    folder = tmp_path / "results" / "cars"
    values = {"Triplet": (4.0, 5.0), "Contrastive": (3.0, 3.5), "ArcFace": (2.0, 2.5), "None": (1.0, 1.25)}
    write(folder, "nrprec", [(loss, fold, name, value * factor) for loss, folds in values.items()
                             for fold, value in enumerate(folds)
                             for name, factor in (("model", 1), ("sun", -0.001))])
    rows = [compare_row("Triplet", "Contrastive", fold, r, ceiling=0.8) for fold, r in enumerate((0.5, 0.8))]
    for other, r in ("ArcFace", 0.4), ("None", 0.1):
        rows += [compare_row(other, "Triplet", 0, r), compare_row(other, "Triplet", 1, r)]
    write(folder, "compare", [*rows, compare_row("Contrastive", "ArcFace", 0, 0.625)])
    for slug, fold in itertools.product(("triplet", "contrastive", "arcface", "none"), range(2)):
        add_network(folder, slug, fold, distance="euclidean", backbone="bninception")
    return folder


# ---------------------------------------------------------------- golden tables


def test_golden_nrprec(small, run, out):
    run(small.parent)
    header, *rows = csv.reader(open(out / "nrprec_cars.csv"))
    assert header == ["Loss", "model", "model ±", "model mark", "sun", "sun ±"]
    root = 0.5**0.5
    expected = [["Contrastive", 3.25, root / 2, "*"], ["Triplet", 4.5, root, "*"],
                ["ArcFace", 2.25, root / 2, ""],
                ["None", 1.125, root / 4, ""], ["Ranking mean", 3.875, 1.25 * root, ""],
                ["Classification mean", 2.25, 0, ""]]
    for row, (name, mean, spread, mark) in zip(rows, expected, strict=True):
        assert (row[0], row[3]) == (name, mark)
        numbers = [float(row[column] or 0) for column in (1, 2, 4)]
        assert numbers == pytest.approx([mean, spread, -mean / 1000])
    assert """| Loss | model | sun |
| --- | ---: | ---: |
| Contrastive | 3.25 \\* | 0.00 |
| Triplet | 4.50 \\* | 0.00 |
| ArcFace | 2.25 | 0.00 |
| None | 1.13 | 0.00 |
| **Ranking mean** | 3.88 | 0.00 |
| **Classification mean** | 2.25 | 0.00 |
""" in (out / "tables.md").read_text()
    lines = (out / "nrprec_cars.tex").read_text().splitlines()
    assert r"\begin{tabular}{lrr}" in lines and r"{}Loss & model & sun \\" in lines
    assert r"{}Triplet & \cellcolor{black!45}4.50 * & \cellcolor{black!5}0.00 \\" in lines
    # 5 + 40 · ln 2.125 / ln 5.5
    assert r"{}None & \cellcolor{black!23}1.13\phantom{ *} & \cellcolor{black!5}0.00 \\" in lines
    assert lines[-9:-5] == [r"\midrule", r"{}\textbf{Ranking mean} & 3.88\phantom{ *} & 0.00 \\",
                            r"{}\textbf{Classification mean} & 2.25\phantom{ *} & 0.00 \\", r"\bottomrule"]


def test_golden_correlation(small, tabled):
    named = tabled(small)[1]  # one data set's folder
    matrix, both = named["correlation_cars"], (27**0.5 - 1) / (27**0.5 + 1)  # of 0.5 and 0.8
    assert matrix["kind"] == "matrix"
    assert matrix["header"] == ["", "Contrastive", "Triplet", "ArcFace", "None"]
    spread = np.tanh(np.sqrt(np.arctanh(0.1)**2 + (np.log(3) / 4)**2))  # each fold's, and between the folds
    text = f"{100 * both:.0f} ± {100 * spread:.0f}"
    assert texts(matrix) == [["Contrastive", "", text, "63 ± 10", ""],
                             ["Triplet", text, "", "40 ± 10", "10 ± 10"],
                             ["ArcFace", "63 ± 10", "40 ± 10", "", ""], ["None", "", "10 ± 10", "", ""]]
    first, second = matrix["rows"][:2]  # 62.5 is rounded to 63, neither truncated nor to even
    assert first[2]["value"] == pytest.approx(both) == second[1]["value"]
    assert (first[2]["shade"], second[4]["shade"], first[0]["shade"]) == (1, 0, None)
    condensed = texts(named["correlation_by_type_cars"])
    between = np.tanh((np.arctanh(0.4) + np.arctanh(0.625)) / 2)
    assert condensed[0] == ["ranking", text, f"{100 * between:.0f} ± 10", "10 ± 10"]
    assert condensed[1][2] == "" and condensed[2][3] == ""  # no pair of two different losses
    assert texts(named["ceiling_cars"])[0][2] == "80"
    assert named["corrected_cars"]["rows"][0][2]["value"] == pytest.approx((0.5 / 0.8 + 0.8 / 0.8) / 2)


def test_folds_of_one_loss_stand_in_the_diagonal_and_in_no_group(small, tabled):
    rows = [compare_row("Triplet", "Contrastive", fold, 0.5) for fold in range(2)]
    write(small, "compare", [*rows, compare_row("Triplet", "Triplet", 0, 0.9, fold_b=1)])
    named = tabled(small)[1]
    assert texts(named["correlation_cars"]) == [["Contrastive", "", "50 ± 10"],
                                                ["Triplet", "50 ± 10", "90 ± 10"]]
    assert named["correlation_cars"]["notes"] == ["Diagonal: different folds of one loss."]
    assert texts(named["correlation_by_type_cars"])[0][1] == "50 ± 10"


def test_scores_of_the_second_paper_and_other_tables(tabled, tmp_path):
    folder, models = tmp_path / "cub200", tmp_path / "models"
    rows = [("triplet", 0, 0.5), ("triplet", 1, 0.6), ("arcface", 0, 0.7), ("arcface", 0, 0.1, "test", 50),
            ("arcface", 0, 0.1, "train"), ("arcface", 0, 0.1, "test", 200, 0), ("margin", 0, 0.4),
            ("cosface", 0, 0.8)]
    for k, (slug, fold, recall, *rest) in enumerate(rows):
        split, bins, repeat = [*rest, *("test", 200, None)[len(rest):]]
        rows[k] = [f"{slug}/fold{fold}/emb.npy", split, repeat, "class", 0.5, -0.1, 0.4, 0.01, bins, recall,
                   0.3, 0.2]
    write(folder, "pairs", rows)
    write(folder, "sanity", [["Triplet", 0, n, 50, r, 0.1] for n, r in ((0, 0.6), (25, 0.3), (50, 0.2))])
    write(folder, "embeddings", [["Triplet", 0, "ArcFace", 0, 6, 0.9, 0.55, 0.5, 0.6, 0.1]])
    write(folder, "faithfulness", [[loss, fold, name, 6, 0, value, 0.05, 0, 1] for name, value in (
        ("deletion", 0.6), ("deletion_random", 0.5), ("deletion_less_random", 0.1))
        for loss, fold in (("Triplet", 0), ("Triplet", 1), ("ArcFace", 0))])
    values = enumerate(("", "red", "blue"))
    rows = [[*nrprec_row("Triplet", 0, "hue", number), value] for number, value in values]
    write(folder, "nrprec", rows, "value")
    lines = "".join(f"{i},{'suv' if i % 2 else 'van'},{i * 0.5}\n" for i in range(6))
    (add_network(folder, "triplet", loss="Triplet") / "props.csv").write_text("frame,model,hue\n" + lines)
    add_training(models, "cub200/triplet/fold0", split={"kind": "random"}, history=[
        [0, "test", 0.1, 0, 0.1, 0.3, 0.05], [7, "test", 0.2, 0, 0.5, 0.75, 0.25]])
    named = tabled(folder, "--models", models)[1]
    assert named["pairs_cub200"]["header"][:5] == ["Loss", "Recall@1", "MAP@R", "JSD", "JSD, labels permuted"]
    rest = ["0.200", "0.400", "0.010", "0.300", "0.500", "−0.100"]
    assert [["Triplet", "0.550", *rest], ["ArcFace", "0.700", *rest]] == [
        line for line in texts(named["pairs_cub200"]) if line[0] in ("Triplet", "ArcFace")]
    assert named["pairs_cub200"]["caption"].endswith("label class, 200 bins.")
    scores = [line[0] for line in texts(named["pairs_tests_cub200"])]
    assert scores == ["Recall@1", "MAP@R", "JSD", "R-Precision"]
    assert texts(named["sanity_cub200"]) == [["Triplet", "60 ± 10", "30 ± 10", "20 ± 10"]]
    assert named["sanity_cub200"]["header"][1:] == ["0 of 50", "25 of 50", "50 of 50"]
    # of two folds ± 1.96 · 0.05 / √5 / √2, of one as read
    assert texts(named["faithfulness_cub200"]) == [
        ["Triplet", "0.600 [0.569, 0.631]", "0.100 [0.069, 0.131]"],
        ["ArcFace", "0.600 [0.000, 1.000]", "0.100 [0.000, 1.000]"]]
    assert texts(named["nrprec_cub200"])[0] == ["Triplet", "0.00"]
    assert texts(named["nrprec_values_cub200"]) == [["hue = red", "1.00"], ["hue = blue", "2.00"]]
    assert texts(named["cka_cub200"])[0][2] == "0.90" and texts(named["overlap_cub200"])[0][2] == "55"
    assert texts(named["properties_cub200"]) == [["model", "2", "suv, van"], ["hue", "6", "0.0, 0.5, …, 2.5"]]
    assert texts(named["training_cub200"]) == [["Triplet", "random", "1", "0.300 → 0.750", "0.050 → 0.250",
                                                "0.100 → 0.500", "0.100 → 0.200", "0.000 → 0.000"]]


def test_contract_of_the_json(small, tabled, out):
    content, named = tabled(small)
    assert list(content) == ["tables", "findings", "warnings", "missing", "made_with"]
    assert list(content["made_with"]) == ["versions", "options"]
    keys = ["text", "value", "shade", "bold", "hint"]
    for one in content["tables"]:
        assert list(one) == ["name", "title", "caption", "dataset", "paper", "kind", "header", "rows",
                             "notes"]
        assert all(list(cell) == keys for row in one["rows"] for cell in row)
        assert all(len(row) == len(one["header"]) and row[0]["value"] is None for row in one["rows"])
        if one["kind"] == "matrix":
            assert one["header"] == ["", *(row[0]["text"] for row in one["rows"])]
            values = [[cell["value"] for cell in row[1:]] for row in one["rows"]]
            assert values == [list(column) for column in zip(*values)]
        assert all((out / f"{one['name']}.{suffix}").is_file() for suffix in ("csv", "tex"))
    assert all(list(one) == ["dataset", "topic", "text", "test", "p_value"] for one in content["findings"])
    assert len(content["findings"]) == 3 and {"losses", "properties_published", "errata"} < set(named)
    assert (out / "missing.csv").read_text().startswith("dataset,table,what\n")


def test_same_bytes_twice_and_without_jinja2_all_but_latex(
        small, run_main, run_script, tmp_path, monkeypatch):
    run_main("tables.py", small, "--out", tmp_path / "one")
    assert run_script("tables.py", small, "--out", tmp_path / "two").returncode == 0
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert "no .tex files" in run_main("tables.py", small, "--out", tmp_path / "three").stderr
    one, two, three = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
                       for name in ("one", "two", "three"))
    assert one == two and not [name for name in one if name.endswith(".part")]
    assert three == {name: content for name, content in one.items() if not name.endswith(".tex")}


# ---------------------------------------------------------------- the papers' numbers


def published_results(folder, factor=1.0):
    """nrprec.csv made of the published per-loss numbers of Table 6."""
    write(folder, "nrprec", [(loss, 0, name, None if value is None else factor * value)
                             for loss, row in results.published_nrprec().items() if not loss.endswith(" Mean")
                             for name, value in row.items()])
    return folder


def test_group_means_of_table_6_and_the_direction_of_every_difference(tabled, tmp_path):
    published = results.published_nrprec()
    assert published["ProxyNCA"]["sun_rotation"] is None  # missing in our source
    content, named = tabled(published_results(tmp_path / "cars"))
    header = named["nrprec_cars"]["header"]
    rows = {row[0]["text"]: row for row in named["nrprec_cars"]["rows"]}
    for name in published["None"]:
        means = [rows[f"{kind} mean"][header.index(name)]["value"] for kind in ("Ranking", "Classification")]
        theirs = [published[f"{kind} Mean"][name] for kind in ("Ranking", "Classification")]
        assert means == pytest.approx(theirs, abs=0.0101)  # means of rounded numbers, rounded
        assert np.sign(means[0] - means[1]) == np.sign(theirs[0] - theirs[1])
    assert rows["ProxyNCA"][header.index("sun_rotation")]["text"] == ""
    tests = {row[0]["text"]: row for row in named["nrprec_tests_cars"]["rows"]}
    hue = tests["color_hue"]  # every classification loss is above every ranking loss: 3.63 against 3.50
    assert hue[4]["value"] == -1 and hue[5]["value"] == pytest.approx(2 / 2002)
    assert hue[6]["value"] == pytest.approx(11 * 2 / 2002) and hue[7]["text"] == "classification"
    classification = ["color_hue", "color_sat", "color_val", "bg_color_sat"]
    assert {name: row[7]["text"] for name, row in tests.items() if row[7]["text"]} == {
        **dict.fromkeys(classification, "classification"), "camera_loc_z": "ranking"}
    hue, height = header.index("color_hue"), header.index("camera_loc_z")
    assert rows["Classification mean"][hue]["bold"] and not rows["Ranking mean"][hue]["bold"]
    assert rows["Ranking mean"][height]["bold"] and "†" in rows["Ranking mean"][height]["text"]
    finding = content["findings"][1]
    assert finding["text"].startswith("cars: 9 ranking and 5 classification losses differ in 5 of 11 "
                                      "properties, most clearly in color_hue: NR-Prec 3.25 [3.")
    assert finding["p_value"] == pytest.approx(22 / 2002)
    assert "smallest p 0.011 (color_hue)" in finding["test"]
    assert texts(named["tests_cars"])[0][1] == "+1.000"  # the order of Table 6


def test_published_prints_every_number(run_main):
    printed = run_main("tables.py", "--published").stdout
    lines = printed.splitlines()
    for loss, row in results.published_nrprec().items():
        line = next(line for line in lines if line.startswith(loss.replace(" Mean", " mean")) and "." in line)
        numbers = [float(one) for one in re.findall(r"\d+\.\d\d", line)]
        assert numbers == [value for value in row.values() if value is not None]
    columns = files.read_table(ROOT / "published" / "kobs_table2_sop_correlation.csv")
    pairs = {frozenset(row[:2]): row[2:] for row in zip(*columns.values())}
    order = results.published()[1].names("correlation")
    for loss in order:
        line = next(line for line in lines if re.match(rf" *\d+ {re.escape(loss)} +.*±", line))
        expected = [pairs[frozenset((loss, other))] for other in order if other != loss]
        assert re.findall(r"(\d+)±(\d+)", line) == expected
    for text in ("86 ± 6", "85 ± 6", "75 ± 11", "86 ± 5", "74 ± 11", "90 ± 6", "87 ± 6", "0.673", "0.260",
                 "0.579", "Ferrari Enzo", "SNR Contrastive           2019"):
        assert text in printed


TRAINED = {"backbone": "inception_v3", "dimension": 64}
RELEASED = {"order": "released", "samples": 50, "shared_noise": False, "noise": 0.15, "percentile": 99.0,
            "baseline": "black", "antithetic": False, "map_size": None}


def reproduced(folder, models, distance="euclidean", **options):
    """Results that are the published numbers themselves, made as these were but for options of the maps."""
    cars = [nrprec_row(loss, 0, name, value, queries=100_000)
            for loss, row in results.published_nrprec().items() if not loss.endswith(" Mean")
            for name, value in row.items()]
    write(folder / "renders", "nrprec", [[*row[:7], 1023, *row[8:]] for row in cars])
    sop = files.read_table(ROOT / "published" / "kobs_table2_sop_correlation.csv")
    pairs = {tuple(sorted(row[:2])): float(row[2]) / 100 for row in zip(*sop.values())}
    write(folder / "sop", "compare", [compare_row(*pair, 0, r, n=60_502) for pair, r in pairs.items()])
    made = {"loss": "Triplet", "distance": distance, "options": RELEASED | options}
    add_network(folder / "sop", "triplet", 0, ("maps",), 60_502, **made)
    kinds = {"ranking": RANKING, "classification": CLASSIFICATION, "none": ["None"]}
    columns = files.read_table(ROOT / "published" / "kobs_tables3_4_grouped_correlation.csv")
    rows = {"cars196": [], "cub200": []}
    for name, *types, r, _ in zip(*columns.values()):
        n = 8131 if name == "cars196" else 5924
        a, b = (kinds[kind][place if types[0] == types[1] else 0] for place, kind in enumerate(types))
        rows[name].append(compare_row(a, b, 0, float(r) / 100, n=n))
    for name, lines in rows.items():
        write(folder / name, "compare", lines)
        add_network(folder / name, "triplet", 0, ("maps",), int(lines[0][4]), **made)
    table = files.read_table(ROOT / "published" / "oi_table1_split.csv")
    for name, split, recall, map_at_r, jsd in zip(*table.values()):
        place = f"{name}{'@random' if split == 'random' else ''}/normalized_softmax/fold0"
        add_network(folder / place.split("/")[0], "normalized_softmax", loss="Normalized Softmax")
        add_training(models, place, split={"kind": split}, history=[
            [epoch, "test", 0.2, 0, jsd, recall, map_at_r] for epoch in (0, 7)], **TRAINED)


def test_a_perfect_reproduction_shows_a_difference_of_0_everywhere(run, out, tmp_path):
    folder, models = tmp_path / "results", tmp_path / "models"
    reproduced(folder, models)
    printed, named = run(folder, "--published", "--models", models), read_tables(out)[1]
    differences = {name: one for name, one in named.items() if name.startswith("difference")}
    assert set(differences) == {f"difference_{name}" for name in (
        "nrprec_renders", "correlation_sop", "correlation_by_type_cars196", "correlation_by_type_cub200",
        "training_cars196", "training_cub200", "training_cars196_random", "training_cub200_random")}
    numbers = [[one["value"] for row in table["rows"] for one in row[1:] if one["value"] is not None]
               for table in differences.values()]
    assert sorted(map(len, numbers)) == [3, 3, 3, 3, 8, 8, 164, 210]
    assert not any(map(any, numbers)) and not [name for name in named if name.startswith("settings")]
    assert "NR-Prec, renders: difference (Table 6)" in printed and not (tmp_path / "tables").exists()


def test_a_data_sets_properties_are_no_difference(tabled, tmp_path):
    """Of a data set with rendered cars' properties, whose correlations are compared as well."""
    folder, models = tmp_path / "results", tmp_path / "models"
    reproduced(folder, models)
    published_results(folder / "sop")
    (folder / "sop" / "props.csv").write_text("name,model\na.jpg,0\nb.jpg,1\n")
    named = tabled(folder, "--published", "--models", models)[1]
    assert {"settings_nrprec_sop", "difference_correlation_sop"} <= set(named)
    assert not [name for name in named if name.startswith(("ours_properties", "difference_properties"))]


def test_settings_that_are_not_the_published_ones_stand_in_place_of_differences(tabled, tmp_path):
    folder, models = tmp_path / "results", tmp_path / "models"
    reproduced(folder, models, "cosine", samples=20, noise=0.1)
    place = models / "trained" / "cub200" / "normalized_softmax" / "fold0" / "config.json"
    write_json(place, {**json.loads(place.read_text()), "dimension": 128})
    published_results(folder / "renders")
    named = tabled(folder, "--published", "--models", models)[1]
    settings = {name: texts(one) for name, one in named.items() if name.startswith("settings")}
    other = [["samples", "20", "50"], ["noise", "0.1", "0.15"], ["distance", "cosine", "the loss's own"]]
    assert settings == {
        "settings_nrprec_renders": [["pictures", "6", "100000"], ["max_neighbours", "None", "1023"]],
        "settings_correlation_sop": other,
        "settings_correlation_by_type_cars196": other,
        "settings_correlation_by_type_cub200": other,
        "settings_training_cub200": [["dimension", "128", "64"]]}
    assert sorted(name for name in named if name.startswith("difference")) == [
        f"difference_training_{name}" for name in ("cars196", "cars196_random", "cub200_random")]


def test_both_splittings_of_a_data_set_are_compared_over_seeds(tabled, tmp_path):
    folder, models = tmp_path / "results", tmp_path / "models"
    scores = {"": (0.5, 0.6, 0.7), "@random": (0.8, 0.9, 0.85)}
    for split, recalls in scores.items():
        for seed, recall in enumerate(recalls):
            place = f"normalized_softmax/fold0{f'.seed{seed}' if seed else ''}"
            add_network(folder / f"birds{split}", "normalized_softmax", place[23:])
            add_training(models, f"birds{split}/{place}", split={"kind": split[1:] or "default"},
                         frozen_trunk=True, history=[
                [0, "test", 0.1, 0, 0.1, 0.3, 0.05], [7, "test", 0.2, 0, 0.5, recall, 0.25]])
    content, named = tabled(folder, "--models", models)
    assert ["3", "3"] in [row[-2:] for row in texts(named["losses"])]
    assert "fold 0, Normalized Softmax fold 0.seed1, Normalized" in content["warnings"][0]
    rows = texts(named["training_birds"])
    assert "training_birds_random" not in named and [row[:3] for row in rows] == [
        ["Normalized Softmax", "default", "3 seeds"], ["Normalized Softmax", "random", "3 seeds"],
        ["Normalized Softmax", "default − random", ""]]
    low, high = stats.t.interval(0.95, 2, loc=0.6, scale=0.1 / 3**0.5)
    assert rows[0][3] == f"0.300 → 0.600 [{low:.3f}, {high:.3f}]"
    test = stats.ttest_ind(*scores.values(), equal_var=False)
    low, high = test.confidence_interval()
    assert rows[2][3] == f"−0.250 [−{-low:.3f}, −{-high:.3f}], p 0.10"
    claim = next(row for row in texts(named["conclusions"]) if row[1].startswith("Recall@1 is lower"))
    assert claim[2] == "birds" and claim[3] == rows[2][3].split(", p")[0]
    assert claim[7] == "can't be told: 6 values allow no p below 0.1"


def test_what_is_shipped_is_the_reference():
    if not (SHARED / "reference").is_dir():
        pytest.skip("../shared/reference is not here: the source of published/")
    for path in (SHARED / "reference").glob("*.csv"):
        if path.name != "losses.csv":
            assert (ROOT / "published" / path.name).read_text() == path.read_text()


# ---------------------------------------------------------------- findings


def test_that_nothing_was_found_is_said_in_one_sentence(small, tabled):
    properties, types, pixels = tabled(small)[0]["findings"]
    assert types["text"] == ("cars: ranking and classification losses can't be compared, two of each are "
                             "needed.")
    assert properties["text"] == ("cars: embeddings cluster most by model: NR-Prec 3.33 [0.53, 6.13], above "
                                  "the published mark 2.576 in 2 of 3 losses.")
    assert "no p-value" in properties["test"] and properties["p_value"] is None
    mean = np.tanh((np.log(27) / 4 + np.arctanh(0.4) + np.arctanh(0.625)) / 3)
    assert pixels["text"].startswith(f"cars: maps of two losses correlate at {mean:.2f} [0.40, 0.68], ")
    write(small, "nrprec", [(loss, 0, "hue", -0.5 + 0.05 * number, 0.3)
                            for number, loss in enumerate(RANKING[:4] + CLASSIFICATION[2:4])])
    (small / "compare.csv").unlink()
    properties, types, pixels = tabled(small)[0]["findings"]
    assert properties["text"] == ("cars: embeddings cluster by no property; the largest NR-Prec is −0.38 "
                                  "(hue), above chance in 0 of 6 losses.")
    assert types["text"] == "cars: 4 ranking and 2 classification losses differ in none of 1 properties."
    assert types["p_value"] == pytest.approx(2 / 15)
    assert pixels["text"] == "cars: no saliency maps were compared."


def test_a_clear_difference_permutations_and_masks_are_said(tabled, tmp_path):
    folder, rows = tmp_path / "cars", []
    for (number, loss), fold in itertools.product(enumerate(RANKING + CLASSIFICATION), range(4)):
        rows.append((loss, fold, "model", (loss in CLASSIFICATION) + 1 + 0.01 * number, 0.002))
        rows.append((loss, fold, "sun", 0.1 * (number * 7 % 14), 0.5))
    write(folder, "nrprec", rows)
    masks = [["Triplet", 0, name, 6, 0, value, 0.01, value - 0.01, value + 0.01]
             for name, value in (("share", 0.38), ("other", 0.33), ("excess", 0.05))]
    write(folder, "masks", masks)
    content, named = tabled(folder)
    properties, types, pixels = content["findings"]
    assert properties["text"].endswith("above chance in 14 of 14 losses.") and properties["p_value"] == 0.002
    assert ("differ in 1 of 2 properties, most clearly in model: NR-Prec 1.04 [1.02, 1.06] against 2.11"
            in types["text"] and types["p_value"] == pytest.approx(2 * 2 / 2002))
    # 1.96 · 0.01 / √5 = 0.0088; at ten times the spread nothing is shown
    said = "38.0 % of the saliency lies in the object, 33.0 % in other pictures' objects: 5.0 points"
    assert pixels["text"] == f"cars: {said} [4.1, 5.9] more."
    assert named["nrprec_cars"]["rows"][0][1]["text"].endswith("*")
    assert "p_holm < 0.01 in every fold" in named["nrprec_cars"]["notes"][0]
    assert texts(named["masks_cars"]) == [["Triplet", "38.0", "33.0", "5.0"]]
    write(folder, "masks", [[*row[:6], 0.1, *row[7:]] for row in masks])
    assert tabled(folder)[0]["findings"][2]["text"] == f"cars: {said} [−3.8, 13.8] more, which may be chance."


# ---------------------------------------------------------------- special characters


@pytest.fixture
def nasty(tmp_path, run, out):
    """Every name is hostile: data set, losses, properties, values."""
    folder = tmp_path / "results" / "a_|`b &<i>"
    losses = ["Triplet", NASTY, "[x](javascript:1)", "[0pt] Жук \"q\" -- '' ñß~^#|`\\", "* star\nline"]
    lines = "".join(f"{i},<b>{i % 2}</b>,\\x{i % 3}\n" for i in range(6))
    for number, loss in enumerate(losses):
        place = add_network(folder, f"s{number}", loss=loss)
        (place / "props.csv").write_text(f'frame,"{NASTY}",*b*\n{lines}')
    write(folder, "nrprec", [(f"s{number}", 0, name, 3.0 + number) for number in range(5)
                             for name in (NASTY, "*b*")])
    write(folder, "compare", [compare_row(a, b, 0, 0.5) for a, b in itertools.combinations(losses, 2)])
    return out, losses, run(folder.parent)


def test_nothing_gets_through_in_markdown_json_and_csv(nasty):
    out, losses, printed = nasty
    page = (out / "tables.md").read_text()
    assert "<" not in page and not re.search(r"(?<!\\)\$", page) and "](" not in page.replace(r"\](", "")
    for block in page.split("\n\n"):
        if block.startswith("|"):  # every row of a table has as many cells as its header
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1
    assert r"50%\_{\\input}\$ &amp; &lt;script&gt;" in page
    name = next(path.stem for path in out.glob("nrprec_a*.csv"))
    rows, table = list(csv.reader(open(out / f"{name}.csv", newline=""))), read_tables(out)[1][name]
    assert {row[0] for row in rows[1:]} - {"Ranking mean"} == set(losses)
    assert {row[0]["text"] for row in table["rows"]} - {"Ranking mean"} == set(losses)
    assert rows[0][1] == NASTY == table["header"][1] and "kept, type “other”" in " ".join(printed.split())


def latex_columns(text):
    """Cells of each row of the tabular of one .tex file; raises AssertionError for what is not balanced."""
    body = re.sub(r"\\[\\{}$&#%_]", lambda match: "\0\0" if match.group() != r"\\" else match.group(), text)
    body = "\n".join(line for line in body.splitlines() if not line.startswith("%"))
    depths = list(itertools.accumulate((letter == "{") - (letter == "}") for letter in body))
    assert min(depths) == 0 == depths[-1] and body.count("$") % 2 == 0
    assert not re.search("[#~^]", re.sub(r"\$[^$]*\$", "", body))
    stack = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", body):
        assert kind == "begin" or stack.pop() == name
        stack += [name] * (kind == "begin")
    assert not stack
    tabular = body[body.index(r"\toprule"):body.index(r"\bottomrule")]
    return [line.count("&") + 1 for line in tabular.splitlines() if line.endswith(r"\\")]


def test_latex_is_balanced_with_as_many_cells_as_columns(nasty):
    out, _, _ = nasty
    known = set("""textbackslash textasciitilde textasciicircum textless textgreater textbar textbf cellcolor
        rotatebox phantom begin end centering caption label vspace resizebox ifdim width linewidth else fi
        small setlength tabcolsep toprule midrule bottomrule smallskip parbox footnotesize pm dagger dots
        sigma cdot times rightarrow leq geq circ""".split())
    for path in set(out.glob("*.tex")) - {out / "tables.tex"}:
        text = path.read_text()
        assert set(latex_columns(text)) == {len(read_tables(out)[1][path.stem]["header"])}, path
        body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
        assert set(re.findall(r"\\([A-Za-z]+)", body)) <= known, path  # nothing of the names is a command
        assert text.isascii() or set(re.findall(r"[^\x00-\x7f]", text)) <= set("ñß")


def test_pdflatex_compiles(nasty, small, run, tmp_path):
    """Where pdflatex is on the PATH (Debian: texlive-latex-recommended); the tests above check the structure
    everywhere, because TeX is 150 MB that the tests would install for this alone."""
    if not shutil.which("pdflatex"):
        pytest.skip("pdflatex is not on the PATH: structure, cells and escaping are checked without it")
    published_results(tmp_path / "more" / "cars")
    run(tmp_path / "more", "--published", "--out", tmp_path / "papers")
    run(small, "--out", tmp_path / "cars_tables")
    for out in nasty[0], tmp_path / "papers", tmp_path / "cars_tables":
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "tables.tex"]
        done = subprocess.run(command, cwd=out, capture_output=True, text=True, errors="replace")
        assert done.returncode == 0, done.stdout[-2000:]
        assert (out / "tables.pdf").stat().st_size > 10_000


# ---------------------------------------------------------------- bad input, and results of two kinds


def test_no_results_at_all(run, run_script, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no results; expected" in run(tmp_path / "empty", status=2)
    assert "which results?" in run(status=2)
    one_line(run_script("tables.py", tmp_path / "absent"), "no such folder")


def test_results_that_do_not_belong_together_are_named(small, run, out):
    for kind, digest in (("emb", "a"), ("maps", "b")):
        add_network(small, "cosface", 1, (kind,), checkpoint_sha256=digest)
    error = run(small, status=2)
    assert "from different checkpoints" in error and not out.exists()
    assert "cosface/fold1/emb.npy" in error and "cosface/fold1/maps.npy" in error


def test_a_half_finished_result_is_left_out_and_what_is_strange_kept(small, run, out, tmp_path):
    place, cut = small / "triplet" / "fold0", small / "arcface" / "fold1" / "emb.npy"
    (place / "emb.npy").rename(place / "emb.npy.part")
    cut.write_bytes(cut.read_bytes()[:-8])
    (small / "contrastive" / "fold0" / "emb.json").unlink()
    np.save(small / "none" / "fold1" / "emb.npy", np.float32(1))
    add_network(small, "cosface", kinds=())
    add_network(small, "margin", checkpoint="models/trained/others/cosface/fold0")
    add_network(small, "my_new_loss")
    add_training(tmp_path / "models", "others/cosface/fold0", frozen_trunk=True)  # the checkpoint was moved
    add_training(tmp_path / "models", "cars/cosface/fold0", frozen_trunk=False)
    add_network(small, "fastap", 2, pictures={"number": 6, "sha256": "folds may have pictures of their own"})
    printed, (content, named) = run(small, "--models", tmp_path / "models"), read_tables(out)
    missing, losses = "\n".join(one["what"] for one in content["missing"]), texts(named["losses"])
    for said in ("triplet/fold0/emb.npy is half-finished", "arcface/fold1/emb.npy is truncated",
                 "none/fold1/emb.npy: shape () of float32", "nrprec.csv has no rows of"):
        assert said in missing, said
    assert "half-finished" in printed and "truncated" in printed
    assert any("(Margin fold 0) were trained with a frozen trunk" in line for line in content["warnings"])
    assert losses[0][4] == "2" and losses[-1][:3] == ["my_new_loss", "", "other"]


def test_names_from_paths_of_a_network_without_a_loss(tabled, tmp_path):
    folder, name = tmp_path / "cars", "efficientnet_lite0"
    add_network(folder, name, loss=None, backbone=name, distance="euclidean")
    write(folder, "nrprec", [(name, 0, "model", 4.0)])
    content, named = tabled(folder)
    assert texts(named["nrprec_cars"]) == [[name, "4.00 *"]]
    assert texts(named["losses"])[-1] == [name, "", "none", "euclidean", "1"]
    assert content["findings"][0]["text"].endswith("in 1 of 1 networks.")


def test_outputs_that_would_destroy(small, run, tmp_path):
    before = sorted(small.iterdir())
    for name in "models", "published":  # of losses.csv and errata.csv, as tables of ours are called
        with pytest.raises(ValueError, match="a folder of results or of what is read with them"):
            folders.make_folder(ROOT / name, "tables.json")
    for out in small, small.parent:
        assert "is a folder of results" in run(small.parent, "--out", out, status=2)
    (tmp_path / "file").write_text("mine")
    assert "is a file; give a folder" in run(small, "--out", tmp_path / "file", status=2)
    assert before == sorted(small.iterdir())
    assert (tmp_path / "file").read_text() == "mine"


def test_data_sets_whose_tables_would_have_one_name(run, out, tmp_path):
    for name in "my cars", "my_cars":
        published_results(tmp_path / "results" / name)
    assert "two data sets' names give one file name" in run(tmp_path / "results", status=2)
    assert not out.exists()


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_missing_the_rest_comes_out(small, tabled, tmp_path, monkeypatch, seed):
    """Tables, rows and cells are removed at random: nothing fails, and nothing is not a number."""
    monkeypatch.setattr(conclusions, "PERMUTATIONS", 20)
    generator, folds = np.random.default_rng(seed), range(2)
    write(small, "masks", [[loss, fold, name, 6, 0, 0.3, 0.1, 0.2, 0.4] for name in tables.TITLES["masks"]
                           for loss in ("Triplet", "ArcFace") for fold in folds])
    write(small, "sanity", [[loss, fold, layers, 50, 0.5, 0.1] for loss in ("Triplet", "None")
                            for fold in folds for layers in (0, 50)])
    write(small, "embeddings", [["Triplet", fold, other, fold, 6, 0.9, 0.55, 0.5, 0.6, 0.1]
                                for fold in folds for other in ("ArcFace", "Contrastive", "None")])
    arrays = list(itertools.product(("triplet", "contrastive", "arcface", "none"), folds))
    write(small, "pairs", [
        [f"{slug}/fold{fold}/emb.npy", "test", repeat, "class", 0.5, 0.1, 0.4, 0.1, 200, 0.5, 0.4, 0.3, k]
        for slug, fold in arrays for k, repeat in ((2, 0), (2, 1), (5, None))], "classes")
    for slug, fold in arrays:
        add_training(tmp_path / "models", f"cars/{slug}/fold{fold}", split={"kind": "random"}, history=[
            [epoch, part, 0.5, 0.1, 0.3, 0.6, 0.5] for epoch in range(3)
            for part in ("train", "validation", "test")])
    values = {"nr_precision", "r_precision", "p_holm", "p_value", "correlation", "correlation_std", "jsd",
              "jsd_std", "ceiling", "corrected", "mean", "low", "high", "std", "cka", "overlap",
              "overlap_chance", "jsd_null", "recall_at_1", "map_at_r", "positive_mean", "negative_mean"}
    for path in sorted([*small.glob("*.csv"), *tmp_path.glob("models/trained/*/*/*/history.csv")]):
        columns = files.read_table(path)
        rows = [["" if name in values and generator.random() < 0.3 else value
                 for name, value in zip(columns, row)]
                for row in zip(*columns.values()) if generator.random() < 0.7]
        if rows and generator.random() < 0.8:
            files.write_table(path, list(columns), rows)
        else:
            path.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        content, named = tabled(small, "--models", tmp_path / "models")
    assert len(content["findings"]) == 3 and len(named["conclusions"]["rows"]) >= 20
    assert "nan" not in re.findall(r"[a-z]+", (tmp_path / "out" / "tables.md").read_text())


def test_the_errata_of_the_docs_are_those_of_published():
    page = (ROOT / "docs" / "errata.md").read_text(encoding="utf-8")
    assert page.endswith(tables.to_markdown(tables.errata()))
