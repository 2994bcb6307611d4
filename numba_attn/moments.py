"""Mean and variance of scores scale * q_i . k_j over the pairs of query and key that are attended to.

Of keys j in a range, sum_j s_ij^2 = scale^2 q_i^T (sum_j k_j k_j^T) q_i: a matrix of D x D, which grows and shrinks at
its ends while the range moves with the rows, takes the place of the scores.  So causal, window and lengths need
O(L D^2) instead of O(L^2 D); only where ranges begin and end within a block of rows are scores made.  What other masks
leave is looked at in a sample of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from numba_attn.problem import Problem, statistics_dtype
from numba_attn.row_weights import single_rows

BLOCK = 128  # query rows at once
SCORES = 1 << 22  # of the sample, in memory at once


class Sums(NamedTuple):
    """Of each head, over sequences, rows and keys, in float64."""

    pairs: np.ndarray  # (Hq,)
    first: np.ndarray  # (Hq,) of scores
    second: np.ndarray  # (Hq,) of their squares

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance, NaN where there is nothing."""
        with np.errstate(all="ignore"):
            mean = self.first / self.pairs
            return mean, np.maximum(self.second / self.pairs - mean**2, 0)


class _Range:
    """Keys [start, stop) of a sequence, of which sums are held: the range may only move on."""

    def __init__(self, key: np.ndarray) -> None:
        self._key = key  # (Hkv, Lk, D)
        self._start = self._stop = 0
        self.first = np.zeros((len(key), key.shape[2], 1))
        self.second = np.zeros((len(key), key.shape[2], key.shape[2]))

    def move(self, start: int, stop: int) -> None:
        if start >= self._stop:
            self._start = self._stop = start
            self.first[...] = self.second[...] = 0
        self._add(self._stop, stop, 1)
        self._add(self._start, start, -1)
        self._start, self._stop = start, stop

    def _add(self, start: int, stop: int, sign: int) -> None:
        for begin in range(start, stop, 1024):
            key = self._key[:, begin : min(begin + 1024, stop)].astype(np.float64)
            self.first += sign * key.sum(axis=1)[..., None]
            self.second += sign * (key.swapaxes(1, 2) @ key)


def exact(problem: Problem) -> Sums | None:
    """Over all pairs; None if not causal, window and lengths alone decide which these are."""
    if not (problem.mask is None and problem.mask_mod is None and problem.block_mask is None):
        return None
    sums = _nothing(problem)
    for b in range(problem.sizes.B):
        low, high = problem.intervals.bounds(b, problem.sizes.Lq)
        attending = np.flatnonzero(low < high)
        if attending.size:
            _add_sequence(problem, b, low, high, int(attending[0]), int(attending[-1]) + 1, sums)
    return sums


def _add_sequence(
    problem: Problem, b: int, low: np.ndarray, high: np.ndarray, start: int, stop: int, sums: Sums
) -> None:
    """Rows [start, stop), whose keys are [low, high), both of which never fall."""
    Hq, Hkv = problem.sizes[1:3]
    sequence = problem.sequence(b)
    inner = _Range(sequence.key)
    for begin in range(start, stop, BLOCK):
        end = min(begin + BLOCK, stop)
        query = problem.scale * sequence.query[:, begin:end].astype(np.float64)
        query = query.reshape(Hkv, Hq // max(Hkv, 1), end - begin, query.shape[2])
        own_low, own_high = low[begin:end, None], high[begin:end, None]
        shared = int(low[end - 1]), max(int(high[begin]), int(low[end - 1]))  # keys of all of these rows
        inner.move(*shared)
        sums.pairs[:] += (own_high - own_low).sum()
        sums.first[:] += (query.sum(axis=2, keepdims=True) @ inner.first[:, None]).reshape(Hq)
        sums.second[:] += np.einsum("hgid,hgid->hg", query @ inner.second[:, None], query).reshape(Hq)
        for first, last in ((int(low[begin]), shared[0]), (shared[1], int(high[end - 1]))):
            if first == last:
                continue
            keys = np.arange(first, last)
            key = sequence.key[:, first:last].astype(np.float64)
            scores = query @ key.swapaxes(1, 2)[:, None]
            np.copyto(scores, 0, where=(keys < own_low) | (keys >= own_high))
            sums.first[:] += scores.sum(axis=(2, 3)).reshape(Hq)
            sums.second[:] += np.einsum("hgij,hgij->hg", scores, scores).reshape(Hq)


def sampled(run: Callable[[Problem], object], problem: Problem, rows: np.ndarray) -> Sums:
    """Over the pairs of some rows (R,), the same of all sequences and heads."""
    sums = _nothing(problem)
    for _, scores, allowed in scores_of_rows(run, problem, rows):
        sums.pairs[:] += allowed.sum(axis=(1, 2))
        sums.first[:] += scores.sum(axis=(1, 2), where=allowed)
        sums.second[:] += np.square(scores).sum(axis=(1, 2), where=allowed)
    return sums


def scores_of_rows(
    run: Callable[[Problem], object], problem: Problem, rows: np.ndarray
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """The number of a sequence, (Hq, n, Lk) float64 scores of n of the rows, and which are attended to; all in turn."""
    B, Hq, Hkv, _, Lk, D, _ = problem.sizes
    group = Hq // max(Hkv, 1)
    at_once = max(1, SCORES // max(B * Hq * Lk, 1))
    for begin in range(0, len(rows), at_once):
        some = rows[begin : begin + at_once]
        for b, allowed in enumerate(_attended(run, problem, some)):
            sequence = problem.sequence(b)
            query = problem.scale * sequence.query[:, some].astype(np.float64)
            with np.errstate(invalid="ignore"):
                scores = query.reshape(Hkv, group * len(some), D) @ sequence.key.astype(np.float64).swapaxes(1, 2)
            yield b, scores.reshape(Hq, len(some), Lk), allowed


def _attended(run: Callable[[Problem], object], problem: Problem, rows: np.ndarray) -> np.ndarray:
    """(B, Hq, R, Lk) bool: in heads of no elements every key that a row attends to has a weight."""
    alike = replace(
        problem,
        query=problem.query[..., :0],
        key=problem.key[..., :0],
        softcap=None,
        slopes=None,
        sinks=None,
        score_mod=None,
    )
    single = single_rows(alike, rows)
    if single.mask is not None and single.mask.dtype != bool:
        with np.errstate(over="ignore"):
            rounded = single.mask.astype(statistics_dtype(problem.query.dtype))
        single = replace(single, mask=rounded != -np.inf)
    run(single)
    assert single.key_weight is not None
    B, Hq, _, _, Lk, _, _ = problem.sizes
    return single.key_weight.swapaxes(-3, -2).reshape(B, Hq, len(rows), Lk) != 0


def _nothing(problem: Problem) -> Sums:
    return Sums(*np.zeros((3, problem.sizes.Hq)))
