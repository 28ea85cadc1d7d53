"""What an engine would refuse, told from its node list, in the words that real engines use."""

from importlib.resources import files
from typing import Any

import msgspec
import pytest

from gpulane.adapters.comfyui.validation import Definitions, Verdict, files_of, verdict_of

OBJECT_INFO = msgspec.json.decode(files("gpulane.testing.comfyui").joinpath("object_info.json").read_bytes())
DEFINITIONS = Definitions(msgspec.json.encode(OBJECT_INFO["nodes"] | OBJECT_INFO["test_nodes"]))


def empty(**more: object) -> dict[str, Any]:
    inputs = {"width": 64, "height": 64, "batch_size": 1, "color": 0, **more}
    return {"class_type": "EmptyImage", "inputs": inputs}


def save(source: str, slot: int = 0) -> dict[str, Any]:
    return {"class_type": "SaveImage", "inputs": {"images": [source, slot], "filename_prefix": "x"}}


def judged(**more: Any) -> Verdict:
    absent = more.pop("absent", ())
    targets = more.pop("targets", None)
    body = {"prompt": {name.strip("_"): node for name, node in more.items()}}
    if targets is not None:
        body["partial_execution_targets"] = targets
    verdict = verdict_of(msgspec.json.encode(body), DEFINITIONS, absent=absent)
    assert verdict is not None
    return verdict


def kinds(verdict: Verdict) -> dict[str, list[str]]:
    told: dict[str, Any] = dict(verdict.node_errors)
    return {name: [error["type"] for error in node["errors"]] for name, node in told.items()}


def test_a_sound_prompt_has_no_errors() -> None:
    assert judged(_1=empty(), _2=save("1")) == Verdict()


@pytest.mark.parametrize(
    ("node", "kind"),
    [
        (empty(width="wide"), "invalid_input_type"),
        (empty(width=None), "invalid_input_type"),
        (empty(width=0), "value_smaller_than_min"),
        (empty(width=10**9), "value_bigger_than_max"),
        ({"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64}}, "required_input_missing"),
        ({"class_type": "ImageInvert", "inputs": {"image": ["1"]}}, "bad_linked_input"),
        ({"class_type": "ImageInvert", "inputs": {"image": ["77", 0]}}, "exception_during_inner_validation"),
        ({"class_type": "LoadImage", "inputs": {"image": "gone.png"}}, "custom_validation_failed"),
    ],
)
def test_a_wrong_node_is_named(node: dict[str, Any], kind: str) -> None:
    verdict = judged(_1=node, _2=save("1"), absent={"gone.png"})
    assert verdict.error is not None and verdict.error["type"] == "prompt_outputs_failed_validation"
    assert kind in kinds(verdict)["1"] and list(kinds(verdict)) == ["1"]
    assert verdict.node_errors["1"]["dependent_outputs"] == ["2"]


def test_numbers_as_text_are_numbers() -> None:
    assert judged(_1=empty(width="64"), _2=save("1")) == Verdict()


def test_types_must_fit() -> None:
    latent = {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}}
    verdict = judged(_1=latent, _2=save("1"))
    assert kinds(verdict) == {"2": ["return_type_mismatch"]}
    assert verdict.error is not None and "received_type(LATENT)" in str(verdict.error["details"])


def test_good_outputs_run_beside_bad_ones() -> None:
    verdict = judged(_1=empty(), good=save("1"), bad=save("77"))
    assert verdict.error is None
    assert kinds(verdict) == {"bad": ["exception_during_validation"]}


def test_what_no_output_needs_is_not_judged() -> None:
    assert judged(_1=empty(), _2=save("1"), loose=empty(width="wide")) == Verdict()


def test_a_prompt_without_outputs() -> None:
    told = judged(_1=empty()).error
    assert told is not None and told["type"] == "prompt_no_outputs"
    told = judged(_1=empty(), _2=save("1"), targets=["1"]).error
    assert told is not None and told["type"] == "prompt_no_outputs"


def test_a_class_that_the_engine_lacks_is_not_judged() -> None:
    body = msgspec.json.encode({"prompt": {"1": {"class_type": "Elsewhere", "inputs": {}}, "2": save("1")}})
    assert verdict_of(body, DEFINITIONS) is None


def test_custom_nodes_judge_their_values_themselves() -> None:
    custom = {
        "input": {"required": {"level": ["INT", {"min": 0, "max": 3}], "way": [["a", "b"]]}},
        "output": ["IMAGE"],
        "output_node": True,
        "python_module": "custom_nodes.pack",
    }
    definitions = Definitions(msgspec.json.encode({"Own": custom}))
    node = {"class_type": "Own", "inputs": {"level": 9, "way": "c"}}
    assert verdict_of(msgspec.json.encode({"prompt": {"1": node}}), definitions) == Verdict()
    node = {"class_type": "Own", "inputs": {"level": "high", "way": "c"}}
    verdict = verdict_of(msgspec.json.encode({"prompt": {"1": node}}), definitions)
    assert verdict is not None and verdict.error is not None


def test_a_circle_ends() -> None:
    one = {"class_type": "ImageInvert", "inputs": {"image": ["2", 0]}}
    two = {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}}
    assert judged(_1=one, _2=two, _3=save("1")) == Verdict(), "the engine itself refuses it"


def test_files_of_the_input_folder() -> None:
    names = ["a.png", "sub/b.png", "c.png [output]"]
    nodes = {str(n): {"class_type": "LoadImage", "inputs": {"image": name}} for n, name in enumerate(names)}
    assert files_of(msgspec.json.encode({"prompt": nodes})) == {"a.png", "sub/b.png"}
