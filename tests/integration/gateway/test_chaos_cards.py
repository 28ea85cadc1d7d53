"""The short version of bench/chaos.py, as the program it is: see docs/chaos.md.

The oracle is the simulated cards' own logs. A failing seed is a parameter to keep.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(120)
RUN_SECONDS = 100


@pytest.mark.parametrize("seed", [1])
def test_shared_cards_under_every_fault(root: Path, seed: int) -> None:
    command = [sys.executable, "bench/chaos.py", "--quick", "--seed", str(seed)]
    environment = os.environ | {"PYTHONPATH": str(root / "src")}
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=RUN_SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| overlaps | 0 |" in done.stdout
