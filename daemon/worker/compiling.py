"""`python -m ebbflow.daemon.worker.compiling`: what a worker starts to have its kernels compiled.

It must not outlive the worker: a minute of compiling for nobody, on a machine that may just be short of memory.
"""

from __future__ import annotations

from ..process import die_with_parent


def main() -> None:
    """Compile every kernel that is not in the cache, unless the worker ends before."""
    die_with_parent()
    from ...kernels import compile  # noqa: A004, F401 - importing it compiles


if __name__ == "__main__":
    main()
