"""One self-contained page of an analysis: what came out, in pictures first, how it was made, how sure one is.

Input:  RESULTS       results/ of the other scripts, or one data set's folder in it
        --tables      folder of tables.py: tables, findings with their tests, warnings
        --figures     folder of figures.py
        --dataset     the pictures below the maps (as for embed.py; once for each data set)
Output: report.html   opens anywhere, asks no network for anything, the same bytes for the same input

    python report.py results/cars --tables tables --figures figures --dataset examples/cars --out report.html
    python report.py results --pictures 1000 --size 160 --out report.html      # more and larger maps

What is missing is left out and said on the page. A page from a stranger is a program: the policy of this one
runs its own script alone, and everything read is escaped. Layout, style and script are templates/report.*.
Needs the extra `report` (jinja2).
"""
if __name__ == "__main__":  # before NumPy is imported: Ctrl-C ends in one line from here on
    import sys
    try:
        from dml_common import command
    except ImportError:
        print("report.py: the command needs the folder dml_common/ beside it; copy that too", file=sys.stderr)
        sys.exit(2)
    command.begin()

import base64
import hashlib
import io
import json
import math
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image

TEMPLATES = Path(__file__).resolve().parent / "templates"
NO_CHARACTER = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # in HTML
SETTINGS = ("split", "backbone", "frozen_trunk", "preprocessing", "distance", "seed", "loss_parameters")
NO_SETTING = ("test", "pictures", "labels_sha256", "ceiling", "noise_of")  # parts of a split and of options

# ---------------------------------------------------------------- pictures and maps as small images


def data_uri(content, kind):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def webp(image, quality):
    """A Pillow image as a WebP data URI."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "WEBP", quality=quality, method=4)
    return data_uri(file.getvalue(), "webp")


def small(path, size, preprocessing=None):
    """A picture, as the network saw it (resized and cropped), its longer side `size` at most."""
    from dml_common.pictures import read_rgb, resize_and_crop

    image = resize_and_crop(read_rgb(path), preprocessing or {"resize": None, "crop": None})
    image.thumbnail((size, size))
    return image


# The lists in tables.json and figures.json, and what each of their items has.
GAP = {"dataset", "what"}
WRITTEN = {"tables": {"tables": {"name", "title", "caption", "header", "rows"}, "findings": {"text"},
                      "warnings": set(), "missing": GAP},
           "figures": {"figures": {"name", "title", "caption", "svg", "png"}, "missing": GAP}}


def figure_uri(folder, figure):
    """A drawing as its SVG, a photograph (or an SVG of 2 MiB) as a smaller WebP.

    Only files of the folder are read: no figures.json puts a private file into a page that is passed on.
    """
    svg, png = (figure[kind] and folder / Path(figure[kind]).name for kind in ("svg", "png"))
    if svg and svg.stat().st_size < 2 << 20:
        return data_uri(svg.read_bytes(), "svg+xml")
    return webp(small(png, 1800), 80)


def sprite(maps, size):
    """Maps (K, H, W) in [0, 1] side by side in one grey image, ceil(√K) in a row, each `size` long at most.

    nan is 0, what lies outside is cut.
    """
    K, H, W = maps.shape
    height, width = (max(1, round(size * side / max(H, W))) for side in (H, W))
    columns = math.ceil(math.sqrt(K))
    sheet = Image.new("L", (columns * width, math.ceil(K / columns) * height))
    for k, one in enumerate(np.clip(np.nan_to_num(maps.astype(np.float32)), 0, 1)):
        grey = Image.fromarray((255 * one).round().astype(np.uint8))
        grey = grey.resize((width, height), Image.Resampling.BILINEAR)
        sheet.paste(grey, (k % columns * width, k // columns * height))
    return sheet


def gallery(networks, datasets, most, size):
    """The sets of the gallery, see gallery_set: of each fold of a data set the maps of one resize and crop.

    datasets: {name: its pictures}; most: about so many pictures in all, every n-th of each set.
    """
    from dml_common import command

    groups = {}
    for network in networks:
        if network["maps"]:
            shape, geometry = network["maps"]["array"].shape, network["maps"].get("preprocessing", {})
            key = (network["dataset"], network["fold"], network["seed"], shape, geometry.get("resize"),
                   geometry.get("crop"))
            groups.setdefault(str(key), []).append(network)
    total = sum(len(members[0]["maps"]["array"]) for members in groups.values())
    step = max(1, math.ceil(total / most))
    with command.bar(total // step, "gallery", " pictures") as bar:
        return [gallery_set(members, datasets.get(members[0]["dataset"]), step, size, bar)
                for members in groups.values()]


def gallery_set(members, dataset, step, size, bar):
    """What the page says of a set, its pictures, and of one of them larger maps, for the page's opening."""
    from dml_common import folders

    name, fold, seed, about = (members[0][key] for key in ("dataset", "fold", "seed", "maps"))
    label = name if fold is None else f"{name}, fold {fold}" + (f", seed {seed}" if seed is not None else "")
    n = len(about["array"])
    names = folders.picture_names(about, n, dataset)
    paths = dict(zip(dataset.relative, dataset.paths)) if dataset else {}
    columns, pictures = folders.row_properties(about["path"], n, names) if names else {}, []
    known = [(name if names else label, one) for one in names or range(n)]  # folds may share pictures
    names = names or [f"row {row}" for row in range(n)]
    for row in range(0, n, step):
        pictures.append({"name": names[row], "properties": [(key, str(columns[key][row])) for key in columns],
                         **picture_and_maps(members, row, paths.get(names[row]), size)})
        bar.update()
    first = next((k for k, picture in enumerate(pictures) if not picture["blank"]), 0)
    row = first * step
    maps = [webp(sprite(network["maps"]["array"][row:row + 1], 2 * size), 75) for network in members]
    lacking = {one for one, picture in zip(known[::step], pictures) if "picture" not in picture}
    return {"dataset": name, "label": label, "counted": ({*known}, {*known[::step]}, lacking),
            "networks": [{"name": network["name"], "type": network["type"]} for network in members],
            "pictures": pictures, "opening": {**pictures[first], "maps": maps}}


def picture_and_maps(members, row, path, size):
    """A picture, its maps, its second maps where all networks have them; which maps are constant or nan."""
    about, seconds = members[0]["maps"], [network["maps_ceiling"] for network in members]
    maps = np.stack([network["maps"]["array"][row].astype(np.float32) for network in members])  # (K, H, W)
    uris = {"maps": webp(sprite(maps, size), 60)}
    if all(second and second["array"].shape == about["array"].shape for second in seconds):
        uris["second"] = webp(sprite(np.stack([second["array"][row] for second in seconds]), size), 60)
    try:
        uris["picture"] = webp(small(path, 2 * size, about.get("preprocessing")), 75)
    except (OSError, ValueError, KeyError, TypeError):  # no picture, or a JSON of another project
        pass
    return {**uris, "blank": np.flatnonzero(~(np.ptp(maps, axis=(1, 2)) > 0)).tolist()}


# ---------------------------------------------------------------- what else stands on the page


def own_tables(datasets, gaps):
    """Tables of words in tables.json's manner: settings of {data set: networks}, what is missing, errata."""
    from dml_common import files

    path = files.ROOT / "published" / "errata.csv"
    errata = files.read_table(path) if path.is_file() else {}
    settings = [("settings", f"settings-{name}", name, *settings_rows(networks))
                for name, networks in datasets.items()]
    others = [("warnings", "missing", "Missing", ["Data", "What"], list(dict.fromkeys(gaps))),
              ("errata", "errata", "Published, and done here", list(errata), list(zip(*errata.values())))]
    keys = ("section", "name", "title", "header", "rows")
    return [dict(zip(keys, table), kind="text") for table in settings + others if table[-1]]


def settings_rows(networks):
    """How networks were trained and arrays made, as their JSONs tell: header and rows, a column a step."""
    steps, values = {"Training": "config", "Embeddings": "emb", "Saliency maps": "maps"}, {}
    for network in networks:
        for step, part in steps.items():
            about = network[part] or {}
            settings = {key: about.get(key) for key in SETTINGS} | (about.get("options") or {})
            for key, value in settings.items():
                if value is not None and key not in NO_SETTING:
                    values.setdefault(key, {step: {} for step in steps})[step][in_words(value)] = None
    rows = [[key.replace("_", " "), *map("\n".join, of_step.values())] for key, of_step in values.items()]
    return ["Setting", *steps], rows


def in_words(value):
    """A value of a JSON on one line: {"crop": 224, "scale": 255} is "crop 224, scale 255"."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {in_words(part)}" for key, part in value.items() if key not in NO_SETTING)
    if isinstance(value, list):
        return " ".join(map(in_words, value))
    return {"None": "none", "True": "yes", "False": "no"}.get(str(value), str(value))


def read_json(folder, name):
    """tables.json or figures.json of the folder given; without one, of that of its name, if it is there."""
    from dml_common.files import read_text

    path = (folder or Path(name)) / f"{name}.json"
    if folder is None and not path.exists():
        return {key: [] for key in WRITTEN[name]}
    try:
        content = json.loads(read_text(path))
        known = all(isinstance(content[key], list) and all(fields <= {*item} for item in content[key])
                    for key, fields in WRITTEN[name].items())
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        known = False
    if not known:
        raise ValueError(f"{path} is not what this version of {name}.py writes; "
                         f"python {name}.py RESULTS --out {path.parent} makes it")
    return content


def open_template():
    """templates/report.html with its style, its script and the policy that passes exactly these."""
    try:
        import jinja2
        style, script = ((TEMPLATES / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    except ImportError:
        raise ValueError("jinja2 is not installed, and the page needs it: pip install '.[report]'") from None
    except OSError:
        raise ValueError(f"the page needs the folder {TEMPLATES}, which lacks report.css or report.js; copy "
                         "that too") from None
    for k in range(21):  # the shades of cells; the policy allows no style in an element
        style += f".s{k} {{ background: color-mix(in srgb, var(--high) {5 * k}%, var(--low)); }}\n"
    hashes = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (style, script)]
    policy = ("default-src 'none'; img-src data:; style-src 'sha256-{}'; script-src 'sha256-{}'; "
              "base-uri 'none'; form-action 'none'").format(*hashes)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True,
                                     undefined=jinja2.ChainableUndefined)  # what is missing prints nothing
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    own = {"style": style, "script": script, "policy": policy}
    return environment.get_template("report.html", globals=own)


# ---------------------------------------------------------------- the command


def parse(argv):
    from dml_common import command

    parser = command.parser(__doc__)
    add = parser.add_argument
    add("results", type=Path, metavar="RESULTS", help="results/, or one data set's folder in it")
    add("--tables", type=Path, metavar="DIR", help="folder of tables.py (tables, if it is there)")
    add("--figures", type=Path, metavar="DIR", help="folder of figures.py (figures, if it is there)")
    add("--dataset", action="append", default=[], metavar="FOLDER|CSV|NAME",
        help="the pictures of the data set of this name; may be repeated")
    add("--data-root", metavar="DIR", help="folder of the published data sets (DML_DATA_ROOT, else data/)")
    add("--models", type=Path, default=Path(__file__).resolve().parent / "models", metavar="DIR",
        help="has trained/<dataset>/<slug>/fold<k>/ (models/)")
    add("--out", type=Path, default=Path("report.html"), metavar="FILE.html", help="the page (report.html)")
    add("--pictures", type=int, default=300, metavar="N", help="about so many in the gallery, evenly (300)")
    add("--size", type=int, default=112, metavar="PX", help="longer side of a map; pictures twice that (112)")
    return parser.parse_args(argv)


def main(argv=None):
    from dml_common import command, files, folders

    args = parse(argv)
    command.at_least(args, pictures=1, size=16)
    if args.out.resolve().suffix != ".html":
        raise ValueError(f"--out {args.out}: expected a name ending in .html: nothing else is written over")
    files.check_output(args.out, [TEMPLATES / "report.html"])
    template = open_template()
    tables = read_json(args.tables, "tables")
    figures = read_json(args.figures, "figures")
    for table in tables["tables"]:
        table["section"] = "training" if table["name"].startswith("training") else "tables"
    for figure in figures["figures"]:
        kind = figure["name"].partition("_")[0]
        figure["section"] = kind if kind in ("profile", "correlation", "training") else "figures"
        figure["uri"] = figure_uri(args.figures or Path("figures"), figure)

    datasets, gaps = {}, [(gap["dataset"], gap["what"]) for gap in tables["missing"] + figures["missing"]]
    for place in folders.find_datasets(args.results):
        name = place.resolve().name
        datasets[name], broken = folders.find_networks(place, args.models)
        folders.check_together(datasets[name])
        gaps += [(name, what) for what in broken]
    networks = [{**network, "dataset": name} for name, several in datasets.items() for network in several]
    pictures = folders.open_pictures(args.dataset, args.data_root, list(datasets))
    shown = [table for table in tables["tables"] if table["name"] != "errata"] + own_tables(datasets, gaps)
    groups = gallery(networks, pictures, args.pictures, args.size)
    counted = zip(*(group["counted"] for group in groups))  # pictures there are, shown, not found
    content = template.render(tables | figures, tables=shown, datasets=list(datasets), networks=networks,
                              groups=groups, n=[len(set().union(*sets)) for sets in counted])
    files.write_file(args.out, NO_CHARACTER.sub("\ufffd", content).encode("utf-8"))

    sys.stdout.reconfigure(errors="replace")  # no name can stop the report
    print(f"{args.out}  {len(networks)} networks, {len(tables['tables'])} tables, "
          f"{len(figures['figures'])} figures, {len(content) / 2**20:.1f} MiB")
    for number, finding in enumerate(tables["findings"][:3], 1):
        print(textwrap.fill(f"{number}. {finding['text']}", 100))


if __name__ == "__main__":
    command.run(main, stopped="stopped; nothing half-written remains")
