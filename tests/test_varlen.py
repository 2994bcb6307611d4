"""Packed sequences: the bits of one call for each, and the errors of what is no packing."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import mods
import numpy as np
import pytest
from cases import SIXTEEN_BITS, dtype_of
from hypothesis import given
from tolerances import assert_accurate, same_bits

from numba_attn import Aux, scaled_dot_product_attention, varlen_attention
from numba_attn.problem import AUX_NAMES

HQ, HKV, D, DV = 4, 2, 16, 9
ROWS, KEYS = [5, 0, 70, 1, 33, 300, 8, 9], [7, 3, 70, 40, 0, 310, 600, 9]
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])


def starts(lengths: list[int]) -> np.ndarray:
    return np.cumsum([0, *lengths])


def packed(rows: list[int], keys: list[int], dtype: str = "float32", seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = (sum(rows), HQ, D), (sum(keys), HKV, D), (sum(keys), HKV, DV)
    return [rng.standard_normal(shape).astype(dtype_of(dtype)) for shape in shapes]


def one_by_one(
    arrays: list[np.ndarray], rows: list[int], keys: list[int], options: dict[str, Any]
) -> tuple[np.ndarray, Aux]:
    """A call for each sequence, put together."""
    query, key, value = arrays
    results = []
    for b, (i, j) in enumerate(zip(starts(rows), starts(keys), strict=True)):
        if b == len(rows):
            break
        its = dict(options)
        if (mask := options.get("attn_mask")) is not None:
            mask = np.broadcast_to(mask, (len(rows), HQ, max(rows), max(keys)))
            its["attn_mask"] = mask[b, :, : rows[b], : keys[b]]
        if np.ndim(options.get("alibi_slopes")) == 2:
            its["alibi_slopes"] = options["alibi_slopes"][b]
        if np.ndim(options.get("query_offset", 0)) == 1:
            its["query_offset"] = int(options["query_offset"][b])
        k, v = key[j : j + keys[b]], value[j : j + keys[b]]
        q = query[i : i + rows[b]]
        results.append(
            scaled_dot_product_attention(q, k, v, enable_gqa=True, layout="BLHD", return_aux=AUX_NAMES, **its)
        )
    aux = [np.concatenate(column) for column in zip(*(a for _, a in results), strict=True)]
    return np.concatenate([out for out, _ in results]), Aux(*aux)


def options_of(rows: list[int], keys: list[int]) -> dict[str, dict[str, Any]]:
    rng, B = np.random.default_rng(1), len(rows)
    scores = (B, HQ, max(rows), max(keys))
    return {
        "plain": {},
        "causal": {"is_causal": True},
        "bottom right, window": {"is_causal": True, "query_offset": "bottom_right", "window": (20, 5)},
        "offsets": {"is_causal": True, "query_offset": np.arange(B) * 3 - 5},
        "bool mask": {"attn_mask": rng.random(scores) < 0.8},
        "shared mask": {"attn_mask": rng.standard_normal((1, 1, *scores[2:])).astype(np.float32)},
        "mask of keys": {"attn_mask": rng.random((B, 1, 1, max(keys))) < 0.6},
        "cap, slopes, sinks": {"softcap": 3.0, "alibi_slopes": rng.random((B, HQ)), "sinks": np.linspace(-2, 1, HQ)},
        "slopes": {"alibi_slopes": rng.random(HQ), "is_causal": True},
        "functions": {"score_mod": mods.nearer_is_more, "mask_mod": mods.prefix},
    }


@pytest.mark.parametrize("name", options_of(ROWS, KEYS))
@pytest.mark.parametrize("dtype", ["float32", "float64", *SIXTEEN_BITS])
def test_bits_of_one_call_for_each(name: str, dtype: str) -> None:
    arrays, options = packed(ROWS, KEYS, dtype), options_of(ROWS, KEYS)[name]
    before = [x.copy() for x in arrays]
    got = varlen_attention(*arrays, starts(ROWS), starts(KEYS), return_aux=AUX_NAMES, **options)
    assert same_bits(got, one_by_one(arrays, ROWS, KEYS, options))
    assert all(same_bits(x, y) for x, y in zip(arrays, before, strict=True))


@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60)), min_size=1, max_size=7),
    name=st.sampled_from(["plain", "causal", "bottom right, window", "cap, slopes, sinks", "bool mask"]),
    dtype=st.sampled_from(["float32", "float64"]),
)
def test_any_lengths(lengths: list[tuple[int, int]], name: str, dtype: str) -> None:
    rows, keys = ([*x] for x in zip(*lengths, strict=True))
    arrays, options = packed(rows, keys, dtype), options_of(rows, keys)[name]
    got = varlen_attention(*arrays, starts(rows), starts(keys), return_aux=AUX_NAMES, **options)
    assert same_bits(got, one_by_one(arrays, rows, keys, options))


def test_functions_of_the_sequence_and_dropout() -> None:
    """They get the number of the sequence, and places in it, as the reference has them."""
    rows, keys = [3, 30, 0, 12], [9, 20, 5, 12]
    options: dict[str, Any] = {
        "score_mod": mods.by_place,
        "block_mask": mods.blocky(mods.prefix, (1, 1, 30, 20), (8, 8)),
        "dropout_p": 0.3,
        "dropout_seed": 4,
        "return_aux": AUX_NAMES,
    }
    arrays = packed(rows, keys)
    out, aux = varlen_attention(*arrays, starts(rows), starts(keys), **options)
    exact, its = varlen_attention(*arrays, starts(rows), starts(keys), backend="reference", **options)
    np.testing.assert_allclose(out, exact, atol=1e-5)
    for got, expected in zip(aux, its, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_accuracy_and_shapes() -> None:
    arrays = packed(ROWS, KEYS)
    out, aux = varlen_attention(*arrays, starts(ROWS), starts(KEYS), return_aux=AUX_NAMES, is_causal=True)
    assert out.shape == (sum(ROWS), HQ, DV) and aux.lse.shape == (sum(ROWS), HQ)
    assert aux.key_weight.shape == (sum(KEYS), HQ)
    i, j = starts(ROWS)[5], starts(KEYS)[5]
    q, k, v = arrays[0][i : i + 300], arrays[1][j : j + 310], arrays[2][j : j + 310]
    its = Aux(*(x[i : i + 300].T for x in aux[:3]), aux.key_weight[j : j + 310].T)
    q, k, v = (x.swapaxes(0, 1) for x in (q, k, v))
    assert_accurate(out[i : i + 300].swapaxes(0, 1), its, q, k, v, is_causal=True, enable_gqa=True)


@BACKENDS
def test_neighbours_do_not_matter(backend: str) -> None:
    """NaN in one sequence reaches no other, on either side of it."""
    arrays = packed(ROWS, KEYS)
    expected = varlen_attention(*arrays, starts(ROWS), starts(KEYS), return_aux=AUX_NAMES, backend=backend)
    for b in (2, 5, 7):
        spoilt = [x.copy() for x in arrays]
        for x, lengths in zip(spoilt, (ROWS, KEYS, KEYS), strict=True):
            x[starts(lengths)[b] : starts(lengths)[b + 1]] = np.nan
        out, aux = varlen_attention(*spoilt, starts(ROWS), starts(KEYS), return_aux=AUX_NAMES, backend=backend)
        kept = np.ones(sum(ROWS), bool), np.ones(sum(KEYS), bool)
        for mask, lengths in zip(kept, (ROWS, KEYS), strict=True):
            mask[starts(lengths)[b] : starts(lengths)[b + 1]] = False
        assert same_bits(out[kept[0]], expected[0][kept[0]]) and np.isnan(out[~kept[0]]).all()
        for got, before, name in zip(aux, expected[1], AUX_NAMES, strict=True):
            mask = kept[name == "key_weight"]
            assert same_bits(got[mask], before[mask]), name


def test_storage_and_out() -> None:
    arrays = packed(ROWS, KEYS)
    expected = varlen_attention(*arrays, starts(ROWS), starts(KEYS), is_causal=True)
    wide = [np.zeros((2 * len(x), x.shape[1] + 1, 3 * x.shape[2]), x.dtype)[::2, 1:, ::3] for x in arrays]
    for x, y in zip(wide, arrays, strict=True):
        x[...] = y
    out = np.full((2 * sum(ROWS), HQ, DV), 7, np.float32)
    result = varlen_attention(*wide, [*starts(ROWS)], tuple(starts(KEYS)), is_causal=True, out=out[::2])
    assert result.base is out and same_bits(out[::2], expected) and (out[1::2] == 7).all()
    # As one buffer of queries, keys and values, which a projection makes.
    qkv = np.random.default_rng(0).standard_normal((12, 3, 2, D), dtype=np.float32)
    parts = [qkv[:, i] for i in range(3)]
    got = varlen_attention(*parts, [0, 5, 12], [0, 5, 12])
    assert same_bits(got, varlen_attention(*(x.copy() for x in parts), [0, 5, 12], [0, 5, 12]))


@BACKENDS
def test_nothing_at_all(backend: str) -> None:
    none = np.empty((0, 2, 3), np.float32)
    for bounds in ([0], [0, 0], np.zeros(4, np.uint8)):
        out, aux = varlen_attention(none, none, none, bounds, bounds, return_aux=AUX_NAMES, backend=backend)
        assert out.shape == (0, 2, 3) and aux.lse.shape == aux.key_weight.shape == (0, 2)
    keys = np.ones((4, 1, 3), np.float32)
    assert varlen_attention(none, keys, keys, [0, 0], [0, 4], backend=backend).shape == (0, 2, 3)
    assert not varlen_attention(np.ones((4, 2, 3), np.float32), none, none, [0, 4], [0, 0], backend=backend).any()


QUERY, KEY, VALUE = packed([3, 4], [5, 2])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cu_seqlens_q": [[1], [3, 7]]}, ValueError, "cu_seqlens_q must be an array: "),
        ({"cu_seqlens_q": [1, 3, 7]}, ValueError, "cu_seqlens_q must begin with 0, got 1"),
        ({"cu_seqlens_q": [0, 3, 6]}, ValueError, "cu_seqlens_q must end with the 7 tokens of query, got 6"),
        ({"cu_seqlens_q": [0, 8, 7]}, ValueError, "cu_seqlens_q must be between 0 and 7, got 8"),
        ({"cu_seqlens_k": [0, 5, 3, 7]}, ValueError, "cu_seqlens_k must not decrease, got 5 and then 3"),
        ({"cu_seqlens_k": [0, -1, 7]}, ValueError, "cu_seqlens_k must be between 0 and 7, got -1"),
        ({"cu_seqlens_k": [0, 7]}, ValueError, "must be of as many sequences, got 2 and 1"),
        ({"cu_seqlens_k": 7}, ValueError, r"cu_seqlens_k must have shape \(B \+ 1,\), got \(\)"),
        ({"cu_seqlens_k": []}, ValueError, r"cu_seqlens_k must have shape \(B \+ 1,\), got \(0,\)"),
        ({"cu_seqlens_q": [[0, 3, 7]]}, ValueError, r"cu_seqlens_q must have shape \(B \+ 1,\), got \(1, 3\)"),
        ({"cu_seqlens_q": [0, 3.0, 7]}, TypeError, "cu_seqlens_q must be integers"),
        ({"cu_seqlens_q": None}, ValueError, "cu_seqlens_q must have shape"),
        ({"query": QUERY[0]}, ValueError, "same number of axes"),
        ({"query": QUERY[None], "key": KEY[None], "value": VALUE[None]}, ValueError, "query must have 3 axes"),
        ({"query": QUERY[:, :3]}, ValueError, "query heads must be a multiple of key-value heads, got 3 and 2"),
        ({"value": VALUE[:6]}, ValueError, "key and value must have the same length, got 7 and 6"),
        ({"key": KEY.astype(np.float64)}, TypeError, "must have one dtype"),
        ({"attn_mask": np.ones((2, 4, 4, 6), bool)}, ValueError, r"does not broadcast to \(2, 4, 4, 5\)"),
        ({"query_offset": [0, 1, 2]}, ValueError, r"query_offset must be an integer or have shape \(2,\)"),
        ({"alibi_slopes": np.ones((3, 4))}, ValueError, r"alibi_slopes must have shape \(4,\) or \(2, 4\)"),
        ({"block_mask": mods.blocky(mods.prefix, (1, 1, 7, 7), (4, 4))}, ValueError, "block_mask was made for"),
        ({"out": np.zeros((7, 4, 8), np.float32)}, ValueError, r"out must have shape \(7, 4, 9\)"),
        ({"backend": "gpu"}, ValueError, "backend must be"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_wrong(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    out = np.full((7, HQ, DV), 7, np.float32)
    call = {"query": QUERY, "key": KEY, "value": VALUE, "cu_seqlens_q": [0, 3, 7], "cu_seqlens_k": [0, 5, 7]}
    with pytest.raises(error, match=message):
        varlen_attention(**{**call, "out": out, **changes})
    assert (out == 7).all()
