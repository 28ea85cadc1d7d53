"""Which requests to a generic service are jobs, and what is sent for them."""

import pytest

from gpulane.adapters.base import Route
from gpulane.adapters.http.requests import recognize
from gpulane.adapters.http.routes import DEFAULT_JOBS, check_patterns, classify
from gpulane.core.model import NO_MODEL
from gpulane.errors import ConfigError


@pytest.mark.parametrize(
    ("method", "path", "route"),
    [
        ("POST", "/v1/chat/completions", Route.JOB),
        ("POST", "/v1/Chat/Completions/", Route.JOB),
        ("POST", "/v1/chat%2Fcompletions", Route.JOB),
        ("POST", "/v1/audio/transcriptions", Route.JOB),
        ("POST", "/v1/audio/a/b", Route.RELAY),
        ("POST", "/api/generate", Route.JOB),
        ("GET", "/api/tags", Route.RELAY),
        ("GET", "/v1/models", Route.RELAY),
        ("GET", "/v1/chat/completions", Route.RELAY),
        ("POST", "//v1/chat/completions", Route.CLOSED),
        ("POST", "/x/../v1/chat/completions", Route.CLOSED),
        ("POST", "/x/%2e%2e/v1/chat/completions", Route.CLOSED),
        ("GET", "/", Route.RELAY),
    ],
)
def test_default_jobs(method: str, path: str, route: Route) -> None:
    assert classify(method, path) is route


def test_patterns_of_the_settings() -> None:
    jobs = ("* /run/**", "PUT /one/*/x")
    assert classify("GET", "/run/a/b", jobs) is Route.JOB
    assert classify("PUT", "/one/two/x", jobs) is Route.JOB
    assert classify("PUT", "/one/two/three/x", jobs) is Route.RELAY
    check_patterns(DEFAULT_JOBS)
    with pytest.raises(ConfigError):
        check_patterns(["/v1/no-method"])


def test_the_body_passes_and_the_model_is_read() -> None:
    body = b'{"model":"llama3:8b","messages":[],"max_tokens":128,"stream":true}'
    headers = (
        ("Content-Type", "application/json"),
        ("Authorization", "Bearer ours"),
        ("Connection", "keep-alive, X-Hop"),
        ("X-Hop", "1"),
        ("Accept", "text/event-stream"),
    )
    found = recognize("POST", "/v1/chat/completions?x=1", headers, body)
    assert found.request.body == body and found.request.target == "/v1/chat/completions?x=1"
    assert found.request.headers == (("Content-Type", "application/json"), ("Accept", "text/event-stream"))
    assert (found.model, found.work.steps, found.kind) == ("llama3:8b", 128, "v1/chat/completions")
    assert found.digest != recognize("POST", "/v1/completions", headers, body).digest


@pytest.mark.parametrize(
    "body", [b"", b"\x00\xff", b"[1]", b'{"model":7}', b'{"model":"' + b"x" * 400 + b'"}', b"[" * 9999]
)
def test_any_body_passes(body: bytes) -> None:
    found = recognize("POST", "/inference", (), body)
    assert found.model == NO_MODEL and found.request.body == body


def test_how_much_is_asked_for() -> None:
    assert recognize("POST", "/api/generate", (), b'{"options":{"num_predict":64}}').work.steps == 64
    assert recognize("POST", "/completion", (), b'{"n_predict":-1}').work.steps == 1
