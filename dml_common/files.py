"""Arrays and tables in and out, joined by name, with errors that teach. Imports NumPy alone."""
import contextlib
import csv
import fcntl
import glob
import hashlib
import io
import json
import os
import re
import stat
from collections import Counter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent  # models/, data/, published/, templates/ lie there
# A first column of this name has the pictures' names, or is an index; it is no property.
IDENTIFIERS = ("frame", "image", "file", "path", "id", "index", "filename", "file_name", "name", "key")
MISSING = ("", "nan", "NA", "N/A", "null")  # a picture without a value; in columns of numbers None too
MOST_COLUMNS = 10_000  # of a table: one with more is likely to be turned by 90 degrees
ARRAY, TABLE = "a .npy file saved with numpy.save", "a CSV file with a header line"


def losses():
    """models/losses.csv: dicts of name, slug, year, type, distance, each data set's published folder, and
    what train.py takes from pytorch-metric-learning: class, parameters, miner."""
    path = ROOT / "models" / "losses.csv"
    if not path.is_file():
        raise ValueError(f"{path} is missing: copy models/losses.csv too, beside the scripts")
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- in


def check_input(path, expected="a file"):
    """Raise ValueError unless this is a regular file: no pipe is waited for, no device read without end."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; give {expected}") from None
    except (OSError, ValueError) as error:  # a link to itself, a name too long, no permission, a NUL
        reason = getattr(error, "strerror", error)
        raise ValueError(f"{path} can't be opened ({reason}); give {expected}") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a device or a pipe"
        raise ValueError(f"{path} is {kind}; give {expected}")


def read_text(path, expected="a text file"):
    """The text of a UTF-8 file, without byte-order mark. ValueError names the line that is no text."""
    check_input(path, expected)
    raw = Path(path).read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[:error.start].count(b"\n") + 1
        raise ValueError(f"{path}: line {line} is not UTF-8 (byte 0x{raw[error.start]:02x}); "
                         "save the file as UTF-8") from None
    if "\0" in text:
        line = text[:text.index("\0")].count("\n") + 1
        raise ValueError(f"{path}: line {line} has a NUL byte; save the file as plain UTF-8 text")
    return text


def files_digest(paths, algorithm="sha256"):
    """The hexadecimal digest of the files' bytes, one after the other."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    for path in paths:
        check_input(path)
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def read_array(path):
    """A .npy array as it lies on disk, memory-mapped and read-only. Pickled objects are never loaded.

    Raises OSError or ValueError naming the file, what it is and what to do.
    """
    check_input(path, ARRAY)
    with open(path, "rb") as file:
        magic = file.read(6)
    if magic[:4] == b"PK\x03\x04":
        raise ValueError(f"{path} is a zip archive (.npz?), not a .npy array; save the array with numpy.save")
    if magic != b"\x93NUMPY":
        raise ValueError(f"{path} is not a .npy file; save the array with numpy.save")
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # what headers provoke: ValueError, OverflowError, SyntaxError, MemoryError
        if "object" in str(error).lower():
            problem = "holds Python objects, which could run code; save a plain float32 array"
        elif "mmap" in str(error) or "file size" in str(error):
            size = os.path.getsize(path)
            problem = f"is truncated: its header promises more than {size:,} bytes; make it again"
        else:
            problem = f"has a broken .npy header ({error}); save it again"
        raise ValueError(f"{path} {problem}") from None


def open_embeddings(path, table=None, rows=None):
    """Embeddings as they lie in a .npy file, memory-mapped: real numbers (n, m), n >= 2.

    Raises ValueError naming the file and what to do, also where their table has another number of rows.
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
        raise ValueError(f"{path} has {len(array):,} embeddings, {table} {rows:,} rows; both must list the "
                         "same pictures in the same order")
    return array


# What our scripts write into JSON, beside arrays and as a network's config.json: the kinds of the values.
GEOMETRY = {"resize": (int, [int], None), "crop": (int, None), "channels": str, "scale": float,
            "mean": [float], "std": [float], "interpolation": str, "transform": str, "size": [int]}
LISTED = {"number": int, "sha256": str}
KINDS = {
    **dict.fromkeys(("dataset", "distance", "backbone", "checkpoint_sha256", "output"), str),
    **dict.fromkeys(("loss", "type", "checkpoint"), (str, None)),
    "fold": (int, str, None), **dict.fromkeys(("seed", "dimension"), (int, None)),
    "rows": [int], "preprocessing": GEOMETRY, "versions": dict,
    "split": (str, {"test": [int], "pictures": LISTED}),
    "options": {"pick": ([int], None), "limit": (int, None), "map_size": (int, [int], None)},
    "pictures": {**LISTED, "left_out": [str], "listed": LISTED},
}
WORDS = {int: "a whole number", float: "a number", str: "a text", list: "a list", dict: "an object",
         None: "null"}


def mismatch(value, kind, where=""):
    """What of a JSON value is not of its kind, in words, or None.

    kind: a type, None, [kind of all items], {key: kind of its value}, or a tuple of alternatives.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    for one in kinds:
        if isinstance(one, dict) and isinstance(value, dict):
            parts = [(value[key], one[key], f"{where}{key}: ") for key in one if key in value]
            return next(filter(None, (mismatch(*part) for part in parts)), None)
        if isinstance(one, list) and isinstance(value, list):
            parts = ((item, one[0], f"{where}{place}: ") for place, item in enumerate(value))
            return next(filter(None, (mismatch(*part) for part in parts)), None)
        if is_of(value, one):
            return None
    words = [WORDS[type(one) if isinstance(one, (list, dict)) else one] for one in kinds]
    return f"{where}{value!r:.60}, expected {' or '.join(words)}"


def is_of(value, kind):
    """Is a JSON value of this type? Whole numbers have 64 bits, and texts can be file names."""
    if type(value) is int:
        return kind in (int, float) and abs(value) < 2**63
    if type(value) is str and re.search(r"[\ud800-\udc7f\udd00-\udfff]", value):
        return False  # a surrogate that stands for no byte
    return value is kind or type(value) is kind


def each_once(pairs):
    """A JSON object as a dictionary. ValueError where a key stands there twice."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands there "
                         "twice")
    return dict(pairs)


def read_json(path, kinds=KINDS):
    """The object of a JSON file, as a dictionary whose values are of these kinds where they are there.

    Raises ValueError naming the file and the key.
    """
    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    text = read_text(path, "a JSON file")
    try:
        content = json.loads(text, parse_constant=refuse, object_pairs_hook=each_once)
        problem = mismatch(content, kinds)
    except (ValueError, RecursionError) as error:
        problem = f"no JSON that our scripts write ({error})"
    if problem:
        raise ValueError(f"{path}: {problem}; make it again, or remove it")
    return content


def read_sidecar(path):
    """The JSON beside an array (emb.json of emb.npy) as a dictionary; {} without one."""
    path = Path(path).with_suffix(".json")
    return read_json(path) if os.path.lexists(path) else {}


def read_table(path):
    """A CSV file with a header -> {column name: list of str}, in the file's order, every list equally long.

    A byte-order mark and CRLF are accepted; an index that pandas wrote (without a name; 0, 1, … or before a
    column of names) is left out.
    Labels (n,) in a .npy file are a column of the file's name.
    Raises ValueError naming file, line and column, and what to do.
    """
    check_input(path, TABLE)
    with open(path, "rb") as file:
        if file.read(6) == b"\x93NUMPY":
            return {Path(path).stem: read_labels(path)}
    columns, line = [], 0
    reader = csv.reader(io.StringIO(read_text(path, TABLE).rstrip(), newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        unnamed = len(header) > 1 and header[0] in ("", "Unnamed: 0")
        header[:1] = ["index"] if unnamed else header[:1]
        check_header(path, header)
        columns, line = [[] for _ in header], reader.line_num
        for row in reader:
            begins, line = line + 1, reader.line_num
            if len(header) == 1 and not row:
                row = [""]  # a blank line is a missing value of a single column
            if len(header) > 1 and len(row) < 2 and not "".join(row).strip():
                continue
            if len(row) != len(header):
                fields = "1 field" if len(row) == 1 else f"{len(row)} fields"
                raise ValueError(f"{path}: line {begins} has {fields}, the header {len(header)}; mend it")
            for column, value in zip(columns, row):
                column.append(value.strip())
    except csv.Error as error:
        line = line + 1 if columns else 1
        raise ValueError(f"{path}: line {line}: {error}; mend the quotes or save it as plain CSV") from None
    if not columns[0]:
        raise ValueError(f"{path} has a header and no rows; expected one row for each picture")
    if unnamed and (header[1].lower() in IDENTIFIERS
                    or columns[0] == list(map(str, range(len(columns[0]))))):
        del header[0], columns[0]
    return dict(zip(header, columns))


def arrays_and_tables(paths, column=None):
    """What a command line names, EMB.npy … [TABLE] -> (arrays, each one's table): one for all, or beside.

    TABLE: .csv, or .npy with labels (n,). column: as of table_beside().
    Raises ValueError where a table stands before an array.
    """
    arrays, tables = list(paths), None
    if len(arrays) > 1 and (not arrays[-1].endswith(".npy") or read_array(arrays[-1]).ndim == 1):
        tables = [arrays.pop()] * len(arrays)
    for path in arrays:
        if path.endswith(".csv"):
            raise ValueError(f"{path} stands before an array; the table comes last, one for all")
    return arrays, tables or [table_beside(array, column) for array in arrays]


def read_labels(path):
    """Labels (n,) in a .npy file -> list of str."""
    labels = read_array(path)
    if labels.ndim != 1 or labels.dtype.kind not in "iubUS" or not len(labels):
        raise ValueError(f"{path} is an array {labels.shape} of {labels.dtype}; expected a CSV file here (it "
                         "comes last), or one whole number, boolean or text for each picture")
    return np.char.strip(labels.astype(str)).tolist()


def check_header(path, header):
    """Raise ValueError unless the CSV header has distinct, non-empty names that are not numbers."""
    if not any(header):
        raise ValueError(f"{path} is empty; expected a header line and one row for each picture")
    if len(header) > MOST_COLUMNS:
        raise ValueError(f"{path} has {len(header):,} columns; expected at most {MOST_COLUMNS:,}, and "
                         "pictures in rows")
    if "" in header:
        raise ValueError(f"{path}: column {header.index('') + 1} has no name; name it or remove it")
    if len(set(header)) < len(header):
        name = next(name for name in header if header.count(name) > 1)
        raise ValueError(f"{path}: two columns are named {name!r}; rename one")
    if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
        raise ValueError(f"{path}: the header {header[0]!r} has no comma; save the table "
                         "with commas between the columns")
    if all(is_number(name) for name in header):
        start = ",".join(header[:4])
        raise ValueError(f"{path}: the first line ({start}…) is data; expected a header with column names")


def some(names):
    """The first three of them, for people."""
    return ", ".join([*names[:3], "…"] if len(names) > 3 else names)


def is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


def table_beside(array, column=None):
    """The table of an array's pictures that embed.py wrote: beside it or in the data set's folder of results.

    column: one that the table must have; without one it is props.csv that is looked for, else labels.csv too.
    Raises FileNotFoundError naming the places.
    """
    array, names = Path(array), ["labels.csv", "props.csv"] if column else ["props.csv"]
    folders = [folder / name for folder in (array.parent, array.parent.parent.parent) for name in names]
    for place in [*(Path(f"{array.with_suffix('')}.{name}") for name in names), *folders]:
        if place.is_file() and (column is None or column in read_table(place)):
            return place
    wanted = f" with a column {column}" if column else ""
    raise FileNotFoundError(f"{array}: no table of its pictures{wanted} "
                            f"({', '.join(map(str, folders[:len(names)]))}, …); name one behind the "
                            "embeddings")


def read_properties(path, columns=None, pictures=None, notes=None, missing=None):
    """A props.csv's or labels.csv's properties -> {name: str array (n,)}; a first column of names is none.

    columns: these only. pictures: the n pictures' names (of picture_names), whose order the rows then take.
    notes: a list that takes what a user should know. missing: spellings (MISSING) that become "".
    Raises ValueError for unknown columns, names that do not fit, and missing values unless these are spelled.
    """
    table = read_table(path)
    if columns and len(columns) == 1 and str(path).endswith(".npy"):
        table = dict(zip(columns, table.values()))  # labels go by any name
    first = next(iter(table))
    if first.lower() not in IDENTIFIERS and "path" in table:
        first = "path"  # Open Metric Learning's tables begin with the label
    properties = [name for name in table if name != first or first.lower() not in IDENTIFIERS]
    if not properties:
        raise ValueError(f"{path} has only the identifying column {first!r}; expected a property column too")
    for name in columns or []:
        if name not in properties:
            raise ValueError(f"{path} has no property {name!r}; it has {', '.join(properties)}")
    rows, named = slice(None), first not in properties
    if pictures is not None and named:
        rows = rows_by_name(pictures, table[first], path, notes)
    elif notes is not None and (pictures is not None or named and not is_index(table[first])):
        lacking = "the array's pictures" if named else "its rows"
        notes.append(f"{path}: rows are taken in their order: {lacking} are not known by name")
    values = {name: np.array(table[name])[rows] for name in dict.fromkeys(columns or properties)}
    for name, column in values.items():
        if missing is not None:
            column[is_missing(column, missing)] = ""
        elif "" in column:
            row = column.tolist().index("")
            raise ValueError(f"{path}: row {row} (counting from 0), column {name!r} has no value; fill it "
                             "in, remove the picture or leave the column out (--properties)")
        if notes is not None and has_twins(column):
            notes.append(f"{path}: column {name!r} spells one number in several ways (as 1, 1.0 and 01), "
                         "each a value of its own")
    return values


def missing_spellings(option):
    """What stands for no value: MISSING, or the option --missing A,B and the empty cell."""
    return MISSING if option is None else ("", *map(str.strip, option.split(",")))


def is_missing(column, spellings=MISSING):
    """Which cells (n,) of a column of str have no value: bool (n,)."""
    missing = np.isin(np.char.lower(column), [text.lower() for text in spellings])
    if "None" in column and all(map(is_number, {*column[~missing].tolist()} - {"None"})):
        missing |= column == "None"
    return missing


def has_twins(column):
    """Are all values numbers, and two of them the same one?"""
    values = {*column.tolist()} - {""}
    return all(map(is_number, values)) and len({*map(float, values)}) < len(values)


# ---------------------------------------------------------------- rows that belong together


def pictures_sha256(relative):
    """SHA-256 of the list of pictures (names joined by newlines): arrays with the same have the same rows."""
    return hashlib.sha256(b"\n".join(os.fsencode(path) for path in relative)).hexdigest()


def picture_names(array):
    """The names of an array's pictures, in the order of its rows; None unless they are known and distinct.

    They stand in the labels.csv that embed.py writes beside the array or for its data set.
    """
    lists = picture_lists(array)
    names = listed_names(read_sidecar(array), len(read_array(array)), lists) if lists else None
    return names if names and len(set(names)) == len(names) else None


def beside(array):
    """Where embed.py writes what is read with an array: its JSON, then the lists of its pictures."""
    array = Path(array)
    folders = (array.parent, array.parent.parent.parent)
    return [array.with_suffix(".json"), array.with_name(f"{array.stem}.labels.csv"),
            *(folder / "labels.csv" for folder in folders)]


def picture_lists(array):
    """The names in each labels.csv that may belong to an array."""
    return [next(iter(read_table(place).values())) for place in beside(array)[1:] if place.is_file()]


def listed_names(about, n, lists):
    """Which of the lists of names are an array's n rows, as its JSON (about) tells; None if none is."""
    listed, options = about.get("pictures", {}), about.get("options", {})
    left_out = set(listed.get("left_out") or [])
    for names in lists:
        rows = options.get("pick") or range(len(names))[:options.get("limit")]
        part = [names[row] for row in rows if row < len(names) and names[row] not in left_out]
        for known in (part, names):
            if len(known) == n and listed.get("sha256") in (None, pictures_sha256(known)):
                return known
    return None


def rows_by_name(pictures, names, source, notes=None):
    """Where each picture stands among the names of source (a table, a folder) -> int array (n,).

    Names are compared as paths, file names, stems or numbers (000017.jpg is frame 17): the first that tells
    all apart on both sides; where names tell nothing, numbers that rise (an index) keep their order.
    Raises ValueError naming what is missing or stands there twice.
    """
    most = [False] * len(pictures)
    ours, theirs = zip(*map(spellings, pictures)), zip(*map(spellings, names))
    for word, wanted, spelled in zip(("path", "file name", "stem", "number"), ours, theirs):
        there = {name: row for row, name in enumerate(spelled)}
        here = [name in there for name in wanted]
        if all(here) and len(there) == len(names) and len(set(wanted)) == len(wanted):
            rows = np.array([there[name] for name in wanted])
            moved = int((rows.argsort().argsort() != np.arange(len(rows))).sum())
            aside = len(names) - len(rows)
            if notes is not None and (moved or aside):
                notes.append(f"{source}: {len(rows):,} rows matched by {word}; {moved:,} were in another "
                             f"place, {aside:,} belong to no picture here")
            return rows
        most = max(most, here, key=sum)
    n = len(pictures)
    numbers = [int(name) for name in names if re.fullmatch("[0-9]{1,18}", name)]
    if not any(most) and len(names) == n == len(numbers) and numbers == sorted(set(numbers)):
        if notes is not None:
            notes.append(f"{source}: rows are taken in their order: its numbers name no picture here")
        return np.arange(n)
    absent = [name for name, there in zip(pictures, most) if not there]
    if absent:
        raise ValueError(f"{source} lacks {len(absent):,} of the {n:,} pictures: {some(absent)}; add what is "
                         "missing, or leave these out of the other list")
    twice = [name for listed in (names, pictures) for name, times in Counter(listed).items() if times > 1]
    raise ValueError(f"{source}: {(twice or pictures)[0]} is the name of two; give each its own")


def is_index(names):
    """Are these 0, 1, 2, … or 1, 2, 3, …?"""
    first = int(names[0] == "1")
    return list(names) == list(map(str, range(first, first + len(names))))


def spellings(name):
    """A picture's name as path, file name, stem and number: 17 of images/000017.jpg, else the name."""
    path = name.replace("\\", "/").removeprefix("./")
    file = re.sub(r"\[[0-9,]+\]$", "", path.rpartition("/")[2])  # without the box that is part of the name
    stem = os.path.splitext(file)[0]
    return path, file, stem, stem.lstrip("0") if stem.isascii() and stem.isdecimal() else name


# ---------------------------------------------------------------- out


def check_output(path, inputs=(), others=()):
    """Raise ValueError unless a file can be written at this path; called before the work.

    Only a regular file (or the one a link names) that is no input, lies beside no array among them as
    beside() says, and is no other output is ever replaced.
    """
    if str(path) in ("", "."):
        raise ValueError("the output has no name; give a file's")
    place = os.path.realpath(path)
    for other in filter(None, others):
        if place == os.path.realpath(other):
            raise ValueError(f"{path} is the name of two outputs; give each its own")
    if os.path.lexists(place):
        check_input(place, "another name for the output")
    read = list(filter(None, inputs))
    there = os.stat(place) if os.path.exists(place) else None
    for other in read + [path for array in read if str(array).endswith(".npy") for path in beside(array)]:
        same = there and os.path.exists(other) and os.path.samestat(os.stat(other), there)
        if same or os.path.abspath(other) == place:
            raise ValueError(f"{path} is an input, or another output: choose another name")
    folder = os.path.dirname(place)
    if not os.path.isdir(folder):
        raise ValueError(f"the folder {folder} does not exist; make it first")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"the folder {folder} can't be written to; choose another")


@contextlib.contextmanager
def unwritable(path):
    """An OSError of this block says which file it is about and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} can't be written ({error.strerror}); free space or choose another "
                      "place") from None


def locked_part(path):
    """A new file beside the path, locked: nobody takes it for a killed process's."""
    while True:
        part = open(path.with_name(f".{path.name}.{os.urandom(4).hex()}.part"), "xb+")
        with contextlib.suppress(OSError):  # no locks on this file system
            fcntl.flock(part, fcntl.LOCK_EX)
        if os.fstat(part.fileno()).st_nlink:
            return part
        part.close()  # removed before it was locked


@contextlib.contextmanager
def part_of(path):
    """A file beside `path`, to be written, that takes its name when the block ends well: never half a file.

    A lock tells that its process lives; what killed processes left of the same name is removed.
    """
    path = Path(os.path.realpath(path))  # the file that a link names, not the link
    if os.path.lexists(path):
        check_input(path, "another name for the output")  # a device would be replaced by a file
    for old in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with contextlib.suppress(OSError), open(old, "rb") as left:
            fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
            old.unlink()
    with unwritable(path):
        part = locked_part(path)
    try:
        yield part
        with unwritable(path):
            part.flush()
            os.fsync(part.fileno())
            os.replace(part.name, path)
    finally:
        with contextlib.suppress(OSError):  # what did not fit into the disk the first time
            part.close()
        Path(part.name).unlink(missing_ok=True)


def write_file(path, content):
    """Write bytes, whole or not at all."""
    with part_of(path) as part, unwritable(path):
        part.write(content)


@contextlib.contextmanager
def new_array(path, shape, dtype="float32"):
    """An .npy array to fill, memory-mapped, its space reserved; it has its name when the block ends well."""
    with part_of(path) as part:
        with unwritable(path):
            array = np.lib.format.open_memmap(part.name, mode="w+", dtype=dtype, shape=shape)
            if hasattr(os, "posix_fallocate"):  # a page written to a full disk would end the process
                os.posix_fallocate(part.fileno(), 0, os.fstat(part.fileno()).st_size)
        yield array
        array.flush()


def write_table(path, header, rows):
    """Write a CSV file whole or not at all. None becomes an empty field; floats keep all digits."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\r\n")  # so that names with \r are quoted, too
    writer.writerow(header)
    writer.writerows(["" if value is None else value for value in row] for row in rows)
    text = text.getvalue().replace("\r\n", "\n")
    write_file(path, text.encode("utf-8", "surrogateescape"))  # a file name may be any bytes
