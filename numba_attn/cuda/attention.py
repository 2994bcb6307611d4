"""From a `Problem` to the kernels that compute it on a CUDA device.

NumPy arrays are copied to the current device, and the results back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from numba_attn.cuda import placed, portable, simulator, tensorcore
from numba_attn.cuda.placed import STATISTICS, Placed
from numba_attn.device_array import DeviceArray
from numba_attn.problem import Problem
from numba_attn.repeats import MakeRepeat, Repeat

OPERANDS = ("query", "key", "value", "out")


def unavailable() -> str | None:
    """Why this backend cannot be used; None if it can."""
    if simulator.enabled():
        return None
    from numba_attn.cuda import devices

    return devices.unavailable()


def forward(problem: Problem) -> MakeRepeat | None:
    """Compute `problem` and write its results; returns what tells how to do the same for other arrays of a device."""
    B, Hq, _, Lq, Lk, _, _ = problem.sizes
    if B * Hq * max(Lq, 0 if problem.key_weight is None else Lk) == 0:
        return None
    with _machine(problem).active() as machine:
        results = {name: x for name in ("out", *STATISTICS) if (x := getattr(problem, name)) is not None}
        places = {name: placed.result(machine, name, x) for name, x in results.items()}
        for name in ("query", "key", "value", "mask"):
            if (x := getattr(problem, name)) is not None:
                places[name] = placed.operand(machine, name if name != "mask" else "attn_mask", x)
        kernels(problem, machine, places)(problem, machine, places)
        for name, into in results.items():
            placed.fetch(machine, places[name], into)
        if isinstance(problem.query, DeviceArray) and problem.query.awaited:
            machine.synchronize()
    on_device = isinstance(problem.query, DeviceArray) and places.keys() == {*OPERANDS}
    return functools.partial(_repeat, problem, machine) if on_device else None


def kernels(problem: Problem, machine: Any, places: dict[str, Placed]) -> Callable[..., None]:
    """The fastest kernels that can compute a problem; the portable ones can compute any."""
    cc = machine.compute_capability
    if cc is not None and tensorcore.supports(problem, cc, lambda name: _where(places[name])) is None:
        return _on_tensor_cores
    return portable.run


def _on_tensor_cores(problem: Problem, machine: Any, places: dict[str, Placed]) -> None:
    def where(name: str) -> tensorcore.Where:
        return _where(places[name])

    def upload(table: np.ndarray) -> int:
        return machine.constant(np.ascontiguousarray(table).reshape(-1)).address

    def scratch(size: int) -> int:
        return machine.empty(size, np.uint8).address

    for launch in tensorcore.launches(problem, machine.compute_capability, where, upload, scratch):
        machine.run(launch)


def _where(place: Placed) -> tensorcore.Where:
    itemsize = np.dtype(place.buffer.dtype).itemsize
    return tensorcore.Where(
        place.buffer.address + place.first * itemsize, tuple(stride * itemsize for stride in place.strides)
    )


def _machine(problem: Problem) -> Any:
    """Where to compute: the simulator, or the device and the stream of the query."""
    if simulator.enabled():
        return simulator.Machine()
    from numba_attn.cuda import launch

    return launch.machine(problem.query)


# Calls like an earlier one --------------------------------------------------------------------------------------------


def _repeat(problem: Problem, machine: Any) -> Repeat:
    """How to compute problems like one whose arrays are all on a device, for those of another call; it keeps none."""
    from numba_attn.cuda import devices
    from numba_attn.cuda.replay import Replay

    replay, device, any_device = Replay(machine, OPERANDS), machine.device, problem.query.device is None
    shape, dtype = problem.result.shape, problem.result.dtype
    reaches = (_reach(getattr(problem, name)) for name in OPERANDS)
    (q_low, q_high), (k_low, k_high), (v_low, v_high), (out_low, out_high) = reaches

    def apart(q: int, k: int, v: int, out: int) -> bool:
        """Whether the result is surely not in the memory of an operand; if not, that has to be looked at."""
        low, high = out + out_low, out + out_high
        return (
            (high <= q + q_low or q + q_high <= low)
            and (high <= k + k_low or k + k_high <= low)
            and (high <= v + v_low or v + v_high <= low)
        )

    def repeat(library: Any, query: Any, out: Any, addresses: tuple[int, ...], stream: int) -> Any:
        if any_device and devices.current_device() != device:
            return None
        if out is None:
            result = library.empty(query, shape, dtype)
            return result if replay((*addresses, library.located(result)[1]), stream) else None
        if not apart(*addresses) or not replay(addresses, stream):
            return None
        library.wrote(out)
        return out

    return repeat


def _reach(x: DeviceArray) -> tuple[int, int]:
    """The bytes that an array has, as so many behind its address."""
    ends = [stride * (n - 1) for n, stride in zip(x.shape, x.strides, strict=True)]
    return sum(min(end, 0) for end in ends), sum(max(end, 0) for end in ends) + x.itemsize
