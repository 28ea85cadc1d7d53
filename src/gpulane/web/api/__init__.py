"""The native API under /gpulane/v1: jobs, gpus, queue, streams, and its own description."""

from gpulane.web.api.native import NativeApi

__all__ = ["NativeApi"]
