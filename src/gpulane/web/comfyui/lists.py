"""What ComfyUI's lists say when several engines answer as one: nodes, models, features, devices. Merged, kept
by digest.

An entry that any live engine has is in the list; which engine can run a job is not decided here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Final, cast

import msgspec

from gpulane.adapters.comfyui.catalog import (
    Combos,
    merge_object_info,
    object_info_of,
    read_catalog,
    with_files,
)
from gpulane.core.model import EngineState, Service
from gpulane.errors import EngineError
from gpulane.web.ports import EnginesPort, EngineView
from gpulane.wire import Timeouts

DOCUMENT: Final = "object_info"
ASK_TIMEOUTS: Final = Timeouts(first_byte_seconds=5.0)
"""An engine that imports or loads holds its event loop; the others' lists are shown without it."""
KEEP_SECONDS: Final = 2.0
"""A page that opens asks for the same lists many times at once."""
KEPT_MAX: Final = 64
UPLOADS_MAX: Final = 1_000
"""Uploads that are shown before the engines are described anew; the oldest goes first."""

UPLOAD_BYTES_MAX: Final = 100 * 1024 * 1024
"""ComfyUI's own limit, told as a feature."""
NEVER_ADVERTISED: Final = frozenset({"extension", "supports_progress_text_metadata"})
"""The extension manager's routes are closed, and text frames come in the engines' older form (comfyui.md 4).
"""


class _OutputNode(msgspec.Struct):
    output_node: bool = False


class Lists:
    """Reads the engines' descriptions, and asks them for what is not described."""

    def __init__(self, engines: EnginesPort) -> None:
        self._engines = engines
        self._merged: tuple[tuple[str, ...], bytes] = ((), b"{}")
        self._catalogs: dict[str, tuple[Combos, frozenset[str]]] = {}
        self._kept: dict[str, tuple[float, list[bytes]]] = {}
        self._uploads: dict[str, None] = {}

    def live(self) -> tuple[EngineView, ...]:
        """List the ComfyUI engines that answer."""
        every = self._engines.engines(Service.COMFYUI)
        return tuple(view for view in every if view.state in {EngineState.READY, EngineState.LEAKING})

    # --- nodes

    def object_info(self) -> bytes:
        """Return the merged document; the same bytes until an engine comes, goes or changes."""
        described = [
            (view.description.digest, view.description.documents[DOCUMENT])
            for view in self.live()
            if view.description is not None and DOCUMENT in view.description.documents
        ]
        digests = tuple(digest for digest, _ in described)
        if digests != self._merged[0]:
            documents = list(dict(described).values())
            merged = merge_object_info(documents) if documents else b"{}"
            self._merged = (digests, with_files(merged, self._uploads))
        return self._merged[1]

    def note_upload(self, name: str) -> None:
        """Show a new file of the input folder, which the engines' descriptions do not name yet."""
        self._uploads.pop(name, None)
        self._uploads[name] = None
        while len(self._uploads) > UPLOADS_MAX:
            del self._uploads[next(iter(self._uploads))]
        self._merged = ((), b"{}")

    def object_info_of(self, name: str) -> bytes:
        return object_info_of(self.object_info(), name)

    def combos(self) -> Combos:
        """Return the inputs whose values are needs, over all live engines."""
        return frozenset[tuple[str, str]]().union(*(combos for combos, _ in self._read_catalogs()))

    def output_classes(self) -> frozenset[str]:
        """Return the node classes that end a workflow."""
        return frozenset[str]().union(*(outputs for _, outputs in self._read_catalogs()))

    def missing(self, needs: frozenset[str]) -> frozenset[str]:
        """Return what of the needs stands in the way: what nobody has, else what the best engine lacks."""
        offers = [
            view.description.offers
            for view in self.live()
            if view.description is not None and view.description.offers is not None
        ]
        nowhere = needs.difference(*offers) if offers else frozenset[str]()
        lacks = sorted((needs - offer for offer in offers), key=len)
        return nowhere or (lacks[0] if lacks else frozenset())

    def features(self) -> bytes:
        """Return what all engines can do and we pass on."""
        told: list[dict[str, object]] = []
        for view in self.live():
            if view.description is not None:
                try:
                    known = view.description.documents.get("features", b"{}")
                    told.append(msgspec.json.decode(known, type=dict[str, object]))
                except (msgspec.DecodeError, RecursionError):
                    told.append({})
        return msgspec.json.encode(shared_features(told))

    def _read_catalogs(self) -> list[tuple[Combos, frozenset[str]]]:
        found: list[tuple[Combos, frozenset[str]]] = []
        for view in self.live():
            if view.description is not None and DOCUMENT in view.description.documents:
                digest = view.description.digest
                if digest not in self._catalogs:
                    self._catalogs = {
                        key: known for key, known in self._catalogs.items() if key in self._digests()
                    }
                    self._catalogs[digest] = _read(view.description.documents[DOCUMENT])
                found.append(self._catalogs[digest])
        return found

    def _digests(self) -> set[str]:
        return {view.description.digest for view in self.live() if view.description is not None}

    # --- what is asked for now

    async def union(self, target: str) -> bytes | None:
        """Unite a list of strings over all live engines; None when no engine knows it."""
        answers = await self._ask_all(target)
        if not answers:
            return None
        united: dict[str, None] = {}
        for answer in answers:
            try:
                united |= dict.fromkeys(msgspec.json.decode(answer, type=list[str]))
            except (msgspec.DecodeError, RecursionError):
                return answers[0]
        return msgspec.json.encode(list(united))

    async def system_stats(self, first: EngineView, *, with_arguments: bool) -> bytes | None:
        """Return one engine's statistics with the devices of all; its command line for operators only."""
        answers = await self._ask_all("/system_stats", first)
        return merged_stats(answers, with_arguments=with_arguments) if answers else None

    async def _ask_all(self, target: str, first: EngineView | None = None) -> list[bytes]:
        """GET from every live engine at once; those that do not answer 200 in time are left out."""
        views = sorted(self.live(), key=lambda view: first is None or view.url != first.url)
        key = " ".join([target, *(view.url for view in views)])
        now = asyncio.get_running_loop().time()
        kept = self._kept.get(key)
        if kept is not None and now - kept[0] < KEEP_SECONDS:
            return kept[1]
        asked = await asyncio.gather(*(self._ask(view, target) for view in views))
        answers = [answer for answer in asked if answer is not None]
        while len(self._kept) >= KEPT_MAX:
            del self._kept[next(iter(self._kept))]
        self._kept[key] = (now, answers)
        return answers

    async def _ask(self, view: EngineView, target: str) -> bytes | None:
        try:
            status, body = await self._engines.wire(view.url).get_json(target, timeouts=ASK_TIMEOUTS)
        except EngineError:
            return None
        return body if status == 200 else None


def _read(document: bytes) -> tuple[Combos, frozenset[str]]:
    nodes = msgspec.json.decode(document, type=dict[str, msgspec.Raw])
    return read_catalog(document).combos, frozenset(name for name, raw in nodes.items() if _is_output(raw))


def _is_output(raw: msgspec.Raw) -> bool:
    try:
        return msgspec.json.decode(raw, type=_OutputNode).output_node
    except msgspec.ValidationError:
        return False


def shared_features(told: Iterable[dict[str, object]]) -> dict[str, object]:
    """Return what every engine says, save what we do not pass on. Previews are ours to convert, uploads ours
    to limit.
    """
    every = list(told)
    shared: dict[str, object] = {"supports_preview_metadata": True, "max_upload_size": UPLOAD_BYTES_MAX}
    if not every:
        return shared
    for name, value in every[0].items():
        if (
            name not in shared
            and name not in NEVER_ADVERTISED
            and all(one.get(name) == value for one in every)
        ):
            shared[name] = value
    if "assets" in shared:
        shared["assets"] = False  # they live on one engine only
    return shared


def merged_stats(answers: list[bytes], *, with_arguments: bool) -> bytes | None:
    """Put the devices of all engines into the first one's statistics, numbered anew."""
    read: list[dict[str, object]] = []
    for answer in answers:
        try:
            read.append(msgspec.json.decode(answer, type=dict[str, object]))
        except (msgspec.DecodeError, RecursionError):
            continue
    if not read:
        return None
    devices: list[object] = []
    for stats in read:
        for device in _items(stats.get("devices")):
            numbered = (
                cast("dict[str, object]", device) | {"index": len(devices)}
                if isinstance(device, dict)
                else device
            )
            devices.append(numbered)
    merged = read[0] | {"devices": devices}
    system = merged.get("system")
    if isinstance(system, dict) and not with_arguments:
        merged["system"] = cast("dict[str, object]", system) | {"argv": []}
    return msgspec.json.encode(merged)


def _items(value: object) -> list[object]:
    return cast("list[object]", value) if isinstance(value, list) else []
