"""A1111's front door: one `/sdapi/v1` and one page over all A1111 and Forge engines.

Each account has its own options, progress and interrupt. What is a job goes through the queue; what asks
about jobs or options is answered from the gateway's own knowledge; the rest is relayed. Nothing here may
reach an engine's gpu beside the queue.
"""

from gpulane.web.a1111.front import A1111Front

__all__ = ["A1111Front"]
