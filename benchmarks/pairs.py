"""How fast is pairs.py? Histograms of all pairs against the bare products over the same triangle and against
numpy.histogram over the same tiles; R-Precision and MAP@R against pytorch-metric-learning. All in one run.

    python benchmarks/pairs.py histogram --n 60000 --dim 128
    python benchmarks/pairs.py ranking --classes 6     # pip install pytorch-metric-learning faiss-cpu

Prints seconds, ratios and peak memory; asserts nothing. Embeddings are random (seeded), figures medians of
--repeats; `CPU` is this process's time on all its threads, which other users of the machine disturb less.
"""
import argparse
import resource
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
    """A share of the tiles of unit @ unit.T on and above the diagonal, on threads; each(tile) where given."""
    n = len(unit)
    tiles = [(a, c) for a in range(0, n, rows) for c in range(a + 1, n, columns)][::round(1 / share)]
    buffers = [np.empty(rows * columns, np.float32) for _ in range(threads)]

    def work(worker):
        for a, c in tiles[worker::threads]:
            b, d = min(a + rows, n), min(c + columns, n)
            products = buffers[worker][:(b - a) * (d - c)].reshape(b - a, d - c)
            np.matmul(unit[a:b], unit[c:d].T, out=products)
            if each:
                each(products)

    with threadpool_limits(1), ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))


def counting_alone(space, ranges, bins, share):
    """CPU seconds of numpy.histogram and of the kernel on one share of the tiles, scaled to all."""
    n, kinds, seconds, counted = len(space.x), np.array(bins, np.int64), np.zeros(2), 0
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
            pairs._knn.pair_histogram(products, a, c, ranges, groups, order, *space.source(), space.norms,
                                      space.bound, kinds, counts)
            seconds += middle - begin, time.thread_time() - middle
            counted += products.size
    return seconds * n * (n - 1) / 2 / counted


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def histogram(args, rng):
    n, threads, shapes = args.n, args.threads, ((256, 1024), (512, 2048), (512, 4096), (256, 8192))
    space = pairs.normalise(rng.standard_normal((n, args.dim), dtype=np.float32))
    order, groups, bins = np.arange(n), np.zeros(n, np.int64), [int(b) for b in args.bins.split(",")]
    ranges, counted = np.array([order + 1, np.full(n, n), np.full(n, n)]), bins
    begin, rounds = peak_mib(), []
    for _ in range(args.repeats):
        *ours, counts = timed(lambda: pairs.count_pairs(space, order, ranges, groups, counted, threads))
        peak = peak_mib()
        assert counts.sum() == n * (n - 1) // 2 * len(counted)
        bare = {shape: timed(lambda s=shape: triangle(space.unit, threads, *s)) for shape in shapes}
        plain = timed(lambda: triangle(
            space.unit, threads, pairs.ROWS, pairs.COLUMNS,
            lambda p: np.histogram(p, bins=counted[-1], range=(-1, 1)), args.share))
        best = min(bare, key=lambda shape: bare[shape][0])
        rounds.append([*ours, bare[best][0], min(b[1] for b in bare.values()), plain[0] / args.share,
                       plain[1] / args.share, *counting_alone(space, ranges, counted, args.share)])
    wall, cpu, bare_wall, bare_cpu, plain_wall, plain_cpu, numpy_alone, kernel_alone = np.median(rounds, 0)
    print(f"all {n * (n - 1) // 2:,} pairs of n = {n:,}, m = {args.dim}, {bins} bins, {threads} threads, "
          f"median of {args.repeats}, kernel {pairs._knn.ISA if pairs._knn else 'not built (NumPy twin)'}")
    print(f"bare float32 products    {bare_wall:8.2f} s  {bare_cpu:8.2f} s CPU   fastest tile shape {best}")
    print(f"histograms, exact        {wall:8.2f} s  {cpu:8.2f} s CPU   {wall / bare_wall:.2f} × the products "
          f"({cpu / bare_cpu:.2f} × in CPU time)")
    print(f"products, np.histogram   {plain_wall:8.2f} s  {plain_cpu:8.2f} s CPU   {plain_wall / wall:.1f} × "
          f"ours ({plain_cpu / cpu:.1f} × in CPU time; from {args.share:.0%} of the tiles)")
    print(f"counting alone: numpy.histogram {numpy_alone:.2f} s CPU, the kernel {kernel_alone:.2f} s CPU on "
          f"the same tiles, {numpy_alone / kernel_alone:.1f} ×")
    print(f"peak memory              {peak:8.0f} MiB ({begin:.0f} MiB before it, with the embeddings)")


def ranking(args, rng):
    import torch
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    torch.set_num_threads(args.threads)
    labels = rng.integers(0, args.classes, args.n)
    x = rng.standard_normal((args.n, args.dim), dtype=np.float32)
    x += rng.standard_normal((args.classes, args.dim), dtype=np.float32)[labels] * 0.5
    space, relevant = pairs.normalise(x), np.bincount(labels)[labels] - 1
    names = ("mean_average_precision_at_r", "r_precision", "precision_at_1")
    calculator, rounds = AccuracyCalculator(include=names, k="max_bin_count"), []
    for _ in range(args.repeats):
        before = peak_mib()
        *ours, _ = timed(lambda: pairs.rank_queries(
            pairs.normalise(x), labels, relevant, 8, args.threads))
        peak = peak_mib()
        *theirs, scores = timed(lambda: calculator.get_accuracy(
            torch.from_numpy(space.unit), torch.from_numpy(labels)))
        rounds.append([*ours, peak - before, *theirs, peak_mib() - before])
    medians = np.median(rounds, axis=0)
    print(f"{args.n:,} embeddings, m = {args.dim}, {args.classes} classes (R up to {relevant.max():,}), "
          f"{args.threads} threads, median of {args.repeats}")
    for name, (wall, cpu, _), grown in (("pairs.py", medians[:3], rounds[0][2]),
                                        ("AccuracyCalculator", medians[3:], rounds[0][5])):
        print(f"{name:24} {wall:8.2f} s  {cpu:8.2f} s CPU   peak memory grew by {grown:,.0f} MiB")
    print(f"{medians[3] / medians[0]:.1f} × ours ({medians[4] / medians[1]:.1f} × in CPU time)")
    score = pairs.pair_scores(x, labels, recall=(1,), permutations=0)
    for name, value in zip(names, (score.map_at_r, score.r_precision, score.recall[1])):
        print(f"{name:28} ours {value:.9f}  theirs {scores[name]:.9f}  "
              f"difference {abs(value - scores[name]):.1e}")


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("what", choices=("histogram", "ranking"))
    parser.add_argument("--n", type=int, default=10_000, help="pictures (default: 10,000)")
    parser.add_argument("--dim", type=int, default=128, help="dimension (default: 128)")
    parser.add_argument("--classes", type=int, default=6, help="for ranking (default: 6)")
    parser.add_argument("--bins", default="200", help="for histogram, one or several (default: 200)")
    parser.add_argument("--share", type=float, default=0.05, help="of tiles for numpy.histogram (0.05)")
    parser.add_argument("--repeats", type=int, default=3, help="default: 3")
    parser.add_argument("--threads", type=int, default=pairs.available_threads())
    args = parser.parse_args()
    if args.what == "histogram":
        histogram(args, np.random.default_rng(0))
    else:
        ranking(args, np.random.default_rng(0))


if __name__ == "__main__":
    main()
