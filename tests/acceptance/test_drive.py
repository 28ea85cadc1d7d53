"""The drive's flows against simulated engines, each a process of its own, without a browser."""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

ROOT = Path(__file__).resolve().parents[2]


@contextlib.asynccontextmanager
async def engine(kind: str, card: Path) -> AsyncIterator[str]:
    command = ["-m", "gpulane.testing.process", kind, "--gpu", str(card), "--time-scale", "0.05"]
    # Steps of so small pictures would take no time at all.
    command += ["--plain-pictures", "--vram-gib", "80", "--seconds-per-step", "20"]
    process = await asyncio.create_subprocess_exec(sys.executable, *command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(20):
            line = (await process.stdout.readline()).decode()
        assert line.startswith("sim-engine ready "), line
        yield line.split()[-1]
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def test_every_flow_passes_on_simulated_engines(tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    card = tmp_path / "card.jsonl"
    async with engine("comfyui", card) as comfyui, engine("a1111", card) as a1111:
        process = await asyncio.create_subprocess_exec(
            *[sys.executable, "-m", "tests.drive", "--no-browser", "--report", str(report)],
            *["--comfyui-url", comfyui, "--a1111-url", a1111, "--pace", "0.3"],
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output = (await process.communicate())[0].decode()
    assert process.returncode == 0, output
    text = report.read_text()
    assert "| pass |" in text and "FAIL" not in text, text
    assert str(tmp_path) not in text, "a path of this machine"
