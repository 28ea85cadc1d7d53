"""Documents made from the code are as the code is now, and the example is valid settings."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from gpulane.config import Settings, gpus_from_arguments, parse_settings
from gpulane.config.parse import check_settings
from gpulane.core.policy import Policy
from gpulane.service import _policy


@pytest.fixture(scope="module")
def made(root: Path) -> ModuleType:
    """The generator, as a module."""
    spec = importlib.util.spec_from_file_location("make_reference", root / "scripts/make_reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look for it there
    spec.loader.exec_module(module)
    return module


def test_documents_are_what_the_generator_writes(root: Path, made: ModuleType) -> None:
    texts: dict[Path, str] = made.documents(root)
    differing = [str(path) for path, text in texts.items() if (root / path).read_text() != text]
    assert differing == [], "run python scripts/make_reference.py"


def test_every_setting_says_what_it_does(root: Path) -> None:
    rows = [line for line in (root / "docs/configuration.md").read_text().splitlines() if line[:3] == "| `"]
    silent = [row for row in rows if not row.split(" | ")[-1].strip("| ")]
    assert len(rows) > 50
    assert silent == []


def test_the_example_is_the_defaults(root: Path) -> None:
    example = parse_settings((root / "gpulane.example.yaml").read_text(), source="example")
    defaults = check_settings(Settings(gpus=example.gpus))
    assert msgspec.structs.asdict(example) == msgspec.structs.asdict(defaults)
    assert list(example.gpus) == ["gpu0", "gpu1"]
    assert (
        example.gpus["gpu0"]
        == check_settings(Settings(gpus=gpus_from_arguments(("7860+8188",)))).gpus["gpu0"]
    )


def test_the_example_without_its_marks_is_valid_too(root: Path) -> None:
    """What is commented out is there to be used."""
    text = (root / "gpulane.example.yaml").read_text()
    assert "  # gpu2:" in text and "# keys:" in text
    text = text.replace("  # gpu2:", "  gpu2:").replace("  #   engines:", "    engines:")
    text = text.replace("  #     - {url", "      - {url")
    text = text.replace("keys: []\n# keys:", "keys:").replace("#   - {account", "  - {account")
    settings = parse_settings(text.replace("64 hex digits", "0f" * 32), source="example")
    assert settings.keys[0].account == "ann"
    assert settings.gpus["gpu2"].engines


def test_constants_of_the_policy_are_those_in_force(root: Path) -> None:
    """The table shows what `serve` uses: the settings' word where they have one, else the policy's own."""
    in_force = dataclasses.asdict(_policy(Settings()))
    rows = [line.split(" | ") for line in (root / "docs/scheduling.md").read_text().splitlines()]
    words = {"false": 0.0, "true": 1.0}
    shown = {
        row[0].strip("|` "): words[row[1]] if row[1] in words else float(row[1])
        for row in rows
        if row[0].strip("| ").strip("`") in in_force
    }
    assert shown == {name: float(value) for name, value in in_force.items()}
    assert set(shown) == {field.name for field in dataclasses.fields(Policy)}


def test_check_tells_a_difference(tmp_path: Path, root: Path, made: ModuleType) -> None:
    """A new setting changes the documents."""
    for name in ("src/gpulane/config/settings.py", "src/gpulane/core/policy.py", "docs/scheduling.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text((root / name).read_text())
    settings = tmp_path / "src/gpulane/config/settings.py"
    settings.write_text(settings.read_text().replace("queued_max: int = 100_000", "queued_max: int = 7"))
    texts: dict[Path, str] = made.documents(tmp_path)
    assert "queued_max: 7\n" in texts[Path("gpulane.example.yaml")]
    assert "| `queued_max` | whole number | `7` |" in texts[Path("docs/configuration.md")]
