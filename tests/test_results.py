"""folders.py and results.py: what a results folder holds, whose a row is; averages and tests by hand."""
import json

import numpy as np
import pytest
from conftest import ROOT, write_json, write_rows
from scipy import stats

from dml_common import conclusions, files, folders, pictures, results

RANKING = ["Contrastive", "Triplet", "NTXent", "Margin", "Margin / class", "FastAP", "SNR Contrastive",
           "Multi Similarity", "Multi Similarity + Miner"]
CLASSIFICATION = ["ProxyNCA", "Normalized Softmax", "CosFace", "ArcFace", "SoftTriple"]
HEADERS = {
    "nrprec": "embeddings,property,values,queries,skipped,distance,null,max_neighbours,r_precision,"
              "nr_precision,nr_precision_se,permutations,p_value,p_holm",
    "compare": "model_a,fold_a,model_b,fold_b,n,left_out,correlation,correlation_std,correlation_low,"
               "correlation_high,jsd,jsd_std,ceiling,corrected",
    "masks": "model,fold,measure,n,left_out,mean,std,low,high",
    "faithfulness": "model,fold,measure,n,left_out,mean,std,low,high",
    "sanity": "model,fold,layers,of,correlation,correlation_std",
    "embeddings": "model_a,fold_a,model_b,fold_b,n,cka,overlap,overlap_low,overlap_high,overlap_chance",
    "history": "epoch,split,positive_mean,negative_mean,jsd,recall_at_1,map_at_r",
    "pairs": "embeddings,split,repeat,label,positive_mean,negative_mean,jsd,jsd_null,bins,recall_at_1,"
             "r_precision,map_at_r"}
SLUGS = {row["name"]: row["slug"] for row in files.losses()}


def add_network(folder, slug, fold=0, kinds=("emb",), n=6, **about):
    """Arrays and their JSON in <folder>/<slug>/fold<k>."""
    place = folder / slug / f"fold{fold}"
    place.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        np.save(place / f"{kind}.npy", np.zeros((n, 2) if kind == "emb" else (n, 2, 2), np.float32))
        write_json(place / f"{kind}.json", {"pictures": {"number": n, "sha256": "one"}, **about})
    return place


def add_training(models, place, history=(), **config):
    write_json(models / "trained" / place / "config.json", config)
    if history:
        write(models / "trained" / place, "history", history)


def write(folder, name, rows, *more_columns):
    """One of the scripts' tables; of nrprec.csv's rows what nrprec_row is told suffices."""
    rows = [nrprec_row(*row) if name == "nrprec" and len(row) < 14 else row for row in rows]
    write_rows(folder / f"{name}.csv", ",".join([HEADERS[name], *more_columns]), rows)


def nrprec_row(loss, fold, name, value, p=None, se=None, queries=6, distance="euclidean", permutations=0):
    path = f"results/cars/{SLUGS.get(loss, loss)}/fold{fold}/emb.npy"
    return [path, name, 3, queries, 0, distance, "binomial", None, 0.25, value, se, permutations, p, p]


def compare_row(a, b, fold, r, std=0.1, ceiling=None, fold_b=None, n=6):
    fold_b, corrected = fold if fold_b is None else fold_b, ceiling and r / ceiling
    return [a, fold, b, fold_b, n, 0, r, std, r - 0.1, r + 0.1, 0.02, 0.01, ceiling, corrected]


def read(folder, *rows):
    """The folder's Results, with these rows (loss, fold, property, value, p …) in its nrprec.csv."""
    if rows:
        write(folder, "nrprec", rows)
    return results.read(folder, folder / "models")


# ---------------------------------------------------------------- folders and arrays


def test_networks_keep_their_names_and_types(tmp_path):
    for slug, loss, backbone in (("triplet", "Triplet", "b"), ("my_loss", "My <loss>", "b"),
                                 ("resnet", None, "resnet")):
        write_json(tmp_path / slug / "fold1" / "emb.json", {"loss": loss, "backbone": backbone})
    (tmp_path / "old" / "fold1").mkdir(parents=True)
    networks, broken = folders.find_networks(tmp_path, tmp_path)
    mine = tmp_path / "my_loss" / "fold1" / "emb.json"  # of embed.py --as "My <loss>" --type classification
    write_json(mine, {**json.loads(mine.read_text()), "type": "classification"})
    retyped = next(one for one in folders.find_networks(tmp_path, tmp_path)[0] if one["slug"] == "my_loss")
    assert retyped["type"] == "classification"
    assert [(one["name"], one["type"], one["number"], one["fold"]) for one in networks] == [
        ("Triplet", "ranking", 1, 1), ("My <loss>", "other", 1, 1), ("old", "other", 1, 1),
        ("resnet", "none", 1, None)] and not broken  # a backbone alone has no folds
    folders.check_together(networks)
    types = {"None": "none", "zebra": "other", "ape": "other", "ArcFace": "classification",
             "Triplet": "ranking", "Contrastive": "ranking", "resnet50": "none"}
    order = ["Contrastive", "Triplet", "ArcFace", "ape", "zebra", "None", "resnet50"]
    assert folders.in_order(types) == order


def test_seeds_are_read_off_the_folder_and_two_slugs_of_one_loss_are_told_apart(tmp_path):
    for place in "triplet/0.seed2", "triplet/0", "triplet_wide/0", "arcface/1.seed3", "triplet/2x":
        slug, fold = place.split("/")
        add_network(tmp_path, slug, fold, loss="ArcFace" if slug == "arcface" else "Triplet")
    networks, _ = folders.find_networks(tmp_path, tmp_path)
    assert [(one["name"], one["fold"], one["seed"]) for one in networks] == [
        ("triplet", 0, None), ("triplet", 0, 2), ("triplet_wide", 0, None), ("ArcFace", 1, 3)]
    for text, expected in (("0.seed2", (0, 2)), ("fold0.seed2", (0, 2)), ("3", (3, None)),
                           ("folder", (None, None))):
        assert folders.fold_and_seed(text) == expected


def test_a_network_is_described_by_its_training_wherever_models_lies_now(tmp_path):
    folder, models = tmp_path / "results" / "cars", tmp_path / "moved"
    other = tmp_path / "elsewhere"

    def network(**about):
        add_network(folder, "mine", loss="Mine", **about)
        (one,), _ = folders.find_networks(folder, models)
        return one

    add_training(models, "cars/mine/fold0", type="classification")
    write_json(other / "config.json", {"type": "ranking"})
    (other / "history.csv").write_text("epoch\n0\n")
    assert network()["type"] == "classification" and network()["history"] is None
    assert network(checkpoint=str(other))["history"] == other / "history.csv"
    assert network(checkpoint=str(other))["type"] == "ranking"
    assert network(checkpoint="models/trained/cars/mine/fold0")["type"] == "classification"
    add_training(tmp_path / "models", "others/mine/fold0", type="none")  # beside the results
    assert network(checkpoint="models/trained/others/mine/fold0")["type"] == "none"


def test_data_sets_are_the_folder_or_those_in_it(tmp_path):
    add_network(tmp_path / "cars", "triplet")
    write_rows(tmp_path / "birds" / "nrprec.csv", "a", [[1]])
    (tmp_path / "notes" / "folded").mkdir(parents=True)
    assert folders.find_datasets(tmp_path) == [tmp_path / "birds", tmp_path / "cars"]
    assert folders.find_datasets(tmp_path / "cars") == [tmp_path / "cars"]
    for name, said in ("notes", "no results; expected"), ("nowhere", "no such folder"):
        with pytest.raises(ValueError, match=said):
            folders.find_datasets(tmp_path / name)


def test_arrays_that_are_half_finished_or_broken_are_told(tmp_path):
    half = add_network(tmp_path, "triplet", kinds=("emb", "maps")) / "maps.npy"
    half.rename(f"{half}.part")
    cut = add_network(tmp_path, "margin") / "emb.npy"
    cut.write_bytes(cut.read_bytes()[:-4])
    other = add_network(tmp_path, "arcface", kinds=("maps",), pictures={"number": 5}) / "maps.npy"
    networks, broken = folders.find_networks(tmp_path, tmp_path)
    for path, said in (cut, "truncated"), (other, "5 pictures in its JSON"), (half, "is half-finished"):
        assert any(line.startswith(str(path)) and said in line for line in broken), said
    assert len(broken) == 3 and networks[0]["emb"]["array"].shape == (6, 2)
    assert [(one["name"], one["emb"] is None, one["maps"] is None) for one in networks] == [
        ("Triplet", False, True), ("Margin", True, True), ("ArcFace", True, True)]


@pytest.mark.parametrize("change, said", [
    ({"pictures": {"number": 6, "sha256": "two"}}, "other lists of pictures"),
    ({"options": {"samples": 3}}, "samples: None, 3"),
    ({"n": 5, "pictures": {"number": 5}}, "other lists of pictures")])
def test_what_does_not_belong_together_is_named(tmp_path, change, said):
    a, b = add_network(tmp_path, "triplet"), add_network(tmp_path, "arcface", **change)
    with pytest.raises(ValueError) as error:
        folders.check_together(folders.find_networks(tmp_path, tmp_path)[0])
    assert said in str(error.value) and f"{a / 'emb.npy'} and {b / 'emb.npy'} don't" in str(error.value)


def test_what_may_differ(tmp_path):
    add_network(tmp_path, "triplet", options={"seed": 1, "limit": None})
    add_network(tmp_path, "arcface", options={"seed": 2, "limit": 4})
    add_network(tmp_path, "arcface", 1, pictures={"number": 6, "sha256": "the other fold's"})
    np.save(add_network(tmp_path, "margin", kinds=()) / "emb.npy", np.zeros((6, 2)))  # without a JSON
    networks, broken = folders.find_networks(tmp_path, tmp_path)
    assert not broken
    folders.check_together(networks)
    add_network(tmp_path, "resnet", loss=None, backbone="resnet")  # of one list: with which fold?
    with pytest.raises(ValueError, match="other lists of pictures"):
        folders.check_together(folders.find_networks(tmp_path, tmp_path)[0])


def test_which_picture_a_row_is(tmp_path):
    names = [f"{i}.png" for i in range(6)]
    (tmp_path / "labels.csv").write_text("path\n" + "\n".join(names))

    def told(n, rows=None, left_out=(), **options):
        listed = {"left_out": left_out}
        if rows is not None:
            listed["sha256"] = pictures.pictures_sha256([names[row] for row in rows])
        about = {"path": tmp_path / "maps.npy", "pictures": listed, "options": options}
        return folders.picture_names(about, n)

    assert told(6) == names
    assert told(2, [0, 1], limit=2, pick=None) == names[:2]
    assert told(2, [4, 2], limit=None, pick=[4, 2]) == ["4.png", "2.png"]
    assert told(2, [0, 2], ["1.png"], limit=3, pick=None) == ["0.png", "2.png"]
    assert told(2, [2, 3], limit=2, pick=None) is None
    assert told(6, range(6), limit=3) == names  # labels.csv has the pictures of these rows alone
    tmp_path = tmp_path / "triplet" / "fold0"  # labels.csv is where embed.py --out results has it
    assert told(2, [4, 2], pick=[4, 2]) == ["4.png", "2.png"]


def test_pictures_of_held_out_rows_without_labels(tmp_path):
    dataset = pictures.open_dataset(ROOT / "examples" / "cars")
    held_out = [dataset.relative[4], dataset.relative[1]]
    about = {"path": tmp_path / "maps.npy", "options": {},
             "pictures": {"sha256": pictures.pictures_sha256(held_out)}}
    assert folders.picture_names(about | {"rows": [4, 1]}, 2, dataset) == held_out
    assert folders.picture_names(about | {"rows": [4, 10**6]}, 2, dataset) is None


# ---------------------------------------------------------------- rows as they are read


def test_rows_of_a_table(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("loss,fold,mean,embeddings\nTriplet,1,0.5,a\n,,nan,b\n")
    assert results.read_rows(path, "x.py", ["mean"]) == [
        {"loss": "Triplet", "fold": "1", "mean": 0.5, "embeddings": "a"},
        {"loss": "", "fold": "", "mean": None, "embeddings": "b"}]
    with pytest.raises(ValueError, match="lacks jsd, n; expected the table that x.py writes"):
        results.read_rows(path, "x.py", ["jsd", "mean", "n"])
    path.write_text("loss,mean\nTriplet,much\n")
    with pytest.raises(ValueError, match=r"row 0 .*, column mean is 'much'; expected a number"):
        results.read_rows(path, "x.py", ["mean"])


def test_whose_a_row_is(tmp_path):
    add_network(tmp_path, "triplet", "1.seed2")
    add_network(tmp_path, "resnet", loss=None, backbone="resnet50")
    (tmp_path / "mine.json").write_text('{"backbone": "vit"}')
    networks, _ = folders.find_networks(tmp_path, tmp_path)
    for path, expected in (("elsewhere/triplet/fold1.seed2/emb.npy", ("Triplet", 1, 2)),
                           ("elsewhere/margin_per_class/fold3/emb.npy", ("Margin / class", 3, None)),
                           ("resnet/fold0/emb.npy", ("resnet50", None, None)),
                           ("mine.npy", ("mine.npy", None, None)),
                           (f"{tmp_path}/mine.npy", ("vit", None, None))):
        assert results.whose(path, networks) == expected


def test_loss_and_fold_are_read_off_the_path_as_from_the_columns_of_older_tables(tmp_path):
    rows = [("Triplet", 0, "hue", 1.0), ("Triplet", 1, "hue", 2.0), ("ArcFace", 0, "hue", 3.0)]
    new, old = tmp_path / "new" / "cars", tmp_path / "old" / "cars"
    write(old, "nrprec", [[*nrprec_row(*row), *row[:2]] for row in rows], "loss", "fold")
    new, old = read(new, *rows), read(old)
    assert new.rows == old.rows and new.types == {"Triplet": "ranking", "ArcFace": "classification"}
    assert [row[:2] for row in rows] == [
        (row.network, row.fold) for row in new.select("nr_precision") if row.fold != "mean"]


@pytest.mark.parametrize("rows, said", [
    ([("Triplet", 0, "hue", 1, None, None, 300)], "counts 300 pictures for Triplet, its emb.npy has 6"),
    ([("Triplet", 0, "hue", 1), ("Margin", 0, "hue", 1, None, None, 6, "snr")], "distance euclidean and snr"),
    ([("Triplet", 0, "hue", 1), ("Triplet", 0, "hue", 2)], "two rows for Triplet, fold 0, hue"),
    ([("Triplet", 0, "hue", "much")], "column nr_precision is 'much'; expected a number")])
def test_nrprec_that_does_not_belong(tmp_path, rows, said):
    add_network(tmp_path, "triplet")
    with pytest.raises(ValueError, match=said):
        read(tmp_path, *rows)


@pytest.mark.parametrize("text, said", [
    ("a,b\n1,2\n", "lacks model_a, fold_a"), ("a,b\n1\n", "line 2 has 1 field, the header 2"),
    (0, "compare.csv counts 99 pictures for Triplet"), ("x", "has the fold 'x'; expected 0, or 0.seed2")])
def test_tables_of_something_else(tmp_path, text, said):
    write(tmp_path, "compare", [compare_row("Triplet", "ArcFace", text, 0.5, n=99)])
    if text and "," in text:
        (tmp_path / "compare.csv").write_text(text)
    add_network(tmp_path, "triplet", kinds=("maps",))
    with pytest.raises(ValueError, match=said):
        read(tmp_path)


# ---------------------------------------------------------------- averages, by hand


def rows_of(measure, values, spreads):
    base = results.Row("cars", measure, level="network", network="a", mark="", note="")
    return [base._replace(fold=k, value=value, spread=spread)
            for k, (value, spread) in enumerate(zip(values, spreads))]


def test_folds_average_as_if_their_pictures_were_taken_together():
    z = np.random.default_rng(1).normal(0.7, 0.3, (4, 500)) + [[0.0], [0.1], [-0.2], [0.3]]
    means, spreads = z.mean(axis=1), z.std(axis=1)
    mean = results.mean_row(rows_of("correlation", np.tanh(means), np.tanh(spreads)), "folds")
    assert mean[12:14] == (pytest.approx(np.tanh(z.mean())), pytest.approx(np.tanh(z.std())))
    mean = results.mean_row(rows_of("jsd", means, spreads), "folds")
    assert mean[12:17] == (pytest.approx(z.mean()), pytest.approx(z.std()), min(means), max(means), 4)
    # artanh 0.5 = ln 3 / 2, artanh 0.8 = ln 9 / 2; their mean ln 27 / 4 has the tanh (√27 − 1) / (√27 + 1)
    mean = results.mean_row(rows_of("correlation", [0.5, 0.8], [0.1, 0.1]), "pairs")
    assert mean.value == pytest.approx((27**0.5 - 1) / (27**0.5 + 1)) and mean.spread == pytest.approx(0.1)
    one = results.mean_row(rows_of("correlation", [1.0], [0.0]), "folds")
    assert one.value == pytest.approx(conclusions.CLIP, abs=1e-9) and conclusions.CLIP < 1  # not infinite


def test_a_mean_of_folds_of_masks_has_the_error_of_all_its_pictures(tmp_path):
    rows = [["Triplet", 0, "share", 10, 0, 0.1, 0.3, 0, 1], ["Triplet", 1, "share", 17, 0, 0.2, 0.4, 0, 1]]
    write(tmp_path, "masks", rows)  # errors 0.3 / √9 and 0.4 / √16
    mean, = read(tmp_path).select("masks", fold="mean")
    error = 0.1 / np.sqrt(2)
    assert mean[12:16] == pytest.approx((0.15, error, 0.15 - 1.96 * error, 0.15 + 1.96 * error))
    write(tmp_path, "masks", [[*rows[0][:6], None, 0, 1]])
    mean, = read(tmp_path).select("masks", fold="mean")
    assert mean.low is mean.high is mean.spread is None


def test_seeds_are_averaged_within_a_fold_and_folds_within_a_loss(tmp_path):
    folder = tmp_path / "cars@random"
    for fold in "0", "0.seed2", "1":
        add_network(folder, "triplet", fold)
    one = read(folder, ("Triplet", 0, "hue", 1), ("Triplet", 1, "hue", 5), ("Triplet", "0.seed2", "hue", 3))
    mean, = one.select("nr_precision", fold="mean")
    assert (mean.value, mean.n, mean.low, mean.high) == (3.5, 2, 2.0, 5.0)  # not (1 + 3 + 5) / 3
    assert one.name == "cars@random" and {row[:1] + row[8:9] for row in one.rows} == {("cars", "random")}
    assert [(row.fold, row.seed) for row in one.select("nr_precision")] == [
        (0, None), (1, None), (0, 2), ("mean", None)]


def test_types_have_students_interval_and_a_fold_that_of_its_queries(tmp_path):
    one = read(tmp_path, ("Triplet", 0, "hue", 4.0, None, 0.5), ("Margin", 0, "hue", 2.0, None, 0.5))
    folds = [(row.low, row.high) for row in one.select("nr_precision", fold="mean")]
    assert folds == [(3.02, 4.98), (1.02, 2.98)]
    mean, = one.select("nr_precision", "type")
    low, high = stats.t.interval(0.95, 1, loc=3, scale=1)  # standard error √2 / √2
    assert mean[12:17] == pytest.approx((3, 2**0.5, low, high, 2))
    assert (mean.network, mean.mark) == ("ranking", "1 of 2")  # above the published mark


@pytest.mark.parametrize("value, holms, above", [
    (9, (0.001, 0.002), True), (9, (0.001, 0.02), False), (-3, (0.001, 0.002), False),
    (1, (0.001, 0.002), True), (9, (None, 0.02), True), (1, (None, 0.001), False)])
def test_above_chance_is_in_every_fold_and_above_0_or_by_the_mark(tmp_path, value, holms, above):
    one = read(tmp_path, *(("Triplet", fold, "hue", value, p) for fold, p in enumerate(holms)))
    mean, = one.select("nr_precision", fold="mean")
    assert (mean.mark == "*") == above
    assert mean.note == ("published mark" if None in holms else "tested")


# ---------------------------------------------------------------- tests, by hand


def test_beyond_so_many_partitions_random_ones_are_drawn_and_said(monkeypatch):
    kinds = ["ranking"] * 6 + ["classification"] * 6
    rows = [results.Row("cars", "x", "hue", "network", str(k), type=kind, fold="mean", value=float(k))
            for k, kind in enumerate(kinds)]
    folds = [row._replace(fold=0) for row in rows]
    exact, _ = results.type_tests(folds, rows, "x")
    monkeypatch.setattr(conclusions, "MOST", 400)  # of 924
    drawn, again = (results.type_tests(folds, rows, "x")[0] for _ in range(2))
    assert exact["note"] == "exact" and exact["p"] == pytest.approx(2 / 924) and drawn["p"] == again["p"]
    assert drawn["note"] == "400 random ways" and 1 / 401 <= drawn["p"] < 0.02 and drawn["low"] == 2 / 924


def test_effect_and_pooled_folds(tmp_path):
    values = {"Triplet": (3, 5), "Margin": (1, 1), "ArcFace": (2, 2), "CosFace": (2, 2), "None": (9, 9)}
    rows = [(loss, fold, "x", value[fold]) for loss, value in values.items() for fold in range(2)]
    one = read(tmp_path, *rows, ("Triplet", 0, "y", 1), ("None", 0, "y", 2))
    test, = one.select("nr_precision", "test")  # y has no classification loss
    # fold averages 4 and 1 against 2 and 2: U = 2 of 4, as near the mean as can be
    assert (test.key, test.value, test.p, test.mark, test.n) == ("x", 0, 1, "", 4)
    released, = one.select("nr_precision", "released")
    assert released.note == "4 against 4 fold values" and released.value == 0.5
    assert released.p == conclusions.released_p([3, 5, 1, 1], [2, 2, 2, 2])


def test_the_order_of_properties_against_the_papers(tmp_path):
    losses = [row for name, row in results.published_nrprec().items() if not name.endswith(("None", "Mean"))]
    theirs = {key: np.mean([row[key] for row in losses]) for key in losses[0] if key != "sun_rotation"}

    def test(values):
        return read(tmp_path, *(("Triplet", 0, key, value) for key, value in values.items())).select(
            "order", "test")[0]

    same, reverse = test(theirs), test({key: -value for key, value in theirs.items()})
    assert (same.value, same.n) == (pytest.approx(1), 10) and same.p < 0.002
    assert reverse.value == pytest.approx(-1) and reverse.p < 0.002
    noise = dict(zip(theirs, np.random.default_rng(0).normal(size=10)))
    expected = stats.spearmanr(list(noise.values()), list(theirs.values()))
    assert test(noise).value == pytest.approx(expected.statistic)
    assert test(noise).p == pytest.approx(expected.pvalue, abs=0.03)


# ---------------------------------------------------------------- what a reader must know


def test_warnings(tmp_path):
    folder, shared = tmp_path / "cars", {"options": {"shared_noise": True, "noise_of": ""}}
    add_network(folder, "triplet", kinds=("maps",), backbone="bninception", **shared)
    add_network(folder, "arcface", kinds=("maps", "maps_ceiling"), backbone="bninception", **shared,
                pictures={"number": 6, "sha256": "one", "left_out": ["broken.jpg"]})
    add_network(folder, "mine", kinds=("maps",), loss="Mine", backbone="vit", **shared)
    add_training(folder / "models", "cars/triplet/fold0", frozen_trunk=True, loss_parameters={"margin": 1})
    row = compare_row("Triplet", "ArcFace", 0, 0.5, n=4)
    row[5] = 2
    write(folder, "compare", [row])
    said = "\n".join(read(folder, *((loss, 0, name, 1.0, 0.02, None, 6, "snr", n) for name in "abcdef"
                                    for loss, n in (("Triplet", 500), ("ArcFace", 100)))).warnings)
    for part in ("1 of 1 pairs of maps share their noise, which raises",
                 "2 of 3 networks (Triplet fold 0, Mine fold 0) have no second maps",
                 "different numbers of permutations (100, 500)",
                 "100 permutations of 6 properties can't give p_holm < 0.01",
                 "few pictures: saliency maps of 6", "one fold only", "backbones alone (bninception, vit)",
                 "1 of 3 networks (Triplet fold 0) were trained with a frozen trunk: they differ",
                 "have the parameters of models/losses.csv, not tuned ones",
                 "1 pictures were left out, they could not be read (broken.jpg)",
                 "up to 2 pictures are left out of a pair",
                 "not in models/losses.csv: Mine; kept, type “other”"):
        assert part in said, part
    row[12:14] = 0.8, 0.6  # with second maps compare.py crosses them: independent noise, and a ceiling
    write(folder, "compare", [row])
    said = "\n".join(read(folder).warnings)
    assert "each was compared with the other networks' second maps" in said and "which raises" not in said


def test_what_is_missing_is_listed(tmp_path):
    write(tmp_path, "compare", [
        compare_row("Triplet", "ArcFace", 0, 0.5), compare_row("Triplet", "ArcFace", 1, 0.5),
        compare_row("None", "Triplet", 0, 0.5)])
    one = read(tmp_path, ("Triplet", 0, "hue", 1), ("Triplet", 1, "hue", 1), ("Triplet", 0, "model", 1),
               ("ArcFace", 0, "hue", 1), ("ArcFace", 0, "model", None))
    missing = [(line["table"], line["what"]) for line in one.missing]
    for line in (("nrprec", "ArcFace and model: no nr_precision"),
                 ("nrprec", "nrprec.csv has no rows of None"),
                 ("nrprec", "ArcFace: fold 1; the mean is over the others"),
                 ("compare", "ArcFace and None: no correlation"),
                 ("compare", "Triplet and None: fold 1; the mean is over the others"),
                 ("masks", "masks.csv is not there, or empty: python compare.py --masks makes it"),
                 ("ceiling", "no noise ceiling: python saliency.py … --ceiling makes the second maps"),
                 ("nrprec_tests", "ranking and classification can't be compared: two losses of each are "
                  "needed")):
        assert line in missing, line


def test_pictures_without_a_value_count_among_those_there_are_and_are_said(tmp_path):
    add_network(tmp_path, "triplet")
    for missing in (2, 1):
        row = [*nrprec_row("Triplet", 0, "hue", 1.0, queries=4), missing]
        write(tmp_path, "nrprec", [row], "missing")
        if missing == 2:
            said = read(tmp_path).warnings
            assert "pictures without a value of a property do not count in it (hue 2)" in said
    with pytest.raises(ValueError, match="counts 5 pictures for Triplet, its emb.npy has 6"):
        read(tmp_path)
