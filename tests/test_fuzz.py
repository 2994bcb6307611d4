"""Anything at all: valid calls of every shape give the right result, others an error that names what is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import mods
import numpy as np
import pytest
from hypothesis import given, settings
from strategies import Call, any_axes, calls
from test_properties import check

from numba_attn import scaled_dot_product_attention

NAMES = ("query", "key", "value")
Spoilt = tuple[list[Any], dict[str, Any]]
# What is wrong with a call, by the error and a word of it: functions of arrays and options that change these in place,
# and return False where there is nothing to be spoilt.
Spoil = Callable[[st.DrawFn, list[Any], dict[str, Any]], bool | None]
SPOILS: list[tuple[type[Exception], str, Spoil]] = []


def spoils(error: type[Exception], word: str) -> Callable[[Spoil], Spoil]:
    def register(function: Spoil) -> Spoil:
        SPOILS.append((error, word, function))
        return function

    return register


def one_of(draw: st.DrawFn) -> int:
    return draw(st.integers(0, 2))


@spoils(TypeError, "must be a NumPy array")
def _no_array(draw: st.DrawFn, arrays: list[Any], options: dict[str, Any]) -> None:
    arrays[one_of(draw)] = draw(st.sampled_from([None, 1.0, [[0.0, 1.0]], "x", object()]))


@spoils(TypeError, "must be float32, float64")
def _no_number(draw: st.DrawFn, arrays: list[Any], options: dict[str, Any]) -> None:
    i = one_of(draw)
    arrays[i] = np.zeros(arrays[i].shape, draw(st.sampled_from(["i4", "u1", "?", "c8", "O", "U1", "M8[s]", "V4"])))


@spoils(TypeError, "must have one dtype")
def _two_dtypes(draw: st.DrawFn, arrays: list[Any], options: dict[str, Any]) -> None:
    i = one_of(draw)
    arrays[i] = arrays[i].astype(np.float64 if arrays[i].dtype != np.float64 else np.float32)


@spoils(ValueError, "axes")
def _another_rank(draw: st.DrawFn, arrays: list[Any], options: dict[str, Any]) -> None:
    i = one_of(draw)
    arrays[i] = draw(st.sampled_from([arrays[i][None], arrays[i][..., None], np.zeros(3, arrays[i].dtype)]))


@spoils(ValueError, "must (have|be)|has|broadcast")
def _another_length(draw: st.DrawFn, arrays: list[Any], options: dict[str, Any]) -> bool:
    """Of one axis, which two of the arrays must agree on."""
    i, axis = draw(st.sampled_from([(0, -1), (1, -1), (1, -2), (2, -2), (2, -3)]))
    if arrays[i].ndim <= -axis - 1 or ((i, axis) == (2, -3) and options["enable_gqa"] and arrays[i].shape[-3] == 0):
        return False
    shape = list(arrays[i].shape)
    shape[axis] += draw(st.integers(1, 3))
    arrays[i] = np.zeros(shape, arrays[i].dtype)
    # Offsets and lengths may have become wrong as well: any of these is right to be refused.
    for name in ("kv_lengths", "query_lengths", "attn_mask", "block_mask"):
        options.pop(name, None)
    return True


@spoils(TypeError, "attn_mask must be")
def _mask_type(draw: st.DrawFn, arrays: list[Any], options: dict[str, Any]) -> None:
    options["attn_mask"] = draw(st.sampled_from([np.ones(1, int), np.ones(1, "u1"), np.ones(1, "c8"), [True], "x", 0]))


@spoils(ValueError, "attn_mask of shape")
def _mask_shape(draw: st.DrawFn, arrays: list[Any], options: dict[str, Any]) -> None:
    rows, keys = arrays[0].shape[-2], arrays[1].shape[-2]
    options["attn_mask"] = draw(
        st.sampled_from([np.ones((rows + 2, keys), bool), np.ones(keys + 2, "f4"), np.ones((1,) * 7, bool)])
    )


@spoils(ValueError, "_lengths must be")
def _lengths(draw: st.DrawFn, arrays: list[Any], options: dict[str, Any]) -> None:
    name, i = draw(st.sampled_from([("query_lengths", 0), ("kv_lengths", 1)]))
    options[name] = draw(st.sampled_from([-1, arrays[i].shape[-2] + 1, -(2**70), 2**63]))


@spoils(TypeError, "must be integers")
def _whole_numbers(draw: st.DrawFn, arrays: list[Any], options: dict[str, Any]) -> None:
    name = draw(st.sampled_from(["query_lengths", "kv_lengths", "query_offset"]))
    options[name] = draw(st.sampled_from([0.5, np.float32(1), None if name == "query_offset" else True, {}, b"x"]))


@spoils(ValueError, "query_offset must be")
def _offset(draw: st.DrawFn, arrays: list[Any], options: dict[str, Any]) -> None:
    options["query_offset"] = draw(st.sampled_from([2**41, -(2**41), 2**200, "top_left", [[[[0]]]] * 97]))


@spoils((ValueError, TypeError), "window")  # type: ignore[arg-type]
def _window(draw: st.DrawFn, arrays: list[Any], options: dict[str, Any]) -> None:
    options["window"] = draw(st.sampled_from([3, (1,), (1, 2, 3), (-1, 0), (0.5, 1), "ab", {1, 2}, (None, -(2**70))]))


@spoils((ValueError, TypeError), "scale must be")  # type: ignore[arg-type]
def _scale(draw: st.DrawFn, arrays: list[Any], options: dict[str, Any]) -> None:
    options["scale"] = draw(st.sampled_from([np.nan, np.inf, -np.inf, 1e400, 10**400, "1", 1j, True, [1.0], b"1"]))


@spoils((ValueError, TypeError), "softcap must be")  # type: ignore[arg-type]
def _softcap(draw: st.DrawFn, arrays: list[Any], options: dict[str, Any]) -> None:
    options["softcap"] = draw(st.sampled_from([0, -0.0, -1.0, np.nan, np.inf, 1e-320, "x", False, [1]]))


@spoils((ValueError, TypeError), "dropout_(p|seed) must be")  # type: ignore[arg-type]
def _dropout(draw: st.DrawFn, arrays: list[Any], options: dict[str, Any]) -> None:
    name, bad = draw(
        st.sampled_from([
            *(("dropout_p", bad) for bad in (1.0, -0.1, np.nan, np.inf, "0", None, True)),
            *(("dropout_seed", bad) for bad in (-1, 2**64, 1.0, "1", True, 2**200)),
        ])
    )  # fmt: skip
    options[name] = bad


@spoils((ValueError, TypeError), "(alibi_slopes|sinks) must")  # type: ignore[arg-type]
def _per_head(draw: st.DrawFn, arrays: list[Any], options: dict[str, Any]) -> None:
    heads = arrays[0].shape[-3] if arrays[0].ndim > 2 else 1
    bad = [
        np.ones(heads + 1),
        np.ones(heads, int),
        [1.0] * heads,
        1.0,
        np.full(max(heads, 1), np.nan),
        np.ones((1, 1, 1)),
    ]
    options[draw(st.sampled_from(["alibi_slopes", "sinks"]))] = draw(st.sampled_from(bad))


@spoils(TypeError, "(score_mod|mask_mod) must")
def _function(draw: st.DrawFn, arrays: list[Any], options: dict[str, Any]) -> None:
    name = draw(st.sampled_from(["score_mod", "mask_mod"]))
    options[name] = draw(st.sampled_from([max, 1, "f", lambda: 0, lambda b: b, lambda *a: 0, np.add, object()]))


@spoils((ValueError, TypeError), "block_mask")  # type: ignore[arg-type]
def _block_mask(draw: st.DrawFn, arrays: list[Any], options: dict[str, Any]) -> None:
    rows, keys = arrays[0].shape[-2], arrays[1].shape[-2]
    other = mods.blocky(mods.prefix, (1, 1, rows + 1, keys), (4, 4))
    options["block_mask"] = draw(st.sampled_from([np.ones((rows, keys), bool), mods.prefix, True, other]))


@spoils((ValueError, TypeError), "return_aux")  # type: ignore[arg-type]
def _aux(draw: st.DrawFn, arrays: list[Any], options: dict[str, Any]) -> None:
    options["return_aux"] = draw(st.sampled_from(["lse", ("loss",), None, True, (1,), ("lse", None), 3]))


@spoils((ValueError, TypeError), "(layout|precision|backend|is_causal|enable_gqa) (must|=)")  # type: ignore[arg-type]
def _choice(draw: st.DrawFn, arrays: list[Any], options: dict[str, Any]) -> None:
    name, bad = draw(
        st.sampled_from([
            *(("layout", bad) for bad in ("LBHD", None, 1)),
            *(("precision", bad) for bad in ("float8", 16, np.float32)),
            *(("backend", bad) for bad in ("gpu", 1, ("cpu",))), *(("is_causal", bad) for bad in (1, None, "yes")),
            *(("enable_gqa", bad) for bad in (1, None)),
        ])
    )  # fmt: skip
    options[name] = bad


@spoils((ValueError, TypeError), "out must")  # type: ignore[arg-type]
def _out(draw: st.DrawFn, arrays: list[Any], options: dict[str, Any]) -> bool:
    query, _, value = arrays
    shape, dtype = (*query.shape[:-1], value.shape[-1]), query.dtype
    right = np.zeros(shape, dtype)
    read_only = right.copy()
    read_only.flags.writeable = False
    bad: list[Any] = [np.zeros(shape, "c16"), np.zeros((*shape, 2), dtype), [], 0, read_only]
    if shape == query.shape and query.size:
        bad.append(query)
    if right.size > 1:
        bad.append(np.lib.stride_tricks.as_strided(right, shape, (0,) * right.ndim))
    options["out"] = draw(st.sampled_from(bad))
    return True


@st.composite
def attempts(draw: st.DrawFn) -> tuple[Call, tuple[type[Exception], str] | None]:
    """A call, and the error that it is to end with, if any."""
    arrays, options, tiles = draw(calls(any_axes))
    if draw(st.booleans()):
        return (arrays, options, tiles), None
    error, word, spoil = draw(st.sampled_from(SPOILS))
    query, _, value = arrays
    out = np.full((*query.shape[:-1], value.shape[-1]), 7, query.dtype)
    spoilt, changed = list(arrays), {**options, "out": out}
    if spoil(draw, spoilt, changed) is False:
        return (arrays, options, tiles), None
    return (spoilt, changed, tiles), (error, word)


def attempt(given: tuple[Call, tuple[type[Exception], str] | None]) -> None:
    call, expected = given
    arrays, options, _ = call
    inputs = [x for x in (*arrays, *options.values()) if isinstance(x, np.ndarray) and not x.dtype.hasobject]
    before = [x.tobytes() for x in inputs]
    try:
        if expected is None:
            check(call)
            return
        error, word = expected
        with pytest.raises(error) as raised:
            scaled_dot_product_attention(*arrays, **options)
        assert re.search(word, str(raised.value)), f"{raised.value} does not say {word!r}"
    finally:
        assert [x.tobytes() for x in inputs] == before, "an input was written, or out although something is wrong"


@settings(max_examples=200)
@given(attempts())
def test_any_call(given: tuple[Call, tuple[type[Exception], str] | None]) -> None:
    attempt(given)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_very_many_calls(part: int) -> None:
    """20 000 of them."""
    many = settings(max_examples=2000, derandomize=False)
    hypothesis.seed(part)(many(given(attempts())(attempt)))()
