"""The forward pass: streaming softmax over key tiles, for blocks of query rows.

    s = scale * q.k (+ mask),   p = exp(s - m),   out = sum of p * v / sum of p,   lse = m + log(sum of p)

A task is a few row blocks of one head, or of a few that share keys, which share each tile of keys while it is in
cache; what each of them does with a tile is in `row_block`.  How rows are cut into blocks and tasks, and who does them,
changes no bit of a result.  Where there are few blocks to many keys, these are split: the worker that finishes the last
split joins them, in the order of the keys.

Milakov and Gimelshein (2018) for the streaming softmax, Dao et al. (2022) for the tiling.
"""

from __future__ import annotations

import functools
from collections import namedtuple

import numpy as np
from numba import types

from numba_attn.block_mask import EMPTY
from numba_attn.cpu import amx, edges, launch, pack, plan, softmax, tiles
from numba_attn.cpu.jit import device, kernel, through_pointer
from numba_attn.cpu.narrow import COMPUTED
from numba_attn.cpu.plan import Plan
from numba_attn.cpu.pointers import address, align_stack, as_element, fetch_add, holds_pairs, moved, pointee_bytes
from numba_attn.cpu.results import any_wanted, fill_padding, statistics_of, write_statistics
from numba_attn.cpu.row_block import (
    Memory,
    divisor_of,
    exponentiate_tile,
    kept_size,
    load_tile,
    memory_map,
    rounded_sums,
    start_block,
    start_of_results,
    state_of,
    values_of,
)
from numba_attn.cpu.score import (
    COPIES_TILES,
    ON_TILES,
    Arrays,
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
# that is not worth it; and splits of the keys of a sequence, the most that one has.
Cut = namedtuple("Cut", "keys short block blocks lanes columns heads split splits")

MOST_NOTES = 1 << 20  # on what a mask leaves of tiles, in each worker's memory
PACKED_ROWS = 192  # query rows of a task from which packing its tiles of values is worth it

split_keys, splits_of = device(plan.split_keys), device(plan.splits_of)


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
def attend(
    arrays, sequences, functions, settings, head, heads, out, first, end, low, high, sizes, memory, careful, at_once
):  # fmt: skip
    """Stream the keys [low, high) past the rows [first, end) of a head and others: leaves their states in memory.

    These are the `heads` from that one on, which share its keys.  Where all is done `at_once`, see `is_done_at_once`,
    results are not a part of the state but written; and the next head may be asked for meanwhile.  Returns whether
    results are finite.
    """
    D, Dv, keys, block, lanes = sizes
    operands, weighted, first_head = arrays.operands, arrays.entropy.size > 0, head
    k, v, at = in_place(head.k, memory), in_place(head.v, memory), memory_map(sizes)
    scores = element(memory, at.scores)
    copied = as_element(element(memory, at.keys), operands)
    values = as_element(element(memory, at.values), operands)
    clean = as_element(element(memory, at.clean), operands)
    pairs = holds_pairs(address(operands))
    packing = not at_once and ((end - first) * heads >= PACKED_ROWS or is_narrow(v) or pairs)
    top, nothing = element(memory, at.top), memory.dtype.type(0)
    plain = is_plain(head) and not (pairs and settings.threshold != 0)
    pack.fill_lanes(element(memory, at.zero), nothing, block // lanes)

    blocks = blocks_of(end - first, sizes) * heads
    in_any_case = COPIES_TILES and not (at_once or is_gathered(head.k))
    copying = (in_any_case or copies_keys(k, D, operands), in_any_case and not (packing or pairs))
    h, row = head.h, first
    for i in range(blocks):
        q, state = matrix(arrays.q, sequences.offsets[head.b, 0], h), state_of(memory, at, sizes, operands, i)
        start_block(q, row, min(block, end - row), state, operands, sizes, memory, at_once)
        row += block
        if row >= end:
            h, row = h + 1, first

    # Longer heads take longer than what is read for the next one; of which no more is asked for than a tile.
    key_count = head.position.kv_length
    asking = MANY_AT_ONCE and at_once and blocks <= 2 and key_count <= keys
    if asking:
        pack.ask_for(moved(v.data, arrays.v.strides[0]), v.row, key_count, Dv * memory.itemsize)

    finite = True
    # Bit i: scores of block i have been out of their reference's range.  A literal would have all compiled twice.
    rising = np.int64(0)
    task_low, task_high, _, _ = visible(first, end, head.position)
    task_low, task_high = max(task_low, low), min(task_high, high)
    for number in range(task_low // keys, (task_high + keys - 1) // keys):
        tile = number * keys
        tile_low, tile_high = max(tile, task_low), min(tile + keys, task_high)
        if pairs:
            tile_low -= (tile_low - tile) % 2
        loaded = False
        head, row = first_head, first - block
        for i in range(blocks):
            row += block
            if row >= end:
                head = head_of(arrays, sequences, functions, settings, head.b, head.h + 1, nothing, head.notes)
                row = first
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
            # While the first block is computed, the next tile is asked for.
            following = tile + keys < task_high and i == 0
            k_ahead = rows_ahead(head.k, tile + keys, following, D, element(memory, at.keys), arrays.k)
            v_ahead = rows_ahead(head.v, tile + keys, following, Dv, element(memory, at.keys), arrays.v)
            k_tile = keys_of(k, start, tile_low, copied, D, operands, copying[0])
            v_tile = values_of(v, start, tile_low, tile_high, packing, copying[1], values, operands, sizes)
            if n > 0:
                rising = exponentiate_tile(
                    head, k_tile, k_ahead, here, i, row, rows, rising, settings, sizes, plain, weighted, state,
                    memory, at,
                )  # fmt: skip
            if at_once:
                if asking and i == blocks - 1:
                    pack.ask_for(moved(k.data, arrays.k.strides[0]), k.row, key_count, D * memory.itemsize)
                    q = moved(head.q.data, arrays.q.strides[0])
                    pack.ask_for(q, head.q.row, end - first, D * memory.itemsize)
                to = moved(out.data, row * out.row)
                from_keys, to_keys = element(memory, at.low), element(memory, at.high)
                if not parted:
                    pack.fill_lanes(from_keys, nothing, width)
                    pack.fill_lanes(to_keys, memory.dtype.type(n), width)
                if write_products(
                    width, rows, v_tile.data, v_tile.row, Dv, from_keys, to_keys, scores,
                    state.total, settings.gain, top, to, out.row,
                ):  # fmt: skip
                    finite = False
            elif careful:
                tiles.accumulate_carefully(width, v_tile.data, v_tile.row, v_tile.step, Dv, n, scores, state.ot, clean)
            else:
                cuts = element(memory, at.cuts)
                tiles.accumulate(width, v_tile.data, v_tile.row, v_tile.step, Dv, n, scores, state.ot, cuts, v_ahead)
    return finite


@device
def rows_ahead(rows, first, following, columns, near, array):
    """Where the rows of an array from `first` on begin, to be asked for, if they follow, and lie side by side.

    If not, what is near already: asking for it does nothing.
    """
    size = pointee_bytes(rows.data)
    beside = rows.row == columns * size and rows.step == size and rows.page_rows == 0
    return moved(rows.data, first * rows.row) if following and beside else as_element(near, array)


@device
def blocks_of(rows, sizes):
    """Row blocks of so many rows of a head."""
    return (rows + sizes.block - 1) // sizes.block


@device
def keep_states(memory, sizes, heads, rows, partial):
    """Copy the states of so many rows of each of some heads, but for the queries, to a task's memory."""
    at = memory_map(sizes)
    size = kept_size(at, sizes)
    for i in range(heads * blocks_of(rows, sizes)):
        start = start_of_results(at, sizes, i)
        for j in range(size):
            partial[i * size + j] = memory[start + j]


@device
def join_states(memory, sizes, heads, rows, operands, partials):
    """The states of all splits' tasks together, in the order of the keys."""
    at = memory_map(sizes)
    size, of_head = kept_size(at, sizes), blocks_of(rows, sizes)
    kept, factors = element(memory, at.top), element(memory, at.correction)
    for i in range(heads * of_head):
        width = (min(sizes.block, rows - i % of_head * sizes.block) + sizes.lanes - 1) // sizes.lanes
        start, state = start_of_results(at, sizes, i), state_of(memory, at, sizes, operands, i)
        for j in range(size):
            memory[start + j] = partials[0, i * size + j]
        for s in range(1, partials.shape[0]):
            other = element(partials[s], i * size)
            of_lanes = moved(other, at.ot_rows * sizes.block * memory.itemsize)
            softmax.join(width, sizes.block * memory.itemsize, state.reference, of_lanes, kept, factors)
            softmax.add_weighed(width, state.ot, sizes.Dv + 1, kept, other, factors)


@device
def include_sink(sink, number, first, end, sizes, settings, operands, memory):
    """Add a sink, a logit in base 2, to the states of the rows [first, end), from that of this number on."""
    at = memory_map(sizes)
    top, correction, unused = element(memory, at.top), element(memory, at.correction), element(memory, at.moments)
    for i in range(blocks_of(end - first, sizes)):
        rows = min(sizes.block, end - first - i * sizes.block)
        width = (rows + sizes.lanes - 1) // sizes.lanes
        state = state_of(memory, at, sizes, operands, number + i)
        softmax.challenge(width, sink, state.reference, top)
        if softmax.move_reference(width, top, state.reference, state.best, state.total, state.moment, correction):
            softmax.rescale(width, state.ot, sizes.Dv + 1, correction)
        if holds_pairs(address(operands)):
            softmax.add_sink(width, sink, state.reference, rounded_sums(state, width, sizes), unused)
        softmax.add_sink(width, sink, state.reference, state.total, state.moment)


@device
def finish(out, statistics, number, first, end, sizes, settings, operands, memory, written):
    """Normalise and write the rows [first, end), unless they are, and their statistics, of states from a number on.

    Returns whether every result is finite that was written here.
    """
    Dv, block, lanes = sizes.Dv, sizes.block, sizes.lanes
    at = memory_map(sizes)
    finite = True
    for i in range(blocks_of(end - first, sizes)):
        row = first + i * block
        rows = min(block, end - row)
        width = (rows + lanes - 1) // lanes
        state = state_of(memory, at, sizes, operands, number + i)
        to, factors = moved(out.data, row * out.row), element(memory, at.top)
        divisor = divisor_of(state, width, settings, operands, sizes)
        if not written and pack.write_rows(
            width, state.ot, Dv, divisor, settings.gain, factors, to, out.row, out.step, rows
        ):
            finite = False
        if any_wanted(statistics):
            lane_0 = at.state + (number + i) * at.state_size + (at.qt_rows + at.ot_rows) * block
            for lane in range(rows):
                reference, total = memory[lane_0 + lane], memory[lane_0 + block + lane]
                moment, best = memory[lane_0 + 2 * block + lane], memory[lane_0 + 3 * block + lane]
                write_statistics(statistics, row + lane, reference, total, moment, best)
    return finite


@device
def do_tasks(worker, memories, counters, partials, finished, arrays, sequences, functions, settings, cut):
    """Do tasks until there are none: the rows of a head from the last to the first, as causal ones have most to do.

    If keys are split, partials is (tasks, states of each), and finished (tasks that are not splits of one, 1).
    """
    memory = memories[worker]
    align_stack()
    on_tiles = ON_TILES and holds_pairs(address(arrays.operands))
    if on_tiles:
        amx.configure(address(memory))
    (Hq, _, D), Dv, Lq = arrays.q.shape, arrays.out.shape[2], settings.Lq
    per_task = cut.blocks * cut.block
    per_head = (Lq + per_task - 1) // per_task
    Hkv = arrays.k.shape[0]
    group = Hq // Hkv
    shares = (group + cut.heads - 1) // cut.heads
    of_sequence = Hkv * shares
    tasks = sequences.numbers.shape[0] * of_sequence * per_head * cut.splits
    at = memory_map(Sizes(D, Dv, max(cut.keys, cut.short), cut.block, cut.lanes))
    notes, noted = Notes(at.state + cut.heads * cut.blocks * at.state_size, cut.columns), -1
    helped = 0
    while True:
        task, helped = launch.take(counters, worker, helped, tasks)
        if task < 0:
            break
        number, split = task, 0
        if cut.splits > 1:
            number, split = task // cut.splits, task % cut.splits
        b, share = sequences.numbers[number // per_head // of_sequence, 0], number // per_head % of_sequence
        h = share // shares * group + share % shares * cut.heads
        heads = min(cut.heads, (share // shares + 1) * group - h)
        rows, kv_length = sequences.intervals[b, 1], sequences.intervals[b, 2]
        keys, splits = kv_length, 1
        if cut.splits > 1:
            keys = split_keys(Hkv, rows, kv_length, cut.block, cut.keys, cut.split)
            splits = splits_of(kv_length, keys)
            if split >= splits:
                continue
        first = (per_head - 1 - number % per_head) * per_task
        end = min(first + per_task, rows if settings.packed else Lq)
        valid = max(first, min(end, rows))
        if b != noted:
            for note in range((Lq + cut.block - 1) // cut.block * notes.columns):
                memory[notes.start + note] = 0
            noted = b
        head = head_of(arrays, sequences, functions, settings, b, h, memory.dtype.type(0), notes)
        sizes = Sizes(D, Dv, cut.short if kv_length <= cut.short else cut.keys, cut.block, cut.lanes)
        out_head = matrix(arrays.out, sequences.offsets[b, 4], h)
        alone = splits == 1 and heads == 1 and arrays.sinks.size == 0
        at_once = alone and is_done_at_once(head, out_head, first, valid, sizes, arrays.operands, cut.short)
        of_all = partials[number * cut.splits : number * cut.splits + splits]
        part, until, careful = split, split + 1, np.bool_(False)
        while valid > first:
            finite = True
            while part < until:
                finite = attend(
                    arrays, sequences, functions, settings, head, heads, out_head, first, valid, part * keys,
                    (part + 1) * keys, sizes, memory, careful, at_once,
                )  # fmt: skip
                if splits > 1:
                    keep_states(memory, sizes, heads, valid - first, of_all[part])
                part += 1
            if splits > 1:
                if not careful and fetch_add(finished, number) != splits - 1:
                    break
                join_states(memory, sizes, heads, valid - first, arrays.operands, of_all)
            for i in range(heads):
                out, states = matrix(arrays.out, sequences.offsets[b, 4], h + i), i * blocks_of(valid - first, sizes)
                if arrays.sinks.size:
                    include_sink(arrays.sinks[h + i], states, first, valid, sizes, settings, arrays.operands, memory)
                statistics = statistics_of(arrays, sequences, b, h + i)
                finite &= finish(
                    out, statistics, states, first, valid, sizes, settings, arrays.operands, memory, at_once
                )
            if finite or careful:
                break
            # Either something attended to is not finite, or a masked value met a zero probability: the careful form
            # tells them apart.
            careful, at_once = np.bool_(True), np.bool_(False)
            part, until = 0, splits
        for i in range(heads if split == 0 else 0):
            fill_padding(arrays, sequences, b, h + i, valid, end)
    if on_tiles:
        amx.release(address(memory))


do_all_tasks = by_workers(do_tasks)


@kernel
def work(launcher, memories, counters, partials, finished, arrays, sequences, functions, settings, cut):
    """`do_tasks`, by as many workers as there are memories."""
    do_all_tasks(launcher, memories, counters, partials, finished, arrays, sequences, functions, settings, cut)


work_through_pointer = through_pointer(work.py_func)


# From Python ----------------------------------------------------------------------------------------------------------


def prepared(call: Call, kinds: Kinds, whole: Plan, threads_used: int) -> Cutting:
    """How to compute calls like one of elements and operands of these `kinds`, cut as the plan says, on as many threads
    at most.
    """
    (arrays, _, functions, settings), dtype = call, call.arrays.lse.dtype
    (Hq, _, D), Dv = arrays.q.shape, arrays.out.shape[2]
    columns, lanes = columns_noted(arrays.mask, Hq, settings, whole), VECTOR_BYTES // dtype.itemsize
    shares = len(arrays.k) * -(-Hq // len(arrays.k) // whole.heads)
    blocks, whole_tasks = whole.heads * whole.blocks, len(call.sequences.numbers) * shares * whole.tasks
    size = memory_size(whole, D, Dv, lanes, -(-settings.Lq // whole.block) * columns)
    kept = blocks * kept_size.py_func(*map_of(whole, D, Dv, lanes))

    def cut_for(sequences: Sequences) -> Run:
        splits = most_splits(sequences, len(arrays.k), whole)
        cut = Cut(
            whole.keys, whole.short, whole.block, whole.blocks, lanes, columns, whole.heads, whole.split, splits
        )  # fmt: skip
        operations, tasks = launch.rows_times_keys(sequences) * Hq * (D + Dv), whole_tasks * splits
        workers = launch.workers_for(threads_used, tasks, operations)
        start = launch.prepared(entry, kinds, workers, tasks, operations, size, dtype)

        def run(arrays: Arrays) -> None:
            partials = np.empty((tasks, kept) if splits > 1 else (0, 0), dtype)
            finished = np.zeros((len(partials) // splits, 1), np.int64)
            start(partials, finished, arrays, sequences, functions, settings, cut)

        return run

    return cut_for


def most_splits(sequences: Sequences, Hkv: int, whole: Plan) -> int:
    """The largest number of splits of a sequence's keys, see `plan.split_keys`."""
    rows_and_keys = sequences.intervals[sequences.numbers[:, 0], 1:]
    long = rows_and_keys[rows_and_keys[:, 1] >= 2 * whole.split]
    return max((_splits(Hkv, *one, whole) for one in set(map(tuple, long.tolist()))), default=1)


def _splits(Hkv: int, rows: int, keys: int, whole: Plan) -> int:
    return splits_of.py_func(keys, split_keys.py_func(Hkv, rows, keys, whole.block, whole.keys, whole.split))


def columns_noted(mask: np.ndarray, Hq: int, settings: Settings, cut: Plan) -> int:
    """Of how many tiles in a row it is noted what the mask leaves of them, which is the same for all heads, or 0."""
    heads_share = mask.size > 0 and mask.shape[0] == 1 < Hq and settings.tile_rows == 0
    columns = -(-settings.Lk // cut.keys)
    return columns if heads_share and -(-settings.Lq // cut.block) * columns <= MOST_NOTES else 0


@functools.lru_cache(maxsize=256)
def memory_size(cut: Plan, D: int, Dv: int, lanes: int, notes: int = 0) -> int:
    """Elements of a worker's memory, with room for so many notes on a mask."""
    at, _ = map_of(cut, D, Dv, lanes)
    # Whole cache lines, so that workers do not share one.
    return -(-(at.state + cut.heads * cut.blocks * at.state_size + notes) // 16) * 16


def map_of(cut: Plan, D: int, Dv: int, lanes: int) -> tuple[Memory, Sizes]:
    """Where things are in a worker's memory."""
    sizes = Sizes(D, Dv, max(cut.keys, cut.short), cut.block, lanes)
    return memory_map.py_func(sizes), sizes


def signature(kind: str, operand: types.Type, held: str) -> tuple[types.Type, ...]:
    """Of `work`, for a kind of element, an operand and how keys and values are held, see `narrow`."""
    return launch.signature_of(
        COMPUTED[kind],
        types.Array(COMPUTED[kind], 2, "C"),
        types.Array(types.int64, 2, "C"),
        *call_types(kind, operand, held),
        types.NamedUniTuple(types.int64, 9, Cut),
    )


entry = launch.entry(work, signature)
