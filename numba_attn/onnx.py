"""ONNX's operators Attention and RotaryEmbedding, for `onnx.reference.ReferenceEvaluator`.

With them a transformer stored as ONNX runs in NumPy and Numba, attention without its matrix of scores.  The package
onnx is imported by `ops` only.

Shape letters are those of the package: B batch, Hq and Hkv heads, Lq and Lk lengths (Lk with past keys), D and Dv head
sizes.  Heads come before rows, (B, H, L, D), unless said otherwise.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from numba_attn import checks
from numba_attn.api import scaled_dot_product_attention
from numba_attn.masks import UNBOUNDED, KeyIntervals
from numba_attn.problem import statistics_dtype
from numba_attn.rotary import apply_rotary

_DOUBLE, _PRECISIONS = 11, (None, 1, 10, 11, 16)  # softmax_precision: numbers of float64, and of all that ONNX allows
_CAPPED, _MASKED, _SOFTMAX = 1, 2, 3  # qk_matmul_output_mode: from which one on cap, masks and softmax are included


def ops() -> list[type]:
    """Classes for `new_ops` of `onnx.reference.ReferenceEvaluator`: Attention and RotaryEmbedding.

    They serve opsets from 23, with the semantics of onnx 1.23: cap before mask, rows that attend to nothing are 0.
    The evaluator does not hand them on to functions defined in a model: `onnx.inliner` makes nodes of these.

    >>> import numpy as np
    >>> from onnx.parser import parse_model
    >>> from onnx.reference import ReferenceEvaluator
    >>> model = parse_model('''<ir_version: 10, opset_import: ["": 24]> self_attention (float[1, 2, L, 8] x)
    ...     => (float[1, 2, L, 8] y) { y = Attention <is_causal = 1> (x, x, x) }''')
    >>> x = np.ones((1, 2, 5, 8), np.float32)
    >>> ReferenceEvaluator(model, new_ops=ops()).run(None, {"x": x})[0].shape
    (1, 2, 5, 8)
    """
    try:
        from onnx.reference.op_run import OpRun
    except ImportError as error:
        raise ImportError("numba_attn.onnx needs the package onnx: pip install onnx") from error

    # The evaluator finds a class by its name.
    class Attention(OpRun):  # type: ignore[misc]
        def _run(self, *inputs: np.ndarray | None, **attributes: Any) -> tuple[np.ndarray, ...]:
            names = self.onnx_node.output
            return _attention(
                *inputs,  # type: ignore[arg-type]
                **attributes,
                with_matrix=len(names) > 3 and names[3] != "",
                opset=self.run_params["opsets"][self.op_domain],
            )

        def run(self, *args: Any, **kwargs: Any) -> tuple[np.ndarray | None, ...]:
            # The evaluator keeps outputs by name, those without one too, and an input left out is what it has under
            # the name "".  That must stay None, or the next node would get keys of this one, for example as a mask.
            results = super().run(*args, **kwargs)
            return tuple(x if name else None for name, x in zip(self.onnx_node.output, results, strict=False))

    class RotaryEmbedding(OpRun):  # type: ignore[misc]
        def _run(self, *inputs: np.ndarray | None, **attributes: Any) -> tuple[np.ndarray, ...]:
            return (_rotary_embedding(*inputs, **attributes),)  # type: ignore[arg-type]

    return [Attention, RotaryEmbedding]


# Attention ------------------------------------------------------------------------------------------------------------


def _attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    attn_mask: np.ndarray | None = None,
    past_key: np.ndarray | None = None,
    past_value: np.ndarray | None = None,
    nonpad_kv_seqlen: np.ndarray | None = None,
    *,
    with_matrix: bool,
    opset: int,
    is_causal: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    q_num_heads: int | None = None,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    right_window_size: int = -1,
    qk_matmul_output_mode: int = 0,
) -> tuple[np.ndarray, ...]:
    """ONNX's Attention: the output, all keys, all values and, `with_matrix`, what qk_matmul_output_mode names.

    query is (B, Hq, Lq, D), or (B, Lq, Hq * D) with q_num_heads, and the output is shaped likewise; key and value
    follow suit.  The past and all keys and values are (B, Hkv, L, D or Dv), the matrix is (B, Hq, Lq, Lk).
    """
    if softmax_precision not in _PRECISIONS:
        raise ValueError(f"softmax_precision must be one of {_PRECISIONS[1:]}, got {softmax_precision}")
    if qk_matmul_output_mode not in range(4):
        raise ValueError(f"qk_matmul_output_mode must be 0, 1, 2 or 3, got {qk_matmul_output_mode}")
    rank = query.ndim
    query, key, value = (
        _heads_first(name, x, heads)
        for name, x, heads in (("Q", query, q_num_heads), ("K", key, kv_num_heads), ("V", value, kv_num_heads))
    )
    offset: Any = 0
    if past_key is not None and past_value is not None:
        if nonpad_kv_seqlen is not None:
            raise ValueError("nonpad_kv_seqlen must not be given together with past_key and past_value")
        offset = past_key.shape[2]
        key, value = np.concatenate((past_key, key), axis=2), np.concatenate((past_value, value), axis=2)
    elif past_key is not None or past_value is not None:
        raise ValueError("past_key and past_value must be given together")
    (B, Hq, Lq, D), Lk = query.shape, key.shape[2]
    if nonpad_kv_seqlen is not None:
        offset = nonpad_kv_seqlen - Lq  # the last query stands at the last key

    # Keys beyond a short mask are masked: left out instead of making a longer mask.
    visible, lengths = Lk, nonpad_kv_seqlen
    if attn_mask is not None:
        if attn_mask.dtype.kind in "iu":
            attn_mask = attn_mask.astype(np.float64)
        if attn_mask.ndim and attn_mask.shape[-1] < Lk and not (attn_mask.shape[-1] == 1 and opset < 24):
            visible = attn_mask.shape[-1]
            lengths = None if lengths is None else np.minimum(lengths, visible)

    scale = 1 / math.sqrt(max(D, 1)) if scale is None else scale
    dtype = _dtype(query, value, softmax_precision)
    q, k, v = (x.astype(dtype, copy=False) for x in (query, key, value))
    # Rows before heads again where the output is to be so, which is a matter of strides.
    layout, axes = ("BLHD", (0, 2, 1, 3)) if rank == 3 else ("BHLD", (0, 1, 2, 3))
    left, right = (None if side == -1 else side for side in (left_window_size, right_window_size))
    out: Any = scaled_dot_product_attention(
        q.transpose(axes),
        k[:, :, :visible].transpose(axes),
        v[:, :, :visible].transpose(axes),
        attn_mask,
        is_causal=bool(is_causal),
        scale=scale,
        enable_gqa=True,
        query_offset=offset,
        window=(left, right),
        kv_lengths=lengths,
        softcap=softcap if softcap > 0 else None,
        layout=layout,
    )
    out = out.astype(query.dtype, copy=False)
    if rank == 3:
        out = out.reshape(B, Lq, Hq * value.shape[3])
    if not with_matrix:
        return out, key, value

    mode = qk_matmul_output_mode
    with np.errstate(all="ignore"):  # what is not finite in the input is so in the result, as in the kernels
        matrix = _scores(q, k, scale, softcap if mode >= _CAPPED else 0.0)
        if mode >= _MASKED:
            table = np.empty((B, 3), np.int64)
            table[:, 0], table[:, 1], table[:, 2] = offset, Lq, visible if lengths is None else lengths
            right = 0 if is_causal else right
            left, right = (UNBOUNDED if side is None else side for side in (left, right))
            intervals = KeyIntervals(table, left, right)
            if attn_mask is not None and attn_mask.dtype != bool:
                attn_mask = attn_mask.astype(dtype).astype(matrix.dtype)
            matrix = _masked(matrix, attn_mask, visible, intervals)
        return out, key, value, (_softmax(matrix) if mode == _SOFTMAX else matrix).astype(query.dtype)


def _heads_first(name: str, x: np.ndarray, heads: int | None) -> np.ndarray:
    """A view (B, H, L, D) of (B, L, H * D) with that number of heads; (B, H, L, D) is returned as it is."""
    if x.ndim == 4:
        return x
    if x.ndim != 3:
        raise ValueError(f"{name} must have 3 or 4 axes, got shape {x.shape}")
    if not heads or heads < 0 or x.shape[2] % heads:
        raise ValueError(f"{name} of shape {x.shape} needs a number of heads that divides {x.shape[2]}, got {heads}")
    return x.reshape(*x.shape[:2], heads, x.shape[2] // heads).swapaxes(1, 2)


def _dtype(query: np.ndarray, value: np.ndarray, softmax_precision: int | None) -> np.dtype:
    """What to compute in: query's dtype, or more if value's or the softmax's is more.

    Never less: 16-bit inputs are computed in float32 in any case, and a softmax is not made worse on demand.
    """
    if softmax_precision == _DOUBLE or np.float64 in (query.dtype, value.dtype):
        return np.dtype(np.float64)
    return query.dtype if query.dtype == value.dtype else np.dtype(np.float32)


# The matrix, only for graphs that ask for it --------------------------------------------------------------------------


def _scores(query: np.ndarray, key: np.ndarray, scale: float, softcap: float) -> np.ndarray:
    """(B, Hq, Lq, Lk) scaled scores, capped if softcap > 0, a new array."""
    dtype = statistics_dtype(query.dtype)
    (B, Hq, Lq, D), (Hkv, Lk) = query.shape, key.shape[1:3]
    # The query heads that share a key head have an axis of their own, so that keys are not repeated.
    grouped = query.astype(dtype).reshape(B, Hkv, Hq // max(Hkv, 1), Lq, D)
    score = (grouped @ key.astype(dtype)[:, :, None].swapaxes(3, 4)).reshape(B, Hq, Lq, Lk) * dtype.type(scale)
    return dtype.type(softcap) * np.tanh(score / dtype.type(softcap)) if softcap > 0 else score


def _masked(score: np.ndarray, mask: np.ndarray | None, visible: int, intervals: KeyIntervals) -> np.ndarray:
    """Scores with the mask, of the first `visible` keys, added, and -inf wherever a row must not attend."""
    score = score.copy()
    score[..., visible:] = -np.inf
    if mask is not None:
        attended, added = (mask, 0) if mask.dtype == bool else (mask != -np.inf, mask)
        score[..., :visible] = np.where(attended, score[..., :visible] + added, -np.inf)
    B, _, Lq, Lk = score.shape
    bounds = np.array([intervals.bounds(b, Lq) for b in range(B)]).reshape(B, 2, 1, Lq, 1)
    keys = np.arange(Lk)
    return np.where((bounds[:, 0] <= keys) & (keys < bounds[:, 1]), score, score.dtype.type(-np.inf))


def _softmax(score: np.ndarray) -> np.ndarray:
    """Over the last axis; 0 where all of a row is -inf."""
    largest = score.max(axis=-1, keepdims=True, initial=-np.inf)
    weight: np.ndarray = np.exp(score - np.where(largest == -np.inf, 0, largest))
    total = weight.sum(axis=-1, keepdims=True)
    return weight / np.where(total == 0, 1, total)


# Rotary embedding -----------------------------------------------------------------------------------------------------


def _rotary_embedding(
    x: np.ndarray,
    cos_cache: np.ndarray,
    sin_cache: np.ndarray,
    position_ids: np.ndarray | None = None,
    *,
    interleaved: int = 0,
    num_heads: int | None = None,
    rotary_embedding_dim: int = 0,
) -> np.ndarray:
    """ONNX's RotaryEmbedding of x, (B, H, L, D), or (B, L, H * D) with num_heads; the first R of D numbers are rotated.

    The caches are (positions, R / 2) with position_ids (B, L), or (B, L, R / 2) without.
    """
    out = np.empty(x.shape, x.dtype)
    heads, rotated = (_heads_first("X", a, num_heads) for a in (x, out))
    R = rotary_embedding_dim or heads.shape[3]
    if R % 2 or not 0 < R <= heads.shape[3]:
        raise ValueError(f"an even number of at most {heads.shape[3]} numbers can be rotated, got {R}")
    for name, cache in (("cos_cache", cos_cache), ("sin_cache", sin_cache)):
        if cache.ndim != (3 if position_ids is None else 2) or cache.shape[-1] != R // 2:
            expected = "(B, L, {})" if position_ids is None else "(positions, {})"
            raise ValueError(f"{name} must be {expected.format(R // 2)}, got shape {cache.shape}")
    if position_ids is not None:
        positions = min(len(cos_cache), len(sin_cache))
        checks.integers("position_ids", position_ids, position_ids.shape, 0, positions - 1)
    cos, sin = (cache if position_ids is None else cache[position_ids] for cache in (cos_cache, sin_cache))
    apply_rotary(heads, cos, sin, interleaved=bool(interleaved), out=rotated)
    return out
