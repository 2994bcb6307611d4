"""`numba-attn warmup`: every kernel compiled, and kept in the cache."""

from __future__ import annotations

import argparse
import json
import time

from numba_attn.commands.common import NO_CACHE


def run(options: argparse.Namespace) -> int:
    from numba_attn.cpu import attention, cache, gradients, quantization, rotation

    start = time.perf_counter()
    names = (
        attention.warmup()
        + rotation.warmup()
        + quantization.warmup()
        + (gradients.warmup() if options.gradients else [])
    )
    seconds = time.perf_counter() - start
    directory = cache.directory()
    where = None if directory is None else str(directory)
    if options.json:
        print(json.dumps({"kernels": names, "seconds": seconds, "cache": where}, indent=2))
    else:
        print("\n".join(names))
        print(f"{len(names)} kernels compiled, or found compiled, in {seconds:.1f} s; cache: {where or NO_CACHE}")
    return 0
