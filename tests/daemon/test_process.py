"""What a child asks of the kernel for itself; the rest is tested with the children (`test_job`, the supervisor's)."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ebbflow.daemon.process import PARENT_VARIABLE, allow_files

from support.real_daemon import PATIENCE_SECONDS, until

CHILD = "from ebbflow.daemon.process import die_with_parent; die_with_parent(); print('alive')"


@pytest.mark.parametrize(("parent", "alive"), [("ours", True), (None, True), (2**30, False)])
def test_a_child_whose_parent_ended_before_it_could_ask_leaves(parent, alive):
    said = os.getpid() if parent == "ours" else parent
    environment = os.environ | ({} if said is None else {PARENT_VARIABLE: str(said)})
    command = [sys.executable, "-P", "-c", CHILD]
    found = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert (found.returncode == 0, found.stdout == "alive\n") == (alive, alive)
    assert alive or f"process {parent}, which started this one, is gone" in found.stderr


COMPILER = """
import os
from ebbflow.daemon.process import PARENT_VARIABLE
from ebbflow.kernels.cache import compile_once, use_cache
from pathlib import Path
os.environ[PARENT_VARIABLE] = str(os.getpid())
compile_once(use_cache(Path({root!r})), "ebbflow.daemon.worker.compiling")
"""


def test_compiling_ends_with_its_worker(tmp_path):
    worker = subprocess.Popen([sys.executable, "-P", "-c", COMPILER.format(root=str(tmp_path))], stderr=subprocess.PIPE)
    children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children")
    until(lambda: bool(children.read_text().split()))
    compiler = int(children.read_text())
    worker.send_signal(signal.SIGKILL)
    worker.communicate(
        timeout=PATIENCE_SECONDS
    )  # its standard error is the compiler's too: closed when both have ended
    until(lambda: not Path(f"/proc/{compiler}").exists() or "State:\tZ" in Path(f"/proc/{compiler}/status").read_text())


def test_files_are_allowed_up_to_the_hard_limit():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1000, before[1]))
        allow_files(1500)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (1500, before[1])
        allow_files(1200)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (1500, before[1])
        allow_files(10**9)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
