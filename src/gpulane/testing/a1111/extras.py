"""The small answers of a simulated webui: upscaling, PNG info, and lists that never change."""

from gpulane.testing.a1111.render import encoded
from gpulane.testing.a1111.tables import SCRIPTS, UPSCALERS
from gpulane.testing.card import Json
from gpulane.testing.pictures import png_size, read_text_chunks, render_png


def upscaled(body: dict[str, Json], image: bytes, gpu: str) -> str:
    """An image in its new size, as base64."""
    upscaler = body.get("upscaler_1", "None")
    if upscaler not in UPSCALERS:
        raise AssertionError(f"could not find upscaler named {upscaler}")
    width, height = png_size(image)
    factor = float(body.get("upscaling_resize", 2))
    size = (int((width or 64) * factor), int((height or 64) * factor))
    return encoded(render_png("extras", 1, gpu, *size, read_text_chunks(image), plain=True))


def png_info(image: bytes) -> Json:
    """What the parameters in a picture say."""
    info = read_text_chunks(image).get("parameters")
    if info is None:
        return {"info": "", "items": {}, "parameters": {}}
    first, _, settings = info.rpartition("\n")
    pairs = dict(part.split(": ", 1) for part in settings.split(", ") if ": " in part)
    width, _, height = pairs.pop("Size", "0x0").partition("x")
    prompt, _, negative = first.partition("\nNegative prompt: ")
    size = {"Size-1": width, "Size-2": height}
    parameters = pairs | size | {"Prompt": prompt, "Negative prompt": negative}
    return {"info": info, "items": {}, "parameters": parameters}


def extras_html(body: dict[str, Json]) -> str:
    factor = body.get("upscaling_resize", 2)
    return f"<p>Postprocess upscale by: {factor}, Postprocess upscaler: {body.get('upscaler_1', 'None')}</p>"


def queue_status() -> Json:
    return {
        "msg": "estimation",
        "rank": None,
        "queue_size": 0,
        "avg_event_process_time": 0.0,
        "avg_event_concurrent_process_time": None,
        "rank_eta": None,
        "queue_eta": 1.0,
    }


def face_restorers() -> Json:
    return [{"name": "CodeFormer", "cmd_dir": None}, {"name": "GFPGAN", "cmd_dir": None}]


def script_info() -> Json:
    return [
        {"name": name, "is_alwayson": False, "is_img2img": kind == "img2img", "args": []}
        for kind, names in SCRIPTS.items()
        for name in names
    ]
