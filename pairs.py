"""How far apart are same-class and different-class pairs of an embedding? Histograms of all inner products,
their Jensen-Shannon divergence (JSD), Recall@K, R-Precision and MAP@R, exact at any size (Oi et al., 2022).

    python pairs.py examples/cars/emb.npy examples/cars/props.csv --label model
    python pairs.py a/emb.npy b/emb.npy labels.csv --out pairs.csv --histograms hist.csv --figure fig1.png
    python pairs.py emb.npy labels.csv --bins 50,100,200,400                 # what the paper does not state
    python pairs.py results/cars/*/fold*/emb.npy --label model               # each with the table beside it
    python pairs.py test.npy test.csv --train train.npy train.csv            # Fig. 2 and 4: are they alike?
    python pairs.py emb.npy labels.csv --classes 5,10,20,50 --class-figure classes.png --intervals i.csv

Reads: embeddings as .npy, (n, m); labels as .csv, a header and a row a picture, matched by name
where both sides have names, else in order; or as .npy, (n,).
Writes: a table on stdout; with --out one CSV row for each embedding file and number of bins; figures as PNG
(figures.py draws them: copy it too).
In Python: pair_scores(embeddings, labels): arrays in, and only numpy and scipy are needed
(with the extension _knn: fast; without: the same numbers, slowly).
"""
if __name__ == "__main__":  # Ctrl-C ends in one line from here on
    import sys

    try:
        from dml_common import command
    except ImportError:
        print("pairs.py: the command needs the folder dml_common/ beside it; copy that too", file=sys.stderr)
        sys.exit(2)
    command.begin()

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

try:
    import _knn
except ImportError:
    _knn = None
if getattr(_knn, "INTERFACE", None) != 8:  # not built, or from another _knn.pyx
    _knn = None  # the NumPy twins count_pairs_numpy() and rank_queries_numpy() count instead

PANEL = 32                 # rows whose numbers stand side by side for the kernel
ROWS, COLUMNS = 1920, 1024  # of a tile of pairs that a thread counts at a time, at most
RANKED = 240               # rows that it ranks at a time
SIDE_BY_SIDE = 4           # embeddings on the terminal; more are printed one in a row
MOST_BINS = 32_000         # a 16-bit key has to hold them
TIES = {"expected": "they count with their expectation", "index": "the order of the rows decides"}
MANY_TIES = 0.01           # of the queries: then it is said
LEVEL = 0.95               # of the intervals
BOOTSTRAP = 1000           # resamples of the classes


# ---------------------------------------------------------------- all pairs into histograms

class Space(NamedTuple):
    """Embeddings prepared for inner products of normalised rows."""
    x: np.ndarray      # (N, m) float16, float32 or float64 as they came, taken as float32
    rows: np.ndarray   # (n,) int64: where in x the embeddings stand
    unit: np.ndarray   # (n, m) float32, normalised
    norms: np.ndarray  # (n,) float64
    bound: float       # |float32 product of two unit rows − true inner product| is at most this

    def numbers(self, part):
        """Some of the embeddings, float32 numbers as float64 (…, m)."""
        return self.x[self.rows[part]].astype(np.float32).astype(np.float64)

    def source(self):
        """What the kernel takes these numbers from."""
        return self.x.view(np.uint8), self.x.itemsize, self.rows


def normalise(x, rows=None):
    """Embeddings x (N, m) as they came, or their rows (n,) -> Space. ValueError: a zero vector."""
    rows = np.arange(len(x)) if rows is None else rows
    n, m = len(rows), x.shape[1]
    # Rounding of the unit rows and of m float32 terms in any order; 5 % for second order; what underflows.
    bound = 1.05 * 2.0 ** -24 * (m + 8) + (m + 4) * 2.0 ** -125
    space = Space(x, rows, np.empty((n, m), np.float32), np.empty(n), bound)
    for part in slices(n, m):
        numbers = space.numbers(part)
        space.norms[part] = norms = np.sqrt((numbers ** 2).sum(1))
        if not norms.all():
            raise ValueError(f"row {rows[part][norms.argmin()]} is a zero vector: it has no inner product; "
                             "remove that picture")
        space.unit[part] = numbers / norms[:, None]
    return space


def slices(n, m):
    """Parts of n rows, a million numbers each."""
    step = max(1, (1 << 20) // m)
    return [slice(start, start + step) for start in range(0, n, step)]


def bin_numbers(s, bins):
    """The definition that all histograms equal: equal bins over [−1, 1], 1 in the last. s: float64 array."""
    return np.clip(np.floor((s + 1.0) * (0.5 * bins)), 0, bins - 1).astype(np.int64)


def count_pairs_numpy(space, order, ranges, groups, bins):
    """The plain twin of the kernel: the same counts by float64 inner products, row by row."""
    counts = np.zeros((groups[-1] + 1, 2, sum(bins)), np.int64)
    unit = space.numbers(order) / space.norms[order, None]
    for p, (begin, split, end) in enumerate(ranges.T):
        s, at = (unit[p] * unit[begin:end]).sum(1), 0
        for b in bins:
            for side, part in enumerate((s[:max(0, split - begin)], s[max(0, split - begin):])):
                counts[groups[p], side, at:at + b] += np.bincount(bin_numbers(part, b), minlength=b)
            at += b
    return counts


def in_turn(work, jobs, threads):
    """Yield work(*job) in the order of the jobs, from so many threads."""
    pool, waiting = ThreadPoolExecutor(threads), deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(work, *job))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)                # Ctrl-C: what has begun ends, nothing else begins


def count_pairs(space, order, ranges, groups, bins, threads, progress=None):
    """Histograms of inner products of the row at position p with those at begin <= q < split <= q < end.

    order (n,): position p holds row order[p]; ranges (3, n): begin, split, end; groups (n,) ascending from 0.
    Returns counts (groups, 2, Σ bins) int64. Tile by tile; each thread multiplies and counts its own.
    """
    if _knn is None:
        return count_pairs_numpy(space, order, ranges, groups, bins)
    unit, kinds = space.unit, np.array(bins, np.int64)
    n, panels = len(order), _knn.panels_of(unit[order])
    rows = max(12, min(ROWS, n // (4 * threads) // 12 * 12))      # a dozen are multiplied at a time
    counts = np.zeros((groups[-1] + 1, 2, sum(bins)), np.int64)

    def tiles():
        for a in range(0, n, rows):
            b = min(a + rows, n)
            last = int(ranges[2, a:b].max())
            for c in range(int(ranges[0, a:b].min()) // PANEL * PANEL, last, COLUMNS):
                yield a, b, c, min(c + COLUMNS, last)

    def count(a, b, c, d):
        tile = np.zeros((groups[b - 1] - groups[a] + 1, 2, sum(bins)), np.int64)
        _knn.pair_histogram(unit[order[a:b]], panels[c // PANEL:-(-d // PANEL)], a, c, ranges, groups, order,
                            *space.source(), space.norms, space.bound, kinds, tile)
        return a, b, tile, (b - a) * (d - c)

    for a, b, tile, size in in_turn(count, tiles(), threads):
        counts[groups[a]:groups[b - 1] + 1] += tile       # integers: no order of tiles can change the sums
        if progress:
            progress(size)
    return counts


def split_bins(counts, bins):
    """counts (…, Σ bins) -> {bins: (…, bins)}."""
    return dict(zip(bins, np.split(counts, np.cumsum(bins)[:-1], axis=-1)))


def jensen_shannon(p, q):
    """JSD (Eq. 5) with base-2 logarithms, in [0, 1], of histograms (…, bins) normalised by their areas."""
    with np.errstate(divide="ignore", invalid="ignore"):
        p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
        middle = (p + q) / 2
        terms = np.where(p > 0, p * np.log2(p / middle), 0.0)
        terms += np.where(q > 0, q * np.log2(q / middle), 0.0)
    empty = np.isnan(p).any(-1) | np.isnan(q).any(-1)     # no pair at all
    return np.where(empty, np.nan, np.clip(terms.sum(-1) / 2, 0.0, 1.0))


def pair_means(space, order, value, sizes):
    """Mean inner products of positive and negative pairs: Σ_{i<j} u_i·u_j = (‖Σ u‖² − Σ ‖u‖²) / 2."""
    n, m = space.unit.shape
    sums, squares = np.zeros((len(sizes), m)), 0.0
    for rows in (order[part] for part in slices(n, m)):
        unit, here = space.numbers(rows) / space.norms[rows, None], value[rows]
        first = np.flatnonzero(np.append(True, here[1:] != here[:-1]))
        sums[here[first]] += np.add.reduceat(unit, first, axis=0)
        squares += (unit ** 2).sum()
    within, all_pairs = (sums ** 2).sum(), (sums.sum(0) ** 2).sum()
    positives = (sizes * (sizes - 1) // 2).sum()
    negatives = n * (n - 1) // 2 - positives
    return float((within - squares) / 2 / positives), float((all_pairs - within) / 2 / negatives)


# ---------------------------------------------------------------- rankings

class Ranks(NamedTuple):
    """Where each row's positives stand among its neighbours: arrays (n,). Equally near ones form a group."""
    begin: np.ndarray     # of the nearest group with positives: candidates before it,
    group: np.ndarray     # in it,
    hits: np.ndarray      # positives in it (group = hits = 1 where it has nothing else; 0: none was seen)
    sure: np.ndarray      # positives that stand among the R nearest for sure
    tied: np.ndarray      # of a group of positives and others that the cut at R divides: candidates,
    right: np.ndarray     # positives,
    places: np.ndarray    # and places left
    precision: np.ndarray  # Σ_{k=1..R} E[Precision@k · p(k)]

    def divided(self, k):
        """Rows whose k-th place lies in their nearest group with positives, and not at its end."""
        return (self.begin < k) & (k < self.begin + self.group)

    def within(self, k):
        """P(a positive among k): 1 − C(t − h, f) / C(t, f) for f places in a group of t with h of them."""
        chance, q = ((self.hits > 0) & (self.begin < k)).astype(np.float64), self.divided(k)
        left, group, hits, miss = k - self.begin[q], self.group[q], self.hits[q], 1.0
        for i in range(left.max(initial=0)):
            miss = miss * np.where(i < left, np.maximum(group - hits - i, 0) / np.maximum(group - i, 1), 1)
        chance[q] = 1 - miss
        return chance


def rank_queries_numpy(space, value, queries, relevant, neighbours, by_index=False):
    """The plain twin of the kernel's rank_hits(): counts (len(queries), 7), precision, by a stable sort."""
    counts, precision = np.zeros((len(queries), 7), np.int64), np.zeros(len(queries))
    unit = space.numbers(slice(None)) / space.norms[:, None]
    for b, (q, r) in enumerate(zip(queries, relevant)):
        d = 1.0 - (unit[q] * unit).sum(1)
        order = np.argsort(d, kind="stable")
        order = order[order != q]
        begin = np.flatnonzero(np.append(True, np.diff(d[order]) > 0) | by_index)
        size = np.diff(np.append(begin, len(order)))
        hits = np.add.reduceat((value[order] == value[q]).astype(np.int64), begin)
        first = int((hits > 0).argmax())
        if r == 0 or begin[first] >= max(r, neighbours):
            continue
        whole = hits[first] == size[first]
        counts[b, :3] = begin[first], 1 if whole else size[first], 1 if whole else hits[first]
        last = int(np.searchsorted(begin, r)) - 1         # the group in which the list of R ends
        places = np.minimum(size, r - begin)[:last + 1]
        before = np.cumsum(hits) - hits
        if places[last] < size[last] and 0 < hits[last] < size[last]:
            counts[b, 3:] = before[last], size[last], hits[last], places[last]
        else:
            counts[b, 3] = before[last] + min(hits[last], places[last])
        g = np.repeat(np.arange(last + 1), places)        # of each place
        others = (hits - 1) / np.maximum(size - 1, 1)
        ahead = before[g] + 1 + (np.arange(r) - begin[g]) * others[g]         # McSherry and Najork (2008)
        precision[b] = np.cumsum(hits[g] / size[g] * ahead / np.arange(1, r + 1))[-1]
    return counts, precision


def rank_queries(space, value, relevant, neighbours, threads, progress=None, by_index=False):
    """Neighbours of each row by cosine distance -> Ranks, exact as far as max(R, neighbours).

    value (n,) int: classes; relevant (n,): R; by_index: of equally near ones the smaller index goes first.
    """
    n = len(value)
    counts, precision = np.zeros((n, 7), np.int64), np.zeros(n)
    value, offset, bounds = value.astype(np.int32), np.zeros(n, np.float32), np.full(n, space.bound)
    rows, panels = max(1, min(RANKED, -(-n // threads))), _knn and _knn.panels_of(space.unit)

    def rank(start):
        q, part = np.arange(start, min(start + rows, n)), slice(start, start + rows)
        if _knn is None:
            counts[part], precision[part] = rank_queries_numpy(space, value, q, relevant[part], neighbours,
                                                               by_index)
        elif relevant[part].any():
            _knn.rank_hits(space.unit[part], panels, q, bounds[part], *space.source(), space.norms, offset,
                           value, relevant[part], neighbours, counts[part], precision[part], by_index)
        return len(q) * n

    for size in in_turn(rank, ((start,) for start in range(0, n, rows)), threads):
        if progress:
            progress(size)
    return Ranks(*counts.T, precision)


# ---------------------------------------------------------------- one embedding's scores

class Score(NamedTuple):
    """One embedding's result. Dictionaries are by the number of bins, and by K."""
    n: int
    missing: int          # further pictures without a label: in no pair
    classes: int
    lone: int             # pictures whose class has no other: no positives, and no queries
    tied: int             # queries whose R or K divides a group of positives and others at the same distance
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
    intervals: dict       # {("jsd", bins), ("recall", K), ("r_precision", None), …: (low, high)}


def has_value(label):
    """Which pictures have a value of a column (n,): bool (n,). None is nan, None or an empty text."""
    if label.dtype.kind == "O":
        return np.array([value is not None and value == value and value != "" for value in label])
    return label != label.dtype.type() if label.dtype.kind in "US" else label == label


def available_threads():
    """The cores that this process may use (a scheduler may grant fewer than the machine has)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pair_scores(embeddings, labels, *, bins=(200,), recall=(1, 2, 4, 8), ties="expected", permutations=10,
                intervals=False, seed=0, threads=None, progress=None):
    """Pair histograms and their JSD (Oi et al., section 3), Recall@K, R-Precision and MAP@R.

    embeddings    (n, m) real numbers, used as float32; finite, no zero vector
    labels        (n,) of any comparable kind: at least two classes, one of them with two rows. A picture
                  whose label is nan, None or "" is in no pair
    bins          numbers of equal bins over [−1, 1]
    recall        the K's
    ties          equally near candidates: expected, what all orders of the rows give on average; index, the
                  smaller index goes first
    permutations  of the labels for jsd_null: JSD of few positives is biased up; this shows by how much
    intervals     also 95 % intervals: bootstrap over classes (means over queries), jackknife (JSD)
    seed          of the permutations and the bootstrap; threads: all that this process may use
    progress      called with (done, total) after each block

    Returns a Score. Exact: equal to float64 brute force, whatever the threads, blocks and processor.
    Raises ValueError for shapes that do not fit, numbers that are not finite and options out of range.
    """
    if ties not in TIES:
        raise ValueError(f"unknown ties {ties!r}; expected one of {', '.join(TIES)}")
    x, labels = check_arguments(embeddings, labels, bins, recall, permutations, seed, threads)
    rows, threads = np.flatnonzero(has_value(labels)), threads or available_threads()
    n, bins = len(rows), list(dict.fromkeys(bins))
    value, sizes = np.unique(labels[rows], return_inverse=True, return_counts=True)[1:]
    value, relevant = value.reshape(-1), sizes[value.reshape(-1)] - 1          # R of each row
    positives = int((sizes * (sizes - 1) // 2).sum())
    if not positives:
        raise ValueError(f"the {n:,} labels are all distinct: no positive pair; take a coarser label")
    if len(sizes) < 2:
        raise ValueError("there is one class only: no negative pair; choose a label with two values or more")
    done, total = 0.0, n * n * (2.0 if intervals else 1.5) + permutations * positives

    def advance(part):
        nonlocal done
        done = min(total, done + part)
        if progress:
            progress(done, total)

    space, order = normalise(x, rows), np.argsort(value, kind="stable")
    counts = count_classes(space, order, sizes, bins, intervals, threads, advance)
    histograms = split_bins(counts[0], bins)
    jsd = {b: float(jensen_shannon(*histograms[b])) for b in bins}
    null = permuted_divergence(space, sizes, histograms, permutations, seed, threads, advance)

    ranks = rank_queries(space, value, relevant, min(max(recall), n), threads, advance, ties == "index")
    asked, rank = relevant > 0, np.maximum(relevant, 1)
    each = {("recall", k): ranks.within(k) for k in recall}
    each["r_precision", None] = (ranks.sure + ranks.right * ranks.places / np.maximum(ranks.tied, 1)) / rank
    each["map_at_r", None] = ranks.precision / rank
    tied = np.any([ranks.tied > 0, *(ranks.divided(k) for k in recall)], axis=0)
    means = {name: float(e[asked].mean()) for name, e in each.items()}
    bounds = bootstrap(each, value, asked, seed) if intervals else {}
    if intervals:
        parts = split_bins(counts[1:], bins)
        bounds |= {("jsd", b): jackknife(jsd[b], histograms[b], parts[b]) for b in bins}
    return Score(n, len(x) - n, len(sizes), int((~asked).sum()), int(tied.sum()), positives,
                 n * (n - 1) // 2 - positives, *pair_means(space, order, value, sizes), jsd, null,
                 {k: means["recall", k] for k in recall}, means["r_precision", None], means["map_at_r", None],
                 histograms, bounds)


def count_classes(space, order, sizes, bins, apart, threads, advance):
    """Histograms of positive and negative pairs: counts[0] (2, Σ bins) of all; if `apart`, counts[1 + c] of
    those with a picture of class c. order (n,): rows sorted by class."""
    n = len(order)
    start, end = np.repeat(np.cumsum(sizes) - sizes, sizes), np.repeat(np.cumsum(sizes), sizes)
    groups = np.repeat(np.arange(len(sizes)), sizes) if apart else np.zeros(n, np.int64)
    later = np.array([np.arange(1, n + 1), end, np.full(n, n)])   # each pair once: with what follows
    counts = count_pairs(space, order, later, groups, bins, threads, advance)
    total = counts.sum(0, keepdims=True)
    if apart:
        before = np.array([np.zeros(n, np.int64), np.zeros(n, np.int64), start])
        counts[:, 1] += count_pairs(space, order, before, groups, bins, threads, advance)[:, 1]
    return np.concatenate([total, counts]) if apart else total


def permuted_divergence(space, sizes, histograms, permutations, seed, threads, advance):
    """{bins: mean JSD over permutations of the labels}; nan without. Negatives are all pairs − positives."""
    n, end = int(sizes.sum()), np.repeat(np.cumsum(sizes), sizes)
    ranges, drawn = np.array([np.arange(1, n + 1), end, end]), {b: [] for b in histograms}
    for i in range(permutations):                         # the same sizes of classes, filled at random
        order = np.random.default_rng([seed, 1, i]).permutation(n)
        counts = count_pairs(space, order, ranges, np.zeros(n, np.int64), list(drawn), threads, advance)
        for b, (p, _) in split_bins(counts[0], list(drawn)).items():
            drawn[b].append(float(jensen_shannon(p, histograms[b].sum(0) - p)))
    return {b: float(np.mean(values)) if values else float("nan") for b, values in drawn.items()}


def check_arguments(embeddings, labels, bins, recall, permutations, seed, threads):
    """(embeddings (n, m) as they came, labels (n,)); ValueError for what pair_scores() can't work with."""
    x, labels = embeddings, np.asarray(labels)
    if not isinstance(x, np.memmap):
        x = np.asarray(x)
    if np.iscomplexobj(x):
        raise ValueError("embeddings are complex; expected real numbers")
    as_came = x.dtype in (np.float16, np.float32, np.float64)
    x = np.require(x, None if as_came else np.float32, ["C", "A"])
    if x.ndim != 2 or not 2 <= len(x) < 2 ** 31 - 64 or x.shape[1] < 1:
        raise ValueError(f"embeddings have shape {x.shape}; expected (n, m), 2 <= n < 2,147,483,584")
    if labels.shape != (len(x),):
        raise ValueError(f"labels have shape {labels.shape}; expected ({len(x)},), one for each row")
    for part in slices(*x.shape):
        with np.errstate(over="ignore"):
            finite = np.isfinite(x[part].astype(np.float32)).all(1)
        if not finite.all():
            raise ValueError(f"row {part.start + int(finite.argmin())} of the embeddings is not finite")
    for name, values, least in (("bins", bins, 1), ("recall", recall, 1), ("permutations", [permutations], 0),
                                ("seed", [seed], 0), ("threads", [1 if threads is None else threads], 1)):
        if not len(values) or min(values) < least:
            raise ValueError(f"{name}: {min(values, default='none')}; expected at least {least}")
    if max(bins) > MOST_BINS:
        raise ValueError(f"bins: {max(bins):,}; expected at most {MOST_BINS:,}")
    return x, labels


def bootstrap(each, value, asked, seed, resamples=BOOTSTRAP):
    """{name: (low, high)} of means over queries: percentiles over resampled classes, with their queries."""
    names, classes = list(each), np.unique(value[asked])
    code = np.searchsorted(classes, value[asked])
    sums = np.array([np.bincount(code)] + [np.bincount(code, each[name][asked]) for name in names]).T
    rng, drawn = np.random.default_rng([seed, 2]), np.empty((resamples, len(names)))
    for i in range(resamples):
        picked = sums[rng.integers(0, len(classes), len(classes))].sum(0)
        drawn[i] = picked[1:] / picked[0]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return {name: (float(a), float(b)) for name, a, b in zip(names, low, high)}


def jackknife(observed, histograms, parts):
    """(low, high) of the JSD: each class left out once, with all its pairs; Student's t.

    histograms (2, bins); parts (classes, 2, bins): the pairs with a picture of that class. Counts are exact.
    (nan, nan) where without some class no positive or no negative pair is left.
    """
    c = len(parts)
    with np.errstate(invalid="ignore"):
        left = jensen_shannon(histograms[0] - parts[:, 0], histograms[1] - parts[:, 1])
    half = stdtrit(c - 1, (1 + LEVEL) / 2) * np.sqrt((c - 1) / c * ((left - left.mean()) ** 2).sum())
    return float(np.clip(observed - half, 0, 1)), float(np.clip(observed + half, 0, 1))


def class_subsets(labels, numbers, repeats, seed):
    """Yield (number of classes, repeat, rows) of random subsets of the classes with at least two pictures."""
    classes, sizes = np.unique(labels[has_value(labels)], return_counts=True)
    classes = classes[sizes > 1]
    if max(numbers, default=0) > len(classes):
        raise ValueError(f"there are {len(classes):,} classes of two or more pictures, not {max(numbers):,}")
    for k in numbers:
        for r in range(repeats if k < len(classes) else 1):        # all of them: one way only
            drawn = np.random.default_rng([seed, 3, k, r]).choice(len(classes), k, replace=False)
            yield k, r, np.flatnonzero(np.isin(labels, classes[drawn]))


# ---------------------------------------------------------------- the command

class Result(NamedTuple):
    """What one row of the outputs is about."""
    file: str
    name: str
    split: str      # test, or train
    subset: int     # classes of a random subset, None: all
    repeat: int
    score: Score

    def value(self, key):
        """A number of the score: ("jsd", bins), ("jsd_null", bins), ("recall", K), ("map_at_r", None), …"""
        field, number = key
        value = getattr(self.score, field)
        return value if number is None else value[number]


def parse_arguments(argv):
    from dml_common import command

    parser = command.parser(__doc__)
    add = parser.add_argument
    add("files", nargs="+", metavar="FILE", help="EMB.npy …, embeddings (n, m), behind them labels.csv or "
        "props.csv, a header and n rows, or LABELS.npy (the one beside each EMB.npy, or in "
        "results/<dataset>)")
    add("--label", default="class", metavar="COLUMN", help="whose equal values make a pair positive (class)")
    add("--missing", metavar="A,B", help="what stands for no label, beside an empty cell (nan,NA,N/A,null; "
        "None among numbers): such a picture is in no pair")
    add("--bins", default="200", metavar="N[,N]",
        help="equal bins over [-1, 1], several in one pass (200; the paper does not state its own)")
    add("--recall", default="1,2,4,8", metavar="K[,K]",
        help="the K's of Recall@K (1,2,4,8; 1,10,100,1000 is usual for SOP)")
    add("--ties", default="expected", choices=TIES, help="equally near candidates: expected, what all orders "
        "of the rows give on average; index, the first rows first (expected)")
    add("--permutations", type=int, default=10, metavar="N", help="of the labels, for jsd_null: the JSD if "
        "labels meant nothing, which is not 0 with few pairs (10; 0: none)")
    add("--train", nargs=2, metavar=("EMB.npy", "LABELS.csv"), help="the training split: rows of its own, a "
        "column `split`; the paper reads a JSD above the test split's as overfitting")
    add("--classes", default="", metavar="N[,N]", help="also random subsets of so many classes (of two or "
        "more pictures): does a metric depend on their number?")
    add("--repeats", type=int, default=10, metavar="N", help="subsets for each number (10)")
    add("--out", metavar="FILE.csv", help="a row for each embedding file, subset and number of bins")
    add("--histograms", metavar="FILE.csv", help="the counts of every bin")
    add("--intervals", metavar="FILE.csv", help="95%% intervals over classes, printed too: bootstrap "
        "percentiles for means over queries, delete-one-class jackknife for the JSD; counts all pairs twice")
    add("--figure", metavar="FILE.png", help="the histograms before and after normalising (Fig. 1)")
    add("--class-figure", metavar="FILE.png", help="the metrics against the number of classes")
    add("--seed", type=int, default=0, help="of permutations, subsets and bootstrap (0)")
    add("--threads", type=int, default=command.available_cpus(), metavar="N", help="cores to use (all)")
    return parser.parse_intermixed_args(argv)


def whole_numbers(option, text, least):
    """"1,2,4" -> [1, 2, 4], each once, in the order given."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise ValueError(f"--{option} {text}: expected whole numbers from {least}, between commas")
    return list(dict.fromkeys(map(int, parts)))


def score_file(file, table, name, split, args, options, numbers):
    """The Results of one embedding: of all classes first, then of the random subsets."""
    from dml_common import command, files

    notes, pictures = [], files.picture_names(file)
    missing = files.missing_spellings(args.missing)
    try:
        labels = files.read_properties(table, [args.label], pictures, notes, missing)[args.label]
    except ValueError as error:
        raise ValueError(f"{error} (column of --label)") from None
    x = files.open_embeddings(file, table, len(labels))
    for note in notes:
        command.say(f"note: {note}")
    try:
        subsets = list(class_subsets(labels, numbers, args.repeats, args.seed))
        with command.bar(1.0, name) as bar:
            step = 1 / (1 + len(subsets))
            score = pair_scores(x, labels, intervals=args.intervals is not None, **options,
                                progress=lambda done, total: bar.update(done / total * step - bar.n))
            results = [Result(file, name, split, None, None, score)]
            for k, repeat, rows in subsets:
                some = np.full_like(labels, "")           # the others' labels are missing
                some[rows] = labels[rows]
                results.append(Result(file, name, split, k, repeat, pair_scores(x, some, **options)))
                bar.update(step)
    except ValueError as error:
        raise ValueError(f"{file}, {args.label} of {table}: {error}") from None
    for line in warnings_of(name, x, score, args):
        command.say(f"warning: {line}")
    return results


def warnings_of(name, x, score, args):
    """What a reader of the scores of embeddings x (n, m) must know, a line each."""
    n, tied = score.n, score.tied / (score.n - score.lone)
    if score.missing:
        yield f"{name}: {score.missing:,} of {n + score.missing:,} pictures have no {args.label}: in no pair"
    if score.lone:
        yield (f"{name}: {score.lone:,} of {n:,} pictures are alone in their class: they make no positive "
               "pair and are no queries")
    if all((x[part] == x[0]).all() for part in slices(*x.shape)):
        yield f"{name}: all {len(x):,} embeddings are equal: none is nearer than another"
    elif tied > MANY_TIES:
        yield (f"{name}: {tied:.0%} of the queries have positives and others at the same distance where a "
               f"list ends; {TIES[args.ties]}")
    if any(np.isnan(low) for low, _ in score.intervals.values()):
        yield (f"{name}: without one of its {score.classes:,} classes no positive or no negative pair is "
               "left, so the JSD has no interval (nan)")


def print_table(results, bins, recall):
    """Metrics in rows, embeddings side by side (many: one in a row); intervals where they were asked for."""
    from dml_common import command

    def cell(result, key):
        value, interval = result.value(key), result.score.intervals.get(key)
        text = f"{value:,}" if isinstance(value, int) else f"{round(value, 4) + 0.0:.4f}"    # never −0.0000
        return f"{text} [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else text

    metrics = [("pictures", "n", None)]
    for name in ("classes", "positive pairs", "negative pairs", "positive mean", "negative mean"):
        metrics.append((name, name.replace(" ", "_"), None))
    for b in bins:
        metrics += [(f"JSD, {b:,} bins", "jsd", b), ("  labels permuted", "jsd_null", b)]
    metrics += [(f"Recall@{k}", "recall", k) for k in recall]
    metrics += [("R-Precision", "r_precision", None), ("MAP@R", "map_at_r", None)]
    lines = [["", *(r.name for r in results)]]
    for name, *key in metrics:
        lines.append([name, *(cell(r, tuple(key)) for r in results)])
    command.print_aligned(lines if len(results) <= SIDE_BY_SIDE else list(zip(*lines)))
    if results[0].score.intervals:
        print(f"\n[ ] {LEVEL:.0%} intervals over classes: {BOOTSTRAP:,} bootstrap resamples of the classes "
              "(Recall, R-Precision, MAP@R);")
        print("    each class left out once, with all its pairs (JSD: jackknife, Student's t)")


def subset_curves(results, numbers, bins, recall):
    """{metric: (means, standard deviations) over the subsets of numbers[0] classes, …} of one embedding."""
    metrics = {"JSD": ("jsd", bins), f"Recall@{recall}": ("recall", recall), "MAP@R": ("map_at_r", None)}
    if not np.isnan(results[0].score.jsd_null[bins]):
        metrics["JSD, labels permuted"] = ("jsd_null", bins)
    curves = {}
    for name, key in metrics.items():
        values = [[r.value(key) for r in results if r.subset == k] for k in numbers]
        curves[name] = [np.mean(v) for v in values], [np.std(v) for v in values]
    return curves


def print_subsets(name, curves, numbers):
    """Mean ± standard deviation over the subsets, and how far the mean moves from few classes to many."""
    from dml_common import command

    print(f"\n{name}: random subsets of classes, mean ± standard deviation over the subsets")
    lines = [["classes", *curves]]
    for i, k in enumerate(numbers):
        lines.append([f"{k}", *(f"{means[i]:.4f} ± {spread[i]:.4f}" for means, spread in curves.values())])
    with np.errstate(divide="ignore", invalid="ignore"):
        change = [f"{means[-1] / means[0] - 1:+.1%}" for means, _ in curves.values()]
    command.print_aligned([*lines, [f"{numbers[0]} to {numbers[-1]}", *change[:3], *[""] * len(change[3:])]])


def write_tables(args, results, bins, numbers):
    """The CSV files that were asked for, each whole or not at all."""
    from dml_common import files

    rows, counts, intervals = [], [], []
    for r in results:
        s, source = r.score, {"embeddings": r.file, "label": args.label}
        split = {"split": r.split} if args.train else {}
        drawn = {"classes": s.classes, "repeat": r.repeat} if numbers else {}
        for b in bins:
            rows.append({**split, **drawn, **source, "n": s.n, "positive_pairs": s.positive_pairs,
                         "negative_pairs": s.negative_pairs, "positive_mean": s.positive_mean,
                         "negative_mean": s.negative_mean, "jsd": s.jsd[b],
                         "jsd_null": s.jsd_null[b] if args.permutations else None, "bins": b,
                         **{f"recall_at_{k}": value for k, value in s.recall.items()},
                         "r_precision": s.r_precision, "map_at_r": s.map_at_r, "ties": args.ties,
                         "tied": s.tied, "missing": s.missing if r.subset is None else None})
        for b, (positive, negative) in s.histograms.items() if r.subset is None else ():
            for i, (p, q) in enumerate(zip(positive.tolist(), negative.tolist())):
                counts.append({**split, **source, "bins": b, "low": 2 * i / b - 1,
                               "high": 2 * (i + 1) / b - 1, "positive": p, "negative": q})
        for key, (low, high) in s.intervals.items():
            metric, number = key
            jsd = metric == "jsd"
            metric = f"recall_at_{number}" if metric == "recall" else metric
            intervals.append({**split, **source, "metric": metric, "bins": number if jsd else None,
                              "value": r.value(key), "low": low, "high": high, "level": LEVEL,
                              "method": "jackknife" if jsd else "bootstrap",
                              "jsd_null": s.jsd_null[number] if jsd and args.permutations else None})
    for path, lines in ((args.out, rows), (args.histograms, counts), (args.intervals, intervals)):
        if path is not None:
            files.write_table(path, list(lines[0]), [line.values() for line in lines])


def main(argv=None):
    from dml_common import command, files

    args = parse_arguments(argv)
    bins, recall = whole_numbers("bins", args.bins, 1), whole_numbers("recall", args.recall, 1)
    numbers = sorted(whole_numbers("classes", args.classes, 2)) if args.classes else []
    command.at_least(args, permutations=0, repeats=1, seed=0, threads=1)
    if args.class_figure is not None and not numbers:
        raise ValueError("--class-figure needs --classes: the numbers of classes to compare")
    arrays, tables = files.arrays_and_tables(args.files, args.label)
    outputs = [args.out, args.histograms, args.intervals, args.figure, args.class_figure]
    for i, path in enumerate(outputs):
        if path is not None:
            files.check_output(path, [*arrays, *tables, *(args.train or [])], outputs[:i])
    figures = command.import_figures() if args.figure is not None or args.class_figure is not None else None
    if _knn is None:
        command.say("note: this version's _knn is not built (pip install .): NumPy counts, exact but slow")
    names, splits = command.short_names(arrays), ["test"] * len(arrays)
    if args.train:
        names = ["test"] if len(names) == 1 else [f"{name}, test" for name in names]
        arrays, tables = [*arrays, args.train[0]], [*tables, args.train[1]]
        names, splits = [*names, "train"], [*splits, "train"]

    options = {"bins": bins, "recall": recall, "ties": args.ties, "permutations": args.permutations,
               "seed": args.seed, "threads": args.threads}
    results = []
    for job in zip(arrays, tables, names, splits):
        results += score_file(*job, args, options, numbers)
    whole = [r for r in results if r.subset is None]
    write_tables(args, results, bins, numbers)
    curves = [(r.name, subset_curves([s for s in results if s.name == r.name], numbers, bins[0], recall[0]))
              for r in whole if numbers]
    if args.figure is not None:
        panels = []
        for r in whole:
            positive, negative = r.score.histograms[bins[0]]
            panels.append({**r.score._asdict(), "name": r.name, "positive": positive, "negative": negative,
                           "jsd": r.score.jsd[bins[0]],
                           "jsd_null": r.score.jsd_null[bins[0]] if args.permutations else None})
        files.write_file(args.figure, figures.png(figures.draw_pair_histograms(panels)))
    if args.class_figure is not None:
        files.write_file(args.class_figure, figures.png(figures.draw_class_curves(curves, numbers)))
    print_table(whole, bins, recall)
    for name, curve in curves:
        print_subsets(name, curve, numbers)


if __name__ == "__main__":
    command.run(main, stopped="stopped")
