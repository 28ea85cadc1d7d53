"""`gpulane lock`: runs any other program while holding a GPU, with its place in the queue like any job's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import click

from gpulane.cli.options import DEFAULT_URL
from gpulane.errors import ConfigError, GpulaneError

if TYPE_CHECKING:
    from types import FrameType

    from gpulane.locking import HeldGpu, Waiting

KILL_SECONDS: Final = 10.0
"""How long the program may take to end after SIGTERM, once it must not use the GPU any more."""
NOT_FOUND: Final = 127
NOT_RUNNABLE: Final = 126
FORWARDED: Final = (
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
FROM_TERMINAL: Final = frozenset({signal.SIGINT, signal.SIGQUIT, signal.SIGHUP})
PR_SET_PDEATHSIG: Final = 1


@click.command(context_settings={"ignore_unknown_options": False})
@click.argument("words", nargs=-1, required=True, type=click.UNPROCESSED, metavar="[GPU] -- COMMAND...")
@click.option("--any", "any_gpu", is_flag=True, help="Whichever GPU is free first; no GPU is named then.")
@click.option("--label", "labels", multiple=True, help="With --any: a label that the GPU must have.")
@click.option("--priority", help="interactive, normal or batch; or a number among your own jobs.")
@click.option(
    "--seconds-max", type=float, default=3600.0, show_default=True, help="The program is ended after this."
)
@click.option("--note", default="", help="What for; shown with the job.")
@click.option(
    "--url",
    envvar="GPULANE_URL",
    default=DEFAULT_URL,
    help=f"The gateway; {DEFAULT_URL} when not given.  [env var: GPULANE_URL]",
)
@click.option("--key", envvar="GPULANE_KEY", help="API key.  [env var: GPULANE_KEY]")
def lock(
    *,
    words: tuple[str, ...],
    any_gpu: bool,
    labels: tuple[str, ...],
    priority: str | None,
    seconds_max: float,
    note: str,
    url: str,
    key: str | None,
) -> None:
    """Run a program while holding a GPU of this machine; waits for its turn. Ends as the program does.

    \b
    gpulane lock gpu0 -- python train.py
    gpulane lock --any --label big --seconds-max 7200 -- ./render.sh
    """  # noqa: D301 - click wants the backspace itself
    from gpulane.locking import lock as hold

    gpu, command = _split(words, any_gpu=any_gpu)
    program = _Program(command)
    held = hold(
        gpu,
        labels=labels,
        priority=_priority(priority),
        seconds_max=seconds_max,
        note=note or " ".join(command)[:200],
        url=url,
        key=key,
        on_waiting=_tell_waiting,
        on_lost=program.end,
    )
    with held as gpu_held:
        status = program.run(gpu_held)
    sys.exit(status)


class _Program:
    """The program that runs while the GPU is held."""

    def __init__(self, command: tuple[str, ...]) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._why_ended = ""

    def run(self, gpu: HeldGpu) -> int:
        """Run it to its end; returns its status as shells give it."""
        parent = os.getpid()
        die_with = _death_signal()

        def before_exec() -> None:
            die_with()
            if os.getppid() != parent:  # died in between: nobody would tell
                os._exit(NOT_RUNNABLE)

        try:
            process = self._process = subprocess.Popen(
                self._command,
                env={**os.environ, **gpu.environment},
                # The program, and all that it starts, hold the lock file with us: the kernel knows of them.
                pass_fds=(gpu.file,),
                preexec_fn=before_exec,  # noqa: PLW1509 - two system calls, prepared before
            )
        except FileNotFoundError as error:
            return _not_started(self._command[0], error, NOT_FOUND)
        except OSError as error:
            return _not_started(self._command[0], error, NOT_RUNNABLE)
        if gpu.lost.is_set():  # between the grant and this line
            self.end(gpu.why_lost)
        before = {number: signal.signal(number, self._forward) for number in FORWARDED}
        try:
            status = process.wait()
        finally:
            for number, action in before.items():
                signal.signal(number, action)
        return status if status >= 0 else 128 - status

    def end(self, why: str) -> None:
        """End it: the GPU must not be used any more. Called by the thread that listens to the gateway."""
        process = self._process
        if process is None:
            return
        print(f"gpulane: the GPU is taken back: {why}; ending the program", file=sys.stderr)
        process.terminate()
        try:
            process.wait(KILL_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()

    def _forward(self, number: int, _: FrameType | None) -> None:
        is_told = number in FROM_TERMINAL and _is_in_foreground()
        if self._process is not None and not is_told:
            self._process.send_signal(number)


def _split(words: tuple[str, ...], *, any_gpu: bool) -> tuple[str | None, tuple[str, ...]]:
    gpu, command = (None, words) if any_gpu else (words[0], words[1:])
    if not command:
        raise ConfigError("no command: write gpulane lock GPU -- COMMAND ...")
    return gpu, command


def _priority(text: str | None) -> str | int:
    if text is None:
        return "normal"
    try:
        return int(text)
    except ValueError:
        return text


def _tell_waiting(waiting: Waiting) -> None:
    place = f"place {waiting.position}" if waiting.position else "starting"
    print(f"gpulane: {waiting.job} waits, {place}: {waiting.reason}", file=sys.stderr)


def _is_in_foreground() -> bool:
    """Tell whether a terminal sends its signals to the program itself, as to all of the foreground."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


def _death_signal() -> Callable[[], None]:
    """Prepare what makes the program die with us, where the system can do that (Linux)."""
    if not sys.platform.startswith("linux"):
        return lambda: None
    import ctypes

    # Found before the fork: between fork and exec nothing may be looked up.
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def _not_started(name: str, error: OSError, status: int) -> int:
    failure = GpulaneError(f"{name} cannot be started: {error.strerror}")
    print(f"gpulane: {failure.message}", file=sys.stderr)
    return status
