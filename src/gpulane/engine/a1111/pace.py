"""How often an engine is asked, and how long it is waited for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """The defaults suit real engines; tests are in more of a hurry."""

    poll_seconds: float = 1.0
    """Progress of the running job."""
    poll_cold_seconds: float = 0.25
    """The same while a model is being loaded: it shows when the load was over."""
    poll_nowebui_seconds: float = 2.0
    """Without /internal each question may decode a preview on the gpu."""
    quiet_seconds: float = 2.0
    """Two idle looks so far apart prove that an engine with a broken connection is idle."""
    silent_seconds_max: float = 300.0
    """An engine that answers nothing for so long is given up; its gpu stays occupied."""
    forgotten_seconds: float = 30.0
    """An idle engine that does not know the task any more, though the connection stands."""
    previews: bool = False
    """Fetch preview pictures: each costs the engine a decode."""
