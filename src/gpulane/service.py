"""The composition root: builds everything from the settings, starts it in order, says `ready`, and stops it
in order.

Nothing else knows all the parts. A wrong setting, a busy port or a folder that cannot be used ends here as a
ConfigError, which the command line prints as one line.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import secrets
import signal
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec
import structlog
from aiohttp import web
from platformdirs import user_data_path

from gpulane.config import EngineSettings, GpuSettings, Settings
from gpulane.config.parse import is_loopback, listen_address
from gpulane.config.unloading import Unload, parse_unload
from gpulane.core.model import ClaimId, Engine, EngineUrl, Gpu, GpuId, HandoffMode, JobId, NodeId, Service
from gpulane.core.policy import Policy
from gpulane.dispatcher.cardlock import CardLock
from gpulane.dispatcher.gateway import Gateway, GatewayParts
from gpulane.dispatcher.locks import GpuLocks
from gpulane.engine.a1111 import A1111Client
from gpulane.engine.a1111.pace import Pace
from gpulane.engine.base import ServiceClient
from gpulane.engine.comfyui import ComfyUIClient, Timings
from gpulane.engine.detect import detect
from gpulane.engine.http import HttpServiceClient
from gpulane.engine.lock import Grants, LockClient, lock_url
from gpulane.engine.telemetry import Telemetry
from gpulane.errors import ConfigError, StoreError
from gpulane.store.base import Store
from gpulane.store.memory import MemoryStore
from gpulane.store.node import NodeStore
from gpulane.store.sqlite import SqliteStore
from gpulane.web.a1111 import A1111Front
from gpulane.web.app import build_app, make_runner
from gpulane.web.comfyui import ComfyUIFront
from gpulane.web.http_service import HttpFront
from gpulane.web.ports import Front, WebContext
from gpulane.wire.client import EngineClient

GIB: Final = 1024**3
SWITCH_SECONDS: Final = 0.001
"""How long one thread may keep the interpreter while another waits: the store's thread is on every job's way,
and Python's 5 ms would be the largest part of the gap between two jobs."""
ENGINE_CONNECTIONS_MAX: Final = 512
"""A slow download holds a connection while it streams; slow readers must not keep others from the engine."""
BACKLOG: Final = 1024
SHUTDOWN_SECONDS: Final = 5.0
"""How long answers may take to leave after everything has ended."""

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A service that takes requests."""

    gateway: Gateway
    addresses: dict[str, str]
    """Root URL by listener: `main`, `comfyui`, `a1111`, `http NAME`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Listener:
    """An address to listen on."""

    name: str
    address: str
    root: Service | str | None
    """The service, or the http engine, whose root it is; None: everything."""
    sockets: tuple[socket.socket, ...] = ()


async def serve(settings: Settings, *, announce: Callable[[str], None]) -> None:
    """Run until SIGINT or SIGTERM; the first drains, the second ends at once. Raises ConfigError."""
    sys.setswitchinterval(SWITCH_SECONDS)
    stop, stop_now = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def asked() -> None:
        (stop_now if stop.is_set() else stop).set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked)
    async with running(settings) as service:
        announce(f"gpulane ready {service.addresses['main']}")
        await stop.wait()
        _log.info(
            "draining",
            hint="once more to stop at once; running ComfyUI jobs are found again at the next start",
        )
        await _first(service.gateway.quiet_end(), stop_now.wait())


@contextlib.asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Running]:
    """Start everything; inside the block requests are served. Raises ConfigError when it cannot start."""
    settings = _with_names(settings)
    data_folder = _data_folder(settings)
    async with contextlib.AsyncExitStack() as stack:
        listeners = [_reserved(listener, stack) for listener in _listeners(settings)]
        store, node_store = _stores(settings, data_folder)
        try:
            await store.open()
            stack.push_async_callback(store.close)
            await node_store.open()
            stack.push_async_callback(node_store.close)
            node, boot = node_store.boot()
        except StoreError as error:
            raise ConfigError(f"data folder {data_folder}: {error.message}", hint=error.hint) from error
        gpus = await _gpus(settings, node, node_store)
        lock_folder = Path(settings.lock_dir) if settings.lock_dir else data_folder / "locks"
        locks = GpuLocks(lock_folder)
        stack.callback(locks.release)
        for gpu in gpus:
            locks.own(gpu.name)
        card_locks = {gpu.id: _card_lock(gpu, lock_folder, settings, stack) for gpu in gpus}
        grants = Grants()
        telemetry = Telemetry()
        await telemetry.open()
        stack.push_async_callback(telemetry.close)
        wires = {
            engine.url: EngineClient(engine.url, connections_max=ENGINE_CONNECTIONS_MAX)
            for gpu in gpus
            for engine in gpu.engines
            if engine.service is not Service.LOCK
        }
        for wire in wires.values():
            stack.push_async_callback(wire.close)
        clients = {
            engine.url: _client(engine, settings)
            for gpu in gpus
            for engine in gpu.engines
            if engine.service is not Service.LOCK
        }
        clients |= {lock_url(gpu.id): LockClient(gpu, card_locks[gpu.id], grants) for gpu in gpus}
        gateway = Gateway(
            GatewayParts(
                settings=settings,
                policy=_policy(settings),
                store=store,
                node_store=node_store,
                node=node,
                boot=boot,
                gpus=gpus,
                clients=clients,
                wires=wires,
                data_folder=data_folder,
                clock=time.monotonic,
                wall=time.time,
                new_claim=lambda: ClaimId(secrets.token_hex(8)),
                client_for=lambda url, service: _client(Engine(url=url, service=service), settings),
                telemetry=telemetry,
                card_locks=card_locks,
            )
        )
        try:
            await stack.enter_async_context(gateway.running())
        except StoreError as error:
            raise ConfigError(f"data folder {data_folder}: {error.message}", hint=error.hint) from error
        addresses = await _listen(settings, listeners, gateway, grants, node_store, data_folder, stack)
        yield Running(gateway=gateway, addresses=addresses)


def _with_names(settings: Settings) -> Settings:
    """Give every http engine the NAME of its /svc/NAME/: `gpu0-11434` unless the settings say another."""
    gpus = {
        name: msgspec.structs.replace(gpu, engines=tuple(_with_name(name, engine) for engine in gpu.engines))
        for name, gpu in settings.gpus.items()
    }
    return msgspec.structs.replace(settings, gpus=gpus)


def _with_name(gpu: str, engine: str | int | EngineSettings) -> EngineSettings:
    assert isinstance(engine, EngineSettings), "settings are normalized"
    if engine.name or engine.service != Service.HTTP.value:
        return engine
    parts = urlsplit(engine.url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return msgspec.structs.replace(engine, name=f"{gpu}-{port}")


async def _first(*waits: Coroutine[object, object, object]) -> None:
    """Wait for the first of these; the others are cancelled."""
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def _data_folder(settings: Settings) -> Path:
    folder = Path(settings.data).expanduser() if settings.data else user_data_path("gpulane", appauthor=False)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        why = error.strerror or str(error)
        raise ConfigError(
            f"data folder {folder} cannot be used: {why}; name another one with --data"
        ) from error
    return folder


def _stores(settings: Settings, folder: Path) -> tuple[Store, NodeStore]:
    if settings.store.startswith(("redis://", "rediss://")):
        raise ConfigError("store: a queue shared by many machines comes with a later version; write sqlite")
    if settings.store == "memory":
        return MemoryStore(clock=time.time), NodeStore(folder, clock=time.time)
    return SqliteStore(folder, clock=time.time), NodeStore(folder, clock=time.time)


def _policy(settings: Settings) -> Policy:
    s, r = settings.scheduling, settings.retry
    return replace(
        Policy(),
        slack_loads=s.slack_loads,
        slack_cap_seconds_per_gpu=s.slack_cap_seconds_per_gpu,
        load_seconds_unknown=s.load_seconds_unknown,
        service_seconds_unknown=s.service_seconds_unknown,
        retry_seconds_base=r.rest_seconds,
        retry_seconds_max=r.rest_seconds_max,
        handoff_margin_bytes=int(settings.handoff.margin_gib * GIB),
        skip_leaking=settings.handoff.when_leaking == "skip",
    )


async def _gpus(settings: Settings, node: NodeId, node_store: NodeStore) -> tuple[Gpu, ...]:
    """Make the gpus of the settings, asking engines whose service is not given what they are."""
    host = settings.name or socket.gethostname().split(".")[0]
    urls = [
        engine.url
        for gpu in settings.gpus.values()
        for engine in gpu.engines
        if isinstance(engine, EngineSettings) and engine.service is None
    ]
    known = {url: value.decode() for url, value in (await node_store.learned("engine_service")).items()}
    services = dict(
        zip(urls, await asyncio.gather(*(_service_of(url, known.get(url)) for url in urls)), strict=True)
    )
    for url, service in services.items():
        node_store.learn_put("engine_service", url, service.value.encode())
    return tuple(_gpu(host, name, gpu, node, services) for name, gpu in settings.gpus.items())


async def _service_of(url: str, known: str | None) -> Service:
    found = await detect(EngineUrl(url))
    if found.service is not None:
        return found.service
    if found.answers:
        raise ConfigError(
            f"{url} answers but is neither ComfyUI nor A1111 ({found.why}); if its jobs are HTTP requests, "
            f"write http:{url}"
        )
    if known is not None:
        return Service(known)
    raise ConfigError(
        f"{url} does not answer ({found.why}), so what it is cannot be asked: start it first, or say it, for "
        f"instance comfyui:{url} or a1111:{url}"
    )


def _gpu(host: str, name: str, gpu: GpuSettings, node: NodeId, services: dict[str, Service]) -> Gpu:
    engines: list[Engine] = []
    for engine in gpu.engines:
        assert isinstance(engine, EngineSettings), "settings are normalized"
        service = Service(engine.service) if engine.service else services[engine.url]
        mode = HandoffMode(engine.handoff)
        engines.append(Engine(url=EngineUrl(engine.url), service=service, name=engine.name, handoff=mode))
    return Gpu(
        id=GpuId(f"{host}/{name}"),
        node=node,
        name=name,
        uuid=gpu.uuid or _digest_uuid(node, [engine.url for engine in engines]),
        engines=(*engines, Engine(url=lock_url(GpuId(f"{host}/{name}")), service=Service.LOCK)),
        vram_bytes=None if gpu.vram_gib is None else int(gpu.vram_gib * GIB),
        labels=frozenset(gpu.labels),
        speed=gpu.speed,
        warm_together=frozenset(_named(names, name, engines) for names in gpu.warm_together),
    )


def _named(names: tuple[str, ...], gpu: str, engines: list[Engine]) -> frozenset[EngineUrl]:
    """Find the engines that a set of `warm_together` means: by service, port or URL. Raises ConfigError."""
    found: set[EngineUrl] = set()
    for name in names:
        meant = {e.url for e in engines if name in {e.service.value, e.url, e.url.rpartition(":")[2], e.name}}
        if not meant:
            known = ", ".join(e.url for e in engines)
            raise ConfigError(
                f"gpus.{gpu}: warm_together: {name!r} is no engine of this GPU; there are: {known}"
            )
        found |= meant
    return frozenset(found)


def _card_lock(gpu: Gpu, folder: Path, settings: Settings, stack: contextlib.AsyncExitStack) -> CardLock:
    """Open a gpu's lock file. Raises ConfigError where jobs are to hold it and it cannot be used."""
    lock = CardLock(folder / f"{gpu.name}.lock", takes_part=settings.lock_dir is not None)
    stack.callback(lock.close)
    why = lock.unusable()
    if why is not None:
        raise ConfigError(f"{why}; see lock_dir")
    return lock


def _digest_uuid(node: NodeId, urls: list[EngineUrl]) -> str:
    """Identify a card without a driver by its engines, and by the node where their addresses are loopback
    (fleet.md 1).
    """
    hosts = [url.split("//", 1)[1].split("/")[0].rpartition(":")[0].strip("[]") for url in urls]
    local = node if any(is_loopback(host) for host in hosts) else ""
    return "engines-" + hashlib.sha256("\n".join([local, *sorted(urls)]).encode()).hexdigest()[:32]


def _client(engine: Engine, settings: Settings) -> ServiceClient:
    acknowledge_seconds = settings.handoff.acknowledge_seconds
    match engine.service:
        case Service.COMFYUI:
            timings = Timings(
                request_seconds=settings.probe.timeout_seconds,
                quiet_seconds=settings.probe.quiet_seconds,
                zombie_seconds=settings.probe.canary_after_seconds,
                acknowledge_seconds=acknowledge_seconds,
            )
            return ComfyUIClient(engine.url, timings=timings)
        case Service.A1111:
            pace = Pace(quiet_seconds=settings.probe.quiet_seconds)
            return A1111Client(
                engine.url,
                timeout_seconds=settings.probe.timeout_seconds,
                acknowledge_seconds=acknowledge_seconds,
                pace=pace,
            )
        case Service.HTTP:
            said = _said_of(engine.url, settings)
            return HttpServiceClient(
                engine.url,
                name=engine.name,
                probe_path=said.probe_path,
                unload=_unload_of(said),
                timeout_seconds=settings.probe.timeout_seconds,
                acknowledge_seconds=acknowledge_seconds,
            )
        case Service.LOCK:
            raise AssertionError(f"{engine.url} is made with its gpu's lock file")


def _unload_of(engine: EngineSettings) -> Unload | None:
    if engine.unload is None:
        return None
    return parse_unload(engine.unload, env=engine.env, folder=engine.folder)


def _said_of(url: EngineUrl, settings: Settings) -> EngineSettings:
    engines = [engine for gpu in settings.gpus.values() for engine in gpu.engines]
    said = (e for e in engines if isinstance(e, EngineSettings) and e.url == url)
    # One that was taken out of the settings while a job ran there is asked whether it is idle, no more.
    return next(said, EngineSettings(url=url))


async def _listen(
    settings: Settings,
    listeners: list[_Listener],
    gateway: Gateway,
    grants: Grants,
    node_store: NodeStore,
    folder: Path,
    stack: contextlib.AsyncExitStack,
) -> dict[str, str]:
    context = WebContext(
        settings=settings,
        jobs=gateway,
        engines=gateway,
        processes=gateway.supervision,
        values=node_store,
        grants=grants,
        data_folder=folder,
        new_job_id=lambda: JobId(str(uuid.uuid4())),
    )
    fronts: dict[Service, Front] = {
        Service.COMFYUI: ComfyUIFront(context),
        Service.A1111: A1111Front(context),
        Service.HTTP: HttpFront(context),
    }
    for front in fronts.values():
        stack.push_async_callback(front.close)
    addresses: dict[str, str] = {}
    for listener in listeners:
        app = build_app(context, fronts, root=listener.root)
        addresses[listener.name] = await _serve_at(listener, app, stack)
    return addresses


def _listeners(settings: Settings) -> list[_Listener]:
    named: list[tuple[str, str | None, Service | str | None]] = [
        ("main", settings.listen, None),
        ("comfyui", settings.listen_comfyui, Service.COMFYUI),
        ("a1111", settings.listen_a1111, Service.A1111),
        *(
            (f"http {engine.name}", engine.listen, engine.name)
            for gpu in settings.gpus.values()
            for engine in gpu.engines
            if isinstance(engine, EngineSettings)
        ),
    ]
    return [_Listener(name=name, address=text, root=root) for name, text, root in named if text is not None]


def _reserved(listener: _Listener, stack: contextlib.AsyncExitStack) -> _Listener:
    """Take a listener's port before anything is started. Raises ConfigError."""
    host, port = listen_address(listener.address)
    sockets: list[socket.socket] = []
    refused: OSError | None = None
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        places, refused = [], error
    for family, kind, proto, _, place in places:
        found = socket.socket(family, kind, proto)
        stack.callback(found.close)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            found.bind((place[0], port, *place[2:]))
            # Only this makes it ours: several may bind one port. Who connects now is heard later.
            found.listen(BACKLOG)
        except OSError as error:
            # `localhost` is two addresses, of which a machine may have one.
            refused = error if error.errno == errno.EADDRINUSE else refused or error
            continue
        sockets.append(found)
        port = port or found.getsockname()[1]
    if not sockets or (refused is not None and refused.errno == errno.EADDRINUSE):
        raise _not_usable(listener, refused)
    return replace(listener, sockets=tuple(sockets))


def _not_usable(listener: _Listener, error: OSError | None) -> ConfigError:
    setting = "listen" if listener.name == "main" else f"listen of {listener.name}"
    why = error.strerror if error is not None and error.strerror else "no such address"
    return ConfigError(
        f"{setting}: {listener.address} cannot be used: {why}; choose another one with --listen"
    )


async def _serve_at(listener: _Listener, app: web.Application, stack: contextlib.AsyncExitStack) -> str:
    runner = make_runner(app, shutdown_seconds=SHUTDOWN_SECONDS)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    for reserved in listener.sockets:
        await web.SockSite(runner, reserved, backlog=BACKLOG).start()
    host, port = listener.sockets[0].getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
