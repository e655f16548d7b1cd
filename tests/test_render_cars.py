"""render_cars.py: sampling, files and bad input need no Blender; small pictures are rendered where bpy is."""
import importlib.util
import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from conftest import one_line, python, read_rows, start, write_json
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import render_cars
from render_cars import PROPERTIES, RECYCLE, sample

SCRIPT = str(Path(render_cars.__file__))
HERE = importlib.util.find_spec("bpy") is not None
TINY = ("--size", "64", "--samples", "2")
FIXED = {"model": "saloon", "rotation_z": 45, "color_hue": 0.0, "color_sat": 2.0, "color_val": 1.5,
         "bg_color_hue": 0.6, "bg_color_sat": 1.0, "bg_color_val": 1.0, "camera_loc_z": 1.5,
         "sun_elevation": 45, "sun_rotation": 90}


@pytest.fixture
def render(run_script):
    """render(folder, option, …) -> CompletedProcess."""
    return lambda folder, *options: run_script("render_cars.py", "--out", folder, *options)


@pytest.fixture(scope="session")
def blender():
    if not HERE:
        pytest.skip("needs Blender's module bpy (extra render, Python 3.11)")


@pytest.fixture
def draw(blender, render):
    """draw(folder, option, …) -> what is said while small pictures are rendered, without a fault."""
    def draw(folder, *options):
        done = render(folder, *TINY, *options)
        assert done.returncode == 0, done.stderr
        return done.stderr

    return draw


@pytest.fixture
def refuses(refused, monkeypatch, tmp_path):
    """refuses(option, …) -> why render_cars.py does not begin with them."""
    def main(argv):
        monkeypatch.setattr(sys, "argv", ["render_cars.py", *argv])
        render_cars.main()

    monkeypatch.chdir(tmp_path)
    return partial(refused, main, "--out", "set", "--dry-run")


# ---------------------------------------------------------------- sampling

@pytest.fixture(scope="module")
def draws():
    """Table 5's values as indices, (11, 100,000)."""
    rows = sample(PROPERTIES, 0, range(100_000))
    return {name: np.array([values.index(row[name]) for row in rows]) for name, values in PROPERTIES.items()}


def deviation(counts, expected, freedom):
    """Pearson's chi-square in standard deviations from its mean."""
    return (((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom)


def test_every_value_is_equally_frequent_and_every_pair_independent(draws):
    assert [len(values) for values in PROPERTIES.values()] == [6, 8, 10, 9, 9, 10, 9, 9, 4, 3, 8]  # Table 5
    for name, values in PROPERTIES.items():
        counts = np.bincount(draws[name], minlength=len(values))
        assert abs(deviation(counts, 100_000 / len(values), len(values) - 1)) < 5, name
    for a, b in combinations(PROPERTIES, 2):
        i, j = len(PROPERTIES[a]), len(PROPERTIES[b])
        counts = np.bincount(draws[a] * j + draws[b], minlength=i * j).reshape(i, j)
        expected = counts.sum(1, keepdims=True) * counts.sum(0) / counts.sum()
        assert abs(deviation(counts, expected, (i - 1) * (j - 1))) < 5, (a, b)


def test_a_frame_depends_on_seed_and_number_alone():
    rows = sample(PROPERTIES, 3, range(100))
    assert sample(PROPERTIES, 3, range(40, 60)) == rows[40:60]
    assert sample(PROPERTIES, 3, [7, 99, 0]) == [rows[7], rows[99], rows[0]]
    assert sample(PROPERTIES, 4, range(100)) != rows
    held = sample(PROPERTIES | {"color_sat": [1.0]}, 3, range(100))  # the other properties stay what they are
    assert [row | {"color_sat": 1.0} for row in rows] == held


def test_frames_are_rendered_sun_by_sun():
    rows = sample(PROPERTIES, 0, range(1000))
    order = render_cars.in_order(rows)
    for k in range(0, 1000, RECYCLE):  # a worker's frames stay together: a stop leaves no odd sample
        part = order[k:k + RECYCLE]
        sun = [(row["sun_elevation"], row["sun_rotation"]) for row in part]
        assert sorted(row["frame"] for row in part) == list(range(1000))[k:k + RECYCLE]
        assert sum(a != b for a, b in zip(sun, sun[1:])) == len(set(sun)) - 1


def array(*numbers):
    names = ("ID", "MIN", "MAX", "STEP", "COUNT")
    return {f"SLURM_ARRAY_TASK_{name}": str(number) for name, number in zip(names, numbers)}


@pytest.mark.parametrize("environment, share", [
    ({}, (0, 1)), ({"RANK": "2", "WORLD_SIZE": "8"}, (2, 8)), (array(14, 10, 16, 2, 4), (2, 4)),
    (array(3, 3, 3, 1, 1), (0, 1)),  # the last one: a task run again alone
    ({"RANK": "2", "WORLD_SIZE": "2"}, None), ({"RANK": "x", "WORLD_SIZE": "2"}, None), ({"RANK": "0"}, None),
    (array(1), None), (array(4, 1, 5, 1, 3), None)])
def test_share_of_torchrun_and_slurm(environment, share):
    if share:
        assert render_cars.my_share(environment) == share
    else:
        with pytest.raises(ValueError, match="--shard I/N"):
            render_cars.my_share(environment)


# ---------------------------------------------------------------- drawn bodies, and dependence on purpose

BODIES = [f"body{j:03d}" for j in range(66)]


def test_drawn_bodies_differ_and_depend_on_seed_and_number_alone():
    bodies = render_cars.draw_bodies(0, BODIES)
    some = render_cars.draw_bodies(0, ["van", "body003"])
    assert list(bodies) == BODIES and some == {name: bodies[name] for name in BODIES[:4]}
    assert render_cars.draw_bodies(1, BODIES[:1]) != {"body000": bodies["body000"]}
    outlines = [render_cars.outline(body) for body in bodies.values()]
    common = [(a & b).sum() / (a | b).sum() for a, b in combinations(outlines, 2)]
    assert max(common) < render_cars.OVERLAP == 0.92 and np.mean(common) < 0.75
    for body in bodies.values():
        rows, kinds = render_cars.sections(body)
        x = [row[0] for row in rows]
        assert x == sorted(x, reverse=True) and min(np.diff(x[::-1])) > 0.03, body  # from nose to tail
        assert all(bottom < belt <= top for _, _, bottom, belt, top, _, _ in rows) and kinds.count("w") == 1
        assert 3.5 <= x[0] - x[-1] <= 5.1 and x[0] > body["wheels"][0] > 0 > body["wheels"][1] > x[-1]


def depending(*wanted, seed=0, models=BODIES[:60], frames=20_000):
    properties = PROPERTIES | {"model": models}
    rules = render_cars.dependence(properties, seed, wanted)
    return rules, sample(properties, seed, range(frames), rules), sample(properties, seed, range(frames))


def test_dependence_follows_its_share_and_leaves_all_else():
    rules, rows, free = depending(("bg_color_hue", "model", 0.8))
    rule = rules["bg_color_hue"]
    follows = dict(zip(BODIES, rule["values"]))
    for part in (slice(60), slice(50), slice(50, 60)):  # as often in the first fifty and in the last ten
        counts = [rule["values"][part].count(hue) for hue in PROPERTIES["bg_color_hue"]]
        assert len(set(counts)) == 1
    changed = np.mean([row["bg_color_hue"] == follows[row["model"]] for row in rows])
    assert changed == pytest.approx(0.8 + 0.2 / 10, abs=0.01)
    assert [row | {"bg_color_hue": 0} for row in rows] == [row | {"bg_color_hue": 0} for row in free]
    left = [row["bg_color_hue"] == other["bg_color_hue"] for row, other in zip(rows, free)]
    assert np.mean(left) == pytest.approx(0.2 + 0.8 / 10, abs=0.01)  # the others keep what was drawn
    assert depending(("bg_color_hue", "model", 0.8), frames=30)[1] == rows[:30]
    assert depending(("bg_color_hue", "model", 0.8), seed=1)[0] != rules
    assert depending(("bg_color_hue", "model", 0))[1] == free
    whole = depending(("bg_color_hue", "model", 1), frames=1000)[1]
    assert all(row["bg_color_hue"] == follows[row["model"]] for row in whole)


@pytest.mark.parametrize("models, name", [(BODIES[:25], "bg_color_hue"), (BODIES[:6], "sun_elevation"),
                                          (BODIES[:4], "bg_color_sat")])
def test_margin_where_the_numbers_do_not_divide(models, name):
    rules, rows, _ = depending((name, "model", 0.7), models=models)
    counts = [rules[name]["values"].count(value) for value in PROPERTIES[name]]
    assert max(counts) - min(counts) <= 1 and sum(counts) == len(models)
    seen = np.array([sum(row[name] == value for row in rows) for value in PROPERTIES[name]])
    assert sum(rules[name]["margin"]) == pytest.approx(1)
    assert abs(deviation(seen, 20_000 * np.array(rules[name]["margin"]), len(seen) - 1)) < 5


def test_models_and_dependence_through_the_command(render, tmp_path):
    options = ["--frames", "0:40", "--dry-run", "--models", "saloon,van,body060:body063", "--body-seed", "4",
               "--depend", "bg_color_hue=model:0.5", "--depend", "sun_elevation=camera_loc_z:1"]
    assert render(tmp_path / "set", *options).returncode == 0
    rows = read_rows(tmp_path / "set/props.csv")
    about = json.loads((tmp_path / "set/render.json").read_text())
    names = ["saloon", "van", "body060", "body061", "body062"]
    assert about["properties"]["model"] == names and about["body_seed"] == 4
    assert {row["model"] for row in rows} == set(names)
    wanted = [("bg_color_hue", "model", 0.5), ("sun_elevation", "camera_loc_z", 1.0)]
    rules = render_cars.dependence(PROPERTIES | {"model": names}, 0, wanted)
    assert about["depend"] == rules
    assert len({(row["sun_elevation"], row["camera_loc_z"]) for row in rows}) == 4
    one_line(render(tmp_path / "set", *options[:-2]), "depend: sun_elevation")
    one_line(render(tmp_path / "set", *options[:5], *options[7:]), "body_seed 4, not 0")
    plain = ["--frames", "0:40", "--dry-run"]
    assert render(tmp_path / "six", *plain).returncode == 0
    assert not {"body_seed", "depend"} & set(json.loads((tmp_path / "six/render.json").read_text()))
    one_line(render(tmp_path / "six", *plain, "--depend", "bg_color_hue=model:0.5"), "made with depend null")
    assert render(tmp_path / "four", *plain, "--bodies", "4").returncode == 0
    assert {row["model"] for row in read_rows(tmp_path / "four" / "props.csv")} == set(BODIES[:4])


# ---------------------------------------------------------------- the command line, without Blender

def test_dry_run(render, run_script, tmp_path):
    done = render(tmp_path / "set", "--frames", "0:30", "--seed", 5, "--dry-run")
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "set/props.csv")
    assert list(rows[0]) == ["frame", *PROPERTIES]
    for row, drawn in zip(rows, sample(PROPERTIES, 5, range(30)), strict=True):
        assert row == {name: str(value) for name, value in drawn.items()}
    assert json.loads((tmp_path / "set/render.json").read_text())["seed"] == 5
    assert sorted(path.name for path in (tmp_path / "set").glob("[!.]*")) == ["props.csv", "render.json"]
    done = render("x", "--help")
    assert done.returncode == 0 and "blender -b -P render_cars.py -- " in done.stdout
    inside = ["-b", "-P", "render_cars.py", "--", "--out", tmp_path / "in", "--frames", "0:2", "--dry-run"]
    done = run_script("render_cars.py", *inside)  # what stands before -- is Blender's
    assert done.returncode == 0 and len(read_rows(tmp_path / "in/props.csv")) == 2


def test_ranges_join_and_shards_agree(render, tmp_path):
    for frames in ("20:30", "0:10", "5:25"):
        assert render(tmp_path / "parts", "--frames", frames, "--dry-run").returncode == 0
    for shard in ("0/3", "2/3"):
        assert render(tmp_path / "whole", "--frames", "0:30", "--shard", shard, "--dry-run").returncode == 0
    assert (tmp_path / "parts/props.csv").read_bytes() == (tmp_path / "whole/props.csv").read_bytes()


def test_processes_that_start_together(tmp_path):
    command = ("render_cars.py", "--out", tmp_path, "--dry-run", "--frames")
    processes = [start(*command, f"{k}000:{k + 1}000", stderr=None) for k in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert [row["frame"] for row in read_rows(tmp_path / "props.csv")] == [str(i) for i in range(4000)]
    assert not list(tmp_path.glob(".*.part"))


def test_properties_file(render, tmp_path):
    given = {"model": ["van", "suv"], "rotation_z": [0, 30.5], "sun_elevation": 45}
    given = write_json(tmp_path / "p.json", given)
    assert render(tmp_path / "set", "--frames", "0:40", "--properties", given, "--dry-run").returncode == 0
    rows = read_rows(tmp_path / "set/props.csv")
    seen = [{row[name] for row in rows} for name in ("model", "rotation_z", "sun_elevation")]
    assert seen == [{"van", "suv"}, {"0", "30.5"}, {"45"}]


@pytest.mark.parametrize("content, word", [
    ("{", "not JSON"), ("[1]", "list"), ('{"colour": [1]}', "colour"), ('{"rotation_z": []}', "empty"),
    ('{"rotation_z": ["a"]}', '"a"'), ('{"color_val": [true]}', "true"), ('{"color_val": [3]}', "0 to 2"),
    ('{"color_val": [NaN]}', "NaN"), ('{"model": ["tank"]}', "tank"), ('{"model": [["van"]]}', "van"),
    ('{"rotation_z": {"a": 1}}', "finite"), ('{"rotation_z": [0, 0.0]}', "twice"),
    ('{"sun_elevation": -5}', "0 to 90"), ("[" * 10**5, "not JSON"), (None, "a device or a pipe")])
def test_bad_properties(refuses, content, word):
    Path("p.json").write_text(content) if content else os.mkfifo("p.json")
    why = refuses("--properties", "p.json")
    assert "p.json" in why and word in why


@pytest.mark.parametrize("arguments, word", [
    ("--frames=5:3", "5:3"), ("--frames=-2:3", "-2:3"), ("--frames=x", "'x'"), ("--frames=3:3", "3:3"),
    ("--shard=2/2", "2/2"), ("--seed=-1", "-1"), ("--size=0", "--size 0"), ("--samples=0", "--samples 0"),
    ("--device=tpu", "tpu"), ("--cars=nowhere", "no car in it"), ("--properties=none.json", "none.json"),
    ("--cars=.", "several files are called a"),
    ("--bodies=0", "--bodies 0: expected 1 to 300"), ("--bodies=301", "301"), ("--body-seed=-1", "-1"),
    ("--models=tank", "'tank': expected saloon"), ("--models=body300", "body300"), ("--models=", "''"),
    ("--models=body005:body005", "body005:body005"), ("--models=van,van", "twice"),
    ("--models=van --bodies=2", "give one"), ("--models=van --cars=.", "give one"),
    ("--depend=hue=model:0.5", "color_hue"), ("--depend=model=model:0.5", "model=model"),
    ("--depend=color_hue=model:1.5", "0 to 1"), ("--depend=color_hue=model:-1", "0 to 1"),
    ("--depend=color_hue=model", "0 to 1"),
    ("--depend=color_hue=model:0.5 --depend=color_hue=color_sat:0.5", "depends once"),
    ("--depend=color_hue=model:0.5 --depend=color_sat=color_hue:0.5", "doesn't depend")])
def test_bad_arguments(refuses, arguments, word):
    for name in ("a.obj", "a.glb"):
        Path(name).write_bytes(b"x")
    assert word in refuses(*arguments.split())


def test_an_existing_set_made_otherwise(render, tmp_path):
    command = (tmp_path / "set", "--frames", "0:5", "--dry-run")
    assert render(*command).returncode == 0
    before, about = (tmp_path / "set/props.csv").read_bytes(), (tmp_path / "set/render.json").read_bytes()
    given = write_json(tmp_path / "p.json", {"sun_elevation": 90})
    one_line(render(*command, "--seed", 1), "seed 0, not 1")
    one_line(render(*command, "--size", 128), "size 256, not 128")
    one_line(render(*command, "--exposure", "fixed"), 'exposure null, not "fixed"')
    one_line(render(*command, "--properties", given), "properties: sun_elevation [0, 45, 90], not [90]")
    assert (tmp_path / "set/props.csv").read_bytes() == before
    (tmp_path / "set/render.json").write_text("[]")
    one_line(render(*command), "render.json")
    props, good = tmp_path / "set/props.csv", (tmp_path / "set/props.csv").read_text()
    for content in (good.replace(",", "\t"), good.replace("frame", "x"), "frame\n" + "1" * 200_000 + "\n"):
        props.write_text(content)
        (tmp_path / "set/render.json").write_bytes(about)
        one_line(render(*command), "is not a table of this script")
        assert props.read_text() == content
    (tmp_path / "set/render.json").unlink()
    one_line(render(*command), "no render.json")


def test_output_not_writable(render, tmp_path):
    (tmp_path / "file").write_text("")
    one_line(render(tmp_path / "file" / "set", "--dry-run"), "can't be written", "--out")


@pytest.mark.skipif(HERE, reason="bpy is here")
def test_without_blender_both_ways_are_named(render, tmp_path):
    one_line(render(tmp_path / "set"), "pip install", "blender -b -P render_cars.py")
    assert not (tmp_path / "set").exists()


# ---------------------------------------------------------------- files

@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_metadata_goes_pixels_stay(tmp_path, kind):
    picture, info = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)), PngInfo()
    info.add_text("RenderTime", "00:03")
    noted = {"JPEG": {"comment": b"rendered in 3 s"}, "PNG": {"pnginfo": info}}[kind]
    for name, more in (("plain", {}), ("noted", noted)):
        picture.save(tmp_path / name, kind, **more)
    assert (tmp_path / "plain").read_bytes() != (tmp_path / "noted").read_bytes()
    assert render_cars.read_picture(tmp_path / "plain") == render_cars.read_picture(tmp_path / "noted")
    same = Image.open(io.BytesIO(render_cars.read_picture(tmp_path / "noted")))
    assert (np.array(same) == np.array(Image.open(tmp_path / "noted"))).all()
    (tmp_path / "cut").write_bytes((tmp_path / "plain").read_bytes()[:-5])
    for name in ("cut", "absent"):
        with pytest.raises(OSError, match="no complete picture"):
            render_cars.read_picture(tmp_path / name)


def test_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(render_cars.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        render_cars.save(tmp_path / "000000.jpg", b"picture")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- rendering

def picture(folder, i, kind="images", suffix="jpg"):
    return np.asarray(Image.open(folder / kind / f"{i:06d}.{suffix}")).astype(float)


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.*g"))}


@pytest.fixture(scope="module")
def rendered(blender, tmp_path_factory):
    """(folder, options): 24 frames of all six bodies and every other property's extremes."""
    folder = tmp_path_factory.mktemp("cars")
    extremes = {name: [values[0], values[-1]] for name, values in PROPERTIES.items() if name != "model"}
    given = write_json(folder / "p.json", extremes | {"rotation_z": [0, 45, 90]})
    options = ["--seed", "6", "--masks", "--properties", str(given), *TINY]
    command = [sys.executable, SCRIPT, "--out", str(folder / "set"), "--frames", "0:24", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "24/24 frames, " in done.stderr and " frames a minute" in done.stderr
    assert "Saved" not in done.stdout + done.stderr
    return folder / "set", options


def car_in_frame(folder, i):
    """Its mask, of 64 × 64 pixels, which does not touch the picture's edge."""
    mask = picture(folder, i, "masks", "png")
    edge = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    assert mask.shape == (64, 64) and 0.04 < (mask > 0).mean() < 0.5 and not edge.any(), i
    return mask


def test_every_car_is_in_frame_and_settings_are_beside(rendered):
    folder, _ = rendered
    rows = read_rows(folder / "props.csv")
    for name in PROPERTIES:
        assert len({row[name] for row in rows}) == {"model": 6, "rotation_z": 3}.get(name, 2)
    for i in range(24):
        assert set(np.unique(car_in_frame(folder, i))) == {0, 255} and picture(folder, i).shape == (64, 64, 3)
    about = json.loads((folder / "render.json").read_text())
    assert (about["seed"], about["samples"], about["size"], about["engine"]) == (6, 2, 64, "CYCLES")
    assert about["blender"] and sorted(about["meshes"]) == sorted(PROPERTIES["model"])


def test_drawn_bodies_are_in_frame_and_have_paint(draw, tmp_path):
    fixed = {name: value for name, value in FIXED.items() if name != "model"} | {"rotation_z": [0, 45, 90]}
    given = write_json(tmp_path / "p.json", fixed)
    draw(tmp_path / "set", "--frames", "0:16", "--masks", "--properties", given, "--models",
         "saloon,body000:body005")
    about = json.loads((tmp_path / "set/render.json").read_text())
    assert len(set(about["meshes"].values())) == 6
    for i in range(16):
        mask = car_in_frame(tmp_path / "set", i)
        red, green, _ = picture(tmp_path / "set", i)[mask > 0].mean(0)
        assert red > 1.2 * green


def test_shards_in_another_order_give_the_same_bytes(rendered, draw, tmp_path):
    folder, options = rendered
    for frames, shard in ("12:16", "1/2"), ("8:12", "0/2"):
        draw(tmp_path / "set", "--frames", frames, "--shard", shard, *options)
    some = files(tmp_path / "set")
    assert len(some) == 8 and all(files(folder)[name] == content for name, content in some.items())


def two_frames(draw, folder, **free):
    """How much two frames that differ in one property alone differ inside the car's mask, and outside."""
    folder.mkdir()
    given = write_json(folder / "p.json", FIXED | free)
    folder = folder / "set"
    draw(folder, "--frames", "0:6", "--masks", "--properties", given, "--samples", 16)
    name = next(iter(free))
    first = read_rows(folder / "props.csv")[0][name]
    other = next(int(row["frame"]) for row in read_rows(folder / "props.csv") if row[name] != first)
    inside = picture(folder, 0, "masks", "png") > 0
    assert (inside == (picture(folder, other, "masks", "png") > 0)).mean() > 0.98
    change = np.abs(picture(folder, 0) - picture(folder, other)).mean(2)
    near = np.array(Image.fromarray(inside).resize((16, 16))).repeat(4, 0).repeat(4, 1)  # and the outline
    return change[inside].mean(), change[~inside & ~near].mean()


def test_paint_changes_the_car_and_background_the_rest(draw, tmp_path):
    inside, outside = two_frames(draw, tmp_path / "paint", color_hue=[0.0, 0.4])
    assert inside > 15 and outside < 0.25 * inside
    inside, outside = two_frames(draw, tmp_path / "ground", bg_color_val=[0.5, 2.0])
    assert outside > 15 and inside < 0.5 * outside


def test_fixed_exposure_makes_the_dawn_dark(draw, tmp_path):
    given, light = write_json(tmp_path / "p.json", FIXED | {"sun_elevation": 0, "model": "van"}), {}
    for exposure in ("by-elevation", "fixed"):
        draw(tmp_path / exposure, "--frames", "0:1", "--properties", given, "--exposure", exposure)
        light[exposure] = picture(tmp_path / exposure, 0).mean()
    assert light["fixed"] < 0.5 * light["by-elevation"]


def test_kill_and_run_again(rendered, draw, tmp_path):
    folder, options = rendered
    command = (tmp_path / "set", "--frames", "0:9", *options)
    images, began = tmp_path / "set/images", time.monotonic()
    process = start("render_cars.py", "--out", *command, stderr=subprocess.DEVNULL)
    while len(list(images.glob("0*.jpg"))) < 3 and time.monotonic() - began < 120:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = len(list(images.glob("0*.jpg")))
    assert 3 <= there < 9
    (images / ".000000.jpg.deadbeef.part").write_bytes(b"half")
    left = int(draw(*command).split("/")[0])  # the orphaned worker may have finished the frame at hand
    assert 9 - there - 1 <= left <= 9 - there
    again = files(tmp_path / "set")
    assert len(again) == 18 and all(files(folder)[name] == content for name, content in again.items())
    before = {path: path.stat().st_mtime_ns for path in images.iterdir()}
    assert "all frames are there already" in draw(*command)
    assert not list((tmp_path / "set").rglob(".*"))
    assert before == {path: path.stat().st_mtime_ns for path in images.iterdir()}


BOX = [(x, y, z) for x in (-1, 1) for y in (-3, 3) for z in (0, 1)]
BOX_FACES = [(0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3)]


def write_obj(path, paint="CarPaint"):
    """A box in two materials: its paint and black."""
    path.with_suffix(".mtl").write_text(f"newmtl {paint}\nKd 0.5 0.5 0.5\nnewmtl black\nKd 0 0 0\n")
    faces = ["f " + " ".join(str(i + 1) for i in face) for face in BOX_FACES]
    lines = [f"mtllib {path.with_suffix('.mtl').name}", *(f"v {x} {z} {-y}" for x, y, z in BOX)]
    path.write_text("\n".join([*lines, f"usemtl {paint}", *faces[:4], "usemtl black", *faces[4:]]) + "\n")


def write_glb(path, paint="body"):
    """The same box as binary glTF, y up, in one material."""
    points = np.array([(x, z, -y) for x, y, z in BOX], "<f4")
    corners = np.array([(f[0], f[i], f[i + 1]) for f in BOX_FACES for i in (1, 2)], "<u2")
    mesh = {"attributes": {"POSITION": 0}, "indices": 1, "material": 0}
    content = {"asset": {"version": "2.0"}, "scene": 0, "scenes": [{"nodes": [0]}], "nodes": [{"mesh": 0}],
               "materials": [{"name": paint}], "meshes": [{"primitives": [mesh]}],
               "buffers": [{"byteLength": 168}],
               "bufferViews": [{"buffer": 0, "byteOffset": 0, "byteLength": 96},
                               {"buffer": 0, "byteOffset": 96, "byteLength": 72}],
               "accessors": [{"bufferView": 0, "componentType": 5126, "count": 8, "type": "VEC3",
                              "min": points.min(0).tolist(), "max": points.max(0).tolist()},
                             {"bufferView": 1, "componentType": 5123, "count": 36, "type": "SCALAR"}]}
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 4)
    binary = points.tobytes() + corners.tobytes()
    chunks = struct.pack("<I4s", len(text), b"JSON") + text
    chunks += struct.pack("<I4s", len(binary), b"BIN\0") + binary
    path.write_bytes(struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks)


def test_a_users_cars(draw, tmp_path):
    cars, folder = tmp_path / "cars", tmp_path / "set"
    cars.mkdir()
    write_obj(cars / "first.obj")
    write_glb(cars / "second.glb")
    fixed = {name: value for name, value in FIXED.items() if name != "model"}
    given = write_json(tmp_path / "p.json", fixed | {"rotation_z": 0})
    said = draw(folder, "--frames", "0:8", "--masks", "--cars", cars, "--properties", given)
    assert "first.obj: 6 faces; recoloured: CarPaint; left: black" in said
    assert "second.glb: 12 faces; recoloured: body; left: nothing" in said
    assert {row["model"] for row in read_rows(folder / "props.csv")} == {"first", "second"}
    masks = [picture(folder, i, "masks", "png") > 0 for i in range(8)]
    # a box 6 long and 2 wide becomes 4.5 long, 1.5 wide, 0.75 high, and shows its long side at rotation 0
    wide, high = np.ptp(np.nonzero(masks[0])[1]), np.ptp(np.nonzero(masks[0])[0])
    assert 45 < wide < 62 and high < wide / 3 and all((mask == masks[0]).mean() > 0.98 for mask in masks)
    red = picture(folder, 0)[masks[0]].mean(0)
    assert red[0] > 1.5 * red[1]
    assert sorted(json.loads((folder / "render.json").read_text())["meshes"]) == ["first", "second"]


@pytest.mark.parametrize("name, content, words", [
    ("bad.glb", "not a mesh", []), ("bad.blend", "not a mesh", []), ("empty.obj", "v 0 0 0\n", ["no faces"]),
    ("grey.obj", None, ["grey, black", "--paint-material"])])
def test_bad_meshes(blender, render, tmp_path, name, content, words):
    (tmp_path / "cars").mkdir()
    if content:
        (tmp_path / "cars" / name).write_text(content)
    else:
        write_obj(tmp_path / "cars" / name, paint="grey")
    one_line(render(tmp_path / "set", "--frames", "0:2", "--cars", tmp_path / "cars", *TINY), name, *words)
    assert not (tmp_path / "set").exists()


@pytest.mark.skipif(sys.platform == "darwin", reason="Metal may be here")
def test_a_device_that_is_not_there(blender, render, tmp_path):
    one_line(render(tmp_path / "set", "--frames", "0:1", "--device", "metal", *TINY), "--device metal", "cpu")
    assert not (tmp_path / "set").exists()


def test_sigterm_and_faults_end_in_one_line(tmp_path):
    code = ("import runpy, sys, os, signal, numpy\n"
            "def broken(*seed): {}\n"
            "numpy.random.default_rng = broken\n"
            "sys.argv = ['render_cars.py', '--dry-run', '--frames', '0:3', '--out', {!r}]\n"
            "runpy.run_path('render_cars.py', run_name='__main__')")
    for what, status, text in (("os.kill(os.getpid(), signal.SIGTERM)", 143, "stopped; the same command"),
                               ("raise KeyError('x')", 1, "KeyError: 'x': this is a fault of")):
        done = python(code.format(what, str(tmp_path / "set")))
        assert done.returncode == status and done.stderr.count("\n") == 1 and text in done.stderr, done.stderr
