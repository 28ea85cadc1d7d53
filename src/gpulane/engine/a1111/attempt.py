"""One job in one engine: a single POST, held until its answer is whole, and what is done beside it meanwhile.

The engine is free at the last byte of a whole answer. When the answer never comes whole, only the engine's
own word ends the occupancy: two looks apart, both idle. Nothing is sent twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

import msgspec

from gpulane.adapters.a1111.answers import failure_of, ran_other_model, wrong_model
from gpulane.adapters.a1111.requests import Meta
from gpulane.adapters.base import HeaderList
from gpulane.core.model import NO_MODEL, EngineUrl, Failure, FailureKind, JobState, ModelKey, Seconds
from gpulane.engine.a1111.beside import WITH_TASK, Beside
from gpulane.engine.a1111.intake import BadAnswer, Intake
from gpulane.engine.a1111.looks import Look, Looks, Task
from gpulane.engine.a1111.pace import Pace
from gpulane.engine.base import AttemptContext, Outcome, RecordedResult, is_refused
from gpulane.errors import EngineError, GpulaneError
from gpulane.wire import EngineClient, EngineResponse, RefusedRequest, Timeouts, WireError

ERROR_BYTES_MAX: Final = 1024 * 1024
"""An error answer may hold a whole traceback."""
BODY_SILENCE_SECONDS_MAX: Final = 120.0
"""An answer that stops in the middle for so long will never be whole. There is no limit on its beginning."""


class OnProof(Protocol):
    """Told which checkpoint an answer names; returns the model key that is loaded now."""

    def __call__(self, name: str, version: str, asked: ModelKey) -> ModelKey: ...


class Attempt:
    """Runs or follows one job."""

    def __init__(
        self,
        context: AttemptContext,
        *,
        wire: EngineClient,
        looks: Looks,
        headers: HeaderList,
        pace: Pace,
        clock: Callable[[], float],
        loaded: ModelKey,
        on_proof: OnProof,
        engine: EngineUrl,
    ) -> None:
        self._context = context
        self._wire = wire
        self._looks = looks
        self._headers = headers
        self._pace = pace
        self._clock = clock
        self._on_proof = on_proof
        self._engine = engine
        self._meta = msgspec.json.decode(context.meta, type=Meta)
        self._has_id = self._meta.endpoint in WITH_TASK
        is_cold = context.job.model not in {NO_MODEL, loaded}
        self._beside = Beside(context, self._meta, looks=looks, pace=pace, clock=clock, is_cold=is_cold)
        self._began_at = 0.0

    async def run(self) -> Outcome:
        """Send the job; returns when the engine is idle again, or is given up."""
        if self._context.cancel_wanted.is_set():
            return Outcome(state=JobState.CANCELLED)
        self._began_at = self._clock()
        async with asyncio.TaskGroup() as group:
            beside = group.create_task(self._beside.run())
            try:
                return await self._run_until_forgotten()
            finally:
                beside.cancel()

    async def follow(self) -> Outcome:
        """Wait for a job that an earlier connection sent; its answer cannot be had any more."""
        self._began_at = self._clock()
        lost = _lost(
            "answer_lost", "the engine finished the job, but its answer went with the old connection"
        )
        async with asyncio.TaskGroup() as group:
            beside = group.create_task(self._beside.run())
            try:
                return await self._until_idle(lost)
            finally:
                beside.cancel()

    async def _run_until_forgotten(self) -> Outcome:
        """The answer decides, unless the engine has forgotten the job or fell silent."""
        async with asyncio.TaskGroup() as group:
            exchange = group.create_task(self._exchange())
            given_up = group.create_task(self._beside.given_up.wait())
            await asyncio.wait((exchange, given_up), return_when=asyncio.FIRST_COMPLETED)
            given_up.cancel()
            if exchange.done():
                return exchange.result()
            exchange.cancel()
        if self._beside.is_silent:
            lost = _lost("engine_silent", "the engine does not answer any more", killed_engine=True)
            return self._outcome(JobState.FAILED, failure=lost, engine_idle=False)
        lost = _lost("engine_restarted", "the engine does not know the job any more", killed_engine=True)
        return await self._until_idle(lost)

    # --- the one request

    async def _exchange(self) -> Outcome:
        request = self._context.request
        timeouts = Timeouts(first_byte_seconds=None, idle_seconds=BODY_SILENCE_SECONDS_MAX)
        try:
            # A new connection: on a kept one a dead engine could not be told from one that took the job.
            response = await self._wire.request(
                request.method,
                request.target,
                (*request.headers, *self._headers),
                request.body,
                timeouts=timeouts,
                fresh=True,
            )
        except WireError as error:
            return await self._not_sent(error) if not error.sent else await self._broken(error)
        async with response:
            try:
                if 200 <= response.status < 300:
                    return await self._take(response)
                return await self._refused(response)
            except WireError as error:
                return await self._broken(error)

    async def _take(self, response: EngineResponse) -> Outcome:
        """Take the answer in at the engine's speed; it is handed on only when it proves what was asked
        for.
        """
        context, meta = self._context, self._meta
        intake = Intake(context.answer, response.status, response.headers, engine=self._engine)
        try:
            while chunk := await response.next_chunk():
                if (failure := _kept(intake.feed, chunk)) is not None:
                    await response.close()
                    return await self._until_idle(failure, must_report=True)
        except WireError as error:
            intake.fail(error)
            raise
        info = intake.info()
        if ran_other_model(meta.checkpoint, info) and not context.cancel_wanted.is_set():
            failure = wrong_model(meta.checkpoint, info)
            intake.fail(EngineError(failure.message))
            model = self._on_proof((info and info.sd_model_name) or "", "", NO_MODEL)
            return self._outcome(JobState.FAILED, failure=failure, model=model)
        model = NO_MODEL
        if info is not None and info.sd_model_name:
            model = self._on_proof(info.sd_model_name, info.version or "", context.job.model)
        if not context.cancel_wanted.is_set() and await self._was_interrupted(info and info.job_timestamp):
            message = "somebody interrupted the engine, and nobody here asked for it"
            failure = Failure(kind=FailureKind.INTERRUPTED, code="interrupted", message=message)
            intake.fail(EngineError(message))
            return self._outcome(JobState.FAILED, failure=failure, model=model)
        return self._delivered(intake, NO_MODEL if meta.leaves_other_model else model)

    def _delivered(self, intake: Intake, model: ModelKey) -> Outcome:
        """Hand the answer on. An interrupted job answers 200 with the pictures so far: its client gets
        those.
        """
        try:
            result = intake.finish()
        except BadAnswer as error:
            failure = Failure(kind=FailureKind.ENGINE, code="bad_answer", message=error.message)
            return self._outcome(JobState.FAILED, failure=failure, model=model)
        except GpulaneError as error:
            return self._outcome(JobState.FAILED, failure=_not_kept(error), model=model)
        cancelled = self._context.cancel_wanted.is_set()
        state = JobState.CANCELLED if cancelled else JobState.SUCCEEDED
        return self._outcome(state, result=result, model=model)

    async def _was_interrupted(self, timestamp: str | None) -> bool:
        """Ask whether this very job was interrupted: the answer itself does not tell."""
        if not timestamp:
            return False
        try:
            state = (await self._looks.state()).state
        except EngineError:
            return False
        return state.interrupted and state.job_timestamp == timestamp

    async def _refused(self, response: EngineResponse) -> Outcome:
        """Judge an error answer. One that is the request's fault is the client's to read, as it is."""
        body = await response.read(ERROR_BYTES_MAX)
        failure = failure_of(response.status, body)
        assert failure is not None, "only errors come here"
        if self._context.cancel_wanted.is_set():
            return self._outcome(JobState.CANCELLED)
        if failure.kind is FailureKind.CLIENT and self._context.answer is not None:
            self._context.answer.begin(response.status, response.headers)
            failure = _kept(self._context.answer.write, body) or failure
            self._context.answer.finish()
        return self._outcome(JobState.FAILED, failure=failure)

    # --- when there is no answer

    async def _not_sent(self, error: WireError) -> Outcome:
        kind = FailureKind.CLIENT if isinstance(error, RefusedRequest) else FailureKind.NOT_STARTED
        code = error.code if isinstance(error, RefusedRequest) else "connect_failed"
        return self._outcome(JobState.FAILED, failure=Failure(kind=kind, code=code, message=error.message))

    async def _broken(self, error: WireError) -> Outcome:
        """The connection broke after the request left: the engine may have died, or compute on regardless."""
        return await self._until_idle(_lost("connection_lost", error.message))

    async def _until_idle(self, lost: Failure, *, must_report: bool = False) -> Outcome:
        """Wait until two looks apart say idle, interrupting our job when it is not wanted any more.

        `must_report`: the failure is reported even if the job was to be cancelled.
        """
        idle_since: Seconds | None = None
        over_since: Seconds | None = None
        heard_at = self._clock()
        restarted = False
        while True:
            now = self._clock()
            try:
                seen = await self._looks.look(self._context.job.id)
            except EngineError as error:
                idle_since = None
                self._looks.forget()
                if is_refused(error) or now - heard_at > self._pace.silent_seconds_max:
                    # No process, or none that answers: the watch waits for the proof, the job need not.
                    lost = _died(lost, error)
                    return self._ended(lost, must_report=must_report, engine_idle=False)
            else:
                heard_at = now
                restarted = restarted or (seen.task is Task.UNKNOWN and self._has_id)
                over_since = (over_since or now) if self._is_over(seen) else None
                if over_since is not None and now - over_since >= self._pace.quiet_seconds:
                    # Ours is over; the engine is busy with a stranger's, and the watch waits for its end.
                    return self._ended(lost, must_report=must_report, engine_idle=False)
                if not seen.is_idle:
                    idle_since = None
                    await self._interrupt_if_wanted(seen)
                elif idle_since is None:
                    idle_since = now
                elif now - idle_since >= self._pace.quiet_seconds:
                    if restarted and lost.code == "connection_lost":
                        lost = _lost(
                            "engine_restarted", "the engine restarted and forgot the job", killed_engine=True
                        )
                    return self._ended(lost, must_report=must_report)
            await asyncio.sleep(min(self._pace.poll_seconds, self._pace.quiet_seconds / 2))

    def _is_over(self, seen: Look) -> bool:
        """Tell whether the engine is busy, but not with our job."""
        return self._has_id and not seen.is_idle and seen.task in {Task.COMPLETED, Task.UNKNOWN}

    async def _interrupt_if_wanted(self, seen: Look) -> None:
        if self._context.cancel_wanted.is_set():
            await self._beside.interrupt(seen)

    def _ended(self, lost: Failure, *, must_report: bool, engine_idle: bool = True) -> Outcome:
        if self._context.cancel_wanted.is_set() and not must_report:
            return self._outcome(JobState.CANCELLED, engine_idle=engine_idle)
        return self._outcome(JobState.FAILED, failure=lost, engine_idle=engine_idle)

    def _outcome(
        self,
        state: JobState,
        *,
        failure: Failure | None = None,
        result: RecordedResult | None = None,
        model: ModelKey = NO_MODEL,
        engine_idle: bool = True,
    ) -> Outcome:
        total = self._clock() - self._began_at
        load = self._beside.load_seconds(self._began_at, total) if state is JobState.SUCCEEDED else None
        return Outcome(
            state=state,
            failure=failure,
            result=result,
            model=model,
            service_seconds=total - (load or 0.0),
            load_seconds=load,
            engine_idle=engine_idle,
        )


def _kept(write: Callable[[bytes], None], data: bytes) -> Failure | None:
    """Write; no room for it is nobody's fault on the engine's side, and another gpu would not help."""
    try:
        write(data)
    except GpulaneError as error:
        return _not_kept(error)
    return None


def _not_kept(error: GpulaneError) -> Failure:
    return Failure(kind=FailureKind.CLIENT, code="answer_not_kept", message=error.message)


def _lost(code: str, message: str, *, killed_engine: bool = False) -> Failure:
    return Failure(kind=FailureKind.LOST, code=code, message=message, killed_engine=killed_engine)


def _died(lost: Failure, error: EngineError) -> Failure:
    if lost.kind is not FailureKind.LOST:
        return lost
    return _lost("engine_lost", f"the engine died while the job ran: {error.message}", killed_engine=True)
