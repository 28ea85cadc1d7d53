"""The static checks as tests, so that the test command alone guards them: imports, types, lint, format.

`make check` runs the same commands by themselves, with their full output first.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.static, pytest.mark.timeout(240)]

TYPES_SECONDS = 200


def run(
    *command: str | Path, cwd: Path, seconds: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=os.environ | environment,
        timeout=seconds,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def assert_clean(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, "\n" + done.stdout[-8000:]


def test_types_are_strict_everywhere(root: Path) -> None:
    assert_clean(run("-m", "basedpyright", "--pythonpath", sys.executable, cwd=root, seconds=TYPES_SECONDS))


def test_code_is_formatted(root: Path) -> None:
    assert_clean(run("-m", "ruff", "format", "--check", cwd=root))


def test_linter_finds_nothing(root: Path) -> None:
    assert_clean(run("-m", "ruff", "check", "--output-format", "concise", cwd=root))


def test_imports_keep_their_contracts(root: Path) -> None:
    assert_clean(run("scripts/arch.py", "--check", cwd=root))


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("core/model.py", "import asyncio", "do no I/O"),
        ("core/model.py", "import gpulane.core.events", "inside the core"),
        ("store/base.py", "import gpulane.engine", "down the layers"),
        ("errors.py", "import gpulane.config", "down the layers"),
        ("unplaced.py", "import gpulane.errors", "down the layers"),
    ],
)
def test_planted_import_is_caught(root: Path, tmp_path: Path, module: str, line: str, contract: str) -> None:
    shutil.copytree(root / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "static"))
    shutil.copy(root / "pyproject.toml", tmp_path)
    planted = tmp_path / "src" / "gpulane" / module
    text = planted.read_text() if planted.exists() else ""
    planted.write_text(f"{text}\n{line}\n")
    done = run(root / "scripts" / "arch.py", "--check", cwd=tmp_path, PYTHONPATH=str(tmp_path / "src"))
    assert done.returncode == 1, done.stdout
    broken = [row for row in done.stdout.splitlines() if "BROKEN" in row]
    assert any(contract in row for row in broken) or "unplaced" in done.stdout, done.stdout
