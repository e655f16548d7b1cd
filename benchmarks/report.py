"""How large is report.py's page, and how soon does it show its first picture? Asserts nothing.

    python benchmarks/report.py                               # 15 networks × 300 pictures × 2 maps
    python benchmarks/report.py --networks 15 --pictures 1000 --size 160

Made-up maps (blurred noise, cut at the 99th percentile, 224 × 224) and pictures, no tables. Needs 0.02 GB of
disk for each network and hundred pictures. Opening (chromium, chromedriver, selenium, where they are here) is
timed from the address to the first picture's maps drawn, the median of five times in one browser.
"""
import csv
import json
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from measure import ROOT, command, cpu_alone, print_header, print_table, script
from PIL import Image


def blurred(rng, sides, number):
    """Smooth fields in [0, 1], float16 (number, 224, 224): noise at several sizes, enlarged and summed."""
    fields = np.zeros((number, 224, 224), np.float32)
    for side in sides:
        for field in fields:
            noise = Image.fromarray(rng.gamma(1, 1, (side, side)).astype(np.float32))
            field += np.asarray(noise.resize((224, 224), Image.Resampling.BICUBIC))
    fields -= fields.min(axis=(1, 2), keepdims=True)
    fields = np.minimum(fields / np.percentile(fields, 99, axis=(1, 2), keepdims=True), 1)
    return (fields**4).astype(np.float16)  # mostly dark, as maps are


def make_results(folder, networks, pictures):
    """results/made_up/<slug>/fold0 with two maps a picture, and made_up/ with the pictures."""
    rng = np.random.default_rng(0)
    names = [f"{i:05d}.jpg" for i in range(pictures)]
    with open(ROOT / "models" / "losses.csv", encoding="utf-8") as file:
        losses = [row["name"] for row in csv.DictReader(file)]
    for number in range(networks):
        place = folder / "results" / "made_up" / f"network{number}" / "fold0"
        place.mkdir(parents=True)
        loss = losses[number] if number < len(losses) else f"loss {number}"
        for stem in ("maps", "maps_ceiling"):
            np.save(place / f"{stem}.npy", blurred(rng, (14, 56, 112), pictures))
            (place / f"{stem}.json").write_text(json.dumps({"loss": loss}))
        (place / "labels.csv").write_text("path\n" + "\n".join(names) + "\n")
    (folder / "made_up").mkdir()
    for name in names:
        colours = np.stack([blurred(rng, (4, 28, 112), 1)[0] for _ in range(3)], axis=2)
        Image.fromarray((255 * colours).astype(np.uint8)).save(folder / "made_up" / name, quality=90)


def opening_seconds(page, times=5):
    """Seconds until the first picture's maps are drawn; [] without a browser."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    try:
        from selenium import webdriver
    except ImportError:
        return []
    if not (chromium and driver):
        return []
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1400,1000"):
        options.add_argument(f"--{argument}")
    browser, seconds = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)), []
    for _ in range(times):
        start = time.perf_counter()
        browser.get(page.as_uri())
        while not browser.execute_script("return document.body.dataset.shown"):
            time.sleep(0.005)
        seconds.append(time.perf_counter() - start)
    browser.quit()
    return seconds


def main():
    parser = command.parser(__doc__)
    for name, default in ("networks", 15), ("pictures", 300), ("size", 112):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"({default})")
    cpu_alone(parser)
    args = parser.parse_args()
    print_header()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        page = folder / "report.html"
        make_results(folder, args.networks, args.pictures)
        cost, _ = script("report.py", folder / "results", "--dataset", folder / "made_up", "--out", page,
                         "--pictures", args.pictures, "--size", args.size)
        cells = {"ours": cost, "page MiB": f"{page.stat().st_size / 2**20:.1f}"}
        opened = opening_seconds(page)
    cells["opens s"] = f"{median(opened):.2f}" if opened else "no browser here"
    print_table([(f"{args.networks} networks × {args.pictures} pictures × 2 maps", cells)])


if __name__ == "__main__":
    command.run(main, stopped="stopped")
