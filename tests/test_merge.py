"""Attention to parts of the keys, merged, against attention to all of them."""

from __future__ import annotations

import importlib.util
import itertools
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from cases import dtype_of
from contract import STORAGE
from hypothesis import given
from tolerances import assert_accurate, same_bits

from numba_attn import Aux, merge_attention, scaled_dot_product_attention

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "cascade.py"
DTYPES = ["float32", "float64", "float16", "bfloat16"]


def normal(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def attend(*arrays: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    out, aux = scaled_dot_product_attention(*arrays, return_aux=("lse",), **options)
    return out, aux.lse  # type: ignore[union-attr]


def merged(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return merge_attention([out for out, _ in parts], [lse for _, lse in parts])


def three_parts(seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of 2 heads, 4 rows and values of 3."""
    return [(normal(2, 4, 3, seed=seed + n), normal(2, 4, seed=seed + n)) for n in range(3)]


# Against the whole ----------------------------------------------------------------------------------------------------


@given(st.data())
def test_parts_make_the_whole(data: st.DataObject) -> None:
    """Cut anywhere, also into nothing; with masks that leave parts, and rows, without keys; in any order."""
    B, Hkv, group, Lq, Lk = (data.draw(st.integers(low, n)) for low, n in ((1, 2), (1, 2), (1, 2), (0, 9), (0, 40)))
    D, Dv = data.draw(st.integers(1, 20)), data.draw(st.integers(0, 20))
    dtype = dtype_of(data.draw(st.sampled_from(DTYPES[:2])))
    query, key, value = (
        normal(*shape, dtype=dtype) for shape in ((B, Hkv * group, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv))
    )
    mask = np.random.default_rng(data.draw(st.integers(0, 99))).random((B, 1, Lq, Lk)) < data.draw(
        st.sampled_from([0.0, 0.1, 0.9])
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, Lk), max_size=6)))
    if cuts and data.draw(st.booleans()):
        mask[..., : cuts[-1]] = False
    options: dict[str, Any] = {"scale": data.draw(st.sampled_from([None, 20.0])), "enable_gqa": True}
    sinks = normal(Hkv * group, dtype=dtype) if data.draw(st.booleans()) else None

    parts = []
    for n, (start, stop) in enumerate(itertools.pairwise([0, *cuts, Lk])):
        keys = slice(start, stop)
        arrays = query, key[:, :, keys], value[:, :, keys], mask[..., keys]
        parts.append(attend(*arrays, **options, sinks=sinks if n == 0 else None))
    out, lse = merged(data.draw(st.permutations(parts)))
    assert_accurate(out, Aux(lse=lse), query, key, value, attn_mask=mask, sinks=sinks, **options)
    rows_first = [(out.swapaxes(1, 2), lse.swapaxes(1, 2)) for out, lse in parts]
    for got, expected in zip(merged(rows_first), merged(parts), strict=True):
        assert same_bits(got.swapaxes(1, 2), expected)


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes(name: str) -> None:
    """Accumulated as the statistics are, in float32 at least, and rounded once: as for float32 outs, then rounded."""
    query, key, value = normal(3, 2, 5, 60, 16, dtype=dtype_of(name))
    parts = [attend(query, key[:, :, n::7], value[:, :, n::7]) for n in range(7)]
    out, lse = merged(parts)
    assert out.dtype == query.dtype and lse.dtype == parts[0][1].dtype
    expected, _ = merged([(out.astype(lse.dtype), lse) for out, lse in parts])
    assert same_bits(out, expected.astype(out.dtype))
    if name in DTYPES[:2]:
        assert_accurate(out, Aux(lse=lse), query, key, value)


def test_float64_logarithms_are_kept() -> None:
    """Of scores so large that their differences are lost in float32."""
    parts = [(np.full((1, 1), n, np.float32), np.array([1e9 + n])) for n in range(2)]
    out, lse = merged(parts)
    assert out.dtype == np.float32 and lse.dtype == np.float64
    weight = np.e / (1 + np.e)
    np.testing.assert_allclose(out, weight, rtol=1e-6)
    np.testing.assert_allclose(lse, 1e9 + np.log(1 + np.e), rtol=1e-15)


def test_order_matters_by_rounding_only() -> None:
    parts = three_parts()
    expected = merged([(out.astype(np.float64), lse.astype(np.float64)) for out, lse in parts])
    for order in itertools.permutations(parts):
        for got, truth in zip(merged(list(order)), expected, strict=True):
            np.testing.assert_allclose(got, truth, rtol=0, atol=1e-6)


def test_merged_parts_can_be_merged() -> None:
    first, second, third = three_parts()
    for got, expected in zip(merged([merged([first, second]), third]), merged([first, second, third]), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def test_large_logarithms() -> None:
    """Neither their exponentials nor those of their differences are in range."""
    parts = [(out, lse + shift) for (out, lse), shift in zip(three_parts(), (-30000, 30000, 0), strict=True)]
    out, lse = merged(parts)
    assert same_bits(out, parts[1][0]) and same_bits(lse, parts[1][1])


def test_one_part_is_what_it_was() -> None:
    for name in DTYPES:
        part = attend(*normal(3, 2, 5, 8, dtype=dtype_of(name)))
        for got, expected in zip(merged([part]), part, strict=True):
            assert same_bits(got, expected)


# What is empty, and what is not finite --------------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
def test_outputs_of_empty_parts_are_not_used(garbage: float) -> None:
    parts = three_parts()
    row, expected = (1, 2), merged(three_parts())
    for n in range(3):
        dirty, clean = three_parts(), three_parts()
        for some, x in ((dirty, garbage), (clean, 0.0)):
            some[n][1][row] = -np.inf
            some[n][0][row] = x
        got, truth = merged(dirty), merged(clean)
        assert all(same_bits(a, b) for a, b in zip(got, truth, strict=True))
        without = merged(parts[:n] + parts[n + 1 :])
        np.testing.assert_allclose(got[0][row], without[0][row], rtol=0, atol=1e-6)
        np.testing.assert_allclose(got[1][row], without[1][row], rtol=0, atol=1e-6)
        others = np.ones((2, 4), bool)
        others[row] = False
        assert all(same_bits(a[others], b[others]) for a, b in zip(got, expected, strict=True))


def test_all_parts_empty() -> None:
    parts = [(np.full((2, 4, 3), np.nan, np.float32), np.full((2, 4), -np.inf, np.float32))] * 3
    for n in (1, 3):
        out, lse = merged(parts[:n])
        assert not out.any() and not np.signbit(out).any() and (lse == -np.inf).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("n", range(3))
def test_bad_logarithms_make_their_rows_bad(n: int, bad: float) -> None:
    parts, expected = three_parts(), merged(three_parts())
    parts[n][1][1, 2] = bad
    rows = np.zeros((2, 4), bool)
    rows[1, 2] = True
    for got, truth in zip(merged(parts), expected, strict=True):
        assert np.isnan(got[rows]).all() and same_bits(got[~rows], truth[~rows])


def test_bad_outputs_stay_where_they_are() -> None:
    parts, expected = three_parts(), merged(three_parts())
    parts[1][0][1, 2, 0] = np.nan
    out, lse = merged(parts)
    where = np.isnan(out)
    assert where.sum() == 1 and where[1, 2, 0]
    assert same_bits(out[~where], expected[0][~where]) and same_bits(lse, expected[1])


# How parts come -------------------------------------------------------------------------------------------------------


def test_iterators_are_not_collected() -> None:
    """Parts are forgotten, but for the last ones; and each comes before its logarithms are asked for."""
    made: list[weakref.ref[np.ndarray]] = []
    lses: list[np.ndarray] = []
    alive = []

    def outs() -> Iterator[np.ndarray]:
        for n in range(20):
            out = normal(2, 4, 3, seed=n)
            lses.append(normal(2, 4, seed=n))
            made.append(weakref.ref(out))
            alive.append(sum(x() is not None for x in made))
            yield out

    got = merge_attention(outs(), lses)
    assert max(alive) <= 3
    expected = merged([(normal(2, 4, 3, seed=n), normal(2, 4, seed=n)) for n in range(20)])
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


def test_stacked_parts() -> None:
    parts, expected = three_parts(), merged(three_parts())
    got = merge_attention(*(np.stack(arrays) for arrays in zip(*parts, strict=True)))
    assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("form", STORAGE)
def test_storage(form: str) -> None:
    """Any, and as it was afterwards."""
    store = STORAGE[form]
    parts, expected = [(store(out), store(lse)) for out, lse in three_parts()], merged(three_parts())
    assert all(same_bits(a, b) for a, b in zip(merged(parts), expected, strict=True))
    for got, given_part in zip(parts, three_parts(), strict=True):
        assert all(same_bits(a, b) for a, b in zip(got, given_part, strict=True))


def test_nothing_in_parts() -> None:
    for shape in ((0, 2, 4, 3), (2, 0, 3), (2, 4, 0), (0, 0)):
        out, lse = merge_attention([np.empty(shape)] * 2, [np.zeros(shape[:-1])] * 2)
        assert out.shape == shape and lse.shape == shape[:-1]
        np.testing.assert_allclose(lse, np.log(2))


# Errors ---------------------------------------------------------------------------------------------------------------

OUT, LSE = three_parts()[0]


@pytest.mark.parametrize(
    ("error", "message", "outs", "lses"),
    [
        (ValueError, "outs must have one part or more, got none", [], []),
        (TypeError, "outs must be arrays, one for each part, got NoneType", None, [LSE]),
        (TypeError, "lses must be arrays, one for each part, got float", [OUT], 5.0),
        (ValueError, "outs and lses must be as many, got 1 lses and more outs", [OUT, OUT], [LSE]),
        (ValueError, "outs and lses must be as many, got 1 outs and more lses", [OUT], [LSE, LSE]),
        (TypeError, r"outs\[1\] must be a NumPy array, got list", [OUT, OUT.tolist()], [LSE, LSE]),
        (TypeError, r"lses\[0\] must be float32, .* got int64", [OUT], [LSE.astype(np.int64)]),
        (TypeError, r"outs\[0\] must be float32, .* got bool", [OUT > 0], [LSE]),
        (ValueError, r"at least 2 axes .* got shape \(3,\)", [OUT[0, 0]], [LSE[0]]),
        (ValueError, r"outs\[1\] must have shape \(2, 4, 3\), got \(4, 3\)", [OUT, OUT[0]], [LSE, LSE]),
        (ValueError, r"lses\[0\] must have shape \(2, 4\), got \(4, 2\)", [OUT], [LSE.T]),
        (ValueError, r"lses\[1\] must have shape \(2, 4\), got \(1, 4\)", [OUT, OUT], [LSE, LSE[:1]]),
        (TypeError, r"outs\[1\] must be float32, as outs\[0\] is, got float64", [OUT, OUT.astype(float)], [LSE, LSE]),
        (TypeError, r"lses\[1\] must be float32, as lses\[0\] is, got float64", [OUT, OUT], [LSE, LSE.astype(float)]),
    ],
)
def test_errors(error: type[Exception], message: str, outs: Any, lses: Any) -> None:
    with pytest.raises(error, match=message):
        merge_attention(outs, lses)


# The example ----------------------------------------------------------------------------------------------------------


def test_cascade(capsys: pytest.CaptureFixture[str]) -> None:
    """The example finds that both ways agree, and says what it measures."""
    spec = importlib.util.spec_from_file_location(EXAMPLE.stem, EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(sequences=3, prefix_length=50, suffix_length=9, new_tokens=2)
    printed = capsys.readouterr().out
    assert printed.startswith("3 sequences, 50 shared and 9 own keys, 2 queries each\n")
    assert "concatenated: " in printed and "cascade: " in printed and "MB of keys and values" in printed
