"""results.py: what a results folder holds, whose a row is, and which pictures an array's rows are."""
import json

import numpy as np
import pytest
from conftest import ROOT

from dml_common import pictures as data
from dml_common import results


def add_network(folder, slug, fold=0, kinds=("emb",), n=4, **about):
    place = folder / slug / f"fold{fold}"
    place.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        np.save(place / f"{kind}.npy", np.zeros((n, 2) if kind == "emb" else (n, 2, 2), np.float32))
        (place / f"{kind}.json").write_text(json.dumps({"pictures": {"number": n, "sha256": "one"}, **about}))
    return place


def test_networks_keep_their_names_and_types(tmp_path):
    known = ("triplet", "Triplet", "b"), ("my_loss", "My <loss>", "b"), ("resnet", None, "resnet"), ("old", None, None)
    for slug, loss, backbone in known:
        place = tmp_path / slug / "fold1"
        place.mkdir(parents=True)
        if backbone:
            (place / "emb.json").write_text(json.dumps({"loss": loss, "backbone": backbone, "pictures": "strange"}))
    found = results.find_networks(tmp_path)
    wrong = results.open_arrays(found)
    types = {one["name"]: one["type"] for one in found}
    assert types == {"Triplet": "ranking", "My <loss>": "other", "resnet": "none", "old": "other"} and not wrong
    assert list(types) == ["Triplet", "My <loss>", "old", "resnet"] and all(one["number"] == 1 for one in found)
    assert [one["fold"] for one in found] == [1, 1, 1, None]  # a backbone alone has no folds
    results.check_together(found)


def test_the_type_of_an_unknown_loss_is_its_trainings(tmp_path):
    folder = tmp_path / "results" / "cars"
    add_network(folder, "mine", loss="Mine")
    for place in (tmp_path / "models" / "trained" / "cars" / "mine" / "fold0", tmp_path / "elsewhere"):
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps({"type": "classification" if place.name == "fold0" else "ranking"}))
    (tmp_path / "elsewhere" / "history.csv").write_text("epoch\n0\n")
    network, = results.find_networks(folder, tmp_path / "models")
    assert network["type"] == "classification" and network["history"] is None
    add_network(folder, "mine", loss="Mine", checkpoint=str(tmp_path / "elsewhere"))
    network, = results.find_networks(folder, tmp_path / "models")
    assert network["type"] == "ranking" and network["history"] == tmp_path / "elsewhere" / "history.csv"


def test_a_checkpoint_is_found_beside_the_results_and_where_models_lies_now(tmp_path):
    folder = tmp_path / "results" / "cars"
    add_network(folder, "mine", loss="Mine", checkpoint="models/trained/others/mine/fold0")
    for models in "moved", "models":  # beside the results first
        place = tmp_path / models / "trained" / "others" / "mine" / "fold0"
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps({"here": models}))
        assert results.find_networks(folder, tmp_path / "moved")[0]["config"] == {"here": models}


def test_orders():
    types = {"None": "none", "zebra": "other", "ape": "other", "ArcFace": "classification", "Triplet": "ranking",
             "Contrastive": "ranking", "resnet50": "none"}
    assert results.in_order(types) == ["Contrastive", "Triplet", "ArcFace", "ape", "zebra", "None", "resnet50"]


def test_data_sets_are_the_folder_or_those_in_it(tmp_path):
    add_network(tmp_path / "cars", "triplet")
    (tmp_path / "birds").mkdir()
    (tmp_path / "birds" / "nrprec.csv").write_text("a\n1\n")
    (tmp_path / "notes" / "folded").mkdir(parents=True)
    assert results.find_datasets(tmp_path) == [tmp_path / "birds", tmp_path / "cars"]
    assert results.find_datasets(tmp_path / "cars") == [tmp_path / "cars"]
    for place, said in (tmp_path / "notes", "no results; expected"), (tmp_path / "nowhere", "no such folder"):
        with pytest.raises(ValueError, match=said):
            results.find_datasets(place)


def test_arrays_that_are_half_finished_or_broken_are_told(tmp_path):
    half = add_network(tmp_path, "triplet", kinds=("emb", "maps"))
    (half / "maps.npy").rename(half / "maps.npy.part")
    cut = add_network(tmp_path, "margin") / "emb.npy"
    cut.write_bytes(cut.read_bytes()[:-4])
    other = add_network(tmp_path, "arcface", kinds=("maps",), pictures={"number": 5}) / "maps.npy"
    odd = add_network(tmp_path, "cosface", options={"pick": "all"}) / "emb.npy"
    networks = results.find_networks(tmp_path)
    wrong = dict(results.open_arrays(networks))
    assert "is half-finished" in wrong[half / "maps.npy"]
    assert set(wrong) == {half / "maps.npy", cut, other, odd} and all(what.startswith(str(path)) for path, what in wrong.items())
    assert "truncated" in wrong[cut] and "5 pictures in its JSON" in wrong[other] and "lists in its JSON" in wrong[odd]
    assert [(one["name"], one["emb"] is None, one["maps"] is None) for one in networks] == [
        ("Triplet", False, True), ("Margin", True, True), ("CosFace", True, True), ("ArcFace", True, True)]
    assert networks[0]["emb"]["array"].shape == (4, 2)


@pytest.mark.parametrize("change, said", [
    ({"pictures": {"number": 4, "sha256": "two"}}, "other lists of pictures"), ({"options": {"samples": 3}}, "samples: None, 3"),
    ({"n": 5, "pictures": {"number": 5}}, "other lists of pictures")])
def test_what_does_not_belong_together_is_named(tmp_path, change, said):
    a, b = add_network(tmp_path, "triplet"), add_network(tmp_path, "arcface", **change)
    networks = results.find_networks(tmp_path)
    results.open_arrays(networks)
    with pytest.raises(ValueError) as error:
        results.check_together(networks)
    assert all(part in str(error.value) for part in (said, f"{a / 'emb.npy'} and {b / 'emb.npy'} don't belong together"))


def test_what_may_differ(tmp_path):
    add_network(tmp_path, "triplet", options={"seed": 1, "limit": None})
    add_network(tmp_path, "arcface", options={"seed": 2, "limit": 4})
    add_network(tmp_path, "arcface", 1, pictures={"number": 4, "sha256": "the other fold's"})
    np.save(add_network(tmp_path, "margin", kinds=()) / "emb.npy", np.zeros((4, 2)))  # without a JSON
    networks = results.find_networks(tmp_path)
    assert results.open_arrays(networks) == []
    results.check_together(networks)
    add_network(tmp_path, "resnet", loss=None, backbone="resnet")  # of one picture list: with which fold does it belong?
    with pytest.raises(ValueError, match="other lists of pictures"):
        results.check_together(results.find_networks(tmp_path))


def test_which_picture_a_row_is(tmp_path):
    names = [f"{i}.png" for i in range(6)]
    (tmp_path / "labels.csv").write_text("path\n" + "\n".join(names))

    def told(rows, pictures=None, **options):
        about = {"path": tmp_path / "maps.npy", "pictures": pictures or {}, "options": options}
        return results.picture_names(about, len(rows))

    def listed(rows, **more):
        return {"sha256": data.pictures_sha256([names[row] for row in rows]), **more}

    assert told(range(6)) == names
    assert told([0, 1], listed([0, 1]), limit=2, pick=None) == names[:2]
    assert told([4, 2], listed([4, 2]), limit=None, pick=[4, 2]) == ["4.png", "2.png"]
    assert told([0, 2], listed([0, 2], left_out=["1.png"]), limit=3, pick=None) == ["0.png", "2.png"]
    assert told([0, 1], listed([2, 3]), limit=2, pick=None) is None
    assert told(range(6), listed(range(6)), limit=3) == names  # labels.csv has the pictures of these rows alone


def test_pictures_of_held_out_rows_without_labels(tmp_path):
    dataset = data.open_dataset(ROOT / "examples" / "cars")
    held_out = [dataset.relative[4], dataset.relative[1]]
    about = {"path": tmp_path / "maps.npy", "pictures": {"sha256": data.pictures_sha256(held_out)}, "options": {}}
    assert results.picture_names(about | {"rows": [4, 1]}, 2, dataset) == held_out
    assert results.picture_names(about | {"rows": [4, 10**6]}, 2, dataset) is None


def test_rows_of_a_table(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("loss,fold,value,embeddings\nTriplet,1,0.5,a\n,,nan,b\n")
    assert results.read_rows(path, "x.py", ["value"]) == [
        {"loss": "Triplet", "fold": 1, "value": 0.5, "embeddings": "a"},
        {"loss": "", "fold": None, "value": None, "embeddings": "b"}]
    assert results.read_columns(path, "x.py", [], ["value"])["fold"] == ["1", ""]
    with pytest.raises(ValueError, match="lacks the columns jsd, n; expected the table that x.py writes"):
        results.read_rows(path, "x.py", ["jsd", "value", "n"])
    path.write_text("loss,value\nTriplet,much\n")
    with pytest.raises(ValueError, match=r"row 0 .*, column value is 'much'; expected a number"):
        results.read_rows(path, "x.py", ["value"])
    with pytest.raises(ValueError, match="t.csv mixes null none and binomial"):
        results.check_alike(path, {"distance": ["snr", "snr"], "null": ["", "binomial"]})


def test_whose_a_row_is(tmp_path):
    add_network(tmp_path, "triplet", 1)
    add_network(tmp_path, "resnet", loss=None, backbone="resnet50")
    networks = results.find_networks(tmp_path)
    assert results.whose("elsewhere/triplet/fold1/emb.npy", networks) == ("Triplet", 1)
    assert results.whose("resnet/fold0/emb.npy", networks) == ("resnet50", None)
    assert results.whose("Margin / class", networks) == ("Margin / class", None)
    assert results.whose("mine.npy", networks) == ("mine.npy", None)
    assert results.whose("mine.npy", networks[:1]) == ("Triplet", None)  # there is no other
    (tmp_path / "mine.json").write_text('{"backbone": "vit"}')
    assert results.whose(str(tmp_path / "mine.npy"), networks) == ("vit", None)
