"""Which requests are jobs, which are the front door's own, and that nothing slips past the queue."""

import json
from pathlib import Path

import pytest

from gpulane.adapters.a1111 import gradio
from gpulane.adapters.a1111.routes import classify, endpoint_of, is_gradio_call
from gpulane.adapters.base import Route


@pytest.mark.parametrize(
    ("method", "path", "route"),
    [
        ("POST", "/sdapi/v1/txt2img", Route.JOB),
        ("POST", "/sdapi/v1/%74xt2img", Route.JOB),
        ("POST", "/sdapi/v1/img2img", Route.JOB),
        ("POST", "/sdapi/v1/train/embedding", Route.JOB),
        ("POST", "/controlnet/detect", Route.JOB),
        ("GET", "/sdapi/v1/txt2img", Route.RELAY),
        ("POST", "/sdapi/v1/txt2img/", Route.CLOSED),
        ("POST", "//sdapi/v1/txt2img", Route.CLOSED),
        ("POST", "/x/../sdapi/v1/txt2img", Route.CLOSED),
        ("POST", "/x/%2e%2e/sdapi/v1/txt2img", Route.CLOSED),
        ("GET", "/sdapi/v1/options", Route.OWN),
        ("HEAD", "/sdapi/v1/options", Route.OWN),
        ("POST", "/sdapi/v1/options", Route.OWN),
        ("OPTIONS", "/sdapi/v1/txt2img", Route.OWN),
        ("POST", "/sdapi/v1/interrupt", Route.OWN),
        ("POST", "/sdapi/v1/unload-checkpoint", Route.OWN),
        ("GET", "/sdapi/v1/cmd-flags", Route.OWN),
        ("POST", "/internal/progress", Route.OWN),
        ("GET", "/internal/ping", Route.OWN),
        ("GET", "/internal/sysinfo", Route.CLOSED),
        ("GET", "/internal/sysinfo-download", Route.CLOSED),
        ("POST", "/sdapi/v1/server-kill", Route.CLOSED),
        ("GET", "/sdapi/v1/server-restart", Route.CLOSED),
        ("POST", "/sdapi/v1/png-info", Route.RELAY),
        ("POST", "/sdapi/v1/something-new", Route.CLOSED),
        ("DELETE", "/sdapi/v1/options", Route.CLOSED),
        ("POST", "/agent-scheduler/v1/queue/txt2img", Route.CLOSED),
        ("GET", "/", Route.RELAY),
        ("GET", "/file=/srv/webui/outputs//a b.png", Route.RELAY),
        ("GET", "/proxy=http://10.0.0.1/", Route.CLOSED),
        ("GET", "/queue/join", Route.CLOSED),
        ("GET", "/sd/queue/join", Route.CLOSED),
        ("POST", "/run/predict", Route.CLOSED),
        ("POST", "/api/predict", Route.CLOSED),
        ("POST", "/run/predict/", Route.CLOSED),
        ("GET", "/config", Route.RELAY),
        ("GET", "/" + "a" * 9000, Route.CLOSED),
    ],
)
def test_first_rule_that_fits(method: str, path: str, route: Route) -> None:
    assert classify(method, path) is route


def test_settings_may_open_a_closed_route() -> None:
    allow = ("POST /tacapi/*",)
    assert classify("POST", "/tacapi/v1/x", allow=allow) is Route.RELAY
    assert classify("POST", "/sdapi/v1/txt2img", allow=("POST /*",)) is Route.JOB


def test_every_post_of_a_real_server_has_its_place(shared: Path) -> None:
    document = json.loads((shared / "recordings/a1111/openapi.json").read_text())
    paths: dict[str, dict[str, object]] = document["paths"]
    closed = {
        path
        for path, methods in paths.items()
        if "post" in methods and classify("POST", path) is Route.CLOSED
    }
    assert {path for path in closed if path.startswith("/sdapi/")} == {
        "/sdapi/v1/server-kill",
        "/sdapi/v1/server-restart",
        "/sdapi/v1/server-stop",
    }
    assert {"/run/{api_name}", "/api/{api_name}", "/upload", "/reset"} <= closed


def test_gradio_calls_are_told_from_other_closed_paths() -> None:
    assert is_gradio_call("/queue/join") and is_gradio_call("/run/predict") and is_gradio_call("/reset")
    assert not is_gradio_call("/internal/sysinfo") and not is_gradio_call("/assets/run.js")


def test_endpoint_names() -> None:
    assert endpoint_of("/sdapi/v1/txt2img") == "txt2img"
    assert endpoint_of("/controlnet/detect") == "controlnet/detect"


def test_gpu_functions_of_a_real_page(shared: Path) -> None:
    config = (shared / "recordings/a1111/config.json").read_bytes()
    gpu = gradio.gpu_functions(config)
    assert {99, 100, 101, 251, 252, 256, 257, 333, 346, 347, 356, 357, 363, 384, 385, 386, 393} <= gpu
    passing = gradio.passing(config)
    assert not gpu & passing
    # The page's own load opens these; the token counters and the tabs work.
    assert {149, 303, 365, 106, 107, 27, 81} <= passing
    # What each load calls at its end, for its script alone: function and script as recorded, element unnamed.
    assert {150, 304} <= passing
    # Interrupt, skip, restore, installing extensions, restarting.
    assert not {41, 42, 43, 103, 161, 162, 163, 255, 326, 348, 361, 370, 367} & passing


def test_gradio_four_writes_targets_in_its_own_way(shared: Path) -> None:
    config = (shared / "recordings/a1111/gradio4_config.json").read_bytes()
    assert isinstance(gradio.gpu_functions(config), frozenset)


@pytest.mark.parametrize(
    "change",
    [{"js": "submit"}, {"js": None}, {"inputs": [1]}, {"outputs": [1]}, {"outputs": None}],
    ids=str,
)
def test_only_a_script_without_values_passes_for_an_unnamed_element(change: dict[str, object]) -> None:
    recorded: dict[str, object] = {
        "targets": [0],
        "trigger": "then",
        "inputs": [],
        "outputs": [],
        "backend_fn": True,
        "js": "setupAllResizeHandles",
    }
    config = {"components": [], "dependencies": [recorded, recorded | change]}
    assert gradio.passing(json.dumps(config).encode()) == {0}


def test_function_numbers() -> None:
    assert gradio.function_of(b'{"fn_index":100,"data":[]}') == 100
    assert gradio.function_of(b"nonsense") is None
    assert gradio.function_of(b"{}") is None
