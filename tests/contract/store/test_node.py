"""What a machine keeps for itself survives: id, gpu records, spool, learned values, accounts' options."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from gpulane.core.model import ClaimId, EngineUrl, JobId, JobState, Token
from gpulane.errors import StoreError
from gpulane.store.node import SPOOL_KEPT_SECONDS, GpuRecord, NodeStore, SpoolEntry
from tests.contract.store.ground import ANN, BROKEN, GPU, GPU2, Clock

pytestmark = pytest.mark.anyio

RECORD = GpuRecord(
    gpu=GPU,
    job=JobId("j1"),
    token=Token("1.a"),
    claim=ClaimId("a"),
    engine=EngineUrl("http://127.0.0.1:8188"),
    stage="starting",
    written_at=5.0,
    meta=b'{"prompt_id":"j1"}',
)
ENTRY = SpoolEntry(
    job=JobId("j1"),
    token=Token("1.a"),
    state=JobState.FAILED,
    failure=BROKEN,
    used_seconds=3.5,
    result=b"partial",
)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def node(tmp_path: Path, clock: Clock) -> AsyncIterator[NodeStore]:
    store = NodeStore(tmp_path / "data", clock)
    await store.open()
    yield store
    await store.close()


async def after_crash(folder: Path, clock: Clock, copy: Path) -> NodeStore:
    """Open what lies on the disk while the first store still runs."""
    shutil.copytree(folder, copy)
    store = NodeStore(copy, clock)
    await store.open()
    return store


async def test_id_is_made_once_and_boots_are_counted(tmp_path: Path, clock: Clock) -> None:
    seen: list[tuple[str, int]] = []
    for _ in range(3):
        store = NodeStore(tmp_path, clock)
        await store.open()
        seen.append(store.boot())
        await store.close()
        await store.close()
    assert [boot for _, boot in seen] == [1, 2, 3]
    assert len({node for node, _ in seen}) == 1
    assert len(seen[0][0]) == 16


async def test_gpu_records_survive_a_crash(node: NodeStore, tmp_path: Path, clock: Clock) -> None:
    other = replace(RECORD, gpu=GPU2, token=Token("2.b"))
    await node.put_gpu_record(replace(RECORD, stage="claimed"), other)
    await node.put_gpu_record(RECORD)
    await node.drop_gpu_record(GPU2, Token("another"))
    assert await node.gpu_records() == (RECORD, other)
    await node.drop_gpu_record(GPU2, Token("2.b"))
    copy = await after_crash(tmp_path / "data", clock, tmp_path / "copy")
    assert await copy.gpu_records() == (RECORD,)
    await copy.close()


@pytest.mark.parametrize("result", [None, b"", b"small", b"x" * 100_000])
async def test_spool_keeps_an_outcome_until_it_is_settled(
    node: NodeStore, tmp_path: Path, clock: Clock, result: bytes | None
) -> None:
    entry = replace(ENTRY, result=result)
    for _ in range(2):
        await node.spool_put(entry)
    copy = await after_crash(tmp_path / "data", clock, tmp_path / "copy")
    assert await copy.spool_unsettled() == (entry,)
    await copy.close()
    await node.spool_settle(entry.job, entry.token, JobState.CANCELLED)
    assert await node.spool_unsettled() == ()
    settled = replace(entry, settled=True, recorded_state=JobState.CANCELLED)
    assert await node.spool_settled() == (settled,)
    clock.pass_seconds(SPOOL_KEPT_SECONDS - 1)
    await node.spool_settle(entry.job, entry.token, JobState.SUCCEEDED)  # too late to say otherwise
    assert await node.spool_settled() == (settled,)
    clock.pass_seconds(1)
    await node.spool_settle(JobId("none"), Token("0.x"), JobState.FAILED)
    assert await node.spool_settled() == ()
    assert [p for p in (tmp_path / "data" / "spool").rglob("*") if p.is_file()] == []


async def test_learned_values_are_kept_by_kind(tmp_path: Path, clock: Clock) -> None:
    store = NodeStore(tmp_path, clock)
    await store.open()
    for i in range(1200):
        store.learn_put("load", f"gpu-{i % 600:03}", str(i).encode())
    store.learn_put("speed", "gpu-000", b"2.5")
    loads = await store.learned("load")
    assert len(loads) == 600
    assert loads["gpu-000"] == b"600"
    store.learn_put("speed", "gpu-001", b"3.5")  # not read, only closed
    await store.close()
    store = NodeStore(tmp_path, clock)
    await store.open()
    assert await store.learned("speed") == {"gpu-000": b"2.5", "gpu-001": b"3.5"}
    await store.close()


async def test_account_values(node: NodeStore) -> None:
    assert await node.account_get(ANN, "options") is None
    await node.account_put(ANN, "options", b'{"CLIP_stop_at_last_layers":2}')
    await node.account_put(ANN, "options", b"{}")
    assert await node.account_get(ANN, "options") == b"{}"


async def test_one_process_owns_it(node: NodeStore, tmp_path: Path, clock: Clock) -> None:
    with pytest.raises(StoreError, match="in use by another gpulane"):
        await NodeStore(tmp_path / "data", clock).open()


async def test_closed_store_says_so(tmp_path: Path, clock: Clock) -> None:
    store = NodeStore(tmp_path, clock)
    with pytest.raises(StoreError, match="closed"):
        store.boot()
    with pytest.raises(StoreError, match="closed"):
        await store.gpu_records()
