"""Shows the gateway's gpus, engines, queue and the place of each job, from the book and the watches. Changes nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

from gpulane.core.book import Book
from gpulane.core.model import EngineState, GpuId, JobId, Service
from gpulane.dispatcher.gpu import GpuOwner
from gpulane.views import EngineView, GpuView, Place, QueueView, Reason


class Shown:
    """Read-only pictures of the present."""

    def __init__(self, book: Book, owners: Mapping[GpuId, GpuOwner], clock: Callable[[], float]) -> None:
        self._book = book
        self._owners = owners
        self._clock = clock

    def gpus(self) -> tuple[GpuView, ...]:
        return tuple(self._gpu(owner) for owner in self._owners.values())

    def engines(self, service: Service | None = None) -> tuple[EngineView, ...]:
        return tuple(
            view
            for owner in self._owners.values()
            for view in self._engines(owner)
            if service is None or view.service is service
        )

    def sticky(self, service: Service, key: str) -> EngineView | None:
        """Rendezvous hashing: a key keeps its engine while that lives, and the others keep theirs when one goes."""
        live = [view for view in self.engines(service) if view.state in {EngineState.READY, EngineState.LEAKING}]
        return max(live, key=lambda view: hashlib.sha256(f"{key}\0{view.url}".encode()).digest(), default=None)

    def _engines(self, owner: GpuOwner) -> tuple[EngineView, ...]:
        return tuple(
            EngineView(
                url=engine.url,
                service=engine.service,
                name=engine.name,
                gpu=owner.id,
                state=owner.watches[engine.url].state,
                why=owner.watches[engine.url].why,
                model=owner.watches[engine.url].model,
                description=owner.watches[engine.url].description,
            )
            for engine in owner.gpu.engines
        )
