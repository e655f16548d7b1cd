"""Synthetic cars with eleven independent properties (Kobs et al. 2021, Table 5), every pixel's truth known.

    python render_cars.py --out cars --frames 0:300 --masks          # the same command continues
    python render_cars.py --out cars --frames 0:100000 --dry-run     # only props.csv and render.json
    python render_cars.py --out cars --frames 0:100000 --shard 2/8   # the third of eight processes
    python render_cars.py --out many --frames 0:1900 --bodies 60     # models body000 … body059
    python render_cars.py --out mine --frames 0:300 --cars meshes    # a .glb .obj .fbx .usd … a model
    blender -b -P render_cars.py -- --out cars --frames 0:300        # inside an installed Blender, 4.2 to 4.5

Reads:  nothing, or the meshes of --cars and the value lists of --properties
Writes: OUT/props.csv (one row a frame), OUT/render.json (seed, settings, Blender's version, meshes' hashes),
        OUT/images/000000.jpg … and, with --masks, OUT/masks/000000.png … (255 where the car is, else 0)

Frame i depends on the seed and i alone: any range of frames can be made anywhere, in any order. Stands alone.
With --depend bg_color_hue=model:0.8 a share of the frames takes its hue from its model: a planted shortcut.
"""
if __name__ == "__main__":  # until main() begins there is nothing to keep
    import os
    import signal

    def leave(number, frame):
        os.write(2, b"render_cars.py: stopped\n")
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)

import argparse
import colorsys
import contextlib
import csv
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

# Table 5. A hue is added to Blender's neutral hue, saturation and value multiply a colour with S = V = 0.5.
STEPS = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0]
HUES = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
TURNS = [0, 45, 90, 135, 180, 225, 270, 315]
PROPERTIES = {
    "model": ["saloon", "coupe", "hatchback", "suv", "pickup", "van"],  # BODIES, or the files of --cars
    "rotation_z": TURNS, "color_hue": HUES, "color_sat": STEPS, "color_val": STEPS,
    "bg_color_hue": HUES, "bg_color_sat": STEPS, "bg_color_val": STEPS,
    "camera_loc_z": [0.5, 1.5, 2.5, 3.5], "sun_elevation": [0, 45, 90], "sun_rotation": TURNS}
LIMITS = {"color_sat": (0, 2), "color_val": (0, 2), "bg_color_sat": (0, 2), "bg_color_val": (0, 2),
          "camera_loc_z": (0.2, 8), "sun_elevation": (0, 90)}
MESHES = (".glb", ".gltf", ".obj", ".fbx", ".usd", ".usda", ".usdc", ".usdz", ".blend")
RECYCLE = 400  # frames a worker renders before a fresh one takes over: Blender's memory grows slowly
MARK = "render_cars> "  # opens a worker's messages on its stdout, among what Blender prints


# ---------------------------------------------------------------- sampling: needs only NumPy

def sample(properties, seed, frames, rules=None):
    """One dict a frame: every property's value, drawn independently and uniformly from (seed, frame) alone.

    A property's draw has its own place in the frame's stream: fixing or replacing one leaves the others.
    rules: dependence()'s; whether a property follows in a frame is drawn from a stream of its own.
    """
    rows, names = [], list(properties)
    for i in frames:
        draws = np.random.default_rng([seed, i]).random(len(names))
        row = {name: values[int(u * len(values))] for (name, values), u in zip(properties.items(), draws)}
        if rules:
            follows = np.random.default_rng([seed, i, 2]).random(len(names))
            for name, rule in rules.items():
                if follows[names.index(name)] < rule["share"]:
                    row[name] = rule["values"][properties[rule["on"]].index(row[rule["on"]])]
        rows.append({"frame": i} | row)
    return rows


def dependence(properties, seed, wanted):
    """{property: {"on": source, "share", "values", "margin"}} of [(property, source, share), …].

    values: what follows from each value of the source, a fixed random map in which every len(values)
    successive ones of the source get each value once: each is used equally often, or as equally as the
    numbers allow, in the whole and in its successive parts. margin: how frequent each value then is.
    """
    rules = {}
    for name, source, share in wanted:
        if name in rules or source in [other for other, _, _ in wanted]:
            raise ValueError(f"--depend {name}={source}: a property depends once, on one that doesn't depend")
        values, sources = properties[name], len(properties[source])
        place, order = list(properties).index(name), []
        while len(order) < sources:
            draws = np.random.default_rng([seed, len(order), 3, place]).random(len(values))
            order += [values[k] for k in np.argsort(draws)]
        order = order[:sources]
        margin = [share * order.count(value) / sources + (1 - share) / len(values) for value in values]
        rules[name] = {"on": source, "share": share, "values": order, "margin": margin}
    return rules


def read_properties(path, models):
    """Table 5's lists with those of a JSON file put in their place; a single value holds a property fixed."""
    properties = PROPERTIES | {"model": models}
    if path is None:
        return properties
    try:
        given = json.loads(read_text(Path(path)))
    except OSError as error:
        raise OSError(f"--properties {path}: can't be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(given, dict):
        raise ValueError(f"{path}: a JSON {type(given).__name__}; expected as {{\"rotation_z\": [0, 90]}}")
    for name, values in given.items():
        if name not in properties:
            raise ValueError(f"{path}: unknown property {name!r}; expected some of {', '.join(properties)}")
        properties[name] = values if isinstance(values, list) else [values]
        for value in properties[name]:
            check_value(f"{path}: {name}", value, models if name == "model" else None, LIMITS.get(name))
        if not properties[name] or len(set(properties[name])) < len(properties[name]):
            raise ValueError(f"{path}: {name} has an empty list, or a value twice; every value is drawn "
                             "equally often")
    return properties


def read_text(path):
    """The text of a file; no pipe is waited for, no device read without end."""
    if path.exists() and not path.is_file():
        raise ValueError("expected a file, this is a folder, a device or a pipe")
    return path.read_text(encoding="utf-8")


def check_value(where, value, models, limits):
    """Raise ValueError unless the value is a model, or a number that can be rendered."""
    if models:
        fits, expected = value in models, f"some of {', '.join(models)}"
    else:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        expected = "finite numbers" + (f", {limits[0]} to {limits[1]}" if limits else "")
        fits = fits and (limits is None or limits[0] <= value <= limits[1])
    if not fits:
        raise ValueError(f"{where} has the value {json.dumps(value)}; expected {expected}")


def parse_frames(text):
    match = re.fullmatch(r"(?:(\d+):)?(\d+)", text)
    if not match or int(match[2]) <= int(match[1] or 0):
        raise argparse.ArgumentTypeError(f"{text!r}: expected FIRST:END with 0 <= FIRST < END, such as 0:300")
    return range(int(match[1] or 0), int(match[2]))


def parse_shard(text):
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r}: expected I/N with I from 0 to N - 1, such as 0/4")
    return int(match[1]), int(match[2])


def parse_models(text):
    """saloon,van,body060:body066 -> names; as of frames, the end of a range is left out."""
    names = []
    for part in text.split(","):
        match = re.fullmatch(r"body(\d{3})(?::body(\d{3}))?", part)
        first, stop = (int(match[1]), int(match[2] or int(match[1]) + 1)) if match else (0, 0)
        if part not in BODIES and not first < stop <= MOST_BODIES:
            raise argparse.ArgumentTypeError(f"{part!r}: expected {', '.join(BODIES)}, body000 to "
                                             f"body{MOST_BODIES - 1} or a range, such as body060:body066")
        names += [f"body{j:03d}" for j in range(first, stop)] if match else [part]
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r}: names a model twice; each is drawn equally often")
    return names


def parse_depend(text):
    match = re.fullmatch(r"(\w+)=(\w+):(\d*\.?\d+)", text)
    name, source, share = match.groups() if match else ("", "", 0)
    if name == source or not {name, source} <= set(PROPERTIES) or float(share) > 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a property, another and a share from 0 to 1: "
                                         f"bg_color_hue=model:0.8; properties: {', '.join(PROPERTIES)}")
    return name, source, float(share)


def my_share(environment=os.environ):
    """(i, n) of this process from torchrun's environment or a Slurm array's; (0, 1) without either."""
    try:
        if environment.get("RANK"):
            i, n = (int(environment[name]) for name in ("RANK", "WORLD_SIZE"))
        elif environment.get("SLURM_ARRAY_TASK_ID"):
            task, first, last, step, n = (int(environment[f"SLURM_ARRAY_TASK_{name}"])
                                          for name in ("ID", "MIN", "MAX", "STEP", "COUNT"))
            # --array=1,4,5 does not say which of the three this is
            i = (task - first) // step if first + (n - 1) * step == last else -1
        else:
            return 0, 1
    except (KeyError, ValueError, ZeroDivisionError):
        i, n = -1, 0
    if not 0 <= i < n:
        raise ValueError("no part of the frames follows from RANK and WORLD_SIZE, or SLURM_ARRAY_TASK_ID "
                         "(MIN, MAX, STEP, COUNT); give --shard I/N")
    return i, n


# ---------------------------------------------------------------- files: complete, or not there

def lock(descriptor, wait=True):
    """An exclusive lock, which ends with its process; False where another one has it."""
    with contextlib.suppress(ImportError):  # Windows
        import fcntl
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return wait
    return True


def save(path, content):
    """Write bytes so that the file is complete under its name, or not there at all."""
    partial = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")
    try:
        with open(partial, "wb") as file:
            lock(file)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def sweep(folders):
    """Remove what killed processes left half-written; a living one's is locked."""
    for partial in [path for folder in folders for path in folder.glob(".*.????????.part")]:
        with contextlib.suppress(OSError), open(partial, "rb") as file:
            if lock(file, wait=False):
                partial.unlink()


def read_picture(path):
    """A JPEG's or PNG's bytes without what Blender notes (date, render time): equal if the pixels are."""
    content = path.read_bytes() if path.exists() else b""
    jpeg = content[:2] == b"\xff\xd8" and content[-2:] == b"\xff\xd9"
    if not jpeg and (content[:8], content[-8:-4]) != (b"\x89PNG\r\n\x1a\n", b"IEND"):
        raise OSError(f"Blender wrote no complete picture into {path.parent}; is the disk full? TMPDIR "
                      "chooses another place")
    at = 2 if jpeg else 8
    kept = [content[:at]]
    while at < len(content) and not (jpeg and content[at + 1] == 0xDA):  # start of scan: the picture follows
        if jpeg:
            noted = 0xE1 <= content[at + 1] <= 0xEF or content[at + 1] == 0xFE  # APP1 … APP15, comment
            end = at + 2 + struct.unpack(">H", content[at + 2:at + 4])[0]
        else:
            noted = content[at + 4:at + 8] in (b"tEXt", b"zTXt", b"iTXt", b"tIME", b"eXIf")
            end = at + 12 + struct.unpack(">I", content[at:at + 4])[0]
        if not noted:
            kept.append(content[at:end])
        at = end
    return b"".join(kept) + content[at:]


def table(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def write_set(args, settings, rows):
    """props.csv and render.json of OUT, joined with those of frames that are there; one process at a time."""
    about, props, merged = args.out / "render.json", args.out / "props.csv", {}
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        # the folder itself is locked, so that no file is left of it; Windows can't
        gate = os.open(args.out, os.O_RDONLY) if os.name == "posix" else None
    except OSError as error:
        raise OSError(f"{args.out}: can't be written ({error.strerror}); choose another --out") from None
    try:
        if gate is not None:
            lock(gate)
        if about.exists():
            settings = settings | same_settings(about, settings)
        elif props.exists():
            raise ValueError(f"{args.out}: has a props.csv but no render.json: something else made it; "
                             "choose another --out")
        if not args.dry_run:
            for folder in folders_of(args):
                (args.out / folder).mkdir(exist_ok=True)
        save(about, (json.dumps(settings) + "\n").encode())
        if props.exists():
            try:
                there = csv.DictReader(io.StringIO(read_text(props), newline=""))
                merged = {int(row["frame"]): row for row in there}
            except (ValueError, KeyError, TypeError, csv.Error):
                raise ValueError(f"{props}: is not a table of this script; choose another --out") from None
        merged |= {row["frame"]: row for row in rows}
        save(props, table([merged[i] for i in sorted(merged)]))
    finally:
        if gate is not None:
            os.close(gate)


def same_settings(path, settings):
    """What a set knows beyond these settings (a dry run knows no Blender); ValueError where they differ."""
    try:
        there = json.loads(read_text(path))
        for name in dict.fromkeys([*there, *settings]):
            old, new = there.get(name), settings.get(name)
            if old == new or (None in (old, new) and name not in ("body_seed", "depend", "exposure")):
                continue
            if isinstance(old, dict) and isinstance(new, dict):
                key = next(key for key in [*old, *new] if old.get(key) != new.get(key))
                name, old, new = f"{name}: {key}", old.get(key), new.get(key)
            raise ValueError(f"{path.parent} was made with {name} {json.dumps(old)}, not {json.dumps(new)}; "
                             "use that, or another --out")
    except (json.JSONDecodeError, RecursionError, AttributeError):
        raise ValueError(f"{path}: is not a render.json of this script; choose another --out") from None
    return {name: value for name, value in there.items() if settings.get(name) is None}


def folders_of(args):
    """The folders of a set, and the endings of what lies there."""
    return {"images": args.format, **({"masks": "png"} if args.masks else {})}


def complete(args):
    """Numbers of the frames that are there."""
    frames = []
    for folder, suffix in folders_of(args).items():
        names = [re.fullmatch(rf"(\d{{6,}})\.{suffix}", name) for name in os.listdir(args.out / folder)]
        frames.append({int(name[1]) for name in names if name})
    return set.intersection(*frames)


# ---------------------------------------------------------------- the renderer, a process of its own

class Renderer:
    """A process that renders the frames it is told: python render_cars.py … --worker, or Blender's own."""

    def __init__(self, argv, verbose):
        blender = "bpy" in sys.modules and sys.modules["bpy"].app.binary_path
        inside = [blender, "-b", "--factory-startup", "-P", __file__, "--"]
        command = [*(inside if blender else [sys.executable, __file__]), *argv, "--worker"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        stderr=None if verbose else subprocess.DEVNULL, errors="replace")
        self.about = self.answer()

    def answer(self):
        for line in self.process.stdout:
            if line.startswith(MARK):
                answer = json.loads(line[len(MARK):])
                if "error" in answer:
                    raise ValueError(answer["error"])
                return answer
        raise OSError(f"the renderer ended early (status {self.process.wait()}); complete frames are kept, "
                      "--verbose shows its log")

    def render(self, row):
        with contextlib.suppress(BrokenPipeError):  # answer() says what happened
            self.process.stdin.write(json.dumps(row) + "\n")
            self.process.stdin.flush()
        return self.answer()

    def close(self):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()  # the worker ends by itself, and removes its temporary folder
        self.process.wait()


def in_order(rows):
    """Each worker's rows by the sun's place: while it stays the sky (a sixth of a frame) isn't made again."""
    ordered = []
    for k in range(0, len(rows), RECYCLE):
        ordered += sorted(rows[k:k + RECYCLE], key=lambda row: (row["sun_elevation"], row["sun_rotation"]))
    return ordered


def render_all(renderer, rows, argv, args):
    """Render the rows, a fresh worker every RECYCLE frames; returns the last worker."""
    began = shown = time.monotonic()
    terminal = sys.stderr.isatty()
    for done, row in enumerate(in_order(rows), 1):
        if done > 1 and (done - 1) % RECYCLE == 0:
            renderer.close()
            renderer = Renderer(argv, args.verbose)
        renderer.render(row)
        now = time.monotonic()
        if now - shown > (0.5 if terminal else 60) or done == len(rows):
            shown, rate = now, done / (now - began)
            left = time.strftime("%H:%M:%S", time.gmtime((len(rows) - done) / rate))
            line = f"{done:,}/{len(rows):,} frames, {60 * rate:.1f} frames a minute, {left} left"
            print(f"\r{line}  " if terminal else line, end="" if terminal and done < len(rows) else "\n",
                  file=sys.stderr, flush=True)
    return renderer


def work(args, cars, properties):
    """The worker: builds the scene once, then renders the rows that come on stdin, one JSON line each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the frame at hand is finished
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Blender's own lines go where stderr goes: nowhere, or to the terminal (--verbose)

    def say(**answer):
        print(MARK + json.dumps(answer), file=answers, flush=True)

    try:
        scene, models, about = build(args, cars, properties)
        say(**about)
        with tempfile.TemporaryDirectory(prefix="render_cars-") as temporary:
            for line in sys.stdin:
                row = json.loads(line)
                render_frame(scene, models, row, args, Path(temporary))
                say(frame=row["frame"])
    except Exception as error:  # the parent prints it as its one line
        if args.verbose:
            import traceback
            traceback.print_exc()
        if isinstance(error, OSError):
            error = ValueError(f"{error}; complete frames are kept, the same command continues")
        say(error=str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")


def render_frame(scene, models, row, args, temporary):
    """Set the scene to a row of props.csv, render, and save picture and mask."""
    import bpy
    for name, car in models.items():
        car["object"].hide_render = name != row["model"]
    car = models[row["model"]]
    car["object"].rotation_euler[2] = math.radians(row["rotation_z"])
    for node in car["paint"]:
        set_hsv(node, row["color_hue"], row["color_sat"], row["color_val"])
    backdrop = bpy.data.materials["backdrop"].node_tree.nodes["hsv"]
    set_hsv(backdrop, row["bg_color_hue"], row["bg_color_sat"], row["bg_color_val"])
    place_camera(scene.camera, row["camera_loc_z"])
    set_sky(scene.world.node_tree.nodes, row["sun_elevation"], row["sun_rotation"], args.exposure)
    # The noise pattern is the frame's own too: one fixed pattern would be a feature that all frames share.
    scene.cycles.seed = int(np.random.default_rng([args.seed, row["frame"], 1]).integers(2 ** 31))
    picture, mask = temporary / f"picture.{args.format}", temporary / "mask0001.png"
    scene.render.filepath = str(picture)
    for path in (picture, mask):
        path.unlink(missing_ok=True)
    if args.masks:
        scene.node_tree.nodes["mask"].base_path = str(temporary)
    bpy.ops.render.render(write_still=True)
    if args.masks:
        save(args.out / "masks" / f"{row['frame']:06d}.png", read_picture(mask))
    save(args.out / "images" / f"{row['frame']:06d}.{args.format}", read_picture(picture))


# ---------------------------------------------------------------- the scene

# Strength of the sky for each elevation of the sun (degrees): a white ground is rendered just below white at
# noon and darker, not black, at dawn. --exposure fixed takes noon's for all.
STRENGTH = ((0, 0.7), (5, 0.3), (15, 0.12), (45, 0.05), (90, 0.034))
CAMERA_DISTANCE, CAMERA_LENS, LOOK_AT = 10.0, 62.0, 0.62  # metres, mm (sensor 36 mm), metres


def build(args, cars, properties):
    """-> (scene, {model: {"object", "paint"}}, what the parent is told)."""
    import bpy
    if not (4, 2) <= bpy.app.version[:2] < (5, 0):
        raise ValueError(f"this is Blender {bpy.app.version_string}; expected 4.2 to 4.5")
    bpy.ops.wm.read_factory_settings(use_empty=True)
    scene = bpy.context.scene
    set_renderer(scene, args)
    build_backdrop()
    scene.camera = bpy.data.objects.new("camera", bpy.data.cameras.new("camera"))
    scene.camera.data.lens = CAMERA_LENS
    scene.collection.objects.link(scene.camera)
    if args.masks:
        build_mask(scene)
    models, report, hashes = {}, [], {}
    bodies = BODIES | draw_bodies(args.body_seed, properties["model"])
    for name in properties["model"]:
        if cars:
            models[name], line = load_car(cars[name], args.paint_material)
            report.append(line)
        else:
            models[name] = build_car(bodies[name])
            hashes[name] = mesh_hash(models[name]["object"].data)
    build_sky(scene)  # after the cars: a USD file's dome light becomes the world's light
    for car in models.values():
        car["object"].pass_index = 1
    return scene, models, {"blender": bpy.app.version_string, "meshes": hashes, "report": report}


def set_renderer(scene, args):
    scene.render.engine = "CYCLES"
    choose_device(scene, args.device)
    scene.render.resolution_x = scene.render.resolution_y = args.size
    scene.render.use_persistent_data = True  # the cars' geometry stays in Cycles from frame to frame
    scene.render.image_settings.file_format = {"jpg": "JPEG", "png": "PNG"}[args.format]
    scene.render.image_settings.color_mode = "RGB"
    scene.render.image_settings.quality = 92
    cycles = scene.cycles
    cycles.samples, cycles.use_adaptive_sampling = args.samples, False
    cycles.use_denoising = args.denoise
    if args.denoise:
        cycles.denoiser = "OPENIMAGEDENOISE"
        cycles.denoising_quality = "FAST"  # at 256 pixels two thirds of a frame's time would be denoising
    cycles.max_bounces, cycles.diffuse_bounces, cycles.glossy_bounces = 4, 2, 3
    cycles.caustics_reflective = cycles.caustics_refractive = False
    cycles.sample_clamp_indirect = 4.0  # no fireflies
    scene.view_settings.view_transform = "Khronos PBR Neutral"  # keeps hue and saturation


def choose_device(scene, device):
    """Cycles' compute device; ValueError with those that are there when it is not."""
    import bpy
    if device == "cpu":
        scene.cycles.device = "CPU"
        return
    preferences = bpy.context.preferences.addons["cycles"].preferences
    there = {"cpu"}
    for kind in ("CUDA", "OPTIX", "HIP", "METAL"):
        with contextlib.suppress(ValueError):  # this build of Blender does not know the kind
            there |= {kind.lower() for item in preferences.get_devices_for_type(kind) if item.type == kind}
    if device not in there:
        raise ValueError(f"--device {device}: not there; Blender has {', '.join(sorted(there))} here")
    preferences.compute_device_type = device.upper()
    for item in preferences.get_devices_for_type(device.upper()):
        item.use = item.type != "CPU"
    scene.cycles.device = "GPU"


def build_sky(scene):
    import bpy
    scene.world = bpy.data.worlds.new("world")
    scene.world.use_nodes = True
    tree = scene.world.node_tree
    sky = tree.nodes.new("ShaderNodeTexSky")
    sky.name = "sky"
    sky.sky_type = "NISHITA"
    sky.sun_size = math.radians(3)  # the real 0.5 degrees would make hard shadows
    sky.sun_intensity = 0.6
    tree.links.new(sky.outputs[0], tree.nodes["Background"].inputs["Color"])
    scene.world.cycles.sampling_method = "MANUAL"
    scene.world.cycles.sample_map_resolution = 256


def set_sky(nodes, elevation, rotation, exposure):
    """Place the sun, in degrees. Setting a value, even to what it is, makes Cycles compute the sky again."""
    strength = float(np.interp(90 if exposure == "fixed" else elevation, *zip(*STRENGTH)))
    for item, name, value in ((nodes["sky"], "sun_elevation", math.radians(elevation)),
                              (nodes["sky"], "sun_rotation", math.radians(rotation)),
                              (nodes["Background"].inputs["Strength"], "default_value", strength)):
        if getattr(item, name) != np.float32(value):
            setattr(item, name, value)


def build_backdrop():
    """A ground, and round it a wall that only the camera sees: no horizon cuts the car, no light is lost."""
    paint = material("backdrop", (0.5, 0.25, 0.25), roughness=1.0)
    tree = paint.node_tree
    shader = tree.nodes.new("ShaderNodeBsdfDiffuse")
    tree.links.new(add_hsv(tree, None).outputs[0], shader.inputs["Color"])
    up = tree.nodes.new("ShaderNodeCombineXYZ")
    up.inputs[2].default_value = 1.0  # the wall is shaded as if it were ground: no edge between the two
    tree.links.new(up.outputs[0], shader.inputs["Normal"])
    tree.links.new(shader.outputs[0], tree.nodes["Material Output"].inputs["Surface"])
    n, radii = 96, np.array([11, 12, 13, 14, 15, 16, 17, 18, 19, 90])
    # slope 0, then up to 1 in 2
    heights = np.where(radii < 19, (radii - 11) ** 2 / 16 * 0.5, 2.0 + (radii - 19) * 0.5)
    add_object("ground", [(x, y, 0) for x, y in circle(300, n)], [tuple(range(n))], paint)
    wall = [(x, y, height + 0.001) for radius, height in zip(radii, heights) for x, y in circle(radius, n)]
    wall = add_object("wall", wall, tube(len(radii), n), paint)
    wall.visible_shadow = wall.visible_diffuse = wall.visible_glossy = wall.visible_transmission = False


def circle(radius, n, start=0.0, stop=2 * math.pi, endpoint=False):
    """n points (x, y) of a circle, or of an arc."""
    angles = np.linspace(start, stop, n, endpoint=endpoint)
    return [(radius * math.cos(a), radius * math.sin(a)) for a in angles]


def tube(rings, n):
    """The faces between rings of n vertices each."""
    return [(k * n + i, k * n + (i + 1) % n, (k + 1) * n + (i + 1) % n, (k + 1) * n + i)
            for k in range(rings - 1) for i in range(n)]


def build_mask(scene):
    """The compositor writes the object index (1: the car) beside the picture: no second rendering."""
    scene.view_layers[0].use_pass_object_index = True
    scene.use_nodes = True
    tree = scene.node_tree
    tree.nodes.clear()
    layers = tree.nodes.new("CompositorNodeRLayers")
    composite = tree.nodes.new("CompositorNodeComposite")
    output = tree.nodes.new("CompositorNodeOutputFile")
    output.name = "mask"
    output.format.file_format, output.format.color_mode, output.format.color_depth = "PNG", "BW", "8"
    output.format.color_management = "OVERRIDE"
    output.format.view_settings.view_transform = "Raw"
    output.file_slots[0].path = "mask"
    tree.links.new(layers.outputs["Image"], composite.inputs["Image"])
    tree.links.new(layers.outputs["IndexOB"], output.inputs[0])


def place_camera(camera, z):
    camera.location = (0.0, -CAMERA_DISTANCE, z)
    camera.rotation_euler = (math.pi / 2 - math.atan2(z - LOOK_AT, CAMERA_DISTANCE), 0.0, 0.0)


def add_hsv(tree, source):
    """Table 5's colour: Blender's Hue/Saturation/Value node on a texture, or on a colour with S = V = 0.5."""
    node = tree.nodes.new("ShaderNodeHueSaturation")
    node.name = "hsv"
    node.inputs["Color"].default_value = (*colorsys.hsv_to_rgb(0.0, 0.5, 0.5), 1.0)
    if source is not None:
        tree.links.new(source, node.inputs["Color"])
    return node


def set_hsv(node, hue, saturation, value):
    node.inputs["Hue"].default_value = (0.5 + hue) % 1.0  # 0.5 is the node's neutral hue
    node.inputs["Saturation"].default_value = saturation
    node.inputs["Value"].default_value = value


def material(name, color, roughness=0.5, metallic=0.0, coat=0.0, emission=0.0):
    """A new material; name is its name in Blender, color linear RGB."""
    import bpy
    made = bpy.data.materials.new(name)
    made.use_nodes = True
    shader = made.node_tree.nodes["Principled BSDF"]
    shader.inputs["Base Color"].default_value = shader.inputs["Emission Color"].default_value = (*color, 1.0)
    for key, value in (("Roughness", roughness), ("Metallic", metallic), ("Coat Weight", coat),
                       ("Emission Strength", emission)):
        shader.inputs[key].default_value = value
    return made


def add_object(name, vertices, faces, *materials):
    import bpy
    mesh = bpy.data.meshes.new(name)
    mesh.from_pydata([tuple(map(float, v)) for v in vertices], [], [tuple(map(int, f)) for f in faces])
    for made in materials:
        mesh.materials.append(made)
    made = bpy.data.objects.new(name, mesh)
    bpy.context.scene.collection.objects.link(made)
    return made


# ---------------------------------------------------------------- the built-in cars

PALETTE = {  # linear colours; all but the paint stay what they are
    "paint": dict(color=(0.5, 0.25, 0.25), roughness=0.32, coat=0.7),
    "glass": dict(color=(0.015, 0.02, 0.025), roughness=0.03, coat=0.5),
    "trim": dict(color=(0.012, 0.012, 0.013), roughness=0.55),
    "rubber": dict(color=(0.012, 0.012, 0.012), roughness=0.85),
    "rim": dict(color=(0.55, 0.56, 0.58), roughness=0.28, metallic=0.9),
    "steel": dict(color=(0.10, 0.10, 0.11), roughness=0.4, metallic=0.8),
    "lamp": dict(color=(0.85, 0.87, 0.9), roughness=0.08, coat=1.0, emission=0.15),
    "tail": dict(color=(0.45, 0.006, 0.006), roughness=0.15, coat=1.0, emission=0.1),
    "plate": dict(color=(0.75, 0.75, 0.7), roughness=0.5)}
SLOT = {name: index for index, name in enumerate(PALETTE)}

# A body is a row of cross-sections from nose to tail, in metres: x, half width, bottom, belt line, top, half
# width at the top, bow (how far the middle lies in front of the sides), and what lies between it and the next
# one: h sheet metal, l lamps, w windscreen, s side window, p pillar, r rear window.
BODIES = {
    "saloon": dict(wheels=(1.42, -1.38), radius=0.335, spokes=10, doors=(0.92, -0.32, -1.12), rows="""
    2.34 .74 .26 .6 .66 .6 .18 l | 2.12 .84 .2 .66 .73 .66 .16 h | 1.5 .895 .18 .76 .85 .72 .12 h
    1.02 .9 .18 .83 .93 .77 .12 w | .28 .9 .18 .87 1.37 .6 .1 s | -.28 .9 .18 .89 1.44 .62 0 p
    -.37 .9 .18 .89 1.44 .62 0 s | -1.05 .9 .18 .91 1.4 .6 -.06 r | -1.66 .895 .19 .94 1.02 .73 -.12 h
    -2.12 .86 .22 .93 1.01 .71 -.13 l | -2.34 .78 .3 .88 .97 .67 -.13 -"""),
    "coupe": dict(wheels=(1.30, -1.28), radius=0.345, spokes=5, doors=(0.66, -0.55), spoiler=-1.92, rows="""
    2.2 .72 .22 .46 .52 .58 .22 l | 1.98 .86 .15 .55 .6 .66 .2 h | 1.38 .93 .13 .7 .74 .76 .14 h
    .72 .91 .13 .73 .82 .76 .14 w | -.1 .9 .13 .77 1.2 .54 .1 s | -.5 .91 .13 .79 1.23 .54 0 p
    -.58 .91 .13 .79 1.23 .54 0 r | -1.1 .95 .13 .83 1.08 .52 -.06 r | -1.62 .95 .16 .84 .92 .64 -.1 h
    -1.95 .92 .2 .83 .9 .7 -.12 l | -2.12 .82 .3 .79 .88 .68 -.12 -"""),
    "hatchback": dict(wheels=(1.22, -1.18), radius=0.31, spokes=8, doors=(0.92, -0.22), rows="""
    1.94 .72 .26 .64 .72 .6 .18 l | 1.74 .83 .2 .7 .8 .66 .16 h | 1.36 .86 .18 .8 .92 .71 .12 h
    1.02 .865 .18 .86 1 .75 .12 w | .42 .865 .18 .89 1.44 .6 .1 s | -.18 .865 .18 .92 1.53 .62 0 p
    -.26 .865 .18 .92 1.53 .62 0 s | -.98 .865 .18 .96 1.52 .6 -.04 p | -1.18 .865 .19 .97 1.5 .6 -.04 h
    -1.52 .86 .2 .98 1.44 .59 -.06 r | -1.8 .84 .22 .98 1.06 .68 -.1 l | -1.94 .77 .3 .84 .94 .68 -.1 -"""),
    "suv": dict(wheels=(1.42, -1.40), radius=0.395, spokes=6, doors=(0.98, -0.24, -1.06), cladding=True,
                rails=(0.56, 1.9, (0.2, -0.7, -1.58)), rows="""
    2.26 .8 .42 .84 .94 .7 .12 l | 2.08 .9 .34 .9 1.02 .76 .1 h | 1.5 .95 .32 .98 1.1 .82 .08 h
    1.1 .95 .32 1.03 1.14 .84 .08 w | .52 .95 .32 1.05 1.7 .7 .08 s | -.2 .95 .32 1.06 1.76 .72 0 p
    -.29 .95 .32 1.06 1.76 .72 0 s | -1.12 .95 .32 1.08 1.76 .71 0 p | -1.24 .95 .32 1.08 1.76 .71 0 s
    -1.86 .94 .33 1.1 1.73 .69 -.05 r | -2.12 .92 .36 1.08 1.18 .8 -.06 l | -2.26 .86 .44 .9 1 .78 -.06 -"""),
    "pickup": dict(wheels=(1.58, -1.48), radius=0.40, spokes=6, doors=(1.14, 0.12, -0.52), cladding=True,
                   bed=(-0.83, -2.28, 1.15, 1.5), rows="""
    2.5 .82 .46 .84 .96 .74 .08 l | 2.36 .9 .36 .9 1.05 .8 .07 h | 1.62 .94 .34 .98 1.12 .84 .06 h
    1.22 .94 .34 1.02 1.16 .84 .06 w | .66 .94 .34 1.05 1.7 .69 .08 s | .16 .94 .34 1.06 1.77 .71 0 p
    .08 .94 .34 1.06 1.77 .71 0 s | -.46 .94 .34 1.06 1.74 .69 0 r | -.68 .94 .34 1.06 1.16 .86 0 h
    -.84 .94 .34 1.06 1.14 .9 0 h | -2.3 .94 .38 1.06 1.14 .9 0 l | -2.42 .92 .42 1.05 1.13 .88 0 -"""),
    "van": dict(wheels=(1.52, -1.42), radius=0.34, spokes=0, doors=(1.24, 0.32),
                slide=(0.22, -1.02, -2.05), rows="""
    2.36 .82 .3 .76 .86 .7 .14 l | 2.22 .92 .24 .86 .98 .78 .14 h | 1.86 .97 .22 .98 1.12 .84 .12 h
    1.6 .975 .22 1.06 1.22 .86 .12 w | .88 .98 .22 1.12 1.9 .76 .1 s | .36 .98 .22 1.13 2 .78 0 h
    .1 .98 .22 1.13 2.02 .8 0 h | -1.2 .98 .22 1.13 2.03 .8 0 h | -2.05 .98 .24 1.13 2.02 .79 0 h
    -2.22 .97 .26 1.13 2 .78 0 l | -2.34 .93 .32 1.1 1.94 .76 0 -"""),
}
MOST_BODIES = 300
OVERLAP = 0.92  # most that two drawn bodies have in common from the side: intersection of outlines by union
# Ranges from which a body of a style is drawn, metres: length, height, half width, clearance, wheels' radius,
# bonnet (share of the length), the windscreen's run (of its rise), roof (of the half width), the rear
# window's run, deck.
STYLES = {
    "saloon": "4.3 4.95  1.34 1.56  .86 .94  .15 .22  .31 .36  .24 .31  1.5 2.1  .66 .74  .45 .8  .5 .8",
    "fastback": "3.95 4.6  1.17 1.38  .87 .96  .12 .17  .32 .37  .28 .37  1.7 2.4  .57 .66  .85 1.3  .25 .5",
    "hatchback": "3.5 4.35  1.38 1.62  .83 .91  .16 .22  .29 .34  .17 .27  1.1 1.7  .66 .77  .2 .55  .14 .18",
    "estate": "4.4 4.95  1.38 1.58  .86 .94  .15 .22  .31 .36  .23 .29  1.4 2  .66 .76  .15 .6  .14 .18",
    "suv": "4.1 4.9  1.62 1.9  .9 .98  .28 .38  .36 .43  .21 .29  .9 1.4  .7 .79  .2 .55  .14 .2",
    "pickup": "4.7 5.1  1.62 1.88  .91 .97  .3 .4  .36 .43  .22 .29  .9 1.4  .7 .78  .12 .3  1.3 1.8",
    "van": "4.2 5  1.75 2.12  .92 1  .18 .27  .31 .36  .11 .2  .7 1.3  .78 .84  .04 .2  .14 .18"}
# and of any: lamp, belt line (share of the height), the bonnet's height at the nose (of that at the
# windscreen), front and rear overhang, where the pillar behind the front doors stands (of the cabin).
ANY_STYLE = ".12 .34  .57 .64  .66 .84  .72 .94  .7 .95  .38 .5"
FRACTIONS = (1.0, 0.84, 0.45, 0.0, -0.45, -0.84, -1.0)  # columns of the cage, right side to left


def draw_bodies(seed, names):
    """{name: body} of body000 … as far as the names go.

    Body j depends on the seed and j alone: it is drawn until its outline differs from those of all before it.
    """
    number = max([int(name[4:]) + 1 for name in names if re.fullmatch(r"body\d{3}", name)], default=0)
    bodies, outlines = {}, []
    for j in range(number):
        for attempt in range(1000):
            body = draw_body(np.random.default_rng([seed, j, attempt, 4]).random(23).tolist())
            shape = outline(body)
            if all((other & shape).sum() < OVERLAP * (other | shape).sum() for other in outlines):
                break
        else:
            raise ValueError(f"--body-seed {seed}: no body{j:03d} differs enough from those before it")
        bodies[f"body{j:03d}"] = body
        outlines.append(shape)
    return bodies


def outline(body, step=0.04):
    """What a body covers seen from the side, bool: cells of x and z."""
    x, z = np.mgrid[-2.6:2.6:step, step / 2:2.3:step]
    rows = np.array(sections(body)[0])[::-1]
    inside = (np.interp(x, rows[:, 0], rows[:, 2]) < z) & (z < np.interp(x, rows[:, 0], rows[:, 4], 0, 0))
    for wheel in body["wheels"]:
        inside |= (x - wheel) ** 2 + (z - body["radius"]) ** 2 < body["radius"] ** 2
    return inside


def draw_body(u):
    """A body like those of BODIES from 23 numbers in [0, 1)."""
    style = list(STYLES)[int(u[0] * len(STYLES))]
    least, most = np.array(f"{STYLES[style]} {ANY_STYLE}".split(), float).reshape(-1, 2).T
    (length, height, w, bottom, radius, bonnet, rake, roof, window, deck,
     lamp, belt, dip, ahead, behind, middle) = (least + (most - least) * u[1:17]).tolist()
    nose, tail, belt, roof = length / 2, -length / 2, height * belt, roof * w
    sill = belt + 0.05                                     # the windscreen's foot lies here,
    foot = nose - bonnet * length
    front = foot - rake * (height - sill)                  # its upper edge here,
    back = min(tail + deck + window, front - 0.8)          # and here the roof's end
    low, middle = dip * sill, front + middle * (back - front)
    wheels = nose - max(ahead, radius + 0.3), tail + max(behind, radius + 0.3)
    pillars = [middle]
    if middle - back > 1.1 and style != "fastback":
        pillars.append(back + (0.25 if style in ("suv", "estate", "hatchback") else 0.55) * (middle - back))
    doors = [min(foot - .08, wheels[0] - radius - .06), *pillars[:1]]
    if len(pillars) > 1:
        doors.append(max(wheels[1] + .28, pillars[1] if style == "pickup" else back))

    rows = [(nose, .83 * w, bottom + .08, low - .06, low, .66 * w, .16, "l"),
            (nose - lamp, .94 * w, bottom + .02, low, low + .08, .74 * w, .15, "h"),
            ((nose - lamp + foot) / 2, .99 * w, bottom, (low + belt) / 2 - .02, .45 * low + .55 * sill + .04,
             .8 * w, .12, "h"),
            (foot, w, bottom, belt - .04, sill, .85 * w, .12, "w"),
            (front, w, bottom, belt - .01, height - .06, roof - .01, .1, "s")]
    post, side = "hh" if style == "van" and u[17] < 0.6 else "ps"  # h: a van without windows
    for x in pillars:
        rows += [(x + .04, w, bottom, belt + .01, height, roof, 0, post),
                 (x - .05, w, bottom, belt + .01, height, roof, 0, side)]
    rows += rear(style, w, bottom, belt, height, roof, back, tail, deck, window, lamp)
    body = {"rows": rows, "wheels": wheels, "radius": radius, "doors": doors,
            "spokes": (0, 5, 6, 7, 8, 10, 12)[int(7 * u[18])]}
    if u[19] < {"suv": .7, "pickup": .6}.get(style, .1):
        body["cladding"] = True
    if style in ("suv", "estate") and u[20] < .6:
        body["rails"] = roof - .13, front - back - .2, (front - .15, (front + back) / 2, back + .17)
    if style == "fastback" and u[21] < .5:
        body["spoiler"] = tail + .2
    if style == "van" and u[22] < .7:
        body["slide"] = middle - .06, middle - 1.2, tail + .3
    if style == "pickup":
        body["bed"] = tail + deck - .15, tail + .14, belt + .11, 2 * w - .38
    return body


def rear(style, w, bottom, belt, height, roof, back, tail, deck, window, lamp):
    """The sections of a drawn body from the roof's end on."""
    if style == "van":
        return [(back, w, bottom + .02, belt + .01, height - .01, roof - .01, 0, "h"),
                (tail + .14, .99 * w, bottom + .04, belt, height - .03, roof - .02, 0, "l"),
                (tail, .95 * w, bottom + .1, belt - .03, height - .08 - window, roof - .04, 0, "-")]
    wide, bow, end = (.95, 0, .01) if style == "pickup" else (.79, -.11, .05)
    drop = .1 if style == "fastback" else .04
    rows = [(back, w, bottom, belt + .02, height - drop, roof - .01, -.05, "r")]
    if style == "pickup":
        rows += [(tail + deck, w, bottom, belt + .01, belt + .1, .91 * w, 0, "h"),
                 (tail + deck - .16, w, bottom, belt + .01, belt + .1, .95 * w, 0, "h")]
    elif style in ("saloon", "fastback"):
        rows.append((tail + deck, w, bottom + .01, belt + .04, belt + .09, .8 * w, bow, "h"))
    return rows + [(tail + lamp / 2 + .06, .96 * w, bottom + .04, belt + end, belt + .09, wide * w, bow, "l"),
                   (tail, .88 * w, bottom + .12, belt - .02, belt + .04, (wide - .04) * w, bow, "-")]


def palette():
    import bpy
    for name, look in PALETTE.items():
        if name not in bpy.data.materials:
            made = material(name, **look)
            if name == "paint":
                recolour(made)
    return [bpy.data.materials[name] for name in PALETTE]


def cage_point(row, level, across):
    """Where the cage's vertex lies: a cross-section, a level (0 sill … 3 belt line, 4 top), −1 … 1 across."""
    x, width, bottom, belt, top, top_width, bow = row
    side = (0.95 * width, width, width, 0.97 * width, top_width)[level]
    z = (bottom, bottom + 0.10, 0.42 * bottom + 0.58 * belt, belt, top)[level]
    z += 0.045 * (1 - across ** 2) if level == 4 else 0.0
    y = side * across
    return x + bow * (1 - (y / width) ** 2), y, z


def cage(rows, kinds):
    """Control mesh of a body -> vertices, faces, material of each face: a box, n × 4 × 6, bent into a car."""
    n = len(rows)
    index, vertices, faces, slots = {}, [], [], []
    for i, level, column in np.ndindex(n, 5, 7):
        if level in (0, 4) or column in (0, 6) or i in (0, n - 1):
            index[i, level, column] = len(vertices)
            vertices.append(cage_point(rows[i], level, FRACTIONS[column]))

    def face(corners, slot):
        faces.append([index[corner] for corner in corners])
        slots.append(SLOT[slot])

    for i, kind in enumerate(kinds):
        for level in range(4):
            side = "paint"
            if level == 3:
                side = {"w": "glass", "s": "glass", "p": "trim"}.get(kind, "paint")
            elif level == 2 and kind == "l":
                side = "lamp" if i == 0 else "tail"
            for column, a, b in ((0, i, i + 1), (6, i + 1, i)):
                face([(a, level, column), (b, level, column), (b, level + 1, column),
                      (a, level + 1, column)], side)
        for k in range(6):
            top = "glass" if kind in "wr" and 0 < k < 5 else "paint"
            face([(i, 4, k), (i + 1, 4, k), (i + 1, 4, k + 1), (i, 4, k + 1)], top)
            face([(i, 0, k + 1), (i + 1, 0, k + 1), (i + 1, 0, k), (i, 0, k)], "trim")
    for i, level, k in np.ndindex(2, 4, 6):
        front, i = i == 0, i * (n - 1)
        slot = "trim" if level == 0 else "paint"
        if level == 2:
            slot = ("lamp" if front else "tail") if k in (0, 5) else "trim" if front else "paint"
        corners = [(i, level, k), (i, level + 1, k), (i, level + 1, k + 1), (i, level, k + 1)]
        face(corners if front else corners[::-1], slot)
    return vertices, faces, slots


def sections(body):
    """A body's table -> its cross-sections (x, half width, …), and what lies between each and the next."""
    rows = body["rows"]
    if isinstance(rows, str):
        rows = [row.split() for row in rows.replace("\n", "|").split("|") if row.strip()]
    return [[float(number) for number in row[:7]] for row in rows], [row[7] for row in rows[:-1]]


def build_body(body):
    """The body: the cage subdivided, wheel arches (and a bed) cut out."""
    import bpy
    vertices, faces, slots = cage(*sections(body))
    made = add_object("body", vertices, faces, *palette())
    made.data.polygons.foreach_set("material_index", slots)
    face_outwards(made.data)
    crease(made.data)
    subdivide = made.modifiers.new("subdivide", "SUBSURF")
    subdivide.levels = subdivide.render_levels = 3
    cutters = [cylinder((x, side * 0.92, body["radius"]), body["radius"] + 0.055, 0.62)
               for x in body["wheels"] for side in (-1, 1)]
    if "bed" in body:
        front, back, z, width = body["bed"]
        cutters.append(box(((front + back) / 2, 0, z), (front - back, width, 0.9), "trim", bevel=0.04))
    for cutter in cutters:
        cut = made.modifiers.new("cut", "BOOLEAN")
        cut.operation, cut.solver, cut.object = "DIFFERENCE", "EXACT", cutter
    mesh = bpy.data.meshes.new_from_object(made.evaluated_get(bpy.context.evaluated_depsgraph_get()))
    for cutter in cutters:
        bpy.data.objects.remove(cutter)
    made.modifiers.clear()
    made.data = mesh
    return made


@contextlib.contextmanager
def edited(mesh):
    """A mesh as bmesh, written back at the end."""
    import bmesh
    shape = bmesh.new()
    shape.from_mesh(mesh)
    yield shape
    shape.to_mesh(mesh)
    shape.free()


def face_outwards(mesh):
    import bmesh
    with edited(mesh) as shape:
        bmesh.ops.recalc_face_normals(shape, faces=shape.faces[:])


def crease(mesh):
    """Sharpen the cage's edges between materials, at the sill and at the belt line; the rest is rounded."""
    touching, values = {}, []
    for polygon in mesh.polygons:
        for key in polygon.edge_keys:
            touching.setdefault(key, []).append(polygon)
    for edge in mesh.edges:
        a, b = touching[tuple(sorted(edge.vertices))]
        if (a.material_index == SLOT["glass"]) != (b.material_index == SLOT["glass"]):
            values.append(0.75)
        elif a.material_index != b.material_index:
            values.append(0.55)
        else:
            values.append(0.75 if a.normal.dot(b.normal) < 0.3 else 0.25)
    mesh.attributes.new("crease_edge", "FLOAT", "EDGE").data.foreach_set("value", values)


def part(vertices, faces, slot):
    made = add_object("part", vertices, faces, *palette())
    made.data.polygons.foreach_set("material_index", [SLOT[slot]] * len(faces))
    face_outwards(made.data)
    return made


def cylinder(centre, radius, width, slot="trim", n=64):
    """A closed cylinder across the car."""
    x, y, z = centre
    vertices = [(x + a, y + side * width / 2, z + b) for side in (-1, 1) for a, b in circle(radius, n)]
    return part(vertices, [*tube(2, n), tuple(range(n))[::-1], tuple(range(n, 2 * n))], slot)


def box(centre, size, slot, bevel=0.0, turn=0.0):
    """A box with rounded edges; turn in radians about the axis across the car."""
    import bmesh
    sin, cos, vertices = math.sin(turn), math.cos(turn), []
    for signs in np.ndindex(2, 2, 2):
        x, y, z = ((sign - 0.5) * side for side, sign in zip(size, signs))
        vertices.append((centre[0] + (x * cos + z * sin), centre[1] + y, centre[2] + (z * cos - x * sin)))
    faces = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    made = part(vertices, faces, slot)
    if bevel:
        with edited(made.data) as shape:
            bmesh.ops.bevel(shape, geom=shape.edges[:], offset=bevel, segments=3, affect="EDGES", profile=0.5)
        made.data.polygons.foreach_set("material_index", [SLOT[slot]] * len(made.data.polygons))
    return made


def lathe(profile, centre, side, slot, n=48):
    """A profile of (radius, outwards) turned about a wheel's axis; side is 1 or −1."""
    x, y, z = centre
    vertices = [(x + a, y + side * out, z + b) for radius, out in profile for a, b in circle(radius, n)]
    return part(vertices, [face[::side] for face in tube(len(profile), n)], slot)


def wheel(x, side, track, radius, spokes):
    """Tyre, rim, spokes (0: a steel wheel) and brake disc; track: where the tyre's outer side lies."""
    width, rim = 0.21, 0.70 * radius
    centre = (x, side * (track - width / 2), radius)
    tyre = [(rim, -.5), (0.86 * radius, -.52), (0.97 * radius, -.44), (radius, -.3), (radius, .3),
            (0.97 * radius, .44), (0.86 * radius, .52), (rim, .5)]
    edge = [(rim * 1.01, .50), (rim * 0.95, .53), (rim * 0.90, .46), (rim * 0.90, -.45)]
    steel = [(0.9 * rim, .34), (0.72 * rim, .30), (0.45 * rim, .42), (0.005, .42)]
    profiles = [(tyre, "rubber"), (edge, "rim"), ([(0.66 * rim, .12), (0.02, .12)], "steel"),
                ([(rim * 0.9, -.1), (0.01, -.1)], "trim"),
                ([(0.2 * rim, .36), (0.17 * rim, .46), (0.005, .47)], "rim")]
    if spokes == 0:
        profiles.append((steel, "rim"))
    parts = []
    for profile, slot in profiles:
        parts.append(lathe([(r, out * width) for r, out in profile], centre, side, slot))
    for spoke in range(spokes):
        angle, across = 2 * math.pi * (spoke + 0.25) / spokes, min(0.16, 0.62 / spokes) * rim / 0.235
        direction = np.array([math.cos(angle), math.sin(angle)])
        inner, outer = direction * 0.1 * rim, direction * 0.93 * rim
        normal = np.array([-math.sin(angle), math.cos(angle)]) * across / 2
        front = [inner + normal, inner - normal, outer - 0.75 * normal, outer + 0.75 * normal]
        depths = [centre[1] + side * out * width for out in (.40, .22)]
        vertices = [(x + a, y, radius + b) for y in depths for a, b in front]
        faces = [(0, 1, 2, 3), (7, 6, 5, 4)] + [(i, i + 4, (i + 1) % 4 + 4, (i + 1) % 4) for i in range(4)]
        parts.append(part(vertices, [face[::side] for face in faces], "rim"))
    return parts


def strip(surface, path, width, slot, lift=0.004):
    """A ribbon laid on both sides of the body along a path of (x, z): door gaps, cladding."""
    path = np.array(path, float)
    along = np.gradient(path, axis=0)
    normal = np.stack([-along[:, 1], along[:, 0]], 1) / np.linalg.norm(along, axis=1, keepdims=True)
    normal = normal * width / 2
    parts = []
    for side in (1, -1):
        edges = [[surface((x, 3.0 * side, z), (0, -side, 0)) for x, z in edge]
                 for edge in (path + normal, path - normal)]
        whole = [i for i, pair in enumerate(zip(*edges)) if None not in pair]
        vertices = [(p[i][0], p[i][1] + side * lift, p[i][2]) for p in edges for i in whole]
        n = len(whole)
        faces = [(k, k + 1, n + k + 1, n + k) for k in range(n - 1) if whole[k + 1] == whole[k] + 1]
        parts.append(part(vertices, faces, slot))
    return parts


def build_car(body):
    """-> {"object": one mesh, "paint": its Hue/Saturation/Value nodes}."""
    from mathutils.bvhtree import BVHTree
    made = build_body(body)
    tree = BVHTree.FromPolygons([v.co for v in made.data.vertices], [p.vertices for p in made.data.polygons])
    rows, kinds = sections(body)
    (front, back), radius, parts = body["wheels"], body["radius"], [made]

    def surface(origin, direction):
        return tree.ray_cast(origin, direction)[0]

    def at(x, column):
        return float(np.interp(-x, [-row[0] for row in rows], [row[column] for row in rows]))

    for x in body["wheels"]:
        for side in (-1, 1):
            parts += wheel(x, side, at(x, 1) - 0.015, radius, body["spokes"])
        arch = circle(radius + 0.085, 60, -0.35, math.pi + 0.35, endpoint=True)
        arch = [(x + a, radius + b) for a, b in arch]
        parts += strip(surface, arch, 0.06, "trim" if "cladding" in body else "paint", 0.012)
    if "cladding" in body:
        low = [(x, at(0, 2) + 0.10) for x in np.linspace(front - radius - .1, back + radius + .1, 30)]
        parts += strip(surface, low, 0.13, "trim", 0.012)
    for x in body["doors"]:
        gap = [(x, z) for z in np.linspace(at(x, 2) + 0.10, at(x, 3) - 0.005, 16)]
        parts += strip(surface, gap, 0.018, "trim")
    for x in body["doors"][1:]:
        for side in (1, -1):
            y = surface((x + 0.16, 3 * side, at(x, 3) - 0.10), (0, -side, 0))
            parts.append(box((x + 0.16, y[1] + side * 0.012, y[2]), (0.16, 0.04, 0.028), "trim", 0.008))
    parts += details(body, surface, at, rows, kinds)
    return {"object": join(parts, smooth=True), "paint": [palette()[SLOT["paint"]].node_tree.nodes["hsv"]]}


def details(body, surface, at, rows, kinds):
    """Mirrors, number plates, spoiler, roof rails, the van's sliding door."""
    parts = []
    x = rows[kinds.index("w")][0] - 0.30  # behind the foot of the windscreen
    z = at(x, 3) + 0.06
    for side in (1, -1):
        y = surface((x, 3 * side, z - 0.03), (0, -side, 0))[1]
        parts.append(box((x, y + side * 0.04, z), (0.06, 0.16, 0.04), "trim", 0.012))
        parts.append(box((x, y + side * 0.17, z + 0.04), (0.11, 0.19, 0.13), "paint", 0.035))
    nose, tail = rows[0][0], rows[-1][0]
    for direction, z in ((-1, at(nose, 2) + 0.13), (1, 0.5 * at(tail, 2) + 0.5 * at(tail, 3))):
        hit = surface((-4 * direction, 0, z), (direction, 0, 0))
        parts.append(box((hit[0] - direction * 0.004, 0, z), (0.02, 0.50, 0.11), "plate", 0.004))
    if "spoiler" in body:
        x = body["spoiler"]
        top = surface((x + 0.06, 0.5, 3), (0, 0, -1))[2]
        parts.append(box((x, 0, top + 0.13), (0.26, 1.5, 0.03), "paint", 0.012, turn=-0.1))
        parts += [box((x + 0.04, y, top + 0.05), (0.16, 0.04, 0.18), "paint", 0.012) for y in (-0.52, 0.52)]
    if "rails" in body:
        across, length, feet = body["rails"]
        for y in (-across, across):
            top = surface((feet[1], y, 3), (0, 0, -1))[2]
            parts.append(box((feet[1], y, top + 0.055), (length, 0.035, 0.03), "rim", 0.01))
            parts += [box((x, y, top + 0.01), (0.10, 0.03, 0.10), "trim", 0.01) for x in feet]
    if "slide" in body:
        front, back, end = body["slide"]
        for x in (front, back):
            gap = [(x, z) for z in np.linspace(at(x, 2) + 0.10, 0.86 * at(x, 4), 24)]
            parts += strip(surface, gap, 0.018, "trim")
        rail = [(x, at(x, 3) + 0.02) for x in np.linspace(front, end, 24)]
        parts += strip(surface, rail, 0.03, "trim")
    return parts


def join(parts, smooth=False):
    """One object of many; smooth but for sharp edges."""
    import bpy
    with bpy.context.temp_override(active_object=parts[0], object=parts[0], selected_objects=parts,
                                   selected_editable_objects=parts):
        bpy.ops.object.join()
    mesh = parts[0].data
    if smooth:
        mesh.polygons.foreach_set("use_smooth", [True] * len(mesh.polygons))
        mesh.set_sharp_from_angle(angle=math.radians(35))
    return parts[0]


def mesh_hash(mesh):
    points = np.empty(3 * len(mesh.vertices), np.float32)
    mesh.vertices.foreach_get("co", points)
    corners = np.empty(len(mesh.loops), np.int32)
    mesh.loops.foreach_get("vertex_index", corners)
    return hashlib.sha256(np.round(points, 4).tobytes() + corners.tobytes()).hexdigest()


# ---------------------------------------------------------------- the user's cars

LENGTH, WIDTH, HEIGHT = 4.5, 2.3, 2.4  # metres; a mesh is scaled so that all of it is in frame


def load_car(path, paint_names):
    """A mesh file, scaled, on the ground, nose along +x -> ({"object", "paint"}, a line that reports it)."""
    import bpy
    known, parts = set(bpy.data.objects), []
    try:
        read_mesh(path)
    except (RuntimeError, OSError, ValueError, KeyError, AttributeError, TypeError, struct.error) as error:
        raise ValueError(f"{path}: Blender can't read it ({' '.join(str(error).split())[:120]}); repair the "
                         "file or take it out of --cars") from None
    new = [item for item in bpy.data.objects if item not in known]
    view = bpy.context.evaluated_depsgraph_get()
    for item in new:
        if item.type == "MESH" and not item.hide_render:
            mesh = bpy.data.meshes.new_from_object(item.evaluated_get(view))
            mesh.transform(item.matrix_world)
            parts.append(bpy.data.objects.new(path.stem, mesh))
            bpy.context.scene.collection.objects.link(parts[-1])
    for item in new:
        bpy.data.objects.remove(item)
    if not sum(len(item.data.polygons) for item in parts):
        raise ValueError(f"{path}: no faces in it; expected a car's mesh; take the file out of --cars")
    car = join(parts)
    stand(car.data, path)
    materials = [made for made in car.data.materials if made is not None]
    wanted = {plain(name) for name in (paint_names or "paint,body,carpaint").split(",")}
    paints = []
    for made in materials:
        words = {plain(made.name)} | (set() if paint_names else set(re.split(r"[\W_\d]+", plain(made.name))))
        paints += [made] if words & wanted else []
    names = [made.name for made in materials]
    if not paints:
        raise ValueError(f"{path}: none of its materials ({', '.join(names) or 'it has none'}) is called "
                         f"{' or '.join(sorted(wanted))}; name the one to recolour with --paint-material")
    recoloured = [made.name for made in paints]
    left = [name for name in names if name not in recoloured]
    line = (f"{path.name}: {len(car.data.polygons):,} faces; recoloured: {', '.join(recoloured)}; left: "
            f"{', '.join(left) or 'nothing'}")
    for made in materials:
        made.name = f"{path.stem} {made.name}"  # a name that is taken would be numbered in the next file
    return {"object": car, "paint": [recolour(made) for made in paints]}, line


def plain(name):
    """A material's name without the number that Blender appends where there are several of one name."""
    return re.sub(r"[._]\d{3}$", "", name.strip().casefold())


def read_mesh(path):
    import bpy
    kind, name = path.suffix.lower(), str(path.resolve())
    if kind in (".glb", ".gltf"):
        bpy.ops.import_scene.gltf(filepath=name)
    elif kind == ".obj":
        bpy.ops.wm.obj_import(filepath=name)
    elif kind == ".fbx":
        bpy.ops.import_scene.fbx(filepath=name)
    elif kind == ".blend":
        with bpy.data.libraries.load(name) as (there, wanted):
            wanted.objects = there.objects
        for item in wanted.objects:
            bpy.context.scene.collection.objects.link(item)
        bpy.context.view_layer.update()
    else:
        bpy.ops.wm.usd_import(filepath=name)


def stand(mesh, path):
    """Centre, turn and scale: the longer horizontal side along x; a nose at -y, as in glTF, goes to +x."""
    from mathutils import Matrix
    points = np.empty((len(mesh.vertices), 3), np.float32)
    mesh.vertices.foreach_get("co", points.ravel())
    used = np.unique([v for polygon in mesh.polygons for v in polygon.vertices])  # without stray vertices
    size = np.ptp(points[used], axis=0)
    if not np.isfinite(size).all() or size.max() == 0:
        raise ValueError(f"{path}: its faces have no extent; expected a car's mesh; take it out of --cars")
    turn = Matrix()
    if size[1] > size[0]:
        turn = Matrix.Rotation(math.pi / 2, 4, "Z")
        points = np.stack([-points[:, 1], points[:, 0], points[:, 2]], 1)
        size = size[[1, 0, 2]]
    low, high = points[used].min(0), points[used].max(0)
    scale = min(limit / side for limit, side in zip((LENGTH, WIDTH, HEIGHT), size) if side > 0)
    shift = Matrix.Translation((-(low[0] + high[0]) / 2, -(low[1] + high[1]) / 2, -low[2]))
    mesh.transform(Matrix.Scale(float(scale), 4) @ shift @ turn)


def recolour(made):
    """Put a Hue/Saturation/Value node before a material's colour: on its texture, or on Table 5's colour."""
    made.use_nodes = True
    tree = made.node_tree
    shader = next((node for node in tree.nodes if node.type == "BSDF_PRINCIPLED"), None)
    if shader is None:
        tree.nodes.clear()
        shader, output = map(tree.nodes.new, ("ShaderNodeBsdfPrincipled", "ShaderNodeOutputMaterial"))
        tree.links.new(shader.outputs[0], output.inputs["Surface"])
    colour = shader.inputs["Base Color"]
    node = add_hsv(tree, colour.links[0].from_socket if colour.links else None)
    tree.links.new(node.outputs[0], colour)
    return node


# ---------------------------------------------------------------- the command

def parse(argv):
    parser = argparse.ArgumentParser(prog="render_cars.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="the folder that is made or continued")
    add("--frames", type=parse_frames, default="0:300", metavar="FIRST:END", help="END is left out (0:300)")
    add("--seed", type=int, default=0, help="of every draw, 0 or more (0)")
    add("--properties", metavar="FILE.json", help="value lists in place of Table 5's, or fixed values: "
        '{"rotation_z": [0, 90], "sun_elevation": 45}')
    add("--bodies", type=int, metavar="N", help="instead of the six models N drawn ones, body000 …")
    add("--models", type=parse_models, metavar="NAME,…", help="or these: saloon,van,body060:body066")
    add("--body-seed", type=int, default=0, metavar="N", help="of the drawn bodies' shapes (0)")
    add("--depend", type=parse_depend, action="append", default=[], metavar="bg_color_hue=model:0.8",
        help="in this share of the frames the one follows from the other; may be repeated")
    add("--exposure", choices=["by-elevation", "fixed"], default="by-elevation",
        help="does the sky's strength make up for a low sun? (by-elevation)")
    add("--cars", type=Path, metavar="DIR", help=f"your own cars, a file a model ({' '.join(MESHES)})")
    add("--paint-material", metavar="NAME,…", help="those to recolour (paint, body or carpaint)")
    add("--masks", action="store_true", help="write masks/000000.png …: 255 where the car is, else 0")
    add("--dry-run", action="store_true", help="write props.csv and render.json alone; needs no Blender")
    add("--shard", type=parse_shard, metavar="I/N", help="render frames I, I + N, … of the range, side by "
        "side in one folder (torchrun's or a Slurm array's environment, else 0/1)")
    add("--size", type=int, default=256, metavar="PIXELS", help="width and height (256)")
    add("--samples", type=int, default=8, metavar="N", help="light paths a pixel (8; docs/render: why)")
    add("--denoise", action=argparse.BooleanOptionalAction, default=True, help="by OpenImageDenoise (yes)")
    add("--format", choices=["jpg", "png"], default="jpg", help="of the pictures (jpg)")
    add("--device", choices=["cpu", "cuda", "optix", "hip", "metal"], default="cpu", help="of Cycles (cpu)")
    add("--verbose", action="store_true", help="show Blender's log")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name, low, high in (("seed", 0, 2 ** 63), ("body_seed", 0, 2 ** 63), ("size", 16, 8192),
                            ("samples", 1, 65536), ("bodies", 1, MOST_BODIES)):
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            fail(f"--{name.replace('_', '-')} {value}: expected {low} to {high}")
    if sum(map(bool, (args.bodies, args.models, args.cars))) > 1:
        fail("--bodies, --models and --cars each say which models there are; give one of them")
    return args


def find_cars(folder):
    """{model: mesh file} of a folder."""
    files = sorted(folder.glob("[!.]*")) if folder.is_dir() else []
    files = [path for path in files if path.suffix.lower() in MESHES and path.is_file()]
    cars = {path.stem: path for path in files}
    if not files:
        raise ValueError(f"--cars {folder}: no car in it; expected a {', '.join(MESHES)} file for each model")
    if len(cars) < len(files):
        twice = next(path.stem for path in files if path not in cars.values())
        raise ValueError(f"--cars {folder}: several files are called {twice}; a model's name is its file's")
    return cars


def main():
    argv = sys.argv[sys.argv.index("--") + 1:] if "--" in sys.argv else sys.argv[1:]
    args = parse(argv)
    shard, cars, hashes = args.shard or my_share(), None, None
    if args.cars:
        cars = find_cars(args.cars)
        hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in cars.items()}
    models = args.models or list(cars or PROPERTIES["model"])
    if args.bodies:
        models = [f"body{j:03d}" for j in range(args.bodies)]
    properties = read_properties(args.properties, models)
    rules = dependence(properties, args.seed, args.depend)
    if args.worker:
        return work(args, cars, properties)
    settings = {"seed": args.seed, "properties": properties, "blender": None, "engine": "CYCLES",
                "device": args.device, "samples": args.samples, "denoise": args.denoise, "size": args.size,
                "format": args.format, "paint_material": args.paint_material or "", "meshes": hashes}
    if set(models) - {*BODIES, *(cars or ())}:
        settings["body_seed"] = args.body_seed
    if rules:
        settings["depend"] = rules
    if args.exposure != "by-elevation":
        settings["exposure"] = args.exposure
    rows = sample(properties, args.seed, args.frames, rules)
    if args.dry_run:
        write_set(args, settings, rows)
        return say(f"{args.out / 'props.csv'}: frames {args.frames.start} to {args.frames.stop - 1}")
    if "bpy" not in sys.modules and importlib.util.find_spec("bpy") is None:
        raise ValueError("rendering needs Blender: pip install 'bpy==4.5.*' 'numpy<2' in an environment of "
                         "Python 3.11; or in Blender 4.2 to 4.5: blender -b -P render_cars.py -- …; "
                         "--dry-run works without")
    renderer = Renderer(argv, args.verbose)
    try:
        about = renderer.about
        write_set(args, settings | {"blender": about["blender"], "meshes": hashes or about["meshes"]}, rows)
        for line in about["report"]:
            say(line)
        there = complete(args)
        missing = [row for row in rows[shard[0]::shard[1]] if row["frame"] not in there]
        renderer = render_all(renderer, missing, argv, args)
        if not missing:
            say("all frames are there already")
        sweep([args.out, *(args.out / folder for folder in folders_of(args))])
    finally:
        renderer.close()


def say(text):
    print("render_cars.py:", " ".join(str(text).split()), file=sys.stderr, flush=True)


def fail(message):
    say(message)
    sys.exit(2)


def stop(number, frame):
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        main()
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt as signalled:
        say("stopped; the same command continues")
        sys.exit(128 + (signalled.args or [signal.SIGINT])[0])
    except Exception as error:
        if os.environ.get("DML_TRACEBACK"):
            raise
        say(f"{type(error).__name__}: {error}: this is a fault of render_cars.py; DML_TRACEBACK=1 shows "
            "where")
        sys.exit(1)
