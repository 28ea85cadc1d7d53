"""Our streaming HTTP/1.1 client to engines, on httptools over asyncio.

One `EngineClient` per engine. It knows nothing of jobs, of ComfyUI or of A1111, and never repeats a request
that the engine may have acted on.
"""

from gpulane.wire.client import EngineClient
from gpulane.wire.errors import (
    ConnectFailed,
    ConnectRefused,
    ConnectTimeout,
    EngineDisconnected,
    EngineTimeout,
    MalformedResponse,
    RefusedRequest,
    ResponseTooLarge,
    TimeoutPhase,
    WireError,
)
from gpulane.wire.exchange import Timeouts
from gpulane.wire.response import EngineResponse
from gpulane.wire.upgrade import UpgradedConnection

__all__ = [
    "ConnectFailed",
    "ConnectRefused",
    "ConnectTimeout",
    "EngineClient",
    "EngineDisconnected",
    "EngineResponse",
    "EngineTimeout",
    "MalformedResponse",
    "RefusedRequest",
    "ResponseTooLarge",
    "TimeoutPhase",
    "Timeouts",
    "UpgradedConnection",
    "WireError",
]
