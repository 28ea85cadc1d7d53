"""`gpulane submit`: jobs from a ComfyUI workflow or an A1111 payload."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpulane.cli.jobs import BANDS
from gpulane.cli.options import gateway_options
from gpulane.errors import ConfigError, GpulaneError

if TYPE_CHECKING:
    from gpulane.cli.api import ApiClient
    from gpulane.cli.documents import Job

STANDARD_INPUT = "-"


@click.command()
@click.argument("workflow", required=False, metavar="[WORKFLOW.json]")
@gateway_options
@click.option("--a1111", "endpoint", metavar="ENDPOINT", help="An A1111 job instead: txt2img, img2img ...")
@click.option("--payload", metavar="FILE", help="Body of the A1111 job; - is standard input.")
@click.option(
    "--set",
    "values",
    multiple=True,
    metavar="NAME=VALUE",
    help="NODE.INPUT=VALUE of a workflow (NODE: id, title or class), KEY=VALUE of a payload.",
)
@click.option("--seeds", metavar="LIST", help="A job per seed: 5, 1..5 or 3,7,9..11.")
@click.option("--band", type=click.Choice(BANDS), help="Bands go one after the other.")
@click.option("--priority", type=int, help="Order among your own jobs: higher goes first.")
@click.option("--label", "labels", multiple=True, help="A label that the GPU must have. May be repeated.")
@click.option("--max-attempts", type=click.IntRange(1, 20))
@click.option("--wait", "waits", is_flag=True, help="Wait for the ends; 1 unless all succeed.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="With --wait: fetch the files there."
)
@click.option("--json", "as_json", is_flag=True, help="Print the jobs as JSON.")
def submit(
    *,
    api: ApiClient,
    workflow: str | None,
    endpoint: str | None,
    payload: str | None,
    values: tuple[str, ...],
    seeds: str | None,
    band: str | None,
    priority: int | None,
    labels: tuple[str, ...],
    max_attempts: int | None,
    waits: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Submit a ComfyUI workflow in API format (- is standard input), or an A1111 job. Prints the jobs' ids.

    \b
    gpulane submit portrait.json --set KSampler.steps=30 --seeds 1..4 --wait --out pictures
    gpulane submit --a1111 txt2img --set prompt="a fox" --set steps=20 --wait --out pictures
    """  # noqa: D301 - click wants the backspace itself
    from gpulane.cli.documents import Job
    from gpulane.cli.output import print_json

    if band is not None and priority is not None:
        raise ConfigError("give --band or --priority, not both", hint="`gpulane prioritize` can do the rest")
    if out is not None and not waits:
        raise ConfigError("--out needs --wait")
    wishes: dict[str, object] = {"labels": labels}
    if band is not None or priority is not None:
        wishes["priority"] = band if priority is None else priority
    if max_attempts is not None:
        wishes["max_attempts"] = max_attempts
    bodies = _bodies(workflow, endpoint, payload, values, seeds)
    jobs: list[Job] = []
    try:
        for body in bodies:
            jobs.append(api.send(Job, "POST", "/gpulane/v1/jobs", {**body, **wishes}))
    except GpulaneError:
        # Those before are taken and will run: their ids must be known.
        print("".join(f"{job.id}\n" for job in jobs), end="")
        raise
    if waits:
        sys.exit(_await(api, jobs, out, as_json=as_json))
    if as_json:
        print_json(jobs)
    else:
        print("\n".join(job.id for job in jobs))


def _await(api: ApiClient, jobs: list[Job], out: Path | None, *, as_json: bool) -> int:
    from gpulane.cli.waiting import await_all

    return await_all(api, [job.id for job in jobs], out=out, as_json=as_json)


def _bodies(
    workflow: str | None,
    endpoint: str | None,
    payload: str | None,
    values: tuple[str, ...],
    seeds: str | None,
) -> list[dict[str, object]]:
    """Make the bodies of all jobs before the first is sent."""
    from gpulane.cli import workflows

    wanted = workflows.seeds_from(seeds)
    if endpoint is None:
        if workflow is None or payload is not None:
            raise ConfigError(
                "name a workflow file, or an A1111 job with --a1111 ENDPOINT and --payload or --set",
                hint="see gpulane submit --help",
            )
        base = workflows.read_workflow(_read(workflow), workflow)
        base = workflows.with_inputs(base, values)
        return [
            {"service": "comfyui", "workflow": base if seed is None else workflows.with_seed(base, seed)}
            for seed in wanted
        ]
    if workflow is not None:
        raise ConfigError("a workflow file and --a1111 exclude each other; the body's option is --payload")
    body = workflows.read_payload(_read(payload), payload) if payload else {}
    body = workflows.with_keys(body, values)
    return [
        {
            "service": "a1111",
            "endpoint": endpoint,
            "payload": body if seed is None else {**body, "seed": seed},
        }
        for seed in wanted
    ]


def _read(name: str) -> bytes:
    if name == STANDARD_INPUT:
        return sys.stdin.buffer.read()
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}") from error
