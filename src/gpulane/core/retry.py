"""What follows a failed attempt: another one, when and where not, or the job's end. Pure; jitter is passed
in.

Another attempt is made only when it is proved that nothing was computed, when the engine lost the job and
it may be run again, when it ran out of memory (never again on the same card but once, alone on it), or when
somebody else interrupted it. The client's faults are never tried again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, assert_never

from gpulane.core.model import Failure, FailureKind, GpuId, Job, Seconds
from gpulane.core.policy import Policy

OUT_OF_MEMORY: Final = "out_of_memory"
POISONED: Final = "poisoned"


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """Make another attempt. The same fields as the store's."""

    rest_seconds: Seconds
    avoid: frozenset[GpuId]
    refund: bool
    """The account does not pay for the failed one: the fault was ours."""
    unload_all: bool = False
    """Before it runs again on this gpu, unload every other engine of the card, fit or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """End the job as failed."""

    failure: Failure


def after_failure(
    job: Job,
    failure: Failure,
    *,
    attempts_counted: int,
    avoid: frozenset[GpuId],
    gpu: GpuId,
    eligible: frozenset[GpuId],
    policy: Policy,
    jitter: float,
    engine_kills_before: int = 0,
    out_of_memory_on: tuple[GpuId, ...] | None = None,
) -> Again | End:
    """Returns what to do about a failed attempt of a job nobody has cancelled.

    1. Its content is at fault: end.
    2. It has killed or hung `engine_kills_max` engines: quarantine (`poisoned`).
    3. No attempt left: end.
    4. Not proved harmless to repeat: end.
    5. Out of memory: where no other gpu is eligible, once more here with all other engines unloaded; where
       that was here before, or as often as allowed: end. Elsewhere it goes without that.
    6. Again, after a rest, not on this gpu while another is eligible.

    `attempts_counted` includes this attempt; `eligible` are the gpus that could run the job now; `jitter`
    is in 0..1. `out_of_memory_on` are the gpus where earlier attempts ran out of memory; None: not known,
    each earlier attempt counts as one.
    """
    if failure.kind is FailureKind.CLIENT:
        return End(failure=failure)
    if failure.killed_engine and engine_kills_before + 1 >= policy.engine_kills_max:
        return End(failure=poisoned(failure, engine_kills_before + 1))
    if attempts_counted >= job.max_attempts:
        return End(failure=failure)
    full = is_out_of_memory(failure)
    if full and out_of_memory_on is not None and gpu in out_of_memory_on:
        return End(failure=failure)
    before = attempts_counted - 1 if out_of_memory_on is None else len(out_of_memory_on)
    if not may_repeat(job, failure, before, policy):
        return End(failure=failure)
    unwanted = gpus_to_avoid(avoid, gpu, eligible)
    return Again(
        rest_seconds=rest_seconds(attempts_counted, policy, jitter),
        avoid=unwanted,
        refund=failure.code != OUT_OF_MEMORY,
        unload_all=full and gpu not in unwanted,
    )


def is_out_of_memory(failure: Failure) -> bool:
    return failure.kind is FailureKind.ENGINE and failure.code == OUT_OF_MEMORY and not failure.killed_engine


def may_repeat(job: Job, failure: Failure, out_of_memory_before: int, policy: Policy) -> bool:
    match failure.kind:
        case FailureKind.NOT_STARTED | FailureKind.INTERRUPTED:
            return True
        case FailureKind.LOST:
            return job.rerun_lost
        case FailureKind.ENGINE:
            if failure.killed_engine:
                return job.rerun_lost
            return is_out_of_memory(failure) and out_of_memory_before < policy.out_of_memory_retries
        case FailureKind.CLIENT:
            return False
        case _:
            assert_never(failure.kind)


def gpus_to_avoid(avoid: frozenset[GpuId], gpu: GpuId, eligible: frozenset[GpuId]) -> frozenset[GpuId]:
    """Returns all gpus where it failed; only this one when no other would be left; none when it is the
    only one.
    """
    for unwanted in (avoid | {gpu}, frozenset({gpu})):
        if eligible - unwanted:
            return unwanted
    return frozenset()


def rest_seconds(attempts_counted: int, policy: Policy, jitter: float) -> Seconds:
    """Returns how long the job rests: doubled with each attempt, spread by the jitter, bounded."""
    doubled = policy.retry_seconds_base * 2.0 ** min(max(attempts_counted - 1, 0), 32)
    share = policy.retry_jitter_share
    return min(doubled, policy.retry_seconds_max) * (1.0 - share + share * jitter)


def poisoned(failure: Failure, kills: int) -> Failure:
    text = f"{kills} engines died or hung while they ran this job; the last one: {failure.message}"
    return replace(failure, code=POISONED, message=text)
