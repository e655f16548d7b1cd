"""Synthetic cars with eleven independent properties (Kobs et al., ICCV 2021, Table 5), every pixel's truth known.

    python render_cars.py --out cars --frames 0:300 --masks            # 300 frames; the same command continues
    python render_cars.py --out cars --frames 0:100000 --dry-run       # only props.csv and render.json
    python render_cars.py --out cars --frames 0:100000 --shard 2/8     # the third of eight processes or machines
    python render_cars.py --out mine --frames 0:300 --cars meshes      # one .glb .gltf .obj .fbx .usd or .blend a model
    blender -b -P render_cars.py -- --out cars --frames 0:300          # inside an installed Blender, 4.2 to 4.5

Reads: nothing, or the meshes of --cars and the value lists of --properties.
Writes: OUT/props.csv (one row a frame), OUT/render.json (seed, settings, Blender's version, hashes of the meshes),
OUT/images/000000.jpg … and, with --masks, OUT/masks/000000.png … (255 where the car is, else 0).

Frame i depends on the seed and i alone: any range of frames can be made anywhere, in any order.
"""
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
    "model": ["saloon", "coupe", "hatchback", "suv", "pickup", "van"],  # built by this script, or the files of --cars
    "rotation_z": TURNS, "color_hue": HUES, "color_sat": STEPS, "color_val": STEPS,
    "bg_color_hue": HUES, "bg_color_sat": STEPS, "bg_color_val": STEPS,
    "camera_loc_z": [0.5, 1.5, 2.5, 3.5], "sun_elevation": [0, 45, 90], "sun_rotation": TURNS}
LIMITS = {"color_sat": (0, 2), "color_val": (0, 2), "bg_color_sat": (0, 2), "bg_color_val": (0, 2),
          "camera_loc_z": (0.2, 8), "sun_elevation": (0, 90)}
MESHES = (".glb", ".gltf", ".obj", ".fbx", ".usd", ".usda", ".usdc", ".usdz", ".blend")
RECYCLE = 400  # frames a worker process renders before a fresh one takes over: Blender's memory grows slowly
MARK = "render_cars> "  # opens a worker's messages on its stdout, among what Blender prints


# ---------------------------------------------------------------- sampling: needs only NumPy

def sample(properties, seed, frames):
    """One dict a frame: every property's value, drawn independently and uniformly from (seed, frame) alone.

    A property's draw has its own place in the frame's stream: fixing or replacing one leaves the others' draws as
    they are.
    """
    rows = []
    for i in frames:
        u = np.random.default_rng([seed, i]).random(len(properties))
        rows.append({"frame": i} | {name: values[int(x * len(values))] for (name, values), x in zip(properties.items(), u)})
    return rows


def read_properties(path, models):
    """Table 5's lists with those of a JSON file put in their place; a single value holds a property fixed."""
    properties = PROPERTIES | {"model": models}
    if path is None:
        return properties
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise OSError(f"--properties {path}: can't be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); expected an object such as {{\"rotation_z\": [0, 90], \"sun_elevation\": 45}}")
    if not isinstance(given, dict):
        raise ValueError(f"{path}: a JSON {type(given).__name__}; expected an object such as {{\"rotation_z\": [0, 90]}}")
    for name, values in given.items():
        if name not in properties:
            raise ValueError(f"{path}: unknown property {name!r}; expected some of {', '.join(properties)}")
        properties[name] = check_values(path, name, values if isinstance(values, list) else [values], models)
    return properties


def check_values(path, name, values, models):
    if not values:
        raise ValueError(f"{path}: {name} has an empty list; give at least one value, or leave the property out")
    for value in values:
        if name == "model":
            if value not in models:
                raise ValueError(f"{path}: model {value!r} is not there; expected some of {', '.join(models)}")
            continue
        low, high = LIMITS.get(name, (-math.inf, math.inf))
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{path}: {name} has the value {json.dumps(value)}; expected finite numbers")
        if not low <= value <= high:
            raise ValueError(f"{path}: {name} has the value {value}; expected {low} to {high}")
    if len(set(values)) < len(values):
        raise ValueError(f"{path}: {name} lists a value twice; every value of a property is drawn equally often")
    return values


def parse_frames(text):
    match = re.fullmatch(r"(?:(-?\d+):)?(-?\d+)", text)
    start, stop = (int(match[1] or 0), int(match[2])) if match else (0, 0)
    if not match or start < 0 or stop <= start:
        raise argparse.ArgumentTypeError(f"{text!r}: expected FIRST:END with 0 <= FIRST < END, such as 0:300 (END is left out)")
    return range(start, stop)


def parse_shard(text):
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r}: expected I/N with I from 0 to N - 1, such as 0/4")
    return int(match[1]), int(match[2])


def my_share(environment=os.environ):
    """(i, n) of this process from torchrun's environment or a Slurm array's; (0, 1) without either."""
    there = {name: environment.get(name, "") for name in ("RANK", "WORLD_SIZE", *(f"SLURM_ARRAY_TASK_{end}" for end in ("ID", "MIN", "MAX", "STEP", "COUNT")))}
    if not there["RANK"] and not there["SLURM_ARRAY_TASK_ID"]:
        return 0, 1
    rank, world, task, first, last, step, count = (int(text) if text.isdecimal() else -1 for text in there.values())
    share = (rank, world) if there["RANK"] else ((task - first) // max(step, 1), count)
    gaps = not there["RANK"] and (last - first) // max(step, 1) + 1 != count  # --array=1,4,5 does not say which of the three this is
    if gaps or not 0 <= share[0] < share[1]:
        raise ValueError(f"{', '.join(f'{name}={text}' for name, text in there.items() if text)}: no part of the frames follows from that; give --shard I/N")
    return share


# ---------------------------------------------------------------- files: complete under their name, or not there

def save(path, content):
    """Write bytes so that the file is complete under its name, or not there at all."""
    partial = path.with_name(f".{path.name}.{os.urandom(4).hex()}.part")  # another process may write the same file
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None


def read_picture(path):
    """The bytes of a JPEG or PNG without what Blender writes into it (date, render time): equal pixels give equal bytes."""
    content = path.read_bytes() if path.exists() else b""
    if content[:2] == b"\xff\xd8" and content[-2:] == b"\xff\xd9":
        kept, at = [content[:2]], 2
        while content[at + 1] != 0xDA:  # start of scan: the picture itself follows, to the end
            end = at + 2 + struct.unpack(">H", content[at + 2:at + 4])[0]
            if not (0xE1 <= content[at + 1] <= 0xEF or content[at + 1] == 0xFE):  # APP1 … APP15, comment
                kept.append(content[at:end])
            at = end
        return b"".join(kept) + content[at:]
    if content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND":
        kept, at = [content[:8]], 8
        while at < len(content):
            end = at + 12 + struct.unpack(">I", content[at:at + 4])[0]
            if content[at + 4:at + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"tIME", b"eXIf"):
                kept.append(content[at:end])
            at = end
        return b"".join(kept)
    raise OSError(f"Blender wrote no complete picture into {path.parent}; is the disk full? TMPDIR chooses another place")


def table(rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def write_set(args, settings, rows):
    """props.csv and render.json of OUT, joined with those of frames that are there already; one process at a time."""
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        lock = open(args.out / ".lock", "w")
    except OSError as error:
        raise OSError(f"{args.out}: can't be written ({error.strerror}); choose another --out") from None
    with lock:
        with contextlib.suppress(ImportError, OSError):  # Windows, and file systems that know no locks: one process at a time by hand
            import fcntl
            fcntl.lockf(lock, fcntl.LOCK_EX)
        about, merged = args.out / "render.json", {}
        if about.exists():
            settings = settings | same_settings(about, settings)
        elif (args.out / "props.csv").exists():
            raise ValueError(f"{args.out}: has a props.csv but no render.json, so it was made by something else; choose another --out")
        for folder in ["images", "masks"][:0 if args.dry_run else 1 + args.masks]:
            (args.out / folder).mkdir(exist_ok=True)
        save(about, (json.dumps(settings) + "\n").encode())
        if (args.out / "props.csv").exists():
            with open(args.out / "props.csv", newline="", encoding="utf-8") as file:
                merged = {int(row["frame"]): row for row in csv.DictReader(file)}
        merged |= {row["frame"]: row for row in rows}
        save(args.out / "props.csv", table([merged[i] for i in sorted(merged)]))


def same_settings(path, settings):
    """What an existing set knows beyond these settings (a dry run knows no Blender); ValueError where they differ."""
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        for name in settings:
            old, new = there.get(name), settings[name]
            if old is not None and new is not None and old != new:
                if isinstance(old, dict) and isinstance(new, dict):
                    key = next(key for key in [*old, *new] if old.get(key) != new.get(key))
                    name, old, new = f"{name}: {key}", old.get(key), new.get(key)
                raise ValueError(f"{path.parent} was made with {name} {json.dumps(old)}, not {json.dumps(new)}; "
                                 "use that, or another --out")
    except (json.JSONDecodeError, AttributeError):
        raise ValueError(f"{path}: is not a render.json of this script; choose another --out") from None
    return {name: value for name, value in there.items() if settings.get(name) is None}


def complete(args):
    """Numbers of the frames that are there."""
    found = lambda folder, suffix: {int(name[:-len(suffix)]) for name in os.listdir(args.out / folder)
                                    if re.fullmatch(r"\d{6,}" + re.escape(suffix), name)}
    frames = found("images", f".{args.format}")
    return frames & found("masks", ".png") if args.masks else frames


# ---------------------------------------------------------------- the renderer: a process of its own, which Blender may fill

class Renderer:
    """A worker process that renders the frames it is told: python render_cars.py … --worker, or Blender's own."""

    def __init__(self, argv, verbose):
        blender = "bpy" in sys.modules and sys.modules["bpy"].app.binary_path
        command = [blender, "-b", "--factory-startup", "-P", __file__, "--"] if blender else [sys.executable, __file__]
        self.process = subprocess.Popen([*command, *argv, "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=None if verbose else subprocess.DEVNULL, text=True, errors="replace")
        self.about = self.answer()

    def answer(self):
        for line in self.process.stdout:
            if line.startswith(MARK):
                answer = json.loads(line[len(MARK):])
                if "error" in answer:
                    raise ValueError(answer["error"])
                return answer
        raise OSError(f"the renderer ended early (status {self.process.wait()}); complete frames are kept, --verbose shows its log")

    def render(self, row):
        try:
            self.process.stdin.write(json.dumps(row) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # answer() says what happened
        return self.answer()

    def close(self):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()  # the worker ends by itself, and removes its temporary folder
        self.process.wait()


def in_order(rows):
    """The rows, those of one worker by the sun's place: as long as it stays, the sky (a sixth of a frame) is not made again."""
    parts = [rows[k:k + RECYCLE] for k in range(0, len(rows), RECYCLE)]
    return [row for part in parts for row in sorted(part, key=lambda row: (row["sun_elevation"], row["sun_rotation"]))]


def render_all(renderer, rows, argv, args):
    """Render the rows, a fresh worker every RECYCLE frames; returns the last worker."""
    began = shown = time.monotonic()
    for done, row in enumerate(in_order(rows), 1):
        if done > 1 and (done - 1) % RECYCLE == 0:
            renderer.close()
            renderer = Renderer(argv, args.verbose)
        renderer.render(row)
        now = time.monotonic()
        if now - shown > (0.5 if sys.stderr.isatty() else 60) or done == len(rows):
            shown, rate = now, done / (now - began)
            left = time.strftime("%H:%M:%S", time.gmtime((len(rows) - done) / rate))
            line = f"{done:,}/{len(rows):,} frames, {60 * rate:.1f} frames a minute, {left} left"
            print(f"\r{line}  " if sys.stderr.isatty() else line, end="" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
    if sys.stderr.isatty() and rows:
        print(file=sys.stderr)
    return renderer


def work(args, cars, properties):
    """The worker: builds the scene once, then renders the rows that come on stdin, one JSON line each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the frame at hand is finished
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # from here on Blender's own lines go where stderr goes: nowhere, or to the terminal (--verbose)

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
    set_hsv(bpy.data.materials["backdrop"].node_tree.nodes["hsv"], row["bg_color_hue"], row["bg_color_sat"], row["bg_color_val"])
    place_camera(scene.camera, row["camera_loc_z"])
    set_sky(scene.world.node_tree.nodes, row["sun_elevation"], row["sun_rotation"])
    # The noise pattern is the frame's own too: one fixed pattern would be a feature that all frames share.
    scene.cycles.seed = int(np.random.default_rng([args.seed, row["frame"], 1]).integers(2 ** 31))
    picture = temporary / f"picture.{args.format}"
    scene.render.filepath = str(picture)
    mask = mask_file(scene, temporary)
    for path in (picture, mask):
        path.unlink(missing_ok=True)
    bpy.ops.render.render(write_still=True)
    if args.masks:
        save(args.out / "masks" / f"{row['frame']:06d}.png", read_picture(mask))
    save(args.out / "images" / f"{row['frame']:06d}.{args.format}", read_picture(picture))


# ---------------------------------------------------------------- the scene

# Strength of the sky for each elevation of the sun (degrees), so that a white ground is rendered just below white at
# noon and darker, not black, at dawn.
STRENGTH = ((0, 0.7), (5, 0.3), (15, 0.12), (45, 0.05), (90, 0.034))
CAMERA_DISTANCE, CAMERA_LENS, LOOK_AT = 10.0, 62.0, 0.62  # metres, mm (sensor 36 mm), metres


def build(args, cars, properties):
    """-> (scene, {model: {"object", "paint"}}, what the parent is told)."""
    import bpy
    if not (4, 2) <= bpy.app.version[:2] < (5, 0):
        raise ValueError(f"this is Blender {bpy.app.version_string}; expected 4.2 to 4.5 (5.0 has another compositor)")
    bpy.ops.wm.read_factory_settings(use_empty=True)
    scene = bpy.context.scene
    set_renderer(scene, args)
    build_backdrop(scene)
    scene.camera = bpy.data.objects.new("camera", bpy.data.cameras.new("camera"))
    scene.camera.data.lens = CAMERA_LENS
    scene.collection.objects.link(scene.camera)
    if args.masks:
        build_mask(scene)
    models, report, hashes = {}, [], {}
    for name in properties["model"]:
        if cars:
            models[name], line = load_car(cars[name], args.paint_material)
            report.append(line)
        else:
            models[name] = build_car(name)
            hashes[name] = mesh_hash(models[name]["object"].data)
    build_sky(scene)  # after the cars: a USD file's dome light becomes the world's light
    for car in models.values():
        car["object"].pass_index = 1
    return scene, models, {"blender": bpy.app.version_string, "meshes": hashes, "report": report}


def set_renderer(scene, args):
    scene.render.engine = "CYCLES"
    choose_device(scene, args.device)
    scene.render.resolution_x = scene.render.resolution_y = args.size
    scene.render.resolution_percentage = 100
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
    scene.view_settings.view_transform = "Khronos PBR Neutral"  # keeps hue and saturation, rolls highlights off


def choose_device(scene, device):
    """Cycles' compute device; ValueError with those that are there when it is not."""
    import bpy
    if device == "cpu":
        scene.cycles.device = "CPU"
        return
    preferences = bpy.context.preferences.addons["cycles"].preferences
    there = {"cpu"}
    for kind in ("CUDA", "OPTIX", "HIP", "METAL"):
        try:
            there |= {kind.lower() for item in preferences.get_devices_for_type(kind) if item.type == kind}
        except ValueError:
            pass  # this build of Blender does not know the kind
    if device not in there:
        raise ValueError(f"--device {device}: not there; this machine and this Blender have {', '.join(sorted(there))}")
    preferences.compute_device_type = device.upper()
    for item in preferences.get_devices_for_type(device.upper()):
        item.use = item.type != "CPU"
    scene.cycles.device = "GPU"


def build_sky(scene):
    import bpy
    scene.world = bpy.data.worlds.new("world")
    scene.world.use_nodes = True
    tree = scene.world.node_tree
    tree.nodes.clear()
    sky = tree.nodes.new("ShaderNodeTexSky")
    sky.name = "sky"
    sky.sky_type = "NISHITA"
    sky.sun_size = math.radians(3)  # the real 0.5 degrees would make hard shadows
    sky.sun_intensity = 0.6
    background = tree.nodes.new("ShaderNodeBackground")
    background.name = "background"
    output = tree.nodes.new("ShaderNodeOutputWorld")
    tree.links.new(sky.outputs[0], background.inputs["Color"])
    tree.links.new(background.outputs[0], output.inputs["Surface"])
    scene.world.cycles.sampling_method = "MANUAL"
    scene.world.cycles.sample_map_resolution = 256


def set_sky(nodes, elevation, rotation):
    """Place the sun, in degrees. Setting a value, even to what it is, makes Cycles compute the sky again."""
    for item, name, value in ((nodes["sky"], "sun_elevation", math.radians(elevation)), (nodes["sky"], "sun_rotation", math.radians(rotation)),
                              (nodes["background"].inputs["Strength"], "default_value", float(np.interp(elevation, *zip(*STRENGTH))))):
        if getattr(item, name) != np.float32(value):
            setattr(item, name, value)


def build_backdrop(scene):
    """A ground, and round it a wall that only the camera sees: no horizon cuts the car, no light is kept away."""
    import bpy
    paint = material("backdrop", (0.5, 0.25, 0.25), roughness=1.0)
    tree = paint.node_tree
    shader = tree.nodes.new("ShaderNodeBsdfDiffuse")
    tree.links.new(add_hsv(tree, None).outputs[0], shader.inputs["Color"])
    up = tree.nodes.new("ShaderNodeCombineXYZ")
    up.inputs[2].default_value = 1.0  # the wall is shaded as if it were ground: no edge between the two
    tree.links.new(up.outputs[0], shader.inputs["Normal"])
    tree.links.new(shader.outputs[0], tree.nodes["Material Output"].inputs["Surface"])
    n, radii = 96, np.array([11, 12, 13, 14, 15, 16, 17, 18, 19, 90])
    heights = np.where(radii < 19, (radii - 11) ** 2 / 16 * 0.5, 2.0 + (radii - 19) * 0.5)  # slope 0, then up to 1 in 2
    angles = np.linspace(0, 2 * math.pi, n, endpoint=False)
    ring = lambda r, z: [(r * math.cos(a), r * math.sin(a), z) for a in angles]
    add_object("ground", ring(300, 0), [tuple(range(n))], paint)
    wall = add_object("wall", [point for r, z in zip(radii, heights) for point in ring(r, z + 0.001)],
                      [(k * n + i, k * n + (i + 1) % n, (k + 1) * n + (i + 1) % n, (k + 1) * n + i) for k in range(len(radii) - 1) for i in range(n)], paint)
    wall.visible_shadow = wall.visible_diffuse = wall.visible_glossy = wall.visible_transmission = False


def build_mask(scene):
    """The compositor writes the object index (1: the car) beside the picture: no second rendering."""
    import bpy
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


def mask_file(scene, temporary):
    if scene.use_nodes:
        scene.node_tree.nodes["mask"].base_path = str(temporary)
    return temporary / "mask0001.png"


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
    for key, value in {"Base Color": (*color, 1.0), "Roughness": roughness, "Metallic": metallic, "Coat Weight": coat,
                       "Emission Color": (*color, 1.0), "Emission Strength": emission}.items():
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

# A body is a row of cross-sections from nose to tail, in metres: x, half width, bottom, belt line, top, half width at
# the top, bow (how far the middle lies in front of the sides), and what lies between it and the next one: h sheet metal,
# l lamps, w windscreen, s side window, p pillar, r rear window.
BODIES = {
    "saloon": dict(wheels=(1.42, -1.38), radius=0.335, spokes=10, doors=(0.92, -0.32, -1.12), rows="""
        2.34 .74 .26 .60 .66 .60 .18 l | 2.12 .84 .20 .66 .73 .66 .16 h | 1.50 .895 .18 .76 .85 .72 .12 h | 1.02 .90 .18 .83 .93 .77 .12 w
        .28 .90 .18 .87 1.37 .60 .10 s | -.28 .90 .18 .89 1.44 .62 .0 p | -.37 .90 .18 .89 1.44 .62 .0 s | -1.05 .90 .18 .91 1.40 .60 -.06 r
        -1.66 .895 .19 .94 1.02 .73 -.12 h | -2.12 .86 .22 .93 1.01 .71 -.13 l | -2.34 .78 .30 .88 .97 .67 -.13 -"""),
    "coupe": dict(wheels=(1.30, -1.28), radius=0.345, spokes=5, doors=(0.66, -0.55), spoiler=True, rows="""
        2.20 .72 .22 .46 .52 .58 .22 l | 1.98 .86 .15 .55 .60 .66 .20 h | 1.38 .93 .13 .70 .74 .76 .14 h | .72 .91 .13 .73 .82 .76 .14 w
        -.10 .90 .13 .77 1.20 .54 .10 s | -.50 .91 .13 .79 1.23 .54 .0 p | -.58 .91 .13 .79 1.23 .54 .0 r | -1.10 .95 .13 .83 1.08 .52 -.06 r
        -1.62 .95 .16 .84 .92 .64 -.10 h | -1.95 .92 .20 .83 .90 .70 -.12 l | -2.12 .82 .30 .79 .88 .68 -.12 -"""),
    "hatchback": dict(wheels=(1.22, -1.18), radius=0.31, spokes=8, doors=(0.92, -0.22), rows="""
        1.94 .72 .26 .64 .72 .60 .18 l | 1.74 .83 .20 .70 .80 .66 .16 h | 1.36 .86 .18 .80 .92 .71 .12 h | 1.02 .865 .18 .86 1.00 .75 .12 w
        .42 .865 .18 .89 1.44 .60 .10 s | -.18 .865 .18 .92 1.53 .62 .0 p | -.26 .865 .18 .92 1.53 .62 .0 s | -.98 .865 .18 .96 1.52 .60 -.04 p
        -1.18 .865 .19 .97 1.50 .60 -.04 h | -1.52 .86 .20 .98 1.44 .59 -.06 r | -1.80 .84 .22 .98 1.06 .68 -.10 l | -1.94 .77 .30 .84 .94 .68 -.10 -"""),
    "suv": dict(wheels=(1.42, -1.40), radius=0.395, spokes=6, doors=(0.98, -0.24, -1.06), cladding=True, rails=True, rows="""
        2.26 .80 .42 .84 .94 .70 .12 l | 2.08 .90 .34 .90 1.02 .76 .10 h | 1.50 .95 .32 .98 1.10 .82 .08 h | 1.10 .95 .32 1.03 1.14 .84 .08 w
        .52 .95 .32 1.05 1.70 .70 .08 s | -.20 .95 .32 1.06 1.76 .72 .0 p | -.29 .95 .32 1.06 1.76 .72 .0 s | -1.12 .95 .32 1.08 1.76 .71 -.0 p
        -1.24 .95 .32 1.08 1.76 .71 .0 s | -1.86 .94 .33 1.10 1.73 .69 -.05 r | -2.12 .92 .36 1.08 1.18 .80 -.06 l | -2.26 .86 .44 .90 1.00 .78 -.06 -"""),
    "pickup": dict(wheels=(1.58, -1.48), radius=0.40, spokes=6, doors=(1.14, 0.12, -0.52), cladding=True, bed=(-0.83, -2.28), rows="""
        2.50 .82 .46 .84 .96 .74 .08 l | 2.36 .90 .36 .90 1.05 .80 .07 h | 1.62 .94 .34 .98 1.12 .84 .06 h | 1.22 .94 .34 1.02 1.16 .84 .06 w
        .66 .94 .34 1.05 1.70 .69 .08 s | .16 .94 .34 1.06 1.77 .71 .0 p | .08 .94 .34 1.06 1.77 .71 .0 s | -.46 .94 .34 1.06 1.74 .69 .0 r
        -.68 .94 .34 1.06 1.16 .86 .0 h | -.84 .94 .34 1.06 1.14 .90 .0 h | -2.30 .94 .38 1.06 1.14 .90 .0 l | -2.42 .92 .42 1.05 1.13 .88 .0 -"""),
    "van": dict(wheels=(1.52, -1.42), radius=0.34, spokes=0, doors=(1.24, 0.32), slide=(0.22, -1.02), rows="""
        2.36 .82 .30 .76 .86 .70 .14 l | 2.22 .92 .24 .86 .98 .78 .14 h | 1.86 .97 .22 .98 1.12 .84 .12 h | 1.60 .975 .22 1.06 1.22 .86 .12 w
        .88 .98 .22 1.12 1.90 .76 .10 s | .36 .98 .22 1.13 2.00 .78 .0 h | .10 .98 .22 1.13 2.02 .80 .0 h | -1.20 .98 .22 1.13 2.03 .80 .0 h
        -2.05 .98 .24 1.13 2.02 .79 .0 h | -2.22 .97 .26 1.13 2.00 .78 .0 l | -2.34 .93 .32 1.10 1.94 .76 .0 -"""),
}
FRACTIONS = (1.0, 0.84, 0.45, 0.0, -0.45, -0.84, -1.0)  # columns of the cage, right side to left


def palette():
    import bpy
    return [bpy.data.materials.get(name) or material(name, **look) for name, look in PALETTE.items()]


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
    index, vertices = {}, []
    for i in range(n):
        for level in range(5):
            for column in range(7):
                if level in (0, 4) or column in (0, 6) or i in (0, n - 1):
                    index[i, level, column] = len(vertices)
                    vertices.append(cage_point(rows[i], level, FRACTIONS[column]))
    faces, slots = [], []

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
            for column, (a, b) in ((0, (i, i + 1)), (6, (i + 1, i))):
                face([(a, level, column), (b, level, column), (b, level + 1, column), (a, level + 1, column)], side)
        for column in range(6):
            top = "glass" if kind in "wr" and 0 < column < 5 else "paint"
            face([(i, 4, column), (i + 1, 4, column), (i + 1, 4, column + 1), (i, 4, column + 1)], top)
            face([(i, 0, column + 1), (i + 1, 0, column + 1), (i + 1, 0, column), (i, 0, column)], "trim")
    for i, front in ((0, True), (n - 1, False)):
        for level in range(4):
            for column in range(6):
                edge = column in (0, 5)
                slot = "trim" if level == 0 else "paint"
                if level == 2:
                    slot = ("lamp" if front else "tail") if edge else "trim" if front else "paint"
                corners = [(i, level, column), (i, level + 1, column), (i, level + 1, column + 1), (i, level, column + 1)]
                face(corners if front else corners[::-1], slot)
    return vertices, faces, slots


def sections(body):
    """A body's table -> its cross-sections (x, half width, …), and what lies between each and the next."""
    rows = [row.split() for row in body["rows"].replace("\n", "|").split("|") if row.strip()]
    return [[float(number) for number in row[:7]] for row in rows], [row[7] for row in rows[:-1]]


def build_body(name, body):
    """The body: the cage subdivided, wheel arches (and a bed) cut out."""
    import bpy
    vertices, faces, slots = cage(*sections(body))
    made = add_object(name, vertices, faces, *palette())
    made.data.polygons.foreach_set("material_index", slots)
    face_outwards(made.data)
    crease(made.data)
    subdivide = made.modifiers.new("subdivide", "SUBSURF")
    subdivide.levels = subdivide.render_levels = 3
    cutters = [cylinder((x, side * 0.92, body["radius"]), body["radius"] + 0.055, 0.62) for x in body["wheels"] for side in (-1, 1)]
    if "bed" in body:
        front, back = body["bed"]
        cutters.append(box(((front + back) / 2, 0, 1.15), (front - back, 1.5, 0.9), "trim", bevel=0.04))
    for cutter in cutters:
        cut = made.modifiers.new("cut", "BOOLEAN")
        cut.operation, cut.solver, cut.object = "DIFFERENCE", "EXACT", cutter
    mesh = bpy.data.meshes.new_from_object(made.evaluated_get(bpy.context.evaluated_depsgraph_get()))
    for cutter in cutters:
        bpy.data.objects.remove(cutter)
    made.modifiers.clear()
    made.data = mesh
    return made


def face_outwards(mesh):
    import bmesh
    shape = bmesh.new()
    shape.from_mesh(mesh)
    bmesh.ops.recalc_face_normals(shape, faces=shape.faces[:])
    shape.to_mesh(mesh)
    shape.free()


def crease(mesh):
    """Sharpen the cage's edges between materials, at the sill and at the belt line; the rest is rounded."""
    touching = {}
    for polygon in mesh.polygons:
        for key in polygon.edge_keys:
            touching.setdefault(key, []).append(polygon)
    values = []
    for edge in mesh.edges:
        a, b = touching[tuple(sorted(edge.vertices))]
        glass = (a.material_index == SLOT["glass"]) != (b.material_index == SLOT["glass"])
        values.append(0.75 if glass else 0.55 if a.material_index != b.material_index else 0.75 if a.normal.dot(b.normal) < 0.3 else 0.25)
    mesh.attributes.new("crease_edge", "FLOAT", "EDGE").data.foreach_set("value", values)


def cylinder(centre, radius, width, slot="trim", n=64):
    """A closed cylinder across the car."""
    x, y, z = centre
    ring = lambda side: [(x + radius * math.cos(a), y + side * width / 2, z + radius * math.sin(a))
                         for a in np.linspace(0, 2 * math.pi, n, endpoint=False)]
    faces = [(i, (i + 1) % n, n + (i + 1) % n, n + i) for i in range(n)]
    return part(ring(-1) + ring(1), [*faces, tuple(range(n))[::-1], tuple(range(n, 2 * n))], slot)


def box(centre, size, slot, bevel=0.0, turn=0.0):
    """A box with rounded edges; turn in radians about the axis across the car."""
    import bmesh
    corners = [[(sign - 0.5) * side for side, sign in zip(size, signs)] for signs in np.ndindex(2, 2, 2)]
    turned = [(x * math.cos(turn) + z * math.sin(turn), y, z * math.cos(turn) - x * math.sin(turn)) for x, y, z in corners]
    faces = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]
    made = part([[a + b for a, b in zip(centre, corner)] for corner in turned], faces, slot)
    if bevel:
        shape = bmesh.new()
        shape.from_mesh(made.data)
        bmesh.ops.bevel(shape, geom=shape.edges[:], offset=bevel, segments=3, affect="EDGES", profile=0.5)
        shape.to_mesh(made.data)
        shape.free()
        made.data.polygons.foreach_set("material_index", [SLOT[slot]] * len(made.data.polygons))
    return made


def part(vertices, faces, slot):
    made = add_object("part", vertices, faces, *palette())
    made.data.polygons.foreach_set("material_index", [SLOT[slot]] * len(faces))
    face_outwards(made.data)
    return made


def lathe(profile, centre, side, slot, n=48):
    """A profile of (radius, outwards) turned about a wheel's axis; side is 1 or −1."""
    x, y, z = centre
    vertices = [(x + r * math.cos(a), y + side * out, z + r * math.sin(a))
                for r, out in profile for a in np.linspace(0, 2 * math.pi, n, endpoint=False)]
    faces = [(k * n + i, k * n + (i + 1) % n, (k + 1) * n + (i + 1) % n, (k + 1) * n + i)
             for k in range(len(profile) - 1) for i in range(n)]
    return part(vertices, [f[::side] for f in faces], slot)


def wheel(x, side, track, radius, spokes):
    """Tyre, rim, spokes (0: a steel wheel) and brake disc of one wheel; track: where the tyre's outer side lies."""
    width, rim = 0.21, 0.70 * radius
    centre = (x, side * (track - width / 2), radius)
    tyre = [(rim, -.5), (0.86 * radius, -.52), (0.97 * radius, -.44), (radius, -.3), (radius, .3), (0.97 * radius, .44), (0.86 * radius, .52), (rim, .5)]
    parts = [lathe([(r, out * width) for r, out in tyre], centre, side, "rubber"),
             lathe([(rim * 1.01, .50 * width), (rim * 0.95, .53 * width), (rim * 0.90, .46 * width), (rim * 0.90, -.45 * width)], centre, side, "rim"),
             lathe([(0.66 * rim, .12 * width), (0.02, .12 * width)], centre, side, "steel"),
             lathe([(rim * 0.9, -.1 * width), (0.01, -.1 * width)], centre, side, "trim"),
             lathe([(0.2 * rim, .36 * width), (0.17 * rim, .46 * width), (0.005, .47 * width)], centre, side, "rim")]
    if spokes == 0:
        parts.append(lathe([(0.9 * rim, .34 * width), (0.72 * rim, .30 * width), (0.45 * rim, .42 * width), (0.005, .42 * width)], centre, side, "rim"))
    for spoke in range(spokes):
        angle, across = 2 * math.pi * (spoke + 0.25) / spokes, min(0.16, 0.62 / spokes) * rim / 0.235
        direction = np.array([math.cos(angle), math.sin(angle)])
        inner, outer = direction * 0.1 * rim, direction * 0.93 * rim
        normal = np.array([-math.sin(angle), math.cos(angle)]) * across / 2
        front = [inner + normal, inner - normal, outer - 0.75 * normal, outer + 0.75 * normal]
        vertices = [(x + p[0], centre[1] + side * out * width, radius + p[1]) for out in (.40, .22) for p in front]
        parts.append(part(vertices, [(0, 1, 2, 3)[::side], (7, 6, 5, 4)[::side], *[(i, i + 4, (i + 1) % 4 + 4, (i + 1) % 4)[::side] for i in range(4)]], "rim"))
    return parts


def strip(surface, path, width, slot, lift=0.004):
    """A ribbon laid on both sides of the body along a path of (x, z): door gaps, cladding."""
    path = np.array(path, float)
    along = np.gradient(path, axis=0)
    normal = np.stack([-along[:, 1], along[:, 0]], 1) / np.linalg.norm(along, axis=1, keepdims=True) * width / 2
    parts = []
    for side in (1, -1):
        edges = [[surface((x, 3.0 * side, z), (0, -side, 0)) for x, z in path + sign * normal] for sign in (1, -1)]
        whole = [i for i in range(len(path)) if edges[0][i] is not None and edges[1][i] is not None]
        vertices = [(p[i][0], p[i][1] + side * lift, p[i][2]) for p in edges for i in whole]
        n = len(whole)
        faces = [(k, k + 1, n + k + 1, n + k) for k in range(n - 1) if whole[k + 1] == whole[k] + 1]
        parts.append(part(vertices, faces, slot))
    return parts


def build_car(name):
    """-> {"object": one mesh, "paint": its Hue/Saturation/Value nodes}."""
    from mathutils.bvhtree import BVHTree
    body = BODIES[name]
    made = build_body(name, body)
    tree = BVHTree.FromPolygons([v.co for v in made.data.vertices], [p.vertices for p in made.data.polygons])
    surface = lambda origin, direction: tree.ray_cast(origin, direction)[0]
    rows, kinds = sections(body)
    at = lambda x, column: float(np.interp(-x, [-row[0] for row in rows], [row[column] for row in rows]))
    radius, parts = body["radius"], [made]
    for x in body["wheels"]:
        for side in (-1, 1):
            parts += wheel(x, side, at(x, 1) - 0.015, radius, body["spokes"])
        arch = [(x + (radius + 0.085) * math.cos(a), radius + (radius + 0.085) * math.sin(a)) for a in np.linspace(-0.35, math.pi + 0.35, 60)]
        parts += strip(surface, arch, 0.06, "trim" if "cladding" in body else "paint", 0.012)
    if "cladding" in body:
        low = at(0, 2) + 0.10
        parts += strip(surface, [(x, low) for x in np.linspace(body["wheels"][0] - radius - .1, body["wheels"][1] + radius + .1, 30)], 0.13, "trim", 0.012)
    for x in body["doors"]:
        parts += strip(surface, [(x, z) for z in np.linspace(at(x, 2) + 0.10, at(x, 3) - 0.005, 16)], 0.018, "trim")
    for x in body["doors"][1:]:
        for side in (1, -1):
            y = surface((x + 0.16, 3 * side, at(x, 3) - 0.10), (0, -side, 0))
            parts.append(box((x + 0.16, y[1] + side * 0.012, y[2]), (0.16, 0.04, 0.028), "trim", 0.008))
    parts += details(body, surface, at, rows, kinds)
    return {"object": join(parts), "paint": [paint_node()]}


def details(body, surface, at, rows, kinds):
    """Mirrors, number plates, spoiler, roof rails, the van's sliding door."""
    parts = []
    x = rows[kinds.index("w")][0] - 0.30  # behind the foot of the windscreen
    z = at(x, 3) + 0.06
    for side in (1, -1):
        y = surface((x, 3 * side, z - 0.03), (0, -side, 0))[1]
        parts.append(box((x, y + side * 0.04, z), (0.06, 0.16, 0.04), "trim", 0.012))
        parts.append(box((x, y + side * 0.17, z + 0.04), (0.11, 0.19, 0.13), "paint", 0.035))
    for direction, z in ((-1, at(rows[0][0], 2) + 0.13), (1, 0.5 * at(rows[-1][0], 2) + 0.5 * at(rows[-1][0], 3))):
        hit = surface((-4 * direction, 0, z), (direction, 0, 0))
        parts.append(box((hit[0] - direction * 0.004, 0, z), (0.02, 0.50, 0.11), "plate", 0.004))
    if "spoiler" in body:
        top = surface((-1.86, 0.5, 3), (0, 0, -1))[2]
        parts.append(box((-1.92, 0, top + 0.13), (0.26, 1.5, 0.03), "paint", 0.012, turn=-0.1))
        parts += [box((-1.88, y, top + 0.05), (0.16, 0.04, 0.18), "paint", 0.012) for y in (-0.52, 0.52)]
    if "rails" in body:
        for y in (-0.56, 0.56):
            top = surface((-0.7, y, 3), (0, 0, -1))[2]
            parts.append(box((-0.70, y, top + 0.055), (1.9, 0.035, 0.03), "rim", 0.01))
            parts += [box((x, y, top + 0.01), (0.10, 0.03, 0.10), "trim", 0.01) for x in (0.2, -0.7, -1.58)]
    for x in body.get("slide", ()):
        parts += strip(surface, [(x, z) for z in np.linspace(at(x, 2) + 0.10, 0.86 * at(x, 4), 24)], 0.018, "trim")
    if "slide" in body:
        parts += strip(surface, [(x, at(x, 3) + 0.02) for x in np.linspace(body["slide"][0], -2.05, 24)], 0.03, "trim")
    return parts


def paint_node():
    """The Hue/Saturation/Value node of the paint that all built-in cars share."""
    import bpy
    tree = bpy.data.materials["paint"].node_tree
    if "hsv" not in tree.nodes:
        tree.links.new(add_hsv(tree, None).outputs[0], tree.nodes["Principled BSDF"].inputs["Base Color"])
    return tree.nodes["hsv"]


def join(parts):
    """One object of many, smooth but for sharp edges."""
    import bpy
    with bpy.context.temp_override(active_object=parts[0], object=parts[0], selected_objects=parts, selected_editable_objects=parts):
        bpy.ops.object.join()
    mesh = parts[0].data
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

LENGTH, WIDTH, HEIGHT = 4.5, 2.3, 2.4  # metres; a mesh is scaled to the length, or less, so that all of it is in frame


def load_car(path, paint_names):
    """A mesh file -> ({"object", "paint"}, a line that reports it): scaled, set on the ground, nose along +x."""
    import bpy
    known = set(bpy.data.objects)
    try:
        read_mesh(path)
    except (RuntimeError, OSError, ValueError, KeyError, AttributeError, TypeError, struct.error) as error:
        raise ValueError(f"{path}: Blender can't read it ({' '.join(str(error).split())[:120]}); repair the file or take it out of --cars") from None
    new = [item for item in bpy.data.objects if item not in known]
    view = bpy.context.evaluated_depsgraph_get()
    parts = []
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
    with bpy.context.temp_override(active_object=parts[0], object=parts[0], selected_objects=parts, selected_editable_objects=parts):
        bpy.ops.object.join()
    car = parts[0]
    stand(car.data, path)
    materials = [made for made in car.data.materials if made is not None]
    plain = lambda name: re.sub(r"[._]\d{3}$", "", name.strip().casefold())  # Blender numbers materials of one name
    wanted = {plain(name) for name in (paint_names or "paint,body,carpaint").split(",")}
    words = lambda name: {plain(name)} | (set() if paint_names else set(re.split(r"[\W_\d]+", plain(name))))
    paints = [made for made in materials if words(made.name) & wanted]
    if not paints:
        raise ValueError(f"{path}: none of its materials ({', '.join(made.name for made in materials) or 'it has none'}) is called "
                         f"{' or '.join(sorted(wanted))}; name the one to recolour with --paint-material")
    line = (f"{path.name}: {len(car.data.polygons):,} faces; recoloured: {', '.join(made.name for made in paints)}; left: "
            f"{', '.join(made.name for made in materials if made not in paints) or 'nothing'}")
    for made in materials:
        made.name = f"{path.stem} {made.name}"  # the next file's materials of these names are not numbered then
    return {"object": car, "paint": [recolour(made) for made in paints]}, line


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
    """Centre, turn (the longer horizontal side along x; a nose at -y, where glTF's and Blender's look, goes to +x), scale."""
    points = np.empty((len(mesh.vertices), 3), np.float32)
    mesh.vertices.foreach_get("co", points.ravel())
    used = np.unique([v for polygon in mesh.polygons for v in polygon.vertices])  # stray vertices do not count
    size = np.ptp(points[used], axis=0)
    if not np.isfinite(size).all() or size.max() == 0:
        raise ValueError(f"{path}: its faces have no extent; expected a car's mesh; take the file out of --cars")
    turn = size[1] > size[0]
    if turn:
        points = np.stack([-points[:, 1], points[:, 0], points[:, 2]], 1)
        size = size[[1, 0, 2]]
    low, high = points[used].min(0), points[used].max(0)
    scale = min(limit / side for limit, side in zip((LENGTH, WIDTH, HEIGHT), size) if side > 0)
    from mathutils import Matrix
    shift = Matrix.Translation((-(low[0] + high[0]) / 2, -(low[1] + high[1]) / 2, -low[2]))
    mesh.transform(Matrix.Scale(float(scale), 4) @ shift @ (Matrix.Rotation(math.pi / 2, 4, "Z") if turn else Matrix()))


def recolour(made):
    """Put a Hue/Saturation/Value node before a material's base colour: on its texture, or on Table 5's base colour."""
    made.use_nodes = True
    tree = made.node_tree
    shader = next((node for node in tree.nodes if node.type == "BSDF_PRINCIPLED"), None)
    if shader is None:
        tree.nodes.clear()
        shader, output = tree.nodes.new("ShaderNodeBsdfPrincipled"), tree.nodes.new("ShaderNodeOutputMaterial")
        tree.links.new(shader.outputs[0], output.inputs["Surface"])
    colour = shader.inputs["Base Color"]
    node = add_hsv(tree, colour.links[0].from_socket if colour.links else None)
    tree.links.new(node.outputs[0], colour)
    return node


# ---------------------------------------------------------------- the command

def parse(argv):
    parser = argparse.ArgumentParser(prog="render_cars.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message} (--help explains)")
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="the folder that is made or continued")
    add("--frames", type=parse_frames, default="0:300", metavar="FIRST:END", help="frames, END left out (0:300)")
    add("--seed", type=int, default=0, help="of every draw, 0 or more (0)")
    add("--properties", metavar="FILE.json", help='value lists in place of Table 5\'s, or fixed values: {"rotation_z": [0, 90], "sun_elevation": 45}')
    add("--cars", type=Path, metavar="DIR", help=f"your own cars, one model a file ({' '.join(MESHES)}); in place of the built-in ones")
    add("--paint-material", metavar="NAME,…", help="materials that are recoloured (those named paint, body or carpaint)")
    add("--masks", action="store_true", help="write masks/000000.png …: 255 where the car is, else 0")
    add("--dry-run", action="store_true", help="write props.csv and render.json, render nothing; needs no Blender")
    add("--shard", type=parse_shard, metavar="I/N", help="render frames I, I + N, … of the range, side by side in one folder (torchrun's or a Slurm array's environment, else 0/1)")
    add("--size", type=int, default=256, metavar="PIXELS", help="width and height (256)")
    add("--samples", type=int, default=8, metavar="N", help="light paths a pixel (8; README: why)")
    add("--denoise", action=argparse.BooleanOptionalAction, default=True, help="clean the picture with OpenImageDenoise (yes)")
    add("--format", choices=["jpg", "png"], default="jpg", help="of the pictures (jpg)")
    add("--device", choices=["cpu", "cuda", "optix", "hip", "metal"], default="cpu", help="what Cycles renders on (cpu)")
    add("--verbose", action="store_true", help="show Blender's log")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name, low, high in (("seed", 0, 2 ** 63), ("size", 16, 8192), ("samples", 1, 65536)):
        if not low <= getattr(args, name) <= high:
            parser.error(f"--{name} {getattr(args, name)}: expected {low} to {high}")
    if args.shard is None:
        args.shard = my_share()
    return args


def find_cars(folder):
    """{model: mesh file} of a folder, and {model: sha256}."""
    if not folder.is_dir():
        raise ValueError(f"--cars {folder}: no such folder; expected one with a {', '.join(MESHES[:-1])} or .blend file for each model")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in MESHES and path.is_file() and not path.name.startswith("."))
    if not files:
        raise ValueError(f"--cars {folder}: no car in it; expected {', '.join(MESHES[:-1])} or .blend files, one for each model")
    twice = {path.stem for path in files if sum(path.stem == other.stem for other in files) > 1}
    if twice:
        raise ValueError(f"--cars {folder}: several files are called {sorted(twice)[0]}; a model's name is its file's")
    return {path.stem: path for path in files}, {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def need_blender():
    if "bpy" not in sys.modules and importlib.util.find_spec("bpy") is None:
        raise ValueError("rendering needs Blender: pip install 'bpy==4.5.*' 'numpy<2' in an environment of Python 3.11, or, with "
                         "Blender 4.2 to 4.5 installed, blender -b -P render_cars.py -- …; --dry-run works without")


def main():
    argv = sys.argv[sys.argv.index("--") + 1:] if "--" in sys.argv else sys.argv[1:]
    args = parse(argv)
    cars, hashes = find_cars(args.cars) if args.cars else (None, None)
    properties = read_properties(args.properties, list(cars or PROPERTIES["model"]))
    if args.worker:
        return work(args, cars, properties)
    settings = {"seed": args.seed, "properties": properties, "blender": None, "engine": "CYCLES", "device": args.device,
                "samples": args.samples, "denoise": args.denoise, "size": args.size, "format": args.format,
                "paint_material": args.paint_material or "", "meshes": hashes}
    rows = sample(properties, args.seed, args.frames)
    if args.dry_run:
        write_set(args, settings, rows)
        return print(f"render_cars.py: {args.out / 'props.csv'}: frames {args.frames.start} to {args.frames.stop - 1}", file=sys.stderr)
    need_blender()
    renderer = Renderer(argv, args.verbose)
    try:
        write_set(args, settings | {"blender": renderer.about["blender"], "meshes": hashes or renderer.about["meshes"]}, rows)
        for line in renderer.about["report"]:
            print(f"render_cars.py: {line}", file=sys.stderr)
        there = complete(args)
        missing = [row for row in rows[args.shard[0]::args.shard[1]] if row["frame"] not in there]
        renderer = render_all(renderer, missing, argv, args)
        if not missing:
            print("render_cars.py: all frames are there already", file=sys.stderr)
    finally:
        renderer.close()


def fail(message):
    print("render_cars.py:", " ".join(str(message).split()), file=sys.stderr)
    sys.stderr.flush()
    sys.exit(2)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        print("render_cars.py: stopped; the same command continues", file=sys.stderr)
        sys.exit(130)
