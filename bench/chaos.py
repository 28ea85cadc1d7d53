"""A whole gateway on four shared cards while everything goes wrong that can, judged by the cards' own logs.

    python bench/chaos.py [--jobs 2000] [--seed 1] [--quick]

It fails (exit status 1) for two jobs on a card at once, an accepted job without an end, a card that is not
usable for every service at the end, and a kind of fault that struck too seldom with work in flight: never,
or in a full run less than 20 times. The seed gives the jobs and the order of the faults; the rest is the
clock's. See docs/chaos.md.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import aiohttp
import structlog
from chaos_faults import Faults
from chaos_users import Users, chat, picture, workflow
from chaos_world import ENDED, Box, World, until, world

from gpulane.testing.judge import Overlap, Verdict, judge_files

FULL_JOBS: Final = 2000
QUICK_JOBS: Final = 150
LEAST: Final = 20
"""How often each kind must have struck in a full run."""
CARDS: Final = 4
AHEAD_JOBS: Final = 30
"""Jobs may run so far ahead of the faults."""
QUIET_SECONDS: Final = 60.0
NOTICE_SECONDS: Final = 1.0
"""Until a probe, or a missing one, has shown a stranger's job."""


@dataclass(slots=True, kw_only=True)
class Report:
    """What a run came to."""

    jobs: int
    seed: int
    seconds: float = 0.0
    fired: Counter[str] = field(default_factory=Counter[str])
    ends: Counter[str] = field(default_factory=Counter[str])
    verdict: Verdict = field(default_factory=Verdict)
    strangers: list[Overlap] = field(default_factory=list[Overlap])
    """Overlaps that a stranger made, by beginning while a job of ours ran, or a moment before."""
    wrong: list[str] = field(default_factory=list[str])

    def lines(self) -> list[str]:
        found = self.verdict.as_dict()
        ends = ", ".join(f"{n} {name}" for name, n in sorted(self.ends.items()))
        rows = {
            "jobs that the gateway accepted": f"{self.ends.total()}: {ends}",
            "overlaps": len(self.verdict.overlaps),
            "doubtful overlaps": len(self.verdict.doubtful),
            "overlaps that strangers made": len(self.strangers),
            "out of memory": found["ooms"],
            "unloads": sum(n for name, n in found["intervals"].items() if name.endswith("/unload")),
            "computed more than once": found["repeated"],
            "seconds": f"{self.seconds:.0f}",
        }
        lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]
        lines += ["| fault | struck with work in flight |", "|---|---|"]
        lines += [f"| {name} | {count} |" for name, count in sorted(self.fired.items())]
        return lines


async def play(folder: Path, jobs: int, seed: int, *, each: int, cards: int = CARDS) -> Report:
    """Play one run; `each`: how often every kind of fault is fired."""
    began = time.monotonic()
    report = Report(jobs=jobs, seed=seed)
    async with world(folder, cards) as made:
        faults = Faults(made, seed, each)
        users = Users(
            made,
            jobs,
            seed,
            may_go_on=lambda n: faults.is_over or n >= jobs or n <= faults.share_done * jobs + AHEAD_JOBS,
            is_over=lambda: faults.is_over,
        )
        async with asyncio.TaskGroup() as group:
            group.create_task(users.run())
            group.create_task(_fire(faults))
        report.fired = Counter(dict.fromkeys([*faults.kinds, "lock job", "client hangs up"], 0)) + made.fired
        report.fired.update(dict.fromkeys([*faults.kinds, "lock job", "client hangs up"], 0))
        for box in made.boxes:
            await faults.mend(box)
        await _settle(made, report)
        for box in made.boxes:
            await _use(made, box, report)
        states = await made.states()
        report.ends = Counter(state for state, _ in states.values())
        lost = [job for job in made.accepted if states.get(job, ("lost", ""))[0] not in ENDED]
        report.wrong += [f"job {job} has no end" for job in lost]
        report.wrong += [f"job {job} is {state}" for job, (state, _) in states.items() if state not in ENDED]
        if users.unanswered:
            report.wrong.append(f"{users.unanswered} requests had no answer")
        logs = [Path(box.card.file) for box in made.boxes if box.card.file is not None]
        strangers = made.strangers
    report.verdict = judge_files(logs)
    _sort_out_strangers(report, strangers)
    report.seconds = time.monotonic() - began
    return report


async def _fire(faults: Faults) -> None:
    await faults.run()
    faults.is_over = True


async def _settle(made: World, report: Report) -> None:
    async def is_quiet() -> bool:
        queue = await made.get("/gpulane/v1/queue")
        gpus = await made.gpus()
        return not queue["waiting"] and all(gpu["state"] == "idle" for gpu in gpus.values())

    if not await until(is_quiet, QUIET_SECONDS, 0.1):
        for name, gpu in (await made.gpus()).items():
            report.wrong.append(f"{name} at the end: {gpu['state']} {gpu['why']} {gpu['job']}")


async def _use(made: World, box: Box, report: Report) -> None:
    """A job of each service, with every other card drained."""
    others = [other.name for other in made.boxes if other is not box]
    for name in others:
        await made.post(f"/gpulane/v1/gpus/{name}/drain")
    calls = {
        "comfyui": ("/prompt", {"prompt": workflow(10**6 + int(box.name[3:]), 1)}),
        "a1111": ("/sdapi/v1/txt2img", picture(10**6, 1)),
        "llm": ("/svc/llm/v1/chat/completions", chat(10**6, 2)),
    }
    for service, (path, body) in calls.items():
        try:
            async with asyncio.timeout(20):
                status, answer = await made.post(path, body)
                if service == "comfyui" and status == 200:
                    status = await _ended(made, answer["prompt_id"])
        except (TimeoutError, aiohttp.ClientError) as error:
            status, answer = 0, repr(error)
        if status != 200:
            report.wrong.append(f"{box.name} is not usable for {service}: {status} {answer}")
    for name in others:
        await made.post(f"/gpulane/v1/gpus/{name}/resume")


async def _ended(made: World, job: str) -> int:
    while True:
        state = (await made.get(f"/gpulane/v1/jobs/{job}"))["state"]
        if state in ENDED:
            return 200 if state == "succeeded" else 500
        await asyncio.sleep(0.05)


def _sort_out_strangers(report: Report, strangers: set[str]) -> None:
    """Nobody can keep a stranger from beginning; beginning while a stranger's job is seen is ours."""
    for overlap in [*report.verdict.overlaps]:
        first, second = overlap.first, overlap.second
        is_late = first.job in strangers and second.begin - first.begin < NOTICE_SECONDS
        if second.job in strangers or is_late:
            report.verdict.overlaps.remove(overlap)
            report.strangers.append(overlap)


def judged(report: Report, least: int) -> list[str]:
    """Returns what is wrong: nothing, one hopes."""
    found = list(report.wrong)
    for overlap in report.verdict.overlaps:
        a, b = overlap.first, overlap.second
        found.append(
            f"overlap on {Path(overlap.card).stem}, {overlap.seconds:.3f} s: {a.service} {a.kind} {a.job}"
            f" at {a.begin:.3f}-{a.end:.3f} ({a.outcome}), {b.service} {b.kind} {b.job}"
            f" at {b.begin:.3f}-{b.end:.3f} ({b.outcome})"
        )
    found += [f"unreadable: {line}" for line in report.verdict.unreadable]
    return found + [
        f"struck {n} times, wanted {least}: {name}" for name, n in report.fired.items() if n < least
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=FULL_JOBS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_JOBS} jobs, every fault twice")
    parser.add_argument("--log", action="store_true", help="print what the gateway logs, too")
    options = parser.parse_args()
    if not options.log:
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    jobs = QUICK_JOBS if options.quick else options.jobs
    each = max(1, 22 * jobs // FULL_JOBS)
    with tempfile.TemporaryDirectory() as name:
        report = asyncio.run(play(Path(name), jobs, options.seed, each=each))
    print(f"seed {report.seed}\n")
    print("\n".join(report.lines()))
    wrong = judged(report, LEAST if jobs >= FULL_JOBS else 1)
    for line in wrong:
        print(f"FAILED {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
