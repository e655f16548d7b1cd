"""Which of the papers' 14 × 4 × 3 checkpoints are here, which lack files, and whether each loads.

    python -m models
    python -m models --dataset cars196 --folder /mnt/checkpoints

One line for each loss and data set, one word for each fold: ok · - (not there) · incomplete · bad (the reason follows).
A network of train.py (trained/) stands before the published one and is marked with *.
"""
import argparse
import os
import sys
from pathlib import Path

import models

DATASETS = ("cars196", "cub200", "sop")


def state(row, fold, dataset, folder):
    """(word, reason or None) for one checkpoint."""
    try:
        spec, looked = models.trained_spec(row, fold, dataset, folder)
        if spec is None:
            there = [place for place in looked if Path(place).parent.is_dir()]
            return ("incomplete", f"lacks trunk_best.pth or embedder_best.pth: {Path(there[0]).parent}") if there else ("-", None)
        models.load(spec)
        return "ok" + "*" * ("trained" in spec["files"][0].parts[-5:]), spec["note"]
    except (ValueError, OSError, RuntimeError) as error:
        return "bad", str(error)


def main():
    parser = argparse.ArgumentParser(prog="python -m models", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--folder", type=Path, default=models.MODELS, metavar="DIR", help="where the checkpoints lie (models/)")
    parser.add_argument("--dataset", choices=DATASETS, help="only this one (all three)")
    args = parser.parse_args()
    if not args.folder.is_dir():
        fail(f"{args.folder}: no such folder")
    rows = [row for row in models.losses() if row["name"] != "None"]
    width, words = max(len(row["name"]) for row in rows), []
    for dataset in [args.dataset] if args.dataset else DATASETS:
        print(f"{dataset:{width}}  fold 0      1           2           3           folder")
        for row in rows:
            states = [state(row, fold, dataset, args.folder) for fold in models.FOLDS]
            words += [word for word, _ in states]
            print(f"{row['name']:{width}}  {''.join(f'{word:12}' for word, _ in states)}{row[dataset]}", flush=True)
            for reason in filter(None, (reason for _, reason in states)):
                print(f"{'':{width}}  {reason}")
    print(f"{sum(word.startswith('ok') for word in words)} of {len(words)} load, {words.count('incomplete')} incomplete, "
          f"{words.count('bad')} bad, {words.count('-')} not there; models/README.md says where they come from")
    for backbone, (name, address) in models.WEIGHTS.items():
        place = models.hub_file(backbone)
        print(f"ImageNet weights of {backbone}: {place if place.is_file() else f'not there: {address} to {place}'}")


def fail(message):
    print("models:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone: python -m models | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
