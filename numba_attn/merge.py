"""Exact merge of attention over parts of the keys, by the log-sum-exp of each part."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from numba_attn import arrays, checks
from numba_attn.arrays import Array

_MISSING = object()


def merge_attention(outs: Iterable[Array], lses: Iterable[Array]) -> tuple[Array, Array]:
    """Attention over all keys, from attention of the same queries to disjoint parts of them.

    With o_n and l_n the output and the log-sum-exp of part n, and l that of all keys,

        l = log(sum over n of exp(l_n)),   o = sum over n of exp(l_n - l) o_n

    which is what attention over all keys at once computes, up to rounding; so is the result for the parts in any other
    order.  The parts are read once, one after the other, and not kept: they may come from iterators.  Each output is
    asked for before its log-sum-exp, so that lses may be a list which an iterator of outs appends to.

    Shape letters: B batch (any number of axes, none included), Hq query heads, Lq query length, Dv value head size.

    Parameters
    ----------
    outs : one or more arrays (B, Hq, Lq, Dv) float32, float64, float16 or bfloat16
        Any strides.  Layout "BLHD", (B, Lq, Hq, Dv), does as well, as the axes of an lse are those of its output
        without the last in both.  Of any library, in host memory; lses are of the same.
    lses : as many arrays (B, Hq, Lq), floating point
        Natural logarithms, as `return_aux=("lse",)` gives them.  Where one is -inf, the part has nothing to attend to
        in that row and its output is not used, whatever it is.

    Returns
    -------
    out : (B, Hq, Lq, Dv) of the library and dtype of outs
        Accumulated in float64 if outs or lses are, else in float32, and rounded once.  0 where all parts are empty.
    lse : (B, Hq, Lq) of the dtype of the accumulation
        -inf where all parts are empty.  Both are NaN in the rows where an lse is NaN or +inf.

    Raises
    ------
    ValueError, TypeError
        No parts, not as many of one as of the other, shapes or dtypes that differ or are not floating point.  A part
        from an iterator is looked at when its turn comes.

    Notes
    -----
    A sink belongs to one part only: as each lse includes it, it would else be counted once for each.

    Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), section 3; Dao et al., "FlashAttention"
    (2022), section 3.1.

    Examples
    --------
    >>> import numpy as np
    >>> from numba_attn import scaled_dot_product_attention
    >>> query, key, value = np.random.default_rng(0).standard_normal((3, 8, 100, 64), dtype=np.float32)
    >>> parts = [
    ...     scaled_dot_product_attention(query, key[:, keys], value[:, keys], return_aux=("lse",))
    ...     for keys in (slice(30), slice(30, 100))
    ... ]
    >>> out, lse = merge_attention([out for out, _ in parts], [aux.lse for _, aux in parts])
    >>> bool(np.allclose(out, scaled_dot_product_attention(query, key, value), atol=1e-6))
    True
    """
    for name, parts in (("outs", outs), ("lses", lses)):
        if not isinstance(parts, Iterable):
            raise TypeError(f"{name} must be arrays, one for each part, got {checks.type_name(parts)}")
    merged: _Merged | None = None
    for n, (out, lse) in enumerate(itertools.zip_longest(outs, lses, fillvalue=_MISSING)):
        if out is _MISSING or lse is _MISSING:
            more, fewer = ("lses", "outs") if out is _MISSING else ("outs", "lses")
            raise ValueError(f"outs and lses must be as many, got {n} {fewer} and more {more}")
        part, kind = {f"outs[{n}]": out, f"lses[{n}]": lse}, checks.type_name(out)
        caller = arrays.adopt(part, tuple(part), on_host="where parts are merged")
        out, lse = (checks.floating_array(name, x) for name, x in part.items())
        if merged is None:
            merged = _Merged(out, lse, caller, kind)
        if caller.library is not merged.caller.library:
            raise TypeError(f"outs[0] and outs[{n}] must be arrays of one library, got {merged.kind} and {kind}")
        merged.check(n, out, lse)
        merged.add(out, lse)
    if merged is None:
        raise ValueError("outs must have one part or more, got none")
    return merged.caller.give(merged.result())  # type: ignore[no-any-return]


class _Merged:
    """The parts so far, relative to the largest log-sum-exp among them in each row."""

    def __init__(self, out: np.ndarray, lse: np.ndarray, caller: arrays.Caller, kind: str) -> None:
        if out.ndim < 2:
            raise ValueError(f"outs must have at least 2 axes (length, head size), got shape {out.shape}")
        self.caller, self.kind = caller, kind
        self.dtypes = out.dtype, lse.dtype
        dtype = np.float64 if np.float64 in self.dtypes else np.float32
        rows = out.shape[:-1]
        self.largest = np.full(rows, -np.inf, dtype)
        self.total = np.zeros(rows, dtype)  # sum of exp(lse - largest)
        self.weighted = np.zeros(out.shape, dtype)  # sum of exp(lse - largest) * out

    def check(self, n: int, out: np.ndarray, lse: np.ndarray) -> None:
        """Part n is like the first, and its two arrays fit each other."""
        for name, x, expected in (("outs", out, self.weighted), ("lses", lse, self.total)):
            if x.shape != expected.shape:
                raise ValueError(f"{name}[{n}] must have shape {expected.shape}, got {x.shape}")
        for name, x, dtype in zip(("outs", "lses"), (out, lse), self.dtypes, strict=True):
            if x.dtype != dtype:
                raise TypeError(f"{name}[{n}] must be {dtype}, as {name}[0] is, got {x.dtype}")

    def add(self, out: np.ndarray, lse: np.ndarray) -> None:
        lse = lse.astype(self.total.dtype, copy=False)
        with np.errstate(all="ignore"):  # what is not finite in a part is so in the result
            largest = np.maximum(self.largest, lse)
            # Empty so far: -inf - -inf is no number.  An lse of +inf gives inf - inf, NaN, as it should.
            reference = np.where(largest == -np.inf, 0, largest)
            before, weight = np.exp(self.largest - reference), np.exp(lse - reference)
            term = out * weight[..., None]
            term[lse == -np.inf] = 0  # as 0 times NaN is not
            self.weighted *= before[..., None]
            self.weighted += term
            self.total *= before
            self.total += weight
        self.largest = largest

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        with np.errstate(all="ignore"):
            lse: Any = self.largest + np.log(self.total)
            self.weighted /= np.where(self.total == 0, 1, self.total)[..., None]
            return self.weighted.astype(self.dtypes[0], copy=False), lse
