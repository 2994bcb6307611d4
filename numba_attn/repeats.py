"""Calls that are like an earlier one in everything but what is in their arrays.

What is checked and laid out for a call depends on shapes, strides, dtypes and options alone where no option is an array
or a function: a call that is like it needs neither again, which is most of the time that a small problem takes.  Where
sequences have lengths or positions of their own, these are looked at in each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from numba_attn import arrays
from numba_attn.storage import Storage

# From what differs between calls alike, see `identify`, to the result; None where something else has changed, as the
# number of threads.
Repeat = Callable[..., Any]
MakeRepeat = Callable[[], "Repeat | None"]
Key = tuple[Any, ...]

MOST = 256
# Arguments of `Problem.from_call` that have to be None, and how many there are in all, in calls that can be repeated.
ABSENT = (
    *("attn_mask", "query_lengths", "softcap", "alibi_slopes", "sinks"),
    *("score_mod", "mask_mod", "block_mask", "dropout_seed"),
)
ARGUMENTS = 23
UNKNOWN: tuple[None, tuple[()]] = None, ()

_repeats: dict[Key, Repeat] = {}


def identify(backend: Any, call: dict[str, Any]) -> tuple[Key | None, tuple[Any, ...]]:
    """All that a call depends on but the contents of its arrays, and what a `Repeat` takes instead of these.

    That is None if it cannot be said shortly.  Equal keys are of calls that are valid or not alike: so True is told
    from 1, for one.
    """
    if len(call) != ARGUMENTS:
        return UNKNOWN
    for name in ABSENT:
        if call[name] is not None:
            return UNKNOWN
    query, key, value, out = call["query"], call["key"], call["value"], call["out"]
    given_offset, given_lengths = call["query_offset"], call["kv_lengths"]
    form: tuple[Any, ...]
    given: tuple[Any, ...] = query, key, value, given_offset, given_lengths
    if type(query) is not np.ndarray:
        if type(given_offset) is not int or given_lengths is not None:
            return UNKNOWN
        found = arrays.located(query, key, value, out)
        if found is None:
            return UNKNOWN
        form, given = found
    elif not query.dtype.isnative or out is not None:  # of another byte order it is copied in any case
        return UNKNOWN
    elif type(key) is type(value) is np.ndarray and key.dtype.isnative and value.dtype.isnative:
        held = key.shape, key.strides, key.dtype, value.shape, value.strides, value.dtype
        form = query.shape, query.strides, query.dtype, held
    elif type(key) is Storage and value is None:
        form = query.shape, query.strides, query.dtype, key.form
    else:
        return UNKNOWN
    dropout, causal, scale, gqa = call["dropout_p"], call["is_causal"], call["scale"], call["enable_gqa"]
    offset, lengths = _if_an_array(given_offset), _if_an_array(given_lengths)
    window, aux = call["window"], call["return_aux"]
    layout, precision = call["layout"], call["precision"]
    if not (
        (type(dropout) is float and dropout == 0)
        and (causal is True or causal is False)
        and (scale is None or type(scale) is float)
        and (gqa is True or gqa is False)
        and (type(offset) is int or offset is np.ndarray)
        and (lengths is None or lengths is np.ndarray)
        and (window is None or (type(window) is tuple and all(side is None or type(side) is int for side in window)))
        and type(aux) is tuple
        and not aux
        and type(layout) is str
        and (precision is None or type(precision) is str)
        and (backend is None or type(backend) is str)
    ):
        return UNKNOWN
    return (form, causal, scale, gqa, offset, lengths, window, layout, precision, backend), given


def _if_an_array(x: Any) -> Any:
    """Its class, instead of an array."""
    return np.ndarray if type(x) is np.ndarray else x


def find(key: Key | None) -> Repeat | None:
    """How to repeat a call, if one like it has been made."""
    return None if key is None else _repeats.get(key)


def remember(key: Key | None, make: MakeRepeat | None) -> None:
    """Keep how to repeat a call, if there is such a thing."""
    if key is None or make is None or (repeat := make()) is None:
        return
    if len(_repeats) >= MOST:
        _repeats.clear()
    _repeats[key] = repeat


def forget() -> None:
    """Forget all of them."""
    _repeats.clear()
