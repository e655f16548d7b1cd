"""How far networks agree: saliency maps pair by pair, objects' masks, embeddings (Kobs et al. 2021, section 3).

Input:  maps.npy files of saliency.py (or any arrays (n, H, W) in [0, 1]), two or more, of the same pictures
Output: compare.csv   model_a,fold_a,model_b,fold_b,n,left_out,correlation,correlation_std,correlation_low,
                      correlation_high,jsd,jsd_std,ceiling,corrected: one row a pair
        masks.csv     (--masks) share of saliency inside the object, its chance level, the pointing game
        embeddings.csv (--embeddings) linear CKA and common neighbours of the emb.npy beside the maps

    python compare.py results/cars196/*/fold*/maps.npy --out compare.csv
    python compare.py --dataset cars196 --figure agreement.png
    python compare.py a.npy b.npy --out pair.csv --per-picture pairs.npy
    python compare.py maps.npy --masks pictures/masks --out masks.csv
    python compare.py --dataset cars196 --embeddings

Read the correlations beside their ceiling. A map of 50 noisy copies is an estimate: two runs of one network that
differ in noise alone agree far from perfectly, and no two networks can agree better than that. `ceiling` is this
limit, from the maps_ceiling.npy that `saliency.py --ceiling` writes; `corrected` is correlation / ceiling.
"""
import argparse
import csv
import io
import itertools
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from dml_common import files
from dml_common import pictures as data

# ---------------------------------------------------------------- agreement of maps
AGREEMENT_COLUMNS = ["model_a", "fold_a", "model_b", "fold_b", "n", "left_out", "correlation", "correlation_std",
                     "correlation_low", "correlation_high", "jsd", "jsd_std", "ceiling", "corrected"]
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


def across_noises(correlation, jsd):
    """r and JSD (2, K(K - 1)/2) of K networks that share their noise, each pair with one map of either noise.

    correlation, jsd: agreement's, of the K first maps and then the K second ones, whose noise is another. A pair's
    values are the means (of r through Fisher's z) of its two combinations: independent noise, as the papers compare.
    """
    both = len(correlation)
    k = (1 + math.isqrt(1 + 8 * both)) // 4  # 2K maps make K(2K - 1) pairs
    square = np.full((2, 2 * k, 2 * k), np.nan)
    square[:, *np.triu_indices(2 * k, 1)] = fisher_z(correlation), jsd
    a, b = np.triu_indices(k, 1)
    z, divergence = (square[:, a, k + b] + square[:, b, k + a]) / 2
    return np.stack([np.tanh(z), divergence])


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


# ---------------------------------------------------------------- the heat map

# White over blue to near black: larger values are darker, in any colour vision and in print.
SHADES = np.array([[222, 235, 247], [198, 219, 239], [107, 174, 214], [33, 113, 181], [8, 48, 107]], dtype=np.float64)


def draw_heat_map(values, names, title, cell=46):
    """A square table of percentages (K, K), nan left empty, as a PIL image; darker is larger, scaled to what is there."""
    K = len(names)
    font, large = ImageFont.load_default(size=15), ImageFont.load_default(size=18)
    margin = int(max(font.getlength(name) for name in names)) + 16
    top = 44 + margin
    sheet = Image.new("RGB", (max(margin + K * cell + 16, int(large.getlength(title)) + 24), top + K * cell + 16), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((12, 12), title, fill="black", font=large)
    known = values[np.isfinite(values)]
    low, high = (known.min(), known.max()) if len(known) else (0, 1)
    for row in range(K):
        draw.text((margin - 8, top + (row + 0.5) * cell), names[row], fill="black", font=font, anchor="rm")
        label = Image.new("L", (margin, cell), 0)
        ImageDraw.Draw(label).text((4, cell / 2), names[row], fill=255, font=font, anchor="lm")
        turned = label.rotate(90, expand=True)
        sheet.paste("black", (margin + row * cell, top - margin), turned)
        for column in range(K):
            x, y, value = margin + column * cell, top + row * cell, values[row, column]
            if not np.isfinite(value):
                continue
            position = (value - low) / (high - low or 1) * (len(SHADES) - 1)
            colour = tuple(int(round(np.interp(position, range(len(SHADES)), channel))) for channel in SHADES.T)
            draw.rectangle([x, y, x + cell - 2, y + cell - 2], fill=colour)
            draw.text((x + cell / 2 - 1, y + cell / 2 - 1), f"{100 * value:.0f}", anchor="mm", font=font,
                      fill="white" if sum(colour) < 430 else "black")
    return sheet


# ---------------------------------------------------------------- the command


def say(text):
    print(f"compare.py: {text}", file=sys.stderr)


def find_maps(dataset, out):
    """results/<dataset>/<slug>/fold<k>/maps.npy of every network that is there, in the order of models/losses.csv."""
    found = sorted((out / dataset).glob("*/fold*/maps.npy"))
    if not found:
        raise ValueError(f"no maps in {out / dataset}; expected {out / dataset}/<loss>/fold<k>/maps.npy: "
                         f"python saliency.py --dataset {dataset} --loss all --out {out}")
    with open(Path(__file__).resolve().parent / "models" / "losses.csv", encoding="utf-8", newline="") as file:
        order = {row["slug"]: (row["type"] == "none", row["type"] == "classification", number)
                 for number, row in enumerate(csv.DictReader(file))}
    return sorted(found, key=lambda path: (order.get(path.parts[-3], (True, True, 99)), path.parts[-2]))


def describe(paths, fold):
    """[{path, model, fold, about}] of the files, names made unique, only those of one fold if it is given."""
    networks = []
    for path in map(Path, paths):
        about = files.read_sidecar(path)
        name = about.get("loss") or about.get("backbone")
        networks.append({"path": path, "model": name or str(path), "fold": about.get("fold"), "about": about})
    if fold is not None:
        networks = [network for network in networks if network["fold"] in (fold, None)]
        if not networks:
            raise ValueError(f"--fold {fold}: none of the {len(paths)} files is of this fold")
    keys = [(network["model"], network["fold"]) for network in networks]
    for network, key in zip(networks, keys):
        if keys.count(key) > 1:
            network["model"] = str(network["path"])
    return networks


def open_alike(networks):
    """Shape (n, H, W) of all the maps. Raises ValueError naming two files that do not belong together."""
    shapes = []
    for network in networks:
        array = files.read_array(network["path"])
        if array.ndim != 3 or array.dtype.kind not in "fiub":
            raise ValueError(f"{network['path']} has shape {array.shape}, dtype {array.dtype}; expected maps (n, H, W) of numbers")
        if 0 in array.shape:
            raise ValueError(f"{network['path']} is empty: shape {array.shape}")
        shapes.append(array.shape)
    for network, shape in zip(networks, shapes):
        if shape != shapes[0]:
            raise ValueError(f"{networks[0]['path']} and {network['path']} differ in shape, {shapes[0]} and {shape}; "
                             "expected maps of the same pictures and size")
    for what, key, parts in ("lists of pictures", "pictures", ["sha256"]), ("resize or crop", "preprocessing", ["resize", "crop"]):
        told = [(network["path"], {part: network["about"][key].get(part) for part in parts})
                for network in networks if network["about"].get(key)]
        for path, values in told:
            if values != told[0][1]:
                raise ValueError(f"{told[0][0]} and {path} have different {what} ({told[0][1]}, {values}): their pixels are not the "
                                 "same pixels; make both maps from the same pictures with the same preprocessing")
    return shapes[0]


def by_pictures(networks, args):
    """The networks in parts of the same pictures: one part, or one for each fold where each was analysed on its own pictures.

    Raises ValueError when networks of one fold differ, or when an option needs one list of pictures.
    """
    parts = {}
    for network in networks:
        parts.setdefault(network["about"].get("pictures", {}).get("sha256"), []).append(network)
    folds = [{network["fold"] for network in part} for part in parts.values()]
    if len(parts) == 1 or None in parts or sum(map(len, folds)) > len(set().union(*folds)) or {None} in folds:
        open_alike(networks)
        return [networks]
    for option, given in ("--per-picture", args.per_picture), ("--all-folds", args.all_folds):
        if given:
            raise ValueError(f"{option}: the folds here have different lists of pictures ({networks[0]['path']}, …); "
                             + ("give one --fold" if option == "--per-picture" else "only fold k can be compared with fold k"))
    return list(parts.values())


def wanted_pairs(networks, all_folds):
    """Groups [(members, [their pairs that count])] of network numbers: each group's maps are compared at once.

    Fold k with fold k; a file without a fold with every other; with all_folds also the folds of one loss.
    """
    if any(network["fold"] is None for network in networks):
        groups = [list(range(len(networks)))]
    else:
        keys = ["fold", "model"] if all_folds else ["fold"]
        groups = [[i for i, network in enumerate(networks) if network[key] == value]
                  for key in keys for value in dict.fromkeys(network[key] for network in networks)]

    def counts(a, b):
        a, b = networks[a], networks[b]
        return a["fold"] == b["fold"] or None in (a["fold"], b["fold"]) or (all_folds and a["model"] == b["model"])

    return [(group, [counts(a, b) for a, b in itertools.combinations(group, 2)]) for group in groups if len(group) > 1]


def read_blocks(paths, n, number):
    """Yield (start, maps (K, b, H, W)) of every `number` pictures; each file is read once and nothing stays mapped."""
    for start in range(0, n, number):
        yield start, [np.array(files.read_array(path)[start:start + number]) for path in paths]


def compare_picture(maps, groups, networks, picture):
    """r and JSD (2, pairs) of one picture's maps (K, H, W), nan where a map is nan or constant."""
    maps = np.stack([one.astype(np.float32) for one in maps])
    for one, low, high in zip(range(len(maps)), maps.min(axis=(1, 2)), maps.max(axis=(1, 2))):
        if low < 0 or high > 1:
            raise ValueError(f"{networks[one]['path']}: picture {picture} has values from {low:.6g} to {high:.6g}; expected maps "
                             "in [0, 1], as saliency.py writes them")
    found = []
    for members, seconds, counts in groups:
        if seconds:
            both = across_noises(*agreement(maps[members + seconds]))
        else:
            both = np.stack(agreement(maps[members]))
        found.append(both[:, counts])
    both = np.concatenate(found, axis=1)
    both[:, np.isnan(both).any(axis=0)] = np.nan
    return both


def compare_maps(networks, groups, n, number, args):
    """Yield blocks (b, 2, pairs) of r and JSD, pictures side by side in threads."""
    paths = [network["path"] for network in networks]
    with threadpool_limits(1), ThreadPoolExecutor(args.threads) as pool, \
            tqdm(total=n, unit=" pictures", delay=2, disable=not sys.stderr.isatty()) as bar:
        for start, maps in read_blocks(paths, n, number):
            pictures = range(len(maps[0]))
            found = pool.map(lambda i: compare_picture([one[i] for one in maps], groups, networks, start + i), pictures)
            yield np.stack(list(found))
            bar.update(len(maps[0]))


def with_ceilings(networks):
    """The networks' second maps (maps_ceiling.npy), as further networks: [(number of the network, its second)]."""
    seconds = []
    for i, network in enumerate(networks):
        path = network["path"].with_name(f"{network['path'].stem}_ceiling.npy")
        if path.exists():
            seconds.append((i, {**network, "path": path, "about": files.read_sidecar(path)}))
    return seconds


def saved(blocks, path, n):
    """Pass blocks (b, 2, pairs) on, keeping them as float32 (n, pairs, 2) in a .npy file that appears when all are there."""
    if path is None:
        yield from blocks
        return
    part, start, array = path.with_name(f".{path.name}.part"), 0, None
    try:
        for block in blocks:
            if array is None:
                array = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=(n, block.shape[2], 2))
            array[start:start + len(block)] = block.transpose(0, 2, 1)
            start += len(block)
            yield block
        array.flush()
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def compare_networks(networks, n, number, args):
    """Rows of compare.csv of networks with the same pictures, {number of a network: correlation of its two maps}, and the
    numbers of pairs (that share their noise, that would if not for their second maps)."""
    groups = wanted_pairs(networks, args.all_folds)
    pairs = [pair for group, counts in groups for pair, counted in zip(itertools.combinations(group, 2), counts) if counted]
    if not pairs:
        raise ValueError("no two of these maps are of the same fold; --all-folds compares the folds of one loss")
    seconds = with_ceilings(networks)
    everyone, second = networks + [one for _, one in seconds], {i: len(networks) + k for k, (i, _) in enumerate(seconds)}
    open_alike(everyone)
    shared = {(a, b): same_noise(networks[a]["about"], networks[b]["about"]) for a, b in pairs}
    crossed = [all(i in second for i in group) and all(shared.get(pair) for pair in itertools.combinations(group, 2))
               for group, _ in groups]
    groups = [(group, [second[i] for i in group] if cross else [], counts) for (group, counts), cross in zip(groups, crossed)]
    apart = {pair for (group, seconds_, _) in groups if seconds_ for pair in itertools.combinations(group, 2)}
    repeats = [([i, second[i]], [], [True]) for i in second]
    blocks = compare_maps(everyone, groups + repeats, n, number, args)
    blocks = saved(blocks, args.per_picture, n)
    found = summarise((np.concatenate([fisher_z(b[:, 0]), b[:, 1]], axis=1) for b in blocks), args.seed, args.replicates)

    total = len(pairs) + len(repeats)
    z, jsd = ({key: found[key][part] for key in ("n", "mean", "std", "low", "high")} for part in (slice(total), slice(total, None)))
    correlation = np.tanh(z["mean"])
    reliability = {i: correlation[len(pairs) + k] for k, i in enumerate(second)}
    rows = []
    for k, (a, b) in enumerate(pairs):
        ceiling = None
        if a in reliability and b in reliability and (not shared[a, b] or (a, b) in apart):
            ceiling = float(attenuation(reliability[a], reliability[b]))
        numbers = [float(value) for value in (correlation[k], np.tanh(z["std"][k]), np.tanh(z["low"][k]), np.tanh(z["high"][k]),
                                              jsd["mean"][k], jsd["std"][k])]
        rows.append([networks[a]["model"], networks[a]["fold"], networks[b]["model"], networks[b]["fold"], int(z["n"][k]),
                     n - int(z["n"][k]), *[None if np.isnan(value) else value for value in numbers],
                     ceiling, numbers[0] / ceiling if ceiling else None])
    return rows, reliability, (sum(shared.values()) - len(apart), len(apart))


def same_noise(a, b):
    """Do two maps' JSONs tell of one noise: of one network, or of --shared-noise? Then no ceiling bounds their agreement."""
    a, b = ({key: about.get("options", {}).get(key) for key in ("seed", "ceiling", "noise_of")} for about in (a, b))
    return a == b and a["noise_of"] is not None


def report(networks, rows, reliability, shared, apart):
    """What a reader should know first, on stdout. shared, apart: numbers of pairs of one noise, and of those across two."""
    widest = max(len(f"{row[0]} – {row[2]}") for row in rows[:20])
    for row in rows[:20]:
        if row[6] is None:
            print(f"{f'{row[0]} – {row[2]}':{widest}}  every picture was left out (constant or nan maps)")
            continue
        ceiling = f", ceiling {row[12]:.3f}, corrected {row[13]:.3f}" if row[12] else ""
        print(f"{f'{row[0]} – {row[2]}':{widest}}  r {row[6]:.3f} [{row[8]:.3f}, {row[9]:.3f}], JSD {row[10]:.4f}{ceiling}")
    if len(rows) > 20:
        print(f"… {len(rows) - 20:,} more pairs in the file")
    left_out = max(row[5] for row in rows)
    if left_out:
        say(f"up to {left_out:,} of {rows[0][4] + rows[0][5]:,} pictures left out of a pair: their maps are constant or nan")
    if apart:
        say(f"{apart:,} of {len(rows):,} pairs share their noise: each is one network's map against the other's second map, "
            "whose noise is another, both ways")
    if shared:
        say(f"{shared:,} of {len(rows):,} pairs share their noise, which raises correlations; no ceiling is given for them")
        return
    first = [network for network in networks if not network["about"].get("options", {}).get("ceiling")]
    if len(reliability) < len(first):
        say(f"no ceiling for {len(first) - len(reliability)} of {len(first)} networks: a low correlation may be noise alone; "
            "python saliency.py … --ceiling makes their second maps")


def mask_files(networks, n, args):
    """The mask of each of the n pictures; raises ValueError with their number and the first names when some are missing."""
    about = networks[0]["about"]
    folder = None if args.masks is True else Path(args.masks)
    if folder and not folder.is_dir():
        raise ValueError(f"--masks {folder}: no such folder; expected one with a mask for each picture, of the same name")
    if args.dataset is None:
        files = sorted((path for path in folder.rglob("*.png")), key=lambda path: data.natural_key(str(path)))
        options = about.get("options", {})
        chosen = options.get("pick") or list(range(len(files)))[:options.get("limit")]
        files = [files[i] for i in chosen if i < len(files)]
        if len(files) != n or about.get("pictures", {}).get("left_out"):
            raise ValueError(f"{folder} has {len(files):,} PNG files for {n:,} maps, so it can't be told which belongs to which; "
                             "name the pictures with --dataset (a folder, as for saliency.py)")
        return files
    dataset = data.open_dataset(args.dataset, args.data_root, "all" if "rows" in about else about.get("split", "test"))
    options, left_out = about.get("options", {}), set(about.get("pictures", {}).get("left_out", []))
    chosen = about.get("rows") or options.get("pick") or list(range(len(dataset.paths)))[:options.get("limit")]
    chosen = [i for i in chosen if i < len(dataset.paths) and dataset.relative[i] not in left_out]
    names = [dataset.relative[i] for i in chosen]
    if len(names) != n or about.get("pictures", {}).get("sha256", data.pictures_sha256(names)) != data.pictures_sha256(names):
        raise ValueError(f"{networks[0]['path']} has {n:,} maps of other pictures than {args.dataset} ({len(names):,}); "
                         "give the data set and split the maps were made from")
    if folder:
        by_name = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.png")}
        files = []
        for name in names:
            parts = Path(name).with_suffix("").parts
            files.append(next((by_name["/".join(parts[k:])] for k in range(len(parts)) if "/".join(parts[k:]) in by_name), None))
    elif dataset.masks:
        files = [dataset.masks[i] for i in chosen]
    else:
        raise ValueError(f"the data set {dataset.name} has no masks; give their folder: --masks DIR")
    missing = [name for name, path in zip(names, files) if path is None]
    if missing:
        raise ValueError(f"masks are missing for {len(missing):,} of {n:,} pictures ({', '.join(missing[:3])}{', …' * (len(missing) > 3)}); "
                         "expected a PNG of the picture's name for each")
    return files


def read_masks(files, shape, about):
    """Masks (b, H, W), bool, through the pictures' own resize and crop."""
    geometry = about.get("preprocessing") or {"resize": None, "crop": None}
    masks = [data.load_mask(path, geometry) for path in files]
    if size := about.get("options", {}).get("map_size"):  # saliency.py averaged its maps: what is more than half object
        masks = [np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize((size, size), Image.Resampling.BOX)) > 127
                 for mask in masks]
    for path, mask in zip(files, masks):
        if mask.shape != shape:
            raise ValueError(f"{path} has {mask.shape[1]} × {mask.shape[0]} pixels after resize and crop, the maps "
                             f"{shape[1]} × {shape[0]}; maps without their JSON need masks of their own size")
    return np.stack(masks)


def mask_rows(networks, shape, files, number, args):
    """Rows of masks.csv: each network's share of saliency inside the object, with its chance levels; said on stdout too."""
    n, *size = shape
    about = networks[0]["about"]
    total = np.zeros(size)
    for start in range(0, n, number):
        total += read_masks(files[start:start + number], tuple(size), about).sum(axis=0)

    def blocks():
        for start, maps in read_blocks([network["path"] for network in networks], n, number):
            masks = read_masks(files[start:start + number], tuple(size), about)
            yield np.concatenate([mask_shares(one, masks, total / n, n) for one in maps], axis=1)

    found = summarise(blocks(), args.seed, args.replicates)
    rows = []
    for k, (network, column) in enumerate(itertools.product(networks, MASK_COLUMNS)):
        values = [float(found[key][k]) for key in ("mean", "std", "low", "high")]
        rows.append([network["model"], network["fold"], column, int(found["n"][k]), int(found["left_out"][k]),
                     *[None if np.isnan(value) else value for value in values]])
    for k, network in enumerate(networks[:20]):
        share, area, other = (f"{100 * found['mean'][6 * k + i]:.1f} % [{100 * found['low'][6 * k + i]:.1f}, "
                              f"{100 * found['high'][6 * k + i]:.1f}]" for i in range(3))
        fold = "" if network["fold"] is None else f", fold {network['fold']}"
        print(f"{network['model']}{fold}: {share} of the saliency inside the object; area {area}; inside other pictures' masks {other}")
    return rows


def embedding_rows(networks, args, k=10):
    """Rows of embeddings.csv: linear CKA and k common neighbours of the emb.npy beside the maps."""
    paths = [network["path"].with_name("emb.npy") for network in networks]
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise ValueError(f"--embeddings: {len(missing)} networks have no emb.npy beside their maps ({missing[0]}, …); "
                         "python embed.py makes them")
    found = []
    for path in paths:
        try:
            found.append(normalised(files.read_embeddings(path)))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if len(found[-1]) != len(found[0]):
            raise ValueError(f"{paths[0]} and {path} have {len(found[0]):,} and {len(found[-1]):,} rows; expected the same pictures")
        a, b = (files.read_sidecar(which).get("pictures", {}).get("sha256") for which in (paths[0], path))
        if a and b and a != b:
            raise ValueError(f"{paths[0]} and {path} have different lists of pictures; embed the same ones")
    n = len(found[0])
    if n <= k:
        raise ValueError(f"{paths[0]} has {n} rows; expected more than {k} for {k} nearest neighbours")
    rows = []
    for members, counts in wanted_pairs(networks, args.all_folds):
        chosen = [found[i] for i in members]
        cka = linear_cka(chosen)
        overlap = summarise(neighbour_overlap(chosen, k), args.seed, args.replicates)
        for pair, (a, b) in enumerate(itertools.combinations(members, 2)):
            if counts[pair]:
                rows.append([networks[a]["model"], networks[a]["fold"], networks[b]["model"], networks[b]["fold"], n, float(cka[pair]),
                             *[float(overlap[key][pair]) for key in ("mean", "low", "high")], k / (n - 1)])
    for row in rows[:20]:
        print(f"{row[0]} – {row[2]}  CKA {row[5]:.3f}, {k} nearest neighbours in common {100 * row[6]:.1f} % "
              f"[{100 * row[7]:.1f}, {100 * row[8]:.1f}]")
    return rows


def write_figure(path, networks, rows, reliability):
    """The heat map of correlations, folds averaged in Fisher's z; on the diagonal a network's two maps, where known."""
    names = list(dict.fromkeys(network["model"] for network in networks))
    sums, counts = np.zeros((2, len(names), len(names)))
    repeats = [[model, None, model, None, None, None, value] for model, value in reliability]
    for row in rows + repeats:
        if row[6] is not None:
            for a, b in {(row[0], row[2]), (row[2], row[0])}:
                sums[names.index(a), names.index(b)] += fisher_z(row[6])
                counts[names.index(a), names.index(b)] += 1
    values = np.tanh(np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0))
    common = os.path.commonpath(names) if len(names) > 1 and all(os.sep in name for name in names) else ""
    short = [name[len(common):].lstrip(os.sep) for name in names]
    png = io.BytesIO()
    title = "Correlation of saliency maps, per cent" + "; diagonal: two maps of one network" * bool(reliability)
    draw_heat_map(values, short, title).save(png, "PNG")
    files.write_file(path, png.getvalue())


def available_threads():
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fail(message):
    say(" ".join(str(message).split()))
    sys.exit(2)


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = fail
    add = parser.add_argument
    add("maps", nargs="*", type=Path, metavar="maps.npy", help="files of saliency.py, or arrays (n, H, W) in [0, 1]")
    add("--dataset", metavar="NAME|FOLDER|CSV", help="without files: all of results/NAME; with files: the pictures, for --masks")
    add("--data-root", metavar="DIR", help="folder of the published data sets (DML_DATA_ROOT, else data/)")
    add("--results", type=Path, default=Path("results"), metavar="DIR", help="where --dataset looks (results)")
    add("--out", type=Path, metavar="FILE.csv", help="the table; masks.csv and embeddings.csv lie beside it "
        "(results/NAME/compare.csv with --dataset alone, else compare.csv)")
    add("--fold", type=int, metavar="K", help="only networks of this fold (fold k with fold k, for every k)")
    add("--all-folds", action="store_true", help="also pairs of two folds of one loss")
    add("--per-picture", type=Path, metavar="FILE.npy", help="also r and JSD of every picture and pair, float32 (n, pairs, 2), "
        "pairs as in the table, then each network with its maps_ceiling.npy")
    add("--figure", type=Path, metavar="FILE.png", help="also the correlations as an annotated heat map")
    add("--masks", nargs="?", const=True, metavar="DIR", help="also masks.csv; DIR has a PNG for each picture, above 127 where the "
        "object is (the data set's own masks)")
    add("--embeddings", action="store_true", help="also embeddings.csv, from the emb.npy beside each maps.npy")
    add("--seed", type=int, default=0, metavar="N", help="of the bootstrap (0)")
    add("--replicates", type=int, default=1000, metavar="N", help="of the bootstrap (1000)")
    add("--threads", type=int, default=available_threads(), metavar="N",
        help="pictures compared at a time (CPUs this process may use)")
    add("--memory-mib", type=int, default=256, metavar="N", help="for the maps read at a time (256)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    if not args.maps and not args.dataset:
        raise ValueError("which maps? Give two or more maps.npy files, or --dataset NAME for all of results/NAME")
    for name in ("seed", "replicates", "threads", "memory_mib"):
        if getattr(args, name) < (name != "seed"):
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least {int(name != 'seed')}")
    if args.masks is True and not args.dataset:
        raise ValueError("--masks without a folder takes the data set's own: name it with --dataset")
    name = Path(args.dataset).resolve().name if args.dataset else None
    paths = args.maps or find_maps(name, args.results)
    args.out = args.out or (Path("compare.csv") if args.maps else args.results / name / "compare.csv")
    for path in filter(None, (args.out, args.per_picture, args.figure)):
        files.check_output(path, paths)
    networks = describe(paths, args.fold)
    if len(networks) < 2 and not args.masks:
        raise ValueError(f"one map file arrived ({networks[0]['path']}), two or more are compared; --masks also takes one")
    parts = [(part, open_alike(part)) for part in by_pictures(networks, args)]
    masks = [mask_files(part, shape[0], args) if args.masks else None for part, shape in parts]
    rows, reliability, shared, tables = [], [], [0, 0], {"masks.csv": [], "embeddings.csv": []}
    for (part, shape), files in zip(parts, masks):
        number = max(1, (args.memory_mib << 20) // (2 * 4 * len(part) * shape[1] * shape[2]))
        if len(networks) > 1:
            found, correlations, counts = compare_networks(part, shape[0], number, args)
            rows += found
            reliability += [(part[i]["model"], value) for i, value in correlations.items()]
            shared = [total + count for total, count in zip(shared, counts)]
        if args.masks:
            tables["masks.csv"] += mask_rows(part, shape, files, number, args)
        if args.embeddings:
            tables["embeddings.csv"] += embedding_rows(part, args)
    if rows:
        files.write_table(args.out, AGREEMENT_COLUMNS, rows)
        report(networks, rows, reliability, *shared)
    if args.figure and rows:
        write_figure(args.figure, networks, rows, reliability)
    for name, header in ("masks.csv", ["model", "fold", "measure", "n", "left_out", "mean", "std", "low", "high"]), \
            ("embeddings.csv", ["model_a", "fold_a", "model_b", "fold_b", "n", "cka", "overlap", "overlap_low", "overlap_high",
                                "overlap_chance"]):
        if tables[name]:
            files.write_table(args.out.parent / name, header, tables[name])


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        say("stopped; nothing half-written remains")
        sys.exit(130)
