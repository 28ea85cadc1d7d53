"""Every setting with its default, its unit in its name and its reason below it. Only `gpus` is required.

The defaults suit one person with one or two cards. This module holds data only; `parse` checks what types
cannot say.
"""

from __future__ import annotations

from typing import Literal

import msgspec

ServiceName = Literal["comfyui", "a1111", "http"]
RoleName = Literal["viewer", "user", "operator", "admin"]


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


HandoffMode = Literal["auto", "always", "never"]


class EngineSettings(_Section, frozen=True):
    """One engine on a gpu."""

    url: str
    """Base URL, for instance http://127.0.0.1:8188. A bare port or HOST:PORT is accepted too."""
    service: ServiceName | None = None
    """comfyui, a1111 (Forge and SD.Next too) or http. Found by asking the engine when not given."""
    name: str = ""
    """For http engines: the NAME of /svc/NAME/. Default: the gpu's name and the port."""
    jobs: tuple[str, ...] = ()
    """For http engines: which requests need the gpu, as `METHOD /path` with * and **. Default: the usual LLM
    paths."""
    probe_path: str = "/"
    """For http engines: what is asked to see whether it lives; any answer below 500 will do."""
    listen: str | None = None
    """For http engines: an address of its own whose root is this engine."""
    handoff: HandoffMode = "auto"
    """Whether this engine unloads its models before another engine of the card runs: `auto` when both are not
    known to fit, `always`, or `never`."""
    unload: str | None = None
    """For http engines: how to have VRAM given back: `ollama`, `llama-swap`, a request `METHOD /path [JSON
    body]`, or `run COMMAND`. Default: found by asking; unknown engines cannot be unloaded."""
    command: str | None = None
    """Start the engine with this command, restart it when it dies, and stop it with gpulane. Default: it is
    started by somebody else."""
    env: dict[str, str] = {}
    """Variables added to the command's environment."""
    folder: str | None = None
    """Working folder of the command."""
    ready_seconds: float = 300.0
    """How long the command may take until the engine answers its first probe."""
    restart: str | None = None
    """Run this command when the engine hangs, leaks or is a zombie (for engines that gpulane did not start),
    for instance `systemctl --user restart comfyui`."""
    gpus: tuple[str, ...] = ()
    """Names of all gpus that this engine computes on, where they are more than the one that it stands under.
    Refused until dispatching for more than one card is there."""
    stop_to_unload: bool = False
    """Stop this engine's process to free the card where unloading is not enough (needs `command`)."""


class GpuSettings(_Section, frozen=True):
    """One gpu and the engines that share it."""

    engines: tuple[str | int | EngineSettings, ...]
    vram_gib: float | None = None
    """Memory of the card, where no driver tells. Unknown is not zero."""
    labels: tuple[str, ...] = ()
    """Words that jobs can ask for."""
    uuid: str | None = None
    """The driver's UUID of the card, as `gpulane check` prints it: with it the driver measures the card. It
    is never guessed from the order of cards. Default: a digest of the engines' URLs, and
    no driver is asked."""
    speed: float = 1.0
    """Relative speed: of two idle warm gpus the faster one is taken."""
    warm_together: tuple[tuple[str, ...], ...] = ()
    """Sets of this card's engines (by port, URL or service) that may keep their models at the same time: no
    unload between them."""


class KeySettings(_Section, frozen=True):
    """One API key, by its hash: `gpulane key new` prints a key and this entry."""

    account: str
    sha256: str
    """SHA-256 of the key, 64 hex digits. The key itself is stored nowhere."""
    role: RoleName = "user"
    weight: float = 1.0
    """The account's share of the gpus, relative to others."""


class LimitSettings(_Section, frozen=True):
    """What is refused because it is too much."""

    body_mib: float = 128.0
    """Largest request body; img2img with several 4K pictures in base64 is about 60 MiB."""
    workflow_mib: float = 16.0
    """Largest ComfyUI prompt body (workflows with embedded previews reach a few MiB)."""
    queued_max: int = 100_000
    """Jobs that may wait in all; beyond: 429."""
    queued_per_account_max: int = 10_000
    """Jobs that one account may have waiting; beyond: 429."""
    held_max: int = 10_000
    """Requests that may wait for their answer at one time; beyond: 429."""
    answer_memory_mib: float = 8.0
    """An answer larger than this is kept in a file until its client has read it."""
    answer_mib: float = 1024.0
    """Largest answer of an engine that is kept at all."""
    lock_seconds_max: float = 86_400.0
    """The longest that another program may ask to hold a gpu (`gpulane lock`)."""


class RetentionSettings(_Section, frozen=True):
    """How long what has ended is kept."""

    ended_days: float = 7.0
    ended_jobs_max: int = 100_000
    result_gib: float = 10.0
    """Results, pictures and bodies together; the oldest ended jobs are forgotten first."""


class HoldSettings(_Section, frozen=True):
    """What happens to calls that wait for their answer."""

    on_disconnect: Literal["finish", "interrupt"] = "finish"
    """When the client of a *running* call leaves: let it end (its result is kept for a while), or interrupt
    it."""
    rejoin_seconds: float = 60.0
    """A waiting call whose client left keeps its place so long for the identical call of the same account."""
    orphan_result_seconds: float = 900.0
    """An answer whose client left is kept so long for the identical call, or for GET by the job's id."""


class ProbeSettings(_Section, frozen=True):
    """How engines are asked whether they live. A busy gpu is slow, not dead: patience counts in seconds."""

    interval_seconds: float = 5.0
    timeout_seconds: float = 10.0
    """A ComfyUI that imports a model or reads a long history has been seen to answer after 1 s, under load
    after more."""
    misses_max: int = 3
    """Probes in a row that may fail before an engine counts as lost (a refused connection counts as well)."""
    describe_interval_seconds: float = 300.0
    """How often lists of models and nodes are fetched again."""
    canary_after_seconds: float = 20.0
    """A ComfyUI that took a prompt but started nothing for so long is tested with a tiny prompt of our
    own."""
    quiet_seconds: float = 2.0
    """After a restart: two answered probes this far apart before an engine is asked about, or given, a
    job."""


class HandoffSettings(_Section, frozen=True):
    """Giving a card from one engine to another: commanded, then measured."""

    unload_seconds: float = 30.0
    """How long memory may take to come free after an unload was acknowledged."""
    acknowledge_seconds: float = 15.0
    """How long an engine may take to acknowledge an unload."""
    margin_gib: float = 0.5
    """Free memory beyond a job's known need before it starts."""
    when_leaking: Literal["run", "skip", "restart"] = "run"
    """When memory does not come free after a second try: run anyway, leave the gpu alone until it has, or
    restart the leaking engine (its `restart` or `command`)."""
    idle_unload_seconds: float | None = None
    """Unload an engine that has had no job for so long. Default: never."""


class HealthSettings(_Section, frozen=True):
    """When something hangs or keeps failing."""

    hung_factor: float = 6.0
    """A job may take so many times its expected time, at least `hung_seconds_min`, without progress ..."""
    hung_seconds_min: float = 300.0
    """... before it is interrupted; the trace's longest job took 567 s, its 99th percentile 106 s."""
    hung_interrupt_seconds: float = 60.0
    """How long an interrupted hung job may take to stop, before its engine counts as hung and is restarted or
    lost."""
    failures_pause: int = 5
    """So many failed attempts in a row, whatever the jobs, pause a gpu."""
    pause_seconds: float = 30.0
    """The first such pause; doubled each time one trial job fails again."""
    pause_seconds_max: float = 900.0


class RetrySettings(_Section, frozen=True):
    """When an attempt fails."""

    attempts_max: int = 3
    rest_seconds: float = 1.0
    """Rest before the second attempt; doubled for each further one, of which half is drawn at random."""
    rest_seconds_max: float = 60.0


class SchedulingSettings(_Section, frozen=True):
    """Constants of the policy; their reasons are in docs/scheduling."""

    slack_loads: float = 20.0
    slack_cap_seconds_per_gpu: float = 60.0
    load_seconds_unknown: float = 10.0
    service_seconds_unknown: float = 15.0


class LogSettings(_Section, frozen=True):
    """How the program talks about itself."""

    format: Literal["console", "json"] = "console"
    level: Literal["debug", "info", "warning", "error"] = "info"


class Settings(_Section, frozen=True):
    """The whole tree."""

    gpus: dict[str, GpuSettings] = {}
    """The cards, by a name of your choice."""
    listen: str = "127.0.0.1:8800"
    """Address of the one listener. Beyond loopback keys are needed, or `allow_anonymous: true`."""
    listen_comfyui: str | None = None
    """An address of its own whose root is ComfyUI, for clients that cannot use a prefix."""
    listen_a1111: str | None = None
    """The same for A1111."""
    root: Literal["dashboard", "comfyui", "a1111"] | None = None
    """Whose page `/` is. Default: the only service's, else the dashboard."""
    name: str | None = None
    """Name of this machine in gpu ids. Default: the host name."""
    data: str | None = None
    """Folder of the queue, results and learned values. Default: the user's data folder."""
    store: str = "sqlite"
    """`sqlite`, `memory` (nothing survives a restart) or redis://host:6379/0."""
    lock_dir: str | None = None
    """Folder of the gpus' lock files, shared with other programs. Default: inside the data folder."""
    keys: tuple[KeySettings, ...] = ()
    allow_anonymous: bool = False
    """Serve everybody who can reach `listen` without a key."""
    trusted_proxies: tuple[str, ...] = ()
    """Addresses or networks whose X-Forwarded-For is believed."""
    allow_routes: tuple[str, ...] = ()
    """`METHOD /path` patterns of closed or unknown engine routes to pass on all the same."""
    limits: LimitSettings = LimitSettings()
    retention: RetentionSettings = RetentionSettings()
    hold: HoldSettings = HoldSettings()
    probe: ProbeSettings = ProbeSettings()
    retry: RetrySettings = RetrySettings()
    handoff: HandoffSettings = HandoffSettings()
    health: HealthSettings = HealthSettings()
    scheduling: SchedulingSettings = SchedulingSettings()
    log: LogSettings = LogSettings()
