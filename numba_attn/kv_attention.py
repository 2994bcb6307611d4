"""Attention over a key-value cache."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np

from numba_attn import arrays, checks
from numba_attn.api import scaled_dot_product_attention
from numba_attn.arrays import Array
from numba_attn.kv_cache import KVCache
from numba_attn.kv_pools import Tokens, counts_of, quantized, restored
from numba_attn.paged_batch import PagedBatch
from numba_attn.problem import Aux

STEP = 8  # tokens of a sequence at once, up to which checking and laying out a call is a good part of its time


def attention_with_kv_cache(
    query: Array,
    cache: KVCache | PagedBatch,
    key: Array | None = None,
    value: Array | None = None,
    *,
    counts: Any = None,
    rotary: tuple[Any, Any] | None = None,
    is_causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    score_mod: Any = None,
    mask_mod: Any = None,
    dropout_p: float = 0.0,
    dropout_seed: Any = None,
    return_aux: tuple[str, ...] = (),
    out: Array | None = None,
    precision: str | None = None,
    backend: str | None = None,
) -> Array | tuple[Array, Aux]:
    """Append tokens to a cache, then attend to all that it holds: prefill, in one piece or several, and decoding.

    Parameters
    ----------
    query : (B, Hq, n, D), of the cache's dtype; Hq a multiple of the cache's Hkv
        The rows stand at the last n positions of each sequence, after the append.  Arrays of any library, in host
        memory, as the cache is.
    cache : KVCache, or what `PagedKVCache.batch` and `PagedKVCache.tables` give
    key, value : (B, Hkv, n, D) and (B, Hkv, n, Dv), optional
        Tokens to append first, one for each row of query.
    counts : int or (B,) ints in [0, n], optional
        How many of the n rows, from the first, each sequence has; the rest is padding, and gives 0.
    rotary : (cos, sin), optional
        Tables of `apply_rotary`, which is done to query, and to key before it is appended, at their positions.  They
        reach as far as the last position, padding included.
    is_causal : bool
        Rows attend to keys up to their own position; otherwise to all that are held.
    window, scale, softcap, alibi_slopes, sinks, score_mod, mask_mod, dropout_p, dropout_seed, return_aux, out,
    precision, backend
        As in `scaled_dot_product_attention`.  Functions get i and j as the row of query and the place in the cache;
        "key_weight" is (B, Hq, cache.lengths.max()).  `sinks` are logits, and have nothing to do with tokens.

    Returns
    -------
    out : (B, Hq, n, Dv) array of query's library; (out, Aux) if `return_aux` names anything.
        A row without keys, as where a sequence is empty, is 0.

    Raises
    ------
    ValueError, TypeError
        What `KVCache.append` or `scaled_dot_product_attention` refuse.  The cache is then as it was.

    Notes
    -----
    How tokens are cut into calls changes nothing but the rounding, in a cache with a window too: there a causal row
    attends to the first `cache.sinks` tokens and the last `cache.window` of the others, up to its own position.  When
    several tokens come at once and overwrite some that rows before the last attend to, keys and values are copied; one
    at a time, as in decoding, nothing is.  Rows without `key` see those of their keys that are still held.  Such
    a cache keeps keys out of order: it takes no `window`, `alibi_slopes`, `score_mod`, `mask_mod` or "key_weight".

    Examples
    --------
    >>> import numpy as np, numba_attn
    >>> rng = np.random.default_rng(0)
    >>> query, key, value = rng.standard_normal((3, 2, 4, 10, 16), dtype=np.float32)
    >>> cache = numba_attn.KVCache(2, 4, 64, 16)
    >>> prompt = attention_with_kv_cache(query[:, :, :9], cache, key[:, :, :9], value[:, :, :9])
    >>> step = attention_with_kv_cache(query[:, :, 9:], cache, key[:, :, 9:], value[:, :, 9:])
    >>> step.shape, cache.lengths
    ((2, 4, 1, 16), array([10, 10]))
    """
    if not isinstance(cache, KVCache | PagedBatch):
        raise TypeError(f"cache must be a KVCache or a batch of a PagedKVCache, got {checks.type_name(cache)}")
    given: dict[str, Any] = {"query": query, "key": key, "value": value, "out": out}
    caller = arrays.adopt(given, tuple(given), on_host="as the cache is")
    q, is_causal = _query(given["query"], cache), checks.flag("is_causal", is_causal)
    tokens = None if key is None and value is None else cache.checked(given["key"], given["value"], counts)
    n = q.shape[2]
    if tokens is not None and tokens.key.shape[2] != n:
        raise ValueError(f"query and key must have the same length, got {n} and {tokens.key.shape[2]}")
    rows = counts_of(counts, len(q), n)
    totals = cache.totals if tokens is None else cache.totals + rows
    offset = totals - rows
    if cache.window is not None:
        refused = {"window": window, "alibi_slopes": alibi_slopes, "score_mod": score_mod, "mask_mod": mask_mod}
        _refuse_in_ring(refused, return_aux)
    if rotary is not None:
        q, tokens = _rotated(rotary, q, tokens, offset)

    # Keys and values of a mask are made before the tokens are written: it is for those that are overwritten.
    masked = is_causal and n > 1 and bool((totals > cache.capacity).any())
    operands = _masked(cache, tokens, offset, n) if masked else None
    # What is held of channels that have scales is attended to as it is, see `storage`: in float32, so that they
    # can be as large as they like, and are not rounded.
    key_scales, value_scales = (None, None) if masked else cache.channel_scales
    scaled = key_scales is not None or value_scales is not None
    given_out = given["out"]
    if scaled:
        _check_out(given_out, q, cache)
        given_out, q = None, _times_channels(q.astype(np.float32), key_scales)
    with nullcontext() if tokens is None else cache.appended(tokens):
        # Without a mask keys are in order; or they are all attended to, which the offset of a single row comes to.
        keys, values, mask = operands or (*_held(cache, _is_step(n, return_aux, backend)), None)
        results = scaled_dot_product_attention(
            q,
            keys,
            values,
            mask,
            is_causal=is_causal and not masked,
            dropout_p=dropout_p,
            scale=scale,
            enable_gqa=True,
            query_offset=offset,
            window=window,
            query_lengths=None if counts is None else rows,
            kv_lengths=None if masked else cache.lengths,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            score_mod=score_mod,
            mask_mod=mask_mod,
            dropout_seed=dropout_seed,
            return_aux=return_aux,
            out=given_out,
            backend=backend,
            precision=precision,
        )
        if scaled:
            results = _of_channels(results, value_scales, cache.dtype, given["out"])
    return caller.give(results)


def _check_out(out: Any, query: np.ndarray, cache: KVCache | PagedBatch) -> None:
    if out is None:
        return
    out = checks.output_array(out, (*query.shape[:3], cache.shape[3]), query.dtype, like="query")
    held = cache.storage()
    for name, x in (("query", query), ("cache", held.key), ("cache", held.value)):
        if checks.overlap(out, x):
            raise ValueError(f"out must not share memory with {name}")


def _times_channels(x: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
    """Rows of all query heads, (B, Hq, n, columns), each times the scales of its key-value head."""
    return x if scales is None else x * np.repeat(scales, x.shape[1] // max(1, len(scales)), axis=0)


def _of_channels(results: Any, scales: np.ndarray | None, dtype: np.dtype, out: Any) -> Any:
    """Results of attention to values that have been divided by the scales of their channels."""
    made, *aux = results if isinstance(results, tuple) else (results,)
    made = _times_channels(made, scales)
    if out is None:
        out = made.astype(dtype, copy=False)
    else:
        out[...] = made
    return (out, *aux) if aux else out


def _is_step(n: int, return_aux: Any, backend: Any) -> bool:
    """Whether a call is one that `repeats` knows.

    A key's weight is for each that is held, and what goes to a device is copied: no more than that then.
    """
    on_cpu = backend is None or (isinstance(backend, str) and backend == "cpu")
    return n <= STEP and on_cpu and isinstance(return_aux, tuple) and not return_aux


def _held(cache: KVCache | PagedBatch, step: bool) -> tuple[Any, Any]:
    """Key and value for attention: views of numbers, or all that is held as it is.

    For a step of decoding, with room that has not been used yet: so the next step is a call like this one, see
    `repeats`.
    """
    if isinstance(cache, PagedBatch) or cache.quantize is not None:
        return cache.storage(whole=step), None
    if not step:
        return cache.used
    held = cache.storage(whole=True)
    return held.key, held.value


def _masked(
    cache: KVCache | PagedBatch, tokens: Tokens | None, offset: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys and values of a ring, those to be appended behind those held, and which of them n rows attend to."""
    assert isinstance(cache, KVCache)  # others have no ring
    (key, value), positions = cache.used, cache.positions
    p = offset[:, None] + np.arange(n)
    if tokens is not None:
        new = (
            _as_held(x, cache, scales)
            for x, scales in zip((tokens.key, tokens.value), cache.channel_scales, strict=True)
        )
        key, value = (np.concatenate(pair, axis=2) for pair in zip((key, value), new, strict=True))
        positions = np.concatenate([positions, p], axis=1)
    p, positions = p[:, :, None], positions[:, None, :]
    assert cache.window is not None
    kept = (positions < cache.sinks) | (positions > p - cache.window)
    return key, value, ((positions >= 0) & (positions <= p) & kept)[:, None]


def _as_held(x: np.ndarray, cache: KVCache, scales: np.ndarray | None) -> np.ndarray:
    """Tokens with what quantisation takes from them."""
    if cache.quantize is None:
        return x
    rows = quantized(x, cache.quantize, scales)
    return restored(rows, cache.quantize, x.shape[-1], scales).astype(x.dtype, copy=False)


def _rotated(
    rotary: Any, query: np.ndarray, tokens: Tokens | None, offset: np.ndarray
) -> tuple[np.ndarray, Tokens | None]:
    from numba_attn.rotary import apply_rotary

    if not isinstance(rotary, tuple | list) or len(rotary) != 2:
        raise TypeError(f"rotary must be a pair of tables (cos, sin), got {checks.type_name(rotary)}")
    cos, sin = rotary
    try:
        if tokens is not None:
            tokens = tokens._replace(key=apply_rotary(tokens.key, cos, sin, position_offset=offset))
        return apply_rotary(query, cos, sin, position_offset=offset), tokens
    except ValueError:
        # Looked for only where there is an error, to say it in terms of arguments that there are.
        positions = np.shape(cos)[-2] if np.ndim(cos) > 1 else 1 << 62
        unplaced = "query must have a position of 0 or more for each row with rotary"
        if wrong := checks.out_of_positions("query", offset, query.shape[2], positions, unplaced):
            raise ValueError(wrong) from None
        raise


def _query(query: Any, cache: KVCache | PagedBatch) -> np.ndarray:
    query = checks.numpy_array("query", query)
    if query.dtype != cache.dtype:
        raise TypeError(f"query must be {cache.dtype}, as the cache is, got {query.dtype}")
    B, Hkv, D, _ = cache.shape
    if query.ndim != 4 or query.shape[0] != B or query.shape[3] != D:
        raise ValueError(f"query must have shape ({B}, Hq, n, {D}), got {query.shape}")
    if Hkv and query.shape[1] % Hkv:
        raise ValueError(f"query heads must be a multiple of key-value heads, got {query.shape[1]} and {Hkv}")
    return query


def _refuse_in_ring(options: dict[str, Any], return_aux: Any) -> None:
    """What is about the places of keys, which in a ring are not their positions."""
    names = [name for name, option in options.items() if option is not None]
    if isinstance(return_aux, tuple | list | set | frozenset) and "key_weight" in return_aux:
        names.append("return_aux 'key_weight'")
    if names:
        raise ValueError(
            f"{names[0]} must not be given with a cache that has a window, which keeps keys out of order; a cache "
            "without one takes it"
        )
