"""Turns a request into a job: what it needs, how big it is, and the body that is sent to the engine for it.

The body sent always carries our job id, restores options afterwards (or one account's would reach the next
one's job) and names its checkpoint when there is any choice, since what the engine has loaded is whatever ran
last.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Final

import msgspec

from gpulane.adapters.a1111 import upscaling
from gpulane.adapters.a1111.catalogue import Catalogue
from gpulane.adapters.a1111.errors import EngineRefusal
from gpulane.adapters.a1111.fields import Body, Kind, Reader, join, split
from gpulane.adapters.a1111.names import Names, loras_in
from gpulane.adapters.a1111.options import check_override
from gpulane.adapters.a1111.routes import endpoint_of
from gpulane.adapters.a1111.schema import TYPES
from gpulane.adapters.base import EngineRequest, HeaderList, Recognized
from gpulane.core.model import NO_MODEL, JobId, ModelKey, Work

HEADERS: Final[HeaderList] = (
    ("Content-Type", "application/json"),
    ("Accept", "application/json"),
    # The engine would zip megabytes of pictures on its event loop.
    ("Accept-Encoding", "identity"),
)

TASK_ID: Final = "force_task_id"
TASK_ID_LENGTH_MAX: Final = 256
DENOISING_DEFAULT: Final = 0.75


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The biggest job that is taken."""

    side_pixels_max: int = 16_384
    steps_max: int = 10_000
    batch_size_max: int = 256
    batches_max: int = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestContext:
    """What is needed beside the request to understand it."""

    job: JobId
    catalogue: Catalogue = field(default_factory=Catalogue)
    """Merged over all engines that are there."""
    carried: Body = field(default_factory=Body)
    """The account's own options that go with its jobs (`options.carried`), its checkpoint among them."""
    is_admin: bool = False
    limits: Limits = field(default_factory=Limits)


class Meta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the engine client and the front door need to know of a job later."""

    endpoint: str
    checkpoint: str = ""
    """Name of the checkpoint that was asked for: the answer has to prove it."""
    leaves_other_model: bool = False
    """A second checkpoint runs at the end (refiner, second pass), so the answer does not tell what stays
    loaded."""
    unknown_loras: tuple[str, ...] = ()
    """Named in the prompt, known to no engine: A1111 renders without them and says nothing."""
    overrides: tuple[str, ...] = ()
    """Options that the job sets for its own time."""


def recognize(path: str, body: bytes, context: RequestContext) -> Recognized:
    """Understand a request to one of `routes.JOB_POSTS`. Raises a ClientError that says what to change.

    20 MB of pictures take some 50 ms, nearly all of it for the digest, which lets other threads run: callers
    with an event loop do it in a thread.
    """
    endpoint = endpoint_of(path)
    fields = split(body)
    match endpoint:
        case "txt2img" | "img2img":
            return _generate(endpoint, fields, context)
        case "extra-single-image" | "extra-batch-images":
            return _extras(endpoint, fields, context)
        case _:
            return _other(endpoint, path, fields, context)


# --- txt2img, img2img


def _generate(endpoint: str, fields: Body, context: RequestContext) -> Recognized:
    reader = Reader(fields=fields)
    names = Names(catalogue=context.catalogue, endpoint=endpoint)
    if endpoint == "img2img" and not reader.items("init_images"):
        reader.finish()
        raise EngineRefusal("Init image not found", status=404)
    work = _work(endpoint, reader, context.limits)
    for name, kind in TYPES[endpoint].items():
        reader.check(name, kind)
    client_task = reader.text(TASK_ID)
    override = reader.object("override_settings") or {}
    own_checkpoint = override.get("sd_model_checkpoint")
    loras = loras_in(reader.text("prompt"), reader.text("hr_prompt"), reader.text("negative_prompt"))
    changes: Body = {}
    names.sampler(reader, changes)
    names.second_pass(reader, changes)
    names.scripts(reader)
    names.loras(loras)
    infotext = reader.text("infotext")
    reader.finish()
    check_override(override, is_admin=context.is_admin)
    settings = _carried(context) | override
    if own_checkpoint is None and infotext:
        # An infotext brings its own checkpoint, which an account's choice would otherwise override.
        settings.pop("sd_model_checkpoint", None)
        names.checkpoint_of_infotext(infotext, settings)
    names.settings(settings)
    sent = (
        fields
        | changes
        | {
            "override_settings": _raw(settings),
            # Only options are restored, never the loaded model; without it the next account would inherit
            # them.
            "override_settings_restore_afterwards": msgspec.Raw(b"true"),
        }
    )
    meta = Meta(
        endpoint=endpoint,
        checkpoint=names.checkpoint,
        leaves_other_model=names.leaves_other_model,
        unknown_loras=names.unknown_loras,
        overrides=tuple(sorted(settings)),
    )
    return _recognized(
        endpoint,
        sent,
        context,
        model=names.model_key,
        signature=names.signature(),
        work=work,
        needs=names.needs,
        client_task=client_task,
        meta=meta,
    )


def _carried(context: RequestContext) -> Body:
    """Take the account's own options, without those that no engine has any more: they would fail it."""
    known = context.catalogue.options
    return {key: value for key, value in context.carried.items() if known is None or key in known}


def _work(endpoint: str, reader: Reader, limits: Limits) -> Work:
    """Steps x pixels x pictures; a second pass counts as more pixels, an img2img as the steps it really
    makes.
    """
    steps = reader.integer("steps", 50, low=1, high=limits.steps_max)
    # Below 8 pixels there is no latent at all: the engine fails inside the model.
    width = reader.integer("width", 512, low=8, high=limits.side_pixels_max)
    height = reader.integer("height", 512, low=8, high=limits.side_pixels_max)
    batch = reader.integer("batch_size", 1, low=1, high=limits.batch_size_max)
    batches = reader.integer("n_iter", 1, low=1, high=limits.batches_max)
    denoising = reader.number("denoising_strength", DENOISING_DEFAULT)
    pixels = width * height
    if endpoint == "img2img":
        steps = max(1, math.ceil(steps * min(max(denoising, 0.0), 1.0)))
    elif reader.flag("enable_hr"):
        passes = reader.integer("hr_second_pass_steps", 0, low=0, high=limits.steps_max) or steps
        made = max(1.0, passes * min(max(denoising, 0.0), 1.0))
        pixels += int(_second_pass_pixels(reader, width, height, limits) * made / max(steps, 1))
    return Work(steps=steps, pixels=pixels, images=batch * batches)


def _second_pass_pixels(reader: Reader, width: int, height: int, limits: Limits) -> float:
    scale = reader.number("hr_scale", 2.0, low=0.0, high=64.0)
    wide = reader.integer("hr_resize_x", 0, low=0, high=limits.side_pixels_max)
    high = reader.integer("hr_resize_y", 0, low=0, high=limits.side_pixels_max)
    if not wide and not high:
        return width * height * scale * scale
    # One side given: the other follows in proportion.
    return (wide or width * high / max(height, 1)) * (high or height * wide / max(width, 1))


# --- the others


def _extras(endpoint: str, fields: Body, context: RequestContext) -> Recognized:
    reader = Reader(fields=fields)
    names = Names(catalogue=context.catalogue, endpoint=endpoint)
    work = upscaling.work(reader)
    changes: Body = {}
    for name in ("upscaler_1", "upscaler_2"):
        names.upscaler(reader, name, changes)
    reader.finish()
    meta = Meta(endpoint=endpoint)
    return _recognized(
        endpoint,
        fields | changes,
        context,
        signature=names.signature(),
        work=work,
        needs=names.needs,
        meta=meta,
    )


def _other(endpoint: str, path: str, fields: Body, context: RequestContext) -> Recognized:
    """Interrogate, training, extensions: passed on as they are, one at a time."""
    reader = Reader(fields=fields)
    if endpoint == "interrogate":
        for name in ("image", "model"):
            reader.check(name, Kind.STR)
        reader.finish()
    needs = frozenset({f"endpoint:{endpoint}"})
    return _recognized(
        endpoint,
        fields,
        context,
        path=path,
        signature=endpoint,
        work=Work(),
        needs=needs,
        meta=Meta(endpoint=endpoint),
    )


def _recognized(
    endpoint: str,
    fields: Body,
    context: RequestContext,
    *,
    signature: str,
    work: Work,
    needs: frozenset[str],
    meta: Meta,
    model: ModelKey = NO_MODEL,
    client_task: str | None = None,
    path: str | None = None,
) -> Recognized:
    digest = _digest(endpoint, fields)
    if endpoint in {"txt2img", "img2img"}:
        fields = fields | {TASK_ID: _raw(context.job)}
    return Recognized(
        kind=endpoint,
        request=EngineRequest(
            method="POST", target=path or f"/sdapi/v1/{endpoint}", headers=HEADERS, body=join(fields)
        ),
        model=model,
        signature=signature,
        work=work,
        needs=needs,
        client_job_id=client_task[:TASK_ID_LENGTH_MAX] if client_task else None,
        meta=msgspec.json.encode(meta),
        digest=digest,
    )


def _digest(endpoint: str, fields: Body) -> str:
    """Digest what will be computed, whatever the order of the fields; the client's id for it is no part of
    that.
    """
    hashed = hashlib.blake2b(endpoint.encode(), digest_size=16)
    for name in sorted(fields):
        if name != TASK_ID:
            hashed.update(f"\0{name}\0".encode())
            hashed.update(memoryview(fields[name]))
    return hashed.hexdigest()


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))
