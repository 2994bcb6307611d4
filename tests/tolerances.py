"""How close is close enough.

A result is as accurate as its precision allows if its largest error against float64 is at most twice that of the same
computation in plain NumPy at that precision, plus a floor; and never above a cap.  The floor is what single roundings
come to: of the results themselves, and of the scores, where one unit in the last place of a score s moves a probability
by |s| units in its last place.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from numba_attn import reference
from numba_attn.problem import Problem

CAPS = {np.dtype(np.float32): 3e-5, np.dtype(np.float64): 1e-12}
DEFAULTS: dict[str, Any] = {
    "attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False,
    "query_offset": 0, "window": None, "query_lengths": None, "kv_lengths": None, "softcap": None, "alibi_slopes": None,
    "sinks": None, "score_mod": None, "mask_mod": None, "block_mask": None, "dropout_seed": None,
    "return_aux": ("lse",), "out": None, "layout": "BHLD", "precision": None,
}  # fmt: skip


def exact(query: np.ndarray, key: np.ndarray, value: np.ndarray, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Out and lse in float64, computed in more than that for float64 problems (where NumPy has more).

    An additive mask is first rounded to query's dtype, as the interface says.
    """
    more = np.longdouble if query.dtype == np.float64 else np.float64
    mask = options.get("attn_mask")
    if mask is not None and mask.dtype != bool:
        with np.errstate(over="ignore"):
            options = {**options, "attn_mask": mask.astype(query.dtype).astype(np.float64)}
    return compute(*(x.astype(np.float64) for x in (query, key, value)), more, **options)


def compute(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, precision: type[np.floating], **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Out and lse by plain NumPy in a precision."""
    problem = Problem.from_call(query, key, value, **{**DEFAULTS, **options})
    reference.forward(problem, precision)
    assert problem.aux is not None
    return problem.result, problem.aux.lse


def assert_accurate(
    out: np.ndarray, lse: np.ndarray, query: np.ndarray, key: np.ndarray, value: np.ndarray, **options: Any
) -> None:
    """Hold a result against float64, in the sense above; NaN and infinities must be the same."""
    precise = exact(query, key, value, **options)
    plain = compute(query, key, value, query.dtype.type, **options)
    largest_score = float(np.abs(precise[1][np.isfinite(precise[1])]).max(initial=0))
    for name, got, truth, rough in zip(("out", "lse"), (out, lse), precise, plain, strict=True):
        assert got.shape == truth.shape and got.dtype == query.dtype, name
        finite = np.isfinite(truth)
        assert np.array_equal(got[~finite], truth[~finite].astype(got.dtype), equal_nan=True), name
        if not finite.any():
            continue
        scale = max(1.0, float(np.abs(truth[finite]).max()))
        floor = (4 + largest_score) * float(np.finfo(query.dtype).eps) * scale
        error = float(np.abs(got[finite] - truth[finite]).max())
        rough_error = float(np.nanmax(np.abs(rough[finite] - truth[finite])))
        allowed = 2 * rough_error + floor
        assert error <= allowed, f"{name}: error {error:.2e}, plain NumPy in {query.dtype} {rough_error:.2e}"
        assert error <= max(CAPS[query.dtype] * scale, allowed * (rough_error > CAPS[query.dtype])), (
            f"{name}: {error:.2e}"
        )
