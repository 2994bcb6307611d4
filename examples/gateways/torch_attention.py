"""Attention as a function of PyTorch with gradients, on tensors in the memory of the CPU, without a copy.

`attention(query, key, value, **options)` takes what `numba_attn.scaled_dot_product_attention` takes.
"""

from __future__ import annotations

from typing import Any

import torch

from numba_attn import scaled_dot_product_attention_vjp


class Attention(torch.autograd.Function):
    """Gradients of query, key and value, from the lse that the forward pass has left."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, options: dict[str, Any]) -> Any:
        out, ctx.vjp = scaled_dot_product_attention_vjp(*(x.detach().numpy() for x in (query, key, value)), **options)
        return torch.from_numpy(out)

    @staticmethod
    def backward(ctx: Any, grad_out: Any) -> tuple[Any, ...]:
        gradients = ctx.vjp(grad_out.detach().numpy())
        return *(torch.from_numpy(x) for x in gradients[:3]), None


def attention(query: Any, key: Any, value: Any, **options: Any) -> Any:
    """Scaled dot-product attention of tensors that may require gradients."""
    return Attention.apply(query, key, value, options)
