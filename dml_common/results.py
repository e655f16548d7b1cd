"""What a results folder holds, and whether it belongs together: data sets, networks, arrays with their JSON, tables.

    results/<dataset>/{nrprec,compare,masks,embeddings,sanity,pairs}.csv
    results/<dataset>/<slug>/fold<k>/{emb,maps,maps_ceiling}.npy, their .json, labels.csv, props.csv
    models/trained/<dataset>/<slug>/fold<k>/{config.json,history.csv,histograms.csv}

Serves tables.py, figures.py and report.py. Imports without torch and matplotlib.
"""
import itertools
import math
import re
from pathlib import Path

from dml_common import files
from dml_common.files import losses
from dml_common import pictures as data

HERE = Path(__file__).resolve().parent.parent
TYPES = ("ranking", "classification", "other", "none")  # of losses, in the order of every table and figure
ARRAYS = {"emb": 2, "maps": 3, "maps_ceiling": 3}       # and their dimensions
MAY_DIFFER = ("seed", "noise_of", "ceiling", "limit", "pick")  # options of arrays that belong together; pictures are compared

# What each script's table must have, and which columns of all of them are no numbers.
COLUMNS = {
    "nrprec": ("nrprec.py", ["embeddings", "property", "queries", "r_precision", "nr_precision"]),
    "compare": ("compare.py", ["model_a", "fold_a", "model_b", "fold_b", "n", "left_out", "correlation", "correlation_std", "jsd",
                               "jsd_std", "ceiling", "corrected"]),
    "masks": ("compare.py --masks", ["model", "fold", "measure", "mean", "low", "high"]),
    "embeddings": ("compare.py --embeddings", ["model_a", "fold_a", "model_b", "fold_b", "cka", "overlap"]),
    "sanity": ("saliency.py --randomise", ["model", "fold", "layers", "of", "correlation", "correlation_std"]),
    "pairs": ("pairs.py", ["embeddings", "label", "jsd", "bins", "r_precision", "map_at_r"]),
}
TEXTS = {"loss", "model", "model_a", "model_b", "embeddings", "property", "distance", "null", "label", "measure", "lowest",
         "split"}


def in_order(types):
    """The names of {name: type}: by type, then as in models/losses.csv, then by name."""
    listed = [row["name"] for row in losses()]
    return sorted(types, key=lambda name: (TYPES.index(types[name]), listed.index(name) if name in listed else 99, name))


# ---------------------------------------------------------------- folders


def find_datasets(folder):
    """The data sets' folders in RESULTS, or RESULTS itself. Raises ValueError when there are no results at all."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected results/ or one data set's folder in it")
    if is_dataset(folder):
        return [folder]
    found = [place for place in sorted(folder.iterdir()) if place.is_dir() and is_dataset(place)]
    if not found:
        raise ValueError(f"{folder}: no results; expected {folder}/<dataset>/<loss>/fold<k>/emb.npy or maps.npy, or tables as "
                         f"{folder}/<dataset>/nrprec.csv: python embed.py, nrprec.py, saliency.py and compare.py make them")
    return found


def is_dataset(folder):
    return any((folder / f"{name}.csv").is_file() for name in COLUMNS) or any(fold_folders(folder))


def fold_folders(folder):
    """The networks' folders <slug>/fold<k> of a data set."""
    return [place for place in folder.glob("*/fold*") if re.fullmatch(r"fold\d+", place.name) and place.is_dir()]


def find_networks(folder, models=HERE / "models"):
    """The networks of one data set's folder, ordered as in in_order: dicts.

    Keys: name (its loss, else its backbone), slug, number (k of fold<k>), fold (the same; None without a
    loss), type, distance, folder, config (of its training, or {}), history (a path or None), and for each of ARRAYS its
    JSON (read_about), or None where there is no array.
    """
    known, homes = losses(), [Path(), folder, *folder.resolve().parents[:3], HERE]
    networks = [read_network(place, known, homes, models / "trained" / folder.resolve().name) for place in fold_folders(folder)]
    order = in_order({network["name"]: network["type"] for network in networks})
    return sorted(networks, key=lambda network: (order.index(network["name"]), network["slug"], network["number"]))


def read_network(place, known, homes, trained):
    """One <slug>/fold<k> folder. known: losses(); homes: where the JSON's checkpoint may lie; trained: of this data set."""
    slug, number = place.parent.name, int(place.name[4:])
    about = files.read_sidecar(place / "emb.npy") or files.read_sidecar(place / "maps.npy")
    row = next((row for row in known if row["slug"] == slug), None)
    name = str(about.get("loss") or (row["name"] if row else about.get("backbone")) or slug)
    row = next((row for row in known if row["name"] == name), row)
    plain = about.get("backbone") and not about.get("loss") and not row  # a backbone without a loss
    home = training_folder(place, about, homes, trained)
    config, history = files.read_sidecar(home / "config.json"), home / "history.csv"
    kind = row["type"] if row else "none" if plain else config.get("type")
    return {"name": name, "slug": slug, "number": number, "fold": None if plain else number, "folder": place, "config": config,
            "type": kind if kind in TYPES else "other",
            "distance": str(about.get("distance") or (row["distance"] if row else "")) or None,
            "history": history if history.is_file() else None,
            **{array: read_about(place / f"{array}.npy") if (place / f"{array}.npy").is_file() else None for array in ARRAYS}}


def training_folder(place, about, homes, trained):
    """The folder of a network's config.json and history.csv: the JSON's checkpoint, wherever models/ lies now."""
    if not about.get("checkpoint"):
        return trained / place.parent.name / place.name
    checkpoint = Path(str(about["checkpoint"]))
    places, parts = [home / checkpoint for home in homes], checkpoint.parts
    if "trained" in parts:
        places.append(trained.parent.joinpath(*parts[parts.index("trained") + 1:]))
    return next((found for found in places if (found / "config.json").is_file()), places[-1])


def read_about(path):
    """The JSON beside an array, with the array's path; its parts are dictionaries, whatever stands there."""
    about = {key: value for key, value in files.read_sidecar(path).items()
             if isinstance(value, dict) or key not in ("options", "pictures", "preprocessing", "versions")}
    return {"options": {}, "pictures": {}, **about, "path": path}


def open_arrays(networks):
    """Add to each array's JSON its array, memory-mapped; a broken one becomes None.

    Returns [(path, what is wrong with it) …] of broken and of half-finished arrays.
    """
    wrong = []
    for network, kind in itertools.product(networks, ARRAYS):
        path = network["folder"] / f"{kind}.npy"
        if network[kind]:
            try:
                network[kind]["array"] = open_array(network[kind], ARRAYS[kind])
            except (ValueError, OSError) as error:
                wrong.append((path, f"{error}; left out"))
                network[kind] = None
        elif path.with_name(f"{path.name}.part").exists():
            wrong.append((path, f"{path} is half-finished ({path.name}.part is there); left out: the command that makes it "
                                "continues it"))
    return wrong


def open_array(about, dimensions):
    """The array of this JSON. Raises ValueError or OSError when it is broken, or not what the JSON tells of."""
    array, listed, options = files.read_array(about["path"]), about["pictures"], about["options"]
    number = listed.get("number", len(array) if array.ndim else 0)
    if array.ndim != dimensions or array.dtype.kind not in "fiub" or 0 in array.shape or number != len(array):
        raise ValueError(f"{about['path']}: shape {array.shape} of {array.dtype}, {number} pictures in its JSON; expected "
                         f"{dimensions} dimensions of numbers, a row a picture")
    left_out, pick, limit = listed.get("left_out") or [], options.get("pick") or [], options.get("limit") or 0
    if not (isinstance(left_out, list) and isinstance(pick, list) and all(isinstance(row, int) for row in [*pick, limit])):
        raise ValueError(f"{about['path']}: the lists in its JSON are none; restore the file that was written with the array")
    return array


def trained_files(models, dataset, networks, file):
    """(path, network's name, k) of a file in models/trained/<dataset>/<slug>/fold<k>/, of every network that has it."""
    folder = next((place for place in (models / "trained" / dataset, models / dataset) if place.is_dir()), None)
    names = {row["slug"]: row["name"] for row in losses()} | {network["slug"]: network["name"] for network in networks}
    for path in sorted(folder.glob(f"*/fold*/{file}")) if folder else []:
        slug = path.parent.parent.name
        yield path, names.get(slug, slug), path.parent.name[4:]


# ---------------------------------------------------------------- what belongs together


def check_together(networks):
    """Raise ValueError naming two arrays of one data set made with other options, from other pictures (of one fold) or from
    other checkpoints (of one network)."""
    for kind in ("emb", "maps"):
        arrays = [(network["fold"], network[one]) for network in networks for one in ARRAYS
                  if one.startswith(kind) and network[one]]
        for (fold, a), (other, b) in itertools.combinations(arrays, 2):
            different = a["pictures"] and b["pictures"] and differences(a["options"], b["options"])
            if different:
                raise ValueError(f"{a['path']} and {b['path']} don't belong together: other options ({'; '.join(different)}); "
                                 "make both with the same options, or give them folders of their own")
            if (fold == other or None in (fold, other)) and other_pictures(a, b):
                numbers = ", ".join(str(one["pictures"].get("number")) for one in (a, b))
                raise ValueError(f"{a['path']} and {b['path']} don't belong together: other lists of pictures ({numbers}); "
                                 "make both from the same pictures, or take one of them out of the folder")
    for network in networks:
        a, b = (network[kind] and network[kind].get("checkpoint_sha256") for kind in ("emb", "maps"))
        if a and b and a != b:
            raise ValueError(f"{network['emb']['path']} and {network['maps']['path']} come from different checkpoints (their "
                             "checkpoint_sha256 differ); make both from the same network")


def differences(a, b):
    """What differs between two arrays' options, but for what may."""
    return [f"{key}: {a.get(key)}, {b.get(key)}" for key in {**a, **b} if key not in MAY_DIFFER and a.get(key) != b.get(key)]


def other_pictures(a, b):
    """Do two arrays' JSONs, or where they are open their lengths, tell of different lists of pictures?"""
    told = [(one["pictures"].get("sha256"), len(one["array"]) if "array" in one else None) for one in (a, b)]
    return any(None not in pair and pair[0] != pair[1] for pair in zip(*told))


# ---------------------------------------------------------------- rows and pictures


def open_pictures(given, root, names):
    """{a data set's name in RESULTS: its pictures}: of the given folders, else the published ones that are here."""
    opened = [data.open_dataset(place, root, "all") for place in given]
    if len(given) == len(names) == 1:
        return {names[0]: opened[0]}  # the folder may have been renamed
    for place, pictures in zip(given, opened):
        if pictures.name not in names:
            raise ValueError(f"--dataset {place} is the data set {pictures.name}; RESULTS has {', '.join(names) or 'no arrays'}: "
                             "give the folder of one")
    found = {pictures.name: pictures for pictures in opened}
    for name in names:
        if name in data.PUBLISHED and name not in found:
            try:
                found[name] = data.open_dataset(name, root, "all")
            except (OSError, ValueError):
                pass  # nobody asked for it: what needs it is left out
    return found


def picture_names(about, n, dataset=None):
    """The names of the pictures that an array's n rows are, in their order; None where no list agrees with its JSON.

    The lists are labels.csv's beside the array and the data set's.
    """
    listed, rows, beside = about["pictures"], about.get("rows"), about["path"].parent / "labels.csv"
    lists = [files.read_table(beside)] if beside.is_file() else []
    lists = [table.get("path", next(iter(table.values()))) for table in lists]
    if dataset is not None:
        lists.append(dataset.relative)
        if isinstance(rows, list) and all(isinstance(row, int) and row < len(dataset.relative) for row in rows):
            lists.append([dataset.relative[row] for row in rows])  # held out when the network was trained
    left_out = set(map(str, listed.get("left_out") or []))
    for names in lists:
        rows = about["options"].get("pick") or range(len(names))[:about["options"].get("limit")]
        chosen = [names[row] for row in rows if row < len(names) and names[row] not in left_out]
        for candidate in (chosen, names):
            if len(candidate) == n and listed.get("sha256") in (None, data.pictures_sha256(candidate)):
                return candidate
    return None


# ---------------------------------------------------------------- tables


def read_columns(path, script, required, numbers=None):
    """A result table -> {column: list}: float, None where empty or not finite, in the columns `numbers`; str in the others.

    numbers: all but TEXTS where it is None. Raises ValueError naming the file, and the line or the column, when it is not
    what the script writes.
    """
    columns = files.read_table(path)
    absent = [name for name in required if name not in columns]
    if absent:
        raise ValueError(f"{path} lacks the column{'s' * (len(absent) > 1)} {', '.join(absent)}; expected the table that "
                         f"{script} writes")
    for name in [name for name in columns if name not in TEXTS] if numbers is None else numbers:
        columns[name] = [number(value, path, name, row) for row, value in enumerate(columns[name])]
    return columns


def read_rows(path, script, required):
    """The same as a dict for each row, a column fold as int or None."""
    columns = read_columns(path, script, required)
    for name in columns:
        if name.startswith("fold"):
            columns[name] = [None if fold is None else int(fold) for fold in columns[name]]
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def number(text, path, column, row):
    """The number a field holds; None where it is empty or not finite."""
    try:
        value = float(text or "nan")
    except ValueError:
        raise ValueError(f"{path}: row {row} (counting from 0), column {column} is {text!r}; expected a number") from None
    return value if math.isfinite(value) else None


def whose(text, networks):
    """(name, fold or None) of what a table's row calls a network: its name, or the path of its array."""
    if not text.endswith(".npy"):
        return text, None
    slug, fold = ("", "", *Path(text).parts)[-3:-1]
    for network in networks:
        if (network["slug"], network["folder"].name) == (slug, fold):
            return network["name"], network["fold"]
    names = {network["name"] for network in networks}
    only = names.pop() if len(names) == 1 and not re.fullmatch(r"fold\d+", fold) else None
    return str(files.read_sidecar(text).get("backbone") or only or text), None


def check_alike(path, columns):
    """Raise ValueError when one of these columns of a table has several values: rows made with other options."""
    for key, values in columns.items():
        values = dict.fromkeys(str(value or "none") for value in values)
        if len(values) > 1:
            raise ValueError(f"{path} mixes {key} {' and '.join(values)}: such rows do not belong together; make all with the "
                             "same options")
