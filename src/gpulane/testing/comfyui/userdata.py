"""What the ComfyUI frontend stores on its server (settings, workflows), and the frontend's own files."""

import time
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final
from uuid import uuid4

from aiohttp import web

from gpulane.testing.card import Json

PLAIN_PAGE: Final = (
    "<!doctype html><html><head><title>ComfyUI</title></head><body><h1>Simulated ComfyUI</h1>"
    "<p>Install comfyui-frontend-package to see the real frontend here.</p></body></html>"
)


class UserData:
    """One user's settings and files, in memory."""

    def __init__(self) -> None:
        self._settings: dict[str, Json] = {}
        self._files: dict[str, tuple[bytes, int]] = {}

    async def post_user(self, request: web.Request) -> web.Response:
        body: Json = await request.json()
        return web.json_response(f"{body['username']}_{uuid4()}")

    async def get_settings(self, _request: web.Request) -> web.Response:
        return web.json_response(self._settings)

    async def post_settings(self, request: web.Request) -> web.Response:
        self._settings.update(await request.json())
        return web.Response()

    async def get_setting(self, request: web.Request) -> web.Response:
        return web.json_response(self._settings.get(request.match_info["id"]))

    async def post_setting(self, request: web.Request) -> web.Response:
        self._settings[request.match_info["id"]] = await request.json()
        return web.Response()

    async def list_files(self, request: web.Request) -> web.Response:
        folder = request.query.get("dir", "")
        if not folder:
            return web.Response(status=400, text="Directory not provided")
        inside = {
            name.removeprefix(folder + "/"): entry
            for name, entry in self._files.items()
            if name.startswith(folder + "/")
        }
        if not inside:
            return web.Response(status=404, text="Directory not found")
        if request.query.get("full_info") != "true":
            return web.json_response(list(inside))
        return web.json_response(
            [
                {"path": name, "size": len(body), "modified": at, "created": at}
                for name, (body, at) in inside.items()
            ]
        )

    async def list_files_v2(self, _request: web.Request) -> web.Response:
        return web.json_response(
            [
                {
                    "name": name.rpartition("/")[2],
                    "path": name,
                    "type": "file",
                    "size": len(body),
                    "modified": at,
                }
                for name, (body, at) in self._files.items()
            ]
        )

    async def get_file(self, request: web.Request) -> web.Response:
        entry = self._files.get(request.match_info["file"])
        if entry is None:
            return web.Response(status=404)
        is_json = request.match_info["file"].endswith(".json")
        kind = "application/json" if is_json else "application/octet-stream"
        return web.Response(body=entry[0], content_type=kind)

    async def post_file(self, request: web.Request) -> web.Response:
        name = request.match_info["file"]
        if request.query.get("overwrite") == "false" and name in self._files:
            return web.Response(status=409, text="File already exists")
        self._files[name] = (await request.read(), time.time_ns() // 1_000_000)
        return web.json_response(name)

    async def delete_file(self, request: web.Request) -> web.Response:
        is_there = self._files.pop(request.match_info["file"], None) is not None
        return web.Response(status=204 if is_there else 404)


@lru_cache(maxsize=1)
def frontend_folder() -> Path | None:
    """Where PyPI's comfyui-frontend-package keeps the page; None when it is not installed."""
    spec = find_spec("comfyui_frontend_package")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "static"
    return folder.resolve() if folder.is_dir() else None


def frontend_file(path: str) -> web.StreamResponse:
    """A file of the frontend, its page for the root, 404 for anything else."""
    folder = frontend_folder()
    if folder is None:
        is_root = path in ("", "index.html")
        return (
            web.Response(text=PLAIN_PAGE, content_type="text/html") if is_root else web.Response(status=404)
        )
    file = (folder / (path or "index.html")).resolve()
    if not file.is_relative_to(folder) or not file.is_file():
        return web.Response(status=404)
    return web.FileResponse(file)
