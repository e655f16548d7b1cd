"""folders.py and results.py: what a results folder holds, whose a row is, averages and tests by hand."""
import itertools
import json

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dml_common import files, folders, pictures, results

RANKING = ["Contrastive", "Triplet", "NTXent", "Margin", "Margin / class", "FastAP", "SNR Contrastive",
           "Multi Similarity", "Multi Similarity + Miner"]
CLASSIFICATION = ["ProxyNCA", "Normalized Softmax", "CosFace", "ArcFace", "SoftTriple"]
NRPREC = ("embeddings,property,values,queries,skipped,distance,null,max_neighbours,r_precision,nr_precision,"
          "nr_precision_se,permutations,p_value,p_holm")
COMPARE = ("model_a,fold_a,model_b,fold_b,n,left_out,correlation,correlation_std,correlation_low,"
           "correlation_high,jsd,jsd_std,ceiling,corrected")
MASKS = "model,fold,measure,n,left_out,mean,std,low,high"
SLUGS = {row["name"]: row["slug"] for row in files.losses()}


def add_network(folder, slug, fold=0, kinds=("emb",), n=6, **about):
    """Arrays and their JSON in <folder>/<slug>/fold<k>."""
    place = folder / slug / f"fold{fold}"
    place.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        np.save(place / f"{kind}.npy", np.zeros((n, 2) if kind == "emb" else (n, 2, 2), np.float32))
        about = {"pictures": {"number": n, "sha256": "one"}, **about}
        (place / f"{kind}.json").write_text(json.dumps(about))
    return place


def write(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_table(path, header.split(","), rows)


def nrprec_row(loss, fold, name, value, p_holm=None, se=None, queries=6, distance="euclidean", permutations=0):
    return [f"results/cars/{SLUGS.get(loss, loss)}/fold{fold}/emb.npy", name, 3, queries, 0, distance, "binomial",
            None, 0.25, value, se, permutations, p_holm, p_holm]


def compare_row(a, b, fold, r, std=0.1, ceiling=None, fold_b=None, n=6):
    fold_b = fold if fold_b is None else fold_b
    return [a, fold, b, fold_b, n, 0, r, std, r - 0.1, r + 0.1, 0.02, 0.01, ceiling, ceiling and r / ceiling]


def read(folder):
    return results.read(folder, folder / "models")


# ---------------------------------------------------------------- folders and arrays


def test_networks_keep_their_names_and_types(tmp_path):
    known = ("triplet", "Triplet", "b"), ("my_loss", "My <loss>", "b"), ("resnet", None, "resnet"), ("old", None, None)
    for slug, loss, backbone in known:
        place = tmp_path / slug / "fold1"
        place.mkdir(parents=True)
        if backbone:
            (place / "emb.json").write_text(json.dumps({"loss": loss, "backbone": backbone, "pictures": "strange"}))
    networks, broken = folders.find_networks(tmp_path, tmp_path)
    types = {one["name"]: one["type"] for one in networks}
    assert types == {"Triplet": "ranking", "My <loss>": "other", "resnet": "none", "old": "other"} and not broken
    assert list(types) == ["Triplet", "My <loss>", "old", "resnet"] and all(one["number"] == 1 for one in networks)
    assert [one["fold"] for one in networks] == [1, 1, 1, None]  # a backbone alone has no folds
    folders.check_together(networks)


def test_seeds_are_read_off_the_folder_and_two_slugs_of_one_loss_are_told_apart(tmp_path):
    for slug, fold in ("triplet", "0.seed2"), ("triplet", 0), ("triplet_wide", 0), ("arcface", "1.seed3"), ("a", "2x"):
        add_network(tmp_path, slug, fold, loss="ArcFace" if slug == "arcface" else "Triplet")
    networks, _ = folders.find_networks(tmp_path, tmp_path)
    assert [(one["name"], one["fold"], one["seed"]) for one in networks] == [
        ("triplet", 0, None), ("triplet", 0, 2), ("triplet_wide", 0, None), ("ArcFace", 1, 3)]
    assert folders.fold_and_seed("0.seed2") == folders.fold_and_seed("fold0.seed2") == (0, 2)
    assert folders.fold_and_seed("3") == (3, None) and folders.fold_and_seed("folder") == (None, None)


def test_the_type_of_an_unknown_loss_is_its_trainings(tmp_path):
    folder, models = tmp_path / "results" / "cars", tmp_path / "models"
    add_network(folder, "mine", loss="Mine")
    for place in (models / "trained" / "cars" / "mine" / "fold0", tmp_path / "elsewhere"):
        place.mkdir(parents=True)
        kind = "classification" if place.name == "fold0" else "ranking"
        (place / "config.json").write_text(json.dumps({"type": kind}))
    (tmp_path / "elsewhere" / "history.csv").write_text("epoch\n0\n")
    (network,), _ = folders.find_networks(folder, models)
    assert network["type"] == "classification" and network["history"] is None
    add_network(folder, "mine", loss="Mine", checkpoint=str(tmp_path / "elsewhere"))
    (network,), _ = folders.find_networks(folder, models)
    assert network["type"] == "ranking" and network["history"] == tmp_path / "elsewhere" / "history.csv"


def test_a_checkpoint_is_found_beside_the_results_and_where_models_lies_now(tmp_path):
    folder = tmp_path / "results" / "cars"
    add_network(folder, "mine", loss="Mine", checkpoint="models/trained/others/mine/fold0")
    for models in "moved", "models":  # beside the results first
        place = tmp_path / models / "trained" / "others" / "mine" / "fold0"
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps({"here": models}))
        (network,), _ = folders.find_networks(folder, tmp_path / "moved")
        assert network["config"] == {"here": models}


def test_orders():
    types = {"None": "none", "zebra": "other", "ape": "other", "ArcFace": "classification", "Triplet": "ranking",
             "Contrastive": "ranking", "resnet50": "none"}
    assert folders.in_order(types) == ["Contrastive", "Triplet", "ArcFace", "ape", "zebra", "None", "resnet50"]


def test_data_sets_are_the_folder_or_those_in_it(tmp_path):
    add_network(tmp_path / "cars", "triplet")
    write(tmp_path / "birds" / "nrprec.csv", "a", [[1]])
    (tmp_path / "notes" / "folded").mkdir(parents=True)
    assert folders.find_datasets(tmp_path) == [tmp_path / "birds", tmp_path / "cars"]
    assert folders.find_datasets(tmp_path / "cars") == [tmp_path / "cars"]
    for place, said in (tmp_path / "notes", "no results; expected"), (tmp_path / "nowhere", "no such folder"):
        with pytest.raises(ValueError, match=said):
            folders.find_datasets(place)


def test_arrays_that_are_half_finished_or_broken_are_told(tmp_path):
    half = add_network(tmp_path, "triplet", kinds=("emb", "maps"))
    (half / "maps.npy").rename(half / "maps.npy.part")
    cut = add_network(tmp_path, "margin") / "emb.npy"
    cut.write_bytes(cut.read_bytes()[:-4])
    other = add_network(tmp_path, "arcface", kinds=("maps",), pictures={"number": 5}) / "maps.npy"
    networks, broken = folders.find_networks(tmp_path, tmp_path)
    for path, said in (cut, "truncated"), (other, "5 pictures in its JSON"), (half / "maps.npy", "is half-finished"):
        assert any(line.startswith(str(path)) and said in line for line in broken), said
    assert len(broken) == 3 and [(one["name"], one["emb"] is None, one["maps"] is None) for one in networks] == [
        ("Triplet", False, True), ("Margin", True, True), ("ArcFace", True, True)]
    assert networks[0]["emb"]["array"].shape == (6, 2)


@pytest.mark.parametrize("change, said", [
    ({"pictures": {"number": 6, "sha256": "two"}}, "other lists of pictures"),
    ({"options": {"samples": 3}}, "samples: None, 3"), ({"n": 5, "pictures": {"number": 5}}, "other lists of pict")])
def test_what_does_not_belong_together_is_named(tmp_path, change, said):
    a, b = add_network(tmp_path, "triplet"), add_network(tmp_path, "arcface", **change)
    with pytest.raises(ValueError) as error:
        folders.check_together(folders.find_networks(tmp_path, tmp_path)[0])
    assert said in str(error.value) and f"{a / 'emb.npy'} and {b / 'emb.npy'} don't belong" in str(error.value)


def test_what_may_differ(tmp_path):
    add_network(tmp_path, "triplet", options={"seed": 1, "limit": None})
    add_network(tmp_path, "arcface", options={"seed": 2, "limit": 4})
    add_network(tmp_path, "arcface", 1, pictures={"number": 6, "sha256": "the other fold's"})
    np.save(add_network(tmp_path, "margin", kinds=()) / "emb.npy", np.zeros((6, 2)))  # without a JSON
    networks, broken = folders.find_networks(tmp_path, tmp_path)
    assert not broken
    folders.check_together(networks)
    add_network(tmp_path, "resnet", loss=None, backbone="resnet")  # of one list: with which fold does it belong?
    with pytest.raises(ValueError, match="other lists of pictures"):
        folders.check_together(folders.find_networks(tmp_path, tmp_path)[0])


def test_which_picture_a_row_is(tmp_path):
    names = [f"{i}.png" for i in range(6)]
    (tmp_path / "labels.csv").write_text("path\n" + "\n".join(names))

    def told(rows, listed=None, more=(), **options):
        digest = listed and {"sha256": pictures.pictures_sha256([names[row] for row in listed]), **dict(more)}
        about = {"path": tmp_path / "maps.npy", "pictures": digest or {}, "options": options}
        return folders.picture_names(about, len(rows))

    assert told(range(6)) == names
    assert told([0, 1], [0, 1], limit=2, pick=None) == names[:2]
    assert told([4, 2], [4, 2], limit=None, pick=[4, 2]) == ["4.png", "2.png"]
    assert told([0, 2], [0, 2], {"left_out": ["1.png"]}, limit=3, pick=None) == ["0.png", "2.png"]
    assert told([0, 1], [2, 3], limit=2, pick=None) is None
    assert told(range(6), range(6), limit=3) == names  # labels.csv has the pictures of these rows alone


def test_pictures_of_held_out_rows_without_labels(tmp_path):
    dataset = pictures.open_dataset(ROOT / "examples" / "cars")
    held_out = [dataset.relative[4], dataset.relative[1]]
    about = {"path": tmp_path / "maps.npy", "pictures": {"sha256": pictures.pictures_sha256(held_out)}, "options": {}}
    assert folders.picture_names(about | {"rows": [4, 1]}, 2, dataset) == held_out
    assert folders.picture_names(about | {"rows": [4, 10**6]}, 2, dataset) is None


# ---------------------------------------------------------------- rows as they are read


def test_rows_of_a_table(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("loss,fold,value,embeddings\nTriplet,1,0.5,a\n,,nan,b\n")
    assert results.read_rows(path, "x.py", ["value"]) == [
        {"loss": "Triplet", "fold": "1", "value": 0.5, "embeddings": "a"},
        {"loss": "", "fold": "", "value": None, "embeddings": "b"}]
    with pytest.raises(ValueError, match="lacks jsd, n; expected the table that x.py writes"):
        results.read_rows(path, "x.py", ["jsd", "value", "n"])
    path.write_text("loss,value\nTriplet,much\n")
    with pytest.raises(ValueError, match=r"row 0 .*, column value is 'much'; expected a number"):
        results.read_rows(path, "x.py", ["value"])


def test_whose_a_row_is(tmp_path):
    add_network(tmp_path, "triplet", "1.seed2")
    add_network(tmp_path, "resnet", loss=None, backbone="resnet50")
    networks, _ = folders.find_networks(tmp_path, tmp_path)
    assert results.whose("elsewhere/triplet/fold1.seed2/emb.npy", networks) == ("Triplet", 1, 2)
    assert results.whose("elsewhere/margin_per_class/fold3/emb.npy", networks) == ("Margin / class", 3, None)
    assert results.whose("resnet/fold0/emb.npy", networks) == ("resnet50", None, None)
    assert results.whose("mine.npy", networks) == ("mine.npy", None, None)
    (tmp_path / "mine.json").write_text('{"backbone": "vit"}')
    assert results.whose(str(tmp_path / "mine.npy"), networks) == ("vit", None, None)


def test_loss_and_fold_are_read_off_the_path_as_from_the_columns_of_older_tables(tmp_path):
    rows = [nrprec_row(loss, fold, "hue", value) for loss, fold, value in
            (("Triplet", 0, 1.0), ("Triplet", 1, 2.0), ("ArcFace", 0, 3.0))]
    write(tmp_path / "new" / "cars" / "nrprec.csv", NRPREC, rows)
    known = ["Triplet", 0], ["Triplet", 1], ["ArcFace", 0]
    write(tmp_path / "old" / "cars" / "nrprec.csv", f"loss,fold,{NRPREC}", map(list.__add__, known, rows))
    new, old = (read(tmp_path / name / "cars") for name in ("new", "old"))
    assert new.rows == old.rows and new.types == {"Triplet": "ranking", "ArcFace": "classification"}
    assert [(row.network, row.fold) for row in new.select("nr_precision")][:3] == list(map(tuple, known))


@pytest.mark.parametrize("rows, said", [
    ([nrprec_row("Triplet", 0, "model", 1, queries=300)], "counts 300 pictures for Triplet, its emb.npy has 6"),
    ([nrprec_row("Triplet", 0, "hue", 1), nrprec_row("ArcFace", 0, "hue", 1, distance="cosine")],
     "mixes distance euclidean and cosine"),
    ([nrprec_row("Triplet", 0, "model", 1), nrprec_row("Triplet", 0, "model", 2)], "two rows for Triplet, fold 0, mod"),
    ([nrprec_row("Triplet", 0, "model", "much")], "column nr_precision is 'much'; expected a number")])
def test_nrprec_that_does_not_belong(tmp_path, rows, said):
    add_network(tmp_path, "triplet")
    write(tmp_path / "nrprec.csv", NRPREC, rows)
    with pytest.raises(ValueError, match=said):
        read(tmp_path)


def test_tables_of_something_else(tmp_path):
    (tmp_path / "compare.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="lacks model_a, fold_a"):
        read(tmp_path)
    (tmp_path / "compare.csv").write_text("a,b\n1\n")
    with pytest.raises(ValueError, match="line 2 has 1 field, the header 2"):
        read(tmp_path)
    write(tmp_path / "compare.csv", COMPARE, [compare_row("Triplet", "ArcFace", 0, 0.5, n=99)])
    add_network(tmp_path, "triplet", kinds=("maps",))
    with pytest.raises(ValueError, match="compare.csv counts 99 pictures for Triplet"):
        read(tmp_path)


# ---------------------------------------------------------------- averages, by hand


def rows_of(measure, values, spreads=None, **more):
    base = results.Row("cars", measure, level="network", network="a", mark="", note="", **more)
    return [base._replace(fold=k, value=v, spread=s) for k, (v, s) in
            enumerate(zip(values, spreads or itertools.repeat(None)))]


def test_folds_average_as_if_their_pictures_were_taken_together():
    z = np.random.default_rng(1).normal(0.7, 0.3, (4, 500)) + [[0.0], [0.1], [-0.2], [0.3]]
    mean = results.mean_row(rows_of("correlation", np.tanh(z.mean(1)), np.tanh(z.std(1)).tolist()), "folds")
    assert (mean.value, mean.spread) == (pytest.approx(np.tanh(z.mean())), pytest.approx(np.tanh(z.std())))
    mean = results.mean_row(rows_of("jsd", z.mean(1), z.std(1).tolist()), "folds")
    assert (mean.value, mean.spread, mean.n) == (pytest.approx(z.mean()), pytest.approx(z.std()), 4)
    assert (mean.low, mean.high) == (z.mean(1).min(), z.mean(1).max())


def test_correlations_average_through_fisher_z_by_hand():
    # artanh 0.5 = ln 3 / 2, artanh 0.8 = ln 9 / 2; their mean is ln 27 / 4, whose tanh is (√27 − 1) / (√27 + 1)
    mean = results.mean_row(rows_of("correlation", [0.5, 0.8], [0.1, 0.1]), "pairs")
    assert mean.value == pytest.approx((27**0.5 - 1) / (27**0.5 + 1)) and mean.spread == pytest.approx(0.1)
    one = results.mean_row(rows_of("correlation", [1.0], [0.0]), "folds")
    assert one.value == pytest.approx(1, abs=2e-6)  # r = 1 is cut, not infinite


def test_a_mean_of_folds_of_masks_has_the_error_of_all_its_pictures(tmp_path):
    rows = [["Triplet", 0, "share", 10, 0, 0.1, 0.3, 0, 1], ["Triplet", 1, "share", 17, 0, 0.2, 0.4, 0, 1]]  # 0.1 each
    write(tmp_path / "masks.csv", MASKS, rows)
    mean, = read(tmp_path).select("masks", fold="mean")
    error = 0.1 / np.sqrt(2)
    assert (mean.value, mean.spread) == (pytest.approx(0.15), pytest.approx(error))
    assert (mean.low, mean.high) == (pytest.approx(0.15 - 1.96 * error), pytest.approx(0.15 + 1.96 * error))
    write(tmp_path / "masks.csv", MASKS, [[*rows[0][:6], None, 0, 1]])
    mean, = read(tmp_path).select("masks", fold="mean")
    assert mean.low is mean.high is mean.spread is None


def test_seeds_are_averaged_within_a_fold_and_folds_within_a_loss(tmp_path):
    folder = tmp_path / "cars@random"
    for fold, value in ("0", 1.0), ("0.seed2", 3.0), ("1", 5.0):
        add_network(folder, "triplet", fold)
    write(folder / "nrprec.csv", NRPREC, [nrprec_row("Triplet", "0", "hue", 1.0), nrprec_row("Triplet", 1, "hue", 5.0),
                                          nrprec_row("Triplet", "0.seed2", "hue", 3.0)])
    one = read(folder)
    mean, = one.select("nr_precision", fold="mean")
    assert (mean.value, mean.n, mean.low, mean.high) == (3.5, 2, 2.0, 5.0)  # not (1 + 3 + 5) / 3
    assert {(row.dataset, row.split) for row in one.rows} == {("cars", "random")} and one.name == "cars@random"
    assert [(row.fold, row.seed) for row in one.select("nr_precision")] == [
        (0, None), (1, None), (0, 2), ("mean", None)]


def test_types_have_students_interval_and_a_fold_that_of_its_queries(tmp_path):
    write(tmp_path / "nrprec.csv", NRPREC, [
        nrprec_row("Triplet", 0, "hue", 4.0, se=0.5), nrprec_row("Margin", 0, "hue", 2.0, se=0.5)])
    one = read(tmp_path)
    assert [(row.low, row.high) for row in one.select("nr_precision", fold="mean")] == [(3.02, 4.98), (1.02, 2.98)]
    mean, = one.select("nr_precision", "type")
    low, high = stats.t.interval(0.95, 1, loc=3, scale=1)  # standard error √2 / √2
    assert (mean.network, mean.n, mean.mark) == ("ranking", 2, "1 of 2")  # above the published mark
    assert (mean.low, mean.high, mean.spread) == (pytest.approx(low), pytest.approx(high), pytest.approx(2**0.5))


@pytest.mark.parametrize("value, holms, above", [
    (9, (0.001, 0.002), True), (9, (0.001, 0.02), False), (-3, (0.001, 0.002), False), (1, (0.001, 0.002), True),
    (9, (None, 0.02), True), (1, (None, 0.001), False)])
def test_above_chance_is_in_every_fold_and_above_0_or_by_the_published_mark(tmp_path, value, holms, above):
    rows = [nrprec_row("Triplet", fold, "hue", value, p_holm=p) for fold, p in enumerate(holms)]
    write(tmp_path / "nrprec.csv", NRPREC, rows)
    mean, = read(tmp_path).select("nr_precision", fold="mean")
    assert (mean.mark == "*") == above and mean.note == ("published mark" if None in holms else "tested")


# ---------------------------------------------------------------- tests, by hand


def test_mann_whitney_by_hand():
    assert results.mann_whitney([3, 4], [1, 2]) == (4, pytest.approx(2 / 6))
    # with ties: midranks 1, 2.5 | 2.5, 4; sums of two of them: 3.5, 3.5, 5, 5, 6.5, 6.5, mean 5
    assert results.mann_whitney([1, 2], [2, 3]) == (0.5, pytest.approx(4 / 6))
    assert results.mann_whitney([7, 7], [7, 7]) == (2, 1)
    u, p = results.mann_whitney(range(10, 19), range(5))
    assert (u, p) == (45, pytest.approx(2 / 2002))
    assert 11 * p == pytest.approx(0.011, abs=2e-5)  # nine against five, Holm over eleven: it cannot go below


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=4, max_size=14, unique=True), st.integers(2, 12))
def test_mann_whitney_is_scipys_exact_one_without_ties(values, n):
    n = min(n, len(values) - 2)
    expected = stats.mannwhitneyu(values[:n], values[n:], method="exact")
    u, p = results.mann_whitney(values[:n], values[n:])
    assert (u, p) == (expected.statistic, pytest.approx(min(1, expected.pvalue)))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=4, max_size=8), st.integers(2, 6))
def test_mann_whitney_with_ties_is_the_enumeration(values, n):
    n = min(n, len(values) - 2)
    ranks = stats.rankdata(values)
    sums = np.array([ranks[list(chosen)].sum() for chosen in itertools.combinations(range(len(values)), n)])
    extreme = np.abs(sums - sums.mean()) >= abs(ranks[:n].sum() - sums.mean()) - 1e-9
    assert results.mann_whitney(values[:n], values[n:])[1] == pytest.approx(extreme.mean())


def test_beyond_so_many_partitions_random_ones_are_drawn_and_said(monkeypatch):
    types = dict.fromkeys("abcdef", "ranking") | dict.fromkeys("uvwxyz", "classification")
    rows = [results.Row("cars", "nr_precision", "hue", "network", name, type=kind, fold="mean", value=float(k))
            for k, (name, kind) in enumerate(types.items())]
    exact, _ = results.type_tests(rows, rows, "nr_precision")
    monkeypatch.setattr(results, "MOST", 400)  # of 924
    drawn, again = (results.type_tests(rows, rows, "nr_precision")[0] for _ in range(2))
    assert exact["note"] == "exact" and exact["p"] == pytest.approx(2 / 924) and drawn["p"] == again["p"]
    assert drawn["note"] == "400 random ways" and 1 / 401 <= drawn["p"] < 0.02 and drawn["low"] == 2 / 924


def test_released_p_is_the_old_default():
    x, y = [1.0, 2.5, 2.5, 4.0, 6.0], [2.5, 5.0, 7.0, 8.0]
    ranks = stats.rankdata(x + y)
    u = len(x) * len(y) + len(x) * (len(x) + 1) / 2 - ranks[:5].sum()
    ties = 1 - sum(t**3 - t for t in np.unique(ranks, return_counts=True)[1]) / (9**3 - 9)
    z = (max(u, 20 - u) - 10 - 0.5) / np.sqrt(ties * 20 * 10 / 12)  # SciPy 1.6: continuity, one tail
    assert results.released_p(x, y) == pytest.approx(stats.norm.sf(abs(z)), abs=1e-12)
    assert results.released_p([1, 1], [1]) == 0.5


def test_holm_by_hand():
    np.testing.assert_allclose(results.holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    np.testing.assert_allclose(results.holm([0.5, 0.9]), [1, 1])


def test_effect_and_pooled_folds(tmp_path):
    values = {"Triplet": [3, 5], "Margin": [1, 1], "ArcFace": [2, 2], "CosFace": [2, 2], "None": [9]}
    write(tmp_path / "nrprec.csv", NRPREC, [
        *(nrprec_row(loss, fold, "x", value) for loss, folds in values.items() for fold, value in enumerate(folds)),
        nrprec_row("Triplet", 0, "y", 1), nrprec_row("None", 0, "y", 2)])
    one = read(tmp_path)
    test, = one.select("nr_precision", "test")  # y has no classification loss
    # fold averages 4 and 1 against 2 and 2: U = 2 of 4, as far from the mean as any choice but none
    assert (test.key, test.value, test.p, test.mark, test.n) == ("x", 0, 1, "", 4)
    released, = one.select("nr_precision", "released")
    assert released.note == "4 against 4 fold values" and released.value == 0.5
    assert released.p == results.released_p([3, 5, 1, 1], [2, 2, 2, 2])


def test_the_order_of_properties_against_the_papers(tmp_path):
    theirs = {key: value for key, value in results.published_nrprec()["Triplet"].items() if key != "sun_rotation"}
    write(tmp_path / "nrprec.csv", NRPREC, [nrprec_row("Triplet", 0, key, value) for key, value in theirs.items()])
    test, = read(tmp_path).select("order", "test")
    assert test.value > 0.95 and test.p < 0.002 and test.n == 10
    write(tmp_path / "nrprec.csv", NRPREC, [nrprec_row("Triplet", 0, key, -value) for key, value in theirs.items()])
    assert read(tmp_path).select("order", "test")[0].value == pytest.approx(-test.value)
    generator = np.random.default_rng(0)
    values = dict(zip(theirs, generator.normal(size=10)))
    write(tmp_path / "nrprec.csv", NRPREC, [nrprec_row("Triplet", 0, key, value) for key, value in values.items()])
    test, = read(tmp_path).select("order", "test")
    losses = [row for name, row in results.published_nrprec().items() if not name.endswith(("None", " Mean"))]
    expected = stats.spearmanr(list(values.values()), [np.mean([row[key] for row in losses]) for key in values])
    assert test.value == pytest.approx(expected.statistic) and test.p == pytest.approx(expected.pvalue, abs=0.03)


def test_same_group_finds_what_is_there_and_nothing_else():
    groups = dict(zip("abcdefghijklmn", "r" * 9 + "c" * 5))
    generator = np.random.default_rng(2)
    noise = {pair: generator.normal(0, 0.07) for pair in itertools.combinations(groups, 2)}
    shifted = {(a, b): 0.9 - 0.3 * (groups[a] != groups[b]) + value for (a, b), value in noise.items()}
    test = results.same_group(shifted, groups)
    assert test["value"] == pytest.approx(np.tanh(0.9) - np.tanh(0.6), abs=0.03) and test["p"] < 0.005
    assert results.same_group(noise, groups)["p"] > 0.05
    assert results.same_group(noise, dict.fromkeys(groups, "r")) == {}


def test_the_papers_numbers_and_what_differs_from_them(tmp_path):
    cars, sop, cars196, _ = results.published()
    assert len(sop.names("correlation")) == 15 and sop.cells("correlation")["Triplet", "NTXent"].value == 0.63
    assert cars.cells("nr_precision", "type")["ranking", "model"].value == 57.91
    write(tmp_path / "cars196" / "compare.csv", COMPARE, [
        compare_row("Triplet", "Margin", 0, 0.8), compare_row("Triplet", "ArcFace", 0, 0.95)])
    both = results.difference(read(tmp_path / "cars196"), cars196)
    assert {pair: round(row.value, 9) for pair, row in both.cells("correlation", "type").items()} == {
        ("ranking", "ranking"): -0.06, ("classification", "ranking"): 0.10}


# ---------------------------------------------------------------- what a reader must know


def test_warnings(tmp_path):
    folder, options = tmp_path / "cars", {"shared_noise": True, "noise_of": ""}
    add_network(folder, "triplet", kinds=("maps",), options=options, backbone="bninception")
    add_network(folder, "arcface", kinds=("maps", "maps_ceiling"), options=options, backbone="bninception",
                pictures={"number": 6, "sha256": "one", "left_out": ["broken.jpg"]})
    add_network(folder, "mine", kinds=("maps",), options=options, loss="Mine", backbone="vit")
    home = folder / "models" / "trained" / "cars" / "triplet" / "fold0"
    home.mkdir(parents=True)
    (home / "config.json").write_text(json.dumps({"frozen_trunk": True, "loss_parameters": {"margin": 0.05}}))
    write(folder / "nrprec.csv", NRPREC, [nrprec_row(loss, 0, name, 1.0, p_holm=0.02, permutations=n)
                                          for name in "abcdef" for loss, n in (("Triplet", 500), ("ArcFace", 100))])
    row = compare_row("Triplet", "ArcFace", 0, 0.5, n=4)
    row[5] = 2
    write(folder / "compare.csv", COMPARE, [row])
    said = "\n".join(read(folder).warnings)
    for part in (
            "1 of 1 pairs of maps share their noise, which raises",
            "2 of 3 networks (Triplet fold 0, Mine fold 0) have no second maps",
            "different numbers of permutations (100, 500)",
            "100 permutations of 6 properties can't give p_holm < 0.01",
            "few pictures: saliency maps of 6",
            "1 of 3 networks (Triplet fold 0) were trained with a frozen trunk: they differ",
            "have the parameters of models/losses.csv, not tuned ones",
            "1 pictures were left out, they could not be read (broken.jpg)",
            "up to 2 pictures are left out of a pair",
            "backbones alone (bninception, vit)", "one fold only",
            "not in models/losses.csv: Mine; kept, type “other”"):
        assert part in said, part
    row[12:14] = 0.8, 0.6  # with second maps compare.py crosses them: independent noise, and a ceiling
    write(folder / "compare.csv", COMPARE, [row])
    said = "\n".join(read(folder).warnings)
    assert "share their noise, so each was compared with the other networks' second maps" in said
    assert "which raises" not in said


def test_what_is_missing_is_listed(tmp_path):
    write(tmp_path / "nrprec.csv", NRPREC, [
        nrprec_row("Triplet", 0, "hue", 1), nrprec_row("Triplet", 1, "hue", 1), nrprec_row("Triplet", 0, "model", 1),
        nrprec_row("ArcFace", 0, "hue", 1), nrprec_row("ArcFace", 0, "model", None)])
    write(tmp_path / "compare.csv", COMPARE, [
        compare_row("Triplet", "ArcFace", 0, 0.5), compare_row("Triplet", "ArcFace", 1, 0.5),
        compare_row("None", "Triplet", 0, 0.5)])
    missing = [(line["table"], line["what"]) for line in read(tmp_path).missing]
    for line in (("nrprec", "ArcFace and model: no nr_precision"), ("nrprec", "nrprec.csv has no rows of None"),
                 ("nrprec", "ArcFace: fold 1; the mean is over the others"),
                 ("compare", "ArcFace and None: no correlation"),
                 ("compare", "Triplet and None: fold 1; the mean is over the others"),
                 ("masks", "masks.csv is not there, or empty: python compare.py --masks makes it"),
                 ("ceiling", "no noise ceiling: python saliency.py … --ceiling makes the second maps"),
                 ("nrprec_tests", "ranking and classification can't be compared: two losses of each are needed")):
        assert line in missing, line
