"""compare.py: against NumPy and SciPy, hand-worked numbers, known limits, and the command."""
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import one_line, read_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy.spatial.distance import jensenshannon

import compare
from dml_common import files


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
    assert compare.fisher_z(1.0) == -compare.fisher_z(-1.0) == pytest.approx(7.2543, abs=1e-4)


def test_summary_by_hand():
    blocks = [np.array([[1.0, np.nan], [3.0, 5.0]]), np.array([[5.0, np.nan]])]
    found = compare.summarise(blocks, replicates=50)
    assert found["n"].tolist() == [3, 1] and found["left_out"].tolist() == [0, 2]
    assert found["mean"].tolist() == [3, 5]
    np.testing.assert_allclose(found["std"], [np.sqrt(8 / 3), 0])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=6))
def test_blocks_of_any_size_give_the_same_summary(sizes):
    values = np.random.default_rng(0).normal(size=(sum(sizes), 3))
    blocks = np.split(values, np.cumsum(sizes)[:-1])
    whole, parts = (compare.summarise(one, seed=4, replicates=60) for one in ([values], blocks))
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
    for i in range(5):
        others = [maps[i][masks[j]].sum() / maps[i].sum() for j in range(5) if j != i]
        assert found[i] == pytest.approx(np.mean(others))


# ---------------------------------------------------------------- embeddings

def test_cka_against_its_definition_and_invariances(rng):
    x, y = rng.normal(size=(300, 4)), rng.normal(size=(300, 6))
    rotation, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    centring = np.eye(300) - 1 / 300
    a, b = centring @ x @ x.T @ centring, centring @ y @ y.T @ centring
    hsic = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
    np.testing.assert_allclose(compare.biased_cka([x, y, 3 * x @ rotation]), [hsic, 1, hsic], atol=1e-12)
    np.testing.assert_allclose(compare.linear_cka([x, 3 * x @ rotation + 7])[0], 1, atol=1e-9)


def by_kernels(x, y):
    """Song et al. 2012, Eq. 5, with n × n kernels."""
    k, l_ = x @ x.T, y @ y.T
    n, one = len(k), np.ones(len(k))
    for kernel in (k, l_):
        np.fill_diagonal(kernel, 0)
    sums = (one @ k @ one) * (one @ l_ @ one) / ((n - 1) * (n - 2))
    return ((k * l_).sum() + sums - 2 / (n - 2) * (one @ k @ l_ @ one)) / (n * (n - 3))


def test_unbiased_hsic_and_its_jackknife_against_the_kernels(rng):
    x, y = rng.normal(3, 1, size=(12, 5)), rng.normal(-2, 1, size=(12, 7))
    whole, without = compare.unbiased_hsic(x, y)
    expected = [by_kernels(np.delete(x, i, axis=0), np.delete(y, i, axis=0)) for i in range(12)]
    np.testing.assert_allclose([whole, *without], [by_kernels(x, y), *expected], atol=1e-9)


@pytest.mark.parametrize("n, m, repeats", [(24, 128, 100), (24, 4, 100), (75, 128, 60), (1000, 32, 40)])
def test_cka_of_independent_noise_is_0(rng, n, m, repeats):
    noise = [[compare.normalised(rng.normal(size=(n, m))) for _ in range(2)] for _ in range(repeats)]
    cka, low, high = np.array([compare.linear_cka(pair)[0] for pair in noise]).T
    assert abs(cka.mean()) < 3 * cka.std() / np.sqrt(repeats) and ((low <= 0) & (0 <= high)).mean() >= 0.9
    biased = np.mean([compare.biased_cka(pair) for pair in noise])
    assert biased == pytest.approx({24: 0.84, 75: 0.63, 1000: 0.03}[n], abs=0.02) or m == 4


def test_interval_of_cka_covers_that_of_very_many_pictures(rng):
    def related(n):
        x = rng.normal(size=(n, 16))
        return [x, 0.7 * x + rng.normal(size=(n, 16))]

    truth, low, high = compare.linear_cka(related(40_000))[0]
    assert high - low < 0.01
    few = np.array([compare.linear_cka(related(75))[0] for _ in range(100)])
    assert few[:, 0].mean() == pytest.approx(truth, abs=0.01)
    assert ((few[:, 1] <= truth) & (truth <= few[:, 2])).mean() >= 0.9


def test_cka_without_a_denominator_is_empty():
    for x in np.eye(6), compare.normalised(np.full((6, 3), 0.3)):  # all equally far from each other, or equal
        assert np.isnan(compare.linear_cka([x, x])).all()


@pytest.mark.parametrize("apart", [1, 1e-3, 1e-6])  # float32 can't order products that are nearer than 1e-7
def test_neighbours_against_brute_force(rng, apart):
    x = compare.normalised(rng.normal(size=5) + apart * rng.normal(size=(70, 5)))
    products = (x[:, None].astype(np.float64) * x).sum(axis=2)
    np.fill_diagonal(products, -np.inf)
    expected = np.sort(np.argsort(-products, axis=1, kind="stable")[:, :10], axis=1)
    found = np.concatenate([compare.nearest(x, 0, 33), compare.nearest(x, 33, 70)])
    np.testing.assert_array_equal(found, expected)


def test_equal_neighbours_by_index_and_never_the_query():
    x = compare.normalised(np.repeat(np.eye(2), 6, axis=0))  # six copies of each of two vectors
    assert compare.nearest(x, 0, 2, k=3).tolist() == [[1, 2, 3], [0, 2, 3]]
    assert compare.nearest(x, 11, 12, k=3).tolist() == [[6, 7, 8]]


def test_overlap_by_hand(rng):
    x, y = rng.normal(size=(2, 40, 8))
    x, y = compare.normalised(x), compare.normalised(y)
    overlap = np.concatenate(list(compare.neighbour_overlap([x, 2 * x[:, ::-1], y], 10, 16)))
    assert (overlap[:, 0] == 1).all() and overlap.shape == (40, 3)
    common = [len(set(a) & set(b)) / 10 for a, b in zip(compare.nearest(x, 0, 40), compare.nearest(y, 0, 40))]
    assert overlap[:, 1].tolist() == common
    with pytest.raises(ValueError, match="row 1 is zero"):
        compare.normalised(np.array([[1.0, 0], [0, 0]]))


# ---------------------------------------------------------------- the command

def save(path, maps, **record):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, maps.astype(np.float16))
    if record:
        path.with_suffix(".json").write_text(json.dumps(record))


def change(path, **record):
    path.write_text(json.dumps({**json.loads(path.read_text()), **record}))


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


CARS = ("--dataset", "cars196")


def draw(folder, arrays):
    """0.png, 1.png … in a folder that is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, array in enumerate(arrays):
        Image.fromarray(np.asarray(array, np.uint8)).save(folder / f"{i}.png")


def compared(*arguments):
    """The rows of the table that compare.py makes."""
    compare.main([*arguments, "--out", "out.csv"])
    return read_rows("out.csv")


def refused(*arguments):
    """Why compare.py refuses, having written nothing in this folder."""
    before = sorted(Path().rglob("*"))
    with pytest.raises((ValueError, OSError)) as error:
        compare.main([*arguments])
    assert sorted(Path().rglob("*")) == before, arguments
    return str(error.value)


def test_bare_files_against_the_formulas(place, rng):
    maps = rng.random((3, 9, 12, 10)).astype(np.float16)
    maps[1, 4] = 0  # constant
    maps[2, 5, 0, 0] = np.nan
    for name, one in zip("abc", maps):
        save(place / f"{name}.npy", one)
    for memory in ("1", "256"):
        options = ["--out", "c.csv", "--per-picture", "p.npy", "--memory-mib", memory]
        compare.main(["a.npy", "b.npy", "c.npy", *options])
        rows, pictures = read_rows("c.csv"), np.load("p.npy")
        assert [row["model_a"][0] + row["model_b"][0] for row in rows] == ["ab", "ac", "bc"]
        assert [(row["n"], row["left_out"]) for row in rows] == [("8", "1"), ("8", "1"), ("7", "2")]
        assert pictures.shape == (9, 3, 2) and np.isnan(pictures[[4, 5], [0, 1]]).all()
        kept = [i for i in range(9) if i not in (4, 5)]
        expected = np.array([by_the_book(maps[[1, 2], i]) for i in kept])[:, :, 0]
        np.testing.assert_allclose(pictures[kept, 2], expected, atol=1e-6)
        row, z, jsd = rows[2], np.arctanh(expected[:, 0]), expected[:, 1]
        for name, value in {"correlation": np.tanh(z.mean()), "correlation_std": np.tanh(z.std()),
                            "jsd": jsd.mean(), "jsd_std": jsd.std()}.items():
            assert float(row[name]) == pytest.approx(value, abs=1e-6)
        assert float(row["correlation_low"]) < float(row["correlation"]) < float(row["correlation_high"])
        assert row["ceiling"] == row["corrected"] == row["fold_a"] == ""
    assert sorted(path.name for path in place.iterdir()) == ["a.npy", "b.npy", "c.csv", "c.npy", "p.npy"]


def published(place, rng, shared=False):
    """Noisy views of one truth for a network, in the papers' layout, with second maps for the ceiling."""
    truth = rng.random((6, 30, 30))
    geometry = {"preprocessing": {"resize": 32, "crop": 30}, "pictures": {"number": 6, "sha256": "x"}}
    for name, noise in ("Triplet", 0.1), ("ArcFace", 0.2), ("None", 0.3):
        for fold, second in itertools.product((0, 1), ("", "_ceiling")):
            maps = np.clip(truth + noise * rng.normal(size=truth.shape), 0, 1)
            own = "" if shared else f"{name} fold {fold}"
            options = {"seed": 0, "noise_of": own, "ceiling": bool(second)}
            path = place / f"results/cars196/{name.lower()}/fold{fold}/maps{second}.npy"
            save(path, maps, loss=name, fold=fold, options=options, **geometry)


def pair(rows, *wanted):
    """The row of model_a, fold_a, model_b, fold_b."""
    return next(row for row in rows if tuple(row.values())[:4] == wanted)


def by_numpy(first, second):
    """Fisher's z of the r of two files, picture by picture."""
    a, b = (np.load(f"results/cars196/{name}.npy").astype(float).reshape(6, -1) for name in (first, second))
    return np.arctanh([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b)])


def test_folds_and_ceilings(place, rng):
    published(place, rng)
    compare.main([*CARS, "--per-picture", "p.npy"])
    rows = read_rows("results/cars196/compare.csv")
    pairs = list(itertools.combinations(["Triplet", "ArcFace", "None"], 2))
    assert [list(row.values())[:4] for row in rows] == [[a, fold, b, fold] for fold in "01" for a, b in pairs]
    for row in rows:  # all see the same truth: the ceiling is reached
        assert float(row["ceiling"]) == pytest.approx(float(row["correlation"]), abs=0.05)
        assert float(row["corrected"]) == pytest.approx(float(row["correlation"]) / float(row["ceiling"]))
    values = np.load("p.npy")  # the pairs of the table, then each network with its second maps
    assert values.shape == (6, 6 + 6, 2)
    for column, pair_of in (4, ("triplet/fold1/maps", "none/fold1/maps")), \
            (8, ("arcface/fold0/maps", "arcface/fold0/maps_ceiling")):
        np.testing.assert_allclose(np.arctanh(values[:, column, 0]), by_numpy(*pair_of), atol=1e-5)
    assert {row["fold_a"] for row in compared(*CARS, "--fold", "1")} == {"1"}
    rows = compared(*CARS, "--all-folds")
    within = [row["fold_a"] + row["fold_b"] for row in rows if row["model_a"] == row["model_b"]]
    assert len(rows) == 9 and within == ["01"] * 3
    change(place / "results/cars196/none/fold0/maps.json", loss=None, backbone="net", fold=None)
    folds = sorted(row["fold_a"] + row["fold_b"] for row in compared(*CARS))  # without one: with every fold
    assert folds == ["0", "0", "00", "1", "1", "1", "11", "11", "11"]


def test_the_published_settings_and_what_a_row_was_made_with(place, rng):
    published(place, rng)
    for path in place.rglob("maps*.json"):
        options = json.loads(path.read_text())["options"]
        change(path, options={**options, "order": "released", "samples": 20 if "none" in str(path) else 50})
    rows = compared(*CARS, "--as-published")
    assert {row["fold_a"] for row in rows} == {"0"}
    assert [(row["order"], row["samples"]) for row in rows] == [("released", "50")] + [("released", "")] * 2
    maps = [np.load(f"results/cars196/{slug}/fold0/maps.npy") for slug in ("triplet", "arcface")]
    nats = np.mean([jensenshannon(*np.reshape(both, (2, -1)).astype(float))**2 for both in zip(*maps)])
    assert float(rows[0]["jsd_nats"]) == pytest.approx(nats, abs=1e-6)
    for option in (["--fold", "1"], ["--all-folds"]):
        message = refused(*CARS, "--as-published", *option)
        assert re.search(f"--as-published means .*{option[0]}.*leave one out", message)


def test_networks_that_share_their_noise_are_compared_across_two(place, rng, capsys):
    published(place, rng, shared=True)
    row = pair(compared(*CARS), "Triplet", "1", "ArcFace", "1")
    assert "raises r: 6 of 6, 6 of them compared across" in capsys.readouterr().err
    across = by_numpy("triplet/fold1/maps", "arcface/fold1/maps_ceiling")
    across = (across + by_numpy("triplet/fold1/maps_ceiling", "arcface/fold1/maps")) / 2
    assert float(row["correlation"]) == pytest.approx(np.tanh(across.mean()), abs=1e-6)
    own = [np.tanh(by_numpy(f"{slug}/fold1/maps", f"{slug}/fold1/maps_ceiling").mean())
           for slug in ("triplet", "arcface")]
    assert float(row["ceiling"]) == pytest.approx(np.sqrt(own[0] * own[1]), abs=1e-6)
    for path in place.rglob("maps_ceiling.npy"):
        path.unlink()
    assert all(row["ceiling"] == "" for row in compared(*CARS))
    assert "raises r: 6 of 6, 0 of them compared across" in capsys.readouterr().err


def test_maps_of_another_geometry_meet_on_their_common_part(place, rng, capsys):
    """A CNN's middle half of the shorter side, a ViT's whole of it, and the whole picture, twice as wide."""
    whole = np.zeros((3, 24, 48))  # of the pictures, in their own pixels
    whole[:, 4:20, 16:32] = rng.random((3, 8, 8)).repeat(2, axis=1).repeat(2, axis=2)
    middle = whole[:, :, 12:36]
    coarse = middle.reshape(3, 12, 2, 12, 2).mean(axis=(2, 4))
    listed = {"number": 3, "sha256": files.pictures_sha256([f"{i}.png" for i in range(3)])}
    save(place / "cnn.npy", coarse[:, 3:9, 3:9], preprocessing={"resize": 12, "crop": 6}, pictures=listed)
    save(place / "same.npy", coarse, preprocessing={"resize": 12, "crop": 12}, pictures=listed)
    save(place / "vit.npy", middle, preprocessing={"resize": 24, "crop": 24}, pictures=listed)
    save(place / "squeezed.npy", whole.reshape(3, 24, 48), preprocessing={"resize": [24, 48], "crop": None},
         pictures=listed)
    row, = compared("cnn.npy", "same.npy")
    assert float(row["correlation"]) > 0.99999 and float(row["jsd"]) < 1e-6
    assert "compared on the part that all show" in capsys.readouterr().err
    draw(place / "set", np.zeros((3, 48, 96, 3)))
    rows = compared("cnn.npy", "vit.npy", "squeezed.npy", "--dataset", "set")
    assert float(rows[2]["correlation"]) > 0.99999  # the same pixels, from two geometries
    assert float(rows[0]["correlation"]) == pytest.approx(float(rows[1]["correlation"]), abs=1e-4)
    assert float(rows[0]["correlation"]) > 0.9  # averaging by a triangle is not averaging by a box


def test_a_part_of_a_map_by_hand():
    ramp = np.add.outer(np.arange(8.0), np.arange(8.0)) / 14
    boxes = np.array([[0, 0, 8, 8], [2, 2, 6, 6]])
    both = compare.on_common_part([ramp, ramp[2:6, 2:6]], boxes)
    np.testing.assert_allclose(both, np.stack([ramp[2:6, 2:6]] * 2), atol=1e-6)
    finer = np.add.outer(np.arange(16.0), np.arange(16.0)) / 30
    both = compare.on_common_part([finer, ramp[2:6, 2:6]], boxes)
    np.testing.assert_allclose(both[0], finer.reshape(8, 2, 8, 2).mean(axis=(1, 3))[2:6, 2:6], atol=1e-6)
    with pytest.raises(ValueError, match="no common part"):
        compare.on_common_part([ramp, ramp], np.array([[0, 0, 8, 8], [8, 0, 9, 8]]))


def test_folds_of_different_pictures_are_compared_fold_by_fold(place, rng):
    pytest.importorskip("matplotlib", reason="--figure needs the extra report")
    published(place, rng)
    compare.main([*CARS, "--out", "together.csv", "--figure", "together.png"])
    for path in place.rglob("fold1/maps*.json"):
        change(path, pictures={"number": 6, "sha256": "y"})
    compare.main([*CARS, "--out", "apart.csv", "--figure", "apart.png"])
    assert Path("apart.csv").read_bytes() == Path("together.csv").read_bytes()
    assert Path("apart.png").read_bytes() == Path("together.png").read_bytes()
    with Image.open("apart.png") as figure:
        assert figure.width > 200
    for option in (["--per-picture", "p.npy"], ["--all-folds"]):
        message = refused(*CARS, *option)
        assert re.search("fold0/maps.npy and .*fold1/maps.npy differ in pictures", message)
    change(place / "results/cars196/none/fold1/maps.json", pictures={"number": 6, "sha256": "z"})
    assert "differ in pictures, y and z" in refused(*CARS)  # within a fold


def test_agreement_table_averages_folds_by_fishers_z():
    rows = [["a", 0, "b", 0, 9, 0, 0.5], ["a", 1, "b", 1, 9, 0, 0.9], ["a", 0, "c", 0, 0, 9, None]]
    models, table = compare.agreement_table(rows, [("b", 0.8)])
    mean = 100 * np.tanh((np.arctanh(0.5) + np.arctanh(0.9)) / 2)
    nan = np.nan
    assert models == ["a", "b", "c"]
    np.testing.assert_allclose(table, [[nan, mean, nan], [mean, 80, nan], [nan, nan, nan]])


def test_masks_through_the_command(place, rng):
    maps, masks = rng.random((4, 8, 8)).astype(np.float16), rng.random((4, 8, 8)) < 0.3
    save(place / "a.npy", maps)
    draw(place / "m", masks * 255)
    compare.main(["a.npy", "--masks", "m", "--out", "out.csv"])
    rows = {row["measure"]: row for row in read_rows("masks.csv")}
    expected = compare.mask_shares(maps, masks, masks.mean(0), 4).mean(0)
    for value, name in zip(expected, compare.MASK_COLUMNS):
        assert float(rows[name]["mean"]) == pytest.approx(value, abs=1e-9) and rows[name]["n"] == "4"
        assert float(rows[name]["low"]) <= float(rows[name]["mean"]) <= float(rows[name]["high"])
    assert not (place / "out.csv").exists()  # one network: there is no pair


def measured():
    return {row["measure"]: float(row["mean"]) for row in read_rows("masks.csv")}


def test_masks_follow_resize_and_crop(place):
    masks = np.zeros((2, 40, 60))
    masks[0, :, :30] = masks[1, :, 30:] = 255  # the left half, the right half
    draw(place / "set/masks", masks)
    draw(place / "set/images", np.stack([masks] * 3, axis=3))
    (place / "set/props.csv").write_text("frame,side\n0,left\n1,right\n")
    maps = np.zeros((2, 20, 20))
    maps[:, :, :10] = 1  # the left half after resize to 20 × 30 and crop to 20 × 20
    geometry = {"resize": 20, "crop": 20}
    save(place / "a.npy", maps, preprocessing=geometry, pictures={})
    for options in (["--masks", "set/masks", "--dataset", "set/images"], ["--masks", "--dataset", "set"]):
        compare.main(["a.npy", *options, "--out", "x.csv"])
        means = measured()
        assert [means[name] for name in ("share", "area", "other", "pointing")] == pytest.approx([0.5] * 4)
    save(place / "b.npy", maps[:, :10, :10], preprocessing=geometry, options={"map_size": 10})
    compare.main(["b.npy", "--masks", "--dataset", "set", "--out", "x.csv"])
    assert measured()["area"] == pytest.approx(0.5)
    (place / "set/masks/1.png").unlink()
    for options, message in [(["--masks", "set/masks", "--dataset", "set/images"], "1 of 2 pictures (1.png"),
                             (["--masks", "--dataset", "set"], "1 of 2 pictures (images/1.png"),
                             (["--masks", "set/masks"], "2 maps, set/masks 1 other pictures")]:
        assert message in refused("a.npy", *options)


def test_pictures_own_alpha_and_masks_that_say_nothing(place):
    pictures = np.full((2, 20, 20, 4), 200)
    pictures[0, :, :10, 3] = pictures[1, :, 10:, 3] = 0
    pictures[0, :, 10:, 3] = pictures[1, :, :10, 3] = 255
    draw(place / "set", pictures)
    maps = np.zeros((2, 20, 20))
    maps[:, :, :10] = 1
    save(place / "a.npy", maps, preprocessing={"resize": 20, "crop": 20}, pictures={})
    compare.main(["a.npy", "--masks", "alpha", "--dataset", "set", "--out", "c.csv"])
    assert (measured()["share"], measured()["area"]) == (0.5, 0.5)
    for colour, word in (0, "empty"), (255, "full"):
        draw(place / "m", np.full((2, 20, 20), colour))
        assert f"m: every mask is {word}" in refused("a.npy", "--masks", "m", "--dataset", "set")
    Image.new("RGB", (20, 20)).save(place / "set/1.png")
    message = refused("a.npy", "--masks", "alpha", "--dataset", "set")
    assert re.search("set/1.png.*without an alpha channel", message)


def test_embeddings_through_the_command(place, rng):
    published(place, rng)
    x = rng.normal(size=(50, 4)).astype(np.float32)
    for slug, fold in itertools.product(("triplet", "arcface", "none"), (0, 1)):
        np.save(place / f"results/cars196/{slug}/fold{fold}/emb.npy",
                x if slug != "none" else rng.normal(size=(50, 4)).astype(np.float32))
    compare.main([*CARS, "--embeddings"])
    rows = read_rows("results/cars196/embeddings.csv")
    assert len(rows) == 6 and float(rows[0]["overlap"]) == 1
    assert float(rows[0]["cka"]) == pytest.approx(1, abs=1e-5) == float(rows[0]["cka_biased"])
    assert float(rows[1]["cka_low"]) < float(rows[1]["cka"]) < float(rows[1]["cka_biased"]) < 0.5
    assert float(rows[1]["overlap_chance"]) == pytest.approx(10 / 49)
    assert float(rows[1]["overlap_low"]) < float(rows[1]["overlap"]) < 0.5
    last = place / "results/cars196/none/fold1/emb.npy"
    np.save(last, x[:49])
    message = refused(*CARS, "--embeddings")
    assert re.search("none/fold1/emb.npy is of other pictures than .*triplet/fold1/emb", message)
    last.unlink()
    assert "none/fold1/emb.npy does not exist" in refused(*CARS, "--embeddings")


def test_bad_input_teaches_and_leaves_nothing(place, rng):
    maps, high = rng.random((2, 4, 6, 6))
    high[2, 1, 1] = 1.5
    for name, listed, resize in (("a", "one", 8), ("other", "two", 8), ("sides", "one", [6, 6])):
        geometry = {"resize": resize, "crop": 6}
        save(place / f"{name}.npy", maps, pictures={"sha256": listed}, preprocessing=geometry)
    for name in ("two", "two_ceiling"):
        save(place / f"{name}.npy", maps, checkpoint_sha256=name)
    shapes = {"small": maps[:, :5], "few": maps[:3], "flat": maps[0], "empty": maps[:0], "high": high}
    for name, array in shapes.items():
        save(place / f"{name}.npy", array)
    for name, side in (("fine", 6), ("fine_ceiling", 12)):
        np.save(place / f"{name}.npy", np.ones((4, side, side), np.float16))
    draw(place / "masks", np.zeros((4, 9, 9)))
    for arguments, message in [
        (["a.npy", "small.npy"],
         r"a\.npy and small\.npy differ in shape, without .*, \(4, 6, 6\) and \(4, 5"),
        (["a.npy", "few.npy"], r"a\.npy and few\.npy differ in number of pictures, \(4,\) and \(3,\)"),
        (["a.npy", "other.npy"], r"a\.npy and other\.npy differ in pictures"),
        (["a.npy", "sides.npy"], r"of each side and of shorter side of their pictures; give --dataset"),
        (["two.npy", "two.npy"],
         r"two\.npy and two_ceiling\.npy are of different weights .*make both in one run"),
        (["fine.npy", "a.npy"],
         r"fine\.npy and fine_ceiling\.npy differ in shape, \(4, 6, 6\) and \(4, 12, 12\), so they give no"),
        (["a.npy", "high.npy", "--per-picture", "p.npy"], r"high\.npy: picture 2 has values from .* to 1\.5"),
        (["a.npy"], r"one map file arrived \(a\.npy\)"),
        (["a.npy", "flat.npy"], r"flat\.npy has shape \(6, 6\)"),
        (["empty.npy", "empty.npy"], r"empty\.npy has shape \(0, 6, 6\)"),
        (["a.npy", "a.npy", "--figure", "compare.csv"], "compare.csv is the name of two outputs"),
        (["a.npy", "a.npy", "--out", "x", "--per-picture", "./x"], "x is the name of two outputs"),
        (["a.npy", "few.npy", "--out", "few.npy"], "few.npy is an input"),
        (["a.npy", "a.npy", "--per-picture", "emb.npy"], "emb.npy is an input"),
        (["a.npy", "a.npy", "--per-picture", "a_ceiling.npy"], "a_ceiling.npy is an input"),
        (["a.npy", "a.npy", "--masks", "masks", "--figure", "masks/0.png"], "0.png is an input"),
        (["a.npy", "a.npy", "--masks", ".", "--out", "masks.csv"], "masks.csv is the name of two outputs"),
        (["a.npy", "a.npy", "--masks", "nowhere"], "no such folder"),
        (["a.npy", "a.npy", "--masks"], "name it with --dataset"),
        (["a.npy", "a.npy", "--replicates", "0"], "--replicates 0"),
        (["--dataset", "cars196"], "no maps in results/cars196"),
        ([], "which maps"),
    ]:
        assert re.search(message, refused(*arguments)), arguments


def test_a_full_disk_is_said_before_the_work(place, rng, monkeypatch):
    save(place / "a.npy", rng.random((3, 4, 4)))

    def full(descriptor, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    message = refused("a.npy", "a.npy", "--per-picture", "p.npy")
    assert "p.npy can't be written (No space left on device)" in message


def test_one_line_and_status_two(place, rng, run_script):
    save(place / "a.npy", rng.random((3, 4, 4)))
    for arguments in (["a.npy"], ["a.npy", "a.npy", "--fold", "x"]):
        one_line(run_script("compare.py", *arguments))
    done = run_script("compare.py", "a.npy", "a.npy", "--out", "pair.csv")
    row, = read_rows("pair.csv")
    assert done.returncode == 0 and done.stdout.startswith("model_a  fold_a")
    assert float(row["correlation"]) > 0.999998 and float(row["jsd"]) < 1e-6
