"""How close is close enough.

A result is as accurate as its precision allows if its largest error against float64 is at most twice that of the same
computation in plain NumPy at that precision, plus a floor; and never above a cap.  The floor is what single roundings
come to: of the results themselves, and of the scores, where one unit in the last place of a score s moves a probability
by |s| units in its last place.

The precision is float32 for problems of 16 bits, of which only the output is rounded to its own type.  Where products
are those of bfloat16 numbers, the probabilities may be rounded to that type, and float32 input may have been.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from numba_attn import Aux, reference
from numba_attn.checks import is_bfloat16
from numba_attn.problem import AUX_NAMES, Problem, statistics_dtype

CAPS = {np.dtype(np.float32): 3e-5, np.dtype(np.float64): 1e-12}
BFLOAT16_EPS = 2.0**-7
DEFAULTS: dict[str, Any] = {
    "attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False,
    "query_offset": 0, "window": None, "query_lengths": None, "kv_lengths": None, "softcap": None, "alibi_slopes": None,
    "sinks": None, "score_mod": None, "mask_mod": None, "block_mask": None, "dropout_seed": None,
    "return_aux": AUX_NAMES, "out": None, "layout": "BHLD", "precision": None,
}  # fmt: skip


def exact(query: np.ndarray, key: np.ndarray, value: np.ndarray, **options: Any) -> dict[str, np.ndarray]:
    """Every result in float64, computed in more than that for float64 problems (where NumPy has more)."""
    return compute(query, key, value, np.longdouble if query.dtype == np.float64 else np.float64, **options)


def compute(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, arithmetic: type[np.floating], **options: Any
) -> dict[str, np.ndarray]:
    """Every result, "out" and the names of `Aux`, by plain NumPy in a precision, none of them rounded to 16 bits.

    An additive mask is first rounded to the precision of the scores, as the interface says.
    """
    held = np.promote_types(statistics_dtype(query.dtype), np.float64 if arithmetic is np.longdouble else arithmetic)
    mask = options.get("attn_mask")
    if mask is not None and mask.dtype != bool:
        with np.errstate(over="ignore"):
            options = {**options, "attn_mask": mask.astype(statistics_dtype(query.dtype)).astype(held)}
    options = {**DEFAULTS, **options, "return_aux": AUX_NAMES, "precision": None}
    problem = Problem.from_call(*(x.astype(held) for x in (query, key, value)), **options)
    reference.forward(problem, arithmetic)
    assert problem.aux is not None
    return {"out": problem.result, **problem.aux._asdict()}


def assert_accurate(
    out: np.ndarray,
    aux: Aux | None,
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    *,
    rounded_weights: bool = False,
    **options: Any,
) -> None:
    """Hold a result and its statistics against float64, in the sense above; NaN and infinities must be the same.

    `rounded_weights`: of kernels that round probabilities to float16 too, where that is the type of the arrays.
    """
    results = {"out": out, **({} if aux is None else {k: x for k, x in aux._asdict().items() if x is not None})}
    working = statistics_dtype(query.dtype)
    for name, got in results.items():
        assert got.dtype == (query.dtype if name == "out" else working), f"{name} is {got.dtype}"
    arrays = query, key, value
    complaints = _complaints(results, arrays, options, rounded_weights=rounded_weights)
    if complaints and options.get("precision") == "bfloat16" and query.dtype == np.float32:
        complaints = _complaints(results, tuple(bfloat16(x) for x in arrays), options, products_slack=True)
    assert not complaints, "; ".join(complaints)


def _complaints(
    results: dict[str, np.ndarray],
    arrays: tuple[np.ndarray, ...],
    options: dict[str, Any],
    products_slack: bool = False,
    rounded_weights: bool = False,
) -> list[str]:
    """What is wrong with these results of a problem, in words."""
    dtype, rows, found = arrays[0].dtype, arrays[0].shape[-2], []
    working = statistics_dtype(dtype)
    truths = exact(*arrays, **options)
    plain: dict[str, np.ndarray] = {}  # computed where the floor is not enough
    score = max(_largest(truths["lse"]), _largest(truths["max_score"]))
    largest_value = max(1.0, _largest(arrays[2])) / (1 - options.get("dropout_p", 0.0))
    for name in results:
        truth, got = (x[name].astype(np.float64) for x in (truths, results))
        finite = np.isfinite(truth)
        if got.shape != truth.shape or not np.array_equal(got[~finite], truth[~finite], equal_nan=True):
            found.append(f"{name}: shape {got.shape}, or what is not finite, differs from {truth.shape}")
            continue
        truth, got = truth[finite], got[finite]
        if not finite.any():
            continue
        scale = max(1.0, float(np.abs(truth).max()))
        roundings = 4 + score
        if name == "entropy":
            roundings *= 2  # a difference of terms as large as scores
        elif name in ("lse", "max_score"):
            roundings += 11  # found as an exponent, of up to 16 in base 2, relative to another score
        elif name == "key_weight":
            # A sum over rows, of scores that are made a second time: few rows by products in another order.
            roundings += rows + _largest_product(*arrays[:2], options.get("scale"))
        floor = roundings * float(np.finfo(working).eps) * scale
        cap = CAPS[working] * scale * (1 if name == "out" else max(1, score))
        slack: Any = 0.0
        if name == "out" and working != dtype:
            slack = largest_value * (2.0**-8 if is_bfloat16(dtype) else 2.0**-11 if rounded_weights else 0.0)
            slack = slack + np.abs(truth) * (BFLOAT16_EPS if is_bfloat16(dtype) else float(np.finfo(dtype).eps))
        if products_slack:
            slack = BFLOAT16_EPS * (1 + score / 8) * (largest_value if name == "out" else scale)
        error = np.abs(got - truth)
        if (error <= min(floor, cap) + slack).all():
            continue
        plain = plain or compute(*arrays, working.type, **options)
        rough_error = float(np.nanmax(np.abs(plain[name].astype(np.float64)[finite] - truth)))
        allowed = 2 * rough_error + floor
        if rough_error <= CAPS[working]:
            allowed = min(allowed, cap)
        excess = error - (allowed + slack)
        if not (excess <= 0).all():
            worst = int(np.argmax(np.where(np.isnan(excess), np.inf, excess)))
            found.append(
                f"{name}: error {abs(got[worst] - truth[worst]):.2e} of {truth[worst]:.3g}, allowed {allowed:.2e}, "
                f"plain NumPy in {working} has {rough_error:.2e}"
            )
    return found


def _largest(x: np.ndarray) -> float:
    """Of the finite numbers."""
    x = x.astype(np.float64)
    return float(np.abs(x[np.isfinite(x)]).max(initial=0))


def _largest_product(query: np.ndarray, key: np.ndarray, scale: float | None) -> float:
    """A bound for the terms that a score is the sum of, all together: what its rounding is relative to."""
    D = query.shape[-1]
    lengths = [_largest(np.linalg.norm(x.astype(np.float64), axis=-1)) if x.size else 0.0 for x in (query, key)]
    return abs(1 / np.sqrt(max(D, 1)) if scale is None else scale) * lengths[0] * lengths[1]


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Finite float32 numbers rounded to those that bfloat16 has, ties to even."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def same_bits(a: Any, b: Any) -> bool:
    """Whether two arrays, or two `Aux`, have the same numbers and types; NaN is like NaN."""
    if isinstance(a, tuple):
        return all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    if a is None or b is None:
        return a is b
    if a.dtype != b.dtype:
        return False
    return np.array_equal(a.astype(np.float64), b.astype(np.float64), equal_nan=True)  # exact, of 16 bits too
