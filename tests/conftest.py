"""Kernels compiled by the suite are kept where a change in any kernel file makes them new again."""

from __future__ import annotations

from ebbflow.kernels.cache import use_cache

from support.real_daemon import KERNELS

use_cache(KERNELS)
