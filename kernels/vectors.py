"""LLVM IR for byte vectors: what the integer kernels need and numba does not write by itself.

A vector has `lanes` lanes of 128 bits, because the x86 instructions that interleave bytes work within such lanes: code
written for lanes is the same for AVX-512 (4), AVX2 (2) and NEON (1), and only this differs: how bytes are looked up,
how they are multiplied and added up, and that AVX-512 has an instruction that transposes 8 x 8 bits.
"""

from __future__ import annotations

from typing import Any, Final

from llvmlite import ir
from numba.core.cgutils import get_or_insert_function

LANE: Final = 16  # bytes
AHEAD: Final = (
    4096  # bytes asked for ahead of time in each stream: took planes on one core from 10 to 34 GB/s (AMD EPYC)
)
_BEFORE: Final = tuple(8 * (k // 8) + 4 * (k // 4 % 2) + 2 * (k % 2) + k // 2 % 2 for k in range(LANE))  # `rotate`
i8, i16, i32, i64, f32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()


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
    # Whether planes are multiplied with a single token as they are decoded (`planes.emit_single`).
    single = True

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

    def size(self, x: Any) -> Any:
        """Absolute values."""
        b = self.builder
        return b.select(b.icmp_signed("<", x, self.zero), b.sub(self.zero, x), x)

    def arrange(self, x: Any, order: tuple[int, ...]) -> Any:
        """In each lane its bytes in this order."""
        places = [LANE * lane + place for lane in range(self.lanes) for place in order]
        return shuffle(self.builder, x, x, places)

    def _gather(self, x: Any, y: Any, bits: int) -> tuple[Any, Any]:
        """Of `2 * bits` bits each, the upper half of `x` and the lower of `y` change places; None is all zeros, and `x`
        only where `y` is.
        """
        if x is None:
            return None, None
        b, low = self.builder, self.all(255 // ((1 << bits) + 1))
        if y is None:
            return b.and_(x, low), b.and_(self.right(x, bits), low)
        moved = b.and_(b.xor(self.right(x, bits), y), low)
        return b.xor(x, self.left(moved, bits)), b.xor(y, moved)

    def rotate(self, vectors: list[Any]) -> list[Any]:
        """Eight vectors: the three bits of a vector's number and the upper three of a byte's place in its lane change
        places, and the place's lowest bit becomes its top one.
        """
        found = list(vectors)
        for step in (4, 2, 1):
            for k in (k for k in range(8) if not k & step):
                pair = found[k], found[k + step]
                found[k], found[k + step] = (self.unpack(*pair, 1, high) for high in (False, True))
        return found

    def by_bit(self, planes: list[Any]) -> list[Any]:
        """Vectors of 3 or 4 planes -> 8 vectors of indices, one for each bit of a byte, as `look_up` wants them."""
        low, *more = reversed(planes)
        found = [low, *more, *[None] * (4 - len(planes))]
        for step in (1, 2):
            for k in (k for k in range(4) if not k & step):
                found[k], found[k + step] = self._gather(found[k], found[k + step], step)
        nibbles = [self.right(found[k], bits) for bits in (0, 4) for k in range(4)]  # of bits k and k + 4
        return nibbles if len(planes) == 3 else [self.builder.and_(nibble, self.all(15)) for nibble in nibbles]

    def levels_by_bit(self, table: list[Any], planes: list[Any]) -> list[Any]:
        """Vectors of planes -> 8 vectors of levels, one for each bit of a byte."""
        if len(planes) == 2:
            both = self._gather(planes[1], planes[0], 1)  # four indices in each byte, of every second bit
            nibbles = [self.builder.and_(self.right(some, bits), self.all(15)) for bits in (0, 4) for some in both]
            return [self.look_up(part, nibbles[k + odd]) for k in (0, 2) for part in table for odd in (0, 1)]
        upper, lower = planes[:-4], planes[-4:]
        found = []
        for bit, index in enumerate(self.by_bit(lower)):
            parts = [self.look_up(part, index) for part in table]
            for plane in reversed(upper):
                odd = self.builder.icmp_signed("<", self.left(plane, 7 - bit), self.zero)
                parts = [self.builder.select(odd, parts[k + 1], parts[k]) for k in range(0, len(parts), 2)]
            found += parts
        return found

    def indices(self, planes: list[Any]) -> list[Any]:
        """Vectors of four planes -> 8 vectors of indices in the order of `planes.column_order`, as `look_up` wants
        them.
        """
        return self.rotate(self.by_bit([self.arrange(plane, _BEFORE) for plane in planes]))

    def levels(self, table: list[Any], planes: list[Any]) -> list[Any]:
        """Vectors of 2 to 8 planes -> 8 vectors of levels in the order of `planes.column_order`."""
        return self.rotate(self.levels_by_bit(table, [self.arrange(plane, _BEFORE) for plane in planes]))

    def table(self, pointer: Any, depth: int) -> list[Any]:
        """2^depth levels from memory in vectors of 16, the same in all lanes. Of two planes, of which four bits are the
        indices of two columns: the levels of the lower, and of the upper.
        """
        count = min(LANE, 1 << depth)
        parts = [self.repeated(pointer, start, count) for start in range(0, 1 << depth, count)]
        return parts if depth > 2 else [*parts, self.arrange(parts[0], tuple(k // 4 for k in range(LANE)))]

    def look_up(self, part: Any, index: Any) -> Any:
        """The levels of indices of four bits, `part` being a vector of a table; an index's top bit is 0, others may be
        garbage.
        """
        raise NotImplementedError

    def dot(self, total: Any, w: Any, x: Any) -> Any:
        """`total` (i32) plus the products of four neighbouring bytes each."""
        raise NotImplementedError

    def dot_sized(self, total: Any, w: Any, x: Any, size: Any) -> Any:
        """The same, `size` being the absolute values of `x`."""
        return self.dot(total, w, x)

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
    single = False

    def transpose(self, x: Any) -> Any:
        """Of every 8 bytes: byte j gets bit j of each, the first byte's as its top bit."""
        identity = constant(i8, [1 << bit for bit in range(8)] * 8)
        return call(self.builder, "llvm.x86.vgf2p8affineqb.512", self.kind, [identity, x, ir.Constant(i8, 0)])

    def indices(self, planes: list[Any]) -> list[Any]:
        """Of any number of planes: interleaved until 64 bits hold 8 x 8 bits, columns by planes, or of two or four
        planes several such groups, then transposed. Bits above the index are garbage up to depth 4, and zero beyond.
        """
        d = len(planes)
        if d == 2:
            found = []
            for high in (False, True):
                pairs = self.unpack(planes[0], planes[1], 1, high)
                mixed = self.transpose(self.pick(pairs, pairs, (0, 2, 1, 3)))
                found += [self.right(mixed, bits) for bits in (6, 4, 2, 0)]
            return found
        if d <= 4:
            found = []
            for mixed in self._fours([self.zero] * (4 - d) + planes):
                turned = self.transpose(mixed)
                found += [self.right(turned, 4), turned]
            return found
        eight = [self.zero] * (8 - d) + planes
        return [
            self.transpose(self.pick(top, low, order))
            for top, low in zip(self._fours(eight[:4]), self._fours(eight[4:]), strict=True)
            for order in ((0, 4, 2, 6), (1, 5, 3, 7))
        ]

    def _fours(self, p: list[Any]) -> list[Any]:
        """Bytes of four planes interleaved: four vectors."""
        return [
            self.unpack(self.unpack(p[0], p[1], 1, low), self.unpack(p[2], p[3], 1, low), 2, high)
            for low in (False, True)
            for high in (False, True)
        ]

    def table(self, pointer: Any, depth: int) -> list[Any]:
        """One, two or four vectors of 64, as unsigned numbers."""
        count = min(64, 1 << depth)
        parts = [self.repeated(pointer, start, count) for start in range(0, 1 << depth, count)]
        return [self.builder.xor(part, self.all(self.flip)) for part in parts]

    def levels(self, table: list[Any], planes: list[Any]) -> list[Any]:
        """`vpermb` heeds 6 bits of an index, `vpermi2b` 7."""
        return [self._level(table, index) for index in self.indices(planes)]

    def _level(self, table: list[Any], index: Any) -> Any:
        if len(table) == 1:
            return self.look_up(table[0], index)
        low, *high = (
            call(self.builder, "llvm.x86.avx512.vpermi2var.qi.512", self.kind, [table[k], index, table[k + 1]])
            for k in range(0, len(table), 2)
        )
        return self.builder.select(self.builder.icmp_signed("<", index, self.zero), high[0], low) if high else low

    def look_up(self, part: Any, index: Any) -> Any:
        """Whatever the upper bits are, if they choose among copies."""
        return call(self.builder, "llvm.x86.avx512.permvar.qi.512", self.kind, [part, index])

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

    def look_up(self, part: Any, index: Any) -> Any:
        """`vpshufb`."""
        return call(self.builder, "llvm.x86.avx2.pshuf.b", self.kind, [part, index])

    def multiply_pairs(self, x: Any, y: Any) -> Any:
        """Nothing saturates."""
        return call(self.builder, "llvm.x86.avx2.pmadd.ub.sw", vector(i16, 16), [x, y])

    def dot(self, total: Any, w: Any, x: Any) -> Any:
        """Exact: a pair of products is at most 2 * 127 * 127."""
        return self.dot_sized(total, x, w, self.size(w))

    def dot_sized(self, total: Any, w: Any, x: Any, size: Any) -> Any:
        """The sign of `x` moves into `w`."""
        b, halves = self.builder, vector(i16, self.nbytes // 2)
        signed = call(b, "llvm.x86.avx2.psign.b", self.kind, [w, x])
        pairs = call(b, "llvm.x86.avx2.pmadd.ub.sw", halves, [size, signed])
        ones = constant(i16, [1] * (self.nbytes // 2))
        return b.add(total, call(b, "llvm.x86.avx2.pmadd.wd", total.type, [pairs, ones]))


class Neon(Bytes):
    """ARMv8.2 with dot products. LLVM's code for it was looked at (tests/kernels), but never ran."""

    name = "neon"
    lanes = 1

    def look_up(self, part: Any, index: Any) -> Any:
        """`tbl` heeds all bits."""
        index = self.builder.and_(index, self.all(15))
        return call(self.builder, "llvm.aarch64.neon.tbl1.v16i8", self.kind, [part, index])

    def multiply_pairs(self, x: Any, y: Any) -> Any:
        """Both signed, half by half."""
        b, wide = self.builder, vector(i16, 8)
        halves = [[shuffle(b, part, part, range(first, first + 8)) for part in (x, y)] for first in (0, 8)]
        products = [call(b, "llvm.aarch64.neon.smull.v8i16", wide, pair) for pair in halves]
        return call(b, "llvm.aarch64.neon.addp.v8i16", wide, products)

    def dot(self, total: Any, w: Any, x: Any) -> Any:
        """Both signed."""
        return call(self.builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", total.type, [total, w, x])
