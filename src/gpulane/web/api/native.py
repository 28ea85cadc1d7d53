"""Everything under /gpulane/ and /metrics: finds the endpoint, checks the role, answers."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from urllib.parse import unquote

from aiohttp import web

from gpulane.errors import NotFound
from gpulane.web.api.asked import Asked, Endpoint, require
from gpulane.web.api.engines import EnginesApi
from gpulane.web.api.gpus import GpusApi
from gpulane.web.api.jobs import JobsApi
from gpulane.web.api.locks import LocksApi
from gpulane.web.api.openapi import describe
from gpulane.web.api.streams import StreamsApi
from gpulane.web.errors import MethodNotAllowed
from gpulane.web.feed import Feed
from gpulane.web.metrics import CONTENT_TYPE, Metrics
from gpulane.web.page import page_file
from gpulane.web.ports import Identity, WebContext


@dataclass(frozen=True, slots=True)
class _Row:
    pattern: re.Pattern[str]
    endpoint: Endpoint


class NativeApi:
    """One per application with a table of paths."""

    def __init__(self, context: WebContext, metrics: Metrics) -> None:
        self._jobs = context.jobs
        self._metrics = metrics
        self._feed = Feed(context.jobs, boot=secrets.token_hex(4))
        endpoints = (
            *JobsApi(context).endpoints(),
            *LocksApi(context).endpoints(),
            *GpusApi(context.jobs).endpoints(),
            *EnginesApi(context).endpoints(),
            *StreamsApi(context.jobs, self._feed).endpoints(),
            Endpoint(
                method="GET",
                path="/gpulane/v1/openapi.json",
                answer=self.describe,
                summary="This description.",
            ),
            Endpoint(
                method="GET",
                path="/metrics",
                answer=self.tell_metrics,
                summary="What Prometheus asks for.",
                content_type="text/plain",
            ),
        )
        self.endpoints = endpoints
        self._rows = [_Row(_pattern(endpoint.path), endpoint) for endpoint in endpoints]
        self._description = b""

    def health(self, path: str) -> web.Response:
        """Say whether the process lives, or whether jobs are taken."""
        is_well = path.endswith("/healthz") or self._jobs.is_ready
        return web.Response(
            status=200 if is_well else 503,
            text="ok\n" if is_well else "draining\n",
            headers={"Cache-Control": "no-store"},
        )

    async def respond(self, request: web.Request, target: str, identity: Identity) -> web.StreamResponse:
        """Answer a request under our own paths."""
        path = target.partition("?")[0]
        method = "GET" if request.method == "HEAD" else request.method
        found = [(row.endpoint, match) for row in self._rows if (match := row.pattern.fullmatch(path))]
        for endpoint, match in found:
            if endpoint.method == method:
                require(identity, endpoint.role)
                values = {name: unquote(value) for name, value in match.groupdict().items()}
                return await endpoint.answer(Asked(request=request, identity=identity, values=values))
        if found:
            allowed = ", ".join(sorted({endpoint.method for endpoint, _ in found}))
            raise MethodNotAllowed(
                f"{request.method[:20]} is not for this path.", hint=f"Allowed: {allowed}."
            )
        file = page_file(path) if method == "GET" else None
        if file is None:
            raise NotFound("No such path.", hint="/gpulane/v1/openapi.json lists them.")
        return file

    async def describe(self, _: Asked) -> web.StreamResponse:
        """Give the OpenAPI document."""
        self._description = self._description or describe(self.endpoints)
        return web.Response(body=self._description, content_type="application/json")

    async def tell_metrics(self, _: Asked) -> web.StreamResponse:
        """Give Prometheus its text."""
        return web.Response(body=self._metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    def close(self) -> None:
        """End the streams."""
        self._feed.close()


def _pattern(path: str) -> re.Pattern[str]:
    """Turn `/a/{id}/b` into a pattern; a gpu's id may hold one slash."""
    parts = re.split(r"{(\w+)}", path)
    text = "".join(
        re.escape(part)
        if number % 2 == 0
        else f"(?P<{part}>{'[^/]+(?:/[^/]+)?' if part == 'gpu' else '[^/]+'})"
        for number, part in enumerate(parts)
    )
    return re.compile(text)
