"""One address in front of every GPU. `with gpulane.lock("gpu0"):` holds a GPU for a program of one's own."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpulane.locking import lock as lock

__all__ = ["lock"]


def __getattr__(name: str) -> object:
    """Import what is asked for only then: other programs import us for one thing."""
    if name != "lock":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gpulane.locking import lock

    return lock
