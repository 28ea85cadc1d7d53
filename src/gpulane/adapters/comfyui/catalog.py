"""Reads ComfyUI's /object_info: what an engine offers, which inputs name models, and one document for
several engines.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import msgspec

Combos = frozenset[tuple[str, str]]
"""(node class, input) pairs whose value must be one that the engine lists."""

MODEL_SUFFIXES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".onnx", ".engine", ".pkl")
MODEL_INPUTS = frozenset(
    {"sampler", "scheduler", "model", "model_path", "ckpt", "unet", "lora", "vae", "clip"}
)
"""Inputs that name models or samplers besides those that end in `_name`."""

UPLOAD_FLAGS = frozenset(
    {"image_upload", "video_upload", "audio_upload", "file_upload", "remote", "multiselect"}
)
"""Lists of files in the engine's input folder, lists fetched later, and choices of several: no word on what
it can run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """What one engine offers, in the words of `Job.needs`."""

    offers: frozenset[str]
    combos: Combos
    """Inputs that are worth a need: those that look like models and samplers. Any list's values are in
    `offers`."""


def read_catalog(object_info: bytes) -> Catalog:
    """Read an engine's whole /object_info. Raises msgspec.DecodeError (a ValueError) when it is none."""
    offers: set[str] = set()
    combos: set[tuple[str, str]] = set()
    for name, raw in msgspec.json.decode(object_info, type=dict[str, msgspec.Raw]).items():
        offers.add(sys.intern(f"node:{name}"))
        for combo in _combos_of(raw):
            offers.update(sys.intern(f"{name}.{combo.input}={option}") for option in combo.options)
            if combo.is_model_like:
                combos.add((sys.intern(name), sys.intern(combo.input)))
    return Catalog(offers=frozenset(offers), combos=frozenset(combos))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Combo:
    input: str
    options: tuple[str, ...]

    @property
    def is_model_like(self) -> bool:
        if self.input.endswith("_name") or self.input in MODEL_INPUTS:
            return True
        return any(option.lower().endswith(MODEL_SUFFIXES) for option in self.options)


class _Inputs(msgspec.Struct):
    required: object = None
    optional: object = None


class _Node(msgspec.Struct):
    input: _Inputs = msgspec.field(default_factory=_Inputs)


def _combos_of(raw: msgspec.Raw) -> Iterable[_Combo]:
    try:
        node = msgspec.json.decode(raw, type=_Node)
    except msgspec.ValidationError:
        return  # a custom node whose INPUT_TYPES is not what it should be; the engine lists it all the same
    for section in (node.input.required, node.input.optional):
        for name, definition in as_dict(section).items():
            options = options_of(definition)
            if options is not None and not _flags(definition) & UPLOAD_FLAGS:
                yield _Combo(input=name, options=tuple(o for o in options if isinstance(o, str)))


def options_of(definition: object) -> list[object] | None:
    """Return the list of a combo input, old form `[[...], {...}]` or new `["COMBO", {"options": [...]}]`;
    else None.
    """
    parts = as_list(definition)
    if not parts:
        return None
    if isinstance(parts[0], list):
        return cast("list[object]", parts[0])
    if parts[0] == "COMBO" and len(parts) > 1:
        options = as_dict(parts[1]).get("options")
        return cast("list[object]", options) if isinstance(options, list) else None
    return None


def _flags(definition: object) -> frozenset[str]:
    parts = as_list(definition)
    settings = as_dict(parts[1]) if len(parts) > 1 else {}
    return frozenset(name for name, value in settings.items() if value)


# --- one document for several engines -----------------------------------------------------------------------


def merge_object_info(documents: Sequence[bytes]) -> bytes:
    """Unite several /object_info: all classes, in the engines' order; of one class the first definition, all
    options.
    """
    if len(documents) == 1:
        return documents[0]
    merged: dict[str, list[msgspec.Raw]] = {}
    for document in documents:
        for name, raw in msgspec.json.decode(document, type=dict[str, msgspec.Raw]).items():
            versions = merged.setdefault(name, [])
            if not any(bytes(raw) == bytes(known) for known in versions):
                versions.append(raw)
    return msgspec.json.encode({name: _united(versions) for name, versions in merged.items()})


def _united(versions: list[msgspec.Raw]) -> object:
    if len(versions) == 1:
        return versions[0]
    first, *others = [as_dict(msgspec.json.decode(raw)) for raw in versions]
    for section in ("required", "optional"):
        inputs = as_dict(as_dict(first.get("input")).get(section))
        for name, definition in inputs.items():
            for other in others:
                _add_options(definition, as_dict(as_dict(other.get("input")).get(section)).get(name))
    return first


def _add_options(definition: object, other: object) -> None:
    options, more = options_of(definition), options_of(other)
    if options is not None and more is not None:
        known = {msgspec.json.encode(option) for option in options}  # options may be numbers, rarely lists
        options.extend(option for option in more if msgspec.json.encode(option) not in known)


FILE_CLASSES = ("LoadImage", "LoadImageMask")
"""ComfyUI's own nodes that list the pictures of its input folder, sorted by name."""


def with_files(document: bytes, names: Iterable[str]) -> bytes:
    """Add pictures to the lists of the nodes that load them."""
    names = list(names)
    if not names:
        return document
    nodes = msgspec.json.decode(document, type=dict[str, msgspec.Raw])
    for kind in FILE_CLASSES:
        node = as_dict(msgspec.json.decode(nodes[kind])) if kind in nodes else {}
        inputs = as_dict(as_dict(node.get("input")).get("required"))
        files = options_of(inputs.get("image"))
        if files is not None:
            known = [name for name in files if isinstance(name, str)]
            files[:] = sorted({*known, *names})
            nodes[kind] = msgspec.Raw(msgspec.json.encode(node))
    return msgspec.json.encode(nodes)


def object_info_of(document: bytes, name: str) -> bytes:
    """Answer /object_info/{class} from a whole document: `{}` for an unknown class, as the engine does."""
    raw = msgspec.json.decode(document, type=dict[str, msgspec.Raw]).get(name)
    return b"{}" if raw is None else msgspec.json.encode({name: raw})


def as_dict(value: object) -> dict[str, object]:
    """Return a JSON object, or an empty one for anything else."""
    return cast("dict[str, object]", value) if isinstance(value, dict) else {}


def as_list(value: object) -> list[object]:
    """Return a JSON array, or an empty one for anything else."""
    return cast("list[object]", value) if isinstance(value, list) else []
