"""Rotary position embedding: pairs of numbers of a query or key, rotated by angles in proportion to its position.

With z_i the i-th pair as a complex number, and p the position, rotation makes z_i exp(1j p f_i) of it, at frequencies
f_i = base^(-2 i / D).  Scores then depend on differences of positions only.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), section 3.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from numba_attn import arrays, checks
from numba_attn.arrays import Array

# Scalings: frequencies for sequences longer than a model was trained on -----------------------------------------------


@dataclass(frozen=True)
class Linear:
    """Position interpolation: all frequencies divided by factor, a number of at least 1.

    Chen et al., "Extending Context Window of Large Language Models via Positional Interpolation" (2023), equation 4.
    """

    factor: float

    def __post_init__(self) -> None:
        _number(self, "factor", least=1)

    def frequencies(self, D: int, base: float, length: int) -> np.ndarray:
        return _frequencies(D, base) / self.factor


@dataclass(frozen=True)
class NTK:
    """NTK-aware scaling: base * factor^(D / (D - 2)) for base, with factor at least 1.

    The slowest pair is slowed by factor, the fastest not at all.

    Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models" (2023), definition 1.
    """

    factor: float

    def __post_init__(self) -> None:
        _number(self, "factor", least=1)

    def frequencies(self, D: int, base: float, length: int) -> np.ndarray:
        if D < 4:
            raise ValueError(f"D must be 4 or more for NTK-aware scaling, got {D}")
        try:
            slowed = base * self.factor ** (D / (D - 2))
        except OverflowError:
            slowed = math.inf
        if slowed == math.inf:
            raise ValueError(f"factor must leave the base finite, got {self.factor} for base {base}")
        return _frequencies(D, slowed)


@dataclass(frozen=True)
class DynamicNTK:
    """NTK-aware scaling by as much as the length of the sequence, n, asks for.

    The factor is that of `NTK`, as factor * n / original_max_position - (factor - 1) for n > original_max_position, and
    1 up to there.  n is the number of positions, or the largest of them and 1, so tables for different lengths differ;
    what has been rotated by one must not be compared with what has been rotated by another.

    Peng et al., "YaRN" (2023), section 3.3; with the factor as in Hugging Face's transformers.
    """

    factor: float
    original_max_position: int

    def __post_init__(self) -> None:
        _number(self, "factor", least=1)
        _length(self)

    def frequencies(self, D: int, base: float, length: int) -> np.ndarray:
        excess = max(length / self.original_max_position, 1.0) - 1
        return NTK(1 + self.factor * excess).frequencies(D, base, length)


@dataclass(frozen=True)
class YaRN:
    """Fast pairs as they are, slow ones divided by factor, a ramp between; and longer queries and keys.

    Pairs that turn beta_fast times or more within original_max_position are fast, those that turn beta_slow times or
    fewer are slow; the ramp is linear in the number of the pair, its ends rounded outwards if `truncate`.  cos and sin
    are multiplied by attention_factor, 0.1 log(factor) + 1 if None, so that scores are by its square.

    Peng et al., "YaRN" (2023), sections 3.2 to 3.4, with the ramp of its reference implementation.
    """

    factor: float
    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _number(self, "factor", least=1)
        _length(self)
        _in_order(self, "beta_slow", "beta_fast")
        if self.attention_factor is not None:
            _number(self, "attention_factor", least=0)
        checks.flag("truncate", self.truncate)

    def frequencies(self, D: int, base: float, length: int) -> np.ndarray:
        low, high = (self._pair(turns, D, base) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low = max(low, 0)
        high = max(min(high, D - 1), low + 0.001)  # a step where there is no room for a ramp
        slow = np.clip((np.arange(D // 2) - low) / (high - low), 0, 1)
        return _frequencies(D, base) * (1 - slow + slow / self.factor)

    def _pair(self, turns: float, D: int, base: float) -> float:
        """The pair, a real number, that makes so many turns within the original length."""
        return D * math.log(self.original_max_position / (2 * math.pi * turns)) / (2 * math.log(base))

    def magnitude(self) -> float:
        return 0.1 * math.log(self.factor) + 1 if self.attention_factor is None else self.attention_factor


@dataclass(frozen=True)
class Llama3:
    """Fast pairs as they are, slow ones divided by factor, a ramp between.

    Pairs that turn high_freq_factor times or more within original_max_position are fast, those that turn
    low_freq_factor times or fewer are slow; the ramp is linear in the number of turns.

    Meta's Llama 3.1 model card and reference code (2024), whose numbers are the defaults.
    """

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192

    def __post_init__(self) -> None:
        _number(self, "factor", least=1)
        _in_order(self, "low_freq_factor", "high_freq_factor")
        _length(self)

    def frequencies(self, D: int, base: float, length: int) -> np.ndarray:
        plain = _frequencies(D, base)
        turns = self.original_max_position * plain / (2 * math.pi)
        fast = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return plain * (fast + (1 - fast) / self.factor)


Scaling = Linear | NTK | DynamicNTK | YaRN | Llama3
_LONGEST = (1 << 63) - 1
_FEWEST, _MOST = 1e-100, 1e100  # turns, of which the logarithm is taken within any length


def _frequencies(D: int, base: float) -> np.ndarray:
    """(D / 2,) angles per position, in radians."""
    return base ** (-np.arange(0, D, 2) / D)


# Each checks a field of a scaling, and keeps it as a number of Python's: others that are one do not go with floats.


def _number(scaling: Scaling, name: str, least: float) -> None:
    x = checks.number(name, getattr(scaling, name))
    if not least <= x < math.inf:
        raise ValueError(f"{name} must be finite and at least {least}, got {x}")
    object.__setattr__(scaling, name, x)


def _length(scaling: DynamicNTK | YaRN | Llama3) -> None:
    n = checks.integer("original_max_position", scaling.original_max_position)
    if not 1 <= n <= _LONGEST:
        raise ValueError(f"original_max_position must be between 1 and {_LONGEST}, got {n}")
    object.__setattr__(scaling, "original_max_position", n)


def _in_order(scaling: YaRN | Llama3, low_name: str, high_name: str) -> None:
    low, high = (checks.number(name, getattr(scaling, name)) for name in (low_name, high_name))
    if not 0 < low < high:
        raise ValueError(f"{low_name} must be positive and less than {high_name}, got {low:g} and {high:g}")
    for name, x in ((low_name, low), (high_name, high)):
        if not _FEWEST <= x <= _MOST:
            raise ValueError(f"{name} must be between {_FEWEST} and {_MOST}, got {x}")
        object.__setattr__(scaling, name, x)


# Tables ---------------------------------------------------------------------------------------------------------------


def rotary_tables(
    positions: Any, D: int, *, base: float = 10000.0, scaling: Scaling | None = None, dtype: Any = np.float32
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of the angles by which `apply_rotary` rotates.

    Parameters
    ----------
    positions : int, or (L,) or (..., L) numbers
        L for positions 0 to L - 1; or the positions themselves, finite integers or floating-point numbers.
    D : int
        How many numbers of a head are rotated, an even number; the head size, but for partial rotary embedding.
    base : float
        More than 1: pair i turns by base^(-2 i / D) radians from one position to the next.
    scaling : Linear, NTK, DynamicNTK, YaRN or Llama3, of `numba_attn.rotary`, optional
        Other frequencies, for sequences longer than those of the training.
    dtype : float32, float64, float16 or bfloat16
        Of the tables.  All is computed in float64 and rounded once.

    Returns
    -------
    cos, sin : (L, D / 2), or (..., L, D / 2)

    Raises
    ------
    ValueError, TypeError
        Values, and types, that do not fit.

    Notes
    -----
    Su et al., "RoFormer" (2021), equation 15.

    Examples
    --------
    >>> cos, sin = rotary_tables(3, 4)
    >>> cos.shape
    (3, 2)
    >>> sin.round(3)
    array([[0.   , 0.   ],
           [0.841, 0.01 ],
           [0.909, 0.02 ]], dtype=float32)
    >>> cos, sin = rotary_tables(131072, 128, base=500000.0, scaling=Llama3(factor=8.0))
    """
    where = _positions(positions)
    D = checks.integer("D", D)
    if D < 2 or D % 2:
        raise ValueError(f"D must be a positive even number, got {D}")
    base = checks.number("base", base)
    if not 1 < base < math.inf:
        raise ValueError(f"base must be finite and more than 1, got {base}")
    if scaling is not None and not isinstance(scaling, Scaling):
        raise TypeError(f"scaling must be None or one of {Scaling}, got {checks.type_name(scaling)}")
    dtype = checks.dtype(dtype)
    length = math.ceil(where.max(initial=-1)) + 1  # of the sequence, as far as the positions tell
    frequencies = _frequencies(D, base) if scaling is None else scaling.frequencies(D, base, length)
    magnitude = scaling.magnitude() if isinstance(scaling, YaRN) else 1.0
    angles = where[..., None] * frequencies
    return (magnitude * np.cos(angles)).astype(dtype), (magnitude * np.sin(angles)).astype(dtype)


def _positions(positions: Any) -> np.ndarray:
    """As float64, which holds integers up to 2**53."""
    positions = checks.on_host("positions", positions)
    if not isinstance(positions, np.ndarray | list | tuple):
        length = checks.integer("positions", positions)
        if length < 0:
            raise ValueError(f"positions must be a number of positions, 0 or more, or an array of them, got {length}")
        return np.arange(length, dtype=np.float64)
    if isinstance(positions, np.ma.MaskedArray):
        raise TypeError("positions must not be a masked array")
    try:
        where = np.asarray(positions)
    except ValueError as error:  # lists of different lengths
        raise ValueError(f"positions must be an integer or an array: {error}") from None
    if where.ndim == 0:
        raise ValueError("positions must be an integer, or an array of one axis or more, got one of none")
    if where.size and where.dtype.kind not in "iuf":
        raise TypeError(f"positions must be integers or floating-point numbers, got {where.dtype}")
    where = where.astype(np.float64)
    if not np.isfinite(where).all():
        raise ValueError(f"positions must be finite, got {where[~np.isfinite(where)][0]}")
    return where


# Rotation -------------------------------------------------------------------------------------------------------------


def apply_rotary(
    x: Array,
    cos: Any,
    sin: Any,
    *,
    position_offset: Any = 0,
    interleaved: bool = False,
    layout: str = "BHLD",
    out: Array | None = None,
) -> Array:
    """Rotate the queries or keys x by the angles of their positions.

    Shape letters: B batch (any number of axes, none included), H heads, L length, D head size, R <= D the even number
    of numbers that are rotated, the first of each head; the others stay as they are.

    Parameters
    ----------
    x : (B, H, L, D) float32, float64, float16 or bfloat16 (of ml_dtypes)
        Any strides, of any library in host memory.  Rank 3 is (H, L, D), rank 2 is (L, D).
    cos, sin : (positions, R / 2), or (B, positions, R / 2), floating point
        As `rotary_tables` gives them; with B, each sequence has its own, or all have one where B is 1.
    position_offset : int or (B,) ints
        Row i of x is rotated by row position_offset + i of the tables, which must have it.
    interleaved : bool
        Whether pair i is numbers 2 i and 2 i + 1 (GPT-J), or i and i + R / 2 (GPT-NeoX, Llama).
    layout : "BHLD" or "BLHD"
        Whether heads or rows come first in x and out.
    out : array of x's shape and dtype, optional
        Where to write the result; may be x itself, must not overlap with it, or with a table, in any other way.

    Returns
    -------
    array of x's library, shape and dtype
        Computed in float64 if x or a table is, else in float32, and rounded once.

    Raises
    ------
    ValueError, TypeError
        Shapes or values, and dtypes, that do not fit, tables without the positions needed among them; nothing has been
        computed or written then.

    Notes
    -----
    (a, b) becomes (a cos - b sin, a sin + b cos): Su et al., "RoFormer" (2021), equation 34.

    Examples
    --------
    >>> import numpy as np
    >>> cos, sin = rotary_tables(512, 64)
    >>> query = np.ones((2, 8, 100, 64), np.float32)
    >>> bool(np.allclose(apply_rotary(query, cos, sin)[:, :, 7:9], apply_rotary(query[:, :, :2], cos, sin,
    ...     position_offset=7)))
    True
    """
    given: dict[str, Any] = {"x": x, "out": out}
    caller = arrays.adopt(given, tuple(given), on_host="where it is rotated")
    return caller.give(_rotated(given["x"], (cos, sin), position_offset, interleaved, layout, given["out"]))


def _rotated(x: Any, tables: tuple[Any, Any], offset: Any, interleaved: Any, layout: Any, out: Any) -> np.ndarray:
    x = checks.floating_array("x", x)
    if x.ndim < 2:
        raise ValueError(f"x must have at least 2 axes (length, head size), got shape {x.shape}")
    layout, interleaved = checks.layout(layout), checks.flag("interleaved", interleaved)
    heads = checks.heads_first(x, layout)
    cos, sin = _tables(*tables, heads)
    offset = _offset(offset, cos.shape[-2], heads)
    result: np.ndarray = np.empty(x.shape, x.dtype) if out is None else _output(out, x, cos, sin)
    _rotate(heads, cos, sin, offset, interleaved, checks.heads_first(result, layout))
    return result


def _tables(cos: Any, sin: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both checked against each other and x, (*batch, H, L, D)."""
    cos, sin = checks.floating_array("cos", cos), checks.floating_array("sin", sin)
    if cos.shape != sin.shape:
        raise ValueError(f"cos and sin must have the same shape, got {cos.shape} and {sin.shape}")
    batch, D, rows = x.shape[:-3], x.shape[-1], cos.shape[-2:]
    own = cos.shape[:-2]
    if cos.ndim < 2 or (
        own and (len(own) != len(batch) or any(n not in (1, m) for n, m in zip(own, batch, strict=True)))
    ):
        expected = "(positions, R / 2)" + (f" or ({', '.join(map(str, batch))}, positions, R / 2)" if batch else "")
        raise ValueError(f"cos and sin must have shape {expected}, got {cos.shape}")
    if 2 * rows[-1] > D:
        raise ValueError(f"cos and sin of shape {cos.shape} rotate {2 * rows[-1]} numbers, x has heads of {D}")
    if own:
        cos, sin = (np.broadcast_to(table, (*batch, *rows)) for table in (cos, sin))
    return cos, sin


def _offset(position_offset: Any, positions: int, x: np.ndarray) -> np.ndarray:
    """One integer, or (B,), such that a table of that many positions has the rows of x, (*batch, H, L, D)."""
    batch, L = x.shape[:-3], x.shape[-2]
    if positions < L:
        raise ValueError(f"cos and sin must have a row for each of the {L} of x, got {positions}")
    return np.asarray(checks.integers("position_offset", position_offset, batch, 0, positions - L), np.int64)


def _output(out: Any, x: np.ndarray, *tables: np.ndarray) -> np.ndarray:
    out = checks.output_array(out, x.shape, x.dtype, like="x")
    if any(checks.overlap(out, table) for table in tables):
        raise ValueError("out must not share memory with cos or sin")
    is_x = out.strides == x.strides and out.__array_interface__["data"] == x.__array_interface__["data"]
    if not is_x and checks.overlap(out, x):
        raise ValueError("out must be x itself, or share no memory with it")
    return out


def _rotate(
    x: np.ndarray, cos: np.ndarray, sin: np.ndarray, offset: np.ndarray, interleaved: bool, out: np.ndarray
) -> None:
    """Of (*batch, H, L, D), into out."""
    from numba_attn.cpu import rotation

    dtype = np.dtype(np.float64 if np.float64 in (x.dtype, cos.dtype, sin.dtype) else np.float32)
    if dtype == np.float64 and x.dtype != dtype:
        exact = x.astype(dtype)
        _rotate(exact, cos, sin, offset, interleaved, exact)
        with np.errstate(over="ignore"):
            out[...] = exact
        return
    if not x.size:
        return
    low, high = int(offset.min()), int(offset.max()) + x.shape[-2]
    cos, sin = (_in_rows(table[..., low:high, :], dtype) for table in (cos, sin))
    offsets = (offset - low).reshape(x.shape[:-3] if offset.size > 1 else (1,))
    if x.ndim == 3:
        rotation.run(x[None], cos[None], sin[None], out[None], offsets, interleaved)
        return
    for outer in np.ndindex(x.shape[:-4]):
        c, s = (table[outer] if table.ndim > 2 else table[None] for table in (cos, sin))
        own = offsets[outer] if offset.size > 1 else offsets
        rotation.run(x[outer], c, s, out[outer], own, interleaved)


def _in_rows(table: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A table of that dtype, the numbers of a row one behind the other."""
    if table.dtype == dtype and table.strides[-1] == dtype.itemsize:
        return table
    return np.ascontiguousarray(table, dtype)
