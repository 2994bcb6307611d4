"""From a `Problem` to the arrays, tables and numbers of a call as kernels take them."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import types
from numba.np.numpy_support import as_dtype

from numba_attn import random
from numba_attn.cpu import launch, narrow
from numba_attn.cpu.blocks import LOG2_E
from numba_attn.cpu.narrow import bits_of, kind_of
from numba_attn.cpu.score import Arrays, Call, Functions, Sequences, Settings
from numba_attn.cpu.user_functions import derivative_pass, mask_pass, score_pass
from numba_attn.kept import kept
from numba_attn.problem import Problem, Sizes, statistics_dtype


def call_of(problem: Problem, sizes: Sizes, operand: types.Type) -> tuple[Call, list[Any]]:
    """The call, and what must live as long as kernels run.

    Without norms of its own, there are some where the weights of keys need them.
    """
    dtype = statistics_dtype(problem.query.dtype)
    held = (problem.storage and problem.storage.numbers) or kind_of(problem.query.dtype)
    first, offsets = problem.first_sequence(), _offsets(problem, sizes.B)
    norms = problem.norms
    if problem.key_weight is not None and norms is None:
        norms = np.empty((sizes.B, sizes.Hq, sizes.Lq, 2), dtype)
    if norms is not None:
        offsets = offsets.copy()
        offsets[:, 9] = np.arange(sizes.B) * norms.strides[0]
    statistics = [nothing(2, dtype) if x is None else x for x in (first.lse, first.max_score, first.entropy)]
    arrays = Arrays(
        bits_of(first.query), held_of(first.key, held), held_of(first.value, held),
        NO_MASK if first.mask is None else narrow.bytes_of(first.mask), bits_of(first.out),
        *statistics, nothing(3, dtype) if norms is None else norms[0],  # type: ignore[call-arg]
        _base_2(problem.slopes, 2, dtype), _base_2(problem.sinks, 1, dtype),
        _NO_STATES if problem.block_mask is None else problem.block_mask.states,
        operands_of(operand),
    )  # fmt: skip
    pages = _NO_PAGES if problem.storage is None or problem.storage.pages is None else problem.storage.pages
    functions, alive = _functions(problem, dtype)
    sequences = Sequences(offsets, problem.intervals.table, numbers(sizes.B), pages)
    return Call(arrays, sequences, functions, _settings(problem, sizes)), alive


@functools.cache
def operands_of(operand: types.Type) -> np.ndarray:
    """The empty array that tells kernels what products are made of."""
    return nothing(1, as_dtype(operand))


def held_of(x: np.ndarray, held: str) -> np.ndarray:
    """Keys or values as kernels take them; quantised ones are bytes in the problem."""
    return x.view(np.int8) if held == "int8" else bits_of(x)


def _offsets(problem: Problem, B: int) -> np.ndarray:
    """(B, 10) int64: where in each array the sequences start, in bytes, but for norms; see `score.Sequences`."""
    if B == 1:
        return _ONLY_ONE
    results = problem.lse, problem.max_score, problem.entropy, problem.key_weight
    if problem.packed is not None:
        rows, keys = problem.packed.query_starts[:-1], problem.packed.key_starts[:-1]
        q, k, v, out = problem.query, problem.key, problem.value, problem.out
        columns = [rows * q.strides[1], keys * k.strides[1], keys * v.strides[1]]
        mask = launch.mask_strides(problem.mask, (len(rows),))
        columns += [np.arange(len(rows)) * mask[0], rows * out.strides[1]]
        columns += [(rows if x is not results[3] else keys) * (0 if x is None else x.strides[1]) for x in results]
        return np.stack([*columns, np.zeros_like(rows)], axis=1)
    batch = problem.query.shape[:-3]
    in_pages = problem.storage is not None and problem.storage.pages is not None
    held = (None, None) if in_pages else (problem.key, problem.value)  # in pages, every sequence starts at page 0
    none = (0,) * len(batch)
    of_sequences = problem.query, *held, None, problem.out, *results, None
    strides = [none if x is None else x.strides[: len(batch)] for x in of_sequences]
    strides[3] = launch.mask_strides(problem.mask, batch)
    return launch.batch_offsets(batch, *strides)


@kept
def numbers(B: int) -> np.ndarray:
    return np.arange(B)[:, None]


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
        for make, function in (
            (score_pass, problem.score_mod), (mask_pass, problem.mask_mod), (mask_pass, block),
            (derivative_pass, problem.score_mod_grad),
        )
    ]  # fmt: skip
    codes = np.array([0 if one is None else one.code[0] for one in passes], np.intp)
    captured = [_NO_FUNCTIONS.score if one is None else one.captured for one in passes]
    return Functions(codes, *captured), passes


_ONLY_ONE = np.zeros((1, 10), np.int64)
_NO_FUNCTIONS = Functions(np.zeros(4, np.intp), *[np.zeros(1, np.int64)] * 4)
NO_MASK = np.empty((0, 0, 0), np.uint8)
_NO_PAGES = np.zeros((1, 1), np.int64)
_NO_STATES = np.empty((0, 0, 0, 0), np.uint8)


@functools.cache
def nothing(ndim: int, dtype: np.dtype) -> np.ndarray:
    return np.empty((0,) * ndim, dtype)


def _base_2(x: np.ndarray | None, ndim: int, dtype: np.dtype) -> np.ndarray:
    """Numbers of the scale of scores, for scores in base 2."""
    return nothing(ndim, dtype) if x is None else (x * LOG2_E).astype(dtype)
