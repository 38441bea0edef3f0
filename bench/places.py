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
from ebbflow.daemon.supervisor.terms import FILE as TERMS
from ebbflow.formats.messages import AddModel
from ebbflow.formats.paths import default_paths, home_paths
from ebbflow.formats.stack import VERSION
from ebbflow.kernels.cache import use_cache
from ebbflow.kernels.instructions import VARIABLE, processor_features

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))  # for `support`: cgroups and the hog
DEMO = ROOT / "examples" / "pystd-16m"
CACHE = default_paths().cache / "bench"
LIBRARY = CACHE / f"library-{VERSION}"  # models in another version of the format cannot be opened


def keep_to_wished_instructions() -> None:
    """With EBBFLOW_INSTRUCTIONS=avx2, this process and its children compile as for a processor without AVX-512.

    Else LLVM would use it all the same: three logical operations in one, 32 registers.
    """
    if os.environ.get(VARIABLE) == "avx2":
        features = processor_features()
        os.environ["NUMBA_CPU_FEATURES"] = ",".join(
            f"{'-' if name.startswith(('avx512', 'avx10')) or not here else '+'}{name}"
            for name, here in features.items()
        )


def restart_with_kernels() -> None:
    """Begin this bench anew where kernels are kept by what all their files say.

    numba reads where when it is first imported, and beside its sources it keeps code that later changes do not reach.
    """
    keep_to_wished_instructions()
    if not os.environ.get("NUMBA_CACHE_DIR"):
        use_cache(CACHE / "kernels")
        os.execv(sys.executable, [sys.executable, *sys.argv])


FULL = {
    "full": (),
    "full-sparse": ("--codec", "sparse", "--levels", "3"),
    "full-sparse-i4": ("--codec", "sparse", "--levels", "3", "--values", "i4"),
    "full-sparse-f16": ("--codec", "sparse", "--levels", "3", "--values", "f16"),
    "full-tier": ("--codec", "sparse", "--levels", "1"),
    "full-tier-i4": ("--codec", "sparse", "--levels", "1", "--values", "i4"),
    "full-tier-f16": ("--codec", "sparse", "--levels", "1", "--values", "f16"),
    "full-dense": ("--codec", "dense"),
    "full-dense-f16": ("--codec", "dense", "--values", "f16"),
    "full-8": ("--levels", "7"),
}


def full_shape(name: str = "full") -> Path:
    """A random stack of the 1.1B shape, one of FULL, 0.5 to 2.1 GB; seeded. Those of as many tiers share masks."""
    if not (LIBRARY / name).exists():
        (LIBRARY).mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "ebbflow.daemon.library.synthetic", "tinyllama-1.1b", *FULL[name]]
        subprocess.run([*command, "--stack", LIBRARY, "--name", name], check=True)
    return LIBRARY / name


def demo_model() -> Path:
    """The demo as a library model, made once."""
    from ebbflow.daemon.library.add import add_model  # torch, which benches that need no demo do without

    if not (LIBRARY / DEMO.name).exists():
        LIBRARY.mkdir(parents=True, exist_ok=True)
        request = AddModel(id=0, source=str(DEMO), name=DEMO.name)
        add_model(request, LIBRARY, CACHE / "jobs", lambda message: None)
    return LIBRARY / DEMO.name


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


@contextmanager
def daemon(flags: tuple[str, ...] = (), prefix: tuple[str, ...] = ()) -> Iterator[Client]:
    """A real daemon with LIBRARY's models, behind the command `prefix`; kernels are compiled once for all benches.

    Sizes that another bench has wished for are forgotten.
    """
    (LIBRARY / TERMS).unlink(missing_ok=True)
    home = Path(tempfile.mkdtemp(prefix="ebb"))
    paths = home_paths(home)
    paths.library.symlink_to(LIBRARY)
    (CACHE / "kernels").mkdir(parents=True, exist_ok=True)
    paths.cache.symlink_to(CACHE / "kernels")
    environment = os.environ | {"EBBFLOW_HOME": str(home)}
    command = [*prefix, sys.executable, "-P", "-m", "ebbflow.daemon.supervisor", *flags]
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
