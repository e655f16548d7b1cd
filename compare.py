"""How far networks agree: saliency maps pair by pair, objects' masks, embeddings (Kobs et al. 2021, sec. 3).

Input:  maps.npy files of saliency.py (or any arrays (n, H, W) in [0, 1]), two or more, of the same pictures
Output: compare.csv    model_a,fold_a,model_b,fold_b,n,left_out,correlation,correlation_std,correlation_low,
                       correlation_high,jsd,jsd_std,ceiling,corrected,order,samples: one row a pair (order and
                       samples are the maps', empty where the two differ); jsd_nats with --as-published
        masks.csv      (--masks) share of saliency inside the object, its chance level, the pointing game
        embeddings.csv (--embeddings) linear CKA (unbiased; the biased one beside it) and common neighbours of
                       the emb.npy beside the maps

    python compare.py results/cars196/*/fold*/maps.npy --out compare.csv
    python compare.py --dataset cars196 --figure agreement.png
    python compare.py a.npy b.npy --out pair.csv --per-picture pairs.npy
    python compare.py maps.npy --masks pictures/masks --out masks.csv
    python compare.py --dataset cars196 --embeddings

Read the correlations beside their ceiling. A map of 50 noisy copies is an estimate: two runs of one network
that differ in noise alone agree far from perfectly, and no two networks can agree better. `ceiling` is this
limit, from the maps_ceiling.npy of `saliency.py --ceiling`; `corrected` is correlation / ceiling. Maps that
share their noise agree too well: where all have second maps, each is compared with the others' second ones.
"""
if __name__ == "__main__":
    import sys
    try:
        from dml_common import command
    except ImportError:
        print("compare.py: the command needs the folder dml_common/ beside it; copy that too",
              file=sys.stderr)
        sys.exit(2)
    command.begin()

import contextlib
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial.distance import squareform
from scipy.special import stdtrit
from threadpoolctl import threadpool_limits

CLIP = 1 - 1e-6  # Fisher's z of r = ±1 is infinite: r is cut to ±0.999999, z to ±7.25
MASK_COLUMNS = ("share", "area", "other", "excess", "pointing", "pointing_other")
PAIR = ["model_a", "fold_a", "model_b", "fold_b", "n"]
HEADERS = {
    "compare": [*PAIR, "left_out", "correlation", "correlation_std", "correlation_low", "correlation_high",
                "jsd", "jsd_std", "ceiling", "corrected", "order", "samples"],
    "masks": ["model", "fold", "measure", "n", "left_out", "mean", "std", "low", "high"],
    "embeddings": [*PAIR, "cka", "cka_low", "cka_high", "cka_biased", "overlap", "overlap_low",
                   "overlap_high", "overlap_chance"]}

# ---------------------------------------------------------------- agreement of maps

@np.errstate(invalid="ignore", divide="ignore")  # nan is the answer there
def agreement(maps, pixels=8192):
    """Pearson's r and the Jensen-Shannon divergence of every two maps of one picture.

    maps: (K, H, W) or (K, P), K networks, values ≥ 0; any float dtype. pixels: in one block, for the cache.
    Returns correlation and jsd, float64 (K (K - 1) / 2,) each, pairs in the order of itertools.combinations.
    JSD (Endres and Schindelin 2003, without the root) has base 2 and takes the maps divided by their sums: 0
    for identical maps, 1 for maps without a common pixel. A constant map has no r, a zero map no JSD: nan.
    """
    K = len(maps)
    maps = np.ascontiguousarray(maps.reshape(K, -1), dtype=np.float32)
    P = maps.shape[1]
    first, second = np.triu_indices(K, 1)
    means = maps.mean(axis=1, keepdims=True, dtype=np.float64)
    scale = (1 / np.where(means > 0, means, np.nan)).astype(np.float32)

    # With h(x) = x log x the divergence is [Σ h(p) + Σ h(q)] / 2 - Σ h((p + q) / 2): one logarithm a pixel
    # and pair. It holds for densities of any one sum; with mean 1 float32 loses nothing to large logarithms.
    products, total, own, mixed = np.zeros((K, K)), np.zeros(K), np.zeros(K), np.zeros(len(first))
    sums, logarithms = np.empty((2, K, min(pixels, P)), dtype=np.float32)
    for start in range(0, P, pixels):
        block = maps[:, start:start + pixels]
        centred = block - means  # float64: 1e-6 is promised of r
        products += centred @ centred.T  # all r at once
        block = block * scale + np.float32(1e-30)  # 0 log 0 = 0
        total += block.sum(axis=1, dtype=np.float64)
        own += row_products(block, np.log2(block))
        at, width = 0, block.shape[1]
        for k in range(K - 1):
            size = K - 1 - k
            both = np.add(block[k + 1:], block[k], out=sums[:size, :width])  # p + q; its half: + 1 below
            mixed[at:at + size] += row_products(both, np.log2(both, out=logarithms[:size, :width]))
            at += size
    spread = np.where(maps.max(axis=1) > maps.min(axis=1), np.sqrt(np.diag(products)), np.nan)
    correlation = (products / spread / spread[:, None])[first, second]
    jsd = (own[first] + own[second] - mixed) / (total[first] + total[second]) + 1
    return np.clip(correlation, -1, 1), np.clip(jsd, 0, 1)


def on_common_part(maps, boxes):
    """Maps of one picture that show different parts of it, on the part that all show: float32 (K, h, w).

    maps: [(H, W), …]; boxes: (K, 4), left, upper, right, lower of what each shows, in one unit. The grid is
    the coarsest of theirs; finer maps are averaged (Pillow's bilinear filter). ValueError: no common part.
    """
    (left, upper), (right, lower) = boxes[:, :2].max(axis=0), boxes[:, 2:].min(axis=0)
    if not (left < right and upper < lower):
        raise ValueError("these maps show no common part of the picture")
    scales = np.array([one.shape[::-1] for one in maps]) / (boxes[:, 2:] - boxes[:, :2])  # pixels a unit
    size = np.maximum(1, np.round(scales.min(axis=0) * (right - left, lower - upper))).astype(int).tolist()
    common = []
    for one, box, scale in zip(maps, boxes, scales):
        place = (np.array([left, upper, right, lower]) - np.tile(box[:2], 2)) * np.tile(scale, 2)
        place = np.clip(place, 0, np.tile(one.shape[::-1], 2))  # of rounding
        image = Image.fromarray(np.asarray(one, dtype=np.float32))
        common.append(image.resize(size, Image.Resampling.BILINEAR, box=tuple(place)))
    return np.stack(common)


def row_products(a, b):
    """Inner product of each row (K, P) of a with that of b: (K,)."""
    return np.matmul(a[:, None, :], b[:, :, None])[:, 0, 0]


def across_noises(correlation, jsd):
    """r and JSD (2, K(K - 1)/2) of K networks that share their noise, each pair with one map of either noise.

    correlation, jsd: agreement's, of the K first maps and then the K second ones, whose noise is another. A
    pair's values are the means (of r through Fisher's z) of its two combinations: of independent noise.
    """
    square = np.stack([squareform(fisher_z(correlation)), squareform(jsd)])  # (2, 2K, 2K)
    k = square.shape[1] // 2
    a, b = np.triu_indices(k, 1)
    z, divergence = (square[:, a, k + b] + square[:, b, k + a]) / 2
    return np.stack([np.tanh(z), divergence])


# ---------------------------------------------------------------- averages with intervals

def fisher_z(correlation):
    """Fisher's z = artanh r, with r cut to ±CLIP so that it stays finite."""
    return np.arctanh(np.clip(correlation, -CLIP, CLIP))


def poisson_weights(seed, first, number, replicates):
    """Bootstrap weights (number, replicates) of pictures first, first + 1, …: Poisson with mean 1.

    They come from (seed, picture) alone, so that blocks of any size give the same intervals.
    """
    streams = [np.random.Generator(np.random.Philox(key=[seed, i])) for i in range(first, first + number)]
    return np.stack([stream.poisson(1, replicates) for stream in streams]).astype(float)


def summarise(blocks, seed=0, replicates=1000, level=0.95):
    """Mean, standard deviation and bootstrap interval of each column, in one pass, memory that does not grow.

    blocks: iterable of values (b, M), in the pictures' order; nan leaves a value out.
    Returns a dict of arrays (M,): n, left_out, mean, std (divided by n), low and high (percentiles of the
    weighted means under Poisson weights: the bootstrap of Hanley and MacGibbon 2006).
    """
    first = 0
    n = sums = squares = weighted = weights = 0
    for values in blocks:
        known = np.isfinite(values)
        filled = np.where(known, values, 0)
        w = poisson_weights(seed, first, len(values), replicates)
        n = n + known.sum(axis=0)
        sums, squares = sums + filled.sum(axis=0), squares + (filled**2).sum(axis=0)
        weighted, weights = weighted + w.T @ filled, weights + w.T @ known  # (replicates, M)
        first += len(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = sums / n
        means = np.ma.masked_invalid(weighted / weights).filled(np.nan)
        low, high = np.full((2, len(mean)), np.nan)
        if (n > 0).any():
            tails = [(1 - level) / 2, (1 + level) / 2]
            low[n > 0], high[n > 0] = np.nanquantile(means[:, n > 0], tails, axis=0)
        std = np.sqrt(np.maximum(squares / n - mean**2, 0))
    return {"n": n, "left_out": first - n, "mean": mean, "std": std, "low": low, "high": high}


def attenuation(reliability_a, reliability_b):
    """The most two networks can correlate whose maps agree so far with their second maps (Spearman 1904)."""
    return np.sqrt(np.maximum(reliability_a, 0) * np.maximum(reliability_b, 0))


# ---------------------------------------------------------------- objects' masks

def mask_shares(maps, masks, mean_mask, n):
    """How much of each map lies in its picture's object.

    maps: (b, H, W), values ≥ 0; masks: bool (b, H, W), of the same pictures; mean_mask: (H, W), the mean of
    all n pictures' masks. Returns (b, 6), nan for maps that are nan or zero, columns MASK_COLUMNS:
      share     of the map's sum inside the mask
      area      the mask's share of the pixels
      other     share of the map inside the other n - 1 pictures' masks, their mean: the chance level of a map
                that knows where objects usually are and nothing of this picture (the centre bias)
      excess    share - other
      pointing  the maximum lies inside the mask (pointing game); the pixels cut to the percentile are all
                maxima: the share of them that lies inside
      pointing_other  the same with the other pictures' masks
    """
    maps = np.asarray(maps, dtype=np.float64).reshape(len(maps), -1)
    inside = masks.reshape(len(masks), -1)
    everyone = n * mean_mask.ravel()
    with np.errstate(invalid="ignore"):
        shares = maps / maps.sum(axis=1, keepdims=True)
        maxima = (maps == maps.max(axis=1, keepdims=True)).astype(float)
        maxima /= np.where(shares[:, :1] >= 0, maxima.sum(axis=1, keepdims=True), np.nan)
    columns = []
    for weight in (shares, maxima):
        own = np.where(inside, weight, 0).sum(axis=1) + 0 * weight[:, 0]
        columns += [own, (weight @ everyone - own) / (n - 1) if n > 1 else np.full(len(own), np.nan)]
    share, other, pointing, pointing_other = columns
    return np.stack([share, inside.mean(axis=1), other, share - other, pointing, pointing_other], axis=1)


# ---------------------------------------------------------------- embeddings

def normalised(embeddings):
    """Rows (n, m) of length 1, float32. Raises ValueError naming a row that is zero or not finite."""
    embeddings = np.ascontiguousarray(embeddings, dtype=np.float32)
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if len(bad):
        raise ValueError(f"row {bad[0]} is zero or not finite ({len(bad)} such rows): it has no direction; "
                         "embed it again")
    return embeddings / lengths


def biased_cka(embeddings):
    """Linear CKA of every two networks: ||YᵀX||² / (||XᵀX|| ||YᵀY||) (Kornblith et al. 2019, Eq. 3).

    embeddings: list of (n, m_k), whose columns are centred first. Returns float64, pairs in the order of
    itertools.combinations. Of independent noise, m = 128, it is 0.85 with 24 pictures and 0.64 with 75.
    """
    centred = [x - x.mean(axis=0, dtype=np.float64).astype(x.dtype) for x in embeddings]
    own = [np.linalg.norm(x.T @ x) for x in centred]
    pairs = itertools.combinations(range(len(centred)), 2)
    cka = [np.linalg.norm(centred[a].T @ centred[b])**2 / (own[a] * own[b]) for a, b in pairs]
    return np.array(cka, dtype=np.float64)


def unbiased_hsic(x, y):
    """Unbiased HSIC with linear kernels (Song et al. 2012, Eq. 5) of x (n, m) and y (n, l), n >= 5.

    Returns that of all n pictures, float, and those without each one of them (n,), in time linear in n.
    """
    n = len(x)
    x, y = (one - one.mean(axis=0, dtype=np.float64) for one in (x, y))  # changes nothing but the rounding
    xx, yy = (x**2).sum(axis=1), (y**2).sum(axis=1)
    # Of K = xxᵀ and L = yyᵀ with zero diagonals: K1, L1, (K ∘ L)1, KL1 and LK1
    k1, l1 = x @ x.sum(axis=0) - xx, y @ y.sum(axis=0) - yy
    both = ((x @ (x.T @ y)) * y).sum(axis=1) - xx * yy
    kl1, lk1 = x @ (l1 @ x) - xx * l1, y @ (k1 @ y) - yy * k1

    def hsic(trace, sum_k, sum_l, cross, n):
        return (trace + sum_k * sum_l / ((n - 1) * (n - 2)) - 2 * cross / (n - 2)) / (n * (n - 3))

    trace, sum_k, sum_l, cross = both.sum(), k1.sum(), l1.sum(), k1 @ l1
    without = cross - k1 * l1 - kl1 - lk1 + both
    return (hsic(trace, sum_k, sum_l, cross, n),
            hsic(trace - 2 * both, sum_k - 2 * k1, sum_l - 2 * l1, without, n - 1))


def linear_cka(embeddings, level=0.95):
    """Unbiased linear CKA of every two networks with its interval: (pairs, 3), float64.

    embeddings: list of (n, m_k), n >= 5. Pairs in the order of itertools.combinations: estimate, low, high.
    The ratio of unbiased HSICs may fall below 0; nan where a denominator does, or is float32's rounding. The
    interval is the delete-one jackknife's over pictures: a bootstrap's repeated rows bring the bias back.
    """
    n, rows, own = len(embeddings[0]), [], []
    for x in embeddings:
        least = 1e-24 * np.square(x, dtype=np.float64).sum(axis=1).mean()**2
        own.append([np.where(hsic > least, hsic, np.nan) for hsic in unbiased_hsic(x, x)])
    for a, b in itertools.combinations(range(len(embeddings)), 2):
        shared = unbiased_hsic(embeddings[a], embeddings[b])
        cka, without = (xy / np.sqrt(xx * yy) for xy, xx, yy in zip(shared, own[a], own[b]))
        error = np.sqrt((n - 1) * without.var()) * stdtrit(n - 1, (1 + level) / 2)
        rows.append([cka, cka - error, cka + error])
    return np.array(rows, dtype=np.float64)


def nearest(embeddings, start, stop, k=10):
    """Of rows start … stop - 1 of unit vectors (n, m) the k nearest others: (stop - start, k), ascending.

    Exact: by float64 inner products, of equal ones the smaller index first. Float32 products, less than half
    of m * eps from them, only narrow the choice.
    """
    products = embeddings[start:stop] @ embeddings.T
    products[np.arange(stop - start), np.arange(start, stop)] = -np.inf  # a query is left out by its index
    cut = np.partition(products, -k, axis=1)[:, -k] - embeddings.shape[1] * np.finfo(np.float32).eps
    rows = []
    for query, candidates in zip(embeddings[start:stop].astype(np.float64), products >= cut[:, None]):
        candidates = np.flatnonzero(candidates)
        order = np.argsort(-(embeddings[candidates] * query).sum(axis=1), kind="stable")
        rows.append(np.sort(candidates[order[:k]]))
    return np.array(rows)


def neighbour_overlap(embeddings, k=10, block=256):
    """Yield (b, pairs): the share of each query's k nearest neighbours that two networks have in common."""
    n = len(embeddings[0])
    for start in range(0, n, block):
        neighbours = [nearest(x, start, min(start + block, n), k) for x in embeddings]  # (b, k) each
        pairs = itertools.combinations(neighbours, 2)
        yield np.stack([(a[:, :, None] == b[:, None, :]).sum(axis=(1, 2)) / k for a, b in pairs], axis=1)


# ---------------------------------------------------------------- the command: its tables

def compare_picture(maps, networks, crossed, picture, boxes):
    """r and JSD (2, pairs) of one picture's maps [(H, W), …], nan where a map is nan or constant."""
    for one, network in zip(maps, networks):
        if one.min() < 0 or one.max() > 1:
            raise ValueError(f"{network.path}: picture {picture} has values from {one.min():.6g} to "
                             f"{one.max():.6g}; expected maps in [0, 1], as saliency.py writes them")
    maps = np.stack(maps) if boxes is None else on_common_part(maps, boxes[picture % len(boxes)])
    both = np.stack(across_noises(*agreement(maps)) if crossed else agreement(maps))
    both[:, np.isnan(both).any(axis=0)] = np.nan
    return both


def compare_group(networks, counts, crossed, kept, column, number, args):
    """Of each pair that counts n, r, its standard deviation, low, high, JSD, its deviation: (pairs, 7).

    crossed: compare each map with the others' second maps. kept: None, or an array (n, …, 2) that gets every
    picture's values, from this column on.
    """
    from dml_common import command, mapfiles
    everyone, pairs = networks + [network.second for network in networks if crossed], sum(counts)
    boxes = mapfiles.parts_of(everyone, args)

    def blocks():
        bar = command.bar(networks[0].shape[0], "maps compared")
        with bar, threadpool_limits(1), ThreadPoolExecutor(args.threads) as pool:
            for start, maps in mapfiles.read_blocks(everyone, number):
                numbers = range(start, start + len(maps[0]))
                both = pool.map(lambda i, *one: compare_picture(one, everyone, crossed, i, boxes), numbers,
                                *maps)
                both = np.stack(list(both))[:, :, counts]  # (b, 2, pairs)
                if kept is not None:
                    kept[start:start + len(both), column:column + pairs] = both.transpose(0, 2, 1)
                yield np.concatenate([fisher_z(both[:, 0]), both[:, 1]], axis=1)
                bar.update(len(both))

    summary = summarise(blocks(), args.seed, args.replicates)
    r = [np.tanh(summary[key][:pairs]) for key in ("mean", "std", "low", "high")]
    return np.stack([summary["n"][:pairs], *r, summary["mean"][pairs:], summary["std"][pairs:]], axis=1)


def blank(values):
    """The numbers of a CSV row: an empty field where there is none (nan)."""
    return [None if np.isnan(value) else float(value) for value in values]


def compare_networks(networks, groups, number, args):
    """Rows of compare.csv, and [(model, r of its maps and second maps), …]."""
    from dml_common import command, files
    rows, alike, crossings, reliability = [], 0, 0, {}
    repeated = [network for network in networks if network.second]
    total = sum(sum(counts) for _, counts in groups)
    shape = (networks[0].shape[0], total + len(repeated), 2)
    with files.new_array(args.per_picture, shape) if args.per_picture else contextlib.nullcontext() as kept:
        for k, network in enumerate(repeated):
            twice = compare_group([network, network.second], [True], False, kept, total + k, number, args)
            reliability[network.path] = twice[0, 1]
        for group, counts in groups:
            pairs = list(itertools.compress(itertools.combinations(group, 2), counts))
            shared = [bool(a.noise) and a.noise == b.noise for a, b in pairs]
            crossed = all(shared) and all(counts) and all(network.second for network in group)
            numbers = compare_group(group, counts, crossed, kept, len(rows), number, args)
            for (a, b), same, (n, *values) in zip(pairs, shared, numbers):
                ceiling = corrected = np.nan
                if a.second and b.second and (crossed or not same):
                    ceiling = attenuation(reliability[a.path], reliability[b.path])
                    corrected = values[0] / ceiling if ceiling > 0 else np.nan
                made = [a.option(name) if a.option(name) == b.option(name) else None
                        for name in ("order", "samples")]
                rows.append([a.model, a.fold, b.model, b.fold, int(n), a.shape[0] - int(n),
                             *blank([*values, ceiling, corrected]), *made])
                if args.as_published:
                    rows[-1] += blank([values[4] * math.log(2)])
            crossings, alike = crossings + (sum(shared) if crossed else 0), alike + sum(shared)
    if alike:
        command.say(f"pairs that share their noise, which raises r: {alike} of {len(rows)}, {crossings} of "
                    "them compared across second maps")
    if len(repeated) < len(networks):
        command.say("networks without second maps, and so without a ceiling: "
                    f"{len(networks) - len(repeated)} of {len(networks)}")
    return rows, [(network.model, reliability[network.path]) for network in repeated]


def mask_rows(networks, paths, number, args):
    """Rows of masks.csv of networks with the same pictures."""
    from dml_common import mapfiles, pictures
    (n, H, W), record = networks[0].shape, networks[0].record
    packed, total = [], np.zeros((H, W))
    for path in paths:
        mask = pictures.load_mask(path, record["preprocessing"], record["options"].get("map_size"),
                                  args.masks == "alpha")
        if mask.shape != (H, W):
            raise ValueError(f"{path} has {mask.shape[1]} × {mask.shape[0]} pixels after resize and crop, "
                             f"the maps {W} × {H}; maps without their JSON need masks of their own size")
        packed.append(np.packbits(mask))
        total += mask
    if not total.any() or (total == n).all():
        raise ValueError(f"{args.masks if args.masks != 'own' else args.dataset}: every mask is "
                         f"{'full' if total.any() else 'empty'}; expected the object brighter than its "
                         "background, or an alpha channel")

    def blocks():
        for start, maps in mapfiles.read_blocks(networks, number):
            bits = np.unpackbits(np.stack(packed[start:start + number]), axis=1, count=H * W)
            masks = bits.reshape(-1, H, W).astype(bool)
            yield np.concatenate([mask_shares(one, masks, total / n, n) for one in maps], axis=1)

    summary, rows = summarise(blocks(), args.seed, args.replicates), []
    for k, (network, measure) in enumerate(itertools.product(networks, MASK_COLUMNS)):
        rows.append([network.model, network.fold, measure, int(summary["n"][k]), int(summary["left_out"][k]),
                     *blank([summary[key][k] for key in ("mean", "std", "low", "high")])])
    return rows


def embedding_rows(networks, counts, args, k=10):
    """Rows of embeddings.csv: CKA and k common neighbours of the emb.npy beside the maps."""
    from dml_common import files
    embeddings, lists = [], []
    for path in [network.path.with_name("emb.npy") for network in networks]:
        x = files.open_embeddings(path)
        try:
            embeddings.append(normalised(x))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        lists.append((len(embeddings[-1]), files.read_sidecar(path).get("pictures", {}).get("sha256")))
        if lists[-1] != lists[0]:
            raise ValueError(f"{path} is of other pictures than {networks[0].path.with_name('emb.npy')}: "
                             f"{lists[-1]}, {lists[0]}; embed the same ones")
    n, cka, biased = len(embeddings[0]), linear_cka(embeddings), biased_cka(embeddings)
    if n <= k:
        raise ValueError(f"the emb.npy have {n} rows; expected more than {k} for {k} nearest neighbours")
    overlap = summarise(neighbour_overlap(embeddings, k), args.seed, args.replicates)
    rows = []
    for pair, (a, b) in enumerate(itertools.combinations(networks, 2)):
        shared = [overlap[key][pair] for key in ("mean", "low", "high")]
        rows.append([a.model, a.fold, b.model, b.fold, n,
                     *blank([*cka[pair], biased[pair], *shared, k / (n - 1)])])
    return list(itertools.compress(rows, counts))


def agreement_table(rows, repeats):
    """Models, and r of each two in per cent (K, K), averaged by Fisher's z; on the diagonal the repeats."""
    z = {}
    for a, b, r in [(row[0], row[2], row[6]) for row in rows] + [(model, model, r) for model, r in repeats]:
        if r is not None:
            z.setdefault((a, b), []).append(fisher_z(r))
    models = list(dict.fromkeys(model for row in rows for model in (row[0], row[2])))
    table = np.full((len(models), len(models)), np.nan)
    for (a, b), values in z.items():
        i, k = models.index(a), models.index(b)
        table[i, k] = table[k, i] = 100 * np.tanh(np.mean(values))
    return models, table


# ---------------------------------------------------------------- the command

def parse(argv):
    from dml_common import command
    parser = command.parser(__doc__)
    add = parser.add_argument
    add("maps", nargs="*", type=Path, metavar="maps.npy", help="saliency.py's, or arrays (n, H, W) in [0, 1]")
    add("--dataset", metavar="NAME|FOLDER|CSV", help="without files all of results/NAME; for --masks")
    add("--data-root", metavar="DIR", help="folder of the published data sets (DML_DATA_ROOT, else data/)")
    add("--results", type=Path, default=Path("results"), metavar="DIR", help="for --dataset (results)")
    add("--out", type=Path, metavar="FILE.csv", help="the table; masks.csv and embeddings.csv lie beside it "
        "(results/NAME/compare.csv with --dataset alone, else compare.csv)")
    add("--fold", type=int, metavar="K", help="only networks of this fold (fold k with fold k, for every k)")
    add("--all-folds", action="store_true", help="also pairs of two folds of one loss")
    add("--as-published", action="store_true", help="as Tables 2-4: --fold 0, and JSD with natural "
        "logarithms in a column jsd_nats")
    add("--per-picture", type=Path, metavar="FILE.npy", help="also r and JSD of every picture, float32 "
        "(n, pairs, 2), pairs as in the table, then each network with its maps_ceiling.npy")
    add("--figure", type=Path, metavar="FILE.png", help="also r as a heat map; diagonal: its second maps")
    add("--masks", nargs="?", const="own", metavar="DIR|alpha", help="also masks.csv; DIR: a PNG for each "
        "picture, above 127 where the object is; alpha: the pictures' own (the data set's own masks)")
    add("--embeddings", action="store_true", help="also embeddings.csv, of the emb.npy beside the maps")
    add("--seed", type=int, default=0, metavar="N", help="of the bootstrap (0)")
    add("--replicates", type=int, default=1000, metavar="N", help="of the bootstrap (1000)")
    add("--threads", type=int, default=command.available_cpus(), metavar="N", help="(this process's CPUs)")
    add("--memory-mib", type=int, default=256, metavar="N", help="for the maps read at a time (256)")
    args = command.parse_as_published(parser, argv, {"fold": 0, "all_folds": False})
    command.at_least(args, seed=0, replicates=1, threads=1, memory_mib=1)
    if not args.maps and not args.dataset:
        raise ValueError("which maps? Give two or more files, or --dataset NAME for all of results/NAME")
    if args.masks in ("own", "alpha") and not args.dataset:
        raise ValueError("--masks without a folder takes the data set's own: name it with --dataset")
    if args.masks not in (None, "own", "alpha") and not Path(args.masks).is_dir():
        raise ValueError(f"--masks {args.masks}: no such folder; expected a PNG in it for each picture")
    return args


def main(argv=None):
    from dml_common import command, files, mapfiles
    args = parse(argv)
    networks = mapfiles.open_networks(args)
    groups, parts = mapfiles.make_groups(networks, args.all_folds), {}
    for network in networks:
        parts.setdefault((network.pictures, network.shape, str(network.part)), []).append(network)
    out = args.out or (Path() if args.maps else networks[0].path.parents[2]) / "compare.csv"
    tables = {"compare": out if groups else None, "masks": out.with_name("masks.csv") if args.masks else None,
              "embeddings": out.with_name("embeddings.csv") if args.embeddings else None}
    outputs = list(filter(None, [*tables.values(), args.per_picture, args.figure]))
    read = [network.path.with_name(name) for network in networks
            for name in (network.path.name, f"{network.path.stem}_ceiling.npy", "emb.npy")]
    for number, path in enumerate(outputs):
        files.check_output(path, read, outputs[:number])
    figures = command.import_figures() if args.figure else None
    for some in [group for group, _ in groups] + list(parts.values()):
        mapfiles.check_alike(networks if args.per_picture else some)
    masks = [mapfiles.find_masks(part[0], args) for part in parts.values()] if args.masks else []
    for path in outputs:
        files.check_output(path, itertools.chain(*masks))
    pixels = sum(math.prod(network.shape[1:]) for network in networks)
    number = max(1, (args.memory_mib << 20) // (8 * pixels))

    rows, headers = {name: [] for name in tables}, dict(HEADERS)
    if args.as_published:
        headers["compare"] = [*HEADERS["compare"], "jsd_nats"]
    for part, paths in zip(parts.values(), masks):
        rows["masks"] += mask_rows(part, paths, number, args)
    for group, counts in groups if args.embeddings else []:
        rows["embeddings"] += embedding_rows(group, counts, args)
    if groups:
        mapfiles.say_parts(networks)
        rows["compare"], repeats = compare_networks(networks, groups, number, args)
    for name in tables:
        if rows[name]:
            files.write_table(tables[name], headers[name], rows[name])
            command.print_rows(headers[name], rows[name])
    if figures and groups:
        models, table = agreement_table(rows["compare"], repeats)
        figure = figures.draw_heat_map(table, models, title="Correlation of saliency maps, per cent")
        files.write_file(args.figure, figures.png(figure))


if __name__ == "__main__":
    command.run(main, stopped="stopped")
