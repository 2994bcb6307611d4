"""Tile sizes and the list of tasks: data and arithmetic.

Bits of a result depend on the keys of a tile alone, which follow from head and element sizes and the sequence's own
number of keys: so they are the same for a sequence alone or in any batch, and on any number of threads, although that
decides how large a task is.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from numba_attn.cpu import target

# The register tiles of each instruction set: for every number of query vectors side by side, the numbers of rows to
# take at once, largest first.  Rows x vectors accumulators, the vectors and one broadcast must fit the registers.
REGISTER_TILES: dict[str, dict[int, tuple[int, ...]]] = {
    "avx512": {1: (8, 4, 1), 2: (12, 4, 1), 3: (8, 4, 1)},
    "avx2": {1: (8, 4, 1), 2: (6, 2, 1), 3: (4, 1)},
    "neon": {1: (8, 4, 1), 2: (8, 2, 1), 3: (8, 2, 1)},
    "generic": {1: (8, 1), 2: (4, 1)},
}
HEIGHTS = REGISTER_TILES[target.ISA]
WIDEST = max(HEIGHTS)
MOST_BLOCKS = 16
# Bytes of a score tile, which is read row by row: with AVX-512 longer products are worth a little of the second cache.
SCORES = 1024 * (36 if target.ISA == "avx512" else 16)
# Bytes of the second-level cache for a key tile, and for the states of a task's row blocks: processors with AVX-512
# have a megabyte or more of it, AMD's others half of one, and some a quarter.
CACHE = 1024 * (320 if target.ISA == "avx512" else 160)
STATES = 1024 * (320 if target.ISA == "avx512" else 300 if target.NAME.startswith("znver") else 160)
# Keys of a sequence that is one tile, at most, and bytes of its values, beside which probabilities stay in the
# first-level cache, for results that are made at once.
SHORT, VALUES = 128, 32 * 1024

# Multiply-adds of a task, at most, if one row block has no more: 0.2 s with AVX-512, so that a call can be interrupted.
MOST_OPERATIONS = 10**10
# Keys are split where a sequence has so few row blocks that a large machine would be idle: into so many tasks of a
# sequence at most, of so many keys at least.
MOST_TASKS, LEAST_KEYS = 64, 2048


class Plan(NamedTuple):
    """How one call is cut up."""

    keys: int  # of a key tile
    short: int  # keys of a sequence that is one tile
    block: int  # query rows of a row block: as many lanes as the widest register tile
    blocks: int  # row blocks of a task, and of each of its heads, which share each key tile while it is in cache
    tasks: int  # tasks of one head
    heads: int  # query heads of a task, that share a key-value head; fewer in the last one of a group
    split: int  # keys of a task, at least, where those of a sequence are split: not fewer than `short`
    across: int = 1  # heads of a task that are in one row block

    @property
    def states(self) -> int:
        """Row blocks of a task, of all its heads."""
        return -(-self.heads // self.across) * self.blocks


@functools.lru_cache(maxsize=256)
def plan(
    heads: int,
    Lq: int,
    Lk: int,
    D: int,
    Dv: int,
    itemsize: int,
    workers: int,
    mean_rows: int | None = None,
    Hkv: int = 1 << 30,
    group: int = 1,
    alike: bool = False,
) -> Plan:
    """Cut `heads` (B x Hq) problems with Lq query rows, or `mean_rows` on the average, and Lk keys into tasks.

    The score tile (keys x block) is about as large as the first-level cache, a key tile of K and V and the state of a
    task's row blocks stay in the second: the larger a task, the less often keys are fetched from beyond.  But there are
    eight tasks or more for each worker wherever the problem allows it, so that all finish together; or four, of the
    rows of all heads of a `group` that share each of Hkv key-value heads.  Where these are `alike`, rows of a few heads
    are in one row block.
    """
    block = WIDEST * target.VECTOR_BYTES // itemsize
    keys, short = tile_keys(block, D, Dv, itemsize), short_keys(Dv, itemsize)
    rows = -(-Lq // block)
    of_split = split_keys(Hkv, Lq, Lk, block, keys, LEAST_KEYS)
    heads *= splits_of(Lk, of_split)  # each of them as a head of its own
    fit = min(
        STATES // (block * (D + Dv + 2) * itemsize), MOST_OPERATIONS // (block * max(min(Lk, of_split) * (D + Dv), 1))
    )
    mean_rows = Lq if mean_rows is None else mean_rows
    most = _within(fit, 1, MOST_BLOCKS)
    blocks = _within(heads * -(-mean_rows // block) // (8 * workers), 1, most)
    # One task less, of somewhat more row blocks, rather than a last one of few; and none much shorter than the others.
    tasks = -(-rows // blocks)
    longer = -(-rows // max(tasks - 1, 1))
    if longer <= most and heads * -(-rows // max(longer, 1)) >= 8 * workers:
        tasks -= 1
    blocks = max(1, -(-rows // max(tasks, 1)))
    tasks, together, across = -(-rows // blocks), 1, 1
    if tasks == 1 and Lk > short:
        fit_in_block = heads_in_block(Lq, block) if alike else 1
        most_heads = max(1, min(most // blocks * fit_in_block, heads // (4 * workers)))
        together = evenly(group, most_heads)
        across = evenly(together, fit_in_block)
    return Plan(keys, short, block, blocks, tasks, together, LEAST_KEYS, across)


def heads_in_block(rows: int, block: int) -> int:
    """Of how many heads all rows fit in a row block, one at least; compiled too."""
    return max(1, block // max(1, rows))


def evenly(count: int, most: int) -> int:
    """The largest of the parts of a count that are as few as can be, and as even, with `most` at most; compiled too."""
    parts = (count + most - 1) // most
    return (count + parts - 1) // parts


def split_keys(Hkv: int, rows: int, kv_length: int, block: int, keys: int, least: int) -> int:
    """Keys of a task, whole tiles of so many, of a sequence with so many query rows; compiled too.

    By what the sequence has for itself, so that it comes to the same bits in any batch and on any number of threads.
    """
    tasks = Hkv * max(1, (rows + block - 1) // block)
    splits = max(1, min(MOST_TASKS // tasks, kv_length // least))
    return max(1, (kv_length + splits * keys - 1) // (splits * keys)) * keys


def splits_of(kv_length: int, of_split: int) -> int:
    """Into how many tasks that are so many keys each; compiled too."""
    return max(1, (kv_length + of_split - 1) // of_split)


def tile_keys(block: int, D: int, Dv: int, itemsize: int) -> int:
    """Keys of a key tile; compiled too, for calls from compiled code."""
    keys = min(SCORES // (block * itemsize), 192) // 48 * 48
    while keys > 48 and keys * (D + Dv) * itemsize > CACHE:
        keys -= 48
    return keys


def short_keys(Dv, itemsize):
    """Keys of the longest sequence that is one tile, whatever a tile has: all of its values stay in cache."""
    return min(SHORT, VALUES // (max(Dv, 1) * itemsize))


def _within(value: int, low: int, high: int) -> int:
    return max(low, min(value, high))
