"""How a command begins and ends: one line, an exit status, nothing else."""
import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dml_common import command
from dml_common.files import ROOT

HEAD = """
if __name__ == "__main__":
    from dml_common import command
    command.begin()
import os, sys, time, warnings
{before}
def main():
    print("written")
    {body}
if __name__ == "__main__":
    command.run(main)
"""


@pytest.fixture
def script(tmp_path):
    """script("body of main", before="…") -> (exit status, stdout, stderr) of a command of ours."""
    def run(body, before="", **options):
        (tmp_path / "mine.py").write_text(HEAD.format(body=body, before=before))
        done = subprocess.run([sys.executable, tmp_path / "mine.py"], text=True, **{
            "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "capture_output": True, **options})
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.mark.parametrize("body, status, line", [
    ("return 1", 1, ""), ("raise ValueError('a bad\\n file')", 2, "a bad file"),
    ("raise RuntimeError('Symlink loop from l')", 2, "Symlink loop from l"),
    ("open('no')", 2, "[Errno 2] No such file or directory: 'no'"), ("command.fail('odd')", 2, "odd"),
    ("raise ValueError('\\x1b[31m\\udcff' + 'x' * 10**6)", 2, r"\x1b[31m\udcff" + "x" * 4994),
    ("{}['x']", 1, "KeyError: 'x': this is a fault of mine.py; DML_TRACEBACK=1 shows where"),
    ("sys.exit(7)", 2, "the network's own code calls sys.exit(7); remove that from it"),
    ("sys.exit()", 2, "the network's own code calls sys.exit(None); remove that from it"),
    ("command.parser('').parse_args(['--help'])", 0, ""),
    ("command.parser('').parse_args(['--out'])", 2, "unrecognized arguments: --out"),
    ("raise MemoryError", 2, "out of memory: ; take a smaller network, fewer at a time, or another --device"),
    ("raise KeyboardInterrupt", 130, "stopped; the same command continues"),
    ("os.kill(os.getpid(), 15)", 143, "stopped; the same command continues"),
    ("warnings.warn('of a library')", 0, "")])
def test_commands_end_in_one_line(script, body, status, line):
    code, out, err = script(body)
    assert code == status and err == (f"mine.py: {line}\n" if line else "") and out.startswith("written\n")


HELP = {"embed.py": ["torchrun", "--skip-unreadable", "emb.json", "models/README.md"],
        "saliency.py": ["Input:", "--order"], "compare.py": ["compare.csv"],
        "nrprec.py": ["python nrprec.py", "--permutations"],
        "train.py": ["python train.py --dataset cars196", "--freeze-trunk"],
        "pairs.py": ["python pairs.py", "--permutations"],
        "tables.py": ["python tables.py results --out tables", "Mann-Whitney"]}


@pytest.mark.parametrize("name", HELP)
def test_help_teaches(run_main, name):
    done = run_main(name, "--help")
    assert done.returncode == 0 and all(word in done.stdout for word in HELP[name])


def test_a_traceback_on_request(script):
    code, _, err = script("{}['x']", env={**os.environ, "PYTHONPATH": str(ROOT), "DML_TRACEBACK": "1"})
    assert code == 1 and "Traceback" in err and "KeyError" in err


def test_the_reader_has_gone_or_the_disk_is_full(script, tmp_path):
    """The work is done and ends well without a reader, but not where a table finds no room."""
    body = f"print('x' * 10**6); command.say('y'); print('z'); open({str(tmp_path / 'made')!r}, 'w')"
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "w") as full:
        for out, err in ((write, subprocess.PIPE), (write, write), (subprocess.DEVNULL, full)):
            code, _, said = script(body, capture_output=False, stdout=out, stderr=err)
            assert code == 0 and said in ("mine.py: y\n", None) and (tmp_path / "made").exists()
            (tmp_path / "made").unlink()
        code, _, err = script("pass", capture_output=False, stdout=full, stderr=subprocess.PIPE)
        assert code == 2 and err == "mine.py: [Errno 28] No space left on device\n"
        assert script("command.fail('x')", capture_output=False, stderr=full)[0] == 2
    os.close(write)
    closed = script(body, preexec_fn=lambda: (os.close(1), os.close(2)))
    assert closed[0] == 0 and (tmp_path / "made").exists()


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("before, body", [("print('here', flush=True); time.sleep(60)", "pass"),
                                          ("", "print('here', flush=True); time.sleep(60)")])
def test_signals_from_the_first_moment(tmp_path, number, status, before, body):
    (tmp_path / "mine.py").write_text(HEAD.format(body=body, before=before))
    process = subprocess.Popen([sys.executable, tmp_path / "mine.py"], stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})
    while process.stdout.readline().strip() != "here":
        pass
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == status and err.startswith("mine.py: stopped") and err.count("\n") == 1


@pytest.mark.parametrize("number", command.SIGNALS)
def test_a_signal_after_the_end_changes_nothing(script, number):
    late = f"import atexit; atexit.register(lambda: os.kill(os.getpid(), {int(number)}))"
    assert script("pass", late) == (0, "written\n", "")
    assert script("return 3", late) == (3, "written\n", "")


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs Linux's /proc to see torch being "
                                                                  "loaded")
def test_a_command_can_be_stopped_while_torch_is_imported():
    process = subprocess.Popen([sys.executable, "-m", "dml_common.networks"], stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL, text=True, cwd=ROOT)
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "networks.py: stopped\n"


@pytest.mark.parametrize("environment, share", [
    ({}, (0, 1)), ({"RANK": "3", "WORLD_SIZE": "8"}, (3, 8)),
    ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "4"}, (2, 4)),
    ({"SLURM_ARRAY_TASK_ID": "30", "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_MAX": "30",
      "SLURM_ARRAY_TASK_STEP": "10", "SLURM_ARRAY_TASK_COUNT": "3"}, (2, 3)),
    ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_ARRAY_TASK_ID": "1",
      "SLURM_ARRAY_TASK_COUNT": "3"}, (3, 6)),
    ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, (0, 1)),  # a batch script without srun
    ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "3",
      "SLURM_ARRAY_TASK_COUNT": "1"}, (0, 1))])  # one of them once more, alone
def test_the_share_of_a_process(environment, share):
    assert command.my_share(environment) == share


@pytest.mark.parametrize("environment, message", [
    ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
    ({"RANK": "8", "WORLD_SIZE": "8"}, "number 8 of 8"), ({"RANK": "x"}, "RANK is 'x'"),
    ({"RANK": "²"}, "RANK is"), ({"RANK": "1" * 30}, "RANK is"),
    ({"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "0"}, "COUNT is '0'"),
    ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "7",
      "SLURM_ARRAY_TASK_COUNT": "3"}, "leave gaps from 1 to 7: .*--array=0-2"),
    ({"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "3"}, "number 9 of 3")])
def test_shares_that_can_not_be(environment, message):
    with pytest.raises(ValueError, match=message):
        command.my_share(environment)


def test_cpus_are_shared_among_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for processes, cpus in (("2", 4), ("100", 1), ("", 8)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert command.available_cpus() == cpus
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")
    with pytest.raises(ValueError, match="LOCAL_WORLD_SIZE is '0'"):
        command.available_cpus()


def test_options_have_limits(capsys):
    args = argparse.Namespace(seed=0, map_size=0, threads=None)
    command.at_least(args, seed=0, threads=1)
    with pytest.raises(ValueError, match="--map-size 0: expected at least 1"):
        command.at_least(args, seed=0, map_size=1)
    parser = command.parser("x")
    parser.add_argument("files", nargs="+")
    for name, kind in (("--out", str), ("--seed", int), ("--threads", int)):
        parser.add_argument(name, type=kind)
    for parse in (parser.parse_args, parser.parse_intermixed_args):
        assert parse(["a", "--out", "o", "--seed", "-1"]).out == "o"
        for arguments, message in [
                (["--out", ""], "--out is given without a value"), (["--out="], "--out is given without a"),
                (["--seed", "1" + "0" * 40], "expected at most 92233720"), (["--seed", "x"], "invalid int"),
                (["--threads", "1000000"], "--threads 1000000: expected at most 4096")]:
            with pytest.raises(command.Ended):
                parse(["a", *arguments])
            assert message in capsys.readouterr().err


def test_a_gpu_that_is_not_there():  # more of --device is in test_embed.py
    with pytest.raises(ValueError, match="cuda:99: (no GPU that torch|torch can use)"):
        command.torch_device("cuda:99")


@pytest.mark.parametrize("line", ["compare", "embed --dataset examples/cars", "nrprec", "pairs ranking",
                                  "report", "saliency", "train"])
def test_benchmarks_take_a_device_and_refuse_in_one_line(line):
    script, *more = line.split()
    line = [sys.executable, ROOT / f"benchmarks/{script}.py", *more, "--device", "cuda:99", "--nonsense"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"{script}.py: unrecognized arguments: --nonsense"


def test_names_for_people():
    assert command.short_names(["a/x.npy", "b/y.npy"]) == ["x", "y"]
    assert command.short_names(["r/c/a/fold0/emb.npy", "r/c/b/fold0/emb.npy"]) == ["a", "b"]
    assert command.short_names(["r/a/fold0/emb.npy", "r/a/fold1/emb.npy", "r/b/fold0/emb.npy"]) == [
        "a/fold0", "a/fold1", "b/fold0"]
