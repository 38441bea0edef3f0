"""Who may reach the daemon by tcp. The socket file needs no door: its folder is ours alone, and so are its peers.

On loopback every user of this machine can connect, as long as no key is allowed; from the first allowed key on, every
tcp connection is encrypted and only those keys come in. Beyond loopback nothing else is possible.
"""

from __future__ import annotations

import logging
import re
from typing import Final

from ...formats.errors import EbbflowError, InvalidConfig
from ...formats.keys import is_loopback, own_pair, read_allowed
from ...formats.messages import Request
from ...formats.paths import Paths
from ..channel import Curve, Hub, new_pair

log = logging.getLogger(__name__)

_TCP: Final = re.compile(r"tcp://[^/:\s]+:\d{1,5}|tcp://\[[0-9a-fA-F:.]+\]:\d{1,5}")


def listen(hub: Hub[Request], address: str, paths: Paths) -> None:
    """Serve a tcp address too. Raises `InvalidConfig` for one that must not be, `DaemonFailed` if it cannot be."""
    if not _TCP.fullmatch(address):
        raise InvalidConfig(f"listen cannot be {address!r}; write tcp://ADDRESS:PORT, for example tcp://127.0.0.1:5555")
    allowed = paths.keys / "allowed"
    if read_allowed(allowed):
        pair = own_pair(paths.keys / "daemon", new_pair)
        hub.listen(address, Curve(pair, lambda key: _may_enter(key, paths)))
        log.info("serving on %s too, to the keys in %s", address, allowed)
    elif is_loopback(address):
        hub.listen(address, None)
        log.warning("serving on %s too, to every user of this machine (`ebb keys allow` makes that fewer)", address)
    else:
        raise InvalidConfig(
            f"{address} can be reached from other machines, and no key is allowed; run `ebb keys show` there and "
            "`ebb keys allow KEY` here, or listen on tcp://127.0.0.1"
        )


def _may_enter(key: str, paths: Paths) -> bool:
    """Read anew for each connection, so that allowing and revoking need no reload."""
    try:
        return key in read_allowed(paths.keys / "allowed")
    except EbbflowError as error:
        log.error("nobody can come by tcp: %s", error)
        return False
