"""How long a ComfyUI client waits for what. Patience counts in seconds: a busy engine is slow, not dead."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """All waits of a client; tests shorten them."""

    request_seconds: float = 10.0
    """One control call. Answers after 1 s were seen of an engine that imports a model."""
    submit_seconds: float = 120.0
    """POST /prompt: a large body over a slow line, and validation that reads files."""
    acknowledge_seconds: float = 15.0
    """POST /free is answered at once, by an engine whose loop is not held up."""
    socket_seconds: float = 2.0
    """A job waits so long for the event socket, then goes without it: looking alone suffices."""
    poll_first_seconds: float = 1.0
    poll_seconds: float = 2.0
    """Between looks at a running job; sockets were seen to go mute."""
    poll_share: float = 0.05
    """Looks take at most this share of the time: /queue of a prompt full of pictures has megabytes."""
    quiet_seconds: float = 2.0
    """A job whose submission was not answered must be absent so long before it counts as never arrived."""
    refused_seconds: float = 5.0
    """Connections refused for so long: the engine is gone."""
    silent_seconds: float = 60.0
    """No answer for so long: the engine is given up. Its gpu stays occupied."""
    zombie_seconds: float = 20.0
    """A job waits at the head of an engine that runs nothing: its executing thread is dead."""
    suspect_seconds: float = 5.0
    """A job runs and no message came: the socket may be mute and is opened again, then every
    `stuck_seconds`/4."""
    stuck_seconds: float = 120.0
    """... and nothing on new sockets shows that it ever began: the executing thread died of it."""
    interrupt_seconds: float = 3.0
    """An interrupt takes effect at the next node or step; it is repeated, since it may come a moment too
    early."""
    canary_seconds: float = 15.0
    vram_seconds: float = 30.0
    """How often a probe asks for free VRAM as well."""
    ping_seconds: float = 20.0
    reconnect_seconds_min: float = 0.1
    reconnect_seconds_max: float = 5.0
