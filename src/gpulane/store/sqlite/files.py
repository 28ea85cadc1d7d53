"""Bodies and results too large for a row: each a file, safe on the disk before the row that names it is
committed.

A name is used once. A file that no row names is of a submission that was refused or never acknowledged;
opening the store removes it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from gpulane.core.model import JobId
from gpulane.store.sqlite.database import told_as_store_error

IN_ROW_BYTES_MAX: Final = 64 * 1024


class PayloadFiles:
    """The folder of large bodies and results. Every call blocks: not for the event loop."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, job: JobId, kind: str, content: bytes) -> str:
        """Write a file durably; returns its name."""
        name = f"{job[:2]}/{job}.{kind}.{secrets.token_hex(4)}"
        path = self._folder / name
        with told_as_store_error(path):
            self._make_folder(path.parent)
            part = path.with_name(path.name + ".part")
            try:
                with part.open("xb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                part.rename(path)
                sync_folder(path.parent)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
        return name

    def read(self, name: str) -> bytes | None:
        """Return a file's content, or None when it was forgotten meanwhile."""
        with told_as_store_error(self._folder / name):
            try:
                return (self._folder / name).read_bytes()
            except FileNotFoundError:
                return None

    def remove(self, names: Iterable[str]) -> None:
        """Remove files that no row names; what cannot be removed now goes when the store is opened next."""
        for name in names:
            with suppress(OSError):
                (self._folder / name).unlink(missing_ok=True)

    def sweep(self, named: set[str]) -> int:
        """Remove every file that is not `named`; returns how many."""
        if not self._folder.is_dir():
            return 0
        with told_as_store_error(self._folder):
            found = [
                f"{folder.name}/{file.name}"
                for folder in os.scandir(self._folder)
                if folder.is_dir()
                for file in os.scandir(folder)
            ]
        orphans = [name for name in found if name not in named]
        self.remove(orphans)
        return len(orphans)

    def _make_folder(self, folder: Path) -> None:
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            sync_folder(folder.parent)
            sync_folder(folder.parent.parent)


def sync_folder(folder: Path) -> None:
    """Make new names in a folder survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
