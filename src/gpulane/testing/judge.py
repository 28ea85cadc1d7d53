"""Reads the logs of simulated cards and says whether two jobs ever ran on one of them at once.

It knows nothing but the log's lines: it imports nothing of this project, so that no mistake of the gateway
can hide in it. Run as `python -m gpulane.testing.judge FILE...`; it ends with 1 when it found an overlap or a
line it cannot read.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

OCCUPYING: Final = frozenset({"compute", "load"})
"""The kinds of interval that no two jobs may share a card for."""

LOST: Final = "lost"
"""Outcome of an interval that ended with its engine, at a known time."""

LOST_SOMEWHEN: Final = "lost_somewhen"
"""Outcome of one that was open when the engine started anew, or when the log ended."""

SHOWN: Final = 20
"""How many findings of one sort are printed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A stretch of time in which an engine used the card."""

    id: str
    kind: str
    engine: str
    service: str
    job: str
    model: str | None
    begin: float
    end: float
    outcome: str
    """What the engine wrote, or `LOST` or `LOST_SOMEWHEN` when it never wrote an end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Two jobs on one card at the same time."""

    card: str
    first: Interval
    second: Interval
    seconds: float
    is_certain: bool
    """False when one of the two lost its engine and only the engine's next start bounds its end."""


@dataclass(slots=True, kw_only=True)
class Verdict:
    """All that the logs say."""

    overlaps: list[Overlap] = field(default_factory=list[Overlap])
    doubtful: list[Overlap] = field(default_factory=list[Overlap])
    """Overlaps with an interval whose engine died: it may have ended long before."""
    unfinished: list[tuple[str, Interval]] = field(default_factory=list[tuple[str, Interval]])
    """(card, interval) without an end line: the engine died, or still computes."""
    repeated: dict[str, int] = field(default_factory=dict[str, int])
    """Jobs that were computed to a good end more than once, over all cards, and how often."""
    unreadable: list[str] = field(default_factory=list[str])
    jobs: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    """Ended jobs by (service, outcome)."""
    intervals: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])
    """Intervals by (service, kind)."""
    computed: dict[str, Counter[str]] = field(default_factory=dict[str, Counter[str]])
    """By service: how often each job was computed to a good end."""
    ooms: int = 0
    busy_seconds: dict[str, float] = field(default_factory=dict[str, float])
    """Seconds in which a card computed or loaded."""

    @property
    def is_clean(self) -> bool:
        return not self.overlaps and not self.unreadable

    def as_dict(self) -> dict[str, Any]:
        """The counts, for reports."""
        return {
            "overlaps": len(self.overlaps),
            "doubtful": len(self.doubtful),
            "unfinished": len(self.unfinished),
            "repeated": len(self.repeated),
            "unreadable": len(self.unreadable),
            "ooms": self.ooms,
            "jobs": {f"{service}/{outcome}": n for (service, outcome), n in sorted(self.jobs.items())},
            "intervals": {f"{service}/{kind}": n for (service, kind), n in sorted(self.intervals.items())},
            "computed_jobs": {service: len(jobs) for service, jobs in sorted(self.computed.items())},
            "busy_seconds": {card: round(seconds, 3) for card, seconds in sorted(self.busy_seconds.items())},
        }


def judge_files(files: Iterable[Path]) -> Verdict:
    """Judge the logs of several cards together; each file is one card."""
    return judge_logs({str(file): file.read_text().splitlines() for file in files})


def judge_logs(logs: Mapping[str, Iterable[str]]) -> Verdict:
    """Judge logs given as lines by card."""
    verdict = Verdict()
    for card, lines in logs.items():
        intervals = _read_card(card, lines, verdict)
        for overlap in _overlaps(card, intervals):
            (verdict.overlaps if overlap.is_certain else verdict.doubtful).append(overlap)
        verdict.busy_seconds[card] = _busy_seconds(intervals)
        for interval in intervals:
            verdict.intervals[interval.service, interval.kind] += 1
            if interval.kind == "compute" and interval.outcome == "ok":
                verdict.computed.setdefault(interval.service, Counter())[interval.job] += 1
    for jobs in verdict.computed.values():
        verdict.repeated.update({job: times for job, times in jobs.items() if times > 1})
    return verdict


def _read_card(card: str, lines: Iterable[str], verdict: Verdict) -> list[Interval]:
    """Pair begin and end lines by the interval's id; an engine's fall or next start ends what it left."""
    intervals: list[Interval] = []
    open_begins: dict[str, dict[str, Any]] = {}
    last = 0.0

    def close(begin: dict[str, Any], end: float, outcome: str) -> Interval:
        interval = Interval(
            id=begin["interval"],
            kind=begin["kind"],
            engine=begin["engine"],
            service=begin["service"],
            job=begin["job"],
            model=begin["model"],
            begin=begin["mono"],
            end=end,
            outcome=outcome,
        )
        intervals.append(interval)
        return interval

    def lose(engine: str | None, end: float, outcome: str) -> None:
        for interval_id, begin in list(open_begins.items()):
            if engine is None or begin["engine"] == engine:
                verdict.unfinished.append((card, close(open_begins.pop(interval_id), end, outcome)))

    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            last = max(last, record["mono"])
            match record["event"]:
                case "begin":
                    open_begins[record["interval"]] = record
                case "end":
                    close(open_begins.pop(record["interval"]), record["mono"], record["outcome"])
                case "engine_down" | "engine_lost":
                    lose(record["engine"], record["mono"], LOST)
                case "engine_up":
                    lose(record["engine"], record["mono"], LOST_SOMEWHEN)
                case "job":
                    verdict.jobs[record["service"], record["outcome"]] += 1
                case "oom":
                    verdict.ooms += 1
                case "vram":
                    pass
                case unknown:
                    verdict.unreadable.append(f"{card}:{number}: unknown event {unknown!r}")
        except (ValueError, KeyError, TypeError) as error:
            verdict.unreadable.append(f"{card}:{number}: {type(error).__name__} {error}")
    lose(None, last, LOST_SOMEWHEN)
    return intervals


def _overlaps(card: str, intervals: list[Interval]) -> Iterator[Overlap]:
    """Every pair of different jobs that occupied the card at once, by one sweep over the begins."""
    occupying = sorted((i for i in intervals if i.kind in OCCUPYING), key=lambda i: (i.begin, i.end))
    running: list[Interval] = []
    for interval in occupying:
        running = [other for other in running if other.end > interval.begin]
        for other in running:
            seconds = min(other.end, interval.end) - interval.begin
            if other.job != interval.job and seconds > 0:
                certain = LOST_SOMEWHEN not in (other.outcome, interval.outcome)
                yield Overlap(card=card, first=other, second=interval, seconds=seconds, is_certain=certain)
        running.append(interval)


def _busy_seconds(intervals: list[Interval]) -> float:
    """The length of the union of all occupying intervals."""
    total, reached = 0.0, float("-inf")
    for interval in sorted((i for i in intervals if i.kind in OCCUPYING), key=lambda i: i.begin):
        total += max(0.0, interval.end - max(interval.begin, reached))
        reached = max(reached, interval.end)
    return total


def _as_text(verdict: Verdict) -> str:
    out = [f"{name}: {value}" for name, value in verdict.as_dict().items()]
    for title, overlaps in (("OVERLAP", verdict.overlaps), ("doubtful", verdict.doubtful)):
        out += [
            f"{title} on {o.card}: {_shown(o.first)} with {_shown(o.second)} for {o.seconds:.4f} s"
            for o in overlaps[:SHOWN]
        ]
    out += [f"unfinished on {card}: {_shown(interval)}" for card, interval in verdict.unfinished[:SHOWN]]
    out += [f"computed {times} times: {job}" for job, times in list(verdict.repeated.items())[:SHOWN]]
    out += [f"unreadable: {text}" for text in verdict.unreadable[:SHOWN]]
    return "\n".join(out)


def _shown(interval: Interval) -> str:
    return f"{interval.service} {interval.kind} {interval.job} at {interval.engine}"


def main(argv: Sequence[str] | None = None) -> int:
    """Judge the files named; 0 when no two jobs overlapped."""
    parser = argparse.ArgumentParser(
        prog="judge", description="Finds overlaps in the logs of simulated cards."
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    parser.add_argument("--strict", action="store_true", help="a doubtful overlap is an overlap too")
    arguments = parser.parse_args(argv)
    verdict = judge_files(arguments.files)
    print(json.dumps(verdict.as_dict(), indent=2) if arguments.json else _as_text(verdict))
    is_clean = verdict.is_clean and not (arguments.strict and verdict.doubtful)
    return 0 if is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
