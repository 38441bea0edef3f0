"""Kernels compiled by the suite are kept where a change in any kernel file makes them new again."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ebbflow.kernels.cache import use_cache

use_cache(Path(tempfile.gettempdir()) / "ebbflow-test-kernels")
