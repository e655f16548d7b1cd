"""compare.py: against NumPy and SciPy, hand-worked numbers, known limits, and the command."""
import csv
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy.spatial.distance import jensenshannon

import compare


@pytest.fixture
def rng():
    return np.random.default_rng(3)


# ---------------------------------------------------------------- agreement of maps


def by_the_book(maps):
    flat = maps.reshape(len(maps), -1).astype(np.float64)
    pairs = list(itertools.combinations(flat, 2))
    return (np.array([np.corrcoef(a, b)[0, 1] for a, b in pairs]),
            np.array([jensenshannon(a, b, base=2)**2 for a, b in pairs]))


@pytest.mark.parametrize("networks, pixels", [(2, 8192), (5, 64), (5, 100000), (15, 8192)])
def test_against_numpy_and_scipy(rng, networks, pixels):
    maps = np.minimum(rng.gamma(0.7, 1, (networks, 61, 53)) / 4, 1).astype(np.float16)
    maps[:, :5] = 0
    for found, expected in zip(compare.agreement(maps, pixels), by_the_book(maps)):
        np.testing.assert_allclose(found, expected, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.float16, (3, 7, 6), elements=st.floats(0, 1, width=16)))
def test_any_maps_against_numpy_and_scipy(maps):
    correlation, jsd = compare.agreement(maps)
    with np.errstate(all="ignore"):
        expected_r, expected_jsd = by_the_book(maps)
    constant = maps.reshape(3, -1).max(1) == maps.reshape(3, -1).min(1)
    for pair, (a, b) in enumerate(itertools.combinations(range(3), 2)):
        if constant[a] or constant[b]:
            assert np.isnan(correlation[pair])
        else:
            assert correlation[pair] == pytest.approx(expected_r[pair], abs=1e-6)
        if np.isnan(expected_jsd[pair]):
            assert np.isnan(jsd[pair]) or not maps[[a, b]].reshape(2, -1).any(1).all() or jsd[pair] < 1e-6
        else:
            assert jsd[pair] == pytest.approx(expected_jsd[pair], abs=1e-6)


def test_identical_disjoint_and_opposite_maps():
    a = np.array([[0, 1], [0.5, 0]])
    correlation, jsd = compare.agreement(np.stack([a, a, np.array([[1, 0], [0, 0.5]]), 1 - a]))
    assert correlation[0] == pytest.approx(1) and jsd[0] == pytest.approx(0, abs=1e-7)
    assert jsd[1] == pytest.approx(1, abs=1e-6)  # a and the third map share no pixel
    assert correlation[2] == pytest.approx(-1)


def test_jsd_by_hand():
    # p = (1/2, 1/2), q = (1, 0): m = (3/4, 1/4); JSD = H(m) - (1 + 0) / 2 = 0.8112781 - 0.5
    assert compare.agreement(np.array([[0.5, 0.5], [1, 0]]))[1][0] == pytest.approx(0.3112781, abs=1e-6)


def test_nan_and_zero_maps_spoil_their_own_pairs_only(rng):
    maps = rng.random((4, 5, 5))
    maps[1], maps[2, 0, 0] = 0, np.nan
    with np.errstate(all="ignore"):
        correlation, jsd = compare.agreement(maps)
    assert np.isfinite(correlation).tolist() == [False, False, True, False, False, False]
    assert np.isfinite(jsd).tolist() == [False, False, True, False, False, False]


# ---------------------------------------------------------------- averages


def test_fisher_z_by_hand():
    assert compare.fisher_z(0.5) == pytest.approx(0.5493061)  # ln(3) / 2
    assert compare.fisher_z(1.0) == pytest.approx(7.2543, abs=1e-4) and compare.fisher_z(-1.0) == -compare.fisher_z(1.0)


def test_summary_by_hand():
    found = compare.summarise([np.array([[1.0, np.nan], [3.0, 5.0]]), np.array([[5.0, np.nan]])], replicates=50)
    assert found["n"].tolist() == [3, 1] and found["left_out"].tolist() == [0, 2]
    assert found["mean"].tolist() == [3, 5]
    np.testing.assert_allclose(found["std"], [np.sqrt(8 / 3), 0])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=6))
def test_blocks_of_any_size_give_the_same_summary(sizes):
    values = np.random.default_rng(0).normal(size=(sum(sizes), 3))
    blocks = np.split(values, np.cumsum(sizes)[:-1])
    whole, parts = compare.summarise([values], seed=4, replicates=60), compare.summarise(blocks, seed=4, replicates=60)
    for key in whole:
        np.testing.assert_allclose(parts[key], whole[key], atol=1e-12)


def test_interval_covers_a_known_mean(rng):
    # 120 samples of 80 pictures as 120 columns: about 95 % of the intervals cover the mean, 2
    found = compare.summarise([rng.normal(2, 1, (80, 120))], replicates=400)
    covered = ((found["low"] <= 2) & (2 <= found["high"])).mean()
    assert 0.86 <= covered <= 1
    np.testing.assert_allclose((found["high"] - found["low"]).mean(), 2 * 1.96 / np.sqrt(80), rtol=0.1)


def test_bootstrap_weights_are_poisson_and_of_their_picture_alone():
    weights = compare.poisson_weights(5, 0, 300, 200)
    assert weights.mean() == pytest.approx(1, abs=0.02) and weights.var() == pytest.approx(1, abs=0.05)
    assert np.array_equal(compare.poisson_weights(5, 40, 3, 200), weights[40:43])
    assert not np.array_equal(compare.poisson_weights(6, 40, 3, 200), weights[40:43])


def test_ceiling_is_the_correlation_of_two_noisy_views_of_one_map(rng):
    truth = rng.normal(size=(4, 200000))
    a, b, a2, b2 = truth[0] + rng.normal(scale=[[0.5], [0.8], [0.5], [0.8]], size=(4, 200000))
    correlations, _ = compare.agreement(np.stack([a, b, a2, b2]).reshape(4, 400, 500))
    ab, aa, _, _, bb, _ = correlations
    assert compare.attenuation(aa, bb) == pytest.approx(ab, abs=0.01)


# ---------------------------------------------------------------- masks


def test_mask_shares_by_hand():
    maps = np.array([[[0.0, 1.0], [0.5, 0.5]], [[1.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    masks = np.array([[[0, 1], [0, 1]], [[1, 0], [0, 0]], [[0, 0], [0, 1]]], dtype=bool)
    found = compare.mask_shares(maps, masks, masks.mean(axis=0), 3)
    # first: (1 + 0.5) / 2 inside; in the others' masks 0 and 0.25; its one maximum is inside
    np.testing.assert_allclose(found[0], [0.75, 0.5, 0.125, 0.625, 1, 0])
    # second: 1 / 2 inside; in the others' 0.5 and 0; one of its two maxima is inside
    np.testing.assert_allclose(found[1], [0.5, 0.25, 0.25, 0.25, 0.5, 0.25])
    assert np.isnan(found[2, [0, 2, 3, 4, 5]]).all() and found[2, 1] == 0.25


def test_shares_in_other_masks_one_by_one(rng):
    maps, masks = rng.random((5, 6, 7)), rng.random((5, 6, 7)) < 0.4
    found = compare.mask_shares(maps, masks, masks.mean(axis=0), 5)[:, 2]
    expected = [np.mean([maps[i][masks[j]].sum() / maps[i].sum() for j in range(5) if j != i]) for i in range(5)]
    np.testing.assert_allclose(found, expected)


# ---------------------------------------------------------------- embeddings


def test_cka_against_its_definition_and_invariances(rng):
    x, y = rng.normal(size=(300, 4)), rng.normal(size=(300, 6))
    rotation, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    centring = np.eye(300) - 1 / 300
    k, l = centring @ x @ x.T @ centring, centring @ y @ y.T @ centring
    hsic = (k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum())
    np.testing.assert_allclose(compare.linear_cka([x, y, 3 * x @ rotation]), [hsic, 1, hsic], atol=1e-12)


def test_neighbours_against_brute_force(rng):
    x = compare.normalised(rng.normal(size=(70, 5)))
    products = (x.astype(np.float64) @ x.astype(np.float64).T)
    np.fill_diagonal(products, -np.inf)
    expected = np.sort(np.argsort(-products, axis=1, kind="stable")[:, :10], axis=1)
    np.testing.assert_array_equal(np.concatenate([compare.nearest(x, 0, 33), compare.nearest(x, 33, 70)]), expected)


def test_equal_neighbours_by_index_and_never_the_query():
    x = compare.normalised(np.repeat(np.eye(2), 6, axis=0))  # six copies of each of two vectors
    assert compare.nearest(x, 0, 2, k=3).tolist() == [[1, 2, 3], [0, 2, 3]]
    assert compare.nearest(x, 11, 12, k=3).tolist() == [[6, 7, 8]]


def test_overlap_by_hand(rng):
    x = compare.normalised(rng.normal(size=(40, 8)))
    overlap = np.concatenate(list(compare.neighbour_overlap([x, 2 * x[:, ::-1], compare.normalised(rng.normal(size=(40, 8)))], 10, 16)))
    assert (overlap[:, 0] == 1).all() and overlap.shape == (40, 3)
    a, b = compare.nearest(x, 0, 40), compare.nearest(x, 0, 40)
    assert (a == b).all()
    with pytest.raises(ValueError, match="row 1 is zero"):
        compare.normalised(np.array([[1.0, 0], [0, 0]]))
