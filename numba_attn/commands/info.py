"""`numba-attn info`: versions, processor, threads, cache and backends."""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

import numba_attn
from numba_attn.commands.common import NO_CACHE, version

# Instruction-set features that decide how fast attention is.
FEATURES = ("avx2", "fma", "avx512f", "avx512bf16", "avx512fp16", "avx512vnni", "amx-bf16", "neon", "bf16", "sve")
BFLOAT16_PRODUCTS = {
    "amx": "products by AMX tiles",
    "dot": "products by AVX-512 dot products",
    "widened": "products as float32, no others are faster here",
}
BACKENDS = {
    "cpu": "numba and llvmlite",
    "cuda": "an NVIDIA GPU with its driver, and numba-cuda",
    "reference": "numpy",
}


def run(options: argparse.Namespace) -> int:
    info = environment()
    if options.json:
        print(json.dumps(info, indent=2))
        return 0
    versions = ", ".join(f"{name} {found or 'not installed'}" for name, found in info["versions"].items())
    lines = {"versions": versions, "platform": info["platform"]}
    if info["kernels"] is not None:
        cpu, kernels, threads = info["cpu"], info["kernels"], info["threads"]
        tiles = ", ".join(f"{rows[0]} x {vectors}" for vectors, rows in kernels["register_tiles"].items())
        lines["cpu"] = f"{cpu['name']}, as Numba compiles for it: {' '.join(cpu['features']) or 'no vector features'}"
        lines["kernels"] = f"{kernels['isa']}, {kernels['vector_bytes']}-byte vectors, register tiles {tiles} vectors"
        lines["bfloat16"] = BFLOAT16_PRODUCTS[kernels["bfloat16_products"]]
        lines["threads"] = f"{threads['count']}, threading layer {threads['layer']}"
        lines["cache"] = info["cache"] or NO_CACHE
    for name, backend in info["backends"].items():
        state = "available" if backend["available"] else f"not available: {backend['reason']}; needs {backend['needs']}"
        lines[f"backend {name}"] = state
    for name, text in lines.items():
        print(f"{name:<18}{text}")
    return 0


def environment() -> dict[str, Any]:
    """What decides which code runs here and how fast; what cannot be told without a package that is missing is None."""
    info: dict[str, Any] = {
        "versions": {
            "numba_attn": numba_attn.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("numba", "llvmlite", "numpy", "ml_dtypes", "onnx")},
        },
        "platform": platform.platform(),
        "cpu": None,
        "kernels": None,
        "threads": None,
        "cache": None,
        "backends": {name: availability(name) for name in BACKENDS},
    }
    try:
        from numba_attn import threads
        from numba_attn.cpu import cache, plan, target
    except ImportError:
        return info  # the reason is that of the cpu backend
    compiled_for = target.FEATURES.split(",")
    directory = cache.directory()
    info["cpu"] = {"name": target.NAME, "features": [name for name in FEATURES if f"+{name}" in compiled_for]}
    info["kernels"] = {
        "isa": target.ISA,
        "vector_bytes": target.VECTOR_BYTES,
        "register_tiles": {str(vectors): list(rows) for vectors, rows in plan.HEIGHTS.items()},
        "widest": plan.WIDEST,
        "bfloat16_products": target.BFLOAT16,
    }
    info["threads"] = {"count": threads.count(), "layer": threads.layer()}
    info["cache"] = None if directory is None else str(directory)
    return info


def availability(backend: str) -> dict[str, Any]:
    try:
        from numba_attn import dispatch

        dispatch.forward(backend)
    except (ImportError, NotImplementedError) as error:
        return {"available": False, "reason": str(error), "needs": BACKENDS[backend]}
    return {"available": True}
