"""How the keys of a few query rows are cut into tasks, and where a worker and a task keep what they work on.

Splits are cut by the numbers of keys and of heads alone, so the same bits come out for any number of threads, and for
a sequence alone or in a batch.
"""

from __future__ import annotations

import functools
from collections import namedtuple

import numpy as np

from numba_attn.cpu.jit import device
from numba_attn.cpu.pointers import address, as_factor, holds_two
from numba_attn.cpu.reading import MOST_AHEAD
from numba_attn.cpu.score import Sequences, Settings, element

# Keys of a task, which are one tile; from a length on twice as many, and then four times.  Eight key-value heads count
# as one.  Many, as memory is read at half of its speed for a microsecond where one product ends and the next begins.
SPLIT, LONG = 512, 4096
MOST_SPLIT = 4 * SPLIT
TABLE = MOST_SPLIT + MOST_AHEAD + 1  # of offsets: rows of a task, those asked for, and one that is looked up in vain

# How the problem is cut: query rows of a head, query heads that are done at once, blocks of these of a key-value head,
# splits of a sequence.  Of a whole call, the most of each; of a sequence, see `cut_of`.
Cut = namedtuple("Cut", "rows heads blocks splits")
# Where things are in a worker's memory, in elements.
Memory = namedtuple(
    "Memory",
    "scores bias zero top sums moments correction low high kept factors others step queries steps keys values size",
)
# Where the state of a block of rows is: four vectors (reference, total, moment, best), and the output rows.
State = namedtuple("State", "lanes reference total moment best o")


@device
def padded(columns, lanes):
    return (columns + lanes - 1) // lanes * lanes


@device
def factors_of_vector(arrays, lanes):
    """Elements of a vector that keys are multiplied by: of a query row."""
    return 2 * lanes if holds_two(as_factor(address(arrays.lse), arrays.k, arrays.operands)) else lanes


@device
def power_of_two(count):
    power = 1
    while power < count:
        power *= 2
    return power


@device
def cut_by_rows(rows, most_heads, group, splits, lanes):
    heads = max(1, min(group, most_heads, lanes // rows))
    return Cut(rows, heads, (group + heads - 1) // heads, splits)


@device
def cut_of(cut, arrays, sequences, b, lanes):
    """For a sequence: by its own rows, so that it comes to the same bits whatever the others are."""
    rows = max(1, min(cut.rows, sequences.intervals[b, 1]))
    return cut_by_rows(rows, cut.heads, arrays.q.shape[0] // arrays.k.shape[0], cut.splits, lanes)


@device
def split_size(keys, heads):
    """Keys of a task, of a sequence with so many from the first one that is attended to, or an array of such.

    By the key-value heads too, as each has tasks of its own, but not by the sequences.
    """
    many = keys * max(1, heads // 8)
    return SPLIT * (1 + (many >= LONG) + 2 * (many >= 2 * LONG))


@device
def splits_between(first, end, keys):
    """Splits of so many keys that the keys [first, end) are in, one at least."""
    return max(1, (end + keys - 1) // keys - first // keys)


@device
def memory_map(D, Dv, lanes, blocks, height):
    """For head sizes of whole vectors, as keys and values are read."""
    lane_vectors = (MOST_SPLIT + lanes) * lanes
    first = lane_vectors + (MOST_SPLIT + 1) * lanes
    queries = first + 14 * lanes
    steps = queries + blocks * height * D
    keys = steps + blocks * lanes
    values = keys + MOST_SPLIT * D
    return Memory(
        scores=0,
        bias=lane_vectors,
        zero=first,
        top=first + lanes,
        sums=first + 2 * lanes,
        moments=first + 3 * lanes,
        correction=first + 4 * lanes,
        low=first + 5 * lanes,
        high=first + 6 * lanes,
        kept=first + 7 * lanes,
        factors=first + 8 * lanes,
        others=first + 9 * lanes,
        step=first + 13 * lanes,
        queries=queries,
        steps=steps,
        keys=keys,
        values=values,
        size=values + MOST_SPLIT * Dv,
    )


@device
def state_size(blocks, height, Dv, lanes):
    """Elements that the states of blocks take, for a head size of whole vectors."""
    return blocks * (4 * lanes + height * Dv)


@device
def state_of(partial, i, height, Dv, lanes):
    """The state of block i of a task, of which `partial` is the memory."""
    start = state_size(i, height, padded(Dv, lanes), lanes)
    return State(
        lanes=start,
        reference=element(partial, start),
        total=element(partial, start + lanes),
        moment=element(partial, start + 2 * lanes),
        best=element(partial, start + 3 * lanes),
        o=element(partial, start + 4 * lanes),
    )


@device
def whole_lines(elements):
    """Up to whole cache lines, so that workers do not share one."""
    return (elements + 15) // 16 * 16


# From Python ----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def sizes_of(most_rows: int, most_heads: int, group: int, D: int, Dv: int, lanes: int, wide: int) -> tuple[int, int]:
    """Elements of a worker's memory, and of a task's state: enough for sequences of any rows up to the most."""
    D, Dv = padded.py_func(D, wide), padded.py_func(Dv, lanes)
    size = state = 0
    for count in range(1, most_rows + 1):
        _, heads, blocks, _ = cut_by_rows.py_func(count, most_heads, group, 0, lanes)
        height = power_of_two.py_func(heads * count)
        size = max(size, memory_map.py_func(D, Dv, lanes, blocks, height).size)
        state = max(state, state_size.py_func(blocks, height, Dv, lanes))
    return whole_lines.py_func(size), whole_lines.py_func(state)


def splits_of(sequences: Sequences, heads: int, rows: int, settings: Settings) -> int:
    """The largest number of splits of a sequence's keys that some row may attend to, one at least."""
    intervals, numbers = sequences.intervals, sequences.numbers
    if len(numbers) == 1:  # as arrays, it would take longer than a small problem
        offset, _, kv_length = intervals[numbers[0, 0]].tolist()
        end, first = min(kv_length, offset + rows + settings.right), max(0, offset - settings.left)
        return splits_between.py_func(first, end, split_size.py_func(kv_length - first, heads))
    offset, _, kv_length = intervals[numbers[:, 0]].T
    first = np.maximum(0, offset - settings.left)
    keys = split_size.py_func(kv_length - first, heads)
    end = np.minimum(kv_length, offset + rows + settings.right)
    return max(1, int((-(-end // keys) - first // keys).max()))
