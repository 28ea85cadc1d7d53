"""Jobs to and from the columns of the `jobs` table."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from gpulane.core.model import Failure, GpuId, Job, JobState, Token
from gpulane.store.records import NO_GPUS, Attempt, Row


class Story(msgspec.Struct, omit_defaults=True, kw_only=True):
    """What became of a job since its submission: column `story`. Fields are only ever added."""

    attempts: tuple[Attempt, ...] = ()
    attempts_counted: int = 0
    avoid: frozenset[GpuId] = NO_GPUS
    failure: Failure | None = None
    cancel_wanted: bool = False
    ended_by: Token | None = None
    given_back: Token | None = None
    not_before_at: float | None = None


JobRow = tuple[int, str, int, float | None, int, str, str | None, str | None, str, str | None]
"""arrival, state, v, finished_at, size, digest, client_job_id, idempotency_key, job, story"""

ENCODER: Final = msgspec.json.Encoder()
JOB: Final = msgspec.json.Decoder(Job)
STORY: Final = msgspec.json.Decoder(Story)
GPUS: Final = msgspec.json.Decoder(dict[GpuId, str])


def encode(value: object) -> str:
    return ENCODER.encode(value).decode()


def story_of(row: Row) -> str:
    return encode(
        Story(
            attempts=row.attempts,
            attempts_counted=row.attempts_counted,
            avoid=row.avoid,
            failure=row.failure,
            cancel_wanted=row.cancel_wanted,
            ended_by=row.ended_by,
            given_back=row.given_back,
            not_before_at=row.not_before_at,
        )
    )


def row_of(columns: tuple[Any, ...]) -> Row:
    """Return the job of one row, whose first columns are those of JobRow."""
    _, state, v, finished_at, size, digest, client_job_id, idempotency_key, job, story = columns[:10]
    row = Row(
        job=JOB.decode(job),
        state=JobState(state),
        v=v,
        digest=digest,
        client_job_id=client_job_id,
        idempotency_key=idempotency_key,
        finished_at=finished_at,
        size=size,
    )
    if story is not None:
        told = STORY.decode(story)
        row.attempts, row.attempts_counted, row.avoid = told.attempts, told.attempts_counted, told.avoid
        row.failure, row.cancel_wanted, row.ended_by = told.failure, told.cancel_wanted, told.ended_by
        row.given_back, row.not_before_at = told.given_back, told.not_before_at
    return row
