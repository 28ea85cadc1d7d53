"""Files of results: what is forgotten while it is copied leaves nothing behind."""

import asyncio
from pathlib import Path

import msgspec
import pytest
from aiohttp import web

from gpulane.core.model import EngineUrl, JobId
from gpulane.dispatcher.results import ArtifactFolder
from gpulane.engine.base import Artifact, RecordedResult
from gpulane.wire.client import EngineClient

pytestmark = pytest.mark.anyio
JOB = JobId("aabbccdd-0000-4000-8000-000000000000")


async def test_a_job_forgotten_while_its_files_are_copied_leaves_none(tmp_path: Path) -> None:
    asked, go_on = asyncio.Event(), asyncio.Event()

    async def view(request: web.Request) -> web.Response:
        asked.set()
        await go_on.wait()
        return web.Response(body=b"picture")

    app = web.Application()
    app.router.add_get("/view", view)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = EngineUrl(f"http://127.0.0.1:{runner.addresses[0][1]}")
    wire = EngineClient(url)
    folder = ArtifactFolder(tmp_path, {url: wire})
    artifacts = tuple(Artifact(name=f"{n}.png", target="/view") for n in range(2))
    result = RecordedResult(document=msgspec.Raw(b"{}"), engine=url, artifacts=artifacts)
    try:
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            tasks.create_task(folder.copy(JOB, result))
            await asked.wait()
            folder.drop(JOB)
            go_on.set()
        assert not (tmp_path / "aa" / JOB).exists()
        await folder.copy(JOB, result)
        path = folder.find(JOB, 1)
        assert path is not None
        assert path.read_bytes() == b"picture"
    finally:
        await wire.close()
        await runner.cleanup()
