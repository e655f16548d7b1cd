"""Which image properties does an embedding cluster by? R-Precision and Normalized R-Precision (NR-Prec) of
every property, exact at any size (Kobs et al., ICCV 2021, section 4).

    python nrprec.py examples/cars/emb.npy examples/cars/props.csv
    python nrprec.py a/emb.npy b/emb.npy props.csv --out nrprec.csv       # side by side, and as rows
    python nrprec.py emb.npy props.csv --null hypergeometric --permutations 2000
    python nrprec.py emb.npy props.csv --queries 2000                     # a sample, with standard errors
    python nrprec.py results/cars/*/fold*/emb.npy --out nrprec.csv        # each with the props.csv beside it

Reads: embeddings as .npy, (n, m); properties as .csv with a header and n rows in the same order.
Writes: a table on stdout and, with --out, one CSV row for each embedding file and property.
In Python: nr_precision(embeddings, labels), nearest(embeddings, R): arrays in, and only numpy, scipy and
threadpoolctl are needed (with the extension _knn: fast; without: the same numbers, slowly).
"""
if __name__ == "__main__":  # Ctrl-C ends in one line from here on
    import sys

    try:
        from dml_common import command
    except ImportError:
        print("nrprec.py: the command needs the folder dml_common/ beside it; copy that too", file=sys.stderr)
        sys.exit(2)
    command.begin()

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import gammaincc
from threadpoolctl import ThreadpoolController

try:
    import _knn
except ImportError:
    _knn = None
if getattr(_knn, "INTERFACE", None) != 2:  # not built, or from another _knn.pyx
    _knn = None  # the NumPy twin count_hits_numpy() counts instead

DISTANCES = ("euclidean", "squared_euclidean", "cosine", "dot_product", "snr")
NULLS = ("binomial", "hypergeometric")
TIES = {"expected": "they count with their expectation", "index": "the order of the rows decides"}
MANY_TIES = 0.01             # of the queries: then it is said
PUBLISHED_THRESHOLD = 2.576  # two-sided 1 % of one z-score; the paper marks the mean of n of them by it
SIGNIFICANCE = 0.01          # of the Holm-corrected permutation p-value
BLOCK_WORK = 4e9             # comparisons in a block at most, a fraction of a second: progress, Ctrl-C
BLOCK_ROWS = 512             # queries in one matrix product: more does not speed it up (benchmarks/nrprec.py)
MOST_PAIRED = 500            # properties that are tested in pairs: some seconds
SIDE_BY_SIDE = 4             # embeddings on the terminal; more are printed one in a row
SHOWN = (("R-Prec", "r_precision", 4), ("NR-Prec", "nr_precision", 2), ("± s.e.", "nr_precision_se", 2),
         ("p_holm", "p_holm", 4))
HEADER = ("embeddings,property,values,queries,skipped,distance,null,max_neighbours,r_precision,nr_precision,"
          "nr_precision_se,permutations,p_value,p_holm,normalised,ties,tied").split(",")
WALK = 48                    # a class of fewer than n / WALK pictures is walked, larger ones compared densely


# ---------------------------------------------------------------- the five distances, ready for the kernel

class Space(NamedTuple):
    """Embeddings ready for one distance: the similarity is working[:, q] · working[:, i] + offset[i]."""
    x: np.ndarray        # (n, m) float32, the embeddings as they came
    working: np.ndarray  # (m, n) float32: centred, normalised or scaled by a power of two; norms <= 1
    offset: np.ndarray   # (n,) float32
    bounds: np.ndarray   # (n,) float64: |float32 − true similarity| of query q is at most bounds[q]
    aux: np.ndarray      # (n,) float64: norms (cosine), variances (snr), else zeros
    distance: str


def prepare(x, distance):
    """Embeddings x (n, m) float32 -> Space. A distance is an inner product plus an offset of the candidate:

    squared Euclidean / 2 = (‖a‖² / 2) − (a·b − ‖b‖² / 2), on vectors with their mean subtracted (float32
    cancellation); cosine on normalised ones; SNR, var(a − b) / var(a), ranks like the Euclidean distance of
    vectors centred over their own components.
    """
    n, m = x.shape
    working, aux, norms = np.empty((m, n), np.float32), np.zeros(n), np.empty(n)
    centre = x.mean(0, dtype=np.float64) if distance in ("euclidean", "squared_euclidean") else 0.0
    step = max(1, (1 << 20) // m)
    parts = [slice(start, start + step) for start in range(0, n, step)]

    def vectors(part):
        rows = x[part].astype(np.float64)
        if distance == "cosine":
            aux[part] = np.sqrt((rows ** 2).sum(1))
            return rows / aux[part, None]
        if distance == "snr":
            aux[part] = rows.var(1)
            return rows - rows.mean(1, keepdims=True)
        return rows - centre

    for part in parts:
        norms[part] = np.sqrt((vectors(part) ** 2).sum(1))
    # A power of two changes no digit, and squares neither overflow nor vanish.
    exponent = -int(np.frexp(norms.max())[1]) if norms.max() > 0 else 0
    for part in parts:
        rows = np.ldexp(vectors(part), exponent).astype(np.float32)
        working[:, part] = rows.T
        norms[part] = np.sqrt((rows.astype(np.float64) ** 2).sum(1))
    plain = distance in ("cosine", "dot_product")
    offset = np.zeros(n, np.float32) if plain else (-norms ** 2 / 2).astype(np.float32)
    # Rounding of a float32 product of m terms in any order, of the working rows, the offset and the sum; 5 %
    # for second-order terms and the float64 side, the last term for what underflows.
    u, largest = 2.0 ** -24, norms.max()
    bounds = 1.05 * u * ((m + 8) * norms * largest + 4 * largest ** 2) + (m + 4) * 2.0 ** -125
    return Space(x, working, offset, bounds, aux, distance)


def distances64(x, q, distance, aux):
    """Float64 distances of all rows of x (n, m) from row q: the definition that counts equal to the bit."""
    a, b = x[q].astype(np.float64), x.astype(np.float64)
    if distance == "cosine":
        return 1.0 - ((a / aux[q]) * (b / aux[:, None])).sum(1)
    if distance == "dot_product":
        return -(a * b).sum(1)
    if distance == "snr":
        return (a - b).var(1) / aux[q]
    squared = ((a - b) ** 2).sum(1)
    return np.sqrt(squared) if distance == "euclidean" else squared


# ---------------------------------------------------------------- label columns and their counts

class Columns(NamedTuple):
    """Label columns for one pass. A value is a row of the tables entry_*, which permuted columns share."""
    values: np.ndarray       # (k, n) int32: every picture's value as a row of the tables
    codes: np.ndarray        # (k, n) uint8: 1 … of frequent values, 0 otherwise
    members: np.ndarray      # (w, n) int32: pictures sorted by value, for columns with rare values
    member_row: np.ndarray   # (k,) int32: a column's row in members, or −1
    entry_code: np.ndarray   # (t,) uint8
    entry_rank: np.ndarray   # (t,) int32: which of `ranks` is R, −1: R = 0
    entry_start: np.ndarray  # (t,) int32: first member
    entry_count: np.ndarray  # (t,) int32: c, the pictures with this value
    entry_depth: np.ndarray  # (t,) int64: R
    entry_owner: np.ndarray  # (t,) int64: the property
    ranks: np.ndarray        # (s,) int64: the distinct R


def make_columns(labels, max_neighbours=None):
    """Label columns (list of (n,) arrays of any kind) -> Columns."""
    n, first = len(labels[0]), 0
    values, codes, members, member_row, tables = [], [], [], [], []
    for label in labels:
        value, count = np.unique(label, return_inverse=True, return_counts=True)[1:]
        value = value.reshape(-1).astype(np.int32)
        frequent = count * WALK >= n                      # at most WALK values, so one byte holds the code
        code = np.where(frequent, np.cumsum(frequent), 0).astype(np.uint8)
        values.append(value + np.int32(first))
        codes.append(code[value])
        member_row.append(-1 if frequent.all() else len(members))
        if not frequent.all():
            members.append(np.argsort(value, kind="stable").astype(np.int32))
        tables.append((code, count, np.cumsum(count) - count, np.full(len(count), len(tables))))
        first += len(count)
    code, count, start, owner = (np.concatenate(parts) for parts in zip(*tables))
    depth = np.minimum(count - 1, max_neighbours or n)
    ranks = np.unique(depth[depth > 0]).astype(np.int64)
    rank = np.where(depth > 0, np.searchsorted(ranks, depth), -1)
    return Columns(np.array(values), np.array(codes), np.array(members, np.int32).reshape(len(members), n),
                   np.array(member_row, np.int32), code, rank.astype(np.int32), start.astype(np.int32),
                   count.astype(np.int32), depth, owner, ranks)


def bit_planes(codes):
    """codes (k, n) uint8 -> (p, k, ⌈n/64⌉) uint64: bit i of [c − 1, column] is codes[column, i] == c.

    Read by the kernel's AVX-512 loops only: an eighth of the bytes. Elsewhere p is 0, there at most 16.
    """
    k, n = codes.shape
    planes = np.zeros((min(16, int(codes.max())) if _knn and _knn.AVX512 else 0, k, -(-n // 64)), np.uint64)
    for c in range(len(planes)):
        planes.view(np.uint8)[c, :, :-(-n // 8)] = np.packbits(codes == c + 1, axis=1, bitorder="little")
    return planes


def permute_columns(columns, permutations):
    """The k columns under each of p permutations of the pictures (p, n), one permutation after the other."""
    inverse = np.argsort(permutations, axis=1).astype(np.int32)
    shift = np.where(columns.member_row >= 0, len(columns.members), 0)
    rows = [columns.member_row + shift * i for i in range(len(permutations))]
    return columns._replace(values=np.concatenate([columns.values.take(p, 1) for p in permutations]),
                            codes=np.concatenate([columns.codes.take(p, 1) for p in permutations]),
                            members=np.concatenate([i.take(columns.members) for i in inverse]),
                            member_row=np.concatenate(rows).astype(np.int32))


def order_numpy(space, q):
    """The definition: row q's candidates by float64 distance, ties by index; and all rows' distances."""
    d = distances64(space.x, q, space.distance, space.aux)
    order = np.argsort(d, kind="stable")
    return order[order != q], d


def count_hits_numpy(space, columns, queries, by_index=False):
    """The plain twin of the kernel's count_hits(), which tells what hits (4, k, len(queries)) int32 are."""
    hits = np.zeros((4, len(columns.values), len(queries)), np.int32)
    for b, q in enumerate(queries):
        order, d = order_numpy(space, q)
        d = d[order]
        for k, values in enumerate(columns.values):
            depth = columns.entry_depth[values[q]]
            if not depth:
                continue
            right, cut = values[order] == values[q], d[depth - 1]
            first, last = np.searchsorted(d, cut), np.searchsorted(d, cut, "right")
            hits[0, k, b] = right[:depth].sum()
            if last > depth:
                hits[1:, k, b] = last - first, 0, depth - first
                if not by_index:
                    hits[0, k, b], hits[2, k, b] = right[:first].sum(), right[first:last].sum()
    return hits


@cache
def blas_threads():
    """The BLAS libraries' thread pools, looked up once: Ctrl-C is lost while they are listed."""
    return ThreadpoolController()


def count_blocks(space, columns, queries, threads, memory_mib, by_index=False):
    """Yield (slice of queries, the kernel's hits (4, k, block) int32), exact, in the order of the queries.

    Each thread multiplies a block of queries by all candidates and counts in it. Where memory allows few rows
    for each thread, one block at a time is shared by all.
    """
    n, k = len(space.x), len(columns.values)
    row_bytes, scratch = 4 * n + 16 * k, 24 * n           # scratch: the kernel's, for each thread
    rows = int((memory_mib * 2 ** 20 - threads * scratch) // (threads * row_bytes))
    workers, inner = (threads, 1) if rows >= 16 else (1, threads)
    rows = rows * threads if workers == 1 else rows
    rows = max(1, min(rows, BLOCK_ROWS, -(-len(queries) // workers), max(8, int(BLOCK_WORK / (n * k)))))
    planes = bit_planes(columns.codes)
    buffers = deque(np.empty((rows, n), np.float32) for _ in range(workers) if _knn)

    def count(start):
        part = slice(start, min(start + rows, len(queries)))
        q = queries[part]
        if _knn is None:
            return part, count_hits_numpy(space, columns, q, by_index)
        products, hits = buffers.pop(), np.zeros((4, k, len(q)), np.int32)
        np.matmul(np.ascontiguousarray(space.working[:, q].T), space.working, out=products[:len(q)])
        _knn.count_hits(products[:len(q)], q, space.bounds[q], space.x, space.aux, space.offset,
                        DISTANCES.index(space.distance), columns.codes, planes, columns.members,
                        columns.member_row, np.ascontiguousarray(columns.values[:, q]), columns.entry_code,
                        columns.entry_rank, columns.entry_start, columns.entry_count, columns.ranks, hits,
                        by_index, inner)
        buffers.append(products)
        return part, hits

    with blas_threads().limit(limits=inner), ThreadPoolExecutor(workers) as pool:
        waiting = deque()
        try:
            for start in range(0, len(queries), rows):
                waiting.append(pool.submit(count, start))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()                           # Ctrl-C: what has begun ends, nothing else begins


def as_embeddings(embeddings, distance, normalise=False):
    """Embeddings as float32 (n, m) in C order, of length 1 if asked for. ValueError unless they are real
    and finite, n >= 2, and have distances: a zero vector has no direction, a constant one no SNR."""
    if np.iscomplexobj(embeddings):
        raise ValueError("embeddings are complex; expected real numbers")
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(embeddings, np.float32)
    if x.ndim != 2 or not 2 <= len(x) < 2 ** 31 - 64 or x.shape[1] < 1:
        raise ValueError(f"embeddings have shape {x.shape}; expected (n, m), 2 <= n < 2,147,483,584")
    wrong = {"is not finite": ~np.isfinite(x).all(1)}
    if distance == "cosine" or normalise:
        wrong["is a zero vector: it has no direction"] = ~x.any(1)
    if distance == "snr":
        wrong["is constant: its SNR is undefined"] = (x == x[:, :1]).all(1)
    for what, rows in wrong.items():
        if rows.any():
            raise ValueError(f"row {int(rows.argmax())} (counting from 0) {what}; remove that picture")
    if normalise:
        x, step = x.copy(), max(1, (1 << 20) // x.shape[1])
        for start in range(0, len(x), step):
            rows = x[start:start + step].astype(np.float64)
            x[start:start + step] = rows / np.sqrt((rows ** 2).sum(1, keepdims=True))
    return x


def available_threads():
    """The cores that this process may use (a scheduler may grant fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def nearest(embeddings, neighbours, *, distance="euclidean", threads=None):
    """The exact ordered neighbours of every row: indices (n, R) int64, float64 distances (n, R).

    embeddings (n, m) real, R = neighbours in 1 … n − 1: all but the row itself, equal distances by index.
    Raises ValueError for anything else.
    """
    check_options(distance, NULLS[0], "index", threads=threads)
    x = as_embeddings(embeddings, distance)
    n, space, rows = len(x), prepare(x, distance), max(1, min(BLOCK_ROWS, (1 << 26) // len(x)))
    if not 1 <= neighbours < n:
        raise ValueError(f"{neighbours} neighbours of {n} embeddings; expected 1 to {n - 1}")
    indices, distances = np.empty((n, neighbours), np.int64), np.empty((n, neighbours))
    for start in range(0, n, rows):
        part = slice(start, min(start + rows, n))
        if _knn:
            products = np.matmul(np.ascontiguousarray(space.working[:, part].T), space.working)
            _knn.nearest(products, np.arange(start, part.stop), space.bounds[part], x, space.aux,
                         space.offset, DISTANCES.index(distance), indices[part], distances[part],
                         threads or available_threads())
            continue
        for q in range(start, part.stop):
            order, d = order_numpy(space, q)
            indices[q], distances[q] = order[:neighbours], d[order[:neighbours]]
    return indices, distances


# ---------------------------------------------------------------- R-Precision, NR-Prec and their significance

class Score(NamedTuple):
    """One property's result."""
    values: int                    # distinct values
    queries: int                   # queries with R > 0
    skipped: int                   # queries left out because no other picture has their value (R = 0)
    r_precision: float             # mean of X / R (Eq. 4)
    nr_precision: float            # mean of (X − E X) / sd X (Eq. 5, with the root); nan for a constant label
    nr_precision_se: float = None  # with a subset of queries: standard error of that mean
    tied: int = 0                  # queries whose cut at R goes through candidates at one distance
    p_value: float = None          # with permutations
    p_holm: float = None


def null_moments(count, depth, n, null):
    """Mean and standard deviation (nan for a constant label) of the hits X among R = depth candidates.

    count (t,): pictures, of n, that share the query's value.
    binomial: p = c / n (the paper). hypergeometric: R draws without replacement from the n − 1 others.
    """
    count, depth = count.astype(np.float64), depth.astype(np.float64)
    if null == "binomial":
        p = count / n
        variance = depth * p * (1 - p)
    else:
        p = (count - 1) / (n - 1)
        variance = depth * p * (1 - p) * (n - 1 - depth) / max(n - 2, 1)
    return depth * p, np.where(count < n, np.sqrt(variance), np.nan)


def holm(p_values):
    """Holm's correction of m p-values: (m,) -> (m,), nan stays nan and does not count."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")[:np.count_nonzero(~np.isnan(p))]                  # nan comes last
    adjusted = np.full(len(p), np.nan)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, np.arange(len(order), 0, -1) * p[order]))
    return adjusted


def nr_precision(embeddings, labels, *, distance="euclidean", normalise=False, null="binomial",
                 max_neighbours=None, ties="expected", permutations=0, queries=None, seed=0, threads=None,
                 memory_mib=512, progress=None):
    """R-Precision and Normalized R-Precision of label columns (Kobs et al., Eq. 4 and 5).

    embeddings      (n, m) real numbers, used as float32; finite
    labels          {name: (n,) array of any comparable kind}, or one such array
    distance        euclidean, squared_euclidean, cosine, dot_product or snr
    normalise       embeddings to length 1 first: with the loss's own distance this is the paper's Eq. 3
    null            binomial (the paper) or hypergeometric (exact for drawing without replacement)
    max_neighbours  R = min(c − 1, K): the released procedure with K = 1023
    ties            candidates at the same distance where the R end: expected, their hits count with the mean
                    over all orders of the rows; index, the smaller index goes first, as released
    permutations    N: p = (1 + extreme) / (1 + N), extreme: as far from the permuted ones' mean as observed
    queries         a random subset of so many queries, with standard errors; seed: of subset and permutations
    threads         all that this process may use; memory_mib: for blocks of similarities and permuted columns
    progress        called with (queries × columns done, in all) after each block

    Returns {name: Score}, or one Score for one array. Counts are exact: equal to float64 brute force. They
    don't depend on threads, memory_mib, the BLAS or the order of the properties.
    Raises ValueError for shapes that do not fit, numbers that are not finite and options out of range.
    """
    named = labels if isinstance(labels, dict) else {"": labels}
    check_options(distance, null, ties, max_neighbours=max_neighbours, permutations=permutations,
                  queries=queries, seed=seed, threads=threads, memory_mib=memory_mib)
    x, threads = as_embeddings(embeddings, distance, normalise), min(threads or available_threads(), 1024)
    n, k = len(x), len(named)
    shapes = [np.shape(label) for label in named.values()]
    if set(shapes) != {(n,)}:
        raise ValueError(f"label columns have shapes {shapes}; expected at least one column, ({n},) each")
    space, columns = prepare(x, distance), make_columns(list(named.values()), max_neighbours)
    chosen = np.arange(n)
    if queries is not None and queries < n:
        chosen = np.sort(np.random.default_rng([seed, 0]).choice(n, queries, replace=False))
    moments = null_moments(columns.entry_count, columns.entry_depth, n, null)

    # As many permuted columns at a time as half the memory takes; the observed ones ride in the first pass.
    each = k * 8 * n + n * 16 + 4 * n * len(columns.members)
    per_pass = int(max(1, min(memory_mib * 2 ** 19 // each, 2e8 // (k * n), 2000))) if permutations else 1
    total, done, statistics = k * (1 + permutations) * len(chosen), 0, []

    def tick(count):
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    for begin in range(0, max(1, permutations), per_pass):
        drawn = [np.random.default_rng([seed, 1 + i]).permutation(n)
                 for i in range(begin, min(begin + per_pass, permutations))]
        if begin == 0:
            drawn.insert(0, np.arange(n))
        batch = permute_columns(columns, drawn) if permutations else columns
        blocks = count_blocks(space, batch, chosen, threads, memory_mib / min(len(drawn), 2), ties == "index")
        values, copies = batch.values[:, chosen], len(drawn)
        sums, used, squares, tied = sum_hits(blocks, values, copies, len(columns.entry_depth), tick)
        if begin == 0:
            scores = observe(sums[0], used[0], squares, tied, columns, *moments, sampled=len(chosen) < n)
        statistics += [mean_z(s, u, columns, *moments) for s, u in zip(sums, used)]
    if permutations:
        p = p_values(statistics[0], np.array(statistics[1:]))
        scores = [s._replace(p_value=a, p_holm=b) for s, a, b in zip(scores, p.tolist(), holm(p).tolist())]
    return dict(zip(named, scores)) if named is labels else scores[0]


def check_options(distance, null, ties, **numbers):
    """Raise ValueError for options of nr_precision() that are unknown or out of range."""
    named = ("distance", distance, DISTANCES), ("null", null, NULLS), ("ties", ties, TIES)
    for what, value, known in named:
        if value not in known:
            raise ValueError(f"unknown {what} {value!r}; expected one of {', '.join(known)}")
    for name, value in numbers.items():
        least = 0 if name in ("permutations", "seed") else 1
        if value is not None and (not isinstance(value, (int, np.integer)) or value < least):
            raise ValueError(f"{name} is {value!r}; expected a whole number, at least {least}")


def sum_hits(blocks, values, copies, width, tick):
    """Add up the hits X of count_blocks(), columns (copies · k, N) with these values, by copy and value.

    For the t = width rows of the value tables: sums of X (copies, t), queries (copies, t), and of the first
    copy sums of X² and tied queries (t,), added in the order of the queries: no blocks can change them.
    """
    (sums, used), (squares, tied) = np.zeros((2, copies * width)), np.zeros((2, width))
    k = len(values) // copies
    first = np.repeat(np.arange(copies) * width, k)[:, None]
    for part, hits in blocks:
        place, x = (first + values[:, part]).ravel(), hits[0].ravel().astype(np.float64)
        at, observed = np.flatnonzero(hits[1]), len(place) // copies
        group, right, places = hits[1:].reshape(3, -1)[:, at].astype(np.float64)
        x[at] += right * places / group
        np.add.at(sums, place, x)
        np.add.at(used, place, 1)
        np.add.at(squares, place[:observed], x[:observed] ** 2)
        np.add.at(tied, place[at[at < observed]], 1)
        tick(len(place))
    return sums.reshape(copies, width), used.reshape(copies, width), squares, tied


def mean_z(sums, used, columns, mean, deviation):
    """NR-Prec of each property (k,): hits summed, then standardised value by value. R = 0 is left out."""
    valid = columns.entry_depth > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        z = np.where(valid & (used > 0), (sums - used * mean) / deviation, 0.0)
        queries = np.bincount(columns.entry_owner, np.where(valid, used, 0))
        return np.bincount(columns.entry_owner, z) / queries


def observe(sums, used, squares, tied, columns, mean, deviation, sampled):
    """The observed columns' Scores: list of k; with the standard error where the queries are a sample."""
    depth, owner = columns.entry_depth, columns.entry_owner
    asked = np.where(depth > 0, used, 0)
    queries = np.bincount(owner, asked).astype(int)
    skipped = np.bincount(owner, used).astype(int) - queries
    population = np.bincount(owner, np.where(depth > 0, columns.entry_count, 0))
    statistic = mean_z(sums, used, columns, mean, deviation)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.bincount(owner, np.where(asked > 0, sums / depth, 0.0)) / queries
        # Σ z² of a value = (Σ X² − 2 μ Σ X + N μ²) / σ²
        second = np.where(asked > 0, (squares - 2 * mean * sums + asked * mean ** 2) / deviation ** 2, 0.0)
        spread = np.maximum(np.bincount(owner, second) / queries - statistic ** 2, 0)
        error = np.sqrt(spread / (queries - 1) * (1 - queries / population))
    error = np.where(queries < 2, np.nan, error).tolist() if sampled else [None] * len(queries)
    whole = [np.bincount(owner), queries, skipped, np.bincount(owner, tied).astype(int)]
    values, queries, skipped, tied = (numbers.tolist() for numbers in whole)
    rows = zip(values, queries, skipped, precision.tolist(), statistic.tolist(), error, tied)
    return [Score(*row) for row in rows]


def p_values(observed, permuted):
    """Two-sided permutation p-values (k,) of means, observed (k,) and permuted (N, k); nan stays nan."""
    centre = permuted.mean(0)
    slack = 1e-9 * np.maximum(np.abs(observed), 1)           # equal up to rounding counts as equally extreme
    far = np.abs(observed - centre) - slack
    p = (1 + (np.abs(permuted - centre) >= far).sum(0)) / (1 + len(permuted))
    return np.where(np.isnan(observed), np.nan, p)


# ---------------------------------------------------------------- what the method assumes of the properties

def dependent_pairs(labels, level=SIGNIFICANCE):
    """Pairs of properties that depend on each other: [(name, name, Cramér's V, Holm-corrected p)].

    Chi-square of every pair. Its distribution is a gamma distribution with the mean and variance that it has
    under all permutations of one column (Mielke & Berry 1985): right for rare values too, where the usual one
    gives false alarms. V is bias-corrected (Bergsma 2013). labels: {name: (n,) array}.
    """
    codes = {name: np.unique(label, return_inverse=True)[1].reshape(-1) for name, label in labels.items()}
    counts = {name: np.bincount(code) for name, code in codes.items()}
    tested = []
    for j, b in enumerate(codes):
        for a in list(codes)[:j]:
            v_and_p = chi_square(codes[a], codes[b], counts[a], counts[b])
            tested += [(a, b, *v_and_p)] if v_and_p else []
    adjusted = holm([p for *_, p in tested])
    return [(a, b, v, float(p)) for (a, b, v, _), p in zip(tested, adjusted) if p < level]


def chi_square(a, b, count_a, count_b):
    """(Cramér's V, p) of two columns (n,) and their counts; None if one is constant or all distinct."""
    n, r, c = len(a), len(count_a), len(count_b)
    if n < 4 or min(r, c) < 2 or max(r, c) == n:
        return None
    pairs = a.astype(np.int64) * c + b
    if r * c <= 4 * n:
        cells = np.flatnonzero(observed := np.bincount(pairs))
        observed = observed[cells]
    else:
        cells, observed = np.unique(pairs, return_counts=True)
    chi2 = n * ((observed.astype(np.float64) ** 2 / count_a[cells // c] / count_b[cells % c]).sum() - 1)
    v1, v2 = (r - 1) * (n - r) / (n - 1), (c - 1) * (n - c) / (n - 1)
    w1, w2 = ((n / count_a).sum() - r * r) / (n - 2), ((n / count_b).sum() - c * c) / (n - 2)
    mean = n * (r - 1) * (c - 1) / (n - 1)
    variance = 2 * n * (v1 - w1) * (v2 - w2) / (n - 3) + n * n * w1 * w2 / (n - 1)
    phi2 = max(0.0, chi2 / n - (r - 1) * (c - 1) / (n - 1))
    least = min(r - (r - 1) ** 2 / (n - 1), c - (c - 1) ** 2 / (n - 1)) - 1
    return float(np.sqrt(phi2 / least)), float(gammaincc(mean * mean / variance, chi2 * mean / variance))


def quantile_bins(name, values, bins):
    """A numeric column (n,) of str -> (n,) int: which of so many bins of about equally many pictures."""
    numbers = np.full(len(values), np.nan)
    for row, value in enumerate(values):
        with suppress(ValueError):
            numbers[row] = float(value)
        if not np.isfinite(numbers[row]):
            raise ValueError(f"--bin {name}={bins}: row {row} (counting from 0) of {name!r} is "
                             f"{str(value)!r}; only numbers can be binned")
    edges = np.quantile(numbers, np.arange(1, bins) / bins, method="inverted_cdf")
    lower = numbers[numbers < numbers.max()]              # an edge at the maximum leaves nothing above
    edges = np.minimum(edges, lower.max()) if len(lower) else edges
    return np.searchsorted(np.unique(edges), numbers, side="left")


# ---------------------------------------------------------------- the command

def parse_arguments(argv):
    from dml_common import command

    parser = command.parser(__doc__)
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="EMB.npy …, embeddings (n, m), and behind them PROPS.csv, a "
        "header and n rows; a first column named frame, image, file, path or id is none (the props.csv "
        "beside each EMB.npy, or in results/<dataset>)")
    add("--properties", metavar="A,B", help="only these columns (all)")
    add("--distance", default="euclidean", choices=[*DISTANCES, "own"], help="how neighbours are ranked "
        "(euclidean, as released); own: Eq. 3, the loss's, which the array's JSON names, on normalised ones")
    add("--normalise", action="store_true", help="embeddings to length 1 first")
    add("--null", default="binomial", choices=NULLS,
        help="the chance distribution of hits (binomial, the paper's; hypergeometric is exact)")
    add("--ties", default="expected", choices=TIES, help="candidates at one distance where the R end: "
        "expected, what all orders of the rows give on average; index, the first, as released (expected)")
    add("--max-neighbours", type=int, metavar="K", help="look at min(R, K); 1023: as released (all R)")
    add("--permutations", type=int, default=0, metavar="N",
        help="p-values from N permutations of each property, Holm-corrected (none)")
    add("--queries", type=int, metavar="N", help="a random subset of N queries, with standard errors (all)")
    add("--bin", action="append", default=[], metavar="PROPERTY=N",
        help="cut a numeric column into N quantile bins; repeatable")
    add("--seed", type=int, default=0, help="of permutations and query subset (0)")
    add("--threads", type=int, metavar="N", help="for BLAS and the kernel alike (all)")
    add("--memory-mib", type=int, default=512, metavar="N", help="for similarities, permuted labels (512)")
    add("--out", metavar="FILE.csv", help="also write one row for each embedding file and property")
    return parser.parse_intermixed_args(argv)


def read_labels(table, pictures, args, notes):
    """The pictures' properties as {name: array}, chosen and binned. ValueError says what is wrong."""
    from dml_common import files

    names = [name.strip() for name in args.properties.split(",")] if args.properties is not None else None
    labels = files.read_properties(table, names, pictures, notes)
    uncut = list(labels)
    for option in args.bin:
        name, _, bins = option.rpartition("=")
        if name not in uncut or not bins.isdecimal() or int(bins) < 2:
            raise ValueError(f"--bin {option}: expected PROPERTY=N with a whole number from 2 and one of "
                             f"{', '.join(labels)}, each once")
        labels[name] = quantile_bins(name, labels[name], int(bins))
        uncut.remove(name)
    return labels


def warnings_before(labels, n, args):
    """What is known before counting, a line each."""
    if args.queries is not None and args.queries > n:
        yield f"--queries {args.queries:,} is more than the {n:,} pictures: all are used"
    distinct = {name: len(np.unique(label)) for name, label in labels.items()}
    for name, values in distinct.items():
        if values == 1:
            yield f"{name} is constant: its NR-Prec is not defined (nan)"
        elif values > n / 2:
            yield (f"{name} has {values:,} values for {n:,} pictures: hardly any has a neighbour to find; "
                   f"cut it with --bin {name}=10 or leave it out with --properties")
    few = len(labels) <= MOST_PAIRED
    if not few:
        yield (f"{len(labels):,} properties are more than {MOST_PAIRED}: whether they depend on each other, "
               "which the method assumes they don't, is not tested")
    for a, b, v, p in dependent_pairs(labels) if few else ():
        yield (f"{a} and {b} depend on each other (Cramér's V {v:.2f}, Holm-corrected p {p:.1g}): "
               "the method assumes independent properties, so one may show for the other")
    if 0 < args.permutations < 1000:
        yield f"{args.permutations} permutations: fewer than 1,000 give coarse p-values"
    testable = sum(values > 1 for values in distinct.values())
    if args.permutations and testable / (1 + args.permutations) >= SIGNIFICANCE:
        yield (f"{args.permutations:,} permutations of {testable} properties can't give p_holm < "
               f"{SIGNIFICANCE}: nothing can be marked; use --permutations {100 * testable:,} or more")


def own_distance(array):
    """The distance that the JSON beside an array names."""
    from dml_common import files

    distance = files.read_sidecar(array).get("distance")
    if distance not in DISTANCES:
        raise ValueError(f"--distance own: no JSON beside {array} names its distance; give one of "
                         f"{', '.join(DISTANCES)} and --normalise")
    return distance


def rounded(value, digits):
    return f"{round(value, digits) + 0.0:.{digits}f}"        # never −0.00


def print_results(names, results, permutations):
    """Properties in rows, embeddings side by side; of many embeddings NR-Prec alone, one in a row."""
    from dml_common import command

    properties, scores = [" ".join(name.split()) for name in results[0]], list(results[0].values())
    columns = [["", "property", *properties], ["", "values", *(f"{s.values:,}" for s in scores)],
               ["", "queries", *(f"{s.queries:,}" for s in scores)]]
    lines = [["NR-Prec", *properties]]
    for name, scores in zip(names, (list(r.values()) for r in results)):
        title = name if len(name) <= 16 else "…" + name[-15:]
        marked = [s.nr_precision > PUBLISHED_THRESHOLD for s in scores]
        if permutations:
            marked = [s.p_holm < SIGNIFICANCE for s in scores]
        for heading, field, digits in SHOWN:
            if getattr(scores[0], field) is not None:
                columns.append([title, heading, *(rounded(getattr(s, field), digits) for s in scores)])
                title = ""
        columns.append(["", "", *("*" if mark else "" for mark in marked)])
        lines.append([name, *(rounded(s.nr_precision, 2) + ("*" if mark else " ")
                              for s, mark in zip(scores, marked))])
    if len(results) <= SIDE_BY_SIDE:
        lines = list(zip(*columns))
    command.print_aligned(lines if len(results) > 1 else lines[1:])
    mark = (f"NR-Prec > {PUBLISHED_THRESHOLD}: the published mark, one z-score's 1 % threshold applied to a "
            "mean of many; --permutations N tests the mean")
    if permutations:
        mark = (f"p_holm < {SIGNIFICANCE}: {permutations:,} permutations of each property, Holm-corrected "
                f"over {len(properties)} properties")
    print(f"\n* {mark}")


def main(argv=None):
    from dml_common import command, files

    args = parse_arguments(argv)
    options = {name: getattr(args, name) for name in ("null", "ties", "max_neighbours", "permutations",
                                                      "queries", "seed", "threads", "memory_mib")}
    check_options(DISTANCES[0], **options)
    arrays, tables = files.arrays_and_tables(args.files)
    if args.out is not None:
        files.check_output(args.out, [*arrays, *tables])
    if _knn is None:
        command.say("note: this version's _knn is not built (pip install .): NumPy counts, exact but slow")
    known, results, rows, names = {}, [], [], command.short_names(arrays)
    distances = [own_distance(array) if args.distance == "own" else args.distance for array in arrays]
    normalise = args.normalise or args.distance == "own"
    for array, table, name, distance in zip(arrays, tables, names, distances):
        pictures, notes = files.picture_names(array), []
        content = Path(table).read_bytes() if Path(table).is_file() else None
        content = content, pictures and files.pictures_sha256(pictures)  # those of a fold are equal
        labels = known.get(content) or read_labels(table, pictures, args, notes)
        if results and list(labels) != list(results[0]):
            raise ValueError(f"{tables[0]} and {table} have different properties; give networks of one data "
                             "set, or --properties")
        n = len(next(iter(labels.values())))
        x = files.read_embeddings(array, table, n)
        try:
            x = as_embeddings(x, distance, normalise)
        except ValueError as error:
            raise ValueError(f"{array}: {error} or choose another distance") from None
        if content not in known:
            known[content] = labels
            for line in notes:
                command.say(f"note: {line}")
            for line in warnings_before(labels, n, args):
                command.say(f"warning: {line}" if len(set(tables)) == 1 else f"warning: {table}: {line}")
        collapsed = (x == x[0]).all()
        if collapsed:
            command.say(f"warning: {array}: all {n:,} embeddings are equal: none is nearer than another")
        with command.bar(1.0, name) as bar:
            scores = nr_precision(x, labels, distance=distance, **options,
                                  progress=lambda done, total, bar=bar: bar.update(done / total - bar.n))
        tied, prop = max((s.tied / max(s.queries, 1), prop) for prop, s in scores.items())
        if tied > MANY_TIES and not collapsed:
            command.say(f"warning: {array}: {tied:.0%} of the queries of {prop} have candidates at the same "
                        f"distance where their list ends; {TIES[args.ties]}")
        for prop, s in scores.items():
            rows.append([array, prop, *s[:3], distance, args.null, args.max_neighbours, *s[3:6],
                         args.permutations, s.p_value, s.p_holm, int(normalise), args.ties, s.tied])
        results.append(scores)
    for prop, s in results[0].items():
        if s.skipped:
            command.say(f"warning: {prop}: {s.skipped:,} of {s.skipped + s.queries:,} queries skipped, no "
                        "other picture has their value")
    if args.out is not None:
        files.write_table(args.out, HEADER, rows)
    print_results(names, results, args.permutations)


if __name__ == "__main__":
    command.run(main, stopped="stopped")
