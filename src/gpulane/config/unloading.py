"""What the setting `unload` of an http engine says: how its VRAM is given back. Pure; carries nothing out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import msgspec

from gpulane.config.commands import command_words
from gpulane.errors import ConfigError

_REQUEST: Final = re.compile(
    r"(?P<method>GET|POST|PUT|PATCH|DELETE) (?P<target>/[\x21-\x7e]*)(?: +(?P<body>.+))?"
)
_FORMS: Final = "write ollama, llama-swap, a request `METHOD /path [JSON body]`, or `run COMMAND`"


class KnownUnload(StrEnum):
    """Servers whose way of unloading is known."""

    OLLAMA = "ollama"
    LLAMA_SWAP = "llama-swap"


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadRequest:
    """One request to the engine; a 2xx acknowledges it."""

    method: str
    target: str
    body: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnloadCommand:
    """A program to run, without a shell; status 0 acknowledges it."""

    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()
    """Added to the environment."""
    folder: str | None = None


Unload = KnownUnload | UnloadRequest | UnloadCommand


def parse_unload(text: str, *, env: Mapping[str, str] | None = None, folder: str | None = None) -> Unload:
    """Read the setting; `env` and `folder` are those of the same engine. Raises ConfigError."""
    words = text.strip()
    if words in set(KnownUnload):
        return KnownUnload(words)
    if words == "run" or words.startswith("run "):
        argv = command_words(words.removeprefix("run"), setting="unload: run")
        return UnloadCommand(argv=argv, env=tuple((env or {}).items()), folder=folder)
    found = _REQUEST.fullmatch(words)
    if found is None:
        raise ConfigError(f"unload: {text!r} is not understood: {_FORMS}")
    return UnloadRequest(method=found["method"], target=found["target"], body=_body(found["body"]))


def _body(text: str | None) -> bytes | None:
    if text is None:
        return None
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"unload: {text!r} is no JSON body: {error}") from error
    return text.encode()
