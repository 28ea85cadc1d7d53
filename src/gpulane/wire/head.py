"""Writes the head of a request: pure text to bytes.

It must never let a caller's header start a second header or a second request (RFC 9112 section 11), and never
state a length twice: Content-Length and Transfer-Encoding come from `Framing` alone, whatever was given.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import urlsplit

from gpulane.wire.errors import RefusedRequest

HEADER_ENCODING = "utf-8"
HEADER_ERRORS = "surrogateescape"
"""Round-trips any byte, and is how aiohttp's server decodes what a client sent."""

_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_UNSAFE_IN_TARGET = re.compile(r"[\x00-\x20\x7f]")
_FRAMING_NAMES = frozenset({"content-length", "transfer-encoding"})
_METHODS_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where an engine listens, taken apart once."""

    host: str
    port: int
    is_tls: bool
    base: str
    """Path in front of every target, without a slash at its end."""

    @property
    def authority(self) -> str:
        """The Host header's value."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.is_tls else 80) else f"{host}:{self.port}"


def parse_origin(url: str) -> Origin:
    """Take `http://host:port[/base]` apart."""
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"not an engine's address: {url!r} (expected http://HOST:PORT[/BASE])")
    is_tls = parts.scheme == "https"
    port = parts.port or (443 if is_tls else 80)
    return Origin(host=parts.hostname, port=port, is_tls=is_tls, base=parts.path.rstrip("/"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Framing:
    """How long the request's body is: `length` bytes, or chunked when None; `has_body` False is neither."""

    has_body: bool
    length: int | None = None


def request_head(
    method: str, target: str, authority: str, headers: Sequence[tuple[str, str]], framing: Framing
) -> bytes:
    """Serialize the head; raises RefusedRequest for anything that could be read as something else."""
    if _UNSAFE_IN_TARGET.search(target) or not target.startswith(("/", "*")):
        raise RefusedRequest(f"target is not in origin-form: {target[:80]!r}")
    if not is_token(method):
        raise RefusedRequest(f"not a method: {method[:80]!r}")
    lines: list[str] = []
    has_host = False
    for name, value in headers:
        lower = name.lower()
        if lower in _FRAMING_NAMES:
            continue
        has_host = has_host or lower == "host"
        if not is_token(name):
            raise RefusedRequest(f"not a header name: {name[:80]!r}")
        lines.append(f"{name}: {value}\r\n")
    host = "" if has_host else f"Host: {authority}\r\n"
    block = "".join(lines)
    # One look at the whole instead of one at each value.
    if block.count("\n") != len(lines) or block.count("\r") != len(lines) or "\0" in block:
        raise RefusedRequest("line break or NUL in a header")
    framed = _framing_line(method, framing)
    text = f"{method} {target} HTTP/1.1\r\n{host}{block}{framed}\r\n"
    return text.encode(HEADER_ENCODING, HEADER_ERRORS)


@lru_cache(maxsize=1024)
def is_token(text: str) -> bool:
    """RFC 9110 section 5.6.2; cached, since the same thirty names come again and again."""
    return _TOKEN.fullmatch(text) is not None


def _framing_line(method: str, framing: Framing) -> str:
    if framing.has_body and framing.length is None:
        return "Transfer-Encoding: chunked\r\n"
    if framing.has_body:
        return f"Content-Length: {framing.length}\r\n"
    # A POST without Content-Length is answered 411 by some servers (RFC 9110 section 8.6).
    return "Content-Length: 0\r\n" if method in _METHODS_WITH_BODY else ""
