"""One .npy array on disk with its JSON, filled row by row by several processes, resumable after kill -9.

    rows = RowFile("emb.npy", (n, m), "float32", about)   # about: the JSON beside it
    for start, stop in shares(n, rank, ranks):            # this process's share first, then the others'
        mine = rows.claim(start, stop)                    # row numbers nobody has done or is doing
        rows.write(mine, values)                          # (len(mine), m)
    rows.finish()                                         # whoever ends last renames emb.npy.part to emb.npy
    rows.give_up()                                        # in any case

`fill` is this loop for pictures: embed.py and saliency.py give it a function and the shape of a row.

While it fills, emb.json.part is the JSON, and emb.npy.part the array, then one byte a row (0 missing, 1
written, 2 left out) and an end mark. These are cut off in the end; whatever else cuts the part cuts them
first. A row is marked after its values are on disk: a crash loses at most the last FLUSH seconds. Advisory
locks on bytes of the part, which the system drops with the process that held them, tell who is there: who
has byte 0 opens, finishes or leaves; all users share byte 1, so that the last one clears up; the byte of a
row claims it. Without locks on a file system rows may be computed twice, to the same values. Processes may
come and go.
"""
import fcntl
import hashlib
import io
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dml_common import command, files

BLOCK = 32  # rows claimed at a time
FLUSH = 2.0  # seconds
MISSING, WRITTEN, LEFT_OUT = 0, 1, 2
END = b"unfinished rows\n"
GATE, USERS = 0, 1  # the bytes whose locks tell who is there
# May differ between runs whose rows belong together: where a checkpoint lies (its sha256 counts), versions.
NOT_COMPARED = ("checkpoint", "versions")
SIZES = "sizes_in_bytes_sha256"


def shares(n, rank=0, ranks=1, block=BLOCK):
    """All of range(n) in blocks (start, stop), beginning with the share of this rank and going round.

    Every rank comes by every block in the end: it then finds what is left of a slower or dead rank's share.
    """
    starts = range(0, n, block)
    first = len(starts) * rank // ranks
    return [(start, min(start + block, n)) for start in [*starts[first:], *starts[:first]]]


# ---------------------------------------------------------------- was it made with these options?


def is_complete(path, about):
    """Is the array there, made as `about` says? What a killed process left beside it is then removed.

    Raises ValueError naming the differences when it was made otherwise, and for a link that leads nowhere.
    """
    path = Path(path)
    if path.is_symlink() and not path.exists():
        raise ValueError(f"{path} is a link to {os.readlink(path)}, which is not there; the array would "
                         "take its place: remove it, or give that file's name")
    if not path.exists():
        return False
    made = read_json(path.with_suffix(".json"))
    if made is None:
        raise ValueError(f"{path} exists without {path.stem}.json, or that is damaged: how it was made is "
                         "unknown; remove it or write elsewhere")
    refuse_other(path, made, about)
    if any(file.exists() for file in working_files(path)):
        leave(open_part(path), path)
    return True


def refuse_other(path, made, about):
    """Raise ValueError unless `made`, the JSON of an array, agrees with `about`."""
    now = json.loads(json.dumps(about))
    if isinstance(made.get("pictures"), dict) and "pictures" in now:
        listed = made["pictures"].get("listed", made["pictures"])  # whether or not some were left out
        sizes = listed.get(SIZES, now["pictures"].get(SIZES))  # older arrays lack it
        made = {**made, "pictures": {**listed, SIZES: sizes}}
    if different := differences(made, now):
        raise ValueError(f"{path} was made with other options ({'; '.join(different)}): remove it, or write "
                         "elsewhere")


def differences(old, new, prefix=""):
    """Each difference of two nested dictionaries, in words."""
    lines = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if a == b or key in NOT_COMPARED:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        else:
            a, b = (text if len(text := str(value)) <= 80 else text[:79] + "…" for value in (a, b))
            lines.append(f"{prefix}{key}: {a} there, {b} now")
    return lines


def read_json(path):
    """The dictionary in a JSON file; None where there is none."""
    try:
        return files.read_json(path, {})
    except ValueError:
        return None


def write_json(path, content):
    files.write_file(path, (json.dumps(content, indent=2) + "\n").encode())


# ---------------------------------------------------------------- the part and its locks


def working_files(path):
    """What lies beside an array while it fills: JSON, marks of an older version, a smaller copy, the part."""
    names = [f"{path.name}.rows", f"{path.name}.part.kept", f"{path.name}.part"]
    return [path.with_suffix(".json.part"), *(path.with_name(name) for name in names)]


def lock(descriptor, operation, start, length=1):
    """fcntl.lockf: True if it succeeds, False if another process has the bytes, None without locks."""
    try:
        fcntl.lockf(descriptor, operation, length, start)
        return True
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None


def open_part(path):
    """The descriptor of an array's part, which this process uses from now on, with the gate locked."""
    part = working_files(path)[-1]
    while True:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
        lock(descriptor, fcntl.LOCK_EX, GATE)
        lock(descriptor, fcntl.LOCK_SH, USERS)
        if is_file(descriptor, part):
            return descriptor
        os.close(descriptor)  # another process has just renamed or removed it


def is_file(descriptor, path):
    """Is the open file still the one of this name?"""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def only_one(path, wait=True):
    """A block for one process at a time: is it ours (or, without waiting, another's)?

    The lock is on this file, which is there as long as a process has it, or was killed.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        free = lock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), GATE) is not False
        if not free or is_file(descriptor, path):
            break
        os.close(descriptor)  # removed by the one before
    try:
        yield free
    finally:
        if free:
            Path(path).unlink(missing_ok=True)
        os.close(descriptor)


def alone(descriptor):
    """With the gate locked: is this process the only user? None where there are no locks."""
    answer = lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, USERS)
    lock(descriptor, fcntl.LOCK_SH, USERS)
    return answer


def leave(descriptor, path, untouched=False):
    """Close the part. The last user removes the working files of an array that is complete or has no row."""
    lock(descriptor, fcntl.LOCK_EX, GATE)
    last = alone(descriptor)
    if last and untouched or last is not False and path.exists():
        for file in working_files(path):
            file.unlink(missing_ok=True)
    os.close(descriptor)


class RowFile:
    """The array `path` of `shape` (n, …) and `dtype`, and the JSON of the same stem, being filled.

    about: JSON-able dict, written beside the array; rows made with another one are refused (ValueError).
    retry: rows left out by an earlier run are missing again.
    Raises OSError when the folder can't be written or has no room.
    """

    def __init__(self, path, shape, dtype, about, retry=False):
        self.path, self.shape, self.dtype, self.about = Path(path), tuple(shape), np.dtype(dtype), about
        self.beside, _, self.kept, self.part = working_files(self.path)
        self.header = npy_header(self.shape, self.dtype)
        self.row_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        self.size = len(self.header) + self.shape[0] * self.row_bytes  # of the array: where the marks begin
        self.end = self.size + self.shape[0]
        self.claimed, self.pending, self.flushed = np.zeros(self.shape[0], dtype=bool), [], time.monotonic()
        self.file, self.complete = None, is_complete(self.path, about)
        if self.complete:
            return
        self.made = [folder for folder in self.path.parents if not folder.exists()]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open_part(self.path)
            self.complete = self.was_finished()
            if not self.complete:
                self.begin(retry)
        except BaseException as error:
            self.give_up()
            if isinstance(error, OSError):
                raise OSError(f"{self.path}: can't be written ({error.strerror or error}); "
                              f"{self.end / 2**20:,.1f} MiB are needed there: choose another place") from None
            raise
        if self.complete:
            self.give_up()
        else:
            lock(self.file, fcntl.LOCK_UN, GATE)

    def was_finished(self):
        """With the gate locked: has another process finished, or was one killed at the end of rename()?"""
        final = self.path.with_suffix(".json")
        if not self.path.exists():
            if not final.exists() or os.fstat(self.file).st_size != self.size:
                return False
            self.replace(self.part)
        refuse_other(self.path, read_json(final) or {}, self.about)
        return True

    def begin(self, retry):
        """With the gate locked: go on with what is there if it is whole, else begin anew."""
        made, others = read_json(self.beside), alone(self.file) is False
        if made is not None and os.fstat(self.file).st_size:
            refuse_other(self.part, made, self.about)
            if self.is_whole():
                if retry and not others:
                    self.mark(self.left_out(), MISSING)
                return
        if others:
            raise ValueError(f"{self.part} or {self.beside.name} was removed or damaged while another process"
                             " fills it; stop that one, then give the same command again")
        damaged = self.beside.exists() or self.read_marks().any()
        if damaged:
            command.say(f"{self.part} or {self.beside.name} was removed, cut or damaged: beginning anew")
        if damaged or alone(self.file):
            os.ftruncate(self.file, 0)
        # Reserve the disk space. Without locks another process may do the same without harm.
        self.path.with_suffix(".json").unlink(missing_ok=True)  # of an array that was removed
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self.file, 0, self.end + len(END))
        write_all(self.file, self.header, 0)
        write_all(self.file, END, self.end)
        write_json(self.beside, self.about)

    def is_whole(self):
        """Is the part neither removed, cut nor overwritten?"""
        return (is_file(self.file, self.part) and os.fstat(self.file).st_size == self.end + len(END)
                and os.pread(self.file, len(self.header), 0) == self.header
                and os.pread(self.file, len(END), self.end) == END
                and self.read_marks().max(initial=0) <= LEFT_OUT)

    def claim(self, start, stop):
        """Missing rows in [start, stop), locked for this process until it gives up -> int array.

        None of them if another process is at the block; a row is given once to one RowFile.
        """
        rows = self.free(start, stop)
        try_lock = fcntl.LOCK_EX | fcntl.LOCK_NB
        if len(rows) and lock(self.file, try_lock, self.size + start, stop - start) is False:
            return rows[:0]
        rows = self.free(start, stop)  # as they are now, with the lock
        self.claimed[rows] = True
        return rows

    def free(self, start, stop):
        marks = [] if self.complete else self.read_marks(start, stop)  # also none if another one has finished
        rows = start + np.flatnonzero(np.array(marks) == MISSING)
        return rows[~self.claimed[rows]]

    def write(self, rows, values):
        """values (len(rows), …) become the rows of these numbers."""
        values = np.ascontiguousarray(values, dtype=self.dtype)
        if values.shape != (len(rows), *self.shape[1:]):
            raise ValueError(f"values have shape {values.shape}, expected {(len(rows), *self.shape[1:])}")
        for row, value in zip(rows, values):
            write_all(self.file, value.tobytes(), len(self.header) + int(row) * self.row_bytes)
        self.pending += list(rows)
        if time.monotonic() - self.flushed > FLUSH:
            self.flush()

    def flush(self):
        """Values to the disk first, then the marks that say so."""
        if self.pending:
            os.fsync(self.file)
            if is_file(self.file, self.part):  # without locks another process may have finished
                self.mark(self.pending, WRITTEN)
        self.pending, self.flushed = [], time.monotonic()

    def leave_out(self, rows):
        """These rows can't be had: finish() removes them."""
        self.mark(rows, LEFT_OUT)

    def mark(self, rows, value):
        for row in rows:
            write_all(self.file, bytes([value]), self.size + int(row))

    def read_marks(self, start=0, stop=None):
        stop = self.shape[0] if stop is None else stop
        return np.frombuffer(os.pread(self.file, stop - start, self.size + start), dtype=np.uint8)

    def missing(self):
        """Number of rows nobody has marked yet."""
        return 0 if self.complete else int((self.read_marks() == MISSING).sum())

    def left_out(self):
        """Rows left out -> int array."""
        return np.flatnonzero(self.read_marks() == LEFT_OUT)

    def finish(self, about=None):
        """Rename to the final name if every row is there; True if the array is complete, by whatever process.

        about: makes the JSON to write when rows were left out, from their numbers.
        """
        if self.complete:
            return True
        self.flush()
        lock(self.file, fcntl.LOCK_EX, GATE)  # after its own rows are marked: the last one sees all
        whole = self.is_whole()  # asked before: without locks another process may cut it now
        if not self.was_finished():
            if not whole:
                raise OSError(f"{self.part} was removed, cut or replaced while it was filled; give the same "
                              "command again")
            if self.missing():
                lock(self.file, fcntl.LOCK_UN, GATE)
                return False
            self.rename(about)
        self.complete = True
        self.give_up()
        return True

    def rename(self, about):
        """With the gate locked: the part, or a copy without the rows left out, becomes the array."""
        array, left_out = self.part, self.left_out().tolist()
        write_json(self.path.with_suffix(".json"), about(left_out) if left_out and about else self.about)
        if left_out:
            keep, array = np.flatnonzero(self.read_marks() == WRITTEN), self.kept
            with open(array, "wb") as file:
                file.write(npy_header((len(keep), *self.shape[1:]), self.dtype))
                for row in keep.tolist():
                    file.write(os.pread(self.file, self.row_bytes, len(self.header) + row * self.row_bytes))
                file.flush()
                os.fsync(file.fileno())
        else:
            os.ftruncate(self.file, self.size)
            os.fsync(self.file)
        self.replace(array)
        folder = os.open(self.path.parent, os.O_RDONLY)
        os.fsync(folder)  # the name survives a power cut
        os.close(folder)

    def replace(self, array):
        try:
            os.replace(array, self.path)
        except FileNotFoundError:  # without locks another process may have been faster
            if not self.path.exists():
                raise

    def give_up(self):
        """Close, keeping what is there for the next run; locks end here. The last user tidies up."""
        if self.file is None:
            return
        untouched = False
        try:
            self.flush()
            untouched = not self.read_marks().any() and (self.is_whole() or not self.beside.exists())
        finally:
            leave(self.file, self.path, untouched)
            self.file = None
            for folder in self.made if untouched else ():
                with suppress(OSError):  # where something lies by now
                    folder.rmdir()


def npy_header(shape, dtype):
    """The bytes before the values of an .npy file, C order."""
    file, kind = io.BytesIO(), np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
    return file.getvalue()


def write_all(descriptor, content, offset):
    """os.pwrite that goes on after a short write (which is how a full disk begins)."""
    done = 0
    while done < len(content):
        done += os.pwrite(descriptor, content[done:], offset + done)


# ---------------------------------------------------------------- pictures through networks


def add_options(add, name):
    """Which pictures, which networks, where to; add: a parser's add_argument."""
    command.add_pictures(add)
    command.add_networks(add, files.ROOT / "models")
    command.add_speed(add)
    add("--out", type=Path, default=Path("results"), metavar="FILE.npy|DIR",
        help=f"one network's array, or the folder of all: DIR/<dataset>/<slug>/fold<k>/{name} (results)")
    add("--skip-unreadable", action="store_true", help="leave pictures out that can't be read (stop there)")


class Job(NamedTuple):
    """One array to make: what a network gives for some pictures of a data set, a row each."""

    spec: dict  # of networks.find
    dataset: NamedTuple  # pictures.Dataset: what the network is analysed on
    numbers: list  # in it, of the rows' pictures
    path: Path
    about: dict  # the JSON beside the array
    folder: Path  # for the tables of all networks


def jobs(args, name, options, seed, choose=range):
    """The arrays that a command asks for: DIR/<dataset>/<slug>/fold<k>/NAME, or one at --out FILE.npy.

    options: what the JSON says of the computation; seed: of random layers; choose: n -> numbers of pictures.
    """
    import PIL
    import torch

    from dml_common import networks, pictures

    one = args.out.suffix == ".npy"
    dataset = pictures.open_dataset(args.dataset, args.data_root, args.split)
    loss = args.loss or (None if args.model or args.checkpoint else "all")
    specs = networks.find(args.trained_on or dataset.name, loss, args.fold, args.model, args.checkpoint,
                          args.weights, seed, args.models)
    if one and len(specs) > 1:
        raise ValueError(f"--out {args.out} is one array, but {len(specs)} networks were asked for "
                         f"({specs[0]['name']}, {specs[1]['name']}, …); give a folder")
    configs = [Path(spec["files"][0]).with_name("config.json") for spec in specs if spec["files"]]
    inputs = [args.dataset, dataset.folder / "props.csv", *configs]
    for ending in (".npy", ".json", ".labels.csv", ".classes.csv", ".props.csv") if one else ():
        files.check_output(args.out.with_suffix(ending), inputs)
    if not one and (args.out / dataset.name).resolve() == dataset.folder.resolve():
        raise ValueError(f"--out {args.out}: results would go into the data set itself, {dataset.folder}, "
                         "over its tables; give another folder")
    for note in [*dataset.notes, *(spec["note"] for spec in specs)]:
        if note and command.my_share()[0] == 0:
            command.say(note)
    versions = {"torch": torch.__version__, "numpy": np.__version__, "pillow": PIL.__version__}
    wanted, folder = [], args.out.parent if one else args.out / dataset.name
    for spec in specs:
        own = pictures.own_pictures(dataset, spec["config"], args.dataset, args.data_root, args.split)
        numbers, about = list(choose(len(own.paths))), {"dataset": dataset.name, "split": own.split}
        if own.split == "held out":
            about["rows"] = [spec["config"]["split"]["test"][i] for i in numbers]  # of the whole data set
        about |= {**networks.describe(spec), "options": options, "versions": versions,
                  "pictures": listed(own, numbers)}
        path = args.out if one else folder / spec["slug"] / f"fold{spec['fold'] or 0}" / name
        wanted.append(Job(spec, own, numbers, path, about, folder))
    return wanted


def listed(dataset, numbers):
    """What the JSON says of these pictures: arrays with the same sha256 have the same rows."""
    from dml_common.pictures import pictures_sha256

    names, sizes = [dataset.relative[i] for i in numbers], hashlib.sha256()
    for name, path in zip(names, (dataset.paths[i] for i in numbers)):
        sizes.update(b"%s\0%d\n" % (os.fsencode(name), path.stat().st_size if path.exists() else -1))
    return {"number": len(names), "sha256": pictures_sha256(names), SIZES: sizes.hexdigest()}


def without(left_out, job):
    """The JSON of an array that lacks these rows: their pictures could not be read."""
    rows = set(left_out)
    kept = [number for row, number in enumerate(job.numbers) if row not in rows]
    names = [job.dataset.relative[job.numbers[row]] for row in left_out]
    pictures = {**listed(job.dataset, kept), "left_out": names, "listed": job.about["pictures"]}
    return {**job.about, "pictures": pictures}


def incomplete(jobs, alike):
    """Groups of the jobs whose arrays are not complete yet; alike: job -> what all jobs of a group share."""
    groups = {}
    for job in jobs:
        if not is_complete(job.path, job.about):
            groups.setdefault(repr(alike(job)), []).append(job)
    if not groups and command.my_share()[0] == 0:
        command.say(f"nothing to do: {len(jobs)} of {len(jobs)} arrays are there")
    return list(groups.values())


def fill(jobs, shapes, dtype, load, stack, compute, batch, least, args, unit):
    """Make the arrays of jobs that share their pictures, together with whatever other processes do the same.

    shapes: of a row of each; least: rows to claim at a time
    args: workers and skip_unreadable (None where there is no such option)
    load: path -> a picture, in threads; ValueError or OSError when it can't be read
    stack: list of up to `batch` of them -> what compute takes, in a thread, while the one before is used
    compute: (numbers of arrays that lack these rows, rows, what stack gave) -> for each array (len(rows), …)
    Returns when every array is complete; what a dying process leaves is taken over.
    """
    paths, (rank, ranks) = [jobs[0].dataset.paths[i] for i in jobs[0].numbers], command.my_share()
    what = jobs[0].spec["name"] if len(jobs) == 1 else f"{len(jobs)} networks"
    blocks = shares(len(paths), rank, ranks, batch * -(-least // batch))  # whole batches
    workers, arrays, rounds = args.workers or min(16, command.available_cpus()), [], 0
    try:
        for job, shape in zip(jobs, shapes):
            shape = (len(paths), *shape)
            arrays.append(RowFile(job.path, shape, dtype, job.about, retry=not args.skip_unreadable))
        with command.bar(sum(array.missing() for array in arrays), what, f" {unit}") as bar:
            bar.disable = bar.disable or rank > 0
            while not all([array.finish(partial(without, job=job)) for job, array in zip(jobs, arrays)]):
                if rounds:
                    time.sleep(0.5)
                if rounds == 60:
                    command.say(f"{what}: waiting for rows that other processes have begun")
                rounds += 1
                with closing(prepared(arrays, blocks, batch, paths, load, stack, workers)) as batches:
                    for which, rows, pictures, errors in batches:
                        leave_out(errors, [arrays[k] for k in which], args.skip_unreadable)
                        for k, values in zip(which, compute(which, rows, pictures) if rows else []):
                            arrays[k].write(rows, values)
                            bar.update(len(rows))
    finally:
        for array in reversed(arrays):  # the first one has made the folders
            array.give_up()


def leave_out(errors, arrays, allowed):
    """The rows of pictures that can't be read, errors: [(row, error)]."""
    for row, error in errors:
        if allowed is None:
            raise error
        if not allowed:
            raise ValueError(f"{error}, or leave it out with --skip-unreadable")
        command.say(f"left out: {error}")
        for array in arrays:
            array.leave_out([row])


def prepared(arrays, blocks, batch, paths, load, stack, workers):
    """Claim block after block; yield (arrays that lack them, rows, their pictures stacked, [(row, error)]).

    While a block is used the next one is decoded and stacked in threads.
    """
    def ready(rows, futures):
        pictures, errors = [], []
        for row, future in zip(rows, futures):
            try:
                pictures.append((row, future.result()))
            except (ValueError, OSError) as error:
                errors.append((row, error))
        rows = [row for row, _ in pictures]
        return rows, stack([picture for _, picture in pictures]) if rows else None, errors

    pool, following = ThreadPoolExecutor(workers), []
    try:
        for block in [*blocks, None]:
            current, following = following, []
            for which, rows in claimed(arrays, *block, batch) if block else []:
                futures = [pool.submit(load, paths[row]) for row in rows]
                following.append((which, pool.submit(ready, rows, futures)))  # its turn comes after theirs
            for which, future in current:
                yield which, *future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def claimed(arrays, start, stop, batch):
    """A block's batches to do, [(numbers of the arrays that lack them, rows)], claimed for this process."""
    lacking, batches = {}, []
    for k, array in enumerate(arrays):
        for row in array.claim(start, stop).tolist():
            lacking.setdefault(row, []).append(k)
    for which, rows in groupby(sorted(lacking), key=lacking.get):
        rows = list(rows)
        batches += [(which, rows[i:i + batch]) for i in range(0, len(rows), batch)]
    return batches
