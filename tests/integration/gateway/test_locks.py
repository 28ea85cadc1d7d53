"""GPUs for strangers, on the whole gateway: granted by the queue, given back by the kernel's word alone."""

import asyncio
import contextlib
import fcntl
import json
import os
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

import gpulane
from gpulane.errors import GpulaneError
from tests.integration.gateway.small_fleet import Client, Fleet, slow, small_fleet, until

pytestmark = pytest.mark.anyio

LOCKS = "/gpulane/v1/locks"
HOLDERS = 60
HOLDERS_AT_ONCE = 12


@dataclass(slots=True)
class Lines:
    """The events of one lock, as its holder reads them."""

    answer: aiohttp.ClientResponse

    async def next(self) -> Any:
        async with asyncio.timeout(20):
            line = await self.answer.content.readline()
        return json.loads(line) if line else None

    async def until(self, event: str) -> Any:
        while (line := await self.next()) is not None:
            if line["event"] == event:
                return line
        raise AssertionError(f"the lock ended before {event}")


@contextlib.asynccontextmanager
async def lock(client: Client, **wanted: object) -> AsyncIterator[Lines]:
    async with client.http.post(client.url + LOCKS, json={"gpu": "gpu0", **wanted}) as answer:
        assert answer.status == 200, await answer.text()
        yield Lines(answer)


@contextlib.contextmanager
def flocked(path: str | Path) -> Iterator[int]:
    file = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield file
    finally:
        os.close(file)


async def gpu(client: Client) -> Any:
    return (await client.get("/gpulane/v1/gpus"))["gpus"][0]


async def is_idle(client: Client) -> bool:
    return (await gpu(client))["state"] == "idle"


def lock_file(fleet: Fleet) -> Path:
    return fleet.folder / "data/locks/gpu0.lock"


async def test_a_lock_waits_for_a_job_and_a_job_for_the_lock(tmp_path: Path) -> None:
    async with small_fleet(tmp_path) as fleet, fleet.gateway() as client:
        first = await client.prompt(slow(steps=20, seed=1))
        await until(lambda: client.is_running(first))
        async with lock(client, note="training") as lines:
            waiting = await lines.next()
            assert waiting["event"] == "waiting" and waiting["position"] == 1 and waiting["reason"]["code"]
            granted = await lines.until("granted")
            assert granted["gpu"] == "box/gpu0" and granted["lock_file"] == str(lock_file(fleet))
            assert (await client.job(first))["state"] == "succeeded"
            with flocked(granted["lock_file"]):
                status, shown = await client.post(f"{LOCKS}/{granted['job']}/hold", {})
                assert status == 200 and shown["service"] == shown["kind"] == "lock"
                second = await client.prompt(slow(steps=1, seed=2))
                assert (await gpu(client))["job"] == granted["job"]
                assert (await client.job(second))["state"] == "queued"
                assert (await client.job(granted["job"]))["progress"]["text"] == "training"
                status, _ = await client.post(f"{LOCKS}/{granted['job']}/release", {})
                assert status == 200
                assert await lines.until("released")
                # Said to be over, but the file is held still: the kernel's word counts.
                assert (await client.job(second))["state"] == "queued"
                assert (await client.job(granted["job"]))["state"] == "running"
        assert (await client.ended(granted["job"]))["state"] == "succeeded"
        assert (await client.ended(second))["state"] == "succeeded"


async def test_a_client_that_leaves_frees_the_gpu(tmp_path: Path) -> None:
    async with small_fleet(tmp_path) as fleet, fleet.gateway() as client:
        async with lock(client) as lines:
            granted = await lines.until("granted")
            async with lock(client) as others:
                waiting = await others.next()
                assert waiting["event"] == "waiting"
                others.answer.close()
            assert (await client.ended(waiting["job"]))["state"] == "cancelled"
            lines.answer.close()
        ended = await client.ended(granted["job"])
        assert (ended["state"], ended["error"]["code"]) == ("failed", "holder_gone")
        await until(lambda: is_idle(client))


async def test_cancel_and_time_limit_tell_the_holder_and_wait_for_it(tmp_path: Path) -> None:
    async with small_fleet(tmp_path) as fleet, fleet.gateway() as client:
        for seconds_max, event, state in ((60, "cancelled", "cancelled"), (0.2, "expired", "failed")):
            async with lock(client, seconds_max=seconds_max) as lines:
                granted = await lines.until("granted")
                with flocked(granted["lock_file"]):
                    if event == "cancelled":
                        async with client.http.delete(
                            f"{client.url}/gpulane/v1/jobs/{granted['job']}"
                        ) as answer:
                            assert answer.status == 202
                    assert await lines.until(event)
                    assert await lines.next() is None
                    assert (await gpu(client))["state"] == "busy"
                    status, refusal = await client.post(f"{LOCKS}/{granted['job']}/hold", {})
                    assert (status, refusal["error"]["code"]) == (409, "not_granted")
            ended = await client.ended(granted["job"])
            assert ended["state"] == state
        assert ended["error"]["code"] == "time_limit"


async def test_a_holder_without_the_file_is_told(tmp_path: Path) -> None:
    async with small_fleet(tmp_path) as fleet, fleet.gateway() as client, lock(client) as lines:
        granted = await lines.until("granted")
        status, refusal = await client.post(f"{LOCKS}/{granted['job']}/hold", {})
        assert (status, refusal["error"]["code"]) == (409, "not_held")


async def test_a_held_file_that_is_let_go_of_ends_the_lock(tmp_path: Path) -> None:
    async with small_fleet(tmp_path) as fleet, fleet.gateway() as client, lock(client) as lines:
        granted = await lines.until("granted")
        with flocked(granted["lock_file"]):
            await client.post(f"{LOCKS}/{granted['job']}/hold", {})
        assert await lines.until("gone")
        assert (await client.ended(granted["job"]))["error"]["code"] == "holder_gone"


async def test_any_gpu_and_what_cannot_be(tmp_path: Path) -> None:
    async with small_fleet(tmp_path, gpus=2) as fleet, fleet.gateway() as client:
        async with lock(client, gpu=None) as one, lock(client, gpu=None) as other:
            gpus = {(await lines.until("granted"))["gpu"] for lines in (one, other)}
        assert gpus == {"box/gpu0", "box/gpu1"}
        wrong: dict[str, tuple[int, str]] = {
            '{"gpu": "gpu7"}': (404, "no_such_gpu"),
            '{"gpu": null, "labels": ["huge"]}': (422, "impossible"),
            '{"seconds_max": 1e9}': (400, "bad_field"),
            '{"seconds_max": -1}': (400, "bad_field"),
            '{"seconds": 1}': (400, "unknown_field"),
        }
        for body, (status, code) in wrong.items():
            async with client.http.post(client.url + LOCKS, data=body) as answer:
                found = await answer.json()
                assert (answer.status, found["error"]["code"]) == (status, code), found
        prompt = await client.prompt(slow(steps=1, seed=9))
        for verb in ("hold", "release"):
            status, _ = await client.post(f"{LOCKS}/{prompt}/{verb}", {})
            assert status in {404, 409}


@pytest.mark.needs("flock")
async def test_with_a_lock_folder_strangers_wait_for_jobs(tmp_path: Path) -> None:
    path = tmp_path / "locks/gpu0.lock"
    async with small_fleet(tmp_path) as fleet, fleet.gateway(f"lock_dir: {path.parent}") as client:
        assert path.parent.stat().st_mode & 0o022 == 0
        job = await client.prompt(slow(steps=40, seed=7))
        await until(lambda: client.is_running(job))
        assert path.read_text() == f"{os.getpid()} {job}\n"
        stranger = await asyncio.create_subprocess_exec(
            "flock", path, "echo", "done", stdout=asyncio.subprocess.PIPE
        )
        async with asyncio.timeout(20):
            out, _ = await stranger.communicate()
        assert out == b"done\n"
        assert (await client.job(job))["progress"] is None, "it was over"
        assert (await client.ended(job))["state"] == "succeeded"
        await until(lambda: is_idle(client))
        with flocked(path):
            pass


@pytest.mark.needs("flock")
async def test_a_stranger_with_flock_occupies_the_gpu(tmp_path: Path) -> None:
    async with small_fleet(tmp_path) as fleet, fleet.gateway() as client:
        stranger = await asyncio.create_subprocess_exec("flock", lock_file(fleet), "sleep", "60")
        try:

            async def is_locked() -> bool:
                shown = await gpu(client)
                return shown["state"] == "busy" and shown["why"].startswith("locked by pid ")

            await until(is_locked)
            job = await client.prompt(slow(steps=1, seed=3))
            async with lock(client) as lines:
                assert (await lines.next())["event"] == "waiting"
            assert (await client.job(job))["state"] == "queued"
        finally:
            stranger.kill()  # its child `sleep` has the file, too
            await stranger.wait()
        assert (await client.job(job))["state"] == "queued"
        why = (await gpu(client))["why"]
        assert "sleep" in why or "locked by" in why
        os.kill(_holder_of(lock_file(fleet)), 9)
        assert (await client.ended(job))["state"] == "succeeded"


async def test_a_deleted_lock_file_counts_on(tmp_path: Path) -> None:
    async with small_fleet(tmp_path) as fleet, fleet.gateway() as client:
        with flocked(lock_file(fleet)):
            lock_file(fleet).unlink()
            job = await client.prompt(slow(steps=1, seed=4))

            async def is_locked() -> bool:
                return (await gpu(client))["why"].startswith("locked by pid")

            await until(is_locked)
            assert (await client.job(job))["state"] == "queued"
            assert lock_file(fleet).exists(), "made anew for whoever comes"
        assert (await client.ended(job))["state"] == "succeeded"


async def test_many_holders_in_many_ways_never_share_a_gpu(tmp_path: Path) -> None:
    inside: dict[str, int] = {}
    overlaps: list[str] = []
    ends: list[str] = []

    def hold(url: str, number: int) -> None:
        """One program: well, out of time, or gone in the middle of its turn."""
        seconds_max = 0.05 if number % 5 == 0 else 60.0
        try:
            with gpulane.lock(("gpu0", None)[number % 2], url=url, seconds_max=seconds_max) as held:
                if inside.setdefault(held.name, number) != number:
                    overlaps.append(f"{number} beside {inside[held.name]} on {held.name}")
                if number % 5 == 0:
                    assert held.lost.wait(20)
                    ends.append("lost")
                else:
                    ends.append("well")
                del inside[held.name]
        except GpulaneError:
            ends.append("refused")

    async with small_fleet(tmp_path, gpus=2) as fleet, fleet.gateway() as client:
        prompts = [await client.prompt(slow(steps=1, seed=100 + n)) for n in range(10)]
        with ThreadPoolExecutor(HOLDERS_AT_ONCE) as pool:
            loop = asyncio.get_running_loop()
            await asyncio.gather(
                *(loop.run_in_executor(pool, hold, client.url, number) for number in range(HOLDERS))
            )
        assert {(await client.ended(job))["state"] for job in prompts} == {"succeeded"}
        await until(lambda: is_idle(client))
        told = await client.get("/gpulane/v1/jobs?service=lock&limit=100")
    assert overlaps == []
    assert (ends.count("well"), len(ends)) == (HOLDERS * 4 // 5, HOLDERS)
    assert {job["state"] for job in told["jobs"]} <= {"succeeded", "failed"}
    assert fleet.judged().is_clean


async def test_after_a_restart_the_file_tells(tmp_path: Path) -> None:
    async with small_fleet(tmp_path) as fleet:
        async with fleet.gateway() as client, lock(client) as lines:
            granted = await lines.until("granted")
            held = flocked(granted["lock_file"])
            held.__enter__()
            await client.post(f"{LOCKS}/{granted['job']}/hold", {})
            waiting = await client.prompt(slow(steps=1, seed=5))
        async with fleet.gateway() as client:
            assert (await gpu(client))["state"] == "busy"
            assert (await client.job(waiting))["state"] == "queued"
            held.__exit__(None, None, None)
            assert (await client.ended(granted["job"]))["state"] in {"cancelled", "failed"}
            assert (await client.ended(waiting))["state"] == "succeeded"


def _holder_of(path: Path) -> int:
    found = path.stat()
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            files = (process / "fd").iterdir() if process.name.isdigit() else ()
            for opened in files:
                if opened.stat().st_ino == found.st_ino and int(process.name) != os.getpid():
                    return int(process.name)
    raise AssertionError("nobody has it")
