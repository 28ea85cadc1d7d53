"""docs/operating.md explains each event of the log, metric and reason, and quotes messages as they are."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpulane.core.reasons import TEXTS

LEVELS = {"debug", "info", "warning", "error"}
"""Events of `exception` are faults of ours; one row speaks for all of them."""


@pytest.fixture(scope="module")
def text(root: Path) -> str:
    return (root / "docs/operating.md").read_text()


@pytest.fixture(scope="module")
def trees(root: Path) -> list[ast.Module]:
    files = [path for path in (root / "src/gpulane").rglob("*.py") if "testing" not in path.parts]
    return [ast.parse(path.read_text()) for path in files]


def section(text: str, title: str) -> str:
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def first_cells(table: str) -> set[str]:
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def logged(tree: ast.Module, levels: set[str]) -> Iterator[str]:
    """Yields the events that a module logs: a name, or either of two."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="_log" | "log"), attr=level), args=[event, *_]
            ):
                if level in levels:
                    yield from texts(event)
            case _:
                pass


def texts(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)):
                yield text
            case _:
                pass


def test_every_event_of_the_log_is_explained(text: str, trees: list[ast.Module]) -> None:
    events = {event for tree in trees for event in logged(tree, LEVELS)}
    faults = {event for tree in trees for event in logged(tree, {"exception"})}
    assert len(events) > 20
    explained = first_cells(section(text, "The log"))
    assert events - explained == set(), "say in docs/operating.md what these mean"
    assert explained - events - faults == set(), "nothing logs these any more"


def test_every_metric_is_explained(root: Path, text: str) -> None:
    source = (root / "src/gpulane/web/metrics.py").read_text()
    gauges = set(re.findall(r'MetricFamily\(\s*"(gpulane_\w+)"', source))
    counters = {f"gpulane_{name}_total" for name in re.findall(r'self\._counter\("(\w+)"', source)}
    assert first_cells(section(text, "Metrics")) == gauges | counters


def test_every_reason_to_wait_is_explained(text: str) -> None:
    """Those of a job as a whole; what is said of one gpu or of a refusal explains itself."""
    codes = list(TEXTS)
    waiting = set(codes[: codes.index("no_engine_of_service")])
    assert first_cells(section(text, "When jobs do not run")) == waiting


def test_messages_are_quoted_as_they_are(text: str, trees: list[ast.Module]) -> None:
    spoken = {message for tree in trees for message in texts(tree)}
    quoted = first_cells(section(text, "When it does not start"))
    assert len(quoted) > 12
    assert [quote for quote in quoted if not any(quote in message for message in spoken)] == []
