"""What all tests share: the asyncio backend, skips by name for what is not on this machine, and their record.

A skip that nobody expects hides a hole, so with CI=true a reason that tests/allowed_skips.txt does not list
fails the run. This file starts nothing; the tests own their processes.
"""

import os
import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol, cast

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED_SKIPS = ROOT / "tests" / "allowed_skips.txt"

# Servers live in sbin folders, which the PATH of an ordinary user often lacks.
os.environ["PATH"] = os.pathsep.join(
    [os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"]
)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of recordings and traces beside the checkout; a stranger's clone has none."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("../shared is not here")
    return folder


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Carries out @pytest.mark.needs("nginx", "root", "../shared/traces")."""
    for mark in item.iter_markers("needs"):
        for thing in mark.args:
            if not is_here(str(thing)):
                pytest.skip(f"{thing} is not here")


def is_here(thing: str) -> bool:
    if thing == "root":
        return os.geteuid() == 0
    if "/" in thing:
        return (ROOT / thing).exists()
    return shutil.which(thing) is not None


@pytest.hookimpl(trylast=True)  # after the random order
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The static checks take longest; started last they would run alone at the end.
    items.sort(key=lambda item: item.get_closest_marker("static") is None)


# ---- skips, by name ----


class Reporter(Protocol):
    """What is used of pytest's terminal reporter."""

    stats: dict[str, list[pytest.TestReport | pytest.CollectReport]]

    def section(self, title: str) -> None: ...

    def line(self, msg: str) -> None: ...


def skips(reporter: Reporter) -> list[tuple[str, str]]:
    """Returns (test, reason) of each skip, the reasons together."""
    return sorted(
        ((r.nodeid, skip_reason(r)) for r in reporter.stats.get("skipped", [])), key=lambda s: s[::-1]
    )


def skip_reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")


def refused_skips(found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    lines = ALLOWED_SKIPS.read_text().splitlines()
    allowed = [line for line in map(str.strip, lines) if line and not line.startswith("#")]
    return [(name, why) for name, why in found if not any(fnmatchcase(why, pattern) for pattern in allowed)]


def is_ci() -> bool:
    return os.environ.get("CI", "") not in {"", "0", "false"}


def reporter_of(config: pytest.Config) -> Reporter | None:
    """Returns None in the processes that pytest-xdist starts, and where the terminal is switched off."""
    return cast("Reporter | None", config.pluginmanager.getplugin("terminalreporter"))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    reporter = reporter_of(session.config)
    if reporter and is_ci() and refused_skips(skips(reporter)) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Reporter) -> None:
    found = skips(terminalreporter)
    if found:
        terminalreporter.section("skipped, by name")
    for name, why in found:
        terminalreporter.line(f"{name}: {why}")
    refused = refused_skips(found) if is_ci() else []
    if refused:
        terminalreporter.section("skips that tests/allowed_skips.txt does not list: the run fails")
    for name, why in refused:
        terminalreporter.line(f"{name}: {why}")
