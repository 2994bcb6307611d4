"""The random numbers of dropout: Philox 4x32-10, a function of where a probability stands and of nothing else.

So that the result depends neither on tiles nor on threads, and that a backward pass can draw the same numbers again:
key j of row i of head h of sequence b has word j % 4 of the block with counter (j // 4, i, h, b), keyed by the seed.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011).
"""

from __future__ import annotations

import numpy as np

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10


def philox(counter: np.ndarray, seed: int) -> np.ndarray:
    """Four random 32-bit words for each counter: (..., 4) uint32, from counters (..., 4) and a seed of 64 bits.

    >>> philox(np.zeros(4, np.uint32), 0).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    True
    """
    x = [np.asarray(counter)[..., n].astype(np.uint64) for n in range(4)]
    keys, low = [seed & 0xFFFFFFFF, seed >> 32], np.uint64(0xFFFFFFFF)
    for _ in range(ROUNDS):
        first, second = (np.uint64(m) * word for m, word in zip(MULTIPLIERS, x[::2], strict=True))
        shift = np.uint64(32)
        x = [
            (second >> shift) ^ x[1] ^ np.uint64(keys[0]),
            second & low,
            (first >> shift) ^ x[3] ^ np.uint64(keys[1]),
            first & low,
        ]
        keys = [(key + weyl) & 0xFFFFFFFF for key, weyl in zip(keys, WEYL, strict=True)]
    return np.stack(x, axis=-1).astype(np.uint32)


def threshold(p: float) -> int:
    """A probability is dropped if its random word is below this: one in 1 / p, to within 2**-32."""
    return round(p * 2.0**32)


def kept(b: int, h: int, shape: tuple[int, ...], p: float, seed: int) -> np.ndarray:
    """Bool of shape (Lq, Lk): which probabilities of one head dropout keeps."""
    Lq, Lk = shape
    groups = -(-Lk // 4)
    counter = np.empty((Lq, groups, 4), np.uint32)
    counter[..., 0], counter[..., 1] = np.arange(groups), np.arange(Lq)[:, None]
    counter[..., 2], counter[..., 3] = h, b
    return philox(counter, seed).reshape(Lq, 4 * groups)[:, :Lk] >= threshold(p)
