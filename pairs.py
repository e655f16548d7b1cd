"""How far apart are same-class and different-class pairs of an embedding? Histograms of all inner products, their
Jensen-Shannon divergence (JSD), Recall@K, R-Precision and MAP@R, exact at any size (Oi et al., 2022).

    python pairs.py examples/cars/emb.npy examples/cars/props.csv --label model
    python pairs.py a/emb.npy b/emb.npy labels.csv --out pairs.csv --histograms hist.csv --figure fig1.png
    python pairs.py emb.npy labels.csv --bins 50,100,200,400                 # what the paper does not state
    python pairs.py results/cars/*/fold*/emb.npy --label model               # each with the table beside it
    python pairs.py test.npy test.csv --train train.npy train.csv            # Fig. 2 and 4: are they alike?
    python pairs.py emb.npy labels.csv --classes 5,10,20,50 --class-figure classes.png --intervals intervals.csv

Reads: embeddings as .npy, (n, m); labels as .csv with a header and n rows in the same order.
Writes: a table on stdout; with --out one CSV row for each embedding file and number of bins; figures as PNG
(figures.py draws them: copy it too).
In Python: pair_scores(embeddings, labels): arrays in, and only numpy, scipy and threadpoolctl are needed (with the
extension _knn: fast; without: the same numbers, slowly).
"""
if __name__ == "__main__":  # Ctrl-C ends in one line from here on
    import sys

    try:
        from dml_common import command
    except ModuleNotFoundError:
        print("pairs.py: the command needs the folder dml_common/ beside it; copy that too", file=sys.stderr)
        sys.exit(2)
    command.begin()

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit
from threadpoolctl import threadpool_limits

try:
    import _knn
except ImportError:
    _knn = None  # the NumPy twins count_pairs_numpy() and rank_queries_numpy() count instead

ROWS, COLUMNS = 512, 2048  # of a tile of products: 4 MiB, which the caches keep until it is counted
RANKED_BYTES = 1 << 25     # of a thread's block of whole rows, for the rankings
SIDE_BY_SIDE = 4           # embeddings on the terminal; more are printed one in a row
MOST_BINS = 32_000         # a 16-bit key has to hold them
LEVEL = 0.95               # of the intervals
BOOTSTRAP = 1000           # resamples of the classes


# ---------------------------------------------------------------- all pairs into histograms

class Space(NamedTuple):
    """Embeddings prepared for inner products of normalised rows."""
    x: np.ndarray      # (n, m) float32, the embeddings as they came
    unit: np.ndarray   # (n, m) float32, normalised
    norms: np.ndarray  # (n,) float64
    bound: float       # |float32 product of two unit rows − true inner product| is at most this


def normalise(x):
    """Embeddings x (n, m) float32 -> Space. Raises ValueError for a zero vector."""
    n, m = x.shape
    unit, norms, step = np.empty((n, m), np.float32), np.empty(n), max(1, (1 << 20) // m)
    for start in range(0, n, step):
        part = x[start:start + step].astype(np.float64)
        norms[start:start + step] = np.sqrt((part ** 2).sum(1))
        if not norms[start:start + step].all():
            row = start + int((norms[start:start + step] == 0).argmax())
            raise ValueError(f"row {row} is a zero vector: it has no inner product with others; remove that picture")
        unit[start:start + step] = part / norms[start:start + step, None]
    # Rounding of the unit rows and of m float32 terms in any order; 5 % for second-order terms, and what underflows.
    return Space(x, unit, norms, 1.05 * 2.0 ** -24 * (m + 8) + (m + 4) * 2.0 ** -125)


def bin_numbers(s, bins):
    """The definition that all histograms equal: equal bins over [−1, 1], 1 in the last. s: any float64 array."""
    return np.clip(np.floor((s + 1.0) * (0.5 * bins)), 0, bins - 1).astype(np.int64)


def count_pairs_numpy(space, order, ranges, groups, bins):
    """The plain twin of the kernel: the same counts by float64 inner products, row by row."""
    counts = np.zeros((groups[-1] + 1, 2, sum(bins)), np.int64)
    unit = space.x[order] / space.norms[order, None]
    for p, (begin, split, end) in enumerate(ranges.T):
        s, at = (unit[p] * unit[begin:end]).sum(1), 0
        for b in bins:
            for side, part in enumerate((s[:max(0, split - begin)], s[max(0, split - begin):])):
                counts[groups[p], side, at:at + b] += np.bincount(bin_numbers(part, b), minlength=b)
            at += b
    return counts


def in_turn(work, jobs, threads):
    """Yield work(*job) in the order of the jobs, from so many threads with one BLAS thread each."""
    with threadpool_limits(1), ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(work, *job))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()                           # Ctrl-C: what has begun ends, nothing else begins


def count_pairs(space, order, ranges, groups, bins, threads, progress=None):
    """Histograms of inner products of the row at position p with those at begin <= q < split and split <= q < end.

    order (n,): position p holds row order[p]; ranges (3, n): begin, split, end; groups (n,) ascending from 0.
    Returns counts (groups, 2, Σ bins) int64. Tile by tile; each thread multiplies and counts its own.
    """
    if _knn is None:
        return count_pairs_numpy(space, order, ranges, groups, bins)
    n, unit, kinds = len(order), space.unit[order], np.array(bins, np.int64)
    counts = np.zeros((groups[-1] + 1, 2, sum(bins)), np.int64)
    buffers = deque(np.empty(ROWS * COLUMNS, np.float32) for _ in range(threads))

    def tiles():
        for a in range(0, n, ROWS):
            b = min(a + ROWS, n)
            last = int(ranges[2, a:b].max())
            for c in range(int(ranges[0, a:b].min()), last, COLUMNS):
                yield a, b, c, min(c + COLUMNS, last)

    def count(a, b, c, d):
        buffer = buffers.pop()
        products = buffer[:(b - a) * (d - c)].reshape(b - a, d - c)
        np.matmul(unit[a:b], unit[c:d].T, out=products)
        tile = np.zeros((groups[b - 1] - groups[a] + 1, 2, sum(bins)), np.int64)
        _knn.pair_histogram(products, a, c, ranges, groups, order, space.x, space.norms, space.bound, kinds, tile)
        buffers.append(buffer)
        return a, b, tile, products.size

    for a, b, tile, size in in_turn(count, tiles(), threads):
        counts[groups[a]:groups[b - 1] + 1] += tile       # integers: no order of tiles can change the sums
        if progress:
            progress(size)
    return counts


def split_bins(counts, counted, bins):
    """counts (…, Σ counted) -> {bins: (…, bins)}; halves, quarters … of a counted number are sums of neighbours."""
    parts = dict(zip(counted, np.split(counts, np.cumsum(counted)[:-1], axis=-1)))
    source = {b: next(c for c in counted if c % b == 0 and (c // b).bit_count() == 1) for b in bins}
    return {b: parts[c].reshape(*counts.shape[:-1], b, c // b).sum(-1) for b, c in source.items()}


def finest(bins):
    """The numbers of bins that have to be counted: those whose double, fourfold … is not asked for as well.

    (s + 1) · bins / 2 is the same float64 but for its exponent when bins doubles, so the sums are exact.
    """
    return sorted({b for b in bins if not any(c > b and c % b == 0 and (c // b).bit_count() == 1 for c in bins)})


def jensen_shannon(p, q):
    """JSD (Eq. 5) with base-2 logarithms, in [0, 1], of histograms (…, bins) normalised by their areas."""
    with np.errstate(divide="ignore", invalid="ignore"):
        p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
        middle = (p + q) / 2
        terms = np.where(p > 0, p * np.log2(p / middle), 0.0) + np.where(q > 0, q * np.log2(q / middle), 0.0)
    empty = np.isnan(p).any(-1) | np.isnan(q).any(-1)     # no pair at all
    return np.where(empty, np.nan, np.clip(terms.sum(-1) / 2, 0.0, 1.0))


def pair_means(space, order, value, sizes):
    """Mean inner products of positive and negative pairs: Σ_{i<j} u_i·u_j = (‖Σ u‖² − Σ ‖u‖²) / 2."""
    (n, m), step = space.x.shape, max(1, (1 << 20) // space.x.shape[1])
    sums, squares = np.zeros((len(sizes), m)), 0.0
    for start in range(0, n, step):
        rows = order[start:start + step]
        unit, here = space.x[rows] / space.norms[rows, None], value[rows]
        first = np.flatnonzero(np.append(True, here[1:] != here[:-1]))
        sums[here[first]] += np.add.reduceat(unit, first, axis=0)
        squares += (unit ** 2).sum()
    within, all_pairs = (sums ** 2).sum(), (sums.sum(0) ** 2).sum()
    positives = (sizes * (sizes - 1) // 2).sum()
    negatives = n * (n - 1) // 2 - positives
    return float((within - squares) / 2 / positives), float((all_pairs - within) / 2 / negatives)


# ---------------------------------------------------------------- rankings

def rank_queries_numpy(space, value, queries, relevant, neighbours):
    """The plain twin of the kernel: float64 cosine distances, a stable sort, and the definitions."""
    first, hits, precision = np.zeros(len(queries), np.int64), np.zeros(len(queries), np.int64), np.zeros(len(queries))
    unit = space.x / space.norms[:, None]
    for b, (q, r) in enumerate(zip(queries, relevant)):
        order = np.argsort(1.0 - (unit[q] * unit).sum(1), kind="stable")
        right = value[order[order != q][:max(r, neighbours)]] == value[q]
        if r and right.any():
            first[b] = right.argmax() + 1
        right = right[:r]
        hits[b] = right.sum()
        ranks = np.flatnonzero(right) + 1
        precision[b] = np.cumsum(np.arange(1, len(ranks) + 1) / ranks)[-1] if len(ranks) else 0.0
    return first, hits, precision


def rank_queries(space, value, relevant, neighbours, threads, progress=None):
    """For each row: rank of its nearest positive (0: not seen), hits among its R nearest, Σ Precision@k · p(k).

    value (n,) int: classes; relevant (n,): R. Neighbours by cosine distance, equal ones by smaller index; exact.
    """
    n = len(value)
    rows = max(1, min(256, RANKED_BYTES // (4 * n), -(-n // threads)))
    first, hits, precision = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n)
    value, offset, bounds = value.astype(np.int32), np.zeros(n, np.float32), np.full(n, space.bound)

    def rank(start):
        q = np.arange(start, min(start + rows, n))
        part = slice(start, start + len(q))
        if _knn is None:
            first[part], hits[part], precision[part] = rank_queries_numpy(space, value, q, relevant[part], neighbours)
        elif relevant[part].any():
            products = np.matmul(space.unit[part], space.unit.T)
            _knn.rank_hits(products, q, bounds[part], space.x, space.norms, offset, value, relevant[part], neighbours,
                           first[part], hits[part], precision[part])
        else:
            first[part] = hits[part] = precision[part] = 0
        return len(q) * n

    for size in in_turn(rank, ((start,) for start in range(0, n, rows)), threads):
        if progress:
            progress(size)
    return first, hits, precision


# ---------------------------------------------------------------- one embedding's scores

class Score(NamedTuple):
    """One embedding's result. Dictionaries are by the number of bins, and by K."""
    n: int
    classes: int
    lone: int             # pictures whose class has no other: no positives, and no queries
    positive_pairs: int
    negative_pairs: int
    positive_mean: float
    negative_mean: float
    jsd: dict
    jsd_null: dict        # mean over labels permuted; nan without permutations
    recall: dict
    r_precision: float
    map_at_r: float
    histograms: dict      # {bins: (positive counts, negative counts)}
    intervals: dict       # {("jsd", bins), ("recall", K), ("r_precision", None), ("map_at_r", None): (low, high)}


def available_threads():
    """The cores that this process may use (a scheduler may grant fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pair_scores(embeddings, labels, *, bins=(200,), recall=(1, 2, 4, 8), permutations=10, intervals=False, seed=0,
                threads=None, progress=None):
    """Pair histograms and their JSD (Oi et al., section 3), Recall@K, R-Precision and MAP@R.

    embeddings    (n, m) real numbers, used as float32; finite, no zero vector
    labels        (n,) of any comparable kind: at least two classes, one of them with two rows
    bins          numbers of equal bins over [−1, 1]
    recall        the K's
    permutations  of the labels for jsd_null: JSD of few positives is biased up, and this shows by how much
    intervals     also 95 % intervals: bootstrap over classes (means over queries), jackknife over classes (JSD)
    seed          of the permutations and the bootstrap; threads: all that this process may use
    progress      called with (done, total) after each block

    Returns a Score. Exact: equal to float64 brute force with ties by index, whatever the threads, blocks and BLAS.
    Raises ValueError for shapes that do not fit, numbers that are not finite and options out of range.
    """
    x, labels = check_arguments(embeddings, labels, bins, recall, permutations, seed, threads)
    n, threads, counted = len(x), threads or available_threads(), finest(bins)
    value, sizes = np.unique(labels, return_inverse=True, return_counts=True)[1:]
    value, relevant = value.reshape(-1), sizes[value.reshape(-1)] - 1          # R of each row
    positives = int((sizes * (sizes - 1) // 2).sum())
    if not positives:
        raise ValueError(f"the {n:,} labels are all distinct: there is no positive pair; choose a coarser label")
    if len(sizes) < 2:
        raise ValueError("there is one class only: no negative pair; choose a label with at least two values")
    done, total = 0.0, n * n * (2.0 if intervals else 1.5) + permutations * positives

    def advance(part):
        nonlocal done
        done = min(total, done + part)
        if progress:
            progress(done, total)

    space, order = normalise(x), np.argsort(value, kind="stable")
    counts = count_classes(space, order, sizes, counted, intervals, threads, advance)
    histograms = split_bins(counts[0], counted, bins)
    jsd = {b: float(jensen_shannon(*histograms[b])) for b in bins}
    null = permuted_divergence(space, sizes, counted, histograms, permutations, seed, threads, advance)

    first, hits, precision = rank_queries(space, value, relevant, max(recall), threads, advance)
    asked = relevant > 0
    each = {("recall", k): (first > 0) & (first <= k) for k in recall}
    each["r_precision", None] = hits / np.maximum(relevant, 1)
    each["map_at_r", None] = precision / np.maximum(relevant, 1)   # MAP@R = (1/R) Σ_{k=1..R} Precision@k · p(k)
    means = {name: float(e[asked].mean()) for name, e in each.items()}
    bounds = bootstrap(each, value, asked, seed) if intervals else {}
    if intervals:
        parts = split_bins(counts[1:], counted, bins)
        bounds |= {("jsd", b): jackknife(jsd[b], histograms[b], parts[b]) for b in bins}
    return Score(n, len(sizes), int((~asked).sum()), positives, n * (n - 1) // 2 - positives,
                 *pair_means(space, order, value, sizes), jsd, null, {k: means["recall", k] for k in recall},
                 means["r_precision", None], means["map_at_r", None], histograms, bounds)


