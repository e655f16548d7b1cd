"""Which image properties does an embedding cluster by? R-Precision and Normalized R-Precision (NR-Prec) of
every property, exact at any size (Kobs et al., ICCV 2021, section 4).

    python nrprec.py examples/cars/emb.npy examples/cars/props.csv
    python nrprec.py a/emb.npy b/emb.npy props.csv --out nrprec.csv       # side by side, and as rows
    python nrprec.py emb.npy props.csv --null hypergeometric --permutations 2000
    python nrprec.py emb.npy props.csv --queries 2000                     # a sample, with standard errors
    python nrprec.py results/cars/*/fold*/emb.npy --out nrprec.csv        # each with the props.csv that embed.py left

Reads: embeddings as .npy, (n, m); properties as .csv with a header and n rows in the same order.
Writes: a table on stdout and, with --out, one CSV row for each embedding file and property.
In Python: nr_precision(embeddings, labels), which takes arrays and needs only numpy, scipy and threadpoolctl
(with the extension _knn beside it: fast; without: the same numbers, slowly).
"""
import argparse
import os
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import gammaincc
from threadpoolctl import ThreadpoolController

try:
    import _knn
except ImportError:
    _knn = None  # the NumPy twin count_hits_numpy() counts instead

DISTANCES = ("euclidean", "squared_euclidean", "cosine", "dot_product", "snr")
NULLS = ("binomial", "hypergeometric")
PUBLISHED_THRESHOLD = 2.576  # two-sided 1 % of one z-score; the paper marks the mean of n of them by it
SIGNIFICANCE = 0.01          # of the Holm-corrected permutation p-value
BLOCK_WORK = 4e9             # comparisons in one block at most, a fraction of a second: progress, and Ctrl-C, in between
BLOCK_ROWS = 512             # queries in one matrix product: more does not speed it up (benchmarks/nrprec.py)
SIDE_BY_SIDE = 4             # embeddings on the terminal; more are printed one in a row
WALK = 48                    # a class of fewer than n / WALK pictures is walked, a larger one compared densely


# ---------------------------------------------------------------- the five distances, ready for the kernel

class Space(NamedTuple):
    """Embeddings prepared for one distance: similarity of q and i = rows of `working` multiplied + offset[i]."""
    x: np.ndarray        # (n, m) float32, the embeddings as they came
    working: np.ndarray  # (m, n) float32: centred, normalised or scaled by a power of two; norms are at most about 1
    offset: np.ndarray   # (n,) float32
    bounds: np.ndarray   # (n,) float64: |float32 similarity − true similarity| of query q is at most bounds[q]
    aux: np.ndarray      # (n,) float64: norms (cosine), variances (snr), else zeros
    distance: str


def prepare(x, distance):
    """Embeddings x (n, m) float32 -> Space. Every distance is one inner product plus an offset for each candidate:

    squared Euclidean / 2 = (‖a‖² / 2) − (a·b − ‖b‖² / 2), on vectors with their mean subtracted (float32
    cancellation); cosine on normalised ones; SNR, var(a − b) / var(a), ranks like the Euclidean distance of vectors
    centred over their own components. Raises ValueError for a zero vector (cosine) or a constant one (snr).
    """
    check_vectors(x, distance)
    n, m = x.shape
    working, aux, norms = np.empty((m, n), np.float32), np.zeros(n), np.empty(n)
    centre = x.mean(0, dtype=np.float64) if distance in ("euclidean", "squared_euclidean") else 0.0
    step = max(1, (1 << 20) // m)

    def block(start):
        part = x[start:start + step].astype(np.float64)
        if distance == "cosine":
            return part / aux[start:start + step, None]
        return part - part.mean(1, keepdims=True) if distance == "snr" else part - centre

    for start in range(0, n, step):
        part = x[start:start + step].astype(np.float64)
        if distance == "cosine":
            aux[start:start + step] = np.sqrt((part ** 2).sum(1))
        elif distance == "snr":
            aux[start:start + step] = part.var(1)
    for start in range(0, n, step):
        norms[start:start + step] = np.sqrt((block(start) ** 2).sum(1))
    # A power of two changes no digit, and squares neither overflow nor vanish.
    exponent = -int(np.frexp(norms.max())[1]) if norms.max() > 0 else 0
    for start in range(0, n, step):
        part = np.ldexp(block(start), exponent).astype(np.float32)
        working[:, start:start + step] = part.T
        norms[start:start + step] = np.sqrt((part.astype(np.float64) ** 2).sum(1))
    offset = np.zeros(n, np.float32)
    if distance not in ("cosine", "dot_product"):
        offset = (-norms ** 2 / 2).astype(np.float32)
    # Rounding of a float32 product of m terms in any order, of the working rows, the offset and the sum; the 5 %
    # covers second-order terms and the float64 side, the last term what underflows.
    u, largest = 2.0 ** -24, norms.max()
    bounds = 1.05 * u * ((m + 8) * norms * largest + 4 * largest ** 2) + (m + 4) * 2.0 ** -125
    return Space(x, working, offset, bounds, aux, distance)


def check_vectors(x, distance):
    """Raise ValueError for a zero vector with cosine and for a constant one with snr: neither has a distance."""
    bad = np.zeros(len(x), bool)
    if distance == "cosine":
        bad, what = ~x.any(1), "is a zero vector: it has no cosine"
    elif distance == "snr":
        bad, what = (x == x[:, :1]).all(1), "is constant: its SNR is undefined"
    if bad.any():
        raise ValueError(f"row {int(bad.argmax())} (counting from 0) {what}; remove that picture or choose another distance")


def distances64(x, q, distance, aux):
    """Float64 distances of every row of x (n, m) from row q: the definition that all counts here equal, to the bit."""
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
    """Label columns for one pass: what each query's value is, how many share it, how deep its R reaches.

    A value is a row of the tables entry_*; tables of one property are shared by its permuted columns.
    """
    values: np.ndarray       # (k, n) int32: every picture's value as a row of the tables
    codes: np.ndarray        # (k, n) uint8: 1 … of frequent values, 0 otherwise
    members: np.ndarray      # (w, n) int32: pictures sorted by value, for columns with rare values
    member_row: np.ndarray   # (k,) int32: a column's row in members, or −1
    entry_code: np.ndarray   # (t,) uint8
    entry_rank: np.ndarray   # (t,) int32: which of `ranks` is R, −1: R = 0
    entry_start: np.ndarray  # (t,) int32: first member
    entry_count: np.ndarray  # (t,) int32: c, the pictures with this value
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
        tables.append((code, count, np.cumsum(count) - count))
        first += len(count)
    code, count, start = (np.concatenate(parts) for parts in zip(*tables))
    depth = np.minimum(count - 1, max_neighbours or n)
    ranks = np.unique(depth[depth > 0]).astype(np.int64)
    rank = np.where(depth > 0, np.searchsorted(ranks, depth), -1)
    return Columns(np.array(values), np.array(codes), np.array(members, np.int32).reshape(len(members), n),
                   np.array(member_row, np.int32), code, rank.astype(np.int32), start.astype(np.int32),
                   count.astype(np.int32), ranks)


def bit_planes(codes):
    """codes (k, n) uint8 -> (p, k, ⌈n/64⌉) uint64: bit i of [c − 1, column] says codes[column, i] == c, c <= p <= 16.

    Read by the kernel's AVX-512 loops only: an eighth of the bytes. Elsewhere p is 0.
    """
    k, n = codes.shape
    planes = np.zeros((min(16, int(codes.max())) if _knn and _knn.AVX512 else 0, k, -(-n // 64)), np.uint64)
    for c in range(len(planes)):
        planes.view(np.uint8)[c, :, :-(-n // 8)] = np.packbits(codes == c + 1, axis=1, bitorder="little")
    return planes


def permute_columns(columns, permutations):
    """The columns under each permutation of the pictures ((p, n) int), permutation by permutation: k·p columns."""
    inverse = np.argsort(permutations, axis=1).astype(np.int32)
    rows = len(columns.members)
    shift = np.where(columns.member_row >= 0, rows, 0)
    return columns._replace(
        values=np.concatenate([columns.values.take(p, 1) for p in permutations]),
        codes=np.concatenate([columns.codes.take(p, 1) for p in permutations]),
        members=np.concatenate([i.take(columns.members) for i in inverse]),
        member_row=np.concatenate([columns.member_row + shift * i for i in range(len(permutations))]).astype(np.int32))


def count_hits_numpy(space, columns, queries):
    """The plain twin of the kernel: hits (k, len(queries)) int32 by float64 distances and a stable sort."""
    hits = np.zeros((len(columns.values), len(queries)), np.int32)
    for b, q in enumerate(queries):
        d = distances64(space.x, q, space.distance, space.aux)
        d[q] = np.inf
        order = np.argsort(d, kind="stable")
        order = order[order != q]                         # by its index, even where distances are infinite
        for k, values in enumerate(columns.values):
            rank = columns.entry_rank[values[q]]
            if rank >= 0:
                hits[k, b] = (values[order[:columns.ranks[rank]]] == values[q]).sum()
    return hits


@cache
def blas_threads():
    """The BLAS libraries' thread pools, looked up once: Ctrl-C is lost while they are listed."""
    return ThreadpoolController()


def count_blocks(space, columns, queries, threads, memory_mib):
    """Yield (slice of queries, hits (k, block) int32), exact, in no particular order.

    Each thread multiplies a block of queries by all candidates and counts in it. Where the memory allows only a few
    rows for each thread, one block at a time is shared by all of them.
    """
    n, k = len(space.x), len(columns.values)
    row_bytes = 4 * n + 16 * k
    scratch = 24 * n                                      # the kernel's, for each thread
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
            return part, count_hits_numpy(space, columns, q)
        products = buffers.pop()
        np.matmul(np.ascontiguousarray(space.working[:, q].T), space.working, out=products[:len(q)])
        hits = np.empty((k, len(q)), np.int32)
        _knn.count_hits(products[:len(q)], q, space.bounds[q], space.x, space.aux, space.offset,
                        DISTANCES.index(space.distance), columns.codes, planes, columns.members, columns.member_row,
                        np.ascontiguousarray(columns.values[:, q]), columns.entry_code, columns.entry_rank,
                        columns.entry_start, columns.entry_count, columns.ranks, hits, inner)
        buffers.append(products)
        return part, hits

    with blas_threads().limit(limits=inner), ThreadPoolExecutor(workers) as pool:
        starts, waiting = iter(range(0, len(queries), rows)), deque()
        try:
            for start in starts:
                waiting.append(pool.submit(count, start))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()                           # Ctrl-C: what has begun ends, nothing else begins


def as_embeddings(embeddings):
    """Embeddings as a float32 array (n, m) in C order. Raises ValueError unless they are real, finite and n >= 2."""
    if np.iscomplexobj(embeddings):
        raise ValueError("embeddings are complex; expected real numbers")
    with np.errstate(over="ignore"):
        x = np.ascontiguousarray(embeddings, np.float32)
    if x.ndim != 2 or len(x) < 2 or x.shape[1] < 1:
        raise ValueError(f"embeddings have shape {x.shape}; expected (n, m) with n >= 2 and m >= 1")
    if len(x) >= 2 ** 31 - 64:
        raise ValueError(f"{len(x):,} embeddings; at most 2,147,483,583 can be indexed")
    if not np.isfinite(x).all():
        raise ValueError(f"row {int((~np.isfinite(x).all(1)).argmax())} of the embeddings (counting from 0) is not finite")
    return x


def available_threads():
    """The cores that this process may use (a scheduler may grant fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def nearest(embeddings, neighbours, *, distance="euclidean", threads=None):
    """The exact ordered neighbours of every row: indices (n, R) int64 and float64 distances (n, R), the row left out.

    embeddings (n, m) real, R = neighbours in 1 … n − 1. Smaller distance first, equal distances by smaller index.
    Raises ValueError for anything else.
    """
    x = as_embeddings(embeddings)
    if distance not in DISTANCES:
        raise ValueError(f"unknown distance {distance!r}; expected one of {', '.join(DISTANCES)}")
    if not 1 <= neighbours < len(x):
        raise ValueError(f"{neighbours} neighbours of {len(x)} embeddings; expected 1 to {len(x) - 1}")
    n, space = len(x), prepare(x, distance)
    indices, distances = np.empty((n, neighbours), np.int64), np.empty((n, neighbours))
    rows = max(1, min(BLOCK_ROWS, (1 << 26) // n))
    for start in range(0, n, rows):
        q = np.arange(start, min(start + rows, n))
        if _knn is None:
            for i in q:
                d = distances64(x, i, distance, space.aux)
                order = np.argsort(d, kind="stable")
                indices[i] = order[order != i][:neighbours]
                distances[i] = d[indices[i]]
            continue
        products = np.matmul(np.ascontiguousarray(space.working[:, q].T), space.working)
        _knn.nearest(products, q, space.bounds[q], x, space.aux, space.offset, DISTANCES.index(distance),
                     indices[start:q[-1] + 1], distances[start:q[-1] + 1], threads or available_threads())
    return indices, distances


# ---------------------------------------------------------------- R-Precision, NR-Prec and their significance

class Score(NamedTuple):
    """One property's result."""
    values: int                   # distinct values
    queries: int                  # queries with R > 0
    skipped: int                  # queries left out because no other picture has their value (R = 0)
    r_precision: float            # mean of X / R (Eq. 4)
    nr_precision: float           # mean of (X − E X) / sd X (Eq. 5, with the square root); nan for a constant property
    nr_precision_se: float = None  # with a subset of queries: standard error of that mean
    p_value: float = None         # with permutations
    p_holm: float = None


def null_moments(count, depth, n, null):
    """Mean and standard deviation of the hits X among R = depth candidates, for values that `count` of n pictures have.

    binomial: p = c / n (the paper). hypergeometric: R draws without replacement from the n − 1 others.
    """
    count, depth = count.astype(np.float64), depth.astype(np.float64)
    if null == "binomial":
        p = count / n
        return depth * p, np.sqrt(depth * p * (1 - p))
    p = (count - 1) / (n - 1)
    return depth * p, np.sqrt(depth * p * (1 - p) * (n - 1 - depth) / max(n - 2, 1))


def holm(p_values):
    """Holm's correction of m p-values: (m,) -> (m,), nan stays nan and does not count."""
    p_values = np.asarray(p_values, np.float64)
    adjusted = np.full(len(p_values), np.nan)
    order = [i for i in np.argsort(p_values, kind="stable") if not np.isnan(p_values[i])]
    running = 0.0
    for position, i in enumerate(order):
        running = max(running, min(1.0, (len(order) - position) * p_values[i]))
        adjusted[i] = running
    return adjusted


def nr_precision(embeddings, labels, *, distance="euclidean", null="binomial", max_neighbours=None, permutations=0,
                 queries=None, seed=0, threads=None, memory_mib=512, progress=None):
    """R-Precision and Normalized R-Precision of label columns (Kobs et al., Eq. 4 and 5).

    embeddings      (n, m) real numbers, used as float32; finite
    labels          {name: (n,) array of any comparable kind}, or one such array
    distance        euclidean, squared_euclidean, cosine, dot_product or snr
    null            binomial (the paper) or hypergeometric (exact for drawing without replacement)
    max_neighbours  R = min(c − 1, K): the released procedure with K = 1023
    permutations    N: p = (1 + extreme) / (1 + N), extreme: as far from the permuted columns' mean as the observed
    queries         a random subset of so many queries, with standard errors; seed: of subset and permutations
    threads         all that this process may use; memory_mib: for blocks of similarities and permuted columns
    progress        called with (queries × columns done, in all) after each block

    Returns {name: Score}, or one Score for one array. Counts are exact: equal to float64 brute force with ties by
    index. Results do not depend on threads, memory_mib, the BLAS or the order of the properties.
    Raises ValueError for shapes that do not fit, numbers that are not finite and options out of range.
    """
    if not isinstance(labels, dict):
        return nr_precision(embeddings, {"": labels}, distance=distance, null=null, max_neighbours=max_neighbours,
                            permutations=permutations, queries=queries, seed=seed, threads=threads,
                            memory_mib=memory_mib, progress=progress)[""]
    check_options(distance, null, max_neighbours, permutations, queries, seed, threads, memory_mib)
    x = as_embeddings(embeddings)
    check_labels(x, labels)
    n, k, threads = len(x), len(labels), threads or available_threads()
    space, columns = prepare(x, distance), make_columns(list(labels.values()), max_neighbours)
    chosen = np.arange(n)
    if queries is not None and queries < n:
        chosen = np.sort(np.random.default_rng([seed, 0]).choice(n, queries, replace=False))
    expected = expect(columns, n, null)

    # As many permuted columns at a time as half the memory takes; the observed ones ride in the first pass.
    each = k * 8 * n + n * 16 + 4 * n * len(columns.members)
    per_pass = int(max(1, min(memory_mib * 2 ** 19 // each, 2e8 // (k * n), 2000))) if permutations else 1
    total, done, permuted = k * (1 + permutations) * len(chosen), 0, []

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
        sums, squares, used = sum_hits(space, batch, k, chosen, threads, memory_mib, tick)
        if begin == 0:
            scores = observe(sums[0], squares, used[0], expected, columns.entry_count, n)
            sums, used = sums[1:], used[1:]
        permuted += [mean_z(s, u, expected) for s, u in zip(sums, used)]
    if permutations:
        scores = add_p_values(scores, np.array(permuted))
    return dict(zip(labels, scores))


def sum_hits(space, batch, k, chosen, threads, memory_mib, tick):
    """Count the hits of a batch of columns, copies of k properties, and add them up by value.

    Returns (sums of hits (copies, t), sums of their squares (t,) in the first copy, queries (copies, t)), int64, for the
    t rows of the value tables: integers, so that no order of blocks can change them.
    """
    copies, width = len(batch.values) // k, len(batch.entry_count)
    sums, used, squares = np.zeros(copies * width, np.int64), np.zeros(copies * width, np.int64), np.zeros(width, np.int64)
    first = np.repeat(np.arange(copies) * width, k)[:, None]
    for part, hits in count_blocks(space, batch, chosen, threads, memory_mib / min(copies, 2)):
        place, hits = (first + batch.values[:, chosen[part]]).ravel(), hits.ravel().astype(np.int64)
        np.add.at(sums, place, hits)
        np.add.at(used, place, 1)
        observed = k * (part.stop - part.start)
        np.add.at(squares, place[:observed], hits[:observed] ** 2)
        tick(len(hits))
    return sums.reshape(copies, width), squares, used.reshape(copies, width)


def check_options(distance, null, max_neighbours, permutations, queries, seed, threads, memory_mib):
    """Raise ValueError for options of nr_precision() that are unknown or out of range."""
    if distance not in DISTANCES:
        raise ValueError(f"unknown distance {distance!r}; expected one of {', '.join(DISTANCES)}")
    if null not in NULLS:
        raise ValueError(f"unknown null {null!r}; expected one of {', '.join(NULLS)}")
    for name, value, least, most in (("max_neighbours", max_neighbours, 1, None), ("permutations", permutations, 0, None),
                                     ("queries", queries, 1, None), ("seed", seed, 0, None),
                                     ("threads", threads, 1, 1024), ("memory_mib", memory_mib, 1, None)):
        if value is None:
            continue
        if not isinstance(value, (int, np.integer)):
            raise ValueError(f"{name} is {value!r}; expected a whole number")
        if value < least or (most and value > most):
            raise ValueError(f"{name} is {value}; expected at least {least}" + (f", at most {most}" if most else ""))


def check_labels(x, labels):
    """Raise ValueError unless there is a label for each row of x in every column."""
    if not labels:
        raise ValueError("no label column; expected at least one")
    for name, label in labels.items():
        if np.shape(label) != (len(x),):
            raise ValueError(f"labels {name!r} have shape {np.shape(label)}; expected ({len(x)},), one for each row")


class Expected(NamedTuple):
    """What chance gives, for each row of the value tables (t,)."""
    depth: np.ndarray      # R
    mean: np.ndarray       # of X
    deviation: np.ndarray  # of X; nan for a constant property
    owner: np.ndarray      # int, the property


def expect(columns, n, null):
    """Value tables -> Expected under the null distribution."""
    depth = np.append(columns.ranks, 0)[columns.entry_rank]  # entry_rank is −1 where R = 0
    mean, deviation = null_moments(columns.entry_count, depth, n, null)
    deviation[columns.entry_count == n] = np.nan
    owner = np.cumsum(columns.entry_start == 0) - 1          # each property's table starts with member 0
    return Expected(depth, mean, deviation, owner)


def mean_z(sums, used, expected):
    """NR-Prec of each property (k,): the sums of hits, standardised value by value. Queries with R = 0 are left out."""
    valid = expected.depth > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        z = np.where(valid & (used > 0), (sums - used * expected.mean) / expected.deviation, 0.0)
        return np.bincount(expected.owner, z) / np.bincount(expected.owner, np.where(valid, used, 0))


def observe(sums, squares, used, expected, counts, n):
    """The observed columns' Scores: list of k. counts (t,): pictures with each value."""
    depth, mean, deviation, owner = expected
    valid = np.where(depth > 0, used, 0)
    queries = np.bincount(owner, valid).astype(np.int64)
    skipped = np.bincount(owner, used).astype(np.int64) - queries
    population = np.bincount(owner, np.where(depth > 0, counts, 0))
    statistic = mean_z(sums, used, expected)
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.bincount(owner, np.where(valid > 0, sums / depth, 0.0)) / queries
        # Σ z² of a value = (Σ X² − 2 μ Σ X + N μ²) / σ²
        second = np.where(valid > 0, (squares - 2 * mean * sums + valid * mean ** 2) / deviation ** 2, 0.0)
        spread = np.maximum(np.bincount(owner, second) / queries - statistic ** 2, 0)
        error = np.sqrt(spread / (queries - 1) * (1 - queries / population))
    error[queries < 2] = np.nan                              # one query says nothing of the spread
    values = np.bincount(owner)
    sampled = used.sum() < len(values) * n
    return [Score(int(values[j]), int(queries[j]), int(skipped[j]), float(precision[j]), float(statistic[j]),
                  float(error[j]) if sampled else None) for j in range(len(values))]


def add_p_values(scores, permuted):
    """Two-sided permutation p-values of the means, permuted (N, k), and Holm's correction over the properties."""
    statistic, centre = np.array([score.nr_precision for score in scores]), permuted.mean(0)
    far = np.abs(statistic - centre) * (1 - 1e-12)           # equal up to rounding counts as equally extreme
    p = (1 + (np.abs(permuted - centre) >= far).sum(0)) / (1 + len(permuted))
    p[np.isnan(statistic)] = np.nan
    return [score._replace(p_value=float(a), p_holm=float(b)) for score, a, b in zip(scores, p, holm(p))]


# ---------------------------------------------------------------- what the method assumes of the properties

def dependent_pairs(labels, level=SIGNIFICANCE):
    """Pairs of properties that depend on each other: [(name, name, bias-corrected Cramér's V, Holm-corrected p)].

    Chi-square of every pair. Its distribution is a gamma distribution with the mean and variance that chi-square has
    under all permutations of one column (Mielke & Berry 1985), which holds for rare values too, where chi-square's
    usual one gives false alarms. V after Bergsma (2013). labels: {name: (n,) array}.
    """
    codes = {name: np.unique(label, return_inverse=True)[1].reshape(-1) for name, label in labels.items()}
    counts = {name: np.bincount(code) for name, code in codes.items()}
    names, tested = list(codes), []
    for i, a in enumerate(names):
        for b in names[:i]:
            result = chi_square(codes[b], codes[a], counts[b], counts[a])
            if result:
                tested.append((b, a, *result))
    adjusted = holm([p for *_, p in tested])
    return [(a, b, v, float(p)) for (a, b, v, _), p in zip(tested, adjusted) if p < level]


def chi_square(a, b, count_a, count_b):
    """(bias-corrected Cramér's V, p) of two code columns (n,) with their counts; None where nothing can depend
    (a constant column, one with all values distinct)."""
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
    numbers = np.empty(len(values))
    for row, value in enumerate(values):
        try:
            numbers[row] = float(value)
        except ValueError:
            numbers[row] = np.nan
        if not np.isfinite(numbers[row]):
            raise ValueError(f"--bin {name}={bins}: row {row} (counting from 0) of {name!r} is {value!r}; only numbers can be binned")
    edges = np.quantile(numbers, np.arange(1, bins) / bins, method="inverted_cdf")
    lower = numbers[numbers < numbers.max()]              # an edge at the maximum would leave nothing above it
    edges = np.minimum(edges, lower.max()) if len(lower) else edges
    return np.searchsorted(np.unique(edges), numbers, side="left")


# ---------------------------------------------------------------- the command

def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("embeddings", nargs="+", metavar="EMB.npy", help="embeddings, (n, m), one or several files")
    parser.add_argument("properties_csv", nargs="?", metavar="PROPS.csv", help="properties: a header and n rows; a first "
                        "column named frame, image, file, path or id identifies the picture and is no property "
                        "(default: the props.csv beside each EMB.npy, or in results/<dataset>)")
    parser.add_argument("--properties", metavar="A,B", help="only these columns (default: all)")
    parser.add_argument("--distance", default="euclidean", choices=DISTANCES,
                        help="how neighbours are ranked (default: euclidean, on the raw embeddings as released; "
                             "cosine is the paper's Eq. 3 for every loss but SNR)")
    parser.add_argument("--null", default="binomial", choices=NULLS,
                        help="the chance distribution of hits (default: binomial, the paper's; hypergeometric is exact)")
    parser.add_argument("--max-neighbours", type=int, metavar="K",
                        help="look at min(R, K) neighbours; 1023 is what the released code did (default: all R)")
    parser.add_argument("--permutations", type=int, default=0, metavar="N",
                        help="p-values from N permutations of each property, Holm-corrected (default: 0, none)")
    parser.add_argument("--queries", type=int, metavar="N",
                        help="a random subset of N queries, with standard errors (default: all)")
    parser.add_argument("--bin", action="append", default=[], metavar="PROPERTY=N",
                        help="cut a numeric column into N quantile bins; repeatable")
    parser.add_argument("--seed", type=int, default=0, help="of permutations and query subset (default: 0)")
    parser.add_argument("--threads", type=int, metavar="N", help="for BLAS and the kernel alike (default: all)")
    parser.add_argument("--memory-mib", type=int, default=512, metavar="MIB",
                        help="for blocks of similarities and permuted columns; the block size follows (default: 512)")
    parser.add_argument("--out", metavar="FILE.csv", help="also write one row for each embedding file and property")
    parser.error = lambda message: parser.exit(2, f"nrprec.py: {message} (--help explains)\n")
    arguments = parser.parse_args(argv)
    if arguments.embeddings[1:] and not arguments.embeddings[-1].endswith(".npy"):  # argparse gives all to the first
        arguments.properties_csv = arguments.embeddings.pop()
    if tables := [file for file in arguments.embeddings if file.endswith(".csv")]:
        parser.error(f"{tables[0]} stands before an array; PROPS.csv comes last, one for all")
    return arguments


def read_labels(arguments, table):
    """The properties as {name: array}, chosen and binned as asked. ValueError says what is wrong where."""
    from dml_common import files
    names = [name.strip() for name in arguments.properties.split(",")] if arguments.properties is not None else None
    labels = files.read_properties(table, names)
    binned = set()
    for option in arguments.bin:
        name, _, bins = option.rpartition("=")
        if name in binned:
            raise ValueError(f"--bin {option}: {name} is cut already; give each property once")
        binned.add(name)
        if name not in labels:
            raise ValueError(f"--bin {option}: expected PROPERTY=N with one of {', '.join(labels)}")
        if not bins.isdecimal() or int(bins) < 2:
            raise ValueError(f"--bin {option}: {bins!r} bins; expected a whole number from 2")
        labels[name] = quantile_bins(name, labels[name], int(bins))
    return labels


def short_names(paths):
    """What tells the files apart: stems where they differ, else the paths without what all of them share."""
    parts = [Path(path).with_suffix("").parts for path in paths]
    while len(parts) > 1 and min(map(len, parts)) > 1 and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    last = [p[-1] for p in parts]
    shared = len(os.path.commonprefix([p[:-1] for p in parts]))
    return last if len(set(last)) == len(paths) else ["/".join(p[shared:]) for p in parts]


def warnings_before(labels, permutations):
    """What is known before counting, a line each."""
    for name, label in labels.items():
        values, n = len(np.unique(label)), len(label)
        if values == 1:
            yield f"{name} is constant: its NR-Prec is not defined (nan)"
        elif values > n / 2:
            yield (f"{name} has {values:,} values for {n:,} pictures: hardly any has a neighbour to find; "
                   f"cut it with --bin {name}=10 or leave it out with --properties")
    for a, b, v, p in dependent_pairs(labels):
        yield (f"{a} and {b} depend on each other (Cramér's V {v:.2f}, Holm-corrected p {p:.1g}): "
               "the method assumes independent properties, so one may show for the other")
    if permutations:
        testable = sum(len(np.unique(label)) > 1 for label in labels.values())
        if permutations < 1000:
            yield f"{permutations} permutations: fewer than 1,000 give coarse p-values"
        if testable / (1 + permutations) >= SIGNIFICANCE:
            yield (f"{permutations:,} permutations of {testable} properties can't give p_holm < {SIGNIFICANCE}: "
                   f"nothing can be marked; use --permutations {100 * testable:,} or more")


def print_table(names, results, permutations):
    """The aligned table: properties in rows, embeddings side by side, the mark and what it means."""
    sampled = any(s.nr_precision_se is not None for scores in results for s in scores.values())
    head = ["property", "values", "queries"]
    lines = [[" ".join(name.split()), f"{score.values:,}", f"{score.queries:,}"] for name, score in results[0].items()]
    for scores in results:
        head += ["R-Prec", "NR-Prec"] + ["± s.e."] * sampled + ["p_holm"] * bool(permutations) + [""]
        for line, score in zip(lines, scores.values()):
            marked = score.p_holm < SIGNIFICANCE if permutations else score.nr_precision > PUBLISHED_THRESHOLD
            line += [f"{score.r_precision:.4f}", f"{score.nr_precision + 0.0:.2f}".replace("-0.00", "0.00")]
            line += [f"{score.nr_precision_se:.2f}"] if sampled else []
            line += [f"{score.p_holm:.4f}"] if permutations else []
            line += ["*" if marked else ""]
    widths = [max(map(len, column)) for column in zip(head, *lines)]
    per = (len(head) - 3) // len(results)
    if len(results) > 1:
        title = " " * (sum(widths[:3]) + 4)
        for i, name in enumerate(names):
            space = widths[3 + i * per:3 + (i + 1) * per]
            room = sum(space) + 2 * (per - 1)
            title += "  " + (name if len(name) <= room else "…" + name[1 - room:]).ljust(room)
        print(title.rstrip())
    for line in [head] + lines:
        cells = [line[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]
        print("  ".join(cells).rstrip())
    print_mark(permutations, len(lines))


def print_networks(names, results, permutations):
    """The aligned table of many embeddings: one in a row, NR-Prec of the properties side by side, with the mark."""
    lines = [["NR-Prec", *(" ".join(name.split()) for name in results[0])]]
    for name, scores in zip(names, results):
        marked = [s.p_holm < SIGNIFICANCE if permutations else s.nr_precision > PUBLISHED_THRESHOLD for s in scores.values()]
        lines.append([name, *(f"{s.nr_precision + 0.0:.2f}{'*' if mark else ' '}".replace("-0.00", "0.00")
                              for s, mark in zip(scores.values(), marked))])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join([line[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]).rstrip())
    print_mark(permutations, len(results[0]))


def print_mark(permutations, properties):
    if permutations:
        print(f"\n* p_holm < {SIGNIFICANCE}: {permutations:,} permutations of each property, Holm-corrected over "
              f"{properties} properties")
    else:
        print(f"\n* NR-Prec > {PUBLISHED_THRESHOLD}: the published mark, one z-score's 1 % threshold applied to a mean "
              "of many; --permutations N tests the mean")


def write_rows(path, arguments, sidecars, results):
    """The long-form CSV; columns loss and fold stand in front where the arrays' JSON files tell them."""
    from dml_common import files
    known = any(sidecar.get("loss") is not None for sidecar in sidecars)
    header = ["loss", "fold"] * known + ["embeddings", "property", "values", "queries", "skipped", "distance", "null",
                                         "max_neighbours", "r_precision", "nr_precision", "nr_precision_se",
                                         "permutations", "p_value", "p_holm"]
    rows = []
    for file, sidecar, scores in zip(arguments.embeddings, sidecars, results):
        for name, s in scores.items():
            rows.append([sidecar.get("loss"), sidecar.get("fold")] * known
                        + [file, name, s.values, s.queries, s.skipped, arguments.distance, arguments.null,
                           arguments.max_neighbours, s.r_precision, s.nr_precision, s.nr_precision_se,
                           arguments.permutations, s.p_value, s.p_holm])
    files.write_table(path, header, rows)


def say(kind, text):
    print(f"nrprec.py: {kind}: {text}", file=sys.stderr)


def say_before(labels, arguments, table=None):
    """The notes and warnings that are known before counting, of one table among several if it is named."""
    of = f"{table}: " if table else ""
    n = len(next(iter(labels.values())))
    if arguments.queries is not None and arguments.queries > n:
        say("note", f"{of}--queries {arguments.queries:,} is more than the {n:,} pictures: all are used")
    if _knn is None:
        say("note", "the extension _knn is not built (pip install .): counting in NumPy, exact but slow")
    for warning in warnings_before(labels, arguments.permutations):
        say("warning", of + warning)


def run(arguments):
    from dml_common import files
    from tqdm import tqdm
    check_options(arguments.distance, arguments.null, arguments.max_neighbours, arguments.permutations,
                  arguments.queries, arguments.seed, arguments.threads, arguments.memory_mib)
    tables = [arguments.properties_csv or files.table_beside(file) for file in arguments.embeddings]
    if arguments.out is not None:
        files.check_output(arguments.out, [*arguments.embeddings, *tables])
    read, results, names = {}, [], short_names(arguments.embeddings)
    for file, table, name in zip(arguments.embeddings, tables, names):
        key = arguments.properties_csv or table.read_bytes()  # the losses of one fold have equal tables
        labels = read[key] if key in read else read_labels(arguments, table)
        if read and list(labels) != list(next(iter(read.values()))):
            raise ValueError(f"{tables[0]} and {table} have different properties; give networks of one data set, or --properties")
        rows, x = len(next(iter(labels.values()))), files.read_embeddings(file)
        if len(x) != rows:
            raise ValueError(f"{file} has {len(x):,} embeddings, {table} {rows:,} rows; "
                             "both must list the same pictures in the same order")
        try:
            check_vectors(x, arguments.distance)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        if key not in read:
            say_before(labels, arguments, table if len(set(tables)) > 1 else None)
            read[key] = labels
        with tqdm(total=1.0, desc=name, delay=2, disable=None, leave=False, unit_scale=True, file=sys.stderr,
                  bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} left") as bar:
            results.append(nr_precision(
                x, labels, distance=arguments.distance, null=arguments.null, max_neighbours=arguments.max_neighbours,
                permutations=arguments.permutations, queries=arguments.queries, seed=arguments.seed,
                threads=arguments.threads, memory_mib=arguments.memory_mib,
                progress=lambda done, total: bar.update(done / total - bar.n)))
    for name, score in results[0].items():
        if score.skipped:
            say("warning", f"{name}: {score.skipped:,} of {score.skipped + score.queries:,} queries skipped, "
                           "no other picture has their value")
    if arguments.out is not None:
        write_rows(arguments.out, arguments, [files.read_sidecar(file) for file in arguments.embeddings], results)
    if len(results) > SIDE_BY_SIDE:
        print_networks(names, results, arguments.permutations)
    else:
        print_table(names, results, arguments.permutations)


def main(argv=None):
    arguments = parse_arguments(argv)
    try:
        run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:                                   # the reader of our table has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, MemoryError) as error:
        message = " ".join(str(error).split()) or "out of memory: lower --memory-mib"
        print(f"nrprec.py: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("nrprec.py: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
