"""The plain status page at /gpulane/: gpus, queue, progress. Static files, nothing from elsewhere."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final

from aiohttp import web

_FOLDER: Final = Path(__file__).parent
_FILES: Final = {
    "/gpulane/": ("index.html", "text/html"),
    "/gpulane/page.js": ("page.js", "text/javascript"),
    "/gpulane/page.css": ("page.css", "text/css"),
}
_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_file(path: str) -> web.Response | None:
    """Answer with a file of the page; None when there is none of that path."""
    found = _FILES.get(path)
    if found is None:
        return None
    name, kind = found
    return web.Response(body=_read(name), content_type=kind, charset="utf-8", headers=_HEADERS)


@cache
def _read(name: str) -> bytes:
    return (_FOLDER / name).read_bytes()
