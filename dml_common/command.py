"""How a command begins and ends, the options that scripts share, and the part of the work that a process takes.

A script begins its command before it imports torch, and ends it at the bottom:

    if __name__ == "__main__":
        from dml_common import command
        command.begin()
    …
    if __name__ == "__main__":
        command.run(main)

What is expected to go wrong (ValueError, OSError, no memory left) ends with one line and exit status 2, Ctrl-C with 130,
SIGTERM with 143. Anything else is a fault of ours: one line, exit status 1; DML_TRACEBACK=1 shows where.
"""
import argparse
import os
import signal
import sys
from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def say(text):
    """A line for people, under the script's name; whatever is in it stays one line."""
    print(f"{Path(sys.argv[0]).name}: {' '.join(str(text).split())}", file=sys.stderr)


def fail(message):
    """Bad input: one line, exit status 2."""
    say(message)
    sys.exit(2)


def begin():
    """Until run() takes over nothing is written: a signal just ends the process, with one line."""
    def leave(number, frame):
        say("stopped")
        os._exit(128 + number)

    for number in SIGNALS:
        signal.signal(number, leave)


def run(main, stopped="stopped; the same command continues"):
    """Call main() and end as the head of this file says."""
    received = []

    def stop(number, frame):
        received.append(number)
        raise KeyboardInterrupt

    for number in SIGNALS:
        signal.signal(number, stop)
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has gone: … | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        say(stopped)
        sys.exit(128 + (received or [signal.SIGINT])[0])
    except (ValueError, OSError) as error:
        fail(error)
    except Exception as error:
        if out_of_memory(error):
            fail(f"out of memory: {error}; take a smaller network, fewer at a time, or another --device")
        if os.environ.get("DML_TRACEBACK"):
            raise
        say(f"{type(error).__name__}: {error}: this is a fault of {Path(sys.argv[0]).name}; DML_TRACEBACK=1 shows where")
        sys.exit(1)


def out_of_memory(error):
    """Does this exception mean that main memory or a GPU's is full? (torch raises RuntimeError for the former.)"""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error)


# ---------------------------------------------------------------- options that scripts share


def parser(description):
    """An argparse parser that shows the docstring as it stands and refuses in one line."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                   allow_abbrev=False)
    made.error = fail
    return made


def add_pictures(add):
    """--dataset, --split, --data-root; add: a parser's add_argument."""
    add("--dataset", required=True, metavar="NAME|FOLDER|CSV",
        help="cars196, cub200, sop, a folder or a CSV with a path column")
    add("--split", default="test", choices=["train", "test", "all"], help="of a data set with splits (test)")
    add("--data-root", metavar="DIR", help="folder of the published data sets (DML_DATA_ROOT, else data/)")


def add_networks(add, models):
    """--model, --loss … --weights; models: the folder of the checkpoints."""
    add("--model", help="a network without a loss: bninception, inception_v3, efficientnet_lite0 or "
        "package.module:factory")
    add("--loss", help="a loss of models/losses.csv (name or slug), several with commas, None, or all: what is there (all)")
    add("--fold", default="all", help="0, 1, 2, 3, several with commas, or all (all)")
    add("--trained-on", metavar="DATASET", help="the data set whose checkpoints are taken (--dataset)")
    add("--checkpoint", metavar="DIR", help="a folder with trunk_best.pth and embedder_best.pth")
    add("--models", default=models, metavar="DIR", help="folder of the checkpoints (models/)")
    add("--weights", metavar="FILE", help="ImageNet weights of the backbone (torch's hub cache)")


def add_speed(add):
    """--device, --precision, --workers."""
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    add("--precision", default="fp32", choices=["fp32", "tf32", "bf16"], help="of the network's arithmetic (fp32)")
    add("--workers", type=int, metavar="N", help="threads that decode (the CPUs of this process, at most 16)")


def at_least(name, value, least=1):
    """Raise ValueError unless the option's value, where it is given, is at least this."""
    if value is not None and value < least:
        raise ValueError(f"--{name} {value}: expected at least {least}")


# ---------------------------------------------------------------- what this process may take


def available_cpus():
    """CPUs that this process may use: what a scheduler grants, shared among torchrun's processes of this machine."""
    granted = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, granted // number_of("LOCAL_WORLD_SIZE", 1))


def torch_device(name, precision="fp32"):
    """torch.device of --device; each process of a machine takes its own GPU. tf32 is switched on or off for all.

    Raises ValueError for a device that is not there, and for tf32 on a CPU.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: no GPU that torch can use; give --device cpu")
    if name == "cuda":
        local = number_of("LOCAL_RANK", number_of("SLURM_LOCALID", 0))
        name = f"cuda:{local % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {name}: unknown; expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: torch can use {torch.cuda.device_count()}, counted from cuda:0")
    if precision == "tf32" and device.type == "cpu":
        raise ValueError("--precision tf32 is an NVIDIA GPU's; on a CPU give fp32 or bf16")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return device


def number_of(name, default, environment=os.environ):
    """A whole number that torchrun or Slurm put into the environment."""
    text = environment.get(name) or str(default)
    if not text.isdecimal():
        raise ValueError(f"the environment variable {name} is {text!r}; expected a whole number")
    return int(text)


def my_share(environment=os.environ):
    """(rank, ranks) of this process, from torchrun's environment or from Slurm's (array tasks × processes of each)."""
    def number(name, default):
        return number_of(name, default, environment)

    if "RANK" in environment:
        return number("RANK", 0), number("WORLD_SIZE", 1)
    task = number("SLURM_ARRAY_TASK_ID", 0) - number("SLURM_ARRAY_TASK_MIN", 0)
    task //= number("SLURM_ARRAY_TASK_STEP", 1)
    in_step = "SLURM_STEP_ID" in environment  # started by srun; a batch script alone is one process
    processes = number("SLURM_NTASKS", 1) if in_step else 1
    rank = task * processes + (number("SLURM_PROCID", 0) if in_step else 0)
    ranks = number("SLURM_ARRAY_TASK_COUNT", 1) * processes
    return rank % ranks, ranks


# ---------------------------------------------------------------- for people


def short_names(paths):
    """What tells the files apart: stems where they differ, else the paths without what all of them share."""
    parts = [Path(path).with_suffix("").parts for path in paths]
    while len(parts) > 1 and min(map(len, parts)) > 1 and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    last = [p[-1] for p in parts]
    shared = len(os.path.commonprefix([p[:-1] for p in parts]))
    return last if len(set(last)) == len(paths) else ["/".join(p[shared:]) for p in parts]


def print_aligned(lines):
    """Lists of str, the first cell to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        cells = [line[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]
        print("  ".join(cells).rstrip())


def bar(total, description, unit=None, delay=2):
    """A tqdm bar on stderr, seen where that is a terminal, after `delay` seconds: of `unit`, else a percentage of total."""
    from tqdm import tqdm

    form = {"unit": unit} if unit else {"bar_format": "{desc}: {percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} left"}
    return tqdm(total=total, desc=description, delay=delay, disable=None, leave=unit is not None, file=sys.stderr, **form)


def import_figures():
    """figures.py, for a step's --figure. Raises ValueError naming the file or the extra that is missing."""
    try:
        import figures
    except ModuleNotFoundError as error:
        if error.name == "figures":
            raise ValueError("--figure draws with figures.py, which is not beside this script; copy it too") from None
        raise ValueError(f"--figure needs {error.name}: pip install '.[report]'") from None
    return figures
