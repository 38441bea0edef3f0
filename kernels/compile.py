"""`python -m ebbflow.kernels.compile`: compile every kernel that serves into the cache.

A process of its own, because the compiler leaves about 100 MB behind in whoever ran it.
"""

from __future__ import annotations

from . import attention, elementwise, hadamard, matmul, planes, quantize, signs, step
from .later import LATER

KERNEL_FILES = (
    attention,
    elementwise,
    hadamard,
    matmul,
    planes,
    quantize,
    signs,
    step,
)  # explicit signatures: importing them compiled them
for kernel in LATER:
    kernel.load()
