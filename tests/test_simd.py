"""The vector vocabulary: what it computes, in vectors of every width, and how what is emitted is called."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from numba import njit, types

from numba_attn.cpu.blocks import for_widths
from numba_attn.cpu.elementary import exp2, tanh, tanh_in_place, tanh_of_tile
from numba_attn.cpu.emits import emits
from numba_attn.cpu.pointers import address
from numba_attn.cpu.simd import BYTES, Vectors

TYPES = {"float32": types.float32, "float64": types.float64}


def mapped(operation: Callable[..., Any], dtype: str, lanes: int) -> Callable[..., np.ndarray]:
    """An operation of `Vectors` on a number and vectors, done to an array: two vectors at a time, of so many lanes."""

    def _map(v, x, out, count, number):  # type: ignore[no-untyped-def]
        wide = Vectors(v.builder, v.dtype, lanes)

        def two(i):  # type: ignore[no-untyped-def]
            at = wide.mul_index(i, 2 * wide.bytes)
            xs = [wide.load(x, wide.add_index(at, n * wide.bytes)) for n in (0, 1)]
            for n, y in enumerate(operation(wide, number, *xs)):
                wide.store(y, out, wide.add_index(at, n * wide.bytes))

        wide.each(count, two)

    emitted = emits(_map)

    @njit
    def run(x, out, number):  # type: ignore[no-untyped-def]
        emitted(address(x), address(out), x.size // (2 * lanes), number)

    def on_array(x: np.ndarray, number: float = 0) -> np.ndarray:
        out = np.empty_like(x)
        run(x, out, x.dtype.type(number))
        return out

    return on_array


@pytest.mark.parametrize("bytes_of_vector", [16, 32, 64])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_powers_of_two(dtype: str, bytes_of_vector: int) -> None:
    """By a polynomial or a table of roots, whatever a register allows: to two units, exact at integers, 0 far below."""
    lowest, lanes = {"float32": -100, "float64": -960}[dtype], bytes_of_vector // BYTES[TYPES[dtype]]
    powers = mapped(lambda v, _, *xs: exp2(v, *xs), dtype, lanes)
    x = np.random.default_rng(0).uniform(lowest, 60, 1 << 14).astype(dtype)
    exact = np.exp2(x.astype(np.longdouble))
    assert np.max(np.abs(powers(x) / exact - 1)) <= 2 * np.finfo(dtype).eps
    wholes = np.resize(np.arange(lowest, 60), 1 << 10).astype(dtype)
    assert np.array_equal(powers(wholes), np.exp2(wholes))
    special = np.resize(np.array([-np.inf, lowest - 1, -1e30, np.nan]), 1 << 6).astype(dtype)
    assert np.array_equal(powers(special), np.resize([0, 0, 0, np.nan], 1 << 6), equal_nan=True)


@pytest.mark.parametrize("bytes_of_vector", [16, 32, 64])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_hyperbolic_tangents(dtype: str, bytes_of_vector: int) -> None:
    x = np.random.default_rng(1).standard_normal(1 << 14).astype(dtype) * np.resize([1e-20, 1e-3, 1, 30], 1 << 14)
    x = x.astype(dtype)
    lanes = bytes_of_vector // BYTES[TYPES[dtype]]
    tangents = mapped(lambda v, factor, *xs: tanh(v, factor, *xs), dtype, lanes)
    of_tile = mapped(lambda v, factor, *xs: tanh_of_tile(v, factor, xs), dtype, lanes)
    for factor in np.array([1, -0.3, 1e-5], dtype):
        exact = np.tanh(x.astype(np.longdouble) * factor)
        assert np.max(np.abs(tangents(x, factor) / exact - 1)) <= 8 * np.finfo(dtype).eps
        assert np.array_equal(of_tile(x, factor), tangents(x, factor))
    special = np.resize(np.array([np.inf, -np.inf, np.finfo(dtype).max, 0, np.nan, 1, -1, 1e-20]), 1 << 6).astype(dtype)
    for factor, expected in [
        (1, [1, -1, 1, 0, np.nan, np.tanh(1), -np.tanh(1), 1e-20]),
        (0, [np.nan, np.nan, 0, 0, np.nan, 0, 0, 0]),
        (-np.inf, [-1, 1, -1, 0, np.nan, -1, 1, -1]),  # 0, not NaN, as of a factor too large to be a number
        (1e-30, [1, -1, 1, 0, np.nan, 1e-30, -1e-30, 0]),
    ]:
        assert np.allclose(tangents(special, factor), np.resize(expected, 1 << 6), 1e-5, 1e-40, equal_nan=True)


@pytest.mark.parametrize("count", range(10))
def test_tangents_in_place(count: int) -> None:
    """Of any number of vectors, and of no more."""
    lanes = 4

    def _tangents(v, x, n, factor):  # type: ignore[no-untyped-def]
        tanh_in_place(Vectors(v.builder, v.dtype, lanes), factor, x, n)

    emitted = emits(_tangents)

    @njit
    def run(x, n, factor):  # type: ignore[no-untyped-def]
        emitted(address(x), n, factor)

    x = np.random.default_rng(count).standard_normal((12, lanes)).astype(np.float32)
    expected = np.concatenate([np.tanh(0.5 * x[:count]), x[count:]])
    run(x, count, np.float32(0.5))
    np.testing.assert_allclose(x, expected, 1e-6)


def test_functions_apart_are_told_apart() -> None:
    """One that is emitted twice, with other keywords, is two functions in a module."""

    def _fill(v, out, *, number):  # type: ignore[no-untyped-def]
        v.store(v.constant(number), out)

    one, two = (emits(partial(_fill, number=number), apart=True) for number in (1.0, 2.0))

    @njit
    def run(x, y):  # type: ignore[no-untyped-def]
        one(address(x))
        two(address(y))

    x, y = np.zeros((2, 16), np.float32)
    run(x, y)
    assert (x[0], y[0]) == (1, 2)


@pytest.mark.parametrize("count", range(12))
def test_vectors_are_taken_three_at_a_time(count: int) -> None:
    """And twice two rather than three and one, where there are three."""

    def _list(v, out, n):  # type: ignore[no-untyped-def]
        def some(first, width):  # type: ignore[no-untyped-def]
            for i in range(width):
                v.store(v.builder.sitofp(v.index(width), v.element), out, v.mul_index(v.add_index(first, i), v.size))

        for_widths(v, n, (3, 2, 1), some)

    emitted = emits(_list)

    @njit
    def run(out, n):  # type: ignore[no-untyped-def]
        emitted(address(out), n)

    out = np.zeros(16, np.float32)
    run(out, count)
    widths = [3] * (count // 3) + [count % 3] * (count % 3 > 0)
    if count > 3 and count % 3 == 1:
        widths = [*widths[:-2], 2, 2]
    assert out.tolist() == [float(width) for width in widths for _ in range(width)] + [0.0] * (16 - count)
