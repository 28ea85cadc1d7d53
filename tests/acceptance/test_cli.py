"""The installed command line: ready lines, exit statuses, errors of one line, a day's work."""

import contextlib
import json
import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.installed import Program, engines, program, run, run_all, until

WORKFLOW = {
    "1": {
        "class_type": "SimSlow",
        "inputs": {"steps": 2, "delay": 1.0, "seed": 0, "preview": False},
        "_meta": {"title": "Slow"},
    },
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "cli"}},
}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def listener() -> Iterator[int]:
    """A port that is taken, by something that speaks no HTTP."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def refused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- wrong use


def bad_starts(folder: Path, taken: int) -> dict[str, tuple[list[str], str]]:
    """Arguments of `serve` that only a start can refuse, by name, each with words of its one line."""
    (folder / "file").write_text("")
    (folder / "newer").mkdir()
    with contextlib.closing(sqlite3.connect(folder / "newer" / "queue.db")) as database:
        database.execute("PRAGMA user_version = 999")
    free = ["--listen", "127.0.0.1:0"]
    data = ["--data", str(folder / "data")]
    # Nothing listens at this engine's port: with its kind given it need not.
    known = f"comfyui:127.0.0.1:{refused_port()}"
    down = f"127.0.0.1:{refused_port()}"
    return {
        # It is asked for five seconds, beside the others.
        "engine is none": ([f"127.0.0.1:{taken}", *free, "--data", str(folder / "d3")], f"127.0.0.1:{taken}"),
        "busy port": ([known, *data, "--listen", f"127.0.0.1:{taken}"], "Address already in use"),
        "data folder is a file": ([known, *free, "--data", str(folder / "file")], "cannot be used"),
        "newer database": ([known, *free, "--data", str(folder / "newer")], "newer gpulane (format 999"),
        "engine down": ([down, *free, "--data", str(folder / "d2")], "does not answer"),
    }


def test_what_cannot_start_is_one_line_and_status_2(tmp_path: Path, listener: int) -> None:
    cases = bad_starts(tmp_path, listener)
    found = dict(zip(cases, run_all(["serve", *case[0]] for case in cases.values()), strict=True))
    for name, ended in found.items():
        assert ended.status == 2, (name, ended)
        assert cases[name][1] in ended.error, (name, ended.err)
        assert ended.out == "", name


def test_other_commands_that_cannot_start(tmp_path: Path, listener: int) -> None:
    card = str(tmp_path / "card")
    cases = {
        "demo": ["demo", "--listen", f"127.0.0.1:{listener}"],
        "sim-engine": ["sim-engine", "comfyui", "--gpu", card, "--port", str(listener)],
    }
    for name, ended in zip(cases, run_all(cases.values()), strict=True):
        assert ended.status == 2, (name, ended)
        assert "in use" in ended.error, (name, ended)


def test_help_loads_nothing_heavy() -> None:
    found = run("--help")
    assert found.status == 0 and "sim-engine" in found.out
    code = "import sys, gpulane.cli; print({'aiohttp', 'rich', 'msgspec', 'asyncio'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout == "set()\n", "heavy modules are imported inside the commands"


# ---- at work


def settings_of(folder: Path, urls: list[str], more: str = "") -> list[str]:
    settings = folder / "gpulane.yaml"
    settings.write_text(
        f"listen: 127.0.0.1:0\ndata: {folder / 'data'}\nname: box\n{more}"
        f"probe: {{interval_seconds: 0.3, quiet_seconds: 0.2}}\n"
        f"gpus: {{gpu0: {{engines: [{', '.join(urls)}], vram_gib: 24}}}}\n"
    )
    return ["serve", "-c", str(settings)]


def api(url: str, path: str) -> Any:
    """Look without a process of its own, where it is looked often."""
    with urllib.request.urlopen(f"{url}/gpulane/v1/{path}", timeout=10) as answer:
        return json.load(answer)


def engines_ready(url: str) -> Any:
    gpus = api(url, "gpus")["gpus"]
    return all(engine["state"] == "ready" for gpu in gpus for engine in gpu["engines"])


def test_a_days_work(tmp_path: Path) -> None:
    workflow = tmp_path / "w.json"
    workflow.write_text(json.dumps(WORKFLOW))
    with engines(tmp_path, "a1111", "comfyui") as urls:
        found = run("check", f"{urls[0].removeprefix('http://')}+{urls[1]}", "--data", str(tmp_path / "data"))
        assert found.status == 0, found
        assert "a1111" in found.out and "checkpoints" in found.out and "node classes" in found.out
        with program(
            tmp_path, *settings_of(tmp_path, urls), ready="gpulane ready http://127.0.0.1:"
        ) as serve:
            until(lambda: engines_ready(serve.url))
            work(serve, tmp_path, str(workflow))
            check_beside(serve, urls, tmp_path)
            serve.signal(signal.SIGINT)
            assert serve.ends() == 0


def work(serve: Program, folder: Path, workflow: str) -> None:
    env = {"GPULANE_URL": serve.url}
    done = run("submit", workflow, "--seeds", "1..2", "--wait", "--out", str(folder / "pics"), **env)
    assert done.status == 0, done
    assert done.out.count("succeeded") == 2
    a1111 = ("--set", "prompt=a fox", "--set", "steps=2", "--set", "width=64", "--set", "height=64")
    done = run("submit", "--a1111", "txt2img", *a1111, "--wait", "--out", str(folder / "pics"), **env)
    assert done.status == 0, done
    pictures = list((folder / "pics").iterdir())
    assert len(pictures) == 3 and all(file.read_bytes().startswith(PNG) for file in pictures)
    listed = run("jobs", "--json", "--limit", "2", **env).json
    assert [job["state"] for job in listed["jobs"]] == ["succeeded", "succeeded"]
    assert listed["next_cursor"]

    assert run("drain", "gpu0", **env).out == "box/gpu0 draining\n"
    waiting = run("submit", workflow, "--json", **env).json[0]["id"]
    assert "place 1" in run("explain", waiting, **env).out
    assert "batch 7" in run("prioritize", waiting, "--band", "batch", "--priority", "7", **env).out
    table = run("top", **env).out
    assert "draining" in table and "SimSlow" not in table and "\x1b" not in table
    assert run("cancel", waiting, **env).out == f"{waiting} cancelled\n"
    cancelled = run("wait", waiting, **env)
    assert (cancelled.status, "cancelled" in cancelled.out) == (1, True)
    assert run("resume", "gpu0", **env).out == "box/gpu0 idle\n"
    unknown = run("resume", "gpu7", **env)
    assert unknown.status == 1 and "No GPU 'gpu7'" in unknown.error and "box/gpu0" in unknown.err

    assert "is paused" in run("pause", **env).out
    held = run("submit", workflow, **env).out.strip()
    assert run("job", held, "--json", **env).json["state"] == "queued"
    assert "1 waiting" in run("unpause", **env).out
    assert run("wait", held, **env).status == 0


def check_beside(serve: Program, urls: list[str], folder: Path) -> None:
    """`check` names what is wrong with each engine, while a gateway serves."""
    down = f"127.0.0.1:{refused_port()}"
    address = serve.url.removeprefix("http://")
    found = run(
        "check", f"comfyui:{urls[0]}", down, "--listen", address, "--data", str(folder / "data"), "--json"
    )
    assert found.status == 1, found
    grades = {one["subject"]: (one["grade"], one["text"]) for one in found.json}
    assert grades["listen"] == ("note", f"{address}: a gpulane serves there already")
    assert grades[f"gpu0 {urls[0]}"] == ("wrong", "is A1111, but the settings say comfyui")
    assert grades[f"gpu1 http://{down}"][0] == "wrong"
    assert run("check", urls[1], "--listen", urls[1].removeprefix("http://")).status == 2


def test_keys_and_an_http_service_of_its_own_port(tmp_path: Path) -> None:
    made = run("key", "new", "--account", "ann: a", "--role", "operator", "--json").json
    shown = run("key", "new", "--account", "ann: a", "--weight", "2").out
    assert "sha256: " in shown and "weight: 2.0" in shown and "gpl_" in shown
    entry = json.dumps(made["entry"])
    own = refused_port()
    with engines(tmp_path, "http") as urls:
        engine = f"{{url: '{urls[0]}', service: http, listen: '127.0.0.1:{own}'}}"
        arguments = settings_of(tmp_path, [engine], more=f"keys: [{entry}]\n")
        with program(tmp_path, *arguments, ready="gpulane ready") as serve:
            refused = run("gpus", "--url", serve.url)
            assert refused.status == 1 and "A key is needed" in refused.error and "GPULANE_KEY" in refused.err
            gpus = run("gpus", "--url", serve.url, "--json", GPULANE_KEY=made["key"]).json["gpus"]
            port = urls[0].rpartition(":")[2]
            assert gpus[0]["engines"][0]["name"] == f"gpu0-{port}"
            until(lambda: answers(own, made["key"]))
            assert made["key"] not in serve.log.read_text()


def answers(port: int, key: str) -> bool:
    headers = {"X-Api-Key": key}
    try:
        asked = urllib.request.Request(f"http://127.0.0.1:{port}/v1/models", headers=headers)
        with urllib.request.urlopen(asked, timeout=5) as answer:
            return answer.status == 200
    except urllib.error.HTTPError as error:
        with error:
            return False


def test_ctrl_c_drains_and_a_second_one_ends_at_once(tmp_path: Path) -> None:
    slow = {**WORKFLOW, "1": {**WORKFLOW["1"], "inputs": {**WORKFLOW["1"]["inputs"], "steps": 4000}}}  # type: ignore[dict-item]
    workflow = tmp_path / "slow.json"
    workflow.write_text(json.dumps(slow))
    quick = tmp_path / "quick.json"
    quick.write_text(json.dumps(WORKFLOW))
    with engines(tmp_path, "comfyui") as urls:
        arguments = settings_of(tmp_path, urls)
        with program(tmp_path, *arguments, ready="gpulane ready") as serve:
            until(lambda: engines_ready(serve.url))
            env = {"GPULANE_URL": serve.url}
            short = run("submit", str(quick), "--set", "Slow.steps=12", **env).out.strip()
            second = run("serve", "-c", str(tmp_path / "gpulane.yaml"))
            assert second.status == 2 and "another gpulane" in second.error, "the data folder is in use"
            serve.signal(signal.SIGTERM)
            assert serve.ends() == 0
        with program(tmp_path, *arguments, ready="gpulane ready") as serve:
            env = {"GPULANE_URL": serve.url}
            assert run("job", short, "--json", **env).json["state"] == "succeeded", "drained, and remembered"
            until(lambda: engines_ready(serve.url))
            long = run("submit", str(workflow), **env).out.strip()
            until(lambda: api(serve.url, f"jobs/{long}")["state"] == "running")
            serve.signal(signal.SIGINT)
            until(lambda: "draining" in serve.log.read_text())
            assert serve.process.poll() is None
            serve.signal(signal.SIGINT)
            assert serve.ends(10) == 0


# ---- demo


def test_demo_works_and_leaves_nothing(tmp_path: Path) -> None:
    found = run("demo", "--seconds", "3", "--listen", "127.0.0.1:0", TMPDIR=str(tmp_path))
    assert found.status == 0, found
    lines = found.out.splitlines()
    assert lines[0].startswith("gpulane ready http://127.0.0.1:") and "/gpulane/" in lines[0]
    assert lines[-1].endswith("; overlaps 0") and not lines[-1].startswith("0 jobs"), found
    assert found.err == ""
    assert list(tmp_path.iterdir()) == []


def test_demo_ends_with_ctrl_c(tmp_path: Path) -> None:
    arguments = ("demo", "--gpus", "1", "--listen", "127.0.0.1:0")
    with program(tmp_path, *arguments, ready="gpulane ready", TMPDIR=str(tmp_path)) as demo:
        demo.signal(signal.SIGINT)
        assert demo.ends(15) == 0
        assert demo.process.stdout is not None
        assert demo.process.stdout.read().decode().endswith("; overlaps 0\n")
        assert demo.log.read_text() == ""
