"""Instruction sets that the integer kernels are written for, and which of them this processor has.

All give the same bits (`planes` says why), so the choice is one of speed alone. EBBFLOW_INSTRUCTIONS names another than
the best, to measure or to look for a fault. Only the chosen one and the portable one are compiled, because each takes
the compiler ten seconds and more; with the name `every`, all are, and the best is chosen.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from typing import Final

import llvmlite.binding

PORTABLE: Final = 0
AVX512: Final = 1
AVX2: Final = 2
NEON: Final = 3
NAMES: Final = {"avx512": AVX512, "avx2": AVX2, "neon": NEON, "portable": PORTABLE}  # the fastest first

_NEEDS: Final = {
    AVX512: ("avx512f", "avx512bw", "avx512vl", "avx512vbmi", "avx512vbmi2", "avx512vnni", "gfni"),
    AVX2: ("avx2",),
    NEON: ("neon", "dotprod"),
}
_MACHINES: Final = {AVX512: ("x86_64", "AMD64"), AVX2: ("x86_64", "AMD64"), NEON: ("aarch64", "arm64")}
VARIABLE: Final = "EBBFLOW_INSTRUCTIONS"
EVERY: Final = "every"


def processor_features() -> Mapping[str, bool]:
    """What LLVM may use: the processor's own, or what numba's variables say instead (LLVM aborts when it is more)."""
    forced = os.environ.get("NUMBA_CPU_FEATURES", "")
    if forced or os.environ.get("NUMBA_CPU_NAME", "").lower() == "generic":
        return {part[1:]: part.startswith("+") for part in forced.split(",")}
    return dict(llvmlite.binding.get_host_cpu_features())


def available() -> tuple[str, ...]:
    """Names of what this processor can run, the fastest first; without the compiler only the portable one."""
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return ("portable",)
    features = processor_features()
    return tuple(
        name
        for name, code in NAMES.items()
        if platform.machine() in _MACHINES.get(code, (platform.machine(),))
        and all(features.get(feature) for feature in _NEEDS.get(code, ()))
    )


def choose() -> int:
    """The code of the fastest set, or of the one that EBBFLOW_INSTRUCTIONS names. Raises `ValueError`."""
    able, wanted = available(), os.environ.get(VARIABLE, "")
    if wanted in ("", EVERY):
        return NAMES[able[0]]
    if wanted not in able:
        raise ValueError(f"{VARIABLE} is {wanted!r}; this processor can run {', '.join(able)}")
    return NAMES[wanted]


def compiled() -> tuple[str, ...]:
    """Names of the sets that code is made for, the chosen one first. Raises `ValueError`."""
    if os.environ.get(VARIABLE) == EVERY:
        return available()
    chosen = next(name for name, code in NAMES.items() if code == choose())
    return tuple(dict.fromkeys((chosen, "portable")))
