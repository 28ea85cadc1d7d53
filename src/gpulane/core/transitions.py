"""The legal moves of jobs and attempts, in one place. A move that is not listed is a bug in whoever made
the event.

A job has a state, and an attempt or none. A claimed job keeps its state: nothing was computed yet.

    queued --JobClaimed, JobStarted--> running --JobEnded--> succeeded | failed | cancelled
                                         '--AttemptFailed--> waiting_retry --JobClaimed, JobStarted--> ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from gpulane.core.events import (
    AttemptFailed,
    AttemptResumed,
    CancelWanted,
    JobClaimed,
    JobEnded,
    JobPrioritised,
    JobReleased,
    JobStarted,
    LeaseExpired,
)
from gpulane.core.model import ENDED, AttemptState, FailureKind, JobState

JobEvent = (
    JobClaimed
    | JobStarted
    | JobReleased
    | AttemptFailed
    | JobEnded
    | CancelWanted
    | JobPrioritised
    | AttemptResumed
    | LeaseExpired
)
"""The store events about a job that is known already. JobSubmitted makes one: QUEUED without an attempt."""

Q, RUN, RETRY = JobState.QUEUED, JobState.RUNNING, JobState.WAITING_RETRY
CLAIMED, STARTED = AttemptState.CLAIMED, AttemptState.STARTED


@dataclass(frozen=True, slots=True)
class Move:
    """Where one event leads."""

    job: JobState | None
    """None: ended, as the event says."""
    attempt: AttemptState | None
    """None: the job has no attempt any more."""
    by: str
    """Who makes this move."""


MOVES: Final[dict[tuple[JobState, AttemptState | None, type[JobEvent]], Move]] = {
    # -- waiting
    (Q, None, JobClaimed): Move(Q, CLAIMED, "the dispatcher of the gpu's node, by claim"),
    (Q, None, JobPrioritised): Move(Q, None, "its user or an operator"),
    (Q, None, JobEnded): Move(None, None, "its user by cancel; the loss of its client"),
    (Q, None, AttemptResumed): Move(RUN, STARTED, "a node whose claim the store had forgotten"),
    (RETRY, None, JobClaimed): Move(RETRY, CLAIMED, "the dispatcher of the gpu's node, by claim"),
    (RETRY, None, JobPrioritised): Move(RETRY, None, "its user or an operator"),
    (RETRY, None, JobEnded): Move(None, None, "its user by cancel; a late finish of a rescued attempt"),
    (RETRY, None, AttemptResumed): Move(RUN, STARTED, "a node that comes back after its attempt was rescued"),
    # -- claimed, nothing sent to an engine
    (Q, CLAIMED, JobStarted): Move(RUN, STARTED, "the dispatcher, by start"),
    (Q, CLAIMED, JobReleased): Move(Q, None, "the dispatcher by release; the sweep by expire"),
    (Q, CLAIMED, JobEnded): Move(None, None, "its user by cancel"),
    (RETRY, CLAIMED, JobStarted): Move(RUN, STARTED, "the dispatcher, by start"),
    (RETRY, CLAIMED, JobReleased): Move(RETRY, None, "the dispatcher by release; the sweep by expire"),
    (RETRY, CLAIMED, JobEnded): Move(None, None, "its user by cancel; a late finish of an earlier attempt"),
    # -- running
    (RUN, STARTED, JobEnded): Move(None, None, "the node by finish; the sweep by rescue"),
    (RUN, STARTED, AttemptFailed): Move(RETRY, None, "the node by fail; the sweep by rescue"),
    (RUN, STARTED, CancelWanted): Move(RUN, STARTED, "its user by cancel"),
    (RUN, STARTED, LeaseExpired): Move(RUN, STARTED, "the sweep by expire"),
    (RUN, STARTED, AttemptResumed): Move(RUN, STARTED, "the node after its process came back"),
}


def move(state: JobState, attempt: AttemptState | None, event: JobEvent) -> Move:
    """Returns where the event leads; an illegal one is an AssertionError that names it."""
    found = MOVES.get((state, attempt, type(event)))
    assert found is not None, f"illegal: {event!r} for a job that is {state} with attempt {attempt}"
    if isinstance(event, JobEnded):
        assert event.state in ENDED, f"illegal: {event!r} does not end the job"
    return found


def ended_attempt(event: AttemptFailed | JobEnded) -> AttemptState:
    """Returns the last state of a started attempt that this event ended."""
    match event:
        case AttemptFailed(failure=failure):
            return AttemptState.LOST if failure.kind is FailureKind.LOST else AttemptState.FAILED
        case JobEnded(state=JobState.SUCCEEDED):
            return AttemptState.FINISHED
        case JobEnded(failure=failure):
            lost = failure is not None and failure.kind is FailureKind.LOST
            return AttemptState.LOST if lost else AttemptState.FAILED
