"""Pictures and other files: which of the caller's jobs made one, where it is now, and uploads to every
engine.

Names are equal on different engines, so a name alone is never looked up on an engine: it is the newest job
of the caller that made a file of that name. Other people's files do not exist. (Uploads are shared by all
engines until they are content-addressed.)
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final
from urllib.parse import parse_qs

import msgspec
import structlog
from aiohttp import web

from gpulane.adapters.comfyui.result import content_type_of, files_of, view_target
from gpulane.core.model import Account, EngineUrl, JobId
from gpulane.engine.base import RecordedResult
from gpulane.errors import EngineError, NotFound, TooLarge, Unavailable
from gpulane.store.base import JobRecord
from gpulane.web.comfyui.lists import UPLOAD_BYTES_MAX, Lists
from gpulane.web.comfyui.own import OwnJobs
from gpulane.web.ports import EnginesPort, EngineView, JobsPort

KNOWN_MAX: Final = 50_000
"""File names remembered; older ones are found again in results."""
SCAN_JOBS_MAX: Final = 200
SCAN_SECONDS: Final = 10.0
"""A name that is nowhere is not looked for again in all results before."""
UPLOAD_ANSWER_BYTES_MAX: Final = 1024 * 1024
PIECE_BYTES: Final = 256 * 1024
ANNOTATIONS: Final = {" [output]": "output", " [input]": "input", " [temp]": "temp"}
SHOWN_AS_THEY_ARE: Final = (
    "image/png",
    "image/jpeg",
    "image/webp",
    "image/gif",
    "image/avif",
    "video/",
    "audio/",
)

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A file as /view is asked for it."""

    filename: str
    subfolder: str
    kind: str
    is_changed: bool
    """Not the file itself but a preview or one channel of it, which only an engine can make."""

    @property
    def target(self) -> str:
        return view_target(self.filename, self.subfolder, self.kind)


def read_wanted(query: str) -> Wanted:
    """Read the query of /view. Raises NotFound for what can be no file's name."""
    fields = {name: values[-1] for name, values in parse_qs(query, keep_blank_values=True).items()}
    filename, kind = fields.get("filename", ""), fields.get("type", "output")
    for annotation, meant in ANNOTATIONS.items():
        if filename.endswith(annotation):
            filename, kind = filename.removesuffix(annotation), meant
    subfolder = fields.get("subfolder", "")
    parts = f"{subfolder}/{filename}".replace("\\", "/").split("/")
    if not filename or ".." in parts or filename.startswith(("/", "\\")) or "\0" in filename + subfolder:
        raise NotFound("No such file.")
    changed = "preview" in fields or fields.get("channel", "rgba") != "rgba"
    return Wanted(filename=filename, subfolder=subfolder, kind=kind, is_changed=changed)


class _Uploaded(msgspec.Struct):
    """What ComfyUI answers to an upload."""

    name: str
    subfolder: str = ""
    type: str = "input"


class FileIndex:
    """Which job made a file: filled by what passes by, and from results when asked for something older."""

    def __init__(self, jobs: JobsPort, own: OwnJobs) -> None:
        self._jobs = jobs
        self._own = own
        self._known: OrderedDict[tuple[Account, str], JobId] = OrderedDict()
        self._scanned_at: dict[Account, float] = {}

    def note(self, account: Account, job: JobId, output: msgspec.Raw) -> None:
        """Remember the files of one node's output."""
        try:
            files = files_of({"": msgspec.json.decode(output)})
        except ValueError:
            return  # text that is no Unicode: such a name can be asked for by nobody
        for file in files:
            self._remember(account, file.target, job)

    async def job_of(self, account: Account, target: str) -> JobId | None:
        """Find the caller's newest job that made the file."""
        found = self._known.get((account, target))
        if found is None:
            await self._scan(account)
            found = self._known.get((account, target))
        return found

    async def _scan(self, account: Account) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._scanned_at.get(account, float("-inf")) < SCAN_SECONDS:
            return
        self._scanned_at[account] = now
        for record in await self._own.ended(account, SCAN_JOBS_MAX):
            result = await self._jobs.result(record.job.id)
            for artifact in result.artifacts if result is not None else ():
                if artifact.target is not None:
                    self._remember(account, artifact.target, record.job.id)

    def _remember(self, account: Account, target: str, job: JobId) -> None:
        self._known.pop((account, target), None)
        self._known[account, target] = job
        while len(self._known) > KNOWN_MAX:
            self._known.popitem(last=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePlace:
    """Where a file of the caller's is: copied here, and on an engine that answers."""

    copied: Path | None
    engine: EngineView | None


class Files:
    """Finds files and spreads uploads."""

    def __init__(
        self, jobs: JobsPort, engines: EnginesPort, index: FileIndex, lists: Lists, folder: Path
    ) -> None:
        self._jobs = jobs
        self._engines = engines
        self._index = index
        self._lists = lists
        self._folder = folder
        self._uploaded: OrderedDict[tuple[Account, str], None] = OrderedDict()

    async def place_of(self, account: Account, wanted: Wanted) -> FilePlace | None:
        """Tell where a file of the account is; None when none of its jobs made one of that name."""
        job = await self._index.job_of(account, wanted.target)
        record = None if job is None else await self._jobs.record(job)
        if record is None:
            return None
        result = await self._jobs.result(record.job.id)
        number = _number_of(result, wanted.target)
        copied = None if number is None else await self._jobs.artifact(record.job.id, number)
        return FilePlace(copied=copied, engine=self._engine_of(record, result))

    def _engine_of(self, record: JobRecord, result: RecordedResult | None) -> EngineView | None:
        url = EngineUrl(result.engine) if result is not None and result.engine else record.engine
        if url is None and record.attempts:
            url = record.attempts[-1].engine
        return next((view for view in self._lists.live() if view.url == url), None)

    def was_uploaded(self, account: Account, wanted: Wanted) -> bool:
        """Tell whether the account uploaded it, to whatever folder: then every engine has it."""
        return (account, wanted.target) in self._uploaded

    async def upload(
        self, request: web.Request, target: str, first: EngineView, account: Account
    ) -> web.Response:
        """Send an upload to every live engine, and answer what the first one says."""
        with tempfile.TemporaryFile(dir=self._folder) as file:
            size = await _spool(request, file)
            headers = [("Content-Type", request.headers.get("Content-Type", "application/octet-stream"))]
            views = sorted(self._lists.live(), key=lambda view: view.url != first.url)
            asked = [self._send(view, target, headers, file, size) for view in views]
            answers = [answer for answer in await asyncio.gather(*asked) if answer is not None]
        if not answers:
            raise Unavailable("No engine took the upload.", retry_after_seconds=5.0)
        if any(answer.body != answers[0].body for answer in answers):
            _log.warning("upload_named_differently", engines=len(answers))
        self._note_upload(account, answers[0])
        return answers[0]

    def _note_upload(self, account: Account, answer: web.Response) -> None:
        try:
            said = msgspec.json.decode(answer.body if isinstance(answer.body, bytes) else b"", type=_Uploaded)
        except (msgspec.DecodeError, RecursionError):
            return  # a refusal
        self._uploaded[account, view_target(said.name, said.subfolder, said.type)] = None
        if said.type == "input" and not said.subfolder:
            self._lists.note_upload(said.name)
        while len(self._uploaded) > KNOWN_MAX:
            self._uploaded.popitem(last=False)

    async def _send(
        self, view: EngineView, target: str, headers: list[tuple[str, str]], file: IO[bytes], size: int
    ) -> web.Response | None:
        client = self._engines.wire(view.url)
        try:
            answer = await client.request("POST", target, headers, _pieces(file, size), content_length=size)
            async with answer:
                body = await answer.read(UPLOAD_ANSWER_BYTES_MAX)
        except EngineError as error:
            _log.warning("upload_failed", engine=view.url, why=str(error))
            return None
        content_type = answer.header("content-type")
        headers_back = {"Content-Type": content_type} if content_type else {}
        return web.Response(body=body, status=answer.status, headers=headers_back)


def copied_answer(path: Path, filename: str) -> web.FileResponse:
    """Answer a copied file: Range, HEAD and validators work. What could run in a browser is not shown as
    such.
    """
    content_type = content_type_of(filename)
    if not content_type.startswith(SHOWN_AS_THEY_ARE):
        content_type = "application/octet-stream"
    headers = {
        "Content-Type": content_type,
        "Content-Disposition": f'filename="{copied_name(filename)}"',
        "X-Content-Type-Options": "nosniff",
    }
    return web.FileResponse(path, headers=headers)


def copied_name(filename: str) -> str:
    """Write a file's name so that it fits into a header."""
    plain = filename.encode("ascii", "replace").decode().replace('"', "'").replace("\\", "_")
    return "".join(character for character in plain if character.isprintable())


def _number_of(result: RecordedResult | None, target: str) -> int | None:
    artifacts = result.artifacts if result is not None else ()
    return next((number for number, artifact in enumerate(artifacts) if artifact.target == target), None)


async def _spool(request: web.Request, file: IO[bytes]) -> int:
    if (request.content_length or 0) > UPLOAD_BYTES_MAX:
        raise TooLarge(f"Maximum request body size {UPLOAD_BYTES_MAX} exceeded.")
    size = 0
    while piece := await request.content.readany():
        size += len(piece)
        if size > UPLOAD_BYTES_MAX:
            raise TooLarge(f"Maximum request body size {UPLOAD_BYTES_MAX} exceeded.")
        file.write(piece)
    file.flush()
    return size


async def _pieces(file: IO[bytes], size: int) -> AsyncIterator[bytes]:
    """Read the spool from its beginning, past the file's own position: several engines read at once."""
    offset = 0
    while offset < size:
        piece = os.pread(file.fileno(), PIECE_BYTES, offset)
        offset += len(piece)
        yield piece
