"""Where compiled kernels are kept between runs. Imports nothing, because it must run before numba is imported.

numba looks only at the file of the function it caches: a change in a function called from another file silently runs
stale code. So the folder's name is a hash over all of `kernels/`, Python's and numba's versions, and the choice of
instructions, which is made when kernels are compiled (and which is also what numba is kept from).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Final

PARTS: Final = ("step", "others")  # of `compile`
_CHOICES: Final = ("EBBFLOW_INSTRUCTIONS", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES")
_COMPLETE: Final = "complete"  # written when every kernel is there


def use_cache(root: Path) -> Path:
    """Make numba keep compiled code below `root`, and remove what older kernels left there; returns the folder."""
    chosen = " ".join(os.environ.get(name, "") for name in _CHOICES)
    digest = hashlib.blake2b(f"{sys.version} numba {version('numba')} {chosen}".encode(), digest_size=8)
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    folder = root / f"kernels-{digest.hexdigest()}"
    folder.mkdir(parents=True, exist_ok=True)
    for other in root.glob("kernels-*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    os.environ["NUMBA_CACHE_DIR"] = str(folder)
    # Whatever the user's other programs want: workqueue's threads sleep while there is nothing to do, and all of them
    # run (`team`); OpenMP may give fewer than asked for, and these would wait for the others for ever.
    os.environ["NUMBA_THREADING_LAYER"] = "workqueue"
    return folder


def compiled(folder: Path) -> bool:
    """Whether every kernel is in the cache, or none ever will be because the compiler is switched off."""
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return True  # nothing would be compiled, and the folder be thought complete for ever
    return (folder / _COMPLETE).exists()


def compile_once(folder: Path, module: str = "ebbflow.kernels.compile", *, together: bool = False) -> None:
    """Fill an empty cache in processes of their own (`python -m MODULE PART`, for each part of `kernels.compile`), so
    that this one never carries the compiler's memory; `together`: at the same time, each taking half a gigabyte.

    Raises `subprocess.CalledProcessError`.
    """
    if compiled(folder):
        return
    # -P: never from the folder the user happens to stand in
    command = [sys.executable, "-P", "-m", module]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for part in PARTS:
            running.append(subprocess.Popen([*command, part], stdin=subprocess.DEVNULL))
            if not together:
                _finish(running)
        while running:
            _finish(running)
    finally:
        for process in running:
            process.kill()
            process.wait()
    (folder / _COMPLETE).touch()


def _finish(running: list[subprocess.Popen[bytes]]) -> None:
    """Wait for the first of them, which leaves the list once it has ended: whoever interrupts a wait ends the rest."""
    code = running[0].wait()
    process = running.pop(0)
    if code:
        raise subprocess.CalledProcessError(code, process.args)
