"""The judge on logs written by hand: overlaps, lost engines, repeated jobs, junk."""

import ast
import json
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from gpulane.testing import judge
from gpulane.testing.judge import Verdict, judge_logs, main


def line(event: str, at: float, **fields: Any) -> str:
    defaults = {"engine": "http://a", "service": "comfyui", "model": None}
    return json.dumps({"event": event, "mono": at, "wall": at} | defaults | fields)


def interval(name: str, begin: float, end: float | None, **fields: Any) -> list[tuple[float, str]]:
    job = {"job": name, "kind": "compute"} | fields
    lines = [(begin, line("begin", begin, interval=name + str(begin), **job))]
    if end is not None:
        lines.append((end, line("end", end, interval=name + str(begin), outcome=job.pop("outcome", "ok"))))
    return lines


def judged(*parts: list[tuple[float, str]]) -> Verdict:
    return judge_logs({"gpu0": [text for _, text in sorted(chain(*parts))]})


def test_jobs_one_after_the_other_are_clean() -> None:
    verdict = judged(interval("a", 0, 1), interval("b", 1, 2))
    assert verdict.is_clean
    assert verdict.busy_seconds == {"gpu0": 2}
    assert verdict.computed == {"comfyui": {"a": 1, "b": 1}}


def test_two_jobs_at_once_are_found_whatever_their_services() -> None:
    verdict = judged(interval("a", 0, 2), interval("b", 1, 3, engine="http://b", service="a1111"))
    assert [(o.first.job, o.second.job, o.seconds) for o in verdict.overlaps] == [("a", "b", 1)]
    assert not verdict.is_clean
    assert verdict.busy_seconds == {"gpu0": 3}


def test_one_inside_the_other_is_found() -> None:
    verdict = judged(interval("long", 0, 10), interval("b", 1, 2), interval("c", 3, 4))
    assert len(verdict.overlaps) == 2


def test_a_load_counts_and_an_unload_does_not() -> None:
    assert judged(interval("a", 0, 2), interval("b", 1, 3, kind="load")).overlaps
    assert not judged(interval("a", 0, 2), interval("b", 1, 3, kind="unload")).overlaps


def test_a_jobs_own_load_is_no_overlap() -> None:
    assert judged(interval("a", 0, 2), interval("a", 0.5, 1, kind="load")).is_clean


def test_cards_are_judged_apart() -> None:
    logs = {card: [text for _, text in interval(card, 0, 2)] for card in ("gpu0", "gpu1")}
    assert judge_logs(logs).is_clean


def test_a_job_computed_twice_is_named() -> None:
    verdict = judged(interval("a", 0, 1), interval("a", 2, 3), interval("b", 4, 5))
    assert verdict.repeated == {"a": 2}


def test_a_failed_attempt_is_not_a_repetition() -> None:
    assert not judged(interval("a", 0, 1, outcome="error"), interval("a", 2, 3)).repeated


def test_a_lost_engine_ends_its_intervals() -> None:
    lost = [(1.0, line("engine_lost", 1.0))]
    verdict = judged(interval("a", 0, None), lost, interval("b", 2, 3))
    assert verdict.is_clean and not verdict.doubtful
    assert [(card, found.job, found.end) for card, found in verdict.unfinished] == [("gpu0", "a", 1.0)]
    assert judged(interval("a", 0, None), interval("b", 0.5, 0.9, engine="http://b"), lost).overlaps


def test_until_the_next_start_an_open_interval_is_doubtful() -> None:
    up = [(5.0, line("engine_up", 5.0))]
    verdict = judged(interval("a", 0, None), interval("b", 2, 3, engine="http://b"), up)
    assert verdict.is_clean
    assert len(verdict.doubtful) == 1


def test_a_log_that_ends_in_the_middle() -> None:
    verdict = judged(interval("a", 0, 1), interval("b", 2, None))
    assert [found.job for _, found in verdict.unfinished] == ["b"]


@pytest.mark.parametrize("text", ["{", "[]", '{"event":"begin"}', '{"event":"what","mono":1}'])
def test_what_cannot_be_read_is_told(text: str) -> None:
    verdict = judge_logs({"gpu0": [text]})
    assert len(verdict.unreadable) == 1
    assert not verdict.is_clean


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clean, bad = tmp_path / "clean", tmp_path / "bad"
    clean.write_text("\n".join(text for _, text in interval("a", 0, 1)))
    bad.write_text("\n".join(text for _, text in sorted(interval("a", 0, 2) + interval("b", 1, 3))))
    assert main([str(clean)]) == 0
    assert main([str(clean), str(bad)]) == 1
    assert "OVERLAP" in capsys.readouterr().out
    assert main(["--json", str(clean)]) == 0
    assert json.loads(capsys.readouterr().out)["overlaps"] == 0


def test_it_stands_alone() -> None:
    """It imports nothing of the project, and running it imports nothing of the gateway."""
    tree = ast.parse(Path(judge.__file__).read_text())
    names = {name for node in ast.walk(tree) for name in imported(node)}
    assert not {name for name in names if name.startswith("gpulane")}
    assert names <= set(sys.stdlib_module_names)
    code = "import sys, gpulane.testing.judge; print([m for m in sys.modules if 'gpulane' in m])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert ast.literal_eval(out.stdout) == ["gpulane", "gpulane.testing", "gpulane.testing.judge"]


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [(node.module or "").split(".")[0]]
    return []
