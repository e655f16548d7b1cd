"""The scripts lie flat in the checkout; tests import and run them from there."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))


@pytest.fixture
def run_script():
    """run_script("nrprec.py", "emb.npy", …) -> CompletedProcess with text output, never raising."""

    def run(script, *arguments, **options):
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, **options)

    return run


@pytest.fixture
def refused(capsys):
    """refused(main, argument, …) -> why it refuses, having said and written nothing else in this folder."""

    def refuse(main, *arguments):
        before = sorted(Path().iterdir())
        with pytest.raises((ValueError, OSError, SystemExit)) as caught:
            main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        lines = [line for line in said.err.splitlines() if "_knn is not built" not in line]
        assert said.out == "" and sorted(Path().iterdir()) == before
        if isinstance(caught.value, SystemExit):  # the parser has said it
            assert caught.value.code == 2 and len(lines) == 1
            return lines[0]
        assert not lines  # command.run() says it, in one line
        return str(caught.value)

    return refuse


@pytest.fixture
def renders():
    """../shared/renders: 600 rendered cars with masks and props.csv (development data, not shipped)."""
    folder = SHARED / "renders"
    if not folder.is_dir():
        pytest.skip("../shared/renders is not here: real pictures for development and CI")
    return folder


@pytest.fixture
def held_out_networks():
    """held_out_networks(models, dataset, factory, features, slugs): networks of one trunk, as
    train.py --split pictures --freeze-trunk leaves them: two folds, half of the pictures held out in each."""

    def make(folder, dataset, factory, features, slugs=("triplet", "arcface")):
        import torch

        from dml_common import networks, pictures

        whole = pictures.open_dataset(dataset, split="all")
        listed = {"number": len(whole.paths), "sha256": pictures.pictures_sha256(whole.relative)}
        trunk = networks.from_factory(factory)
        for fold in (0, 1):
            split = {"kind": "pictures", "pictures": listed, "test": list(range(fold, len(whole.paths), 2))}
            config = {"dataset": whole.name, "backbone": factory, "preprocessing": trunk.preprocessing,
                      "split": split}
            for number, slug in enumerate(slugs):
                place = folder / "trained" / whole.name / slug / f"fold{fold}"
                place.mkdir(parents=True)
                head = networks.random_linear(features, 4, 10 * number, fold)
                torch.save(trunk.state_dict(), place / "trunk_best.pth")
                torch.save(head.state_dict(), place / "embedder_best.pth")
                (place / "config.json").write_text(json.dumps(config))
        return whole

    return make
