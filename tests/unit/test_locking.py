"""`gpulane.lock` without a gateway: what it says when it cannot work."""

from pathlib import Path

import pytest

import gpulane
from gpulane import locking
from gpulane.errors import ConfigError, GpulaneError


def test_a_gpu_of_another_machine_is_refused_clearly(tmp_path: Path) -> None:
    with pytest.raises(GpulaneError, match="box/gpu0 is not on this machine") as caught:
        locking._flocked(str(tmp_path / "gpu0.lock"), "box/gpu0")
    assert caught.value.hint == "run this on the GPU's own machine"
    assert not (tmp_path / "gpu0.lock").exists()


def test_a_link_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "gpu0.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(GpulaneError, match="cannot be opened"):
        locking._flocked(str(tmp_path / "gpu0.lock"), "box/gpu0")


def test_a_wrong_address_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("nonsense", "http://", "http://[1", "http://127.0.0.1:x"):
        with pytest.raises(ConfigError, match="is no URL of a gateway"):
            gpulane.lock("gpu0", url=url)
    monkeypatch.setenv("GPULANE_URL", "http://127.0.0.1:1")
    with pytest.raises(GpulaneError, match=r"no gateway at http://127\.0\.0\.1:1"), gpulane.lock("gpu0"):
        raise AssertionError("never held")


def test_the_package_has_nothing_else() -> None:
    with pytest.raises(AttributeError, match="no attribute 'unlock'"):
        _ = getattr(gpulane, "unlock")  # noqa: B009 - what is asked for at run time


def test_only_a_drivers_uuid_is_told_to_cuda() -> None:
    held = locking.HeldGpu(name="box/gpu0", uuid="GPU-7", lock_file="f", job="j", seconds_max=1, file=0)
    assert held.environment["CUDA_VISIBLE_DEVICES"] == "GPU-7"
    held.uuid = "engines-7"
    assert held.environment == {"GPULANE_GPU": "box/gpu0", "GPULANE_LOCK_FILE": "f"}
