"""Pair histograms, JSD, rankings, their intervals: by hand, against independent references, as properties
that must hold; and the command line with every bad input."""
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, embeddings_of, one_line, read_rows, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.spatial.distance import jensenshannon

import nrprec
import pairs
from pairs import jensen_shannon, pair_scores


def angles(*degrees):
    """Points on the unit circle: inner products are cosines of differences."""
    radians = np.deg2rad(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], 1).astype(np.float32)


def normal(seed, n, m, classes=None):
    """Seeded noise (n, m), and labels where a number of classes is given."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, m)).astype(np.float32)
    return x if classes is None else (x, rng.integers(0, classes, n))


def reference(x, labels, bins, recall):
    """Everything by plain loops over float64 pairs, ties by index, independent of pairs.py."""
    x = x.astype(np.float64)
    unit, n = x / np.sqrt((x ** 2).sum(1))[:, None], len(x)
    counts, sums = {True: np.zeros(bins, int), False: np.zeros(bins, int)}, {True: [], False: []}
    for i in range(n):
        for j in range(i + 1, n):
            s, same = (unit[i] * unit[j]).sum(), bool(labels[i] == labels[j])
            counts[same][min(max(int(np.floor((s + 1) * (bins / 2))), 0), bins - 1)] += 1
            sums[same].append(s)
    hit, precisions, averages = {k: [] for k in recall}, [], []
    for q in range(n):
        order = sorted((1.0 - (unit[q] * unit[i]).sum(), i) for i in range(n) if i != q)
        right = [bool(labels[i] == labels[q]) for _, i in order]
        r = sum(right)
        if r == 0:
            continue
        for k in recall:
            hit[k].append(any(right[:k]))
        precisions.append(sum(right[:r]) / r)
        averages.append(sum(sum(right[:k]) / k * right[k - 1] for k in range(1, r + 1)) / r)
    return (counts[True], counts[False], np.mean(sums[True]), np.mean(sums[False]),
            {k: np.mean(v) for k, v in hit.items()}, np.mean(precisions), np.mean(averages))


def rank(x, value, relevant, by_index=False):
    value, relevant = np.array(value), np.array(relevant)
    return pairs.rank_queries(pairs.normalise(x), value, relevant, 1, 1, by_index=by_index)


@pytest.fixture(params=("scalar", "avx2", "avx512", "numpy"))
def each_counter(request, monkeypatch):
    """The test runs with every path of the kernel that this processor has, and with the NumPy twin."""
    if request.param == "numpy":
        monkeypatch.setattr(pairs, "_knn", None)
    elif request.param not in getattr(pairs._knn, "ISAS", ()):
        pytest.skip("the extension is not built (pip install .), or this processor lacks the instructions")
    else:
        monkeypatch.setattr(pairs._knn, "ISA", request.param)             # taken at the next call


# ---------------------------------------------------------------- worked out by hand

def test_four_pairs_on_a_square(each_counter):
    """Four directions, opposite ones of one class: inner products −1 (positive, twice), 0 (negative)."""
    x = np.array([[1, 0], [0, 2], [-3, 0], [0, -1]], np.float32)
    score = pair_scores(x, list("abab"), bins=(2, 3, 4))
    assert (score.n, score.classes, score.lone, score.positive_pairs, score.negative_pairs) == (4, 2, 0, 2, 4)
    assert (score.positive_mean, score.negative_mean) == (-1, 0)
    for bins, middle in ((2, 1), (3, 1), (4, 2)):                             # 0 begins the upper half
        np.testing.assert_array_equal(score.histograms[bins], [2 * np.eye(bins)[0], 4 * np.eye(bins)[middle]])
        assert score.jsd[bins] == 1
    # The two neighbours at a right angle come first, the positive last: R = 1 is never right.
    assert score.recall == {1: 0, 2: 0, 4: 1, 8: 1} and score.r_precision == score.map_at_r == 0


def test_one_lies_in_the_last_bin(each_counter):
    x = np.array([[1, 3], [3, 9], [-1, -3], [7, 21]], np.float32) / 7         # parallel: 1, −1
    score = pair_scores(x, [0, 0, 1, 1], bins=(200,))
    assert score.histograms[200][0][[0, 199]].tolist() == [1, 1]
    assert score.histograms[200][1][[0, 199]].tolist() == [2, 2]
    assert score.jsd[200] == 0                                                # half and half, both


def test_average_precision_with_ties(each_counter):
    """Query 0 (class a, R = 2): candidates 1 (wrong) and 2 (right) at the same distance, then 3."""
    x = angles(0, 10, 350, 30)                                                # 1 and 2: a tie
    assert (x[1, 0], x[1, 1]) == (x[2, 0], -x[2, 1])
    # By index, query 0: wrong, right, right; among R = 2 one hit at rank 2: Σ = 1/2. Else half and half: 3/4.
    # Query 2 (350°): order 0 (10°), 1 (20°), 3 (40°): right, wrong: one hit at rank 1: Σ = 1.
    # Query 3 (30°): order 1 (20°), 0 (30°), 2 (40°): wrong, right: Σ = 1/2. Query 1 has no positive.
    for ties, ranks, recall, precision in (("index", [1, 1, 1], 1 / 3, [0.5, 0, 1, 0.5]),
                                           ("expected", [0, 2, 1], 1 / 2, [0.75, 0, 1, 0.5])):
        ranked = rank(x, [0, 1, 0, 0], [2, 0, 2, 2], ties == "index")
        assert [part[0] for part in ranked[:3]] == ranks and ranked.precision.tolist() == precision
        assert ranked.sure.tolist() == [1, 0, 1, 1] and not ranked.tied.any()
        score = pair_scores(x, [0, 1, 0, 0], recall=(1, 2), ties=ties)
        assert score.lone == 1 and score.tied == (ties == "expected")
        assert score.recall == {1: pytest.approx(recall), 2: 1} and score.r_precision == 0.5
        assert score.map_at_r == pytest.approx(sum(precision) / 2 / 3)
    # By index the smaller one goes first: exchanged, query 0 finds its positive at once.
    assert rank(x[[0, 2, 1, 3]], [0, 0, 1, 0], [2, 2, 0, 2], True).begin[0] == 0


def test_perfect_average_precision_is_one_and_its_order_counts():
    score = pair_scores(angles(0, 1, 2, 3, 90, 91, 92), [0, 0, 0, 0, 1, 1, 1])
    assert score.map_at_r == score.r_precision == 1
    # Query 0 with R = 3 finds right, wrong, right: AP = (1/1 + 2/3) / 3, R-Precision 2/3.
    ranked = rank(angles(0, 1, 2, 3, 50, 51), [0, 0, 1, 0, 0, 1], [3, 3, 1, 3, 3, 1])
    assert ranked.sure[0] == 2 and ranked.precision[0] == 1 + 2 / 3


def test_jsd_by_hand():
    assert jensen_shannon(np.array([1, 2, 3]), np.array([2, 4, 6])) == 0
    assert jensen_shannon(np.array([5, 0]), np.array([0, 7])) == 1
    # P = (1, 0), Q = (1/2, 1/2), M = (3/4, 1/4): (log2(4/3) + (log2(2/3) + log2(2)) / 2) / 2
    expected = (np.log2(4 / 3) + (np.log2(2 / 3) + 1) / 2) / 2
    assert jensen_shannon(np.array([1, 0]), np.array([3, 3])) == pytest.approx(expected, abs=1e-15)
    assert np.isnan(jensen_shannon(np.array([0, 0]), np.array([1, 1])))


@pytest.mark.parametrize("seed", range(6))
def test_ties_in_expectation_are_the_mean_over_all_orders(seed, each_counter):
    """Six rows in all 720 orders, the smaller index first: their mean is what every order gives."""
    rng = np.random.default_rng(seed)
    x, labels = rng.integers(0, 2, (6, 2)) + 0.5, np.array([0, 0, 1, *rng.integers(0, 2, 3)])
    drawn = []
    for order in map(list, itertools.permutations(range(6))):
        space, value = pairs.normalise(x[order].astype(np.float32)), labels[order]
        relevant = np.bincount(value)[value] - 1
        ranked = pairs.rank_queries(space, value, relevant, 3, 1, by_index=True)
        metrics = [ranked.begin < k for k in (1, 2, 3)]
        metrics += [ranked.sure / relevant, ranked.precision / relevant]
        drawn.append(np.mean(np.where(ranked.hits, metrics, 0)[:, relevant > 0], axis=1))
    score = pair_scores(x, labels, recall=(1, 2, 3), permutations=0)
    ours = [*score.recall.values(), score.r_precision, score.map_at_r]
    np.testing.assert_allclose(ours, np.mean(drawn, 0), atol=1e-12)


# ---------------------------------------------------------------- against independent references

@pytest.mark.parametrize("seed", range(8))
def test_jsd_is_the_square_of_scipys(seed):
    rng = np.random.default_rng(seed)
    p, q = rng.integers(0, 9, (2, 50)) * rng.integers(0, 2, (2, 50))
    assert jensen_shannon(p, q) == pytest.approx(jensenshannon(p, q, base=2) ** 2, abs=1e-12)


KINDS = "normal integers duplicates identical signs one-hot tiny huge narrow lengths".split()


@pytest.mark.parametrize("kind", KINDS)
def test_equals_plain_loops(kind, each_counter):
    rng = np.random.default_rng(KINDS.index(kind))
    for n, m, classes in ((5, 1, 2), (40, 3, 4), (67, 9, 30), (60, 130, 3), (50, 300, 6)):
        x, labels = embeddings_of(kind, n, m, rng), rng.integers(0, classes, n)
        labels[:3] = 0, 0, 1
        options = dict(bins=(1, 7, 40, 80, 200), recall=(1, 3, 10 ** 6), threads=2, ties="index")
        score = pair_scores(x, labels, permutations=0, **options)
        for bins in score.jsd:
            positive, negative, *rest = reference(x, labels, bins, options["recall"])
            np.testing.assert_array_equal(score.histograms[bins], [positive, negative])
        assert (score.positive_pairs, score.negative_pairs) == (positive.sum(), negative.sum())
        assert score.recall[10 ** 6] == 1
        for ours, theirs in zip((score.positive_mean, score.negative_mean, score.recall, score.r_precision,
                                 score.map_at_r), rest):
            assert ours == pytest.approx(theirs, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_kernel_equals_its_twin_on_any_small_input(data):
    n, m = data.draw(st.integers(3, 30)), data.draw(st.integers(1, 10))
    finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
    value = st.one_of(st.integers(-2, 2).map(float), finite)
    x = data.draw(st.lists(value, min_size=n * m, max_size=n * m))
    x = np.array(x, np.float32).reshape(n, m)
    x[(x == 0).all(1)] = 1
    labels = np.array([0, 0, 1] + data.draw(st.lists(st.integers(0, 4), min_size=n - 3, max_size=n - 3)))
    bins = data.draw(st.lists(st.integers(1, 5000), min_size=1, max_size=3, unique=True))
    ties = data.draw(st.sampled_from([*pairs.TIES]))
    options = dict(bins=bins, permutations=2, intervals=True, recall=(1, 4), ties=ties)
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
    assert 0 <= fast.map_at_r <= fast.r_precision + 1e-12 <= 1 + 1e-12 and fast.recall[1] <= fast.recall[4]


@pytest.mark.parametrize("classes", (3, 40))
def test_against_pytorch_metric_learning(classes):
    pml = pytest.importorskip("pytorch_metric_learning", reason="a test dependency")
    torch = pytest.importorskip("torch")
    from pytorch_metric_learning.utils import accuracy_calculator, inference

    x, labels = normal(classes, 500, 16, classes)
    x += normal(classes + 1, classes, 16)[labels]
    score, names = pair_scores(x, labels), ("mean_average_precision_at_r", "r_precision", "precision_at_1")
    nearest = inference.CustomKNN(pml.distances.CosineSimilarity())  # its own default needs faiss
    theirs = accuracy_calculator.AccuracyCalculator(
        include=names, k="max_bin_count", knn_func=nearest, device=torch.device("cpu")).get_accuracy(
        torch.from_numpy(pairs.normalise(x).unit), torch.from_numpy(labels))
    ours = dict(zip(names, (score.map_at_r, score.r_precision, score.recall[1])))
    assert ours == pytest.approx({name: theirs[name] for name in names}, abs=1e-6)


def test_many_rows_and_columns_of_tiles():
    """More rows than a tile has, classes larger and smaller than one: counts of float64 products."""
    rng = np.random.default_rng(1)
    n = 3001
    x = np.round(rng.standard_normal((n, 5)) * 4).astype(np.float32) + np.float32(0.5)
    labels = np.where(rng.random(n) < 0.7, 0, rng.integers(0, 400, n))
    score = pair_scores(x, labels, permutations=0)
    unit = x.astype(np.float64) / np.sqrt((x.astype(np.float64) ** 2).sum(1))[:, None]
    expected = np.zeros((2, 200), int)
    for i in range(n - 1):
        s = np.floor(((unit[i] * unit[i + 1:]).sum(1) + 1) * 100).clip(0, 199).astype(int)
        same = labels[i + 1:] == labels[i]
        expected += [np.bincount(s[same], minlength=200), np.bincount(s[~same], minlength=200)]
    np.testing.assert_array_equal(score.histograms[200], expected)


# ---------------------------------------------------------------- properties that must hold

def test_nothing_but_input_options_and_seed_matters(monkeypatch):
    x, labels = normal(2, 900, 11, 60)
    options = dict(bins=(200, 30), permutations=3, intervals=True, seed=5)
    one = repr(pair_scores(x, labels, threads=1, **options))
    for threads, rows, columns, ranked in ((2, 512, 2048, 1000), (3, 100, 64, 13), (1, 7, 1024, 1)):
        monkeypatch.setattr(pairs, "ROWS", rows)
        monkeypatch.setattr(pairs, "COLUMNS", columns)
        monkeypatch.setattr(pairs, "RANKED", ranked)
        assert repr(pair_scores(x, labels, threads=threads, **options)) == one
    assert repr(pair_scores(x, labels, **{**options, "seed": 6})) != one


def test_products_may_be_as_wrong_as_their_bound():
    """Whatever the order of adding up: products disturbed within the bound give the same counts and ranks."""
    knn = pairs._knn or pytest.skip("the extension is not built: pip install .")
    rng, n = np.random.default_rng(3), 300
    x = np.round(rng.standard_normal((n, 12)) * 4).astype(np.float32) / 4 + np.float32(0.125)
    space, position = pairs.normalise(x), np.arange(n)
    value = np.sort(rng.integers(0, 20, n))
    relevant = np.bincount(value, minlength=20)[value] - 1
    ranges = np.array([position + 1, np.searchsorted(value, value, "right"), np.full(n, n)])
    expected = pairs.count_pairs_numpy(space, position, ranges, value, [200, 30])
    ranked = [pairs.rank_queries_numpy(space, value, position, relevant, 4, by_index) for by_index in (0, 1)]
    for bound in (space.bound, 1e-4, 1e-3, 0.04):        # beyond the true one: many pairs beside edges
        counts, bins, limits = np.zeros_like(expected), np.array([200, 30]), np.full(n, bound)
        got = [(np.zeros((n, 7), np.int64), np.zeros(n)) for _ in ranked]
        for q in range(n):                               # each product of row q is off by so much
            noise, one = rng.choice([-0.98, 0.0, 0.98], (n, 1)) * (bound - 2e-7), slice(q, q + 1)
            panels = knn.panels_of((space.unit + noise * space.unit[q]).astype(np.float32))
            knn.pair_histogram(space.unit[one], panels, q, 0, ranges, value, position, *space.source(),
                               space.norms, bound, bins, counts[value[q]:value[q] + 1])
            for by_index, (found, precision) in enumerate(got):
                knn.rank_hits(space.unit[one], panels, position[one], limits[one], *space.source(),
                              space.norms, np.zeros(n, np.float32), value.astype(np.int32), relevant[one], 4,
                              found[one], precision[one], by_index)
        np.testing.assert_array_equal(counts, expected)
        for (found, precision), (places, sums) in zip(got, ranked):
            np.testing.assert_array_equal(found, places)
            np.testing.assert_array_equal(precision, sums)


def test_order_names_and_lengths_of_the_rows_do_not_matter():
    x, labels = normal(4, 200, 6, 9)
    x[50:150] = np.round(x[50:150, :3] * 2) @ np.ones((3, 6)) + 0.5                       # ties, too
    rng = np.random.default_rng(5)
    one, order = pair_scores(x, labels, permutations=0), rng.permutation(200)
    scaled = x * np.exp2(rng.integers(-3, 4, (200, 1))).astype(np.float32)    # changes no digit
    named = np.array([f"class {9 - v}" for v in labels])
    for changed, renamed in ((scaled, labels), (x[order], named[order])):
        other = pair_scores(changed, renamed, permutations=0)
        np.testing.assert_array_equal(other.histograms[200], one.histograms[200])
        assert other.recall == pytest.approx(one.recall, abs=1e-12) and other.jsd == one.jsd
        assert other[-4:-2] == pytest.approx(one[-4:-2], abs=1e-12) and other.tied == one.tied > 20
        assert other[7:9] == pytest.approx(one[7:9])                          # means


def test_jsd_null_falls_as_positives_grow():
    nulls = [pair_scores(normal(n, n, 8), np.arange(n) % (n // 4)).jsd_null[200]
             for n in (40, 200, 1000)]                                        # classes of four
    assert nulls[0] > 1.5 * nulls[1] > 2 * nulls[2] > 0
    # Labels that mean nothing: the JSD itself is no farther from 0 than its null.
    score = pair_scores(normal(6, 600, 8), np.arange(600) % 150)
    assert score.jsd[200] == pytest.approx(score.jsd_null[200], rel=0.25)


def test_jsd_null_against_labels_permuted_literally():
    x, labels = normal(13, 50, 3, 9)
    labels, expected = np.sort(labels), []
    for i in range(4):
        permuted = np.empty(50, int)
        permuted[np.random.default_rng([7, 1, i]).permutation(50)] = labels
        positive, negative, *_ = reference(x, permuted, 20, (1,))
        expected.append(jensenshannon(positive, negative, base=2) ** 2)
    score = pair_scores(x, labels, bins=(20,), permutations=4, seed=7)
    assert score.jsd_null[20] == pytest.approx(np.mean(expected))


def test_separated_and_collapsed_classes():
    labels = np.repeat(np.arange(6), 30)
    score = pair_scores(np.eye(6, dtype=np.float32)[labels] + 0.01 * normal(7, 180, 6), labels)
    assert score.jsd[200] == score.recall[1] == score.r_precision == score.map_at_r == 1
    score = pair_scores(np.ones((180, 6)), labels)
    assert score.jsd[200] == 0 and score.positive_mean == score.negative_mean == pytest.approx(1)
    assert score.recall[1] == score.r_precision == pytest.approx(29 / 179) and score.tied == 180


def test_jackknife_against_leaving_each_class_out():
    x, labels = normal(8, 120, 4, 7)
    x += normal(9, 7, 4)[labels]
    score = pair_scores(x, labels, bins=(40, 15), intervals=True, permutations=0)
    for bins in (40, 15):
        left = [pair_scores(x[labels != c], labels[labels != c], bins=(bins,)).jsd[bins] for c in range(7)]
        half = 2.446912 * np.sqrt(6 / 7 * ((left - np.mean(left)) ** 2).sum())  # t of 6 degrees of freedom
        expected = np.clip([score.jsd[bins] - half, score.jsd[bins] + half], 0, 1)
        assert score.intervals["jsd", bins] == pytest.approx(expected, abs=1e-6)


def test_bootstrap_against_a_direct_resampling_of_queries():
    rng = np.random.default_rng(9)
    value, each = rng.integers(0, 12, 300), {"metric": rng.random(300)}
    interval = pairs.bootstrap(each, value, np.ones(300, bool), seed=4)["metric"]
    generator, means = np.random.default_rng([4, 2]), []
    for _ in range(pairs.BOOTSTRAP):
        drawn = [each["metric"][value == c] for c in generator.integers(0, 12, 12)]
        means.append(np.concatenate(drawn).mean())
    assert interval == pytest.approx(np.quantile(means, [0.025, 0.975]))


def test_intervals_are_as_wide_as_results_scatter():
    """30 experiments, each with new classes: the mean half width is near 2 standard deviations of results."""
    scores = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        labels = np.repeat(np.arange(30), 12)
        centres = rng.standard_normal((30, 6)) * rng.gamma(2, 0.5, (30, 1))
        x = rng.standard_normal((360, 6)) + centres[labels]
        scores.append(pair_scores(x, labels, bins=(50,), intervals=True, permutations=0))
    values = {("jsd", 50): [s.jsd[50] for s in scores], ("map_at_r", None): [s.map_at_r for s in scores],
              ("recall", 1): [s.recall[1] for s in scores]}
    for name, each in values.items():
        half = np.mean([(s.intervals[name][1] - s.intervals[name][0]) / 2 for s in scores])
        assert 0.6 < half / (2 * np.std(each)) < 1.7, name


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
    labels, change = np.repeat(np.arange(80), 10), []
    x = normal(10, 800, 16) + 0.8 * normal(11, 80, 16)[labels]
    few, many = ([pair_scores(x[rows], labels[rows], bins=(50,), permutations=0)
                  for _, _, rows in pairs.class_subsets(labels, [k], 5, 1)] for k in (5, 80))
    for get in (lambda s: s.jsd[50], lambda s: s.map_at_r, lambda s: s.recall[1]):
        change.append(np.mean([get(s) for s in many]) / np.mean([get(s) for s in few]))
    assert 0.85 < change[0] < 1.15 and change[1] < 0.6 and change[2] < 0.8


@pytest.mark.parametrize("dtype", (np.float16, np.float32, np.float64, np.int16))
def test_pictures_without_a_label_are_in_no_pair(dtype, each_counter, tmp_path):
    """As the rows that have one are alone, in whatever precision a file has them."""
    x, labels = normal(14, 120, 5, 6)
    x, lacking = np.round(x * 3).astype(dtype) + dtype(9), np.random.default_rng(15).random(120) < 0.3
    np.save(tmp_path / "x.npy", x)
    options = dict(intervals=True, seed=3)
    alone = pair_scores(x[~lacking].astype(np.float32), labels[~lacking], **options)
    for missing in (np.where(lacking, np.nan, labels), np.where(lacking, "", labels.astype(str))):
        score = pair_scores(np.load(tmp_path / "x.npy", mmap_mode="r"), missing, **options)
        assert score.missing == lacking.sum() and repr(score._replace(missing=0)) == repr(alone)


@pytest.mark.parametrize("change, words", (
    (dict(bins=(0,)), "bins: 0"), (dict(bins=(40_000,)), "at most 32,000"), (dict(bins=()), "bins: none"),
    (dict(recall=(0,)), "recall: 0"), (dict(permutations=-1), "permutations: -1"),
    (dict(seed=-1), "seed: -1"), (dict(threads=0), "threads: 0"), (dict(labels=[0, 1, 1]), r"\(4,\)"),
    (dict(labels=[0, 1, 2, 3]), "all distinct"), (dict(labels=[1, 1, 1, 1]), "one class only"),
    (dict(embeddings=np.ones(4)), r"\(n, m\)"), (dict(embeddings=np.ones((4, 2)) * 1j), "complex"),
    (dict(embeddings=np.full((4, 2), np.nan)), "row 0"),
    (dict(embeddings=np.eye(4, 2)), "row 2 is a zero vector"), (dict(ties="random"), "random")))
def test_arguments_out_of_range(change, words):
    with pytest.raises(ValueError, match=words):
        pair_scores(**{"embeddings": angles(0, 1, 2, 3), "labels": [0, 0, 1, 1], **change})


# ---------------------------------------------------------------- the command line

GOOD = ("emb.npy", "emb.csv")
HEADER = ("embeddings,label,n,positive_pairs,negative_pairs,positive_mean,negative_mean,jsd,jsd_null,bins,"
          "recall_at_1,recall_at_2,recall_at_4,recall_at_8,r_precision,map_at_r,ties,tied,missing").split(",")


@pytest.fixture
def files(embedded):
    """The current folder, with emb.npy (60, 5), emb.csv with class and super-class, train.* with 40 rows."""
    np.save("train.npy", normal(12, 40, 5))
    write_rows("train.csv", "path,class,super_class", [[i, "abcdef"[i % 6], i % 2] for i in range(40)])


def test_table_and_rows(files, run_script):
    done = run_script("pairs.py", "emb.npy", "emb.csv", "--out", "pairs.csv")
    assert done.returncode == 0 and done.stderr == ""
    row, = read_rows("pairs.csv")
    assert list(row) == HEADER and [row[key] for key in HEADER[:2]] == ["emb.npy", "class"]
    score = pair_scores(np.load("emb.npy"), np.arange(60) % 6)
    assert row["ties"] == "expected" and [float(row[key]) for key in HEADER[2:-3]] == [
        60, 270, 1500, score.positive_mean, score.negative_mean, score.jsd[200], score.jsd_null[200], 200,
        *score.recall.values(), score.r_precision, score.map_at_r]
    assert f"{score.jsd[200]:.4f}" in done.stdout and "MAP@R" in done.stdout
    assert sorted(os.listdir()) == ["emb.csv", "emb.npy", "pairs.csv", "props.csv", "train.csv", "train.npy"]
    np.save("mine.npy", np.array(list("abcdef"))[np.arange(60) % 6])  # labels in an array
    again = run_script("pairs.py", "emb.npy", "mine.npy", "--out", "pairs.csv")
    assert again.returncode == 0 and again.stdout == done.stdout


def test_every_option(files, run_main):
    pytest.importorskip("matplotlib", reason="pip install '.[report]'")
    np.save("other.npy", np.load("emb.npy")[:, :2].astype(np.float64))
    files = ("emb.npy", "other.npy", "emb.csv", "--train", "train.npy", "train.csv", "--figure", "f.png")
    done = run_main("pairs.py", *files, "--label", "class", "--bins", "20,40", "--recall", "1,10", "--seed",
                      3, "--permutations", 2, "--classes", "4,2", "--repeats", 3, "--threads", 2, "--out",
                      "o.csv", "--histograms", "h.csv", "--intervals", "i.csv", "--class-figure", "c.png")
    assert done.returncode == 0, done.stderr
    rows = read_rows("o.csv")
    assert list(rows[0]) == (["split", "classes", "repeat"] + HEADER[:10]
                             + ["recall_at_1", "recall_at_10", "r_precision", "map_at_r", *HEADER[-3:]])
    assert len(rows) == 3 * 2 * (1 + 2 * 3)                  # files × bins × (all, 2 numbers × 3 repeats)
    assert [r["split"] for r in rows[::14]] == ["test", "test", "train"]
    assert [r["classes"] for r in rows[:14:2]] == ["6", "2", "2", "2", "4", "4", "4"]
    histogram = read_rows("h.csv")
    assert len(histogram) == 3 * 60 and (histogram[0]["low"], histogram[19]["high"]) == ("-1.0", "1.0")
    assert sum(int(r["positive"]) + int(r["negative"]) for r in histogram[:20]) == 1770
    intervals = read_rows("i.csv")
    assert [(r["metric"], r["bins"], r["method"]) for r in intervals[:6]] == [
        ("recall_at_1", "", "bootstrap"), ("recall_at_10", "", "bootstrap"), ("r_precision", "", "bootstrap"),
        ("map_at_r", "", "bootstrap"), ("jsd", "20", "jackknife"), ("jsd", "40", "jackknife")]
    assert all(float(r["low"]) <= float(r["value"]) <= float(r["high"]) for r in intervals)
    whole = [r["jsd_null"] for r in rows if not r["repeat"]]  # beside every JSD
    assert [r["jsd_null"] for r in intervals if r["metric"] == "jsd"] == whole
    for name in ("f.png", "c.png"):
        with Image.open(name) as image:
            assert len(image.convert("RGB").getcolors(1 << 24)) > 20
    assert "95% intervals" in done.stdout and "2 to 4" in done.stdout and "JSD, 40 bins" in done.stdout
    again = Path("f.png").read_bytes()
    run_main("pairs.py", *files, "--bins", "20,40", "--threads", 1, "--seed", 3, "--permutations", 2)
    assert Path("f.png").read_bytes() == again


def test_missing_labels(files, run_main):
    write_rows("emb.csv", "path,class", [[i, "abcd?"[i % 5]] for i in range(60)])
    done = run_main("pairs.py", *GOOD, "--missing", "-, ?", "--classes", 2, "--out", "o.csv")
    assert done.returncode == 0 and "12 of 60 pictures have no class: in no pair" in done.stderr
    whole, *subsets = read_rows("o.csv")
    here = np.arange(60) % 5 < 4
    alone = pair_scores(np.load("emb.npy")[here], np.arange(60)[here] % 5)
    assert (whole["n"], whole["missing"], float(whole["jsd"])) == ("48", "12", alone.jsd[200])
    assert {row["n"] for row in subsets} == {"24"} and {row["missing"] for row in subsets} == {""}


def test_ties_lone_pictures_and_a_missing_interval_are_told_in_one_line(files, run_main):
    table, came = Path("emb.csv").read_text(), np.load("emb.npy")
    Path("emb.csv").write_text(table.replace("0,a,0", "0,only,0", 1))
    done = run_main("pairs.py", *GOOD, "--permutations", 0, "--out", "o.csv")
    assert done.returncode == 0 and done.stderr.count("\n") == 1
    assert "1 of 60 pictures are alone" in done.stderr and read_rows("o.csv")[0]["jsd_null"] == ""
    Path("emb.csv").write_text(table)
    done = run_main("pairs.py", *GOOD, "--label", "super_class", "--intervals", "i.csv")  # of two classes
    assert done.returncode == 0 and done.stderr.count("\n") == 1
    assert "the JSD has no interval (nan)" in done.stderr
    assert [r["low"] == "nan" for r in read_rows("i.csv")] == [False] * 6 + [True]
    for x, words in ((came.round() + 3, "positives and others at the same distance"),
                     (np.sign(came[:, :1]), "100% of the queries"), (came ** 0, "60 embeddings are equal")):
        np.save("emb.npy", x)
        done = run_main("pairs.py", *GOOD)
        assert done.stderr.count("\n") == 1 and words in done.stderr


BOTH = pytest.mark.parametrize("script", (nrprec, pairs), ids=("nrprec.py", "pairs.py"))


@BOTH
def test_without_the_extension_it_says_so(script, files, monkeypatch, capsys):
    script.main([*GOOD])
    before = capsys.readouterr()
    monkeypatch.setattr(script, "_knn", None)
    script.main([*GOOD])
    after = capsys.readouterr()
    assert after.out == before.out and "not built" in after.err and after.err.endswith(before.err)


@BOTH
def test_torch_is_not_loaded(script):
    code = f"import sys, {script.__name__}, dml_common.files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("options, words", (
    (["--label", "colour"], "'colour'; it has class, super_class (column of --label)"),
    (["--bins", "0"], "--bins 0"), (["--bins", "many"], "--bins many: expected whole numbers"),
    (["--bins", "50,"], "--bins 50,"), (["--bins", "99999"], "at most 32,000"), (["--recall", "x"], "--rec"),
    (["--recall", "0"], "--recall 0"), (["--classes", "1"], "--classes 1"), (["--seed", "-1"], "--seed -1"),
    (["--classes", "7"], "there are 6 classes of two or more"), (["--threads", "0"], "--threads 0"),
    (["--classes", "2", "--repeats", "0"], "--repeats 0"), (["--permutations", "-1"], "--permutations -1"),
    (["--permutations", "x"], "'x'"), (["--ties", "random"], "random"),
    (["--train", "emb.npy"], "--train"),
    (["--class-figure", "c.png"], "--class-figure needs --classes"), (["--figure", ".."], "is a folder"),
    (["--out", "no/o.csv"], "does not exist"), (["--out", "o.csv", "--intervals", "./o.csv"], "two outputs"),
    (["--train", "missing.npy", "train.csv"], "missing.npy does not"), (["--out", "emb.csv"], "an input"),
    (["--train", "emb.npy", "train.csv"], "emb.npy has 60 embeddings, train.csv 40 rows")))
def test_bad_options(files, refused, options, words):
    assert words in refused(pairs.main, *GOOD, *options)


@BOTH
def test_bad_files(script, files, refused, monkeypatch):
    for array, table, words in (
            ("emb.npy", "train.csv", "60 embeddings, train.csv 40 rows"), ("..", "emb.csv", "is a folder"),
            ("no.npy", "emb.csv", "does not exist"), ("emb.csv", "emb.csv", "the table comes last"),
            ("emb.npy", "none.csv", "none.csv does not exist; give a CSV file with a header")):
        assert words in refused(script.main, array, table)
    monkeypatch.setattr(os, "access", lambda *_: False)   # root may write anywhere
    assert "can't be written to" in refused(script.main, *GOOD, "--out", "out.csv")


@pytest.mark.parametrize("column, words", (
    (range(60), "all distinct"), (["x"] * 60, "one class only"), ([""] * 60, "all distinct")))
def test_bad_labels(files, refused, column, words):
    write_rows("bad.csv", "path,class", enumerate(column))
    message = refused(pairs.main, "emb.npy", "bad.csv", "--out", "o.csv")
    assert words in message and "bad.csv" in message


@BOTH
@pytest.mark.parametrize("value, words", ((0, "zero vector"), (np.nan, "not fin"), (-np.inf, "not finite")))
def test_bad_rows(script, files, refused, value, words):
    """What else an array can be is tried in test_files.py."""
    x = np.load("emb.npy")
    x[7] = value
    np.save("bad.npy", x)
    options = ["--distance", "cosine"] if script is nrprec else []
    message = refused(script.main, "bad.npy", "emb.csv", "--out", "o.csv", *options)
    assert words in message and "bad.npy" in message and "row 7 " in message


def test_shipped_example(run_script):
    """Real embeddings, 300 cars of six models through an ImageNet network, against NumPy and SciPy."""
    done = run_script("pairs.py", ROOT / "examples/cars/emb.npy", "--label", "model")     # props.csv beside
    assert done.returncode == 0, done.stderr
    x = np.load(ROOT / "examples/cars/emb.npy").astype(float)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    label = np.array([row["model"] for row in read_rows(ROOT / "examples/cars/props.csv")])
    upper = np.triu_indices(len(x), 1)
    products, same = (x @ x.T)[upper], (label[:, None] == label)[upper]
    positive, negative = (np.histogram(products[part], 200, (-1, 1))[0] for part in (same, ~same))
    jsd = jensenshannon(positive, negative, base=2) ** 2
    assert f"{jsd:.4f}" in done.stdout and f"{same.sum():,}" in done.stdout


def test_each_array_with_the_table_beside_it_one_in_a_row(files, run_main):
    for fold in range(5):
        place = Path(f"cars/triplet/fold{fold}")
        write_rows(place / "labels.csv", "path", [["0.png"]] * 20)                           # without shapes
        write_rows(place / "props.csv", "frame,shape", [[i, i % 4] for i in range(20)])
        np.save(place / "emb.npy", normal(fold, 20, 4))
    arrays = sorted(Path("cars").glob("*/*/emb.npy"))
    done = run_main("pairs.py", *arrays, "--label", "shape", "--out", "pairs.csv")
    assert done.returncode == 0 and len(read_rows("pairs.csv")) == 5
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "pictures", "fold0", "fold1", "fold2", "fold3", "fold4"]
    one_line(run_main("pairs.py", "cars/triplet/fold0/emb.npy"), "with a column class")
