"""Minutes of a production trace through everything, by clients nobody here wrote; at length: `make trace`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(120)

REQUESTS = 60


def test_trace_reaches_the_cards_exactly_once(root: Path, tmp_path: Path) -> None:
    for library in ("webuiapi", "comfy_api_simplified", "comfy_commander", "comfyapi"):
        pytest.importorskip(library)
    command = [
        sys.executable, str(root / "bench" / "trace_run.py"), "--requests", str(REQUESTS), "--quick",
        "--trace", str(root / "tests" / "data" / "trace-500.csv"), "--report", str(tmp_path),
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    document: dict[str, Any] = json.loads((tmp_path / "trace-run.json").read_text())
    assert document["missed"] == []
    assert document["judge"]["overlaps"] == 0
    assert sum(document["judge"]["computed_jobs"].values()) == REQUESTS
    assert document["accounts"] >= 20
    assert sorted(document["clients"]) == ["comfy-api-simplified", "comfy-commander", "comfyapi", "webuiapi"]
