"""R-Precision, NR-Prec, their errors and p-values: by hand, against an independent reference, as properties
that must hold; and the command line with every bad input."""
import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, one_line, read_rows, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st

import nrprec
from dml_common import properties
from nrprec import nr_precision

LINE = np.array([0, 1, 2, 10, 11, 12], np.float32)[:, None]
SIX = np.array(list("aabbab"))


# ---------------------------------------------------------------- worked out by hand

def test_six_points_on_a_line():
    """Each value three times: R = 2, p = 1/2. Hits by hand: 1, 1, 0, 1, 0, 1 (query 1 and 4 have ties)."""
    score = nr_precision(LINE, SIX)
    assert (score.values, score.queries, score.skipped) == (2, 6, 0)
    assert score.r_precision == pytest.approx(4 / 12)
    assert score.nr_precision == pytest.approx((4 / 6 - 1) / np.sqrt(0.5))
    # Hypergeometric: N = 5 others, K = 2 of them right, 2 draws: mean 0.8, variance 2 · 0.4 · 0.6 · 3/4.
    assert nr_precision(LINE, SIX, null="hypergeometric").nr_precision == pytest.approx((4 / 6 - 0.8) / 0.6)


def test_released_procedure_cuts_the_lists():
    """One neighbour: hits 1, 1 of two candidates at the same distance, 0, 0, 0 (of two again), 0."""
    score = nr_precision(LINE, SIX, max_neighbours=1)
    assert (score.r_precision, score.tied) == (pytest.approx(1.5 / 6), 2)
    assert score.nr_precision == pytest.approx((1.5 / 6 - 1 / 2) / 0.5)
    assert nr_precision(LINE, SIX, max_neighbours=1, ties="index").r_precision == pytest.approx(2 / 6)


def test_ties_go_to_the_smaller_index_if_asked():
    x = np.array([0, 1, 2, 9], np.float32)[:, None]
    for order, hits in (([0, 1, 2, 3], 1), ([2, 1, 0, 3], 2)):    # query 1 takes index 0: an a, then a b
        score = nr_precision(x[order], np.array(list("abba"))[order], ties="index")
        assert score.r_precision == hits / 4 and score.tied == 1
        assert nr_precision(x[order], np.array(list("abba"))[order]).r_precision == 1.5 / 4


def test_query_is_left_out_by_its_index():
    """Its duplicates count; the first neighbour is not assumed to be the query."""
    x, label = np.zeros((4, 3), np.float32), np.array([0, 1, 1, 0])
    assert nr_precision(x, label, ties="index").r_precision == 0.25              # query 3 finds index 0
    assert nr_precision(x, label).r_precision == pytest.approx(1 / 3)


def test_singletons_are_skipped_and_counted():
    score = nr_precision(LINE, np.array(list("aabbab")[:-1] + ["z"]))
    assert (score.values, score.queries, score.skipped) == (3, 5, 1)
    # a: R = 2, hits 1, 1, 0 of queries 0, 1, 4; b = {2, 3}: R = 1, hits 0, 0.
    z_a, z_b = (2 / 3 - 1) / np.sqrt(0.5), (0 - 1 / 3) / np.sqrt(2 / 9)
    assert score.r_precision == pytest.approx((0.5 + 0.5) / 5)
    assert score.nr_precision == pytest.approx((3 * z_a + 2 * z_b) / 5)


def test_constant_and_all_distinct_properties():
    constant, distinct = nr_precision(LINE, {"c": np.ones(6), "d": np.arange(6)}, permutations=5).values()
    assert constant.r_precision == 1 and np.isnan(constant.nr_precision) and np.isnan(constant.p_value)
    assert distinct.queries == 0 and distinct.skipped == 6
    assert np.isnan(distinct.r_precision) and np.isnan(distinct.nr_precision) and np.isnan(distinct.p_holm)


def nearest(x, query, distance):
    """The nearest of the others, by the definition that the counts equal."""
    d = nrprec.distances64(nrprec.prepare(x, distance), query)
    return np.where(np.arange(len(x)) == query, np.inf, d).argmin()


def test_distances_differ_where_they_must():
    x = np.array([[1, 0], [0.9, 0.1], [10, 1], [0, 2], [0, 3], [5, 5]], np.float32)
    assert [nearest(x, 0, d) for d in ("euclidean", "cosine", "dot_product")] == [1, 2, 2]
    assert nearest(x, 1, "dot_product") == 2
    # SNR ignores a constant added to every component; the Euclidean distance does not.
    x = np.array([[0, 1, 2], [7, 8, 9.1], [0.5, 1, 1]], np.float32)
    assert nearest(x, 0, "snr") == 1 and nearest(x, 0, "euclidean") == 2


def test_holm_by_hand():
    for holm in nrprec.holm, properties.holm:  # the script's copy and the package's
        np.testing.assert_allclose(holm([0.01, 0.04, 0.03, np.nan]), [0.03, 0.06, 0.06, np.nan])
        np.testing.assert_allclose(holm([0.5, 0.9]), [1.0, 1.0])


# ---------------------------------------------------------------- against an independent reference

def reference(x, label, null="binomial"):
    """R-Precision, NR-Prec and every query's z, in plain Python on float64 Euclidean distances."""
    x, n, precisions, z = x.astype(np.float64), len(x), [], []
    for q in range(n):
        d = {i: float(((x[q] - x[i]) ** 2).sum()) for i in range(n) if i != q}
        same = {i for i in d if label[i] == label[q]}
        r = len(same)
        if r == 0:
            continue
        cut = sorted(d.values())[r - 1]
        nearer, tied = {i for i in d if d[i] < cut}, {i for i in d if d[i] == cut}
        hits = len(nearer & same) + len(tied & same) * (r - len(nearer)) / len(tied)
        p = (r + 1) / n if null == "binomial" else r / (n - 1)
        shrink = 1 if null == "binomial" else (n - 1 - r) / (n - 2)
        precisions.append(hits / r)
        z.append((hits - r * p) / np.sqrt(r * p * (1 - p) * shrink))
    return np.mean(precisions), np.mean(z), np.array(z)


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 60), st.integers(1, 8), st.integers(2, 12), st.integers(0, 10 ** 6),
       st.sampled_from(nrprec.NULLS))
def test_equals_plain_loops(n, m, cardinality, seed, null):
    rng = np.random.default_rng(seed)
    x = np.round(rng.standard_normal((n, m)) * 2).astype(np.float32)
    label = rng.integers(0, cardinality, n)
    label[:4] = [0, 0, 1, 1]
    score = nr_precision(x, label, null=null)
    precision, normalized, z = reference(x, label, null)
    assert score.queries == len(z) and score.skipped == n - len(z)
    assert score.r_precision == pytest.approx(precision) and score.nr_precision == pytest.approx(normalized)


@pytest.mark.parametrize("kind", ("all equal", "8-bit codes", "rounded"))
def test_ties_in_expectation_are_the_mean_over_orders(kind):
    """What the order of the rows gives on average, the smaller index first; no order changes the result."""
    rng = np.random.default_rng(16)
    x = {"all equal": np.ones((60, 8)), "8-bit codes": rng.integers(0, 2, (60, 8)),
         "rounded": np.round(rng.standard_normal((60, 2)))}[kind]
    labels = {"half": np.sort(rng.choice([0, 0, 0, 1], 60)), "few": np.sort(rng.integers(0, 25, 60))}
    scores, drawn = nr_precision(x, labels, null="hypergeometric", permutations=60), []
    for _ in range(400):
        order = rng.permutation(60)
        shuffled = {name: label[order] for name, label in labels.items()}
        by_index = nr_precision(x[order], shuffled, null="hypergeometric", ties="index")
        drawn.append([s.nr_precision for s in by_index.values()])
    other = nr_precision(x[order], shuffled, null="hypergeometric")
    for mean, error, (name, score) in zip(np.mean(drawn, 0), np.std(drawn, 0) / 20, scores.items()):
        assert abs(score.nr_precision - mean) < 4.5 * error + 1e-9
        assert score.nr_precision == pytest.approx(other[name].nr_precision, abs=1e-12)
        assert score.tied == other[name].tied > 0.3 * score.queries
        if kind == "all equal":
            assert abs(score.nr_precision) < 1e-12 and score.p_value == score.p_holm == 1


def test_p_values_against_a_direct_permutation_test():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((40, 3)).astype(np.float32)
    label = (x[:, 0] + 0.7 * rng.standard_normal(40) > 0).astype(int)
    score = nr_precision(x, label, permutations=60, seed=9)
    orders = [np.random.default_rng([9, 1 + i]).permutation(40) for i in range(60)]
    permuted = np.array([reference(x, label[order])[1] for order in orders])
    extreme = (np.abs(permuted - permuted.mean()) >= abs(score.nr_precision - permuted.mean()) - 1e-9).sum()
    assert score.p_value == pytest.approx((1 + extreme) / 61)


def test_standard_error_of_a_query_subset():
    rng = np.random.default_rng(4)
    x, label = rng.standard_normal((300, 4)).astype(np.float32), rng.integers(0, 5, 300)
    full, z = nr_precision(x, label), reference(x, label)[2]
    assert full.nr_precision_se is None
    assert np.isnan(nr_precision(LINE, SIX, queries=1).nr_precision_se)  # of one query
    scores = [nr_precision(x, label, queries=60, seed=seed) for seed in range(200)]
    one = np.sort(np.random.default_rng([0, 0]).choice(300, 60, replace=False))
    assert scores[0].nr_precision == pytest.approx(z[one].mean())
    assert scores[0].nr_precision_se == pytest.approx(z[one].std(ddof=1) / np.sqrt(60) * np.sqrt(0.8))
    means = np.array([score.nr_precision for score in scores])
    errors = np.array([score.nr_precision_se for score in scores])
    assert abs(means.mean() - full.nr_precision) < 4 * errors.mean() / np.sqrt(200)
    assert 0.8 < means.std() / errors.mean() < 1.25          # the stated error is the observed one


# ---------------------------------------------------------------- properties that must hold

def test_planted_clusters_reach_the_maximum():
    label = np.repeat(np.arange(6), 50)
    x = np.eye(6, dtype=np.float32)[label] + np.random.default_rng(0).normal(0, 0.01, (300, 6))
    score = nr_precision(x, label, permutations=200)
    assert score.r_precision == 1
    assert score.nr_precision == pytest.approx(np.sqrt(49 * (1 - 1 / 6) / (1 / 6)))
    assert score.p_value == 1 / 201


def test_random_embeddings_stay_inside_the_permutation_distribution():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((300, 16)).astype(np.float32)
    p = []
    for null in nrprec.NULLS:
        labels = {str(v): rng.integers(0, v, 300) for v in (2, 3, 6, 10, 100)}
        p += [s.p_value for s in nr_precision(x, labels, permutations=300, null=null).values()]
    assert min(p) > 0.005 and max(p) > 0.3


def test_hypergeometric_null_is_unbiased_where_the_binomial_is_not():
    """DESIGN's erratum: with p = c / n the null mean is about −sqrt((1 − p) / n), without replacement 0."""
    rng = np.random.default_rng(2)
    x, n = rng.standard_normal((200, 8)).astype(np.float32), 200
    labels = {str(i): rng.integers(0, 2, n) for i in range(150)}
    mean = {null: np.mean([s.nr_precision for s in nr_precision(x, labels, null=null).values()])
            for null in nrprec.NULLS}
    assert abs(mean["hypergeometric"]) < 0.02
    assert mean["binomial"] == pytest.approx(-np.sqrt(0.5 / n), abs=0.015)


def test_nothing_but_input_options_and_seed_matters():
    rng = np.random.default_rng(5)
    x = rng.standard_normal((500, 9)).astype(np.float32)
    x[100:400] = np.round(x[100:400, :2] * 2) @ np.ones((2, 9))           # ties, too
    labels = {"few": rng.integers(0, 3, 500), "some": rng.integers(0, 30, 500).astype(str),
              "many": rng.integers(0, 200, 500)}
    options = dict(permutations=40, queries=350, seed=3)
    one = nr_precision(x, labels, threads=1, memory_mib=512, **options)
    for threads, memory_mib in ((2, 1), (3, 2), (2, 64)):              # 1 MiB: several passes
        assert nr_precision(x, labels, threads=threads, memory_mib=memory_mib, **options) == one
    backwards = nr_precision(x, dict(reversed(labels.items())), **options)
    assert {name: s._replace(p_holm=0) for name, s in backwards.items()} == \
           {name: s._replace(p_holm=0) for name, s in one.items()}
    assert nr_precision(x, labels, **{**options, "seed": 4}) != one


def test_without_the_extension_the_numbers_are_the_same(monkeypatch):
    rng = np.random.default_rng(6)
    x, labels = rng.standard_normal((120, 5)), {"a": rng.integers(0, 4, 120), "b": rng.integers(0, 60, 120)}
    x[30:90] = np.round(x[30:90])
    options = [dict(permutations=5, ties=ties, max_neighbours=k) for ties in nrprec.TIES for k in (None, 3)]
    fast = [nr_precision(x, labels, **each) for each in options]
    monkeypatch.setattr(nrprec, "_knn", None)
    assert [nr_precision(x, labels, **each) for each in options] == fast


def test_normalised_embeddings_of_any_distance():
    """Eq. 3's own distance: that of the rows divided by their lengths; of SNR it is not the raw rows'."""
    rng = np.random.default_rng(15)
    x, label = rng.standard_normal((80, 6)) * rng.gamma(1, 1, (80, 1)), rng.integers(0, 4, 80)
    unit = x.astype(np.float32).astype(np.float64)
    unit = (unit / np.sqrt((unit ** 2).sum(1, keepdims=True))).astype(np.float32)
    for distance in nrprec.DISTANCES:
        normalised = nr_precision(x, label, distance=distance, normalise=True)
        assert normalised == nr_precision(unit, label, distance=distance)
    assert normalised != nr_precision(x, label, distance="snr")
    a, b = unit[:, None].astype(np.float64), unit[None].astype(np.float64)
    d = np.var(a - b, axis=2) / np.var(a, axis=2) + np.diag(np.full(80, np.inf))
    hits = [np.mean(label[np.argsort(row)[:(label == v).sum() - 1]] == v) for row, v in zip(d, label)]
    assert normalised.r_precision == pytest.approx(np.mean(hits))


@pytest.mark.parametrize("distance", nrprec.DISTANCES)
@pytest.mark.parametrize("normalise", (False, True))
def test_pictures_without_a_value_are_left_out(distance, normalise):
    """Each property equals one run on the rows that have a value, to the last bit; however it is missing."""
    rng = np.random.default_rng(17)
    x = np.round(rng.standard_normal((90, 4)) * 3).astype(np.float16) + np.eye(90, 4, dtype=np.float16) / 2
    x[(x == x[:, :1]).all(1), 1] += 1                     # SNR has no constant ones
    lacks = rng.random(90) < 0.2, rng.random(90) < 0.6
    labels = {"text": rng.integers(0, 4, 90).astype(str), "number": rng.integers(0, 20, 90).astype(float),
              "object": rng.integers(0, 3, 90).astype(object), "whole": rng.integers(0, 5, 90)}
    labels["text"][lacks[0]], labels["number"][lacks[0]], labels["object"][lacks[1]] = "", np.nan, None
    options = dict(distance=distance, normalise=normalise, permutations=9, queries=30, seed=2, per_value=True)
    together = nr_precision(x, labels, **options)
    for name, lacking in zip(labels, (lacks[0], lacks[0], lacks[1], np.zeros(90, bool))):
        alone = nr_precision(x[~lacking], labels[name][~lacking], **options)
        assert together[name].missing == lacking.sum() and alone.missing == 0
        assert repr(together[name]._replace(missing=0, p_holm=0, by_value=0)) == repr(
            alone._replace(p_holm=0, by_value=0))
        assert repr(list(together[name].by_value)) == repr(list(alone.by_value))
        for ours, theirs in zip(together[name].by_value.values(), alone.by_value.values()):
            assert repr(ours._replace(p_holm=0)) == repr(theirs._replace(p_holm=0))


def test_properties_of_nobody_and_of_one_picture():
    lacking = np.array([np.nan] * 6), np.array(["", "", "x", "", "", ""])
    for label, n in zip(lacking, (0, 1)):
        score = nr_precision(LINE, label, permutations=3)
        assert score[:3] == (n, 0, n) and score.missing == 6 - n and np.isnan(score.nr_precision)
        assert len(nr_precision(LINE, label, per_value=True).by_value) == n


def test_the_queries_of_each_value():
    """By hand as above: a has queries 0, 1, 4 with hits 1, 1, 0, b 2, 3, 5 with 0, 1, 1; R = 2, p = 1/2."""
    a, b = nr_precision(LINE, SIX, per_value=True).by_value.values()
    for score in (a, b):
        assert (score.values, score.queries, score.r_precision) == (1, 3, pytest.approx(1 / 3))
        assert score.nr_precision == pytest.approx((2 / 3 - 1) / np.sqrt(0.5))
    rng = np.random.default_rng(18)
    x, label = rng.standard_normal((40, 3)).astype(np.float32), rng.integers(0, 3, 40)
    label[x[:, 0] > 1] = 3
    whole = nr_precision(x, {"p": label, "q": label % 2}, permutations=60, seed=9, per_value=True)
    orders = [np.random.default_rng([9, 1 + i]).permutation(40) for i in range(60)]
    for value, score in whole["p"].by_value.items():
        observed, *permuted = [reference(x, some)[2][some == value].mean()
                               for some in (label, *(label[order] for order in orders))]
        far = np.abs(permuted - np.mean(permuted)) >= abs(observed - np.mean(permuted)) - 1e-9
        assert score.nr_precision == pytest.approx(observed) and score.p_value == (1 + far.sum()) / 61
    tests = [s for score in whole.values() for s in score.by_value.values()]
    np.testing.assert_allclose([s.p_holm for s in tests], nrprec.holm([s.p_value for s in tests]))


@pytest.mark.parametrize("dtype", (np.float16, np.float64, np.int16, bool))
def test_other_number_types_are_converted(dtype):
    x = np.round(np.random.default_rng(7).standard_normal((60, 4)) * 3).astype(dtype)
    label = np.arange(60) % 4
    assert nr_precision(x, label) == nr_precision(x.astype(np.float32), label)


@pytest.mark.parametrize("change, words", (
    (dict(distance="manhattan"), "manhattan"), (dict(null="normal"), "normal"),
    (dict(labels=SIX[:5]), r"\(6,\)"), (dict(labels={}), "one column or more"),
    (dict(embeddings=LINE[:, 0]), r"\(n, m\)"), (dict(embeddings=LINE * 1j), "complex"),
    (dict(embeddings=LINE * np.nan), "row 0"), (dict(embeddings=LINE, distance="snr"), "constant"),
    (dict(ties="random"), "random"), (dict(embeddings=LINE - LINE, normalise=True), "zero vector"),
    (dict(embeddings=LINE - LINE, distance="cosine"), "zero vector"), (dict(queries=2.5), "whole number"),
    (dict(max_neighbours=2.5), "whole number"), (dict(permutations=1.5), "whole number")))
def test_arguments_out_of_range(change, words):
    with pytest.raises(ValueError, match=words):
        nr_precision(**{"embeddings": LINE, "labels": SIX, **change})


def test_p_value_is_two_sided_and_counts_ties():
    """Planted anti-clustering is as extreme as clustering; a permutation as extreme as the observed is."""
    x = np.repeat(np.arange(30), 2)[:, None] * 10.0 + np.tile([0, 1], 30)[:, None]
    label = np.tile([0, 1], 30)                          # each one's nearest neighbour has the other value
    score = nr_precision(x, label, max_neighbours=1, permutations=99)
    assert score.r_precision == 0 and score.p_value == 1 / 100
    two = nr_precision(LINE[[0, 1, 3, 4]], np.array([0, 0, 1, 1]), permutations=400)
    assert two.p_value > 0.25                            # a third of the permutations are the observed one


# ---------------------------------------------------------------- dependence and bins

def test_dependent_pairs_are_found_and_independent_ones_are_not():
    rng = np.random.default_rng(8)
    labels = {name: rng.integers(0, v, 600) for name, v in (("a", 6), ("b", 8), ("c", 10), ("d", 3))}
    assert properties.dependent_pairs(labels) == []
    labels["e"] = np.where(rng.random(600) < 0.4, labels["a"], rng.integers(0, 6, 600))
    (a, b, v, p), = properties.dependent_pairs(labels)
    assert (a, b) == ("a", "e") and 0.3 < v < 0.5 and p < 1e-10


@pytest.mark.parametrize("columns, n, share, repeats, most", (
    (6, 600, [0.97, 0.015, 0.015], 60, 4), (12, 200, [0.25] * 4, 20, 2)))
def test_few_false_alarms(columns, n, share, repeats, most):
    """Of rare values; and of the 66 pairs of twelve columns, some of which have a raw p-value below 0.01."""
    rng = np.random.default_rng(12)
    alarms = 0
    for _ in range(repeats):
        codes = {i: rng.choice(len(share), n, p=share) for i in range(columns)}
        alarms += bool(properties.dependent_pairs(codes))
    assert alarms <= most


def test_many_valued_columns_are_tested_too():
    rng = np.random.default_rng(13)
    label = rng.integers(0, 150, 600)
    codes = {"class": label, "super": label // 10, "other": rng.integers(0, 40, 600)}
    pairs = properties.dependent_pairs(codes)
    assert [pair[:2] for pair in pairs] == [("class", "super")]


def test_chi_square_against_its_permutations():
    rng = np.random.default_rng(14)
    a, b = rng.choice(4, 80, p=[0.7, 0.1, 0.1, 0.1]), rng.integers(0, 3, 80)
    b[a == 3] = 0

    def chi2(b):
        expected = np.outer(np.bincount(a), np.bincount(b)) / 80
        return ((np.histogram2d(a, b, (4, 3))[0] - expected) ** 2 / expected).sum()

    permuted = np.array([chi2(rng.permutation(b)) for _ in range(4000)])
    p = properties.chi_square(a, b)[1]
    assert p == pytest.approx((permuted >= chi2(b)).mean(), abs=0.02)


def test_very_many_properties_are_not_tested_in_pairs(monkeypatch):
    monkeypatch.setattr(properties, "dependent_pairs", None)
    coded = {str(i): (np.arange(2), np.array([0, 0, 1, 1])) for i in range(501)}
    options = argparse.Namespace(queries=None, permutations=0, per_value=False)
    line, = properties.warnings(coded, options)
    assert line.startswith("501 properties are more than 500")


def test_quantile_bins_are_equally_full():
    numbers = np.random.default_rng(9).standard_normal(1000)
    bins = properties.quantile_bins("x", numbers.astype(str), 4)
    np.testing.assert_array_equal(np.unique(bins, return_counts=True)[1], [250] * 4)
    assert np.isin(bins, numbers).all() and bins.max() == numbers.max()      # the largest of each
    assert (np.diff(bins[np.argsort(numbers)]) >= 0).all()
    for numbers in (["1", "1", "1", "2"], ["1", "2", "2", "2"], ["1", "1", "2", "2"]):
        assert len(np.unique(properties.quantile_bins("x", np.array(numbers), 2))) == 2


# ---------------------------------------------------------------- the command line

def test_table_and_rows(embedded, run_script):
    done = run_script("nrprec.py", "emb.npy", "props.csv", "--properties", "shape,size", "--out", "out.csv")
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["property", "values", "queries", "R-Prec", "NR-Prec"]
    assert lines[1].split()[:3] == ["shape", "3", "60"]
    rows = read_rows("out.csv")
    assert ",".join(rows[0]) == (
        "embeddings,property,values,queries,skipped,distance,null,max_neighbours,r_precision,nr_precision,"
        "nr_precision_se,permutations,p_value,p_holm,normalised,ties,tied,missing,value")
    labels = {"shape": np.arange(60) % 3, "size": np.arange(60) // 3 % 4}
    for row, (name, score) in zip(rows, nr_precision(np.load("emb.npy"), labels).items()):
        assert row["property"] == name and row["embeddings"] == "emb.npy"
        assert [float(row[name]) for name in ("r_precision", "nr_precision")] == list(score[3:5])
        assert [row[name] for name in ("distance", "null", "skipped", "normalised", "ties", "tied")] == [
            "euclidean", "binomial", "0", "0", "expected", "0"]
        assert row["max_neighbours"] == row["nr_precision_se"] == row["p_value"] == row["p_holm"] == ""
    assert sorted(os.listdir()) == ["emb.csv", "emb.npy", "out.csv", "props.csv"]


def test_several_embeddings_every_option(embedded, run_main):
    np.save("other.npy", np.load("emb.npy")[:, :2].astype(np.float64))
    done = run_main("nrprec.py", "emb.npy", "other.npy", "--distance", "cosine", "--null", "hypergeometric",
                      "--max-neighbours", 10, "--permutations", 1100, "--queries", 40, "--bin", "angle=5",
                      "--seed", 1, "--threads", 2, "--memory-mib", 64, "--out", "o.csv", "props.csv")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[:3]] == ["NR-Prec", "emb", "other"]
    assert "p_holm < 0.01: 1,100 permutations" in done.stdout
    rows = read_rows("o.csv")
    assert len(rows) == 6 and rows[2]["values"] == "5"
    assert all(row["max_neighbours"] == "10" and row["p_holm"] and row["nr_precision_se"] for row in rows)


def test_warnings_are_one_line_each(embedded, run_main):
    rows = [[f"p{i}", i % 2, i % 2, i // 2 % 29, "x", i or 1] for i in range(60)]
    write_rows("props.csv", "id,one,two,same,fixed,uid", rows)
    done = run_main("nrprec.py", "emb.npy", "props.csv", "--permutations", 50, "--queries", 100)
    assert done.returncode == 0
    note, *lines = done.stderr.splitlines()
    assert note == ("nrprec.py: note: props.csv: rows are taken in their order: the array's pictures are not "
                    "known by name")
    assert all(line.startswith("nrprec.py: warning: ") for line in lines)
    for words in ("fixed is constant", "--bin uid=10", "58 of 60 queries skipped", "fewer than 1,000",
                  "one and two depend on each other", "nothing can be marked", "all are used"):
        assert sum(words in line for line in lines) == 1, words
    assert "nan" in [line for line in done.stdout.splitlines() if line.startswith("fixed")][0]


def test_rows_are_matched_by_name(embedded, run_main):
    """A table in another order gives the same numbers; one that lacks a picture is refused."""
    names = [f"images/{i:06d}.jpg" for i in range(60)]
    write_rows("emb.labels.csv", "path", [[name] for name in names])
    header, *rows = Path("props.csv").read_text().splitlines()
    run_main("nrprec.py", "emb.npy", "props.csv", "--out", "right.csv")
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(60)]
    Path("shuffled.csv").write_text("\n".join([header, *shuffled]) + "\n")
    done = run_main("nrprec.py", "emb.npy", "shuffled.csv", "--out", "o.csv")
    assert done.returncode == 0 and "note: shuffled.csv: 60 rows matched by number" in done.stderr
    assert Path("o.csv").read_text() == Path("right.csv").read_text()
    Path("few.csv").write_text("\n".join([header, *shuffled[1:]]) + "\n")
    done = run_main("nrprec.py", "emb.npy", "few.csv", "--out", "o.csv")
    one_line(done, "few.csv lacks 1 of the 60 pictures: images/")


def test_ties_are_told(embedded, run_main):
    x = np.load("emb.npy")
    x[:20, :] = np.round(x[:20, :1])
    np.save("emb.npy", x)
    done = run_main("nrprec.py", "emb.npy", "props.csv", "--properties", "shape", "--max-neighbours", 2)
    assert done.stderr.count("\n") == 1 and "% of the queries of shape have candidates" in done.stderr
    assert "count with their expectation" in done.stderr
    done = run_main("nrprec.py", "emb.npy", "props.csv", "--max-neighbours", 2, "--ties", "index")
    assert "the order of the rows decides" in done.stderr
    np.save("emb.npy", np.ones((60, 5)))
    done = run_main("nrprec.py", "emb.npy", "props.csv", "--properties", "shape", "--permutations", 1000)
    assert done.stderr.count("\n") == 1 and "all 60 embeddings are equal" in done.stderr
    assert done.stdout.splitlines()[1].split()[-1] == "1.0000"


def test_the_distance_that_the_json_names(embedded, run_main, refused):
    assert "no JSON beside emb.npy" in refused(nrprec.main, "emb.npy", "props.csv", "--distance", "own")
    Path("emb.json").write_text('{"distance": "snr"}')
    shown = [run_main("nrprec.py", "emb.npy", "props.csv", *options).stdout for options in (
        ("--distance", "own"), ("--distance", "snr", "--normalise"), ("--distance", "snr"))]
    assert shown[0] == shown[1] != shown[2] and len(shown[2]) > 100
    run_main("nrprec.py", "emb.npy", "props.csv", "--out", "o.csv", "--distance", "own")
    row = read_rows("o.csv")[0]
    assert (row["distance"], row["normalised"]) == ("snr", "1")


def test_missing_values_and_rows_of_values(embedded, run_main):
    rows = [[i, "ab"[i % 2] if i % 5 else "NA", i % 3 if i % 7 else "?", i] for i in range(60)]
    write_rows("props.csv", "frame,shape,size,angle", rows)
    done = run_main("nrprec.py", "emb.npy", "props.csv", "--properties", "shape,angle", "--bin", "angle=2",
                      "--per-value", "--out", "o.csv")
    assert done.stderr.count("\n") == 1 and "shape: 12 of 60 pictures have no value" in done.stderr
    read = read_rows("o.csv")
    assert [(r["property"], r["value"], r["queries"], r["missing"]) for r in read] == [
        ("shape", "", "48", "12"), ("shape", "a", "24", "12"), ("shape", "b", "24", "12"),
        ("angle", "", "60", "0"), ("angle", "29.0", "30", "0"), ("angle", "59.0", "30", "0")]
    here = np.arange(60) % 5 > 0
    alone = nr_precision(np.load("emb.npy")[here], np.arange(60)[here] % 2)
    assert float(read[0]["nr_precision"]) == alone.nr_precision
    done = run_main("nrprec.py", "emb.npy", "props.csv", "--missing", "?", "--out", "o.csv")
    assert "size: 9 of 60 pictures have no value" in done.stderr
    assert [r["values"] for r in read_rows("o.csv")] == ["3", "3", "60"]       # NA is a value now


def test_dependence_of_the_pictures_with_both_values():
    rng = np.random.default_rng(19)
    a, b = rng.integers(0, 6, 400), rng.integers(0, 4, 400)
    b[:200] = a[:200] * 7                                 # one column under two spellings: V = 1
    b[200:] = -1                                          # unrelated, were they not left out
    (_, _, v, p), = properties.dependent_pairs({"a": a, "b": b})
    assert v == pytest.approx(1) and (v, p) == properties.chi_square(a[:200], b[:200])


def test_as_published_is_the_released_procedure(embedded, run_main, refused):
    options = "--null", "binomial", "--distance", "euclidean", "--max-neighbours", 1023, "--ties", "index"
    for some in (["--as-published"], options, ["--as-published", *options]):
        done = run_main("nrprec.py", "emb.npy", "props.csv", *some, "--out", f"{len(some)}.csv")
        assert done.returncode == 0
    assert Path("1.csv").read_text() == Path("8.csv").read_text() == Path("9.csv").read_text()
    row = read_rows("1.csv")[0]
    assert [row[name] for name in ("distance", "normalised", "null", "max_neighbours", "ties")] == [
        "euclidean", "0", "binomial", "1023", "index"]


@pytest.mark.parametrize("options, words", (
    (["--max-neighbours", "0"], "max_neighbours is 0; expected a whole number, at least 1"),
    (["--distance", "manhattan"], "manhattan"),
    (["--null", "poisson"], "poisson"), (["--ties", "random"], "random"),
    (["--bin", "shape=3"], "row 0 (counting from 0) of 'shape' is 'a'"),
    (["--bin", "size"], "PROPERTY=N"), (["--bin", "width=3"], "shape, size, angle"),
    (["--bin", "size=1"], "from 2"), (["--bin", "size=x"], "whole number"),
    (["--bin", "size=2", "--bin", "size=3"], "once"), (["--properties", "frame"], "'frame'"),
    (["--properties", "colour"], "'colour'; it has shape, size, angle"), (["--queries", "0"], "queries is 0"),
    (["--queries", "few"], "few"), (["--permutations", "-5"], "permutations is -5"),
    (["--threads", "0"], "threads is 0"),
    (["--memory-mib", "0"], "memory_mib is 0"), (["--seed", "-1"], "seed is -1"), (["--colour"], "--colour"),
    (["--per-value"], "--per-value needs --out"), (["--missing", ""], "without a value"),
    (["--as-published", "--ties", "expected"], "--ties index, but it is expected"),
    (["--as-published", "--max-neighbours", "9"], "--max-neighbours 1023, but it is 9"),
    (["--null", "hypergeometric", "--as-published"], "--null binomial, but it is hypergeometric"),
    (["--as-published", "--normalise"], "means no --normalise, but it is True"),
    (["--as-published", "--distance", "own"], "--distance euclidean, but it is own"),
    (["--out", "props.csv"], "is an input")))
def test_bad_options(embedded, refused, options, words):
    assert words in refused(nrprec.main, "emb.npy", "props.csv", *options)


def test_progress_and_ctrl_c(embedded):
    """Long work tells how far it is; Ctrl-C then ends it with one line and status 130."""
    command = [sys.executable, ROOT / "nrprec.py", "emb.npy", "props.csv", "--threads", "1"]
    with subprocess.Popen([*command, "--permutations", "2000000"], stderr=subprocess.PIPE, text=True,
                          stdout=subprocess.DEVNULL, env={**os.environ, "DML_PROGRESS": "1"}) as process:
        while "emb: " not in (line := process.stderr.readline()) and line:
            pass
        assert "%" in line and "elapsed" in line
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130 and "nrprec.py: stopped" in said and "Traceback" not in said


def test_shipped_example(run_script):
    """The README's first command, on the real embeddings that ship with the project."""
    done = run_script("nrprec.py", "examples/cars/emb.npy", "examples/cars/props.csv", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    readme = (ROOT / "README.md").read_text()
    assert done.stdout.strip() in readme and "@@" not in readme


def test_each_array_with_the_table_beside_it(embedded, run_main):
    rng = np.random.default_rng(0)
    folders = [f"{loss}/fold{fold}" for loss in ("arcface", "margin") for fold in (0, 1)]
    arrays = [Path("results/cars", folder, "emb.npy") for folder in folders]
    for array in arrays:
        n = 30 - 4 * int(array.parent.name[-1])
        write_rows(array.with_name("props.csv"), "frame,colour", [[i, i % 3] for i in range(n)])
        np.save(array, rng.normal(size=(n, 4)).astype(np.float32))
    done = run_main("nrprec.py", *arrays, "--out", "nrprec.csv")
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[:5]] == ["NR-Prec", *folders]
    read = read_rows("nrprec.csv")
    assert [(row["embeddings"], row["queries"]) for row in read] == [
        (str(array), queries) for array, queries in zip(arrays, ("30", "26") * 2)]
    arrays[1].with_name("props.csv").rename("results/cars/props.csv")            # the data set's own
    assert run_main("nrprec.py", arrays[1]).returncode == 0
    arrays[0].with_name("props.csv").write_text("size\n" + "0\n1\n" * 15)
    for some, words in ((arrays, "different properties"), ([arrays[0], "none.npy"], "none.npy")):
        one_line(run_main("nrprec.py", *some), words)
