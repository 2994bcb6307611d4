"""Masks that know which tiles of the scores they leave empty, and which full."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

# What a mask leaves of a tile of scores.
EMPTY, PARTIAL, FULL = 0, 1, 2


@dataclass(frozen=True, eq=False)
class BlockMask:
    """A mask given by a function, with what it leaves of every tile: empty tiles are skipped, full ones not masked."""

    mask_mod: Callable[..., Any]
    """(b, h, i, j) -> whether query row i of head h of sequence b may attend to key j."""
    shape: tuple[int, int, int, int]
    """(B, Hq, Lq, Lk); B and Hq may be 1 for a mask that is the same for all of them."""
    block_size: tuple[int, int]
    """Query rows and keys of a tile."""
    states: np.ndarray
    """(B, Hq, query tiles, key tiles) uint8: EMPTY, PARTIAL or FULL."""
