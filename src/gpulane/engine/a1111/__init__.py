"""Talks to AUTOMATIC1111, Forge and SD.Next: runs a job as one held request, and knows when the engine is
idle.
"""

from gpulane.engine.a1111.client import A1111Client

__all__ = ["A1111Client"]
