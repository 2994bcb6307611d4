"""The gradients of a `Problem`: the arrays and tables of its kernels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from numba_attn import threads
from numba_attn.cpu import backward as one_pass
from numba_attn.cpu import bias_gradient, launch
from numba_attn.cpu.attention import make_norms_alike
from numba_attn.cpu.blocks import LOG2_E
from numba_attn.cpu.call import call_of, nothing
from numba_attn.cpu.gradient_tasks import added_of, cut_of, tables_of
from numba_attn.cpu.narrow import COMPUTED, bits_of, kind_of
from numba_attn.cpu.score_gradients import GradientArrays
from numba_attn.gradient_problem import GradientProblem
from numba_attn.problem import Problem, statistics_dtype


def backward(gradient: GradientProblem) -> None:
    """Compute a gradient and write it."""
    problem = gradient.problem
    B, Hq, Hkv, Lq, _, D, Dv = sizes = problem.sizes
    if B * Hq * Lq == 0:
        return
    dtype, kind = statistics_dtype(problem.query.dtype), kind_of(problem.query.dtype)
    make_norms_alike(problem)
    call, alive = call_of(problem, sizes, one_pass.operand(kind))
    # Of rows of padding, whose sum is nothing but their sink, this is all there is.
    above = gradient.grad_lse
    delta = np.zeros(problem.query.shape[:-1], dtype) if above is None else np.negative(above, order="C")
    arrays = arrays_of(gradient, delta)
    operations = launch.rows_times_keys(call.sequences) * Hq * (3 * D + 2 * Dv)
    workers = threads.count() if operations > launch.SERIAL_WORK else 1
    mask, slopes, places = gradient.mask, gradient.slopes, np.arange(B)
    cut, added = cut_of(D, Dv, dtype.itemsize), None
    if problem.mask is not None and problem.mask.dtype != bool:
        shape, places = mask_shape(problem, B)
        mask = None if mask is None else mask.reshape(shape)
        added = added_of(shape, places, Hkv, dtype.itemsize) if bias_gradient.has_rows(shape) else None
    tables = tables_of(call, cut, added, in_chains=mask is not None)
    if len(tables.tasks):
        bias = bias_gradient.bias_of(mask, slopes, added, tables.tasks, Hq // Hkv, dtype)
        one_pass.run(call, arrays, bias, tables, cut, (kind, one_pass.operand(kind)), workers, operations)
        bias_gradient.finish(bias, mask, slopes, places, tables.tasks)
    if gradient.sinks is not None:
        gradient.sinks[...] = of_sinks(gradient, delta)
    del alive


def mask_shape(problem: Problem, B: int) -> tuple[tuple[int, ...], np.ndarray]:
    """The shape of the mask, with one axis for its batch, and the place of each sequence in that."""
    assert problem.mask is not None
    batch, count = problem.mask.shape[:-3], math.prod(problem.mask.shape[:-3])
    of_problem = (B,) if problem.packed is not None else problem.query.shape[:-3]
    places = np.broadcast_to(np.arange(count).reshape(batch), of_problem).flatten()
    return (count, *problem.mask.shape[-3:]), places


def arrays_of(gradient: GradientProblem, delta: np.ndarray) -> GradientArrays:
    """The arrays of the first sequence, and where the others start; without sums."""
    problem, none = gradient.problem, nothing(2, delta.dtype)
    by_rows = gradient.grad_out, gradient.grad_lse, delta, gradient.query
    every: list[Any] = [*by_rows, gradient.key, gradient.value]
    if problem.packed is not None:
        rows, keys = (starts[:-1] for starts in problem.packed)
        steps = [0 if x is None else x.strides[1] for x in every]
        offsets = np.stack([(rows if i < len(by_rows) else keys) * step for i, step in enumerate(steps)], axis=1)
        firsts = every
    else:
        batch = problem.query.shape[:-3]
        strides = [(0,) * len(batch) if x is None else x.strides[: len(batch)] for x in every]
        offsets = launch.batch_offsets(batch, *strides)
        firsts = [None if x is None else x[(0,) * len(batch)] for x in every]
    grad_out, grad_lse, deltas, *written = firsts
    return GradientArrays(
        bits_of(grad_out), none if grad_lse is None else grad_lse, deltas, *(bits_of(x) for x in written),
        none, none, offsets,  # type: ignore[call-arg]
    )  # fmt: skip


def of_sinks(gradient: GradientProblem, delta: np.ndarray) -> np.ndarray:
    """(Hq,): the gradient of each head's sink, whose probability meets nothing but delta."""
    problem = gradient.problem
    assert problem.sinks is not None and problem.norms is not None
    total = np.zeros_like(problem.sinks)
    for b, norms in enumerate(problem.norms):
        of_sequence = problem.rows(delta[..., None], b)[..., 0]
        reference, log_total = np.moveaxis(norms[:, : of_sequence.shape[1]], -1, 0)
        weight = np.exp2(problem.sinks[:, None] * LOG2_E - reference - log_total)
        total -= (weight * of_sequence).sum(axis=1)
    return total


def warmup(kinds: Iterable[str] = tuple(COMPUTED)) -> list[str]:
    """Compile every kernel for kinds of element, or load it from the cache; returns their names."""
    names = []
    for kind in kinds:
        one_pass.entry(kind, one_pass.operand(kind))
        names.append(f"{one_pass.__name__}, {kind}")
    return names
