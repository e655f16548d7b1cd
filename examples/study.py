"""The study's answers that no table of ours has: dose and response of a planted shortcut, and its controls.

Reads:  FOLDER/results/{hue0,hue25,…,frozen,whole0,…}/cars_test/<slug>/fold<k>/emb.npy, …/{masks,compare}.csv,
        cars_test/props.csv, as examples/study.sh makes them and examples/study/ ships them
Writes: OUT/answers.csv, a row a number: question, what, share, loss, property, value, low, high, p, n;
        OUT/study.png, the picture of docs/study.md

    python examples/study.py examples/study --out answers
    python examples/study.py examples/study --check           # are the shipped arrays as they were listed?

The intervals of one network are delete-a-group jackknives over the test pictures (20 groups of frames,
Student's t with 19 degrees of freedom): other pictures might have been drawn, the training stays. What
training adds is shown by two seeds without any shortcut. The intervals over losses are Student's, their tests
turn signs.
"""
import csv
import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from dml_common import command, conclusions, files, results  # noqa: E402
from nrprec import nr_precision  # noqa: E402

GROUPS = 20
PLANTED = "bg_color_hue"
SEEN = "bg_color_hue, seen"  # where saturation and value of the background leave a hue to be seen
COLUMNS = ("question", "what", "share", "loss", "property", "value", "low", "high", "p", "n")


def jackknife(embeddings, labels, groups=GROUPS):
    """NR-Prec of each column of all pictures and without each group: {name: float64 (1 + groups,)}.

    embeddings (n, m); labels {name: (n,)}; picture i is in group i % GROUPS. Hypergeometric null.
    """
    n = len(embeddings)
    values = {name: np.empty(1 + groups) for name in labels}
    for k in range(1 + groups):
        rows = np.flatnonzero(np.arange(n) % GROUPS != k - 1)
        scores = nr_precision(embeddings[rows], {name: column[rows] for name, column in labels.items()},
                              null="hypergeometric")
        for name, score in scores.items():
            values[name][k] = score.nr_precision
    return values


def interval(values):
    """(value, low, high, p) of a jackknifed number (1 + GROUPS,): Student's t, GROUPS - 1 of freedom."""
    error = np.sqrt((GROUPS - 1) / GROUPS * np.square(values[1:] - values[1:].mean()).sum())
    p = 2 * stats.t.sf(abs(values[0]) / error, GROUPS - 1) if error else float(values[0] == 0)
    return values[0], *conclusions.student(values[0], error, GROUPS - 1), p


def over_losses(values):
    """(mean, low, high, p) of numbers (k,), one a loss: Student's interval, signs turned in all 2^k ways."""
    return conclusions.mean_of(values)[:4]


def kinds():
    """{slug: ranking or classification} of the losses."""
    return {row["slug"]: row["type"] for row in files.losses()}


def of_types(values):
    """(classification less ranking, low, high, p) of {slug: number}: Welch's interval, exact Mann-Whitney."""
    of = kinds()
    groups = [[value for slug, value in values.items() if of.get(slug) == kind]
              for kind in ("classification", "ranking")]
    if min(map(len, groups)) < 2:
        return np.nan, np.nan, np.nan, np.nan
    return conclusions.difference_of(*groups)[:4]


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_properties(folder):
    """The test cars' properties, {name: (n,) array of str}, and the planted one where it can be seen."""
    rows = read_rows(folder / "cars_test" / "props.csv")
    labels = {name: np.array([row[name] for row in rows]) for name in rows[0] if name != "frame"}
    grey = (labels["bg_color_sat"].astype(float) == 0) | (labels["bg_color_val"].astype(float) == 0)
    labels[SEEN] = np.where(grey, "", labels[PLANTED])
    return labels


def find(folder, name):
    """{(slug, "fold0" or "fold0.seed2"): path} of a set's embeddings."""
    paths = sorted((folder / "results" / name / "cars_test").glob("*/fold*/emb.npy"))
    return {(path.parts[-3], path.parts[-2]): path for path in paths}


def random_columns(labels, number, seed=0):
    """Columns that are in no picture: the planted property's values in an order of chance, {name: (n,)}."""
    rng = np.random.default_rng(seed)
    return {f"random {i}": rng.permutation(labels[PLANTED]) for i in range(number)}


def dose(sets, labels, columns):
    """Question 4. sets: {share: {(slug, fold): jackknife()}} with the columns' names among its keys."""
    rows, shares = [], sorted(set(sets) - {0})
    for share in shares:
        pairs = [(key, sets[share][key], sets[0][key]) for key in sorted(set(sets[share]) & set(sets[0]))
                 if key[0] != "none"]
        changes = {}
        for name in (*labels, *columns):
            changes[name] = [interval(new[name] - old[name]) for _, new, old in pairs if name in new]
        for name in (PLANTED, SEEN):
            for (key, _, _), change in zip(pairs, changes[name]):
                rows.append((4, "change", share, key[0], name, *change, 1))
            rows.append((4, "mean change", share, "", name, *over_losses([c[0] for c in changes[name]]),
                         len(pairs)))
            rows.append(called(4, "called", share, name, changes[name], one_sided=True))
            rows.append((4, "classification less ranking", share, "", name, *of_types(
                {key[0]: change[0] for (key, _, _), change in zip(pairs, changes[name])}), len(pairs)))
        others = [name for name in labels if name not in (PLANTED, SEEN)]
        for name in others:
            rows.append((4, "mean change", share, "", name, *over_losses([c[0] for c in changes[name]]),
                         len(pairs)))
        rows.append(called(4, "called", share, "others", [c for name in others for c in changes[name]]))
        rows.append(called(4, "called", share, "random", [c for name in columns for c in changes[name]]))
    seeds = {fold for _, fold in sets[0]} - {"fold0"}
    for name in labels:
        changes = [interval(sets[0][slug, fold][name] - sets[0][slug, "fold0"][name])
                   for slug, fold in sorted(sets[0]) if fold in seeds and slug != "none"]
        if changes:
            rows.append(called(4, "called between seeds", 0, name, changes))
    return rows


def called(question, what, share, name, changes, one_sided=False):
    """How often a change's interval leaves 0 out (one_sided: above it), with Clopper-Pearson's interval."""
    hits = sum(low > 0 or (high < 0 and not one_sided) for _, low, high, _ in changes)
    test = stats.binomtest(hits, len(changes))
    return (question, what, share, "", name, hits / len(changes), *test.proportion_ci(), "", len(changes))


def order(scores, published):
    """Question 1: Kendall's tau of the order of properties with Table 6's; both {slug: {property: value}}."""
    def row(what, slug, ours, theirs):
        names = [name for name in theirs if name in ours]  # the table lacks one value
        test = stats.kendalltau([ours[name] for name in names], [theirs[name] for name in names])
        return 1, what, 0, slug, "", test.statistic, "", "", test.pvalue, len(names)

    both = [slug for slug in published if slug in scores]
    rows = [row("tau with Table 6", slug, scores[slug], published[slug]) for slug in both]
    trained = [slug for slug in both if slug != "none"]
    names = set.intersection(*(set(published[slug]) for slug in trained))
    means = [{name: np.mean([one[slug][name] for slug in trained]) for name in names}
             for one in (scores, published)]
    return [*rows, row("tau of the losses' means with Table 6", "", *means)]


def spread(trained, frozen, names, seed=0):
    """Question 5: how much losses differ (standard deviation) when more learns than the last layer.

    trained, frozen: {slug: {property: NR-Prec}}. The ratio's interval: 10,000 bootstrap draws of losses.
    """
    rows, rng, slugs = [], np.random.default_rng(seed), sorted(set(trained) & set(frozen) - {"none"})
    draws = rng.integers(len(slugs), size=(10_000, len(slugs)))
    for name in names:
        both = np.array([[one[slug][name] for slug in slugs] for one in (trained, frozen)])
        for what, values in zip(("trained", "frozen"), both):
            rows.append((5, f"deviation between losses, {what}", 0, "", name, values.std(ddof=1), "", "", "",
                         len(slugs)))
        a, b = both[:, draws].std(axis=-1, ddof=1)
        ratio = both.std(axis=-1, ddof=1)
        low, high = np.quantile(a[b > 0] / b[b > 0], [0.025, 0.975])
        rows.append((5, "ratio of deviations", 0, "", name, ratio[0] / ratio[1], low, high, "", len(slugs)))
        test = stats.kendalltau(*both)
        rows.append((5, "tau of the losses' order", 0, "", name, test.statistic, "", "", test.pvalue,
                     len(slugs)))
    return rows


def outside(folder, before, after):
    """Question 4: the share of saliency outside the car in sets `after` and `before`, one a loss."""
    shares = {}
    for name in (before, after):
        table = folder / "results" / name / "cars_test" / "masks.csv"
        if not table.exists():
            return []
        shares[name] = {row["model"]: 1 - float(row["mean"]) for row in read_rows(table)
                        if row["measure"] == "share" and row["fold"] == "0"}
    losses = sorted(set(shares[before]) & set(shares[after]) - {"None"})
    changes = [shares[after][loss] - shares[before][loss] for loss in losses]
    share = int(after.removeprefix("hue"))
    return [*((4, "saliency outside", share, loss, "", change, "", "", "", 1)
              for loss, change in zip(losses, changes)),
            (4, "mean saliency outside", share, "", "", *over_losses(changes), len(losses))]


def clustered(path, columns):
    """Question 4: is a column that is in no picture called one that the embedding clusters by (p < 0.05)?"""
    scores = nr_precision(np.load(path), columns, null="hypergeometric", permutations=99)
    return [score.p_value < 0.05 for score in scores.values()]


def published():
    """Table 6 of the first paper, {slug: {property: NR-Prec}}."""
    slugs = {row["name"]: row["slug"] for row in files.losses()}
    return {slugs[name]: {key: value for key, value in row.items() if value is not None}
            for name, row in results.published_nrprec().items() if name in slugs}


def answers(folder, number=1000):
    """All rows of answers.csv; number: of random columns."""
    if not find(folder, "hue0"):
        raise ValueError(f"{folder}/results/hue0: no embeddings; bash examples/study.sh makes them")
    labels = read_properties(folder)
    sets = {path.name: find(folder, path.name) for path in sorted((folder / "results").iterdir())}
    slugs = sorted({slug for slug, _ in sets["hue0"]} - {"none"})
    chance = random_columns(labels, number)
    own = {slug: {name: chance[name] for name in list(chance)[i::len(slugs)]} for i, slug in enumerate(slugs)}
    scores, false = {name: {} for name in sets}, []
    work = [(name, *key, path) for name, networks in sets.items() for key, path in networks.items()]
    with command.bar(len(work), "study", " networks") as bar:
        for name, slug, fold, path in work:
            extra = own.get(slug, {}) if "hue" in name and fold == "fold0" else {}
            groups = GROUPS if "hue" in name or name == "seeds" else 0
            scores[name][slug, fold] = jackknife(np.load(path), {**labels, **extra}, groups)
            if name == "hue0" and extra:
                false += clustered(path, extra)
            bar.update()
    at = {name: {slug: {key: float(values[0]) for key, values in one.items()}
                 for (slug, fold), one in scores[name].items() if fold == "fold0"} for name in sets}
    hues = {int(name.removeprefix("hue")): one for name, one in scores.items() if name.startswith("hue")}
    hues[0].update(scores.get("seeds", {}))
    rows = order(at["hue0"], published())
    rows += dose(hues, labels, chance)
    low, high = stats.binomtest(sum(false), len(false)).proportion_ci()
    rows.append((4, "clustered at random", 0, "", "random", np.mean(false), low, high, "", len(false)))
    rows += outside(folder, "hue0", "hue90") if "hue90" in sets else []
    for name, other in ("frozen", "hue0"), ("whole0", "hue0"), ("whole90", "hue90"):
        if name in sets and other in sets:
            rows += spread(at[other], at[name], labels) if name == "frozen" else []
            rows += [(5, f"NR-Prec, {where}", int(other.removeprefix("hue")), slug, key, at[where][slug][key],
                      "", "", "", 1)
                     for where in (name, other) for slug in sorted(set(at[name]) & set(at[other]))
                     for key in ("model", PLANTED)]
    return rows


def check(folder):
    """Raise ValueError naming a shipped file that is missing or was changed."""
    for line in files.read_text(folder / "SHA256SUMS", "the list of the shipped files").splitlines():
        digest, name = line.split("  ", 1)
        if not (folder / name).is_file():
            problem = "is missing"
        elif hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            problem = "is not the file that SHA256SUMS lists"
        else:
            continue
        raise ValueError(f"{folder / name} {problem}; restore it: git checkout -- {folder}")


def ship(folder, out):
    """Copy what is worth keeping of study.sh's folder: embeddings as float16, no networks, no disk's path."""
    shutil.copytree(folder / "cars_test", out / "cars_test", dirs_exist_ok=True)
    arrays, networks = "results/*/cars_test/*/fold*/", "*/trained/*/*/fold*/"
    patterns = (f"{arrays}*.npy", f"{arrays}*.json", "results/*/cars_test/props.csv",
                "results/hue*/cars_test/masks.csv", "results/hue*/cars_test/faithfulness.csv",
                f"{networks}history.csv", f"{networks}config.json",
                "models/trained/cars_hue0@default/*/fold0/histograms.csv")
    kept = {path for pattern in patterns for path in folder.glob(pattern)}
    for path in sorted(kept):
        target = out / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.name == "emb.npy":
            np.save(target, np.load(path).astype(np.float16))
        elif path.suffix == ".json":
            about = json.loads(path.read_text())
            if about.get("checkpoint"):
                about["checkpoint"] = Path(about["checkpoint"]).relative_to(folder).as_posix()
            target.write_text(json.dumps(about) + "\n")
        else:
            shutil.copyfile(path, target)
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(out).as_posix()}\n"
             for path in sorted(out.glob("*/**/*")) if path.is_file()]
    (out / "SHA256SUMS").write_text("".join(lines))


def draw(rows, folder, path, picture=0):
    """The picture of docs/study.md: the planted property's response to its dose, all others, some maps."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure = pyplot.figure(figsize=(11, 6.2), layout="constrained")
    above, below = figure.subfigures(2, height_ratios=(3.8, 2))
    left, right = above.subplots(1, 2)
    draw_dose(left, [row for row in rows if row[1] == "change" and row[4] == PLANTED])
    draw_means(right, [row for row in rows if row[1] == "mean change" and row[4] != SEEN])
    draw_maps(below, folder, picture)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def draw_dose(axes, changes):
    """A line a loss: the change of its NR-Prec of the planted property against the share."""
    of = kinds()
    styles = {"ranking": ("#0072B2", "o", "-"), "classification": ("#D55E00", "s", "--")}
    for slug in sorted({row[3] for row in changes}):
        colour, marker, dash = styles[of[slug]]
        points = [(0, 0), *((row[2], row[5]) for row in changes if row[3] == slug)]
        axes.plot(*zip(*points), dash, color=colour, marker=marker, markersize=3, linewidth=0.8, alpha=0.7)
    for kind, (colour, marker, dash) in styles.items():
        axes.plot([], [], dash, color=colour, marker=marker, label=f"{kind} losses")
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set(xlabel="training cars whose background's hue follows the model, %",
             ylabel="change of NR-Prec of bg_color_hue", title="A planted shortcut: dose and response")
    axes.legend(frameon=False)


def draw_means(axes, means):
    """The mean change of every property at the largest share, with its interval over the losses."""
    top = max(row[2] for row in means)
    means = sorted((row for row in means if row[2] == top), key=lambda row: row[5])
    for i, row in enumerate(means):
        colour = "#CC79A7" if row[4] == PLANTED else "#555555"
        margin = [[row[5] - row[6]], [row[7] - row[5]]]
        axes.errorbar(row[5], i, xerr=margin, fmt="o", color=colour, capsize=3)
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set_yticks(range(len(means)), [row[4] for row in means])
    axes.set(xlabel="mean change of NR-Prec, 95 % interval over losses", title=f"All properties at {top} %")


def draw_maps(figure, folder, picture):
    """One test car and its saliency maps by networks of shares 0 and 90."""
    from PIL import Image
    pairs = [(name, slug) for slug in ("triplet", "normalized_softmax") for name in ("hue0", "hue90")]
    shown = [(name, slug) for name, slug in [("hue0", "none"), *pairs]
             if (folder / "results" / name / "cars_test" / slug / "fold0" / "maps.npy").exists()]
    panels = figure.subplots(1, 1 + len(shown), squeeze=False)[0]
    panels[0].imshow(Image.open(sorted(folder.glob("cars_test/images/*"))[picture]))
    panels[0].set_title("test car", fontsize=9)
    for axes, (name, slug) in zip(panels[1:], shown):
        maps = np.load(folder / "results" / name / "cars_test" / slug / "fold0" / "maps.npy")
        axes.imshow(maps[picture].astype(float), cmap="magma", vmin=0, vmax=1)
        title = f"{slug.replace('_', ' ')}\n{name.removeprefix('hue')} %"
        axes.set_title("before training" if slug == "none" else title, fontsize=9)
    for axes in panels:
        axes.set_axis_off()


def main():
    parser = command.parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="examples/study, or study.sh's folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for answers.csv and study.png")
    parser.add_argument("--ship", type=Path, metavar="DIR", help="copy what is worth keeping there")
    parser.add_argument("--check", action="store_true", help="compare the files with SHA256SUMS first")
    args = parser.parse_args()
    if not (args.check or args.ship or args.out):
        raise ValueError("nothing is asked for; give --out DIR, --check or --ship DIR")
    if args.check:
        check(args.folder)
    if args.ship:
        ship(args.folder, args.ship)
    if not args.out:
        return
    rows = answers(args.folder)
    args.out.mkdir(parents=True, exist_ok=True)
    files.write_table(args.out / "answers.csv", COLUMNS, [
        [f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows])
    draw(rows, args.folder, args.out / "study.png")


if __name__ == "__main__":
    command.run(main)
