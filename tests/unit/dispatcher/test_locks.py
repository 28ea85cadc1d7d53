"""Who owns a gpu: one process at a time, and never by way of a link."""

import os
from pathlib import Path

import pytest

from gpulane.dispatcher.locks import GpuLocks
from gpulane.errors import ConfigError


def test_a_second_owner_is_told_who_has_it(tmp_path: Path) -> None:
    first, second = GpuLocks(tmp_path), GpuLocks(tmp_path)
    first.own("gpu0")
    with pytest.raises(ConfigError, match=str(os.getpid())):
        second.own("gpu0")
    second.own("gpu1")
    first.release()
    second.own("gpu0")
    second.release()
    assert (tmp_path / "gpu0.owner").exists(), "a lock file is never deleted"


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "precious"
    victim.write_text("content")
    (tmp_path / "gpu0.owner").symlink_to(victim)
    with pytest.raises(ConfigError, match="lock_dir"):
        GpuLocks(tmp_path).own("gpu0")
    assert victim.read_text() == "content"


def test_no_descriptor_is_left_behind(tmp_path: Path) -> None:
    first, second = GpuLocks(tmp_path), GpuLocks(tmp_path)
    first.own("gpu0")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with pytest.raises(ConfigError):
            second.own("gpu0")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    first.release()
