"""`gpulane serve`: the gateway itself. And how settings are put together from a file and the command line."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gpulane.errors import ConfigError

if TYPE_CHECKING:
    from gpulane.config import Settings

Command = TypeVar("Command", bound=Callable[..., object])
Result = TypeVar("Result")

_OPTIONS = (
    click.argument("gpus", nargs=-1, metavar="[GPU ...]"),
    click.option(
        "-c",
        "--config",
        "config_file",
        envvar="GPULANE_CONFIG",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Settings (YAML).  [env var: GPULANE_CONFIG]",
    ),
    click.option("--listen", help="HOST:PORT of the one listener; 127.0.0.1:8800 when not given."),
    click.option("--data", metavar="DIR", help="Folder of the queue, results and learned values."),
    click.option("--store", metavar="URL", help="sqlite (default) or memory (nothing survives a restart)."),
    click.option(
        "--allow-anonymous", is_flag=True, help="Serve everybody who can reach the listener, without keys."
    ),
)


def settings_options(command: Command) -> Command:
    """Give a command the arguments that `settings_from` takes."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command()
@settings_options
def serve(**given: object) -> None:
    """Serve one address for the engines of these GPUs.

    \b
    GPU    = ENGINE[+ENGINE ...]    engines joined by + share one card; each argument is one GPU
    ENGINE = [comfyui:|a1111:|http:] (PORT | HOST:PORT | URL)

    For example, two cards with an A1111 and a ComfyUI each: gpulane serve 7860+8188 7861+8189

    It says `gpulane ready URL` when it takes requests. Ctrl-C lets running jobs end; once more: at once.
    """  # noqa: D301 - click wants the backspace itself
    settings = settings_from(**given)  # type: ignore[arg-type]  # click's values, by the same names
    from gpulane.cli.logs import set_up_logs
    from gpulane.service import serve as run_service

    set_up_logs(settings.log)
    run(run_service(settings, announce=lambda line: print(line, flush=True)))


def settings_from(
    gpus: tuple[str, ...],
    config_file: Path | None,
    *,
    listen: str | None = None,
    data: str | None = None,
    store: str | None = None,
    allow_anonymous: bool = False,
) -> Settings:
    """Read the settings file, if any, and lay the command line over it. Raises ConfigError."""
    import msgspec

    from gpulane.config import Settings, gpus_from_arguments, parse_settings
    from gpulane.config.parse import check_settings

    source, settings = "command line", Settings()
    if config_file is not None:
        source = str(config_file)
        # The command line may allow what the file alone would be refused for.
        settings = parse_settings(_text_of(config_file), source=source, allow_anonymous=allow_anonymous)
    given = {
        "gpus": gpus_from_arguments(gpus) or None,
        "listen": listen,
        "data": data,
        "store": store,
        "allow_anonymous": allow_anonymous or None,
    }
    laid_over = {name: value for name, value in given.items() if value is not None}
    if laid_over:
        settings = msgspec.structs.replace(settings, **laid_over)
        settings = check_settings(settings, source="command line")
    if not settings.gpus:
        raise ConfigError(
            "no GPUs: name them, for instance `gpulane serve 7860+8188`, or give a settings file with -c",
            hint="to see it work without any GPU: gpulane demo",
        )
    return settings


def run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run on uvloop where it is installed, else on asyncio's own loop."""
    import asyncio

    try:
        import uvloop
    except ImportError:
        return asyncio.run(coroutine)
    return uvloop.run(coroutine)


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"settings file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"settings file {path} is not UTF-8 text") from error
