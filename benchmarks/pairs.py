"""How fast is pairs.py? Histograms of all pairs against the bare products over the same triangle and against
numpy.histogram over the same tiles; R-Precision and MAP@R against pytorch-metric-learning and the products
of all with all. All in one run.

    python benchmarks/pairs.py histogram --n 60000 --dim 128
    python benchmarks/pairs.py ranking --classes 6     # pip install pytorch-metric-learning faiss-cpu

Embeddings are random (seeded), figures medians of --repeats. Asserts nothing.
"""
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from measure import command, cpu_alone, measured, print_header, print_table, typical
from threadpoolctl import threadpool_limits

import pairs


def triangle(unit, threads, rows, columns, each=None, share=1.0, whole=False):
    """A share of the tiles of unit @ unit.T on and above the diagonal, or of the whole, on threads."""
    n = len(unit)
    tiles = [(a, c) for a in range(0, n, rows) for c in range(0 if whole else a + 1, n, columns)]
    tiles = tiles[::round(1 / share)]
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


def histogram(args, rng):
    n, threads, shapes = args.n, args.threads, ((256, 1024), (512, 2048), (512, 4096), (256, 8192))
    space = pairs.normalise(rng.standard_normal((n, args.dim), dtype=np.float32))
    order, groups, bins = np.arange(n), np.zeros(n, np.int64), [int(b) for b in args.bins.split(",")]
    ranges, rounds = np.array([order + 1, np.full(n, n), np.full(n, n)]), []
    for _ in range(args.repeats):
        ours, counts = measured(lambda: pairs.count_pairs(space, order, ranges, groups, bins, threads))
        assert counts.sum() == n * (n - 1) // 2 * len(bins)
        floor = min(measured(lambda s=shape: triangle(space.unit, threads, *s))[0] for shape in shapes)
        plain, _ = measured(lambda: triangle(
            space.unit, threads, 512, 2048,
            lambda p: np.histogram(p, bins=bins[-1], range=(-1, 1)), args.share))
        rounds.append([ours, floor, plain.each(args.share)])
    ours, floor, plain = map(typical, zip(*rounds))
    return [(f"{n * (n - 1) // 2:,} pairs of {n:,} × {args.dim}, {args.bins} bins", {
        "ours": ours, "straightforward": plain, "floor": floor})]


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
        ours, _ = measured(lambda: pairs.rank_queries(
            pairs.normalise(x), labels, relevant, 8, args.threads))
        theirs, scores = measured(lambda: calculator.get_accuracy(
            torch.from_numpy(space.unit), torch.from_numpy(labels)))
        floor = min(measured(lambda r=rows: triangle(space.unit, args.threads, r, args.n, whole=True))[0]
                    for rows in (128, 256, 512))
        rounds.append([ours, theirs, floor])
    ours, plain, floor = map(typical, zip(*rounds))
    score = pairs.pair_scores(x, labels, recall=(1,), permutations=0)
    values = score.map_at_r, score.r_precision, score.recall[1]
    largest = max(abs(value - scores[name]) for name, value in zip(names, values))
    return [(f"rankings of {args.n:,} × {args.dim}, {args.classes} classes (R up to {relevant.max():,})", {
        "ours": ours, "straightforward": plain, "floor": floor, "their MiB": f"{plain.peak:,.0f}",
        "difference": f"{largest:.1e}"})]


def main():
    parser = command.parser(__doc__)
    parser.add_argument("what", choices=("histogram", "ranking"))
    parser.add_argument("--n", type=int, default=10_000, help="pictures (default: 10,000)")
    parser.add_argument("--dim", type=int, default=128, help="dimension (default: 128)")
    parser.add_argument("--classes", type=int, default=6, help="for ranking (default: 6)")
    parser.add_argument("--bins", default="200", help="for histogram, one or several (default: 200)")
    parser.add_argument("--share", type=float, default=0.05, help="of tiles for numpy.histogram (0.05)")
    parser.add_argument("--repeats", type=int, default=3, help="default: 3")
    parser.add_argument("--threads", type=int, default=pairs.available_threads())
    cpu_alone(parser)
    args = parser.parse_args()
    print_header(None, f"{args.threads} threads",
                 f"kernel {pairs._knn.ISA if pairs._knn else 'not built (NumPy twin)'}")
    print_table((histogram if args.what == "histogram" else ranking)(args, np.random.default_rng(0)))


if __name__ == "__main__":
    command.run(main, stopped="stopped")
