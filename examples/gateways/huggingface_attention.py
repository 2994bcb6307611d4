"""Attention of Hugging Face Transformers by numba_attn, on the CPU: registered under the name "numba_attn".

    import huggingface_attention
    model = AutoModel.from_pretrained(..., attn_implementation="numba_attn")

Tensors are read and written where they are, sinks (as of gpt-oss) and grouped heads included.
"""

from __future__ import annotations

from functools import partial
from typing import Any

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
    s_aux: Any = None,
    **_: Any,
) -> tuple[Any, None]:
    """(B, H, L, D) query, key and value to (B, L, H, D) output; masks, causal ones too, come as such."""
    out = scaled_dot_product_attention(
        *(x.detach() for x in (query, key, value)),
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=True,
        sinks=None if s_aux is None else s_aux.detach(),
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("numba_attn", attend)
AttentionMaskInterface.register("numba_attn", partial(sdpa_mask, allow_is_causal_skip=False))
