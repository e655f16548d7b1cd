"""One array, row by row: order, several processes, kill -9, other options, damage, a full disk, leftovers."""
import itertools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, marks_of, saved
from hypothesis import given, settings
from hypothesis import strategies as st

from dml_common import rowfile
from dml_common.rowfile import RowFile

ABOUT = {"options": {"precision": "fp32"}, "pictures": {"number": 100, "sha256": "x"}}
# A process that fills an array of N rows, each with its number, and says how many it has done.
WRITER = """
import fcntl, sys, time, numpy as np
from dml_common import rowfile
path, rank, ranks, pause, option, N = sys.argv[1], *map(float, sys.argv[2:5]), sys.argv[5], int(sys.argv[6])
if option == "no locks":
    def fail(*arguments): raise OSError(38, "Function not implemented")
    fcntl.lockf = fail
rowfile.FLUSH = 0
try:
    file = rowfile.RowFile(path, (N, 3), "float32", {"options": option})
    done = 0
    while not file.finish():
        for start, stop in rowfile.shares(N, int(rank), int(ranks), block=5):
            rows = file.claim(start, stop)
            if len(rows):
                file.write(rows, np.repeat(rows[:, None], 3, axis=1))
                done += len(rows)
                print(done, flush=True)
                time.sleep(pause)
        time.sleep(0.01)
except ValueError as error:
    print(error)
    sys.exit(2)
"""


def writer(path, rank=0, ranks=1, pause=0.0, option="a", n=200):
    arguments = map(str, (path, rank, ranks, pause, option, n))
    return subprocess.Popen([sys.executable, "-c", WRITER, *arguments], cwd=ROOT, stdout=subprocess.PIPE,
                            text=True)


def is_right(path, n=200):
    """The array has its rows, and nothing lies beside it and its JSON."""
    expected = np.repeat(np.arange(n, dtype=np.float32)[:, None], 3, axis=1)
    return np.array_equal(np.load(path), expected) and sorted(os.listdir(path.parent)) == ["a.json", "a.npy"]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 70), st.integers(1, 9), st.sampled_from(["float32", "float16"]), st.randoms())
def test_rows_in_any_order_make_the_array(tmp_path_factory, n, m, dtype, random):
    path = tmp_path_factory.mktemp("rows") / "new" / "emb.npy"
    expected = np.random.default_rng(n).normal(size=(n, m, 2)).astype(dtype)
    file = RowFile(path, expected.shape, dtype, ABOUT)
    order = random.sample(range(n), n)
    for start in range(0, n, 7):
        rows = order[start:start + 7]
        file.write(rows, expected[rows])
        assert not path.exists()
    assert file.finish() and file.finish()
    assert path.read_bytes() == saved(expected)
    assert json.loads(path.with_suffix(".json").read_text()) == ABOUT
    assert sorted(os.listdir(path.parent)) == ["emb.json", "emb.npy"]
    assert RowFile(path, expected.shape, dtype, ABOUT).complete


@given(st.integers(1, 500), st.integers(1, 9))
def test_every_rank_comes_by_every_row_once_its_own_first(n, ranks):
    firsts = [rowfile.shares(n, rank, ranks)[0] for rank in range(ranks)]
    for rank in range(ranks):
        rows = [row for start, stop in rowfile.shares(n, rank, ranks) for row in range(start, stop)]
        assert sorted(rows) == list(range(n))
    assert len(set(firsts)) == min(ranks, -(-n // rowfile.BLOCK)) or n <= rowfile.BLOCK * ranks


# ---------------------------------------------------------------- several processes


def test_kill_9_and_again(tmp_path):
    path = tmp_path / "a.npy"
    killed = writer(path, pause=0.05)
    for _ in range(4):
        killed.stdout.readline()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not path.exists()
    marks = marks_of(path, 200)
    rows = np.flatnonzero(marks)
    assert 15 <= len(rows) < 200
    values = np.load(tmp_path / "a.npy.part", mmap_mode="r")
    np.testing.assert_array_equal(values[rows], np.repeat(rows[:, None], 3, axis=1))
    (tmp_path / ".a.json.x1y2z3a4.part").write_text("half")  # a kill while the JSON was written
    done = writer(path).communicate()[0].split()
    assert int(done[-1]) == 200 - len(rows) and is_right(path)  # only what was missing


@pytest.mark.parametrize("option, apart, killed", [
    ("a", 0, False), ("a", 0, True), ("a", 0.3, False), ("a", 0.3, True), ("no locks", 0, False),
    ("no locks", 0.3, False)])
def test_one_command_started_three_times_is_one(tmp_path, option, apart, killed):
    """Together or apart, one of them killed: what it held is taken over, and all end with the whole array."""
    path = tmp_path / "a.npy"
    processes = []
    for _ in range(3):
        processes.append(writer(path, pause=0.06, option=option))
        time.sleep(apart)
    if killed:
        processes[0].stdout.readline()
        processes[0].kill()
    done = [process.communicate()[0].split() for process in processes]
    assert [process.returncode for process in processes] == [-signal.SIGKILL if killed else 0, 0, 0]
    assert is_right(path)
    if option == "a":
        assert sum(int(numbers[-1]) for numbers in done if numbers) <= 200 + 5 * killed


def test_a_claimed_block_is_nobody_elses(tmp_path):
    file = RowFile(tmp_path / "a.npy", (200, 3), "float32", {"options": "a"})
    assert file.claim(0, 195).tolist() == list(range(195))
    assert file.claim(0, 195).tolist() == []  # nor given twice
    other = writer(tmp_path / "a.npy")
    assert other.stdout.readline() == "5\n"
    assert not file.finish()
    file.write(range(195), np.repeat(np.arange(195)[:, None], 3, axis=1))
    while not file.finish():
        time.sleep(0.01)
    assert other.wait() == 0 and is_right(tmp_path / "a.npy")


def test_processes_that_begin_while_others_end_leave_nothing(tmp_path):
    """Nobody leaves the last look to another, removes what another has open, takes an end for a beginning."""
    for trial in range(5):
        folder = tmp_path / str(trial)
        folder.mkdir()
        processes = [writer(folder / "a.npy", n=10) for _ in range(3)]
        assert [process.wait() for process in processes] == [0, 0, 0] and is_right(folder / "a.npy", 10)


@pytest.mark.parametrize("trial", range(4))
def test_of_two_with_other_options_at_one_moment_one_is_refused(tmp_path, trial):
    processes = [writer(tmp_path / "a.npy", pause=0.02, option=option) for option in "ab"]
    said = [process.communicate()[0] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 2] and is_right(tmp_path / "a.npy")
    refused = said[[process.returncode for process in processes].index(2)]
    assert "was made with other options (options: " in refused and refused.count("\n") == 1


# ---------------------------------------------------------------- other options, rows left out


def test_other_options_are_refused_and_named(tmp_path):
    path = tmp_path / "a.npy"
    file = RowFile(path, (100, 2), "float32", {**ABOUT, "versions": {"v": "1"}, "checkpoint": "here"})
    other = {**ABOUT, "options": {"precision": "bf16"}}
    file.write([0], np.zeros((1, 2)))
    file.flush()
    with pytest.raises(ValueError, match="a.npy.part was made with other .*precision: fp32 there, bf16 now"):
        RowFile(path, (100, 2), "float32", other)
    with pytest.raises(ValueError, match="made with other options"):  # of another size
        RowFile(path, (90, 2), "float32", other)
    file.write(range(1, 100), np.zeros((99, 2)))
    file.finish()
    assert rowfile.is_complete(path, {**ABOUT, "versions": {"v": "2"}, "checkpoint": "there"})
    with pytest.raises(ValueError, match="fp32 there, bf16 now"):
        rowfile.is_complete(path, other)
    path.with_suffix(".json").write_text("[]")
    with pytest.raises(ValueError, match="a.json"):
        rowfile.is_complete(path, ABOUT)
    path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match="without a.json"):
        rowfile.is_complete(path, ABOUT)


def test_pictures_of_other_sizes_are_other_options_but_for_older_arrays(tmp_path):
    path, sizes = tmp_path / "a.npy", {**ABOUT["pictures"], rowfile.SIZES: "1"}
    np.save(path, np.zeros((2, 2)))
    for listed in (ABOUT["pictures"], {**ABOUT["pictures"], "number": 99, "listed": ABOUT["pictures"]}):
        path.with_suffix(".json").write_text(json.dumps({**ABOUT, "pictures": listed}))
        assert rowfile.is_complete(path, {**ABOUT, "pictures": sizes})
    path.with_suffix(".json").write_text(json.dumps({**ABOUT, "pictures": {**sizes, rowfile.SIZES: "2"}}))
    with pytest.raises(ValueError, match="pictures.sizes_in_bytes_sha256: 2 there, 1 now"):
        rowfile.is_complete(path, {**ABOUT, "pictures": sizes})


def test_rows_left_out_are_removed_and_can_be_tried_again(tmp_path):
    path = tmp_path / "a.npy"
    values = np.arange(10, dtype=np.float32)[:, None]
    file = RowFile(path, (10, 1), "float32", ABOUT)
    file.write(range(8), values[:8])
    file.flush()
    file.leave_out([2, 8])
    assert file.missing() == 1 and not file.finish()
    file.give_up()
    file = RowFile(path, (10, 1), "float32", ABOUT, retry=True)
    assert file.claim(0, 10).tolist() == [2, 8, 9]
    file.leave_out([2])
    file.write([8, 9], values[8:])
    pictures = {"number": 9, "sha256": "y", "left_out": ["c.jpg"], "listed": ABOUT["pictures"]}
    assert file.finish(lambda rows: {**ABOUT, "pictures": pictures, "rows": rows})
    assert json.loads(path.with_suffix(".json").read_text())["rows"] == [2]
    assert np.load(path)[:, 0].tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 9]
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.npy"]
    assert rowfile.is_complete(path, {**ABOUT, "rows": [2]})


# ---------------------------------------------------------------- what others do to the working files


def half(path, n=20):
    """An array of which half the rows are there, as a killed process leaves it."""
    file = RowFile(path, (n, 3), "float32", {"options": "a"})
    file.write(range(n // 2), np.repeat(np.arange(n // 2)[:, None], 3, axis=1))
    file.flush()
    os.close(file.file)
    file.file = None


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def cut_the_end(path):
    os.truncate(path, path.stat().st_size - 1)


def empty(path):
    os.truncate(path, 0)


def grow(path):
    """Cut and written on by somebody: of the old size, without the marks."""
    size = path.stat().st_size
    os.truncate(path, size // 2)
    os.truncate(path, size)


def garble(path):
    path.write_bytes(path.read_bytes()[::-1])


@pytest.mark.parametrize("name, damage", [
    *itertools.product(["a.npy.part", "a.json.part"], [os.remove, empty, cut, grow, garble]),
    ("a.npy.part", cut_the_end)])
def test_damaged_halves_are_begun_anew_and_said(tmp_path, capsys, damage, name):
    path = tmp_path / "a.npy"
    for fills in (False, True):  # who comes and goes leaves nothing
        half(path)
        damage(tmp_path / name)
        file = RowFile(path, (20, 3), "float32", {"options": "a"})
        assert "removed, cut or damaged: beginning anew" in capsys.readouterr().err
        if fills:
            assert file.claim(0, 20).tolist() == list(range(20))
            file.write(range(20), np.repeat(np.arange(20)[:, None], 3, axis=1))
        assert file.finish() == fills
        file.give_up()
        assert is_right(path, 20) if fills else not os.listdir(tmp_path)


@pytest.mark.parametrize("damage", [os.remove, empty, cut_the_end])
def test_a_part_that_is_damaged_while_it_fills_is_never_finished(tmp_path, damage):
    path = tmp_path / "a.npy"
    process = writer(path, pause=0.05, n=100)
    process.stdout.readline()
    damage(tmp_path / "a.npy.part")
    second = writer(path, n=100)
    assert process.wait() != 0 or is_right(path, 100)  # unless the second made it anew
    second.wait()
    last = writer(path, n=100)
    assert last.wait() == 0 and is_right(path, 100)


def test_killed_between_the_last_steps(tmp_path):
    """Before the part is renamed, or before the working files are removed: the next to come does the rest."""
    path = tmp_path / "a.npy"
    file = RowFile(path, (20, 3), "float32", {"options": "a"})
    file.write(range(20), np.repeat(np.arange(20)[:, None], 3, axis=1))
    rowfile.write_json(path.with_suffix(".json"), file.about)
    os.truncate(file.part, file.size)
    os.close(file.file)
    process = writer(path, n=20)
    assert process.communicate()[0] == "" and process.returncode == 0 and is_right(path, 20)
    for leftover in ("a.npy.part", "a.json.part", "a.npy.rows"):
        (tmp_path / leftover).write_text("left")
    process = writer(path, n=20)
    assert process.communicate()[0] == "" and process.returncode == 0 and is_right(path, 20)


# ---------------------------------------------------------------- places, shapes


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="choose another place"):
        RowFile(tmp_path / "file" / "a.npy", (2, 2), "float32", {})
    os.symlink("far/a.npy", tmp_path / "link.npy")
    with pytest.raises(ValueError, match="link.npy is a link to far/a.npy, which is not there"):
        RowFile(tmp_path / "link.npy", (2, 2), "float32", {})
    assert sorted(os.listdir(tmp_path)) == ["file", "link.npy"]


def test_wrong_shapes_are_refused_and_nothing_is_left_of_no_row(tmp_path):
    file = RowFile(tmp_path / "new/folder/a.npy", (10, 2), "float32", {})
    with pytest.raises(ValueError, match=r"shape \(1, 3\), expected \(1, 2\)"):
        file.write([0], np.zeros((1, 3)))
    file.give_up()
    assert os.listdir(tmp_path) == []
