"""Reads a workflow's graph: its shape, its size, the model it needs and what an engine must offer to run it.

It guesses sizes from the names of inputs and can be wrong; nothing here refuses a job. All walks have
limits, since a client draws the graph.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from gpulane.adapters.comfyui.catalog import Combos
from gpulane.core.model import NO_MODEL, ModelKey, Work

Scalar = str | int | float


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One node: what of it matters to us."""

    kind: str
    """Its class_type."""
    links: dict[str, tuple[str, int]]
    """Inputs that come from another node: its id and output."""
    values: dict[str, Scalar]
    """Inputs given as short strings or numbers; long strings (pictures in base64) are left out."""


Graph = dict[str, Node]

CHECKPOINT_INPUTS = frozenset(
    {"ckpt_name", "unet_name", "model_path", "base_ckpt_name", "refiner_ckpt_name", "gguf_name"}
)
"""Inputs by which loaders name what fills the card: CheckpointLoaderSimple, UNETLoader, DiffusersLoader, the
GGUF and Nunchaku loaders, efficiency nodes. Loras, VAEs and text encoders come along and are left out."""

PICTURE_INPUTS = ("latent", "samples", "image", "pixels")
"""Starts of the names of inputs that lead to the picture being made, not to what conditions it."""

WALK_NODES_MAX = 200
PASSES_MAX = 32
SIDE_MAX = 65_536
STEPS_MAX = 100_000
IMAGES_MAX = 65_536
RESOLVE_MAX = 8


# --- shape --------------------------------------------------------------------------------------------------


def signature_of(graph: Graph) -> str:
    """Digest node classes and wiring; values and node ids do not matter."""
    readers: dict[str, list[str]] = {}
    open_links: Counter[str] = Counter()
    for name, node in graph.items():
        for source in {source for source, _ in node.links.values() if source in graph}:
            readers.setdefault(source, []).append(name)
            open_links[name] += 1
    digests: dict[str, bytes] = {}
    ready = deque(name for name in graph if not open_links[name])
    while ready:
        name = ready.popleft()
        digests[name] = _digest_of(graph[name], digests)
        for reader in readers.get(name, ()):
            open_links[reader] -= 1
            if not open_links[reader]:
                ready.append(reader)
    # What is left over lies on or behind a cycle, and the engine will refuse it.
    rest = [_digest_of(node, {}) for name, node in graph.items() if name not in digests]
    return blake2b(b"".join(sorted([*digests.values(), *rest])), digest_size=8).hexdigest()


def _digest_of(node: Node, digests: dict[str, bytes]) -> bytes:
    digest = blake2b(node.kind.encode(), digest_size=8)
    for name, (source, slot) in sorted(node.links.items()):
        digest.update(f"\0{name}\0{slot}\0".encode())
        digest.update(digests.get(source, b""))
    return digest.digest()


# --- size ---------------------------------------------------------------------------------------------------


def work_of(graph: Graph) -> Work:
    """Add up steps x pixels x images over all sampling passes, told as one pass over the largest picture."""
    readers = _readers(graph)
    samplers = [name for name, node in graph.items() if "steps" in node.values or "steps" in node.links]
    passes = [_pass(graph, name, readers) for name in samplers[:PASSES_MAX]]
    passes = [each for each in passes if each.steps > 0]
    if not passes:
        sizes = [size for node in graph.values() if (size := _own_size(graph, node)) is not None]
        pixels, images = max(sizes, key=math.prod, default=(1, 1))
        return Work(steps=1, pixels=pixels, images=images)
    largest = max(passes, key=lambda each: each.pixels * each.images)
    total = sum(each.amount for each in passes)
    steps = math.ceil(total / (largest.pixels * largest.images))
    return Work(steps=max(1, steps), pixels=largest.pixels, images=largest.images)


def _pass(graph: Graph, name: str, readers: dict[str, list[str]]) -> Work:
    node = graph[name]
    steps = _number(graph, node, "steps") or 0
    # KSamplerAdvanced computes the part between the two, as in a base and a refiner pass.
    first, last = _number(graph, node, "start_at_step") or 0, _number(graph, node, "end_at_step")
    steps = (min(steps, last) if last is not None else steps) - max(first, 0)
    size = _nearest_size(graph, [name], PICTURE_INPUTS)
    if size is None:  # a scheduler: its steps are used by the sampler that reads it
        size = _nearest_size(graph, readers.get(name, []), PICTURE_INPUTS)
    if size is None:
        size = _nearest_size(graph, [name], ("",)) or (1, 1)
    return Work(steps=int(min(max(steps, 0), STEPS_MAX)), pixels=size[0], images=size[1])


def _readers(graph: Graph) -> dict[str, list[str]]:
    readers: dict[str, list[str]] = {}
    for name, node in graph.items():
        for source, _ in node.links.values():
            readers.setdefault(source, []).append(name)
    return readers


def _nearest_size(graph: Graph, starts: Sequence[str], inputs: tuple[str, ...]) -> tuple[int, int] | None:
    """Walk upwards from a sampler to the first node that has a width and a height; scale by what lies
    between.
    """
    seen = set(starts)
    queue = deque((name, 1.0) for name in starts)
    while queue and len(seen) < WALK_NODES_MAX:
        name, scale = queue.popleft()
        node = graph.get(name)
        if node is None:
            continue
        size = _own_size(graph, node)
        if size is not None:
            return max(1, min(int(size[0] * scale), SIDE_MAX**2)), size[1]
        scale *= min(max(_number(graph, node, "scale_by") or 1.0, 0.01), 16.0) ** 2
        for key, (source, _) in node.links.items():
            if source not in seen and key.startswith(inputs):
                seen.add(source)
                queue.append((source, scale))
    return None


def _own_size(graph: Graph, node: Node) -> tuple[int, int] | None:
    """Return (pixels, images) of a node that has a width and a height."""
    width, height = _number(graph, node, "width"), _number(graph, node, "height")
    if not width or not height:
        return None
    frames = _number(graph, node, "length") if "batch_size" in node.values else None
    images = (_number(graph, node, "batch_size") or 1) * (frames or 1)
    return _side(width) * _side(height), int(min(max(images, 1), IMAGES_MAX))


def _side(value: float) -> int:
    return int(min(max(value, 1), SIDE_MAX))


def _number(graph: Graph, node: Node, name: str) -> float | None:
    value = _resolved(graph, node, name)
    return value if isinstance(value, int | float) else None


def _resolved(graph: Graph, node: Node, name: str) -> Scalar | None:
    """Return an input's value, also through nodes that do nothing but hold one (PrimitiveInt and the
    like).
    """
    for _ in range(RESOLVE_MAX):
        if name in node.values:
            return node.values[name]
        source = graph.get(node.links[name][0]) if name in node.links else None
        if source is None or len(source.values) + len(source.links) != 1:
            return None
        node, name = source, next(iter(source.values or source.links))
    return None


# --- model and needs ----------------------------------------------------------------------------------------


def model_of(graph: Graph) -> ModelKey:
    """Name what the workflow loads onto the card; several are joined, sorted. A loader that nobody reads is
    not run.
    """
    names = {value for name in loaders_of(graph) for value in _model_names(graph, graph[name])}
    return ModelKey(" + ".join(sorted(names))) if names else NO_MODEL


def loaders_of(graph: Graph) -> tuple[str, ...]:
    """List the nodes that load what fills the card."""
    readers = _readers(graph)
    return tuple(name for name, node in graph.items() if name in readers and _model_names(graph, node))


def _model_names(graph: Graph, node: Node) -> list[str]:
    inputs = CHECKPOINT_INPUTS & (node.values.keys() | node.links.keys())
    found = (_resolved(graph, node, key) for key in inputs)
    return [value for value in found if isinstance(value, str) and value]


def needs_of(graph: Graph, combos: Combos) -> frozenset[str]:
    """List what an engine must offer: every node class, and every model or sampler that is named."""
    needs = {f"node:{node.kind}" for node in graph.values()}
    for node in graph.values():
        needs.update(
            f"{node.kind}.{name}={value}"
            for name, value in node.values.items()
            if isinstance(value, str) and (node.kind, name) in combos
        )
    return frozenset(needs)
