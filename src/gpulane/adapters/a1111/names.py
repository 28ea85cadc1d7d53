"""Looks up every name in a request and gathers what an engine must offer for it.

What A1111 would silently replace (checkpoint, sampler, scheduler, VAE) is refused when nobody knows it, with
the nearest names; what it ignores on purpose (LoRAs it does not have) is noted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import msgspec

from gpulane.adapters.a1111.catalogue import (
    Catalogue,
    Named,
    find,
    find_checkpoint,
    find_sampler,
    hinted,
)
from gpulane.adapters.a1111.errors import EngineRefusal, UnknownName
from gpulane.adapters.a1111.fields import Body, Reader
from gpulane.core.model import NO_MODEL, ModelKey

CHECKPOINT: Final = "sd_model_checkpoint"
LORAS_MAX: Final = 100
"""More in one prompt are not looked at."""
SHOWN_LENGTH_MAX: Final = 200

_SAME: Final = frozenset(
    {"", "use same sampler", "use same scheduler", "use same checkpoint", "none", "automatic"}
)
"""Values that stand for no choice."""
_LORA = re.compile(r"<(?:lora|lyco):([^:>]{1,300})(?::[^>]*)?>")
_MODEL_HASH = re.compile(r"\bModel hash: ([0-9a-fA-F]{8,64})\b")


def loras_in(*prompts: str | None) -> tuple[str, ...]:
    """Name the LoRAs that prompts ask for (`<lora:name:0.8>`)."""
    found = dict.fromkeys(m.group(1) for p in prompts if p for m in _LORA.finditer(p))
    return tuple(found)[:LORAS_MAX]


@dataclass(slots=True, kw_only=True)
class Names:
    """The names of one request."""

    catalogue: Catalogue
    endpoint: str
    checkpoint: str = ""
    leaves_other_model: bool = False
    unknown_loras: tuple[str, ...] = ()
    _needs: set[str] = field(default_factory=set[str])
    _model_parts: list[str] = field(default_factory=list[str])
    _shape: list[str] = field(default_factory=list[str])

    @property
    def needs(self) -> frozenset[str]:
        return frozenset(self._needs | {f"endpoint:{self.endpoint}"})

    @property
    def model_key(self) -> ModelKey:
        """The checkpoint and what is loaded with it; NO_MODEL leaves the engine's own."""
        return ModelKey("|".join([self.checkpoint, *self._model_parts])) if self.checkpoint else NO_MODEL

    def signature(self) -> str:
        """Name what makes jobs of one size take different times."""
        return "/".join([self.endpoint, *self._shape])

    def sampler(self, reader: Reader, changes: Body) -> None:
        """Look up sampler and scheduler; write the engine's spelling into `changes`."""
        # As the engine: the name counts, else the (historical) index, which is a name as well.
        wanted = reader.text("sampler_name") or reader.text("sampler_index")
        scheduler = self._scheduler(reader, "scheduler", changes)
        if not wanted:
            return
        choice = find_sampler(self.catalogue, wanted)
        if choice is None:
            if self.catalogue.samplers:
                raise _unknown("sampler", wanted, (s.name for s in self.catalogue.samplers))
            return
        self._needs.add(f"sampler:{choice.sampler}")
        self._shape.append(choice.sampler)
        changes["sampler_name"] = _raw(choice.sampler)
        if choice.scheduler is not None and choice.scheduler != scheduler:
            # The engine too lets the scheduler in the sampler's name win.
            self._needs.add(f"scheduler:{choice.scheduler}")
            changes["scheduler"] = _raw(choice.scheduler)

    def _scheduler(self, reader: Reader, name: str, changes: Body) -> str | None:
        wanted = reader.text(name)
        if not wanted or wanted.casefold() in _SAME or not self.catalogue.schedulers:
            return None
        found = find(self.catalogue.schedulers, wanted)
        if found is None:
            raise _unknown("scheduler", wanted, (s.name for s in self.catalogue.schedulers))
        self._needs.add(f"scheduler:{found.name}")
        changes[name] = _raw(found.name)
        return found.name

    def second_pass(self, reader: Reader, changes: Body) -> None:
        """Look up what the second pass and the refiner name."""
        self._second_checkpoint(reader, "refiner_checkpoint", changes)
        if self.endpoint != "txt2img" or not reader.flag("enable_hr"):
            return
        self._shape.append("hr")
        self._second_checkpoint(reader, "hr_checkpoint_name", changes)
        self._scheduler(reader, "hr_scheduler", changes)
        wanted = reader.text("hr_sampler_name")
        if wanted and wanted.casefold() not in _SAME and self.catalogue.samplers:
            choice = find_sampler(self.catalogue, wanted)
            if choice is None:
                raise _unknown("sampler", wanted, (s.name for s in self.catalogue.samplers))
            self._needs.add(f"sampler:{choice.sampler}")
            changes["hr_sampler_name"] = _raw(choice.sampler)
        self.upscaler(reader, "hr_upscaler", changes)

    def _second_checkpoint(self, reader: Reader, name: str, changes: Body) -> None:
        wanted = reader.text(name)
        if wanted and wanted.casefold() not in _SAME:
            self.leaves_other_model = True
            found = self._known_checkpoint(wanted)
            if found is not None:
                self._shape.append(name)
                changes[name] = _raw(found)

    def upscaler(self, reader: Reader, name: str, changes: Body) -> None:
        """Look up an upscaler; the engine finds one by its exact spelling only."""
        wanted = reader.text(name)
        if not wanted or wanted.casefold() == "none" or self.catalogue.upscalers is None:
            return
        known = (*self.catalogue.upscalers, *(self.catalogue.latent_modes or ()))
        found = find(known, wanted)
        if found is None:
            raise _unknown("upscaler", wanted, (u.name for u in known))
        self._needs.add(f"upscaler:{found.name}")
        self._shape.append(found.name)
        changes[name] = _raw(found.name)

    def scripts(self, reader: Reader) -> None:
        """Look up scripts, as the engine does without regard to case."""
        selected = reader.text("script_name")
        always = reader.object("alwayson_scripts") or {}
        for name in (*([selected] if selected else ()), *always):
            key = f"{self.endpoint}:{name.lower()}"
            if self.catalogue.scripts and find(self.catalogue.scripts, key) is None:
                raise EngineRefusal(f"Script '{name}' not found", status=422, code="unknown_script")
            self._needs.add(f"script:{key}")
            self._shape.append(name.lower())

    def loras(self, wanted: tuple[str, ...]) -> None:
        """Ask for the LoRAs that some engine has; the others are ignored by the engine, and noted."""
        unknown: list[str] = []
        for name in wanted:
            found = find(self.catalogue.loras or (), name)
            if found is None:
                unknown.append(name)
            else:
                self._needs.add(f"lora:{found.name}")
        self.unknown_loras = tuple(unknown) if self.catalogue.loras is not None else ()

    def settings(self, settings: Body) -> None:
        """Look up what override_settings choose, and write the engine's spelling into them."""
        wanted = _text(settings.pop(CHECKPOINT, None))
        if wanted and wanted.casefold() != "none":
            # Written even when the catalogue is not known: the engine then decides, and the answer is
            # checked.
            self.checkpoint = self._known_checkpoint(wanted) or wanted
            settings[CHECKPOINT] = _raw(self.checkpoint)
        # An engine fails on an option that it does not have; one that nobody has is left for it to tell.
        known = self.catalogue.options or frozenset()
        self._needs |= {f"option:{key}" for key in settings if key in known and key != CHECKPOINT}
        vae = _text(settings.get("sd_vae"))
        if vae and vae.casefold() not in _SAME:
            settings["sd_vae"] = _raw(self._part("vae", vae, self.catalogue.vaes))
        if "forge_additional_modules" in settings:
            # Paths differ between machines; the engine compares file names.
            modules = [
                m.replace("\\", "/").rsplit("/", 1)[-1] for m in _texts(settings["forge_additional_modules"])
            ]
            settings["forge_additional_modules"] = _raw(
                [self._part("module", module, self.catalogue.modules) for module in modules]
            )

    def checkpoint_of_infotext(self, infotext: str, settings: Body) -> None:
        """Take the checkpoint from an infotext's hash, as the engine would."""
        hashed = _MODEL_HASH.search(infotext)
        found = find_checkpoint(self.catalogue.checkpoints or (), hashed.group(1)) if hashed else None
        if found is not None:
            settings[CHECKPOINT] = _raw(found.name)

    def _part(self, kind: str, wanted: str, known: tuple[Named, ...] | None) -> str:
        """Look up what is loaded beside the checkpoint."""
        found = find(known, wanted) if known is not None else None
        if known and found is None:
            raise _unknown(kind, wanted, (item.name for item in known))
        name = found.name if found is not None else wanted
        if found is not None:
            self._needs.add(f"{kind}:{name}")
        self._model_parts.append(f"{kind}={name}")
        return name

    def _known_checkpoint(self, wanted: str) -> str | None:
        known = self.catalogue.checkpoints
        if known is None:
            return None
        found = find_checkpoint(known, wanted)
        if found is None:
            raise _unknown("checkpoint", wanted, (c.title for c in known))
        self._needs.add(f"checkpoint:{found.name}")
        return found.name


def _unknown(kind: str, wanted: str, names: Iterable[str]) -> UnknownName:
    shown = wanted if len(wanted) <= SHOWN_LENGTH_MAX else wanted[:SHOWN_LENGTH_MAX] + "..."
    hint = hinted(names, wanted)
    return UnknownName(f"no engine has the {kind} {shown!r}", hint=hint, code=f"unknown_{kind}")


def _text(raw: msgspec.Raw | None) -> str | None:
    try:
        return None if raw is None else msgspec.json.decode(raw, type=str | None)
    except (msgspec.DecodeError, RecursionError):
        return None


def _texts(raw: msgspec.Raw) -> list[str]:
    try:
        return msgspec.json.decode(raw, type=list[str] | None) or []
    except (msgspec.DecodeError, RecursionError):
        return []


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))
