"""From the array type to the backend that computes on it.  Nothing is imported before it is needed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from numba_attn.problem import Problem

# Backend -> the module whose `forward(problem)` it is.
_MODULES = {"cpu": "numba_attn.cpu.attention", "reference": "numba_attn.reference"}


def forward(backend: Any) -> Callable[[Problem], None]:
    """The forward pass of a backend; None chooses by array type, of which there is NumPy's so far.

    An explicit backend never falls back to another.
    """
    if backend is None:
        backend = "cpu"
    if isinstance(backend, str) and backend == "cuda":
        raise NotImplementedError("backend 'cuda' is not implemented yet")
    if not isinstance(backend, str) or backend not in _MODULES:
        raise ValueError(f"backend must be None, 'cpu', 'cuda' or 'reference', got {backend!r}")
    run: Callable[[Problem], None] = importlib.import_module(_MODULES[backend]).forward
    return run
