"""Answers a call whose client waits for its job: head and body as the engine gives them.

The client's leaving is noticed at once (the server cancels this code, see `app.make_runner`) and told to the
gateway exactly once. The job's life does not depend on this code: the gateway decides whether it goes on.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from aiohttp import web

from gpulane.adapters.base import EngineRequest
from gpulane.core.model import JobId
from gpulane.errors import GpulaneError, StoreError
from gpulane.relay import HeaderRules, HeldAnswer, RawResponse
from gpulane.store.base import NewJob
from gpulane.web.patience import finished
from gpulane.web.ports import HeldCall, JobsPort

_RULES = HeaderRules(engine_host="")


async def hold(jobs: JobsPort, new: NewJob, request: EngineRequest) -> HeldCall:
    """Admit a job whose client waits; a client that leaves in the middle of it is told to the gateway."""
    task = asyncio.get_running_loop().create_task(jobs.hold(new, request))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        if not task.cancelled() and task.exception() is None:
            jobs.leave(task.result().job)
        raise


async def serve_held(request: web.Request, call: HeldCall, jobs: JobsPort) -> web.StreamResponse:
    """Wait for the answer and pass it on. Raises what the answer failed with while nothing has been sent."""
    try:
        response = await send_answer(request, call.job, call.answer, jobs)
    except GpulaneError:
        jobs.answered(call.job)
        raise
    except BaseException:  # the client left (cancelled, or a broken connection), or the server stops
        jobs.leave(call.job)
        raise
    jobs.answered(call.job)
    return response


async def send_answer(
    request: web.Request, job: JobId, answer: HeldAnswer, jobs: JobsPort
) -> web.StreamResponse:
    """Stream an answer from its beginning to one reader."""
    status, headers = await answer.wait_head()
    length = answer.bytes_written if answer.is_finished else _length(headers)
    response = RawResponse(
        status=status,
        reason=_reason(status),
        raw_headers=[*_RULES.for_client(headers), *await _ours(job, jobs)],
        length=length,
    )
    await response.prepare(request)
    if request.method != "HEAD":
        async for chunk in answer.chunks():
            await response.write(chunk)
    await response.write_eof()
    return response


async def _ours(job: JobId, jobs: JobsPort) -> list[tuple[str, str]]:
    said = [("X-Gpulane-Job", str(job))]
    try:
        record = await finished(jobs.record(job))
    except StoreError:  # the picture is here: it is worth more than a header
        return said
    if record is not None and record.gpu is not None:
        said.append(("X-Gpulane-Gpu", str(record.gpu)))
    return said


def _length(headers: tuple[tuple[str, str], ...]) -> int | None:
    stated = next((value for name, value in headers if name.lower() == "content-length"), None)
    return int(stated) if stated is not None and stated.isascii() and stated.isdigit() else None


def _reason(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Unknown"
