"""The input, output and temp folders of a simulated ComfyUI: saving, viewing and uploading pictures."""

import hashlib
import json
import random
import re
import shutil
import string
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Final

from aiohttp import web

from gpulane.testing.card import Json
from gpulane.testing.pictures import HAS_PILLOW, png_size, read_text_chunks, render_png

KINDS: Final = ("input", "output", "temp")
CHUNK_BYTES: Final = 64 * 1024


class Folders:
    """One engine's files; without a base folder they lie in a temporary one that goes with the engine."""

    def __init__(self, base: Path | None, *, seed: int) -> None:
        self._is_own = base is None
        self.base = base or Path(tempfile.mkdtemp(prefix="sim-comfyui-"))
        self._random = random.Random(seed)
        self._next: dict[Path, int] = {}
        self._temp_suffixes: dict[str, str] = {}
        for kind in KINDS:
            self.folder(kind).mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        if self._is_own:
            shutil.rmtree(self.base, ignore_errors=True)

    def begin_life(self) -> None:
        """Temp is emptied when a server starts; output and input stay."""
        shutil.rmtree(self.folder("temp"), ignore_errors=True)
        self.folder("temp").mkdir(parents=True, exist_ok=True)
        self._next.clear()
        self._temp_suffixes.clear()

    def folder(self, kind: str) -> Path:
        return self.base / kind

    def input_files(self) -> list[str]:
        return sorted(path.name for path in self.folder("input").iterdir() if path.is_file())

    # -- results

    def temp_prefix(self, node_key: str) -> str:
        """PreviewImage's prefix: five random letters for each node instance."""
        if node_key not in self._temp_suffixes:
            letters = "".join(self._random.choice(string.ascii_lowercase) for _ in range(5))
            self._temp_suffixes[node_key] = f"ComfyUI_temp_{letters}"
        return self._temp_suffixes[node_key]

    def save(
        self,
        kind: str,
        prefix: str,
        count: int,
        *,
        show: tuple[str, int, str],
        size: tuple[int, int],
        texts: dict[str, Json],
        plain: bool,
    ) -> list[Json]:
        """Write pictures that show (prompt, seed, gpu), and answer them as a node's `ui.images`."""
        subfolder, _, name = prefix.rpartition("/")
        folder = (self.folder(kind) / subfolder).resolve()
        if not folder.is_relative_to(self.folder(kind).resolve()):
            raise ValueError("Saving image outside the output folder is not allowed.")
        folder.mkdir(parents=True, exist_ok=True)
        chunks = {key: json.dumps(value) for key, value in texts.items()}
        images: list[Json] = []
        prompt, seed, gpu = show
        for index in range(count):
            number = self._count(folder, name)
            filename = f"{name}_{number:05}_.png"
            png = render_png(prompt, seed + index, gpu, *size, chunks, plain=plain)
            (folder / filename).write_bytes(png)
            images.append({"filename": filename, "subfolder": subfolder, "type": kind})
        return images

    def _count(self, folder: Path, name: str) -> int:
        """One more than the highest number there. Listed once: a folder may hold thousands."""
        key = folder / name
        if key not in self._next:
            pattern = re.compile(re.escape(name) + r"_(\d+)_")
            found = [int(m[1]) for path in folder.iterdir() if (m := pattern.match(path.name))]
            self._next[key] = max(found, default=0) + 1
        number = self._next[key]
        self._next[key] += 1
        return number

    # -- inputs

    def locate(self, annotated: str) -> Path | None:
        """The file that a LoadImage value names: `x.png`, `sub/x.png`, `x.png [output]`."""
        kind, name = "input", annotated
        for known in KINDS:
            if annotated.endswith(f" [{known}]"):
                kind, name = known, annotated.removesuffix(f" [{known}]")
        path = (self.folder(kind) / name).resolve()
        is_inside = path.is_relative_to(self.folder(kind).resolve())
        return path if is_inside and path.is_file() else None

    def size_of(self, annotated: str) -> tuple[int, int]:
        path = self.locate(annotated)
        width, height = png_size(path.read_bytes()) if path else (0, 0)
        return (width or 512, height or 512)

    def digest_of(self, annotated: str) -> str:
        path = self.locate(annotated)
        return hashlib.sha256(path.read_bytes()).hexdigest() if path else ""

    # -- HTTP

    def view(self, request: web.Request, *, in_memory: bool) -> web.StreamResponse:
        """GET /view. `in_memory` lets the server's body faults reach the bytes."""
        filename = request.query.get("filename", "")
        if "filename" not in request.query:
            return web.Response(status=404)
        kind = request.query.get("type", "output")
        if not filename or filename[0] == "/" or ".." in filename or kind not in KINDS:
            return web.Response(status=400)
        folder = (self.folder(kind) / request.query.get("subfolder", "")).resolve()
        if not folder.is_relative_to(self.folder(kind).resolve()):
            return web.Response(status=403)
        path = folder / Path(filename).name
        if not path.is_file():
            return web.Response(status=404)
        headers = {"Content-Disposition": f'filename="{path.name}"'}
        if "preview" in request.query and HAS_PILLOW:
            fmt, _, quality = request.query["preview"].partition(";")
            body = _reencoded(path, fmt if fmt in ("webp", "jpeg") else "webp", int(quality or 90))
            return web.Response(body=body, content_type=f"image/{fmt}", headers=headers)
        if request.query.get("channel", "rgba") != "rgba" and HAS_PILLOW:
            return web.Response(body=_reencoded(path, "png", 90), content_type="image/png", headers=headers)
        if in_memory:
            return web.Response(body=path.read_bytes(), content_type="image/png", headers=headers)
        return web.FileResponse(path, headers=headers)

    async def upload(self, request: web.Request, *, is_mask: bool) -> web.Response:
        """POST /upload/image and /upload/mask."""
        form = await request.post()
        image = form.get("image")
        kind = str(form.get("type") or "input")
        if not isinstance(image, web.FileField):
            return web.Response(status=400)
        if kind not in KINDS:
            raise ValueError(f"no folder for uploads of type {kind!r}")
        if is_mask:
            json.loads(str(form.get("original_ref")))  # the original needs it, and is 500 without
        subfolder = str(form.get("subfolder", ""))
        folder = (self.folder(kind) / subfolder).resolve()
        if not image.filename or not folder.is_relative_to(self.folder(kind).resolve()):
            return web.Response(status=400)
        path = folder / image.filename
        if not path.resolve().is_relative_to(folder):
            return web.Response(status=400)
        folder.mkdir(parents=True, exist_ok=True)
        body = image.file.read()
        overwrite = str(form.get("overwrite", "")) in ("true", "1")
        number = 1
        while not overwrite and path.exists() and path.read_bytes() != body:
            path = folder / f"{Path(image.filename).stem} ({number}){Path(image.filename).suffix}"
            number += 1
        path.write_bytes(body)
        return web.json_response({"name": path.name, "subfolder": subfolder, "type": kind})


def embedded_prompt(png: bytes) -> Json:
    """The prompt that a picture carries."""
    return json.loads(read_text_chunks(png).get("prompt", "null"))


def _reencoded(path: Path, fmt: str, quality: int) -> bytes:
    from PIL import Image

    out = BytesIO()
    Image.open(path).convert("RGB").save(out, fmt.upper(), quality=quality)
    return out.getvalue()
