"""Why a job waits or was refused: every reason there is, in one list, each naming what would have to
change (promise P5).

API, command line and dashboard show `text`; programs compare `code`, which is stable, and read `args`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

Arg = str | int | float

TEXTS: Final[dict[str, str]] = {
    # -- of a job that waits
    "queue_paused": "The queue is paused; an operator must unpause it.",
    "starting": "It was given to {gpu} and is being started.",
    "running": "It runs on {gpu}.",
    "claiming": "It is being given to {gpu}.",
    "resting_after_failure": "Its attempt {attempts} failed; it rests for {seconds} s before the next.",
    "client_away": "Its client left; it keeps its place for the same request of the same account, and is not "
    "started meanwhile.",
    "waiting_turn": "Position {position} in fair order; every gpu that may run it is busy.",
    "waiting_for_model": "It is first in fair order, but no gpu holds its model {model}: jobs of loaded "
    "models may go first until their accounts are {slack_seconds} GPU-seconds ahead.",
    "gpus_occupied": "The gpus that may run it are occupied: {gpus}.",
    "gpus_paused": "The gpus that may run it are paused: {gpus}",
    "all_draining": "Every gpu that may run it is draining: {gpus}; resume one.",
    "no_gpu_ready": "No engine that may run it answers: {gpus}.",
    "impossible_now": "No gpu offers what it needs: {gpus}.",
    # -- per gpu
    "no_engine_of_service": "{gpu} has no {service} engine.",
    "engine_elsewhere": "{gpu} does not have the engine {engine}.",
    "labels_missing": "{gpu} lacks the labels {labels}.",
    "needs_not_offered": "{gpu} does not offer {needs}.",
    "engine_not_ready": "{gpu}: {engine} is {state}.",
    "gpu_draining": "{gpu} is draining.",
    "gpu_occupied": "{gpu} is occupied: {why}.",
    "gpu_paused": "{gpu} is paused for {seconds} s after {failures} failed attempts in a row.",
    "engine_leaking": "{gpu}: {engine} does not give its memory back; the gpu is left alone until it has.",
    # -- of a refusal
    "no_gpu_of_service": "No gpu has a {service} engine; add one to the settings.",
    "impossible": "No gpu can ever run it: {gpus}{nearest}",
    "queue_full": "{waiting} jobs wait already; try again later.",
    "account_full": "This account has {waiting} jobs waiting already; try again when some have ended.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """One reason, for programs and for people."""

    code: str
    text: str
    args: tuple[tuple[str, Arg], ...] = ()


def reason(code: str, **args: Arg) -> Reason:
    """Makes a reason of the list; a code or argument that the list does not have is a bug."""
    return Reason(code=code, text=TEXTS[code].format(**args), args=tuple(args.items()))
