"""Writes a trace run's report as the page docs/trace-run.md; it computes no figure of its own but shares."""

from __future__ import annotations

import textwrap
from typing import Any, Final

WIDTH: Final = 110


def paragraph(*pieces: str) -> str:
    return textwrap.fill(" ".join(pieces), WIDTH)


EXACTLY_ONCE: Final = paragraph(
    '"Exactly once" is held against three witnesses. Every request got as',
    "many pictures as it asked for, with",
    "its own seeds in their PNG text. The gateway's list has as many",
    "succeeded jobs as there were requests, and",
    "no others. The cards' logs, judged by a program of its own (`gpulane.testing.judge`), have the same job",
    "ids, each once, on one card.",
)


def as_markdown(document: dict[str, Any]) -> str:
    """The report as a page."""
    parts = (summary(document), what_was_sent(document), what_came(document))
    return "# A production trace through the gateway\n\n" + "\n".join(parts)


def summary(document: dict[str, Any]) -> str:
    verdict = "Every target was reached."
    if document["missed"]:
        verdict = "**Missed:**\n\n" + "".join(f"- {line}\n" for line in document["missed"])
    machine = document["machine"]
    return f"""{verdict}

`{document["command"]}` (`make trace`), {document["date"]}, commit {document["commit"]},
{machine}. The same figures as JSON: [trace-run.json](trace-run.json).
"""


def what_was_sent(document: dict[str, Any]) -> str:
    window, services = document["window"], document["services"]
    factor, was = window["compression"], window["seconds"]
    rows = "\n".join(
        f"| {name} | {entry['accounts']} | {entry['requests']} | {entry['pictures']} | {entry['errors']} |"
        for name, entry in document["clients"].items()
    )
    sent = paragraph(
        f"Rows {window['first_row']} to {window['last_row']} of `{window['trace']}`: the GenTD26 trace of a",
        "text-to-image service (alibaba/clusterdata, cluster-trace-v2026-GenAI). The requests come in their",
        f"order and with their gaps, {factor:g} times faster, within",
        f"{was / factor:.0f} s instead of {was:.0f} s:",
        f"{document['requests']} requests for {document['pictures_wanted']} pictures over",
        f"{document['checkpoints']} checkpoints, from {document['accounts']}",
        "accounts. Each user of the trace is an",
        "account with a key of its own, and keeps to one client. A1111 got",
        f"{services.get('a1111', 0)} requests,",
        f"ComfyUI {services.get('comfyui', 0)}. All clients are libraries that",
        "nobody here wrote, used as they are,",
        "each in a process of its own:",
    )
    chosen = paragraph(
        "Steps, pictures and checkpoints are the trace's. A picture's size is",
        "chosen so that a card of speed 1",
        "computes as long as the trace says the request took:",
        f"{document['asked_service_seconds']} s in all, of",
        f"{document['trace_service_seconds']:.0f} s in the trace (sizes end at",
        "2048 x 2048). The engines' time is",
        f"compressed by the same factor; the {window['gpus']} cards have speed",
        f"{window['card_speed']:g}, since at",
        "speed 1 four cards keep up with this trace.",
        f"{document['image_to_image']} requests are image-to-image; the",
        "other rows of that kind go out as text-to-image, since two of the",
        "three ComfyUI clients cannot upload a",
        "picture. LoRAs are left out. comfyapi fetches the first picture of a batch and no other.",
    )
    return f"""## What was sent

{sent}

| client | accounts | requests | pictures | errors |
|---|---|---|---|---|
{rows}

{chosen}
"""


def what_came(document: dict[str, Any]) -> str:
    window, queue, judged = document["window"], document["queue"], document["judge"]
    cpu, seconds = document["cpu_seconds"], document["run_seconds"]
    share = 100 * cpu["gateway"] / max(seconds, 0.1)
    computed = counts(judged["computed_jobs"])
    waiting = f"{queue['waiting_max']} (mean {queue['waiting_mean']}, {queue['samples']} samples)"
    used = f"{cpu['gateway']} s, {cpu['clients']} s, {cpu['engines']} s"
    busy = ", ".join(f"{100 * card / max(seconds, 0.1):.0f} %" for card in judged["busy_seconds"].values())
    spreads = "\n".join(
        f"| {name} | {entry['p50']} | {entry['p95']} | {entry['max']} |"
        for name, entry in document["wait_seconds"].items()
    )
    errors = "".join(f"\n- {line}" for line in document["errors"])
    return f"""## What came of it

| | |
|---|---|
| overlapping jobs on a card, by the cards' logs | {judged["overlaps"]} |
| jobs computed more than once | {judged["repeated"]} |
| jobs computed, by the cards' logs | {computed} |
| jobs, by the gateway's list | {counts(document["jobs"])} |
| most attempts of one job | {document["attempts_max"]} |
| most jobs waiting at one time | {waiting} |
| model loads | {document["loads"]} for {document["computed"]} jobs |
| changes of service on a card | {document["service_switches"]} |
| duration | {seconds} s, in which the cards were busy {busy} |
| CPU of gateway, clients, engines | {used} |
| of one core, the gateway used | {share:.0f} % |
| a client was late with its request by at most | {document["late_seconds_max"]} s |

Seconds from acceptance to start, as they passed (times {window["compression"]:g}: seconds of the trace):

| service | p50 | p95 | max |
|---|---|---|---|
{spreads}

{EXACTLY_ONCE}
{errors}"""


def counts(by_name: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in by_name.items()) or "none"
