"""Attention in plain NumPy, in float64: the specification of this package and the oracle of its tests.

    Attention(Q, K, V) = softmax(scale * Q K^T + mask) V

Memory and time are those of the whole (Lq, Lk) matrix of scores.
"""

from __future__ import annotations

import numpy as np

from numba_attn.problem import Problem


def forward(problem: Problem, precision: type[np.floating] = np.float64) -> None:
    """Compute `problem`, one head at a time, and write its results.

    Any other `precision` than float64 is for judging how accurate a computation in that precision can be.
    """
    batch, (Hq, Lq, _) = problem.query.shape[:-3], problem.query.shape[-3:]
    Hkv, Lk = problem.key.shape[-3:-1]
    for b, index in enumerate(np.ndindex(batch)):
        low, high = problem.intervals.bounds(b, Lq)
        keys = np.arange(Lk)
        inside = (low[:, None] <= keys) & (keys < high[:, None])
        for h in range(Hq):
            shared = h // (Hq // Hkv)
            bias = None
            if problem.mask is not None:
                at = tuple(i if n > 1 else 0 for i, n in zip((*index, h), problem.mask.shape[:-2], strict=True))
                bias = problem.mask[at]
            out, lse = attend(
                problem.query[index][h],
                problem.key[index][shared],
                problem.value[index][shared],
                inside,
                bias,
                problem.scale,
                precision,
            )
            problem.out[index][h] = out
            if problem.lse is not None:
                problem.lse[index][h] = lse


def attend(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    inside: np.ndarray,
    mask: np.ndarray | None,
    scale: float,
    precision: type[np.floating] = np.float64,
) -> tuple[np.ndarray, np.ndarray]:
    """One head: query (Lq, D), key (Lk, D), value (Lk, Dv), inside (Lq, Lk) bool, mask broadcasting to (Lq, Lk).

    Returns out (Lq, Dv) and lse (Lq,), in the precision of the computation.

    >>> q = np.array([[1.0], [0.0]])
    >>> out, lse = attend(q, q, q, np.ones((2, 2), bool), np.array([[True, False], [True, True]]), 1.0)
    >>> out.ravel().tolist(), lse.tolist() == [1.0, np.log(2)]
    ([1.0, 0.5], True)
    """
    attended = inside
    with np.errstate(all="ignore"):
        score = precision(scale) * (query.astype(precision) @ key.astype(precision).T)
        if mask is not None and mask.dtype == bool:
            attended = attended & mask
        elif mask is not None:
            bias = mask.astype(query.dtype).astype(precision)
            attended = attended & (bias != -np.inf)
            score = score + bias
        # What is masked is never used, whatever it holds: selected away, not multiplied by zero.
        score = np.where(attended, score, precision(-np.inf))
        largest = score.max(axis=1, initial=-np.inf)
        weight = np.exp(score - np.where(largest == -np.inf, precision(0), largest)[:, None])
        total = weight.sum(axis=1)
        weight = weight / np.where(total == 0, precision(1), total)[:, None]
        lse = np.where(total == 0, -np.inf, largest + np.log(total))
        return _weighted_sum(weight, attended, value.astype(precision)), lse


def _weighted_sum(weight: np.ndarray, attended: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Weight @ value, in which a value that is not finite reaches only the rows that attend to it."""
    finite = np.isfinite(value).all(axis=1)
    out = weight[:, finite] @ value[finite]
    for j in np.flatnonzero(~finite):
        out += np.where(attended[:, j, None], weight[:, j, None] * value[j], 0)
    return out
