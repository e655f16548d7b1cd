"""What does a frame of render_cars.py cost, how many samples does it need, what does each property look like?

    python benchmarks/render.py speed                                # built once against built anew
    python benchmarks/render.py sheets docs/cars.jpg                 # every value of every property
    python benchmarks/render.py bodies docs/bodies.jpg               # drawn bodies, and how much they differ
    python benchmarks/render.py samples work --embed .venv/bin/python   # NR-Prec with 1 … 128 samples

All three need bpy; samples also needs another environment's Python, in which embed.py runs, and continues
what lies in its folder. A set is a number of samples, or SAMPLES:SEED with noise of another seed (128:1 says
how far chance alone goes). Prints figures; asserts nothing.
"""
import os
import subprocess
import sys
import tempfile
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from measure import ROOT, measured, print_header, print_table, script
from PIL import Image, ImageDraw

import render_cars
from dml_common import command
from render_cars import HUES, PROPERTIES

# Around this frame the contact sheet changes one property at a time.
MIDDLE = {"model": "saloon", "rotation_z": 45, "color_hue": 0.0, "color_sat": 1.5, "color_val": 1.5,
          "bg_color_hue": 0.6, "bg_color_sat": 1.0, "bg_color_val": 1.0, "camera_loc_z": 1.5,
          "sun_elevation": 45, "sun_rotation": 90}


def quiet(function, *arguments):
    """Call with Blender's lines, which it prints on file descriptor 1, thrown away."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        return function(*arguments)
    finally:
        os.dup2(kept, 1)


def settings(folder, size, samples, **more):
    for name in ("images", "masks"):
        (folder / name).mkdir(exist_ok=True)
    defaults = {"out": folder, "seed": 0, "size": size, "samples": samples, "denoise": True, "format": "png",
                "device": "cpu", "masks": True, "paint_material": None, "verbose": False, "body_seed": 0,
                "exposure": "by-elevation"}
    return SimpleNamespace(**defaults | more)


def speed(args):
    """Seconds a frame: the scene built once, built anew for each frame, and a process for each frame."""
    rows = render_cars.in_order(render_cars.sample(PROPERTIES, 0, range(args.frames)))
    some, ways = rows[::max(1, len(rows) // args.anew)][:args.anew], {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        options = settings(folder, args.size, args.samples, device=args.device)

        def build(row, properties=PROPERTIES):
            return quiet(render_cars.build, options, None, properties)[:2]

        def alone(row):
            return build(row, PROPERTIES | {"model": [row["model"]]})

        def render(scene, row):
            quiet(render_cars.render_frame, *scene, row, options, folder)

        built, scene = measured(lambda: build(None))
        once, _ = measured(lambda: [render(scene, row) for row in rows])
        for what, make in ("all six cars built anew", build), ("the frame's car alone built anew", alone):
            cost, _ = measured(lambda make=make: [render(make(row), row) for row in some])
            ways[what] = cost.each(len(some))

        def processes():
            for row in some:
                frame = row["frame"]
                script("render_cars.py", "--out", folder / str(frame), "--masks", "--frames",
                       f"{frame}:{frame + 1}", "--size", args.size, "--samples", args.samples,
                       "--device", args.device)

        cost, _ = measured(processes)
        ways["a process for each frame"] = cost.each(len(some))
    once, what = once.each(len(rows)), f"a frame, {args.size} × {args.size}, {args.samples} samples"
    table = [("six cars, ground and sky, once", {"ours": built})]
    for way, plain in ways.items():
        table.append((f"{what}: {way}", {"ours": once, "straightforward": plain}))
    print_table(table)


def sheets(args):
    """One row of pictures a property, its values from left to right; how neighbours differ, what clips."""
    rows = [(name, value) for name, values in PROPERTIES.items() for value in values]
    widest, size, margin = max(map(len, PROPERTIES.values())), args.size, 78
    sheet = Image.new("RGB", (margin + widest * size, len(PROPERTIES) * (size + 12)), "white")
    lines = [["of 255", "least difference", "largest", "white at most", "black at most"]]
    draw, pictures = ImageDraw.Draw(sheet), {}
    with tempfile.TemporaryDirectory() as folder:
        options = settings(Path(folder), size, args.samples)
        scene, models, _ = quiet(render_cars.build, options, None, PROPERTIES)
        for name, value in rows:
            row = MIDDLE | {name: value, "frame": 0}
            quiet(render_cars.render_frame, scene, models, row, options, Path(folder))
            pictures[name, value] = Image.open(Path(folder) / "images/000000.png").convert("RGB")
    for line, (name, values) in enumerate(PROPERTIES.items()):
        draw.text((2, line * (size + 12) + size // 2), name.replace("_color", ""), "black")
        for column, value in enumerate(values):
            at = (margin + column * size, line * (size + 12))
            sheet.paste(pictures[name, value], at)
            draw.text((at[0] + 2, at[1] + size), str(value), "black")
        arrays = [np.asarray(pictures[name, value], float) for value in values]
        steps = [np.abs(a - b).mean() for a, b in zip(arrays, arrays[1:])]
        burnt = max((a.min(2) >= 254).mean() for a in arrays)
        black = max((a.max(2) <= 2).mean() for a in arrays)
        lines.append([name, f"{min(steps):.2f}", f"{max(steps):.2f}", f"{burnt:.1%}", f"{black:.1%}"])
    command.print_aligned(lines)
    sheet.save(args.file, quality=88)


def bodies(args):
    """Drawn bodies, ten in a row; what two of them have in common from the side, whether all are in frame."""
    names, height = [f"body{j:03d}" for j in range(args.number)], args.size * 4 // 7
    place = (0, args.size // 8, args.size, args.size // 8 + height)
    sheet = Image.new("RGB", (10 * args.size, -(-len(names) // 10) * height), "white")
    sides, edges = [], 0
    with tempfile.TemporaryDirectory() as folder:
        options = settings(Path(folder), args.size, args.samples)
        scene, models, _ = quiet(render_cars.build, options, None, PROPERTIES | {"model": names})
        for k, name in enumerate(names):
            for turn in (0, 45, 90, 225):
                row = MIDDLE | {"model": name, "frame": 0, "rotation_z": turn, "color_hue": HUES[k % 10]}
                quiet(render_cars.render_frame, scene, models, row, options, Path(folder))
                mask = np.asarray(Image.open(Path(folder) / "masks/000000.png")) > 0
                edges += mask[[0, -1]].any() or mask[:, [0, -1]].any()
                if turn == 0:
                    sides.append(mask)
            picture = Image.open(Path(folder) / "images/000000.png").crop(place)
            sheet.paste(picture, (k % 10 * args.size, k // 10 * height))
    common = [(a & b).sum() / (a | b).sum() for a, b in combinations(sides, 2)]
    command.print_aligned([
        ["bodies", "outlines in common", "at most", "pictures that touch their edge"],
        [str(len(names)), f"{np.mean(common):.2f}", f"{max(common):.3f}", f"{edges} of {4 * len(names)}"]])
    sheet.save(args.file, quality=85)


def nr_prec(near, labels, queries, candidates):
    """NR-Prec (Eq. 5) with so many copies of each frame as query, and as candidate; no copy is a neighbour.

    near (n, n - 1): every frame's others, the nearest first.
    """
    copies, same = candidates[near], labels[near] == labels[:, None]
    r = (copies * same).sum(1)
    taken = np.clip(r[:, None] - (copies.cumsum(1) - copies), 0, copies)  # until r are retrieved
    p = (r + 1) / (copies.sum(1) + 1)
    keep = (r > 0) & (p < 1)
    hits, r, p = (taken * same).sum(1)[keep], r[keep], p[keep]
    return np.average((hits - r * p) / np.sqrt(r * p * (1 - p)), weights=queries[keep])


def samples(args):
    """NR-Prec of the same frames rendered with more and fewer samples, paired intervals of the difference.

    Two bootstraps. Of frames: other frames might have been drawn (a copy as its original's neighbour, which
    plain resampling makes, is left out). Of queries: their neighbours stay; narrower, and nothing about other
    frames. * marks an interval of 95 % without 0. Of eleven such intervals one or more misses 0 in up to 43 %
    of cases where nothing differs; ** marks those still without 0 when all eleven hold at once in 95 %.
    """
    rows = render_cars.sample(PROPERTIES, 0, range(args.frames))
    names, n = list(PROPERTIES), args.frames
    labels = [np.unique([str(row[name]) for row in rows], return_inverse=True)[1] for name in names]
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=args.resamples)
    table, lines = {}, [["samples: property", "NR-Prec", f"of {args.reference}", "difference",
                         "frames drawn again", "", "queries drawn again", ""]]
    for name in dict.fromkeys([args.reference, *args.sets]):
        near, once = neighbours(args, name, rows), np.ones(n)
        scores = [[[nr_prec(near, column, w, candidates) for column in labels] for w, candidates in pairs]
                  for pairs in ([(once, once)], [(w, w) for w in drawn], [(w, once) for w in drawn])]
        table[name] = [np.array(part) for part in scores]  # (1 or resamples, properties)
        if name == args.reference:
            continue
        change, *resampled = [few - many for few, many in zip(table[name], table[args.reference])]
        part = [[f"{name}: {prop}", f"{few:.2f}", f"{many:.2f}", f"{few - many:+.3f}"]
                for prop, few, many in zip(names, table[name][0][0], table[args.reference][0][0])]
        for drawn_again in resampled:
            error = drawn_again.std(0)
            level = np.percentile(np.abs((drawn_again - change) / error).max(1), 95)
            for k, (mean, e) in enumerate(zip(change[0], error)):
                mark = "**" if abs(mean) > level * e else "*" if abs(mean) > 1.96 * e else ""
                part[k] += [f"[{mean - 1.96 * e:+.3f}, {mean + 1.96 * e:+.3f}]", mark]
        root = np.sqrt((change ** 2).mean())
        lines += [*part, [f"{name}: root mean square", "", "", f"{root:.3f}", "", "", "", ""]]
    command.print_aligned(lines)


def neighbours(args, name, rows):
    """Render and embed a set, as far as it isn't there -> every frame's others, nearest first (n, n - 1)."""
    folder = args.folder / f"{args.size}-{name.replace(':', '-')}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"images/{row['frame']:06d}.jpg" for row in rows]
    missing = [row for row, path in zip(rows, paths) if not path.exists()]
    if missing:
        number, _, seed = name.partition(":")
        options = settings(folder, args.size, int(number), seed=int(seed or 0), format="jpg", masks=False)
        scene, models, _ = quiet(render_cars.build, options, None, PROPERTIES)
        for row in render_cars.in_order(missing):
            quiet(render_cars.render_frame, scene, models, row, options, folder)
        (folder / "emb.npy").unlink(missing_ok=True)
    if not (folder / "emb.npy").exists():
        (folder / "props.csv").write_bytes(render_cars.table(rows))
        line = [args.embed, ROOT / "embed.py", "--dataset", folder, "--out", folder / "emb.npy"]
        subprocess.run([*line, "--model", "efficientnet_lite0"], check=True, stdout=subprocess.DEVNULL)
    emb = np.load(folder / "emb.npy").astype(float)
    distance = ((emb[:, None] - emb[None]) ** 2).sum(2)
    np.fill_diagonal(distance, np.inf)
    return np.argsort(distance, axis=1, kind="stable")[:, :-1]


def main():
    parser = command.parser(__doc__)
    commands = parser.add_subparsers(required=True)
    for function in (speed, sheets, bodies, samples):
        one = commands.add_parser(function.__name__, help=function.__doc__.splitlines()[0])
        one.set_defaults(run=function)
        add = one.add_argument
        add("--size", type=int, default={sheets: 96, bodies: 112}.get(function, 256))
        if function is speed:
            add("--frames", type=int, default=96, help="with the scene built once (96)")
            add("--anew", type=int, default=8, help="rendered each of the other ways (8)")
            add("--device", default="cpu", help="as render_cars.py takes it (cpu)")
        if function is bodies:
            add("--number", type=int, default=60)
        if function in (sheets, bodies):
            add("file", type=Path)
        if function is samples:
            add("folder", type=Path)
            add("--embed", required=True, metavar="PYTHON", help="that runs embed.py")
            add("--frames", type=int, default=150)
            add("--sets", nargs="+", metavar="SAMPLES[:SEED]",
                default=["1", "2", "4", "8", "16", "32", "64", "128:1"])
            add("--reference", default="128", metavar="SAMPLES[:SEED]")
            add("--resamples", type=int, default=1000)
        else:
            add("--samples", type=int, default=8)
    args = parser.parse_args()
    print_header()
    args.run(args)


if __name__ == "__main__":
    command.run(main, stopped="stopped")
