"""What `check` finds, in words: from what was asked and answered to a line and how to mend it. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final
from urllib.parse import urlsplit

import msgspec

from gpulane.config import EngineSettings, Settings
from gpulane.config.parse import is_loopback
from gpulane.core.model import Service
from gpulane.engine.base import Description
from gpulane.engine.detect import Detected
from gpulane.engine.telemetry import CardReading
from gpulane.errors import EngineError

_NAMES: Final = {
    Service.COMFYUI: "ComfyUI",
    Service.A1111: "A1111",
    Service.HTTP: "an HTTP service",
    Service.LOCK: "a lock",
}
_GIB: Final = 1024**3
_PORTS: Final = {"http": 80, "https": 443}


class Grade(StrEnum):
    """How it stands with something."""

    OK = "ok"
    NOTE = "note"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report."""

    grade: Grade
    subject: str
    text: str
    hints: tuple[str, ...] = ()
    is_engine: bool = False
    """Whether an engine is meant; else the settings are."""

    def as_document(self) -> dict[str, object]:
        """Return it for --json."""
        return {
            "grade": self.grade.value,
            "subject": self.subject,
            "text": self.text,
            "hint": " ".join(self.hints) or None,
            "is_engine": self.is_engine,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """An engine of the settings, and what it answered."""

    gpu: str
    engine: EngineSettings
    found: Detected
    about: Description | EngineError | None
    """None: it was not asked, since nothing answers there."""
    latency_ms: float


def engine_finding(asked: Asked) -> Finding:
    """Judge one engine.

    1. Nothing answers: it is down, or the address is wrong.
    2. Something answers that is none of the services we know: fine for `http`, else wrong.
    3. It is another service than the settings say.
    4. It is the right one but does not tell what it offers: how it must be started.
    5. All is well.
    """
    found, wanted = asked.found, asked.engine.service
    if not found.answers:
        # The probe's word names the address again.
        why = "connection refused" if found.why.startswith("connection refused") else found.why
        return _wrong(asked, f"does not answer: {why}", *_how_to_start(asked.engine))
    if found.service is None and wanted != "http":
        why = "lets nobody in (401 or 403)" if "login" in found.why else f"is no engine: {found.why}"
        return _wrong(asked, why, *_stranger(asked.engine, found))
    if found.service is not None and wanted is not None and found.service.value != wanted:
        kind = found.service
        hint = f"write {kind.value}:{asked.engine.url}, or nothing: the kind is found by asking"
        return _wrong(asked, f"is {_NAMES[kind]}, but the settings say {wanted}", hint)
    if not isinstance(asked.about, Description):
        why = asked.about.message.replace(asked.engine.url, "it", 1) if asked.about else "it was not asked"
        return _wrong(asked, f"is {_kind(asked)}, but cannot be used: {why}", *_how_to_mend(asked))
    return Finding(
        grade=Grade.OK, subject=_subject(asked), text=summary(asked.about, asked.latency_ms), is_engine=True
    )


def summary(about: Description, latency_ms: float) -> str:
    """Tell in one line what an engine is and offers."""
    counts: list[str] = []
    match about.service:
        case Service.COMFYUI:
            counts = [
                f"{_size(about.documents.get('object_info'))} node classes",
                f"{_size(about.documents.get('models/checkpoints'))} checkpoints",
            ]
        case Service.A1111:
            counts = [f"{_size(about.documents.get('sd-models'))} checkpoints"]
            if "samplers" in about.documents:
                counts.append(f"{_size(about.documents['samplers'])} samplers")
        case Service.HTTP:
            if about.offers:
                counts = [f"{len(about.offers)} models"]
        case Service.LOCK:
            pass
    name = f"{about.flavor or about.service.value} {about.version}".strip()
    return ", ".join([name, *counts, f"answers in {latency_ms:.0f} ms"])


def settings_findings(settings: Settings, *, source: str) -> list[Finding]:
    """Judge what can be seen in the settings alone."""
    engines = [(name, e) for name, gpu in settings.gpus.items() for e in _engines(gpu.engines)]
    gpus, of = len(settings.gpus), len(engines)
    text = f"{source}: {gpus} GPU{'s' * (gpus != 1)}, {of} engine{'s' * (of != 1)}"
    found = [Finding(grade=Grade.OK, subject="settings", text=text)]
    found += _same_places(engines)
    found.append(_keys(settings))
    return found


def card_findings(settings: Settings, cards: Sequence[CardReading]) -> list[Finding]:
    """List the cards that the driver knows, and compare them with the UUIDs of the settings.

    Which entry stands for which card is never guessed: a person knows where an engine computes.
    """
    named = {gpu.uuid: name for name, gpu in settings.gpus.items() if gpu.uuid}
    has_unnamed = len(named) < len(settings.gpus)
    found: list[Finding] = []
    for card in cards:
        owner = named.get(card.uuid)
        hint = f"if it is a card of the settings, write uuid: {card.uuid} there: the driver then measures it"
        found.append(
            Finding(
                grade=Grade.OK,
                subject="card" if owner is None else f"card of {owner}",
                text=_card(card),
                hints=(hint,) if owner is None and has_unnamed else (),
            )
        )
    here = {card.uuid for card in cards}
    why = (
        "no card here has it"
        if cards
        else "no driver answers here (it is asked with the extra gpulane[nvml])"
    )
    hints = (
        "until then its memory is as its engines tell it; the driver's UUIDs are those of `nvidia-smi -L`",
        "(in a container, those of the cards that it was given)",
    )
    return found + [
        Finding(grade=Grade.NOTE, subject=f"card of {name}", text=f"uuid {uuid}: {why}", hints=hints)
        for uuid, name in named.items()
        if uuid not in here
    ]


def _card(card: CardReading) -> str:
    memory = "memory unknown"
    if card.bytes_total is not None and card.bytes_free is not None:
        memory = f"{card.bytes_total / _GIB:.1f} GiB, {card.bytes_free / _GIB:.1f} GiB free"
    return f"{card.uuid} {card.name}, {memory}"


def _keys(settings: Settings) -> Finding:
    if not settings.keys:
        who = "everybody who can reach the listener" if settings.allow_anonymous else "this machine alone"
        return Finding(
            grade=Grade.NOTE if settings.allow_anonymous else Grade.OK,
            subject="keys",
            text=f"none: {who} may use it, each address as an account",
            hints=("`gpulane key new --account NAME` makes one",) if settings.allow_anonymous else (),
        )
    hashes = [key.sha256 for key in settings.keys]
    if len(set(hashes)) < len(hashes):
        twice = next(key.account for key in settings.keys if hashes.count(key.sha256) > 1)
        return Finding(
            grade=Grade.WRONG,
            subject="keys",
            text=f"one key is listed twice, first for account {twice!r}: only one of the two would count",
            hints=("make another with `gpulane key new`",),
        )
    accounts = len({key.account for key in settings.keys})
    text = f"{len(hashes)} key{'s' * (len(hashes) != 1)} of {accounts} account{'s' * (accounts != 1)}"
    if not any(key.role in {"operator", "admin"} for key in settings.keys):
        hints = ("give one key the role operator, or nobody can drain a GPU or pause the queue",)
        return Finding(grade=Grade.NOTE, subject="keys", text=text, hints=hints)
    return Finding(grade=Grade.OK, subject="keys", text=text)


def _same_places(engines: Sequence[tuple[str, EngineSettings]]) -> list[Finding]:
    """Find one engine under two names, as localhost and 127.0.0.1 are."""
    places: defaultdict[tuple[str, int, str], list[tuple[str, str]]] = defaultdict(list)
    for gpu, engine in engines:
        parts = urlsplit(engine.url)
        host = "loopback" if is_loopback(parts.hostname or "") else parts.hostname or ""
        place = (host, parts.port or _PORTS.get(parts.scheme, 0), parts.path)
        places[place].append((gpu, engine.url))
    return [
        Finding(
            grade=Grade.WRONG,
            subject="settings",
            text=f"{' and '.join(url for _, url in same)} are one engine",
            hints=("an engine belongs to one GPU, once: two would each send it a job at one time",),
        )
        for same in places.values()
        if len(same) > 1
    ]


def _wrong(asked: Asked, text: str, *hints: str) -> Finding:
    return Finding(grade=Grade.WRONG, subject=_subject(asked), text=text, hints=hints, is_engine=True)


def _subject(asked: Asked) -> str:
    return f"{asked.gpu} {asked.engine.url}"


def _kind(asked: Asked) -> str:
    service = asked.found.service or Service.HTTP
    return asked.found.flavor if asked.found.flavor in {"forge", "sdnext"} else _NAMES[service]


def _how_to_start(engine: EngineSettings) -> tuple[str, ...]:
    host = urlsplit(engine.url).hostname or ""
    if is_loopback(host):
        return ("start it, or mend its port in the settings",)
    return (
        f"start it on {host}; it must listen beyond its own machine (ComfyUI and A1111: --listen), and no",
        "firewall may be between: try from here with curl",
    )


def _stranger(engine: EngineSettings, found: Detected) -> tuple[str, ...]:
    if "login" in found.why:
        return (
            "an A1111 with --api-auth or a proxy with a password answers so; a ComfyUI answers 403 behind a",
            "proxy that sends it a foreign Origin or Host: name the engine's own address, without either",
        )
    return (
        "a ComfyUI or A1111 that is still starting may answer so: try again",
        f"if its jobs are HTTP requests, as an LLM server's are: write http:{engine.url}",
    )


def _how_to_mend(asked: Asked) -> tuple[str, ...]:
    match asked.found.service:
        case Service.A1111:
            return ("start it with --api: in webui-user.sh, COMMANDLINE_ARGS must hold it",)
        case Service.COMFYUI:
            return ("its /object_info must answer: look at its console for a custom node that fails",)
        case Service.HTTP | Service.LOCK | None:
            return ("look at its own log",)


def _size(document: bytes | None) -> int:
    """Count the entries of a JSON list or object."""
    if document is None:
        return 0
    try:
        return len(msgspec.json.decode(document, type=list[msgspec.Raw] | dict[str, msgspec.Raw]))
    except msgspec.MsgspecError:
        return 0


def _engines(engines: Sequence[str | int | EngineSettings]) -> list[EngineSettings]:
    return [engine for engine in engines if isinstance(engine, EngineSettings)]
