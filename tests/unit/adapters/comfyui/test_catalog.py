"""What an engine offers, told by its /object_info."""

import json
from pathlib import Path
from typing import Any

import pytest

from gpulane.adapters.comfyui.catalog import merge_object_info, object_info_of, read_catalog


def node(**inputs: Any) -> dict[str, Any]:
    return {"input": {"required": inputs}, "output": ["X"], "name": "N"}


OLD = {"Loader": node(ckpt_name=[["a.safetensors", "b.ckpt"], {"tooltip": "t"}])}
NEW = {"Loader": node(ckpt_name=["COMBO", {"options": ["b.ckpt", "c.safetensors"], "multiselect": False}])}


@pytest.mark.parametrize(
    "form", [OLD, {"Loader": node(ckpt_name=["COMBO", {"options": ["a.safetensors", "b.ckpt"]}])}]
)
def test_both_forms_of_lists_are_read(form: object) -> None:
    catalog = read_catalog(json.dumps(form).encode())
    assert catalog.offers == {"node:Loader", "Loader.ckpt_name=a.safetensors", "Loader.ckpt_name=b.ckpt"}
    assert catalog.combos == {("Loader", "ckpt_name")}


def test_files_of_the_input_folder_are_no_offers() -> None:
    info = {
        "LoadImage": node(image=[["x.png"], {"image_upload": True}]),
        "Remote": node(model_name=["COMBO", {"remote": {"route": "/r"}, "options": ["a"]}]),
    }
    catalog = read_catalog(json.dumps(info).encode())
    assert catalog.offers == {"node:LoadImage", "node:Remote"}
    assert catalog.combos == frozenset()


def test_only_lists_of_models_are_worth_a_need() -> None:
    info = {"A": node(crop=[["no", "center"]], lora_01=[["None", "x.safetensors"]], sampler_name=[[]])}
    catalog = read_catalog(json.dumps(info).encode())
    assert catalog.combos == {("A", "lora_01"), ("A", "sampler_name")}
    assert "A.crop=no" in catalog.offers


def test_broken_nodes_are_offered_by_name_alone() -> None:
    info: dict[str, Any] = {
        "A": {"input": [1]},
        "B": {"input": {"required": [1], "optional": {"x": 7, "y": []}}},
        "C": {},
    }
    assert read_catalog(json.dumps(info).encode()).offers == {"node:A", "node:B", "node:C"}


@pytest.mark.parametrize("junk", [b"", b"<html>", b"[]"])
def test_no_catalog_is_an_error(junk: bytes) -> None:
    with pytest.raises(ValueError):
        read_catalog(junk)


def test_merge_unites_classes_and_lists_in_order() -> None:
    one = OLD | {"Only1": node(x=["INT", {}])}
    two = NEW | {"Only2": node(x=["INT", {}])}
    merged = json.loads(merge_object_info([json.dumps(one).encode(), json.dumps(two).encode()]))
    assert list(merged) == ["Loader", "Only1", "Only2"]
    assert merged["Loader"]["input"]["required"]["ckpt_name"] == [
        ["a.safetensors", "b.ckpt", "c.safetensors"],
        {"tooltip": "t"},
    ]
    again = merge_object_info([json.dumps(two).encode(), json.dumps(one).encode()])
    assert json.loads(again)["Loader"]["input"]["required"]["ckpt_name"][1]["options"] == [
        "b.ckpt",
        "c.safetensors",
        "a.safetensors",
    ]


def test_one_class_of_a_document() -> None:
    document = json.dumps(OLD).encode()
    assert json.loads(object_info_of(document, "Loader")) == OLD
    assert object_info_of(document, "Nope") == b"{}"


@pytest.mark.parametrize(("version", "classes"), [("0.3.64", 390), ("0.27.0", 573)])
def test_recorded_catalogs(shared: Path, version: str, classes: int) -> None:
    raw = (shared / "recordings" / "comfyui" / version / "object_info_full.json").read_bytes()
    catalog = read_catalog(raw)
    assert sum(offer.startswith("node:") for offer in catalog.offers) == classes
    assert "KSampler.sampler_name=euler" in catalog.offers
    assert "BasicScheduler.scheduler=karras" in catalog.offers
    assert {("CheckpointLoaderSimple", "ckpt_name"), ("KSampler", "sampler_name")} <= catalog.combos
    assert ("LoadImage", "image") not in catalog.combos
    assert merge_object_info([raw]) == raw


def test_recorded_versions_merge(shared: Path) -> None:
    raws = [
        (shared / "recordings" / "comfyui" / version / "object_info_full.json").read_bytes()
        for version in ("0.3.64", "0.27.0")
    ]
    old, new = (json.loads(raw) for raw in raws)
    merged = json.loads(merge_object_info(raws))
    assert set(merged) == set(old) | set(new)
    samplers = merged["KSampler"]["input"]["required"]["sampler_name"][0]
    assert (
        samplers[: len(old["KSampler"]["input"]["required"]["sampler_name"][0])]
        == (old["KSampler"]["input"]["required"]["sampler_name"][0])
    )
    assert "exp_heun_2_x0" in samplers
