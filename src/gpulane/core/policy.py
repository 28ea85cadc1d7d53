"""The settings by which the scheduler ranks, places and retries. Plain numbers; it never decides anything
itself.

Every default has its reason in docs/scheduling.md and below; the unit is in the name (`loads`: multiples
of a load time).
"""

from __future__ import annotations

from dataclasses import dataclass

from gpulane.core.model import Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What `decide`, `admit` and `after_failure` go by."""

    slack_loads: float = 20.0
    """Rule 1: how far ahead, in load times of the model, a warm job's account may be. 10 to 30 is flat;
    the unit is the load time because a load is what slack saves. Never seconds: read as 1 it costs 20
    points of switches and no test fails."""
    slack_cap_seconds_per_gpu: Seconds = 60.0
    """Rule 1: the most slack, in seconds of F per usable gpu: keeps a neighbour's head start near a minute
    of wall time."""
    load_seconds_unknown: Seconds = 10.0
    """Load time of a model never measured on anything alike. Too low is the dangerous side, so it is on
    the high side."""
    handoff_seconds: Seconds = 6.0
    """Giving a card from one engine to another (unload, measure), until a hand-off there was measured."""
    handoff_margin_bytes: int = 512 * 1024 * 1024
    """Free memory beyond a job's learned peak before it counts as fitting beside others."""
    skip_leaking: bool = False
    """Whether a gpu with an engine that does not give its memory back is left alone until it has."""
    handoff_age_factor: float = 30.0
    """Rule 5: a gpu last used by the same service counts this many hand-offs older. 3 to 100 is flat."""
    service_seconds_unknown: Seconds = 15.0
    """Service time of a job of a kind never measured: near the mean of the trace (17.8 s); wrong ones are
    corrected at the end."""
    load_share: float = 0.3
    """Share of loads on top of service in estimates of a start: what the policy reaches on the trace."""
    candidates_max: int = 8
    """Jobs offered per claim: a refused first choice becomes a second one in the same round trip."""
    ask_again_seconds_max: Seconds = 5.0
    """The longest timer: a belt against a missed wake-up, which would idle a gpu until the next event."""
    ask_again_seconds_min: Seconds = 0.001
    """The shortest timer: asking again at once would spin."""
    claim_lost_rest_seconds_base: Seconds = 0.05
    """Rest of a gpu after its second lost claim in a row, doubled with each further one: stops a spin on a
    standing refusal."""
    claim_lost_rest_seconds_max: Seconds = 5.0
    """The longest such rest."""
    retry_seconds_base: Seconds = 1.0
    """Rest of a job before its second attempt, doubled with each further one."""
    retry_seconds_max: Seconds = 60.0
    """The longest such rest."""
    retry_jitter_share: float = 0.5
    """How much of the rest is spread by the jitter that is passed in: jobs that failed together do not
    come back together."""
    engine_kills_max: int = 2
    """Attempts of one job that may kill or hang their engine before it is quarantined (`poisoned`)."""
    out_of_memory_retries: int = 1
    """How often a job that ran out of memory is tried again, on another gpu or after unloading."""
