"""One account's own options: what POST /options may change, and how it is sent along with each of its jobs.

An engine has one set of options for everybody; POST /options there changes jobs that already wait (webui
issue 5847). So an account's choices are kept here and travel as `override_settings`, which the engine applies
when the job starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import msgspec

from gpulane.adapters.a1111.catalogue import Catalogue, find_checkpoint_loosely, hinted, without_checksum
from gpulane.adapters.a1111.errors import EngineRefusal, Invalid
from gpulane.adapters.a1111.fields import Body, split
from gpulane.errors import NotPermitted

CHECKPOINT: Final = "sd_model_checkpoint"
SHOWN_LENGTH_MAX: Final = 200
"""Of a wrong name, in the message about it."""

CARRIED: Final = frozenset(
    [
        "sd_model_checkpoint",
        "sd_vae",
        "sd_unet",
        "forge_additional_modules",
        "CLIP_stop_at_last_layers",
        "emphasis",
        "enable_batch_seeds",
        "comma_padding_backtrack",
        "sdxl_clip_l_skip",
        "randn_source",
        "tiling",
        "hires_fix_refiner_pass",
        "sdxl_crop_top",
        "sdxl_crop_left",
        "sdxl_refiner_low_aesthetic_score",
        "sdxl_refiner_high_aesthetic_score",
        "sd3_enable_t5",
        "enable_quantization",
        "sd_vae_overrides_per_model_preferences",
        "sd_vae_encode_method",
        "sd_vae_decode_method",
        "auto_vae_precision",
        "auto_vae_precision_bfloat16",
        "inpainting_mask_weight",
        "initial_noise_multiplier",
        "img2img_extra_noise",
        "img2img_color_correction",
        "img2img_fix_steps",
        "img2img_background_color",
        "return_mask",
        "return_mask_composite",
        "overlay_inpaint",
        "s_min_uncond",
        "s_min_uncond_all",
        "token_merging_ratio",
        "token_merging_ratio_img2img",
        "token_merging_ratio_hr",
        "pad_cond_uncond",
        "pad_cond_uncond_v0",
        "persistent_cond_cache",
        "batch_cond_uncond",
        "auto_backcompat",
        "use_old_emphasis_implementation",
        "use_old_karras_scheduler_sigmas",
        "no_dpmpp_sde_batch_determinism",
        "use_old_hires_fix_width_height",
        "hires_fix_use_firstpass_conds",
        "use_old_scheduling",
        "use_downcasted_alpha_bar",
        "refiner_switch_by_sample_steps",
        "interrogate_return_ranks",
        "interrogate_clip_num_beams",
        "interrogate_clip_min_length",
        "interrogate_clip_max_length",
        "interrogate_clip_dict_limit",
        "interrogate_clip_skip_categories",
        "interrogate_deepbooru_score_threshold",
        "deepbooru_sort_alpha",
        "deepbooru_use_spaces",
        "deepbooru_escape",
        "deepbooru_filter_tags",
        "extra_networks_default_multiplier",
        "sd_hypernetwork",
        "sd_lora",
        "return_grid",
        "do_not_show_images",
        "eta_ddim",
        "eta_ancestral",
        "ddim_discretize",
        "s_churn",
        "s_tmin",
        "s_tmax",
        "s_noise",
        "sigma_min",
        "sigma_max",
        "rho",
        "eta_noise_seed_delta",
        "always_discard_next_to_last_sigma",
        "sgm_noise_multiplier",
        "uni_pc_variant",
        "uni_pc_skip_type",
        "uni_pc_order",
        "uni_pc_lower_order_final",
        "sd_noise_schedule",
        "skip_early_cond",
        "beta_dist_alpha",
        "beta_dist_beta",
        "ESRGAN_tile",
        "ESRGAN_tile_overlap",
        "DAT_tile",
        "DAT_tile_overlap",
        "SCUNET_tile",
        "SCUNET_tile_overlap",
        "SWIN_tile",
        "SWIN_tile_overlap",
        "ldsr_steps",
        "upscaler_for_img2img",
        "face_restoration",
        "face_restoration_model",
        "code_former_weight",
        "samples_format",
        "jpeg_quality",
        "webp_lossless",
        "grid_format",
        "grid_only_if_multiple",
        "grid_prevent_empty_spots",
        "n_rows",
        "enable_pnginfo",
        "add_model_name_to_info",
        "add_model_hash_to_info",
        "add_vae_name_to_info",
        "add_vae_hash_to_info",
        "add_version_to_infotext",
        "disable_weights_auto_swap",
        "infotext_styles",
        "lora_preferred_name",
        "lora_add_hashes_to_infotext",
        "lora_bundled_ti_to_infotext",
        "lora_functional",
        "textual_inversion_add_hashes_to_infotext",
        "enable_prompt_comments",
        "hypertile_enable_unet",
        "hypertile_enable_unet_secondpass",
        "hypertile_max_depth_unet",
        "hypertile_max_tile_unet",
        "hypertile_swap_size_unet",
        "hypertile_enable_vae",
        "hypertile_max_depth_vae",
        "hypertile_max_tile_vae",
        "hypertile_swap_size_vae",
        "live_previews_enable",
        "live_previews_image_format",
        "show_progress_every_n_steps",
        "show_progress_type",
        "live_preview_content",
        "show_progress_grid",
    ]
)
"""What a job can bring with it. Options that act only through a change callback
(cross_attention_optimization, fp8_storage) cannot be among them: override_settings run no callbacks."""

_KEPT_PREFIXES: Final = (
    "js_",
    "ui_",
    "canvas_",
    "keyedit_",
    "extra_networks_",
    "live_preview",
    "notification_",
    "show_progress",
    "extra_options_",
    "gallery_",
    "settings_in_ui",
    "infotext_",
    "img2img_editor_",
    "img2img_sketch_",
    "img2img_inpaint_",
)
_KEPT: Final = frozenset(
    [
        "forge_preset",
        "compact_prompt_box",
        "samplers_in_dropdown",
        "dimensions_and_batch_together",
        "send_seed",
        "send_size",
        "sd_checkpoint_dropdown_use_short",
        "hires_fix_show_sampler",
        "hires_fix_show_prompts",
        "txt2img_settings_accordion",
        "img2img_settings_accordion",
        "interrupt_after_current",
        "quicksettings_list",
        "hidden_tabs",
        "open_dir_button_choice",
        "sd_webui_modal_lightbox_icon_opacity",
        "sd_webui_modal_lightbox_toolbar_opacity",
        "disable_token_counters",
        "include_styles_into_token_counters",
        "hide_samplers",
        "return_mask",
        "set_scale_by_when_changing_upscaler",
        "img2img_batch_show_results_limit",
        "prevent_screen_sleep_during_generation",
        "sd_checkpoint_hash",
    ]
)


class Scope(StrEnum):
    """How far an option reaches."""

    CARRIED = "carried"
    """Sent with each job of the account."""
    KEPT = "kept"
    """Kept for the account and shown back; the page's own business."""
    SHARED = "shared"
    """Belongs to the engine and all its users (folders, memory, extensions, the API's own guards): admins
    only."""


def scope_of(key: str) -> Scope:
    """Tell how far an option reaches; what is not known belongs to all."""
    if key in CARRIED:
        return Scope.CARRIED
    return Scope.KEPT if key in _KEPT or key.startswith(_KEPT_PREFIXES) else Scope.SHARED


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionsChange:
    """What a POST /options really changes."""

    own: Mapping[str, msgspec.Raw] = field(default_factory=dict[str, msgspec.Raw])
    """For the account: to be kept, and carried where CARRIED."""
    shared: Mapping[str, msgspec.Raw] = field(default_factory=dict[str, msgspec.Raw])
    """For the engines: an admin asked for it."""


def read_change(body: bytes, current: bytes, catalogue: Catalogue, *, is_admin: bool) -> OptionsChange:
    """Understand a POST /options against what GET /options showed (`merged_options`).

    Whole dictionaries are posted back (Open WebUI), so only what differs counts. Raises Invalid,
    NotPermitted, and EngineRefusal for what the engine would refuse.
    """
    posted = split(body)
    before = split(current)
    own: Body = {}
    shared: Body = {}
    for key, value in posted.items():
        if key == CHECKPOINT:
            if (chosen := _checkpoint(value, before.get(key), catalogue)) is not None:
                own[key] = chosen
        elif key not in before:
            raise EngineRefusal(f"'{key}'", status=500, code="unknown_option", error="KeyError")
        elif _value(value) != _value(before[key]):
            (shared if scope_of(key) is Scope.SHARED else own)[key] = value
    if shared and not is_admin:
        names = ", ".join(sorted(shared))
        raise NotPermitted(
            f"these options belong to the engine and all its users: {names}", hint="ask an admin"
        )
    return OptionsChange(own=own, shared=shared)


def merged_options(engine: bytes, own: bytes, catalogue: Catalogue) -> bytes:
    """Show an account its options: the engine's, with its own choices over them."""
    merged = split(engine) | split(own)
    name = _text(merged.get(CHECKPOINT))
    found = find_checkpoint_loosely(catalogue.checkpoints or (), name) if name else None
    if found is not None:
        # As the engine shows it, which is what clients look for in the list of models.
        merged[CHECKPOINT] = msgspec.Raw(msgspec.json.encode(found.title))
    return msgspec.json.encode(merged)


def merged_own(own: bytes, change: Mapping[str, msgspec.Raw]) -> bytes:
    """Add a change to what is kept for an account."""
    return msgspec.json.encode(split(own) | dict(change))


def carried(own: bytes) -> Body:
    """Pick from what is kept for an account what goes with its jobs."""
    return {key: value for key, value in split(own).items() if key in CARRIED}


def check_override(settings: Mapping[str, msgspec.Raw], *, is_admin: bool) -> None:
    """Refuse override_settings that would reach beyond the job: any folder of the engine can be named
    there.
    """
    beyond = sorted(key for key in settings if _is_path(key))
    if beyond and not is_admin:
        raise NotPermitted(
            f"override_settings may not hold {', '.join(beyond)}", hint="leave them out or ask an admin"
        )


def _is_path(key: str) -> bool:
    return key.startswith(("outdir_", "api_", "profiling_", "training_")) or key in {
        "temp_dir",
        "directories_filename_pattern",
        "samples_filename_pattern",
        "grid_zip_filename_pattern",
        "restore_config_state_file",
        "disabled_extensions",
        "disable_all_extensions",
    }


def _checkpoint(value: msgspec.Raw, before: msgspec.Raw | None, catalogue: Catalogue) -> msgspec.Raw | None:
    wanted = _text(value)
    if not wanted:
        return None
    known = catalogue.checkpoints
    found = find_checkpoint_loosely(known, wanted) if known is not None else None
    if known is not None and found is None:
        hint = hinted((c.title for c in known), wanted)
        shown = wanted if len(wanted) <= SHOWN_LENGTH_MAX else wanted[:SHOWN_LENGTH_MAX] + "..."
        message = f"model {shown!r} not found" + (f"; {hint}" if hint else "")
        raise EngineRefusal(message, status=500, code="unknown_checkpoint", error="RuntimeError")
    name = found.name if found is not None else wanted
    shown = _text(before)
    if shown is not None and without_checksum(shown) == name:
        return None
    return msgspec.Raw(msgspec.json.encode(name))


def _text(raw: msgspec.Raw | None) -> str | None:
    value = None if raw is None else _value(raw)
    return value if isinstance(value, str) else None


def _value(raw: msgspec.Raw) -> object:
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        raise Invalid from None
