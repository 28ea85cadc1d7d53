"""What becomes of a request: the job it is, the body that is sent, and what is refused."""

import base64
import json
import struct

import msgspec
import pytest

from gpulane.adapters.a1111 import options
from gpulane.adapters.a1111.catalogue import Catalogue, read_catalogue
from gpulane.adapters.a1111.errors import EngineRefusal, Invalid, UnknownName, error_answer
from gpulane.adapters.a1111.requests import Limits, Meta, RequestContext, recognize
from gpulane.adapters.base import Recognized
from gpulane.core.model import NO_MODEL, JobId, Work
from gpulane.errors import ClientError, NotPermitted
from tests.unit.adapters.a1111.samples import DOCUMENTS

JOB = JobId("6f0cbb8e-7d3f-4d0e-9a57-0a4f0c6f9f11")
CATALOGUE = read_catalogue(DOCUMENTS)


def understand(
    body: object, *, endpoint: str = "txt2img", own: str = "{}", catalogue: Catalogue = CATALOGUE
) -> Recognized:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    context = RequestContext(job=JOB, catalogue=catalogue, carried=options.carried(own.encode()))
    return recognize(f"/sdapi/v1/{endpoint}", raw, context)


def sent(recognized: Recognized) -> dict[str, object]:
    return json.loads(recognized.request.body)


def refused(body: object, *, endpoint: str = "txt2img", own: str = "{}") -> ClientError:
    with pytest.raises(ClientError) as caught:
        understand(body, endpoint=endpoint, own=own)
    return caught.value


def test_an_empty_body_is_the_defaults() -> None:
    found = understand(b"")
    assert found.work == Work(steps=50, pixels=512 * 512, images=1)
    assert found.model == NO_MODEL and found.client_job_id is None
    assert found.needs == {"endpoint:txt2img"}
    assert sent(found) == {
        "force_task_id": JOB,
        "override_settings": {},
        "override_settings_restore_afterwards": True,
    }


def test_unknown_fields_pass_and_the_task_id_is_ours() -> None:
    found = understand({"prompt": "a cat", "nonsense": {"a": [1]}, "force_task_id": "task(abc)"})
    assert found.client_job_id == "task(abc)"
    assert sent(found)["force_task_id"] == JOB
    assert sent(found)["nonsense"] == {"a": [1]}


def test_pictures_are_passed_byte_for_byte() -> None:
    picture = b'"' + b"A\\/B+" * 400_000 + b'"'
    body = b'{"init_images": [' + picture + b'], "mask": ' + picture + b', "steps": 20}'
    found = understand(body, endpoint="img2img")
    assert found.request.body.count(picture) == 2


def test_work_counts_the_second_pass_and_real_img2img_steps() -> None:
    plain = understand({"steps": 20, "width": 640, "height": 512, "batch_size": 2, "n_iter": 3})
    assert plain.work == Work(steps=20, pixels=640 * 512, images=6)
    high = {"steps": 20, "enable_hr": True, "hr_scale": 2, "denoising_strength": 0.5}
    assert understand(high).work.pixels == 512 * 512 + 512 * 512 * 4 // 2
    half = {"steps": 20, "denoising_strength": 0.5, "init_images": ["x"]}
    assert understand(half, endpoint="img2img").work.steps == 10


def test_size_of_an_upscaling_job_comes_from_the_pictures_header() -> None:
    head = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", 300, 200) + b"\x08\x02\0\0\0"
    image = base64.b64encode(head + b"\0" * 100).decode()
    found = understand(
        {"image": image, "upscaling_resize": 2, "upscaler_1": "lanczos"}, endpoint="extra-single-image"
    )
    assert found.work == Work(pixels=300 * 200 * 4)
    assert found.needs == {"endpoint:extra-single-image", "upscaler:Lanczos"}
    assert sent(found)["upscaler_1"] == "Lanczos"
    assert "force_task_id" not in sent(found)


@pytest.mark.parametrize(
    "name",
    ["tinyA", "tinyA.safetensors", "TINYA", "tinyA.safetensors [deadbeef99]"],
)
def test_a_checkpoint_is_found_by_any_of_its_names(name: str) -> None:
    found = understand({"override_settings": {"sd_model_checkpoint": name}})
    assert found.model == "tinyA.safetensors"
    assert "checkpoint:tinyA.safetensors" in found.needs
    assert sent(found)["override_settings"] == {"sd_model_checkpoint": "tinyA.safetensors"}
    assert msgspec.json.decode(found.meta, type=Meta).checkpoint == "tinyA.safetensors"


@pytest.mark.parametrize(
    "name", ["0123456789", "tinyB", "xl_tinyB", "xl/tinyB.safetensors [0123456789]", "tinyB.safetensors"]
)
def test_a_hashed_checkpoint_in_a_folder(name: str) -> None:
    assert understand({"override_settings": {"sd_model_checkpoint": name}}).model == "xl/tinyB.safetensors"


def test_the_accounts_own_options_go_along_and_the_request_wins() -> None:
    own = '{"sd_model_checkpoint":"tinyA.safetensors","CLIP_stop_at_last_layers":2,"js_modal_lightbox":false}'
    found = understand({"override_settings": {"CLIP_stop_at_last_layers": 3}}, own=own)
    assert found.model == "tinyA.safetensors"
    assert sent(found)["override_settings"] == {
        "sd_model_checkpoint": "tinyA.safetensors",
        "CLIP_stop_at_last_layers": 3,
    }


def test_options_never_outlive_the_job() -> None:
    found = understand({"override_settings_restore_afterwards": False})
    assert sent(found)["override_settings_restore_afterwards"] is True


def test_vae_and_modules_belong_to_the_model() -> None:
    body = {"override_settings": {"sd_model_checkpoint": "tinyA", "sd_vae": "nice.vae.pt"}}
    assert understand(body).model == "tinyA.safetensors|vae=nice.vae.pt"
    assert "vae:nice.vae.pt" in understand(body).needs
    automatic = {"override_settings": {"sd_model_checkpoint": "tinyA", "sd_vae": "Automatic"}}
    assert understand(automatic).model == "tinyA.safetensors"
    forge = read_catalogue(
        DOCUMENTS | {"sd-modules": b'[{"model_name":"ae.safetensors","filename":"/m/ae.safetensors"}]'}
    )
    chosen = {"sd_model_checkpoint": "tinyA", "forge_additional_modules": ["C:\\m\\ae.safetensors"]}
    assert (
        understand({"override_settings": chosen}, catalogue=forge).model
        == "tinyA.safetensors|module=ae.safetensors"
    )


def test_unknown_checkpoint_is_refused_with_the_nearest_names() -> None:
    error = refused({"override_settings": {"sd_model_checkpoint": "tynyA"}})
    assert isinstance(error, UnknownName)
    assert error.code == "unknown_checkpoint" and error.status == 422
    assert "tinyA.safetensors" in (error.hint or "")
    answer = json.loads(error_answer(error).body)
    assert answer["error"] == "HTTPException" and "tinyA.safetensors" in answer["detail"]
    assert refused({}, own='{"sd_model_checkpoint":"gone"}').code == "unknown_checkpoint"
    assert refused({"refiner_checkpoint": "gone"}).code == "unknown_checkpoint"


@pytest.mark.parametrize(
    ("name", "sampler", "scheduler"),
    [
        ("Euler a", "Euler a", None),
        ("euler A", "Euler a", None),
        ("k_euler_ancestral", "Euler a", None),
        ("DPM++ 2M Karras", "DPM++ 2M", "Karras"),
        ("dpm++ 2m sgm_uniform", "DPM++ 2M", "SGM Uniform"),
    ],
)
def test_samplers_are_sent_in_the_engines_spelling(name: str, sampler: str, scheduler: str | None) -> None:
    found = understand({"sampler_name": name})
    assert sent(found)["sampler_name"] == sampler
    assert sent(found).get("scheduler") == scheduler
    assert f"sampler:{sampler}" in found.needs
    assert understand({"sampler_index": name}).needs == found.needs


def test_unknown_names_are_refused() -> None:
    assert refused({"sampler_name": "Eular"}).code == "unknown_sampler"
    assert "Euler" in (refused({"sampler_name": "Eular"}).hint or "")
    assert refused({"scheduler": "kerras"}).code == "unknown_scheduler"
    assert refused({"enable_hr": True, "hr_upscaler": "Latnt"}).code == "unknown_upscaler"
    assert refused({"enable_hr": True, "hr_sampler_name": "Nope"}).code == "unknown_sampler"
    assert refused({"override_settings": {"sd_vae": "gone.pt"}}).code == "unknown_vae"
    script = refused({"script_name": "Nope"})
    assert isinstance(script, EngineRefusal)
    # As recorded from the real server.
    assert (script.status, script.message) == (422, "Script 'Nope' not found")
    assert refused({"alwayson_scripts": {"Nope": {"args": []}}}).code == "unknown_script"


def test_scripts_and_loras_are_needs() -> None:
    body = {
        "prompt": "cat <lora:detail:0.8> <lora:gone:1> <lora:more_detail:1:2>",
        "script_name": "X/Y/Z Plot",
        "alwayson_scripts": {"Prompt Matrix": {"args": ["x" * 10]}},
    }
    found = understand(body)
    assert {"lora:detail", "script:txt2img:x/y/z plot", "script:txt2img:prompt matrix"} <= found.needs
    assert not any("gone" in need for need in found.needs)
    assert msgspec.json.decode(found.meta, type=Meta).unknown_loras == ("gone",)


def test_webuiapi_sends_both_sampler_fields_and_no_choice() -> None:
    body = (
        b'{"sampler_name":"Euler a","sampler_index":"Euler a","override_settings":{},"hr_upscaler":"Latent"}'
    )
    assert understand(body).signature == "txt2img/Euler a"


def test_nothing_is_refused_by_an_unknown_catalogue() -> None:
    body = {"sampler_name": "Nope", "scheduler": "x", "override_settings": {"sd_model_checkpoint": "gone"}}
    found = understand(body, catalogue=Catalogue())
    assert found.model == "gone"
    assert found.needs == {"endpoint:txt2img"}


@pytest.mark.parametrize(
    ("body", "loc", "kind"),
    [
        ({"steps": "many"}, ["body", "steps"], "type_error.integer"),
        ({"width": 0}, ["body", "width"], "value_error.number.not_ge"),
        ({"steps": 10**9}, ["body", "steps"], "value_error.number.not_le"),
        ({"n_iter": -1}, ["body", "n_iter"], "value_error.number.not_ge"),
        ({"cfg_scale": []}, ["body", "cfg_scale"], "type_error.float"),
        ({"prompt": ["a"]}, ["body", "prompt"], "type_error.str"),
        ({"override_settings": "x"}, ["body", "override_settings"], "type_error.dict"),
        ({"enable_hr": "maybe"}, ["body", "enable_hr"], "type_error.bool"),
        ({"styles": 3}, ["body", "styles"], "type_error.list"),
        ([1], ["body"], "type_error.dict"),
        (b"{nope", ["body", 0], "value_error.jsondecode"),
        (b'{"cfg_scale": NaN}', ["body", 0], "value_error.jsondecode"),
        (b'{"cfg_scale": 1e999}', ["body", "cfg_scale"], "type_error.float"),
        (b'{"a":' + b"[" * 100_000, ["body", 0], "value_error.jsondecode"),
        (b"\xff\xfe", ["body", 0], "value_error.jsondecode"),
    ],
)
def test_types_are_refused_as_fastapi_does(body: object, loc: list[object], kind: str) -> None:
    error = refused(body)
    assert isinstance(error, Invalid)
    answer = error_answer(error)
    detail = json.loads(answer.body)["detail"]
    assert answer.status == 422
    assert (detail[0]["loc"], detail[0]["type"]) == (loc, kind)


def test_what_pydantic_takes_is_taken() -> None:
    body = {"steps": "20", "width": 640.0, "enable_hr": "off", "prompt": 7, "cfg_scale": "6.5", "seed": None}
    assert understand(body).work == Work(steps=20, pixels=640 * 512)


def test_img2img_without_a_picture_is_told_as_the_engine_does() -> None:
    error = refused({"prompt": "x"}, endpoint="img2img")
    assert isinstance(error, EngineRefusal)
    assert (error.status, error.message) == (404, "Init image not found")


def test_folders_are_an_admins() -> None:
    body = {"override_settings": {"outdir_samples": "/etc"}}
    assert isinstance(refused(body), NotPermitted)
    context = RequestContext(job=JOB, is_admin=True)
    recognize("/sdapi/v1/txt2img", json.dumps(body).encode(), context)


def test_limits_are_settable() -> None:
    context = RequestContext(job=JOB, limits=Limits(steps_max=10))
    with pytest.raises(Invalid):
        recognize("/sdapi/v1/txt2img", b'{"steps":11}', context)


def test_the_digest_is_of_the_content() -> None:
    one = understand(b'{"prompt":"a","steps":3,"force_task_id":"task(1)"}')
    two = understand(b'{"steps":3, "force_task_id":"task(2)","prompt":"a"}')
    assert one.digest == two.digest
    assert understand(b'{"prompt":"b","steps":3}').digest != one.digest
    own = '{"CLIP_stop_at_last_layers":2}'
    assert understand(b'{"prompt":"a","steps":3}', own=own).digest != one.digest


def test_an_infotext_brings_its_own_checkpoint() -> None:
    text = "cat\nSteps: 6, Model hash: 0123456789, Model: tinyB"
    found = understand({"infotext": text}, own='{"sd_model_checkpoint":"tinyA"}')
    assert found.model == "xl/tinyB.safetensors"


def test_other_endpoints_pass_as_they_are() -> None:
    found = understand({"image": "x", "model": "clip"}, endpoint="interrogate")
    assert found.needs == {"endpoint:interrogate"} and found.request.target == "/sdapi/v1/interrogate"
    context = RequestContext(job=JOB)
    detected = recognize("/controlnet/detect", b'{"controlnet_module":"canny"}', context)
    assert detected.request.target == "/controlnet/detect" and detected.kind == "controlnet/detect"


def test_options_that_an_engine_lacks_choose_another_engine() -> None:
    found = understand({"override_settings": {"s_noise": 1.1, "no_such_option": 1}})
    assert "option:s_noise" in found.needs and "option:no_such_option" not in found.needs
    # One's own choice that no engine knows any more is left out; the request's own goes to the engine to be
    # refused.
    assert sent(understand({}, own='{"eta_ddim":1}'))["override_settings"] == {}
