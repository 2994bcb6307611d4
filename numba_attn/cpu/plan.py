"""Tile sizes and the list of tasks: data and arithmetic, from shapes and the instruction set alone.

Nothing here looks at the number of threads, and no bit of a result depends on what is chosen here but `keys`, so that
results are the same on any number of threads and for a sequence alone or in any batch.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from numba_attn.cpu import target

# The register tiles of each instruction set: for every number of query vectors side by side, the numbers of rows to
# take at once, largest first.  Rows x vectors accumulators, the vectors and one broadcast must fit the registers.
REGISTER_TILES: dict[str, dict[int, tuple[int, ...]]] = {
    "avx512": {1: (16, 4, 1), 2: (12, 4, 1)},
    "avx2": {1: (8, 1), 2: (6, 1), 3: (4, 1)},
    "neon": {1: (16, 4, 1), 2: (8, 1), 3: (8, 1)},
    "generic": {1: (8, 1), 2: (4, 1)},
}
HEIGHTS = REGISTER_TILES[target.ISA]
WIDEST = max(HEIGHTS)


class Plan(NamedTuple):
    """How one call is cut up."""

    keys: int  # of a key tile
    block: int  # query rows of a row block: as many lanes as the widest register tile
    blocks: int  # row blocks of a task, which share each key tile while it is in cache
    tasks: int  # tasks of one head


@functools.lru_cache(maxsize=256)
def plan(heads: int, Lq: int, Lk: int, D: int, Dv: int, itemsize: int) -> Plan:
    """Cut `heads` (B x Hq) problems of Lq x Lk into tasks.

    The score tile (keys x block) stays in the first-level cache, a key tile of K and V and the state of a task's row
    blocks in the second.  There are some 64 tasks or more wherever the problem allows it: cores finish together then.
    """
    block = WIDEST * target.VECTOR_BYTES // itemsize
    keys = _within(16 * 1024 // (block * itemsize), 48, 192) // 48 * 48
    while keys > 48 and keys * (D + Dv) * itemsize > 192 * 1024:
        keys -= 48
    rows = -(-Lq // block)
    fits = 96 * 1024 // (block * (D + Dv) * itemsize + 1)
    blocks = _within(heads * rows // 64, 1, _within(fits, 1, 8))
    return Plan(keys, block, blocks, -(-rows // blocks))


def _within(value: int, low: int, high: int) -> int:
    return max(low, min(value, high))
