"""Holds what a trace run gathered against its targets; `trace_page.py` writes it as a page.

It trusts three witnesses that know nothing of each other: the clients' pictures, the gateway's list of jobs
and the cards' logs as judged. It starts nothing and decides nothing but what was missed.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import platform
import statistics
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, Self

from trace_input import ROOT, Ask, Row, service_seconds

MICROSECONDS: Final = 1e6
SHOWN: Final = 10
"""How many of one sort of mistake are named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What a run must reach."""

    requests: int = 500
    compression_max: float = 30.0
    service_share: float = 0.40
    accounts: int = 20
    depth: int = 50
    comfyui_clients: int = 2

    @classmethod
    def quick(cls) -> Self:
        """A run of seconds shows that all fits together; it is too short for a queue."""
        return cls(requests=1, compression_max=1000.0, depth=0)


@dataclass(slots=True, kw_only=True)
class Run:
    """All that was gathered."""

    asks: list[Ask]
    outcomes: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """From the clients, one a request."""
    depths: list[tuple[float, int, int]] = field(default_factory=list[tuple[float, int, int]])
    """(seconds, waiting, running) as the gateway's API said."""
    jobs: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """From the gateway's API, after the last client had ended."""
    cards: list[list[dict[str, Any]]] = field(default_factory=list[list[dict[str, Any]]])
    """The lines of each card's log."""
    verdict: dict[str, Any] = field(default_factory=dict[str, Any])
    seconds: float = 0.0
    gateway_cpu_seconds: float = 0.0
    clients_cpu_seconds: float = 0.0
    engines_cpu_seconds: float = 0.0
    gateway_exit: int | None = None
    gateway_log: str = ""


def report(
    run: Run, *, rows: Sequence[Row], arguments: argparse.Namespace, targets: Targets
) -> dict[str, Any]:
    """Everything that is worth keeping, as JSON."""
    services = Counter(ask.service for ask in run.asks)
    computed = [line for card in run.cards for line in card if is_begin(line, "compute")]
    loads = [line for card in run.cards for line in card if is_begin(line, "load")]
    document: dict[str, Any] = {
        "date": dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command_line(arguments),
        "commit": commit(),
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}, {platform.system()}",
        "window": {
            "trace": arguments.trace.name,
            "first_row": rows[0].number,
            "last_row": rows[-1].number,
            "seconds": rows[-1].arrival_seconds - rows[0].arrival_seconds,
            "compression": arguments.compress,
            "card_speed": arguments.speed,
            "gpus": len(run.cards),
        },
        "requests": len(run.asks),
        "pictures_wanted": sum(ask.images for ask in run.asks),
        "services": dict(services),
        "accounts": len({ask.account for ask in run.asks}),
        "checkpoints": len({ask.checkpoint for ask in run.asks}),
        "clients": clients(run),
        "image_to_image": sum(ask.is_image_to_image for ask in run.asks),
        "trace_service_seconds": sum(row.seconds for row in rows),
        "asked_service_seconds": round(sum(service_seconds(ask) for ask in run.asks)),
        "queue": {
            "waiting_max": max((waiting for _, waiting, _ in run.depths), default=0),
            "waiting_mean": round(statistics.fmean(waiting for _, waiting, _ in run.depths), 1),
            "samples": len(run.depths),
        },
        "wait_seconds": {name: spread(waits(run, name)) for name in ("a1111", "comfyui", "both")},
        "loads": len(loads),
        "service_switches": sum(service_switches(card) for card in run.cards),
        "computed": len(computed),
        "jobs": dict(Counter(f"{job['service']}/{job['state']}" for job in run.jobs)),
        "attempts_max": max((len(job["attempts"]) for job in run.jobs), default=0),
        "judge": run.verdict,
        "run_seconds": round(run.seconds, 1),
        "cpu_seconds": {
            "gateway": round(run.gateway_cpu_seconds, 1),
            "clients": round(run.clients_cpu_seconds, 1),
            "engines": round(run.engines_cpu_seconds, 1),
        },
        "late_seconds_max": round(max((o["late_seconds"] for o in run.outcomes), default=0.0), 2),
        "errors": [f"row {o['row']}: {o['error']}" for o in run.outcomes if o["error"]][:SHOWN],
    }
    document["missed"] = [*missed(document, targets), *not_exactly_once(run)]
    return document


def clients(run: Run) -> dict[str, dict[str, int]]:
    """Counts by client library."""
    by_row = {ask.row: ask for ask in run.asks}
    counts: dict[str, dict[str, int]] = {}
    for ask in run.asks:
        entry = counts.setdefault(ask.client, {"accounts": 0, "requests": 0, "pictures": 0, "errors": 0})
        entry["requests"] += 1
    for name, entry in counts.items():
        entry["accounts"] = len({ask.account for ask in run.asks if ask.client == name})
    for outcome in run.outcomes:
        entry = counts[by_row[outcome["row"]].client]
        entry["pictures"] += len(outcome["pictures"])
        entry["errors"] += outcome["error"] is not None
    return counts


def missed(document: dict[str, Any], targets: Targets) -> list[str]:
    """The targets that this run does not reach."""
    services, requests = document["services"], document["requests"]
    comfyui_clients = sum(name != "webuiapi" for name in document["clients"])
    verdict = document["judge"]
    claims = {
        f"{requests} requests, wanted {targets.requests}": requests >= targets.requests,
        f"compressed {document['window']['compression']} times": document["window"]["compression"]
        <= targets.compression_max,
        f"services {services}": all(
            services.get(name, 0) >= targets.service_share * requests for name in ("a1111", "comfyui")
        ),
        f"{document['accounts']} accounts": document["accounts"] >= targets.accounts,
        f"queue depth {document['queue']['waiting_max']}": document["queue"]["waiting_max"] >= targets.depth,
        f"{comfyui_clients} ComfyUI clients": comfyui_clients >= targets.comfyui_clients,
        "overlaps on a card": verdict["overlaps"] == verdict["doubtful"] == verdict["unreadable"] == 0,
        "jobs computed twice": verdict["repeated"] == 0,
        "intervals without an end": verdict["unfinished"] == 0,
        "out of memory": verdict["ooms"] == 0,
        "clients' errors": not document["errors"],
    }
    return [claim for claim, holds in claims.items() if not holds]


def not_exactly_once(run: Run) -> list[str]:
    """Where the clients' pictures, the gateway's jobs and the cards' logs do not tell one story."""
    found = [*wrong_pictures(run), *wrong_jobs(run)]
    if run.gateway_exit != 0:
        found.append(f"the gateway ended with {run.gateway_exit}")
    return found


def wrong_pictures(run: Run) -> list[str]:
    """Each request has one outcome, and exactly the pictures it asked for, with its own seeds."""
    outcomes = Counter(outcome["row"] for outcome in run.outcomes)
    found = [f"row {ask.row}: {outcomes[ask.row]} outcomes" for ask in run.asks if outcomes[ask.row] != 1]
    by_row = {outcome["row"]: outcome for outcome in run.outcomes}
    for ask in run.asks:
        pictures = by_row.get(ask.row, {"pictures": []})["pictures"]
        seeds = [picture["seed"] for picture in pictures]
        names = {picture["name"] for picture in pictures}
        if seeds != expected_seeds(ask) or len(names) != len(pictures):
            found.append(f"row {ask.row} ({ask.client}): seeds {seeds}, wanted {expected_seeds(ask)}")
    return found[:SHOWN]


def expected_seeds(ask: Ask) -> list[int]:
    """A1111 counts up in a batch, ComfyUI's graph names one seed; comfyapi fetches the first picture only."""
    match ask.client:
        case "webuiapi":
            return [ask.seed + number for number in range(ask.images)]
        case "comfyapi":
            return [ask.seed]
        case "comfy-api-simplified" | "comfy-commander":
            return [ask.seed] * ask.images


def wrong_jobs(run: Run) -> list[str]:
    """As many jobs as requests, all of them succeeded, and each computed by exactly one card, once."""
    found: list[str] = []
    for service in ("a1111", "comfyui"):
        wanted = sum(ask.service == service for ask in run.asks)
        jobs = {job["id"] for job in run.jobs if job["service"] == service and job["state"] == "succeeded"}
        ended = Counter(
            line["job"]
            for card in run.cards
            for line in card
            if line["event"] == "job" and line["service"] == service and line["computed"]
        )
        if len(jobs) != wanted:
            found.append(f"{service}: {len(jobs)} succeeded jobs for {wanted} requests")
        if set(ended) != jobs:
            found.append(
                f"{service}: {len(set(ended) ^ jobs)} jobs are not both in the gateway and on a card"
            )
        found += [f"{service}: {job} computed {times} times" for job, times in ended.items() if times != 1]
    found += [f"job {job['id']} is {job['state']}" for job in run.jobs if job["state"] != "succeeded"][:SHOWN]
    return found[: 2 * SHOWN]


def is_begin(line: dict[str, Any], kind: str) -> bool:
    return line["event"] == "begin" and line["kind"] == kind


def service_switches(card: list[dict[str, Any]]) -> int:
    """How often the next job on a card was another service's."""
    order = [line["service"] for line in card if is_begin(line, "compute")]
    return sum(one != other for one, other in pairwise(order))


def waits(run: Run, service: str) -> list[float]:
    """Seconds from acceptance to start, as the gateway tells."""
    return [
        seconds_between(job["created_at"], job["started_at"])
        for job in run.jobs
        if job["started_at"] is not None and service in {"both", job["service"]}
    ]


def seconds_between(first: str, second: str) -> float:
    one, other = dt.datetime.fromisoformat(first), dt.datetime.fromisoformat(second)
    return (other - one).total_seconds()


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values) or [0.0]
    at = {"p50": 0.5, "p95": 0.95, "max": 1.0}
    return {name: round(ordered[int(share * (len(ordered) - 1))], 2) for name, share in at.items()}


def command_line(arguments: argparse.Namespace) -> str:
    quick = (
        " --quick" if arguments.quick else f" --compress {arguments.compress:g} --speed {arguments.speed:g}"
    )
    return f"python bench/trace_run.py --requests {arguments.requests}{quick}"


def commit() -> str:
    """The commit that was tried, when git is there to tell."""
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return "unknown"
    return told.stdout.strip() or "unknown"
