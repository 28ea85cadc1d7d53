"""Lists and options of engines that are described again and again."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import msgspec

from gpulane.adapters.a1111.catalogue import digest
from gpulane.core.model import EngineState, EngineUrl, GpuId, ModelKey, Service
from gpulane.engine.base import Description
from gpulane.views import EngineView
from gpulane.web.a1111.lists import Lists
from gpulane.wire import EngineClient


@dataclass
class Engines:
    """EnginesPort, of engines that are never asked."""

    views: list[EngineView] = field(default_factory=list[EngineView])

    def engines(self, service: Service | None = None) -> tuple[EngineView, ...]:
        return tuple(self.views)

    def wire(self, engine: EngineUrl) -> EngineClient:
        raise AssertionError(engine)

    def sticky(self, service: Service, key: str) -> EngineView | None:
        return self.views[0]


def described(*models: str, options: str = "a.safetensors") -> Description:
    documents = {
        "sd-models": msgspec.json.encode([{"title": name} for name in models]),
        "options": msgspec.json.encode({"sd_model_checkpoint": options}),
    }
    return Description(
        service=Service.A1111,
        flavor="a1111",
        version="",
        offers=None,
        documents=documents,
        digest=digest(documents),
    )


def engine(number: int, about: Description | None) -> EngineView:
    return EngineView(
        url=EngineUrl(f"http://127.0.0.1:{number}"),
        service=Service.A1111,
        name="",
        gpu=GpuId(f"box/gpu{number}"),
        state=EngineState.READY,
        why="",
        model=ModelKey(""),
        description=about,
    )


def names(lists: Lists) -> list[str]:
    return [checkpoint.name for checkpoint in lists.catalogue().checkpoints or ()]


def test_order_is_that_of_the_settings_whatever_their_health() -> None:
    engines = Engines([engine(1, described("a.st", "b.st")), engine(2, described("b.st", "c.st"))])
    lists = Lists(engines)
    assert names(lists) == ["a.st", "b.st", "c.st"]
    engines.views[0] = replace(engines.views[0], state=EngineState.LOST)
    assert names(lists) == ["a.st", "b.st", "c.st"]
    engines.views[1] = replace(engines.views[1], description=described("d.st"))
    assert names(lists) == ["a.st", "b.st", "d.st"]
    told = lists.document("sd-models")
    assert told is not None and msgspec.json.decode(told)[2] == {"title": "d.st"}
    assert lists.document("loras") is None


def test_overrides_of_a_running_job_are_not_taken_for_the_engines_options() -> None:
    first = engine(1, described("a.st"))
    lists = Lists(Engines([first]))
    own = lists.options_of(first)
    leaked = replace(first, description=described("a.st", options="b.safetensors"))
    assert lists.options_of(leaked) == lists.options_of(leaked) == own
    assert lists.options_of(first) == own
    twice = [replace(first, description=described("a.st", options="c.safetensors")) for _ in range(2)]
    once, shown = [lists.options_of(changed) for changed in twice]
    assert once == own and shown is not None and b"c.safetensors" in shown
    assert lists.options_of(engine(2, None)) is None
    # A lost engine has forgotten, or was changed.
    lost = replace(first, state=EngineState.LOST)
    assert lists.options_of(lost) == own
