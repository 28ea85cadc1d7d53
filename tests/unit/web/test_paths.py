"""The table of paths: each has one owner, targets stay as they came, and docs/paths.md says the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gpulane.core.model import Service
from gpulane.web.paths import (
    RULES,
    Destination,
    Nobody,
    Owner,
    Redirect,
    ToService,
    ToUs,
    destination,
    origin_form,
    owner_of,
    root_service,
)

BOTH = frozenset({Service.COMFYUI, Service.A1111})


def to(target: str, *, root: Service | None = None, present: frozenset[Service] = BOTH) -> Destination:
    return destination(target, root=root, present=present)


def comfyui(target: str, mount: str = "") -> ToService:
    return ToService(service=Service.COMFYUI, target=target, mount=mount)


def a1111(target: str, mount: str = "") -> ToService:
    return ToService(service=Service.A1111, target=target, mount=mount)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("/gpulane/v1/jobs?limit=1", ToUs(target="/gpulane/v1/jobs?limit=1")),
        ("/metrics", ToUs(target="/metrics")),
        ("/gpulane", Redirect(location="/gpulane/")),
        ("/comfy?a=%2F", Redirect(location="/comfy/?a=%2F")),
        ("/sd", Redirect(location="/sd/")),
        ("/svc/llm", Redirect(location="/svc/llm/")),
        ("/comfy/", comfyui("/", "/comfy")),
        ("/comfy/view?filename=a%20b%2Fc.png", comfyui("/view?filename=a%20b%2Fc.png", "/comfy")),
        ("/comfy/internal/logs", comfyui("/internal/logs", "/comfy")),
        ("/sd/file=/abs/p%41th//x.png", a1111("/file=/abs/p%41th//x.png", "/sd")),
        (
            "/svc/my%20llm/v1/models?x=1",
            ToService(service=Service.HTTP, target="/v1/models?x=1", mount="/svc/my%20llm", name="my llm"),
        ),
        ("/sdapi/v1/txt2img", a1111("/sdapi/v1/txt2img")),
        ("/internal/progress", a1111("/internal/progress")),
        ("/internal/ping", a1111("/internal/ping")),
        ("/internal/sysinfo", Nobody(is_closed=True)),
        ("/%69nternal/logs", Nobody(is_closed=True)),
        ("/internal%2Flogs", Nobody(is_closed=True)),
        ("/prompt", comfyui("/prompt")),
        ("/queue", comfyui("/queue")),
        ("/queue/join", Nobody()),
        ("/api/prompt", comfyui("/api/prompt")),
        ("/ws?clientId=1", comfyui("/ws?clientId=1")),
        ("/upload/image", comfyui("/upload/image")),
        ("/upload", Nobody()),
        ("/history/abc", comfyui("/history/abc")),
        ("/", Redirect(location="/gpulane/")),
        ("/assets/x.js", Nobody()),
        ("/comfyx/", Nobody()),
    ],
)
def test_main_listener(target: str, expected: Destination) -> None:
    assert to(target) == expected


@pytest.mark.parametrize(
    ("target", "root", "expected"),
    [
        ("/", Service.COMFYUI, comfyui("/")),
        ("/assets/x.js", Service.COMFYUI, comfyui("/assets/x.js")),
        ("/sdapi/v1/txt2img", Service.COMFYUI, a1111("/sdapi/v1/txt2img")),
        ("/internal/logs", Service.COMFYUI, Nobody(is_closed=True)),
        ("/queue/join", Service.A1111, a1111("/queue/join")),
        ("/internal/quicksettings-hint", Service.A1111, a1111("/internal/quicksettings-hint")),
        ("/queue", Service.A1111, comfyui("/queue")),
        ("/gpulane/", Service.A1111, ToUs(target="/gpulane/")),
    ],
)
def test_root_service_gets_what_nobody_else_owns(target: str, root: Service, expected: Destination) -> None:
    assert to(target, root=root) == expected


def test_only_service_owns_even_the_other_ones_paths() -> None:
    only = frozenset({Service.A1111})
    assert to("/prompt", root=Service.A1111, present=only) == a1111("/prompt")
    only = frozenset({Service.COMFYUI})
    assert to("/sdapi/v1/txt2img", root=Service.COMFYUI, present=only) == comfyui("/sdapi/v1/txt2img")
    assert to("/internal/logs", root=Service.COMFYUI, present=only) == Nobody(is_closed=True)


@pytest.mark.parametrize(
    ("setting", "present", "expected"),
    [
        (None, BOTH, None),
        (None, frozenset({Service.A1111}), Service.A1111),
        ("dashboard", frozenset({Service.A1111}), None),
        ("comfyui", BOTH, Service.COMFYUI),
    ],
)
def test_root(setting: str | None, present: frozenset[Service], expected: Service | None) -> None:
    assert root_service(setting, present) is expected


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("/a?b", "/a?b"),
        ("//evil.example/x", "//evil.example/x"),
        ("http://host:1/a%2Fb?c#d", "/a%2Fb?c"),
        ("HTTP://host", "/"),
        ("http://host?x", "/?x"),
        ("*", None),
        ("host:443", None),
    ],
)
def test_origin_form(raw: str, expected: str | None) -> None:
    assert origin_form(raw) == expected


def test_redirects_stay_here() -> None:
    assert to("//evil.example/..") == Nobody()
    assert to("/svc//evil.example") == Nobody()


def test_table_and_code_agree_on_every_listed_path() -> None:
    for rule in RULES:
        for pattern in rule.paths:
            path = pattern.replace("NAME", "llm").replace("...", "some/thing")
            assert owner_of(path) is rule.owner, path
            found = to(path)
            match rule.owner:
                case Owner.GPULANE:
                    assert isinstance(found, ToUs)
                case Owner.REDIRECT:
                    assert isinstance(found, Redirect)
                case Owner.COMFYUI | Owner.A1111 | Owner.HTTP:
                    assert isinstance(found, ToService) and found.service.value == rule.owner.value
                case Owner.CLOSED:
                    assert found == Nobody(is_closed=True)
                case Owner.ROOT:
                    assert isinstance(found, Redirect | Nobody)


def test_document_lists_the_same_table(root: Path) -> None:
    text = (root / "docs" / "paths.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.*?) \| (\w+) \| (.*?) \|$", text, re.MULTILINE)
    listed = [(int(n), tuple(re.findall(r"`([^`]+)`", paths)), owner, note) for n, paths, owner, note in rows]
    assert listed == [(rule.number, rule.paths, rule.owner.value, rule.note) for rule in RULES]
