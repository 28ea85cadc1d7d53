"""Real PNG files that show which prompt, seed and GPU made them, with the text chunks that the engines embed.

Pillow draws the text when it is installed (extra `demo`); without it the picture is one flat color from the
seed.
"""

import struct
import textwrap
import zlib
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from io import BytesIO
from typing import Final

SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
MAX_SIDE: Final = 16384
"""The longest side that the engines allow."""

HAS_PILLOW: Final = find_spec("PIL") is not None


def render_png(
    prompt: str,
    seed: int,
    gpu: str,
    width: int,
    height: int,
    text_chunks: Mapping[str, str],
    *,
    plain: bool = False,
) -> bytes:
    """A PNG of exactly this size; `plain` leaves the drawing out, for benches."""
    width, height = max(1, min(width, MAX_SIDE)), max(1, min(height, MAX_SIDE))
    if HAS_PILLOW and not plain:
        depth, rows = 8, _drawn(prompt, seed, gpu, width, height)
    else:
        # One bit a pixel, all of them zero: the first color of the palette.
        depth, rows = 1, b"\x00" * ((1 + (width + 7) // 8) * height)
    header = struct.pack(">IIBBBBB", width, height, depth, 3, 0, 0, 0)
    texts = b"".join(_text_chunk(keyword, text) for keyword, text in text_chunks.items())
    return b"".join(
        (
            SIGNATURE,
            _chunk(b"IHDR", header),
            _chunk(b"PLTE", b"".join(bytes(color) for color in _palette(seed))),
            texts,
            _chunk(b"IDAT", zlib.compress(rows, 1)),
            _chunk(b"IEND", b""),
        )
    )


def read_text_chunks(png: bytes) -> dict[str, str]:
    """The text chunks of a PNG; empty when it is none."""
    if not png.startswith(SIGNATURE):
        return {}
    texts: dict[str, str] = {}
    at = len(SIGNATURE)
    while at + 12 <= len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        body = png[at + 8 : at + 8 + length]
        if kind == b"tEXt":
            keyword, _, text = body.partition(b"\0")
            texts[keyword.decode("latin-1")] = text.decode("latin-1")
        elif kind == b"iTXt":
            keyword, _, rest = body.partition(b"\0")
            texts[keyword.decode("latin-1")] = rest[2:].split(b"\0", 2)[2].decode("utf-8", "replace")
        at += 12 + length
    return texts


def png_size(png: bytes) -> tuple[int, int]:
    """Width and height of a PNG; (0, 0) when it is none."""
    if not png.startswith(SIGNATURE) or len(png) < 24:
        return 0, 0
    width, height = struct.unpack(">II", png[16:24])
    return width, height


@lru_cache(maxsize=4)
def preview_jpeg(side: int = 64) -> tuple[bytes, str]:
    """A small picture as the engines send while they sample, and its MIME type (PNG without Pillow)."""
    if not HAS_PILLOW:
        return render_png("preview", 1, "sim", side, side, {}), "image/png"
    from PIL import Image

    out = BytesIO()
    gradient = Image.linear_gradient("L")
    gradient.thumbnail((side, side))
    gradient.convert("RGB").save(out, "JPEG", quality=95)
    return out.getvalue(), "image/jpeg"


def _palette(seed: int) -> list[tuple[int, int, int]]:
    """Background, ink, and two shades between, all from the seed."""
    mixed = (seed * 2654435761) & 0xFFFFFF
    red, green, blue = (60 + (mixed >> shift & 0x7F) for shift in (16, 8, 0))
    return [
        (red, green, blue),
        (250, 250, 250),
        (red * 3 // 4, green * 3 // 4, blue * 3 // 4),
        (min(255, red + 50), min(255, green + 50), min(255, blue + 50)),
    ]


def _drawn(prompt: str, seed: int, gpu: str, width: int, height: int) -> bytes:
    """The picture's rows, each with its filter byte, one palette index a pixel."""
    from PIL import Image, ImageDraw

    image = Image.new("P", (width, height), 0)
    draw = ImageDraw.Draw(image)
    mixed = (seed * 40503 + 77) & 0xFFFFFFFF
    for shade in (2, 3):
        mixed = (mixed * 1664525 + 1013904223) & 0xFFFFFFFF
        x, y = mixed % width, (mixed >> 12) % height
        radius = max(1, min(width, height) // (2 + (mixed >> 24) % 4))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shade)
    columns = max(8, width // 7)
    lines = [f"gpu {gpu}", f"seed {seed}", *textwrap.wrap(prompt, columns)[: max(1, height // 14)]]
    draw.multiline_text((4, 4), "\n".join(_latin(line) for line in lines), fill=1)
    pixels = image.tobytes()
    return b"".join(b"\0" + pixels[row * width : (row + 1) * width] for row in range(height))


def _latin(text: str) -> str:
    """What the built-in font can show."""
    return text.encode("latin-1", "replace").decode("latin-1")


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _text_chunk(keyword: str, text: str) -> bytes:
    """A tEXt chunk where Latin-1 will do (as Pillow writes), else iTXt."""
    try:
        return _chunk(b"tEXt", keyword.encode("latin-1") + b"\0" + text.encode("latin-1"))
    except UnicodeEncodeError:
        return _chunk(b"iTXt", keyword.encode("latin-1") + b"\0\0\0\0\0" + text.encode("utf-8"))
