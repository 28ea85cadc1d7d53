"""Which requests to an A1111 are jobs, told from method and path alone.

Everything that changes something and is not known is closed: an extension's POST may start work on the gpu
behind the queue's back. A path is decoded before it is judged, since the engine decodes it too
(`/sdapi/v1/%74xt2img`).
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Final
from urllib.parse import unquote

from gpulane.adapters.base import Route

API: Final = "/sdapi/v1/"
PATH_LENGTH_MAX: Final = 8192

JOB_POSTS: Final = frozenset(
    {
        "/sdapi/v1/txt2img",
        "/sdapi/v1/img2img",
        "/sdapi/v1/extra-single-image",
        "/sdapi/v1/extra-batch-images",
        "/sdapi/v1/interrogate",
        # Not under the engine's own lock although they use the gpu (or rewrite what it loads): only our queue
        # orders them.
        "/sdapi/v1/train/embedding",
        "/sdapi/v1/train/hypernetwork",
        "/sdapi/v1/create/embedding",
        "/sdapi/v1/create/hypernetwork",
        # Extensions that compute before they answer.
        "/controlnet/detect",
        "/tagger/v1/interrogate",
        "/rembg",
        "/reactor/image",
        "/sam/sam-predict",
        "/sam/dino-predict",
        "/sam/controlnet-seg",
    }
)
"""POSTs that occupy the gpu until their answer is complete. Routes that answer at once and compute later
(agent-scheduler, deforum) are not among them: the answer does not tell their end, so they are closed."""

OPERATOR_POSTS: Final = frozenset(
    {
        "/sdapi/v1/refresh-checkpoints",
        "/sdapi/v1/refresh-vae",
        "/sdapi/v1/refresh-embeddings",
        "/sdapi/v1/refresh-loras",
        "/sdapi/v1/unload-checkpoint",
        "/sdapi/v1/reload-checkpoint",
    }
)
"""The front door's own: they concern the engine and all its users, so they ask for an operator."""

OWN_POSTS: Final = OPERATOR_POSTS | {
    "/sdapi/v1/options",
    "/sdapi/v1/interrupt",
    "/sdapi/v1/skip",
    "/internal/progress",
}

OWN_GETS: Final = frozenset(
    {
        "/internal/ping",
        "/internal/pending-tasks",
        *(
            API + name
            for name in (
                "options",
                "progress",
                "sd-models",
                "sd-vae",
                "sd-modules",
                "samplers",
                "schedulers",
                "upscalers",
                "latent-upscale-modes",
                "loras",
                "embeddings",
                "hypernetworks",
                "prompt-styles",
                "face-restorers",
                "realesrgan-models",
                "scripts",
                "script-info",
                "memory",
                # Prints the web UI's password when the engine runs without --api-auth (webui issue 17411).
                "cmd-flags",
            )
        ),
    }
)

RELAYED_POSTS: Final = frozenset({"/sdapi/v1/png-info", "/login"})
"""Cheap reads that happen to be POSTs: no lock, no gpu."""

CLOSED_GETS: Final = ("/proxy=", "/stream/", "/token", "/sd_extra_networks/../")
"""Server-side fetches of any URL; live component streams; the login token."""

GRADIO_CALLS: Final = (
    "/queue/join",
    "/queue/data",
    "/run/",
    "/api/",
    "/call/",
    "/cancel",
    "/reset",
    "/upload",
)
"""Gradio's ways to call a function or to hear of its end. `/run/predict` and `/api/predict` run queued gpu
functions directly (recordings: predict_bypass), so they are closed until the function's number is judged
(`gradio.passing`)."""


def classify(method: str, path: str, *, allow: Iterable[str] = ()) -> Route:
    """Judge a request; the first rule that fits counts.

    1. What cannot be decoded, or hides dots or a second slash: closed.
    2. OPTIONS and the front door's own paths: own (HEAD as GET).
    3. Jobs.
    4. What the settings allow (`METHOD /path`, with `*`): relayed.
    5. Gradio's calls at any depth, other /internal/*, server control, the engine's own fetching: closed.
    6. GET and HEAD: relayed. Known cheap POSTs: relayed.
    7. Everything else: closed.
    """
    decoded = _decoded(path)
    if decoded is None:
        return Route.CLOSED
    is_read = method in {"GET", "HEAD"}
    if (
        method == "OPTIONS"
        or (is_read and decoded in OWN_GETS)
        or (method == "POST" and decoded in OWN_POSTS)
    ):
        return Route.OWN
    if method == "POST" and decoded in JOB_POSTS:
        return Route.JOB
    if any(fnmatchcase(f"{method} {decoded}", pattern) for pattern in allow):
        return Route.RELAY
    if is_gradio_call(decoded) or _is_closed(decoded):
        return Route.CLOSED
    return Route.RELAY if is_read or (method == "POST" and decoded in RELAYED_POSTS) else Route.CLOSED


def is_gradio_call(path: str) -> bool:
    """Tell whether this is one of the closed paths that `gradio.passing` may open, knowing the function
    called.
    """
    decoded = _decoded(path) or ""
    # An engine with --subpath answers below its prefix as well as at its root.
    return any(
        call in decoded if call.startswith("/queue/") else _calls(decoded, call) for call in GRADIO_CALLS
    )


def endpoint_of(path: str) -> str:
    """Name a job's endpoint: `txt2img`, `train/embedding`, `controlnet/detect`."""
    decoded = _decoded(path) or path
    return decoded.removeprefix(API).lstrip("/")


def _calls(path: str, call: str) -> bool:
    return (
        path.startswith(call)
        if call.endswith("/")
        else path.rstrip("/") == call or path.rstrip("/").endswith(call)
    )


def _is_closed(path: str) -> bool:
    return path.startswith(("/internal/", "/sdapi/v1/server-", *CLOSED_GETS))


def _decoded(path: str) -> str | None:
    if len(path) > PATH_LENGTH_MAX:
        return None
    decoded = unquote(path, errors="replace")
    # `/file=/abs/path` legitimately holds slashes of all sorts; nothing else does.
    if decoded.startswith("/file="):
        return decoded
    odd = "//" in decoded or "/../" in decoded or "/./" in decoded or "\\" in decoded or "\0" in decoded
    return None if odd or not decoded.startswith("/") else decoded
