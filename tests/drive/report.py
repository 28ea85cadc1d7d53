"""What a drive found, as a table on the terminal and as a page. Shows no path of the machine it ran on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Result = Literal["pass", "FAIL", "skipped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one flow went."""

    group: str
    name: str
    purpose: str
    result: Result
    seconds: float
    seen: str

    @property
    def line(self) -> str:
        return f"{self.result:8}{self.seconds:6.1f} s  {self.group}: {self.name:22} {self.seen}"


def document(outcomes: Sequence[Outcome], *, date: str, version: str, gpus: Sequence[str]) -> str:
    """The report in Markdown."""
    counts = {result: sum(o.result == result for o in outcomes) for result in ("pass", "FAIL", "skipped")}
    lines = [
        f"# Drive against real servers, {date}",
        "",
        f"gpulane {version}; {summary(counts)}, {sum(o.seconds for o in outcomes):.0f} s in all.",
        "The flows are in `tests/drive`; `make drive COMFYUI_URL=... A1111_URL=...` runs them again.",
        "",
        *(f"- {gpu}" for gpu in gpus),
        "",
        "| flow | what must hold | result | seconds | seen |",
        "|---|---|---|---|---|",
        *(
            f"| {o.group}: {o.name} | {cell(o.purpose)} | {o.result} | {o.seconds:.1f} | {cell(o.seen)} |"
            for o in outcomes
        ),
        "",
    ]
    return "\n".join(lines)


def summary(counts: dict[str, int]) -> str:
    return f"{counts['pass']} passed, {counts['FAIL']} failed, {counts['skipped']} skipped"


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
