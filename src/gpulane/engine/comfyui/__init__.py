"""Talks to one ComfyUI: runs a job, follows it by events and by looking, interrupts it, probes, describes."""

from gpulane.engine.comfyui.client import ComfyUIClient
from gpulane.engine.comfyui.timings import Timings

__all__ = ["ComfyUIClient", "Timings"]
