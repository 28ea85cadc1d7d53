"""docs/api.md against the description that the API gives of itself; its examples against the types."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from gpulane.web.api.documents import EngineRestart, JobChange, JobDocument, LockRequest, NewJobRequest
from tests.integration.web.conftest import Door

pytestmark = pytest.mark.anyio

METHODS = {"get", "post", "put", "patch", "delete"}
KINDS = {
    ("POST", "/gpulane/v1/jobs"): NewJobRequest,
    ("POST", "/gpulane/v1/engines/restart"): EngineRestart,
    ("POST", "/gpulane/v1/locks"): LockRequest,
}
Described = set[tuple[str, str]]


async def described(door: Door) -> Described:
    told = await door.json("GET", "/gpulane/v1/openapi.json")
    return {
        (path, method.upper()) for path, methods in told["paths"].items() for method in METHODS & set(methods)
    }


async def test_the_table_lists_every_path_and_method(door: Door, root: Path) -> None:
    rows = re.findall(r"^\| `(/[^`]+)` \| ([A-Z, ]+) \|$", text(root), re.MULTILINE)
    listed = {(path, method) for path, methods in rows for method in methods.split(", ")}
    assert listed == await described(door)


async def test_every_curl_asks_for_something_that_exists(door: Door, root: Path) -> None:
    calls = curls(root)
    assert len(calls) > 10
    known = [(re.compile(re.sub(r"{\w+}", "[^/]+", path)), method) for path, method in await described(door)]
    unknown = [
        (method, path)
        for method, path, _ in calls
        if not any(pattern.fullmatch(path) and method == known_method for pattern, known_method in known)
    ]
    assert unknown == []


async def test_submitted_bodies_are_understood(door: Door, root: Path) -> None:
    bodies = [(method, path, body) for method, path, body in curls(root) if body]
    assert len(bodies) >= 3
    for method, path, body in bodies:
        kind = KINDS.get((method, path), JobChange)
        msgspec.json.decode(body.replace("$(cat workflow.json)", "{}"), type=kind)
    payload = next(body for _, _, body in bodies if "txt2img" in body)
    job = await door.json("POST", "/gpulane/v1/jobs", status=202, data=payload)
    assert job["service"] == "a1111"


async def test_the_job_shown_has_no_field_that_jobs_lack(root: Path) -> None:
    shown = msgspec.json.decode(
        re.findall(r"```json\n(.*?)```", text(root), re.DOTALL)[0], type=dict[str, object]
    )
    assert set(shown) <= {field.name for field in msgspec.structs.fields(JobDocument)}


async def test_fields_of_a_submission_are_those_there_are(root: Path) -> None:
    table = text(root).partition("| field | meaning |")[2].partition("\n\n")[0]
    fields = set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))
    ours = {"service", "workflow", "endpoint", "payload", "webhook", "deadline_seconds"}
    assert fields | ours == {field.name for field in msgspec.structs.fields(NewJobRequest)}


def text(root: Path) -> str:
    return (root / "docs/api.md").read_text()


def curls(root: Path) -> list[tuple[str, str, str]]:
    """Returns (method, path, body) of each call in the document."""
    found: list[tuple[str, str, str]] = []
    for line in re.findall(r"^curl .*$", text(root), re.MULTILINE):
        path = re.search(r"\$GPULANE_URL(/[^\s\"?]*)", line)
        assert path is not None, line
        method = re.search(r"-X ([A-Z]+)", line)
        body = re.search(r"-d '([^']*)'|-d \"((?:[^\"\\]|\\.)*)\"", line)
        sent = "" if body is None else body[1] or body[2].replace('\\"', '"')
        found.append((method[1] if method else "POST" if sent else "GET", path[1], sent))
    return found
