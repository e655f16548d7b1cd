"""The papers' tables and conclusions from a folder of results, as CSV, Markdown and LaTeX.

Reads:  results/ with data sets' folders in it, or one of these, as the other scripts write them:
        <dataset>/{nrprec,compare,masks,faithfulness,embeddings,sanity,pairs}.csv, <slug>/fold<k>/*.json;
        training histories beside the checkpoints or in models/trained/<dataset>/<slug>/fold<k>/
Writes: tables/NAME.{csv,tex}, one for each table; tables.tex (all of them, for pdflatex), tables.md (all of
        them, the findings, what to beware of), tables.json (for report.py), missing.csv

    python tables.py results --out tables
    python tables.py --published                # the papers' own tables, from published/
    python tables.py results --published        # with ours beside them, and the differences

The table `conclusions` has a row for each statement of the papers: our number, its interval, its test and
whether it holds. Differences to the published numbers are shown where the settings are the published ones
(--as-published of saliency.py, nrprec.py and compare.py); else the settings that differ are.

Every average is over folds first; correlations are averaged through Fisher's z. Ranking and classification
losses are compared with a Mann-Whitney U test whose unit is the loss, Holm-corrected over the properties, at
5 %; the way of the first paper's code (all folds pooled, 1 %) stands beside it under its own name.
"""
if __name__ == "__main__":  # from here on Ctrl-C ends in one line
    import sys
    try:
        from dml_common import command
    except ImportError:
        print("tables.py: the command needs the folder dml_common/ beside it; copy that too", file=sys.stderr)
        sys.exit(2)
    command.begin()

import itertools
import json
import math
import platform
import re
import textwrap
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
DISTANCES = ("euclidean", "squared_euclidean", "cosine", "dot_product", "snr")
# Measures of a network by keys, and of two networks: title, caption, times what, decimals.
MEASURES = {
    "nr_precision": ("NR-Prec", "Normalized R-Precision by property, 0 for chance, mean over folds", 1, 2),
    "masks": ("Saliency inside the object", "Inside the object's mask, per cent, mean over folds", 100, 1),
    "faithfulness": ("Faithfulness of saliency maps", "Area under the curve of the distance to the picture's "
                     "embedding, as its most salient blocks are blurred (deletion), or are all that is left "
                     "(insertion), mean over folds", 1, 3),
    "sanity": ("Sanity check", "Correlation with the trained network's maps, per cent, as layers are "
               "re-initialised from the top; 0 layers: the noise ceiling", 100, 0),
    "pairs": ("Pairs and rankings", "Scores of the second paper, mean over folds", 1, 3),
    "correlation": ("Correlation of saliency maps", "Pearson's r of two networks' maps of a picture, per "
                    "cent, ± standard deviation over pictures; averages through Fisher's z", 100, 0),
    "jsd": ("JSD of saliency maps", "Jensen-Shannon divergence (base 2) of two networks' maps of a picture, "
            "± standard deviation over pictures, both × 100; 0 for identical maps", 100, 1),
    "jsd_nats": ("JSD of saliency maps in nats", "As the first paper's code has it, × 100", 100, 1),
    "ceiling": ("Noise ceiling of the correlation", "The most that two networks' maps can correlate, by two "
                "maps of each that differ in their noise alone, per cent", 100, 0),
    "corrected": ("Correlation corrected for noise", "Divided by its noise ceiling, per cent", 100, 0),
    "cka": ("Linear CKA of embeddings", "1 for embeddings that differ by rotation and scale", 1, 2),
    "overlap": ("Common nearest neighbours", "Share of a picture's 10 nearest, per cent", 100, 0)}
PAIRS = ("correlation", "jsd", "jsd_nats", "ceiling", "corrected", "cka", "overlap")
WITH_SPREAD = ("correlation", "jsd", "sanity")
TITLES = {  # of columns, in their order
    "masks": {"share": "In the object", "area": "Object's area", "other": "In other masks",
              "excess": "Excess", "pointing": "Maximum in object",
              "pointing_other": "Maximum in other masks"},
    "faithfulness": {
        "deletion": "Deletion", "deletion_less_random": "Less random order",
        "deletion_less_other": "Less another map's", "insertion": "Insertion",
        "insertion_less_random": "Insertion less random", "insertion_less_other": "Insertion less another"},
    "pairs": {"recall_at_1": "Recall@1", "map_at_r": "MAP@R", "jsd": "JSD",
              "jsd_null": "JSD, labels permuted", "r_precision": "R-Precision",
              "positive_mean": "Positive mean", "negative_mean": "Negative mean",
              "negative_std": "Negative s.d."}}
BOLD = "Bold mean: the larger type by the exact test; †: by the released way (all folds pooled)."
NOTES = {
    "nr_precision": [BOLD], "distance": ["Networks without a loss are left out."],
    "masks": ["In other masks: the chance level of a map that knows only where objects usually are."],
    "faithfulness": ["A faithful map has a large deletion and a small insertion area. [ ]: 95 % interval "
                     "over pictures; differences are paired."],
    "pairs": [BOLD, "JSD of few pairs is biased up: labels permuted shows by how much."],
    "tested": ["* above chance: p_holm < 0.01 in every fold, by permutation of the property."],
    "published mark": ["* above 2.576, the published mark: a z-score's threshold on a mean of many."]}
PAPER = {"losses": "Table 1", "properties": "Table 5", "nrprec": "Table 6", "pairs": "Oi et al., Table 1",
         "training": "Oi et al., Table 1", "correlation_sop": "Table 2", "jsd_sop": "Table 2",
         "nrprec_tests": "Table 6", "properties_published": "Table 5",
         "correlation_by_type_cars196": "Table 3", "correlation_by_type_cub200": "Table 4"}

# ---------------------------------------------------------------- cells and tables


def cell(text, value=None, **more):
    """One cell. Its spread (±), interval and mark are columns of their own in the CSV; the text has them."""
    if isinstance(text, dict):  # it is one
        return text
    value = None if value is None else float(value)
    return {"text": str(text), "value": value, "shade": None, "bold": False, "hint": None, "spread": None,
            "low": None, "high": None, "mark": "", **more}


def table(name, title, caption, header, rows, dataset=None, kind="rows", notes=()):
    """A table as tables.json has it (the cells' spread and mark are for the CSV alone)."""
    full, title = (f"{name}_{dataset}", f"{title}, {dataset}") if dataset else (name, title)
    rows = [list(map(cell, row)) for row in rows]
    return {"name": re.sub(r"[^A-Za-z0-9_-]+", "_", full).strip("_"), "title": title,
            "caption": f"{caption}.", "dataset": dataset, "paper": PAPER.get(full) or PAPER.get(name),
            "kind": kind, "header": list(header), "rows": rows, "notes": list(notes)}


def rounded(value, digits=2, plus=""):
    """1.25 -> "1.25"; a half away from zero (62.5 -> "63"), a minus that can be read, never −0."""
    whole = math.floor(abs(value) * 10**digits + 0.5 + 1e-9) / 10**digits
    sign = ("−" if value < 0 else plus) if whole else ""
    return f"{sign}{whole:.{digits}f}"


def p_text(p):
    if p is None or p < 1e-4:
        return "" if p is None else "< 0.0001"
    return f"{p:.{4 if p < 0.01 else 3 if p < 0.1 else 2}f}"


def interval(row, factor=1, digits=2):
    """" [4.99, 6.76]", or "" where a row has no interval."""
    ends = [rounded(factor * end, digits) for end in (row.low, row.high) if end is not None]
    return f" [{', '.join(ends)}]" if ends else ""


def fact(row, factor=1, digits=2, **more):
    """A row of the tidy table (or None) as a cell; more: of the cell."""
    if row is None:
        return cell("")
    text = rounded(factor * row.value, digits, "+" if row.note == "difference" else "")
    if row.measure in WITH_SPREAD and row.spread is not None:
        text += f" ± {rounded(factor * row.spread, digits)}"
    if row.measure == "faithfulness":
        text, more = text + interval(row, factor, digits), {"low": row.low, "high": row.high, **more}
    what = "folds" if row.level == "network" else "pairs" if row.other else "losses"
    hint = f"{row.n} {what}{interval(row, factor, digits + 1)}" if row.n else None
    if hint and row.p_holm is not None:
        hint += f", largest p_holm {p_text(row.p_holm)}"
    more = {"mark": row.mark, "hint": hint, **more}
    if row.measure in (*WITH_SPREAD, "nr_precision", "pairs"):
        more["spread"] = row.spread
    return cell(f"{text} {more['mark']}".rstrip(), row.value, **more)


def line(first, rows, factor=1, digits=2):
    """A line of a table: its name, then a row of the tidy table (or None) a cell."""
    return [first, *(fact(row, factor, digits) for row in rows)]


def estimated(one, with_p=False):
    """An Estimate of conclusions.py (or None) as a cell."""
    if one is None:
        return cell("")
    p = f", p {p_text(one.p)}" if with_p and one.p is not None else ""
    return cell(rounded(one.value, 3) + interval(one, 1, 3) + p, one.value, low=one.low, high=one.high)


def shade(rows, scale=float, diagonal=True):
    """Shade the cells of these rows by value: 0 for the smallest, 1 for the largest."""
    cells = [one for i, row in enumerate(rows) for j, one in enumerate(row[1:])
             if one["value"] is not None and (diagonal or i != j)]
    values = [scale(one["value"]) for one in cells]
    for one, value in zip(cells, values):
        one["shade"] = (value - min(values)) / ((max(values) - min(values)) or 1)


# ---------------------------------------------------------------- tables of one data set's Results


def grid(one, measure):
    """A measure's table: a row a network, a column a key, and the means of the types."""
    title, caption, factor, digits = MEASURES[measure]
    cells, means, keys = one.cells(measure), one.cells(measure, "type"), one.keys(measure)
    titles = TITLES.get(measure) or dict(zip(keys, keys))
    titles = {key: text for key, text in titles.items() if key in keys}
    rows = [line(name, map(cells.get, itertools.product([name], titles)), factor, digits)
            for name in one.names(measure)]
    if measure in ("nr_precision", "sanity"):
        shade(rows, (lambda z: math.log1p(max(z, 0))) if measure == "nr_precision" else float)
    tests, released = ({row.key: row.mark for row in one.select(measure, level)}
                       for level in ("test", "released"))  # bold and †: which type is larger
    for kind in ("ranking", "classification") if measure in ("nr_precision", "pairs") else ():
        if any((kind, key) in means for key in titles):
            rows.append([cell(f"{kind.capitalize()} mean", bold=True)] + [
                fact(means.get((kind, key)), factor, digits, bold=tests.get(key) == kind,
                     mark="†" if released.get(key) == kind else "") for key in titles])
    notes, made = list(NOTES.get(measure, ())), one.tables.get("nrprec")
    if measure == "nr_precision" and made and rows:
        options = {key: str(made[0].get(key) or "").removesuffix(".0") for key in (
            "null", "distance", "max_neighbours", "permutations")}
        options = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in options.items() if value)
        notes = [*NOTES[next(iter(cells.values())).note], *notes, options]
    if measure == "pairs" and rows:
        caption += f": label {one.tables['pairs'][0]['label']}, {next(iter(cells.values())).note}"
    name = "nrprec" if measure == "nr_precision" else measure
    return table(name, title, caption, ["Layers" if measure == "sanity" else "Loss", *titles.values()], rows,
                 one.name, notes=notes)


def matrix(one, measure, level="network"):
    """A measure of pairs: a row and a column a network, a type or a distance."""
    title, caption, factor, digits = MEASURES[measure]
    cells = one.cells(measure, level)
    cells |= {(b, a): row for (a, b), row in cells.items()}
    here = set(itertools.chain(*cells))
    groups = {"network": one.types, "type": dict.fromkeys(one.types.values()), "distance": DISTANCES}[level]
    groups = [group for group in groups if group in here]
    titles = [group.replace("_", " ") if level == "distance" else group for group in groups]
    rows = [line(text, map(cells.get, itertools.product([group], groups)), factor, digits)
            for text, group in zip(titles, groups)]
    shade(rows, diagonal=level != "network")
    name, notes = measure, NOTES.get(level, ())
    if level != "network":
        name, title = f"{name}_by_{level}", f"{title} by {level}"
        caption += ". Each cell is the mean over the pairs of two different losses"
    elif any(a == b for a, b in cells):
        notes = ["Diagonal: different folds of one loss."]
    return table(name, title, caption, ["", *titles], rows, one.name, "matrix", notes)


def type_tests(one, measure, name, what):
    """Ranking against classification, key by key: the exact test, and the released way beside it."""
    title, _, factor, digits = MEASURES[measure]
    tests, types, rows = one.select(measure, "test"), one.cells(measure, "type"), []
    for test, released in zip(tests, one.select(measure, "released")):
        r, c = (fact(types[kind, test.key]._replace(spread=None, mark=""), factor, digits,
                     bold=test.mark == kind) for kind in ("ranking", "classification"))
        rows.append([TITLES.get(measure, {}).get(test.key, test.key), r, c,
                     cell(rounded(released.value, digits, "+"), released.value),
                     cell(rounded(test.value, 2, "+"), test.value, hint=f"{test.n} losses, {test.note}"),
                     cell(p_text(test.p), test.p), cell(p_text(test.p_holm), test.p_holm), test.mark,
                     cell(p_text(released.p), released.p, hint=released.note), released.mark])
    least, ways = min((test.low for test in tests), default=1), sorted({test.note for test in tests})
    notes = [f"p: two-sided Mann-Whitney U on fold averages, {' or '.join(ways)}; the unit is the loss. Holm "
             f"over the rows, 5 %; with so few losses it cannot fall below {p_text(least)}.",
             "Effect: rank-biserial correlation, 1: every ranking loss above every other, −1: below.",
             "Released p: folds pooled, not corrected, 1 %, half the two-sided p, as the first paper's code."]
    header = [what, "Ranking", "Classification", "Difference", "Effect", "p", "p, Holm", "Larger",
              "Released p", "Released: larger"]
    return table(name, f"Ranking against classification: {title}", "Means over losses. An empty cell under "
                 "“larger”: no difference could be shown", header, rows, one.name, notes=notes)


def other_tests(one):
    """The properties' order against the first paper's, and the means over all pairs of two losses."""
    rows = []
    for row in one.select("order", "test"):
        rows.append(["Spearman's rank correlation of the properties with Table 6", cell(
            rounded(row.value, 3, "+"), row.value), f"{row.n} properties", cell(p_text(row.p), row.p)])
    for measure in PAIRS:
        rows += [[f"{MEASURES[measure][0]}: mean", cell(rounded(row.value, 3), row.value),
                  f"{interval(row, 1, 3)} over {row.n} pairs", ""] for row in one.select(measure, "all")]
    return table("tests", "Other tests and means", "The test is two-sided, of 9,999 permutations",
                 ["What", "Number", "Test or range", "p"], rows, one.name)


def values(one):
    """NR-Prec of each value of each property (nrprec.py --per-value): means of the types."""
    cells = one.cells("values", "type")
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    rows = [line(key, map(cells.get, itertools.product(kinds, [key]))) for key in one.keys("values")]
    return table("nrprec_values", "NR-Prec by value", "Of the queries that have a value, means over a type's "
                 "losses", ["Value", *kinds], rows, one.name)


def training(everything):
    """The second paper's Table 1 from the training histories: the test split before and after, for every way
    to split the classes that was trained on, and the difference of these."""
    from dml_common import conclusions

    ends, rows, notes = {}, [], []  # {(loss, split): {(key, 0 or "best"): row}}
    for row in itertools.chain(*(one.select("training", fold="mean", part="test") for one in everything)):
        ends.setdefault((row.network, row.split or ""), {})[row.key, row.epoch] = row
    order = list(dict.fromkeys(itertools.chain(*(one.types for one in everything))))
    trained = {place for place in ends for _, epoch in ends[place] if epoch == "best"}
    scored = {key for place in trained for key, epoch in ends[place] if epoch == "best"}
    titles = {key: text for key, text in TITLES["pairs"].items() if key in scored}
    for name, split in sorted(trained, key=lambda place: (order.index(place[0]), place[1])):
        rows.append([name, split, ""])
        for key in titles:
            both = [row for row in map(ends[name, split].get, [(key, 0), (key, "best")]) if row]
            last, text = both[-1] if both else None, " → ".join(fact(row, 1, 3)["text"] for row in both)
            rows[-1].append(cell(text, last and last.value))
            if last and last.note == "seeds":
                rows[-1][2] = f"{last.n} seeds"
                rows[-1][-1] |= {"text": text + interval(last, 1, 3), "low": last.low, "high": last.high}
            elif last:
                rows[-1][2] = cell(last.n or "", last.n)
    for name in [name for name in order if {(name, "default"), (name, "random")} <= trained]:
        rows.append([cell(name, bold=True), "default − random", ""])
        for key in titles:
            scores = conclusions.split_scores(everything, key)
            rows[-1].append(estimated(conclusions.split_difference({name: scores.get(name, {})}), True))
        notes = ["Differences: Welch's interval and a Mann-Whitney test over seeds."]
    return table("training", "Test split before and after training", "Scores of the test split, untrained → "
                 "trained, mean over folds; [ ]: Student's 95 % interval over seeds",
                 ["Loss", "Splitting", "Folds", *titles.values()], rows, everything[0].name, notes=notes)


def conclusions_table(everything, name="conclusions"):
    """What the papers conclude, each with our number, its test and a verdict."""
    from dml_common import conclusions

    rows = []
    for one in conclusions.conclusions(everything):
        p, test = one.estimate and one.estimate.p, ""
        if one.estimate:
            test = f"{one.estimate.note}, n = {one.estimate.n}".removeprefix(", ")
        rows.append([one.paper, one.says, one.data, estimated(one.estimate), test, cell(p_text(p), p),
                     cell(p_text(one.p_holm), one.p_holm), one.verdict])
    notes = ["Holds: the interval lies on the claimed side and p, Holm over the table, is below 5 %. Does "
             "not: it lies on the other side. Else: what could have been shown, at Holm's strictest level.",
             "The unit is the loss. Intervals: Student's, Welch's, jackknife (pairs), bootstrap (order); "
             f"equal: within ± {conclusions.MARGIN}."]
    return table(name, "The papers' conclusions", "Our numbers, their 95 % intervals and tests", [
        "Paper", "Conclusion", "Data", "Ours", "Test", "p", "p, Holm", "Verdict"], rows, notes=notes)


def dataset_tables(one, everything=()):
    """All tables of one data set's results that there are numbers for; everything: it and the others."""
    tables = [properties(one)] if one.properties else []
    tables += [grid(one, "nr_precision"), type_tests(one, "nr_precision", "nrprec_tests", "Property"),
               values(one)]
    for measure in PAIRS:
        tables += [matrix(one, measure), matrix(one, measure, "type")]
        by_distance = matrix(one, measure, "distance")
        if measure in ("correlation", "jsd", "corrected") and one.folder and len(by_distance["rows"]) > 1:
            tables.append(by_distance)
    tables += [grid(one, "masks"), grid(one, "faithfulness"), grid(one, "sanity"), grid(one, "pairs"),
               type_tests(one, "pairs", "pairs_tests", "Score"), other_tests(one)]
    splits = [other for other in everything or [one] if other.name.split("@")[0] == one.name.split("@")[0]]
    if splits[0] is one:
        tables.append(training(splits))
    return [content for content in tables if content["rows"]]


# ---------------------------------------------------------------- tables of all data sets, and the papers'


def losses(everything):
    """Table 1: the losses, with the number of folds that each data set has results of."""
    from dml_common import files

    known, rows = {row["name"]: row for row in files.losses()}, []
    for one in everything:
        for name, kind in one.types.items():
            known.setdefault(name, {"type": kind, "distance": one.distances[name], "year": ""})
    for name, row in known.items():
        distance = "" if name == "None" else (row["distance"] or "").replace("_", " ")
        rows.append([name, cell(row["year"], row["year"] or None), row["type"], distance])
        for one in everything:
            folds = {(row.fold, row.seed) for row in one.select("nr_precision", network=name)
                     if row.fold != "mean"}
            folds |= {(network["fold"], network["seed"]) for network in one.networks
                      if network["name"] == name and (network["emb"] or network["maps"])}
            rows[-1].append(cell(len(folds) or "", len(folds) or None))
    return table("losses", "Losses", "Losses, their types and distances; the networks (folds and seeds) with "
                 "results",
                 ["Loss", "Year", "Type", "Distance", *(f"Networks, {one.name}" for one in everything)], rows,
                 notes=["None: ImageNet weights and an untrained last layer."])


def properties(one=None):
    """Table 5 of the results' props.csv; without one, the paper's."""
    from dml_common import files, pictures, results

    header, rows = ["Property", "Number", "Values"], []
    for name, values in (one.properties if one else {}).items():
        numbers = all(map(files.is_number, values))
        values = sorted(values, key=float if numbers else pictures.natural_key)
        words = values if len(values) < 9 else [*values[:8], "…"]
        if numbers and len(values) > 4:
            words = [*values[:2], "…", values[-1]]
        rows.append([name, cell(len(values), len(values)), ", ".join(words)])
    if rows:
        return table("properties", "Properties", "The pictures' properties and their values", header, rows,
                     one.name)
    columns = results.read_published("kobs_table5_properties")
    rows = [[name, cell(number, number), values] for name, number, values in zip(*columns.values())]
    return table("properties_published", "Properties (published)", "The first paper's rendered cars", header,
                 rows, notes=["No props.csv in the results: the paper's own."])


def errata():
    from dml_common import results

    columns = results.read_published("errata")
    return table("errata", "Errata", "Where the published descriptions, code and numbers disagree, and what "
                 "is done here", ["Paper", "Published", "Found", "Here"], zip(*columns.values()))


def papers(everything, tables_of):
    """The papers' tables, after each data set's ours, and the differences or the settings that differ."""
    from dml_common import results

    note = ["NR-Prec grows with the number of pictures, and with another null: the order of properties "
            "compares, the size does not. ProxyNCA's last cell is missing in our source."]
    tables = [losses([]), properties()]
    for theirs in results.published():
        parts = [("published", content) for content in dataset_tables(theirs)]
        for ours, measure in itertools.product(everything, results.PUBLISHED):
            both, differ = results.difference(ours, theirs, measure)
            compared = dataset_tables(both) if both.rows else []
            names = [content["name"] for content in compared]
            parts += [("ours", content) for content in tables_of[ours.name] if content["name"] in names]
            if differ and compared:  # in place of the differences
                first = table(names[0], compared[0]["title"], "Not compared: made with other settings",
                              ["Setting", "Ours", "Published"], differ)
                parts.append(("settings", first))
            else:
                parts += [("difference", content) for content in compared]
        tables += [{**content, "name": f"{kind}_{content['name']}", "title": f"{content['title']}: {kind}",
                    "notes": note if content["paper"] == "Table 6" else []} for kind, content in parts]
    tables.append(conclusions_table(results.published(0.5), "conclusions_published"))
    return tables + ([conclusions_table(everything, "conclusions_ours")] if everything else [])


# ---------------------------------------------------------------- findings: a number, its interval, its p


def findings(one):
    """The three findings of a data set, or that nothing was found."""
    topics = {"property level": property_finding(one), "ranking against classification": type_finding(one),
              "pixel level": pixel_finding(one)}
    for topic, (text, test, p) in topics.items():
        text = f"{one.name}: {text}."
        yield {"dataset": one.name, "topic": topic, "text": text, "test": test, "p_value": p}


def property_finding(one):
    properties = one.select("nr_precision", "all")
    if not properties:
        return "no property was analysed", "none", None
    top = max(properties, key=lambda row: row.value)
    where, p, test = "above the published mark 2.576", None, "a z-score's threshold on a mean: no p-value"
    if one.select("nr_precision", fold="mean")[0].note == "tested":
        where, p = "above chance", top.p_holm
        test = f"permutations, p_holm < 0.01 in every fold; largest p_holm {p_text(p)}"
    text = f"embeddings cluster most by {top.key}: NR-Prec {rounded(top.value)}{interval(top)}"
    if top.mark.startswith("0 "):
        text = f"embeddings cluster by no property; the largest NR-Prec is {rounded(top.value)} ({top.key})"
    what = "networks" if {*one.types.values()} == {"none"} else "losses"
    return f"{text}, {where} in {top.mark} {what}", f"{test}; [ ]: Student's 95 % interval over {what}", p


def type_finding(one):
    tests, types = one.select("nr_precision", "test"), one.cells("nr_precision", "type")
    if not tests:
        return "ranking and classification losses can't be compared, two of each are needed", "none", None
    first, differ = min(tests, key=lambda test: test.p_holm), sum(bool(test.mark) for test in tests)
    r, c = (types[kind, first.key] for kind in ("ranking", "classification"))
    text = (f"{r.n} ranking and {c.n} classification losses differ in {differ or 'none'} of {len(tests)} "
            "properties")
    if differ:
        text += (f", most clearly in {first.key}: NR-Prec {rounded(r.value)}{interval(r)} against "
                 f"{rounded(c.value)}{interval(c)}, above chance in {r.mark} and {c.mark} losses")
    test = (f"two-sided Mann-Whitney U on fold averages, {first.note}, Holm over {len(tests)} properties; "
            f"smallest p {p_text(first.p_holm)} ({first.key}); [ ]: Student's 95 % interval over losses")
    return text, test, first.p_holm


def pixel_finding(one):
    every = {measure: row for measure in PAIRS for row in one.select(measure, "all")}
    masks, parts = {row.key: row for row in one.select("masks", "all")}, []
    if "correlation" in every:
        r, noise = every["correlation"], "their noise ceiling is unknown"
        if {"ceiling", "corrected"} <= every.keys():
            share, ceiling = rounded(100 * every["corrected"].value, 0), rounded(every["ceiling"].value)
            noise = f"{share} % of what their noise allows ({ceiling})"
        parts.append(f"maps of two losses correlate at {rounded(r.value)}{interval(r)}, {noise}")
    if {"share", "other", "excess"} <= masks.keys():
        inside, other, more = (rounded(100 * masks[key].value, 1) for key in ("share", "other", "excess"))
        parts.append(f"{inside} % of the saliency lies in the object, {other} % in other pictures' objects: "
                     f"{more} points{interval(masks['excess'], 100, 1)} more")
        if (masks["excess"].low or 0) <= 0:
            parts[-1] += ", which may be chance"
    test = "[ ] of r: the pairs' range, through Fisher's z; of points: 95 % interval over pictures"
    return "; ".join(parts) or "no saliency maps were compared", test if parts else "none", None


# ---------------------------------------------------------------- writing

MARKDOWN = {**{letter: f"\\{letter}" for letter in "\\`*_[]#|~!$^"}, "&": "&amp;", "<": "&lt;", ">": "&gt;"}
LATEX = {**{letter: f"\\{letter}" for letter in "{}$&#%_"}, "\\": r"\textbackslash{}", "`": r"{\`{}}",
         "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
         "|": r"\textbar{}", '"': "{''}", "\0": "{}", "±": r"$\pm$", "−": "$-$", "–": "--", "—": "---",
         "×": r"$\times$", "·": r"$\cdot$", "°": r"$^\circ$", "≥": r"$\geq$", "≤": r"$\leq$",
         "→": r"$\rightarrow$", "…": r"\dots{}", "†": r"$\dagger$", "σ": r"$\sigma$", "“": "``", "”": "''",
         "’": "'"}


def one_line(text):
    """Control characters and line ends become spaces."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text))


def markdown(text):
    return "".join(MARKDOWN.get(letter, letter) for letter in one_line(text))


def latex(text):
    """Any text for pdflatex: accented Latin letters stay, what its fonts lack becomes [U+0416]."""
    text = re.sub(r"(?<=-)(?=-)|(?<=')(?=')", "\0", one_line(text))  # no ligatures: -- stays two hyphens
    text = "".join(LATEX.get(letter, letter) for letter in text)
    return re.sub(r"[^\0-\x7fÀ-ÏÑ-Ýß-ïñ-ýÿ]", lambda found: f"[U+{ord(found[0]):04X}]", text)


def number_columns(content):
    """Which columns hold numbers: those stand to the right."""
    columns = zip(content["header"], *content["rows"])
    return [any(one["value"] is not None for one in column) for _, *column in columns]


def csv_rows(content):
    """The table for its CSV: numbers with every digit, ± and marks in columns of their own."""
    columns, extra = [], {"low": "from", "high": "to", "spread": "±", "mark": "mark"}
    for title, *cells in zip(content["header"], *content["rows"]):
        columns.append([title or "name"])
        for one in cells:  # text, a count, or a number
            as_is = one["value"] is None or one["value"] % 1 == 0 and one["text"].isdecimal()
            columns[-1].append(one["text"] if as_is else one["value"])
        for key, end in extra.items():
            if any(one[key] not in (None, "") for one in cells):
                columns.append([f"{title} {end}", *(one[key] for one in cells)])
    return zip(*columns)


def to_markdown(content):
    paper = f" ({content['paper']})" if content["paper"] else ""
    rows = [list(map(markdown, content["header"]))]
    rows.append(["---:" if right else "---" for right in number_columns(content)])
    for row in content["rows"]:
        texts = [(markdown(one["text"]), one["bold"]) for one in row]
        rows.append([f"**{text}**" if bold and text else text for text, bold in texts])
    lines = [f"### {markdown(content['title'])}", "", markdown(content["caption"] + paper), ""]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", *(f"- {markdown(note)}" for note in content["notes"])]
    return "\n".join(lines).rstrip() + "\n"


def latex_template():
    """templates/table.tex, or None where it or jinja2 (which torch brings) is missing."""
    from dml_common import command

    try:
        import jinja2
        environment = jinja2.Environment(
            block_start_string="<%", block_end_string="%>", variable_start_string="<<",
            variable_end_string=">>", comment_start_string="<#", comment_end_string="#>", trim_blocks=True,
            lstrip_blocks=True)
        environment.filters["latex"] = latex
        return environment.from_string((HERE / "templates" / "table.tex").read_text(encoding="utf-8"))
    except (ImportError, OSError) as error:
        command.say(f"no .tex files ({error}): they need jinja2 and the folder templates/")


def show(content):
    """The table on the terminal, aligned; a wide matrix has numbers for its columns' names."""
    from dml_common.command import print_aligned

    first = int(content["header"][0] == "Paper")
    header = list(map(one_line, content["header"][first:]))
    rows = [[one_line(one["text"])[:60] for one in row[first:]] for row in content["rows"]]
    if content["kind"] == "matrix" and len(header) > 7:
        rows = [[f"{k:2} {row[0]}", *(text.replace(" ± ", "±") for text in row[1:])]
                for k, row in enumerate(rows, 1)]
        header = ["", *map(str, range(1, len(header)))]
    print(f"\n{one_line(content['title'])}" + (f" ({content['paper']})" if content["paper"] else ""))
    print_aligned([header, *rows])


def write(out, contents, parts, about):
    """All files of the folder `out`, each whole or not at all; tables.json last.

    parts: {title: lines} for tables.md; about: the rest of tables.json.
    """
    from dml_common import files

    def save(name, text):
        files.write_file(out / name, text.encode("utf-8", "replace"))

    template = latex_template()
    for content in contents:
        header, *rows = csv_rows(content)
        files.write_table(out / f"{content['name']}.csv", header, rows)
        if template:
            save(f"{content['name']}.tex", template.render(content, numbers=number_columns(content)))
    if template:
        save("tables.tex", template.render(names=[content["name"] for content in contents]))
    rows = [line.values() for line in about["missing"]]
    files.write_table(out / "missing.csv", ["dataset", "table", "what"], rows)
    lists = [f"## {title}\n\n" + "".join(f"- {markdown(line)}\n" for line in lines or ["Nothing."])
             for title, lines in parts.items()]
    save("tables.md", "\n".join(["# Tables\n", *lists, "## Tables\n", *map(to_markdown, contents)]))
    for one in (one for content in contents for row in content["rows"] for one in row):
        del one["spread"], one["mark"], one["low"], one["high"]
    text = json.dumps({"tables": contents, **about}, ensure_ascii=False, indent=1, allow_nan=False)
    save("tables.json", text + "\n")


# ---------------------------------------------------------------- the command


def parse(argv):
    from dml_common import command

    parser = command.parser(__doc__)
    add = parser.add_argument
    add("results", nargs="?", type=Path, metavar="RESULTS", help="results/, or one data set's folder in it")
    add("--out", type=Path, metavar="DIR", help="where the tables go (tables); --published: only if given")
    add("--published", action="store_true", help="print the papers' tables, ours and the differences")
    add("--models", type=Path, default=HERE / "models", metavar="DIR",
        help="has trained/<dataset>/<slug>/fold<k>/ (models/)")
    return parser.parse_args(argv)


def main(argv=None):
    from dml_common import folders, results

    args = parse(argv)
    if args.results is None and not args.published:
        raise ValueError("which results? Give results/ or one data set's folder in it; --published prints "
                         "the papers' tables")
    everything = results.read_all(args.results, args.models) if args.results else []
    everything.sort(key=lambda one: (-len(one.tables), -len(one.networks)))  # the fullest data set first
    tables_of = {one.name: dataset_tables(one, everything) for one in everything}
    if args.published:
        contents = papers(everything, tables_of)
    else:
        contents = [conclusions_table(everything), losses(everything),
                    *itertools.chain(*tables_of.values()), errata()]
        if not all(one.properties for one in everything):
            contents.insert(2, properties())
    contents = [content for content in contents if content["rows"]]
    names = [content["name"] for content in contents]
    if len(set(names)) < len(names):
        raise ValueError(f"two data sets' names give one file name ({max(names, key=names.count)}); rename "
                         "one's folder")
    out = args.out or Path("tables")
    if args.out or not args.published:
        inputs = [*filter(None, [args.results]), *(one.folder for one in everything)]
        folders.make_folder(out, "tables.json", inputs)
    for content in contents:
        if args.published or re.match(
                "conclusions|nrprec_tests|(correlation|corrected)_by_type|pairs_(?!tests)", content["name"]):
            show(content)
    if args.published and not args.out:
        return
    versions = {"python": platform.python_version(), "numpy": version("numpy"), "scipy": version("scipy")}
    options = {"results": str(args.results) if args.results else None, "published": args.published}
    about = {"findings": [finding for one in everything for finding in findings(one)],
             "warnings": [f"{one.name}: {line}" for one in everything for line in one.warnings],
             "missing": [line for one in everything for line in one.missing],
             "made_with": {"versions": versions, "options": options}}
    parts = {"What the numbers say": [finding["text"] for finding in about["findings"]],
             "What to beware of": about["warnings"],
             "What is missing": [f"{line['dataset']}: {line['what']}" for line in about["missing"]]}
    write(out, contents, parts, about)
    for title, lines in parts.items():
        print(f"\n{title}")
        for line in lines[:12]:
            print(textwrap.fill(one_line(line), 110, initial_indent="- ", subsequent_indent="  "))
        if len(lines) > 12:
            print(f"  … {len(lines) - 12} more in {out / 'tables.md'}")
    print(f"\n{len(contents)} tables: {out / 'tables.md'}, {out / 'tables.tex'}, {out / 'tables.json'}")


if __name__ == "__main__":
    command.run(main, stopped="stopped")
