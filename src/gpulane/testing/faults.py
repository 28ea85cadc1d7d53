"""The switches that make a simulated engine misbehave, and what each does to HTTP answers.

They are set when the engine is made or by `POST /sim/faults` on the engine itself, and read by `GET
/sim/state`. Both paths are the simulator's own: no real engine has them.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Final, Literal

from gpulane.testing.card import Json

UnloadFault = Literal["ok", "late", "lies", "hangs"]

ACTIONS: Final = frozenset({"crash", "restart", "drop_ws", "refuse_seconds"})
"""What `POST /sim/faults` does at once, besides setting switches."""


@dataclass(slots=True, kw_only=True)
class Faults:
    """What is to go wrong. Counts fall by one each time they strike."""

    crash_mid_jobs: int = 0
    """The engine dies half-way through this many of the next jobs."""
    hang_jobs: int = 0
    """This many of the next jobs stop half-way and never go on."""
    lose_jobs: int = 0
    """This many of the next jobs are accepted and forgotten (A1111: their connection is cut)."""
    oom_jobs: int = 0
    """This many of the next jobs end with out of memory."""
    error_jobs: int = 0
    """This many of the next jobs end with an execution error."""
    zombie: bool = False
    """HTTP works, nothing ever runs."""
    mute_ws: bool = False
    """WebSocket messages are swallowed."""
    stall_ws: bool = False
    """WebSocket messages wait until this is false again, as behind a client that does not read."""
    latency_seconds: float = 0.0
    """Every answer comes that much later."""
    fail_requests: int = 0
    """This many of the next requests are answered 500."""
    slow_body_bytes_per_second: int = 0
    """Bodies of answers trickle at this rate; 0 is off."""
    truncate_responses: int = 0
    """This many of the next answers stop half-way and close the connection."""
    unload: UnloadFault = "ok"
    """`late`: acknowledged, done `unload_seconds` later; `lies`: never done; `hangs`: never acknowledged."""
    unload_seconds: float = 5.0
    struck: Counter[str] = field(default_factory=Counter[str])
    """How often each has gone wrong: a run that proves something must know."""

    def set(self, changes: Mapping[str, Json]) -> None:
        """Set switches from JSON; ValueError names what is wrong."""
        known: dict[str, type[bool | int | float | str]] = {
            f.name: type(getattr(self, f.name)) for f in fields(self) if f.name != "struck"
        }
        for name, value in changes.items():
            if name in ACTIONS:
                continue
            if name not in known:
                raise ValueError(f"no such fault: {name!r}; there are {sorted({*known, *ACTIONS})}")
            if name == "unload" and value not in ("ok", "late", "lies", "hangs"):
                raise ValueError(f"unload must be ok, late, lies or hangs, not {value!r}")
            if isinstance(value, bool) and known[name] is not bool:
                raise ValueError(f"{name} must be a {known[name].__name__}")
            setattr(self, name, known[name](value))

    def strike(
        self,
        name: Literal[
            "crash_mid_jobs",
            "hang_jobs",
            "lose_jobs",
            "oom_jobs",
            "error_jobs",
            "fail_requests",
            "truncate_responses",
        ],
    ) -> bool:
        """Whether this fault strikes now; uses up one of its count."""
        left: int = getattr(self, name)
        if left <= 0:
            return False
        setattr(self, name, left - 1)
        self.struck[name] += 1
        return True

    def unload_now(self) -> UnloadFault:
        """How the unload that was just asked for goes."""
        self.struck[f"unload {self.unload}"] += 1
        return self.unload

    def as_dict(self) -> dict[str, Json]:
        return {f.name: getattr(self, f.name) for f in fields(self)}
