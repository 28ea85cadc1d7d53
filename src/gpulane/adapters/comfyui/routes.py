"""Tells from method and path what a request to ComfyUI's front door is. Never looks at a body or a query.

The engine's router decodes percent escapes before it compares, so the decoded path is judged here as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import unquote

from gpulane.adapters.base import Route

OWN_EXACT: frozenset[tuple[str, str]] = frozenset(
    {
        ("GET", "/prompt"),
        ("GET", "/queue"),
        ("POST", "/queue"),
        ("POST", "/history"),
        ("POST", "/interrupt"),
        ("POST", "/free"),
        ("GET", "/ws"),
        ("GET", "/view"),
        ("POST", "/upload/image"),
        ("POST", "/upload/mask"),
        ("GET", "/system_stats"),
        ("GET", "/features"),
        ("GET", "/embeddings"),
        ("POST", "/jobs/cancel"),
    }
)
"""HEAD counts as GET."""

OWN_GET = re.compile(r"/(?:history|object_info|models|jobs)(?:/.*)?")
OWN_POST = re.compile(r"/jobs/[^/]+/cancel")

USER_FILES = re.compile(r"/(?:settings|users|userdata|v2/userdata)(?:/.*)?")
"""Mutable files of the person at the page, kept by the engine; passed on whatever the method."""

INSTALLER = re.compile(r"(?:/v2)?/(?:manager|comfyui_manager|customnode|externalmodel|snapshot)(?:/.*)?")
"""ComfyUI-Manager installs code and restarts the engine, much of it by GET (/manager/reboot,
/snapshot/restore, /manager/queue/start, /manager/queue/update_comfyui); POST takes git URLs and pip
packages. It also hands out tokens kept for sharing sites (/manager/get_openart_auth). So all of it is closed
save the lists below."""

INSTALLER_LISTS = frozenset(
    {
        "/customnode/getlist",
        "/customnode/getmappings",
        "/customnode/alternatives",
        "/externalmodel/getlist",
        "/manager/queue/status",
        "/manager/version",
        "/manager/notice",
        "/manager/is_legacy_manager_ui",
    }
)

INTERNAL = re.compile(r"/internal(?:/.*)?")
"""Logs, server paths, and a subscription that would go to one socket for all (PATCH
/internal/logs/subscribe)."""

DOT_SEGMENTS = re.compile(r"(?:^|[/\\])\.{1,2}(?:[/\\]|$)|[\x00-\x1f]")
"""Two readers of one path may disagree about these."""

READS = frozenset({"GET", "HEAD", "OPTIONS"})


def classify(method: str, path: str, *, allow: Iterable[str] = ()) -> Route:
    """Tell what to do with a request; the first rule that fits decides.

    1. What is no plain path is CLOSED.
    2. `/api` in front means nothing: every route exists with and without it (`/api/jobs` even with two).
    3. POST /prompt is the JOB.
    4. The engine's internals, and an extension that installs code, are CLOSED, save its lists.
    5. What tells or changes something of jobs, files, lists and the gpu is answered by us: OWN.
    6. The person's files, and preflights, go to an engine: RELAY.
    7. Any other read is a static file, or a custom node's own page: RELAY.
    8. Other methods may do anything, on the gpu as well: RELAY only where the settings allow the path, else
       CLOSED.
    """
    decoded = unquote(path)
    if not decoded.startswith("/") or DOT_SEGMENTS.search(decoded):
        return Route.CLOSED
    return _rank(method.upper(), _without_api(decoded), allow=allow)


def _rank(method: str, path: str, *, allow: Iterable[str]) -> Route:
    if (method, path) == ("POST", "/prompt"):
        return Route.JOB
    if INTERNAL.fullmatch(path):
        return Route.CLOSED
    if INSTALLER.fullmatch(path):
        is_list = method in READS and path.removeprefix("/v2") in INSTALLER_LISTS
        return Route.RELAY if is_list else Route.CLOSED
    if _is_own("GET" if method == "HEAD" else method, path):
        return Route.OWN
    if method in READS or USER_FILES.fullmatch(path):
        return Route.RELAY
    if any(re.fullmatch(pattern, path) for pattern in allow):
        return Route.RELAY
    return Route.CLOSED


def _is_own(method: str, path: str) -> bool:
    if (method, path) in OWN_EXACT:
        return True
    if method == "GET":
        return OWN_GET.fullmatch(path) is not None
    return method == "POST" and OWN_POST.fullmatch(path) is not None


def own_path(path: str) -> str:
    """Bring a path of an OWN request to the one form that front doors compare: decoded, without `/api`."""
    return _without_api(unquote(path))


def _without_api(path: str) -> str:
    for _ in range(2):
        if path == "/api" or not path.startswith("/api/"):
            break
        path = path.removeprefix("/api")
    return path
