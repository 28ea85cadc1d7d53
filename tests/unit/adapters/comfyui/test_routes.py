"""What a request to ComfyUI's front door is."""

import json
from pathlib import Path

import pytest

from gpulane.adapters.base import Route
from gpulane.adapters.comfyui.routes import classify, own_path

JOB, OWN, RELAY, CLOSED = Route.JOB, Route.OWN, Route.RELAY, Route.CLOSED


@pytest.mark.parametrize("prefix", ["", "/api"])
@pytest.mark.parametrize(
    ("method", "path", "route"),
    [
        ("POST", "/prompt", JOB),
        ("GET", "/prompt", OWN),
        ("GET", "/queue", OWN),
        ("POST", "/queue", OWN),
        ("GET", "/history", OWN),
        ("GET", "/history/abc", OWN),
        ("POST", "/history", OWN),
        ("POST", "/interrupt", OWN),
        ("POST", "/free", OWN),
        ("GET", "/ws", OWN),
        ("GET", "/view", OWN),
        ("HEAD", "/view", OWN),
        ("POST", "/upload/image", OWN),
        ("POST", "/upload/mask", OWN),
        ("GET", "/object_info", OWN),
        ("GET", "/object_info/KSampler", OWN),
        ("GET", "/system_stats", OWN),
        ("GET", "/features", OWN),
        ("GET", "/embeddings", OWN),
        ("GET", "/models", OWN),
        ("GET", "/models/checkpoints", OWN),
        ("POST", "/jobs/abc/cancel", OWN),
        ("POST", "/jobs/cancel", OWN),
        ("GET", "/settings", RELAY),
        ("POST", "/settings/Comfy.X", RELAY),
        ("POST", "/users", RELAY),
        ("GET", "/userdata", RELAY),
        ("POST", "/userdata/workflows%2Fx.json", RELAY),
        ("DELETE", "/userdata/workflows%2Fx.json", RELAY),
        ("GET", "/v2/userdata", RELAY),
        ("GET", "/", RELAY),
        ("GET", "/assets/index.js", RELAY),
        ("GET", "/extensions/core/x.js", RELAY),
        ("GET", "/experiment/models", RELAY),
        ("GET", "/view_metadata/loras", RELAY),
        ("OPTIONS", "/prompt", RELAY),
        ("GET", "/internal/logs", CLOSED),
        ("GET", "/internal", CLOSED),
        ("PATCH", "/internal/logs/subscribe", CLOSED),
        ("GET", "/%69nternal/logs", CLOSED),
        ("GET", "/manager/reboot", CLOSED),
        ("GET", "/v2/manager/reboot", CLOSED),
        ("POST", "/customnode/install/git_url", CLOSED),
        ("GET", "/snapshot/restore", CLOSED),
        ("GET", "/comfyui_manager/comfyui_switch_version", CLOSED),
        ("GET", "/customnode/getlist", RELAY),
        ("GET", "/v2/customnode/getmappings", RELAY),
        ("POST", "/customnode/getlist", CLOSED),
        ("GET", "/impact/wildcards", RELAY),
        ("POST", "/impact/set_stuff", CLOSED),
        ("DELETE", "/queue", CLOSED),
        ("POST", "/credentials", CLOSED),
        ("GET", "/x/../internal/logs", CLOSED),
        ("GET", "/x/%2e%2e/internal/logs", CLOSED),
        ("GET", "/x\\..\\internal", CLOSED),
        ("GET", "/x%00", CLOSED),
    ],
)
def test_route(prefix: str, method: str, path: str, route: Route) -> None:
    assert classify(method, prefix + path) is route


def test_jobs_exist_under_api_even_twice() -> None:
    assert classify("GET", "/api/jobs") is OWN
    assert classify("GET", "/api/api/jobs/x") is OWN
    assert own_path("/api/api/jobs/%78") == "/jobs/x"
    assert own_path("/api/view") == own_path("/view") == "/view"


def test_custom_routes_open_by_settings() -> None:
    allow = (r"/impact/.*",)
    assert classify("POST", "/api/impact/set_stuff", allow=allow) is RELAY
    assert classify("POST", "/manager/queue/install", allow=(r".*",)) is CLOSED
    assert classify("POST", "/other", allow=allow) is CLOSED


@pytest.mark.parametrize("version", ["0.3.64", "0.27.0"])
def test_nothing_the_recorded_pages_ask_for_is_closed(shared: Path, version: str) -> None:
    recorded = json.loads((shared / "recordings" / "comfyui" / version / "gets.json").read_text())
    asked = {
        (x["request"]["method"], x["request"]["path"].split("?")[0])
        for x in recorded["http"]
        if "request" in x
    }
    closed = {(m, p) for m, p in asked if classify(m, p) is CLOSED}
    assert all("internal" in path for _, path in closed), closed
