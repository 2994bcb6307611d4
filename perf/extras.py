"""What is measured beside the speed of each case: fixed cost of a call, working memory, start of a process."""

from __future__ import annotations

import functools
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cases import PERF, Case
from peer import Prepared

TINY = next(case for case in PERF if case.name == "tiny, 1 x 64, D 64")
SMALL = next(case for case in PERF if case.name == "12 x 128, D 64")  # large enough for all threads
MODERATE = next(case for case in PERF if case.name == "8 x 2048, D 64")
DOCUMENTS = next(case for case in PERF if case.documents)
# Its matrix of scores would have 8.6 GB.
LONG = Case("8 x 16384, D 64", 8, 16384, 16384, 64)
WARM_STARTS = 5

# Runs in a fresh process: seconds of each step from the import of this package to the second call.
START = """
import json, time
import numpy as np
query = np.random.default_rng(0).standard_normal((1, 8, 512, 64), dtype=np.float32)
marks = [time.perf_counter()]
import numba_attn
marks.append(time.perf_counter())
from numba_attn import dispatch
dispatch.forward("cpu")
marks.append(time.perf_counter())
numba_attn.scaled_dot_product_attention(query, query, query)
marks.append(time.perf_counter())
numba_attn.scaled_dot_product_attention(query, query, query)
marks.append(time.perf_counter())
names = ("import", "backend", "first_call", "second_call")
print(json.dumps({name: after - before for name, before, after in zip(names, marks, marks[1:])}))
"""


def fixed_cost() -> dict[str, float]:
    """Microseconds of the smallest call, the first of its kind, of its two parts, and of it again; the best of many."""
    from numba_attn import dispatch, repeats, scaled_dot_product_attention
    from numba_attn.problem import Problem

    arrays, keywords = TINY.arrays(), TINY.keywords()
    bound = inspect.signature(scaled_dot_product_attention).bind(*arrays, **keywords)
    bound.apply_defaults()
    launch = dispatch.forward(bound.arguments.pop("backend"))
    problem = Problem.from_call(**bound.arguments)
    again = functools.partial(scaled_dot_product_attention, *arrays, **keywords)

    def call() -> Any:
        repeats.forget()
        return again()

    parts: dict[str, Callable[[], Any]] = {
        "call": call,
        "again": again,
        "validation": functools.partial(Problem.from_call, **bound.arguments),
        "launch": functools.partial(launch, problem),
    }
    return {name: 1e6 * min(timeit.repeat(part, number=100, repeat=200)) / 100 for name, part in parts.items()}


def block_mask_cost() -> dict[str, float]:
    """Seconds of making a block mask, the first time and after that, and of a call with it, medians of several."""
    from numba_attn import scaled_dot_product_attention
    from numba_attn.block_mask import create_block_mask, documents

    def make() -> Any:
        return create_block_mask(documents(DOCUMENTS.document_ids()), Lq=DOCUMENTS.Lq, Lk=DOCUMENTS.Lk)

    start = time.perf_counter()
    mask = make()
    first = time.perf_counter() - start
    call = functools.partial(scaled_dot_product_attention, *DOCUMENTS.arrays(), block_mask=mask)
    call()
    return {"first": first, **{name: _median_seconds(do) for name, do in (("again", make), ("call", call))}}


def _median_seconds(do: Callable[[], Any]) -> float:
    return statistics.median(timeit.repeat(do, number=1, repeat=11))


def memory_growth(prepared: Prepared) -> int:
    """Bytes by which the first of these calls raises the process's resident set at most, beyond its result.

    The kernel counts pages in batches for each processor: exact to about a megabyte.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    before = _highest_resident()
    result = prepared.call()
    return max(0, _highest_resident() - before - prepared.array(result).nbytes)


def _highest_resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no VmHWM")


def start_times(environment: dict[str, str]) -> dict[str, dict[str, float]]:
    """Seconds of each step of a fresh process, without and with compiled kernels on disk (the median of several).

    Python's own bytecode is on disk in both, as it is where packages are installed.
    """
    with tempfile.TemporaryDirectory() as cache:
        cached = {**os.environ, **environment, "NUMBA_CACHE_DIR": cache}
        cached.pop("PYTHONDONTWRITEBYTECODE", None)
        cold = _start(cached)
        warm = [_start(cached) for _ in range(WARM_STARTS)]
    return {"cold": cold, "warm": {name: statistics.median(times[name] for times in warm) for name in cold}}


def _start(environment: dict[str, str]) -> dict[str, float]:
    finished = subprocess.run(
        [sys.executable, "-c", START], env=environment, check=True, capture_output=True, text=True
    )
    times: dict[str, float] = json.loads(finished.stdout)
    return times
