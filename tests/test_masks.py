"""Key intervals against the definition, one pair at a time."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from numba_attn.masks import UNBOUNDED, KeyIntervals

SIDES = st.one_of(st.integers(0, 9), st.just(UNBOUNDED))


@given(st.integers(-12, 12), st.integers(0, 8), st.integers(0, 9), SIDES, SIDES)
def test_bounds(offset: int, query_length: int, kv_length: int, left: int, right: int) -> None:
    low, high = KeyIntervals(np.array([[offset, query_length, kv_length]]), left, right).bounds(0, 8)
    for i in range(8):
        p = i + offset
        keys = [j for j in range(kv_length) if i < query_length and p - left <= j <= p + right]
        assert list(range(low[i], high[i])) == keys
