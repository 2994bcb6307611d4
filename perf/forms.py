"""Other forms of a case, by the public interface: what a cache keeps, and how sequences of many lengths are given."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from cases import Case, dtype_of, tree_parents
from peer import Prepared, joined, lengths, sequences, within

import numba_attn

PAGE = 16  # tokens


def _cache(case: Case, dtype: str = "float32", **kept: Any) -> tuple[np.ndarray, Any]:
    """Query, and a contiguous cache that is full."""
    query, key, value = (x.astype(dtype_of(dtype)) for x in case.arrays())
    cache = numba_attn.KVCache(case.B, key.shape[1], case.Lk, case.D, dtype=query.dtype, **kept)
    cache.append(key, value)
    return query, cache


def _attended(query: np.ndarray, cache: Any, **options: Any) -> Prepared:
    """Attention to all that a cache holds."""

    def result(found: Any) -> np.ndarray:
        out = found[0] if isinstance(found, tuple) else found
        return np.asarray(out).astype(np.float32)

    call = functools.partial(numba_attn.attention_with_kv_cache, query, cache, **options)
    return Prepared(call, result, cache.nbytes)


def _cached(case: Case, dtype: str = "float32", **kept: Any) -> Prepared:
    return _attended(*_cache(case, dtype, **kept))


def _weights(case: Case) -> Prepared:
    """With the weight of each key, as for caches that drop those of the least."""
    return _attended(*_cache(case), return_aux=("key_weight",))


def _masked(case: Case) -> Prepared:
    """With a function that masks what is not there."""
    length = case.Lk

    def exists(b, h, i, j):  # type: ignore[no-untyped-def]
        return j < length

    return _attended(*_cache(case), mask_mod=exists)


def _paged(case: Case) -> Prepared:
    """In pages whose order is any."""
    query, key, value = case.arrays()
    B, Hkv, _, D = key.shape
    each = -(-case.Lk // PAGE)
    table = case.rng.permutation(B * each).reshape(B, each)
    cache = numba_attn.PagedKVCache(B * each, Hkv, PAGE, D)
    for pages, x in ((cache.key, key), (cache.value, value)):
        pages[table] = x.reshape(B, Hkv, each, PAGE, D).swapaxes(1, 2)
    call = functools.partial(numba_attn.attention_with_kv_cache, query, cache.tables(table, np.full(B, case.Lk)))
    return Prepared(call, np.asarray, case.kv_bytes)


def _function(case: Case) -> Prepared:
    """A tree by a function of its places in the cache, not by a mask."""
    first, descends = case.Lk - case.Lq, numba_attn.block_mask.tree(tree_parents(case.Lq))

    def visible(b, h, i, j):  # type: ignore[no-untyped-def]
        return (j < first) | descends(b, h, i, max(j - first, 0))

    return _attended(*_cache(case), mask_mod=visible)


def _token(case: Case) -> Prepared:
    """The first node of a tree alone, without a mask; the others count for nothing but the result."""
    query, key, value = case.arrays()
    used = case.Lk - case.Lq + 1
    operands = query[:, :, :1], key[:, :, :used], value[:, :, :used]
    call = functools.partial(numba_attn.scaled_dot_product_attention, *operands, enable_gqa=True)

    def with_others(first: np.ndarray) -> np.ndarray:
        all_of_them = numba_attn.scaled_dot_product_attention(query, key, value, **case.keywords())
        return np.concatenate([first, np.asarray(all_of_them)[:, :, 1:]], axis=2)

    return Prepared(call, with_others, case.kv_bytes)


def _varlen(case: Case) -> Prepared:
    """Packed, one sequence behind the other."""
    ends = np.cumsum(lengths(case))
    starts = np.concatenate([[0], ends])
    query, key, value = (np.concatenate([one.swapaxes(0, 1) for one in sequences(case, x)]) for x in case.arrays())
    call = functools.partial(numba_attn.varlen_attention, query, key, value, starts, starts, is_causal=True)
    return Prepared(call, lambda out: joined(case, (one.swapaxes(0, 1) for one in np.split(out, ends[:-1]))))


def _loop(case: Case) -> Prepared:
    """A call for each sequence."""
    operands = list(zip(*(sequences(case, x) for x in case.arrays()), strict=True))

    def call() -> list[Any]:
        attention = numba_attn.scaled_dot_product_attention
        return [attention(query, key, value, is_causal=True) for query, key, value in operands]

    return Prepared(call, functools.partial(joined, case))


def _padded(case: Case) -> Prepared:
    """As if all were of the greatest length."""
    call = functools.partial(numba_attn.scaled_dot_product_attention, *case.arrays(), is_causal=True)
    return Prepared(call, functools.partial(within, case))


# What follows is another problem of the same arrays, or no attention's output: the case's own result stands for it.


def plain_result(case: Case) -> Callable[[Any], np.ndarray]:
    def result(_: Any) -> np.ndarray:
        out = numba_attn.scaled_dot_product_attention(*case.arrays(), **case.keywords())
        return np.asarray(out[0] if isinstance(out, tuple) else out)

    return result


def _without_options(case: Case, dtype: str | None = None, **options: Any) -> Prepared:
    """The same arrays, of another dtype perhaps, with no options but these."""
    arrays = [x if dtype is None else x.astype(dtype_of(dtype)) for x in case.arrays()]
    call = functools.partial(numba_attn.scaled_dot_product_attention, *arrays, enable_gqa=True, **options)
    return Prepared(call, plain_result(case))


def _as_float32(case: Case) -> Prepared:
    return _without_options(case, "float32", **case.options)


def upstream(case: Case) -> np.ndarray:
    """The gradient with respect to the output, N(0, 1)."""
    shape = case.B, case.Hq, case.Lq, case.Dv or case.D
    return np.random.default_rng(1).standard_normal(shape).astype(case.numpy_dtype)


def _gradient(case: Case) -> Prepared:
    """The output, and the gradients of query, key and value, and of a mask."""
    arrays, grad_out = case.arrays(), upstream(case)

    def call() -> Any:
        _, vjp = numba_attn.scaled_dot_product_attention_vjp(*arrays, **case.keywords())
        return vjp(grad_out)

    return Prepared(call, plain_result(case))


def _backward(case: Case) -> Prepared:
    """The gradients alone."""
    _, vjp = numba_attn.scaled_dot_product_attention_vjp(*case.arrays(), **case.keywords())
    return Prepared(functools.partial(vjp, upstream(case)), plain_result(case))


def layer_weights(case: Case) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The state of a PyTorch layer of as many heads of that size, and its input (B, L, E)."""
    rng, E = np.random.default_rng(2), case.Hq * case.D
    shapes = {
        "in_proj_weight": (3 * E, E), "in_proj_bias": (3 * E,), "out_proj.weight": (E, E), "out_proj.bias": (E,),
    }  # fmt: skip
    state = {name: (rng.standard_normal(shape) / np.sqrt(E)).astype(np.float32) for name, shape in shapes.items()}
    return state, rng.standard_normal((case.B, case.Lq, E)).astype(np.float32)


def _layer(case: Case) -> Prepared:
    """A whole layer: projections, heads, attention, output."""
    state, x = layer_weights(case)
    layer = numba_attn.MultiHeadAttention.from_torch_state(state, num_heads=case.Hq)
    return Prepared(functools.partial(layer, x), plain_result(case))


def _diagnose(case: Case) -> Prepared:
    """What the heads do."""
    return Prepared(functools.partial(numba_attn.diagnose, *case.arrays(), **case.keywords()), plain_result(case))


FORMS: dict[str, Callable[[Case], Prepared]] = {
    "float32": _cached,
    "bfloat16": functools.partial(_cached, dtype="bfloat16"),
    "int8": functools.partial(_cached, dtype="bfloat16", quantize="int8"),
    "int4": functools.partial(_cached, dtype="bfloat16", quantize="int4"),
    "int8 float32": functools.partial(_cached, quantize="int8"),
    "int4 float32": functools.partial(_cached, quantize="int4"),
    "paged": _paged,
    "weights": _weights,
    "masked": _masked,
    "function": _function,
    "token": _token,
    "varlen": _varlen,
    "loop": _loop,
    "padded": _padded,
    "plain": _without_options,
    "full causal": functools.partial(_without_options, is_causal=True),
    "as float32": _as_float32,
    "gradient": _gradient,
    "backward": _backward,
    "layer": _layer,
    "diagnose": _diagnose,
}
