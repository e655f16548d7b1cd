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
    if new != image.size:
        image = image.resize(new, resample)
    if crop:
        # torchvision rounds half to even when it crops, and pads the left less when it pads
        left, top = (round((side - crop) / 2.0) if side >= crop else -((crop - side) // 2) for side in image.size)
        image = image.crop((left, top, left + crop, top + crop))
    return image


def resized_size(size, resize):
    """(width, height) after torchvision's Resize: of the shorter side, or (height, width), or None."""
    width, height = size
    if not isinstance(resize, int):
        return (resize[1], resize[0]) if resize else size
    longer = int(resize * max(size) / min(size))
    return (resize, longer) if width <= height else (longer, resize)


# ---------------------------------------------------------------- arrays and tables on disk
import csv
import io
import json
import os
import tempfile
from pathlib import Path

import numpy as np

IDENTIFIERS = ("frame", "image", "file", "path", "id")  # a first column of this name is no property


def read_array(path):
    """A .npy array as it lies on disk, memory-mapped and read-only. Pickled objects are never loaded.

    Raises OSError or ValueError naming the file, what it is and what to do.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the .npy file in it")
    if not path.exists():
        raise ValueError(f"{path} does not exist; give an array saved with numpy.save")
    with open(path, "rb") as file:
        magic = file.read(6)
    if magic[:4] == b"PK\x03\x04":
        raise ValueError(f"{path} is a zip archive (.npz?), not one .npy array; save the array with numpy.save")
    if magic != b"\x93NUMPY":
        raise ValueError(f"{path} is not a .npy file; save the array with numpy.save")
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        if "object" in str(error).lower():
            raise ValueError(f"{path} holds Python objects, which could run code; save a plain float32 array") from None
        if path.stat().st_size and "greater than file size" not in str(error) and "mmap" not in str(error):
            raise ValueError(f"{path} has a broken .npy header ({error}); save it again") from None
        raise ValueError(f"{path} is truncated: its header promises more than {path.stat().st_size:,} bytes; "
                         "make it again") from None
    except (EOFError, OSError, SyntaxError) as error:
        raise ValueError(f"{path} can't be read as .npy ({error}); make it again") from None


def read_embeddings(path):
    """Embeddings from a .npy file -> float32 array (n, m), C order, n >= 2, all finite.

    Integers, float16 and float64 are converted. Raises ValueError naming the file, the row and what to do.
    """
    array = read_array(path)
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{path} has dtype {array.dtype}; expected real numbers (float32)")
    if array.ndim != 2:
        raise ValueError(f"{path} has shape {array.shape}; expected two dimensions: (pictures, dimension)")
    if array.size == 0:
        raise ValueError(f"{path} is empty: shape {array.shape}")
    if len(array) < 2:
        raise ValueError(f"{path} has one row; neighbours need at least two embeddings")
    result = np.empty(array.shape, np.float32)
    step = max(1, (1 << 22) // array.shape[1])
    for start in range(0, len(array), step):
        with np.errstate(over="ignore"):
            result[start:start + step] = array[start:start + step]
        bad = ~np.isfinite(result[start:start + step]).all(1)
        if bad.any():
            row = start + int(bad.argmax())
            column = int((~np.isfinite(result[row])).argmax())
            raise ValueError(f"{path}: row {row}, column {column} is {array[row, column]}; "
                             "expected finite numbers within float32's range (remove or mend that picture)")
    return result


def read_sidecar(path):
    """The JSON beside an array (emb.json of emb.npy) as a dictionary; {} where there is none or it is no JSON object."""
    try:
        with open(Path(path).with_suffix(".json"), encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_table(path):
    """A CSV file with a header -> {column name: list of str}, in the file's order, every list equally long.

    A byte-order mark and CRLF are accepted. Raises ValueError naming file, line and column, and what to do.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give a CSV file with a header line")
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a CSV file with a header line")
    raw = path.read_bytes()
    if b"\0" in raw:
        line = raw[:raw.index(b"\0")].count(b"\n") + 1
        raise ValueError(f"{path}: line {line} has a NUL byte; save the table as plain UTF-8 CSV")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[:error.start].count(b"\n") + 1
        raise ValueError(f"{path}: line {line} is not UTF-8 (byte 0x{raw[error.start]:02x}); "
                         "save the table as UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        header = [name.strip() for name in next(reader, [])]
        if not any(header):
            raise ValueError(f"{path} is empty; expected a header line and one row for each picture")
        check_header(path, header)
        columns = [[] for _ in header]
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(f"{path}: line {reader.line_num} has {len(row)} fields, "
                                 f"the header {len(header)}; mend that line")
            for column, value in zip(columns, row):
                column.append(value.strip())
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num}: {error}; save the table as plain CSV") from None
    if not columns[0]:
        raise ValueError(f"{path} has a header and no rows; expected one row for each picture")
    return dict(zip(header, columns))


def check_header(path, header):
    """Raise ValueError unless the CSV header has distinct, non-empty names that are not numbers."""
    for number, name in enumerate(header, 1):
        if not name:
            raise ValueError(f"{path}: column {number} of the header has no name; name it or remove it")
        if header.index(name) != number - 1:
            raise ValueError(f"{path}: two columns are named {name!r}; rename one")
    if all(is_number(name) for name in header):
        raise ValueError(f"{path}: the first line ({','.join(header[:4])}…) is data; expected a header with column names")


def is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


def read_properties(path, names=None):
    """The properties of a props.csv or labels.csv -> {name: str array (n,)}; the identifying first column is left out.

    names: only these columns. Raises ValueError for unknown columns, missing values and tables without a property.
    """
    table = read_table(path)
    first = next(iter(table))
    properties = [name for name in table if name != first or first.lower() not in IDENTIFIERS]
    if not properties:
        raise ValueError(f"{path} has only the identifying column {first!r}; expected at least one property column")
    for name in names or []:
        if name not in properties:
            raise ValueError(f"{path} has no property {name!r}; it has {', '.join(properties)}")
    chosen = list(dict.fromkeys(names)) if names else properties
    for name in chosen:
        if "" in table[name]:
            raise ValueError(f"{path}: row {table[name].index('') + 1}, column {name!r} has no value; "
                             "fill it in, remove the picture or leave the column out (--properties)")
    return {name: np.array(table[name]) for name in chosen}


def check_output(path):
    """Raise ValueError unless a file can be written at this path; called before the work, not after it."""
    folder = Path(path).resolve().parent
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file")
    if not folder.is_dir():
        raise ValueError(f"the folder {folder} does not exist; make it first")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"the folder {folder} can't be written to; choose another")


def write_file(path, content):
    """Write bytes under a temporary name in the same folder, flush, rename: never a half-written file."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.resolve().parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp's 0600 is for secrets
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_table(path, header, rows):
    """Write a CSV file whole or not at all. Fields that do not apply (None) are empty; floats keep every digit."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(["" if value is None else value for value in row] for row in rows)
    write_file(path, text.getvalue().encode("utf-8"))
