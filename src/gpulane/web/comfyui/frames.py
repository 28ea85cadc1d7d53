"""The messages of ComfyUI's WebSocket that we make ourselves: status, and how a run ended of which no engine
told it. Pure.
"""

from __future__ import annotations

from typing import Final

import msgspec

from gpulane.core.model import Failure, JobState

TERMINAL: Final = frozenset({"execution_success", "execution_error", "execution_interrupted"})
"""Kinds that tell a client how its prompt ended; then it asks for /history."""

ENDING: Final = {
    JobState.SUCCEEDED: "execution_success",
    JobState.FAILED: "execution_error",
    JobState.CANCELLED: "execution_interrupted",
}


def message(kind: str, data: object) -> bytes:
    """Write a text message."""
    return msgspec.json.encode({"type": kind, "data": data})


def status(remaining: int, sid: str | None = None) -> bytes:
    """Write the status message; the first one of a socket tells its sid."""
    data: dict[str, object] = {"status": {"exec_info": {"queue_remaining": remaining}}}
    if sid is not None:
        data["sid"] = sid
    return message("status", data)


def end_of_run(shown_id: str) -> bytes:
    """Write the last message of a run."""
    return message("executing", {"node": None, "prompt_id": shown_id})


def ending(state: JobState, shown_id: str, failure: Failure | None, now_ms: int) -> bytes:
    """Write how a prompt ended, for a run of which no engine told it."""
    return message(ENDING[state], ending_data(state, shown_id, failure, now_ms))


def ending_data(state: JobState, shown_id: str, failure: Failure | None, now_ms: int) -> dict[str, object]:
    """Tell how a prompt ended, in the fields of ComfyUI's message."""
    data: dict[str, object] = {"prompt_id": shown_id, "timestamp": now_ms}
    if state is JobState.SUCCEEDED:
        return data
    data |= {"node_id": "", "node_type": "", "executed": []}
    if state is JobState.FAILED:
        data |= {
            "exception_message": failure.message if failure else "The job failed.",
            "exception_type": failure.code if failure else "failed",
            "traceback": [],
            "current_inputs": {},
            "current_outputs": [],
        }
    return data
