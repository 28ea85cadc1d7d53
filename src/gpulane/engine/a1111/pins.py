"""Has the engine save the options that jobs override, with the values they have, before the first such job.

A1111 gives an option back after a job only when it is in its saved settings (modules/processing.py,
process_images: `if k in opts.data`); one that nobody ever saved would stay as the job set it, for everybody.
Never changes a value. Only for an engine that is idle and ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec
import structlog

from gpulane.engine.control import ControlCalls
from gpulane.errors import EngineError

_OPTIONS: Final = "/sdapi/v1/options"
_ALWAYS_SAVED: Final = frozenset({"sd_model_checkpoint"})
"""Saved when a model is loaded; to post it would load one."""
_log = structlog.stdlib.get_logger(__name__)


class Pins:
    """What one engine is known to have saved."""

    def __init__(self, calls: ControlCalls) -> None:
        self._calls = calls
        self._saved: set[str] = set()

    async def pin(self, names: Iterable[str]) -> None:
        """Save what is not known to be saved. When that fails the job is sent all the same."""
        wanted = set(names) - self._saved - _ALWAYS_SAVED
        if not wanted:
            return
        try:
            current = await self._calls.ask(dict[str, msgspec.Raw], _OPTIONS)
            # A null is no value to keep: it would be saved as such.
            told = {
                name: current[name]
                for name in sorted(wanted & current.keys())
                if bytes(current[name]) != b"null"
            }
            if told:
                status, _ = await self._calls.fetch("POST", _OPTIONS, msgspec.json.encode(told))
                if status != 200:
                    _log.warning(
                        "options_not_saved", engine=self._calls.url, status=status, names=sorted(told)
                    )
                    return
        except EngineError as error:
            _log.warning("options_not_saved", engine=self._calls.url, why=str(error), names=sorted(wanted))
            return
        self._saved |= wanted
