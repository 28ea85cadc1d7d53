"""`python -m gpulane.sim.chaos --jobs 20000 --seed N`: a chaos run under virtual time, its report, and a
verdict as exit status. A third of the jobs runs under each policy for leaking engines.

It fails (1) for an overlap by the cards' own logs, a leaked slot, a job without its one end, a card that is
not idle at the end, or a fault that struck too seldom with work in flight to prove anything.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Final

from gpulane.sim.chaos_handoff import WhenLeaking
from gpulane.sim.chaos_run import ChaosReport, run_chaos
from gpulane.sim.dice import Fault

POLICIES: Final[tuple[WhenLeaking, ...]] = ("run", "skip", "restart")
FULL_JOBS: Final = 20_000
"""From so many jobs on each fault must have struck `LEAST` times."""
LEAST: Final = 20


def runs(jobs: int, seed: int) -> list[ChaosReport]:
    """Plays one run per policy; together they have so many jobs."""
    shares = [jobs // len(POLICIES) + (number < jobs % len(POLICIES)) for number in range(len(POLICIES))]
    return [
        run_chaos(seed * len(POLICIES) + number, share, policy)
        for number, (policy, share) in enumerate(zip(POLICIES, shares, strict=True))
        if share
    ]


def fired(reports: Sequence[ChaosReport]) -> dict[Fault, int]:
    return {fault: sum(report.fired[fault] for report in reports) for fault in Fault}


def faults_of(reports: Sequence[ChaosReport], least: int) -> list[str]:
    """Returns what is wrong with the runs: nothing, one hopes."""
    found = [f"overlap: {row}" for report in reports for row in report.overlaps]
    for report in reports:
        if report.leaked_slots:
            found.append(f"seed {report.seed}: {report.leaked_slots} slots leaked")
        if report.open_jobs:
            found.append(f"seed {report.seed}: {report.open_jobs} jobs without their one end")
        if report.lost_gpus:
            found.append(f"seed {report.seed}: {report.lost_gpus} cards not idle at the end")
    seldom = [fault for fault, count in fired(reports).items() if count < least]
    return found + [f"struck fewer than {least} times: {fault.value}" for fault in seldom]


def report_lines(reports: Sequence[ChaosReport]) -> list[str]:
    ends: dict[str, int] = {}
    for report in reports:
        for state, count in report.ends:
            ends[state] = ends.get(state, 0) + count
    seconds = sum(report.seconds for report in reports)
    jobs = sum(ends.values())
    return [
        f"{jobs} jobs in {seconds:.0f} virtual seconds: " + ", ".join(f"{n} {s}" for s, n in ends.items()),
        f"hand-offs with an unload {sum(r.handoffs for r in reports)}",
        f"overlaps {sum(len(r.overlaps) for r in reports)}",
        f"leaked slots {sum(r.leaked_slots for r in reports)}",
        f"jobs without their one end {sum(r.open_jobs for r in reports)}",
        f"cards not idle at the end {sum(r.lost_gpus for r in reports)}",
        "faults that struck with work in flight:",
        *(f"  {count:6}  {fault.value}" for fault, count in fired(reports).items()),
        f"digests {' '.join(f'{report.digest:08x}' for report in reports)}",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gpulane.sim.chaos", description=__doc__)
    parser.add_argument("--jobs", type=int, default=FULL_JOBS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--least", type=int, default=None, help=f"default: {LEAST} from {FULL_JOBS} jobs on")
    chosen = parser.parse_args(arguments)
    least = chosen.least if chosen.least is not None else LEAST * (chosen.jobs >= FULL_JOBS)
    reports = runs(chosen.jobs, chosen.seed)
    for line in report_lines(reports):
        print(line)
    wrong = faults_of(reports, least)
    for line in wrong:
        print(f"FAILED {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
