"""The installed `gpulane` command as other programs start it: run to its end, or until it is ready."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COMMAND = str(Path(sys.executable).with_name("gpulane"))
READY_SECONDS = 30.0
END_SECONDS = 40.0
AT_ONCE = 3


@dataclass(frozen=True, slots=True)
class Ended:
    """A command that has ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line that says what is wrong."""
        first, *hints = self.err.splitlines()
        assert first.startswith("gpulane: "), self
        assert all(line.startswith("         ") for line in hints) and len(hints) < 2, self
        assert "Traceback" not in self.err
        return first


def environment(more: Mapping[str, str]) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GPULANE_")}
    return {**clean, **more}


def run(*arguments: str, **env: str) -> Ended:
    """Run a command to its end."""
    done = subprocess.run(
        [COMMAND, *arguments],
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=END_SECONDS,
        env=environment(env),
    )
    return Ended(done.returncode, done.stdout, done.stderr)


@dataclass(slots=True)
class Program:
    """A command that runs until it is stopped."""

    process: "subprocess.Popen[bytes]"
    ready: str
    log: Path

    @property
    def url(self) -> str:
        return self.ready.split()[2]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ends(self, seconds: float = END_SECONDS) -> int:
        return self.process.wait(seconds)


@contextlib.contextmanager
def program(folder: Path, *arguments: str, ready: str, **env: str) -> Iterator[Program]:
    """Start a command, wait for the line that begins with `ready`, kill it in the end if it still runs."""
    log = folder / f"{time.monotonic_ns()}.log"
    with log.open("wb") as log_file:
        process = subprocess.Popen(
            [COMMAND, *arguments],
            stdout=subprocess.PIPE,
            stderr=log_file,
            env=environment(env),
        )
    try:
        line = first_line(process)
        assert line.startswith(ready), (line, log.read_text())
        yield Program(process, line, log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def first_line(process: "subprocess.Popen[bytes]") -> str:
    assert process.stdout is not None
    readable, _, _ = select.select([process.stdout], [], [], READY_SECONDS)
    assert readable, "no line"
    return process.stdout.readline().decode().rstrip("\n")


@contextlib.contextmanager
def engines(folder: Path, *kinds: str) -> Iterator[list[str]]:
    """Start simulated engines that share a card; gives their URLs."""
    with contextlib.ExitStack() as stack:
        common = ("--gpu", str(folder / "card0"), "--time-scale", "0.05", "--plain-pictures")
        yield [
            stack.enter_context(
                program(folder, "sim-engine", kind, "--port", "0", *common, ready="sim-engine ready http://")
            ).url
            for kind in kinds
        ]


def until(claim: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Ask until the answer is true."""
    ends = time.monotonic() + seconds
    while not (found := claim()):
        assert time.monotonic() < ends, f"not within {seconds} s"
        time.sleep(0.05)
    return found


def run_all(commands: Iterable[list[str]]) -> list[Ended]:
    """Run commands, a few at one time; in their order."""

    def run_one(arguments: list[str]) -> Ended:
        return run(*arguments)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(run_one, commands))
