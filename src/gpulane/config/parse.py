"""Turns YAML text into Settings and checks what types cannot say. Every refusal is one line: what, where,
and what to write.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
import typing
from typing import Final

import msgspec
import yaml

from gpulane.config.arguments import engine_from_text, engine_url, without_password
from gpulane.config.commands import check_commands
from gpulane.config.settings import EngineSettings, GpuSettings, Settings
from gpulane.config.unloading import parse_unload
from gpulane.errors import ConfigError

PORT_MAX: Final = 65_535
_UNKNOWN_FIELD = re.compile(r"unknown field `(?P<field>[^`]*)`(?: - at `\$(?P<path>[^`]*)`)?")
_PATH = re.compile(r"/[\x21-\x7e]*\Z")
_GPU_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}\Z")
_MAYBE_PORTS: Final = frozenset({"url", "warm_together"})
"""Settings below `gpus` that name engines, so that a bare port may stand there."""
_DEPTH_MAX: Final = 6
"""How deep such a port lies: gpus, name, engines, item, url."""
_LOOPBACK_NAMES: Final = frozenset({"localhost", "ip6-localhost", "ip6-loopback"})


def parse_settings(text: str, *, source: str = "settings", allow_anonymous: bool = False) -> Settings:
    """Read YAML. Raises ConfigError naming `source` and the place. `allow_anonymous` stands above the
    text.
    """
    try:
        loaded: object = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{source}:{place} is not YAML: {error.problem or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not YAML: {error}") from error
    if loaded is None:
        loaded = {}
    try:
        settings = msgspec.convert(_with_ports_as_text(loaded), Settings)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {_explained(str(error))}") from error
    if allow_anonymous:
        settings = msgspec.structs.replace(settings, allow_anonymous=True)
    return check_settings(settings, source=source)


def _with_ports_as_text(value: object, key: str = "", depth: int = 0) -> object:
    """Write a port as text where an engine is named: YAML reads 8188 as a number."""
    same = value
    if isinstance(value, dict) and depth < _DEPTH_MAX:
        inner = typing.cast("dict[object, object]", value)
        wanted = {"gpus"} if depth == 0 else inner.keys()
        return {k: _with_ports_as_text(v, str(k), depth + 1) if k in wanted else v for k, v in inner.items()}
    if isinstance(value, list) and depth < _DEPTH_MAX:
        return [_with_ports_as_text(v, key, depth + 1) for v in typing.cast("list[object]", value)]
    if key in _MAYBE_PORTS and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return same


def check_settings(settings: Settings, *, source: str = "settings") -> Settings:
    """Normalize engines to EngineSettings and check across sections. Raises ConfigError."""
    gpus = {name: _gpu(name, gpu, source) for name, gpu in settings.gpus.items()}
    _engines_are_unique(gpus, source)
    for key in settings.keys:
        if not re.fullmatch(r"[0-9a-f]{64}", key.sha256):
            raise ConfigError(
                f"{source}: keys: sha256 of account {key.account!r} must be 64 hex digits, lowercase"
            )
        if not key.account or not key.weight > 0:
            raise ConfigError(f"{source}: keys: every key needs an account and a weight above 0")
    for setting, address in (
        ("listen", settings.listen),
        ("listen_comfyui", settings.listen_comfyui),
        ("listen_a1111", settings.listen_a1111),
        *(
            (f"gpus.{name}: listen", e.listen)
            for name, g in gpus.items()
            for e in g.engines
            if isinstance(e, EngineSettings)
        ),
    ):
        if address is not None:
            _listen_is_safe(setting, address, settings, source)
    for proxy in settings.trusted_proxies:
        try:
            ipaddress.ip_network(proxy, strict=False)
        except ValueError as error:
            raise ConfigError(f"{source}: trusted_proxies: {proxy!r} is no address or network") from error
    if not (settings.store in {"sqlite", "memory"} or settings.store.startswith(("redis://", "rediss://"))):
        shown = without_password(settings.store)
        raise ConfigError(f"{source}: store: write sqlite, memory or redis://HOST:PORT/DB, not {shown!r}")
    return msgspec.structs.replace(settings, gpus=gpus)


def listen_address(text: str, *, setting: str = "listen") -> tuple[str, int]:
    """Split HOST:PORT, [IPv6]:PORT or PORT; port 0 lets the system choose. Raises ConfigError."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not port.isascii() or not port.isdigit() or int(port) > PORT_MAX:
        raise ConfigError(f"{setting}: {text!r} is no address: write HOST:PORT, for instance 127.0.0.1:8800")
    return host or "127.0.0.1", int(port)


def is_loopback(host: str) -> bool:
    """Tell whether a listen host is reachable from this machine alone."""
    if host in _LOOPBACK_NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _gpu(name: str, gpu: GpuSettings, source: str) -> GpuSettings:
    if not _GPU_NAME.match(name):
        raise ConfigError(
            f"{source}: gpus: {name!r} is no name for a GPU: use letters, digits, '.', '_' and '-'"
        )
    if not gpu.engines:
        raise ConfigError(f"{source}: gpus.{name}: needs at least one engine, for instance engines: [8188]")
    if gpu.vram_gib is not None and not gpu.vram_gib > 0:
        raise ConfigError(f"{source}: gpus.{name}: vram_gib must be above 0")
    if not gpu.speed > 0:
        raise ConfigError(f"{source}: gpus.{name}: speed must be above 0")
    try:
        engines = tuple(_engine(name, engine) for engine in gpu.engines)
    except ConfigError as error:
        raise ConfigError(f"{source}: gpus.{name}: {error.message}") from error
    return msgspec.structs.replace(gpu, engines=engines)


def _engine(gpu: str, engine: str | int | EngineSettings) -> EngineSettings:
    if isinstance(engine, EngineSettings):
        if not _PATH.match(engine.probe_path):
            raise ConfigError(f"probe_path: write a path such as /health, not {engine.probe_path!r}")
        engine = msgspec.structs.replace(engine, url=engine_url(engine.url))
        _one_gpu(gpu, engine)
        _check_unload(engine)
        check_commands(engine)
        return engine
    return engine_from_text(str(engine))


def _check_unload(engine: EngineSettings) -> None:
    if engine.unload is None:
        return
    if engine.service in {"comfyui", "a1111"}:
        raise ConfigError(
            f"{engine.url}: unload is for http engines: how {engine.service} gives VRAM back is known"
        )
    try:
        parse_unload(engine.unload)
    except ConfigError as error:
        raise ConfigError(f"{engine.url}: {error.message}") from error


def _one_gpu(gpu: str, engine: EngineSettings) -> None:
    """Refuse a set of gpus: an engine on it would have to occupy all of them at one time."""
    others = [name for name in engine.gpus if name != gpu]
    if others:
        raise ConfigError(
            f"gpus: {engine.url} names {', '.join(engine.gpus)}: dispatching for more than one card comes "
            "later; until then leave `gpus` out, and keep other engines off the cards that it uses"
        )


def _engines_are_unique(gpus: dict[str, GpuSettings], source: str) -> None:
    owner: dict[str, str] = {}
    for name, gpu in gpus.items():
        for engine in gpu.engines:
            assert isinstance(engine, EngineSettings), "normalized above"
            if engine.url in owner:
                other = owner[engine.url]
                where = f"twice on GPU {name}" if other == name else f"on the GPUs {other} and {name}"
                raise ConfigError(
                    f"{source}: gpus: {engine.url} is named {where}: an engine belongs to one GPU, once"
                )
            owner[engine.url] = name


def _listen_is_safe(setting: str, address: str, settings: Settings, source: str) -> None:
    host, _ = listen_address(address, setting=f"{source}: {setting}")
    if not is_loopback(host) and not settings.keys and not settings.allow_anonymous:
        raise ConfigError(
            f"{source}: {setting}: {address} can be reached from other machines, and there are no keys: "
            "add keys (`gpulane key new`), or listen on 127.0.0.1, "
            "or say --allow-anonymous to serve everybody"
        )


def _explained(message: str) -> str:
    """Add the nearest known setting to msgspec's word about an unknown one."""
    found = _UNKNOWN_FIELD.search(message)
    if not found:
        return message.replace("`$", "`")
    field, path = found["field"], (found["path"] or "").lstrip(".")
    known = _fields_at(path)
    near = difflib.get_close_matches(field, known, n=1)
    where = f" in {path}" if path else ""
    return f"unknown setting {field!r}{where}" + (
        f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
    )


def _fields_at(path: str) -> list[str]:
    section: object = Settings
    for step in [part for part in re.split(r"[.\[]", path) if part]:
        hints = typing.get_type_hints(section) if isinstance(section, type) else {}
        name = step.rstrip("]")
        section = _section_in(hints[name]) if name in hints else section
    return sorted(typing.get_type_hints(section)) if isinstance(section, type) else []


def _section_in(hint: object) -> object:
    """Find the settings section inside tuple[...], dict[...] or a union."""
    inside: tuple[object, ...] = typing.get_args(hint)
    for inner in inside:
        found = _section_in(inner)
        if isinstance(found, type) and issubclass(found, msgspec.Struct):
            return found
    return hint
