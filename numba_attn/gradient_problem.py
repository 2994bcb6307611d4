"""One call of a gradient, validated: what comes from above, and the arrays that gradients are written to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from numba_attn import checks
from numba_attn.problem import Problem, statistics_dtype


class Gradients(NamedTuple):
    """The gradient of each input, in its shape and dtype; None for what was not given or not wanted.

    That of what has been broadcast is the sum over all that used it.
    """

    query: Any = None
    key: Any = None
    value: Any = None
    attn_mask: Any = None
    sinks: Any = None
    alibi_slopes: Any = None


class SequenceGradients(NamedTuple):
    """Views of one sequence: what comes from above, and what is to be written; of slopes and sinks, all numbers."""

    grad_out: np.ndarray  # (Hq, Lq, Dv)
    grad_lse: np.ndarray | None  # (Hq, Lq)
    query: np.ndarray  # (Hq, Lq, D)
    key: np.ndarray  # (Hkv, Lk, D)
    value: np.ndarray  # (Hkv, Lk, Dv)
    mask: np.ndarray | None  # (Hq, Lq, Lk), each axis full or 1
    slopes: np.ndarray | None  # (Hq,)


@dataclass(frozen=True, slots=True)
class GradientProblem:
    """A validated call for the gradient of `problem`, whose results and norms have been written.

    Arrays have heads before rows, as those of the problem; what is to be written is 0 at first.
    """

    problem: Problem
    grad_out: np.ndarray  # (*batch, Hq, Lq, Dv)
    grad_lse: np.ndarray | None  # (*batch, Hq, Lq)
    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    mask: np.ndarray | None  # as the problem's mask, in the dtype of statistics
    sinks: np.ndarray | None  # (Hq,) float64
    slopes: np.ndarray | None  # (B or 1, Hq) float64

    @classmethod
    def from_call(cls, problem: Problem, grad_out: Any, grad_lse: Any, wanted: Any) -> GradientProblem:
        """Check the arguments of a `numba_attn.gradients.VJP`, allocate the results, compute nothing."""
        given = {
            "query": True,
            "key": True,
            "value": True,
            "attn_mask": problem.mask is not None and problem.mask.dtype != bool,
            "sinks": problem.sinks is not None,
            "alibi_slopes": problem.slopes is not None,
        }
        names = _wanted(wanted, given)
        grad_out = checks.floating_array("grad_out", grad_out)
        working, shape = statistics_dtype(problem.query.dtype), problem.result.shape
        _check_like("grad_out", grad_out, "out", shape, problem.result.dtype)
        if grad_lse is not None:
            grad_lse = checks.floating_array("grad_lse", grad_lse)
            _check_like("grad_lse", grad_lse, "lse", shape[:-1], working)
            grad_lse = problem.heads_first(grad_lse[..., None])[..., 0]
        return cls(
            problem=problem,
            grad_out=problem.heads_first(grad_out),
            grad_lse=grad_lse,
            query=_zeros_like(problem.query),
            key=_zeros_like(problem.key),
            value=_zeros_like(problem.value),
            mask=np.zeros(problem.mask.shape, working) if problem.mask is not None and "attn_mask" in names else None,
            sinks=np.zeros_like(problem.sinks) if problem.sinks is not None and "sinks" in names else None,
            slopes=np.zeros_like(problem.slopes) if problem.slopes is not None and "alibi_slopes" in names else None,
        )

    def sequence(self, b: int) -> SequenceGradients:
        problem = self.problem
        return SequenceGradients(
            problem.rows(self.grad_out, b),
            None if self.grad_lse is None else problem.rows(self.grad_lse, b),
            problem.rows(self.query, b),
            problem.keys(self.key, b),
            problem.keys(self.value, b),
            None if self.mask is None else problem.scores(self.mask, b),
            None if self.slopes is None else self.slopes[b if len(self.slopes) > 1 else 0],
        )


def _wanted(wanted: Any, given: dict[str, bool]) -> tuple[str, ...]:
    if wanted is None:
        return tuple(name for name, there in given.items() if there)
    if isinstance(wanted, str) or not isinstance(wanted, tuple | list | set | frozenset):
        raise TypeError(f"wanted must be a tuple of names among {tuple(given)}, got {wanted!r}")
    for name in wanted:
        if not isinstance(name, str) or name not in given:
            raise ValueError(f"wanted names must be among {tuple(given)}, got {name!r}")
        if not given[name]:
            raise ValueError(f"wanted names {name!r}, of which there is none with a gradient in this call")
    return tuple(wanted)


def _check_like(name: str, x: np.ndarray, like: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if x.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, as {like} is, got {x.dtype}")
    if x.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, as {like} has, got {x.shape}")


def _zeros_like(x: np.ndarray) -> np.ndarray:
    """Zeros with the axes in memory in the order in which they are in x, and no gaps."""
    order = sorted(range(x.ndim), key=lambda axis: (-abs(x.strides[axis]), axis))
    zeros = np.zeros([x.shape[axis] for axis in order], x.dtype)
    return zeros.transpose(np.argsort(order)) if x.ndim else zeros
