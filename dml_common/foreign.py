"""Networks of other people: names in their packages, what they take of a picture, where their embedding is.

timm:NAME, torchvision:NAME, hf:OWNER/NAME (or hf:FOLDER) of the package transformers. Only these packages
download, pretrained weights where none are given; code from the hub is never run (trust_remote_code is off).
"""
import contextlib
import difflib
import importlib
import io
import logging
import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from dml_common.pictures import input_size, normalise

INSTALL = {"timm": "timm", "torchvision": "torchvision", "hf": "transformers"}
RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
# Steps of a transformers' image processor that are understood, or change nothing for one RGB picture.
STEPS = {"do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb",
         "do_flip_channel_order"}


def is_package(name):
    return name.partition(":")[0] in INSTALL


def build(name, pretrained=True, weights=None):
    """A package's network, its attributes preprocessing and heads (beginnings of the classifier's tensors).

    pretrained: with the package's weights, downloaded where they are not here. weights: the name of a file
    that will be loaded instead; where torchvision published it, that file's preprocessing counts.
    Raises ValueError naming what to install, an unknown name, or what the package says.
    """
    kind, _, model = name.partition(":")
    package = INSTALL[kind]
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"--model {name} needs the package {package}: pip install {package} ({error})"
                         ) from None
    for library in ("huggingface_hub", "timm", "transformers"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # what goes wrong is said below, in one line
    builder = {"timm": timm, "torchvision": torchvision, "hf": transformers}[kind]
    said = sys.stderr if sys.stderr.isatty() else io.StringIO()  # progress of a download: for a terminal
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return builder(module, model, pretrained, weights)
    except Refused as error:
        raise ValueError(f"--model {name}: {error}") from None
    except Exception as error:  # of a download or a broken file, many kinds
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(f"--model {name}: {package} can't give it ({type(error).__name__}: {reason}); is "
                         "the name right? What lies on disk: --weights FILE, or hf:FOLDER") from None


class Refused(ValueError):
    """What we say of a name, not the package."""


def known(model, names):
    if model not in names:
        near = difflib.get_close_matches(model, names, n=3)
        raise Refused(f"unknown there{'; did you mean ' if near else ''}{' or '.join(near)}")


def torchvision(package, model, pretrained, weights):
    models = package.models
    known(model, models.list_models(module=models))
    versions = models.get_model_weights(model)
    published = [one for one in versions if weights and one.url.endswith(f"/{Path(weights).name}")]
    more = {}
    if model in ("googlenet", "inception_v3") and not pretrained:  # as their published weights want it
        more = {"transform_input": True, "init_weights": False}
    network = models.get_model(model, weights=versions.DEFAULT if pretrained else None, **more)
    head = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if not head:
        raise Refused("its classifier is no linear layer that could be taken off; give a factory")
    parent, _, child = head[-1].rpartition(".")
    setattr(network.get_submodule(parent), child, nn.Identity())
    made = (published or [versions.DEFAULT])[0].transforms()
    network.preprocessing = {"resize": made.resize_size[0], "crop": made.crop_size[0], "mean": made.mean,
                             "std": made.std, "interpolation": made.interpolation.value}
    network.heads = (f"{head[-1]}.",)
    return network


def timm(package, model, pretrained, weights):
    known(model.partition(".")[0], package.list_models())
    network = package.create_model(model, pretrained=pretrained, num_classes=0)
    made = package.data.resolve_model_data_config(network)
    channels, height, width = made["input_size"]
    if made["crop_mode"] not in ("center", "squash") or height != width:
        raise Refused(f"its preprocessing is not understood ({made['crop_mode']}, {height} × {width}); give "
                      "a factory")
    resize = math.floor(height / made["crop_pct"])
    network.preprocessing = {
        "channels": "L" if channels == 1 else "RGB", "crop": height,
        "resize": [resize, resize] if made["crop_mode"] == "squash" else resize,
        **{key: made[key] for key in ("mean", "std", "interpolation")}}
    head = network.pretrained_cfg.get("classifier") or ()
    network.heads = tuple(f"{name}." for name in ([head] if isinstance(head, str) else head))
    return network


def transformers(package, model, pretrained, weights):
    package.utils.logging.disable_progress_bar()
    settings = {"trust_remote_code": False}
    processor = package.AutoImageProcessor.from_pretrained(model, **settings).to_dict()
    if pretrained:
        network, missing = pretrained_model(package, model, settings)
        if missing and all("pooler" in key for key in missing):  # many were published without one
            network, missing = pretrained_model(package, model, {**settings, "add_pooling_layer": False})
        if missing:
            raise Refused(f"its weights lack {', '.join(sorted(missing)[:3])} …; they would be random")
    else:
        config = package.AutoConfig.from_pretrained(model, **settings)
        network = package.AutoModel.from_config(config, **settings)
    if network.main_input_name != "pixel_values" and not hasattr(network, "get_image_features"):
        raise Refused(f"it takes {network.main_input_name}; expected a network of pictures")
    network.preprocessing, network.heads = of_processor(processor), ("classifier.", "lm_head.")
    return network


def pretrained_model(package, model, settings):
    """(network, names of tensors that its file lacks)."""
    network, report = package.AutoModel.from_pretrained(model, output_loading_info=True, **settings)
    return network, set(report["missing_keys"])


def of_processor(made):
    """Our preprocessing of a transformers' image processor, as a dictionary."""
    size, crop = made.get("size") or {}, made.get("crop_size") or {}
    crop = crop.get("height") if isinstance(crop, dict) else crop
    does = {key for key, value in made.items() if key.startswith("do_") and value}
    resize, crop = size.get("shortest_edge"), crop if "do_center_crop" in does else None
    if "height" in size:
        resize = [size["height"], size["width"]]
    elif made.get("crop_pct") and not crop:  # of ConvNeXt: a share of the crop, but not of large pictures
        resize, crop = (int(resize / made["crop_pct"]), resize) if resize < 384 else ([resize, resize], None)
    factor = made.get("rescale_factor", 1 / 255) if "do_rescale" in does else 1
    if does - STEPS or not math.isclose(factor, 1 / 255, rel_tol=1e-6) and factor != 1:
        raise Refused(f"its preprocessing is not understood ({', '.join(sorted(does - STEPS)) or factor})")
    mean, std = (made["image_mean"], made["image_std"]) if "do_normalize" in does else ([0] * 3, [1] * 3)
    return {"channels": "BGR" if "do_flip_channel_order" in does else "RGB",
            "scale": 255 if factor == 1 else 1, "mean": mean, "std": std, "crop": crop,
            "resize": resize if "do_resize" in does else None,
            "interpolation": RESAMPLING.get(made.get("resample"), "bilinear")}


# ---------------------------------------------------------------- what a network takes and gives

PREFERRED = ("pooler_output", "image_embeds")  # of what it gives by name: its embedding


class Transform(dict):
    """A preprocessing that is a factory's own function: PIL RGB picture -> float tensor (C, H, W).

    As a dict: transform (the factory's name), size [H, W]. Raises ValueError where the function does not fit.
    """

    def __init__(self, name, function):
        super().__init__(transform=name, resize=None, crop=None)
        self.function = function
        noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
        first, second = self(noise), self(noise)
        if not np.array_equal(first, second):
            raise ValueError(f"the transform of {name} gives another tensor each time: what is random in it "
                             "must go")
        self["size"] = list(first.shape[1:])

    def __call__(self, pixels):
        """uint8 (H, W, 3) -> float32 (C, H, W)."""
        try:
            values = np.asarray(self.function(Image.fromarray(pixels)), dtype=np.float32)
        except Exception as error:  # whatever the user's function raises
            raise ValueError(f"the transform of {self['transform']} fails on a picture {pixels.shape}: "
                             f"{type(error).__name__}: {error}") from None
        size = self.get("size", list(values.shape[1:]))
        if values.ndim != 3 or list(values.shape[1:]) != size or not np.isfinite(values).all():
            raise ValueError(f"the transform of {self['transform']} gives {values.shape} of a picture "
                             f"{pixels.shape}; expected finite numbers, (channels, height, width), always "
                             "the same size")
        return values


class Adapted(nn.Module):
    """A network that gives more than (B, m), writes into its input, or has a method for pictures."""

    def __init__(self, network, output=None):
        super().__init__()
        self.adapted, self.output = network, output

    def forward(self, pictures):
        call = getattr(self.adapted, "get_image_features", self.adapted)  # of a transformers' pair of towers
        return embedding_of(call(pictures.clone()), self.output)


def embedding_of(output, key=None):
    """The embeddings (B, m) in what a network gives: a tensor (B, m) or (B, m, 1, 1), a dict or a tuple.

    Of several: pooler_output or image_embeds, else the only one of these shapes, else key says which; it may
    go on with dots: last_hidden_state.0 is the first token of (B, T, m). Raises ValueError, never guesses.
    """
    for part in key.split(".") if key else ():
        try:
            if isinstance(output, torch.Tensor):
                output = output[:, int(part)]
            else:
                output = of_names(output)[part]
        except (KeyError, IndexError, ValueError):
            raise ValueError(f"--output {key}: {part!r} is not there; the network gives {shown(output)}"
                             ) from None
    if not isinstance(output, torch.Tensor):
        there = of_names(output)
        fit = [name for name in PREFERRED if there.get(name) is not None] or [
            name for name, value in there.items() if is_embedding(value)]
        if len(fit) != 1:
            raise ValueError(f"the network gives {shown(output)}; which is the embedding (pictures, "
                             "dimension)? Say so with --output KEY, or in a factory of yours")
        output = there[fit[0]]
    if not is_embedding(output):
        raise ValueError(f"the network gives {shown(output)}; expected a tensor (pictures, dimension); "
                         "--output KEY takes another one, or last_hidden_state.0 the first token")
    return output.flatten(1) if output.ndim > 2 else output


def is_embedding(value):
    return isinstance(value, torch.Tensor) and (value.ndim == 2 or value.shape[2:] == (1, 1))


def of_names(output):
    """{name or number: value} of a dict, a named tuple, a tuple or a list; {} of anything else."""
    if isinstance(output, dict):
        return dict(output)
    if isinstance(output, (tuple, list)):
        names = getattr(output, "_fields", map(str, range(len(output))))
        return dict(zip(names, output))
    return {}


def shown(output):
    """What a network gives, for people."""
    if isinstance(output, torch.Tensor):
        return str(tuple(output.shape))
    parts = [f"{name} {shown(value)}" for name, value in of_names(output).items()]
    return ", ".join(parts) or type(output).__name__


def adapted(module, settings, name, output=None):
    """The module where it gives (B, m) and leaves its input alone, else it in Adapted. Tried on two pictures.

    Raises ValueError where it fails on them, where its embedding can't be told, or is another each time.
    """
    noise = np.random.default_rng(0).integers(0, 256, (*input_size(settings), 3), dtype=np.uint8)
    pictures = torch.from_numpy(normalise(np.stack([np.zeros_like(noise), noise]), settings))
    given, module = pictures.clone(), module.cpu().eval()
    call = getattr(module, "get_image_features", module)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            made, again = call(given), call(pictures.clone())
    except Exception as error:  # whatever a factory's network does with pictures
        raise ValueError(f"{name} fails on 2 pictures {tuple(pictures.shape[1:])}: "
                         f"{type(error).__name__}: {error} (another preprocessing?)") from None
    try:
        first, second = embedding_of(made, output), embedding_of(again, output)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    slack = 1e-4 * float(first.float().nan_to_num(0, 0, 0).norm())  # float: of whole numbers, too
    if not torch.allclose(first.float(), second.float(), rtol=1e-3, atol=slack, equal_nan=True):
        raise ValueError(f"{name} gives another embedding each time: does dropout stay on in eval()?")
    plain = made is first and torch.equal(given, pictures) and call is module and not output
    return module if plain else Adapted(module, output)
