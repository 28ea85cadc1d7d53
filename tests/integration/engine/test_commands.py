"""Programs that the settings name: bounded in time, killed with what they started, and what they said."""

import asyncio
import contextlib
import os
import time
from pathlib import Path

import pytest

from gpulane.engine.commands import SAID_BYTES_MAX, run_command
from gpulane.errors import EngineError
from tests.integration.engine.a1111_scene import until

pytestmark = pytest.mark.anyio


def is_alive(pid: int) -> bool:
    """Whether it runs: one that was killed may wait for whoever collects it."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def shell(script: str) -> tuple[str, ...]:
    return ("/bin/sh", "-c", script)


async def test_done(tmp_path: Path) -> None:
    script = 'echo "$WORD $HOME_OF" > said; echo much >&2'
    await run_command(shell(script), seconds=10, env={"WORD": "now"}, folder=str(tmp_path))
    assert (tmp_path / "said").read_text() == "now \n"


async def test_what_it_said_is_told() -> None:
    with pytest.raises(EngineError, match="status 3: no such unit") as caught:
        await run_command(shell("echo no such unit >&2; exit 3"), seconds=10)
    assert caught.value.code == "command_failed"
    with pytest.raises(EngineError) as caught:
        await run_command(shell("yes | head -c 1000000 >&2; exit 1"), seconds=10)
    assert len(caught.value.message) < SAID_BYTES_MAX + 100


@pytest.mark.parametrize(
    ("argv", "folder"), [(("/no/such/program",), None), (("/bin/true",), "/no/such/folder"), (("/",), None)]
)
async def test_what_cannot_be_run(argv: tuple[str, ...], folder: str | None) -> None:
    with pytest.raises(EngineError, match="cannot be run") as caught:
        await run_command(argv, seconds=10, folder=folder)
    assert caught.value.code == "command_failed"


async def test_it_is_killed_with_its_group_when_its_time_is_over(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"sleep 100 & echo $! $$ > {pids}; trap '' TERM; wait"
    began = time.monotonic()
    with pytest.raises(EngineError, match="was killed") as caught:
        await run_command(shell(script), seconds=0.5)
    assert caught.value.code == "timeout" and time.monotonic() - began < 5
    child, leader = (int(pid) for pid in pids.read_text().split())
    await until(lambda: not is_alive(child) and not is_alive(leader))


async def test_a_caller_who_leaves_takes_it_along(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await run_command(shell(f"echo $$ > {pid}; sleep 100"), seconds=50)
    await until(lambda: not is_alive(int(pid.read_text())))


async def test_a_program_left_running_is_not_waited_for(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    began = time.monotonic()
    await run_command(shell(f"sleep 100 & echo $! > {pid}"), seconds=50)
    assert time.monotonic() - began < 5
    left = int(pid.read_text())
    assert is_alive(left)
    os.kill(left, 9)
