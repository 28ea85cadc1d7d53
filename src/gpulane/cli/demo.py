"""`gpulane demo`: the real gateway over simulated engines, with a small workload: nothing needs a GPU."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path
from typing import Final

import click

from gpulane.cli.serving import run

GPUS_MAX: Final = 16
DEFAULT_LISTEN: Final = "127.0.0.1:8800"


@click.command()
@click.option(
    "--gpus", type=click.IntRange(1, GPUS_MAX), default=2, show_default=True, help="Simulated cards."
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    help="End after so long; without it Ctrl-C ends.",
)
@click.option("--listen", help=f"HOST:PORT; {DEFAULT_LISTEN}, or another port where that one is taken.")
@click.option("--allow-anonymous", is_flag=True, help="With --listen beyond this machine: serve everybody.")
def demo(*, gpus: int, seconds: float | None, listen: str | None, allow_anonymous: bool) -> None:
    """Show it at work without a GPU: on each simulated card an A1111 and a ComfyUI, and some people who use
    both.

    The gateway is the real one. Its address can be used by any A1111 or ComfyUI client meanwhile.
    """
    from gpulane.cli.demo_run import DemoWishes, run_demo
    from gpulane.cli.logs import set_up_logs
    from gpulane.config.settings import LogSettings

    set_up_logs(LogSettings(level="error"))
    with tempfile.TemporaryDirectory(prefix="gpulane-demo-", ignore_cleanup_errors=True) as folder:
        wishes = DemoWishes(
            gpus=gpus,
            seconds=seconds,
            listen=listen or _free_address(),
            allow_anonymous=allow_anonymous,
            folder=Path(folder),
        )
        run(run_demo(wishes))


def _free_address() -> str:
    """Return the usual address, or one whose port the system chooses when somebody listens there."""
    host, _, port = DEFAULT_LISTEN.rpartition(":")
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, int(port)))
        except OSError:
            return f"{host}:0"
    return DEFAULT_LISTEN
