"""The size of an upscaling job, from its fields and the first bytes of its pictures; no picture is
decoded.
"""

from __future__ import annotations

import binascii
from typing import Final

import msgspec

from gpulane.adapters.a1111.fields import Kind, Reader
from gpulane.core.model import Work

PIXELS_UNKNOWN: Final = 512 * 512
"""Taken for a picture whose header is not a PNG's."""
HEADER_CHARACTERS: Final = 48
"""Base64 of a PNG's first 36 bytes: signature, then width and height at bytes 16 to 24."""
_PNG = b"\x89PNG\r\n\x1a\n"


class _File(msgspec.Struct):
    data: msgspec.Raw = msgspec.Raw(b'""')


def work(reader: Reader) -> Work:
    """Pixels that come out, times the pictures."""
    _check(reader)
    mode = reader.integer("resize_mode", 0, low=0, high=1)
    scale = reader.number("upscaling_resize", 2.0, low=0.0, high=64.0)
    width = reader.integer("upscaling_resize_w", 512, low=1, high=65_536)
    height = reader.integer("upscaling_resize_h", 512, low=1, high=65_536)
    pictures = _pictures(reader)
    if mode == 1:
        return Work(pixels=width * height, images=max(1, len(pictures)))
    pixels = sum(picture_pixels(picture) for picture in pictures) or PIXELS_UNKNOWN
    return Work(pixels=max(1, int(pixels * scale * scale)), images=1)


def picture_pixels(raw: msgspec.Raw) -> int:
    """Read a base64 PNG's size out of its header."""
    head = bytes(memoryview(raw)[: HEADER_CHARACTERS + 64]).lstrip(b'"')
    # The engine takes `data:image/png;base64,...` too.
    head = head.split(b",", 1)[-1].replace(b"\\/", b"/")[:HEADER_CHARACTERS]
    try:
        data = binascii.a2b_base64(head[: len(head) // 4 * 4])
    except binascii.Error:
        return PIXELS_UNKNOWN
    if not data.startswith(_PNG) or len(data) < 24:
        return PIXELS_UNKNOWN
    return int.from_bytes(data[16:20]) * int.from_bytes(data[20:24]) or PIXELS_UNKNOWN


def _check(reader: Reader) -> None:
    for name in (
        "gfpgan_visibility",
        "codeformer_visibility",
        "codeformer_weight",
        "extras_upscaler_2_visibility",
    ):
        reader.number(name, 0.0, low=0.0, high=1.0)
    for name in ("show_extras_results", "upscaling_crop", "upscale_first"):
        reader.check(name, Kind.BOOL)
    reader.check("image", Kind.STR)


def _pictures(reader: Reader) -> list[msgspec.Raw]:
    image = reader.fields.get("image")
    items = reader.items("imageList") or []
    found = [] if image is None else [image]
    for item in items:
        try:
            found.append(msgspec.json.decode(item, type=_File).data)
        except (msgspec.DecodeError, RecursionError):
            continue
    return found
