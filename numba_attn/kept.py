"""Small arrays that are made once: that takes longer than a small problem, where keeping large ones takes memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

MOST = 64  # of each function
LARGEST = 1 << 16  # bytes


def kept(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """A function of what can be a key, whose small arrays, made read-only, are the same ones again for equal arguments.

    >>> @kept
    ... def first(n):
    ...     return np.arange(n)
    >>> first(3) is first(3), first(100_000) is first(100_000)
    (True, False)
    """
    arrays: dict[Any, np.ndarray] = {}

    @functools.wraps(function)
    def call(*key: Any) -> np.ndarray:
        found = arrays.get(key)
        if found is None:
            found = function(*key)
            found.flags.writeable = False
            if found.nbytes <= LARGEST:
                if len(arrays) >= MOST:
                    arrays.clear()
                arrays[key] = found
        return found

    return call
