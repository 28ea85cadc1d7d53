"""`gpulane check`: looks at the settings and asks every engine, and says what is wrong and how to mend it.

It starts nothing and changes nothing: it may run beside a gateway that serves.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpulane.cli.serving import run, settings_from, settings_options

if TYPE_CHECKING:
    from gpulane.cli.findings import Finding


@click.command()
@settings_options
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def check(*, as_json: bool, **given: object) -> None:
    """Look at the settings, the data folder and the listeners, list the cards with their UUIDs, and ask every
    engine what it is.

    Ends with 1 when something is wrong with an engine, with 2 when it is with the settings.
    """
    from gpulane.cli.inspection import inspect

    settings = settings_from(**given)  # type: ignore[arg-type]  # click's values, by the same names
    config_file = given.get("config_file")
    source = str(config_file) if isinstance(config_file, Path) else "command line"
    findings = run(inspect(settings, source=source))
    _show(findings, as_json=as_json)
    sys.exit(_status_of(findings))


def _status_of(findings: tuple[Finding, ...]) -> int:
    from gpulane.cli.findings import Grade

    wrong = [finding for finding in findings if finding.grade is Grade.WRONG]
    if not wrong:
        return 0
    return 2 if any(not finding.is_engine for finding in wrong) else 1


def _show(findings: tuple[Finding, ...], *, as_json: bool) -> None:
    from gpulane.cli.findings import Grade
    from gpulane.cli.output import print_json, print_lines

    if as_json:
        print_json([finding.as_document() for finding in findings])
        return
    styles = {Grade.OK: "green", Grade.NOTE: "yellow", Grade.WRONG: "bold red"}
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        head = [(f"{finding.grade.value:6}", styles[finding.grade]), (f"{finding.subject:{width}}  ", "bold")]
        print_lines([*head, (finding.text, "")])
        for line in finding.hints:
            print_lines([(" " * (8 + width) + line, "")])
