"""How a command begins and ends, the options that scripts share, and the part of the work a process takes.

A script begins its command before it imports torch, and ends it at the bottom:

    if __name__ == "__main__":
        from dml_common import command
        command.begin()
    …
    if __name__ == "__main__":
        command.run(main)

What is expected to go wrong (ValueError, OSError, no memory left) ends in one line and exit status 2, Ctrl-C
in 130, SIGTERM in 143. Anything else is our fault: one line, exit status 1; DML_TRACEBACK=1 shows where.
"""
import argparse
import io
import os
import signal
import sys
import warnings
from datetime import timedelta
from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Of options; of others what fits 64 bits.
MOST = {"threads": 4096, "workers": 4096, "replicates": 10**6, "dim": 10**6}


class Ended(SystemExit):
    """The end of a command that has said why. Any other SystemExit comes from a network's own code."""


class Output:
    """stdout or stderr whose reader may leave (… | head): the work goes on, what it says goes nowhere."""

    def __init__(self, file, forgiven):
        self.file, self.forgiven = file or open(os.devnull, "w"), forgiven

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, text):
        self.attempt(self.file.write, text)

    def flush(self):
        self.attempt(self.file.flush)

    def attempt(self, action, *given):
        try:
            action(*given)
        except self.forgiven:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


def say(text):
    """A line for people, under the script's name; whatever is in the text stays one line."""
    text = " ".join(str(text).split())[:5000]
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)


def fail(message):
    """Bad input: one line, exit status 2."""
    say(message)
    raise Ended(2)


def begin():
    """Until run() takes over nothing is written: a signal just ends the process, with one line.

    Where nobody listens to what is said the work is done all the same; a table that finds no room is a fault.
    """
    def leave(number, frame):
        say("stopped")
        os._exit(128 + number)

    for number in SIGNALS:
        signal.signal(number, leave)
    sys.stdout, sys.stderr = Output(sys.stdout, BrokenPipeError), Output(sys.stderr, OSError)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries: nothing that their user can act on


def run(main, stopped="stopped; the same command continues"):
    """Call main() and end as the head of this file says, else with the status that it returns."""
    received = []

    def stop(number, frame):
        received.append(number)
        raise KeyboardInterrupt

    for number in SIGNALS:
        signal.signal(number, stop)
    try:
        status = main() or 0
        sys.stdout.flush()
    except Ended as end:
        status = end.code
    except KeyboardInterrupt:
        begin()
        say(stopped)
        status = 128 + (received or [signal.SIGINT])[0]
    except BaseException as error:
        if os.environ.get("DML_TRACEBACK"):
            raise
        status, text = explain(error)
        say(text)
    try:
        sys.stdout.flush()
    except OSError as error:  # a full disk; Python would try once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not status:
            say(error)
            status = 2
    for number in SIGNALS:  # all is done: while Python ends, a signal only ends it sooner
        signal.signal(number, lambda *_: os._exit(status))
    sys.exit(status)


def explain(error):
    """(exit status, a line for people) of an exception."""
    if out_of_memory(error):
        return 2, f"out of memory: {error}; take a smaller network, fewer at a time, or another --device"
    if isinstance(error, SystemExit):
        return 2, f"the network's own code calls sys.exit({error.code!r}); remove that from it"
    if isinstance(error, (ValueError, OSError)) or "Symlink loop" in str(error):  # of Path.resolve
        return 2, error
    return 1, (f"{type(error).__name__}: {error}: this is a fault of {Path(sys.argv[0]).name}; "
               "DML_TRACEBACK=1 shows where")


def out_of_memory(error):
    """Is main memory full, or a GPU's? (torch, cuBLAS and cuDNN raise RuntimeErrors, too.)"""
    texts = ("allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")
    return (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or any(text in str(error) for text in texts))


# ---------------------------------------------------------------- options that scripts share


class Parser(argparse.ArgumentParser):
    """argparse that ends as a command does, and refuses empty options and numbers beyond MOST."""

    def parse_args(self, args=None, namespace=None):
        return self.checked(super().parse_args, args)

    def parse_intermixed_args(self, args=None, namespace=None):
        return self.checked(super().parse_intermixed_args, args)

    def checked(self, parse, args):
        args = list(map(str, sys.argv[1:] if args is None else args))
        for option, value in zip(args, [*args[1:], None]):
            if option.startswith("--") and (value == "" or option.endswith("=")):
                fail(f"{option.rstrip('=')} is given without a value")
        parsed = parse(args)
        for name, value in vars(parsed).items():
            most = MOST.get(name, 2**63 - 1)
            if isinstance(value, int) and value > most:
                fail(f"--{name.replace('_', '-')} {value}: expected at most {most}")
        return parsed

    def error(self, message):
        fail(message)

    def exit(self, status=0, message=None):
        raise Ended(status)


def parser(description, **settings):
    """An argparse parser that shows the docstring as it stands and refuses in one line."""
    return Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                  allow_abbrev=False, **settings)


def add_speed(add):
    """--device, --precision, --workers."""
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    add("--precision", default="fp32", choices=["fp32", "tf32", "bf16"], help="of the arithmetic (fp32)")
    add("--workers", type=int, metavar="N", help="threads that decode (this process's CPUs, at most 16)")


def parse_as_published(parser, argv, settings):
    """The parsed options: --as-published sets those of `settings`, and refuses another value beside it."""
    args = parser.parse_intermixed_args(argv)
    if args.as_published:
        parser.set_defaults(**settings)
        args = parser.parse_intermixed_args(argv)
        for name, value in settings.items():
            if (given := getattr(args, name)) != value:
                option = "--" + name.replace("_", "-")
                means = f"no {option}" if value is None or value is False else f"{option} {value}"
                raise ValueError(f"--as-published means {means}, but it is {given}; leave one out")
    return args


def at_least(args, **options):
    """Raise ValueError unless the options' values, where they are given, are at least these."""
    for name, least in options.items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least {least}")


# ---------------------------------------------------------------- what this process may take


def number_of(name, default, least=0, environment=os.environ):
    """A whole number that torchrun or Slurm put into the environment."""
    text = environment.get(name) or str(default)
    if not (text.isdecimal() and text.isascii() and len(text) < 19 and int(text) >= least):
        raise ValueError(f"the environment variable {name} is {text!r}; expected a whole number >= {least}")
    return int(text)


def available_cpus():
    """CPUs that this process may use: what a scheduler grants, shared among torchrun's processes."""
    granted = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, granted // number_of("LOCAL_WORLD_SIZE", 1, 1))


def my_share(environment=os.environ):
    """(rank, ranks) of this process, from torchrun's variables or from Slurm's (array tasks × processes).

    Raises ValueError for an array of tasks with gaps: the shares in the gaps would be nobody's.
    """
    def number(name, default, least=0):
        return number_of(name, default, least, environment)

    if "RANK" in environment:
        rank, ranks = number("RANK", 0), number("WORLD_SIZE", 1, 1)
    else:
        low, step = number("SLURM_ARRAY_TASK_MIN", 0), number("SLURM_ARRAY_TASK_STEP", 1, 1)
        task, tasks = number("SLURM_ARRAY_TASK_ID", low) - low, number("SLURM_ARRAY_TASK_COUNT", 1, 1)
        last = number("SLURM_ARRAY_TASK_MAX", low + (tasks - 1) * step) - low
        if task % step or last != (tasks - 1) * step:
            raise ValueError(f"the {tasks} tasks of this Slurm array leave gaps from {low} to {low + last}: "
                             f"their share would be nobody's; number them without: --array=0-{tasks - 1}")
        in_step = "SLURM_STEP_ID" in environment  # started by srun; a batch script alone is one process
        mine, processes = (number("SLURM_PROCID", 0), number("SLURM_NTASKS", 1, 1)) if in_step else (0, 1)
        rank, ranks = task // step * processes + mine, tasks * processes
    if not 0 <= rank < ranks:
        raise ValueError(f"this process is number {rank} of {ranks}, counted from 0: mend RANK and "
                         "WORLD_SIZE (or Slurm's variables)")
    return rank, ranks


def torch_device(name, precision="fp32"):
    """torch.device of --device; each process of a machine takes its own GPU. tf32 is switched on or off.

    Raises ValueError for a device that is not there, and for tf32 on a CPU.
    """
    import torch

    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    if name == "cuda" and gpus:
        name = gpus[number_of("LOCAL_RANK", number_of("SLURM_LOCALID", 0)) % len(gpus)]
    if name not in ["cpu", *gpus]:
        usable = f"torch can use {', '.join(gpus)}" if gpus else "no GPU that torch can use"
        raise ValueError(f"--device {name}: {usable if name.startswith('cuda') else 'unknown'}; "
                         "expected auto, cpu, cuda or cuda:N")
    if precision == "tf32" and name == "cpu":
        raise ValueError("--precision tf32 is an NVIDIA GPU's; on a CPU give fp32 or bf16")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return torch.device(name)


def join_ranks(device, name):
    """Begin the process group of torchrun's ranks, NCCL's on GPUs; name: --device.

    Raises ValueError for several on one GPU, which NCCL refuses.
    """
    import torch

    if device.type == "cuda":
        here, gpus = number_of("LOCAL_WORLD_SIZE", 1, 1), 1 if ":" in name else torch.cuda.device_count()
        if here > gpus:
            raise ValueError(f"{here} processes, but GPUs for {gpus} with --device {name}; give "
                             f"torchrun --nproc-per-node {gpus}")
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, timeout=timedelta(days=7))


# ---------------------------------------------------------------- for people


def short_names(paths):
    """What tells the files apart: stems where they differ, else the paths without what all of them share."""
    parts = [(*Path(path).parent.parts, Path(path).stem) for path in paths]
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


def print_rows(header, rows, most=20):
    """The first rows of a CSV file on stdout, without its columns of spread and settings."""
    hidden = {"correlation_std", "jsd_std", "std", "left_out", "order", "samples"}
    columns = [k for k, name in enumerate(header) if name not in hidden]
    cells = [[header[k].replace("correlation", "r") for k in columns]]
    for row in rows[:most]:
        values = ["" if row[k] is None else row[k] for k in columns]
        cells.append([f"{value:.3f}" if isinstance(value, float) else str(value) for value in values])
    print_aligned(cells)
    if len(rows) > most:
        print(f"… {len(rows) - most:,} more rows in the file")


class Lines(io.TextIOBase):
    """stderr for a bar where it is no terminal: each of its states is a line."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)


def bar(total, description, unit=None, delay=2):
    """A tqdm bar on stderr where that is a terminal, after `delay` seconds: of `unit`, else in per cent.

    Elsewhere a line every DML_PROGRESS seconds, where the environment has that number.
    """
    from tqdm import tqdm

    seconds = number_of("DML_PROGRESS", 0)
    if seconds and not sys.stderr.isatty():
        line = "{desc}: {percentage:.0f}%, {elapsed} elapsed, {remaining} left"
        return tqdm(total=total, desc=description, delay=seconds, mininterval=seconds, leave=False,
                    file=Lines(), bar_format=line)
    form = {"bar_format": "{desc}: {percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} left"}
    return tqdm(total=total, desc=description, delay=delay, disable=None, leave=unit is not None,
                file=sys.stderr, **({"unit": unit} if unit else form))


def import_figures():
    """figures.py, for a step's --figure. Raises ValueError naming the file or the extra that is missing."""
    try:
        import figures
    except ModuleNotFoundError as error:
        if error.name != "figures":
            raise ValueError(f"--figure needs {error.name}: pip install '.[report]'") from None
        figures = None
    if getattr(figures, "__file__", None) is None:  # not there, or a folder of that name was imported
        raise ValueError("--figure is drawn by figures.py, which is not here; copy it too")
    return figures
