"""Which arrays embed.py and saliency.py are asked for: networks, pictures, and what their JSON says."""
import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dml_common import command, files
from dml_common.rowfile import SIZES, is_complete


def add_options(add, name):
    """Which pictures, which networks, where to; add: a parser's add_argument."""
    add("--dataset", required=True, metavar="NAME|FOLDER|CSV",
        help="cars196, cub200, sop, a folder or a CSV with a path column; cars196@random: networks of "
        "train.py --split random")
    add("--split", default="test", choices=["train", "test", "all"], help="of a data set with splits (test)")
    add("--data-root", metavar="DIR", help="folder of the published data sets (DML_DATA_ROOT, else data/)")
    add("--model", help="a network without a loss: bninception, inception_v3, efficientnet_lite0, timm:NAME, "
        "torchvision:NAME, hf:OWNER/NAME or package.module:factory")
    add("--output", metavar="KEY", help="which of several outputs is the embedding (pooler_output, "
        "image_embeds, or the only one)")
    add("--loss", help="losses of models/losses.csv with commas, None, or all: what is there (all)")
    add("--fold", default="all", help="0, 1, 2, 3, 0.seed2 (train.py --seed 2), several, or all (all)")
    add("--trained-on", metavar="DATASET", help="the data set whose checkpoints are taken (--dataset)")
    add("--checkpoint", metavar="DIR", help="a folder with trunk_best.pth and embedder_best.pth")
    add("--models", default=files.ROOT / "models", metavar="DIR", help="folder of the checkpoints (models/)")
    add("--weights", metavar="FILE", help="tensors of --model or --loss None, .pth or .safetensors (those of "
        "its package, or in torch's hub cache)")
    command.add_speed(add)
    add("--out", type=Path, default=Path("results"), metavar="FILE.npy|DIR",
        help=f"one network's array, or the folder of all: DIR/<dataset>/<slug>/fold<k>/{name} (results)")
    add("--as", dest="name", metavar="NAME", help="the network of --model or --checkpoint, trained "
        "elsewhere, stands beside the others in results/, as that of a loss of this name and of one --fold")
    add("--type", choices=["ranking", "classification"], help="of that loss (it stands apart, as “other”)")
    add("--skip-unreadable", action="store_true", help="leave pictures out that can't be read (stop there)")


class Job(NamedTuple):
    """One array to make: what a network gives for some pictures of a data set, a row each."""

    spec: dict  # of networks.find
    dataset: NamedTuple  # pictures.Dataset: what the network is analysed on
    numbers: list  # in it, of the rows' pictures
    path: Path
    about: dict  # the JSON beside the array
    folder: Path  # for the tables of all networks

    def without(self, left_out):
        """The JSON of an array that lacks these rows: their pictures could not be read."""
        names = [self.dataset.relative[self.numbers[row]] for row in left_out]
        kept = np.delete(self.numbers, left_out).tolist()
        pictures = listed(self.dataset, kept, self.about["options"])
        return {**self.about, "pictures": {**pictures, "left_out": names, "listed": self.about["pictures"]}}


def jobs(args, name, options, seed, choose=None):
    """The arrays that a command asks for: DIR/<dataset>/<slug>/fold<k>/NAME, or one at --out FILE.npy.

    options: what the JSON says of the computation; seed: of random layers; choose: data set -> (data set, the
    numbers of its pictures that are asked for); all without it.
    """
    import PIL
    import torch

    from dml_common import networks, pictures

    one = args.out.suffix == ".npy"
    dataset = pictures.open_dataset(args.dataset, args.data_root, args.split)
    loss = args.loss or (None if args.model or args.checkpoint else "all")
    specs = networks.find(args.trained_on or dataset.name, loss, args.fold, args.model, args.checkpoint,
                          args.weights, seed, args.models, args.output)
    if args.name or args.type:
        specs = [named(args, specs, dataset.name)]
    if one and len(specs) > 1:
        raise ValueError(f"--out {args.out} is one array, but {len(specs)} networks were asked for "
                         f"({specs[0]['name']}, {specs[1]['name']}, …); give a folder")
    configs = [Path(spec["files"][0]).with_name("config.json") for spec in specs if spec["files"]]
    inputs = [args.dataset, dataset.folder / "props.csv", *configs]
    for ending in (".npy", ".json", ".labels.csv", ".classes.csv", ".props.csv") if one else ():
        files.check_output(args.out.with_suffix(ending), inputs)
    if not one and (args.out / dataset.name).resolve() == dataset.folder.resolve():
        raise ValueError(f"--out {args.out}: results would go into the data set itself, {dataset.folder}, "
                         "over its tables; give another folder")
    for note in [*dataset.notes, *(spec["note"] for spec in specs)]:
        if note and command.my_share()[0] == 0:
            command.say(note)
    versions = {"torch": torch.__version__, "numpy": np.__version__, "pillow": PIL.__version__}
    wanted, folder = [], args.out.parent if one else args.out / dataset.name
    for spec in specs:
        own = pictures.own_pictures(dataset, spec["config"], args.dataset, args.data_root, args.split)
        own, numbers = choose(own) if choose else (own, range(len(own.paths)))
        about = {"dataset": dataset.name, "split": own.split}
        if own.split == "held out" and not options.get("against"):
            about["rows"] = [spec["config"]["split"]["test"][i] for i in numbers]  # of the whole data set
        about |= {**networks.describe(spec), "options": options, "versions": versions,
                  "pictures": listed(own, numbers, options)}
        if args.name:
            about["type"] = spec["type"]
        path = args.out if one else folder / spec["slug"] / f"fold{spec['fold'] or 0}" / name
        wanted.append(Job(spec, own, list(numbers), path, about, folder))
    return wanted


def named(args, specs, dataset):
    """The one network asked for, as --as and --type name it: beside those of losses.csv in every table."""
    from dml_common import networks

    fold = "0" if args.fold == "all" else args.fold
    slug = networks.slug(args.name or "")
    if not slug or len(specs) > 1 or args.loss:
        raise ValueError("--as NAME [--type …] names one network that is given by --model or --checkpoint")
    if slug in [row["slug"] for row in files.losses()]:
        raise ValueError(f"--as {args.name}: models/losses.csv has a loss of this name; choose another")
    if not fold.isdecimal() or len(fold) > 9:
        raise ValueError(f"--as {args.name}: --fold is {fold}; expected one number")
    spec = {**specs[0], "name": f"{args.name} fold {fold}", "loss": args.name, "slug": slug,
            "type": args.type, "fold": int(fold)}
    others = sorted(Path(args.models, "trained", dataset).glob(f"*/fold{fold}/config.json"))
    config = files.read_sidecar(others[0]) if others and args.split == "test" else {}
    if "split" in config and "split" not in spec["config"]:
        spec["config"] = {**spec["config"], "dataset": config.get("dataset"), "split": config["split"]}
        spec["note"] = f"{spec['name']}: on the pictures that were held out for {others[0].parent}"
    return spec


def listed(dataset, numbers, options):
    """What the JSON says of these pictures: arrays with the same sha256 have the same rows.

    Of pairs (saliency.py --against) their names too: those of a pair stand one after the other.
    """
    names, sizes = [dataset.relative[i] for i in numbers], hashlib.sha256()
    for name, path in zip(names, (dataset.paths[i] for i in numbers)):
        sizes.update(b"%s\0%d\n" % (os.fsencode(name), path.stat().st_size if path.exists() else -1))
    about = {"number": len(names), "sha256": files.pictures_sha256(names), SIZES: sizes.hexdigest()}
    return {**about, "names": names} if options.get("against") else about


def incomplete(jobs, alike):
    """Groups of the jobs whose arrays are not complete yet; alike: job -> what all jobs of a group share."""
    groups = {}
    for job in jobs:
        if not is_complete(job.path, job.about):
            groups.setdefault(repr(alike(job)), []).append(job)
    if not groups and command.my_share()[0] == 0:
        command.say(f"nothing to do: {len(jobs)} of {len(jobs)} arrays are there")
    return list(groups.values())


def depends_on_batch(embed, picture, name):
    """Does a picture's embedding depend on what else is in its batch (batch norms without statistics)?

    It is said. embed: pictures (B, 3, H, W) -> (B, m), a tensor or an array; picture: (1, 3, H, W).
    """
    import torch

    other = torch.linspace(-1, 1, picture.numel(), device=picture.device).view_as(picture)
    alone, *both = (torch.as_tensor(one) for one in (*embed(picture), *embed(torch.cat([picture, other]))))
    if not (both[0] - alone).norm() > 1e-2 * alone.norm():  # of nan, which is refused later, neither holds
        return False
    command.say(f"{name}: a picture's embedding depends on its batch: they pass one at a time")
    return True


# ---------------------------------------------------------------- some of the pictures, and pairs of them


def add_choice(add):
    """Which of the pictures; add: a parser's add_argument."""
    add("--limit", type=int, metavar="N", help="only the first N pictures (pairs)")
    add("--pick", type=integers, metavar="I,J,K", help="only the pictures (pairs) of these numbers, from 0")
    add("--against", metavar="PICTURE|CSV", help="why are two pictures alike? Maps of the distance of each "
        "picture to this one, or of the pairs in a CSV file's first two columns, on both: rows 2k and 2k + 1")


def integers(text):
    """The numbers of --pick."""
    return [int(part) for part in text.split(",")]


def chosen(args, dataset):
    """(data set, numbers of the pictures asked for); of pairs the two of each, one after the other.

    Raises ValueError for numbers that are not there.
    """
    dataset, pairs = pairs_of(args.against, dataset) if args.against else (dataset, None)
    n = len(dataset.paths if pairs is None else pairs)
    bad = [i for i in args.pick or [] if not 0 <= i < n]
    if bad:
        what = "pictures" if pairs is None else "pairs"
        raise ValueError(f"--pick {bad[0]}: there are {n:,} {what}; expected numbers from 0 to {n - 1}")
    picked = list(range(n)[:args.limit] if args.pick is None else dict.fromkeys(args.pick))
    return dataset, picked if pairs is None else [number for i in picked for number in pairs[i]]


def pairs_of(against, dataset):
    """(data set, [(number, number), …]): each of its pictures with one, or the pairs of a CSV file's rows.

    A picture that is a file of its own joins the data set. Raises ValueError naming pictures that it lacks.
    """
    n, names = len(dataset.paths), [against]
    if Path(against).suffix.lower() == ".csv":
        table = files.read_table(against)
        if len(table) < 2:
            raise ValueError(f"{against} has one column; expected two, with the names of a pair's pictures")
        first, second, *_ = table.values()
        names = list(dict.fromkeys([*first, *second]))
        if "" in names:
            raise ValueError(f"{against}: a row names one picture; expected two, the pictures of a pair")
    elif Path(against).is_file():
        same = [k for k, path in enumerate(dataset.paths) if path.exists() and path.samefile(against)]
        if not same:
            dataset = dataset._replace(paths=[*dataset.paths, Path(against)],
                                       relative=[*dataset.relative, against])
        return dataset, [(k, same[0] if same else n) for k in range(n)]
    try:
        number = dict(zip(names, files.rows_by_name(names, dataset.relative, dataset.name).tolist()))
    except ValueError as error:
        raise ValueError(f"--against {against}: {error}") from None
    if names == [against]:
        return dataset, [(k, number[against]) for k in range(n)]
    return dataset, [(number[a], number[b]) for a, b in zip(first, second)]


def kept_rows(job):
    """The rows of job.numbers that its array has: of all pictures, or pairs, that could be read."""
    left_out = files.read_sidecar(job.path)["pictures"].get("left_out", [])
    step = 2 if job.about["options"].get("against") else 1
    names = [job.dataset.relative[number] for number in job.numbers]
    together = [tuple(names[k:k + step]) for k in range(0, len(names), step)]
    gone = {tuple(left_out[k:k + step]) for k in range(0, len(left_out), step)}
    return [row for row in range(len(names)) if together[row // step] not in gone]
