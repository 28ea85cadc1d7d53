"""`gpulane top`: GPUs, their jobs and the head of the queue, as they are now."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from gpulane.cli.options import gateway_options

if TYPE_CHECKING:
    from rich.console import Group

    from gpulane.cli.api import ApiClient
    from gpulane.cli.overview import Snapshot

DRAWN_SECONDS = 0.5
ROWS_BESIDE = 7
"""Of the screen, beside a row per GPU and per waiting job."""


@click.command()
@gateway_options
@click.option("--once", is_flag=True, help="Print it once.")
def top(*, api: ApiClient, once: bool) -> None:
    """Show everything live, until Ctrl-C. Where nobody looks (a pipe), it is printed once."""
    from rich.live import Live
    from rich.text import Text

    from gpulane.cli.output import console, is_terminal
    from gpulane.cli.overview import WAITING_SHOWN, overview

    def picture(*, is_live: bool) -> Group:
        snapshot = _snapshot(api)
        counts = f"{snapshot.queue.running} running, {snapshot.queue.waiting} waiting    {api.url}"
        rows = max(3, console().height - len(snapshot.gpus) - ROWS_BESIDE) if is_live else WAITING_SHOWN
        return overview(snapshot, Text(counts, style="dim"), waiting_shown=rows, keeps_height=is_live)

    if once or not is_terminal():
        console().print(picture(is_live=False))
        return
    with Live(picture(is_live=True), console=console(), auto_refresh=False, screen=True) as live:
        try:
            while True:
                live.update(picture(is_live=True), refresh=True)
                time.sleep(DRAWN_SECONDS)
        except KeyboardInterrupt:
            return


def _snapshot(api: ApiClient) -> Snapshot:
    from gpulane.cli.documents import GpuList, JobList, Queue
    from gpulane.cli.overview import PATHS, Snapshot

    gpus, queue, jobs = PATHS
    return Snapshot(
        gpus=api.get(GpuList, gpus).gpus, queue=api.get(Queue, queue), jobs=api.get(JobList, jobs).jobs
    )
