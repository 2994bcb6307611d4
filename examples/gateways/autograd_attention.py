"""Attention as a primitive of HIPS autograd: `pip install autograd`, then differentiate through it as through NumPy.

`attention` takes what `numba_attn.scaled_dot_product_attention` takes; it has gradients of query, key and value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from autograd.core import defvjp_argnums
from autograd.extend import primitive

from numba_attn import scaled_dot_product_attention, scaled_dot_product_attention_vjp

_attention = primitive(scaled_dot_product_attention)


def attention(*args: Any, **options: Any) -> Any:
    """`numba_attn.scaled_dot_product_attention`, with gradients."""
    if (len(args) > 4 or "dropout_p" in options) and options.get("dropout_seed") is None:
        # The gradient runs the forward pass again, which is to drop the same.
        options["dropout_seed"] = int.from_bytes(np.random.bytes(8), "little")  # noqa: NPY002
    return _attention(*args, **options)


def _vjp(
    argnums: tuple[int, ...], out: np.ndarray, args: tuple[Any, ...], options: dict[str, Any]
) -> Callable[..., Any]:
    _, vjp = scaled_dot_product_attention_vjp(*args, **options)

    def gradients(grad_out: np.ndarray) -> tuple[np.ndarray, ...]:
        every = vjp(np.asarray(grad_out, out.dtype))
        return tuple(every[n] for n in argnums)

    return gradients


defvjp_argnums(_attention, _vjp)
