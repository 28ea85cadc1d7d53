"""Settings of an engine's process: what goes together, and what is refused in which words."""

import pytest

from gpulane.config import parse_settings
from gpulane.config.commands import command_words
from gpulane.errors import ConfigError


def engine(text: str) -> str:
    return f"gpus: {{a: {{engines: [{{url: 8188, {text}}}]}}}}".replace("url: 8188", "url: '8188'")


@pytest.mark.parametrize(
    "text",
    [
        "service: comfyui, command: python main.py, folder: /opt/c, env: {A: b}, stop_to_unload: true",
        "restart: systemctl --user restart comfyui",
        "restart: ./again, folder: /opt, env: {A: b}",
        "service: http, unload: run ./unload, env: {A: b}",
    ],
)
def test_what_goes_together(text: str) -> None:
    parse_settings(engine(text))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("service: comfyui, command: ''", "command is empty: write a program"),
        ("service: comfyui, command: ' '", "command is empty"),
        ("service: comfyui, command: \"''\"", "command is empty"),
        ("restart: ''", "restart is empty"),
        ('service: comfyui, command: "a \'b"', "command cannot be understood: no closing quotation"),
        ("service: comfyui, command: a, restart: b", "command and restart are both given"),
        ("command: a", "command needs service"),
        ("stop_to_unload: true", "stop_to_unload needs command"),
        ("restart: a, stop_to_unload: true", "stop_to_unload needs command"),
        ("env: {A: b}", "env is for a command, and none is given"),
        ("folder: /opt", "folder is for a command"),
        ("service: comfyui, command: a, ready_seconds: 0", "ready_seconds must be above 0"),
        ("service: comfyui, command: a, env: {'A=': b}", "'A=' is no name of a variable"),
        ("service: comfyui, command: a, env: {A: 1}", "Expected `str`, got `int`"),
    ],
)
def test_what_does_not(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_settings(engine(text))
    assert said in caught.value.message


def test_words_are_a_shells_without_a_shell() -> None:
    assert command_words("run 'a b' $HOME *") == ("run", "a b", "$HOME", "*")
