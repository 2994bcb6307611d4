"""Attention inside compiled code of the user's own: the bits of the Python call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest
from tolerances import same_bits

from numba_attn import overloads, scaled_dot_product_attention


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    """As Numba's entry point does."""
    overloads.init()


def arrays(dtype: Any, Lq: int, Lk: int, group: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(Lq)
    return [rng.standard_normal((2, h, L, 20)).astype(dtype) for h, L in ((2 * group, Lq), (2, Lk), (2, Lk))]


@numba.njit(error_model="python")
def causal(query, key, value, offset, length):
    return scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True, query_offset=offset, kv_lengths=length
    )


@numba.njit(fastmath=True)
def windowed(query, key, value):
    return scaled_dot_product_attention(query, key, value, None, 0.0, False, 0.3, window=(30, None), softcap=4.0)


@numba.njit(parallel=True, fastmath=True)
def of_each_head(query, key, value, out):
    for b in numba.prange(query.shape[0]):
        for h in range(query.shape[1]):
            out[b, h] = scaled_dot_product_attention(query[b, h], key[b, h], value[b, h], is_causal=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("Lq", "Lk"), [(1, 700), (5, 40), (70, 90), (200, 200)])
def test_same_bits(dtype: Any, Lq: int, Lk: int) -> None:
    query, key, value = arrays(dtype, Lq, Lk, 3)
    options = {"is_causal": True, "enable_gqa": True, "query_offset": 7, "kv_lengths": Lk - 3}
    expected = scaled_dot_product_attention(query, key, value, **options)
    assert same_bits(causal(query, key, value, 7, Lk - 3), expected)
    assert same_bits(causal(query[0], key[0], value[0], 7, Lk - 3), expected[0])
    turned = [x[..., ::-1, :][..., ::-1, :] for x in (query, key, value)]
    assert same_bits(causal(*turned, 7, Lk - 3), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_options_and_a_fast_caller(dtype: Any) -> None:
    query, key, value = arrays(dtype, 60, 80)
    expected = scaled_dot_product_attention(query, key, value, scale=0.3, window=(30, None), softcap=4.0)
    assert same_bits(windowed(query, key, value), expected)
    spoilt = value.copy()
    spoilt[0, 0, 79] = np.nan  # of which a fast caller must not make use
    expected = scaled_dot_product_attention(query, key, spoilt, scale=0.3, window=(30, None), softcap=4.0)
    assert np.isnan(expected[0, 0]).all() and same_bits(windowed(query, key, spoilt), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numbers_of_32_bits(dtype: Any) -> None:
    """As an argument, a constant and an expression."""
    x = arrays(dtype, 20, 20)[1]

    @numba.njit
    def given(x: Any, scale: Any, cap: Any) -> Any:
        return scaled_dot_product_attention(x, x, x, scale=scale, softcap=cap)

    @numba.njit
    def written(x: Any) -> Any:
        return scaled_dot_product_attention(x, x, x, scale=np.float32(0.25) / np.sqrt(np.float32(x.shape[-1])))

    for scale, cap in ((np.float32(0.3), np.float32(2)), (np.float32(0.3), 2), (1, np.float32(2))):
        assert same_bits(given(x, scale, cap), scaled_dot_product_attention(x, x, x, scale=scale, softcap=cap))
    scale = np.float32(0.25) / np.sqrt(np.float32(x.shape[-1]))
    assert same_bits(written(x), scaled_dot_product_attention(x, x, x, scale=scale))


def test_defaults_that_are_given() -> None:
    @numba.njit
    def attend(x: Any) -> Any:
        return scaled_dot_product_attention(x, x, x, None, 0, layout="BHLD", return_aux=(), out=None)

    x = arrays(np.float32, 20, 20)[1]
    assert same_bits(attend(x), scaled_dot_product_attention(x, x, x))


def test_inside_a_parallel_loop() -> None:
    query, key, value = arrays(np.float32, 64, 64)
    out = np.empty_like(query)
    of_each_head(query, key, value, out)
    assert same_bits(out, scaled_dot_product_attention(query, key, value, is_causal=True))


def test_nothing_to_do() -> None:
    query, key, value = arrays(np.float32, 5, 6)
    assert causal(query[:0], key[:0], value[:0], 0, 6).shape == (0, 2, 5, 20)
    assert (causal(query, key, value, 0, 0) == 0).all()


def test_shapes_that_do_not_fit() -> None:
    query, key, value = arrays(np.float32, 5, 6)
    with pytest.raises(ValueError, match="must have shapes"):
        causal(query, key[..., :3].copy(), value, 0, 6)
    with pytest.raises(ValueError, match="query heads"):
        causal(query[:, :1], key, value, 0, 6)
    with pytest.raises(ValueError, match="dropout_p must be 0"):
        numba.njit(lambda x: scaled_dot_product_attention(x, x, x, None, 0.5))(query)
    with pytest.raises(ValueError, match="kv_lengths"):
        causal(query, key, value, 0, 7)


def test_numbers_out_of_range() -> None:
    @numba.njit
    def attend(x: Any, offset: Any, scale: Any, cap: Any) -> Any:
        return scaled_dot_product_attention(x, x, x, query_offset=offset, scale=scale, softcap=cap)

    x = arrays(np.float32, 5, 5)[1]
    assert np.isfinite(attend(x, 2**40, 1.0, 1.0)).all()
    for offset in (2**40 + 1, -(2**62), -(2**63), np.uint64(2**63 + 5)):
        with pytest.raises(ValueError, match="query_offset must be between"):
            attend(x, offset, 1.0, 1.0)
    for scale in (1e300, -np.inf, np.nan):
        with pytest.raises(ValueError, match="scale must be finite"):
            attend(x, 0, scale, 1.0)
    for cap in (1e300, 1e-300, np.nan, -1.0):
        with pytest.raises(ValueError, match="softcap must be positive and finite"):
            attend(x, 0, 1.0, cap)
    assert attend(x.astype(np.float64), 0, 1.0, 1e300).shape == x.shape


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda x: scaled_dot_product_attention(x, x, x, x), "attn_mask is not available in compiled code"),
        (lambda x: scaled_dot_product_attention(x, x, x, alibi_slopes=x[0, 0]), "alibi_slopes is not available"),
        (lambda x: scaled_dot_product_attention(x, x, x.astype(np.float64)), "one dtype and rank"),
        (lambda x: scaled_dot_product_attention(x, x, x[0]), "one dtype and rank"),
        (lambda x: scaled_dot_product_attention(x, x, 1), "value must be a float32 or float64 array"),
        (lambda x: scaled_dot_product_attention(x, x, x, window=3), "window must be a pair"),
        (lambda x: scaled_dot_product_attention(x, x, x, query_offset=0.5), "query_offset must be an integer"),
        (lambda x: scaled_dot_product_attention(x, x, x, window=(1.7, 1)), "window must be a pair of integers"),
        (lambda x: scaled_dot_product_attention(x, x, x, window=(True, None)), "window must be a pair of integers"),
        (lambda x: scaled_dot_product_attention(x, x, x, is_causal=2), "is_causal must be True or False"),
        (lambda x: scaled_dot_product_attention(x, x, x, enable_gqa=1), "enable_gqa must be True or False"),
        (lambda x: scaled_dot_product_attention(x, x, x, scale="1"), "scale must be a real number"),
        (lambda x: scaled_dot_product_attention(x, x, x, softcap="1"), "softcap must be a real number"),
        (lambda x: scaled_dot_product_attention(x, x, x, layout="BLHD"), "layout is not available"),
    ],
)
def test_what_is_not_there(call: Callable[[np.ndarray], Any], reason: str) -> None:
    with pytest.raises(numba.TypingError, match=reason):
        numba.njit(call)(np.ones((2, 3, 4), np.float32))


def test_the_entry_point(python: Callable[..., str]) -> None:
    """Nothing has to be imported, or called, for Numba to know the function."""
    printed = python(
        "import numba, numpy as np, numba_attn\n"
        "@numba.njit\n"
        "def attend(x):\n"
        "    return numba_attn.scaled_dot_product_attention(x, x, x)\n"
        "print(attend(np.eye(3, dtype=np.float32)).shape)\n"
    )
    assert printed == "(3, 3)\n"
