"""What an answer proves, and whose fault an error is."""

import json
from pathlib import Path

import pytest

from gpulane.adapters.a1111.answers import (
    TAIL_BYTES,
    Info,
    Tail,
    failure_of,
    ran_other_model,
    read_info,
    wrong_model,
)
from gpulane.core.model import FailureKind


def answer(prompt: str = "a cat", images: int = 1, size: int = 1000) -> bytes:
    info = json.dumps(
        {"prompt": prompt, "sd_model_name": "tinyA", "sd_model_hash": None, "infotexts": [prompt]}
    )
    body = {"images": ["A" * size] * images, "parameters": {"prompt": prompt}, "info": info}
    return json.dumps(body, separators=(",", ":")).encode()


def fed(body: bytes, step: int) -> bytes:
    tail = Tail()
    for start in range(0, len(body), step):
        tail.feed(body[start : start + step])
    return tail.bytes()


@pytest.mark.parametrize("step", [1000, 65536, 10**9])
def test_the_checkpoint_is_read_from_the_end(step: int) -> None:
    body = answer('tricky "info":"no" \\" ', images=3, size=400_000)
    tail = fed(body, step)
    assert body.endswith(tail) and TAIL_BYTES <= len(tail) <= 2 * TAIL_BYTES
    info = read_info(tail)
    assert info is not None and info.sd_model_name == "tinyA"


def test_blanks_after_the_colon_do_no_harm() -> None:
    assert read_info(b'{"images": [], "info": "{\\"sd_model_name\\": \\"x\\"}"}') == Info(sd_model_name="x")


def test_what_cannot_be_read_proves_nothing() -> None:
    for body in (b"", b"{}", b'{"info":"', b'{"info":"x"}', b'{"images":[]}', answer()[-20:]):
        assert read_info(body) is None
    assert not ran_other_model("tinyA.safetensors", None)


def test_the_stem_is_compared() -> None:
    info = Info(sd_model_name="tinyB")
    assert not ran_other_model("xl/tinyB.safetensors", info)
    assert ran_other_model("tinyA.safetensors", info)
    assert not ran_other_model("", info)
    assert wrong_model("tinyA.safetensors", info).code == "wrong_model"


@pytest.mark.parametrize(
    ("status", "body", "kind", "code"),
    [
        (
            500,
            {"error": "OutOfMemoryError", "errors": "CUDA out of memory. Tried"},
            FailureKind.ENGINE,
            "out_of_memory",
        ),
        (
            500,
            {"error": "RuntimeError", "errors": "CUDA error: an illegal memory access"},
            FailureKind.ENGINE,
            "gpu_broken",
        ),
        (
            500,
            {"error": "NansException", "errors": "A tensor with all NaNs"},
            FailureKind.ENGINE,
            "engine_failed",
        ),
        (500, {"error": "RuntimeError", "errors": "model 'x' not found"}, FailureKind.CLIENT, "refused"),
        (500, {"error": "KeyError", "errors": "'no_such_option'"}, FailureKind.CLIENT, "refused"),
        (500, {"error": "HTTPException", "detail": "Invalid encoded image"}, FailureKind.CLIENT, "refused"),
        (422, {"detail": [{"loc": ["body"], "msg": "x", "type": "y"}]}, FailureKind.CLIENT, "refused"),
        (404, {"detail": "Not Found"}, FailureKind.CLIENT, "refused"),
        (401, {"detail": "Not authenticated"}, FailureKind.NOT_STARTED, "engine_auth"),
        (502, {}, FailureKind.ENGINE, "engine_unavailable"),
    ],
)
def test_whose_fault(status: int, body: object, kind: FailureKind, code: str) -> None:
    failure = failure_of(status, json.dumps(body).encode())
    assert failure is not None and (failure.kind, failure.code) == (kind, code)


def test_an_error_that_is_no_json() -> None:
    failure = failure_of(500, b"Internal Server Error")
    assert failure is not None and "Internal Server Error" in failure.message


def test_every_recorded_500_is_the_clients(shared: Path) -> None:
    recorded = json.loads((shared / "recordings/a1111/basic_post.json").read_text())
    for entry in recorded:
        failure = failure_of(entry["status"], json.dumps(entry["response"]).encode())
        assert (failure is None) == (entry["status"] == 200)
        if failure is not None:
            assert failure.kind is FailureKind.CLIENT, entry["name"]


def test_a_recorded_answer(shared: Path) -> None:
    document = json.loads((shared / "recordings/a1111/txt2img_full_response.json").read_text())
    body = json.dumps(document, separators=(",", ":")).encode()
    assert read_info(fed(body, 4096)) == Info(
        sd_model_name="tinyA", job_timestamp="20261121190636", version="1.10.1"
    )
