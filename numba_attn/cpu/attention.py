"""The forward pass of a `Problem`: which kernels compute it, cut in which way."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numba import types

from numba_attn import checks, threads
from numba_attn.cpu import decode, decode_weight, key_weight, narrow, target, workers
from numba_attn.cpu import forward as prefill
from numba_attn.cpu.call import NO_MASK, call_of, held_of, nothing, numbers, operands_of
from numba_attn.cpu.narrow import COMPUTED, bits_of, kind_of
from numba_attn.cpu.plan import plan
from numba_attn.cpu.score import Arrays, Call, Cutting, Run, Sequences
from numba_attn.problem import STATISTICS, Aux, Problem, Sizes, interval_table, statistics_dtype
from numba_attn.repeats import MakeRepeat, Repeat
from numba_attn.storage import QUANTIZED

OF_ONE_CALL = ("q", "k", "v", "mask", "out", *STATISTICS)  # the first of `Arrays`
MOST_REPEATED = 1024  # sequences of a call whose tables are kept: beside more, making them takes no time


class Step(NamedTuple):
    """A kernel, and what it is called with."""

    cut: Cutting
    sequences: Sequences
    arrays: Arrays


def forward(problem: Problem) -> MakeRepeat | None:
    """Compute `problem` and write its results; returns what tells how to do the same for other arrays."""
    sizes = problem.sizes
    if problem.key_weight is not None:
        problem.key_weight[...] = 0
    if sizes.B * sizes.Hq * sizes.Lq == 0:
        return None
    count = threads.count()
    steps, alive = _steps(problem, sizes, count)
    _take(steps)
    repeated = not alive and sizes.B <= MOST_REPEATED
    return functools.partial(_repeat, problem, steps, count) if repeated else None


def make_norms_alike(problem: Problem) -> None:
    """Write the norms of sequences with few rows again, by products in the order of those that gradients make.

    Where scores are large, what another order rounds differently would change their probabilities.  In other sequences
    every reference is 0.
    """
    sizes, norms, lengths = problem.sizes, problem.norms, problem.intervals.table[:, 1]
    assert norms is not None
    few, _ = _by_rows(problem, sizes.B, sizes.Lq, _most_rows(problem, _heads_alike(problem)))
    large = [b for b in few[:, 0].tolist() if norms[b, :, : lengths[b], 0].any()]
    if large:
        value, out = problem.value[..., :0], problem.out[..., :0]
        anew = replace(problem, value=value, out=out, lse=None, max_score=None, entropy=None, key_weight=None)
        steps, alive = _steps(anew, anew.sizes, threads.count(), np.array(large)[:, None])
        _take(steps)
        del alive


def _steps(
    problem: Problem, sizes: Sizes, threads_used: int, wanted: np.ndarray | None = None
) -> tuple[list[Step], list[Any]]:
    """What is to be done for a problem, and what must live until it is; for those `wanted`, as for many rows."""
    B, Hq, Hkv, Lq, Lk, D, Dv = sizes
    dtype, kind = statistics_dtype(problem.query.dtype), kind_of(problem.query.dtype)
    held = (problem.storage and problem.storage.numbers) or kind
    kinds = kind, narrow.operand(kind, problem.bfloat16_products), held
    call, alive = call_of(problem, sizes, kinds[1])

    mean_rows = Lq if problem.packed is None else -(-problem.query.shape[-2] // B)
    alike = _heads_alike(problem)
    whole = plan(B * Hq, Lq, Lk, D, Dv, dtype.itemsize, threads_used, mean_rows, Hkv, Hq // Hkv, alike)
    # Without values, probabilities are what is wanted: those of the second pass, by the same products, sum to 1.
    few, many = _by_rows(problem, B, Lq, _most_rows(problem, alike) if Dv else 0)
    if wanted is not None:
        few, many = numbers(0), wanted
    # Products of few rows with keys as they are in memory: reading them is what takes time.
    for_few = kind, decode.operand(kind, problem.bfloat16_products, held), held
    weights = problem.first_sequence().key_weight if problem.key_weight is not None and Lk else None
    steps: list[Step] = []

    def add(some: Call, cutting: Cutting) -> None:
        steps.append(Step(cutting, some.sequences, some.arrays))

    if len(few):
        some = _part(call, few, for_few[1])
        add(some, decode.prepared(some, for_few, alike, threads_used, weights))
        if weights is not None and Lq > 1:
            add(some, decode_weight.prepared(some, for_few, weights, alike, threads_used))
    if len(many):
        some = _part(call, many, kinds[1])
        add(some, prefill.prepared(some, kinds, whole, alike, threads_used))
        if weights is not None:
            add(some, key_weight.prepared(some, kinds, weights, whole, alike, threads_used))
    return steps, alive


def _part(call: Call, some: np.ndarray, operand: types.Type) -> Call:
    """A call for some of its sequences, and another operand."""
    operands = operands_of(operand)
    if len(some) < len(call.sequences.numbers):
        call = call._replace(sequences=call.sequences._replace(numbers=some))
    if operands is not call.arrays.operands:
        call = call._replace(arrays=call.arrays._replace(operands=operands))
    return call


def _take(steps: list[Step]) -> None:
    for cut, sequences, arrays in steps:
        cut(sequences)(arrays)


def _repeat(problem: Problem, steps: list[Step], threads_used: int) -> Repeat | None:
    """How to compute problems like one, of other arrays; not where as many threads are no longer to be used."""
    if any(x is not None for x in (problem.packed, problem.block_mask, problem.key_weight)):
        return None
    # Nothing of this problem's own, but slopes and sinks, which are those of all calls alike.
    kept = [(cut, sequences, arrays[len(OF_ONE_CALL) :]) for cut, sequences, arrays in steps]
    shape, dtype, layout = problem.result.shape, problem.result.dtype, problem.layout
    batch, sizes, axes = problem.query.shape[:-3], problem.sizes, problem.query.ndim
    cached = problem.storage is not None
    held = (problem.storage and problem.storage.numbers) or kind_of(dtype)
    names, computed = [name for name in STATISTICS if getattr(problem, name) is not None], statistics_dtype(dtype)
    absent = nothing(2, computed)

    def runs(**anew: np.ndarray) -> list[tuple[Run, tuple[Any, ...]]]:
        return [(cut(sequences._replace(**anew)), others) for cut, sequences, others in kept]

    same_runs: list[Any] | None = None  # not made before they are wanted: many a call has no other like it
    as_given = _as_kernels_take(problem.result.ndim, layout, dtype)
    as_given_numbers = _as_kernels_take(problem.result.ndim, layout, computed)

    def repeat(
        query: np.ndarray, key: Any, value: Any, offset: Any, lengths: Any, mask: np.ndarray | None, out: Any
    ) -> Any:
        nonlocal same_runs
        if threads.count() != threads_used or (out is not None and _is_met(out, query, key, value, mask)):
            return None
        if cached or lengths is not None or type(offset) is not int:
            anew = {"intervals": interval_table(batch, sizes.Lq, sizes.Lk, offset, None, lengths)}
            if cached and key.pages is not None:
                anew["pages"] = key.pages
            to_do = runs(**anew)
        else:
            to_do = same_runs = same_runs or runs()
        result = np.empty(shape, dtype) if out is None else out
        if cached:
            k, v = held_of(key.key[0], held), held_of(key.value[0], held)
        else:
            k, v = as_given(key), as_given(value)
        of_mask = NO_MASK if mask is None else narrow.bytes_of(mask[(None,) * (axes - mask.ndim)][(0,) * (axes - 3)])
        aux = {name: np.empty(shape[:-1], computed) for name in names}
        statistics = [as_given_numbers(aux[name][..., None])[..., 0] if name in aux else absent for name in STATISTICS]
        of_call = as_given(query), k, v, of_mask, as_given(result), *statistics
        for run, others in to_do:
            run(Arrays(*of_call, *others))
        return (result, Aux(**aux)) if names else result

    return repeat


def _is_met(out: np.ndarray, query: np.ndarray, key: Any, value: Any, mask: np.ndarray | None) -> bool:
    """Whether a result would be written over something that it is made of: an error then, see `Problem`."""
    held = (key.key, key.value) if value is None else (key, value)
    return any(checks.overlap(out, x) for x in (query, *held, mask) if x is not None)


def _as_kernels_take(ndim: int, layout: str, dtype: np.dtype) -> Callable[[np.ndarray], np.ndarray]:
    """From a caller's array, of so many axes, to the heads of the first sequence."""
    first = (0,) * (ndim - 3)
    if dtype.itemsize > 2:
        # Nothing but indexing: a small problem does not take much longer.
        if layout == "BHLD" or ndim == 2:
            return operator.itemgetter((None,) if ndim == 2 else first)
        return lambda x: x[first].swapaxes(0, 1)
    return lambda x: bits_of(checks.heads_first(x, layout)[first])


def _by_rows(problem: Problem, B: int, Lq: int, few: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of sequences with few query rows, and of the others: by their own rows, not those of the arrays.

    So a sequence is computed in the same way, to the same bits, alone and padded in a batch.
    """
    everyone, none = numbers(B), numbers(0)
    if Lq <= few:
        return everyone, none
    if not problem.intervals.padded and problem.packed is None:
        return none, everyone
    short = problem.intervals.table[:, 1] <= few
    return everyone[short], everyone[~short]


def _most_rows(problem: Problem, alike: bool) -> int:
    """Query rows of a head that are few, if those of heads that share keys can be in one block where `alike`."""
    alike = alike and (problem.storage is None or problem.storage.numbers not in QUANTIZED)
    alike = alike and problem.score_mod is None  # whose passes over rows of several heads take longer than is saved
    lanes = target.VECTOR_BYTES // statistics_dtype(problem.query.dtype).itemsize
    return decode.most_rows(lanes, problem.sizes.Hq // problem.sizes.Hkv if alike else 1)


def _heads_alike(problem: Problem) -> bool:
    """Whether rows of different heads can be treated as rows of one."""
    return (problem.block_mask is None or problem.block_mask.shape[1] == 1) and problem.dropout is None


def warmup() -> list[str]:
    """Compile every kernel, or load it from the cache; returns their names."""
    workers.launcher()
    names = []
    for kind, bfloat16_products in [(kind, kind == "bfloat16") for kind in COMPUTED] + [("f", True)]:
        for module in (prefill, key_weight):
            names.append(_compile(module, kind, narrow.operand(kind, bfloat16_products), kind))
    for kind in COMPUTED:
        products = decode.operand(kind, kind == "bfloat16", kind)
        for module in (decode, decode_weight):
            names.append(_compile(module, kind, products, kind))
    return names


def _compile(module: Any, *kinds: Any) -> str:
    module.entry(*kinds)
    return f"{module.__name__}, {kinds[0]}, products of {kinds[1]}"
