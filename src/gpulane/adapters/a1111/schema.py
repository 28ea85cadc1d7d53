"""The fields of txt2img and img2img with their types, as a real server of version 1.10 describes them.

Only what is listed is checked: the engine ignores unknown fields, and relatives have some of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from gpulane.adapters.a1111.fields import Kind

_BOTH: Final[Mapping[Kind, str]] = {
    Kind.INT: "seed subseed seed_resize_from_h seed_resize_from_w batch_size n_iter steps width height",
    Kind.FLOAT: (
        "subseed_strength cfg_scale eta denoising_strength s_min_uncond s_churn s_tmax s_tmin "
        "s_noise refiner_switch_at"
    ),
    Kind.BOOL: (
        "restore_faces tiling do_not_save_samples do_not_save_grid "
        "override_settings_restore_afterwards disable_extra_networks send_images save_images"
    ),
    Kind.STR: (
        "prompt negative_prompt sampler_name scheduler refiner_checkpoint firstpass_image "
        "force_task_id sampler_index script_name infotext"
    ),
    Kind.LIST: "styles script_args",
    Kind.DICT: "override_settings comments alwayson_scripts",
}
_TXT2IMG: Final[Mapping[Kind, str]] = {
    Kind.INT: "firstphase_width firstphase_height hr_second_pass_steps hr_resize_x hr_resize_y",
    Kind.FLOAT: "hr_scale",
    Kind.BOOL: "enable_hr",
    Kind.STR: "hr_upscaler hr_checkpoint_name hr_sampler_name hr_scheduler hr_prompt hr_negative_prompt",
}
_IMG2IMG: Final[Mapping[Kind, str]] = {
    Kind.INT: (
        "resize_mode mask_blur_x mask_blur_y mask_blur inpainting_fill inpaint_full_res_padding "
        "inpainting_mask_invert"
    ),
    Kind.FLOAT: "image_cfg_scale initial_noise_multiplier",
    Kind.BOOL: "mask_round inpaint_full_res include_init_images",
    Kind.STR: "mask latent_mask",
    Kind.LIST: "init_images",
}


def _types(*groups: Mapping[Kind, str]) -> Mapping[str, Kind]:
    return {name: kind for group in groups for kind, names in group.items() for name in names.split()}


TYPES: Final[Mapping[str, Mapping[str, Kind]]] = {
    "txt2img": _types(_BOTH, _TXT2IMG),
    "img2img": _types(_BOTH, _IMG2IMG),
}
"""By endpoint."""
