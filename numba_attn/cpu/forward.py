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
from numba_attn.cpu import amx, edges, launch, pack, plan, tiles
from numba_attn.cpu.jit import device, kernel, through_pointer
from numba_attn.cpu.narrow import COMPUTED
from numba_attn.cpu.plan import MOST_OPERATIONS, Plan
from numba_attn.cpu.pointers import address, align_stack, as_element, fetch_add, holds_pairs, moved, pointee_bytes
from numba_attn.cpu.results import fill_padding
from numba_attn.cpu.row_block import (
    Memory,
    exponentiate_tile,
    kept_size,
    load_tile,
    memory_map,
    start_block,
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
    head_after,
    head_of,
    is_narrow,
    is_plain,
    keys_of,
    matrix,
    rows_ahead,
    select_unsloped,
)
from numba_attn.cpu.shares import (
    blocks_of,
    first_block,
    include_sink,
    include_sinks,
    join_states,
    keep_states,
    next_block,
    share_of,
    width_of,
    write_results,
)
from numba_attn.cpu.short import write_products
from numba_attn.cpu.stored import in_place, is_gathered
from numba_attn.cpu.target import MANY_AT_ONCE, VECTOR_BYTES
from numba_attn.cpu.tuples import addressed
from numba_attn.cpu.visible import visible
from numba_attn.cpu.workers import by_workers

# How the problem is cut, see plan.Plan, and of how many tiles in a row it is noted what the mask leaves of them: 0 if
# that is not worth it; and splits of the keys of a sequence, the most that one has, and whether each is a task.
Cut = namedtuple("Cut", "keys short block blocks states lanes columns heads alike split splits parted")

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
def attend(arrays, sequences, settings, first_head, share, out, low, high, sizes, memory, careful, at_once):
    """Stream the keys [low, high) past the rows of a share, of which this is the first head: leaves states in memory.

    Where all is done `at_once`, see `is_done_at_once`, results are not a part of the state but written; and the next
    head may be asked for meanwhile.  Returns whether results are finite.
    """
    D, Dv, keys, block, lanes, _ = sizes
    heads, across, first, end = share
    operands, weighted, head = arrays.operands, arrays.entropy.size > 0, first_head
    sinks = arrays.sinks[head.h : head.h + heads]
    k, v, at = in_place(head.k, memory), in_place(head.v, memory), addressed(memory_map(sizes))
    scores = element(memory, at.scores)
    copied = as_element(element(memory, at.keys), operands)
    values = as_element(element(memory, at.values), operands)
    clean = as_element(element(memory, at.clean), operands)
    pairs = holds_pairs(address(operands))
    packing = not at_once and ((end - first) * heads >= PACKED_ROWS or is_narrow(v) or pairs)
    top, nothing = element(memory, at.top), memory.dtype.type(0)
    plain = is_plain(head) and not (pairs and settings.threshold != 0)
    pack.fill_lanes(element(memory, at.zero), nothing, block // lanes)

    blocks = blocks_of(share, sizes)
    in_any_case = COPIES_TILES and not (at_once or is_gathered(head.k))
    copying = (in_any_case or copies_keys(k, D, operands), in_any_case and not (packing or pairs))
    part = first_block(share, sizes)
    for i in range(blocks):
        q = matrix(arrays.q, sequences.offsets[head.b, 0], head.h + part.head)
        state = state_of(memory, at, sizes, operands, i)
        start_block(
            q, arrays.q.strides[0], part.row, part.rows, part.count, state, operands, sizes, memory, at_once
        )  # fmt: skip
        part = next_block(share, part, sizes)

    # Longer heads take longer than what is read for the next one; of which no more is asked for than a tile.
    key_count = head.position.kv_length
    asking = MANY_AT_ONCE and at_once and blocks <= 2 and key_count <= keys
    if asking:
        pack.ask_for(moved(v.data, arrays.v.strides[0]), v.row, key_count, Dv * memory.itemsize)

    finite = True
    # Bit i: scores of block i have been out of their reference's range.  A literal would have all compiled twice.
    rising = np.int64(0)
    task_low, visible_high, _, _ = visible(first, end, head.position)
    task_low, task_high = max(task_low, low), min(visible_high, high)
    for number in range(task_low // keys, (task_high + keys - 1) // keys):
        tile = number * keys
        tile_low, tile_high = max(tile, task_low), min(tile + keys, task_high)
        if pairs:
            tile_low -= (tile_low - tile) % 2
        loaded = False
        for i in range(blocks):
            part = next_block(share, part, sizes) if i else first_block(share, sizes)
            head = addressed(head_after(first_head, arrays, part.head))
            row, rows = part.row, part.rows
            here = select_unsloped(head, settings, row, rows, part.heads, tile, tile + keys, pairs, sizes, memory, at)
            start, n = here.start, here.stop - here.start
            if here.kept == EMPTY:
                if not at_once:
                    continue
                start, n = tile_low, 0
            width = width_of(part, sizes)
            state = state_of(memory, at, sizes, operands, i)
            parted = here.edged and across == 1 and not (pairs and ON_TILES)
            edges.cut(here, width, not parted, sizes, memory, at)

            if n > 0 and not loaded:
                k, v = load_tile(head, k, v, tile_low, tile_high, packing, copying, operands, sizes, memory, at)
                loaded = True
            # While the first block is computed, the next tile is asked for: behind the last one, the next split's.
            following = tile + keys < visible_high and i == 0
            k_ahead = rows_ahead(head.k, tile + keys, following, D)
            v_ahead = rows_ahead(head.v, tile + keys, following, Dv)
            k_tile = keys_of(k, start, tile_low, copied, D, operands, copying[0])
            v_tile = values_of(v, start, tile_low, tile_high, packing, copying[1], values, operands, sizes)
            if n > 0:
                rising = exponentiate_tile(
                    head, k_tile, k_ahead, here, i, row, rows, part.heads, rising, settings, sizes, plain, weighted,
                    state, memory, at,
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
                # Where a sink is so large that sums are to be corrected, this is left to the careful form, which can.
                corrected = sinks.size > 0 and include_sink(
                    sinks, part, width, state, np.int64(0), operands, sizes, memory, at
                )
                if corrected or write_products(
                    width, rows, v_tile.data, v_tile.row, Dv, from_keys, to_keys, scores,
                    state.total, settings.gain, top, to, out.row,
                ):  # fmt: skip
                    finite = False
            elif careful:
                tiles.accumulate_carefully(width, v_tile.data, v_tile.row, v_tile.step, Dv, n, scores, state.ot, clean)
            else:
                cuts = element(memory, at.cuts)
                tiles.accumulate(
                    width, v_tile.data, v_tile.row, v_tile.step, Dv, n, scores, state.ot, cuts, v_ahead.data,
                    v_ahead.size,
                )  # fmt: skip
    return finite


@device
def do_tasks(worker, memories, counters, partials, finished, arrays, sequences, functions, settings, cut):
    """Do tasks until there are none: the rows of a head from the last to the first, as causal ones have most to do.

    If keys are split, partials is (splits, states of each): of all that are a task each, of which `finished` (rows of
    heads, 1) counts those that are done; or of each worker, where a task is all splits.
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
    tasks = sequences.numbers.shape[0] * of_sequence * per_head * (cut.splits if cut.parted else 1)
    at = addressed(memory_map(Sizes(D, Dv, max(cut.keys, cut.short), cut.block, cut.lanes, 0)))
    notes, noted = Notes(at.state + cut.states * at.state_size, cut.columns), -1
    helped = 0
    while True:
        task, helped = launch.take(counters, worker, helped, tasks)
        if task < 0:
            break
        number, split = task, 0
        if cut.parted:
            number, split = task // cut.splits, task % cut.splits
        b, place = sequences.numbers[number // per_head // of_sequence, 0], number // per_head % of_sequence
        h = place // shares * group + place % shares * cut.heads
        heads = min(cut.heads, (place // shares + 1) * group - h)
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
        head = addressed(head_of(arrays, sequences, functions, settings, b, h, notes))
        sizes = Sizes(D, Dv, cut.short if kv_length <= cut.short else cut.keys, cut.block, cut.lanes, 0)
        out_head = matrix(arrays.out, sequences.offsets[b, 4], h)
        alone = splits == 1 and heads == 1
        at_once = alone and is_done_at_once(head, out_head, first, valid, sizes, arrays.operands, cut.short)
        first_split = (number if cut.parted else worker) * cut.splits
        of_all = partials[first_split : first_split + splits]
        share = share_of(heads, first, valid, cut.alike, sizes)
        part, until, careful = split, split + 1 if cut.parted else splits, np.bool_(False)
        while valid > first:
            finite = True
            while part < until:
                low = part * keys
                finite = attend(
                    arrays, sequences, settings, head, share, out_head, low, low + keys, sizes, memory, careful,
                    at_once,
                )  # fmt: skip
                if splits > 1:
                    keep_states(share, sizes, memory, of_all[part])
                part += 1
            if splits > 1:
                if cut.parted and not careful and fetch_add(finished, number) != splits - 1:
                    break
                join_states(share, sizes, memory, arrays.operands, of_all)
            if arrays.sinks.size and not at_once:
                include_sinks(arrays.sinks[h : h + heads], share, sizes, arrays.operands, memory)
            finite &= write_results(arrays, sequences, settings, b, h, share, sizes, memory, at_once)
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


def prepared(call: Call, kinds: Kinds, whole: Plan, alike: bool, threads_used: int) -> Cutting:
    """How to compute calls like one of elements and operands of these `kinds`, cut as the plan says, on as many threads
    at most; with the rows of heads that share keys in one block where these are few, if treated `alike`.
    """
    (arrays, _, functions, settings), dtype = call, call.arrays.lse.dtype
    (Hq, _, D), Dv, Hkv = arrays.q.shape, arrays.out.shape[2], len(arrays.k)
    columns, lanes = columns_noted(arrays.mask, Hq, settings, whole), VECTOR_BYTES // dtype.itemsize
    shares = Hkv * -(-Hq // Hkv // whole.heads)
    whole_tasks = len(call.sequences.numbers) * shares * whole.tasks
    size = memory_size(whole, D, Dv, lanes, -(-settings.Lq // whole.block) * columns)
    kept = whole.states * kept_size.py_func(*map_of(whole, D, Dv, lanes))

    def cut_for(sequences: Sequences) -> Run:
        splits = most_splits(sequences, Hkv, whole)
        operations = launch.rows_times_keys(sequences) * Hq * (D + Dv)
        # By threads, as it changes no bit: where there are tasks enough, no more memory is needed than workers have.
        enough = whole_tasks >= 8 * threads_used and operations <= whole_tasks * MOST_OPERATIONS
        parted = splits > 1 and not enough
        tasks = whole_tasks * (splits if parted else 1)
        cut = Cut(
            whole.keys, whole.short, whole.block, whole.blocks, whole.states, lanes, columns, whole.heads, int(alike),
            whole.split, splits, int(parted),
        )  # fmt: skip
        workers = launch.workers_for(threads_used, tasks, operations)
        start = launch.prepared(entry, kinds, workers, tasks, operations, size, dtype)

        def run(arrays: Arrays) -> None:
            of_splits = tasks if parted else workers * splits
            partials = np.empty((of_splits, kept) if splits > 1 else (0, 0), dtype)
            finished = np.zeros((whole_tasks if parted else 0, 1), np.int64)
            start(partials, finished, arrays, sequences, functions, settings, cut)

        return run

    return cut_for


def most_splits(sequences: Sequences, Hkv: int, whole: Plan) -> int:
    """The largest number of splits of a sequence's keys, see `plan.split_keys`."""
    rows_and_keys = sequences.intervals[sequences.numbers[:, 0], 1:]
    long = rows_and_keys[rows_and_keys[:, 1] >= 2 * whole.split]
    return max((_splits(Hkv, rows, keys, whole) for rows, keys in set(map(tuple, long.tolist()))), default=1)


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
    return -(-(at.state + cut.states * at.state_size + notes) // 16) * 16


def map_of(cut: Plan, D: int, Dv: int, lanes: int) -> tuple[Memory, Sizes]:
    """Where things are in a worker's memory."""
    sizes = Sizes(D, Dv, max(cut.keys, cut.short), cut.block, lanes, 0)
    return memory_map.py_func(sizes), sizes


def signature(kind: str, operand: types.Type, held: str) -> tuple[types.Type, ...]:
    """Of `work`, for a kind of element, an operand and how keys and values are held, see `narrow`."""
    return launch.signature_of(
        COMPUTED[kind],
        types.Array(COMPUTED[kind], 2, "C"),
        types.Array(types.int64, 2, "C"),
        *call_types(kind, operand, held),
        types.NamedUniTuple(types.int64, len(Cut._fields), Cut),
    )


entry = launch.entry(work, signature)
