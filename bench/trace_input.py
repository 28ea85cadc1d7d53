"""Turns rows of the production trace into requests for the clients of `trace_run.py`.

What the trace does not say is chosen so that what it says comes true: a picture's size makes the simulated
card compute as many (simulated) seconds as the row took. It reads files and starts nothing.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Final, Literal

ROOT: Final = Path(__file__).resolve().parent.parent
WHOLE_TRACE: Final = ROOT.parent / "shared" / "traces" / "gentd26-requests.csv"
"""All 18 776 rows; not part of this repository."""
KEPT_TRACE: Final = ROOT / "tests" / "data" / "trace-500.csv"
"""The 500 consecutive rows that came closest together, see tests/data/README.md."""

STEP_SECONDS: Final = 1.0
"""Simulated seconds for a step of one image of one megapixel: at 1 the pictures are of common sizes."""
PIXELS_PER_MEGAPIXEL: Final = 1024 * 1024
"""As the simulated engines count."""
SIDE_MIN, SIDE_MAX, SIDE_STEP = 64, 2048, 8
IMAGE_STRENGTH: Final = 0.75
"""Denoising strength of image-to-image requests: that share of the steps is computed."""
SEEDS_PER_ROW: Final = 16
"""A1111 counts the seed up within a batch; rows have at most 8 pictures."""
ONE_ACCOUNT_CLIENTS_MAX: Final = 4
"""Accounts that use comfyapi: its address is a global of the process, so that each needs a process."""

Client = Literal["webuiapi", "comfy-api-simplified", "comfy-commander", "comfyapi"]
COMFYUI_CLIENTS: Final[tuple[Client, ...]] = ("comfy-api-simplified", "comfy-commander", "comfyapi")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One request of the trace that says all we need."""

    number: int
    """Line of the data, from 1."""
    arrival_seconds: float
    kind: str
    seconds: float
    user: str
    images: int
    steps: int
    checkpoint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request as a client will send it."""

    row: int
    at_seconds: float
    """After the start, in real time."""
    account: str
    client: Client
    is_image_to_image: bool
    prompt: str
    seed: int
    steps: int
    images: int
    width: int
    height: int
    checkpoint: str

    @property
    def service(self) -> str:
        return "a1111" if self.client == "webuiapi" else "comfyui"


def read_rows(file: Path) -> list[Row]:
    """Read the rows that have numbers; 19 of the whole trace were still pending when it was taken."""
    with file.open(newline="") as lines:
        return [
            Row(
                number=number,
                arrival_seconds=float(record["arrival_seconds"]),
                kind=record["kind"],
                seconds=float(record["end_to_end_seconds"]),
                user=record["user"],
                images=int(record["images"]),
                steps=int(record["steps"]),
                checkpoint=record["checkpoint"],
            )
            for number, record in enumerate(csv.DictReader(lines), 1)
            if record["images"] and record["steps"] and record["end_to_end_seconds"]
        ]


def densest(rows: Sequence[Row], count: int) -> list[Row]:
    """The `count` consecutive rows that arrived within the shortest time."""
    if count > len(rows):
        raise ValueError(f"{count} requests wanted, the trace has {len(rows)}")
    starts = range(len(rows) - count + 1)
    begin = min(starts, key=lambda at: rows[at + count - 1].arrival_seconds - rows[at].arrival_seconds)
    return list(rows[begin : begin + count])


def plan(rows: Sequence[Row], compression: float) -> list[Ask]:
    """What every client sends, and when. Each user is an account, and keeps to one client."""
    clients = assign_clients(rows)
    begin = rows[0].arrival_seconds
    return [_ask(row, clients[row.user], (row.arrival_seconds - begin) / compression) for row in rows]


def assign_clients(rows: Sequence[Row]) -> dict[str, Client]:
    """Share users out, the busiest first, each to the service that has fewer requests so far."""
    requests = {"a1111": 0, "comfyui": 0}
    clients: dict[str, Client] = {}
    turns = cycle(COMFYUI_CLIENTS)
    for user, count in Counter(row.user for row in rows).most_common():
        service = min(requests, key=lambda name: requests[name])
        requests[service] += count
        if service == "a1111":
            clients[user] = "webuiapi"
            continue
        client = next(turns)
        if client == "comfyapi" and list(clients.values()).count(client) == ONE_ACCOUNT_CLIENTS_MAX:
            client = next(turns)
        clients[user] = client
    return clients


def _ask(row: Row, client: Client, at_seconds: float) -> Ask:
    # Only webuiapi is asked for pictures from pictures: two of the three ComfyUI clients cannot upload one.
    is_image_to_image = client == "webuiapi" and row.kind != "txt_2_img"
    steps = min(int(IMAGE_STRENGTH * row.steps) + 1, row.steps) if is_image_to_image else row.steps
    width, height = picture_size(row.seconds, steps * row.images)
    return Ask(
        row=row.number,
        at_seconds=at_seconds,
        account=row.user,
        client=client,
        is_image_to_image=is_image_to_image,
        prompt=f"trace row {row.number}",
        seed=row.number * SEEDS_PER_ROW,
        steps=row.steps,
        images=row.images,
        width=width,
        height=height,
        checkpoint=f"{row.checkpoint}.safetensors",
    )


def picture_size(seconds: float, image_steps: int) -> tuple[int, int]:
    """Width and height whose computing takes so many simulated seconds, as square as they come out."""
    pixels = seconds / (image_steps * STEP_SECONDS) * PIXELS_PER_MEGAPIXEL
    width = _side(math.sqrt(pixels))
    return width, _side(pixels / width)


def _side(pixels: float) -> int:
    return min(SIDE_MAX, max(SIDE_MIN, round(pixels / SIDE_STEP) * SIDE_STEP))


def service_seconds(ask: Ask) -> float:
    """Simulated seconds of computing on a card of speed 1."""
    steps = min(int(IMAGE_STRENGTH * ask.steps) + 1, ask.steps) if ask.is_image_to_image else ask.steps
    return STEP_SECONDS * steps * ask.images * ask.width * ask.height / PIXELS_PER_MEGAPIXEL
