"""Gradients of attention in plain NumPy, in float64, with the whole matrix of scores: what layers are tested against.

    dP = dO V^T,   dS = P (dP - rowsum(dO O)),   dQ = scale dS K,   dK = scale dS^T Q,   dV = P^T dO

of Dao et al., "FlashAttention" (2022), section B.2, with P the softmax; through a cap dS has a factor 1 - tanh^2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from tolerances import DEFAULTS

import numba_attn
from numba_attn import reference
from numba_attn.checks import heads_first
from numba_attn.problem import Problem

HAS_GRADIENTS = Path(numba_attn.__file__).with_name("gradients.py").exists()


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let layers find gradients of attention here, where the package has none of its own."""
    if not HAS_GRADIENTS:
        monkeypatch.setitem(sys.modules, "numba_attn.gradients", sys.modules[__name__])


class Gradients(NamedTuple):
    query: Any
    key: Any
    value: Any
    attn_mask: Any = None
    sinks: Any = None
    alibi_slopes: Any = None


def scaled_dot_product_attention_vjp(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, attn_mask: Any = None, **options: Any
) -> tuple[np.ndarray, Callable[..., Gradients]]:
    """The result, and its vector-Jacobian product; without functions of scores, dropout and block masks."""
    options.pop("backend", None)
    layout = options.get("layout", "BHLD")
    call = {**DEFAULTS, **options, "attn_mask": attn_mask, "return_aux": ("lse",)}
    problem = Problem.from_call(query, key, value, **call)
    reference.forward(problem)

    def vjp(grad_out: np.ndarray, grad_lse: None = None, wanted: None = None) -> Gradients:
        grads = {name: np.zeros(x.shape) for name, x in (("query", query), ("key", key), ("value", value))}
        views = {name: heads_first(x, layout) for name, x in grads.items()}
        grad_mask, grad_sinks, grad_slopes = (
            None if x is None or x.dtype == bool else np.zeros(x.shape)
            for x in (problem.mask, problem.sinks, problem.slopes)
        )
        for b in range(problem.sizes.B):
            index = tuple(int(i) for i in np.unravel_index(b, problem.query.shape[:-3]))
            for h in range(problem.sizes.Hq):
                part = _head(problem, b, h, heads_first(grad_out, layout)[index][h])
                shared = h // (problem.sizes.Hq // problem.sizes.Hkv)
                for name, head in (("query", h), ("key", shared), ("value", shared)):
                    views[name][index][head] += getattr(part, name)
                if grad_mask is not None:
                    where = tuple(i if n > 1 else 0 for i, n in zip((*index, h), grad_mask.shape, strict=False))
                    rows = tuple(axis for axis in (0, 1) if grad_mask.shape[axis - 2] == 1)
                    grad_mask[where] += part.attn_mask.sum(axis=rows, keepdims=True)
                if grad_sinks is not None:
                    grad_sinks[h] += part.sinks
                if grad_slopes is not None:
                    grad_slopes[b if len(grad_slopes) > 1 else 0, h] += part.alibi_slopes
        arrays = [grads[name].astype(query.dtype) for name in ("query", "key", "value")]
        if grad_mask is not None:
            grad_mask = grad_mask.reshape(attn_mask.shape)
        if grad_slopes is not None:
            grad_slopes = grad_slopes.reshape(call["alibi_slopes"].shape)
        return Gradients(*arrays, grad_mask, grad_sinks, grad_slopes)

    return problem.result, vjp


def _head(problem: Problem, b: int, h: int, grad_out: np.ndarray) -> Gradients:
    sequence = problem.sequence(b)
    head = reference.attend(problem, sequence, b, h)
    shared = h // (problem.sizes.Hq // problem.sizes.Hkv)
    query, key, value = sequence.query[h], sequence.key[shared], sequence.value[shared]
    delta = (grad_out * head.out).sum(axis=1, keepdims=True)
    scores = head.weight * (grad_out @ value.T - delta)  # before the cap is minded
    products = scores
    if problem.softcap is not None:
        products = scores * (1 - np.tanh(problem.scale * (query @ key.T) / problem.softcap) ** 2)
    products = problem.scale * products
    distance = np.arange(len(query))[:, None] + problem.intervals.table[b, 0] - np.arange(len(key))
    sink = 0.0 if problem.sinks is None else -(np.exp(problem.sinks[h] - head.lse) * delta[:, 0]).sum()
    return Gradients(
        products @ key, products.T @ query, head.weight.T @ grad_out, scores, sink, -(scores * np.abs(distance)).sum()
    )
