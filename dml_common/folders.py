"""What lies in a results folder: data sets, networks, arrays with their JSON; whether they belong together.

    results/<dataset>/<slug>/fold<k>[.seed<s>]/{emb,maps,maps_ceiling}.npy, their .json, labels.csv, props.csv
    models/trained/<dataset>/<slug>/fold<k>/{config.json,history.csv,histograms.csv}
"""
import re
from collections import defaultdict
from itertools import combinations, product
from pathlib import Path

from dml_common import files, pictures
from dml_common.properties import SIGNIFICANCE

TYPES = ("ranking", "classification", "other", "none")  # of losses, in the order of every table and figure
ARRAYS = {"emb": 2, "maps": 3, "maps_ceiling": 3}  # and their dimensions
MAY_DIFFER = {"seed", "noise_of", "ceiling", "limit", "pick"}  # options of arrays that belong together

# Tables: what makes each, the columns that it must have, its measures.
PAIR = ["model_a", "fold_a", "model_b", "fold_b"]
TABLES = {
    "nrprec": ("nrprec.py", ["embeddings", "property", "queries", "r_precision", "nr_precision"],
               ["nr_precision", "r_precision"]),
    "compare": ("compare.py", [*PAIR, "n", "left_out", "correlation", "jsd", "ceiling"],
                ["correlation", "jsd", "ceiling", "corrected", "jsd_nats"]),
    "masks": ("compare.py --masks", ["model", "fold", "measure", "n", "mean", "std", "low", "high"],
              ["masks"]),
    "faithfulness": ("saliency.py --faithfulness", ["model", "fold", "measure", "n", "mean", "std"],
                     ["faithfulness"]),
    "embeddings": ("compare.py --embeddings", [*PAIR, "cka", "overlap"],
                   ["cka", "overlap", "overlap_chance"]),
    "sanity": ("saliency.py --randomise", ["model", "fold", "layers", "of", "correlation", "correlation_std"],
               ["sanity"]),
    "pairs": ("pairs.py", ["embeddings", "label", "jsd", "bins", "r_precision", "map_at_r"], ["pairs"])}


def in_order(types):
    """The names of {name: type}: by type, then as in models/losses.csv, then by name."""
    listed = {row["name"]: number for number, row in enumerate(files.losses())}
    return sorted(types, key=lambda name: (TYPES.index(types[name]), listed.get(name, len(listed)), name))


def find_datasets(folder):
    """The data sets' folders in RESULTS, or RESULTS itself. Raises ValueError when there are no results."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected results/ or one data set's folder in it")
    places = [place for place in (folder, *sorted(folder.iterdir())) if place.is_dir() and (
        any((place / f"{name}.csv").is_file() for name in TABLES) or fold_folders(place))]
    if not places:
        raise ValueError(f"{folder}: no results; expected {folder}/<dataset>/<loss>/fold<k>/emb.npy or "
                         f"maps.npy, or tables as {folder}/<dataset>/nrprec.csv: python embed.py, nrprec.py, "
                         "saliency.py and compare.py make them")
    return [folder] if folder in places else places


def fold_folders(folder):
    """The networks' folders <slug>/fold<k>[.seed<s>] of a data set."""
    return [place for place in sorted(folder.glob("*/fold*"))
            if place.is_dir() and fold_and_seed(place.name)[0] is not None]


def fold_and_seed(text):
    """"fold0.seed2" or "0.seed2" -> (0, 2), "fold0" or "0" -> (0, None), anything else (None, None)."""
    match = re.fullmatch(r"(?:fold)?([0-9]{1,9})(?:\.seed([0-9]{1,19}))?", text)
    return tuple(one and int(one) for one in match.groups()) if match else (None, None)


def find_networks(folder, models):
    """The networks of one data set's folder in order, and what is wrong with arrays of theirs, in words.

    A network is a dict: name (its loss, else its backbone; its slug where two share that), slug, number and
    seed (of fold<k>.seed<s>), fold (k; None without a loss), type, distance, folder, config (of its training,
    or {}), history (a path or None), of each of ARRAYS its JSON with path and array (memory-mapped) or None.
    """
    networks, broken, known = [], [], files.losses()
    for place in fold_folders(folder):
        slug, (number, seed) = place.parent.name, fold_and_seed(place.name)
        about = files.read_sidecar(place / "emb.npy") or files.read_sidecar(place / "maps.npy")
        row = next((row for row in known if row["slug"] == slug), {})
        name = str(about.get("loss") or row.get("name") or about.get("backbone") or slug)
        row = next((row for row in known if row["name"] == name), row)
        plain = bool(about.get("backbone")) and not about.get("loss") and not row  # a backbone without a loss
        home = training_folder(place, about.get("checkpoint"), folder, models)
        config, history = files.read_sidecar(home / "config.json"), home / "history.csv"
        kind = row.get("type") or ("none" if plain else about.get("type") or config.get("type"))
        networks.append({
            "name": name, "slug": slug, "number": number, "seed": seed, "fold": None if plain else number,
            "type": kind if kind in TYPES else "other", "folder": place, "config": config,
            "distance": about.get("distance") or row.get("distance"),
            "history": history if history.is_file() else None,
            **{array: open_array(place / f"{array}.npy", n, broken) for array, n in ARRAYS.items()}})
    names = [name for name, _ in {(network["name"], network["slug"]) for network in networks}]
    for network in networks:
        if names.count(network["name"]) > 1:
            network["name"] = network["slug"]
    order = in_order({network["name"]: network["type"] for network in networks})
    networks.sort(key=lambda network: (order.index(network["name"]), network["number"], network["seed"] or 0))
    return networks, broken


def training_folder(place, checkpoint, folder, models):
    """The folder of a network's config.json: the checkpoint of its JSON, wherever models/ lies now."""
    if not checkpoint:
        return models / "trained" / folder.resolve().name / place.parent.name / place.name
    homes = [home / checkpoint for home in (Path(), folder, *folder.resolve().parents[:3], files.ROOT)]
    if "trained" in Path(checkpoint).parts:
        homes.append(models / checkpoint[checkpoint.index("trained"):])
    return next((home for home in homes if (home / "config.json").is_file()), homes[-1])


def open_array(path, dimensions, broken):
    """An array's JSON with the path and the array; None where it is not there, or broken and so listed."""
    if path.with_name(f"{path.name}.part").exists() and not path.exists():
        broken.append(f"{path} is half-finished; left out: the command that makes it continues it")
    if not path.is_file():
        return None
    about = {"options": {}, "pictures": {}, **files.read_sidecar(path), "path": path}
    try:
        array = about["array"] = files.read_array(path)
        n = about["pictures"].get("number", len(array) if array.ndim else 0)
        if array.ndim != dimensions or array.dtype.kind not in "fiub" or not array.size or n != len(array):
            raise ValueError(f"{path}: shape {array.shape} of {array.dtype}, {n} pictures in its JSON; "
                             f"expected {dimensions} dimensions of numbers, a row a picture")
    except (ValueError, OSError) as error:
        broken.append(f"{error}; left out")
        return None
    return about


def check_together(networks):
    """Raise ValueError naming two arrays of one data set made with other options, from other pictures (of
    one fold) or from other checkpoints (of one network)."""
    arrays = [(kind[:3], network["fold"] if network["seed"] is None else network["folder"].name,
               network[kind]) for kind in ARRAYS for network in networks if network[kind]]
    for (kind, fold, a), (other_kind, other, b) in combinations(arrays, 2):
        if kind != other_kind:
            continue
        options = [f"{key}: {a['options'].get(key)}, {b['options'].get(key)}"
                   for key in {**a["options"], **b["options"]}
                   if key not in MAY_DIFFER and a["options"].get(key) != b["options"].get(key)]
        digests = {one["pictures"].get("sha256") for one in (a, b)} - {None}
        what = ""
        if options and a["pictures"] and b["pictures"]:
            what = f"options ({'; '.join(options)})"
        elif fold == other or None in (fold, other):
            if len(digests) > 1 or len(a["array"]) != len(b["array"]):
                what = (f"lists of pictures ({len(a['array']):,}, {len(b['array']):,}; split of config.json "
                        "says which a network has not seen: docs/own-loss.md)")
        if what:
            raise ValueError(f"{a['path']} and {b['path']} don't belong together: other {what}; make both "
                             "with the same, or in folders of their own")
    for network in networks:
        a, b = network["emb"] or {}, network["maps"] or {}
        if len({a.get("checkpoint_sha256"), b.get("checkpoint_sha256")} - {None}) > 1:
            raise ValueError(f"{a['path']} and {b['path']} come from different checkpoints (their "
                             "checkpoint_sha256 differ); make both from the same network")


def open_pictures(given, root, names):
    """{a data set's name in RESULTS: its pictures}: of the given folders, else the published ones here."""
    opened = [pictures.open_dataset(place, root, "all") for place in given]
    if len(given) == len(names) == 1:
        return {names[0]: opened[0]}  # the folder may have been renamed
    datasets = {dataset.name: dataset for dataset in opened}
    for name in datasets:
        if name not in names:
            raise ValueError(f"--dataset {name}: RESULTS has {', '.join(names) or 'no arrays'}; give the "
                             "folder of one")
    for name in names:
        plain = name.partition("@")[0]  # cars196 of the networks of another split, cars196@random
        try:
            if plain in datasets:
                datasets.setdefault(name, datasets[plain]._replace(name=name))
            elif plain in pictures.PUBLISHED and name not in datasets:
                datasets[name] = pictures.open_dataset(name, root, "all")
        except (OSError, ValueError):
            pass  # nobody asked for it: what needs it is left out
    return datasets


def picture_names(about, n, dataset=None):
    """The names of an array's n pictures in their order, from a labels.csv that embed.py wrote or from the
    data set; None where none agrees with its JSON."""
    lists = files.picture_lists(about["path"])
    if dataset is not None:  # rows: held out when the network was trained
        rows = [row for row in about.get("rows") or [] if row < len(dataset.relative)]
        lists += [dataset.relative, [dataset.relative[row] for row in rows]]
        if dataset.splits is not None:
            rows = (dataset.splits == about.get("split")).nonzero()[0]
            lists.append([dataset.relative[row] for row in rows])
    return files.listed_names(about, n, lists)


def row_properties(array, n, names):
    """{property: str (n,)} of an array's n rows, joined by their names (None: in their order): labels.csv's
    and props.csv's beside it, else the props.csv of its data set; "" where there is no value."""
    places = [array.with_name("labels.csv"), array.with_name("props.csv")]
    if not places[1].is_file():
        places[1] = array.parent.parent.parent / "props.csv"
    properties = {}
    for path in filter(Path.is_file, places):
        if [name.lower() in files.IDENTIFIERS for name in files.read_table(path)] != [True]:
            properties |= files.read_properties(path, None, names, missing=files.MISSING)
            if any(len(column) != n for column in properties.values()):
                raise ValueError(f"{array} and {path} differ in rows; both must list the same pictures, in "
                                 "the same order or by name")
    return properties


def make_folder(out, name, inputs=()):
    """Make the folder of an output, in which a file of this name is written last.

    Raises ValueError when it is a folder of results (inputs) or of our own tables, or can't be written to.
    """
    own = [files.ROOT / "models", files.ROOT / "published"]
    if out.resolve() in [folder.resolve() for folder in [*inputs, *own]]:
        raise ValueError(f"--out {out} is a folder of results or of what is read with them; writing there "
                         "could destroy them: choose another")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {out} can't be made ({error.strerror}); choose another folder") from None
    files.check_output(out / name)


def read_properties(folder, networks):
    """{property: its values} of the props.csv of the data set and of its folds (one network's of each)."""
    paths = [network["folder"] / "props.csv" for network in networks]
    folds = {network["fold"]: path for network, path in zip(networks, paths) if path.is_file()}
    properties = defaultdict(set)
    for path in filter(Path.is_file, (folder / "props.csv", *folds.values())):
        for name, values in files.read_properties(path, missing=files.MISSING).items():
            properties[name].update({*values.tolist()} - {""})
    return properties


# ---------------------------------------------------------------- what a reader must know


def listing(items, most=3):
    items = list(map(str, items))
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def warn(results):
    """What the JSONs and the tables say that a reader must know, a line each."""
    networks, tables = results.networks, results.tables
    maps = [network for network in networks if network["maps"]]
    trained = [network for network in networks if network["type"] != "none"]
    for some, of, what in (
            ([one for one in maps if not one["maps_ceiling"]], maps, "have no second maps (saliency.py "
             "--ceiling): a low correlation of theirs may be noise alone"),
            ([one for one in trained if one["config"].get("frozen_trunk")], trained,
             "were trained with a frozen trunk: they differ in the last layer alone"),
            ([one for one in trained if one["config"].get("loss_parameters")], trained, "have the parameters "
             "of models/losses.csv, not tuned ones; others may rank losses differently")):
        names = [one["name"] if one["fold"] is None else
                 f"{one['name']} {one['folder'].name.replace('fold', 'fold ')}" for one in some]
        if names:
            yield f"{len(some)} of {len(of)} networks ({listing(names)}) {what}"

    pairs, scores = tables.get("compare", []), tables.get("nrprec", [])
    noise = {(one["name"], one["fold"], one["seed"]) for one in maps
             if one["maps"]["options"].get("shared_noise")}
    shared = [line for line in pairs if noise.issuperset(line["ends"])]
    raised = sum(line["ceiling"] is None for line in shared)
    left_out = max([line["left_out"] or 0 for line in pairs], default=0)
    tested = [line for line in scores if line.get("p_holm") is not None]
    numbers = sorted({int(line["permutations"]) for line in tested if line.get("permutations")})
    properties = len({line["property"] for line in tested})
    skipped = sorted({line["property"] for line in scores if line.get("skipped")})
    without = sorted({f"{line['property']} {line['missing']:,.0f}" for line in scores if line.get("missing")})
    arrays = [network[kind] for network in networks for kind in ("emb", "maps") if network[kind]]
    unread = sorted({str(name) for about in arrays for name in about["pictures"].get("left_out") or []})
    backbones = sorted({str(about["backbone"]) for about in arrays if about.get("backbone")})
    others = [name for name, kind in results.types.items() if kind == "other"]
    few = [f"{words} of {min(lengths):,}" for kind, words, least in
           (("emb", "embeddings", 1000), ("maps", "saliency maps", 100))
           if (lengths := [len(network[kind]["array"]) for network in networks if network[kind]])
           and min(lengths) < least]
    for true, text in (
            (raised, f"{raised} of {len(pairs)} pairs of maps share their noise, which raises correlations; "
             "no ceiling bounds them"),
            (shared and not raised, f"the maps of {len(noise)} networks share their noise, so each was "
             "compared with the other networks' second maps, whose noise is another"),
            (scores and not tested, "NR-Prec was not tested by permutation (nrprec.py --permutations N): "
             "Table 6 has the published mark alone"),
            (0 < len(tested) < sum(line["nr_precision"] is not None for line in scores), "some networks' "
             "NR-Prec were tested by permutation, others not: Table 6 has the published mark instead"),
            (len(numbers) > 1, f"p-values come from different numbers of permutations ({listing(numbers)})"),
            (numbers and properties / (1 + numbers[0]) >= SIGNIFICANCE, f"{listing(numbers[:1])} "
             f"permutations of {properties} properties can't give p_holm < {SIGNIFICANCE}: no mark"),
            (few, f"few pictures: {listing(few)} pictures for each network; means over them are uncertain"),
            (unread, f"{len(unread):,} pictures were left out, they could not be read ({listing(unread)})"),
            (left_out, f"up to {left_out:,.0f} pictures are left out of a pair of maps, because a map is "
             "constant or not finite"),
            (skipped, f"pictures whose value no other has were skipped as queries ({listing(skipped)})"),
            (without, f"pictures without a value of a property do not count in it ({listing(without)})"),
            (any(line.get("nr_precision_se") is not None for line in scores),
             "NR-Prec rests on a random sample of queries (nrprec.py --queries)"),
            (len(backbones) > 1, f"losses may differ by their backbones alone ({listing(backbones)})"),
            (len({(one["fold"], one["seed"]) for one in networks if one["fold"] is not None}) == 1,
             "one fold only: how much a loss varies from training to training is unknown"),
            (results.select("training", key="jsd") and not results.select("training", key="jsd_null"),
             "history.csv has no jsd_null (an older train.py made it): JSD of few pairs is biased up"),
            (others, f"not in models/losses.csv: {listing(others)}; kept, type “other”")):
        if true:
            yield text


def gaps(results):
    """What is missing: (table, what) …"""
    absent = [row["name"] for row in files.losses() if row["name"] not in results.types]
    if absent:
        yield "", f"no results of {listing(absent, 99)}"
    for table, (script, _, (measure, *_)) in TABLES.items():
        cells, names = results.cells(measure), results.names(measure)
        if not cells:
            yield table, f"{table}.csv is not there, or empty: python {script} makes it"
            continue
        lacking = [name for name in results.types if name not in names]
        if lacking:
            yield table, f"{table}.csv has no rows of {listing(lacking, 99)}"
        have = defaultdict(set)
        for row in results.select(measure):
            have[row.network, row.other].add(row.fold)
        folds = {fold for mine in have.values() for fold in mine if isinstance(fold, int)}
        for (a, b), mine in have.items():
            if None not in mine and folds - mine and a != b:
                pair = " and ".join(filter(None, (a, b)))
                yield table, f"{pair}: fold {listing(sorted(folds - mine), 99)}; the mean is over the others"
        expected = combinations(names, 2) if table in ("compare", "embeddings") else ()
        if table == "nrprec":
            expected = product(names, results.keys(measure))
        for cell in expected:
            if cell not in cells:
                yield table, f"{' and '.join(cell)}: no {measure}"
    if results.select("correlation") and not results.select("ceiling"):
        yield "ceiling", "no noise ceiling: python saliency.py … --ceiling makes the second maps"
    if results.select("nr_precision") and not results.select("nr_precision", "test"):
        yield "nrprec_tests", "ranking and classification can't be compared: two losses of each are needed"
    tested = {(row.network, row.fold, row.seed) for row in results.select("training", epoch="best")}
    for network in results.networks:
        place = network["name"], network["fold"], network["seed"]
        if network["history"] and network["type"] != "none" and place not in tested:
            yield "training", f"{network['history']}: no test at the end; training may be half-finished"
