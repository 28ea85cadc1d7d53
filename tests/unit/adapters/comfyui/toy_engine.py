"""A toy ComfyUI that shares no code with ours: the truth against which what we make of its words is held.

One job of interest, `JOB`, and others. Messages go through a wire that may lose, mute or delay them; looks
are split into their requests, between which the engine may go on.
"""

import json
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

JOB = "c72bac4e-fb15-4d8b-9505-539657dcc911"
End = Literal["success", "error", "interrupted"]


@dataclass
class Toy:
    """The engine: what is really so."""

    pending: list[str] = field(default_factory=list[str])
    running: str | None = None
    done_steps: int = 0
    end: End | None = None
    """Said of the running one, but not filed yet."""
    history: dict[str, Any] = field(default_factory=dict[str, Any])
    wire: deque[str] = field(default_factory=deque[str])
    """Messages under way."""
    muted: bool = False
    ends: list[End] = field(default_factory=list[End])
    """How JOB has ended, each time it ran."""
    forgotten: int = 0
    """Restarts and deletions that took JOB away."""

    def say(self, kind: str, **data: object) -> None:
        if not self.muted:
            self.wire.append(json.dumps({"type": kind, "data": data}))

    def submit(self, name: str) -> None:
        self.pending.append(name)
        self.say("status", status={"exec_info": {"queue_remaining": len(self.pending)}})

    def step(self, end: End) -> None:
        """Let the executing thread do its next thing."""
        if self.running is None:
            if self.pending:
                self.running, self.done_steps = self.pending.pop(0), 0
                self.say("execution_start", prompt_id=self.running, timestamp=1)
            return
        if self.done_steps < 2:
            self.done_steps += 1
            self.say("executing", node=str(self.done_steps), display_node="1", prompt_id=self.running)
            self.say("progress", value=self.done_steps, max=2, prompt_id=self.running, node="1")
            return
        if self.end is None:
            self.end = end
            self.say(f"execution_{end}", prompt_id=self.running, timestamp=2)
            return
        self.finish(self.running, self.end)

    def finish(self, name: str, end: End) -> None:
        """File it and let go of it, in one."""
        messages = [
            ["execution_start", {"prompt_id": name, "timestamp": 1}],
            [f"execution_{end}", {"prompt_id": name, "timestamp": 2}],
        ]
        word = "success" if end == "success" else "error"
        self.history[name] = {"outputs": {}, "status": {"status_str": word, "messages": messages}}
        self.running = self.end = None
        self.say("executing", node=None, prompt_id=name)
        if name == JOB:
            self.ends.append(end)

    def restart(self) -> None:
        if JOB in self.pending or self.running == JOB or JOB in self.history:
            self.forgotten += 1
        self.pending, self.running, self.end, self.history = [], None, None, {}
        self.wire.clear()

    def queue(self) -> bytes:
        def item(name: str) -> list[Any]:
            return [0, name, {"1": {}}, {}, ["1"]]

        running = [] if self.running is None else [item(self.running)]
        return json.dumps(
            {"queue_running": running, "queue_pending": [item(n) for n in self.pending]}
        ).encode()

    def entry(self) -> bytes:
        return json.dumps({JOB: self.history[JOB]} if JOB in self.history else {}).encode()

    @property
    def has_job(self) -> bool:
        return self.running == JOB or JOB in self.pending
