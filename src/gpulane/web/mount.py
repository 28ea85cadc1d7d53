"""What the application notes on a request for the front door that answers it."""

from __future__ import annotations

from typing import Final

from aiohttp import web

MOUNT: Final = web.RequestKey("MOUNT", str)
"""The prefix that was taken off in front of the target (`/sd`), without a slash at its end; "" at a root."""
NAME: Final = web.RequestKey("NAME", str)
"""For `http` services: the NAME of /svc/NAME/."""
