"""Recorded exchanges, and how an answer is compared with a recorded one: keys and types, not values.

Extracts lie in tests/data/recordings; the whole set beside the checkout, in ../shared/recordings.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
OWN = ROOT / "tests" / "data" / "recordings"
SHARED = ROOT.parent / "shared" / "recordings"

Json = Any


def recording(name: str) -> Json:
    """One recording by its path; skips by name when only ../shared has it and that is not here."""
    for folder in (OWN, SHARED):
        file = folder / f"{name}.json"
        if file.is_file():
            return json.loads(file.read_text())
    pytest.skip("../shared is not here")


def renamed(value: Json, names: Mapping[str, str]) -> Json:
    """The value with recorded ids replaced by those of this run, in keys, values and longer texts."""
    if isinstance(value, dict):
        fields = cast("dict[str, Json]", value)
        return {renamed(key, names): renamed(item, names) for key, item in fields.items()}
    if isinstance(value, list):
        return [renamed(item, names) for item in cast("list[Json]", value)]
    if isinstance(value, str):
        for old, new in names.items():
            value = value.replace(old, new)
    return value


def differences(real: Json, ours: Json, where: str = "$") -> list[str]:
    """Where our answer differs from the real one in keys, types or the length of fixed lists."""
    if is_number(real) and is_number(ours):
        return []
    if type(real) is not type(ours):
        return [f"{where}: {type(real).__name__} {short(real)} became {type(ours).__name__} {short(ours)}"]
    if isinstance(real, dict):
        return fields_differences(cast("dict[str, Json]", real), ours, where)
    if isinstance(real, list):
        return items_differences(cast("list[Json]", real), ours, where)
    return []


def fields_differences(real: dict[str, Json], ours: dict[str, Json], where: str) -> list[str]:
    found = [f"{where}.{key} is missing" for key in real if key not in ours]
    found += [f"{where}.{key} is new" for key in ours if key not in real]
    for key, value in real.items():
        if key in ours:
            found += differences(value, ours[key], f"{where}.{key}")
    return found


def items_differences(real: list[Json], ours: list[Json], where: str) -> list[str]:
    """Lists of things of one kind: the first is compared with the first."""
    if not real or is_cut(real[0]):
        return []
    if not ours:
        return [f"{where} is empty"]
    return differences(real[0], ours[0], f"{where}[0]")


def is_number(value: Json) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_cut(value: Json) -> bool:
    """Whether the recorder left only a mark of this."""
    return isinstance(value, str) and value.startswith("...<")


def short(value: Json) -> str:
    return json.dumps(value)[:60]


def label(message: Json) -> str | None:
    """A WebSocket message in a word, as far as its place in the order counts; None for the end."""
    if "binary" in message:
        return f"binary {message['binary']['type']}"
    if "text" not in message:
        return None
    kind: str = message["text"]["type"]
    data: dict[str, Json] = message["text"].get("data") or {}
    match kind:
        case "status":
            remaining: Json = data["status"]["exec_info"]["queue_remaining"]
            return f"status {remaining}" + (" sid" if "sid" in data else "")
        case "executing":
            named = "" if "prompt_id" in data else " without prompt_id"
            return ("executing nothing" if data["node"] is None else "executing") + named
        case "progress_state":
            states = sorted(node["state"] for node in data["nodes"].values())
            return f"progress_state {' '.join(states)}"
        case "execution_cached":
            return f"execution_cached {len(data['nodes'])}"
        case _:
            return kind


def labels(messages: list[Json]) -> list[str]:
    return [found for message in messages if (found := label(message)) is not None]
