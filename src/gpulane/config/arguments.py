"""The command line's short form of gpus.

    GPU    = ENGINE[+ENGINE ...]            engines joined by + share one card; each argument is one gpu
    ENGINE = [comfyui:|a1111:|http:] (PORT | HOST:PORT | URL)

`7860+8188` is one card with two engines on this machine; `comfyui:gpu7:8188` one ComfyUI on the host gpu7. An
`http:` that is followed by `//` begins a URL, else it names the service.
"""

from __future__ import annotations

from typing import Final, cast, get_args

from gpulane.config.settings import EngineSettings, GpuSettings, ServiceName
from gpulane.errors import ConfigError

PORT_MAX: Final = 65_535
_SERVICES: Final = cast("tuple[ServiceName, ...]", get_args(ServiceName))


def gpus_from_arguments(arguments: tuple[str, ...]) -> dict[str, GpuSettings]:
    """Read the GPU arguments; the cards are named gpu0, gpu1 ... in their order. Raises ConfigError."""
    return {f"gpu{number}": _gpu(argument) for number, argument in enumerate(arguments)}


def engine_from_text(text: str) -> EngineSettings:
    """Read one ENGINE. Raises ConfigError."""
    service: ServiceName | None = None
    rest = text.strip()
    for name in _SERVICES:
        if rest.startswith(f"{name}:") and not rest.startswith(f"{name}://"):
            service, rest = name, rest.removeprefix(f"{name}:")
            break
    return EngineSettings(url=engine_url(rest, text), service=service)


def engine_url(text: str, shown: str | None = None) -> str:
    """Turn PORT, HOST:PORT or URL into a base URL without a trailing slash. Raises ConfigError."""
    shown = without_password(shown or text)
    if "@" in text:
        raise ConfigError(
            f"{shown!r} is no engine: a URL with a user and a password is not taken, since URLs are shown in "
            "many places; let the engine listen on loopback without a login, or behind a proxy that adds it"
        )
    if text.startswith(("http://", "https://")):
        url = text.rstrip("/")
        authority = text.split("//", 1)[1].split("/", 1)[0]
        host, _, port = (
            authority.rpartition(":") if ":" in authority.rpartition("]")[2] else (authority, "", "")
        )
        if not host or "?" in url or "#" in url:
            raise ConfigError(f"{shown!r} is no engine: a URL needs a host, and no query or fragment")
        if port:
            _port(port, shown)
        return url
    host, _, port = text.rpartition(":")
    _port(port, shown)
    return f"http://{host or '127.0.0.1'}:{port}"


def without_password(text: str) -> str:
    """Return an address as it may be shown."""
    _, at, rest = text.rpartition("@")  # a password may hold anything
    return f"***@{rest}" if at else text


def _gpu(argument: str) -> GpuSettings:
    parts = argument.split("+")
    if not all(part.strip() for part in parts):
        raise ConfigError(f"{argument!r} is no GPU: write ENGINE or ENGINE+ENGINE, for instance 7860+8188")
    return GpuSettings(engines=tuple(engine_from_text(part) for part in parts))


def _port(text: str, shown: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= PORT_MAX:
        raise ConfigError(
            f"{shown!r} is no engine: write PORT, HOST:PORT or a URL such as http://127.0.0.1:8188"
        )
    return int(text)
