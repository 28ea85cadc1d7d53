"""Takes the checkpoint of an A1111 off the card, and puts it back before the next job.

Both calls take no lock in the engine (modules/api/api.py): sent while anything runs they move the model under
the sampler. The caller has looked that nothing does. And an engine with nothing loaded answers an unload by
loading its model first, so it is only sent where something is known to be there.
"""

from __future__ import annotations

from typing import Final

from gpulane.adapters.a1111.status import MEMORY, RELOAD, UNLOAD, Flavor, Memory
from gpulane.engine.base import CANNOT_UNLOAD, Vram
from gpulane.engine.control import ControlCalls, StatusError, named
from gpulane.errors import EngineError

HELD_BYTES_MIN: Final = 256 * 1024 * 1024
"""An engine that holds less in tensors has no checkpoint on the card; preview decoders hold some 10 MB."""
RELOAD_SECONDS_MAX: Final = 120.0
"""A copy from RAM takes seconds; one that was swapped out meanwhile comes from the disk again."""


class Unloading:
    """What is known of one engine's checkpoint."""

    def __init__(self, calls: ControlCalls, *, acknowledge_seconds: float) -> None:
        self._calls = calls
        self._seconds = acknowledge_seconds
        self._flavor = Flavor.A1111
        self._has_answered = False
        """A job's answer has named a checkpoint: this engine has one."""
        self._is_off_card: bool | None = None
        """None: not known, as at our start: it may be as an earlier life of ours left it."""

    def described(self, flavor: Flavor) -> None:
        """Learn which relative it is."""
        self._flavor = flavor

    def proved(self) -> None:
        """Learn that a job has just computed with a checkpoint."""
        self._has_answered, self._is_off_card = True, False

    def doubted(self) -> None:
        """A job failed: the engine may have restarted, or somebody took its checkpoint off the card."""
        if self._is_off_card is False:
            self._is_off_card = None

    async def unload(self) -> None:
        """Have it taken off the card.

        1. Forge gives back what there is, and loads nothing for it.
        2. The engine tells that it holds next to nothing: nothing to do.
        3. It tells nothing, and no job has proved a checkpoint: an unload might load one.
        4. Else it is sent.
        """
        if self._flavor is not Flavor.FORGE:
            held = await self._held()
            if held is None and not self._has_answered:
                return
            if held is not None and held < HELD_BYTES_MIN:
                return
        # Before it is sent: one that is not acknowledged may have been carried out.
        self._is_off_card = True
        await self._post(UNLOAD, self._seconds)

    async def make_loadable(self) -> None:
        """Have it put back, where an unload of ours took it off; generating would fail on two devices."""
        if self._flavor is Flavor.FORGE or not await self._needs_reload():
            return
        await self._post(RELOAD, RELOAD_SECONDS_MAX)
        self._is_off_card = False

    async def needs_reload(self) -> bool:
        """Tell whether `make_loadable` would send anything."""
        return self._flavor is not Flavor.FORGE and await self._needs_reload()

    async def vram(self) -> Vram:
        """Measure the card. Unknown where the engine computes on something else."""
        card = (await self._calls.ask(Memory, MEMORY)).card()
        return Vram() if card is None else Vram(bytes_free=card[0], bytes_total=card[1])

    async def _needs_reload(self) -> bool:
        if self._is_off_card is None:
            held = await self._held()
            self._is_off_card = held is not None and held < HELD_BYTES_MIN
        return self._is_off_card

    async def _held(self) -> int | None:
        try:
            return (await self._calls.ask(Memory, MEMORY)).held()
        except StatusError:
            return None

    async def _post(self, target: str, seconds: float) -> None:
        status, _ = await self._calls.fetch("POST", target, b"{}", seconds=seconds, fresh=True)
        if status in {404, 405}:
            message = f"{self._calls.url} cannot be told to unload: it has no {target}"
            raise named(EngineError(message, sent=False), CANNOT_UNLOAD)
        if not 200 <= status < 300:
            raise StatusError(f"{self._calls.url} answered {status} to {target}", status=status)
