"""From a call to the backend that computes it, by the kind of its arrays.  Nothing is imported before it is needed."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from numba_attn import arrays, repeats
from numba_attn.problem import Aux, Problem

if TYPE_CHECKING:
    from numba_attn.gradient_problem import GradientProblem

BACKENDS = ("cpu", "cuda", "reference")
_ON_HOST = ("cpu", "reference")

# Backend -> the module whose `forward(problem)` it is, which may give a `repeats.MakeRepeat`.  If the module has
# `unavailable()`, that says why it cannot be used here, or None.
_MODULES = {"cpu": "numba_attn.cpu.attention", "cuda": "numba_attn.cuda.attention", "reference": "numba_attn.reference"}

# Likewise, for `backward(gradient)`.
_GRADIENTS = {"cpu": "numba_attn.cpu.gradients", "reference": "numba_attn.reference"}


def attend(backend: Any, **call: Any) -> Any:
    """What all forms of attention end with: the arguments of `Problem.from_call`, to results for the caller."""
    key, given = repeats.identify(backend, call)
    repeat = repeats.find(key)
    if repeat is not None:
        result = repeat(*given)
        if result is not None:
            return result
    caller, backend = adopt(backend, call)
    run = forward(backend)
    problem = Problem.from_call(**call)
    repeats.remember(key, run(problem))
    return caller.give(problem.result if problem.aux is None else (problem.result, problem.aux))


def checked(backend: Any, **call: Any) -> tuple[Callable[[], tuple[np.ndarray, Aux | None]], Problem | None]:
    """Check a call of NumPy's arrays, which are written only later: what computes it then, and the problem that it is.

    There is no problem for a call like an earlier one, whose sequences have neither lengths nor positions of their own.
    """
    key, _ = repeats.identify(backend, call)
    if type(call["query_offset"]) is int and call["kv_lengths"] is None and repeats.find(key) is not None:

        def repeated() -> tuple[np.ndarray, Aux | None]:
            result = attend(backend, **call)
            return result if call["return_aux"] else (result, None)

        return repeated, None
    run, problem = forward(backend), Problem.from_call(**call)

    def compute() -> tuple[np.ndarray, Aux | None]:
        repeats.remember(key, run(problem))
        return problem.result, problem.aux

    return compute, problem


def adopt(backend: Any, call: dict[str, Any]) -> tuple[arrays.Caller, Any]:
    """Put views in the place of the arrays of a call; and the backend, if it is None, by where they are.

    That is "cuda" for arrays on a CUDA device and else "cpu".  An explicit one never falls back to another.
    """
    # Most calls are of NumPy's arrays alone, and some are short: these comparisons are all that they pay for others.
    caller = arrays.NUMPY
    plain = type(call["query"]) is type(call["key"]) is type(call["value"]) is np.ndarray
    if not plain or call["attn_mask"] is not None or call["out"] is not None:
        on_host = isinstance(backend, str) and backend in _ON_HOST
        caller = arrays.adopt(call, on_host=f"for backend={backend!r}" if on_host else None)
    return caller, ("cuda" if caller.on_device else "cpu") if backend is None else backend


def forward(backend: Any) -> Callable[[Problem], repeats.MakeRepeat | None]:
    """The forward pass of a backend by name; None is that of NumPy's arrays."""
    run: Callable[[Problem], repeats.MakeRepeat | None] = _module(_MODULES, backend).forward
    return run


def backward(backend: Any) -> Callable[[GradientProblem], None]:
    """The gradient of a backend by name, likewise."""
    run: Callable[[GradientProblem], None] = _module(_GRADIENTS, backend, "the gradient of ").backward
    return run


def _module(modules: dict[str, str], backend: Any, what: str = "") -> ModuleType:
    backend = "cpu" if backend is None else backend
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"backend must be None, 'cpu', 'cuda' or 'reference', got {backend!r}")
    if backend not in modules:
        raise NotImplementedError(f"{what}backend {backend!r} is not implemented yet")
    module = _imported(modules[backend])
    unavailable = vars(module).get("unavailable")
    if unavailable is not None and (reason := unavailable()):
        raise NotImplementedError(f"backend {backend!r} cannot be used: {reason}")
    return module


@functools.cache
def _imported(module: str) -> ModuleType:
    return importlib.import_module(module)
