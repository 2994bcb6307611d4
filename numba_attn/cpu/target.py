"""The instruction set that Numba compiles for, which is not always the one of the processor at hand.

Read from Numba's own target, so that `NUMBA_CPU_NAME` and `NUMBA_CPU_FEATURES` are obeyed: code chosen by any other
test could contain instructions that the compiler may not use.
"""

from __future__ import annotations

import os

from numba.core.registry import cpu_target

TRIPLE, NAME, FEATURES = cpu_target.target_context.codegen().magic_tuple()


def _has(feature: str) -> bool:
    return f"+{feature}" in FEATURES.split(",")


# An empty feature string means "whatever this CPU name has", which only LLVM knows: the generic form is right anywhere.
HAS_FMA = _has("fma") or _has("neon")
HAS_F16C = _has("f16c")
HAS_AVX512 = _has("avx512f") and HAS_FMA
HAS_AVX2 = _has("avx2") and HAS_FMA

# `NUMBA_ATTN_ISA` forces a register tile, for tests of one form on a processor of another kind: every form is right, if
# slow, everywhere.
ISA = os.environ.get("NUMBA_ATTN_ISA") or (
    "avx512" if HAS_AVX512 else "avx2" if HAS_AVX2 else "neon" if _has("neon") else "generic"
)
VECTOR_BYTES = {"avx512": 64, "avx2": 32, "neon": 16, "generic": 16}[ISA]
