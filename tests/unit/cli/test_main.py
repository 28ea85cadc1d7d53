"""Wrong use of the commands: one line, perhaps a hint, and the exit status; never a traceback."""

import errno
import hashlib
import json
import os
import socket
from pathlib import Path

import click
import pytest

from gpulane.cli import main, program
from gpulane.errors import ConfigError, GpulaneError


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GPULANE_")]:
        monkeypatch.delenv(name)


def failed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Run a command that fails; returns its status and all of its words."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capsys.readouterr()
    first, *hints = err.splitlines()
    assert out == ""
    assert first.startswith("gpulane: ")
    assert len(hints) < 2
    assert all(line.startswith("         ") for line in hints)
    assert isinstance(ended.value.code, int)
    return ended.value.code, err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "no GPUs: name them"),
        ("-c none.yaml", "none.yaml cannot be read"),
        ("-c broken.yaml", "broken.yaml: line 2"),
        ("-c latin.yaml", "is not UTF-8"),
        ("-c wrong.yaml", "did you mean 'listen_comfyui'"),
        ("81x88", "'81x88' is no engine"),
        ("8188+", "'8188+' is no GPU"),
        ("8188+8188", "is named twice on GPU gpu0"),
        ("8188 8188", "on the GPUs gpu0 and gpu1"),
        ("8188 --listen 0.0.0.0:0", "there are no keys"),
        ("8188 --listen here", "'here' is no address"),
        ("8188 --store postgres", "store: write sqlite"),
        ("--lsten x", "No such option"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "check"])
def test_wrong_settings(
    command: str,
    arguments: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wrong.yaml").write_text("gpus: {a: {engines: [8188]}}\nlisten_confyui: 1\n")
    Path("broken.yaml").write_text("gpus: [\n")
    Path("latin.yaml").write_bytes(b"name: caf\xe9\n")
    status, err = failed(capsys, command, *arguments.split())
    assert status == 2
    assert words in err


def test_a_shared_queue_comes_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--store", "redis://h", "--data", str(tmp_path), "--listen", "127.0.0.1:0")
    status, err = failed(capsys, "serve", "comfyui:8188", *given)
    assert status == 2
    assert "comes with a later version" in err


def test_settings_file_by_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GPULANE_CONFIG", str(tmp_path / "mine.yaml"))
    assert "mine.yaml cannot be read" in failed(capsys, "serve")[1]


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ("serv", 2, "Did you mean 'serve'"),
        ("gpus --url foo", 2, "'foo' is no URL of a gateway"),
        ("gpus --url http://127.0.0.1:99999", 2, "is no URL of a gateway"),
        ("gpus --key a\tb", 2, "the key has characters"),
        ("gpus --url http://127.0.0.1:{port}", 1, "GPULANE_URL"),
        ("wait x --url http://127.0.0.1:{port}", 1, "no gateway at http://127.0.0.1:{port}"),
        ("submit editor.json", 2, "as the editor saves it"),
        ("submit", 2, "name a workflow file"),
        ("submit none.json", 2, "none.json cannot be read"),
        ("submit api.json --seeds 5..1", 2, "--seeds '5..1'"),
        ("submit api.json --out x", 2, "--out needs --wait"),
        ("submit api.json --band batch --priority 2", 2, "--band or --priority, not both"),
        ("submit api.json --a1111 txt2img", 2, "exclude each other"),
        ("submit --a1111 txt2img --payload api.txt", 2, "is no JSON object"),
        ("prioritize x", 2, "say --band or --priority"),
        ("prioritize x --band best", 2, "'best'"),
        ("demo --gpus 0", 2, "--gpus"),
        ("demo --listen 0.0.0.0:0", 2, "there are no keys"),
        ("sim-engine comfyui --gpu card --version 1", 2, "version must be"),
        ("sim-engine sdxl --gpu card", 2, "'sdxl'"),
        ("key new", 2, "--account"),
    ],
)
def test_wrong_use(
    arguments: str,
    status: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("editor.json").write_text(json.dumps({"nodes": [], "links": []}))
    Path("api.json").write_text(json.dumps({"1": {"class_type": "X", "inputs": {"seed": 1}}}))
    Path("api.txt").write_text("text")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and never listens: who connects is refused
        port = str(free.getsockname()[1])
        given = [word.replace("{port}", port) for word in arguments.split(" ")]
        found, err = failed(capsys, *given)
    assert found == status, err
    assert words.replace("{port}", port) in err


def raising(error: BaseException) -> click.Command:
    def fails() -> None:
        raise error

    return click.Command("fails", callback=fails)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ConfigError("x"), 2),
        (GpulaneError("x\n y"), 1),
        (BaseExceptionGroup("a", [BaseExceptionGroup("b", [ConfigError("x")])]), 2),
    ],
)
def test_our_own_errors(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(program.commands, "fails", raising(error))
    found, err = failed(capsys, "fails")
    assert found == status
    assert err in {"gpulane: x\n", "gpulane: x y\n"}


def test_an_error_of_the_program_itself_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    two = ExceptionGroup("two", [ConfigError("x"), KeyError("y")])
    for error in (KeyError("x"), two, OSError(errno.EIO, "x")):
        monkeypatch.setitem(program.commands, "fails", raising(error))
        with pytest.raises(type(error)):
            main(["fails"])


def test_ctrl_c_has_a_status_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(program.commands, "fails", raising(KeyboardInterrupt()))
    with pytest.raises(SystemExit) as ended:
        main(["fails"])
    assert ended.value.code == 130


def test_a_new_key_is_in_its_entry_by_its_hash_alone(capsys: pytest.CaptureFixture[str]) -> None:
    made: set[str] = set()
    for _ in range(3):
        with pytest.raises(SystemExit) as ended:
            main(["key", "new", "--account", "ann: b", "--role", "operator", "--json"])
        assert ended.value.code == 0
        found = json.loads(capsys.readouterr().out)
        assert hashlib.sha256(found["key"].encode()).hexdigest() == found["entry"]["sha256"]
        assert found["entry"]["account"] == "ann: b"
        made.add(found["key"])
    assert len(made) == 3
