"""One simulated engine as a process of its own: `python -m gpulane.testing.process comfyui --port P --gpu
FILE`.

Engines that name the same file share a simulated card. The line `sim-engine ready URL` says when it takes
requests; SIGTERM and Ctrl-C end it in order.
"""

import argparse
import asyncio
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from gpulane.testing.a1111 import SimA1111
from gpulane.testing.card import Card, CardOptions
from gpulane.testing.comfyui import MODERN_VERSION, SimComfyUI
from gpulane.testing.http_engine import SimHttpEngine

KINDS: Final = ("comfyui", "a1111", "forge", "http", "ollama", "llama-swap")

SimEngine = SimComfyUI | SimA1111 | SimHttpEngine


def run_engine(
    kind: str,
    *,
    port: int,
    gpu_file: Path,
    vram_gib: float = 24.0,
    speed: float = 1.0,
    time_scale: float = 1.0,
    seconds_per_step: float = 0.08,
    load_seconds: dict[str, float] | None = None,
    jitter: float = 0.0,
    seed: int = 0,
    checkpoints: Sequence[str] = (),
    folder: Path | None = None,
    version: str = MODERN_VERSION,
    nowebui: bool = False,
    previews: bool = False,
    plain_pictures: bool = False,
) -> None:
    """Serve one engine until SIGTERM or SIGINT; ValueError for an unknown kind, OSError for a busy port."""
    options = CardOptions(
        vram_gib=vram_gib,
        speed=speed,
        time_scale=time_scale,
        seconds_per_step=seconds_per_step,
        load_seconds=load_seconds or {},
        jitter=jitter,
        seed=seed,
    )
    with Card(gpu_file, options) as card:
        engine = make_engine(
            kind,
            card=card,
            port=port,
            checkpoints=checkpoints,
            folder=folder,
            version=version,
            nowebui=nowebui,
            previews=previews,
            plain_pictures=plain_pictures,
            exits_on_crash=True,
        )
        asyncio.run(serve(engine, announce=_announce))


def make_engine(
    kind: str,
    *,
    card: Card,
    port: int = 0,
    checkpoints: Sequence[str] = (),
    folder: Path | None = None,
    version: str = MODERN_VERSION,
    nowebui: bool = False,
    previews: bool = False,
    plain_pictures: bool = False,
    exits_on_crash: bool = False,
) -> SimEngine:
    """An engine of this kind, not started."""
    match kind:
        case "comfyui":
            engine = SimComfyUI(
                card=card,
                port=port,
                version=version,
                folder=folder,
                previews=previews,
                plain_pictures=plain_pictures,
                exits_on_crash=exits_on_crash,
                checkpoints=checkpoints or None,
            )
        case "a1111" | "forge":
            engine = SimA1111(
                card=card,
                port=port,
                forge=kind == "forge",
                nowebui=nowebui,
                plain_pictures=plain_pictures,
                exits_on_crash=exits_on_crash,
                checkpoints=checkpoints or None,
            )
        case "http":
            engine = SimHttpEngine(card=card, port=port, exits_on_crash=exits_on_crash)
        case "ollama" | "llama-swap":
            engine = SimHttpEngine(card=card, port=port, exits_on_crash=exits_on_crash, flavor=kind)
        case _:
            raise ValueError(f"no such kind of engine: {kind!r}; there are {', '.join(KINDS)}")
    return engine


async def serve(engine: SimEngine, *, announce: Callable[[str], None]) -> None:
    """Run an engine until a signal comes; `announce` is called with its URL when it takes requests."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with engine:
        announce(engine.url)
        await stop.wait()


def _announce(url: str) -> None:
    print(f"sim-engine ready {url}", flush=True)


def run(argv: Sequence[str] | None = None) -> int:
    """The command line; 2 when the port is busy or an argument is wrong."""
    parser = argparse.ArgumentParser(prog="sim-engine", description="A simulated engine on a simulated card.")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--gpu", type=Path, required=True, help="the card: engines naming one file share it")
    parser.add_argument("--vram-gib", type=float, default=24.0)
    parser.add_argument("--speed", type=float, default=1.0)
    parser.add_argument("--time-scale", type=float, default=1.0)
    parser.add_argument("--seconds-per-step", type=float, default=0.08)
    parser.add_argument("--jitter", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", action="append", default=[], help="a file to offer; may be repeated")
    parser.add_argument("--version", default=MODERN_VERSION, help="of ComfyUI")
    parser.add_argument("--nowebui", action="store_true")
    parser.add_argument("--previews", action="store_true")
    parser.add_argument("--plain-pictures", action="store_true")
    arguments = parser.parse_args(argv)
    try:
        run_engine(
            arguments.kind,
            port=arguments.port,
            gpu_file=arguments.gpu,
            vram_gib=arguments.vram_gib,
            speed=arguments.speed,
            time_scale=arguments.time_scale,
            seconds_per_step=arguments.seconds_per_step,
            jitter=arguments.jitter,
            seed=arguments.seed,
            checkpoints=arguments.checkpoint,
            version=arguments.version,
            nowebui=arguments.nowebui,
            previews=arguments.previews,
            plain_pictures=arguments.plain_pictures,
        )
    except (OSError, ValueError) as error:
        print(f"sim-engine: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run())
