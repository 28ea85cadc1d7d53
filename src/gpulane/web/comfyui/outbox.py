"""What waits to be sent to one client: bounded, and never a reason for anybody to wait.

Too much of it: old previews go first, then old progress; when only what must not be missed is left, the
client is given up.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

MESSAGES_SOFT_MAX: Final = 256
"""A client that keeps up has a handful; beyond, what newer messages repeat is dropped."""
BYTES_SOFT_MAX: Final = 2 * 1024 * 1024
MESSAGES_MAX: Final = 4_096
"""Beyond, the client does not read: it is disconnected, and may come back for the present state."""
BYTES_MAX: Final = 16 * 1024 * 1024


class Worth(IntEnum):
    """What a message is worth to a client that falls behind."""

    PREVIEW = 0
    PROGRESS = 1
    ESSENTIAL = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """One message to a client."""

    data: bytes
    is_text: bool
    worth: Worth


class Outbox:
    """The letters to one client, oldest first."""

    def __init__(self) -> None:
        self._letters: deque[Letter] = deque()
        self._counts = dict.fromkeys(Worth, 0)
        self.bytes_waiting = 0

    def __len__(self) -> int:
        return len(self._letters)

    def put(self, letter: Letter) -> bool:
        """Add a letter. False: there is no room even after dropping; the client is to be given up."""
        self._letters.append(letter)
        self._count(letter, 1)
        for worth in (Worth.PREVIEW, Worth.PROGRESS):
            while self._is_over_soft() and self._counts[worth] > 0:
                self._drop_oldest(worth)
        return len(self._letters) <= MESSAGES_MAX and self.bytes_waiting <= BYTES_MAX

    def take(self) -> Letter | None:
        """Take the oldest letter."""
        if not self._letters:
            return None
        letter = self._letters.popleft()
        self._count(letter, -1)
        return letter

    def clear(self) -> None:
        """Throw everything away."""
        self._letters.clear()
        self._counts = dict.fromkeys(Worth, 0)
        self.bytes_waiting = 0

    def _is_over_soft(self) -> bool:
        return len(self._letters) > MESSAGES_SOFT_MAX or self.bytes_waiting > BYTES_SOFT_MAX

    def _drop_oldest(self, worth: Worth) -> None:
        for index, letter in enumerate(self._letters):
            if letter.worth is worth:
                del self._letters[index]
                self._count(letter, -1)
                return

    def _count(self, letter: Letter, sign: int) -> None:
        self._counts[letter.worth] += sign
        self.bytes_waiting += sign * len(letter.data)
