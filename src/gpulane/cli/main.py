"""The command group and what all commands share: one-line errors and exit codes."""

from __future__ import annotations

import sys

import click

from gpulane.cli.serving import serve
from gpulane.errors import ConfigError, GpulaneError


class OneLineErrors(click.Group):
    """Prints our own errors as one line (and a hint), never as a traceback."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            _print(error)
            raise SystemExit(2) from error
        except GpulaneError as error:
            _print(error)
            raise SystemExit(1) from error


@click.group(cls=OneLineErrors, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gpulane")
def main() -> None:
    """One address in front of every GPU: a fair, durable queue for ComfyUI, AUTOMATIC1111 and other GPU
    services.
    """


def _print(error: GpulaneError) -> None:
    print(f"gpulane: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"         {error.hint}", file=sys.stderr)


main.add_command(serve)
