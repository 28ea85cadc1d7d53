"""Puts a client's own ids in place of ours in what an engine says, so that each client sees what it would
see alone.

Our job ids are random UUIDs, so their text occurs in a message only as the id.
"""

from __future__ import annotations

import struct

import msgspec

from gpulane.adapters.comfyui.prompt import SECRETS
from gpulane.core.model import JobId

PREVIEW_IMAGE = 1
PROGRESS_TEXT = 3
PREVIEW_WITH_METADATA = 4


def rewrite_message(raw: bytes, *, job: JobId, prompt_id: str) -> bytes:
    """Put the client's prompt id into a JSON message (also nested ones: progress_state names it per node)."""
    if prompt_id == job:
        return raw
    return raw.replace(job.encode(), msgspec.json.encode(prompt_id)[1:-1])


def rewrite_frame(frame: bytes, *, job: JobId, prompt_id: str) -> bytes:
    """Put the client's prompt id into the metadata of a preview frame of type 4; others carry none."""
    if prompt_id == job or frame_type(frame) != PREVIEW_WITH_METADATA or len(frame) < 8:
        return frame
    (length,) = struct.unpack_from(">I", frame, 4)
    metadata = rewrite_message(frame[8 : 8 + length], job=job, prompt_id=prompt_id)
    return struct.pack(">II", PREVIEW_WITH_METADATA, len(metadata)) + metadata + frame[8 + length :]


def rewrite_entry(
    entry: bytes | msgspec.Raw,
    *,
    job: JobId,
    prompt_id: str,
    client_id: str | None,
    number: float | None = None,
) -> bytes:
    """Make an entry of /history the client's own: its ids, its number, no secrets, none of our socket's
    id.
    """
    value = msgspec.json.decode(entry, type=dict[str, msgspec.Raw])
    item = msgspec.json.decode(value["prompt"], type=list[msgspec.Raw]) if "prompt" in value else []
    if len(item) >= 4:
        item[0] = item[0] if number is None else _raw(number)
        item[3] = _raw(_own_extra(item[3], client_id))
        value["prompt"] = _raw(item)
    return rewrite_message(msgspec.json.encode(value), job=job, prompt_id=prompt_id)


def _own_extra(raw: msgspec.Raw, client_id: str | None) -> dict[str, msgspec.Raw]:
    known = msgspec.json.decode(raw, type=dict[str, msgspec.Raw] | None)
    items = () if known is None else known.items()
    extra = {key: value for key, value in items if key not in SECRETS and key != "client_id"}
    return extra if client_id is None else extra | {"client_id": _raw(client_id)}


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))


# --- preview frames -----------------------------------------------------------------------------------------


def frame_type(frame: bytes) -> int:
    """Tell the type of a binary message; 0 when it has none."""
    return int.from_bytes(frame[:4]) if len(frame) >= 4 else 0


def preview_of(frame: bytes) -> tuple[bytes, str] | None:
    """Return (picture, content type) of a preview frame of type 1 or 4."""
    match frame_type(frame):
        case 1 if len(frame) > 8:
            return frame[8:], "image/png" if int.from_bytes(frame[4:8]) == 2 else "image/jpeg"
        case 4 if len(frame) > 8:
            length = int.from_bytes(frame[4:8])
            picture = frame[8 + length :]
            return (
                (picture, "image/png" if picture.startswith(b"\x89PNG") else "image/jpeg")
                if picture
                else None
            )
        case _:
            return None


def text_of(frame: bytes) -> str | None:
    """Return the text of a progress text frame (type 3)."""
    if frame_type(frame) != PROGRESS_TEXT or len(frame) < 8:
        return None
    length = int.from_bytes(frame[4:8])
    return frame[8 + length :].decode(errors="replace")


def plain_preview(frame: bytes) -> bytes | None:
    """Turn a preview of type 4 into type 1, for clients that did not ask for metadata."""
    picture = preview_of(frame)
    if picture is None:
        return None
    return struct.pack(">II", PREVIEW_IMAGE, 2 if picture[1] == "image/png" else 1) + picture[0]
