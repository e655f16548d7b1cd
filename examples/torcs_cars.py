"""The free cars of Debian's package torcs-data as meshes for render_cars.py --cars.

    apt-get download torcs-data && dpkg-deb -x torcs-data_*.deb torcs      # 333 MB
    python examples/torcs_cars.py torcs/usr/share/games/torcs/cars meshes p406 car1-stock1 car1-ow1 baja-bug
    python render_cars.py --out mine --frames 0:300 --masks --cars meshes

Reads: CAR/CAR.acc (AC3D text with triangle strips), its texture CAR.rgb, wheels and ride height from CAR.xml.
Writes: MESHES/CAR.obj with .mtl and .png; the material with the car's texture, called paint, is recoloured.
The cars carry licences of their own (Free Art License or GPL; each CAR/readme.txt): name their authors.
"""
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image


def read_ac3d(path):
    """-> one (texture, vertices, texture coordinates, triangles) an object; AC3D's y is up, as OBJ's."""
    lines = iter(path.read_text(errors="replace").splitlines())
    texture, objects = None, []
    for line in lines:
        key, _, rest = line.partition(" ")
        if key == "OBJECT":
            texture = None
        elif key == "texture" and texture is None:  # further ones are shadows and skid marks
            texture = rest.split()[0].strip('"')
        elif key == "numvert":
            vertices = [tuple(map(float, next(lines).split()[:3])) for _ in range(int(rest))]
            objects.append((texture, vertices, {}, []))
        elif key == "refs":
            corners = [next(lines).split()[:3] for _ in range(int(rest))]
            index = [int(corner[0]) for corner in corners]
            objects[-1][2].update({i: corner[1:] for i, corner in zip(index, corners)})
            # a strip: each corner makes a triangle with the two before it, turned every second time
            strip = [index[k:k + 3][::1 if k % 2 == 0 else -1] for k in range(len(index) - 2)]
            objects[-1][3].extend(t for t in strip if len(set(t)) == 3)
    return objects


def wheels(xml):
    """Centre, radius and width of the four wheels, over a ground that lies the ride height under the body."""
    def value(section, name):
        return float(re.search(rf'name="{section}".*?name="{name}"[^>]*val="([-.\d]+)"', xml, re.S)[1])

    for axle in ("Front", "Rear"):
        for wheel in (f"{axle} Right Wheel", f"{axle} Left Wheel"):
            width = value(wheel, "tire width") / 1000
            tyre = width * value(wheel, "tire height-width ratio")
            radius = value(wheel, "rim diameter") * 0.0127 + tyre
            height = radius - value(wheel, "ride height") / 1000
            yield (value(f"{axle} Axle", "xpos"), height, -value(wheel, "ypos")), radius, width


def corners(first, numbers):
    """"1/1 2/2 …": vertices of an OBJ face, counted from 1, with their texture coordinates."""
    return "f " + " ".join(f"{first + i + 1}/{first + i + 1}" for i in numbers)


def convert(folder, out):
    name = folder.name
    lines, count = [f"mtllib {name}.mtl"], 0
    for texture, vertices, coordinates, triangles in read_ac3d(folder / f"{name}.acc"):
        lines += [f"v {x} {y} {z}" for x, y, z in vertices]
        lines += ["vt " + " ".join(coordinates.get(i, ("0", "0"))) for i in range(len(vertices))]
        lines.append("usemtl " + ("paint" if texture == f"{name}.rgb" else "trim"))
        lines += [corners(count, triangle) for triangle in triangles]
        count += len(vertices)
    angles = np.arange(32) * np.pi / 16
    for (x, y, z), radius, width in wheels((folder / f"{name}.xml").read_text(errors="replace")):
        for part, r, half in (("tyre", radius, width / 2), ("rim", 0.65 * radius, 0.51 * width)):
            for depth in (z - half, z + half):
                for a in angles:
                    lines.append(f"v {x + r * np.cos(a):.5f} {y + r * np.sin(a):.5f} {depth:.5f}\nvt 0 0")
            lines += [f"usemtl {part}", corners(count, range(32)), corners(count, range(32, 64))]
            lines += [corners(count, (k, (k + 1) % 32, 32 + (k + 1) % 32, 32 + k)) for k in range(32)]
            count += 64
    (out / f"{name}.obj").write_text("\n".join(lines) + "\n")
    Image.open(folder / f"{name}.rgb").convert("RGB").save(out / f"{name}.png")
    colours = {"paint": f"1 1 1\nmap_Kd {name}.png", "trim": ".05 .05 .05", "tyre": ".01 .01 .01",
               "rim": ".6 .6 .6"}
    (out / f"{name}.mtl").write_text("".join(f"newmtl {part}\nKd {kd}\n" for part, kd in colours.items()))


if __name__ == "__main__":
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    for car in sys.argv[3:]:
        convert(source / car, out)
        print(out / f"{car}.obj")
