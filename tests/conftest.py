"""Kernels compiled by the suite are kept where a change in any kernel file makes them new again; those for GPUs are
interpreted.
"""

from __future__ import annotations

import os
import signal

import pytest

from ebbflow.kernels.cache import compile_once, use_cache

from support.real_daemon import KERNELS

os.environ.setdefault("EBBFLOW_INSTRUCTIONS", "every")
os.environ.setdefault("TRITON_INTERPRET", "1")  # heeded when Triton is imported, which nothing does before this
FOLDER = use_cache(KERNELS)
# A shell's background job (and some CI) starts with Ctrl-C ignored, and Python then leaves it so; tests press it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Before the suite is dealt out to processes, which would all compile the same."""
    if getattr(config.option, "numprocesses", None):
        compile_once(FOLDER, together=True)
