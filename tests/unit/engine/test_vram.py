"""What ComfyUI and A1111 tell of their card, and what of it is not to be believed."""

import msgspec
import pytest

from gpulane.adapters.a1111.status import Memory
from gpulane.engine.base import Vram
from gpulane.engine.comfyui.description import read_vram


def stats(**device: object) -> bytes:
    return msgspec.json.encode({"system": {}, "devices": [device]})


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (
            stats(type="cuda", vram_total=100, vram_free=60, torch_vram_total=50, torch_vram_free=20),
            Vram(bytes_free=40, bytes_total=100),
        ),
        (stats(type="cuda", vram_total=100, vram_free=60), Vram(bytes_free=60, bytes_total=100)),
        (
            stats(type="cuda", vram_total=100, vram_free=10, torch_vram_free=20),
            Vram(bytes_free=0, bytes_total=100),
        ),
        (stats(type="xpu", vram_total=9, vram_free=3, torch_vram_free=0), Vram(bytes_free=3, bytes_total=9)),
        (stats(type="cuda", vram_total=100), Vram(bytes_total=100)),
        (stats(type="cpu", vram_total=100, vram_free=60, torch_vram_free=60), Vram()),
        (stats(type="mps", vram_total=100, vram_free=60, torch_vram_free=60), Vram()),
        (stats(type="privateuseone", vram_total=2**30, vram_free=2**30), Vram()),
        (stats(type="cuda", vram_total=0, vram_free=0), Vram()),
        (stats(), Vram()),
        (b'{"devices":[]}', Vram()),
        (b'{"devices":null}', Vram()),
        (b"not json", Vram()),
        (b"\xff", Vram()),
    ],
)
def test_of_comfyui(answer: bytes, expected: Vram) -> None:
    assert read_vram(answer) == expected


@pytest.mark.parametrize(
    ("cuda", "card", "held"),
    [
        (
            {"system": {"free": 1e9, "used": 2e9, "total": 3e9}, "allocated": {"current": 5.0, "peak": 6.0}},
            (10**9, 3 * 10**9),
            5,
        ),
        ({"error": "unavailable"}, None, None),
        ({"system": {"free": 1e9}}, None, None),
        ({"system": "x", "allocated": {"current": "much"}}, None, None),
        ({}, None, None),
    ],
)
def test_of_a1111(cuda: dict[str, object], card: tuple[int, int] | None, held: int | None) -> None:
    answer = msgspec.json.decode(msgspec.json.encode({"ram": {}, "cuda": cuda}), type=Memory)
    assert (answer.card(), answer.held()) == (card, held)
