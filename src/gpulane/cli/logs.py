"""Sets logging up for the whole process: lines for people, or JSON for machines; one event per line, on
standard error.

Tracebacks never show local variables: those may hold keys and prompts.
"""

from __future__ import annotations

import logging
import sys

import structlog

from gpulane.config.settings import LogSettings


def set_up_logs(settings: LogSettings) -> None:
    """Configure our own log and that of the libraries alike."""
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    first: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[structlog.typing.Processor]
    if settings.format == "json":
        last = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        last = [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            )
        ]
    structlog.configure(
        processors=[*first, *last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=_make_printer,
        cache_logger_on_first_use=True,
    )
    lines = logging.StreamHandler(sys.stderr)
    without_meta = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    lines.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=first, processors=[without_meta, *last])
    )
    logging.basicConfig(level=max(level, logging.WARNING), handlers=[lines], force=True)


class _Printer:
    """Prints to whatever standard error is now: loggers are kept for the life of the process, a stream may
    not be.
    """

    def msg(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)

    debug = info = warning = error = critical = exception = fatal = log = msg


def _make_printer(*_: object) -> _Printer:
    return _Printer()
