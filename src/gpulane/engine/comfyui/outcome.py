"""Turns what a ComfyUI did with an attempt into an Outcome. Decides nothing about retries."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from gpulane.adapters.comfyui.catalog import as_dict
from gpulane.adapters.comfyui.messages import Evidence
from gpulane.adapters.comfyui.result import Ended, Verdict, failure_of, read_entry
from gpulane.core.model import EngineUrl, Failure, FailureKind, Job, JobState, Seconds
from gpulane.engine.base import Artifact, Outcome, RecordedResult
from gpulane.engine.comfyui.api import Answer
from gpulane.engine.comfyui.watch import Ending

TEXT_CHARS_MAX = 500


def not_sent(message: str) -> Outcome:
    """No connection came about: the job is not in the engine, and nothing else of ours is."""
    return _failed(FailureKind.NOT_STARTED, "connect_failed", message)


def cancelled_unsent() -> Outcome:
    """It was cancelled before a byte of it was sent."""
    return Outcome(state=JobState.CANCELLED)


def refused(answer: Answer, url: EngineUrl) -> Outcome:
    """Read an answer other than 200 that proves that the job was not taken.

    1. 400 and 413 are about the content: the engine's own words are kept as the result, for the front door.
    2. Any other is about the engine or what stands before it (403 of its origin check, 401 of a proxy, 404).
    """
    if answer.status in {400, 413}:
        failure = Failure(kind=FailureKind.CLIENT, code=_code(answer), message=_text(answer))
        result = RecordedResult(document=_document(answer.body), status=answer.status, engine=url)
        return Outcome(state=JobState.FAILED, failure=failure, result=result)
    return _failed(FailureKind.NOT_STARTED, "engine_refused", f"the engine answered {answer.status}")


def over(
    evidence: Evidence,
    job: Job,
    *,
    url: EngineUrl,
    is_cancel_wanted: bool,
    has_restarted: bool,
    load_seconds: Seconds | None,
    elapsed_seconds: Seconds,
    node_errors: msgspec.Raw | None,
    refusal: str | None = None,
) -> Outcome:
    """The engine is done with the job, or does not know it (any more)."""
    if evidence.entry is None:
        if is_cancel_wanted:  # deleted while it waited: leaves no trace
            return Outcome(state=JobState.CANCELLED)
        if not evidence.was_accepted:
            message = (
                f"the engine did not take the job ({refusal or 'no answer'}), nor did it appear there later"
            )
            return _failed(FailureKind.LOST, "submission_lost", message)
        code = "engine_restarted" if has_restarted else "engine_lost"
        message = "the engine no longer knows the job, neither in its queue nor in its history"
        return _failed(FailureKind.LOST, code, message, killed_engine=has_restarted)
    ended = read_entry(evidence.entry)
    seconds = elapsed_seconds if ended.seconds is None else ended.seconds
    load = None if load_seconds is None else min(load_seconds, seconds)
    outcome = Outcome(
        state=JobState.SUCCEEDED,
        result=_result(ended, evidence.entry, url, node_errors),
        service_seconds=max(0.0, seconds - (load or 0.0)),
        load_seconds=load,
    )
    match ended.verdict:
        case Verdict.SUCCESS:
            return replace(outcome, model=job.model)
        case Verdict.ERROR:
            return replace(outcome, state=JobState.FAILED, failure=failure_of(ended.error))
        case Verdict.INTERRUPTED if is_cancel_wanted:
            return replace(outcome, state=JobState.CANCELLED)
        case Verdict.INTERRUPTED:
            text = "something interrupted it that nobody here asked for"
            failure = Failure(kind=FailureKind.INTERRUPTED, code="interrupted", message=text)
            return replace(outcome, state=JobState.FAILED, failure=failure)


def given_up(ending: Ending, *, is_cancel_wanted: bool) -> Outcome:
    """The engine is gone, silent or dead inside: nobody can say that its gpu is idle."""
    texts = {
        Ending.GONE: ("engine_gone", "the engine refuses connections"),
        Ending.SILENT: ("engine_silent", "the engine does not answer"),
        Ending.ZOMBIE: ("engine_zombie", "the engine answers but does not compute; only a restart helps"),
        Ending.OVER: ("engine_lost", "the engine does not know the job"),
    }
    code, text = texts[ending]
    failure = Failure(kind=FailureKind.LOST, code=code, message=text, killed_engine=True)
    state = JobState.CANCELLED if is_cancel_wanted else JobState.FAILED
    return Outcome(state=state, failure=None if is_cancel_wanted else failure, engine_idle=False)


def _failed(kind: FailureKind, code: str, message: str, *, killed_engine: bool = False) -> Outcome:
    failure = Failure(kind=kind, code=code, message=message, killed_engine=killed_engine)
    return Outcome(state=JobState.FAILED, failure=failure)


def _result(
    ended: Ended, entry: msgspec.Raw, url: EngineUrl, node_errors: msgspec.Raw | None
) -> RecordedResult:
    if node_errors is not None:  # a partly valid graph ran its valid outputs: say which were not
        document = msgspec.json.decode(entry, type=dict[str, msgspec.Raw])
        entry = msgspec.Raw(msgspec.json.encode(document | {"node_errors": node_errors}))
    artifacts = tuple(
        Artifact(name=file.name, content_type=file.content_type, target=file.target, node=file.node)
        for file in ended.files
    )
    return RecordedResult(document=entry, engine=url, artifacts=artifacts)


# --- refusals -----------------------------------------------------------------------------------------------


def _error_of(answer: Answer) -> dict[str, object]:
    try:
        return as_dict(as_dict(msgspec.json.decode(answer.body)).get("error"))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}


def _code(answer: Answer) -> str:
    kind = _error_of(answer).get("type")
    if isinstance(kind, str) and kind:
        return kind
    return "too_large" if answer.status == 413 else "invalid_prompt"


def _text(answer: Answer) -> str:
    error = _error_of(answer)
    parts = [str(error[key]).strip() for key in ("message", "details") if error.get(key)]
    return (": ".join(parts) or answer.body[:TEXT_CHARS_MAX].decode(errors="replace"))[:TEXT_CHARS_MAX]


def _document(body: bytes) -> msgspec.Raw:
    try:
        msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        text = body[:TEXT_CHARS_MAX].decode(errors="replace")
        error: dict[str, object] = {"type": "engine_error", "message": text, "details": "", "extra_info": {}}
        return msgspec.Raw(msgspec.json.encode({"error": error, "node_errors": {}}))
    return msgspec.Raw(body)
