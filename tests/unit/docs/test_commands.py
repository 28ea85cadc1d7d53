"""What documents tell people to type exists: commands and options of `gpulane`, targets of `make`, files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from gpulane.cli import program

SKIPPED = {"decisions", "drive"}
"""Folders of what was so at one time."""


def documents(root: Path) -> list[Path]:
    found = [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").rglob("*.md"))]
    return [path for path in found if not SKIPPED & set(path.relative_to(root).parts)]


def typed(text: str, program_name: str) -> Iterator[list[str]]:
    """Yields the words after the program, in blocks and in `code`, up to a comment or another command."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    for line in [*lines, *inline]:
        for part in re.split(r"&&|;|\||#", line):
            words = part.split()
            while words and "=" in words[0]:  # an environment variable
                words = words[1:]
            if words and words[0].rpartition("/")[2] == program_name:
                yield words[1:]


def test_commands_and_options_exist(root: Path) -> None:
    missing: list[str] = []
    seen = 0
    for path in documents(root):
        for words in typed(path.read_text(), "gpulane"):
            seen += 1
            missing += [f"{path.name}: gpulane {' '.join(words)}: {what}" for what in unknown(words)]
    assert missing == []
    assert seen > 10


def unknown(words: list[str]) -> Iterator[str]:
    if words and words[0] == "ready":  # the line that serve prints
        return
    command: click.Command = program
    while words and isinstance(command, click.Group) and not words[0].startswith("-"):
        found = command.commands.get(words[0])
        if found is None:
            yield f"no command {words[0]}"
            return
        command, words = found, words[1:]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    known |= {"--help", "-h"}
    for word in words:
        if word == "--":
            return
        if word.startswith("-") and word.partition("=")[0] not in known:
            yield f"no option {word}"


def test_make_targets_exist(root: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (root / "Makefile").read_text(), re.MULTILINE))
    named = [words[0] for path in documents(root) for words in typed(path.read_text(), "make") if words]
    assert set(named) <= targets
    assert {"demo", "test"} <= set(named)


@pytest.mark.parametrize("name", ["src", "bench", "tests", "scripts", "docs"])
def test_files_that_documents_name_exist(root: Path, name: str) -> None:
    file = re.compile(rf"`({name}/[\w./-]+)`")
    missing = [
        f"{path.relative_to(root)}: {found}"
        for path in documents(root)
        for found in file.findall(path.read_text())
        if not (root / found).exists()
    ]
    assert missing == []


def test_modules_that_documents_name_exist(root: Path) -> None:
    """Documents name modules from the package on: `core/policy.py`."""
    package = root / "src/gpulane"
    layers = "|".join(sorted(path.name for path in package.iterdir() if path.is_dir()))
    module = re.compile(rf"`((?:{layers})/[\w./]*)`")
    missing = [
        f"{path.relative_to(root)}: {found}"
        for path in documents(root)
        for found in module.findall(path.read_text())
        if "NAME" not in found and not (package / found).exists()
    ]
    assert missing == []


def test_the_index_names_every_document(root: Path) -> None:
    index = (root / "docs/README.md").read_text()
    written = [path.name for path in sorted((root / "docs").glob("*.md")) if path.name != "README.md"]
    assert [name for name in written if name not in index] == []


def test_the_changelog_names_every_command(root: Path) -> None:
    """A new command is what a user notices."""
    changelog = (root / "CHANGELOG.md").read_text()
    assert [name for name in program.commands if f"`{name}" not in changelog] == []
