"""The acceptance flows against given real servers, with a dated report: `make
drive COMFYUI_URL=... A1111_URL=...`.

It starts a gateway of its own over the servers and works through it as clients do. The servers keep what any
use of them leaves behind: pictures and history. It changes no option of theirs and needs no model in ComfyUI.
"""
