"""Who owns a path of the one listener: one numbered table, told from the raw target alone. Pure.

docs/paths.md shows this table and a test compares the two. Rules 1 to 5 take a literal prefix off and leave
the rest of the target byte for byte as it came. Rules 6 to 8 look at the decoded path, since engines decode
theirs before they route.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final
from urllib.parse import unquote

from gpulane.core.model import Service


class Owner(StrEnum):
    """Whose a path is."""

    GPULANE = "gpulane"
    REDIRECT = "redirect"
    COMFYUI = "comfyui"
    A1111 = "a1111"
    HTTP = "http"
    CLOSED = "closed"
    ROOT = "root"
    """The service whose root this is; nobody when the root is the page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One row of the table. `/x` is that path alone, `/x/...` everything below it."""

    number: int
    paths: tuple[str, ...]
    owner: Owner
    note: str


RULES: Final = (
    Rule(
        number=1, paths=("/gpulane/...", "/metrics"), owner=Owner.GPULANE, note="the native API and the page"
    ),
    Rule(
        number=2,
        paths=("/gpulane", "/comfy", "/sd", "/svc/NAME"),
        owner=Owner.REDIRECT,
        note="to the same path with a slash: pages below it use relative paths",
    ),
    Rule(number=3, paths=("/comfy/...",), owner=Owner.COMFYUI, note="prefix taken off"),
    Rule(number=4, paths=("/sd/...",), owner=Owner.A1111, note="prefix taken off"),
    Rule(
        number=5,
        paths=("/svc/NAME/...",),
        owner=Owner.HTTP,
        note="the `http` engines of that name; prefix taken off",
    ),
    Rule(
        number=6,
        paths=("/sdapi/...", "/internal/progress", "/internal/pending-tasks", "/internal/ping"),
        owner=Owner.A1111,
        note="",
    ),
    Rule(
        number=7,
        paths=("/internal/...",),
        owner=Owner.CLOSED,
        note="logs and paths of engines; when A1111 is the root its front door decides",
    ),
    Rule(
        number=8,
        paths=(
            "/prompt",
            "/queue",
            "/history",
            "/history/...",
            "/interrupt",
            "/free",
            "/ws",
            "/api/...",
            "/view",
            "/view_metadata/...",
            "/object_info",
            "/object_info/...",
            "/upload/image",
            "/upload/mask",
            "/system_stats",
            "/features",
            "/embeddings",
            "/models",
            "/models/...",
            "/experiment/...",
            "/extensions",
            "/extensions/...",
            "/workflow_templates",
            "/i18n",
            "/users",
            "/settings",
            "/settings/...",
            "/userdata",
            "/userdata/...",
            "/v2/userdata",
            "/global_subgraphs",
            "/global_subgraphs/...",
            "/node_replacements",
        ),
        owner=Owner.COMFYUI,
        note="",
    ),
    Rule(number=9, paths=("/",), owner=Owner.ROOT, note="without a root service: redirect to /gpulane/"),
    Rule(number=10, paths=("/...",), owner=Owner.ROOT, note="without a root service: 404"),
)
"""Asked in this order; the first that fits owns the path."""

MOUNTS: Final = (("/comfy/", Service.COMFYUI), ("/sd/", Service.A1111))
_NAMED: Final = re.compile(r"/svc/(?P<name>[^/]+)(?P<rest>/.*)?\Z", re.DOTALL)
_ABSOLUTE: Final = re.compile(r"https?://[^/?#]*", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToService:
    """A service's front door gets it."""

    service: Service
    target: str
    mount: str = ""
    """The prefix that was taken off, without a slash at its end."""
    name: str = ""
    """For `http`: the NAME."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToUs:
    """The native API or the page."""

    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Redirect:
    """Elsewhere on this listener."""

    location: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Nobody:
    """No such path, or a closed one."""

    is_closed: bool = False


Destination = ToService | ToUs | Redirect | Nobody


def root_service(setting: str | None, present: frozenset[Service]) -> Service | None:
    """Tell whose the root is: the setting's, else the only service's; None is the page's."""
    if setting is not None:
        return None if setting == "dashboard" else Service(setting)
    return next(iter(present)) if len(present) == 1 else None


def origin_form(raw: str) -> str | None:
    """Return path and query of a target as they came, also from the absolute form that proxies may send."""
    if raw.startswith("/"):
        return raw
    absolute = _ABSOLUTE.match(raw)
    if absolute is None:
        return None
    rest = raw[absolute.end() :].partition("#")[0]
    return rest if rest.startswith("/") else f"/{rest}"


def destination(target: str, *, root: Service | None, present: frozenset[Service]) -> Destination:
    """Apply the table. A service without any engine owns nothing while another one is the root."""
    path, mark, query = target.partition("?")
    if path.startswith("/gpulane/") or path == "/metrics":  # 1
        return ToUs(target=target)
    named = _NAMED.match(path)
    if path in {"/gpulane", "/comfy", "/sd"} or (named and named["rest"] is None):  # 2
        return Redirect(location=f"{path}/{mark}{query}")
    for mount, service in MOUNTS:  # 3, 4
        if path.startswith(mount):
            return ToService(service=service, target=target[len(mount) - 1 :], mount=mount[:-1])
    if named:  # 5
        mount = f"/svc/{named['name']}"
        return ToService(
            service=Service.HTTP, target=target[len(mount) :], mount=mount, name=unquote(named["name"])
        )
    match _owner_at_root(unquote(path)):
        case Owner.A1111 if Service.A1111 in present or root is None:  # 6
            return ToService(service=Service.A1111, target=target)
        case Owner.CLOSED if root is not Service.A1111:  # 7
            return Nobody(is_closed=True)
        case Owner.COMFYUI if Service.COMFYUI in present or root is None:  # 8
            return ToService(service=Service.COMFYUI, target=target)
        case _:
            pass
    if root is not None:  # 9, 10
        return ToService(service=root, target=target)
    return Redirect(location=f"/gpulane/{mark}{query}") if path == "/" else Nobody()


def owner_of(path: str) -> Owner:
    """Tell the owner of a decoded path by the table alone, whatever is present."""
    return next(rule.owner for rule in RULES for pattern in rule.paths if _fits(pattern, path))


def _owner_at_root(path: str) -> Owner:
    return next(rule.owner for rule in RULES[5:] for pattern in rule.paths if _fits(pattern, path))


def _fits(pattern: str, path: str) -> bool:
    if "NAME" in pattern:
        before, after = pattern.split("NAME")
        name, slash, _ = path.removeprefix(before).partition("/")
        return path.startswith(before) and bool(name) and bool(slash) is bool(after)
    if pattern.endswith("/..."):
        return path.startswith(pattern[:-3])
    return path == pattern
