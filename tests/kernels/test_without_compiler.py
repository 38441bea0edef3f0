"""The kernels' plain Python is the same program: their tests, at tiny sizes, with numba switched off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ebbflow.kernels.rows import JIT_OFF

HERE = Path(__file__).parent


@pytest.mark.skipif(JIT_OFF, reason="this is that run")
def test_the_kernels_pass_their_tests_with_the_compiler_off() -> None:
    files = [HERE / f"test_{name}.py" for name in ("kernels", "determinism", "attention", "sharing", "signs")]
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", *map(str, files)]
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run(
        command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
