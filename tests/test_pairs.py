"""Pair histograms, JSD, rankings, their intervals: by hand, against independent references, as properties that must
hold; and the command line with every bad input."""
import csv
import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.spatial.distance import jensenshannon

from dml_common import files
from dml_common import pictures as data
import pairs
from conftest import ROOT
from pairs import jensen_shannon, pair_scores


def angles(*degrees):
    """Points on the unit circle: inner products are cosines of differences."""
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], 1).astype(np.float32)


def reference(x, labels, bins, recall):
    """Everything by plain loops over float64 pairs, independent of pairs.py."""
    x = x.astype(np.float64)
    unit, n = x / np.sqrt((x ** 2).sum(1))[:, None], len(x)
    positive, negative = np.zeros(bins, int), np.zeros(bins, int)
    sums = {True: [], False: []}
    for i in range(n):
        for j in range(i + 1, n):
            s = (unit[i] * unit[j]).sum()
            same = bool(labels[i] == labels[j])
            (positive if same else negative)[min(max(int(np.floor((s + 1) * (bins / 2))), 0), bins - 1)] += 1
            sums[same].append(s)
    found, precisions, averages = {k: [] for k in recall}, [], []
    for q in range(n):
        order = sorted((1.0 - (unit[q] * unit[i]).sum(), i) for i in range(n) if i != q)
        right = [bool(labels[i] == labels[q]) for _, i in order]
        r = sum(right)
        if r == 0:
            continue
        for k in recall:
            found[k].append(any(right[:k]))
        precisions.append(sum(right[:r]) / r)
        averages.append(sum(sum(right[:k]) / k * right[k - 1] for k in range(1, r + 1)) / r)
    return (positive, negative, np.mean(sums[True]), np.mean(sums[False]), {k: np.mean(v) for k, v in found.items()},
            np.mean(precisions), np.mean(averages))


@pytest.fixture(params=("kernel", "kernel without AVX-512", "numpy"))
def each_counter(request, monkeypatch):
    """The test runs with the kernel, with its plain loops, and with the NumPy twin."""
    if request.param == "numpy":
        monkeypatch.setattr(pairs, "_knn", None)
    elif pairs._knn is None:
        pytest.skip("the extension is not built: pip install .")
    elif request.param != "kernel":
        monkeypatch.setattr(pairs._knn, "AVX512", False)


# ---------------------------------------------------------------- worked out by hand

def test_four_pairs_on_a_square(each_counter):
    """Four directions, opposite ones of one class: inner products −1 (positive, twice) and 0 (negative, four times)."""
    x = np.array([[1, 0], [0, 2], [-3, 0], [0, -1]], np.float32)
    score = pair_scores(x, list("abab"), bins=(2, 3, 4))
    assert (score.n, score.classes, score.lone, score.positive_pairs, score.negative_pairs) == (4, 2, 0, 2, 4)
    assert (score.positive_mean, score.negative_mean) == (-1, 0)
    for bins, positive, negative in ((2, [2, 0], [0, 4]), (3, [2, 0, 0], [0, 4, 0]), (4, [2, 0, 0, 0], [0, 0, 4, 0])):
        np.testing.assert_array_equal(score.histograms[bins], [positive, negative])     # 0 begins the upper half
        assert score.jsd[bins] == 1
    # The two neighbours at a right angle come first, the positive last: R = 1 is never right.
    assert score.recall == {1: 0, 2: 0, 4: 1, 8: 1} and score.r_precision == score.map_at_r == 0


def test_one_lies_in_the_last_bin(each_counter):
    x = np.array([[1, 3], [3, 9], [-1, -3], [7, 21]], np.float32) / 7          # parallel: s is 1 or −1 up to rounding
    score = pair_scores(x, [0, 0, 1, 1], bins=(200,))
    assert score.histograms[200][0][[0, 199]].tolist() == [1, 1]
    assert score.histograms[200][1][[0, 199]].tolist() == [2, 2]
    assert score.jsd[200] == 0                                                # half and half, both


def test_average_precision_with_ties_by_index(each_counter):
    """Query 0 (class a, R = 2): candidates 1 and 2 at the same distance, then 3. AP = (1/2)(1/2 · 0/1 + …)."""
    x = angles(0, 10, 350, 30)                                                # 1 and 2 mirror each other: a tie
    assert (x[1, 0], x[1, 1]) == (x[2, 0], -x[2, 1])
    first, hits, precision = pairs.rank_queries(pairs.normalise(x), np.array([0, 1, 0, 0]), np.array([2, 0, 2, 2]), 1, 1)
    # Query 0: order 1, 2, 3 = wrong, right, right; among R = 2 one hit at rank 2: Σ = 1/2.
    # Query 2 (350°): order 0 (10°), 1 (20°), 3 (40°): right, wrong: one hit at rank 1: Σ = 1.
    # Query 3 (30°): order 1 (20°), 0 (30°), 2 (40°): wrong, right: Σ = 1/2. Query 1 has no positive.
    assert first.tolist() == [2, 0, 1, 2] and hits.tolist() == [1, 0, 1, 1] and precision.tolist() == [0.5, 0, 1, 0.5]
    score = pair_scores(x, [0, 1, 0, 0], recall=(1, 2))
    assert score.lone == 1 and score.recall == {1: pytest.approx(1 / 3), 2: 1}
    assert score.r_precision == 0.5 and score.map_at_r == pytest.approx((1 / 4 + 1 / 2 + 1 / 4) / 3)
    # The tie goes to the smaller index: exchanged, query 0 finds its positive first.
    first = pairs.rank_queries(pairs.normalise(x[[0, 2, 1, 3]]), np.array([0, 0, 1, 0]), np.array([2, 2, 0, 2]), 1, 1)[0]
    assert first[0] == 1


def test_perfect_average_precision_is_one_and_its_order_counts():
    x = angles(0, 1, 2, 3, 90, 91, 92)
    labels = np.array([0, 0, 0, 0, 1, 1, 1])
    assert pair_scores(x, labels).map_at_r == pair_scores(x, labels).r_precision == 1
    # Query 0 with R = 3 finds right, wrong, right: AP = (1/1 + 2/3) / 3, R-Precision 2/3.
    x, labels = angles(0, 1, 2, 3, 50, 51), np.array([0, 0, 1, 0, 0, 1])
    _, hits, precision = pairs.rank_queries(pairs.normalise(x), labels, np.bincount(labels)[labels] - 1, 1, 1)
    assert hits[0] == 2 and precision[0] == 1 + 2 / 3


def test_jsd_by_hand():
    assert jensen_shannon(np.array([1, 2, 3]), np.array([2, 4, 6])) == 0
    assert jensen_shannon(np.array([5, 0]), np.array([0, 7])) == 1
    # P = (1, 0), Q = (1/2, 1/2), M = (3/4, 1/4): (log2(4/3) + (log2(2/3) + log2(2)) / 2) / 2
    expected = (np.log2(4 / 3) + (np.log2(2 / 3) + 1) / 2) / 2
    assert jensen_shannon(np.array([1, 0]), np.array([3, 3])) == pytest.approx(expected, abs=1e-15)
    assert np.isnan(jensen_shannon(np.array([0, 0]), np.array([1, 1])))


# ---------------------------------------------------------------- against independent references

@pytest.mark.parametrize("seed", range(8))
def test_jsd_is_the_square_of_scipys(seed):
    p, q = np.random.default_rng(seed).integers(0, 9, (2, 50)) * np.random.default_rng(seed).integers(0, 2, (2, 50))
    assert jensen_shannon(p, q) == pytest.approx(jensenshannon(p, q, base=2) ** 2, abs=1e-12)


def embeddings_of(kind, n, m, rng):
    x = rng.standard_normal((n, m)).astype(np.float32)
    return {
        "normal": lambda: x,
        "integers": lambda: np.round(x) + (np.arange(m) == 0) * np.float32(3),  # many ties, and edges of bins
        "duplicates": lambda: x[rng.integers(0, max(1, n // 6), n)],
        "identical": lambda: np.tile(x[:1], (n, 1)),                            # nothing but ties
        "signs": lambda: np.where(x > 0, np.float32(0.1), np.float32(-0.1)),
        "one-hot": lambda: np.eye(m, dtype=np.float32)[rng.integers(0, m, n)],  # 0 and 1, nothing else: all on edges
        "tiny": lambda: np.abs(x) * np.float32(1e-38) + np.float32(1e-39),      # denormal
        "huge": lambda: np.clip(x, -3, 3) * np.float32(1e38),                   # squares overflow float32
        "narrow": lambda: x + np.float32(300),                                  # all inner products beside 1
        "lengths": lambda: x * np.exp2(rng.integers(-60, 60, (n, 1))).astype(np.float32),
    }[kind]().astype(np.float32)


KINDS = ("normal", "integers", "duplicates", "identical", "signs", "one-hot", "tiny", "huge", "narrow", "lengths")


@pytest.mark.parametrize("kind", KINDS)
def test_equals_plain_loops(kind, each_counter):
    rng = np.random.default_rng(KINDS.index(kind))
    for n, m, classes in ((5, 1, 2), (40, 3, 4), (67, 9, 30), (60, 130, 3), (50, 300, 6)):
        x, labels = embeddings_of(kind, n, m, rng), rng.integers(0, classes, n)
        labels[:3] = 0, 0, 1
        score = pair_scores(x, labels, bins=(1, 7, 40, 80, 200), recall=(1, 3, 10 ** 6), permutations=0, threads=2)
        for bins in score.jsd:
            positive, negative, positive_mean, negative_mean, recall, r_precision, map_at_r = reference(
                x, labels, bins, (1, 3, 10 ** 6))
            np.testing.assert_array_equal(score.histograms[bins], [positive, negative])
        assert (score.positive_pairs, score.negative_pairs) == (positive.sum(), negative.sum())
        assert score.positive_mean == pytest.approx(positive_mean, abs=1e-12)
        assert score.negative_mean == pytest.approx(negative_mean, abs=1e-12)
        assert score.recall == pytest.approx(recall, abs=0) and score.recall[10 ** 6] == 1
        assert score.r_precision == pytest.approx(r_precision, abs=1e-14)
        assert score.map_at_r == pytest.approx(map_at_r, abs=1e-14)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_kernel_equals_its_twin_on_any_small_input(data):
    n, m = data.draw(st.integers(3, 30)), data.draw(st.integers(1, 10))
    value = st.one_of(st.integers(-2, 2).map(float), st.floats(width=32, allow_nan=False, allow_infinity=False))
    x = np.array(data.draw(st.lists(value, min_size=n * m, max_size=n * m)), np.float32).reshape(n, m)
    x[(x == 0).all(1)] = 1
    labels = np.array([0, 0, 1] + data.draw(st.lists(st.integers(0, 4), min_size=n - 3, max_size=n - 3)))
    bins = data.draw(st.lists(st.integers(1, 5000), min_size=1, max_size=3, unique=True))
    options = dict(bins=bins, permutations=2, intervals=True, recall=(1, 4))
    fast = pair_scores(x, labels, **options)
    kernel, pairs._knn = pairs._knn, None
    try:
        slow = pair_scores(x, labels, **options)
    finally:
        pairs._knn = kernel
    assert repr(fast) == repr(slow)
    for b in bins:
        np.testing.assert_array_equal(fast.histograms[b], slow.histograms[b])
        assert fast.histograms[b].sum() == n * (n - 1) // 2 and 0 <= fast.jsd[b] <= 1
    assert 0 <= fast.map_at_r <= fast.r_precision <= 1 and fast.recall[1] <= fast.recall[4]


@pytest.mark.parametrize("classes", (3, 40))
def test_against_pytorch_metric_learning(classes):
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    calculators = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, 500)
    x = rng.standard_normal((500, 16)).astype(np.float32) + rng.standard_normal((classes, 16))[labels].astype(np.float32)
    score, names = pair_scores(x, labels), ("mean_average_precision_at_r", "r_precision", "precision_at_1")
    theirs = calculators.AccuracyCalculator(include=names, k="max_bin_count").get_accuracy(
        torch.from_numpy(pairs.normalise(x).unit), torch.from_numpy(labels))
    ours = dict(zip(names, (score.map_at_r, score.r_precision, score.recall[1])))
    assert ours == pytest.approx({name: theirs[name] for name in names}, abs=1e-6)


def test_many_rows_and_columns_of_tiles():
    """More rows than a tile has, classes larger and smaller than a tile: the counts of plain float64 products."""
    rng = np.random.default_rng(1)
    n = 3001
    x = np.round(rng.standard_normal((n, 5)) * 4).astype(np.float32) + np.float32(0.5)
    labels = np.where(rng.random(n) < 0.7, 0, rng.integers(0, 400, n))
    score = pair_scores(x, labels, permutations=0)
    unit = x.astype(np.float64) / np.sqrt((x.astype(np.float64) ** 2).sum(1))[:, None]
    expected = np.zeros((2, 200), int)
    for i in range(n - 1):
        s = np.floor(((unit[i] * unit[i + 1:]).sum(1) + 1) * 100).clip(0, 199).astype(int)
        for side, which in enumerate((labels[i + 1:] == labels[i], labels[i + 1:] != labels[i])):
            expected[side] += np.bincount(s[which], minlength=200)
    np.testing.assert_array_equal(score.histograms[200], expected)


# ---------------------------------------------------------------- properties that must hold

def test_nothing_but_input_options_and_seed_matters(monkeypatch):
    rng = np.random.default_rng(2)
    x, labels = rng.standard_normal((900, 11)).astype(np.float32), rng.integers(0, 60, 900)
    options = dict(bins=(200, 30), permutations=3, intervals=True, seed=5)
    one = repr(pair_scores(x, labels, threads=1, **options))
    for threads, rows, columns, ranked in ((2, 512, 2048, 1 << 25), (3, 100, 64, 1 << 14), (1, 7, 1000, 1)):
        monkeypatch.setattr(pairs, "ROWS", rows)
        monkeypatch.setattr(pairs, "COLUMNS", columns)
        monkeypatch.setattr(pairs, "RANKED_BYTES", ranked)
        assert repr(pair_scores(x, labels, threads=threads, **options)) == one
    assert repr(pair_scores(x, labels, **{**options, "seed": 6})) != one


def test_products_may_be_as_wrong_as_their_bound():
    """Whatever the BLAS: products disturbed by up to the stated bound give the same counts and the same ranks."""
    knn = pytest.importorskip("_knn")
    rng = np.random.default_rng(3)
    x = np.round(rng.standard_normal((300, 12)) * 4).astype(np.float32) / 4 + np.float32(0.125)
    space, n = pairs.normalise(x), 300
    value, position = np.sort(rng.integers(0, 20, n)), np.arange(n)
    relevant = np.bincount(value, minlength=20)[value] - 1
    ranges = np.array([position + 1, np.searchsorted(value, value, "right"), np.full(n, n)])
    expected = pairs.count_pairs_numpy(space, position, ranges, value, [200, 30])
    ranked = pairs.rank_queries_numpy(space, value, position, relevant, 4)
    exact = space.unit.astype(np.float64) @ space.unit.T
    for bound in (space.bound, 1e-4, 1e-3, 0.04):            # beyond the true one: many pairs beside edges; bins open
        products = (exact + rng.choice([-0.98, 0.0, 0.98], exact.shape) * (bound - 2e-7)).astype(np.float32)
        counts = np.zeros_like(expected)
        knn.pair_histogram(products, 0, 0, ranges, value, position, x, space.norms, bound, np.array([200, 30]), counts)
        np.testing.assert_array_equal(counts, expected)
        got = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n)
        knn.rank_hits(products, position, np.full(n, bound), x, space.norms, np.zeros(n, np.float32),
                      value.astype(np.int32), relevant, 4, *got)
        for a, b in zip(got, ranked):
            np.testing.assert_array_equal(a, b)


def test_order_names_and_lengths_of_the_rows_do_not_matter():
    rng = np.random.default_rng(4)
    x, labels = rng.standard_normal((200, 6)).astype(np.float32), rng.integers(0, 9, 200)
    one, order = pair_scores(x, labels, permutations=0), rng.permutation(200)
    scaled = x * np.exp2(rng.integers(-3, 4, (200, 1))).astype(np.float32)     # a power of two changes no digit
    named = np.array([f"class {9 - v}" for v in labels])
    for other in (pair_scores(scaled, labels, permutations=0), pair_scores(x[order], named[order], permutations=0)):
        np.testing.assert_array_equal(other.histograms[200], one.histograms[200])
        assert other.recall == one.recall and other.jsd == one.jsd
        assert (other.r_precision, other.map_at_r) == pytest.approx((one.r_precision, one.map_at_r), abs=1e-14)
        assert (other.positive_mean, other.negative_mean) == pytest.approx((one.positive_mean, one.negative_mean))


def test_several_numbers_of_bins_equal_each_alone():
    rng = np.random.default_rng(5)
    x, labels = np.round(rng.standard_normal((150, 3)) * 2).astype(np.float32) + 0.25, rng.integers(0, 5, 150)
    together = pair_scores(x, labels, bins=(50, 100, 200, 400, 150, 3), permutations=2)
    assert pairs.finest((50, 100, 200, 400, 150, 3)) == [3, 150, 400]
    for bins in (50, 100, 200, 400, 150, 3):
        alone = pair_scores(x, labels, bins=(bins,), permutations=2)
        np.testing.assert_array_equal(alone.histograms[bins], together.histograms[bins])
        assert alone.jsd_null[bins] == together.jsd_null[bins]


def test_jsd_null_falls_as_positives_grow():
    rng = np.random.default_rng(6)
    nulls = [pair_scores(rng.standard_normal((n, 8)).astype(np.float32), np.arange(n) % (n // 4)).jsd_null[200]
             for n in (40, 200, 1000)]                                         # classes of four: 60, 300, 1,500 positives
    assert nulls[0] > 1.5 * nulls[1] > 2 * nulls[2] > 0
    # Labels that mean nothing: the JSD itself is no farther from 0 than its null.
    score = pair_scores(rng.standard_normal((600, 8)).astype(np.float32), np.arange(600) % 150)
    assert score.jsd[200] == pytest.approx(score.jsd_null[200], rel=0.25)


def test_jsd_null_against_labels_permuted_literally():
    rng = np.random.default_rng(13)
    x, labels = rng.standard_normal((50, 3)).astype(np.float32), np.sort(rng.integers(0, 9, 50))
    expected = []
    for i in range(4):
        permuted = np.empty(50, int)
        permuted[np.random.default_rng([7, 1, i]).permutation(50)] = labels
        positive, negative, *_ = reference(x, permuted, 20, (1,))
        expected.append(jensenshannon(positive, negative, base=2) ** 2)
    assert pair_scores(x, labels, bins=(20,), permutations=4, seed=7).jsd_null[20] == pytest.approx(np.mean(expected))


def test_separated_and_collapsed_classes():
    labels = np.repeat(np.arange(6), 30)
    x = np.eye(6, dtype=np.float32)[labels] + np.random.default_rng(7).normal(0, 0.01, (180, 6))
    score = pair_scores(x, labels)
    assert score.jsd[200] == score.recall[1] == score.r_precision == score.map_at_r == 1
    score = pair_scores(np.ones((180, 6)), labels)
    assert score.jsd[200] == 0 and score.positive_mean == pytest.approx(1) and score.negative_mean == pytest.approx(1)


def test_jackknife_against_leaving_each_class_out():
    rng = np.random.default_rng(8)
    labels = rng.integers(0, 7, 120)
    x = rng.standard_normal((120, 4)) + rng.standard_normal((7, 4))[labels]
    score = pair_scores(x, labels, bins=(40, 15), intervals=True, permutations=0)
    for bins in (40, 15):
        left = np.array([pair_scores(x[labels != c], labels[labels != c], bins=(bins,), permutations=0).jsd[bins]
                         for c in range(7)])
        error = np.sqrt(6 / 7 * ((left - left.mean()) ** 2).sum())
        low, high = score.intervals["jsd", bins]
        assert low == pytest.approx(max(0, score.jsd[bins] - 2.446912 * error), abs=1e-6)   # t of 6 degrees of freedom
        assert high == pytest.approx(min(1, score.jsd[bins] + 2.446912 * error), abs=1e-6)


def test_bootstrap_against_a_direct_resampling_of_queries():
    rng = np.random.default_rng(9)
    value, each = rng.integers(0, 12, 300), {"metric": rng.random(300)}
    low, high = pairs.bootstrap(each, value, np.ones(300, bool), seed=4)["metric"]
    generator, means = np.random.default_rng([4, 2]), []
    for _ in range(pairs.BOOTSTRAP):
        drawn = np.concatenate([each["metric"][value == c] for c in generator.integers(0, 12, 12)])
        means.append(drawn.mean())
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))


def test_intervals_are_as_wide_as_results_scatter():
    """30 experiments, each with new classes: the mean half width is near 2 standard deviations of the results."""
    scores = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        labels = np.repeat(np.arange(30), 12)
        x = rng.standard_normal((360, 6)) + (rng.standard_normal((30, 6)) * rng.gamma(2, 0.5, (30, 1)))[labels]
        scores.append(pair_scores(x, labels, bins=(50,), intervals=True, permutations=0))
    for name, value in ((("jsd", 50), lambda s: s.jsd[50]), (("map_at_r", None), lambda s: s.map_at_r),
                        (("recall", 1), lambda s: s.recall[1])):
        half = np.mean([(s.intervals[name][1] - s.intervals[name][0]) / 2 for s in scores])
        assert 0.6 < half / (2 * np.std([value(s) for s in scores])) < 1.7, name


def test_class_subsets():
    labels = np.array(list("aabbbccdzz"))                    # d has one picture: it can make no positive pair
    drawn = list(pairs.class_subsets(labels, [2, 4], 3, 0))
    assert [(k, r) for k, r, _ in drawn] == [(2, 0), (2, 1), (2, 2), (4, 0)]
    for k, _, rows in drawn:
        assert len(set(labels[rows])) == k and "d" not in labels[rows]
        assert all((labels == c).sum() == (labels[rows] == c).sum() for c in set(labels[rows]))
    assert drawn[3][2].tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    again = list(pairs.class_subsets(labels, [2, 4], 3, 0))
    assert all((a[2] == b[2]).all() for a, b in zip(drawn, again))


def test_jsd_depends_less_on_the_number_of_classes_than_map_at_r():
    """The paper's claim, where it must hold: classes drawn alike, so that more of them only add negatives."""
    rng = np.random.default_rng(10)
    labels = np.repeat(np.arange(80), 10)
    x = rng.standard_normal((800, 16)) + 0.8 * rng.standard_normal((80, 16))[labels]
    few, many = ([pair_scores(x[rows], labels[rows], bins=(50,), permutations=0)
                  for _, _, rows in pairs.class_subsets(labels, [k], 5, 1)] for k in (5, 80))
    change = [np.mean([get(s) for s in many]) / np.mean([get(s) for s in few])
              for get in (lambda s: s.jsd[50], lambda s: s.map_at_r, lambda s: s.recall[1])]
    assert 0.85 < change[0] < 1.15 and change[1] < 0.6 and change[2] < 0.8


def test_half_precision_and_integers_are_accepted():
    x, labels = np.round(np.random.default_rng(11).standard_normal((60, 4)) * 3) + 1, np.arange(60) % 4
    x[(x == 0).all(1)] = 1
    one = repr(pair_scores(x.astype(np.float32), labels))
    for dtype in (np.float16, np.float64, np.int16):
        assert repr(pair_scores(x.astype(dtype), labels)) == one


@pytest.mark.parametrize("change, words", (
    (dict(bins=(0,)), "bins is 0"), (dict(bins=(40_000,)), "at most 32,000"), (dict(bins=()), "bins is empty"),
    (dict(recall=(0,)), "recall is 0"), (dict(permutations=-1), "permutations is -1"), (dict(seed=-1), "seed is -1"),
    (dict(threads=0), "threads is 0"), (dict(labels=[0, 1, 1]), r"expected \(4,\)"),
    (dict(labels=[0, 1, 2, 3]), "all distinct"), (dict(labels=[1, 1, 1, 1]), "one class only"),
    (dict(embeddings=np.ones(4)), r"\(n, m\)"), (dict(embeddings=np.ones((4, 2)) * 1j), "complex"),
    (dict(embeddings=np.full((4, 2), np.nan)), "row 0"), (dict(embeddings=np.eye(4, 2)), "row 2 is a zero vector")))
def test_arguments_out_of_range(change, words):
    arguments = {"embeddings": angles(0, 1, 2, 3), "labels": [0, 0, 1, 1], **change}
    with pytest.raises(ValueError, match=words):
        pair_scores(**arguments)


# ---------------------------------------------------------------- the command line

HEADER = ("embeddings,label,n,positive_pairs,negative_pairs,positive_mean,negative_mean,jsd,jsd_null,bins,recall_at_1,"
          "recall_at_2,recall_at_4,recall_at_8,r_precision,map_at_r").split(",")


@pytest.fixture
def files(tmp_path):
    """emb.npy (60, 5) and labels.csv with a class and a super-class; train.npy and train.csv with 40 rows."""
    rng = np.random.default_rng(12)
    for name, n in (("emb", 60), ("train", 40)):
        np.save(tmp_path / f"{name}.npy", rng.standard_normal((n, 5)).astype(np.float32))
        lines = ["path,class,super_class"] + [f"{i}.jpg,{'abcdef'[i % 6]},{i % 2}" for i in range(n)]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_table_and_rows(files, run_script):
    out = files / "pairs.csv"
    done = run_script("pairs.py", files / "emb.npy", files / "emb.csv", "--out", out)
    assert done.returncode == 0 and done.stderr == ""
    row, = read_rows(out)
    assert list(row) == HEADER
    score = pair_scores(np.load(files / "emb.npy"), np.arange(60) % 6)
    assert row["embeddings"] == str(files / "emb.npy") and row["label"] == "class" and row["bins"] == "200"
    for name, value in (("n", 60), ("positive_pairs", 270), ("negative_pairs", 1500), ("jsd", score.jsd[200]),
                        ("jsd_null", score.jsd_null[200]), ("positive_mean", score.positive_mean),
                        ("negative_mean", score.negative_mean), ("recall_at_8", score.recall[8]),
                        ("r_precision", score.r_precision), ("map_at_r", score.map_at_r)):
        assert float(row[name]) == value, name
    assert f"{score.jsd[200]:.4f}" in done.stdout and "MAP@R" in done.stdout
    assert sorted(os.listdir(files)) == ["emb.csv", "emb.npy", "pairs.csv", "train.csv", "train.npy"]


def test_every_option(files, run_script):
    np.save(files / "other.npy", np.load(files / "emb.npy")[:, :2].astype(np.float64))
    (files / "emb.json").write_text(json.dumps({"loss": "Triplet", "fold": 2}))
    names = {option: files / f"{option}.{'png' if 'figure' in option else 'csv'}"
             for option in ("out", "histograms", "intervals", "figure", "class-figure")}
    outputs = [word for option, path in names.items() for word in (f"--{option}", path)]
    done = run_script("pairs.py", files / "emb.npy", files / "other.npy", files / "emb.csv", "--label", "class", "--bins",
                      "20,40", "--recall", "1,10", "--permutations", 2, "--train", files / "train.npy",
                      files / "train.csv", "--classes", "4,2", "--repeats", 3, "--seed", 3, "--threads", 2, *outputs)
    assert done.returncode == 0, done.stderr
    rows = read_rows(names["out"])
    assert list(rows[0]) == (["loss", "fold", "split", "classes", "repeat"] + HEADER[:10]
                             + ["recall_at_1", "recall_at_10", "r_precision", "map_at_r"])
    assert len(rows) == 3 * 2 * (1 + 2 * 3)                  # files × bins × (all classes, 2 numbers × 3 repeats)
    assert [r["split"] for r in rows[::14]] == ["test", "test", "train"] and rows[0]["loss"] == "Triplet"
    assert [r["classes"] for r in rows[:14:2]] == ["6", "2", "2", "2", "4", "4", "4"] and rows[14]["loss"] == ""
    histogram = read_rows(names["histograms"])
    assert len(histogram) == 3 * 60 and float(histogram[0]["low"]) == -1 and float(histogram[19]["high"]) == 1
    assert sum(int(r["positive"]) + int(r["negative"]) for r in histogram[:20]) == 1770
    intervals = read_rows(names["intervals"])
    assert [(r["metric"], r["bins"], r["method"]) for r in intervals[:6]] == [
        ("recall_at_1", "", "bootstrap"), ("recall_at_10", "", "bootstrap"), ("r_precision", "", "bootstrap"),
        ("map_at_r", "", "bootstrap"), ("jsd", "20", "jackknife"), ("jsd", "40", "jackknife")]
    assert all(float(r["low"]) <= float(r["value"]) <= float(r["high"]) for r in intervals)
    for option, rows in (("figure", 3), ("class-figure", 3)):
        with Image.open(names[option]) as image:
            assert image.size == (1800, 640 * rows)
            assert len(image.convert("RGB").getcolors(1 << 24)) > 20
    assert "95% intervals" in done.stdout and "2 to 4" in done.stdout and "JSD, 40 bins" in done.stdout
    again = names["figure"].read_bytes()
    run_script("pairs.py", files / "emb.npy", files / "other.npy", files / "emb.csv", "--bins", "20,40", "--train",
               files / "train.npy", files / "train.csv", "--figure", names["figure"], "--threads", 1)
    assert names["figure"].read_bytes() == again


def test_lone_pictures_are_named(files, run_script):
    text = (files / "emb.csv").read_text().replace("0.jpg,a,0", "0.jpg,only,0", 1)
    (files / "emb.csv").write_text(text)
    done = run_script("pairs.py", files / "emb.npy", files / "emb.csv", "--permutations", 0, "--out", files / "o.csv")
    assert done.returncode == 0 and done.stderr.count("\n") == 1 and "1 of 60 pictures are alone" in done.stderr
    assert read_rows(files / "o.csv")[0]["jsd_null"] == ""


def test_two_classes_have_no_jackknife(files, run_script):
    done = run_script("pairs.py", files / "emb.npy", files / "emb.csv", "--label", "super_class", "--intervals",
                      files / "i.csv")
    assert done.returncode == 0 and done.stderr.count("\n") == 1 and "the JSD has no interval (nan)" in done.stderr
    assert [r["low"] == "nan" for r in read_rows(files / "i.csv")] == [False] * 6 + [True]


def test_without_the_extension_it_says_so(files, monkeypatch, capsys):
    arguments = [str(files / "emb.npy"), str(files / "emb.csv"), "--intervals", str(files / "i.csv")]
    assert pairs.main(arguments) == 0
    table = capsys.readouterr().out
    monkeypatch.setattr(pairs, "_knn", None)
    assert pairs.main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out == table and "not built" in captured.err and captured.err.count("\n") == 1


def test_help_teaches_and_torch_is_not_loaded(run_script):
    done = run_script("pairs.py", "--help")
    assert done.returncode == 0 and "--class-figure" in done.stdout and "python pairs.py" in done.stdout
    code = "import sys, pairs, data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def expect_one_line(capsys, files, arguments, *words):
    before = sorted(os.listdir(files))
    try:
        status = pairs.main([str(a) for a in arguments])
    except SystemExit as error:                           # argparse
        status = error.code
    captured = capsys.readouterr()
    assert status == 2 and captured.out == ""
    assert captured.err.startswith("pairs.py: ") and captured.err.count("\n") == 1, captured.err
    assert all(word in captured.err for word in words), captured.err
    assert sorted(os.listdir(files)) == before


@pytest.mark.parametrize("options, words", (
    (["--label", "colour"], ["'colour'", "super_class", "--label"]), (["--bins", "0"], ["--bins is 0"]),
    (["--bins", "many"], ["--bins many", "whole numbers"]), (["--bins", "50,"], ["--bins 50,"]),
    (["--bins", "99999"], ["at most 32,000"]), (["--recall", "0"], ["--recall is 0"]), (["--recall", "-1"], ["--recall"]),
    (["--classes", "1"], ["--classes is 1"]), (["--classes", "7"], ["--classes 7", "6 classes"]),
    (["--classes", "2", "--repeats", "0"], ["--repeats is 0"]), (["--permutations", "-1"], ["permutations is -1"]),
    (["--permutations", "x"], ["'x'"]), (["--seed", "-1"], ["seed is -1"]), (["--threads", "0"], ["threads is 0"]),
    (["--class-figure", "c.png"], ["--class-figure needs --classes"]), (["--colour"], ["--colour"]),
    (["--train", "emb.npy"], ["--train"]), (["--out", "no/o.csv"], ["does not exist"]),
    (["--figure", "."], ["is a folder"]), (["--out", "o.csv", "--intervals", "./o.csv"], ["two outputs"]),
    (["--train", "missing.npy", "train.csv"], ["missing.npy", "does not exist"]),
    (["--train", "emb.npy", "train.csv"], ["60 embeddings", "40 rows"])))
def test_bad_options(files, capsys, monkeypatch, options, words):
    monkeypatch.chdir(files)
    expect_one_line(capsys, files, ["emb.npy", "emb.csv", *options], *words)


@pytest.mark.parametrize("column, words", ((lambda i: i, ["all distinct", "bad.csv"]), (lambda i: "x", ["one class only"]),
                                           (lambda i: "" if i == 4 else i % 2, ["row 4", "no value"])))
def test_bad_labels(files, capsys, column, words):
    (files / "bad.csv").write_text("path,class\n" + "".join(f"{i},{column(i)}\n" for i in range(60)))
    expect_one_line(capsys, files, [files / "emb.npy", files / "bad.csv", "--out", files / "o.csv"], *words)


def test_labels_of_another_length_and_missing_files(files, capsys):
    out = ["--out", files / "o.csv"]
    expect_one_line(capsys, files, [files / "emb.npy", files / "train.csv", *out], "60 embeddings", "40 rows")
    expect_one_line(capsys, files, [files / "none.npy", files / "emb.csv", *out], "none.npy", "does not exist")
    expect_one_line(capsys, files, [files / "emb.npy", files / "none.csv", *out], "none.csv", "does not exist")
    expect_one_line(capsys, files, [files / "emb.csv", files / "emb.csv", *out], "LABELS.csv comes last")


@pytest.mark.parametrize("value, words", ((0, "row 7 is a zero vector"), (np.nan, "row 7"), (np.inf, "row 7")))
def test_bad_rows(files, capsys, value, words):
    x = np.load(files / "emb.npy")
    x[7] = value
    np.save(files / "bad.npy", x)
    expect_one_line(capsys, files, [files / "bad.npy", files / "emb.csv", "--out", files / "o.csv"], "bad.npy", words)


def test_full_disk_leaves_nothing(files):
    """A file-size limit of 100 bytes stands for the full disk: the write fails midway, for real."""
    before = sorted(os.listdir(files))
    for option, name in (("--out", "o.csv"), ("--figure", "f.png")):
        command = [sys.executable, str(ROOT / "pairs.py"), str(files / "emb.npy"), str(files / "emb.csv"), option,
                   str(files / name)]
        done = subprocess.run(command, capture_output=True, text=True,
                              preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)))
        assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("pairs.py: ")
        assert "Traceback" not in done.stderr and sorted(os.listdir(files)) == before


def test_an_input_is_never_written_over(files, capsys):
    before = (files / "emb.csv").read_bytes()
    assert pairs.main([str(files / "emb.npy"), str(files / "emb.csv"), "--out", str(files / "emb.csv")]) == 2
    assert "is an input" in capsys.readouterr().err and (files / "emb.csv").read_bytes() == before


def test_shipped_example(run_script):
    """Real embeddings, 300 cars of six models through an ImageNet network, against NumPy and SciPy."""
    done = run_script("pairs.py", "examples/cars/emb.npy", "examples/cars/props.csv", "--label", "model", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    x = np.load(ROOT / "examples/cars/emb.npy").astype(float)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    label = files.read_properties(ROOT / "examples/cars/props.csv")["model"]
    upper = np.triu_indices(len(x), 1)
    products, same = (x @ x.T)[upper], (label[:, None] == label)[upper]
    positive, negative = (np.histogram(products[part], 200, (-1, 1))[0] for part in (same, ~same))
    jsd = jensenshannon(positive, negative, base=2) ** 2
    assert f"{jsd:.4f}" in done.stdout and f"{same.sum():,}" in done.stdout


def test_each_array_with_the_table_beside_it_one_in_a_row(tmp_path, run_script):
    rng = np.random.default_rng(0)
    for fold in range(5):
        place = tmp_path / f"cars/triplet/fold{fold}"
        place.mkdir(parents=True)
        np.save(place / "emb.npy", rng.normal(size=(20, 4)).astype(np.float32))
        (place / "labels.csv").write_text("path\n" + "".join(f"{i}.png\n" for i in range(20)))  # without a column shape
        (place / "props.csv").write_text("frame,shape\n" + "".join(f"{i},{i % 4}\n" for i in range(20)))
    done = run_script("pairs.py", *sorted(tmp_path.glob("cars/*/*/emb.npy")), "--label", "shape", "--out", tmp_path / "pairs.csv")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["pictures", *(f"fold{k}" for k in range(5))]
    assert len((tmp_path / "pairs.csv").read_text().splitlines()) == 6
    done = run_script("pairs.py", tmp_path / "cars/triplet/fold0/emb.npy")
    assert done.returncode == 2 and "with a column class" in done.stderr
