"""What `check` says of what engines answered and of the settings."""

from pathlib import Path

import pytest

from gpulane.cli.findings import Asked, Grade, card_findings, engine_finding, settings_findings, summary
from gpulane.cli.inspection import inspect
from gpulane.config import EngineSettings, parse_settings
from gpulane.core.model import Service
from gpulane.engine.base import Description
from gpulane.engine.detect import Detected
from gpulane.engine.telemetry import CardReading, Telemetry
from gpulane.errors import EngineError
from tests.unit.engine.fake_nvml import FakeCard, FakeNvml

URL = "http://127.0.0.1:8188"
COMFYUI = Description(
    service=Service.COMFYUI,
    flavor="comfyui",
    version="0.27.0",
    offers=None,
    documents={"object_info": b'{"A": {}, "B": {}}', "models/checkpoints": b'["x"]'},
    digest="",
)
FOUND = Detected(service=Service.COMFYUI, flavor="comfyui", answers=True)
A1111 = Detected(service=Service.A1111, flavor="a1111", answers=True)
KEY = "{account: a, sha256: %s, role: %s}"


def asked(found: Detected, about: Description | EngineError | None = None, service: object = None) -> Asked:
    engine = EngineSettings(url=URL, service=service)  # type: ignore[arg-type]  # one of the names
    return Asked(gpu="gpu0", engine=engine, found=found, about=about, latency_ms=12.4)


@pytest.mark.parametrize(
    ("case", "text", "hint"),
    [
        (
            asked(Detected(service=None, why="connection refused: x")),
            "does not answer: connection refused",
            "start it",
        ),
        (asked(Detected(service=None, why="no answer within 5 s")), "no answer within 5 s", "start it"),
        (asked(Detected(service=None, answers=True, why="it wants a login")), "401 or 403", "Origin"),
        (
            asked(Detected(service=None, answers=True, why="it speaks HTTP")),
            "is no engine",
            f"write http:{URL}",
        ),
        (asked(A1111, None, "comfyui"), "is A1111, but the settings say comfyui", f"write a1111:{URL}"),
        (asked(FOUND, None, "http"), "is ComfyUI, but the settings say http", f"write comfyui:{URL}"),
        (asked(A1111, EngineError(f"{URL} has no /sdapi")), "cannot be used: it has no /sdapi", "--api"),
        (asked(FOUND, EngineError("slow")), "is ComfyUI, but cannot be used: slow", "/object_info"),
    ],
)
def test_what_is_wrong_is_said_with_how_to_mend_it(case: Asked, text: str, hint: str) -> None:
    finding = engine_finding(case)
    assert finding.grade is Grade.WRONG and finding.is_engine
    assert text in finding.text
    assert hint in " ".join(finding.hints)
    assert finding.subject == f"gpu0 {URL}"


def test_an_engine_elsewhere_must_listen_beyond_its_machine() -> None:
    engine = EngineSettings(url="http://box7:8188")
    case = Asked(gpu="g", engine=engine, found=Detected(service=None, why="x"), about=None, latency_ms=1)
    assert "--listen" in " ".join(engine_finding(case).hints)


def test_what_is_well_is_summed_up() -> None:
    assert engine_finding(asked(FOUND, COMFYUI)).grade is Grade.OK
    assert summary(COMFYUI, 12.4) == "comfyui 0.27.0, 2 node classes, 1 checkpoints, answers in 12 ms"


def findings(text: str) -> dict[str, tuple[Grade, str]]:
    found = settings_findings(parse_settings(text), source="x.yaml")
    return {finding.subject: (finding.grade, finding.text) for finding in found}


def test_two_services_on_one_card_are_well() -> None:
    found = findings("gpus: {a: {engines: [8188, 7860]}}")
    assert found["settings"] == (Grade.OK, "x.yaml: 1 GPU, 2 engines")
    assert found["keys"][0] is Grade.OK


def test_one_engine_under_two_names() -> None:
    found = findings("gpus: {a: {engines: [8188]}, b: {engines: ['localhost:8188']}}")
    grade, text = found["settings"]
    assert grade is Grade.WRONG and "are one engine" in text


GIB = 1024**3
CARD = CardReading(uuid="GPU-a", name="NVIDIA Test", bytes_total=24 * GIB, bytes_free=20 * GIB)


def cards(text: str, *found: CardReading) -> list[tuple[Grade, str, str, str]]:
    made = card_findings(parse_settings(text), found)
    return [(one.grade, one.subject, one.text, " ".join(one.hints)) for one in made]


def test_cards_are_listed_by_uuid_and_no_entry_is_guessed() -> None:
    (listed,) = cards("gpus: {a: {engines: [8188]}}", CARD)
    assert listed[:3] == (Grade.OK, "card", "GPU-a NVIDIA Test, 24.0 GiB, 20.0 GiB free")
    assert "write uuid: GPU-a" in listed[3]
    (named,) = cards("gpus: {a: {engines: [8188], uuid: GPU-a}}", CARD)
    assert named == (Grade.OK, "card of a", "GPU-a NVIDIA Test, 24.0 GiB, 20.0 GiB free", "")
    assert cards("gpus: {a: {engines: [8188]}}") == []


def test_a_card_that_tells_no_memory() -> None:
    (listed,) = cards("gpus: {a: {engines: [8188], uuid: x}}", CardReading(uuid="x", name="N"))
    assert listed[2] == "x N, memory unknown"


def test_a_uuid_that_no_card_has() -> None:
    text = "gpus: {a: {engines: [8188], uuid: GPU-b}}"
    assert cards(text, CARD)[1][:3] == (Grade.NOTE, "card of a", "uuid GPU-b: no card here has it")
    assert cards(text)[0][0] is Grade.NOTE and "no driver answers" in cards(text)[0][2]


@pytest.mark.anyio
async def test_cards_are_asked_for_and_a_driver_that_fails_ends_nothing(tmp_path: Path) -> None:
    settings = parse_settings(f"{{gpus: {{}}, listen: '127.0.0.1:0', data: '{tmp_path}'}}")
    driver = FakeNvml(FakeCard("GPU-a"), FakeCard("GPU-b"))
    found = await inspect(settings, source="x", telemetry=Telemetry(driver))
    assert [one.text.split()[0] for one in found if one.subject == "card"] == ["GPU-a", "GPU-b"]
    assert not driver.is_up, "let go of again"
    driver.error = 999
    assert not [
        one
        for one in await inspect(settings, source="x", telemetry=Telemetry(driver))
        if "card" in one.subject
    ]


@pytest.mark.parametrize(
    ("keys", "grade"),
    [
        ([KEY % ("a" * 64, "user")], Grade.NOTE),
        ([KEY % ("a" * 64, "operator")], Grade.OK),
        ([KEY % ("a" * 64, "operator")] * 2, Grade.WRONG),
    ],
)
def test_keys(keys: list[str], grade: Grade) -> None:
    found = findings(f"gpus: {{a: {{engines: [8188]}}}}\nkeys: [{', '.join(keys)}]")
    assert found["keys"][0] is grade
