"""The trace run's report sees what it is there for: a job twice, a picture lost, swapped or given twice."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The modules trace_input and trace_report, which are scripts beside each other."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])
    for name in ("trace_input", "trace_report"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("trace_input"), importlib.import_module("trace_report")


def good_run(trace_input: Any, trace_report: Any) -> Any:
    rows = trace_input.densest(trace_input.read_rows(trace_input.KEPT_TRACE), 40)
    asks = trace_input.plan(rows, 20)
    run = trace_report.Run(asks=asks, gateway_exit=0, cards=[[], []])
    for number, ask in enumerate(asks):
        job = f"job-{number}"
        run.jobs.append({"id": job, "service": ask.service, "state": "succeeded"})
        line = {"event": "job", "service": ask.service, "job": job, "computed": True}
        run.cards[number % 2].append(line)
        seeds = trace_report.expected_seeds(ask)
        pictures = [{"name": str(at), "seed": seed} for at, seed in enumerate(seeds)]
        run.outcomes.append({"row": ask.row, "pictures": pictures, "error": None})
    return run


def test_a_good_run_is_good(bench: tuple[Any, Any]) -> None:
    assert bench[1].not_exactly_once(good_run(*bench)) == []


def computed_on_two_cards(run: Any) -> None:
    run.cards[1].append(run.cards[0][0])


def never_computed(run: Any) -> None:
    run.cards[0].pop()


def two_jobs_of_one_request(run: Any) -> None:
    run.jobs.append(dict(run.jobs[0], id="another"))


def failed(run: Any) -> None:
    run.jobs[0]["state"] = "failed"


def no_answer(run: Any) -> None:
    run.outcomes.pop()


def two_answers(run: Any) -> None:
    run.outcomes.append(run.outcomes[0])


def a_picture_missing(run: Any) -> None:
    run.outcomes[0]["pictures"].pop()


def a_picture_too_many(run: Any) -> None:
    run.outcomes[0]["pictures"].append(run.outcomes[0]["pictures"][0])


def pictures_of_somebody_else(run: Any) -> None:
    first, second = run.outcomes[:2]
    first["pictures"], second["pictures"] = second["pictures"], first["pictures"]


def gateway_fell(run: Any) -> None:
    run.gateway_exit = 1


@pytest.mark.parametrize(
    "spoil",
    [
        computed_on_two_cards,
        never_computed,
        two_jobs_of_one_request,
        failed,
        no_answer,
        two_answers,
        a_picture_missing,
        a_picture_too_many,
        pictures_of_somebody_else,
        gateway_fell,
    ],
)
def test_what_is_not_once_is_seen(bench: tuple[Any, Any], spoil: Callable[[Any], None]) -> None:
    run = good_run(*bench)
    spoil(run)
    assert bench[1].not_exactly_once(run) != []


def test_sizes_make_the_card_compute_as_long_as_the_row_took(bench: tuple[Any, Any]) -> None:
    trace_input = bench[0]
    rows = trace_input.read_rows(trace_input.KEPT_TRACE)
    for row, ask in zip(rows, trace_input.plan(rows, 20), strict=True):
        if ask.width < trace_input.SIDE_MAX and ask.width > trace_input.SIDE_MIN:
            assert trace_input.service_seconds(ask) == pytest.approx(row.seconds, rel=0.06)


def test_each_service_gets_its_share_and_each_user_one_client(bench: tuple[Any, Any]) -> None:
    trace_input = bench[0]
    asks = trace_input.plan(trace_input.read_rows(trace_input.KEPT_TRACE), 20)
    a1111 = sum(ask.service == "a1111" for ask in asks)
    assert 0.4 * len(asks) <= a1111 <= 0.6 * len(asks)
    pairs = {(ask.account, ask.client) for ask in asks}
    assert len(pairs) == len({account for account, _ in pairs}) >= 20
    assert len([client for _, client in pairs if client == "comfyapi"]) <= trace_input.ONE_ACCOUNT_CLIENTS_MAX
