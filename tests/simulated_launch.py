"""The launcher with `simulated_driver` in the place of the driver; `test_cuda_simulator` runs it in a child process."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import foreign
import mods
import numpy as np
import pytest
from contract import STORAGE
from simulated_cuda import TINY, pytestmark, tiles, turns  # noqa: F401
from simulated_driver import WRITING, Driver, array_at, install
from tolerances import DEFAULTS, assert_accurate, same_bits

from numba_attn import repeats, scaled_dot_product_attention, varlen_attention
from numba_attn.cuda import attention, devices, launch, simulator
from numba_attn.cuda.flash import make_flash
from numba_attn.cuda.sequences import PARAMETERS
from numba_attn.cuda.simt import make_forward
from numba_attn.device_array import DeviceArray
from numba_attn.problem import AUX_NAMES, Problem


@pytest.fixture
def driver() -> Iterator[Driver]:
    driver = Driver()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulator, "enabled", lambda: False)
        install(patch, driver)
        patch.setattr(devices, "unavailable", lambda: None)
        yield driver
    assert not driver.contexts and not driver.events


class OnDevice:
    """An array that only says where it is; its memory is the host's, as the driver's is."""

    def __init__(self, x: np.ndarray, stream: int | None = 77) -> None:
        self.numbers = x
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": x.shape,
            "strides": x.strides,
            "typestr": x.dtype.str,
            "data": (x.ctypes.data, False),
            "stream": stream,
        }


def test_numpy_arrays(driver: Driver) -> None:
    """They are copied to the device and back, and nothing but tables stays there."""
    for case in TINY:
        if case.name in ("tiny, plain", "tiny, everything at once, float16", "tiny, lengths, bottom right"):
            arrays, options = case.arrays(), case.keywords()
            options.pop("score_mod", None)  # which captures an array: the simulator knows none of a device
            out, aux = scaled_dot_product_attention(*arrays, backend="cuda", return_aux=AUX_NAMES, **options)
            assert_accurate(out, aux, *arrays, **options)
            assert set(driver.memory) == {table.buffer.address for table in launch._tables.values()}
    assert {call[-1] for call in driver.called("cuMemAllocAsync")} == {launch._BY_THREAD, WRITING}


def _arrays() -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal((2, 2, L, 5)).astype(np.float32) for L in (9, 13, 13))


@pytest.mark.parametrize("storage", sorted(set(STORAGE) - {"unaligned", "read-only"}))
def test_device_arrays_of_any_strides(driver: Driver, storage: str) -> None:
    arrays, mask, form = _arrays(), np.random.default_rng(1).random((1, 2, 1, 13)) < 0.8, STORAGE[storage]
    expected = scaled_dot_product_attention(*arrays, mask, backend="cuda")
    out = OnDevice(form(np.zeros(expected.shape, np.float32)))
    driver.calls.clear()
    given = [OnDevice(form(x)) for x in (*arrays, mask)]
    assert scaled_dot_product_attention(*given, out=out) is out
    assert same_bits(out.numbers, expected)
    (launched,) = driver.called("cuLaunchKernel")
    assert launched[8] == 77, "not on the array's stream"


def test_arrays_of_different_streams(driver: Driver) -> None:
    """The call is after what is on each stream that they name, and before what comes there later."""
    arrays = _arrays()
    expected = scaled_dot_product_attention(*arrays, backend="cuda")
    out = np.zeros_like(expected)
    for streams, joined in (((77, 77, 77, 77), set()), ((77, 88, None, 99), {88, 99}), ((None, 1, 88, None), {88})):
        own = streams[0] or 1
        given = [OnDevice(np.zeros_like(x), stream) for x, stream in zip(arrays, streams, strict=False)]
        for x, array, stream in zip(arrays, given, streams, strict=False):
            driver.send(x.tobytes(), array.numbers.ctypes.data, stream or own)
        driver.calls.clear()
        scaled_dot_product_attention(*given, out=OnDevice(out, streams[-1]))
        assert same_bits(out, expected)
        launched = [name for name, *_ in driver.calls].index("cuLaunchKernel")
        assert _ordered(driver.calls[:launched]) == {(stream, own) for stream in joined}
        assert _ordered(driver.calls[launched:]) == {(own, stream) for stream in joined}


def _ordered(calls: list[tuple[Any, ...]]) -> set[tuple[int, int]]:
    """Pairs of a stream and another that waits for it."""
    records, waits = ([call for call in calls if call[0] == name] for name in ("cuEventRecord", "cuStreamWaitEvent"))
    return {(record[2], wait[1]) for record, wait in zip(records, waits, strict=True)}


def test_a_call_like_another_neither_allocates_nor_waits(driver: Driver) -> None:
    given = [OnDevice(x) for x in _arrays()]
    out = OnDevice(np.zeros((2, 2, 9, 5), np.float32))
    options: dict[str, Any] = {"out": out, "is_causal": True, "kv_lengths": [13, 5], "sinks": np.ones(2)}
    scaled_dot_product_attention(*given, **options)
    expected, out.numbers[...] = out.numbers.copy(), 0
    driver.calls.clear()
    scaled_dot_product_attention(*given, **options)
    assert same_bits(out.numbers, expected)
    assert {call[0] for call in driver.calls} <= {
        "cuCtxPushCurrent", "cuCtxPopCurrent", "cuStreamIsCapturing", "cuLaunchKernel",
    }  # fmt: skip


def test_capture_in_a_graph(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph reads stays; what is not on the device yet is refused."""
    monkeypatch.setattr(launch, "MOST_KEPT", 8)
    arrays = _arrays()
    given = [OnDevice(x) for x in arrays]
    out = OnDevice(np.zeros((2, 2, 9, 5), np.float32))
    scaled_dot_product_attention(*given, out=out, kv_lengths=[13, 5])
    driver.capturing = 1
    with pytest.raises(RuntimeError, match="needs one like it before the capture"):
        scaled_dot_product_attention(*given, out=out, kv_lengths=[13, 6])
    driver.calls.clear()
    scaled_dot_product_attention(*(OnDevice(x, stream=78) for x in arrays), out=out, kv_lengths=[13, 5])
    assert not driver.called("cuMemAllocAsync") and not driver.called("cuStreamSynchronize")
    driver.capturing = 0
    captured = {table.buffer.address for table in launch._tables.values() if table.captured}
    assert len(captured) == 4
    for n in range(14):
        scaled_dot_product_attention(*given, out=out, kv_lengths=[n, 13])
        assert len(driver.memory) <= len(captured) + 8
    assert captured < set(driver.memory) and driver.called("cuMemFreeAsync")


def test_a_table_is_there_for_every_stream(driver: Driver) -> None:
    """Also for a thread whose stream has the same number, and after the one that it was written on is gone."""
    x = np.arange(5)
    with launch.Machine(0, 2).active() as machine:
        machine.constant(x)
    assert driver.called("cuStreamSynchronize") == [[WRITING]], "not for work of the caller's"
    driver.calls.clear()

    def read(stream: int) -> list[int]:
        found = np.empty_like(x)
        with launch.Machine(0, stream).active() as machine:
            machine.download(machine.constant(x), found)
        return found.tolist()

    with ThreadPoolExecutor(1) as pool:
        assert [pool.submit(read, stream).result() for stream in (2, 77)] == [x.tolist()] * 2
    assert driver.called("cuStreamSynchronize") == [[2], [77]], "not for its own copy alone"


def test_unaligned_arrays_are_refused(driver: Driver) -> None:
    query, key, value = _arrays()
    buffer = np.zeros(query.nbytes + 2, np.uint8)
    shifted = OnDevice(buffer[2:].view(np.float32).reshape(query.shape))
    out = OnDevice(np.zeros(query.shape, np.float32))
    with pytest.raises(NotImplementedError, match="elements of 4 bytes at multiples of that, got query at"):
        scaled_dot_product_attention(shifted, OnDevice(key), OnDevice(value), out=out)
    assert not driver.called("cuLaunchKernel")


def test_packed_sequences(driver: Driver) -> None:
    rng = np.random.default_rng(2)
    starts = [0, 4, 4, 11]
    query, key, value = (OnDevice(rng.standard_normal((11, 2, 5), dtype=np.float32)) for _ in range(3))
    out = OnDevice(np.zeros((11, 2, 5), np.float32))
    varlen_attention(query, key, value, starts, starts, is_causal=True, out=out, mask_mod=mods.prefix)
    arrays = [x.numbers for x in (query, key, value)]
    expected = varlen_attention(*arrays, starts, starts, is_causal=True, backend="reference", mask_mod=mods.prefix)
    np.testing.assert_allclose(out.numbers, expected, rtol=1e-5, atol=1e-6)


def test_functions_are_compiled_once_for_what_they_do(driver: Driver) -> None:
    def nearby(limit: int) -> Any:
        return lambda b, h, i, j: abs(i - j) <= limit

    arrays = _arrays()
    for limit in (2, 2, 3):
        out = scaled_dot_product_attention(*arrays, mask_mod=nearby(limit), backend="cuda")
        assert_accurate(out, None, *arrays, mask_mod=nearby(limit))
    assert len(driver.kernels) == 2


def test_tensor_cores_are_chosen_for_what_they_can_do(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their kernels are beyond the simulator: here is how they are started."""
    monkeypatch.setattr(driver, "_cuLaunchKernel", lambda *arguments: None, raising=False)
    query, key, value = (OnDevice(np.zeros((2, 4, L, 64), np.float16)) for L in (200, 300, 300))
    out = OnDevice(np.zeros((2, 4, 200, 64), np.float16))
    scaled_dot_product_attention(query, key, value, is_causal=True, out=out)
    (launched,) = driver.called("cuLaunchKernel")
    make, configuration, types, bounds = driver.kernels[launched[0]]
    assert make is make_flash and configuration[0] == "float16" and bounds[0] == launched[4]
    assert driver.called("cuFuncSetAttribute") == [[launched[0], "shared", launched[7]]] and launched[7] > 48 << 10
    assert len(types) == len(PARAMETERS) and not driver.called("cuMemAllocAsync")
    scaled_dot_product_attention(query, key, value, mask_mod=mods.prefix, out=out)
    assert driver.kernels[driver.called("cuLaunchKernel")[1][0]][0] is make_forward


def test_results_that_are_awaited(driver: Driver) -> None:
    """Of a library without streams: they are there when the call returns."""
    arrays = [*_arrays(), np.zeros((2, 2, 9, 5), np.float32)]
    for awaited in (False, True):
        query, key, value, out = (
            DeviceArray(x.ctypes.data, x.shape, x.strides, x.dtype, stream=5, awaited=awaited) for x in arrays
        )
        problem = Problem.from_call(query, key, value, **{**DEFAULTS, "return_aux": (), "out": out})
        driver.calls.clear()
        attention.forward(problem)
        names = [name for name, *_ in driver.calls]
        assert ("cuStreamSynchronize" in names[names.index("cuLaunchKernel") :]) is awaited


# Calls alike ----------------------------------------------------------------------------------------------------------


def _afresh(*arrays: Any, **options: Any) -> Any:
    repeats.forget()
    return scaled_dot_product_attention(*arrays, **options)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The problems that are checked and laid out from here on."""
    seen: list[Any] = []
    from_call = Problem.from_call
    monkeypatch.setattr(Problem, "from_call", lambda *given, **call: seen.append(call) or from_call(*given, **call))
    return seen


@pytest.mark.parametrize("storage", sorted(set(STORAGE) - {"unaligned", "read-only"}))
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "query_offset": 4, "window": (5, None)}], ids=str)
def test_a_call_like_another_is_not_checked_again(
    driver: Driver, checked: list[Any], storage: str, options: dict[str, Any]
) -> None:
    form = STORAGE[storage]
    results = []
    for seed in range(3):
        rng = np.random.default_rng(seed)
        arrays = [form(rng.standard_normal((2, 2, L, 5)).astype(np.float32)) for L in (9, 13, 13)]
        out = OnDevice(form(np.zeros((2, 2, 9, 5), np.float32)), 77 + seed)
        given = [OnDevice(x, 77 + seed) for x in arrays]
        driver.calls.clear()
        assert scaled_dot_product_attention(*given, out=out, **options) is out
        assert driver.called("cuLaunchKernel")[0][8] == 77 + seed, "not on the array's stream"
        results.append((out.numbers, arrays))
    assert len(checked) == 1
    assert not driver.called("cuMemAllocAsync") and not driver.called("cuMemcpyHtoDAsync")
    for got, arrays in results:
        assert same_bits(got, _afresh(*arrays, backend="cuda", **options))


def test_what_is_not_alike_is_checked(driver: Driver, checked: list[Any]) -> None:
    query, key, value = map(OnDevice, _arrays())
    out = OnDevice(np.zeros((2, 2, 9, 5), np.float32))
    scaled_dot_product_attention(query, key, value, out=out)
    with pytest.raises(ValueError, match="out must not share memory with query"):
        scaled_dot_product_attention(query, key, value, out=query)
    half = OnDevice(np.zeros((2, 2, 9, 5), np.float16))
    with pytest.raises(TypeError, match="out must be float32, as query is"):
        scaled_dot_product_attention(query, key, value, out=half)
    shifted = OnDevice(np.zeros(2 * 2 * 9 * 5 * 4 + 2, np.uint8)[2:].view(np.float32).reshape(2, 2, 9, 5))
    with pytest.raises(NotImplementedError, match="at multiples of that"):
        scaled_dot_product_attention(shifted, key, value, out=out)
    scaled_dot_product_attention(query, key, value, out=out, is_causal=True)
    scaled_dot_product_attention(query, key, value, out=out, kv_lengths=[3, 4])
    assert len(checked) == 6
    # Where the tables of the call have gone it is laid out anew.
    launch._tables.clear()
    scaled_dot_product_attention(query, key, value, out=out)
    scaled_dot_product_attention(query, key, value, out=out)
    assert len(checked) == 7
    # The result beside the query in one array: as near as it may be.
    both = np.zeros((2, 2, 2, 9, 5), np.float32)
    both[0] = query.numbers
    assert scaled_dot_product_attention(OnDevice(both[0]), key, value, out=OnDevice(both[1])) is not None
    assert len(checked) == 7 and same_bits(both[1], out.numbers)


def test_results_of_ones_own_where_calls_are_alike(
    driver: Driver, checked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words that a kernel is given, and memory that it works in, are those of a call that is laid out anew."""
    torch = foreign.torch_with_cuda()
    monkeypatch.setitem(sys.modules, "torch", torch)
    given: list[tuple[Any, list[int]]] = []

    def launched(function: bytes, *rest: Any) -> None:
        given.append((driver.kernels[function][0], _words(rest[8], len(PARAMETERS))))

    monkeypatch.setattr(driver, "_cuLaunchKernel", launched, raising=False)
    for rows in (1, 3, 100):  # in parts of few rows, of more, and whole
        arrays = [torch.Tensor((2, 8, L, 64), "float16") for L in (rows, 600, 600)]
        repeats.forget()
        checked.clear()
        scaled_dot_product_attention(*arrays)
        others = [torch.Tensor((2, 8, L, 64), "float16") for L in (rows, 600, 600)]
        given.clear()
        memory = set(driver.memory)
        out = scaled_dot_product_attention(*others)
        assert type(out) is torch.Tensor and out.shape == (2, 8, rows, 64) and len(checked) == 1
        assert set(driver.memory) == memory, "temporary memory is given back"
        again = list(given)
        given.clear()
        _afresh(*others, out=out)
        assert [make for make, _ in again] == [make for make, _ in given] and len(given) == (1 if rows == 100 else 2)
        scratch = [n for n, name in enumerate(PARAMETERS) if name in ("parts", "part_sums")]
        for (_, one), (_, other) in zip(again, given, strict=True):
            assert [x for n, x in enumerate(one) if n not in scratch] == [
                x for n, x in enumerate(other) if n not in scratch
            ]
            taken = driver.called("cuMemAllocAsync")[-3][0] if rows < 100 else 0
            for n in scratch:
                assert bool(one[n]) is bool(other[n]) and one[n] % 256 == one[scratch[0]] % 256
            assert rows == 100 or one[scratch[0]] < one[scratch[1]] < one[scratch[0]] + taken


def _words(places: int, count: int) -> list[int]:
    return [int(array_at(int(place), np.int64, 1)[0]) for place in array_at(places, np.uint64, count)]


def test_threads_with_calls_alike(driver: Driver, checked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call's arguments are its own, as long as the driver may read them."""
    key, value = (OnDevice(x) for x in _arrays()[1:])
    one_at_a_time, run, together = threading.Lock(), driver._cuLaunchKernel, threading.Barrier(1)

    def launched(*arguments: Any) -> None:
        together.wait(10)
        with one_at_a_time:
            run(*arguments)

    monkeypatch.setattr(driver, "_cuLaunchKernel", launched, raising=False)

    def compute(seed: int) -> None:
        query = OnDevice(np.random.default_rng(seed).standard_normal((2, 2, 9, 5)).astype(np.float32))
        out = OnDevice(np.zeros((2, 2, 9, 5), np.float32))
        scaled_dot_product_attention(query, key, value, out=out)
        results[seed] = query.numbers, out.numbers

    results: dict[int, Any] = {}
    compute(0)
    compute(1)
    together = threading.Barrier(3)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(compute, range(2, 5)))
    together = threading.Barrier(1)
    assert len(checked) == 1
    for query, out in results.values():
        assert same_bits(out, _afresh(query, key.numbers, value.numbers, backend="cuda"))
