"""The web UI under a prefix: the page's own idea of its root is rewritten, everything else is relayed as it
is.

An A1111 without --subpath tells its page that the root is "", and the page then opens its sockets and
styles at the root of the host.
"""

from __future__ import annotations

import re
from typing import Final

from aiohttp import web

from gpulane.relay import RawResponse
from gpulane.web.a1111.engine_calls import EngineCalls
from gpulane.web.mount import MOUNT
from gpulane.web.ports import EngineView

REWRITTEN: Final = frozenset({"/", "/config"})
"""What tells the page its root."""
PAGE_BYTES_MAX: Final = 64 * 1024 * 1024
"""Stock pages have 1 to 2 MiB; each extension adds to it, and so does each model in a list."""
_ROOT: Final = re.compile(rb'"root":( ?)"((?:https?://[^"/]*)?)"')
"""Gradio 3 writes "", Gradio 4 the address it was asked under, without a path."""
_RECOMPUTED: Final = frozenset({"etag", "last-modified", "accept-ranges"})
"""They tell of the engine's own bytes."""


class Page:
    """Answers what has to be rewritten."""

    def __init__(self, calls: EngineCalls) -> None:
        self._calls = calls

    def rewrites(self, request: web.Request, path: str) -> bool:
        """Tell whether this answer must be changed."""
        return request.method == "GET" and path in REWRITTEN and bool(request.get(MOUNT, ""))

    async def answer(self, request: web.Request, target: str, engine: EngineView) -> web.StreamResponse:
        """Fetch it whole and answer it with our prefix in it. Raises WireError."""
        response = await self._calls.ask(request, engine, "GET", target)
        async with response:
            body = await response.read(PAGE_BYTES_MAX)
        encoding = (response.header("content-encoding") or "identity").lower()
        if encoding == "identity":
            body = with_root(body, request.get(MOUNT, ""))
        told = self._calls.rules(request, engine).for_client(response.headers)
        headers = [(name, value) for name, value in told if name.lower() not in _RECOMPUTED]
        answer = RawResponse(
            status=response.status, reason=response.reason, raw_headers=headers, length=len(body), first=body
        )
        await answer.prepare(request)
        await answer.write_eof()
        return answer


def with_root(body: bytes, prefix: str) -> bytes:
    """Put our prefix behind the root that a page or its config names."""
    mount = prefix.encode()
    return _ROOT.sub(lambda found: b'"root":%b"%b%b"' % (found[1], found[2], mount), body)
