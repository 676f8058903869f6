"""``oserve keys``: the API keys of clients, in the state folder of a server.

The commands change a file that a running server reads again by itself; no server need run.
"""

import getpass
import json
import logging
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from oserve.cli.options import ConfigOption, JsonOption, OverrideOption
from oserve.config import environment_value, load_settings, parse_override
from oserve.core import DEFAULT_TENANT, KeyRole
from oserve.gateway.access.audit import AUDIT_FILE, AuditEntry, AuditLog
from oserve.gateway.access.key_file import KEY_FILE, KeyStore
from oserve.gateway.access.keys import StoredKey

app = typer.Typer(
    help="Add, list and revoke API keys; a running server follows within a second.",
    no_args_is_help=True,
)

_log = logging.getLogger("oserve.cli")
_console = Console(stderr=True, highlight=False, soft_wrap=True)

StateDirOption = Annotated[
    str | None, typer.Option("--state-dir", help="The server's state folder.", show_default=False)
]


@app.command()
def add(
    tenant: Annotated[str, typer.Argument(help="Whom the key belongs to.")] = DEFAULT_TENANT,
    role: Annotated[
        KeyRole, typer.Option("--role", help="use: send requests; admin: also change the fleet.")
    ] = KeyRole.USE,
    tier: Annotated[
        str | None, typer.Option("--tier", help="The tier of requests that name none.")
    ] = None,
    allow_tier: Annotated[
        list[str] | None,
        typer.Option("--allow-tier", help="A tier that requests may name; all by default."),
    ] = None,
    state_dir: StateDirOption = None,
    config: ConfigOption = None,
    override: OverrideOption = None,
) -> None:
    """Make a key and print it; it is stored as a hash only, so it cannot be shown again."""
    folder = _folder(state_dir, config, override)
    fresh = not folder.is_dir()
    stored, key = KeyStore(folder / KEY_FILE).add(
        tenant, role, tier=tier, tiers=tuple(allow_tier or ())
    )
    _audit(folder, "keys add", (stored,))
    _tell(f"key file: {folder / KEY_FILE}")
    if fresh:
        _tell(
            f"warning: there was no folder {folder}; a server that uses another one does not know "
            "this key: --state-dir or --config say which"
        )
    _tell(f"key {stored.id} of tenant {tenant}, role {role.value}:")
    print(key)


@app.command("list")
def list_keys(
    state_dir: StateDirOption = None,
    config: ConfigOption = None,
    override: OverrideOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the keys: ids, tenants and roles, not the keys themselves."""
    path = _folder(state_dir, config, override) / KEY_FILE
    keys = KeyStore(path).keys()
    _tell(f"key file: {path}" if path.exists() else f"there is no key file {path}")
    if as_json:
        print(json.dumps([_shown(key) for key in keys], indent=2))
        return
    table = Table("key", "tenant", "role", "tier", "may ask for", "since")
    for key in keys:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(key.created_s))
        tiers = ", ".join(key.tiers) or "every tier"
        table.add_row(key.id, key.tenant, key.role.value, key.tier or "-", tiers, since)
    Console(highlight=False).print(table)


@app.command()
def revoke(
    key: Annotated[
        str, typer.Argument(metavar="KEY", help="The id of a key, or tenant:NAME for all of its.")
    ],
    state_dir: StateDirOption = None,
    config: ConfigOption = None,
    override: OverrideOption = None,
) -> None:
    """Revoke a key: a running server refuses it within a second; running requests end as usual."""
    folder = _folder(state_dir, config, override)
    store = KeyStore(folder / KEY_FILE)
    gone = store.revoke(key)
    _audit(folder, "keys revoke", gone)
    _tell(f"key file: {folder / KEY_FILE}")
    for item in gone:
        _tell(f"revoked {item.id} of tenant {item.tenant}")
    left = store.keys()
    if not left:
        _tell("note: no key is left, and the gateway stays closed; add one")
    elif not any(item.role is KeyRole.ADMIN for item in left):
        _tell("note: no key with role admin is left in this file")


def _folder(state_dir: str | None, config: str | None, override: list[str] | None) -> Path:
    changes = dict(parse_override(text) for text in override or ())
    if state_dir is not None:
        changes["state_dir"] = state_dir
    settings = load_settings(config or environment_value("OSERVE_CONFIG") or None, changes)
    return Path(settings.state_dir).absolute()


def _tell(line: str) -> None:
    """A line for people; standard output has the key or the list alone."""
    _console.print(line, markup=False)


def _shown(key: StoredKey) -> dict[str, object]:
    return {
        "id": key.id,
        "tenant": key.tenant,
        "role": key.role.value,
        "tier": key.tier,
        "allowed_tiers": list(key.tiers),
        "created_s": key.created_s,
    }


def _audit(folder: Path, action: str, keys: tuple[StoredKey, ...]) -> None:
    facts = {"keys": [f"{key.tenant}/{key.id} {key.role.value}" for key in keys]}
    entry = AuditEntry(
        at_s=round(time.time(), 3), actor=f"user {getpass.getuser()}", action=action, facts=facts
    )
    try:
        AuditLog(folder / AUDIT_FILE).write(entry)
    except OSError as error:
        _log.error("the audit log cannot be written: %s", error)
