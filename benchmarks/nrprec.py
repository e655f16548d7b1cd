"""How fast is nrprec.py? Its whole NR-Prec against its floor, the bare float32 products, in one run.

    python benchmarks/nrprec.py --n 100000 --dim 128
    python benchmarks/nrprec.py --n 1000000 --dim 256 --queries 500 --mapped   # memory: n · m · 4 B + 1 GiB
    python benchmarks/nrprec.py --n 10000 --plain               # and against what one would write
    python benchmarks/nrprec.py --properties 1 20 --permutations 1000

Embeddings are random (seeded), labels have Table 5's cardinalities. The floor is the best of several block
shapes and ways of threading. Permutations are extrapolated from 276 orders, which is one pass, of
2,048 and 6,144 queries. Asserts nothing.
"""
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from measure import command, cpu_alone, measured, print_header, print_table
from threadpoolctl import threadpool_limits

import nrprec

TABLE_5 = {"model": 6, "rotation_z": 8, "color_hue": 10, "color_sat": 9, "color_val": 9, "bg_color_hue": 10,
           "bg_color_sat": 9, "bg_color_val": 9, "camera_loc_z": 4, "sun_elevation": 3, "sun_rotation": 8}


def bare_products(x, queries, threads, rows, workers, seconds=4.0):
    """The cost of `queries` rows of x @ x.T in float32, block by block.

    Extrapolated from a few seconds: workers multiply side by side, with threads // workers of BLAS each.
    """
    n = len(x)
    transposed = np.ascontiguousarray(x.T)
    buffers = [np.empty((rows, n), np.float32) for _ in range(workers)]
    done, stop = [0] * workers, time.perf_counter() + seconds

    def work(worker):
        while time.perf_counter() < stop:
            start = (worker + done[worker] * workers) * rows % max(1, n - rows)
            np.matmul(x[start:start + rows], transposed, out=buffers[worker][:len(x[start:start + rows])])
            done[worker] += 1

    with threadpool_limits(threads // workers), ThreadPoolExecutor(workers) as pool:
        cost, _ = measured(lambda: list(pool.map(work, range(workers))))
    return cost.each(sum(done) * rows / queries)


def best_products(x, queries, threads):
    """(Cost, description) of the fastest block shape."""
    tried = []
    for workers in sorted({1, threads}):
        for rows in (64, 128, 256, 512):
            rows = min(rows, len(x), max(1, (1 << 29) // (4 * len(x) * workers)))
            tried.append((bare_products(x, queries, threads, rows, workers), f"{workers} × {rows} rows"))
    return min(tried)


def plain(x, labels, queries):
    """What one would write: argpartition over the same blocks, one property at a time, in NumPy (float32)."""
    n, squared, result = len(x), (x ** 2).sum(1), {}
    for name, label in labels.items():
        count = np.bincount(label)
        total = 0.0
        for start in range(0, queries, 256):
            q = np.arange(start, min(start + 256, queries))
            d = squared - 2 * x[q] @ x.T
            d[np.arange(len(q)), q] = np.inf
            for i, row in zip(q, d):
                r = count[label[i]] - 1
                p = count[label[i]] / n
                hits = (label[np.argpartition(row, r - 1)[:r]] == label[i]).sum()
                total += (hits - r * p) / np.sqrt(r * p * (1 - p))
        result[name] = total / queries
    return result


def permutation_cost(ours, queries, permutations, orders=276):
    """The cost of all queries in 1 + permutations orders, extrapolated: two numbers of queries tell what all
    share, such as the permuting, from what each costs."""
    orders, few = min(orders, 1 + permutations), min(2048, queries)
    more = min(3 * few, queries)
    one, two = (ours(queries=q, permutations=orders - 1)[0] for q in (few, more))
    steps = (queries - few) / max(1, more - few)
    whole = [a + (b - a) * steps for a, b in zip(one[:2], two[:2])]
    return one._replace(wall=whole[0], processor=whole[1]).each(orders / (1 + permutations))


def mapped(n, m, rng):
    """Random embeddings (n, m) as float16 in a file, memory-mapped; the file goes with the process."""
    with tempfile.NamedTemporaryFile(suffix=".npy") as file:
        x = np.lib.format.open_memmap(file.name, "w+", np.float16, (n, m))
        for start in range(0, n, 10_000):
            x[start:start + 10_000] = rng.standard_normal((len(x[start:start + 10_000]), m), dtype=np.float32)
        x.flush()
        return np.load(file.name, mmap_mode="r")


def main():
    parser = command.parser(__doc__)
    parser.add_argument("--n", type=int, default=100_000, help="pictures (default: 100,000)")
    parser.add_argument("--dim", type=int, default=128, help="dimension (default: 128)")
    parser.add_argument("--queries", type=int, help="subset of queries (default: all)")
    parser.add_argument("--properties", type=int, nargs="+", default=[11], metavar="K",
                        help="Table 5's, repeated; a row for each number (default: 11)")
    parser.add_argument("--permutations", type=int, metavar="N", help="a row more, of so many")
    parser.add_argument("--threads", type=int, default=nrprec.available_threads())
    parser.add_argument("--memory-mib", type=int, default=512)
    parser.add_argument("--mapped", action="store_true", help="embeddings are float16 in a file")
    parser.add_argument("--plain", action="store_true", help="also time the argpartition version")
    cpu_alone(parser)
    arguments = parser.parse_args()

    rng = np.random.default_rng(0)
    if arguments.mapped:
        x = mapped(arguments.n, arguments.dim, rng)
    else:
        x = rng.standard_normal((arguments.n, arguments.dim), dtype=np.float32)
    cards = list(TABLE_5.items())
    labels = {f"{cards[i % 11][0]}_{i // 11}": rng.integers(0, cards[i % 11][1], arguments.n).astype(np.int32)
              for i in range(max(arguments.properties))}
    queries = min(arguments.queries or arguments.n, arguments.n)

    print_header(None, f"{arguments.threads} threads",
                 f"kernel {nrprec._knn.ISA if nrprec._knn else 'not built (NumPy twin)'}")

    def ours(names, **options):
        return measured(lambda: nrprec.nr_precision(
            x, {name: labels[name] for name in names}, threads=arguments.threads,
            memory_mib=arguments.memory_mib, **options))

    each = {k: ours([*labels][:k], queries=arguments.queries) for k in arguments.properties}
    permuted = arguments.permutations and permutation_cost(
        partial(ours, [*labels][:11]), queries, arguments.permutations)
    x = x.astype(np.float32, copy=False)
    floor, shape = best_products(x, queries, arguments.threads)
    rate = 2 * arguments.n * queries * arguments.dim / floor.wall / 1e9
    rows, size = [], f"{arguments.n:,} × {arguments.dim}, {queries:,} queries"
    for k, (cost, scores) in each.items():
        cells = {"ours": cost, "floor": floor, "floor's block": shape, "GFLOP/s": f"{rate:,.0f}"}
        if arguments.plain:
            with threadpool_limits(arguments.threads):
                cells["straightforward"], reference = measured(
                    partial(plain, x, {name: labels[name] for name in scores}, queries))
            largest = max(abs(reference[name] - scores[name].nr_precision) for name in scores)
            cells["difference"] = f"{largest:.1e}"  # float32 ties
        rows.append((f"{size}, {k} properties", cells))
    if permuted:
        rows.append((f"{size}, {min(11, len(labels))} properties, {arguments.permutations:,} permutations",
                     {"ours": permuted}))
    print_table(rows)


if __name__ == "__main__":
    command.run(main, stopped="stopped")
