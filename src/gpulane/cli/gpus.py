"""`gpulane gpus | drain | resume | pause | unpause`: what an operator does with GPUs and the queue."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

import click

from gpulane.cli.options import gateway_options, json_option

if TYPE_CHECKING:
    from gpulane.cli.api import ApiClient


@click.command()
@gateway_options
@json_option
def gpus(*, api: ApiClient, as_json: bool) -> None:
    """Show the GPUs with their engines."""
    from gpulane.cli.documents import GpuList
    from gpulane.cli.output import print_raw_json, print_rows
    from gpulane.cli.tables import gpu_rows

    if as_json:
        print_raw_json(api.call("GET", "/gpulane/v1/gpus"))
    else:
        print_rows(gpu_rows(api.get(GpuList, "/gpulane/v1/gpus").gpus))


@click.command()
@click.argument("gpu_names", nargs=-1, required=True, metavar="GPU...")
@gateway_options
@json_option
def drain(*, api: ApiClient, gpu_names: tuple[str, ...], as_json: bool) -> None:
    """Let GPUs finish what runs and take nothing new, also after a restart.

    A GPU is NODE/NAME, or its name alone where that is unique.
    """
    _each(api, gpu_names, "drain", as_json=as_json)


@click.command()
@click.argument("gpu_names", nargs=-1, required=True, metavar="GPU...")
@gateway_options
@json_option
def resume(*, api: ApiClient, gpu_names: tuple[str, ...], as_json: bool) -> None:
    """Let drained GPUs take work again."""
    _each(api, gpu_names, "resume", as_json=as_json)


@click.command()
@gateway_options
@json_option
def pause(*, api: ApiClient, as_json: bool) -> None:
    """Start nothing more, also after a restart; what runs goes on, and jobs are still taken."""
    _switch(api, "pause", as_json=as_json)


@click.command()
@gateway_options
@json_option
def unpause(*, api: ApiClient, as_json: bool) -> None:
    """Start jobs again."""
    _switch(api, "unpause", as_json=as_json)


def _each(api: ApiClient, names: tuple[str, ...], verb: str, *, as_json: bool) -> None:
    import msgspec

    from gpulane.cli.documents import Gpu
    from gpulane.cli.output import print_raw_json

    for name in names:
        answer = api.call("POST", f"/gpulane/v1/gpus/{quote(name)}/{verb}")
        if as_json:
            print_raw_json(answer)
        else:
            gpu = msgspec.json.decode(answer, type=Gpu)
            print(f"{gpu.id} {gpu.state}" + (f" (finishes {gpu.job})" if gpu.job else ""))


def _switch(api: ApiClient, verb: str, *, as_json: bool) -> None:
    import msgspec

    from gpulane.cli.documents import Queue
    from gpulane.cli.output import print_raw_json

    answer = api.call("POST", f"/gpulane/v1/queue/{verb}")
    if as_json:
        print_raw_json(answer)
        return
    queue = msgspec.json.decode(answer, type=Queue)
    state = "paused" if queue.paused else "runs"
    print(
        f"the queue {'is ' if queue.paused else ''}{state}: {queue.waiting} waiting, {queue.running} running"
    )
