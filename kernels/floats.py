"""Stored numbers -> float32, LANES of them at a time.

LLVM makes vectors of such loops by itself only in some of the places where they are compiled in: the same loop over
fp16 ran at 4.9 or 1.1 numbers a nanosecond. So they are written as vectors, which are legal on every target. Every
conversion is exact, so that scalar code for what is left of a row gives the same.
"""

from __future__ import annotations

from typing import Any, Final

from numba import types

from .halves import widen
from .vectors import (
    AHEAD,
    cases,
    constant,
    f32,
    i8,
    i16,
    i32,
    load,
    loop,
    number,
    pointer,
    prefetch,
    shuffle,
    splat,
    store,
    vector,
    width,
)

LANES: Final = 16  # floats in one vector


def emit_floats(b: Any, form: str, base: Any, at: Any, place: Any) -> Any:
    """LANES numbers from number `place` (even, of i4) of those that begin at byte `at` of `base`."""
    if form == "i4":
        both = load(b, vector(i8, LANES // 2), b.gep(base, [b.add(at, b.lshr(place, number(1)))]))
        low = b.and_(both, constant(i8, [15] * (LANES // 2)))
        high = b.lshr(both, constant(i8, [4] * (LANES // 2)))
        halves = shuffle(b, low, high, [k // 2 + LANES // 2 * (k % 2) for k in range(LANES)])
        eight = constant(i8, [8] * LANES)
        return b.sitofp(b.sub(b.xor(halves, eight), eight), vector(f32, LANES))
    element, size = {"f32": (f32, 4), "f16": (i16, 2), "bf16": (i16, 2), "i8": (i8, 1)}[form]
    begins = b.add(at, b.mul(place, number(size)))
    prefetch(b, b.gep(base, [b.add(begins, number(AHEAD))]))
    stored = load(b, vector(element, LANES), b.gep(base, [begins]))
    if form == "f16":
        return widen(b, stored)
    if form == "bf16":
        wide = b.shl(b.zext(stored, vector(i32, LANES)), constant(i32, [16] * LANES))
        return b.bitcast(wide, vector(f32, LANES))
    return b.sitofp(stored, vector(f32, LANES)) if form == "i8" else stored


def typed_floats(forms: dict[int, str], add: bool) -> Any:
    """An intrinsic `(code, stored, at, count, scale, out [rows, >= count], row)`: `count // LANES * LANES` numbers of
    form `forms[code]` from byte `at`, times `scale` if they are integers, into `out[row]`, or added to it.
    """

    def typed(typing: Any, code: Any, stored: Any, at: Any, count: Any, scale: Any, out: Any, row: Any) -> Any:
        whole = types.int64
        signature = types.void(whole, stored, whole, whole, types.float32, out, whole)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            b = builder
            code, stored, at, count, scale, out, row = args
            base, rows = pointer(context, b, sig.args[1], stored), pointer(context, b, sig.args[5], out)
            first = b.mul(row, width(context, b, sig.args[5], out))
            target = b.gep(b.bitcast(rows, f32.as_pointer()), [first])
            several = b.icmp_signed(">=", count, number(LANES))
            last = b.and_(count, number(-LANES))

            def read(form: str) -> None:
                with b.if_then(several):
                    place, following, end = loop(b, last, LANES, unroll=False)
                    found = emit_floats(b, form, base, at, place)
                    if form in ("i8", "i4"):
                        found = b.fmul(splat(b, scale, LANES), found)
                    where = b.gep(target, [place])
                    store(b, b.fadd(load(b, found.type, where, 4), found) if add else found, where, 4)
                    following()
                    end()

            cases(b, code, {key: lambda form=form: read(form) for key, form in forms.items()})
            return context.get_dummy_value()

        return signature, codegen

    return typed
