"""The writer thread's side of `node.db`: statements in a transaction that the next commit ends."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from gpulane.core.events import StoreEvent
from gpulane.core.model import NodeId
from gpulane.store.sqlite.database import open_database, queries, told_as_store_error
from gpulane.store.sqlite.files import PayloadFiles

PACKAGE: Final = "gpulane.store.sqlite.node"
ID_BYTES: Final = 8


class NodeDatabase:
    """The disk under NodeStore. Only the writer thread calls anything here, after `open`."""

    def __init__(self, path: Path, files: PayloadFiles) -> None:
        self._path = path
        self._files = files
        self._sql = queries(PACKAGE)
        self._connection = open_database(path, PACKAGE)
        self._dead_files: list[str] = []

    def begin_boot(self) -> tuple[NodeId, int]:
        """Count this start; returns the node's id and the count. Durable."""
        [(node, boot)] = self.change("next_boot", secrets.token_hex(ID_BYTES))
        self.commit()
        self._files.sweep({file for (file,) in self.rows("spool_files")})
        return NodeId(node), boot

    def rows(self, name: str, *parameters: object) -> list[tuple[Any, ...]]:
        with told_as_store_error(self._path):
            return self._connection.execute(self._sql[name], parameters).fetchall()

    def change(self, name: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Run a statement that writes; returns what it returns."""
        self._begin()
        return self.rows(name, *parameters)

    def change_many(self, name: str, rows: Iterable[Sequence[object]]) -> None:
        self._begin()
        with told_as_store_error(self._path):
            self._connection.executemany(self._sql[name], rows)

    def drop_files(self, names: Iterable[str]) -> None:
        """Remove files once what no longer names them is durable."""
        self._dead_files += names

    def commit(self) -> Sequence[StoreEvent]:
        if self._connection.in_transaction:
            with told_as_store_error(self._path):
                self._connection.execute("COMMIT")
        dead, self._dead_files = self._dead_files, []
        self._files.remove(dead)
        return ()

    def undo(self) -> None:
        self._dead_files.clear()
        if self._connection.in_transaction:
            with told_as_store_error(self._path):
                self._connection.execute("ROLLBACK")

    def close(self) -> None:
        self._connection.close()

    def _begin(self) -> None:
        if not self._connection.in_transaction:
            with told_as_store_error(self._path):
                self._connection.execute("BEGIN IMMEDIATE")
