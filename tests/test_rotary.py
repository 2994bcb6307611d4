"""Rotary embedding against complex numbers in float64, and scalings against their definitions, one pair at a time."""

from __future__ import annotations

import cmath
import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from cases import dtype_of
from contract import STORAGE
from hypothesis import given
from tolerances import same_bits

from numba_attn import apply_rotary, rotary_tables, threads
from numba_attn.cpu import rotation
from numba_attn.rotary import NTK, DynamicNTK, Linear, Llama3, Scaling, YaRN

# The largest relative error of one rounding, and some.
EPS = {"float32": 2e-7, "float64": 1e-15, "float16": 1e-3, "bfloat16": 8e-3}


def normal(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def rotated(
    x: np.ndarray, cos: np.ndarray, sin: np.ndarray, positions: np.ndarray, interleaved: bool = False
) -> np.ndarray:
    """Of (B, H, L, D) at rows (B, L) of tables, in float64: each pair is a complex number, times another."""
    exact, half = x.astype(np.float64), cos.shape[-1]
    turn = (cos.astype(np.float64) + 1j * sin.astype(np.float64))[positions][:, None]
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        z = (x[..., a].astype(np.float64) + 1j * x[..., b].astype(np.float64)) * turn[..., i]
        exact[..., a], exact[..., b] = z.real, z.imag
    return exact


def assert_close(got: np.ndarray, exact: np.ndarray) -> None:
    """Relative to the length of a pair, of which both numbers contribute to the error of each."""
    eps = EPS[got.dtype.name]
    np.testing.assert_allclose(
        got.astype(np.float64), exact, rtol=eps, atol=4 * EPS["float32"] if eps > 1e-9 else 1e-14
    )


# Tables ---------------------------------------------------------------------------------------------------------------


def turns_per_length(i: int, D: int, base: float, length: int) -> float:
    """How often pair i goes round within so many positions."""
    return length / (2 * math.pi * base ** (2 * i / D))


def expected_frequency(scaling: Scaling | None, i: int, D: int, base: float, length: int) -> float:
    """Of pair i, as the papers and model cards say it."""
    plain = 1 / base ** (2 * i / D)
    match scaling:
        case Linear(factor):
            return plain / factor
        case NTK(factor):
            return 1 / (base * factor ** (D / (D - 2))) ** (2 * i / D)
        case DynamicNTK(factor, trained):
            alpha = factor * length / trained - (factor - 1) if length > trained else 1
            return 1 / (base * alpha ** (D / (D - 2))) ** (2 * i / D)
        case YaRN(factor, trained, fast, slow):
            # The pair that makes so many turns: solved for it by bisection, not by logarithms.
            low = (
                math.floor(pair_with(fast, D, base, trained)) if scaling.truncate else pair_with(fast, D, base, trained)
            )
            high = (
                math.ceil(pair_with(slow, D, base, trained)) if scaling.truncate else pair_with(slow, D, base, trained)
            )
            low, high = max(low, 0), min(high, D - 1)
            ramp = min(max((i - low) / (high - low), 0), 1)
            return ramp * plain / factor + (1 - ramp) * plain
        case Llama3(factor, low, high, trained):
            wavelength = 2 * math.pi / plain
            if wavelength < trained / high:
                return plain
            if wavelength > trained / low:
                return plain / factor
            smooth = (trained / wavelength - low) / (high - low)
            return (1 - smooth) * plain / factor + smooth * plain
    return plain


def pair_with(turns: float, D: int, base: float, length: int) -> float:
    left, right = -10.0 * D, 10.0 * D
    for _ in range(200):
        middle = (left + right) / 2
        # Fewer turns the later the pair.
        left, right = (middle, right) if length / (2 * math.pi * base ** (2 * middle / D)) > turns else (left, middle)
    return left


SCALINGS: list[Scaling | None] = [
    *(None, Linear(4.0), NTK(4.0), DynamicNTK(4.0, 100), DynamicNTK(2.0, 20), YaRN(16.0, 4096), YaRN(4, 300, 8, 2)),
    *(YaRN(32.0, 4096, 32.0, 1.0, truncate=False), YaRN(8.0, 2048, attention_factor=0.5), Llama3()),
    *(YaRN(8.0, 100), YaRN(4.0, 10**9, 1e6, 1.0)),  # a ramp that begins before the first pair, and beyond the last
    *(Llama3(32.0, 1.0, 4.0, 500), Llama3(4.0, 2.0, 3.0, 8192)),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=repr)
@pytest.mark.parametrize(("D", "base"), [(8, 10000.0), (64, 10000.0), (128, 500000.0)])
def test_tables(D: int, base: float, scaling: Scaling | None) -> None:
    """Each angle on its own, the position times the frequency."""
    length = 50
    magnitude = 1.0
    if isinstance(scaling, YaRN):
        magnitude = 0.1 * math.log(scaling.factor) + 1 if scaling.attention_factor is None else 0.5
    cos, sin = rotary_tables(length, D, base=base, scaling=scaling, dtype=np.float64)
    assert cos.shape == sin.shape == (length, D // 2)
    for p in (0, 1, 7, length - 1):
        for i in range(D // 2):
            z = magnitude * cmath.exp(1j * p * expected_frequency(scaling, i, D, base, length))
            assert abs(complex(cos[p, i], sin[p, i]) - z) < 1e-12, (p, i)


@pytest.mark.parametrize("number", [Fraction, Decimal, np.float32, np.int64])
def test_scalings_of_other_numbers(number: Any) -> None:
    """They are those of floats."""
    made = [
        *(Linear(number(2)), NTK(number(2)), DynamicNTK(number(2), np.int32(30))),  # type: ignore[arg-type]
        *(YaRN(number(2), 30, number(8), number(2), number(3)), Llama3(number(8), number(1), number(4), 500)),
    ]
    plain = Linear(2.0), NTK(2.0), DynamicNTK(2.0, 30), YaRN(2.0, 30, 8.0, 2.0, 3.0), Llama3(8.0, 1.0, 4.0, 500)
    for scaling, same in zip(made, plain, strict=True):
        assert repr(scaling) == repr(same)
        assert same_bits(rotary_tables(50, 8, scaling=scaling), rotary_tables(50, 8, scaling=same))


def test_scalings_reach_all_their_cases() -> None:
    """Fast, slow and between are there among the pairs of the test above."""
    turns = [turns_per_length(i, 128, 500000.0, 8192) for i in range(64)]
    assert any(n < 1 for n in turns) and any(1 < n < 4 for n in turns) and any(n > 4 for n in turns)
    factors = YaRN(16.0, 4096).frequencies(64, 1e4, 0) / Linear(1.0).frequencies(64, 1e4, 0)
    assert factors[0] == 1 and factors[-1] == 1 / 16 and np.any((factors < 0.9) & (factors > 0.1))


def test_yarn_without_a_ramp() -> None:
    """A length within which no pair turns so often, or all do: nothing is fast, or nothing is slow."""
    plain = Linear(1.0).frequencies(64, 1e4, 0)
    np.testing.assert_array_equal(YaRN(4.0, 1 << 62).frequencies(64, 1e4, 0), plain)
    np.testing.assert_allclose(YaRN(4.0, 2).frequencies(64, 1e4, 0)[1:], plain[1:] / 4)


def test_dynamic_scaling_follows_the_largest_position() -> None:
    scaling = DynamicNTK(4.0, 16)
    for length in (10, 16):
        assert same_bits(rotary_tables(length, 8, scaling=scaling)[0], rotary_tables(length, 8)[0])
    expected = rotary_tables(40, 8, scaling=scaling)[1]
    for positions in (np.array([3, 39, 7]), [3.0, 38.5, 7.0]):
        got = rotary_tables(positions, 8, scaling=scaling)[1]
        assert same_bits(got[[0, 2]], expected[[3, 7]])


def test_positions() -> None:
    cos, sin = rotary_tables(30, 16)
    assert cos.dtype == sin.dtype == np.float32
    positions = np.random.default_rng(0).integers(0, 30, (3, 5))
    for given_positions in (positions, positions.astype(np.float16), positions.tolist()):
        some_cos, some_sin = rotary_tables(given_positions, 16)
        assert same_bits(some_cos, cos[positions]) and same_bits(some_sin, sin[positions])
    before = rotary_tables(np.array([-4]), 16)
    assert same_bits(before[0], cos[[4]]) and same_bits(before[1], -sin[[4]])
    for empty in (0, np.empty((2, 0), int), []):
        assert rotary_tables(empty, 16)[0].size == 0


@pytest.mark.parametrize("name", EPS)
def test_tables_are_rounded_once(name: str) -> None:
    """At a position where angles in float32 are off by 0.03."""
    exact = rotary_tables([1_000_001], 32, dtype=np.float64)
    got = rotary_tables([1_000_001], 32, dtype=dtype_of(name))
    for table, truth in zip(got, exact, strict=True):
        assert same_bits(table, truth.astype(dtype_of(name)))


# Rotation -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EPS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("R", [16, 6, 0])
def test_rotation(R: int, interleaved: bool, name: str) -> None:
    """Of pairs as of complex numbers, from a position of each sequence, in both layouts."""
    x = normal(2, 3, 5, 16, dtype=dtype_of(name))
    cos, sin = rotary_tables(40, max(R, 2), dtype=np.float64 if name == "float64" else np.float32)
    cos, sin = cos[:, : R // 2], sin[:, : R // 2]
    for offset in (0, 7, np.array([35, 2]), [4, 4], np.int32(3)):
        positions = np.broadcast_to(np.asarray(offset).reshape(-1, 1), (2, 1)) + np.arange(5)
        got = apply_rotary(x, cos, sin, position_offset=offset, interleaved=interleaved)
        assert got.dtype == x.dtype
        assert_close(got, rotated(x, cos, sin, positions, interleaved))
        assert same_bits(got[..., R:], x[..., R:])
        options: dict[str, Any] = {"position_offset": offset, "interleaved": interleaved, "layout": "BLHD"}
        rows_first = apply_rotary(x.swapaxes(1, 2).copy(), cos, sin, **options)
        assert same_bits(rows_first.swapaxes(1, 2), got)


def test_forms_of_positions_agree() -> None:
    """An offset, one for each sequence, cut tables, and a table for each sequence."""
    x = normal(3, 2, 4, 8)
    cos, sin = rotary_tables(20, 8)
    offsets = np.array([5, 0, 16])
    expected = np.stack([apply_rotary(x[b], cos[n : n + 4], sin[n : n + 4]) for b, n in enumerate(offsets)])
    assert same_bits(apply_rotary(x, cos, sin, position_offset=offsets), expected)
    each = rotary_tables(offsets[:, None] + np.arange(4), 8)
    assert same_bits(apply_rotary(x, *each), expected)
    longer = [np.concatenate([np.full((3, 2, 4), np.nan, np.float32), table], axis=1) for table in each]
    assert same_bits(apply_rotary(x, *longer, position_offset=2), expected)
    longer[0][0], longer[1][0] = np.roll(longer[0][0], -1, 0), np.roll(longer[1][0], -1, 0)
    assert same_bits(apply_rotary(x, *longer, position_offset=[1, 2, 2]), expected)
    for shared, rows in (((1, 20, 4), None), ((1, 20, 4), offsets), ((20, 4), offsets)):
        options: dict[str, Any] = {} if rows is None else {"position_offset": rows}
        got = apply_rotary(x, cos.reshape(shared), sin.reshape(shared), **options)
        assert same_bits(got, apply_rotary(x, cos, sin) if rows is None else expected)
    two_axes = apply_rotary(x[:, None], *(table[:, None] for table in each))
    assert same_bits(two_axes[:, 0], expected)
    assert same_bits(apply_rotary(x[2], cos, sin, position_offset=16), expected[2])
    assert same_bits(apply_rotary(x[2, 1], cos, sin, position_offset=[16]), expected[2, 1])
    assert same_bits(apply_rotary(x[2, 1], cos, sin, position_offset=16, layout="BLHD"), expected[2, 1])


def test_pairings_are_permutations_of_each_other() -> None:
    x, (cos, sin) = normal(2, 3, 5, 12), rotary_tables(5, 8)
    order = [0, 4, 1, 5, 2, 6, 3, 7, *range(8, 12)]  # interleaved from halves
    halves = apply_rotary(x, cos, sin)
    assert same_bits(apply_rotary(x[..., order], cos, sin, interleaved=True), halves[..., order])
    assert not same_bits(apply_rotary(x, cos, sin, interleaved=True), halves)


@given(
    st.integers(1, 6),
    st.integers(0, 40),
    st.integers(0, 40),
    st.integers(0, 40),
    st.booleans(),
    st.sampled_from([scaling for scaling in SCALINGS if not isinstance(scaling, DynamicNTK | YaRN | NTK)]),
)
def test_scores_depend_on_differences(
    half: int, p: int, distance: int, shift: int, interleaved: bool, scaling: Scaling | None
) -> None:
    """As do lengths, which stay: also where the rest is not rotated."""
    query, key = normal(2, 1, 2 * half + 1, dtype=np.float64)
    tables = rotary_tables(140, 2 * half, scaling=scaling, dtype=np.float64)

    def at(x: np.ndarray, position: int) -> np.ndarray:
        return apply_rotary(x, *tables, position_offset=position, interleaved=interleaved)

    score = at(query, p + distance) @ at(key, p).T
    np.testing.assert_allclose(at(query, p + distance + shift) @ at(key, p + shift).T, score, rtol=0, atol=1e-12)
    np.testing.assert_allclose(at(query, distance) @ key.T, score, rtol=0, atol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(at(query, p)), np.linalg.norm(query), rtol=1e-14)


@given(st.data())
def test_any_problem(data: st.DataObject) -> None:
    """Random shapes, types, storage and positions; the input stays as it is, and out may be it."""
    B, H, L, D = (data.draw(st.integers(0, n)) for n in (3, 3, 6, 9))
    half = data.draw(st.integers(0, D // 2))
    x = normal(B, H, L, D, dtype=dtype_of(data.draw(st.sampled_from(list(EPS)))), seed=1)
    x = STORAGE[data.draw(st.sampled_from(list(STORAGE)))](x)
    before = x.copy()
    table_type = dtype_of(data.draw(st.sampled_from(list(EPS))))
    cos, sin = (normal(L + 9, half, dtype=table_type, seed=n) for n in (2, 3))
    offset = data.draw(st.one_of(st.integers(0, 9), st.lists(st.integers(0, 9), min_size=B, max_size=B)))
    offset = np.array(offset, np.int64)
    interleaved = data.draw(st.booleans())
    options: dict[str, Any] = {"position_offset": offset, "interleaved": interleaved}
    got = apply_rotary(x, cos, sin, **options)
    positions = np.broadcast_to(offset.reshape(-1, 1), (B, 1)) + np.arange(L)
    assert_close(got, rotated(before, cos, sin, positions, interleaved))
    assert same_bits(x, before)
    if x.flags.writeable:
        assert apply_rotary(x, cos, sin, out=x, **options) is x
        assert same_bits(x, got)


@pytest.mark.parametrize("name", EPS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_vectors_and_what_is_left_of_them(interleaved: bool, name: str) -> None:
    """Every number of pairs up to a few vectors, to the bits of the same arithmetic in NumPy; NaN stays as it is."""
    for half in range(36):
        x = normal(2, 2, 3, 2 * half + 3, dtype=dtype_of(name))
        x[..., 2 * half] = np.nan
        x.view(f"u{x.itemsize}")[..., 2 * half] ^= 1  # a payload
        cos, sin = rotary_tables(9, 72, dtype=np.float64 if name == "float64" else np.float32)
        cos, sin = cos[4:7, :half], sin[4:7, :half]
        a, b = np.arange(half) * (1 + interleaved), np.arange(half) * (1 + interleaved) + (1 if interleaved else half)
        expected = x.copy()
        first, second = (x[..., part].astype(cos.dtype) for part in (a, b))
        expected[..., a], expected[..., b] = cos * first - sin * second, sin * first + cos * second
        for form in STORAGE.values():
            assert same_bits(apply_rotary(form(x), cos, sin, interleaved=interleaved), expected), half


def test_threads_change_no_bit() -> None:
    x, (cos, sin) = normal(2, 5, 300, 64), rotary_tables(400, 64)
    expected = np.stack([apply_rotary(x[b], cos, sin, position_offset=b) for b in range(2)])
    assert x.size > rotation.SERIAL_SIZE
    for workers in (1, 2, 3):
        with threads.limit(workers):
            assert same_bits(apply_rotary(x, cos, sin, position_offset=[0, 1]), expected)


@pytest.mark.parametrize("form", STORAGE)
def test_out(form: str) -> None:
    x, (cos, sin) = normal(2, 3, 5, 8), rotary_tables(9, 6)
    out = STORAGE[form](np.full(x.shape, 7, x.dtype))
    out.setflags(write=True)
    assert apply_rotary(x, cos, sin, position_offset=4, out=out) is out
    assert same_bits(out, apply_rotary(x, cos, sin, position_offset=4))


def test_16_bits_are_rounded_once() -> None:
    for name in ("float16", "bfloat16"):
        x, (cos, sin) = normal(4, 50, 16, dtype=dtype_of(name)), rotary_tables(50, 16)
        expected = apply_rotary(x.astype(np.float32), cos, sin).astype(x.dtype)
        assert same_bits(apply_rotary(x, cos, sin), expected)


def test_what_is_not_finite_stays_where_it_is() -> None:
    x, (cos, sin) = normal(1, 4, 8), rotary_tables(4, 6)
    expected = apply_rotary(x, cos, sin)
    x[0, 1, 0], x[0, 2, 7] = np.nan, np.inf
    got = apply_rotary(x, cos, sin)
    changed = np.zeros(x.shape, bool)
    changed[0, 1, [0, 3]] = changed[0, 2, 7] = True
    np.testing.assert_array_equal(got[~changed], expected[~changed])
    assert np.isnan(got[0, 1, [0, 3]]).all() and got[0, 2, 7] == np.inf
    large = np.full((1, 4, 8), 60000, np.float16)
    assert np.isinf(apply_rotary(large, cos, sin)).any()


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (ValueError, "factor must be finite and at least 1, got 0.5", lambda: Linear(0.5)),
        (ValueError, "factor must be finite and at least 1, got nan", lambda: NTK(math.nan)),
        (TypeError, "factor must be a real number, got str", lambda: DynamicNTK("2", 10)),  # type: ignore[arg-type]
        (ValueError, "original_max_position must be between 1 and .*, got 0", lambda: DynamicNTK(2.0, 0)),
        (ValueError, "original_max_position must be between", lambda: YaRN(2.0, 10**400)),
        (ValueError, "original_max_position must be between", lambda: Llama3(original_max_position=10**400)),
        (ValueError, "beta_slow must be between 1e-100 and", lambda: YaRN(2.0, 8, beta_slow=1e-320)),
        (ValueError, r"beta_fast must be between 1e-100 and 1e\+100, got 1e\+308", lambda: YaRN(2.0, 8, 1e308)),
        (ValueError, "factor must leave the base finite, got 1e", lambda: rotary_tables(4, 4, scaling=NTK(1e200))),
        (ValueError, "factor must leave", lambda: rotary_tables(4, 4, base=1e300, scaling=NTK(1e5))),
        (TypeError, "original_max_position must be integers, got float", lambda: YaRN(2.0, 10.0)),  # type: ignore[arg-type]
        (ValueError, "beta_slow must be positive and less than beta_fast, got 3 and 3", lambda: YaRN(2.0, 10, 3, 3)),
        (ValueError, "attention_factor must be .* at least 0", lambda: YaRN(2.0, 10, attention_factor=-1.0)),
        (TypeError, "truncate must be True or False", lambda: YaRN(2.0, 10, truncate=1)),  # type: ignore[arg-type]
        (ValueError, "low_freq_factor must be positive and less than high_freq_factor", lambda: Llama3(8.0, 0.0)),
        (ValueError, "positions must be a number of positions, 0 or more, .* got -1", lambda: rotary_tables(-1, 8)),
        (TypeError, "positions must be integers, got float", lambda: rotary_tables(4.0, 8)),
        (TypeError, "positions must be integers or floating-point .* bool", lambda: rotary_tables(np.ones(2, bool), 8)),
        (ValueError, "positions must be an integer, or an array", lambda: rotary_tables(np.array(3), 8)),
        (ValueError, "positions must be finite, got inf", lambda: rotary_tables([0, math.inf], 8)),
        (ValueError, "positions must be an integer or an array: ", lambda: rotary_tables([[1], [2, 3]], 4)),
        (TypeError, "positions must not be a masked", lambda: rotary_tables(np.ma.array([1, 2], mask=[0, 1]), 4)),
        (ValueError, "D must be a positive even number, got 7", lambda: rotary_tables(4, 7)),
        (ValueError, "D must be a positive even number, got 0", lambda: rotary_tables(4, 0)),
        (ValueError, "D must be 4 or more for NTK", lambda: rotary_tables(4, 2, scaling=NTK(2.0))),
        (ValueError, "base must be finite and more than 1, got 1.0", lambda: rotary_tables(4, 8, base=1.0)),
        (TypeError, "scaling must be None or .*Llama3, got dict", lambda: rotary_tables(4, 8, scaling={})),  # type: ignore[arg-type]
        (TypeError, "dtype must be float32, .* got None", lambda: rotary_tables(4, 8, dtype=None)),
        (TypeError, "dtype must be float32, .* got '>f4'", lambda: rotary_tables(4, 8, dtype=">f4")),
        (TypeError, "dtype must be float32, .* got <class 'numpy.int64'>", lambda: rotary_tables(4, 8, dtype=np.int64)),
    ],
)
def test_errors_of_tables(error: type[Exception], message: str, make: Any) -> None:
    with pytest.raises(error, match=message):
        make()


X, (COS, SIN) = normal(2, 3, 5, 8), rotary_tables(9, 8)
STORED = np.zeros((2, 3, 6, 8), np.float32)


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (TypeError, "x must be a NumPy array, got list", {"x": X.tolist()}),
        (TypeError, "x must be float32, .* got int64", {"x": X.astype(np.int64)}),
        (ValueError, r"x must have at least 2 axes .* got shape \(8,\)", {"x": X[0, 0, 0]}),
        (TypeError, "cos must be float32, .* got complex64", {"cos": COS + 0j}),
        (TypeError, "sin must be a NumPy array, got None", {"sin": None}),
        (ValueError, r"same shape, got \(9, 4\) and \(8, 4\)", {"sin": SIN[1:]}),
        (
            ValueError,
            r"must have shape \(positions, R / 2\) or \(2, positions, R / 2\), got \(4,\)",
            {"cos": COS[0], "sin": SIN[0]},
        ),
        (ValueError, "cos and sin must have shape", {"cos": np.stack([COS] * 3), "sin": np.stack([SIN] * 3)}),
        (ValueError, "rotate 8 numbers, x has heads of 6", {"x": X[..., :6]}),
        (ValueError, "a row for each of the 5 of x, got 4", {"cos": COS[:4], "sin": SIN[:4]}),
        (ValueError, "position_offset must be between 0 and 4, got 5", {"position_offset": 5}),
        (ValueError, "position_offset must be between 0 and 4, got -1", {"position_offset": [0, -1]}),
        (ValueError, r"position_offset must be .* shape \(2,\), got shape \(3,\)", {"position_offset": [0, 1, 2]}),
        (TypeError, "position_offset must be integers, got float", {"position_offset": 1.0}),
        (TypeError, "interleaved must be True or False, got int", {"interleaved": 1}),
        (ValueError, "layout must be one of .* got 'LBHD'", {"layout": "LBHD"}),
        (TypeError, "out must be a NumPy array", {"out": "x"}),
        (TypeError, "out must be float32, as x is, got float64", {"out": X.astype(float)}),
        (ValueError, r"out must have shape \(2, 3, 5, 8\), got \(3, 5, 8\)", {"out": X[0]}),
        (ValueError, "out must be x itself, or share no memory", {"x": STORED[:, :, 1:], "out": STORED[:, :, :-1]}),
        (ValueError, "out must be x itself", {"x": STORED[:, :, :5], "out": STORED[::-1, :, :5]}),
        (ValueError, "out must not overlap itself", {"out": np.lib.stride_tricks.as_strided(X, X.shape, (4,) * 4)}),
    ],
)
def test_errors_of_rotation(error: type[Exception], message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        apply_rotary(**{"x": X, "cos": COS, "sin": SIN, **changes})
    assert not STORED.any()


def test_out_may_not_be_a_table() -> None:
    tables = np.ones((2, 6, 8), np.float32)
    with pytest.raises(ValueError, match="out must not share memory with cos or sin"):
        apply_rotary(tables[0], tables[0, :, :4], tables[1, :, :4], out=tables[1])
