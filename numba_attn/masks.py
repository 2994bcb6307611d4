"""Masks that are an interval of keys for every query row: causal, window, offsets, lengths.

Whatever has that form is reduced to `KeyIntervals`, which kernels turn into loop bounds: keys outside are never
visited.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

UNBOUNDED = 1 << 62
"""A window side that reaches over every array."""
MOST_OFFSET = 1 << 40
"""The largest position of a query, in either direction: sums of positions and lengths do not overflow."""


@dataclass(frozen=True, slots=True)
class KeyIntervals:
    """Query row i of sequence b, which stands at p = i + offset[b], may attend to the keys of [low, high):

        low = max(0, p - left),   high = min(kv_length[b], p + right + 1),

    and to none if i >= query_length[b].
    """

    table: np.ndarray  # (B, 3) int64: offset, query_length, kv_length
    left: int
    right: int
    padded: bool = False  # whether a sequence may have fewer query rows than the arrays

    def bounds(self, b: int, Lq: int) -> tuple[np.ndarray, np.ndarray]:
        """Low and high of the rows 0 .. Lq - 1 of sequence b, as two (Lq,) arrays; low == high where there is no key.

        >>> KeyIntervals(np.array([[0, 3, 9]]), left=1, right=0).bounds(0, 4)
        (array([0, 0, 1, 3]), array([1, 2, 3, 3]))
        """
        offset, query_length, kv_length = (int(x) for x in self.table[b])
        row = np.arange(Lq)
        low = np.maximum(0, row + offset - self.left)
        high = np.minimum(kv_length, row + offset + self.right + 1)
        none = (row >= query_length) | (high <= low)
        return np.where(none, row, low), np.where(none, row, high)
