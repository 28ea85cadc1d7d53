"""An account's own options: what may change, what is shown, what goes with its jobs."""

import json
from pathlib import Path

import pytest

from gpulane.adapters.a1111.catalogue import read_catalogue
from gpulane.adapters.a1111.errors import EngineRefusal, error_answer
from gpulane.adapters.a1111.options import (
    Scope,
    carried,
    merged_options,
    merged_own,
    read_change,
    scope_of,
)
from gpulane.errors import NotPermitted
from tests.unit.adapters.a1111.samples import DOCUMENTS

CATALOGUE = read_catalogue(DOCUMENTS)
ENGINE = DOCUMENTS["options"]


def change(
    posted: object, *, own: bytes = b"{}", is_admin: bool = False
) -> tuple[dict[str, object], dict[str, object]]:
    shown = merged_options(ENGINE, own, CATALOGUE)
    found = read_change(json.dumps(posted).encode(), shown, CATALOGUE, is_admin=is_admin)
    own_kept = {key: json.loads(bytes(value)) for key, value in found.own.items()}
    return own_kept, {key: json.loads(bytes(value)) for key, value in found.shared.items()}


def test_a_whole_dictionary_posted_back_changes_what_differs() -> None:
    whole = json.loads(ENGINE) | {"sd_model_checkpoint": "tinyB", "CLIP_stop_at_last_layers": 2, "s_noise": 1}
    assert change(whole) == (
        {"sd_model_checkpoint": "xl/tinyB.safetensors", "CLIP_stop_at_last_layers": 2},
        {},
    )


def test_what_belongs_to_all_needs_an_admin() -> None:
    with pytest.raises(NotPermitted, match="outdir_samples"):
        change({"outdir_samples": "/etc"})
    assert change({"outdir_samples": "/etc"}, is_admin=True) == ({}, {"outdir_samples": "/etc"})
    assert change({"outdir_samples": "/srv/out"}) == ({}, {})


def test_unknown_names_are_refused_as_the_engine_does() -> None:
    with pytest.raises(EngineRefusal) as caught:
        change({"sd_model_checkpoint": "doesnotexist"})
    answer = error_answer(caught.value)
    assert answer.status == 500
    told = json.loads(answer.body)["errors"]
    assert told.startswith("model 'doesnotexist' not found; ") and "tinyA.safetensors" in told
    with pytest.raises(EngineRefusal) as caught:
        change({"no_such_option": 1})
    assert json.loads(error_answer(caught.value).body)["error"] == "KeyError"


def test_an_account_sees_its_own_choice_as_the_engine_would_show_it() -> None:
    own = merged_own(
        b"{}", read_change(b'{"sd_model_checkpoint":"tinyB"}', ENGINE, CATALOGUE, is_admin=False).own
    )
    shown = json.loads(merged_options(ENGINE, own, CATALOGUE))
    assert shown["sd_model_checkpoint"] == "xl/tinyB.safetensors [0123456789]"
    assert shown["CLIP_stop_at_last_layers"] == 1
    assert change({"sd_model_checkpoint": "xl/tinyB.safetensors [0123456789]"}, own=own) == ({}, {})


def test_only_what_a_job_can_bring_is_carried() -> None:
    kept = (
        b'{"CLIP_stop_at_last_layers":2,"js_modal_lightbox":false,"sd_model_checkpoint":"tinyA.safetensors"}'
    )
    assert set(carried(kept)) == {"CLIP_stop_at_last_layers", "sd_model_checkpoint"}


def test_scopes_of_a_real_servers_options(shared: Path) -> None:
    recorded = json.loads((shared / "recordings/a1111/basic_get.json").read_text())
    real: dict[str, object] = next(e["response"] for e in recorded if e["name"] == "options")
    by_scope = {scope: {key for key in real if scope_of(key) is scope} for scope in Scope}
    assert {"CLIP_stop_at_last_layers", "sd_vae", "eta_noise_seed_delta", "randn_source"} <= by_scope[
        Scope.CARRIED
    ]
    assert {"js_modal_lightbox", "quicksettings_list"} <= by_scope[Scope.KEPT]
    shared_keys = by_scope[Scope.SHARED]
    assert {
        "outdir_save",
        "api_forbid_local_requests",
        "disabled_extensions",
        "sd_checkpoints_limit",
    } <= shared_keys
    assert {"cross_attention_optimization", "fp8_storage", "temp_dir", "samples_save"} <= shared_keys
