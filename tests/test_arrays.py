"""Hostile arrays: every argument in any storage gives the bits of a plain array, or an error that names it.

Inputs are never written, and an output only where its elements are.
"""

from __future__ import annotations

import array
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mods
import numpy as np
import pytest
from cases import SIXTEEN_BITS, dtype_of
from numpy.lib.stride_tricks import as_strided, sliding_window_view
from tolerances import same_bits

from numba_attn import scaled_dot_product_attention
from numba_attn.problem import AUX_NAMES

B, HQ, HKV, LQ, LK, D, DV = 2, 4, 2, 5, 7, 8, 6
OPERANDS, PER_HEAD, PER_SEQUENCE = (
    ("query", "key", "value"),
    ("alibi_slopes", "sinks"),
    ("query_lengths", "kv_lengths", "query_offset"),
)
EACH_BACKEND = pytest.mark.parametrize("backend", ["cpu", "reference"])
EACH_DTYPE = pytest.mark.parametrize("dtype", ["float32", "float64", *SIXTEEN_BITS])


class Kind(np.ndarray):
    """A subclass that adds nothing."""


class Frame:
    """Like those of data frame libraries: no array, but knows how to become one."""

    def __init__(self, x: np.ndarray) -> None:
        self.x = x

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.x


def arguments(dtype: Any = "float32") -> dict[str, Any]:
    """Every argument that is an array, for one problem, in plain storage."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype_of(str(dtype)))

    return {
        "query": normal(B, HQ, LQ, D),
        "key": normal(B, HKV, LK, D),
        "value": normal(B, HKV, LK, DV),
        "attn_mask": normal(B, HQ, LQ, LK),
        "alibi_slopes": normal(B, HQ),
        "sinks": normal(HQ),
        "query_lengths": np.array([LQ, 3]),
        "kv_lengths": np.array([6, LK]),
        "query_offset": np.array([1, -1]),
    }


def attend(given: dict[str, Any], **options: Any) -> tuple[np.ndarray, Any]:
    """With every statistic, and the same bytes in the inputs afterwards, whatever has come of the call."""
    inputs = {name: np.asarray(x) for name, x in given.items() if isinstance(x, np.ndarray) and not x.dtype.hasobject}
    before = {name: x.tobytes() for name, x in inputs.items()}
    try:
        result = scaled_dot_product_attention(**given, enable_gqa=True, is_causal=True, return_aux=AUX_NAMES, **options)
    finally:
        assert all(x.tobytes() == before[name] for name, x in inputs.items()), "an input was written"
    return result  # type: ignore[return-value]


def assert_like_plain(name: str, form: Any, given: dict[str, Any], backend: str) -> None:
    """Argument `name` in this form gives the bits of a contiguous array of the same numbers."""
    assert isinstance(form, np.ndarray)
    plain = np.array(form, form.dtype.newbyteorder("="), order="C", subok=False)
    got = attend({**given, name: form}, backend=backend)
    assert type(got[0]) is np.ndarray
    assert same_bits(got, attend({**given, name: plain}, backend=backend))


# Inputs in other storage ----------------------------------------------------------------------------------------------


def in_bytes(x: np.ndarray, before: int, path: Path | None = None) -> np.ndarray:
    """Contiguous, so many bytes after the start of a buffer or of a file."""
    if path is None:
        form = np.empty(x.nbytes + before, np.uint8)[before:].view(x.dtype).reshape(x.shape)
        form[...] = x
        return form
    path.write_bytes(bytes(before) + x.tobytes())
    return np.memmap(path, x.dtype, "r", before, x.shape)


def stepped(x: np.ndarray) -> np.ndarray:
    wide = np.zeros([n * (axis + 2) for axis, n in enumerate(x.shape)], x.dtype)
    form = wide[tuple(slice(axis + 1, None, axis + 2) for axis in range(x.ndim))]
    form[...] = x
    return form


def swapped(x: np.ndarray) -> np.ndarray:
    return x.astype(x.dtype.newbyteorder(">"))


# The same numbers in another place, order or class.
FORMS: dict[str, Callable[[np.ndarray, Path], np.ndarray]] = {
    "byte-swapped": lambda x, _: swapped(x),
    "byte-swapped, unaligned": lambda x, _: in_bytes(swapped(x), 3),
    "byte-swapped, reversed": lambda x, _: np.flip(swapped(x)),
    "unaligned by one byte": lambda x, _: in_bytes(x, 1),
    "unaligned, transposed": lambda x, _: in_bytes(x.T, 1).T,
    "reversed": lambda x, _: np.flip(np.flip(x).copy()),
    "reversed rows": lambda x, _: np.flip(np.flip(x, 0).copy(), 0),
    "steps": lambda x, _: stepped(x),
    "steps backwards": lambda x, _: np.flip(stepped(np.flip(x))),
    "Fortran": lambda x, _: np.asfortranarray(x),
    "read-only": lambda x, _: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "memory map": lambda x, path: in_bytes(x, 0, path / "x"),
    "memory map, unaligned": lambda x, path: in_bytes(x, 7, path / "x"),
    "subclass": lambda x, _: x.view(Kind),
    "record array": lambda x, _: x.view(np.recarray),
    "dtype with metadata": lambda x, _: x.view(np.dtype(x.dtype, metadata={"unit": "m"})),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", arguments())
@EACH_BACKEND
def test_other_storage(name: str, form: str, backend: str, tmp_path: Path) -> None:
    for dtype in ("float32", "float64", *SIXTEEN_BITS):
        given = arguments(dtype)
        if dtype == "bfloat16" and ("swapped" in form or "metadata" in form):
            continue  # which NumPy does not have
        assert_like_plain(name, FORMS[form](given[name], tmp_path), given, backend)


@pytest.mark.parametrize("form", FORMS)
@EACH_BACKEND
def test_boolean_mask_in_other_storage(form: str, backend: str, tmp_path: Path) -> None:
    given = arguments()
    mask = np.random.default_rng(1).random((B, HQ, LQ, LK)) < 0.5
    assert_like_plain("attn_mask", FORMS[form](mask, tmp_path), given, backend)
    assert_like_plain("attn_mask", FORMS[form](mask[0, 0], tmp_path), given, backend)


@pytest.mark.parametrize("name", arguments())
@EACH_BACKEND
def test_zero_strides(name: str, backend: str) -> None:
    """The same element, again and again, along every choice of axes."""
    for dtype in ("float32", "float64", *SIXTEEN_BITS):
        given = arguments(dtype)
        x = given[name]
        for axes in itertools.product([False, True], repeat=x.ndim):
            one = x[tuple(slice(1) if repeated else slice(None) for repeated in axes)]
            assert_like_plain(name, np.broadcast_to(one, x.shape), given, backend)


@pytest.mark.parametrize("name", [*OPERANDS, "attn_mask"])
@EACH_BACKEND
def test_rows_that_share_elements(name: str, backend: str) -> None:
    """Each row begins one element after the one before, or before it."""
    given = arguments()
    *heads, rows, columns = given[name].shape
    long = np.random.default_rng(2).standard_normal((*heads, rows + columns - 1)).astype(np.float32)
    windows = sliding_window_view(long, columns, axis=-1)
    assert_like_plain(name, windows, given, backend)
    assert_like_plain(name, windows[..., ::-1, :], given, backend)


@pytest.mark.parametrize("name", [*OPERANDS, "attn_mask"])
def test_matrix(name: str) -> None:
    """`numpy.matrix` has other rules for `*` and for indices; of two axes it is an array like others."""
    given = {key: x[0, 0] for key, x in arguments().items() if key in (*OPERANDS, "attn_mask")}
    assert_like_plain(name, given[name].view(np.matrix), given, "cpu")
    assert_like_plain(name, given[name].view(np.matrix), given, "reference")


@EACH_BACKEND
def test_boolean_mask_of_any_true_byte(backend: str) -> None:
    """A view of bytes as booleans is True wherever they are not 0, for NumPy too."""
    rng = np.random.default_rng(3)
    mask = rng.random((LQ, LK)) < 0.5
    of_bytes = np.where(mask, rng.integers(2, 256, mask.shape), 0).astype(np.uint8).view(bool)
    given = arguments()
    for form in (of_bytes, np.asfortranarray(of_bytes), of_bytes[:1], of_bytes[:, :1]):
        same = mask[: form.shape[0], : form.shape[1]]
        got = attend({**given, "attn_mask": form}, backend=backend)
        assert same_bits(got, attend({**given, "attn_mask": same}, backend=backend))


@pytest.mark.parametrize("form", [form for form in FORMS if "swapped" not in form])
@EACH_BACKEND
def test_captured_array_in_other_storage(form: str, backend: str, tmp_path: Path) -> None:
    """That a user's function reads."""
    table = np.random.default_rng(5).standard_normal((4, 16)).astype(np.float32)
    given = arguments()
    expected = attend({**given, "score_mod": mods.biased(table)}, backend=backend)
    got = attend({**given, "score_mod": mods.biased(FORMS[form](table, tmp_path))}, backend=backend)
    assert same_bits(got, expected)


@pytest.mark.parametrize("name", PER_SEQUENCE)
@EACH_BACKEND
def test_numbers_of_sequences_are_taken_from_anything(name: str, backend: str) -> None:
    """What is one integer, or one for each sequence: no reason to insist on an array."""
    given = arguments()
    first, second = (int(n) for n in given[name])
    expected = attend(given, backend=backend)
    for form in (
        [first, second],
        (first, second),
        [np.int8(first), np.int64(second)],
        Frame(given[name]),
        array.array("q", [first, second]),
        memoryview(given[name]),
        *(given[name].astype(kind) for kind in ("i1", "i2", "i4", ">i8", *([] if first < 0 or second < 0 else "QB"))),
    ):
        assert same_bits(attend({**given, name: form}, backend=backend), expected), type(form)
    same = attend({**given, name: [2, 2]}, backend=backend)
    for one in (2, np.int8(2), np.uint64(2), np.array(2), Frame(np.array(2))):
        assert same_bits(attend({**given, name: one}, backend=backend), same), type(one)


# What is not an array of numbers --------------------------------------------------------------------------------------


def assert_refused(name: str, given: dict[str, Any], **options: Any) -> None:
    """With an error that names the argument, the same from every backend, and nothing written."""
    out = options.pop("out", np.full((B, HQ, LQ, DV), 7, np.float32))
    base = out if not isinstance(out, np.ndarray) or out.base is None else out.base
    before = base.tobytes() if isinstance(base, np.ndarray) else None
    messages = []
    for backend in ("cpu", "reference"):
        with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b") as error:
            attend(given, out=out, backend=backend, **options)
        messages.append((error.type, str(error.value)))
    assert messages[0] == messages[1]
    assert before is None or base.tobytes() == before, "out was written"


def not_arrays(x: np.ndarray) -> dict[str, Any]:
    """What looks like an array of the same numbers, or of its shape, but is not to be guessed at."""
    return {
        "list": x.tolist(),
        "tuple": tuple(x),
        "number": 1.0,
        "NumPy number": np.float32(1),
        "flag": True,
        "word": "query",
        "bytes": x.tobytes(),
        "memory": memoryview(x),
        "array.array": array.array("f", x.ravel()),
        "iterator": iter(x),
        "data frame": Frame(x),
        "masked array": np.ma.array(x),
        "masked array, some masked": np.ma.array(x, mask=x > 0),
        "masked number": np.ma.masked,
        "objects": np.array(x.tolist(), object),
        "integers": x.astype(np.int64),
        "integers, byte-swapped": x.astype(">i2"),
        "unsigned integers": x.view(np.uint32),
        "complex": x.astype(np.complex64),
        "extended precision": x.astype(np.longdouble),
        "text": x.astype("U"),
        "text as bytes": x.astype("S"),
        "void": x.view("V4"),
        "records": x.view([("x", "f4")]),
        "records, byte-swapped": x.view([("x", ">f4")]),
        "dates": x.astype("M8[s]"),
        "durations": x.astype("m8[s]"),
        "too many axes": x[(None,) * 6],
    }


@pytest.mark.parametrize("mistake", not_arrays(np.ones(1, np.float32)))
@pytest.mark.parametrize("name", [*OPERANDS, "attn_mask", *PER_HEAD])
def test_not_an_array_of_numbers(name: str, mistake: str) -> None:
    given = arguments()
    given[name] = not_arrays(given[name])[mistake]
    assert_refused(name, given)


@pytest.mark.parametrize("name", OPERANDS)
@pytest.mark.parametrize("mistake", [None, np.array(1, np.float32), np.ones(D, np.float32), np.ones(D, bool)])
def test_not_a_matrix(name: str, mistake: Any) -> None:
    assert_refused(name, {**arguments(), name: mistake})


@pytest.mark.parametrize(
    "mistake",
    [
        *([2.0, 2.0], [True, True], ["2", "2"], [2, None], [2, 2j], [2, 1 << 70], [[2, 2], [2]], [[2], [2]], [2, 2, 2]),
        *("22", b"22", {2: 2}, {2}, iter([2, 2]), object(), len, []),
        *(np.ma.array([2, 2]), np.ma.array([2, 2], mask=[False, True]), np.ma.masked, Frame(np.ones(B))),
        *(np.array([2, 2], kind) for kind in ("O", "f4", ">f8", "c8", "?", "m8[s]", "M8[s]", "U1", "S1")),
        *(np.array([[2, 2]]), np.array([[2, 2]]).view(np.matrix), np.zeros(0, int), np.array([2, 2], [("x", "i4")])),
    ],
    ids=lambda x: type(x).__name__,
)
@pytest.mark.parametrize("name", PER_SEQUENCE)
def test_not_integers(name: str, mistake: Any) -> None:
    assert_refused(name, {**arguments(), name: mistake})


# Outputs --------------------------------------------------------------------------------------------------------------

SHAPE = B, HQ, LQ, DV
# Of a larger array, the part that is the output.
PARTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "corner": lambda x: x[:B, :HQ, :LQ, :DV],
    "steps": lambda x: x[1::3, 1::3, 1::3, 1::3],
    "steps between columns": lambda x: x[:B, :HQ, :LQ, 2::3],
    "reversed": lambda x: x[:B, :HQ, :LQ, :DV][::-1, ::-1, ::-1, ::-1],
    "transposed": lambda x: x.swapaxes(2, 3)[:B, :HQ, :LQ, :DV],
    "heads inside": lambda x: np.moveaxis(x, 1, 3)[:B, :HQ, :LQ, :DV],
    "batch inside": lambda x: np.moveaxis(x, 0, 3)[:B, :HQ, :LQ, :DV],
}


@pytest.mark.parametrize("part", PARTS)
@EACH_DTYPE
@EACH_BACKEND
def test_nothing_beside_out_is_written(part: str, dtype: str, backend: str) -> None:
    given = arguments(dtype)
    expected, _ = attend(given, backend=backend)
    wide = [3 * n for n in SHAPE]
    for before, kind in itertools.product([0, 1], [np.ndarray, Kind, np.recarray]):
        room = np.full(before + np.prod(wide) * expected.itemsize, 0xA5, np.uint8)
        out = PARTS[part](room[before:].view(expected.dtype).reshape(wide)).view(kind)
        pattern, old = room.copy(), out.copy()
        result, _ = attend(given, out=out, backend=backend)
        assert result is out and same_bits(np.asarray(out), expected)
        out[...] = old
        assert np.array_equal(room, pattern)


@EACH_BACKEND
def test_out_of_other_classes(backend: str, tmp_path: Path) -> None:
    given = {name: x[0, 0] for name, x in arguments().items() if name in OPERANDS}
    expected, _ = attend(given, backend=backend)
    matrix = np.empty_like(expected).view(np.matrix)
    mapped = np.memmap(tmp_path / "out", np.float32, "w+", 5, expected.shape)
    for out in (matrix, mapped):
        assert attend(given, out=out, backend=backend)[0] is out and same_bits(np.asarray(out), expected)
    mapped.flush()
    assert (tmp_path / "out").read_bytes() == bytes(5) + expected.tobytes()


def outs_that_do_not_fit() -> dict[str, Any]:
    good = np.full(SHAPE, 7, np.float32)
    room, strides = np.full((*SHAPE, 2), 7, np.float32), good.strides
    return {
        "list": good.tolist(),
        "empty list": [],
        "memory": memoryview(good),
        "data frame": Frame(good),
        "masked array": np.ma.array(good),
        "number": 0.0,
        **{kind: good.astype(kind) for kind in ("f8", "f2", ">f4", "i4", "c8", "?", "O", "U4", "S4", "m8[s]")},
        "records": good.view([("x", "f4")]),
        "no axes": np.array(7, np.float32),
        "no head axis": good[:, 0],
        "more heads": np.full((B, HQ + 1, LQ, DV), 7, np.float32),
        "to broadcast": good[:1],
        "transposed": good.swapaxes(2, 3),
        "other layout": good.swapaxes(1, 2),
        "empty": good[:0],
        "read-only": np.frombuffer(good.tobytes(), np.float32).reshape(SHAPE),
        "broadcast": np.broadcast_to(good[..., :1], SHAPE),
        **{
            f"no step on axis {axis}": as_strided(room, SHAPE, (*strides[:axis], 0, *strides[axis + 1 :]))
            for axis in range(4)
        },
        "elements that overlap": as_strided(room, SHAPE, (*strides[:3], 3)),
        "rows that overlap": as_strided(room, SHAPE, (*strides[:2], 4 * (DV - 1), 4)),
        "columns that overlap": as_strided(room, SHAPE, (*strides[:2], 4, 4 * (LQ - 1)))[:, :, ::-1, ::-1],
        "heads that overlap": as_strided(room, SHAPE, (strides[0], strides[1] - 4, *strides[2:])),
    }


@pytest.mark.parametrize("mistake", outs_that_do_not_fit())
def test_out_that_does_not_fit(mistake: str) -> None:
    assert_refused("out", arguments(), out=outs_that_do_not_fit()[mistake])


def test_out_in_a_file_that_is_read_only(tmp_path: Path) -> None:
    out = in_bytes(np.full(SHAPE, 7, np.float32), 0, tmp_path / "out")
    before = (tmp_path / "out").read_bytes()
    assert_refused("out", arguments(), out=out)
    assert (tmp_path / "out").read_bytes() == before


def beside(x: np.ndarray, bytes_between: int, backwards: bool) -> tuple[np.ndarray, np.ndarray]:
    """The same numbers, and an output in the same buffer, which begins so many bytes after they end."""
    size = 4 * int(np.prod(SHAPE))
    room = np.full(x.nbytes + size + 64, 7, np.uint8)
    at, end = (0, x.nbytes) if not backwards else (size + 64 - 8, size + 64 - 8 - bytes_between)
    placed = room[at : at + x.nbytes].view(x.dtype).reshape(x.shape)
    placed[...] = x
    start = end + bytes_between if not backwards else end - size
    return placed, room[start : start + size].view(np.float32).reshape(SHAPE)


@pytest.mark.parametrize("name", [*OPERANDS, "attn_mask"])
def test_out_that_overlaps_an_input(name: str) -> None:
    """By one byte, or all of it; beside it, or between its elements, there is nothing wrong."""
    given = arguments()
    x = given[name]
    expected, _ = attend(given)
    for backwards in (False, True):
        for between in (-1, -4, -x.nbytes):
            placed, out = beside(x, between, backwards)
            assert_refused("out", {**given, name: placed}, out=out)
        for between in (0, 1, 4):
            placed, out = beside(x, between, backwards)
            assert same_bits(attend({**given, name: placed}, out=out)[0], expected)
    room = np.full(2 * max(x.size, expected.size), 7, np.float32)
    placed = room[: 2 * x.size : 2].reshape(x.shape)
    placed[...] = x
    assert_refused("out", {**given, name: placed}, out=room[: expected.size].reshape(SHAPE))
    assert_refused("out", {**given, name: placed}, out=room[::-1][-expected.size :].reshape(SHAPE))
    out = room[1 : 2 * expected.size : 2].reshape(SHAPE)
    assert same_bits(attend({**given, name: placed}, out=out)[0], expected)


@pytest.mark.parametrize("name", [*PER_HEAD, *PER_SEQUENCE])
@EACH_BACKEND
def test_out_over_numbers_that_have_been_read(name: str, backend: str) -> None:
    given = arguments()
    expected, _ = attend(given, backend=backend)
    placed, out = beside(given[name], -given[name].nbytes, backwards=False)
    given[name] = placed
    assert same_bits(
        scaled_dot_product_attention(**given, enable_gqa=True, is_causal=True, out=out, backend=backend), expected
    )
