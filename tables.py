"""The papers' tables from a folder of results, each as CSV, Markdown and LaTeX, with tests, and a list of what is missing.

Input:  results/ with data sets' folders in it, or one data set's folder, as the other scripts write them:
        <dataset>/{nrprec,compare,masks,embeddings,sanity,pairs}.csv and <dataset>/<slug>/fold<k>/*.json;
        training histories beside the checkpoints or in models/trained/<dataset>/<slug>/fold<k>/
Output: tables/NAME.{csv,md,tex}, one for each table; tables.tex (all of them, for pdflatex), tables.md (all of them, with
        what the numbers support and what to beware of), tables.json (for report.py), missing.csv

    python tables.py results --out tables
    python tables.py --published                # the papers' own tables, from published/
    python tables.py results --published        # with ours beside them, and the differences

Every average is over folds first; correlations are averaged through Fisher's z. Ranking and classification losses are
compared with a Mann-Whitney U test whose unit is the loss, exact, Holm-corrected over the properties at 5 %; the way of
the first paper's code (all folds pooled, 1 %) stands beside it under its own name.
"""
import argparse
import json
import math
import os
import platform
import re
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy
from scipy.stats import mannwhitneyu, rankdata

from dml_common import files
from dml_common import pictures as data
from dml_common.results import (COLUMNS, TYPES, check_alike, check_together, find_datasets, find_networks, in_order, losses, open_arrays,
                     read_rows, whose)

HERE = Path(__file__).resolve().parent
CLIP = 1 - 1e-6             # r = ±1 is cut to ±0.999999, so that Fisher's z stays finite (as in compare.py)
PUBLISHED_THRESHOLD = 2.576  # of one z-score at 1 %: the published mark
LEVEL = 0.05                # of the tests of ranking against classification, after Holm
SIGNIFICANCE = 0.01         # of nrprec.py's p_holm, and of the released way
PERMUTATIONS = 9999         # of labels, where an exact test is out of reach
DISTANCES = ("euclidean", "squared_euclidean", "cosine", "dot_product", "snr")

# ---------------------------------------------------------------- averages and tests


def average_correlation(means, spreads):
    """Correlations of several folds -> (their mean, ±), both through Fisher's z.

    means: r of each fold. spreads: tanh of the standard deviation of z over each fold's pictures, as compare.csv has it.
    ± is tanh of the standard deviation of z over all folds' pictures, taken together: the folds count alike.
    """
    z, s = (np.arctanh(np.clip(values, -CLIP, CLIP)) for values in (means, spreads))
    return float(np.tanh(z.mean())), float(np.tanh(np.sqrt((s**2 + (z - z.mean())**2).mean())))


def average(means, spreads):
    """Means and standard deviations of several folds -> (mean, standard deviation over all folds' pictures together)."""
    means, spreads = np.asarray(means, float), np.asarray(spreads, float)
    return float(means.mean()), float(np.sqrt((spreads**2 + (means - means.mean())**2).mean()))


def average_groups(means, spreads):
    """Correlations of several pairs of losses -> (mean through z, typical ±: the pairs' own, not how pairs differ)."""
    z, s = (np.arctanh(np.clip(values, -CLIP, CLIP)) for values in (means, spreads))
    return float(np.tanh(z.mean())), float(np.tanh(np.sqrt((s**2).mean())))


def mann_whitney(x, y):
    """Two-sided exact Mann-Whitney U test -> (U, p). U counts the pairs with x above y, ties a half.

    The distribution is that of the midranks' sum over all ways to choose len(x) of all values, so ties are no problem:
    p is the share of ways at least as far from the mean as what was observed.
    """
    ranks = np.rint(2 * rankdata([*x, *y])).astype(int)  # doubled, so that midranks are whole
    n, total = len(x), int(ranks.sum())
    ways = np.zeros((n + 1, total + 1))  # [how many chosen, their sum]
    ways[0, 0] = 1
    for rank in ranks:
        ways[1:, rank:] += ways[:-1, :total + 1 - rank].copy()
    observed, mean = int(ranks[:n].sum()), n * (len(ranks) + 1)
    extreme = np.abs(np.arange(total + 1) - mean) >= abs(observed - mean)
    return observed / 2 - n * (n + 1) / 2, float(ways[n, extreme].sum() / ways[n].sum())


def released_p(x, y):
    """The p-value of the first paper's code: half the two-sided one of the normal approximation, the default of its
    SciPy (below 1.7), with corrections for continuity and ties. 0.5 where all values are equal."""
    if len({*x, *y}) == 1:
        return 0.5
    return float(mannwhitneyu(x, y, alternative="two-sided", method="asymptotic").pvalue / 2)


def holm(p):
    """Holm's correction of the p-values p."""
    p = np.asarray(p, float)
    order, k = np.argsort(p), len(p)
    adjusted = np.empty(k)
    adjusted[order] = np.minimum(1, np.maximum.accumulate((k - np.arange(k)) * p[order]))
    return adjusted


class Test(NamedTuple):
    """One measure of ranking against classification losses."""

    ranking: float         # mean over the losses of the means over their folds
    classification: float
    n: tuple               # losses of either type
    effect: float          # rank-biserial correlation 2 U / (n1 n2) − 1: 1 when every ranking loss is above every other
    p: float               # exact, two-sided
    p_holm: float
    pooled: tuple          # fold values of either type
    released: float        # released_p of the pooled fold values

    @property
    def larger(self):
        """The type shown to be larger, or None."""
        return ("ranking" if self.effect > 0 else "classification") if self.p_holm < LEVEL else None


def compare_types(values, types):
    """Ranking against classification losses, Holm-corrected over the measures.

    values: {measure: {loss: [value of each fold]}}; types: {loss: type}. Returns {measure: Test}; measures without a
    loss of either type are left out.
    """
    found = {}
    for measure, losses in values.items():
        sides = [[folds for loss, folds in losses.items() if types[loss] == kind and folds] for kind in TYPES[:2]]
        if not all(sides):
            continue
        x, y = ([float(np.mean(folds)) for folds in side] for side in sides)
        u, p = mann_whitney(x, y)
        pooled = [[value for folds in side for value in folds] for side in sides]
        found[measure] = Test(float(np.mean(x)), float(np.mean(y)), (len(x), len(y)), 2 * u / (len(x) * len(y)) - 1, p, 1.0,
                              (len(pooled[0]), len(pooled[1])), released_p(*pooled))
    adjusted = holm([test.p for test in found.values()])
    return {measure: test._replace(p_holm=float(p)) for (measure, test), p in zip(found.items(), adjusted)}


def smallest_p(tests):
    """What the Holm-corrected p-value cannot fall below, with so few losses and so many measures."""
    n1, n2 = max((test.n for test in tests.values()), key=lambda n: math.comb(sum(n), n[0]))
    return min(1.0, len(tests) * 2 / math.comb(n1 + n2, n1))


def same_group(z, groups, seed=0):
    """Do two losses of one group agree more than two of different groups?

    z: (K, K) symmetrical, nan where nothing is known; groups: K names. Returns (mean z within, mean z between, p) or None
    where there is no pair of either kind. The groups' names are permuted over the losses, for pairs are not independent.
    """
    a, b = np.triu_indices(len(groups), 1)
    known = np.isfinite(z[a, b])
    a, b, values = a[known], b[known], z[a, b][known]
    codes = np.unique(groups, return_inverse=True)[1]
    same = codes[a] == codes[b]
    if not same.any() or same.all():
        return None

    def difference(codes):
        same = codes[a] == codes[b]
        return values[same].mean() - values[~same].mean() if same.any() and not same.all() else 0.0

    generator = np.random.default_rng(seed)
    permuted = np.array([difference(generator.permutation(codes)) for _ in range(PERMUTATIONS)])
    extreme = np.abs(permuted - permuted.mean()) >= abs(difference(codes) - permuted.mean()) - 1e-12
    return float(values[same].mean()), float(values[~same].mean()), float((1 + extreme.sum()) / (1 + PERMUTATIONS))


def spearman(x, y, seed=0):
    """Spearman's rank correlation and its two-sided p-value, from random permutations -> (rho, p)."""
    a, b = (rankdata(values) - (len(values) + 1) / 2 for values in (x, y))
    if not (a.any() and b.any()):
        return 0.0, 1.0
    length = np.sqrt((a @ a) * (b @ b))
    generator = np.random.default_rng(seed)
    permuted = np.array([generator.permutation(a) @ b for _ in range(PERMUTATIONS)])
    extreme = np.abs(permuted) >= abs(a @ b) - 1e-9
    return float(a @ b / length), float((1 + extreme.sum()) / (1 + PERMUTATIONS))


# ---------------------------------------------------------------- reading results

class Results(NamedTuple):
    """One data set's results."""

    name: str
    folder: Path
    networks: list    # of find_networks, their arrays open
    rows: dict        # {"nrprec": [row dicts] …} of the tables that are there, each row with its network's name and fold
    order: list       # the networks' names: ranking, classification, other, none
    types: dict       # {name: type}
    distances: dict   # {name: distance}
    properties: dict  # {property: its values} of props.csv, {} without one
    missing: list     # what is missing: dicts dataset, table, what

    def lacks(self, table, what):
        self.missing.append({"dataset": self.name, "table": table, "what": what})


def read_results(folder, models):
    """One data set's folder -> Results. Raises ValueError for tables that can't be read or do not belong together."""
    name, rows, missing = folder.resolve().name, {}, []
    networks = sorted(find_networks(folder, models), key=lambda network: data.natural_key(network["folder"].as_posix()))
    for _, what in sorted(open_arrays(networks), key=lambda one: data.natural_key(one[0].as_posix())):
        missing.append({"dataset": name, "table": "", "what": what})
    for table, (script, required) in COLUMNS.items():
        if (folder / f"{table}.csv").is_file():
            rows[table] = [name_row(row, networks) for row in read_rows(folder / f"{table}.csv", script, required)]
        else:
            missing.append({"dataset": name, "table": table, "what": f"{table}.csv is not there: python {script} makes it"})
    known = losses() + networks
    types, distances = {row["name"]: row["type"] for row in known}, {row["name"]: row["distance"] for row in losses()}
    distances |= {network["name"]: network["distance"] for network in networks if network["distance"]}
    present = {network["name"] for network in networks} | {
        row[key] for table in rows.values() for row in table for key in ("name", "name_a", "name_b") if key in row}
    types = {one: types.get(one, "other") for one in present}
    check_together(networks)
    found = Results(name, folder, networks, rows, in_order(types), types, distances, read_properties(folder, networks), missing)
    check_rows(found)
    return found


def name_row(row, networks):
    """The row with whose it is: name and fold, or name_a and name_b."""
    if "model_a" in row:
        return row | {f"name_{end}": whose(row[f"model_{end}"], networks)[0] for end in "ab"}
    if "model" in row:
        return row | {"name": whose(row["model"], networks)[0]}
    name, fold = (row["loss"], row.get("fold")) if row.get("loss") else whose(row["embeddings"], networks)
    return row | {"name": name, "fold": fold}


def read_properties(folder, networks):
    """{property: set of its values} of the data set's props.csv and of its folds'; {} without one."""
    found, first = {}, {network["fold"]: network["folder"] for network in reversed(networks)
                        if (network["folder"] / "props.csv").is_file()}  # the networks of one fold have the same pictures
    for path in [folder / "props.csv", *(place / "props.csv" for place in first.values())]:
        if path.is_file():
            for name, values in files.read_properties(path).items():
                found.setdefault(name, set()).update(values.tolist())
    return found


def check_rows(results):
    """Raise ValueError when a table mixes options, or tells of other pictures than the arrays that lie there."""
    for name, keys in (("nrprec", ("distance", "null", "max_neighbours")), ("pairs", ("label",))):
        check_alike(results.folder / f"{name}.csv", {key: [row.get(key) for row in results.rows.get(name, [])] for key in keys})
    networks = {(network["name"], network["fold"]): network for network in results.networks}
    counts = [("nrprec", "emb", row["name"], row["fold"], row["queries"] + (row.get("skipped") or 0))
              for row in results.rows.get("nrprec", []) if row["queries"] is not None and row.get("nr_precision_se") is None]
    counts += [("compare", "maps", row[f"name_{end}"], row[f"fold_{end}"], row["n"] + row["left_out"])
               for row in results.rows.get("compare", []) for end in "ab"]
    for name, kind, network, fold, n in counts:
        about = networks.get((network, fold), {}).get(kind)
        if about and len(about["array"]) != n:
            raise ValueError(f"{results.folder / name}.csv counts {n:,.0f} pictures for {network}, {about['path']} has "
                             f"{len(about['array']):,}: they do not belong together; run {name}.py again")


def by_fold(results, table, *keys):
    """{(name, *keys): {fold: row}} of a table of single networks. ValueError where one network stands there twice."""
    found = defaultdict(dict)
    for row in results.rows.get(table, []):
        place = found[(row["name"], *(row[key] for key in keys))]
        put_once(place, row["fold"], row, f"{results.folder / table}.csv",
                 ", ".join([row["name"], f"fold {row['fold']}", *(str(row[key]) for key in keys)]))
    return found


def pairs_by_fold(results, table):
    """{(name, name): {(fold, fold): row}}, the names in the data set's order. ValueError where a pair stands there twice."""
    found = defaultdict(dict)
    for row in results.rows.get(table, []):
        ends = sorted(((row[f"name_{end}"], row[f"fold_{end}"]) for end in "ab"),
                      key=lambda end: (results.order.index(end[0]), -1 if end[1] is None else end[1]))
        names, folds = zip(*ends)
        what = f"{names[0]} and {names[1]}, folds {folds[0]} and {folds[1]}"
        put_once(found[names], folds, row, f"{results.folder / table}.csv", what)
    return found


def kept(rows, column):
    """The values of one column that are there."""
    return [row[column] for row in rows if row.get(column) is not None]


def put_once(place, key, row, path, what):
    if key in place:
        raise ValueError(f"{path} has two rows for {what}; two networks of one name do not belong together: rename one")
    place[key] = row


# ---------------------------------------------------------------- cells and tables


def cell(text, value=None, *, bold=False, hint=None, spread=None, mark=""):
    """One cell. spread (±) and mark are columns of their own in the CSV; the text has them already."""
    return {"text": str(text), "value": None if value is None else float(value), "shade": None, "bold": bold, "hint": hint,
            "spread": spread, "mark": mark}


EMPTY = {"text": "", "value": None, "shade": None, "bold": False, "hint": None, "spread": None, "mark": ""}


def table(name, title, caption, header, rows, *, dataset=None, paper=None, kind="rows", notes=()):
    """A table as tables.json has it (the cells' spread and mark are for the CSV alone)."""
    rows = [[one if isinstance(one, dict) else cell(one) for one in row] for row in rows]
    return {"name": file_name(name), "title": title, "caption": caption, "dataset": dataset, "paper": paper, "kind": kind,
            "header": list(header), "rows": rows, "notes": [note for note in notes if note]}


def file_name(text):
    """A table's name as the stem of its files: letters, digits, _ and -."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_") or "table"


def shaded(rows, scale=float, skip_diagonal=False):
    """Shade the cells of these rows by value: 0 for the smallest, 1 for the largest."""
    cells = [one for i, row in enumerate(rows) for j, one in enumerate(row[1:])
             if one["value"] is not None and not (skip_diagonal and i == j)]
    values = [scale(one["value"]) for one in cells]
    for one, value in zip(cells, values):
        one["shade"] = (value - min(values)) / ((max(values) - min(values)) or 1)
    return rows


def rounded(value, digits=2):
    """1.25 -> "1.25"; a half away from zero (62.5 -> "63"), a minus that can be read, never −0."""
    power = 10**digits
    whole = math.floor(abs(value) * power + 0.5 + 1e-9) / power
    return ("−" if value < 0 and whole else "") + f"{whole:.{digits}f}"


def p_text(p):
    return "" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.4f}" if p < 0.01 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def signed(value, digits=2):
    """+1.20 or −1.20; 0.00 without a sign."""
    text = rounded(value, digits)
    return text if text.startswith("−") or not float(text) else f"+{text}"


def folds_text(folds):
    known = sorted(fold for fold in folds if fold is not None)
    return "no fold" if not known else f"fold {known[0]}" if len(known) == 1 else f"mean of {len(known)} folds"


def listing(items, most=8):
    items = list(items)
    if len(items) > most:
        return f"{', '.join(items[:most])} and {len(items) - most} more"
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


# ---------------------------------------------------------------- Tables 1 and 5


def losses_table(everything):
    """Table 1: the losses, with the number of networks (folds) that each data set has results of."""
    known = {row["name"]: row for row in losses()}
    others = {name: {"type": results.types[name], "distance": results.distances.get(name), "year": ""}
              for results in everything for name in results.order if name not in known}
    rows = []
    for name, row in {**known, **others}.items():
        distance = "" if name == "None" else (row["distance"] or "").replace("_", " ")
        rows.append([name, cell(row["year"], row["year"] or None), row["type"], distance])
        for results in everything:
            folds = {network["fold"] for network in results.networks
                     if network["name"] == name and (network["emb"] or network["maps"])}
            folds |= {row["fold"] for row in results.rows.get("nrprec", []) if row["name"] == name}
            rows[-1].append(cell(len(folds) or "", len(folds) or None))
    counts = " and the number of networks (folds) of each with results" if everything else ""
    return table("losses", "Losses", f"The losses, their types and distances{counts}.",
                 ["Loss", "Year", "Type", "Distance", *(f"Networks, {results.name}" for results in everything)], rows,
                 paper="Table 1", notes=["None: ImageNet weights and an untrained last layer."])


def value_list(values):
    """Property values in words: numbers sorted, evenly spaced ones shortened as in the paper."""
    try:
        ordered = sorted(values, key=float)
        steps = np.diff([float(value) for value in ordered])
        if len(ordered) > 4 and np.allclose(steps, steps[0]):
            return f"{ordered[0]}, {ordered[1]}, …, {ordered[-1]}"
    except ValueError:
        ordered = sorted(values, key=data.natural_key)
    return ", ".join(ordered[:8]) + ", …" * (len(ordered) > 8)


def properties_table(results):
    """Table 5 of the results' props.csv; without one, the paper's."""
    if results and results.properties:
        rows = [[name, cell(len(values), len(values)), value_list(values)] for name, values in results.properties.items()]
        return table(f"properties_{results.name}", f"Properties, {results.name}", "The pictures' properties and their values.",
                     ["Property", "Number", "Values"], rows, dataset=results.name, paper="Table 5")
    columns = files.read_table(HERE / "published" / "kobs_table5_properties.csv")
    rows = [[name, cell(number, float(number)), values] for name, number, values in zip(*columns.values())]
    return table("properties_published", "Properties (published)", "The properties of the first paper's rendered cars.",
                 ["Property", "Number", "Values"], rows, paper="Table 5", notes=["No props.csv in the results: the paper's own."])


def errata_table():
    columns = files.read_table(HERE / "published" / "errata.csv")
    return table("errata", "Errata", "Where the published descriptions, code and numbers disagree, and what is done here.",
                 ["Paper", "Published", "Found", "Here"], [list(row) for row in zip(*columns.values())])


# ---------------------------------------------------------------- Table 6


def nrprec_values(results):
    """{property: {name: [NR-Prec of each fold]}}, the properties in the file's order."""
    found = {}
    for row in results.rows.get("nrprec", []):
        folds = found.setdefault(row["property"], {}).setdefault(row["name"], [])
        if row["nr_precision"] is not None:
            folds.append(row["nr_precision"])
    return found


def permuted(results):
    """Has every NR-Prec a permutation test's p_holm?"""
    return all(row.get("p_holm") is not None for row in results.rows["nrprec"] if row["nr_precision"] is not None)


def significant(rows, permuted):
    """Is NR-Prec above chance in all these folds? By p_holm if permuted, else by the published mark on the mean."""
    if permuted:
        return max(row["p_holm"] for row in rows) < SIGNIFICANCE
    return np.mean([row["nr_precision"] for row in rows]) > PUBLISHED_THRESHOLD


def above_chance(rows, permuted):
    """Significant, and above 0: a two-sided p-value may also tell of fewer neighbours of one value than by chance."""
    rows = [row for row in rows if row["nr_precision"] is not None]
    return bool(rows) and bool(significant(rows, permuted)) and bool(np.mean(kept(rows, "nr_precision")) > 0)


def nrprec_tables(results):
    """Table 6 and the tests of ranking against classification."""
    scores, values = by_fold(results, "nrprec", "property"), nrprec_values(results)
    if not values:
        return []
    names = [name for name in results.order if any(name in losses for losses in values.values())]
    tests = compare_types(values, results.types)
    note_missing_folds(results, "nrprec", scores)
    rows = [[name, *(nrprec_cell(scores.get((name, one), {}), permuted(results)) for one in values)] for name in names]
    for name, line in zip(names, rows):
        for one, found in zip(values, line[1:]):
            if found["value"] is None:
                results.lacks("nrprec", f"{name}: no NR-Prec of {one}")
    shaded(rows, lambda value: math.log1p(max(value, 0)))
    rows += mean_rows(results, names, values, tests)
    first = results.rows["nrprec"][0]
    numbers = sorted({f"{row['permutations']:,.0f}" for row in results.rows["nrprec"] if row.get("permutations")})
    mark = (f"* p_holm < {SIGNIFICANCE} in every fold: {' or '.join(numbers)}{' ' * bool(numbers)}permutations of each property, "
            "Holm-corrected over the properties."
            if permuted(results) else
            f"* NR-Prec > {PUBLISHED_THRESHOLD}: the published mark, one z-score's 1 % threshold applied to a mean of many. "
            "nrprec.py --permutations N tests the mean.")
    both = "Bold mean: the larger of the two types by the exact test (nrprec_tests); †: by the released way (all folds pooled)."
    made = (f"Null {first.get('null') or 'not stated'}, distance {first.get('distance') or 'not stated'}, "
            + (f"at most {first['max_neighbours']:.0f} neighbours." if first.get("max_neighbours") else "all R neighbours."))
    found = [table(f"nrprec_{results.name}", f"NR-Prec, {results.name}",
                   "Normalized R-Precision of each property, mean over folds: how far embeddings cluster by it, 0 for chance.",
                   ["Loss", *values], rows, dataset=results.name, paper="Table 6", notes=[mark, tests and both, made])]
    if tests:
        found.append(tests_table(f"nrprec_tests_{results.name}", f"Ranking against classification: NR-Prec, {results.name}",
                                 "Property", tests, results))
    else:
        results.lacks("nrprec_tests", "no losses of both types: ranking and classification can't be compared")
    return found


def nrprec_cell(rows, permuted):
    """The mean over folds of one network's NR-Prec of one property."""
    rows = {fold: row for fold, row in rows.items() if row["nr_precision"] is not None}
    if not rows:
        return dict(EMPTY)
    values, precision, holms = (kept(rows.values(), key) for key in ("nr_precision", "r_precision", "p_holm"))
    mark, spread = "*" * bool(significant(rows.values(), permuted)), float(np.std(values, ddof=1)) if len(values) > 1 else None
    hint = f"{folds_text(rows)}: {rounded(np.mean(values))}"
    hint += "" if spread is None else f" ± {spread:.2f} (standard deviation of the folds)"
    hint += f"; R-Prec {np.mean(precision):.3f}" if precision else ""
    hint += f"; largest p_holm {p_text(max(holms))}" if holms else ""
    return cell(rounded(np.mean(values)) + f" {mark}" * bool(mark), np.mean(values), hint=hint, mark=mark, spread=spread)


def mean_rows(results, names, values, tests, digits=2):
    """A row for either type: the means over its losses of each of values, {title: {name: [value of each fold]}}."""
    rows = []
    for kind in TYPES[:2]:
        members = [name for name in names if results.types[name] == kind]
        if members:
            rows.append([cell(f"{kind.capitalize()} mean", bold=True),
                         *(mean_cell(losses, members, tests.get(one), kind, digits) for one, losses in values.items())])
    return rows


def mean_cell(losses, members, test, kind, digits):
    """The mean over a type's losses; bold and † where a test says that it is the larger one."""
    means = [float(np.mean(losses[name])) for name in members if losses.get(name)]
    if not means:
        return dict(EMPTY)
    dagger = test and test.released < SIGNIFICANCE and (test.ranking > test.classification) == (kind == "ranking")
    spread = float(np.std(means, ddof=1)) if len(means) > 1 else None
    return cell(rounded(np.mean(means), digits) + " †" * bool(dagger), np.mean(means),
                bold=bool(test and test.larger == kind), spread=spread, mark="†" * bool(dagger),
                hint=f"{len(means)} losses" + ("" if spread is None else f", standard deviation {spread:.{digits}f}"))


def tests_table(name, title, what, tests, results, digits=2):
    """Ranking against classification, measure by measure: the exact test, and the released way beside it."""
    rows = []
    for measure, test in tests.items():
        means = [cell(rounded(mean, digits), mean, bold=test.larger == kind)
                 for kind, mean in (("ranking", test.ranking), ("classification", test.classification))]
        difference = test.ranking - test.classification
        pooled = f"{test.pooled[0]} against {test.pooled[1]} fold values; two-sided {p_text(2 * test.released)}"
        released = "" if test.released >= SIGNIFICANCE else "ranking" if difference > 0 else "classification"
        rows.append([measure, *means, cell(signed(difference, digits), difference),
                     cell(signed(test.effect), test.effect, hint=f"{test.n[0]} against {test.n[1]} losses"),
                     cell(p_text(test.p), test.p), cell(p_text(test.p_holm), test.p_holm), test.larger or "",
                     cell(p_text(test.released), test.released, hint=pooled), released])
    n = next(iter(tests.values())).n
    notes = [f"p: two-sided Mann-Whitney U on fold averages, exact; the unit is the loss ({n[0]} ranking, {n[1]} "
             f"classification). Holm over the {len(tests)} rows, {100 * LEVEL:.0f} %; with so few losses it cannot fall below "
             f"{p_text(smallest_p(tests))}.",
             "Effect: rank-biserial correlation, 1 when every ranking loss lies above every classification loss, −1 the reverse.",
             "Released p: the way of the first paper's code, all folds pooled as if independent, not corrected, "
             f"{100 * SIGNIFICANCE:.0f} %; its SciPy's default was half the two-sided p-value of the normal approximation."]
    header = [what, "Ranking", "Classification", "Difference", "Effect", "p", "p, Holm", "Larger", "Released p",
              "Released: larger"]
    return table(name, title, "Means over losses. An empty cell under “larger”: no difference could be shown.", header, rows,
                 dataset=results.name, paper="Table 6" if what == "Property" else None, notes=notes)


def note_absent(results, name, present):
    """List the networks that a table has no rows of."""
    absent = [network for network in results.order if network not in present]
    if absent:
        results.lacks(name, f"{name}.csv has no rows of {listing(absent, 99)}")


def note_missing_folds(results, name, found):
    """List the folds that a network lacks in a table, though others have them."""
    folds = {fold for key in found for fold in found[key]} - {None}
    have = defaultdict(set)
    for key in found:
        have[key[0]] |= set(found[key])
    note_absent(results, name, have)
    for network in results.order:
        mine = have.get(network, {None})
        if None not in mine and folds - mine:
            results.lacks(name, f"{network}: fold {', '.join(map(str, sorted(folds - mine)))}; the mean is over the others")


# ---------------------------------------------------------------- Tables 2 to 4, and the appendix

# column: (title, what it is, times what, decimals)
MEASURES = {
    "correlation": ("Correlation of saliency maps", "Pearson correlation of two networks' saliency maps of one picture, per "
                    "cent, ± standard deviation over pictures; averages through Fisher's z", 100, 0),
    "jsd": ("JSD of saliency maps", "Jensen-Shannon divergence (base 2) of two networks' saliency maps of one picture, "
            "± standard deviation over pictures, both × 100; 0 for identical maps", 100, 1),
    "ceiling": ("Noise ceiling of the correlation", "The most that two networks' maps can correlate, from two maps of each "
                "network that differ in their noise alone, per cent", 100, 0),
    "corrected": ("Correlation corrected for noise", "Correlation divided by its noise ceiling, per cent", 100, 0),
    "cka": ("Linear CKA of embeddings", "Linear centred kernel alignment of two networks' embeddings; 1 for embeddings that "
            "differ by rotation and scale", 1, 2),
    "overlap": ("Common nearest neighbours", "Share of a picture's 10 nearest neighbours that two networks have in common, "
                "per cent", 100, 0),
}


def pair_averages(found, measure):
    """{(name, name): (mean over folds, ± or None, hint)} of one measure; pairs of one loss's folds too."""
    averaged, through = {}, average_correlation if measure in ("correlation", "ceiling") else average
    for pair, rows in found.items():
        rows = [row for row in rows.values() if row.get(measure) is not None]
        if rows:
            means = kept(rows, measure)
            mean, spread = through(means, [row.get(f"{measure}_std") or 0.0 for row in rows])
            hint = f"mean of {len(rows)} folds, {min(means):.3f} to {max(means):.3f}" if len(rows) > 1 else f"one fold, {mean:.4f}"
            averaged[pair] = mean, spread if measure in ("correlation", "jsd") else None, hint
    return averaged


def pair_cell(mean, spread, hint, factor=100, digits=0):
    text = " ± ".join(rounded(factor * value, digits) for value in (mean, spread) if value is not None)
    return cell(text, mean, hint=hint, spread=spread)


def matrix_table(results, measure, averaged):
    """All networks against all: symmetrical, the diagonal empty unless folds of one loss were compared."""
    title, caption, *form = MEASURES[measure]
    names = [name for name in results.order if any(name in pair for pair in averaged)]
    rows, diagonal = [], False
    for a in names:
        line = [cell(a)]
        for b in names:
            key = (a, b) if (a, b) in averaged else (b, a)
            if key in averaged:
                line.append(pair_cell(*averaged[key], *form))
                diagonal |= a == b
            else:
                line.append(dict(EMPTY))
                if names.index(a) < names.index(b):
                    results.lacks(measure, f"{a} and {b}: not compared" if measure != "ceiling" else f"{a} and {b}: no ceiling")
        rows.append(line)
    paper = {"sop": "Table 2", "cars196": "Appendix A", "cub200": "Appendix A"}.get(results.name)
    paper = paper if measure in ("correlation", "jsd") else None
    return table(f"{measure}_{results.name}", f"{title}, {results.name}", f"{caption}.", ["", *names],
                 shaded(rows, skip_diagonal=True), dataset=results.name, paper=paper, kind="matrix",
                 notes=["Diagonal: different folds of one loss." if diagonal else None])


def group_table(dataset, measure, averaged, by, group_of, order):
    """Condensed: the mean over the pairs of two different losses of these groups."""
    title, caption, *form = MEASURES[measure]
    groups = [group for group in order if group in group_of.values()]
    rows = [[cell(group.replace("_", " "))] for group in groups]
    for line, g in zip(rows, groups):
        for h in groups:
            chosen = [averaged[pair] for pair in averaged if pair[0] != pair[1]
                      and sorted(group_of.get(name, "") for name in pair) == sorted((g, h))]
            if not chosen:
                line.append(dict(EMPTY))
                continue
            means, spreads = [one[0] for one in chosen], [one[1] or 0.0 for one in chosen]
            if measure in ("correlation", "ceiling"):
                mean, spread = average_groups(means, spreads)
            else:
                mean, spread = float(np.mean(means)), float(np.sqrt(np.mean(np.square(spreads))))
            hint = f"{len(chosen)} pair{'s' * (len(chosen) > 1)} of losses, {min(means):.3f} to {max(means):.3f}"
            line.append(pair_cell(mean, spread if chosen[0][1] is not None else None, hint, *form))
    paper = {"cars196": "Table 3", "cub200": "Table 4"}.get(dataset) if (measure, by) == ("correlation", "type") else None
    return table(f"{measure}_by_{by}_{dataset}", f"{title} by {by}, {dataset}",
                 f"{caption}. Each cell is the mean over the pairs of two different losses.",
                 ["", *(one.replace("_", " ") for one in groups)], shaded(rows), dataset=dataset, paper=paper, kind="matrix",
                 notes=["Networks without a loss are left out." if by == "distance" else None])


def comparison_tables(results):
    """Tables 2 to 4 in full, by type and by distance; ceiling, corrected; CKA and common neighbours."""
    found, distances = [], {one: results.distances[one] for one in results.order
                            if results.types[one] != "none" and results.distances.get(one)}
    order = [*DISTANCES, *sorted({*distances.values()} - {*DISTANCES})]
    for name, measures in (("compare", ("correlation", "jsd", "ceiling", "corrected")), ("embeddings", ("cka", "overlap"))):
        pairs = pairs_by_fold(results, name)
        if pairs:
            note_absent(results, name, {one for pair in pairs for one in pair})
            note_missing_pairs(results, name, pairs)
        for measure in measures:
            averaged = pair_averages(pairs, measure)
            if not averaged:
                if pairs and measure == "ceiling":
                    results.lacks("ceiling", "no noise ceiling: python saliency.py … --ceiling makes the second maps")
                continue
            found.append(matrix_table(results, measure, averaged))
            found.append(group_table(results.name, measure, averaged, "type", results.types, TYPES))
            if name == "compare" and measure != "ceiling" and len(set(distances.values())) > 1:
                found.append(group_table(results.name, measure, averaged, "distance", distances, order))
    return found


def note_missing_pairs(results, name, pairs):
    """List the folds in which two networks were not compared, though others were."""
    folds = {fold for rows in pairs.values() for fold in rows if None not in fold and fold[0] == fold[1]}
    for (a, b), rows in pairs.items():
        lacking = sorted(fold[0] for fold in folds - set(rows))
        if a != b and lacking and not any(None in fold for fold in rows):
            results.lacks(name, f"{a} and {b}: fold {', '.join(map(str, lacking))}; the mean is over the others")


# ---------------------------------------------------------------- masks, sanity check, pairs, training

MASK_HEADER = {"share": "In the object", "area": "Object's area", "other": "In other masks", "excess": "Excess",
               "pointing": "Maximum in object", "pointing_other": "Maximum in other masks"}
PAIR_HEADER = {"recall_at_1": "Recall@1", "map_at_r": "MAP@R", "jsd": "JSD", "jsd_null": "JSD, labels permuted",
               "r_precision": "R-Precision", "positive_mean": "Positive mean", "negative_mean": "Negative mean"}
TESTED_PAIRS = ("recall_at_1", "map_at_r", "jsd", "r_precision")


def masks_table(results):
    """Share of saliency in the object and its chance levels."""
    found = by_fold(results, "masks", "measure")
    if not found:
        return []
    note_missing_folds(results, "masks", found)
    measures = [one for one in MASK_HEADER if any(key[1] == one for key in found)]
    rows = [[name, *(mask_cell(found.get((name, one), {})) for one in measures)] for name in results.order
            if any((name, one) in found for one in measures)]
    note = ("In other masks: the same maps under the other pictures' masks, the chance level of a map that knows only where "
            "objects usually are. Excess: the difference, in points.")
    return [table(f"masks_{results.name}", f"Saliency inside the object, {results.name}",
                  "How much of the saliency lies inside the object's mask, per cent, mean over folds.",
                  ["Loss", *(MASK_HEADER[one] for one in measures)], rows, dataset=results.name, notes=[note])]


def mask_cell(rows):
    """The mean over folds of one measure; the intervals over pictures in its hint."""
    means = kept(rows.values(), "mean")
    if not means:
        return dict(EMPTY)
    intervals = [f"[{100 * row['low']:.1f}, {100 * row['high']:.1f}]" for row in rows.values()
                 if None not in (row["low"], row["high"])]
    hint = folds_text(rows) + (f"; 95 % interval over pictures {', '.join(intervals)}" if intervals else "")
    return cell(rounded(100 * np.mean(means), 1), np.mean(means), hint=hint)


def sanity_table(results):
    """Correlation with the trained network's map as layers are randomised from the top."""
    found = by_fold(results, "sanity", "layers", "of")
    if not found:
        return []
    note_missing_folds(results, "sanity", found)
    steps = sorted({key[1:] for key in found}, key=lambda step: (step[1], step[0]))
    rows = []
    for name in results.order:
        folds = [[row for row in found.get((name, *step), {}).values() if row["correlation"] is not None] for step in steps]
        if any(folds):
            rows.append([name, *(sanity_cell(one) for one in folds)])
    heads = [f"{layers:.0f} of {of:.0f}" for layers, of in steps]
    return [table(f"sanity_{results.name}", f"Sanity check, {results.name}",
                  "Correlation of the maps with the trained network's, per cent, as ever more layers are re-initialised from the "
                  "top; 0 layers: the noise ceiling.", ["Layers", *heads], shaded(rows), dataset=results.name)]


def sanity_cell(rows):
    if not rows:
        return dict(EMPTY)
    mean, spread = average_correlation(kept(rows, "correlation"), [row["correlation_std"] or 0.0 for row in rows])
    return pair_cell(mean, spread, f"{len(rows)} fold{'s' * (len(rows) > 1)}")


def whole_pairs(results):
    """pairs.csv's rows of all classes of the test split, at one number of bins -> ({(name,): {fold: row}}, bins)."""
    rows = [row for row in results.rows.get("pairs", []) if row.get("split") in (None, "", "test") and row.get("repeat") is None]
    kinds = list(dict.fromkeys(row["bins"] for row in rows))
    bins = 200.0 if 200.0 in kinds else kinds[0] if kinds else None
    return by_fold(results._replace(rows={"pairs": [row for row in rows if row["bins"] == bins]}), "pairs"), bins


def pair_tests(results, found):
    """Ranking against classification losses on the second paper's scores: {title: Test}."""
    values = {PAIR_HEADER[one]: {name: kept(rows.values(), one) for (name,), rows in found.items()} for one in TESTED_PAIRS}
    return compare_types(values, results.types)


def pair_tables(results):
    """The second paper's scores, of pairs.csv, and ranking against classification on them."""
    found, bins = whole_pairs(results)
    if not found:
        return []
    note_missing_folds(results, "pairs", found)
    measures = [one for one in PAIR_HEADER if any(kept(rows.values(), one) for rows in found.values())]
    tests = pair_tests(results, found)
    names = [name for name in results.order if (name,) in found]
    rows = [[name, *(fold_cell(kept(found[name,].values(), one)) for one in measures)] for name in names]
    values = {PAIR_HEADER[one]: {name: kept(found[name,].values(), one) for name in names} for one in measures}
    rows += mean_rows(results, names, values, tests, 3)
    notes = [tests and "Bold mean: the larger by the exact test (pairs_tests); †: by the released way (all folds pooled).",
             "jsd_null" in measures and "JSD of few pairs is biased up: labels permuted shows by how much."]
    label = results.rows["pairs"][0]["label"]
    tables = [table(f"pairs_{results.name}", f"Pairs and rankings, {results.name}",
                    f"Scores of the second paper, label {label}, {bins:.0f} bins, mean over folds.",
                    ["Loss", *(PAIR_HEADER[one] for one in measures)], rows, dataset=results.name, paper="Oi et al., Table 1",
                    notes=notes)]
    if tests:
        title = f"Ranking against classification: pairs, {results.name}"
        tables.append(tests_table(f"pairs_tests_{results.name}", title, "Score", tests, results, 3))
    return tables


def fold_cell(folds):
    """The mean over folds of one score."""
    if not folds:
        return dict(EMPTY)
    spread = float(np.std(folds, ddof=1)) if len(folds) > 1 else None
    hint = "one fold" if spread is None else f"mean of {len(folds)} folds, standard deviation {spread:.3f}"
    return cell(rounded(np.mean(folds), 3), np.mean(folds), spread=spread, hint=hint)


def read_history(network):
    """(row of epoch 0 or None, last row) of the test split in a history.csv; (None, None) before training has ended."""
    rows = read_rows(network["history"], "train.py", ["epoch", "split", "jsd", "recall_at_1", "map_at_r"])
    tested = [row for row in rows if row["split"] == "test"]
    after = [row for row in tested if row["epoch"]]
    return next((row for row in tested if row["epoch"] == 0), None), after[-1] if after else None


def training_table(results):
    """The second paper's Table 1 from the training histories: test split, before and after."""
    found = defaultdict(list)
    for network in results.networks:
        before, after = read_history(network) if network["history"] else (None, None)
        if after:
            split = network["config"].get("split", {})
            found[network["name"], str(split.get("kind", "") if isinstance(split, dict) else split)].append((before or {}, after))
        elif network["history"] and network["type"] != "none":
            results.lacks("training", f"{network['history']}: no test at the end; left out, training may be half-finished")
    measures = [one for one in ("recall_at_1", "map_at_r", "jsd", "positive_mean", "negative_mean")
                if any(kept([after], one) for pairs in found.values() for _, after in pairs)]
    rows = []
    for name, split in sorted(found, key=lambda key: (results.order.index(key[0]), key[1])):
        rows.append([name, split, cell(len(found[name, split]), len(found[name, split]))])
        for one in measures:
            before, after = (kept(side, one) for side in zip(*found[name, split]))
            text = " → ".join(rounded(np.mean(values), 3) for values in (before, after) if values)
            rows[-1].append(cell(text, np.mean(after) if after else None, hint=f"{len(after)} networks, before → after training"))
    if not rows:
        return []
    return [table(f"training_{results.name}", f"Test split before and after training, {results.name}",
                  "Scores of the test split, untrained → trained, mean over folds.",
                  ["Loss", "Splitting", "Folds", *(PAIR_HEADER[one] for one in measures)], rows, dataset=results.name,
                  paper="Oi et al., Table 1")]


# ---------------------------------------------------------------- what the numbers support


def statement(results, topic, text, test, p=None):
    return {"dataset": results.name, "topic": topic, "text": text, "test": test, "p_value": None if p is None else float(p),
            "main": False}


def statements(results, main):
    """Sentences that the numbers of one data set support; with main the first three are the report's main findings."""
    found = [property_statement(results), type_statement(results), pixel_statement(results), training_statement(results),
             order_statement(results),
             map_group_statement(results, "type"), map_group_statement(results, "distance"), untrained_statement(results),
             embedding_statement(results), pair_statement(results), sanity_statement(results)]
    for one in found[:3]:
        one["main"] = main
    return [one for one in found if one]


def with_loss(results, names):
    """The networks with a loss among these; all of them where none has one."""
    return [name for name in names if results.types[name] != "none"] or list(names)


def mean_and_spread(values, digits=2):
    """"4.50 ± 0.71" of several losses' values, "4.50" of one."""
    spread = f" ± {rounded(np.std(values, ddof=1), digits)}" if len(values) > 1 else ""
    return rounded(np.mean(values), digits) + spread


def property_statement(results):
    """Which properties the embeddings cluster by, over the networks with a loss."""
    scores, values = by_fold(results, "nrprec", "property"), nrprec_values(results)
    names = with_loss(results, [name for name in results.order if any(losses.get(name) for losses in values.values())])
    known = {one: {name: float(np.mean(losses[name])) for name in names if losses.get(name)} for one, losses in values.items()}
    known = {one: losses for one, losses in known.items() if losses}
    if not known:
        why = "NR-Prec is not defined for any property" if values else "no property was analysed (nrprec.csv is not there)"
        return statement(results, "property level", f"{results.name}: {why}.", "none")
    tested, figures = permuted(results), {one: mean_and_spread(list(losses.values())) for one, losses in known.items()}
    ranked = sorted(known, key=lambda one: -np.mean(list(known[one].values())))
    top = ranked[0]
    marked = {one: sum(above_chance(scores[name, one].values(), tested) for name in losses) for one, losses in known.items()}
    first = sum(top == max((one for one in known if name in known[one]), key=lambda one: known[one][name]) for name in names)
    in_all = [one if one == top else f"{one} ({figures[one]})" for one in ranked if marked[one] == len(known[one])]
    in_some = [f"{one} ({figures[one]}, {marked[one]} of {len(known[one])})" for one in ranked
               if 0 < marked[one] < len(known[one])]
    in_none = [one for one in ranked if not marked[one]]
    above = "above chance" if tested else f"above the published mark {PUBLISHED_THRESHOLD}"
    what = "losses" if any(results.types[name] != "none" for name in names) else "networks"
    of = names[0] if len(names) == 1 else f"both {what}" if len(names) == 2 else f"all {len(names)} {what}"
    if in_all + in_some:
        text = (f"The embeddings of {results.name} cluster most by {top} (mean NR-Prec {figures[top]}, first in {first} of "
                f"{len(names)} {what}): ")
        text += (f"NR-Prec is {above} in {of} for {listing(in_all, 12)}" if in_all else
                 f"for no property is NR-Prec {above} in {of}")
        text += f"; in some for {listing(in_some, 12)}" if in_some else ""
        text += f"; in none for {listing(in_none, 12)}." if in_none else "."
    else:
        text = (f"The embeddings of {results.name} cluster clearly by no property: NR-Prec is {above} in none of {len(names)} "
                f"{what}; the largest mean is {figures[top]} ({top}).")
    largest = max((p for name in names for p in kept(scores.get((name, top), {}).values(), "p_holm")), default=None)
    test = (f"permutations of each property, Holm-corrected, p_holm < {SIGNIFICANCE} in every fold; {top}: largest p_holm "
            f"{p_text(largest)}" if tested else f"the published mark: NR-Prec > {PUBLISHED_THRESHOLD} on the mean of the folds, "
            "a z-score's threshold applied to a mean; no permutations, so no p-value")
    test += f"; ± is the standard deviation over {len(names)} {what}" * (len(names) > 1)
    within = [np.var(values[top][name], ddof=1) for name in names if len(values[top].get(name, [])) > 1]
    test += f"; the folds of one differ by {np.sqrt(np.mean(within)):.2f} in {top}" if within else ""
    return statement(results, "property level", text, test, largest if tested else None)


def type_statement(results):
    """Ranking against classification losses, property by property."""
    topic, values = "ranking against classification", nrprec_values(results)
    tests = compare_types(values, results.types)
    if not tests:
        have = {name for losses in values.values() for name in losses}
        count = [sum(results.types[name] == kind for name in have) for kind in TYPES[:2]]
        return statement(results, topic, f"Ranking and classification losses can't be compared on {results.name}: there are "
                         f"NR-Prec of {count[0]} ranking and {count[1]} classification losses.", "none")
    floor, one = smallest_p(tests), next(iter(tests.values()))
    n, pooled = one.n, one.pooled
    smallest = min(tests, key=lambda one: tests[one].p_holm)
    p = tests[smallest].p_holm
    against = f"{n[0]} ranking {{}} {n[1]} classification losses"
    scores = by_fold(results, "nrprec", "property")

    def clusters(one):
        """Does any loss cluster by it at all?"""
        return any(above_chance(scores[name, one].values(), permuted(results)) for name in values[one]
                   if results.types[name] in TYPES[:2])

    def described(one):
        """"hue (4.07 against 3.25)"."""
        means = sorted((tests[one].ranking, tests[one].classification), reverse=True)
        above = "" if clusters(one) else ", above chance for no loss"
        return f"{one} ({rounded(means[0])} against {rounded(means[1])}{above})"

    shown = {kind: [described(one) for one, test in tests.items() if test.larger == kind] for kind in TYPES[:2]}
    parts = [f"{kind} losses have the larger NR-Prec of {listing(ones, 12)}" for kind, ones in shown.items() if ones]
    rest = len(tests) - sum(map(len, shown.values()))
    chance = [one for one, test in tests.items() if test.larger]
    if parts and not any(map(clusters, chance)):
        differ = listing((f"{one} ({rounded(tests[one].ranking)} against {rounded(tests[one].classification)})" for one in chance), 12)
        text = (f"No difference between {against.format('and')} could be shown in any property that a loss of {results.name} "
                f"clusters by. They differ in {differ}, by which none clusters.")
    elif parts:
        text = ", ".join(parts)
        text = f"{text[0].upper()}{text[1:]}: {against.format('against')}, {results.name}"
        text += {0: ".", 1: "; for the other property no difference could be shown."}.get(
            rest, f"; for the other {rest} properties no difference could be shown.")
    else:
        text = (f"No difference between {against.format('and')} could be shown for any of {len(tests)} "
                f"propert{'ies' if len(tests) > 1 else 'y'} of {results.name}: the smallest Holm-corrected p is {p_text(p)} "
                f"({smallest}).")
        text += f" With so few losses none could: it cannot fall below {p_text(floor)}." if floor >= LEVEL else ""
    released = [one for one, test in tests.items() if test.released < SIGNIFICANCE]
    test = ("two-sided Mann-Whitney U on fold averages (the unit is the loss; all were rated on the same pictures), exact, Holm "
            f"over {len(tests)} properties, {100 * LEVEL:.0f} %; the smallest p is {p_text(p)} ({smallest}); with {n[0]} against "
            f"{n[1]} it cannot fall below {p_text(floor)}. The released way (all folds pooled, {pooled[0]} against {pooled[1]} values, not corrected, half "
            f"the two-sided p, {100 * SIGNIFICANCE:.0f} %) calls {listing(released, 12) if released else 'no property'} "
            "different")
    return statement(results, topic, text, test, p)


def loss_pairs(results, table, measure):
    """{(name, name): mean over folds} of two different networks."""
    averaged = pair_averages(pairs_by_fold(results, table), measure)
    return {pair: one[0] for pair, one in averaged.items() if pair[0] != pair[1]}


def mean_correlation(values):
    """Mean through Fisher's z."""
    return average_groups(values, [0.0] * len(values))[0]


def mean_error(rows):
    """Standard error over pictures of the mean of folds, rows of masks.csv; nan where they don't tell."""
    errors = [row["std"] / math.sqrt(row["n"] - 1) if row.get("std") is not None and (row.get("n") or 0) > 1 else math.nan
              for row in rows if row["mean"] is not None]
    return math.hypot(*errors) / len(errors)


def pixel_statement(results):
    """How far the maps agree against their ceiling, and how much of the saliency lies in the object."""
    correlation = loss_pairs(results, "compare", "correlation")
    chosen = [pair for pair in correlation if "none" not in map(results.types.get, pair)] or list(correlation)
    parts, test = [f"No saliency maps of {results.name} were compared."], []
    if chosen:
        means = [correlation[pair] for pair in chosen]
        ceilings, corrected = ([value for pair, value in loss_pairs(results, "compare", measure).items() if pair in chosen]
                               for measure in ("ceiling", "corrected"))
        among = f"{min(means):.2f} to {max(means):.2f} over {len(chosen)} pairs, " if len(chosen) > 1 else ""
        text = f"Saliency maps of two networks correlate at {mean_correlation(means):.2f} on average ({among}{results.name}); "
        text += (f"two runs of one network that differ in noise alone at {mean_correlation(ceilings):.2f}, so "
                 f"{rounded(100 * np.mean(corrected), 0)} % of what the noise allows." if ceilings and corrected else
                 "their noise ceiling was not measured, so how much of the difference is noise is unknown.")
        parts = [text]
        test = [f"Pearson r, averaged through Fisher's z over pictures, folds and pairs; ceiling for {len(ceilings)} of "
                f"{len(chosen)} pairs"]
    masks = by_fold(results, "masks", "measure")
    means = {one: {name: np.mean(kept(rows.values(), "mean")) for (name, measure), rows in masks.items()
                   if measure == one and kept(rows.values(), "mean")} for one in ("share", "other", "excess")}
    names = with_loss(results, [name for name in means["excess"] if name in means["share"] and name in means["other"]])
    if names:
        share, other, excess = ([100 * means[one][name] for name in names] for one in ("share", "other", "excess"))
        parts.append(f"{np.mean(share):.1f} % of the saliency lies inside the object, and {np.mean(other):.1f} % would lie "
                     f"inside other pictures' objects: an excess of {rounded(np.mean(excess), 1)} points")
        errors = [100 * mean_error(masks[name, "excess"].values()) for name in names]
        low, high = (np.mean(excess) + sign * 1.96 * np.mean(errors) for sign in (-1, 1))
        parts[-1] += f" [{rounded(low, 1)}, {rounded(high, 1)}]" if np.isfinite(low) else ""
        parts[-1] += "." if low > 0 else ", so that more than other pictures' objects catch could not be shown."
        test.append("[ ]: 95 % interval over pictures, folds averaged, the networks' errors taken as one because they share "
                    "their pictures" + (f"; {rounded(min(excess), 1)} to {rounded(max(excess), 1)} points over {len(names)} "
                                        "networks" if len(names) > 1 else ""))
    elif chosen:
        parts.append("No objects' masks were laid over them.")
    return statement(results, "pixel level", " ".join(parts), "; ".join(test) or "none")


def published_nrprec():
    """Table 6 as printed: {loss: {property: NR-Prec or None}}, its rows of means included."""
    columns = files.read_table(HERE / "published" / "kobs_table6_nrprec_cars.csv")
    return {loss: {one: float(columns[one][row]) if columns[one][row] else None for one in columns if one != "loss"}
            for row, loss in enumerate(columns["loss"])}


def order_statement(results):
    """Does the order of the properties agree with the paper's?"""
    published = [row for loss, row in published_nrprec().items() if loss != "None" and not loss.endswith(" Mean")]
    theirs = {one: np.mean(kept(published, one)) for one in published[0]}
    ours = {}
    for one, losses in nrprec_values(results).items():
        means = [np.mean(losses[name]) for name in with_loss(results, list(losses)) if losses[name]]
        if one in theirs and means:
            ours[one] = np.mean(means)
    if len(ours) < 3:
        return None
    rho, p = spearman(list(ours.values()), [theirs[one] for one in ours])
    agrees = "could not be shown to agree with" if p >= LEVEL else "agrees with" if rho > 0 else "is opposed to"
    return statement(results, "property level", f"The order of the {len(ours)} properties by NR-Prec on {results.name} {agrees} "
                     f"the paper's Table 6 (Spearman's rank correlation {signed(rho)}).",
                     f"Spearman's rank correlation of the losses' means, two-sided, {PERMUTATIONS:,} permutations, p = "
                     f"{p_text(p)}", p)


def map_group_statement(results, by):
    """Do maps of two losses of one type (or distance) agree more than maps of two types?"""
    correlation = loss_pairs(results, "compare", "correlation")
    group_of, allowed = (results.types, TYPES[:2]) if by == "type" else (results.distances, None)
    names = [name for name in results.order if results.types[name] != "none" and group_of.get(name)
             and (allowed is None or group_of[name] in allowed) and any(name in pair for pair in correlation)]
    z = np.full((len(names), len(names)), np.nan)
    for (a, b), mean in correlation.items():
        if a in names and b in names:
            i, j = names.index(a), names.index(b)
            z[i, j] = z[j, i] = np.arctanh(np.clip(mean, -CLIP, CLIP))
    groups = np.array([group_of[name] for name in names])
    found = same_group(z, list(groups)) if len(names) > 2 else None
    if not found:
        return None
    same, other, p = np.tanh(found[0]), np.tanh(found[1]), found[2]
    inside = {group: z[np.ix_(groups == group, groups == group)] for group in dict.fromkeys(groups.tolist())}
    each = listing((f"{group} {np.tanh(np.nanmean(part)):.3f}" for group, part in inside.items() if np.isfinite(part).any()), 12)
    more, one = "more" if same > other else "less", f"{same:.3f}: {each}"
    text = (f"Maps of two losses of one {by} correlate {more} ({one}) than maps of two {by}s ({other:.3f}, {results.name})."
            if p < LEVEL else f"That maps of two losses of one {by} correlate differently ({one}) from maps of two {by}s "
            f"({other:.3f}) could not be shown ({results.name}).")
    return statement(results, "pixel level", text, f"difference of the mean Fisher z, {by}s permuted over {len(names)} losses "
                     f"{PERMUTATIONS:,} times, two-sided, p = {p_text(p)}", p)


def training_statement(results):
    """Which properties all losses cluster by more, or less, than the untrained network, where any network clusters at all."""
    more, less, scores = [], [], by_fold(results, "nrprec", "property")
    for one, losses in nrprec_values(results).items():
        means = {name: np.mean(folds) for name, folds in losses.items() if folds}
        plain = [mean for name, mean in means.items() if results.types[name] == "none"]
        trained = [mean for name, mean in means.items() if results.types[name] != "none"]
        clear = any(above_chance(scores[name, one].values(), permuted(results)) for name in means)
        if clear and plain and trained and (min(trained) > max(plain) or max(trained) < min(plain)):
            words = f"{one} ({rounded(np.mean(plain))} → {rounded(np.mean(trained))})"
            (more if min(trained) > max(plain) else less).append(words)
    if not more + less:
        return None
    text = "; ".join(f"{verb} NR-Prec of {listing(ones, 12)}" for verb, ones in (("raise", more), ("lower", less)) if ones)
    return statement(results, "property level", f"Against the untrained network all losses {text} ({results.name}).",
                     "means over folds, of the losses after the arrow; described, not tested")


def untrained_statement(results):
    """Maps of trained networks against the untrained one's."""
    correlation = loss_pairs(results, "compare", "correlation")
    untrained = {pair: sum(results.types[name] == "none" for name in pair) for pair in correlation}
    plain, both = ([correlation[pair] for pair in correlation if untrained[pair] == number] for number in (1, 0))
    if not plain or not both:
        return None
    return statement(results, "pixel level", f"Maps of trained networks correlate with the untrained network's at "
                     f"{mean_correlation(plain):.2f}, with each other at {mean_correlation(both):.2f} ({results.name}).",
                     f"mean Fisher z over {len(plain)} and {len(both)} pairs; described, not tested")


def embedding_statement(results):
    """How alike the embeddings of two losses are."""
    cka, overlap, chance = ([value for pair, value in loss_pairs(results, "embeddings", measure).items()
                             if "none" not in map(results.types.get, pair)] for measure in ("cka", "overlap", "overlap_chance"))
    if not cka or not overlap:
        return None
    by_chance = f", {100 * np.mean(chance):.1f} % by chance" if chance else ""
    return statement(results, "embeddings", f"Embeddings of two losses have a linear CKA of {np.mean(cka):.2f}"
                     f"{f' ({min(cka):.2f} to {max(cka):.2f})' if len(cka) > 1 else ''} and {rounded(100 * np.mean(overlap), 0)} % of the 10 nearest neighbours in "
                     f"common{by_chance} ({results.name}).", f"mean over {len(cka)} pair{'s' * (len(cka) > 1)}; described, not tested")


def pair_statement(results):
    """Ranking against classification losses on the second paper's scores."""
    tests = pair_tests(results, whole_pairs(results)[0])
    if not tests:
        return None
    n, p = next(iter(tests.values())).n, min(test.p_holm for test in tests.values())
    shown = [f"{one} (larger for {test.larger} losses, {test.ranking:.3f} against {test.classification:.3f})"
             for one, test in tests.items() if test.larger]
    text = (f"Ranking and classification losses differ in {listing(shown)} ({results.name})." if shown else
            f"No difference between {n[0]} ranking and {n[1]} classification losses could be shown in {listing(tests)} "
            f"({results.name}).")
    return statement(results, "pairs", text, f"two-sided Mann-Whitney U on fold averages, exact, Holm over {len(tests)} scores, "
                     f"smallest p {p_text(p)}, cannot fall below {p_text(smallest_p(tests))}", p)


def sanity_statement(results):
    """Do the maps change when the network's layers are randomised?"""
    rows = [row for row in results.rows.get("sanity", []) if row["correlation"] is not None]
    none, every = ([row["correlation"] for row in rows if row["layers"] == (row["of"] if end else 0)] for end in (0, 1))
    if not none or not every:
        return None
    before, after = mean_correlation(none), mean_correlation(every)
    return statement(results, "pixel level", "With all layers randomised the correlation with the trained network's map "
                     f"{'falls' if after < before else 'does not fall'}: {after:.2f}, against {before:.2f} for two runs of the "
                     f"trained network ({results.name}).", "described, not tested: correlations averaged through Fisher's z")


# ---------------------------------------------------------------- what a reader must know


def warnings_for(results):
    """What the JSONs and the tables say that a reader must know, a line each."""
    def some(chosen, of):
        names = [network["name"] + ("" if network["fold"] is None else f" fold {network['fold']}") for network in chosen]
        most = f"{len(chosen)} of {len(of)} networks ({listing(names, 3)})"
        return f"all {len(of)} networks" if len(chosen) == len(of) else most

    networks, nrprec = results.networks, results.rows.get("nrprec", [])
    maps = [network for network in networks if network["maps"]]
    trained = [network for network in networks if network["type"] != "none"]
    arrays = [network[kind] for network in networks for kind in ("emb", "maps") if network[kind]]
    yield from noise_warnings(maps, results.rows.get("compare", []))
    bare = [network for network in maps if not network["maps_ceiling"]]
    if bare:
        yield f"{some(bare, maps)} have no second maps (saliency.py --ceiling): a low correlation of theirs may be noise alone"
    yield from permutation_warnings(nrprec)
    for kind, words, least in ("emb", "embeddings", 1000), ("maps", "saliency maps", 100):
        counts = [len(network[kind]["array"]) for network in networks if network[kind]]
        if counts and min(counts) < least:
            yield f"few pictures: {words} of only {min(counts):,} pictures for each network; means over them are uncertain"
    frozen = [network for network in trained if network["config"].get("frozen_trunk")]
    if frozen:
        yield f"{some(frozen, trained)} were trained with a frozen trunk: they differ in the last layer alone"
    defaults = [network for network in trained if network["config"].get("loss_parameters") is not None]
    if defaults:
        yield (f"the losses of {some(defaults, trained)} have the parameters of models/losses.csv, not tuned ones; other "
               "parameters may rank losses differently")
    left = {str(name) for about in arrays for name in about["pictures"].get("left_out") or []}
    if left:
        yield f"{len(left):,} pictures were left out because they could not be read ({listing(sorted(left), 3)})"
    most = max(kept(results.rows.get("compare", []), "left_out"), default=0)
    if most:
        yield f"up to {most:,.0f} pictures are left out of a pair of maps, because a map is constant or not finite"
    skipped = sorted({row["property"] for row in nrprec if row.get("skipped")})
    if skipped:
        yield f"pictures whose value no other picture has were skipped as queries ({listing(skipped)})"
    if kept(nrprec, "nr_precision_se"):
        yield "NR-Prec rests on a random sample of queries (nrprec.py --queries)"
    backbones = sorted({str(about["backbone"]) for about in arrays if about.get("backbone")})
    if len(backbones) > 1:
        yield f"the networks have different backbones ({listing(backbones)}): differences between losses may be the backbones'"
    if len({network["fold"] for network in networks if network["fold"] is not None}) == 1:
        yield "one fold only: how much a loss varies from training to training is unknown"
    others = [one for one in results.order if results.types[one] == "other"]
    if others:
        yield f"{listing(others)} {'is' if len(others) == 1 else 'are'} not in models/losses.csv: kept, type “other”"


def noise_warnings(maps, rows):
    """Maps of --shared-noise: compare.py takes the other network's second map, and gives a ceiling, where it can."""
    shared = {(network["name"], network["fold"]) for network in maps if network["maps"]["options"].get("shared_noise")}
    pairs = [row for row in rows if {(row["name_a"], row["fold_a"]), (row["name_b"], row["fold_b"])} <= shared]
    raised = [row for row in pairs if row["ceiling"] is None]
    if raised:
        yield f"{len(raised)} of {len(rows)} pairs of maps share their noise, which raises correlations; no ceiling bounds them"
    elif pairs:
        yield (f"the maps of {len(shared)} networks share their noise, so each was compared with the other networks' second "
               "maps, whose noise is another")


def permutation_warnings(rows):
    """Without, with too few, or with different numbers of permutations."""
    known = [row for row in rows if row.get("p_value") is not None]
    if rows and not known:
        yield "NR-Prec was not tested by permutation (nrprec.py --permutations N): Table 6 has the published mark alone"
        return
    if len(known) < len(kept(rows, "nr_precision")):
        yield "some networks' NR-Prec were tested by permutation, others not: Table 6 has the published mark instead"
    numbers = sorted({int(row["permutations"]) for row in known if row.get("permutations")})
    if len(numbers) > 1:
        yield f"p-values come from different numbers of permutations ({listing(f'{number:,}' for number in numbers)})"
    properties = len({row["property"] for row in known})
    if numbers and properties / (1 + numbers[0]) >= SIGNIFICANCE:
        yield f"{numbers[0]:,} permutations of {properties} properties can't give p_holm < {SIGNIFICANCE}: nothing can be marked"


# ---------------------------------------------------------------- writing

MARKDOWN = {**{letter: f"\\{letter}" for letter in "\\`*_[]#|~!$^"}, "&": "&amp;", "<": "&lt;", ">": "&gt;"}
LATEX = {**{letter: f"\\{letter}" for letter in "{}$&#%_"}, "\\": r"\textbackslash{}", "~": r"\textasciitilde{}",
         "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"{''}",
         "`": r"{\`{}}", "\0": "{}", "±": r"$\pm$", "−": r"$-$", "–": "--", "—": "---", "×": r"$\times$", "·": r"$\cdot$",
         "°": r"$^\circ$", "≥": r"$\geq$", "≤": r"$\leq$", "→": r"$\rightarrow$", "…": r"\dots{}", "†": r"$\dagger$",
         "σ": r"$\sigma$", "“": "``", "”": "''", "’": "'"}
PREAMBLE = r"""\documentclass[a4paper]{article}
\usepackage[margin=18mm]{geometry}
\usepackage{booktabs,graphicx,array}
\usepackage[table]{xcolor}
\begin{document}
"""


def one_line(text):
    """Control characters and line ends become spaces."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text))


def escape_markdown(text):
    return "".join(MARKDOWN.get(letter, letter) for letter in one_line(text))


def escape_latex(text):
    """Any text for pdflatex: accented Latin letters stay, what its fonts lack becomes [U+0416]."""
    def known(letter):
        if letter in LATEX:
            return LATEX[letter]
        return letter if letter.isascii() or ("À" <= letter <= "ÿ" and letter not in "ÐÞðþ") else f"[U+{ord(letter):04X}]"

    return "".join(map(known, re.sub(r"(?<=-)(?=-)|(?<=')(?=')", "\0", one_line(text))))  # no ligatures: -- stays two hyphens


def csv_rows(content):
    """Header and rows of a table's CSV: the numbers with every digit, ± and marks in columns of their own."""
    def plain(one):
        return one["text"] if one["value"] is None else int(one["value"]) if one["text"].isdigit() and one["value"].is_integer() \
            else one["value"]

    columns = []
    for number, name in enumerate(content["header"]):
        cells = [row[number] for row in content["rows"]]
        columns.append([name or "name", *map(plain, cells)])
        for key, suffix in (("spread", "±"), ("mark", "mark")):
            if any(one[key] not in (None, "") for one in cells):
                columns.append([f"{name} {suffix}", *(one[key] for one in cells)])
    header, *rows = zip(*columns)
    return header, rows


def has_numbers(content):
    """Which columns hold numbers: those stand to the right."""
    return [k > 0 and any(row[k]["value"] is not None for row in content["rows"]) for k in range(len(content["header"]))]


def has_marks(content):
    """Which columns have a number with a mark."""
    return [any(row[k]["mark"] for row in content["rows"]) for k in range(len(content["header"]))]


def to_markdown(content):
    """The table as GitHub's Markdown."""
    paper = f" ({content['paper']})" if content["paper"] else ""
    lines = [f"### {escape_markdown(content['title'])}", "", escape_markdown(content["caption"] + paper), "",
             "| " + " | ".join(map(escape_markdown, content["header"])) + " |",
             "|" + "|".join("---:" if one else "---" for one in has_numbers(content)) + "|"]
    for row in content["rows"]:
        texts = [escape_markdown(one["text"]) for one in row]
        lines.append("| " + " | ".join(f"**{text}**" if one["bold"] and text else text for one, text in zip(row, texts)) + " |")
    lines += ["", *(f"- {escape_markdown(note)}" for note in content["notes"])]
    return "\n".join(lines).rstrip() + "\n"


def to_latex(content):
    """The table as a LaTeX float with booktabs' rules and shaded cells; shrunk where it is wider than the text."""
    header, rows, numbers = content["header"], content["rows"], has_numbers(content)
    widest = [max([len(name)] + [len(row[k]["text"]) for row in rows]) for k, name in enumerate(header)]
    wraps = [width > 34 and not number for width, number in zip(widest, numbers)]
    room = 0.98 - 0.0105 * sum(width for width, wrap in zip(widest, wraps) if not wrap) - 0.026 * len(header)
    paragraph = rf">{{\raggedright\arraybackslash}}p{{{max(0.12, room / max(1, sum(wraps))):.3f}\linewidth}}"
    columns = "".join(paragraph if wrap else "r" if number else "l" for wrap, number in zip(wraps, numbers))
    marked = has_marks(content)
    turned = sum(map(len, header)) + 3 * len(header) > 130
    heads = [escape_latex(name) for name in header]
    heads[1:] = [rf"\rotatebox{{90}}{{{name}}}" if turned else name for name in heads[1:]]
    lines = [f"% {content['name']}: \\usepackage{{booktabs,graphicx,array}} and \\usepackage[table]{{xcolor}}",
             r"\begin{table}[htbp]", r"\centering",
             rf"\caption{{{escape_latex(content['title'])}. {escape_latex(content['caption'])}}}",
             rf"\label{{tab:{content['name']}}}", r"\vspace{4pt}"]
    lines += [] if any(wraps) else [r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"]
    lines += [r"\small" + r"\setlength{\tabcolsep}{3pt}" * (len(header) > 8), rf"\begin{{tabular}}{{{columns}}}", r"\toprule",
              "{}" + " & ".join(heads) + r" \\", r"\midrule"]
    for before, row in zip([None, *rows], rows):
        lines += [r"\midrule"] if before and row[0]["bold"] and not before[0]["bold"] else []  # before the rows of means
        lines.append("{}" + " & ".join(map(latex_cell, row, marked)) + r" \\")  # {}: a name may begin with [ or *
    lines += [r"\bottomrule", r"\end{tabular}" + ("" if any(wraps) else "}")]
    if content["notes"]:
        lines += ["", r"\smallskip", r"\parbox{\linewidth}{\footnotesize " + " ".join(map(escape_latex, content["notes"])) + "}"]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


def latex_cell(one, marked):
    """marked: the column has marks, and a number without one leaves room for it."""
    text = escape_latex(one["text"]).replace(r" $\pm$ ", r"$\pm$")
    text = rf"\textbf{{{text}}}" if one["bold"] and text else text
    text += r"\phantom{ *}" * (marked and not one["mark"] and one["value"] is not None)
    return text if one["shade"] is None else rf"\cellcolor{{black!{round(5 + 40 * one['shade'])}}}{text}"


def wrapped(text, first="", rest="  "):
    return textwrap.fill(one_line(text), 118, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def print_table(content):
    """The table on the terminal, aligned; a wide matrix has numbers for its columns' names."""
    header, marked = list(content["header"]), has_marks(content)
    rows = [[one["text"] + "  " * (room and not one["mark"]) for one, room in zip(row, marked)] for row in content["rows"]]
    if content["kind"] == "matrix" and len(header) > 7:
        rows = [[f"{number:2} {row[0]}", *(text.replace(" ± ", "±") for text in row[1:])] for number, row in enumerate(rows, 1)]
        header = ["", *map(str, range(1, len(header)))]
    rows = [[one_line(text) if len(text) <= 60 else one_line(text[:59]) + "…" for text in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    print(f"\n{one_line(content['title'])}" + (f" ({content['paper']})" if content["paper"] else ""))
    for line in [header, *rows]:
        print("  ".join(text.rjust(width) if right else text.ljust(width)
                        for text, width, right in zip(line, widths, has_numbers(content))).rstrip())
    for note in content["notes"]:
        print(wrapped(note, "  "))


def write_tables(out, contents, found, warnings, missing, options):
    """All files of the folder `out`, each whole or not at all; tables.json last."""
    def write(name, text):
        files.write_file(out / name, text.encode("utf-8", "replace"))

    for content in contents:
        files.write_table(out / f"{content['name']}.csv", *csv_rows(content))
        write(f"{content['name']}.md", to_markdown(content))
        write(f"{content['name']}.tex", to_latex(content))
    files.write_table(out / "missing.csv", ["dataset", "table", "what"], [list(one.values()) for one in missing])
    inputs = "".join(f"\\input{{{content['name']}}}\n\\clearpage\n" for content in contents)
    write("tables.tex", PREAMBLE + inputs + "\\end{document}\n")
    write("tables.md", page(contents, found, warnings, missing))
    keys = ("text", "value", "shade", "bold", "hint")
    plain = [{**content, "rows": [[{key: one[key] for key in keys} for one in row] for row in content["rows"]]}
             for content in contents]
    made_with = {"versions": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
                 "options": options}
    everything = {"tables": plain, "statements": found, "warnings": warnings, "missing": missing, "made_with": made_with}
    write("tables.json", json.dumps(everything, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def page(contents, found, warnings, missing):
    """tables.md: what the numbers support, what to beware of, the tables, what is missing."""
    lines = ["# Tables", "", "## What the numbers support", ""]
    for one in found:
        text = escape_markdown(one["text"])
        lines.append(f"- {f'**{text}**' if one['main'] else text} _{escape_markdown(one['test'])}_")
    lines += ["", "## What to beware of", "", *(f"- {escape_markdown(line)}" for line in warnings or ["Nothing was found."])]
    lines += ["", "## Tables", "", *map(to_markdown, contents), "## What is missing", ""]
    lines += [f"- {escape_markdown(one['dataset'])}: {escape_markdown(one['what'])}" for one in missing] or ["Nothing."]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- the papers' tables


def published_matrix(name, title, paper, dataset, rows):
    """Tables 2 to 4 as printed: rows of (name, name, per cent, ±)."""
    names = list(dict.fromkeys([row[0] for row in rows] + [row[1] for row in rows]))
    values = {pair: (float(mean) / 100, float(std) / 100) for a, b, mean, std in rows for pair in ((a, b), (b, a))}
    lines = [[cell(a), *(pair_cell(*values[a, b], None) if (a, b) in values else dict(EMPTY) for b in names)] for a in names]
    return table(name, title, "Correlation of saliency maps as published, per cent.", ["", *names], shaded(lines),
                 dataset=dataset, paper=paper, kind="matrix")


def published_cell(value):
    mark = "*" * (value is not None and value > PUBLISHED_THRESHOLD)
    return dict(EMPTY) if value is None else cell(f"{value:.2f}" + f" {mark}" * bool(mark), value, mark=mark)


def published_tables():
    """The papers' tables of published/, those that ours can be put beside."""
    sop, grouped, oi = ([*zip(*files.read_table(HERE / "published" / f"{name}.csv").values())] for name in (
        "kobs_table2_sop_correlation", "kobs_tables3_4_grouped_correlation", "oi_table1_split"))
    table2 = published_matrix("published_table2", "Correlation of saliency maps, SOP, published", "Table 2", "sop", sop)
    averaged = {tuple(sorted((a, b))): (float(mean) / 100, float(std) / 100, "") for a, b, mean, std in sop}
    condensed = group_table("sop", "correlation", averaged, "type", {row["name"]: row["type"] for row in losses()}, TYPES)
    condensed |= {"name": "published_table2_by_type", "title": "Correlation by type, SOP, from the published Table 2",
                  "paper": "Table 2", "notes": ["Condensed here; the paper prints the full table alone."]}
    tables3_4 = [published_matrix(f"published_table{number}", f"Correlation by type, {dataset}, published", f"Table {number}",
                                  dataset, [row[1:] for row in grouped if row[0] == dataset])
                 for number, dataset in ((3, "cars196"), (4, "cub200"))]
    rows = [[cell(loss.replace(" Mean", " mean"), bold=loss.endswith(" Mean")),
             *map(published_cell, values.values())] for loss, values in published_nrprec().items()]
    shaded(rows[:-2], lambda value: math.log1p(max(value, 0)))
    table6 = table("published_table6", "NR-Prec, published", "NR-Prec of 100,000 rendered cars, networks trained on Cars196.",
                   ["Loss", *published_nrprec()["None"]], rows, paper="Table 6", notes=[
                       f"* above {PUBLISHED_THRESHOLD}, the published mark. ProxyNCA's last cell is missing in our source.",
                       "NR-Prec grows with the number of pictures: compare the order of properties and of losses, not the "
                       "values."])
    rows = [[f"{dataset}, {splitting}", *(cell(f"{float(value):.3f}", value) for value in values)]
            for dataset, splitting, *values in oi]
    oi_table1 = table("published_oi_table1", "Normalized Softmax on the test split, published",
                      "The second paper's scores by the split of the classes.",
                      ["Data set, splitting", "Recall@1", "MAP@R", "JSD"], rows, paper="Oi et al., Table 1")
    return [table2, condensed, *tables3_4, table6, oi_table1]


def ours_beside(content, tables_of):
    """Our tables of what a published table shows."""
    if content["name"] == "published_oi_table1":
        rows = [[f"{dataset}, {row[1]['text']}", *row[3:6]] for dataset in ("cars196", "cub200")
                for one in tables_of.get(dataset, []) if one["name"] == f"training_{dataset}"
                for row in one["rows"] if row[0]["text"] == "Normalized Softmax"]
        title = "Normalized Softmax on the test split, ours"
        return [table("ours_oi_table1", title, "", content["header"], rows)] if rows else []
    prefix = {"published_table2": "correlation_", "published_table6": "nrprec_"}.get(content["name"], "correlation_by_type_")
    return [one for dataset, tables in tables_of.items() for one in tables
            if one["name"] == prefix + file_name(dataset) and content["dataset"] in (None, dataset)]


def difference_table(published, ours):
    """Ours − published, for the rows and columns that both have; None where there are none."""
    columns = [name for name in published["header"][1:] if name in ours["header"]]
    theirs = {row[0]["text"]: dict(zip(published["header"], row)) for row in published["rows"]}
    form = (100, 0) if published["kind"] == "matrix" else (1, 3) if published["name"] == "published_oi_table1" else (1, 2)

    def difference(a, b):
        return dict(EMPTY) if None in (a, b) else cell(signed(form[0] * (a - b), form[1]), a - b)

    rows = []
    for row in ours["rows"]:
        mine, other = dict(zip(ours["header"], row)), theirs.get(row[0]["text"])
        if other:
            rows.append([row[0]["text"], *(difference(mine[name]["value"], other[name]["value"]) for name in columns)])
    if not any(one["value"] is not None for row in rows for one in row[1:]):
        return None
    name = published["name"].replace("published", "difference") + (f"_{ours['dataset']}" if ours["dataset"] else "")
    return table(name, f"{ours['title']}: ours − published", "The difference of our numbers and the published ones.",
                 [ours["header"][0], *columns], rows, dataset=ours["dataset"], paper=published["paper"], kind=published["kind"],
                 notes=["NR-Prec grows with the number of pictures, and with another null: the order of properties compares, "
                        "the size does not."] if published["name"] == "published_table6" else [])


# ---------------------------------------------------------------- the command


def say(text):
    print(f"tables.py: {text}", file=sys.stderr)


def fail(message):
    say(" ".join(str(message).split()))
    sys.exit(2)


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = fail
    add = parser.add_argument
    add("results", nargs="?", type=Path, metavar="RESULTS", help="results/ with data sets' folders in it, or one of these "
                                                                 "folders")
    add("--out", type=Path, metavar="DIR", help="where the tables go, made if need be (tables); with --published only if given")
    add("--published", action="store_true", help="print the papers' tables, with RESULTS ours beside them and the differences")
    add("--models", type=Path, default=HERE / "models", metavar="DIR", help="has trained/<dataset>/<slug>/fold<k>/ (models/)")
    return parser.parse_args(argv)


def check_folder(out, folders):
    """Make the folder of the tables; raises ValueError when it is one of the results' or can't be written."""
    if out.resolve() in [folder.resolve() for folder in folders]:
        raise ValueError(f"--out {out} is a folder of results; writing there could destroy them: choose another")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    out.mkdir(parents=True, exist_ok=True)
    files.check_output(out / "tables.json")


def dataset_tables(results):
    """All tables of one data set."""
    absent = [row["name"] for row in losses() if row["name"] not in results.types]
    if absent:
        results.lacks("", f"no results of {listing(absent, 14)}")
    return [properties_table(results), *nrprec_tables(results), *comparison_tables(results), *masks_table(results),
            *sanity_table(results), *pair_tables(results), *training_table(results)]


def papers_tables(tables_of):
    """The papers' tables, with ours and the differences after each."""
    contents = [losses_table([]), properties_table(None)]
    for content in published_tables():
        contents.append(content)
        for ours in ours_beside(content, tables_of):
            contents += [one for one in (ours, difference_table(content, ours)) if one]
    return contents


def show(everything, contents, found, warnings, missing, out):
    """The terminal's summary: the short tables, the statements, what to beware of and what is missing."""
    for content in contents:
        if re.match(r"(nrprec_tests|correlation_by_type|corrected_by_type|pairs(?!_tests))_", content["name"]):
            print_table({**content, "notes": []})
    print("\nWhat the numbers support (★ main)")
    for one in found:
        print(wrapped(one["text"], "★ " if one["main"] else "- "))
    for title, lines in ("What to beware of", warnings), ("Missing", [f"{one['dataset']}: {one['what']}" for one in missing]):
        print(f"\n{title}" if lines else "", end="\n" if lines else "")
        for line in lines[:12]:
            print(wrapped(line, "- "))
        if len(lines) > 12:
            print(f"  … {len(lines) - 12} more in {out / ('missing.csv' if title == 'Missing' else 'tables.md')}")
    print(f"\n{len(contents)} tables of {listing(results.name for results in everything)}: {out / 'tables.md'}, "
          f"{out / 'tables.tex'} (pdflatex), {out / 'tables.json'}")


def main(argv=None):
    args = parse(argv)
    if args.results is None and not args.published:
        raise ValueError("which results? Give results/ or one data set's folder in it; --published prints the papers' tables")
    folders = find_datasets(args.results) if args.results else []
    everything = [read_results(folder, args.models) for folder in folders]
    tables_of = {results.name: dataset_tables(results) for results in everything}
    if args.published:
        contents = papers_tables(tables_of)
        for content in contents:
            print_table(content)
        if not args.out:
            return
    else:
        contents = [losses_table(everything), *(one for tables in tables_of.values() for one in tables), errata_table()]
    # the three main statements are of the data set with most of these tables, then with most in them
    wealth = lambda results: (sum(name in results.rows for name in ("nrprec", "compare", "masks")), len(results.networks),
                              len(results.rows.get("nrprec", [])))
    first = max(everything, key=wealth, default=None)
    found = [one for results in everything for one in statements(results, results is first)]
    warnings = [f"{results.name}: {line}" for results in everything for line in warnings_for(results)]
    missing = [one for results in everything for one in results.missing]
    names = [content["name"] for content in contents]
    if len(set(names)) < len(names):
        raise ValueError(f"two data sets' names give one file name ({max(names, key=names.count)}); rename one's folder")
    args.out = args.out or Path("tables")
    check_folder(args.out, [*([args.results] if args.results else []), *folders])
    options = {"results": str(args.results) if args.results else None, "published": args.published}
    write_tables(args.out, contents, found, warnings, missing, options)
    if not args.published:
        show(everything, contents, found, warnings, missing, args.out)


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our tables has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        say("stopped; nothing half-written remains")
        sys.exit(130)
