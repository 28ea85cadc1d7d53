"""The command group and what all commands share: errors in one line, and the exit status.

Only click and the errors are imported here and at the top of the command modules: `gpulane --help` is quick.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Final, NoReturn, cast

import click

from gpulane.cli.checking import check
from gpulane.cli.demo import demo
from gpulane.cli.engines import engine_log, engine_restart, engines
from gpulane.cli.gpus import drain, gpus, pause, resume, unpause
from gpulane.cli.jobs import cancel, explain, job, jobs, prioritize
from gpulane.cli.keys import key
from gpulane.cli.locking import lock
from gpulane.cli.serving import serve
from gpulane.cli.simulating import sim_engine
from gpulane.cli.submitting import submit
from gpulane.cli.top import top
from gpulane.cli.waiting import wait
from gpulane.errors import ConfigError, GpulaneError

FAILED: Final = 1
WRONG_USE: Final = 2
INTERRUPTED: Final = 130
"""As shells say that a program was ended by Ctrl-C."""


class _InOrderOfUse(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        """List commands as they were added, not by the alphabet."""
        del ctx
        return list(self.commands)


@click.group(cls=_InOrderOfUse, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="gpulane")
def program() -> None:
    """One address in front of every GPU: a fair, durable queue for ComfyUI, AUTOMATIC1111 and other GPU
    services.
    """


for command in (
    serve,
    check,
    demo,
    submit,
    wait,
    jobs,
    job,
    explain,
    cancel,
    prioritize,
    gpus,
    drain,
    resume,
    pause,
    unpause,
    engines,
    engine_log,
    engine_restart,
    lock,
    top,
    key,
    sim_engine,
):
    program.add_command(command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run as a program. What goes wrong is one line and perhaps a hint, never a traceback."""
    sys.exit(_status(arguments))


def _status(arguments: Sequence[str] | None) -> int:
    try:
        found: object = program.main(arguments, prog_name="gpulane", standalone_mode=False)
        return found if isinstance(found, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return WRONG_USE
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "gpulane"
        return _failed(error.format_message(), f"see {command} --help", WRONG_USE)
    except click.ClickException as error:
        return _failed(error.format_message(), None, WRONG_USE)
    except (GpulaneError, BaseExceptionGroup) as error:
        return _told(error)
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except OSError as error:
        if error.errno != errno.EPIPE:
            raise
        # Whoever read our output has enough (`| head`); Python would complain at its last flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _told(error: GpulaneError | BaseExceptionGroup[BaseException]) -> int:
    """Print an error; one that came out of a task group stands alone inside it."""
    found: BaseException = error
    while len(inside := cast("tuple[BaseException, ...]", getattr(found, "exceptions", ()))) == 1:
        found = inside[0]
    if not isinstance(found, GpulaneError):
        raise error
    return _failed(found.message, found.hint, WRONG_USE if isinstance(found, ConfigError) else FAILED)


def _failed(message: str, hint: str | None, status: int) -> int:
    print(f"gpulane: {' '.join(message.split())}", file=sys.stderr)
    if hint:
        print(f"         {' '.join(hint.split())}", file=sys.stderr)
    return status
