"""A database file of ours: locked to one process, migrated by number, its statements read from a .sql file.

Every failure of the disk or of SQLite leaves here as a StoreError that says what to do.
"""

from __future__ import annotations

import fcntl
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Final

from gpulane.errors import StoreError

STATEMENTS_KEPT: Final = 128
"""Prepared statements that a connection keeps; more than we have."""
PAGE_CACHE_KIB: Final = 8 * 1024
WAL_PAGES: Final = 4000
"""A checkpoint runs when the log has so many pages (16 MB): rarer ones write each hot page once, not many
times."""
LOCK_SECONDS: Final = 5.0
"""How long a foreign reader (a backup, a shell) may hold us up."""

NAME: Final = re.compile(r"^-- (\w+): ", re.MULTILINE)


class FolderLock:
    """Held by the one process that uses a database; goes with the process, however that ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    def take(self) -> None:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(descriptor, 20).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise StoreError(
                f"{self.path.parent} is in use by another gpulane (process {holder})",
                hint="stop that one, or use another --data folder",
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        self._file = descriptor

    def release(self) -> None:
        """Let go; the file stays, since deleting it would let two processes lock two files of one name."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def open_database(path: Path, package: str) -> sqlite3.Connection:
    """Open a database for its one writer and bring it to the current format. `package` holds its
    migrations.
    """
    with told_as_store_error(path):
        connection = sqlite3.connect(
            path,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=STATEMENTS_KEPT,
            timeout=LOCK_SECONDS,
        )
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute(f"PRAGMA cache_size = -{PAGE_CACHE_KIB}")
            connection.execute(f"PRAGMA wal_autocheckpoint = {WAL_PAGES}")
            migrate(connection, path, migrations(package))
        except BaseException:
            connection.close()
            raise
    return connection


def migrations(package: str) -> tuple[str, ...]:
    """Return the migrations' texts in order; their numbers are dense from 1."""
    found = sorted(
        (entry for entry in (files(package) / "migrations").iterdir() if entry.name.endswith(".sql")),
        key=lambda entry: entry.name,
    )
    numbers = [int(entry.name.partition("_")[0]) for entry in found]
    assert numbers == list(range(1, len(found) + 1)), (
        f"{package}: migrations are numbered from 1 without gaps"
    )
    return tuple(entry.read_text(encoding="utf-8") for entry in found)


def migrate(connection: sqlite3.Connection, path: Path, steps: tuple[str, ...]) -> None:
    """Run what the file lacks, each step in a transaction of its own. `user_version` counts them."""
    [version] = connection.execute("PRAGMA user_version").fetchone()
    if version > len(steps):
        raise StoreError(
            f"{path} was written by a newer gpulane (format {version}, this one knows {len(steps)})",
            hint="use that version or another --data folder",
        )
    for number, step in enumerate(steps[version:], version + 1):
        connection.executescript(f"BEGIN IMMEDIATE;\n{step}\nPRAGMA user_version = {number};\nCOMMIT;")


def queries(package: str) -> dict[str, str]:
    """Return the statements of a package's queries.sql by name."""
    text = (files(package) / "queries.sql").read_text(encoding="utf-8")
    starts = [(match[1], match.end(), match.start()) for match in NAME.finditer(text)]
    ends = [start for _, _, start in starts[1:]] + [len(text)]
    return {
        name: text[text.index("\n", begin) : end].strip().rstrip(";")
        for (name, begin, _), end in zip(starts, ends, strict=True)
    }


@contextmanager
def told_as_store_error(path: Path) -> Iterator[None]:
    """Turn what SQLite and the system raise into a StoreError naming the file, what happened and what to
    do.
    """
    try:
        yield
    except sqlite3.Error as error:
        raise StoreError(f"{path}: {error}", hint=sqlite_hint(error)) from error
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}", hint="use another --data folder") from error


def sqlite_hint(error: sqlite3.Error) -> str:
    name = getattr(error, "sqlite_errorname", "") or ""
    if name.startswith("SQLITE_FULL"):
        return "the disk is full: make room; what was accepted before is safe"
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return "the file is damaged: move it away, or bring back a copy of it"
    if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
        return "the folder must be writable; use another --data folder"
    return "see the disk and the system's log"
