"""`python -m ebbflow.kernels.compile PART`: compile kernels that serve into the cache.

In processes of their own, because the compiler leaves about 100 MB behind in whoever ran it; in two, because the whole
step is one function that takes as long as all others.
"""

from __future__ import annotations

import sys

from .cache import PARTS


def compile_step() -> None:
    """The whole step, and what it is made of."""
    from . import step  # noqa: F401 - explicit signatures: importing a kernel compiles it


def compile_others() -> None:
    """Everything else: kernels that work op by op, or for few models."""
    from . import attention, elementwise, hadamard, matmul, planes, quantize, rounding, signs  # noqa: F401
    from .later import LATER

    for kernel in LATER:
        kernel.load()


def main() -> None:
    """Compile the part that the command line names."""
    part = sys.argv[1]
    assert part in PARTS
    if part == "step":
        compile_step()
    else:
        compile_others()


if __name__ == "__main__":
    main()
