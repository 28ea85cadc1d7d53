"""The node classes that a simulated ComfyUI offers, in the shapes of `/object_info`.

`object_info.json` holds real entries of ComfyUI 0.27.0, cut down to what image workflows use, and test nodes.
"""

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from importlib.resources import files
from typing import Final

from gpulane.testing.card import Json

CLASSIC_VERSION: Final = "0.3.64"
MODERN_VERSION: Final = "0.27.0"

_MODERN_KEYS: Final = (
    "api_node",
    "deprecated",
    "dev_only",
    "essentials_category",
    "experimental",
    "has_intermediate_output",
    "is_input_list",
    "output_matchtypes",
    "price_badge",
    "search_aliases",
)
"""Keys of an entry that the old version does not have."""

_LIST_INPUTS: Final = {
    "ckpt_name": "checkpoints",
    "lora_name": "loras",
    "vae_name": "vae",
    "unet_name": "diffusion_models",
    "clip_name": "text_encoders",
    "clip_name1": "text_encoders",
    "clip_name2": "text_encoders",
    "control_net_name": "controlnet",
}
"""Inputs whose choices are the files of a model folder."""

_CLASSIC_FOLDERS: Final = (
    "checkpoints",
    "configs",
    "loras",
    "vae",
    "text_encoders",
    "diffusion_models",
    "clip_vision",
    "style_models",
    "embeddings",
    "diffusers",
    "vae_approx",
    "controlnet",
    "gligen",
    "upscale_models",
)
_LATER_FOLDERS: Final = (
    "custom_nodes",
    "hypernetworks",
    "photomaker",
    "classifiers",
    "model_patches",
    "audio_encoders",
)
_MODERN_FOLDERS: Final = (
    "background_removal",
    "frame_interpolation",
    "geometry_estimation",
    "optical_flow",
    "detection",
)

MODEL_FOLDERS: Final[dict[str, list[str]]] = {
    CLASSIC_VERSION: [*_CLASSIC_FOLDERS, *_LATER_FOLDERS],
    MODERN_VERSION: [*_CLASSIC_FOLDERS, "latent_upscale_models", *_LATER_FOLDERS, *_MODERN_FOLDERS],
}
"""What GET /models answers."""


@lru_cache(maxsize=1)
def _recorded() -> dict[str, Json]:
    return json.loads(files("gpulane.testing.comfyui").joinpath("object_info.json").read_text())


class NodeTable:
    """All node classes of one engine, with its own model lists."""

    def __init__(
        self,
        *,
        version: str,
        models: Mapping[str, Sequence[str]],
        test_prefix: str = "Sim",
        extra: Mapping[str, Json] | None = None,
        without: Sequence[str] = (),
    ) -> None:
        self.version = version
        self.models = models
        self._entries: dict[str, Json] = {}
        self._test_names: dict[str, str] = {}
        recorded = deepcopy(_recorded())
        self._entries.update(recorded["nodes"])
        for name, entry in recorded["test_nodes"].items():
            class_type = test_prefix + name
            entry["name"] = entry["display_name"] = class_type
            self._entries[class_type] = entry
            self._test_names[class_type] = name
        self._entries.update(extra or {})
        for class_type in without:
            self._entries.pop(class_type, None)
        for entry in self._entries.values():
            self._fit(entry)

    def _fit(self, entry: Json) -> None:
        """Fill in the model lists, and drop what this version does not know."""
        for section in ("required", "optional"):
            for name, spec in entry["input"].get(section, {}).items():
                folder = _LIST_INPUTS.get(name)
                if folder is not None and isinstance(spec[0], list):
                    spec[0] = list(self.models.get(folder, spec[0]))
        if self.version == CLASSIC_VERSION:
            for key in _MODERN_KEYS:
                entry.pop(key, None)
            if entry["output_node"]:
                entry |= {"output": [], "output_is_list": [], "output_name": []}

    def __contains__(self, class_type: object) -> bool:
        return class_type in self._entries

    def entry(self, class_type: str) -> Json:
        return self._entries[class_type]

    def is_output(self, class_type: str) -> bool:
        return bool(self._entries[class_type]["output_node"])

    def behavior(self, class_type: str) -> str:
        """The name that says what the node does: its class, or a test node's name behind `test:`."""
        test_name = self._test_names.get(class_type)
        return f"test:{test_name}" if test_name else class_type

    def object_info(self, input_files: Sequence[str], class_type: str | None = None) -> dict[str, Json]:
        """What GET /object_info answers; an unknown class is an empty object."""
        if class_type is None:
            wanted = list(self._entries)
        else:
            wanted = [class_type] if class_type in self._entries else []
        info = {name: self._entries[name] for name in wanted}
        for name in ("LoadImage", "LoadImageMask"):
            if name in info:
                info[name] = deepcopy(info[name])
                info[name]["input"]["required"]["image"][0] = sorted(input_files)
        return info
