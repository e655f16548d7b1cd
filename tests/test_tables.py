"""tables.py: hand-worked tests, the papers' own numbers, golden tables, special characters, results of two kinds."""
import contextlib
import csv
import io
import itertools
import json
import re
import shutil
import subprocess
import warnings

import numpy as np
import pytest
from conftest import ROOT, SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dml_common import files
import tables

NASTY = r'50%_{\input}$ & <script>'
NRPREC = ("loss,fold,embeddings,property,values,queries,skipped,distance,null,max_neighbours,r_precision,nr_precision,"
          "nr_precision_se,permutations,p_value,p_holm")
COMPARE = ("model_a,fold_a,model_b,fold_b,n,left_out,correlation,correlation_std,correlation_low,correlation_high,jsd,jsd_std,"
           "ceiling,corrected")
RANKING = ["Contrastive", "Triplet", "NTXent", "Margin", "Margin / class", "FastAP", "SNR Contrastive", "Multi Similarity",
           "Multi Similarity + Miner"]
CLASSIFICATION = ["ProxyNCA", "Normalized Softmax", "CosFace", "ArcFace", "SoftTriple"]


# ---------------------------------------------------------------- averages and tests, by hand


def test_folds_average_as_if_their_pictures_were_taken_together():
    z = np.random.default_rng(1).normal(0.7, 0.3, (4, 500)) + [[0.0], [0.1], [-0.2], [0.3]]
    mean, spread = tables.average_correlation(np.tanh(z.mean(axis=1)), np.tanh(z.std(axis=1)))
    assert mean == pytest.approx(np.tanh(z.mean()), abs=1e-12)
    assert spread == pytest.approx(np.tanh(z.std()), abs=1e-12)
    assert tables.average(z.mean(axis=1), z.std(axis=1)) == pytest.approx((z.mean(), z.std()), abs=1e-12)


def test_correlations_average_through_fisher_z_by_hand():
    # artanh 0.5 = ln 3 / 2, artanh 0.8 = ln 9 / 2; their mean is ln 27 / 4, whose tanh is (√27 − 1) / (√27 + 1)
    mean, spread = tables.average_groups([0.5, 0.8], [0.1, 0.1])
    assert mean == pytest.approx((27**0.5 - 1) / (27**0.5 + 1), abs=1e-12) and spread == pytest.approx(0.1)
    assert tables.average_groups([1.0], [0.0])[0] == pytest.approx(1, abs=2e-6)  # r = 1 is cut, not infinite


def test_mann_whitney_by_hand():
    assert tables.mann_whitney([3, 4], [1, 2]) == (4, pytest.approx(2 / 6))
    # with ties: midranks 1, 2.5 | 2.5, 4; sums of two of them: 3.5, 3.5, 5, 5, 6.5, 6.5, mean 5
    assert tables.mann_whitney([1, 2], [2, 3]) == (0.5, pytest.approx(4 / 6))
    assert tables.mann_whitney([7, 7], [7]) == (1, 1)
    u, p = tables.mann_whitney(range(10, 19), range(5))
    assert (u, p) == (45, pytest.approx(2 / 2002))
    assert 11 * p == pytest.approx(0.011, abs=2e-5)  # nine against five, Holm over eleven: it cannot go below


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=2, max_size=14, unique=True), st.integers(1, 13))
def test_mann_whitney_is_scipys_exact_one_without_ties(values, n):
    n = min(n, len(values) - 1)
    expected = stats.mannwhitneyu(values[:n], values[n:], method="exact")
    assert tables.mann_whitney(values[:n], values[n:]) == (expected.statistic, pytest.approx(min(1, expected.pvalue)))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=8), st.integers(1, 7))
def test_mann_whitney_with_ties_is_the_enumeration(values, n):
    n = min(n, len(values) - 1)
    ranks = stats.rankdata(values)
    sums = np.array([ranks[list(chosen)].sum() for chosen in itertools.combinations(range(len(values)), n)])
    extreme = np.abs(sums - sums.mean()) >= abs(ranks[:n].sum() - sums.mean()) - 1e-9
    assert tables.mann_whitney(values[:n], values[n:])[1] == pytest.approx(extreme.mean())


def test_released_p_is_the_old_default():
    x, y = [1.0, 2.5, 2.5, 4.0, 6.0], [2.5, 5.0, 7.0, 8.0]
    ranks = stats.rankdata(x + y)
    u = len(x) * len(y) + len(x) * (len(x) + 1) / 2 - ranks[:5].sum()
    ties = 1 - sum(t**3 - t for t in np.unique(ranks, return_counts=True)[1]) / (9**3 - 9)
    z = (max(u, 20 - u) - 10 - 0.5) / np.sqrt(ties * 20 * 10 / 12)  # SciPy 1.6, alternative=None: continuity, one tail
    assert tables.released_p(x, y) == pytest.approx(stats.norm.sf(abs(z)), abs=1e-12)
    assert tables.released_p(x, y) == pytest.approx(stats.mannwhitneyu(x, y, method="asymptotic").pvalue / 2)
    assert tables.released_p([1, 1], [1]) == 0.5


def test_holm_by_hand():
    np.testing.assert_allclose(tables.holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    np.testing.assert_allclose(tables.holm([0.5, 0.9]), [1, 1])


def test_effect_and_pooled_folds():
    types = {"a": "ranking", "b": "ranking", "c": "classification", "d": "none"}
    found = tables.compare_types({"x": {"a": [3, 5], "b": [1, 1], "c": [2, 2], "d": [9]}, "y": {"a": [1], "d": [2]}}, types)
    assert list(found) == ["x"]  # y has no classification loss
    test = found["x"]
    assert (test.ranking, test.classification, test.n, test.pooled) == (2.5, 2, (2, 1), (4, 2))
    assert test.effect == 0 and test.p == 1 and test.larger is None  # fold averages 4 and 1 against 2: U = 1 of 2
    assert tables.smallest_p(found) == pytest.approx(2 / 3)


def test_spearman_against_scipy():
    generator = np.random.default_rng(0)
    for _ in range(5):
        x, y = generator.normal(size=(2, 11))
        rho, p = tables.spearman(x, y)
        expected = stats.spearmanr(x, y)
        assert rho == pytest.approx(expected.statistic) and p == pytest.approx(expected.pvalue, abs=0.03)
    assert tables.spearman(range(11), range(11)) == (pytest.approx(1), pytest.approx(1e-4))
    assert tables.spearman([1, 1, 1], [1, 2, 3]) == (0, 1)


def test_same_group_finds_what_is_there_and_nothing_else():
    groups = ["r"] * 9 + ["c"] * 5
    same = np.equal.outer(groups, groups)
    noise = np.random.default_rng(2).normal(0, 0.05, (14, 14))
    within, between, p = tables.same_group(np.where(same, 0.9, 0.6) + noise + noise.T, groups)
    assert within == pytest.approx(0.9, abs=0.03) and between == pytest.approx(0.6, abs=0.03) and p < 0.005
    assert tables.same_group(noise + noise.T, groups)[2] > 0.05
    assert tables.same_group(noise, ["r"] * 14) is None


# ---------------------------------------------------------------- small results


def write(path, header, rows):
    files.write_table(path, header.split(","), rows)


def nrprec_row(loss, fold, name, value, path="emb.npy", p_value=None, p_holm=None, queries=6, distance="euclidean",
               permutations=0):
    return [loss, fold, path, name, 3, queries, 0, distance, "binomial", None, 0.25, value, None, permutations, p_value, p_holm]


def compare_row(a, b, fold, r, std=0.1, ceiling=None, fold_b=None, n=6):
    fold_b = fold if fold_b is None else fold_b
    return [a, fold, b, fold_b, n, 0, r, std, r - 0.1, r + 0.1, 0.02, 0.01, ceiling, ceiling and r / ceiling]


def add_network(folder, slug, loss, fold=0, kinds=("emb",), number=6, sha="one", **about):
    place = folder / slug / f"fold{fold}"
    place.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        np.save(place / f"{kind}.npy", np.zeros((number, 2) if kind == "emb" else (number, 2, 2), np.float32))
        content = {"loss": loss, "fold": fold, "distance": "euclidean", "backbone": "bninception", "options": {},
                   "pictures": {"number": number, "sha256": sha}, **about}
        (place / f"{kind}.json").write_text(json.dumps(content))
    return place


def run(run_script, *arguments, status=0):
    """The command line: in this process where it should succeed (a second saved each time), else as a command."""
    if not status:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            tables.main([str(argument) for argument in arguments])
        return subprocess.CompletedProcess(arguments, 0, output.getvalue(), "")
    done = run_script("tables.py", *arguments)
    assert done.returncode == status, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("tables.py: ") and "Traceback" not in done.stderr, done.stderr
    return done


def tabled(out):
    found = json.loads((out / "tables.json").read_text(encoding="utf-8"))
    return found, {one["name"]: one for one in found["tables"]}


def texts(table):
    return [[one["text"] for one in row] for row in table["rows"]]


@pytest.fixture
def small(tmp_path):
    """Two ranking losses, one classification loss and None, two folds, in results/cars."""
    folder = tmp_path / "results" / "cars"
    folder.mkdir(parents=True)
    values = {"Triplet": (4.0, 5.0), "Contrastive": (3.0, 3.5), "ArcFace": (2.0, 2.5), "None": (1.0, 1.25)}
    write(folder / "nrprec.csv", NRPREC, [
        nrprec_row(loss, fold, name, value * factor) for loss, folds in values.items() for fold, value in enumerate(folds)
        for name, factor in (("model", 1), ("sun_rotation", -0.001))])
    rows = [compare_row("Triplet", "Contrastive", fold, r, ceiling=0.8) for fold, r in enumerate((0.5, 0.8))]
    rows += [compare_row("ArcFace", "Triplet", 0, 0.4), compare_row("ArcFace", "Triplet", 1, 0.4),
             compare_row("Contrastive", "ArcFace", 0, 0.625), compare_row("None", "Triplet", 0, 0.1),
             compare_row("None", "Triplet", 1, 0.1)]
    write(folder / "compare.csv", COMPARE, rows)
    for slug, loss in ("triplet", "Triplet"), ("contrastive", "Contrastive"), ("arcface", "ArcFace"), ("none", "None"):
        for fold in range(2):
            add_network(folder, slug, loss, fold)
    return folder


def test_golden_nrprec(small, run_script, tmp_path):
    run(run_script, small.parent, "--out", tmp_path / "out")
    rows = list(csv.reader(open(tmp_path / "out" / "nrprec_cars.csv")))
    assert rows[0] == ["Loss", "model", "model ±", "model mark", "sun_rotation", "sun_rotation ±"]
    expected = [["Contrastive", 3.25, 0.5**0.5 / 2, "*", -0.00325], ["Triplet", 4.5, 0.5**0.5, "*", -0.0045],
                ["ArcFace", 2.25, 0.5**0.5 / 2, "", -0.00225], ["None", 1.125, 0.5**0.5 / 4, "", -0.001125],
                ["Ranking mean", 3.875, 1.25 / 2**0.5, "", -0.003875], ["Classification mean", 2.25, None, "", -0.00225]]
    for row, (name, mean, spread, mark, other) in zip(rows[1:], expected, strict=True):
        assert (row[0], row[3]) == (name, mark) and float(row[1]) == pytest.approx(mean) and float(row[4]) == pytest.approx(other)
        assert row[2] == "" if spread is None else float(row[2]) == pytest.approx(spread)
    assert (tmp_path / "out" / "nrprec_cars.md").read_text().splitlines()[4:12] == [
        r"| Loss | model | sun\_rotation |", "|---|---:|---:|",
        r"| Contrastive | 3.25 \* | 0.00 |", r"| Triplet | 4.50 \* | 0.00 |",
        "| ArcFace | 2.25 | 0.00 |", "| None | 1.13 | 0.00 |", "| **Ranking mean** | 3.88 | 0.00 "
                                                               "|", "| **Classification mean** | 2.25 | 0.00 |"]
    lines = (tmp_path / "out" / "nrprec_cars.tex").read_text().splitlines()
    assert r"\begin{tabular}{lrr}" in lines and r"{}Loss & model & sun\_rotation \\" in lines
    assert r"{}Triplet & \cellcolor{black!45}4.50 * & \cellcolor{black!5}0.00 \\" in lines
    assert r"{}None & \cellcolor{black!23}1.13\phantom{ *} & \cellcolor{black!5}0.00 \\" in lines  # 5 + 40 · ln 2.125 / ln 5.5
    assert lines[-9:-5] == [r"\midrule", r"{}\textbf{Ranking mean} & 3.88\phantom{ *} & 0.00 \\",
                            r"{}\textbf{Classification mean} & 2.25\phantom{ *} & 0.00 \\", r"\bottomrule"]


def test_golden_correlation(small, run_script, tmp_path):
    run(run_script, small, "--out", tmp_path / "out")  # one data set's folder
    found, named = tabled(tmp_path / "out")
    matrix = named["correlation_cars"]
    assert matrix["kind"] == "matrix" and matrix["header"] == ["", "Contrastive", "Triplet", "ArcFace", "None"]
    both = (27**0.5 - 1) / (27**0.5 + 1)  # of 0.5 and 0.8
    spread = np.tanh(np.sqrt(np.arctanh(0.1)**2 + (np.log(3) / 4)**2))  # each fold's, and between the folds
    assert texts(matrix) == [["Contrastive", "", f"{100 * both:.0f} ± {100 * spread:.0f}", "63 ± 10", ""],
                             ["Triplet", f"{100 * both:.0f} ± {100 * spread:.0f}", "", "40 ± 10", "10 ± 10"],
                             ["ArcFace", "63 ± 10", "40 ± 10", "", ""], ["None", "", "10 ± 10", "", ""]]
    assert matrix["rows"][0][2]["value"] == pytest.approx(both) == matrix["rows"][1][1]["value"]
    assert matrix["rows"][0][3]["text"] == "63 ± 10"  # 62.5 is rounded, neither truncated nor to even
    assert (matrix["rows"][0][2]["shade"], matrix["rows"][1][4]["shade"], matrix["rows"][0][0]["shade"]) == (1, 0, None)
    condensed = texts(named["correlation_by_type_cars"])
    assert condensed[0] == ["ranking", f"{100 * both:.0f} ± "
                                       f"{100 * spread:.0f}", f"{100 * np.tanh((np.arctanh(0.4) + np.arctanh(0.625)) / 2):.0f} ± "
                                                              "10", "10 ± 10"]
    assert condensed[1][2] == "" and condensed[2][3] == ""  # one classification loss, one None: no pair of different losses
    assert texts(named["ceiling_cars"])[0][2] == "80"
    assert named["corrected_cars"]["rows"][0][2]["value"] == pytest.approx((0.5 / 0.8 + 0.8 / 0.8) / 2)
    missing = [(one["table"], one["what"]) for one in found["missing"]]
    assert ("correlation", "Contrastive and None: not compared") in missing
    assert ("compare", "Contrastive and ArcFace: fold 1; the mean is over the others") in missing
    assert list(csv.reader(open(tmp_path / "out" / "missing.csv")))[0] == ["dataset", "table", "what"]


def test_folds_of_one_loss_stand_in_the_diagonal_and_in_no_group(small, run_script, tmp_path):
    rows = [compare_row("Triplet", "Contrastive", fold, 0.5) for fold in range(2)]
    rows.append(compare_row("Triplet", "Triplet", 0, 0.9, fold_b=1))
    write(small / "compare.csv", COMPARE, rows)
    run(run_script, small, "--out", tmp_path / "out")
    named = tabled(tmp_path / "out")[1]
    assert texts(named["correlation_cars"]) == [["Contrastive", "", "50 ± 10"], ["Triplet", "50 ± 10", "90 ± 10"]]
    assert named["correlation_cars"]["notes"] == ["Diagonal: different folds of one loss."]
    assert texts(named["correlation_by_type_cars"])[0][1] == "50 ± 10"


def test_contract_of_the_json(small, run_script, tmp_path):
    run(run_script, small, "--out", tmp_path / "out")
    found, named = tabled(tmp_path / "out")
    assert list(found) == ["tables", "statements", "warnings", "missing", "made_with"]
    assert list(found["made_with"]) == ["versions", "options"]
    for one in found["tables"]:
        assert list(one) == ["name", "title", "caption", "dataset", "paper", "kind", "header", "rows", "notes"]
        assert all(list(cell) == ["text", "value", "shade", "bold", "hint"] for row in one["rows"] for cell in row)
        assert all(len(row) == len(one["header"]) and row[0]["value"] is None for row in one["rows"])
        if one["kind"] == "matrix":
            assert one["header"] == ["", *(row[0]["text"] for row in one["rows"])]
            values = [[cell["value"] for cell in row[1:]] for row in one["rows"]]
            assert values == [list(column) for column in zip(*values)]
        for suffix in "csv", "md", "tex":
            assert (tmp_path / "out" / f"{one['name']}.{suffix}").is_file()
    assert [one["main"] for one in found["statements"]] == [True] * 3 + [False] * (len(found["statements"]) - 3)
    assert all(list(one) == ["dataset", "topic", "text", "test", "p_value", "main"] for one in found["statements"])
    assert {"losses", "properties_published", "errata"} < set(named)


def test_same_bytes_twice(small, run_script, tmp_path):
    for name in "one", "two":
        run(run_script, small, "--out", tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    assert not [name for name in files if name.endswith(".part")]
    assert all((tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes() for name in files)


# ---------------------------------------------------------------- the papers' numbers


def published_results(folder, skip=(), factor=1.0):
    """nrprec.csv made of the published per-loss numbers of Table 6."""
    folder.mkdir(parents=True)
    numbers = {loss: row for loss, row in tables.published_nrprec().items() if not loss.endswith(" Mean") and loss not in skip}
    write(folder / "nrprec.csv", NRPREC, [nrprec_row(loss, 0, name, None if value is None else factor * value)
                                          for loss, row in numbers.items() for name, value in row.items()])
    return folder


def test_group_means_of_table_6_and_the_direction_of_every_difference(run_script, tmp_path):
    published = tables.published_nrprec()
    assert published["ProxyNCA"]["sun_rotation"] is None  # missing in our source
    done = run(run_script, published_results(tmp_path / "cars"), "--out", tmp_path / "out")
    found, named = tabled(tmp_path / "out")
    header, rows = named["nrprec_cars"]["header"], {row[0]["text"]: row for row in named["nrprec_cars"]["rows"]}
    for name in published["None"]:
        means = [rows[f"{kind} mean"][header.index(name)]["value"] for kind in ("Ranking", "Classification")]
        theirs = [published[f"{kind} Mean"][name] for kind in ("Ranking", "Classification")]
        assert means == pytest.approx(theirs, abs=0.0101)  # means of rounded numbers, rounded
        assert np.sign(means[0] - means[1]) == np.sign(theirs[0] - theirs[1])
    assert rows["ProxyNCA"][header.index("sun_rotation")]["text"] == ""
    assert {"dataset": "cars", "table": "nrprec", "what": "ProxyNCA: no NR-Prec of sun_rotation"} in found["missing"]
    assert "ProxyNCA: no NR-Prec of sun_rotation" in done.stdout

    tests = {row[0]["text"]: row for row in named["nrprec_tests_cars"]["rows"]}
    hue = tests["color_hue"]  # every classification loss is above every ranking loss: 3.63 against 3.50
    assert hue[4]["value"] == -1 and hue[5]["value"] == pytest.approx(2 / 2002) and hue[7]["text"] == "classification"
    assert hue[6]["value"] == pytest.approx(11 * 2 / 2002)
    shown = {name: row[7]["text"] for name, row in tests.items() if row[7]["text"]}  # as the README says: five of nine
    classification = ["color_hue", "color_sat", "color_val", "bg_color_sat"]
    assert shown == {**dict.fromkeys(classification, "classification"), "camera_loc_z": "ranking"}
    hue, height = header.index("color_hue"), header.index("camera_loc_z")
    assert rows["Classification mean"][hue]["bold"] and not rows["Ranking mean"][hue]["bold"]
    assert rows["Ranking mean"][height]["bold"] and "†" in rows["Ranking mean"][height]["text"]
    statements = {one["topic"]: one for one in reversed(found["statements"])}
    text = statements["ranking against classification"]["text"]
    assert text == ("Ranking losses have the larger NR-Prec of camera_loc_z (20.73 against 19.35), classification losses have "
                    "the larger NR-Prec of color_hue (4.07 against 3.25), color_sat (3.82 against 3.26), color_val (5.35 "
                    "against 4.77) and bg_color_sat (2.22 against 1.47): 9 ranking against 5 classification losses, cars; for "
                    "the other 6 properties no difference could be shown.")
    assert "cannot fall below 0.011" in statements["ranking against classification"]["test"]
    assert any("agrees with the paper's Table 6 (Spearman's rank correlation "
               "+1.00)" in one["text"] for one in found["statements"])


def test_published_prints_every_number(run_script):
    done = run_script("tables.py", "--published")
    lines = done.stdout.splitlines()
    for loss, row in tables.published_nrprec().items():
        line = next(line for line in lines if line.startswith(loss.replace(" Mean", " mean")) and "." in line)
        assert [float(one) for one in re.findall(r"\d+\.\d\d", line)] == [value for value in row.values() if value is not None]
    matrix = files.read_table(ROOT / "published" / "kobs_table2_sop_correlation.csv")
    for loss in dict.fromkeys(matrix["loss_a"]):
        line = next(line for line in lines if re.match(rf" *\d+ {re.escape(loss)} +.*±", line))
        numbers = re.findall(r"(\d+)±(\d+)", line)
        columns = zip(matrix["loss_a"], matrix["correlation_percent"], matrix["std_percent"])
        assert numbers == [(r, s) for a, r, s in columns if a == loss]
    for text in ("86 ± 6", "85 ± 6", "75 ± 11", "86 ± 5", "74 ± 11", "90 ± 6", "87 ± 6", "0.673", "0.260", "0.579",
                 "Ferrari Enzo", "SNR Contrastive           2019"):
        assert text in done.stdout


def test_published_puts_ours_beside(run_script, tmp_path):
    results = tmp_path / "results"
    published_results(results / "cars", factor=2.0)
    (results / "cars196").mkdir()
    write(results / "cars196" / "compare.csv", COMPARE, [
        compare_row("Triplet", "Margin", 0, 0.8), compare_row("Triplet", "ArcFace", 0, 0.95)])
    add_network(results / "cars196", "normalized_softmax", "Normalized Softmax")
    home = tmp_path / "models" / "trained" / "cars196" / "normalized_softmax" / "fold0"
    home.mkdir(parents=True)
    (home / "config.json").write_text(json.dumps({"split": {"kind": "random"}}))
    (home / "history.csv").write_text("epoch,split,loss,positive_mean,negative_mean,jsd,recall_at_1,map_at_r,seconds\n"
                                      "0,test,,0.1,0,0.1,0.3,0.05,1\n7,test,,0.2,0,0.5,0.75,0.25,1\n")
    done = run(run_script, results, "--published", "--models", tmp_path / "models", "--out", tmp_path / "out")
    named = tabled(tmp_path / "out")[1]
    row = named["difference_table6_cars"]["rows"][0]
    assert row[0]["text"] == "Contrastive" and row[1]["text"] == "+58.32" and row[1]["value"] == pytest.approx(58.32)
    assert texts(named["difference_table3_cars196"]) == [["ranking", "−6", "+10"], ["classification", "+10", ""]]
    assert texts(named["difference_oi_table1"]) == [["cars196, random", "+0.029", "+0.024", "+0.028"]]
    assert "NR-Prec, cars: ours − published (Table 6)" in done.stdout and not (tmp_path / "tables").exists()


def test_what_is_shipped_is_the_reference():
    if not (SHARED / "reference").is_dir():
        pytest.skip("../shared/reference is not here: the source of published/")
    for path in (SHARED / "reference").glob("*.csv"):
        if path.name != "losses.csv":
            assert (ROOT / "published" / path.name).read_text() == path.read_text()


# ---------------------------------------------------------------- statements and warnings


def test_no_difference_is_said_where_none_was_shown(small, run_script, tmp_path):
    run(run_script, small, "--out", tmp_path / "out")
    property_level, types, pixels = tabled(tmp_path / "out")[0]["statements"][:3]
    assert types["text"] == ("No difference between 2 ranking and 1 classification losses could be shown for any of 2 "
                             "properties of cars: the smallest Holm-corrected p is 1.00 (model). With so few losses none could: "
                             "it cannot fall below 1.00.")
    assert types["p_value"] == 1 and "the unit is the loss" in types["test"]
    assert property_level["text"].startswith("The embeddings of cars cluster most by model (mean NR-Prec 3.33 ± 1.13, first in "
                                             "3 of 3 losses): for no property is NR-Prec above the published mark 2.576 in all "
                                             "3 losses; in some for model (3.33 ± 1.13, 2 of 3); in none for sun_rotation.")
    assert "no p-value" in property_level["test"] and property_level["p_value"] is None
    # pairs of losses: artanh means of (0.5, 0.8), 0.4 and 0.625
    mean = np.tanh((np.log(27) / 4 + np.arctanh(0.4) + np.arctanh(0.625)) / 3)
    assert f"correlate at {mean:.2f} on average (0.40 to 0.68 over 3 pairs, cars)" in pixels["text"]
    assert "No objects' masks" in pixels["text"]


def test_a_clear_difference_and_permutation_tests_are_said(run_script, tmp_path):
    folder = tmp_path / "cars"
    folder.mkdir()
    rows = []
    for number, loss in enumerate(RANKING + CLASSIFICATION):
        for fold in range(4):
            model = (1.0 if loss in RANKING else 2.0) + 0.01 * number
            rows.append(nrprec_row(loss, fold, "model", model, p_value=1 / 1001, p_holm=0.002))
            rows.append(nrprec_row(loss, fold, "sun", 0.1 * (number * 7 % 14), p_value=0.5, p_holm=0.5))
    write(folder / "nrprec.csv", NRPREC, rows)
    write(folder / "masks.csv", "model,fold,measure,n,left_out,mean,std,low,high", [
        ["Triplet", 0, name, 6, 0, value, 0.01, value - 0.01, value + 0.01]
        for name, value in (("share", 0.38), ("other", 0.33), ("excess", 0.05))])
    run(run_script, folder, "--out", tmp_path / "out")
    found, named = tabled(tmp_path / "out")
    property_level, types, pixels = found["statements"][:3]
    assert property_level["text"].endswith("NR-Prec is above chance in all 14 losses for model; in none for sun.")
    assert property_level["p_value"] == 0.002 and "the folds of one differ by 0.00 in model" in property_level["test"]
    assert types["text"] == ("Classification losses have the larger NR-Prec of model (2.11 against 1.04): 9 ranking against 5 "
                             "classification losses, cars; for the other property no difference could be shown.")
    assert types["p_value"] == pytest.approx(2 * 2 / 2002)
    assert pixels["text"] == ("No saliency maps of cars were compared. 38.0 % of the saliency lies inside the object, and 33.0 "
                              "% would lie inside other pictures' objects: an excess of 5.0 points [4.1, 5.9].")
    assert named["nrprec_cars"]["rows"][0][1]["text"].endswith("*") and "p_holm < 0.01" in named["nrprec_cars"]["notes"][0]
    assert texts(named["masks_cars"]) == [["Triplet", "38.0", "33.0", "5.0"]]
    # 1.96 · 0.01 / √5 = 0.0088; at ten times the spread nothing is shown
    (folder / "masks.csv").write_text((folder / "masks.csv").read_text().replace(",0.01,", ",0.1,"))
    run(run_script, folder, "--out", tmp_path / "out")
    assert ("an excess of 5.0 points [−3.8, 13.8], so that more than other pictures' objects catch could not be shown."
            in tabled(tmp_path / "out")[0]["statements"][2]["text"])


def test_a_mean_of_folds_has_the_error_of_all_its_pictures():
    rows = [{"mean": 0.1, "std": 0.3, "n": 10.0}, {"mean": 0.2, "std": 0.4, "n": 17.0}]  # errors 0.1 and 0.1
    assert tables.mean_error(rows) == pytest.approx(0.1 / np.sqrt(2)) and np.isnan(tables.mean_error([{"mean": 0.1, "std": None}]))


def test_what_training_raises_and_lowers_is_said(run_script, tmp_path):
    folder = tmp_path / "cars"
    folder.mkdir()
    values = {"model": (5.0, 6.0, 2.0), "rotation": (0.5, 0.6, 3.0), "sun": (3.0, 1.0, 2.0), "hue": (0.1, 0.2, 0.0)}
    write(folder / "nrprec.csv", NRPREC, [nrprec_row(loss, 0, one, value) for one, three in values.items()
                                          for loss, value in zip(("Triplet", "ArcFace", "None"), three)])
    run(run_script, folder, "--out", tmp_path / "out")
    said = [one["text"] for one in tabled(tmp_path / "out")[0]["statements"]]
    assert ("Against the untrained network all losses raise NR-Prec of model (2.00 → 5.50); lower NR-Prec of rotation "
            "(3.00 → 0.55) (cars).") in said  # hue: no network is above the mark; sun: the losses differ


def test_significantly_below_chance_is_not_called_above(run_script, tmp_path):
    folder = published_results(tmp_path / "cars")
    write(folder / "nrprec.csv", NRPREC, [nrprec_row("Triplet", 0, name, value, p_value=0.001, p_holm=0.002)
                                          for name, value in (("model", 4.0), ("sun", -3.0))])
    run(run_script, folder, "--out", tmp_path / "out")
    assert tabled(tmp_path / "out")[0]["statements"][0]["text"] == (
        "The embeddings of cars cluster most by model (mean NR-Prec 4.00, first in 1 of 1 losses): NR-Prec is above chance in "
        "Triplet for model; in none for sun.")


def test_a_difference_between_chance_and_chance_is_named(run_script, tmp_path):
    folder = published_results(tmp_path / "cars")
    write(folder / "nrprec.csv", NRPREC, [nrprec_row(loss, 0, "hue", -0.5 + 0.05 * number, p_value=0.3, p_holm=0.3)
                                          for number, loss in enumerate(RANKING + CLASSIFICATION)])
    run(run_script, folder, "--out", tmp_path / "out")
    texts = [one["text"] for one in tabled(tmp_path / "out")[0]["statements"]]
    assert texts[0] == ("The embeddings of cars cluster clearly by no property: NR-Prec is above chance in none of 14 losses; "
                        "the largest mean is −0.18 ± 0.21 (hue).")
    assert texts[1] == ("No difference between 9 ranking and 5 classification losses could be shown in any property that a loss "
                        "of cars clusters by. They differ in hue (−0.30 against 0.05), by which none clusters.")


def test_one_fold_below_significance_takes_the_mark_away():
    rows = [{"p_holm": 0.001, "nr_precision": 9.0}, {"p_holm": 0.02, "nr_precision": 9.0}]
    assert not tables.significant(rows, True) and tables.significant(rows[:1], True) and tables.significant(rows, False)


def test_warnings(run_script, tmp_path):
    folder = tmp_path / "cars"
    add_network(folder, "triplet", "Triplet", kinds=("maps",), options={"shared_noise": True, "noise_of": ""})
    add_network(folder, "arcface", "ArcFace", kinds=("maps", "maps_ceiling"), options={"shared_noise": True, "noise_of": ""},
                pictures={"number": 6, "sha256": "one", "left_out": ["broken.jpg"]})
    add_network(folder, "mine", "Mine", kinds=("maps",), options={"shared_noise": True, "noise_of": ""}, backbone="vit")
    home = tmp_path / "models" / "trained" / "cars" / "triplet" / "fold0"
    home.mkdir(parents=True)
    config = {"frozen_trunk": True, "loss_parameters": {"class": "TripletMarginLoss", "margin": 0.05}}
    (home / "config.json").write_text(json.dumps(config))
    write(folder / "nrprec.csv", NRPREC, [nrprec_row(loss, 0, name, 1.0, p_value=0.02, p_holm=0.02, permutations=n)
                                          for name in "abcdef" for loss, n in (("Triplet", 500), ("ArcFace", 100))])
    row = compare_row("Triplet", "ArcFace", 0, 0.5, n=4)
    row[5] = 2
    write(folder / "compare.csv", COMPARE, [row])
    run(run_script, folder, "--models", tmp_path / "models", "--out", tmp_path / "out")
    said = "\n".join(tabled(tmp_path / "out")[0]["warnings"])
    for part in (
            "1 of 1 pairs of maps share their noise, which raises",
            "2 of 3 networks (Mine fold 0 and Triplet fold 0) have no second maps",
            "different numbers of permutations (100 and 500)",
            "100 permutations of 6 properties can't give p_holm < 0.01",
            "few pictures: saliency maps of only 6",
            "1 of 3 networks (Triplet fold 0) were trained with a frozen trunk: they differ",
            "have the parameters of models/losses.csv, not tuned ones",
            "1 pictures were left out because they could not be read (broken.jpg)",
            "up to 2 pictures are left out of a pair",
            "different backbones (bninception and vit)",
            "one fold only",
            "Mine is not in models/losses.csv: kept, type “other”"):
        assert part in said, part
    row[12:14] = 0.8, 0.6  # with second maps compare.py crosses them: independent noise, and a ceiling
    write(folder / "compare.csv", COMPARE, [row])
    done = run(run_script, folder, "--models", tmp_path / "models", "--out", tmp_path / "out")
    said = " ".join(done.stdout.split())
    assert "share their noise, so each was compared with the other networks' second maps" in said and "which raises" not in said


# ---------------------------------------------------------------- pairs, training, sanity, embeddings


def test_scores_of_the_second_paper(run_script, tmp_path):
    folder = tmp_path / "cub200"
    folder.mkdir()
    header = ("loss,fold,split,classes,repeat,embeddings,label,n,positive_pairs,negative_pairs,positive_mean,negative_mean,jsd,"
              "jsd_null,bins,recall_at_1,r_precision,map_at_r")

    def row(loss, fold, recall, split="test", repeat=None, bins=200):
        return [loss, fold, split, 5, repeat, "e.npy", "class", 9, 3, 6, 0.5, -0.1, 0.4, 0.01, bins, recall, 0.3, 0.2]

    write(folder / "pairs.csv", header, [
        row("Triplet", 0, 0.5), row("Triplet", 1, 0.6), row("ArcFace", 0, 0.7), row("ArcFace", 0, 0.1, bins=50),
        row("ArcFace", 0, 0.1, "train"), row("ArcFace", 0, 0.1, repeat=0)])
    write(folder / "sanity.csv", "model,fold,layers,of,lowest,n,correlation,correlation_std", [
        ["Triplet", 0, layers, 50, None, 6, r, 0.1] for layers, r in ((0, 0.6), (25, 0.3), (50, 0.2))])
    write(folder / "embeddings.csv", "model_a,fold_a,model_b,fold_b,n,cka,overlap,overlap_low,overlap_high,overlap_chance",
          [["Triplet", 0, "ArcFace", 0, 6, 0.9, 0.55, 0.5, 0.6, 0.1]])
    run(run_script, folder, "--out", tmp_path / "out")
    found, named = tabled(tmp_path / "out")
    assert named["pairs_cub200"]["header"][:5] == ["Loss", "Recall@1", "MAP@R", "JSD", "JSD, labels permuted"]
    assert texts(named["pairs_cub200"])[:2] == [["Triplet", "0.550", "0.200", "0.400", "0.010", "0.300", "0.500", "−0.100"],
                                                ["ArcFace", "0.700", "0.200", "0.400", "0.010", "0.300", "0.500", "−0.100"]]
    assert [row[0]["text"] for row in named["pairs_tests_cub200"]["rows"]] == ["Recall@1", "MAP@R", "JSD", "R-Precision"]
    assert texts(named["sanity_cub200"]) == [["Triplet", "60 ± 10", "30 ± 10", "20 ± 10"]]
    assert named["sanity_cub200"]["header"][1:] == ["0 of 50", "25 of 50", "50 of 50"]
    assert texts(named["cka_cub200"])[0] == ["Triplet", "", "0.90"] and texts(named["overlap_cub200"])[0][2] == "55"
    assert any("correlation with the trained network's map falls: 0.20, against "
               "0.60" in one["text"] for one in found["statements"])
    assert {"dataset": "cub200", "table": "pairs", "what": "ArcFace: fold 1; the mean is over the others"} in found["missing"]


def test_names_from_paths_where_no_loss_column_is(run_script, tmp_path):
    folder = tmp_path / "cars"
    place = add_network(folder, "efficientnet_lite0", None, kinds=("emb",), backbone="efficientnet_lite0")
    rows = [nrprec_row("", "", "model", 4.0, path=f"{place}/emb.npy")[2:]]
    write(folder / "nrprec.csv", NRPREC.removeprefix("loss,fold,"), rows)
    run(run_script, folder, "--out", tmp_path / "out")
    found, named = tabled(tmp_path / "out")
    assert texts(named["nrprec_cars"]) == [["efficientnet_lite0", "4.00 *"]]
    assert "can't be compared" in found["statements"][1]["text"]
    assert texts(named["losses"])[-1] == ["efficientnet_lite0", "", "none", "euclidean", "1"]


def test_properties_of_the_results_stand_in_table_5(small, run_script, tmp_path):
    rows = "".join(f"{i},{'suv' if i % 2 else 'van'},{i * 0.5}\n" for i in range(6))
    (small / "triplet" / "fold0" / "props.csv").write_text("frame,model,hue\n" + rows)
    run(run_script, small, "--out", tmp_path / "out")
    assert texts(tabled(tmp_path / "out")[1]["properties_cars"]) == [["model", "2", "suv, van"], ["hue", "6", "0.0, 0.5, …, 2.5"]]


# ---------------------------------------------------------------- special characters


@pytest.fixture
def nasty(tmp_path, run_script):
    """Every name is hostile: data set, losses, properties, values."""
    folder = tmp_path / "results" / "a_|`b &<i>"
    folder.mkdir(parents=True)
    losses = ["Triplet", NASTY, "[x](javascript:1)", "[0pt] Жук \"q\" -- '' ñß~^#|`\\", "* star\nline"]
    for number, loss in enumerate(losses):
        place = add_network(folder, f"s{number}", loss)
        (place / "props.csv").write_text(f'frame,"{NASTY}",*b*\n' + "".join(f"{i},<b>{i % 2}</b>,\\x{i % 3}\n" for i in range(6)))
    write(folder / "nrprec.csv", NRPREC, [nrprec_row(loss, 0, name, 3.0 + number, path=f"s{number}/fold0/emb.npy")
                                          for number, loss in enumerate(losses) for name in (NASTY, "*b*")])
    write(folder / "compare.csv", COMPARE, [compare_row(a, b, 0, 0.5) for a, b in itertools.combinations(losses, 2)])
    done = run_script("tables.py", folder.parent, "--out", tmp_path / "out")
    assert not done.returncode, done.stderr
    return tmp_path / "out", losses, done


def test_nothing_gets_through_in_markdown(nasty):
    out, losses, done = nasty
    page = (out / "tables.md").read_text()
    assert "<" not in page and not re.search(r"(?<!\\)\$", page) and "](" not in page.replace(r"\](", "")
    for path in out.glob("*.md"):
        for block in path.read_text().split("\n\n"):
            lines = block.splitlines()
            if block.startswith("|"):  # every row of a table has as many cells as its header
                assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert r"50%\_{\\input}\$ &amp; &lt;script&gt;" in page


def test_names_are_raw_in_the_json_and_kept_in_the_csv(nasty):
    out, losses, done = nasty
    name = next(path.stem for path in out.glob("nrprec_a*.csv"))
    rows = list(csv.reader(open(out / f"{name}.csv", newline="")))
    table = tabled(out)[1][name]
    assert {row[0] for row in rows[1:]} - {"Ranking mean"} == set(losses)
    assert {row[0]["text"] for row in table["rows"]} - {"Ranking mean"} == set(losses)
    assert rows[0][1] == NASTY == table["header"][1]
    assert "not in models/losses.csv: kept, type “other”" in " ".join(done.stdout.split())


def latex_columns(text):
    """Cells of each row of the tabular of one .tex file; raises AssertionError for what is not balanced."""
    body = re.sub(r"\\[\\{}$&#%_]", lambda match: "\0\0" if match.group() != r"\\" else match.group(), text)
    body = "\n".join(line for line in body.splitlines() if not line.startswith("%"))
    depth = 0
    for letter in body:
        depth += (letter == "{") - (letter == "}")
        assert depth >= 0
    assert depth == 0 and body.count("$") % 2 == 0 and not re.search("[#~^]", re.sub(r"\$[^$]*\$", "", body))
    stack = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", body):
        assert kind == "begin" or stack.pop() == name
        stack += [name] * (kind == "begin")
    assert not stack
    tabular = body[body.index(r"\toprule"):body.index(r"\bottomrule")]
    return [line.count("&") + 1 for line in tabular.splitlines() if line.endswith(r"\\")]


def test_latex_is_balanced_with_as_many_cells_as_columns(nasty):
    out, losses, done = nasty
    known = set("""textbackslash textasciitilde textasciicircum textless textgreater textbar textbf cellcolor rotatebox phantom
        begin end centering caption label vspace resizebox ifdim width linewidth else fi small setlength tabcolsep toprule midrule
        bottomrule smallskip parbox footnotesize raggedright arraybackslash pm dagger dots sigma cdot times rightarrow leq geq
        circ""".split())
    for path in out.glob("*.tex"):
        text = path.read_text()
        if path.name != "tables.tex":
            columns = latex_columns(text)
            assert set(columns) == {len(tabled(out)[1][path.stem]["header"])}, path
            body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
            assert set(re.findall(r"\\([A-Za-z]+)", body)) <= known, path  # nothing of the names is a command
            assert text.isascii() or set(re.findall(r"[^\x00-\x7f]", text)) <= set("ñß")


def test_pdflatex_compiles(nasty, small, run_script, tmp_path):
    """Where pdflatex is on the PATH (Debian: texlive-latex-recommended); the tests above check the structure everywhere,
    because TeX is 150 MB that the tests would install for this alone."""
    if not shutil.which("pdflatex"):
        pytest.skip("pdflatex is not on the PATH: structure, cells and escaping are checked without it")
    published_results(tmp_path / "more" / "cars")
    run(run_script, tmp_path / "more", "--published", "--out", tmp_path / "papers")
    run(run_script, small, "--out", tmp_path / "cars_tables")
    for out in nasty[0], tmp_path / "papers", tmp_path / "cars_tables":
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "tables.tex"]
        done = subprocess.run(command, cwd=out, capture_output=True, text=True, errors="replace")
        assert done.returncode == 0, done.stdout[-2000:]
        assert (out / "tables.pdf").stat().st_size > 10_000


# ---------------------------------------------------------------- bad input


def test_no_results_at_all(run_script, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no results; expected" in run(run_script, tmp_path / "empty", status=2).stderr
    assert "no such folder" in run(run_script, tmp_path / "absent", status=2).stderr
    assert "which results?" in run(run_script, status=2).stderr
    assert "unrecognized arguments" in run(run_script, tmp_path, "--bogus", status=2).stderr


@pytest.mark.parametrize("change, said", [
    ({"sha": "two"}, "other lists of pictures"), ({"options": {"precision": "bf16"}}, "other options (precision: None, bf16)")])
def test_results_that_do_not_belong_together_are_named(small, run_script, tmp_path, change, said):
    add_network(small, "cosface", "CosFace", 1, **change)
    done = run(run_script, small, "--out", tmp_path / "out", status=2)
    assert said in done.stderr and "cosface/fold1/emb.npy" in done.stderr
    assert re.search(r"(triplet|contrastive|arcface)/fold\d/emb.npy", done.stderr)
    assert not (tmp_path / "out").exists()


def test_folds_may_have_pictures_of_their_own(small, run_script, tmp_path):
    for slug, loss in ("triplet", "Triplet"), ("contrastive", "Contrastive"), ("arcface", "ArcFace"), ("none", "None"):
        add_network(small, slug, loss, 1, sha="another quarter")
    run(run_script, small, "--out", tmp_path / "out")


def test_embeddings_and_maps_of_different_checkpoints(small, run_script, tmp_path):
    place = add_network(small, "cosface", "CosFace", 0, kinds=("emb",), checkpoint_sha256="a")
    add_network(small, "cosface", "CosFace", 0, kinds=("maps",), checkpoint_sha256="b")
    done = run(run_script, small, "--out", tmp_path / "out", status=2)
    assert "come from different checkpoints" in done.stderr and str(place) in done.stderr


@pytest.mark.parametrize("rows, said", [
    ([nrprec_row("Triplet", 0, "model", 1, queries=300)], "counts 300 pictures for Triplet"),
    ([nrprec_row("Triplet", 0, "model", 1), nrprec_row("ArcFace", 0, "model", 1, distance="cosine")], "mixes distance euclidean "
                                                                                                      "and cosine"),
    ([nrprec_row("Triplet", 0, "model", 1), nrprec_row("Triplet", 0, "model", 2)], "two rows for Triplet, fold 0, model"),
    ([nrprec_row("Triplet", 0, "model", "much")], "column nr_precision is 'much'; expected a number")])
def test_nrprec_that_does_not_belong(small, run_script, tmp_path, rows, said):
    write(small / "nrprec.csv", NRPREC, rows)
    assert said in run(run_script, small, "--out", tmp_path / "out", status=2).stderr


def test_tables_of_something_else(small, run_script, tmp_path):
    (small / "compare.csv").write_text("a,b\n1,2\n")
    assert "lacks the columns model_a, fold_a" in run(run_script, small, "--out", tmp_path / "out", status=2).stderr
    (small / "compare.csv").write_text("a,b\n1\n")
    assert "line 2 has 1 field, the header 2" in run(run_script, small, "--out", tmp_path / "out", status=2).stderr
    write(small / "compare.csv", COMPARE, [compare_row("Triplet", "ArcFace", 0, 0.5, n=99)])
    add_network(small, "triplet", "Triplet", 0, kinds=("maps",))
    assert "compare.csv counts 99 pictures for Triplet" in run(run_script, small, "--out", tmp_path / "out", status=2).stderr


def test_a_half_finished_result_is_left_out_and_listed(small, run_script, tmp_path):
    place = small / "triplet" / "fold0"
    (place / "emb.npy").rename(place / "emb.npy.part")
    (small / "arcface" / "fold1" / "emb.npy").write_bytes((small / "arcface" / "fold0" / "emb.npy").read_bytes()[:-8])
    add_network(small, "cosface", "CosFace", kinds=())
    done = run(run_script, small, "--out", tmp_path / "out")
    found, named = tabled(tmp_path / "out")
    assert any("triplet/fold0/emb.npy is half-finished" in one["what"] for one in found["missing"])
    assert any("arcface/fold1/emb.npy is truncated" in one["what"] and "left out" in one["what"] for one in found["missing"])
    assert "half-finished" in done.stdout and "truncated" in done.stdout
    networks = {row[0]["text"]: row[4]["text"] for row in named["losses"]["rows"]}
    assert networks["Contrastive"] == "2"
    assert any("nrprec.csv has no rows of CosFace" in one["what"] for one in found["missing"])


def test_a_checkpoint_that_was_moved_and_a_json_of_something_else(small, run_script, tmp_path):
    place = add_network(small, "cosface", "CosFace", checkpoint="models/trained/others/cosface/fold0", options=None, pictures=7)
    for name, frozen in ("others", True), ("cars", False):
        home = tmp_path / "models" / "trained" / name / "cosface" / "fold0"
        home.mkdir(parents=True)
        (home / "config.json").write_text(json.dumps({"frozen_trunk": frozen}))
    (small / "triplet" / "fold0" / "emb.json").write_text("[half")
    np.save(small / "triplet" / "fold1" / "emb.npy", np.float32(1))
    run(run_script, small, "--models", tmp_path / "models", "--out", tmp_path / "out")
    found = tabled(tmp_path / "out")[0]
    assert any("(CosFace fold 0) were trained with a frozen trunk" in one for one in found["warnings"]) and place.exists()
    assert any("triplet/fold1/emb.npy: shape () of float32" in one["what"] for one in found["missing"])


def test_an_unknown_loss_in_a_folder_name_is_kept(small, run_script, tmp_path):
    (small / "my_new_loss" / "fold0").mkdir(parents=True)
    np.save(small / "my_new_loss" / "fold0" / "emb.npy", np.zeros((6, 2), np.float32))
    run(run_script, small, "--out", tmp_path / "out")
    found, named = tabled(tmp_path / "out")
    assert texts(named["losses"])[-1][:3] == ["my_new_loss", "", "other"]
    assert any("my_new_loss is not in models/losses.csv" in one for one in found["warnings"])


def test_outputs_that_would_destroy(small, run_script, tmp_path):
    before = sorted(path.name for path in small.iterdir())
    for out in small, small.parent:
        assert "is a folder of results" in run(run_script, small.parent, "--out", out, status=2).stderr
    (tmp_path / "file").write_text("mine")
    assert "is a file; give a folder" in run(run_script, small, "--out", tmp_path / "file", status=2).stderr
    assert (tmp_path / "file").read_text() == "mine" and before == sorted(path.name for path in small.iterdir())


def test_data_sets_whose_tables_would_have_one_name(run_script, tmp_path):
    for name in "my cars", "my_cars":
        published_results(tmp_path / "results" / name)
    done = run(run_script, tmp_path / "results", "--out", tmp_path / "out", status=2)
    assert "two data sets' names give one file name" in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("seed", range(12))
def test_whatever_is_missing_the_rest_comes_out(small, run_script, tmp_path, monkeypatch, seed):
    """Tables, rows and cells are removed at random: nothing fails, and nothing is not a number."""
    monkeypatch.setattr(tables, "PERMUTATIONS", 20)
    generator = np.random.default_rng(seed)
    write(small / "masks.csv", "model,fold,measure,n,left_out,mean,std,low,high", [
        [loss, fold, name, 6, 0, 0.3, 0.1, 0.2, 0.4] for loss in ("Triplet", "ArcFace") for fold in range(2)
        for name in tables.MASK_HEADER])
    write(small / "sanity.csv", "model,fold,layers,of,lowest,n,correlation,correlation_std", [
        [loss, fold, layers, 50, None, 6, 0.5, 0.1] for loss in ("Triplet", "None") for fold in range(2) for layers in (0, 50)])
    write(small / "embeddings.csv", "model_a,fold_a,model_b,fold_b,n,cka,overlap,overlap_low,overlap_high,overlap_chance", [
        ["Triplet", fold, other, fold, 6, 0.9, 0.55, 0.5, 0.6, 0.1] for fold in range(2)
        for other in ("ArcFace", "Contrastive", "None")])
    values = {"nr_precision", "r_precision", "p_holm", "p_value", "correlation", "correlation_std", "jsd", "jsd_std", "ceiling",
              "corrected", "mean", "low", "high", "cka", "overlap", "overlap_chance"}
    for path in sorted(small.glob("*.csv")):
        columns = files.read_table(path)
        rows = [["" if name in values and generator.random() < 0.3 else value for name, value in zip(columns, row)]
                for row in zip(*columns.values()) if generator.random() < 0.7]
        if rows and generator.random() < 0.8:
            files.write_table(path, list(columns), rows)
        else:
            path.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(run_script, small, "--out", tmp_path / "out")
    found, named = tabled(tmp_path / "out")
    assert [one["main"] for one in found["statements"][:3]] == [True] * 3
    page = (tmp_path / "out" / "tables.md").read_text()
    assert "nan" not in re.findall(r"[a-z]+", page) and len(named) > 2


def test_help_teaches(run_script):
    done = run_script("tables.py", "--help")
    assert "python tables.py results --out tables" in done.stdout and "Mann-Whitney" in done.stdout
