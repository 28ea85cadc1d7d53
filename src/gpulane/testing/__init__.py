"""Simulated engines and cards for tests, benches and `gpulane demo`; none of it imports the gateway's own
code.

`comfyui.SimComfyUI`, `a1111.SimA1111` and `http_engine.SimHttpEngine` compute on a `card.Card`; `process`
runs one as a process of its own; `judge` reads the cards' logs. Nothing is imported here, so that the judge
stands alone.
"""
