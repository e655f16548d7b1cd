"""The kernel's counts and lists equal float64 brute force, with ties in expectation and by index: for every
distance, cardinality, kind of input, block, thread count and instruction set."""
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from contextlib import contextmanager
from itertools import product

import numpy as np
import pytest
from conftest import ROOT, embeddings_of
from hypothesis import given, settings
from hypothesis import strategies as st

import nrprec

_knn = nrprec._knn
if _knn is None:
    pytest.skip("this version's extension is not built: pip install .", allow_module_level=True)
ISAS = _knn.ISAS                                 # every path that this processor has


@contextmanager
def using(isa):
    """The kernel's loops of one instruction set; None: as they are."""
    before = _knn.ISA
    _knn.use(isa or before)
    try:
        yield
    finally:
        _knn.use(before)


def brute_force_distances(x, distance):
    """The literal definition, independent of nrprec.py: d[q, i]."""
    x, rows = x.astype(np.float64), []
    for q in range(len(x)):
        if distance in ("euclidean", "squared_euclidean"):
            d = ((x[q] - x) ** 2).sum(1)
            d = np.sqrt(d) if distance == "euclidean" else d
        elif distance == "cosine":
            unit = x / np.sqrt((x ** 2).sum(1))[:, None]
            d = 1 - (unit[q] * unit).sum(1)
        elif distance == "dot_product":
            d = -(x[q] * x).sum(1)
        else:
            d = np.var(x[q] - x, axis=1) / np.var(x[q])
        rows.append(d)
    return np.array(rows)


def brute_force_hits(d, labels, max_neighbours=None, by_index=False):
    """(4, k, n): sure hits, candidates tied at a cut that divides them, hits among these, places left."""
    hits, others = np.zeros((4, len(labels), len(d)), int), ~np.eye(len(d), dtype=bool)
    lists = [np.lexsort((np.arange(len(d)), row)) for row in d]                # nearest first, ties by index
    for k, label in enumerate(labels):
        for q, order in enumerate(lists):
            order = order[order != q]
            same = (label == label[q]) & others[q]
            depth = min(same.sum(), max_neighbours or len(d))
            if not depth:
                continue
            cut = d[q, order[depth - 1]]
            nearer, tied = (d[q] < cut) & others[q], (d[q] == cut) & others[q]
            hits[0, k, q] = same[order[:depth]].sum()
            if nearer.sum() + tied.sum() > depth:
                hits[1:, k, q] = tied.sum(), 0, depth - nearer.sum()
                if not by_index:
                    hits[0, k, q], hits[2, k, q] = (same & nearer).sum(), (same & tied).sum()
    return hits


def kernel_hits(x, labels, distance, max_neighbours=None, threads=1, memory_mib=64, isa=None, by_index=0,
                **options):
    space, columns = nrprec.prepare(x, distance, **options), nrprec.make_columns(labels, max_neighbours)
    hits = np.full((4, len(labels), len(space.rows)), -1, np.int32)
    with using(isa):
        queries = np.arange(len(space.rows))
        for part, block in nrprec.count_blocks(space, columns, queries, threads, memory_mib, by_index):
            hits[..., part] = block
    return hits


KINDS = ("normal", "integers", "duplicates", "identical", "signs", "tiny", "huge", "far", "outlier", "nearly")


@pytest.mark.parametrize("distance", nrprec.DISTANCES)
@pytest.mark.parametrize("kind", KINDS)
def test_counts_equal_brute_force(kind, distance):
    rng = np.random.default_rng([KINDS.index(kind), nrprec.DISTANCES.index(distance)])
    for n, m in ((2, 1), (3, 2), (65, 7), (150, 8), (211, 130), (130, 300)):
        x = embeddings_of(kind, n, m, rng)
        labels = [rng.integers(0, v, n) for v in (1, 2, 3, 10, max(2, n // 3), n)] + [np.arange(n)]
        try:
            nrprec.as_embeddings(x, distance)
        except ValueError:
            assert distance in ("cosine", "snr")                # of zero or constant vectors
            continue
        d = brute_force_distances(x, distance)
        space, columns = nrprec.prepare(x, distance), nrprec.make_columns(labels)
        for by_index in (False, True):
            twin = nrprec.count_hits_numpy(space, columns, np.arange(n), by_index)
            np.testing.assert_array_equal(twin, brute_force_hits(d, labels, by_index=by_index))
            for isa, first in product(ISAS, (0, 3)):            # from 3 on far candidates can be left out
                ours = kernel_hits(x, labels[first:], distance, isa=isa, by_index=by_index)
                np.testing.assert_array_equal(ours, twin[:, first:])
            np.testing.assert_array_equal(kernel_hits(x, labels, distance, 5, by_index=by_index),
                                          brute_force_hits(d, labels, 5, by_index))


@pytest.mark.parametrize("distance", nrprec.DISTANCES)
@pytest.mark.parametrize("dtype", (np.float16, np.float32, np.float64))
def test_rows_of_a_file_as_they_lie_there(dtype, distance, tmp_path):
    """Half, single or double precision, some of the rows, of length 1: as the float32 rows made of them."""
    rng = np.random.default_rng(9)
    x = np.round(rng.standard_normal((180, 5)) * 8).astype(dtype) + dtype(0.25 + 1e-9)       # rounded off
    x[:20] *= dtype(2.0 ** -20)                                                # half's denormal numbers
    rows, labels = np.flatnonzero(rng.random(180) < 0.7), [rng.integers(0, v, 180) for v in (2, 30)]
    np.save(tmp_path / "x.npy", x)
    mapped, some = np.load(tmp_path / "x.npy", mmap_mode="r"), [label[rows] for label in labels]
    made = x[rows].astype(np.float32)
    unit = made.astype(np.float64) / np.sqrt((made.astype(np.float64) ** 2).sum(1, keepdims=True))
    for expected, normalise in ((made, False), (unit.astype(np.float32), True)):
        hits = brute_force_hits(brute_force_distances(expected, distance), some)
        for isa in ISAS:
            ours = kernel_hits(mapped, some, distance, rows=rows, normalise=normalise, isa=isa)
            np.testing.assert_array_equal(ours, hits)


@pytest.mark.parametrize("kind", ("normal", "integers", "signs", "identical"))
def test_permuted_columns(kind):
    """Copies of the columns under permutations count as columns of their own do: with planes for all values,
    with rare ones and with more than 16 frequent ones, tied and not; one copy, too."""
    rng = np.random.default_rng(12)
    n = 333
    x = embeddings_of(kind, n, 5, rng)
    for cards in ((2, 3, 10), (2, 60), (20, 3)):
        labels = [rng.integers(0, v, n) for v in cards]
        space, columns = nrprec.prepare(x, "euclidean"), nrprec.make_columns(labels)
        drawn = [np.arange(n)] + [rng.permutation(n) for _ in range(6)]
        loose = nrprec.make_columns([label[p] for p in drawn for label in labels])
        expected = nrprec.count_hits_numpy(space, loose, np.arange(n))
        for isa in ISAS:
            with using(isa):
                batch = nrprec.permute_columns(columns, drawn)
                np.testing.assert_array_equal(nrprec.values_of(batch, np.arange(n)).shape, loose.values.shape)
                for threads in (1, 2):
                    for part, hits in nrprec.count_blocks(space, batch, np.arange(n), threads, 64):
                        np.testing.assert_array_equal(hits, expected[..., part])
        np.testing.assert_array_equal(nrprec.count_hits_numpy(space, batch, np.arange(n)), expected)


def test_permuted_columns_without_any_neighbour():
    """All values are distinct: no R, no threshold, nothing to share."""
    x, labels = np.eye(10, dtype=np.float32), {"a": np.arange(10)}
    score = nrprec.nr_precision(x, labels, permutations=5)["a"]
    assert (score.queries, score.skipped) == (0, 10) and np.isnan([score.nr_precision, score.p_value]).all()


def test_many_candidates_and_a_class_column():
    """n that no block divides, more candidates than a chunk, 20,000 classes beside one of half."""
    rng = np.random.default_rng(5)
    n = 40_007
    x = np.round(rng.standard_normal((n, 6)) * 4).astype(np.float32) / 4      # ties across the whole range
    classes = np.where(rng.random(n) < 0.5, 0, rng.integers(0, 20_000, n))
    labels = [rng.integers(0, 9, n), classes, rng.integers(0, 2, n)]
    queries = np.sort(rng.choice(n, 40, replace=False))
    space, columns = nrprec.prepare(x, "euclidean"), nrprec.make_columns(labels)
    expected = nrprec.count_hits_numpy(space, columns, queries)
    for isa in ISAS:
        with using(isa):
            for part, hits in nrprec.count_blocks(space, columns, queries, 2, 64):
                np.testing.assert_array_equal(hits, expected[..., part])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("near", (True, False))
def test_a_sample_that_misleads(isa, near, monkeypatch):
    """The candidates that tell the keys' range are near one another, or the others are: where too few have
    keys then, all get one."""
    rng, n = np.random.default_rng(11), 20_000
    x = rng.standard_normal((n, 4)).astype(np.float32) + 50
    labels = [rng.integers(0, 6, n), rng.integers(0, 12, n)]
    space = nrprec.prepare(x, "euclidean")
    sampled = np.isin(np.arange(n), np.random.default_rng(0).choice(n, nrprec.SAMPLE, replace=False))
    x[sampled == near] -= 50
    space, columns = nrprec.prepare(x, "euclidean"), nrprec.make_columns(labels)
    queries = np.concatenate([np.flatnonzero(sampled)[:10], np.flatnonzero(~sampled)[:10]])
    expected, once, again = nrprec.count_hits_numpy(space, columns, queries), nrprec.count_hits, []

    def count_hits(*args):
        again.append(args[-1] is True)
        return once(*args)

    monkeypatch.setattr(nrprec, "count_hits", count_hits)
    with using(isa):
        for part, hits in nrprec.count_blocks(space, columns, queries, 1, 64):
            np.testing.assert_array_equal(hits, expected[..., part])
    assert any(again) == (isa != "scalar")


@pytest.mark.parametrize("isa", ISAS)
def test_more_thresholds_than_one_pass_takes(isa):
    """100 columns, each value of each with an R of its own: some 80 thresholds for a query."""
    rng, n = np.random.default_rng(13), 400
    labels = [rng.random(n) < rng.uniform(0.05, 0.3) for _ in range(100)]
    x = np.round(rng.standard_normal((n, 3)) * 4).astype(np.float32)                 # many ties
    hits = brute_force_hits(brute_force_distances(x, "euclidean"), labels)
    np.testing.assert_array_equal(kernel_hits(x, labels, "euclidean", isa=isa), hits)


@pytest.mark.parametrize("threads", (1, 2, 5))
@pytest.mark.parametrize("memory_mib", (1, 3, 64))
def test_blocks_and_threads_change_nothing(threads, memory_mib):
    rng = np.random.default_rng(6)
    x = rng.standard_normal((1003, 19)).astype(np.float32)[rng.integers(0, 900, 1003)]
    labels = [rng.integers(0, v, 1003) for v in (3, 40, 700)]
    expected = kernel_hits(x, labels, "cosine")
    for isa in ISAS:
        hits = kernel_hits(x, labels, "cosine", threads=threads, memory_mib=memory_mib, isa=isa)
        np.testing.assert_array_equal(hits, expected)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("by_index", [False, True])
def test_permuted_columns_share_what_a_query_retrieves(isa, by_index):
    """Hits, ties and places of every copy, with few thresholds and with more than a byte tells."""
    rng, n = np.random.default_rng(0), 700
    x = np.round(rng.standard_normal((n, 4)) * 3).astype(np.float32)  # many ties
    space, drawn = nrprec.prepare(x, "euclidean"), [np.arange(n), *(rng.permutation(n) for _ in range(4))]
    few = [rng.integers(0, values, n) for values in (2, 3, 10)]
    many = [rng.random(n) < share for share in np.linspace(0.05, 0.5, 200)]
    for labels, copies, least, most in ((few, 5, 1, 127), (few, 1, 1, 127), (many[::2], 3, 128, 255),
                                        (many, 2, 256, 400)):
        columns = nrprec.make_columns(labels)
        assert least <= len(columns.ranks) <= most
        with using(isa):
            columns = nrprec.permute_columns(columns, drawn[-copies:])
            expected = nrprec.count_hits_numpy(space, columns, np.arange(0, n, 10), by_index)
            for part, hits in nrprec.count_blocks(space, columns, np.arange(0, n, 10), 2, 64, by_index):
                np.testing.assert_array_equal(hits, expected[..., part])


@pytest.mark.parametrize("isa", ISAS)
def test_permuted_columns_of_many_candidates(isa):
    """Planes of several pieces of 8,192 pictures, the last one short."""
    rng, n = np.random.default_rng(1), 17_000
    space = nrprec.prepare(rng.standard_normal((n, 3)).astype(np.float32), "euclidean")
    columns = nrprec.make_columns([rng.integers(0, values, n) for values in (3, 10)])
    drawn, queries = [rng.permutation(n) for _ in range(3)], np.sort(rng.choice(n, 30, replace=False))
    with using(isa):
        columns = nrprec.permute_columns(columns, drawn)
        for part, hits in nrprec.count_blocks(space, columns, queries, 1, 64):
            expected = nrprec.count_hits_numpy(space, columns, queries[part])
            np.testing.assert_array_equal(hits, expected)


def test_passes_over_the_permutations_change_nothing(monkeypatch):
    """As few at a time as memory has room for: a last pass of one, passes of one."""
    rng = np.random.default_rng(2)
    x, labels = rng.standard_normal((300, 4)), {"a": rng.integers(0, 4, 300), "b": rng.integers(0, 40, 300)}
    expected = nrprec.nr_precision(x, labels, permutations=7)
    for at_a_time in (1, 3, 6):
        monkeypatch.setattr(nrprec, "permutations_at_a_time", lambda columns, memory_mib, k=at_a_time: k)
        assert nrprec.nr_precision(x, labels, permutations=7) == expected


def test_the_command_says_where_memory_holds_fewer_threads(tmp_path, run_script):
    np.save(tmp_path / "emb.npy", np.random.default_rng(3).standard_normal((20_000, 2)).astype(np.float32))
    np.save(tmp_path / "labels.npy", np.arange(20_000) % 3)
    command = [tmp_path / "emb.npy", tmp_path / "labels.npy", "--queries", "30", "--threads", "4"]
    for options in ((), ("--permutations", "9")):
        said = run_script("nrprec.py", *command, *options, "--memory-mib", "2")
        workers, needed = re.search(r"2 holds (\d) of 4 threads at work, (\d+) all", said.stderr).groups()
        assert said.returncode == 0 and workers == "1"
        assert "at work" not in run_script("nrprec.py", *command, *options, "--memory-mib", needed).stderr


def disturb(monkeypatch, bounds, rng):
    """Similarities are wrong by up to their bound henceforth. → the queries of each call of count_hits()."""
    count, make, asked = nrprec.count_hits, _knn.make_keys, []

    def count_hits(space, columns, planes, queries, *more):
        asked.append(queries)
        return count(space, columns, planes, queries, *more)

    def make_keys(vectors, panels, offset, ranges, keys, kept, number):
        for b, q in enumerate(asked[-1]):
            one, noise = slice(b, b + 1), rng.choice([-0.9, 0.0, 0.9], len(offset)) * bounds[q]
            make(vectors[one], panels, (offset + noise).astype(np.float32), ranges[one], keys[one], kept[one],
                 number[one])

    monkeypatch.setattr(nrprec, "count_hits", count_hits)
    monkeypatch.setattr(_knn, "make_keys", make_keys)
    return asked


@pytest.mark.parametrize("isa", ISAS)
def test_products_may_be_as_wrong_as_their_bound(isa, monkeypatch):
    """Whatever the order of adding up: similarities disturbed by up to the bound give the same counts."""
    rng = np.random.default_rng(8)
    x = np.round(rng.standard_normal((400, 12)) * 8).astype(np.float32) / 8
    x[200:] = x[:200] * (1 + rng.integers(-1, 2, (200, 1)) * np.float32(2.0 ** -20))   # near ties
    labels = [rng.integers(0, v, 400) for v in (2, 6, 80)]
    space, columns, q = nrprec.prepare(x, "euclidean"), nrprec.make_columns(labels), np.arange(400)
    expected, asked = nrprec.count_hits_numpy(space, columns, q), disturb(monkeypatch, space.bounds, rng)
    with using(isa):
        for kept in (labels, labels[1:]) * 5:                    # keys of all candidates, of the nearest
            for part, hits in nrprec.count_blocks(space, nrprec.make_columns(kept), q, 1, 64):
                np.testing.assert_array_equal(hits, expected[:, -len(kept):, part])
    assert len(np.concatenate(asked)) >= 4000


@pytest.mark.parametrize("isa", ISAS)
def test_keys_that_end_within_the_error_of_the_threshold(isa, monkeypatch):
    """Where what was left out may be among the nearest, by products as wrong as their bound, all get keys."""
    rng, n, sent = np.random.default_rng(10), 400, []
    x = np.round(rng.standard_normal((n, 12)) * 8).astype(np.float32) / 8
    x[200:] = x[:200] * (1 + rng.integers(-1, 2, (200, 1)) * np.float32(2.0 ** -20))        # near ties
    x[0] *= 40                                                                 # makes keys coarse
    space, columns = nrprec.prepare(x, "euclidean"), nrprec.make_columns([rng.integers(0, 6, n)])
    vectors, asked = space.vectors(np.arange(n)), disturb(monkeypatch, space.bounds, rng)
    similarities = vectors.astype(np.float64) @ vectors.T + space.offset[:n]
    similarities[np.arange(n), np.arange(n)] = -9
    similarities, choose = np.sort(similarities, 1)[:, ::-1].astype(np.float32), _knn.choose_ranges

    def choose_ranges(sample, depth, bounds, n, ranges):
        choose(sample, depth, bounds, n, ranges)
        sent.append((depth == n).all())
        for b in () if sent[-1] else range(len(depth)):
            most = similarities[asked[-1][b]]
            low = most[depth[b] - 1] - np.float32(rng.uniform(0, 4) * bounds[b])
            ranges[b] = low, np.float32(65534) / (np.float32(1.5) * (most[0] - low)), isa != "scalar"

    monkeypatch.setattr(_knn, "choose_ranges", choose_ranges)
    with using(isa):
        blocks = nrprec.count_blocks(space, columns, np.arange(n), 1, 64)
        hits = np.concatenate([hits for _, hits in blocks], 2)
    np.testing.assert_array_equal(hits, nrprec.count_hits_numpy(space, columns, np.arange(n)))
    assert sent == ([False, True] * 3 if isa != "scalar" else [False] * 3)
    assert isa == "scalar" or sum(map(len, asked)) > n + 100


@pytest.mark.parametrize("isa", ISAS)
@given(st.integers(1, 40), st.integers(1, 200), st.integers(1, 70), st.integers(0, 2 ** 32 - 1))
@settings(max_examples=30, deadline=None)
def test_products_are_within_their_bound(isa, queries, n, m, seed):
    """Of any numbers of queries, candidates and dimensions, against float64; what is behind the last is 0."""
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal((rows, m)).astype(np.float32) for rows in (queries, n))
    panels = _knn.panels_of(b)
    out = np.full((queries, len(panels) * nrprec.PANEL), np.nan, np.float32)
    with using(isa):
        _knn.multiply(a, panels, out)
    bound = 1.05 * 2.0 ** -24 * m * (np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1))
    assert (abs(out[:, :n] - a.astype(np.float64) @ b.T) <= bound).all() and not out[:, n:].any()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_small_input(data):
    n, m = data.draw(st.integers(2, 30)), data.draw(st.integers(1, 10))
    finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
    value = st.one_of(st.integers(-2, 2).map(float), finite)
    x = np.array(data.draw(st.lists(value, min_size=n * m, max_size=n * m)), np.float32).reshape(n, m)
    most = data.draw(st.sampled_from((4, n)))
    labels = [np.array(data.draw(st.lists(st.integers(0, most), min_size=n, max_size=n)))]
    distance = data.draw(st.sampled_from(nrprec.DISTANCES))
    try:
        space = nrprec.prepare(nrprec.as_embeddings(x, distance), distance)
    except ValueError:
        return
    twin = nrprec.count_hits_numpy(space, nrprec.make_columns(labels), np.arange(n))
    for isa in ISAS:
        np.testing.assert_array_equal(kernel_hits(x, labels, distance, isa=isa), twin)


def test_what_the_processor_lacks_is_refused(tmp_path, run_script):
    """KNN_ISA is read once; an unknown one ends the command that would use it."""
    np.save(tmp_path / "emb.npy", np.eye(4, dtype=np.float32))
    (tmp_path / "props.csv").write_text("class\nr\nr\nb\nb\n")
    for script in ("nrprec.py", "pairs.py"):
        result = run_script(script, tmp_path / "emb.npy", tmp_path / "props.csv",
                            "--out", tmp_path / "out.csv", env={**os.environ, "KNN_ISA": "neon"})
        assert result.returncode == 2 and not (tmp_path / "out.csv").exists()
        assert len(result.stderr.splitlines()) == 1 and result.stderr.endswith(
            f"KNN_ISA is 'neon'; expected one of {', '.join(ISAS)}, which this processor has\n")


def test_the_kernel_compiles_for_arm64(tmp_path):
    """Warnings are errors. .ci/run installs the cross compiler where it may."""
    compiler = shutil.which("aarch64-linux-gnu-gcc") or pytest.skip("there is no aarch64-linux-gnu-gcc here")
    pytest.importorskip("Cython")
    cython = [sys.executable, "-m", "cython", "-3", ROOT / "_knn.pyx", "-o", tmp_path / "_knn.c"]
    subprocess.run(cython, check=True)
    compile_it = [compiler, "-c", "-O3", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror",
                  "-Wno-unused-parameter", "-I", sysconfig.get_paths()["include"], tmp_path / "_knn.c",
                  "-o", tmp_path / "_knn.o"]
    subprocess.run(compile_it, check=True)
