"""Checks the commands of an engine: started by gpulane, or restarted by a command of its own, never both.

Whether folders and programs exist is seen where they are used: this reads no disk.
"""

from __future__ import annotations

import re
import shlex
from typing import Final

from gpulane.config.settings import EngineSettings
from gpulane.errors import ConfigError

_VARIABLE: Final = re.compile(r"[^=\0]+\Z")


def check_commands(engine: EngineSettings) -> None:
    """Raise ConfigError where the settings of one engine's process cannot be meant."""
    if engine.command is not None and engine.restart is not None:
        raise ConfigError(
            f"{engine.url}: command and restart are both given: with command gpulane starts and restarts the "
            "engine itself; restart is for engines that somebody else starts"
        )
    for setting, text in (("command", engine.command), ("restart", engine.restart)):
        if text is not None:
            command_words(text, setting=f"{engine.url}: {setting}")
    if engine.command is None:
        _needs_command(engine)
        return
    if engine.service is None:
        raise ConfigError(
            f"{engine.url}: command needs service: what an engine is cannot be asked before it is started; "
            "write service: comfyui, a1111 or http"
        )
    if not engine.ready_seconds > 0:
        raise ConfigError(f"{engine.url}: ready_seconds must be above 0")
    for name, value in engine.env.items():
        if not _VARIABLE.match(name) or "\0" in value:
            raise ConfigError(
                f"{engine.url}: env: {name!r} is no name of a variable, or its value holds a NUL"
            )


def command_words(text: str, *, setting: str = "command") -> tuple[str, ...]:
    """Split a command as a shell would; nothing is expanded. Raises ConfigError."""
    try:
        words = tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigError(f"{setting} cannot be understood: {str(error).lower()}") from error
    if not words or not words[0] or "\0" in text:
        raise ConfigError(f"{setting} is empty: write a program and its arguments, or leave the setting out")
    return words


def _needs_command(engine: EngineSettings) -> None:
    """What says how gpulane starts an engine says nothing where it does not."""
    if engine.stop_to_unload:
        raise ConfigError(
            f"{engine.url}: stop_to_unload needs command: gpulane stops only engines that it can start again"
        )
    runs_something = engine.restart is not None or (engine.unload or "").startswith("run ")
    if not runs_something and (engine.env or engine.folder is not None):
        given = "env" if engine.env else "folder"
        raise ConfigError(f"{engine.url}: {given} is for a command, and none is given")
