"""The YAML in the documents is valid settings, down to the engines that it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gpulane.config import EngineSettings, Settings, parse_settings
from gpulane.config.unloading import parse_unload
from gpulane.core.model import HandoffMode, NodeId
from gpulane.service import _gpu


def examples(root: Path, name: str) -> list[Settings]:
    blocks = re.findall(r"^```yaml\n(.*?)^```", (root / "docs" / name).read_text(), re.MULTILINE | re.DOTALL)
    return [parse_settings(block, source=name) for block in blocks]


@pytest.mark.parametrize("name", ["configuration.md", "handoff.md", "operating.md"])
def test_it_is_valid(root: Path, name: str) -> None:
    assert examples(root, name)


def test_sharing_a_card_names_its_engines(root: Path) -> None:
    """Names in `warm_together` and forms of `unload` are looked up as `serve` does."""
    (settings,) = examples(root, "handoff.md")
    gpu = _gpu("host", "gpu0", settings.gpus["gpu0"], NodeId("node"), {})
    assert gpu.warm_together == {frozenset({"http://127.0.0.1:8188", "http://127.0.0.1:8082"})}
    assert {engine.handoff for engine in gpu.engines} == set(HandoffMode)
    said = [e.unload for e in settings.gpus["gpu0"].engines if isinstance(e, EngineSettings) and e.unload]
    assert len({type(parse_unload(unload)) for unload in said}) == 2
