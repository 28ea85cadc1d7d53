"""Entries of the history: files, failures, times; and ids put right for whoever asks."""

import json
from pathlib import Path
from typing import Any

import pytest

from gpulane.adapters.comfyui.result import (
    ExecutionError,
    Verdict,
    content_type_of,
    failure_of,
    files_of,
    read_entry,
)
from gpulane.adapters.comfyui.rewrite import (
    frame_type,
    plain_preview,
    preview_of,
    rewrite_entry,
    rewrite_frame,
    rewrite_message,
    text_of,
)
from gpulane.core.model import FailureKind, JobId

JOB = JobId("c72bac4e-fb15-4d8b-9505-539657dcc911")
VERSIONS = ["0.3.64", "0.27.0"]


def history(shared: Path, version: str, name: str) -> dict[str, Any]:
    recording = json.loads((shared / "recordings" / "comfyui" / version / f"{name}.json").read_text())
    found: dict[str, Any] = {}
    for exchange in recording["http"]:
        if "/history/" in exchange["request"]["path"] and isinstance(exchange["body"], dict):
            found |= exchange["body"]
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_recorded_success(shared: Path, version: str) -> None:
    for value in history(shared, version, "run_basic_and_cached").values():
        ended = read_entry(json.dumps(value).encode())
        assert ended.verdict is Verdict.SUCCESS
        assert {file.node for file in ended.files} == {"3", "4"}
        assert {file.is_temporary for file in ended.files} == {True, False}
        assert ended.seconds is not None
        assert 0 <= ended.seconds < 1


@pytest.mark.parametrize("version", VERSIONS)
def test_recorded_error(shared: Path, version: str) -> None:
    (value,) = history(shared, version, "exec_error").values()
    ended = read_entry(json.dumps(value).encode())
    assert ended.verdict is Verdict.ERROR
    failure = failure_of(ended.error)
    assert (failure.kind, failure.code) == (FailureKind.ENGINE, "execution_error")
    assert failure.message == "GWRaise (node 3): boom"


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (
            ExecutionError("3", "KSampler", "Allocation failed", "torch.OutOfMemoryError"),
            "out_of_memory",
            "KSampler",
        ),
        (ExecutionError("3", "K", "CUDA out of memory. Tried", "RuntimeError"), "out_of_memory", "Tried"),
        (ExecutionError("3", "K", "CUDA error: device-side assert", "RuntimeError"), "gpu_error", "assert"),
        (ExecutionError(None, None, "", "KeyError"), "execution_error", "KeyError"),
        (None, "execution_error", "reported an error"),
    ],
)
def test_failures(error: ExecutionError | None, code: str, text: str) -> None:
    failure = failure_of(error)
    assert failure.code == code
    assert text in failure.message


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("No such file: '/srv/comfyui/models/x.safetensors'", "No such file: 'x.safetensors'"),
        ("in C:\\ComfyUI\\models\\x.pt, line 3", "in x.pt, line 3"),
        ("expected 3/4 of 1/2", "expected 3/4 of 1/2"),
        ("shapes 64x64 and 32x32", "shapes 64x64 and 32x32"),
    ],
)
def test_paths_of_the_engine_are_not_shown(message: str, shown: str) -> None:
    assert failure_of(ExecutionError(None, None, message, "X")).message == shown


def test_names_of_files_are_encoded_and_listed_once() -> None:
    item = {"filename": "a b&c=ü.png", "subfolder": "x/y", "type": "output"}
    outputs: dict[str, Any] = {"9": {"images": [item, item], "text": ["t"]}, "1": {"images": [{}, None]}}
    (file,) = files_of(outputs)
    assert file.target == "/view?filename=a+b%26c%3D%C3%BC.png&subfolder=x%2Fy&type=output"


def test_content_types() -> None:
    assert content_type_of("x.WEBM") == "video/webm"
    assert content_type_of("x") == "application/octet-stream"


@pytest.mark.parametrize(
    "outputs", [None, [], {"1": None}, {"1": {"images": {}}}, {"1": {"images": [{"filename": 1}]}}]
)
def test_strange_outputs_have_no_files(outputs: object) -> None:
    assert files_of(outputs) == ()


def test_status_word_alone_does_not_decide() -> None:
    status: dict[str, Any] = {
        "status_str": "success",
        "messages": [["execution_start", {}], ["execution_error", {"node_id": "1"}]],
    }
    assert read_entry(json.dumps({"status": status, "outputs": {}}).encode()).verdict is Verdict.ERROR
    assert read_entry(b'{"status":null,"outputs":{}}').verdict is Verdict.SUCCESS
    assert read_entry(b'{"status":{"status_str":"error"}}').verdict is Verdict.ERROR


# --- ids ----------------------------------------------------------------------------------------------------


def test_message_gets_the_clients_id_everywhere() -> None:
    raw = json.dumps(
        {"type": "progress_state", "data": {"prompt_id": JOB, "nodes": {"1": {"prompt_id": JOB}}}}
    ).encode()
    value = json.loads(rewrite_message(raw, job=JOB, prompt_id='my "own"'))
    assert value["data"]["prompt_id"] == value["data"]["nodes"]["1"]["prompt_id"] == 'my "own"'
    assert rewrite_message(raw, job=JOB, prompt_id=JOB) is raw


def test_preview_frame_gets_the_clients_id() -> None:
    metadata = json.dumps({"prompt_id": JOB, "node_id": "3", "image_type": "image/jpeg"}).encode()
    frame = (4).to_bytes(4) + len(metadata).to_bytes(4) + metadata + b"\xff\xd8picture"
    assert preview_of(frame) == (b"\xff\xd8picture", "image/jpeg")
    mine = rewrite_frame(frame, job=JOB, prompt_id="a")
    length = int.from_bytes(mine[4:8])
    assert json.loads(mine[8 : 8 + length])["prompt_id"] == "a"
    assert preview_of(mine) == preview_of(frame)
    plain = plain_preview(frame)
    assert plain == b"\0\0\0\1\0\0\0\1\xff\xd8picture"
    assert preview_of(plain) == preview_of(frame)
    text = (3).to_bytes(4) + (1).to_bytes(4) + b"7" + "größe".encode()
    assert (text_of(text), preview_of(text), frame_type(text)) == ("größe", None, 3)
    assert rewrite_frame(text, job=JOB, prompt_id="a") is text


@pytest.mark.parametrize("frame", [b"", b"\0", b"\0\0\0\4", b"\0\0\0\4\0\0\0\xff", b"\0\0\0\1", b"\0\0\0\3"])
def test_short_frames_are_nothing(frame: bytes) -> None:
    assert preview_of(frame) is None
    rewrite_frame(frame, job=JOB, prompt_id="a")


def test_entry_is_made_the_clients_own() -> None:
    extra: Any = {"client_id": "gpulane-1", "auth_token_comfy_org": "hush", "extra_pnginfo": {"workflow": {}}}
    value: dict[str, Any] = {
        "prompt": [12, JOB, {"1": {"class_type": "A", "inputs": {}}}, extra, ["1"]],
        "outputs": {},
        "status": {"status_str": "success", "messages": [["execution_start", {"prompt_id": JOB}]]},
    }
    raw = rewrite_entry(json.dumps(value).encode(), job=JOB, prompt_id="mine", client_id="tab", number=3.0)
    assert b"hush" not in raw
    assert JOB.encode() not in raw
    mine = json.loads(raw)
    assert mine["prompt"][:2] == [3.0, "mine"]
    assert mine["prompt"][3] == {"extra_pnginfo": {"workflow": {}}, "client_id": "tab"}
    assert mine["status"]["messages"][0][1]["prompt_id"] == "mine"
    raw = rewrite_entry(json.dumps(value).encode(), job=JOB, prompt_id=JOB, client_id=None)
    assert "client_id" not in json.loads(raw)["prompt"][3]
    assert rewrite_entry(b'{"outputs":{}}', job=JOB, prompt_id="x", client_id=None) == b'{"outputs":{}}'
