"""How far networks agree: saliency maps pair by pair, objects' masks, embeddings (Kobs et al. 2021, section 3).

Input:  maps.npy files of saliency.py (or any arrays (n, H, W) in [0, 1]), two or more, of the same pictures
Output: compare.csv   model_a,fold_a,model_b,fold_b,n,left_out,correlation,correlation_std,correlation_low,
                      correlation_high,jsd,jsd_std,ceiling,corrected: one row a pair
        masks.csv     (--masks) share of saliency inside the object, its chance level, the pointing game
        embeddings.csv (--embeddings) linear CKA and common neighbours of the emb.npy beside the maps

    python compare.py results/cars196/*/fold*/maps.npy --out compare.csv
    python compare.py --dataset cars196 --figure agreement.png
    python compare.py a.npy b.npy --out pair.csv --per-picture pairs.npy
    python compare.py maps.npy --masks pictures/masks --out compare.csv

Read the correlations beside their ceiling. A map of 50 noisy copies is an estimate: two runs of one network that
differ in noise alone agree far from perfectly, and no two networks can agree better than that. `ceiling` is this
limit, from the maps_ceiling.npy that `saliency.py --ceiling` writes; `corrected` is correlation / ceiling.
"""
import itertools

import numpy as np

# ---------------------------------------------------------------- agreement of maps
CLIP = 1 - 1e-6  # Fisher's z of r = ±1 is infinite: r is cut to ±0.999999, z to ±7.25


@np.errstate(invalid="ignore", divide="ignore")  # nan is the answer there
def agreement(maps, pixels=8192):
    """Pearson's r and the Jensen-Shannon divergence of every two maps of one picture.

    maps: (K, H, W) or (K, P), K networks, values ≥ 0; any float dtype. pixels: in one block, for the cache.
    Returns correlation and jsd, float64 (K (K - 1) / 2,) each, pairs in the order of itertools.combinations.
    JSD (Endres and Schindelin 2003, without the root) has base 2 and takes the maps divided by their sums: 0 for
    identical maps, 1 for maps that share no pixel. A constant map has no r and a map of zeros no JSD: nan.
    """
    K = len(maps)
    maps = np.ascontiguousarray(maps.reshape(K, -1), dtype=np.float32)
    P = maps.shape[1]
    first, second = np.triu_indices(K, 1)
    means = maps.mean(axis=1, keepdims=True, dtype=np.float64)
    scale = (1 / np.where(means > 0, means, np.nan)).astype(np.float32)

    # With h(x) = x log x, the divergence is [Σ h(p) + Σ h(q)] / 2 - Σ h((p + q) / 2): one logarithm for each pixel and
    # pair. It holds for densities of any common sum; with mean 1 float32 loses nothing to large logarithms.
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
            both = np.add(block[k + 1:], block[k], out=sums[:size, :width])  # p + q; its half comes out as - 1 below
            mixed[at:at + size] += row_products(both, np.log2(both, out=logarithms[:size, :width]))
            at += size
    spread = np.where(maps.max(axis=1) > maps.min(axis=1), np.sqrt(np.diag(products)), np.nan)
    correlation = (products / spread / spread[:, None])[first, second]
    jsd = (own[first] + own[second] - mixed) / (total[first] + total[second]) + 1
    return np.clip(correlation, -1, 1), np.clip(jsd, 0, 1)


def row_products(a, b):
    """Inner product of each row (K, P) of a with that of b: (K,)."""
    return np.matmul(a[:, None, :], b[:, :, None])[:, 0, 0]


# ---------------------------------------------------------------- averages with intervals


def fisher_z(correlation):
    """Fisher's z = artanh r, with r cut to ±CLIP so that it stays finite."""
    return np.arctanh(np.clip(correlation, -CLIP, CLIP))


def poisson_weights(seed, first, number, replicates):
    """Bootstrap weights (number, replicates) of pictures first, first + 1, …: Poisson with mean 1.

    They come from (seed, picture) alone, so that blocks of any size give the same intervals.
    """
    keys = ([seed, i] for i in range(first, first + number))
    return np.stack([np.random.Generator(np.random.Philox(key=key)).poisson(1, replicates) for key in keys]).astype(float)


def summarise(blocks, seed=0, replicates=1000, level=0.95):
    """Mean, standard deviation and bootstrap interval of every column, in one pass, in memory that does not grow.

    blocks: iterable of values (b, M), in the pictures' order; nan leaves a value out.
    Returns a dict of arrays (M,): n, left_out, mean, std (divided by n), low and high (percentiles of the weighted
    means under Poisson weights: the bootstrap of Hanley and MacGibbon 2006).
    """
    first = 0
    n = sums = squares = weighted = weights = 0
    for values in blocks:
        known = np.isfinite(values)
        filled = np.where(known, values, 0)
        w = poisson_weights(seed, first, len(values), replicates)
        n, sums, squares = n + known.sum(axis=0), sums + filled.sum(axis=0), squares + (filled**2).sum(axis=0)
        weighted, weights = weighted + w.T @ filled, weights + w.T @ known  # (replicates, M)
        first += len(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = sums / n
        means = np.ma.masked_invalid(weighted / weights).filled(np.nan)
        low, high = np.full((2, len(mean)), np.nan)
        if (n > 0).any():
            low[n > 0], high[n > 0] = np.nanquantile(means[:, n > 0], [(1 - level) / 2, (1 + level) / 2], axis=0)
        std = np.sqrt(np.maximum(squares / n - mean**2, 0))
    return {"n": n, "left_out": first - n, "mean": mean, "std": std, "low": low, "high": high}


def attenuation(reliability_a, reliability_b):
    """The most two networks can correlate when each map correlates with its own repetition by so much (Spearman 1904)."""
    return np.sqrt(np.maximum(reliability_a, 0) * np.maximum(reliability_b, 0))


# ---------------------------------------------------------------- objects' masks
MASK_COLUMNS = ("share", "area", "other", "excess", "pointing", "pointing_other")


def mask_shares(maps, masks, mean_mask, n):
    """How much of each map lies in its picture's object.

    maps: (b, H, W), values ≥ 0; masks: bool (b, H, W), of the same pictures; mean_mask: (H, W), the mean of the masks
    of all n pictures. Returns (b, 6), nan for maps that are nan or zero, columns MASK_COLUMNS:
      share     of the map's sum inside the mask
      area      the mask's share of the pixels
      other     share of the map inside the other n - 1 pictures' masks, their mean: the chance level of a map that
                knows where objects usually are and nothing of this picture (the centre bias)
      excess    share - other
      pointing  the maximum lies inside the mask (pointing game); the pixels cut to the percentile are all maxima: the
                share of them that lies inside
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
    embeddings = np.asarray(embeddings, dtype=np.float32)
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if len(bad):
        raise ValueError(f"row {bad[0]} is zero or not finite ({len(bad)} such rows): it has no direction; embed it again")
    return embeddings / lengths


def linear_cka(embeddings):
    """Linear CKA of every two networks (Kornblith et al. 2019, Eq. 3): ||YᵀX||² / (||XᵀX|| ||YᵀY||), columns centred.

    embeddings: list of (n, m_k). Returns float64, pairs in the order of itertools.combinations. Biased upwards when n
    is not much larger than m.
    """
    centred = [x - x.mean(axis=0, dtype=np.float64).astype(x.dtype) for x in embeddings]
    own = [np.linalg.norm(x.T @ x) for x in centred]
    pairs = itertools.combinations(range(len(centred)), 2)
    return np.array([np.linalg.norm(centred[a].T @ centred[b])**2 / (own[a] * own[b]) for a, b in pairs], dtype=np.float64)


def nearest(embeddings, start, stop, k=10):
    """Indices (stop - start, k), ascending, of the k nearest others of rows start … stop - 1 of unit vectors (n, m).

    The query is left out by its index; of equal inner products (in float32) the smaller index counts as nearer.
    """
    products = embeddings[start:stop] @ embeddings.T
    rows = np.arange(stop - start)
    products[rows, rows + start] = -np.inf
    threshold = -np.partition(-products, k - 1, axis=1)[:, k - 1:k]
    chosen = products > threshold
    ties = products == threshold
    room = k - chosen.sum(axis=1, keepdims=True)
    return np.nonzero(chosen | (ties & (ties.cumsum(axis=1) <= room)))[1].reshape(-1, k)


def neighbour_overlap(embeddings, k=10, block=256):
    """Yield (b, pairs): for each query the share of its k nearest neighbours that two networks have in common."""
    n = len(embeddings[0])
    for start in range(0, n, block):
        found = [nearest(x, start, min(start + block, n), k) for x in embeddings]  # (b, k) each
        pairs = itertools.combinations(found, 2)
        yield np.stack([(a[:, :, None] == b[:, None, :]).sum(axis=(1, 2)) / k for a, b in pairs], axis=1)
