"""Attention as a function of JAX with gradients, under `jit` too: JAX calls back to the CPU for it.

`attention(query, key, value, is_causal)` takes arrays (..., H, L, D).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np

from numba_attn import scaled_dot_product_attention, scaled_dot_product_attention_vjp


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def attention(query: Any, key: Any, value: Any, is_causal: bool = False) -> Any:
    """Scaled dot-product attention."""
    shape = jax.ShapeDtypeStruct((*query.shape[:-1], value.shape[-1]), query.dtype)
    return jax.pure_callback(partial(_forward, is_causal), shape, query, key, value)


def _forward(is_causal: bool, *arrays: Any) -> np.ndarray:
    return scaled_dot_product_attention(*map(np.asarray, arrays), is_causal=is_causal)  # type: ignore[return-value]


def _backward(is_causal: bool, grad_out: Any, *arrays: Any) -> tuple[np.ndarray, ...]:
    _, vjp = scaled_dot_product_attention_vjp(*map(np.asarray, arrays), is_causal=is_causal)
    return tuple(vjp(np.asarray(grad_out))[:3])


def _remember(query: Any, key: Any, value: Any, is_causal: bool) -> tuple[Any, tuple[Any, ...]]:
    return attention(query, key, value, is_causal), (query, key, value)


def _gradients(is_causal: bool, arrays: tuple[Any, ...], grad_out: Any) -> Any:
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)
    return jax.pure_callback(partial(_backward, is_causal), shapes, grad_out, *arrays)


attention.defvjp(_remember, _gradients)
