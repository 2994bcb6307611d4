"""From a `Problem` to the kernels that compute it: the arrays, tables and numbers of a call as they take them."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from numba_attn import random, threads
from numba_attn.cpu import decode, key_weight, launch, narrow
from numba_attn.cpu import forward as prefill
from numba_attn.cpu.narrow import COMPUTED, bits_of, kind_of
from numba_attn.cpu.plan import plan
from numba_attn.cpu.score import Arrays, Call, Functions, Sequences, Settings
from numba_attn.cpu.simd import PAIRS
from numba_attn.cpu.tiles import LOG2_E
from numba_attn.cpu.user_functions import mask_pass, score_pass
from numba_attn.problem import Problem, statistics_dtype

SERIAL_WORK = 1 << 20  # multiply-adds that are done sooner than the threads are woken


def forward(problem: Problem) -> None:
    """Compute `problem` and write its results."""
    q, k, v, out = problem.query, problem.key, problem.value, problem.out
    batch, (Hq, Lq, D), (Lk, Dv) = q.shape[:-3], q.shape[-3:], v.shape[-2:]
    B = math.prod(batch)
    if problem.key_weight is not None and Lq == 0:
        problem.key_weight[...] = 0
    if B * Hq * Lq == 0:
        return
    dtype, kind = statistics_dtype(q.dtype), kind_of(q.dtype)
    kinds = kind, narrow.operand(kind, problem.bfloat16_products)
    first = (0,) * len(batch)
    lse = _rows(problem.lse, (B, Hq, Lq), dtype)
    if problem.key_weight is not None and not lse.size:
        lse = np.empty((B, Hq, Lq), dtype)
    arrays = Arrays(
        bits_of(q[first]), bits_of(k[first]), bits_of(v[first]),
        _NO_MASK if problem.mask is None else narrow.bytes_of(problem.mask[first]), bits_of(out[first]),
        lse, _rows(problem.max_score, (B, Hq, Lq), dtype), _rows(problem.entropy, (B, Hq, Lq), dtype),
        _base_2(problem.slopes, 2, dtype), _base_2(problem.sinks, 1, dtype),
        _NO_STATES if problem.block_mask is None else problem.block_mask.states,
        _nothing(1, np.dtype(np.uint32 if kinds[1] == PAIRS else dtype)),
    )  # fmt: skip
    strides = q.strides, k.strides, v.strides, launch.mask_strides(problem.mask, batch), out.strides
    offsets, table = launch.batch_offsets(batch, *strides), problem.intervals.table
    functions, alive = _functions(problem, dtype)
    call = Call(arrays, Sequences(offsets, table, _numbers(B)), functions, _settings(problem))

    operations = B * Hq * Lq * Lk * (D + Dv)
    workers = threads.count() if operations > SERIAL_WORK else 1
    whole = plan(B * Hq, Lq, Lk, D, Dv, dtype.itemsize, workers)
    few, many = _by_rows(problem, B, Lq, decode.most_rows(dtype.itemsize))
    for numbers, kernels in ((few, decode), (many, prefill)):
        if not len(numbers):
            continue
        some = call._replace(sequences=Sequences(offsets, table, numbers))
        of_kernels = kinds
        if kernels is decode:
            # Of elements as they are: reading them is what takes time.
            of_kernels = kind, COMPUTED[kind]
            some = some._replace(arrays=arrays._replace(operands=_nothing(1, dtype)))
            decode.run(some, of_kernels, _heads_alike(problem), operations)
        else:
            prefill.run(some, of_kernels, whole, workers, operations)
        if problem.key_weight is not None and Lk:
            weights = problem.key_weight.reshape(B, Hq, Lk)
            key_weight.run(some, of_kernels, weights, whole, workers, operations)
    del alive


@functools.lru_cache(maxsize=64)
def _numbers(B: int) -> np.ndarray:
    return np.arange(B)[:, None]


def _by_rows(problem: Problem, B: int, Lq: int, few: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of sequences with few query rows, and of the others: by their own rows, not those of the arrays.

    So a sequence is computed in the same way, to the same bits, alone and padded in a batch.
    """
    everyone, none = _numbers(B), _numbers(0)
    if Lq <= few:
        return everyone, none
    if not problem.intervals.padded:
        return none, everyone
    short = problem.intervals.table[:, 1] <= few
    return everyone[short], everyone[~short]


def _heads_alike(problem: Problem) -> bool:
    """Whether nothing but intervals of keys decides what a row attends to, and how: the same for all heads."""
    telling = ("mask", "block_mask", "slopes", "score_mod", "mask_mod", "dropout")
    return all(getattr(problem, name) is None for name in telling)


def _settings(problem: Problem) -> Settings:
    p, seed = problem.dropout or (0.0, 0)
    tile_rows, tile_keys = (0, 0) if problem.block_mask is None else problem.block_mask.block_size
    return Settings(
        left=problem.intervals.left,
        right=problem.intervals.right,
        scale=problem.scale,
        scale_2=problem.scale * LOG2_E,
        softcap=problem.softcap or 0.0,
        gain=1 / (1 - p),
        threshold=random.threshold(p),
        seed=seed - (seed >> 63 << 64),
        tile_rows=tile_rows,
        tile_keys=tile_keys,
        mask_kind=0 if problem.mask is None else narrow.MASKS.index(kind_of(problem.mask.dtype)),
    )


def _functions(problem: Problem, dtype: np.dtype) -> tuple[Functions, list[Any]]:
    """The user's functions as kernels take them, and what must live as long as they run."""
    block = None if problem.block_mask is None else problem.block_mask.mask_mod
    if problem.score_mod is None and problem.mask_mod is None and block is None:
        return _NO_FUNCTIONS, []
    passes = [
        None if function is None else make(function, dtype)
        for make, function in ((score_pass, problem.score_mod), (mask_pass, problem.mask_mod), (mask_pass, block))
    ]
    codes = np.array([0 if one is None else one.code[0] for one in passes], np.intp)
    captured = [_NO_FUNCTIONS.score if one is None else one.captured for one in passes]
    return Functions(codes, *captured), passes


_NO_FUNCTIONS = Functions(np.zeros(3, np.intp), *[np.zeros(1, np.int64)] * 3)
_NO_MASK = np.empty((0, 0, 0), np.uint8)


_NO_STATES = np.empty((0, 0, 0, 0), np.uint8)


@functools.cache
def _nothing(ndim: int, dtype: np.dtype) -> np.ndarray:
    return np.empty((0,) * ndim, dtype)


def _rows(x: np.ndarray | None, shape: tuple[int, int, int], dtype: np.dtype) -> np.ndarray:
    """One number a row, as (B, Hq, Lq); empty if there is none."""
    return _nothing(3, dtype) if x is None else x.reshape(shape)


def _base_2(x: np.ndarray | None, ndim: int, dtype: np.dtype) -> np.ndarray:
    """Numbers of the scale of scores, for scores in base 2."""
    return _nothing(ndim, dtype) if x is None else (x * LOG2_E).astype(dtype)


def warmup() -> list[str]:
    """Compile every kernel, or load it from the cache; returns their names."""
    names = []
    for kind, bfloat16_products in [(kind, kind == "bfloat16") for kind in COMPUTED] + [("f", True)]:
        kinds = kind, narrow.operand(kind, bfloat16_products)
        for module in (prefill, key_weight):
            names.append(_compile(module, *kinds))
    for kind, computed in COMPUTED.items():
        for module in (decode, key_weight):
            names.append(_compile(module, kind, computed))
    return names


def _compile(module: Any, *kinds: Any) -> str:
    for entry in (module.serial, module.parallel):
        entry(*kinds)
    return f"{module.__name__}, {kinds[0]}, products of {kinds[1]}"
