"""The scripts lie flat in the checkout; tests import and run them from there. And what many tests need."""
import csv
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))


def one_line(done, *words):
    """A script has refused: exit status 2 and one line on stderr, under its name, that holds the words."""
    script = next(Path(part).name for part in map(str, done.args) if part.endswith(".py"))
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.startswith(f"{script}: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert str(word) in done.stderr, done.stderr


def read_rows(path):
    """A CSV file's rows, each a dict of texts."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_rows(path, header, rows):
    """A CSV file; the header's names in one text."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header.split(","), *rows])


def turn_rows(path):
    """The last row of a CSV file comes first."""
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([header, *rows[::-1]]) + "\n")


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def start(script, *arguments, slow=0.0, before=(), **options):
    """A script as a process of its own; each pass of tiny_networks' networks takes so many seconds more."""
    line = [sys.executable, *before, str(ROOT / script), *map(str, arguments)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "SLOW": str(slow)}
    return subprocess.Popen(line, env=variables, **{"stderr": subprocess.PIPE, "text": True, **options})


def bash(*command, folder=ROOT, **variables):
    """A process of bash with these variables, which finds this Python and what is installed with it."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(["bash", *map(str, command)], cwd=folder, text=True, capture_output=True,
                          env={**os.environ, "PATH": programs, **variables})


def few_cars(folder, cars, frames):
    """Some frames of a rendered set as a set of their own: pictures, masks and props.csv."""
    lines = (cars / "props.csv").read_text().splitlines()
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
        for i in frames:
            source = next((cars / kind).glob(f"{i:06d}.*"))
            shutil.copy(source, folder / kind / source.name)
    (folder / "props.csv").write_text("\n".join([lines[0], *(lines[1 + i] for i in frames)]) + "\n")


def saved(array):
    """The bytes that numpy.save gives."""
    import numpy as np

    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def noise(width, height, seed=0):
    """A picture (PIL, RGB) of seeded noise."""
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def make_pictures(folder, n, size=(50, 44)):
    """0.png … of noise in a folder that is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        noise(*size, i).save(folder / f"{i}.png")
    return folder


def embeddings_of(kind, n, m, rng):
    """Rows (n, m), none of them zero, on which a kernel in float32 must count as float64 does."""
    import numpy as np

    x = rng.standard_normal((n, m)).astype(np.float32)
    return {
        "normal": lambda: x,
        "integers": lambda: np.round(x) + (np.arange(m) == 0) * np.float32(3),  # many ties, and edges of bins
        "duplicates": lambda: x[rng.integers(0, max(1, n // 6), n)],            # duplicates of the query
        "identical": lambda: np.tile(x[:1], (n, 1)),                            # nothing but ties
        "signs": lambda: np.where(x > 0, np.float32(0.1), np.float32(-0.1)),    # ties not exact in float32
        "one-hot": lambda: np.eye(m, dtype=np.float32)[rng.integers(0, m, n)],  # 0 and 1: all on edges
        "tiny": lambda: np.abs(x) * np.float32(1e-38) + np.float32(1e-39),      # denormal
        "huge": lambda: np.clip(x, -3, 3) * np.float32(1e38),                   # squares overflow float32
        "narrow": lambda: x + np.float32(300),                                  # all inner products beside 1
        "far": lambda: x + np.float32(10000),                                   # cancellation
        "outlier": lambda: np.concatenate([x[:-1], x[-1:] * np.float32(1e6)]),  # wide error bounds
        "nearly": lambda: (1 + np.arange(n) % 3 * 2.0 ** -23)[:, None] * np.ones((n, m)),          # last bit
        "lengths": lambda: x * np.exp2(rng.integers(-60, 60, (n, 1))).astype(np.float32),
    }[kind]().astype(np.float32)


@pytest.fixture
def run_script():
    """run_script("nrprec.py", "emb.npy", …) -> CompletedProcess with text output, never raising."""

    def run(script, *arguments, **options):
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, **options)

    return run


@pytest.fixture
def run_main(monkeypatch, capsys):
    """What run_script gives, but in this process: a script's start takes seconds."""

    def run(script, *arguments):
        from dml_common import command

        monkeypatch.setattr(sys, "argv", [script])
        capsys.readouterr()
        try:
            status = importlib.import_module(Path(script).stem).main(list(map(str, arguments))) or 0
        except command.Ended as end:
            status = end.code
        except (Exception, SystemExit) as error:
            status, text = command.explain(error)
            command.say(text)
        return subprocess.CompletedProcess([script, *arguments], status, *capsys.readouterr())

    return run


@pytest.fixture
def refused(capsys):
    """refused(main, argument, …) -> why it refuses, having said and written nothing else in this folder."""

    def refuse(main, *arguments):
        before = sorted(Path().iterdir())
        with pytest.raises((ValueError, OSError, SystemExit)) as caught:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        lines = [line for line in said.err.splitlines() if "_knn is not built" not in line]
        assert said.out == "" and sorted(Path().iterdir()) == before
        if isinstance(caught.value, SystemExit):  # the parser has said it
            assert caught.value.code == 2 and len(lines) == 1
            return lines[0]
        assert not lines  # command.run() says it, in one line
        return str(caught.value)

    return refuse


@pytest.fixture
def embedded(tmp_path, monkeypatch):
    """The current folder, with emb.npy (60, 5), three properties in props.csv, classes in emb.csv."""
    import numpy as np

    monkeypatch.chdir(tmp_path)
    np.save("emb.npy", np.random.default_rng(10).standard_normal((60, 5)).astype(np.float32))
    rows = [[i, "abc"[i % 3], i // 3 % 4, f"{i * 0.37:.2f}"] for i in range(60)]
    write_rows("props.csv", "frame,shape,size,angle", rows)
    write_rows("emb.csv", "path,class,super_class", [[i, "abcdef"[i % 6], i % 2] for i in range(60)])
    return tmp_path


@pytest.fixture
def renders():
    """../shared/renders: 600 rendered cars with masks and props.csv (development data, not shipped)."""
    folder = SHARED / "renders"
    if not folder.is_dir():
        pytest.skip("../shared/renders is not here: real pictures for development and CI")
    return folder


@pytest.fixture
def held_out_networks():
    """held_out_networks(models, dataset, factory, features, slugs): networks of one trunk, as
    train.py --split pictures --freeze-trunk leaves them: two folds, half of the pictures held out in each."""

    def make(folder, dataset, factory, features, slugs=("triplet", "arcface")):
        import torch

        from dml_common import networks, pictures

        whole = pictures.open_dataset(dataset, split="all")
        listed = {"number": len(whole.paths), "sha256": pictures.pictures_sha256(whole.relative)}
        trunk = networks.from_factory(factory)
        for fold in (0, 1):
            split = {"kind": "pictures", "pictures": listed, "test": list(range(fold, len(whole.paths), 2))}
            config = {"dataset": whole.name, "backbone": factory, "preprocessing": trunk.preprocessing,
                      "split": split}
            for number, slug in enumerate(slugs):
                place = folder / "trained" / whole.name / slug / f"fold{fold}"
                place.mkdir(parents=True)
                head = networks.random_linear(features, 4, 10 * number, fold)
                torch.save(trunk.state_dict(), place / "trunk_best.pth")
                torch.save(head.state_dict(), place / "embedder_best.pth")
                (place / "config.json").write_text(json.dumps(config))
        return whole

    return make


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]  # before=[*TORCHRUN, "2"]


def settle(folder, patch):
    """Run in this folder, with tiny_networks.py to name on a command line, no ranks and no cached weights."""
    shutil.copy(ROOT / "tests/tiny_networks.py", folder)
    patch.chdir(folder)
    patch.syspath_prepend(str(folder))
    patch.setenv("TORCH_HOME", str(folder / "torch"))
    for name in os.environ:
        if name.startswith("SLURM") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name)


def marks_of(path, n):
    """The marks of the n rows of an array that is being filled; none where it is not begun."""
    import numpy as np

    from dml_common.rowfile import END

    part = Path(f"{path}.part")
    content = part.read_bytes() if part.exists() else b""
    return np.frombuffer(content, np.uint8)[-n - len(END):-len(END)]


def python(code, **options):
    """Lines of Python in a process of their own, in the checkout -> CompletedProcess with text output."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, **options)


def full_disk(size):
    """Options of subprocess.run: no file of the process grows beyond so many bytes; writes fail, for real."""
    import resource

    return {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))}
