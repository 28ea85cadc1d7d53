"""Says at once what an engine would refuse when a prompt is submitted to it, in its own words (execution.py,
validate_prompt).

It tells only what is certain from /object_info. Custom nodes may check their own values, so of theirs no
range, choice or type is judged; what nobody can run at all, `needs` tell. Never changes a prompt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, cast

import msgspec

from gpulane.adapters.comfyui.catalog import UPLOAD_FLAGS, Combos, as_dict, as_list, options_of

VALUE_BYTES_MAX: Final = 4096
"""Longer values are texts and pictures; they are not looked into."""
NODES_TOLD_MAX: Final = 100
"""Nodes whose errors are told."""
OUTPUTS_TOLD_MAX: Final = 100
CHOICES_TOLD_MAX: Final = 20
"""Longer lists are not spelled out, as in the engine."""
SELF_JUDGING: Final = frozenset(
    {
        ("LoadImage", "image"),
        ("LoadImageMask", "image"),
        ("LoadLatent", "latent"),
        ("LoadVideo", "file"),
        ("LoadAudio", "audio"),
        ("CustomCombo", "choice"),
    }
)
"""Inputs of ComfyUI's own nodes that their VALIDATE_INPUTS judges instead of the list or range."""
FILE_INPUTS: Final = (("LoadImage", "image"), ("LoadImageMask", "image"))
"""Inputs that name an uploaded file."""

Error = dict[str, object]


# --- what /object_info says ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Input:
    kind: object
    settings: dict[str, object]
    choices: list[object] | None
    is_required: bool

    @property
    def config(self) -> list[object]:
        return [self.kind, self.settings]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Class:
    inputs: dict[str, _Input]
    outputs: tuple[object, ...]
    is_output: bool
    is_core: bool

    @property
    def is_dynamic(self) -> bool:
        """Whether its inputs depend on other values (autogrow, dynamic combos)."""
        kinds = (one.kind for one in self.inputs.values())
        return any(isinstance(kind, str) and kind.startswith("COMFY_") for kind in kinds)


class _Sections(msgspec.Struct):
    required: object = None
    optional: object = None


class _ClassDocument(msgspec.Struct):
    input: _Sections = msgspec.field(default_factory=_Sections)
    output: object = None
    output_node: object = False
    python_module: object = ""


class Definitions:
    """The node classes of one engine, decoded when they are asked for."""

    def __init__(self, object_info: bytes) -> None:
        """Read a whole document. Raises msgspec.DecodeError when it is none."""
        self._raw = msgspec.json.decode(object_info, type=dict[str, msgspec.Raw])
        self._known: dict[str, _Class | None] = {}

    def find(self, kind: str) -> _Class | None:
        """Return a class; None for one that the engine lacks, or describes as no other does."""
        if kind not in self._known and kind in self._raw:
            self._known[kind] = _read_class(self._raw[kind])
        return self._known.get(kind)


def _read_class(raw: msgspec.Raw) -> _Class | None:
    try:
        told = msgspec.json.decode(raw, type=_ClassDocument)
    except msgspec.ValidationError:
        return None
    module = told.python_module if isinstance(told.python_module, str) else ""
    sections = ((told.input.required, True), (told.input.optional, False))
    return _Class(
        inputs={
            name: _read_input(definition, is_required=is_required)
            for section, is_required in sections
            for name, definition in as_dict(section).items()
        },
        outputs=tuple(as_list(told.output)),
        is_output=told.output_node is True,
        is_core=module == "nodes" or module.startswith("comfy_extras."),
    )


def _read_input(definition: object, *, is_required: bool) -> _Input:
    parts = as_list(definition)
    settings = as_dict(parts[1]) if len(parts) > 1 else {}
    has_files = any(settings.get(flag) for flag in UPLOAD_FLAGS)
    return _Input(
        kind=parts[0] if parts else None,
        settings=settings,
        choices=None if has_files else options_of(definition),
        is_required=is_required,
    )


# --- the prompt ---------------------------------------------------------------------------------------------


class _Node(msgspec.Struct):
    class_type: str
    inputs: dict[str, msgspec.Raw] = msgspec.field(default_factory=dict[str, msgspec.Raw])


class _Body(msgspec.Struct):
    prompt: dict[str, _Node]
    partial_execution_targets: list[str] | None = None


OPAQUE: Final = object()
"""In the place of a value that is too long to be looked into."""


def _value_of(raw: msgspec.Raw) -> object:
    return OPAQUE if len(memoryview(raw)) > VALUE_BYTES_MAX else msgspec.json.decode(raw)


def files_of(body: bytes) -> frozenset[str]:
    """List the files of the input folder that a rebuilt prompt loads, as it names them."""
    found: set[str] = set()
    for node in msgspec.json.decode(body, type=_Body).prompt.values():
        for kind, name in FILE_INPUTS:
            if node.class_type == kind and name in node.inputs:
                value = _value_of(node.inputs[name])
                # `x.png [output]` is a file of another folder.
                if isinstance(value, str) and not value.endswith("]"):
                    found.add(value)
    return frozenset(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What an engine would say."""

    error: Error | None = None
    """Why it would run nothing of it."""
    node_errors: dict[str, Error] = field(default_factory=dict[str, Error])
    """By node, as the page marks them. Without `error`: the outputs that depend on none of them run."""


def verdict_of(
    body: bytes, definitions: Definitions, *, combos: Combos = frozenset(), absent: Collection[str] = ()
) -> Verdict | None:
    """Judge a rebuilt prompt; None when the engine lacks one of its classes.

    `combos` are the choices that `needs` judge already, `absent` the files of `files_of` that no engine has.
    """
    sent = msgspec.json.decode(body, type=_Body)
    classes: dict[str, _Class] = {}
    for name, node in sent.prompt.items():
        found = definitions.find(node.class_type)
        if found is None:
            return None
        classes[name] = found
    targets = sent.partial_execution_targets
    outputs = [
        name for name, its in classes.items() if its.is_output and (targets is None or name in targets)
    ]
    if not outputs:
        return Verdict(error=_error("prompt_no_outputs", "Prompt has no outputs", ""))
    judge = _Judge(prompt=sent.prompt, classes=classes, combos=combos, absent=frozenset(absent))
    return judge.verdict(outputs)


def _error(kind: str, message: str, details: str, extra: Mapping[str, object] | None = None) -> Error:
    return {"type": kind, "message": message, "details": details, "extra_info": dict(extra or {})}


class _Judge:
    """One prompt against one engine's classes."""

    def __init__(
        self,
        *,
        prompt: dict[str, _Node],
        classes: dict[str, _Class],
        combos: Combos,
        absent: frozenset[str],
    ) -> None:
        self._prompt = prompt
        self._classes = classes
        self._combos = combos
        self._absent = absent
        self._readers: dict[str, list[str]] = {}
        self._outputs: frozenset[str] = frozenset()

    def verdict(self, outputs: list[str]) -> Verdict:
        self._outputs = frozenset(outputs)
        errors = self._errors_behind(outputs)
        spoiled = {name: self._reached_from(name) & self._outputs for name in errors}
        bad = frozenset[str]().union(*spoiled.values())
        told: dict[str, Error] = {
            name: {
                "errors": errors[name],
                "dependent_outputs": sorted(spoiled[name])[:OUTPUTS_TOLD_MAX],
                "class_type": self._prompt[name].class_type,
            }
            for name in errors
        }
        if bad < self._outputs:
            return Verdict(node_errors=told)
        own = [error for name in outputs for error in errors.get(name, ())]
        details = "\n".join(f"{error['message']}: {error['details']}" for error in own)
        text = "Prompt outputs failed validation"
        return Verdict(error=_error("prompt_outputs_failed_validation", text, details), node_errors=told)

    def _errors_behind(self, outputs: list[str]) -> dict[str, list[Error]]:
        """Judge every node that an output needs, once. A wrong link is not followed, as in the engine."""
        errors: dict[str, list[Error]] = {}
        seen = set(outputs)
        waiting = deque(outputs)
        while waiting and len(errors) < NODES_TOLD_MAX:
            name = waiting.popleft()
            found: list[Error] = []
            for item in self._judged(name):
                if isinstance(item, str):
                    self._readers.setdefault(item, []).append(name)
                    if item not in seen:
                        seen.add(item)
                        waiting.append(item)
                else:
                    found.append(item)
            if found:
                errors[name] = found
        return errors

    def _reached_from(self, name: str) -> set[str]:
        """List a node and all that depend on it."""
        reached, waiting = {name}, deque([name])
        while waiting:
            for reader in self._readers.get(waiting.popleft(), ()):
                if reader not in reached:
                    reached.add(reader)
                    waiting.append(reader)
        return reached

    def _judged(self, name: str) -> Iterator[Error | str]:
        """Yield what is wrong with a node, and the nodes that it reads."""
        node, its = self._prompt[name], self._classes[name]
        for key, wanted in its.inputs.items():
            raw = node.inputs.get(key)
            if raw is None:
                if wanted.is_required and not its.is_dynamic:
                    yield _error(
                        "required_input_missing", "Required input is missing", key, {"input_name": key}
                    )
                continue
            value = _value_of(raw)
            if isinstance(value, list):
                yield self._link(name, key, wanted, cast("list[object]", value))
            elif value is not OPAQUE:
                error = self._value(node.class_type, its, key, wanted, value)
                if error is not None:
                    yield error

    def _link(self, name: str, key: str, wanted: _Input, link: list[object]) -> Error | str:
        extra = {"input_name": key, "input_config": wanted.config}
        if len(link) != 2:
            text = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
            return _error("bad_linked_input", text, key, {**extra, "received_value": link})
        source, slot = link
        if not isinstance(source, str) or source not in self._prompt:
            place = "" if name in self._outputs else "inner_"
            text = f"Exception when validating {'inner ' if place else ''}node"
            why: Error = {"exception_type": "KeyError", "traceback": list[str]()}
            return _error(f"exception_during_{place}validation", text, repr(source), {**extra, **why})
        received = self._received(source, slot)
        if self._classes[name].is_core and not _fits(received, wanted.kind):
            details = f"{key}, received_type({received}) mismatch input_type({wanted.kind})"
            text = "Return type mismatch between linked nodes"
            return _error(
                "return_type_mismatch",
                text,
                details,
                {**extra, "received_type": received, "linked_node": link},
            )
        return source

    def _received(self, source: str, slot: object) -> object:
        """Return the type of a node's output; any type where it is not certain."""
        its = self._classes[source]
        if its.is_core and isinstance(slot, int) and 0 <= slot < len(its.outputs):
            return its.outputs[slot]
        return "*"

    def _value(self, kind: str, its: _Class, key: str, wanted: _Input, value: object) -> Error | None:
        value = as_dict(value).get("__value__", value)
        extra = {"input_name": key, "input_config": wanted.config, "received_value": value}
        converted = _converted(wanted.kind, value)
        if isinstance(converted, Exception):
            text = f"Failed to convert an input value to a {wanted.kind} value"
            details = f"{key}, {value}, {converted}"
            return _error("invalid_input_type", text, details, {**extra, "exception_message": str(converted)})
        if (kind, key) in FILE_INPUTS and isinstance(value, str) and value in self._absent:
            text = "Custom validation failed for node"
            details = f"{key} - Invalid image file: {value}"
            return _error("custom_validation_failed", text, details, {"input_name": key})
        if not its.is_core or (kind, key) in SELF_JUDGING:
            return None
        if (error := _out_of_range(key, wanted, converted, extra)) is not None:
            return error
        if wanted.choices is None or (kind, key) in self._combos or converted in wanted.choices:
            return None
        is_long = len(wanted.choices) > CHOICES_TOLD_MAX
        shown = f"(list of length {len(wanted.choices)})" if is_long else str(wanted.choices)
        told = extra | ({"input_config": None} if is_long else {})
        return _error("value_not_in_list", "Value not in list", f"{key}: '{value}' not in {shown}", told)


def _fits(received: object, wanted: object) -> bool:
    """Tell whether a link may carry this type (comfy_execution/validation.py, validate_node_input)."""
    if not isinstance(received, str) or not isinstance(wanted, str):
        return True  # lists of choices: versions differ
    have = {part.strip() for part in received.split(",")}
    want = {part.strip() for part in wanted.split(",")}
    is_open = any(part in {"*", "COMBO"} or part.startswith("COMFY_") for part in have | want)
    return is_open or bool(have & want)


def _converted(kind: object, value: object) -> object:
    """Return the value as the engine converts it, or the exception with which that fails."""
    convert = {"INT": int, "FLOAT": float}.get(kind) if isinstance(kind, str) else None
    if convert is None:
        return value
    try:
        return convert(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError) as error:
        return error


def _out_of_range(key: str, wanted: _Input, value: object, extra: dict[str, object]) -> Error | None:
    if wanted.kind not in ("INT", "FLOAT") or not isinstance(value, int | float):
        return None
    low, high = wanted.settings.get("min"), wanted.settings.get("max")
    told = extra | {"received_value": value}
    if isinstance(low, int | float) and value < low:
        return _error("value_smaller_than_min", f"Value {value} smaller than min of {low}", key, told)
    if isinstance(high, int | float) and value > high:
        return _error("value_bigger_than_max", f"Value {value} bigger than max of {high}", key, told)
    return None
