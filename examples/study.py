"""The study's answers that no table of ours has: dose and response of a planted shortcut, and its controls.

Reads:  FOLDER/results/{hue0,hue25,…,frozen,whole0,…}/cars_test/<slug>/fold<k>/emb.npy, …/{masks,compare}.csv,
        FOLDER/{models,whole}/trained/<dataset>/<slug>/fold<k>/history.csv, FOLDER/cars_test/props.csv, as
        examples/study.sh makes them; of whole networks examples/study/ ships jackknife.csv alone
Writes: OUT/answers.csv, a row a number: question, what, share, loss, property, value, low, high, p, n;
        OUT/jackknife.csv, NR-Prec of whole networks; OUT/study.png, the picture of docs/study.md

    python examples/study.py examples/study --out answers
    python examples/study.py examples/study --check           # are the shipped arrays as they were listed?

The intervals of one network are delete-a-group jackknives over the test pictures (20 groups of frames,
Student's t with 19 degrees of freedom): other pictures might have been drawn, the training stays. What
training adds is shown by two seeds without any shortcut. The intervals over losses are Student's, their tests
turn signs; a loss trained from several seeds counts once, with their mean.
"""
import csv
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
KEPT = ("set", "loss", "fold", "property", *map(str, range(1 + GROUPS)))


def jackknife(embeddings, labels, groups=GROUPS):
    """NR-Prec of each column of all pictures and without each group: {name: float64 (1 + groups,)}.

    embeddings (n, m); labels {name: (n,)}; picture i is in group i % GROUPS. Hypergeometric null.
    """
    group_of, scores = np.arange(len(embeddings)) % GROUPS, []
    for k in range(1 + groups):
        rows = np.flatnonzero(group_of != k - 1)
        part = {name: column[rows] for name, column in labels.items()}
        scores.append(nr_precision(embeddings[rows], part, null="hypergeometric"))
    return {name: np.array([score[name].nr_precision for score in scores]) for name in labels}


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


def slugs_by_name():
    return {row["name"]: row["slug"] for row in files.losses()}


def of_types(values):
    """(classification less ranking, low, high, p) of {slug: number}: Welch's interval, exact Mann-Whitney."""
    estimate = conclusions.by_type(values, kinds())
    return estimate[:4] if estimate and estimate.p is not None else (np.nan,) * 4


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


def by_loss(values):
    """The mean over seeds of each loss: {(slug, fold): number} -> {slug: number}, without None's."""
    losses = {}
    for (slug, _), value in values.items():
        losses.setdefault(slug, []).append(value)
    return {slug: float(np.mean(each)) for slug, each in losses.items() if slug != "none"}


def training(networks, labels):
    """Questions 2 and 3: what training changes, how types differ; networks {(slug, fold): jackknife()}."""
    rows, none = [], networks.get(("none", "fold0"))
    for name in labels:
        values = by_loss({key: one[name][0] for key, one in networks.items()})
        each = list(values.values())
        if none:
            before = none[name][0]
            rows += [(2, "None", 0, "none", name, *interval(none[name])[:3], "", 1),
                     (2, "trained", 0, "", name, *over_losses(each)[:3], "", len(each)),
                     (2, "trained less None", 0, "", name, *over_losses(np.array(each) - before), len(each))]
            if name == "model":
                rows += [(2, "loss less None", 0, slug, name, *interval(one[name] - none[name]), 1)
                         for (slug, _), one in networks.items() if slug != "none"]
        rows.append((3, "classification less ranking", 0, "", name, *of_types(values), len(each)))
        seeds = [[one[name][0] for (slug, _), one in networks.items() if slug == loss] for loss in values]
        if min(map(len, seeds)) > 1:
            within = np.sqrt(np.mean([np.var(of_one, ddof=1) for of_one in seeds]))
            rows.append((3, "deviation between seeds", 0, "", name, within, "", "", "", len(seeds)))
    return rows


def means(networks, labels):
    """{(slug, fold): jackknife()} -> {slug: {property: the mean over its seeds}}, of these properties."""
    averaged = {}
    for slug in dict.fromkeys(slug for slug, _ in networks):
        seeds = [one for (other, _), one in networks.items() if other == slug]
        averaged[slug] = {name: float(np.mean([one[name][0] for one in seeds])) for name in labels}
    return averaged


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
            rows.append(called(4, "called", share, name, changes[name]))
        for name in labels:
            each = by_loss({key: change[0] for (key, _, _), change in zip(pairs, changes[name])})
            rows.append((4, "mean change", share, "", name, *over_losses([*each.values()]), len(each)))
            if name in (PLANTED, SEEN):
                rows.append((4, "classification less ranking", share, "", name, *of_types(each), len(each)))
        others = [name for name in labels if name not in (PLANTED, SEEN)]
        rows.append(called(4, "called", share, "others", [c for name in others for c in changes[name]]))
        if columns:
            rows.append(called(4, "called", share, "random", [c for name in columns for c in changes[name]]))
    seeds = {fold for _, fold in sets[0]} - {"fold0"}
    for name in labels:
        changes = [interval(sets[0][slug, fold][name] - sets[0][slug, "fold0"][name])
                   for slug, fold in sorted(sets[0]) if fold in seeds and slug != "none"]
        if changes:  # up or down, nominally 5 %
            up = [(v, low, high, p) if v > 0 else (-v, -high, -low, p) for v, low, high, p in changes]
            rows.append(called(4, "called between seeds", 0, name, up))
    return rows


def called(question, what, share, name, changes):
    """How often a change's interval lies above 0 (nominally 2.5 %), with Clopper-Pearson's interval."""
    hits = sum(low > 0 for _, low, _, _ in changes)
    test = stats.binomtest(hits, len(changes))
    return (question, what, share, "", name, hits / len(changes), *test.proportion_ci(), "", len(changes))


def taken(rows):
    """Question 4: do ranking losses that learned more take more of what is planted, at the top share?"""
    changes = {(row[2], row[3]): row[5] for row in rows if row[1] == "change" and row[4] == PLANTED}
    top, of = max(share for share, _ in changes), kinds()
    score = {row[3]: row[5] for row in rows if row[1] == "validation MAP@R, models, fold0" and row[2] == 0}
    both = [(score[slug], value) for (share, slug), value in changes.items()
            if share == top and of.get(slug) == "ranking" and slug in score]
    test = stats.kendalltau(*zip(*both)) if len(both) > 1 else None
    return [(4, "tau of what is taken with MAP@R", top, "", PLANTED, test.statistic, "", "", test.pvalue,
             len(both))] if test else []


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


def spread(trained, frozen, names):
    """Question 5: how much losses differ (standard deviation) when more learns than the last layer.

    trained, frozen: {slug: {property: NR-Prec}}. The ratio's interval: 10,000 bootstrap draws of losses.
    """
    rows, rng, slugs = [], np.random.default_rng(0), sorted(set(trained) & set(frozen) - {"none"})
    draws = rng.integers(len(slugs), size=(10_000, len(slugs)))
    for name in names:
        both = np.array([[one[slug][name] for slug in slugs] for one in (trained, frozen)])
        one, other = both.std(axis=-1, ddof=1)
        for what, value in ("trained", one), ("frozen", other):
            rows.append((5, f"deviation between losses, {what}", 0, "", name, value, "", "", "", len(slugs)))
        a, b = both[:, draws].std(axis=-1, ddof=1)
        low, high = np.quantile(a[b > 0] / b[b > 0], [0.025, 0.975])
        rows.append((5, "ratio of deviations", 0, "", name, one / other, low, high, "", len(slugs)))
        test = stats.kendalltau(*both)
        rows.append((5, "tau of the losses' order", 0, "", name, test.statistic, "", "", test.pvalue,
                     len(slugs)))
    return rows


def outside(folder, before, after, share, only):
    """Question 4: the share of saliency outside the car in sets after and before, one a loss of `only`."""
    shares, slugs = {}, slugs_by_name()
    for name in (before, after):
        table = folder / "results" / name / "cars_test" / "masks.csv"
        if not table.exists():
            return []
        shares[name] = {slugs[row["model"]]: 1 - float(row["mean"]) for row in read_rows(table)
                        if row["measure"] == "share" and row["fold"] == "0"}
    losses = sorted(set(shares[before]) & set(shares[after]) & set(only))
    changes = [shares[after][loss] - shares[before][loss] for loss in losses]
    return [*((4, "saliency outside", share, loss, "", change, "", "", "", 1)
              for loss, change in zip(losses, changes)),
            (4, "mean saliency outside", share, "", "", *over_losses(changes), len(losses))]


def correlations(folder, name, share, only):
    """Question 3: the mean correlation (Fisher's z) of two networks' maps by types, of `only` and None."""
    table, of, pairs = folder / "results" / name / "cars_test" / "compare.csv", kinds(), {}
    slugs = slugs_by_name()
    for row in read_rows(table) if table.exists() else []:
        both = [slugs[row[side]] for side in ("model_a", "model_b")]
        if {*both} <= {*only, "none"}:
            kind = " with ".join(sorted(of[slug] for slug in both))
            pairs.setdefault(kind, []).append(np.arctanh(float(row["correlation"])))
    return [(3, "maps' correlation", share, "", kind, np.tanh(np.mean(z)), "", "", "", len(z))
            for kind, z in sorted(pairs.items())]


def learned(folder):
    """How well each network learned: the best validation MAP@R of its history."""
    rows = []
    for path in sorted(folder.glob("*/trained/cars_hue*@default/*/fold*/history.csv")):
        where, _, dataset, slug, fold, _ = path.relative_to(folder).parts
        best = max(float(row["map_at_r"]) for row in read_rows(path) if row["split"] == "validation")
        if where in ("models", "frozen", "whole"):
            share = int(dataset.removeprefix("cars_hue").removesuffix("@default"))
            rows.append((0, f"validation MAP@R, {where}, {fold}", share, slug, "", best, "", "", "", 1))
    return rows


def kept(folder):
    """jackknife.csv as {set: {(slug, fold): jackknife()}}; {} without it."""
    scores, path = {}, folder / "jackknife.csv"
    for row in read_rows(path) if path.exists() else []:
        values = np.array([float(row[str(k)]) for k in range(1 + GROUPS)])
        network = scores.setdefault(row["set"], {}).setdefault((row["loss"], row["fold"]), {})
        network[row["property"]] = values
    return scores


def answers(folder):
    """All rows of answers.csv, and of jackknife.csv."""
    if not find(folder, "hue0"):
        raise ValueError(f"{folder}/results/hue0: no embeddings; bash examples/study.sh makes them")
    labels, named = read_properties(folder), slugs_by_name()
    table6 = {named[name]: {key: value for key, value in row.items() if value is not None}
              for name, row in results.published_nrprec().items() if name in named}
    sets = {path.name: find(folder, path.name) for path in sorted((folder / "results").iterdir())}
    slugs = sorted({slug for slug, _ in sets["hue0"]} - {"none"})
    rng = np.random.default_rng(0)  # columns that are in no picture: the planted values in an order of chance
    chance = {f"random {i}": rng.permutation(labels[PLANTED]) for i in range(1000)}
    own = {slug: {name: chance[name] for name in list(chance)[i::len(slugs)]} for i, slug in enumerate(slugs)}
    scores, false = {name: {} for name in sets}, []
    work = [(name, *key, path) for name, networks in sets.items() for key, path in networks.items()]
    with command.bar(len(work), "study", " networks") as bar:
        for name, slug, fold, path in work:
            extra = own.get(slug, {}) if "hue" in name and fold == "fold0" else {}
            groups = 0 if name == "frozen" else GROUPS
            scores[name][slug, fold] = jackknife(np.load(path), {**labels, **extra}, groups)
            if name == "hue0" and extra:  # is what is in no picture said to be clustered by?
                tests = nr_precision(np.load(path), extra, null="hypergeometric", permutations=99)
                false += [test.p_value <= 0.05 for test in tests.values()]
            bar.update()
    scores = {**kept(folder), **{name: networks for name, networks in scores.items() if networks}}
    hues, wholes = ({int(name.removeprefix(kind)): scores[name] for name in scores if name.startswith(kind)}
                    for kind in ("hue", "whole"))
    first = dict(hues[0])
    hues[0].update(scores.get("seeds", {}))
    rows = learned(folder) + order(means(hues[0], labels), table6) + training(hues[0], labels)
    rows += correlations(folder, "hue0", 0, slugs) + dose(hues, labels, chance)
    low, high = stats.binomtest(sum(false), len(false)).proportion_ci()
    rows.append((4, "clustered at random", 0, "", "random", np.mean(false), low, high, "", len(false)))
    rows += outside(folder, "hue0", "hue90", 90, slugs) + taken(rows)
    if "frozen" in scores:
        rows += spread(means(first, labels), means(scores["frozen"], labels), labels)
    if 0 in wholes:  # every conclusion beside that of the same losses above
        same = {share: {key: one for key, one in hues[share].items() if key in networks}
                for share, networks in wholes.items()}
        few = {slug for slug, _ in wholes[0]} - {"none"}
        for kind, name, part in ("whole", "whole", wholes), ("same losses from a block", "hue", same):
            beside = order(means(part[0], labels), table6) + training(part[0], labels)
            beside += dose(part, labels, {}) + correlations(folder, f"{name}0", 0, few)
            beside += outside(folder, f"{name}0", f"{name}90", 90, few)
            rows += [(question, f"{kind}: {what}", *rest) for question, what, *rest in beside]
    return rows, [(name, *key, *row) for name, networks in scores.items() if name.startswith("whole")
                  for key, one in networks.items() for row in ((label, *one[label]) for label in labels)]


def check(folder):
    """Raise ValueError naming a shipped file that is missing or was changed."""
    for line in files.read_text(folder / "SHA256SUMS", "the list of the shipped files").splitlines():
        digest, _, name = line.partition("  ")
        if not (folder / name).is_file():
            problem = "is missing"
        elif files.files_digest([folder / name]) != digest:
            problem = "is not the file that SHA256SUMS lists"
        else:
            continue
        raise ValueError(f"{folder / name} {problem}; restore it: git checkout -- {folder}")


def ship(folder, out):
    """Copy what is worth keeping of study.sh's folder: embeddings as float16, no networks, no disk's path."""
    if (folder / "SHA256SUMS").exists():
        raise ValueError(f"{folder}: what --ship made before; give the folder of study.sh")
    shutil.copytree(folder / "cars_test", out / "cars_test", dirs_exist_ok=True)
    arrays, networks = "results/*/cars_test/*/fold*/", "*/trained/*/*/fold*/"
    patterns = (f"{arrays}*.npy", f"{arrays}*.json", "results/hue0/cars_test/props.csv",
                *(f"results/*/cars_test/{name}.csv" for name in ("masks", "compare", "faithfulness")),
                f"{networks}history.csv", f"{networks}config.json",
                "models/trained/cars_hue0@default/*/fold0/histograms.csv")
    kept = {path for pattern in patterns for path in folder.glob(pattern)}
    same = {path for path in kept if "none" in path.parts and "hue0" not in path.parts and path.stem == "emb"}
    whole = {path for path in kept if path.match("results/whole*/*/*/*/*")}  # 20 MB are the limit
    for path in sorted(kept - same - whole):
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
    if (folder / "answers/jackknife.csv").exists():
        shutil.copyfile(folder / "answers/jackknife.csv", out / "jackknife.csv")
    made = {"SHA256SUMS", "README.md", "answers.csv", "study.png"}
    lines = [f"{files.files_digest([path])}  {path.relative_to(out).as_posix()}\n"
             for path in sorted(out.rglob("*")) if path.is_file() and path.name not in made]
    (out / "SHA256SUMS").write_text("".join(lines))


def draw(rows, folder, path):
    """The picture of docs/study.md: the planted property's response to its dose, all others, some maps."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    above, below = figure.subfigures(2, height_ratios=(3.8, 2))
    left, right = above.subplots(1, 2)
    draw_dose(left, [row for row in rows if row[1] == "change" and row[4] == PLANTED])
    draw_means(right, [row for row in rows if row[1] == "mean change" and row[4] != SEEN])
    draw_maps(below, folder)
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


def draw_maps(figure, folder):
    """The first test car and its saliency maps by networks of shares 0 and 90."""
    from PIL import Image
    pairs = [(name, slug) for slug in ("triplet", "normalized_softmax") for name in ("hue0", "hue90")]
    shown = [(name, slug) for name, slug in [("hue0", "none"), *pairs]
             if (folder / "results" / name / "cars_test" / slug / "fold0" / "maps.npy").exists()]
    panels = figure.subplots(1, 1 + len(shown), squeeze=False)[0]
    panels[0].imshow(Image.open(sorted(folder.glob("cars_test/images/*"))[0]))
    panels[0].set_title("test car", fontsize=9)
    for axes, (name, slug) in zip(panels[1:], shown):
        maps = np.load(folder / "results" / name / "cars_test" / slug / "fold0" / "maps.npy")
        axes.imshow(maps[0].astype(float), cmap="magma", vmin=0, vmax=1)
        title = f"{slug.replace('_', ' ')}\n{name.removeprefix('hue')} %"
        axes.set_title("before training" if slug == "none" else title, fontsize=9)
    for axes in panels:
        axes.set_axis_off()


def main():
    parser = command.parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="examples/study, or study.sh's folder")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for answers.csv and study.png")
    parser.add_argument("--ship", type=Path, metavar="DIR", help="copy what is worth keeping there")
    parser.add_argument("--check", action="store_true", help="compare with SHA256SUMS, as --out does")
    args = parser.parse_args()
    if not (args.check or args.ship or args.out):
        raise ValueError("nothing is asked for; give --out DIR, --check or --ship DIR")
    if args.check or (args.folder / "SHA256SUMS").exists():
        check(args.folder)
    if args.ship:
        ship(args.folder, args.ship)
    if not args.out:
        return
    rows, values = answers(args.folder)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, header, table in (("answers", COLUMNS, rows), ("jackknife", KEPT, values)):
        files.write_table(args.out / f"{name}.csv", header, [
            [f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in table])
    draw(rows, args.folder, args.out / "study.png")


if __name__ == "__main__":
    command.run(main)
