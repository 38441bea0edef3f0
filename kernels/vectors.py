"""LLVM IR for byte vectors: what the integer kernels need and numba does not write by itself.

A vector has `lanes` lanes of 128 bits, because the x86 instructions that interleave bytes work within such lanes: code
written for lanes is the same for AVX-512 (4), AVX2 (2) and NEON (1), and only three things differ: how a matrix of
8 x 8 bits is transposed, how bytes are looked up, and how bytes are multiplied and added up.
"""

from __future__ import annotations

from typing import Any, Final

from llvmlite import ir
from numba.core.cgutils import get_or_insert_function

LANE: Final = 16  # bytes
AHEAD: Final = (
    4096  # bytes asked for ahead of time in each stream: took planes on one core from 10 to 34 GB/s (AMD EPYC)
)
i8, i16, i32, i64, f32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_TRANSPOSE: Final = ((7, 0x00AA00AA00AA00AA), (14, 0x0000CCCC0000CCCC), (28, 0x00000000F0F0F0F0))


def vector(element: Any, count: int) -> Any:
    """The type."""
    return ir.VectorType(element, count)


def constant(element: Any, values: Any) -> Any:
    """A vector of constants."""
    values = list(values)
    return ir.Constant(vector(element, len(values)), values)


def number(value: int) -> Any:
    """An i64 constant."""
    return ir.Constant(i64, value)


def shuffle(builder: Any, x: Any, y: Any, places: Any) -> Any:
    """Elements of `x` followed by those of `y`, picked by constant places."""
    return builder.shuffle_vector(x, y, constant(i32, places))


def call(builder: Any, name: str, result: Any, arguments: Any) -> Any:
    """An LLVM intrinsic."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(get_or_insert_function(builder.module, kind, name), arguments)


def load(builder: Any, kind: Any, pointer: Any, align: int = 1) -> Any:
    """A vector from memory."""
    return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=align)


def store(builder: Any, value: Any, pointer: Any, align: int = 1) -> None:
    """A vector to memory."""
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=align)


def splat(builder: Any, value: Any, count: int) -> Any:
    """A scalar everywhere."""
    one = builder.insert_element(ir.Constant(vector(value.type, count), ir.Undefined), value, ir.Constant(i32, 0))
    return shuffle(builder, one, one, [0] * count)


def prefetch(builder: Any, pointer: Any) -> None:
    """Ask for the cache line at `pointer`, which need not exist."""
    call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, *(ir.Constant(i32, value) for value in (0, 3, 1))])


def loop(builder: Any, stop: Any, step: int = 1, unroll: bool = True) -> tuple[Any, Any, Any]:
    """A loop from 0 below `stop > 0`: its variable, what to call after the body, and what after the loop.

    LLVM may `unroll` it, which takes time to compile.
    """
    before = builder.block
    body, after = builder.append_basic_block("loop"), builder.append_basic_block("after")
    builder.branch(body)
    builder.position_at_end(body)
    variable = builder.phi(i64)
    variable.add_incoming(number(0), before)

    def following() -> None:
        further = builder.add(variable, number(step))
        variable.add_incoming(further, builder.block)
        branch = builder.cbranch(builder.icmp_signed("<", further, stop), body, after)
        if not unroll:
            module = builder.module
            never = module.add_metadata([ir.MetaDataString(module, "llvm.loop.unroll.disable")])
            node = module.add_metadata([ir.MetaDataString(module, f"{builder.function.name} {body.name}"), never])
            node.operands = (node, never)  # LLVM heeds only a node that names itself
            branch.set_metadata("llvm.loop", node)

    return variable, following, lambda: builder.position_at_end(after)


def cases(builder: Any, value: Any, emitters: dict[int, Any]) -> None:
    """Run the code that `emitters[value]` emits; none for a value that is not among them."""
    after = builder.append_basic_block("after_cases")
    blocks = {key: builder.append_basic_block(f"case_{key}") for key in emitters}
    switch = builder.switch(value, after)
    for key, emit in emitters.items():
        switch.add_case(number(key), blocks[key])
        builder.position_at_end(blocks[key])
        emit()
        builder.branch(after)
    builder.position_at_end(after)


def pointer(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    """To an array's bytes."""
    return builder.bitcast(context.make_array(kind)(context, builder, array).data, i8.as_pointer())


def width(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    """Columns of an array of rows."""
    return builder.extract_value(context.make_array(kind)(context, builder, array).shape, 1)


def plain(*arguments: Any) -> None:
    """In the place of an intrinsic."""
    raise AssertionError("there are no vectors without the compiler")


class Bytes:
    """Byte vectors of one width. The base class is what any target can do."""

    name = "portable"
    lanes = 1
    # xor on stored levels, because some multiply-adds take one factor unsigned; `planes` has the correction.
    flip = 0

    def __init__(self, builder: Any) -> None:
        self.builder = builder
        self.nbytes = LANE * self.lanes
        self.kind = vector(i8, self.nbytes)
        self.zero = constant(i8, [0] * self.nbytes)

    def all(self, value: int) -> Any:
        """One byte everywhere."""
        return constant(i8, [value] * self.nbytes)

    def masked(self, pointer: Any, words: Any) -> Any:
        """The vector at `pointer`, of which only the first `words` 64-bit words (perhaps none) are touched; else 0."""
        count = 2 * self.lanes
        places = constant(i64, range(count))
        wanted = self.builder.icmp_signed("<", places, splat(self.builder, words, count))
        arguments = [
            self.builder.bitcast(pointer, places.type.as_pointer()),
            ir.Constant(i32, 8),
            wanted,
            ir.Constant(places.type, [0] * count),
        ]
        found = call(self.builder, f"llvm.masked.load.v{count}i64.p0", places.type, arguments)
        return self.builder.bitcast(found, self.kind)

    def unpack(self, x: Any, y: Any, size: int, high: bool) -> Any:
        """Units of `size` bytes of `x` and `y` in turn, from the low or high half of each lane."""
        unit = vector(ir.IntType(8 * size), self.nbytes // size)
        per = LANE // size
        places = []
        for lane in range(self.lanes):
            for place in range(per // 2):
                at = lane * per + place + (per // 2 if high else 0)
                places += [at, self.nbytes // size + at]
        mixed = shuffle(self.builder, self.builder.bitcast(x, unit), self.builder.bitcast(y, unit), places)
        return self.builder.bitcast(mixed, self.kind)

    def pick(self, x: Any, y: Any, order: tuple[int, ...]) -> Any:
        """In each lane four 32-bit units: 0 to 3 are those of `x`, 4 to 7 those of `y`."""
        unit = vector(i32, 4 * self.lanes)
        places = [4 * lane + o + (4 * self.lanes - 4) * (o > 3) for lane in range(self.lanes) for o in order]
        mixed = shuffle(self.builder, self.builder.bitcast(x, unit), self.builder.bitcast(y, unit), places)
        return self.builder.bitcast(mixed, self.kind)

    def right(self, x: Any, bits: int) -> Any:
        """Every byte shifted right; the bits that come in are garbage."""
        if bits == 0:
            return x
        unit = vector(i16, self.nbytes // 2)
        shifted = self.builder.lshr(self.builder.bitcast(x, unit), constant(i16, [bits] * (self.nbytes // 2)))
        return self.builder.bitcast(shifted, self.kind)

    def left(self, x: Any, bits: int) -> Any:
        """Every byte shifted left; the bits that come in are garbage."""
        unit = vector(i16, self.nbytes // 2)
        shifted = self.builder.shl(self.builder.bitcast(x, unit), constant(i16, [bits] * (self.nbytes // 2)))
        return self.builder.bitcast(shifted, self.kind)

    def transpose(self, x: Any) -> Any:
        """Of every 8 bytes: byte j gets bit j of each, the first byte's as its top bit."""
        b, count = self.builder, 2 * self.lanes
        places = [8 * word + 7 - byte for word in range(count) for byte in range(8)]
        words = b.bitcast(shuffle(b, x, x, places), vector(i64, count))
        for shift, mask in _TRANSPOSE:
            by = constant(i64, [shift] * count)
            moved = b.and_(b.xor(words, b.lshr(words, by)), constant(i64, [mask] * count))
            words = b.xor(words, b.xor(moved, b.shl(moved, by)))
        return b.bitcast(words, self.kind)

    def table(self, pointer: Any, depth: int) -> list[Any]:
        """2^depth levels from memory, as `look_up` wants them."""
        raise NotImplementedError

    def look_up(self, table: list[Any], index: Any, depth: int) -> Any:
        """The levels of every index, of which only the low bits that `indices` documents count."""
        raise NotImplementedError

    def dot(self, total: Any, w: Any, x: Any) -> Any:
        """`total` (i32) plus the products of four neighbouring bytes each."""
        raise NotImplementedError

    def multiply_pairs(self, x: Any, y: Any) -> Any:
        """Two neighbouring products each, added up to 16 bits: `x` in [0, 127], `y` in [-127, 127]."""
        raise NotImplementedError

    def high_bytes(self, low: Any, high: Any) -> Any:
        """The upper bytes of 16-bit numbers: in each lane those of `low`, then those of `high`."""
        places = [
            LANE * lane + 2 * k + 1 + part * self.nbytes
            for lane in range(self.lanes)
            for part in (0, 1)
            for k in range(8)
        ]
        x, y = (self.builder.bitcast(value, self.kind) for value in (low, high))
        return shuffle(self.builder, x, y, places)

    def repeated(self, pointer: Any, start: int, count: int) -> Any:
        """`count` bytes from `pointer + start`, again and again until a vector is full."""
        few = load(self.builder, vector(i8, count), self.builder.gep(pointer, [number(start)]))
        return shuffle(self.builder, few, few, [place % count for place in range(self.nbytes)])


class Avx512(Bytes):
    """With VBMI (byte permutation), VBMI2 (expansion), VNNI (multiply-add of bytes) and GFNI (products with bit
    matrices).
    """

    name = "avx512"
    lanes = 4
    flip = 0x80

    def transpose(self, x: Any) -> Any:
        """One product with the identity."""
        identity = constant(i8, [1 << bit for bit in range(8)] * 8)
        return call(self.builder, "llvm.x86.vgf2p8affineqb.512", self.kind, [identity, x, ir.Constant(i8, 0)])

    def table(self, pointer: Any, depth: int) -> list[Any]:
        """One, two or four vectors of 64, as unsigned numbers."""
        count = min(64, 1 << depth)
        parts = [self.repeated(pointer, start, count) for start in range(0, 1 << depth, count)]
        return [self.builder.xor(part, self.all(self.flip)) for part in parts]

    def look_up(self, table: list[Any], index: Any, depth: int) -> Any:
        """`vpermb` heeds 6 bits, `vpermi2b` 7."""
        if len(table) == 1:
            return call(self.builder, "llvm.x86.avx512.permvar.qi.512", self.kind, [table[0], index])
        low, *high = (
            call(self.builder, "llvm.x86.avx512.vpermi2var.qi.512", self.kind, [table[k], index, table[k + 1]])
            for k in range(0, len(table), 2)
        )
        return self.builder.select(self.builder.icmp_signed("<", index, self.zero), high[0], low) if high else low

    def multiply_pairs(self, x: Any, y: Any) -> Any:
        """Nothing saturates."""
        return call(self.builder, "llvm.x86.avx512.pmaddubs.w.512", vector(i16, 32), [x, y])

    def dot(self, total: Any, w: Any, x: Any) -> Any:
        """`w` unsigned, `x` signed; nothing saturates."""
        w, x = (self.builder.bitcast(value, total.type) for value in (w, x))
        return call(self.builder, "llvm.x86.avx512.vpdpbusd.512", total.type, [total, w, x])


class Avx2(Bytes):
    """`vpmaddubsw` saturates, but not with factors in [-127, 127] whose signs were moved into one of them."""

    name = "avx2"
    lanes = 2

    def table(self, pointer: Any, depth: int) -> list[Any]:
        """Vectors of 16 levels, the same in both lanes."""
        count = min(LANE, 1 << depth)
        return [self.repeated(pointer, start, count) for start in range(0, 1 << depth, count)]

    def look_up(self, table: list[Any], index: Any, depth: int) -> Any:
        """`vpshufb` heeds 4 bits, and wants the top one clear."""
        b = self.builder
        low = b.and_(index, self.all(15))
        found = [call(b, "llvm.x86.avx2.pshuf.b", self.kind, [part, low]) for part in table]
        for bit in range(4, depth):
            odd = b.icmp_signed("<", self.left(index, 7 - bit), self.zero)
            found = [b.select(odd, found[k + 1], found[k]) for k in range(0, len(found), 2)]
        return found[0]

    def multiply_pairs(self, x: Any, y: Any) -> Any:
        """Nothing saturates."""
        return call(self.builder, "llvm.x86.avx2.pmadd.ub.sw", vector(i16, 16), [x, y])

    def dot(self, total: Any, w: Any, x: Any) -> Any:
        """Exact: a pair of products is at most 2 * 127 * 127."""
        b, halves = self.builder, vector(i16, self.nbytes // 2)
        size = b.select(b.icmp_signed("<", w, self.zero), b.sub(self.zero, w), w)
        signed = call(b, "llvm.x86.avx2.psign.b", self.kind, [x, w])
        pairs = call(b, "llvm.x86.avx2.pmadd.ub.sw", halves, [size, signed])
        ones = constant(i16, [1] * (self.nbytes // 2))
        return b.add(total, call(b, "llvm.x86.avx2.pmadd.wd", total.type, [pairs, ones]))


class Neon(Bytes):
    """ARMv8.2 with dot products. LLVM's code for it was looked at (tests/kernels), but never ran."""

    name = "neon"
    lanes = 1

    def table(self, pointer: Any, depth: int) -> list[Any]:
        """Vectors of 16 levels."""
        count = min(LANE, 1 << depth)
        return [self.repeated(pointer, start, count) for start in range(0, 1 << depth, count)]

    def look_up(self, table: list[Any], index: Any, depth: int) -> Any:
        """`tbl` gives 0 for an index beyond its (at most four) vectors, so parts of the table add up."""
        b = self.builder
        if depth < 4:
            index = b.and_(index, self.all((1 << depth) - 1))
        elif depth == 4:
            index = b.and_(index, self.all(15))
        found = self.zero
        for start in range(0, len(table), 4):
            part = table[start : start + 4]
            moved = b.sub(index, self.all(LANE * start)) if start else index
            found = b.or_(found, call(b, f"llvm.aarch64.neon.tbl{len(part)}.v16i8", self.kind, [*part, moved]))
        return found

    def multiply_pairs(self, x: Any, y: Any) -> Any:
        """Both signed, half by half."""
        b, wide = self.builder, vector(i16, 8)
        halves = [[shuffle(b, part, part, range(first, first + 8)) for part in (x, y)] for first in (0, 8)]
        products = [call(b, "llvm.aarch64.neon.smull.v8i16", wide, pair) for pair in halves]
        return call(b, "llvm.aarch64.neon.addp.v8i16", wide, products)

    def dot(self, total: Any, w: Any, x: Any) -> Any:
        """Both signed."""
        return call(self.builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", total.type, [total, w, x])
