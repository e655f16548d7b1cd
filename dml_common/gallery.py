"""Saliency maps as pictures (Pillow alone): a column for each picture, a row for each network."""
import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dml_common import files, pictures
from dml_common.arrays import kept_rows

# Dark violet over red to light yellow: lightness grows evenly, also for the colour-blind and in grey print.
HEAT = np.array([[0, 0, 4], [31, 12, 72], [85, 15, 109], [136, 34, 106], [186, 54, 85], [227, 89, 51],
                 [249, 142, 9], [249, 203, 53], [252, 255, 164]], dtype=np.float64)


def heat(saliency_map, picture=None):
    """Map (H, W) in [0, 1] -> uint8 (H, W, 3), over the picture (H, W, 3) made grey if given; nan is grey."""
    known = np.isfinite(saliency_map)
    values = np.where(known, saliency_map, 0).astype(np.float64)
    colours = np.stack([np.interp(values, np.linspace(0, 1, len(HEAT)), ramp) for ramp in HEAT.T], axis=-1)
    colours[~known] = 128
    if picture is not None:
        strength = 0.25 + 0.75 * values[..., None]
        colours = strength * colours + (1 - strength) * picture.mean(axis=2, keepdims=True)
    return colours.round().astype(np.uint8)


def draw_gallery(columns, names, titles, side=168, gap=8):
    """Pictures × networks as one PIL image: a column for each picture under its title, a row for each name.

    columns: each picture's cells, uint8 (H, W, 3): itself, then a map of each network; names: of the cells.
    """
    font = ImageFont.load_default(size=13)
    left, top, step = 2 * gap + int(max(map(font.getlength, names))), 24, side + gap
    sheet = Image.new("RGB", (left + len(columns) * step, top + len(names) * step), "white")
    draw = ImageDraw.Draw(sheet)
    for row, name in enumerate(names):
        draw.text((gap, top + row * step + side / 2), name, fill="black", font=font, anchor="lm")
    for column, (cells, title) in enumerate(zip(columns, titles)):
        while font.getlength(title) > side:
            title = "…" + title[2:]
        draw.text((left + column * step, top / 2), title, fill="black", font=font, anchor="lm")
        for row, pixels in enumerate(cells):
            cell = Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(cell, (left + column * step, top + row * step))
    return sheet


def check(jobs, args):
    """Raise ValueError where the gallery can't be drawn, or written."""
    folds = sorted({str(job.spec["fold"]) for job in jobs if job.dataset.split == "held out"})
    if len(folds) > 1:
        raise ValueError(f"--gallery: folds {', '.join(folds)} are analysed on different pictures; "
                         "give one --fold")
    if args.gallery.suffix.lower() != ".png":
        raise ValueError(f"--gallery {args.gallery}: expected a name ending in .png")
    for path in pages(args.gallery, len(jobs[0].numbers) if args.pick else 8):
        files.check_output(path, jobs[0].dataset.paths)


def make_gallery(jobs, args):
    """Write the gallery of the first eight pictures (four pairs), or of all of --pick, eight on a page."""
    dataset, columns, titles = jobs[0].dataset, [], []
    kept = [kept_rows(job) for job in jobs]
    arrays = [files.read_array(job.path) for job in jobs]
    for row, number in list(enumerate(jobs[0].numbers))[:None if args.pick else 8]:
        if not all(row in rows for rows in kept):
            continue
        titles.append(dataset.relative[number])
        columns.append([])
        for job, array, rows in zip(jobs, arrays, kept):
            pixels = pictures.load_pixels(dataset.paths[number], job.about["preprocessing"])
            one = Image.fromarray(np.float32(array[rows.index(row)]))
            one = np.asarray(one.resize(pixels.shape[1::-1], Image.Resampling.BILINEAR))
            columns[-1] += [] if columns[-1] else [pixels]
            columns[-1].append(heat(one, pixels if args.overlay else None))
    names = [job.spec["name"] for job in jobs]
    if len({job.spec["fold"] for job in jobs}) == 1:
        names = [job.spec["loss"] or job.spec["name"] for job in jobs]
    for path, start in zip(pages(args.gallery, len(columns)), range(0, len(columns), 8)):
        png, these = io.BytesIO(), slice(start, start + 8)
        draw_gallery(columns[these], ["Picture", *names], titles[these]).save(png, "PNG")
        files.write_file(path, png.getvalue())


def pages(path, n):
    """FILE.png, FILE_2.png, … of n pictures, eight on each."""
    return [path, *(path.with_stem(f"{path.stem}_{page}") for page in range(2, -(-n // 8) + 1))]
