"""How fast is compare.py? All pairs of one picture's maps against the pair-by-pair way, in one run.

    python benchmarks/compare.py                           # 15 networks, 105 pairs, 227 × 227
    python benchmarks/compare.py --networks 4 --size 224 --pictures 400

The straightforward way: numpy.corrcoef and the square of scipy.spatial.distance.jensenshannon for each pair,
float64. Both start from float16 maps in memory; they take turns, and medians are printed. Then the whole
command over --pictures pictures and over a quarter of them, with start, intervals and one CSV, all threads.
Asserts nothing.
"""
import itertools
import tempfile
from pathlib import Path

import numpy as np
from measure import command, cpu_alone, measured, print_header, print_table, script, typical
from scipy.spatial.distance import jensenshannon
from threadpoolctl import threadpool_limits

import compare


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


def one_picture(args, rng):
    maps = made_up_maps(args.networks, args.size, rng)
    turns, differences = [], []
    with threadpool_limits(1):
        for _ in range(args.repeat):
            fast, values = measured(lambda: compare.agreement(maps))
            slow, expected = measured(lambda: straightforward(maps))
            turns.append((fast, slow))
            differences.append(np.abs(np.array(values) - expected).max())
    ours, plain = map(typical, zip(*turns))
    return f"{len(values[0])} pairs of a picture's maps, one thread", {
        "ours": ours, "straightforward": plain, "difference": f"{max(differences):.1e}"}


def whole_command(args, rng, n):
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{k}.npy") for k in range(args.networks)]
        shape = (n, args.size, args.size)
        arrays = [np.lib.format.open_memmap(path, "w+", np.float16, shape) for path in files]
        for i in range(n):
            for array, one in zip(arrays, made_up_maps(args.networks, args.size, rng)):
                array[i] = one
        arrays = None
        cost, _ = script("compare.py", *files, "--out", f"{folder}/out.csv")
    return f"the command, {n:,} pictures", {"ours": cost, "ms a picture": f"{1e3 * cost.wall / n:.1f}"}


def main():
    parser = command.parser(__doc__)
    add = parser.add_argument
    add("--networks", type=int, default=15, help="number of networks (15)")
    add("--size", type=int, default=227, help="side of a map (227)")
    add("--pictures", type=int, default=400, help="for the whole command (400); 0 leaves it out")
    add("--repeat", type=int, default=9, help="turns of each way (9)")
    cpu_alone(parser)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    print_header(None, f"{args.networks} networks, maps of {args.size} × {args.size}")
    rows = [one_picture(args, rng)]
    for n in (max(1, args.pictures // 4), args.pictures) if args.pictures else ():
        rows.append(whole_command(args, rng, n))
    print_table(rows)


if __name__ == "__main__":
    command.run(main, stopped="stopped")
