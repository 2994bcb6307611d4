"""The instruction set that Numba compiles for, which is not always the one of the processor at hand.

Read from Numba's own target, so that `NUMBA_CPU_NAME` and `NUMBA_CPU_FEATURES` are obeyed: code chosen by any other
test could contain instructions that the compiler may not use.
"""

from __future__ import annotations

import ctypes
import os
import sys

from llvmlite import binding
from numba.core.registry import cpu_target

TRIPLE, NAME, FEATURES = cpu_target.target_context.codegen().magic_tuple()


def _has(feature: str) -> bool:
    return f"+{feature}" in FEATURES.split(",")


# An empty feature string means "whatever this CPU name has", which only LLVM knows: the generic form is right anywhere.
HAS_FMA = _has("fma") or _has("neon")
HAS_F16C = _has("f16c")
HAS_AVX512 = _has("avx512f") and HAS_FMA
HAS_AVX2 = _has("avx2") and HAS_FMA

# Whether 64-bit integers become numbers one by one: x86 has vectors of such conversions from AVX-512 on.
CONVERTS_ONE_BY_ONE = HAS_AVX2 and not _has("avx512dq")

# `NUMBA_ATTN_ISA` forces a register tile, for tests of one form on a processor of another kind: every form is right, if
# slow, everywhere.
ISA = os.environ.get("NUMBA_ATTN_ISA") or (
    "avx512" if HAS_AVX512 else "avx2" if HAS_AVX2 else "neon" if _has("neon") else "generic"
)
VECTOR_BYTES = {"avx512": 64, "avx2": 32, "neon": 16, "generic": 16}[ISA]
MANY_REGISTERS = ISA in ("avx512", "neon")  # 32 of vectors, not 16
# The cache that lines are asked into, as LLVM counts: 3 is the first level, 2 the second.  On Zen 3 and 4 those for the
# first take one of its few places for loads that miss, and less is on the way from memory than without.
PREFETCH = 2 if NAME in ("znver3", "znver4") else 3
SECOND_LEVEL = 2  # for what is needed much later
# Whether a few hundred lines are worth asking for at once: Zen 4 has them in time anyway.
MANY_AT_ONCE = NAME == "znver3"


def _tiles_permitted() -> bool:
    """Ask Linux, once a process, for the use of AMX's tile registers: threads and children have it too."""
    if not (_has("amx-tile") and _has("amx-bf16") and sys.platform == "linux"):
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0)


# What products of bfloat16 numbers are made by: "amx" tiles; the "dot" product of pairs, of AVX-512, which on AMD's
# processors has twice the rate of float32 and on others half of it; or float32 products of the "widened" numbers.
# `NUMBA_ATTN_BFLOAT16` forces one, for tests.
BFLOAT16 = os.environ.get("NUMBA_ATTN_BFLOAT16") or (
    "widened" if ISA != "avx512"
    else "amx" if _tiles_permitted()
    else "dot" if _has("avx512bf16") and NAME.startswith("znver")
    else "widened"
)  # fmt: skip
HAS_BFLOAT16_PAIRS = BFLOAT16 != "widened"
# Whether there is an instruction for sums of two products of integers of 16 bits, in vectors of the register tile.
HAS_WORD_PRODUCTS = (ISA == "avx512" and HAS_AVX512 and _has("avx512bw")) or (ISA == "avx2" and HAS_AVX2)
if BFLOAT16 == "amx":
    _tiles_permitted()
    binding.initialize_native_asmparser()  # for instructions that LLVM has no portable form of
