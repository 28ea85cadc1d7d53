"""Pauses a gpu on which attempts keep failing, whatever the jobs, and lets it come back slowly. It counts;
when the pause begins and ends is the shell's to tell (`GpuPaused`).

After `failures_pause` failed attempts in a row the gpu rests. Then one job tries it (a gpu runs one at a
time): if that fails too, the rest is doubled; a success forgets all. A failure by the client's content says
nothing about the gpu, nor does a cancelled attempt: that is no outcome to tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from gpulane.core.model import Failure, FailureKind, Seconds

DOUBLINGS_MAX: Final = 32
"""More would only make floats infinite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerLimits:
    """The settings it goes by (`health`)."""

    failures_pause: int = 5
    pause_seconds: Seconds = 30.0
    pause_seconds_max: Seconds = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """Leave the gpu alone for so long."""

    seconds: Seconds
    failures: int
    """Failed attempts in a row."""


@dataclass(slots=True, eq=False)
class Breaker:
    """One gpu's count of failures in a row."""

    limits: BreakerLimits
    failures: int = 0
    pauses: int = 0
    """Pauses since the last success."""

    @property
    def is_trying(self) -> bool:
        """The gpu was paused, and nothing has succeeded there since."""
        return self.pauses > 0

    def after(self, outcome: Failure | None) -> Pause | None:
        """Counts one attempt (None: it succeeded); returns the pause that follows, if any."""
        if outcome is None:
            self.failures = self.pauses = 0
            return None
        if outcome.kind is FailureKind.CLIENT:
            return None
        self.failures += 1
        if not self.is_trying and self.failures < self.limits.failures_pause:
            return None
        doubled = self.limits.pause_seconds * 2.0 ** min(self.pauses, DOUBLINGS_MAX)
        self.pauses += 1
        return Pause(seconds=min(doubled, self.limits.pause_seconds_max), failures=self.failures)

    def reset(self) -> None:
        """Forgets all: an operator has resumed the gpu."""
        self.failures = self.pauses = 0
