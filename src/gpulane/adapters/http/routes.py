"""Which requests to a generic HTTP service need the gpu, by `METHOD /path` patterns.

`*` stands for anything within one path segment, `**` for anything. A path is decoded and compared without
regard to case and to a slash at its end, as lenient servers do: a job must not slip past the queue by its
spelling.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Final
from urllib.parse import unquote

from gpulane.adapters.base import Route
from gpulane.errors import ConfigError

PATH_LENGTH_MAX: Final = 8192

DEFAULT_JOBS: Final = (
    # OpenAI's API, as vLLM, llama.cpp, Ollama, LM Studio, TabbyAPI ... serve it
    "POST /v1/chat/completions",
    "POST /v1/completions",
    "POST /v1/responses",
    "POST /v1/messages",
    "POST /v1/embeddings",
    "POST /v1/rerank",
    "POST /v1/audio/*",
    "POST /v1/images/*",
    # Ollama
    "POST /api/generate",
    "POST /api/chat",
    "POST /api/embed",
    "POST /api/embeddings",
    # llama.cpp and its relatives
    "POST /completion",
    "POST /completions",
    "POST /chat/completions",
    "POST /embedding",
    "POST /embeddings",
    "POST /infill",
    "POST /rerank",
    "POST /reranking",
    # text-generation-inference, whisper.cpp
    "POST /generate",
    "POST /generate_stream",
    "POST /inference",
)

_PATTERN: Final = re.compile(r"([A-Z]+|\*) (/\S*)")


def classify(method: str, path: str, jobs: Sequence[str] = DEFAULT_JOBS) -> Route:
    """Judge a request: a job where a pattern fits, closed where the path hides something, else relayed."""
    decoded = unquote(path, errors="replace")
    odd = (
        "//" in decoded
        or "/../" in f"{decoded}/"
        or "/./" in f"{decoded}/"
        or "\\" in decoded
        or "\0" in decoded
    )
    if odd or len(path) > PATH_LENGTH_MAX or not decoded.startswith("/"):
        # A server may fold such a path into one that is a job.
        return Route.CLOSED
    asked = f"{method} {decoded.rstrip('/') or '/'}"
    return Route.JOB if any(_compiled(pattern).fullmatch(asked) for pattern in jobs) else Route.RELAY


def check_patterns(patterns: Sequence[str]) -> None:
    """Refuse settings that are no patterns."""
    for pattern in patterns:
        if _PATTERN.fullmatch(pattern) is None:
            raise ConfigError(f"not a job path: {pattern!r}", hint="write it as `POST /v1/chat/completions`")


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    check_patterns([pattern])
    method, path = pattern.split(" ", 1)
    parts = re.split(r"(\*\*|\*)", path.rstrip("/") or "/")
    expression = "".join({"**": ".*", "*": "[^/]*"}.get(part) or re.escape(part) for part in parts)
    return re.compile(f"{'[A-Z]+' if method == '*' else method} {expression}", re.IGNORECASE | re.DOTALL)
