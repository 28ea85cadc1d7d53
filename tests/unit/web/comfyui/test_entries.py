"""Queue items, history entries and lists, written from records."""

from __future__ import annotations

import msgspec
import pytest

from gpulane.adapters.base import EngineRequest, encode_request
from gpulane.adapters.comfyui.prompt import PromptMeta, parse_prompt
from gpulane.core.model import Account, Job, JobId, JobState, Service
from gpulane.errors import NotFound
from gpulane.store.base import JobRecord
from gpulane.web.comfyui import entries, frames
from gpulane.web.comfyui.files import copied_name, read_wanted
from gpulane.web.comfyui.lists import merged_stats, shared_features
from gpulane.web.comfyui.orders import paged
from gpulane.web.comfyui.own import leaves_trace, number_of, shown_id

JOB = JobId("6f8f2f5e-9d5b-4c0e-8f3c-2f6d0c1b7a11")


def record(state: JobState = JobState.QUEUED, meta: PromptMeta | None = None, **more: object) -> JobRecord:
    job = Job(id=JOB, account=Account("ann"), service=Service.COMFYUI, kind="prompt", arrival=41)
    fields: dict[str, object] = {"job": job, "state": state, "v": 41, "submitted_at": 12.5} | more
    return JobRecord(meta=msgspec.json.encode(meta or PromptMeta()), **fields)  # pyright: ignore[reportArgumentType]


def stored(body: bytes) -> bytes:
    return encode_request(parse_prompt(body, job=JOB).request)


def test_numbers_keep_the_clients_order() -> None:
    assert number_of(record()) == 41
    assert number_of(record(meta=PromptMeta(priority=1))) == -41
    assert number_of(record(meta=PromptMeta(number=-99.5, priority=1))) == -99.5
    assert number_of(JobRecord(job=record().job, state=JobState.QUEUED, v=1, meta=b"?")) == 41


def test_queue_item_has_no_secrets_and_the_clients_ids() -> None:
    body = (
        b'{"prompt":{"1":{"class_type":"SaveImage","inputs":{}},"2":{"class_type":"X","inputs":{}}},'
        b'"extra_data":{"auth_token_comfy_org":"secret","note":"kept"}}'
    )
    shown = record(meta=PromptMeta(client_id="c1"), client_job_id="mine")
    item = entries.queue_item(shown, stored(body), frozenset({"SaveImage"}))
    number, prompt_id, _, extra, outputs = [msgspec.json.decode(part) for part in item]
    assert (number, prompt_id, outputs) == (41, "mine", ["1"])
    assert extra == {"note": "kept", "client_id": "c1", "create_time": 12500}


@pytest.mark.parametrize(
    "body", [None, b"no head", encode_request(EngineRequest(method="POST", target="/", body=b"?"))]
)
def test_queue_item_of_a_lost_body_is_empty(body: bytes | None) -> None:
    assert msgspec.json.decode(entries.queue_item(record(), body, frozenset())[2]) == {}


def test_only_what_ran_or_failed_leaves_a_trace() -> None:
    assert not leaves_trace(record(JobState.CANCELLED))
    assert leaves_trace(record(JobState.CANCELLED, attempts_counted=1))
    assert leaves_trace(record(JobState.FAILED))
    assert shown_id(record()) == JOB


def test_saved_pictures_are_shown_before_temporary_ones() -> None:
    outputs = {
        "1": {"images": [{"filename": "t.png", "subfolder": "", "type": "temp"}], "animated": [True]},
        "2": {"images": [{"filename": "s.png", "subfolder": "", "type": "output"}], "text": ["x"]},
        "3": None,
    }
    entry = entries.Entry(
        prompt=entries.queue_item(record(), None, frozenset()),
        outputs=msgspec.Raw(msgspec.json.encode(outputs)),
    )
    fields = entries.ended_entry(record(JobState.SUCCEEDED), entry).fields
    assert fields["outputs_count"] == 3
    preview = fields["preview_output"]
    assert isinstance(preview, dict)
    assert preview["filename"] == "s.png"


def test_our_own_endings_have_the_engines_fields() -> None:
    error = frames.ending_data(JobState.FAILED, "p", None, 7)
    assert set(error) == {
        "prompt_id",
        "node_id",
        "node_type",
        "executed",
        "exception_message",
        "exception_type",
        "traceback",
        "current_inputs",
        "current_outputs",
        "timestamp",
    }
    interrupted = frames.ending_data(JobState.CANCELLED, "p", None, 7)
    assert set(interrupted) == {"prompt_id", "node_id", "node_type", "executed", "timestamp"}
    assert frames.ending_data(JobState.SUCCEEDED, "p", None, 7) == {"prompt_id": "p", "timestamp": 7}


def test_pages_are_comfyuis() -> None:
    every = [record(v=number) for number in range(5)]
    assert paged(every, None, -1) == every
    assert paged(every, 2, -1) == every[3:]
    assert paged(every, 2, 0) == every[:2]
    assert paged(every, 2, 4) == every[4:]
    assert paged(every, -1, -1) == []


def test_features_are_what_all_have_and_we_pass_on() -> None:
    modern: dict[str, object] = {
        "supports_preview_metadata": True,
        "max_upload_size": 5,
        "extension": {"manager": {"supports_v4": True}},
        "node_replacements": True,
        "assets": True,
        "supports_progress_text_metadata": True,
    }
    assert shared_features([]) == {"supports_preview_metadata": True, "max_upload_size": 104857600}
    assert shared_features([modern]) == {
        "supports_preview_metadata": True,
        "max_upload_size": 104857600,
        "node_replacements": True,
        "assets": False,
    }
    assert "node_replacements" not in shared_features([modern, {"supports_preview_metadata": True}])


def test_devices_of_all_engines_are_numbered_anew() -> None:
    one = msgspec.json.encode({"system": {"argv": ["main.py"]}, "devices": [{"name": "a", "index": 0}]})
    two = msgspec.json.encode({"system": {}, "devices": [{"name": "b", "index": 0}]})
    merged = merged_stats([one, b"?", two], with_arguments=True)
    assert merged is not None
    stats = msgspec.json.decode(merged)
    assert [(device["name"], device["index"]) for device in stats["devices"]] == [("a", 0), ("b", 1)]
    assert stats["system"]["argv"] == ["main.py"]
    assert merged_stats([b"?"], with_arguments=True) is None


@pytest.mark.parametrize(
    "query", ["filename=..", "filename=a&subfolder=..", "filename=/a", "filename=a%00b", "x=1"]
)
def test_paths_that_are_no_names_are_refused(query: str) -> None:
    with pytest.raises(NotFound):
        read_wanted(query)


def test_names_may_say_their_folder() -> None:
    wanted = read_wanted("filename=x.png+%5Btemp%5D&subfolder=a%2Fb&channel=rgb")
    assert (wanted.filename, wanted.subfolder, wanted.kind, wanted.is_changed) == (
        "x.png",
        "a/b",
        "temp",
        True,
    )
    assert not read_wanted("filename=x.png&rand=0.5&channel=rgba").is_changed
    assert copied_name('a"b\r\né.png') == "a'b?.png"
