"""`gpulane engines | engine-log | engine-restart`: engines, and processes of those that gpulane starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from urllib.parse import urlencode

import click

from gpulane.cli.options import gateway_options, json_option

if TYPE_CHECKING:
    from gpulane.cli.api import ApiClient

RESTART_SECONDS: Final = 100.0
"""An engine may take its time to end, and a restart command a minute."""


@click.command()
@gateway_options
@json_option
def engines(*, api: ApiClient, as_json: bool) -> None:
    """Show the engines, with the processes of those that gpulane starts."""
    from gpulane.cli.documents import EngineList
    from gpulane.cli.output import print_raw_json, print_rows
    from gpulane.cli.tables import engine_rows

    if as_json:
        print_raw_json(api.call("GET", "/gpulane/v1/engines"))
    else:
        print_rows(engine_rows(api.get(EngineList, "/gpulane/v1/engines").engines))


@click.command("engine-log")
@click.argument("engine", metavar="ENGINE")
@click.option("--lines", type=click.IntRange(1, 200), default=200, help="How many of the last lines.")
@gateway_options
def engine_log(*, api: ApiClient, engine: str, lines: int) -> None:
    """Show the last lines that an engine wrote. Its output is kept where gpulane starts it.

    ENGINE is PORT, HOST:PORT or a URL.
    """
    query = urlencode({"url": engine, "lines": lines})
    click.echo(api.call("GET", f"/gpulane/v1/engines/log?{query}"), nl=False)


@click.command("engine-restart")
@click.argument("engine", metavar="ENGINE")
@click.option("--force", is_flag=True, help="Also while a job runs there; it is lost, and tried again.")
@gateway_options
@json_option
def engine_restart(*, api: ApiClient, engine: str, force: bool, as_json: bool) -> None:
    """Restart an engine by its command or restart command in the settings.

    ENGINE is PORT, HOST:PORT or a URL. It is ready some time later: see `gpulane engines`.
    """
    import msgspec

    from gpulane.cli.documents import EngineDetail
    from gpulane.cli.output import print_raw_json

    body = msgspec.json.encode({"url": engine, "force": force})
    answer = api.call("POST", "/gpulane/v1/engines/restart", body, seconds=RESTART_SECONDS)
    if as_json:
        print_raw_json(answer)
        return
    found = msgspec.json.decode(answer, type=EngineDetail)
    print(f"{found.url} {found.state}" + (f": {found.why}" if found.why else ""))
