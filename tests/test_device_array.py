"""Views of arrays on a device: what NumPy's would be, and nothing is read: the addresses here are invented."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_problem import WRONG
from tolerances import DEFAULTS

from numba_attn import checks
from numba_attn.device_array import DeviceArray
from numba_attn.problem import AUX_NAMES, Problem

ADDRESS = 1 << 40


class Device:
    """Where new arrays have addresses."""

    def __init__(self) -> None:
        self.end = ADDRESS
        self.allocated: list[DeviceArray] = []

    def empty(self, shape: tuple[int, ...], dtype: Any) -> DeviceArray:
        like = np.empty(shape, dtype)
        x = DeviceArray(self.end, like.shape, like.strides, like.dtype, device=0, allocate=self.empty)
        self.end += like.nbytes
        self.allocated.append(x)
        return x


def on_device(x: np.ndarray, base: np.ndarray, address: int = ADDRESS) -> DeviceArray:
    """The view x of `base`, if that were at an address of the device."""
    offset = x.__array_interface__["data"][0] - base.__array_interface__["data"][0]
    return DeviceArray(address + offset, x.shape, x.strides, x.dtype)


BASE = np.zeros((3, 4, 5, 6), np.float32)
VIEWS: dict[str, Callable[[Any], Any]] = {
    "first": lambda x: x[0],
    "last": lambda x: x[-1, 2],
    "all axes but one": lambda x: x[2, 3, 4],
    "no axis": lambda x: x[(0,) * 0],
    "axis in front": lambda x: x[None],
    "axes in front": lambda x: x[None, None],
    "axis behind": lambda x: x[..., None],
    "last column": lambda x: x[..., 5],
    "one each side": lambda x: x[1, ..., 2],
    "rows": lambda x: x[:, 1:3],
    "every other, backwards": lambda x: x[:, :, ::-2],
    "slice of nothing": lambda x: x[2:1],
    "slice beyond the end": lambda x: x[2:9, -9:2],
    "swapped": lambda x: x.swapaxes(-3, -2),
    "swapped, then sliced": lambda x: x.swapaxes(0, 3)[1:, 2, None, ..., 0],
    "NumPy's integer": lambda x: x[np.int64(1)],
}


@pytest.mark.parametrize("view", VIEWS)
def test_views(view: str) -> None:
    expected, got = VIEWS[view](BASE), VIEWS[view](on_device(BASE, BASE))
    same = on_device(expected, BASE)
    assert (got.shape, got.dtype, got.ndim, got.size) == (expected.shape, expected.dtype, expected.ndim, expected.size)
    # Where there is no element, or one place on an axis, an address or a stride means nothing.
    if expected.size:
        assert got.address == same.address
        assert [s for s, n in zip(got.strides, got.shape, strict=True) if n > 1] == [
            s for s, n in zip(expected.strides, expected.shape, strict=True) if n > 1
        ]
    assert got.flags.c_contiguous == expected.flags.c_contiguous
    assert checks.overlaps_itself(got) == checks.overlaps_itself(expected)


def test_views_keep_what_is_known_of_the_array() -> None:
    owner = object()
    x = DeviceArray(ADDRESS, (2, 3), (12, 4), np.dtype(np.float32), 1, 7, False, owner, awaited=True)
    for view in (x[0], x[..., None], x.swapaxes(0, 1)):
        assert (view.device, view.stream, view.owner, view.flags.writeable) == (1, 7, owner, False)
        assert view.awaited
    assert len(x) == 2


@pytest.mark.parametrize("index", [3, -4, (0, 4), (0, 0, 0, 0, 0), (0, ..., 6)])
def test_index_out_of_range(index: Any) -> None:
    with pytest.raises(IndexError):
        on_device(BASE, BASE)[index]


@pytest.mark.parametrize("index", [1.0, [0, 1], "0"])
def test_index_of_another_kind(index: Any) -> None:
    with pytest.raises(TypeError):
        on_device(BASE, BASE)[index]


@pytest.mark.parametrize("one", VIEWS)
@pytest.mark.parametrize("other", VIEWS)
def test_overlap(one: str, other: str) -> None:
    views = VIEWS[one](BASE), VIEWS[other](BASE)
    assert checks.overlap(*(on_device(x, BASE) for x in views)) == checks.overlap(*views)
    assert not checks.overlap(on_device(views[0], BASE), on_device(views[1], BASE, ADDRESS + BASE.nbytes))


def test_problem() -> None:
    """Of arrays on a device: views of them, and results beside the query."""
    device = Device()
    query, key, value, mask = (
        device.empty(shape, dtype)
        for shape, dtype in (((2, 5, 4, 8), "f2"), ((2, 7, 2, 8), "f2"), ((2, 7, 2, 6), "f2"), ((5, 7), "?"))
    )
    options = {**DEFAULTS, "attn_mask": mask, "enable_gqa": True, "layout": "BLHD", "kv_lengths": [7, 3]}
    problem = Problem.from_call(query, key, value, **options)
    assert problem.sizes == (2, 4, 2, 5, 7, 8, 6)
    assert problem.query.shape == (2, 4, 5, 8) and problem.query.strides == (320, 16, 64, 2)  # type: ignore[attr-defined]
    assert problem.mask is not None and problem.mask.shape == (1, 1, 5, 7)
    result, *aux = device.allocated[4:]
    assert problem.result is result and list(problem.aux) == aux  # type: ignore[arg-type]
    assert result.shape == (2, 5, 4, 6) and result.dtype == np.float16
    assert all(x.dtype == np.float32 for x in aux)
    assert [x.shape for x in aux] == [(2, 5, 4)] * 3 + [(2, 7, 4)]
    first = problem.first_sequence()
    assert first.out.shape == (4, 5, 6) and first.mask.shape == (1, 5, 7)  # type: ignore[union-attr]
    assert first.key_weight.strides == (4, 16)  # type: ignore[union-attr]
    assert set(AUX_NAMES) == set(problem.aux._fields)  # type: ignore[union-attr]


def test_problem_of_packed_sequences() -> None:
    device = Device()
    query, key = device.empty((10, 4, 8), "f4"), device.empty((12, 2, 8), "f4")
    problem = Problem.from_call(query, key, key, **DEFAULTS, cu_seqlens=([0, 3, 10], [0, 0, 12]))
    assert problem.sizes == (2, 4, 2, 7, 12, 8, 8)
    assert problem.query.shape == (4, 10, 8) and problem.result.shape == (10, 4, 8)
    assert problem.lse.shape == (4, 10)  # type: ignore[union-attr]


@pytest.mark.parametrize("wrong", [w for w in WRONG if w[0] != "backend"], ids=lambda w: w[0])
def test_wrong(wrong: Any) -> None:
    """The errors are those of NumPy arrays, to the word."""

    def moved(x: Any) -> Any:
        if type(x) is not np.ndarray:
            return x
        return replace(on_device(x, x, x.__array_interface__["data"][0]), allocate=Device().empty)

    _, arrays, options, error, message = wrong
    options = {**DEFAULTS, **{name: moved(x) if name in ("attn_mask", "out") else x for name, x in options.items()}}
    with pytest.raises(error, match=message):
        Problem.from_call(*(moved(x) for x in arrays), **options)


def test_results_without_an_allocator() -> None:
    x = DeviceArray(ADDRESS, (3, 4), (16, 4), np.dtype(np.float32))
    with pytest.raises(NotImplementedError, match="out must be given"):
        Problem.from_call(x, x, x, **{**DEFAULTS, "return_aux": ()})
    out = DeviceArray(ADDRESS + 48, (3, 4), (16, 4), np.dtype(np.float32))
    assert Problem.from_call(x, x, x, **{**DEFAULTS, "return_aux": (), "out": out}).result is out
