"""Makes a job of the body of POST /prompt: read, checked, rebuilt from what is known to be sound. Never
passes bytes unread.

Some bodies kill the engine's executing thread for good while it goes on answering 200 (extra_data null;
number and id alike; numbers that are no numbers), so whatever is not on the list here is left out.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate

import msgspec

from gpulane.adapters.base import EngineRequest, Recognized
from gpulane.adapters.comfyui.catalog import Combos
from gpulane.adapters.comfyui.graph import (
    Graph,
    Node,
    Scalar,
    loaders_of,
    model_of,
    needs_of,
    signature_of,
    work_of,
)
from gpulane.adapters.comfyui.refusals import PromptRefused
from gpulane.core.model import JobId
from gpulane.errors import TooLarge

SECRETS = frozenset({"auth_token_comfy_org", "api_key_comfy_org"})
"""Keys of extra_data that sign their owner in at a paid service. They go to the engine; never into meta,
logs or answers."""

OURS = frozenset({"client_id", "create_time"})
"""Keys of extra_data that the engine sets itself; from a client they would redirect the engine's messages."""

TEXT_BYTES_MAX = 4096
"""Longer strings are not looked into: prompts' texts, pictures in base64."""
LINK_BYTES_MAX = 512
TARGETS_MAX = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLimits:
    """What is refused because it is too much."""

    body_bytes_max: int = 16 * 1024 * 1024
    nodes_max: int = 10_000
    inputs_max: int = 50_000
    """Of all nodes together: each is looked at."""
    depth_max: int = 64
    """Nesting of the JSON. Deeper ones break recursive code in the engine, some of it outside of any try."""
    brackets_max: int = 2_000_000
    """Of the whole body, the page's workflow included."""
    id_chars_max: int = 200


class PromptMeta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the front door and the engine client need again later of a prompt."""

    client_id: str | None = None
    """Whose web socket hears of it."""
    client_job_id: str | None = None
    number: float | None = None
    priority: int = 0
    """1 when the client asked to go first (`front`, a negative `number`): among the account's own jobs
    only."""
    secrets: tuple[str, ...] = ()
    """Names (never values) of the secrets in extra_data."""
    loaders: tuple[str, ...] = ()
    """Ids of the nodes that load the model: what they take is load time, not service time."""


def read_meta(meta: bytes) -> PromptMeta:
    """Read back what `parse_prompt` wrote."""
    return msgspec.json.decode(meta, type=PromptMeta)


def parse_prompt(
    body: bytes,
    *,
    job: JobId,
    limits: PromptLimits | None = None,
    combos: Combos = frozenset(),
    name_tag: str = "",
) -> Recognized:
    """Understand a body as a job and rebuild it. Raises PromptRefused (a BadRequest) or TooLarge.

    `name_tag` is added to the names of files that it saves. Every engine counts its files from 00001, and
    /view knows no prompt: of several engines, two would make files of one name.
    """
    limits = limits or PromptLimits()
    if len(body) > limits.body_bytes_max:
        raise TooLarge(f"The prompt has {len(body)} bytes; the limit is {limits.body_bytes_max}.")
    wire = _read(body, limits)
    nodes = _nodes(wire.prompt, limits)
    graph = {name: _node(node) for name, node in nodes.items()}
    extra = _extra_data(wire.extra_data)
    secrets = tuple(sorted(SECRETS & extra.keys()))
    targets = _targets(wire.partial_execution_targets)
    rest = msgspec.json.encode(_Rebuilt(prompt=nodes, extra_data=extra, partial_execution_targets=targets))
    public = {key: value for key, value in extra.items() if key not in SECRETS}
    known = (
        rest
        if not secrets
        else msgspec.json.encode(_Rebuilt(prompt=nodes, extra_data=public, partial_execution_targets=targets))
    )
    meta = _meta(wire, secrets, loaders_of(graph), limits)
    if name_tag and _tag_names(nodes, name_tag):
        rest = msgspec.json.encode(
            _Rebuilt(prompt=nodes, extra_data=extra, partial_execution_targets=targets)
        )
    return Recognized(
        kind="prompt",
        request=EngineRequest(
            method="POST",
            target="/prompt",
            headers=(("Content-Type", "application/json"),),
            body=b'{"prompt_id":"' + job.encode() + b'",' + rest[1:],
        ),
        model=model_of(graph),
        signature=signature_of(graph),
        work=work_of(graph),
        needs=needs_of(graph, combos),
        client_job_id=meta.client_job_id,
        meta=msgspec.json.encode(meta),
        digest=sha256(known).hexdigest(),
    )


def _tag_names(nodes: dict[str, _WireNode], tag: str) -> bool:
    """Add the tag to every prefix of file names; returns whether there was one."""
    found = False
    for node in nodes.values():
        raw = node.inputs.get("filename_prefix")
        if raw is None:
            continue
        value: object = msgspec.json.decode(raw)
        if isinstance(value, str):
            node.inputs["filename_prefix"] = msgspec.Raw(msgspec.json.encode(f"{value}_{tag}"))
            found = True
    return found


def with_client_id(body: bytes, client_id: str) -> bytes:
    """Add the id of the socket that is to hear of the job to a rebuilt body. Known only to whoever sends
    it.
    """
    return b'{"client_id":' + msgspec.json.encode(client_id) + b"," + body[1:]


# --- reading ------------------------------------------------------------------------------------------------


class _Wire(msgspec.Struct):
    """The body as it came; all that is not named here is left out."""

    prompt: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    prompt_id: object = None
    client_id: object = None
    extra_data: msgspec.Raw = msgspec.Raw(b"null")
    partial_execution_targets: msgspec.Raw = msgspec.Raw(b"null")
    number: object = None
    front: object = None


class _WireNode(msgspec.Struct, omit_defaults=True):
    class_type: str
    inputs: dict[str, msgspec.Raw]
    meta: dict[str, msgspec.Raw] | msgspec.UnsetType = msgspec.field(default=msgspec.UNSET, name="_meta")


class _Rebuilt(msgspec.Struct, omit_defaults=True):
    prompt: dict[str, _WireNode]
    extra_data: dict[str, msgspec.Raw]
    partial_execution_targets: list[str] | None = None


_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")
"""Brackets as +1 and -1 of a signed byte."""
_HUGE = re.compile(rb"[eE]\+?\d{3}|\d{300}")
"""Numbers that may read as infinity (JSON has no word for it, Python's writer has)."""


def _read(body: bytes, limits: PromptLimits) -> _Wire:
    try:
        if not body.isascii():
            body.decode()  # parts that stay raw are not looked at otherwise
        if body.lstrip()[:1] != b"{":
            msgspec.json.decode(body, type=msgspec.Raw)
            raise PromptRefused("no_prompt", "No prompt provided", details="The body is no JSON object.")
        wire = msgspec.json.decode(body, type=_Wire)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PromptRefused("invalid_prompt", "The body is not valid JSON", details=str(error)) from None
    except RecursionError:
        raise _too_deep(limits) from None
    # What is outside of strings: the body is sound JSON, so every second part between quotes.
    bare = b"".join(body.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')[::2])
    brackets = bare.translate(_STEPS, _NO_BRACKETS)
    if len(brackets) > limits.brackets_max:
        raise TooLarge(f"The prompt has {len(brackets)} brackets; the limit is {limits.brackets_max}.")
    if max(accumulate(memoryview(brackets).cast("b")), default=0) > limits.depth_max:
        raise _too_deep(limits)
    if _HUGE.search(bare):
        raise PromptRefused("invalid_prompt", "The body has a number that is out of range")
    return wire


def _too_deep(limits: PromptLimits) -> PromptRefused:
    return PromptRefused("invalid_prompt", f"The body is nested deeper than {limits.depth_max} levels")


def _nodes(prompt: msgspec.Raw | msgspec.UnsetType, limits: PromptLimits) -> dict[str, _WireNode]:
    if isinstance(prompt, msgspec.UnsetType):
        raise PromptRefused("no_prompt", "No prompt provided", details="No prompt provided")
    try:
        raw = msgspec.json.decode(prompt, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        message = "The prompt must be an object of nodes"
        raise PromptRefused(
            "invalid_prompt", message, details="A workflow saved by the page must be exported as API."
        ) from None
    if not raw:
        raise PromptRefused("prompt_no_outputs", "Prompt has no outputs")
    if len(raw) > limits.nodes_max:
        raise TooLarge(f"The prompt has {len(raw)} nodes; the limit is {limits.nodes_max}.")
    nodes = {name: _wire_node(name, node) for name, node in raw.items()}
    inputs = sum(len(node.inputs) for node in nodes.values())
    if inputs > limits.inputs_max:
        raise TooLarge(f"The prompt's nodes have {inputs} inputs; the limit is {limits.inputs_max}.")
    return nodes


def _wire_node(name: str, raw: msgspec.Raw) -> _WireNode:
    try:
        return msgspec.json.decode(raw, type=_WireNode)
    except msgspec.ValidationError as error:
        details = f"Node ID '#{name}'"
        extra: dict[str, object] = {"node_id": name, "class_type": None, "node_title": None}
        if "class_type" in str(error):
            message = (
                f"Node 'ID #{name}' has no class_type. "
                "The workflow may be corrupted or a custom node is missing."
            )
            raise PromptRefused("missing_node_type", message, details=details, extra_info=extra) from None
        raise PromptRefused(
            "invalid_prompt", f"Node 'ID #{name}' is not sound: {error}", details=details
        ) from None


def _node(wire: _WireNode) -> Node:
    links: dict[str, tuple[str, int]] = {}
    values: dict[str, Scalar] = {}
    for key, raw in wire.inputs.items():
        value = _peek(raw)
        match value:
            case [str(source), int(slot)]:
                links[key] = (source, slot)
            case bool() | None | list():
                pass
            case str() | int() | float():
                values[key] = value
    return Node(kind=wire.class_type, links=links, values=values)


def _peek(raw: msgspec.Raw) -> Scalar | list[object] | None:
    """Decode short strings, numbers and links; everything else is none of our business."""
    data = memoryview(raw)
    match chr(data[0]), len(data):
        case ("{" | "t" | "f", _):
            return None
        case ('"', length) if length > TEXT_BYTES_MAX:
            return None
        case ("[", length) if length > LINK_BYTES_MAX:
            return None
        case _:
            return msgspec.json.decode(raw, type=str | int | float | list[object] | None)


def _extra_data(raw: msgspec.Raw) -> dict[str, msgspec.Raw]:
    """Check what the engine trusts blindly. Null counts as absent, since old clients send it, and is left
    out.
    """
    extra = _object(raw, "extra_data")
    extra = {key: value for key, value in extra.items() if key not in OURS}
    if "extra_pnginfo" not in extra:
        return extra
    info = _object(extra.pop("extra_pnginfo"), "extra_data.extra_pnginfo")
    if "workflow" in info and not _object(info["workflow"], "extra_data.extra_pnginfo.workflow"):
        del info["workflow"]
    if info:
        extra["extra_pnginfo"] = msgspec.Raw(msgspec.json.encode(info))
    return extra


def _object(raw: msgspec.Raw, name: str) -> dict[str, msgspec.Raw]:
    try:
        return msgspec.json.decode(raw, type=dict[str, msgspec.Raw] | None) or {}
    except msgspec.ValidationError:
        raise PromptRefused("invalid_prompt", f"{name} must be an object") from None


def _targets(raw: msgspec.Raw) -> list[str] | None:
    try:
        targets = msgspec.json.decode(raw, type=list[str] | None)
    except msgspec.ValidationError:
        raise PromptRefused(
            "invalid_prompt", "partial_execution_targets must be a list of node ids"
        ) from None
    if targets is not None and len(targets) > TARGETS_MAX:
        raise TooLarge(f"partial_execution_targets has {len(targets)} entries; the limit is {TARGETS_MAX}.")
    return targets


def _meta(
    wire: _Wire, secrets: tuple[str, ...], loaders: tuple[str, ...], limits: PromptLimits
) -> PromptMeta:
    number = _float(wire.number)
    return PromptMeta(
        client_id=_id(wire.client_id, "client_id", limits),
        client_job_id=_id(wire.prompt_id, "prompt_id", limits),
        number=number,
        priority=1 if wire.front is True or (number is not None and number < 0) else 0,
        secrets=secrets,
        loaders=loaders,
    )


def _id(value: object, name: str, limits: PromptLimits) -> str | None:
    """Old engines take any value's str() as an id; an empty one cannot be asked for again and counts as
    none.
    """
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise PromptRefused("invalid_prompt", f"{name} must be a string")
    if len(str(value)) > limits.id_chars_max:
        raise PromptRefused("invalid_prompt", f"{name} is longer than {limits.id_chars_max} characters")
    return str(value)


def _float(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number):
            return number
    raise PromptRefused("invalid_prompt", "number must be a number")


def graph_of(body: bytes) -> Graph:
    """Read the graph of a rebuilt body again, to say where in it something is missing."""
    wire = msgspec.json.decode(body, type=_Wire)
    assert isinstance(wire.prompt, msgspec.Raw)
    nodes = msgspec.json.decode(wire.prompt, type=dict[str, _WireNode])
    return {name: _node(node) for name, node in nodes.items()}
