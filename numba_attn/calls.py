"""Calls of attention whose options other functions were given, checked before those compute anything."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from numba_attn import dispatch
from numba_attn.api import scaled_dot_product_attention
from numba_attn.problem import Aux, Problem

DEFAULTS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(scaled_dot_product_attention).parameters.items()
    if parameter.default is not parameter.empty
}
"""Of the options of `scaled_dot_product_attention`."""


def check_names(function: str, options: dict[str, Any], known: tuple[str, ...]) -> None:
    """A TypeError for an option of attention that a function does not have, as Python itself gives one."""
    for name in options:
        if name not in known:
            raise TypeError(f"{function} got an unexpected option {name!r}, known are {', '.join(known)}")


def prepare(query: Any, key: Any, value: Any, **options: Any) -> tuple[Callable[[Problem], object], Problem]:
    """A validated call of `scaled_dot_product_attention`, and what computes it; nothing has been read of the arrays."""
    options = {**DEFAULTS, **options}
    run = dispatch.forward(options.pop("backend"))
    return run, Problem.from_call(query, key, value, **options)


def checked_call(
    query: Any, key: Any, value: Any, **options: Any
) -> tuple[Callable[[], tuple[np.ndarray, Aux | None]], Problem | None]:
    """A validated call likewise, of arrays that are still to be written, see `dispatch.checked`."""
    options = {**DEFAULTS, **options}
    return dispatch.checked(options.pop("backend"), query=query, key=key, value=value, **options)
