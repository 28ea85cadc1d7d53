"""Refusals in words and shapes: the native API's own, and each service's for clients that know only it.

Never shows a traceback or an exception's text that was not written for clients.
"""

from __future__ import annotations

import math
from http import HTTPStatus
from typing import Final

import msgspec
from aiohttp import web

from gpulane.adapters.a1111.errors import error_answer as a1111_answer
from gpulane.adapters.base import ErrorAnswer
from gpulane.adapters.comfyui.refusals import error_answer as comfyui_answer
from gpulane.core.model import Service
from gpulane.errors import ClientError, GpulaneError, NotAuthenticated, StoreError, Throttled, Unavailable
from gpulane.relay import AnswerGone
from gpulane.wire import WireError

RETRY_AFTER_SECONDS: Final = 5.0
"""What a 429 or 503 says when nothing better is known."""
CHALLENGE: Final = 'Basic realm="gpulane", charset="UTF-8"'
"""Browsers then ask for it (any name, the key as password); programs may send Bearer or X-Api-Key as well."""


class BadGateway(ClientError):
    """The engine did not answer as it should."""

    code = "engine_failed"
    status = 502


class GatewayTimeout(ClientError):
    """The engine did not answer in time."""

    code = "engine_timeout"
    status = 504


class Internal(ClientError):
    """Something went wrong here; the log says what."""

    code = "internal"
    status = 500


class UnsupportedMedia(ClientError):
    """The body's encoding is not understood."""

    code = "unsupported_media"
    status = 415


class MethodNotAllowed(ClientError):
    """This path does not know that method."""

    code = "method_not_allowed"
    status = 405


class NotReady(ClientError):
    """The job is not in the state that this asks for."""

    code = "not_ready"
    status = 409


def refusal(error: ClientError, service: Service | None = None) -> web.Response:
    """Answer an error in the shape of the service, or in our own for None."""
    told = answer_of(error, service)
    response = web.Response(status=told.status, body=told.body, content_type=told.content_type)
    if isinstance(error, NotAuthenticated):
        response.headers["WWW-Authenticate"] = CHALLENGE
    seconds = error.retry_after_seconds
    if seconds is None and isinstance(error, Throttled | Unavailable):
        seconds = RETRY_AFTER_SECONDS
    if seconds is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(seconds)))
    return response


def answer_of(error: ClientError, service: Service | None) -> ErrorAnswer:
    """Write the error as JSON in the service's shape."""
    match service:
        case Service.COMFYUI:
            return comfyui_answer(error)
        case Service.A1111:
            return a1111_answer(error)
        case Service.HTTP:
            # OpenAI's clients read message, type and code; ours is a part of theirs.
            sentence = f"{error.message} {error.hint}" if error.hint else error.message
            inner = {"message": sentence, "type": error.code, "code": error.code, "hint": error.hint}
        case Service.LOCK | None:
            inner = {"code": error.code, "message": error.message, "hint": error.hint}
    return ErrorAnswer(status=error.status, body=msgspec.json.encode({"error": inner}))


def client_error(error: GpulaneError) -> ClientError:
    """Put what went wrong inside into words for a client."""
    if isinstance(error, ClientError):
        return error
    if isinstance(error, WireError):
        kind = GatewayTimeout if error.status == HTTPStatus.GATEWAY_TIMEOUT else BadGateway
        return kind(f"The engine failed: {error.message}.", code=error.code)
    if isinstance(error, AnswerGone):
        return Unavailable("The answer is no longer kept.", code=error.code)
    if isinstance(error, StoreError):
        return Unavailable("The store does not answer now.", code=error.code, hint="Try again soon.")
    # How a held job ended: the sentence says it.
    return BadGateway(error.message, code=error.code)
