"""How servers behind an `http` engine are told to give VRAM back, and how they are told apart. Pure."""

from __future__ import annotations

from typing import Final

import msgspec

from gpulane.config.unloading import KnownUnload, UnloadRequest

RUNNING: Final = "/running"
"""llama-swap: what it runs now."""
VERSION: Final = "/api/version"
LOADED: Final = "/api/ps"
"""Ollama: what lies in memory."""
LLAMA_SWAP: Final = UnloadRequest(method="POST", target="/api/models/unload")
LLAMA_SWAP_BEFORE: Final = UnloadRequest(method="GET", target="/unload")
"""The only way of llama-swap before it had the other."""
MODELS_MAX: Final = 100


class _Version(msgspec.Struct):
    version: str
    commit: str | None = None


class _Running(msgspec.Struct):
    running: list[msgspec.Raw]


class _Loaded(msgspec.Struct):
    model: str = ""
    name: str = ""


class _Loadeds(msgspec.Struct):
    models: list[_Loaded] | None = None


def is_llama_swap(running: bytes) -> bool:
    """Judge the answer to GET /running."""
    try:
        msgspec.json.decode(running, type=_Running)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


def is_ollama(version: bytes) -> bool:
    """Judge the answer to GET /api/version: llama-swap has the same path, and tells its commit there."""
    try:
        return msgspec.json.decode(version, type=_Version).commit is None
    except (msgspec.DecodeError, RecursionError):
        return False


def loaded_models(answer: bytes) -> tuple[str, ...]:
    """Read GET /api/ps. Raises msgspec.DecodeError for what is no Ollama's answer."""
    found = msgspec.json.decode(answer, type=_Loadeds).models or []
    return tuple(entry.model or entry.name for entry in found[:MODELS_MAX] if entry.model or entry.name)


def ollama_unload(model: str) -> UnloadRequest:
    """Say that this model is not to be kept: a request without a prompt computes nothing."""
    body = msgspec.json.encode({"model": model, "keep_alive": 0})
    return UnloadRequest(method="POST", target="/api/generate", body=body)


def detected(running: bytes | None, version: bytes | None) -> KnownUnload | None:
    """Tell from both answers (None: not a 200) what listens there."""
    if running is not None and is_llama_swap(running):
        return KnownUnload.LLAMA_SWAP
    return KnownUnload.OLLAMA if version is not None and is_ollama(version) else None
