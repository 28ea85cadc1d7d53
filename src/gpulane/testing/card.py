"""A simulated GPU card that several engine processes share by naming the same file.

The card never blocks a second job: it writes down both intervals, counts the memory both need and raises
`OutOfMemory` when that is more than it has. Its log is what `judge.py` reads, so every line is one append of
one whole line, and a line is never changed afterwards.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Self
from uuid import uuid4

GIB: Final = 1024**3
"""Bytes in a gibibyte."""

MIN_SLEEP_SECONDS: Final = 0.001
"""Shorter waits are saved up: a timer that short costs more than it waits."""

MAX_MEMORY_LINES: Final = 2_000_000
"""A card without a file keeps its log in memory, up to here."""

IntervalKind = Literal["compute", "load", "unload"]
Json = Any
"""A decoded JSON value: this package plays foreign programs, and their data is foreign data."""


class OutOfMemory(Exception):
    """The card has not the memory that was asked for."""


class Died(Exception):
    """A fault kills the engine here, in the middle of its work."""


@dataclass(slots=True, kw_only=True)
class OpenInterval:
    """An interval under way."""

    outcome: str = "ok"
    """What its end line will say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CardOptions:
    """How big and how fast a simulated card is."""

    vram_gib: float = 24.0
    speed: float = 1.0
    """2.0 computes and loads in half the time."""
    time_scale: float = 1.0
    """Real seconds per simulated second; 0 never sleeps."""
    seconds_per_step: float = 0.08
    """Seconds for one sampling step of one image of one megapixel."""
    load_seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    """Load times by model name; others follow from the name's hash."""
    model_gib: Mapping[str, float] = field(default_factory=dict[str, float])
    """Sizes by model name; others follow from the name."""
    unload_seconds: float = 0.3
    context_gib: float = 0.3
    """What a running engine process holds for itself."""
    working_gib: float = 1.0
    """Memory for computing, per megapixel and image of one batch."""
    jitter: float = 0.0
    """0.1 makes each duration up to 10 % longer or shorter."""
    seed: int = 0


def _share(name: str) -> float:
    """A number from 0 to 1 that always belongs to this name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 0xFFFFFFFF


def default_model_gib(model: str) -> float:
    """The size of a model as its name suggests."""
    lowered = model.lower()
    if "flux" in lowered or "sd3" in lowered:
        return 11.0 + 2.0 * _share(model)
    if "xl" in lowered or "pony" in lowered:
        return 6.0 + _share(model)
    return 2.0 + 2.0 * _share(model)


def default_load_seconds(model: str) -> float:
    """Seconds to load a model: its size over a disk of about 1 GiB/s."""
    return default_model_gib(model) * (0.7 + 0.6 * _share("disk:" + model))


class Card:
    """One simulated card; `file` shares it with other processes, without one it is this process's own."""

    def __init__(
        self,
        file: Path | None = None,
        options: CardOptions | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.file = file
        self.options = options or CardOptions()
        self.name = file.stem if file else "sim"
        self._clock = clock
        self._random = random.Random(self.options.seed)
        self._memory_lines: list[str] = []
        self._memory_state: Json = {"engines": {}}
        self._log_fd: int | None = None
        self._state_fd: int | None = None
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._log_fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            state_file = file.with_name(file.name + ".state")
            self._state_fd = os.open(state_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def close(self) -> None:
        """Let go of the files."""
        for descriptor in (self._log_fd, self._state_fd):
            if descriptor is not None:
                os.close(descriptor)
        self._log_fd = self._state_fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    # -- the log

    def log(self, event: str, **fields: Json) -> None:
        """Append one line, whole, with both clocks."""
        record = {"event": event, "wall": time.time_ns() / 1e9, "mono": self._clock(), "pid": os.getpid()}
        line = json.dumps(record | fields, separators=(",", ":"))
        if self.file is None:
            if len(self._memory_lines) < MAX_MEMORY_LINES:
                self._memory_lines.append(line)
        elif self._log_fd is not None:
            os.write(self._log_fd, line.encode() + b"\n")

    def lines(self) -> list[Json]:
        """Everything logged so far, of every process."""
        text = self.file.read_text().splitlines() if self.file else self._memory_lines
        return [json.loads(line) for line in text]

    # -- what lies in its memory

    @contextlib.contextmanager
    def _state(self) -> Iterator[Json]:
        """The shared state, to be changed by one process at a time."""
        if self._state_fd is None:
            yield self._memory_state
            return
        fcntl.flock(self._state_fd, fcntl.LOCK_EX)
        try:
            size = os.fstat(self._state_fd).st_size
            state = _read_state(os.pread(self._state_fd, size, 0))
            _forget_dead_processes(state)
            yield state
            written = json.dumps(state).encode()
            os.pwrite(self._state_fd, written, 0)
            os.ftruncate(self._state_fd, len(written))
        finally:
            fcntl.flock(self._state_fd, fcntl.LOCK_UN)

    @property
    def bytes_total(self) -> int:
        return int(self.options.vram_gib * GIB)

    def bytes_used(self) -> int:
        """What all engines hold together, as the driver would say."""
        with self._state() as state:
            return _used(state)

    def resident(self, engine: str) -> dict[str, int]:
        """The models of one engine that lie in memory, least recently used first."""
        with self._state() as state:
            entry: Json = state["engines"].get(engine)
            return dict(entry["resident"]) if entry else {}

    def model_bytes(self, model: str) -> int:
        return int(self.options.model_gib.get(model, default_model_gib(model)) * GIB)

    def load_seconds(self, model: str) -> float:
        seconds = self.options.load_seconds.get(model, default_load_seconds(model))
        return seconds * self._jitter() / self.options.speed

    def step_seconds(self, megapixels: float, images: int) -> float:
        """Seconds for one sampling step of a batch."""
        return self.options.seconds_per_step * megapixels * images * self._jitter() / self.options.speed

    def _jitter(self) -> float:
        return 1.0 + self.options.jitter * self._random.uniform(-1.0, 1.0)

    def attach(self, engine: str, service: str) -> "CardUse":
        """Let an engine use the card; what an earlier process at this address held is gone with it."""
        with self._state() as state:
            state["engines"][engine] = {
                "pid": os.getpid(),
                "context": int(self.options.context_gib * GIB),
                "resident": {},
                "working": {},
            }
        self.log("engine_up", engine=engine, service=service, vram_total=self.bytes_total)
        return CardUse(card=self, engine=engine, service=service)

    def change(self, engine: str) -> "contextlib.AbstractContextManager[CardEntry]":
        """The memory of one engine, to be looked at and changed in one go."""
        return self._change(engine)

    @contextlib.contextmanager
    def _change(self, engine: str) -> Iterator["CardEntry"]:
        with self._state() as state:
            entry: Json = state["engines"].setdefault(
                engine, {"pid": os.getpid(), "context": 0, "resident": {}, "working": {}}
            )
            before = _used(state)
            yield CardEntry(entry=entry, used=lambda: _used(state), bytes_total=self.bytes_total)
            after = _used(state)
        if after != before:
            self.log("vram", engine=engine, used=after, total=self.bytes_total)

    def forget(self, engine: str) -> None:
        """A process is gone: the driver takes its memory back."""
        with self._state() as state:
            state["engines"].pop(engine, None)


@dataclass(slots=True, kw_only=True)
class CardEntry:
    """One engine's part of the memory while the card's state is held."""

    entry: Json
    used: Callable[[], int]
    bytes_total: int

    @property
    def resident(self) -> dict[str, int]:
        return self.entry["resident"]

    @property
    def working(self) -> dict[str, int]:
        return self.entry["working"]

    @property
    def bytes_free(self) -> int:
        return self.bytes_total - self.used()


def _read_state(raw: bytes) -> Json:
    """The state as written; a process killed while it wrote may have left the tail of an older one."""
    try:
        return json.JSONDecoder().raw_decode(raw.decode())[0]
    except ValueError:
        return {"engines": {}}


def _used(state: Json) -> int:
    entries: list[Json] = list(state["engines"].values())
    return sum(e["context"] + sum(e["resident"].values()) + sum(e["working"].values()) for e in entries)


def _forget_dead_processes(state: Json) -> None:
    engines: dict[str, Json] = state["engines"]
    for engine, entry in list(engines.items()):
        if entry["pid"] == os.getpid():
            continue
        try:
            os.kill(entry["pid"], 0)
        except ProcessLookupError:
            del engines[engine]
        except PermissionError:  # it lives, under another account
            pass


class CardUse:
    """One engine's hands on the card: it loads, unloads and computes, and all of it is logged."""

    def __init__(self, *, card: Card, engine: str, service: str) -> None:
        self.card = card
        self.engine = engine
        self.service = service
        self._owed_seconds = 0.0

    # -- intervals

    def begin(self, kind: IntervalKind, job_id: str, model: str | None) -> str:
        """Log that an interval begins; answers the id that `end` wants."""
        interval = uuid4().hex
        self.card.log(
            "begin",
            interval=interval,
            kind=kind,
            engine=self.engine,
            service=self.service,
            job=job_id,
            model=model,
        )
        return interval

    def end(self, interval: str, outcome: str = "ok") -> None:
        self.card.log("end", interval=interval, engine=self.engine, outcome=outcome)

    @contextlib.contextmanager
    def interval(self, kind: IntervalKind, job_id: str, model: str | None) -> Iterator["OpenInterval"]:
        """An interval round some work. Who is killed logs no end: neither a cancelled task, nor a `Died`."""
        opened = OpenInterval()
        interval = self.begin(kind, job_id, model)
        try:
            yield opened
        except Died:
            raise
        except OutOfMemory:
            self.end(interval, "oom")
            raise
        except Exception:
            self.end(interval, "error")
            raise
        self.end(interval, opened.outcome)

    def job_over(self, job_id: str, outcome: str, *, computed: bool) -> None:
        """Log that the engine is through with a job."""
        self.card.log(
            "job", engine=self.engine, service=self.service, job=job_id, outcome=outcome, computed=computed
        )

    async def sleep(self, seconds: float) -> None:
        """Let simulated seconds pass."""
        self._owed_seconds += seconds * self.card.options.time_scale
        if self._owed_seconds < MIN_SLEEP_SECONDS:
            await asyncio.sleep(0)
            return
        loop = asyncio.get_running_loop()
        started = loop.time()
        wanted, self._owed_seconds = self._owed_seconds, 0.0
        await asyncio.sleep(wanted)
        # A timer that fired late is made good at the next step, within reason.
        self._owed_seconds = max(-wanted, wanted - (loop.time() - started))

    # -- models

    def is_resident(self, model: str) -> bool:
        return model in self.card.resident(self.engine)

    async def load(self, model: str, job_id: str, *, keep_others: bool) -> bool:
        """Bring a model into memory. With `keep_others` own old ones make place only where it is needed.

        Answers whether there was anything to load.
        """
        needed = self.card.model_bytes(model)
        with self.card.change(self.engine) as memory:
            if model in memory.resident:
                memory.resident[model] = memory.resident.pop(model)  # now the most recently used
                return False
            if not keep_others:
                memory.resident.clear()
            self._make_place(memory, needed, keep=None)
            fits = memory.bytes_free >= needed
            if fits:
                memory.resident[model] = needed
        if not fits:
            self.raise_oom(job_id, model, needed)
        with self.interval("load", job_id, model):
            await self.sleep(self.card.load_seconds(model))
        return True

    def raise_oom(self, job_id: str, model: str | None, needed: int) -> None:
        """Log and raise what the driver would say."""
        used, total = self.card.bytes_used(), self.card.bytes_total
        self.card.log(
            "oom", engine=self.engine, job=job_id, model=model, needed=needed, used=used, total=total
        )
        raise OutOfMemory(
            f"CUDA out of memory. Tried to allocate {needed / GIB:.2f} GiB. GPU 0 has a total capacity of "
            f"{total / GIB:.2f} GiB of which {max(0, total - used) / GIB:.2f} GiB is free."
        )

    def _make_place(self, memory: CardEntry, needed: int, *, keep: str | None) -> None:
        for old in [model for model in memory.resident if model != keep]:
            if memory.bytes_free >= needed:
                return
            del memory.resident[old]

    async def unload(self, job_id: str = "", *, model: str | None = None) -> None:
        """Give back the memory of one model, or of all."""
        resident = self.card.resident(self.engine)
        if not resident or (model is not None and model not in resident):
            return
        with self.interval("unload", job_id, None):
            await self.sleep(self.card.options.unload_seconds / self.card.options.speed)
            with self.card.change(self.engine) as memory:
                if model is None:
                    memory.resident.clear()
                else:
                    memory.resident.pop(model, None)

    @contextlib.contextmanager
    def working(self, job_id: str, model: str | None, megapixels: float, images: int) -> Iterator[None]:
        """Hold the memory that computing needs."""
        needed = int(self.card.options.working_gib * GIB * megapixels * images)
        key = uuid4().hex
        with self.card.change(self.engine) as memory:
            self._make_place(memory, needed, keep=model)
            fits = memory.bytes_free >= needed
            if fits:
                memory.working[key] = needed
        if not fits:
            self.raise_oom(job_id, model, needed)
        try:
            yield
        finally:
            with self.card.change(self.engine) as memory:
                memory.working.pop(key, None)

    def close(self) -> None:
        """The engine went down in order."""
        self.card.forget(self.engine)
        self.card.log("engine_down", engine=self.engine, service=self.service)

    def lost(self) -> None:
        """The engine dies by a switch of the simulator, which therefore knows when: intervals stay open."""
        self.card.forget(self.engine)
        self.card.log("engine_lost", engine=self.engine, service=self.service)
