"""POST jobs: reads a native request and has the service's adapter understand it."""

from __future__ import annotations

import msgspec

from gpulane.adapters.a1111.requests import RequestContext, recognize
from gpulane.adapters.a1111.routes import JOB_POSTS
from gpulane.adapters.base import Recognized
from gpulane.adapters.comfyui.graph import Combos
from gpulane.adapters.comfyui.prompt import PromptLimits, parse_prompt
from gpulane.core.model import Band, JobId, Service
from gpulane.errors import BadRequest
from gpulane.store.base import NewJob
from gpulane.web.a1111.lists import Lists as A1111Lists
from gpulane.web.a1111.options import Options
from gpulane.web.api.asked import Asked, is_at_least
from gpulane.web.api.documents import NewJobRequest, Priority
from gpulane.web.bodies import MIB, decode, suggestion, understood
from gpulane.web.comfyui.lists import Lists as ComfyUILists
from gpulane.web.intake import Wishes, new_job
from gpulane.web.ports import Role, WebContext

_ENDPOINTS = {path.removeprefix("/sdapi/v1/"): path for path in JOB_POSTS if path.startswith("/sdapi/v1/")}
_BANDS = {band.name.lower(): band for band in Band}
PRIORITY_MAX = 1_000_000
KEY_CHARS_MAX = 200


class Submissions:
    """Understands native requests as the front doors would: same lists, same options of the account."""

    def __init__(self, context: WebContext) -> None:
        self._context = context
        self._nodes = ComfyUILists(context.engines)
        self._lists = A1111Lists(context.engines)
        self._options = Options(context.engines, context.values, self._lists)

    async def understand(self, body: bytes, asked: Asked) -> tuple[NewJob, Recognized]:
        """Make a job of a body. Raises ClientErrors that say what to change."""
        wanted = await understood(body, lambda: decode(body, NewJobRequest))
        for name, value in (("webhook", wanted.webhook), ("deadline_seconds", wanted.deadline_seconds)):
            if _given(value) not in {b"", b"null"}:
                raise BadRequest(f"{name} is not supported yet.", hint="Leave it out.", code="not_supported")
        job_id = self._context.new_job_id()
        match wanted.service:
            case "comfyui":
                combos = self._nodes.combos()
                service = Service.COMFYUI
                recognized = await understood(body, lambda: self._workflow(wanted, job_id, combos))
            case "a1111":
                is_admin = is_at_least(asked.identity, Role.ADMIN)
                carried = await self._options.carried(asked.identity.account)
                context = RequestContext(
                    job=job_id, catalogue=self._lists.catalogue(), carried=carried, is_admin=is_admin
                )
                service = Service.A1111
                recognized = await understood(body, lambda: _payload(wanted, context))
        band, priority = band_and_priority(wanted.priority)
        wishes = Wishes(
            band=Band.NORMAL if band is None else band,
            priority=priority,
            labels=frozenset(wanted.labels),
            max_attempts=wanted.max_attempts,
            idempotency_key=_key(wanted, asked),
        )
        attempts_max = self._context.settings.retry.attempts_max
        new = new_job(job_id, service, recognized, asked.identity, attempts_max=attempts_max, wishes=wishes)
        return new, recognized

    def _workflow(self, wanted: NewJobRequest, job_id: JobId, combos: Combos) -> Recognized:
        if not _given(wanted.workflow):
            raise BadRequest(
                "workflow is missing.", hint="Give the workflow in API format.", code="bad_field"
            )
        if _given(wanted.payload) or wanted.endpoint:
            raise BadRequest("endpoint and payload belong to a1111.", code="bad_field")
        limits = PromptLimits(body_bytes_max=int(self._context.settings.limits.workflow_mib * MIB))
        body = b'{"prompt":' + _given(wanted.workflow) + b"}"
        return parse_prompt(body, job=job_id, limits=limits, combos=combos)


def _payload(wanted: NewJobRequest, context: RequestContext) -> Recognized:
    if _given(wanted.workflow):
        raise BadRequest("workflow belongs to comfyui.", code="bad_field")
    path = _ENDPOINTS.get(wanted.endpoint)
    if path is None:
        hint = suggestion(wanted.endpoint, list(_ENDPOINTS))
        raise BadRequest(f"endpoint {wanted.endpoint!r} is no job.", hint=hint, code="bad_field")
    return recognize(path, _given(wanted.payload) or b"{}", context)


def band_and_priority(priority: Priority) -> tuple[Band | None, int]:
    """Read a priority: a name is a band, a number an order inside the band (None: unchanged)."""
    match priority:
        case int():
            if abs(priority) > PRIORITY_MAX:
                raise BadRequest(f"priority is a number up to {PRIORITY_MAX}.", code="bad_field")
            return None, priority
        case name:
            return _BANDS[name], 0


def _given(raw: msgspec.Raw | msgspec.UnsetType) -> bytes:
    return b"" if isinstance(raw, msgspec.UnsetType) else bytes(raw)


def _key(wanted: NewJobRequest, asked: Asked) -> str | None:
    header = asked.request.headers.get("Idempotency-Key")
    if header is not None and not 0 < len(header) <= KEY_CHARS_MAX:
        raise BadRequest(f"Idempotency-Key has 1 to {KEY_CHARS_MAX} characters.", code="bad_header")
    if header and wanted.idempotency_key and header != wanted.idempotency_key:
        raise BadRequest("Idempotency-Key and idempotency_key differ.", code="bad_header")
    return header or wanted.idempotency_key
