"""16-bit numbers: every one of their bit patterns, and float32 numbers around every rounding boundary, both ways."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import njit

from numba_attn.cpu import narrow, target
from numba_attn.cpu.emits import emits
from numba_attn.cpu.narrow import BFLOAT16, FLOAT16
from numba_attn.cpu.pointers import address

PATTERNS = np.arange(1 << 16).astype(np.uint16)


@pytest.fixture(params=["native", "by bits"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the processor's conversions, and without."""
    if request.param == "by bits":
        monkeypatch.setattr(target, "HAS_F16C", False)
    elif not target.HAS_F16C:
        pytest.skip("this processor has none")
    return


def converters(stored: Any) -> tuple[Any, Any]:
    """Compiled anew for each form: bits to float32, and float32 to bits, of whole vectors."""

    def _widen(v, bits, numbers, count):  # type: ignore[no-untyped-def]
        v.each(
            count,
            lambda i: v.store(
                narrow.load(v, bits, v.mul_index(i, 2 * v.lanes), stored), numbers, v.mul_index(i, v.bytes)
            ),
        )

    def _shorten(v, numbers, bits, count):  # type: ignore[no-untyped-def]
        v.each(
            count,
            lambda i: narrow.store(
                v, v.load(numbers, v.mul_index(i, v.bytes)), bits, v.mul_index(i, 2 * v.lanes), stored
            ),
        )

    widen, shorten = emits(_widen), emits(_shorten)

    @njit
    def widened(bits, numbers, vectors):  # type: ignore[no-untyped-def]
        widen(address(bits), address(numbers), vectors)

    @njit
    def shortened(numbers, bits, vectors):  # type: ignore[no-untyped-def]
        shorten(address(numbers), address(bits), vectors)

    return widened, shortened


def lanes() -> int:
    return target.VECTOR_BYTES // 4


def exact(patterns: np.ndarray, stored: Any) -> np.ndarray:
    if stored == FLOAT16:
        return patterns.view(np.float16).astype(np.float32)
    return (patterns.astype(np.uint32) << 16).view(np.float32)


def nearest(numbers: np.ndarray, stored: Any) -> np.ndarray:
    with np.errstate(all="ignore"):
        if stored == FLOAT16:
            return numbers.astype(np.float16).view(np.uint16)
        ml_dtypes = pytest.importorskip("ml_dtypes")
        rounded: np.ndarray = numbers.astype(ml_dtypes.bfloat16).view(np.uint16)
        return rounded


@pytest.mark.parametrize("stored", [FLOAT16, BFLOAT16], ids=["float16", "bfloat16"])
def test_every_pattern(form: None, stored: Any) -> None:
    widened, shortened = converters(stored)
    bits = PATTERNS.view(np.int16) if stored == FLOAT16 else PATTERNS
    numbers, back = np.empty(bits.shape, np.float32), np.empty_like(bits)
    widened(bits, numbers, bits.size // lanes())
    truth = exact(PATTERNS, stored)
    nan = np.isnan(truth)
    assert np.array_equal(numbers[~nan].view(np.uint32), truth[~nan].view(np.uint32))
    assert np.isnan(numbers[nan]).all()
    shortened(numbers, back, bits.size // lanes())
    assert np.array_equal(back[~nan], bits[~nan])
    assert np.isnan(exact(back.view(np.uint16)[nan], stored)).all()


@pytest.mark.parametrize("stored", [FLOAT16, BFLOAT16], ids=["float16", "bfloat16"])
def test_rounding(form: None, stored: Any) -> None:
    """Halfway between neighbours, one float32 on either side of that, and numbers of every size."""
    _, shortened = converters(stored)
    truth = exact(PATTERNS, stored)
    neighbours = truth[np.isfinite(truth)].astype(np.float64)
    neighbours = np.unique(neighbours)
    halves = ((neighbours[1:] + neighbours[:-1]) / 2).astype(np.float32)
    rng = np.random.default_rng(0)
    random = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    numbers = np.concatenate([halves, np.nextafter(halves, np.inf), np.nextafter(halves, -np.inf), random])
    numbers = np.concatenate([numbers, np.float32([65504, 65519.99, 65520, 1e5, np.inf, -np.inf, 0.0, -0.0, np.nan])])
    numbers = np.resize(numbers, -(-numbers.size // lanes()) * lanes()).astype(np.float32)
    bits = np.empty(numbers.shape, np.int16 if stored == FLOAT16 else np.uint16)
    shortened(numbers, bits, numbers.size // lanes())
    expected, nan = nearest(numbers, stored), np.isnan(numbers)
    assert np.array_equal(bits.view(np.uint16)[~nan], expected[~nan])
    assert np.isnan(exact(bits.view(np.uint16)[nan], stored)).all()
