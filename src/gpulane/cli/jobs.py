"""`gpulane jobs | job | explain | cancel | prioritize`: looks at jobs and changes them."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from gpulane.cli.options import gateway_options, job_path, json_option
from gpulane.errors import GpulaneError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpulane.cli.api import ApiClient

STATES = ("queued", "running", "waiting_retry", "succeeded", "failed", "cancelled")
BANDS = ("interactive", "normal", "batch")
LIMIT_MAX = 500


@click.command()
@gateway_options
@click.option("--state", "states", type=click.Choice(STATES), multiple=True, help="May be repeated.")
@click.option("--user", help="An account; operators see everybody's jobs.")
@click.option("--service", type=click.Choice(["comfyui", "a1111", "http"]))
@click.option("--limit", type=click.IntRange(1, LIMIT_MAX), default=20, show_default=True)
@json_option
def jobs(
    *,
    api: ApiClient,
    states: tuple[str, ...],
    user: str | None,
    service: str | None,
    limit: int,
    as_json: bool,
) -> None:
    """List jobs, newest first."""
    from gpulane.cli.documents import JobList
    from gpulane.cli.output import print_raw_json, print_rows
    from gpulane.cli.tables import job_rows

    query = {"limit": str(limit), "state": ",".join(states), "user": user or "", "service": service or ""}
    given = {name: value for name, value in query.items() if value}
    if as_json:
        print_raw_json(api.call("GET", f"/gpulane/v1/jobs{_query(given)}"))
    else:
        found = api.get(JobList, "/gpulane/v1/jobs", given)
        print_rows(job_rows(found.jobs, now=datetime.now(UTC)))


@click.command()
@click.argument("job_id", metavar="ID")
@gateway_options
@json_option
def job(*, api: ApiClient, job_id: str, as_json: bool) -> None:
    """Show all that is known of a job."""
    from gpulane.cli.documents import Job
    from gpulane.cli.output import print_lines, print_raw_json
    from gpulane.cli.tables import job_facts

    if as_json:
        print_raw_json(api.call("GET", job_path(job_id)))
        return
    facts = job_facts(api.get(Job, job_path(job_id)), now=datetime.now(UTC))
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        print_lines([(f"{name:{width}}  ", "bold"), (value, "")])


@click.command()
@click.argument("job_id", metavar="ID")
@gateway_options
@click.option("--json", "as_json", is_flag=True, help="Print place and reason as JSON.")
def explain(*, api: ApiClient, job_id: str, as_json: bool) -> None:
    """Say why a job waits, at which place, and when it is likely to start."""
    from gpulane.cli.documents import Job
    from gpulane.cli.output import print_json
    from gpulane.cli.tables import explanation

    found = api.get(Job, job_path(job_id))
    if as_json:
        print_json(
            {
                "id": found.id,
                "state": found.state,
                "position": found.position,
                "reason": found.reason,
                "estimated_start_seconds": found.estimated_start_seconds,
                "error": found.error,
            }
        )
    else:
        print(explanation(found))


@click.command()
@click.argument("job_ids", nargs=-1, required=True, metavar="ID...")
@gateway_options
def cancel(*, api: ApiClient, job_ids: tuple[str, ...]) -> None:
    """Cancel exactly these jobs, waiting or running."""
    from gpulane.cli.documents import Job

    def cancel_one(job_id: str) -> str:
        found = api.send(Job, "DELETE", job_path(job_id))
        return f"{found.id} {'cancelled' if found.is_ended else 'is being stopped'}"

    _each(job_ids, cancel_one)


@click.command()
@click.argument("job_ids", nargs=-1, required=True, metavar="ID...")
@gateway_options
@click.option("--band", type=click.Choice(BANDS), help="Bands go one after the other.")
@click.option("--priority", type=int, help="Order among your own jobs of a band: higher goes first.")
def prioritize(*, api: ApiClient, job_ids: tuple[str, ...], band: str | None, priority: int | None) -> None:
    """Change the priority of waiting jobs."""
    from gpulane.cli.documents import Job

    wishes = [wish for wish in (band, priority) if wish is not None]
    if not wishes:
        raise click.UsageError("say --band or --priority, or both", click.get_current_context())

    def change(job_id: str) -> str:
        found = [api.send(Job, "PATCH", job_path(job_id), {"priority": wish}) for wish in wishes][-1]
        return f"{found.id} {found.band} {found.priority}, place {found.position or '-'}"

    _each(job_ids, change)


def _each(job_ids: tuple[str, ...], action: Callable[[str], str]) -> None:
    """Do it for every job, and fail in the end if it failed for one. With one alone, as a usual error."""
    if len(job_ids) == 1:
        print(action(job_ids[0]))
        return
    has_failed = False
    for job_id in job_ids:
        try:
            print(action(job_id))
        except GpulaneError as error:
            has_failed = True
            print(f"gpulane: {job_id}: {error.message}", file=sys.stderr)
    if has_failed:
        sys.exit(1)


def _query(given: dict[str, str]) -> str:
    from urllib.parse import urlencode

    return f"?{urlencode(given)}" if given else ""
