"""What `submit` makes of its arguments."""

import msgspec
import pytest

from gpulane.cli.workflows import (
    SEEDS_MAX,
    read_payload,
    read_workflow,
    seeds_from,
    with_inputs,
    with_keys,
    with_seed,
)
from gpulane.errors import ConfigError

WORKFLOW: dict[str, dict[str, object]] = {
    "3": {"class_type": "KSampler", "inputs": {"seed": 1, "steps": 20, "model": ["4", 0]}},
    "4": {
        "class_type": "Loader",
        "inputs": {"ckpt_name": "a.safetensors"},
        "_meta": {"title": "Load Checkpoint"},
    },
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "x"}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "y"}},
}


@pytest.mark.parametrize(
    ("setting", "node", "key", "value"),
    [
        ("3.steps=7", "3", "steps", 7),
        ("KSampler.seed=12", "3", "seed", 12),
        ("Load Checkpoint.ckpt_name=b.safetensors", "4", "ckpt_name", "b.safetensors"),
        ("6.text=a = b", "6", "text", "a = b"),
        ('6.text="7"', "6", "text", "7"),
        ('3.model=["4", 1]', "3", "model", ["4", 1]),
    ],
)
def test_set_finds_the_node_by_id_class_or_title(setting: str, node: str, key: str, value: object) -> None:
    changed = with_inputs(WORKFLOW, [setting])
    assert changed[node]["inputs"][key] == value  # type: ignore[index]  # foreign data
    assert WORKFLOW["3"]["inputs"] == {"seed": 1, "steps": 20, "model": ["4", 0]}, "the original stays"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("steps=7", "write NODE.INPUT=VALUE"),
        ("3.steps", "write NAME=VALUE"),
        ("9.steps=7", "no node '9'"),
        ("CLIPTextEncode.text=z", "several nodes are called"),
        ("3.step=7", "has no input 'step'"),
    ],
)
def test_set_guesses_nothing(setting: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_inputs(WORKFLOW, [setting])
    assert words in caught.value.message
    assert "\n" not in f"{caught.value.message}{caught.value.hint}"


def test_keys_of_a_payload_may_lie_inside_an_object() -> None:
    found = with_keys({"steps": 5}, ["prompt=a fox", "override_settings.sd_model_checkpoint=x", "steps=9"])
    assert found == {"prompt": "a fox", "override_settings": {"sd_model_checkpoint": "x"}, "steps": 9}
    with pytest.raises(ConfigError, match="is no object"):
        with_keys({"steps": 5}, ["steps.more=1"])


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        (None, (None,)),
        ("5", (5,)),
        ("1..3", (1, 2, 3)),
        ("7, 9..10", (7, 9, 10)),
        (str(2**64 - 1), (2**64 - 1,)),
    ],
)
def test_seeds(text: str | None, seeds: tuple[int | None, ...]) -> None:
    assert seeds_from(text) == seeds


@pytest.mark.parametrize(
    "text", ["", "x", "3..1", "1..", "-1", f"0..{SEEDS_MAX}", f"1..{SEEDS_MAX},5", str(2**64), "1-3"]
)
def test_wrong_seeds_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--seeds"):
        seeds_from(text)


def test_a_seed_goes_into_every_number_called_so() -> None:
    linked: dict[str, dict[str, object]] = {
        **WORKFLOW,
        "9": {"class_type": "X", "inputs": {"noise_seed": 4, "seed": ["3", 0]}},
    }
    changed = with_seed(linked, 77)
    assert changed["3"]["inputs"]["seed"] == 77  # type: ignore[index]  # foreign data
    assert changed["9"]["inputs"] == {"noise_seed": 77, "seed": ["3", 0]}
    with pytest.raises(ConfigError, match="no node of this workflow has a seed"):
        with_seed({"1": {"class_type": "X"}}, 1)


def test_workflow_files() -> None:
    assert read_workflow(msgspec.json.encode(WORKFLOW), "w.json") == WORKFLOW
    assert read_workflow(msgspec.json.encode({"prompt": WORKFLOW}), "w.json") == WORKFLOW
    editor = b'{"nodes": [], "links": [], "version": 0.4}'
    with pytest.raises(ConfigError, match="as the editor saves it") as caught:
        read_workflow(editor, "w.json")
    assert "Export (API)" in str(caught.value.hint)


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff", b'{"1": 3}', b'{"1": {}}', b"{}"])
def test_what_is_no_workflow_is_refused_in_one_line(text: bytes) -> None:
    with pytest.raises(ConfigError) as caught:
        read_workflow(text, "w.json")
    assert caught.value.message.startswith("w.json is")
    assert "\n" not in caught.value.message


def test_payload_is_an_object() -> None:
    assert read_payload(b'{"steps": 3}', "-") == {"steps": 3}
    with pytest.raises(ConfigError):
        read_payload(b"[]", "-")
