"""The same functions inside a user's own compiled code.

Numba calls `init` by an entry point, before it compiles anything: from then on, `scaled_dot_product_attention` may be
called in nopython code, by one thread, so that the user's `prange` may surround it.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core.errors import TypingError
from numba.extending import intrinsic, overload

from numba_attn.api import scaled_dot_product_attention
from numba_attn.cpu.jit import OPTIONS, counting_device
from numba_attn.masks import MOST_OFFSET, UNBOUNDED

KINDS = {types.float32: "f", types.float64: "d"}
_NUMBERS = int | float | types.Integer | types.Float
SCALARS = (
    "is_causal", "scale", "enable_gqa", "query_offset", "window", "query_lengths", "kv_lengths", "softcap",
)  # fmt: skip
_PARAMETERS = inspect.signature(scaled_dot_product_attention).parameters


def init() -> None:
    """Tell Numba: importing this module has done so."""


def _is_default(name: str, given: Any) -> bool:
    """Whether an argument, or its type, is what it would be if it were left out."""
    if isinstance(given, types.Omitted):
        given = given.value
    elif isinstance(given, types.Literal):
        given = given.literal_value
    elif isinstance(given, types.BaseTuple) and not len(given):
        given = ()
    default = _PARAMETERS[name].default
    if default is None:
        return given is None or isinstance(given, types.NoneType)
    return not isinstance(given, types.Type) and given == default


def _is_none(given: Any) -> bool:
    given = given.value if isinstance(given, types.Omitted) else given
    return given is None or isinstance(given, types.NoneType)


def _check_operands(operands: Sequence[tuple[str, Any]]) -> None:
    for name, kind in operands:
        if not isinstance(kind, types.Array) or kind.dtype not in KINDS or not 2 <= kind.ndim <= 4:
            raise TypingError(f"{name} must be a float32 or float64 array of 2 to 4 axes in compiled code, got {kind}")
    first = operands[0][1]
    if any(kind.dtype != first.dtype or kind.ndim != first.ndim for _, kind in operands):
        raise TypingError(f"query, key and value must have one dtype and rank, got {[str(k) for _, k in operands]}")


def _check_options(options: dict[str, Any]) -> None:
    for name, given in options.items():
        if name == "dropout_p" and isinstance(given, _NUMBERS):  # which is looked at when it is known
            continue
        if name not in SCALARS and not _is_default(name, given):
            raise TypingError(f"{name} is not available in compiled code, where options are {', '.join(SCALARS)}")
    options = {name: x.value if isinstance(x, types.Omitted) else x for name, x in options.items()}
    for name in ("is_causal", "enable_gqa"):
        if not isinstance(options[name], bool | types.Boolean):
            raise TypingError(f"{name} must be True or False, got {options[name]}")
    for name in ("scale", "softcap"):
        if not (_is_none(options[name]) or isinstance(options[name], _NUMBERS)):
            raise TypingError(f"{name} must be a real number, got {options[name]}")
    for name in ("query_offset", "query_lengths", "kv_lengths"):
        if not (_is_none(options[name]) or isinstance(options[name], int | types.Integer)):
            raise TypingError(f"{name} must be an integer in compiled code, got {options[name]}")
    window = options["window"]
    if not _is_none(window) and not (isinstance(window, types.BaseTuple) and len(window) == 2):
        raise TypingError(f"window must be a pair (left, right), got {window}")
    if not all(_is_none(side) or isinstance(side, types.Integer) for side in window or ()):
        raise TypingError(f"window must be a pair of integers or None, got {window}")


def _addresses(kind: str) -> Any:
    """An intrinsic: where the addresses of the machine code are, of `inside.attend` and of what that takes.

    They are of this process: Numba does not keep code on disk that knows them.
    """
    from numba_attn.cpu import inside

    entry, codes = inside.entry(kind)
    addresses = np.concatenate([entry.code, codes])
    _KEPT.append(addresses)

    @intrinsic
    def at(context):
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Sequence[Any]) -> Any:
            pointer = context.add_dynamic_addr(builder, addresses.ctypes.data, info="numba_attn")
            return builder.bitcast(pointer, context.get_value_type(signature.return_type))

        return types.CPointer(types.intp)(), codegen

    return at


_KEPT: list[np.ndarray] = []


@counting_device
def _with_four_axes_of_two(x):
    return x[np.newaxis, np.newaxis]


@counting_device
def _with_four_axes_of_three(x):
    return x[np.newaxis]


@counting_device
def _with_four_axes(x):
    return x


_EXPAND = {2: _with_four_axes_of_two, 3: _with_four_axes_of_three, 4: _with_four_axes}


@counting_device
def _no_window(window):
    return UNBOUNDED, UNBOUNDED


@counting_device
def _left(window):
    return min(window[0], UNBOUNDED), UNBOUNDED


@counting_device
def _right(window):
    return UNBOUNDED, min(window[1], UNBOUNDED)


@counting_device
def _both(window):
    return min(window[0], UNBOUNDED), min(window[1], UNBOUNDED)


def _sides(window: Any) -> Any:
    """A function of the window, of which it depends on the types what is bounded."""
    if _is_none(window):
        return _no_window
    given = window.value if isinstance(window, types.Omitted) else window
    left, right = (not _is_none(side) for side in given)
    return {(False, False): _no_window, (True, False): _left, (False, True): _right, (True, True): _both}[left, right]


@overload(scaled_dot_product_attention, jit_options=OPTIONS)
def _attend(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False,
    query_offset=0, window=None, query_lengths=None, kv_lengths=None, softcap=None, alibi_slopes=None, sinks=None,
    score_mod=None, mask_mod=None, block_mask=None, dropout_seed=None, return_aux=(), out=None, layout="BHLD",
    backend=None, precision=None,
):  # fmt: skip
    given = dict(locals())
    operands = [(name, given.pop(name)) for name in ("query", "key", "value")]
    _check_operands(operands)
    _check_options(given)
    from numba_attn.cpu.inside import attend_through_pointer

    kind = operands[0][1]
    limits = np.finfo(str(kind.dtype))
    most, tiny = float(limits.max), float(limits.tiny)
    at, expand = _addresses(KINDS[kind.dtype]), _EXPAND[kind.ndim]
    has_scale, has_softcap = not _is_none(scale), not _is_none(softcap)
    has_rows, has_keys = not _is_none(query_lengths), not _is_none(kv_lengths)
    sides = _sides(window)

    def implementation(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False,
        query_offset=0, window=None, query_lengths=None, kv_lengths=None, softcap=None, alibi_slopes=None, sinks=None,
        score_mod=None, mask_mod=None, block_mask=None, dropout_seed=None, return_aux=(), out=None, layout="BHLD",
        backend=None, precision=None,
    ):  # fmt: skip
        q, k, v = expand(query), expand(key), expand(value)
        (B, Hq, Lq, D), (Bk, Hkv, Lk, Dk), (Bv, Hv, Lv, Dv) = q.shape, k.shape, v.shape
        if Bk != B or Bv != B or Hkv != Hv or Lk != Lv or Dk != D:
            raise ValueError("query, key and value must have shapes (B, Hq, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv)")
        if Hq != Hkv and (not enable_gqa or Hkv == 0 or Hq % Hkv):
            raise ValueError("query heads must be as many as key heads, or with enable_gqa a multiple")
        if dropout_p != 0:
            raise ValueError("dropout_p must be 0 in compiled code")
        rows, keys = Lq, Lk
        if has_rows:
            rows = query_lengths
        if has_keys:
            keys = kv_lengths
        if not (0 <= rows <= Lq and 0 <= keys <= Lk):
            raise ValueError("query_lengths and kv_lengths must be between 0 and the lengths of the arrays")
        if not -MOST_OFFSET <= query_offset <= MOST_OFFSET:
            raise ValueError("query_offset must be between -2**40 and 2**40")
        left, right = sides(window)
        if left < 0 or right < 0:
            raise ValueError("window sides must be 0 or more, or None for unbounded")
        if is_causal:
            right = 0
        factor, cap = np.nan, 0.0
        if has_scale:
            factor = np.float64(scale)  # `float` would leave one of 32 bits as it is
            if not abs(factor) < most / 2:
                raise ValueError("scale must be finite, in the arrays' dtype too")
        if has_softcap:
            cap = np.float64(softcap)
            if not tiny <= cap <= most:
                raise ValueError("softcap must be positive and finite, in the arrays' dtype too")
        result = np.empty((B, Hq, Lq, Dv), query.dtype)
        codes = carray(at(), (3,))
        attend_through_pointer(
            codes, codes[1:], q, k, v, result, np.int64(query_offset), np.int64(rows), np.int64(keys), np.int64(left),
            np.int64(right), factor, cap,
        )  # fmt: skip
        return result.reshape(query.shape[:-1] + (Dv,))  # noqa: RUF005, what Numba compiles

    return implementation
