"""What nrprec.py's table of properties says before anything is counted, bins, values, who depends on whom;
and the table that the terminal shows afterwards."""
from contextlib import suppress
from itertools import combinations

import numpy as np
from scipy.special import gammaincc

from dml_common import command, files

MOST_PAIRED = 500    # properties that are tested in pairs: some seconds
SIGNIFICANCE = 0.01  # of Holm-corrected p-values: nrprec.py's p_holm, two properties' dependence
PUBLISHED_THRESHOLD = 2.576  # two-sided 1 % of one z-score; the paper marks the mean of n of them by it
SHOWN = (("R-Prec", "r_precision", 4), ("NR-Prec", "nr_precision", 2), ("± s.e.", "nr_precision_se", 2),
         ("p_holm", "p_holm", 4))


def read(table, pictures, args, notes):
    """The pictures' properties as {name: array}, chosen and binned. ValueError says what is wrong."""
    names = [name.strip() for name in args.properties.split(",")] if args.properties is not None else None
    labels = files.read_properties(table, names, pictures, notes, files.missing_spellings(args.missing))
    uncut = list(labels)
    for option in args.bin:
        name, _, bins = option.rpartition("=")
        if name not in uncut or not bins.isdecimal() or int(bins) < 2:
            raise ValueError(f"--bin {option}: expected PROPERTY=N with a whole number from 2 and one of "
                             f"{', '.join(labels)}, each once")
        labels[name] = quantile_bins(name, labels[name], int(bins))
        uncut.remove(name)
    return labels


def quantile_bins(name, values, bins):
    """A numeric column (n,) of str -> (n,) float: its bin's largest number, of so many equally full bins.

    Of an empty text it is nan. Raises ValueError for what is no number.
    """
    here, binned = values != "", np.full(len(values), np.nan)
    for row in np.flatnonzero(here):
        with suppress(ValueError):
            binned[row] = float(values[row])
        if not np.isfinite(binned[row]):
            raise ValueError(f"--bin {name}={bins}: row {row} (counting from 0) of {name!r} is "
                             f"{str(values[row])!r}; only numbers can be binned")
    numbers = binned[here]
    if len(numbers):
        ends = np.quantile(numbers, np.arange(1, bins) / bins, method="inverted_cdf")
        lower = numbers[numbers < numbers.max()]          # an end at the maximum leaves nothing above
        ends = np.minimum(ends, lower.max()) if len(lower) else ends
        ends = np.unique(np.append(ends, numbers.max()))
        binned[here] = ends[np.searchsorted(ends, numbers)]
    return binned


def warnings(coded, args):
    """What is known before counting, a line each.

    coded: {name: (its distinct values, which one a picture has (n,) int, −1: none)}, as of nrprec.encode.
    """
    _, first = next(iter(coded.values()))
    n = len(first)
    if args.queries is not None and args.queries > n:
        yield f"--queries {args.queries:,} is more than the {n:,} pictures: all are used"
    for name, (values, codes) in coded.items():
        known = np.count_nonzero(codes >= 0)
        if known < n:
            yield (f"{name}: {n - known:,} of {n:,} pictures have no value: they are no queries and no "
                   "candidates of this property")
        if len(values) < 2:
            yield f"{name} is constant: its NR-Prec is not defined (nan)"
        elif len(values) > known / 2:
            yield (f"{name} has {len(values):,} values for {known:,} pictures: hardly any has a neighbour to "
                   f"find; cut it with --bin {name}=10 or leave it out with --properties")
    if len(coded) > MOST_PAIRED:
        yield (f"{len(coded):,} properties are more than {MOST_PAIRED}: whether they depend on each other, "
               "which the method assumes they don't, is not tested")
    columns = {name: codes for name, (_, codes) in coded.items()}
    for a, b, v, p in dependent_pairs(columns) if len(coded) <= MOST_PAIRED else ():
        yield (f"{a} and {b} depend on each other (Cramér's V {v:.2f}, Holm-corrected p {p:.1g}): "
               "the method assumes independent properties, so one may show for the other")
    if 0 < args.permutations < 1000:
        yield f"{args.permutations} permutations: fewer than 1,000 give coarse p-values"
    sizes = [len(values) for values, _ in coded.values() if len(values) > 1]
    for what, number in ("properties", len(sizes)), ("values", sum(sizes) * args.per_value):
        if args.permutations and number / (1 + args.permutations) >= SIGNIFICANCE:
            yield (f"{args.permutations:,} permutations of {number:,} {what} can't give p_holm < "
                   f"{SIGNIFICANCE}: nothing can be marked; use --permutations {100 * number:,} or more")


def dependent_pairs(codes, level=SIGNIFICANCE):
    """Pairs of properties that depend on each other: [(name, name, Cramér's V, Holm-corrected p)].

    codes: {name: (n,) int, −1: no value}. Pictures without a value of both are left out.
    """
    tested = []
    for (a, code_a), (b, code_b) in combinations(codes.items(), 2):
        both = (code_a >= 0) & (code_b >= 0)
        v_and_p = chi_square(code_a[both], code_b[both])
        tested += [(a, b, *v_and_p)] if v_and_p else []
    adjusted = holm([p for *_, p in tested])
    return [(a, b, v, float(p)) for (a, b, v, _), p in zip(tested, adjusted) if p < level]


def chi_square(a, b):
    """(Cramér's V, p) of two columns of codes (n,) int from 0; None if one is constant or all distinct.

    The distribution of chi-square is taken for a gamma distribution with the mean and variance that it has
    under all permutations of one column (Mielke & Berry 1985): right for rare values too, where the usual one
    gives false alarms. V is bias-corrected (Bergsma 2013).
    """
    if not len(a):
        return None
    cells, observed = np.unique(a.astype(np.int64) * (b.max() + 1) + b, return_counts=True)
    row, column = np.divmod(cells, b.max() + 1)
    count_a, count_b = np.bincount(row, observed), np.bincount(column, observed)
    shares = observed.astype(np.float64) ** 2 / count_a[row] / count_b[column]
    count_a, count_b = count_a[count_a > 0], count_b[count_b > 0]
    n, r, c = len(a), len(count_a), len(count_b)
    if n < 4 or min(r, c) < 2 or max(r, c) == n:
        return None
    chi2 = n * (shares.sum() - 1)
    v1, v2 = (r - 1) * (n - r) / (n - 1), (c - 1) * (n - c) / (n - 1)
    w1, w2 = ((n / count_a).sum() - r * r) / (n - 2), ((n / count_b).sum() - c * c) / (n - 2)
    mean = n * (r - 1) * (c - 1) / (n - 1)
    variance = 2 * n * (v1 - w1) * (v2 - w2) / (n - 3) + n * n * w1 * w2 / (n - 1)
    phi2 = max(0.0, chi2 / n - (r - 1) * (c - 1) / (n - 1))
    least = min(r - (r - 1) ** 2 / (n - 1), c - (c - 1) ** 2 / (n - 1)) - 1
    return float(np.sqrt(phi2 / least)), float(gammaincc(mean * mean / variance, chi2 * mean / variance))


def holm(p_values):
    """Holm's correction of p-values (k,) -> (k,); nan stays nan and does not count."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")[:np.count_nonzero(~np.isnan(p))]                  # nan comes last
    adjusted = np.full(len(p), np.nan)
    adjusted[order] = np.maximum.accumulate(np.minimum(1.0, np.arange(len(order), 0, -1) * p[order]))
    return adjusted


def print_results(names, results, permutations):
    """Of one embedding its properties in rows; of several NR-Prec alone, one in a row."""
    def rounded(value, digits):
        return f"{round(value, digits) + 0.0:.{digits}f}"    # never −0.00

    lines = [["NR-Prec", *(" ".join(name.split()) for name in results[0])]]
    for name, scores in zip(names, (list(r.values()) for r in results)):
        marks = ["*" if (s.p_holm < SIGNIFICANCE if permutations
                         else s.nr_precision > PUBLISHED_THRESHOLD) else "" for s in scores]
        lines.append([name, *(rounded(s.nr_precision, 2) + (mark or " ") for s, mark in zip(scores, marks))])
    if len(results) == 1:
        columns = [["property", *lines[0][1:]], ["values", *(f"{s.values:,}" for s in scores)],
                   ["queries", *(f"{s.queries:,}" for s in scores)]]
        for heading, field, digits in SHOWN:
            if getattr(scores[0], field) is not None:
                columns.append([heading, *(rounded(getattr(s, field), digits) for s in scores)])
        lines = list(zip(*columns, ["", *marks]))
    command.print_aligned(lines)
    print(f"\n* p_holm < {SIGNIFICANCE}: {permutations:,} permutations of each property, "
          f"Holm-corrected over {len(results[0])} properties" if permutations else
          f"\n* NR-Prec > {PUBLISHED_THRESHOLD}: the published mark, one z-score's 1 % threshold applied to "
          "a mean of many; --permutations N tests the mean")
