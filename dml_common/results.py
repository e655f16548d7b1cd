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

from dml_common import conclusions, files, folders
from dml_common.conclusions import CLIP, LEVEL, mann_whitney, released_p
from dml_common.folders import TABLES
from dml_common.properties import SIGNIFICANCE, holm

MARK = 2.576  # of one z-score at 1 %: the published mark of NR-Prec

TEXTS = {"model", "fold", "model_a", "fold_a", "model_b", "fold_b", "loss", "embeddings", "property",
         "distance", "null", "label", "measure", "lowest", "split", "ties", "order",
         "normalised", "value"}  # columns of tables that are no numbers
SCORES = ("recall_at_1", "map_at_r", "jsd", "jsd_null", "r_precision", "positive_mean", "negative_mean")
TESTED = ("recall_at_1", "map_at_r", "jsd", "r_precision")
CURVES = ("loss", "positive_mean", "negative_mean", "negative_std", "jsd", "jsd_null", "jsd_above",
          "recall_at_1", "map_at_r")  # of history.csv; jsd_above: less jsd_null
FISHER = ("correlation", "ceiling", "sanity")  # correlations
POOLED = ("correlation", "jsd", "jsd_nats", "sanity")  # their spread is over pictures
MEAN_ERROR = ("masks", "faithfulness")  # their spread is the standard error of a mean over pictures

# One fact. What does not apply is None.
# measure and key:
#     nr_precision, r_precision   key: the property
#     correlation, jsd, ceiling, corrected, cka, overlap, overlap_chance: of two, `network` and `other`
#     masks      key: share, area, other, excess, pointing, pointing_other
#     faithfulness               key: deletion, insertion, deletion_less_random, …
#     sanity, pairs              key: "25 of 50" layers randomised; one of SCORES
#     values     NR-Prec of one value; key: "color = red"
#     classes    key: one of SCORES, JSD above its null; epoch: the number of classes of random subsets
#     training   key: one of CURVES; part: train, validation or test; epoch: 0, 1, …; of test 0 and "best"
#     order      of the properties against Table 6 (level "test")
# level:
#     network    one network, or two. fold: k as read, "0/1" (two folds), None (a network without folds), or
#                "mean" over n folds. low, high: as read the 95 % interval over pictures or queries; of "mean"
#                the range over folds (of training, where there are several seeds, Student's 95 % interval
#                over them: note "seeds"), of one fold its interval, of masks the 95 % interval over pictures.
#                spread: as read ± over pictures; of "mean" over all folds' pictures (correlation, jsd,
#                sanity), else the folds' standard deviation; of masks always the standard error
#     type       mean over a type's networks (network: the type); spread: their standard deviation; low, high:
#                Student's 95 % interval over them. Of pairs: over those of two different networks (network,
#                other: the types); spread: a pair's typical ±; low, high: the pairs' range
#     distance   the same by the losses' distances
#     all        the same over all networks with a loss, or over all where none has one
#     test       ranking against classification losses: rank-biserial correlation, p, p_holm; low: the
#                smallest p_holm that so few losses allow; mark: the larger type
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

    def matrix(self, measure, names):
        """Means over folds of pairs as float64 (K, K), symmetrical; nan where there is none."""
        values = np.full((len(names), len(names)), np.nan)
        for pair, row in self.cells(measure).items():
            i, j = map(names.index, pair)
            values[i, j] = values[j, i] = row.value
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
    lines = tables.get("nrprec", [])
    tables["values"] = [line for line in lines if line.get("value")]  # nrprec.py --per-value
    tables["nrprec"] = [line for line in lines if not line.get("value")]
    tables = {table: lines for table, lines in tables.items() if lines}
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
    """pairs.py's histograms.csv of a data set's folder -> (its label, {network: [counts (2, bins) …]}).

    Counts of positive and negative pairs, summed over the folds; behind them those before training, where
    train.py counted them in every fold. Nothing where there is no table.
    """
    path, counts, folds = folder / "histograms.csv", defaultdict(list), defaultdict(list)
    if not path.is_file():
        return None, folds
    rows = read_rows(path, "pairs.py --histograms", ["embeddings", "label", "bins", "positive", "negative"])
    for row in rows:
        if row["bins"] == rows[0]["bins"] and row.get("split", "test") == "test":
            counts[Path(row["embeddings"]).parts[-3:-1]].append((row["positive"], row["negative"]))
    for network in networks:
        place, history = (network["slug"], network["folder"].name), network["history"]
        if place in counts:
            begun = counted_pairs(history).get(0) if history else None
            parts = [np.array(counts[place]).T, *([] if begun is None else [begun])]
            folds[network["name"]].append(parts)
    return rows[0]["label"], {name: list(map(sum, zip(*parts))) for name, parts in folds.items()}


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
            n = counted(row)
            for end in row["ends"]:
                here = lengths.get((*end, kind), n)
                if n and here != n and row.get("nr_precision_se") is None:  # else a sample of the queries
                    raise ValueError(f"{results.folder / table}.csv counts {n:,.0f} pictures for {end[0]}, "
                                     f"its {kind}.npy has {here:,}: they do not belong together; run "
                                     f"{table}.py again")


def counted(line):
    """The pictures of a table's row: those that counted, and those left out."""
    there, gone = line.get("n") or line.get("queries") or 0, line.get("left_out") or line.get("skipped") or 0
    return there + gone + (line.get("missing") or 0)


def tidy(results):
    """All rows of a data set: as read, their means over folds and over groups of networks, and the tests."""
    dataset, _, split = results.name.partition("@")
    base = Row(dataset, None, level="network", split=split or None, mark="", note="")
    rows = [base._replace(**facts) for facts in [*table_facts(results), *training_facts(results)]]
    rows = [row for row in rows if row.value is not None]
    means = list(fold_means(results, rows))
    groups = list(group_means(results, means))
    tests = [*type_tests(rows, means, "nr_precision"), *type_tests(rows, means, "pairs", TESTED),
             *order_test(groups)]
    return rows + means + groups + [base._replace(**facts) for facts in tests]


def table_facts(results):
    """What the tables say, as columns of Row."""
    order = list(results.types)
    for table, lines in results.tables.items():
        for line in pair_lines(lines) if table == "pairs" else lines:
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
            elif table in MEAN_ERROR:
                known = line["std"] is not None and (line["n"] or 0) > 1
                yield {**facts, "measure": table, "key": line["measure"], "value": line["mean"],
                       "spread": line["std"] / math.sqrt(line["n"] - 1) if known else None,
                       "low": line["low"], "high": line["high"]}
            elif table == "sanity":
                yield {**facts, "measure": "sanity", "key": f"{line['layers']:.0f} of {line['of']:.0f}",
                       "value": line["correlation"], "spread": line["correlation_std"]}
            elif table == "values":
                yield {**facts, "measure": "values", "key": f"{line['property']} = {line['value']}",
                       "n": line["queries"], "p_holm": line.get("p_holm"),
                       **around(line["nr_precision"], line.get("nr_precision_se"))}
            elif table == "pairs":
                measure = "pairs" if line.get("subset") is None else "classes"
                for key in SCORES:
                    yield {**facts, "measure": measure, "key": key, "value": line.get(key),
                           "epoch": line.get("subset"), "note": f"{line['bins']:.0f} bins"}
            else:
                for measure in TABLES[table][2]:
                    yield {**facts, "other": names[1], "measure": measure, "value": line.get(measure),
                           "spread": line.get(f"{measure}_std"), "low": line.get(f"{measure}_low"),
                           "high": line.get(f"{measure}_high")}


def pair_lines(lines):
    """Lines of pairs.csv: of all classes of the test split, at one number of bins (200, else the first), then
    means over the random subsets of so many classes ("subset"), in which JSD is above its null."""
    lines = [line for line in lines if line.get("split", "test") == "test"]
    bins = [line["bins"] for line in lines]
    lines = [line for line in lines if line["bins"] == (200 if 200 in bins else bins[0])]
    subsets = defaultdict(list)
    for line in lines:
        if line.get("repeat") is None:
            yield line
        if line.get("classes"):
            subsets[line["embeddings"], int(line["classes"])].append(line)
    for (_, number), several in subsets.items():
        means = {}
        for key in ("recall_at_1", "map_at_r", "jsd", "jsd_null"):
            scores = [line[key] for line in several if line.get(key) is not None]
            means[key] = float(np.mean(scores)) if scores else None
        null = means.pop("jsd_null")
        if None not in (null, means["jsd"]):
            means["jsd"] -= null
        yield {"ends": several[0]["ends"], "bins": several[0]["bins"], "subset": number, **means}


def training_facts(results):
    """What the training histories say, as columns of Row."""
    for network in filter(lambda network: network["history"], results.networks):
        split = network["config"].get("split")
        facts = {"measure": "training", "network": network["name"], "type": network["type"],
                 "fold": network["fold"], "seed": network["seed"],
                 "split": split.get("kind") if isinstance(split, dict) else split}
        lines = read_rows(network["history"], "train.py", ["epoch", "split", *SCORES[:3]])
        lines = [line for line in lines if line["epoch"] is not None]
        best = max((line["epoch"] for line in lines if line["split"] == "test"), default=0)
        counts = counted_pairs(network["history"])
        for line in lines:
            part, epoch = line["split"], int(line["epoch"])
            if part == "test" and epoch in counts:
                line["negative_std"] = spread(counts[epoch][1])
            if line.get("jsd_null") is not None and line["jsd"] is not None:
                line["jsd_above"] = line["jsd"] - line["jsd_null"]
            if part != "test" or epoch in (0, best):
                epoch = "best" if part == "test" and epoch else epoch
                for key in CURVES:
                    yield {**facts, "key": key, "part": part, "epoch": epoch, "value": line.get(key)}


def counted_pairs(history):
    """{epoch: counts of positive and negative pairs of the test part (2, bins)} of train.py's histograms.csv
    beside a history; {} without one."""
    path, counts = history.with_name("histograms.csv"), defaultdict(list)
    if path.is_file():
        for row in read_rows(path, "train.py", ["epoch", "split", "positive", "negative"]):
            if row["split"] == "test":
                counts[int(row["epoch"])].append((row["positive"], row["negative"]))
    return {epoch: np.array(rows).T for epoch, rows in counts.items()}


def spread(counts):
    """The standard deviation of a histogram (bins,) over [-1, 1]."""
    centres = (np.arange(len(counts)) + 0.5) * 2 / len(counts) - 1
    mean = np.average(centres, weights=counts)
    return float(np.sqrt(np.average((centres - mean)**2, weights=counts)))


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
    if first.measure in MEAN_ERROR:  # standard errors: the networks of a fold share their pictures
        spread = float(np.linalg.norm(spreads) / n if over == "folds" else spreads.mean())
        spread = None if None in [row.spread for row in rows] else spread
        value, low, high = around(value, spread).values()
        if (over, n, first.measure) == ("folds", 1, "faithfulness"):
            low, high = first.low, first.high  # Student's, as saliency.py has it
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
        seeds = defaultdict(list)
        for row in chain(*map(dict.values, folds.values())) if mean.measure == "training" else ():
            seeds[row.seed].append(row.value)
        if len(seeds) > 1:  # Oi et al., Table 1: Student's interval over the seeds
            over = conclusions.mean_of(map(np.mean, seeds.values()))
            mean = mean._replace(low=over.low, high=over.high, n=over.n, note="seeds")
        if mean.measure in ("nr_precision", "values"):  # above chance in every fold; p_holm is two-sided
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
            note = "exact" if ways <= conclusions.MOST else f"{conclusions.MOST:,} random ways"
            tests.append({**facts, "level": "test", "value": 2 * u / (len(x) * len(y)) - 1, "p": p,
                          "n": len(x + y), "low": 2 / ways, "note": note})
            note = f"{len(pooled[0])} against {len(pooled[1])} fold values"
            released.append({**facts, "level": "released", "value": float(np.mean(x) - np.mean(y)),
                             "p": released_p(*pooled), "note": note})
    for test, p in zip(tests, holm([test["p"] for test in tests])):
        test |= {"p_holm": float(p), "low": min(1.0, len(tests) * test["low"])}
    for test in tests + released:
        shown = test["p_holm"] < LEVEL if test["level"] == "test" else test["p"] < SIGNIFICANCE
        test["mark"] = ("ranking" if test["value"] > 0 else "classification") if shown else ""
    return tests + released


def order_test(groups):
    """The properties' order against the paper's."""
    ours = {row.key: row.value for row in groups if (row.measure, row.level) == ("nr_precision", "all")}
    losses = [row for name, row in published_nrprec().items() if not name.endswith(("None", " Mean"))]
    shared = [key for key in ours if losses and key in losses[0]]
    theirs = {key: np.mean([row[key] for row in losses if row[key] is not None]) for key in shared}
    if len(shared) > 2 and len({ours[key] for key in shared}) > 1:  # Spearman's rank correlation
        method = stats.PermutationMethod(n_resamples=conclusions.PERMUTATIONS, rng=np.random.default_rng(0))
        test = stats.pearsonr(*(stats.rankdata([side[key] for key in shared]) for side in (ours, theirs)),
                              method=method)
        yield {"measure": "order", "level": "test", "value": float(test.statistic), "p": float(test.pvalue),
               "n": len(shared)}


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


def published(middle=0.0):
    """The papers' numbers as [Results]: cars (Table 6), sop (2), cars196, cub200 (3, 4 and Oi et al., 1).

    middle: added to per cents, which the first paper truncated: 0.5 for the middle of what they may be.
    """
    sop, groups, scores = (zip(*read_published(name).values()) for name in (
        "kobs_table2_sop_correlation", "kobs_tables3_4_grouped_correlation", "oi_table1_split"))
    base = Row(None, None, level="network", fold="mean", mark="", note="")
    types = {row["name"]: row["type"] for row in files.losses()}
    types = {name: types[name] for name in folders.in_order(types)}
    distances = {row["name"]: row["distance"] for row in files.losses()}
    everything = {name: Results(name, None, [], {}, types, distances, {})
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
        measure="correlation", network=a, other=b, value=(float(mean) + middle) / 100,
        spread=float(std) / 100) for a, b, mean, std in sop]
    everything["sop"].rows += group_means(everything["sop"], everything["sop"].rows)
    for name, *kinds, mean, std in groups:
        a, b = sorted(kinds)
        everything[name].rows.append(base._replace(
            measure="correlation", level="type", network=a, other=b, fold=None,
            value=(float(mean) + middle) / 100, spread=float(std) / 100))
    for name, split, *values in scores:
        everything[name].rows += [base._replace(
            measure="training", key=key, network="Normalized Softmax", split=split, part="test", epoch="best",
            value=float(value)) for key, value in zip(("recall_at_1", "map_at_r", "jsd"), values)]
    return list(everything.values())


# What a number's settings must be to be compared with the published one.
PUBLISHED = {
    "nr_precision": {"pictures": "100000", "distance": "euclidean", "normalised": "0", "null": "binomial",
                     "max_neighbours": "1023", "ties": "index"},
    "correlation": {"order": "released", "samples": "50", "fold": "0", "shared_noise": "False",
                    "noise": "0.15", "percentile": "99", "baseline": "black", "antithetic": "False",
                    "map_size": "None", "distance": "the loss's own"},
    "training": {"backbone": "inception_v3", "dimension": "64"}}
TEST_PICTURES = {"cars196": 8131, "cub200": 5924, "sop": 60_502}


def difference(ours, theirs, measure):
    """What both have of a measure, of one data set (NR-Prec: of any) -> (Results of ours − theirs,
    [(setting, ours, theirs) …] that differ: where there are any, the differences say nothing).

    Ours is cut as theirs was: per cents of correlations are truncated, other numbers rounded to their digits.
    The paper's means of NR-Prec and ours of Table 2 have no difference: they are means of cut numbers.
    """
    def fact(row):
        return row.key, row.level, row.network, row.other, row.fold, row.split, row.part, row.epoch

    digits, per_cent = 3 if measure == "training" else 2, measure == "correlation"
    known = {fact(row): row.value for row in theirs.rows if row.measure == measure
             and (row.level == "network" or theirs.name in ("cars196", "cub200"))}
    rows = []
    for row in ours.rows if ours.name.split("@")[0] == theirs.name or measure == "nr_precision" else ():
        if row.measure == measure and fact(row) in known:
            value = math.trunc(100 * row.value + 1e-9) / 100 if per_cent else round(row.value, digits)
            rows.append(row._replace(value=round(value - known[fact(row)], digits), spread=None, low=None,
                                     high=None, n=None, p_holm=None, mark="", note="difference"))
    wanted, made = dict(PUBLISHED[measure]), settings(ours, measure) if rows else {}
    if per_cent:
        wanted["pictures"] = str(TEST_PICTURES.get(theirs.name))
    differ = [(name, made.get(name, "unknown"), one) for name, one in wanted.items() if made.get(name) != one]
    return replace(ours, rows=rows, tables={}, properties={}), differ


def settings(results, measure):
    """How a measure's numbers were made: {setting: its values, as text}."""
    made = defaultdict(dict)  # {setting: {value: None}}
    if measure == "nr_precision":
        lines = [{"ties": "index", "normalised": "0", **line, "pictures": counted(line)}
                 for line in results.tables["nrprec"]]
    elif measure == "correlation":
        lines = [{**line, "pictures": counted(line)} for line in results.tables["compare"]]
        own = {row["name"]: row["distance"] for row in files.losses()}
        for network in results.networks:
            if network["maps"]:
                distance = network["maps"].get("distance")
                if own.get(network["name"], distance) == distance:
                    distance = "the loss's own"
                lines.append({**network["maps"]["options"], "distance": distance})
        lines += [{"fold": row.fold} for row in results.select("correlation") if row.fold != "mean"]
    else:
        lines = [one["config"] for one in results.networks if one["name"] == "Normalized Softmax"]
    for line, name in product(lines, ("pictures", *PUBLISHED[measure])):
        if name in line:
            value = line[name]
            made[name][f"{value:.10g}" if isinstance(value, float) else str(value)] = None
    return {name: ", ".join(values) for name, values in made.items()}
