"""Attention over sequences of different lengths that lie one behind the other, without padding."""

from __future__ import annotations

from typing import Any

import numpy as np

from numba_attn import dispatch
from numba_attn.problem import Aux, Problem

FIXED: dict[str, Any] = {"enable_gqa": True, "query_lengths": None, "kv_lengths": None, "layout": "BHLD"}
"""What the general function would take, and packed sequences leave no choice about."""


def varlen_attention(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    attn_mask: np.ndarray | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    query_offset: Any = 0,
    window: tuple[int | None, int | None] | None = None,
    softcap: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    score_mod: Any = None,
    mask_mod: Any = None,
    block_mask: Any = None,
    dropout_seed: Any = None,
    return_aux: tuple[str, ...] = (),
    out: np.ndarray | None = None,
    backend: str | None = None,
    precision: str | None = None,
) -> np.ndarray | tuple[np.ndarray, Aux]:
    """Attention of each of B packed sequences to its own keys: the same bits as one call for each, without dropout.

    The tokens of sequence b are query[cu_seqlens_q[b] : cu_seqlens_q[b + 1]], and likewise of key and value.  Work is
    shared out by row blocks, so that sequences of any mix of lengths keep all processors busy.

    Shape letters: Tq and Tk tokens of all sequences together, Hq and Hkv query and key-value heads, D head size, Dv
    value head size; Lq and Lk are the greatest lengths.

    Parameters
    ----------
    query : (Tq, Hq, D) float32, float64, float16 or bfloat16 (of ml_dtypes)
    key : (Tk, Hkv, D)
    value : (Tk, Hkv, Dv)
        Any strides.  Hq is a multiple of Hkv: query head h uses key-value head h // (Hq // Hkv).
    cu_seqlens_q, cu_seqlens_k : (B + 1,) ints
        Where sequences begin, from 0, and where the last one ends, Tq or Tk; not decreasing.  The same for
        self-attention.
    attn_mask : bool or floating point, broadcasting to (B, Hq, Lq, Lk), optional
        Of each sequence, its own rows and keys are used.
    query_offset : int, (B,) ints or "bottom_right"
        0 puts the first row of a sequence at its first key, "bottom_right" the last one at the last.
    block_mask : BlockMask of (B, Hq, Lq, Lk), optional
    dropout_p, is_causal, scale, window, softcap, alibi_slopes, sinks, score_mod, mask_mod, dropout_seed, backend,
    precision
        As in `scaled_dot_product_attention`.  Functions get the number of the sequence, and row and key in it.
    return_aux : tuple of str
        Names of `Aux`: "lse", "max_score" and "entropy" are (Tq, Hq), "key_weight" is (Tk, Hq).
    out : (Tq, Hq, Dv), optional
        Where to write the result; must not overlap an input.  Unspecified after `KeyboardInterrupt`.

    Returns
    -------
    out : (Tq, Hq, Dv) array of query's dtype; (out, Aux) if `return_aux` names anything.

    Raises
    ------
    ValueError, TypeError
        Shapes, values or dtypes that do not fit, cu_seqlens among them; nothing has been computed or written then.

    Notes
    -----
    The layout is that of FlashAttention's varlen functions: Dao et al., "FlashAttention" (2022).

    Examples
    --------
    >>> import numpy as np
    >>> x = np.ones((5, 1, 4), np.float32)  # a sequence of two tokens, one of none and one of three
    >>> value = np.arange(5, dtype=np.float32).reshape(5, 1, 1)
    >>> varlen_attention(x, x, value, [0, 2, 2, 5], [0, 2, 2, 5], is_causal=True)[:, 0, 0].round(3)
    array([0. , 0.5, 2. , 2.5, 3. ], dtype=float32)
    """
    run = dispatch.forward(backend)
    problem = Problem.from_call(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        query_offset=query_offset,
        window=window,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        score_mod=score_mod,
        mask_mod=mask_mod,
        block_mask=block_mask,
        dropout_seed=dropout_seed,
        return_aux=return_aux,
        out=out,
        precision=precision,
        cu_seqlens=(cu_seqlens_q, cu_seqlens_k),
        **FIXED,
    )
    run(problem)
    return problem.result if problem.aux is None else (problem.result, problem.aux)
