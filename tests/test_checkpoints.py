"""Tensors out of files: safetensors, any nesting, embedders of several layers; what does not fit is named."""
import json
import struct

import numpy as np
import pytest
import torch
from torch import nn

from dml_common import checkpoints

KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
         "U8": "u1", "BOOL": "?"}


def packed(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape, *offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_safetensors_are_read_without_their_package(tmp_path):
    header, data, expected = {"__metadata__": {"format": "pt"}}, b"", {}
    rng = np.random.default_rng(0)
    for kind, dtype in KINDS.items():
        for shape in ((2, 3), (), (0, 4)):
            array = np.asarray(rng.integers(0, 2, shape), dtype=dtype)
            begin, data = len(data), data + array.tobytes()
            header[f"{kind}{shape}"] = entry(shape, begin, len(data), dtype=kind)
            expected[f"{kind}{shape}"] = array
    header["bf"] = entry([2], len(data), len(data) + 4, dtype="BF16")
    data += struct.pack("<HH", 0x3F80, 0xC040)  # the upper halves of float32's 1 and -3
    (tmp_path / "a.safetensors").write_bytes(packed(header, data))
    state = checkpoints.read_state(tmp_path / "a.safetensors")
    assert state.pop("bf").tolist() == [1, -3] and state.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(state[name].numpy(), array)
        assert state[name].numpy().dtype == array.dtype and state[name].shape == array.shape
    package = pytest.importorskip("safetensors.numpy", reason="the package safetensors is not installed")
    package.save_file({name: np.array(array) for name, array in expected.items()}, tmp_path / "b")
    for name, value in checkpoints.read_state(tmp_path / "b").items():
        np.testing.assert_array_equal(value.numpy(), expected[name])


@pytest.mark.parametrize("content, message", [
    (packed({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)), r"b \(2,\) at bytes 4 to 12, after"),
    (packed({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, bytes(20)), "bytes 12 to 20, after 8"),
    (packed({"a": entry([2], 0, 8)}, bytes(7)), "a ends at byte 8 of 7"),
    (packed({"a": entry([2], 0, 8)}, bytes(9)), "1 bytes too many"),
    (packed({"a": entry([3], 0, 8)}, bytes(8)), r"a \(3,\) at bytes 0 to 8"),
    (packed({"a": entry([10**30], 0, 8)}, bytes(8)), "at bytes 0 to 8"),
    *((packed({"a": value}, bytes(8)), "its header") for value in (
        entry([-2], 0, 8), entry([2.0], 0, 8), entry([True], 0, 4), entry([2], -8, 0), entry([2], 0, "8"),
        entry("2", 0, 8), entry([2], 0, 4, 8), {"dtype": "F32"}, 7, None)),
    (packed({"a": entry([2], 0, 8, dtype=[])}, bytes(8)), r"a is \[\]"),
    (packed({"a": entry([8], 0, 8, dtype="F8_E4M3")}, bytes(8)), "a is F8_E4M3; expected F64"),
    (packed(b'{"a": 1, "a": 2}'), "stands there twice"), (packed(b"{" * 10**5), "its header"),
    (packed(b"{\xff}"), "its header"), (struct.pack("<Q", 10**9) + b"{}", "a header of 1,000,000,000 b"),
    (struct.pack("<Q", 100) + b"{}", "a header of 100 bytes")])
def test_damaged_safetensors(tmp_path, content, message):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ValueError, match=f"a.pth: .*{message}") as error:
        checkpoints.read_state(tmp_path / "a.pth")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- into a network


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Sequential(nn.ReLU(), nn.Linear(3, 2)))


def named(prefix, seed=1, **more):
    return {**{prefix + key: value for key, value in network(seed).state_dict().items()}, **more}


HEAD = {"head.weight": torch.ones(1)}
NESTED = {
    "state_dict": ({"state_dict": named(""), "epoch": 3,
                    "optimizer": {"state": {0: {"step": torch.ones(1)}}, "best": torch.ones(1)}},
                   "the tensors are those in 'state_dict'"),
    "model": ({"model": named(""), "args": {"lr": 0.1}}, "those in 'model'"),
    "module": (named("module."), "their names lose 'module.'"),
    "compiled": (named("_orig_mod.module."), "'_orig_mod.module.'"),
    "Lightning": ({"state_dict": named("model.", **{"loss.proxies": torch.ones(2)}), "global_step": 1},
                  "those in 'state_dict'; their names lose 'model.'; left aside: loss.proxies (1)"),
    "DINO": ({"teacher": named("module.backbone.", **HEAD), "epoch": 1},
             "'teacher'; their names lose 'module.backbone.'; left aside: head.weight (1)"),
    "deep": ({"a": {"b": {"c": named("")}}}, "'a.b.c'"),
    "a classifier": ({**named(""), "fc.weight": torch.ones(5, 2)}, None),
    "batch norms of (1, C), no counts": ({
        key: value[None] if key.startswith("1.") else value
        for key, value in named("").items() if "batches" not in key}, None),
    "half": ({key: value.half() if value.is_floating_point() else value for key, value in named("").items()},
             None),
    "a copy": ({"model": named(""), "ema": named("")}, "'model'"),
}


@pytest.mark.parametrize("name", NESTED)
def test_the_one_dictionary_that_fits_is_found_and_said(tmp_path, capsys, name):
    content, said = NESTED[name]
    torch.save(content, tmp_path / "a.pth")
    module = network(2)
    checkpoints.load_weights(module, tmp_path / "a.pth")
    for key, value in network(1).state_dict().items():
        assert (module.state_dict()[key] - value).abs().max() <= (1e-3 if name == "half" else 0)
    lines = capsys.readouterr().err.splitlines()
    assert not lines if said is None else len(lines) == 1 and lines[0].endswith(said) or said in lines[0]
    checkpoints.load_weights(module, tmp_path / "a.pth")
    assert not capsys.readouterr().err  # once a run


@pytest.mark.parametrize("content, message", [
    ({"student": named("", 1), "teacher": named("", 2)}, r"the network twice, as student\.\* and teacher"),
    (named("a.") | named("b.", 2), r"twice, as \.a\.\* and \.b\.\*"),
    (named("", **HEAD), r"another architecture; 1 unexpected: head.weight$"),
    ({"net": {key: named("x.")[key] for key in named("x.") if "0." not in key}}, "2 missing: 0.weight"),
    ({**{key: value for key, value in named("").items() if "2." not in key}, "extra": torch.ones(1),
      "0.weight": torch.ones(3, 5)}, r"2 missing: 2.1.weight, 2.1.bias; 1 unexpected: extra; "
                                     r"1 misshapen: 0.weight \(3, 5\) instead of \(3, 4\)$"),
    ({"other": torch.ones(1)}, "8 missing: 0.weight, 0.bias, 1.weight, …; 1 unexpected: other"),
    ({}, "8 missing"), ({"epoch": 3}, "holds dict, expected a state_dict"), (3, "holds int")])
def test_what_does_not_fit_is_named(tmp_path, content, message):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"a.pth: .*{message}"):
        checkpoints.load_weights(network(0), tmp_path / "a.pth")


def test_a_torchscript_program_is_no_checkpoint(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="a.pth: a TorchScript program; save its state_dict alone"):
        checkpoints.read_state(tmp_path / "a.pth")


# ---------------------------------------------------------------- an embedder

rng = np.random.default_rng(0)
W, V, X = rng.normal(size=(3, 4)), rng.normal(size=(2, 3)), rng.normal(size=(5, 4))
B, C, MEAN, VAR, GAIN, SHIFT = (rng.random(n) + 0.5 for n in (3, 2, 3, 3, 3, 3))
FIRST, LAST = {"weight": W, "bias": B}, {"weight": V, "bias": C}
NORM = {"weight": GAIN, "bias": SHIFT, "running_mean": MEAN, "running_var": VAR, "num_batches_tracked": 7}
BARE, FLAT = {"weight": W}, {"weight": W[0]}
LINEAR = X @ W.T + B
HIDDEN = np.maximum(LINEAR, 0) @ V.T + C


def normed(x):
    return (x - MEAN) / np.sqrt(VAR + 1e-5) * GAIN + SHIFT


EMBEDDERS = {  # layers by name, what they make of X, what is said
    "linear": ({"net.0": FIRST}, LINEAR, ""),
    "published": ({"net.0": FIRST, "last_linear": FIRST}, LINEAR, ""),
    "parallel": ({"module": FIRST}, LINEAR, ""),
    "named": ({"fc": FIRST}, LINEAR, ""),
    "bias-free": ({"net.0": BARE}, X @ W.T, ""),
    "MLP": ({"net.0": FIRST, "net.2": LAST}, HIDDEN, "Linear to 3, ReLU, Linear to 2"),
    "MLP twice": ({"net.0": FIRST, "net.2": LAST, "last_linear": LAST}, HIDDEN, "ReLU, Linear to 2"),
    "neck": ({"0": FIRST, "1": NORM}, normed(LINEAR), "Linear to 3, BatchNorm1d"),
    "all": ({"0": BARE, "1": NORM, "3": LAST}, np.maximum(normed(X @ W.T), 0) @ V.T + C, "BatchNorm1d, ReLU"),
}


def save_layers(path, layers):
    torch.save({f"{name}.{key}": torch.tensor(np.asarray(value)) for name, layer in layers.items()
                for key, value in layer.items()}, path)


@pytest.mark.parametrize("name", EMBEDDERS)
def test_embedders_of_several_layers(tmp_path, capsys, name):
    layers, expected, said = EMBEDDERS[name]
    save_layers(tmp_path / "embedder_best5.pth", layers)
    module = checkpoints.load_embedder(tmp_path / "embedder_best5.pth", 4).eval()
    with torch.inference_mode():
        np.testing.assert_allclose(module(torch.tensor(X).float()).numpy(), expected, rtol=1e-4, atol=1e-5)
    lines = capsys.readouterr().err
    assert bool(lines) == bool(said) and said in lines


@pytest.mark.parametrize("layers, message", [
    ({"a": FIRST, "b": LAST}, "its layers are a, b; expected a linear layer, or several numbered"),
    ({"1": FIRST}, "what stands before or between 1 has no tensors"),
    ({"0": FIRST, "3": LAST}, "before or between 0, 3 has no tensors"),
    ({"0": FIRST, "2": FIRST}, r"2: misshapen: weight \(3, 4\), bias \(3,\); .*\(dimension, 3\)"),
    ({"0": LAST}, r"0: misshapen: .*\(dimension, 4\)"), ({"0": FLAT}, r"misshapen: weight \(4,\)"),
    ({"0": {**FIRST, "scale": B}}, "misshapen: .*scale"), ({"0": {"bias": B}}, "misshapen: bias"),
    ({"0": {key: NORM[key] for key in ("weight", "running_mean")}}, "misshapen"),
    ({"net.0": FIRST, "last_linear": {**FIRST, "bias": SHIFT}}, r"last_linear.\* and net.0.\* differ")])
def test_embedders_that_can_not_be_told(tmp_path, layers, message):
    save_layers(tmp_path / "e.pth", layers)
    with pytest.raises(ValueError, match=f"e.pth: .*{message}"):
        checkpoints.load_embedder(tmp_path / "e.pth", 4)
