"""In which order ComfyUI runs a graph's nodes, and what makes a node's cached result still good."""

import hashlib
import json
from collections.abc import Callable

from gpulane.testing.card import Json
from gpulane.testing.comfyui.nodes import NodeTable


def is_link(value: Json) -> bool:
    """Whether an input's value is [node id, output number]."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)  # pyright: ignore[reportUnknownArgumentType]


class ExecutionList:
    """The nodes still to run, picked as ComfyUI does: outputs first, then what leads to outputs soonest."""

    def __init__(
        self, prompt: dict[str, Json], nodes: NodeTable, *, is_cached: Callable[[str], bool]
    ) -> None:
        self._prompt = prompt
        self._nodes = nodes
        self._is_cached = is_cached
        self._pending: dict[str, bool] = {}
        self._block_count: dict[str, int] = {}
        self._blocking: dict[str, dict[str, bool]] = {}

    def add(self, root: str) -> None:
        """Add a node and all that it needs."""
        todo = [root]
        links: list[tuple[str, str]] = []
        while todo:
            node_id = todo.pop()
            if node_id in self._pending:
                continue
            self._pending[node_id] = True
            self._block_count[node_id] = 0
            self._blocking[node_id] = {}
            for value in self._prompt[node_id]["inputs"].values():
                if is_link(value) and not self._is_cached(value[0]):
                    todo.append(value[0])
                    links.append((value[0], node_id))
        for source, target in links:
            if target not in self._blocking[source]:
                self._blocking[source][target] = True
                self._block_count[target] += 1

    def pick(self) -> str | None:
        """The next node to run; None when all have."""
        ready = [node_id for node_id in self._pending if self._block_count[node_id] == 0]
        if not ready:
            return None
        for node_id in ready:
            if self._is_output(node_id):
                return node_id
        for node_id in ready:
            if any(self._is_output(blocked) for blocked in self._blocking[node_id]):
                return node_id
        for node_id in ready:
            for blocked in self._blocking[node_id]:
                if any(self._is_output(second) for second in self._blocking[blocked]):
                    return node_id
        return ready[0]

    def done(self, node_id: str) -> None:
        """This node has run: what waited for it waits no more."""
        del self._pending[node_id]
        for blocked in self._blocking.pop(node_id):
            self._block_count[blocked] -= 1

    def _is_output(self, node_id: str) -> bool:
        return self._nodes.is_output(self._prompt[node_id]["class_type"])


def signatures(prompt: dict[str, Json], file_digest: Callable[[str], str]) -> dict[str, str]:
    """By node: a digest of its class, its values and all that lies above it."""
    found: dict[str, str] = {}

    def sign(node_id: str) -> str:
        if node_id in found:
            return found[node_id]
        found[node_id] = ""  # a cycle cannot be validated, but must not hang us either
        node = prompt[node_id]
        parts: list[Json] = [node["class_type"]]
        if node["class_type"] in ("LoadImage", "LoadImageMask"):
            parts.append(file_digest(str(node["inputs"].get("image"))))
        for name in sorted(node["inputs"]):
            value = node["inputs"][name]
            if is_link(value) and value[0] in prompt:
                parts.append([name, sign(value[0]), value[1]])
            else:
                parts.append([name, value])
        found[node_id] = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        return found[node_id]

    for node_id in prompt:
        sign(node_id)
    return found
