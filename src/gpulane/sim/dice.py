"""Which faults strike when, from a seed, and how often each has struck while work was in flight."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final


class Fault(StrEnum):
    """What goes wrong. Each strikes a card that has a job claimed or running."""

    UNLOAD_SLOW = "memory falls long after the unload was acknowledged"
    UNLOAD_NEVER = "memory never falls after an unload"
    UNLOAD_LIES = "an unload is acknowledged and not done"
    UNLOAD_HANGS = "an unload is never acknowledged"
    VRAM_UNKNOWN = "the measurement of memory fails"
    SOURCE_DIES_ASKED = "the engine dies that is told to unload"
    SOURCE_DIES_MEASURING = "the unloaded engine dies before its memory falls"
    TARGET_DIES_ASKING = "the next engine dies during the unload"
    TARGET_DIES_MEASURING = "the next engine dies while memory is measured"
    TARGET_DIES_AGAIN = "the next engine dies at the second unload"
    TARGET_DIES_LOADABLE = "the next engine dies when told to load again"
    DIES_LOADING = "the engine dies while it loads a model"
    DIES_RUNNING = "the engine dies while it runs a job"
    STRANGER_IN_HANDOFF = "a stranger works on the engine during the hand-off"
    STRANGER_BESIDE = "a stranger works on another engine while a job runs"
    HANGS = "a job hangs and heeds the interrupt"
    HANGS_DEAF = "a job hangs and has to be killed"
    LOCK_KILLED = "the holder of a lock is killed"
    LOCK_OVERDUE = "a lock is held beyond its time limit"
    SICK = "everything fails on a card for a while"
    PAUSED = "a card is paused after failures in a row"
    OUT_OF_MEMORY = "a job runs out of memory"
    LEAKING = "an engine is found leaking"
    CLIENT_FAULT = "the engine refuses a job's content"
    CANCELLED_IN_HANDOFF = "a job is cancelled during its hand-off"
    CANCELLED_RUNNING = "a running job is cancelled"
    DRAINED = "a card is drained while it works"
    GATEWAY_DIES = "the gateway is killed during a hand-off or a job"
    CLAIM_LOST = "the store refuses a claim"
    EVENT_LOST = "an event of the store is lost"


SHARES: Final[dict[Fault, float]] = {
    Fault.UNLOAD_SLOW: 0.08,
    Fault.UNLOAD_NEVER: 0.05,
    Fault.UNLOAD_LIES: 0.04,
    Fault.UNLOAD_HANGS: 0.02,
    Fault.VRAM_UNKNOWN: 0.02,
    Fault.SOURCE_DIES_ASKED: 0.01,
    Fault.SOURCE_DIES_MEASURING: 0.02,
    Fault.TARGET_DIES_ASKING: 0.01,
    Fault.TARGET_DIES_MEASURING: 0.01,
    Fault.TARGET_DIES_AGAIN: 0.12,
    Fault.TARGET_DIES_LOADABLE: 0.02,
    Fault.DIES_LOADING: 0.01,
    Fault.DIES_RUNNING: 0.01,
    Fault.STRANGER_IN_HANDOFF: 0.02,
    Fault.STRANGER_BESIDE: 0.01,
    Fault.HANGS: 0.004,
    Fault.HANGS_DEAF: 0.004,
    Fault.LOCK_KILLED: 0.06,
    Fault.LOCK_OVERDUE: 0.06,
    Fault.SICK: 0.004,
    Fault.CLIENT_FAULT: 0.01,
    Fault.CANCELLED_IN_HANDOFF: 0.005,
    Fault.DRAINED: 0.004,
    Fault.GATEWAY_DIES: 0.006,
    Fault.CLAIM_LOST: 0.02,
    Fault.EVENT_LOST: 0.001,
}
"""How often each strikes where it can. Those that are not here follow from others, or from users."""


@dataclass(slots=True, eq=False)
class Dice:
    """One run's chance. `on` ends with the faults."""

    rng: random.Random
    on: bool = True
    fired: dict[Fault, int] = field(default_factory=lambda: dict.fromkeys(Fault, 0))

    def roll(self, fault: Fault) -> bool:
        """Tells whether it is to strike; whoever lets it strike later counts it then."""
        return self.on and self.rng.random() < SHARES[fault]

    def strikes(self, fault: Fault) -> bool:
        if not self.roll(fault):
            return False
        self.count(fault)
        return True

    def count(self, fault: Fault) -> None:
        self.fired[fault] += 1
