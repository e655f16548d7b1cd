"""Files of maps for compare.py: opened, grouped by fold, the part of the pictures that they show, masks."""
import itertools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dml_common import command, files, folders, pictures


class Network(NamedTuple):
    """A file of maps."""
    path: Path
    model: str
    fold: int | None
    shape: tuple  # n, H, W
    record: dict  # the JSON beside it, which may not say the next three:
    pictures: str  # sha256 of their list
    part: dict  # of the picture, that the maps show
    noise: list  # where two networks' are equal their pictures' noisy copies are
    second: "Network | None"  # maps_ceiling.npy: with other noise

    def option(self, name):
        return self.record["options"].get(name)


def open_maps(path):
    array, second = files.read_array(path), path.with_name(f"{path.stem}_ceiling.npy")
    if array.ndim != 3 or array.dtype.kind not in "fiub" or 0 in array.shape:
        raise ValueError(f"{path} has shape {array.shape}, dtype {array.dtype}; expected maps (n, H, W)")
    record = {"options": {}, "pictures": {}, "preprocessing": {}, **files.read_sidecar(path), "path": path}
    noise = [record["options"].get(key) for key in ("noise_of", "seed", "ceiling")]
    return Network(path, record.get("loss") or record.get("backbone") or str(path), record.get("fold"),
                   array.shape, record, record["pictures"].get("sha256"),
                   pictures.part_shown(record["preprocessing"]), noise[0] is not None and noise,
                   open_maps(second) if second.exists() else None)


def open_networks(args):
    """The networks of the files given, else of results/NAME, None last; equal names are replaced by paths."""
    paths, folder = args.maps, args.results / Path(args.dataset or "").resolve().name
    if not paths:
        losses = sorted(files.losses(), key=lambda row: folders.TYPES.index(row["type"]))
        order = {row["slug"]: number for number, row in enumerate(losses)}
        paths = sorted(folder.glob("*/fold*/maps.npy"),
                       key=lambda path: (order.get(path.parts[-3], len(order)), path.parts[-2], path))
    if not paths:
        raise ValueError(f"no maps in {folder}; expected {folder}/<loss>/fold<k>/maps.npy: "
                         f"python saliency.py --dataset {args.dataset} --loss all --out {args.results}")
    networks = [open_maps(path) for path in paths]
    networks = [network for network in networks if args.fold is None or network.fold in (args.fold, None)]
    if not networks:
        raise ValueError(f"--fold {args.fold}: none of the {len(paths)} files is of this fold")
    if len(networks) < 2 and not args.masks:
        raise ValueError(f"one map file arrived ({paths[0]}), two or more are compared; --masks takes one")
    keys = [(network.model, network.fold) for network in networks]
    return [network._replace(model=str(network.path)) if keys.count(key) > 1 else network
            for network, key in zip(networks, keys)]


def check_alike(networks):
    """Raise ValueError naming two files of maps that are not of the same pictures, or second maps that are
    another network's."""
    for network in networks:
        weights = [one.record.get("checkpoint_sha256") for one in (network, network.second) if one]
        if len({*weights} - {None}) > 1:
            raise ValueError(f"{network.path} and {network.second.path} are of different weights (their "
                             "checkpoint_sha256 differ), so they give no ceiling; make both in one run")
        if network.second and network.second.shape != network.shape:
            raise ValueError(f"{network.path} and {network.second.path} differ in shape, {network.shape} and "
                             f"{network.second.shape}, so they give no ceiling; make both in one run")
    networks = networks + [network.second for network in networks if network.second]
    same = {"pictures": [network.pictures for network in networks],
            "number of pictures": [network.shape[:1] for network in networks]}
    if None in [network.part for network in networks]:
        same["shape, without a JSON that says what they show"] = [network.shape for network in networks]
    for what, values in same.items():
        known = [(network, value) for network, value in zip(networks, values) if value]
        for network, value in known:
            if value != known[0][1]:
                raise ValueError(f"{known[0][0].path} and {network.path} differ in {what}, {known[0][1]} and "
                                 f"{value}; make both from the same pictures")


def say_parts(networks):
    """Tell people where maps of different parts of the pictures, or of other sizes, are compared."""
    unknown = [network for network in networks if network.part is None]
    if 0 < len(unknown) < len(networks):
        command.say(f"which part of the pictures {unknown[0].path} shows is not known: it is taken to show "
                    "what the others do")
    elif len({(network.shape, str(network.part)) for network in networks}) > 1:
        command.say("these maps show different parts of the pictures or have different sizes: compared on "
                    "the part that all show, at the pixels of the coarsest")


def part_box(part, size):
    """Where part_shown's part of a picture of size (width, height) is: (left, upper, right, lower)."""
    units = {"pixels": (1, 1), "shorter side": (min(size), min(size)), "each side": size}[part["of"]]
    half = part["width"] * units[0] / 2, part["height"] * units[1] / 2
    x, y = size[0] / 2, size[1] / 2
    return x - half[0], y - half[1], x + half[0], y + half[1]


def parts_of(networks, args):
    """Where on the pictures these networks' maps lie: None where all have the same pixels, else boxes
    (n, K, 4), or (1, K, 4) where all pictures are alike in that."""
    parts = [network.part for network in networks]
    if None in parts or len({(network.shape, str(network.part)) for network in networks}) == 1:
        return None
    sizes, kinds = [(1, 1)], {part["of"] for part in parts}
    if kinds not in ({"shorter side"}, {"each side"}):
        if not args.dataset:
            raise ValueError(f"these maps show shares of {' and of '.join(sorted(kinds))} of their pictures; "
                             "give --dataset, whose pictures' sizes tell what they have in common")
        names, paths, _ = pictures_of(networks[0], args)
        if None in paths:
            raise ValueError(f"{args.dataset} lacks {names[paths.index(None)]} of {networks[0].path}")
        sizes = [pictures.size_of(path) for path in paths]
    return np.array([[part_box(part, size) for part in parts] for size in sizes])


def make_groups(networks, all_folds):
    """[(networks whose maps are compared at once, for each of their pairs: does it count?)].

    Fold k with fold k; a file without a fold with every other; with all_folds also the folds of one loss.
    """
    groups = [networks]
    if all(network.fold is not None for network in networks):
        of_folds, of_models = {}, {}
        for network in networks:
            of_folds.setdefault(network.fold, []).append(network)
            of_models.setdefault(network.model, []).append(network)
        groups = [*of_folds.values(), *(of_models.values() if all_folds else ())]
    counted = []
    for group in groups:
        counts = [a.fold == b.fold or None in (a.fold, b.fold) or (all_folds and a.model == b.model)
                  for a, b in itertools.combinations(group, 2)]
        counted += [(group, counts)] if any(counts) else []
    if len(networks) > 1 and not counted:
        raise ValueError("no two of these maps are of one fold; --all-folds compares the folds of one loss")
    return counted


def read_blocks(networks, number):
    """Yield (start, maps [(b, H, W), …]) of every `number` pictures; nothing stays mapped."""
    for start in range(0, networks[0].shape[0], number):
        arrays = [np.load(network.path, mmap_mode="r") for network in networks]
        yield start, [np.array(array[start:start + number]) for array in arrays]


def pictures_of(network, args):
    """(names, paths, masks) of the pictures of these maps, in --dataset or else the folder --masks.

    Raises ValueError where they can't be told.
    """
    record, n = network.record, network.shape[0]
    if args.dataset:
        split = "all" if "rows" in record else record.get("split", "test")
        dataset = pictures.open_dataset(args.dataset, args.data_root, split)
    else:  # in natural order, as the pictures are
        dataset, record = pictures.open_folder(Path(args.masks), "all"), {**record, "pictures": {}}
    names = folders.picture_names(record, n, dataset)
    if names is None or (network.record["pictures"].get("left_out") and not args.dataset):
        raise ValueError(f"{network.path} has {n:,} maps, {args.dataset or args.masks} "
                         f"{len(dataset.relative):,} other pictures; give saliency.py's --dataset")
    paths = dict(zip(dataset.relative, dataset.paths))
    masks = dict(zip(dataset.relative, dataset.masks or []))
    return names, [paths.get(name) for name in names], [masks.get(name) for name in names]


def find_mask(folder, name):
    """The mask of the picture a/b.jpg: folder/a/b.png, else folder/b.png; None where neither is there."""
    parts = Path(name).with_suffix(".png").parts
    places = [Path(folder, *parts[k:]) for k in range(len(parts))]
    return next((place for place in places if place.is_file()), None)


def find_masks(network, args):
    """The mask of each picture of these maps. Raises ValueError where one can't be told."""
    names, paths, masks = pictures_of(network, args)
    if args.masks == "alpha":
        masks = paths
    elif args.masks != "own":
        masks = [find_mask(args.masks, name) for name in names]
    missing = [name for name, mask in zip(names, masks) if mask is None]
    if missing:
        raise ValueError(f"masks are missing for {len(missing)} of {len(names)} pictures "
                         f"({files.some(missing)}); expected a PNG of each picture's name, in the data "
                         "set or in --masks DIR")
    return masks
