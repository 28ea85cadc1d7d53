"""Turns a request to a generic HTTP service into a job. Its body goes to the engine byte for byte."""

from __future__ import annotations

import hashlib
from typing import Final

import msgspec

from gpulane.adapters.base import EngineRequest, HeaderList, Recognized
from gpulane.core.model import NO_MODEL, ModelKey, Work

MODEL_LENGTH_MAX: Final = 300
TOKENS_UNKNOWN: Final = 1
"""Work of a request that does not say how much it wants; service times are learned per signature anyway."""
TOKENS_MAX: Final = 1_000_000

_DROPPED: Final = frozenset(
    {
        # Between two hops only (RFC 9110 section 7.6.1).
        "connection",
        "keep-alive",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "expect",
        "content-length",
        # Ours to set, or the gateway's own keys, which are no engine's business.
        "host",
        "authorization",
        "proxy-authorization",
        "cookie",
        "x-api-key",
        "idempotency-key",
    }
)


class _Options(msgspec.Struct):
    num_predict: object = None


class _Body(msgspec.Struct):
    model: object = None
    max_tokens: object = None
    max_completion_tokens: object = None
    n_predict: object = None
    options: _Options | None = None


def recognize(
    method: str, target: str, headers: HeaderList, body: bytes, *, engine_headers: HeaderList = ()
) -> Recognized:
    """Understand a request that `routes.classify` calls a job. Whatever the body is, it is passed on.

    `engine_headers` are added: the engine's own key, where the settings give one.
    """
    path = target.split("?", 1)[0]
    peeked = _peek(body)
    sent = (
        tuple((name, value) for name, value in headers if name.lower() not in _dropped(headers))
        + engine_headers
    )
    return Recognized(
        kind=path.strip("/")[:100] or "/",
        request=EngineRequest(method=method, target=target, headers=sent, body=body),
        model=_model(peeked),
        signature=f"{method} {path}",
        work=Work(steps=_tokens(peeked)),
        digest=_digest(method, target, headers, body),
    )


def _dropped(headers: HeaderList) -> frozenset[str]:
    named = [v for name, v in headers if name.lower() == "connection"]
    return _DROPPED | {token.strip().lower() for value in named for token in value.split(",")}


def _peek(body: bytes) -> _Body:
    try:
        return msgspec.json.decode(body, type=_Body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _Body()


def _model(body: _Body) -> ModelKey:
    named = body.model
    return ModelKey(named) if isinstance(named, str) and len(named) <= MODEL_LENGTH_MAX else NO_MODEL


def _tokens(body: _Body) -> int:
    in_options = body.options.num_predict if body.options else None
    for value in (body.max_completion_tokens, body.max_tokens, body.n_predict, in_options):
        if isinstance(value, int) and value > 0:
            return min(value, TOKENS_MAX)
    return TOKENS_UNKNOWN


def _digest(method: str, target: str, headers: HeaderList, body: bytes) -> str:
    kind = next((value for name, value in headers if name.lower() == "content-type"), "")
    hashed = hashlib.blake2b(
        f"{method}\0{target}\0{kind}\0".encode("utf-8", "surrogateescape"), digest_size=16
    )
    hashed.update(body)
    return hashed.hexdigest()
