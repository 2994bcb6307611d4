"""Attention of Hugging Face Transformers by numba_attn, on the CPU: registered under the name "numba_attn".

    import huggingface_attention
    model = AutoModel.from_pretrained(..., attn_implementation="numba_attn")

Tensors are read and written where they are.  Grouped heads, sinks (as of gpt-oss), capped scores (as of Gemma 2) and
relative positions (as of T5) are included, and so are gradients, for training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch_attention import attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from numba_attn import scaled_dot_product_attention


def attend(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: Any = None,
    softcap: float | None = None,
    s_aux: Any = None,
    **_: Any,
) -> tuple[Any, None]:
    """(B, H, L, D) query, key and value to (B, L, H, D) output; what is no more than causal comes without a mask."""
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    options = {
        "dropout_p": dropout,
        "is_causal": bool(is_causal) and attention_mask is None and query.shape[2] > 1,
        "scale": scaling,
        "enable_gqa": True,
        "softcap": softcap,
    }
    given = query, key, value, _mask(attention_mask, position_bias), s_aux
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
        *operands, sinks = given
        out = attention(*operands, sinks=sinks, **options)
    else:
        *operands, sinks = (None if x is None else x.detach() for x in given)
        out = scaled_dot_product_attention(*operands, sinks=sinks, **options)
    return out.transpose(1, 2).contiguous(), None


def _mask(mask: Any, bias: Any) -> Any:
    """What is added to scores: a mask of booleans, True where a query attends, and numbers of positions."""
    if mask is None or bias is None:
        return bias if mask is None else mask
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else mask + bias


AttentionInterface.register("numba_attn", attend)
AttentionMaskInterface.register("numba_attn", sdpa_mask)
