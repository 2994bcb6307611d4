"""The public functions: validate, dispatch, run."""

from __future__ import annotations

from typing import Any

from numba_attn import dispatch
from numba_attn.arrays import Array
from numba_attn.problem import Aux


def scaled_dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    query_offset: Any = 0,
    window: tuple[int | None, int | None] | None = None,
    query_lengths: Any = None,
    kv_lengths: Any = None,
    softcap: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    score_mod: Any = None,
    mask_mod: Any = None,
    block_mask: Any = None,
    dropout_seed: Any = None,
    return_aux: tuple[str, ...] = (),
    out: Array | None = None,
    layout: str = "BHLD",
    backend: str | None = None,
    precision: str | None = None,
) -> Array | tuple[Array, Aux]:
    """Scaled dot-product attention, softmax(scale * Q K^T + mask) V, without ever forming the matrix of scores.

    The first eight parameters are PyTorch's, in name, order, default and meaning.  Shape letters: B batch (any number
    of axes, none included), Hq and Hkv query and key-value heads, Lq and Lk lengths, D head size, Dv value head size.

    Parameters
    ----------
    query : (B, Hq, Lq, D) float32, float64, float16 or bfloat16 (of ml_dtypes)
    key : (B, Hkv, Lk, D)
    value : (B, Hkv, Lk, Dv)
        Any strides, read-only and memory-mapped included; nothing is copied.  Rank 3 is (H, L, D), rank 2 is (L, D).
        Arrays of NumPy, of torch or JAX on the CPU, or of any class that speaks DLPack; these and attn_mask and out of
        one library, other arguments of that or of NumPy.
    attn_mask : bool or floating point, broadcasting to (B, Hq, Lq, Lk), optional
        True = attend; or numbers added to the scaled scores, rounded to the precision of the scores, where -inf masks.
    dropout_p : float in [0, 1)
        Probability of each attention probability to be dropped; what is kept is divided by 1 - dropout_p.
    is_causal : bool
        Row i, at position p = i + query_offset, attends to keys j <= p.
    scale : float, optional
        Any finite number; 1 / sqrt(D) if None.
    enable_gqa : bool
        Allow Hq to be a multiple of Hkv: query head h uses key-value head h // (Hq // Hkv).
    query_offset : int, (B,) ints or "bottom_right"
        Position of query row 0 on the key axis, for causal and window.  "bottom_right" is Lk - Lq, of the valid
        lengths where those are given, so that the last query row stands at the last key.
    window : (left, right), optional
        Attend to keys j with p - left <= j <= p + right; None for a side without bound.
    query_lengths, kv_lengths : int or (B,) ints, optional
        Valid rows of query and of key and value; what is beyond is padding and never read.
    softcap : float, optional
        c > 0: scaled scores s become c * tanh(s / c).
    alibi_slopes : (Hq,) or (B, Hq) floating point, optional
        slope * |p - j| is subtracted from the score of row i, at position p = i + query_offset, and key j.
    sinks : (Hq,) floating point, optional
        One more logit for each head in the denominator of the softmax, neither scaled nor capped, without a value.
    score_mod : function (score, b, h, i, j) -> float, optional
        Changes scores, after all of the above and before masks.  A Python or `@njit` function; it may use what Numba
        compiles, scalars and arrays of its surroundings included, and must not raise.  Scalars are constants of what is
        compiled: one that changes from call to call is better an array of one element.
    mask_mod : function (b, h, i, j) -> bool, optional
        Row i of head h of sequence b may attend to key j; plain indices of the arrays, not shifted by query_offset.
    block_mask : BlockMask, optional
        A mask_mod with what is known of every tile, see `create_block_mask`.
    dropout_seed : int in [0, 2**64), optional
        The same seed drops the same probabilities, whatever the threads; fresh from numpy.random if None.
    return_aux : tuple of str
        Names among "lse", "max_score", "entropy" and "key_weight": the result is (out, Aux), see `Aux`.
    out : (B, Hq, Lq, Dv), optional
        Where to write the result; must not overlap an input.  Unspecified after `KeyboardInterrupt`.
    precision : None or "bfloat16"
        "bfloat16" rounds float32 input to bfloat16 for the products, on processors that have these, which is faster;
        for those with a cache of 8-bit integers to 16 bits, see `KVCache`.
    layout : "BHLD" or "BLHD"
        Whether heads or rows come first in query, key, value, out and lse.  attn_mask is (B, Hq, Lq, Lk) in both.
    backend : None, "cpu", "cuda", "reference"
        None is "cpu", or "cuda" for arrays on a CUDA device.

    Returns
    -------
    out : array of query's library, dtype and layout; (out, Aux) if `return_aux` names anything.
        A row that attends to nothing is 0, its lse -inf, or the sink if there is one.  Where a class speaks DLPack but
        has no `__array_namespace__` to make others, results are NumPy's.

    Raises
    ------
    ValueError, TypeError
        Shapes or values, and types, that do not fit; nothing has been computed or written then.
    NotImplementedError
        A backend that cannot be used here, with the reason.

    Notes
    -----
    Masks, causal, window and lengths combine by "and".  What is masked is never used: NaN there changes no bit of the
    result.  The same bits come out for any number of threads and, without
    dropout, for a sequence alone or in any batch.

    Vaswani et al., "Attention Is All You Need" (2017), equation 1.

    Examples
    --------
    >>> import numpy as np
    >>> query = key = np.eye(2, dtype=np.float32)
    >>> value = np.array([[1.0], [3.0]], dtype=np.float32)
    >>> scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.0)
    array([[1.],
           [2.]], dtype=float32)
    """
    return dispatch.attend(
        backend,
        query=query,
        key=key,
        value=value,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        query_offset=query_offset,
        window=window,
        query_lengths=query_lengths,
        kv_lengths=kv_lengths,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        score_mod=score_mod,
        mask_mod=mask_mod,
        block_mask=block_mask,
        dropout_seed=dropout_seed,
        return_aux=return_aux,
        out=out,
        layout=layout,
        precision=precision,
    )
