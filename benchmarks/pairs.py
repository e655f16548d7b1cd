"""How fast is pairs.py? Histograms of all pairs against the bare products over the same triangle and against
numpy.histogram over the same tiles; R-Precision and MAP@R against pytorch-metric-learning. All in one run.

    python benchmarks/pairs.py histogram --n 60000 --dim 128
    python benchmarks/pairs.py ranking --n 10000 --classes 6       # pip install pytorch-metric-learning faiss-cpu

Prints seconds, ratios and peak memory; asserts nothing. Embeddings are random (seeded). Each figure is the median of
--repeats; `CPU` is this process's time on all its threads, which other users of the machine disturb less.
"""
import argparse
import os
import resource
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import pairs  # noqa: E402


def timed(work):
    """(seconds, CPU seconds, result)"""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def triangle(unit, threads, rows, columns, each=None, share=1.0):
    """Tiles of unit @ unit.T on and above the diagonal, on so many threads; each(tile) where given. `share` of them."""
    n = len(unit)
    tiles = [(a, min(a + rows, n), c, min(c + columns, n)) for a in range(0, n, rows) for c in range(a + 1, n, columns)]
    tiles = tiles[::round(1 / share)]
    buffers = [np.empty(rows * columns, np.float32) for _ in range(threads)]

    def work(worker):
        for a, b, c, d in tiles[worker::threads]:
            products = buffers[worker][:(b - a) * (d - c)].reshape(b - a, d - c)
            np.matmul(unit[a:b], unit[c:d].T, out=products)
            if each:
                each(products)

    with threadpool_limits(1), ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))


def counting_alone(space, ranges, bins, share):
    """CPU seconds for all pairs of numpy.histogram and of the kernel on the same tiles, from a share of them."""
    n, kinds, seconds, pairs_seen = len(space.x), np.array(bins, np.int64), [0.0, 0.0], 0
    order, groups, counts = np.arange(n), np.zeros(n, np.int64), np.zeros((1, 2, sum(bins)), np.int64)
    tiles = [(a, c) for a in range(0, n - pairs.ROWS, pairs.ROWS)
             for c in range(a + pairs.ROWS, n - pairs.COLUMNS, pairs.COLUMNS)][::round(1 / share)]
    with threadpool_limits(1):
        for a, c in tiles:
            products = space.unit[a:a + pairs.ROWS] @ space.unit[c:c + pairs.COLUMNS].T
            begin = time.thread_time()
            for b in bins:
                np.histogram(products, bins=b, range=(-1, 1))
            middle = time.thread_time()
            pairs._knn.pair_histogram(products, a, c, ranges, groups, order, space.x, space.norms, space.bound, kinds,
                                      counts)
            seconds = [seconds[0] + middle - begin, seconds[1] + time.thread_time() - middle]
            pairs_seen += products.size
    return [s * n * (n - 1) / 2 / pairs_seen for s in seconds]


def histogram(arguments, rng):
    n, threads = arguments.n, arguments.threads
    x = rng.standard_normal((n, arguments.dim), dtype=np.float32)
    space, order, groups = pairs.normalise(x), np.arange(n), np.zeros(n, np.int64)
    ranges, bins = np.array([order + 1, np.full(n, n), np.full(n, n)]), [int(b) for b in arguments.bins.split(",")]
    counted, rounds, shapes = pairs.finest(bins), [], ((256, 1024), (512, 2048), (512, 4096), (256, 8192))

    def ours():
        return pairs.count_pairs(space, order, ranges, groups, counted, threads)

    begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for _ in range(arguments.repeats):
        count = timed(ours)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        assert count[2].sum() == n * (n - 1) // 2 * len(counted)
        bare = {s: timed(lambda: triangle(space.unit, threads, *s)) for s in shapes}
        plain = timed(lambda: triangle(space.unit, threads, pairs.ROWS, pairs.COLUMNS, lambda p: np.histogram(
            p, bins=counted[-1], range=(-1, 1)), arguments.share))
        alone = counting_alone(space, ranges, counted, arguments.share)
        shape = min(bare, key=lambda s: bare[s][0])
        cpu_shape = min(bare, key=lambda s: bare[s][1])
        rounds.append((count[0], count[1], bare[shape][0], bare[cpu_shape][1], plain[0] / arguments.share,
                       plain[1] / arguments.share, shape, peak, *alone))
    wall, cpu, bare_wall, bare_cpu, plain_wall, plain_cpu = (statistics.median(r[i] for r in rounds) for i in range(6))
    print(f"all {n * (n - 1) // 2:,} pairs of n = {n:,}, m = {arguments.dim}, {bins} bins, {threads} threads, "
          f"median of {arguments.repeats}, kernel {'built' if pairs._knn else 'not built (NumPy twin)'}")
    print(f"bare float32 products    {bare_wall:8.2f} s  {bare_cpu:8.2f} s CPU   fastest of {len(shapes)} tile shapes, "
          f"{' '.join('×'.join(map(str, r[6])) for r in rounds)}")
    print(f"histograms, exact        {wall:8.2f} s  {cpu:8.2f} s CPU   "
          f"{statistics.median(r[0] / r[2] for r in rounds):.2f} × the products "
          f"({statistics.median(r[1] / r[3] for r in rounds):.2f} × in CPU time)")
    print(f"products, np.histogram   {plain_wall:8.2f} s  {plain_cpu:8.2f} s CPU   "
          f"{statistics.median(r[4] / r[0] for r in rounds):.1f} × ours "
          f"({statistics.median(r[5] / r[1] for r in rounds):.1f} × in CPU time; from {arguments.share:.0%} of the tiles)")
    numpy_alone, kernel_alone = (statistics.median(r[i] for r in rounds) for i in (8, 9))
    print(f"counting alone: numpy.histogram {numpy_alone:.2f} s CPU, the kernel {kernel_alone:.2f} s CPU on the same "
          f"tiles, {statistics.median(r[8] / r[9] for r in rounds):.1f} ×")
    print(f"peak memory              {rounds[0][7]:8.0f} MiB ({begin:.0f} MiB before it, with the embeddings)")


def ranking(arguments, rng):
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    import torch
    torch.set_num_threads(arguments.threads)
    n = arguments.n
    labels = rng.integers(0, arguments.classes, n)
    x = rng.standard_normal((n, arguments.dim), dtype=np.float32)
    x += rng.standard_normal((arguments.classes, arguments.dim), dtype=np.float32)[labels] * 0.5
    unit, relevant = pairs.normalise(x).unit, np.bincount(labels)[labels] - 1
    calculator = AccuracyCalculator(include=("mean_average_precision_at_r", "r_precision", "precision_at_1"),
                                    k="max_bin_count")
    rounds = []
    for _ in range(arguments.repeats):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        ours = timed(lambda: pairs.rank_queries(pairs.normalise(x), labels, relevant, 8, arguments.threads))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
        theirs = timed(lambda: calculator.get_accuracy(torch.from_numpy(unit), torch.from_numpy(labels)))
        peaks = peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
        rounds.append((*ours, *theirs, peaks))
    first, hits, precision = rounds[0][2]
    mine = {"mean_average_precision_at_r": (precision / relevant).mean(), "r_precision": (hits / relevant).mean(),
            "precision_at_1": (first == 1).mean()}
    print(f"{n:,} embeddings, m = {arguments.dim}, {arguments.classes} classes (R up to {relevant.max():,}), "
          f"{arguments.threads} threads, median of {arguments.repeats}")
    for name, at in (("pairs.py", 0), ("AccuracyCalculator", 3)):
        print(f"{name:24} {statistics.median(r[at] for r in rounds):8.2f} s  "
              f"{statistics.median(r[at + 1] for r in rounds):8.2f} s CPU   "
              f"peak memory grew by {rounds[0][6][at > 0]:,.0f} MiB")
    print(f"{statistics.median(r[3] / r[0] for r in rounds):.1f} × ours "
          f"({statistics.median(r[4] / r[1] for r in rounds):.1f} × in CPU time)")
    for name, value in mine.items():
        print(f"{name:28} ours {value:.9f}  theirs {rounds[0][5][name]:.9f}  "
              f"difference {abs(value - rounds[0][5][name]):.1e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("histogram", "ranking"))
    parser.add_argument("--n", type=int, help="pictures (default: 60,000 for histogram, 10,000 for ranking)")
    parser.add_argument("--dim", type=int, default=128, help="dimension (default: 128)")
    parser.add_argument("--classes", type=int, default=6, help="for ranking (default: 6)")
    parser.add_argument("--bins", default="200", help="for histogram, one number or several (default: 200)")
    parser.add_argument("--share", type=float, default=0.05, help="of the tiles for numpy.histogram (default: 0.05)")
    parser.add_argument("--repeats", type=int, default=3, help="default: 3")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    arguments.n = arguments.n or (60_000 if arguments.what == "histogram" else 10_000)
    {"histogram": histogram, "ranking": ranking}[arguments.what](arguments, np.random.default_rng(0))


if __name__ == "__main__":
    main()
