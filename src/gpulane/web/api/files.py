"""Gives one file of a result: from the data folder, from inside the answer itself, or still from its engine.

Files are made by other people's workflows: none may run as a page of ours.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Final
from urllib.parse import quote

import msgspec
from aiohttp import web

from gpulane.core.model import EngineUrl
from gpulane.engine.base import Artifact, RecordedResult
from gpulane.errors import EngineError, NotFound
from gpulane.web.ports import EnginesPort
from gpulane.wire import Timeouts

FETCH_TIMEOUTS: Final = Timeouts(first_byte_seconds=60.0, idle_seconds=60.0)
_SHOWN_INLINE: Final = (
    "image/png",
    "image/jpeg",
    "image/webp",
    "image/gif",
    "image/avif",
    "video/",
    "audio/",
)
_HEADERS: Final = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'",
    "Cache-Control": "private, max-age=86400, immutable",
}


class _Pictures(msgspec.Struct):
    """A1111's answers: txt2img and the like, extra-single-image."""

    images: list[str] | None = None
    image: str | None = None


async def file_response(
    request: web.Request, engines: EnginesPort, result: RecordedResult, number: int, path: Path | None
) -> web.StreamResponse:
    """Answer with a file. Raises NotFound (`unavailable`) when it is nowhere any more."""
    about = result.artifacts[number]
    headers = _headers(about)
    if path is not None:
        return web.FileResponse(path, headers=headers)
    if about.target is None:
        inside = [other for other, each in enumerate(result.artifacts) if each.target is None]
        return web.Response(body=_picture(result, inside.index(number)), headers=headers)
    return await _from_engine(request, engines, result, about, headers)


def _picture(result: RecordedResult, index: int) -> bytes:
    """Take a picture out of the answer's JSON."""
    try:
        found = msgspec.json.decode(result.document, type=_Pictures)
        pictures = found.images or ([found.image] if found.image else [])
        return base64.b64decode(pictures[index].rpartition(",")[2], validate=True)
    except (msgspec.MsgspecError, IndexError, binascii.Error) as error:
        raise _gone() from error


async def _from_engine(
    request: web.Request,
    engines: EnginesPort,
    result: RecordedResult,
    about: Artifact,
    headers: dict[str, str],
) -> web.StreamResponse:
    """Pass it on while its copy is not made yet, or could not be."""
    known = {engine.url for engine in engines.engines()}
    if about.target is None or EngineUrl(result.engine) not in known:
        raise _gone()
    wire = engines.wire(EngineUrl(result.engine))
    try:
        answer = await wire.request("GET", about.target, timeouts=FETCH_TIMEOUTS)
    except EngineError as error:
        raise _gone() from error
    async with answer:
        if answer.status != 200:
            raise _gone()
        response = web.StreamResponse(headers=headers)
        response.content_length = answer.content_length
        await response.prepare(request)
        if request.method != "HEAD":
            async for chunk in answer.chunks():
                await response.write(chunk)
        await response.write_eof()
        return response


def _headers(about: Artifact) -> dict[str, str]:
    kind = about.content_type.partition(";")[0].strip().lower() or "application/octet-stream"
    shown = "inline" if kind.startswith(_SHOWN_INLINE) else "attachment"
    name = quote(about.name.rpartition("/")[2], safe="")
    return {
        **_HEADERS,
        "Content-Type": kind,
        "Content-Disposition": f"{shown}; filename*=UTF-8''{name}",
    }


def _gone() -> NotFound:
    return NotFound("This file is no longer kept.", code="unavailable")
