"""Calls that are like an earlier one in everything but what is in their arrays.

What is checked and laid out for a call depends on shapes, strides, dtypes and options alone where no option is a
function, and on what is in a few small arrays: a call that is like it needs neither again, which is most of the time
that a small problem takes.  Where sequences have lengths or positions of their own, these are looked at in each call,
and so is whether a result would be written over what it is made of.
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
# Arguments of `Problem.from_call` that have to be None, those as well that have to be on a device, and how many there
# are in all, in calls that can be repeated.
ABSENT = ("query_lengths", "score_mod", "mask_mod", "block_mask", "dropout_seed")
ABSENT_ON_DEVICE = ("attn_mask", "kv_lengths", "softcap", "alibi_slopes", "sinks")
ARGUMENTS = 23
NUMBERS = float, int  # 1 is a scale as 1.0 is, and True is not
EACH = np.ndarray, list  # of lengths or positions, one for each sequence
SMALL = 1024  # bytes of an array whose contents are compared
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
    given_offset, given_lengths, mask = call["query_offset"], call["kv_lengths"], call["attn_mask"]
    aux = call["return_aux"]
    form: tuple[Any, ...]
    given: tuple[Any, ...] = query, key, value, given_offset, given_lengths, mask, out
    if type(query) is not np.ndarray:
        if type(given_offset) is not int or type(aux) is not tuple or aux:
            return UNKNOWN
        if any(call[name] is not None for name in ABSENT_ON_DEVICE):
            return UNKNOWN
        found = arrays.located(query, key, value, out)
        if found is None:
            return UNKNOWN
        form, given = found
    else:
        if type(key) is Storage and value is None:
            held = key.form, None
        else:
            held = _form(key), _form(value)
        form = _form(query), *held, _form(mask), _form(out)
        if False in form:
            return UNKNOWN
        form = *form, out is None or out.flags.writeable
    dropout, causal, scale, gqa = call["dropout_p"], call["is_causal"], call["scale"], call["enable_gqa"]
    # What is looked at in each call is all the same here; a position that is one integer is laid out once.
    offset = np.ndarray if type(given_offset) in EACH else given_offset
    lengths = np.ndarray if type(given_lengths) in (*EACH, int) else given_lengths
    window, softcap, layout, precision = call["window"], call["softcap"], call["layout"], call["precision"]
    slopes, sinks = _contents(call["alibi_slopes"]), _contents(call["sinks"])
    if not (
        (type(dropout) is float and dropout == 0)
        and (causal is True or causal is False)
        and (scale is None or type(scale) in NUMBERS)
        and (gqa is True or gqa is False)
        and (type(offset) in (int, str) or offset is np.ndarray)
        and (lengths is None or lengths is np.ndarray)
        and (window is None or (type(window) is tuple and all(side is None or type(side) is int for side in window)))
        and (softcap is None or type(softcap) in NUMBERS)
        and type(aux) is tuple
        and all(type(name) is str for name in aux)
        and slopes is not False
        and sinks is not False
        and type(layout) is str
        and (precision is None or type(precision) is str)
        and (backend is None or type(backend) is str)
    ):
        return UNKNOWN
    numbers = scale, softcap, slopes, sinks
    return (form, causal, gqa, numbers, offset, lengths, window, aux, layout, precision, backend), given


def _form(x: Any) -> Any:
    """All of an array but what is in it; None for None, and False for what is of another class, or has to be copied."""
    if x is None:
        return None
    if type(x) is not np.ndarray or not x.dtype.isnative:
        return False
    return x.shape, x.strides, x.dtype


def _contents(x: Any) -> Any:
    """A small array as what can be compared; None and False likewise."""
    if x is None:
        return None
    if type(x) is not np.ndarray or not x.dtype.isnative or x.nbytes > SMALL:
        return False
    return x.shape, x.dtype, x.tobytes()


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
