"""`gpulane sim-engine`: one simulated engine on a simulated card, for trying things without a GPU."""

from __future__ import annotations

from pathlib import Path

import click

from gpulane.errors import ConfigError

KINDS = ("comfyui", "a1111", "forge", "http")


@click.command("sim-engine")
@click.argument("kind", type=click.Choice(KINDS))
@click.option("--port", type=click.IntRange(0, 65_535), default=0, help="0: the system chooses.")
@click.option(
    "--gpu",
    "gpu_file",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="The simulated card: engines that name the same FILE share it. Its log is written there.",
    metavar="FILE",
)
@click.option("--vram-gib", type=click.FloatRange(min=0, min_open=True), default=24.0, show_default=True)
@click.option(
    "--speed", type=click.FloatRange(min=0, min_open=True), default=1.0, help="2 computes in half the time."
)
@click.option(
    "--time-scale", type=click.FloatRange(min=0), default=1.0, help="Real seconds per simulated second."
)
@click.option(
    "--seconds-per-step",
    type=click.FloatRange(min=0),
    default=0.08,
    show_default=True,
    help="For one sampling step of one megapixel.",
)
@click.option(
    "--jitter", type=click.FloatRange(0, 1), default=0.0, help="0.1: each time up to 10 % longer or shorter."
)
@click.option("--seed", type=int, default=0, help="Of the jitter.")
@click.option("--checkpoint", "checkpoints", multiple=True, help="A file to offer; may be repeated.")
@click.option("--version", default=None, help="Of ComfyUI: 0.27.0 or 0.3.64.")
@click.option("--nowebui", is_flag=True, help="A1111: its API alone.")
@click.option("--previews", is_flag=True, help="ComfyUI: send previews.")
@click.option("--plain-pictures", is_flag=True, help="Pictures without text: quicker.")
def sim_engine(
    *,
    kind: str,
    port: int,
    gpu_file: Path,
    vram_gib: float,
    speed: float,
    time_scale: float,
    seconds_per_step: float,
    jitter: float,
    seed: int,
    checkpoints: tuple[str, ...],
    version: str | None,
    nowebui: bool,
    previews: bool,
    plain_pictures: bool,
) -> None:
    """Run one simulated engine until Ctrl-C. It says `sim-engine ready URL` when it takes requests.

    A simulated card never stops a second job: it writes down what ran when, and
    `python -m gpulane.testing.judge FILE` tells from that whether two jobs ever overlapped.
    """
    from gpulane.testing.process import MODERN_VERSION, run_engine

    try:
        run_engine(
            kind,
            port=port,
            gpu_file=gpu_file,
            vram_gib=vram_gib,
            speed=speed,
            time_scale=time_scale,
            seconds_per_step=seconds_per_step,
            jitter=jitter,
            seed=seed,
            checkpoints=checkpoints,
            version=version or MODERN_VERSION,
            nowebui=nowebui,
            previews=previews,
            plain_pictures=plain_pictures,
        )
    except OSError as error:
        # asyncio's own text repeats the address and adds what Python called.
        why = error.strerror or str(error)
        raise ConfigError(f"simulated {kind}: {why}") from error
    except ValueError as error:
        raise ConfigError(f"simulated {kind}: {error}") from error
