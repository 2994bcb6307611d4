"""The tensor-core kernels in the emulator: what the contract says of 16-bit arrays, on any machine."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cases import SIXTEEN_BITS, SMALL, Case
from contract import attended
from cuda_emulator import Machine, Memory
from tolerances import DEFAULTS, assert_accurate

from numba_attn.cuda import tensorcore
from numba_attn.cuda.tensorcore import Tiling
from numba_attn.problem import Problem

STATISTICS = "lse", "max_score", "entropy"
A100, H100, L40 = (8, 0), (9, 0), (8, 9)


def _small(few: Tiling, some: Tiling, many: Tiling) -> Callable[[int], Tiling]:
    return lambda rows: few if rows <= tensorcore.FEW else some if rows <= tensorcore.SOME else many


# How problems are cut: as planned for a device, or so small that every edge is met.
TILINGS: dict[str, Callable[[int], Tiling] | None] = {
    "planned": None,
    "16 x 16": _small(Tiling(1, 1, 1, 16, 2), Tiling(1, 4, 1, 16, 2), Tiling(1, 1, 1, 16, 2)),
    "32 x 32": _small(Tiling(1, 1, 2, 32, 1), Tiling(2, 2, 2, 32, 1), Tiling(2, 1, 1, 32, 1)),
}


def emulate(
    problem: Problem, cc: tuple[int, int] = H100, tiling: Callable[[int], Tiling] | None = None
) -> Counter[str]:
    """Compute a problem in the emulator; returns what it has counted."""
    memory = Memory()
    machine = Machine(memory)
    reason = tensorcore.supports(problem, cc, memory.address)
    assert reason is None, reason
    for launch in tensorcore.launches(problem, cc, memory.address, memory.address, memory.scratch, tiling):
        machine.run(launch)
    for x in (problem.out, problem.lse, problem.max_score, problem.entropy):
        if x is not None:
            memory.copy_back(x)
    return machine.counts


def aligned(x: np.ndarray) -> np.ndarray:
    """The same numbers in rows that begin at multiples of 16 bytes, with NaN between them."""
    wide = np.full((*x.shape[:-1], -(-x.shape[-1] // 8) * 8), np.nan, x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def run(*arrays: np.ndarray, tiling: str = "planned", cc: tuple[int, int] = H100, **options: Any) -> Any:
    problem = Problem.from_call(*map(aligned, arrays), **{**DEFAULTS, "return_aux": (), **options})
    with pytest.MonkeyPatch.context() as patch:
        if tiling != "planned":
            patch.setattr(tensorcore, "CHUNK", 32)
        emulate(problem, cc, TILINGS[tiling])
    return problem.result if problem.aux is None else (problem.result, problem.aux)


def _computed(case: Case) -> bool:
    named = {"score_mod", "mask_mod", "block_mask", "precision"} & set(case.options)
    return case.dtype != "float64" and case.D > 0 and not named


CASES = [case for case in SMALL if _computed(case)]
ALL = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
_SOME = [
    *("plain", "odd sizes", "one query", "groups of 4", "causal, offsets", "window, causal, offset", "lengths"),
    *("mask bool", "mask bool reversed", "additive -inf, groups", "alibi per batch, offsets", "sinks and lengths"),
    *("softcap, causal, additive", "dropout, causal, groups"),
]
SOME = pytest.mark.parametrize("case", [c for c in CASES if c.name in _SOME], ids=lambda c: c.name)


def of_type(case: Case, dtype: str) -> Case:
    """The case with arrays of that type, its mask as well unless the mask's own type is what it is about."""
    return dataclasses.replace(case, dtype=dtype)


def check(case: Case, tiling: str, cc: tuple[int, int] = H100) -> None:
    arrays, options = case.arrays(), case.keywords()
    out, aux = run(*arrays, tiling=tiling, cc=cc, return_aux=STATISTICS, **options)
    assert_accurate(out, aux, *arrays, rounded_weights=True, **options)
    empty = ~attended(case).any(axis=-1)
    assert (out[empty] == 0).all() and (aux.max_score[empty] == -np.inf).all() and (aux.entropy[empty] == 0).all()


@ALL
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_agrees_with_float64(case: Case, dtype: str) -> None:
    check(of_type(case, dtype), "16 x 16" if dtype == "float16" else "32 x 32")
