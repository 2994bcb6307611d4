"""From a `Problem` to the kernels that compute it on a CUDA device.

NumPy arrays are copied to the current device, and the results back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from numba_attn.cuda import placed, portable, simulator, tensorcore
from numba_attn.cuda.placed import STATISTICS, Placed
from numba_attn.problem import Problem


def unavailable() -> str | None:
    """Why this backend cannot be used; None if it can."""
    if simulator.enabled():
        return None
    from numba_attn.cuda import launch

    return launch.unavailable()


def forward(problem: Problem) -> None:
    """Compute `problem` and write its results."""
    B, Hq, _, Lq, Lk, _, _ = problem.sizes
    if B * Hq * max(Lq, 0 if problem.key_weight is None else Lk) == 0:
        return
    with _machine(problem).active() as machine:
        results = {name: x for name in ("out", *STATISTICS) if (x := getattr(problem, name)) is not None}
        places = {name: placed.result(machine, name, x) for name, x in results.items()}
        for name in ("query", "key", "value", "mask"):
            if (x := getattr(problem, name)) is not None:
                places[name] = placed.operand(machine, name if name != "mask" else "attn_mask", x)
        kernels(problem, machine, places)(problem, machine, places)
        for name, into in results.items():
            placed.fetch(machine, places[name], into)


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
