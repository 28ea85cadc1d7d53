"""The ServiceClient of a generic HTTP server, which tells nothing of what it computes.

It is idle when no request of ours is under way: that is all that can be known. So a request is never
abandoned while the server lives: whether it would stop computing for a closed connection is its own business.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from typing import Final

import msgspec

from gpulane.config.unloading import Unload
from gpulane.core.model import (
    NO_MODEL,
    EngineUrl,
    Failure,
    FailureKind,
    JobId,
    JobState,
    ModelKey,
    Service,
)
from gpulane.engine.base import (
    BUSY,
    AnswerSink,
    AttemptContext,
    Description,
    Found,
    Outcome,
    ProbeReport,
    RecordedResult,
    Vram,
)
from gpulane.engine.control import ControlCalls, StatusError, named
from gpulane.engine.http.unloading import Unloading
from gpulane.errors import EngineError, GpulaneError
from gpulane.wire import EngineClient, EngineResponse, RefusedRequest, Timeouts, WireError

JOB_CONNECTIONS_MAX: Final = 4
RECORDED_BYTES_MAX: Final = 64 * 1024 * 1024
"""A stored job's answer is held in memory until it is recorded."""
MODELS: Final = "/v1/models"
POLL_SECONDS: Final = 10.0
"""How often the server is asked whether it is still there while a request is under way."""
SILENT_SECONDS_MAX: Final = 300.0
"""A server that answers nothing for so long, not even a probe, is given up; its gpu stays occupied."""


class HttpServiceClient:
    """One server."""

    def __init__(
        self,
        url: EngineUrl,
        wire: EngineClient | None = None,
        *,
        name: str = "",
        probe_path: str = "/",
        unload: Unload | None = None,
        timeout_seconds: float = 10.0,
        acknowledge_seconds: float = 15.0,
        poll_seconds: float = POLL_SECONDS,
        silent_seconds_max: float = SILENT_SECONDS_MAX,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`name`: which requests are for it (`/svc/NAME/`). `wire`: the connections that jobs go over.
        `unload`: how it gives its memory back; None: found by asking.
        """
        self._url = url
        self._own_wire = wire is None
        self._wire = wire or EngineClient(url, connections_max=JOB_CONNECTIONS_MAX)
        self._calls = ControlCalls(url, timeout_seconds=timeout_seconds)
        self._unloading = Unloading(self._calls, unload, acknowledge_seconds=acknowledge_seconds)
        self._offers = frozenset({f"http:{name}"}) if name else None
        self._probe_path = probe_path
        self._poll_seconds = poll_seconds
        self._silent_seconds_max = silent_seconds_max
        self._clock = clock
        self._running: JobId | None = None

    @property
    def url(self) -> EngineUrl:
        return self._url

    @property
    def service(self) -> Service:
        return Service.HTTP

    async def open(self) -> None:
        """Nothing to start."""

    async def close(self) -> None:
        """Close its connections."""
        await self._calls.close()
        if self._own_wire:
            await self._wire.close()

    async def probe(self, own: frozenset[JobId], *, fresh: bool = False) -> ProbeReport:
        """Ask whether it lives: any answer below 500 will do. Whether it is idle only we know."""
        del own
        status, _ = await self._calls.fetch("GET", self._probe_path, fresh=fresh)
        if status >= 500:
            raise StatusError(f"{self._url} answered {status} to {self._probe_path}", status=status)
        return ProbeReport(idle=self._running is None)

    def known_idle(self) -> bool | None:
        """Know it by our own request alone."""
        return self._running is None

    async def describe(self) -> Description:
        """Fetch its list of models, where it has one. It offers its name: any engine of that name will do."""
        status, body = await self._calls.fetch("GET", MODELS)
        documents = {"models": body} if status == 200 and body.lstrip().startswith(b"{") else {}
        digest = hashlib.blake2b(documents.get("models", b""), digest_size=16).hexdigest()
        return Description(
            service=Service.HTTP,
            flavor="http",
            version="",
            offers=self._offers,
            documents=documents,
            digest=digest,
        )

    async def unload(self) -> None:
        """Have it give its memory back. Whether anything but our own request runs there cannot be known."""
        if self._running is not None:
            raise named(EngineError(f"{self._url} runs a job: it is not unloaded now", sent=False), BUSY)
        await self._unloading.unload()

    async def make_loadable(self) -> None:
        """Nothing: such a server loads what a request names."""

    async def vram(self) -> Vram:
        """No such server tells of the whole card; Ollama's /api/ps tells of its own models alone."""
        return Vram()

    async def canary(self) -> bool:
        """No proof exists."""
        return True

    async def find(self, job: JobId, *, fresh: bool = True) -> Found:
        """It knows no job by name."""
        del job, fresh
        return Found.ABSENT

    async def follow(self, attempt: AttemptContext) -> Outcome:
        """A request cannot be taken up again."""
        del attempt
        return _failed("answer_lost", "the answer went with the old connection")

    async def erase(self, job: JobId) -> None:
        """It keeps no records."""

    async def interrupt(self, job: JobId) -> None:
        """It cannot be told to stop."""

    # --- one request

    async def run(self, attempt: AttemptContext) -> Outcome:
        """Send the request and pass its answer on as it comes; returns at its last byte."""
        if self._running is not None:
            raise RuntimeError(f"{self._url} already runs {self._running}; asked for {attempt.job.id}")
        if attempt.cancel_wanted.is_set():
            return Outcome(state=JobState.CANCELLED)
        self._running = attempt.job.id
        try:
            return await self._run_while_it_lives(attempt)
        finally:
            self._running = None

    async def _run_while_it_lives(self, attempt: AttemptContext) -> Outcome:
        async with asyncio.TaskGroup() as group:
            exchange = group.create_task(self._exchange(attempt))
            silence = group.create_task(self._silence())
            await asyncio.wait((exchange, silence), return_when=asyncio.FIRST_COMPLETED)
            silence.cancel()
            if exchange.done():
                return exchange.result()
            exchange.cancel()
        failed = _failed("engine_silent", "the engine does not answer any more", engine_idle=False)
        if attempt.answer is not None:
            attempt.answer.fail(EngineError("the engine does not answer any more"))
        return failed

    async def _silence(self) -> None:
        """Return when the server has not answered anything for too long: a machine may vanish without a
        word.
        """
        heard_at = self._clock()
        while self._clock() - heard_at <= self._silent_seconds_max:
            await asyncio.sleep(self._poll_seconds)
            try:
                await self._calls.fetch("GET", self._probe_path, fresh=True)
                heard_at = self._clock()
            except EngineError:
                # Perhaps busy; only lasting silence counts.
                continue

    async def _exchange(self, attempt: AttemptContext) -> Outcome:
        began_at = self._clock()
        request = attempt.request
        headers = [*request.headers, *self._calls.headers]
        if not any(name.lower() == "x-request-id" for name, _ in headers):
            # Shows up in most servers' logs, and nowhere else.
            headers.append(("X-Request-Id", attempt.job.id))
        try:
            # A new connection: on a kept one a dead server could not be told from one that took the request.
            response = await self._wire.request(
                request.method, request.target, headers, request.body, timeouts=Timeouts(), fresh=True
            )
        except WireError as error:
            return await self._broken(error)
        async with response:
            try:
                kept = await self._pass_on(response, attempt.answer)
            except WireError as error:
                if attempt.answer is not None:
                    attempt.answer.fail(error)
                return await self._broken(error)
        if isinstance(kept, GpulaneError):
            return _failed("answer_not_kept", kept.message, kind=FailureKind.CLIENT)
        return _outcome(attempt, response.status, kept, self._clock() - began_at)

    async def _pass_on(
        self, response: EngineResponse, sink: AnswerSink | None
    ) -> RecordedResult | GpulaneError | None:
        """Take every byte, whatever becomes of it: the server is free at the last one.

        Returns the record of a stored job, or why an answer could not be kept.
        """
        kept: list[bytes] = []
        size = 0
        lost: GpulaneError | None = None
        if sink is not None:
            sink.begin(response.status, response.headers)
        while chunk := await response.next_chunk():
            size += len(chunk)
            if lost is not None:
                continue
            if sink is None and size > RECORDED_BYTES_MAX:
                lost = GpulaneError(f"the answer is over {RECORDED_BYTES_MAX // 1024**2} MiB")
            elif sink is None:
                kept.append(chunk)
            else:
                try:
                    sink.write(chunk)
                except GpulaneError as error:
                    lost = error
        if lost is not None:
            return lost
        if sink is not None:
            sink.finish()
            return None
        return _recorded(b"".join(kept), response.status, self._url)

    async def _broken(self, error: WireError) -> Outcome:
        """The connection failed: nothing was sent, or the server died, or it hung up and is done with us."""
        if not error.sent:
            kind = FailureKind.CLIENT if isinstance(error, RefusedRequest) else FailureKind.NOT_STARTED
            code = error.code if isinstance(error, RefusedRequest) else "connect_failed"
            return _failed(code, error.message, kind=kind)
        try:
            await self._calls.fetch("GET", self._probe_path, fresh=True)
        except EngineError as gone:
            message = f"the engine died while the job ran: {gone.message}"
            return _failed("engine_lost", message, killed_engine=True, engine_idle=False)
        return _failed("connection_lost", error.message)


def _outcome(attempt: AttemptContext, status: int, result: RecordedResult | None, seconds: float) -> Outcome:
    if attempt.cancel_wanted.is_set():
        return Outcome(state=JobState.CANCELLED, service_seconds=seconds)
    if status < 400:
        model: ModelKey = attempt.job.model
        return Outcome(state=JobState.SUCCEEDED, result=result, model=model, service_seconds=seconds)
    kind = FailureKind.CLIENT if status < 500 else FailureKind.ENGINE
    failure = Failure(kind=kind, code="refused", message=f"the engine answered {status}")
    return Outcome(
        state=JobState.FAILED, failure=failure, result=result, model=NO_MODEL, service_seconds=seconds
    )


def _failed(
    code: str,
    message: str,
    *,
    kind: FailureKind = FailureKind.LOST,
    killed_engine: bool = False,
    engine_idle: bool = True,
) -> Outcome:
    failure = Failure(kind=kind, code=code, message=message, killed_engine=killed_engine)
    return Outcome(state=JobState.FAILED, failure=failure, engine_idle=engine_idle)


def _recorded(body: bytes, status: int, engine: str) -> RecordedResult:
    """Keep JSON as it is, anything else as a JSON string."""
    try:
        document = msgspec.json.decode(body, type=msgspec.Raw)
    except (msgspec.DecodeError, RecursionError):
        document = msgspec.Raw(msgspec.json.encode(body.decode("utf-8", "replace")))
    return RecordedResult(document=document, status=status, engine=engine)
