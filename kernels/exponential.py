"""e^x for vectors of float32, in one order of operations on every target.

Method: x = n ln 2 + r with n whole and |r| <= ln 2 / 2, ln 2 in two parts; e^r = 1 + (r + r^2 q(r)), q of degree 4,
fitted so that the largest relative error of e^r is least (Remez; 2^-28.3 before rounding the coefficients); 2^n by
writing exponent bits. Within 1.1 units in the last place (tests/kernels/test_exponential).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .vectors import call, constant, f32, i32, vector

LEAST: Final = -87.33654  # about -126 ln 2: below it e^x is no normal float32, and counts as 0
_LOG2_E: Final = 1.4426950408889634
_LN_2: Final = (float(np.float32(0.6931471805599453)), 0.6931471805599453 - float(np.float32(0.6931471805599453)))
_Q: Final = (0.4999999403953552, 0.1666652113199234, 0.04166838899254799, 0.008368716575205326, 0.001381459878757596)
_WHOLE: Final = 12582912.0  # 1.5 * 2^23: adding it to a small number leaves the nearest integer in the low bits
_BIAS: Final = 127 - int(np.float32(_WHOLE).view(np.int32))

F32 = NDArray[np.float32]


def fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """`a * b + c` for vectors, rounded once."""
    return call(builder, f"llvm.fma.v{a.type.count}f32", a.type, [a, b, c])


def exponential(builder: Any, x: Any) -> Any:
    """e^x for x at most 88; 0 below LEAST, NaN for NaN. e^0 is 1 exactly."""
    count = x.type.count

    def everywhere(value: float) -> Any:
        return constant(f32, [value] * count)

    moved = fused(builder, x, everywhere(_LOG2_E), everywhere(_WHOLE))
    n = builder.fsub(moved, everywhere(_WHOLE))
    r = x
    for part in _LN_2:
        r = fused(builder, n, everywhere(-part), r)
    q = everywhere(_Q[-1])
    for coefficient in _Q[-2::-1]:
        q = fused(builder, q, r, everywhere(coefficient))
    power = builder.fadd(fused(builder, builder.fmul(r, r), q, r), everywhere(1.0))
    whole = builder.add(builder.bitcast(moved, vector(i32, count)), constant(i32, [_BIAS] * count))
    scale = builder.bitcast(builder.shl(whole, constant(i32, [23] * count)), x.type)
    tiny = builder.fcmp_ordered("<", x, everywhere(LEAST))
    return builder.select(tiny, everywhere(0.0), builder.fmul(power, scale))


def plain_exponential(x: F32) -> F32:
    """The same without the compiler, to a rounding or two."""
    found: F32 = np.where(x < LEAST, 0, np.exp(x.astype(np.float64))).astype(np.float32)
    return found
