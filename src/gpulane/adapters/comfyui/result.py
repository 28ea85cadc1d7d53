"""Reads one entry of ComfyUI's /history: how a prompt ended, what files it made, why it failed, how long it
took.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import urlencode

import msgspec

from gpulane.adapters.comfyui.catalog import as_dict, as_list
from gpulane.core.model import Failure, FailureKind

FILES_MAX = 10_000
"""Files of one result that are listed."""
MESSAGE_CHARS_MAX = 2_000


class Verdict(StrEnum):
    """How a prompt ended."""

    SUCCESS = "success"
    """Also with no outputs at all: every node was cached, or none makes files."""
    ERROR = "error"
    INTERRUPTED = "interrupted"


VERDICTS = {
    "execution_success": Verdict.SUCCESS,
    "execution_error": Verdict.ERROR,
    "execution_interrupted": Verdict.INTERRUPTED,
}
"""What each last message of a run means."""


class _Status(msgspec.Struct):
    status_str: str = ""
    messages: list[tuple[str, msgspec.Raw]] = msgspec.field(default_factory=list[tuple[str, msgspec.Raw]])


class _Wire(msgspec.Struct):
    status: _Status | None = None
    outputs: object = None


class _Stamp(msgspec.Struct):
    timestamp: float | None = None


class ExecutionError(msgspec.Struct, frozen=True):
    """What execution_error tells; its traceback and inputs stay in the document."""

    node_id: object = None
    node_type: object = None
    exception_message: str = ""
    exception_type: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFile:
    """One file that a node made, and where the engine serves it."""

    name: str
    target: str
    content_type: str
    node: str
    is_temporary: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """An entry, read."""

    verdict: Verdict
    files: tuple[OutputFile, ...]
    error: ExecutionError | None
    seconds: float | None
    """From execution_start to the end, by the engine's own clock."""


def read_entry(entry: bytes | msgspec.Raw) -> Ended:
    """Read an entry of /history/{id} (the value under the id). Raises msgspec.DecodeError when it is none."""
    wire = msgspec.json.decode(entry, type=_Wire)
    status = wire.status or _Status()
    kind, raw = next(((k, r) for k, r in reversed(status.messages) if k in VERDICTS), ("", None))
    # status_str is "error" for errors and interrupts alike, and was seen stale: the last message decides.
    verdict = VERDICTS.get(kind) or (Verdict.ERROR if status.status_str == "error" else Verdict.SUCCESS)
    return Ended(
        verdict=verdict,
        files=files_of(wire.outputs),
        error=read_error(raw) if raw is not None and verdict is Verdict.ERROR else None,
        seconds=_seconds(status.messages),
    )


def read_error(data: msgspec.Raw) -> ExecutionError:
    """Read the data of an execution_error message."""
    try:
        return msgspec.json.decode(data, type=ExecutionError)
    except msgspec.ValidationError:
        return ExecutionError()


def _seconds(messages: list[tuple[str, msgspec.Raw]]) -> float | None:
    stamps: dict[str, float] = {}
    for kind, raw in messages:
        if kind == "execution_start" or kind in VERDICTS:
            stamp = msgspec.json.decode(raw, type=_Stamp).timestamp
            if stamp is not None:
                stamps["start" if kind == "execution_start" else "end"] = stamp
    if len(stamps) != 2:
        return None
    return max(0.0, (stamps["end"] - stamps["start"]) / 1000)


# --- files --------------------------------------------------------------------------------------------------


def files_of(outputs: object) -> tuple[OutputFile, ...]:
    """List the files of `outputs` ({node: {images|gifs|audio|...: [{filename, subfolder, type}]}}), each
    once.
    """
    found: dict[str, OutputFile] = {}
    for node, kinds in as_dict(outputs).items():
        for listed in as_dict(kinds).values():
            for item in as_list(listed):
                file = _file(node, as_dict(item))
                if file is not None and len(found) < FILES_MAX:
                    found.setdefault(file.target, file)
    return tuple(found.values())


def _file(node: str, item: dict[str, object]) -> OutputFile | None:
    name, subfolder, kind = item.get("filename"), item.get("subfolder", ""), item.get("type", "output")
    if not (isinstance(name, str) and name and isinstance(subfolder, str) and isinstance(kind, str)):
        return None
    return OutputFile(
        name=name,
        target=view_target(name, subfolder, kind),
        content_type=content_type_of(name),
        node=node,
        is_temporary=kind == "temp",
    )


def view_target(filename: str, subfolder: str, kind: str) -> str:
    """Return where the engine serves a file."""
    return "/view?" + urlencode({"filename": filename, "subfolder": subfolder, "type": kind})


CONTENT_TYPES = {
    "png": "image/png",
    "jpg": "image/jpeg",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "gif": "image/gif",
    "avif": "image/avif",
    "svg": "image/svg+xml",
    "mp4": "video/mp4",
    "webm": "video/webm",
    "mkv": "video/x-matroska",
    "mov": "video/quicktime",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "ogg": "audio/ogg",
    "wav": "audio/wav",
    "glb": "model/gltf-binary",
    "txt": "text/plain; charset=utf-8",
    "json": "application/json",
}


def content_type_of(name: str) -> str:
    """Tell the content type by a file's suffix."""
    return CONTENT_TYPES.get(name.rpartition(".")[2].lower(), "application/octet-stream")


# --- failures -----------------------------------------------------------------------------------------------

_PATHS = re.compile(r"(?<![\w.:/\\])(?:[A-Za-z]:)?(?:[/\\][\w.+@ -]+){2,}(?=[/\\'\"\s:,)]|$)")


def failure_of(error: ExecutionError | None) -> Failure:
    """Say why a prompt failed, without the engine's paths: people read this, and the record keeps it."""
    error = error or ExecutionError()
    message = error.exception_message.strip()
    where = f"{error.node_type} (node {error.node_id}): " if error.node_type else ""
    told = _PATHS.sub(_last_part, message) or error.exception_type or "the engine reported an error"
    return Failure(kind=FailureKind.ENGINE, code=_code(error), message=(where + told)[:MESSAGE_CHARS_MAX])


def _last_part(match: re.Match[str]) -> str:
    return re.split(r"[/\\]", match[0])[-1]


def _code(error: ExecutionError) -> str:
    kind, message = error.exception_type, error.exception_message
    if "OutOfMemory" in kind or "out of memory" in message.lower():
        return "out_of_memory"
    if "CUDA error" in message or "device-side assert" in message or "AcceleratorError" in kind:
        return "gpu_error"
    return "execution_error"
