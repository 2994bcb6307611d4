"""Named tuples by their address, and what the compiler of kernels remembers of numbers."""

from __future__ import annotations

from collections import namedtuple

import numba
import numpy as np
import pytest
from numba import types
from numba.core.registry import cpu_target

from numba_attn.cpu import compilers, jit, tuples
from numba_attn.cpu.tuples import addressed

Cut = namedtuple("Cut", "rows keys")
Part = namedtuple("Part", "x cut")
# Of the same name and as many numbers: for Numba, their addresses have types of the same name.
Other = namedtuple("Cut", "first last")  # type: ignore[name-match]


@jit.device
def difference(part, other):
    return part.x[part.cut.keys] - other.last


@numba.njit
def sums(x):
    """For each i, x[2 i] - 3 i, through two addresses, the first of which holds another tuple each time."""
    totals = np.zeros(2)
    other = addressed(Other(0, 3))
    for i in range(len(x) // 2):
        part = addressed(Part(x, addressed(Cut(i, 2 * i))))
        totals[0] += difference(part, other)
        totals[1] += part.cut.rows + other.first
    return totals


@numba.njit
def unknown(x):
    return addressed(Cut(x, x)).columns


def test_fields_are_those_of_the_tuple() -> None:
    assert sums(np.array([5.0, 0.0, 7.0, 0.0, 11.0, 0.0])).tolist() == [5 + 7 + 11 - 9, 0 + 1 + 2]
    assert [[type(kind) for kind in kinds] for kinds in difference.signatures] == [[tuples.Addressed] * 2]


def test_an_unknown_field() -> None:
    with pytest.raises(numba.TypingError, match="Unknown attribute 'columns' of type address of Cut"):
        unknown(1)


def test_what_is_passed_by_address() -> None:
    pair = types.NamedUniTuple(types.int64, 2, Cut)
    for kind in (types.int64, types.UniTuple(types.int64, 2), types.Array(types.float32, 1, "C")):
        assert tuples.by_address(kind) is kind
    assert tuples.by_address(pair) == tuples.Addressed(pair)
    assert tuples.by_address(pair) != tuples.Addressed(types.NamedUniTuple(types.int64, 2, Other))


def test_what_is_remembered_of_numbers_is_what_numba_finds() -> None:
    """After kernels have been compiled: as many as there are in this module, at least."""

    @jit.device
    def some(i, x):
        return max(i // 3 + 1, 0) * x - bool(i)

    some.get_compile_result(types.float32(types.int64, types.float32))
    found = compilers._Typing._found
    assert {function.typing_key.__name__ for function, _ in found} >= {"floordiv", "add", "mul", "sub", "max", "bool"}
    for (function, args), signature in found.items():
        assert cpu_target.typing_context.resolve_function_type(function, args, {}) == signature, (function, args)
