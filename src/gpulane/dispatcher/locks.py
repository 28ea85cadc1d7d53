"""Lock files that say which process owns a gpu: NAME.owner, flocked for the life of the process. Never
deleted.

The kernel lets go of a flock when its holder dies, even by SIGKILL; a lock by the mere existence of a file
would stay behind.
Deleting the file would let a second holder in beside the first, so nobody does.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Final

from gpulane.errors import ConfigError

FILE_MODE: Final = 0o666
"""Other users' programs must be able to take part; the folder's own mode says who."""


class GpuLocks:
    """The owner files of this process's gpus."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, int] = {}

    def own(self, gpu: str) -> None:
        """Take a gpu for the life of this process. Raises ConfigError naming the process that has it."""
        path = self._folder / f"{gpu}.owner"
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o755)
            # A link would let whoever may write to the folder have another file emptied below.
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
        except OSError as error:
            raise ConfigError(f"lock file {path} cannot be opened: {error.strerror}; see lock_dir") from error
        try:
            self._lock(file, gpu)
            os.ftruncate(file, 0)
            os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            os.close(file)
            raise ConfigError(f"lock file {path} cannot be locked: {error.strerror}; see lock_dir") from error
        except ConfigError:
            os.close(file)
            raise
        self._files[gpu] = file

    def _lock(self, file: int, gpu: str) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(file, 32, 0).decode(errors="replace").strip() or "unknown"
            raise ConfigError(
                f"GPU {gpu} is owned by another gpulane on this machine (process {holder}); stop that "
                "one, or take the GPU out of one of the two"
            ) from error

    def release(self) -> None:
        """Let go of all; the files stay."""
        for file in self._files.values():
            os.close(file)
        self._files.clear()
