"""Everything known about each service, as pure functions: bytes and JSON in, our nouns out. No I/O, no
clock, no randomness.

One package per service (`comfyui`, `a1111`, `http`); they never import each other. ComfyUI's word "prompt"
and A1111's word "task" live only in here.
"""
