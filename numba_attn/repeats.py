"""Calls that are like an earlier one in everything but what is in their arrays.

What is checked and laid out for a call depends on shapes, strides, dtypes and options alone where no option is an array
or a function: a call that is like it needs neither again, which is most of the time that a small problem takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

# From query, key and value to the result; None where something else has changed, as the number of threads.
Repeat = Callable[[np.ndarray, np.ndarray, np.ndarray], "np.ndarray | None"]
MakeRepeat = Callable[[], "Repeat | None"]
Key = tuple[Any, ...]

MOST = 256
# Arguments of `Problem.from_call` that have to be None, and how many there are in all, in calls that can be repeated.
ABSENT = (
    *("attn_mask", "out", "query_lengths", "kv_lengths", "softcap", "alibi_slopes", "sinks"),
    *("score_mod", "mask_mod", "block_mask", "dropout_seed"),
)
ARGUMENTS = 23

_repeats: dict[Key, Repeat] = {}


def key_of(backend: Any, call: dict[str, Any]) -> Key | None:
    """All that a call depends on but the contents of its arrays; None if that cannot be said shortly.

    Equal keys are of calls that are valid or not alike: so True is told from 1, for one.
    """
    if len(call) != ARGUMENTS:
        return None
    for name in ABSENT:
        if call[name] is not None:
            return None
    query, key, value = call["query"], call["key"], call["value"]
    if not type(query) is type(key) is type(value) is np.ndarray:
        return None
    dropout, causal, scale, gqa = call["dropout_p"], call["is_causal"], call["scale"], call["enable_gqa"]
    offset, window, aux = call["query_offset"], call["window"], call["return_aux"]
    layout, precision = call["layout"], call["precision"]
    if not (
        (type(dropout) is float and dropout == 0)
        and (causal is True or causal is False)
        and (scale is None or type(scale) is float)
        and (gqa is True or gqa is False)
        and type(offset) is int
        and (window is None or (type(window) is tuple and all(side is None or type(side) is int for side in window)))
        and type(aux) is tuple
        and not aux
        and type(layout) is str
        and (precision is None or type(precision) is str)
        and (backend is None or type(backend) is str)
    ):
        return None
    return (
        query.shape, query.strides, query.dtype, key.shape, key.strides, key.dtype,
        value.shape, value.strides, value.dtype, causal, scale, gqa, offset, window, layout, precision, backend,
    )  # fmt: skip


def find(key: Key | None) -> Repeat | None:
    """How to repeat a call, if one like it has been made."""
    return None if key is None else _repeats.get(key)


def remember(key: Key | None, make: MakeRepeat | None) -> None:
    """Keep how to repeat a call, if there is such a thing; arrays of another byte order are copied in any case."""
    if key is None or make is None or not (key[2].isnative and key[5].isnative and key[8].isnative):
        return
    if (repeat := make()) is None:
        return
    if len(_repeats) >= MOST:
        _repeats.clear()
    _repeats[key] = repeat


def forget() -> None:
    """Forget all of them."""
    _repeats.clear()
