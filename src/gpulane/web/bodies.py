"""Reads a request's body whole, within a limit; JSON into types with errors that say what is wrong.

What takes long with a big body is done in a thread: meanwhile others are answered.
"""

from __future__ import annotations

import asyncio
import difflib
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

import msgspec
from aiohttp import web

from gpulane.errors import BadRequest, TooLarge
from gpulane.web.errors import UnsupportedMedia

T = TypeVar("T", bound=msgspec.Struct)
Read = TypeVar("Read")

MIB: Final = 1024 * 1024
BIG_BODY_BYTES: Final = MIB
"""Bodies over this are understood in a thread: 20 MB take some 50 ms, hostile ones up to a second."""
READERS_MAX: Final = 2
"""Threads of their own, and few: each more would take its share of the interpreter from the event loop."""
_readers: Final = ThreadPoolExecutor(READERS_MAX, thread_name_prefix="reader")
_UNKNOWN_FIELD: Final = re.compile(r"unknown field `(?P<field>[^`]*)`")


async def read_body(request: web.Request, bytes_max: int, *, may_be_encoded: bool = False) -> bytes:
    """Return the body as it came. Raises TooLarge as soon as that is known, UnsupportedMedia."""
    encoding = request.headers.get("Content-Encoding", "identity").lower()
    if encoding != "identity" and not may_be_encoded:
        raise UnsupportedMedia(
            f"A body in {encoding} is not taken here.", hint="Send it without Content-Encoding."
        )
    if (request.content_length or 0) > bytes_max:
        raise _too_large(bytes_max)
    pieces: list[bytes] = []
    size = 0
    try:
        while piece := await request.content.readany():
            size += len(piece)
            if size > bytes_max:
                raise _too_large(bytes_max)
            pieces.append(piece)
    except web.RequestPayloadError as error:
        raise BadRequest("The body is broken off or badly framed.") from error
    return b"".join(pieces)


async def understood(body: bytes, read: Callable[[], Read]) -> Read:
    """Return what `read` makes of a body, which it may only look at; dropped when cancelled meanwhile."""
    if len(body) <= BIG_BODY_BYTES:
        return read()
    return await asyncio.get_running_loop().run_in_executor(_readers, read)


def decode(body: bytes, kind: type[T]) -> T:
    """Read JSON into a Struct. Raises BadRequest."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise _explained(str(error), kind) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"The body is not JSON: {error}.", code="bad_json") from error


def suggestion(word: str, known: list[str]) -> str:
    """Name the nearest known word, or all of them."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(sorted(known))}."


def _explained(message: str, kind: type[msgspec.Struct]) -> BadRequest:
    found = _UNKNOWN_FIELD.search(message)
    if found:
        return BadRequest(
            f"Unknown field {found['field']!r}.",
            hint=suggestion(found["field"], list(kind.__struct_encode_fields__)),
            code="unknown_field",
        )
    return BadRequest(f"{message}.", code="bad_field")


def _too_large(bytes_max: int) -> TooLarge:
    return TooLarge(
        f"The body is over the limit of {bytes_max / MIB:g} MiB.", hint="limits.body_mib sets it."
    )
