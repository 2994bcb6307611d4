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
import threading
from collections import namedtuple

import numpy as np
from numba import prange, types
from numba.np.numpy_support import from_dtype

from numba_attn import threads
from numba_attn.cpu import mask_tiles, pack, tiles
from numba_attn.cpu.jit import Compiled, compiled, device, kernel, parallel_kernel, through_pointer
from numba_attn.cpu.mask_tiles import EMPTY, FULL, PARTIAL, TRIM
from numba_attn.cpu.plan import Plan, plan
from numba_attn.cpu.simd import address, align_stack, fetch_add, moved, pointee_bytes, points_to_boolean
from numba_attn.cpu.target import VECTOR_BYTES
from numba_attn.cpu.tiles import LOG2_E
from numba_attn.problem import AUX_NAMES, Problem

# A matrix in memory: the address of its first element, the bytes from row to row and from column to column.
Matrix = namedtuple("Matrix", "data row step")
# Where the rows of a sequence stand on its keys, see masks.KeyIntervals.
Position = namedtuple("Position", "offset kv_length left right")
# Head sizes, keys of a key tile, query rows of a row block, lanes of a vector.
Sizes = namedtuple("Sizes", "D Dv keys block lanes")
# Where things are in a worker's memory, in elements.
Memory = namedtuple("Memory", "scores bias values zero top sums correction low high state state_size")

LN_2 = math.log(2.0)
LANE_VECTORS = 6  # zero, top, sums, correction, low, high: one value a lane
MOST_KEPT = 1 << 26  # bytes of working memory that a thread keeps between calls
PACKED_ROWS = 192  # query rows of a task from which packing its tiles of values is worth it
SERIAL_WORK = 1 << 20  # multiply-adds that are done sooner than the threads are woken


# One task -------------------------------------------------------------------------------------------------------------


@device
def memory_map(sizes):
    block, tile = sizes.block, sizes.keys * sizes.block
    values = (sizes.keys + sizes.lanes - 1) // sizes.lanes * sizes.lanes * sizes.Dv
    lanes = 2 * tile + values
    return Memory(
        scores=0,
        bias=tile,
        values=2 * tile,
        zero=lanes,
        top=lanes + block,
        sums=lanes + 2 * block,
        correction=lanes + 3 * block,
        low=lanes + 4 * block,
        high=lanes + 5 * block,
        state=lanes + LANE_VECTORS * block,
        state_size=(sizes.D + sizes.Dv + 2) * block,
    )


@device
def visible(first, end, position):
    """The keys that some, and that every one, of the rows [first, end) may attend to."""
    start, last = first + position.offset, end - 1 + position.offset
    some_low = max(0, start - position.left)
    some_high = min(position.kv_length, last + position.right + 1)
    every_low = max(0, last - position.left)
    every_high = min(position.kv_length, start + position.right + 1)
    return some_low, some_high, every_low, every_high


@device
def element(memory, index):
    return moved(address(memory), index * memory.itemsize)


@device
def glance(mask, rows, n):
    """What a boolean mask with contiguous keys leaves of a tile; PARTIAL, which says nothing, for any other."""
    if mask.step != pointee_bytes(mask.data) or not points_to_boolean(mask.data):
        return PARTIAL
    true, seen = 0, rows if mask.row != 0 else 1
    for i in range(seen):
        true += mask_tiles.count_true(moved(mask.data, i * mask.row), n)
        if 0 < true < (i + 1) * n:
            return PARTIAL
    return FULL if true else EMPTY


@device
def none_true(mask, rows, first):
    """Whether a boolean mask with contiguous keys, and no other, excludes the TRIM keys from `first` for all rows."""
    if mask.step != pointee_bytes(mask.data) or not points_to_boolean(mask.data):
        return False
    return not mask_tiles.any_true(moved(mask.data, first), mask.row, rows if mask.row != 0 else 1)


@device
def mask_tile(mask, rows, n, width, lanes, bias):
    """Write what the mask adds to a tile of scores to `bias`; what it leaves of the tile."""
    if mask.row == 0:
        mask_tiles.mask_keys(width, bias, mask.data, mask.step, n)
    else:
        whole = n // lanes * lanes if mask.step == pointee_bytes(mask.data) else 0
        mask_tiles.mask_rows(width, bias, mask.data, mask.row, rows, whole)
        mask_tiles.mask_elements(width, bias, mask.data, mask.row, mask.step, rows, whole, n)
    # One key tells most often: only where it does not, all are looked at.
    kept = mask_tiles.classify(width, bias, 1)
    return kept if kept == PARTIAL else mask_tiles.classify(width, bias, n)


@device
def attend(q, k, v, mask, masked, position, first, end, sizes, scale, memory, careful):
    """Stream the keys past the rows [first, end): leaves Ot, reference and total of each row block in memory."""
    D, Dv, keys, block, lanes = sizes
    at = memory_map(sizes)
    scores, bias, zero = element(memory, at.scores), element(memory, at.bias), element(memory, at.zero)
    values, packing = element(memory, at.values), end - first >= PACKED_ROWS
    top, sums, correction = element(memory, at.top), element(memory, at.sums), element(memory, at.correction)
    low, high = element(memory, at.low), element(memory, at.high)
    nothing = memory.dtype.type(0)
    pack.fill_lanes(zero, nothing, block // lanes)

    blocks = (end - first + block - 1) // block
    for i in range(blocks):
        row = first + i * block
        rows = min(block, end - row)
        width = (rows + lanes - 1) // lanes
        state = at.state + i * at.state_size
        q_rows = moved(q.data, row * q.row)
        pack.transpose(width, q_rows, q.row, q.step, rows, D, element(memory, state))
        pack.fill_lanes(element(memory, state + D * block), nothing, Dv * width)
        pack.fill_lanes(element(memory, state + (D + Dv) * block), memory.dtype.type(-math.inf), width)
        pack.fill_lanes(element(memory, state + (D + Dv + 1) * block), nothing, width)

    ready = 0  # bit i: every row of block i has met a key
    task_low, task_high, _, _ = visible(first, end, position)
    for tile in range(task_low // keys * keys, task_high, keys):
        tile_low, tile_high = max(tile, task_low), min(tile + keys, task_high)
        vectors, packed = (tile_high - tile_low + lanes - 1) // lanes, False
        for i in range(blocks):
            row = first + i * block
            rows = min(block, end - row)
            some_low, some_high, every_low, every_high = visible(row, row + rows, position)
            start, stop = max(tile, some_low), min(tile + keys, some_high)
            n = stop - start
            if n <= 0:
                continue
            width = (rows + lanes - 1) // lanes
            row_bytes = width * lanes * memory.itemsize
            state = at.state + i * at.state_size
            qt, ot = element(memory, state), element(memory, state + D * block)
            reference = element(memory, state + (D + Dv) * block)
            total = element(memory, state + (D + Dv + 1) * block)

            added, added_row, kept = zero, 0, FULL
            if masked:
                here = Matrix(moved(mask.data, row * mask.row + start * mask.step), mask.row, mask.step)
                kept = glance(here, rows, n)
                if kept == PARTIAL:
                    while n > TRIM and none_true(here, rows, n - TRIM):
                        n -= TRIM
                    while n > TRIM and none_true(here, rows, 0):
                        start, n = start + TRIM, n - TRIM
                        here = Matrix(moved(here.data, TRIM * mask.step), mask.row, mask.step)
                    stop = start + n
                    kept = mask_tile(here, rows, n, width, lanes, bias)
                if kept == EMPTY:
                    continue
                if kept == PARTIAL:
                    added, added_row = bias, row_bytes
            if start < every_low or stop > every_high:
                for lane in range(width * lanes):
                    p = row + min(lane, rows - 1) + position.offset
                    memory[at.low + lane] = max(p - position.left, start) - start
                    memory[at.high + lane] = max(min(p + position.right + 1, stop), start) - start
                mask_tiles.mask_outside(width, bias, added, added_row, n, low, high)
                added, added_row, kept = bias, row_bytes, PARTIAL

            k_tile, v_tile = moved(k.data, start * k.row), Matrix(moved(v.data, start * v.row), v.row, v.step)
            if packing:
                if not packed:
                    v_low = moved(v.data, tile_low * v.row)
                    pack.transpose(vectors, v_low, v.row, v.step, tile_high - tile_low, Dv, values)
                    packed = True
                size = memory.itemsize
                v_tile = Matrix(moved(values, (start - tile_low) * size), size, vectors * lanes * size)
            done = False
            if kept == FULL and ready >> i & 1:
                done = tiles.probabilities(
                    width, k_tile, k.row, k.step, n, D, qt, scale, reference, total, sums, top, scores
                )
            if not done:
                tiles.scores(width, k_tile, k.row, k.step, n, D, qt, scale, added, added_row, reference, scores, top)
                changes = tiles.raise_reference(width, top, reference, total, correction)
                if changes & 1:
                    tiles.rescale(width, ot, Dv, correction)
                if not changes & 2:
                    ready |= 1 << i
                tiles.exponentiate(width, scores, n, scale, added, added_row, reference, total)
            if careful:
                tiles.accumulate_carefully(width, v_tile.data, v_tile.row, v_tile.step, Dv, n, scores, ot)
            else:
                tiles.accumulate(width, v_tile.data, v_tile.row, v_tile.step, Dv, n, scores, ot)


@device
def finish(out, lse, first, end, sizes, memory):
    """Normalise and write the rows [first, end), lse (Lq,) where it is not empty; whether every result is finite."""
    D, Dv, _, block, lanes = sizes
    at = memory_map(sizes)
    finite = True
    for i in range((end - first + block - 1) // block):
        row = first + i * block
        rows = min(block, end - row)
        width = (rows + lanes - 1) // lanes
        state = at.state + i * at.state_size
        total = state + (D + Dv + 1) * block
        ot = element(memory, state + D * block)
        tiles.normalise(width, ot, Dv, element(memory, total), element(memory, at.top))
        pack.write_rows(width, ot, Dv, moved(out.data, row * out.row), out.row, out.step, rows)
        for lane in range(rows):
            if memory[at.top + lane] != 0:
                finite = False
        if lse.size:
            for lane in range(rows):
                reference, weight = memory[state + (D + Dv) * block + lane], memory[total + lane]
                lse[row + lane] = -math.inf if weight == 0 else (reference + math.log2(weight)) * LN_2
    return finite


@device
def matrix(array, b_offset, h):
    """Head h of the sequence that starts `b_offset` bytes after an array's first element."""
    return Matrix(moved(address(array), b_offset + h * array.strides[0]), array.strides[1], array.strides[2])


@kernel
def work(
    memory, worker, next_task, q, k, v, mask, out, lse,
    offsets, intervals, left, right, scale, keys, block, blocks, lanes,
):  # fmt: skip
    """Do tasks until there are none: the rows of a head from the last to the first, as causal ones have most to do.

    Arrays are (heads, rows, columns) of the first sequence; offsets (B, 5) is where in q, k, v, mask and out the others
    start, in bytes; intervals (B, 3) is that of masks.KeyIntervals.
    """
    align_stack()
    (Hq, Lq, D), Dv = q.shape, v.shape[2]
    sizes = Sizes(D, Dv, keys, block, lanes)
    group = Hq // k.shape[0] if k.shape[0] else 1
    per_head = (Lq + blocks * block - 1) // (blocks * block)
    tasks = offsets.shape[0] * Hq * per_head
    # Each worker has a range of tasks, so that few heads pass through its caches, and helps the others when it is done.
    workers, helped = next_task.shape[0], 0
    while helped < workers:
        owner = (worker + helped) % workers
        task = tasks * owner // workers + fetch_add(next_task, owner)
        if task >= tasks * (owner + 1) // workers:
            helped += 1
            continue
        b, h = task // per_head // Hq, task // per_head % Hq
        first = (per_head - 1 - task % per_head) * blocks * block
        end = min(first + blocks * block, Lq)
        position = Position(intervals[b, 0], intervals[b, 2], left, right)
        valid = max(first, min(end, intervals[b, 1]))

        q_head, out_head = matrix(q, offsets[b, 0], h), matrix(out, offsets[b, 4], h)
        k_head, v_head = matrix(k, offsets[b, 1], h // group), matrix(v, offsets[b, 2], h // group)
        # An axis of length 1 is broadcast: the same element for every index.
        mask_head = Matrix(
            moved(address(mask), offsets[b, 3] + (h * mask.strides[0] if mask.shape[0] > 1 else 0)),
            mask.strides[1] if mask.shape[1] > 1 else 0,
            mask.strides[2] if mask.shape[2] > 1 else 0,
        )
        masked = mask.size > 0
        lse_head = lse[b, h] if lse.size else lse[0, 0]
        careful = False
        while valid > first:
            attend(q_head, k_head, v_head, mask_head, masked, position, first, valid, sizes, scale, memory, careful)
            finite = finish(out_head, lse_head, first, valid, sizes, memory)
            if finite or careful:
                break
            # Either something attended to is not finite, or a masked value met a zero probability: the careful form
            # tells them apart.
            careful = True
        if valid < end:
            padding = moved(out_head.data, valid * out_head.row)
            pack.fill(padding, out_head.row, out_head.step, end - valid, Dv, memory.dtype.type(0))
            if lse.size:
                for row in range(valid, end):
                    lse_head[row] = -math.inf


work_through_pointer = through_pointer(work.py_func)


@parallel_kernel
def work_together(
    code, memory, next_task, q, k, v, mask, out, lse, offsets, intervals, left, right, scale, keys, block, blocks, lanes
):
    """`work`, whose machine code is at `code`, by as many workers as there are rows of memory."""
    for worker in prange(memory.shape[0]):
        work_through_pointer(
            code, memory[worker], worker, next_task, q, k, v, mask, out, lse,
            offsets, intervals, left, right, scale, keys, block, blocks, lanes,
        )  # fmt: skip


# From Python ----------------------------------------------------------------------------------------------------------


def forward(problem: Problem) -> None:
    """Compute `problem` and write its results."""
    _refuse_options_to_come(problem)
    q, k, v, out = problem.query, problem.key, problem.value, problem.out
    batch, (Hq, Lq, D), (Lk, Dv) = q.shape[:-3], q.shape[-3:], v.shape[-2:]
    B = math.prod(batch)
    if B * Hq * Lq == 0:
        return
    dtype = q.dtype
    first = (0,) * len(batch)
    mask = _NO_MASK if problem.mask is None else problem.mask[first]
    lse = np.empty((0, 0, 0), dtype) if problem.lse is None else problem.lse.reshape(B, Hq, Lq)
    workers = threads.count() if B * Hq * Lq * Lk * (D + Dv) > SERIAL_WORK else 1
    cut, lanes = plan(B * Hq, Lq, D, Dv, dtype.itemsize, workers), VECTOR_BYTES // dtype.itemsize
    arguments = (
        q[first], k[first], v[first], mask, out[first], lse,
        _batch_offsets(batch, q.strides, k.strides, v.strides, _mask_strides(problem.mask, batch), out.strides),
        problem.intervals.table, problem.intervals.left, problem.intervals.right, problem.scale * LOG2_E,
        cut.keys, cut.block, cut.blocks, lanes,
    )  # fmt: skip
    workers = min(workers, B * Hq * cut.tasks)
    if workers > 1:
        with threads.pool() as mine:
            if mine:
                memory = _memory(workers, _memory_size(cut, D, Dv, lanes), dtype)
                alone, together = _serial(dtype.char, mask.dtype.char), _parallel(dtype.char, mask.dtype.char)
                together.call(alone.code, memory, _counters(workers), *arguments)
                return
    memory = _memory(1, _memory_size(cut, D, Dv, lanes), dtype)[0]
    _serial(dtype.char, mask.dtype.char).call(memory, 0, _counters(1), *arguments)


def _refuse_options_to_come(problem: Problem) -> None:
    for name in ("softcap", "slopes", "sinks", "score_mod", "mask_mod", "block_mask", "dropout", *AUX_NAMES[1:]):
        if getattr(problem, name) is not None:
            raise NotImplementedError(f"{name} is not implemented yet on backend 'cpu'")
    if problem.bfloat16_products or problem.query.dtype.itemsize == 2:
        raise NotImplementedError("16-bit types are not implemented yet on backend 'cpu'")


_NO_MASK = np.empty((0, 0, 0), np.bool_)


@functools.lru_cache(maxsize=64)
def _batch_offsets(batch: tuple[int, ...], *strides: tuple[int, ...]) -> np.ndarray:
    """(B, arrays) int64: how many bytes after the first sequence of each array the others start."""
    offsets = np.zeros((1, len(strides)), np.int64)
    for axis, length in enumerate(batch):
        steps = np.array([s[axis] for s in strides])
        offsets = (offsets[:, None] + np.arange(length)[:, None] * steps).reshape(-1, len(strides))
    return offsets


def _mask_strides(mask: np.ndarray | None, batch: tuple[int, ...]) -> tuple[int, ...]:
    """A mask's strides along the batch axes, 0 where it is broadcast."""
    if mask is None:
        return (0,) * len(batch)
    return tuple(s if n > 1 else 0 for s, n in zip(mask.strides, mask.shape[: len(batch)], strict=False))


def _memory_size(cut: Plan, D: int, Dv: int, lanes: int) -> int:
    """Elements of a worker's memory, as `memory_map` divides it up."""
    values = -(-cut.keys // lanes) * lanes * Dv
    size = (2 * cut.keys + LANE_VECTORS + cut.blocks * (D + Dv + 2)) * cut.block + values
    return -(-size // 16) * 16  # whole cache lines, so that workers do not share one


_kept = threading.local()


def _memory(workers: int, size: int, dtype: np.dtype) -> np.ndarray:
    """(workers, size) of uninitialised memory, aligned to cache lines; each Python thread keeps its last one."""
    wanted = workers, size, dtype.char
    if getattr(_kept, "shape", None) == wanted:
        return _kept.memory
    length = workers * size * dtype.itemsize
    buffer = np.empty(length + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    memory = buffer[start : start + length].view(dtype).reshape(workers, size)
    if length <= MOST_KEPT:
        _kept.shape, _kept.memory = wanted, memory
    return memory


def _counters(workers: int) -> np.ndarray:
    """How many tasks of each worker's have been taken, each on a cache line of its own."""
    return np.zeros((workers, 8), np.int64)


def _signature(dtype: str, mask: str) -> tuple[types.Type, ...]:
    """Of `work`, for element types given by their NumPy characters."""
    element = from_dtype(np.dtype(dtype))
    given = types.Array(element, 3, "A", readonly=True, aligned=False)
    given_mask = types.Array(from_dtype(np.dtype(mask)), 3, "A", readonly=True, aligned=False)
    written, lse = types.Array(element, 3, "A", aligned=False), types.Array(element, 3, "A")
    table = types.Array(types.int64, 2, "C", readonly=True)
    memory, counters = types.Array(element, 1, "C"), types.Array(types.int64, 2, "C")
    numbers = (types.int64, types.int64, element, *[types.int64] * 4)
    return (memory, types.int64, counters, given, given, given, given_mask, written, lse, table, table, *numbers)


@functools.cache
def _serial(dtype: str, mask: str) -> Compiled:
    return compiled(work, _signature(dtype, mask))


@functools.cache
def _parallel(dtype: str, mask: str) -> Compiled:
    memory, _, *rest = _signature(dtype, mask)
    code = types.Array(types.intp, 1, "C")
    return compiled(work_together, (code, types.Array(memory.dtype, 2, "C"), *rest))


def warmup() -> list[str]:
    """Compile every kernel, or load it from the cache; returns their names."""
    names = []
    for dtype in "fd":
        for mask in ("?", dtype):
            for compile_one in (_serial, _parallel):
                compile_one(dtype, mask)
                names.append(f"forward{compile_one.__name__}, {np.dtype(dtype)}, {np.dtype(mask)} mask")
    return names
