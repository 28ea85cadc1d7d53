"""Cards that several engines share, under every fault in virtual time: judged by the cards' own logs."""

from __future__ import annotations

import pytest

from gpulane.core.policy import Policy
from gpulane.sim.cards import Process, TrueCard, Work, overlaps, unended
from gpulane.sim.chaos import POLICIES, faults_of, fired, main, runs
from gpulane.sim.chaos_handoff import WhenLeaking
from gpulane.sim.chaos_run import LIMITS, Chaos, run_chaos
from gpulane.sim.chaos_world import World
from gpulane.sim.dice import Fault

NO_LOCKS_NO_HTTP = (9, 8, 0, 0)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", [1, 2])
def test_nothing_overlaps_leaks_or_stays_open(seed: int, policy: WhenLeaking) -> None:
    report = run_chaos(seed, 1000, policy)
    assert report.is_clean, report
    assert sum(count for _, count in report.ends) == 1000
    assert sum(report.fired.values()) > 200


def test_every_fault_strikes() -> None:
    reports = runs(2400, 5)
    assert faults_of(reports, 1) == []
    assert set(fired(reports)) == set(Fault)


def test_the_command_says_what_struck_too_seldom(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--jobs", "60", "--seed", "1"]) == 0
    said = capsys.readouterr().out
    assert all(fault.value in said for fault in Fault)
    assert "overlaps 0" in said
    assert main(["--jobs", "60", "--seed", "1", "--least", "20"]) == 1
    assert "FAILED struck fewer than 20 times" in capsys.readouterr().out


def test_a_seed_repeats_exactly() -> None:
    assert run_chaos(7, 300) == run_chaos(7, 300)
    assert run_chaos(7, 300).digest != run_chaos(8, 300).digest


def test_without_faults_nothing_runs_out_of_memory_though_models_must_change_places() -> None:
    report = run_chaos(1, 600, faults=False, gibs=(12.0,))
    assert report.ends == (("succeeded", 600),)
    assert report.handoffs > 50
    assert not any(report.fired.values()), report.fired


def test_models_that_fit_together_are_never_unloaded_once_their_needs_are_known() -> None:
    report = run_chaos(1, 600, faults=False, gibs=(24.0,), services=NO_LOCKS_NO_HTTP)
    assert report.ends == (("succeeded", 600),)
    models = 6
    assert report.handoffs <= models, "at most the first job of each model, which nobody has measured"


# --- the judge itself


def card() -> TrueCard:
    return TrueCard(name="g0", gib_total=12.0, processes={url: Process(url=url) for url in ("a", "b")})


def test_the_judge_sees_jobs_that_overlap_and_jobs_beside_a_known_stranger() -> None:
    one = card()
    first = one.begin("a", "j1", 0.0)
    second = one.begin("b", "j2", 1.0)
    assert len(overlaps(one.log)) == 1
    one.end(first, 1.0)
    assert overlaps(one.log) == [], "one ends where the next begins"
    one.end(second, 2.0)
    stranger = one.begin("a", "stranger", 3.0, stranger=True)
    one.end(one.begin("b", "j3", 3.2), 3.3)
    assert overlaps(one.log) == [], "nobody had seen it"
    stranger.seen_at = 3.5
    one.end(one.begin("b", "j4", 4.0), 5.0)
    assert len(overlaps(one.log)) == 1
    assert unended(one.log) == ["stranger"]


def test_the_judge_sees_a_long_job_that_outlasts_the_next_ones() -> None:
    rows = [
        Work(who="long", engine="a", began=0.0, ended=10.0),
        Work(who="short", engine="b", began=1.0, ended=2.0),
        Work(who="late", engine="b", began=5.0, ended=6.0),
    ]
    assert len(overlaps(rows)) == 2


def test_a_real_log_with_one_job_made_longer_is_found_out() -> None:
    world = World(seed=1, policy=Policy(), limits=LIMITS)
    assert Chaos(world=world, jobs=100, when_leaking="run").run().is_clean
    log = [work for work in next(iter(world.cards.values())).log if not work.is_stranger]
    log[3].ended = log[4].began + 0.001
    assert len(overlaps(log)) == 1
