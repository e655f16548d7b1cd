"""Data: which pictures and labels a data set has, how a picture becomes a network's input,
and reading arrays and property tables with errors that teach. Imports without torch.
"""
import csv
import hashlib
import os
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

# ---------------------------------------------------------------- data sets and pictures
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
IDENTIFIERS = ("frame", "image", "file", "path", "id")
MAX_PIXELS = 500_000_000  # of one picture: 1.5 GB decoded
Image.MAX_IMAGE_PIXELS = None  # MAX_PIXELS takes its place, with an error that names the picture


class Dataset(NamedTuple):
    """The pictures of one split in the order of every array's rows."""

    name: str
    folder: Path
    split: str  # train, test or all
    paths: list  # of Path, n
    relative: list  # of str, n: the paths as listed in labels.csv and hashed by pictures_sha256
    labels: np.ndarray | None  # int64 (n,), indices into classes
    classes: list | None  # of str
    super_labels: np.ndarray | None  # int64 (n,), indices into super_classes
    super_classes: list | None  # of str
    masks: list | None  # of Path or None, n
    notes: list  # of str: what a user should know (a size that differs from the published one, …)


def open_dataset(name_or_folder, root=None, split="test"):
    """List the pictures, labels and masks of a data set.

    name_or_folder: a folder of pictures (natural order; with sub-folders, the first one names the class),
    a rendered set (images/ and props.csv, perhaps masks/) or its images/.
    root: folder of the published data sets. split: "train", "test" or "all" (of a folder: always all).
    Raises FileNotFoundError or ValueError, saying what was expected where.
    """
    folder = Path(name_or_folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder and no known data set; expected a folder of pictures")
    if (folder / "props.csv").is_file() and (folder / "images").is_dir():
        return open_rendered(folder)
    return open_folder(folder)


def natural_key(name):
    """Sort key that puts 2 before 10."""
    return [(0, int(part), part) if part.isdigit() else (1, 0, part) for part in re.split(r"([0-9]+)", name)]


def list_pictures(folder):
    """Relative paths (str, with /) of the pictures in a folder and its sub-folders, natural order."""
    found = []
    for here, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(here, name).relative_to(folder).as_posix() for name in files
                  if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    return sorted(found, key=natural_key)


def open_folder(folder):
    relative = list_pictures(folder)
    if not relative:
        raise ValueError(f"{folder}: no picture in this folder or below; expected files ending in {' '.join(SUFFIXES)}")
    labels = classes = None
    if all("/" in path for path in relative):
        names = [path.split("/")[0] for path in relative]
        classes = sorted(set(names), key=natural_key)
        labels = np.array([classes.index(name) for name in names], dtype=np.int64)
    return Dataset(folder.resolve().name, folder, "all", [folder / path for path in relative], relative,
                   labels, classes, None, None, None, [])


def open_rendered(folder):
    pictures = list_pictures(folder / "images")
    by_frame = {int(Path(path).stem): path for path in pictures}
    with open(folder / "props.csv", newline="", encoding="utf-8-sig") as file:
        frames = [int(row["frame"]) for row in csv.DictReader(file)]
    relative = ["images/" + by_frame[frame] for frame in frames]
    masks = [folder / "masks" / f"{frame:06d}.png" for frame in frames]
    masks = [path if path.is_file() else None for path in masks]
    return Dataset(folder.resolve().name, folder, "all", [folder / path for path in relative], relative,
                   None, None, None, None, masks if any(masks) else None, [])


def pictures_sha256(relative):
    """SHA-256 of the list of pictures (names joined by newlines): two arrays with the same one have the same rows."""
    return hashlib.sha256(b"\n".join(os.fsencode(path) for path in relative)).hexdigest()


def load_picture(path, preprocessing):
    """Read a picture as a network's input: float32 (3, H, W).

    preprocessing (JSON-able dict):
      resize    int: shorter side in pixels, bilinear with antialiasing · [height, width] · None
      crop      int: side of the central square in pixels (smaller pictures are padded with black) · None
      channels  "RGB" or "BGR"
      scale     1 or 255: values are in [0, scale] before
      mean, std three numbers, in the order of channels: (value - mean) / std
    Bit for bit torchvision's Resize, CenterCrop, ToTensor, Normalize.
    Raises ValueError naming the picture when it can't be decoded, OSError when it can't be opened.
    """
    return normalise(load_pixels(path, preprocessing), preprocessing)


def load_pixels(path, preprocessing):
    """The same before normalisation: uint8 RGB (H, W, 3), resized and cropped."""
    return np.asarray(resize_and_crop(read_rgb(path), preprocessing))


def normalise(pixels, preprocessing):
    """uint8 RGB (..., H, W, 3) -> float32 (..., 3, H, W), in the network's channel order and range."""
    if preprocessing["channels"] == "BGR":
        pixels = pixels[..., ::-1]
    values = pixels.astype(np.float32) / np.float32(255)
    if preprocessing["scale"] != 1:
        values *= np.float32(preprocessing["scale"])
    values -= np.asarray(preprocessing["mean"], dtype=np.float32)
    values /= np.asarray(preprocessing["std"], dtype=np.float32)
    return np.ascontiguousarray(np.moveaxis(values, -1, -3))


def black_picture(preprocessing, size=None):
    """A black picture as the network's input: float32 (3, H, W); size (H, W) where there is no fixed crop."""
    height, width = size or input_size(preprocessing)
    return normalise(np.zeros((height, width, 3), dtype=np.uint8), preprocessing)


def input_size(preprocessing):
    """(H, W) of a network's input."""
    if preprocessing["crop"]:
        return preprocessing["crop"], preprocessing["crop"]
    return tuple(preprocessing["resize"])


def load_mask(path, preprocessing):
    """Read a mask through the picture's own geometry, nearest neighbour: bool (H, W), True where the object is."""
    with Image.open(path) as image:
        mask = resize_and_crop(image.convert("L"), preprocessing, Image.Resampling.NEAREST)
    return np.asarray(mask) > 127


def read_rgb(path):
    """Decode a picture to a PIL RGB image as the paper's pipeline did, with PIL's `convert("RGB")`:
    grey is repeated, palettes are looked up, alpha is dropped, CMYK converted without a colour profile,
    the EXIF orientation is ignored.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # palettes with transparency, odd EXIF: nothing a user can act on
        try:
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width} × {image.height} pixels, more than {MAX_PIXELS:,}")
                return image.convert("RGB")
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, …
            raise ValueError(f"{path}: can't be read as a picture ({error}); replace or remove it") from None


def resize_and_crop(image, preprocessing, resample=Image.Resampling.BILINEAR):
    """torchvision's Resize and CenterCrop of a PIL image (the same rounding)."""
    resize, crop = preprocessing["resize"], preprocessing["crop"]
    width, height = image.size
    if isinstance(resize, int):
        short, long = min(width, height), max(width, height)
        longer = int(resize * long / short)
        new = (resize, longer) if width <= height else (longer, resize)
    else:
        new = (resize[1], resize[0]) if resize else image.size
    if new != image.size:
        image = image.resize(new, resample)
    if crop:
        # torchvision rounds half to even when it crops, and pads the left less when it pads
        left, top = (round((side - crop) / 2.0) if side >= crop else -((crop - side) // 2) for side in image.size)
        image = image.crop((left, top, left + crop, top + crop))
    return image


# ---------------------------------------------------------------- arrays and tables on disk
