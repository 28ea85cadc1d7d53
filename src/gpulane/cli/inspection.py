"""What `check` does: asks all engines at one time, looks at the data folder and tries the listeners' ports.

Changes nothing, so that it may run beside a gateway that serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sqlite3
import tempfile
import time
from pathlib import Path
from typing import Final

from platformdirs import user_data_path

from gpulane.cli.findings import Asked, Finding, Grade, card_findings, engine_finding, settings_findings
from gpulane.config import EngineSettings, Settings
from gpulane.config.parse import listen_address
from gpulane.core.model import EngineUrl, Service
from gpulane.engine.a1111 import A1111Client
from gpulane.engine.base import Description, ServiceClient
from gpulane.engine.comfyui import ComfyUIClient
from gpulane.engine.control import ControlCalls
from gpulane.engine.detect import detect
from gpulane.engine.http import HttpServiceClient
from gpulane.engine.telemetry import CardReading, Telemetry
from gpulane.errors import EngineError, StoreError
from gpulane.store.sqlite.database import migrations

DESCRIBE_SECONDS: Final = 20.0
"""A busy ComfyUI with many custom nodes takes seconds for /object_info."""
DATABASES: Final = {"queue.db": "gpulane.store.sqlite.queue", "node.db": "gpulane.store.sqlite.node"}


async def inspect(
    settings: Settings, *, source: str, telemetry: Telemetry | None = None
) -> tuple[Finding, ...]:
    """Look at everything; engines at the end, in the settings' order. `telemetry`: where cards are seen."""
    findings = settings_findings(settings, source=source)
    findings.append(_data_folder(settings))
    findings += [await _listener(name, address) for name, address in _addresses(settings)]
    findings += card_findings(settings, await _cards(telemetry or Telemetry()))
    engines = [
        _ask(name, engine)
        for name, gpu in settings.gpus.items()
        for engine in gpu.engines
        if isinstance(engine, EngineSettings)
    ]
    findings += [engine_finding(asked) for asked in await asyncio.gather(*engines)]
    return tuple(findings)


async def _cards(telemetry: Telemetry) -> tuple[CardReading, ...]:
    await telemetry.open()
    try:
        return await telemetry.cards()
    finally:
        await telemetry.close()


async def _ask(gpu: str, engine: EngineSettings) -> Asked:
    began = time.monotonic()
    found = await detect(EngineUrl(engine.url))
    latency_ms = (time.monotonic() - began) * 1000
    service = found.service or (Service.HTTP if engine.service == "http" else None)
    about: Description | EngineError | None = None
    if found.answers and service is not None:
        about = await _describe(service, EngineUrl(engine.url))
    return Asked(gpu=gpu, engine=engine, found=found, about=about, latency_ms=latency_ms)


async def _describe(service: Service, url: EngineUrl) -> Description | EngineError:
    client = _client(service, url)
    try:
        async with asyncio.timeout(DESCRIBE_SECONDS):
            return await client.describe()
    except EngineError as error:
        return error
    except TimeoutError:
        return EngineError(f"it did not tell what it offers within {DESCRIBE_SECONDS:g} s")
    finally:
        await client.close()


def _client(service: Service, url: EngineUrl) -> ServiceClient:
    match service:
        case Service.COMFYUI:
            return ComfyUIClient(url)
        case Service.A1111:
            return A1111Client(url)
        case Service.HTTP:
            return HttpServiceClient(url)
        case Service.LOCK:
            raise AssertionError("a lock is no engine of the settings")


def _addresses(settings: Settings) -> list[tuple[str, str]]:
    named = [
        ("listen", settings.listen),
        ("listen_comfyui", settings.listen_comfyui),
        ("listen_a1111", settings.listen_a1111),
        *(
            (f"listen of {engine.name or engine.url}", engine.listen)
            for gpu in settings.gpus.values()
            for engine in gpu.engines
            if isinstance(engine, EngineSettings)
        ),
    ]
    return [(name, address) for name, address in named if address is not None]


async def _listener(setting: str, address: str) -> Finding:
    host, port = listen_address(address)
    why = _why_not_bound(host, port)
    if why is None:
        return Finding(grade=Grade.OK, subject=setting, text=f"{address} is free")
    if await _is_gateway(host, port):
        text = f"{address}: a gpulane serves there already"
        return Finding(grade=Grade.NOTE, subject=setting, text=text)
    return Finding(
        grade=Grade.WRONG,
        subject=setting,
        text=f"{address} cannot be used: {why}",
        hints=("end what listens there, or choose another address (--listen)",),
    )


def _why_not_bound(host: str, port: int) -> str | None:
    try:
        family, kind, proto, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, proto) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
            listener.listen(1)
    except OSError as error:
        return error.strerror or str(error)
    return None


async def _is_gateway(host: str, port: int) -> bool:
    shown = f"[{host}]" if ":" in host else {"0.0.0.0": "127.0.0.1"}.get(host, host)
    calls = ControlCalls(f"http://{shown}:{port}", timeout_seconds=2.0)
    try:
        status, _ = await calls.fetch("GET", "/gpulane/healthz")
    except EngineError:
        return False
    finally:
        await calls.close()
    return status == 200


def _data_folder(settings: Settings) -> Finding:
    folder = Path(settings.data).expanduser() if settings.data else user_data_path("gpulane", appauthor=False)
    present = next(path for path in (folder, *folder.parents) if path.exists())
    why = _why_not_written(present)
    if why is not None:
        return Finding(
            grade=Grade.WRONG,
            subject="data folder",
            text=f"{folder} cannot be used: {present}: {why}",
            hints=("name another one with --data",),
        )
    for name, package in DATABASES.items():
        newer = _newer(folder / name, package)
        if newer:
            return Finding(grade=Grade.WRONG, subject="data folder", text=newer)
    text = f"{folder}" if present == folder else f"{folder} (will be made)"
    return Finding(grade=Grade.OK, subject="data folder", text=text)


def _why_not_written(folder: Path) -> str | None:
    try:
        # It has no name, or is gone at once. Asking for rights alone would tell root too much.
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


def _newer(path: Path, package: str) -> str | None:
    """Say why a database cannot be read by this version."""
    if not path.exists():
        return None
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            version: int = database.execute("PRAGMA user_version").fetchone()[0]
        known = len(migrations(package))
    except (sqlite3.Error, StoreError) as error:
        return f"{path} cannot be read: {error}"
    if version > known:
        return f"{path} is of a newer gpulane (format {version}, this one knows {known}): update gpulane"
    return None
