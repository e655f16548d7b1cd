"""What a results folder holds, as one tidy table with averages, marks and tests: all arithmetic on results is here.

    results/<dataset>[@<split>]/{nrprec,compare,masks,embeddings,sanity,pairs}.csv
    results/<dataset>/<slug>/fold<k>[.seed<s>]/{emb,maps,maps_ceiling}.npy, their .json, labels.csv, props.csv
    models/trained/<dataset>/<slug>/fold<k>/{config.json,history.csv,histograms.csv}

    results, = read_all(Path("results/cars"), Path("models"))
    for row in results.select("nr_precision", fold="mean"):
        print(row.network, row.key, row.value, row.low, row.high, row.mark)

tables.py, figures.py and report.py lay out what stands in `Results.rows`. Averages are over the seeds of a fold, then
over folds; correlations are averaged through Fisher's z. The unit of the tests is the loss. No torch, no matplotlib.
"""
import itertools
import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import stats

from dml_common import files, pictures

TYPES = ("ranking", "classification", "other", "none")  # of losses, in the order of every table and figure
ARRAYS = {"emb": 2, "maps": 3, "maps_ceiling": 3}  # and their dimensions
MAY_DIFFER = ("seed", "noise_of", "ceiling", "limit", "pick")  # options of arrays that belong together

CLIP = 1 - 1e-6       # r = ±1 is cut to ±0.999999, so that Fisher's z stays finite (as in compare.py)
MARK = 2.576          # of one z-score at 1 %: the published mark of NR-Prec
SIGNIFICANCE = 0.01   # of nrprec.py's p_holm, and of the released tests
LEVEL = 0.05          # of the tests of ranking against classification, after Holm
MOST = 99_999         # partitions or permutations tried: an exact test where there are no more, else random ones
PERMUTATIONS = 9999   # of the order of properties, and of the losses' groups

# What each script's table must have, and which columns of all of them are no numbers.
PAIR = ["model_a", "fold_a", "model_b", "fold_b"]
TABLES = {
    "nrprec": ("nrprec.py", ["embeddings", "property", "queries", "r_precision", "nr_precision"]),
    "compare": ("compare.py", [*PAIR, "n", "left_out", "correlation", "correlation_std", "jsd", "jsd_std", "ceiling",
                               "corrected"]),
    "masks": ("compare.py --masks", ["model", "fold", "measure", "mean", "low", "high"]),
    "embeddings": ("compare.py --embeddings", [*PAIR, "cka", "overlap"]),
    "sanity": ("saliency.py --randomise", ["model", "fold", "layers", "of", "correlation", "correlation_std"]),
    "pairs": ("pairs.py", ["embeddings", "label", "jsd", "bins", "r_precision", "map_at_r"]),
}
TEXTS = {"loss", "model", "model_a", "model_b", "embeddings", "property", "distance", "null", "label", "measure", "lowest",
         "split", "fold", "fold_a", "fold_b"}
PAIR_MEASURES = {"compare": ("correlation", "jsd", "ceiling", "corrected"),
                 "embeddings": ("cka", "overlap", "overlap_chance")}
SCORES = ("recall_at_1", "map_at_r", "jsd", "jsd_null", "r_precision", "positive_mean", "negative_mean")  # of pairs.csv
TESTED = ("recall_at_1", "map_at_r", "jsd", "r_precision")
CURVES = ("loss", "positive_mean", "negative_mean", "jsd", "recall_at_1", "map_at_r")  # of history.csv
FISHER = ("correlation", "ceiling", "sanity")  # correlations
POOLED = ("correlation", "jsd", "sanity")      # their spread is over pictures: folds are taken together


class Row(NamedTuple):
    """One fact. What does not apply is None.

    measure and key:
        nr_precision, r_precision    key: the property
        correlation, jsd, ceiling, corrected, cka, overlap, overlap_chance: of two networks, `network` and `other`
        masks       key: share, area, other, excess, pointing, pointing_other
        sanity      key: "25 of 50" layers randomised
        pairs       key: one of SCORES
        training    key: one of CURVES; part: train, validation or test; epoch: 0, 1, …; of test 0 and "best"
        order, same type, same distance: the other tests (level "test")
    level:
        network     one network, or two. fold: k as read, "0/1" (a pair of two folds), None (a network without folds);
                    or "mean" over n folds. low, high: as read the 95 % interval over pictures or queries; of "mean" the
                    range over folds, of one fold its interval, of masks the 95 % interval over all folds' pictures.
                    spread: as read ± over pictures, of masks the standard error; of "mean" over all folds' pictures
                    (correlation, jsd, sanity), of masks the standard error, else the folds' standard deviation
        type        mean over a type's networks, `network`: the type; spread: their standard deviation; low, high:
                    Student's 95 % interval over them. Of pairs: over those of two different networks, `network` and
                    `other`: the types; spread: a pair's typical ±; low, high: the pairs' range. n: networks or pairs
        distance    of pairs: the same by the losses' distances
        all         the same over all networks with a loss, or over all where none has one
        test        ranking against classification losses: rank-biserial correlation, p, p_holm; mark: the larger type
        released    the same as in the first paper's code: difference of the means, p; mark: the larger type
    mark of nr_precision: "*" above chance (fold "mean"), "13 of 14" above chance (type, all).
    """

    dataset: str
    measure: str
    key: str = None
    level: str = "network"
    network: str = None
    other: str = None
    type: str = None
    fold: object = None
    split: str = None      # of the classes or pictures: random of cars@random; of training rows as config.json tells
    seed: int = None
    part: str = None
    epoch: object = None
    value: float = None
    spread: float = None
    low: float = None
    high: float = None
    n: float = None
    p: float = None
    p_holm: float = None   # of "mean" and "all": the largest
    mark: str = ""
    note: str = ""


@dataclass
class Results:
    """One data set's results."""

    name: str         # of its folder: cars, cars@random
    folder: Path
    networks: list    # of find_networks, their arrays open
    tables: dict      # {"nrprec": [row as read …] …} of the tables that are there
    types: dict       # {network: type}, in the order of tables and figures
    distances: dict   # {network: distance}
    properties: dict  # {property: its values} of props.csv, {} without one
    rows: list = field(default_factory=list)      # of Row
    warnings: list = field(default_factory=list)  # what a reader must know, a line each
    missing: list = field(default_factory=list)   # dicts dataset, table, what

    def select(self, measure, level="network", **columns):
        """The rows of a measure whose columns have these values."""
        return [row for row in self.rows if row.measure == measure and row.level == level
                and all(getattr(row, name) == value for name, value in columns.items())]

    def cells(self, measure, level="network", **columns):
        """{(network, key), of pairs (network, other): row}: means over folds, or a level's rows."""
        fold = {"fold": "mean"} if level == "network" else {}
        rows = self.select(measure, level, **fold, **columns)
        return {(row.network, row.other or row.key): row for row in rows}

    def names(self, measure):
        """The networks that have rows of a measure, in order."""
        here = {name for row in self.select(measure, fold="mean") for name in (row.network, row.other)}
        return [name for name in self.types if name in here]

    def keys(self, measure):
        """The keys of a measure, in the order of its table."""
        return list(dict.fromkeys(row.key for row in self.select(measure)))

    def matrix(self, measure, names, column="value"):
        """Means over folds of pairs as float64 (K, K), symmetrical; nan where there is none."""
        values = np.full((len(names), len(names)), np.nan)
        for (a, b), row in self.cells(measure).items():
            if a in names and b in names and getattr(row, column) is not None:
                i, j = names.index(a), names.index(b)
                values[i, j] = values[j, i] = getattr(row, column)
        return values

    def lacks(self, table, what):
        self.missing.append({"dataset": self.name, "table": table, "what": what})


def read_all(folder, models):
    """RESULTS, or one data set's folder in it -> [Results …]. models: has trained/<dataset>/<slug>/fold<k>/.

    Raises ValueError when there are no results, and for arrays and tables that don't belong together.
    """
    return [read(place, models) for place in find_datasets(folder)]


def read(folder, models):
    """One data set's folder -> Results."""
    name, networks = folder.resolve().name, find_networks(folder, models)
    wrong = open_arrays(networks)
    check_together(networks)
    tables = {table: name_rows(read_rows(folder / f"{table}.csv", *about), networks) for table, about in TABLES.items()
              if (folder / f"{table}.csv").is_file()}
    known = files.losses() + networks
    kinds, distances = {row["name"]: row["type"] for row in known}, {row["name"]: row["distance"] for row in known}
    present = {network["name"] for network in networks}
    for rows in tables.values():
        present |= {row[key] for row in rows for key in ("network", "other") if key in row}
    types = {one: kinds.get(one, "other") for one in in_order({one: kinds.get(one, "other") for one in present})}
    results = Results(name, folder, networks, tables, types, distances, read_properties(folder, networks))
    for _, what in sorted(wrong, key=lambda one: pictures.natural_key(one[0].as_posix())):
        results.lacks("", what)
    check_rows(results)
    results.rows = tidy(results)
    return results


def in_order(types):
    """The names of {name: type}: by type, then as in models/losses.csv, then by name."""
    listed = [row["name"] for row in files.losses()]
    return sorted(types, key=lambda name: (TYPES.index(types[name]), listed.index(name) if name in listed else 99, name))


# ---------------------------------------------------------------- folders


def find_datasets(folder):
    """The data sets' folders in RESULTS, or RESULTS itself. Raises ValueError when there are no results at all."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected results/ or one data set's folder in it")
    if is_dataset(folder):
        return [folder]
    places = [place for place in sorted(folder.iterdir()) if place.is_dir() and is_dataset(place)]
    if not places:
        raise ValueError(f"{folder}: no results; expected {folder}/<dataset>/<loss>/fold<k>/emb.npy or maps.npy, or tables "
                         f"as {folder}/<dataset>/nrprec.csv: python embed.py, nrprec.py, saliency.py and compare.py make them")
    return places


def is_dataset(folder):
    return any((folder / f"{name}.csv").is_file() for name in TABLES) or any(fold_folders(folder))


def fold_folders(folder):
    """The networks' folders <slug>/fold<k>[.seed<s>] of a data set."""
    return [place for place in folder.glob("*/fold*") if fold_and_seed(place.name)[0] is not None and place.is_dir()]


def fold_and_seed(text):
    """"fold0.seed2", "0.seed2" -> (0, 2), "fold0", "0" -> (0, None), anything else (None, None)."""
    match = re.fullmatch(r"(?:fold)?(\d+)(?:\.seed(\d+))?", text)
    return tuple(one and int(one) for one in match.groups()) if match else (None, None)


def find_networks(folder, models=files.ROOT / "models"):
    """The networks of one data set's folder, ordered as in in_order: dicts.

    Keys: name (its loss, else its backbone; its slug where two share that), slug, number and seed (of fold<k>.seed<s>),
    fold (k; None without a loss), type, distance, folder, config (of its training, or {}), history (a path or None), and
    for each of ARRAYS its JSON (read_about), or None where there is no array.
    """
    homes = [Path(), folder, *folder.resolve().parents[:3], files.ROOT]  # where a JSON's checkpoint may lie
    trained = models / "trained" / folder.resolve().name
    networks = [read_network(place, homes, trained) for place in fold_folders(folder)]
    slugs = defaultdict(set)
    for network in networks:
        slugs[network["name"]].add(network["slug"])
    for network in networks:
        network["name"] = network["slug"] if len(slugs[network["name"]]) > 1 else network["name"]
    order = in_order({network["name"]: network["type"] for network in networks})
    return sorted(networks, key=lambda one: (order.index(one["name"]), one["number"], one["seed"] or 0))


def read_network(place, homes, trained):
    """One <slug>/fold<k> folder as find_networks tells."""
    slug, known, (number, seed) = place.parent.name, files.losses(), fold_and_seed(place.name)
    about = files.read_sidecar(place / "emb.npy") or files.read_sidecar(place / "maps.npy")
    row = next((row for row in known if row["slug"] == slug), {})
    name = str(about.get("loss") or row.get("name") or about.get("backbone") or slug)
    row = next((row for row in known if row["name"] == name), row)
    plain = about.get("backbone") and not about.get("loss") and not row  # a backbone without a loss
    home = training_folder(place, about, homes, trained)
    config, history = files.read_sidecar(home / "config.json"), home / "history.csv"
    kind = row.get("type") or ("none" if plain else config.get("type"))
    return {"name": name, "slug": slug, "number": number, "seed": seed, "fold": None if plain else number, "folder": place,
            "config": config, "type": kind if kind in TYPES else "other",
            "distance": str(about.get("distance") or row.get("distance") or "") or None,
            "history": history if history.is_file() else None,
            **{array: read_about(place / f"{array}.npy") for array in ARRAYS}}


def training_folder(place, about, homes, trained):
    """The folder of a network's config.json and history.csv: the JSON's checkpoint, wherever models/ lies now."""
    if not about.get("checkpoint"):
        return trained / place.parent.name / place.name
    checkpoint = Path(str(about["checkpoint"]))
    places, parts = [home / checkpoint for home in homes], checkpoint.parts
    if "trained" in parts:
        places.append(trained.parent.joinpath(*parts[parts.index("trained") + 1:]))
    return next((home for home in places if (home / "config.json").is_file()), places[-1])


def read_about(path):
    """The JSON beside an array, with the array's path; None without the array. Its parts are dictionaries."""
    about = {key: value for key, value in files.read_sidecar(path).items()
             if isinstance(value, dict) or key not in ("options", "pictures", "preprocessing", "versions")}
    return {"options": {}, "pictures": {}, **about, "path": path} if path.is_file() else None


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
            wrong.append((path, f"{path} is half-finished ({path.name}.part is there); left out: the command that makes "
                                "it continues it"))
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
        raise ValueError(f"{about['path']}: the lists in its JSON are none; restore the file written with the array")
    return array


# ---------------------------------------------------------------- what belongs together


def check_together(networks):
    """Raise ValueError naming two arrays of one data set made with other options, from other pictures (of one fold) or
    from other checkpoints (of one network)."""
    for kind in ("emb", "maps"):
        arrays = [(network["fold"], network[one]) for network in networks for one in ARRAYS
                  if one.startswith(kind) and network[one]]
        for (fold, a), (other, b) in itertools.combinations(arrays, 2):
            options = {**a["options"], **b["options"]}.keys() - MAY_DIFFER if a["pictures"] and b["pictures"] else ()
            different = [f"{key}: {a['options'].get(key)}, {b['options'].get(key)}" for key in sorted(options)
                         if a["options"].get(key) != b["options"].get(key)]
            if different:
                raise ValueError(f"{a['path']} and {b['path']} don't belong together: other options "
                                 f"({'; '.join(different)}); make both with the same options, or give them folders of "
                                 "their own")
            if (fold == other or None in (fold, other)) and other_pictures(a, b):
                numbers = ", ".join(str(one["pictures"].get("number")) for one in (a, b))
                raise ValueError(f"{a['path']} and {b['path']} don't belong together: other lists of pictures ({numbers}); "
                                 "make both from the same pictures, or take one of them out of the folder")
    for network in networks:
        a, b = (network[kind] and network[kind].get("checkpoint_sha256") for kind in ("emb", "maps"))
        if a and b and a != b:
            raise ValueError(f"{network['emb']['path']} and {network['maps']['path']} come from different checkpoints "
                             "(their checkpoint_sha256 differ); make both from the same network")


def other_pictures(a, b):
    """Do two arrays' JSONs, or where they are open their lengths, tell of different lists of pictures?"""
    lists = [(one["pictures"].get("sha256"), len(one["array"]) if "array" in one else None) for one in (a, b)]
    return any(None not in pair and pair[0] != pair[1] for pair in zip(*lists))


def check_rows(results):
    """Raise ValueError when a table mixes options, or tells of other pictures than the arrays that lie there."""
    for table, keys in ("nrprec", ("distance", "null", "max_neighbours")), ("pairs", ("label",)):
        for key in keys:
            values = dict.fromkeys(str(row.get(key) or "none") for row in results.tables.get(table, []))
            if len(values) > 1:
                raise ValueError(f"{results.folder / table}.csv mixes {key} {' and '.join(values)}: such rows do not belong "
                                 "together; make all with the same options")
    lengths = {(network["name"], network["fold"], network["seed"], kind): len(network[kind]["array"])
               for network in results.networks for kind in ("emb", "maps") if network[kind]}
    counts = [("nrprec", (row["network"], row["fold"], row["seed"], "emb"), row["queries"] + (row.get("skipped") or 0))
              for row in results.tables.get("nrprec", []) if row["queries"] and row.get("nr_precision_se") is None]
    counts += [("compare", (row[name], row[f"fold{end}"], row[f"seed{end}"], "maps"), row["n"] + row["left_out"])
               for row in results.tables.get("compare", []) for name, end in (("network", "_a"), ("other", "_b"))]
    for table, place, n in counts:
        if lengths.get(place, n) != n:
            raise ValueError(f"{results.folder / table}.csv counts {n:,.0f} pictures for {place[0]}, its {place[-1]}.npy has "
                             f"{lengths[place]:,}: they do not belong together; run {table}.py again")


# ---------------------------------------------------------------- rows and pictures


def open_pictures(given, root, names):
    """{a data set's name in RESULTS: its pictures}: of the given folders, else the published ones that are here."""
    opened = [pictures.open_dataset(place, root, "all") for place in given]
    if len(given) == len(names) == 1:
        return {names[0]: opened[0]}  # the folder may have been renamed
    for place, dataset in zip(given, opened):
        if dataset.name not in names:
            raise ValueError(f"--dataset {place} is the data set {dataset.name}; RESULTS has "
                             f"{', '.join(names) or 'no arrays'}: give the folder of one")
    datasets = {dataset.name: dataset for dataset in opened}
    for name in names:
        if name in pictures.PUBLISHED and name not in datasets:
            try:
                datasets[name] = pictures.open_dataset(name, root, "all")
            except (OSError, ValueError):
                pass  # nobody asked for it: what needs it is left out
    return datasets


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
            if len(candidate) == n and listed.get("sha256") in (None, pictures.pictures_sha256(candidate)):
                return candidate
    return None


def read_properties(folder, networks):
    """{property: set of its values} of the data set's props.csv and of its folds'; {} without one."""
    first = {network["fold"]: network["folder"] for network in reversed(networks)
             if (network["folder"] / "props.csv").is_file()}  # the networks of one fold have the same pictures
    properties = {}
    for path in [folder / "props.csv", *(place / "props.csv" for place in first.values())]:
        if path.is_file():
            for name, values in files.read_properties(path).items():
                properties.setdefault(name, set()).update(values.tolist())
    return properties


# ---------------------------------------------------------------- tables as they are


def read_rows(path, script, required):
    """A result table -> [{column: number, None where empty or not finite; str in the columns TEXTS} …].

    Raises ValueError naming the file, and the row or the column, when it is not what the script writes.
    """
    columns = files.read_table(path)
    absent = [name for name in required if name not in columns]
    if absent:
        raise ValueError(f"{path} lacks columns: {', '.join(absent)}; expected the table that {script} writes")
    texts = TEXTS - {"loss"} if "epoch" in columns else TEXTS  # of a history: its value, elsewhere its name
    for name in columns.keys() - texts:
        columns[name] = [number(value, path, name, row) for row, value in enumerate(columns[name])]
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def number(text, path, column, row):
    """The number a field holds; None where it is empty or not finite."""
    try:
        value = float(text or "nan")
    except ValueError:
        raise ValueError(f"{path}: row {row} (counting from 0), column {column} is {text!r}; expected a number") from None
    return value if math.isfinite(value) else None


def name_rows(rows, networks):
    """The rows with whose they are: network, fold and seed, of pairs also other, fold_b and seed_b."""
    for row in rows:
        if "model_a" in row:
            row["network"], row["other"] = (whose(row[key], networks)[0] for key in ("model_a", "model_b"))
            for end in "_a", "_b":
                row[f"fold{end}"], row[f"seed{end}"] = fold_and_seed(row[f"fold{end}"])
        elif row.get("loss") or "model" in row:  # loss: of older tables
            row["network"] = whose(row.get("loss") or row["model"], networks)[0]
            row["fold"], row["seed"] = fold_and_seed(row.get("fold") or "")
        else:
            row["network"], row["fold"], row["seed"] = whose(row["embeddings"], networks)
    return rows


def whose(text, networks):
    """(name, fold or None, seed or None) of what a row calls a network: its name, or the path of its array."""
    if not text.endswith(".npy"):
        return text, None, None
    slug, place = ("", "", *Path(text).parts)[-3:-1]
    for network in networks:
        if (network["slug"], network["folder"].name) == (slug, place):
            return network["name"], network["fold"], network["seed"]
    about, (fold, seed) = files.read_sidecar(text), fold_and_seed(place)
    name = about.get("loss") or next((row["name"] for row in files.losses() if row["slug"] == slug), None)
    if name and place.startswith("fold") and fold is not None:
        return str(name), fold, seed
    names = {network["name"] for network in networks}
    only = names.pop() if len(names) == 1 and fold is None else None
    return str(about.get("backbone") or only or text), None, None


# ---------------------------------------------------------------- the tidy table


def tidy(results):
    """All rows of a data set: as read, their means over folds, those over groups of networks, and the tests."""
    dataset, _, split = results.name.partition("@")
    base = Row(dataset, "", split=split or None)
    rows = [base._replace(**facts) for facts in [*table_facts(results), *training_facts(results)]]
    rows = [row for row in rows if row.value is not None]
    means = fold_means(results, rows)
    groups = [base._replace(**facts) for facts in group_facts(results, means)]
    tests = [base._replace(**facts) for measure, keys in (("nr_precision", None), ("pairs", TESTED))
             for facts in type_tests(rows, means, measure, keys)]
    others = [base._replace(level="test", **facts) for facts in other_tests(results, means, groups)]
    return rows + means + groups + tests + others


def table_facts(results):
    """What the tables say, as columns of Row."""
    order = list(results.types)
    for table, lines in results.tables.items():
        for line in whole_pairs(lines) if table == "pairs" else lines:
            facts = {"network": line["network"], "fold": line.get("fold"), "seed": line.get("seed"),
                     "n": line.get("n")}
            facts["type"] = results.types[line["network"]]
            if table in PAIR_MEASURES:
                ends = [(line[name], line[f"fold{end}"], line[f"seed{end}"])
                        for name, end in (("network", "_a"), ("other", "_b"))]
                (a, *first), (b, *second) = sorted(ends, key=lambda end: (order.index(end[0]), end[1] or 0, end[2] or 0))
                facts |= {"network": a, "other": b, "fold": joined(first[0], second[0]),
                          "seed": joined(first[1], second[1]), "type": results.types[a]}
                for measure in PAIR_MEASURES[table]:
                    columns = {"value": "", "spread": "_std", "low": "_low", "high": "_high"}
                    yield {**facts, "measure": measure,
                           **{name: line.get(measure + end) for name, end in columns.items()}}
            elif table == "nrprec":
                facts |= {"key": line["property"], "n": line["queries"]}
                yield {**facts, "measure": "r_precision", "value": line["r_precision"]}
                yield {**facts, "measure": "nr_precision", "p": line.get("p_value"), "p_holm": line.get("p_holm"),
                       **around(line["nr_precision"], line.get("nr_precision_se"))}
            elif table == "masks":
                error = line["std"] / math.sqrt(line["n"] - 1) if line.get("std") and line["n"] > 1 else None
                yield {**facts, "measure": "masks", "key": line["measure"], "value": line["mean"], "spread": error,
                       "low": line["low"], "high": line["high"]}
            elif table == "sanity":
                yield {**facts, "measure": "sanity", "key": f"{line['layers']:.0f} of {line['of']:.0f}",
                       "value": line["correlation"], "spread": line["correlation_std"]}
            else:
                for score in SCORES:
                    yield {**facts, "measure": "pairs", "key": score, "value": line.get(score)}


def joined(a, b):
    """The fold (or seed) of a pair: that of both, of the one that has one, or "0/1"."""
    return a if a == b or b is None else b if a is None else f"{a}/{b}"


def around(value, error):
    """A value with its 95 % interval, where its standard error is known."""
    if value is None or error is None:
        return {"value": value}
    return {"value": value, "low": value - 1.96 * error, "high": value + 1.96 * error}


def whole_pairs(lines):
    """The rows of pairs.csv of all classes of the test split, at one number of bins: 200, else the first."""
    lines = [line for line in lines if line.get("split") in (None, "", "test") and line.get("repeat") is None]
    bins = list(dict.fromkeys(line["bins"] for line in lines))
    return [line for line in lines if line["bins"] == (200 if 200 in bins else bins[0])]


def training_facts(results):
    """What the training histories say, as columns of Row."""
    for network in results.networks:
        lines = network["history"] and read_rows(network["history"], "train.py", ["epoch", "split", *CURVES[3:]])
        split = network["config"].get("split", {})
        split = split.get("kind") if isinstance(split, dict) else split
        last = max((line["epoch"] for line in lines or () if line["split"] == "test"), default=0)
        for line in lines or ():
            epoch = int(line["epoch"])
            if line["split"] == "test" and epoch:
                if epoch < last:
                    continue
                epoch = "best"
            for key in CURVES:
                yield {"measure": "training", "key": key, "network": network["name"], "type": network["type"],
                       "fold": network["fold"], "seed": network["seed"], "part": line["split"], "epoch": epoch,
                       "value": line.get(key), "split": split}


# ---------------------------------------------------------------- averages


def average(values, spreads, fisher=False, between=True):
    """Mean of folds or pairs that count alike, and the standard deviation over all their pictures taken together.

    fisher: both through Fisher's z; the spreads are tanh of the standard deviation of z, as compare.csv has them.
    between: else the spread is the typical one of the parts, without how they differ.
    """
    values, spreads = np.asarray(values, float), np.asarray(spreads, float)
    if fisher:
        values, spreads = np.arctanh(np.clip(values, -CLIP, CLIP)), np.arctanh(np.clip(spreads, -CLIP, CLIP))
    variances = spreads**2 + (values - values.mean())**2 if between else spreads**2
    mean, spread = float(values.mean()), float(np.sqrt(variances.mean()))
    return (math.tanh(mean), math.tanh(spread)) if fisher else (mean, spread)


def deviation(values):
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def fold_means(results, rows):
    """A row fold="mean" of every network (or pair), measure and key. ValueError where a fold stands there twice."""
    groups = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        split = row.split if row.measure == "training" else None
        seeds = groups[row.measure, row.key, row.network, row.other, row.part, row.epoch, split][row.fold]
        if row.seed in seeds:
            what = ", ".join(str(one) for one in (row.network, row.other, f"fold {row.fold}", row.key) if one)
            raise ValueError(f"{results.folder} has two rows for {what}; two networks of one name do not belong together: "
                             "rename one")
        seeds[row.seed] = row
    tested = all(row.p_holm is not None for row in rows if row.measure == "nr_precision")
    means = []
    for folds in groups.values():
        parts = [combined(list(seeds.values())) if len(seeds) > 1 else next(iter(seeds.values()))
                 for seeds in folds.values()]
        mean = combined(parts)._replace(fold="mean", seed=None, p=None, n=len(parts))
        if mean.measure == "nr_precision" and above_chance(mean, tested):
            mean = mean._replace(mark="*")
        means.append(mean)
    return means


def combined(rows):
    """One row for several folds, or for several seeds of one fold."""
    first, values = rows[0], [row.value for row in rows]
    spreads = [row.spread or 0 for row in rows]
    value, spread = average(values, spreads, first.measure in FISHER)
    if first.measure == "masks":
        known = all(row.spread is not None for row in rows)
        error = math.hypot(*spreads) / len(rows) if known else None
        return first._replace(spread=error, **around(value, error))
    if first.measure not in POOLED:
        spread = deviation(values)
    low, high = (first.low, first.high) if len(rows) == 1 else (min(values), max(values))
    holms = [row.p_holm for row in rows if row.p_holm is not None]
    return first._replace(value=value, spread=spread, low=low, high=high, p_holm=max(holms, default=None))


def above_chance(mean, tested):
    """Is a network's mean NR-Prec above chance? tested: all have a p_holm; it counts in every fold, and a two-sided
    p-value may also tell of fewer neighbours of one value than by chance. Else the published mark decides."""
    return mean.p_holm < SIGNIFICANCE and mean.value > 0 if tested else mean.value > MARK


def group_facts(results, means):
    """Means over the networks (or pairs of two different ones) of a type, of a distance, and of all, as columns of Row."""
    distances = {name: results.distances.get(name) for name, kind in results.types.items() if kind != "none"}
    for measure in dict.fromkeys(row.measure for row in means):
        rows = [row for row in means if row.measure == measure and row.network != row.other]
        if rows and rows[0].other:
            trained = [row for row in rows if "none" not in (results.types[row.network], results.types[row.other])]
            yield from pair_groups(rows, "type", results.types)
            yield from pair_groups(rows, "distance", distances)
            yield from pair_groups(trained or rows, "all", dict.fromkeys(results.types, "all"))
        elif measure in ("nr_precision", "pairs", "masks"):
            for key in dict.fromkeys(row.key for row in rows):
                members = [row for row in rows if row.key == key]
                trained = [row for row in members if row.type != "none"] or members
                sets = {("type", kind): [row for row in members if row.type == kind] for kind in TYPES}
                for (level, name), chosen in {**sets, ("all", "all"): trained}.items():
                    if chosen:
                        yield {"measure": measure, "key": key, "level": level, "network": name, **over_networks(chosen)}


def over_networks(rows):
    """Mean of several networks with Student's 95 % interval; of masks the interval over pictures, which they share."""
    values, holms = [row.value for row in rows], [row.p_holm for row in rows if row.p_holm is not None]
    mean, spread, half = float(np.mean(values)), deviation(values), None
    if rows[0].measure == "masks":
        spreads = [row.spread for row in rows]
        spread = float(np.mean(spreads)) if None not in spreads else None
        return {"spread": spread, "n": len(rows), **around(mean, spread)}
    if spread is not None:
        half = float(stats.t.ppf(0.975, len(values) - 1)) * spread / math.sqrt(len(values))
    return {"value": mean, "spread": spread, "low": half and mean - half, "high": half and mean + half,
            "n": len(rows),
            "p_holm": max(holms, default=None), "mark": f"{sum(row.mark == '*' for row in rows)} of {len(rows)}"}


def pair_groups(rows, level, group_of):
    """Means over the pairs whose networks are of two groups (or of one), as columns of Row."""
    groups = defaultdict(list)
    for row in rows:
        if group_of.get(row.network) and group_of.get(row.other):
            groups[tuple(sorted((group_of[row.network], group_of[row.other])))].append(row)
    for (a, b), members in groups.items():
        values, spreads = [row.value for row in members], [row.spread or 0 for row in members]
        value, spread = average(values, spreads, members[0].measure in FISHER, between=False)
        yield {"measure": members[0].measure, "level": level, "network": a, "other": b, "value": value, "spread": spread,
               "low": min(values), "high": max(values), "n": len(members)}


# ---------------------------------------------------------------- tests


def mann_whitney(x, y):
    """Two-sided Mann-Whitney U test -> (U, p). U counts the pairs with x above y, ties a half.

    p is the share of ways to choose len(x) of all values whose |U − mean| is at least what was observed: of all ways,
    of MOST random ones where there are more. So ties are no problem.
    """
    ranks, n = stats.rankdata([*x, *y]), len(x)
    expected = n * (len(ranks) + 1) / 2  # the sum of x's ranks; U is the sum less n (n + 1) / 2

    def distance(chosen, rest, axis=-1):
        return np.abs(chosen.sum(axis=axis) - expected)

    if min(n, len(y)) > 1:
        p = stats.permutation_test((ranks[:n], ranks[n:]), distance, permutation_type="independent",
                                   alternative="greater", n_resamples=MOST, rng=np.random.default_rng(0)).pvalue
    else:  # SciPy wants two of each: choose the one value
        away = np.abs(ranks - ranks.mean())
        p = np.mean(away >= (away[0] if n == 1 else away[-1]))
    return float(ranks[:n].sum() - n * (n + 1) / 2), float(p)


def released_p(x, y):
    """The p-value of the first paper's code: half the two-sided one of the normal approximation, the default of its
    SciPy (below 1.7), with corrections for continuity and ties. 0.5 where all values are equal."""
    if len({*x, *y}) == 1:
        return 0.5
    return float(stats.mannwhitneyu(x, y, alternative="two-sided", method="asymptotic").pvalue / 2)


def holm(p):
    """Holm's correction of the p-values p."""
    p = np.asarray(p, float)
    order, k = np.argsort(p), len(p)
    adjusted = np.empty(k)
    adjusted[order] = np.minimum(1, np.maximum.accumulate((k - np.arange(k)) * p[order]))
    return adjusted


def type_tests(rows, means, measure, keys=None):
    """Ranking against classification losses of each key, Holm-corrected over them, as columns of Row.

    The unit is the loss (its mean over folds); the released way pools all folds as if they were independent.
    """
    tests, released = [], []
    for key in keys or dict.fromkeys(row.key for row in means if row.measure == measure):
        sides, pooled = ([[row.value for row in some if (row.measure, row.key, row.type) == (measure, key, kind)]
                          for kind in TYPES[:2]] for some in (means, rows))
        if not all(sides):
            continue
        n, (u, p) = [len(side) for side in sides], mann_whitney(*sides)
        facts = {"measure": measure, "key": key, "network": "ranking", "other": "classification"}
        note = "exact" if math.comb(sum(n), n[0]) <= MOST else f"{MOST:,} random ways"
        tests.append({**facts, "level": "test", "value": 2 * u / (n[0] * n[1]) - 1, "p": p, "n": sum(n), "note": note})
        difference, p = float(np.mean(sides[0]) - np.mean(sides[1])), released_p(*pooled)
        larger = larger_type(difference, p < SIGNIFICANCE)
        note = f"{len(pooled[0])} against {len(pooled[1])} fold values"
        released.append({**facts, "level": "released", "value": difference, "p": p, "mark": larger, "note": note})
    for test, p in zip(tests, holm([test["p"] for test in tests])):
        test |= {"p_holm": float(p), "mark": larger_type(test["value"], p < LEVEL)}
    return tests + released


def larger_type(difference, shown):
    if not shown:
        return ""
    return "ranking" if difference > 0 else "classification"


def other_tests(results, means, groups):
    """The order of the properties against the paper's, and whether maps of one type (or distance) agree more."""
    ours = {row.key: row.value for row in groups if (row.measure, row.level) == ("nr_precision", "all")}
    losses = [row for loss, row in published_nrprec().items() if loss != "None" and not loss.endswith(" Mean")]
    theirs = {key: np.mean([row[key] for row in losses if row[key] is not None]) for key in losses[0]}
    shared = [key for key in ours if key in theirs]
    if len(shared) > 2:
        rho, p = spearman([ours[key] for key in shared], [theirs[key] for key in shared])
        yield {"measure": "order", "value": rho, "p": p, "n": len(shared)}
    z = {(row.network, row.other): math.atanh(max(-CLIP, min(CLIP, row.value))) for row in means
         if row.measure == "correlation" and row.network != row.other}
    types = {name: kind for name, kind in results.types.items() if kind in TYPES[:2]}
    distances = {name: results.distances[name] for name, kind in results.types.items()
                 if kind != "none" and results.distances.get(name)}
    for measure, group_of in ("same type", types), ("same distance", distances):
        test = same_group(z, group_of)
        if test:
            yield {"measure": measure, **test}


def spearman(x, y):
    """Spearman's rank correlation and its two-sided p-value, from random permutations -> (rho, p)."""
    if len(set(x)) == 1 or len(set(y)) == 1:
        return 0.0, 1.0
    method = stats.PermutationMethod(n_resamples=PERMUTATIONS, rng=np.random.default_rng(0))
    test = stats.pearsonr(stats.rankdata(x), stats.rankdata(y), method=method)
    return float(test.statistic), float(test.pvalue)


def same_group(z, group_of, seed=0):
    """Do two losses of one group agree more than two of different groups? As columns of Row, or None.

    z: {(network, network): Fisher's z}; group_of: {network: group}. The groups are permuted over the networks, for pairs
    are not independent.
    """
    names = [name for name in group_of if any(name in pair for pair in z)]
    a, b = np.array([[names.index(one) for one in pair] for pair in z if {*pair} <= {*names}]).reshape(-1, 2).T
    values = np.array([value for pair, value in z.items() if {*pair} <= {*names}])
    codes = np.unique([group_of[name] for name in names], return_inverse=True)[1]
    same = codes[a] == codes[b]
    if len(names) < 3 or not same.any() or same.all():
        return None

    def difference(codes):
        same = codes[a] == codes[b]
        return values[same].mean() - values[~same].mean() if same.any() and not same.all() else 0.0

    generator = np.random.default_rng(seed)
    permuted = np.array([difference(generator.permutation(codes)) for _ in range(PERMUTATIONS)])
    extreme = np.abs(permuted - permuted.mean()) >= abs(difference(codes) - permuted.mean()) - 1e-12
    within, between = math.tanh(values[same].mean()), math.tanh(values[~same].mean())
    return {"value": within - between, "n": len(names), "p": float((1 + extreme.sum()) / (1 + PERMUTATIONS)),
            "note": f"{within:.3f} against {between:.3f}"}


def published_nrprec():
    """Table 6 as printed: {loss: {property: NR-Prec or None}}, its rows of means included."""
    columns = files.read_table(files.ROOT / "published" / "kobs_table6_nrprec_cars.csv")
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    return {row.pop("loss"): {key: float(value) if value else None for key, value in row.items()} for row in rows}
