"""Figures of a results folder: the two papers' figures, and their tables at a glance (extra `report`).

    python figures.py results --out figures                                  # whatever the results allow
    python figures.py results/cars --out figures --dataset examples/cars     # with pictures: gallery, samples
    python figures.py results --out figures --only tsne,pairs --network triplet/fold1

Reads:  results/<dataset>/ (or a folder of such) and models/trained/<dataset>/, as the steps leave them
Writes: NAME.svg, NAME.png, NAME.pdf (photographs: no SVG), and figures.json with titles and captions

    profile      NR-Prec of every property, losses as dots (Kobs et al., Table 6); values: of every value
    correlation  the saliency maps' correlation, losses clustered (Table 2); jsd: the same for the divergence
    gallery      saliency maps, a row a network (Fig. 2, Appendix B)
    tsne         embeddings of one network, coloured by property (Fig. 3)
    samples      pictures of a rendered set, a row a property (Fig. 4)
    pairs        inner products, of one network before and after normalising too (Oi et al., Fig. 1, 3)
    training     loss, pair means, JSD, Recall@1, MAP@R against the epoch (Fig. 2, 4)

A figure whose input is missing is left out and named. Same input, same options: the same bytes.
"""
if __name__ == "__main__":  # before matplotlib is imported: Ctrl-C ends in one line from here on
    import sys
    from importlib.util import find_spec
    try:
        from dml_common import command
    except ImportError:
        print("figures.py: the command needs the folder dml_common/ beside it; copy that too",
              file=sys.stderr)
        sys.exit(2)
    command.begin()
    if missing := [name for name in ("matplotlib", "sklearn") if find_spec(name) is None]:
        command.fail(f"{missing[0]} can't be imported, and the figures need it: pip install '.[report]'")

import functools
import io
import json
import re
import textwrap
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

WIDTH, DPI = 5.4, 200  # inches: 9 points are 9 pixels where a figure is shown 400 pixels wide
MARK = 2.576  # the published mark of NR-Prec
CIRCULAR = "rotation|hue|azimuth|heading|orientation"  # names of properties that return to their beginning
# No name is ever taken for a formula (parse_math), and no file depends on the day or a user's matplotlibrc.
styled = matplotlib.style.context(["default", {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "legend.fontsize": 8, "font.family": ["DejaVu Sans"], "text.parse_math": False, "figure.dpi": DPI,
    "svg.hashsalt": "figures.py", "pdf.fonttype": 42, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.6, "lines.linewidth": 0.8, "legend.frameon": False}])
# Okabe and Ito's colours, told apart with every kind of colour blindness; a shape goes with each.
BLUE, VERMILION, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#444444"
MARKERS = list(zip((BLUE, VERMILION, GREEN, "#E69F00", "#CC79A7", "#56B4E9", "#000000"), "o^sDvP*"))
TYPES = {  # of losses: colour, marker, the same as a letter, words
    "ranking": (BLUE, "o", "●", "ranking"), "classification": (VERMILION, "^", "▲", "classification"),
    "other": (GREEN, "D", "◆", "other"), "none": (GREY, "s", "■", "no DML loss")}
PAIRS = {"positive pairs": (VERMILION, "-"), "negative pairs": (BLUE, "--"), "before training": (GREY, ":")}
CURVES = {  # of train.py
    "loss": "loss", "positive_mean": "positive\npairs' mean", "negative_mean": "negative\npairs' mean",
    "jsd": "JSD", "jsd_above": "JSD above\nits null", "recall_at_1": "Recall@1", "map_at_r": "MAP@R"}
VIRIDIS = LinearSegmentedColormap.from_list("dark", matplotlib.colormaps["viridis"](np.linspace(0, 0.93, 64)))
# Dark, blue, light, ochre: lightness against blue-yellow, which no colour blindness takes away.
CIRCLE = LinearSegmentedColormap.from_list("circle", [
    "#1d1d24", "#123f72", "#2a78c2", "#84b3e4", "#c9c9c9", "#d6ad55", "#a97a12", "#5a4210", "#1d1d24"])


def plain(text, most=200):
    """A name as it can be drawn: no control characters, no line breaks, shortened to `most` letters."""
    text = "".join(letter if letter.isprintable() else "\ufffd" for letter in str(text)).strip() or "–"
    text = f"\u2009{text}" if text[0] == "_" else text  # legends leave out what begins with an underscore
    return text if len(text) <= most else text[:most - 1] + "…"


def type_legend(fig, kinds, more=(), loc="outside upper center"):
    """The types that are there, by marker; more: [(Line2D, text) …] after them."""
    entries = [(Line2D([], [], color=colour, marker=marker, ls="", ms=5), text)
               for kind, (colour, marker, _, text) in TYPES.items() if kind in kinds]
    fig.legend(*zip(*entries, *more), loc=loc, ncols=4, handletextpad=0.4, columnspacing=1.2)


@styled
def render(fig, suffix, title=""):
    """The bytes of a figure's png, svg or pdf, without date or version."""
    content, about = io.BytesIO(), {"Title": title, "Creator": "figures.py"}
    about = {"png": {"Software": None}, "svg": about | {"Date": None}, "pdf": about | {"CreationDate": None}}
    fig.savefig(content, format=suffix, metadata=about[suffix])
    return content.getvalue()


png = functools.partial(render, suffix="png")


@styled
def draw_profile(rows, types, properties, means=()):
    """NR-Prec of every property as dots, one a network (Kobs et al., Table 6) -> Figure.

    rows: with network, key (the property), value, low, high (or None), mark ("*": filled); types: {network:
    its type}; properties: names; both in the order drawn. means: rows whose network is a type.
    """
    networks = sorted({row.network for row in rows}, key=list(types).index)
    L, P = len(networks), len(properties)
    places = dict(zip(networks, (np.arange(L) - (L - 1) / 2) * 0.8 / L))  # within a property's strip
    fig = Figure(figsize=(WIDTH, 1.0 + P * (0.2 + 0.024 * L)), layout="constrained")
    ax = fig.add_subplot(xlabel="NR-Prec", ylim=(P - 0.5, -0.5))
    for strip in range(0, P, 2):
        ax.axhspan(strip - 0.5, strip + 0.5, color="#f1f1f1", lw=0, zorder=0)
    for row in means:
        members, colour = [name for name in networks if types[name] == row.network], TYPES[row.network][0]
        if row.low is not None:
            top, bottom = (properties.index(row.key) + places[name] for name in (members[0], members[-1]))
            ax.fill_between([row.low, row.high], top, bottom, color=colour, alpha=0.2, lw=0)
            ax.vlines(row.value, top, bottom, color=colour, lw=1.6)
    for row in rows:
        y, (colour, marker, *_) = properties.index(row.key) + places[row.network], TYPES[types[row.network]]
        if row.low is not None:
            ax.hlines(y, row.low, row.high, color=colour, lw=0.7, alpha=0.45)
        face, edge = (colour, "white") if row.mark == "*" else ("white", colour)
        ax.plot(row.value, y, marker, color=face, ms=3.4, mec=edge, mew=0.5)
    mark = ax.axvline(MARK, color="black", lw=0.8, ls=(0, (4, 2)))
    ax.axvline(0, color="black", lw=0.5)
    if ax.get_xlim()[1] > 10:  # one property often lies far above the others
        ax.set_xscale("function", functions=(lambda x: np.sign(x) * abs(x)**0.5, lambda x: x * abs(x)))
        ticks = [tick for tick in (0, 1, 5, 10, 20, 40, 60, 80, 120, 200, 400) if tick <= ax.get_xlim()[1]]
        ax.set(xticks=ticks, xlabel="NR-Prec, square-root axis")
    ax.set_yticks(range(P), [plain(name) for name in properties])
    ax.tick_params(axis="y", length=0)
    type_legend(fig, [types[name] for name in networks], [(mark, f"published mark {MARK}")])
    return fig


@styled
def draw_heat_map(values, names, kinds=None, tree=None, order=None, text="{:.0f}", ramp="Blues", title=None):
    """A symmetrical table (K, K) as coloured cells with their numbers; nan is grey -> Figure.

    names: K; kinds: K of TYPES, marked beside the names; tree: SciPy's linkage, drawn on the right; order: of
    the rows (the tree's leaves); text: a number's format; ramp: a colour map.
    """
    from scipy.cluster.hierarchy import dendrogram
    K, order = len(names), np.arange(len(names)) if order is None else order
    labels, size = [plain(names[i], 26) for i in order], min(9, 125 / K)  # points
    fig = Figure(figsize=(WIDTH, 0.88 * WIDTH), layout="constrained")
    ax = fig.add_subplot(facecolor="#eeeeee", xlim=(0, K), ylim=(K, 0))
    shown = np.ma.masked_invalid(np.asarray(values, np.float64)[np.ix_(order, order)])  # (K, K)
    mesh = ax.pcolormesh(shown, cmap=ramp, edgecolors="white", linewidth=0.8)
    for i, j in np.argwhere(~np.ma.getmaskarray(shown)):
        light = np.dot(np.array(mesh.to_rgba(shown[i, j])[:3]) ** 2.2, [0.2126, 0.7152, 0.0722])
        ax.text(j + 0.5, i + 0.5, text.format(shown[i, j]), ha="center", va="center", fontsize=size,
                color="white" if light < 0.18 else "black")  # the better contrast
    ax.set_xticks(np.arange(K) + 0.5, labels, rotation=90, fontsize=size)
    ax.set_yticks(np.arange(K) + 0.5, labels, fontsize=size)
    ax.tick_params(length=0, pad=4 if kinds is None else 13)
    ax.spines[:].set_visible(False)
    for place, i in enumerate([] if kinds is None else order):
        colour, _, letter, _ = TYPES[kinds[i]]
        for edge, away in ((0, place + 0.5), (-7, 0)), ((place + 0.5, K), (0, -7)):  # points beside the cells
            ax.annotate(letter, edge, away, textcoords="offset points", color=colour, fontsize=size,
                        ha="center", va="center", annotation_clip=False)
    if tree is not None:
        beside, lowest, top = ax.inset_axes([1.01, 0, 0.13, 1]), tree[0, 2], tree[-1, 2]
        dendrogram(tree, orientation="right", ax=beside, color_threshold=0, above_threshold_color="#555555")
        beside.set(xlim=(max(0, 1.3 * lowest - 0.3 * top), 1.02 * top), ylim=beside.get_ylim()[::-1])
        beside.axis("off")
    if kinds is not None:
        type_legend(fig, kinds, loc="outside lower center")
    fig.suptitle(title, fontsize=9)
    return fig


def heat(saliency_map):
    """A map (H, W) in [0, 1] in colour, uint8 (H, W, 3); nan is grey. Lightness grows evenly."""
    ramp = matplotlib.colormaps["inferno"].with_extremes(bad="#808080")
    return ramp(np.ma.masked_invalid(np.asarray(saliency_map, np.float64)), bytes=True)[..., :3]


@styled
def draw_gallery(rows, kinds=None):
    """Rows of pictures, their names on the left -> Figure.

    rows: [(name, [uint8 (H, W, 3) …], [caption …] or []) …]; kinds: a row's type (or None), marked.
    """
    margin, across = 1.35 if kinds else 1.0, max(len(cells) for _, cells, _ in rows)  # inches
    side = min(0.6, (WIDTH - margin) / across)  # maps are noise, which PNG does not shrink
    tops = np.cumsum([0.05] + [side + (0.15 if captions else 0) for _, _, captions in rows])
    height = tops[-1] + (0.3 if kinds else 0.05)
    fig, cell = Figure(figsize=(WIDTH, height)), (0.95 * side / WIDTH, 0.95 * side / height)
    for (name, cells, captions), kind, top in zip(rows, kinds or [None] * len(rows), tops):
        for j, pixels in enumerate(cells):
            ax = fig.add_axes([(margin + j * side) / WIDTH, 1 - (top + 0.95 * side) / height, *cell])
            ax.imshow(pixels)
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            ax.set_xlabel(plain(captions[j], 11) if captions else "", fontsize=6.5, labelpad=2)
        name, y = "\n".join(textwrap.wrap(plain(name, 42), 16)), 1 - (top + 0.5 * side) / height
        fig.text((margin - (0.19 if kinds else 0.05)) / WIDTH, y, name, ha="right", va="center")
        if kind:
            colour, _, letter, _ = TYPES[kind]
            fig.text((margin - 0.1) / WIDTH, y, letter, color=colour, ha="center", va="center")
    if kinds:
        type_legend(fig, kinds, loc="lower center")
    return fig


def evenly(n, most):
    return np.unique(np.linspace(0, n - 1, min(most, n)).round().astype(int))


def numeric(column):
    """A property's values (n,) as float64; as they are where one is no finite number."""
    try:
        numbers = np.array(column, np.float64)
    except ValueError:
        return column
    return numbers if np.isfinite(numbers).all() else column


def choose_samples(properties, most=10):
    """Of each value of a property the row whose properties are nearest the middle of theirs, by rank.

    properties: {name: str (n,)}; -> {name: ([row …], number of values)}; of more than `most` values a part.
    """
    ranks, away, chosen = {}, 0, {}
    for name, column in properties.items():
        ranks[name] = np.unique(numeric(column), return_inverse=True)[1]
        away = away + abs(ranks[name] / max(1, ranks[name].max()) - 0.5)
    for name, rank in ranks.items():
        n = int(rank.max()) + 1
        chosen[name] = [int(np.where(rank == value, away, np.inf).argmin()) for value in evenly(n, most)], n
    return chosen


def embed_2d(embeddings, seed=0):
    """t-SNE (van der Maaten and Hinton 2008) from the principal components on: (n, m) -> float32 (n, 2)."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits
    tsne = TSNE(perplexity=min(30, (len(embeddings) - 1) / 3), random_state=seed,
                init="pca" if min(embeddings.shape) > 1 else "random")
    with threadpool_limits(1):  # sums of threads in their order of arrival would move the points
        return tsne.fit_transform(embeddings).astype(np.float32)


@styled
def draw_tsne(places, properties, circular=CIRCULAR, across=3):
    """One panel a property: places (n, 2); properties {name: str (n,)} -> Figure.

    Numbers get a sequential colour map, of names like `circular` (a regular expression) a cyclic one; values
    that are names or classes seven colours and shapes, the rest grey.
    """
    look = {"s": 11 if len(places) <= 400 else 5, "rasterized": True, "lw": 0}
    lines = -(-len(properties) // across)
    fig = Figure(figsize=(WIDTH, 0.3 + 2.1 * lines), layout="constrained")
    for k, (name, column) in enumerate(properties.items()):
        ax = fig.add_subplot(lines, across, k + 1, xticks=[], yticks=[])
        ax.set_title(plain(name, 26))
        ax.spines[:].set(visible=True, color="#bbbbbb")
        numbers = numeric(column)
        if numbers.dtype.kind != "f" or re.match(r"(super_)?class\b|label\b|model\b", name):
            scatter_names(ax, places, column, look)
            continue
        low, high, ramp, ticks = numbers.min(), numbers.max(), VIRIDIS, 3
        if re.search(circular, name):  # hues turn round at 1, degrees at 360
            low, high, ramp, ticks = 0, 1 if np.abs(numbers).max() <= 1 else 360, CIRCLE, 5
            numbers = numbers % high
        points = ax.scatter(*places.T, c=numbers, cmap=ramp, vmin=low, vmax=high, **look)
        bar = fig.colorbar(points, cax=ax.inset_axes([0.05, -0.08, 0.9, 0.035]), orientation="horizontal",
                           ticks=np.linspace(low, high, ticks), format="{x:g}")
        bar.ax.tick_params(length=2, pad=1, labelsize=7)
        bar.solids.set_rasterized(True)
    return fig


def scatter_names(ax, places, column, look):
    counts = Counter(sorted(column.tolist())).most_common()
    for (value, _), (colour, marker) in zip(counts, MARKERS):
        ax.scatter(*places[column == value].T, c=colour, marker=marker, label=plain(value, 26), **look)
    if rest := [value for value, _ in counts[len(MARKERS):]]:
        ax.scatter(*places[np.isin(column, rest)].T, c="#cccccc", label=f"{len(rest)} more", zorder=0, **look)
    short = all(len(value) <= 10 for value, _ in counts[:len(MARKERS)])
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2 if short else 1, fontsize=7,
              handletextpad=0.1, columnspacing=0.6, borderpad=0.1, labelspacing=0.2)


def coarser(histograms, most=50):
    """Histograms [(2, bins) …] over [-1, 1] -> (edges, the same in fewer bins, over what they reach)."""
    bins = np.gcd.reduce([one.shape[1] for one in histograms])
    histograms = [one.reshape(2, bins, -1).sum(axis=2) for one in histograms]
    reached = np.flatnonzero(sum(one.sum(axis=0) for one in histograms))
    joined = next(d for d in range(1, bins + 1)
                  if bins % d == 0 and reached[-1] // d - reached[0] // d < most)
    first, last = reached[0] // joined, reached[-1] // joined + 1
    edges = np.linspace(-1, 1, bins // joined + 1)[first:last + 1]
    return edges, [one.reshape(2, -1, joined).sum(axis=2)[:, first:last] for one in histograms]


def draw_histogram(ax, edges, counts, area=True, dotted=False):
    """Positives and negatives of counts (2, bins) in an axes, each divided by its area if so."""
    for heights, (colour, line) in zip(counts, PAIRS.values()):
        if area:
            heights = heights / max(heights.sum() * (edges[1] - edges[0]), 1e-30)
        if not dotted:
            ax.stairs(heights, edges, color=colour, fill=True, alpha=0.25, lw=0)
        ax.stairs(heights, edges, color=colour, lw=0.8 if dotted else 1.1, ls=":" if dotted else line)
    ax.set_xlim(edges[0], edges[-1])
    ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))


@styled
def draw_pair_histograms(panels, counted=True):
    """Inner products of pairs: left as counted, right each of area 1 (Oi et al., Fig. 1) -> Figure.

    panels: dicts with name, positive, negative (counts (bins,) of equal bins over [-1, 1]), positive_mean,
    negative_mean, jsd (None: not written); if known jsd_null, before: [counts (2, bins) before training].
    counted: else three panels a row, of area 1 alone, each on its own scale (Fig. 3).
    """
    counts = []
    for panel in panels:
        counts += [np.stack([panel["positive"], panel["negative"]]), *panel.get("before", [])]
    edges, counts = coarser(counts)
    rest, across = iter(counts), 2 if counted else 3
    lines = len(panels) if counted else -(-len(panels) // across)
    fig = Figure(figsize=(WIDTH, 0.6 + (1.8 if counted else 1.35) * lines), layout="constrained")
    for panel in panels:
        pairs, title = next(rest), [plain(panel["name"], 28)]
        if counted:
            ax = fig.add_subplot(lines, across, len(fig.axes) + 1, ylabel="pairs")
            draw_histogram(ax, edges, pairs, area=False)
            ax.set_title("{}\n{:,.0f} and {:,.0f} pairs".format(*title, *pairs.sum(axis=1)))
            ax.yaxis.set_major_formatter(EngFormatter(sep=""))  # 20k, 1.5M
            title = []
        ax = fig.add_subplot(lines, across, len(fig.axes) + 1, ylabel="density" if counted else "")
        draw_histogram(ax, edges, pairs)
        for _ in panel.get("before", []):
            draw_histogram(ax, edges, next(rest), dotted=True)
        if panel["jsd"] is not None:
            null = panel.get("jsd_null")
            null = "" if null is None else f" (null {null:.3f})"
            title.append(f"JSD {panel['jsd']:.3f}{null} in {len(panel['positive']):,} bins")
        if counted and panel["positive_mean"] is not None:
            title.append("means {positive_mean:.3f}, {negative_mean:.3f}".format(**panel).replace("-", "−"))
        ax.set_title("\n".join(title))
        ax.tick_params(left=counted, labelleft=counted)
    names = list(PAIRS)[:3 if len(counts) > len(panels) else 2]
    handles = [Line2D([], [], color=PAIRS[name][0], ls=PAIRS[name][1], lw=1.3) for name in names]
    fig.legend(handles, names, loc="outside upper center", ncols=3)
    fig.supxlabel("inner product", fontsize=9)
    return fig


@styled
def draw_class_curves(curves, numbers):
    """Metrics against the number of classes, a row an embedding: left the mean and standard deviation over
    random subsets of the classes, right the mean relative to the fewest classes -> Figure.

    curves: [(name, {metric: (means, standard deviations) of numbers of classes}) …]; numbers: ascending. What
    is called … permuted is a chance level and has no place on the right.
    """
    fig = Figure(figsize=(WIDTH, 0.5 + 1.8 * len(curves)), layout="constrained")
    axes = fig.subplots(len(curves), 2, sharex=True, squeeze=False)
    for (left, right), (name, metrics) in zip(axes, curves):
        for (colour, marker), (metric, (means, spread)) in zip(MARKERS, metrics.items()):
            look = {"color": colour, "marker": marker, "ms": 3.5, "lw": 1.1, "label": plain(metric)}
            left.errorbar(numbers, means, spread, elinewidth=0.8, **look)
            if means[0] > 0 and not metric.endswith("permuted"):
                right.plot(numbers, np.divide(means, means[0]), **look)
        left.set(title=plain(name, 36), ylabel="mean ± s.d.")
        right.set_title("relative to the fewest classes")
        for ax in left, right:
            ax.set(xscale="log", ylim=(0, max(1.05, ax.get_ylim()[1])))
            ax.set_xticks(numbers, [f"{number:,}" for number in numbers])
            ax.minorticks_off()
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    fig.supxlabel("classes", fontsize=9)
    return fig


@styled
def draw_training(rows, types, chosen):
    """A row a measure, a column a part of the pictures; the chosen network in black with its range -> Figure.

    rows: with network, key (of CURVES), part, epoch (of the part test 0 and "best"), value, low, high;
    types: {network: one of TYPES}. Losses' values have no common scale: the chosen one's is drawn alone.
    """
    curves = defaultdict(list)
    for row in rows:
        if row.network == chosen or row.key != "loss":
            epoch = 1 if row.epoch == "best" else row.epoch
            curves[row.key, row.part, row.network].append((epoch, row.value, row.low, row.high))
    measured, parts, _ = map(dict.fromkeys, zip(*curves))
    keys, parts = [key for key in CURVES if key in measured], list(parts)
    fig = Figure(figsize=(WIDTH, 0.9 + 1.15 * len(keys)), layout="constrained")
    axes = fig.subplots(len(keys), len(parts), sharey="row", sharex="col", squeeze=False,
                        width_ratios=[0.45 if part == "test" else 1 for part in parts])
    for (key, part, name), curve in curves.items():
        ax, (colour, marker, *_) = axes[keys.index(key), parts.index(part)], TYPES[types[name]]
        epochs, mean, low, high = np.array(curve, np.float64).T
        if name == chosen:
            ax.fill_between(epochs, low, high, color="black", alpha=0.18, lw=0)
            ax.plot(epochs, mean, color="black", lw=1.8, zorder=3)
        else:
            ax.plot(epochs, mean, color=colour, lw=0.7, alpha=0.8, marker=marker, ms=2.5, markevery=[-1])
        ax.set_ylabel(CURVES[key] if part == parts[0] else "")
    for part, first, last in zip(parts, axes[0], axes[-1]):
        first.set_title(plain(part))
        last.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        last.set_xlabel("" if part == "test" else "epoch")
        if part == "test":
            last.set(xlim=(-0.35, 1.35), xticks=[0, 1], xticklabels=["before", "after"])
    line = Line2D([], [], color="black", lw=1.8)
    type_legend(fig, {types[name] for _, _, name in curves if name != chosen}, [(line, plain(chosen, 26))])
    return fig


# Each yields (name, facts of its title and caption, Figure), or nothing where its input is missing.


def make_profile(one, dataset, args):
    rows = one.select("nr_precision", fold="mean")
    if not rows:
        return
    options, tested = one.tables["nrprec"][0], rows[0].note == "tested"
    facts = {"test": "p_holm < 0.01 in every fold by permutation" if tested else f"a mean beyond {MARK}",
             "folds": max(row.n for row in rows), "networks": ", ".join(one.names("nr_precision")),
             "distance": options.get("distance"), "null": options.get("null"), "what": "Which properties"}
    means = {row.key: row.value for row in one.select("nr_precision", "all")}
    properties, means = sorted(means, key=means.get, reverse=True), one.select("nr_precision", "type")
    yield "profile", facts, draw_profile(rows, one.types, properties, means)
    keys, rows, means = one.keys("values"), one.select("values", fold="mean"), one.select("values", "type")
    names = dict.fromkeys(key.split(" = ")[0] for key in keys)  # of nrprec.py --per-value
    for number, name in enumerate(names, 1):
        values = [key for key in keys if key.startswith(f"{name} = ")]
        fig = draw_profile([row for row in rows if row.key in values], one.types, values,
                           [row for row in means if row.key in values])
        yield f"values_{number}", {**facts, "what": f"Which values of {name}"}, fig


def make_heat_map(one, dataset, args, measure="correlation", ramp="Blues"):
    from dml_common import results
    names = one.names(measure)
    values = 100 * one.matrix(measure, names)
    np.fill_diagonal(values, np.nan)  # two folds of one network
    if np.isfinite(values).any():
        tree, order = results.cluster(100 - values if measure == "correlation" else values)
        ceiling = one.cells("ceiling", "all").get(("all", "all"))
        facts = {"what": "Correlation" if measure == "correlation" else "Jensen-Shannon divergence (base 2)",
                 "folds": max(row.n for row in one.select(measure, fold="mean")),
                 "pictures": max(row.n for row in one.select(measure) if row.fold != "mean"),
                 "ceiling": f"{100 * ceiling.value:.0f}" if ceiling else "unknown (saliency.py --ceiling)"}
        text, kinds = "{:.1f}" if np.nanmax(values) < 10 else "{:.0f}", [one.types[name] for name in names]
        yield measure, facts, draw_heat_map(values, names, kinds, tree, order, text, ramp)


def make_gallery(one, dataset, args):
    from dml_common import folders, pictures
    networks = [network for network in one.networks if network["maps"]]
    if not networks or dataset is None:
        return
    folds = Counter(network["folder"].name for network in matching(networks, args.network) or networks)
    fold = folds.most_common(1)[0][0]
    networks = [network for network in networks if network["folder"].name == fold]
    first, where = networks[0]["maps"], dict(zip(dataset.relative, dataset.paths))
    names = folders.picture_names(first, len(first["array"]), dataset) or ["?"]
    if not set(names) <= set(where):
        raise ValueError(f"{first['path']}: its pictures are not in {dataset.folder}; give --dataset theirs")
    rows, kinds = evenly(len(names), args.pictures), [None, *(network["type"] for network in networks)]
    for page, chosen in enumerate(np.array_split(rows, -(-len(rows) // 6)), 1):
        cells = [pictures.load_pixels(where[names[row]], first["preprocessing"]) for row in chosen]
        lines = [("picture", cells, [Path(names[row]).stem for row in chosen])]
        for network in networks:
            maps, shape = network["maps"]["array"][chosen], network["maps"]["array"].shape
            if shape != first["array"].shape or (maps < 0).any() or (maps > 1).any():
                raise ValueError(f"{network['maps']['path']}: maps {shape} in [{np.nanmin(maps):g}, "
                                 f"{np.nanmax(maps):g}]; expected {first['array'].shape} in [0, 1]")
            lines.append((network["name"], [heat(one) for one in maps], []))
        facts = {"shown": len(chosen), "pictures": len(names), "fold": fold, "page": page}
        yield "gallery" if page == 1 else f"gallery_{page}", facts, draw_gallery(lines, kinds)


def make_tsne(one, dataset, args):
    from dml_common import files, folders
    network = next((network for network in matching(one.networks, args.network) if network["emb"]), None)
    array, properties = network["emb"]["array"] if network else [], {}
    if len(array) >= 4:
        path = network["emb"]["path"]
        properties = folders.row_properties(path, len(array), files.picture_names(path))
    if properties:
        name, panels, n = network["name"], {}, min(args.points, len(array))
        rows = np.sort(np.random.default_rng(args.seed).choice(len(array), n, replace=False))
        scores = one.select("nr_precision", network=name, fold=network["fold"], seed=network["seed"])
        scores = {row.key: f" ({row.value:.1f})".replace("-", "−") for row in scores}
        for title, column in properties.items():
            panels[plain(title, 18) + scores.get(title, "")] = column[rows]
        places = embed_2d(np.asarray(array[rows], np.float32), args.seed)
        facts = {"shown": n, "n": len(array), "name": name, "fold": network["folder"].name, "seed": args.seed}
        yield "tsne", facts, draw_tsne(places, panels, args.circular)


def make_samples(one, dataset, args):
    from dml_common import files, pictures
    if dataset and dataset.properties:
        table = pictures.properties_table(dataset.folder)
        properties, rows = files.read_properties(table, None, dataset.relative, missing=files.MISSING), []
        for name, (members, n) in choose_samples(properties).items():
            cells = [np.asarray(pictures.read_rgb(dataset.paths[row])) for row in members]
            part = "" if n == len(members) else f" ({len(members)} of {n} values)"
            rows.append((name + part, cells, properties[name][members].tolist()))
        yield "samples", {"pictures": len(dataset.paths)}, draw_gallery(rows)


def make_pairs(one, dataset, args):
    from dml_common import results
    asked, panels = matching(one.networks, args.network), []
    label, counts = results.pair_histograms(one.folder, asked)
    chosen = asked[0] if len(asked) == 1 else {"fold": "mean", "seed": None, "folder": Path("all folds")}
    for name, ((positive, negative), *before) in counts.items():
        panel = {"name": f"{TYPES[one.types[name]][2]} {name}", "positive": positive, "negative": negative,
                 "before": before, "jsd": None, "positive_mean": None, "negative_mean": None}
        for row in one.select("pairs", network=name, fold=chosen["fold"], seed=chosen["seed"]):
            panel[row.key] = row.value
        panels.append(panel)
    if panels:
        facts = {"label": label, "place": chosen["folder"].name}
        yield "pairs", facts, draw_pair_histograms(panels, counted=len(panels) < 4)


def make_training(one, dataset, args):
    rows = [row for row in one.select("training", fold="mean") if row.key in CURVES]
    if any(row.key == "jsd_above" for row in rows):  # histories of an older train.py have no jsd_null
        rows = [row for row in rows if row.key != "jsd"]
    if any(row.epoch for row in rows):
        names = [network["name"] for network in matching(one.networks, args.network) if network["history"]]
        chosen = next(iter(names), rows[0].network)
        facts = {"chosen": chosen, "folds": max(row.n for row in rows)}
        yield "training", facts, draw_training(rows, one.types, chosen)


def matching(networks, wanted):
    """The networks of --network SLUG or SLUG/FOLD; all without it."""
    return [network for network in networks if wanted in (
        None, network["slug"], network["name"], f"{network['slug']}/{network['folder'].name}")]


COMPARED = ("compare.csv (compare.py)", "{what} of different losses' saliency maps",
            "In per cent, mean over {pictures:.0f} pictures in each of {folds} folds. Blue: alike. Tree: "
            "average linkage. The maps' own noise allows a correlation of {ceiling} on average.")
FIGURES = {  # how it is made, what it needs, its title, its caption
    "profile": (
        make_profile, "nrprec.csv (nrprec.py)", "{what} the embeddings cluster by",
        "NR-Prec: means over {folds} folds, their range (of one fold: the 95 % interval over its queries). "
        "Strokes: a type's mean, Student's 95 % interval over losses. Filled: above chance, {test}. Dashed: "
        "the published mark, one z-score's 1 % threshold. Distance {distance}, null {null}. {networks}."),
    "correlation": (make_heat_map, *COMPARED),
    "jsd": (functools.partial(make_heat_map, measure="jsd", ramp="Blues_r"), *COMPARED),
    "gallery": (
        make_gallery, "maps.npy (saliency.py), pictures (--dataset)", "What each network looks at ({page})",
        "SmoothGrad maps of {shown} of {pictures} pictures, {fold}; light: the most influence."),
    "tsne": (
        make_tsne, "emb.npy (embed.py), properties or classes beside it", "Embeddings of {name} by property",
        "t-SNE (seed {seed}) of {shown:,} of {n:,} embeddings of {name}, {fold}; in brackets NR-Prec."),
    "samples": (
        make_samples, "a rendered set: props.csv, images/ (--dataset)", "Pictures of the rendered set",
        "A row a property: of {pictures:,} pictures one of each value, whose properties are the middlemost."),
    "pairs": (
        make_pairs, "histograms.csv (pairs.py --histograms)", "Pairs of the same and of different {label}",
        "Inner products of l2-normalised embeddings of one {label} (positive) or two (negative), {place}; "
        "JSD: mean of the folds. ● ranking, ▲ classification, ◆ other, ■ no DML loss."),
    "training": (
        make_training, "history.csv (train.py; --models)", "Training: {chosen} among the other losses",
        "Thick: {chosen}, mean and range of {folds} folds; thin: other means. Epoch 0: before training.")}


def main(argv=None):
    from dml_common import command, files, folders, results

    parser = command.parser(__doc__)
    add = parser.add_argument
    add("results", type=Path, metavar="RESULTS", help="results/, with data sets' folders, or one of these")
    add("--out", type=Path, required=True, metavar="DIR", help="where the figures go; made if not there")
    add("--dataset", action="append", default=[], metavar="FOLDER",
        help="the pictures: a folder, a CSV file, cars196, cub200 or sop; again for each data set")
    add("--data-root", metavar="DIR", help="folder of the published data sets (DML_DATA_ROOT, else data/)")
    add("--models", type=Path, default=files.ROOT / "models", metavar="DIR", help="with trained/ (models/)")
    add("--only", default=",".join(FIGURES), metavar="NAMES", help="these figures alone, with commas (all)")
    add("--network", metavar="SLUG/FOLD", help="gallery, tsne, pairs, training of triplet/fold0 (the first)")
    add("--circular", default=CIRCULAR, metavar="REGEX", help=f"properties without an end ({CIRCULAR})")
    add("--points", type=int, default=1000, metavar="N", help="embeddings in the t-SNE, at random (1000)")
    add("--pictures", type=int, default=12, metavar="N", help="in the gallery, six a page (12)")
    add("--seed", type=int, default=0, metavar="N", help="of the t-SNE (0)")
    args = parser.parse_args(argv)
    note = functools.cache(command.say)  # each glyph that the font lacks once
    warnings.showwarning = lambda message, *_: note(f"note: {message}")
    only = [name.strip() for name in args.only.split(",")]
    if unknown := [name for name in only if name not in FIGURES]:
        raise ValueError(f"--only {unknown[0]}: expected names among {', '.join(FIGURES)}")
    command.at_least(args, points=4, pictures=1, seed=0)
    everything = results.read_all(args.results, args.models)
    datasets = folders.open_pictures(args.dataset, args.data_root, [one.name for one in everything])
    networks = [network for one in everything for network in one.networks]
    if args.network and not matching(networks, args.network):
        known = ", ".join(f"{network['slug']}/{network['folder'].name}" for network in networks[:15])
        raise ValueError(f"--network {args.network}: no such network; there are {known or 'none'}")
    folders.make_folder(args.out, "figures.json")
    done, missing = [], []
    for one in everything:
        broken = [gap["what"] for gap in one.missing if "left out" in gap["what"]]  # arrays
        missing += [{"dataset": one.name, "figure": "", "what": what} for what in broken]
        for figure in [name for name in FIGURES if name in only]:
            make, needs, title, caption = FIGURES[figure]
            suffixes = ("png", "pdf") if figure in ("gallery", "samples") else ("png", "pdf", "svg")
            drawn = list(make(one, datasets.get(one.name), args))
            for part, facts, fig in drawn:
                name, heading = f"{part}_{one.name}", title.format(**facts)
                for suffix in suffixes:
                    files.write_file(args.out / f"{name}.{suffix}", render(fig, suffix, plain(heading)))
                done.append({"name": name, "title": heading, "caption": caption.format(**facts),
                             "dataset": one.name, "svg": f"{name}.svg" if "svg" in suffixes else None,
                             "png": f"{name}.png"})
                print(f"{args.out / name}.png  {heading}", flush=True)
            if not drawn:
                missing.append({"dataset": one.name, "figure": figure, "what": f"{figure} needs {needs}"})
    content = json.dumps({"figures": done, "missing": missing}, indent=1, ensure_ascii=False) + "\n"
    files.write_file(args.out / "figures.json", content.encode())
    for gap in missing:
        command.say(f"left out, {gap['dataset']}: {gap['what']}")


if __name__ == "__main__":
    command.run(main, stopped="stopped")
