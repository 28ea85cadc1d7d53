"""Two accounts by keys on the real gateway: what is one's cannot be seen, fetched or stopped by the other."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.integration.gateway.small_fleet import Client, picture, slow, small_fleet, until

pytestmark = pytest.mark.anyio

ANN, BOB = "key-of-ann", "key-of-bob"
TASK, NAMED = "task(of-ann)", "prompt-of-ann"
KEYS = "keys:\n" + "\n".join(
    f"  - {{account: {name}, sha256: {hashlib.sha256(key.encode()).hexdigest()}}}"
    for name, key in (("ann", ANN), ("bob", BOB))
)
MARK = "sOf-ann"
"""Begins the names of Ann's files; her ids and this must stand in nothing that Bob is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """Something Bob tries. `{ended}`, `{running}`, `{waiting}`, `{call}` are ids of Ann's jobs."""

    method: str
    path: str
    body: object = None


SWEEP = [
    # The native API.
    *(
        Attempt(method=method, path=f"/gpulane/v1/jobs/{{{job}}}{rest}")
        for job in ("ended", "running", "waiting", "call")
        for method, rest in (
            ("GET", ""),
            ("GET", "/result"),
            ("GET", "/artifacts"),
            ("GET", "/artifacts/0"),
            ("GET", "/events"),
            ("DELETE", ""),
        )
    ),
    Attempt(method="PATCH", path="/gpulane/v1/jobs/{waiting}", body={"priority": 5}),
    Attempt(method="GET", path="/gpulane/v1/jobs"),
    Attempt(method="GET", path="/gpulane/v1/jobs?user=ann"),
    # ComfyUI's.
    Attempt(method="GET", path="/queue"),
    Attempt(method="GET", path="/prompt"),
    Attempt(method="GET", path="/history"),
    Attempt(method="GET", path="/history/{ended}"),
    Attempt(method="GET", path=f"/history/{NAMED}"),
    Attempt(method="GET", path="/api/jobs"),
    Attempt(method="GET", path="/api/jobs/{ended}"),
    Attempt(method="GET", path=f"/api/jobs/{NAMED}"),
    Attempt(method="POST", path="/api/jobs/{running}/cancel"),
    Attempt(method="POST", path="/api/jobs/cancel", body={"job_ids": ["{running}", "{waiting}", NAMED]}),
    Attempt(method="POST", path="/interrupt"),
    Attempt(method="POST", path="/interrupt", body={"prompt_id": "{running}"}),
    Attempt(method="POST", path="/queue", body={"delete": ["{waiting}", NAMED]}),
    Attempt(method="POST", path="/queue", body={"clear": True}),
    Attempt(method="POST", path="/history", body={"delete": ["{ended}"]}),
    Attempt(method="POST", path="/history", body={"clear": True}),
    Attempt(method="GET", path="/view?filename={file}&subfolder=&type=output"),
    Attempt(method="GET", path="/api/view?filename={file}&type=output"),
    # A1111's.
    Attempt(method="GET", path="/sdapi/v1/progress"),
    Attempt(method="GET", path="/internal/pending-tasks"),
    Attempt(method="POST", path="/internal/progress", body={"id_task": TASK}),
    Attempt(method="POST", path="/internal/progress", body={"id_task": "{call}"}),
    Attempt(method="POST", path="/sdapi/v1/interrupt"),
    Attempt(method="POST", path="/sdapi/v1/skip"),
    Attempt(method="GET", path="/sdapi/v1/options"),
]


async def try_it(client: Client, attempt: Attempt, ids: dict[str, str]) -> tuple[int, str]:
    url = client.url + attempt.path.format_map(ids)
    async with client.http.request(attempt.method, url, json=filled(attempt.body, ids)) as answer:
        return answer.status, (await answer.read()).decode("latin-1")


def filled(body: object, ids: dict[str, str]) -> Any:
    """Put the ids into a body."""
    text = json.dumps(body)
    for name, value in ids.items():
        text = text.replace(f"{{{name}}}", value)
    return json.loads(text)


@pytest.fixture
async def people(tmp_path: Path) -> AsyncIterator[tuple[Client, Client]]:
    timeout = aiohttp.ClientTimeout(total=20.0)
    async with (
        small_fleet(tmp_path) as fleet,
        fleet.gateway(KEYS, key=ANN) as ann,
        aiohttp.ClientSession(headers={"X-Api-Key": BOB}, timeout=timeout) as for_bob,
    ):
        yield ann, Client(ann.service, for_bob, ann.url)


async def test_nothing_of_anns_is_bobs(people: tuple[Client, Client]) -> None:
    ann, bob = people
    async with asyncio.TaskGroup() as tasks:
        ids, call = await jobs_of(ann, tasks)
        ours = [*ids.values(), TASK, NAMED, MARK]
        for attempt in SWEEP:
            status, told = await try_it(bob, attempt, ids)
            # What Bob himself sent may come back in the sentence of a refusal; nothing else may.
            sent = attempt.path.format_map(ids) + str(filled(attempt.body, ids))
            leaked = [word for word in ours if word in told and not (status >= 400 and word in sent)]
            assert leaked == [], (attempt, status, told[:300])
            if "/jobs/{" in attempt.path and attempt.path.startswith("/gpulane/"):
                assert status == 404, (attempt, status, told[:300])
            assert await states(ann, ids) == EXPECTED, attempt
        # Ann's own eyes and hands reach all of it.
        assert (await ann.get(f"/history/{ids['ended']}"))[ids["ended"]]["outputs"]
        await try_it(ann, Attempt(method="POST", path="/interrupt"), ids)
        for job in ("running", "waiting"):
            await ann.ended(ids[job])
        assert await call == 200


EXPECTED = {"ended": "succeeded", "running": "running", "waiting": "queued", "call": "queued"}


async def jobs_of(client: Client, tasks: asyncio.TaskGroup) -> tuple[dict[str, str], asyncio.Task[int]]:
    """One job of each state: ended, running, waiting under a name of Ann's, and a call whose client waits."""
    workflow = slow(steps=1, seed=1)
    workflow["2"] = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": MARK}}
    ended = await client.prompt(workflow)
    result = (await client.ended(ended)) and await client.get(f"/history/{ended}")
    file = result[ended]["outputs"]["2"]["images"][0]["filename"]
    running = await client.prompt(slow(steps=3000, seed=2))
    await until(lambda: client.is_running(running))
    assert await client.prompt(slow(steps=1, seed=3), prompt_id=NAMED) == NAMED

    async def post_call() -> int:
        return (await client.post("/sdapi/v1/txt2img", picture() | {"force_task_id": TASK}))[0]

    call = tasks.create_task(post_call())

    async def waiting_ones() -> dict[str, str] | None:
        listed = (await client.get("/gpulane/v1/jobs?state=queued"))["jobs"]
        found = {job["service"]: job["id"] for job in listed}
        return found if len(found) == 2 else None

    waiting = await until(waiting_ones)
    ids = {"ended": ended, "running": running, "waiting": waiting["comfyui"], "call": waiting["a1111"]}
    return ids | {"file": file}, call


async def states(client: Client, ids: dict[str, str]) -> dict[str, str]:
    return {name: (await client.job(ids[name]))["state"] for name in EXPECTED}
