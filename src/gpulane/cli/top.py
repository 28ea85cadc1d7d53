"""`gpulane top`: GPUs, their jobs and the head of the queue, as they are now."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from gpulane.cli.api import ApiClient, gateway_options

if TYPE_CHECKING:
    from gpulane.cli.overview import Snapshot

DRAWN_SECONDS = 0.5


@click.command()
@gateway_options
@click.option("--once", is_flag=True, help="Print it once.")
def top(*, api: ApiClient, once: bool) -> None:
    """Show everything live, until Ctrl-C. Where nobody looks (a pipe), it is printed once."""
    from rich.live import Live
    from rich.text import Text

    from gpulane.cli.output import console, is_terminal
    from gpulane.cli.overview import overview

    def picture(snapshot: Snapshot) -> object:
        queue = snapshot.queue
        return overview(
            snapshot, Text(f"{queue.running} running, {queue.waiting} waiting    {api.url}", style="dim")
        )

    if once or not is_terminal():
        console().print(picture(_snapshot(api)))
        return
    with Live(picture(_snapshot(api)), console=console(), auto_refresh=False, screen=True) as live:  # type: ignore[arg-type]
        try:
            while True:
                live.update(picture(_snapshot(api)), refresh=True)  # type: ignore[arg-type]
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
