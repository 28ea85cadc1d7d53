"""One supervised process: started, ended by itself, taken over, stopped with its children; its output."""

import asyncio
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from gpulane.config import EngineSettings
from gpulane.core.model import EngineUrl
from gpulane.engine import os_process, output
from gpulane.engine.os_process import MARK, RunRecord, marked
from gpulane.engine.process import EngineProcess, ProcessFolders, ProcessPace, ProcessState, file_name

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]

FAST = ProcessPace(
    poll_seconds=0.02, stop_seconds=0.5, back_off_seconds=0.05, back_off_seconds_max=0.2, settled_seconds=60.0
)
SLEEPS = "sleep 100"


@dataclass(slots=True)
class Scene:
    """A process under test and what was told of it."""

    folder: Path
    url: EngineUrl
    told: list[tuple[ProcessState, str]] = field(default_factory=list[tuple[ProcessState, str]])

    def process(
        self,
        command: str,
        *,
        pace: ProcessPace = FAST,
        env: dict[str, str] | None = None,
        ready_seconds: float = 60.0,
    ) -> EngineProcess:
        settings = EngineSettings(
            url=self.url, service="http", command=command, env=env or {}, ready_seconds=ready_seconds
        )
        return EngineProcess(
            settings,
            self.url,
            folders=ProcessFolders(data=self.folder),
            clock=time.monotonic,
            wall=time.time,
            on_change=lambda state, why: self.told.append((state, why)),
            pace=pace,
        )

    @property
    def states(self) -> list[str]:
        return [state.value for state, _ in self.told]

    @property
    def mark(self) -> str:
        return os_process.mark_of(self.folder, self.url)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Scene(tmp_path, EngineUrl(f"http://127.0.0.1:{probe.getsockname()[1]}"))


@contextlib.asynccontextmanager
async def looked_after(process: EngineProcess, *, leave: bool = False) -> AsyncIterator[EngineProcess]:
    """Run its task; stop the process in the end, or leave it as a crash of the gateway does."""
    task = asyncio.get_running_loop().create_task(process.run())
    try:
        yield process
    finally:
        task.cancel()
        await asyncio.wait({task})
        if not leave:
            await process.stop()


async def until(claim: Callable[[], object], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not claim():
            await asyncio.sleep(0.01)


async def until_started(process: EngineProcess) -> int:
    await until(lambda: process.view().pid)
    pid = process.view().pid
    assert pid is not None
    return pid


def sleeping(env: dict[str, str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(["/bin/sleep", "90"], env=env, start_new_session=True)


def reap(process: EngineProcess) -> None:
    """The gateway that "died" lives on in this test: nobody else takes its child's end."""
    if process._process is not None and process._process._child is not None:
        process._process._child.wait(5)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def test_it_is_started_becomes_ready_and_ends_without_remains(scene: Scene) -> None:
    # A child in the group, and one that left it: both are the engine's.
    children = "import subprocess, time; subprocess.Popen(['sleep', '99']); "
    children += (
        "subprocess.Popen(['sleep', '98'], start_new_session=True); print('up', flush=True); time.sleep(97)"
    )
    async with looked_after(scene.process(f"{sys.executable} -c {shlex.quote(children)}")) as process:
        pid = await until_started(process)
        assert process.view().state is ProcessState.STARTING
        await until(lambda: "up" in process.output.tail())
        assert len(marked(scene.mark)) == 3
        assert os.getsid(pid) == pid, "a session of its own: no terminal's Ctrl-C reaches it"
        process.note_ready()
        assert await process.until_ready(0.0)
        assert process.view().state is ProcessState.READY
    assert not is_alive(pid)
    assert marked(scene.mark) == []
    assert scene.states == ["starting", "ready", "stopped"]
    assert process.view().exit_status == -signal.SIGTERM
    assert not list((scene.folder / "engines").glob("*.json"))


async def test_one_that_does_not_listen_to_sigterm_is_killed(scene: Scene) -> None:
    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); "
    async with looked_after(
        scene.process(f"{sys.executable} -c {shlex.quote(stubborn + 'time.sleep(99)')}")
    ) as p:
        await until(lambda: "up" in p.output.tail())
        pid = await until_started(p)
        begun = time.monotonic()
        await p.stop("enough")
        assert 0.4 < time.monotonic() - begun < 5
        assert not is_alive(pid)
        assert (p.view().exit_status, p.view().why) == (-signal.SIGKILL, "enough")


async def test_it_is_started_again_with_longer_and_longer_rests(scene: Scene) -> None:
    async with looked_after(scene.process("sh -c 'echo once; exit 3'")) as process:
        await until(lambda: scene.states.count("backing_off") >= 4)
        whys = [why for state, why in scene.told if state is ProcessState.BACKING_OFF][:4]
        assert [why.partition("; ")[2] for why in whys] == [
            f"started again after {seconds} s" for seconds in ("0.05", "0.1", "0.2", "0.2")
        ]
        assert all("its process ended with status 3" in why for why in whys)
        assert process.view().restarts >= 3
        assert process.view().exit_status == 3
        assert process.output.tail().count("once") >= 4


async def test_a_long_life_makes_rests_short_again(scene: Scene) -> None:
    pace = ProcessPace(poll_seconds=0.02, back_off_seconds=0.05, settled_seconds=0.1)
    async with looked_after(scene.process("sleep 0.3", pace=pace)):
        await until(lambda: scene.states.count("backing_off") >= 3)
    whys = [why for state, why in scene.told if state is ProcessState.BACKING_OFF]
    assert all(why.endswith("after 0.05 s") for why in whys)


@pytest.mark.parametrize(
    ("command", "why"),
    [("no-such-program --x", "No such file"), ("/", "cannot be started: Permission denied")],
)
async def test_what_cannot_be_started_is_shown(scene: Scene, command: str, why: str) -> None:
    async with looked_after(scene.process(command)) as process:
        await until(lambda: scene.states.count("backing_off") >= 2)
        assert process.view().pid is None
    assert why in scene.told[0][1]


async def test_what_is_not_ready_in_time_is_ended_and_tried_again(scene: Scene) -> None:
    async with looked_after(scene.process(SLEEPS, ready_seconds=0.2)) as process:
        first = await until_started(process)
        await until(lambda: scene.states[:3] == ["starting", "backing_off", "starting"])
        assert not is_alive(first)
    assert "answered no probe within 0.2 s (ready_seconds)" in scene.told[1][1]


async def test_the_next_gpulane_takes_it_over(scene: Scene) -> None:
    async with looked_after(scene.process(SLEEPS), leave=True) as first:
        pid = await until_started(first)
    assert is_alive(pid)
    async with looked_after(scene.process(SLEEPS)) as second:
        assert await until_started(second) == pid
        assert second.view().is_adopted
        assert len(marked(scene.mark)) == 1
        os.kill(pid, signal.SIGKILL)
        reap(first)
        await until(lambda: second.view().pid not in {None, pid})
        assert second.view().restarts == 1
        assert not second.view().is_adopted
    assert marked(scene.mark) == []


async def test_one_whose_record_was_never_written_is_taken_over_by_its_mark(scene: Scene) -> None:
    child = sleeping({MARK: scene.mark})
    try:
        async with looked_after(scene.process(SLEEPS)) as process:
            assert await until_started(process) == child.pid
    finally:
        child.kill()
        child.wait()


async def test_a_number_that_belongs_to_somebody_else_is_left_alone(scene: Scene) -> None:
    stranger = sleeping({})
    try:
        async with looked_after(scene.process(SLEEPS), leave=True) as first:
            await until_started(first)
        file = scene.folder / "engines" / f"{file_name(scene.url)}.json"
        record = msgspec.json.decode(file.read_bytes(), type=RunRecord)
        await first.stop()
        # The number was given away; by the time of its start it is seen not to be ours.
        reused = msgspec.structs.replace(record, pid=stranger.pid, started_ticks=record.started_ticks - 500)
        file.write_bytes(msgspec.json.encode(reused))
        async with looked_after(scene.process(SLEEPS)) as second:
            assert await until_started(second) != stranger.pid
            assert not second.view().is_adopted
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


async def test_another_command_is_told_and_not_forced(scene: Scene) -> None:
    async with looked_after(scene.process(SLEEPS), leave=True) as first:
        pid = await until_started(first)
    async with looked_after(scene.process("sleep 101")) as second:
        assert await until_started(second) == pid
        assert "another command" in second.view().why
        await second.restart("to take the new command")
        assert second.view().pid not in {None, pid}
        assert "not answered" in second.view().why
    reap(first)


async def test_where_somebody_listens_nothing_is_started(scene: Scene) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(scene.url.rpartition(":")[2])))
        taken.listen()
        async with looked_after(scene.process("sh -c 'echo started'")) as process:
            await until(lambda: "backing_off" in scene.states)
            assert "something listens at its address already" in process.view().why
            assert not process.output.path.exists()
            taken.close()
            await until(lambda: "starting" in scene.states)


async def test_stopped_for_a_hand_off_it_stays_so_until_it_is_wanted(scene: Scene) -> None:
    async with looked_after(scene.process(SLEEPS)) as process:
        pid = await until_started(process)
        await process.stop_for_handoff()
        assert not is_alive(pid)
        await asyncio.sleep(3 * FAST.poll_seconds)
        assert process.view().state is ProcessState.STOPPED
        await process.start_again()
        again = await until_started(process)
        await process.start_again()
        assert process.view().pid == again != pid


async def test_its_output_stays_short(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "KEPT_BYTES", 20_000)
    many = "import time\nfor n in range(2000): print(n, 'x' * 40, flush=True)\n"
    many += "print('end', flush=True); time.sleep(99)"
    async with looked_after(scene.process(f"{sys.executable} -c {shlex.quote(many)}")) as process:
        await until(lambda: (process.output.tail() or [""])[-1] == "end")
        await until(lambda: sum(f.stat().st_size for f in (scene.folder / "logs").iterdir()) < 60_000)
        lines = process.output.tail(3)
        assert lines[0].startswith("1998 ")
        assert len(process.output.tail()) == output.LINES_MAX


async def test_lines_are_shown_without_secrets_and_terminal_orders(scene: Scene) -> None:
    env = {"HF_TOKEN": "hf_secret", "PORT": "8188", "OUR_KEY": "abc"}
    said = (
        r"printf 'a token hf_secret 8188\n  0%%\r 50%%\r100%% done\r\n\033[31mred\033[0m\n\377\n'; sleep 99"
    )
    async with looked_after(scene.process(f"sh -c {shlex.quote(said)}", env=env)) as process:
        await until(lambda: len(process.output.tail()) == 5)
        assert process.output.tail()[1:] == ["a token *** 8188", "100% done", "red", "\ufffd"]


async def test_secrets_of_gpulane_are_not_handed_on(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPULANE_KEY", "ours")
    async with looked_after(scene.process("sh -c 'env; echo end; sleep 99'", env={"MINE": "1"})) as process:
        await until(lambda: "end" in process.output.tail())
        shown = process.output.tail()
        assert "MINE=1" in shown
        assert not any(line.startswith("GPULANE_KEY") for line in shown)
