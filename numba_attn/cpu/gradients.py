"""The gradients of a `Problem`: the arrays and tables of its kernels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from numba_attn import threads
from numba_attn.cpu import backward as first_pass
from numba_attn.cpu import bias_gradient, launch
from numba_attn.cpu.call import call_of, nothing, operands_of
from numba_attn.cpu.narrow import COMPUTED, bits_of, kind_of
from numba_attn.cpu.score_gradients import GradientArrays
from numba_attn.gradient_problem import GradientProblem
from numba_attn.problem import statistics_dtype


def backward(gradient: GradientProblem) -> None:
    """Compute a gradient and write it."""
    problem = gradient.problem
    B, Hq, _, Lq, _, D, Dv = sizes = problem.sizes
    if B * Hq * Lq == 0:
        return
    dtype, kind = statistics_dtype(problem.query.dtype), kind_of(problem.query.dtype)
    call, alive = call_of(problem, sizes, first_pass.operand(kind))
    # Of rows of padding, whose lse is nothing but their sink, this is all there is.
    above = gradient.grad_lse
    delta = np.zeros(problem.query.shape[:-1], dtype) if above is None else np.negative(above, order="C")
    arrays = arrays_of(gradient, delta)
    operations = launch.rows_times_keys(call.sequences) * Hq * (3 * D + 2 * Dv)
    workers = threads.count() if operations > launch.SERIAL_WORK else 1
    first_pass.run(call, arrays, (kind, first_pass.operand(kind)), workers, operations)
    if gradient.mask is not None or gradient.slopes is not None:
        mask, places = mask_of(gradient, B)
        call = call._replace(arrays=call.arrays._replace(operands=operands_of(COMPUTED[kind])))
        kinds = kind, COMPUTED[kind]
        bias_gradient.run(call, arrays, mask, places, gradient.slopes, kinds, workers, operations)
    if gradient.sinks is not None:
        gradient.sinks[...] = of_sinks(gradient, delta)
    del alive


def mask_of(gradient: GradientProblem, B: int) -> tuple[np.ndarray | None, np.ndarray]:
    """The gradient of the mask (places, heads, rows, keys), and the place of each sequence in it."""
    if gradient.mask is None:
        return None, np.arange(B)
    batch = gradient.mask.shape[:-3]
    mask = gradient.mask.reshape(math.prod(batch), *gradient.mask.shape[-3:])
    of_problem = (B,) if gradient.problem.packed is not None else gradient.problem.query.shape[:-3]
    return mask, np.broadcast_to(np.arange(len(mask)).reshape(batch), of_problem).reshape(-1)


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
    assert problem.sinks is not None and problem.lse is not None
    weight = np.exp(problem.sinks[:, None] - problem.lse)
    over = tuple(axis for axis in range(delta.ndim) if axis != delta.ndim - 2)
    return -(weight * delta).sum(axis=over)


def warmup(kinds: Iterable[str] = tuple(COMPUTED)) -> list[str]:
    """Compile every kernel for kinds of element, or load it from the cache; returns their names."""
    names = []
    for kind in kinds:
        for module, operand in ((first_pass, first_pass.operand(kind)), (bias_gradient, COMPUTED[kind])):
            for entry in (module.serial, module.parallel):
                entry(kind, operand)
            names.append(f"{module.__name__}, {kind}")
    return names
