"""A network's tensors out of a file, however nested, running no code: of PyTorch's or a safetensors file."""
import io
import json
import math
import os
import re
import shutil
import warnings
from collections import Counter
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from torch import nn

from dml_common import command
from dml_common.files import check_input, each_once, some, write_file

# What ImageNet files hold beyond the embedding network: classifiers and the auxiliary head.
CLASSIFIERS = ("last_linear.", "fc.", "AuxLogits.", "network._fc.", "_fc.")
QUIET = ("", "network.", "adapted.")  # prefixes that our own files have
DEPTH = 4  # of dictionaries in one another
HEADER = 100_000_000  # bytes of a safetensors file's
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}


def read_tensors(path):
    """The dictionaries of tensors in a checkpoint, by where they stand: {"state_dict": {str: Tensor}}.

    Raises ValueError naming the file: damaged, no checkpoint, or one that would run code.
    """
    check_input(path, "a PyTorch or safetensors checkpoint")
    with open(path, "rb") as file:
        if file.read(9)[8:] == b"{":
            return {"": read_safetensors(path)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols: what matters is refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError, KeyError, …
        if "TorchScript" in str(error):
            raise ValueError(f"{path}: a TorchScript program; save its state_dict alone") from None
        code = re.search(r"(?:GLOBAL|global:?|function|instruction)\s+(?:GLOBAL )?(\w+\.[\w.]+)", str(error))
        if code:
            raise ValueError(f"{path}: refused, because loading it would run code ({code[1]}); "
                             "save the state_dict alone") from None
        raise ValueError(f"{path}: truncated, or no PyTorch checkpoint ({type(error).__name__}); download it "
                         "again") from None
    states, level = {}, {"": content}
    for _ in range(DEPTH):
        inner = {}
        for place, value in level.items():
            for key, item in value.items() if isinstance(value, dict) else ():
                if isinstance(item, torch.Tensor) and isinstance(key, str) and not item.is_meta:
                    states.setdefault(place, {})[key] = item
                elif isinstance(key, str):
                    inner[f"{place}.{key}".lstrip(".")] = item
        level = inner
    if not states and content != {}:
        raise ValueError(f"{path}: holds {type(content).__name__}, expected a state_dict: tensors by name")
    return states or {"": {}}


def read_safetensors(path):
    """{name: Tensor} of a safetensors file: the header's length (8 bytes), the header (JSON), bytes."""
    def damaged(why):
        return ValueError(f"{path}: a damaged safetensors file ({why}); download it again")

    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(HEADER, size - 8):
            raise damaged(f"a header of {length:,} bytes")
        try:
            header = json.loads(file.read(length), object_pairs_hook=each_once)
            header.pop("__metadata__", None)
            entries = []
            for name, entry in header.items():
                (begin, end), shape = entry["data_offsets"], tuple(entry["shape"])
                if not all(type(number) is int and 0 <= number for number in (begin, end, *shape)):
                    raise ValueError(f"{name} has sizes that are no whole numbers")
                entries.append((begin, end, name, entry["dtype"], shape))
            entries.sort()
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise damaged(f"its header: {error}") from None
        state, position = {}, 0
        for begin, end, name, kind, shape in entries:
            if str(kind) not in DTYPES:
                raise ValueError(f"{path}: {name} is {kind}; expected {', '.join(DTYPES)}")
            tensor = torch.empty(0, dtype=DTYPES[kind])
            if begin != position or end - begin != math.prod(shape) * tensor.element_size():
                raise damaged(f"{name} {shape} at bytes {begin:,} to {end:,}, after {position:,}")
            if end > size - 8 - length:
                raise damaged(f"{name} ends at byte {end:,} of {size - 8 - length:,}")
            if end > begin:
                tensor = torch.from_numpy(np.fromfile(file, np.uint8, end - begin)).view(tensor.dtype)
            state[name], position = tensor.reshape(shape), end
    if position != size - 8 - length:
        raise damaged(f"{size - 8 - length - position:,} bytes too many")
    return state


def read_state(path):
    """The one dictionary of tensors of a checkpoint: {str: Tensor}. ValueError where there are several."""
    states = read_tensors(path)
    if len(states) > 1:
        raise ValueError(f"{path}: tensors stand in {', '.join(map(repr, states))}; save one of them alone")
    return next(iter(states.values()))


def write_state(path, state):
    """torch.save that leaves the old file or the new one, never half of it."""
    file = io.BytesIO()
    torch.save(state, file)
    write_file(path, file.getvalue())


def write_trained(folder, state, cut):
    """A trained network's two files; embedder_best.pth is the last: with it there is a network.

    state: of nn.Sequential(trunk, embedder), or of the embedder where the trunk is frozen. cut: whether it is
    a part of the trunk, None where that is frozen; the whole one lies in trunk.pth, two folders above.
    """
    trunk, common = folder / "trunk_best.pth", folder.parent.parent / "trunk.pth"
    if cut is None:  # one file: other scripts see the same bytes and share its work
        trunk.unlink(missing_ok=True)
        try:
            os.link(common, trunk)
        except OSError:
            shutil.copyfile(common, trunk)
    else:
        whole = read_state(common) if cut else {}
        whole.update({name[2:]: value for name, value in state.items() if name.startswith("0.")})
        write_state(trunk, whole)
        state = {name[2:]: value for name, value in state.items() if name.startswith("1.")}
    write_state(folder / "embedder_best.pth", state)


@cache
def say_once(text):
    if command.my_share()[0] == 0:
        command.say(text)


# ---------------------------------------------------------------- into a network


def load_weights(module, path, heads=CLASSIFIERS):
    """Fill a network from a checkpoint: the one dictionary of tensors in it that fits, its prefix stripped.

    heads: beginnings of names that need not be the network's. What is stripped or left aside is said.
    Raises ValueError naming the tensors that do not fit, or the two places that both do.
    """
    own = {key: value for key, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    fits = []
    for place, whole in read_tensors(path).items():
        for prefix in prefixes(whole, own):
            inside = {key.removeprefix(prefix): whole[key] for key in whole if key.startswith(prefix)}
            state = {key: inside[key] for key in inside if key in own or not key.startswith(heads)}
            aside = [key for key in whole if not key.startswith(prefix)]
            fits.append((unfit(own, state), sum(key in own for key in state), place, prefix, state, aside))
    good = [fit for fit in fits if not fit[0]]
    problems, _, place, prefix, state, aside = max(good or fits, key=lambda fit: fit[1])
    if problems:
        raise ValueError(f"{path}: another architecture; {'; '.join(problems)}")
    for _, _, other, before, tensors, _ in good:
        if tensors is not state and not same_tensors(tensors, state):
            raise ValueError(f"{path}: holds the network twice, as {place}.{prefix}* and {other}.{before}*; "
                             "save the one that is meant alone")
    words = [f"the tensors are those in {place!r}"] if place else []
    words += [f"their names lose {prefix!r}"] if prefix not in QUIET else []
    words += [f"left aside: {some(aside)} ({len(aside):,})"] if aside else []
    if words:
        say_once(f"{path}: {'; '.join(words)}")
    module.load_state_dict({key: value.reshape(own[key].shape) for key, value in state.items()}, strict=False)


def prefixes(state, own):
    """What stands before the network's names in the names of these tensors; "" where nothing fits."""
    counts = Counter()
    for key in state:
        parts = key.split(".")
        for k in range(len(parts)):
            if ".".join(parts[k:]) in own:
                counts["".join(f"{part}." for part in parts[:k])] += 1
    return [prefix for prefix, _ in counts.most_common(8)] or [""]


def unfit(own, state):
    """What does not fit between a network's tensors and a file's, in words; [] where all does.

    The older file of BN-Inception has (1, C) batch-norm tensors; counts of batches need not be there.
    """
    misshapen = []
    for key in own:
        there = tuple(state[key].shape) if key in state else None
        if there not in (None, tuple(own[key].shape), (1, *own[key].shape)):
            misshapen.append(f"{key} {there} instead of {tuple(own[key].shape)}")
    problems = {
        "missing": [key for key in own if key not in state and not key.endswith("num_batches_tracked")],
        "unexpected": [key for key in state if key not in own],
        "misshapen": misshapen,
    }
    return [f"{len(keys)} {kind}: {some(keys)}" for kind, keys in problems.items() if keys]


# ---------------------------------------------------------------- an embedder


def load_embedder(path, features=None):
    """What stands behind a trunk: a linear layer, or several and batch norms, numbered as in nn.Sequential.

    A number left out between two of them is taken for a ReLU, as in pytorch-metric-learning's MLP, and said.
    The published ones have their last layer twice: net.0.* is also last_linear.*.
    Raises ValueError naming the tensors that are none of this.
    """
    groups = {}
    for key, tensor in read_state(path).items():
        name, _, part = key.rpartition(".")
        groups.setdefault(name.removeprefix("module."), {})[part] = tensor
    twin = groups.pop("last_linear", None) if len(groups) > 1 else None
    split = [name.rpartition(".") if name[-1:].isdecimal() else (name, "", "0") for name in groups]
    numbers = [int(number) if number.isdecimal() and len(number) < 4 else 0 for *_, number in split]
    if len({before for before, *_ in split}) != 1 or len(set(numbers)) < len(groups):
        raise ValueError(f"{path}: its layers are {some(list(groups))}; expected a linear layer, or several "
                         "numbered as in nn.Sequential; or give the network as package.module:factory")
    order = sorted(zip(numbers, groups))
    jumps = [after - before for before, after in pairwise([-1, *sorted(numbers)])]
    if jumps[0] > 1 or max(jumps) > 2:
        raise ValueError(f"{path}: what stands before or between {some([name for _, name in order])} has no "
                         "tensors and can't be told; give the network as package.module:factory")
    layers, width = [], features
    for jump, (_, name) in zip(jumps, order):
        layers += [nn.ReLU()] if jump == 2 else []
        layers.append(layer_of(groups[name], width, f"{path}: {name or 'layer'}"))
        width = len(groups[name].get("weight", groups[name].get("running_mean")))
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    if twin and not (linear and same_tensors(twin, linear[-1].state_dict())):
        raise ValueError(f"{path}: last_linear.* and {order[-1][1]}.* differ; expected one layer twice")
    if len(layers) == 1:
        return layers[0]
    kinds = [f"Linear to {layer.out_features}" if isinstance(layer, nn.Linear) else type(layer).__name__
             for layer in layers]
    say_once(f"{path}: the embedder is {', '.join(kinds)}")
    return nn.Sequential(*layers)


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key].float(), b[key].float()) for key in a)


def layer_of(tensors, width, where):
    """The linear layer or batch norm with these tensors by name; width: of what it is given, where known."""
    weight, mean = tensors.get("weight"), tensors.get("running_mean")
    if mean is None and weight is not None and weight.ndim == 2:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in tensors)
        given = weight.shape[1]
    elif mean is not None and mean.ndim == 1:
        layer, given = nn.BatchNorm1d(len(mean), affine=weight is not None), len(mean)
    else:
        layer, given = nn.Identity(), None
    if not tensors or unfit(layer.state_dict(), tensors) or width not in (None, given):
        shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in tensors.items()) or "nothing"
        raise ValueError(f"{where}: misshapen: {shapes}; expected a linear layer's weight "
                         f"(dimension, {width or 'features'}) and bias (dimension,), or a batch norm")
    layer.load_state_dict(tensors, strict=False)
    return layer
