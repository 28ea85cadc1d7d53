"""Answers in ComfyUI's shapes, and its way of reading small JSON bodies."""

from __future__ import annotations

from typing import Final, TypeVar

import msgspec
from aiohttp import web

from gpulane.errors import NotPermitted, TooLarge
from gpulane.web.bodies import read_body
from gpulane.web.ports import Identity, Role

T = TypeVar("T")

ORDER_BYTES_MAX: Final = 1024 * 1024
"""Largest body of an order: a list of ids."""

_TROUBLE: Final = "500 Internal Server Error\n\nServer got itself in trouble"


def json_answer(value: object, status: int = 200) -> web.Response:
    """Answer JSON."""
    return json_bytes(msgspec.json.encode(value), status)


def json_bytes(body: bytes, status: int = 200) -> web.Response:
    """Answer JSON that is written already."""
    return web.Response(body=body, status=status, content_type="application/json", charset="utf-8")


def done() -> web.Response:
    """Answer an order: ComfyUI says 200 and nothing else."""
    return web.Response()


def trouble() -> web.Response:
    """Answer what makes ComfyUI stumble: a body that is no JSON object."""
    return web.Response(status=500, text=_TROUBLE)


def too_large(bytes_max: int) -> web.Response:
    """Answer a body over the limit, in the words of ComfyUI's server."""
    return web.Response(status=413, text=f"Maximum request body size {bytes_max} exceeded.")


async def read_order(request: web.Request, kind: type[T]) -> T | None:
    """Read a small JSON body; None when it is no such object."""
    try:
        return msgspec.json.decode(await read_body(request, ORDER_BYTES_MAX), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


async def read_prompt(request: web.Request, bytes_max: int) -> bytes | None:
    """Read the body of a prompt; None when it is too large."""
    try:
        return await read_body(request, bytes_max)
    except TooLarge:
        return None


def require_user(identity: Identity) -> None:
    """Refuse those who may only look."""
    if identity.role is Role.VIEWER:
        raise NotPermitted("This key may look but not change anything.")


def is_operator(identity: Identity) -> bool:
    return identity.role in {Role.OPERATOR, Role.ADMIN}
