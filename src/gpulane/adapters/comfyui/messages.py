"""Tells from an engine's words how one job stands: its messages as they come, and looks at its queue and
history.

Neither is enough. Messages get lost (a mute socket, a reconnect, a restart) and a stalled socket brings old
ones late; looks lag. The rules, from the order in which the engine's thread works (result message, then
history and queue in one step, then `executing` with node null, then the next prompt):

 1. A result message (success, error, interrupted) makes the result known; the gpu is still busy.
 2. `executing` with node null frees the gpu; the entry in history is there by then.
 3. In the queue: it lives. A look that began after a message said "over" and sees it in the queue shows that
    the
    message was an old one; a look that began before it shows nothing.
 4. Not in the queue but in history: over, as the entry says; the entry's word goes before any message's.
 5. Not in the queue, not in history, and not in the queue again: lost, if the engine had ever had it. If
    that is not
    known (the answer to its submission never came) the engine may still be reading it: lost only once the
    looks have gone on long enough (`is_settled`).
 6. Freed by message but never in history (somebody cleared it): over as the messages say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

import msgspec

from gpulane.adapters.comfyui.result import VERDICTS, Verdict
from gpulane.core.model import JobId


class Place(StrEnum):
    """Where a job is in an engine's queue."""

    RUNNING = "running"
    WAITING = "waiting"
    ABSENT = "absent"


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueView:
    """An answered GET /queue."""

    running: tuple[str, ...]
    waiting: tuple[str, ...]

    def place_of(self, job: str) -> Place:
        if job in self.running:
            return Place.RUNNING
        return Place.WAITING if job in self.waiting else Place.ABSENT

    @property
    def is_empty(self) -> bool:
        return not self.running and not self.waiting


class _Item(msgspec.Struct, array_like=True):
    """[number, prompt_id, prompt, extra_data, outputs]; the rest may be megabytes and is skipped."""

    number: msgspec.Raw
    prompt_id: object


class _Queue(msgspec.Struct):
    queue_running: list[_Item]
    queue_pending: list[_Item]


def read_queue(body: bytes) -> QueueView:
    """Read the answer of GET /queue. Raises msgspec.DecodeError when it is none."""
    try:
        queue = msgspec.json.decode(body, type=_Queue)
    except (msgspec.DecodeError, RecursionError):
        queue = msgspec.json.decode(sound(body), type=_Queue)
    return QueueView(
        running=tuple(str(item.prompt_id) for item in queue.queue_running),
        waiting=tuple(str(item.prompt_id) for item in queue.queue_pending),
    )


def read_history(body: bytes, job: str) -> msgspec.Raw | None:
    """Read the answer of GET /history/{id}: the entry, or None when there is none."""
    try:
        entry = msgspec.json.decode(body, type=dict[str, msgspec.Raw]).get(job)
    except (msgspec.DecodeError, RecursionError):
        entry = msgspec.json.decode(sound(body), type=dict[str, msgspec.Raw]).get(job)
    return None if entry is None else entry.copy()


_STRING_OR_CONSTANT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|-?Infinity|NaN', re.DOTALL)


def sound(body: bytes) -> bytes:
    """Put null for NaN and Infinity, which Python writes into JSON: a node's output may hold them, and
    /queue may (`number: NaN` of somebody who came past us).
    """
    return _STRING_OR_CONSTANT.sub(lambda m: m[0] if m[0].startswith(b'"') else b"null", body)


# --- messages -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One text message of an engine, as far as it concerns us."""

    kind: str
    job: str | None
    node: str | None = None
    has_node: bool = False
    value: float | None = None
    max: float | None = None
    output: msgspec.Raw | None = None
    queue_remaining: int | None = None
    error: msgspec.Raw | None = None
    """The data of an execution_error."""

    @property
    def is_idle_word(self) -> bool:
        """Whether this is the last message of a run: `executing` with node null."""
        return self.kind == "executing" and self.has_node and self.node is None


class _Envelope(msgspec.Struct):
    type: str
    data: msgspec.Raw = msgspec.Raw(b"null")


class _ExecInfo(msgspec.Struct):
    queue_remaining: int | None = None


class _StatusData(msgspec.Struct):
    exec_info: _ExecInfo = msgspec.field(default_factory=_ExecInfo)


class _Data(msgspec.Struct):
    prompt_id: str | None = None
    node: str | msgspec.UnsetType | None = msgspec.UNSET
    value: float | None = None
    max: float | None = None
    output: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    status: _StatusData | None = None


_envelopes = msgspec.json.Decoder(_Envelope)
_datas = msgspec.json.Decoder(_Data)


def read_message(raw: str | bytes) -> Message | None:
    """Read a text message; None for what is none (custom nodes send what they like)."""
    try:
        try:
            envelope = _envelopes.decode(raw)
        except (msgspec.DecodeError, RecursionError):
            envelope = _envelopes.decode(sound(raw.encode() if isinstance(raw, str) else raw))
        data = _datas.decode(envelope.data)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    return Message(
        kind=envelope.type,
        job=data.prompt_id,
        node=None if isinstance(data.node, msgspec.UnsetType) else data.node,
        has_node=not isinstance(data.node, msgspec.UnsetType),
        value=data.value,
        max=data.max,
        output=None if isinstance(data.output, msgspec.UnsetType) else data.output.copy(),
        queue_remaining=None if data.status is None else data.status.exec_info.queue_remaining,
        error=envelope.data.copy() if envelope.type == "execution_error" else None,
    )


# --- evidence -----------------------------------------------------------------------------------------------


class Phase(IntEnum):
    """How far a job is in an engine, as far as evidence tells."""

    SENT = 0
    """Its bytes may have reached the engine; nothing is known."""
    WAITING = 1
    STARTED = 2
    KNOWN = 3
    """Its result is known; the gpu may still be busy with it."""
    FREE = 4
    """The engine is done with it."""
    LOST = 5
    """The engine does not know it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One look at an engine: its queue, then (when absent there) its history, then its queue again."""

    began: int
    """`Evidence.heard` when the first request of the look was sent."""
    before: Place
    entry: msgspec.Raw | None = None
    after: Place = Place.ABSENT


_RUNS = frozenset(
    {"execution_start", "execution_cached", "executing", "progress", "progress_state", "executed"}
)


@dataclass(slots=True, kw_only=True)
class Evidence:
    """What is known of one job in one engine. `hear` and `look` feed it; neither ever waits."""

    job: JobId
    was_accepted: bool = False
    """The engine answered that it has it, or it was seen there."""
    phase: Phase = Phase.SENT
    place: Place = Place.ABSENT
    """Where the last look saw it."""
    verdict: Verdict | None = None
    entry: msgspec.Raw | None = None
    """Its entry of the history."""
    outputs: dict[str, msgspec.Raw] = field(default_factory=dict[str, msgspec.Raw])
    """What its nodes put out, by message: in place of an entry that was cleared."""
    error: msgspec.Raw | None = None
    heard: int = 0
    """How many messages of this job have come."""
    _over_at: int = 0
    """`heard` when a message last said that it is over."""

    @property
    def has_started(self) -> bool:
        return self.phase >= Phase.STARTED and self.phase is not Phase.LOST

    @property
    def is_over(self) -> bool:
        """Whether the engine is done with it and all is known that ever will be."""
        return self.phase is Phase.LOST or (self.phase is Phase.FREE and self.entry is not None)

    @property
    def wants_entry(self) -> bool:
        """Whether only the entry in the history is missing."""
        return self.phase is Phase.FREE and self.entry is None

    def accept(self) -> None:
        """The engine answered that it has it."""
        self.was_accepted = True
        self.phase = max(self.phase, Phase.WAITING)

    def hear(self, message: Message) -> bool:
        """Take a message in; tells whether it is about this job."""
        if message.job != self.job or self.is_over:
            return False
        self.heard += 1
        if message.kind in VERDICTS:
            self.verdict = VERDICTS[message.kind]
            self.error = message.error
            self._over_at = self.heard
            self._reach(Phase.KNOWN)
        elif message.is_idle_word:
            self._over_at = self.heard
            self._reach(Phase.FREE)
        elif message.kind in _RUNS:
            self._reach(Phase.STARTED)
            if message.kind == "executed" and message.node is not None and message.output is not None:
                self.outputs[message.node] = message.output
        return True

    def look(self, look: Look, *, is_settled: bool = False) -> None:
        """Take a look in (rules 3 to 6). `is_settled`: absent looks have gone on for so long that it never
        came.
        """
        if self.is_over:
            return
        place = look.before if look.before is not Place.ABSENT or look.entry is not None else look.after
        if place is not Place.ABSENT:
            self._see_alive(place, look.began)
        elif look.entry is not None:
            self.was_accepted = True
            self.entry = look.entry
            self.place = Place.ABSENT
            self.phase = Phase.FREE
        elif look.began < self._over_at:
            pass  # begun before it ended: the next look will tell
        elif self.phase is Phase.FREE or self.phase is Phase.KNOWN:
            self._close()
        elif self.was_accepted or is_settled:
            self.phase = Phase.LOST

    def _see_alive(self, place: Place, began: int) -> None:
        if began < self._over_at:
            return
        self.place = place
        self.was_accepted = True
        if self.phase is Phase.FREE:  # what said that it was over was of an earlier run of the same id
            self.phase, self.verdict, self.error, self.outputs = Phase.WAITING, None, None, {}
        self.phase = max(self.phase, Phase.STARTED if place is Place.RUNNING else Phase.WAITING)

    def _reach(self, phase: Phase) -> None:
        self.was_accepted = True
        self.phase = max(self.phase, phase)

    def _close(self) -> None:
        """Make an entry of what the messages told: the history was cleared behind our back."""
        if self.verdict is None:
            self.phase = Phase.LOST
            return
        kind = next(kind for kind, verdict in VERDICTS.items() if verdict is self.verdict)
        status = {
            "status_str": "success" if self.verdict is Verdict.SUCCESS else "error",
            "completed": self.verdict is Verdict.SUCCESS,
            "messages": [[kind, self.error or {"prompt_id": self.job}]],
        }
        entry = {"outputs": self.outputs, "status": status, "meta": {}}
        self.entry = msgspec.Raw(msgspec.json.encode(entry))
        self.phase = Phase.FREE
