"""What the kernels of this package take: names for the columns of the table and for the numbers of a call.

Arrays are flat: their elements are found by offsets and strides in elements, so that one source serves arrays on a
device, wherever they lie, and NumPy's in the simulator.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Of the table, int64 of (B, COLUMNS): where each array starts for a sequence, and where its rows stand on its keys.
QUERY, KEY, VALUE, MASK, OUT, LSE, MAX_SCORE, ENTROPY, KEY_WEIGHT, OFFSET, QUERY_LENGTH, KV_LENGTH, COLUMNS = range(13)


class Numbers(NamedTuple):
    """Integers of a call; strides are in elements, 0 along axes of length 1 of a mask."""

    row_blocks: int  # of a head
    key_blocks: int
    column_blocks: int
    Hq: int
    group: int  # query heads that share a key-value head
    D: int
    Dv: int
    Lq: int  # rows to write of every sequence, valid or not; of packed sequences, their own instead
    Lk: int
    packed: int
    left: int
    right: int
    query_head: int
    query_row: int
    query_column: int
    key_head: int
    key_row: int
    key_column: int
    value_head: int
    value_row: int
    value_column: int
    mask_head: int
    mask_row: int
    mask_key: int
    out_head: int
    out_row: int
    out_column: int
    lse_head: int
    lse_row: int
    max_score_head: int
    max_score_row: int
    entropy_head: int
    entropy_row: int
    key_weight_head: int
    key_weight_key: int
    wants_lse: int
    wants_max_score: int
    wants_entropy: int
    wants_norms: int
    has_slopes: int
    slopes_sequence: int
    has_sinks: int
    states_sequence: int
    states_head: int
    states_row: int
    tile_rows: int
    tile_keys: int
    page_rows: int  # 0 if keys and values are not in pages
    page_count: int  # of a sequence
    key_page: int
    value_page: int
    seed: int
    threshold: int


class Reals(NamedTuple):
    """Other numbers of a call."""

    scale: float
    softcap: float  # 0 for none
    gain: float  # of probabilities that dropout keeps


class Tile(NamedTuple):
    """How a thread block is cut up: what one thread does, times how many threads side by side.

    A thread has `rows` x `keys` scores and `rows` x `columns` of the output in registers.
    """

    rows: int
    keys: int
    columns: int
    threads_down: int
    threads_across: int
    depth: int  # head elements, or rows of values, in shared memory at a time: a divisor of the keys of a block

    @property
    def block_rows(self) -> int:
        return self.rows * self.threads_down

    @property
    def block_keys(self) -> int:
        return self.keys * self.threads_across

    @property
    def block_columns(self) -> int:
        return self.columns * self.threads_across

    @property
    def threads(self) -> int:
        return self.threads_down * self.threads_across


REALS: dict[str, type[np.floating]] = {
    "float32": np.float32, "float64": np.float64, "float16": np.float32, "bfloat16": np.float32,
}  # fmt: skip
"""Kind of element -> what it is computed with."""

STORED: dict[str, type[np.generic]] = {
    "float32": np.float32, "float64": np.float64, "float16": np.uint16, "bfloat16": np.uint16, "bool": np.uint8,
    "uint8": np.uint8,
}  # fmt: skip
"""Kind of element -> the type that kernels take it as: 16-bit numbers as their bits, quantised ones as bytes."""
