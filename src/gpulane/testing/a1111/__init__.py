"""A simulated AUTOMATIC1111 webui (or Forge), faithful to recordings of the real one."""

from gpulane.testing.a1111.engine import SimA1111

__all__ = ["SimA1111"]
