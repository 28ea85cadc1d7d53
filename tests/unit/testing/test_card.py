"""The simulated card: what it holds, what it logs, and that it never blocks anybody."""

import asyncio
import multiprocessing
from pathlib import Path

import pytest

from gpulane.testing.card import GIB, Card, CardOptions, Died, OutOfMemory
from gpulane.testing.judge import judge_files

pytestmark = pytest.mark.anyio


def quick(*, vram_gib: float = 24.0, speed: float = 1.0) -> CardOptions:
    return CardOptions(time_scale=0.0, context_gib=0.0, vram_gib=vram_gib, speed=speed)


def events(card: Card) -> list[str]:
    return [line["event"] for line in card.lines()]


async def test_a_model_is_loaded_once() -> None:
    use = (card := Card(options=quick())).attach("a", "comfyui")
    assert await use.load("m", "job 1", keep_others=True)
    assert not await use.load("m", "job 2", keep_others=True)
    assert use.is_resident("m")
    assert [line["job"] for line in card.lines() if line["event"] == "begin"] == ["job 1"]


async def test_it_never_blocks_a_second_job_and_logs_both(tmp_path: Path) -> None:
    file = tmp_path / "gpu0"
    options = CardOptions(time_scale=1.0)
    with Card(file, options) as one, Card(file, options) as two:
        first, second = one.attach("a", "comfyui"), two.attach("b", "a1111")

        async def compute(use: object, job: str) -> None:
            assert use in (first, second)
            with (first if use is first else second).interval("compute", job, "m"):
                await asyncio.sleep(0.02)

        async with asyncio.TaskGroup() as group:
            group.create_task(compute(first, "job 1"))
            group.create_task(compute(second, "job 2"))
    verdict = judge_files([file])
    assert [(o.first.job, o.second.job) for o in verdict.overlaps] == [("job 1", "job 2")]


async def test_engines_share_the_memory(tmp_path: Path) -> None:
    file = tmp_path / "gpu0"
    options = quick(vram_gib=8)
    with Card(file, options) as one, Card(file, options) as two:
        comfyui, a1111 = one.attach("a", "comfyui"), two.attach("b", "a1111")
        await comfyui.load("sdxl", "job 1", keep_others=True)
        assert two.bytes_used() == one.model_bytes("sdxl")
        with pytest.raises(OutOfMemory, match="CUDA out of memory"):
            await a1111.load("other-xl", "job 2", keep_others=False)
        oom = next(line for line in two.lines() if line["event"] == "oom")
        assert oom["engine"] == "b" and oom["total"] == 8 * GIB
        await comfyui.unload()
        assert two.bytes_used() == 0
        await a1111.load("other-xl", "job 3", keep_others=False)


async def test_own_old_models_make_place() -> None:
    card = Card(
        options=CardOptions(time_scale=0, vram_gib=10, model_gib={"a": 4, "b": 4, "c": 4}, context_gib=0)
    )
    use = card.attach("x", "comfyui")
    for model in ("a", "b", "a", "c"):
        await use.load(model, "job", keep_others=True)
    assert list(card.resident("x")) == ["a", "c"], "the least recently used one went"


async def test_computing_needs_memory_too() -> None:
    card = Card(options=quick(vram_gib=6))
    use = card.attach("x", "comfyui")
    with use.working("job", None, 1.0, 4):
        assert card.bytes_used() == 4 * GIB
    assert card.bytes_used() == 0
    with pytest.raises(OutOfMemory), use.working("job", None, 1.0, 7):
        pass


async def test_the_memory_of_a_crashed_engine_comes_free_and_its_interval_stays_open() -> None:
    card = Card(options=quick())
    use = card.attach("x", "comfyui")
    await use.load("m", "job", keep_others=True)
    with pytest.raises(Died), use.interval("compute", "job", "m"):
        raise Died
    use.lost()
    assert card.bytes_used() == 0
    assert events(card)[-2:] == ["begin", "engine_lost"]


def _attach_and_exit(file: Path) -> None:
    use = Card(file, quick()).attach("dead", "comfyui")
    with use.card.change("dead") as memory:
        memory.resident["m"] = GIB


def test_the_memory_of_a_dead_process_comes_free(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_attach_and_exit, args=(tmp_path / "gpu0",))
    process.start()
    process.join(20)
    with Card(tmp_path / "gpu0", quick()) as card:
        assert card.bytes_used() == 0


def test_a_torn_state_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    with Card(tmp_path / "gpu0", quick()) as card:
        card.attach("a", "http")
        state = tmp_path / "gpu0.state"
        state.write_bytes(state.read_bytes() + b'"}}')
        assert card.bytes_used() == 0
        state.write_bytes(b'{"engi')
        assert card.bytes_used() == 0


async def test_speed_and_size_set_the_durations() -> None:
    slow, fast = Card(options=quick(speed=1)), Card(options=quick(speed=2))
    assert slow.step_seconds(1.0, 1) == 2 * fast.step_seconds(1.0, 1) == slow.options.seconds_per_step
    assert slow.step_seconds(0.25, 4) == slow.step_seconds(1.0, 1)
    assert slow.load_seconds("sd_xl.safetensors") > slow.load_seconds("sd15.safetensors")
    assert slow.load_seconds("m") == 2 * fast.load_seconds("m")


async def test_jitter_is_seeded() -> None:
    def draws(seed: int) -> list[float]:
        card = Card(options=CardOptions(jitter=0.1, seed=seed))
        return [card.step_seconds(1.0, 1) for _ in range(5)]

    assert draws(1) == draws(1) != draws(2)
