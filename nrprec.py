"""Which image properties does an embedding cluster by? R-Precision and Normalized R-Precision (NR-Prec) of
every property, exact at any size (Kobs et al., ICCV 2021, section 4).

    python nrprec.py examples/cars/emb.npy examples/cars/props.csv
    python nrprec.py a/emb.npy b/emb.npy props.csv --out nrprec.csv --per-value   # rows: properties, values
    python nrprec.py emb.npy props.csv --null hypergeometric --permutations 2000
    python nrprec.py emb.npy props.csv --queries 2000                     # a sample, with standard errors
    python nrprec.py results/cars/*/fold*/emb.npy --out nrprec.csv        # each with the props.csv beside it

Reads: embeddings as .npy, (n, m); properties as .csv, a header and a row a picture, matched
by name where both sides have names, else in order; or labels as .npy, (n,).
Writes: a table on stdout and, with --out, one CSV row for each embedding file and property.
In Python: nr_precision(embeddings, labels): arrays in, and only numpy is needed
(with the extension _knn: fast; without: the same numbers, slowly).
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
from typing import NamedTuple

import numpy as np

try:
    import _knn
except ImportError:
    _knn = None
if getattr(_knn, "INTERFACE", None) != 8:  # not built, or from another _knn.pyx
    _knn = None  # the NumPy twin count_hits_numpy() counts instead

DISTANCES = ("euclidean", "squared_euclidean", "cosine", "dot_product", "snr")
NULLS = ("binomial", "hypergeometric")
# What --as-published sets: how the released code made Table 6.
PUBLISHED = {"distance": "euclidean", "normalise": False, "null": "binomial", "max_neighbours": 1023,
             "ties": "index"}
TIES = {"expected": "they count with their expectation", "index": "the order of the rows decides"}
MANY_TIES = 0.01             # of the queries: then it is said
BLOCK_WORK = 4e9             # comparisons in a block at most, a fraction of a second: progress, Ctrl-C
PANEL, ABREAST = 32, 12      # candidates whose numbers stand side by side for the kernel; queries at a time
FAR = -3e38                  # the offset of what stands behind the last candidate
SAMPLE = 1024                # candidates that tell the keys' ranges
BLOCK_ROWS = 192             # queries in one block: more are slower
MOST_TESTED = 1e7            # permutations × values, which are kept: more values get no p-value
HEADER = ("embeddings,property,values,queries,skipped,distance,null,max_neighbours,r_precision,nr_precision,"
          "nr_precision_se,permutations,p_value,p_holm,normalised,ties,tied,missing,value").split(",")
PLANES = 3 / 4               # of memory_mib, for the permuted columns
MOST_PLANES = 16             # values of a column that have a bit plane each
WALK = 48                    # a class of fewer than n / WALK pictures is walked, larger ones compared densely


# ---------------------------------------------------------------- the five distances, ready for the kernel

class Space(NamedTuple):
    """Embeddings ready for one distance: the similarity is vectors(q) · vectors(i) + offset[i]."""
    x: np.ndarray        # (N, m) float16, float32 or float64 as they came, taken as float32
    rows: np.ndarray     # (n,) int64: where in x the embeddings stand
    lengths: np.ndarray  # (n,) float64: they are divided by these; (0,): they are not
    panels: np.ndarray   # (P, m, 32) float32: centred, normalised or scaled by a power of two; norms <= 1.
                         # Number i is [i // 32, :, i % 32], zeros are behind the last; None without _knn
    offset: np.ndarray   # (P · 32,) float32
    bounds: np.ndarray   # (n,) float64: |float32 − true similarity| of query q is at most bounds[q]
    aux: np.ndarray      # (n,) float64: norms (cosine), variances (snr), else zeros
    distance: str

    def numbers(self, part):
        """Some of the embeddings as the distances take them, float32 numbers as float64 (…, m)."""
        x = self.x[self.rows[part]].astype(np.float32)
        if len(self.lengths):
            x = (x.astype(np.float64) / self.lengths[part, None]).astype(np.float32)
        return x.astype(np.float64)

    def vectors(self, part):
        """Some of the rows of panels, (…, m)."""
        return self.panels[part // PANEL, :, part % PANEL]

    def source(self):
        """What the kernel takes these numbers from."""
        return self.x.view(np.uint8), self.x.itemsize, self.rows, self.lengths


def prepare(x, distance, rows=None, normalise=False):
    """Embeddings x (N, m) of as_embeddings(), or their rows (n,) -> Space.

    A distance is an inner product plus an offset of the candidate. Squared Euclidean / 2 = (‖a‖² / 2) −
    (a·b − ‖b‖² / 2), on vectors with their mean subtracted (float32 cancellation); cosine on normalised ones;
    SNR, var(a − b) / var(a), ranks like the Euclidean distance of vectors centred over their own components.
    """
    rows = np.arange(len(x)) if rows is None else rows
    n, m = len(rows), x.shape[1]
    aux, norms, centre = np.zeros(n), np.empty(n), 0.0
    panels = _knn and _knn.zeros((-(-n // 64) * 2, m, PANEL), np.float32)
    offset = np.where(np.arange(-(-n // 64) * 64) < n, 0.0, FAR).astype(np.float32)
    parts = slices(n, m)
    space = Space(x, rows, np.empty(0), panels, offset, norms, aux, distance)
    if normalise:
        lengths = [np.sqrt((space.numbers(part) ** 2).sum(1)) for part in parts]
        space = space._replace(lengths=np.concatenate(lengths))
    if distance in ("euclidean", "squared_euclidean"):
        centre = sum(space.numbers(part).sum(0) for part in parts) / n

    def vectors(part):
        numbers = space.numbers(part)
        if distance == "cosine":
            aux[part] = np.sqrt((numbers ** 2).sum(1))
            return numbers / aux[part, None]
        if distance == "snr":
            aux[part] = numbers.var(1)
            return numbers - numbers.mean(1, keepdims=True)
        return numbers - centre

    for part in parts:
        norms[part] = np.sqrt((vectors(part) ** 2).sum(1))
    # A power of two changes no digit, and squares neither overflow nor vanish.
    exponent = -int(np.frexp(norms.max())[1]) if norms.max() > 0 else 0
    for part in parts:
        scaled = np.ldexp(vectors(part), exponent).astype(np.float32)
        if _knn:
            some = _knn.panels_of(scaled)
            panels[part.start // PANEL:][:len(some)] = some
        norms[part] = np.sqrt((scaled.astype(np.float64) ** 2).sum(1))
    if distance not in ("cosine", "dot_product"):
        offset[:n] = -norms ** 2 / 2
    # Rounding of a float32 product of m terms in any order, of the working rows, the offset and the sum; 5 %
    # for second-order terms and the float64 side, the last term for what underflows.
    u, largest = 2.0 ** -24, norms.max()
    bounds = 1.05 * u * ((m + 8) * norms * largest + 4 * largest ** 2) + (m + 4) * 2.0 ** -125
    return space._replace(bounds=bounds)


def slices(n, m):
    """Parts of n rows, about a hundred thousand numbers each: an even number of panels."""
    step = max(1, (1 << 16) // m // PANEL) * 2 * PANEL
    return [slice(start, start + step) for start in range(0, n, step)]


def distances64(space, q):
    """Float64 distances of all embeddings from number q: the definition that counts equal to the bit."""
    b, aux = space.numbers(slice(None)), space.aux
    a = b[q]
    if space.distance == "cosine":
        return 1.0 - ((a / aux[q]) * (b / aux[:, None])).sum(1)
    if space.distance == "dot_product":
        return -(a * b).sum(1)
    if space.distance == "snr":
        return (a - b).var(1) / aux[q]
    squared = ((a - b) ** 2).sum(1)
    return np.sqrt(squared) if space.distance == "euclidean" else squared


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
    ranks: np.ndarray        # (s,) int64: the distinct R
    entry_depth: np.ndarray  # (t,) int64: R
    entry_owner: np.ndarray  # (t,) int64: the property
    copies: np.ndarray = None  # (p, n) int32: the permutations that all columns are taken under


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
                   count.astype(np.int32), ranks, depth, owner)


def values_of(columns, queries):
    """The queries' values as rows of the value tables: (k, N) int32, or (p · k, N) of permuted copies."""
    if columns.copies is None:
        return np.ascontiguousarray(columns.values[:, queries])
    values = columns.values[:, columns.copies[:, queries]]
    return np.ascontiguousarray(values.swapaxes(0, 1)).reshape(-1, len(queries))


def number_of_planes(columns):
    """How many values of a column have a bit plane, which the kernel's vector loops read."""
    return min(MOST_PLANES, int(columns.entry_code.max())) if _knn and _knn.ISA != "scalar" else 0


def has_planes(columns):
    """Do bit planes hold all values?"""
    return bool(0 < columns.entry_code.min() and columns.entry_code.max() <= number_of_planes(columns))


def planes_of_columns(columns):
    """How many values of each column have a bit plane: (k,) int."""
    return np.minimum(columns.codes.max(1), number_of_planes(columns)).astype(int)


def bit_planes(columns):
    """(pieces, s, copies, 128) uint64, start (k,) int32 and the most planes that a column has: bit i of
    [piece, start[column] + c − 1, copy], a piece of 8,192 pictures, is codes[column, i] == c."""
    n, each = columns.codes.shape[1], planes_of_columns(columns)
    copies = [slice(None)] if columns.copies is None or not has_planes(columns) else columns.copies
    pieces, bits = -(-n // 8192), np.zeros(-(-n // 8192) * 1024, np.uint8)
    planes = _knn.zeros((pieces, each.sum(), len(copies), 128), np.uint64)
    values = [(column, c + 1) for column, most in enumerate(each) for c in range(most)]
    for i, copy in enumerate(copies):
        codes = columns.codes[:, copy]
        for at, (column, c) in enumerate(values):
            bits[:-(-n // 8)] = np.packbits(codes[column] == c, bitorder="little")
            planes[:, at, i] = bits.view(np.uint64).reshape(pieces, 128)
    return planes, (np.cumsum(each) - each).astype(np.int32), number_of_planes(columns)


def permute_columns(columns, permutations):
    """The k columns under each of p permutations of the pictures (p, n), one permutation after the other.

    Where bit planes hold all, they alone are made, by bit_planes().
    """
    columns = columns._replace(copies=np.asarray(permutations, np.int32))
    if has_planes(columns):
        return columns
    inverse = np.argsort(permutations, axis=1).astype(np.int32)
    shift = np.where(columns.member_row >= 0, len(columns.members), 0)
    rows = [columns.member_row + shift * i for i in range(len(permutations))]
    return columns._replace(codes=np.concatenate([columns.codes.take(p, 1) for p in permutations]),
                            members=np.concatenate([i.take(columns.members) for i in inverse]),
                            member_row=np.concatenate(rows).astype(np.int32))


def permutations_at_a_time(columns, memory_mib):
    """How many, with all their columns, the share of memory for them holds."""
    k, n = columns.codes.shape
    each = 4 * n + n * int(planes_of_columns(columns).sum()) // 8
    each += 0 if has_planes(columns) else k * n + 16 * n + 4 * n * len(columns.members)
    return int(max(1, min(memory_mib * PLANES * 2 ** 20 // each, 2000)))


def count_hits_numpy(space, columns, queries, by_index=False):
    """The plain twin of the kernel's count_hits(), which tells what hits (4, k, len(queries)) int32 are."""
    values_of_all = values_of(columns, np.arange(columns.values.shape[1]))
    hits = np.zeros((4, len(values_of_all), len(queries)), np.int32)
    for b, q in enumerate(queries):
        d = distances64(space, q)
        order = np.argsort(d, kind="stable")              # equal ones by index
        order = order[order != q]
        d = d[order]
        for k, values in enumerate(values_of_all):
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


def count_hits(space, columns, planes, queries, sample, buffers, by_index=False, everything=False):
    """The kernel's hits (4, k, len(queries)) int32, from keys of everything, or of what is near enough by the
    sample. sample and buffers: count_blocks()'s."""
    n, b, (chosen, panels), (keys, kept, depths) = len(space.rows), len(queries), sample, buffers
    entry, vectors = values_of(columns, queries), space.vectors(queries)
    ranges, number, short = np.empty((b, 3), np.float32), np.empty(b, np.int32), np.zeros(b, bool)
    depth = np.full(b, n) if everything else columns.entry_depth[entry].max(0)
    bounds, similarities = space.bounds[queries], np.empty((b, len(panels) * PANEL), np.float32)
    _knn.multiply(vectors, panels, similarities)
    similarities = similarities[:, :len(chosen)] + space.offset[chosen]
    _knn.choose_ranges(similarities, depth, bounds, n, ranges)
    _knn.make_keys(vectors, space.panels, space.offset, ranges, keys, kept, number)
    hits, period = np.zeros((4, *entry.shape), np.int32), 0 if columns.copies is None else len(columns.values)
    _knn.count_hits(keys, kept, number, ranges, queries, bounds, *space.source(), space.aux, space.offset,
                    DISTANCES.index(space.distance), *planes, entry, *columns[1:9], hits,  # codes … ranks
                    short.view(np.uint8), depths, by_index, period)
    if short.any():                                       # the sample misled
        hits[..., short] = count_hits(space, columns, planes, queries[short], sample, buffers, by_index, True)
    return hits


def fit(x, n, k, permuted, threads, memory_mib):
    """How many threads memory_mib holds at work on n of the embeddings x and k columns, how many rows for
    each of them, and how many MiB hold all of them."""
    mapped = x.nbytes / 2 ** 20 if isinstance(x, np.memmap) else 0.0   # pages that count as ours, too
    memory_mib = max(memory_mib / 2, memory_mib - mapped)
    row = 2 * n + n // 8 + n * permuted + 28 * k + 8 * SAMPLE + 8 * x.shape[1]
    memory, scratch = memory_mib * 2 ** 20, 23 * n        # beside its rows, for each
    workers = int(max(1, min(threads, memory // (scratch + ABREAST * row))))
    rows = max(1, int(memory / workers - scratch) // row)
    needed = threads * (scratch + ABREAST * row) / 2 ** 20
    return workers, rows, min(2 * needed, needed + mapped)


def count_blocks(space, columns, queries, threads, memory_mib, by_index=False):
    """Yield (slice of queries, the kernel's hits (4, k, block) int32), exact, in the order of the queries.

    Each thread takes a block of queries; fewer do where memory holds fewer.
    """
    n, period = columns.values.shape[::-1]
    k, words = period * (1 if columns.copies is None else len(columns.copies)), -(-n // 64)
    permuted = columns.copies is not None
    workers, rows, _ = fit(space.x, n, k, permuted, threads, memory_mib)
    least = 128 if has_planes(columns) else ABREAST
    rows = min(rows, BLOCK_ROWS, -(-len(queries) // workers), max(least, int(BLOCK_WORK / (n * k))))
    planes = _knn and bit_planes(columns)
    chosen = np.random.default_rng(0).choice(n, min(n, SAMPLE), replace=False)
    sample = chosen, _knn and _knn.panels_of(space.vectors(chosen))
    buffers = deque((np.empty((rows, 64 * words + 64), np.int16), np.empty((rows, words), np.uint64),
                     np.empty((rows, 64 * words * permuted), np.uint8)) for _ in range(workers) if _knn)

    def count(start):
        part = slice(start, min(start + rows, len(queries)))
        if _knn is None:
            return part, count_hits_numpy(space, columns, queries[part], by_index)
        own = buffers.pop()
        hits = count_hits(space, columns, planes, queries[part], sample, own, by_index)
        buffers.append(own)
        return part, hits

    pool, waiting = ThreadPoolExecutor(workers), deque()
    try:
        for start in range(0, len(queries), rows):
            waiting.append(pool.submit(count, start))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)                # Ctrl-C: what has begun ends, nothing else begins


def as_embeddings(embeddings, distance, normalise=False):
    """Embeddings (n, m), float16, float32 or float64 as they came, others as float32. ValueError unless they
    are real and finite, n >= 2, and have distances: a zero vector has no direction, a constant one no SNR."""
    x = embeddings if isinstance(embeddings, np.memmap) else np.asarray(embeddings)
    if np.iscomplexobj(x):
        raise ValueError("embeddings are complex; expected real numbers")
    as_came = x.dtype in (np.float16, np.float32, np.float64)
    x = np.require(x, None if as_came else np.float32, ["C", "A"])
    if x.ndim != 2 or not 2 <= len(x) < 2 ** 31 - 64 or x.shape[1] < 1:
        raise ValueError(f"embeddings have shape {x.shape}; expected (n, m), 2 <= n < 2,147,483,584")
    for part in slices(*x.shape):
        with np.errstate(over="ignore"):
            numbers = x[part].astype(np.float32)
        wrong = {"is not finite": ~np.isfinite(numbers).all(1)}
        if distance == "cosine" or normalise:
            wrong["is a zero vector: it has no direction"] = ~numbers.any(1)
        if distance == "snr":
            wrong["is constant: its SNR is undefined"] = (numbers == numbers[:, :1]).all(1)
        for what, rows in wrong.items():
            if rows.any():
                row = part.start + int(rows.argmax())
                raise ValueError(f"row {row} (counting from 0) {what}; remove or mend that picture")
    return x


def encode(label):
    """A column (n,) of any kind -> (its distinct values (t,), sorted; which one a picture has (n,) int32).

    −1 where there is no value: nan, None or an empty text.
    """
    label = np.asarray(label)
    if label.dtype.kind == "O":
        here = np.array([value is not None and value == value and value != "" for value in label])
    else:
        here = label != label.dtype.type() if label.dtype.kind in "US" else label == label
    codes = np.full(len(label), -1, np.int32)
    values, inverse = np.unique(label[here], return_inverse=True)
    codes[here] = inverse.reshape(-1)
    return values, codes


def available_threads():
    """The cores that this process may use (a scheduler may grant fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    missing: int = 0               # pictures without a value: no queries, no candidates of the property
    p_value: float = None          # with permutations
    p_holm: float = None
    by_value: dict = None          # with per_value: {value: Score of the queries that have it}


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
    """Holm's correction of m p-values: (m,) -> (m,), nan stays nan and does not count.

    dml_common/properties.py has the other copy: this script's functions are copied without that folder.
    """
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")[:np.count_nonzero(~np.isnan(p))]                  # nan comes last
    adjusted = np.full(len(p), np.nan)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, np.arange(len(order), 0, -1) * p[order]))
    return adjusted


def nr_precision(embeddings, labels, *, distance="euclidean", normalise=False, null="binomial",
                 max_neighbours=None, ties="expected", permutations=0, queries=None, seed=0, per_value=False,
                 threads=None, memory_mib=512, progress=None):
    """R-Precision and Normalized R-Precision of label columns (Kobs et al., Eq. 4 and 5).

    embeddings      (n, m) real numbers, used as float32; finite
    labels          {name: (n,) array of any comparable kind}, or one such array. A picture whose value is
                    nan, None or "" is no query and no candidate of that column, nor one of its n
    distance        euclidean, squared_euclidean, cosine, dot_product or snr
    normalise       embeddings to length 1 first: with the loss's own distance this is the paper's Eq. 3
    null            binomial (the paper) or hypergeometric (exact for drawing without replacement)
    max_neighbours  R = min(c − 1, K): the released procedure with K = 1023
    ties            candidates at the same distance where the R end: expected, their hits count with the mean
                    over all orders of the rows; index, the smaller index goes first, as released
    permutations    N: p = (1 + extreme) / (1 + N), extreme: as far from the permuted ones' mean as observed
    queries         a random subset of so many queries, with standard errors; seed: of subset and permutations
    per_value       also the Score of each value's queries, Score.by_value, corrected over all of them
    threads         all that this process may use; memory_mib: for what they count in and permuted columns
    progress        called with (queries × columns done, in all) after each block

    Returns {name: Score}, or one Score for one array. Counts are exact: equal to float64 brute force. They
    don't depend on threads, memory_mib, the processor or the order of the properties.
    Raises ValueError for shapes that do not fit, numbers that are not finite and options out of range.
    """
    named = labels if isinstance(labels, dict) else {"": labels}
    check_options(distance, null, ties, max_neighbours=max_neighbours, permutations=permutations,
                  queries=queries, seed=seed, threads=threads, memory_mib=memory_mib)
    x, threads = as_embeddings(embeddings, distance, normalise), min(threads or available_threads(), 1024)
    shapes = [np.shape(label) for label in named.values()]
    if set(shapes) != {(len(x),)}:
        raise ValueError(f"label columns have shapes {shapes}; expected one column or more, ({len(x)},) each")
    named, patterns = {name: encode(label) for name, label in named.items()}, {}
    for name, (_, codes) in named.items():                # columns that lack the same pictures share a pass
        here = codes >= 0
        patterns.setdefault(here.tobytes(), (np.flatnonzero(here), []))[1].append(name)
    passes = [len(names) * min(queries or len(x), len(rows)) for rows, names in patterns.values()]
    total, done, scores = (1 + permutations) * sum(passes), 0, {}

    def tick(count):
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    for rows, names in patterns.values():
        lone = Score(len(rows), 0, len(rows), np.nan, np.nan, p_value=np.nan if permutations else None)
        some = parts = [lone] * len(names)                # of fewer than two pictures: no neighbours
        if len(rows) > 1:
            columns = [named[name][1][rows] for name in names]
            some, parts = score_columns(prepare(x, distance, rows, normalise), columns, null, max_neighbours,
                                        ties, permutations, queries, seed, per_value, threads, memory_mib,
                                        tick)
        parts = iter(parts)
        for name, score in zip(names, some):
            values = dict(zip(named[name][0].tolist(), parts)) if per_value else None
            scores[name] = score._replace(missing=len(x) - len(rows), by_value=values)
    scores = corrected({name: scores[name] for name in named})
    if per_value:
        values = corrected({(name, v): s for name in named for v, s in scores[name].by_value.items()})
        for (name, value), score in values.items():
            scores[name].by_value[value] = score
    return scores if isinstance(labels, dict) else scores[""]


def corrected(scores):
    """{name: Score} with p_holm where there are p-values: Holm's correction over all of them."""
    tested = {name: s.p_value for name, s in scores.items() if s.p_value is not None}
    adjusted = dict(zip(tested, holm(list(tested.values())).tolist()))
    return {name: s._replace(p_holm=adjusted.get(name)) for name, s in scores.items()}


def score_columns(space, labels, null, max_neighbours, ties, permutations, queries, seed, per_value, threads,
                  memory_mib, tick):
    """Scores of columns (list of k) in which every picture of the space has a value, and of their values."""
    n, columns = len(space.rows), make_columns(labels, max_neighbours)
    chosen = np.arange(n)
    if queries is not None and queries < n:
        chosen = np.sort(np.random.default_rng([seed, 0]).choice(n, queries, replace=False))
    moments = null_moments(columns.entry_count, columns.entry_depth, n, null)
    width = len(columns.entry_depth)
    owners = [columns.entry_owner, np.arange(width)]      # whose a value's hits are: its property's, its own
    tested = owners if per_value and width * permutations <= MOST_TESTED else owners[:1]
    per_pass = permutations_at_a_time(columns, memory_mib) if permutations else 1  # and the observed
    statistics = [[] for _ in tested]
    for begin in range(0, max(1, permutations), per_pass):
        last, first = min(begin + per_pass, permutations), int(begin == 0)
        drawn = np.tile(np.arange(n, dtype=np.int32), (first + last - begin, 1))
        for i in range(begin, last):
            drawn[first + i - begin] = np.random.default_rng([seed, 1 + i]).permutation(n)
        batch = permute_columns(columns, drawn) if permutations else columns
        share = memory_mib * (1 - PLANES) if permutations else memory_mib
        blocks = count_blocks(space, batch, chosen, threads, share, ties == "index")
        sums, used, squares, tied = sum_hits(blocks, batch, chosen, tick)
        if begin == 0:
            scores = [observe(sums[0], used[0], squares, tied, columns, owner, *moments, len(chosen) < n)
                      for owner in owners]
        for owner, statistic in zip(tested, statistics):
            statistic += [mean_z(s, u, columns, owner, *moments) for s, u in zip(sums, used)]
    if permutations:
        for i, statistic in enumerate(statistics):
            p = p_values(statistic[0], np.array(statistic[1:])).tolist()
            scores[i] = [s._replace(p_value=one) for s, one in zip(scores[i], p)]
    return scores


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


def sum_hits(blocks, columns, queries, tick):
    """Add up the hits X of count_blocks(), columns (copies · k, N), by copy and value.

    For the t = width rows of the value tables: sums of X (copies, t), queries (copies, t), and of the first
    copy sums of X² and tied queries (t,), added in the order of the queries: no blocks can change them.
    """
    copies, width = 1 if columns.copies is None else len(columns.copies), len(columns.entry_depth)
    (sums, used), (squares, tied) = np.zeros((2, copies * width)), np.zeros((2, width))
    first = np.repeat(np.arange(copies) * width, len(columns.values))[:, None]
    for part, hits in blocks:
        place, x = (first + values_of(columns, queries[part])).ravel(), hits[0].ravel().astype(np.float64)
        at, observed = np.flatnonzero(hits[1]), len(place) // copies
        group, right, places = hits[1:].reshape(3, -1)[:, at].astype(np.float64)
        x[at] += right * places / group
        np.add.at(sums, place, x)
        np.add.at(used, place, 1)
        np.add.at(squares, place[:observed], x[:observed] ** 2)
        np.add.at(tied, place[at[at < observed]], 1)
        tick(len(place))
    return sums.reshape(copies, width), used.reshape(copies, width), squares, tied


def mean_z(sums, used, columns, owner, mean, deviation):
    """NR-Prec of each owner of values: hits summed, then standardised value by value. R = 0 is left out."""
    valid = columns.entry_depth > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        z = np.where(valid & (used > 0), (sums - used * mean) / deviation, 0.0)
        return np.bincount(owner, z) / np.bincount(owner, np.where(valid, used, 0))


def observe(sums, used, squares, tied, columns, owner, mean, deviation, sampled):
    """The observed Scores of each owner of values; with the standard error where the queries are a sample."""
    depth = columns.entry_depth
    asked = np.where(depth > 0, used, 0)
    queries = np.bincount(owner, asked).astype(int)
    skipped = np.bincount(owner, used).astype(int) - queries
    population = np.bincount(owner, np.where(depth > 0, columns.entry_count, 0))
    statistic = mean_z(sums, used, columns, owner, mean, deviation)
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


# ---------------------------------------------------------------- the command

def parse_arguments(argv):
    from dml_common import command

    parser = command.parser(__doc__)
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="EMB.npy …, embeddings (n, m), and behind them PROPS.csv, a "
        "header and n rows, or LABELS.npy (the props.csv beside each EMB.npy, or in results/<dataset>)")
    add("--properties", metavar="A,B", help="only these columns (all but a first one of names)")
    add("--missing", metavar="A,B", help="spellings of no value, beside the empty cell: such a picture is no "
        "query and no candidate of that property (nan,NA,N/A,null, and None among numbers)")
    add("--bin", action="append", default=[], metavar="PROPERTY=N",
        help="cut a numeric column into N quantile bins, named by their largest number; repeatable")
    add("--distance", default="euclidean", choices=[*DISTANCES, "own"], help="what is near (euclidean); own: "
        "the loss's of Eq. 3, named by the JSON beside the array, on normalised embeddings")
    add("--normalise", action="store_true", help="embeddings to length 1 first")
    add("--null", default="binomial", choices=NULLS, help="chance's hits (binomial; hypergeometric is exact)")
    add("--ties", default="expected", choices=TIES, help="candidates equally far where the R end count with "
        "their expectation over all orders of the rows, or by index, the first ones (expected)")
    add("--max-neighbours", type=int, metavar="K", help="look at min(R, K) (all R)")
    add("--as-published", action="store_true", help="as Table 6: --distance euclidean of what the network "
        "returns, --null binomial, --max-neighbours 1023, --ties index")
    add("--permutations", type=int, default=0, metavar="N", help="of each property, for p-values (none)")
    add("--queries", type=int, metavar="N", help="a random subset of N queries, with standard errors (all)")
    add("--per-value", action="store_true", help="to --out also each value: which colours, which models")
    add("--seed", type=int, default=0, help="of permutations and query subset (0)")
    add("--threads", type=int, default=command.available_cpus(), metavar="N", help="cores to use (all)")
    add("--memory-mib", type=int, default=512, metavar="N", help="for blocks, permuted labels (512)")
    add("--out", metavar="FILE.csv", help="also write a row for each embedding file and property")
    return command.parse_as_published(parser, argv, PUBLISHED)


def rows_of(array, distance, normalise, scores, args):
    """The rows of nrprec.csv of one embedding: a property's, and with --per-value its values' behind it."""
    from dml_common import files

    for name, whole in scores.items():
        parts = whole.by_value or {}
        order = sorted(parts, key=float if all(map(files.is_number, parts)) else str)
        for value, s in [("", whole), *((value, parts[value]) for value in order)]:
            yield [array, name, *s[:3], distance, args.null, args.max_neighbours, *s[3:6], args.permutations,
                   s.p_value, s.p_holm, int(normalise), args.ties, s.tied, whole.missing, value]


def main(argv=None):
    from dml_common import command, files, properties

    args = parse_arguments(argv)
    options = {name: getattr(args, name) for name in ("null", "ties", "max_neighbours", "permutations",
                                                      "queries", "seed", "threads", "memory_mib")}
    check_options(DISTANCES[0], **options)
    arrays, tables = files.arrays_and_tables(args.files)
    if args.per_value and args.out is None:
        raise ValueError("--per-value needs --out FILE.csv, where the rows of the values are written")
    if args.out is not None:
        files.check_output(args.out, [*arrays, *tables])
    if _knn is None:
        command.say("note: this version's _knn is not built (pip install .): NumPy counts, exact but slow")
    known, results, rows, names = {}, [], [], command.short_names(arrays)
    own = args.distance == "own"
    distances = [files.read_sidecar(array).get("distance") if own else args.distance for array in arrays]
    for array, distance in zip(arrays, distances):
        if distance not in DISTANCES:
            raise ValueError(f"--distance own: no JSON beside {array} names its distance; give one of "
                             f"{', '.join(DISTANCES)} and --normalise")
    normalise = args.normalise or own
    for array, table, name, distance in zip(arrays, tables, names, distances):
        pictures, notes = files.picture_names(array), []
        files.check_input(table, files.TABLE)
        content = files.files_digest([table]), pictures and files.pictures_sha256(pictures)
        if first := content not in known:                 # the tables of a fold's networks are equal
            known[content] = properties.read(table, pictures, args, notes)
        labels = known[content]
        if results and list(labels) != list(results[0]):
            raise ValueError(f"{tables[0]} and {table} have different properties; give networks of one data "
                             "set, or --properties")
        x = files.open_embeddings(array, table, len(next(iter(labels.values()))))
        try:
            x = as_embeddings(x, distance, normalise)
        except ValueError as error:
            raise ValueError(f"{array}: {error}") from None
        for line in notes:
            command.say(f"note: {line}")
        coded = {prop: encode(label) for prop, label in labels.items()}
        for line in properties.warnings(coded, args) if first else ():
            command.say(f"warning: {line}" if len(set(tables)) == 1 else f"warning: {table}: {line}")
        collapsed = all((x[part] == x[0]).all() for part in slices(*x.shape))
        if collapsed:
            command.say(f"warning: {array}: all {len(x):,} embeddings are equal: none is nearer than another")
        share, k = args.memory_mib, len(labels)
        if args.permutations:
            columns = make_columns([codes for _, codes in coded.values()])
            share *= 1 - PLANES
            k *= 1 + min(args.permutations, permutations_at_a_time(columns, args.memory_mib))
        workers, _, all_of_them = fit(x, len(x), k, args.permutations > 0, args.threads, share)
        if workers < args.threads:
            command.say(f"note: {array}: --memory-mib {args.memory_mib} holds {workers} of {args.threads} "
                        f"threads at work, {np.ceil(args.memory_mib / share * all_of_them):.0f} all of them")
        with command.bar(1.0, name) as bar:
            scores = nr_precision(x, labels, distance=distance, normalise=normalise, **options,
                                  per_value=args.per_value,
                                  progress=lambda done, total, bar=bar: bar.update(done / total - bar.n))
        tied, prop = max((s.tied / max(s.queries, 1), prop) for prop, s in scores.items())
        if tied > MANY_TIES and not collapsed:
            command.say(f"warning: {array}: {tied:.0%} of the queries of {prop} have candidates at the same "
                        f"distance where their list ends; {TIES[args.ties]}")
        rows += rows_of(array, distance, normalise, scores, args)
        results.append(scores)
    for prop, s in results[0].items():
        if s.skipped:
            command.say(f"warning: {prop}: {s.skipped:,} of {s.skipped + s.queries:,} queries skipped, no "
                        "other picture has their value")
        if args.permutations and any(one.p_value is None for one in (s.by_value or {}).values()):
            command.say(f"note: {prop}: {s.values:,} values × {args.permutations:,} permutations are too "
                        "many: its values have no p-values")
    if args.out is not None:
        files.write_table(args.out, HEADER, rows)
    properties.print_results(names, results, args.permutations)


if __name__ == "__main__":
    command.run(main, stopped="stopped")
