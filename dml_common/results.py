"""What a results folder says, as one tidy table with averages, marks and tests: all arithmetic on results.

    results/<dataset>[@<split>]/{nrprec,compare,masks,embeddings,sanity,pairs}.csv, training histories

    results, = read_all(Path("results/cars"), Path("models"))
    for row in results.select("nr_precision", fold="mean"):
        print(row.network, row.key, row.value, row.low, row.high, row.mark)

tables.py, figures.py and report.py lay out Results.rows. Averages are over the seeds of a fold, then over
folds; correlations are averaged through Fisher's z. The unit of the tests is the loss.
"""
import math
from collections import defaultdict, namedtuple
from dataclasses import dataclass, field, replace
from itertools import chain, product
from pathlib import Path

import numpy as np
from scipy import stats

from dml_common import files, folders
from dml_common.folders import SIGNIFICANCE, TABLES, TYPES

CLIP = 1 - 1e-6      # r = ±1 is cut to ±0.999999, so that Fisher's z stays finite (as in compare.py)
MARK = 2.576         # of one z-score at 1 %: the published mark of NR-Prec
LEVEL = 0.05         # of the other tests
MOST = 99_999        # partitions tried: the test is exact where there are no more, else they are random
PERMUTATIONS = 9999  # of the order of properties, and of the losses' groups

TEXTS = {"model", "fold", "model_a", "fold_a", "model_b", "fold_b", "loss", "embeddings", "property",
         "distance", "null", "label", "measure", "lowest", "split", "ties",
         "normalised"}  # columns of tables that are no numbers
SCORES = ("recall_at_1", "map_at_r", "jsd", "jsd_null", "r_precision", "positive_mean", "negative_mean")
TESTED = ("recall_at_1", "map_at_r", "jsd", "r_precision")
CURVES = ("loss", "positive_mean", "negative_mean", "jsd", "recall_at_1", "map_at_r")  # of history.csv
FISHER = ("correlation", "ceiling", "sanity")  # correlations
POOLED = ("correlation", "jsd", "sanity")      # their spread is over pictures

# One fact. What does not apply is None.
# measure and key:
#     nr_precision, r_precision   key: the property
#     correlation, jsd, ceiling, corrected, cka, overlap, overlap_chance: of two, `network` and `other`
#     masks      key: share, area, other, excess, pointing, pointing_other
#     sanity, pairs              key: "25 of 50" layers randomised; one of SCORES
#     training   key: one of CURVES; part: train, validation or test; epoch: 0, 1, …; of test 0 and "best"
#     order, same type, same distance: the other tests (level "test")
# level:
#     network    one network, or two. fold: k as read, "0/1" (two folds), None (a network without folds), or
#                "mean" over n folds. low, high: as read the 95 % interval over pictures or queries; of "mean"
#                the range over folds, of one fold its interval, of masks the 95 % interval over all pictures.
#                spread: as read ± over pictures; of "mean" over all folds' pictures (correlation, jsd,
#                sanity), else the folds' standard deviation; of masks always the standard error
#     type       mean over a type's networks (network: the type); spread: their standard deviation; low, high:
#                Student's 95 % interval over them. Of pairs: over those of two different networks (network,
#                other: the types); spread: a pair's typical ±; low, high: the pairs' range
#     distance   the same by the losses' distances
#     all        the same over all networks with a loss, or over all where none has one
#     test       ranking against classification losses: rank-biserial correlation, p, p_holm; low: the
#                smallest p that so few losses allow; mark: the larger type
#     released   the same as in the first paper's code: difference of the means, p; mark: the larger type
# split: of classes or pictures: random of cars@random; of training as config.json tells. n: pictures,
# queries, folds, networks or pairs. p_holm: of several the largest. mark of nr_precision: "*" above chance
# (fold "mean"; note: "tested" or by the "published mark"), "13 of 14" above chance (type, all).
Row = namedtuple("Row", "dataset measure key level network other type fold split seed part epoch value "
                 "spread low high n p p_holm mark note", defaults=[None] * 19)


@dataclass
class Results:
    """One data set's results."""

    name: str         # of its folder: cars, cars@random
    folder: Path
    networks: list    # of folders.find_networks
    tables: dict      # {"nrprec": [row as read, with ends: whose it is] …} of the tables that are there
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
        if level == "network":
            columns["fold"] = "mean"
        return {(row.network, row.other or row.key): row for row in self.select(measure, level, **columns)}

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
        for pair, row in self.cells(measure).items():
            if {*pair} <= {*names} and getattr(row, column) is not None:
                i, j = map(names.index, pair)
                values[i, j] = values[j, i] = getattr(row, column)
        return values


def read_all(folder, models):
    """RESULTS, or one data set's folder in it -> [Results …]; models: has trained/<dataset>/<slug>/fold<k>/.

    Raises ValueError when there are no results, and for arrays and tables that don't belong together.
    """
    return [read(place, models) for place in folders.find_datasets(folder)]


def read(folder, models):
    """One data set's folder -> Results."""
    networks, broken = folders.find_networks(folder, models)
    folders.check_together(networks)
    tables = {table: read_rows(folder / f"{table}.csv", script, required)
              for table, (script, required, _) in TABLES.items() if (folder / f"{table}.csv").is_file()}
    names = {network["name"] for network in networks}
    for row in chain(*tables.values()):
        row["ends"] = ends_of(row, networks)
        names |= {name for name, _, _ in row["ends"]}
    known = {row["name"]: row for row in files.losses() + networks}
    types = {name: known.get(name, {}).get("type", "other") for name in names}
    results = Results(folder.resolve().name, folder, networks, tables,
                      {name: types[name] for name in folders.in_order(types)},
                      {name: known.get(name, {}).get("distance") for name in names},
                      folders.read_properties(folder, networks))
    check_rows(results)
    results.rows = tidy(results)
    results.warnings = list(folders.warn(results))
    results.missing = [{"dataset": results.name, "table": table, "what": what}
                       for table, what in [*(("", what) for what in broken), *folders.gaps(results)]]
    return results


# ---------------------------------------------------------------- rows as they are read


def read_rows(path, script, required):
    """A result table -> [{column: number, None where empty or not finite; str in the columns TEXTS} …].

    Raises ValueError naming the file, and the row or the column, when it is not what the script writes.
    """
    columns = files.read_table(path)
    absent = [name for name in required if name not in columns]
    if absent:
        raise ValueError(f"{path} lacks {', '.join(absent)}; expected the table that {script} writes")
    texts = TEXTS - {"loss"} if "epoch" in columns else TEXTS  # of a history the value, elsewhere a name
    for name in columns.keys() - texts:
        for row, text in enumerate(columns[name]):
            try:
                value = float(text or "nan")
            except ValueError:
                raise ValueError(f"{path}: row {row} (counting from 0), column {name} is {text!r}; expected "
                                 "a number") from None
            columns[name][row] = value if math.isfinite(value) else None
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def ends_of(row, networks):
    """Whose a table's row is: [(network, fold, seed)], of two networks two. ValueError: it is no fold."""
    ends = [(row.get("loss") or row.get("model"), row.get("fold", ""))]  # loss: in tables of older versions
    if "model_a" in row:
        ends = [(row[f"model_{end}"], row[f"fold_{end}"]) for end in "ab"]
    elif not ends[0][0]:
        return [whose(row["embeddings"], networks)]
    for name, fold in ends:
        if fold and folders.fold_and_seed(fold)[0] is None:
            raise ValueError(f"a table's row of {name} has the fold {fold!r}; expected 0, or 0.seed2")
    return [(name, *folders.fold_and_seed(fold)) for name, fold in ends]


def whose(path, networks):
    """(network, fold or None, seed or None) of the path of an array."""
    slug, place = ("", "", *Path(path).parts)[-3:-1]
    for network in networks:
        if (network["slug"], network["folder"].name) == (slug, place):
            return network["name"], network["fold"], network["seed"]
    about, (fold, seed) = files.read_sidecar(path), folders.fold_and_seed(place)
    name = about.get("loss") or next((row["name"] for row in files.losses() if row["slug"] == slug), None)
    if name and fold is not None:
        return name, fold, seed
    return about.get("backbone") or path, None, None


def pair_histograms(folder, networks):
    """pairs.py's histograms.csv of a data set's folder -> (its label, {network: [histograms of a fold …]}).

    Histograms: [counts of positive and negative pairs (2, bins)], with those before training behind them
    where train.py counted them. Nothing where there is no table.
    """
    path, histograms = folder / "histograms.csv", defaultdict(list)
    if not path.is_file():
        return None, histograms
    rows = read_rows(path, "pairs.py --histograms", ["embeddings", "label", "bins", "positive", "negative"])
    rows = [row for row in rows if row["bins"] == rows[0]["bins"] and row.get("split", "test") == "test"]
    for network in networks:
        place, history = (network["slug"], network["folder"].name), network["history"]
        parts = [[row for row in rows if Path(row["embeddings"]).parts[-3:-1] == place]]
        if history and history.with_name("histograms.csv").is_file():
            begun = read_rows(history.with_name("histograms.csv"), "train.py", ["epoch", "split", "positive"])
            parts.append([row for row in begun if (row["epoch"], row["split"]) == (0, "test")])
        if parts[0]:
            histograms[network["name"]].append(
                [np.array([(row["positive"], row["negative"]) for row in part]).T for part in parts if part])
    return rows[0]["label"], histograms


def row_properties(network):
    """{property: str (n,)} of an emb.npy's rows: props.csv beside it, else labels.csv, else {}."""
    paths = [network["folder"] / name for name in ("props.csv", "labels.csv")]
    table = next((files.read_table(path) for path in paths if path.is_file()), {})
    if table and len(next(iter(table.values()))) != len(network["emb"]["array"]):
        raise ValueError(f"{network['folder']}: emb.npy and its props.csv or labels.csv differ in rows; all "
                         "must list the same pictures in the same order")
    return {name: np.array(table[name]) for name in table if name.lower() not in files.IDENTIFIERS}


def check_rows(results):
    """Raise ValueError when a table mixes options, or tells of other pictures than the arrays there."""
    keys = ("distance", "normalised", "null", "ties", "max_neighbours", "label")
    for table, key in product(("nrprec", "pairs"), keys):
        rows = results.tables.get(table, [])
        if key == "distance":  # normalised: each loss may have its own (nrprec.py --distance own)
            rows = [row for row in rows if row.get("normalised") != "1"]
        values = dict.fromkeys(str(row.get(key) or "none") for row in rows)
        if len(values) > 1:
            raise ValueError(f"{results.folder / table}.csv mixes {key} {' and '.join(values)}: such rows do "
                             "not belong together; make all with the same options")
    lengths = {(network["name"], network["fold"], network["seed"], kind): len(network[kind]["array"])
               for network in results.networks for kind in ("emb", "maps") if network[kind]}
    for table, kind in ("nrprec", "emb"), ("compare", "maps"):
        for row in results.tables.get(table, []):
            n = (row.get("n") or row.get("queries") or 0) + (row.get("left_out") or row.get("skipped") or 0)
            for end in row["ends"]:
                here = lengths.get((*end, kind), n)
                if n and here != n and row.get("nr_precision_se") is None:  # else a sample of the queries
                    raise ValueError(f"{results.folder / table}.csv counts {n:,.0f} pictures for {end[0]}, "
                                     f"its {kind}.npy has {here:,}: they do not belong together; run "
                                     f"{table}.py again")


def tidy(results):
    """All rows of a data set: as read, their means over folds and over groups of networks, and the tests."""
    dataset, _, split = results.name.partition("@")
    base = Row(dataset, None, level="network", split=split or None, mark="", note="")
    rows = [base._replace(**facts) for facts in [*table_facts(results), *training_facts(results)]]
    rows = [row for row in rows if row.value is not None]
    means = list(fold_means(results, rows))
    groups = list(group_means(results, means))
    tests = [*type_tests(rows, means, "nr_precision"), *type_tests(rows, means, "pairs", TESTED),
             *other_tests(results, means, groups)]
    return rows + means + groups + [base._replace(**facts) for facts in tests]


def table_facts(results):
    """What the tables say, as columns of Row."""
    order = list(results.types)
    for table, lines in results.tables.items():
        if table == "pairs":  # of all classes of the test split, at one number of bins: 200, else the first
            lines = [line for line in lines
                     if line.get("split", "test") == "test" and line.get("repeat") is None]
            bins = [line["bins"] for line in lines]
            lines = [line for line in lines if line["bins"] == (200 if 200 in bins else bins[0])]
        for line in lines:
            ends = sorted(line["ends"], key=lambda end: (order.index(end[0]), end[1] or 0))
            names, folds, seeds = zip(*ends)
            folds = dict.fromkeys(fold for fold in folds if fold is not None)  # "0/1" of two folds
            facts = {"network": names[0], "n": line.get("n"),
                     "fold": "/".join(map(str, folds)) if len(folds) > 1 else next(iter(folds), None),
                     "seed": seeds[0] if len({*seeds}) == 1 else "/".join(map(str, seeds))}
            if len(names) == 1:
                facts["type"] = results.types[names[0]]
            if table == "nrprec":
                facts |= {"key": line["property"], "n": line["queries"]}
                yield {**facts, "measure": "r_precision", "value": line["r_precision"]}
                yield {**facts, "measure": "nr_precision", "p": line.get("p_value"),
                       "p_holm": line.get("p_holm"),
                       **around(line["nr_precision"], line.get("nr_precision_se"))}
            elif table == "masks":
                known = line["std"] is not None and (line["n"] or 0) > 1
                yield {**facts, "measure": "masks", "key": line["measure"], "value": line["mean"],
                       "spread": line["std"] / math.sqrt(line["n"] - 1) if known else None,
                       "low": line["low"], "high": line["high"]}
            elif table == "sanity":
                yield {**facts, "measure": "sanity", "key": f"{line['layers']:.0f} of {line['of']:.0f}",
                       "value": line["correlation"], "spread": line["correlation_std"]}
            elif table == "pairs":
                for key in SCORES:
                    yield {**facts, "measure": "pairs", "key": key, "value": line.get(key),
                           "note": f"{line['bins']:.0f} bins"}
            else:
                for measure in TABLES[table][2]:
                    yield {**facts, "other": names[1], "measure": measure, "value": line.get(measure),
                           "spread": line.get(f"{measure}_std"), "low": line.get(f"{measure}_low"),
                           "high": line.get(f"{measure}_high")}


def training_facts(results):
    """What the training histories say, as columns of Row."""
    for network in filter(lambda network: network["history"], results.networks):
        split = network["config"].get("split")
        facts = {"measure": "training", "network": network["name"], "type": network["type"],
                 "fold": network["fold"], "seed": network["seed"],
                 "split": split.get("kind") if isinstance(split, dict) else split}
        lines = read_rows(network["history"], "train.py", ["epoch", "split", *CURVES[3:]])
        lines = [line for line in lines if line["epoch"] is not None]
        best = max((line["epoch"] for line in lines if line["split"] == "test"), default=0)
        for line, key in product(lines, CURVES):
            part, epoch = line["split"], int(line["epoch"])
            if part != "test" or epoch in (0, best):
                epoch = "best" if part == "test" and epoch else epoch
                yield {**facts, "key": key, "part": part, "epoch": epoch, "value": line.get(key)}


def around(value, error):
    """A value with its 95 % interval, where its standard error is known."""
    if value is None or error is None:
        return {"value": value, "low": None, "high": None}
    return {"value": value, "low": value - 1.96 * error, "high": value + 1.96 * error}


# ---------------------------------------------------------------- averages


def mean_row(rows, over, **changes):
    """One row of several folds (or a fold's seeds), networks, or pairs of networks, as said at Row.

    Correlations are averaged through Fisher's z, and their spreads, tanh of the standard deviation of z, too.
    """
    first, n, fisher = rows[0], len(rows), rows[0].measure in FISHER
    values, spreads = np.array([(row.value, row.spread or 0) for row in rows]).T
    z, s = (np.arctanh(np.clip(one, -CLIP, CLIP)) if fisher else one for one in (values, spreads))
    between = (z - z.mean())**2 if over == "folds" else 0  # the folds' pictures are taken together
    both = z.mean(), np.sqrt((s**2 + between).mean())
    value, spread = map(float, np.tanh(both) if fisher else both)
    low, high = float(values.min()), float(values.max())
    if over == "networks" or over == "folds" and first.measure not in POOLED:
        spread = float(values.std(ddof=1)) if n > 1 else None
    if first.measure == "masks":  # standard errors: the networks of a fold share their pictures
        spread = float(np.linalg.norm(spreads) / n if over == "folds" else spreads.mean())
        spread = None if None in [row.spread for row in rows] else spread
        value, low, high = around(value, spread).values()
    elif over == "networks":
        half = float(stats.t.ppf(0.975, n - 1) * spread / math.sqrt(n)) if n > 1 else None
        low, high = (value - half, value + half) if n > 1 else (None, None)
    elif over == "folds" and n == 1:
        low, high = first.low, first.high
    p_holm = max((row.p_holm for row in rows if row.p_holm is not None), default=None)
    mean = first._replace(value=value, spread=spread, low=low, high=high, n=n, p=None, p_holm=p_holm)
    return mean._replace(**changes)


def fold_means(results, rows):
    """A row fold="mean" of every network (or pair), measure and key. ValueError: a fold is there twice."""
    groups = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        split = row.split if row.measure == "training" else None
        fact = row.measure, row.key, row.network, row.other, row.part, row.epoch, split
        seeds = groups[fact][row.fold]
        if row.seed in seeds:
            what = ", ".join(filter(None, [row.network, row.other, f"fold {row.fold}", row.key]))
            raise ValueError(f"{results.folder}: two rows for {what} ({row.measure}); two networks of one "
                             "name do not belong together: rename one")
        seeds[row.seed] = row
    tested = all(row.p_holm is not None for row in rows if row.measure == "nr_precision")
    for folds in groups.values():
        parts = [mean_row(list(seeds.values()), "folds") for seeds in folds.values()]
        mean = mean_row(parts, "folds", fold="mean", seed=None)
        if mean.measure == "nr_precision":  # above chance in every fold; p_holm is two-sided
            above = mean.p_holm < SIGNIFICANCE and mean.value > 0 if tested else mean.value > MARK
            mean = mean._replace(mark="*" if above else "", note="tested" if tested else "published mark")
        yield mean


def group_means(results, means):
    """Means over the networks, or the pairs of two different ones, of a type, of a distance, and of all."""
    trained = [name for name, kind in results.types.items() if kind != "none"]
    groupings = {"type": results.types, "distance": {name: results.distances.get(name) for name in trained},
                 "all": dict.fromkeys(trained or results.types, "all")}
    groups = defaultdict(list)
    for row, (level, group_of) in product(means, groupings.items()):
        ends = sorted(group_of.get(name) or "" for name in (row.network, row.other) if name)
        if row.measure not in ("training", "sanity") and row.network != row.other and all(ends):
            groups[(row.measure, row.key, level, *ends)].append(row)
    for (fact, _, level, network, *other), members in groups.items():
        mean = mean_row(members, "pairs" if other else "networks", level=level, network=network, fold=None,
                        other=other[0] if other else None, type=None, mark="")
        if fact == "nr_precision":
            mean = mean._replace(mark=f"{sum(row.mark == '*' for row in members)} of {len(members)}")
        yield mean


# ---------------------------------------------------------------- tests


def mann_whitney(x, y):
    """Two-sided Mann-Whitney U test of two or more values each -> (U, p).

    U counts the pairs with x above y, ties a half. p: the share of ways to choose len(x) of all values with
    |U − mean| at least as large as observed; of all ways, or of MOST random ones where there are more.
    """
    ranks, n = stats.rankdata([*x, *y]), len(x)
    mean = n * (len(ranks) + 1) / 2  # of the sum of x's ranks, which is U + n (n + 1) / 2

    def away(chosen, rest, axis):
        return np.abs(chosen.sum(axis=axis) - mean)

    test = stats.permutation_test((ranks[:n], ranks[n:]), away, permutation_type="independent",
                                  alternative="greater", n_resamples=MOST, rng=np.random.default_rng(0))
    return float(ranks[:n].sum() - n * (n + 1) / 2), float(test.pvalue)


def released_p(x, y):
    """The p-value of the first paper's code: half the two-sided one of the normal approximation, the default
    of its SciPy (below 1.7), with corrections for continuity and ties. 0.5 where all values are equal."""
    if len({*x, *y}) == 1:
        return 0.5
    return float(stats.mannwhitneyu(x, y, alternative="two-sided", method="asymptotic").pvalue / 2)


def holm(p):
    """Holm's correction of the p-values p."""
    p, k = np.asarray(p, float), len(p)
    order, adjusted = np.argsort(p), np.empty(k)
    adjusted[order] = np.minimum(1, np.maximum.accumulate((k - np.arange(k)) * p[order]))
    return adjusted


def type_tests(rows, means, measure, keys=None):
    """Ranking against classification losses of each key, Holm-corrected over them, as columns of Row.

    The unit is the loss, its mean over folds; the released way takes all folds for independent.
    """
    values = defaultdict(list)
    for row in rows + means:
        if row.measure == measure:
            values[row.key, row.type, row.fold == "mean"].append(row.value)
    tests, released = [], []
    for key in keys or dict.fromkeys(key for key, _, _ in values):
        x, y = values[key, "ranking", True], values[key, "classification", True]
        if min(len(x), len(y)) > 1:
            pooled = values[key, "ranking", False], values[key, "classification", False]
            facts = {"measure": measure, "key": key, "network": "ranking", "other": "classification"}
            (u, p), ways = mann_whitney(x, y), math.comb(len(x + y), len(x))
            note = "exact" if ways <= MOST else f"{MOST:,} random ways"
            tests.append({**facts, "level": "test", "value": 2 * u / (len(x) * len(y)) - 1, "p": p,
                          "n": len(x + y), "low": 2 / ways, "note": note})
            note = f"{len(pooled[0])} against {len(pooled[1])} fold values"
            released.append({**facts, "level": "released", "value": float(np.mean(x) - np.mean(y)),
                             "p": released_p(*pooled), "note": note})
    for test, p in zip(tests, holm([test["p"] for test in tests])):
        test["p_holm"] = float(p)
    for test in tests + released:
        shown = test["p_holm"] < LEVEL if test["level"] == "test" else test["p"] < SIGNIFICANCE
        test["mark"] = ("ranking" if test["value"] > 0 else "classification") if shown else ""
    return tests + released


def other_tests(results, means, groups):
    """The properties' order against the paper's; whether maps of one type, of one distance, agree more."""
    ours = {row.key: row.value for row in groups if (row.measure, row.level) == ("nr_precision", "all")}
    losses = [row for name, row in published_nrprec().items() if not name.endswith(("None", " Mean"))]
    shared = [key for key in ours if losses and key in losses[0]]
    theirs = {key: np.mean([row[key] for row in losses if row[key] is not None]) for key in shared}
    if len(shared) > 2 and len({ours[key] for key in shared}) > 1:  # Spearman's rank correlation
        method = stats.PermutationMethod(n_resamples=PERMUTATIONS, rng=np.random.default_rng(0))
        test = stats.pearsonr(*(stats.rankdata([side[key] for key in shared]) for side in (ours, theirs)),
                              method=method)
        yield {"measure": "order", "level": "test", "value": float(test.statistic), "p": float(test.pvalue),
               "n": len(shared)}
    z = {(row.network, row.other): np.arctanh(np.clip(row.value, -CLIP, CLIP)) for row in means
         if row.measure == "correlation" and row.network != row.other}
    kinds = {name: kind for name, kind in results.types.items() if any(name in pair for pair in z)}
    types = {name: kind for name, kind in kinds.items() if kind in TYPES[:2]}
    distances = {name: results.distances[name] for name in kinds
                 if kinds[name] != "none" and results.distances[name]}
    for measure, group_of in ("same type", types), ("same distance", distances):
        facts = same_group({pair: z[pair] for pair in z if {*pair} <= {*group_of}}, group_of)
        if facts:
            yield {"measure": measure, "level": "test", **facts}


def same_group(z, group_of):
    """Do two losses of one group agree more than two of different groups? Columns of Row; {}: none can tell.

    z: {(network, network): Fisher's z}. The groups are permuted over the networks: pairs are not independent.
    """
    names, values = list(group_of), np.array(list(z.values()))
    a, b = np.array([[names.index(name) for name in pair] for pair in z], int).reshape(-1, 2).T
    codes = np.unique(list(group_of.values()), return_inverse=True)[1]

    def means(codes):
        same = codes[..., a] == codes[..., b]
        return [(values * chosen).sum(-1) / np.maximum(1, chosen.sum(-1)) for chosen in (same, ~same)]

    def difference(codes, axis):
        return np.abs(np.subtract(*means(codes)))

    if len(names) < 3 or len(np.unique(codes[a] == codes[b])) < 2:
        return {}
    test = stats.permutation_test((codes,), difference, permutation_type="pairings", alternative="greater",
                                  n_resamples=PERMUTATIONS, rng=np.random.default_rng(0))
    within, between = np.tanh(means(codes))
    return {"value": float(within - between), "p": float(test.pvalue), "n": len(names),
            "note": f"{within:.3f} against {between:.3f}"}


# ---------------------------------------------------------------- the papers' numbers


def read_published(name):
    """The columns of a table of published/; {} where that folder was not copied."""
    path = files.ROOT / "published" / f"{name}.csv"
    return files.read_table(path) if path.is_file() else {}


def cluster(distances):
    """Average linkage of a symmetrical (K, K) -> (linkage, leaf order); (None, None) where a pair is nan."""
    from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering

    pairs = np.maximum(distances[np.triu_indices(len(distances), 1)], 0)  # equal maps: 1 - r may be below 0
    if len(distances) < 3 or not np.isfinite(pairs).all():
        return None, None
    tree = optimal_leaf_ordering(linkage(pairs, "average"), pairs)
    return tree, leaves_list(tree)


def published_nrprec():
    """Table 6 as printed: {loss: {property: NR-Prec or None}}, its rows of means included."""
    columns = read_published("kobs_table6_nrprec_cars")
    losses = columns.pop("loss", [])
    return {loss: {key: float(values[row]) if values[row] else None for key, values in columns.items()}
            for row, loss in enumerate(losses)}


def published():
    """The papers' numbers as [Results]: cars (Table 6), sop (2), cars196, cub200 (3, 4 and Oi et al., 1)."""
    sop, groups, scores = (zip(*read_published(name).values()) for name in (
        "kobs_table2_sop_correlation", "kobs_tables3_4_grouped_correlation", "oi_table1_split"))
    base = Row(None, None, level="network", fold="mean", mark="", note="")
    types = {row["name"]: row["type"] for row in files.losses()}
    types = {name: types[name] for name in folders.in_order(types)}
    everything = {name: Results(name, None, [], {}, types, {}, {})
                  for name in ("cars", "sop", "cars196", "cub200")}
    for loss, values in published_nrprec().items():
        kind = loss.lower().partition(" mean")[0]
        row = base._replace(measure="nr_precision", network=loss)
        if loss.endswith(" Mean"):
            row = row._replace(level="type", network=kind, fold=None)
        everything["cars"].rows += [
            row._replace(key=key, value=value, mark="*" if value > MARK and row.fold else "")
            for key, value in values.items() if value is not None]
    everything["sop"].rows = [base._replace(
        measure="correlation", network=a, other=b, value=float(mean) / 100, spread=float(std) / 100)
        for a, b, mean, std in sop]
    everything["sop"].rows += group_means(everything["sop"], everything["sop"].rows)
    for name, *kinds, mean, std in groups:
        a, b = sorted(kinds)
        everything[name].rows.append(base._replace(
            measure="correlation", level="type", network=a, other=b, fold=None, value=float(mean) / 100,
            spread=float(std) / 100))
    for name, split, *values in scores:
        everything[name].rows += [base._replace(
            measure="training", key=key, network="Normalized Softmax", split=split, part="test", epoch="best",
            value=float(value)) for key, value in zip(("recall_at_1", "map_at_r", "jsd"), values)]
    return list(everything.values())


def difference(ours, theirs):
    """Results of what both have, ours − theirs: of one data set, of NR-Prec of any."""
    def fact(row):
        return (row.measure, row.key, row.level, row.network, row.other, row.fold, row.split, row.part,
                row.epoch)

    known = {fact(row): row.value for row in theirs.rows
             if ours.name == theirs.name or row.measure == "nr_precision"}
    rows = [row._replace(value=row.value - known[fact(row)], spread=None, low=None, high=None, n=None,
                         p_holm=None, mark="", note="difference") for row in ours.rows if fact(row) in known]
    return replace(ours, rows=rows, tables={})
