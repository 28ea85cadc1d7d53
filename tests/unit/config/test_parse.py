"""Settings from YAML: defaults, normal forms, and refusals that say what and where."""

import pytest

from gpulane.config import EngineSettings, Settings, parse_settings
from gpulane.config.parse import is_loopback, listen_address
from gpulane.errors import ConfigError


def test_only_gpus_are_required() -> None:
    settings = parse_settings(
        "gpus: {gpu0: {engines: [7860, '8188', 'http://box:1/', {url: '11434', service: http}]}}"
    )
    assert settings.gpus["gpu0"].engines == (
        EngineSettings(url="http://127.0.0.1:7860"),
        EngineSettings(url="http://127.0.0.1:8188"),
        EngineSettings(url="http://box:1"),
        EngineSettings(url="http://127.0.0.1:11434", service="http"),
    )
    assert settings.listen == "127.0.0.1:8800"


def test_empty_text_is_all_defaults() -> None:
    assert parse_settings("") == Settings()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lsten: 1", "unknown setting 'lsten', did you mean 'listen'?"),
        ("limits: {body_mb: 3}", "unknown setting 'body_mb' in limits, did you mean 'body_mib'?"),
        (
            "gpus: {a: {engines: [1], vram: 3}}",
            "unknown setting 'vram' in gpus[...], did you mean 'vram_gib'?",
        ),
        ("gpus: {a: {engines: [{url: '1', sevice: x}]}}", "did you mean 'service'?"),
        ("keys: [{acount: x}]", "did you mean 'account'?"),
        ("gpus: {a: {engines: []}}", "needs at least one engine"),
        ("gpus: {'a b': {engines: [1]}}", "is no name for a GPU"),
        ("gpus: {a: {engines: [1], vram_gib: 0}}", "vram_gib must be above 0"),
        ("gpus: {a: {engines: [1], speed: -1}}", "speed must be above 0"),
        ("gpus: {a: {engines: [8188]}, b: {engines: ['127.0.0.1:8188']}}", "on the GPUs a and b"),
        ("gpus: {a: {engines: [8188, 8188]}}", "twice on GPU a"),
        ("gpus: 3", "Expected `object`, got `int`"),
        ("listen: nowhere", "is no address"),
        ("listen: 0.0.0.0:80", "--allow-anonymous"),
        ("listen_a1111: 0.0.0.0:80", "listen_a1111"),
        ("gpus: {a: {engines: [{url: '1', listen: '0.0.0.0:5'}]}}", "gpus.a: listen"),
        ("gpus: {a: {engines: [{url: '1', probe_path: health}]}}", "write a path such as /health"),
        ("keys: [{account: x, sha256: abc}]", "64 hex digits"),
        ("trusted_proxies: [nowhere]", "is no address or network"),
        ("store: postgres", "write sqlite, memory or redis://"),
        ("a: [", "line 1"),
        ("limits: {queued_max: many}", "Expected `int`"),
    ],
)
def test_a_wrong_setting_is_one_line_that_says_what_and_where(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_settings(text, source="gpulane.yaml")
    assert said in caught.value.message
    assert caught.value.message.startswith("gpulane.yaml")
    assert "\n" not in caught.value.message


def test_beyond_loopback_with_keys_or_with_the_word() -> None:
    key = "{account: ann, sha256: " + "a" * 64 + "}"
    assert parse_settings(f"listen: 0.0.0.0:80\nkeys: [{key}]").keys[0].account == "ann"
    assert parse_settings("listen: 0.0.0.0:80", allow_anonymous=True).allow_anonymous
    assert parse_settings("listen: 0.0.0.0:80\nallow_anonymous: true").listen == "0.0.0.0:80"


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("8800", ("127.0.0.1", 8800)),
        ("[::1]:1", ("::1", 1)),
        ("localhost:0", ("localhost", 0)),
        (":9", ("127.0.0.1", 9)),
    ],
)
def test_listen_addresses(text: str, address: tuple[str, int]) -> None:
    assert listen_address(text) == address


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.9.9.9", True), ("::1", True), ("localhost", True), ("::", False), ("box", False)],
)
def test_loopback(host: str, *, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_a_bare_port_is_a_number_in_yaml() -> None:
    text = "gpus: {a: {engines: [{url: 8188, service: comfyui}, {url: 7860}], warm_together: [[8188, 7860]]}}"
    gpu = parse_settings(text).gpus["a"]
    assert [e.url for e in gpu.engines if isinstance(e, EngineSettings)] == [
        "http://127.0.0.1:8188",
        "http://127.0.0.1:7860",
    ]
    assert gpu.warm_together == (("8188", "7860"),)


def test_only_a_port_may_be_a_number() -> None:
    with pytest.raises(ConfigError, match="Expected `str`"):
        parse_settings("gpus: {a: {engines: [{url: 8188, name: 5}]}}")
