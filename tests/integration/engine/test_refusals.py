"""Only a refused connection proves that an engine's process is gone: an unreachable host may be at work."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

import pytest

from gpulane.core.model import EngineUrl
from gpulane.engine.a1111 import A1111Client
from gpulane.engine.base import ServiceClient, is_refused
from gpulane.engine.comfyui import ComfyUIClient, Timings
from gpulane.engine.detect import detect
from gpulane.engine.http import HttpServiceClient
from gpulane.errors import EngineError
from gpulane.wire.errors import is_refusal

pytestmark = pytest.mark.anyio

TIMEOUT_SECONDS = 0.3
CLIENTS: tuple[Callable[[EngineUrl], ServiceClient], ...] = (
    lambda url: ComfyUIClient(url, timings=Timings(request_seconds=TIMEOUT_SECONDS)),
    lambda url: A1111Client(url, timeout_seconds=TIMEOUT_SECONDS),
    lambda url: HttpServiceClient(url, timeout_seconds=TIMEOUT_SECONDS),
)
each_client = pytest.mark.parametrize("make", CLIENTS, ids=["comfyui", "a1111", "http"])
NOT_ROUTED = "http://255.255.255.255:9"
"""The kernel refuses to connect there (ENETUNREACH) before anything is sent."""


async def failure(client: ServiceClient) -> EngineError:
    try:
        with pytest.raises(EngineError) as caught:
            await client.probe(frozenset(), fresh=True)
        return caught.value
    finally:
        await client.close()


@each_client
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_nobody_listening_is_a_refusal(make: Callable[[EngineUrl], ServiceClient], host: str) -> None:
    with socket.socket() as taken:  # bound, not listening: nobody else can take the port
        taken.bind(("127.0.0.1", 0))
        error = await failure(make(EngineUrl(f"http://{host}:{taken.getsockname()[1]}")))
    assert is_refused(error) and not error.sent


@each_client
async def test_an_unreachable_network_is_none(make: Callable[[EngineUrl], ServiceClient]) -> None:
    assert not is_refused(await failure(make(EngineUrl(NOT_ROUTED))))


@each_client
async def test_a_machine_that_takes_no_connection_is_none(make: Callable[[EngineUrl], ServiceClient]) -> None:
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for one in (first, second):
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        error = await failure(make(EngineUrl(f"http://127.0.0.1:{full.getsockname()[1]}")))
    assert not is_refused(error)


async def test_detection_says_which_it_is() -> None:
    found = await detect(EngineUrl(NOT_ROUTED))
    assert found.service is None and not found.answers and "unreachable" in found.why


@pytest.mark.parametrize(
    ("error", "proves"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "no"), True),
        (OSError(errno.EHOSTUNREACH, "no"), False),
        (OSError(errno.EMFILE, "no"), False),
        (socket.gaierror(-2, "no"), False),
        (TimeoutError(), False),
        (OSError("Multiple exceptions: [Errno 111] a ('::1', 1), [Errno 111] b ('127.0.0.1', 1)"), True),
        (OSError("Multiple exceptions: [Errno 111] a ('::1', 1), [Errno 113] b ('10.0.0.1', 1)"), False),
    ],
    ids=str,
)
def test_what_an_error_of_the_system_proves(error: OSError, *, proves: bool) -> None:
    assert is_refusal(error) is proves
