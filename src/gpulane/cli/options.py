"""Options that several commands share. Imports nothing heavy: all of it is read for `gpulane --help`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Final, TypeVar, cast
from urllib.parse import quote

import click

DEFAULT_URL: Final = "http://127.0.0.1:8800"
Command = TypeVar("Command", bound=Callable[..., object])

json_option = click.option("--json", "as_json", is_flag=True, help="Print the API's own answer.")


def gateway_options(command: Command) -> Command:
    """Give a command --url and --key, and with them its argument `api`."""

    @functools.wraps(command)
    def with_client(*, url: str, key: str | None, **values: object) -> object:
        from gpulane.cli.api import ApiClient

        return command(api=ApiClient(url, key), **values)

    key_option = click.option("--key", envvar="GPULANE_KEY", help="API key.  [env var: GPULANE_KEY]")
    url_option = click.option(
        "--url",
        envvar="GPULANE_URL",
        default=DEFAULT_URL,
        help=f"The gateway; {DEFAULT_URL} when not given.  [env var: GPULANE_URL]",
    )
    # `wraps` keeps what click has attached: it is the same command with other arguments.
    return cast("Command", url_option(key_option(with_client)))


def job_path(job: str, *more: str) -> str:
    """Return the path of a job."""
    return "/".join(["/gpulane/v1/jobs", quote(job, safe=""), *more])
