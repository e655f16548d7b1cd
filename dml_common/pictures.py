"""Which pictures and labels a data set has, and how a picture becomes a network's input. Imports without torch.

    python -m dml_common.pictures verify cars196     # layout, counts, md5 of the archives
    python -m dml_common.pictures unpack ARCHIVE     # into its data set's folder, after its md5 was checked
"""
import argparse
import difflib
import hashlib
import os
import re
import shutil
import sys
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dml_common.files import ROOT, read_properties, read_table

# ---------------------------------------------------------------- data sets and pictures
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
MAX_PIXELS = 500_000_000  # of one picture: 1.5 GB decoded
LARGE = 1 << 26  # pixels of a resized picture from which on only the cropped part is made (equal but for rounding)
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
    properties: dict | None = None  # of a rendered set: props.csv's columns, lists of n str


def open_dataset(name_or_folder, root=None, split="test"):
    """List the pictures, labels and masks of a data set.

    name_or_folder: "cars196", "cub200" or "sop"; a folder of pictures (natural order; where every picture lies in a
    sub-folder, the first one names its class); a rendered set (images/ and props.csv, perhaps masks/); or a CSV file
    with a column path (relative to the CSV), perhaps label or class, and split.
    root: folder of the published data sets (the environment variable DML_DATA_ROOT, else data/ in the checkout).
    split: "train", "test" or "all", by class as in the papers; folders have no split.
    Raises FileNotFoundError or ValueError, saying what was expected where.
    """
    if split not in ("train", "test", "all"):
        raise ValueError(f"split {split!r}: expected train, test or all")
    if str(name_or_folder) in PUBLISHED:
        return open_published(str(name_or_folder), data_root(root), split)
    folder = Path(name_or_folder)
    if folder.suffix.lower() == ".csv":
        return open_csv(folder, split)
    if not folder.is_dir():
        near = difflib.get_close_matches(str(folder), PUBLISHED, n=1)
        raise FileNotFoundError(f"{folder}: no such folder; expected {', '.join(PUBLISHED)}, a folder of pictures or a CSV file"
                                + (f"; did you mean {near[0]}?" if near else ""))
    if (folder / "props.csv").is_file() and (folder / "images").is_dir():
        return open_rendered(folder)
    return open_folder(folder)


def held_out(dataset, config):
    """The pictures that train.py held out for a network, of the whole data set (split "all").

    config: the network's config.json, whose split names the rows ("test") and the list of pictures they count in.
    Raises ValueError when that list is another one.
    """
    told, here = config["split"]["pictures"], {"number": len(dataset.relative), "sha256": pictures_sha256(dataset.relative)}
    if told != here:
        raise ValueError(f"{dataset.folder}: {here['number']:,} pictures, but {config.get('loss')} was trained on another list of "
                         f"{told['number']:,} pictures of this name, so it can't be told which ones it has not seen; "
                         "give that data set, or --split all")
    rows = config["split"]["test"]

    def take(values):
        return None if values is None else values[rows] if isinstance(values, np.ndarray) else [values[row] for row in rows]

    columns = {name: take(getattr(dataset, name)) for name in ("paths", "relative", "labels", "super_labels", "masks")}
    properties = dataset.properties and {name: take(values) for name, values in dataset.properties.items()}
    return dataset._replace(split="held out", properties=properties, **columns)


def own_pictures(dataset, config, name_or_folder, root=None, split="test"):
    """The pictures to analyse a network on: what train.py held out for it, if it was trained on this data set; else dataset.

    dataset: what open_dataset gives for the last three. config: the network's config.json, {} without one.
    """
    if split != "test" or config.get("dataset") != dataset.name or "test" not in config.get("split", {}):
        return dataset
    return held_out(dataset if dataset.split == "all" else open_dataset(name_or_folder, root, "all"), config)


def labels_of(dataset, table=None, column=None):
    """(labels (n,) int, the name of what they are): the data set's own, or a column of a table or of props.csv."""
    if not table and dataset.labels is not None:
        own, column = {"class": dataset.labels, "super_class": dataset.super_labels}, column or "class"
        if own.get(column) is None:
            names = " and ".join(name for name in own if own[name] is not None)
            raise ValueError(f"{dataset.name} has no label {column!r}; it has {names}; or give --labels FILE.csv")
        return own[column], column
    if not table and dataset.properties is None:
        raise ValueError(f"{dataset.name} has no labels; put each class's pictures into a folder of its own, or "
                         "give a table with a row for each picture: --labels FILE.csv --label COLUMN")
    column = column or ("class" if table else "model")
    table = table or dataset.folder / "props.csv"
    values = read_properties(table, [column])[column]
    if len(values) != len(dataset.paths):
        raise ValueError(f"{table} has {len(values):,} labels, {dataset.name} {len(dataset.paths):,} pictures; "
                         "expected a row for each, in the same order")
    number = {value: i for i, value in enumerate(sorted(set(values), key=natural_key))}
    return np.array([number[value] for value in values]), column


def data_root(root=None):
    """The folder of the published data sets."""
    return Path(root or os.environ.get("DML_DATA_ROOT") or ROOT / "data")


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
        number = {name: i for i, name in enumerate(classes)}
        labels = np.array([number[name] for name in names], dtype=np.int64)
    return Dataset(folder.resolve().name, folder, "all", [folder / path for path in relative], relative,
                   labels, classes, None, None, None, [])


def open_rendered(folder):
    """Rows in the order of props.csv; its first column names the picture: 17, 000017 or 000017.jpg."""
    table = read_table(folder / "props.csv")
    column = next(iter(table))
    found = list_pictures(folder / "images")
    by_name = {key: path for path in found for key in (frame_key(path), frame_key(Path(path).stem))}
    absent = [name for name in table[column] if frame_key(name) not in by_name]
    refuse_absent(absent, len(table[column]), folder / "props.csv", folder / "images")
    relative = ["images/" + by_name[frame_key(name)] for name in table[column]]
    notes = []
    if len(found) > len(relative):
        notes.append(f"{folder}: {len(found) - len(relative)} pictures are not in props.csv and are left aside")
    masks = [folder / "masks" / f"{Path(path).stem}.png" for path in relative]
    masks = [path if path.is_file() else None for path in masks]
    return Dataset(folder.resolve().name, folder, "all", [folder / path for path in relative], relative,
                   None, None, None, None, masks if any(masks) else None, notes, table)


def frame_key(name):
    """A frame's number where the name is one: 17 and 000017 are the same frame."""
    return int(name) if name.isdecimal() else name


def refuse_absent(absent, number, source, folder):
    if absent:
        raise ValueError(f"{source}: {len(absent):,} of its {number:,} pictures are not in {folder}: "
                         f"{', '.join(map(str, absent[:3]))}{', …' * (len(absent) > 3)}")


def open_csv(path, split):
    """A table of pictures: path[,label or class][,split]; Open Metric Learning's tables have these names."""
    table = read_table(path)
    column = next((name for name in ("path", "file", "image") if name in table), None)
    if column is None:
        raise ValueError(f"{path}: no column path; its columns are {', '.join(table)}")
    keep, notes, chosen = range(len(table[column])), [], "all"
    if "split" in table and split != "all":
        chosen = split
        if split == "test" and "test" not in table["split"] and "validation" in table["split"]:
            chosen = "validation"
            notes.append(f"{path}: its splits are {', '.join(sorted(set(table['split'])))}; validation is taken for test")
        keep = [row for row in keep if table["split"][row] == chosen]
        if not keep:
            raise ValueError(f"{path}: no row of split {split}; its splits are {', '.join(sorted(set(table['split'])))}")
    relative = [table[column][row] for row in keep]
    if "" in relative:
        raise ValueError(f"{path}: line {keep[relative.index('')] + 2} has no {column}")
    paths = [path.parent / name for name in relative]
    refuse_absent([name for name, file in zip(relative, paths) if not file.is_file()], len(relative), path, path.parent)
    name = next((name for name in ("label", "class") if name in table), None)
    labels = classes = None
    if name:
        classes = sorted(set(table[name]), key=natural_key)
        number = {label: i for i, label in enumerate(classes)}
        labels = np.array([number[table[name][row]] for row in keep], dtype=np.int64)
    return Dataset(path.stem, path.parent, chosen, paths, relative, labels, classes, None, None, None, notes)


# What the published data sets look like: the file that shows a folder is the right one (or one of two layouts),
# archives with md5, pictures and classes of each split.
PUBLISHED = {
    "cars196": {
        "layout": "cars_annos.mat and car_ims/000001.jpg …, or torchvision's stanford_cars/devkit, cars_train and cars_test",
        "archives": {"car_ims.tgz": "d5c8f0aa497503f355e17dc7886c3f14", "cars_annos.mat": "b407c6086d669747186bd1d764ff9dbc"},
        "sizes": {"train": (8054, 98), "test": (8131, 98), "all": (16185, 196)},
    },
    "cub200": {
        "layout": "CUB_200_2011/images.txt, image_class_labels.txt and images/; perhaps segmentations/",
        "archives": {"CUB_200_2011.tgz": "97eceeb196236b17998738112f37df78", "segmentations.tgz": "4d47ba1228eae64f2fa547c47bc65255"},
        "sizes": {"train": (5864, 100), "test": (5924, 100), "all": (11788, 200)},
    },
    "sop": {
        "layout": "Stanford_Online_Products/Ebay_train.txt, Ebay_test.txt and the pictures' folders",
        "archives": {"Stanford_Online_Products.zip": "7f73d41a2f44250d4779881525aea32e"},
        "sizes": {"train": (59551, 11318), "test": (60502, 11316), "all": (120053, 22634)},
    },
}


def open_published(name, root, split, check=True):
    """cars196, cub200 or sop in root/name or in root itself. check: absent pictures raise ValueError."""
    readers = {"cars196": read_cars, "cub200": read_cub, "sop": read_sop}
    folders = [root / name, root]
    found = next((listing for folder in folders if (listing := readers[name](folder))), None)
    if found is None:
        about = PUBLISHED[name]
        archives = ", ".join(f"{archive} (md5 {md5})" for archive, md5 in about["archives"].items())
        raise FileNotFoundError(f"{name} is neither in {folders[0]} nor in {folders[1]}: expected {about['layout']}; "
                                f"from the archives {archives}; see also --data-root")
    folder, source, relative, numbers, splits, classes, super_numbers, super_classes, masks = found
    keep = np.flatnonzero((splits == split) | (split == "all"))
    relative = [relative[row] for row in keep]
    paths = [folder / path for path in relative]
    if check:
        refuse_absent([path for path, file in zip(relative, paths) if not file.is_file()], len(paths), source, folder)
    labels, sizes = numbers[keep], PUBLISHED[name]["sizes"][split]
    here, notes = (len(keep), len(np.unique(labels))), []
    if here != sizes:
        notes.append(f"{name} {split}: {here[0]:,} pictures of {here[1]:,} classes, published are {sizes[0]:,} of {sizes[1]:,}")
    if masks:
        masks = [masks[row] if masks[row].is_file() else None for row in keep]
    return Dataset(name, folder, split, paths, relative, labels, classes,
                   None if super_numbers is None else super_numbers[keep], super_classes,
                   masks if masks and any(masks) else None, notes)


def read_cars(folder):
    """Both layouts of Cars196; classes 1–98 train, 99–196 test."""
    for stanford in (folder / "stanford_cars", folder):
        if (stanford / "devkit" / "cars_train_annos.mat").is_file():
            meta = stanford / "devkit" / "cars_meta.mat"
            parts = [(stanford / "devkit" / "cars_train_annos.mat", "cars_train/"),
                     (stanford / "cars_test_annos_withlabels.mat", "cars_test/")]
            relative, labels = [], []
            for path, prefix in parts:
                names, numbers = read_mat(path, "fname")
                relative += [prefix + name for name in names]
                labels += numbers
            return cars_listing(stanford, parts[0][0], relative, labels, read_mat_names(meta))
    path = folder / "cars_annos.mat"
    if path.is_file():
        return cars_listing(folder, path, *read_mat(path, "relative_im_path"), read_mat_names(path))
    return None


def cars_listing(folder, source, relative, labels, names):
    labels = np.array(labels, dtype=np.int64) - 1
    if labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(f"{source}: classes {labels.min() + 1} to {labels.max() + 1}, but {len(names)} class names")
    return folder, source, relative, labels, np.where(labels < 98, "train", "test"), names, None, None, None


def read_mat(path, name):
    """The file names and class numbers of a MATLAB file's `annotations`."""
    annotations = load_mat(path, "annotations")
    absent = [field for field in (name, "class") if field not in (annotations.dtype.names or ())]
    if absent:
        raise ValueError(f"{path}: annotations without the field {' and '.join(absent)}; "
                         f"it has {', '.join(annotations.dtype.names or ('none',))}")
    rows = annotations.ravel()
    try:
        return [str(row[name].item()) for row in rows], [int(row["class"].item()) for row in rows]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: annotations with other contents ({error}); download it again") from None


def read_mat_names(path):
    return [str(np.asarray(name).item()) for name in load_mat(path, "class_names").ravel()]


def load_mat(path, variable):
    from scipy.io import loadmat

    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there, but the rest of this layout is; unpack its archive again")
    try:
        content = loadmat(path)
    except Exception as error:  # scipy raises many kinds for damaged files
        raise ValueError(f"{path}: can't be read as a MATLAB file ({error}); download it again") from None
    if variable not in content:
        raise ValueError(f"{path}: no variable {variable}; it has {', '.join(key for key in content if key[0] != '_')}")
    return content[variable]


def read_cub(folder):
    """CUB-200-2011; classes 1–100 train, 101–200 test."""
    folder = folder / "CUB_200_2011"
    if not (folder / "images.txt").is_file():
        return None
    ids, relative = zip(*read_lines(folder / "images.txt", 2))
    label_ids, numbers = zip(*read_lines(folder / "image_class_labels.txt", 2))
    if ids != label_ids:
        raise ValueError(f"{folder / 'image_class_labels.txt'}: {len(label_ids)} labels for {len(ids)} pictures of images.txt, "
                         "or in another order; download both again")
    labels = from_one(folder / "image_class_labels.txt", numbers)
    classes = [str(number) for number in range(1, max(200, labels.max() + 1) + 1)]
    for label, path in zip(labels, relative):  # 001.Black_footed_Albatross/…
        classes[label] = path.split("/")[0]
    segmentations = next((place for place in (folder / "segmentations", folder.parent / "segmentations") if place.is_dir()), None)
    masks = segmentations and [segmentations / Path(path).with_suffix(".png") for path in relative]
    return (folder, folder / "images.txt", ["images/" + path for path in relative], labels,
            np.where(labels < 100, "train", "test"), classes, None, None, masks)


def read_sop(folder):
    """Stanford Online Products with its own split and 12 super-classes."""
    folder = folder / "Stanford_Online_Products"
    if not (folder / "Ebay_test.txt").is_file():
        return None
    rows, splits = [], []
    for split in ("train", "test"):
        part = read_lines(folder / f"Ebay_{split}.txt", 4)[1:]  # a header: image_id class_id super_class_id path
        rows += part
        splits += [split] * len(part)
    _, classes, super_classes, relative = zip(*rows)
    numbers, super_numbers = from_one(folder, classes), from_one(folder, super_classes)
    names = [str(number) for number in range(1, super_numbers.max() + 2)]
    for number, path in zip(super_numbers, relative):  # bicycle_final/…
        names[number] = path.split("/")[0].removesuffix("_final")
    return (folder, folder / "Ebay_test.txt", list(relative), numbers, np.array(splits),
            [str(number) for number in range(1, numbers.max() + 2)], super_numbers, names, None)


def from_one(path, texts):
    """Class numbers counted from 1, as text -> int64 array counted from 0."""
    bad = next((text for text in texts if not text.isdecimal() or int(text) < 1), None)
    if bad is not None:
        raise ValueError(f"{path}: class {bad!r} is no number from 1 on; download it again")
    return np.array(texts, dtype=np.int64) - 1


def read_lines(path, fields):
    """The lines of a text file, split at blanks into so many fields."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there, but the rest of this layout is; unpack its archive again")
    rows = [line.split(" ", fields - 1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    bad = next((number for number, row in enumerate(rows, 1) if len(row) != fields), None)
    if bad or not rows:
        raise ValueError(f"{path}: line {bad or 1} has not {fields} fields; download it again")
    return rows


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


def load_pixels(path, preprocessing, draft=False):
    """The same before normalisation: uint8 RGB (H, W, 3), resized and cropped.

    draft: a JPEG may be shrunk while it is decoded, to no less than the resized picture: faster, slightly other values.
    """
    return np.asarray(resize_and_crop(read_rgb(path, preprocessing if draft else None), preprocessing))


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


def read_rgb(path, draft=None):
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
                if draft:
                    image.draft(image.mode, resized_size(image.size, draft["resize"]))
                return image.convert("RGB")
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, …
            raise ValueError(f"{path}: can't be read as a picture ({error}); replace or remove it") from None


def resize_and_crop(image, preprocessing, resample=Image.Resampling.BILINEAR):
    """torchvision's Resize and CenterCrop of a PIL image (the same rounding)."""
    new, crop = resized_size(image.size, preprocessing["resize"]), preprocessing["crop"]
    if not crop:
        return image.resize(new, resample) if new != image.size else image
    # torchvision rounds half to even when it crops, and pads the left less when it pads
    left, top = (round((side - crop) / 2.0) if side >= crop else -((crop - side) // 2) for side in new)
    if new[0] * new[1] > LARGE and min(new) >= crop:  # a thread-like picture: only its middle is resized
        x, y = image.width / new[0], image.height / new[1]
        return image.resize((crop, crop), resample, box=(left * x, top * y, (left + crop) * x, (top + crop) * y))
    if new != image.size:
        image = image.resize(new, resample)
    return image.crop((left, top, left + crop, top + crop))


def resized_size(size, resize):
    """(width, height) after torchvision's Resize: of the shorter side, or (height, width), or None."""
    width, height = size
    if not isinstance(resize, int):
        return (resize[1], resize[0]) if resize else size
    longer = int(resize * max(size) / min(size))
    return (resize, longer) if width <= height else (longer, resize)


def verify(name, root):
    """What is there of a published data set and what is not: yields (line for people, is it as published?)."""
    for archive, md5 in PUBLISHED[name]["archives"].items():
        path = next((path for path in (root / name / archive, root / archive) if path.is_file()), None)
        if path is None:
            yield f"{archive}: not there (md5 {md5})", True
        elif file_md5(path) != md5:
            yield f"{path}: md5 differs from {md5}: download it again", False
        else:
            yield f"{path}: md5 as published; to unpack: python -m dml_common.pictures unpack {path} --data-root {root}", True
    for split in ("train", "test"):
        dataset = open_published(name, root, split, check=False)
        absent = sum(not path.is_file() for path in dataset.paths)
        masks = f", {sum(map(bool, dataset.masks)):,} masks" if dataset.masks else ""
        yield (f"{split} in {dataset.folder}: {len(dataset.paths):,} pictures of {len(np.unique(dataset.labels)):,} classes{masks}, "
               f"{absent:,} absent" + "".join(f"; {note}" for note in dataset.notes), not (absent or dataset.notes))


def file_md5(path):
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def unpack(archive, folder):
    """Unpack a .tgz or .zip; nothing is written when a member would leave the folder or is no plain file (ValueError)."""
    archive, folder = Path(archive), Path(folder)
    opened = zipfile.ZipFile(archive) if zipfile.is_zipfile(archive) else tarfile.open(archive)
    with opened:
        if isinstance(opened, zipfile.ZipFile):
            members = [(item.filename, item, item.is_dir()) for item in opened.infolist()]
            links = [item.filename for item in opened.infolist() if item.external_attr >> 16 & 0o170000 == 0o120000]
            read = opened.open
        else:
            members = [(item.name, item, item.isdir()) for item in opened.getmembers()]
            links = [item.name for item in opened.getmembers() if not (item.isdir() or item.isreg())]
            read = opened.extractfile
        home = folder.resolve()
        outside = [name for name, _, _ in members if not (home / name).resolve().is_relative_to(home)]
        if outside or links:
            raise ValueError(f"{archive}: refused: {(outside + links)[0]!r} would leave {folder} or is no plain file; nothing was written")
        for name, item, is_folder in members:
            target = home / name
            (target if is_folder else target.parent).mkdir(parents=True, exist_ok=True)
            if not is_folder:
                with read(item) as source, open(target, "wb") as copy:
                    shutil.copyfileobj(source, copy)


def main():
    parser = argparse.ArgumentParser(prog="python -m dml_common.pictures", description="The published data sets: check them, unpack their archives.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("verify", help="layout, numbers of pictures and classes, md5 of the archives that are there")
    check.add_argument("name", choices=PUBLISHED)
    extract = commands.add_parser("unpack", help="unpack one archive into its data set's folder, after its md5 was checked")
    extract.add_argument("archive", type=Path)
    for command in (parser, check, extract):
        command.error = fail
        if command is not parser:
            command.add_argument("--data-root", metavar="DIR", help="folder of the data sets (DML_DATA_ROOT, else data/)")
    args = parser.parse_args()
    root = data_root(args.data_root)
    if args.command == "verify":
        good = True
        for line, as_published in verify(args.name, root):
            print(line)
            good &= as_published
        sys.exit(0 if good else 1)
    name = next((name for name, about in PUBLISHED.items() if args.archive.name in about["archives"]), None)
    if name is None:
        raise ValueError(f"{args.archive}: expected one of {', '.join(a for p in PUBLISHED.values() for a in p['archives'])}")
    if file_md5(args.archive) != PUBLISHED[name]["archives"][args.archive.name]:
        raise ValueError(f"{args.archive}: its md5 is not the published one: download it again")
    unpack(args.archive, root / name)
    print(f"{args.archive} is unpacked in {root / name}")


def fail(message):
    print("pictures:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, tarfile.TarError, zipfile.BadZipFile) as error:
        fail(error)
