"""Attention and its gradient in plain NumPy, in float64: the specification of this package and the oracle of its tests.

    score = score_mod(cap(scale * Q K^T) - slope * |p - j| + mask)
    Attention(Q, K, V) = dropout(softmax(score, where attended)) V

Memory and time are those of the whole (Lq, Lk) matrix of scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from numba_attn import random
from numba_attn.block_mask import FULL, PARTIAL, BlockMask
from numba_attn.gradient_problem import GradientProblem, SequenceGradients
from numba_attn.problem import Problem, Sequence, statistics_dtype


class Head(NamedTuple):
    """What one head of one sequence gives."""

    out: np.ndarray  # (Lq, Dv)
    lse: np.ndarray  # (Lq,)
    max_score: np.ndarray  # (Lq,)
    entropy: np.ndarray  # (Lq,)
    weight: np.ndarray  # (Lq, Lk), the probabilities before dropout
    sink_weight: np.ndarray  # (Lq,), that of the sink
    kept: np.ndarray  # (Lq, Lk), what dropout multiplies them by
    attended: np.ndarray  # (Lq, Lk) bool
    scores: Scores


class Scores(NamedTuple):
    """(Lq, Lk) scores of one head, before anything is masked, after each of the steps that make them."""

    capped: np.ndarray
    biased: np.ndarray
    final: np.ndarray


def forward(problem: Problem, precision: type[np.floating] = np.float64) -> None:
    """Compute `problem`, one head at a time, and write its results.

    Any other `precision` than float64 is for judging how accurate a computation in that precision can be.
    """
    B, Hq = problem.sizes[:2]
    for b in range(B):
        sequence = problem.sequence(b)
        for h in range(Hq):
            head = attend(problem, sequence, b, h, precision)
            sequence.out[h] = head.out
            for name in ("lse", "max_score", "entropy"):
                if (written := getattr(sequence, name)) is not None:
                    written[h] = getattr(head, name)
            if sequence.key_weight is not None:
                sequence.key_weight[h] = head.weight.sum(axis=0)


def attend(problem: Problem, sequence: Sequence, b: int, h: int, precision: type[np.floating] = np.float64) -> Head:
    """Head h of sequence b, whose arrays are given, in a precision."""
    shared = h // (len(sequence.query) // len(sequence.key))
    # In C order, as products of others may be rounded otherwise.
    operands = sequence.query[h], sequence.key[shared], sequence.value[shared]
    query, key, value = (x.astype(precision, order="C") for x in operands)
    mask = None if sequence.mask is None else sequence.mask[h if len(sequence.mask) > 1 else 0]
    attended = _attended(problem, mask, b, h, (len(query), len(key)))
    with np.errstate(all="ignore"):
        scores = _scores(problem, mask, b, h, query, key, precision)
        # What is masked is never used, whatever it holds: selected away, not multiplied by zero.
        score = np.where(attended, scores.final, precision(-np.inf))
        sink = precision(-np.inf if problem.sinks is None else problem.sinks[h])
        highest = score.max(axis=1, initial=-np.inf)
        largest = np.maximum(highest, sink)
        shift = np.where(largest == -np.inf, precision(0), largest)[:, None]
        weight = np.exp(score - shift)
        sink_weight = np.exp(sink - shift[:, 0])
        total = weight.sum(axis=1) + sink_weight
        max_score = np.where(np.isnan(total), np.nan, highest)
        whole = np.where(total == 0, precision(1), total)
        weight, sink_weight = np.where(attended, weight / whole[:, None], 0), sink_weight / whole
        lse = np.where(total == 0, -np.inf, largest + np.log(total))
        # Not from the lse: where scores are large, the logarithm of the sum is lost in it.
        log_total = np.log(whole)
        entropy = -_p_log_p(weight, score - shift - log_total[:, None]).sum(axis=1)
        entropy -= _p_log_p(sink_weight, sink - shift[:, 0] - log_total)
        kept = np.ones(score.shape, precision)
        if problem.dropout is not None:
            p, seed = problem.dropout
            kept = np.where(random.kept(b, h, score.shape, p, seed), 1 / precision(1 - p), precision(0))
        out = _weighted_sum(weight * kept, attended, value)
        return Head(out, lse, max_score, entropy, weight, sink_weight, kept, attended, scores)


def _scores(
    problem: Problem,
    mask: np.ndarray | None,
    b: int,
    h: int,
    query: np.ndarray,
    key: np.ndarray,
    precision: type[np.floating],
) -> Scores:
    capped = precision(problem.scale) * (query @ key.T)
    if problem.softcap is not None:
        capped = precision(problem.softcap) * np.tanh(capped / precision(problem.softcap))
    biased = capped
    if problem.slopes is not None:
        slope = problem.slopes[b if len(problem.slopes) > 1 else 0, h]
        biased = biased - precision(slope) * _distances(problem, b, capped.shape).astype(precision)
    if mask is not None and mask.dtype != bool:
        biased = biased + _rounded(problem, mask).astype(precision)
    final = biased if problem.score_mod is None else _apply(problem.score_mod, precision, biased.shape, b, h, biased)
    return Scores(capped, biased, final)


def _distances(problem: Problem, b: int, shape: tuple[int, int]) -> np.ndarray:
    """(Lq, Lk): how far each query's position is from each key."""
    Lq, Lk = shape
    position = np.arange(Lq)[:, None] + int(problem.intervals.table[b, 0])
    return np.abs(position - np.arange(Lk))


def _attended(problem: Problem, mask: np.ndarray | None, b: int, h: int, shape: tuple[int, int]) -> np.ndarray:
    """(Lq, Lk) bool: which keys each query of one head may attend to."""
    Lq, Lk = shape
    low, high = problem.intervals.bounds(b, Lq)
    keys = np.arange(Lk)
    attended: np.ndarray = (low[:, None] <= keys) & (keys < high[:, None])
    if mask is not None:
        attended &= mask if mask.dtype == bool else _rounded(problem, mask) != -np.inf
    if problem.mask_mod is not None:
        attended &= _apply(problem.mask_mod, np.bool_, (Lq, Lk), b, h)
    if problem.block_mask is not None:
        attended &= dense(problem.block_mask, b, h)[:Lq, :Lk]
    return attended


def _rounded(problem: Problem, mask: np.ndarray) -> np.ndarray:
    """An additive mask in the precision of the scores."""
    with np.errstate(over="ignore"):
        return mask.astype(statistics_dtype(problem.query.dtype))


def dense(mask: BlockMask, b: int, h: int) -> np.ndarray:
    """(Lq, Lk) bool of a block mask: its function where tiles are partial."""
    states = mask.states[b if mask.shape[0] > 1 else 0, h if mask.shape[1] > 1 else 0]
    Lq, Lk = mask.shape[2:]
    rows, columns = (np.arange(n) // size for n, size in zip((Lq, Lk), mask.block_size, strict=True))
    state = states[rows[:, None], columns] if states.size else np.empty((Lq, Lk), np.uint8)
    return (state == FULL) | ((state == PARTIAL) & _apply(mask.mask_mod, np.bool_, (Lq, Lk), b, h))


def _apply(
    function: Callable[..., Any],
    dtype: type[np.generic],
    shape: tuple[int, int],
    b: int,
    h: int,
    score: np.ndarray | None = None,
) -> np.ndarray:
    """A user's function of (b, h, i, j), or (score, b, h, i, j), at every element."""
    result = np.empty(shape, dtype)
    for i, j in np.ndindex(shape):
        result[i, j] = function(b, h, i, j) if score is None else function(score[i, j], b, h, i, j)
    return result


def _p_log_p(p: np.ndarray, log_p: np.ndarray) -> np.ndarray:
    return np.where(p == 0, 0, p * log_p)


# Gradients ------------------------------------------------------------------------------------------------------------


def backward(gradient: GradientProblem, precision: type[np.floating] = np.float64) -> None:
    """Compute gradients, one head at a time, and add them to what is to be written.

    With P the probabilities, M what dropout multiplies them by, dO and dL the gradients from above of output and lse:

        dV = (M P)^T dO,   dS = P (M (dO V^T) - sum(dO O) + dL),   dQ = scale * dS K,   dK = scale * dS^T Q

    where dS is first multiplied by the derivative of score_mod, after which it is the gradient of the mask, and by that
    of the cap.  Dao et al., "FlashAttention" (2022), appendix B.2.
    """
    B, Hq, Hkv = gradient.problem.sizes[:3]
    for b in range(B):
        sequence, parts = gradient.problem.sequence(b), gradient.sequence(b)
        for shared in range(Hkv):
            heads = range(shared * (Hq // Hkv), (shared + 1) * (Hq // Hkv))
            grads = [_add_gradients(gradient, sequence, parts, b, h, shared, precision) for h in heads]
            parts.key[shared], parts.value[shared] = (sum(each) for each in zip(*grads, strict=True))


def _add_gradients(
    gradient: GradientProblem,
    sequence: Sequence,
    parts: SequenceGradients,
    b: int,
    h: int,
    shared: int,
    precision: type[np.floating],
) -> tuple[np.ndarray, np.ndarray]:
    """Write or add the gradients of one head; returns its part of those of key and value."""
    problem = gradient.problem
    operands = sequence.query[h], sequence.key[shared], sequence.value[shared], parts.grad_out[h]
    query, key, value, grad_out = (x.astype(precision, order="C") for x in operands)
    head = attend(problem, sequence, b, h, precision)
    attended = head.attended

    def only_where_attended(x: np.ndarray) -> np.ndarray:
        return np.where(attended, x, precision(0))

    with np.errstate(all="ignore"):
        delta = np.where(attended.any(axis=1), (grad_out * head.out).sum(axis=1), precision(0))
        if parts.grad_lse is not None:
            delta = delta - parts.grad_lse[h].astype(precision)
        grad = only_where_attended(head.weight * (head.kept * (grad_out @ value.T) - delta[:, None]))
        if gradient.sinks is not None:
            gradient.sinks[h] -= (head.sink_weight * delta).sum()
        if problem.score_mod_grad is not None:
            slope = _apply(problem.score_mod_grad, precision, grad.shape, b, h, head.scores.biased)
            grad = only_where_attended(grad * slope)
        if parts.mask is not None:
            of_head = parts.mask[h if len(parts.mask) > 1 else 0]
            broadcast = tuple(axis for axis, n in enumerate(of_head.shape) if n == 1)
            of_head += grad.sum(axis=broadcast, keepdims=True)
        if parts.slopes is not None:
            parts.slopes[h] -= (grad * _distances(problem, b, grad.shape)).sum()
        if problem.softcap is not None:
            grad = only_where_attended(grad * (1 - (head.scores.capped / precision(problem.softcap)) ** 2))
        grad = precision(problem.scale) * grad
        # A score without a gradient has none to hand on to, whatever made it.
        used = grad != 0
        parts.query[h] = _weighted_sum(grad, used, key)
        grad_value = _weighted_sum((head.weight * head.kept).T, attended.T, grad_out)
        return _weighted_sum(grad.T, used.T, query), grad_value


def _weighted_sum(weight: np.ndarray, attended: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Weight @ value, in which a value that is not finite reaches only the rows that attend to it."""
    finite = np.isfinite(value)
    # A product of the same shape whatever is finite: that of fewer keys may sum in another order.
    out: np.ndarray = weight @ np.where(finite, value, 0)
    for j in np.flatnonzero(~finite.all(axis=1)):
        out += np.where(attended[:, j, None] & ~finite[j], weight[:, j, None] * value[j], 0)
    return out
