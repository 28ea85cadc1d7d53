"""What the core wants done, in the imperative. Each names the event that answers it."""

from __future__ import annotations

from dataclasses import dataclass

from gpulane.core.model import Band, Charge, EngineUrl, GpuId, JobId, Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A job that may be started, with what its start would cost."""

    job: JobId
    engine: EngineUrl
    charge: Charge
    rule: str
    """The rule of docs/scheduling that chose it: `1` warm within slack, `2` first in fair order ..."""
    despite_avoid: bool = False
    """The job keeps away from this gpu, but no other could run it now: the store grants it all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartAttempt:
    """Claim the first of these jobs that still waits, for this gpu, and start it. Answered by JobClaimed or
    ClaimLost.
    """

    gpu: GpuId
    candidates: tuple[Candidate, ...]
    """At least one, best first: a refused claim becomes a second choice in the same round trip."""
    lowest_f: tuple[tuple[Band, float], ...]
    """Per band, the lowest F among accounts with waiting jobs (scheduling M2): the store lifts V to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AskAgain:
    """Call decide again at this time even if nothing happens. Answered by the clock."""

    at: Seconds


Decision = StartAttempt | AskAgain
