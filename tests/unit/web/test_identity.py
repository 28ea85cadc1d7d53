"""Who a request comes from: keys, addresses, proxies; and what a browser may not be tricked into."""

from __future__ import annotations

import base64
import hashlib

import pytest
from multidict import CIMultiDict, CIMultiDictProxy

from gpulane.config import KeySettings, Settings
from gpulane.errors import NotAuthenticated, NotPermitted
from gpulane.web.identity import Caller, Identities
from gpulane.web.ports import Role

KEY = "gl_0123456789"
KEYED = Settings(
    keys=(
        KeySettings(
            account="ann", sha256=hashlib.sha256(KEY.encode()).hexdigest(), role="viewer", weight=2.0
        ),
    )
)
PROXIED = Settings(trusted_proxies=("127.0.0.1", "10.0.0.0/8"))
EVERYBODY = Settings(listen="0.0.0.0:8800", allow_anonymous=True)


def caller(address: str | None = "127.0.0.1", *headers: tuple[str, str], method: str = "GET") -> Caller:
    given = CIMultiDict(headers)
    given.setdefault("Host", "127.0.0.1:8800")
    return Caller(method=method, headers=CIMultiDictProxy(given), address=address)


def basic(text: str) -> str:
    return "Basic " + base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    "header",
    [
        ("Authorization", f"Bearer {KEY}"),
        ("authorization", f"bearer  {KEY} "),
        ("X-Api-Key", KEY),
        ("Authorization", basic(f"anybody:{KEY}")),
    ],
)
def test_key_tells_the_account(header: tuple[str, str]) -> None:
    identity = Identities(KEYED).identify(caller("203.0.113.9", header))
    assert (identity.account, identity.role, identity.weight) == ("ann", Role.VIEWER, 2.0)
    assert identity.address == "203.0.113.9"


@pytest.mark.parametrize(
    "headers",
    [
        (),
        (("Authorization", "Bearer wrong"),),
        (("Authorization", "Basic ???"),),
        (("Authorization", basic(KEY)),),
        (("Authorization", f"Digest {KEY}"),),
        (("X-Api-Key", ""),),
    ],
)
def test_without_a_known_key_nobody_enters(headers: tuple[tuple[str, str], ...]) -> None:
    with pytest.raises(NotAuthenticated):
        Identities(KEYED).identify(caller("127.0.0.1", *headers))


@pytest.mark.parametrize(
    ("address", "account", "role"),
    [
        ("127.0.0.1", "127.0.0.1", Role.ADMIN),
        ("::1", "::1", Role.ADMIN),
        ("203.0.113.9", "203.0.113.9", Role.OPERATOR),
        ("::ffff:203.0.113.9", "203.0.113.9", Role.OPERATOR),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64", Role.OPERATOR),
        ("fe80::1%eth0", "fe80::/64", Role.OPERATOR),
        (None, "local", Role.OPERATOR),
    ],
)
def test_without_keys_the_address_is_the_account(address: str | None, account: str, role: Role) -> None:
    identity = Identities(EVERYBODY).identify(caller(address))
    assert (identity.account, identity.role) == (account, role)


@pytest.mark.parametrize(
    ("peer", "forwarded", "account"),
    [
        ("127.0.0.1", "203.0.113.9", "203.0.113.9"),
        ("127.0.0.1", "198.51.100.1, 203.0.113.9", "203.0.113.9"),
        ("127.0.0.1", "198.51.100.1, 203.0.113.9, 10.1.1.1", "203.0.113.9"),
        ("127.0.0.1", "203.0.113.9:4711", "203.0.113.9"),
        ("127.0.0.1", "[2001:db8::9]:4711", "2001:db8::/64"),
        ("127.0.0.1", "203.0.113.9, nonsense", "127.0.0.1"),
        ("127.0.0.1", "", "127.0.0.1"),
        ("192.0.2.7", "203.0.113.9", "192.0.2.7"),
    ],
)
def test_only_trusted_proxies_are_believed(peer: str, forwarded: str, account: str) -> None:
    identity = Identities(PROXIED).identify(caller(peer, ("X-Forwarded-For", forwarded)))
    assert identity.account == account
    assert identity.role is Role.OPERATOR


def test_local_proxy_that_is_not_named_makes_nobody_admin() -> None:
    identity = Identities(Settings()).identify(caller("127.0.0.1", ("X-Forwarded-For", "203.0.113.9")))
    assert (identity.account, identity.role) == ("127.0.0.1", Role.OPERATOR)


@pytest.mark.parametrize(
    ("headers", "is_allowed"),
    [
        ((), True),
        ((("Origin", "http://127.0.0.1:8800"),), True),
        ((("Origin", "http://127.0.0.1:9999"),), False),
        ((("Origin", "http://evil.example"),), False),
        ((("Origin", "null"),), False),
        ((("Sec-Fetch-Site", "cross-site"),), False),
        ((("Sec-Fetch-Site", "same-origin"),), True),
        ((("Host", "gpu.test"), ("Origin", "https://gpu.test")), True),
        ((("Host", "gpu.test:443"), ("Origin", "https://gpu.test")), True),
        ((("Host", "gpu.test:x"), ("Origin", "https://gpu.test")), False),
    ],
)
def test_pages_of_other_sites_change_nothing(
    headers: tuple[tuple[str, str], ...], *, is_allowed: bool
) -> None:
    identities = Identities(EVERYBODY)
    identities.identify(caller("192.0.2.1", *headers))
    for asked in (
        caller("192.0.2.1", *headers, method="POST"),
        caller("192.0.2.1", *headers, ("Connection", "keep-alive, Upgrade")),
    ):
        if is_allowed:
            identities.identify(asked)
        else:
            with pytest.raises(NotPermitted) as refused:
                identities.identify(asked)
            assert refused.value.code == "cross_site"


def test_keys_that_browsers_add_by_themselves_are_not_enough() -> None:
    origin = ("Origin", "http://evil.example")
    with pytest.raises(NotPermitted):
        Identities(KEYED).identify(
            caller("192.0.2.1", ("Authorization", basic(f"x:{KEY}")), origin, method="POST")
        )
    Identities(KEYED).identify(caller("192.0.2.1", ("X-Api-Key", KEY), origin, method="POST"))


@pytest.mark.parametrize(
    ("host", "is_allowed"),
    [
        ("127.0.0.1:8800", True),
        ("[::1]:8800", True),
        ("localhost:8800", True),
        ("localhost", True),
        ("comfy.localhost:8800", True),
        ("192.0.2.5", True),
        ("mybox:8800", True),
        ("evil.example:8800", False),
        ("localhost.evil.example", False),
    ],
)
def test_rebound_names_reach_nothing_on_loopback(host: str, *, is_allowed: bool) -> None:
    identities = Identities(Settings(name="mybox"))
    asked = caller("127.0.0.1", ("Host", host))
    if is_allowed:
        identities.identify(asked)
    else:
        with pytest.raises(NotPermitted) as refused:
            identities.identify(asked)
        assert refused.value.code == "foreign_host"


def test_named_proxy_may_use_any_host() -> None:
    Identities(PROXIED).identify(
        caller("127.0.0.1", ("Host", "gpu.example.com"), ("X-Forwarded-For", "192.0.2.1"))
    )


def test_keys_are_kept_from_engines_only_where_they_are_ours() -> None:
    assert Identities(KEYED).secret_headers == {"authorization", "x-api-key"}
    assert Identities(Settings()).secret_headers == frozenset()
