"""A function: copy its script; a command: copy its script and dml_common/. Tried among hostile neighbours."""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, one_line
from PIL import Image

HOSTILE = ["data/__init__.py", "models/__init__.py", "results.py", "common.py", "files.py", "pictures.py"]
ARRAYS = """
import numpy as np
x, labels = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32), np.arange(8) % 2
maps = np.random.default_rng(1).random((3, 5, 4, 4), dtype=np.float32)
"""
FUNCTIONS = {  # of each script, in a folder where it is alone
    "nrprec": "assert nrprec.nr_precision(x, {'a': labels})['a'].queries == 8",
    "pairs": "assert -1 <= pairs.pair_scores(x, labels, permutations=2).map_at_r <= 1",
    "embed": "import torch\nassert embed.embed(torch.nn.Flatten(), torch.rand(2, 3, 4, 4)).shape == (2, 48)",
    "saliency": """
import torch
from torch import nn
network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 2)).eval()
pictures = torch.rand(1, 3, 8, 8)
network = saliency.fold_batchnorm(network, pictures)
distance = lambda a, b: torch.linalg.vector_norm(a - b, dim=-1)
made = saliency.smoothgrad(network, pictures, pictures[0] * 0, distance, samples=2, seeds=[0])
assert made.shape == (1, 8, 8)
order = saliency.block_order(made[0], (8, 8), 4)
areas = saliency.faithfulness(network, pictures[0], pictures[0] * 0, [order], distance, block=4)
assert areas.shape == (1, 2)""",
    "compare": """
assert compare.agreement(maps[:, 0])[0].shape == (3,)
assert np.allclose(compare.linear_cka([x, x + 1, -x]), 1)""",
    "train": """
from PIL import Image
assert sum(map(len, train.split_rows(np.arange(64) // 16, 'pictures'))) == 64
picture = train.augment(Image.new('RGB', (9, 9)), (4, 4), np.random.default_rng(0))
assert np.asarray(picture).shape == (4, 4, 3)""",
    "render_cars": "assert len(render_cars.sample(render_cars.PROPERTIES, 1, range(3))) == 3",
    "tables": """
made = tables.table('t', 'Title', 'Caption', ['name', 'p'], [['a_b', tables.cell('0.5', 0.5)]])
assert '0.5' in tables.to_markdown(made) and 'a' in tables.latex('a_b')""",
    "figures": """
figure = figures.draw_heat_map(np.eye(3), list('abc'))
assert figures.png(figure) == figures.png(figures.draw_heat_map(np.eye(3), list('abc')))
assert figures.heat(maps[0, 0]).dtype == np.uint8""",
    "report": "from PIL import Image\nassert report.webp(Image.new('RGB', (4, 4)), "
              "80).startswith('data:image/webp')",
}
COMMANDS = {  # arguments of a tiny run, what is copied besides dml_common/, what it makes
    "nrprec": (["emb.npy", "props.csv", "--out", "o.csv"], [], "o.csv"),
    "pairs": (["emb.npy", "props.csv", "--label", "a", "--out", "o.csv"], [], "o.csv"),
    "embed": (["--dataset", "p", "--model", "net:seven", "--out", "e.npy", "--workers", "1"], [], "e.npy"),
    "saliency": (["--dataset", "p", "--model", "net:seven", "--out", "m.npy", "--samples", "2"], [], "m.npy"),
    "compare": (["maps0.npy", "maps1.npy", "--out", "o.csv"], [], "o.csv"),
    "train": (["--dataset", "p", "--model", "net:seven", "--loss", "Triplet", "--fold", "0", "--epochs", "1",
               "--split", "pictures", "--batch", "8", "--models", "m", "--workers", "1"],
              ["pairs.py", "models/losses.csv"], "m/trained/p@pictures/triplet/fold0/config.json"),
    "render_cars": (["--dry-run", "--frames", "0:3", "--out", "set"], [], "set/props.csv"),
    "tables": (["results/p", "--out", "t"], ["models/losses.csv", "templates"], "t/tables.json"),
    "figures": (["results/p", "--out", "f"], ["models/losses.csv"], "f/figures.json"),
}
@pytest.fixture
def folder(tmp_path):
    """Arrays, pictures and results, among neighbours that must never be imported."""
    for name in HOSTILE:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"raise SystemExit('{name} was imported')\n")
    rng = np.random.default_rng(0)
    np.save(tmp_path / "emb.npy", rng.normal(size=(40, 4)).astype(np.float32))
    for number in (0, 1):
        np.save(tmp_path / f"maps{number}.npy", rng.random((5, 4, 4)).astype(np.float16))
    (tmp_path / "props.csv").write_text("a\n" + "x\ny\n" * 20)
    shutil.copy(ROOT / "tests/tiny_networks.py", tmp_path / "net.py")
    for i in range(80):
        (tmp_path / "p" / f"{i % 4}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(tmp_path / f"p/{i % 4}/{i}.png")
    for slug, loss in (("triplet", "Triplet"), ("arcface", "ArcFace")):
        place = tmp_path / "results/p" / slug / "fold0"
        place.mkdir(parents=True)
        shutil.copy(tmp_path / "emb.npy", place)
        about = {"dataset": "p", "loss": loss, "fold": 0, "distance": "euclidean", "backbone": "net",
                 "pictures": {"number": 40, "sha256": "x"}, "options": {}, "versions": {}}
        (place / "emb.json").write_text(json.dumps(about))
    rows = [f"results/p/{slug}/fold0/emb.npy,a,binomial,euclidean,,40,0,40,0.5,0.1,0.1,,,,"
            for slug in ("triplet", "arcface")]
    header = ("embeddings,property,null,distance,max_neighbours,queries,left_out,n,r_precision,nr_precision,"
              "standard_error,permutations,p,p_holm,seed")
    (tmp_path / "results/p/nrprec.csv").write_text("\n".join([header, *rows]) + "\n")
    return tmp_path


def copy(folder, *scripts):
    """Scripts and dml_common/, all that their commands need."""
    shutil.copytree(ROOT / "dml_common", folder / "dml_common")
    for script in scripts:
        if not (folder / f"{script}.py").exists():
            shutil.copy(ROOT / f"{script}.py", folder)


def run(folder, *command):
    """A process as a user starts it in the folder: nothing of the checkout is on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True,
                          text=True)


@pytest.mark.parametrize("script", FUNCTIONS)
def test_a_function_needs_its_script_alone(folder, script):
    if script in ("figures", "report"):
        pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")
    shutil.copy(ROOT / f"{script}.py", folder)
    done = run(folder, "-c", f"import {script}\n{ARRAYS}{FUNCTIONS[script]}")
    assert done.returncode == 0, done.stderr
    done = run(folder, f"{script}.py", "--help")
    if script != "render_cars":  # it stands wholly alone
        one_line(done, "the command needs the folder dml_common/")
        assert done.stdout == ""


@pytest.mark.parametrize("script", FUNCTIONS)
def test_a_command_needs_its_script_and_dml_common(folder, script):
    if script in ("figures", "report"):
        pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")
        pytest.importorskip("sklearn", reason="the extra 'report' is not installed")
    copy(folder, script)
    if script == "render_cars":
        shutil.rmtree(folder / "dml_common")
    arguments, more, made = COMMANDS.get(script, (["--help"], [], None))
    for name in more:  # the exceptions: one line says what is missing
        done = run(folder, f"{script}.py", *arguments)
        lines = done.stderr.splitlines()
        assert done.returncode in (0, 2) and name in "".join(lines), (name, lines)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)
    done = run(folder, f"{script}.py", *arguments)
    assert done.returncode == 0 and (made is None or (folder / made).is_file()), done.stderr


@pytest.mark.parametrize("script", ["pairs", "compare"])
def test_figures_are_drawn_by_figures(folder, script):
    pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")
    arguments = [*COMMANDS[script][0], "--figure", "f.png"]
    copy(folder, script)
    (folder / "figures").mkdir()  # a folder of figures is no figures.py
    one_line(run(folder, f"{script}.py", *arguments), "figures.py")
    shutil.copy(ROOT / "figures.py", folder)
    done = run(folder, f"{script}.py", *arguments)
    assert done.returncode == 0 and (folder / "f.png").read_bytes().startswith(b"\x89PNG"), done.stderr


@pytest.mark.parametrize("package, script", [
    ("matplotlib", "pairs"), ("matplotlib", "compare"), ("matplotlib", "figures"), ("sklearn", "figures"),
    ("jinja2", "report")])
def test_a_package_of_the_extra_that_is_missing_is_named_before_anything_is_written(folder, package, script):
    arguments = ["results/p", "--out", "out.html"]
    if script in ("pairs", "compare"):
        arguments = [*COMMANDS[script][0], "--figure", "f.png"]
    copy(folder, script, "figures")
    before = sorted(folder.iterdir())
    hidden = ("import runpy, sys; sys.modules[sys.argv[1]] = None; sys.argv = sys.argv[2:];"
              "runpy.run_path(sys.argv[0], run_name='__main__')")
    done = run(folder, "-B", "-c", hidden, package, f"{script}.py", *arguments)
    one_line(done, package, "pip install '.[report]'")
    assert sorted(folder.iterdir()) == before
