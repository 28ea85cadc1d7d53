"""Refusals in ComfyUI's own shape, `{"error": {type, message, details, extra_info}, "node_errors": {}}`, as
its page shows them.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from gpulane.adapters.base import ErrorAnswer
from gpulane.adapters.comfyui.graph import Graph
from gpulane.errors import BadRequest, ClientError, Impossible


class PromptRefused(BadRequest):
    """The prompt cannot be understood."""

    def __init__(
        self, code: str, message: str, *, details: str = "", extra_info: Mapping[str, object] | None = None
    ) -> None:
        super().__init__(message, code=code)
        self.details = details
        self.extra_info = dict(extra_info or {})


class _Error(msgspec.Struct):
    type: str
    message: str
    details: str = ""
    extra_info: dict[str, object] = msgspec.field(default_factory=dict[str, object])


class _Answer(msgspec.Struct):
    error: _Error
    node_errors: dict[str, object] = msgspec.field(default_factory=dict[str, object])


def error_answer(error: ClientError) -> ErrorAnswer:
    """Put any refusal into ComfyUI's shape. What no engine can run is a 400 there, since its page knows no
    422.
    """
    status = 400 if isinstance(error, Impossible) else error.status
    if isinstance(error, PromptRefused):
        told = _Error(error.code, error.message, error.details, error.extra_info)
    else:
        told = _Error(error.code, error.message, error.hint or "")
    return ErrorAnswer(status=status, body=msgspec.json.encode(_Answer(told)))


def impossible_answer(graph: Graph, missing: frozenset[str], error: Impossible) -> ErrorAnswer:
    """Say which nodes ask for what no engine has, so that the page marks them; the message tells the reason
    per gpu.
    """
    unknown = next((f for f in graph.items() if f"node:{f[1].kind}" in missing), None)
    if unknown is not None:
        name, node = unknown
        info: dict[str, object] = {"node_id": name, "class_type": node.kind, "node_title": node.kind}
        told = _Error(
            "missing_node_type",
            f"Node '{node.kind}' not found. The custom node may not be installed.",
            f"Node ID '#{name}'. {error.message}",
            info,
        )
        return ErrorAnswer(status=400, body=msgspec.json.encode(_Answer(told)))
    marked = {name: marks for name in graph if (marks := _marks(graph, name, missing)) is not None}
    told = _Error("prompt_outputs_failed_validation", "Prompt outputs failed validation", error.message)
    return ErrorAnswer(status=400, body=msgspec.json.encode(_Answer(told, marked)))


def _marks(graph: Graph, name: str, missing: frozenset[str]) -> object | None:
    node = graph[name]
    errors: list[object] = [
        {
            "type": "value_not_in_list",
            "message": "Value not in list",
            "details": f"{key}: '{value}' is on no engine",
            "extra_info": {"input_name": key, "input_config": None, "received_value": value},
        }
        for key, value in node.values.items()
        if f"{node.kind}.{key}={value}" in missing
    ]
    return {"errors": errors, "dependent_outputs": [], "class_type": node.kind} if errors else None
