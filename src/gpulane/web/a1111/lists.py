"""What several engines offer as one: checkpoints, samplers, scripts ... merged in the order of the settings.

That order never changes with an engine's health: clients choose by position (webuiapi's nearest match takes
the last of equals). Engines that do not answer now keep their names here; whether a job can run is decided
elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from gpulane.adapters.a1111.catalogue import DOCUMENTS, Catalogue, merged, merged_document, read_catalogue
from gpulane.core.model import EngineState, EngineUrl, Service
from gpulane.engine.base import Description
from gpulane.web.ports import EnginesPort, EngineView
from gpulane.wire import Timeouts

ASK_TIMEOUTS: Final = Timeouts(first_byte_seconds=10.0)
"""For what is asked of an engine while a client waits for it."""
SECRET_FLAGS: Final = re.compile(r"auth|pass|token|secret|key|ngrok")
"""Command line flags whose values are shown to nobody (webui issue 17411: the page's password)."""
LISTS: Final[Mapping[str, str]] = {
    target: name for name, target in DOCUMENTS.items() if name not in {"options", "openapi"}
}
"""Path to the name under which `describe` keeps its document."""


@dataclass(slots=True, kw_only=True)
class _SeenOptions:
    description: Description
    kept: bytes
    told: bytes
    """What the newest description says."""


class Lists:
    """Reads the engines' descriptions; merges again only when one of them has changed."""

    def __init__(self, engines: EnginesPort) -> None:
        self._engines = engines
        self._digests: tuple[str, ...] = ()
        self._catalogue = Catalogue()
        self._documents: dict[str, bytes] = {}
        self._options: dict[EngineUrl, _SeenOptions] = {}

    def catalogue(self) -> Catalogue:
        """Return everything that any engine offers."""
        self._refresh()
        return self._catalogue

    def document(self, name: str) -> bytes | None:
        """Return one merged list; None when no engine has told it."""
        self._refresh()
        if name not in self._documents:
            told = [
                view.description.documents[name]
                for view in self._described()
                if view.description is not None and name in view.description.documents
            ]
            if not told:
                return None
            self._documents[name] = merged_document(name, told)
        return self._documents[name]

    def options_of(self, view: EngineView) -> bytes | None:
        """Return an engine's own options, without the overrides that show in them while a job runs."""
        if view.state in {EngineState.LOST, EngineState.STOPPED}:
            self._options.pop(view.url, None)
        about = view.description
        told = about.documents.get("options") if about is not None else None
        if about is None or told is None:
            return None
        seen = self._options.setdefault(view.url, _SeenOptions(description=about, kept=told, told=told))
        if about is not seen.description:
            # Changed at the engine itself: believed when two descriptions in a row, minutes apart, say so.
            if told == seen.told:
                seen.kept = told
            seen.description, seen.told = about, told
        return seen.kept

    def _described(self) -> list[EngineView]:
        every = self._engines.engines(Service.A1111)
        return [view for view in every if view.description is not None]

    def _refresh(self) -> None:
        told = {v.description.digest: v.description.documents for v in self._described() if v.description}
        if tuple(told) != self._digests:
            self._catalogue = merged([read_catalogue(documents) for documents in told.values()])
            self._documents.clear()
            self._digests = tuple(told)


def without_secrets(flags: bytes) -> bytes:
    """Blank the values of flags that may hold a secret. Raises msgspec.DecodeError."""
    told = msgspec.json.decode(flags, type=dict[str, msgspec.Raw])
    null = msgspec.Raw(b"null")
    return msgspec.json.encode(
        {name: null if SECRET_FLAGS.search(name) else value for name, value in told.items()}
    )
