"""compare.py: against NumPy and SciPy, hand-worked numbers, known limits, and the command."""
import csv
import itertools
import json
from pathlib import Path

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


# ---------------------------------------------------------------- the command


def save(path, maps, **about):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, maps.astype(np.float16))
    if about:
        path.with_suffix(".json").write_text(json.dumps(about))
    return path


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_bare_files_against_the_formulas(place, rng):
    maps = rng.random((3, 9, 12, 10)).astype(np.float16)
    maps[1, 4] = 0  # constant
    maps[2, 5, 0, 0] = np.nan
    for name, one in zip("abc", maps):
        save(place / f"{name}.npy", one)
    for memory in (1, 256):
        compare.main(["a.npy", "b.npy", "c.npy", "--out", "c.csv", "--per-picture", "p.npy", "--memory-mib", str(memory)])
        rows, pictures = read("c.csv"), np.load("p.npy")
        assert [(row["model_a"], row["model_b"]) for row in rows] == [("a.npy", "b.npy"), ("a.npy", "c.npy"), ("b.npy", "c.npy")]
        assert [(row["n"], row["left_out"]) for row in rows] == [("8", "1"), ("8", "1"), ("7", "2")]
        assert pictures.shape == (9, 3, 2) and np.isnan(pictures[4, 0]).all() and np.isnan(pictures[5, 1]).all()
        kept = [i for i in range(9) if i not in (4, 5)]
        expected = np.array([by_the_book(maps[[1, 2], i]) for i in kept])[:, :, 0]
        np.testing.assert_allclose(pictures[kept, 2], expected, atol=1e-6)
        row, z = rows[2], np.arctanh(expected[:, 0])
        assert float(row["correlation"]) == pytest.approx(np.tanh(z.mean()), abs=1e-6)
        assert float(row["correlation_std"]) == pytest.approx(np.tanh(z.std()), abs=1e-6)
        assert float(row["jsd"]) == pytest.approx(expected[:, 1].mean(), abs=1e-6)
        assert float(row["jsd_std"]) == pytest.approx(expected[:, 1].std(), abs=1e-6)
        assert float(row["correlation_low"]) < float(row["correlation"]) < float(row["correlation_high"])
        assert row["ceiling"] == row["corrected"] == "" and row["fold_a"] == ""
    assert sorted(path.name for path in place.iterdir()) == ["a.npy", "b.npy", "c.csv", "c.npy", "p.npy"]


def published(place, rng, shared=False):
    """Noisy views of one truth for a network, in the papers' layout, with second maps for the ceiling."""
    truth = rng.random((6, 30, 30))
    for slug, name, noise in [("triplet", "Triplet", 0.1), ("arcface", "ArcFace", 0.2), ("none", "None", 0.3)]:
        for fold in (0, 1):
            for second in ("", "_ceiling"):
                maps = np.clip(truth + noise * rng.normal(size=truth.shape), 0, 1)
                options = {"seed": 0, "noise_of": "" if shared else f"{name} fold {fold}", "ceiling": bool(second)}
                save(place / f"results/cars196/{slug}/fold{fold}/maps{second}.npy", maps, loss=name, fold=fold, options=options,
                     pictures={"number": 6, "sha256": "x"}, preprocessing={"resize": 32, "crop": 30})


def test_folds_ceilings_and_figure(place, rng):
    published(place, rng)
    compare.main(["--dataset", "cars196", "--figure", "f.png"])
    rows = read("results/cars196/compare.csv")
    key = [(row["model_a"], row["fold_a"], row["model_b"], row["fold_b"]) for row in rows]
    assert key[:3] == [("Triplet", "0", "ArcFace", "0"), ("Triplet", "0", "None", "0"), ("ArcFace", "0", "None", "0")]
    assert len(key) == 6 and all(fold_a == fold_b for _, fold_a, _, fold_b in key)
    for row in rows:  # all see the same truth: the ceiling is reached
        assert float(row["ceiling"]) == pytest.approx(float(row["correlation"]), abs=0.05)
        assert float(row["corrected"]) == pytest.approx(float(row["correlation"]) / float(row["ceiling"]))
    with Image.open("f.png") as figure:
        assert figure.width > 200
    compare.main(["--dataset", "cars196", "--fold", "1"])
    assert {row["fold_a"] for row in read("results/cars196/compare.csv")} == {"1"}
    compare.main(["--dataset", "cars196", "--all-folds", "--out", "all.csv"])
    within = [row for row in read("all.csv") if row["model_a"] == row["model_b"]]
    assert len(read("all.csv")) == 9 and [(row["fold_a"], row["fold_b"]) for row in within] == [("0", "1")] * 3


def test_shared_noise_alone_has_no_ceiling(place, rng, capsys):
    published(place, rng, shared=True)
    for path in place.rglob("maps_ceiling.npy"):
        path.unlink()
    compare.main(["--dataset", "cars196"])
    assert all(row["ceiling"] == "" for row in read("results/cars196/compare.csv"))
    assert "share their noise, which raises" in capsys.readouterr().err


def test_networks_that_share_their_noise_are_compared_across_two(place, rng, capsys):
    published(place, rng, shared=True)
    compare.main(["--dataset", "cars196"])
    assert "one network's map against the other's second map" in capsys.readouterr().err
    row = next(row for row in read("results/cars196/compare.csv") if (row["model_a"], row["model_b"], row["fold_a"]) == ("Triplet", "ArcFace", "1"))

    def z(first, second):  # of two files, picture by picture, with NumPy
        a, b = (np.load(f"results/cars196/{name}.npy").astype(float).reshape(6, -1) for name in (first, second))
        return np.arctanh([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b)])

    across = (z("triplet/fold1/maps", "arcface/fold1/maps_ceiling") + z("triplet/fold1/maps_ceiling", "arcface/fold1/maps")) / 2
    assert float(row["correlation"]) == pytest.approx(np.tanh(across.mean()), abs=1e-6)
    own = [np.tanh(z(f"{slug}/fold1/maps", f"{slug}/fold1/maps_ceiling").mean()) for slug in ("triplet", "arcface")]
    assert float(row["ceiling"]) == pytest.approx(np.sqrt(own[0] * own[1]), abs=1e-6)


def test_folds_of_different_pictures_are_compared_fold_by_fold(place, rng, capsys):
    published(place, rng)
    compare.main(["--dataset", "cars196", "--out", "together.csv", "--figure", "together.png"])
    for path in place.rglob("fold1/maps*.json"):
        about = json.loads(path.read_text())
        path.write_text(json.dumps({**about, "pictures": {"number": 6, "sha256": "y"}}))
    compare.main(["--dataset", "cars196", "--out", "apart.csv", "--figure", "apart.png"])
    key = lambda row: (row["fold_a"], row["model_a"], row["model_b"])
    for together, apart in zip(*(sorted(read(name), key=key) for name in ("together.csv", "apart.csv"))):
        assert {name: value for name, value in apart.items() if name not in ("correlation_low", "correlation_high")} == \
            {name: value for name, value in together.items() if name not in ("correlation_low", "correlation_high")}
    assert Path("apart.png").read_bytes() == Path("together.png").read_bytes()
    with pytest.raises(ValueError, match="--per-picture: the folds here have different lists"):
        compare.main(["--dataset", "cars196", "--per-picture", "p.npy"])
    with pytest.raises(ValueError, match="different lists of pictures"):  # within a fold
        about = json.loads((place / "results/cars196/none/fold1/maps.json").read_text())
        (place / "results/cars196/none/fold1/maps.json").write_text(json.dumps({**about, "pictures": {"number": 6, "sha256": "z"}}))
        compare.main(["--dataset", "cars196", "--out", "bad.csv"])


def test_masks_through_the_command(place, rng):
    maps, masks = rng.random((4, 8, 8)).astype(np.float16), rng.random((4, 8, 8)) < 0.3
    save(place / "a.npy", maps)
    for i, mask in enumerate(masks):
        (place / "m").mkdir(exist_ok=True)
        Image.fromarray((mask * 255).astype(np.uint8)).save(place / "m" / f"{i}.png")
    compare.main(["a.npy", "--masks", "m", "--out", "out.csv"])
    rows = {row["measure"]: row for row in read("masks.csv")}
    expected = compare.mask_shares(maps, masks, masks.mean(0), 4).mean(0)
    for value, name in zip(expected, compare.MASK_COLUMNS):
        assert float(rows[name]["mean"]) == pytest.approx(value, abs=1e-9) and rows[name]["n"] == "4"
        assert float(rows[name]["low"]) <= float(rows[name]["mean"]) <= float(rows[name]["high"])
    assert not (place / "out.csv").exists()  # one network: there is no pair


def test_masks_follow_resize_and_crop(place, rng):
    (place / "set/images").mkdir(parents=True), (place / "set/masks").mkdir()
    for i in range(2):
        mask = np.zeros((40, 60), dtype=np.uint8)
        mask[:, 30 * i:30 * i + 30] = 255  # the left half, the right half
        Image.fromarray(mask).save(place / f"set/masks/{i}.png")
        Image.fromarray(np.stack([mask] * 3, axis=2)).save(place / f"set/images/{i}.png")
    maps = np.zeros((2, 20, 20))
    maps[:, :, :10] = 1  # the left half after resize to 20 × 30 and crop to 20 × 20
    save(place / "a.npy", maps, preprocessing={"resize": 20, "crop": 20}, pictures={})
    compare.main(["a.npy", "--masks", "set/masks", "--dataset", "set/images", "--out", "x.csv"])
    rows = {row["measure"]: float(row["mean"]) for row in read("masks.csv")}
    assert [rows[name] for name in ("share", "area", "other", "pointing")] == pytest.approx([0.5] * 4)
    (place / "set/masks/1.png").unlink()
    with pytest.raises(ValueError, match=r"masks are missing for 1 of 2 pictures \(1\.png\)"):
        compare.main(["a.npy", "--masks", "set/masks", "--dataset", "set/images"])
    with pytest.raises(ValueError, match="1 PNG files for 2 maps"):
        compare.main(["a.npy", "--masks", "set/masks"])


def test_embeddings_through_the_command(place, rng):
    published(place, rng)
    x = rng.normal(size=(50, 4))
    for slug in ("triplet", "arcface", "none"):
        for fold in (0, 1):
            np.save(place / f"results/cars196/{slug}/fold{fold}/emb.npy", (x if slug != "none" else rng.normal(size=(50, 4))).astype(np.float32))
    compare.main(["--dataset", "cars196", "--embeddings"])
    rows = read("results/cars196/embeddings.csv")
    assert len(rows) == 6 and float(rows[0]["cka"]) == pytest.approx(1, abs=1e-5) and float(rows[0]["overlap"]) == 1
    assert float(rows[1]["cka"]) < 0.5 and float(rows[1]["overlap_chance"]) == pytest.approx(10 / 49)
    assert float(rows[1]["overlap_low"]) < float(rows[1]["overlap"]) < 0.5
    (place / "results/cars196/none/fold1/emb.npy").unlink()
    with pytest.raises(ValueError, match="1 networks have no emb.npy"):
        compare.main(["--dataset", "cars196", "--embeddings"])


def test_bad_input_teaches_and_leaves_nothing(place, rng):
    maps = rng.random((4, 6, 6))
    save(place / "a.npy", maps, pictures={"number": 4, "sha256": "one"}, preprocessing={"resize": 8, "crop": 6})
    save(place / "other.npy", maps, pictures={"number": 4, "sha256": "two"}, preprocessing={"resize": 8, "crop": 6})
    save(place / "crop.npy", maps, pictures={"number": 4, "sha256": "one"}, preprocessing={"resize": 16, "crop": 6})
    save(place / "small.npy", maps[:, :5])
    save(place / "few.npy", maps[:3])
    save(place / "flat.npy", maps[0])
    save(place / "empty.npy", maps[:0])
    high = maps.copy()
    high[2, 1, 1] = 1.5
    save(place / "high.npy", high)
    np.save(place / "objects.npy", np.array([{}]), allow_pickle=True)
    (place / "text.npy").write_text("no array")
    before = sorted(place.iterdir())
    for arguments, said in [
        (["a.npy", "small.npy"], r"a\.npy and small\.npy differ in shape, \(4, 6, 6\) and \(4, 5, 6\)"),
        (["a.npy", "few.npy"], r"a\.npy and few\.npy differ in shape"),
        (["a.npy", "other.npy"], r"a\.npy and other\.npy have different lists of pictures"),
        (["a.npy", "crop.npy"], r"a\.npy and crop\.npy have different resize or crop"),
        (["a.npy", "high.npy", "--per-picture", "p.npy"], r"high\.npy: picture 2 has values from .* to 1\.5; expected maps in \[0, 1\]"),
        (["a.npy"], r"one map file arrived \(a\.npy\)"),
        (["a.npy", "flat.npy"], r"flat\.npy has shape \(6, 6\)"),
        (["empty.npy", "empty.npy"], "is empty"),
        (["a.npy", "objects.npy"], "Python objects"),
        (["a.npy", "text.npy"], "not a .npy file"),
        (["a.npy", "missing.npy"], r"missing\.npy does not exist"),
        (["a.npy", "a.npy", "--out", "nowhere/x.csv"], "does not exist"),
        (["a.npy", "a.npy", "--masks", "nowhere"], "no such folder"),
        (["a.npy", "a.npy", "--masks"], "name it with --dataset"),
        (["a.npy", "a.npy", "--replicates", "0"], "--replicates 0"),
        (["a.npy", "a.npy", "--fold", "x"], None),
        (["--dataset", "cars196"], "no maps in results/cars196"),
        ([], "which maps"),
    ]:
        if said is None:
            with pytest.raises(SystemExit):
                compare.main(arguments)
            continue
        with pytest.raises((ValueError, OSError), match=said):
            compare.main(arguments)
        assert sorted(place.iterdir()) == before, arguments


def test_one_line_and_status_two(place, rng, run_script):
    save(place / "a.npy", rng.random((3, 4, 4)))
    done = run_script("compare.py", "a.npy", cwd=place)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("compare.py: one map file")
    done = run_script("compare.py", "a.npy", "a.npy", "--fold", "x", cwd=place)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    done = run_script("compare.py", "a.npy", "a.npy", "--out", "pair.csv", cwd=place)
    assert done.returncode == 0 and float(read(place / "pair.csv")[0]["correlation"]) > 0.999998
    assert float(read(place / "pair.csv")[0]["jsd"]) < 1e-6
    assert "compare.csv" in run_script("compare.py", "--help").stdout
