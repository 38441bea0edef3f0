"""Where benches keep models: made once, outside the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ebbflow.client import Client
from ebbflow.client.launch import answers
from ebbflow.formats.paths import default_paths, home_paths
from ebbflow.formats.stack import VERSION

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "examples" / "pystd-16m"
CACHE = default_paths().cache / "bench"
LIBRARY = CACHE / f"library-{VERSION}"  # models in another version of the format cannot be opened


def full_shape() -> Path:
    """A random stack of the 1.1B shape, 850 MB; seeded."""
    name = "full"
    if not (LIBRARY / name).exists():
        (LIBRARY).mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "ebbflow.daemon.library.synthetic", "tinyllama-1.1b"]
        subprocess.run([*command, "--stack", LIBRARY, "--name", name], check=True)
    return LIBRARY / name


def full_source() -> Path:
    """A random checkpoint of the 1.1B shape, 2.2 GB of bf16; seeded."""
    folder = CACHE / "sources" / "full"
    if not folder.exists():
        unfinished = folder.with_name("unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        command = [sys.executable, "-m", "ebbflow.daemon.library.synthetic", "tinyllama-1.1b"]
        subprocess.run([*command, "--checkpoint", unfinished], check=True)
        unfinished.rename(folder)
    return folder


def _link(source: str, target: str) -> None:
    """A second name for a file, or a copy of it on another disk; the library takes no symbolic links."""
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def daemon(*models: Path) -> Iterator[Client]:
    """A real daemon of its own that has these models; its kernels are compiled once for all benches."""
    home = Path(tempfile.mkdtemp(prefix="ebb"))
    paths = home_paths(home)
    paths.library.mkdir()
    for model in models:
        shutil.copytree(model, paths.library / model.name, copy_function=_link)
    (CACHE / "kernels").mkdir(parents=True, exist_ok=True)
    paths.cache.symlink_to(CACHE / "kernels")
    environment = os.environ | {"EBBFLOW_HOME": str(home)}
    command = [sys.executable, "-P", "-m", "ebbflow.daemon.supervisor"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        with Client(paths.clients) as client:
            while not answers(client):
                time.sleep(0.02)
            yield client
    finally:
        process.terminate()
        process.wait(20)
        shutil.rmtree(home, ignore_errors=True)
