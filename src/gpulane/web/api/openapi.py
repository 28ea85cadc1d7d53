"""Describes the native API as OpenAPI 3.1; made from its endpoints and types."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import msgspec

from gpulane.web.api import documents
from gpulane.web.api.asked import Endpoint
from gpulane.web.ports import Role

_MESSAGES = (
    documents.JobMessage,
    documents.StateMessage,
    documents.PositionMessage,
    documents.ProgressMessage,
    documents.PreviewMessage,
    documents.GpusMessage,
    documents.QueueMessage,
)


def describe(endpoints: Sequence[Endpoint]) -> bytes:
    """Write the document."""
    types: list[type[msgspec.Struct]] = [documents.Refusal, *_MESSAGES]
    for endpoint in endpoints:
        types += [kind for kind in (endpoint.takes, endpoint.gives) if kind is not None and kind not in types]
    _, components = msgspec.json.schema_components(
        types, schema_hook=_anything, ref_template="#/components/schemas/{name}"
    )
    paths: dict[str, dict[str, object]] = {}
    for endpoint in endpoints:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint)
    schemes = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "basic": {"type": "http", "scheme": "basic"},
        "key": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
    }
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "gpulane", "version": _version()},
            "paths": paths,
            "components": {"schemas": components, "securitySchemes": schemes},
            "security": [{}, {"bearer": []}, {"key": []}, {"basic": []}],
        }
    )


def _operation(endpoint: Endpoint) -> dict[str, object]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", endpoint.path)
    ]
    parameters += [
        {"name": name, "in": "query", "required": False, "schema": {"type": "string"}}
        for name in endpoint.query
    ]
    schema = {"type": "string"} if endpoint.gives is None else _reference(endpoint.gives)
    if endpoint.gives is None and endpoint.content_type == "application/json":
        schema = {}
    answers: dict[str, object] = {
        str(endpoint.status): {
            "description": endpoint.summary,
            "content": {endpoint.content_type: {"schema": schema}},
        },
        "default": {
            "description": "A refusal.",
            "content": {"application/json": {"schema": _reference(documents.Refusal)}},
        },
    }
    operation: dict[str, object] = {
        "summary": endpoint.summary,
        "operationId": endpoint.answer.__name__ if hasattr(endpoint.answer, "__name__") else endpoint.path,
        "parameters": parameters,
        "responses": answers,
    }
    if endpoint.role is not Role.VIEWER:
        operation["description"] = f"Takes the role {endpoint.role.value}."
    if endpoint.takes is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _reference(endpoint.takes)}},
        }
    return operation


def _anything(_: type) -> dict[str, object]:
    """Describe `object`; an empty schema would count as none."""
    return {"description": "Any JSON."}


def _version() -> str:
    try:
        return version("gpulane")
    except PackageNotFoundError:  # run from a bare checkout
        return "0"


def _reference(kind: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}
