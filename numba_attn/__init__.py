"""Attention for NumPy arrays, in Numba: no deep-learning framework needed.

>>> import numpy as np, numba_attn
>>> rng = np.random.default_rng(0)
>>> query, key, value = rng.standard_normal((3, 8, 128, 64), dtype=np.float32)  # heads, length, head size
>>> numba_attn.scaled_dot_product_attention(query, key, value, is_causal=True).shape
(8, 128, 64)

Mask functions that are ready to use are in `numba_attn.block_mask`, rotary embedding and its scalings in
`numba_attn.rotary`, operators of ONNX in `numba_attn.onnx`, the limit on threads in `numba_attn.threads`, pictures of
attention in `numba_attn.plot`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numba_attn import block_mask as block_mask
    from numba_attn import diagnostics as diagnostics
    from numba_attn import onnx as onnx
    from numba_attn import plot as plot
    from numba_attn import rotary as rotary
    from numba_attn import threads as threads
    from numba_attn.api import scaled_dot_product_attention
    from numba_attn.block_mask import BlockMask, and_masks, create_block_mask, or_masks
    from numba_attn.diagnostics import diagnose
    from numba_attn.gradient_problem import Gradients
    from numba_attn.gradients import scaled_dot_product_attention_vjp, varlen_attention_vjp
    from numba_attn.kv_attention import attention_with_kv_cache
    from numba_attn.kv_cache import KVCache
    from numba_attn.merge import merge_attention
    from numba_attn.multihead import MultiHeadAttention
    from numba_attn.paged_kv_cache import PagedKVCache
    from numba_attn.problem import Aux
    from numba_attn.rotary import apply_rotary, rotary_tables
    from numba_attn.row_weights import attention_weights
    from numba_attn.varlen import varlen_attention

__version__ = "0.1.0"
__all__ = [
    "Aux",
    "BlockMask",
    "Gradients",
    "KVCache",
    "MultiHeadAttention",
    "PagedKVCache",
    "and_masks",
    "apply_rotary",
    "attention_weights",
    "attention_with_kv_cache",
    "create_block_mask",
    "diagnose",
    "merge_attention",
    "or_masks",
    "rotary_tables",
    "scaled_dot_product_attention",
    "scaled_dot_product_attention_vjp",
    "varlen_attention",
    "varlen_attention_vjp",
]

# Public name -> the module that has it, or that it is, imported on first use: importing the package itself costs next
# to nothing.
_HOMES = {
    "Aux": "problem",
    "Gradients": "gradient_problem",
    "KVCache": "kv_cache",
    "MultiHeadAttention": "multihead",
    "PagedKVCache": "paged_kv_cache",
    "attention_weights": "row_weights",
    "attention_with_kv_cache": "kv_attention",
    "BlockMask": "block_mask",
    "and_masks": "block_mask",
    "apply_rotary": "rotary",
    "block_mask": "block_mask",
    "create_block_mask": "block_mask",
    "diagnose": "diagnostics",
    "diagnostics": "diagnostics",
    "merge_attention": "merge",
    "onnx": "onnx",
    "or_masks": "block_mask",
    "plot": "plot",
    "rotary": "rotary",
    "rotary_tables": "rotary",
    "scaled_dot_product_attention": "api",
    "scaled_dot_product_attention_vjp": "gradients",
    "threads": "threads",
    "varlen_attention": "varlen",
    "varlen_attention_vjp": "gradients",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    value = module if name == _HOMES[name] else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
