"""Conversions of the portable CUDA kernels, number by number, as the Python functions that they are."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cases import SIXTEEN_BITS, dtype_of
from tolerances import same_bits

from numba_attn import random
from numba_attn.cuda.elements import make_load, make_load_held, make_store
from numba_attn.cuda.philox import make_kept
from numba_attn.storage import QUANTIZED, dequantize, quantize

CUDA = SimpleNamespace(jit=lambda **options: lambda function: function)


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with np.errstate(all="ignore"):
        yield


def exchange() -> tuple[np.ndarray, np.ndarray, int]:
    """What a thread has of dynamic shared memory: words, the same as floats, and its number."""
    words = np.zeros(1, np.uint32)
    return words, words.view(np.float32), 0


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_every_number_of_16_bits_is_read(dtype: str) -> None:
    bits, load = np.arange(1 << 16, dtype=np.uint16), make_load(CUDA, dtype, np.float32)
    got = np.array([load(bits, n, *exchange()) for n in range(len(bits))], np.float32)
    assert same_bits(got, bits.view(dtype_of(dtype)).astype(np.float32))


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_numbers_are_rounded_to_16_bits(dtype: str) -> None:
    """Every number of 16 bits, what lies half-way between two, and what lies just beside that."""
    exact = np.arange(1 << 15, dtype=np.uint16).view(dtype_of(dtype)).astype(np.float32)
    exact = exact[np.isfinite(exact)]
    half = (exact[:-1] + exact[1:]) / 2
    half = half[np.isfinite(half)]
    edges = np.array([0.0, math.inf, math.nan, 65504, 65519.99, 65520, 3e38, 2.0**-24, 2.0**-25, 1e-45], np.float32)
    beside = np.nextafter(half, np.float32(0)), np.nextafter(half, np.float32(np.inf))
    numbers = np.concatenate([x[::3] for x in (exact, half, *beside)] + [half[:9], edges])
    numbers = np.concatenate([numbers, -numbers]).astype(np.float32)
    store, out = make_store(CUDA, dtype), np.zeros(len(numbers), np.uint16)
    for n, x in enumerate(numbers):
        store(out, n, x, *exchange())
    assert same_bits(out.view(dtype_of(dtype)), numbers.astype(dtype_of(dtype)))


@pytest.mark.parametrize("held", QUANTIZED)
@pytest.mark.parametrize("size", [1, 32, 33, 70])
def test_quantized_numbers(held: str, size: int) -> None:
    x = np.random.default_rng(0).standard_normal((3, size)).astype(np.float32)
    rows = quantize(x, held)
    load = make_load_held(CUDA, held, np.float32)
    got = [[load(rows.reshape(-1), r * rows.shape[1], d, 1, size, *exchange()) for d in range(size)] for r in range(3)]
    assert same_bits(np.array(got, np.float32), dequantize(rows, held, size))


@pytest.mark.parametrize("p", [0.0, 0.3, 1 - 2.0**-40])
def test_dropout_has_the_random_numbers_of_the_package(p: float) -> None:
    kept: Any = make_kept(CUDA)
    for seed in (0, 5, (1 << 63) + 12345):
        signed = seed - (seed >> 63 << 64)
        expected = random.kept(2, 3, (5, 16), p, seed)
        got = [[kept(j // 4, i, 3, 2, signed, random.threshold(p)) >> j % 4 & 1 for j in range(16)] for i in range(5)]
        np.testing.assert_array_equal(np.array(got, bool), expected)
