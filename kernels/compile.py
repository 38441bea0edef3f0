"""`python -m ebbflow.kernels.compile`: compile every kernel into the cache.

A process of its own, because the compiler leaves about 100 MB behind in whoever ran it.
"""

from __future__ import annotations

from . import attention, elementwise, hadamard, matmul, nested

KERNEL_FILES = (attention, elementwise, hadamard, matmul, nested)  # explicit signatures: importing them compiled them
