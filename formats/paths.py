"""Where things live, and which names may become paths.

`EBBFLOW_HOME` puts everything below one folder (tests, containers); otherwise the platform's usual folders are used.
"""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import platformdirs

from .errors import DaemonFailed, InvalidName

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
ADDING: Final = ".adding-"  # a model in the making is in `<library>/.adding-<name>-<process id>`
SOCKET_PATH_LIMIT: Final = 107  # sockaddr_un.sun_path on Linux, less its terminating zero


@dataclass(frozen=True)
class Paths:
    """The folders of one daemon and the files in them."""

    runtime: Path
    library: Path
    cache: Path
    logs: Path
    config: Path

    @property
    def settings(self) -> Path:
        """What the user set; it need not exist."""
        return self.config / "config.toml"

    @property
    def keys(self) -> Path:
        """Whose keys may come by tcp, and our own."""
        return self.config / "keys"

    @property
    def lock(self) -> Path:
        """Held (flock) by the running daemon."""
        return self.runtime / "daemon.lock"

    @property
    def log(self) -> Path:
        """What a daemon started in the background writes."""
        return self.logs / "daemon.log"

    @property
    def clients(self) -> str:
        """ZeroMQ address that clients connect to."""
        return self._ipc("ebbflow.sock")

    @property
    def children(self) -> str:
        """ZeroMQ address that the daemon's own processes connect to."""
        return self._ipc("children.sock")

    def _ipc(self, name: str) -> str:
        path = self.runtime / name
        if len(os.fsencode(path)) > SOCKET_PATH_LIMIT:
            raise DaemonFailed(
                f"socket path {path} is longer than the {SOCKET_PATH_LIMIT} bytes the system allows; "
                "set EBBFLOW_HOME to a shorter folder"
            )
        return f"ipc://{path}"


def home_paths(root: Path) -> Paths:
    """Everything below one folder, which must be absolute."""
    return Paths(root / "run", root / "library", root / "cache", root / "logs", root)


def default_paths() -> Paths:
    """The folders of this user's daemon."""
    home = os.environ.get("EBBFLOW_HOME")
    if home:
        return home_paths(Path(home).absolute())
    dirs = platformdirs.PlatformDirs("ebbflow", appauthor=False)
    with warnings.catch_warnings():
        # Without XDG_RUNTIME_DIR (containers, sudo) a folder below the system's temporary one is right for us.
        warnings.simplefilter("ignore")
        runtime = Path(dirs.user_runtime_dir)
    return Paths(
        runtime,
        Path(dirs.user_data_dir) / "library",
        Path(dirs.user_cache_dir),
        Path(dirs.user_log_dir),
        Path(dirs.user_config_dir),
    )


def check_name(name: str, what: str = "model") -> str:
    """`name`, if it is safe as the name of a folder or file. Raises `InvalidName`, which says `what` it shall name."""
    if not _NAME.fullmatch(name):
        raise InvalidName(
            f"{name!r} is not a {what} name: use up to 64 letters, digits, dots, dashes and underscores, "
            "beginning with a letter or digit"
        )
    return name
