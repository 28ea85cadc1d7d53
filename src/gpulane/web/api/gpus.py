"""GPUs and the queue over the native API: show, drain, resume, pause, unpause."""

from __future__ import annotations

from aiohttp import web

from gpulane.core.model import GpuId, JobId
from gpulane.errors import BadRequest, NotFound
from gpulane.store.base import Code
from gpulane.web.api.asked import Asked, Endpoint, json_response
from gpulane.web.api.documents import GpuDocument, GpuList, QueueDocument
from gpulane.web.api.views import gpu_document, queue_document
from gpulane.web.bodies import suggestion
from gpulane.web.patience import finished
from gpulane.web.ports import GpuView, Identity, JobsPort, Role

_GPU = "/gpulane/v1/gpus/{gpu}"
_QUEUE = "/gpulane/v1/queue"


class GpusApi:
    """The endpoints under /gpulane/v1/gpus and /gpulane/v1/queue."""

    def __init__(self, jobs: JobsPort) -> None:
        self._jobs = jobs

    def endpoints(self) -> tuple[Endpoint, ...]:
        """List them."""
        operator = Role.OPERATOR
        return (
            Endpoint(
                method="GET",
                path="/gpulane/v1/gpus",
                answer=self.list_gpus,
                summary="List GPUs.",
                gives=GpuList,
            ),
            Endpoint(
                method="GET",
                path=_GPU,
                answer=self.show,
                summary="Show a GPU: NODE/NAME, or NAME alone where it is unique.",
                gives=GpuDocument,
            ),
            Endpoint(
                method="POST",
                path=f"{_GPU}/drain",
                answer=self.drain,
                summary="Finish what runs and take nothing new, also after a restart.",
                role=operator,
                gives=GpuDocument,
            ),
            Endpoint(
                method="POST",
                path=f"{_GPU}/resume",
                answer=self.resume,
                summary="Take work again.",
                role=operator,
                gives=GpuDocument,
            ),
            Endpoint(
                method="GET", path=_QUEUE, answer=self.show_queue, summary="Count jobs.", gives=QueueDocument
            ),
            Endpoint(
                method="POST",
                path=f"{_QUEUE}/pause",
                answer=self.pause,
                summary="Start nothing more, also after a restart; what runs goes on.",
                role=operator,
                gives=QueueDocument,
            ),
            Endpoint(
                method="POST",
                path=f"{_QUEUE}/unpause",
                answer=self.unpause,
                summary="Start jobs again.",
                role=operator,
                gives=QueueDocument,
            ),
        )

    async def list_gpus(self, asked: Asked) -> web.StreamResponse:
        """List all gpus."""
        return json_response(await gpu_list(self._jobs, asked.identity, is_operator=asked.is_operator))

    async def show(self, asked: Asked) -> web.StreamResponse:
        """Show one gpu."""
        gpu = self._gpu(asked.values["gpu"])
        is_own = await _is_own(self._jobs, gpu.job, asked.identity, is_operator=asked.is_operator)
        return json_response(gpu_document(gpu, shows_job=is_own))

    async def drain(self, asked: Asked) -> web.StreamResponse:
        """Let a gpu take nothing new."""
        return await self._set_draining(asked, draining=True)

    async def resume(self, asked: Asked) -> web.StreamResponse:
        """Let a gpu take work again."""
        return await self._set_draining(asked, draining=False)

    async def show_queue(self, _: Asked) -> web.StreamResponse:
        """Count jobs."""
        return json_response(queue_document(self._jobs.queue()))

    async def pause(self, asked: Asked) -> web.StreamResponse:
        """Start nothing more."""
        await finished(self._jobs.pause(True))
        return await self.show_queue(asked)

    async def unpause(self, asked: Asked) -> web.StreamResponse:
        """Start jobs again."""
        await finished(self._jobs.pause(False))
        return await self.show_queue(asked)

    async def _set_draining(self, asked: Asked, *, draining: bool) -> web.StreamResponse:
        gpu = self._gpu(asked.values["gpu"])
        reply = await finished(self._jobs.drain(gpu.id, draining))
        if reply.code is Code.UNKNOWN:
            raise NotFound("No such GPU.", code="no_such_gpu")
        return json_response(gpu_document(self._gpu(gpu.id), shows_job=True))

    def _gpu(self, name: str) -> GpuView:
        return find_gpu(self._jobs, name)


def find_gpu(jobs: JobsPort, name: str) -> GpuView:
    """Find a gpu by NODE/NAME, or by its name where that is unique. Raises NotFound, BadRequest."""
    gpus = jobs.gpus()
    exact = next((gpu for gpu in gpus if gpu.id == GpuId(name)), None)
    if exact is not None:
        return exact
    named = [gpu for gpu in gpus if gpu.name == name]
    if len(named) > 1:
        ids = ", ".join(gpu.id for gpu in named)
        raise BadRequest(
            f"Several GPUs are called {name[:80]!r}.", hint=f"Say which: {ids}.", code="ambiguous_gpu"
        )
    if not named:
        hint = suggestion(name[:80], [gpu.id for gpu in gpus])
        raise NotFound(f"No GPU {name[:80]!r}.", hint=hint, code="no_such_gpu")
    return named[0]


async def gpu_list(jobs: JobsPort, identity: Identity, *, is_operator: bool) -> GpuList:
    """Show all gpus; whose job runs on them is for its owner and operators."""
    return GpuList(
        gpus=[
            gpu_document(gpu, shows_job=await _is_own(jobs, gpu.job, identity, is_operator=is_operator))
            for gpu in jobs.gpus()
        ]
    )


async def _is_own(jobs: JobsPort, job: JobId | None, identity: Identity, *, is_operator: bool) -> bool:
    if job is None or is_operator:
        return True
    record = await jobs.record(job)
    return record is not None and record.job.account == identity.account
