"""How far apart are same-class and different-class pairs of an embedding? Histograms of all inner products, their
Jensen-Shannon divergence (JSD), Recall@K, R-Precision and MAP@R, exact at any size (Oi et al., 2022).

    python pairs.py examples/cars/emb.npy examples/cars/props.csv --label model
    python pairs.py a/emb.npy b/emb.npy labels.csv --out pairs.csv --histograms hist.csv --figure fig1.png
    python pairs.py emb.npy labels.csv --bins 50,100,200,400                 # what the paper does not state
    python pairs.py results/cars/*/fold*/emb.npy --label model               # each with the table that embed.py left
    python pairs.py test.npy test.csv --train train.npy train.csv            # Fig. 2 and 4: are they alike?
    python pairs.py emb.npy labels.csv --classes 5,10,20,50 --class-figure classes.png --intervals intervals.csv

Reads: embeddings as .npy, (n, m); labels as .csv with a header and n rows in the same order.
Writes: a table on stdout; with --out one CSV row for each embedding file and number of bins; figures as PNG.
In Python: pair_scores(embeddings, labels), which takes arrays and needs only numpy, scipy and threadpoolctl
(with the extension _knn beside it: fast; without: the same numbers, slowly).
"""
import argparse
import io
import os
import sys
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
PERMUTED = "JSD, labels permuted"
RED, BLUE, GREEN, GREY = (214, 39, 40), (31, 119, 180), (44, 160, 44), (120, 120, 120)


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
    # Rounding of the unit rows and of m float32 terms in any order; 5 % for second-order terms, then what underflows.
    return Space(x, unit, norms, 1.05 * 2.0 ** -24 * (m + 8) + (m + 4) * 2.0 ** -125)


def bin_numbers(s, bins):
    """The definition that all histograms here equal: equal bins over [−1, 1], 1 in the last. s: any float64 array."""
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
    """Mean inner products of positive and negative pairs, from vector sums: Σ_{i<j} u_i·u_j = (‖Σ u‖² − Σ ‖u‖²) / 2."""
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
    if np.iscomplexobj(embeddings):
        raise ValueError("embeddings are complex; expected real numbers")
    x, labels = np.ascontiguousarray(embeddings, np.float32), np.asarray(labels)
    check_arguments(x, labels, bins, recall, permutations, seed, threads)
    n, threads, counted = len(x), threads or available_threads(), finest(bins)
    value, sizes = np.unique(labels, return_inverse=True, return_counts=True)[1:]
    value, relevant = value.reshape(-1), sizes[value.reshape(-1)] - 1          # R of each row
    positives, negatives = count_kinds(n, sizes)
    done, total = [0.0], n * n * (2.0 if intervals else 1.5) + permutations * positives

    def advance(part):
        done[0] = min(total, done[0] + part)
        if progress:
            progress(done[0], total)

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
    return Score(n, len(sizes), int((~asked).sum()), positives, negatives, *pair_means(space, order, value, sizes),
                 jsd, null, {k: means["recall", k] for k in recall}, means["r_precision", None],
                 means["map_at_r", None], histograms, bounds)


def count_kinds(n, sizes):
    """(positive pairs, negative pairs); ValueError where there are none."""
    positives = int((sizes * (sizes - 1) // 2).sum())
    if not positives:
        raise ValueError(f"the {n:,} labels are all distinct: there is no positive pair; choose a coarser label")
    if len(sizes) < 2:
        raise ValueError("there is one class only: no negative pair; choose a label with at least two values")
    return positives, n * (n - 1) // 2 - positives


def count_classes(space, order, sizes, bins, apart, threads, advance):
    """Histograms of positive and negative pairs: counts[0] (2, Σ bins) of all; apart: counts[1 + c] of those with a
    picture of class c. order (n,): rows sorted by class."""
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


def permuted_divergence(space, sizes, counted, histograms, permutations, seed, threads, advance):
    """{bins: mean JSD over permutations of the labels}; nan without. Their negatives are all pairs − positives."""
    n = int(sizes.sum())
    end = np.repeat(np.cumsum(sizes), sizes)
    ranges, drawn = np.array([np.arange(1, n + 1), end, end]), {b: [] for b in histograms}
    for i in range(permutations):                         # the same sizes of classes, filled at random
        order = np.random.default_rng([seed, 1, i]).permutation(n)
        counts = count_pairs(space, order, ranges, np.zeros(n, np.int64), counted, threads, advance)
        for b, (p, _) in split_bins(counts[0], counted, histograms).items():
            drawn[b].append(float(jensen_shannon(p, histograms[b].sum(0) - p)))
    return {b: float(np.mean(values)) if values else float("nan") for b, values in drawn.items()}


def check_arguments(x, labels, bins, recall, permutations, seed, threads):
    """Raise ValueError for what pair_scores() can't work with: what arrived, what was expected."""
    if x.ndim != 2 or len(x) < 2 or x.shape[1] < 1:
        raise ValueError(f"embeddings have shape {x.shape}; expected (n, m) with n >= 2 and m >= 1")
    if len(x) >= 2 ** 31 - 64:
        raise ValueError(f"{len(x):,} embeddings; at most 2,147,483,583 can be indexed")
    if labels.shape != (len(x),):
        raise ValueError(f"labels have shape {labels.shape}; expected ({len(x)},), one for each row")
    if not np.isfinite(x).all():
        raise ValueError(f"row {int((~np.isfinite(x).all(1)).argmax())} of the embeddings is not finite")
    for name, values, least, most in (("bins", bins, 1, MOST_BINS), ("recall", recall, 1, None),
                                      ("permutations", [permutations], 0, None), ("seed", [seed], 0, None),
                                      ("threads", [1 if threads is None else threads], 1, None)):
        if not len(values):
            raise ValueError(f"{name} is empty; expected at least one number")
        for v in values:
            if v < least or most and v > most:
                above = f" and at most {most:,}" if most else ""
                raise ValueError(f"{name} is {v}; expected at least {least}{above}")


def bootstrap(each, value, asked, seed, resamples=BOOTSTRAP):
    """{name: (low, high)} of means over queries: percentiles over resampled classes, whose queries stay together."""
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
    """(low, high) of the JSD: each class left out once, with all its positive and negative pairs; Student's t.

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
    classes, sizes = np.unique(labels, return_counts=True)
    classes = classes[sizes > 1]
    for k in numbers:
        for r in range(repeats if k < len(classes) else 1):        # all of them: one way only
            drawn = np.random.default_rng([seed, 3, k, r]).choice(len(classes), k, replace=False)
            yield k, r, np.flatnonzero(np.isin(labels, classes[drawn]))


# ---------------------------------------------------------------- figures

def font(size):
    from PIL import ImageFont
    try:
        return ImageFont.load_default(size)
    except TypeError:                                     # Pillow before 10.1: one size
        return ImageFont.load_default()


def nice_ticks(top):
    """About four round numbers from 0 up to `top`."""
    step = 10.0 ** np.floor(np.log10(top / 4))
    step *= next(f for f in (1, 2, 2.5, 5, 10) if f * step >= top / 4.5)
    return np.arange(0, top * 1.0001, step)


def axes(draw, box, title, x_ticks, y_ticks, x_label, y_label, scale):
    """Frame, ticks and words of a panel. scale: a function of (x, y) to pixels."""
    left, top, right, bottom = box
    small, large = font(26), font(30)
    for x, text in x_ticks:
        at = scale(x, 0)[0]
        draw.line([(at, bottom), (at, bottom + 8)], (0, 0, 0), 2)
        draw.text((at, bottom + 14), text, (0, 0, 0), small, anchor="mt")
    for y in y_ticks:
        at = scale(0, y)[1]
        draw.line([(left - 8, at), (left, at)], (0, 0, 0), 2)
        draw.text((left - 14, at), f"{y:g}", (0, 0, 0), small, anchor="rm")
    draw.line([(left, top), (left, bottom), (right, bottom)], (0, 0, 0), 2)
    draw.text((left, top - 54), title, (0, 0, 0), large, anchor="ls")
    draw.text((left, top - 20), y_label, GREY, small, anchor="ls")
    draw.text(((left + right) / 2, bottom + 54), x_label, (0, 0, 0), small, anchor="mt")


def legend(draw, right, top, rows):
    """Two rows of coloured words above the panel, where no curve can be, flush right."""
    for row, entries in enumerate(rows):
        at = right
        for colour, text in reversed(entries):
            draw.text((at, top - 54 + 34 * row), text, colour, font(26), anchor="rs")
            at -= draw.textlength(text, font(26)) + 30


def draw_histograms(image, box, title, y_label, positive, negative, unit, entries):
    """Two overlaid histograms over [−1, 1]: red positives, blue negatives, as in Fig. 1."""
    from PIL import Image, ImageDraw
    left, top, right, bottom = box
    bins, high = len(positive), max(positive.max(), negative.max()) / unit * 1.05

    def scale(x, y):
        return left + (x + 1) / 2 * (right - left), bottom - y / high * (bottom - top)

    for values, colour in ((negative / unit, BLUE), (positive / unit, RED)):
        heights, edges = np.repeat(values, 2), np.repeat(np.linspace(-1, 1, bins + 1), 2)[1:-1]
        outline = [scale(x, y) for x, y in zip(edges, heights)]
        layer = Image.new("RGBA", image.size)
        draw = ImageDraw.Draw(layer)
        draw.polygon([scale(-1, 0), *outline, scale(1, 0)], fill=(*colour, 110))
        draw.line(outline, (*colour, 255), 3, joint="curve")
        image.alpha_composite(layer)
    draw = ImageDraw.Draw(image)
    axes(draw, box, title, [(x, f"{x:g}") for x in (-1, -0.5, 0, 0.5, 1)], nice_ticks(high), "inner product", y_label,
         scale)
    legend(draw, right, top, entries)


def pairs_figure(results, bins):
    """Fig. 1 for each (name, Score): left pairs as counted, right normalised by area -> PNG bytes."""
    from PIL import Image
    image = Image.new("RGBA", (1800, 640 * len(results)), "white")
    for row, (name, score) in enumerate(results):
        positive, negative = score.histograms[bins]
        top, most = 640 * row + 130, max(positive.max(), negative.max())
        name = name if len(name) <= 22 else "..." + name[-19:]     # the legend begins on the right
        unit, word = next((u, w) for u, w in ((1e9, "billion pairs"), (1e6, "million pairs"), (1e3, "thousand pairs"),
                                              (1, "pairs")) if most >= u)
        draw_histograms(image, (110, top, 860, top + 400), f"{name}: before normalising", f"{word} in a bin", positive,
                        negative, unit, [[(RED, f"{score.positive_pairs:,} positive pairs")],
                                         [(BLUE, f"{score.negative_pairs:,} negative pairs")]])
        draw_histograms(image, (1010, top, 1760, top + 400), f"normalised by area: JSD {score.jsd[bins]:.3f}",
                        f"share in each of {bins:,} bins", positive / positive.sum(), negative / negative.sum(), 1.0,
                        [[(RED, f"positive mean {score.positive_mean:.3f}")],
                         [(BLUE, f"negative mean {score.negative_mean:.3f}")]])
    return png(image)


def draw_curves(draw, box, title, y_label, curves, numbers, relative):
    """Mean and standard deviation of each metric over the subsets against the number of classes (logarithmic)."""
    left, top, right, bottom = box
    means = {metric: np.array([np.mean(v) for v in values]) for metric, values in curves.items()}
    if relative:
        means = {metric: m / m[0] for metric, m in means.items() if m[0] > 0 and metric != PERMUTED}
    high = max([1.0, *(float(m.max()) for m in means.values())]) * (1.05 if relative else 1.0)

    def scale(x, y):
        x = np.log(x / numbers[0]) / max(np.log(numbers[-1] / numbers[0]), 1e-9) if x else 0
        return left + 20 + x * (right - left - 40), bottom - y / high * (bottom - top)

    for colour, (metric, values) in zip((RED, BLUE, GREEN, GREY), curves.items()):
        points = [scale(k, m) for k, m in zip(numbers, means.get(metric, []))]
        draw.line(points, colour, 4)
        for v, m, (x, y) in zip(values, means.get(metric, []), points):
            draw.ellipse([x - 7, y - 7, x + 7, y + 7], colour)
            if not relative:
                low, up = (scale(0, min(max(m + side * np.std(v), 0), high))[1] for side in (-1, 1))
                draw.line([(x, up), (x, low)], colour, 2)
    axes(draw, box, title, [(k, f"{k:,}") for k in numbers], nice_ticks(high), "classes", y_label, scale)


def class_figure(results, numbers):
    """For each (name, curves as of subset_curves()): how the metrics depend on the number of classes -> PNG bytes."""
    from PIL import Image, ImageDraw
    image = Image.new("RGBA", (1800, 640 * len(results)), "white")
    draw = ImageDraw.Draw(image)
    for row, (name, curves) in enumerate(results):
        top, name = 640 * row + 130, name if len(name) <= 22 else "..." + name[-19:]
        draw_curves(draw, (110, top, 860, top + 400), name, "random subsets of classes, mean ± s.d.", curves, numbers,
                    False)
        draw_curves(draw, (1010, top, 1760, top + 400), "relative to the fewest classes", "mean over the subsets",
                    curves, numbers, True)
        entries = list(zip((RED, BLUE, GREEN, GREY), curves))
        legend(draw, 860, top, [entries[:3], entries[3:]])
    return png(image)


def png(image):
    file = io.BytesIO()
    image.convert("RGB").save(file, "PNG")
    return file.getvalue()


# ---------------------------------------------------------------- the command

def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("embeddings", nargs="+", metavar="EMB.npy", help="embeddings, (n, m), one or several files")
    parser.add_argument("labels_csv", nargs="?", metavar="LABELS.csv", help="labels.csv or props.csv: a header and n rows "
                        "(default: the one beside each EMB.npy, or in results/<dataset>)")
    parser.add_argument("--label", default="class", metavar="COLUMN", help="whose equal values make a pair positive: "
                        "the class or any property (default: class)")
    parser.add_argument("--bins", default="200", metavar="N[,N]", help="equal bins over [-1, 1]; several numbers give "
                        "a row each, in one pass (default: 200; the paper does not state its own)")
    parser.add_argument("--recall", default="1,2,4,8", metavar="K[,K]", help="the K's of Recall@K (default: 1,2,4,8; "
                        "1,10,100,1000 is usual for SOP)")
    parser.add_argument("--permutations", type=int, default=10, metavar="N", help="of the labels, for jsd_null: what "
                        "the JSD would be if labels meant nothing, which is not 0 with few pairs (default: 10; 0: none)")
    parser.add_argument("--train", nargs=2, metavar=("EMB.npy", "LABELS.csv"), help="the training split beside: rows "
                        "of its own and a column `split`; the paper reads a JSD above the test split's as "
                        "overfitting")
    parser.add_argument("--classes", metavar="N[,N]", help="also random subsets of so many classes (of two pictures or "
                        "more): does a metric depend on their number?")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="subsets for each number (default: 10)")
    parser.add_argument("--out", metavar="FILE.csv", help="a row for each embedding file, subset and number of bins")
    parser.add_argument("--histograms", metavar="FILE.csv", help="the counts of every bin")
    parser.add_argument("--intervals", metavar="FILE.csv", help="95%% intervals over classes, printed too: bootstrap "
                        "percentiles for means over queries, delete-one-class jackknife for the JSD; counts all pairs "
                        "twice")
    parser.add_argument("--figure", metavar="FILE.png", help="the histograms before and after normalising (Fig. 1)")
    parser.add_argument("--class-figure", metavar="FILE.png", help="the metrics against the number of classes")
    parser.add_argument("--seed", type=int, default=0, help="of permutations, subsets and bootstrap (default: 0)")
    parser.add_argument("--threads", type=int, metavar="N", help="for BLAS and the kernel alike (default: all)")
    parser.error = lambda message: parser.exit(2, f"pairs.py: {message} (--help explains)\n")
    arguments = parser.parse_args(argv)
    if arguments.embeddings[1:] and not arguments.embeddings[-1].endswith(".npy"):  # argparse gives all to the first
        arguments.labels_csv = arguments.embeddings.pop()
    if tables := [file for file in arguments.embeddings if file.endswith(".csv")]:
        parser.error(f"{tables[0]} stands before an array; LABELS.csv comes last, one for all")
    return arguments


def whole_numbers(option, text):
    """"1,2,4" -> [1, 2, 4], each once, in the order given."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"{option} {text}: expected whole numbers separated by commas")
    return list(dict.fromkeys(int(part) for part in parts))


def short_names(paths):
    """What tells the files apart: stems where they differ, else the paths without what all of them share."""
    parts = [Path(path).with_suffix("").parts for path in paths]
    while len(parts) > 1 and min(map(len, parts)) > 1 and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    last = [p[-1] for p in parts]
    shared = len(os.path.commonprefix([p[:-1] for p in parts]))
    return last if len(set(last)) == len(paths) else ["/".join(p[shared:]) for p in parts]


class Result(NamedTuple):
    """What one row of the outputs is about."""
    file: str
    name: str
    split: str      # test, or train
    sidecar: dict
    subset: int     # classes of a random subset, None: all
    repeat: int
    score: Score


def print_table(results, bins, recall):
    """The aligned table: metrics in rows, embeddings side by side; intervals in brackets where they were asked for."""
    def cell(value, interval):
        return f"{value:.4f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")

    scores, lines = [r.score for r in results], [[""] + [r.name for r in results]]
    for name, field in (("pictures", "n"), ("classes", "classes"), ("positive pairs", "positive_pairs"),
                        ("negative pairs", "negative_pairs")):
        lines.append([name] + [f"{getattr(s, field):,}" for s in scores])
    for name, field in (("positive mean", "positive_mean"), ("negative mean", "negative_mean")):
        lines.append([name] + [f"{round(getattr(s, field), 4) + 0.0:.4f}" for s in scores])   # never −0.0000
    for b in bins:
        lines.append([f"JSD, {b:,} bins"] + [cell(s.jsd[b], s.intervals.get(("jsd", b))) for s in scores])
        lines.append(["  labels permuted"] + [cell(s.jsd_null[b], None) for s in scores])
    for k in recall:
        lines.append([f"Recall@{k}"] + [cell(s.recall[k], s.intervals.get(("recall", k))) for s in scores])
    for name, field in (("R-Precision", "r_precision"), ("MAP@R", "map_at_r")):
        lines.append([name] + [cell(getattr(s, field), s.intervals.get((field, None))) for s in scores])
    print_aligned(lines if len(results) <= SIDE_BY_SIDE else [list(line) for line in zip(*lines)])
    if scores[0].intervals:
        print(f"\n[ ] {LEVEL:.0%} intervals over classes: {BOOTSTRAP:,} bootstrap resamples of the classes (Recall, "
              "R-Precision, MAP@R);\n    each class left out once, with all its pairs (JSD: jackknife, Student's t)")


def print_aligned(lines):
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        cells = [line[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]
        print("  ".join(cells).rstrip())


def subset_curves(results, numbers, bins, recall):
    """{metric: [values of the subsets of numbers[0] classes, …]} of one embedding."""
    metrics = {"JSD": lambda s: s.jsd[bins], f"Recall@{recall}": lambda s: s.recall[recall],
               "MAP@R": lambda s: s.map_at_r, PERMUTED: lambda s: s.jsd_null[bins]}
    if np.isnan(results[0].score.jsd_null[bins]):
        del metrics[PERMUTED]
    return {name: [[metric(r.score) for r in results if r.subset == k] for k in numbers]
            for name, metric in metrics.items()}


def print_subsets(name, curves, numbers):
    """Mean ± standard deviation over the subsets, and how far the mean moves from the fewest classes to the most."""
    print(f"\n{name}: random subsets of classes, mean ± standard deviation over the subsets")
    lines = [["classes"] + list(curves)]
    for i, k in enumerate(numbers):
        lines.append([f"{k}"] + [f"{np.mean(v[i]):.4f} ± {np.std(v[i]):.4f}" for v in curves.values()])
    with np.errstate(divide="ignore", invalid="ignore"):
        change = [np.divide(np.mean(v[-1]), np.mean(v[0])) - 1 for v in curves.values()]
    lines.append([f"{numbers[0]} to {numbers[-1]}"] + [f"{c:+.1%}" for c in change[:3]])
    lines[-1] += [""] * (len(curves) - 3)
    print_aligned(lines)


def write_outputs(arguments, results, bins, recall, numbers):
    """The CSV files and Fig. 1 where they were asked for, each whole or not at all."""
    from dml_common import files
    known = any(r.sidecar.get("loss") is not None for r in results)
    front = ["loss", "fold"] * known + ["split"] * bool(arguments.train)
    whole = [r for r in results if r.subset is None]

    def begin(r):
        return [r.sidecar.get("loss"), r.sidecar.get("fold")] * known + [r.split] * bool(arguments.train)

    if arguments.out:
        header = front + ["classes", "repeat"] * bool(numbers) + [
            "embeddings", "label", "n", "positive_pairs", "negative_pairs", "positive_mean", "negative_mean", "jsd",
            "jsd_null", "bins", *(f"recall_at_{k}" for k in recall), "r_precision", "map_at_r"]
        files.write_table(arguments.out, header, [
            begin(r) + [r.score.classes, r.repeat] * bool(numbers)
            + [r.file, arguments.label, r.score.n, r.score.positive_pairs, r.score.negative_pairs,
               r.score.positive_mean, r.score.negative_mean, r.score.jsd[b],
               r.score.jsd_null[b] if arguments.permutations else None, b, *r.score.recall.values(),
               r.score.r_precision, r.score.map_at_r] for r in results for b in bins])
    if arguments.histograms:
        header = front + ["embeddings", "label", "bins", "low", "high", "positive", "negative"]
        files.write_table(arguments.histograms, header, [
            begin(r) + [r.file, arguments.label, b, 2 * i / b - 1, 2 * (i + 1) / b - 1, int(p), int(q)]
            for r in whole for b in bins for i, (p, q) in enumerate(zip(*r.score.histograms[b]))])
    if arguments.intervals:
        values = {"jsd": lambda s, b: s.jsd[b], "recall": lambda s, k: s.recall[k],
                  "r_precision": lambda s, _: s.r_precision, "map_at_r": lambda s, _: s.map_at_r}
        files.write_table(arguments.intervals, front + ["embeddings", "label", "metric", "bins", "value", "low", "high",
                                                       "level", "method"], [
            begin(r) + [r.file, arguments.label, f"recall_at_{k}" if name == "recall" else name,
                        k if name == "jsd" else None, values[name](r.score, k), low, high, LEVEL,
                        "jackknife" if name == "jsd" else "bootstrap"]
            for r in whole for (name, k), (low, high) in r.score.intervals.items()])
    if arguments.figure:
        files.write_file(arguments.figure, pairs_figure([(r.name, r.score) for r in whole], bins[0]))


def say(kind, text):
    print(f"pairs.py: {kind}: {text}", file=sys.stderr)


def read_split(file, labels_csv, label):
    """Embeddings (n, m) and labels (n,) of one split. ValueError says what is wrong where."""
    from dml_common import files
    try:
        labels = files.read_properties(labels_csv, [label])[label]
    except ValueError as error:
        raise ValueError(f"{error} (--label chooses the column)" if "no property" in str(error) else error) from None
    x = files.read_embeddings(file)
    if len(x) != len(labels):
        raise ValueError(f"{file} has {len(x):,} embeddings, {labels_csv} {len(labels):,} rows; "
                         "both must list the same pictures in the same order")
    return x, labels


def check_options(arguments, bins, recall, numbers):
    """Raise ValueError for options that do not fit, and for outputs that can't be written, before the work."""
    from dml_common import files
    outputs = [arguments.out, arguments.histograms, arguments.intervals, arguments.figure, arguments.class_figure]
    outputs = [Path(path).resolve() for path in outputs if path]
    for path in outputs:
        files.check_output(path, [*arguments.embeddings, *filter(None, [arguments.labels_csv]), *(arguments.train or [])])
        if outputs.count(path) > 1:
            raise ValueError(f"two outputs would go to {path}; give each a name of its own")
    if arguments.class_figure and not numbers:
        raise ValueError("--class-figure needs --classes: the numbers of classes to compare")
    for name, values, least in (("--bins", bins, 1), ("--recall", recall, 1), ("--classes", numbers, 2),
                                ("--repeats", [arguments.repeats], 1)):
        if values and min(values) < least:
            raise ValueError(f"{name} is {min(values)}; expected at least {least}")


def list_jobs(arguments):
    """[(embeddings file, labels file, name, split)]: what the rows and columns of the outputs are."""
    from dml_common import files
    names = short_names(arguments.embeddings)
    if arguments.train:
        names = ["test"] if len(names) == 1 else [f"{name}, test" for name in names]
    jobs = [(file, arguments.labels_csv or files.table_beside(file, arguments.label), name, "test")
            for file, name in zip(arguments.embeddings, names)]
    return jobs + ([(*arguments.train, "train", "train")] if arguments.train else [])


def score_file(file, table, name, split, arguments, bins, recall, numbers):
    """The Results of one embedding: of all classes first, then of the subsets."""
    from dml_common import files
    from tqdm import tqdm
    x, labels = read_split(file, table, arguments.label)
    enough = int((np.unique(labels, return_counts=True)[1] > 1).sum())
    if numbers and numbers[-1] > enough:
        raise ValueError(f"--classes {numbers[-1]}: {table} has {enough:,} classes of two or more pictures; "
                         "ask for no more than these")
    options = dict(bins=bins, recall=recall, permutations=arguments.permutations, seed=arguments.seed,
                   threads=arguments.threads)
    sidecar, subsets = files.read_sidecar(file), list(class_subsets(labels, numbers, arguments.repeats, arguments.seed))
    with tqdm(total=1.0, desc=name, delay=2, disable=None, leave=False, file=sys.stderr,
              bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed} elapsed, {remaining} left") as bar:
        share = 1 / (1 + len(subsets))
        try:
            score = pair_scores(x, labels, intervals=bool(arguments.intervals), **options,
                                progress=lambda done, total: bar.update(done / total * share - bar.n))
        except ValueError as error:
            raise ValueError(f"{file}, {arguments.label} of {table}: {error}") from None
        results = [Result(file, name, split, sidecar, None, None, score)]
        for k, repeat, rows in subsets:
            results.append(Result(file, name, split, sidecar, k, repeat, pair_scores(x[rows], labels[rows], **options)))
            bar.update(share)
    return results


def warnings_for(name, score):
    """The warnings, a line each."""
    if score.lone:
        yield (f"{name}: {score.lone:,} of {score.n:,} pictures are alone in their class: they make no positive pair "
               "and are no queries")
    if any(np.isnan(low) for low, _ in score.intervals.values()):
        yield (f"{name}: without one of its {score.classes:,} classes no positive or no negative pair is left, so the "
               "JSD has no interval (nan)")


def run(arguments):
    bins, recall = whole_numbers("--bins", arguments.bins), whole_numbers("--recall", arguments.recall)
    numbers = sorted(whole_numbers("--classes", arguments.classes)) if arguments.classes else []
    check_options(arguments, bins, recall, numbers)
    if _knn is None:
        say("note", "the extension _knn is not built (pip install .): counting in NumPy, exact but slow")
    results = []
    for job in list_jobs(arguments):
        results += score_file(*job, arguments, bins, recall, numbers)
    whole = [r for r in results if r.subset is None]
    for r in whole:
        for warning in warnings_for(r.name, r.score):
            say("warning", warning)
    curves = [(r.name, subset_curves([s for s in results if s.name == r.name], numbers, bins[0], recall[0]))
              for r in whole if numbers]
    write_outputs(arguments, results, bins, recall, numbers)
    if arguments.class_figure:
        from dml_common import files
        files.write_file(arguments.class_figure, class_figure(curves, numbers))
    print_table(whole, bins, recall)
    for name, curve in curves:
        print_subsets(name, curve, numbers)


def main(argv=None):
    arguments = parse_arguments(argv)
    try:
        run(arguments)
    except (ValueError, OSError, MemoryError) as error:
        print(f"pairs.py: {error or 'out of memory'}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pairs.py: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
