"""How servers that can unload are told apart, and what they are sent."""

import msgspec
import pytest

from gpulane.adapters.http.unloading import MODELS_MAX, detected, loaded_models, ollama_unload
from gpulane.config.unloading import KnownUnload

OLLAMA = b'{"version":"0.12.6"}'
LLAMA_SWAP = b'{"version":"216","commit":"0046040","build_date":"2026-08-22"}'
RUNNING = b'{"running":[{"model":"a","state":"ready","cmd":"x"}]}'


@pytest.mark.parametrize(
    ("running", "version", "expected"),
    [
        (None, OLLAMA, KnownUnload.OLLAMA),
        (RUNNING, LLAMA_SWAP, KnownUnload.LLAMA_SWAP),
        (b'{"running":[]}', None, KnownUnload.LLAMA_SWAP),
        (None, LLAMA_SWAP, None),
        (None, None, None),
        (b"<html>", b"<html>", None),
        (b'{"running":1}', b'{"version":1}', None),
        (b"[" * 9999, b"[" * 9999, None),
        (b"\xff", b"\xff", None),
    ],
)
def test_who_it_is(running: bytes | None, version: bytes | None, expected: KnownUnload | None) -> None:
    assert detected(running, version) is expected


def test_what_ollama_has_loaded() -> None:
    answer = b'{"models":[{"name":"a:latest","model":"a:latest","size_vram":1},{"name":"b"},{}]}'
    assert loaded_models(answer) == ("a:latest", "b")
    assert loaded_models(b'{"models":null}') == loaded_models(b"{}") == ()
    assert len(loaded_models(msgspec.json.encode({"models": [{"name": "x"}] * 500}))) == MODELS_MAX
    with pytest.raises(msgspec.DecodeError):
        loaded_models(b"[]")


def test_an_unload_computes_nothing() -> None:
    request = ollama_unload("a")
    assert (request.method, request.target) == ("POST", "/api/generate")
    assert request.body == b'{"model":"a","keep_alive":0}'
