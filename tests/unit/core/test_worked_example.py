"""The worked example of docs/scheduling.md 1.5 under rules 1, 2 and 5 alone.

Rows up to t = 46 are the same. Then rule 2b is missing: bob's j10 is not held for 3 s because a copy of C
is loading, but loads its own copy at once (t = 46 instead of 49). The example names gpus in the order they
report; here ties go by id.
"""

from __future__ import annotations

from gpulane.core.model import GpuId
from gpulane.core.policy import Policy
from tests.unit.core.building import Desk, gpu

LOAD, SERVICE = 6.0, 10.0
ARRIVALS = [
    (0.0, "j1", "ann", "A"),
    (0.0, "j2", "hog", "B"),
    (0.5, "j3", "hog", "B"),
    (0.5, "j4", "hog", "B"),
    (0.5, "j5", "hog", "B"),
    (1.0, "j6", "ann", "A"),
    (2.0, "j7", "bob", "A"),
    (12.0, "j8", "cyd", "C"),
    (13.0, "j9", "ann", "A"),
    (14.0, "j10", "bob", "C"),
]
EXPECTED = [
    (0.0, "j1", "node/g0", "2"),
    (0.0, "j2", "node/g1", "2"),
    (16.0, "j7", "node/g0", "1"),
    (16.0, "j3", "node/g1", "1"),
    (26.0, "j6", "node/g0", "1"),
    (26.0, "j4", "node/g1", "1"),
    (36.0, "j9", "node/g0", "1"),
    (36.0, "j5", "node/g1", "1"),
    (46.0, "j8", "node/g0", "2"),
    (46.0, "j10", "node/g1", "2"),
]


def test_worked_example() -> None:
    desk = Desk(Policy(load_seconds_unknown=LOAD, service_seconds_unknown=SERVICE))
    desk.add(gpu("g0"), gpu("g1"))
    started: list[tuple[float, str, str, str]] = []
    ends: list[tuple[float, str]] = []
    arrivals = list(ARRIVALS)
    while arrivals or ends:
        desk.now = min([row[0] for row in arrivals[:1]] + [at for at, _ in ends])
        while arrivals and arrivals[0][0] == desk.now:
            _, id_, account, model = arrivals.pop(0)
            desk.submit(id_, account, model)
        for at, id_ in sorted(ends):
            if at == desk.now:
                ends.remove((at, id_))
                desk.end(id_)
        for start in desk.starts():
            first = start.candidates[0]
            desk.claim(start)
            started.append((desk.now, first.job, start.gpu, first.rule))
            ends.append((desk.now + first.charge.total, first.job))
    assert started == EXPECTED
    assert desk.book.idle_gpus(desk.now)[0].gpu.id == GpuId("node/g0")
