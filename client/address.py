"""Where the daemon is and how to talk to it: this user's own, or another one by tcp (`EBBFLOW_HOST`)."""

from __future__ import annotations

import os
from typing import Final

from ..formats.errors import InvalidRequest
from ..formats.keys import KeyPair, check_key, is_loopback, own_pair
from ..formats.paths import default_paths
from .channel import Channel, Curve, new_pair
from .exchange import Lease

HOST: Final = "EBBFLOW_HOST"
SERVER_KEY: Final = "EBBFLOW_SERVER_KEY"


def elsewhere() -> str | None:
    """The address of a daemon that is not this user's to start, if the environment names one."""
    return os.environ.get(HOST) or None


def open_channel(address: str | None, lease: Lease | None, server_key: str | None, keys: KeyPair | None) -> Channel:
    """A channel to `address`, or to where the environment says, or to this user's daemon.

    Raises `InvalidRequest` for an address that is none or would be spoken to in the clear, `InvalidConfig` for keys.
    """
    if address is None:
        address, server_key = elsewhere(), server_key or os.environ.get(SERVER_KEY)
        if address is None:
            return Channel(default_paths().clients, lease or Lease())
    tcp = address.startswith("tcp://")
    if tcp and server_key:
        pair = keys or own_pair(default_paths().keys / "client", new_pair)
        return Channel(address, lease or Lease(), Curve(check_key(server_key), pair))
    if tcp and not is_loopback(address):
        raise InvalidRequest(
            f"{address} is another machine: give the daemon's key (server_key, or {SERVER_KEY}; `ebb keys show` there)"
        )
    return Channel(address, lease or Lease())
