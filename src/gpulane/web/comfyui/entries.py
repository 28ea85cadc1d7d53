"""Writes jobs as ComfyUI shows them: queue items, history entries, entries of /api/jobs, with the ids that
clients know. Pure.

Sign-in secrets of extra_data and the gateway's own socket id never get out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, cast

import msgspec

from gpulane.adapters.base import decode_request
from gpulane.adapters.comfyui.prompt import SECRETS
from gpulane.adapters.comfyui.rewrite import rewrite_message
from gpulane.core.model import JobState
from gpulane.engine.base import RecordedResult
from gpulane.store.base import JobRecord
from gpulane.web.comfyui import frames
from gpulane.web.comfyui.own import meta_of, milliseconds, number_of, shown_id

PREVIEWABLE: Final = frozenset({"images", "video", "audio", "3d", "text"})
"""What /api/jobs counts as outputs."""

OUTPUTS_UNKNOWN: Final = msgspec.Raw(b"[]")
NO_PROMPT: Final = msgspec.Raw(b"{}")
"""In the place of a prompt whose body is gone, or was not looked for."""


class _Body(msgspec.Struct):
    prompt: msgspec.Raw = NO_PROMPT
    extra_data: dict[str, msgspec.Raw] = msgspec.field(default_factory=dict[str, msgspec.Raw])


class _Node(msgspec.Struct):
    class_type: str = ""


class Status(msgspec.Struct):
    """How a run went, in ComfyUI's words."""

    status_str: str = "error"
    completed: bool = False
    messages: list[tuple[str, msgspec.Raw]] = msgspec.field(default_factory=list[tuple[str, msgspec.Raw]])


class Entry(msgspec.Struct):
    """One entry of /history."""

    prompt: list[msgspec.Raw] = msgspec.field(default_factory=list[msgspec.Raw])
    """number, prompt id, prompt, extra_data, outputs to execute; empty when the engine's history was cleared
    too early
    """
    outputs: msgspec.Raw = msgspec.Raw(b"{}")
    status: Status | None = None
    meta: msgspec.Raw = msgspec.Raw(b"{}")


# --- queue items ----------------------------------------------------------------------------------


def queue_item(record: JobRecord, stored: bytes | None, output_classes: frozenset[str]) -> list[msgspec.Raw]:
    """Write `[number, prompt_id, prompt, extra_data, outputs_to_execute]`."""
    body = _read_body(stored)
    return [
        _raw(number_of(record)),
        _raw(shown_id(record)),
        body.prompt,
        _raw(_extra_data(record, body.extra_data)),
        _outputs_of(body.prompt, output_classes),
    ]


def _read_body(stored: bytes | None) -> _Body:
    if stored is None:
        return _Body()
    try:
        return msgspec.json.decode(decode_request(stored).body, type=_Body)
    except (msgspec.DecodeError, RecursionError):
        return _Body()


def _extra_data(record: JobRecord, extra: dict[str, msgspec.Raw]) -> dict[str, object]:
    shown: dict[str, object] = {key: value for key, value in extra.items() if key not in SECRETS}
    shown.pop("client_id", None)
    client_id = meta_of(record).client_id
    if client_id is not None:
        shown["client_id"] = client_id
    shown["create_time"] = milliseconds(record.submitted_at)
    return shown


def _outputs_of(prompt: msgspec.Raw, output_classes: frozenset[str]) -> msgspec.Raw:
    try:
        nodes = msgspec.json.decode(prompt, type=dict[str, _Node])
    except (msgspec.DecodeError, RecursionError):
        return OUTPUTS_UNKNOWN
    return _raw([name for name, node in nodes.items() if node.class_type in output_classes])


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))


# --- history --------------------------------------------------------------------------------------


def history_entry(
    record: JobRecord, result: RecordedResult | None, stored: bytes | None, output_classes: frozenset[str]
) -> Entry:
    """Write an ended job's entry: the engine's own one with the client's ids, or one of ours when no engine
    has one.
    """
    entry = _engine_entry(record, result)
    try:
        _, _, prompt, extra, outputs = entry.prompt
        extra_data = msgspec.json.decode(extra, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, ValueError, RecursionError):
        entry.prompt = queue_item(record, stored, output_classes)
    else:
        shown_extra = _raw(_extra_data(record, extra_data))
        entry.prompt = [_raw(number_of(record)), _raw(shown_id(record)), prompt, shown_extra, outputs]
    is_overruled = record.state is JobState.CANCELLED and not _says(entry, "execution_interrupted")
    if entry.status is None or is_overruled:  # a wanted cancel wins over what the engine made of it
        entry.status = _made_status(record)
    return entry


def _engine_entry(record: JobRecord, result: RecordedResult | None) -> Entry:
    if result is None:
        return Entry()
    document = rewrite_message(bytes(result.document), job=record.job.id, prompt_id=shown_id(record))
    try:
        return msgspec.json.decode(document, type=Entry)
    except (msgspec.DecodeError, RecursionError):
        return Entry()


def _made_status(record: JobRecord) -> Status:
    ended_at = milliseconds(record.finished_at or record.submitted_at)
    data = frames.ending_data(record.state, shown_id(record), record.failure, ended_at)
    is_success = record.state is JobState.SUCCEEDED
    return Status(
        status_str="success" if is_success else "error",
        completed=is_success,
        messages=[(frames.ENDING[record.state], _raw(data))],
    )


def _says(entry: Entry, kind: str) -> bool:
    return entry.status is not None and any(name == kind for name, _ in entry.status.messages)


# --- /api/jobs ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEntry:
    """One entry of /api/jobs."""

    workflow_id: str | None
    fields: dict[str, object]


STATUSES: Final = ("pending", "in_progress", "completed", "failed", "cancelled")
_STATUS_OF: Final = {
    JobState.QUEUED: "pending",
    JobState.WAITING_RETRY: "pending",
    JobState.RUNNING: "in_progress",
    JobState.SUCCEEDED: "completed",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "cancelled",
}


def job_status(record: JobRecord) -> str:
    return _STATUS_OF[record.state]


def unended_entry(record: JobRecord, item: list[msgspec.Raw]) -> JobEntry:
    """Write a waiting or running job."""
    return _entry(record, _workflow_id(item[3]), {"outputs_count": 0})


def ended_entry(record: JobRecord, entry: Entry) -> JobEntry:
    """Write an ended job, without its workflow."""
    started = milliseconds(record.started_at) if record.started_at else None
    ended = milliseconds(record.finished_at) if record.finished_at else None
    fields: dict[str, object] = {"execution_start_time": started, "execution_end_time": ended}
    messages = dict(entry.status.messages) if entry.status else {}
    if "execution_error" in messages:
        fields["execution_error"] = messages["execution_error"]
    count, preview = _summary(entry.outputs)
    fields["outputs_count"] = count
    if preview is not None:
        fields["preview_output"] = preview
    return _entry(record, _workflow_id(entry.prompt[3]), fields)


def whole_entry(job: JobEntry, entry: Entry) -> dict[str, object]:
    """Write an ended job with everything."""
    return job.fields | {
        "outputs": entry.outputs,
        "execution_status": entry.status,
        "workflow": {"prompt": entry.prompt[2], "extra_data": entry.prompt[3]},
    }


def _entry(record: JobRecord, workflow_id: str | None, fields: dict[str, object]) -> JobEntry:
    head: dict[str, object] = {
        "id": shown_id(record),
        "status": job_status(record),
        "priority": number_of(record),
        "create_time": milliseconds(record.submitted_at),
    }
    tail: dict[str, object] = {} if workflow_id is None else {"workflow_id": workflow_id}
    return JobEntry(workflow_id=workflow_id, fields=head | fields | tail)


class _Workflow(msgspec.Struct):
    id: str | None = None


class _Info(msgspec.Struct):
    workflow: _Workflow | None = None


class _Extra(msgspec.Struct):
    extra_pnginfo: _Info | None = None


def _workflow_id(extra_data: msgspec.Raw) -> str | None:
    try:
        info = msgspec.json.decode(extra_data, type=_Extra).extra_pnginfo
    except (msgspec.DecodeError, RecursionError):
        return None
    return info.workflow.id if info is not None and info.workflow is not None else None


def _summary(outputs: msgspec.Raw) -> tuple[int, dict[str, object] | None]:
    """Count the outputs, and choose the one to show: a saved one before a temporary one."""
    count, saved, temporary = 0, None, None
    for node_id, media, value in output_values(outputs):
        if media not in PREVIEWABLE:
            continue
        count += 1
        if not isinstance(value, dict) or "filename" not in value:
            continue
        fields = cast("dict[str, object]", value)
        shown: dict[str, object] = fields | {"nodeId": node_id, "mediaType": media}
        if shown.get("type") == "temp":
            temporary = temporary or shown
        else:
            saved = saved or shown
    return count, saved or temporary


def output_values(outputs: msgspec.Raw) -> Iterable[tuple[str, str, object]]:
    """Yield (node, kind of media, value) of all outputs."""
    try:
        nodes = msgspec.json.decode(outputs, type=dict[str, dict[str, list[object] | None] | None])
    except (msgspec.DecodeError, RecursionError):
        return
    for node_id, output in nodes.items():
        for media, values in (output or {}).items():
            for value in values or ():
                yield node_id, media, value
