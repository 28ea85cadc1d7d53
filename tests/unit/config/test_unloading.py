"""The setting `unload`, and engines that name several gpus."""

import pytest

from gpulane.config import EngineSettings, parse_settings
from gpulane.config.unloading import KnownUnload, Unload, UnloadCommand, UnloadRequest, parse_unload
from gpulane.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ollama", KnownUnload.OLLAMA),
        (" llama-swap ", KnownUnload.LLAMA_SWAP),
        ("POST /unload", UnloadRequest(method="POST", target="/unload")),
        ("GET /v1/unload?all=1", UnloadRequest(method="GET", target="/v1/unload?all=1")),
        (
            'POST /models/unload {"model": "a b"}',
            UnloadRequest(method="POST", target="/models/unload", body=b'{"model": "a b"}'),
        ),
        ("run /opt/x 'a b' c", UnloadCommand(argv=("/opt/x", "a b", "c"))),
    ],
)
def test_forms(text: str, expected: Unload) -> None:
    assert parse_unload(text) == expected


def test_a_command_has_the_engines_variables_and_folder() -> None:
    assert parse_unload("run x", env={"A": "1"}, folder="/f") == UnloadCommand(
        argv=("x",), env=(("A", "1"),), folder="/f"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "write ollama, llama-swap"),
        ("Ollama!", "'Ollama!' is not understood"),
        ("post /x", "is not understood"),
        ("POST x", "is not understood"),
        ("POST /x {", "is no JSON body"),
        ("POST /x\n/y", "is not understood"),
        ("FETCH /x", "is not understood"),
        ("run", "unload: run is empty"),
        ("run 'a", "no closing quotation"),
        ("running x", "is not understood"),
    ],
)
def test_refusals_say_what_to_write(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_unload(text)
    assert said in caught.value.message and caught.value.message.startswith("unload")
    assert "\n" not in caught.value.message


def engine(more: str) -> str:
    return f"gpus: {{one: {{engines: [{{url: '11434', {more}}}]}}}}"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            "service: http, unload: later",
            "gpus.one: http://127.0.0.1:11434: unload: 'later' is not understood",
        ),
        ("service: comfyui, unload: ollama", "how comfyui gives VRAM back is known"),
        ("gpus: [one, two]", "names one, two: dispatching for more than one card comes later"),
        ("gpus: [two]", "dispatching for more than one card"),
    ],
)
def test_what_the_settings_refuse(more: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_settings(engine(more), source="x.yaml")
    assert said in caught.value.message and caught.value.message.startswith("x.yaml: gpus.one: ")


@pytest.mark.parametrize(
    "more", ["gpus: [one]", "gpus: []", "unload: 'POST /x'", "service: http, unload: ollama"]
)
def test_what_the_settings_take(more: str) -> None:
    (found,) = parse_settings(engine(more)).gpus["one"].engines
    assert isinstance(found, EngineSettings)
