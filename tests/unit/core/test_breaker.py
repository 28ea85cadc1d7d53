"""When a gpu is paused, and how slowly it comes back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gpulane.core.breaker import Breaker, BreakerLimits, Pause
from gpulane.core.model import Failure, FailureKind

LIMITS = BreakerLimits(failures_pause=3, pause_seconds=10.0, pause_seconds_max=60.0)
BROKEN = Failure(kind=FailureKind.ENGINE, code="node_raised", message="test")
CONTENT = Failure(kind=FailureKind.CLIENT, code="bad_value", message="test")


def test_so_many_in_a_row_pause_it() -> None:
    breaker = Breaker(LIMITS)
    assert [breaker.after(BROKEN) for _ in range(3)] == [None, None, Pause(seconds=10.0, failures=3)]


def test_single_trials_double_the_pause_up_to_the_longest() -> None:
    breaker = Breaker(LIMITS)
    pauses = [breaker.after(BROKEN) for _ in range(7)]
    assert [pause.seconds for pause in pauses if pause] == [10.0, 20.0, 40.0, 60.0, 60.0]
    assert breaker.is_trying


def test_a_success_forgets_all() -> None:
    breaker = Breaker(LIMITS)
    for _ in range(4):
        breaker.after(BROKEN)
    assert breaker.after(None) is None
    assert not breaker.is_trying
    assert [breaker.after(BROKEN) for _ in range(2)] == [None, None]


def test_what_a_client_sent_says_nothing() -> None:
    breaker = Breaker(LIMITS)
    assert [breaker.after(CONTENT) for _ in range(10)] == [None] * 10
    breaker.after(BROKEN)
    breaker.after(CONTENT)
    breaker.after(BROKEN)
    assert breaker.after(BROKEN), "and does not end a row"


def test_an_operator_may_reset_it() -> None:
    breaker = Breaker(LIMITS)
    for _ in range(3):
        breaker.after(BROKEN)
    breaker.reset()
    assert breaker.after(BROKEN) is None


@given(st.lists(st.sampled_from([None, BROKEN, CONTENT])))
def test_it_pauses_exactly_after_rows_of_failures(outcomes: list[Failure | None]) -> None:
    breaker = Breaker(LIMITS)
    for number, outcome in enumerate(outcomes):
        pause = breaker.after(outcome)
        since = outcomes[: number + 1]
        while None in since:
            since = since[since.index(None) + 1 :]
        row = sum(o is BROKEN for o in since)
        assert (pause is not None) == (outcome is BROKEN and row >= 3)
        if pause is not None:
            assert pause.seconds == min(10.0 * 2 ** (row - 3), 60.0)


def test_a_thousand_failures_are_only_a_long_pause() -> None:
    breaker = Breaker(LIMITS)
    assert [breaker.after(BROKEN) for _ in range(5000)][-1] == Pause(seconds=60.0, failures=5000)
