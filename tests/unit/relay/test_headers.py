"""The header rules as a table."""

from __future__ import annotations

import pytest

from gpulane.relay import Forwarding, HeaderRules

Pairs = list[tuple[str, str]]
RULES = HeaderRules(engine_host="127.0.0.1:8188", prefix="/comfy", dropped=frozenset({"x-api-key"}))
ASKED = Forwarding(address="10.0.0.7", scheme="https", host="gpu.example")
SAID = [
    ("X-Forwarded-For", "10.0.0.7"),
    ("X-Forwarded-Proto", "https"),
    ("X-Forwarded-Host", "gpu.example"),
]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ([("Accept", "*/*"), ("accept-encoding", "br")], [("Accept", "*/*"), ("accept-encoding", "br")]),
        ([("Cookie", "a=1"), ("Cookie", "b=2")], [("Cookie", "a=1"), ("Cookie", "b=2")]),
        ([("Range", "bytes=1-"), ("If-None-Match", "x")], [("Range", "bytes=1-"), ("If-None-Match", "x")]),
        ([("Host", "gpu.example"), ("HOST", "other")], []),
        ([("Origin", "https://gpu.example"), ("Referer", "x"), ("Sec-Fetch-Site", "cross-site")], []),
        ([("Sec-Fetch-Mode", "cors"), ("Sec-Fetch-Dest", "empty"), ("Sec-Fetch-User", "?1")], []),
        ([("Connection", "keep-alive"), ("Keep-Alive", "9"), ("TE", "trailers"), ("Trailer", "X")], []),
        ([("Connection", "close, X-One"), ("connection", "x-two")], []),
        ([("Connection", "X-One"), ("X-ONE", "1"), ("X-Two", "2")], [("X-Two", "2")]),
        ([("Proxy-Authorization", "Basic x"), ("Proxy-Connection", "close")], []),
        ([("Content-Length", "3"), ("Transfer-Encoding", "chunked")], []),
        ([("Content-Encoding", "gzip")], [("Content-Encoding", "gzip")]),
        ([("Expect", "100-continue"), ("Upgrade", "h2c"), ("HTTP2-Settings", "x")], []),
        ([("X-Api-Key", "secret"), ("Authorization", "Basic x")], [("Authorization", "Basic x")]),
        ([("X-Forwarded-For", "6.6.6.6"), ("X-Real-IP", "6.6.6.6"), ("Forwarded", "for=6.6.6.6")], []),
    ],
)  # fmt: skip
def test_what_an_engine_sees(given: Pairs, kept: Pairs) -> None:
    assert RULES.for_engine(given, ASKED) == [("Host", "127.0.0.1:8188"), *kept, *SAID]


def test_a_trusted_proxy_is_believed() -> None:
    asked = Forwarding(address="10.0.0.7", scheme="http", host="inner", is_trusted=True)
    given = [
        ("X-Forwarded-For", "1.1.1.1"),
        ("x-forwarded-for", "2.2.2.2"),
        ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-Host", "outer"),
    ]
    assert RULES.for_engine(given, asked)[1:] == [
        ("X-Forwarded-For", "1.1.1.1, 2.2.2.2, 10.0.0.7"),
        ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-Host", "outer"),
    ]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ([("Content-Length", "3"), ("ETag", "x")], [("ETag", "x")]),
        ([("Transfer-Encoding", "chunked"), ("Connection", "close, X-Hop"), ("X-Hop", "1")], []),
        ([("Set-Cookie", "a=1"), ("set-cookie", "b=2")], [("Set-Cookie", "a=1"), ("set-cookie", "b=2")]),
        ([("Content-Encoding", "gzip"), ("Vary", "x")], [("Content-Encoding", "gzip"), ("Vary", "x")]),
        ([("Upgrade", "h2c"), ("Keep-Alive", "timeout=5"), ("Trailer", "X")], []),
        ([("Sec-WebSocket-Accept", "x")], [("Sec-WebSocket-Accept", "x")]),
    ],
)
def test_what_a_client_sees(given: Pairs, kept: Pairs) -> None:
    assert RULES.for_client(given) == kept


@pytest.mark.parametrize(
    ("location", "rewritten"),
    [
        ("/login", "/comfy/login"),
        ("/", "/comfy/"),
        ("login", "login"),
        ("http://127.0.0.1:8188/a?b", "/comfy/a?b"),
        ("http://127.0.0.1:8188", "/comfy/"),
        ("http://127.0.0.1:81889/a", "http://127.0.0.1:81889/a"),
        ("https://elsewhere/a", "https://elsewhere/a"),
        ("//elsewhere/a", "//elsewhere/a"),
    ],
)
def test_redirects_lead_back_to_us(location: str, rewritten: str) -> None:
    assert RULES.for_client([("Location", location)]) == [("Location", rewritten)]
