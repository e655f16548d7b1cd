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
one carries a content security policy that runs its own script alone, and everything read is escaped. The page's style and
script are report.css and report.js, beside this file.
"""
import argparse
import base64
import hashlib
import html
import io
import json
import math
import re
import shutil
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from dml_common import files
from dml_common import pictures as data
from dml_common import results

# ---------------------------------------------------------------- what is there


def find_networks(folder):
    """Networks with arrays in RESULTS -> ({data set: those of results.find_networks, with its name}, [what is left out])."""
    networks, wrong, places = {}, [], results.find_datasets(folder)
    for place in places:
        found = results.find_networks(place)
        wrong += results.open_arrays(found)
        name, found = place.resolve().name, [network for network in found if any(map(network.get, results.ARRAYS))]
        networks |= {name: [{"dataset": name, **network} for network in found]} if found else {}
    left_out = [what.replace(str(path), path.relative_to(folder).as_posix()) for path, what in sorted(wrong)]
    if not networks and not any((place / f"{name}.csv").is_file() for place in places for name in results.COLUMNS):
        raise ValueError(f"{folder}: no results, neither whole arrays nor tables: python embed.py --dataset NAME --loss all "
                         f"--out {folder}" + "".join(f"; {line}" for line in left_out[:2]))
    return networks, left_out


def picture_properties(folder):
    """{a picture's name: [(property, its value), …]} of the labels.csv and props.csv of a network's folder."""
    properties, tables = {}, [files.read_table(path) for path in (folder / "labels.csv", folder / "props.csv") if path.is_file()]
    if (folder / "labels.csv").is_file():
        names = tables[0].pop("path", None) or next(iter(tables[0].values()))
        for column, values in (item for table in tables for item in table.items()):
            if len(values) == len(names) and column.lower() not in files.IDENTIFIERS:
                for name, value in zip(names, values):
                    properties.setdefault(name, []).append((column, value))
    return properties


# ---------------------------------------------------------------- tables, statements and figures of the steps before

TEXT, NUMBER = (str, type(None)), (int, float, type(None))
TABLES = {"tables": list, "statements": list, "warnings": list, "missing": list, "made_with": dict}
TABLE = {"name": str, "title": str, "caption": str, "dataset": TEXT, "kind": str, "header": list, "rows": list, "notes": list}
CELL = {"text": str, "value": NUMBER, "shade": NUMBER, "bold": bool, "hint": TEXT}
STATEMENT = {"dataset": TEXT, "topic": str, "text": str, "test": TEXT, "p_value": NUMBER, "main": bool}
FIGURES = {"figures": list, "missing": (list, type(None))}
FIGURE = {"name": str, "title": str, "caption": str, "dataset": TEXT, "svg": TEXT, "png": TEXT}
MISSING = {"dataset": TEXT, "table": TEXT, "figure": TEXT, "what": str}


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
            raise ValueError(f"{path}: {key} of {where} is {str(item.get(key, 'missing'))[:40]!r}, expected {names}; "
                             "make the file again")
    return {key: item.get(key) for key in expected}


def read_tables(folder):
    """tables.json, checked field by field; None where it is not there."""
    path, content = folder / "tables.json", read_part(folder, "tables.json", "tables.py RESULTS --out " + str(folder))
    if content is None:
        return None
    content = fields(path, "the file", content, TABLES)
    content["tables"] = [fields(path, f"table {i}", item, TABLE) for i, item in enumerate(content["tables"])]
    content["statements"] = [fields(path, f"statement {i}", item, STATEMENT) for i, item in enumerate(content["statements"])]
    content["missing"] = [fields(path, f"missing {i}", item, MISSING) for i, item in enumerate(content["missing"])]
    names = [table["name"] for table in content["tables"]]
    for table in content["tables"]:
        where = f"table {table['name']!r}"
        if names.count(table["name"]) > 1 or table["kind"] not in ("rows", "matrix"):
            raise ValueError(f"{path}: {where} is there twice or of kind {table['kind']!r}; expected one, of kind rows or "
                             "matrix: make the file again")
        if any(not isinstance(row, list) or len(row) != len(table["header"]) for row in table["rows"]):
            raise ValueError(f"{path}: {where} has a row of another length than its header, {len(table['header'])}; "
                             "make the file again")
        table["rows"] = [[fields(path, f"a cell of {where}", one, CELL) for one in row] for row in table["rows"]]
    words = content["warnings"] + [one for table in content["tables"] for one in table["header"] + table["notes"]]
    if not all(isinstance(one, str) for one in words):
        raise ValueError(f"{path}: a warning, header or note is no text; make the file again")
    return content


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
            raise ValueError(f"{path}: figure {figure['name']!r}: {absent[0] if absent else 'its file'} is not in {folder}; "
                             "make the figures again")
        figure["uri"] = figure_uri(svg, png)
    missing = [fields(path, f"missing {i}", item, MISSING) for i, item in enumerate(content["missing"] or [])]
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
    found = [one for one in (tables or {"tables": []})["tables"] if one["name"] == "errata"]
    path = Path(__file__).resolve().parent / "published" / "errata.csv"
    if not found and path.is_file():
        columns = files.read_table(path)
        found = [new_table("errata", "Errata", map(capital, columns), zip(*columns.values()))]
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
        geometry = network["maps"].get("preprocessing", {})
        key = (network["dataset"], network["fold"], network["maps"]["array"].shape, geometry.get("resize"), geometry.get("crop"))
        groups.setdefault(str(key), []).append(network)
    total = sum(len(members[0]["maps"]["array"]) for members in groups.values())
    sets, stored, notes = [], {}, []
    with tqdm(total=min(total, most), unit=" pictures", desc="gallery", delay=2, disable=not sys.stderr.isatty()) as bar:
        for members in groups.values():
            found, images = gallery_set(members, datasets.get(members[0]["dataset"]), min(1, most / total), size, bar)
            stored.update({f"picture-{len(sets)}-{k}": one for k, one in enumerate(images)})
            sets.append(found)
            unseen = sum("picture" not in one for one in images)
            blank = sum(len(picture["blank"]) for picture in found["pictures"])
            notes += [f"{found['label']}: {unseen:,} of {count(len(images), 'picture')} can't be shown; the maps stand alone "
                      "(report.py --dataset FOLDER names the pictures' folder)."] * (unseen > 0)
            notes += [f"{found['label']}: {count(blank, 'map')} in the gallery constant or nan: shown empty, left out of "
                      "comparisons."] * (blank > 0)
    if len(stored) < total:
        notes.append(f"The gallery shows {len(stored):,} of {total:,} pictures, taken evenly (report.py --pictures {total} shows "
                     "all).")
    return sets, stored, notes


def gallery_set(members, dataset, share, size, bar):
    """One set of the gallery: what the script must know of it, and each picture with its maps."""
    n, *shape = members[0]["maps"]["array"].shape
    names, properties = results.picture_names(members[0]["maps"], n, dataset), picture_properties(members[0]["folder"])
    names = names or [f"row {row}" for row in range(n)]
    paths = dict(zip(dataset.relative, dataset.paths)) if dataset else {}
    pictures, images = [], []
    for row in np.linspace(0, n - 1, max(1, round(n * share))).round().astype(int).tolist():
        found, blank = picture_and_maps(members, row, paths.get(names[row]), size)
        images.append(found)
        pictures.append({"name": names[row], "properties": properties.get(names[row], []), "blank": blank})
        bar.update()
    height, width = small_shape(shape, size)
    label = members[0]["dataset"] if members[0]["fold"] is None else f"{members[0]['dataset']}, fold {members[0]['fold']}"
    return {"label": label, "second": "second" in images[0], "width": width, "height": height, "pictures": pictures,
            "networks": [{"name": member["name"], "type": member["type"]} for member in members]}, images


def picture_and_maps(members, row, path, size):
    """One picture, its maps and, where all networks have them, their second maps, as data URIs; and which maps are blank."""
    maps = np.stack([member["maps"]["array"][row].astype(np.float32) for member in members])
    images = {"maps": webp(sprite(maps, size), 60)}
    seconds = [(member["maps_ceiling"] or {}).get("array") for member in members]
    if all(second is not None and second.shape == members[0]["maps"]["array"].shape for second in seconds):
        images["second"] = webp(sprite(np.stack([second[row].astype(np.float32) for second in seconds]), size), 60)
    picture = path and small_picture(path, members[0]["maps"].get("preprocessing"), size)
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


def new_table(name, title, header, rows, caption="", kind="text"):
    """A table as in tables.json; a row's parts are cells, or text."""
    rows = [[one if isinstance(one, dict) else cell(one) for one in row] for row in rows]
    return {"name": name, "title": title, "caption": caption, "kind": kind, "header": list(header), "rows": rows, "notes": []}


def anchor(table):
    """The id of a table's place on the page."""
    return "table-" + re.sub(r"[^A-Za-z0-9_-]", lambda found: f".{ord(found[0]):x}", table["name"])


def table_html(table):
    """A table under its title, in a region of its own that scrolls: sortable by its header (kind "rows"), not (kind "text"),
    or a heat map (kind "matrix").

    Where cells have hints the table is a grid: the arrow keys move in it and each hint is announced.
    """
    name, kind = anchor(table), table["kind"]
    grid = kind == "matrix" or any(one["hint"] for row in table["rows"] for one in row)
    short = all(len(one["text"]) <= 26 for row in table["rows"] for one in row[:1])  # such names are kept on one line
    head = []
    for k, title in enumerate(table["header"]):
        numbers = kind == "rows" and any(row[k]["value"] is not None for row in table["rows"])
        words = f'<button type="button">{text(title) or "Name"}</button>' if kind == "rows" else f"<span>{text(title)}</span>"
        head.append("<td></td>" if kind == "matrix" and k == 0 else
                    '<th scope="col"' + ' aria-sort="none"' * (kind == "rows") + ' class="n"' * numbers + f">{words}</th>")
    rows = [f'<tr><th scope="row">{cell_text(first)}</th>{"".join(map(cell_html, others))}</tr>'
            for first, *others in table["rows"]]
    return (f'<article class="table" id="{name}"><h3 id="{name}-title">{text(table["title"])}</h3>'
            + (f"<p>{text(table['caption'])}</p>" if table["caption"] else "") + legend(table)
            + f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{name}-title">'
            f'<table aria-labelledby="{name}-title"' + ' role="grid"' * grid + f' class="{kind}{" short" * short}">\n'
            f'<thead><tr>{"".join(head)}</tr></thead>\n<tbody>\n' + "\n".join(rows) + "\n</tbody></table></div>"
            + listing(table["notes"], "notes") + "</article>")


def cell_html(one):
    value, shade, hint = one["value"], one["shade"], one["hint"]
    kinds = ["n"] if value is not None else []
    kinds += [f"s{level_of(shade)}"] if shade is not None else []
    kinds += ["long"] if value is None and len(one["text"]) > 30 else []
    told = f' class="{" ".join(kinds)}"' if kinds else ""
    told += f' data-value="{value!r}"' if value is not None and math.isfinite(value) else ""
    told += f' data-hint="{text(hint)}"' if hint else ""
    return f"<td{told}>{cell_text(one)}</td>"


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
    ramp = f'<span class="ramp" aria-hidden="true">{swatches}</span>'
    return f'<p class="legend">{text(low["text"])} {ramp} {text(high["text"])}</p>'


def settings_table(dataset, networks):
    """How one data set's networks were trained, and its arrays made, as their JSONs tell: a row a setting, a column a step."""
    columns = {}
    for step, stem in ("Training", None), ("Embeddings", "emb"), ("Saliency maps", "maps"):
        values = {}  # {setting: [its value for each network]}
        for network in networks:
            about = dict(network["config"] if stem is None else network[stem] or {})
            split = about.get("split")
            if isinstance(split, dict):  # without the rows
                kept = ("kind", "label", "seed", "train", "validation")
                about["split"] = {key: split[key] for key in kept if split.get(key) is not None}
            options = about.get("options") if isinstance(about.get("options"), dict) else {}
            for key, value in {**{key: about.get(key) for key in SETTINGS}, **options, "versions": about.get("versions")}.items():
                if value is not None and key not in ("ceiling", "noise_of"):
                    values.setdefault(key, []).append(in_words(value))
        if values:
            columns[step] = {key: Counter(told) for key, told in values.items()}
    keys = dict.fromkeys(key for values in columns.values() for key in values)
    rows = [[key.replace("_", " "), *(shares(values.get(key, {})) for values in columns.values())]
            for key in sorted(keys, key="versions".__eq__)]  # versions at the end
    return new_table(f"settings {dataset}", f"Settings: {dataset}", ["Setting", *columns], rows,
                     "As the JSON files beside networks and arrays tell. Where they differ, the number of each is given.")


SETTINGS = ("split", "backbone", "frozen_trunk", "preprocessing", "distance", "seed")


def shares(counts, total=None):
    """{"cosine": 3, "snr": 1} is "cosine (3 of 4); snr (1 of 4)"; a value that all `total` have stands alone."""
    total = total or sum(counts.values())
    return "; ".join(value if number == total else f"{value} ({number} of {total})" for value, number in counts.items())


def in_words(value):
    """A value of a JSON on one line: {"crop": 224, "scale": 255} is "crop 224, scale 255"."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {in_words(part)}" for key, part in value.items())
    if isinstance(value, list):
        return " ".join(map(in_words, value))
    return {"None": "none", "True": "yes", "False": "no"}.get(str(value), str(value))


def networks_table(dataset, networks):
    """Which networks of a data set were analysed, on what, from which checkpoints: a row a loss, its folds together."""
    rows = []
    for slug in dict.fromkeys(network["slug"] for network in networks):
        folds = [network for network in networks if network["slug"] == slug]
        abouts = [network["emb"] or network["maps"] or network["maps_ceiling"] for network in folds]
        shapes = [shares(Counter(shape_of(network[stem]["array"]) for network in folds if network[stem]), len(folds))
                  for stem in ("emb", "maps", "maps_ceiling")]
        distance = shares(Counter(in_words(about["distance"]) for about in abouts if about.get("distance")))
        digests = " ".join(str(about.get("checkpoint_sha256") or "")[:8] for about in abouts)
        numbers = " ".join("" if network["fold"] is None else str(network["fold"]) for network in folds)
        rows.append([folds[0]["name"], folds[0]["type"], numbers, distance, *shapes, digests])
    header = ["Network", "Type", "Folds", "Distance", "Embeddings", "Maps", "Maps, other noise", "Checkpoints (SHA-256)"]
    keep = [k for k in range(len(header)) if k < 4 or any(row[k].strip() for row in rows)]
    rows = [[row[k] for k in keep] for row in rows]
    return new_table(f"networks {dataset}", f"Networks: {dataset}", [header[k] for k in keep], rows,
                     "Shapes are pictures × dimension and pictures × height × width, of each fold.", "rows")


def shape_of(array):
    return "\u202f×\u202f".join(map(str, array.shape))  # narrow spaces that don't break


def losses_table(dataset, networks):
    """The parameters that the losses were trained with, from config.json; None where none is there."""
    told = {}
    for network in networks:
        told.setdefault(network["name"], []).extend(filter(None, [network["config"].get("loss_parameters")]))
    rows = [[name, shares(Counter(map(in_words, parameters)))] for name, parameters in told.items() if parameters]
    return rows and new_table(f"losses {dataset}", f"Losses' parameters: {dataset}", ["Loss", "Class and parameters"], rows,
                              "As train.py recorded them.")


def history_table(dataset, networks):
    """Before and after training, from history.csv: means over the folds; None where no network of the data set has one."""
    measures = [("loss", "train", "Training loss"), ("recall_at_1", "validation", "Recall@1, validation"),
                ("map_at_r", "validation", "MAP@R, validation"), ("jsd", "validation", "JSD, validation")]
    rows = []
    for name in dict.fromkeys(network["name"] for network in networks):
        paths = [network["history"] for network in networks if network["name"] == name and network["history"]]
        histories = [files.read_table(path) for path in paths]
        if not histories:
            continue
        epochs = max((int(epoch) for history in histories for epoch in history.get("epoch", []) if epoch.isdecimal()), default=0)
        row = [name, cell(len(histories), len(histories)), cell(epochs, epochs)]
        for column, split, _ in measures:
            for pick in (0, -1):
                values = [curve[pick] for history in histories if (curve := curve_of(history, column, split))]
                mean = sum(values) / len(values) if values else None
                row.append(cell("" if mean is None else f"{mean:.3f}", mean, ", ".join(f"{value:.4f}" for value in values)))
        rows.append(row)
    header = ["Network", "Folds", "Epochs", *(f"{title}: {when}" for _, _, title in measures for when in ("before", "after"))]
    return rows and new_table(f"history {dataset}", dataset, header, rows, "Means over the folds before training (epoch 0) and "
                              "after the last epoch (the network that is analysed is the best epoch's); each fold's value in the hint.", "rows")


def curve_of(history, column, split):
    """The finite values of one column of history.csv, by epoch; [] where it has none."""
    if not {"epoch", "split", column} <= set(history):
        return []
    rows = sorted((float(epoch), value) for epoch, part, value in zip(history["epoch"], history["split"], history[column])
                  if part == split and files.is_number(epoch) and files.is_number(value))
    return [float(value) for _, value in rows if math.isfinite(float(value))]


def capital(words):
    return words[:1].upper() + words[1:]


def test_of(statement):
    return capital(statement["test"]) if statement["test"] not in (None, "", "none") else "Not tested"


def statement_html(statement):
    test, p = test_of(statement), statement["p_value"]
    if p is not None and f"{p:.2g}" not in test:
        test += f"; p = {p:.2g}"
    return f'<li><p>{text(statement["text"])}</p><p class="test">{text(test)}</p></li>'


def section(name, title, content):
    return f'<section id="{name}" aria-labelledby="{name}-title">\n<h2 id="{name}-title">{title}</h2>\n{content}\n</section>'


def listing(items, kind="plain"):
    return f'<ul class="{kind}">' + "".join(f"<li>{text(item)}</li>" for item in items) + "</ul>" if items else ""


# ---------------------------------------------------------------- the page

GALLERY = """
<p>Choose a picture, by the arrow keys too. The slider fades from the picture over its salient parts to the map alone; bright is
salient. Each map is scaled to its own maximum, so maps tell where, not how much.</p>
<noscript><p class="note">The gallery needs JavaScript; everything else on this page reads without.</p></noscript>
<div class="controls">
<label>Pictures of <select id="set"></select></label>
<div><button type="button" class="box" id="previous">Previous</button>
<button type="button" class="box" id="next">Next</button></div>
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
    """The whole document. sections: [(id, title, HTML of its content)], empty ones left out; stored: {id: JSON-able}."""
    sections = [(name, heading, body) for name, heading, body in sections if body]
    style, script = (Path(__file__).with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".css", ".js"))
    style += shade_rules()
    policy = (f"default-src 'none'; img-src data:; style-src {hashed(style)}; script-src {hashed(script)}; "
              "base-uri 'none'; form-action 'none'")
    contents = "".join(f'<li><a href="#{name}">{heading}</a></li>' for name, heading, _ in sections)
    blocks = "\n".join(f'<script type="application/json" id="{name}">{script_json(value)}</script>'
                       for name, value in stored.items())
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
<div><button type="button" class="box" id="theme" hidden>Dark</button></div>
<p>{text(summary)}</p>
</header>
<div class="frame columns">
<nav aria-label="Contents"><ol>{contents}</ol></nav>
<main id="main" tabindex="-1">
{chr(10).join(section(*one) for one in sections)}
</main>
</div>
<footer class="frame">Made by report.py of dml-analysis. This page is one file: it loads nothing and sends nothing.</footer>
<div id="tip" aria-hidden="true"></div>
<div id="live" class="unseen" role="status" aria-live="polite"></div>
{blocks}
<script>{script}</script>
</body>
</html>
"""


def unreadable(networks, folder):
    """The pictures that the arrays' JSONs say were left out, each named once."""
    left_out = {}
    for network in networks:
        for stem in filter(network.get, ("emb", "maps")):
            path = network[stem]["path"].relative_to(folder).as_posix()
            for name in network[stem]["pictures"].get("left_out") or []:
                left_out.setdefault((network["dataset"], str(name)), []).append(path)
    return [f"{dataset}: {name} could not be read: not in {where[0]}" + (f" and {len(where) - 1} more" if len(where) > 1 else "")
            for (dataset, name), where in left_out.items()]


def warnings_of(networks):
    """What must be said of the maps even where no tables.json says it: noise shared, no second maps."""
    found = []
    for dataset, here in networks.items():
        maps = [network for network in here if network["maps"]]
        shared = [network for network in maps if network["maps"]["options"].get("shared_noise") and not network["maps_ceiling"]]
        alone = [network for network in maps if not network["maps_ceiling"]]
        found += [f"{dataset}: {len(shared)} of {len(maps)} networks' maps share their noise, which raises their "
                  "correlations."] * bool(shared)
        found += [f"{dataset}: {len(alone)} of {len(maps)} networks have no second map with other noise: without this ceiling "
                  "a low correlation may be noise alone (saliency.py --ceiling)."] * bool(alone)
    return found


def analysed(networks):
    """The section's content: what was analysed, data set by data set."""
    parts = []
    for dataset, here in networks.items():
        parts += [settings_table(dataset, here), networks_table(dataset, here), losses_table(dataset, here)]
    return "\n".join(map(table_html, filter(None, parts)))


def count(number, what):
    return f"{number:,} {what}{'s' * (number != 1)}"


def sentence(networks):
    """What was analysed, in one sentence."""
    if not networks:
        return "Tables alone: no arrays are beside them."
    datasets = dict.fromkeys(network["dataset"] for network in networks)
    names, folds = ({network[key] for network in networks} - {None} for key in ("name", "fold"))
    arrays = [network[stem] for network in networks for stem in ("emb", "maps") if network[stem]]
    backbones = sorted({str(about["backbone"]) for about in arrays if about.get("backbone")})
    maps = sum(len(network["maps"]["array"]) for network in networks if network["maps"])
    each = sorted({len(network["emb"]["array"]) for network in networks if network["emb"]})
    parts = [count(len(names), "network") + f" × {len(folds)} folds" * (len(folds) > 1) + f" on {' and '.join(datasets)}",
             each and f"{' or '.join(f'{n:,}' for n in each)} pictures each" * (len(each) < 4),
             count(maps, "saliency map") * (maps > 0), " and ".join(backbones)]
    return ", ".join(filter(None, parts)) + "."


def statements_html(statements):
    """Every statement with its test, under its topic and data set."""
    topics = {}
    for one in statements:
        topics.setdefault(" · ".join(filter(None, (capital(one["topic"]), one["dataset"]))), []).append(one)
    return "".join(f'<h3>{text(topic)}</h3><ul class="statements">{"".join(map(statement_html, found))}</ul>'
                   for topic, found in topics.items())


def tables_html(tables):
    """A list of the tables, and the tables."""
    index = "".join(f'<li><a href="#{anchor(table)}">{text(table["title"])}</a></li>' for table in tables)
    return f'<ul class="index">{index}</ul>' + "\n".join(map(table_html, tables)) if tables else ""


def figure_html(figure):
    title, caption = text(figure["title"]), text(figure["caption"])
    return (f'<figure><img alt="{title}" src="{figure["uri"]}">'
            f"<figcaption><strong>{title}.</strong> {caption}</figcaption></figure>")


def build(args):
    """Read everything, make the page -> (HTML, [main findings], what is on it in words, number of warnings and gaps)."""
    found, left_out = find_networks(args.results)
    names, networks = list(found), [network for here in found.values() for network in here]
    for here in found.values():
        results.check_together(here)
    datasets = results.open_pictures(args.dataset, args.data_root, names)
    tables, figures = read_tables(args.tables), read_figures(args.figures)
    sets, stored, notes = gallery(networks, datasets, args.pictures, args.size)

    shown = [table for table in tables["tables"] if table["name"] != "errata"] if tables else []
    statements, drawn = tables["statements"] if tables else [], figures["figures"] if figures else []
    main = [one for one in statements if one["main"]]
    others = sorted({one["dataset"] for one in shown + statements if one["dataset"]} - {*names}) if names else []
    warned = [*(tables["warnings"] if tables else warnings_of(found)), *notes]
    warned += [f"{args.tables / 'tables.json'} tells of {name}, of which {args.results} has no arrays." for name in others]
    left_out += unreadable(networks, args.results)
    listed = [line.split(":")[0] for line in left_out]  # arrays that tables.py left out as well
    missing = [one for part in (tables, figures) if part for one in part["missing"]
               if not any(name in one["what"] for name in listed)]
    missing = [": ".join(filter(None, (one["dataset"], one["table"], one["figure"], one["what"]))) for one in missing]
    versions = tables and networks and f"Tables and tests: {in_words(tables['made_with'].get('versions') or 'unknown versions')}."
    histories = [history_table(*one) for one in found.items()]
    wrong = errata(tables)
    gaps = [f"<h3>{title}</h3>{listing(items)}" for title, items in (("Left out", left_out), ("Missing", missing)) if items]
    sections = [
        ("findings", "Main findings", f'<ol class="findings">{"".join(map(statement_html, main))}</ol>' if main else
         none_here("No statements: tables.py makes them (python tables.py RESULTS --out tables).")),
        ("warnings", "Warnings and gaps", listing(warned, "note") + "".join(gaps)),
        ("statements", "What the numbers support", statements_html(statements)),
        ("gallery", "Gallery", GALLERY if sets else ""),
        ("tables", "Tables", tables_html(shown) or none_here("No tables: python tables.py RESULTS --out tables makes them.")),
        ("figures", "Figures", "\n".join(map(figure_html, drawn)) or
         none_here("No figures: python figures.py RESULTS --out figures makes them.")),
        ("training", "Training", "\n".join(map(table_html, filter(None, histories)))),
        ("analysed", "What was analysed", analysed(found) + (f'<p class="test">{text(versions)}</p>' if versions else "")),
        ("errata", "Errata of the published method", table_html(wrong) if wrong else ""),
    ]
    lengths = {"network": len(networks), "picture": len(stored), "table": len(shown), "figure": len(drawn)}
    counts = ", ".join(count(number, what) for what, number in lengths.items())
    stored = {"gallery-sets": sets, **stored} if sets else {}
    content = page("What do these losses make a network look at?", sentence(networks), sections, stored)
    return content, main, counts, len(warned) + len(left_out) + len(missing)


def none_here(words):
    return f'<p class="note">{text(words)}</p>'


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
    add("--dataset", action="append", default=[], metavar="FOLDER|CSV|NAME",
        help="the pictures of the data set of this name; may be repeated")
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
        folder = getattr(args, name)
        if folder and not (folder / f"{name}.json").is_file():
            raise ValueError(f"--{name} {folder}: no {name}.json there; python {name}.py {args.results} --out {folder} makes it")
        setattr(args, name, folder or Path(name))
    files.check_output(args.out, [args.tables / "tables.json", args.figures / "figures.json"])
    content, findings, counts, warned = build(args)
    files.write_file(args.out, content.encode("utf-8"))

    sys.stdout.reconfigure(errors="replace")  # no name can stop the report
    width = min(100, shutil.get_terminal_size().columns)
    print(f"{args.out}  {counts}, {len(content) / 2**20:.1f} MiB")
    if warned:
        print(f"{count(warned, 'warning')} or gap{'s' * (warned != 1)}: see the page")
    for number, one in enumerate(findings[:3], 1):
        print(textwrap.fill(one["text"], width, initial_indent=f"\n{number}. ", subsequent_indent="   "))
        print(textwrap.fill(test_of(one), width, initial_indent="   ", subsequent_indent="   "))
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
