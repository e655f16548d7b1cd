"""One array, row by row: order, several writers, kill -9, other options, a full disk."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from dml_common import rowfile
from dml_common.rowfile import RowFile

ROOT = Path(rowfile.__file__).parent
ABOUT = {"options": {"precision": "fp32"}, "pictures": {"number": 100, "sha256": "x"}}


def process(code, *arguments):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, text=True)


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
    array = np.load(path, mmap_mode="r")
    assert array.dtype == dtype and array.flags.c_contiguous
    np.testing.assert_array_equal(array, expected)
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


@pytest.mark.parametrize("environment, share", [
    ({}, (0, 1)),
    ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
    ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "4"}, (2, 4)),
    ({"SLURM_ARRAY_TASK_ID": "30", "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_STEP": "10", "SLURM_ARRAY_TASK_COUNT": "3"}, (2, 3)),
    ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "3"}, (3, 6)),
    ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, (0, 1)),  # a batch script without srun
])
def test_share_from_torchrun_or_slurm(environment, share):
    assert rowfile.my_share(environment) == share


WRITER = """
import sys, time, numpy as np, rowfile
path, rank, ranks, pause = sys.argv[1], *map(float, sys.argv[2:])
rowfile.FLUSH = 0
file = rowfile.RowFile(path, (200, 3), "float32", {"a": 1})
done = 0
for start, stop in rowfile.shares(200, int(rank), int(ranks), block=5):
    rows = file.claim(start, stop)
    if len(rows):
        file.write(rows, np.repeat(rows[:, None], 3, axis=1))
        done += len(rows)
        print(done, flush=True)
        time.sleep(pause)
file.finish()
"""


def test_kill_9_and_again(tmp_path):
    path = tmp_path / "a.npy"
    writer = process(WRITER, path, 0, 1, 0.05)
    for _ in range(4):
        writer.stdout.readline()
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert not path.exists()
    marks = np.frombuffer((tmp_path / "a.npy.rows").read_bytes(), dtype=np.uint8)
    assert 15 <= marks.sum() < 200
    values = np.load(tmp_path / "a.npy.part", mmap_mode="r")
    rows = np.flatnonzero(marks)
    np.testing.assert_array_equal(values[rows], np.repeat(rows[:, None], 3, axis=1))
    writer = process(WRITER, path, 0, 1, 0)
    done = writer.communicate()[0].split()
    assert int(done[-1]) == 200 - len(rows)  # only what was missing
    np.testing.assert_array_equal(np.load(path)[:, 1], np.arange(200))


def test_several_writers_share_the_rows_and_survive_each_other(tmp_path):
    path = tmp_path / "a.npy"
    writers = [process(WRITER, path, rank, 3, 0.03) for rank in range(3)]
    writers[2].stdout.readline()
    writers[2].send_signal(signal.SIGKILL)  # its locks go with it; the others take its share
    done = [writer.communicate()[0].split() for writer in writers[:2]]
    writers[2].wait()
    assert all(writer.returncode == 0 for writer in writers[:2])
    np.testing.assert_array_equal(np.load(path)[:, 0], np.arange(200))
    assert sum(int(lines[-1]) for lines in done) <= 200
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.npy"]


def test_a_claimed_block_is_nobody_elses(tmp_path):
    file = RowFile(tmp_path / "a.npy", (200, 3), "float32", {"a": 1})
    assert file.claim(0, 195).tolist() == list(range(195))
    assert file.claim(0, 195).tolist() == []  # nor given twice
    writer = process(WRITER, tmp_path / "a.npy", 0, 1, 0)
    assert writer.communicate()[0].split() == ["5"]
    file.write(range(195), np.zeros((195, 3)))
    assert file.finish()


def test_other_options_are_refused_and_named(tmp_path):
    path = tmp_path / "a.npy"
    file = RowFile(path, (100, 2), "float32", {**ABOUT, "versions": "1", "checkpoint": "here"})
    other = {**ABOUT, "options": {"precision": "bf16"}}
    with pytest.raises(ValueError, match="a.npy.part was made with other options .options.precision: fp32 there, bf16 now"):
        RowFile(path, (100, 2), "float32", other)
    file.write(range(100), np.zeros((100, 2)))
    file.finish()
    assert rowfile.is_complete(path, {**ABOUT, "versions": "2", "checkpoint": "there"})
    with pytest.raises(ValueError, match="fp32 there, bf16 now"):
        rowfile.is_complete(path, other)
    path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match="without a.json"):
        rowfile.is_complete(path, ABOUT)


def test_rows_left_out_are_removed_and_can_be_tried_again(tmp_path):
    path = tmp_path / "a.npy"
    values = np.arange(10, dtype=np.float32)[:, None]
    file = RowFile(path, (10, 1), "float32", ABOUT)
    file.write(range(8), values[:8])
    file.flush()
    file.leave_out([2, 8])
    assert file.missing() == 1 and not file.finish()
    file.close()
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


def test_a_full_disk_is_noticed_before_the_work_starts(tmp_path):
    code = """
import resource, signal, sys, rowfile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # what a full disk does: no file grows beyond
try:
    rowfile.RowFile(sys.argv[1], (1000, 1000), "float32", {})
except OSError as error:
    print(error)
"""
    said = process(code, tmp_path / "a.npy").communicate()[0]
    assert "a.npy" in said and "3.8 MiB are needed" in said
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="choose another place"):
        RowFile(tmp_path / "file" / "a.npy", (2, 2), "float32", {})


def test_wrong_shapes_are_refused(tmp_path):
    file = RowFile(tmp_path / "a.npy", (10, 2), "float32", {})
    with pytest.raises(ValueError, match=r"shape \(1, 3\), expected \(1, 2\)"):
        file.write([0], np.zeros((1, 3)))
    file.give_up(alone=True)
    assert os.listdir(tmp_path) == []


FINISHERS = """
import sys, time, numpy as np
sys.path.insert(0, sys.argv[1])
from dml_common import rowfile
rank = int(sys.argv[2])
for number in range(60):
    file = rowfile.RowFile(f"{number}.npy", (64, 2), "float32", {})
    if not file.complete:
        for start, stop in rowfile.shares(64, rank, 2):
            rows = file.claim(start, stop)
            file.write(rows, np.ones((len(rows), 2)))
        file.finish()
        file.give_up(alone=False)
"""


def test_of_two_that_end_at_the_same_moment_one_finishes(tmp_path):
    """Neither may leave the last look to the other."""
    processes = [subprocess.Popen([sys.executable, "-c", FINISHERS, str(ROOT), str(rank)], cwd=tmp_path) for rank in (0, 1)]
    assert [process.wait() for process in processes] == [0, 0]
    assert all((tmp_path / f"{number}.npy").exists() for number in range(60))
