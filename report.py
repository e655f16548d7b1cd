"""One self-contained page of an analysis: what was analysed and how, what came out, and how sure one can be.

Input:  RESULTS       results/ of the other scripts, or one data set's folder in it: arrays with their JSON, labels.csv, props.csv
        --tables      folder of tables.py: tables, statements with their tests, warnings
        --figures     folder of figures.py
        --dataset     the pictures below the maps (a folder or CSV file as for embed.py; once for each data set)
Output: report.html   opens anywhere, asks no network for anything, the same bytes for the same input

    python report.py results --dataset examples/cars --out report.html
    python report.py results/cars --tables tables --figures figures --dataset examples/cars --out report.html
    python report.py results --pictures 1000 --size 160 --out report.html       # more and larger maps, a larger file

Tables sort by a click on a column's name; Enter does too. In tables with shades or hints the arrow keys move from cell to
cell. The gallery's slider fades from the picture over its salient parts to the map alone. What is missing (tables,
figures, pictures, half-finished arrays) is left out and said on the page. An HTML page from a stranger is a program; this
one carries a content security policy that runs its own script alone, and everything read is escaped.
"""
import argparse
import base64
import csv
import hashlib
import html
import io
import json
import math
import re
import shutil
import sys
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import data

# ---------------------------------------------------------------- what is there


def find_networks(results):
    """Networks with arrays in results/<dataset>/<slug>/fold<k>/ -> ([{dataset, slug, name, type, fold, …}], [left out, in words]).

    A network's `emb`, `maps` and `maps_ceiling` are {"path", "array" (memory-mapped), "about" (the JSON)} or None.
    Its order is that of models/losses.csv, ranking before classification; a loss unknown there is of type "other".
    """
    if not results.is_dir():
        raise ValueError(f"{results}: no such folder; expected results/ or results/<dataset>, as embed.py and saliency.py make it")
    with open(Path(__file__).resolve().parent / "models" / "losses.csv", encoding="utf-8", newline="") as file:
        losses = {row["slug"]: (number, row) for number, row in enumerate(csv.DictReader(file))}
    folders = sorted(results.glob("*/fold*")) or sorted(results.glob("*/*/fold*"))
    networks, left_out = [], []
    for folder in filter(Path.is_dir, folders):
        network = {stem: open_array(folder / f"{stem}.npy", dimensions, results, left_out)
                   for stem, dimensions in (("emb", 2), ("maps", 3), ("maps_ceiling", 3))}
        about = next((found["about"] for found in network.values() if found), None)
        if about is None:
            continue
        slug, dataset = folder.parent.name, folder.parent.parent.resolve().name
        number, row = losses.get(slug, (99, {"name": slug, "type": "other"}))
        fold = about.get("fold", folder.name.removeprefix("fold"))
        fold = fold if fold is None else str(fold)
        name, kind = about.get("loss") or row["name"], row["type"]
        if "loss" in about and about["loss"] is None:
            name, kind = about.get("backbone") or slug, "none"
        networks.append({**network, "dataset": dataset, "slug": slug, "fold": fold, "type": kind, "folder": folder,
                         "name": str(name), "trained": trained(about, results)})
        networks[-1]["order"] = (dataset, ("ranking", "classification", "other", "none").index(kind), number, slug, str(fold))
    if not networks and not any(results.glob("*.csv")) and not any(results.glob("*/*.csv")):
        raise ValueError(f"{results}: no results; expected {results}/<dataset>/<loss>/fold<k>/emb.npy or maps.npy: python embed.py "
                         f"--dataset NAME --loss all --out {results}" + ("; " + "; ".join(left_out[:2]) if left_out else ""))
    return sorted(networks, key=lambda network: network["order"]), left_out


def open_array(path, dimensions, results, left_out):
    """An array with its JSON; None where there is none or it is not whole, which is then named in left_out."""
    name = path.relative_to(results).as_posix()
    if not path.exists():
        if path.with_name(path.name + ".part").exists():
            left_out.append(f"{name}: half-finished; the command that makes it continues where it stopped")
        return None
    try:
        array = data.read_array(path)
    except ValueError as error:
        left_out.append(str(error).replace(str(path), name))
        return None
    about = {key: value for key, value in data.read_sidecar(path).items()
             if isinstance(value, dict) or key not in ("options", "preprocessing", "versions", "pictures")}
    pictures, options = about.get("pictures", {}), about.get("options", {})
    number = pictures.get("number", len(array) if array.ndim else 0)
    lists, limit = (pictures.get("left_out") or [], options.get("pick") or []), options.get("limit")
    if not all(isinstance(some, list) for some in lists) or not all(isinstance(row, int) for row in lists[1]) or not isinstance(limit or 0, int):
        left_out.append(f"{name}: the lists in its JSON are none; restore the file that was written with the array")
        return None
    if array.ndim != dimensions or array.dtype.kind not in "fiub" or 0 in array.shape or number != len(array):
        left_out.append(f"{name}: shape {array.shape} of {array.dtype}, {number} pictures in its JSON; expected {dimensions} dimensions")
        return None
    return {"path": path, "name": name, "array": array, "about": about}


def trained(about, results):
    """What train.py left beside the checkpoint: {"config": {…}, "history": {column: texts}}, empty where there is nothing."""
    for place in (Path("."), results, results.parent, results.parent.parent, Path(__file__).resolve().parent):
        folder = place / str(about.get("checkpoint") or "/none")
        if (folder / "config.json").is_file():
            config = data.read_sidecar(folder / "config.json")
            return {"config": config, "history": data.read_table(folder / "history.csv") if (folder / "history.csv").is_file() else {}}
    return {"config": {}, "history": {}}


MAY_DIFFER = ("ceiling", "noise_of", "seed", "limit", "pick")  # options of arrays that belong together; pictures are compared apart


def check_together(networks):
    """Raise ValueError naming two arrays of one data set made with other options or, in one fold, from other pictures."""
    first = {}
    for network in networks:
        for stem in filter(network.get, ("emb", "maps", "maps_ceiling")):
            found, kind = network[stem], stem[:4]
            about = found["about"]
            options = {key: value for key, value in about.get("options", {}).items() if key not in MAY_DIFFER}
            pictures = {"number": len(found["array"]), "sha256": str(about.get("pictures", {}).get("sha256"))[:12]}
            for what, key, told in (("options", (network["dataset"], kind), options),
                                    ("pictures", (network["dataset"], kind, network["fold"]), pictures)):
                if what == "options" and not about:
                    continue
                other, before = first.setdefault((what, *key), (found["name"], told))
                different = [f"{name} {before.get(name)} and {told.get(name)}" for name in {**before, **told}
                             if before.get(name) != told.get(name)]
                if different:
                    raise ValueError(f"{other} and {found['name']} don't belong together: {', '.join(different)}; make both with "
                                     f"the same {what}, or take one of them out of the folder")


def picture_names(network, dataset):
    """Names of the pictures of a network's maps (its embeddings' where it has none), in the rows' order, and their properties.

    They are labels.csv's or the data set's, if number and sha256 agree with the array's JSON; else None.
    Returns (names or None, {name: [(property, value), …]}).
    """
    found = network["maps"] or network["emb"]
    about, n = found["about"].get("pictures", {}), len(found["array"])
    options, lists, properties = found["about"].get("options", {}), [], {}
    if (network["folder"] / "labels.csv").is_file():
        table = data.read_table(network["folder"] / "labels.csv")
        names = table.pop("path", None) or next(iter(table.values()))
        lists.append(names)
        for path, source in ((None, table), (network["folder"] / "props.csv", None)):
            source = source if path is None else data.read_table(path) if path.is_file() else {}
            for column, values in source.items():
                if len(values) == len(names) and column.lower() not in data.IDENTIFIERS:
                    for name, value in zip(names, values):
                        properties.setdefault(name, []).append((column, value))
    lists += [dataset.relative] if dataset else []
    for names in lists:
        rows = options.get("pick") or range(len(names))[:options.get("limit")]
        left_out = about.get("left_out", [])
        kept = [names[row] for row in rows if row < len(names) and names[row] not in left_out]
        if len(kept) == n and about.get("sha256") in (None, data.pictures_sha256(kept)):
            return kept, properties
    return None, properties


# ---------------------------------------------------------------- tables, statements and figures of the steps before

TABLES = {"tables": list, "statements": list, "warnings": list, "missing": list, "made_with": dict}
TABLE = {"name": str, "title": str, "caption": str, "dataset": (str, type(None)), "kind": str, "header": list, "rows": list, "notes": list}
CELL = {"text": str, "value": (int, float, type(None)), "shade": (int, float, type(None)), "bold": bool, "hint": (str, type(None))}
STATEMENT = {"dataset": (str, type(None)), "topic": str, "text": str, "test": (str, type(None)), "p_value": (int, float, type(None)), "main": bool}
MISSING = {"dataset": (str, type(None)), "table": str, "what": str}
FIGURES = {"figures": list, "missing": (list, type(None))}
MISSING_FIGURE = {"dataset": (str, type(None)), "figure": str, "what": str}
FIGURE = {"name": str, "title": str, "caption": str, "dataset": (str, type(None)), "svg": (str, type(None)), "png": (str, type(None))}


def read_part(folder, name, script):
    """tables.json or figures.json of a folder as a dictionary; None where it is not there."""
    path = folder / name
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON ({error}); make it again: python {script}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {type(content).__name__}, expected an object; make it again: python {script}")
    return content


def fields(path, where, item, expected):
    """The expected fields of an item and no others. Raises ValueError for one that is missing or of another type."""
    if not isinstance(item, dict):
        raise ValueError(f"{path}: {where} is {type(item).__name__}, expected an object; make the file again")
    for key, kinds in expected.items():
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        value = item.get(key)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join({type(None): "null"}.get(kind, kind.__name__) for kind in kinds)
            raise ValueError(f"{path}: {key} of {where} is {str(item.get(key, 'missing'))[:40]!r}, expected {names}; make the file again")
    return {key: item.get(key) for key in expected}


def read_tables(folder):
    """tables.json, checked field by field; None where it is not there."""
    path, content = folder / "tables.json", read_part(folder, "tables.json", "tables.py RESULTS --out " + str(folder))
    if content is None:
        return None
    content = fields(path, "the file", content, TABLES)
    tables, names = [], set()
    for number, item in enumerate(content["tables"]):
        table = fields(path, f"table {number}", item, TABLE)
        where, width = f"table {table['name']!r}", len(table["header"])
        if table["name"] in names:
            raise ValueError(f"{path}: two tables are named {table['name']!r}; make the file again")
        names.add(table["name"])
        if table["kind"] not in ("rows", "matrix") or not all(isinstance(name, str) for name in [*table["header"], *table["notes"]]):
            raise ValueError(f"{path}: {where} has kind {table['kind']!r} or a header or note that is no text; make the file again")
        for row in table["rows"]:
            if not isinstance(row, list) or len(row) != width:
                raise ValueError(f"{path}: {where} has a row of {len(row) if isinstance(row, list) else 'no'} cells, its header {width}; "
                                 "make the file again")
        table["rows"] = [[fields(path, f"a cell of {where}", cell, CELL) for cell in row] for row in table["rows"]]
        tables.append(table)
    if not all(isinstance(text, str) for text in content["warnings"]):
        raise ValueError(f"{path}: a warning is no text; make the file again")
    return {**content, "tables": tables,
            "statements": [fields(path, f"statement {i}", item, STATEMENT) for i, item in enumerate(content["statements"])],
            "missing": [fields(path, f"missing {i}", item, MISSING) for i, item in enumerate(content["missing"])]}


def read_figures(folder):
    """figures.json with each figure's file as a data URI; None where it is not there."""
    path, content = folder / "figures.json", read_part(folder, "figures.json", "figures.py RESULTS --out " + str(folder))
    if content is None:
        return None
    content = fields(path, "the file", content, FIGURES)
    figures = [fields(path, f"figure {i}", item, FIGURE) for i, item in enumerate(content["figures"])]
    for figure in figures:
        svg, png = (folder / figure[kind] if figure[kind] else None for kind in ("svg", "png"))
        absent = [file for file in (svg, png) if file and (file.parent != folder or not file.is_file())]
        if absent or not (svg or png):
            raise ValueError(f"{path}: figure {figure['name']!r}: {absent[0] if absent else 'its file'} is not in {folder}; make the figures again")
        figure["uri"] = figure_uri(svg, png)
    missing = [fields(path, f"missing {i}", item, MISSING_FIGURE) for i, item in enumerate(content["missing"] or [])]
    return {"figures": figures, "missing": missing}


def figure_uri(svg, png, longest=1800):
    """A drawing as its SVG file, a photograph as a smaller WebP: data URIs; a large SVG too is shown by its PNG."""
    if svg and (svg.stat().st_size < 2 << 20 or not png):
        return data_uri(svg.read_bytes(), "svg+xml")
    image = data.read_rgb(png)
    image.thumbnail((longest, longest))
    return webp(np.asarray(image), 80)


def errata(tables):
    """The table of errata: that of tables.json, else the project's own file, else None."""
    found = [table for table in (tables or {"tables": []})["tables"] if table["name"] == "errata"]
    path = Path(__file__).resolve().parent / "published" / "errata.csv"
    if not found and path.is_file():
        columns = data.read_table(path)
        found = [{"name": "errata", "title": "Errata", "caption": "", "header": [name.capitalize() for name in columns], "notes": [],
                  "rows": [[cell(part) for part in row] for row in zip(*columns.values())]}]
    return {**found[0], "kind": "text"} if found else None


# ---------------------------------------------------------------- pictures and maps as small images


def data_uri(content, kind):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def webp(pixels, quality):
    """uint8 (H, W) or (H, W, 3) as a WebP data URI."""
    file = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").save(file, "WEBP", quality=quality, method=4)
    return data_uri(file.getvalue(), "webp")


def sprite(maps, size):
    """Maps (K, H, W) in [0, 1] side by side in one grey picture, uint8, ceil(√K) in a row, the longer side `size` pixels.

    nan is 0, what lies outside is cut. One picture for all networks: decoded only when it is chosen.
    """
    K, *shape = maps.shape
    height, width = small_shape(shape, size)
    columns = math.ceil(math.sqrt(K))
    sheet = np.zeros((math.ceil(K / columns) * height, columns * width), np.uint8)
    for k, one in enumerate(maps):
        grey = Image.fromarray((np.clip(np.nan_to_num(one), 0, 1) * 255).round().astype(np.uint8))
        y, x = k // columns * height, k % columns * width
        sheet[y:y + height, x:x + width] = np.asarray(grey.resize((width, height), Image.Resampling.BILINEAR))
    return sheet


def gallery(networks, datasets, most, size):
    """The gallery's contents: ([what the page's script must know of each set], {id: a picture and its maps}, [notes in words]).

    A set is one fold of one data set, its networks' maps of the same pictures with the same resize and crop; id is
    picture-<set>-<picture>. At most `most` pictures, evenly out of all sets' rows.
    """
    groups = {}
    for network in filter(lambda network: network["maps"], networks):
        geometry = network["maps"]["about"].get("preprocessing", {})
        key = (network["dataset"], network["fold"], network["maps"]["array"].shape, geometry.get("resize"), geometry.get("crop"))
        groups.setdefault(str(key), []).append(network)
    total = sum(len(members[0]["maps"]["array"]) for members in groups.values())
    sets, stored, notes = [], {}, []
    with tqdm(total=min(total, most), unit=" pictures", desc="gallery", delay=2, disable=not sys.stderr.isatty()) as bar:
        for number, members in enumerate(groups.values()):
            dataset, fold, (n, *shape) = members[0]["dataset"], members[0]["fold"], members[0]["maps"]["array"].shape
            names, properties = picture_names(members[0], datasets.get(dataset))
            names = names or [f"row {row}" for row in range(n)]
            paths = dict(zip(datasets[dataset].relative, datasets[dataset].paths)) if dataset in datasets else {}
            rows = np.linspace(0, n - 1, max(1, round(n * min(1, most / total)))).round().astype(int).tolist()
            pictures = []
            for row in rows:
                images, blank = picture_and_maps(members, row, paths.get(names[row]), size)
                stored[f"picture-{number}-{len(pictures)}"] = images
                pictures.append({"name": names[row], "properties": properties.get(names[row], []), "blank": blank})
                bar.update()
            label = dataset if fold is None else f"{dataset}, fold {fold}"
            height, width = small_shape(shape, size)
            sets.append({"label": label, "second": "second" in images, "width": width, "height": height, "pictures": pictures,
                         "networks": [{"name": member["name"], "type": member["type"]} for member in members]})
            unseen = sum("picture" not in stored[f"picture-{number}-{k}"] for k in range(len(rows)))
            blank = sum(len(picture["blank"]) for picture in pictures)
            notes += [f"{label}: {unseen:,} of {count(len(rows), 'picture')} can't be shown; the maps stand alone "
                      "(report.py --dataset FOLDER names the pictures' folder)."] * (unseen > 0)
            notes += [f"{label}: {count(blank, 'map')} in the gallery constant or nan: shown empty, left out of comparisons."] * (blank > 0)
    if sum(len(one["pictures"]) for one in sets) < total:
        notes.append(f"The gallery shows {sum(len(one['pictures']) for one in sets):,} of {total:,} pictures, taken evenly (report.py --pictures {total} shows all).")
    return sets, stored, notes


def picture_and_maps(members, row, path, size):
    """One picture, its maps and, where all networks have them, their second maps, as data URIs; and which maps are blank."""
    maps = np.stack([member["maps"]["array"][row].astype(np.float32) for member in members])
    images = {"maps": webp(sprite(maps, size), 60)}
    seconds = [(member["maps_ceiling"] or {}).get("array") for member in members]
    if all(second is not None and second.shape == members[0]["maps"]["array"].shape for second in seconds):
        images["second"] = webp(sprite(np.stack([second[row].astype(np.float32) for second in seconds]), size), 60)
    picture = path and small_picture(path, members[0]["maps"]["about"].get("preprocessing"), size)
    if picture:
        images["picture"] = picture
    return images, [k for k, one in enumerate(maps) if not np.isfinite(one).all() or one.max() == one.min()]


def small_shape(shape, size):
    """(height, width) of a map in the gallery: the longer side is `size` pixels."""
    return tuple(max(1, round(size * side / max(shape))) for side in shape)


def small_picture(path, preprocessing, size):
    """A picture as the network saw it (resized and cropped), twice the maps' side at most; None if it can't be read."""
    try:
        image = data.resize_and_crop(data.read_rgb(path), preprocessing or {"resize": None, "crop": None})
    except (OSError, ValueError, KeyError, TypeError):  # no picture, or a JSON of another project
        return None
    image.thumbnail((2 * size, 2 * size))
    return webp(np.asarray(image), 75)


# ---------------------------------------------------------------- from facts to HTML


def text(value):
    """Escaped for HTML, in attributes too; characters that HTML does not allow become the replacement character."""
    return html.escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", str(value)))


def script_json(value):
    """JSON that can stand in a <script> element: nothing in it closes the element or is more than ASCII."""
    return json.dumps(value, separators=(",", ":")).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def cell(shown, value=None, hint=None):
    """A cell as in tables.json."""
    return {"text": str(shown), "value": value, "shade": None, "bold": False, "hint": hint}


def anchor(table):
    """The id of a table's place on the page."""
    return "table-" + re.sub(r"[^A-Za-z0-9_-]", lambda found: f".{ord(found[0]):x}", table["name"])


def table_html(table):
    """A table under its title, in a region of its own that scrolls: sortable by its header (kind "rows"), not (kind "text"),
    or a heat map (kind "matrix").

    Where cells have hints the table is a grid: the arrow keys move in it and each hint is announced.
    """
    name = anchor(table)
    matrix = table["kind"] == "matrix"
    grid = matrix or any(one["hint"] for row in table["rows"] for one in row)
    numeric = [any(row[k]["value"] is not None for row in table["rows"]) for k in range(len(table["header"]))]
    short = all(len(row[0]["text"]) <= 26 for row in table["rows"])
    head = []
    for k, title in enumerate(table["header"]):
        side = ' class="n"' if numeric[k] and not matrix else ""
        if matrix and k == 0:
            head.append("<td></td>")
        elif table["kind"] != "rows":
            head.append(f'<th scope="col"><span>{text(title)}</span></th>')
        else:
            head.append(f'<th scope="col" aria-sort="none"{side}><button type="button">{text(title) or "Name"}</button></th>')
    rows = []
    for row in table["rows"]:
        cells = [f'<th scope="row">{cell_text(row[0])}</th>'] if row else []
        for one in row[1:]:
            kinds = "n" * (one["value"] is not None) + (f" s{level_of(one['shade'])}" if one["shade"] is not None else "")
            told = (f' class="{kinds.strip()}"' if kinds else "") + ("" if one["value"] is None or not math.isfinite(one["value"]) else f' data-value="{one["value"]!r}"')
            told += f' data-hint="{text(one["hint"])}"' if one["hint"] else ""
            cells.append(f"<td{told}>{cell_text(one)}</td>")
        rows.append("<tr>" + "".join(cells) + "</tr>")
    notes = "".join(f"<li>{text(note)}</li>" for note in table["notes"])
    return (f'<article class="table" id="{name}"><h3 id="{name}-title">{text(table["title"])}</h3>'
            + (f"<p>{text(table['caption'])}</p>" if table["caption"] else "") + legend(table)
            + f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{name}-title">'
            f'<table aria-labelledby="{name}-title"' + (' role="grid"' if grid else "") + f' class="{table["kind"]}{" short" * short}"'
            + f'>\n<thead><tr>{"".join(head)}</tr></thead>\n<tbody>\n' + "\n".join(rows) + "\n</tbody></table></div>"
            + (f'<ul class="notes">{notes}</ul>' if notes else "") + "</article>")


def cell_text(one):
    return f"<strong>{text(one['text'])}</strong>" if one["bold"] else text(one["text"])


def level_of(shade):
    """A shade in [0, 1] as one of the page's 21 classes: a content security policy allows no styles in elements."""
    return round(20 * min(1, max(0, shade))) if math.isfinite(shade) else 0


def legend(table):
    """What the shades of a heat map mean: the values at both ends."""
    shaded = [one for row in table["rows"] for one in row if one["shade"] is not None and one["value"] is not None]
    if table["kind"] != "matrix" or not shaded:
        return ""
    low, high = (pick(shaded, key=lambda one: one["shade"]) for pick in (min, max))
    swatches = "".join(f'<span class="s{k}"></span>' for k in range(0, 21, 2))
    return f'<p class="legend">{text(low["text"])} <span class="ramp" aria-hidden="true">{swatches}</span> {text(high["text"])}</p>'


def settings_table(dataset, networks):
    """The JSONs beside one data set's arrays as a table: setting, value for embeddings, for maps."""
    columns = []
    for stem in ("emb", "maps"):
        values = {}  # {setting: {value: [networks]}}
        for network in filter(lambda network: network[stem], networks):
            about = network[stem]["about"]
            told = {**{key: about.get(key) for key in ("split", "backbone", "preprocessing", "distance", "seed")},
                    **about.get("options", {}), "versions": about.get("versions")}
            for key, value in told.items():
                if value is not None and key not in ("ceiling", "noise_of"):
                    values.setdefault(key, {}).setdefault(in_words(value), []).append(network)
        columns.append(values)
    rows = []
    for key in sorted({**columns[1], **columns[0]}, key="versions".__eq__):  # at the end
        shown = ["; ".join(f"{value} ({len(using)} of {sum(map(len, column[key].values()))})" if len(column[key]) > 1 else value
                           for value, using in column[key].items()) if key in column else "" for column in columns]
        rows.append([cell(part) for part in (key.replace("_", " "), *shown)])
    return {"name": f"settings-{dataset}", "title": f"Settings: {dataset}", "kind": "text", "header": ["Setting", "Embeddings", "Saliency maps"],
            "caption": "As the JSON files beside the arrays tell. Where arrays differ, the number of each is given.", "rows": rows, "notes": []}


def in_words(value):
    """A value of a JSON on one line: {"crop": 224, "scale": 255} is "crop 224, scale 255"."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {in_words(part)}" for key, part in value.items())
    if isinstance(value, list):
        return " ".join(map(in_words, value))
    return {"None": "none", "True": "yes", "False": "no"}.get(str(value), str(value))


def networks_table(dataset, networks):
    """Which networks of a data set were analysed, on what, from which checkpoint."""
    rows = []
    for network in networks:
        about = (network["emb"] or network["maps"] or network["maps_ceiling"])["about"]
        config = network["trained"]["config"]
        parameters = config.get("loss_parameters") if isinstance(config.get("loss_parameters"), dict) else {}
        shapes = [" × ".join(map(str, found["array"].shape)) if found else "" for found in (network["emb"], network["maps"], network["maps_ceiling"])]
        counts = [len(found["array"]) if found else None for found in (network["emb"], network["maps"], network["maps_ceiling"])]
        rows.append([cell(network["name"]), cell(network["type"]), cell("" if network["fold"] is None else network["fold"]),
                     cell(about.get("distance", "")), *map(cell, shapes, counts), cell(str(about.get("checkpoint_sha256") or "")[:12]),
                     cell(", ".join(f"{key} {value}" for key, value in parameters.items()))])
    header = ["Network", "Type", "Fold", "Distance", "Embeddings", "Maps", "Maps, other noise", "Checkpoint (SHA-256)", "Loss's parameters"]
    empty = [k for k in range(len(header)) if k > 3 and not any(row[k]["text"] for row in rows)]
    keep = [k for k in range(len(header)) if k not in empty]
    return {"name": f"networks-{dataset}", "title": f"Networks: {dataset}", "kind": "rows", "header": [header[k] for k in keep], "notes": [],
            "caption": "Shapes are pictures × dimension, and pictures × height × width.", "rows": [[row[k] for k in keep] for row in rows]}


def history_table(dataset, networks):
    """Before and after training, from history.csv: means over the folds; None where no network of the data set has one."""
    measures = [("loss", "train", "Training loss"), ("recall_at_1", "validation", "Recall@1, validation"),
                ("map_at_r", "validation", "MAP@R, validation"), ("jsd", "validation", "JSD, validation")]
    rows = []
    for name in dict.fromkeys(network["name"] for network in networks):
        histories = [network["trained"]["history"] for network in networks if network["name"] == name and network["trained"]["history"]]
        if not histories:
            continue
        epochs = max((int(epoch) for history in histories for epoch in history.get("epoch", []) if epoch.isdecimal()), default=0)
        row = [cell(name), cell(len(histories), len(histories)), cell(epochs, epochs)]
        for column, split, _ in measures:
            for pick in (0, -1):
                values = [curve[pick] for history in histories if (curve := curve_of(history, column, split))]
                mean = sum(values) / len(values) if values else None
                row.append(cell("" if mean is None else f"{mean:.3f}", mean, ", ".join(f"{value:.4f}" for value in values) or None))
        rows.append(row)
    header = ["Network", "Folds", "Epochs", *(f"{title}: {when}" for _, _, title in measures for when in ("before", "after"))]
    return rows and {"name": f"history-{dataset}", "title": dataset, "kind": "rows", "header": header, "rows": rows, "notes": [],
                     "caption": "Means over the folds before training (epoch 0) and after the last epoch; each fold's value in the hint."}


def curve_of(history, column, split):
    """The finite values of one column of history.csv, by epoch; [] where it has none."""
    if not {"epoch", "split", column} <= set(history):
        return []
    rows = sorted((float(epoch), value) for epoch, part, value in zip(history["epoch"], history["split"], history[column])
                  if part == split and data.is_number(epoch) and data.is_number(value))
    return [float(value) for _, value in rows if math.isfinite(float(value))]


def capital(words):
    return words[:1].upper() + words[1:]


def statement_html(statement):
    test, p = capital(statement["test"] or "no test"), statement["p_value"]
    if p is not None and "p = " not in test and "p < " not in test:
        test += f"; p = {p:.2g}"
    return f'<p>{text(statement["text"])}</p><p class="test">{text(test)}</p>'


def section(name, title, *parts):
    """A section with its heading; nothing if it has no content."""
    content = "\n".join(filter(None, parts))
    return f'<section id="{name}" aria-labelledby="{name}-title">\n<h2 id="{name}-title">{title}</h2>\n{content}\n</section>' if content else ""


def listing(items, kind="ul"):
    return f"<{kind}>" + "".join(f"<li>{text(item)}</li>" for item in items) + f"</{kind}>" if items else ""


# ---------------------------------------------------------------- the page: its style, its script, its parts

STYLE = """
:root { color-scheme: light dark; --page: light-dark(#fcfcfa, #14161a); --panel: light-dark(#f3f3ee, #1d2026);
  --ink: light-dark(#1b1d21, #e7e7e3); --soft: light-dark(#55585f, #a9acb3); --line: light-dark(#d9d9d2, #353942);
  --strong: light-dark(#5b1a6e, #d9a6ea); --mark: light-dark(#f6ecd2, #3d3420); --ring: light-dark(#a12f5a, #ffb454); }
:root[data-theme=light] { color-scheme: light; }
:root[data-theme=dark] { color-scheme: dark; }
* { box-sizing: border-box; }
html { scroll-padding-top: 1rem; -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink); font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1, h2, h3, h4 { font-family: Charter, "Bitstream Charter", "Iowan Old Style", Cambria, Georgia, serif; line-height: 1.2; text-wrap: balance; }
h1 { font-size: clamp(1.8rem, 1.2rem + 2.6vw, 3rem); margin: 0 0 .5rem; }
h2 { font-size: 1.75rem; margin: 0 0 1rem; padding-top: 1.25rem; border-top: 3px solid var(--strong); }
h3 { font-size: 1.2rem; margin: 2rem 0 .4rem; }
p { margin: 0 0 .75rem; max-width: 46rem; overflow-wrap: break-word; }
a { color: var(--strong); text-underline-offset: .18em; }
:focus-visible { outline: 3px solid var(--ring); outline-offset: 2px; border-radius: 3px; }
button, select, input { font: inherit; color: inherit; }
button.plain, select { background: var(--panel); border: 1px solid var(--soft); border-radius: 6px; padding: .3rem .8rem; min-height: 2.5rem; }
button.plain:hover { border-color: var(--strong); color: var(--strong); }
button.plain:disabled { opacity: .55; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.skip { position: absolute; left: 1rem; top: -6rem; background: var(--page); padding: .5rem 1rem; z-index: 3; }
.skip:focus { top: .5rem; }
.frame { max-width: 86rem; margin: 0 auto; padding: 0 clamp(1rem, 3vw, 2.5rem); }
header.frame { padding-top: 2rem; display: grid; grid-template-columns: 1fr auto; gap: 0 1rem; }
header p { color: var(--soft); font-size: 1.1rem; }
section { margin: 3rem 0; }
nav ol { list-style: none; margin: 1rem 0; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; }
nav a { display: inline-block; padding: .3rem 0; color: var(--ink); text-decoration: none; border-bottom: 2px solid transparent; }
nav a:hover { border-color: var(--strong); color: var(--strong); }
@media (min-width: 75rem) {
  .columns { display: grid; grid-template-columns: 11rem minmax(0, 1fr); gap: 3rem; }
  nav { position: sticky; top: 0; align-self: start; padding-top: 2.2rem; }
  nav ol { display: block; border-left: 1px solid var(--line); padding-left: 1rem; }
}
.findings { list-style: none; counter-reset: finding; margin: 0; padding: 0; display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); }
.findings li { counter-increment: finding; background: var(--panel); border-radius: 10px; padding: 1.1rem 1.25rem; }
.findings li::before { content: counter(finding); font: 700 1.6rem/1 Charter, "Bitstream Charter", Georgia, serif; color: var(--strong); }
.findings p:first-of-type { font-size: 1.08rem; margin: .35rem 0 .6rem; }
.test { color: var(--soft); font-size: .875rem; line-height: 1.45; margin: 0; }
.statements { margin: 0; padding: 0; list-style: none; }
.statements li { border-left: 3px solid var(--line); padding: .1rem 0 .1rem 1rem; margin: 0 0 1rem; }
.statements p:first-child { margin-bottom: .15rem; }
.note { background: var(--mark); border-radius: 8px; padding: .7rem 1rem; max-width: 60rem; overflow-wrap: break-word; }
.note ul { margin: 0; padding-left: 1.2rem; }
.notes { color: var(--soft); font-size: .875rem; max-width: 60rem; padding-left: 1.2rem; margin: .5rem 0 0; }
.scroll { overflow-x: auto; max-width: 100%; position: relative; }
.tall { max-height: 34rem; overflow-y: auto; }
.tall thead th { position: sticky; top: 0; background: var(--page); z-index: 2; }
table { border-collapse: separate; border-spacing: 0; font-size: .9rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
thead th, thead td { border-bottom: 2px solid var(--ink); vertical-align: bottom; text-align: left; padding: 0; }
th, td { padding: .38rem .65rem; text-align: left; border-bottom: 1px solid var(--line); }
td { overflow-wrap: break-word; max-width: 28rem; }
tbody th { font-weight: 500; position: sticky; left: 0; background: var(--page); max-width: 13rem; z-index: 1; }
td.n { text-align: right; white-space: nowrap; }
th.n, th.n button { text-align: right; }
th > span { display: inline-block; padding: .4rem .65rem; font-weight: 600; }
th button { background: none; border: 0; padding: .4rem .65rem; width: 100%; min-height: 2.2rem; font-weight: 600; text-align: left; cursor: pointer; }
th button::after { content: "\\a0↕"; color: var(--soft); font-weight: 400; }
th[aria-sort=ascending] button::after { content: "\\a0↑"; color: var(--strong); }
th[aria-sort=descending] button::after { content: "\\a0↓"; color: var(--strong); }
tbody tr:hover > th, tbody tr:focus-within > th, thead th.at { color: var(--strong); }
.matrix { font-size: .82rem; }
.matrix thead th { padding: .4rem .2rem; font-weight: 500; }
.short tbody th { white-space: nowrap; max-width: none; }
.matrix thead span { padding: 0; font-weight: 500; writing-mode: vertical-rl; transform: rotate(180deg); white-space: nowrap; max-height: 14rem; overflow: hidden; }
.matrix td { text-align: center; padding: .38rem .3rem; min-width: 2.6rem; border: 1px solid var(--page); }
.matrix tbody th { text-align: right; border-bottom: 0; }
td[data-at] { outline: 3px solid var(--ring); outline-offset: -3px; }
.legend { display: flex; align-items: center; gap: .6rem; font-size: .875rem; color: var(--soft); font-variant-numeric: tabular-nums; }
.ramp { display: inline-flex; border: 1px solid var(--line); }
.ramp span { width: 1rem; height: .8rem; }
.index { columns: 17rem; padding-left: 1.2rem; margin: 0; font-size: .95rem; }
#tip { position: fixed; z-index: 4; max-width: min(22rem, calc(100vw - 1rem)); background: light-dark(#24262b, #f0f0ea); color: light-dark(#fff, #16181c);
  border-radius: 6px; padding: .45rem .7rem; font-size: .85rem; line-height: 1.4; pointer-events: none; white-space: pre-line; box-shadow: 0 3px 14px #0005; }
#tip:empty { display: none; }
.controls { display: flex; flex-wrap: wrap; gap: .8rem 1.6rem; align-items: end; margin: 1rem 0; }
.controls label { display: grid; gap: .2rem; font-size: .875rem; color: var(--soft); }
.controls label.row { display: flex; align-items: center; gap: .5rem; min-height: 2.5rem; }
.controls input[type=range] { width: min(20rem, 80vw); accent-color: var(--strong); height: 2rem; margin: 0; }
.controls input[type=checkbox] { width: 1.2rem; height: 1.2rem; accent-color: var(--strong); }
#film { display: flex; gap: 6px; overflow-x: auto; list-style: none; margin: 0 0 1rem; padding: 6px; background: var(--panel); border-radius: 8px; }
#film li { flex: none; width: 76px; font-size: .75rem; text-align: center; color: var(--soft); border-radius: 6px; padding: 4px; cursor: pointer; }
#film li[aria-selected=true] { background: var(--strong); color: var(--page); }
#film img { display: block; width: 68px; height: 68px; object-fit: cover; border-radius: 4px; background: var(--line); }
#about { display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; margin: 0 0 1rem; font-size: .9rem; }
#about div { display: flex; gap: .4rem; overflow-wrap: anywhere; }
#about dt { color: var(--soft); }
#about dd { margin: 0; font-weight: 600; }
#tiles { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(9.5rem, 44%), 1fr)); padding: 0; margin: 0; list-style: none; }
#tiles canvas { display: block; width: 100%; border-radius: 6px; background: var(--line); }
#tiles p { margin: .35rem 0 0; font-size: .875rem; line-height: 1.3; }
#tiles small { color: var(--soft); font-size: .8rem; }
figure { margin: 2rem 0; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 8px; padding: clamp(.3rem, 1.5vw, 1rem); border: 1px solid var(--line); }
figcaption { margin-top: .6rem; max-width: 46rem; font-size: .95rem; }
footer { color: var(--soft); font-size: .875rem; border-top: 1px solid var(--line); margin-top: 3rem; padding-top: 1rem; padding-bottom: 3rem; }
@media (max-width: 40rem) {
  body { font-size: .97rem; }
  tbody th, .short tbody th, .matrix tbody th { max-width: 8.5rem; white-space: normal; }
  th, td { padding: .34rem .45rem; }
}
@media print {
  :root, :root[data-theme] { color-scheme: light; }
  nav, .controls, #film, #theme, .skip, #tip { display: none; }
  .scroll, .tall { overflow: visible; max-height: none; }
  .frame { max-width: none; padding: 0; }
  .columns { display: block; }
  body { font-size: 9.5pt; }
  table { font-size: 7pt; }
  .matrix { font-size: 6pt; }
  .matrix td { min-width: 0; padding: 2pt; }
  figure, .findings li, tr { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  td, .ramp span, canvas { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""

SCRIPT = r"""
"use strict";
const $ = (selector, root = document) => root.querySelector(selector);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const make = (name, properties = {}) => Object.assign(document.createElement(name), properties);
const announce = words => { $("#live").textContent = words; };
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

// ---- light and dark
const isDark = () => (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const nameTheme = () => { $("#theme").textContent = isDark() ? "Light" : "Dark"; };
$("#theme").hidden = false;
$("#theme").addEventListener("click", () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; nameTheme(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);
nameTheme();

// ---- tables: a column's name sorts by it, once more the other way, a third time as it was
const firstOrder = new WeakMap();
all("tbody tr").forEach((row, number) => firstOrder.set(row, number));

function sortBy(button) {
  const head = button.closest("th"), body = head.closest("table").tBodies[0], column = head.cellIndex;
  const rows = [...body.rows], numeric = rows.some(row => row.cells[column].dataset.value !== undefined);
  const orders = ["none", ...(numeric ? ["descending", "ascending"] : ["ascending", "descending"])];
  const order = orders[(orders.indexOf(head.getAttribute("aria-sort")) + 1) % 3];
  const key = row => numeric ? row.cells[column].dataset.value : row.cells[column].textContent;
  rows.sort((a, b) => {
    const [x, y] = [key(a), key(b)], empty = (x === undefined || x === "") - (y === undefined || y === "");
    const compared = numeric ? x - y : String(x).localeCompare(y, "en", {numeric: true});
    return order === "none" ? firstOrder.get(a) - firstOrder.get(b)
      : empty || (order === "ascending" ? compared : -compared) || firstOrder.get(a) - firstOrder.get(b);
  });
  body.append(...rows);
  all("th[aria-sort]", head.parentNode).forEach(other => other.setAttribute("aria-sort", other === head ? order : "none"));
  announce(order === "none" ? "In the original order" : `Sorted by ${button.textContent}, ${order}`);
}
all("th[aria-sort] button").forEach(button => button.addEventListener("click", () => sortBy(button)));

// ---- grids: hints on hover, by tapping and by arrow keys
function showTip(cell) {
  const row = cell.parentNode.cells[0].textContent, column = cell.closest("table").tHead.rows[0].cells[cell.cellIndex];
  const words = `${row} · ${column.textContent}: ${cell.textContent}`, hint = cell.dataset.hint, tip = $("#tip");
  tip.textContent = hint ? `${words}\n${hint}` : words;
  all(".at").forEach(other => other.classList.remove("at"));
  column.classList.add("at");
  const place = cell.getBoundingClientRect(), size = tip.getBoundingClientRect();
  tip.style.left = clamp(place.x + place.width / 2 - size.width / 2, 8, innerWidth - size.width - 8) + "px";
  tip.style.top = (place.y > size.height + 12 ? place.y - size.height - 8 : place.bottom + 8) + "px";
  return hint ? `${words}. ${hint}` : words;
}
function hideTip() {
  $("#tip").textContent = "";
  all(".at").forEach(other => other.classList.remove("at"));
}
const moves = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -1e4], End: [0, 1e4],
  PageUp: [-1e4, 0], PageDown: [1e4, 0]};
for (const grid of all("table[role=grid]")) {
  const body = grid.tBodies[0];
  for (const cell of all("td", body)) cell.tabIndex = -1;
  if ($("td", body)) $("td", body).tabIndex = 0;
  body.addEventListener("keydown", event => {
    const cell = event.target.closest("td"), move = moves[event.key];
    if (event.key === "Escape") hideTip();
    if (!cell || !move || event.altKey || event.metaKey) return;
    const rows = [...body.rows], far = event.ctrlKey && move[0] === 0 ? Math.sign(move[1]) * 1e4 : 0;
    const row = rows[clamp(rows.indexOf(cell.parentNode) + move[0] + (event.key === "Home" || event.key === "End" ? far : 0), 0, rows.length - 1)];
    row.cells[clamp(cell.cellIndex + move[1], 1, row.cells.length - 1)].focus();
    event.preventDefault();
  });
  body.addEventListener("focusin", event => {
    const cell = event.target.closest("td");
    if (!cell) return;
    all("td[tabindex='0']", body).forEach(other => { other.tabIndex = -1; });
    cell.tabIndex = 0;
    cell.scrollIntoView({block: "nearest", inline: "nearest"});
    announce(showTip(cell));
  });
  body.addEventListener("focusout", hideTip);
  body.addEventListener("mouseover", event => { const cell = event.target.closest("td"); if (cell) showTip(cell); });
  body.addEventListener("mouseleave", hideTip);
}
addEventListener("scroll", () => { if (!document.activeElement.matches("td")) hideTip(); }, {passive: true, capture: true});
addEventListener("keydown", event => { if (event.key === "Escape") hideTip(); });

// ---- the gallery: a picture's maps are decoded when it is chosen
const heat = [[0, 0, 4], [31, 12, 72], [85, 15, 109], [136, 34, 106], [186, 54, 85], [227, 89, 51], [249, 142, 9], [249, 203, 53], [252, 255, 164]];

// A map's value v and the slider t in [0, 1] -> colour and opacity: at ½ the salient parts alone cover the picture.
function colours(t, alone) {
  const table = new Uint32Array(256), bytes = new Uint8Array(table.buffer);
  for (let level = 0; level < 256; level++) {
    const v = level / 255, at = Math.min(v * (heat.length - 1), heat.length - 1.000001), k = Math.floor(at);
    const opacity = alone ? 1 : t < .5 ? 2 * t * v : v + (2 * t - 1) * (1 - v);
    const colour = heat[k].map((low, channel) => low + (at - k) * (heat[k + 1][channel] - low));
    bytes.set([...colour, 255 * opacity].map(Math.round), 4 * level);
  }
  return table;
}
async function decoded(uri) {
  const image = make("img", {src: uri});
  await image.decode();
  return image;
}
function startGallery() {
  const sets = JSON.parse($("#gallery-sets").textContent), film = $("#film"), state = {set: 0, picture: 0, turn: 0};
  const stored = (set, picture) => JSON.parse($(`#picture-${set}-${picture}`).textContent);
  const seen = new IntersectionObserver(entries => entries.filter(entry => entry.isIntersecting).forEach(({target}) => {
    const item = stored(state.set, target.dataset.picture);
    if (item.picture) $("img", target).src = item.picture;
    seen.unobserve(target);
  }), {root: film, rootMargin: "0px 300px"});

  function chooseSet(number) {
    state.set = number;
    seen.disconnect();
    film.replaceChildren(...sets[number].pictures.map((picture, p) => {
      const item = make("li", {id: `film-${p}`, role: "option", title: picture.name});
      item.setAttribute("aria-label", `${p + 1}: ${picture.name}`);
      item.dataset.picture = p;
      item.append(make("img", {alt: "", width: 68, height: 68}), String(p + 1));
      seen.observe(item);
      return item;
    }));
    $("#second").disabled = !sets[number].second;
    const tiles = sets[number].networks.map(network => {
      const tile = make("li"), words = make("p", {textContent: network.name + " "});
      words.append(make("small", {textContent: network.type}));
      tile.append(make("canvas", {width: 2 * sets[number].width, height: 2 * sets[number].height, role: "img"}), words);
      return tile;
    });
    const own = make("li");
    own.append(make("canvas", {width: 2 * sets[number].width, height: 2 * sets[number].height, role: "img"}), make("p", {textContent: "Picture"}));
    $("#tiles").replaceChildren(own, ...tiles);
    choose(0);
  }

  async function choose(number) {
    const set = sets[state.set], turn = ++state.turn;
    state.picture = clamp(number, 0, set.pictures.length - 1);
    const picture = set.pictures[state.picture], item = stored(state.set, state.picture);
    all("[aria-selected=true]", film).forEach(other => other.setAttribute("aria-selected", "false"));
    const option = $(`#film-${state.picture}`);
    option.setAttribute("aria-selected", "true");
    film.setAttribute("aria-activedescendant", option.id);
    film.scrollLeft = option.offsetLeft - film.offsetLeft - (film.clientWidth - option.offsetWidth) / 2;
    $("#previous").disabled = state.picture === 0;
    $("#next").disabled = state.picture === set.pictures.length - 1;
    $("#which").textContent = `${state.picture + 1} of ${set.pictures.length}: ${picture.name}`;
    $("#about").replaceChildren(...picture.properties.map(([name, value]) => {
      const pair = make("div");
      pair.append(make("dt", {textContent: name}), make("dd", {textContent: value}));
      return pair;
    }));
    const second = $("#second").checked && item.second;
    const [own, maps] = await Promise.all([item.picture && decoded(item.picture), decoded(second || item.maps)]);
    if (turn !== state.turn) return;
    const sheet = make("canvas", {width: maps.naturalWidth, height: maps.naturalHeight}).getContext("2d", {willReadFrequently: true});
    sheet.drawImage(maps, 0, 0);
    const across = maps.naturalWidth / set.width;
    state.own = own;
    state.levels = set.networks.map((_, k) => sheet.getImageData(k % across * set.width, Math.floor(k / across) * set.height, set.width, set.height).data);
    draw();
    document.body.dataset.shown = `${state.set}-${state.picture}`;
  }

  function draw() {
    const set = sets[state.set], picture = set.pictures[state.picture], table = colours($("#overlay").value / 100, !state.own);
    const canvases = all("#tiles canvas");
    canvases.forEach((canvas, tile) => {
      const context = canvas.getContext("2d"), k = tile - 1, {width, height} = canvas;
      context.clearRect(0, 0, width, height);
      if (state.own) context.drawImage(state.own, 0, 0, width, height);
      canvas.setAttribute("aria-label", tile ? `Saliency map of ${set.networks[k].name}, ${picture.name}` : state.own ? picture.name : "The picture is not here");
      if (!tile || picture.blank.includes(k)) return;
      const pixels = new ImageData(set.width, set.height), target = new Uint32Array(pixels.data.buffer), levels = state.levels[k];
      for (let i = 0; i < target.length; i++) target[i] = table[levels[4 * i]];
      const layer = make("canvas", {width: set.width, height: set.height});
      layer.getContext("2d").putImageData(pixels, 0, 0);
      context.drawImage(layer, 0, 0, width, height);
    });
    $("#overlay").setAttribute("aria-valuetext", `${$("#overlay").value} per cent`);
  }

  $("#set").replaceChildren(...sets.map((set, number) => make("option", {value: number, textContent: `${set.label} (${set.pictures.length})`})));
  $("#set").addEventListener("change", event => chooseSet(Number(event.target.value)));
  $("#previous").addEventListener("click", () => { choose(state.picture - 1); announce($("#which").textContent); });
  $("#next").addEventListener("click", () => { choose(state.picture + 1); announce($("#which").textContent); });
  $("#second").addEventListener("change", () => choose(state.picture));
  $("#overlay").addEventListener("input", draw);
  film.addEventListener("click", event => { const item = event.target.closest("li"); if (item) choose(Number(item.dataset.picture)); });
  film.addEventListener("keydown", event => {
    const far = sets[state.set].pictures.length, steps = {ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, PageUp: -10, PageDown: 10, Home: -far, End: far};
    if (!(event.key in steps)) return;
    event.preventDefault();
    choose(state.picture + steps[event.key]);
  });
  chooseSet(0);
}
if ($("#gallery-sets")) startGallery();
document.body.dataset.ready = "yes";
"""

GALLERY = """
<p>Choose a picture, by the arrow keys too. The slider fades from the picture over its salient parts to the map alone; bright is
salient. Each map is scaled to its own maximum, so maps tell where, not how much.</p>
<noscript><p class="note">The gallery needs JavaScript; everything else on this page reads without.</p></noscript>
<div class="controls">
<label>Pictures of <select id="set"></select></label>
<button type="button" class="plain" id="previous">Previous</button>
<button type="button" class="plain" id="next">Next</button>
<label>Map over picture <input type="range" id="overlay" min="0" max="100" value="60"></label>
<label class="row"><input type="checkbox" id="second"> The same networks with other noise: how far a map can be trusted</label>
</div>
<ul id="film" role="listbox" tabindex="0" aria-label="Pictures" aria-orientation="horizontal"></ul>
<p id="which"></p>
<dl id="about"></dl>
<ul id="tiles"></ul>
"""

SHADES = (((255, 255, 255), (111, 168, 220)), ((20, 22, 26), (34, 92, 150)))  # light and dark: from the lowest to the highest


def shade_rules():
    """The 21 classes s0 … s20 of shaded cells; text stays readable on every one (WCAG AA in both schemes)."""
    rules = []
    for k in range(21):
        mixed = ["#" + "".join(f"{round(low + (high - low) * k / 20):02x}" for low, high in zip(*ends)) for ends in SHADES]
        rules.append(f".s{k} {{ background: light-dark({mixed[0]}, {mixed[1]}); }}")
    return "\n".join(rules) + "\n"


def hashed(content):
    """The source expression that lets a content security policy pass exactly this style or script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def page(title, summary, sections, stored):
    """The whole document. sections: [(id, title, HTML of the section or "")]; stored: {id: JSON-able}, for the script."""
    style = STYLE + shade_rules()
    policy = f"default-src 'none'; img-src data:; style-src {hashed(style)}; script-src {hashed(SCRIPT)}; base-uri 'none'; form-action 'none'"
    contents = "".join(f'<li><a href="#{name}">{heading}</a></li>' for name, heading, body in sections if body)
    blocks = "\n".join(f'<script type="application/json" id="{name}">{script_json(value)}</script>' for name, value in stored.items())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{text(title)}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the content</a>
<header class="frame">
<h1>{text(title)}</h1>
<div><button type="button" class="plain" id="theme" hidden>Dark</button></div>
<p>{text(summary)}</p>
</header>
<div class="frame columns">
<nav aria-label="Contents"><ol>{contents}</ol></nav>
<main id="main" tabindex="-1">
{chr(10).join(body for _, _, body in sections if body)}
</main>
</div>
<footer class="frame">Made by report.py of dml-analysis. This page is one file: it loads nothing and sends nothing.</footer>
<div id="tip" aria-hidden="true"></div>
<div id="live" class="unseen" role="status" aria-live="polite"></div>
{blocks}
<script>{SCRIPT}</script>
</body>
</html>
"""


def unreadable(networks):
    """The pictures that the arrays' JSONs say were left out, each named once."""
    left_out = {}
    for network in networks:
        for stem in filter(network.get, ("emb", "maps")):
            for name in network[stem]["about"].get("pictures", {}).get("left_out") or []:
                left_out.setdefault((network["dataset"], str(name)), []).append(network[stem]["name"])
    return [f"{dataset}: {name} could not be read: not in {where[0]}" + (f" and {len(where) - 1} more" if len(where) > 1 else "")
            for (dataset, name), where in left_out.items()]


def warnings_of(networks):
    """What must be said of the maps even where no tables.json says it: noise shared, no second maps."""
    found = []
    for dataset in dict.fromkeys(network["dataset"] for network in networks):
        maps = [network for network in networks if network["dataset"] == dataset and network["maps"]]
        shared = [network for network in maps if network["maps"]["about"].get("options", {}).get("shared_noise")]
        alone = [network for network in maps if not network["maps_ceiling"]]
        found += [f"{dataset}: {len(shared)} of {len(maps)} networks' maps share their noise, which raises their correlations."] * bool(shared)
        found += [f"{dataset}: {len(alone)} of {len(maps)} networks have no second map with other noise: without this ceiling a low "
                  "correlation may be noise alone (saliency.py --ceiling)."] * bool(alone)
    return found


def open_datasets(given, root, names):
    """{name of a data set in RESULTS: its pictures}, of the folders given and of published data sets that are here."""
    found = {}
    for place in given:
        dataset = data.open_dataset(place, root, "all")
        if len(given) == len(names) == 1:
            return {names[0]: dataset}  # the folder may have been renamed
        if dataset.name not in names:
            raise ValueError(f"--dataset {place} is the data set {dataset.name}; RESULTS has {', '.join(names) or 'no arrays'}: give the folder of one")
        found[dataset.name] = dataset
    for name in names:
        if name in data.PUBLISHED and name not in found:
            try:
                found[name] = data.open_dataset(name, root, "all")
            except (OSError, ValueError):
                pass  # said on the page: its maps stand alone
    return found


def analysed(networks):
    """The section's content: what was analysed, data set by data set."""
    parts = []
    for dataset in dict.fromkeys(network["dataset"] for network in networks):
        here = [network for network in networks if network["dataset"] == dataset]
        parts += [table_html(settings_table(dataset, here)), table_html(networks_table(dataset, here)).replace('"scroll"', '"scroll tall"')]
    return "\n".join(parts)


def count(number, singular, plural=None):
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def sentence(networks):
    """What was analysed, in one sentence."""
    names = {(network["dataset"], network["name"]) for network in networks}
    folds = {network["fold"] for network in networks if network["fold"] is not None}
    maps = sum(len(network["maps"]["array"]) for network in networks if network["maps"])
    backbones = sorted({str(about["backbone"]) for network in networks for found in [network["emb"] or network["maps"]] if found
                        for about in [found["about"]] if about.get("backbone")})
    datasets = list(dict.fromkeys(network["dataset"] for network in networks))
    if not networks:
        return "Tables alone: no arrays are beside them."
    return (f"{count(len({name for _, name in names}), 'network')} on {', '.join(datasets)}"
            + (f", {count(len(folds), 'fold')}" if len(folds) > 1 else "") + (f", {count(maps, 'saliency map')}" if maps else "")
            + (f", {' and '.join(backbones)}" if backbones else "") + ".")


def build(args):
    """The page's parts from what is on disk -> (HTML, [main findings], [counts, in words])."""
    networks, left_out = find_networks(args.results)
    check_together(networks)
    names = list(dict.fromkeys(network["dataset"] for network in networks))
    datasets = open_datasets(args.dataset, args.data_root, names)
    tables, figures = read_tables(args.tables), read_figures(args.figures)
    sets, stored, notes = gallery(networks, datasets, args.pictures, args.size)
    statements = tables["statements"] if tables else []
    main = [statement for statement in statements if statement["main"]]

    left_out += unreadable(networks)
    others = sorted({item["dataset"] for item in [*tables["tables"], *statements] if item["dataset"]} - {*names}) if tables and names else []
    stale = [f"{args.tables / 'tables.json'} tells of {', '.join(others)}, of which {args.results} has no arrays."] if others else []
    warned = [*(tables["warnings"] if tables else warnings_of(networks)), *stale, *notes]
    absent = [": ".join(filter(None, (item["dataset"], item.get("table") or item.get("figure"), item["what"])))
              for part in (tables, figures) if part for item in part["missing"]]
    findings = f'<ol class="findings">{"".join(f"<li>{statement_html(one)}</li>" for one in main)}</ol>' if main else \
        '<p class="note">No statements: tables.py makes them (python tables.py RESULTS --out tables).</p>'
    topics = {}
    for one in statements:
        topics.setdefault(" · ".join(filter(None, (capital(one["topic"]), one["dataset"]))), []).append(one)
    said = "".join(f'<h3>{text(topic)}</h3><ul class="statements">{"".join(f"<li>{statement_html(one)}</li>" for one in found)}</ul>'
                   for topic, found in topics.items())
    kept = [table for table in tables["tables"] if table["name"] != "errata"] if tables else []
    shown = [table_html(table) for table in kept]
    index = "".join(f'<li><a href="#{anchor(table)}">{text(table["title"])}</a></li>' for table in kept)
    drawn = [f'<figure><img alt="{text(figure["title"])}" src="{figure["uri"]}"><figcaption><strong>{text(figure["title"])}.</strong> '
             f'{text(figure["caption"])}</figcaption></figure>' for figure in (figures or {"figures": []})["figures"]]
    histories = [table_html(table) for name in names if (table := history_table(name, [n for n in networks if n["dataset"] == name]))]
    wrong = errata(tables)
    versions = in_words(tables["made_with"].get("versions") or "unknown versions") if tables else ""
    made_with = f'<p class="test">Tables and tests: {text(versions)}.</p>' if tables and networks else ""
    sections = [
        ("findings", "Main findings", findings),
        ("analysed", "What was analysed", analysed(networks) + made_with),
        ("warnings", "Warnings and gaps", ('<div class="note">' + listing(warned) + "</div>" if warned else "")
         + ("<h3>Left out</h3>" + listing(left_out) if left_out else "") + ("<h3>Missing</h3>" + listing(absent) if absent else "")),
        ("statements", "What the numbers support", said),
        ("gallery", "Gallery", GALLERY if sets else ""),
        ("tables", "Tables", f'<ul class="index">{index}</ul>' + "\n".join(shown) if shown else
         '<p class="note">No tables: python tables.py RESULTS --out tables makes them.</p>'),
        ("figures", "Figures", "\n".join(drawn) or '<p class="note">No figures: python figures.py RESULTS --out figures makes them.</p>'),
        ("training", "Training", "\n".join(histories)),
        ("errata", "Errata of the published method", table_html(wrong) if wrong else ""),
    ]
    sections = [(name, title, section(name, title, body)) for name, title, body in sections]
    stored = {"gallery-sets": sets, **stored} if sets else {}
    counts = [count(len(networks), "network"), count(sum(len(one["pictures"]) for one in sets), "picture"),
              count(len(shown), "table"), count(len(drawn), "figure")]
    return page("What do these losses make a network look at?", sentence(networks), sections, stored), main, counts, len(warned) + len(left_out)


def say(message):
    print(f"report.py: {message}", file=sys.stderr)


def fail(message):
    say(" ".join(str(message).split()))
    sys.exit(2)


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = fail
    add = parser.add_argument
    add("results", type=Path, metavar="RESULTS", help="results/, or one data set's folder in it")
    add("--tables", type=Path, metavar="DIR", help="folder of tables.py (tables, if it is there)")
    add("--figures", type=Path, metavar="DIR", help="folder of figures.py (figures, if it is there)")
    add("--dataset", action="append", default=[], metavar="FOLDER|CSV|NAME", help="the pictures of the data set of this name; may be repeated")
    add("--data-root", metavar="DIR", help="folder of the published data sets (DML_DATA_ROOT, else data/)")
    add("--out", type=Path, default=Path("report.html"), metavar="FILE.html", help="the page (report.html)")
    add("--pictures", type=int, default=300, metavar="N", help="at most so many in the gallery, taken evenly (300)")
    add("--size", type=int, default=112, metavar="PX", help="longer side of a map in the gallery; pictures get twice that (112)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    for name, low, high in ("pictures", 1, 100_000), ("size", 16, 1024):
        if not low <= getattr(args, name) <= high:
            raise ValueError(f"--{name} {getattr(args, name)}: expected {low} to {high:,}")
    for name in ("tables", "figures"):
        if getattr(args, name) and not (getattr(args, name) / f"{name}.json").is_file():
            raise ValueError(f"--{name} {getattr(args, name)}: no {name}.json there; python {name}.py {args.results} --out {getattr(args, name)} makes it")
        setattr(args, name, getattr(args, name) or Path(name))
    data.check_output(args.out, [args.tables / "tables.json", args.figures / "figures.json"])
    content, findings, counts, warned = build(args)
    data.write_file(args.out, content.encode("utf-8"))

    sys.stdout.reconfigure(errors="replace")  # no name can stop the report
    width = min(100, shutil.get_terminal_size().columns)
    print(f"{args.out}  {', '.join(counts)}, {len(content) / 2**20:.1f} MiB")
    if warned:
        print(f"{count(warned, 'warning')} or gap{'s' * (warned != 1)}: see the page")
    for number, one in enumerate(findings[:3], 1):
        print(textwrap.fill(one["text"], width, initial_indent=f"\n{number}. ", subsequent_indent="   "))
        print(textwrap.fill(capital(one["test"] or "no test"), width, initial_indent="   ", subsequent_indent="   "))
    if not findings:
        print("no main findings: they come from tables.py (python tables.py RESULTS --out tables)")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        say("stopped; nothing half-written remains")
        sys.exit(130)
