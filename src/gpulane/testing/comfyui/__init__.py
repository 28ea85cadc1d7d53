"""A simulated ComfyUI, faithful to recordings of the real one."""

from gpulane.testing.comfyui.engine import SimComfyUI
from gpulane.testing.comfyui.nodes import CLASSIC_VERSION, MODERN_VERSION

__all__ = ["CLASSIC_VERSION", "MODERN_VERSION", "SimComfyUI"]
