"""`gpulane wait`, and the end of every command that waits: results fetched, one line per job, exit status."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpulane.cli.options import gateway_options, job_path
from gpulane.errors import ConfigError, GpulaneError

if TYPE_CHECKING:
    from gpulane.cli.api import ApiClient
    from gpulane.cli.documents import Artifact, Job

_UNSAFE = re.compile(r"[^\w.()+-]+")
NAME_CHARS_MAX = 150


@click.command()
@click.argument("job_ids", nargs=-1, required=True, metavar="ID...")
@gateway_options
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Fetch the files there.")
@click.option("--json", "as_json", is_flag=True, help="Print the ended jobs as JSON.")
def wait(*, api: ApiClient, job_ids: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    """Wait until jobs have ended. Ends with 1 unless all have succeeded.

    Ctrl-C ends the waiting alone; the jobs go on.
    """
    sys.exit(await_all(api, tuple(dict.fromkeys(job_ids)), out=out, as_json=as_json))


def await_all(api: ApiClient, jobs: Sequence[str], *, out: Path | None, as_json: bool) -> int:
    """Wait, fetch files, print what came of it; returns the exit status."""
    from gpulane.cli.following import show_until_ended

    if out is not None:
        _make_folder(out)
    ended, errors = show_until_ended(api, jobs)
    if len(jobs) == 1 and errors and errors[0].error is not None:
        raise errors[0].error
    lines: list[tuple[Job, list[Path]]] = []
    has_failed = bool(errors)
    for job in ended:
        files: list[Path] = []
        has_failed = has_failed or job.state != "succeeded"
        if out is not None and job.state == "succeeded":
            files, told = _fetched(api, job, out)
            has_failed = has_failed or not told
        lines.append((job, files))
    if as_json:
        _print_documents(api, ended)
    else:
        for job, files in lines:
            _print_line(job, files)
    for news in errors:
        assert news.error is not None, "listed because of it"
        print(f"gpulane: {news.job}: {news.error.message}", file=sys.stderr)
    return 1 if has_failed else 0


def fetch(api: ApiClient, job: Job, folder: Path) -> list[Path]:
    """Download the files of a result, named after the job so that none overwrites another's."""
    from gpulane.cli.documents import ArtifactList

    files: list[Path] = []
    for artifact in api.get(ArtifactList, job_path(job.id, "artifacts")).artifacts:
        target = folder / file_name(job.id, artifact)
        api.download(job_path(job.id, "artifacts", str(artifact.number)), target)
        files.append(target)
    return files


def file_name(job: str, artifact: Artifact) -> str:
    """Name a file: the engine's own name is another machine's word, and may be anything."""
    bare = _UNSAFE.sub("_", artifact.name.replace("\\", "/").rpartition("/")[2])[-NAME_CHARS_MAX:]
    return f"{job[:8]}_{artifact.number}_{bare or 'file'}"


def _fetched(api: ApiClient, job: Job, folder: Path) -> tuple[list[Path], bool]:
    try:
        return fetch(api, job, folder), True
    except GpulaneError as error:
        print(f"gpulane: {job.id}: {error.message}", file=sys.stderr)
        return [], False


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out: {folder} cannot be made: {error.strerror}") from error


def _print_line(job: Job, files: Sequence[Path]) -> None:
    from gpulane.cli.output import STYLES, print_lines
    from gpulane.cli.tables import took

    why = f": {job.error.message}" if job.error else ""
    where = f" on {job.gpu}" if job.gpu else ""
    seconds = took(job, datetime.now(UTC))
    head = [(f"{job.id} ", ""), (job.state, STYLES.get(job.state, ""))]
    print_lines([*head, (f" in {seconds}{where}{why}" if seconds else f"{where}{why}", "")])
    for file in files:
        print_lines([(f"  {file}", "")])


def _print_documents(api: ApiClient, ended: Sequence[Job]) -> None:
    """Print the gateway's own words, with fields that this program does not know."""
    from gpulane.cli.output import print_raw_json

    documents = [api.call("GET", job_path(job.id)) for job in ended]
    print_raw_json(b"[" + b",".join(documents) + b"]")
