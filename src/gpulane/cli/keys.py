"""`gpulane key new`: makes an API key. It is shown once and stored nowhere; the settings hold its hash."""

from __future__ import annotations

import click

from gpulane.errors import ConfigError

KEY_BYTES = 20
"""160 random bits: nothing to guess, so a quick hash of it is enough."""
KEY_PREFIX = "gpl_"
"""So that a key found in a log or a repository is known for one."""
ROLES = ("viewer", "user", "operator", "admin")


@click.group()
def key() -> None:
    """API keys."""


@key.command("new")
@click.option("--account", required=True, help="Whom the jobs are counted for. Several keys may have one.")
@click.option("--role", type=click.Choice(ROLES), default="user", show_default=True)
@click.option(
    "--weight",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    help="The account's share of the GPUs, relative to others.",
)
@click.option("--json", "as_json", is_flag=True, help="Print key and entry as JSON.")
def new_key(*, account: str, role: str, weight: float, as_json: bool) -> None:
    """Make a random key. It is printed once; put the printed entry into the settings."""
    import base64
    import hashlib
    import secrets

    import yaml

    from gpulane.cli.output import print_json

    if not account.strip() or not account.isprintable():
        raise ConfigError("--account: a name of printable characters is needed")
    made = KEY_PREFIX + base64.b32encode(secrets.token_bytes(KEY_BYTES)).decode().lower()
    entry: dict[str, object] = {
        "account": account,
        "role": role,
        "sha256": hashlib.sha256(made.encode()).hexdigest(),
    }
    if weight != 1.0:
        entry["weight"] = weight
    if as_json:
        print_json({"key": made, "entry": entry})
        return
    text = yaml.safe_dump({"keys": [entry]}, sort_keys=False, allow_unicode=True).rstrip()
    print(f"key: {made}")
    print("\n# The key is shown this once. For the settings of the gateway:")
    print(text)
