"""`ebb keys`: who may come by tcp, and who we are."""

from __future__ import annotations

import click

from ...formats.errors import InvalidConfig
from ...formats.keys import check_key, own_pair, read_allowed, write_allowed
from ...formats.paths import default_paths
from ..channel import new_pair
from .output import json_option, note, write_fields, write_json


@click.group()
def keys() -> None:
    """Say who may use this daemon over a network (`ebb serve --listen tcp://...`).

    Over there: `ebb keys show`. Here: `ebb keys allow KEY`. Then over there, EBBFLOW_HOST=tcp://ADDRESS:PORT and
    EBBFLOW_SERVER_KEY=the key that `ebb keys show` tells here as the daemon's.
    """


@keys.command()
@json_option
def show(as_json: bool) -> None:
    """Show this user's public keys, made if need be, and which others are allowed."""
    folder = default_paths().keys
    client, daemon = (own_pair(folder / name, new_pair).public for name in ("client", "daemon"))
    allowed = read_allowed(folder / "allowed")
    if as_json:
        write_json({"client": client, "daemon": daemon, "allowed": allowed})
        return
    entries = [("allowed", f"{key} {name}".rstrip()) for key, name in allowed.items()] or [("allowed", "nobody")]
    write_fields([("as a client", client), ("as a daemon", daemon), *entries])


@keys.command()
@click.argument("key")
@click.argument("name", default="")
def allow(key: str, name: str) -> None:
    """Let the client with the public KEY come in, from now on; NAME is for people."""
    allowed = read_allowed(default_paths().keys / "allowed")
    allowed[check_key(key)] = name
    write_allowed(default_paths().keys / "allowed", allowed)
    note(f"{name or key} may come in, where the daemon listens by tcp.")


@keys.command()
@click.argument("key")
def revoke(key: str) -> None:
    """Let the client with that KEY, or name, no longer come in; a connection that is open stays open."""
    allowed = read_allowed(default_paths().keys / "allowed")
    left = {known: name for known, name in allowed.items() if key not in (known, name)}
    if left == allowed:
        raise InvalidConfig(f"{key} is not allowed anyway; `ebb keys show` says who is")
    write_allowed(default_paths().keys / "allowed", left)
    note(f"{key} may no longer come in; restart the daemon to end what is open.")
