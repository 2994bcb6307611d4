"""Quantised caches whose channels have scales of their own."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from cases import SIXTEEN_BITS, dtype_of
from tolerances import assert_accurate, same_bits

from numba_attn import KVCache, PagedKVCache, attention_with_kv_cache, scaled_dot_product_attention
from numba_attn.storage import QUANTIZED

B, HQ, HKV, D, DV = 2, 6, 3, 64, 40
NUMBERS = pytest.mark.parametrize("numbers", QUANTIZED)
# Each is compiled for itself.
DTYPES = ["float32", *(pytest.param(name, marks=pytest.mark.slow) for name in SIXTEEN_BITS)]


def numbers_of(n: int, dtype: str = "float32") -> tuple[list[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Query, key and value, of which some channels are far larger than others, and scales that say so."""
    rng = np.random.default_rng(n)
    sizes = np.exp(rng.uniform(-1, 4, (HKV, D))), np.exp(rng.uniform(-3, 3, (HKV, DV)))
    query = rng.standard_normal((B, HQ, n, D)) * 0.1
    key, value = (rng.standard_normal((B, HKV, n, size.shape[1])) * size[:, None] for size in sizes)
    return [x.astype(dtype_of(dtype)) for x in (query, key, value)], sizes


def caches(numbers: str, n: int, dtype: str, scales: Any) -> list[Any]:
    options: dict[str, Any] = {"dtype": dtype_of(dtype), "quantize": numbers, "channel_scales": scales}
    paged = PagedKVCache(B * (n // 16 + 1), HKV, 16, D, DV, **options)
    return [KVCache(B, HKV, n, D, DV, **options), paged.batch([paged.add() for _ in range(B)])]


@NUMBERS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", ["both", "key", "value"])
def test_attention_is_that_of_the_rounded_numbers(numbers: str, dtype: str, given: str) -> None:
    (query, key, value), sizes = numbers_of(90, dtype)
    scales = tuple(x if given in (name, "both") else None for name, x in zip(("key", "value"), sizes, strict=True))
    whole, paged = caches(numbers, 90, dtype, scales)
    for rows in (90, 1):  # prefill, then the last token of it alone
        out = attention_with_kv_cache(
            query[:, :, -rows:], whole, *((key, value) if rows > 1 else ()), return_aux=("lse",), softcap=30.0
        )
        again = attention_with_kv_cache(
            query[:, :, -rows:], paged, *((key, value) if rows > 1 else ()), return_aux=("lse",), softcap=30.0
        )
        assert same_bits(out, again), "pages"
        assert out[0].dtype == dtype_of(dtype)
        options = {"is_causal": True, "enable_gqa": True, "query_offset": 90 - rows, "softcap": 30.0}
        if dtype == "float32":
            assert_accurate(*out, query[:, :, -rows:], *whole.used, **options)
        else:  # `used` is rounded to 16 bits, which what attention reads is not
            exact = scaled_dot_product_attention(
                *(x.astype(float) for x in (query[:, :, -rows:], *whole.used)), backend="reference", **options
            )
            limit = {"float16": 2e-3, "bfloat16": 2e-2}[dtype] * np.abs(exact).max()
            np.testing.assert_allclose(out[0].astype(float), exact, rtol=0, atol=limit)


@NUMBERS
def test_small_channels_beside_large_ones_keep_their_accuracy(numbers: str) -> None:
    (query, key, value), sizes = numbers_of(200)
    exact = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True, backend="reference")
    # Of an output, relative to the size of its channel: of N(0, 1), that is what it is without channels of other sizes.
    size = np.repeat(sizes[1], HQ // HKV, axis=0)[:, None]
    errors = [
        np.linalg.norm((attention_with_kv_cache(query, cache, key, value) - exact) / size)
        / np.linalg.norm(exact / size)
        for cache in (KVCache(B, HKV, 200, D, DV, quantize=numbers, channel_scales=scales) for scales in (sizes, None))
    ]
    assert errors[0] < errors[1] / 3, errors


def test_a_ring_which_prefill_attends_to_as_numbers() -> None:
    (query, key, value), sizes = numbers_of(30)
    options: dict[str, Any] = {"quantize": "int8", "channel_scales": sizes}
    ring, all_tokens = KVCache(B, HKV, None, D, DV, window=8, sinks=2, **options), KVCache(B, HKV, 30, D, DV, **options)
    all_tokens.append(key, value)
    got = [
        attention_with_kv_cache(*(x if x is ring else x[:, :, at : at + n] for x in (query, ring, key, value)))
        for at, n in ((0, 5), (5, 1), (6, 8), (14, 1), (15, 7), (22, 8))
    ]
    p, j = np.arange(30)[:, None], np.arange(30)
    seen = (j <= p) & ((j < 2) | (j > p - 8))
    assert_accurate(np.concatenate(got, axis=2), None, query, *all_tokens.used, attn_mask=seen, enable_gqa=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_out(dtype: str) -> None:
    (query, key, value), sizes = numbers_of(20, dtype)
    cache = KVCache(B, HKV, 20, D, DV, dtype=dtype_of(dtype), quantize="int8", channel_scales=sizes)
    expected = attention_with_kv_cache(query, cache, key, value)
    out = np.zeros((B, HQ, 20, 2 * DV), expected.dtype)[..., ::2]
    assert attention_with_kv_cache(query, cache, out=out) is out
    assert same_bits(out.copy(), expected)
    last, shape = query[:, :, -1:], (B, HQ, 1, DV)
    in_cache = cache.value.reshape(-1)[: out[:, :, :1].size * out.itemsize].view(out.dtype).reshape(shape)
    wrong: list[tuple[Any, str]] = [
        (np.empty((B, HQ, 1, DV + 1), out.dtype), "out must have shape"),
        (last[..., :DV], "out must not share memory with query"),
        (in_cache, "out must not share memory with cache"),
    ]
    for given, message in wrong:
        before = given.tobytes()
        with pytest.raises(ValueError, match=message):
            attention_with_kv_cache(last, cache, out=given)
        assert given.tobytes() == before


def test_scales_are_kept_and_cannot_be_changed() -> None:
    key, value = np.full((HKV, D), 2.0), np.full((HKV, DV), 3.0)
    cache = KVCache(B, HKV, 4, D, DV, quantize="int8", channel_scales=(key, value))
    paged = PagedKVCache(4, HKV, 4, D, DV, quantize="int4", channel_scales=(None, value))
    key[0] = 7
    assert cache.channel_scales[0].shape == (HKV, 1, D) and (cache.channel_scales[0] == 2).all()
    for one in (cache, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), copy.deepcopy(paged)):
        assert not one.channel_scales[1].flags.writeable
    assert paged.channel_scales[0] is None and paged.batch([]).channel_scales[1].shape == (HKV, 1, DV)
    assert KVCache(B, HKV, 4, D).channel_scales == (None, None)


@pytest.mark.parametrize(
    ("scales", "error", "message"),
    [
        (1.0, TypeError, "channel_scales must be a pair of arrays"),
        ((np.ones((HKV, D)),), TypeError, "channel_scales must be a pair of arrays"),
        ((np.ones((HKV, DV)), None), ValueError, rf"channel_scales must have shape \({HKV}, {D}\), got"),
        ((None, np.ones(DV)), ValueError, rf"channel_scales must have shape \({HKV}, {DV}\), got"),
        ((np.zeros((HKV, D)), None), ValueError, "channel_scales must be positive and finite"),
        ((np.full((HKV, D), np.nan), None), ValueError, "channel_scales must be positive and finite"),
        ((np.full((HKV, D), 1e300), None), ValueError, "channel_scales must be positive and finite"),
        ((np.ones((HKV, D), int), None), TypeError, "channel_scales must be float"),
    ],
)
def test_wrong(scales: Any, error: type[Exception], message: str) -> None:
    for make in (
        lambda: KVCache(B, HKV, 4, D, DV, quantize="int8", channel_scales=scales),
        lambda: PagedKVCache(4, HKV, 4, D, DV, quantize="int8", channel_scales=scales),
    ):
        with pytest.raises(error, match=message):
            make()


def test_only_of_a_quantised_cache() -> None:
    with pytest.raises(ValueError, match="channel_scales must be None of a cache that is not quantised"):
        KVCache(B, HKV, 4, D, channel_scales=(np.ones((HKV, D)), None))


def test_heads_that_do_not_divide() -> None:
    cache = KVCache(B, HKV, 4, D, DV, quantize="int8", channel_scales=(np.ones((HKV, D)), None))
    with pytest.raises(ValueError, match="query heads must be a multiple of key-value heads, got 4 and 3"):
        attention_with_kv_cache(np.ones((B, 4, 1, D), np.float32), cache)
