"""Arrays and tables in and out, joined by name, with errors that teach. Imports NumPy alone."""
import csv
import io
import json
import os
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent  # of the checkout: models/, data/, published/ and templates/ lie there
IDENTIFIERS = ("frame", "image", "file", "path", "id")  # a first column of this name is no property


def losses():
    """models/losses.csv: list of dicts name, slug, year, type, distance, for each data set the published folder, and what
    train.py takes from pytorch-metric-learning: class, parameters, miner."""
    with open(ROOT / "models" / "losses.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


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


def read_embeddings(path, table=None, rows=None):
    """Embeddings from a .npy file -> float32 array (n, m), C order, n >= 2, all finite.

    Integers, float16 and float64 are converted. Raises ValueError naming the file, the row and what to do; also where
    there are not as many as the rows of their table.
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
    if rows not in (None, len(array)):
        raise ValueError(f"{path} has {len(array):,} embeddings, {table} {rows:,} rows; both must list the same pictures "
                         "in the same order")
    result = np.empty(array.shape, np.float32)
    step = max(1, (1 << 22) // array.shape[1])
    for start in range(0, len(array), step):
        with np.errstate(over="ignore"):
            result[start:start + step] = array[start:start + step]
        bad = ~np.isfinite(result[start:start + step]).all(1)
        if bad.any():
            row = start + int(bad.argmax())
            column = int((~np.isfinite(result[row])).argmax())
            raise ValueError(f"{path}: row {row}, column {column} (counting from 0) is {array[row, column]}; "
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
    if raw.startswith(b"\x93NUMPY"):
        raise ValueError(f"{path} is a .npy array; a table is expected here (the CSV file comes last)")
    if b"\0" in raw:
        line = raw[:raw.index(b"\0")].count(b"\n") + 1
        raise ValueError(f"{path}: line {line} has a NUL byte; save the table as plain UTF-8 CSV")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[:error.start].count(b"\n") + 1
        raise ValueError(f"{path}: line {line} is not UTF-8 (byte 0x{raw[error.start]:02x}); "
                         "save the table as UTF-8") from None
    columns, line = [], 0
    reader = csv.reader(io.StringIO(text.rstrip(), newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if not any(header):
            raise ValueError(f"{path} is empty; expected a header line and one row for each picture")
        check_header(path, header)
        columns, line = [[] for _ in header], reader.line_num
        for row in reader:
            begins, line = line + 1, reader.line_num
            row = row or [""] * (len(header) == 1)         # a blank line is a missing value of a single column
            if len(header) > 1 and not "".join(row).strip() and len(row) < 2:
                continue
            if len(row) != len(header):
                raise ValueError(f"{path}: line {begins} has {len(row)} field{'s' * (len(row) != 1)}, "
                                 f"the header {len(header)}; mend that line")
            for column, value in zip(columns, row):
                column.append(value.strip())
    except csv.Error as error:
        raise ValueError(f"{path}: line {line + 1 if columns else 1}: {error}; mend the quotes or save the table as "
                         "plain CSV") from None
    if not columns[0]:
        raise ValueError(f"{path} has a header and no rows; expected one row for each picture")
    return dict(zip(header, columns))


def table_beside(array, column=None):
    """The table of an array's pictures that embed.py wrote: beside it, or in the data set's folder of results.

    column: one that the table must have; without one it is props.csv that is looked for, else labels.csv too.
    Raises FileNotFoundError naming the places.
    """
    array, names = Path(array), ["labels.csv", "props.csv"] if column else ["props.csv"]
    places = [Path(f"{array.with_suffix('')}.{name}") for name in names]
    places += [folder / name for folder in (array.parent, array.parent.parent.parent) for name in names]
    for place in places:
        if place.is_file() and (column is None or column in read_table(place)):
            return place
    raise FileNotFoundError(f"{array}: no table of its pictures{f' with a column {column}' if column else ''} "
                            f"({', '.join(map(str, places[len(names):2 * len(names)]))}, …); name one behind the embeddings")


def arrays_and_tables(paths, column=None):
    """What a command line names, EMB.npy … [TABLE.csv] -> (arrays, the table of each): one for all, or that beside it.

    column: as of table_beside(). Raises ValueError where a table stands before an array.
    """
    arrays, tables = list(paths), None
    if len(arrays) > 1 and not arrays[-1].endswith(".npy"):
        tables = [arrays.pop()] * len(arrays)
    for path in arrays:
        if path.endswith(".csv"):
            raise ValueError(f"{path} stands before an array; the table comes last, one for all")
    return arrays, tables or [table_beside(array, column) for array in arrays]


def check_header(path, header):
    """Raise ValueError unless the CSV header has distinct, non-empty names that are not numbers."""
    for number, name in enumerate(header, 1):
        if not name:
            raise ValueError(f"{path}: column {number} of the header has no name; name it or remove it")
        if header.index(name) != number - 1:
            raise ValueError(f"{path}: two columns are named {name!r}; rename one")
    if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
        raise ValueError(f"{path}: the header {header[0]!r} has no comma; save the table with commas between the columns")
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
            raise ValueError(f"{path}: row {table[name].index('')} (counting from 0), column {name!r} has no value; "
                             "fill it in, remove the picture or leave the column out (--properties)")
    return {name: np.array(table[name]) for name in chosen}


def check_output(path, inputs=()):
    """Raise ValueError unless a file can be written at this path, over none of the inputs; called before the work."""
    folder = Path(path).resolve().parent
    if not str(path):
        raise ValueError("the output has no name; give a file's")
    for other in inputs:
        if Path(path).resolve() == Path(other).resolve():
            raise ValueError(f"{path} is an input, or another output: choose another name")
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file")
    if not folder.is_dir():
        raise ValueError(f"the folder {folder} does not exist; make it first")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"the folder {folder} can't be written to; choose another")


def write_file(path, content):
    """Write bytes under a temporary name in the same folder, flush, rename: never a half-written file."""
    path = Path(path).resolve()  # the file that a link names, not the link
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp's 0600 is for secrets
        os.replace(temporary, path)
    except BaseException as error:
        if temporary:
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise OSError(f"{path} can't be written ({error.strerror}); free some space or choose another place") from None
        raise


def write_table(path, header, rows):
    """Write a CSV file whole or not at all. Fields that do not apply (None) are empty; floats keep every digit."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(["" if value is None else value for value in row] for row in rows)
    write_file(path, text.getvalue().encode("utf-8", "surrogateescape"))  # a file name may be any bytes
