"""Which headers pass between client and engine, and as what: pure rules.

A length never passes: each side's own HTTP code states it (RFC 9112 section 6).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Headers = list[tuple[str, str]]

_HOP_BY_HOP = frozenset(
    {
        "connection",
        "http2-settings",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""RFC 9110 section 7.6.1; what Connection names is added to it."""

_BROWSER_ORIGIN = frozenset(
    {"origin", "referer", "sec-fetch-dest", "sec-fetch-mode", "sec-fetch-site", "sec-fetch-user"}
)
"""ComfyUI on a loopback name answers 403 when Origin is not its own Host, or Sec-Fetch-Site is cross-site."""

_FORWARDED = frozenset({"forwarded", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip"})

_NEVER_TO_ENGINE = _HOP_BY_HOP | _BROWSER_ORIGIN | {"content-length", "expect", "host"}
"""`Expect: 100-continue` has been answered by our server by the time a request is relayed."""
_NEVER_TO_CLIENT = _HOP_BY_HOP | {"content-length"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Forwarding:
    """Who asks, as our own server saw it."""

    address: str | None
    scheme: str
    host: str
    is_trusted: bool = False
    """The peer is one of `trusted_proxies`: what it says about the client is passed on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeaderRules:
    """The rules for one engine under one path prefix of ours."""

    engine_host: str
    """The engine's own `host:port`, sent as Host."""
    prefix: str = ""
    """The path that was taken off in front of the target, without a slash at its end."""
    dropped: frozenset[str] = frozenset()
    """More names, in lower case, that the engine must not see, such as those that carry our keys."""

    def for_engine(self, headers: Iterable[tuple[str, str]], forwarding: Forwarding) -> Headers:
        """Return the headers of a client's request as the engine is to get them."""
        kept = [("Host", self.engine_host)]
        connection = ""
        before: dict[str, str] = {}
        for name, value in headers:
            lower = name.lower()
            if lower == "connection":
                connection += "," + value
            elif lower in _FORWARDED:
                before[lower] = f"{before[lower]}, {value}" if lower in before else value
            elif lower not in _NEVER_TO_ENGINE and lower not in self.dropped:
                kept.append((name, value))
        kept = _without_named(kept, connection)
        kept.extend(_forwarded(before if forwarding.is_trusted else {}, forwarding))
        return kept

    def for_client(self, headers: Iterable[tuple[str, str]]) -> Headers:
        """Return the headers of an engine's answer as the client is to get them."""
        kept: Headers = []
        connection = ""
        for name, value in headers:
            lower = name.lower()
            if lower == "connection":
                connection += "," + value
            elif lower == "location":
                kept.append((name, self._location(value)))
            elif lower not in _NEVER_TO_CLIENT:
                kept.append((name, value))
        return _without_named(kept, connection)

    def _location(self, value: str) -> str:
        """Lead a redirect of the engine's back to us: it knows neither our address nor the prefix."""
        for scheme in ("http://", "https://"):
            own = scheme + self.engine_host
            if value.startswith(own) and value[len(own) :][:1] in {"", "/", "?", "#"}:
                value = value[len(own) :] or "/"
        return self.prefix + value if value.startswith("/") and not value.startswith("//") else value


def _without_named(headers: Headers, connection: str) -> Headers:
    """Drop what the Connection headers name (but for Host, which is ours already)."""
    if not connection:
        return headers
    options = {option.strip().lower() for option in connection.split(",")}
    # The usual words name no header that is still here.
    if options <= {"", "close", "keep-alive", "upgrade"}:
        return headers
    options.discard("host")
    return [pair for pair in headers if pair[0].lower() not in options]


def _forwarded(before: dict[str, str], forwarding: Forwarding) -> Headers:
    """Say who asked. What an untrusted peer claimed was forgotten, or anybody could be anybody."""
    chain = [part for part in (before.get("x-forwarded-for"), forwarding.address) if part]
    said = [("X-Forwarded-For", ", ".join(chain))] if chain else []
    said.append(("X-Forwarded-Proto", before.get("x-forwarded-proto") or forwarding.scheme))
    said.append(("X-Forwarded-Host", before.get("x-forwarded-host") or forwarding.host))
    return said
