"""How much each key is attended to: its probabilities, summed over the query rows, in a second pass over the scores.

    key_weight[j] = sum over rows i of exp(s[i, j]) / sum over keys of exp(s[i, :])

The probabilities need the sums of whole rows, so that this cannot be had while the keys stream past for the first time.
A task is a part of the keys of one head, which every row block passes in order, or of the heads that share them, if
all their rows are in one block: who does it changes no bit.
"""

from __future__ import annotations

from collections import namedtuple

import numpy as np
from numba import types

from numba_attn.block_mask import EMPTY
from numba_attn.cpu import amx, gradient_tiles, launch, pack, softmax
from numba_attn.cpu.jit import device, kernel
from numba_attn.cpu.narrow import COMPUTED
from numba_attn.cpu.plan import MOST_OPERATIONS, Plan
from numba_attn.cpu.pointers import address, align_stack, as_element, holds_pairs, moved
from numba_attn.cpu.results import column_of, read_norms, write
from numba_attn.cpu.score import (
    NO_NOTES,
    ON_TILES,
    Call,
    Cutting,
    Kinds,
    Run,
    Sequences,
    Sizes,
    call_types,
    columns_of,
    copies_keys,
    element,
    head_of,
    keys_of,
    rows_ahead,
    score,
    select,
)
from numba_attn.cpu.shares import evenly, heads_in_block
from numba_attn.cpu.stored import gather, in_place, is_gathered
from numba_attn.cpu.target import VECTOR_BYTES
from numba_attn.cpu.tuples import addressed
from numba_attn.cpu.workers import by_workers

# Where things are in a worker's memory, in elements: qt, the norms of a row block, and one vector of sums a key.
Memory = namedtuple("Memory", "scores bias keys rows zero low high norms qt sums")
# How the problem is cut: keys of a key tile and of a task, query rows of a row block, lanes of a vector, and whether
# rows of heads that share keys may be in one block.
Cut = namedtuple("Cut", "keys task_keys block lanes alike")

MOST_KEYS = 2048  # of a task: it packs the queries once


@device
def memory_map(sizes):
    # Rows and columns filled up to what tile registers hold.
    keys, qt_rows = (sizes.keys + 31) // 32 * 32, (sizes.D + 15) // 16 * 16
    copied = 2 * keys * sizes.block
    rows = copied + keys * qt_rows
    lanes = (rows + keys * sizes.D + 15) // 16 * 16
    return Memory(
        scores=0,
        bias=keys * sizes.block,
        keys=copied,
        rows=rows,
        zero=lanes,
        low=lanes + sizes.block,
        high=lanes + 2 * sizes.block,
        norms=lanes + 3 * sizes.block,
        qt=lanes + 5 * sizes.block,
        sums=lanes + (5 + qt_rows) * sizes.block,
    )


@device
def heads_of_task(group, rows, alike, block):
    """Of how many heads that share keys a task is: as many as fit a block, where they are `alike` and have few rows."""
    return evenly(group, heads_in_block(rows, block)) if alike else 1


@device
def add_up(head, heads, low, high, arrays, sequences, weights, sizes, settings, memory):
    """Write the weights of the keys [low, high), of a head and the `heads` - 1 after it.

    Of one head, blocks of rows are added up, to a vector a key; several are one block.
    """
    keys, block, lanes, operands = sizes.keys, sizes.block, sizes.lanes, arrays.operands
    at = addressed(memory_map(sizes))
    scores, sums = element(memory, at.scores), element(memory, at.sums)
    qt = as_element(element(memory, at.qt), operands)
    copied = as_element(element(memory, at.keys), operands)
    nothing, columns = memory.dtype.type(0), columns_of(sizes.D, operands)
    valid = sequences.intervals[head.b, 1]
    q_head = arrays.q.strides[0]
    pack.fill_lanes(element(memory, at.zero), nothing, block // lanes)
    pack.fill_lanes(sums, nothing, high - low if heads == 1 else 0)
    for i in range((valid + block - 1) // block):
        row = i * block
        rows = min(block, valid - row)
        width = (rows * heads + lanes - 1) // lanes
        packed = False
        read_norms(
            arrays, sequences, head.b, head.h, row, rows, heads, block, width * lanes, memory, at.norms,
            at.norms + block,
        )  # fmt: skip
        for number in range(low // keys, (high + keys - 1) // keys):
            start, stop = max(number * keys, low), min((number + 1) * keys, high)
            here = select(head, settings, row, rows, heads, start, stop, False, sizes, memory, at)
            if here.kept == EMPTY:
                continue
            if not packed:
                q = head.q
                pack.fill_lanes(qt, nothing, (sizes.D + 15) // 16 * 16 * width)
                pack.transpose(
                    width, moved(q.data, row * q.row), q_head, q.row, q.step, rows, rows * heads, sizes.D, qt
                )  # fmt: skip
                packed = True
            k, n = in_place(head.k, memory), here.stop - here.start
            if is_gathered(head.k):
                k = gather(head.k, here.start, n, sizes.D, memory, element(memory, at.rows))
            copying = copies_keys(k, sizes.D, operands)
            if copying:
                pack.copy_rows(moved(k.data, here.start * k.row), k.row, k.step, n, sizes.D, columns, copied)
            k_tile = keys_of(k, here.start, here.start, copied, sizes.D, operands, copying)
            following = (number + 1) * keys
            ahead = rows_ahead(head.k, following, i == 0 and following < head.position.kv_length, sizes.D)
            unit = score(head, k_tile, ahead, settings, here, row, rows, heads, sizes, qt, scores, memory, at)
            of_block = element(memory, at.norms)
            if heads == 1:
                to = moved(sums, (here.start - low) * lanes * memory.itemsize)
                log_total = element(memory, at.norms + block)
                softmax.weigh(width, scores, n, unit, here.added, here.row, of_block, log_total, to)
            else:
                row_bytes, block_bytes = width * lanes * memory.itemsize, block * memory.itemsize
                gradient_tiles.weights(
                    width, scores, n, unit, here.added, here.row, of_block, block_bytes, scores, row_bytes
                )
                write_sums(
                    weights, sequences, head, heads, here.start, n, at.scores, width * lanes, rows, lanes, memory
                )
    if heads == 1:
        write_sums(weights, sequences, head, 1, low, high - low, at.sums, lanes, lanes, lanes, memory)


@device
def write_sums(weights, sequences, head, heads, first, n, start, row, count, lanes, memory):
    """Write the weights of n keys from the first one on, for each of some heads the sum of `count` numbers of each key.

    Those of a key are a `row`, in memory from `start` on; those of a head are behind those of the one before, and are
    added up as vectors of so many lanes would be: a head of its own has the same bits.
    """
    for i in range(heads):
        weight = column_of(weights, sequences.offsets[head.b, 8], head.h + i)
        for key in range(n):
            total, place = memory.dtype.type(0), start + key * row + i * count
            for lane in range(min(count, lanes)):
                of_lane = memory.dtype.type(0)
                for vector in range((count - lane + lanes - 1) // lanes):
                    of_lane += memory[place + vector * lanes + lane]
                total += of_lane
            write(weight, first + key, total)


@device
def do_tasks(worker, memories, counters, weights, arrays, sequences, functions, settings, cut):
    """Do tasks until there are none; weights is (heads, keys), and norms are those of the forward pass."""
    memory = memories[worker]
    align_stack()
    on_tiles = ON_TILES and holds_pairs(address(arrays.operands))
    if on_tiles:
        amx.configure(address(memory))
    (Hq, _, D), Hkv, Lk = arrays.q.shape, arrays.k.shape[0], settings.Lk
    group = Hq // Hkv
    sizes = Sizes(D, 0, cut.keys, cut.block, cut.lanes, 0)
    per_head = (Lk + cut.task_keys - 1) // cut.task_keys
    tasks = sequences.numbers.shape[0] * Hq * per_head
    helped = 0
    while True:
        task, helped = launch.take(counters, worker, helped, tasks)
        if task < 0:
            break
        # Heads that share keys one after the other, while these are in a cache.
        part, member = task // group, task % group
        b, h = sequences.numbers[part // per_head // Hkv, 0], part // per_head % Hkv * group + member
        low = part % per_head * cut.task_keys
        high = max(low, min(low + cut.task_keys, sequences.intervals[b, 2] if settings.packed else Lk))
        together = heads_of_task(group, sequences.intervals[b, 1], cut.alike, cut.block)
        if low == high or member % together != 0:
            continue
        head = addressed(head_of(arrays, sequences, functions, settings, b, h, NO_NOTES))
        heads = min(together, group - member)
        add_up(head, heads, low, high, arrays, sequences, weights, sizes, settings, memory)
    if on_tiles:
        amx.release(address(memory))


do_all_tasks = by_workers(do_tasks)


@kernel
def weigh(launcher, memories, counters, weights, arrays, sequences, functions, settings, cut):
    """`do_tasks`, by as many workers as there are memories."""
    do_all_tasks(launcher, memories, counters, weights, arrays, sequences, functions, settings, cut)


# From Python ----------------------------------------------------------------------------------------------------------


def prepared(call: Call, kinds: Kinds, weights: np.ndarray, whole: Plan, alike: bool, threads_used: int) -> Cutting:
    """How to write the weights of a call whose norms have been written; they are (Hq, Lk), of the first sequence.

    Few rows of heads that share keys are in one block, if treated `alike`.
    """
    (arrays, _, functions, settings), dtype = call, call.arrays.lse.dtype
    (Hq, _, D), Dv, Lq, Lk = arrays.q.shape, arrays.out.shape[2], settings.Lq, settings.Lk
    heads = len(call.sequences.numbers) * Hq
    cut = cut_keys(heads, Lq, Lk, D, whole, threads_used, dtype.itemsize)._replace(alike=int(alike))
    tasks, size = heads * -(-Lk // cut.task_keys), memory_size(cut, D)

    def cut_for(sequences: Sequences) -> Run:
        operations = launch.rows_times_keys(sequences) * Hq * (D + Dv)
        workers = launch.workers_for(threads_used, tasks, operations)
        start = launch.prepared(entry, kinds, workers, tasks, operations, size, dtype)
        return lambda arrays: start(weights, arrays, sequences, functions, settings, cut)

    return cut_for


def cut_keys(heads: int, Lq: int, Lk: int, D: int, whole: Plan, workers: int, itemsize: int) -> Cut:
    """Tasks of whole key tiles, eight or more for each worker wherever the problem allows it."""
    keys = whole.keys
    wanted = heads * -(-Lk // keys) // (8 * workers)
    wanted = max(1, min(wanted, MOST_KEYS // keys, MOST_OPERATIONS // (keys * Lq * max(D, 1))))
    return Cut(keys, keys * wanted, whole.block, VECTOR_BYTES // itemsize, alike=0)


def memory_size(cut: Cut, D: int) -> int:
    """Elements of a worker's memory."""
    at = memory_map.py_func(Sizes(D, 0, cut.keys, cut.block, cut.lanes, 0))
    return -(-(at.sums + cut.task_keys * cut.lanes) // 16) * 16


def signature(kind: str, operand: types.Type, held: str) -> tuple[types.Type, ...]:
    """Of `weigh`, for a kind of element, an operand and how keys are held, see `narrow`."""
    return launch.signature_of(
        COMPUTED[kind],
        types.Array(COMPUTED[kind], 2, "A"),
        *call_types(kind, operand, held),
        types.NamedUniTuple(types.int64, len(Cut._fields), Cut),
    )


entry = launch.entry(weigh, signature)
