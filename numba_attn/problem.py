"""One call of attention, validated: every check and every error message is here, and nowhere else.

Shape letters, the same in the whole package: B batch, Hq and Hkv query and key-value heads, Lq and Lk lengths, D head
size, Dv value head size.
"""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from numba_attn.masks import UNBOUNDED, KeyIntervals

LAYOUTS = ("BHLD", "BLHD")
AUX_NAMES = ("lse", "max_score", "entropy", "key_weight")
_OFFSET_LIMIT = 1 << 40


class Aux(NamedTuple):
    """Results beside the output, one for each name in `return_aux`; the others are None."""

    lse: Any = None
    """log(sum(exp(score))) of every query row, natural logarithm; -inf for a row that attends to nothing."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A validated call.  Arrays are views with heads before rows, (*batch, H, L, D), whatever the caller's layout."""

    query: np.ndarray  # (*batch, Hq, Lq, D)
    key: np.ndarray  # (*batch, Hkv, Lk, D)
    value: np.ndarray  # (*batch, Hkv, Lk, Dv)
    mask: np.ndarray | None  # bool or float, as many axes as the query, each full or 1: (*batch, Hq, Lq, Lk)
    intervals: KeyIntervals
    scale: float
    out: np.ndarray  # (*batch, Hq, Lq, Dv), to be written
    lse: np.ndarray | None  # (*batch, Hq, Lq), to be written
    result: np.ndarray  # out as the caller gets it
    aux: Aux | None

    @classmethod
    def from_call(
        cls,
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any,
        dropout_p: Any,
        is_causal: Any,
        scale: Any,
        enable_gqa: Any,
        *,
        query_offset: Any,
        window: Any,
        query_lengths: Any,
        kv_lengths: Any,
        softcap: Any,
        alibi_slopes: Any,
        sinks: Any,
        score_mod: Any,
        mask_mod: Any,
        block_mask: Any,
        dropout_seed: Any,
        return_aux: Any,
        out: Any,
        layout: Any,
        precision: Any,
    ) -> Problem:
        """Check the arguments of `numba_attn.scaled_dot_product_attention`, allocate the results, compute nothing."""
        query, key, value = _operand("query", query), _operand("key", key), _operand("value", value)
        if not query.dtype == key.dtype == value.dtype:
            raise TypeError(
                f"query, key and value must have one dtype, got {query.dtype}, {key.dtype} and {value.dtype}"
            )
        if not query.ndim == key.ndim == value.ndim:
            raise ValueError(
                "query, key and value must have the same number of axes, "
                f"got shapes {query.shape}, {key.shape} and {value.shape}"
            )
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
        _refuse_options_to_come(
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            score_mod=score_mod,
            mask_mod=mask_mod,
            block_mask=block_mask,
            dropout_seed=dropout_seed,
        )
        _check_dropout(dropout_p)
        _check_precision(precision)
        names = _aux_names(return_aux)

        q, k, v = (_heads_first(x, layout) for x in (query, key, value))
        _check_shapes(q, k, v, _flag("enable_gqa", enable_gqa))
        batch, Lq, Lk = q.shape[:-3], q.shape[-2], k.shape[-2]
        return_shape = (*query.shape[:-1], value.shape[-1])
        result = np.empty(return_shape, query.dtype) if out is None else _check_out(out, return_shape, query.dtype)

        mask = None if attn_mask is None else _mask(attn_mask, (*q.shape[:-1], Lk), query.ndim)
        intervals = _intervals(
            batch, Lq, Lk, query_offset, _flag("is_causal", is_causal), window, query_lengths, kv_lengths
        )
        scale = _scale(scale, q.shape[-1], q.dtype)
        if out is not None:
            for name, x in (("query", query), ("key", key), ("value", value), ("attn_mask", mask)):
                if x is not None and _overlap(result, x):
                    raise ValueError(f"out must not share memory with {name}")
        lse = np.empty(return_shape[:-1], query.dtype) if "lse" in names else None
        return cls(
            query=q,
            key=k,
            value=v,
            mask=mask,
            intervals=intervals,
            scale=scale,
            out=_heads_first(result, layout),
            lse=None if lse is None else _heads_first(lse[..., None], layout)[..., 0],
            result=result,
            aux=Aux(lse=lse) if names else None,
        )


# Arrays ---------------------------------------------------------------------------------------------------------------


def _operand(name: str, x: Any) -> np.ndarray:
    """A float32 or float64 array of two or more axes, in native byte order."""
    x = _ndarray(name, x)
    if x.dtype.char not in "fd":
        raise TypeError(f"{name} must be float32 or float64, got {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"{name} must have at least 2 axes (length, head size), got shape {x.shape}")
    return x


def _ndarray(name: str, x: Any) -> np.ndarray:
    if type(x) is not np.ndarray:
        if not isinstance(x, np.ndarray):
            raise TypeError(f"{name} must be a NumPy array, got {_type_name(x)}")
        if isinstance(x, np.ma.MaskedArray):
            raise TypeError(f"{name} must not be a masked array: pass its data, and the mask as attn_mask")
        x = np.asarray(x)
    return x if x.dtype.isnative else x.astype(x.dtype.newbyteorder("="))


def _heads_first(x: np.ndarray, layout: str) -> np.ndarray:
    """A view (*batch, H, L, D); an array without a head axis has one head."""
    if x.ndim == 2:
        return x[None]
    return x if layout == "BHLD" else x.swapaxes(-3, -2)


def _check_shapes(q: np.ndarray, k: np.ndarray, v: np.ndarray, enable_gqa: bool) -> None:
    if not q.shape[:-3] == k.shape[:-3] == v.shape[:-3]:
        raise ValueError(
            f"query, key and value must have the same batch axes, got {q.shape[:-3]}, {k.shape[:-3]} and {v.shape[:-3]}"
        )
    Hq, Hkv = q.shape[-3], k.shape[-3]
    if v.shape[-3] != Hkv:
        raise ValueError(f"key and value must have the same number of heads, got {Hkv} and {v.shape[-3]}")
    if v.shape[-2] != k.shape[-2]:
        raise ValueError(f"key and value must have the same length, got {k.shape[-2]} and {v.shape[-2]}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"query and key must have the same head size, got {q.shape[-1]} and {k.shape[-1]}")
    if Hq != Hkv:
        if not enable_gqa:
            raise ValueError(
                f"query has {Hq} heads, key and value have {Hkv}: "
                "they must be equal, or enable_gqa=True and query's a multiple"
            )
        if Hkv == 0 or Hq % Hkv:
            raise ValueError(f"query heads must be a multiple of key-value heads, got {Hq} and {Hkv}")


def _mask(mask: Any, scores: tuple[int, ...], rank: int) -> np.ndarray:
    """The mask with as many axes as the scores, each of them full or 1; `rank` is that of the caller's query."""
    mask = _ndarray("attn_mask", mask)
    if mask.dtype.char not in "?fd":
        raise TypeError(f"attn_mask must be bool, float32 or float64, got {mask.dtype}")
    expected = scores if rank > 2 else scores[1:]
    if mask.ndim > len(expected) or any(
        m not in (1, n) for m, n in zip(mask.shape[::-1], expected[::-1], strict=False)
    ):
        raise ValueError(f"attn_mask of shape {mask.shape} does not broadcast to {expected}")
    return mask.reshape((1,) * (len(scores) - mask.ndim) + mask.shape)


def _check_out(out: Any, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
        raise TypeError(f"out must be a NumPy array, got {_type_name(out)}")
    if out.dtype != dtype or not out.dtype.isnative:
        raise TypeError(f"out must be {dtype}, as query is, got {out.dtype}")
    if out.shape != shape:
        raise ValueError(f"out must have shape {shape}, got {out.shape}")
    if not out.flags.writeable:
        raise ValueError("out must be writeable")
    if _overlaps_itself(out):
        raise ValueError(f"out must not overlap itself, got strides {out.strides} for shape {out.shape}")
    return out


def _overlap(a: np.ndarray, b: np.ndarray) -> bool:
    if not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=1_000_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def _overlaps_itself(x: np.ndarray) -> bool:
    """Whether two elements may be at one address (never a wrong no; a wrong yes only for very odd strides)."""
    if x.flags.c_contiguous or x.size == 0:
        return False
    reach = x.itemsize
    for stride, n in sorted((abs(s), n) for s, n in zip(x.strides, x.shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach += stride * (n - 1)
    return False


# Options --------------------------------------------------------------------------------------------------------------


def _refuse_options_to_come(**options: Any) -> None:
    for name, x in options.items():
        if x is not None:
            raise NotImplementedError(f"{name} is not implemented yet")


def _check_dropout(p: Any) -> None:
    if type(p) is not float:
        p = _number("dropout_p", p)
    if not 0 <= p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {p!r}")
    if p:
        raise NotImplementedError("dropout_p other than 0 is not implemented yet")


def _check_precision(precision: Any) -> None:
    if precision is None:
        return
    if precision == "bfloat16":
        raise NotImplementedError("precision='bfloat16' is not implemented yet")
    raise ValueError(f"precision must be None or 'bfloat16', got {precision!r}")


def _aux_names(names: Any) -> tuple[str, ...]:
    if names == ():
        return ()
    if isinstance(names, str) or not isinstance(names, tuple | list | set | frozenset):
        raise TypeError(f"return_aux must be a tuple of names among {AUX_NAMES}, got {names!r}")
    for name in names:
        if name not in AUX_NAMES:
            raise ValueError(f"return_aux names must be among {AUX_NAMES}, got {name!r}")
        if name != "lse":
            raise NotImplementedError(f"return_aux={name!r} is not implemented yet")
    return tuple(names)


def _flag(name: str, x: Any) -> bool:
    if not isinstance(x, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {_type_name(x)}")
    return bool(x)


def _number(name: str, x: Any) -> float:
    if isinstance(x, bool | np.bool_ | str) or not hasattr(type(x), "__float__"):
        raise TypeError(f"{name} must be a real number, got {_type_name(x)}")
    return float(x)


def _scale(scale: Any, D: int, dtype: np.dtype) -> float:
    if scale is None:
        return 1 / math.sqrt(D) if D else 1.0
    scale = _number("scale", scale)
    if not abs(scale) < float(np.finfo(dtype).max) / 2:  # room for a change of base
        raise ValueError(f"scale must be finite, in {dtype} too, got {scale}")
    return scale


def _intervals(
    batch: tuple[int, ...],
    Lq: int,
    Lk: int,
    query_offset: Any,
    is_causal: bool,
    window: Any,
    query_lengths: Any,
    kv_lengths: Any,
) -> KeyIntervals:
    if type(query_offset) is int and query_lengths is None and kv_lengths is None:
        _integers("query_offset", query_offset, batch, -_OFFSET_LIMIT, _OFFSET_LIMIT)
        table = _uniform_table(math.prod(batch), query_offset, Lq, Lk)
    else:
        table = np.empty((math.prod(batch), 3), np.int64)
        table[:, 1] = Lq if query_lengths is None else _integers("query_lengths", query_lengths, batch, 0, Lq)
        table[:, 2] = Lk if kv_lengths is None else _integers("kv_lengths", kv_lengths, batch, 0, Lk)
        if isinstance(query_offset, str):
            if query_offset != "bottom_right":
                raise ValueError(f"query_offset must be integers or 'bottom_right', got {query_offset!r}")
            table[:, 0] = table[:, 2] - table[:, 1]
        else:
            table[:, 0] = _integers("query_offset", query_offset, batch, -_OFFSET_LIMIT, _OFFSET_LIMIT)
    left, right = _window(window)
    return KeyIntervals(table, left, 0 if is_causal else right)


@functools.lru_cache(maxsize=64)
def _uniform_table(B: int, offset: int, Lq: int, Lk: int) -> np.ndarray:
    """The table of key intervals of sequences that are all alike: making it takes longer than a small problem."""
    table = np.empty((B, 3), np.int64)
    table[:] = offset, Lq, Lk
    table.flags.writeable = False
    return table


def _window(window: Any) -> tuple[int, int]:
    if window is None:
        return UNBOUNDED, UNBOUNDED
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise TypeError(f"window must be a pair (left, right), got {window!r}")
    left, right = (UNBOUNDED if side is None else _integer("window", side) for side in window)
    if left < 0 or right < 0:
        raise ValueError(f"window sides must be 0 or more, or None for unbounded, got {tuple(window)}")
    return min(left, UNBOUNDED), min(right, UNBOUNDED)


def _integers(name: str, x: Any, batch: tuple[int, ...], low: int, high: int) -> Any:
    """An integer, or one for each sequence of the batch as a flat array, within [low, high]."""
    if type(x) is int:
        values: Any = x
        smallest = largest = x
    else:
        values = np.asarray(x)
        if values.dtype.kind not in "iu":
            raise TypeError(f"{name} must be integers, got {_type_name(x)} of {values.dtype}")
        if values.ndim and values.shape != batch and values.shape != (math.prod(batch),):
            raise ValueError(f"{name} must be an integer or have shape {batch or (1,)}, got shape {values.shape}")
        if values.size == 0:
            return values.reshape(-1)
        smallest, largest = int(values.min()), int(values.max())
        values = values.reshape(-1)
    if smallest < low or largest > high:
        raise ValueError(f"{name} must be between {low} and {high}, got {smallest if smallest < low else largest}")
    return values


def _integer(name: str, x: Any) -> int:
    if isinstance(x, bool | np.bool_):
        raise TypeError(f"{name} must be integers, got {_type_name(x)}")
    try:
        return operator.index(x)
    except TypeError:
        raise TypeError(f"{name} must be integers, got {_type_name(x)}") from None


def _type_name(x: Any) -> str:
    return f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")
