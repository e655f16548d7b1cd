"""What does a frame of render_cars.py cost, how many samples does it need, and what does each property look like?

    python benchmarks/render.py speed --frames 12                        # built once against built anew (needs bpy)
    python benchmarks/render.py sheets docs/cars.jpg                     # every value of every property (needs bpy)
    python render_cars.py --out few --size 128 --frames 0:150 ; python render_cars.py --out many --size 128 --frames 0:150 --samples 128
    python embed.py --dataset few --model efficientnet_lite0 --out few/emb.npy
    python embed.py --dataset many --model efficientnet_lite0 --out many/emb.npy
    python benchmarks/render.py samples few many                         # NR-Prec of both, paired bootstrap 

Prints figures; asserts nothing.
"""
import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import render_cars  # noqa: E402

# Around this frame the contact sheet changes one property at a time.
MIDDLE = {"model": "saloon", "rotation_z": 45, "color_hue": 0.0, "color_sat": 1.5, "color_val": 1.5, "bg_color_hue": 0.6, "bg_color_sat": 1.0,
          "bg_color_val": 1.0, "camera_loc_z": 1.5, "sun_elevation": 45, "sun_rotation": 90}


def quiet(function, *arguments):
    """Call with Blender's lines, which it prints on file descriptor 1, thrown away."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        return function(*arguments)
    finally:
        os.dup2(kept, 1)


def settings(folder, size, samples):
    for name in ("images", "masks"):
        (folder / name).mkdir()
    return SimpleNamespace(out=folder, seed=0, size=size, samples=samples, denoise=True, format="png", device="cpu", masks=True,
                           paint_material=None, verbose=False)


def speed(args):
    """Seconds a frame: the scene built once, built anew for each frame, and a process for each frame."""
    rows = render_cars.sample(render_cars.PROPERTIES, 0, range(args.frames))
    with tempfile.TemporaryDirectory() as folder:
        options = settings(Path(folder), args.size, args.samples)
        began = time.perf_counter()
        scene, models, _ = quiet(render_cars.build, options, None, render_cars.PROPERTIES)
        built = time.perf_counter() - began
        took = {"once": [], "anew": [], "one car anew": [], "process": []}
        for row in rows:
            began = time.perf_counter()
            quiet(render_cars.render_frame, scene, models, row, options, Path(folder))
            took["once"].append(time.perf_counter() - began)
        for row in rows[:max(2, args.frames // 3)]:
            for name, wanted in (("anew", render_cars.PROPERTIES["model"]), ("one car anew", [row["model"]])):
                began = time.perf_counter()
                scene, models, _ = quiet(render_cars.build, options, None, {"model": wanted})
                quiet(render_cars.render_frame, scene, models, row, options, Path(folder))
                took[name].append(time.perf_counter() - began)
            began = time.perf_counter()
            subprocess.run([sys.executable, str(ROOT / "render_cars.py"), "--out", f"{folder}/{row['frame']}", "--masks", "--frames",
                            f"{row['frame']}:{row['frame'] + 1}", "--size", str(args.size), "--samples", str(args.samples)],
                           check=True, stderr=subprocess.DEVNULL)
            took["process"].append(time.perf_counter() - began)
    median = {name: float(np.median(values)) for name, values in took.items()}
    print(f"{args.size} x {args.size}, {args.samples} samples: all six cars built in {built:.1f} s, then {median['once']:.2f} s a frame (median)")
    for name, words in (("anew", "scene built anew for each frame"), ("one car anew", "the same with the frame's car alone"), ("process", "a process for each frame")):
        print(f"{words}: {median[name]:.2f} s a frame, {median[name] / median['once']:.1f} x")


def sheets(args):
    """One row of pictures a property, its values from left to right; how much neighbours differ, what is black or burnt out."""
    rows = [(name, value) for name, values in render_cars.PROPERTIES.items() for value in values]
    widest, size, margin = max(map(len, render_cars.PROPERTIES.values())), args.size, 78
    sheet = Image.new("RGB", (margin + widest * size, len(render_cars.PROPERTIES) * (size + 12)), "white")
    draw, pictures = ImageDraw.Draw(sheet), {}
    with tempfile.TemporaryDirectory() as folder:
        options = settings(Path(folder), size, args.samples)
        scene, models, _ = quiet(render_cars.build, options, None, render_cars.PROPERTIES)
        for name, value in rows:
            quiet(render_cars.render_frame, scene, models, MIDDLE | {name: value, "frame": 0}, options, Path(folder))
            pictures[name, value] = Image.open(Path(folder) / "images/000000.png").convert("RGB")
    for line, (name, values) in enumerate(render_cars.PROPERTIES.items()):
        draw.text((2, line * (size + 12) + size // 2), name.replace("_color", ""), "black")
        for column, value in enumerate(values):
            at = (margin + column * size, line * (size + 12))
            sheet.paste(pictures[name, value], at)
            draw.text((at[0] + 2, at[1] + size), str(value), "black")
        arrays = [np.asarray(pictures[name, value], float) for value in values]
        steps = [np.abs(a - b).mean() for a, b in zip(arrays, arrays[1:])]
        burnt, black = max((a.min(2) >= 254).mean() for a in arrays), max((a.max(2) <= 2).mean() for a in arrays)
        print(f"{name:14s} neighbours differ by {min(steps):5.2f} to {max(steps):5.2f} of 255; white {burnt:.1%}, black {black:.1%} at most")
    sheet.save(args.file, quality=88)


def z_scores(emb, labels):
    """Every query's (X - R p) / sqrt(R p (1 - p)) (Eq. 5's terms), brute force; nan where R = 0."""
    n = len(emb)
    distance = ((emb[:, None] - emb[None]) ** 2).sum(2)
    np.fill_diagonal(distance, np.inf)
    near, scores = np.argsort(distance, axis=1, kind="stable"), np.full(n, np.nan)
    for q in range(n):
        c = int((labels == labels[q]).sum())
        if 1 < c < n:
            hits, p = (labels[near[q, :c - 1]] == labels[q]).sum(), c / n
            scores[q] = (hits - (c - 1) * p) / np.sqrt((c - 1) * p * (1 - p))
    return scores


def samples(args):
    """NR-Prec of the same frames rendered both ways; 95 % paired bootstrap interval of the difference, over queries."""
    with open(args.a / "props.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    a, b = (np.load(folder / "emb.npy").astype(float) for folder in (args.a, args.b))
    few, many = (json.loads((folder / "render.json").read_text())["samples"] for folder in (args.a, args.b))
    rng = np.random.default_rng(0)
    print(f"{len(rows)} frames\n{'property':14s} {few:>5} samples {many:>5} samples   difference, 95 % interval")
    for name in list(rows[0])[1:]:
        labels = np.array([row[name] for row in rows])
        first, second = z_scores(a, labels), z_scores(b, labels)
        keep = ~np.isnan(first)
        change = (first - second)[keep]
        means = change[rng.integers(len(change), size=(2000, len(change)))].mean(1)
        low, high = np.percentile(means, [2.5, 97.5])
        print(f"{name:14s} {first[keep].mean():13.2f} {second[keep].mean():13.2f}   {change.mean():+6.2f}  [{low:+.2f}, {high:+.2f}]"
              f"{'' if low <= 0 <= high else '  excludes 0'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for function, more in ((speed, ["--frames"]), (sheets, ["file"]), (samples, ["a", "b"])):
        command = commands.add_parser(function.__name__, help=function.__doc__.splitlines()[0])
        command.set_defaults(run=function)
        for name in more:
            command.add_argument(name, **({"type": int, "default": 12} if name == "--frames" else {"type": Path}))
        if function is not samples:
            command.add_argument("--size", type=int, default=256 if function is speed else 96)
            command.add_argument("--samples", type=int, default=8)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
