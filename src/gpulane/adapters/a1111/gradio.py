"""Tells Gradio's functions apart, from the engine's own GET /config.

A function's number is its position and changes with the version and the extensions, so it is known by the
javascript it is started with and by the element it belongs to. Unknown functions, as extensions bring them,
never count as harmless.
"""

from __future__ import annotations

import re
from typing import Final, cast

import msgspec

GPU_SCRIPTS: Final = frozenset(
    {
        "submit",
        "submit_txt2img_upscale",
        "submit_img2img",
        "submit_extras",
        "start_training_textual_inversion",
        "modelmerger",
    }
)
GPU_ELEMENTS: Final = re.compile(
    r"setting_.*|change_checkpoint|settings_submit|interrogate|deepbooru|sett_(un|re)load_sd_model"
    r"|calculate_all_checkpoint_hash|(txt2img|img2img)_(generate|upscale)|extras_generate|modelmerger_merge|train_.*"
)
"""Elements whose functions use the gpu, or change what all users of the engine have loaded."""

PASSING_ELEMENTS: Final = re.compile(
    r"(txt2img|img2img)_(send_to_\w+|tab|prompt_image|styles|styles_edit_select|styles_edit_button|style_copy|style_apply\w*"
    r"|clear_prompt|subseed_show|override_settings|width|height|hr_scale|hr_resize_[xy]|hr-checkbox|reuse_seed"
    r"|reuse_subseed|generation_info_button|token_button|negative_token_button|scale|update_resize_to|tab_resize_(to|by)"
    r"|detect_image_size_btn|\w*_tab|image|sketch)"
    r"|(inpaint|extras)_\w*tab|inpaint_tab|extras_tab|inpaint_sketch|paste|script_list|script_(txt2img|img2img)_\w+"
    r"|[xyz]{2}_grid_swap_axes_button|xyz_grid_fill_[xyz]_tool_button|refresh_(txt2img|img2img)_styles"
    r"|upscaling_res_switch_btn|extras_scale_(by|to)_tab|extras_upscaler_1|extras_image|pnginfo_image"
    r"|settings_json|settings_show_one_page|ui_defaults_view|modelmerger_(interp_method|checkpoint_format)"
    r"|highlightedtext"
)
"""Elements of the stock pages whose functions only compute what the page shows: no gpu, no file, nobody
else's state."""

RESIZE_SCRIPT: Final = "setupAllResizeHandles"
"""Does its work in the page; the engine is called for the sake of the script alone."""

_DENIED_ELEMENTS: Final = re.compile(r".*_(skip|interrupt|interrupting|restore_progress|interrupt_training)")
"""They act on whatever runs, whoever's it is (interrupt), or wait for it (restore): the front door answers
these."""


class _Component(msgspec.Struct):
    id: int
    props: dict[str, object] = {}


class _Dependency(msgspec.Struct):
    targets: list[object] = []
    js: object = None
    backend_fn: bool = False
    inputs: list[object] | None = None
    outputs: list[object] | None = None


class _Config(msgspec.Struct):
    components: list[_Component] = []
    dependencies: list[_Dependency] = []


def gpu_functions(config: bytes) -> frozenset[int]:
    """Number the functions known to use the gpu or to change what is loaded. Raises msgspec.DecodeError."""
    return frozenset(
        number for number, dependency, elements in _functions(config) if _uses_gpu(dependency, elements)
    )


def passing(config: bytes) -> frozenset[int]:
    """Number the functions known to be harmless: all that may reach an engine beside the queue."""
    return frozenset(
        number
        for number, dependency, elements in _functions(config)
        if not _uses_gpu(dependency, elements) and (_is_harmless(elements) or _does_nothing(dependency))
    )


def function_of(body: bytes) -> int | None:
    """Read which function a call names: POST /run/predict, /queue/join, or the first messages of the
    socket.
    """
    try:
        return msgspec.json.decode(body, type=_Call).fn_index
    except (msgspec.DecodeError, RecursionError):
        return None


class _Call(msgspec.Struct):
    fn_index: int | None = None


def _functions(config: bytes) -> list[tuple[int, _Dependency, tuple[str, ...]]]:
    decoded = msgspec.json.decode(config, type=_Config)
    names = {component.id: component.props.get("elem_id") for component in decoded.components}
    found: list[tuple[int, _Dependency, tuple[str, ...]]] = []
    for number, dependency in enumerate(decoded.dependencies):
        if dependency.backend_fn:
            ids = [_target_id(target) for target in dependency.targets]
            found.append((number, dependency, tuple(str(names.get(i) or "?") for i in ids if i is not None)))
    return found


def _target_id(target: object) -> int | None:
    """Gradio 3 writes `7` or `[7]`, Gradio 4 `[7, "click"]`; a page load has `[null, "load"]` or none."""
    if isinstance(target, list):
        items = cast("list[object]", target)
        target = items[0] if items else None
    return target if isinstance(target, int) else None


def _uses_gpu(dependency: _Dependency, elements: tuple[str, ...]) -> bool:
    return dependency.js in GPU_SCRIPTS or any(GPU_ELEMENTS.fullmatch(name) for name in elements)


def _is_harmless(elements: tuple[str, ...]) -> bool:
    """A page load has no elements: it fills in what the page shows."""
    return all(PASSING_ELEMENTS.fullmatch(name) and not _DENIED_ELEMENTS.fullmatch(name) for name in elements)


def _does_nothing(dependency: _Dependency) -> bool:
    """Know A1111's `.then(fn=lambda: None, _js="setupAllResizeHandles")`, which each page load ends with.

    It belongs to the page itself, an element without a name; it takes nothing and fills in nothing.
    """
    return dependency.js == RESIZE_SCRIPT and dependency.inputs == [] and dependency.outputs == []
