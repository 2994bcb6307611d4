"""Caches of integers and caches of pages: what attention makes of them."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from cases import SIXTEEN_BITS, dtype_of
from hypothesis import given, settings
from tolerances import assert_accurate, same_bits

from numba_attn import KVCache, PagedKVCache, attention_with_kv_cache, scaled_dot_product_attention
from numba_attn.cpu import quantization
from numba_attn.problem import AUX_NAMES
from numba_attn.storage import BLOCKS, LARGEST, QUANTIZED, TOGETHER, dequantize, quantize, row_bytes

NUMBERS = pytest.mark.parametrize("numbers", QUANTIZED)
FAST = "int8", "bfloat16"
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": (50, 0)},
    "cap, slopes, sinks": {"softcap": 3.0, "alibi_slopes": np.linspace(0, 0.2, 4), "sinks": np.linspace(-1, 1, 4)},
    "functions": {"mask_mod": lambda b, h, i, j: (h + i + j) % 3 != 0, "score_mod": lambda s, b, h, i, j: s - 0.01 * j},
    "not causal, dropout": {"is_causal": False, "dropout_p": 0.2, "dropout_seed": 3},
}


def tokens(n: int, dtype: str = "float32", B: int = 3, Hkv: int = 2, D: int = 64, Dv: int = 33) -> list[np.ndarray]:
    rng = np.random.default_rng(n)
    return [rng.standard_normal((B, Hkv, n, size)).astype(dtype_of(dtype)) for size in (D, Dv)]


def query(n: int, dtype: str = "float32", B: int = 3, Hq: int = 4, D: int = 64) -> np.ndarray:
    return np.random.default_rng(7).standard_normal((B, Hq, n, D)).astype(dtype_of(dtype))


# Rows -----------------------------------------------------------------------------------------------------------------


@NUMBERS
@given(
    D=st.integers(0, 100),
    rows=st.integers(0, 5),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]),
    seed=st.integers(0, 99),
)
def test_rows_are_near(numbers: str, D: int, rows: int, scale: float, seed: int) -> None:
    x = (np.random.default_rng(seed).standard_normal((2, rows, D)) * scale).astype(np.float32)
    held = quantize(x, numbers)
    assert held.dtype == np.uint8 and held.shape == (2, rows, row_bytes(numbers, D))
    again = dequantize(held, numbers, D)
    assert again.dtype == np.float32 and again.shape == x.shape
    if numbers == "int8":
        allowed = np.abs(x).max(axis=-1, keepdims=True, initial=0) * (0.5 / 127 + 1e-6)
        assert (np.abs(again - x) <= allowed).all()
        return
    scale = held[..., -4:].copy().view(np.float32).astype(float)
    for first in range(0, D, TOGETHER):
        for block in range(BLOCKS):
            of_block = np.s_[..., first + block : min(D, first + TOGETHER) : BLOCKS]
            error = again[of_block].astype(float) - x[of_block]
            # With k = 3, steps are 1/15 of the largest each way from 0, and c is a whole number of scales.
            worst = np.abs(x[of_block]).max(axis=-1, initial=0) / 15 + 7.5 * scale[..., 0]
            assert (np.square(error).sum(axis=-1) <= error.shape[-1] * np.square(worst * (1 + 1e-6))).all()


@NUMBERS
@settings(max_examples=60)
@given(
    dtype=st.sampled_from(["float32", *SIXTEEN_BITS]),
    shape=st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(0, 70), st.integers(0, 200)),
    size=st.sampled_from([0.0, 1e-44, 1e-38, 1e-30, 1.0, 1e30, 3e38]),
    channels=st.booleans(),
    bad=st.sampled_from([1.0, -0.0, np.nan, np.inf]),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_kernel_rounds_as_numpy_does(
    numbers: str,
    dtype: str,
    shape: tuple[int, ...],
    size: float,
    channels: bool,
    bad: float,
    transposed: bool,
    seed: int,
) -> None:
    """Bit for bit, whatever the numbers, their type and where they lie."""
    rng = np.random.default_rng(seed)
    B, H, L, D = shape
    with np.errstate(over="ignore"):
        x = (np.clip(rng.standard_normal((B, L, H, D) if transposed else shape), -1, 1) * size).astype(dtype_of(dtype))
    x = x.swapaxes(1, 2) if transposed else x
    x[rng.random(x.shape) < 0.01] = bad
    scales = rng.uniform(0.1, 10, (H, 1, D)).astype(np.float32) if channels else None
    with np.errstate(all="ignore"):
        wide = x.astype(np.float32)
        expected = quantize(wide if scales is None else wide / scales, numbers)
    assert same_bits(quantization.run(x, numbers, scales), expected)


@NUMBERS
def test_many_rows_at_once(numbers: str) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, 300, 100)).astype(np.float32)
    assert x.size > quantization.SERIAL_SIZE
    assert same_bits(quantization.run(x, numbers, None), quantize(x, numbers))


@NUMBERS
def test_bits_of_rows(numbers: str) -> None:
    """The layout is what kernels and files rely on."""
    x = np.zeros((1, 40), np.float32)
    if numbers == "int8":
        x[0, [0, 16, 39]] = [-127.0, 5.0, 3.0]
        row = quantize(x, numbers)[0]
        assert row[:64].view(np.int8)[[0, 16, 39]].tolist() == [-127, 5, 3] and not row[40:64].any()
        assert row[64:].view(np.float32).tolist() == [1.0]
        return
    x[0, 0:40:8] = [31 * 15, 31, -31 * 15, -31, 31 * 3]  # k = 3, c = 31
    x[0, 39] = 14  # k = 2, c = 1
    row = quantize(x, numbers)[0]
    np.testing.assert_allclose(row[40:].view(np.float32), 1, rtol=1e-6)
    assert row[32:40].tolist() == [31 << 3 | 3, *[1 << 3 | 0] * 6, 1 << 3 | 2]
    assert row[0] == 15 | 0 << 4, "elements 0 and 16"
    assert row[8] == 8 | 7 << 4, "elements 8 and 24"
    assert row[16] & 15 == 9, "element 32"
    assert row[16 + 7] & 15 == 15, "element 39"
    np.testing.assert_allclose(dequantize(row[None], numbers, 40), x, rtol=1e-6)


@pytest.mark.parametrize("D", [1, 7, 9, 16, 20, 40, 63, 96, 100])
def test_rows_that_are_filled_up(D: int) -> None:
    """What is filled in makes nothing less exact: blocks of equal elements are as they were."""
    x = np.ones((2, D), np.float32)
    x[0, D // 2 :] = -3
    x[0, : D // TOGETHER * TOGETHER] = 1
    got = dequantize(quantize(x, "int4"), "int4", D)
    np.testing.assert_allclose(got[1], 1, rtol=1e-6)
    # A block of -3 and 1: one of both is exact, and the other within half a step of 1/15 of what is between.
    assert np.abs(got[0] - x[0]).max() < 0.15


@NUMBERS
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row(numbers: str, bad: float) -> None:
    x = np.ones((3, 64), np.float32)
    x[1, 35] = bad
    again = dequantize(quantize(x, numbers), numbers, 64)
    assert np.isnan(again[1]).all() and np.allclose(again[[0, 2]], 1, rtol=1e-6)


# Attention ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "dtype"),
    [  # each is compiled for itself
        pytest.param(numbers, dtype, marks=() if (dtype == "float32" or (numbers, dtype) == FAST) else pytest.mark.slow)
        for numbers in QUANTIZED
        for dtype in ("float32", *SIXTEEN_BITS)
    ],
)
@pytest.mark.parametrize("n", [1, 3, 40])
def test_attention_is_that_of_the_rounded_numbers(numbers: str, dtype: str, n: int) -> None:
    """To the accuracy of float32, by either kernel; what is not in use does not matter."""
    for D, Dv in ((64, 33), (20, 64)):
        key, value = tokens(150, dtype, D=D, Dv=Dv)
        cache = KVCache(3, 2, 160, D, Dv, dtype=dtype_of(dtype), quantize=numbers)
        cache.key[...] = cache.value[...] = 255
        cache.append(key, value, counts=[150, 60, 0])
        rounded = [dequantize(x, numbers, size)[:, :, :150] for x, size in ((cache.key, D), (cache.value, Dv))]
        for x in rounded:
            x[2], x[1, :, 60:] = 0, 0  # NaN, where nothing is held
        q = query(n, dtype, D=D)
        for name, options in OPTIONS.items():
            out, aux = attention_with_kv_cache(q, cache, return_aux=AUX_NAMES, **options)
            given = {"is_causal": True, **options, "enable_gqa": True, "kv_lengths": [150, 60, 0]}
            given["query_offset"] = [150 - n, 60 - n, -n]
            if dtype == "float32":
                assert_accurate(out, aux, q, *rounded, **given)
            wide = [x.astype(np.float64) for x in (q, *rounded)]
            exact = scaled_dot_product_attention(*wide, backend="reference", **given)
            limit = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}[dtype]
            np.testing.assert_allclose(out.astype(float), exact, rtol=0, atol=limit, err_msg=name)


@pytest.mark.parametrize(
    ("numbers", "dtype"),
    [
        ("int8", "float16"),
        ("int8", "float32"),
        ("int4", "float16"),
        pytest.param("int4", "float32", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("rows", "heads"), [(1, 2), (1, 4), (1, 12), (3, 4), (8, 8)])
def test_rounding_for_integer_products(numbers: str, dtype: str, rows: int, heads: int) -> None:
    """Queries, and weights times the scales of values, are off by half a step: of those, the largest has 32767, or as
    many as sums have room for.
    """
    options = {"precision": "bfloat16"} if dtype == "float32" else {}
    for D, Dv, n in ((64, 33, 150), (128, 128, 700), (20, 64, 77), (1, 1, 13)):
        key, value = tokens(n, dtype, B=2, D=D, Dv=Dv)
        key[:, :, n // 2] *= 30  # so that some rows are of one key, and most weights next to nothing
        cache = KVCache(2, 2, n, D, Dv, dtype=dtype_of(dtype), quantize=numbers)
        cache.append(key, value, counts=[n, n // 3 + rows])
        steps, weight_steps = (min(32767, 2**31 // LARGEST[numbers] // count) for count in (D + 33, 512))
        q = query(rows, dtype, B=2, Hq=heads, D=D)
        q[:, :, :, 0] *= 20
        q[0, 0] = 0
        k, v = (dequantize(x, numbers, size).astype(np.float64) for x, size in ((cache.key, D), (cache.value, Dv)))
        for x in (k, v):
            x[1, :, cache.lengths[1] :] = 0
        given: dict[str, Any] = {"enable_gqa": True, "is_causal": True, "kv_lengths": cache.lengths}
        given |= {"query_offset": cache.lengths - rows, "return_aux": ("lse",), "backend": "reference"}
        exact, exact_aux = scaled_dot_product_attention(q.astype(np.float64), k, v, **given)
        out, aux = attention_with_kv_cache(q, cache, return_aux=("lse",), **options)
        score = float(np.abs(q).max()) / (2 * steps) * np.abs(k).sum(axis=-1).max() / np.sqrt(D)
        assert (np.abs(aux.lse - exact_aux.lse) <= score + 1e-5 * np.maximum(1, np.abs(exact_aux.lse))).all()
        # Half a step of 256 keys: of a whole tile, some are rounded up and some down.
        weights = 2 * score + 256 / (2 * weight_steps)
        rounding = np.finfo(np.float16).eps if dtype == "float16" else 1e-6
        assert (np.abs(out - exact) <= np.abs(v).max() * weights + rounding * np.abs(exact)).all()


@NUMBERS
def test_integer_products_do_not_overflow(numbers: str) -> None:
    D = 20000
    cache = KVCache(1, 1, 600, D, 16, dtype=np.float16, quantize=numbers)
    cache.append(np.ones((1, 1, 600, D), np.float16), np.ones((1, 1, 600, 16), np.float16))
    q = np.ones((1, 1, 1, D), np.float16)
    out, aux = attention_with_kv_cache(q, cache, return_aux=("max_score",), scale=1.0)
    np.testing.assert_allclose(aux.max_score, D, rtol=1e-6)
    np.testing.assert_allclose(out.astype(float), 1, rtol=1e-3)


@pytest.mark.parametrize("numbers", ["int8", pytest.param("int4", marks=pytest.mark.slow)])
def test_tiny_and_huge_numbers_as_integers(numbers: str) -> None:
    """Steps as small as numbers are, and weights that are next to nothing, are not divided by 0."""
    for size in (1e-30, 1e-12, 1e12, 1e30):
        key, value = tokens(40, B=1, D=32, Dv=32)
        cache = KVCache(1, 2, 40, 32, quantize=numbers)
        cache.append(key, value * np.float32(size))
        q = query(1, B=1, D=32)
        out, exact = (
            attention_with_kv_cache(q, cache, precision=precision, score_mod=lambda s, b, h, i, j: s - 60.0 * j)
            for precision in ("bfloat16", None)
        )
        assert np.isfinite(out).all()
        np.testing.assert_allclose(out, exact, rtol=0, atol=np.abs(exact).max() * 1e-3)
    key, value = tokens(40, B=1, D=32, Dv=32)
    cache = KVCache(1, 2, 40, 32, quantize=numbers)
    cache.append(key * np.float32(1e35), value)
    q = query(1, B=1, D=32) * np.float32(1e-35)
    results = [attention_with_kv_cache(q, cache, precision=precision) for precision in ("bfloat16", None)]
    np.testing.assert_allclose(*results, rtol=0, atol=0.01)


@pytest.mark.parametrize("numbers", [None, *QUANTIZED])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_no_value_is_lost(numbers: str | None, dtype: str, rows: int) -> None:
    """Where only one key has a value, at either side of where tiles and their parts end, and keys are all alike."""
    n, places = 8203, [0, 1, 15, 16, 511, 512, 513, 1024, 2047, 2048, 8201, 8202]
    key, value = (np.zeros((1, len(places), n, 64), dtype_of(dtype)) for _ in range(2))
    value[0, range(len(places)), places] = 1
    cache = KVCache(1, len(places), n, 64, dtype=dtype_of(dtype), quantize=numbers)
    cache.append(key, value)
    out = attention_with_kv_cache(np.ones((1, rows * len(places), 1, 64), dtype_of(dtype)), cache)
    np.testing.assert_allclose(out.astype(np.float32), 1 / n, rtol=0.01)


@NUMBERS
def test_step_by_step_is_prefill(numbers: str) -> None:
    key, value = tokens(24)
    q = query(24)
    whole, single = (KVCache(3, 2, 24, 64, 33, quantize=numbers) for _ in range(2))
    expected = attention_with_kv_cache(q, whole, key, value)
    for i in range(24):
        out = attention_with_kv_cache(*(x if x is single else x[:, :, i : i + 1] for x in (q, single, key, value)))
        np.testing.assert_allclose(out[:, :, 0], expected[:, :, i], atol=1e-6)
    assert same_bits(single.key, whole.key) and same_bits(single.value, whole.value)


@NUMBERS
def test_ring_of_integers(numbers: str) -> None:
    key, value = tokens(30)
    rounded = [dequantize(quantize(x, numbers), numbers, x.shape[-1]) for x in (key, value)]
    cache, q = KVCache(3, 2, None, 64, 33, quantize=numbers, window=8, sinks=2), query(30)
    p, j = np.arange(30)[:, None], np.arange(30)
    seen = (j <= p) & ((j < 2) | (j > p - 8))
    got, at = [], 0
    for n in (5, 1, 1, 8, 1, 6, 8):
        piece = (x[:, :, at : at + n] for x in (key, value))
        got.append(attention_with_kv_cache(q[:, :, at : at + n], cache, *piece))
        at += n
    assert_accurate(np.concatenate(got, axis=2), None, q, *rounded, attn_mask=seen, enable_gqa=True)


@NUMBERS
def test_accuracy_of_quantised_caches(numbers: str) -> None:
    """Against what was rounded, for numbers of N(0, 1)."""
    key, value = tokens(1000, B=1, D=128, Dv=128)
    cache, q = KVCache(1, 2, 1000, 128, quantize=numbers), query(1, B=1, D=128)
    cache.append(key, value)
    exact = scaled_dot_product_attention(q, key, value, enable_gqa=True, backend="reference")
    error = np.linalg.norm(attention_with_kv_cache(q, cache) - exact) / np.linalg.norm(exact)
    assert error < {"int8": 0.01, "int4": 0.08}[numbers]


@pytest.mark.parametrize(
    ("numbers", "dtype"), [("int8", "float32"), ("int4", "float32"), ("int8", "float16"), ("int4", "float16")]
)
@pytest.mark.parametrize("n", [1, 30])
def test_a_token_that_is_not_finite(numbers: str, dtype: str, n: int) -> None:
    """It makes the rows that attend to it NaN, and no others."""
    key, value = tokens(40, dtype)
    for spoilt in (key, value):
        kept = spoilt[0, :, 30].copy()
        spoilt[0, :, 30] = np.nan
        cache = KVCache(3, 2, 40, 64, 33, dtype=dtype_of(dtype), quantize=numbers)
        out = attention_with_kv_cache(query(40, dtype), cache, key, value)[:, :, 40 - n :]
        again = attention_with_kv_cache(query(40, dtype)[:, :, 40 - n :], cache)
        for result in (out, again):
            rows = np.arange(40 - n, 40) >= 30
            assert np.isnan(result[0][:, rows]).all() and np.isfinite(result[0][:, ~rows]).all()
            assert np.isfinite(result[1:]).all()
        masked = attention_with_kv_cache(query(n, dtype), cache, mask_mod=lambda b, h, i, j: j != 30)
        assert np.isfinite(masked).all()
        spoilt[0, :, 30] = kept


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"quantize": "int2"}, ValueError, "quantize must be None, 'int8' or 'int4', got 'int2'"),
        ({"quantize": 8}, ValueError, "quantize must be None, 'int8' or 'int4', got 8"),
        ({"quantize": "int8", "dtype": np.float64}, TypeError, "dtype must be float32, float16 or bfloat16 of a quant"),
        ({"quantize": "int8", "buffers": (np.empty((1, 1, 4, 8), np.int8),) * 2}, TypeError, "buffers must be uint8"),
        (
            {"quantize": "int4", "buffers": (np.empty((1, 1, 4, 8), np.uint8),) * 2},
            ValueError,
            "buffers must have shap",
        ),
    ],
)
def test_wrong(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        KVCache(1, 1, 4, 8, **options)


# Pages ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [None, *QUANTIZED])
@pytest.mark.parametrize("page_size", [1, 7, 16, 64])
def test_pages_are_as_one_piece(numbers: str | None, page_size: int) -> None:
    """Bit for bit, whatever order pages are in, and whatever else is in them."""
    counts, n = [333, 100, 0], 333
    key, value = tokens(n)
    one_piece = KVCache(3, 2, n, 64, 33, quantize=numbers)
    one_piece.append(key, value, counts)
    cache = PagedKVCache(3 * (n // page_size + 2), 2, page_size, 64, 33, quantize=numbers)
    cache.key.view(np.uint8)[...] = cache.value.view(np.uint8)[...] = 255
    batch = cache.batch([cache.add() for _ in counts])
    for first in range(0, n, 50):  # they grow in turn, so that their pages alternate
        part = [x[:, :, first : first + 50] for x in (key, value)]
        batch.append(*part, np.clip(np.array(counts) - first, 0, part[0].shape[2]))
    table = np.full((3, 400), -1)
    for b, sequence in enumerate(batch.sequences):
        table[b, : len(cache.pages_of(sequence))] = cache.pages_of(sequence)
    for rows in (1, 2, 40):
        for name, options in OPTIONS.items():
            results = [
                attention_with_kv_cache(query(rows), x, return_aux=AUX_NAMES, **options)
                for x in (one_piece, batch, cache.tables(table, counts))
            ]
            assert same_bits(results[1], results[0]) and same_bits(results[2], results[0]), name


@pytest.mark.parametrize("dtype", ["float64", *SIXTEEN_BITS])
@pytest.mark.parametrize("sizes", [(64, 33), (5, 64)])
def test_pages_of_other_types(dtype: str, sizes: tuple[int, int]) -> None:
    key, value = tokens(90, dtype, D=sizes[0], Dv=sizes[1])
    one_piece = KVCache(3, 2, 90, *sizes, dtype=dtype_of(dtype))
    cache = PagedKVCache(20, 2, 16, *sizes, dtype=dtype_of(dtype))
    batch = cache.batch([cache.add() for _ in range(3)])
    for first in range(0, 90, 30):
        for x in (one_piece, batch):
            x.append(key[:, :, first : first + 30], value[:, :, first : first + 30])
    for rows in (1, 30):
        q = query(rows, dtype, D=sizes[0])
        for options in OPTIONS.values():
            expected = attention_with_kv_cache(q, one_piece, return_aux=AUX_NAMES, **options)
            assert same_bits(attention_with_kv_cache(q, batch, return_aux=AUX_NAMES, **options), expected)


def test_a_shared_prefix() -> None:
    """Sequences that go on from it in pages of their own; a call that fails takes its tokens back."""
    key, value = tokens(40, B=1)
    cache = PagedKVCache(12, 2, 16, 64, 33)
    first = cache.add()
    cache.batch(first).append(key, value)
    second = cache.fork(first, 35)
    new_key, new_value = tokens(3, B=2)
    q = query(3, B=2)
    before = cache.pages_used, cache.pages_of(first), cache.pages_of(second)
    with pytest.raises(ValueError, match="softcap"):
        attention_with_kv_cache(q, cache.batch([first, second]), new_key, new_value, softcap=-1.0)
    assert (cache.pages_used, cache.pages_of(first), cache.pages_of(second)) == before
    out = attention_with_kv_cache(q, cache.batch([first, second]), new_key, new_value)
    for b, n in enumerate((40, 35)):
        k, v = (np.concatenate([x[0, :, :n], y[b]], axis=1) for x, y in ((key, new_key), (value, new_value)))
        alone = scaled_dot_product_attention(q[b], k, v, is_causal=True, enable_gqa=True, query_offset=n)
        assert same_bits(out[b], alone)
    assert cache.pages_of(first)[:2] == cache.pages_of(second)[:2]


@settings(max_examples=40)
@given(
    page_size=st.integers(1, 20),
    D=st.integers(1, 40),
    Dv=st.integers(0, 40),
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=4),
    rows=st.integers(1, 12),
    numbers=st.sampled_from([None, *QUANTIZED]),
    seed=st.integers(0, 99),
)
def test_any_pages(
    page_size: int, D: int, Dv: int, lengths: list[int], rows: int, numbers: str | None, seed: int
) -> None:
    rng, B = np.random.default_rng(seed), len(lengths)
    pages = B * (70 // page_size + 1)
    cache = PagedKVCache(pages, 1, page_size, D, Dv, quantize=numbers)
    cache.key.view(np.uint8)[...] = cache.value.view(np.uint8)[...] = 255
    table = rng.permutation(pages).reshape(B, -1)
    one_piece = KVCache(B, 1, 70, D, Dv, quantize=numbers)
    key, value = (rng.standard_normal((B, 1, 70, size), dtype=np.float32) for size in (D, Dv))
    one_piece.append(key, value, lengths)
    for b, length in enumerate(lengths):
        for j in range(length):
            page, place = table[b, j // page_size], j % page_size
            cache.key[page, :, place], cache.value[page, :, place] = one_piece.key[b, :, j], one_piece.value[b, :, j]
    q = rng.standard_normal((B, 3, rows, D), dtype=np.float32)
    got, expected = (
        attention_with_kv_cache(q, x, return_aux=AUX_NAMES) for x in (cache.tables(table, lengths), one_piece)
    )
    assert same_bits(got, expected)
