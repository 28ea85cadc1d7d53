"""ComfyUI's front door: many engines that look like one, to each account as if it had them to itself.

`front` tells requests apart; `submit` takes prompts; `orders` shows and changes the account's queue and
history; `events` brings progress to `sockets`; `files` finds pictures; `lists` merges what the engines offer.
"""

from gpulane.web.comfyui.front import ComfyUIFront

__all__ = ["ComfyUIFront"]
