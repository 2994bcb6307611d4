"""From the array type to the backend that computes on it.  Nothing is imported before it is needed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from numba_attn.problem import Problem

if TYPE_CHECKING:
    from numba_attn.gradient_problem import GradientProblem

# Backend -> the modules whose `forward(problem)` and `backward(gradient)` they are.
_FORWARD = {"cpu": "numba_attn.cpu.attention", "reference": "numba_attn.reference"}
_BACKWARD = {"cpu": "numba_attn.cpu.gradients", "reference": "numba_attn.reference"}


def forward(backend: Any) -> Callable[[Problem], None]:
    """The forward pass of a backend; None chooses by array type, of which there is NumPy's so far.

    An explicit backend never falls back to another.
    """
    run: Callable[[Problem], None] = importlib.import_module(_FORWARD[_name(backend)]).forward
    return run


def backward(backend: Any) -> Callable[[GradientProblem], None]:
    """The gradient of a backend, likewise."""
    run: Callable[[GradientProblem], None] = importlib.import_module(_BACKWARD[_name(backend)]).backward
    return run


def _name(backend: Any) -> str:
    if backend is None:
        backend = "cpu"
    if isinstance(backend, str) and backend == "cuda":
        raise NotImplementedError("backend 'cuda' is not implemented yet")
    if not isinstance(backend, str) or backend not in _FORWARD:
        raise ValueError(f"backend must be None, 'cpu', 'cuda' or 'reference', got {backend!r}")
    return backend
