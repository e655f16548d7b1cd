"""One .npy array on disk with its JSON, filled row by row by several processes at once, resumable after kill -9.

    rows = RowFile("emb.npy", (n, m), "float32", about)   # about: the JSON beside it
    for start, stop in shares(n, rank, ranks):            # this process's share first, then the others'
        mine = rows.claim(start, stop)                    # row numbers nobody has done or is doing
        rows.write(mine, values)                          # (len(mine), m)
    rows.finish()                                         # whoever ends last renames emb.npy.part to emb.npy

While it fills, emb.npy.part is the array, emb.json.part the JSON, and emb.npy.rows has one byte a row: 0 missing,
1 written, 2 left out. A row is marked after its values are on disk, so a crash loses at most the last FLUSH seconds.
Claims are advisory file locks, which the system drops with the process that held them; on a file system without
locks rows may be computed twice, to the same values. Any number of processes may come and go.
"""
import fcntl
import io
import json
import os
import time
from pathlib import Path

import numpy as np

BLOCK = 32  # rows claimed at a time
FLUSH = 2.0  # seconds
MISSING, WRITTEN, LEFT_OUT = 0, 1, 2
# What may differ between two runs whose rows belong together: where a checkpoint lies (its sha256 counts), versions.
NOT_COMPARED = ("checkpoint", "versions")


def shares(n, rank=0, ranks=1, block=BLOCK):
    """All of range(n) in blocks (start, stop), beginning with the share of this rank and going round.

    Every rank comes by every block in the end: it then finds what is left of a slower or dead rank's share.
    """
    starts = range(0, n, block)
    first = len(starts) * rank // ranks
    return [(start, min(start + block, n)) for start in [*starts[first:], *starts[:first]]]


def my_share(environment=os.environ):
    """(rank, ranks) of this process, from torchrun's environment or from Slurm's (array tasks × processes of each)."""
    number = lambda name, default: int(environment.get(name) or default)
    if "RANK" in environment:
        return number("RANK", 0), number("WORLD_SIZE", 1)
    task = number("SLURM_ARRAY_TASK_ID", 0) - number("SLURM_ARRAY_TASK_MIN", 0)
    task //= number("SLURM_ARRAY_TASK_STEP", 1)
    in_step = "SLURM_STEP_ID" in environment  # started by srun; a batch script alone is one process
    processes = number("SLURM_NTASKS", 1) if in_step else 1
    rank = task * processes + (number("SLURM_PROCID", 0) if in_step else 0)
    ranks = number("SLURM_ARRAY_TASK_COUNT", 1) * processes
    return rank % ranks, ranks


def is_complete(path, about):
    """Is the array there, made as `about` says? Raises ValueError naming the differences when it was made otherwise."""
    path = Path(path)
    if not path.exists():
        return False
    beside = path.with_suffix(".json")
    if not beside.exists():
        raise ValueError(f"{path} exists without {beside.name}: how it was made is unknown; remove it or write elsewhere")
    refuse_other(path, beside, about)
    return True


def refuse_other(path, beside, about):
    """Raise ValueError unless the JSON file `beside` agrees with `about`."""
    try:
        old = json.loads(beside.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{beside} is no JSON; remove it and {path.name}, or write elsewhere") from None
    old = dict(old, pictures=old.get("pictures", {}).get("listed", old.get("pictures")))
    different = differences(old, json.loads(json.dumps(about)))
    if different:
        raise ValueError(f"{path} was made with other options ({'; '.join(different)}): "
                         "remove it, or write elsewhere")


def differences(old, new, prefix=""):
    """Each difference of two nested dictionaries, in words."""
    found = []
    for key in dict.fromkeys([*old, *new]):
        if key in NOT_COMPARED or old.get(key) == new.get(key):
            continue
        if isinstance(old.get(key), dict) and isinstance(new.get(key), dict):
            found += differences(old[key], new[key], f"{prefix}{key}.")
        else:
            values = [text if len(text := str(value)) <= 80 else text[:79] + "…" for value in (old.get(key), new.get(key))]
            found.append(f"{prefix}{key}: {values[0]} there, {values[1]} now")
    return found


class RowFile:
    """The array `path` of `shape` (n, …) and `dtype`, and the JSON of the same stem, being filled.

    about: JSON-able dict, written beside the array; rows made with another one are refused (ValueError).
    retry: rows left out by an earlier run are missing again.
    Raises OSError when the folder can't be written or has no room.
    """

    def __init__(self, path, shape, dtype, about, retry=False):
        self.path, self.shape, self.dtype, self.about = Path(path), tuple(shape), np.dtype(dtype), about
        self.part = self.path.with_name(self.path.name + ".part")
        self.beside = self.path.with_suffix(".json.part")
        self.marks = self.path.with_name(self.path.name + ".rows")
        self.complete = is_complete(path, about)
        if self.complete:
            return
        if self.beside.exists():
            refuse_other(self.part, self.beside, about)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.array = os.open(self.part, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OSError(f"{self.path}: can't be written ({error.strerror}); choose another place for the output") from None
        self.header = npy_header(self.shape, self.dtype)
        self.row_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        self.state = os.open(self.marks, os.O_RDWR | os.O_CREAT, 0o666)
        self.pending, self.flushed, self.closed = [], time.monotonic(), False
        self.claimed = np.zeros(self.shape[0], dtype=bool)
        self.allocate()
        if is_complete(path, about):  # another process was done in the meantime
            self.complete = True
            return self.remove()
        if retry:
            self.mark(self.left_out(), MISSING)

    def allocate(self):
        """Reserve the disk space; every step may be repeated by another process without harm."""
        size = len(self.header) + self.shape[0] * self.row_bytes
        try:
            if os.fstat(self.array).st_size < size:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(self.array, 0, size)
                else:
                    os.ftruncate(self.array, size)
            write_all(self.array, self.header, 0)
            if os.fstat(self.state).st_size < self.shape[0]:
                os.ftruncate(self.state, self.shape[0])
            write_json(self.beside, self.about)
        except OSError as error:
            if not self.read_marks().any():
                self.remove()
            raise OSError(f"{self.path}: {error.strerror}: {size / 2**20:,.1f} MiB are needed there") from None

    def claim(self, start, stop):
        """Missing rows in [start, stop), locked for this process until it ends -> int array.

        None if another process is at the block; a row is given once to one RowFile.
        """
        try:
            fcntl.lockf(self.state, fcntl.LOCK_EX | fcntl.LOCK_NB, stop - start, start)
        except (BlockingIOError, PermissionError):
            return np.empty(0, dtype=np.int64)
        except OSError:  # no locks on this file system
            pass
        rows = start + np.flatnonzero((self.read_marks(start, stop) == MISSING) & ~self.claimed[start:stop])
        self.claimed[rows] = True
        return rows

    def write(self, rows, values):
        """values (len(rows), …) become the rows of these numbers."""
        values = np.ascontiguousarray(values, dtype=self.dtype)
        if values.shape != (len(rows), *self.shape[1:]):
            raise ValueError(f"values have shape {values.shape}, expected {(len(rows), *self.shape[1:])}")
        for row, value in zip(rows, values):
            write_all(self.array, value.tobytes(), len(self.header) + int(row) * self.row_bytes)
        self.pending += [int(row) for row in rows]
        if time.monotonic() - self.flushed > FLUSH:
            self.flush()

    def leave_out(self, rows):
        """These rows can't be had: finish() removes them."""
        self.mark(rows, LEFT_OUT)

    def flush(self):
        """Values to the disk first, then the marks that say so."""
        os.fsync(self.array)
        self.mark(self.pending, WRITTEN)
        self.pending, self.flushed = [], time.monotonic()

    def mark(self, rows, value):
        for row in rows:
            write_all(self.state, bytes([value]), int(row))

    def read_marks(self, start=0, stop=None):
        return np.frombuffer(os.pread(self.state, (stop or self.shape[0]) - start, start), dtype=np.uint8)

    def missing(self):
        """Number of rows nobody has marked yet."""
        return int((self.read_marks() == MISSING).sum())

    def left_out(self):
        """Rows left out -> int array."""
        return np.flatnonzero(self.read_marks() == LEFT_OUT)

    def finish(self, about=None):
        """Rename to the final name if every row is there; True if the array is complete (whoever completed it).

        about: the JSON to write when rows were left out, or a function that makes it from their numbers, asked
        when no process can leave out more.
        """
        if self.complete:
            return True
        self.flush()
        self.lock_end(fcntl.LOCK_EX)  # one process at a time looks, after its own rows are marked: the last one sees all
        if not self.path.exists():
            if self.missing():
                self.lock_end(fcntl.LOCK_UN)
                return False
            array, left_out = self.without_left_out(), self.left_out().tolist()
            content = about(left_out) if callable(about) else about
            write_json(self.path.with_suffix(".json"), content if left_out and content else self.about)
            os.replace(array, self.path)
            sync_folder(self.path.parent)
        self.remove()
        self.complete = True
        return True

    def lock_end(self, operation):
        """Lock or unlock the byte behind the last row's."""
        try:
            fcntl.lockf(self.state, operation, 1, self.shape[0])
        except OSError:  # no locks on this file system
            pass

    def without_left_out(self):
        """The file to rename: the part itself, or a copy without the rows left out."""
        keep = np.flatnonzero(self.read_marks() == WRITTEN)
        if len(keep) == self.shape[0]:
            return self.part
        smaller = self.part.with_name(self.part.name + ".kept")
        with open(smaller, "wb") as file:
            file.write(npy_header((len(keep), *self.shape[1:]), self.dtype))
            for row in keep:
                file.write(os.pread(self.array, self.row_bytes, len(self.header) + int(row) * self.row_bytes))
            file.flush()
            os.fsync(file.fileno())
        return smaller

    def remove(self):
        """Close and remove the working files; the array, if renamed, stays."""
        self.close()
        for path in (self.part, self.beside, self.marks):
            path.unlink(missing_ok=True)

    def give_up(self, alone):
        """Keep what is there for the next run; a file without a single row is removed if no other process uses it."""
        if self.closed:
            return
        self.flush()
        if alone and self.missing() == self.shape[0]:
            self.remove()
        self.close()

    def close(self):
        """Close, keeping what is there for the next run (locks end here)."""
        if not self.closed:
            os.close(self.array)
            os.close(self.state)
            self.closed = True


def npy_header(shape, dtype):
    """The bytes before the values of an .npy file, C order."""
    file = io.BytesIO()
    description = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(file, {"descr": description, "fortran_order": False, "shape": shape})
    return file.getvalue()


def write_all(descriptor, content, offset):
    """os.pwrite that goes on after a short write (which is how a full disk begins)."""
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done:], offset + done)


def write_json(path, content):
    """Through a temporary name, so that a reader never sees half of it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=2) + "\n")  # ASCII: file names need not be Unicode
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder):
    """Make a rename survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
