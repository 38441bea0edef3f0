"""What a child asks of the kernel for itself; the rest is tested with the children (`test_job`, the supervisor's)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ebbflow.daemon.process import PARENT_VARIABLE

CHILD = "from ebbflow.daemon.process import die_with_parent; die_with_parent(); print('alive')"


@pytest.mark.parametrize(("parent", "alive"), [(os.getpid(), True), (None, True), (2**30, False)])
def test_a_child_whose_parent_ended_before_it_could_ask_leaves(parent, alive):
    environment = os.environ | ({} if parent is None else {PARENT_VARIABLE: str(parent)})
    command = [sys.executable, "-P", "-c", CHILD]
    found = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert (found.returncode == 0, found.stdout == "alive\n") == (alive, alive)
    assert alive or f"process {parent}, which started this one, is gone" in found.stderr
