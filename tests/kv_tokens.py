"""Tokens for the tests of key-value caches, and what a cache should hold of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from numba_attn import KVCache, attention_with_kv_cache

B, HQ, HKV, D, DV = 3, 4, 2, 8, 6


def numbers(seed: int, n: int, dtype: Any = np.float32, batch: int = B) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Query, key and value of n tokens."""
    rng = np.random.default_rng(seed)
    shapes = (batch, HQ, n, D), (batch, HKV, n, D), (batch, HKV, n, DV)
    query, key, value = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    return query, key, value


def new(capacity: int | None = 32, **options: Any) -> KVCache:
    return KVCache(B, HKV, capacity, D, DV, **options)


def in_pieces(cache: KVCache, arrays: tuple[np.ndarray, ...], sizes: list[int], **options: Any) -> np.ndarray:
    """Attention over a cache that gets so many tokens at a time."""
    ends = np.cumsum(sizes)
    pieces = [[x[:, :, end - n : end] for x in arrays] for n, end in zip(sizes, ends, strict=True)]
    return np.concatenate([attention_with_kv_cache(q, cache, k, v, **options) for q, k, v in pieces], axis=2)


def state(cache: KVCache) -> tuple[bytes, ...]:
    return tuple(x.tobytes() for x in (cache.key, cache.value, cache.lengths, cache.totals))


def held(cache: KVCache, b: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a sequence in order of position: (Hkv, length, D) and (Hkv, length, Dv)."""
    positions = cache.positions[b]
    places = [j for j in np.argsort(positions, kind="stable") if positions[j] >= 0]
    assert places == sorted(range(cache.lengths[b]), key=lambda j: positions[j])
    return cache.key[b][:, places], cache.value[b][:, places]


def streaming(n: int, total: int, window: int, sinks: int) -> np.ndarray:
    """(n, total) bool: the last n rows see the first `sinks` keys, and of the others the last `window`."""
    p, j = np.arange(total - n, total)[:, None], np.arange(total)
    return (j <= p) & ((j < sinks) | (j > p - window))
