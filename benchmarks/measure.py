"""What the benchmarks share: a measurement, the line that says where it was made, and the table.

    python benchmarks/measure.py embed.py --dataset …    # the script, then its peaks of memory on stderr
"""
import os
import platform
import re
import resource
import runpy
import subprocess
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the scripts lie flat in the checkout
from dml_common import command  # noqa: E402

SETS = ("avx2", "avx512f", "avx512_vbmi2", "avx512_vpopcntdq", "avx512_bf16", "amx_bf16", "asimd", "bf16")
LIMITS = ("KNN_ISA", "OPENBLAS_CORETYPE", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")


class Cost(NamedTuple):
    """Seconds by the clock, and of all threads and ended processes; MiB of the process, and on the GPU."""

    wall: float
    processor: float
    peak: float = 0.0
    gpu: float = 0.0

    def each(self, n):
        return self._replace(wall=self.wall / n, processor=self.processor / n)


def cpuinfo(key):
    """What /proc/cpuinfo says of the first processor, or the kind of machine."""
    path = Path("/proc/cpuinfo")
    line = re.search(rf"^({key})\s*:(.*)", path.read_text() if path.exists() else "", re.MULTILINE)
    return line[2].strip() if line else platform.machine()


def instruction_sets():
    return [name for name in SETS if name in cpuinfo("flags|Features").split()]


def print_header(device=None, *more):
    """The first line of a benchmark: on what its table was measured."""
    held = [f"{name}={os.environ[name]}" for name in LIMITS if name in os.environ]
    if device is not None and device.type == "cuda":
        import torch
        more = (torch.cuda.get_device_name(device), *more)
    with suppress(metadata.PackageNotFoundError):  # beside bpy there is none
        held.append(f"torch {metadata.version('torch')}")
    print(", ".join([cpuinfo("model name"), "/".join(instruction_sets()), f"{command.available_cpus()} cores",
                     time.strftime("%Y-%m-%d"), *held, *more]), flush=True)


def cpu_alone(parser):
    """--device, which every benchmark takes, of one that measures nothing on a GPU."""
    def noted(device):
        if device != "cpu":
            command.say(f"note: nothing here runs on a GPU: --device {device} changes no figure")
        return device

    parser.add_argument("--device", type=noted, default="cpu", help="cuda is taken, and changes nothing here")


def peak_mib():
    """Of this process, since measured() began or the process did."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def processor_seconds():
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def measured(function, device=None):
    """(Cost, result) of a call. A GPU's work begins and ends with it."""
    on_gpu = device is not None and device.type == "cuda"
    if on_gpu:
        import torch
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    wall, processor = time.perf_counter(), processor_seconds()
    result = function()
    if on_gpu:
        torch.cuda.synchronize(device)
    cost = Cost(time.perf_counter() - wall, processor_seconds() - processor, peak_mib())
    return cost._replace(gpu=torch.cuda.max_memory_allocated(device) / 2**20 if on_gpu else 0.0), result


def script(name, *arguments):
    """(Cost, stderr) of a script in a process of its own; where it fails, so does the benchmark."""
    line = [sys.executable, __file__, str(ROOT / name), *map(str, arguments)]
    cost, done = measured(lambda: subprocess.run(line, cwd=ROOT, capture_output=True, text=True))
    if done.returncode:
        raise ValueError(f"{name}: {done.stderr.strip()}")
    said, _, peaks = done.stderr.rstrip().rpartition("\n")
    peak, gpu = map(float, peaks.split())
    return cost._replace(peak=peak, gpu=gpu), said


def typical(costs):
    """The median of several measurements of one thing, and the largest of their peaks."""
    wall, processor, peak, gpu = zip(*costs)
    return Cost(median(wall), median(processor), max(peak), max(gpu))


def seconds(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}" if value >= 1 else f"{value:.2g}"


def print_table(rows):
    """Rows (what, its cells): Costs "ours", "straightforward", "floor", which all may lack; other text.

    Two lines each, of the clock and of the processor, with the ratios of these; no column without a cell.
    """
    lines = []
    for what, cells in rows:
        more = {key: text for key, text in cells.items() if not isinstance(text, Cost)}
        ours, plain, floor = (cells.get(key) for key in ("ours", "straightforward", "floor"))
        for k, unit in enumerate(("clock", "processor")):
            line = {"": "" if k else what, "seconds": unit}
            for key, cost in (("ours", ours), ("straightforward", plain), ("floor", floor)):
                line |= {key: seconds(cost[k])} if cost else {}
            line |= {"ratio": f"{plain[k] / ours[k]:.2f}"} if plain else {}
            line |= {"× floor": f"{ours[k] / floor[k]:.2f}"} if floor else {}
            if k == 0:
                line |= {"peak MiB": f"{ours.peak:,.0f}"} if ours.peak else {}
                line |= {"GPU MiB": f"{ours.gpu:,.0f}"} if ours.gpu else {}
                line |= more
            lines.append(line)
    order = ["", "seconds", "ours", "straightforward", "ratio", "floor", "× floor", "peak MiB", "GPU MiB"]
    order += dict.fromkeys(key for line in lines for key in line if key not in order)
    columns = [key for key in order if any(key in line for line in lines)]
    command.print_aligned([columns, *[[line.get(key, "") for key in columns] for line in lines]])


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        cuda = sys.modules["torch"].cuda if "torch" in sys.modules else None
        numbers = range(cuda.device_count()) if cuda and cuda.is_initialized() else ()
        gpu = max((cuda.max_memory_allocated(number) for number in numbers), default=0)
        print(peak_mib(), gpu / 2**20, file=sys.stderr)
