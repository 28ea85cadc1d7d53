"""An account's own options: shown merged with an engine's, changed without any engine hearing of it.

Options that belong to the engine and all its users are not changed through this front yet, not even by
admins: the engine would have to be idle for it.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus

import msgspec

from gpulane.adapters.a1111.catalogue import find_checkpoint
from gpulane.adapters.a1111.fields import Body, split
from gpulane.adapters.a1111.options import CHECKPOINT, carried, merged_options, merged_own, read_change
from gpulane.core.model import Account, Service
from gpulane.errors import NotPermitted, Unavailable
from gpulane.web.a1111.lists import ASK_TIMEOUTS, Lists
from gpulane.web.ports import EnginesPort, EngineView, Identity, Role, ValuesPort

KIND = "a1111_options"
"""Under which they are kept for an account."""
NOTHING = b"{}"


class Options:
    """Reads and changes them."""

    def __init__(self, engines: EnginesPort, values: ValuesPort, lists: Lists) -> None:
        self._engines = engines
        self._values = values
        self._lists = lists
        self._lock = asyncio.Lock()

    async def shown(self, account: Account) -> bytes:
        """Return what GET /options tells this account. Raises Unavailable, EngineError."""
        engine = self._engines.sticky(Service.A1111, account)
        if engine is None:
            raise Unavailable("No A1111 engine answers now.", code="no_engine")
        base = await self._base(engine)
        return merged_options(base, await self._own(account), self._lists.catalogue())

    async def change(self, identity: Identity, body: bytes) -> None:
        """Keep what a POST /options changes. Raises ClientErrors; nothing is kept then."""
        async with self._lock:
            current = await self.shown(identity.account)
            change = read_change(body, current, self._lists.catalogue(), is_admin=identity.role is Role.ADMIN)
            if change.shared:
                names = ", ".join(sorted(change.shared))
                raise NotPermitted(
                    f"these options belong to the engine and all its users: {names}",
                    hint="change them on the engine itself",
                )
            if change.own:
                own = merged_own(await self._own(identity.account), change.own)
                await self._values.account_put(identity.account, KIND, own)

    async def carried(self, account: Account) -> Body:
        """Return what goes with each job of the account: its choices, and always a checkpoint that is known.

        What an engine has loaded is whatever ran last on it, and engines may differ in their own choice.
        """
        own = carried(await self._own(account))
        if CHECKPOINT not in own:
            default = self._default_checkpoint(account)
            if default is not None:
                own[CHECKPOINT] = msgspec.Raw(msgspec.json.encode(default))
        return own

    def _default_checkpoint(self, account: Account) -> str | None:
        engine = self._engines.sticky(Service.A1111, account)
        base = self._lists.options_of(engine) if engine is not None else None
        raw = split(base).get(CHECKPOINT) if base is not None else None
        try:
            title = msgspec.json.decode(raw, type=str) if raw is not None else ""
        except msgspec.ValidationError:
            return None
        found = find_checkpoint(self._lists.catalogue().checkpoints or (), title) if title else None
        return None if found is None else found.name

    async def _own(self, account: Account) -> bytes:
        return await self._values.account_get(account, KIND) or NOTHING

    async def _base(self, engine: EngineView) -> bytes:
        told = self._lists.options_of(engine)
        if told is not None:
            return told
        status, body = await self._engines.wire(engine.url).get_json(
            "/sdapi/v1/options", timeouts=ASK_TIMEOUTS
        )
        if status != HTTPStatus.OK:
            raise Unavailable("The engine does not tell its options.", code="no_options")
        return body
