"""The random numbers of dropout, see `numba_attn.random`."""

from __future__ import annotations

from typing import Any

import numpy as np

from numba_attn import random
from numba_attn.cuda.elements import device


def make_kept(cuda: Any) -> Any:
    """A device function (group, i, h, b, seed, threshold) -> which of keys 4 * group to 4 * group + 3 are kept.

    Bit n of the result is that of key 4 * group + n.
    """
    first_multiplier, second_multiplier = (np.uint64(m) for m in random.MULTIPLIERS)
    first_weyl, second_weyl = (np.uint64(w) for w in random.WEYL)
    low, shift, rounds = np.uint64(0xFFFFFFFF), np.uint64(32), random.ROUNDS

    @device(cuda)
    def kept(group, i, h, b, seed, threshold):
        x0, x1, x2, x3 = np.uint64(group) & low, np.uint64(i) & low, np.uint64(h) & low, np.uint64(b) & low
        first_key, second_key = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32 & 0xFFFFFFFF)
        for _ in range(rounds):
            first, second = first_multiplier * x0, second_multiplier * x2
            x0, x1 = second >> shift ^ x1 ^ first_key, second & low
            x2, x3 = first >> shift ^ x3 ^ second_key, first & low
            first_key, second_key = first_key + first_weyl & low, second_key + second_weyl & low
        bits = 1 if np.int64(x0) >= threshold else 0
        bits |= 2 if np.int64(x1) >= threshold else 0
        bits |= 4 if np.int64(x2) >= threshold else 0
        bits |= 8 if np.int64(x3) >= threshold else 0
        return bits

    return kept
