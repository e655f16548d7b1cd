"""Networks by their names in other packages, without their classifiers, with the preprocessing they have.

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

from torch import nn

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
    said = sys.stderr if sys.stderr.isatty() else io.StringIO()  # progress of a download: for a terminal
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            return BUILDERS[kind](module, model, pretrained, weights)
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
    more = {"transform_input": True} if model in ("googlenet", "inception_v3") and not pretrained else {}
    if more:
        more["init_weights"] = False
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


BUILDERS = {"timm": timm, "torchvision": torchvision, "hf": transformers}
