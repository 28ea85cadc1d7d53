"""The outbox: bounded, previews go first, and what must not be missed is never dropped."""

from __future__ import annotations

from gpulane.web.comfyui.outbox import (
    BYTES_MAX,
    BYTES_SOFT_MAX,
    MESSAGES_MAX,
    MESSAGES_SOFT_MAX,
    Letter,
    Outbox,
    Worth,
)


def letter(number: int, worth: Worth, size: int = 4) -> Letter:
    return Letter(data=number.to_bytes(4, "big").ljust(size), is_text=True, worth=worth)


def taken(outbox: Outbox) -> list[tuple[int, Worth]]:
    found: list[tuple[int, Worth]] = []
    while (one := outbox.take()) is not None:
        found.append((int.from_bytes(one.data[:4], "big"), one.worth))
    return found


def test_all_come_in_order_below_the_limit() -> None:
    outbox = Outbox()
    for number in range(MESSAGES_SOFT_MAX):
        assert outbox.put(letter(number, Worth(number % 3)))
    assert [number for number, _ in taken(outbox)] == list(range(MESSAGES_SOFT_MAX))
    assert outbox.bytes_waiting == 0


def test_oldest_previews_go_before_progress() -> None:
    outbox = Outbox()
    for number in range(MESSAGES_SOFT_MAX):
        outbox.put(letter(number, Worth.PREVIEW if number % 2 else Worth.PROGRESS))
    assert outbox.put(letter(9999, Worth.ESSENTIAL))
    left = taken(outbox)
    assert len(left) == MESSAGES_SOFT_MAX
    assert left[0] == (0, Worth.PROGRESS)
    assert left[1] == (2, Worth.PROGRESS)  # 1 was the oldest preview
    assert left[-1] == (9999, Worth.ESSENTIAL)


def test_large_previews_are_dropped_by_bytes() -> None:
    outbox = Outbox()
    for number in range(10):
        assert outbox.put(letter(number, Worth.PREVIEW, size=BYTES_SOFT_MAX // 2))
    assert [number for number, _ in taken(outbox)] == [8, 9]


def test_too_much_that_must_not_be_missed_gives_up() -> None:
    outbox = Outbox()
    for number in range(MESSAGES_MAX):
        assert outbox.put(letter(number, Worth.ESSENTIAL))
    assert not outbox.put(letter(0, Worth.ESSENTIAL))
    outbox.clear()
    assert len(outbox) == 0
    assert not outbox.put(letter(0, Worth.ESSENTIAL, size=BYTES_MAX + 1))
