"""What an A1111 says of its state, and how far each of its words can be trusted.

`state` is one for the whole process, whoever's job runs. The task tables of /internal have known mistakes: a
task that fails before it starts stays pending for ever, one that fails while it runs stays active until
another starts. So a task counts as running only while the state is busy too, and pending alone proves
nothing.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import msgspec

PROGRESS: Final = "/sdapi/v1/progress?skip_current_image=true"
"""Even so the engine may decode a preview on the gpu: not to be asked often while a job runs."""
TASK_PROGRESS: Final = "/internal/progress"
PENDING_TASKS: Final = "/internal/pending-tasks"
MEMORY: Final = "/sdapi/v1/memory"
INTERRUPT: Final = "/sdapi/v1/interrupt"
UNLOAD: Final = "/sdapi/v1/unload-checkpoint"
RELOAD: Final = "/sdapi/v1/reload-checkpoint"


class State(msgspec.Struct, frozen=True):
    """`state` of /sdapi/v1/progress."""

    job: str | None = ""
    job_count: int = 0
    """-1 from the begin of a job until its pictures are counted; 0 when idle."""
    job_timestamp: str | int | float | None = None
    interrupted: bool = False

    @property
    def is_idle(self) -> bool:
        return self.job_count == 0 and not self.job


class GlobalProgress(msgspec.Struct, frozen=True):
    """Answer of /sdapi/v1/progress: of whatever runs."""

    state: State
    progress: float | None = 0.0
    textinfo: str | None = None


class TaskProgress(msgspec.Struct, frozen=True):
    """Answer of /internal/progress for one task."""

    active: bool = False
    queued: bool = False
    completed: bool = False
    progress: float | None = None
    textinfo: str | None = None
    live_preview: str | None = None
    id_live_preview: int | None = None

    @property
    def is_known(self) -> bool:
        return self.active or self.queued or self.completed


class PendingTasks(msgspec.Struct, frozen=True):
    """Answer of /internal/pending-tasks: those waiting, never the running one."""

    tasks: list[str] = []


class Memory(msgspec.Struct, frozen=True):
    """Answer of /sdapi/v1/memory; `cuda` is `{"error": ...}` without a gpu."""

    cuda: dict[str, object] = {}

    def card(self) -> tuple[int, int] | None:
        """Bytes free and in all of the whole card, other processes included."""
        try:
            system = msgspec.convert(self.cuda.get("system"), dict[str, float])
            return int(system["free"]), int(system["total"])
        except (msgspec.ValidationError, KeyError):
            return None

    def held(self) -> int | None:
        """Bytes that the engine itself holds in tensors on the card."""
        try:
            return int(msgspec.convert(self.cuda.get("allocated"), dict[str, float])["current"])
        except (msgspec.ValidationError, KeyError):
            return None


class Flavor(StrEnum):
    """Relatives that answer the same API."""

    A1111 = "a1111"
    FORGE = "forge"
    SDNEXT = "sdnext"


def task_question(task: str, *, preview: bool = False, shown: int = -1) -> bytes:
    """Ask for one task; without a preview nothing is decoded on the gpu."""
    return msgspec.json.encode({"id_task": task, "id_live_preview": shown, "live_preview": preview})


def flavor_of(documents: dict[str, bytes]) -> Flavor:
    """Tell the relatives apart by the options that only they have."""
    options = documents.get("options", b"")
    if "sd-modules" in documents or b'"forge_' in options:
        return Flavor.FORGE
    return Flavor.SDNEXT if b'"diffusers_' in options else Flavor.A1111
