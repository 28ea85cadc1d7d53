"""`gpulane lock` as installed: anybody's program holds a GPU, and whatever is killed, the kernel tells."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.installed import COMMAND, END_SECONDS, engines, environment, program, run, until

pytestmark = pytest.mark.timeout(120)

BRISK = "probe: {interval_seconds: 0.3, timeout_seconds: 2, misses_max: 2, quiet_seconds: 0.2}"
SLEEPS = "import sys, time; print('runs', flush=True); time.sleep(60)"


@dataclass(frozen=True, slots=True)
class Ground:
    """A gateway over one simulated engine, which may be killed and started again."""

    folder: Path
    engine: str
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextlib.contextmanager
    def gateway(self) -> Iterator["subprocess.Popen[bytes]"]:
        settings = self.folder / "gpulane.yaml"
        settings.write_text(
            f"listen: 127.0.0.1:{self.port}\ndata: {self.folder / 'data'}\nname: box\n"
            f"lock_dir: {self.folder / 'locks'}\n{BRISK}\n"
            f"gpus:\n  gpu0: {{engines: [{{url: '{self.engine}', service: comfyui}}], "
            "uuid: GPU-0, labels: [big]}\n"
        )
        with program(self.folder, "serve", "-c", str(settings), ready="gpulane ready") as served:
            yield served.process

    def ask(self, path: str, body: object = None, method: str | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        request.method = method or request.get_method()
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)

    def gpu(self) -> Any:
        return self.ask("/gpulane/v1/gpus")["gpus"][0]

    def is_ready(self) -> bool:
        return all(engine["state"] == "ready" for engine in self.gpu()["engines"])

    def is_idle(self) -> bool:
        return self.gpu()["state"] == "idle"

    def prompt(self, steps: int, seed: int) -> str:
        inputs = {"steps": steps, "delay": 1.0, "seed": seed, "preview": False}
        workflow = {
            "1": {"class_type": "SimSlow", "inputs": inputs},
            "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": f"s{seed}"}},
        }
        return self.ask("/prompt", {"prompt": workflow})["prompt_id"]

    def state(self, job: str) -> str:
        return self.ask(f"/gpulane/v1/jobs/{job}")["state"]

    def locks(self) -> list[Any]:
        return self.ask("/gpulane/v1/jobs?service=lock")["jobs"]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    folder = tmp_path_factory.mktemp("lock")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    with engines(folder, "comfyui") as (engine,):
        yield Ground(folder, engine, port)


@pytest.fixture(scope="module")
def served(ground: Ground) -> Iterator[Ground]:
    with ground.gateway():
        until(ground.is_ready)
        yield ground


@contextlib.contextmanager
def locking(ground: Ground, *words: str) -> Iterator["subprocess.Popen[str]"]:
    """Run `gpulane lock` beside the test; killed in the end if it still runs."""
    process = subprocess.Popen(
        [COMMAND, "lock", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment({"GPULANE_URL": ground.url}),
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=10)


def line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_status_and_environment_pass_through(served: Ground) -> None:
    tell = "import os, sys; print(*(os.environ.get(n) for n in sys.argv[1:])); sys.exit(7)"
    names = ("CUDA_VISIBLE_DEVICES", "GPULANE_GPU", "GPULANE_LOCK_FILE")
    done = run("lock", "gpu0", "--", sys.executable, "-c", tell, *names, GPULANE_URL=served.url)
    assert done.status == 7, done
    assert done.out.split() == ["GPU-0", "box/gpu0", str(served.folder / "locks/gpu0.lock")]
    shown = until(lambda: [job for job in served.locks() if job["state"] == "succeeded"])[0]
    assert shown["gpu"] == "box/gpu0" and shown["kind"] == "lock"
    until(served.is_idle)


def test_any_gpu_with_a_label_and_what_cannot_be(served: Ground) -> None:
    done = run("lock", "--any", "--label", "big", "--priority", "batch", "--", "true", GPULANE_URL=served.url)
    assert done.status == 0, done
    assert (
        run("lock", "--any", "--label", "huge", "--", "true", GPULANE_URL=served.url).status,
        run("lock", "gpu7", "--", "true", GPULANE_URL=served.url).status,
        run("lock", "gpu0", "--", "no-such-program-here", GPULANE_URL=served.url).status,
        run("lock", "gpu0", GPULANE_URL=served.url).status,
        run("lock", "gpu0", "--priority", "huge", "--", "true", GPULANE_URL=served.url).status,
    ) == (1, 1, 127, 2, 1)
    until(served.is_idle)


def test_a_lock_waits_for_a_job_and_jobs_wait_for_the_lock(served: Ground) -> None:
    first = served.prompt(20, 1)
    until(lambda: served.state(first) == "running")
    with locking(served, "gpu0", "--note", "training", "--", sys.executable, "-c", SLEEPS) as process:
        assert line(process) == "runs"
        assert served.state(first) == "succeeded"
        second = served.prompt(1, 2)
        assert served.gpu()["job"] == served.locks()[0]["id"]
        assert served.state(second) == "queued"
        process.send_signal(signal.SIGTERM)  # forwarded
        assert process.wait(END_SECONDS) == 128 + signal.SIGTERM
    until(lambda: served.state(second) == "succeeded")


def test_cancelled_and_over_time_the_program_is_ended(served: Ground) -> None:
    with locking(served, "gpu0", "--", sys.executable, "-c", SLEEPS) as process:
        assert line(process) == "runs"
        served.ask(f"/gpulane/v1/jobs/{served.locks()[0]['id']}", method="DELETE")
        assert process.wait(END_SECONDS) == 128 + signal.SIGTERM
    until(lambda: served.locks()[0]["state"] == "cancelled")
    with locking(served, "gpu0", "--seconds-max", "0.3", "--", sys.executable, "-c", SLEEPS) as process:
        assert line(process) == "runs"
        _, err = process.communicate(timeout=END_SECONDS)
        assert process.returncode == 128 + signal.SIGTERM
        assert "0.3 s are over" in err
    until(lambda: served.locks()[0]["error"] is not None)
    assert served.locks()[0]["error"]["code"] == "time_limit"
    until(served.is_idle)


def test_killed_the_lock_takes_its_program_with_it(served: Ground) -> None:
    with locking(served, "gpu0", "--", sys.executable, "-c", SLEEPS) as process:
        assert line(process) == "runs"
        process.kill()
        process.wait()
    until(served.is_idle)
    assert served.locks()[0]["state"] in {"failed", "cancelled"}


FORKS = """
import os, sys, time
child = os.fork()
if not child:
    time.sleep(60)
    os._exit(0)
print(os.getpid(), child, flush=True)
time.sleep(60)
"""


def test_a_forked_child_holds_the_gpu_on(served: Ground) -> None:
    with locking(served, "gpu0", "--", sys.executable, "-c", FORKS) as process:
        pid, child = (int(word) for word in line(process).split())
        try:
            os.kill(pid, signal.SIGKILL)
            assert process.wait(END_SECONDS) == 128 + signal.SIGKILL
            job = served.prompt(1, 3)
            # Released, and the program is dead; its child has the lock file.
            until(lambda: "still locked by" in json.dumps(served.locks()[0]["progress"]))
            assert served.gpu()["state"] == "busy"
            assert served.state(job) == "queued"
        finally:
            os.kill(child, signal.SIGKILL)
    until(lambda: served.state(job) == "succeeded")
    assert served.locks()[0]["state"] == "succeeded"


@pytest.mark.needs("flock")
def test_a_strangers_flock_is_seen(served: Ground) -> None:
    file = served.folder / "locks/gpu0.lock"
    with subprocess.Popen(
        ["flock", file, sys.executable, "-c", SLEEPS], stdout=subprocess.PIPE, text=True
    ) as s:
        try:
            assert s.stdout is not None and s.stdout.readline() == "runs\n"
            job = served.prompt(1, 4)
            until(lambda: served.gpu()["why"].startswith("locked by pid"))
            assert served.state(job) == "queued"
        finally:
            stranger = int(served.gpu()["why"].split()[3])
            s.kill()
            for pid in {stranger, *_openers(file)}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    until(lambda: served.state(job) == "succeeded")


def test_python_holds_a_gpu(served: Ground) -> None:
    script = (
        "import gpulane\n"
        "with gpulane.lock('gpu0', note='notebook') as gpu:\n"
        "    print(gpu.name, gpu.environment['CUDA_VISIBLE_DEVICES'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        capture_output=True,
        text=True,
        timeout=END_SECONDS,
        env=environment({"GPULANE_URL": served.url}),
    )
    assert done.stdout == "box/gpu0 GPU-0\n"
    until(served.is_idle)
    assert served.locks()[0]["state"] == "succeeded"


def test_import_is_cheap() -> None:
    script = (
        "import gpulane, sys; print([name for name in sys.modules if 'gpulane' in name or 'http' in name])"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout == "['gpulane']\n"


def test_a_gateway_killed_under_a_lock_finds_it_held(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    waits = "import sys; print('runs', flush=True); sys.stdin.readline(); sys.exit(5)"
    with engines(tmp_path, "comfyui") as (engine,):
        ground = Ground(tmp_path, engine, port)
        with contextlib.ExitStack() as stack:
            gateway = stack.enter_context(ground.gateway())
            until(ground.is_ready)
            holder = subprocess.Popen(
                [COMMAND, "lock", "gpu0", "--", sys.executable, "-c", waits],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment({"GPULANE_URL": ground.url}),
            )
            stack.callback(holder.kill)
            assert line(holder) == "runs"
            job = ground.prompt(1, 6)
            gateway.kill()
            gateway.wait()
            stack.enter_context(ground.gateway())
            until(ground.is_ready)
            assert ground.gpu()["state"] == "busy"
            assert ground.state(job) == "queued"
            assert holder.poll() is None, "its program goes on: the kernel knows that it has the GPU"
            holder.communicate("end\n", timeout=END_SECONDS)
            assert holder.returncode == 5
            until(lambda: ground.state(job) == "succeeded")
            assert ground.locks()[0]["state"] in {"cancelled", "failed"}


def _openers(path: Path) -> set[int]:
    """Processes other than ourselves that hold a lock on a file by /proc/locks, and their like."""
    inode, found = path.stat().st_ino, set[int]()
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes() if process.name.isdigit() else b""
            if b"time.sleep(60)" not in words:
                continue
            if any(opened.stat().st_ino == inode for opened in (process / "fd").iterdir()):
                found.add(int(process.name))
    return found
