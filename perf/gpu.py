"""This package beside PyTorch's forms of attention on a GPU: `python perf/run.py --backend cuda`.

All in one process, as a GPU does one thing after the other, and on tensors that PyTorch makes there.  Times are those
of the GPU's own clock, of runs of calls, the libraries in turns; with each, the rate of PyTorch's matrix products and
of its copies, for the fractions.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

import numpy as np
from cases import GPU, Case
from peer import Unsupported
from workers import ROOT

DEVICE = "cuda"
TURN = 0.05  # seconds that a timing takes at least
ROWS = 16  # of one head, whose result is computed in float64 too
MOST_SCORES = 1 << 31  # that PyTorch's form which keeps them is asked for
PRODUCT, COPIED = 8192, 1 << 30  # sides of the matrices, bytes
PACKAGES = ("numba-attn", "numba", "numba-cuda", "torch", "numpy", "flash-attn")
FORMS = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH"}

Call = Callable[[], Any]
Result = dict[str, Any]

# Runs in a fresh process: seconds of a first call, of which the kernel is compiled or not, the device being awake.
START = """
import json, sys, time
import torch
from numba_attn import scaled_dot_product_attention
dtype = getattr(torch, sys.argv[1])
awake = torch.ones(1, 1, 32, 16, device="cuda", dtype=torch.float64)
scaled_dot_product_attention(awake, awake, awake)
x = torch.ones(1, 2, 512, 128, device="cuda", dtype=dtype)
torch.cuda.synchronize()
start = time.perf_counter()
scaled_dot_product_attention(x, x, x)
torch.cuda.synchronize()
print(json.dumps(time.perf_counter() - start))
"""


def unavailable() -> str | None:
    """Why there is nothing to measure here, or None."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    from numba_attn.cuda.attention import unavailable as reason

    return reason() or (None if torch.cuda.is_available() else "torch sees no GPU")


# Calls ----------------------------------------------------------------------------------------------------------------


def tensors(case: Case) -> list[Any]:
    """Query, key and value, N(0, 1)."""
    import torch

    generator = torch.Generator(DEVICE).manual_seed(zlib.crc32(case.name.encode()))
    Hkv, Dv = case.Hkv or case.Hq, case.Dv or case.D
    shapes = (case.B, case.Hq, case.Lq, case.D), (case.B, Hkv, case.Lk, case.D), (case.B, Hkv, case.Lk, Dv)
    dtype = getattr(torch, case.dtype)
    return [torch.randn(*shape, generator=generator, device=DEVICE, dtype=dtype) for shape in shapes]


def ours(case: Case, operands: Sequence[Any]) -> Call:
    import torch

    from numba_attn import scaled_dot_product_attention

    query, _, value = operands
    out = torch.empty(*query.shape[:-1], value.shape[-1], device=DEVICE, dtype=query.dtype)
    options = {
        name: torch.from_numpy(x).to(DEVICE) if isinstance(x, np.ndarray) else x for name, x in case.options.items()
    }
    return functools.partial(
        scaled_dot_product_attention, *operands, **options, enable_gqa=case.Hkv is not None, out=out
    )


def torch_form(case: Case, operands: Sequence[Any], form: str) -> Call:
    """PyTorch's function, with one of its kernels, or with that which it chooses if `form` is ""."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if case.options.keys() - {"is_causal"}:
        raise Unsupported("options that it does not have")
    if form == "math" and case.B * case.Hq * case.Lq * case.Lk > MOST_SCORES:
        raise Unsupported("too many scores to keep")
    attend = functools.partial(
        torch.nn.functional.scaled_dot_product_attention,
        *operands,
        is_causal=case.causal,
        enable_gqa=case.Hkv is not None,
    )
    if not form:
        return attend

    def with_kernel() -> Any:
        with sdpa_kernel(getattr(SDPBackend, FORMS[form])):
            return attend()

    try:
        with_kernel()
    except RuntimeError as error:
        raise Unsupported(str(error).splitlines()[0]) from error
    return with_kernel


def flash_attention(case: Case, operands: Sequence[Any]) -> Call:
    """FlashAttention's own package, where it is installed."""
    try:
        attend = importlib.import_module("flash_attn").flash_attn_func
    except ImportError as error:
        raise Unsupported("not installed") from error
    if case.dtype == "float32":
        raise Unsupported(case.dtype)
    query, key, value = (x.transpose(1, 2) for x in operands)
    options: dict[str, Any] = {"causal": case.causal, "softcap": case.options.get("softcap", 0.0)}
    if "window" in case.options:
        options["window_size"] = case.options["window"]
    if "alibi_slopes" in case.options:
        import torch

        options["alibi_slopes"] = torch.from_numpy(case.options["alibi_slopes"]).to(DEVICE)
    return lambda: attend(query, key, value, **options).transpose(1, 2)


PEERS: dict[str, Callable[[Case, Sequence[Any]], Call]] = {
    "ours": ours,
    "torch": functools.partial(torch_form, form=""),
    **{f"torch {form}": functools.partial(torch_form, form=form) for form in FORMS},
    "flash_attn": flash_attention,
}


def exact(case: Case, operands: Sequence[Any]) -> Any:
    """The last `ROWS` rows of the first head, in float64."""
    import torch

    query, key, value = (x[0, 0].double() for x in operands)
    rows = torch.arange(case.Lq, device=DEVICE)[-ROWS:, None]
    columns = torch.arange(case.Lk, device=DEVICE)
    scores = query[-ROWS:] @ key.T / math.sqrt(case.D)
    if (cap := case.options.get("softcap")) is not None:
        scores = cap * torch.tanh(scores / cap)
    if (slopes := case.options.get("alibi_slopes")) is not None:
        scores -= float(slopes[0]) * (rows - columns).abs()
    if case.causal:
        scores[columns > rows] = -math.inf
    if "window" in case.options:
        scores[columns < rows - case.options["window"][0]] = -math.inf
    return torch.softmax(scores, -1) @ value


# Times ----------------------------------------------------------------------------------------------------------------


def gpu_seconds(call: Call, calls: int) -> float:
    """Of one call, by the GPU's clock."""
    import torch

    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(calls):
        call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3 / calls


class Timed:
    """A call, and how many of them make a timing."""

    def __init__(self, call: Call) -> None:
        self._call = call
        call()
        self.calls = max(1, math.ceil(TURN / max(gpu_seconds(call, 2), 1e-6)))

    def seconds(self) -> float:
        return gpu_seconds(self._call, self.calls)


def rates(dtype: str) -> tuple[Timed, Timed]:
    """A matrix product of 2 * PRODUCT ** 3 FLOP, and a copy of COPIED bytes, which reads and writes them."""
    import torch

    a, b = (torch.randn(PRODUCT, PRODUCT, device=DEVICE, dtype=getattr(torch, dtype)) for _ in range(2))
    source = torch.zeros(COPIED, device=DEVICE, dtype=torch.uint8)
    to = torch.empty_like(source)
    return Timed(lambda: a @ b), Timed(lambda: to.copy_(source))


def measure(case: Case, repeats: int) -> Result:
    """One case: results compared with ours and with float64, then everyone's time, in turns."""
    import torch

    operands = tensors(case)
    expected = exact(case, operands)
    timed: dict[str, Timed] = {}
    peers: dict[str, Result] = {}
    own: Any = None
    for name, prepare in PEERS.items():
        try:
            call = prepare(case, operands)
            out = call()
        except (Unsupported, torch.cuda.OutOfMemoryError) as error:
            if name == "ours":
                raise
            peers[name] = {"unsupported": str(error).splitlines()[0]}
            continue
        own = out.clone() if name == "ours" else own
        peers[name] = {
            "difference": float((out - own).abs().max()),
            "error": float((out[0, 0, -ROWS:].double() - expected).abs().max()),
            "seconds": [],
        }
        timed[name] = Timed(call)
    product, copy = rates(case.dtype)
    peaks, copies = [], []
    for repeat in range(repeats):
        names = list(timed)
        for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
            peers[name]["seconds"].append(timed[name].seconds())
        peaks.append(2 * PRODUCT**3 / product.seconds() / 1e12)
        copies.append(2 * COPIED / copy.seconds() / 1e9)
    return summary(case, peers, statistics.median(peaks), statistics.median(copies))


def summary(case: Case, peers: dict[str, Result], peak: float, copied: float) -> Result:
    """The numbers that follow from the timings."""
    for peer in peers.values():
        if "seconds" in peer:
            peer["median"] = statistics.median(peer["seconds"])
            peer["tflops"], peer["gb_per_s"] = (x / peer["median"] for x in (case.flop / 1e12, case.kv_bytes / 1e9))
            peer["ratio"] = peer["median"] / peers["ours"]["median"]
    return {
        "name": case.name,
        "tags": sorted(case.tags),
        "flop": case.flop,
        "bytes": case.kv_bytes,
        "product_tflops": peak,
        "copy_gb_per_s": copied,
        "peers": peers,
    }


def text_line(result: Result) -> str:
    """Our time, speed and fraction, and how many times as long the others take."""
    mine = result["peers"]["ours"]
    speed = f"{mine['tflops']:7.1f} TFLOP/s {100 * mine['tflops'] / result['product_tflops']:3.0f} %"
    if "decode" in result["tags"]:
        speed = f"{mine['gb_per_s']:7.0f} GB/s    {100 * mine['gb_per_s'] / result['copy_gb_per_s']:3.0f} %"
    others = [
        f"{name} {peer['ratio']:.2f}" for name, peer in result["peers"].items() if name != "ours" and "ratio" in peer
    ]
    return "   ".join([f"{result['name']:<48}{1e3 * mine['median']:9.3f} ms {speed}", *others])


# Beside the cases -----------------------------------------------------------------------------------------------------


def host_microseconds(dtype: str, calls: int = 200) -> float:
    """What a call with `out` given costs the host, which waits for nothing; the median of several runs."""
    import torch

    x = torch.ones(1, 1, 64, 64, device=DEVICE, dtype=getattr(torch, dtype))
    call = ours(Case("", 1, 64, 64, 64, dtype=dtype), [x, x, x])
    found = []
    for _ in range(11):
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        found.append((time.perf_counter() - start) / calls)
        torch.cuda.synchronize()
    return 1e6 * statistics.median(found)


def compile_seconds(dtype: str) -> dict[str, float]:
    """Of a first call in a fresh process, without and with the kernel on disk."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "NUMBA_CACHE_DIR": cache, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", START, dtype]
        started = (
            subprocess.run(command, env=environment, check=True, capture_output=True, text=True) for _ in range(2)
        )
        return {name: json.loads(one.stdout) for name, one in zip(("cold", "cached"), started, strict=True)}


def environment() -> Result:
    import torch

    properties = torch.cuda.get_device_properties(0)
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": properties.name,
        "capability": [properties.major, properties.minor],
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": sys.version.split()[0],
        "versions": installed,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def run(only: Sequence[str], repeats: int, with_extras: bool, commit: str | None) -> Result:
    """All measurements, as they are written to JSON; each case a line of text when it is done."""
    import torch

    torch.set_grad_enabled(False)
    cases = [case for case in GPU if not only or any(part in case.name for part in only)]
    measured = []
    for case in cases:
        measured.append(measure(case, repeats))
        print(text_line(measured[-1]), flush=True)
    extras = None
    if with_extras:
        dtypes = ("bfloat16", "float32")
        extras = {
            "host_us": {dtype: host_microseconds(dtype) for dtype in dtypes},
            "compile_seconds": {dtype: compile_seconds(dtype) for dtype in dtypes},
        }
        print(json.dumps(extras))
    return {"backend": DEVICE, "environment": {**environment(), "commit": commit}, "cases": measured, "extras": extras}
