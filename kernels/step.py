"""A whole step of a network, in one parallel region: from embedded tokens to logits.

A step is a program of phases, one row of integers each, that `daemon/engine/program` makes of a network's description;
what a phase does is below. Threads claim shares of a phase and wait for each other at its end (`team`): a parallel
region for every matrix would cost 0.2 ms each on a virtual machine, more than the matrix.

Every number comes from the same functions, in the same order, as in the kernels of single operations, so that the two
ways to compute a step give the same bits.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from .attention import attend_unit, cut_units, store_token
from .elementwise import gate_row, norm_row, turn_head
from .planes import level_stride, multiply_rows, padded
from .quantize import quantize_row
from .rounding import round_row
from .rows import PLANE, ROWS
from .signs import integral, multiply_sum_rows
from .team import claim, finish

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]

# What a phase does with its fields. The first three round their values for the matrices of the MULTIPLY that follows,
# in the form that each wants. `width` numbers the network's input widths: 0 hidden, 1 heads * e, 2 intermediate.
NORM: Final = 0  # rounds the norm (field 1: where its weight begins) of the hidden states, of width 0
MIX: Final = 1  # rounds what attention gave, of width 1
GATE: Final = 2  # rounds silu(gate) * up, of width 2
MULTIPLY: Final = 3  # what was rounded times matrices `[first, first + count)` (fields 1, 2) into target (field 3)
HEADS: Final = 4  # norms and rotary embedding of queries and keys (fields 2, 3: weights or -1), then layer field 1's KV
ATTEND: Final = 5  # layer field 1
FIELDS: Final = 5
# Field 4 of NORM and MULTIPLY: 1 where only the rows that want logits are in play.
TARGET_HIDDEN: Final = 0  # is added to
TARGET_HEADS: Final = 1
TARGET_WIDE: Final = 2
TARGET_LOGITS: Final = 3

SHARES: Final = 4  # of one matrix, for each thread


@njit(nogil=True)
def _bias(vectors: F32, at: int, m: int) -> F32:
    return vectors[at : at + m] if at >= 0 else vectors[:0]


@njit(nogil=True)
def _form(
    q: NDArray[np.int8], scales: F32, corrections: NDArray[np.int32], slot: int, tokens: int, p: int
) -> tuple[NDArray[np.int8], F32, NDArray[np.int32]]:
    """Bytes `[tokens, p]`, scales and corrections of one of the forms in which a phase's input is multiplied."""
    begin, size = slot * tokens * p, tokens * p
    groups, length = begin // 32, size // 32
    return (
        q[begin : begin + size].reshape(tokens, p),
        scales[groups : groups + length].reshape(tokens, p // 32),
        corrections[groups : groups + length].reshape(tokens, p // 32),
    )


@njit(nogil=True)
def _round_inputs(
    phase: int,
    thread: int,
    program: I64,
    eps: float,
    shapes: I64,
    blocks: I64,
    made: U8,
    vectors: F32,
    signs: F32,
    sizes: I64,
    hidden: F32,
    mixed: F32,
    wide: F32,
    wanted: I64,
    q: NDArray[np.int8],
    scales: F32,
    corrections: NDArray[np.int32],
    rows: F32,
    counters: I64,
) -> None:
    """NORM, MIX and GATE: a share is one token in the form of one matrix."""
    op, first, count = program[phase, 0], program[phase + 1, 1], program[phase + 1, 2]
    tokens = wanted.shape[0] if program[phase, 4] else hidden.shape[0]
    n = shapes[first, 1]
    p = padded(n)
    normed, scratch = rows[thread, 0], rows[thread, 1]
    used = 0
    while used < sizes.shape[1] and sizes[op, used] > 0:
        used += 1
    share = claim(counters, phase)
    while share < tokens * count:
        t, matrix = share // count, first + share % count
        share = claim(counters, phase)
        slot = shapes[matrix, 5]
        if matrix > first and slot <= shapes[matrix - 1, 5]:
            continue  # rounded for another one
        if op == NORM:
            at = wanted[t] if program[phase, 4] else t
            weight = vectors[program[phase, 1] : program[phase, 1] + n]
            norm_row(hidden[at], weight, eps, normed[:n])
            source = normed[:n]
        elif op == MIX:
            source = mixed[t]
        else:
            source = normed[:n]
            gate_row(wide[t, :n], wide[t, n:], source, 0, n)
        bytes_, scale, correction = _form(q, scales, corrections, slot, tokens, p)
        resident = blocks[matrix, : shapes[matrix, 2]]
        if resident[0, 0] >= PLANE:
            scratch[n:p] = 0
            quantize_row(source, signs[op, :n], sizes[op, :used], scratch[:p], t, bytes_, scale, correction)
        else:
            at = shapes[matrix, 6]
            c = made[at : at + 4 * n].view(np.float32) if integral(resident) else vectors[:0]
            round_row(source, c, scratch[:p], t, bytes_, scale, correction)


@njit(nogil=True)
def _multiply(
    phase: int,
    thread: int,
    threads: int,
    instructions: int,
    program: I64,
    stored: U8,
    shapes: I64,
    blocks: I64,
    made: U8,
    vectors: F32,
    hidden: F32,
    heads: F32,
    wide: F32,
    logits: F32,
    wanted: I64,
    q: NDArray[np.int8],
    scales: F32,
    corrections: NDArray[np.int32],
    levels: U8,
    rows: F32,
    floats: F32,
    integers: I64,
    patterns: U8,
    counters: I64,
) -> None:
    """MULTIPLY: a share is some rows of one matrix, for all tokens."""
    first, count, target = program[phase, 1], program[phase, 2], program[phase, 3]
    tokens = wanted.shape[0] if program[phase, 4] else hidden.shape[0]
    p, stride = padded(shapes[first, 1]), level_stride(shapes[first, 1])
    w = levels[thread, : ROWS * stride].reshape(ROWS, stride)
    y = hidden
    if target == TARGET_HEADS:
        y = heads
    elif target == TARGET_WIDE:
        y = wide
    elif target == TARGET_LOGITS:
        y = logits
    share = claim(counters, phase) if tokens else count * threads * SHARES
    while share < count * threads * SHARES:
        matrix = first + share // (threads * SHARES)
        part = share % (threads * SHARES)
        m, n = shapes[matrix, 0], shapes[matrix, 1]
        size = -(-m // (threads * SHARES * ROWS)) * ROWS
        start, stop = part * size, min(m, (part + 1) * size)
        if start < stop:
            bytes_, scale, correction = _form(q, scales, corrections, shapes[matrix, 5], tokens, p)
            resident = blocks[matrix, : shapes[matrix, 2]]
            bias = _bias(vectors, shapes[matrix, 3], m)
            if resident[0, 0] >= PLANE:
                multiply_rows(
                    instructions,
                    stored,
                    resident,
                    m,
                    n,
                    start,
                    stop,
                    bytes_,
                    scale,
                    correction,
                    w,
                    floats[thread],
                    integers[thread],
                    bias,
                    y,
                    shapes[matrix, 4],
                    target == TARGET_HIDDEN,
                )
            else:
                multiply_sum_rows(
                    instructions,
                    stored,
                    resident,
                    made[shapes[matrix, 6] :],
                    m,
                    n,
                    start,
                    stop,
                    bytes_,
                    scale,
                    correction,
                    w,
                    rows[thread, 2:],
                    patterns[thread],
                    floats[thread],
                    integers[thread],
                    bias,
                    y,
                    shapes[matrix, 4],
                    target == TARGET_HIDDEN,
                )
        share = claim(counters, phase)


@njit(nogil=True)
def _store_heads(
    phase: int,
    program: I64,
    eps: float,
    vectors: F32,
    heads: F32,
    query_width: int,
    kind: int,
    kv: U8,
    tables: I64,
    sequence: I64,
    positions: I64,
    cosine: F32,
    sine: F32,
    counters: I64,
) -> None:
    """HEADS: a share is one token."""
    e, groups = 2 * cosine.shape[1], kv.shape[3]
    value_at = query_width + groups * e
    t = claim(counters, phase)
    while t < heads.shape[0]:
        row = heads[t]
        for h in range(value_at // e):
            head = row[h * e : (h + 1) * e]
            at = program[phase, 2] if h < query_width // e else program[phase, 3]
            if at >= 0:
                norm_row(head, vectors[at : at + e], eps, head)
            turn_head(head, cosine[t], sine[t], head)
        keys, values = row[query_width:value_at].reshape(groups, e), row[value_at:].reshape(groups, e)
        store_token(kind, kv, program[phase, 1], tables[sequence[t]], positions[t], keys, values)
        t = claim(counters, phase)


@njit(nogil=True)
def _attend(
    phase: int,
    program: I64,
    window: int,
    heads: F32,
    mixed: F32,
    kind: int,
    kv: U8,
    tables: I64,
    sequence: I64,
    positions: I64,
    starts: I64,
    e: int,
    units: F32,
    counters: I64,
) -> None:
    """ATTEND: a share is one group of heads for some tokens."""
    groups = kv.shape[3]
    per_group = mixed.shape[1] // e // groups
    by_head = heads.reshape(heads.shape[0], heads.shape[1] // e, e)  # queries, then keys, then values
    unit = claim(counters, phase)
    while unit < (starts.shape[0] - 1) * groups:
        t, stop = starts[unit // groups], starts[unit // groups + 1]
        attend_unit(
            kind,
            kv,
            program[phase, 1],
            tables,
            sequence[t:stop],
            positions[t:stop],
            by_head[t:stop],
            unit % groups,
            per_group,
            window,
            units,
            mixed[t:stop],
        )
        unit = claim(counters, phase)


@njit(nogil=True)
def _work(
    thread: int,
    threads: int,
    instructions: int,
    program: I64,
    eps: float,
    window: int,
    stored: U8,
    shapes: I64,
    blocks: I64,
    made: U8,
    vectors: F32,
    signs: F32,
    sizes: I64,
    hidden: F32,
    heads: F32,
    mixed: F32,
    wide: F32,
    logits: F32,
    wanted: I64,
    q: NDArray[np.int8],
    scales: F32,
    corrections: NDArray[np.int32],
    kind: int,
    kv: U8,
    tables: I64,
    sequence: I64,
    positions: I64,
    starts: I64,
    cosine: F32,
    sine: F32,
    levels: U8,
    rows: F32,
    floats: F32,
    integers: I64,
    patterns: U8,
    units: F32,
    counters: I64,
) -> None:
    """One thread's part of `run_step`."""
    for phase in range(program.shape[0]):
        op = program[phase, 0]
        if op <= GATE:
            _round_inputs(
                phase,
                thread,
                program,
                eps,
                shapes,
                blocks,
                made,
                vectors,
                signs,
                sizes,
                hidden,
                mixed,
                wide,
                wanted,
                q,
                scales,
                corrections,
                rows,
                counters,
            )
        elif op == MULTIPLY:
            _multiply(
                phase,
                thread,
                threads,
                instructions,
                program,
                stored,
                shapes,
                blocks,
                made,
                vectors,
                hidden,
                heads,
                wide,
                logits,
                wanted,
                q,
                scales,
                corrections,
                levels,
                rows,
                floats,
                integers,
                patterns,
                counters,
            )
        elif op == HEADS:
            _store_heads(
                phase,
                program,
                eps,
                vectors,
                heads,
                mixed.shape[1],
                kind,
                kv,
                tables,
                sequence,
                positions,
                cosine,
                sine,
                counters,
            )
        else:
            _attend(
                phase,
                program,
                window,
                heads,
                mixed,
                kind,
                kv,
                tables,
                sequence,
                positions,
                starts,
                2 * cosine.shape[1],
                units[thread],
                counters,
            )
        finish(counters, phase, threads)


@njit(
    "void(i8,i8,i8[:,::1],f8,i8,u1[::1],i8[:,::1],i8[:,:,::1],u1[::1],f4[::1],f4[:,::1],i8[:,::1],f4[:,::1],f4[:,::1],f4[:,::1],"
    "f4[:,::1],f4[:,::1],i8[::1],i1[::1],f4[::1],i4[::1],i8,u1[:,:,:,:,::1],i8[:,::1],i8[::1],i8[::1],f4[:,::1],f4[:,::1],"
    "u1[:,::1],f4[:,:,::1],f4[:,::1],i8[:,::1],u1[:,::1],f4[:,::1],i8[::1])",
    nogil=True,
    parallel=True,
    cache=True,
)
def run_step(
    threads: int,
    instructions: int,
    program: I64,
    eps: float,
    window: int,
    stored: U8,
    shapes: I64,
    blocks: I64,
    made: U8,
    vectors: F32,
    signs: F32,
    sizes: I64,
    hidden: F32,
    heads: F32,
    mixed: F32,
    wide: F32,
    logits: F32,
    wanted: I64,
    q: NDArray[np.int8],
    scales: F32,
    corrections: NDArray[np.int32],
    kind: int,
    kv: U8,
    tables: I64,
    sequence: I64,
    positions: I64,
    cosine: F32,
    sine: F32,
    levels: U8,
    rows: F32,
    floats: F32,
    integers: I64,
    patterns: U8,
    units: F32,
    counters: I64,
) -> None:
    """Embedded tokens `hidden [T, d]` -> `logits [len(wanted), v]` of the tokens `wanted`; `hidden` is used up.

    `threads` is what `threads.thread_count` gives, here and now: more would wait for each other for ever. `program
    [phases, FIELDS]`. Of matrix i, `shapes [matrices, 7]` holds m, n, how many of its `blocks [matrices, levels, 3]`
    are resident (one at least), where its bias begins in `vectors` (or -1), its first column in the target, in which of
    the forms of its phase's input it is multiplied (numbered in the order of matrices), and where in `made` lies what
    `signs.prepare` made. `signs [3, >= width]`
    and `sizes [3, blocks]` (0 past the last) are the rotations of the three widths. `cosine`, `sine [T, e / 2]` are the
    tokens' own; `kind`, `kv`, `tables`, `sequence` and `positions` as in `attention.store_kv`.

    Work space: `heads [T, (h + 2 g) e]`, `mixed [T, h e]`, `wide [T, 2 f]`; `q` for T tokens of the greatest padded
    width in all forms of a phase, `scales` and `corrections` a 32nd of it; for each thread there may be, `levels
    [threads, ROWS * level_stride]`, `rows [threads, 2 + ROWS, padded width]`, `floats [threads, planes.FLOATS]`,
    `integers [threads, planes.INTEGERS]`, `patterns [threads, signs.table_nbytes]` and `units [threads,
    attention.unit_floats]`; `counters` as `team.counters_for`, zero.
    """
    # here, because a thread that found no memory for it would leave the others waiting for ever
    groups = kv.shape[3]
    per_group = mixed.shape[1] // (2 * cosine.shape[1]) // groups
    starts = cut_units(tables, sequence, positions, window, groups, per_group, threads)
    for thread in prange(threads):
        _work(
            thread,
            threads,
            instructions,
            program,
            eps,
            window,
            stored,
            shapes,
            blocks,
            made,
            vectors,
            signs,
            sizes,
            hidden,
            heads,
            mixed,
            wide,
            logits,
            wanted,
            q,
            scales,
            corrections,
            kind,
            kv,
            tables,
            sequence,
            positions,
            starts,
            cosine,
            sine,
            levels,
            rows,
            floats,
            integers,
            patterns,
            units,
            counters,
        )
