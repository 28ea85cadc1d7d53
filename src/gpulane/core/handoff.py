"""What a card must give up before an engine of it runs: which engines are told to unload, and when enough
memory has come free. Pure; it commands and measures nothing, and never names the target or an engine that
the settings forbid.

The rules of `plan`; "holds" means: is known to, or may:

  1  The target's own models are its own business: ComfyUI and A1111 swap by themselves.
  2  An engine that holds nothing (unloaded, a lock's, not running) is left alone.
  3  `never` is never asked. What it holds stays, is counted, and is named in `why`.
  4  `always` is always asked; `unload_all` (after an attempt ran out of memory) makes every other engine so.
  5  `auto`, in a set that is warm together with the target: not asked. The operator's word beats ours.
  6  `auto` otherwise: none is asked when all is known to fit,
     6a  the target's peak and the margin in what was measured free (whatever the others hold), or
     6b  the peaks of all that stay, the target's, the margin and memory that no engine accounts for, in the
         card's total.
     Else as few as make 6b true: unknown ones first, then the largest. What is unknown never fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from gpulane.core.model import NO_MODEL, EngineUrl, HandoffMode, ModelKey

MARGIN_BYTES: Final = 512 * 1024 * 1024
"""Default margin: what a driver's context, fragments and rounding take beyond a measured peak."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """One engine of the card, and what it holds as far as known."""

    engine: EngineUrl
    mode: HandoffMode = HandoffMode.AUTO
    holds: bool = True
    """Whether it may hold memory. False only where that is known."""
    model: ModelKey = NO_MODEL
    """What it is known to hold; NO_MODEL: nobody has said."""
    bytes_peak: int | None = None
    """The learned peak of that model here. None is unknown."""
    unloaded: bool = False
    """It was told to unload and has had no job since."""

    @property
    def holds_known(self) -> bool:
        return self.holds and self.model != NO_MODEL


@dataclass(frozen=True, slots=True, kw_only=True)
class CardMemory:
    """One card's engines and memory. Unknown is None, never zero."""

    engines: tuple[Holding, ...]
    bytes_free: int | None = None
    """Measured just now, with everything resident that is."""
    bytes_total: int | None = None
    warm_together: frozenset[frozenset[EngineUrl]] = frozenset()
    margin_bytes: int = MARGIN_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffPlan:
    """What to do before a job of the target starts."""

    unload: tuple[EngineUrl, ...]
    """In the order in which to ask."""
    need_bytes: int | None
    """The job's learned peak."""
    make_loadable: bool
    """The target was unloaded: it may have to be told to load again (A1111)."""
    why: str
    """For people and logs."""
    wanted_bytes_free: int | None = None
    """What must be measured free before the job starts. None: nothing to go by, the acknowledgment counts."""


def plan(
    card: CardMemory, target: EngineUrl, need_bytes: int | None, *, unload_all: bool = False
) -> HandoffPlan:
    """Returns which engines to unload before a job of the target that needs so much, by rules 1 to 6."""
    own = next((e for e in card.engines if e.engine == target), None)
    others = [e for e in card.engines if e.engine != target and e.holds]  # rules 1, 2
    fixed = [e for e in others if e.mode is HandoffMode.NEVER]  # rule 3
    asked = [e for e in others if always(e, unload_all=unload_all)]  # rule 4
    movable = [e for e in others if e not in fixed and e not in asked]
    together = [e for e in movable if warm_together(card, e.engine, target)]  # rule 5
    auto = [e for e in movable if e not in together]
    extra, why = room(card, need_bytes, kept=[*fixed, *together], auto=auto)  # rule 6
    unload = [*asked, *extra]
    if asked:
        why = f"{'all after out of memory' if unload_all else 'always'}: {names(asked)}; {why}"
    if fixed:
        why = f"{why}; never unloaded by its settings: {names(fixed)}"
    return HandoffPlan(
        unload=tuple(e.engine for e in unload),
        need_bytes=need_bytes,
        make_loadable=own is not None and own.unloaded,
        why=why,
        wanted_bytes_free=wanted(card, own, need_bytes, unload, [e for e in others if e not in unload]),
    )


def enough(bytes_free: int | None, handoff: HandoffPlan) -> bool:
    """Tells whether so much measured free will do to start. Unknown: the acknowledged unload is trusted."""
    return bytes_free is None or handoff.wanted_bytes_free is None or bytes_free >= handoff.wanted_bytes_free


# --- the parts of the rules


def always(engine: Holding, *, unload_all: bool) -> bool:
    return engine.mode is HandoffMode.ALWAYS or (unload_all and engine.mode is HandoffMode.AUTO)


def warm_together(card: CardMemory, one: EngineUrl, other: EngineUrl) -> bool:
    return any({one, other} <= allowed for allowed in card.warm_together)


def room(
    card: CardMemory,
    need_bytes: int | None,
    *,
    kept: Sequence[Holding],
    auto: Sequence[Holding],
) -> tuple[list[Holding], str]:
    """Returns which of the `auto` engines must go, fewest first, and why (rule 6)."""
    if not auto:
        return [], "no other engine has to make room"
    if need_bytes is None:
        return list(auto), f"unknown need: {names(auto)}"
    if card.bytes_free is not None and need_bytes + card.margin_bytes <= card.bytes_free:  # 6a
        return [], "fits beside the others in what is free"
    going = sorted(auto, key=lambda e: (e.bytes_peak is not None, -(e.bytes_peak or 0), e.engine))
    for count in range(len(going) + 1):
        if fits(card, need_bytes, [*kept, *going[count:]]):  # 6b
            return going[
                :count
            ], f"makes room: {names(going[:count])}" if count else "all fit the card together"
    return going, f"not known to fit: {names(going)}"


def fits(card: CardMemory, need_bytes: int, staying: Sequence[Holding]) -> bool:
    """Tells whether what stays and the job are known to fit the card's total."""
    if card.bytes_total is None:
        return False
    peaks = sum_of_peaks(staying)
    if peaks is None:
        return False
    return peaks + need_bytes + card.margin_bytes + unaccounted(card) <= card.bytes_total


def sum_of_peaks(engines: Sequence[Holding]) -> int | None:
    """Returns the peaks of what they hold together; None when one is not known."""
    total = 0
    for engine in engines:
        if engine.bytes_peak is None:
            return None
        total += engine.bytes_peak
    return total


def unaccounted(card: CardMemory) -> int:
    """Returns the memory in use that cannot be any engine's known model: a desktop, a stranger's program."""
    if card.bytes_free is None or card.bytes_total is None:
        return 0
    known = sum_of_peaks([e for e in card.engines if e.holds])
    return 0 if known is None else max(card.bytes_total - card.bytes_free - known, 0)


def wanted(
    card: CardMemory,
    own: Holding | None,
    need_bytes: int | None,
    unload: Sequence[Holding],
    staying: Sequence[Holding],
) -> int | None:
    """Returns what must be free after the unloads.

    The job's need and the margin, less what the target will give up itself, and never more than the card can
    have free; where that cannot be told, a rise: what is known to hold a model gives back at least a margin.
    """
    if not unload:
        return None
    own_peak = own.bytes_peak if own is not None and own.holds else 0
    if need_bytes is not None and own_peak is not None:
        want = need_bytes + card.margin_bytes - own_peak
        if card.bytes_total is not None:
            # Every process keeps its context in the card, whatever it unloads.
            contexts = card.margin_bytes * len(card.engines)
            stays = sum(e.bytes_peak or 0 for e in staying) + own_peak
            want = min(want, card.bytes_total - contexts - stays - unaccounted(card))
        return max(want, 0)
    if card.bytes_free is None:
        return None
    rise = card.margin_bytes * sum(e.holds_known for e in unload)
    return card.bytes_free + rise if rise else None


def names(engines: Sequence[Holding]) -> str:
    return ", ".join(e.engine for e in engines)
