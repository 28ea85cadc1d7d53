"""The table of engines and their processes."""

import msgspec

from gpulane.cli.documents import EngineDetail
from gpulane.cli.output import plain_rows
from gpulane.cli.tables import engine_rows


def test_engines_have_a_row_each() -> None:
    engines = msgspec.convert(
        [
            {"url": "http://a:1", "service": "a1111", "state": "lost", "why": "refused", "gpu": "box/gpu0"},
            {
                "url": "http://b:2",
                "service": "comfyui",
                "state": "lost",
                "why": "old",
                "gpu": "box/gpu0",
                "process": {"state": "backing_off", "why": "ended with status 3", "restarts": 4, "pid": None},
            },
        ],
        type=list[EngineDetail],
    )
    assert [line.split() for line in plain_rows(engine_rows(engines))] == [
        ["ENGINE", "GPU", "SERVICE", "STATE", "PROCESS", "PID", "RESTARTS", "WHY"],
        ["http://a:1", "box/gpu0", "a1111", "lost", "-", "-", "-", "refused"],
        [
            "http://b:2",
            "box/gpu0",
            "comfyui",
            "lost",
            "backing_off",
            "-",
            "4",
            "ended",
            "with",
            "status",
            "3",
        ],
    ]
