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
# Measures of a network, by keys, and of two networks: title, caption, times what, decimals.
MEASURES = {
    "nr_precision": ("NR-Prec", "Normalized R-Precision of each property, mean over folds: how far embeddings "
                     "cluster by it, 0 for chance", 1, 2),
    "masks": ("Saliency inside the object", "How much of the saliency lies inside the object's mask, per cent, "
              "mean over folds", 100, 1),
    "sanity": ("Sanity check", "Correlation of the maps with the trained network's, per cent, as ever more layers "
               "are re-initialised from the top; 0 layers: the noise ceiling", 100, 0),
    "pairs": ("Pairs and rankings", "Scores of the second paper, mean over folds", 1, 3),
    "correlation": ("Correlation of saliency maps", "Pearson correlation of two networks' saliency maps of one "
                    "picture, per cent, ± standard deviation over pictures; averages through Fisher's z", 100, 0),
    "jsd": ("JSD of saliency maps", "Jensen-Shannon divergence (base 2) of two networks' saliency maps of one "
            "picture, ± standard deviation over pictures, both × 100; 0 for identical maps", 100, 1),
    "ceiling": ("Noise ceiling of the correlation", "The most that two networks' maps can correlate, from two maps "
                "of each network that differ in their noise alone, per cent", 100, 0),
    "corrected": ("Correlation corrected for noise", "Correlation divided by its noise ceiling, per cent", 100, 0),
    "cka": ("Linear CKA of embeddings", "Linear centred kernel alignment of two networks' embeddings; 1 for "
            "embeddings that differ by rotation and scale", 1, 2),
    "overlap": ("Common nearest neighbours", "Share of a picture's 10 nearest neighbours that two networks have "
                "in common, per cent", 100, 0)}
TITLES = {  # of the columns, in their order
    "masks": {"share": "In the object", "area": "Object's area", "other": "In other masks", "excess": "Excess",
              "pointing": "Maximum in object", "pointing_other": "Maximum in other masks"},
    "pairs": {"recall_at_1": "Recall@1", "map_at_r": "MAP@R", "jsd": "JSD", "jsd_null": "JSD, labels permuted",
              "r_precision": "R-Precision", "positive_mean": "Positive mean", "negative_mean": "Negative mean"}}
BOLD = "Bold mean: the larger of the two types by the exact test; †: by the released way (all folds pooled)."
NOTES = {"masks": ["In other masks: the same maps under the other pictures' masks, the chance level of a map that "
                   "knows only where objects usually are. Excess: the difference, in points."],
         "pairs": [BOLD, "JSD of few pairs is biased up: labels permuted shows by how much."]}
PAPER = {"losses": "Table 1", "correlation_sop": "Table 2", "jsd_sop": "Table 2", "nrprec": "Table 6",
         "correlation_by_type_cars196": "Table 3", "correlation_by_type_cub200": "Table 4", "properties": "Table 5",
         "correlation_cars196": "Appendix A", "correlation_cub200": "Appendix A", "jsd_cars196": "Appendix A",
         "jsd_cub200": "Appendix A", "pairs": "Oi et al., Table 1", "training": "Oi et al., Table 1"}
SPREAD = ("correlation", "jsd", "sanity")  # with ± in the text

# ---------------------------------------------------------------- cells and tables


def cell(text, value=None, *, bold=False, hint=None, spread=None, mark=""):
    """One cell. spread (±) and mark are columns of their own in the CSV; the text has them already."""
    return {"text": str(text), "value": None if value is None else float(value), "shade": None, "bold": bold,
            "hint": hint, "spread": spread, "mark": mark}


def table(name, title, caption, header, rows, dataset=None, kind="rows", notes=()):
    """A table as tables.json has it (the cells' spread and mark are for the CSV alone)."""
    full, title = (f"{name}_{dataset}", f"{title}, {dataset}") if dataset else (name, title)
    return {"name": re.sub(r"[^A-Za-z0-9_-]+", "_", full).strip("_"), "title": title, "caption": f"{caption}.",
            "dataset": dataset, "paper": PAPER.get(full) or PAPER.get(name), "kind": kind, "header": list(header),
            "rows": [[one if isinstance(one, dict) else cell(one) for one in row] for row in rows],
            "notes": list(notes)}


def rounded(value, digits=2, plus=""):
    """1.25 -> "1.25"; a half away from zero (62.5 -> "63"), a minus that can be read, never −0. plus: before what is
    above 0."""
    whole = math.floor(abs(value) * 10**digits + 0.5 + 1e-9) / 10**digits
    sign = ("−" if value < 0 else plus) if whole else ""
    return f"{sign}{whole:.{digits}f}"


def p_text(p):
    if p is None or p < 1e-4:
        return "" if p is None else "< 0.0001"
    return f"{p:.{4 if p < 0.01 else 3 if p < 0.1 else 2}f}"


def interval(row, factor=1, digits=2):
    """"[4.99, 6.76]", or "" where a row has no interval."""
    return "" if row.low is None else f"[{rounded(factor * row.low, digits)}, {rounded(factor * row.high, digits)}]"


def fact(row, factor=1, digits=2, bold=False, mark=None):
    """A row of the tidy table (or None) as a cell."""
    if row is None:
        return cell("")
    mark, spread = row.mark if mark is None else mark, None
    text = rounded(factor * row.value, digits, "+" if row.note == "difference" else "")
    if row.measure in (*SPREAD, "nr_precision", "pairs"):
        spread = row.spread
    if row.measure in SPREAD and spread is not None:
        text += f" ± {rounded(factor * spread, digits)}"
    what = {"network": "folds"}.get(row.level, "pairs of losses" if row.other else "losses")
    holm = "" if row.p_holm is None else f"largest p_holm {p_text(row.p_holm)}"
    hint = ", ".join(filter(None, [f"{row.n} {what}" if row.n else "", interval(row, factor, digits + 1), holm]))
    return cell(f"{text} {mark}".rstrip(), row.value, bold=bold, hint=hint or None, spread=spread, mark=mark)


def shade(rows, scale=float, diagonal=True):
    """Shade the cells of these rows by value: 0 for the smallest, 1 for the largest."""
    cells = [one for i, row in enumerate(rows) for j, one in enumerate(row[1:])
             if one["value"] is not None and (diagonal or i != j)]
    values = [scale(one["value"]) for one in cells]
    for one, value in zip(cells, values):
        one["shade"] = (value - min(values)) / ((max(values) - min(values)) or 1)


# ---------------------------------------------------------------- tables of one data set's Results


def lay(one, measure, level="network"):
    """A measure's table in a list, [] without values: a row a network (type, distance), a column a key, of pairs
    another network."""
    title, caption, factor, digits = MEASURES[measure]
    cells = one.cells(measure, level)
    pairs = any(row.other for row in cells.values())
    groups = {"network": one.names(measure), "type": dict.fromkeys(one.types.values()), "distance": DISTANCES}[level]
    groups = [group for group in groups if any(group in place for place in cells)]
    keys = {group: group.replace("_", " ") for group in groups} if level == "distance" else dict(zip(groups, groups))
    if not pairs:
        keys = TITLES.get(measure) or {key: key for key in one.keys(measure)}
        keys = {key: text for key, text in keys.items() if any(key in place for place in cells)}
    rows = [[cell(keys.get(group, group)), *(fact(cells.get((group, key)) or cells.get((key, group)), factor, digits)
                                             for key in keys)] for group in groups]
    if pairs or measure in ("nr_precision", "sanity"):
        shade(rows, log_above_0 if measure == "nr_precision" else float, diagonal=not pairs or level != "network")
    if measure in ("nr_precision", "pairs"):
        rows += type_rows(one, measure, keys, factor, digits)
    name, notes = {"nr_precision": "nrprec"}.get(measure, measure), NOTES.get(measure, ())
    if level != "network":
        name, title = f"{name}_by_{level}", f"{title} by {level}"
        caption += ". Each cell is the mean over the pairs of two different losses"
        notes = ["Networks without a loss are left out."] if level == "distance" else ()
    if measure == "nr_precision" and one.tables:
        notes = nrprec_notes(one)
    if measure == "pairs" and one.tables:
        caption += f": label {one.tables['pairs'][0]['label']}, {next(iter(cells.values())).note}"
    if pairs and any(a == b for a, b in cells) and level == "network":
        notes = ["Diagonal: different folds of one loss."]
    header = ["" if pairs else "Layers" if measure == "sanity" else "Loss", *keys.values()]
    kind = "matrix" if pairs else "rows"
    return [table(name, title, caption, header, rows, one.name, kind, notes)] if rows else []


def log_above_0(value):
    return math.log1p(max(value, 0))


def type_rows(one, measure, keys, factor, digits):
    """The means over ranking and over classification losses, bold and † where a test says which is larger."""
    tests, released = ({row.key: row.mark for row in one.select(measure, level)} for level in ("test", "released"))
    rows = []
    for kind in ("ranking", "classification"):
        cells = [one.cells(measure, "type").get((kind, key)) for key in keys]
        if any(cells):
            rows.append([cell(f"{kind.capitalize()} mean", bold=True), *(
                fact(row, factor, digits, tests.get(key) == kind, "†" if released.get(key) == kind else "")
                for key, row in zip(keys, cells))])
    return rows


def nrprec_notes(one):
    first, tested = one.tables["nrprec"][0], all(row.p_holm is not None for row in one.select("nr_precision"))
    yield (f"* above chance: p_holm < 0.01 in every fold, {first['permutations']:,.0f} permutations of each property, "
           "Holm-corrected over the properties." if tested else
           "* NR-Prec > 2.576: the published mark, one z-score's 1 % threshold applied to a mean of many. nrprec.py "
           "--permutations N tests the mean.")
    yield BOLD
    neighbours = f"at most {first['max_neighbours']:.0f}" if first.get("max_neighbours") else "all R"
    yield (f"Null {first.get('null') or 'not stated'}, distance {first.get('distance') or 'not stated'}, "
           f"{neighbours} neighbours.")


def type_tests(one, measure, name, what):
    """Ranking against classification, key by key: the exact test, and the released way beside it."""
    title, _, factor, digits = MEASURES[measure]
    tests, types = one.select(measure, "test"), one.cells(measure, "type")
    rows = []
    for test, released in zip(tests, one.select(measure, "released")):
        r, c = (types[kind, test.key]._replace(spread=None, mark="") for kind in ("ranking", "classification"))
        rows.append([
            TITLES.get(measure, {}).get(test.key, test.key), fact(r, factor, digits, test.mark == "ranking"),
            fact(c, factor, digits, test.mark == "classification"),
            cell(rounded(released.value, digits, "+"), released.value),
            cell(rounded(test.value, 2, "+"), test.value, hint=f"{r.n} against {c.n} losses"),
            cell(p_text(test.p), test.p), cell(p_text(test.p_holm), test.p_holm), test.mark,
            cell(p_text(released.p), released.p, hint=released.note), released.mark])
    if not tests:
        return []
    least = min(1, len(tests) * min(test.low for test in tests))
    notes = [f"p: two-sided Mann-Whitney U on fold averages, {tests[0].note}; the unit is the loss ({r.n} ranking, "
             f"{c.n} classification). Holm over the {len(tests)} rows, 5 %; with so few losses it cannot fall below "
             f"{p_text(least)}.", "Effect: rank-biserial correlation, 1 when every ranking loss lies above every "
             "classification loss, −1 the reverse.", "Released p: the way of the first paper's code, all folds pooled "
             "as if independent, not corrected, 1 %; its SciPy's default was half the two-sided p-value of the normal "
             "approximation."]
    header = [what, "Ranking", "Classification", "Difference", "Effect", "p", "p, Holm", "Larger", "Released p",
              "Released: larger"]
    return [table(name, f"Ranking against classification: {title}", "Means over losses. An empty cell under “larger”: "
                  "no difference could be shown", header, rows, one.name, notes=notes)]


def other_tests(one):
    """What else was tested, and the means over all pairs of two losses."""
    rows = []
    for measure, what, test in (
            ("order", "Order of the properties against Table 6: Spearman's rank correlation", "{n} properties"),
            ("same type", "Maps of one type less maps of two: r", "{note}; the types permuted over {n} losses"),
            ("same distance", "Maps of one distance less maps of two: r", "{note}; the distances permuted over {n} "
             "losses")):
        for row in one.select(measure, "test"):
            rows.append([what, cell(rounded(row.value, 3, "+"), row.value), test.format(**row._asdict()),
                         cell(p_text(row.p), row.p)])
    for measure in ("correlation", "jsd", "ceiling", "corrected", "cka", "overlap"):
        for row in one.select(measure, "all"):
            rows.append([f"{MEASURES[measure][0]}: mean over all pairs", cell(rounded(row.value, 3), row.value),
                         f"{interval(row, 1, 3)}: the range of {row.n} pairs", ""])
    return [table("tests", "Other tests and means", "Permutation tests are two-sided, 9,999 permutations",
                  ["What", "Number", "Test or range", "p"], rows, one.name)] if rows else []


def training(one):
    """The second paper's Table 1 from the training histories: test split, before and after."""
    before, after = ({(row.network, row.split, row.key): row
                      for row in one.select("training", fold="mean", part="test", epoch=epoch)} for epoch in (0, "best"))
    titles = {key: text for key, text in TITLES["pairs"].items() if any(key == place[2] for place in after)}
    rows = []
    for name, split in sorted({place[:2] for place in after}, key=lambda place: list(one.types).index(place[0])):
        pairs = [[ends.get((name, split, key)) for ends in (before, after)] for key in titles]
        texts = [" → ".join(rounded(row.value, 3) for row in pair if row) for pair in pairs]
        n = next(last.n for _, last in pairs if last)
        rows.append([name, split or "", cell(n or "", n), *(
            cell(text, last and last.value, hint="before → after training") for text, (_, last) in zip(texts, pairs))])
    return [table("training", "Test split before and after training", "Scores of the test split, untrained → trained, "
                  "mean over folds", ["Loss", "Splitting", "Folds", *titles.values()], rows, one.name)] if rows else []


def losses(everything):
    """Table 1: the losses, with the number of folds that each data set has results of."""
    from dml_common import files

    known = {row["name"]: row for row in files.losses()}
    for one in everything:
        known |= {name: {"type": kind, "distance": one.distances[name], "year": ""} for name, kind in one.types.items()
                  if name not in known}
    rows = []
    for name, row in known.items():
        distance = "" if name == "None" else (row["distance"] or "").replace("_", " ")
        rows.append([name, cell(row["year"], row["year"] or None), row["type"], distance])
        for one in everything:
            folds = {network["fold"] for network in one.networks
                     if network["name"] == name and (network["emb"] or network["maps"])}
            folds |= {row.fold for row in one.select("nr_precision", network=name) if row.fold != "mean"}
            rows[-1].append(cell(len(folds) or "", len(folds) or None))
    counts = " and the number of networks (folds) of each with results" if everything else ""
    return table("losses", "Losses", f"The losses, their types and distances{counts}",
                 ["Loss", "Year", "Type", "Distance", *(f"Networks, {one.name}" for one in everything)], rows,
                 notes=["None: ImageNet weights and an untrained last layer."])


def properties(one):
    """Table 5 of the results' props.csv; without one, the paper's."""
    from dml_common import files

    header = ["Property", "Number", "Values"]
    if one and one.properties:
        rows = [[name, cell(len(values), len(values)), value_list(values)] for name, values in one.properties.items()]
        return table("properties", "Properties", "The pictures' properties and their values", header, rows, one.name)
    columns = files.read_table(HERE / "published" / "kobs_table5_properties.csv")
    rows = [[name, cell(number, number), values] for name, number, values in zip(*columns.values())]
    return table("properties_published", "Properties (published)", "The properties of the first paper's rendered cars",
                 header, rows, notes=["No props.csv in the results: the paper's own."])


def value_list(values):
    """Property values in words: numbers sorted, evenly spaced ones shortened as in the paper."""
    from dml_common.pictures import natural_key

    try:
        values = sorted(values, key=float)
        steps = {round(float(b) - float(a), 9) for a, b in zip(values, values[1:])}
    except ValueError:
        values, steps = sorted(values, key=natural_key), ()
    if len(values) > 4 and len(steps) == 1:
        return f"{values[0]}, {values[1]}, …, {values[-1]}"
    return ", ".join(values if len(values) < 9 else [*values[:8], "…"])


def errata():
    from dml_common import files

    columns = files.read_table(HERE / "published" / "errata.csv")
    return table("errata", "Errata", "Where the published descriptions, code and numbers disagree, and what is done here",
                 ["Paper", "Published", "Found", "Here"], zip(*columns.values()))


def dataset_tables(one):
    """All tables of one data set's results that there are numbers for."""
    made = [*lay(one, "nr_precision"), *type_tests(one, "nr_precision", "nrprec_tests", "Property")]
    for measure in ("correlation", "jsd", "ceiling", "corrected", "cka", "overlap"):
        made += lay(one, measure) + lay(one, measure, "type")
        if measure in ("correlation", "jsd", "corrected"):
            made += [by for by in lay(one, measure, "distance") if len(by["rows"]) > 1]
    return [*made, *lay(one, "masks"), *lay(one, "sanity"), *lay(one, "pairs"),
            *type_tests(one, "pairs", "pairs_tests", "Score"), *training(one), *other_tests(one)]


def papers(everything, tables_of):
    """The papers' tables, with ours and the differences after each data set's."""
    from dml_common import results

    made = [losses([]), properties(None)]
    for theirs in results.published():
        made += [{**one, "name": f"published_{one['name']}", "title": f"{one['title']}, published"}
                 for one in dataset_tables(theirs)]
        for ours in everything:
            differences = dataset_tables(results.difference(ours, theirs))
            names = [one["name"] for one in differences]
            made += [one for one in tables_of[ours.name] if one["name"] in names]
            made += [{**one, "name": f"difference_{one['name']}", "title": f"{one['title']}: ours − published",
                      "notes": ["NR-Prec grows with the number of pictures, and with another null: the order of properties "
                                "compares, the size does not."] if one["paper"] == "Table 6" else []}
                     for one in differences]
    return made


# ---------------------------------------------------------------- findings


def finding(one, topic, text, test="", p=None):
    return {"dataset": one.name, "topic": topic, "text": f"{one.name}: {text}.", "test": test or "none", "p_value": p}


def findings(one):
    """The three findings of a data set: a number, its interval and its p, or that nothing was found."""
    yield property_finding(one)
    yield type_finding(one)
    yield pixel_finding(one)


def property_finding(one):
    every = one.select("nr_precision", "all")
    if not every:
        return finding(one, "property level", "no property was analysed")
    top = max(every, key=lambda row: row.value)
    tested = all(row.p_holm is not None for row in one.select("nr_precision"))
    test = ("permutations of each property, Holm-corrected, p_holm < 0.01 in every fold; the largest of "
            f"{top.key} is {p_text(top.p_holm)}" if tested else
            "the published mark: NR-Prec > 2.576, a z-score's threshold applied to a mean; no p-value")
    number = f"{rounded(top.value)} {interval(top)}".rstrip()
    text = f"embeddings cluster most by {top.key}: NR-Prec {number}, above chance in {top.mark} losses"
    if top.mark.startswith("0 "):
        text = f"embeddings cluster by no property above chance; the largest NR-Prec is {number} ({top.key})"
    return finding(one, "property level", text, f"{test}; [ ]: Student's 95 % interval over the losses",
                   top.p_holm if tested else None)


def type_finding(one):
    topic, tests = "ranking against classification", one.select("nr_precision", "test")
    if not tests:
        return finding(one, topic, "ranking and classification losses can't be compared, two of each are needed")
    types = one.cells("nr_precision", "type")
    first = min(tests, key=lambda test: test.p_holm)
    r, c = (types[kind, first.key] for kind in ("ranking", "classification"))
    differ = sum(bool(test.mark) for test in tests)
    text = f"no property was found in which {r.n} ranking and {c.n} classification losses differ"
    if differ:
        chance = r.mark.startswith("0 ") and c.mark.startswith("0 ")
        text = (f"{r.n} ranking and {c.n} classification losses differ in {differ} of {len(tests)} properties, most clearly "
                f"in {first.key}: {rounded(r.value)} {interval(r)} against {rounded(c.value)} {interval(c)}"
                + (", above chance for no loss" if chance else ""))
    return finding(one, topic, text, f"two-sided Mann-Whitney U on fold averages, {first.note}, Holm over {len(tests)} "
                   f"properties, 5 %; the smallest p is {p_text(first.p_holm)} ({first.key})", first.p_holm)


def pixel_finding(one):
    r, ceiling, share = (next(iter(one.select(measure, "all")), None) for measure in ("correlation", "ceiling", "corrected"))
    masks = {row.key: row for row in one.select("masks", "all")}
    parts, excess = [], masks.get("excess")
    if r:
        parts.append(f"maps of two losses correlate at {rounded(r.value)} {interval(r)}" + (
            f", {rounded(100 * share.value, 0)} % of what their noise allows ({rounded(ceiling.value)})"
            if ceiling and share else ", their noise ceiling is unknown"))
    if excess and {"share", "other"} <= masks.keys():
        inside, other = (rounded(100 * masks[key].value, 1) for key in ("share", "other"))
        shown = "" if excess.low is not None and excess.low > 0 else ", not shown to be more"
        parts.append(f"{inside} % of the saliency lies in the object, {rounded(100 * excess.value, 1)} points "
                     f"{interval(excess, 100, 1)} more than in other pictures' objects ({other} %){shown}")
    return finding(one, "pixel level", "; ".join(parts) or "no saliency maps were compared",
                   "[ ] of r: the range of the pairs, folds and pairs averaged through Fisher's z; of points: 95 % "
                   "interval over pictures" if parts else "")


# ---------------------------------------------------------------- writing

MARKDOWN = {**{letter: f"\\{letter}" for letter in "\\`*_[]#|~!$^"}, "&": "&amp;", "<": "&lt;", ">": "&gt;"}
LATEX = {**{letter: f"\\{letter}" for letter in "{}$&#%_"}, "\\": r"\textbackslash{}", "~": r"\textasciitilde{}",
         "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "{''}",
         "`": r"{\`{}}", "\0": "{}", "±": r"$\pm$", "−": "$-$", "–": "--", "—": "---", "×": r"$\times$", "·": r"$\cdot$",
         "°": r"$^\circ$", "≥": r"$\geq$", "≤": r"$\leq$", "→": r"$\rightarrow$", "…": r"\dots{}", "†": r"$\dagger$",
         "σ": r"$\sigma$", "“": "``", "”": "''", "’": "'"}


def one_line(text):
    """Control characters and line ends become spaces."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text))


def markdown(text):
    return "".join(MARKDOWN.get(letter, letter) for letter in one_line(text))


def latex(text):
    """Any text for pdflatex: accented Latin letters stay, what its fonts lack becomes [U+0416]."""
    text = re.sub(r"(?<=-)(?=-)|(?<=')(?=')", "\0", one_line(text))  # no ligatures: -- stays two hyphens
    known = [letter in LATEX or letter.isascii() or ("À" <= letter <= "ÿ" and letter not in "ÐÞðþ") for letter in text]
    return "".join(LATEX.get(letter, letter) if here else f"[U+{ord(letter):04X}]" for letter, here in zip(text, known))


def number_columns(content):
    """Which columns hold numbers."""
    return [any(row[k]["value"] is not None for row in content["rows"]) for k in range(len(content["header"]))]


def csv_rows(content):
    """The table for its CSV: the numbers with every digit, ± and marks in columns of their own."""
    columns = []
    for k, title in enumerate(content["header"]):
        cells = [row[k] for row in content["rows"]]
        columns.append([title or "name"])
        for one in cells:
            counted = one["value"] is None or one["text"] == f"{one['value']:.0f}" and one["value"] % 1 == 0
            columns[-1].append(one["text"] if counted else one["value"])
        for key, end in ("spread", "±"), ("mark", "mark"):
            if any(one[key] not in (None, "") for one in cells):
                columns.append([f"{title} {end}", *(one[key] for one in cells)])
    return list(zip(*columns))


def to_markdown(content):
    paper = f" ({content['paper']})" if content["paper"] else ""
    rules = ["---:" if right else "---" for right in number_columns(content)]
    rows = [[f"**{markdown(one['text'])}**" if one["bold"] and one["text"] else markdown(one["text"]) for one in row]
            for row in content["rows"]]
    lines = [f"| {' | '.join(row)} |" for row in [list(map(markdown, content["header"])), *rows]]
    lines.insert(1, f"|{'|'.join(rules)}|")
    return "\n".join([f"### {markdown(content['title'])}", "", markdown(content["caption"] + paper), "", *lines, "",
                      *(f"- {markdown(note)}" for note in content["notes"])]).rstrip() + "\n"


def latex_template():
    """templates/table.tex, or None where jinja2 is missing."""
    try:
        import jinja2
    except ImportError:
        print("tables.py: jinja2 is not installed: no .tex files (pip install jinja2)", file=sys.stderr)
        return None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"), block_start_string="<%", block_end_string="%>",
        variable_start_string="<<", variable_end_string=">>", comment_start_string="<#", comment_end_string="#>",
        trim_blocks=True, lstrip_blocks=True, finalize=lambda text: text)
    environment.filters["latex"] = latex
    return environment.get_template("table.tex")


def show(content):
    """The table on the terminal, aligned; a wide matrix has numbers for its columns' names."""
    from dml_common.command import print_aligned

    header, rows = content["header"], [[one_line(one["text"])[:60] for one in row] for row in content["rows"]]
    if content["kind"] == "matrix" and len(header) > 7:
        rows = [[f"{number:2} {row[0]}", *(text.replace(" ± ", "±") for text in row[1:])]
                for number, row in enumerate(rows, 1)]
        header = ["", *map(str, range(1, len(header)))]
    print(f"\n{one_line(content['title'])}" + (f" ({content['paper']})" if content["paper"] else ""))
    print_aligned([list(map(one_line, header)), *rows])


def say_lines(title, lines, most=12):
    """Lines of the terminal's summary under their title."""
    print(f"\n{title}")
    for line in lines[:most]:
        print(textwrap.fill(one_line(line), 110, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False))
    if len(lines) > most:
        print(f"  … {len(lines) - most} more in tables.md")


def write(out, contents, found, warnings, missing, options):
    """All files of the folder `out`, each whole or not at all; tables.json last."""
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
    files.write_table(out / "missing.csv", ["dataset", "table", "what"], [list(one.values()) for one in missing])
    parts = {"What the numbers say": [f"{one['text']} ({one['test']})" for one in found], "What to beware of": warnings,
             "What is missing": [f"{one['dataset']}: {one['what']}" for one in missing]}
    lines = [f"## {title}\n\n" + "\n".join(f"- {markdown(line)}" for line in part or ["Nothing."])
             for title, part in parts.items()]
    save("tables.md", "\n\n".join(["# Tables", *lines, *map(to_markdown, contents)]))
    for content in contents:
        content["rows"] = [[{key: one[key] for key in ("text", "value", "shade", "bold", "hint")} for one in row]
                           for row in content["rows"]]
    versions = {"python": platform.python_version(), "numpy": version("numpy"), "scipy": version("scipy")}
    everything = {"tables": contents, "findings": found, "warnings": warnings, "missing": missing,
                  "made_with": {"versions": versions, "options": options}}
    save("tables.json", json.dumps(everything, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


# ---------------------------------------------------------------- the command


def parse(argv):
    from dml_common import command

    parser = command.parser(__doc__)
    add = parser.add_argument
    add("results", nargs="?", type=Path, metavar="RESULTS", help="results/ with data sets' folders in it, or one of these")
    add("--out", type=Path, metavar="DIR", help="where the tables go (tables); with --published only if given")
    add("--published", action="store_true", help="print the papers' tables; with RESULTS ours and the differences too")
    add("--models", type=Path, default=HERE / "models", metavar="DIR",
        help="has trained/<dataset>/<slug>/fold<k>/ (models/)")
    return parser.parse_args(argv)


def check_folder(out, results, everything):
    """Make the folder of the tables; raises ValueError when it is one of the results' or can't be written."""
    from dml_common import files

    if out.resolve() in [folder.resolve() for folder in [*filter(None, [results]), *(one.folder for one in everything)]]:
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
    everything.sort(key=lambda one: (-len(one.tables), -len(one.networks)))  # the findings of the fullest come first
    tables_of = {one.name: [properties(one), *dataset_tables(one)] for one in everything}
    contents = [losses(everything), *(content for one in everything for content in tables_of[one.name]), errata()]
    if args.published:
        contents = papers(everything, tables_of)
        for content in contents:
            show(content)
        if not args.out:
            return
    names = [content["name"] for content in contents]
    if len(set(names)) < len(names):
        raise ValueError(f"two data sets' names give one file name ({max(names, key=names.count)}); rename one's folder")
    found = [finding for one in everything for finding in findings(one)]
    warnings = [f"{one.name}: {line}" for one in everything for line in one.warnings]
    missing = [line for one in everything for line in one.missing]
    out = args.out or Path("tables")
    check_folder(out, args.results, everything)
    options = {"results": str(args.results) if args.results else None, "published": args.published}
    for content in contents if not args.published else ():
        if re.match(r"(nrprec_tests|correlation_by_type|corrected_by_type|pairs(?!_tests))_", content["name"]):
            show(content)
    write(out, contents, found, warnings, missing, options)
    if not args.published:
        say_lines("What the numbers say", [one["text"] for one in found])
        say_lines("What to beware of", warnings)
        say_lines("What is missing", [f"{one['dataset']}: {one['what']}" for one in missing])
        print(f"\n{len(contents)} tables: {out / 'tables.md'}, {out / 'tables.tex'} (pdflatex), {out / 'tables.json'}")


if __name__ == "__main__":
    command.run(main)
