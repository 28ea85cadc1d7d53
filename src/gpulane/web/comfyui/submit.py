"""POST /prompt: a body becomes a stored job of the caller, answered as ComfyUI answers.

The same prompt_id with the same content is the same job, whoever sends it twice; nothing is executed twice
by a retry.
"""

from __future__ import annotations

from typing import Final

from aiohttp import web

from gpulane.adapters.base import Recognized
from gpulane.adapters.comfyui.prompt import PromptLimits, graph_of, parse_prompt, read_meta
from gpulane.adapters.comfyui.refusals import PromptRefused, impossible_answer
from gpulane.core.model import WAITING, Job, JobId, Service
from gpulane.errors import Conflict, Impossible, TooLarge, Unavailable
from gpulane.store.base import Code, JobRecord, NewJob, Reply
from gpulane.web.bodies import MIB, read_body, understood
from gpulane.web.comfyui.answers import json_answer, require_user, too_large
from gpulane.web.comfyui.checks import Checks
from gpulane.web.comfyui.lists import Lists
from gpulane.web.comfyui.live import LiveJobs
from gpulane.web.comfyui.own import OwnJobs, number_of, shown_id
from gpulane.web.patience import finished
from gpulane.web.ports import Identity, WebContext

NAME_TAG_LENGTH: Final = 6
"""Characters of the job's id in file names, where there are several engines."""


class Submission:
    """Takes prompts."""

    def __init__(self, context: WebContext, own: OwnJobs, lists: Lists, live: LiveJobs) -> None:
        self._context = context
        self._own = own
        self._lists = lists
        self._live = live
        self._checks = Checks(lists, context.engines)

    async def submit(self, request: web.Request, identity: Identity) -> web.Response:
        """Answer POST /prompt. Raises ClientError, which the application writes in ComfyUI's shape."""
        require_user(identity)
        bytes_max = int(self._context.settings.limits.workflow_mib * MIB)
        try:
            body = await read_body(request, bytes_max)
        except TooLarge:
            return too_large(bytes_max)
        # The client may leave now; what it sent is stored all the same, and its answer is lost alone.
        return await finished(self._take(body, bytes_max, identity))

    async def _take(self, body: bytes, bytes_max: int, identity: Identity) -> web.Response:
        job = self._context.new_job_id()
        limits, combos = PromptLimits(body_bytes_max=bytes_max), self._lists.combos()
        # One engine alone never makes two files of one name.
        tag = job[:NAME_TAG_LENGTH] if len(self._context.engines.engines(Service.COMFYUI)) > 1 else ""
        recognized = await understood(
            body, lambda: parse_prompt(body, job=job, limits=limits, combos=combos, name_tag=tag)
        )
        verdict = await self._checks.verdict(recognized.request.body, combos)
        if verdict is not None and verdict.error is not None:
            return json_answer({"error": verdict.error, "node_errors": verdict.node_errors}, 400)
        try:
            new = self._new_job(job, recognized, identity, await self._priority(recognized, identity))
            record = await self._enqueue(new, recognized)
        except Impossible as impossible:
            missing, why = self._lists.missing(recognized.needs), impossible
            sent = recognized.request.body
            told = await understood(sent, lambda: impossible_answer(graph_of(sent), missing, why))
            return web.Response(body=told.body, status=told.status, content_type=told.content_type)
        except Conflict as error:
            raise PromptRefused(
                "invalid_prompt_id", "prompt_id is taken by another prompt", details=error.message
            ) from error
        answer: dict[str, object] = {
            "prompt_id": shown_id(record),
            "number": number_of(record),
            "node_errors": verdict.node_errors if verdict is not None else {},
        }
        return json_answer(answer)

    async def _priority(self, recognized: Recognized, identity: Identity) -> int:
        """Put what is to go first before the account's others that were to go first, as ComfyUI does."""
        wanted = read_meta(recognized.meta).priority
        if wanted <= 0:
            return wanted
        known = await self._own.unended(identity.account)
        first = max((record.job.priority for record in known if record.state in WAITING), default=0)
        return max(first, 0) + 1

    def _new_job(self, job: JobId, recognized: Recognized, identity: Identity, priority: int) -> NewJob:
        return NewJob(
            job=Job(
                id=job,
                account=identity.account,
                service=Service.COMFYUI,
                kind=recognized.kind,
                model=recognized.model,
                signature=recognized.signature,
                work=recognized.work,
                needs=recognized.needs,
                priority=priority,
                weight=identity.weight,
                max_attempts=self._context.settings.retry.attempts_max,
            ),
            meta=recognized.meta,
            digest=recognized.digest,
            client_job_id=recognized.client_job_id,
        )

    async def _enqueue(self, new: NewJob, recognized: Recognized) -> JobRecord:
        meta = read_meta(new.meta)
        self._live.expect(new.job, meta.client_id, new.client_job_id or new.job.id)
        try:
            reply = await self._context.jobs.submit(new, recognized.request)
        finally:
            self._live.withdraw(new.job.id)
        record = await self._context.jobs.record(_job_of(reply, new))
        if record is None:  # ended and pruned between the two
            raise Unavailable("The prompt was stored but is gone already.")
        return record


def _job_of(reply: Reply, new: NewJob) -> JobId:
    return reply.job if reply.code is Code.EXISTS and reply.job is not None else new.job.id
