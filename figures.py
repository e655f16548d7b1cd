"""Figures of what a results folder holds: the two papers' figures, and their tables at a glance (extra `report`).

    python figures.py results --out figures                                  # whatever the results allow
    python figures.py results/cars --out figures --dataset examples/cars     # with pictures: gallery, samples
    python figures.py results --out figures --only profile,correlation
    python figures.py results --out figures --only tsne --network triplet/fold1

Reads:  results/<dataset>/ (or a folder of such): nrprec.csv, compare.csv, pairs.csv, histograms.csv, and each
        network's <loss>/fold<k>/ with emb.npy, maps.npy, their JSONs, labels.csv, props.csv; of the training
        history.csv and histograms.csv in models/trained/<dataset>/<loss>/fold<k>/
Writes: NAME.svg, NAME.png and NAME.pdf for each figure (photographs: no SVG), and figures.json with titles and captions

    profile      NR-Prec of every property, losses as dots (Kobs et al., Table 6)
    correlation  heat map of the saliency maps' correlation, losses clustered (Table 2); jsd: the same for the divergence
    gallery      saliency maps, a row a network (Fig. 2, Appendix B)
    tsne         embeddings of one network, coloured by property (Fig. 3)
    samples      pictures of a rendered set, a row a property (Fig. 4)
    pairs        histograms of inner products, before and after normalising and training (Oi et al., Fig. 1, 3)
    training     loss, pair means, JSD, Recall@1, MAP@R against the epoch (Fig. 2, 4)

A figure whose input is missing is left out and named. Same input, same options: the same files, byte for byte.
In Python every draw_ function takes plain arrays and returns a matplotlib Figure; png() makes a file's bytes of it.
"""
import argparse
import importlib.util
import io
import itertools
import json
import os
import re
import sys
import textwrap
import warnings
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import style
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, MaxNLocator

try:
    from dml_common import files, pictures as data, results
except ModuleNotFoundError:
    pass  # the drawing functions stand alone

HERE = Path(__file__).resolve().parent
FIGURES = ("profile", "correlation", "jsd", "gallery", "tsne", "samples", "pairs", "training")
MARK = 2.576   # the published mark of NR-Prec
DASHES = (0, (4, 2))
MOST_PAIRED = 20_000  # embeddings whose pairs are counted here; above, pairs.py --histograms does it
# Round the circle dark, blue, light, ochre: lightness against blue-yellow, the two axes that no colour blindness takes away.
CIRCLE = ("#1d1d24", "#123f72", "#2a78c2", "#84b3e4", "#c9c9c9", "#d6ad55", "#a97a12", "#5a4210", "#1d1d24")
WIDTH = 5.4    # inches of every figure: 9 points are 9 pixels where it is shown 400 pixels wide
DPI = 200
# No name is ever taken for a formula (parse_math), and no file depends on the day or a user's matplotlibrc.
STYLE = ["default", {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "legend.fontsize": 8, "font.family": ["DejaVu Sans"], "text.parse_math": False, "svg.hashsalt": "figures.py",
    "svg.fonttype": "path", "pdf.fonttype": 42, "axes.spines.top": False, "axes.spines.right": False,
    "axes.linewidth": 0.6, "legend.frameon": False, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
    "savefig.dpi": DPI, "figure.dpi": DPI}]
styled = style.context(STYLE)  # as a decorator

# Okabe and Ito's colours, told apart with every kind of colour blindness; a shape goes with each.
BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE, GREY = "#56B4E9", "#CC79A7", "#444444"
MARKERS = list(zip((BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, "#000000"), "o^sDvP*"))
TYPES = {  # of losses: colour, marker, the same as a letter, words
    "ranking": (BLUE, "o", "●", "ranking loss"), "classification": (VERMILION, "^", "▲", "classification loss"),
    "none": (GREY, "s", "■", "no DML loss"), "other": (GREEN, "D", "◆", "other")}
PAIRS = {"positive": (VERMILION, "-"), "negative": (BLUE, (0, (3, 1.2)))}  # of pictures: colour, line
# Lightness grows evenly, as in saliency.py.
HEAT = np.array([[0, 0, 4], [31, 12, 72], [85, 15, 109], [136, 34, 106], [186, 54, 85], [227, 89, 51],
                 [249, 142, 9], [249, 203, 53], [252, 255, 164]], dtype=np.float64)


# ---------------------------------------------------------------- what every figure needs


def plain(text, most=200):
    """A name as it can be drawn: no control characters, no line breaks, shortened to `most` letters."""
    text = "".join(letter if letter.isprintable() else "\ufffd" for letter in str(text)).strip() or "–"
    text = f"\u2009{text}" if text[0] == "_" else text  # legends leave out what begins with an underscore
    return text if len(text) <= most else text[:most - 1] + "…"


def type_legend(fig, kinds, more=(), **place):
    """The types that are there, by marker; more: [(Line2D, text) …] after them."""
    entries = [(Line2D([], [], color=colour, marker=marker, linestyle="", markersize=5), text)
               for kind, (colour, marker, _, text) in TYPES.items() if kind in kinds]
    handles, texts = zip(*entries, *more)
    fig.legend(handles, texts, **{"handletextpad": 0.4, "columnspacing": 1.2, "ncols": 4, **place})


@styled
def png(fig):
    """The PNG file of a figure, without date or version: equal figures are equal bytes."""
    content = io.BytesIO()
    fig.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


# ---------------------------------------------------------------- heat maps


def cluster(distances):
    """Average linkage of a symmetrical matrix (K, K) -> (linkage, leaf order), or (None, 0 … K - 1) where a pair is nan."""
    from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering

    pairs = distances[np.triu_indices(len(distances), 1)]
    if len(distances) < 3 or not np.isfinite(pairs).all():
        return None, np.arange(len(distances))
    pairs = np.maximum(pairs, 0)  # 1 - r of two equal maps may be a rounding below
    tree = optimal_leaf_ordering(linkage(pairs, "average"), pairs)
    return tree, leaves_list(tree)


@styled
def draw_heat_map(values, names, kinds=None, tree=None, order=None, text="{:.0f}", ramp="Blues", title=None):
    """A symmetrical table as coloured cells with their numbers; nan is grey, on the diagonal empty -> Figure.

    values (K, K); names: K; kinds: K of TYPES, marked beside the names; tree: SciPy's linkage, drawn on the
    right; order: the rows as they are drawn (the tree's leaves); text: a number's format; ramp: a colour map.
    """
    from scipy.cluster.hierarchy import dendrogram

    K, order = len(names), np.arange(len(names)) if order is None else order
    labels = [plain(names[i], 26) for i in order]
    fig = Figure(figsize=(WIDTH, 0.88 * WIDTH), layout="constrained")
    ax = fig.add_subplot(facecolor="#d9d9d9")
    shown = np.ma.masked_invalid(np.asarray(values, np.float64)[np.ix_(order, order)])  # (K, K)
    low, high = (shown.min(), shown.max()) if shown.count() else (0, 1)
    mesh = ax.pcolormesh(shown, cmap=ramp, vmin=low, vmax=high if high > low else low + 1, edgecolors="white",
                         linewidth=0.8)
    size = min(9, 140 / K)  # points
    for i, j in np.argwhere(~shown.mask):
        light = np.dot(np.array(mesh.to_rgba(shown[i, j])[:3]) ** 2.2, [0.2126, 0.7152, 0.0722])
        ax.text(j + 0.5, i + 0.5, text.format(shown[i, j]), ha="center", va="center", fontsize=size,
                color="white" if light < 0.18 else "black")  # the better contrast
    for i in np.flatnonzero(np.diag(np.ma.getmaskarray(shown))):
        ax.add_patch(Rectangle((i, i), 1, 1, color="white", linewidth=0))
    ax.set(xlim=(0, K), ylim=(K, 0))
    ax.set_xticks(np.arange(K) + 0.5, labels, rotation=90, fontsize=min(9, 160 / K))
    ax.set_yticks(np.arange(K) + 0.5, labels, fontsize=min(9, 160 / K))
    ax.tick_params(length=0, pad=4 if kinds is None else 13)
    ax.spines[:].set_visible(False)
    for place, i in enumerate(order if kinds is not None else []):
        colour, _, letter, _ = TYPES[kinds[i]]
        for edge, away in ((0, place + 0.5), (-7, 0)), ((place + 0.5, K), (0, -7)):  # points beside the cells
            ax.annotate(letter, edge, away, textcoords="offset points", color=colour, ha="center", va="center",
                        fontsize=size, annotation_clip=False)
    if tree is not None:
        beside = ax.inset_axes([1.01, 0, 0.13, 1])
        dendrogram(tree, orientation="right", ax=beside, color_threshold=0, above_threshold_color="#555555",
                   no_labels=True)
        lowest, top = tree[0, 2], tree[-1, 2]
        beside.set(xlim=(max(0, lowest - 0.3 * (top - lowest)), 1.002 * top), ylim=beside.get_ylim()[::-1])
        beside.axis("off")
        beside.collections[0].set_linewidth(0.8)
    if kinds is not None:
        type_legend(fig, kinds, loc="outside lower center")
    if title:
        fig.suptitle(title, fontsize=9)
    return fig


def heat(saliency_map):
    """A map (H, W) in [0, 1] in colour, uint8 (H, W, 3); nan is grey."""
    known = np.isfinite(saliency_map)
    position = np.where(known, saliency_map, 0).astype(np.float64) * (len(HEAT) - 1)
    colours = np.stack([np.interp(position, range(len(HEAT)), channel) for channel in HEAT.T], axis=-1)
    colours[~known] = 128
    return colours.round().astype(np.uint8)


# ---------------------------------------------------------------- pairs


def coarser(histograms, most=50):
    """What is drawn of histograms, a list of (2, bins) over [-1, 1]: (edges, the same with equally many, fewer bins).

    Neighbouring bins are joined until at most `most` cover what any of the histograms reaches; the rest is cut off.
    """
    bins = np.gcd.reduce([one.shape[1] for one in histograms])
    histograms = [one.reshape(2, bins, -1).sum(axis=2) for one in histograms]
    reached = np.flatnonzero(sum(one.sum(axis=0) for one in histograms))
    joined = next(d for d in range(1, bins + 1) if bins % d == 0 and reached[-1] // d - reached[0] // d < most)
    first, last = reached[0] // joined, reached[-1] // joined + 1
    edges = np.linspace(-1, 1, bins // joined + 1)[first:last + 1]
    return edges, [one.reshape(2, -1, joined).sum(axis=2)[:, first:last] for one in histograms]


def draw_histogram(ax, edges, counts, area=True, before=None):
    """Positives and negatives of counts (2, bins), each divided by its area if so; before: the same, dotted."""
    for k, (colour, line) in enumerate(PAIRS.values()):
        heights, *dotted = [one[k] / max(one[k].sum() * (edges[1] - edges[0]), 1e-30) if area else one[k]
                            for one in (counts, before) if one is not None]
        ax.stairs(heights, edges, color=colour, fill=True, alpha=0.25, linewidth=0)
        ax.stairs(heights, edges, color=colour, linewidth=1.1, linestyle=line)
        for heights in dotted:
            ax.stairs(heights, edges, color=colour, linewidth=0.8, linestyle=":")
    ax.set(xlim=(edges[0], edges[-1]), ylim=(0, None))
    ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))


def pair_legend(fig, more=()):
    lines = [(f"{name} pairs", *look) for name, look in PAIRS.items()] + list(more)
    fig.legend([Line2D([], [], color=colour, linestyle=line, linewidth=1.3) for _, colour, line in lines],
               [text for text, _, _ in lines], loc="outside upper center", ncols=3)


@styled
def draw_pair_histograms(panels):
    """Inner products of pairs, a row a network: left as counted, right each normalised to area 1 (Oi et al., Fig. 1).

    panels: dicts with name, positive, negative (int counts (bins,) of equal bins over [-1, 1]), positive_mean,
    negative_mean, jsd (None: not written). -> Figure
    """
    edges, histograms = coarser([np.stack([panel[name] for name in PAIRS]) for panel in panels])
    fig = Figure(figsize=(WIDTH, 0.5 + 1.8 * len(panels)), layout="constrained")
    axes = fig.subplots(len(panels), 2, sharex=True, squeeze=False)
    for (left, right), panel, counts in zip(axes, panels, histograms):
        draw_histogram(left, edges, counts, area=False)
        draw_histogram(right, edges, counts)
        positive, negative = counts.sum(axis=1)
        left.set_title(f"{plain(panel['name'], 36)}\n{positive:,} positive, {negative:,} negative", loc="left")
        score = "" if panel["jsd"] is None else f"JSD {panel['jsd']:.3f} in {len(panel['positive']):,} bins"
        if panel["positive_mean"] is not None:
            score += f"\nmeans {panel['positive_mean']:.3f} and {panel['negative_mean']:.3f}".replace("-", "−")
        right.set_title(score, loc="left")
        left.set_ylabel("pairs")
        left.yaxis.set_major_formatter(EngFormatter(sep=""))  # 20k, 1.5M
        right.set_ylabel("density")
    for ax in axes[-1]:
        ax.set_xlabel("inner product")
    pair_legend(fig)
    return fig


@styled
def draw_class_curves(curves, numbers):
    """Do metrics depend on how many classes there are? A row an embedding: left each metric's mean and standard
    deviation over random subsets of the classes, right its mean relative to the fewest classes -> Figure.

    curves: [(name, {metric: [values of the subsets of numbers[0] classes, …]}) …]; numbers: ascending.
    A metric called … permuted is a chance level and has no place on the right.
    """
    fig = Figure(figsize=(WIDTH, 0.5 + 1.8 * len(curves)), layout="constrained")
    axes = fig.subplots(len(curves), 2, sharex=True, squeeze=False)
    for (left, right), (name, metrics) in zip(axes, curves):
        for (colour, marker), (metric, subsets) in zip(MARKERS, metrics.items()):
            means = np.array([np.mean(values) for values in subsets])  # (numbers,)
            look = {"color": colour, "marker": marker, "markersize": 3.5, "linewidth": 1.1, "label": plain(metric)}
            left.errorbar(numbers, means, [np.std(values) for values in subsets], elinewidth=0.8, **look)
            if means[0] > 0 and not metric.endswith("permuted"):
                right.plot(numbers, means / means[0], **look)
        left.set_title(plain(name, 36), loc="left")
        left.set_ylabel("mean ± s.d.")
        right.set_title("relative to the fewest classes", loc="left")
        for ax in left, right:
            ax.set(xscale="log", ylim=(0, max(1.05, ax.get_ylim()[1])))
            ax.set_xticks(numbers, [f"{number:,}" for number in numbers])
            ax.minorticks_off()
    for ax in axes[-1]:
        ax.set_xlabel("classes")
    fig.legend(handles=axes[0, 0].get_legend_handles_labels()[0], loc="outside upper center", ncols=4)
    return fig


class Missing(Exception):
    """What a figure needs is not there: the figure is left out."""


# ---------------------------------------------------------------- profile, heat maps


def draw_profile(values, low, high, properties, kinds, clear=None):
    """NR-Prec of every property as dots, one a loss; properties in the order of their mean, losses apart by type.

    values, low, high: (L, P), a loss's mean and the ends of its whisker (nan: none); properties: P names;
    kinds: L of TYPES. clear: bool (L, P), above chance by a test; the others' dots are hollow. A type of two or more losses has a bar: its mean with Student's 95 % interval over the losses.
    """
    shown = [kind for kind in TYPES if kind in kinds]
    order = np.argsort(-np.nan_to_num(np.nanmean(values, axis=0), nan=-np.inf), kind="stable")
    step = 0.8 / len(shown)
    fig = Figure(figsize=(WIDTH, 1.0 + len(properties) * (0.16 + 0.13 * len(shown))), layout="constrained")
    ax = fig.add_subplot()
    for row, k in enumerate(order):
        if row % 2 == 0:
            ax.axhspan(row - 0.5, row + 0.5, color="#f1f1f1", linewidth=0, zorder=0)
        for place, kind in enumerate(shown):
            members = [i for i, one in enumerate(kinds) if one == kind and np.isfinite(values[i, k])]
            y = row + (place - (len(shown) - 1) / 2) * step
            full = np.ones(len(members), bool) if clear is None else clear[members, k]
            draw_dots(ax, values[members, k], low[members, k], high[members, k], full, y, step, kind)
    ax.axvline(MARK, color="black", linewidth=0.8, linestyle=DASHES)
    ax.axvline(0, color="black", linewidth=0.5)
    least, most = min(0, np.nanmin(low)), max(MARK, np.nanmax(high))
    if most > 10:  # one property often lies far above the others
        ax.set_xscale("function", functions=(lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * x ** 2))
        ax.set_xticks([tick for tick in (0, 1, 5, 10, 20, 40, 60, 80, 120, 200, 400) if tick <= most])
    ax.set(ylim=(len(properties) - 0.5, -0.5), xlim=(least - 0.04 * min(most, 5), 1.04 * most), xlabel="NR-Prec")
    ax.set_yticks(range(len(properties)), [plain(properties[k]) for k in order])
    ax.tick_params(axis="y", length=0)
    handles = [*type_handles(shown), Line2D([], [], color="black", linewidth=0.8, linestyle=DASHES)]
    fig.legend(handles, [TYPES[kind][3] for kind in shown] + [f"published mark {MARK}"], loc="outside upper center",
               ncols=min(4, len(handles)), handletextpad=0.4, columnspacing=1.2)
    return fig


def draw_dots(ax, x, low, high, full, y, step, kind):
    """One type's losses of one property, at heights round y, hollow where not full; of two or more the mean and Student's 95 % interval."""
    from scipy.stats import t

    colour, marker = TYPES[kind][:2]
    heights = y + (np.linspace(-0.3, 0.3, len(x)) * step if len(x) > 1 else np.zeros(len(x)))
    ax.hlines(heights, low, high, color=colour, linewidth=0.7, alpha=0.45)
    if full.any():
        ax.plot(x[full], heights[full], marker, color=colour, markersize=3.6, markeredgecolor="white", markeredgewidth=0.3)
    if not full.all():
        ax.plot(x[~full], heights[~full], marker, color="white", markersize=3.2, markeredgecolor=colour, markeredgewidth=0.6)
    if len(x) > 1:
        half = t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
        ax.hlines(y, x.mean() - half, x.mean() + half, color=colour, linewidth=4, alpha=0.3, zorder=1)
        ax.vlines(x.mean(), y - 0.42 * step, y + 0.42 * step, color=colour, linewidth=1.6)


def type_handles(kinds):
    return [Line2D([], [], color=TYPES[kind][0], marker=TYPES[kind][1], linestyle="", markersize=5) for kind in kinds]


# ---------------------------------------------------------------- pictures


def resized(pixels, side):
    """uint8 (H, W, 3) -> (side, side, 3); what is not square is padded with white."""
    from PIL import Image, ImageOps

    return np.asarray(ImageOps.pad(Image.fromarray(pixels), (side, side), Image.Resampling.LANCZOS, color="white"))


def sheet(width, height):
    """A figure whose one axes counts in pixels of the PNG, from the upper left corner."""
    fig = Figure(figsize=(width / DPI, height / DPI))
    ax = fig.add_axes([0, 0, 1, 1])
    ax.set(xlim=(0, width), ylim=(height, 0))
    ax.axis("off")
    ax.autoscale(False)  # pictures would move the limits
    return fig, ax


def draw_gallery(cells, names, kinds, titles, gap=6, margin=270):
    """A row for the pictures and one for each network; cells (1 + K, C, H, W, 3) uint8, names and kinds: K, titles: C."""
    head, foot, side = 34, 44, 112  # pixels: maps are noise, which PNG does not shrink
    fig, ax = sheet(margin + max(3, len(titles)) * (side + gap), head + len(cells) * (side + gap) + foot)
    canvas = np.full((len(cells) * (side + gap), len(titles) * (side + gap), 3), 255, np.uint8)
    for i, j in itertools.product(range(len(cells)), range(len(titles))):
        y, x = i * (side + gap), j * (side + gap)
        canvas[y:y + side, x:x + side] = resized(cells[i][j], side)
    place = margin, margin + canvas.shape[1], head + canvas.shape[0], head
    ax.imshow(canvas, extent=place, interpolation="none", aspect="auto")
    for j, title in enumerate(titles):
        ax.text(margin + j * (side + gap) + side / 2, head - 6, plain(title, 11), ha="center", va="bottom", fontsize=7.5)
    for i, name in enumerate(["picture", *names]):
        y = head + i * (side + gap) + side / 2
        lines = textwrap.wrap(plain(name, 40), 16, break_long_words=False)
        ax.text(margin - 36, y, "\n".join(lines), ha="right", va="center", fontsize=9)
        if i:
            ax.plot(margin - 18, y, TYPES[kinds[i - 1]][1], color=TYPES[kinds[i - 1]][0], markersize=6)
    type_legend(fig, kinds, loc="lower center", ncols=4)
    return fig


def choose_samples(properties, circular, most=10):
    """For each property its values, each with the row whose other properties are nearest the middle of theirs.

    properties: {name: str (n,)}; -> {name: ([value …], [row …], number of values)}, at most `most` values, evenly spread.
    """
    far = {}
    for name, column in properties.items():
        values, codes, counts = np.unique(column, return_inverse=True, return_counts=True)
        numbers = numeric(column)
        if numbers is None:
            far[name] = 0.5 * (codes != counts.argmax())
        elif name in circular:
            turn = period(numbers)
            away = np.abs(numbers - float(values[counts.argmax()])) % turn
            far[name] = np.minimum(away, turn - away) / (turn / 2)
        else:
            ranks = np.unique(numbers, return_inverse=True)[1]
            far[name] = np.abs(ranks / max(1, ranks.max()) - 0.5)
    total, chosen = sum(far.values()), {}
    for name, column in properties.items():
        values = sorted(set(column), key=float if numeric(column) is not None else data.natural_key)
        shown = [values[i] for i in np.unique(np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int))]
        others = total - far[name]
        rows = [int(np.where(column == value, others, np.inf).argmin()) for value in shown]
        chosen[name] = (shown, rows, len(values))
    return chosen


def draw_samples(rows, gap=6):
    """rows: [(name, [value …], [uint8 (H, W, 3) …])], one a property."""
    across = max(len(values) for _, values, _ in rows)
    side = max(100, min(160, 1060 // across - gap))
    fig, ax = sheet(max(across * (side + gap) + gap, 700), len(rows) * (side + 68) + 8)
    for i, (name, values, cells) in enumerate(rows):
        top = i * (side + 68) + 8
        ax.text(gap, top + 26, plain(name, 60), fontsize=9, fontweight="bold", va="bottom")
        for j, (value, pixels) in enumerate(zip(values, cells)):
            x = gap + j * (side + gap)
            ax.imshow(resized(pixels, side), extent=(x, x + side, top + 32 + side, top + 32), interpolation="none", aspect="auto")
            ax.text(x + side / 2, top + 34 + side, plain(value, 11), fontsize=7.5, ha="center", va="top")
    return fig


# ---------------------------------------------------------------- t-SNE


def embed_2d(embeddings, seed=0):
    """t-SNE (van der Maaten and Hinton 2008), started from the principal components: (n, m) -> float32 (n, 2), repeatable."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    n = len(embeddings)
    with threadpool_limits(1):  # sums of threads in their order of arrival would move the points
        places = TSNE(perplexity=min(30, (n - 1) / 3), init="pca" if min(embeddings.shape) > 1 else "random",
                      random_state=seed).fit_transform(embeddings)
    return places.astype(np.float32)


def numeric(column):
    """A property's values as float64 (n,), or None where one is no finite number."""
    try:
        numbers = np.array(column, dtype=np.float64)
    except ValueError:
        return None
    return numbers if np.isfinite(numbers).all() else None


def period(numbers):
    """What a circular property's values turn round at: 1 (a hue) or 360 (degrees)."""
    return 1.0 if np.abs(numbers).max() <= 1 else 360.0


def draw_tsne(places, properties, circular=(), named=(), titles=None, across=3):
    """One panel a property: places (n, 2); properties {name: str (n,)}; circular, named: names of such properties.

    Numbers get a sequential colour map, circular ones a cyclic one, names a colour and a shape (seven, the rest grey).
    """
    gap, head = 0.16, 0.26  # inches: between panels, for titles
    side = (WIDTH - gap * across) / across
    columns = {name: None if name in named else numeric(column) for name, column in properties.items()}
    lines = [list(properties)[start:start + across] for start in range(0, len(properties), across)]
    keys = [max(key_height(properties[name]) if columns[name] is None else 0.34 for name in line) for line in lines]
    height = sum(keys) + len(lines) * (side + head)
    fig = Figure(figsize=(WIDTH, height))
    size = 11 if len(places) <= 400 else 5
    for number, (name, column) in enumerate(properties.items()):
        line = number // across
        left, bottom = gap / 2 + number % across * (side + gap), height - sum(keys[:line + 1]) - (line + 1) * (side + head)
        ax = fig.add_axes([left / WIDTH, (bottom + keys[line]) / height, side / WIDTH, side / height])
        beneath = fig.add_axes([left / WIDTH, bottom / height, side / WIDTH, keys[line] / height])
        beneath.axis("off")
        ax.set_title(plain((titles or {}).get(name, name), 26), pad=4)
        if columns[name] is None:
            draw_names(ax, beneath, places, column, size)
        else:
            draw_numbers(fig, ax, beneath, keys[line], places, columns[name], name in circular, size)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(True)
        ax.spines[:].set_color("#bbbbbb")
    return fig


def most_common(column):
    """The values of names that get a colour of their own."""
    counts = Counter(column.tolist())
    return sorted(counts, key=lambda value: (-counts[value], data.natural_key(value)))[:len(MARKERS)]


def key_height(column):
    """Inches for the legend of names: two columns of short ones, one of long ones."""
    return 0.54 if max(map(len, most_common(column))) <= 10 else 0.98


def draw_names(ax, beneath, places, column, size):
    common = most_common(column)
    columns = 2 if max(map(len, common)) <= 10 else 1
    rest = ~np.isin(column, common)
    ax.scatter(*places[rest].T, s=size, c="#cccccc", marker="o", linewidth=0, rasterized=True)
    for value, (colour, marker) in zip(common, MARKERS):
        ax.scatter(*places[column == value].T, s=size, c=colour, marker=marker, linewidth=0, rasterized=True)
    handles = [Line2D([], [], color=colour, marker=marker, linestyle="", markersize=4) for colour, marker in MARKERS]
    handles, labels = handles[:len(common)], [plain(value, 26) for value in common]
    if rest.any():
        handles.append(Line2D([], [], color="#cccccc", marker="o", linestyle="", markersize=4))
        labels.append(f"{len(set(column[rest]))} more")
    beneath.legend(handles, labels, loc="upper center", ncols=columns, fontsize=7, handletextpad=0.1, columnspacing=0.6,
                   borderpad=0.1, borderaxespad=0.1, labelspacing=0.2)


def draw_numbers(fig, ax, beneath, key, places, numbers, is_circular, size):
    if is_circular:
        ramp = LinearSegmentedColormap.from_list("circle", CIRCLE)
        norm = Normalize(0, period(numbers))
        ticks = np.linspace(0, period(numbers), 5)
        numbers = numbers % period(numbers)
    else:
        ramp = LinearSegmentedColormap.from_list("dark", matplotlib.colormaps["viridis"](np.linspace(0, 0.93, 64)))
        norm = Normalize(numbers.min(), numbers.max() if numbers.max() > numbers.min() else numbers.min() + 1)
        values = np.unique(numbers)
        ticks = values if len(values) <= 4 else np.linspace(values[0], values[-1], 3)
    points = ax.scatter(*places.T, s=size, c=numbers, cmap=ramp, norm=norm, linewidth=0, rasterized=True)
    place = beneath.inset_axes([0.05, 1 - 0.14 / key, 0.9, 0.07 / key])
    bar = fig.colorbar(points, cax=place, orientation="horizontal", ticks=ticks)
    bar.ax.set_xticklabels([f"{tick:g}".replace("-", "−") for tick in ticks], fontsize=7)
    bar.ax.tick_params(length=2, pad=1)
    bar.outline.set_visible(False)
    bar.solids.set_rasterized(True)


# ---------------------------------------------------------------- pairs and training


def pair_histograms(embeddings, labels, bins=200, block=256):
    """Inner products of l2-normalised embeddings (n, m) over all pairs -> int64 (2, bins): positives, negatives; over [-1, 1]."""
    unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-30)
    codes = np.unique(labels, return_inverse=True)[1]
    counts = np.zeros((2, bins), np.int64)
    for start in range(0, len(unit), block):
        products = unit[start:start + block] @ unit[start:].T
        place = np.minimum(((products + 1) * (bins / 2)).astype(np.int64).clip(0), bins - 1)
        place += bins * (codes[start:start + block, None] != codes[None, start:])
        later = np.triu(np.ones(place.shape, bool), 1)
        counts += np.bincount(place[later], minlength=2 * bins).reshape(2, bins)
    return counts


def draw_pair_panel(ax, edges, counts, density=True, before=None):
    """Positives as a filled area with a solid edge, negatives dashed; before: the same pairs before training, dotted."""
    width = edges[1] - edges[0]
    for values, colour, line in zip(counts, (VERMILION, BLUE), ("-", (0, (3, 1.2)))):
        heights = values / max(values.sum() * width, 1e-30) if density else values
        ax.stairs(heights, edges, color=colour, fill=True, alpha=0.25, linewidth=0)
        ax.stairs(heights, edges, color=colour, linewidth=1.1, linestyle=line)
    for values, colour in zip(() if before is None else before, (VERMILION, BLUE)):
        ax.stairs(values / max(values.sum() * width, 1e-30), edges, color=colour, linewidth=0.8, linestyle=":")
    ax.set(xlim=(edges[0], edges[-1]), ylim=(0, None))
    ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, steps=[1, 2, 5, 10]))


def draw_pairs(after, before=None, scores=("", "")):
    """Fig. 1 and 3 of Oi et al.: (2, bins) counts as they are, normalised, and normalised before training."""
    panels = [("(a) all pairs", after, False, ""), ("(b) each area 1", after, True, scores[0])]
    if before is not None:
        panels.append(("(c) before training", before, True, scores[1]))
    edges, counts = coarser([counts for _, counts, _, _ in panels])
    fig = Figure(figsize=(WIDTH, 2.4), layout="constrained")
    axes = [fig.add_subplot(1, len(panels), 1 + k) for k in range(len(panels))]
    for ax, (title, _, density, score), values in zip(axes, panels, counts):
        draw_pair_panel(ax, edges, values, density)
        ax.set(title=title, xlabel="inner product")
        ax.text(0.03, 0.97, score, transform=ax.transAxes, fontsize=8, va="top")
    axes[0].set_ylabel("pairs")
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes[1].set_ylabel("density")
    top = max(ax.get_ylim()[1] for ax in axes[1:]) * 1.12
    for ax in axes[1:]:
        ax.set_ylim(0, top)
    pair_legend(fig)
    return fig


def draw_pair_panels(histograms, names, kinds, scores, before=None, across=3):
    """One panel a network with its own scale: histograms, before: K × (2, bins), means of folds; before: dotted, or None."""
    lines = -(-len(names) // across)
    known = [one for one in before or [] if one is not None]
    edges, drawn = coarser([*histograms, *known])
    later = iter(drawn[len(names):])
    before = [None if one is None else next(later) for one in before or [None] * len(names)]
    fig = Figure(figsize=(WIDTH, 0.5 + 1.35 * lines), layout="constrained")
    for k, (counts, name, kind, score) in enumerate(zip(drawn, names, kinds, scores)):
        ax = fig.add_subplot(lines, across, k + 1)
        draw_pair_panel(ax, edges, counts, before=before[k])
        ax.set_title(f"{TYPES[kind][2]} {plain(name, 26)}", fontsize=8.5)
        ax.text(0.03, 0.95, score, transform=ax.transAxes, fontsize=7.5, va="top")
        ax.tick_params(labelbottom=k + across >= len(names), labelleft=False)
        ax.set_yticks([])
    fig.supxlabel("inner product", fontsize=9)
    fig.supylabel("density", fontsize=9)
    pair_legend(fig, [("before training", "#444444", ":")] if known else [])
    return fig


CURVES = (("loss", "loss"), ("positive_mean", "positive\npairs' mean"), ("negative_mean", "negative\npairs' mean"),
          ("jsd", "JSD"), ("recall_at_1", "Recall@1"), ("map_at_r", "MAP@R"))


def draw_training(histories, kinds, chosen):
    """A row a measure, a column a split. histories: {name: {split: {measure: (epochs, folds)}}}; chosen: drawn with its folds.

    A split of two epochs alone (the test part) is drawn as before and after. The loss is drawn for the chosen one alone:
    losses of different kinds have no common scale.
    """
    lengths = {}
    for split, values in (item for one in histories.values() for item in one.items()):
        lengths[split] = max(lengths.get(split, 0), len(values["jsd"]))
    splits = [split for split, length in lengths.items() if length > 1]
    measures = [(key, text) for key, text in CURVES
                if any(np.isfinite(one[split][key]).any() for one in histories.values() for split in splits if split in one)]
    fig = Figure(figsize=(WIDTH, 0.9 + 1.15 * len(measures)), layout="constrained")
    axes = fig.subplots(len(measures), len(splits), sharey="row", sharex="col", squeeze=False,
                        width_ratios=[0.45 if lengths[split] == 2 else 1 for split in splits])
    for (key, text), line in zip(measures, axes):
        line[0].set_ylabel(text)
        for split, ax in zip(splits, line):
            for name, one in histories.items():
                if split in one and (key != "loss" or name == chosen):
                    draw_curve(ax, one[split][key], TYPES[kinds[name]], name == chosen)
            ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, integer=True))
            if lengths[split] == 2:
                ax.set(xlim=(-0.35, 1.35))
                ax.set_xticks([0, 1], ["before", "after"])
    for split, first, last in zip(splits, axes[0], axes[-1]):
        first.set_title(plain(split))
        last.set_xlabel("epoch" if lengths[split] > 2 else "")
    others = [kind for kind in TYPES if kind in [kinds[name] for name in histories if name != chosen]]
    handles = [Line2D([], [], color="black", linewidth=1.8)]
    handles += [Line2D([], [], color=TYPES[kind][0], marker=TYPES[kind][1], markersize=3.5, linewidth=0.9) for kind in others]
    fig.legend(handles, [plain(chosen, 26)] + [f"{TYPES[kind][3]}{', other' * (kind != 'other')}" for kind in others],
               loc="outside upper center", ncols=2)
    return fig


def draw_curve(ax, values, look, chosen):
    """The mean of values (epochs, folds) against the epoch; of the chosen network in black with the folds' range."""
    epochs = np.flatnonzero(np.isfinite(values).any(axis=1))
    values = values[epochs]
    if chosen:
        ax.fill_between(epochs, np.nanmin(values, axis=1), np.nanmax(values, axis=1), color="black", alpha=0.18, linewidth=0)
        ax.plot(epochs, np.nanmean(values, axis=1), color="black", linewidth=1.8, zorder=3)
    elif len(values):
        ax.plot(epochs, np.nanmean(values, axis=1), color=look[0], linewidth=0.7, alpha=0.8, marker=look[1], markersize=2.5,
                markevery=[len(values) - 1])


# ---------------------------------------------------------------- text


def say(text):
    print(f"figures.py: {text}", file=sys.stderr)


# ---------------------------------------------------------------- what is there


def read_columns(path, script, texts, numbers):
    """A result table -> {column: list of str; of `numbers` float64 array, nan for an empty field}. Raises Missing, ValueError."""
    if not path.is_file():
        raise Missing(f"{path} is not there (python {script} writes it)")
    table = results.read_columns(path, script, [*texts, *numbers], numbers)
    return table | {column: np.array(table[column], np.float64) for column in numbers}


def loss_names(table, found):
    """The network's name of every row: its loss, else whose embeddings they are."""
    losses = table.get("loss", [""] * len(table["embeddings"]))
    return [loss or results.whose(file, found["networks"])[0] for loss, file in zip(losses, table["embeddings"])]


def sorted_names(names, found):
    """(names in the order of losses.csv, {name: type}); a name that is in neither the table nor the folder is "other"."""
    known = {row["name"]: row["type"] for row in results.losses() + found["networks"]}
    types = {name: known.get(name, "other") for name in names}
    return results.in_order(types), types


def is_wanted(wanted, slug, name, number):
    """Is this the network of --network SLUG/FOLD?"""
    first, _, fold = (wanted or "").partition("/")
    return not wanted or (first in (slug, name) and fold.removeprefix("fold") in ("", str(number)))


def picture_names(about, n, pictures):
    names = results.picture_names(about, n, pictures)
    if names is None:
        raise ValueError(f"{about['path']} has {n:,} rows of other pictures than labels.csv beside it or {pictures.folder} "
                         "lists; make both from the same pictures, or give their data set with --dataset")
    return names


def find_properties(network, pictures):
    """Properties of an emb.npy's rows: {name: str (n,)}, from props.csv or labels.csv beside it, or from the data set."""
    n = len(files.read_array(network["folder"] / "emb.npy"))
    for name in ("props.csv", "labels.csv"):
        path = network["folder"] / name
        if path.is_file() and any(column.lower() not in files.IDENTIFIERS for column in files.read_table(path)):
            properties = files.read_properties(path)
            if len(next(iter(properties.values()))) != n:
                raise ValueError(f"{path} has {len(next(iter(properties.values()))):,} rows, emb.npy beside it {n:,}; "
                                 "both must list the same pictures in the same order")
            return {key: with_class_names(network, key, column) for key, column in properties.items()}
    if pictures is None:
        raise Missing(f"{network['folder']} has neither props.csv nor classes in labels.csv; give --dataset")
    names = picture_names(network["emb"], n, pictures)
    row_of = {name: row for row, name in enumerate(pictures.relative)}
    rows = [row_of[name] for name in names if name in row_of]
    if len(rows) < n:
        raise ValueError(f"{n - len(rows):,} of the {n:,} pictures of {network['folder'] / 'emb.npy'} are not in "
                         f"{pictures.folder}; give the data set they come from")
    if pictures.labels is not None:
        return {"class": np.array(pictures.classes)[pictures.labels[rows]]}
    if (pictures.folder / "props.csv").is_file():
        return {key: column[rows] for key, column in files.read_properties(pictures.folder / "props.csv").items()}
    raise Missing(f"{pictures.folder} has no properties and no classes")


def with_class_names(network, name, column):
    """Class numbers become names where classes.csv has them."""
    path = network["folder"] / "classes.csv"
    if name != "class" or not path.is_file():
        return column
    table = files.read_table(path)
    names = dict(zip(table.get("class", []), table.get("name", [])))
    return np.array([names.get(value, value) for value in column])


def circular_names(properties, wanted):
    """The properties that return to their beginning: those of --circular, else rotations, hues and angles of a compass."""
    if wanted is not None:
        return {name.strip() for name in wanted.split(",")}
    return {name for name in properties if re.search(r"rotation|hue|azimuth|heading|orientation", name.lower())}


def listing(names):
    names = list(names)
    return ", ".join(names) if len(names) <= 15 else f"{', '.join(names[:15])} and {len(names) - 15} more"


# ---------------------------------------------------------------- results to figures: each yields name, title, caption, Figure


def make_profile(found, args):
    path = found["folder"] / "nrprec.csv"
    table = read_columns(path, "nrprec.py", ["embeddings", "property"], ["nr_precision"])
    options = {key: table[key] for key in ("distance", "null", "max_neighbours") if key in table}
    results.check_alike(path, options)
    if not np.isfinite(table["nr_precision"]).any():
        raise Missing(f"{path} has no NR-Prec")
    names, properties = loss_names(table, found), list(dict.fromkeys(table["property"]))
    order, types = sorted_names(names, found)
    if "loss" not in table:
        types = {name: "none" if types[name] == "other" else types[name] for name in order}
    values, low, high, folds = mean_over_folds(table, names, order, properties)
    clear = above_chance(table, names, order, properties)
    settings = ", ".join(f"{key.replace('_', ' ')} {values[0]}" for key, values in options.items() if values[0])
    yield ("profile", "Which properties the embeddings cluster by",
           profile_caption(order, properties, folds, (high > low).any(), clear is not None, settings, np.nanmax(high) > 10),
           draw_profile(values, low, high, properties, [types[name] for name in order], clear))


def above_chance(table, names, order, properties, level=0.01):
    """bool (L, P): p_holm below the level in every fold and a mean above 0; None where not all were tested."""
    p = np.array([float(value or "nan") for value in table.get("p_holm", [""] * len(names))])
    if np.isnan(p[np.isfinite(table["nr_precision"])]).any():
        return None
    largest, total = np.zeros((2, len(order), len(properties)))
    for row, (name, key) in enumerate(zip(names, table["property"])):
        place = order.index(name), properties.index(key)
        largest[place], total[place] = max(largest[place], np.nan_to_num(p[row], nan=1)), total[place] + table["nr_precision"][row]
    return (largest < level) & (total > 0)


def mean_over_folds(table, names, order, properties):
    """(L, P) means, the ends of the folds' range or of a single fold's 95 % interval, and how many folds there are."""
    errors = np.array([float(value or "nan") for value in table.get("nr_precision_se", [""] * len(names))])
    places = {}
    for row, key in enumerate(zip(names, table["property"])):
        if np.isfinite(table["nr_precision"][row]):
            places.setdefault(key, []).append(row)
    values, low, high = np.full((3, len(order), len(properties)), np.nan)
    for (name, key), rows in places.items():
        place, one = (order.index(name), properties.index(key)), table["nr_precision"][rows]
        half = 1.96 * np.nan_to_num(errors[rows[0]]) if len(rows) == 1 else 0
        values[place], low[place], high[place] = one.mean(), one.min() - half, one.max() + half
    return values, low, high, max(map(len, places.values()))


def profile_caption(order, properties, folds, whiskers, tested, settings, roots):
    return (f"NR-Prec of {len(properties)} properties, in the order of their mean. "
            + (f"Each dot is one of {len(order)} networks" if len(order) > 1 else f"Network: {order[0]}")
            + (f", its mean over {folds} folds with a whisker from the smallest to the largest" if folds > 1 else
               ", with the 95 % interval over a sample of queries" if whiskers else "")
            + (". Strokes: the types' means, in bars that are Student's 95 % interval over the losses" if len(order) > 2 else "")
            + ". Filled: above chance in every fold by permutation, p_holm < 0.01; hollow: not shown" * tested
            + f". Dashed: the published mark {MARK}, one z-score's 1 % threshold applied to a mean of many."
            + f" {settings[:1].upper()}{settings[1:]}." * bool(settings) + " Square-root axis." * bool(roots))


def make_heat_map(found, args, measure):
    path = found["folder"] / "compare.csv"
    table = read_columns(path, "compare.py", ["model_a", "model_b"],
                         ["n", "correlation", "correlation_low", "correlation_high", "jsd", "ceiling"])
    order, types = sorted_names(table["model_a"] + table["model_b"], found)
    values, folds = pair_matrix(table, order, measure)
    if not folds:
        raise Missing(f"{path} has no {measure} of two different networks")
    tree, leaves = cluster(1 - values if measure == "correlation" else values)
    common = os.path.commonpath(order) if all(os.sep in name for name in order) else ""  # networks named by their files
    names = [name[len(common):].lstrip(os.sep) for name in order]
    text, ramp = "{:.1f}" if np.nanmax(100 * values) < 10 else "{:.0f}", "Blues" if measure == "correlation" else "Blues_r"
    yield (measure, "How alike the saliency maps of different losses are" + " (divergence)" * (measure == "jsd"),
           heat_map_caption(table, folds, measure, tree is not None),
           draw_heat_map(100 * values, names, [types[name] for name in order], tree, leaves, text, ramp))


def pair_matrix(table, order, measure):
    """((K, K) mean over the folds, of correlations by Fisher's z; nan where there is none, most folds of a pair)."""
    each = np.arctanh(np.clip(table[measure], -0.999999, 0.999999)) if measure == "correlation" else table[measure]
    sums, counts = np.zeros((2, len(order), len(order)))
    for a, b, value in zip(table["model_a"], table["model_b"], each):
        if a != b and np.isfinite(value):
            for place in (order.index(a), order.index(b)), (order.index(b), order.index(a)):
                sums[place] += value
                counts[place] += 1
    mean = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    return np.tanh(mean) if measure == "correlation" else mean, int(counts.max())


def heat_map_caption(table, folds, measure, clustered):
    pictures = "–".join(sorted({f"{n:.0f}" for n in (np.nanmin(table["n"]), np.nanmax(table["n"]))}, key=int))
    correlation = measure == "correlation"
    caption = ("Correlation, in per cent, " if correlation else "Jensen-Shannon divergence (base 2), in hundredths, ")
    caption += f"of the saliency maps of every two networks: mean over {pictures} pictures" + f" in each of {folds} folds" * (folds > 1)
    caption += ", by Fisher's z" * correlation + ". Dark: alike. "
    caption += (f"Order and tree: average linkage on {'1 − r' if correlation else 'the divergence'}." if clustered else
                "Not clustered: networks are two, or a pair is missing.")
    if not correlation:
        return caption
    half, ceiling = (table["correlation_high"] - table["correlation_low"]) / 2, table["ceiling"][np.isfinite(table["ceiling"])]
    if np.isfinite(half).any():
        caption += f" 95 % intervals over one fold's pictures are ± {100 * np.nanmedian(half):.1f} points (median)."
    if len(ceiling):
        return caption + (f" Ceiling by the maps' own noise, fold by fold: {100 * ceiling.min():.0f} to {100 * ceiling.max():.0f}, mean "
                          f"{100 * ceiling.mean():.0f}; no two networks can be expected to agree better.")
    return caption + " Without a noise ceiling (saliency.py --ceiling) low values may be noise alone."


def make_gallery(found, args):
    networks = [network for network in found["networks"] if network["maps"]]
    if not networks:
        raise Missing(f"{found['folder']} has no maps.npy (python saliency.py writes them)")
    if found["pictures"] is None:
        raise Missing("the pictures are not known; give their folder: --dataset FOLDER")
    counts = Counter(network["number"] for network in networks)
    wanted = (args.network or "").partition("/")[2].removeprefix("fold")
    fold = int(wanted) if wanted.isdigit() and int(wanted) in counts else min(counts, key=lambda fold: (-counts[fold], fold))
    networks = [network for network in networks if network["number"] == fold]
    maps, geometry = open_maps(networks)
    names = picture_names(networks[0]["maps"], len(maps[0]), found["pictures"])
    place = dict(zip(found["pictures"].relative, found["pictures"].paths))
    rows = np.unique(np.linspace(0, len(names) - 1, min(args.pictures, len(names))).round().astype(int))
    absent = [names[row] for row in rows if names[row] not in place or not place[names[row]].is_file()]
    if absent:
        raise ValueError(f"{len(absent):,} pictures of the gallery are not in {found['pictures'].folder}: {', '.join(absent[:3])}"
                         f"{', …' * (len(absent) > 3)}; give the data set that the maps were made from")
    pages = np.array_split(rows, -(-len(rows) // 6))
    for page, chosen in enumerate(pages):
        cells = [[data.load_pixels(place[names[row]], geometry) for row in chosen]]
        for network, array in zip(networks, maps):
            cells.append([heat(in_range(array[row], network, row)) for row in chosen])
        number = f" ({page + 1} of {len(pages)})" * (len(pages) > 1)
        yield ("gallery" + f"_{page + 1}" * (page > 0), "What each network looks at" + number,
               f"SmoothGrad maps of {len(chosen)} of {len(names)} pictures, evenly spread over the list, fold {fold}; dark: no "
               f"influence on the embedding, light: the most. Networks: {listing(network['name'] for network in networks)}.",
               draw_gallery(cells, [network["name"] for network in networks], [network["type"] for network in networks],
                            [Path(names[row]).stem for row in chosen]))


def open_maps(networks):
    """(the networks' maps (n, H, W), memory-mapped, their common resize and crop). Raises ValueError where they differ."""
    paths = [network["maps"]["path"] for network in networks]
    maps = [files.read_array(path) for path in paths]
    geometry = [{key: network["maps"].get("preprocessing", {}).get(key) for key in ("resize", "crop")} for network in networks]
    for path, array, where in zip(paths, maps, geometry):
        if array.ndim != 3 or array.dtype.kind not in "fiub" or 0 in array.shape:
            raise ValueError(f"{path} has shape {array.shape}, dtype {array.dtype}; expected maps (n, H, W)")
        if array.shape != maps[0].shape or where != geometry[0]:
            raise ValueError(f"{paths[0]} and {path} differ in shape, resize or crop ({maps[0].shape}, {geometry[0]}; "
                             f"{array.shape}, {where}); make both from the same pictures with the same preprocessing")
    return maps, geometry[0]


def in_range(saliency_map, network, row):
    with np.errstate(invalid="ignore"):
        if (saliency_map < 0).any() or (saliency_map > 1).any():
            raise ValueError(f"{network['folder'] / 'maps.npy'}: picture {row} has values from {np.nanmin(saliency_map):.6g} to "
                             f"{np.nanmax(saliency_map):.6g}; expected maps in [0, 1], as saliency.py writes them")
    return saliency_map


def make_tsne(found, args):
    network = next((one for one in found["networks"]
                    if one["emb"] and is_wanted(args.network, one["slug"], one["name"], one["number"])), None)
    if network is None:
        raise Missing(f"{found['folder']} has no emb.npy" + f" of {args.network}" * bool(args.network)
                      + " (python embed.py writes it)")
    properties = find_properties(network, found["pictures"])
    embeddings = files.read_embeddings(network["folder"] / "emb.npy")
    n = len(embeddings)
    if n < 4:
        raise Missing(f"{network['folder'] / 'emb.npy'} has {n} rows; t-SNE needs at least 4")
    rows = np.sort(np.random.default_rng(args.seed).choice(n, min(args.points, n), replace=False))
    properties = {name: column[rows] for name, column in properties.items()}
    circular = circular_names(properties, args.circular)
    used = [name for name in properties if name in circular and numeric(properties[name]) is not None]
    scores = nr_of(found, network)
    titles = {name: f"{plain(name, 18)} ({scores[name]:.1f})".replace("-", "−") for name in properties if name in scores}
    caption = (f"t-SNE (seed {args.seed}) of {len(rows):,}{f' of {n:,}' * (len(rows) < n)} embeddings of {network['name']}, "
               f"fold {network['number']}, coloured by each property's values"
               + "; in brackets its NR-Prec" * bool(titles) + ". "
               + f"Circular, with a colour map that closes: {listing(used)}. " * bool(used))
    named = [name for name in properties if name in ("class", "super_class", "label", "model")]
    yield ("tsne", f"Embeddings of {network['name']} by property", caption.strip(),
           draw_tsne(embed_2d(embeddings[rows], args.seed), properties, circular, named, titles))


def nr_of(found, network):
    """{property: NR-Prec} of one network, {} where nrprec.csv has none."""
    try:
        table = read_columns(found["folder"] / "nrprec.csv", "nrprec.py", ["embeddings", "property"], ["nr_precision"])
    except Missing:
        return {}
    names, folds = loss_names(table, found), table.get("fold", [""] * len(table["property"]))
    return {key: value for name, fold, key, value in zip(names, folds, table["property"], table["nr_precision"])
            if name == network["name"] and fold in ("", str(network["number"])) and np.isfinite(value)}


def make_samples(found, args):
    pictures = found["pictures"]
    if pictures is None:
        raise Missing("the pictures are not known; give their folder: --dataset FOLDER")
    if not (pictures.folder / "props.csv").is_file() or not (pictures.folder / "images").is_dir():
        raise Missing(f"{pictures.folder} is no rendered set (props.csv and images/)")
    properties = files.read_properties(pictures.folder / "props.csv")
    chosen = choose_samples(properties, circular_names(properties, args.circular))
    rows = []
    for name, (values, members, number) in chosen.items():
        label = name if number == len(values) else f"{name} ({len(values)} of {number} values)"
        rows.append((label, values, [np.asarray(data.read_rgb(pictures.paths[row])) for row in members]))
    yield ("samples", "Pictures of the rendered set",
           f"A row a property, a picture a value, of {len(pictures.paths):,} pictures whose properties all vary: of each value "
           "the picture whose other properties are nearest the middle of theirs.", draw_samples(rows))


def make_pairs(found, args):
    counts, jsd, label = count_pairs(found, args)
    order, types = sorted_names([name for name, _ in counts], found)
    chosen = choose_pair(counts, found, args.network)
    started = before_training(counts, types, found, args)
    (same, different), before = counts[chosen].sum(axis=1), started.get(chosen)
    untrained = next((name for name in order if types[name] == "none"), None)
    yield ("pairs", f"Pairs of the same and of different {label}: {chosen[0]}",
           f"Inner products of l2-normalised embeddings of {chosen[0]}" + f", fold {chosen[1]}" * bool(chosen[1])
           + f": {same:,} pairs of one {label} (positive), {different:,} of two (negative). (a) As counted; (b) each normalised "
           "to area 1" + "; (c) the same before training" * (before is not None) + ".",
           draw_pairs(counts[chosen], before, [score(jsd, name, {chosen[1], ""}) for name in (chosen[0], untrained)]))
    if len(order) > 1:
        folds = max(Counter(name for name, _ in counts).values())
        shapes = ", ".join(f"{TYPES[kind][2]} {TYPES[kind][3]}" for kind in TYPES if kind in map(types.get, order))
        yield ("pairs_all", f"Pairs of the same and of different {label}, every network",
               "Inner products of positive and negative pairs, each normalised to area 1"
               + f", mean of {folds} folds" * (folds > 1) + "; dotted: before training" * bool(started)
               + f". Each panel has its own scale. {shapes}."
               + (" JSD as in pairs.csv" + ", with the smallest and largest fold" * (folds > 1) + ".") * bool(jsd),
               draw_pair_panels([mean_area(counts, name) for name in order], order, [types[name] for name in order],
                                [score(jsd, name) for name in order], [mean_area(started, name) for name in order]))


def count_pairs(found, args):
    """({(name, fold): histograms (2, bins)}, {(name, fold): JSD of pairs.csv}, label): read where they are, else counted."""
    counts, label = read_histograms(found, args.label)
    networks = [network for network in found["networks"] if network["emb"]]
    if not networks and not counts:
        raise Missing(f"{found['folder']} has neither emb.npy nor histograms.csv (embed.py, pairs.py --histograms write them)")
    jsd = {}
    if (found["folder"] / "pairs.csv").is_file():
        table = read_columns(found["folder"] / "pairs.csv", "pairs.py", ["embeddings", "label"], ["jsd"])
        label = label or args.label or table["label"][0]
        keys = zip(loss_names(table, found), table.get("fold", [""] * len(table["jsd"])))
        for key, one, value in zip(keys, table["label"], table["jsd"]):
            if one == label and np.isfinite(value):
                jsd.setdefault(key, value)  # of the first number of bins
    for network in networks:
        key = (network["name"], str(network["number"]))
        if key not in counts:
            counts[key], label = count_network(network, found, label or args.label)
    return counts, jsd, label


def before_training(counts, types, found, args):
    """{(name, fold): histograms} of the untrained networks: as train.py counted them, else of the fold's network None."""
    untrained = {fold: one for (name, fold), one in counts.items() if types[name] == "none"}
    started = {**{key: untrained[key[1]] for key in counts if key[1] in untrained}, **read_started(found, args)}
    return {key: started[key] for key in counts if key in started and types[key[0]] != "none"}


def score(jsd, name, folds=None):
    """A network's JSD in words: the mean over its folds, and their range."""
    values = [value for (one, fold), value in jsd.items() if one == name and (folds is None or fold in folds)]
    if len(values) < 2:
        return f"JSD {values[0]:.2f}" if values else ""
    return f"JSD {np.mean(values):.2f}\n({min(values):.2f}–{max(values):.2f})"


def mean_area(histograms, name):
    """The mean of a network's folds, each positive and each negative histogram divided by its sum; None without any."""
    folds = [one / np.maximum(one.sum(axis=1, keepdims=True), 1) for key, one in histograms.items() if key[0] == name]
    return np.mean(folds, axis=0) if folds else None


def choose_pair(counts, found, wanted):
    """(name, fold) of --network, else of the first network in the order of losses.csv."""
    slugs = {network["name"]: network["slug"] for network in found["networks"]}
    order = sorted_names([name for name, _ in counts], found)[0]
    for name, fold in sorted(counts, key=lambda key: (order.index(key[0]), key[1])):
        if is_wanted(wanted, slugs.get(name), name, fold):
            return name, fold
    raise Missing(f"no pairs of {wanted}")


def read_histograms(found, label):
    """histograms.csv of pairs.py -> ({(name, fold): int64 (2, bins)}, its label); ({}, None) without one."""
    path = found["folder"] / "histograms.csv"
    if not path.is_file():
        return {}, None
    table = read_columns(path, "pairs.py", ["embeddings", "label", "bins"], ["positive", "negative"])
    label, names = label or table["label"][0], loss_names(table, found)
    rows = [row for row in range(len(names)) if table["label"][row] == label and table["bins"][row] == table["bins"][0]]
    places = {}
    for row in rows:
        places.setdefault((names[row], table["fold"][row] if "fold" in table else ""), []).append(row)
    return {key: two_rows(table, rows) for key, rows in places.items()}, label


def two_rows(table, rows):
    return np.stack([table["positive"][rows], table["negative"][rows]]).astype(np.int64)


def read_started(found, args):
    """The test pairs before training, from train.py's histograms.csv: {(name, fold): int64 (2, bins)}."""
    started = {}
    for path, name, fold in results.trained_files(args.models, found["name"], found["networks"], "histograms.csv"):
        table = read_columns(path, "train.py", ["epoch", "split"], ["positive", "negative"])
        rows = [row for row, key in enumerate(zip(table["epoch"], table["split"])) if key == ("0", "test")]
        if rows:
            started[name, fold] = two_rows(table, rows)
    return started


def count_network(network, found, label):
    """(histograms, label) of an emb.npy; the label is --label's, else class, else model, else the first property."""
    properties = find_properties(network, found["pictures"])
    if label and label not in properties:
        raise ValueError(f"{network['folder']}: no property {label!r}; it has {', '.join(properties)} (--label chooses)")
    label = label or next((name for name in ("class", "model") if name in properties), next(iter(properties)))
    embeddings = files.read_embeddings(network["folder"] / "emb.npy")
    if len(embeddings) > MOST_PAIRED:
        raise Missing(f"{len(embeddings):,} embeddings make too many pairs to count here: python pairs.py "
                      f"{found['folder']}/*/fold*/emb.npy LABELS --histograms {found['folder'] / 'histograms.csv'}")
    return pair_histograms(embeddings, properties[label]), label


def make_training(found, args):
    read, lengths = {}, Counter()
    for path, name, _ in results.trained_files(args.models, found["name"], found["networks"], "history.csv"):
        table = read_columns(path, "train.py", ["epoch", "split"], [key for key, _ in CURVES])
        for row, (epoch, split) in enumerate(zip(table["epoch"], table["split"])):
            if not epoch.isdigit():
                raise ValueError(f"{path}: line {row + 2}: epoch {epoch!r} is no number; train that network again")
            lengths[name] = max(lengths[name], int(epoch) + 1)
            folds = read.setdefault(name, {}).setdefault(split, {})
            folds.setdefault(path, {})[int(epoch)] = [table[key][row] for key, _ in CURVES]
    histories = {name: {split: as_arrays(folds) for split, folds in one.items()}
                 for name, one in read.items() if lengths[name] > 1}
    if not histories:
        raise Missing(f"{args.models / 'trained' / found['name']} has no history.csv of an epoch (python train.py writes them; "
                      "see --models)")
    order, types = sorted_names(list(histories), found)
    wanted = (args.network or "").partition("/")[0]
    wanted = next((network["name"] for network in found["networks"] if network["slug"] == wanted), wanted)
    chosen = wanted if wanted in order else order[0]
    folds = max(values["jsd"].shape[1] for values in histories[chosen].values())
    yield ("training", f"Training: {chosen}" + " among the other losses" * (len(order) > 1),
           f"Black: {chosen}" + f", mean of {folds} folds and their range" * (folds > 1)
           + "; thin: the other networks' means" * (len(order) > 1) + ". Epoch 0 is before training. The loss's own "
           "value is drawn for one network: different losses have no common scale.",
           draw_training({name: histories[name] for name in order}, types, chosen))


def as_arrays(folds):
    """{fold: {epoch: [a value a measure]}} -> {measure: float64 (epochs, folds)}, nan where there is none.

    Folds that know two epochs alone, before training and their best one, are lined up at 0 and 1.
    """
    if max(map(len, folds.values())) <= 2:
        folds = {fold: dict(enumerate(rows[epoch] for epoch in sorted(rows))) for fold, rows in folds.items()}
    values = np.full((1 + max(max(rows) for rows in folds.values()), len(folds), len(CURVES)), np.nan)
    for k, rows in enumerate(folds.values()):
        for epoch, row in rows.items():
            values[epoch, k] = row
    return {key: values[:, :, i] for i, (key, _) in enumerate(CURVES)}


MAKERS = {"profile": make_profile, "correlation": lambda found, args: make_heat_map(found, args, "correlation"),
          "jsd": lambda found, args: make_heat_map(found, args, "jsd"), "gallery": make_gallery, "tsne": make_tsne,
          "samples": make_samples, "pairs": make_pairs, "training": make_training}
PHOTOGRAPHS = ("gallery", "samples")


# ---------------------------------------------------------------- the command


def save(fig, folder, name, title, photograph):
    """NAME.png, NAME.pdf and, unless it is made of photographs, NAME.svg; without dates."""
    formats = {"png": {"Software": None}, "pdf": {"Title": plain(title), "Creator": "figures.py", "CreationDate": None},
               "svg": {"Title": plain(title), "Creator": "figures.py", "Date": None}}
    for suffix in ["png", "pdf"] + ["svg"] * (not photograph):
        content = io.BytesIO()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fig.savefig(content, format=suffix, metadata=formats[suffix])
        if suffix == "png" and any("missing from" in str(warning.message) for warning in caught):
            say(f"note: {name}: letters that the font (DejaVu Sans) lacks are drawn as boxes")
        files.write_file(folder / f"{name}.{suffix}", content.getvalue())


def find_networks(folder, models):
    """The networks of a data set, checked, and what is wrong with arrays that are left out; those that share their loss with
    others are named by their folders."""
    networks = results.find_networks(folder, models)
    wrong = results.open_arrays(networks)
    results.check_together(networks)
    slugs = Counter(name for name, _ in {(network["name"], network["slug"]) for network in networks})
    named = [network if slugs[network["name"]] == 1 else network | {"name": network["slug"]} for network in networks]
    return named, [what for _, what in wrong]


def check_network(args, datasets):
    """Raise ValueError for a --network that no data set has."""
    known = [network for found in datasets for network in found["networks"]]
    if not any(is_wanted(args.network, one["slug"], one["name"], one["number"]) for one in known):
        raise ValueError(f"--network {args.network}: no such network; there are "
                         f"{listing(dict.fromkeys(f'''{one['slug']}/fold{one['number']}''' for one in known)) or 'none'}")


def fail(message):
    say(" ".join(str(message).split()))
    sys.exit(2)


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = fail
    add = parser.add_argument
    add("results", type=Path, metavar="RESULTS", help="results/ with data sets' folders in it, or one data set's folder")
    add("--out", type=Path, required=True, metavar="DIR", help="where the figures go; made if it is not there")
    add("--dataset", action="append", default=[], metavar="FOLDER",
        help="the pictures: a folder, a CSV file, cars196, cub200 or sop; again for each data set")
    add("--data-root", metavar="DIR", help="folder of the published data sets (DML_DATA_ROOT, else data/)")
    add("--models", type=Path, default=HERE / "models", metavar="DIR",
        help="where train.py wrote trained/<dataset>/<loss>/fold<k>/ (models/)")
    add("--only", metavar="NAMES", help=f"these figures alone, with commas: {', '.join(FIGURES)}")
    add("--network", metavar="SLUG/FOLD", help="for tsne, pairs and training, as triplet/fold0 (the first of models/losses.csv)")
    add("--label", metavar="NAME", help="what makes a pair positive (that of pairs.csv, else class, model or the first property)")
    add("--circular", metavar="NAMES", help="properties that return to their beginning, with commas (rotations, hues, azimuths)")
    add("--points", type=int, default=1000, metavar="N", help="embeddings in the t-SNE, chosen at random (1000)")
    add("--pictures", type=int, default=12, metavar="N", help="in the gallery, six a page (12)")
    add("--seed", type=int, default=0, metavar="N", help="of the t-SNE (0)")
    return parser.parse_args(argv)


def check(args):
    """The figures asked for. Raises ValueError for options that don't fit and for packages that are missing."""
    only = [name.strip() for name in args.only.split(",")] if args.only else list(FIGURES)
    unknown = next((name for name in only if name not in FIGURES), None)
    if unknown is not None:
        raise ValueError(f"--only {unknown}: expected names among {', '.join(FIGURES)}")
    for name, least in ("points", 4), ("pictures", 1), ("seed", 0):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)}: expected at least {least}")
    if matplotlib is None or ("tsne" in only and importlib.util.find_spec("sklearn") is None):
        raise ValueError(f"{'matplotlib' if matplotlib is None else 'scikit-learn'} is not installed, and the figures need it: "
                         "pip install '.[plots]'")
    return [name for name in FIGURES if name in only]


def main(argv=None):
    from tqdm import tqdm

    args = parse(argv)
    only = check(args)
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out} is a file; give a folder")
    folders = results.find_datasets(args.results)
    names = [folder.resolve().name for folder in folders]
    pictures = results.open_pictures(args.dataset, args.data_root, names)
    datasets, missing = [], []
    for name, folder in zip(names, folders):
        networks, wrong = find_networks(folder, args.models)
        datasets.append({"name": name, "folder": folder, "networks": networks, "pictures": pictures.get(name)})
        missing += [{"dataset": name, "figure": "", "what": what} for what in wrong]
    if args.network:
        check_network(args, datasets)
    args.out.mkdir(parents=True, exist_ok=True)
    files.check_output(args.out / "figures.json")

    done = []
    total = len(datasets) * len(only)
    with style.context(STYLE), tqdm(total=total, unit=" figures", delay=2, disable=not sys.stderr.isatty()) as bar:
        for found, figure in itertools.product(datasets, only):
            try:
                for part, title, caption, fig in MAKERS[figure](found, args):
                    name, photograph = f"{part}_{found['name']}", figure in PHOTOGRAPHS
                    save(fig, args.out, name, title, photograph)
                    done.append({"name": name, "title": title, "caption": caption, "dataset": found["name"],
                                 "svg": None if photograph else f"{name}.svg", "png": f"{name}.png"})
            except Missing as error:
                missing.append({"dataset": found["name"], "figure": figure, "what": str(error)})
            bar.update()
    about = json.dumps({"figures": done, "missing": missing}, indent=1, ensure_ascii=False) + "\n"
    files.write_file(args.out / "figures.json", about.encode())
    for one in missing:
        say(f"left out: {one['figure']} of {one['dataset']}: {one['what']}" if one["figure"] else f"left out: {one['what']}")
    for one in done:
        print(f"{args.out / one['png']}  {one['title']}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        say("stopped; nothing half-written remains")
        sys.exit(130)
