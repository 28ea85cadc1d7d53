"""What is unloaded before a job starts, against an oracle that counts the card's memory its own way."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from gpulane.core.handoff import CardMemory, HandoffPlan, Holding, enough, plan
from gpulane.core.model import NO_MODEL, EngineUrl, HandoffMode, ModelKey

GIB = 1 << 30
A, B, C = (EngineUrl(f"http://{name}") for name in "abc")
AUTO, ALWAYS, NEVER = HandoffMode.AUTO, HandoffMode.ALWAYS, HandoffMode.NEVER


def holding(
    engine: EngineUrl,
    peak_gib: float | None,
    mode: HandoffMode = AUTO,
    *,
    holds: bool = True,
    gone: bool = False,
) -> Holding:
    return Holding(
        engine=engine,
        mode=mode,
        holds=holds,
        model=ModelKey("m") if holds else NO_MODEL,
        bytes_peak=None if peak_gib is None else int(peak_gib * GIB),
        unloaded=gone,
    )


def card(
    *engines: Holding,
    free: float | None = None,
    total: float | None = None,
    together: tuple[tuple[EngineUrl, ...], ...] = (),
) -> CardMemory:
    return CardMemory(
        engines=engines,
        bytes_free=None if free is None else int(free * GIB),
        bytes_total=None if total is None else int(total * GIB),
        warm_together=frozenset(frozenset(one) for one in together),
    )


def planned(memory: CardMemory, need: float | None = 7.0, *, unload_all: bool = False) -> HandoffPlan:
    return plan(memory, A, None if need is None else int(need * GIB), unload_all=unload_all)


IDLE_A = holding(A, None, holds=False)


def test_two_models_of_seven_on_twelve_change_places() -> None:
    found = planned(card(IDLE_A, holding(B, 7), total=12, free=5))
    assert found.unload == (B,)
    assert not enough(5 * GIB, found)
    assert enough(11 * GIB, found)


def test_two_models_of_seven_on_twenty_four_stay() -> None:
    found = planned(card(holding(A, 7), holding(B, 7), total=24, free=10))
    assert found.unload == ()
    assert enough(0, found), "nothing to wait for"


def test_what_fits_together_stays_though_little_is_free_now() -> None:
    """Both are loaded: the target's own memory is not free, and is its own."""
    assert planned(card(holding(A, 7), holding(B, 7), total=16, free=2)).unload == ()


def test_a_strangers_memory_counts() -> None:
    assert planned(card(holding(A, 7), holding(B, 7), total=16, free=0)).unload == (B,)


def test_unknown_is_unloaded() -> None:
    assert planned(card(IDLE_A, holding(B, 7))).unload == (B,), "no total, no free"
    assert planned(card(IDLE_A, holding(B, 7), total=24, free=17), None).unload == (B,), "no need"
    assert planned(card(IDLE_A, holding(B, None), total=24)).unload == (B,), "no peak"
    assert planned(card(IDLE_A, holding(B, None), total=24, free=9)).unload == (), "measured free is enough"


def test_an_engine_that_holds_nothing_is_left_alone() -> None:
    assert planned(card(IDLE_A, holding(B, None, holds=False)), None).unload == ()


def test_always_and_never() -> None:
    assert planned(card(IDLE_A, holding(B, 1, ALWAYS), total=24, free=23)).unload == (B,)
    found = planned(card(IDLE_A, holding(B, 20, NEVER), total=24, free=4))
    assert found.unload == ()
    assert str(B) in found.why
    assert "never" in found.why
    found = planned(card(IDLE_A, holding(B, 8, NEVER), holding(C, 8), total=24, free=6), unload_all=True)
    assert found.unload == (C,)


def test_warm_together_stays_even_unknown_except_after_out_of_memory() -> None:
    memory = card(IDLE_A, holding(B, None), holding(C, None), together=((A, B),))
    assert planned(memory, None).unload == (C,)
    assert set(planned(memory, None, unload_all=True).unload) == {B, C}


def test_no_more_than_must_go() -> None:
    found = planned(card(IDLE_A, holding(B, 4), holding(C, 9), total=16, free=3))
    assert found.unload == (C,)


def test_an_engine_that_was_unloaded_is_made_loadable() -> None:
    assert planned(card(holding(A, None, holds=False, gone=True), IDLE_B)).make_loadable
    assert not planned(card(IDLE_A, IDLE_B)).make_loadable


IDLE_B = holding(B, None, holds=False)


def test_enough_without_knowledge_trusts_or_wants_a_rise() -> None:
    blind = planned(card(IDLE_A, holding(B, None)), None)
    assert enough(None, blind)
    assert enough(0, blind)
    rises = planned(card(IDLE_A, holding(B, None), free=2, total=12), None)
    assert not enough(2 * GIB, rises)
    assert enough(3 * GIB, rises)
    unsure = planned(card(IDLE_A, Holding(engine=B), free=2, total=12), None)
    assert enough(2 * GIB, unsure), "it may have held nothing"


def test_a_need_above_the_card_asks_for_no_more_than_there_can_be() -> None:
    found = planned(card(IDLE_A, holding(B, 7), total=12, free=4), 11.8)
    assert found.unload == (B,)
    assert enough(11 * GIB, found)


# --- any card


@dataclass(frozen=True)
class World:
    """A card as it is: what each engine holds, and what a stranger takes."""

    memory: CardMemory
    held: dict[EngineUrl, int]
    stranger: int
    need: int


sizes = st.integers(0, 16).map(lambda gib: gib * GIB)
urls = [EngineUrl(f"http://e{number}") for number in range(4)]


@st.composite
def worlds(draw: st.DrawFn, *, exact: bool) -> World:
    count = draw(st.integers(1, 4))
    held = {url: draw(sizes) for url in urls[:count]}
    stranger = draw(st.sampled_from([0, 0, GIB, 3 * GIB]))
    total = sum(held.values()) + stranger + draw(sizes)
    peaks = {
        url: size if exact else draw(st.sampled_from([None, size, size + GIB])) for url, size in held.items()
    }
    free = total - sum(held.values()) - stranger
    engines = tuple(
        Holding(
            engine=url,
            mode=draw(st.sampled_from(list(HandoffMode))),
            holds=held[url] > 0,
            model=ModelKey("m") if held[url] else NO_MODEL,
            bytes_peak=peaks[url],
            unloaded=held[url] == 0 and draw(st.booleans()),
        )
        for url in held
    )
    pairs = [
        frozenset(pair) for pair in draw(st.lists(st.sets(st.sampled_from(urls), min_size=2), max_size=2))
    ]
    return World(
        memory=CardMemory(
            engines=engines,
            bytes_free=free if exact else draw(st.sampled_from([None, free])),
            bytes_total=total if exact else draw(st.sampled_from([None, total])),
            warm_together=frozenset(pairs),
            margin_bytes=draw(st.sampled_from([0, GIB // 2])),
        ),
        held=held,
        stranger=stranger,
        need=draw(sizes.filter(bool)),
    )


def stays_by_order(world: World, url: EngineUrl, target: EngineUrl) -> bool:
    """Whether the operator keeps it there, room or not."""
    mode = next(e.mode for e in world.memory.engines if e.engine == url)
    together = any({url, target} <= one for one in world.memory.warm_together)
    return mode is NEVER or (mode is AUTO and together)


@given(worlds(exact=True), st.integers(0, 3))
def test_with_exact_knowledge_a_plan_never_runs_out_of_memory(world: World, at: int) -> None:
    """Played on the card: what is unloaded goes, the target drops its own, the job takes its need."""
    target = urls[at % len(world.held)]
    found = plan(world.memory, target, world.need)
    after = {url: 0 if url in found.unload or url == target else size for url, size in world.held.items()}
    used = sum(after.values()) + world.stranger + world.need
    movable = [u for u, size in after.items() if size and not stays_by_order(world, u, target)]
    if used > (world.memory.bytes_total or 0):
        assert not movable, "something could still have gone"


@given(worlds(exact=True), st.integers(0, 3))
def test_with_exact_knowledge_what_fits_stays(world: World, at: int) -> None:
    target = urls[at % len(world.held)]
    others = sum(size for url, size in world.held.items() if url != target)
    used = others + world.stranger + world.need + world.memory.margin_bytes
    found = plan(world.memory, target, world.need)
    if used <= (world.memory.bytes_total or 0):
        modes = {e.engine: e.mode for e in world.memory.engines}
        assert all(modes[url] is ALWAYS for url in found.unload)


@given(worlds(exact=False), st.integers(0, 3), st.booleans(), st.booleans())
def test_nobody_is_asked_who_must_not_be(world: World, at: int, unload_all: bool, known: bool) -> None:
    target = urls[at % len(world.held)]
    found = plan(world.memory, target, world.need if known else None, unload_all=unload_all)
    assert target not in found.unload
    assert len(set(found.unload)) == len(found.unload)
    for engine in world.memory.engines:
        if engine.mode is NEVER and engine.holds and engine.engine != target:
            assert engine.engine not in found.unload
            assert engine.engine in found.why
        if engine.mode is ALWAYS and engine.holds and engine.engine != target:
            assert engine.engine in found.unload
        if not engine.holds:
            assert engine.engine not in found.unload
        if not known and engine.holds and not stays_by_order(world, engine.engine, target):
            assert engine.engine in {target, *found.unload}


@given(worlds(exact=True), st.integers(0, 3))
def test_a_card_that_gave_all_back_is_enough(world: World, at: int) -> None:
    """Else an honest engine would be called leaking."""
    target = urls[at % len(world.held)]
    found = plan(world.memory, target, world.need)
    # Idle processes keep a context of at most a margin each; it was measured as part of what they hold.
    margin = world.memory.margin_bytes
    kept = sum(margin if u in found.unload else size for u, size in world.held.items())
    free = (world.memory.bytes_total or 0) - world.stranger - kept
    staying = sum(s for u, s in world.held.items() if u not in found.unload and u != target)
    if staying + world.stranger + world.need + 2 * margin * len(world.held) <= (
        world.memory.bytes_total or 0
    ):
        assert enough(free, found)
