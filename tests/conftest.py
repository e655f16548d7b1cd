"""The scripts lie flat in the checkout; tests import and run them from there."""
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
def renders():
    """../shared/renders: 600 rendered cars with masks and props.csv (development data, not shipped)."""
    folder = SHARED / "renders"
    if not folder.is_dir():
        pytest.skip("../shared/renders is not here: real pictures for development and CI")
    return folder
