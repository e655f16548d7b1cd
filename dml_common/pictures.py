"""Which pictures and labels a data set has; how a picture becomes a network's input. Imports without torch.

    python -m dml_common.pictures verify cars196     # layout, counts, md5 of the archives
    python -m dml_common.pictures unpack ARCHIVE     # into its data set's folder, after its md5 was checked
"""
from dml_common import command

if __name__ == "__main__":  # Ctrl-C ends in one line from here on
    command.begin()

import difflib
import io
import os
import re
import shutil
import tarfile
import warnings
import zipfile
from collections import Counter
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dml_common import files
from dml_common.files import IDENTIFIERS, check_input, files_digest, pictures_sha256, read_table, read_text

# Kinds of files that are read as pictures where this Pillow knows them, and pictures of other kinds.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
OTHERS = (".cr2", ".dng", ".eps", ".exr", ".heic", ".heif", ".ico", ".jxl", ".nef", ".psd", ".svg")
SPLITS = {"train": "train", "test": "test",
          **dict.fromkeys(("val", "valid", "dev", "validation"), "validation")}
CHANNELS = {"RGB": slice(None), "BGR": slice(None, None, -1), "L": slice(1)}  # of grey all three are equal
INTERPOLATIONS = {name: Image.Resampling[name.upper()]
                  for name in ("bilinear", "bicubic", "lanczos", "nearest")}
COLOURED = ("P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # modes of a picture with colours
BOX = ("x_1", "y_1", "x_2", "y_2")
MAX_PIXELS = 500_000_000  # of one picture: 1.5 GB decoded
LARGE = 1 << 26  # pixels of a resized picture from which on only its crop is made (equal but for rounding)
Image.MAX_IMAGE_PIXELS = None  # MAX_PIXELS takes its place, with an error that names the picture
TABLES = ("props.csv", "samples.csv")  # of rendered sets: ours, and the first paper's own
# What lies where, archives with md5, where they are to be had, pictures and classes of each split.
PUBLISHED = {
    "cars196": {
        "layout": "cars_annos.mat and car_ims/000001.jpg …, or torchvision's stanford_cars/devkit, "
                  "cars_train, cars_test",
        "archives": {"car_ims.tgz": "d5c8f0aa497503f355e17dc7886c3f14",
                     "cars_annos.mat": "b407c6086d669747186bd1d764ff9dbc"},
        "source": "copies alone, for their home is gone since 2023: some are named in "
                  "https://github.com/pytorch/vision/issues/7545",
        "sizes": {"train": (8054, 98), "test": (8131, 98), "all": (16185, 196)},
    },
    "cub200": {
        "layout": "CUB_200_2011/images.txt, image_class_labels.txt and images/; perhaps segmentations/",
        "archives": {"CUB_200_2011.tgz": "97eceeb196236b17998738112f37df78",
                     "segmentations.tgz": "4d47ba1228eae64f2fa547c47bc65255"},
        "source": "https://data.caltech.edu/records/65de6-vp158, masks https://data.caltech.edu/records/"
                  "w9d68-gec53",
        "sizes": {"train": (5864, 100), "test": (5924, 100), "all": (11788, 200)},
    },
    "sop": {
        "layout": "Stanford_Online_Products/Ebay_train.txt, Ebay_test.txt and the pictures' folders",
        "archives": {"Stanford_Online_Products.zip": "7f73d41a2f44250d4779881525aea32e"},
        "source": "https://cvgl.stanford.edu/projects/lifted_struct/",
        "sizes": {"train": (59551, 11318), "test": (60502, 11316), "all": (120053, 22634)},
    },
}


class Dataset(NamedTuple):
    """The pictures of one split in the order of every array's rows."""

    name: str
    folder: Path
    split: str  # train, test or all
    paths: list  # of Path, n
    relative: list  # of str, n: the paths as listed in labels.csv and hashed by pictures_sha256
    labels: np.ndarray | None = None  # int64 (n,), indices into classes
    classes: list | None = None  # of str
    super_labels: np.ndarray | None = None  # int64 (n,), indices into super_classes
    super_classes: list | None = None  # of str
    masks: list | None = None  # of Path or None, n
    notes: list = []  # of str: what a user should know (a size that differs from the published one, …)
    properties: dict | None = None  # of a rendered set: props.csv's columns, lists of n str
    splits: np.ndarray | None = None  # str (n,): which split a published data set's picture belongs to


def listed(name, folder, relative, **more):
    return Dataset(name, folder, "all", [folder / path for path in relative], list(relative), **more)


def rows_of(dataset, rows, split):
    """The data set with these rows alone."""
    def take(values):
        if isinstance(values, np.ndarray):
            return values[rows]
        return values and [values[row] for row in rows]

    columns = {name: take(getattr(dataset, name))
               for name in ("paths", "relative", "labels", "super_labels", "masks", "splits")}
    properties = dataset.properties and {name: take(values) for name, values in dataset.properties.items()}
    return dataset._replace(split=split, properties=properties, **columns)


def open_dataset(name_or_folder, root=None, split="test"):
    """List the pictures, labels and masks of a data set.

    name_or_folder: "cars196", "cub200" or "sop"; a folder of pictures (natural order; sub-folders are
    classes, train/, val/, test/ above them splits); a rendered set (images/, props.csv, perhaps masks/); or a
    CSV file with a column path (relative to the CSV), perhaps label or class, split, x_1, y_1, x_2, y_2.
    root: folder of the published data sets (the environment's DML_DATA_ROOT, else data/ in the checkout).
    split: "train", "test" or "all", by class as in the papers; without splits all pictures are taken.
    "cars196@random" is cars196 under that name: networks trained on that split, and their results, bear it.
    Raises FileNotFoundError or ValueError, saying what was expected where.
    """
    if split not in ("train", "test", "all"):
        raise ValueError(f"split {split!r}: expected train, test or all")
    plain, at, kind = str(name_or_folder).rpartition("@")
    if at and not Path(name_or_folder).exists():
        dataset = open_dataset(plain, root, split)
        return dataset._replace(name=f"{dataset.name}@{kind}")
    if str(name_or_folder) in PUBLISHED:
        return open_published(str(name_or_folder), data_root(root), split)
    folder = Path(name_or_folder)
    if folder.suffix.lower() == ".csv":
        return open_csv(folder, split)
    if not folder.is_dir():
        near = difflib.get_close_matches(str(folder), PUBLISHED, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise FileNotFoundError(f"{folder}: no such folder; expected {', '.join(PUBLISHED)}, a folder of "
                                f"pictures or a CSV file{hint}")
    table = properties_table(folder)
    if table and ((folder / "images").is_dir() or table.name != "props.csv"):
        return open_rendered(folder, table)
    return open_folder(folder, split)


def own_pictures(dataset, config, name_or_folder, root=None, split="test"):
    """The pictures to analyse a network on: what train.py held out of this data set for it, else all.

    dataset: what open_dataset gives for the last three. config: the network's config.json, {} without one;
    its split has the rows held out ("test") and the list of pictures they count in.
    Raises ValueError when that list is another one.
    """
    names = [name.partition("@")[0] for name in (config.get("dataset") or "", dataset.name)]
    if split != "test" or names[0] != names[1] or "test" not in config.get("split", {}):
        return dataset
    whole = dataset if dataset.split == "all" else open_dataset(name_or_folder, root, "all")
    trained, n = config["split"]["pictures"], len(whole.relative)
    if trained != {"number": n, "sha256": pictures_sha256(whole.relative)}:
        raise ValueError(f"{whole.folder}: {n:,} pictures, but {config.get('loss')} was trained on another "
                         f"list of {trained['number']:,} pictures of this name, so it can't be told which "
                         "ones it has not seen; give that data set, or --split all")
    return rows_of(whole, config["split"]["test"], "held out")


def labels_of(dataset, table=None, column=None, notes=None):
    """(labels (n,) int, what they are): the data set's own, or a column of a table or of its props.csv.

    Rows are matched by name where a table has names; notes: a list that takes what is to be said of that.
    """
    if not table and dataset.labels is not None:
        own, column = {"class": dataset.labels, "super_class": dataset.super_labels}, column or "class"
        if own.get(column) is None:
            names = " and ".join(name for name in own if own[name] is not None)
            raise ValueError(f"{dataset.name} has no label {column!r}; it has {names}; or give --labels FILE")
        return own[column], column
    if not table and dataset.properties is None:
        raise ValueError(f"{dataset.name} has no labels; put each class's pictures into a folder of its own, "
                         "or give a table with a row for each picture: --labels FILE.csv --label COLUMN")
    column = column or ("class" if table else "model")
    table = table or properties_table(dataset.folder)
    values = files.read_properties(table, [column], dataset.relative, notes)[column].tolist()
    if len(values) != len(dataset.paths):
        raise ValueError(f"{table} has {len(values):,} labels, {dataset.name} {len(dataset.paths):,} "
                         "pictures; expected a row for each, in the same order")
    return numbered(values)[0], column


def data_root(root=None):
    """The folder of the published data sets."""
    return Path(root or os.environ.get("DML_DATA_ROOT") or files.ROOT / "data")


def natural_key(name):
    """Sort key that puts 2 before 10."""
    parts = re.split(r"([0-9]+)", name)
    numbers = [part.lstrip("0") for part in parts[1::2]]  # as long as they like: int() takes 4,300 digits
    parts[1::2] = [(len(number), number, part) for number, part in zip(numbers, parts[1::2])]
    return parts


@cache
def suffixes():
    """Endings of the files that are read, in lower case."""
    Image.init()
    known = [suffix for suffix, kind in Image.EXTENSION.items() if kind in FORMATS and kind in Image.OPEN]
    return tuple(sorted(known))


def list_pictures(folder, notes=None):
    """Relative paths (str, with /) of the pictures in a folder and its sub-folders, natural order.

    Links are followed, but for loops (ValueError). notes: a list that takes what is left aside.
    """
    relative, aside = [], Counter()

    def walk(here, prefix, above):
        place = os.path.realpath(here)
        if place in above:
            raise ValueError(f"{here} is a link to a folder above itself; remove it")
        for entry in os.scandir(here):
            name = prefix + entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_symlink() and not os.path.exists(entry.path):
                raise ValueError(f"{entry.path} is a link to nothing, or to itself; remove it")
            if entry.is_dir():
                walk(entry.path, f"{name}/", {*above, place})
            elif name.lower().endswith(suffixes()):
                relative.append(name)
            elif name.lower().endswith(OTHERS):
                aside[os.path.splitext(name)[1].lower()] += 1

    walk(folder, "", set())
    if aside and notes is not None:
        counts = ", ".join(f"{number:,} {suffix}" for suffix, number in sorted(aside.items()))
        notes.append(f"{folder}: pictures of other kinds are left aside: {counts}")
    return sorted(relative, key=natural_key)


def open_folder(folder, split="all"):
    """Sub-folders are classes, train/, val/, test/ above them splits; a picture beside them is left out."""
    relative = list_pictures(folder, notes := [])
    if not relative:
        raise ValueError("; ".join([f"{folder}: no picture in this folder or below; expected files ending in "
                                    f"{' '.join(suffixes())}", *notes]))
    stray = [name for name in relative if "/" not in name]
    if stray and len(stray) <= max(1, len(relative) // 100) and len(relative) > 2:
        notes.append(f"{folder}: left out, for they lie beside the classes' folders: {', '.join(stray)}")
        relative = [name for name in relative if "/" in name]
    elif stray and len(stray) < len(relative):
        notes.append(f"{folder}: its folders are taken for no classes: {len(stray):,} of {len(relative):,} "
                     f"pictures lie beside them ({files.some(stray)})")
    parts = [name.split("/") for name in relative]
    splits = [SPLITS.get(part[0]) for part in parts if len(part) > 2]
    has_splits = len(splits) == len(parts) and None not in splits
    dataset = listed(folder.resolve().name, folder, relative, notes=notes)
    if min(map(len, parts)) > 1:
        labels, classes = numbered([part[1 if has_splits else 0] for part in parts])
        dataset = dataset._replace(labels=labels, classes=classes)
    return choose(dataset, splits, split, folder) if has_splits else dataset


def choose(dataset, splits, split, source):
    """The pictures of a split; where there is no test split, validation is taken for it, and that is said."""
    if split == "all":
        return dataset
    there, notes = sorted(set(splits)), list(dataset.notes)
    if split == "test" and "test" not in there and "validation" in there:
        split = "validation"
        notes.append(f"{source}: its splits are {', '.join(there)}; validation is taken for test")
    rows = [row for row, part in enumerate(splits) if part == split]
    if not rows:
        raise ValueError(f"{source}: no row of split {split}; its splits are {', '.join(there)}")
    return rows_of(dataset, rows, split)._replace(notes=notes)


def numbered(names):
    """Class names, one for each picture -> (int64 (n,) indices, the distinct names in natural order)."""
    classes = sorted(set(names), key=natural_key)
    number = {name: i for i, name in enumerate(classes)}
    return np.array([number[name] for name in names], dtype=np.int64), classes


def properties_table(folder):
    """The path of a rendered set's table; None without one."""
    return next((folder / name for name in TABLES if (folder / name).is_file()), None)


def open_rendered(folder, path):
    """Rows in the order of the table, which names the pictures in images/ or beside it: 17 or 000017.jpg."""
    table, place = read_table(path), folder / "images" if (folder / "images").is_dir() else folder
    if "frame" in table:  # wherever it stands
        table = {"frame": table.pop("frame"), **table}
    there = list_pictures(place, notes := [])
    rows = files.rows_by_name(next(iter(table.values())), there, place)
    relative = [("images/" if place != folder else "") + there[row] for row in rows]
    if len(there) > len(rows):
        notes.append(f"{folder}: {len(there) - len(rows)} pictures are not in {path.name} and are left aside")
    masks = [folder / "masks" / f"{Path(path).stem}.png" for path in relative]
    return listed(folder.resolve().name, folder, relative, masks=existing(masks), properties=table,
                  notes=notes)


def existing(masks):
    """Masks that are not there become None; without any there is no list."""
    masks = [path if path.is_file() else None for path in masks or []]
    return masks if any(masks) else None


def refuse_absent(dataset, source):
    absent = [name for name, path in zip(dataset.relative, dataset.paths) if not path.is_file()]
    if absent:
        raise ValueError(f"{source}: {len(absent):,} of its {len(dataset.paths):,} pictures are not in "
                         f"{dataset.folder}: {files.some(absent)}")


def open_csv(path, split):
    """A table of pictures: path[,label or class][,split][,x_1,y_1,x_2,y_2], as in Open Metric Learning."""
    table, notes = read_table(path), []
    column = next((name for name in ("path", *IDENTIFIERS) if name in table), None)
    if column is None:
        raise ValueError(f"{path}: no column path; its columns are {', '.join(table)}")
    if "" in table[column]:
        raise ValueError(f"{path}: line {table[column].index('') + 2} has no {column}")
    dataset = listed(path.stem, path.parent, table[column])
    if set(BOX) <= set(table):
        dataset = boxed(dataset, zip(*(table[name] for name in BOX)), path)
    label = next((name for name in ("label", "class") if name in table), None)
    if label and (lacking := int(files.is_missing(np.array(table[label])).sum())):
        notes.append(f"{path}: {lacking:,} of its pictures have no {label}, so it is not taken for classes; "
                     "nrprec.py and pairs.py leave these pictures out when they are given this table")
    elif label:
        labels, classes = numbered(table[label])
        dataset = dataset._replace(labels=labels, classes=classes)
    if others := [name for name in table if name not in (column, label, "split", *BOX)]:
        notes.append(f"{path}: columns that are not used: {', '.join(others)}")
    dataset = dataset._replace(notes=notes)
    if "split" in table:
        splits = [SPLITS.get(part.lower(), part) for part in table["split"]]
        dataset = choose(dataset, splits, split, path)
    refuse_absent(dataset, path)
    return dataset


class Boxed(type(Path())):
    """The path of a picture of which a box counts: (left, upper, right, lower) in pixels."""

    box = None


def boxed(dataset, boxes, source):
    """The data set with a box for each picture (texts of its table), which is part of the picture's name."""
    paths, relative = [], []
    for line, (path, name, box) in enumerate(zip(dataset.paths, dataset.relative, boxes), 2):
        if not all(re.fullmatch(r"[0-9]{1,6}(\.0*)?", side) for side in box):
            raise ValueError(f"{source}: line {line}: {', '.join(BOX)} are {', '.join(box)}; expected pixels")
        paths.append(Boxed(path))
        paths[-1].box = tuple(int(float(side)) for side in box)
        relative.append(f"{name}[{','.join(map(str, paths[-1].box))}]")
    return dataset._replace(paths=paths, relative=relative)


# ---------------------------------------------------------------- published data sets
# Readers give None where their layout is not, else the Dataset of all.


def open_published(name, root, split, check=True):
    """cars196, cub200 or sop in root/name or in root itself. check: absent pictures raise ValueError."""
    read = {"cars196": read_cars, "cub200": read_cub, "sop": read_sop}[name]
    dataset = read(root / name) or read(root)
    if not dataset:
        archives = ", ".join(f"{archive} (md5 {md5})" for archive, md5 in PUBLISHED[name]["archives"].items())
        raise FileNotFoundError(f"{name} is neither in {root / name} nor in {root}: expected "
                                f"{PUBLISHED[name]['layout']}; from the archives {archives}, to be had from "
                                f"{PUBLISHED[name]['source']}; see also --data-root")
    dataset = rows_of(dataset, np.flatnonzero((dataset.splits == split) | (split == "all")), split)
    if check:
        refuse_absent(dataset, name)
    here, there = (len(dataset.paths), len(np.unique(dataset.labels))), PUBLISHED[name]["sizes"][split]
    notes = [f"{name} {split}: {here[0]:,} pictures of {here[1]:,} classes, published are {there[0]:,} of "
             f"{there[1]:,}"]
    return dataset._replace(masks=existing(dataset.masks), notes=notes if here != there else [])


def read_cars(folder):
    """Both layouts of Cars196; classes 1–98 train, 99–196 test."""
    names, field, parts = "cars_annos.mat", "relative_im_path", {"cars_annos.mat": ""}
    for place in (folder / "stanford_cars", folder):
        if (place / "devkit/cars_train_annos.mat").is_file():
            folder, names, field = place, "devkit/cars_meta.mat", "fname"
            parts = {"devkit/cars_train_annos.mat": "cars_train/",
                     "cars_test_annos_withlabels.mat": "cars_test/"}
            break
    source = folder / next(iter(parts))
    if not source.is_file():
        return None
    rows = [(prefix + name, number) for part, prefix in parts.items()
            for name, number in read_mat(folder / part, "annotations", field, "class")]
    relative, numbers = zip(*rows)
    labels, classes = from_one(source, numbers), [name for name, in read_mat(folder / names, "class_names")]
    if labels.max() >= len(classes):
        raise ValueError(f"{source}: classes up to {labels.max() + 1}, but {len(classes)} class names")
    return listed("cars196", folder, relative, labels=labels, classes=classes,
                  splits=np.where(labels < 98, "train", "test"))


def read_mat(path, variable, *fields):
    """The rows of a MATLAB file's variable, as text: these fields of a struct, or the one value of a cell."""
    from scipy.io import loadmat

    try:
        rows = loadmat(path)[variable].ravel()
        if not len(rows):
            raise ValueError("it is empty")
        cells = [[row[field] for field in fields] or [row] for row in rows]
        return [[str(np.asarray(cell).item()) for cell in row] for row in cells]
    except Exception as error:  # scipy raises many kinds for damaged files
        fields = f" with the fields {' and '.join(fields)}" if fields else ""
        raise ValueError(f"{path}: expected a MATLAB file with {variable}{fields} ({type(error).__name__}: "
                         f"{error}); download it again") from None


def read_cub(folder):
    """CUB-200-2011; classes 1–100 train, 101–200 test."""
    folder = folder / "CUB_200_2011"
    source, numbered_in = folder / "images.txt", folder / "image_class_labels.txt"
    if not source.is_file():
        return None
    ids, relative = zip(*read_lines(source, 2))
    label_ids, numbers = zip(*read_lines(numbered_in, 2))
    if ids != label_ids:
        raise ValueError(f"{numbered_in}: {len(label_ids)} labels for {len(ids)} pictures of images.txt, or "
                         "in another order; download both again")
    labels = from_one(numbered_in, numbers)
    classes = names_of(labels, [path.split("/")[0] for path in relative], 200)  # 001.Black_footed_Albatross/…
    place = next(filter(Path.is_dir, (folder / "segmentations", folder.parent / "segmentations")), folder)
    return listed("cub200", folder, ["images/" + path for path in relative], labels=labels, classes=classes,
                  masks=[place / Path(path).with_suffix(".png") for path in relative],
                  splits=np.where(labels < 100, "train", "test"))


def read_sop(folder):
    """Stanford Online Products with its own split and 12 super-classes."""
    folder = folder / "Stanford_Online_Products"
    if not (folder / "Ebay_test.txt").is_file():
        return None
    train, test = (read_lines(folder / f"Ebay_{split}.txt", 4)[1:] for split in ("train", "test"))
    if not train + test:
        raise ValueError(f"{folder}: its lists Ebay_train.txt and Ebay_test.txt name no picture")
    _, numbers, super_numbers, relative = zip(*train, *test)  # image_id class_id super_class_id path
    labels, super_labels = from_one(folder, numbers), from_one(folder, super_numbers)
    super_classes = names_of(super_labels, [path.split("/")[0].removesuffix("_final") for path in relative])
    return listed("sop", folder, relative, labels=labels, classes=names_of(labels), super_labels=super_labels,
                  super_classes=super_classes, splits=np.repeat(["train", "test"], [len(train), len(test)]))


def names_of(labels, names=(), least=0):
    """The classes' names by number: their pictures' where given, else the number counted from 1."""
    classes = [str(number) for number in range(1, max(least, labels.max() + 1) + 1)]
    for label, name in zip(labels, names):
        classes[label] = name
    return classes


def from_one(path, texts):
    """Class numbers counted from 1, as text -> int64 array counted from 0."""
    for text in texts:
        if not re.fullmatch("0*[1-9][0-9]{0,6}", text):
            raise ValueError(f"{path}: class {text[:20]!r} is no number from 1 on; download it again")
    return np.array(texts, dtype=np.int64) - 1


def read_lines(path, fields):
    """The lines of a text file, split at blanks into so many fields."""
    text = read_text(path, "it back: unpack the archive again")
    rows = [line.split(" ", fields - 1) for line in text.splitlines() if line.strip()]
    for number, row in enumerate(rows or [[]], 1):
        if len(row) != fields:
            raise ValueError(f"{path}: line {number} has not {fields} fields; download it again")
    return rows


# ---------------------------------------------------------------- a picture as a network's input
# preprocessing, a JSON-able dict:
#   resize         int: shorter side in pixels, with antialiasing · [height, width] · None
#   crop           int: side of the central square in pixels (smaller pictures are padded with black) · None
#   channels       "RGB", "BGR" or "L" (one channel of grey)
#   scale          1 or 255: values are in [0, scale] before
#   mean, std      a number for each channel, in their order: (value - mean) / std
#   interpolation  of resize: bilinear where it is not there, bicubic, lanczos, nearest
# Bit for bit torchvision's Resize, CenterCrop, ToTensor, Normalize. Or foreign.Transform, a function.


def load_pixels(path, preprocessing, draft=False):
    """A picture, resized and cropped, before normalisation: uint8 RGB (H, W, 3); as it is for a Transform.

    draft: a JPEG may be shrunk while it is decoded, to no less than the resized picture: faster, new values.
    Raises ValueError naming the picture when it can't be decoded, OSError when it can't be opened.
    """
    image = read_rgb(path, preprocessing if draft else None)
    if preprocessing.get("channels") == "L":
        image = image.convert("L").convert("RGB")
    return np.asarray(resize_and_crop(image, preprocessing))


def normalise(pixels, preprocessing):
    """uint8 RGB (..., H, W, 3) -> float32 (..., C, H, W), in the network's channel order and range."""
    if callable(preprocessing):
        values = np.stack([preprocessing(one) for one in pixels.reshape(-1, *pixels.shape[-3:])])
        return values.reshape(*pixels.shape[:-3], *values.shape[1:])
    pixels = pixels[..., CHANNELS[preprocessing["channels"]]]
    values = pixels.astype(np.float32) / np.float32(255)
    if preprocessing["scale"] != 1:
        values *= np.float32(preprocessing["scale"])
    values -= np.asarray(preprocessing["mean"], dtype=np.float32)
    values /= np.asarray(preprocessing["std"], dtype=np.float32)
    return np.ascontiguousarray(np.moveaxis(values, -1, -3))


def black_picture(preprocessing):
    """A black picture as the network's input: float32 (C, H, W)."""
    return normalise(np.zeros((*input_size(preprocessing), 3), dtype=np.uint8), preprocessing)


def input_size(preprocessing):
    """(H, W) of a network's input."""
    crop = preprocessing["crop"]
    return (crop, crop) if crop else tuple(preprocessing["resize"] or preprocessing["size"])


def part_shown(preprocessing):
    """Which part of a picture, in its middle, a network's input shows: {"of", "height", "width"}.

    Shares of the picture's "shorter side" or of "each side", or numbers of its own "pixels". None: unknown.
    """
    resize, crop = preprocessing.get("resize"), preprocessing.get("crop")
    sides = resize if isinstance(resize, list) else [resize or 1] * 2
    if not (crop or isinstance(resize, list)) or len(sides) != 2 or min(sides) <= 0:
        return None
    of = "each side" if isinstance(resize, list) else "shorter side" if resize else "pixels"
    height, width = (crop / side if crop else 1.0 for side in sides)
    return {"of": of, "height": height, "width": width}


def resized(preprocessing, side):
    """The same for inputs whose shorter side has `side` pixels: resize and crop in proportion."""
    factor = side / min(input_size(preprocessing))
    scaled = {key: np.maximum(1, np.multiply(preprocessing[key], factor).round()).astype(int).tolist()
              for key in ("resize", "crop") if preprocessing[key]}
    return {**preprocessing, **scaled}


def load_mask(path, preprocessing=None, size=None, alpha=False):
    """Read a mask through its picture's geometry, nearest neighbour: bool (H, W), True on the object.

    preprocessing: None or {} leaves it as it is. size: then averaged to (size, size): what is more than half
    object. alpha: the path is the picture's own, whose alpha channel counts; ValueError where it has none.
    The object is where alpha is, if that varies; else what is brighter than half of white, or, where nothing
    is, what is not black (masks of 0 and 1); of colours what is not black.
    """
    if preprocessing and "transform" in preprocessing:
        raise ValueError(f"which part of {path} the maps cover is not known: their network has a transform "
                         "of its own; give it a preprocessing")
    with opened(path, "a mask") as image:
        if alpha and not image.has_transparency_data:
            raise ValueError(f"it is {image.mode}, without an alpha channel; --masks alpha needs one")
        image, mode = image.crop(getattr(path, "box", None)), image.mode
        seen = np.asarray(image.convert("RGBA"))[..., 3] if image.has_transparency_data else np.zeros(1)
        colours = np.atleast_3d(np.asarray(image.convert("RGB" if mode in COLOURED else "L")))
    values = colours.max(axis=2)
    if alpha or seen.min() < seen.max():
        values = seen
    elif (colours != colours[..., :1]).any():
        values = np.where(values > (0 if mode[0] == "P" else 31), 255, 0)  # a JPEG's black is not quite black
    mask = Image.fromarray(np.uint8(255) * (values > (127 if values.max() > 127 else 0)))
    if preprocessing:
        mask = resize_and_crop(mask, preprocessing, Image.Resampling.NEAREST)
    if size:
        mask = mask.resize((size, size), Image.Resampling.BOX)
    return np.asarray(mask) > 127


def read_rgb(path, draft=None):
    """Decode a picture to a PIL RGB image as the paper's pipeline did, with PIL's `convert("RGB")`:
    grey is repeated, palettes are looked up, alpha is dropped, CMYK converted without a colour profile,
    the EXIF orientation is ignored.
    """
    with opened(path) as image:
        if box := getattr(path, "box", None):
            if not (box[0] < box[2] <= image.width and box[1] < box[3] <= image.height):
                raise ValueError(f"its box {box} is not in its {image.width} × {image.height} pixels")
            return image.convert("RGB").crop(box)
        if draft:
            image.draft(image.mode, resized_size(image.size, draft["resize"]))
        return image.convert("RGB")


@contextmanager
def opened(path, expected="a picture"):
    """The open PIL image of a file; whatever is wrong with it becomes a ValueError that names it."""
    if not isinstance(path, io.IOBase):
        check_input(path, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # palettes with transparency, odd EXIF: nothing a user can act on
        try:
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width} × {image.height} pixels, more than {MAX_PIXELS:,}")
                yield image
        except PermissionError:
            raise
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, …
            raise ValueError(f"{path}: can't be read as {expected} ({error}); replace or remove it") from None


def size_of(path):
    """(width, height) of a picture, or of the box of it that counts."""
    with opened(path) as image:
        box = getattr(path, "box", None)
        return (box[2] - box[0], box[3] - box[1]) if box else image.size


def resize_and_crop(image, preprocessing, resample=None):
    """torchvision's Resize and CenterCrop of a PIL image (the same rounding)."""
    if resample is None:
        resample = INTERPOLATIONS[preprocessing.get("interpolation", "bilinear")]
    new, crop = resized_size(image.size, preprocessing["resize"]), preprocessing["crop"]
    if not crop:
        return image.resize(new, resample) if new != image.size else image
    # torchvision rounds half to even when it crops, and pads the left less when it pads
    left, top = (round((side - crop) / 2.0) if side >= crop else -((crop - side) // 2) for side in new)
    if new[0] * new[1] > LARGE and min(new) >= crop:  # a thread-like picture: only its middle is resized
        x, y = image.width / new[0], image.height / new[1]
        box = (left * x, top * y, (left + crop) * x, (top + crop) * y)
        return image.resize((crop, crop), resample, box=box)
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


# ---------------------------------------------------------------- python -m dml_common.pictures


def verify(name, root):
    """What is there of a published data set: yields (line for people, is it as published, or not there?)."""
    for archive, md5 in PUBLISHED[name]["archives"].items():
        path = next((path for path in (root / name / archive, root / archive) if path.is_file()), None)
        if path is None:
            yield f"{archive}: not there (md5 {md5})", True
        elif files_digest([path], "md5") == md5:
            yield f"{path}: md5 as published", True
        else:
            yield f"{path}: md5 differs from {md5}: download it again", False
    for split in ("train", "test"):
        dataset = open_published(name, root, split, check=False)
        absent = sum(not path.is_file() for path in dataset.paths)
        masks = f", {sum(map(bool, dataset.masks)):,} masks" if dataset.masks else ""
        line = (f"{split} in {dataset.folder}: {len(dataset.paths):,} pictures of "
                f"{len(np.unique(dataset.labels)):,} classes{masks}, {absent:,} absent")
        yield "; ".join([line, *dataset.notes]), not (absent or dataset.notes)


def unpack(archive, folder):
    """Unpack a .tgz or .zip into the folder: whole and plain files alone, or not at all (ValueError)."""
    archive, folder = Path(archive), Path(folder)

    def plain(member, place):
        refuse(member.name, member.isreg() or member.isdir())
        return tarfile.data_filter(member, place)

    def refuse(name, is_plain):
        if not is_plain or name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{name!r} would leave the folder or is no plain file")

    if not hasattr(tarfile, "data_filter"):
        raise ValueError(f"{archive}: this Python's tarfile can't refuse what is unsafe; update Python, or "
                         "unpack by hand")
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    part = folder / f".{archive.name}.part"
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
    try:
        part.mkdir(parents=True)
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as opened:
                for item in opened.infolist():
                    refuse(item.filename, item.external_attr >> 28 != 0o12)  # a symbolic link
                opened.extractall(part)
        else:
            with tarfile.open(archive) as opened:
                opened.extractall(part, filter=plain)
        members = list(part.iterdir())
        for path in members:
            if os.path.lexists(folder / path.name):
                raise ValueError(f"{folder / path.name} is there already; remove it first")
        for path in members:
            path.rename(folder / path.name)
        made = []
    except Exception as error:  # of a damaged archive nearly everything
        raise ValueError(f"{archive}: refused, nothing was unpacked: "
                         f"{error or type(error).__name__}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
        for place in made:
            if place.is_dir():
                place.rmdir()


def main(argv=None):
    parser = command.parser("The published data sets: check them, unpack their archives.",
                            prog="python -m dml_common.pictures")
    add = parser.add_argument
    add("what", choices=["verify", "unpack"], help="layout, counts, md5 of archives; "
        "or an archive into its data set's folder, after its md5 was checked")
    add("name", metavar="NAME|ARCHIVE", help=", ".join(PUBLISHED))
    add("--data-root", metavar="DIR", help="folder of the data sets (DML_DATA_ROOT, else data/)")
    args = parser.parse_args(argv)
    root, archive = data_root(args.data_root), Path(args.name)
    if args.what == "verify" and args.name in PUBLISHED:
        as_published = True
        for line, good in verify(args.name, root):
            print(line, flush=True)
            as_published &= good
        return 0 if as_published else 1
    owner = {file: name for name, row in PUBLISHED.items() for file in row["archives"]}
    if args.what == "verify" or archive.name not in owner:
        names = PUBLISHED if args.what == "verify" else owner
        raise ValueError(f"{args.what} {args.name}: expected one of {', '.join(names)}")
    place = root / owner[archive.name]
    if files_digest([archive], "md5") != PUBLISHED[place.name]["archives"][archive.name]:
        raise ValueError(f"{archive}: its md5 is not the published one: download it again")
    unpack(archive, place)
    print(f"{archive} is unpacked in {place}")


if __name__ == "__main__":
    command.run(main, "stopped")
