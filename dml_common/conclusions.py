"""What the two papers conclude, each with our number, its 95 % interval, its test and a verdict.

    for row in conclusions(results.read_all(Path("results"), Path("models"))):
        print(row.says, row.data, row.estimate, row.p_holm, row.verdict)

Estimates are functions on plain arrays; the unit is the loss. A claim holds where the interval lies on the
claimed side and p, corrected by Holm over all claims, is below 0.05; it does not where the interval lies on
the other side; else it can't be told.
"""
import math
import re
from collections import Counter, defaultdict, namedtuple
from itertools import chain, product

import numpy as np
from scipy import stats

from dml_common.folders import TYPES
from dml_common.properties import holm

CLIP = 1 - 1e-6      # r = ±1 is cut to ±0.999999, so that Fisher's z stays finite (as in compare.py)
LEVEL = 0.05         # of all tests but the released one
MOST = 99_999        # partitions tried: a test is exact where there are no more, else they are random
PERMUTATIONS = 9999  # of the order of properties, of the losses' groups; bootstrap samples
MARGIN = 0.05        # of claims of equality, of correlations, inner products and divergences
ORDER = 0.9          # of Kendall's W and tau: one order
TOP, LOOKED = 0.05, 100  # concentration: the share of a map's pixels; pictures of a network

# A number, its 95 % interval, its p, the smallest p that so few values allow; n values.
Estimate = namedtuple("Estimate", "value low high p least n note", defaults=[None, None, None, 0.0, 1, ""])

# What a paper says; side: where its number is claimed to lie of the reference, "+" or "-"; "=": within
# ± reference of 0; "": nothing is claimed. estimate: None where what it needs is not there.
Claim = namedtuple("Claim", "paper says needs side estimate reference", defaults=[0.0])
Conclusion = namedtuple("Conclusion", "paper says data estimate p_holm verdict")

# ---------------------------------------------------------------- tests and estimates, on arrays


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


def student(value, error, df):
    """Student's 95 % interval of a value."""
    half = float(stats.t.ppf(0.975, df)) * error
    return value - half, value + half


def mean_interval(values):
    """n, mean, standard deviation and Student's interval of the mean of what is finite in values (n,)."""
    values = values[np.isfinite(values)]
    n = len(values)
    if n < 2:
        return [n, *values.tolist(), *[None] * (4 - n)]
    mean, deviation = float(values.mean()), float(values.std(ddof=1))
    return [n, mean, deviation, *student(mean, deviation / n**0.5, n - 1)]


def equivalence(value, error, df, margin):
    """p that the value is not within ± margin of 0: the larger of two one-sided t tests."""
    return float(stats.t.sf((margin - abs(value)) / error, df)) if error else float(abs(value) >= margin)


def mean_of(x, reference=0.0, margin=None):
    """Is the mean of x (n,) another one than the reference? -> Estimate; None of no values.

    p: two-sided, by all ways (MOST random ones beyond) to turn the signs of x − reference; with a margin that
    the mean is not within ± margin of 0.
    """
    x = np.array([*x], np.float64)
    if len(x) < 2:
        return Estimate(float(x[0])) if len(x) else None
    value, error, df = float(x.mean()), float(stats.sem(x)), len(x) - 1
    ends = student(value, error, df)
    if margin is not None:
        p = equivalence(value, error, df, margin)
        return Estimate(value, *ends, p, n=len(x), note="two one-sided t tests")
    if exact := 2**len(x) <= MOST:
        turned = np.arange(2**len(x))[:, None] >> np.arange(len(x)) & 1
    else:
        turned = np.random.default_rng(0).integers(0, 2, (MOST, len(x)))
    sums = np.abs((1 - 2 * turned) @ (x - reference))
    extreme = int((sums >= abs((x - reference).sum()) * (1 - 1e-12)).sum())
    p = extreme / len(sums) if exact else (1 + extreme) / (1 + MOST)
    return Estimate(value, *ends, p, 2.0**-df, len(x), "signs turned")


def difference_of(x, y, fisher=False):
    """Mean of x less mean of y -> Estimate with Welch's interval and p of mann_whitney(); None of no values.

    fisher: x and y are Fisher's z of correlations; the value and its interval are of correlations.
    """
    if not len(x) or not len(y):
        return None
    n = np.array([len(x), len(y)])
    means = np.array([np.mean(x), np.mean(y)])
    means = np.tanh(means) if fisher else means
    value, note = float(means[0] - means[1]), "{:.3f} against {:.3f}".format(*means)
    if n.min() < 2:
        return Estimate(value, n=int(n.sum()), note=note)
    squares = np.array([np.var(x, ddof=1), np.var(y, ddof=1)]) / n  # of the standard errors
    squares = squares * (1 - means**2)**2 if fisher else squares    # the delta method
    error, ends, ways = math.sqrt(squares.sum()), (value, value), math.comb(n.sum(), n[0])
    if error:
        ends = student(value, error, error**4 / (squares**2 / (n - 1)).sum())
    note += ", Mann-Whitney" + (", exact" if ways <= MOST else "")
    return Estimate(value, *ends, mann_whitney(x, y)[1], 2 / ways, int(n.sum()), note)


def kendall(x, y):
    """Kendall's tau-b of the last axes of x (…, P) and y (…, P), broadcast."""
    i, j = np.triu_indices(np.shape(x)[-1], 1)
    a, b = (np.sign(side[..., i] - side[..., j]) for side in map(np.asarray, (x, y)))
    with np.errstate(invalid="ignore"):  # nan where all are equal
        return (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))


def order_agreement(values, none=None):
    """Do losses order the properties alike? values (L, P) of L losses, none (P,) of the network without one
    -> Estimates of Kendall's W, of the mean tau of two losses, and of none's tau with the losses' mean.

    Bootstrap over the losses: percentiles; a loss drawn twice makes no pair with itself, which would raise
    the agreement: W = (1 + (L − 1) · mean Spearman's rho) / L. p: that it is not on its side of ORDER.
    """
    L = len(values)
    counts = np.random.default_rng(0).multinomial(L, np.full(L, 1 / L), PERMUTATIONS)
    counts = np.vstack([np.ones(L), counts[(counts > 0).sum(axis=1) > 1]])  # first the losses as they are
    with np.errstate(invalid="ignore"):
        rho = np.corrcoef(stats.rankdata(values, axis=1))
    tau = kendall(values[:, None], values[None])
    pairs = counts.sum(axis=1)**2 - (counts**2).sum(axis=1)
    rho, tau = (((counts @ (one - np.eye(L))) * counts).sum(axis=1) / pairs for one in (rho, tau))
    draws = [(1 + (L - 1) * rho) / L, tau]
    if none is not None:
        draws.append(kendall(counts @ values / L, none))
    for first, *rest in draws:
        rest = np.array(rest)
        tail = 1 + min((rest <= ORDER).sum(), (rest >= ORDER).sum())
        yield Estimate(float(first), *map(float, np.quantile(rest, (0.025, 0.975))),
                       min(1.0, float(2 * tail / (1 + len(rest)))), n=L, note="bootstrap over losses")


def same_group(z, group_of, within=None, margin=None):
    """Do two losses of one group agree more than two of different groups? -> Estimate; None: none can tell.

    z: {(network, network): Fisher's z}. The groups are permuted over the networks, of each kind of within
    {network: kind} apart: pairs are not independent. Interval: delete-one jackknife over the networks of a
    statistic of pairs (Snijders and Borgatti 1999). With a margin p is that the difference is not within
    ± margin of 0.
    """
    names, z = list(group_of), {pair: z[pair] for pair in z if {*pair} <= group_of.keys()}
    a, b = np.array([(names.index(one), names.index(other)) for one, other in z], int).reshape(-1, 2).T
    values, codes = np.array([*z.values()]), np.unique([*group_of.values()], return_inverse=True)[1]
    kinds = np.array([within[name] if within else "" for name in names])

    def means(codes, kept=True):
        same = codes[..., a] == codes[..., b]
        return [(values * chosen).sum(-1) / np.maximum(1, chosen.sum(-1))
                for chosen in (same & kept, ~same & kept)]

    if len(names) < 3 or len(np.unique(codes[a] == codes[b])) < 2:
        return None
    draws, generator = np.tile(codes, (PERMUTATIONS, 1)), np.random.default_rng(0)
    for kind in np.unique(kinds):
        draws[:, kinds == kind] = generator.permuted(draws[:, kinds == kind], axis=1)
    observed = abs(np.subtract(*means(codes)))
    extreme = abs(np.subtract(*means(draws))) >= observed * (1 - 1e-12)
    p, (one, other) = float((1 + extreme.sum()) / (1 + PERMUTATIONS)), np.tanh(means(codes))
    rest = [np.subtract(*np.tanh(means(codes, (a != k) & (b != k)))) for k in range(len(names))]
    value, error, df = float(one - other), math.sqrt((len(names) - 2) * np.var(rest) / 2), len(names) - 1
    note = f"{one:.3f} against {other:.3f}, groups permuted" + (" within types" if within else "")
    if margin is not None:
        note, p = f"{note}: p {p:.2g}; two one-sided t tests", equivalence(value, error, df, margin)
    return Estimate(value, *student(value, error, df), p, 1 / (1 + PERMUTATIONS), len(names), note)


def reversal(gap):
    """The first epoch from which on the gap (epochs,) stays above 0; nan where it ends below."""
    below = np.flatnonzero(~(np.asarray(gap) > 0))
    first = below[-1] + 1 if len(below) else 0
    return float(first) if first < len(gap) else math.nan


def concentration(maps):
    """The share of each map's sum in its TOP share of pixels: (n, H, W) -> float64 (n,); blank ones: nan."""
    pixels = np.asarray(maps, np.float64).reshape(len(maps), -1)
    most = max(1, round(TOP * pixels.shape[1]))
    with np.errstate(invalid="ignore"):
        return np.partition(pixels, -most, axis=1)[:, -most:].sum(axis=1) / pixels.sum(axis=1)


def verdict(estimate, side, reference, p_holm, tests):
    """What an Estimate tells of a claim: "holds", "does not" or "can't be told", with the smallest difference
    that could have been shown: half the interval, widened to Holm's strictest level of so many tests; none
    where so few values can't pass it."""
    value, low, high, _, least, n, _ = estimate
    if low is None or p_holm is None:
        return f"can't be told: {n} value{'s' if n > 1 else ''}"
    shown = p_holm < LEVEL
    if side == "=":
        inside, outside = -reference < low and high < reference, low > reference or high < -reference
    else:
        inside, outside = low > reference, high < reference
        if side == "-":
            inside, outside = outside, inside
    if side == "" and shown and (inside or outside):
        return "rises" if inside else "falls"
    if side and (inside and shown or outside):
        return "holds" if inside else "does not"
    if least * tests >= LEVEL:
        return f"can't be told: {n} values allow no p below {least:.2g}"
    half = (high - low) / 2 * stats.norm.isf(LEVEL / 2 / tests) / stats.norm.isf(LEVEL / 2)
    return f"can't be told: ±{half:.2g} could have been shown"


# ---------------------------------------------------------------- what results say


def by_type(values, types, kinds=("classification", "ranking"), fisher=False):
    """Values of losses {name: value} of the first kind less those of the second -> Estimate or None."""
    sides = [[value for name, value in values.items() if types.get(name) == kind] for kind in kinds]
    return difference_of(*sides, fisher)


def concentrations(one):
    """{loss: concentration of its maps}, over LOOKED pictures of each fold; the noise of one map's."""
    shares, noise = defaultdict(list), []
    for network in one.networks:
        if network["maps"] and network["type"] in TYPES[:2]:
            rows = np.unique(np.linspace(0, len(network["maps"]["array"]) - 1, LOOKED).round().astype(int))
            first, *second = (concentration(network[kind]["array"][rows]) for kind in ("maps", "maps_ceiling")
                              if network[kind])
            shares[network["name"]] += first[np.isfinite(first)].tolist()
            if second:
                away = first - second[0]
                noise += (away[np.isfinite(away)]**2).tolist()
    return ({name: float(np.mean(values)) for name, values in shares.items() if values},
            float(np.sqrt(np.mean(noise) / 2)) if noise else None)


def pixel_claims(one):
    """The first paper's claims about saliency maps."""
    z = {(row.network, row.other): np.arctanh(np.clip(row.value, -CLIP, CLIP))
         for row in one.select("correlation", fold="mean") if row.network != row.other}
    types = one.types
    kinds = {name: types[name] for pair in z for name in pair if types[name] in TYPES[:2]}
    distances = {name: one.distances[name] for name in kinds if one.distances.get(name)}
    none = {name: z[pair] for pair in z for name in pair if name in kinds and not kinds.keys() >= {*pair}
            and "none" in (types[pair[0]], types[pair[1]])}
    outside = {row.network: 1 - row.value for row in one.select("masks", fold="mean", key="share")}
    tops, noise = concentrations(one)
    top = by_type(tops, types, ("ranking", "classification"))
    if top and noise is not None:
        top = top._replace(note=f"{top.note}; a map's noise {noise:.4f}")
    yield Claim("Kobs et al.", "Maps of one type of loss correlate more than of two",
                "compare.csv of both types", "+", same_group(z, kinds))
    yield Claim("Kobs et al.", "Maps of one distance do not, types being equal",
                "compare.csv of several losses", "=", same_group(z, distances, kinds, MARGIN), MARGIN)
    yield Claim("Kobs et al.", "None's maps are nearer to classification than to ranking",
                "compare.csv of both types and None", "+", by_type(none, types, fisher=True))
    yield Claim("Kobs et al.", "Classification: more saliency lies outside the object",
                "masks.csv of both types", "+", by_type(outside, types))
    yield Claim("Kobs et al.", f"Ranking: more of the saliency in a map's top {TOP:.0%} of pixels",
                "maps.npy of both types", "+", top)


def property_claims(one):
    """The first paper's claims about properties."""
    scores = {(row.network, row.key): row.value for row in one.select("nr_precision", fold="mean")}
    names, every = one.names("nr_precision"), one.keys("nr_precision")
    losses = [name for name in names if one.types[name] != "none"]
    none = next((name for name in names if one.types[name] == "none"), None)
    n = Counter(key for _, key in scores)
    keys = [key for key in every if n[key] == len(names)]
    values = np.array([scores[cell] for cell in product(losses, keys)]).reshape(len(losses), len(keys))
    orders = dict.fromkeys(("Kendall's W", "losses' mean tau", "None's tau with the mean"))
    if min(values.shape) > 1:
        orders |= zip(orders, order_agreement(values, [scores[none, key] for key in keys] if none else None))
    for what, estimate in orders.items():
        yield Claim("Kobs et al.", f"One order of properties: {what} above {ORDER}",
                    "nrprec.csv with None", "+", estimate, ORDER)
    grounds = [key for key in keys if re.match("bg_|background", key)]
    behind = dict(zip(losses, values[:, np.isin(keys, grounds)].mean(axis=1))) if grounds else {}
    yield Claim("Kobs et al.", "Classification: background properties weigh more",
                "nrprec.csv of both types with bg_… properties", "+", by_type(behind, one.types))
    for key in every if none else ["the class"]:
        changes = [scores[name, key] - scores[none, key] for name in losses
                   if {(name, key), (none, key)} <= scores.keys()]
        side = "+" if key in ("model", "class", "the class") else "-" if key in grounds else ""
        says = {"+": f"Training raises NR-Prec of {key}", "-": f"Training lowers NR-Prec of {key}"}
        yield Claim("Kobs et al.", says.get(side, f"NR-Prec of {key} by training (nothing is claimed)"),
                    "nrprec.csv with None", side, mean_of(changes))


def histories(one, key, part):
    """{loss: float64 (epochs,)} of one column of the training histories, means over folds."""
    rows, curves = one.select("training", fold="mean", key=key, part=part), defaultdict(list)
    for row in sorted(rows, key=lambda row: math.inf if row.epoch == "best" else row.epoch):
        if one.types[row.network] != "none":
            curves[row.network].append(row.value)
    return {name: np.array(curve) for name, curve in curves.items()}


def first_gaps(one, key):
    """Training less validation before training, in each fold: there the losses share their network."""
    parts = {"train": defaultdict(list), "validation": defaultdict(list)}
    for row in one.select("training", key=key, epoch=0):
        if row.fold != "mean" and row.part in parts:
            parts[row.part][row.fold, row.seed].append(row.value)
    train, validation = parts.values()
    return [np.mean(train[fold]) - np.mean(validation[fold]) for fold in train if fold in validation]


def training_claims(one):
    """The second paper's claims about training."""
    for part, side, reference, what in (("train", "+", 0.0, "rises"),
                                        ("validation", "-", MARGIN, f"rises by less than {MARGIN}")):
        rises = [curve[-1] - curve[0] for curve in histories(one, "positive_mean", part).values()]
        yield Claim("Oi et al.", f"Positive pairs' mean {what} in {part}", "history.csv", side,
                    mean_of(rises, reference), reference)
    titles, turns = {"jsd": "JSD", "recall_at_1": "Recall@1", "map_at_r": "MAP@R"}, {}
    for key, title in titles.items():
        known = "jsd_above" if key == "jsd" and one.select("training", key="jsd_above") else key
        train, validation = (histories(one, known, part) for part in ("train", "validation"))
        gaps = {name: train[name] - validation[name] for name in train
                if name in validation and len(train[name]) == len(validation[name])}
        turns[key] = {name: reversal(gap) for name, gap in gaps.items()}
        begin = mean_of(first_gaps(one, known), margin=MARGIN if key == "jsd" else None)
        ends = mean_of(gap[-1] for gap in gaps.values())
        claimed = ("equal to", "=", MARGIN) if key == "jsd" else ("below", "-", 0.0)
        yield Claim("Oi et al.", f"{title}: training begins {claimed[0]} validation (over folds)",
                    "history.csv", claimed[1], begin, claimed[2])
        yield Claim("Oi et al.", f"{title}: training ends above validation", "history.csv", "+", ends)
    for key in ("recall_at_1", "map_at_r"):
        epochs = np.array([(turns[key][name], turns["jsd"][name]) for name in turns[key]
                           if name in turns["jsd"]]).reshape(-1, 2)
        known = epochs[np.isfinite(epochs).all(axis=1)]
        later = mean_of(known[:, 0] - known[:, 1])
        if later:
            later = later._replace(note="epoch {:.1f} against {:.1f}; {} never".format(
                *known.mean(axis=0), len(epochs) - len(known)))
        yield Claim("Oi et al.", f"{titles[key]}: training passes validation later than in JSD",
                    "history.csv of losses where training passes validation", "+", later)
    falls = [curve[-1] - curve[0] for curve in histories(one, "negative_std", "test").values()
             if len(curve) > 1]
    yield Claim("Oi et al.", "Negative pairs' standard deviation falls in training",
                "histograms.csv of train.py", "-", mean_of(falls))


def score_claims(one, splits):
    """The second paper's claims about scores; splits: the Results of this data set whose classes are split in
    one way or another, [] where these were asked already."""
    titles = {"recall_at_1": "Recall@1", "map_at_r": "MAP@R", "jsd": "JSD"}
    for key, title in titles.items() if splits else ():
        yield Claim("Oi et al.", f"{title} is lower with the default split of classes",
                    "history.csv of --split default and random", "-",
                    split_difference(split_scores(splits, key)))
    changes = class_changes(one)
    for key in ("recall_at_1", "map_at_r"):
        more = [changes[key][name] - jsd for name, jsd in changes["jsd"].items() if name in changes[key]]
        yield Claim("Oi et al.", f"{titles[key]} depends more on the number of classes than JSD",
                    "pairs.csv --classes", "+", mean_of(more))


def class_changes(one):
    """{score: {loss: |relative change| from the fewest classes to all}} of pairs.py --classes."""
    curves, changes = defaultdict(dict), defaultdict(dict)
    for row in one.select("classes", fold="mean"):
        curves[row.key, row.network][row.epoch] = row.value
    for (key, name), curve in curves.items():
        first, last = curve[min(curve)], curve[max(curve)]
        if len(curve) > 1 and first > 0 and one.types[name] != "none":
            changes[key][name] = abs(last / first - 1)
    return changes


def split_scores(everything, key):
    """{loss: {split: [test score of a seed, mean over folds …]}} of the training histories of data sets."""
    seeds, scores = defaultdict(list), defaultdict(lambda: defaultdict(list))
    for one in everything:
        rows = one.select("training", key=key, part="test", epoch="best")
        for row in [row for row in rows if row.fold != "mean"] or rows:
            seeds[row.network, row.split, row.seed].append(row.value)
    for (name, split, _), folds in seeds.items():
        scores[name][split].append(float(np.mean(folds)))
    return scores


def split_difference(scores):
    """Scores (of split_scores) of classes split in their order less at random -> Estimate or None: over the
    losses; of one loss over its seeds."""
    both = [(splits["default"], splits["random"]) for splits in scores.values()
            if {"default", "random"} <= splits.keys()]
    if len(both) == 1:
        return difference_of(*both[0])
    return mean_of(np.mean(one) - np.mean(other) for one, other in both)


# ---------------------------------------------------------------- the table


def conclusions(everything):
    """[Results …] -> [Conclusion …], a row a claim and data set; data sets that lack what it needs share one.

    Their estimate is None, the verdict says what is needed.
    """
    claims = defaultdict(list)  # {(paper, what it says): [(data set, Claim) …]}
    for one in everything:
        splits = [other for other in everything if other.name.split("@")[0] == one.name.split("@")[0]]
        splits = splits if splits[0] is one else []
        for claim in chain(pixel_claims(one), property_claims(one), training_claims(one),
                           score_claims(one, splits)):
            claims[claim.paper, claim.says].append((one.name, claim))
    rows = []
    for several in claims.values():
        absent = [name for name, claim in several if not is_known(claim.estimate)]
        rows += [(name, claim) for name, claim in several if is_known(claim.estimate)]
        if absent:
            rows.append((", ".join(absent), several[0][1]._replace(estimate=None)))
    rows.sort(key=lambda row: row[1].paper)
    p = [claim.estimate.p for _, claim in rows if claim.estimate and claim.estimate.p is not None]
    corrected = iter(holm(p).tolist())
    for data, (paper, says, needs, side, estimate, reference) in rows:
        p_holm, words = None, f"needs {needs}"
        if estimate:
            p_holm = None if estimate.p is None else next(corrected)
            words = verdict(estimate, side, reference, p_holm, len(p))
        yield Conclusion(paper, says, data, estimate, p_holm, words)


def is_known(estimate):
    return estimate is not None and math.isfinite(estimate.value)
