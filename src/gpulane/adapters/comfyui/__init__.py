"""Everything known about ComfyUI without talking to it: routes, prompts, catalogs, messages, results. Pure.

`prompt` makes a job of a POST /prompt, `messages` tells from an engine's words how a job stands, `result`
reads what it made, `catalog` what an engine offers, `routes` what a request is. ComfyUI's word "prompt"
stays inside this folder and its client in `engine.comfyui`.
"""
