"""Takes an answer in, for a held job's client or for the record.

A held answer is handed on only once it is whole and proved, as long as it is small: what has been begun
cannot be repeated on another gpu. Bigger ones are handed on as they come, so that memory stays bounded.
"""

from __future__ import annotations

from typing import Final

import msgspec

from gpulane.adapters.a1111.answers import Info, Tail, read_info
from gpulane.adapters.base import HeaderList
from gpulane.engine.base import AnswerSink, Artifact, RecordedResult
from gpulane.errors import GpulaneError

HELD_BACK_BYTES_MAX: Final = 8 * 1024 * 1024
RECORDED_BYTES_MAX: Final = 512 * 1024 * 1024
"""A stored job's answer is held in memory until it is recorded."""


class BadAnswer(GpulaneError):
    """The engine's answer is not what it should be."""

    code = "bad_answer"


class AnswerTooLarge(GpulaneError):
    """The engine's answer is larger than what can be recorded."""

    code = "answer_too_large"


class _Answer(msgspec.Struct):
    images: list[msgspec.Raw] = []


class Intake:
    """One answer."""

    def __init__(self, sink: AnswerSink | None, status: int, headers: HeaderList, *, engine: str) -> None:
        self._sink = sink
        self._status = status
        self._headers = headers
        self._engine = engine
        self._kept: list[bytes] = []
        self._size = 0
        self._is_begun = False
        self._tail = Tail()

    def feed(self, chunk: bytes) -> None:
        """Take the next piece. Raises what the sink raises, or AnswerTooLarge."""
        self._tail.feed(chunk)
        self._size += len(chunk)
        if self._sink is not None and self._is_begun:
            self._sink.write(chunk)
            return
        self._kept.append(chunk)
        if self._sink is not None and self._size > HELD_BACK_BYTES_MAX:
            self._begin(self._sink)
        elif self._sink is None and self._size > RECORDED_BYTES_MAX:
            raise AnswerTooLarge(
                f"the answer is over {RECORDED_BYTES_MAX // 1024**2} MiB; ask for less at once"
            )

    def info(self) -> Info | None:
        """Read what the answer proves."""
        return read_info(self._tail.bytes())

    def finish(self) -> RecordedResult | None:
        """The answer is whole: hand it on, or make the record of it."""
        if self._sink is None:
            return self._recorded(b"".join(self._kept))
        if not self._is_begun:
            self._begin(self._sink)
        self._sink.finish()
        return None

    def fail(self, error: Exception) -> None:
        """It will never be whole. What was not begun stays unsaid: another attempt may say it."""
        if self._sink is not None and self._is_begun:
            self._sink.fail(error)
        self._kept.clear()

    def _begin(self, sink: AnswerSink) -> None:
        self._is_begun = True
        sink.begin(self._status, self._headers)
        for chunk in self._kept:
            sink.write(chunk)
        self._kept.clear()

    def _recorded(self, body: bytes) -> RecordedResult:
        try:
            # Some endpoints answer something else than an object; any JSON can be recorded.
            images = msgspec.json.decode(body, type=_Answer).images if body.lstrip().startswith(b"{") else []
            document = msgspec.json.decode(body, type=msgspec.Raw)
        except (msgspec.DecodeError, RecursionError) as error:
            raise BadAnswer(f"the engine's answer is no JSON: {error}") from None
        artifacts = tuple(Artifact(name=f"{n}.png", content_type="image/png") for n in range(len(images)))
        return RecordedResult(
            document=document, status=self._status, engine=self._engine, artifacts=artifacts
        )
