"""conclusions.py: every kind of statement by hand or by another library, verdicts, published numbers."""
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from test_results import SLUGS, add_network, add_training, compare_row, write

from dml_common import conclusions, results

# ---------------------------------------------------------------- tests, by hand


def test_mann_whitney_by_hand():
    assert conclusions.mann_whitney([3, 4], [1, 2]) == (4, pytest.approx(2 / 6))
    # with ties: midranks 1, 2.5 | 2.5, 4; sums of two of them: 3.5, 3.5, 5, 5, 6.5, 6.5, mean 5
    assert conclusions.mann_whitney([1, 2], [2, 3]) == (0.5, pytest.approx(4 / 6))
    assert conclusions.mann_whitney([7, 7], [7, 7]) == (2, 1)
    u, p = conclusions.mann_whitney(range(10, 19), range(5))
    assert (u, p) == (45, pytest.approx(2 / 2002))
    assert 11 * p == pytest.approx(0.011, abs=2e-5)  # nine against five, Holm over eleven: not below


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=4, max_size=8), st.integers(2, 6))
def test_mann_whitney_is_the_enumeration(values, n):
    n, ranks = min(n, len(values) - 2), stats.rankdata(values)
    chosen = itertools.combinations(range(len(values)), n)
    sums = np.array([ranks[list(one)].sum() for one in chosen])
    extreme = np.abs(sums - sums.mean()) >= abs(ranks[:n].sum() - sums.mean()) - 1e-9
    assert conclusions.mann_whitney(values[:n], values[n:])[1] == pytest.approx(extreme.mean())


def test_released_p_is_the_old_default():
    x, y = [1.0, 2.5, 2.5, 4.0, 6.0], [2.5, 5.0, 7.0, 8.0]
    ranks = stats.rankdata(x + y)
    u = len(x) * len(y) + len(x) * (len(x) + 1) / 2 - ranks[:5].sum()
    ties = 1 - sum(t**3 - t for t in np.unique(ranks, return_counts=True)[1]) / (9**3 - 9)
    z = (max(u, 20 - u) - 10 - 0.5) / np.sqrt(ties * 20 * 10 / 12)  # SciPy 1.6: continuity, one tail
    assert conclusions.released_p(x, y) == pytest.approx(stats.norm.sf(abs(z)), abs=1e-12)
    assert conclusions.released_p([1, 1], [1]) == 0.5


def test_interval_of_a_mean_against_scipy():
    values = np.random.default_rng(0).normal(size=30)
    n, mean, deviation, *interval = conclusions.mean_interval(np.append(values, np.nan))
    assert (n, mean, deviation) == (30, pytest.approx(values.mean()), pytest.approx(values.std(ddof=1)))
    np.testing.assert_allclose(interval, stats.t.interval(0.95, 29, mean, deviation / 30**0.5))
    assert conclusions.mean_interval(np.array([2.0])) == [1, 2.0, None, None, None]
    assert conclusions.mean_interval(np.array([np.nan])) == [0, None, None, None, None]


def test_a_mean_by_hand():
    # signs of 1, 2, 3: |sum| 6, 4, 2, 0, 0, 2, 4, 6: two of eight are at least 6
    one = conclusions.mean_of([1, 2, 3])
    low, high = stats.t.interval(0.95, 2, loc=2, scale=1 / 3**0.5)
    assert one[:5] == pytest.approx((2, low, high, 0.25, 0.25)) and one.n == 3
    assert conclusions.mean_of([1, 2, 3], reference=2).p == 1  # −1, 0, 1
    assert conclusions.mean_of([]) is None and conclusions.mean_of([4]) == conclusions.Estimate(4)
    x = np.random.default_rng(0).normal(0.3, 1, 12)
    test = stats.permutation_test((x,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert conclusions.mean_of(x).p == pytest.approx(test.pvalue)
    many = np.random.default_rng(1).normal(0.1, 1, 40)
    assert conclusions.mean_of(many).p == pytest.approx(stats.ttest_1samp(many, 0).pvalue, abs=0.02)


def test_equality_is_two_one_sided_tests():
    x = [0.01, 0.02, -0.01, 0.0]
    higher, lower = (stats.ttest_1samp(x, edge, alternative=side).pvalue
                     for edge, side in ((-0.05, "greater"), (0.05, "less")))
    assert conclusions.mean_of(x, margin=0.05).p == pytest.approx(max(higher, lower))
    assert conclusions.mean_of([0.07, 0.07], margin=0.05).p == 1
    assert conclusions.mean_of([0.02, 0.02], margin=0.05).p == 0


def test_a_difference_is_welchs_and_of_correlations_by_the_delta_method():
    x, y = [3.0, 5.0, 4.5], [1.0, 2.0]
    one, test = conclusions.difference_of(x, y), stats.ttest_ind(x, y, equal_var=False)
    assert one[:4] == pytest.approx((4.1666667 - 1.5, *test.confidence_interval(), 0.2))
    assert one.least == 0.2 and one.note == "4.167 against 1.500, Mann-Whitney, exact" and one.n == 5
    z = conclusions.difference_of([0.5, 0.7], [0.1, 0.3], fisher=True)
    assert z.value == pytest.approx(np.tanh(0.6) - np.tanh(0.2))
    error = 0.1 * np.hypot(1 - np.tanh(0.6)**2, 1 - np.tanh(0.2)**2)
    assert 4.303 < (z.high - z.value) / error < 12.71  # Student's t of 1 to 2 degrees of freedom
    alone = conclusions.difference_of([1.0], [3.0])
    assert alone == conclusions.Estimate(-2, n=2, note="1.000 against 3.000")
    assert conclusions.difference_of([], [1.0]) is None


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=9))
def test_kendall_is_scipys(pairs):
    x, y = np.array(pairs).T
    expected = stats.kendalltau(x, y).statistic
    assert conclusions.kendall(x, y) == pytest.approx(expected, nan_ok=True)


def test_the_order_of_properties_is_kendalls_w_and_taus():
    values = np.random.default_rng(3).normal(size=(5, 7)) + 2 * np.arange(7)
    ranks = stats.rankdata(values, axis=1)
    S = ((ranks.sum(axis=0) - 5 * 8 / 2)**2).sum()
    taus = [stats.kendalltau(a, b).statistic for a, b in itertools.combinations(values, 2)]
    none = np.random.default_rng(4).normal(size=7)
    w, tau, of_none = conclusions.order_agreement(values, none)
    assert w.value == pytest.approx(12 * S / (25 * (7**3 - 7)))
    assert tau.value == pytest.approx(np.mean(taus))
    assert of_none.value == pytest.approx(stats.kendalltau(values.mean(axis=0), none).statistic)
    assert all(one.low <= one.value <= one.high and one.n == 5 for one in (w, tau, of_none))
    assert len([*conclusions.order_agreement(values)]) == 2
    same, _ = conclusions.order_agreement(np.tile(np.arange(6.0), (8, 1)))  # one order: W = 1, surely
    assert same[:3] == pytest.approx((1, 1, 1)) and same.p < 0.001
    noise = np.random.default_rng(5).normal(size=(200, 12, 8))  # no order: a loss drawn twice adds nothing
    drawn = [next(conclusions.order_agreement(one)) for one in noise[:20]]
    assert np.mean([one.value for one in drawn]) == pytest.approx(1 / 12, abs=0.03)
    assert np.mean([(one.low + one.high) / 2 for one in drawn]) == pytest.approx(1 / 12, abs=0.04)


def test_same_group_finds_what_is_there_and_nothing_else():
    groups = dict(zip("abcdefghijklmn", "r" * 9 + "c" * 5))
    generator = np.random.default_rng(2)
    noise = {pair: generator.normal(0, 0.07) for pair in itertools.combinations(groups, 2)}
    shifted = {(a, b): noise[a, b] + (0.9 if groups[a] == groups[b] else 0.6) for a, b in noise}
    test = conclusions.same_group(shifted, groups)
    assert test.value == pytest.approx(np.tanh(0.9) - np.tanh(0.6), abs=0.03) and test.p < 0.005
    assert test.low < test.value < test.high and test.high - test.low < 0.1
    assert conclusions.same_group(noise, groups).p > 0.05
    assert conclusions.same_group(noise, dict.fromkeys(groups, "r")) is None
    assert conclusions.same_group(noise, groups, margin=0.05).p < 0.05


def test_the_jackknife_of_pairs_covers(monkeypatch):
    """95 % intervals hold the truth in 90 % of trials or more, with noise of pairs and of losses."""
    monkeypatch.setattr(conclusions, "PERMUTATIONS", 20)
    groups, generator, inside = dict(zip("abcdefghijklmn", "r" * 9 + "c" * 5)), np.random.default_rng(0), []
    for trial in range(200):
        own = {name: generator.normal(0, (0, 0.1)[trial % 2]) for name in groups}
        z = {(a, b): 0.6 + 0.2 * (groups[a] == groups[b]) + own[a] + own[b] + generator.normal(0, 0.1)
             for a, b in itertools.combinations(groups, 2)}
        one = conclusions.same_group(z, groups)
        inside.append(one.low <= np.tanh(0.8) - np.tanh(0.6) <= one.high)
    assert np.mean(inside[::2]) >= 0.9 and np.mean(inside[1::2]) >= 0.9


def test_distances_are_permuted_within_types():
    """Distances that are nested in types agree more because types do: within the types there is nothing."""
    types = dict(zip("abcdefghijkl", "r" * 6 + "c" * 6))
    distances = dict(zip(types, "eeeeekkkkkke"))
    generator = np.random.default_rng(0)
    z = {(a, b): 0.5 * (types[a] == types[b]) + generator.normal(0, 0.05)
         for a, b in itertools.combinations(types, 2)}
    assert conclusions.same_group(z, distances).p < 0.05
    assert conclusions.same_group(z, distances, types).p > 0.2
    # by hand: of a, b | c, d with distances e, k | e, k there are four ways within types, two and two alike
    pairs = {("a", "c"): 0.4, ("b", "d"): 0.4, ("a", "b"): 0.1, ("c", "d"): 0.1, ("a", "d"): 0,
             ("b", "c"): 0}
    test = conclusions.same_group(pairs, dict(zip("abcd", "ekek")), dict(zip("abcd", "rrcc")))
    assert test.p == pytest.approx(0.5, abs=0.03) and "within types" in test.note


def test_reversal_concentration_and_the_spread_of_a_histogram():
    assert [conclusions.reversal(gap) for gap in ([-1, 1, -1, 2, 3], [1, 2], [1, -1], [0, 1])] == [
        3, 0, pytest.approx(np.nan, nan_ok=True), 1]
    maps = np.zeros((3, 10, 10), np.float16)
    maps[0] = 0.5
    maps[1, 0, :5] = 1
    assert conclusions.concentration(maps) == pytest.approx([0.05, 1, np.nan], nan_ok=True)
    assert results.spread(np.array([1, 0, 0, 1])) == pytest.approx(0.75)  # centres −0.75 and 0.75


@pytest.mark.parametrize("low, high, p, side, reference, expected", [
    (0.1, 0.3, 0.01, "+", 0, "holds"), (0.1, 0.3, 0.06, "+", 0, "can't be told: ±0.14 could"),
    (-0.3, -0.1, 0.9, "+", 0, "does not"), (-0.3, -0.1, 0.01, "-", 0, "holds"),
    (-0.1, 0.3, 0.01, "+", 0, "can't be told: ±0.29 could"), (0.92, 0.98, 0.01, "+", 0.9, "holds"),
    (0.5, 0.8, 0.01, "+", 0.9, "does not"), (-0.03, 0.04, 0.01, "=", 0.05, "holds"),
    (-0.03, 0.07, 0.5, "=", 0.05, "can't be told: ±0.072 could"), (0.06, 0.09, 1.0, "=", 0.05, "does not"),
    (0.1, 0.3, 0.01, "", 0, "rises"), (-0.3, -0.1, 0.01, "", 0, "falls"),
    (0.1, 0.3, 0.2, "", 0, "can't be told: ±0.14 could"),  # 0.1 · 2.807 / 1.960: 5 % over ten tests
    (None, None, None, "+", 0, "can't be told: 3 values")])
def test_verdicts(low, high, p, side, reference, expected):
    estimate = conclusions.Estimate(0.2, low, high, p, n=3)
    assert conclusions.verdict(estimate, side, reference, p, 10).startswith(expected)
    if expected.startswith("can't be told: ±"):
        few = conclusions.verdict(estimate._replace(least=0.01), side, reference, p, 10)
        assert few == "can't be told: 3 values allow no p below 0.01"


# ---------------------------------------------------------------- from results


def told(everything):
    """{what is said: Conclusion} of the rows that have a number, and of those that need something."""
    rows = list(conclusions.conclusions(everything))
    return ({(row.says, row.data): row for row in rows if row.estimate},
            {row.says: row for row in rows if not row.estimate})


def test_the_published_numbers_as_far_as_they_suffice():
    there, absent = told(results.published(0.5))  # truncated per cents: their middles
    none = there["None's maps are nearer to classification than to ranking", "sop"]
    assert none.estimate.note.startswith("0.615 against 0.563")
    assert none.estimate.p == pytest.approx(2 / 2002) and none.verdict == "holds"
    assert there["Maps of one type of loss correlate more than of two", "sop"].verdict == "holds"
    assert there["One order of properties: Kendall's W above 0.9", "cars"].verdict == "holds"
    # Table 6: background value and hue stand above the car's value for None, as the errata say
    assert there["One order of properties: None's tau with the mean above 0.9", "cars"].verdict == "does not"
    assert there["Classification: background properties weigh more", "cars"].verdict == "holds"
    for says in "raises NR-Prec of model", "lowers NR-Prec of bg_color_hue", "lowers NR-Prec of bg_color_val":
        assert there[f"Training {says}", "cars"].verdict == "holds"
    recall = there["Recall@1 is lower with the default split of classes", "cub200"]
    assert recall.estimate.value == pytest.approx(-0.178) and recall.verdict == "can't be told: 2 values"
    assert absent["Positive pairs' mean rises in train"].verdict == "needs history.csv"
    assert absent["Positive pairs' mean rises in train"].data == "cars, sop, cars196, cub200"
    p = [row.estimate.p for row in there.values() if row.estimate.p is not None]
    holms = [row.p_holm for row in there.values() if row.estimate.p is not None]
    np.testing.assert_allclose(holms, conclusions.holm(p))


def history(rising, reverse):
    """Training's curves go up, validation's stay; MAP@R and Recall@1 reverse at epoch `reverse`."""
    header, rows = ["epoch", "split", "positive_mean", "negative_mean", "jsd", "jsd_null", "recall_at_1",
                    "map_at_r"], []
    for epoch in range(5):
        later = 0.1 if epoch >= reverse else -0.1
        rows.append([epoch, "train", 0.5 + rising * epoch, 0, 0.125 * (1 + epoch), 0, *[0.5 + later] * 2])
        rows.append([epoch, "validation", 0.5, 0, 0.375, 0.25, 0.5, 0.5])
    return header, rows


def test_training_scores_classes_and_maps_in_made_up_results(tmp_path):
    folder, models = tmp_path / "cars", tmp_path / "models"
    losses = {SLUGS[name]: name for name in ("Contrastive", "Triplet", "ArcFace", "CosFace", "None")}
    random = np.random.default_rng(0)
    pairs, masks, subsets = [], [], []
    for number, (slug, name) in enumerate(losses.items()):
        for fold in range(2):
            place = add_network(folder, slug, fold, ("emb", "maps", "maps_ceiling"), loss=name)
            sharp = random.random((6, 20, 20)) ** (4 if number < 2 else 1)
            np.save(place / "maps.npy", sharp.astype(np.float16))
            np.save(place / "maps_ceiling.npy", sharp[:, ::-1].astype(np.float16))
            masks.append([name, fold, "share", 6, 0, 0.8 - 0.1 * number, 0.1, 0, 1])
            for k, repeat, recall, jsd in ((2, 0, 0.9, 0.42), (2, 1, 0.7, 0.38),
                                           (10, None, 0.6, 0.36 + 0.01 * number)):
                subsets.append([f"cars/{slug}/fold{fold}/emb.npy", "test", repeat, "class", 0, 0, jsd + 0.1,
                                0.1, 200, recall, 0, 0.5, k])
            home = models / "trained" / "cars" / slug / f"fold{fold}"
            add_training(models, f"cars/{slug}/fold{fold}", type="ranking")
            header, lines = history(0.1 + 0.01 * number, 2 + number)
            results.files.write_table(home / "history.csv", header, [
                *lines, [0, "test", 0, 0, 0, 0, 0, 0], [4, "test", 0, 0, 0, 0, 0, 0]])
            counts = {0: [1, 0, 0, 1], 4: [0, 1 + number, 1, 0]}
            results.files.write_table(home / "histograms.csv", ["epoch", "split", "positive", "negative"], [
                [epoch, "test", 1, n] for epoch, column in counts.items() for n in column])
    for (a, b), fold in itertools.product(itertools.combinations(losses.values(), 2), range(2)):
        kind = {"Contrastive": 0, "Triplet": 0, "ArcFace": 1, "CosFace": 1, "None": 1}
        pairs.append(compare_row(a, b, fold, 0.8 if kind[a] == kind[b] else 0.5 + 0.01 * fold))
    write(folder, "compare", pairs)
    write(folder, "masks", masks)
    write(folder, "pairs", subsets, "classes")
    there, absent = told([results.read(folder, models)])
    there = {says: row.estimate for (says, _), row in there.items()}
    same = there["Maps of one type of loss correlate more than of two"]
    assert same.value == pytest.approx(0.295, abs=1e-3)
    assert there["None's maps are nearer to classification than to ranking"].value == pytest.approx(
        0.295, abs=1e-3)
    # 1 − share: 0.4 and 0.5 of the classification losses, 0.2 and 0.3 of the others
    assert there["Classification: more saliency lies outside the object"].value == pytest.approx(0.2)
    sharp = there["Ranking: more of the saliency in a map's top 5% of pixels"]
    assert sharp.value > 0.05 and "a map's noise 0.0000" in sharp.note
    assert there["Positive pairs' mean rises in train"].value == pytest.approx(4 * 0.115)
    assert there["Positive pairs' mean rises by less than 0.05 in validation"].high == 0
    begins = there["JSD: training begins equal to validation (over folds)"]
    assert begins.value == pytest.approx(0.0) and begins.n == 2  # each above its null
    assert there["JSD: training ends above validation"].value == 0.5
    assert there["Recall@1: training begins below validation (over folds)"].value == pytest.approx(-0.1)
    later = there["MAP@R: training passes validation later than in JSD"]  # epochs 2, 3, 4 and never, of 1
    assert later.value == 2 and later.note == "epoch 3.0 against 1.0; 1 never" and later.n == 3
    deviations = [-0.75 + 0.5 * np.sqrt((1 + n) / (2 + n)**2) for n in range(4)]  # of 1 + n and 1 counts
    falls = there["Negative pairs' standard deviation falls in training"]
    assert falls.value == pytest.approx(np.mean(deviations))
    # Recall@1 goes from 0.8 to 0.6, JSD above its null from 0.4 to 0.36 + …: 0.25 less 0.1 − 0.025 n
    more = there["Recall@1 depends more on the number of classes than JSD"]
    assert more.value == pytest.approx(np.mean([0.25 - abs(0.1 - 0.025 * n) for n in range(4)]))
    assert {row.verdict for says, row in absent.items() if "default split" in says} == {
        "needs history.csv of --split default and random"}
    assert absent["One order of properties: Kendall's W above 0.9"].verdict == "needs nrprec.csv with None"


def test_trained_against_untrained_and_an_old_history_without_jsd_null(tmp_path):
    values = {"Triplet": (5, 1), "ArcFace": (7, 2), "None": (3, 4)}
    write(tmp_path / "cars", "nrprec", [(loss, 0, name, value) for loss, both in values.items()
                                        for name, value in zip(("model", "bg_hue"), both)])
    add_network(tmp_path / "cars", "triplet")
    lines = [[epoch, part, 0.5, 0, jsd, 0.5, 0.5] for epoch in (0, 1) for part, jsd in (
        ("train", 0.1), ("validation", 0.5))]
    add_training(tmp_path, "cars/triplet/fold0", lines)
    one = results.read(tmp_path / "cars", tmp_path)
    there, absent = told([one])
    assert absent["MAP@R: training passes validation later than in JSD"].verdict == \
        "needs history.csv of losses where training passes validation"
    assert there["Training raises NR-Prec of model", "cars"].estimate.value == 3  # 5 − 3, 7 − 3
    assert there["Training lowers NR-Prec of bg_hue", "cars"].estimate.value == -2.5
    assert there["JSD: training begins equal to validation (over folds)", "cars"].estimate.value == -0.4
    assert any("no jsd_null" in line for line in one.warnings)
