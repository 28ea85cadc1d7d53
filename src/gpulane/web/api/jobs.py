"""Jobs over the native API: submit, show, list, change, cancel, and what they made."""

from __future__ import annotations

from typing import assert_never

from aiohttp import web

from gpulane.core.model import Account, JobState, Service
from gpulane.errors import BadRequest, NotFound, NotPermitted
from gpulane.store.base import Code, JobQuery, JobRecord
from gpulane.web.api.asked import Asked, Endpoint, json_response, own_record
from gpulane.web.api.documents import ArtifactList, JobChange, JobDocument, JobList, NewJobRequest
from gpulane.web.api.files import file_response
from gpulane.web.api.submitting import Submissions, band_and_priority
from gpulane.web.api.views import artifact_documents, job_document
from gpulane.web.bodies import MIB, decode, read_body, suggestion
from gpulane.web.errors import NotReady
from gpulane.web.held import send_answer
from gpulane.web.patience import finished
from gpulane.web.ports import JobsPort, Role, WebContext

PAGE_MAX = 500
SMALL_BODY_BYTES_MAX = 64 * 1024
_JOB = "/gpulane/v1/jobs/{id}"


class JobsApi:
    """The endpoints under /gpulane/v1/jobs, streams excepted."""

    def __init__(self, context: WebContext) -> None:
        self._context = context
        self._jobs: JobsPort = context.jobs
        self._submissions = Submissions(context)

    def endpoints(self) -> tuple[Endpoint, ...]:
        """List them."""
        return (
            Endpoint(
                method="POST",
                path="/gpulane/v1/jobs",
                answer=self.submit,
                summary="Submit a job; durable on answer. A known idempotency key: 200, the same job.",
                role=Role.USER,
                takes=NewJobRequest,
                gives=JobDocument,
                status=202,
            ),
            Endpoint(
                method="GET",
                path="/gpulane/v1/jobs",
                answer=self.list_jobs,
                summary="List jobs, newest first.",
                gives=JobList,
                query=("state", "user", "service", "limit", "cursor"),
            ),
            Endpoint(method="GET", path=_JOB, answer=self.show, summary="Show a job.", gives=JobDocument),
            Endpoint(
                method="DELETE",
                path=_JOB,
                answer=self.cancel,
                summary="Cancel exactly this job: 200 when it has ended, 202 while its GPU stops.",
                role=Role.USER,
                gives=JobDocument,
            ),
            Endpoint(
                method="PATCH",
                path=_JOB,
                answer=self.change,
                summary="Change the priority of a waiting job.",
                role=Role.USER,
                takes=JobChange,
                gives=JobDocument,
            ),
            Endpoint(
                method="GET", path=f"{_JOB}/result", answer=self.result, summary="The engine's own answer."
            ),
            Endpoint(
                method="GET",
                path=f"{_JOB}/artifacts",
                answer=self.artifacts,
                summary="List the files of a result.",
                gives=ArtifactList,
            ),
            Endpoint(
                method="GET",
                path=f"{_JOB}/artifacts/{{number}}",
                answer=self.artifact,
                summary="One file of a result.",
                content_type="application/octet-stream",
            ),
        )

    async def submit(self, asked: Asked) -> web.StreamResponse:
        """Take a job."""
        body = await read_body(asked.request, int(self._context.settings.limits.body_mib * MIB))
        new, recognized = await self._submissions.understand(body, asked)
        reply = await finished(self._jobs.submit(new, recognized.request))
        job = reply.job or new.job.id
        record = await self._jobs.record(job)
        if record is None:
            raise NotFound("The job is there no more.", code="no_such_job")
        return json_response(
            job_document(record, self._jobs),
            status=200 if reply.code is Code.EXISTS else 202,
            headers={"Location": f"/gpulane/v1/jobs/{job}"},
        )

    async def list_jobs(self, asked: Asked) -> web.StreamResponse:
        """List the caller's jobs, or everybody's for operators."""
        query = asked.request.query
        user = query.get("user")
        if user is not None and user != asked.identity.account and not asked.is_operator:
            raise NotPermitted("Only operators see other people's jobs.")
        account = Account(user) if user is not None else None if asked.is_operator else asked.identity.account
        limit = asked.number("limit", 50, low=1, high=PAGE_MAX)
        before = asked.number("cursor", 0, low=1, high=10**18) if "cursor" in query else None
        records = await self._jobs.records(
            JobQuery(
                account=account, states=_states(asked), service=_service(asked), limit=limit, before=before
            )
        )
        cursor = str(records[-1].job.arrival) if len(records) == limit else None
        shown = [job_document(record, self._jobs) for record in records]
        return json_response(JobList(jobs=shown, next_cursor=cursor))

    async def show(self, asked: Asked) -> web.StreamResponse:
        """Show one job."""
        return json_response(job_document(await own_record(asked, self._jobs), self._jobs))

    async def cancel(self, asked: Asked) -> web.StreamResponse:
        """Cancel one job, nobody else's."""
        record = await own_record(asked, self._jobs)
        reply = await finished(self._jobs.cancel(record.job.id))
        if reply.code is Code.UNKNOWN:
            raise NotFound("No such job.", code="no_such_job")
        record = await own_record(asked, self._jobs)
        if reply.code is Code.ENDED and record.state is not JobState.CANCELLED:
            raise NotReady(f"The job has ended already: {record.state.value}.", code="ended")
        status = 202 if reply.code is Code.CANCELLING else 200
        return json_response(job_document(record, self._jobs), status=status)

    async def change(self, asked: Asked) -> web.StreamResponse:
        """Change one job's priority."""
        record = await own_record(asked, self._jobs)
        change = decode(await read_body(asked.request, SMALL_BODY_BYTES_MAX), JobChange)
        band, priority = band_and_priority(change.priority)
        reply = await finished(
            self._jobs.prioritise(record.job.id, record.job.band if band is None else band, priority)
        )
        if reply.code is Code.UNKNOWN:
            raise NotFound("No such job.", code="no_such_job")
        if reply.code is Code.NOT_WAITING:
            raise NotReady("The job waits no more: its priority means nothing now.", code="not_waiting")
        return json_response(job_document(await own_record(asked, self._jobs), self._jobs))

    async def result(self, asked: Asked) -> web.StreamResponse:
        """Give the engine's answer."""
        record = await own_record(asked, self._jobs)
        job = record.job.id
        held = self._jobs.held_answer(job)
        if held is not None and held.is_ended:
            return await send_answer(asked.request, job, held, self._jobs)
        result = await self._jobs.result(job)
        if result is None:
            raise _no_result(record)
        return web.Response(
            status=result.status,
            body=bytes(result.document),
            content_type="application/json",
            headers={"X-Gpulane-Job": job, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"},
        )

    async def artifacts(self, asked: Asked) -> web.StreamResponse:
        """List the files of a result."""
        record = await own_record(asked, self._jobs)
        result = await self._jobs.result(record.job.id)
        if result is None:
            raise _no_result(record)
        return json_response(ArtifactList(artifacts=artifact_documents(record, result)))

    async def artifact(self, asked: Asked) -> web.StreamResponse:
        """Give one file; ranges and HEAD work."""
        record = await own_record(asked, self._jobs)
        text = asked.values["number"]
        result = await self._jobs.result(record.job.id)
        if result is None:
            raise _no_result(record)
        if not (text.isascii() and text.isdigit() and int(text[:9]) < len(result.artifacts)):
            raise NotFound(f"The result has {len(result.artifacts)} files, from 0.", code="no_such_artifact")
        number = int(text)
        path = await self._jobs.artifact(record.job.id, number)
        return await file_response(asked.request, self._context.engines, result, number, path)


def _states(asked: Asked) -> frozenset[JobState]:
    """Read ?state=queued,running&state=failed."""
    words = [word for text in asked.request.query.getall("state", []) for word in text.split(",") if word]
    known = [state.value for state in JobState]
    for word in words:
        if word not in known:
            raise BadRequest(
                f"{word[:50]!r} is no state.", hint=suggestion(word[:50], known), code="bad_query"
            )
    return frozenset(JobState(word) for word in words)


def _service(asked: Asked) -> Service | None:
    word = asked.request.query.get("service")
    known = [service.value for service in Service]
    if word is not None and word not in known:
        raise BadRequest(f"{word[:50]!r} is no service.", hint=suggestion(word[:50], known), code="bad_query")
    return None if word is None else Service(word)


def _no_result(record: JobRecord) -> NotReady | NotFound:
    match record.state:
        case JobState.QUEUED | JobState.RUNNING | JobState.WAITING_RETRY:
            return NotReady(f"The job has not ended: {record.state.value}.", hint="Follow its events.")
        case JobState.SUCCEEDED:
            return NotFound("The result is no longer kept.", code="unavailable")
        case JobState.FAILED | JobState.CANCELLED:
            failure = record.failure
            why = failure.message if failure else "no more is known"
            code = failure.code if failure else record.state.value
            return NotReady(f"The job has no result, its state is {record.state.value}: {why}", code=code)
        case _:
            assert_never(record.state)
