"""What `submit` makes of its arguments: a workflow or payload with values set and seeds changed. Pure.

Nothing is guessed: a name that fits several nodes, or none, is refused with what there is.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Final, cast

import msgspec

from gpulane.errors import ConfigError

SEEDS_MAX: Final = 1000
SEED_MAX: Final = 2**64 - 1
SEED_INPUTS: Final = ("seed", "noise_seed")
_RANGE: Final = re.compile(r"(\d{1,20})(?:\.\.(\d{1,20}))?\Z")

Workflow = dict[str, dict[str, object]]


def read_workflow(text: bytes, source: str) -> Workflow:
    """Read a workflow in API format. Raises ConfigError."""
    found = _json(text, source)
    if isinstance(found.get("nodes"), list) and "links" in found:
        raise ConfigError(
            f"{source} is a workflow as the editor saves it, which no ComfyUI runs by itself",
            hint="save it with `Export (API)` in ComfyUI's menu",
        )
    # A whole body of POST /prompt is taken too.
    inner = found.get("prompt")
    nodes = cast("dict[str, object]", inner) if isinstance(inner, dict) else found
    for name, node in nodes.items():
        if not isinstance(node, dict) or "class_type" not in node:
            raise ConfigError(f"{source} is no workflow in API format: {name!r} has no class_type")
    if not nodes:
        raise ConfigError(f"{source} is an empty workflow")
    return cast("Workflow", nodes)


def read_payload(text: bytes, source: str) -> dict[str, object]:
    """Read the body of an A1111 call. Raises ConfigError."""
    return _json(text, source)


def with_inputs(workflow: Workflow, settings: Sequence[str]) -> Workflow:
    """Set `NODE.INPUT=VALUE`; NODE is an id, or a title or class that only one node has."""
    changed = copy.deepcopy(workflow)
    for setting in settings:
        name, value = _assignment(setting)
        node_name, dot, key = name.rpartition(".")
        if not dot:
            raise ConfigError(f"--set {setting!r}: write NODE.INPUT=VALUE")
        node = changed[_node(changed, node_name)]
        inputs = _inputs(node)
        if key not in inputs:
            near = difflib.get_close_matches(key, list(inputs), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(inputs) or 'none'}"
            raise ConfigError(f"--set {setting!r}: {node['class_type']} has no input {key!r}", hint=hint)
        inputs[key] = value
    return changed


def with_keys(payload: Mapping[str, object], settings: Sequence[str]) -> dict[str, object]:
    """Set `KEY=VALUE`, and `KEY.INNER=VALUE` inside an object such as override_settings."""
    changed = copy.deepcopy(dict(payload))
    for setting in settings:
        name, value = _assignment(setting)
        *outer, key = name.split(".")
        place = changed
        for step in outer:
            inner = place.setdefault(step, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"--set {setting!r}: {step!r} is no object")
            place = cast("dict[str, object]", inner)
        place[key] = value
    return changed


def with_seed(workflow: Workflow, seed: int) -> Workflow:
    """Set every seed that is a number; seeds that come from other nodes stay. Raises ConfigError if none."""
    changed = copy.deepcopy(workflow)
    places = [
        (inputs, name)
        for node in changed.values()
        for inputs in [_inputs(node)]
        for name in SEED_INPUTS
        if isinstance(inputs.get(name), int | float)
    ]
    if not places:
        raise ConfigError("--seeds: no node of this workflow has a seed", hint="use --set NODE.INPUT=VALUE")
    for inputs, name in places:
        inputs[name] = seed
    return changed


def seeds_from(text: str | None) -> tuple[int | None, ...]:
    """Read `5`, `1..5` or `3,7,9..11`; nothing is one job with the seed it has."""
    if text is None:
        return (None,)
    seeds: list[int | None] = []
    for part in text.split(","):
        found = _RANGE.match(part.strip())
        if not found:
            raise ConfigError(f"--seeds {text!r}: write for instance 5, 1..5 or 3,7,9..11")
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last <= SEED_MAX or len(seeds) + last - first >= SEEDS_MAX:
            raise ConfigError(f"--seeds {text!r}: from low to high, at most {SEEDS_MAX} of 64 bits")
        seeds.extend(range(first, last + 1))
    return tuple(seeds)


def _node(workflow: Workflow, name: str) -> str:
    if name in workflow:
        return name
    named = [key for key, node in workflow.items() if name in {_title(node), node.get("class_type")}]
    if len(named) == 1:
        return named[0]
    known = ", ".join(f"{key} {_title(node) or node.get('class_type')}" for key, node in workflow.items())
    what = f"several nodes are called {name!r}" if named else f"no node {name!r}"
    raise ConfigError(f"--set: {what}", hint=f"there are: {known[:300]}")


def _title(node: Mapping[str, object]) -> object:
    meta = node.get("_meta")
    return cast("dict[str, object]", meta).get("title") if isinstance(meta, dict) else None


def _inputs(node: dict[str, object]) -> dict[str, object]:
    inputs = node.setdefault("inputs", {})
    if not isinstance(inputs, dict):
        raise ConfigError(f"the inputs of a {node.get('class_type')} are no object")
    return cast("dict[str, object]", inputs)


def _assignment(setting: str) -> tuple[str, object]:
    """Read NAME=VALUE; VALUE is JSON where it is, else the text itself."""
    name, equals, text = setting.partition("=")
    if not equals or not name:
        raise ConfigError(f"--set {setting!r}: write NAME=VALUE")
    try:
        return name, msgspec.json.decode(text.encode())
    except msgspec.DecodeError:
        return name, text


def _json(text: bytes, source: str) -> dict[str, object]:
    try:
        return msgspec.json.decode(text, type=dict[str, object])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{source} is no JSON object: {error}") from error
