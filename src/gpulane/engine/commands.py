"""Runs a program that the settings name, for a bounded time, without a shell. When its time is over it is
killed with everything it started; what it left running when it ended well is left alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Final

from gpulane.engine.control import named
from gpulane.errors import EngineError

SAID_BYTES_MAX: Final = 500
"""So much of the end of its error output goes into the message."""
SAID_SECONDS: Final = 0.2
"""A program that it left running may hold the error output open for ever."""
_PIECE_BYTES: Final = 4096


async def run_command(
    argv: Sequence[str], *, seconds: float, env: Mapping[str, str] | None = None, folder: str | None = None
) -> None:
    """Run to its end. Raises EngineError: `command_failed` for any status but 0, `timeout`."""
    name = argv[0]
    async with _listening() as (said, output):
        process = await _started(argv, output, env, folder)
        try:
            async with asyncio.timeout(seconds):
                status = await process.wait()
        except TimeoutError:
            raise named(EngineError(f"{name} took over {seconds:g} s and was killed"), "timeout") from None
        finally:
            await _end(process)
    if status != 0:
        text = said.decode(errors="replace").strip()
        message = f"{name} ended with status {status}" + (f": {text}" if text else "")
        raise named(EngineError(message), "command_failed")


async def _started(
    argv: Sequence[str], output: int, env: Mapping[str, str] | None, folder: str | None
) -> asyncio.subprocess.Process:
    """Start it in a session of its own, as the leader of a group that can be killed whole."""
    try:
        return await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=output,
            start_new_session=True,
            env=None if env is None else {**os.environ, **env},
            cwd=folder,
        )
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise named(EngineError(f"{argv[0]} cannot be run: {why}", sent=False), "command_failed") from error
    finally:
        os.close(output)


@contextlib.asynccontextmanager
async def _listening() -> AsyncIterator[tuple[bytearray, int]]:
    """Read what is said into the end that is given; the end of the block waits a moment for the rest.

    The pipe is ours and not the process object's, whose `wait` may wait for the end of its pipes too: a
    program that the command left running holds them open.
    """
    source, output = os.pipe()
    said = bytearray()
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(source, "rb", buffering=0)
    )
    reading = loop.create_task(_listen(reader, said))
    try:
        yield said, output
        await asyncio.wait({reading}, timeout=SAID_SECONDS)
    finally:
        reading.cancel()
        await asyncio.wait({reading})
        transport.close()


async def _listen(reader: asyncio.StreamReader, said: bytearray) -> None:
    while piece := await reader.read(_PIECE_BYTES):
        said += piece
        del said[:-SAID_BYTES_MAX]


async def _end(process: asyncio.subprocess.Process) -> None:
    """Kill it with its group, if it lives. Its id is not another's: it has not been waited for."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
