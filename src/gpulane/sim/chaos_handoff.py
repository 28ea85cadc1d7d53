"""A simulated hand-off: plan, ask, measure, ask again, follow the policy for leaks. The plans and the
judgment are the core's; the engines that lie, hang, leak and die are the simulation's.

Between its claim and its start a run is here; it leaves by `ready`, or by `give_back`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gpulane.core.events import EngineLeaking, EngineUnloaded, HandoffMeasured
from gpulane.core.gpus import HANDOFF
from gpulane.core.handoff import HandoffPlan, enough
from gpulane.core.model import EngineUrl, GpuId, JobId, Seconds
from gpulane.sim.cards import Process
from gpulane.sim.chaos_world import GIB, NOTICE_SECONDS, Run, World
from gpulane.sim.dice import Fault

WhenLeaking = Literal["run", "skip", "restart"]
ACKNOWLEDGE_SECONDS = 5.0
UNLOAD_SECONDS = 8.0
POLL_SECONDS = 0.5
LEAK_LOOK_SECONDS = 5.0
CONTEXT_GIB = 0.2
"""What a process keeps in the card after it has unloaded."""
STRANGER = "stranger"


def stranger_on(engine: str) -> str:
    """Returns the reason that a stranger's work is: one per engine, for there may be several."""
    return f"{STRANGER} on {engine}"


@dataclass(slots=True, eq=False)
class Handoffs:
    """All hand-offs of one gateway."""

    world: World
    when_leaking: WhenLeaking
    unload_all: set[JobId]
    """Jobs that ran out of memory and get their card alone."""
    ready: Callable[[Run], None]
    give_back: Callable[[Run], None]
    done_count: int = 0
    """Hand-offs with an unload that came to their end."""

    def begin(self, run: Run) -> None:
        world = self.world
        if not world.is_current(run):
            return
        world.occupy(run.gpu, HANDOFF)
        run.handoff_at = world.now
        plan = run.plan = world.book.handoff_plan(
            run.gpu,
            run.engine,
            run.job.model,
            bytes_free=self.measure(run),
            unload_all=run.job.id in self.unload_all,
        )
        if plan.unload:
            self.ask(run, plan, plan.unload)
        else:
            self.load(run, plan)

    def goes_on(self, run: Run, dies: Fault | None = None) -> bool:
        """Tells whether the hand-off is still wanted and its target alive; ends it otherwise."""
        world = self.world
        if world.desks[run.gpu].run is not run:
            return False
        if dies is not None and world.dice.strikes(Fault.CANCELLED_IN_HANDOFF):
            world.tell(world.store.cancel(run.job.id))
        if not world.is_current(run):
            self.give_back(run)
            return False
        target = world.cards[run.gpu].processes[run.engine]
        if dies is not None and target.is_alive and world.dice.strikes(dies):
            world.lose(run.gpu, run.engine)
        if not target.is_alive or self.is_strange(run.gpu):
            self.give_back(run)
            return False
        return True

    def is_strange(self, gpu: GpuId) -> bool:
        return any(why.startswith(STRANGER) for why in self.world.desks[gpu].reasons)

    def measure(self, run: Run) -> int | None:
        if self.world.dice.strikes(Fault.VRAM_UNKNOWN):
            return None
        return max(int(self.world.cards[run.gpu].gib_free * GIB), 0)

    # -- asking

    def ask(self, run: Run, plan: HandoffPlan, left: tuple[EngineUrl, ...]) -> None:
        dies = Fault.TARGET_DIES_AGAIN if run.tries else Fault.TARGET_DIES_ASKING
        if not self.goes_on(run, dies):
            return
        if not left:
            run.tries += 1
            self.look(run, plan, self.world.now + UNLOAD_SECONDS)
            return
        world, dice = self.world, self.world.dice
        process = world.cards[run.gpu].processes[left[0]]
        seconds = 0.2
        if process.is_alive and dice.strikes(Fault.SOURCE_DIES_ASKED):
            world.lose(run.gpu, left[0])
        elif process.is_alive and process.work is None:
            if dice.strikes(Fault.STRANGER_IN_HANDOFF):
                self.stranger(run.gpu, left[0])
            elif dice.strikes(Fault.UNLOAD_HANGS):
                seconds = ACKNOWLEDGE_SECONDS
            else:
                self.unload(run, process)
        world.at(seconds, lambda: self.ask(run, plan, left[1:]))

    def unload(self, run: Run, process: Process) -> None:
        """Does what this engine does when told to unload, which need not be what it says."""
        world, dice = self.world, self.world.dice
        if dice.strikes(Fault.UNLOAD_NEVER):
            process.keeps = True
            boot = process.boot
            world.at(world.rng.uniform(20.0, 120.0), lambda: self.stop_keeping(process, boot))
        if process.keeps or dice.strikes(Fault.UNLOAD_LIES):
            return
        if dice.strikes(Fault.SOURCE_DIES_MEASURING):
            world.lose(run.gpu, EngineUrl(process.url))
            return
        slow = dice.strikes(Fault.UNLOAD_SLOW)
        seconds = world.rng.uniform(2.0, 7.0) if slow else 0.15
        boot = process.boot
        world.at(seconds, lambda: self.drop(process, boot))

    def drop(self, process: Process, boot: int) -> None:
        if process.boot == boot and process.work is None and not process.keeps:
            process.model, process.gib = "", min(process.gib, CONTEXT_GIB)

    def stop_keeping(self, process: Process, boot: int) -> None:
        if process.boot == boot:
            process.keeps = False
            self.drop(process, boot)

    def stranger(self, gpu: GpuId, engine: EngineUrl) -> None:
        """Somebody works on an engine directly; the gateway sees it at its next probe, and keeps away."""
        world, card = self.world, self.world.cards[gpu]
        work = card.begin(engine, "stranger", world.now, stranger=True)

        def seen() -> None:
            if work.ended is None:
                work.seen_at = world.now
                world.occupy(gpu, stranger_on(engine))

        def gone() -> None:
            card.end(work, world.now)
            world.vacate(gpu, stranger_on(engine))

        world.at(NOTICE_SECONDS, seen)
        world.at(world.rng.uniform(0.2, 15.0), gone)

    # -- measuring

    def look(self, run: Run, plan: HandoffPlan, until: Seconds) -> None:
        if not self.goes_on(run, Fault.TARGET_DIES_MEASURING):
            return
        if enough(self.measure(run), plan):
            self.done(run, plan, plan.unload)
        elif self.world.now < until:
            self.world.at(POLL_SECONDS, lambda: self.look(run, plan, until))
        elif run.tries < 2:
            self.ask(run, plan, plan.unload)
        else:
            self.leaking(run, plan)

    def done(self, run: Run, plan: HandoffPlan, unloaded: tuple[EngineUrl, ...]) -> None:
        world = self.world
        self.done_count += 1
        for url in unloaded:
            world.tell(EngineUnloaded(gpu=run.gpu, engine=url))
        world.tell(HandoffMeasured(gpu=run.gpu, seconds=world.now - run.handoff_at, unloaded=unloaded))
        self.load(run, plan)

    def load(self, run: Run, plan: HandoffPlan) -> None:
        """Tells an engine that was unloaded to load again, where that has to be said (A1111)."""
        if not plan.make_loadable:
            self.start(run)
        elif self.goes_on(run, Fault.TARGET_DIES_LOADABLE):
            self.world.at(0.2, lambda: self.start(run))

    def start(self, run: Run) -> None:
        if self.goes_on(run):
            self.ready(run)

    # -- leaks

    def leaking(self, run: Run, plan: HandoffPlan) -> None:
        world = self.world
        world.dice.count(Fault.LEAKING)
        for url in plan.unload:
            world.tell(EngineLeaking(engine=url, leaking=True, why="simulated"))
            boot = world.cards[run.gpu].processes[url].boot
            world.at(LEAK_LOOK_SECONDS, lambda url=url, boot=boot: self.look_at_leak(run.gpu, url, boot))
        match self.when_leaking:
            case "run":
                self.done(run, plan, ())
            case "skip":
                self.give_back(run)
            case "restart":
                for url in plan.unload:
                    process = world.cards[run.gpu].processes[url]
                    if process.is_alive and process.work is None:
                        world.lose(run.gpu, url)
                self.done(run, plan, plan.unload)

    def look_at_leak(self, gpu: GpuId, engine: EngineUrl, boot: int) -> None:
        """Measures again and again until the engine has given its memory back, or works again."""
        world = self.world
        process = world.cards[gpu].processes[engine]
        if process.boot != boot:
            return  # its loss was told
        if process.gib <= CONTEXT_GIB or not process.keeps:
            world.tell(EngineLeaking(engine=engine, leaking=False))
            return
        world.at(LEAK_LOOK_SECONDS, lambda: self.look_at_leak(gpu, engine, boot))
