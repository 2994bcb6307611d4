"""The forward pass: streaming softmax over key tiles, for blocks of query rows.

    s = scale * q.k (+ mask),   p = exp(s - m),   out = sum of p * v / sum of p,   lse = m + log(sum of p)

A task is a few row blocks of one head, which share each tile of keys while it is in cache.  The scores of a block and a
tile are exponentiated against the row's reference m, which is moved to the largest score, and what there is rescaled,
only where that is far from it.  How rows are cut into blocks and tasks, and who does them, changes no bit of a result.

Milakov and Gimelshein (2018) for the streaming softmax, Dao et al. (2022) for the tiling.
"""

from __future__ import annotations

import functools
import math
from collections import namedtuple

import numpy as np
from numba import prange, types

from numba_attn.block_mask import EMPTY, FULL
from numba_attn.cpu import amx, dropout, edges, launch, pack, softmax, tiles
from numba_attn.cpu.jit import device, kernel, parallel_kernel, through_pointer
from numba_attn.cpu.narrow import COMPUTED
from numba_attn.cpu.plan import WIDEST, Plan
from numba_attn.cpu.pointers import address, align_stack, as_bfloat16, as_element, holds_pairs, moved, pointee_bytes
from numba_attn.cpu.results import any_wanted, fill_padding, statistics_of, write_statistics
from numba_attn.cpu.score import (
    ON_TILES,
    Call,
    Cutting,
    Kinds,
    Notes,
    Run,
    Sequences,
    Settings,
    Sizes,
    call_types,
    columns_of,
    copies_keys,
    element,
    head_of,
    is_narrow,
    is_plain,
    is_settled,
    keys_of,
    matrix,
    score,
    select_unsloped,
    slope,
)
from numba_attn.cpu.short import write_products
from numba_attn.cpu.stored import gather, in_place, is_gathered
from numba_attn.cpu.target import VECTOR_BYTES
from numba_attn.cpu.visible import Matrix, visible

# Where things are in a worker's memory, in elements.
Memory = namedtuple(
    "Memory",
    "scores bias keys values clean rows_k rows_v zero top sums moments correction low high cuts state qt_rows ot_rows "
    "state_size",
)
# The state of a row block, in memory: what it is made of, and what has come of it so far.
State = namedtuple("State", "qt ot reference total moment best")

# How the problem is cut, see plan.Plan, and of how many tiles in a row it is noted what the mask leaves of them: 0 if
# that is not worth it.
Cut = namedtuple("Cut", "keys short block blocks lanes columns")

LANE_VECTORS = 8  # zero, top, sums, moments, correction, low, high: one value a lane; and cuts
STATE_VECTORS = 4  # reference, total, moment, best
STEEP = 4.0  # rise of scores over a tile, by ALiBi, with which its references are moved first
MOST_NOTES = 1 << 20  # on what a mask leaves of tiles, in each worker's memory
PACKED_ROWS = 192  # query rows of a task from which packing its tiles of values is worth it


# One task -------------------------------------------------------------------------------------------------------------


@device
def memory_map(sizes):
    # Rows and columns filled up to what tile registers hold, and room for a tile that begins anywhere.  Keys are an odd
    # number of 32, as what lies whole pages apart gets in each other's way.
    block, keys = sizes.block, (sizes.keys + 31) // 32 * 32 | 32
    qt_rows, ot_rows = (sizes.D + 15) // 16 * 16, (sizes.Dv + 15) // 16 * 16
    copied = 2 * keys * block
    values = copied + (keys + 32) * qt_rows
    clean = values + keys * ot_rows + 32
    rows_k = clean + keys * ot_rows // 2 + 32
    rows_v = rows_k + keys * sizes.D
    lanes = (rows_v + keys * sizes.Dv + 15) // 16 * 16
    return Memory(
        scores=0,
        bias=keys * block,
        keys=copied,
        values=values,
        clean=clean,
        rows_k=rows_k,
        rows_v=rows_v,
        zero=lanes,
        top=lanes + block,
        sums=lanes + 2 * block,
        moments=lanes + 3 * block,
        correction=lanes + 4 * block,
        low=lanes + 5 * block,
        high=lanes + 6 * block,
        cuts=lanes + 7 * block,
        state=lanes + LANE_VECTORS * block,
        qt_rows=qt_rows,
        ot_rows=ot_rows,
        state_size=(qt_rows + ot_rows + STATE_VECTORS) * block,
    )


@device
def state_of(memory, at, sizes, operands, i):
    """The state of row block i of a task."""
    block = sizes.block
    start = at.state + i * at.state_size
    lanes = start + (at.qt_rows + at.ot_rows) * block
    return State(
        qt=as_element(element(memory, start), operands),
        ot=element(memory, start + at.qt_rows * block),
        reference=element(memory, lanes),
        total=element(memory, lanes + block),
        moment=element(memory, lanes + 2 * block),
        best=element(memory, lanes + 3 * block),
    )


@device
def is_done_at_once(head, out, first, end, sizes, operands, most_keys):
    """Whether the rows [first, end) attend to keys of one tile, `most_keys` at most, whose values are read as rows.

    Results have to be rows too.
    """
    low, high, _, _ = visible(first, end, head.position)
    one = low < high and low // sizes.keys == (high - 1) // sizes.keys and high - low <= most_keys
    size = pointee_bytes(out.data)
    contiguous = out.step == size and (is_gathered(head.v) or head.v.step == operands.itemsize)
    narrow = holds_pairs(address(operands)) or is_narrow(head.v)
    return one and contiguous and not narrow and sizes.Dv % sizes.lanes == 0


@device
def attend(head, out, first, end, sizes, settings, operands, weighted, memory, careful, at_once):
    """Stream the keys past the rows [first, end): leaves the state of each row block in memory.

    `weighted` is whether the moment, for the entropy, is wanted.  Where all is done `at_once`, see `is_done_at_once`,
    results are not a part of the state but written.  Returns whether these are finite.
    """
    D, Dv, keys, block, lanes = sizes
    k, v, at = in_place(head.k, memory), in_place(head.v, memory), memory_map(sizes)
    scores = element(memory, at.scores)
    copied = as_element(element(memory, at.keys), operands)
    values = as_element(element(memory, at.values), operands)
    clean = as_element(element(memory, at.clean), operands)
    pairs = holds_pairs(address(operands))
    packing = not at_once and (end - first >= PACKED_ROWS or is_narrow(v) or pairs)
    top, nothing = element(memory, at.top), memory.dtype.type(0)
    plain = is_plain(head) and not (pairs and settings.threshold != 0)
    pack.fill_lanes(element(memory, at.zero), nothing, block // lanes)

    blocks = (end - first + block - 1) // block
    for i in range(blocks):
        row = first + i * block
        state = state_of(memory, at, sizes, operands, i)
        start_block(head.q, row, min(block, end - row), state, operands, sizes, memory, at_once)

    finite = True
    # Bit i: scores of block i have been out of their reference's range.  A literal would have all compiled twice.
    rising = np.int64(0)
    task_low, task_high, _, _ = visible(first, end, head.position)
    for number in range(task_low // keys, (task_high + keys - 1) // keys):
        tile = number * keys
        tile_low, tile_high = max(tile, task_low), min(tile + keys, task_high)
        if pairs:
            tile_low -= (tile_low - tile) % 2
        loaded = False
        for i in range(blocks):
            row = first + i * block
            rows = min(block, end - row)
            here = select_unsloped(head, settings, row, rows, 1, tile, tile + keys, pairs, sizes, memory, at)
            start, n = here.start, here.stop - here.start
            if here.kept == EMPTY:
                if not at_once:
                    continue
                start, n = tile_low, 0
            width = (rows + lanes - 1) // lanes
            state = state_of(memory, at, sizes, operands, i)
            parted = here.edged and not (pairs and ON_TILES)
            edges.cut(here, width, not parted, sizes, memory, at)

            if n > 0 and not loaded:
                k, v = load_tile(head, k, v, tile_low, tile_high, packing, operands, sizes, memory, at)
                loaded = True
            k_tile = keys_of(k, start, tile_low, copied, D, operands)
            v_tile = values_of(v, start, tile_low, tile_high, packing, values, operands, sizes)
            if n > 0:
                rising = exponentiate_tile(
                    head, k_tile, here, i, row, rows, rising, settings, sizes, plain, weighted, state, memory, at
                )  # fmt: skip
            if at_once:
                to = moved(out.data, row * out.row)
                low, high = element(memory, at.low), element(memory, at.high)
                if not parted:
                    pack.fill_lanes(low, nothing, width)
                    pack.fill_lanes(high, memory.dtype.type(n), width)
                if write_products(
                    width, rows, v_tile.data, v_tile.row, Dv, low, high, scores,
                    state.total, settings.gain, top, to, out.row,
                ):  # fmt: skip
                    finite = False
            elif careful:
                tiles.accumulate_carefully(width, v_tile.data, v_tile.row, v_tile.step, Dv, n, scores, state.ot, clean)
            else:
                cuts = element(memory, at.cuts)
                tiles.accumulate(width, v_tile.data, v_tile.row, v_tile.step, Dv, n, scores, state.ot, cuts)
    return finite


@device
def start_block(q, row, rows, state, operands, sizes, memory, at_once):
    """Give a row block its state before the first tile."""
    nothing, lowest = memory.dtype.type(0), memory.dtype.type(-math.inf)
    width = (rows + sizes.lanes - 1) // sizes.lanes
    if holds_pairs(address(operands)):
        pack.fill_lanes(state.qt, nothing, columns_of(sizes.D, operands) // 2 * width)
    pack.transpose(width, moved(q.data, row * q.row), q.row, q.step, rows, sizes.D, state.qt)
    if not at_once:
        pack.fill_lanes(state.ot, nothing, sizes.Dv * width)
    pack.fill_lanes(state.reference, nothing, width)
    pack.fill_lanes(state.total, nothing, width)
    pack.fill_lanes(state.moment, nothing, width)
    pack.fill_lanes(state.best, lowest, width)


@device
def load_tile(head, k, v, low, high, packing, operands, sizes, memory, at):
    """Copy what is not read in place of the keys and values [low, high), of a tile; the matrices that are read then.

    Values are transposed for products where that is worth the `packing`, and those of bfloat16 for all products.
    """
    D, Dv, n, pairs = sizes.D, sizes.Dv, high - low, holds_pairs(address(operands))
    values = as_element(element(memory, at.values), operands)
    if is_gathered(head.k):
        k = gather(head.k, low, n, D, memory, element(memory, at.rows_k))
        v = gather(head.v, low, n, Dv, memory, element(memory, at.rows_v))
    if copies_keys(k, D, operands):
        copied = as_element(element(memory, at.keys), operands)
        pack.copy_rows(moved(k.data, low * k.row), k.row, k.step, n, D, columns_of(D, operands), copied)
    v_low, vectors = moved(v.data, low * v.row), vectors_of_values(n, sizes)
    if pairs and ON_TILES:
        pack.transpose(vectors, v_low, v.row, v.step, n, Dv, as_bfloat16(values))
    elif pairs:
        pack.pair_rows(v_low, v.row, v.step, n, Dv, values)
    elif packing:
        pack.transpose(vectors, v_low, v.row, v.step, n, Dv, values)
    return k, v


@device
def values_of(v, start, low, high, packing, values, operands, sizes):
    """The values from `start` on: in place, or where `load_tile` has put those of a tile [low, high)."""
    pairs, size = holds_pairs(address(operands)), operands.itemsize
    row = vectors_of_values(high - low, sizes) * sizes.lanes
    if pairs and ON_TILES:
        return Matrix(moved(values, (start - low) * 2), 2, row * 2)
    if pairs:
        return Matrix(moved(values, (start - low) // 2 * sizes.Dv * size), sizes.Dv * size, size)
    if packing:
        return Matrix(moved(values, (start - low) * size), size, row * size)
    return Matrix(as_element(moved(v.data, start * v.row), operands), v.row, v.step)


@device
def vectors_of_values(n, sizes):
    """In a column of n transposed values."""
    return (n + 31) // 32 * 32 // sizes.lanes


@device
def exponentiate_tile(head, k_tile, here, i, row, rows, rising, settings, sizes, plain, weighted, state, memory, at):
    """Scores of row block i and a tile, to probabilities below its reference: what `accumulate` takes.

    Bit i of `rising`, which is returned, is whether scores of the block have been out of its reference's range.
    """
    D, Dv, keys, _, lanes = sizes
    n, width = here.stop - here.start, (rows + lanes - 1) // lanes
    scores = element(memory, at.scores)
    top, sums, moments = element(memory, at.top), element(memory, at.sums), element(memory, at.moments)
    correction = element(memory, at.correction)
    capped = settings.softcap != 0
    options = int(capped) + int(head.slope != 0) + int(weighted)
    steep = head.slope * keys > STEEP

    done = fused = False
    # Scores that have risen once are expected to go on, but for those that ALiBi makes rise: up to the diagonal, and
    # with a steep slope from the first tile on.
    distance = row + head.position.offset - here.start
    raising = np.bool_(rising >> i & 1 or (steep and distance + rows > 0))
    fusing, full = plain and not raising, here.kept == FULL
    if full:
        fusing = fusing and (options == 0 or (options == 1 and width == WIDEST))
    else:
        fusing = fusing and not capped and not weighted
    if fusing and full:
        done = fused = exponentiate_whole(
            head, k_tile, settings, n, width, distance, D, weighted, state, scores, memory, at
        )
    if not done:
        here = slope(head, here, row, rows, sizes, memory, at)
        # What is settled cannot be done again.
        raising = raising or is_settled(head, here)
    if fusing and not full:
        done = fused = edges.exponentiate(k_tile, here, width, settings.scale_2, state, scores, sizes, memory, at)
    if fusing and not done:
        raising = True
        rising |= (head.slope == 0) << i
    while not done:
        unit = score(head, k_tile, settings, here, row, rows, sizes, state.qt, scores, memory, at)
        if raising:
            softmax.highest(width, scores, n, unit, here.added, here.row, state.reference, top)
            if softmax.move_reference(width, top, state.reference, state.best, state.total, state.moment, correction):
                softmax.rescale(width, state.ot, Dv, correction)
        if weighted:
            done = softmax.exponentiate_weighted(
                width, scores, n, unit, here.added, here.row,
                state.reference, state.best, state.total, sums, top, state.moment, moments, raising,
            )  # fmt: skip
        else:
            done = softmax.exponentiate(
                width, scores, n, unit, here.added, here.row,
                state.reference, state.best, state.total, sums, top, state.moment, moments, raising,
            )  # fmt: skip
        if not done:
            rising |= 1 << i
            raising = True
    if settings.threshold != 0:
        dropout.drop(width, scores, n, settings.threshold, settings.seed, head.b, head.h, row, here.start)
    if not fused:
        tiles.pair_up(width, scores, n, k_tile.data)
    return rising


@device
def exponentiate_whole(head, k, settings, n, width, distance, D, weighted, state, scores, memory, at):
    """Exponentiate scores where they are made, of a tile in which every row may attend to every key.

    For one option at most, a cap, ALiBi or moments.  Returns whether that is done, see `tiles.probabilities`.
    """
    top, sums, moments = element(memory, at.top), element(memory, at.sums), element(memory, at.moments)
    if weighted:
        return tiles.weighted_probabilities(
            width, k.data, k.row, k.step, n, D, state.qt, settings.scale_2, state.reference, state.best, state.total,
            sums, top, scores, state.moment, moments,
        )  # fmt: skip
    if settings.softcap == 0 and head.slope == 0:
        return tiles.probabilities(
            width, k.data, k.row, k.step, n, D, state.qt, settings.scale_2, state.reference, state.best, state.total,
            sums, top, scores,
        )  # fmt: skip
    if settings.softcap == 0:
        return tiles.sloped_probabilities(
            width, k.data, k.row, k.step, n, D, state.qt, settings.scale_2, head.slope, distance, state.reference,
            state.best, state.total, sums, top, scores,
        )  # fmt: skip
    return tiles.capped_probabilities(
        width, k.data, k.row, k.step, n, D, state.qt, settings.scale, settings.softcap, state.reference, state.best,
        state.total, sums, top, scores,
    )  # fmt: skip


@device
def include_sink(sink, first, end, sizes, operands, memory):
    """Add a sink, a logit in base 2, to the states of the rows [first, end)."""
    at = memory_map(sizes)
    top, correction = element(memory, at.top), element(memory, at.correction)
    for i in range((end - first + sizes.block - 1) // sizes.block):
        rows = min(sizes.block, end - first - i * sizes.block)
        width = (rows + sizes.lanes - 1) // sizes.lanes
        state = state_of(memory, at, sizes, operands, i)
        softmax.challenge(width, sink, state.reference, top)
        if softmax.move_reference(width, top, state.reference, state.best, state.total, state.moment, correction):
            softmax.rescale(width, state.ot, sizes.Dv, correction)
        softmax.add_sink(width, sink, state.reference, state.total, state.moment)


@device
def finish(out, statistics, first, end, sizes, operands, gain, memory, written):
    """Normalise and write the rows [first, end), unless they are, and their statistics.

    Returns whether every result is finite that was written here.
    """
    Dv, block, lanes = sizes.Dv, sizes.block, sizes.lanes
    at = memory_map(sizes)
    finite = True
    for i in range((end - first + block - 1) // block):
        row = first + i * block
        rows = min(block, end - row)
        width = (rows + lanes - 1) // lanes
        state = state_of(memory, at, sizes, operands, i)
        to, factors = moved(out.data, row * out.row), element(memory, at.top)
        if not written and pack.write_rows(
            width, state.ot, Dv, state.total, gain, factors, to, out.row, out.step, rows
        ):
            finite = False
        if any_wanted(statistics):
            lane_0 = at.state + i * at.state_size + (at.qt_rows + at.ot_rows) * block
            for lane in range(rows):
                reference, total = memory[lane_0 + lane], memory[lane_0 + block + lane]
                moment, best = memory[lane_0 + 2 * block + lane], memory[lane_0 + 3 * block + lane]
                write_statistics(statistics, row + lane, reference, total, moment, best)
    return finite


@kernel
def work(memory, worker, counters, arrays, sequences, functions, settings, cut):
    """Do tasks until there are none: the rows of a head from the last to the first, as causal ones have most to do."""
    align_stack()
    on_tiles = ON_TILES and holds_pairs(address(arrays.operands))
    if on_tiles:
        amx.configure(address(memory))
    (Hq, _, D), Dv, Lq = arrays.q.shape, arrays.out.shape[2], settings.Lq
    per_task = cut.blocks * cut.block
    per_head = (Lq + per_task - 1) // per_task
    tasks = sequences.numbers.shape[0] * Hq * per_head
    at = memory_map(Sizes(D, Dv, max(cut.keys, cut.short), cut.block, cut.lanes))
    notes, noted = Notes(at.state + cut.blocks * at.state_size, cut.columns), -1
    helped = 0
    while True:
        task, helped = launch.take(counters, worker, helped, tasks)
        if task < 0:
            break
        b, h = sequences.numbers[task // per_head // Hq, 0], task // per_head % Hq
        first = (per_head - 1 - task % per_head) * per_task
        end = min(first + per_task, sequences.intervals[b, 1] if settings.packed else Lq)
        valid = max(first, min(end, sequences.intervals[b, 1]))
        if b != noted:
            for note in range((Lq + cut.block - 1) // cut.block * notes.columns):
                memory[notes.start + note] = 0
            noted = b
        head = head_of(arrays, sequences, functions, settings, b, h, memory.dtype.type(0), notes)
        keys = cut.short if head.position.kv_length <= cut.short else cut.keys
        sizes = Sizes(D, Dv, keys, cut.block, cut.lanes)
        out_head = matrix(arrays.out, sequences.offsets[b, 4], h)
        statistics = statistics_of(arrays, sequences, b, h)
        weighted, careful = arrays.entropy.size > 0, np.bool_(False)
        at_once = arrays.sinks.size == 0 and is_done_at_once(
            head, out_head, first, valid, sizes, arrays.operands, cut.short
        )
        while valid > first:
            finite = attend(
                head, out_head, first, valid, sizes, settings, arrays.operands, weighted, memory, careful, at_once
            )
            if arrays.sinks.size:
                include_sink(arrays.sinks[h], first, valid, sizes, arrays.operands, memory)
            finite &= finish(out_head, statistics, first, valid, sizes, arrays.operands, settings.gain, memory, at_once)
            if finite or careful:
                break
            # Either something attended to is not finite, or a masked value met a zero probability: the careful form
            # tells them apart.
            careful, at_once = np.bool_(True), np.bool_(False)
        fill_padding(arrays, sequences, b, h, valid, end)
    if on_tiles:
        amx.release(address(memory))


work_through_pointer = through_pointer(work.py_func)


@parallel_kernel
def work_together(code, memory, counters, arrays, sequences, functions, settings, cut):
    """`work`, whose machine code is at `code`, by as many workers as there are rows of memory."""
    for worker in prange(memory.shape[0]):
        work_through_pointer(code, memory[worker], worker, counters, arrays, sequences, functions, settings, cut)


# From Python ----------------------------------------------------------------------------------------------------------


def prepared(call: Call, kinds: Kinds, whole: Plan, threads_used: int) -> Cutting:
    """How to compute calls like one of elements and operands of these `kinds`, cut as the plan says, on as many threads
    at most.
    """
    (arrays, _, functions, settings), dtype = call, call.arrays.lse.dtype
    (Hq, _, D), Dv = arrays.q.shape, arrays.out.shape[2]
    columns = columns_noted(arrays.mask, Hq, settings, whole)
    cut = Cut(whole.keys, whole.short, whole.block, whole.blocks, VECTOR_BYTES // dtype.itemsize, columns)
    tasks = len(call.sequences.numbers) * Hq * whole.tasks
    size = memory_size(whole, D, Dv, cut.lanes, -(-settings.Lq // whole.block) * columns)

    def cut_for(sequences: Sequences) -> Run:
        operations = launch.rows_times_keys(sequences) * Hq * (D + Dv)
        workers = launch.workers_for(threads_used, tasks, operations)
        start = launch.prepared(serial, parallel, kinds, workers, tasks, operations, size, dtype)
        return lambda arrays: start(arrays, sequences, functions, settings, cut)

    return cut_for


def columns_noted(mask: np.ndarray, Hq: int, settings: Settings, cut: Plan) -> int:
    """Of how many tiles in a row it is noted what the mask leaves of them, which is the same for all heads, or 0."""
    heads_share = mask.size > 0 and mask.shape[0] == 1 < Hq and settings.tile_rows == 0
    columns = -(-settings.Lk // cut.keys)
    return columns if heads_share and -(-settings.Lq // cut.block) * columns <= MOST_NOTES else 0


@functools.lru_cache(maxsize=256)
def memory_size(cut: Plan, D: int, Dv: int, lanes: int, notes: int = 0) -> int:
    """Elements of a worker's memory, with room for so many notes on a mask."""
    at = memory_map.py_func(Sizes(D, Dv, max(cut.keys, cut.short), cut.block, lanes))
    # Whole cache lines, so that workers do not share one.
    return -(-(at.state + cut.blocks * at.state_size + notes) // 16) * 16


def signature(kind: str, operand: types.Type, held: str) -> tuple[types.Type, ...]:
    """Of `work`, for a kind of element, an operand and how keys and values are held, see `narrow`."""
    return (
        types.Array(COMPUTED[kind], 1, "C"),
        types.int64,
        types.Array(types.int64, 2, "C"),
        *call_types(kind, operand, held),
        types.NamedUniTuple(types.int64, 6, Cut),
    )


serial, parallel = launch.entries(work, work_together, signature)
