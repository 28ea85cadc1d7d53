"""Validates a prompt as ComfyUI's execution.py does, error shapes and quirks included.

Like the original it converts values in place (the text "5" for an INT becomes 5), so the queue and the
history show the converted prompt.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Final

from gpulane.testing.card import Json
from gpulane.testing.comfyui.nodes import CLASSIC_VERSION, NodeTable

LONG_LIST: Final = 20
"""Longer lists of choices are not spelled out in the message."""

NodeErrors = dict[str, Json]


@dataclass(slots=True, kw_only=True)
class Validated:
    """What came of a validation."""

    error: Json | None = None
    outputs: list[str] = field(default_factory=list[str])
    """The output nodes that may run."""
    node_errors: NodeErrors = field(default_factory=dict[str, Json])


@dataclass(slots=True, kw_only=True)
class _Node:
    is_valid: bool
    errors: list[Json]


def validate_prompt(
    prompt: dict[str, Json],
    nodes: NodeTable,
    *,
    file_exists: Callable[[str], bool],
    targets: Collection[str] | None = None,
) -> Validated:
    """Check every node that some output needs."""
    outputs: list[str] = []
    for node_id, node in prompt.items():
        error = _class_error(node_id, node, nodes)
        if error is not None:
            return Validated(error=error)
        if nodes.is_output(node["class_type"]) and (targets is None or node_id in targets):
            outputs.append(node_id)
    if not outputs:
        return Validated(error=_error("prompt_no_outputs", "Prompt has no outputs", ""))
    return _Validation(prompt=prompt, nodes=nodes, file_exists=file_exists).run(outputs)


def _error(kind: str, message: str, details: str, extra: Json = None) -> Json:
    return {"type": kind, "message": message, "details": details, "extra_info": extra or {}}


def _class_error(node_id: str, node: Json, nodes: NodeTable) -> Json | None:
    is_classic = nodes.version == CLASSIC_VERSION
    details = f"Node ID '#{node_id}'"
    class_type = node.get("class_type")
    if "class_type" in node and class_type in nodes:
        return None
    if is_classic:
        text = (
            f"Cannot execute because node {class_type} does not exist."
            if "class_type" in node
            else "Cannot execute because a node is missing the class_type property."
        )
        return _error("invalid_prompt", text, details)
    meta: dict[str, Json] = node.get("_meta") or {}
    title: Json = meta.get("title", class_type)
    extra: dict[str, Json] = {"node_id": node_id, "class_type": class_type, "node_title": title}
    text = (
        f"Node '{title}' not found. The custom node may not be installed."
        if "class_type" in node
        else (
            f"Node 'ID #{node_id}' has no class_type. "
            "The workflow may be corrupted or a custom node is missing."
        )
    )
    return _error("missing_node_type", text, details, extra)


class _Validation:
    """One walk over a prompt's graph."""

    def __init__(
        self, *, prompt: dict[str, Json], nodes: NodeTable, file_exists: Callable[[str], bool]
    ) -> None:
        self._prompt = prompt
        self._nodes = nodes
        self._file_exists = file_exists
        self._seen: dict[str, _Node] = {}
        self._path: list[str] = []

    def run(self, outputs: list[str]) -> Validated:
        result = Validated()
        own_errors: list[Json] = []
        for output in outputs:
            node = self._visit(output)
            if node.is_valid:
                result.outputs.append(output)
                continue
            own_errors.extend(node.errors)
            for node_id, seen in self._seen.items():
                if seen.is_valid or not seen.errors:
                    continue
                entry = result.node_errors.setdefault(
                    node_id,
                    {
                        "errors": seen.errors,
                        "dependent_outputs": [],
                        "class_type": self._prompt[node_id]["class_type"],
                    },
                )
                if output not in entry["dependent_outputs"]:
                    entry["dependent_outputs"].append(output)
        if not result.outputs:
            details = "\n".join(f"{error['message']}: {error['details']}" for error in own_errors)
            result.error = _error(
                "prompt_outputs_failed_validation", "Prompt outputs failed validation", details
            )
        return result

    def _visit(self, node_id: str) -> _Node:
        if node_id in self._seen:
            return self._seen[node_id]
        if node_id in self._path:
            return self._cycle(node_id)
        self._path.append(node_id)
        errors: list[Json] = []
        is_valid = True
        node = self._prompt[node_id]
        entry = self._nodes.entry(node["class_type"])
        for section in ("required", "optional"):
            for name, spec in entry["input"].get(section, {}).items():
                if name not in node["inputs"]:
                    if section == "required":
                        errors.append(
                            _error(
                                "required_input_missing",
                                "Required input is missing",
                                name,
                                {"input_name": name},
                            )
                        )
                    continue
                found, is_fine = self._input(node, name, spec)
                errors.extend(found)
                is_valid = is_valid and is_fine
        self._path.pop()
        checked = self._seen.get(node_id) or _Node(is_valid=is_valid and not errors, errors=errors)
        self._seen[node_id] = checked
        return checked

    def _cycle(self, node_id: str) -> _Node:
        """Old versions only ran out of stack and said nothing about the nodes."""
        cycle = self._path[self._path.index(node_id) :]
        if self._nodes.version != CLASSIC_VERSION:
            named = [f"{n} ({self._prompt[n]['class_type']})" for n in [*cycle, node_id]]
            for member in cycle:
                extra = {"node_id": member, "cycle_nodes": cycle}
                error = _error("dependency_cycle", "Dependency cycle detected", " -> ".join(named), extra)
                self._seen[member] = _Node(is_valid=False, errors=[error])
        return self._seen.get(node_id) or _Node(is_valid=False, errors=[])

    def _input(self, node: Json, name: str, spec: Json) -> tuple[list[Json], bool]:
        """The errors of one input, and whether the nodes behind it are valid."""
        value = node["inputs"][name]
        config: list[Json] = [spec[0], spec[1] if len(spec) > 1 else {}]
        extra: dict[str, Json] = {"input_name": name, "input_config": config, "received_value": value}
        if isinstance(value, list):
            return self._link(name, value, config, extra)  # pyright: ignore[reportUnknownArgumentType]
        node["inputs"][name], error = _converted(name, value, config, extra)
        if error is None:
            error = self._out_of_range(node, name, config)
        return ([error] if error is not None else []), True

    def _link(self, name: str, link: list[Json], config: Json, extra: Json) -> tuple[list[Json], bool]:
        if len(link) != 2:
            text = "Bad linked input, must be a length-2 list of [node_id, slot_index]"
            return [_error("bad_linked_input", text, name, extra)], True
        if link[0] not in self._prompt:
            text = "Exception when validating node"
            why: Json = {"exception_type": "KeyError", "traceback": []}
            return [_error("exception_during_validation", text, repr(link[0]), why)], True
        outputs = self._nodes.entry(self._prompt[link[0]]["class_type"])["output"]
        received = outputs[link[1]] if 0 <= link[1] < len(outputs) else "*"
        wanted = config[0]
        if isinstance(wanted, str) and "*" not in (wanted, received) and received not in wanted.split(","):
            extra = {
                "input_name": name,
                "input_config": config,
                "received_type": received,
                "linked_node": link,
            }
            details = f"{name}, received_type({received}) mismatch input_type({wanted})"
            return [
                _error("return_type_mismatch", "Return type mismatch between linked nodes", details, extra)
            ], True
        return [], self._visit(link[0]).is_valid

    def _out_of_range(self, node: Json, name: str, config: Json) -> Json | None:
        kind, options = config
        value = node["inputs"][name]
        extra = {"input_name": name, "input_config": config, "received_value": value}
        is_number = isinstance(value, int | float)
        if is_number and "min" in options and value < options["min"]:
            text = f"Value {value} smaller than min of {options['min']}"
            return _error("value_smaller_than_min", text, name, extra)
        if is_number and "max" in options and value > options["max"]:
            return _error(
                "value_bigger_than_max", f"Value {value} bigger than max of {options['max']}", name, extra
            )
        if node["class_type"] in ("LoadImage", "LoadImageMask") and name == "image":
            if self._file_exists(str(value)):
                return None
            details = f"image - Invalid image file: {value}"
            text = "Custom validation failed for node"
            return _error("custom_validation_failed", text, details, {"input_name": name})
        choices: list[Json] | None = None if isinstance(kind, str) else kind
        if kind == "COMBO":
            choices = options.get("options")
        if choices is not None and value not in choices:
            is_long = len(choices) > LONG_LIST
            shown = f"(list of length {len(choices)})" if is_long else str(choices)
            if is_long:
                extra["input_config"] = None
            return _error(
                "value_not_in_list", "Value not in list", f"{name}: '{value}' not in {shown}", extra
            )
        return None


def _converted(name: str, value: Json, config: Json, extra: Json) -> tuple[Json, Json | None]:
    """The value in its input's type."""
    convert: Callable[[Json], Json] | None = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}.get(
        config[0] if isinstance(config[0], str) else ""
    )
    if convert is None:
        return value, None
    try:
        return convert(value), None
    except (ValueError, TypeError, OverflowError) as exception:
        text = f"Failed to convert an input value to a {config[0]} value"
        details = f"{name}, {value}, {exception}"
        return value, _error(
            "invalid_input_type", text, details, {**extra, "exception_message": str(exception)}
        )
