"""How results are printed: tables with colors on a terminal, plain lines elsewhere, JSON when asked for."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A table, not drawn yet."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    nothing: str = "nothing"
    """Said when there are no rows."""
    keep: str = ""
    """The column that must not be cut or wrapped."""


def is_terminal() -> bool:
    """Tell whether somebody looks at standard output."""
    return sys.stdout.isatty()


@cache
def console() -> Console:
    """Return rich's console on standard output."""
    from rich.console import Console

    return Console(highlight=False)


def print_json(document: object) -> None:
    """Print a document, indented."""
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(document), indent=2).decode())


def print_raw_json(encoded: bytes) -> None:
    """Print an answer of the gateway as it is, indented."""
    import msgspec

    print(msgspec.json.format(encoded, indent=2).decode())


def print_lines(parts: Sequence[tuple[str, str]]) -> None:
    """Print one line of (text, style); styles count on a terminal alone."""
    if not is_terminal():
        print("".join(text for text, _ in parts))
        return
    from rich.text import Text

    console().print(Text.assemble(*parts), soft_wrap=True)


def print_rows(table: Rows) -> None:
    """Print a table."""
    if not table.rows:
        print_lines([(table.nothing, "dim")])
    elif is_terminal():
        _draw(table)
    else:
        print("\n".join(plain_rows(table)))


def plain_rows(table: Rows) -> list[str]:
    """Lay a table out in columns of spaces; nothing is cut."""
    lines = [tuple(name.upper() for name in table.columns), *table.rows]
    widths = [max(len(line[number]) for line in lines) for number in range(len(table.columns))]
    return [
        "  ".join(f"{cell or '-':{width}}" for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def _draw(table: Rows) -> None:
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=None, header_style="bold", pad_edge=False)
    for name in table.columns:
        drawn.add_column(
            name.upper(), no_wrap=True, overflow="ellipsis", min_width=36 if name == table.keep else None
        )
    for row in table.rows:
        drawn.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in row))
    console().print(drawn)


STYLES = {
    "running": "cyan",
    "succeeded": "green",
    "failed": "red",
    "cancelled": "yellow",
    "waiting_retry": "yellow",
    "idle": "green",
    "busy": "cyan",
    "handoff": "cyan",
    "draining": "yellow",
    "lost": "bold red",
}
"""Of states, wherever they stand."""
