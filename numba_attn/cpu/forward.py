"""The forward pass: streaming softmax over key tiles, for blocks of query rows.

    s = scale * q.k (+ mask),   p = exp(s - m),   out = sum of p * v / sum of p,   lse = m + log(sum of p)

A task is a few row blocks of one head, which share each tile of keys while it is in cache.  The scores of a block and a
tile are exponentiated against the row's reference maximum m, which is raised, and what there is rescaled, only where a
score exceeds it by far.  How rows are cut into blocks and tasks, and who does them, changes no bit of a result.

Milakov and Gimelshein (2018) for the streaming softmax, Dao et al. (2022) for the tiling.
"""

from __future__ import annotations

import functools
import math
from collections import namedtuple
from typing import Any

import numpy as np
from numba import prange, types

from numba_attn import random, threads
from numba_attn.block_mask import EMPTY, FULL
from numba_attn.cpu import amx, dropout, key_weight, launch, narrow, pack, tiles
from numba_attn.cpu.jit import device, kernel, parallel_kernel, through_pointer
from numba_attn.cpu.narrow import COMPUTED, bits_of, kind_of
from numba_attn.cpu.plan import Plan, plan
from numba_attn.cpu.score import (
    ON_TILES,
    SCORE,
    Arrays,
    Functions,
    Sequences,
    Settings,
    Sizes,
    call_types,
    columns_of,
    copies_keys,
    element,
    head_of,
    is_narrow,
    is_plain,
    keys_of,
    matrix,
    score,
    select,
)
from numba_attn.cpu.simd import PAIRS, address, align_stack, as_bfloat16, as_element, fetch_add, holds_pairs, moved
from numba_attn.cpu.target import VECTOR_BYTES
from numba_attn.cpu.tiles import LOG2_E
from numba_attn.cpu.user_functions import mask_pass, score_pass
from numba_attn.cpu.visible import Matrix, visible
from numba_attn.problem import Problem, statistics_dtype

# Where things are in a worker's memory, in elements.
Memory = namedtuple(
    "Memory", "scores bias keys values clean zero top sums moments correction low high state qt_rows ot_rows state_size"
)
# The state of a row block, in memory: what it is made of, and what has come of it so far.
State = namedtuple("State", "qt ot reference total moment best")

# How the problem is cut, see plan.Plan.
Cut = namedtuple("Cut", "keys block blocks lanes")

LN_2 = math.log(2.0)
LANE_VECTORS = 7  # zero, top, sums, moments, correction, low, high: one value a lane
STATE_VECTORS = 4  # reference, total, moment, best
PACKED_ROWS = 192  # query rows of a task from which packing its tiles of values is worth it
SERIAL_WORK = 1 << 20  # multiply-adds that are done sooner than the threads are woken


# One task -------------------------------------------------------------------------------------------------------------


@device
def memory_map(sizes):
    # Rows and columns filled up to what tile registers hold, and room for a tile that begins anywhere.
    block, keys = sizes.block, (sizes.keys + 31) // 32 * 32
    qt_rows, ot_rows = (sizes.D + 15) // 16 * 16, (sizes.Dv + 15) // 16 * 16
    copied = 2 * keys * block
    values = copied + (keys + 32) * qt_rows
    clean = values + keys * ot_rows + 32
    lanes = clean + keys * ot_rows // 2 + 32
    return Memory(
        scores=0,
        bias=keys * block,
        keys=copied,
        values=values,
        clean=clean,
        zero=lanes,
        top=lanes + block,
        sums=lanes + 2 * block,
        moments=lanes + 3 * block,
        correction=lanes + 4 * block,
        low=lanes + 5 * block,
        high=lanes + 6 * block,
        state=lanes + LANE_VECTORS * block,
        qt_rows=qt_rows,
        ot_rows=ot_rows,
        state_size=(qt_rows + ot_rows + STATE_VECTORS) * block,
    )


@device
def state_of(memory, at, sizes, operands, i):
    """The state of row block i of a task."""
    block = sizes.block
    start = at.state + i * at.state_size
    lanes = start + (at.qt_rows + at.ot_rows) * block
    return State(
        qt=as_element(element(memory, start), operands),
        ot=element(memory, start + at.qt_rows * block),
        reference=element(memory, lanes),
        total=element(memory, lanes + block),
        moment=element(memory, lanes + 2 * block),
        best=element(memory, lanes + 3 * block),
    )


@device
def attend(head, first, end, sizes, settings, operands, weighted, memory, careful):
    """Stream the keys past the rows [first, end): leaves the state of each row block in memory.

    `weighted` is whether the moment, for the entropy, is wanted.
    """
    D, Dv, keys, block, lanes = sizes
    q, k, v = head.q, head.k, head.v
    at = memory_map(sizes)
    scores = element(memory, at.scores)
    copied = as_element(element(memory, at.keys), operands)
    values = as_element(element(memory, at.values), operands)
    clean = as_element(element(memory, at.clean), operands)
    pairs, copying = holds_pairs(address(operands)), copies_keys(k, D, operands)
    packing = end - first >= PACKED_ROWS or is_narrow(v) or pairs
    top, sums, moments = element(memory, at.top), element(memory, at.sums), element(memory, at.moments)
    correction = element(memory, at.correction)
    nothing, lowest = memory.dtype.type(0), memory.dtype.type(-math.inf)
    plain = is_plain(head, settings) and not weighted and not (pairs and settings.threshold != 0)
    pack.fill_lanes(element(memory, at.zero), nothing, block // lanes)

    blocks = (end - first + block - 1) // block
    for i in range(blocks):
        row = first + i * block
        rows = min(block, end - row)
        width = (rows + lanes - 1) // lanes
        state = state_of(memory, at, sizes, operands, i)
        if pairs:
            pack.fill_lanes(state.qt, nothing, columns_of(D, operands) // 2 * width)
        pack.transpose(width, moved(q.data, row * q.row), q.row, q.step, rows, D, state.qt)
        pack.fill_lanes(state.ot, nothing, Dv * width)
        pack.fill_lanes(state.reference, lowest, width)
        pack.fill_lanes(state.total, nothing, width)
        pack.fill_lanes(state.moment, nothing, width)
        pack.fill_lanes(state.best, lowest, width)

    ready = 0  # bit i: every row of block i has met a key
    rising = 0  # bit i: scores of block i have exceeded their reference by more than the headroom
    task_low, task_high, _, _ = visible(first, end, head.position)
    for tile in range(task_low // keys * keys, task_high, keys):
        tile_low, tile_high = max(tile, task_low), min(tile + keys, task_high)
        if pairs:
            tile_low -= (tile_low - tile) % 2
        vectors, packed = (tile_high - tile_low + 31) // 32 * 32 // lanes, False
        for i in range(blocks):
            row = first + i * block
            rows = min(block, end - row)
            here = select(head, settings, row, rows, tile, tile + keys, pairs, sizes, memory, at)
            if here.kept == EMPTY:
                continue
            start, n = here.start, here.stop - here.start
            width = (rows + lanes - 1) // lanes
            state = state_of(memory, at, sizes, operands, i)

            if not packed:
                if copying:
                    k_low = moved(k.data, tile_low * k.row)
                    pack.copy_rows(k_low, k.row, k.step, tile_high - tile_low, D, columns_of(D, operands), copied)
                v_low = moved(v.data, tile_low * v.row)
                if pairs and ON_TILES:
                    columns = as_bfloat16(values)
                    pack.transpose(vectors, v_low, v.row, v.step, tile_high - tile_low, Dv, columns)
                elif pairs:
                    pack.pair_rows(v_low, v.row, v.step, tile_high - tile_low, Dv, values)
                elif packing:
                    pack.transpose(vectors, v_low, v.row, v.step, tile_high - tile_low, Dv, values)
                packed = True
            k_tile = keys_of(k, start, tile_low, copied, D, operands)
            v_tile = Matrix(as_element(moved(v.data, start * v.row), operands), v.row, v.step)
            if pairs and ON_TILES:
                v_tile = Matrix(moved(values, (start - tile_low) * 2), 2, vectors * lanes * 2)
            elif pairs:
                size = operands.itemsize
                v_tile = Matrix(moved(values, (start - tile_low) // 2 * Dv * size), Dv * size, size)
            elif packing:
                size = operands.itemsize
                v_tile = Matrix(moved(values, (start - tile_low) * size), size, vectors * lanes * size)

            done = fused = False
            if plain and here.kept == FULL and ready >> i & 1:
                done = fused = tiles.probabilities(
                    width, k_tile.data, k_tile.row, k_tile.step, n, D, state.qt, settings.scale_2,
                    state.reference, state.total, sums, top, scores,
                )  # fmt: skip
            # Scores that have risen once, as with ALiBi towards the diagonal, are expected to go on.  With a score_mod,
            # what is added has been used up when a tile turns out to be one to do again.
            raising = not ready >> i & 1 or rising >> i & 1 or head.functions.codes[SCORE] != 0
            while not done:
                unit = score(head, k_tile, settings, here, row, rows, sizes, state.qt, scores, memory, at)
                if raising:
                    tiles.highest(width, scores, n, unit, here.added, here.row, state.reference, top)
                    changes = tiles.raise_reference(width, top, state.reference, state.total, state.moment, correction)
                    if changes & 1:
                        tiles.rescale(width, state.ot, Dv, correction)
                    if not changes & 2:
                        ready |= 1 << i
                if weighted:
                    done = tiles.exponentiate_weighted(
                        width, scores, n, unit, here.added, here.row,
                        state.reference, state.total, sums, top, state.moment, moments, raising,
                    )  # fmt: skip
                else:
                    done = tiles.exponentiate(
                        width, scores, n, unit, here.added, here.row,
                        state.reference, state.total, sums, top, state.moment, moments, raising,
                    )  # fmt: skip
                if not done:
                    rising |= 1 << i
                    raising = True
            tiles.follow(width, state.best, top, state.reference)
            if settings.threshold != 0:
                dropout.drop(width, scores, n, settings.threshold, settings.seed, head.b, head.h, row, start)
            if not fused:
                tiles.pair_up(width, scores, n, k_tile.data)
            if careful:
                tiles.accumulate_carefully(width, v_tile.data, v_tile.row, v_tile.step, Dv, n, scores, state.ot, clean)
            else:
                tiles.accumulate(width, v_tile.data, v_tile.row, v_tile.step, Dv, n, scores, state.ot)


@device
def include_sink(sink, first, end, sizes, operands, memory):
    """Add a sink, a logit in base 2, to the states of the rows [first, end)."""
    at = memory_map(sizes)
    top, correction = element(memory, at.top), element(memory, at.correction)
    for i in range((end - first + sizes.block - 1) // sizes.block):
        rows = min(sizes.block, end - first - i * sizes.block)
        width = (rows + sizes.lanes - 1) // sizes.lanes
        state = state_of(memory, at, sizes, operands, i)
        tiles.challenge(width, sink, state.reference, top)
        if tiles.raise_reference(width, top, state.reference, state.total, state.moment, correction) & 1:
            tiles.rescale(width, state.ot, sizes.Dv, correction)
        tiles.add_sink(width, sink, state.reference, state.total, state.moment)


@device
def finish(out, lse, max_score, entropy, first, end, sizes, operands, gain, memory):
    """Normalise and write the rows [first, end), and of (Lq,) lse, max_score and entropy what is not empty.

    Returns whether every result is finite.
    """
    Dv, block, lanes = sizes.Dv, sizes.block, sizes.lanes
    at = memory_map(sizes)
    finite = True
    for i in range((end - first + block - 1) // block):
        row = first + i * block
        rows = min(block, end - row)
        width = (rows + lanes - 1) // lanes
        state = state_of(memory, at, sizes, operands, i)
        tiles.normalise(width, state.ot, Dv, state.total, gain, element(memory, at.top))
        pack.write_rows(width, state.ot, Dv, moved(out.data, row * out.row), out.row, out.step, rows)
        lane_0 = at.state + i * at.state_size + (at.qt_rows + at.ot_rows) * block
        for lane in range(rows):
            if memory[at.top + lane] != 0:
                finite = False
            reference, total = memory[lane_0 + lane], memory[lane_0 + block + lane]
            empty = total == 0
            if lse.size:
                lse[row + lane] = -math.inf if empty else (reference + math.log2(total)) * LN_2
            if max_score.size:
                best = memory[lane_0 + 3 * block + lane]
                max_score[row + lane] = best * LN_2 if total == total else total
            if entropy.size:
                moment = memory[lane_0 + 2 * block + lane]
                entropy[row + lane] = 0 if empty else (math.log2(total) - moment / total) * LN_2
    return finite


@device
def of_head(rows, b, h):
    return rows[b, h] if rows.size else rows[0, 0]


@device
def fill_rows(rows, first, end, value):
    if rows.size:
        for row in range(first, end):
            rows[row] = value


@kernel
def work(memory, worker, next_task, arrays, sequences, functions, settings, cut):
    """Do tasks until there are none: the rows of a head from the last to the first, as causal ones have most to do."""
    align_stack()
    on_tiles = ON_TILES and holds_pairs(address(arrays.operands))
    if on_tiles:
        amx.configure(address(memory))
    (Hq, Lq, D), Dv = arrays.q.shape, arrays.v.shape[2]
    sizes = Sizes(D, Dv, cut.keys, cut.block, cut.lanes)
    per_task = cut.blocks * cut.block
    per_head = (Lq + per_task - 1) // per_task
    tasks = sequences.offsets.shape[0] * Hq * per_head
    # Each worker has a range of tasks, so that few heads pass through its caches, and helps the others when it is done.
    workers, helped = next_task.shape[0], 0
    while helped < workers:
        owner = (worker + helped) % workers
        task = tasks * owner // workers + fetch_add(next_task, owner)
        if task >= tasks * (owner + 1) // workers:
            helped += 1
            continue
        b, h = task // per_head // Hq, task // per_head % Hq
        first = (per_head - 1 - task % per_head) * per_task
        end = min(first + per_task, Lq)
        valid = max(first, min(end, sequences.intervals[b, 1]))
        head = head_of(arrays, sequences, functions, settings, b, h, memory.dtype.type(0))
        out_head = matrix(arrays.out, sequences.offsets[b, 4], h)
        lse, max_score, entropy = (
            of_head(arrays.lse, b, h),
            of_head(arrays.max_score, b, h),
            of_head(arrays.entropy, b, h),
        )
        careful = False
        while valid > first:
            attend(head, first, valid, sizes, settings, arrays.operands, entropy.size > 0, memory, careful)
            if arrays.sinks.size:
                include_sink(arrays.sinks[h], first, valid, sizes, arrays.operands, memory)
            finite = finish(
                out_head, lse, max_score, entropy, first, valid, sizes, arrays.operands, settings.gain, memory
            )
            if finite or careful:
                break
            # Either something attended to is not finite, or a masked value met a zero probability: the careful form
            # tells them apart.
            careful = True
        if valid < end:
            padding = moved(out_head.data, valid * out_head.row)
            pack.fill(padding, out_head.row, out_head.step, end - valid, Dv, memory.dtype.type(0))
            fill_rows(lse, valid, end, arrays.sinks[h] * LN_2 if arrays.sinks.size else -math.inf)
            fill_rows(max_score, valid, end, -math.inf)
            fill_rows(entropy, valid, end, 0.0)
    if on_tiles:
        amx.release(address(memory))


work_through_pointer = through_pointer(work.py_func)


@parallel_kernel
def work_together(code, memory, next_task, arrays, sequences, functions, settings, cut):
    """`work`, whose machine code is at `code`, by as many workers as there are rows of memory."""
    for worker in prange(memory.shape[0]):
        work_through_pointer(code, memory[worker], worker, next_task, arrays, sequences, functions, settings, cut)


# From Python ----------------------------------------------------------------------------------------------------------


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
    operand = narrow.operand(kind, problem.bfloat16_products)
    first = (0,) * len(batch)
    mask = _NO_MASK if problem.mask is None else narrow.bytes_of(problem.mask[first])
    workers = threads.count() if B * Hq * Lq * Lk * (D + Dv) > SERIAL_WORK else 1
    lse = _rows(problem.lse, (B, Hq, Lq), dtype)
    if problem.key_weight is not None and not lse.size:
        lse = np.empty((B, Hq, Lq), dtype)
    arrays = Arrays(
        bits_of(q[first]), bits_of(k[first]), bits_of(v[first]), mask, bits_of(out[first]),
        lse, _rows(problem.max_score, (B, Hq, Lq), dtype), _rows(problem.entropy, (B, Hq, Lq), dtype),
        _base_2(problem.slopes, 2, dtype), _base_2(problem.sinks, 1, dtype),
        _NO_STATES if problem.block_mask is None else problem.block_mask.states,
        _nothing(1, np.dtype(np.uint32 if operand == PAIRS else dtype)),
    )  # fmt: skip
    strides = q.strides, k.strides, v.strides, launch.mask_strides(problem.mask, batch), out.strides
    sequences = Sequences(launch.batch_offsets(batch, *strides), problem.intervals.table)
    functions, alive = _functions(problem, dtype)
    call = arrays, sequences, functions, _settings(problem)

    whole, lanes = plan(B * Hq, Lq, D, Dv, dtype.itemsize, workers), VECTOR_BYTES // dtype.itemsize
    cut = Cut(whole.keys, whole.block, whole.blocks, lanes)
    size = _memory_size(whole, D, Dv, lanes)
    kinds = kind, operand
    launch.run(_serial, _parallel, kinds, min(workers, B * Hq * whole.tasks), size, dtype, *call, cut)
    if problem.key_weight is not None and Lk:
        keys = key_weight.cut_keys(B * Hq, Lk, whole.keys, whole.block, workers, dtype.itemsize)
        weights = problem.key_weight.reshape(B, Hq, Lk)
        size = key_weight.memory_size(keys, D)
        launch.run(key_weight.serial, key_weight.parallel, kinds, workers, size, dtype, weights, *call, keys)
    del alive


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


@functools.lru_cache(maxsize=256)
def _memory_size(cut: Plan, D: int, Dv: int, lanes: int) -> int:
    """Elements of a worker's memory."""
    at = memory_map.py_func(Sizes(D, Dv, cut.keys, cut.block, lanes))
    return -(-(at.state + cut.blocks * at.state_size) // 16) * 16  # whole cache lines, so that workers do not share one


def _signature(kind: str, operand: types.Type) -> tuple[types.Type, ...]:
    """Of `work`, for a kind of element and an operand, see `narrow`."""
    return (
        types.Array(COMPUTED[kind], 1, "C"),
        types.int64,
        types.Array(types.int64, 2, "C"),
        *call_types(kind, operand),
        types.NamedUniTuple(types.int64, 4, Cut),
    )


_serial, _parallel = launch.entries(work, work_together, _signature)


def warmup() -> list[str]:
    """Compile every kernel, or load it from the cache; returns their names."""
    names = []
    for kind, bfloat16_products in [(kind, kind == "bfloat16") for kind in COMPUTED] + [("f", True)]:
        operand = narrow.operand(kind, bfloat16_products)
        entries = {
            "forward._serial": _serial,
            "forward._parallel": _parallel,
            "key_weight.serial": key_weight.serial,
            "key_weight.parallel": key_weight.parallel,
        }
        for name, compile_one in entries.items():
            compile_one(kind, operand)
            names.append(f"numba_attn.cpu.{name}, {kind}, products of {operand}")
    return names
