"""How much each key is attended to by few query rows, as `key_weight`, in a second pass with the products of `decode`.

Of one row there is nothing to be added up: `decode` has its probabilities in the first pass.  A task is a part of the
keys of one key-value head, whose rows are read once for all query heads that share them.
"""

from __future__ import annotations

import numpy as np
from numba import types

from numba_attn.block_mask import EMPTY
from numba_attn.cpu import launch, pack, softmax
from numba_attn.cpu.decode import MOST_ROWS, SERIAL_WORK, pack_queries
from numba_attn.cpu.dots import dots
from numba_attn.cpu.jit import device, kernel
from numba_attn.cpu.narrow import COMPUTED
from numba_attn.cpu.pointers import address, align_stack, as_element, as_factor, moved
from numba_attn.cpu.reading import is_read_in_place, pages_from, place, rows_ahead
from numba_attn.cpu.results import column_of, read_norms, write
from numba_attn.cpu.score import (
    NO_NOTES,
    Arrays,
    Call,
    Cutting,
    Kinds,
    Run,
    Sequences,
    Sizes,
    call_types,
    change,
    element,
    head_of,
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
)
from numba_attn.cpu.stored import is_quantized
from numba_attn.cpu.target import VECTOR_BYTES
from numba_attn.cpu.tuples import addressed
from numba_attn.cpu.workers import by_workers


@device
def weigh_keys(arrays, sequences, functions, settings, cut, b, shared, low, high, weights, table, memory):
    """Write the weights of the keys [low, high) of all heads that share a key-value head."""
    (Hq, _, D), lanes = arrays.q.shape, VECTOR_BYTES // memory.itemsize
    Lq, group, nothing = cut.rows, Hq // arrays.k.shape[0], memory.dtype.type(0)
    height, wide = power_of_two(cut.heads * Lq), factors_of_vector(arrays, lanes)
    sizes = Sizes(padded(D, wide), lanes, MOST_SPLIT, lanes, lanes, height)
    at = addressed(memory_map(sizes.D, lanes, lanes, cut.blocks, height))
    scores, powers = element(memory, at.scores), element(memory, at.values)
    pack.fill_lanes(element(memory, at.zero), nothing, 1)
    head = addressed(head_of(arrays, sequences, functions, settings, b, shared * group, NO_NOTES))
    k, end, valid = head.k, min(high, sequences.intervals[b, 2]), min(Lq, sequences.intervals[b, 1])
    copies = as_element(element(memory, at.keys), arrays.k)
    ahead = held = 0
    placed = False
    for i in range(cut.blocks):
        first = shared * group + i * cut.heads
        heads = min(cut.heads, (shared + 1) * group - first)
        head = addressed(head_of(arrays, sequences, functions, settings, b, first, NO_NOTES))
        here = select(head, settings, 0, Lq, heads, low, max(low, end), False, sizes, memory, at)
        n = 0 if here.kept == EMPTY else here.stop - here.start
        if n > 0:
            if not placed:
                held = D if is_read_in_place(k, D, lanes) and not is_quantized(k) else sizes.D
                ahead = rows_ahead(k, sizes.D, height, 0)
                k = place(k, low, end, sequences.intervals[b, 2], D, sizes.D, lanes, ahead, table, copies)
                placed = True
            k_at, (until, page) = moved(address(table), (here.start - low) * 8), pages_from(k, here.start)
            queries = as_factor(element(memory, at.queries + i * height * sizes.D), arrays.k, arrays.operands)
            step = element(memory, at.steps + i * lanes)
            dots(height, k.data, k_at, ahead, k.row, until, page, n, held, sizes.D, queries, step, scores)
            unit = change(head, settings, here, 0, Lq, heads, sizes, scores, memory, at)
            read_norms(arrays, sequences, b, first, 0, Lq, heads, height, lanes, memory, at.top, at.sums)
            vectors = vectors_of(here, heads * Lq, sizes)
            pack.fill_lanes(powers, nothing, vectors)
            softmax.weigh(
                1, scores, vectors, unit, here.added, here.row, element(memory, at.top), element(memory, at.sums),
                powers,
            )  # fmt: skip
        for j in range(heads):
            weight = column_of(weights, sequences.offsets[b, 8], first + j)
            for key in range(low, high):
                total = nothing
                if here.start <= key < here.start + n:
                    place_of_key = at.values + (key - here.start) * height + j * Lq
                    for row in range(valid):
                        total += memory[place_of_key + row]
                write(weight, key, total)


@device
def do_tasks(worker, memories, counters, tables, weights, arrays, sequences, functions, settings, cut):
    """Do tasks until there are none; weights is (heads, keys), and norms are those of the forward pass."""
    memory = memories[worker]
    align_stack()
    shared_heads, Lk = arrays.k.shape[0], settings.Lk
    keys = split_size(Lk, shared_heads)
    parts = (Lk + keys - 1) // keys
    tasks = sequences.numbers.shape[0] * shared_heads * parts
    helped = 0
    while True:
        task, helped = launch.take(counters, worker, helped, tasks)
        if task < 0:
            break
        pair, low = task // parts, task % parts * keys
        b, shared = sequences.numbers[pair // shared_heads, 0], pair % shared_heads
        high = min(low + keys, sequences.intervals[b, 2] if settings.packed else Lk)
        if low < high and sequences.intervals[b, 1] > 1:  # else `decode` has done so
            own = cut_of(cut, arrays, sequences, b, VECTOR_BYTES // memory.itemsize)
            pack_queries(arrays, sequences, own, b, shared, memory)
            weigh_keys(
                arrays, sequences, functions, settings, own, b, shared, low, high, weights, tables[worker], memory
            )


do_all_tasks = by_workers(do_tasks)


@kernel
def weigh_few(launcher, memories, counters, tables, weights, arrays, sequences, functions, settings, cut):
    """`do_tasks`, by as many workers as there are memories."""
    do_all_tasks(launcher, memories, counters, tables, weights, arrays, sequences, functions, settings, cut)


# From Python ----------------------------------------------------------------------------------------------------------


def prepared(call: Call, kinds: Kinds, weights: np.ndarray, alike: bool, threads_used: int) -> Cutting:
    """How to write the weights of a call whose norms have been written; they are (Hq, Lk), of the first sequence.

    Heads that share keys are done at once, if treated `alike`.
    """
    (arrays, _, functions, settings), dtype = call, call.arrays.lse.dtype
    (Hq, _, D), Hkv, lanes = arrays.q.shape, len(arrays.k), VECTOR_BYTES // dtype.itemsize
    Lq, Lk, group = settings.Lq, settings.Lk, Hq // Hkv
    heads, few = group if alike else 1, min(Lq, MOST_ROWS, lanes)
    size, _ = sizes_of(few, heads, group, D, lanes, lanes, 2 * lanes if kinds[1] in (PAIRS, WORDS) else lanes)
    cut = Cut(few, heads, group, 1)
    tasks = len(call.sequences.numbers) * Hkv * -(-Lk // split_size.py_func(Lk, Hkv))

    def cut_for(sequences: Sequences) -> Run:
        operations = launch.rows_times_keys(sequences) * Hq * D
        workers = launch.workers_for(threads_used, tasks, operations, SERIAL_WORK)
        start = launch.prepared(entry, kinds, workers, tasks, operations, size, dtype)

        def run(arrays: Arrays) -> None:
            tables = np.empty((workers, TABLE), np.int64)
            start(tables, weights, arrays, sequences, functions, settings, cut)

        return run

    return cut_for


def signature(kind: str, operand: types.Type, held: str) -> tuple[types.Type, ...]:
    """Of `weigh_few`, for a kind of element, an operand and how keys are held, see `narrow`."""
    return launch.signature_of(
        COMPUTED[kind],
        types.Array(types.int64, 2, "C"),
        types.Array(COMPUTED[kind], 2, "A"),
        *call_types(kind, operand, held),
        types.NamedUniTuple(types.int64, 4, Cut),
    )


entry = launch.entry(weigh_few, signature)
