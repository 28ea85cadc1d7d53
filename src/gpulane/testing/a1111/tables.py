"""What a simulated webui knows by heart: its options, samplers, request fields, from recordings of 1.10.1."""

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from typing import Final

from gpulane.testing.card import Json

VERSION: Final = "1.10.1"

_KARRAS: Final = {"scheduler": "karras"}
_EXPONENTIAL: Final = {"scheduler": "exponential"}
_TRUE: Final = "True"

SAMPLERS: Final[list[tuple[str, list[str], dict[str, str]]]] = [
    ("DPM++ 2M", ["k_dpmpp_2m"], _KARRAS),
    ("DPM++ SDE", ["k_dpmpp_sde"], {**_KARRAS, "second_order": _TRUE, "brownian_noise": _TRUE}),
    ("DPM++ 2M SDE", ["k_dpmpp_2m_sde"], {**_EXPONENTIAL, "brownian_noise": _TRUE}),
    (
        "DPM++ 2M SDE Heun",
        ["k_dpmpp_2m_sde_heun"],
        {**_EXPONENTIAL, "brownian_noise": _TRUE, "solver_type": "heun"},
    ),
    ("DPM++ 2S a", ["k_dpmpp_2s_a"], {**_KARRAS, "uses_ensd": _TRUE, "second_order": _TRUE}),
    ("DPM++ 3M SDE", ["k_dpmpp_3m_sde"], {**_EXPONENTIAL, "brownian_noise": _TRUE}),
    ("Euler a", ["k_euler_a", "k_euler_ancestral"], {"uses_ensd": _TRUE}),
    ("Euler", ["k_euler"], {}),
    ("LMS", ["k_lms"], {}),
    ("Heun", ["k_heun"], {"second_order": _TRUE}),
    ("DPM2", ["k_dpm_2"], {**_KARRAS, "second_order": _TRUE}),
    ("DPM2 a", ["k_dpm_2_a"], {**_KARRAS, "uses_ensd": _TRUE, "second_order": _TRUE}),
    ("DPM fast", ["k_dpm_fast"], {"uses_ensd": _TRUE}),
    ("DPM adaptive", ["k_dpm_ad"], {"uses_ensd": _TRUE}),
    ("Restart", ["restart"], {**_KARRAS, "second_order": _TRUE}),
    ("DDIM", ["ddim"], {}),
    ("DDIM CFG++", ["ddim_cfgpp"], {}),
    ("PLMS", ["plms"], {}),
    ("UniPC", ["unipc"], {}),
    ("LCM", ["k_lcm"], {}),
]

SCHEDULERS: Final[list[tuple[str, str, list[str] | None, float, bool]]] = [
    ("automatic", "Automatic", None, -1.0, False),
    ("uniform", "Uniform", None, -1.0, True),
    ("karras", "Karras", None, 7.0, False),
    ("exponential", "Exponential", None, -1.0, False),
    ("polyexponential", "Polyexponential", None, 1.0, False),
    ("sgm_uniform", "SGM Uniform", ["SGMUniform"], -1.0, True),
    ("kl_optimal", "KL Optimal", None, -1.0, False),
    ("align_your_steps", "Align Your Steps", None, -1.0, False),
    ("simple", "Simple", None, -1.0, True),
    ("normal", "Normal", None, -1.0, True),
    ("ddim", "DDIM", None, -1.0, True),
    ("beta", "Beta", None, -1.0, True),
]

UPSCALERS: Final = [
    "None",
    "Lanczos",
    "Nearest",
    "DAT x2",
    "DAT x3",
    "DAT x4",
    "ESRGAN_4x",
    "LDSR",
    "R-ESRGAN 4x+",
    "R-ESRGAN 4x+ Anime6B",
    "ScuNET GAN",
    "ScuNET PSNR",
    "SwinIR 4x",
]

LATENT_UPSCALE_MODES: Final = [
    "Latent",
    "Latent (antialiased)",
    "Latent (bicubic)",
    "Latent (bicubic antialiased)",
    "Latent (nearest)",
    "Latent (nearest-exact)",
]

SCRIPTS: Final = {
    "txt2img": ["prompt matrix", "prompts from file or textbox", "x/y/z plot", "extra options"],
    "img2img": ["img2img alternative test", "loopback", "outpainting mk2", "poor man's outpainting"],
}
"""Those that were recorded of the real lists, which are longer."""

FORGE_OPTIONS: Final[dict[str, Json]] = {
    "forge_preset": "sd",
    "forge_additional_modules": [],
    "forge_unet_storage_dtype": "Automatic",
    "forge_inference_memory": 1024,
}


class Invalid(Exception):
    """A body that FastAPI refuses: 422 with these details."""

    def __init__(self, details: list[Json]) -> None:
        super().__init__(str(details))
        self.details = details


@lru_cache(maxsize=1)
def recorded() -> dict[str, Json]:
    return json.loads(files("gpulane.testing.a1111").joinpath("data.json").read_text())


def samplers() -> list[Json]:
    return [{"name": name, "aliases": aliases, "options": options} for name, aliases, options in SAMPLERS]


def schedulers() -> list[Json]:
    return [
        {"name": name, "label": label, "aliases": aliases, "default_rho": rho, "need_inner_model": inner}
        for name, label, aliases, rho, inner in SCHEDULERS
    ]


def upscalers() -> list[Json]:
    return [
        {
            "name": name,
            "model_name": None,
            "model_path": None,
            "model_url": None,
            "scale": 2.0 if name == "DAT x2" else 4.0,
        }
        for name in UPSCALERS
    ]


def sampler_named(name: str | None) -> tuple[str, str]:
    """Sampler and schedule label as infotexts say them; an unknown sampler silently becomes the first."""
    for known, aliases, options in SAMPLERS:
        if name is not None and name.lower() in (known.lower(), *aliases):
            return known, options.get("scheduler", "automatic").capitalize()
    return SAMPLERS[0][0], "Karras"


def decoded(text: str) -> dict[str, Json]:
    """A JSON body, or FastAPI's words about it."""
    if not text:
        raise Invalid([{"loc": ["body"], "msg": "field required", "type": "value_error.missing"}])
    try:
        body: Json = json.loads(text)
    except json.JSONDecodeError as error:
        context = {
            "msg": error.msg,
            "doc": error.doc,
            "pos": error.pos,
            "lineno": error.lineno,
            "colno": error.colno,
        }
        detail = {
            "loc": ["body", error.pos],
            "msg": str(error),
            "type": "value_error.jsondecode",
            "ctx": context,
        }
        raise Invalid([detail]) from error
    if not isinstance(body, dict):
        raise Invalid([{"loc": ["body"], "msg": "value is not a valid dict", "type": "type_error.dict"}])
    return body  # pyright: ignore[reportUnknownVariableType]


def with_defaults(body: Mapping[str, Json], fields: Mapping[str, Json]) -> dict[str, Json]:
    """The request as the model has it: known fields only, in its types, defaults filled in."""
    values: dict[str, Json] = {}
    problems: list[Json] = []
    for name, (kind, default) in fields.items():
        value = body.get(name, default)
        if name in body and value is not None:
            value, problem = _converted(kind, value)
            if problem is not None:
                problems.append({"loc": ["body", name], "msg": problem[0], "type": problem[1]})
        values[name] = value
    if problems:
        raise Invalid(problems)
    return values


def _converted(kind: str, value: Json) -> tuple[Json, tuple[str, str] | None]:
    is_list, is_dict = isinstance(value, list), isinstance(value, dict)
    try:
        match kind:
            case "integer":
                return int(value), None
            case "number":
                return float(value), None
            case "boolean" if not isinstance(value, bool):
                return {"true": True, "1": True, "false": False, "0": False}[str(value).lower()], None
            case "string" if is_list or is_dict:
                return value, ("str type expected", "type_error.str")
            case "string":
                return str(value), None
            case "array" if not is_list:
                return value, ("value is not a valid list", "type_error.list")
            case "object" if not is_dict:
                return value, ("value is not a valid dict", "type_error.dict")
            case _:
                return value, None
    except (ValueError, TypeError, KeyError):
        words = {
            "integer": ("value is not a valid integer", "type_error.integer"),
            "number": ("value is not a valid float", "type_error.float"),
            "boolean": ("value could not be parsed to a boolean", "type_error.bool"),
        }
        return value, words[kind]
