"""A problem in pieces, so that a bar can say how far it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from numba_attn.commands.common import AUX_NAMES

if TYPE_CHECKING:
    import numpy as np

    from numba_attn.problem import Problem

PIECE_FLOP = 2e10  # a tenth of a second on a few cores: often enough for a bar, too rare to cost anything
WHOLE = ("dropout", "score_mod", "mask_mod", "block_mask", "key_weight")  # what keeps a problem in one piece
ROW_UNIT = 384  # a multiple of the query rows that any kernel takes at once, so that pieces leave no remainders


def flop_of(problem: Problem) -> int:
    """Of the two products, counting the pairs of query and key that causal, window and lengths leave."""
    Hq, Lq, D = problem.query.shape[-3:]
    bounds = (problem.intervals.bounds(b, Lq) for b in range(len(problem.intervals.table)))
    pairs = sum(int((high - low).sum()) for low, high in bounds)
    return int(2 * Hq * pairs * (D + problem.value.shape[-1]))


def pieces_of(problem: Problem, rows: bool) -> Iterator[Problem]:
    """Problems of at most PIECE_FLOP, as far as it can be cut, that write their parts of the results of `problem`.

    It is halved along the first axis that has two units: sequences, key-value heads with the query heads that share
    them, query heads if they share one, and, if `rows`, blocks of query rows.  What depends on which sequence, head or
    row it is by number, or is a sum over rows, is not cut.
    """
    if any(getattr(problem, name) is not None for name in WHOLE):
        yield problem
        return
    Hq, Hkv, rank = problem.query.shape[-3], problem.key.shape[-3], problem.query.ndim
    rows = rows and not problem.intervals.padded  # of which a few may be left of some sequence
    units = [1] * (rank - 3) + [Hq // Hkv if Hkv > 1 else 1] + [ROW_UNIT] * rows
    if flop_of(problem) > PIECE_FLOP:
        for axis, unit in enumerate(units):
            length = problem.query.shape[axis]
            middle = (length // unit + 1) // 2 * unit
            # A remainder of few rows would be computed in another way than the whole.
            if 0 < middle <= length - unit:
                yield from pieces_of(_part(problem, axis, 0, middle), rows)
                yield from pieces_of(_part(problem, axis, middle, length), rows)
                return
    yield problem


def _part(problem: Problem, axis: int, start: int, stop: int) -> Problem:
    """The problem of some sequences, query heads or query rows alone; `axis` is one of the query's."""
    heads = problem.query.ndim - 3

    def part(x: np.ndarray, start: int = start, stop: int = stop) -> np.ndarray:
        return x if x.shape[axis] == 1 else x[(slice(None),) * axis + (slice(start, stop),)]

    key, value, intervals, slopes, sinks = problem.key, problem.value, problem.intervals, problem.slopes, problem.sinks
    if axis < heads:
        batch = problem.query.shape[:heads]
        key, value = part(key), part(value)
        table = part(intervals.table.reshape(*batch, 3))
        intervals = replace(intervals, table=table.reshape(-1, 3))
        if slopes is not None and len(slopes) > 1:
            slopes = part(slopes.reshape(*batch, slopes.shape[1])).reshape(-1, slopes.shape[1])
    elif axis == heads:
        group = problem.query.shape[axis] // key.shape[axis]
        key, value = (part(x, start // group, stop // group) for x in (key, value))
        slopes, sinks = (None if x is None else x[..., start:stop] for x in (slopes, sinks))
    else:
        table = intervals.table.copy()
        table[:, 0] += start
        table[:, 1] = (table[:, 1] - start).clip(0, stop - start)
        intervals = replace(intervals, table=table)
    statistics: dict[str, Any] = {name: part(x) for name in AUX_NAMES if (x := getattr(problem, name)) is not None}
    return replace(
        problem,
        query=part(problem.query),
        key=key,
        value=value,
        mask=None if problem.mask is None else part(problem.mask),
        intervals=intervals,
        slopes=slopes,
        sinks=sinks,
        out=part(problem.out),
        **statistics,
    )
