"""The forward pass of a few query rows, as of one new token: the keys are split over the workers, and read once.

A task is one key-value head and a tile of the keys.  The query rows of all heads that share it are done together, or
one head after the other where there is dropout or they have block masks of their own, as in `forward`, with the
products of `dots` and `mixing`.  The worker that finishes the last split of a head joins them, in the keys' order.

Flash-Decoding (Dao et al., 2023) for the split along the keys.
"""

from __future__ import annotations

import math

import numpy as np
from numba import types

from numba_attn.block_mask import EMPTY
from numba_attn.cpu import dropout, launch, pack, rows, softmax, target
from numba_attn.cpu.dots import beside, dots
from numba_attn.cpu.factors import SUMMED, round_queries, weights_of
from numba_attn.cpu.jit import device, kernel, through_pointer
from numba_attn.cpu.mixing import mix, mix_carefully
from numba_attn.cpu.narrow import COMPUTED
from numba_attn.cpu.pointers import (
    address,
    align_stack,
    as_element,
    as_factor,
    fetch_add,
    holds_pairs,
    moved,
)
from numba_attn.cpu.reading import is_read_in_place, pages_from, place, rows_ahead
from numba_attn.cpu.results import (
    column_of,
    fill_padding,
    statistics_of,
    write_statistics,
)
from numba_attn.cpu.score import (
    NO_NOTES,
    Arrays,
    Call,
    Cutting,
    Kinds,
    Run,
    Sequences,
    Sizes,
    adds_numbers,
    call_types,
    change,
    element,
    head_of,
    is_plain,
    matrix,
    select,
    vectors_of,
)
from numba_attn.cpu.simd import PAIRS, WORDS
from numba_attn.cpu.splits import (
    MOST_SPLIT,
    TABLE,
    Cut,
    cut_of,
    factors_of_vector,
    memory_map,
    padded,
    power_of_two,
    sizes_of,
    split_size,
    splits_of,
    state_of,
)
from numba_attn.cpu.stored import is_quantized
from numba_attn.cpu.target import VECTOR_BYTES
from numba_attn.cpu.tuples import addressed
from numba_attn.cpu.workers import by_workers
from numba_attn.storage import QUANTIZED

# Query rows of a head; for more, queries as lanes are faster.  So they are for the rows of all heads that share keys,
# if these fill so many halves of a vector.
MOST_ROWS, HALVES = 8, 3
SERIAL_WORK = 1 << 17  # as `launch.SERIAL_WORK`: less, as reading the keys is what takes time


@device
def attend(
    arrays, sequences, functions, settings, cut, b, shared, low, high, partial, tables, key_weights, memory, careful
):  # fmt: skip
    """Attend to the keys [low, high) of a key-value head: leaves the state of each block in `partial`.

    And of one row the probabilities against its reference, in `key_weights`.  Returns whether all of it is finite.
    """
    (Hq, _, D), Dv, lanes = arrays.q.shape, arrays.out.shape[2], VECTOR_BYTES // memory.itemsize
    Lq = cut.rows
    group, nothing, lowest = Hq // arrays.k.shape[0], memory.dtype.type(0), memory.dtype.type(-math.inf)
    height = power_of_two(cut.heads * Lq)
    wide = factors_of_vector(arrays, lanes)
    # Dropout tells the lanes of a vector apart.
    stride = lanes if settings.threshold != 0 else height
    sizes = Sizes(padded(D, wide), padded(Dv, lanes), MOST_SPLIT, lanes, lanes, stride)
    at = addressed(memory_map(sizes.D, sizes.Dv, lanes, cut.blocks, height))
    scores, top, sums = element(memory, at.scores), element(memory, at.top), element(memory, at.sums)
    moments, correction, step = element(memory, at.moments), element(memory, at.correction), element(memory, at.step)
    pack.fill_lanes(element(memory, at.zero), nothing, 1)
    for i in range(cut.blocks):
        state = state_of(partial, i, height, Dv, lanes)
        pack.fill_lanes(state.reference, nothing, 3)
        pack.fill_lanes(state.best, lowest, 1)
        pack.fill_lanes(state.o, nothing, height * sizes.Dv // lanes)
    head = addressed(head_of(arrays, sequences, functions, settings, b, shared * group, NO_NOTES))
    k, v, kv_length = head.k, head.v, sequences.intervals[b, 2]
    copies = as_element(element(memory, at.keys), arrays.k), as_element(element(memory, at.values), arrays.v)
    k_table, v_table = tables[0], tables[1]
    k_ahead = v_ahead = held = 0
    placed, weighted = False, arrays.entropy.size > 0
    for i in range(cut.blocks):
        first = shared * group + i * cut.heads
        heads = min(cut.heads, (shared + 1) * group - first)
        count = heads * Lq
        if 4 * count > 3 * height:
            count = height  # with rows of zeros: in one piece, which is faster
        head = addressed(head_of(arrays, sequences, functions, settings, b, first, NO_NOTES))
        here = select(head, settings, 0, Lq, heads, low, high, False, sizes, memory, at)
        if here.kept == EMPTY:
            continue
        if not placed:
            held = D if is_read_in_place(k, D, lanes) and not is_quantized(k) else sizes.D
            k_ahead, v_ahead = rows_ahead(k, sizes.D, height, 0), rows_ahead(v, sizes.Dv, height, 1)
            k = place(k, low, high, kv_length, D, sizes.D, lanes, k_ahead, k_table, copies[0])
            v = place(v, low, high, kv_length, Dv, sizes.Dv, lanes, v_ahead, v_table, copies[1])
            placed = True
        n = here.stop - here.start
        k_at, (until, page) = moved(address(k_table), (here.start - low) * 8), pages_from(k, here.start)
        state = state_of(partial, i, height, Dv, lanes)
        queries = as_factor(element(memory, at.queries + i * height * sizes.D), arrays.k, arrays.operands)
        q_step = element(memory, at.steps + i * lanes)
        vectors, done = vectors_of(here, heads * Lq, sizes), False
        # Scores that are more than products are rarely in range, and comparing takes less than making them again.
        raising = np.bool_(not is_plain(head) or adds_numbers(head, here))
        while not done:
            dots(height, k.data, k_at, k_ahead, k.row, until, page, n, held, sizes.D, queries, q_step, scores)
            if stride != height:
                rows.spread(n, height, scores)
            unit = change(head, settings, here, 0, Lq, heads, sizes, scores, memory, at)
            moving = 2 if raising else 0
            for _ in range(2):
                if moving == 2:
                    softmax.highest(1, scores, vectors, unit, here.added, here.row, state.reference, top)
                    rows.highest_across(stride, top)
                    moving = softmax.move_reference(
                        1, top, state.reference, state.best, state.total, state.moment, correction
                    )
            if weighted:
                softmax.powers_weighted(
                    1, scores, vectors, unit, here.added, here.row, state.reference, sums, top, moments
                )
                rows.highest_across(stride, top)
                done = softmax.take_in_weighted(
                    1, top, state.reference, state.best, state.total, sums, state.moment, moments, raising
                )
            else:
                softmax.powers(1, scores, vectors, unit, here.added, here.row, state.reference, sums, top, moments)
                rows.highest_across(stride, top)
                done = softmax.take_in(
                    1, top, state.reference, state.best, state.total, sums, state.moment, moments, raising
                )
            raising = True
        if is_weighed(sequences, cut, b, key_weights):
            for j in range(heads):
                weight = column_of(key_weights, sequences.offsets[b, 8], first + j)
                to = moved(weight.data, here.start * weight.row)
                rows.write_weights(n, stride, element(memory, at.scores + j), to, weight.row)
        if settings.threshold != 0:
            dropout.drop(1, scores, n, settings.threshold, settings.seed, b, first, 0, here.start)
        for start in range(here.start, here.stop, SUMMED):
            some = min(SUMMED, here.stop - start)
            v_at, (until, page) = moved(address(v_table), (start - low) * 8), pages_from(v, start)
            weights = element(memory, at.scores + (start - here.start) * stride)
            weights = as_factor(weights, arrays.v, arrays.operands)
            weights_of(count, stride, weights, some, v.data, v_at, sizes.Dv, step)
            if careful:
                mix_carefully(
                    count, v.data, v_at, v.row, until, page, sizes.Dv, some, weights, stride, step, state.o
                )  # fmt: skip
            else:
                mix(
                    count, v.data, v_at, v_ahead, v.row, until, page, sizes.Dv, some, weights, stride, step, state.o
                )  # fmt: skip
    finite, one = True, memory.dtype.type(1)
    pack.fill_lanes(element(memory, at.factors), one, 1)
    for i in range(cut.blocks):
        state = state_of(partial, i, height, Dv, lanes)
        rows.add_across(stride, state.total)
        rows.add_across(stride, state.moment)
        if rows.weigh_rows(height, state.o, sizes.Dv, element(memory, at.factors)):
            finite = False
    return finite


@device
def is_weighed(sequences, cut, b, key_weights):
    """Whether weights of keys are written here: those of one row, which are its probabilities."""
    return key_weights.size > 0 and cut.rows == 1 and sequences.intervals[b, 1] > 0


@device
def keys_of_split(sequences, settings, cut, b, shared_heads, split):
    """The keys [low, high) of a split of a sequence."""
    offset, kv_length = sequences.intervals[b, 0], sequences.intervals[b, 2]
    first = max(0, offset - settings.left)
    keys = split_size(kv_length - first, shared_heads)
    low = (first // keys + split) * keys
    return low, min(low + keys, kv_length, offset + cut.rows + settings.right)


@device
def finish(arrays, sequences, settings, cut, b, shared, partials, key_weights, memory):
    """Join the states of all splits of a key-value head, and write its results."""
    (Hq, _, D), Dv, lanes = arrays.q.shape, arrays.out.shape[2], VECTOR_BYTES // memory.itemsize
    Lq = cut.rows
    group = Hq // arrays.k.shape[0]
    height = power_of_two(cut.heads * Lq)
    Dv_padded = padded(Dv, lanes)
    at = addressed(memory_map(padded(D, factors_of_vector(arrays, lanes)), Dv_padded, lanes, cut.blocks, height))
    kept, factors, others = element(memory, at.kept), element(memory, at.factors), at.others
    for i in range(cut.blocks):
        first = shared * group + i * cut.heads
        count = min(cut.heads, (shared + 1) * group - first) * Lq
        state = state_of(partials[0], i, height, Dv, lanes)
        first_reference = element(memory, at.low)
        rows.copy(state.reference, first_reference)
        for s in range(1, cut.splits):
            other = state_of(partials[s], i, height, Dv, lanes)
            softmax.join(1, VECTOR_BYTES, state.reference, other.reference, kept, factors)
            rows.add_rows(count, state.o, Dv_padded, kept, other.o, factors)
        if arrays.sinks.size:
            # A key without a value, which is not counted among the scores.
            for lane in range(lanes):
                memory[others + lane] = arrays.sinks[first + min(lane, count - 1) // Lq]
                memory[others + lanes + lane], memory[others + 2 * lanes + lane] = 1, 0
                memory[others + 3 * lanes + lane] = -math.inf
            softmax.join(1, VECTOR_BYTES, state.reference, element(memory, others), kept, factors)
            rows.weigh_rows(count, state.o, Dv_padded, kept)
        if is_weighed(sequences, cut, b, key_weights):
            for s in range(cut.splits):
                of_split = first_reference if s == 0 else state_of(partials[s], i, height, Dv, lanes).reference
                rows.parts(state.reference, of_split, factors)
                low, high = keys_of_split(sequences, settings, cut, b, arrays.k.shape[0], s)
                for j in range(count):
                    weight = column_of(key_weights, sequences.offsets[b, 8], first + j)
                    first_weight = moved(weight.data, low * weight.row)
                    rows.scale_weights(high - low, first_weight, weight.row, memory[at.factors + j])
        rows.shares(state.reference, settings.gain, factors)
        rows.weigh_rows(count, state.o, Dv_padded, factors)
        partial, lane_0, valid = partials[0], state.lanes, sequences.intervals[b, 1]
        for r in range(count):
            h, row = first + r // Lq, r % Lq
            if row < valid:
                out = matrix(arrays.out, sequences.offsets[b, 4], h)
                result = moved(out.data, row * out.row)
                pack.write_row(moved(state.o, r * Dv_padded * memory.itemsize), Dv, result, out.step)
                at_lane = lane_0 + r
                write_statistics(
                    statistics_of(arrays, sequences, b, h), row,
                    partial[at_lane], partial[at_lane + lanes], partial[at_lane + 2 * lanes],
                    partial[at_lane + 3 * lanes],
                )  # fmt: skip
        for h in range(first, first + count // Lq):
            fill_padding(arrays, sequences, b, h, valid, valid if settings.packed else arrays.q.shape[1])


@device
def pack_queries(arrays, sequences, cut, b, shared, memory):
    """The query rows of the heads that share a key-value head, block by block; zeros for padding, which is not read."""
    (Hq, _, D), Dv, lanes = arrays.q.shape, arrays.out.shape[2], VECTOR_BYTES // memory.itemsize
    Lq = cut.rows
    group, nothing = Hq // arrays.k.shape[0], memory.dtype.type(0)
    height, wide = power_of_two(cut.heads * Lq), factors_of_vector(arrays, lanes)
    columns = padded(D, wide)
    at = addressed(memory_map(columns, padded(Dv, lanes), lanes, cut.blocks, height))
    pack.fill_lanes(element(memory, at.queries), nothing, cut.blocks * height * columns // lanes)
    for g in range(group):
        q = matrix(arrays.q, sequences.offsets[b, 0], shared * group + g)
        block = element(memory, at.queries + g // cut.heads * height * columns)
        to = as_factor(block, arrays.k, arrays.operands)
        size = 2 if holds_pairs(to) else memory.itemsize
        valid = min(Lq, sequences.intervals[b, 1])
        pack.copy_rows(q.data, q.row, q.step, valid, D, columns, moved(to, g % cut.heads * Lq * columns * size))
    for i in range(cut.blocks):
        block = as_factor(element(memory, at.queries + i * height * columns), arrays.k, arrays.operands)
        round_queries(height, block, address(arrays.k), columns, element(memory, at.steps + i * lanes))
        beside(height, block, columns, element(memory, at.keys))


@device
def do_tasks(
    worker, memories, counters, tables, partials, finished, key_weights, arrays, sequences, functions, settings, cut
):  # fmt: skip
    """Do tasks until there are none: partials is (key-value heads x splits, a state each), finished (heads, 1).

    The tables of a worker are two of TABLE offsets.  Weights of keys, (heads, keys), are empty, or 0 and to be written.
    """
    memory = memories[worker]
    align_stack()
    shared_heads = arrays.k.shape[0]
    tasks = sequences.numbers.shape[0] * shared_heads * cut.splits
    helped = 0
    while True:
        task, helped = launch.take(counters, worker, helped, tasks)
        if task < 0:
            break
        pair, split = task // cut.splits, task % cut.splits
        b, shared = sequences.numbers[pair // shared_heads, 0], pair % shared_heads
        own = cut_of(cut, arrays, sequences, b, VECTOR_BYTES // memory.itemsize)
        low, high = keys_of_split(sequences, settings, own, b, shared_heads, split)
        pack_queries(arrays, sequences, own, b, shared, memory)
        careful = np.bool_(False)
        while True:
            finite = attend(
                arrays, sequences, functions, settings, own, b, shared, low, high, partials[task], tables[worker],
                key_weights, memory, careful,
            )  # fmt: skip
            if finite or careful:
                break
            # As in `forward`: something attended to is not finite, or a masked value has met a zero.
            careful = np.bool_(True)
        if fetch_add(finished, pair) == cut.splits - 1:
            of_pair = partials[pair * cut.splits : (pair + 1) * cut.splits]
            finish(arrays, sequences, settings, own, b, shared, of_pair, key_weights, memory)


do_all_tasks = by_workers(do_tasks)


@kernel
def decode(
    launcher, memories, counters, tables, partials, finished, key_weights, arrays, sequences, functions, settings, cut
):  # fmt: skip
    """`do_tasks`, by as many workers as there are memories."""
    do_all_tasks(
        launcher, memories, counters, tables, partials, finished, key_weights, arrays, sequences, functions, settings,
        cut,
    )  # fmt: skip


decode_through_pointer = through_pointer(decode.py_func)


# From Python ----------------------------------------------------------------------------------------------------------


def most_rows(lanes: int, together: int) -> int:
    """Query rows of a head, up to which they are better done here, if `forward` would do so many heads together.

    Compiled too.
    """
    most = min(MOST_ROWS, lanes)
    return most if together == 1 else max(1, min(most, (HALVES * lanes // 2 - 1) // together))


def operand(kind: str, bfloat16_products: bool, held: str) -> types.Type:
    """What products are made of, see `factors`: by how keys are held in memory, and what is faster."""
    if held == "bfloat16" and bfloat16_products and target.BFLOAT16 == "dot":
        return PAIRS
    rounded = bfloat16_products or kind in ("float16", "bfloat16")
    return WORDS if held in QUANTIZED and rounded and target.HAS_WORD_PRODUCTS else COMPUTED[kind]


def prepared(call: Call, kinds: Kinds, alike: bool, threads_used: int, key_weights: np.ndarray | None) -> Cutting:
    """How to compute calls like one of elements and operands of these `kinds`, on as many threads at most; heads that
    share keys at once, if treated `alike`.

    Of sequences with one row, the weights of keys are written too, (Hq, Lk) of the first sequence, which are 0.
    """
    (arrays, _, functions, settings), dtype = call, call.arrays.lse.dtype
    (Hq, _, D), Hkv, lanes = arrays.q.shape, len(arrays.k), VECTOR_BYTES // dtype.itemsize
    Dv, Lq = arrays.out.shape[2], settings.Lq
    group, pairs = Hq // Hkv, len(call.sequences.numbers) * Hkv
    heads, rows = group if alike else 1, min(Lq, MOST_ROWS, lanes)
    wide = 2 * lanes if kinds[1] in (PAIRS, WORDS) else lanes
    size, state = sizes_of(rows, heads, group, D, Dv, lanes, wide)
    to_weigh = np.empty((0, 0), dtype) if key_weights is None else key_weights

    def cut_for(sequences: Sequences) -> Run:
        cut = Cut(rows, heads, group, splits_of(sequences, Hkv, rows, settings))
        tasks, operations = pairs * cut.splits, launch.rows_times_keys(sequences) * Hq * (D + Dv)
        workers = launch.workers_for(threads_used, tasks, operations, SERIAL_WORK)
        start = launch.prepared(entry, kinds, workers, tasks, operations, size, dtype)

        def run(arrays: Arrays) -> None:
            partials, finished = np.empty((tasks, state), dtype), np.zeros((pairs, 1), np.int64)
            tables = np.empty((workers, 2, TABLE), np.int64)
            start(tables, partials, finished, to_weigh, arrays, sequences, functions, settings, cut)

        return run

    return cut_for


def signature(kind: str, operand: types.Type, held: str) -> tuple[types.Type, ...]:
    """Of `decode`, for a kind of element, an operand and how keys and values are held, see `narrow`."""
    return launch.signature_of(
        COMPUTED[kind],
        types.Array(types.int64, 3, "C"),
        types.Array(COMPUTED[kind], 2, "C"),
        types.Array(types.int64, 2, "C"),
        types.Array(COMPUTED[kind], 2, "A"),
        *call_types(kind, operand, held),
        types.NamedUniTuple(types.int64, 4, Cut),
    )


entry = launch.entry(decode, signature)
