"""Bodies of POST /prompt: what is understood, what is left out, what is refused and how."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpulane.adapters.base import Recognized
from gpulane.adapters.comfyui.catalog import read_catalog
from gpulane.adapters.comfyui.prompt import (
    PromptLimits,
    graph_of,
    parse_prompt,
    read_meta,
    with_client_id,
)
from gpulane.adapters.comfyui.refusals import PromptRefused, error_answer, impossible_answer
from gpulane.core.model import NO_MODEL, JobId, Work
from gpulane.errors import ClientError, Impossible, Throttled, TooLarge

JOB = JobId("c72bac4e-fb15-4d8b-9505-539657dcc911")

TEXT_TO_IMAGE: dict[str, Any] = {
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sdxl.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 1024, "height": 512, "batch_size": 2}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["4", 1]}},
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 18446744073709551615,
            "steps": 20,
            "cfg": 8.0,
            "sampler_name": "euler",
            "scheduler": "normal",
            "denoise": 1.0,
            "model": ["4", 0],
            "positive": ["6", 0],
            "negative": ["7", 0],
            "latent_image": ["5", 0],
        },
        "_meta": {"title": "KSampler"},
    },
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x", "images": ["8", 0]}},
}


def parse(value: object, **more: Any) -> Recognized:
    return parse_prompt(json.dumps(value).encode(), job=JOB, **more)


def sent(job: Recognized) -> dict[str, Any]:
    return json.loads(job.request.body)


def refusal(value: object) -> dict[str, Any]:
    with pytest.raises(ClientError) as caught:
        parse_prompt(value if isinstance(value, bytes) else json.dumps(value).encode(), job=JOB)
    answer = error_answer(caught.value)
    told = json.loads(answer.body)
    assert set(told) == {"error", "node_errors"}
    assert set(told["error"]) == {"type", "message", "details", "extra_info"}
    assert answer.status in {400, 413}
    return told["error"]


def test_body_is_rebuilt_from_what_is_known() -> None:
    job = parse(
        {
            "prompt": TEXT_TO_IMAGE,
            "client_id": "tab-1",
            "prompt_id": "my-own-id",
            "number": -99,
            "front": True,
            "anything": 1,
            "partial_execution_targets": ["9"],
            "extra_data": {
                "extra_pnginfo": {"workflow": {"nodes": []}},
                "client_id": "other",
                "create_time": 1,
            },
        }
    )
    assert sent(job) == {
        "prompt_id": JOB,
        "prompt": TEXT_TO_IMAGE,
        "extra_data": {"extra_pnginfo": {"workflow": {"nodes": []}}},
        "partial_execution_targets": ["9"],
    }
    assert job.client_job_id == "my-own-id"
    meta = read_meta(job.meta)
    assert (meta.client_id, meta.priority, meta.number) == ("tab-1", 1, -99.0)
    assert json.loads(with_client_id(job.request.body, 'a"b')) == sent(job) | {"client_id": 'a"b'}


def test_size_model_and_needs_of_a_text_to_image_graph() -> None:
    combos = frozenset({("CheckpointLoaderSimple", "ckpt_name"), ("KSampler", "sampler_name")})
    job = parse({"prompt": TEXT_TO_IMAGE}, combos=combos)
    assert job.work == Work(steps=20, pixels=1024 * 512, images=2)
    assert job.model == "sdxl.safetensors"
    assert job.needs == {f"node:{node['class_type']}" for node in TEXT_TO_IMAGE.values()} | {
        "CheckpointLoaderSimple.ckpt_name=sdxl.safetensors",
        "KSampler.sampler_name=euler",
    }


def changed(**inputs: object) -> dict[str, Any]:
    graph: dict[str, Any] = json.loads(json.dumps(TEXT_TO_IMAGE))
    graph["3"]["inputs"] |= inputs
    return graph


def test_signature_is_of_the_shape_alone() -> None:
    base = parse({"prompt": TEXT_TO_IMAGE})
    renamed = json.loads(json.dumps(TEXT_TO_IMAGE).replace('"3"', '"33"').replace('"4"', '"a:4"'))
    assert parse({"prompt": changed(seed=1, steps=99)}).signature == base.signature
    assert parse({"prompt": renamed}).signature == base.signature
    assert parse({"prompt": changed(negative=["4", 1])}).signature != base.signature
    assert parse({"prompt": changed(seed=1)}).digest != base.digest
    assert parse({"prompt": TEXT_TO_IMAGE, "prompt_id": "x", "number": 3}).digest == base.digest


def test_second_pass_is_added_and_scaled() -> None:
    graph = changed()
    graph["10"] = {"class_type": "LatentUpscaleBy", "inputs": {"samples": ["3", 0], "scale_by": 2}}
    graph["11"] = {"class_type": "KSampler", "inputs": {"steps": ["12", 0], "latent_image": ["10", 0]}}
    graph["12"] = {"class_type": "PrimitiveInt", "inputs": {"value": 10}}
    work = parse({"prompt": graph}).work
    assert (work.pixels, work.images) == (2048 * 1024, 2)
    assert work.steps == 15  # 20 at a quarter of the pixels, and 10


def test_custom_sampler_finds_its_size_through_the_sampler_that_reads_its_steps() -> None:
    graph = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "flux.safetensors"}},
        "2": {"class_type": "ModelSamplingFlux", "inputs": {"model": ["1", 0], "width": 64, "height": 64}},
        "3": {"class_type": "BasicScheduler", "inputs": {"model": ["2", 0], "steps": 28}},
        "4": {
            "class_type": "EmptyHunyuanLatentVideo",
            "inputs": {"width": 832, "height": 480, "length": 25, "batch_size": 1},
        },
        "5": {
            "class_type": "SamplerCustomAdvanced",
            "inputs": {"sigmas": ["3", 0], "latent_image": ["4", 0]},
        },
    }
    job = parse({"prompt": graph})
    assert job.work == Work(steps=28, pixels=832 * 480, images=25)
    assert job.model == "flux.safetensors"


def test_part_of_a_schedule_counts_as_that_part() -> None:
    graph = changed(start_at_step=12, end_at_step=10000)
    assert parse({"prompt": graph}).work.steps == 8


def test_loader_that_nobody_reads_is_no_model() -> None:
    graph = {"1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "x.safetensors"}}}
    assert parse({"prompt": graph}).model == NO_MODEL


def test_secrets_go_to_the_engine_and_nowhere_else() -> None:
    extra = {"auth_token_comfy_org": "hush-1", "api_key_comfy_org": "hush-2", "comfy_usage_source": "page"}
    job = parse({"prompt": TEXT_TO_IMAGE, "extra_data": extra})
    assert sent(job)["extra_data"] == extra
    assert b"hush" not in job.meta
    assert read_meta(job.meta).secrets == ("api_key_comfy_org", "auth_token_comfy_org")
    assert (
        parse({"prompt": TEXT_TO_IMAGE, "extra_data": extra | {"auth_token_comfy_org": "new"}}).digest
        == job.digest
    )


@pytest.mark.parametrize(
    "extra", [None, {}, {"extra_pnginfo": None}, {"extra_pnginfo": {"workflow": None}}, {"extra_pnginfo": {}}]
)
def test_null_in_extra_data_never_reaches_the_engine(extra: object) -> None:
    assert sent(parse({"prompt": TEXT_TO_IMAGE, "extra_data": extra}))["extra_data"] == {}


NODE = b'{"1":{"class_type":"A","inputs":{}}}'


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{not json", "invalid_prompt"),
        (b"", "invalid_prompt"),
        (b"[1]", "no_prompt"),
        (b"{}", "no_prompt"),
        (b'{"prompt":null}', "invalid_prompt"),
        (b'{"prompt":[]}', "invalid_prompt"),
        (b'{"prompt":{}}', "prompt_no_outputs"),
        (b'{"prompt":{"1":[]}}', "invalid_prompt"),
        (b'{"prompt":{"1":{"inputs":{}}}}', "missing_node_type"),
        (b'{"prompt":{"1":{"class_type":7,"inputs":{}}}}', "missing_node_type"),
        (b'{"prompt":{"1":{"class_type":"A"}}}', "invalid_prompt"),
        (b'{"prompt":{"1":{"class_type":"A","inputs":[]}}}', "invalid_prompt"),
        (b'{"prompt":{"1":{"class_type":"A","inputs":{"x":NaN}}}}', "invalid_prompt"),
        (b'{"prompt":{"1":{"class_type":"A","inputs":{"x":-Infinity}}}}', "invalid_prompt"),
        (b'{"prompt":{"1":{"class_type":"A","inputs":{"x":[1e999]}}}}', "invalid_prompt"),
        (b'{"prompt":{"1":{"class_type":"A","inputs":{"x":' + b"9" * 400 + b".0}}}}", "invalid_prompt"),
        (b'{"prompt":{"1":{"class_type":"A","inputs":{"x":"\xff"}}}}', "invalid_prompt"),
        (b'{"prompt":' + NODE + b',"number":NaN}', "invalid_prompt"),
        (b'{"prompt":' + NODE + b',"number":"abc"}', "invalid_prompt"),
        (b'{"prompt":' + NODE + b',"number":true}', "invalid_prompt"),
        (b'{"prompt":' + NODE + b',"extra_data":[]}', "invalid_prompt"),
        (b'{"prompt":' + NODE + b',"extra_data":"x"}', "invalid_prompt"),
        (b'{"prompt":' + NODE + b',"extra_data":{"extra_pnginfo":7}}', "invalid_prompt"),
        (b'{"prompt":' + NODE + b',"extra_data":{"extra_pnginfo":{"workflow":[]}}}', "invalid_prompt"),
        (b'{"prompt":' + NODE + b',"partial_execution_targets":"9"}', "invalid_prompt"),
        (b'{"prompt":' + NODE + b',"partial_execution_targets":[9]}', "invalid_prompt"),
        (b'{"prompt":' + NODE + b',"prompt_id":{}}', "invalid_prompt"),
        (b'{"prompt":' + NODE + b',"prompt_id":"' + b"x" * 201 + b'"}', "invalid_prompt"),
        (b'{"prompt":' + NODE + b',"client_id":["a"]}', "invalid_prompt"),
        (
            b'{"prompt":{"1":{"class_type":"A","inputs":{"x":' + b"[" * 100 + b"]" * 100 + b"}}}}",
            "invalid_prompt",
        ),
        (
            b'{"prompt":{"1":{"class_type":"A","inputs":{"x":' + b"[" * 9999 + b"]" * 9999 + b"}}}}",
            "invalid_prompt",
        ),
    ],
)
def test_poison_is_refused_in_comfyuis_shape(body: bytes, code: str) -> None:
    assert refusal(body)["type"] == code


def test_missing_class_names_its_node() -> None:
    told = refusal({"prompt": {"17": {"inputs": {}}}})
    assert told["details"] == "Node ID '#17'"
    assert told["extra_info"]["node_id"] == "17"


def test_limits_are_413_and_a_full_queue_429() -> None:
    with pytest.raises(TooLarge):
        parse({"prompt": TEXT_TO_IMAGE}, limits=PromptLimits(body_bytes_max=100))
    with pytest.raises(TooLarge):
        parse({"prompt": TEXT_TO_IMAGE}, limits=PromptLimits(nodes_max=3))
    with pytest.raises(TooLarge):
        parse({"prompt": TEXT_TO_IMAGE}, limits=PromptLimits(inputs_max=9))
    answer = error_answer(Throttled("The queue is full.", hint="Wait."))
    assert answer.status == 429
    assert json.loads(answer.body)["error"]["type"] == "queue_full"


def test_what_no_engine_has_is_marked_at_its_node() -> None:
    graph = graph_of(parse({"prompt": TEXT_TO_IMAGE}).request.body)
    error = Impossible("gpu0: no such model")
    told = json.loads(
        impossible_answer(graph, frozenset({"CheckpointLoaderSimple.ckpt_name=sdxl.safetensors"}), error).body
    )
    assert told["error"]["type"] == "prompt_outputs_failed_validation"
    assert told["error"]["details"] == "gpu0: no such model"
    assert told["node_errors"]["4"]["errors"][0]["type"] == "value_not_in_list"
    told = json.loads(impossible_answer(graph, frozenset({"node:VAEDecode"}), error).body)
    assert (told["error"]["type"], told["error"]["extra_info"]["node_id"]) == ("missing_node_type", "8")


def test_pictures_in_a_prompt_pass_unread() -> None:
    graph = changed()
    graph["20"] = {
        "class_type": "LoadImageBase64",
        "inputs": {"image": "e999" * 250_000, "deep": [[[1]]], "on": True},
    }
    assert sent(parse({"prompt": graph}))["prompt"] == graph


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers(-(2**70), 2**70) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)
fields = st.sampled_from(
    ["prompt", "prompt_id", "client_id", "number", "front", "extra_data", "partial_execution_targets", "x"]
)
prompts = st.dictionaries(
    st.text(max_size=4),
    st.fixed_dictionaries(
        {
            "class_type": st.text(max_size=8),
            "inputs": st.dictionaries(st.text(max_size=8), json_values, max_size=4),
        }
    ),
    max_size=4,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(fields, json_values, max_size=8), prompts | json_values)
def test_whatever_comes_is_refused_or_sound(body: dict[str, object], prompt: object) -> None:
    raw = json.dumps(body | {"prompt": prompt}).encode()
    try:
        job = parse_prompt(raw, job=JOB)
    except (PromptRefused, TooLarge):
        return
    text = job.request.body.decode()
    value: dict[str, Any] = json.loads(text, parse_constant=pytest.fail)
    assert set(value) <= {"prompt_id", "prompt", "extra_data", "partial_execution_targets"}
    assert value["prompt_id"] == JOB
    assert value["prompt"] == prompt
    extra: dict[str, Any] = value["extra_data"]
    assert type(extra) is dict
    assert isinstance(extra.get("extra_pnginfo", {}), dict)
    assert isinstance(extra.get("extra_pnginfo", {}).get("workflow", {}), dict)
    assert "client_id" not in extra
    msgspec.json.decode(job.meta)


@pytest.mark.parametrize("version", ["0.3.64", "0.27.0"])
@pytest.mark.parametrize("name", ["run_ksampler", "queue_order", "cancel", "poison"])
def test_recorded_prompts_are_understood_as_the_engine_did(shared: Path, version: str, name: str) -> None:
    recording = json.loads((shared / "recordings" / "comfyui" / version / f"{name}.json").read_text())
    catalog = read_catalog(
        (shared / "recordings" / "comfyui" / version / "object_info_full.json").read_bytes()
    )
    posts = [
        x
        for x in recording["http"]
        if "request" in x and x["request"]["path"] == "/prompt" and x["request"]["json"]
    ]
    assert posts
    for post in posts:
        if post["status"] != 200:
            continue
        job = parse(post["request"]["json"], combos=catalog.combos)
        assert sent(job)["prompt"] == post["request"]["json"]["prompt"]
        assert job.needs


def test_names_of_saved_files_are_tagged_where_several_engines_count_alike() -> None:
    graph = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 8}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "a/b"}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": ["1", 0]}},
    }
    body = msgspec.json.encode({"prompt": graph})
    plain = parse_prompt(body, job=JobId("j"))
    tagged = parse_prompt(body, job=JobId("j"), name_tag="0123ab")
    nodes = msgspec.json.decode(tagged.request.body)["prompt"]
    assert nodes["2"]["inputs"]["filename_prefix"] == "a/b_0123ab"
    assert nodes["3"]["inputs"]["filename_prefix"] == ["1", 0]
    assert msgspec.json.decode(plain.request.body)["prompt"] == graph
    assert plain.digest == tagged.digest, "the same prompt is the same job"
