"""How fast is compare.py? All pairs of one picture's maps against the pair-by-pair way, in one run.

    python benchmarks/compare.py                           # 15 networks, 105 pairs, 227 × 227
    python benchmarks/compare.py --networks 4 --size 224 --pictures 400

The straightforward way: numpy.corrcoef and the square of scipy.spatial.distance.jensenshannon for each pair,
float64. Both start from float16 maps in memory; they take turns, and medians are printed. Then the whole
command over --pictures pictures, with intervals and one CSV, and its peak memory for that number and for a
quarter of it. Asserts nothing.
"""
import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy.spatial.distance import jensenshannon
from threadpoolctl import threadpool_limits

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import compare  # noqa: E402

MEASURE = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, file=sys.stderr)
"""


def made_up_maps(networks, size, rng):
    """Maps (networks, size, size), float16: one field that all share, each one's noise; cut and scaled."""
    maps = rng.gamma(1, 1, (1, size, size)) * rng.gamma(2, 0.5, (networks, size, size))
    maps = np.minimum(maps, np.percentile(maps, 99, axis=(1, 2), keepdims=True))
    maps -= maps.min(axis=(1, 2), keepdims=True)
    return (maps / maps.max(axis=(1, 2), keepdims=True)).astype(np.float16)


def straightforward(maps):
    """r and JSD, pair by pair."""
    flat = maps.reshape(len(maps), -1).astype(np.float64)
    pairs = list(itertools.combinations(flat, 2))
    correlations = [np.corrcoef(a, b)[0, 1] for a, b in pairs]
    return np.array([correlations, [jensenshannon(a, b, base=2)**2 for a, b in pairs]])


def clock(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def one_picture(args, rng):
    maps = made_up_maps(args.networks, args.size, rng)
    turns, differences = [], []
    with threadpool_limits(1):
        for _ in range(args.repeat):
            fast, values = clock(lambda: compare.agreement(maps))
            slow, expected = clock(lambda: straightforward(maps))
            turns.append((fast, slow))
            differences.append(np.abs(np.array(values) - expected).max())
    fast, slow = np.median(turns, axis=0)
    print(f"{len(values[0])} pairs of {args.networks} networks at {args.size} × {args.size}, one thread, "
          f"median of {args.repeat}")
    print(f"pair by pair  {1e3 * slow:.1f} ms a picture")
    print(f"agreement     {1e3 * fast:.2f} ms a picture")
    print(f"ratio         {slow / fast:.1f} ×; largest difference of r or JSD {max(differences):.1e}")


def whole_command(args, rng):
    with tempfile.TemporaryDirectory() as folder:
        for n in (max(1, args.pictures // 4), args.pictures):
            files = [Path(folder, f"{k}.npy") for k in range(args.networks)]
            shape = (n, args.size, args.size)
            arrays = [np.lib.format.open_memmap(path, "w+", np.float16, shape) for path in files]
            for i in range(n):
                for array, one in zip(arrays, made_up_maps(args.networks, args.size, rng)):
                    array[i] = one
            arrays = None
            command = [sys.executable, "-c", MEASURE, str(ROOT / "compare.py"), *map(str, files)]
            command += ["--out", f"{folder}/out.csv"]
            start = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            took, peak = time.perf_counter() - start, float(done.stderr.split()[-1])
            print(f"the command   {took:.1f} s for {n:,} pictures ({1e3 * took / n:.1f} ms each with start "
                  f"and intervals, {os.cpu_count()} threads), peak memory {peak:,.0f} MiB")


def main():
    as_it_stands = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_stands)
    add = parser.add_argument
    add("--networks", type=int, default=15, help="number of networks (15)")
    add("--size", type=int, default=227, help="side of a map (227)")
    add("--pictures", type=int, default=400, help="for the whole command (400); 0 leaves it out")
    add("--repeat", type=int, default=9, help="turns of each way (9)")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    one_picture(args, rng)
    if args.pictures:
        whole_command(args, rng)


if __name__ == "__main__":
    main()
