"""From a `Problem` to the kernels that compute it: the arrays, tables and numbers of a call as they take them."""

from __future__ import annotations

import functools
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
from numba_attn.problem import Problem, Sizes, statistics_dtype

SERIAL_WORK = 1 << 20  # multiply-adds that are done sooner than the threads are woken


def forward(problem: Problem) -> None:
    """Compute `problem` and write its results."""
    B, Hq, _, Lq, Lk, D, Dv = sizes = problem.sizes
    if problem.key_weight is not None and Lq == 0:
        problem.key_weight[...] = 0
    if B * Hq * Lq == 0:
        return
    dtype, kind = statistics_dtype(problem.query.dtype), kind_of(problem.query.dtype)
    held = (problem.storage and problem.storage.numbers) or kind
    kinds = kind, narrow.operand(kind, problem.bfloat16_products), held
    first, offsets = problem.first_sequence(), _offsets(problem)
    lse = first.lse
    if problem.key_weight is not None and lse is None:
        offsets = offsets.copy()
        offsets[:, 5] = np.arange(B) * (Hq * Lq * dtype.itemsize)
        every_lse = np.empty((B, Hq, Lq), dtype)
        lse = every_lse[0]
    statistics = [_nothing(2, dtype) if x is None else x for x in (lse, first.max_score, first.entropy)]
    arrays = Arrays(
        bits_of(first.query), _held(first.key, held), _held(first.value, held),
        _NO_MASK if first.mask is None else narrow.bytes_of(first.mask), bits_of(first.out),
        *statistics,  # type: ignore[call-arg]
        _base_2(problem.slopes, 2, dtype), _base_2(problem.sinks, 1, dtype),
        _NO_STATES if problem.block_mask is None else problem.block_mask.states,
        _nothing(1, np.dtype(np.uint32 if kinds[1] == PAIRS else dtype)),
    )  # fmt: skip
    pages = _NO_PAGES if problem.storage is None or problem.storage.pages is None else problem.storage.pages
    table = problem.intervals.table
    functions, alive = _functions(problem, dtype)
    call = Call(arrays, Sequences(offsets, table, _numbers(B), pages), functions, _settings(problem, sizes))

    operations = _pairs(problem, sizes) * Hq * (D + Dv)
    workers = threads.count() if operations > SERIAL_WORK else 1
    mean_rows = Lq if problem.packed is None else -(-problem.query.shape[-2] // B)
    whole = plan(B * Hq, Lq, Lk, D, Dv, dtype.itemsize, workers, mean_rows)
    few, many = _by_rows(problem, B, Lq, decode.most_rows(dtype.itemsize))
    for numbers, kernels in ((few, decode), (many, prefill)):
        if not len(numbers):
            continue
        some = call._replace(sequences=call.sequences._replace(numbers=numbers))
        of_kernels = kinds
        if kernels is decode:
            # Of elements as they are: reading them is what takes time.
            of_kernels = kind, COMPUTED[kind], held
            some = some._replace(arrays=arrays._replace(operands=_nothing(1, dtype)))
            decode.run(some, of_kernels, _heads_alike(problem), operations)
        else:
            prefill.run(some, of_kernels, whole, workers, operations)
        if first.key_weight is not None and Lk:
            key_weight.run(some, of_kernels, first.key_weight, whole, workers, operations)
    del alive


def _held(x: np.ndarray, held: str) -> np.ndarray:
    """Keys or values as kernels take them; quantised ones are bytes in the problem."""
    return x.view(np.int8) if held == "int8" else bits_of(x)


def _offsets(problem: Problem) -> np.ndarray:
    """(B, 9) int64: where in each array the sequences start, in bytes; see `score.Sequences`."""
    results = problem.lse, problem.max_score, problem.entropy, problem.key_weight
    if problem.packed is not None:
        rows, keys = problem.packed.query_starts[:-1], problem.packed.key_starts[:-1]
        q, k, v, out = problem.query, problem.key, problem.value, problem.out
        columns = [rows * q.strides[1], keys * k.strides[1], keys * v.strides[1]]
        mask = launch.mask_strides(problem.mask, (len(rows),))
        columns += [np.arange(len(rows)) * mask[0], rows * out.strides[1]]
        columns += [(rows if x is not results[3] else keys) * (0 if x is None else x.strides[1]) for x in results]
        return np.stack(columns, axis=1)
    batch = problem.query.shape[:-3]
    in_pages = problem.storage is not None and problem.storage.pages is not None
    held = (None, None) if in_pages else (problem.key, problem.value)  # in pages, every sequence starts at page 0
    none = (0,) * len(batch)
    strides = [
        none if x is None else x.strides[: len(batch)] for x in (problem.query, *held, None, problem.out, *results)
    ]
    strides[3] = launch.mask_strides(problem.mask, batch)
    return launch.batch_offsets(batch, *strides)


def _pairs(problem: Problem, sizes: Sizes) -> float:
    """Queries x keys, of all sequences."""
    if problem.packed is None:
        return sizes.B * sizes.Lq * sizes.Lk
    return float(np.dot(np.diff(problem.packed.query_starts), np.diff(problem.packed.key_starts)))


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
    if not problem.intervals.padded and problem.packed is None:
        return none, everyone
    short = problem.intervals.table[:, 1] <= few
    return everyone[short], everyone[~short]


def _heads_alike(problem: Problem) -> bool:
    """Whether nothing but intervals of keys decides what a row attends to, and how: the same for all heads."""
    telling = ("mask", "block_mask", "slopes", "score_mod", "mask_mod", "dropout")
    return all(getattr(problem, name) is None for name in telling)


def _settings(problem: Problem, sizes: Sizes) -> Settings:
    p, seed = problem.dropout or (0.0, 0)
    paged = problem.storage if problem.storage is not None and problem.storage.pages is not None else None
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
        packed=int(problem.packed is not None),
        page_rows=0 if paged is None else paged.key.shape[2],
        page_k=0 if paged is None else paged.key.strides[0],
        page_v=0 if paged is None else paged.value.strides[0],
        Lq=sizes.Lq,
        Lk=sizes.Lk,
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
_NO_PAGES = np.zeros((1, 1), np.int64)
_NO_STATES = np.empty((0, 0, 0, 0), np.uint8)


@functools.cache
def _nothing(ndim: int, dtype: np.dtype) -> np.ndarray:
    return np.empty((0,) * ndim, dtype)


def _base_2(x: np.ndarray | None, ndim: int, dtype: np.dtype) -> np.ndarray:
    """Numbers of the scale of scores, for scores in base 2."""
    return _nothing(ndim, dtype) if x is None else (x * LOG2_E).astype(dtype)


def warmup() -> list[str]:
    """Compile every kernel, or load it from the cache; returns their names."""
    names = []
    for kind, bfloat16_products in [(kind, kind == "bfloat16") for kind in COMPUTED] + [("f", True)]:
        for module in (prefill, key_weight):
            names.append(_compile(module, kind, narrow.operand(kind, bfloat16_products), kind))
    for kind, computed in COMPUTED.items():
        for module in (decode, key_weight):
            names.append(_compile(module, kind, computed, kind))
    return names


def _compile(module: Any, *kinds: Any) -> str:
    for entry in (module.serial, module.parallel):
        entry(*kinds)
    return f"{module.__name__}, {kinds[0]}, products of {kinds[1]}"
