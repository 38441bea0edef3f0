"""Kernels that few models need: compiled with the others, but loaded when they are first called.

Loading one takes 3 to 5 MB of a worker's memory, of which there are 110 to spend.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Final

from numba import njit

from .rows import JIT_OFF


class Later:
    """A function of that signature, for callers in Python only."""

    def __init__(self, function: Callable[..., None], signature: str) -> None:
        self._function, self._signature = function, signature
        self.__name__, self.__doc__ = function.__name__, function.__doc__

    def __call__(self, *arguments: Any) -> None:
        """Run it."""
        self._kernel(*arguments)

    @property
    def signatures(self) -> list[Any]:
        """What it is compiled for: one signature."""
        return list(self._kernel.signatures)

    def load(self) -> None:
        """Load it from the cache, or compile it."""
        _ = self._kernel

    @cached_property
    def _kernel(self) -> Any:
        kernel = njit(nogil=True, parallel=True, cache=True)(self._function)
        kernel.compile(self._signature)
        kernel.disable_compile()
        return kernel


LATER: Final[list[Later]] = []


def loaded_later(signature: str) -> Callable[[Callable[..., None]], Any]:
    """Decorates a parallel kernel."""

    def decorate(function: Callable[..., None]) -> Any:
        if JIT_OFF:
            return function
        LATER.append(Later(function, signature))
        return LATER[-1]

    return decorate
