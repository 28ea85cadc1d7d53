"""Pure parts of A1111's front door."""

import msgspec
import pytest

from gpulane.core.events import JobEnded, JobStarted
from gpulane.core.model import JobId, JobState, Token
from gpulane.errors import EngineError, GpulaneError, StoreError, Throttled
from gpulane.web.a1111.answers import CallFailed, call_failed
from gpulane.web.a1111.functions import Functions, read_functions
from gpulane.web.a1111.lists import LISTS, without_secrets
from gpulane.web.a1111.own import STARTS_MAX, Starts
from gpulane.web.a1111.page import with_root


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'{"a":1,"root":""}', b'{"a":1,"root":"/sd"}'),
        (b'{"root": "" }', b'{"root": "/sd" }'),
        (b'{"root":"http://box:8800"}', b'{"root":"http://box:8800/sd"}'),
        (b'{"root":"/other"}', b'{"root":"/other"}'),
        (b'{"root_dir":""}', b'{"root_dir":""}'),
    ],
)
def test_root(before: bytes, after: bytes) -> None:
    assert with_root(before, "/sd") == after


def test_flags_without_secrets() -> None:
    told = b'{"api_auth":"me:pass","gradio_auth_path":"/x","ngrok":"t","port":7860,"tls_keyfile":"k"}'
    assert msgspec.json.decode(without_secrets(told)) == {
        "api_auth": None,
        "gradio_auth_path": None,
        "ngrok": None,
        "port": 7860,
        "tls_keyfile": None,
    }


def test_every_list_has_a_path() -> None:
    assert LISTS["/sdapi/v1/sd-models"] == "sd-models" and "/sdapi/v1/options" not in LISTS


@pytest.mark.parametrize(
    ("code", "status"), [("cancelled", 409), ("out_of_memory", 500), ("engine_lost", 502), ("what", 502)]
)
def test_ends_of_jobs(code: str, status: int) -> None:
    error = GpulaneError("it ended")
    error.code = code
    told = call_failed(error)
    assert isinstance(told, CallFailed) and (told.code, told.status, told.message) == (
        code,
        status,
        "it ended",
    )


@pytest.mark.parametrize("error", [Throttled(), EngineError(), StoreError()])
def test_other_errors_stay_what_they_are(error: GpulaneError) -> None:
    assert call_failed(error) is error


def test_starts_are_measured_and_bounded() -> None:
    now = [10.0]
    starts = Starts(lambda: now[0])
    started = [JobStarted(n=n, job=JobId(str(n)), token=Token(""), attempts=1) for n in range(STARTS_MAX + 1)]
    starts.hear(tuple(started))
    now[0] = 12.5
    assert starts.seconds(JobId("0")) is None and starts.seconds(JobId("1")) == 2.5
    starts.hear((JobEnded(n=1, job=JobId("1"), state=JobState.FAILED, account_f=0.0),))
    assert starts.seconds(JobId("1")) is None


def test_a_config_that_cannot_be_read_lets_nothing_pass() -> None:
    for config in (b"", b"[]", b'{"auth_required":true}', b'{"dependencies":[{"outputs":"x"}]}'):
        read = read_functions(config, app_id=b"1", now=0.0)
        assert not read.passing and not read.silent
    assert Functions(app_id=b"1", read_at=0.0).is_fresh(b"1", 599.0)
    assert not Functions(app_id=b"1", read_at=0.0).is_fresh(b"2", 1.0)
    assert not Functions(app_id=None, read_at=0.0).is_fresh(None, 6.0)
