"""The forward pass: streaming softmax over key tiles, for blocks of query rows.

    s = scale * q.k (+ mask),   p = exp(s - m),   out = sum of p * v / sum of p,   lse = m + log(sum of p)

A task is a few row blocks of one head, which share each tile of keys while it is in cache; what each of them does with
a tile is in `row_block`.  How rows are cut into blocks and tasks, and who does them, changes no bit of a result.

Milakov and Gimelshein (2018) for the streaming softmax, Dao et al. (2022) for the tiling.
"""

from __future__ import annotations

import functools
from collections import namedtuple

import numpy as np
from numba import types

from numba_attn.block_mask import EMPTY
from numba_attn.cpu import amx, edges, launch, pack, softmax, tiles
from numba_attn.cpu.jit import device, kernel, through_pointer
from numba_attn.cpu.narrow import COMPUTED
from numba_attn.cpu.plan import Plan
from numba_attn.cpu.pointers import address, align_stack, as_element, holds_pairs, moved, pointee_bytes
from numba_attn.cpu.results import any_wanted, fill_padding, statistics_of, write_statistics
from numba_attn.cpu.row_block import (
    divisor_of,
    exponentiate_tile,
    load_tile,
    memory_map,
    rounded_sums,
    start_block,
    state_of,
    values_of,
)
from numba_attn.cpu.score import (
    COPIES_TILES,
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
    copies_keys,
    element,
    head_of,
    is_narrow,
    is_plain,
    keys_of,
    matrix,
    select_unsloped,
)
from numba_attn.cpu.short import write_products
from numba_attn.cpu.stored import in_place, is_gathered
from numba_attn.cpu.target import MANY_AT_ONCE, VECTOR_BYTES
from numba_attn.cpu.visible import visible
from numba_attn.cpu.workers import by_workers

# How the problem is cut, see plan.Plan, and of how many tiles in a row it is noted what the mask leaves of them: 0 if
# that is not worth it.
Cut = namedtuple("Cut", "keys short block blocks lanes columns")

MOST_NOTES = 1 << 20  # on what a mask leaves of tiles, in each worker's memory
PACKED_ROWS = 192  # query rows of a task from which packing its tiles of values is worth it


# One task -------------------------------------------------------------------------------------------------------------


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
def attend(head, out, first, end, sizes, settings, operands, weighted, memory, careful, at_once, to_next):
    """Stream the keys past the rows [first, end): leaves the state of each row block in memory.

    `weighted` is whether the moment, for the entropy, is wanted.  Where all is done `at_once`, see `is_done_at_once`,
    results are not a part of the state but written; and the next head, so many bytes after this one in the arrays of
    queries, keys and values, may be asked for meanwhile.  Returns whether results are finite.
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
    in_any_case = COPIES_TILES and not (at_once or is_gathered(head.k))
    copying = (in_any_case or copies_keys(k, D, operands), in_any_case and not (packing or pairs))
    for i in range(blocks):
        row = first + i * block
        state = state_of(memory, at, sizes, operands, i)
        start_block(head.q, row, min(block, end - row), state, operands, sizes, memory, at_once)

    # Longer heads take longer than what is read for the next one; of which no more is asked for than a tile.
    key_count = head.position.kv_length
    asking = MANY_AT_ONCE and at_once and blocks <= 2 and key_count <= keys
    if asking:
        pack.ask_for(moved(v.data, to_next[2]), v.row, key_count, Dv * memory.itemsize)

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
                k, v = load_tile(head, k, v, tile_low, tile_high, packing, copying, operands, sizes, memory, at)
                loaded = True
            k_tile = keys_of(k, start, tile_low, copied, D, operands, copying[0])
            v_tile = values_of(v, start, tile_low, tile_high, packing, copying[1], values, operands, sizes)
            if n > 0:
                rising = exponentiate_tile(
                    head, k_tile, here, i, row, rows, rising, settings, sizes, plain, weighted, state, memory, at
                )  # fmt: skip
            if at_once:
                if asking and i == blocks - 1:
                    pack.ask_for(moved(k.data, to_next[1]), k.row, key_count, D * memory.itemsize)
                    pack.ask_for(moved(head.q.data, to_next[0]), head.q.row, end - first, D * memory.itemsize)
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
def include_sink(sink, first, end, sizes, settings, operands, memory):
    """Add a sink, a logit in base 2, to the states of the rows [first, end)."""
    at = memory_map(sizes)
    top, correction, unused = element(memory, at.top), element(memory, at.correction), element(memory, at.moments)
    for i in range((end - first + sizes.block - 1) // sizes.block):
        rows = min(sizes.block, end - first - i * sizes.block)
        width = (rows + sizes.lanes - 1) // sizes.lanes
        state = state_of(memory, at, sizes, operands, i)
        softmax.challenge(width, sink, state.reference, top)
        if softmax.move_reference(width, top, state.reference, state.best, state.total, state.moment, correction):
            softmax.rescale(width, state.ot, sizes.Dv + 1, correction)
        if holds_pairs(address(operands)):
            softmax.add_sink(width, sink, state.reference, rounded_sums(state, width, sizes), unused)
        softmax.add_sink(width, sink, state.reference, state.total, state.moment)


@device
def finish(out, statistics, first, end, sizes, settings, operands, memory, written):
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
        divisor = divisor_of(state, width, settings, operands, sizes)
        if not written and pack.write_rows(
            width, state.ot, Dv, divisor, settings.gain, factors, to, out.row, out.step, rows
        ):
            finite = False
        if any_wanted(statistics):
            lane_0 = at.state + i * at.state_size + (at.qt_rows + at.ot_rows) * block
            for lane in range(rows):
                reference, total = memory[lane_0 + lane], memory[lane_0 + block + lane]
                moment, best = memory[lane_0 + 2 * block + lane], memory[lane_0 + 3 * block + lane]
                write_statistics(statistics, row + lane, reference, total, moment, best)
    return finite


@device
def do_tasks(worker, memories, counters, arrays, sequences, functions, settings, cut):
    """Do tasks until there are none: the rows of a head from the last to the first, as causal ones have most to do."""
    memory = memories[worker]
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
        to_next = arrays.q.strides[0], arrays.k.strides[0], arrays.v.strides[0]
        while valid > first:
            finite = attend(
                head, out_head, first, valid, sizes, settings, arrays.operands, weighted, memory, careful, at_once,
                to_next,
            )  # fmt: skip
            if arrays.sinks.size:
                include_sink(arrays.sinks[h], first, valid, sizes, settings, arrays.operands, memory)
            finite &= finish(out_head, statistics, first, valid, sizes, settings, arrays.operands, memory, at_once)
            if finite or careful:
                break
            # Either something attended to is not finite, or a masked value met a zero probability: the careful form
            # tells them apart.
            careful, at_once = np.bool_(True), np.bool_(False)
        fill_padding(arrays, sequences, b, h, valid, end)
    if on_tiles:
        amx.release(address(memory))


do_all_tasks = by_workers(do_tasks)


@kernel
def work(launcher, memories, counters, arrays, sequences, functions, settings, cut):
    """`do_tasks`, by as many workers as there are memories."""
    do_all_tasks(launcher, memories, counters, arrays, sequences, functions, settings, cut)


work_through_pointer = through_pointer(work.py_func)


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
        start = launch.prepared(entry, kinds, workers, tasks, operations, size, dtype)
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
    return launch.signature_of(
        COMPUTED[kind],
        *call_types(kind, operand, held),
        types.NamedUniTuple(types.int64, 6, Cut),
    )


entry = launch.entry(work, signature)
