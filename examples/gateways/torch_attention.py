"""Attention as a function of PyTorch with gradients, on tensors in the memory of the CPU, without a copy.

`attention(query, key, value, ...)` takes what `numba_attn.scaled_dot_product_attention` takes; there are gradients of
query, key and value, of an additive mask and of sinks.
"""

from __future__ import annotations

from typing import Any

import torch

from numba_attn import scaled_dot_product_attention_vjp

OTHERS = ("attn_mask", "sinks")


class Attention(torch.autograd.Function):
    """Gradients from the sums of rows that the forward pass has left."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, attn_mask: Any, sinks: Any, options: dict[str, Any]) -> Any:
        query, key, value, attn_mask, sinks = (
            x.detach() if isinstance(x, torch.Tensor) else x for x in (query, key, value, attn_mask, sinks)
        )
        out, ctx.vjp = scaled_dot_product_attention_vjp(query, key, value, attn_mask, sinks=sinks, **options)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Any) -> tuple[Any, ...]:
        wanted = tuple(name for name, needed in zip(OTHERS, ctx.needs_input_grad[3:5], strict=True) if needed)
        gradients = ctx.vjp(grad_out.detach(), wanted=wanted)
        return *gradients[:3], gradients.attn_mask, gradients.sinks, None


def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, *, sinks: Any = None, **options: Any) -> Any:
    """Scaled dot-product attention of tensors that may require gradients."""
    return Attention.apply(query, key, value, attn_mask, sinks, options)
