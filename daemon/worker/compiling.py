"""`python -m ebbflow.daemon.worker.compiling PART`: what a worker starts to have its kernels compiled.

It must not outlive the worker: a minute of compiling for nobody, on a machine that may just be short of memory.
"""

from __future__ import annotations

from ..process import die_with_parent


def main() -> None:
    """Compile what is not in the cache, unless the worker ends before."""
    die_with_parent()
    from ...kernels.compile import main as compile_part

    compile_part()


if __name__ == "__main__":
    main()
