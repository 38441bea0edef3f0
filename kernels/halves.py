"""fp16 to float32 and back, for vectors: by the processor where it can, else in integers with the same results."""

from __future__ import annotations

import platform
from typing import Any, Final

from llvmlite import ir

from .instructions import processor_features
from .vectors import constant, f32, i16, i32, vector

LARGEST: Final = 65504.0
WIDEN_SCALE: Final = 2.0**112  # moves an fp16 exponent, placed in fp32 bits, to where it belongs
_LEAST_NORMAL: Final = 0x38800000  # 2^-14 as fp32 bits
_REBIAS: Final = 112 << 23
_HALF: Final = 0x3F000000  # 0.5 as fp32 bits: its unit in the last place is the least fp16


def _able() -> bool:
    """Without F16C LLVM calls a function on x86 that numba cannot link; ARM's vectors have always had it."""
    if platform.machine() in ("aarch64", "arm64"):
        return True
    return bool(processor_features().get("f16c"))


ABLE: Final = _able()


def _all(like: Any, value: int) -> Any:
    """An i32 everywhere, in as many lanes as `like` has."""
    return constant(i32, [value] * like.type.count)


def widen(builder: Any, halves: Any, able: bool = ABLE) -> Any:
    """Bits of fp16 (a vector of i16) -> fp32: exact, subnormals included; infinity and NaN stay."""
    count = halves.type.count
    if able:
        return builder.fpext(builder.bitcast(halves, vector(ir.HalfType(), count)), vector(f32, count))
    wide = builder.zext(halves, vector(i32, count))

    sign = builder.shl(builder.and_(wide, _all(wide, 0x8000)), _all(wide, 16))
    rest = builder.shl(builder.and_(wide, _all(wide, 0x7FFF)), _all(wide, 13))
    scaled = builder.fmul(builder.bitcast(rest, vector(f32, count)), constant(f32, [WIDEN_SCALE] * count))
    finite = builder.icmp_unsigned("<", rest, _all(wide, 0x7C00 << 13))
    bits = builder.select(finite, builder.bitcast(scaled, wide.type), builder.or_(rest, _all(wide, 0x7F800000)))
    return builder.bitcast(builder.or_(bits, sign), vector(f32, count))


def cut(builder: Any, singles: Any) -> Any:
    """What is larger than the largest fp16, infinity included, becomes that; NaN stays."""
    for comparison, limit in ((">", LARGEST), ("<", -LARGEST)):
        bound = constant(f32, [limit] * singles.type.count)
        singles = builder.select(builder.fcmp_ordered(comparison, singles, bound), bound, singles)
    return singles


def narrow(builder: Any, singles: Any, able: bool = ABLE) -> Any:
    """Fp32 -> bits of the nearest fp16 (a vector of i16), half to even; what is larger becomes the largest fp16.

    So does infinity: a value never becomes infinite on its way into memory. NaN stays NaN.
    """
    count = singles.type.count
    singles = cut(builder, singles)
    if able:
        return builder.bitcast(builder.fptrunc(singles, vector(ir.HalfType(), count)), vector(i16, count))
    bits = builder.bitcast(singles, vector(i32, count))
    sign = builder.and_(builder.lshr(bits, _all(bits, 16)), _all(bits, 0x8000))
    size = builder.and_(bits, _all(bits, 0x7FFFFFFF))
    odd = builder.and_(builder.lshr(size, _all(bits, 13)), _all(bits, 1))
    rounded = builder.add(builder.add(builder.sub(size, _all(bits, _REBIAS)), _all(bits, 0xFFF)), odd)
    normal = builder.lshr(rounded, _all(bits, 13))
    # adding a half leaves a multiple of the least fp16 in the low bits, rounded by the addition
    moved = builder.fadd(builder.bitcast(size, singles.type), constant(f32, [0.5] * count))
    small = builder.sub(builder.bitcast(moved, bits.type), _all(bits, _HALF))
    found = builder.select(builder.icmp_unsigned("<", size, _all(bits, _LEAST_NORMAL)), small, normal)
    found = builder.select(builder.icmp_unsigned(">", size, _all(bits, 0x7F800000)), _all(bits, 0x7E00), found)
    return builder.trunc(builder.or_(found, sign), vector(i16, count))
