"""What an engine says of its state, as recorded from a real one."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gpulane.adapters.a1111.status import (
    Flavor,
    GlobalProgress,
    Memory,
    PendingTasks,
    TaskProgress,
    flavor_of,
    task_question,
)


def recorded(shared: Path, file: str, name: str) -> bytes:
    entries: list[dict[str, Any]] = json.loads((shared / "recordings/a1111" / file).read_text())
    return json.dumps(next(e["response"] for e in entries if e["name"] == name)).encode()


def test_idle_and_running(shared: Path) -> None:
    idle = msgspec.json.decode(recorded(shared, "basic_get.json", "progress"), type=GlobalProgress)
    assert idle.state.is_idle
    running = recorded(shared, "progress_running.json", "progress_skip_image")
    assert not msgspec.json.decode(running, type=GlobalProgress).state.is_idle
    stale = recorded(shared, "basic_post.json", "progress_after_idle_interrupt")
    state = msgspec.json.decode(stale, type=GlobalProgress).state
    # The flag of an interrupt that hit nothing stays until the next job begins.
    assert state.is_idle and state.interrupted


def test_tasks(shared: Path) -> None:
    running = recorded(shared, "progress_running.json", "internal_progress_running")
    assert msgspec.json.decode(running, type=TaskProgress).active
    done = msgspec.json.decode(
        recorded(shared, "progress_running.json", "internal_progress_done"), type=TaskProgress
    )
    assert done.completed and done.is_known
    # A job that failed while it ran: active, though the engine is idle.
    assert msgspec.json.decode(
        recorded(shared, "basic_post.json", "progress_badopt"), type=TaskProgress
    ).active
    global_state = recorded(shared, "basic_post.json", "progress_sdapi_after_badopt")
    assert msgspec.json.decode(global_state, type=GlobalProgress).state.is_idle
    # A job that failed before it ran: pending for ever.
    stuck = recorded(shared, "basic_post.json", "pending_after_badimg")
    assert msgspec.json.decode(stuck, type=PendingTasks).tasks == ["task(badimg)"]
    unknown = recorded(shared, "basic_get.json", "internal_progress_unknown")
    assert not msgspec.json.decode(unknown, type=TaskProgress).is_known


def test_a_machine_without_a_gpu_tells_no_memory(shared: Path) -> None:
    assert msgspec.json.decode(recorded(shared, "basic_get.json", "memory"), type=Memory).card() is None
    told = b'{"cuda":{"system":{"free":3.0,"used":1,"total":4},"active":{"current":1}}}'
    assert msgspec.json.decode(told, type=Memory).card() == (3, 4)


def test_questions_ask_for_no_preview() -> None:
    assert json.loads(task_question("x")) == {"id_task": "x", "id_live_preview": -1, "live_preview": False}


@pytest.mark.parametrize(
    ("documents", "flavor"),
    [
        ({"options": b"{}"}, Flavor.A1111),
        ({"options": b'{"forge_preset":"sd"}'}, Flavor.FORGE),
        ({"sd-modules": b"[]"}, Flavor.FORGE),
        ({"options": b'{"diffusers_version":"x"}'}, Flavor.SDNEXT),
    ],
)
def test_flavors(documents: dict[str, bytes], flavor: Flavor) -> None:
    assert flavor_of(documents) is flavor
