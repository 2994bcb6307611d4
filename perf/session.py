"""One library in a process of its own, which answers the requests of `workers.Worker`: `session.py NAME THREADS`."""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import extras
import numpy as np
from cases import PERF
from peer import Prepared, Unsupported, versions
from peers import PEERS

TURN = 0.02  # seconds that a timing takes at least
PR_SET_PDEATHSIG = 1


class Timed:
    """A call, and how many of them make a timing."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call, self.calls = call, 1
        while (seconds := self.calls * self._mean()) < TURN:
            self.calls = math.ceil(self.calls * min(10, 1.2 * TURN / seconds))

    def seconds(self) -> float:
        """Of one call, the mean over a timing."""
        if self.calls > 1:
            self._call()  # what was stopped has threads to wake and caches to fill
        return self._mean()

    def _mean(self) -> float:
        call, calls = self._call, range(self.calls)
        start = time.perf_counter()
        for _ in calls:
            call()
        return (time.perf_counter() - start) / self.calls


class Session:
    """One peer, and the case that it is at, in its forms; each public method is a request."""

    def __init__(self, name: str, threads: int) -> None:
        self._peer = PEERS[name](threads)
        self._cases = {case.name: case for case in (*PERF, extras.LONG)}
        self._peaks: dict[str, list[Any]] = {}
        self._timed: dict[str, Timed] = {}  # by form, "" the plain one
        self._read: tuple[np.ndarray, ...] = ()
        self._reading: tuple[Timed, int] | None = None

    def versions(self) -> dict[str, str]:
        return versions(self._peer)

    def prepare(self, case: str, form: str, output: str) -> dict[str, int]:
        """Make the arrays and whatever else the library needs, save the first result.

        Returns the calls of a timing, and the bytes that each reads if it does little else; the plain form comes first.
        """
        problem = self._cases[case]
        if not form:  # the arrays of the case before are free from here
            self._timed.clear()
            self._read, self._reading = (), None
        prepared = self._peer.prepare_form(problem, form) if form else self._peer.prepare(problem)
        save(output, prepared.array(prepared.call()))
        self._timed[form] = Timed(prepared.call)
        self._read = prepared.read or self._read
        return {"calls": self._timed[form].calls, **({"bytes": prepared.bytes} if prepared.bytes else {})}

    def time(self, form: str) -> float:
        """Seconds of one call."""
        return self._timed[form].seconds()

    def memory(self, case: str) -> int:
        """Bytes that the first call of a case takes in a process that has done small ones."""
        self._peer.prepare(extras.SMALL).call()
        prepared: Prepared = self._peer.prepare(self._cases[case])
        return extras.memory_growth(prepared)

    # Of our worker only

    def peak(self, dtype: str) -> float:
        """GFLOP/s of multiply-adds, now; of the fastest that products of the type may be made by."""
        from peak import measures

        if dtype not in self._peaks:
            self._peaks[dtype] = measures(dtype)
        return max(one.gflops() for one in self._peaks[dtype])

    def read(self) -> float:
        """GB/s at which the keys and values of the case can be read, now."""
        from peak import Reading

        if self._reading is None:
            reading = Reading(self._read)
            self._reading = Timed(reading), reading.bytes
        timed, size = self._reading
        return size / timed.seconds() / 1e9

    def bandwidth(self) -> float:
        from peak import read_bandwidth

        return read_bandwidth()

    def reference(self, case: str, output: str) -> None:
        """Save the result of the plain NumPy implementation in float64."""
        from numba_attn import scaled_dot_product_attention

        problem = self._cases[case]
        query, key, value = (x.astype(np.float64) for x in problem.arrays())
        out = scaled_dot_product_attention(query, key, value, backend="reference", **problem.keywords())
        save(output, out[0] if isinstance(out, tuple) else out)

    def fixed_cost(self) -> dict[str, float]:
        return extras.fixed_cost()

    def block_mask_cost(self) -> dict[str, float]:
        return extras.block_mask_cost()

    def machine(self) -> dict[str, Any]:
        """What our kernels are compiled for, and run on."""
        from numba_attn import threads
        from numba_attn.cpu import target

        return {
            "isa": target.ISA,
            "bfloat16": target.BFLOAT16,
            "compiled_for": target.NAME,
            "threads": threads.count(),
            "threading_layer": threads.layer(),
        }


def save(path: str, x: np.ndarray) -> None:
    """Numbers of 16 bits as float32: files know nothing of bfloat16."""
    np.save(path, x if x.dtype.itemsize > 2 else x.astype(np.float32))


def serve(name: str, threads: int) -> None:
    """Answer requests, JSON lines on stdin, on stdout, which libraries get no chance to print on."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a stopped process would outlive a killed driver
    os.sched_setaffinity(0, processors(threads))
    session: Session | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            session = session or Session(name, threads)
            answer = {"value": getattr(session, request.pop("do"))(**request)}
        except (Unsupported, ModuleNotFoundError) as error:
            answer = {"unsupported": str(error)}
        except Exception as error:
            traceback.print_exc()
            answer = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def processors(count: int) -> set[int]:
    """So many of those that this process may use, on different cores as far as there are."""
    seen: dict[tuple[str, ...], int] = {}

    def rank(cpu: int) -> tuple[int, int]:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        core = tuple((topology / name).read_text() for name in ("physical_package_id", "core_id"))
        seen[core] = seen.get(core, 0) + 1
        return seen[core], cpu

    return set(sorted(sorted(os.sched_getaffinity(0)), key=rank)[:count])


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
