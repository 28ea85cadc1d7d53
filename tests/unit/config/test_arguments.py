"""The command line's short form of gpus."""

import pytest

from gpulane.config import EngineSettings, gpus_from_arguments, parse_settings
from gpulane.config.arguments import engine_from_text, engine_url
from gpulane.errors import ConfigError


def test_each_argument_is_one_gpu_and_plus_joins_engines() -> None:
    gpus = gpus_from_arguments(("7860+8188", "7861"))
    assert list(gpus) == ["gpu0", "gpu1"]
    assert gpus["gpu0"].engines == (
        EngineSettings(url="http://127.0.0.1:7860"),
        EngineSettings(url="http://127.0.0.1:8188"),
    )


@pytest.mark.parametrize(
    ("text", "url", "service"),
    [
        ("8188", "http://127.0.0.1:8188", None),
        ("box:8188", "http://box:8188", None),
        ("comfyui:8188", "http://127.0.0.1:8188", "comfyui"),
        ("a1111:box:7860", "http://box:7860", "a1111"),
        ("http:11434", "http://127.0.0.1:11434", "http"),
        ("http://box:11434/", "http://box:11434", None),
        ("http:http://box:1/v1", "http://box:1/v1", "http"),
        ("https://box/sd", "https://box/sd", None),
        ("http://[::1]:8188", "http://[::1]:8188", None),
    ],
)
def test_engine_forms(text: str, url: str, service: str | None) -> None:
    engine = engine_from_text(text)
    assert (engine.url, engine.service) == (url, service)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "abc",
        "8188x",
        "99999",
        "0",
        "box:",
        "http://",
        "http://box:0",
        "http://box:1?x",
    ],
)
def test_what_is_no_engine_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        engine_url(text)
    assert "is no engine" in caught.value.message


@pytest.mark.parametrize(
    "text",
    [
        "http://me:SECRET@box:1",
        "https://me:SECRET@box/sd",
        "http://me:a/SECRET@box:1",
        "http://me:a@SECRET@box:1",
        "me:SECRET@box:8188",
        "comfyui:me:SECRET@box:8188",
        "http:http://me:SECRET@box:1/v1",
        "http://SECRET@box:1",
        "SECRET@box:1",
    ],
)
def test_a_password_in_an_address_is_refused_and_never_shown(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        engine_from_text(text)
    assert "password" in caught.value.message and "SECRET" not in caught.value.message
    with pytest.raises(ConfigError) as caught:
        parse_settings(f"gpus: {{gpu0: {{engines: [{{url: {text!r}}}]}}}}")
    assert "SECRET" not in caught.value.message
    with pytest.raises(ConfigError) as caught:
        parse_settings(f"store: {text!r}")
    assert "SECRET" not in caught.value.message


@pytest.mark.parametrize("argument", ["+8188", "7860+", "7860++8188"])
def test_a_missing_engine_is_refused(argument: str) -> None:
    with pytest.raises(ConfigError):
        gpus_from_arguments((argument,))
