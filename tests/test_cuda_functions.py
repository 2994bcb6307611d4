"""What a user's function captures, as the portable CUDA kernels take it."""

from __future__ import annotations

import math
from collections import namedtuple
from types import ModuleType
from typing import Any

import mods
import numba
import numpy as np
import pytest

from numba_attn.cuda import user_functions

LIMIT = 3


def key(function: Any) -> Any:
    return user_functions._key(function, ())


def near(limit: Any) -> Any:
    return lambda b, h, i, j: abs(i - j) <= limit


def through(function: Any) -> Any:
    return lambda b, h, i, j: function(b, h, i, j) and i > 0


def test_functions_that_do_the_same_are_alike() -> None:
    assert key(near(2)) == key(near(2)) != key(near(3))
    assert key(near(0.0)) != key(near(-0.0)) and key(near(math.nan)) == key(near(math.nan))
    assert key(near(1)) != key(near(True)) and key(near((1, 2))) != key(near((1, 3)))
    one, other = namedtuple("one", "left right"), namedtuple("other", "right left")
    assert key(near(one(1, 2))) == key(near(one(1, 2))) != key(near(other(1, 2)))
    assert key(through(near(2))) == key(through(near(2))) != key(through(near(3)))
    assert key(through(numba.njit(near(2)))) == key(through(near(2)))


def test_contents_of_arrays_tell() -> None:
    table = mods.BIAS.copy()
    function = mods.biased(table)
    before = key(function)
    assert before == key(mods.relative_bias)
    table[0, 0] += 1
    assert key(function) != before


def test_globals_and_modules_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    def mod(b, h, i, j):  # type: ignore[no-untyped-def]
        return mods.prefix(b, h, i, j) or i < LIMIT + math.pi

    before = key(mod)
    monkeypatch.setitem(globals(), "LIMIT", 4)
    assert key(mod) != before
    monkeypatch.setitem(globals(), "LIMIT", 3)
    assert key(mod) == before
    monkeypatch.setattr(mods, "prefix", mods.scattered)
    assert key(mod) != before


def test_modules_inside_modules_are_captured() -> None:
    package, module = ModuleType("package"), ModuleType("package.module")
    package.module, module.package, module.LIMIT = module, package, 3  # type: ignore[attr-defined]

    def mod(b, h, i, j):  # type: ignore[no-untyped-def]
        return i < package.module.LIMIT and j < package.module.package.module.LIMIT  # type: ignore[attr-defined]

    before = key(mod)
    assert key(mod) == before
    module.LIMIT = 4  # type: ignore[attr-defined]
    assert key(mod) != before


@pytest.mark.parametrize(
    ("captured", "reason"),
    [
        ([1, 2], "a captured list cannot be: numbers, tuples and arrays can"),
        (np.array(["a"]), "a captured array must be of numbers in native byte order, got <U1"),
        (np.arange(3.0).astype(">f8"), "in native byte order, got >f8"),
    ],
)
def test_what_cannot_be_captured(captured: Any, reason: str) -> None:
    with pytest.raises(TypeError, match=f"mask_mod 'near.<locals>.<lambda>' cannot be compiled: .*{reason}"):
        user_functions.portable("mask_mod", near(captured), 0)


def test_recursion_is_refused() -> None:
    def mod(b, h, i, j):  # type: ignore[no-untyped-def]
        return i == 0 or mod(b, h, i - 1, j)

    with pytest.raises(TypeError, match="must not call itself"):
        user_functions.portable("mask_mod", mod, 0)
