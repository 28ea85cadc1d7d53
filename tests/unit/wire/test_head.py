"""The head of a request cannot be made to say two things."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpulane.wire import RefusedRequest
from gpulane.wire.head import Framing, parse_origin, request_head

NO_BODY = Framing(has_body=False)


@pytest.mark.parametrize(
    ("url", "authority", "base"),
    [
        ("http://127.0.0.1:8188", "127.0.0.1:8188", ""),
        ("http://gpu.local", "gpu.local", ""),
        ("http://gpu.local:80/", "gpu.local", ""),
        ("https://gpu.local:443/a/b/", "gpu.local", "/a/b"),
        ("http://[::1]:8188", "[::1]:8188", ""),
    ],
)
def test_origins(url: str, authority: str, base: str) -> None:
    origin = parse_origin(url)
    assert (origin.authority, origin.base) == (authority, base)


@pytest.mark.parametrize("url", ["", "8188", "ftp://x", "http://", "http://x?y", "http://x:port", "//x"])
def test_what_is_no_origin(url: str) -> None:
    with pytest.raises(ValueError):
        parse_origin(url)


@pytest.mark.parametrize(
    ("method", "framing", "line"),
    [
        ("GET", NO_BODY, ""),
        ("DELETE", NO_BODY, ""),
        ("POST", NO_BODY, "Content-Length: 0\r\n"),
        ("POST", Framing(has_body=True, length=3), "Content-Length: 3\r\n"),
        ("GET", Framing(has_body=True, length=3), "Content-Length: 3\r\n"),
        ("PUT", Framing(has_body=True), "Transfer-Encoding: chunked\r\n"),
    ],
)
def test_exactly_one_length_whatever_was_given(method: str, framing: Framing, line: str) -> None:
    headers = (("Content-length", "7"), ("transfer-encoding", "chunked"), ("A", "b"))
    head = request_head(method, "/", "h:1", headers, framing)
    assert head.decode() == f"{method} / HTTP/1.1\r\nHost: h:1\r\nA: b\r\n{line}\r\n"


@pytest.mark.parametrize(
    ("method", "target", "header"),
    [
        ("GET", "/a b", ("A", "b")),
        ("GET", "/a\r\nB: c", ("A", "b")),
        ("GET", "a", ("A", "b")),
        ("GET", "http://h/", ("A", "b")),
        ("GE T", "/", ("A", "b")),
        ("", "/", ("A", "b")),
        ("GET", "/", ("A", "b\r\nC: d")),
        ("GET", "/", ("A", "b\nC: d")),
        ("GET", "/", ("A", "b\0")),
        ("GET", "/", ("A\r\nB", "c")),
        ("GET", "/", ("A ", "b")),
        ("GET", "/", ("A:", "b")),
        ("GET", "/", ("", "b")),
        ("GET", "/", ("Ä", "b")),
    ],
)
def test_what_could_be_read_as_something_else_is_refused(
    method: str, target: str, header: tuple[str, str]
) -> None:
    with pytest.raises(RefusedRequest) as caught:
        request_head(method, target, "h", (header,), NO_BODY)
    assert not caught.value.sent


@given(st.text(), st.text(), st.lists(st.tuples(st.text(), st.text())))
def test_no_text_makes_a_second_line(method: str, target: str, headers: list[tuple[str, str]]) -> None:
    try:
        head = request_head(method, target, "h", headers, Framing(has_body=True, length=1))
    except (RefusedRequest, UnicodeEncodeError):
        return
    lines = head.split(b"\r\n")
    named = [name.lower() for name, _ in headers]
    kept = [name for name in named if name not in {"content-length", "transfer-encoding"}]
    assert len(lines) == len(kept) + ("host" not in named) + 4
    assert lines[-2:] == [b"", b""]
