"""Checks a prompt against what the live engines say of their nodes and files, before it becomes a job.

Of several engines the kindest one counts: a prompt is refused only when none of them would take it. Never
refuses when no engine can be asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from itertools import islice
from typing import Final

from gpulane.adapters.comfyui.catalog import Combos
from gpulane.adapters.comfyui.result import view_target
from gpulane.adapters.comfyui.validation import Definitions, Verdict, files_of, verdict_of
from gpulane.errors import EngineError
from gpulane.web.bodies import understood
from gpulane.web.comfyui.lists import ASK_TIMEOUTS, DOCUMENT, Lists
from gpulane.web.ports import EnginesPort, EngineView

FILES_ASKED_MAX: Final = 50
"""Files of one prompt that are looked for; what is wrong with further ones the engine itself will say."""


class Checks:
    """Says what the engines would say to a prompt."""

    def __init__(self, lists: Lists, engines: EnginesPort) -> None:
        self._lists = lists
        self._engines = engines
        self._definitions: dict[str, Definitions] = {}

    async def verdict(self, body: bytes, combos: Combos) -> Verdict | None:
        """Judge a rebuilt prompt; None when no live engine knows all its nodes."""
        known = self._read_definitions()
        if not known:
            return None
        absent = await self._absent(await understood(body, lambda: files_of(body)))
        told = await understood(
            body, lambda: [verdict_of(body, one, combos=combos, absent=absent) for one in known]
        )
        return min((one for one in told if one is not None), key=_badness, default=None)

    def _read_definitions(self) -> list[Definitions]:
        """Read each description once, and forget those of engines that are gone."""
        documents = {
            view.description.digest: view.description.documents[DOCUMENT]
            for view in self._lists.live()
            if view.description is not None and DOCUMENT in view.description.documents
        }
        self._definitions = {
            digest: self._definitions.get(digest) or Definitions(document)
            for digest, document in documents.items()
        }
        return list(self._definitions.values())

    async def _absent(self, names: Iterable[str]) -> frozenset[str]:
        """List the files that every live engine says it does not have."""
        asked = list(islice(names, FILES_ASKED_MAX))
        views = self._lists.live()
        lacks = await asyncio.gather(*(self._lacks(view, name) for name in asked for view in views))
        per_file = [lacks[i : i + len(views)] for i in range(0, len(lacks), max(1, len(views)))]
        return frozenset(name for name, said in zip(asked, per_file, strict=False) if said and all(said))

    async def _lacks(self, view: EngineView, name: str) -> bool:
        subfolder, _, filename = name.rpartition("/")
        target = view_target(filename, subfolder, "input")
        try:
            answer = await self._engines.wire(view.url).request("HEAD", target, timeouts=ASK_TIMEOUTS)
            async with answer:
                return answer.status == 404
        except EngineError:
            return False


def _badness(verdict: Verdict) -> tuple[bool, int]:
    return verdict.error is not None, len(verdict.node_errors)
