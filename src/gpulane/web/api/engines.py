"""Engines over the native API: their states and processes, what they say, restart."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from gpulane.config.arguments import engine_url
from gpulane.core.model import EngineUrl
from gpulane.errors import BadRequest, ConfigError, NotFound
from gpulane.web.api.asked import Asked, Endpoint, json_response
from gpulane.web.api.documents import EngineDetail, EngineList, EngineRestart
from gpulane.web.api.views import engine_detail
from gpulane.web.bodies import decode, read_body, suggestion
from gpulane.web.patience import finished
from gpulane.web.ports import EngineView, ProcessesPort, Role, WebContext

BODY_BYTES_MAX: Final = 4096
LINES_MAX: Final = 200
RESTART_GRACE_SECONDS: Final = 90.0
"""A restart goes on when its client has left: half of one leaves an engine stopped."""

_ENGINES = "/gpulane/v1/engines"


class EnginesApi:
    """The endpoints under /gpulane/v1/engines."""

    def __init__(self, context: WebContext) -> None:
        self._engines = context.engines
        self._processes = context.processes

    def endpoints(self) -> tuple[Endpoint, ...]:
        """List them."""
        return (
            Endpoint(
                method="GET",
                path=_ENGINES,
                answer=self.list_engines,
                summary="List engines with their processes, where gpulane starts them.",
                gives=EngineList,
            ),
            Endpoint(
                method="GET",
                path=f"{_ENGINES}/log",
                answer=self.log,
                summary="The last lines that an engine's process wrote; `url` says which engine.",
                role=Role.OPERATOR,
                content_type="text/plain",
                query=("url", "lines"),
            ),
            Endpoint(
                method="POST",
                path=f"{_ENGINES}/restart",
                answer=self.restart,
                summary="Restart an engine by its command, or by its restart command; it is ready later.",
                role=Role.OPERATOR,
                takes=EngineRestart,
                gives=EngineDetail,
            ),
        )

    async def list_engines(self, _: Asked) -> web.StreamResponse:
        """List all engines."""
        return json_response(EngineList(engines=[self._detail(view) for view in self._engines.engines()]))

    async def log(self, asked: Asked) -> web.StreamResponse:
        """Show what an engine's process wrote."""
        view = self._engine(asked.request.query.get("url", ""))
        lines = asked.number("lines", LINES_MAX, low=1, high=LINES_MAX)
        found = await self._supervised(view).last_lines(view.url, lines)
        return web.Response(
            text="".join(f"{line}\n" for line in found),
            # A page that an engine writes into its log is text all the same.
            headers={"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"},
        )

    async def restart(self, asked: Asked) -> web.StreamResponse:
        """Restart an engine."""
        wanted = decode(await read_body(asked.request, BODY_BYTES_MAX), EngineRestart)
        view = self._engine(wanted.url)
        processes = self._supervised(view)
        why = f"restarted as {asked.identity.account} wished"
        await finished(
            processes.restart(view.url, why, force=wanted.force), grace_seconds=RESTART_GRACE_SECONDS
        )
        return json_response(self._detail(self._engine(view.url)))

    def _detail(self, view: EngineView) -> EngineDetail:
        processes = self._processes
        if processes is None or not processes.can_restart(view.url):
            return engine_detail(view, None, can_restart=False)
        return engine_detail(view, processes.process(view.url), can_restart=True)

    def _supervised(self, view: EngineView) -> ProcessesPort:
        if self._processes is None:
            raise NotFound(f"gpulane does not start {view.url}.", code="no_process")
        return self._processes

    def _engine(self, text: str) -> EngineView:
        """Find an engine by its URL, or in short as on the command line. Raises NotFound, BadRequest."""
        try:
            url = EngineUrl(engine_url(text[:500]))
        except ConfigError as error:
            raise BadRequest(f"url: {error.message}.", code="bad_query") from error
        views = self._engines.engines()
        found = next((view for view in views if view.url == url), None)
        if found is None:
            hint = suggestion(url, [view.url for view in views])
            raise NotFound(f"No engine {url!r}.", hint=hint, code="no_such_engine")
        return found
