"""Functions as users write them, and block masks made of such functions by looking at every element."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from numba_attn.block_mask import EMPTY, FULL, PARTIAL, BlockMask

BIAS = np.random.default_rng(8).standard_normal((8, 32)).astype(np.float32)


# (score, b, h, i, j) -> score


def nearer_is_more(score: Any, b: int, h: int, i: int, j: int) -> Any:
    return score - 0.0625 * abs(i - j)


def by_place(score: Any, b: int, h: int, i: int, j: int) -> Any:
    """Uses every argument, the score not linearly."""
    return score * (1.0 + 0.25 * h) + 0.03125 * score * score - 0.5 * b + 0.125 * ((3 * i + j) % 7)


def biased(table: np.ndarray) -> Callable[..., Any]:
    """A function that reads an array of its surroundings: a bias for each head and distance."""
    heads, distances = table.shape

    def mod(score: Any, b: int, h: int, i: int, j: int) -> Any:
        return score + table[h % heads, (i - j) % distances]

    return mod


relative_bias = biased(BIAS)


def unit_slope(score: Any, b: int, h: int, i: int, j: int) -> Any:
    return 1.0


def by_place_slope(score: Any, b: int, h: int, i: int, j: int) -> Any:
    return 1.0 + 0.25 * h + 0.0625 * score


# Of each function, its derivative with respect to the score.
SLOPES = {nearer_is_more: unit_slope, by_place: by_place_slope, relative_bias: unit_slope}


# (b, h, i, j) -> may attend


def not_later(b: int, h: int, i: int, j: int) -> bool:
    return i >= j


def prefix(b: int, h: int, i: int, j: int) -> bool:
    """The same for all sequences and heads; whole rows and columns of small tiles are full, others empty."""
    return j < 11 or (j <= i + 2 and j + 20 >= i)


def scattered(b: int, h: int, i: int, j: int) -> bool:
    """Differs between sequences and heads; every eighth row has no key, and few keys are used by no row."""
    return (i + h) % 8 != 0 and (5 * i + 3 * j + b + 2 * h) % 4 < 2


def of_head(b: int, h: int, i: int, j: int) -> bool:
    return j <= i + 8 * h


def of_sequence(b: int, h: int, i: int, j: int) -> bool:
    return (i // 10 + j // 12 + b) % 2 == 0


def documents(queries: np.ndarray, keys: np.ndarray) -> Callable[..., Any]:
    """Several documents in one sequence: attend within one's own, whose number is in an array of the surroundings."""

    def mod(b: int, h: int, i: int, j: int) -> Any:
        return queries[i] == keys[j]

    return mod


def blocky(mask_mod: Callable[..., Any], shape: tuple[int, int, int, int], block_size: tuple[int, int]) -> BlockMask:
    """The block mask of a function, for (B, Hq, Lq, Lk), by looking at every element."""
    allowed = everywhere(mask_mod, shape)
    tiles = [-(-n // size) for n, size in zip(shape[2:], block_size, strict=True)]
    states = np.empty((*shape[:2], *tiles), np.uint8)
    for b, h, m, n in np.ndindex(states.shape):
        tile = allowed[b, h, m * block_size[0] :, n * block_size[1] :][: block_size[0], : block_size[1]]
        states[b, h, m, n] = FULL if tile.all() else PARTIAL if tile.any() else EMPTY
    return BlockMask(mask_mod, shape, block_size, states)


@functools.lru_cache(maxsize=256)
def everywhere(mask_mod: Callable[..., Any], shape: tuple[int, ...]) -> np.ndarray:
    """The function at every (b, h, i, j), as a bool array of this shape, read-only: many a test asks for the same."""
    allowed = np.empty(shape, bool)
    for place in np.ndindex(shape):
        allowed[place] = mask_mod(*place)
    allowed.flags.writeable = False
    return allowed
