"""Passes what is not a job through to an engine: HTTP, SSE, upgraded connections, with back-pressure.

It changes headers by `HeaderRules` and nothing else: no path is decoded, no body is looked at.
"""

from gpulane.relay.answer import AnswerGone, HeldAnswer
from gpulane.relay.headers import Forwarding, HeaderRules
from gpulane.relay.held import hold, send_held
from gpulane.relay.http import relay_http
from gpulane.relay.raw_response import RawResponse
from gpulane.relay.websocket import Tunnels, tunnel

__all__ = [
    "AnswerGone",
    "Forwarding",
    "HeaderRules",
    "HeldAnswer",
    "RawResponse",
    "Tunnels",
    "hold",
    "relay_http",
    "send_held",
    "tunnel",
]
