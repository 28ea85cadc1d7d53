"""`python -m tests.drive`: runs the flows against the servers named, prints a table, writes the report.

Exit status 0 when none failed, 1 when one did, 2 when a server cannot be used at all.
"""

import argparse
import asyncio
import datetime as dt
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import aiohttp

from tests.drive.flows import FLOWS, run_flow
from tests.drive.ground import Ground, ground
from tests.drive.report import Outcome, document

REPORTS = Path(__file__).resolve().parents[2] / "docs" / "drive"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parsed(argv)
    today = dt.datetime.now(dt.UTC).date().isoformat()
    folder = Path(tempfile.mkdtemp(prefix="gpulane-drive-"))
    print(f"logs and pictures: {folder}", flush=True)
    try:
        outcomes, gpus = asyncio.run(drive(arguments, folder))
    except (OSError, aiohttp.ClientError, AssertionError) as error:
        print(f"the drive cannot begin: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    report = arguments.report or REPORTS / f"{today}.md"
    if not arguments.only:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(document(outcomes, date=today, version=version("gpulane"), gpus=gpus))
    failed = [outcome for outcome in outcomes if outcome.result == "FAIL"]
    print(f"{len(outcomes)} flows, {len(failed)} failed")
    return 1 if failed else 0


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="drive", description=__doc__)
    parser.add_argument("--comfyui-url", action="append", default=[], metavar="URL", help="may be repeated")
    parser.add_argument(
        "--a1111-url", action="append", default=[], metavar="URL", help="the first of each share a GPU"
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="default: docs/drive/YYYY-MM-DD.md")
    parser.add_argument("--pace", type=float, default=1.0, help="below 1: shorter work")
    parser.add_argument("--no-browser", action="store_true", help="leave out the flows in Chromium")
    parser.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="flows so named; no report"
    )
    arguments = parser.parse_args(argv)
    if not arguments.comfyui_url and not arguments.a1111_url:
        parser.error("name at least one server: --comfyui-url URL or --a1111-url URL")
    arguments.comfyui_url = [url.rstrip("/") for url in arguments.comfyui_url]
    arguments.a1111_url = [url.rstrip("/") for url in arguments.a1111_url]
    return arguments


async def drive(arguments: argparse.Namespace, folder: Path) -> tuple[list[Outcome], list[str]]:
    outcomes: list[Outcome] = []
    chosen = [f for f in FLOWS if not arguments.only or any(text in f.name for text in arguments.only)]
    async with ground(folder, arguments.comfyui_url, arguments.a1111_url, arguments.pace) as made:
        gpus = await gpu_lines(made)
        for flow in chosen:
            outcome = await run_flow(flow, made, with_browser=not arguments.no_browser)
            print(outcome.line, flush=True)
            outcomes.append(outcome)
        status = await made.gateway.stop()
        if status != 0:
            seen = f"the gateway ended with exit status {status}"
            last = {"group": "gateway", "name": "stop", "purpose": "SIGTERM ends it with 0."}
            outcomes.append(Outcome(**last, result="FAIL", seconds=0.0, seen=seen))
            print(outcomes[-1].line, flush=True)
    return outcomes, gpus


async def gpu_lines(made: Ground) -> list[str]:
    """One line for each GPU: what the gateway found there."""
    return [
        f"{gpu['name']}: "
        + " and ".join(f"{e['service']} {e['version'] or ''}".strip() for e in gpu["engines"])
        for gpu in await made.gpus()
    ]


if __name__ == "__main__":
    sys.exit(main())
