"""Who a request comes from, and whether a browser was tricked into sending it.

With keys: the key's account and role; none or a wrong one is refused. Without keys: the client's address, as
operator, and as admin from the machine itself. Keys are compared by their SHA-256 alone, and never logged or
passed on to engines.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import ipaddress
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from multidict import CIMultiDictProxy

from gpulane.config import KeySettings, Settings
from gpulane.config.parse import is_loopback, listen_address
from gpulane.core.model import Account
from gpulane.errors import NotAuthenticated, NotPermitted
from gpulane.web.ports import Identity, Role

Headers = CIMultiDictProxy[str]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})
FORWARDED_MAX: Final = 32
"""Entries of X-Forwarded-For that are looked at, from the right."""
_FORWARDING_HEADERS: Final = ("X-Forwarded-For", "Forwarded", "X-Real-IP")
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_KEY_HEADERS: Final = frozenset({"authorization", "x-api-key"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """What is known of a request before its identity."""

    method: str
    headers: Headers
    address: str | None
    """The peer of the connection."""
    scheme: str = "http"

    @property
    def is_websocket(self) -> bool:
        return "upgrade" in self.headers.get("Connection", "").lower()

    @property
    def changes_state(self) -> bool:
        """Whether a forged one could do harm: a WebSocket too, since it reads across origins."""
        return self.method not in SAFE_METHODS or self.is_websocket


class Identities:
    """Tells identities by the settings of one listener."""

    def __init__(self, settings: Settings, *, listen: str | None = None) -> None:
        self._keys: dict[bytes, KeySettings] = {bytes.fromhex(key.sha256): key for key in settings.keys}
        self._proxies = [ipaddress.ip_network(proxy, strict=False) for proxy in settings.trusted_proxies]
        host, _ = listen_address(listen or settings.listen)
        self._checks_host = not self._keys and is_loopback(host)
        self._names = frozenset(name.lower() for name in (host, settings.name) if name)

    @property
    def secret_headers(self) -> frozenset[str]:
        """Headers, in lower case, that carry our keys and must not reach an engine."""
        return _KEY_HEADERS if self._keys else frozenset()

    def is_trusted(self, address: str | None) -> bool:
        """Tell whether this peer is a proxy whose word about the client is believed."""
        found = _address(address)
        return found is not None and self._trusts(found)

    def identify(self, caller: Caller) -> Identity:
        """Tell who it is. Raises NotAuthenticated, NotPermitted."""
        if self._keys:
            key, is_ambient = _given_key(caller.headers)
            found = (
                self._keys.get(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest())
                if key
                else None
            )
            if found is None:
                raise _key_wanted(is_given=key is not None)
            if is_ambient:
                self._refuse_forged(caller)
            return Identity(
                account=Account(found.account),
                role=Role(found.role),
                weight=found.weight,
                address=str(self._client(caller) or ""),
            )
        self._refuse_foreign_host(caller)
        self._refuse_forged(caller)
        client = self._client(caller)
        return Identity(
            account=_account(client),
            role=Role.ADMIN if self._is_local(caller, client) else Role.OPERATOR,
            address=str(client or ""),
        )

    def _client(self, caller: Caller) -> Address | None:
        """Return the rightmost address that is no proxy of ours."""
        client = _address(caller.address)
        if client is None or not self._trusts(client):
            return client
        chain = ",".join(caller.headers.getall("X-Forwarded-For", [])).split(",")
        for entry in reversed(chain[-FORWARDED_MAX:]):
            named = _address(entry.strip())
            if named is None:
                break
            client = named
            if not self._trusts(client):
                break
        return client

    def _trusts(self, address: Address) -> bool:
        return any(address in network for network in self._proxies)

    def _is_local(self, caller: Caller, client: Address | None) -> bool:
        """Tell whether it comes from this machine itself, not through a proxy on it."""
        is_proxied = any(name in caller.headers for name in _FORWARDING_HEADERS)
        return client is not None and client.is_loopback and not is_proxied

    def _refuse_foreign_host(self, caller: Caller) -> None:
        """Stop DNS rebinding: a page of evil.example whose name now points at 127.0.0.1 says so in Host."""
        if not self._checks_host or self.is_trusted(caller.address):
            return
        name = _host_name(caller.headers.get("Host", ""))
        is_own = name in self._names or name == "localhost" or name.endswith(".localhost")
        if name and not is_own and _address(name) is None:
            raise NotPermitted(
                f"This address is served to its own machine only, and not as {name!r}.",
                hint="Behind a proxy: name the proxy in trusted_proxies.",
                code="foreign_host",
            )

    def _refuse_forged(self, caller: Caller) -> None:
        """Stop pages of other sites: browsers send their requests here with whatever rights our user has."""
        if not caller.changes_state:
            return
        headers = caller.headers
        origin = headers.get("Origin")
        is_foreign = headers.get("Sec-Fetch-Site", "").lower() == "cross-site"
        if origin is not None and not is_foreign:
            hosts = [headers.get("Host", "")]
            if self.is_trusted(caller.address):
                hosts.append(headers.get("X-Forwarded-Host", ""))
            is_foreign = not any(_is_same_host(origin, host) for host in hosts if host)
        if is_foreign:
            raise NotPermitted(
                "A page of another site may not do that.",
                hint="Use this address itself, or send a key as Bearer or X-Api-Key.",
                code="cross_site",
            )


def _given_key(headers: Headers) -> tuple[str | None, bool]:
    """Return the key, and whether a browser may have added it by itself (Basic)."""
    key = headers.get("X-Api-Key")
    if key:
        return key, False
    scheme, _, rest = headers.get("Authorization", "").partition(" ")
    match scheme.lower():
        case "bearer":
            return rest.strip() or None, False
        case "basic":
            try:
                decoded = base64.b64decode(rest.strip(), validate=True).decode("utf-8", "surrogateescape")
            except (binascii.Error, ValueError):
                return None, True
            return decoded.partition(":")[2] or None, True
        case _:
            return None, False


def _key_wanted(*, is_given: bool) -> NotAuthenticated:
    message = "This key is not known." if is_given else "A key is needed."
    return NotAuthenticated(
        message,
        hint="Send it as `Authorization: Bearer KEY`, as `X-Api-Key`, or as the password of HTTP Basic.",
    )


def _account(client: Address | None) -> Account:
    """Take a household's IPv6 network as one: a single machine has 2^64 addresses to choose from."""
    match client:
        case None:
            return Account("local")
        case ipaddress.IPv6Address() if not client.is_loopback:
            return Account(str(ipaddress.ip_network((client, 64), strict=False)))
        case _:
            return Account(str(client))


def _address(text: str | None) -> Address | None:
    """Read an address as sockets and proxies write it: with port, brackets or zone, IPv4 inside IPv6."""
    if not text:
        return None
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return found.ipv4_mapped or found if isinstance(found, ipaddress.IPv6Address) else found


def _host_name(host: str) -> str:
    name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
    return name.removeprefix("[").removesuffix("]").lower().rstrip(".")


def _is_same_host(origin: str, host: str) -> bool:
    """Compare as browsers mean it; the scheme may differ, since a proxy may have ended TLS."""
    try:
        ours, theirs = urlsplit(f"//{host.strip()}"), urlsplit(origin)
        default = _DEFAULT_PORTS.get(theirs.scheme)
        return (
            theirs.scheme in _DEFAULT_PORTS
            and (theirs.hostname or "") == (ours.hostname or "")
            and (theirs.port or default) == (ours.port or default)
        )
    except ValueError:
        return False
