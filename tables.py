"""The papers' tables from a folder of results, each as CSV, Markdown and LaTeX, with tests and what is missing.

Input:  results/ with data sets' folders in it, or one data set's folder, as the other scripts write them:
        <dataset>/{nrprec,compare,masks,embeddings,sanity,pairs}.csv and <dataset>/<slug>/fold<k>/*.json;
        training histories beside the checkpoints or in models/trained/<dataset>/<slug>/fold<k>/
Output: tables/NAME.{csv,md,tex}, one for each table; tables.tex (all of them, for pdflatex), tables.md (all of
        them, with the findings and what to beware of), tables.json (for report.py), missing.csv

    python tables.py results --out tables
    python tables.py --published                # the papers' own tables, from published/
    python tables.py results --published        # with ours beside them, and the differences

Every average is over folds first; correlations are averaged through Fisher's z. Ranking and classification
losses are compared with a Mann-Whitney U test whose unit is the loss, Holm-corrected over the properties at 5 %;
the way of the first paper's code (all folds pooled, 1 %) stands beside it under its own name.
"""
if __name__ == "__main__":  # from here on Ctrl-C ends in one line
    import sys
    try:
        from dml_common import command
    except ModuleNotFoundError:
        print("tables.py: the command needs the folder dml_common/ beside it; copy that too", file=sys.stderr)
        sys.exit(2)
    command.begin()

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
    "nr_precision": ("NR-Prec", "Normalized R-Precision of each property, mean over folds: how far embeddings "
                     "cluster by it, 0 for chance", 1, 2),
    "masks": ("Saliency inside the object", "How much of the saliency lies inside the object's mask, per cent, "
              "mean over folds", 100, 1),
    "sanity": ("Sanity check", "Correlation of the maps with the trained network's, per cent, as ever more "
               "layers are re-initialised from the top; 0 layers: the noise ceiling", 100, 0),
    "pairs": ("Pairs and rankings", "Scores of the second paper, mean over folds", 1, 3),
    "correlation": ("Correlation of saliency maps", "Pearson correlation of two networks' saliency maps of one "
                    "picture, per cent, ± standard deviation over pictures; averages through Fisher's z", 100, 0),
    "jsd": ("JSD of saliency maps", "Jensen-Shannon divergence (base 2) of two networks' saliency maps of one "
            "picture, ± standard deviation over pictures, both × 100; 0 for identical maps", 100, 1),
    "ceiling": ("Noise ceiling of the correlation", "The most that two networks' maps can correlate, from two "
                "maps of each network that differ in their noise alone, per cent", 100, 0),
    "corrected": ("Correlation corrected for noise", "Correlation divided by its noise ceiling, per cent", 100, 0),
    "cka": ("Linear CKA of embeddings", "Linear centred kernel alignment of two networks' embeddings; 1 for "
            "embeddings that differ by rotation and scale", 1, 2),
    "overlap": ("Common nearest neighbours", "Share of a picture's 10 nearest neighbours that two networks have "
                "in common, per cent", 100, 0)}
PAIRS = ("correlation", "jsd", "ceiling", "corrected", "cka", "overlap")
WITH_SPREAD = ("correlation", "jsd", "sanity")
TITLES = {  # of columns, in their order
    "masks": {"share": "In the object", "area": "Object's area", "other": "In other masks", "excess": "Excess",
              "pointing": "Maximum in object", "pointing_other": "Maximum in other masks"},
    "pairs": {"recall_at_1": "Recall@1", "map_at_r": "MAP@R", "jsd": "JSD", "jsd_null": "JSD, labels permuted",
              "r_precision": "R-Precision", "positive_mean": "Positive mean", "negative_mean": "Negative mean"}}
BOLD = "Bold mean: the larger of the two types by the exact test; †: by the released way (all folds pooled)."
NOTES = {"masks": ["In other masks: the same maps under the other pictures' masks, the chance level of a map that "
                   "knows only where objects usually are. Excess: the difference, in points."],
         "pairs": [BOLD, "JSD of few pairs is biased up: labels permuted shows by how much."],
         "distance": ["Networks without a loss are left out."]}
PAPER = {"losses": "Table 1", "correlation_sop": "Table 2", "jsd_sop": "Table 2", "nrprec": "Table 6",
         "correlation_by_type_cars196": "Table 3", "correlation_by_type_cub200": "Table 4",
         "properties": "Table 5", "correlation_cars196": "Appendix A", "correlation_cub200": "Appendix A",
         "jsd_cars196": "Appendix A", "jsd_cub200": "Appendix A", "pairs": "Oi et al., Table 1",
         "training": "Oi et al., Table 1", "nrprec_tests": "Table 6", "properties_published": "Table 5"}

# ---------------------------------------------------------------- cells and tables


def cell(text, value=None, **more):
    """One cell. Its spread (±) and mark are columns of their own in the CSV; the text has them already."""
    return {"text": str(text), "value": None if value is None else float(value), "shade": None, "bold": False,
            "hint": None, "spread": None, "mark": "", **more}


def table(name, title, caption, header, rows, dataset=None, kind="rows", notes=()):
    """A table as tables.json has it (the cells' spread and mark are for the CSV alone)."""
    full, title = (f"{name}_{dataset}", f"{title}, {dataset}") if dataset else (name, title)
    rows = [[one if isinstance(one, dict) else cell(one) for one in row] for row in rows]
    return {"name": re.sub(r"[^A-Za-z0-9_-]+", "_", full).strip("_"), "title": title, "caption": f"{caption}.",
            "dataset": dataset, "paper": PAPER.get(full) or PAPER.get(name), "kind": kind,
            "header": list(header), "rows": rows, "notes": list(notes)}


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
    spread = row.spread if row.measure in (*WITH_SPREAD, "nr_precision", "pairs") else None
    if row.measure in WITH_SPREAD and spread is not None:
        text += f" ± {rounded(factor * spread, digits)}"
    what = "folds" if row.level == "network" else "pairs" if row.other else "losses"
    hint = f"{row.n} {what}{interval(row, factor, digits + 1)}" if row.n else None
    if hint and row.p_holm is not None:
        hint += f", largest p_holm {p_text(row.p_holm)}"
    more = {"mark": row.mark, "spread": spread, "hint": hint, **more}
    return cell(f"{text} {more['mark']}".rstrip(), row.value, **more)


def shade(rows, scale=float, diagonal=True):
    """Shade the cells of these rows by value: 0 for the smallest, 1 for the largest."""
    cells = [one for i, row in enumerate(rows) for j, one in enumerate(row[1:])
             if one["value"] is not None and (diagonal or i != j)]
    values = [scale(one["value"]) for one in cells]
    for one, value in zip(cells, values):
        one["shade"] = (value - min(values)) / ((max(values) - min(values)) or 1)


def log_above_0(value):
    return math.log1p(max(value, 0))


# ---------------------------------------------------------------- tables of one data set's Results


def grid(one, measure):
    """A measure's table: a row a network, a column a key, and the means of the types."""
    title, caption, factor, digits = MEASURES[measure]
    cells, keys, name, first = one.cells(measure), one.keys(measure), measure, "Loss"
    titles = TITLES.get(measure) or dict(zip(keys, keys))
    titles = {key: text for key, text in titles.items() if key in keys}
    rows = [[name, *(fact(cells.get((name, key)), factor, digits) for key in titles)]
            for name in one.names(measure)]
    notes = NOTES.get(measure, ())
    if measure == "nr_precision":
        name, notes = "nrprec", nrprec_notes(one) if one.tables else ()
        shade(rows, log_above_0)
    elif measure == "sanity":
        first = "Layers"
        shade(rows)
    elif measure == "pairs" and rows:
        caption += f": label {one.tables['pairs'][0]['label']}, {next(iter(cells.values())).note}"
    if measure in ("nr_precision", "pairs"):
        rows += type_rows(one, measure, titles, factor, digits)
    return table(name, title, caption, [first, *titles.values()], rows, one.name, notes=notes)


def type_rows(one, measure, keys, factor, digits):
    """The means of ranking and of classification losses, bold and † where a test says which is larger."""
    means = one.cells(measure, "type")
    tests, released = ({row.key: row.mark for row in one.select(measure, level)} for level in ("test", "released"))
    for kind in ("ranking", "classification"):
        if any((kind, key) in means for key in keys):
            yield [cell(f"{kind.capitalize()} mean", bold=True)] + [
                fact(means.get((kind, key)), factor, digits, bold=tests.get(key) == kind,
                     mark="†" if released.get(key) == kind else "") for key in keys]


def nrprec_notes(one):
    first, mean = one.tables["nrprec"][0], one.select("nr_precision", fold="mean")[0]
    neighbours = f"at most {first['max_neighbours']:.0f}" if first.get("max_neighbours") else "all R"
    mark = ("* NR-Prec > 2.576: the published mark, one z-score's 1 % threshold applied to a mean of many. nrprec.py "
            "--permutations N tests the mean.")
    if mean.note == "tested":
        mark = (f"* above chance: p_holm < 0.01 in every fold, {first['permutations'] or 0:,.0f} permutations of each "
                "property, Holm-corrected over the properties.")
    return [mark, BOLD, f"Null {first.get('null') or 'not stated'}, distance {first.get('distance') or 'not stated'}, "
            f"{neighbours} neighbours."]


def matrix(one, measure, level="network"):
    """A measure of pairs: a row and a column a network, a type or a distance."""
    title, caption, factor, digits = MEASURES[measure]
    cells = one.cells(measure, level)
    groups = {"network": one.types, "type": dict.fromkeys(one.types.values()), "distance": DISTANCES}[level]
    groups = [group for group in groups if any(group in pair for pair in cells)]
    rows = [[fact(cells.get((a, b)) or cells.get((b, a)), factor, digits) for b in groups] for a in groups]
    titles = [group.replace("_", " ") if level == "distance" else group for group in groups]
    rows = [[text, *row] for text, row in zip(titles, rows)]
    shade(rows, diagonal=level != "network")
    name, notes = measure, NOTES.get(level, ())
    if level != "network":
        name, title = f"{name}_by_{level}", f"{title} by {level}"
        caption += ". Each cell is the mean over the pairs of two different losses"
    elif any(a == b for a, b in cells):
        notes = ["Diagonal: different folds of one loss."]
    return table(name, title, caption, ["", *titles], rows, one.name, "matrix", notes)


def type_tests(one, measure, what):
    """Ranking against classification, key by key: the exact test, and the released way beside it."""
    title, _, factor, digits = MEASURES[measure]
    tests, types, rows = one.select(measure, "test"), one.cells(measure, "type"), []
    for test, released in zip(tests, one.select(measure, "released")):
        r, c = (types[kind, test.key]._replace(spread=None, mark="") for kind in ("ranking", "classification"))
        rows.append([
            TITLES.get(measure, {}).get(test.key, test.key),
            fact(r, factor, digits, bold=test.mark == "ranking"),
            fact(c, factor, digits, bold=test.mark == "classification"),
            cell(rounded(released.value, digits, "+"), released.value),
            cell(rounded(test.value, 2, "+"), test.value, hint=f"{r.n} against {c.n} losses"),
            cell(p_text(test.p), test.p), cell(p_text(test.p_holm), test.p_holm), test.mark,
            cell(p_text(released.p), released.p, hint=released.note), released.mark])
    least = min([len(tests) * test.low for test in tests], default=1)
    notes = [f"p: two-sided Mann-Whitney U on fold averages, {tests[0].note if tests else ''}; the unit is the loss. "
             f"Holm over the {len(tests)} rows, 5 %; with {tests[0].n if tests else 0} losses it cannot fall below "
             f"{p_text(min(1, least))}.",
             "Effect: rank-biserial correlation, 1 when every ranking loss lies above every classification loss, −1 "
             "the reverse.",
             "Released p: the way of the first paper's code, all folds pooled as if independent, not corrected, 1 %; "
             "its SciPy's default was half the two-sided p-value of the normal approximation."]
    header = [what, "Ranking", "Classification", "Difference", "Effect", "p", "p, Holm", "Larger", "Released p",
              "Released: larger"]
    return table({"nr_precision": "nrprec_tests"}.get(measure, f"{measure}_tests"),
                 f"Ranking against classification: {title}", "Means over losses. An empty cell under “larger”: no "
                 "difference could be shown", header, rows, one.name, notes=notes)


def other_tests(one):
    """What else was tested, and the means over all pairs of two losses."""
    rows = []
    for measure, what, test in (
            ("order", "Order of the properties against Table 6: Spearman's rank correlation", "{n} properties"),
            ("same type", "r of two maps of one type less that of two types", "{note}; types of {n} losses permuted"),
            ("same distance", "r of two maps of one distance less that of two", "{note}; those of {n} losses permuted")):
        rows += [[what, cell(rounded(row.value, 3, "+"), row.value), test.format(n=row.n, note=row.note),
                  cell(p_text(row.p), row.p)] for row in one.select(measure, "test")]
    for measure in PAIRS:
        rows += [[f"{MEASURES[measure][0]}: mean over all pairs", cell(rounded(row.value, 3), row.value),
                  f"{interval(row, 1, 3).strip()} over {row.n} pairs", ""] for row in one.select(measure, "all")]
    return table("tests", "Other tests and means", "Tests are two-sided, of 9,999 permutations",
                 ["What", "Number", "Test or range", "p"], rows, one.name)


def training(one):
    """The second paper's Table 1 from the training histories: test split, before and after."""
    before, after = ({(row.network, row.split, row.key): row for row in one.select(
        "training", fold="mean", part="test", epoch=epoch)} for epoch in (0, "best"))
    titles = {key: text for key, text in TITLES["pairs"].items() if any(key in place for place in after)}
    rows, order = [], list(one.types)
    for name, split in sorted({place[:2] for place in after}, key=lambda place: (order.index(place[0]), place[1] or "")):
        pairs = [[ends.get((name, split, key)) for ends in (before, after)] for key in titles]
        n = next(last.n for _, last in pairs if last)
        rows.append([name, split or "", cell(n or "", n), *(
            cell(" → ".join(rounded(row.value, 3) for row in pair if row), pair[1] and pair[1].value) for pair in pairs)])
    return table("training", "Test split before and after training", "Scores of the test split, untrained → trained, "
                 "mean over folds", ["Loss", "Splitting", "Folds", *titles.values()], rows, one.name)


def dataset_tables(one):
    """All tables of one data set's results that there are numbers for."""
    tables = [grid(one, "nr_precision"), type_tests(one, "nr_precision", "Property")]
    for measure in PAIRS:
        tables += [matrix(one, measure), matrix(one, measure, "type")]
        by_distance = matrix(one, measure, "distance")
        if measure in ("correlation", "jsd", "corrected") and len(by_distance["rows"]) > 1:
            tables.append(by_distance)
    tables += [grid(one, "masks"), grid(one, "sanity"), grid(one, "pairs"), type_tests(one, "pairs", "Score"),
               training(one), other_tests(one)]
    return [content for content in tables if content["rows"]]


# ---------------------------------------------------------------- tables of all data sets, and the papers'


def losses(everything):
    """Table 1: the losses, with the number of folds that each data set has results of."""
    from dml_common import files

    known, rows = {row["name"]: row for row in files.losses()}, []
    for one in everything:
        known = {name: {"type": kind, "distance": one.distances[name], "year": ""}
                 for name, kind in one.types.items()} | known
    order = [row["name"] for row in files.losses()]
    for name, row in sorted(known.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)):
        distance = "" if name == "None" else (row["distance"] or "").replace("_", " ")
        rows.append([name, cell(row["year"], row["year"] or None), row["type"], distance])
        for one in everything:
            folds = {row.fold for row in one.select("nr_precision", network=name)} - {"mean"}
            folds |= {network["fold"] for network in one.networks
                      if network["name"] == name and (network["emb"] or network["maps"])}
            rows[-1].append(cell(len(folds) or "", len(folds) or None))
    return table("losses", "Losses", "The losses, their types and distances; the networks (folds) of each with results",
                 ["Loss", "Year", "Type", "Distance", *(f"Networks, {one.name}" for one in everything)], rows,
                 notes=["None: ImageNet weights and an untrained last layer."])


def properties(one=None):
    """Table 5 of the results' props.csv; without one, the paper's."""
    from dml_common import files, pictures

    header, rows = ["Property", "Number", "Values"], []
    for name, values in (one.properties if one else {}).items():
        numbers = all(map(files.is_number, values))
        values = sorted(values, key=float if numbers else pictures.natural_key)
        most = 2 if numbers else 8
        words = values if len(values) <= max(4, most) else [*values[:most], "…", *(values[-1:] if numbers else ())]
        rows.append([name, cell(len(values), len(values)), ", ".join(words)])
    if rows:
        return table("properties", "Properties", "The pictures' properties and their values", header, rows, one.name)
    columns = files.read_table(HERE / "published" / "kobs_table5_properties.csv")
    rows = [[name, cell(number, number), values] for name, number, values in zip(*columns.values())]
    return table("properties_published", "Properties (published)", "The properties of the first paper's rendered cars",
                 header, rows, notes=["No props.csv in the results: the paper's own."])


def errata():
    from dml_common import files

    columns = files.read_table(HERE / "published" / "errata.csv")
    return table("errata", "Errata", "Where the published descriptions, code and numbers disagree, and what is done "
                 "here", ["Paper", "Published", "Found", "Here"], zip(*columns.values()))


def papers(everything, tables_of):
    """The papers' tables, with ours and the differences after each data set's."""
    from dml_common import results

    note = ["NR-Prec grows with the number of pictures, and with another null: the order of properties compares, the "
            "size does not. ProxyNCA's last cell is missing in our source."]
    tables = [losses([]), properties()]
    for theirs in results.published():
        parts = [("published", "published", content) for content in dataset_tables(theirs)]
        for ours in everything:
            differences = dataset_tables(results.difference(ours, theirs))
            names = [content["name"] for content in differences]
            parts += [("ours", "ours", content) for content in tables_of[ours.name] if content["name"] in names]
            parts += [("difference", "ours − published", content) for content in differences]
        tables += [{**content, "name": f"{kind}_{content['name']}", "title": f"{content['title']}: {what}",
                    "notes": note if content["paper"] == "Table 6" else []} for kind, what, content in parts]
    return tables


# ---------------------------------------------------------------- findings


def findings(one):
    """What the numbers of a data set say: a number, its interval, its p, three times; or that nothing was found."""
    every = {measure: next(iter(one.select(measure, "all")), None) for measure in ("correlation", "ceiling", "corrected")}
    masks = {row.key: row for row in one.select("masks", "all")}
    for topic, (text, test, p) in (
            ("property level", property_finding(one.select("nr_precision", "all"), one.select("nr_precision", fold="mean"))),
            ("ranking against classification", type_finding(one.select("nr_precision", "test"),
                                                            one.cells("nr_precision", "type"))),
            ("pixel level", pixel_finding(masks=masks, **every))):
        yield {"dataset": one.name, "topic": topic, "text": f"{one.name}: {text}.", "test": test, "p_value": p}


def property_finding(properties, networks):
    if not properties:
        return "no property was analysed", "none", None
    top = max(properties, key=lambda row: row.value)
    tested = networks[0].note == "tested"
    where = "above chance" if tested else "above the published mark 2.576"
    number = rounded(top.value) + interval(top)
    text = f"embeddings cluster most by {top.key}: NR-Prec {number}, {where} in {top.mark} losses"
    if top.mark.startswith("0 "):
        text = f"embeddings cluster by no property: the largest NR-Prec is {number} ({top.key}), {where} in {top.mark} losses"
    test = "a z-score's threshold applied to a mean: no p-value"
    if tested:
        test = f"permutations of each property, p_holm < 0.01 in every fold; the largest of {top.key}: {p_text(top.p_holm)}"
    return text, f"{test}; [ ]: Student's 95 % interval over losses", top.p_holm if tested else None


def type_finding(tests, types):
    if not tests:
        return "ranking and classification losses can't be compared: two of each are needed", "none", None
    first, differ = min(tests, key=lambda test: test.p_holm), sum(bool(test.mark) for test in tests)
    r, c = (types[kind, first.key] for kind in ("ranking", "classification"))
    text = f"no difference between {r.n} ranking and {c.n} classification losses was found in {len(tests)} properties"
    if differ:
        text = (f"{r.n} ranking and {c.n} classification losses differ in {differ} of {len(tests)} properties, most "
                f"clearly in {first.key}: NR-Prec {rounded(r.value)}{interval(r)} against {rounded(c.value)}"
                f"{interval(c)}, above chance in {r.mark} and {c.mark} losses")
    return text, (f"two-sided Mann-Whitney U on fold averages, {first.note}, Holm over {len(tests)} properties; smallest p "
                  f"{p_text(first.p_holm)} ({first.key}); [ ]: Student's 95 % interval over losses"), first.p_holm


def pixel_finding(correlation, ceiling, corrected, masks):
    parts = []
    if correlation:
        noise = "their noise ceiling is unknown"
        if ceiling and corrected:
            noise = f"{rounded(100 * corrected.value, 0)} % of what their noise allows ({rounded(ceiling.value)})"
        parts.append(f"maps of two losses correlate at {rounded(correlation.value)}{interval(correlation)}, {noise}")
    if {"share", "other", "excess"} <= masks.keys():
        excess, (inside, other) = masks["excess"], (rounded(100 * masks[key].value, 1) for key in ("share", "other"))
        parts.append(f"{inside} % of the saliency lies in the object, {other} % in other pictures' objects: "
                     f"{rounded(100 * excess.value, 1)} points{interval(excess, 100, 1)} more")
        if excess.low is None or excess.low <= 0:
            parts[-1] += ", which may be chance"
    if not parts:
        return "no saliency maps were compared", "none", None
    return "; ".join(parts), ("[ ] of r: the range over pairs, averaged through Fisher's z; of points: 95 % interval over "
                              "pictures"), None


# ---------------------------------------------------------------- writing

MARKDOWN = {**{letter: f"\\{letter}" for letter in "\\`*_[]#|~!$^"}, "&": "&amp;", "<": "&lt;", ">": "&gt;"}
LATEX = {**{letter: f"\\{letter}" for letter in "{}$&#%_"}, "\\": r"\textbackslash{}", "~": r"\textasciitilde{}",
         "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "{''}",
         "`": r"{\`{}}", "\0": "{}", "±": r"$\pm$", "−": "$-$", "–": "--", "—": "---", "×": r"$\times$",
         "·": r"$\cdot$", "°": r"$^\circ$", "≥": r"$\geq$", "≤": r"$\leq$", "→": r"$\rightarrow$",
         "…": r"\dots{}", "†": r"$\dagger$", "σ": r"$\sigma$", "“": "``", "”": "''", "’": "'"}


def one_line(text):
    """Control characters and line ends become spaces."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text))


def markdown(text):
    return "".join(MARKDOWN.get(letter, letter) for letter in one_line(text))


def latex(text):
    """Any text for pdflatex: accented Latin letters stay, what its fonts lack becomes [U+0416]."""
    def known(letter):
        if letter in LATEX:
            return LATEX[letter]
        return letter if letter.isascii() or ("À" <= letter <= "ÿ" and letter not in "ÐÞðþ") else f"[U+{ord(letter):04X}]"

    return "".join(map(known, re.sub(r"(?<=-)(?=-)|(?<=')(?=')", "\0", one_line(text))))  # no ligatures: -- stays two


def number_columns(content):
    """Which columns hold numbers: those stand to the right."""
    return [any(row[k]["value"] is not None for row in content["rows"]) for k in range(len(content["header"]))]


def csv_rows(content):
    """The table for its CSV: the numbers with every digit, ± and marks in columns of their own."""
    columns = []
    for k, title in enumerate(content["header"]):
        cells = [row[k] for row in content["rows"]]
        columns.append([title or "name"])
        for one in cells:
            whole = one["value"] is None or one["text"] == f"{one['value']:.0f}" and one["value"].is_integer()
            columns[-1].append(one["text"] if whole else one["value"])
        for key, end in ("spread", "±"), ("mark", "mark"):
            if any(one[key] not in (None, "") for one in cells):
                columns.append([f"{title} {end}", *(one[key] for one in cells)])
    return zip(*columns)


def to_markdown(content):
    paper = f" ({content['paper']})" if content["paper"] else ""
    rows = [[f"**{markdown(one['text'])}**" if one["bold"] and one["text"] else markdown(one["text"]) for one in row]
            for row in content["rows"]]
    rules = ["---:" if right else "---" for right in number_columns(content)]
    lines = [f"| {' | '.join(row)} |" for row in [list(map(markdown, content["header"])), *rows]]
    lines.insert(1, f"|{'|'.join(rules)}|")
    lines += ["", *(f"- {markdown(note)}" for note in content["notes"])]
    return "\n".join([f"### {markdown(content['title'])}", "", markdown(content["caption"] + paper), "", *lines]).rstrip() + "\n"


def latex_template():
    """templates/table.tex, or None where jinja2 (which torch brings) or the template is missing."""
    try:
        import jinja2
        marks = {"block_start_string": "<%", "block_end_string": "%>", "variable_start_string": "<<",
                 "variable_end_string": ">>", "comment_start_string": "<#", "comment_end_string": "#>"}
        environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, **marks)
        environment.filters["latex"] = latex
        return environment.from_string((HERE / "templates" / "table.tex").read_text(encoding="utf-8"))
    except (ImportError, OSError) as error:
        print(f"tables.py: no LaTeX: {error} (pip install jinja2; templates/table.tex)", file=sys.stderr)


def show(content):
    """The table on the terminal, aligned; a wide matrix has numbers for its columns' names."""
    header, right = content["header"], number_columns(content)
    rows = [[one_line(one["text"]) for one in row] for row in content["rows"]]
    if content["kind"] == "matrix" and len(header) > 7:
        rows = [[f"{k:2} {row[0]}", *(text.replace(" ± ", "±") for text in row[1:])] for k, row in enumerate(rows, 1)]
        header = ["", *map(str, range(1, len(header)))]
    widths = [min(60, max(map(len, column))) for column in zip(header, *rows)]
    print(f"\n{one_line(content['title'])}" + (f" ({content['paper']})" if content["paper"] else ""))
    for row in [header, *rows]:
        texts = [text[:width].rjust(width) if number else text[:width].ljust(width)
                 for text, width, number in zip(row, widths, right)]
        print("  ".join(texts).rstrip())


def write(out, contents, parts, about):
    """All files of the folder `out`, each whole or not at all; tables.json last. parts: the findings, warnings and what
    is missing; about: the rest of tables.json."""
    from dml_common import files

    def save(name, text):
        files.write_file(out / name, text.encode("utf-8", "replace"))

    template = latex_template()
    for content in contents:
        header, *rows = csv_rows(content)
        files.write_table(out / f"{content['name']}.csv", header, rows)
        save(f"{content['name']}.md", to_markdown(content))
        if template:
            save(f"{content['name']}.tex", template.render(content, numbers=number_columns(content)))
    if template:
        save("tables.tex", template.render(names=[content["name"] for content in contents]))
    files.write_table(out / "missing.csv", ["dataset", "table", "what"], [line.values() for line in about["missing"]])
    lists = ["\n".join([f"## {title}", "", *(f"- {markdown(line)}" for line in lines or ["Nothing."]), ""])
             for title, lines in parts.items()]
    save("tables.md", "\n".join(["# Tables", "", *lists, "## Tables", "", *map(to_markdown, contents)]))
    for content in contents:
        content["rows"] = [[{key: one[key] for key in ("text", "value", "shade", "bold", "hint")} for one in row]
                           for row in content["rows"]]
    save("tables.json", json.dumps({"tables": contents, **about}, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


# ---------------------------------------------------------------- the command


def parse(argv):
    from dml_common import command

    parser = command.parser(__doc__)
    add = parser.add_argument
    add("results", nargs="?", type=Path, metavar="RESULTS", help="results/ with data sets' folders in it, or one of them")
    add("--out", type=Path, metavar="DIR", help="where the tables go (tables); with --published only if given")
    add("--published", action="store_true", help="print the papers' tables; with RESULTS ours and the differences")
    add("--models", type=Path, default=HERE / "models", metavar="DIR",
        help="has trained/<dataset>/<slug>/fold<k>/ (models/)")
    return parser.parse_args(argv)


def check_folder(out, folders):
    """Make the folder of the tables; raises ValueError when it is one of the results' or can't be written."""
    from dml_common import files

    if out.resolve() in [folder.resolve() for folder in folders]:
        raise ValueError(f"--out {out} is a folder of results; writing there could destroy them: choose another")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    out.mkdir(parents=True, exist_ok=True)
    files.check_output(out / "tables.json")


def main(argv=None):
    from dml_common import results

    args = parse(argv)
    if args.results is None and not args.published:
        raise ValueError("which results? Give results/ or one data set's folder in it; --published prints the papers' "
                         "tables")
    everything = results.read_all(args.results, args.models) if args.results else []
    everything.sort(key=lambda one: (-len(one.tables), -len(one.networks)))  # the findings of the fullest stand first
    tables_of = {one.name: [properties(one), *dataset_tables(one)] for one in everything}
    contents = [losses(everything), *(content for tables in tables_of.values() for content in tables), errata()]
    if args.published:
        contents = papers(everything, tables_of)
    for content in contents:
        if args.published or re.match(r"(nrprec_tests|correlation_by_type|corrected_by_type|pairs(?!_tests))_",
                                      content["name"]):
            show(content)
    if args.published and not args.out:
        return
    names = [content["name"] for content in contents]
    if len(set(names)) < len(names):
        raise ValueError(f"two data sets' names give one file name ({max(names, key=names.count)}); rename one's folder")
    out = args.out or Path("tables")
    check_folder(out, [*filter(None, [args.results]), *(one.folder for one in everything)])
    versions = {"python": platform.python_version(), "numpy": version("numpy"), "scipy": version("scipy")}
    options = {"results": str(args.results) if args.results else None, "published": args.published}
    about = {"findings": [finding for one in everything for finding in findings(one)],
             "warnings": [f"{one.name}: {line}" for one in everything for line in one.warnings],
             "missing": [line for one in everything for line in one.missing],
             "made_with": {"versions": versions, "options": options}}
    parts = {"What the numbers say": [one["text"] for one in about["findings"]], "What to beware of": about["warnings"],
             "What is missing": [f"{line['dataset']}: {line['what']}" for line in about["missing"]]}
    write(out, contents, parts, about)
    for title, lines in parts.items():
        print(f"\n{title}")
        for line in lines[:12]:
            print(textwrap.fill(one_line(line), 110, initial_indent="- ", subsequent_indent="  "))
    print(f"\n{len(contents)} tables: {out / 'tables.md'}, {out / 'tables.tex'} (pdflatex), {out / 'tables.json'}")


if __name__ == "__main__":
    command.run(main)
