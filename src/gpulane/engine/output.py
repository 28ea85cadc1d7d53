"""What an engine's process says: a file that it appends to itself, kept short, and its last lines for people.

The process writes to the file and not to us, so that it can go on when we are gone. It must never grow
without bound while we are there, and never show a value of the settings' `env` that is meant to be secret.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

KEPT_BYTES: Final = 1024 * 1024
"""How much of the older output is kept; the newer file is cut when it has grown to as much."""
LINES_MAX: Final = 200
LINE_CHARS_MAX: Final = 1000
TAIL_BYTES: Final = LINES_MAX * LINE_CHARS_MAX
SECRET_NAMES: Final = re.compile(r"KEY|TOKEN|SECRET|PASS|AUTH|CREDENTIAL", re.IGNORECASE)
SECRET_CHARS_MIN: Final = 4
"""A shorter value would be masked wherever it stands by chance."""
_CONTROL: Final = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Colors and other orders to a terminal; a tab may stay."""


class OutputLog:
    """The output of one engine, over all of its processes: NAME.log, and before it NAME.log.1."""

    def __init__(self, path: Path, env: Mapping[str, str]) -> None:
        self.path = path
        self.older = path.with_name(path.name + ".1")
        self._secrets = tuple(
            value
            for name, value in env.items()
            if SECRET_NAMES.search(name) and len(value) >= SECRET_CHARS_MIN
        )

    def open(self) -> int:
        """Open for a process to append to; the caller closes it. Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # With O_APPEND each write goes to the end, wherever that is after the file was cut.
        return os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def note(self, text: str) -> None:
        """Write a line of our own, so that the file alone tells the story. Raises OSError."""
        descriptor = self.open()
        try:
            os.write(descriptor, f"--- gpulane: {text} ---\n".encode())
        finally:
            os.close(descriptor)

    def trim(self) -> None:
        """Move what has grown too long into the older file, at most `KEPT_BYTES` of it. Raises OSError.

        As logrotate's `copytruncate`: what is written between the copy and the cut is lost.
        """
        if not self.path.exists() or self.path.stat().st_size <= KEPT_BYTES:
            return
        part = self.older.with_name(self.older.name + ".part")
        part.write_bytes(_end_of(self.path, KEPT_BYTES))
        part.replace(self.older)
        os.truncate(self.path, 0)

    def tail(self, lines: int = LINES_MAX) -> list[str]:
        """Read the last lines as they may be shown. Raises OSError."""
        data = _end_of(self.path, TAIL_BYTES)
        if len(data) < TAIL_BYTES:
            data = _end_of(self.older, TAIL_BYTES - len(data)) + data
        text = data.decode("utf-8", "replace")
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return _last(text, lines)


def _last(text: str, lines: int) -> list[str]:
    wanted = text.split("\n")
    if wanted and not wanted[-1]:
        wanted.pop()
    return [_shown(line) for line in wanted[-lines:]]


def _shown(line: str) -> str:
    """Leave out what drives a terminal; of a progress bar that was written over itself, its last state."""
    line = line.rstrip("\r").rpartition("\r")[2]
    return _CONTROL.sub("", line)[:LINE_CHARS_MAX]


def _end_of(path: Path, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read(size)
    except FileNotFoundError:
        return b""
