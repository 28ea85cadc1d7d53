"""Names of several engines as one list, and what each engine offers."""

import json
from pathlib import Path

import pytest

from gpulane.adapters.a1111.catalogue import (
    digest,
    find_by_stem,
    find_checkpoint_loosely,
    find_sampler,
    hinted,
    merged,
    merged_document,
    nearest,
    offers,
    read_catalogue,
)
from tests.unit.adapters.a1111.samples import DOCUMENTS


def test_offers_in_the_words_of_needs() -> None:
    offered = offers(read_catalogue(DOCUMENTS))
    assert {
        "checkpoint:tinyA.safetensors",
        "checkpoint:xl/tinyB.safetensors",
        "sampler:Euler a",
        "scheduler:Karras",
        "upscaler:R-ESRGAN 4x+",
        "upscaler:Latent",
        "vae:nice.vae.pt",
        "lora:detail",
        "script:txt2img:x/y/z plot",
        "endpoint:txt2img",
    } <= offered


def test_endpoints_come_from_the_engines_own_description() -> None:
    openapi = b'{"paths":{"/sdapi/v1/txt2img":{"post":{}},"/controlnet/detect":{"post":{}},"/x":{"get":{}}}}'
    offered = offers(read_catalogue({"openapi": openapi}))
    assert offered == {"endpoint:txt2img", "endpoint:controlnet/detect"}


def test_broken_documents_count_as_not_told() -> None:
    catalogue = read_catalogue({"sd-models": b"<html>", "samplers": b'{"detail":"Not Found"}'})
    assert catalogue.checkpoints is None and catalogue.samplers is None


def test_merged_lists_keep_the_order_of_the_engines() -> None:
    hashed = (
        b'[{"title":"new.ckpt","model_name":"new"},'
        b'{"title":"tinyA.safetensors [ffffffffff]","model_name":"tinyA"}]'
    )
    other = read_catalogue({"sd-models": hashed})
    both = merged([read_catalogue(DOCUMENTS), other])
    assert both.checkpoints is not None
    assert [c.name for c in both.checkpoints] == ["tinyA.safetensors", "xl/tinyB.safetensors", "new.ckpt"]
    assert both.checkpoints[0].title == "tinyA.safetensors [ffffffffff]"
    assert both.samplers is not None and [s.name for s in both.samplers] == ["DPM++ 2M", "Euler a", "Euler"]
    listed = json.loads(merged_document("sd-models", [DOCUMENTS["sd-models"], hashed]))
    assert [m["model_name"] for m in listed] == ["tinyA", "xl_tinyB", "new"]


def test_merged_scripts_and_embeddings() -> None:
    scripts = merged_document(
        "scripts", [DOCUMENTS["scripts"], b'{"txt2img":["new","x/y/z plot"],"img2img":[]}']
    )
    assert json.loads(scripts)["txt2img"] == ["prompt matrix", "x/y/z plot", "new"]
    embeddings = merged_document(
        "embeddings", [b'{"loaded":{"a":{}},"skipped":{}}', b'{"loaded":{"b":{}},"skipped":{}}']
    )
    assert set(json.loads(embeddings)["loaded"]) == {"a", "b"}


def test_old_and_new_sampler_names_together() -> None:
    old = read_catalogue({"samplers": b'[{"name":"DPM++ 2M Karras","aliases":["k_dpmpp_2m_ka"]}]'})
    both = merged([old, read_catalogue(DOCUMENTS)])
    choice = find_sampler(both, "DPM++ 2M Karras")
    assert choice is not None and choice.sampler == "DPM++ 2M Karras" and choice.scheduler is None


def test_post_options_takes_any_part_of_a_title() -> None:
    checkpoints = read_catalogue(DOCUMENTS).checkpoints or ()
    found = find_checkpoint_loosely(checkpoints, "nyB")
    assert found is not None and found.name == "xl/tinyB.safetensors"
    assert find_checkpoint_loosely(checkpoints, "nope") is None
    assert find_by_stem(checkpoints, "tinyB") == found


@pytest.mark.parametrize(
    ("wanted", "first"),
    [
        ("betta", "beta.safetensors"),
        ("BETTA.ckpt", "beta.safetensors"),
        ("gamm", "sub/Gamma XL.safetensors [0123456789]"),
        ("sub/gama xl.safetensors", "sub/Gamma XL.safetensors [0123456789]"),
    ],
)
def test_nearest_names_without_what_people_leave_out(wanted: str, first: str) -> None:
    titles = ["alpha.safetensors", "beta.safetensors", "sub/Gamma XL.safetensors [0123456789]"]
    found = nearest(titles, wanted)
    assert found[0] == first and len(set(found)) == len(found) <= 3


def test_some_names_are_listed_when_none_is_near() -> None:
    assert hinted([f"model{n:03}" for n in range(50)], "qqqq") == "there are: " + ", ".join(
        f"model{n:03}" for n in range(20)
    )
    assert hinted([], "qqqq") is None


def test_the_digest_changes_with_what_is_offered_only() -> None:
    assert digest(DOCUMENTS) == digest(DOCUMENTS | {"options": b"{}"})
    assert digest(DOCUMENTS) != digest(DOCUMENTS | {"loras": b"[]"})


def test_a_real_servers_lists(shared: Path) -> None:
    recorded = json.loads((shared / "recordings/a1111/basic_get.json").read_text())
    documents = {
        e["name"]: json.dumps([i for i in e["response"] if isinstance(i, dict)]).encode()
        for e in recorded
        if e["name"] in {"sd-models", "samplers", "schedulers", "upscalers", "latent-upscale-modes"}
    }
    documents["openapi"] = (shared / "recordings/a1111/openapi.json").read_bytes()
    offered = offers(read_catalogue(documents))
    assert {
        "checkpoint:tinyB.safetensors",
        "sampler:DPM++ 2M",
        "scheduler:Karras",
        "upscaler:Lanczos",
    } <= offered
    assert {"endpoint:train/embedding", "endpoint:img2img"} <= offered
