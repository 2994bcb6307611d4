"""The gradients of query, key and value, in one pass over the scores.

    dV = P^T dO,   dK = dS^T Q,   dQ = dS K,   with P and dS of `score_gradients`, and delta = sum(dO * O) - d lse

A task is a part of the query rows of all heads that share a key-value head: a group of row blocks after the other, it
streams the keys past each.  What it adds to the gradients of keys and values it adds to sums of its own, in the order
of its rows; who finishes the last part of a head adds up the parts, in order.  So every sum has one order, whoever does
what.  Products are of scores without their scale, which the finished sums are multiplied by.

Dao et al. (2022), appendix B; the five products in one pass are those of Dao, "FlashAttention-2" (2023).
"""

from __future__ import annotations

import functools
import math
from collections import namedtuple

from numba import types

from numba_attn.block_mask import EMPTY
from numba_attn.cpu import edges, gradient_tiles, launch, pack, target
from numba_attn.cpu.bias_gradient import Bias, add_tile, bias_types
from numba_attn.cpu.gradient_tasks import Cut, Tables, rows_of_sums
from numba_attn.cpu.jit import device, kernel
from numba_attn.cpu.narrow import COMPUTED
from numba_attn.cpu.pointers import address, align_stack, as_element, fetch_add, get, holds_pairs, moved, put
from numba_attn.cpu.results import column_of, read, read_norms, write
from numba_attn.cpu.score import NO_NOTES, Call, Sizes, call_types, element, head_of, matrix, select
from numba_attn.cpu.score_gradients import (
    GradientArrays,
    as_operands,
    gradient_types,
    load_keys,
    load_pairs,
    load_values,
    padded,
    score_gradients,
)
from numba_attn.cpu.simd import PAIRS
from numba_attn.cpu.stored import in_place
from numba_attn.cpu.tuples import addressed
from numba_attn.cpu.visible import Matrix, visible
from numba_attn.cpu.workers import by_workers

# Where things are in a worker's memory, in elements.
Memory = namedtuple(
    "Memory",
    "scores bias keep growth derivative zero one low high cuts sums norms delta starts stops coarse spoilt "
    "qt gt ot above q g dq p ds k clean pairs v size",
)

RUN = 24  # keys of a tile whose vectors of queries are looked for together


@device
def memory_map(sizes, blocks):
    keys, block, lanes = sizes.keys, sizes.block, sizes.lanes
    D, Dv = (sizes.D + lanes - 1) // lanes * lanes, (sizes.Dv + lanes - 1) // lanes * lanes
    group, tile = blocks * block, keys * block
    lane_vectors = 5 * tile
    per_group = lane_vectors + 6 * block
    # Norms are two numbers a row, block by block; starts and stops are those of vectors, coarse is one of blocks.
    rows = per_group + 3 * group + (2 * group // lanes + blocks + group + lanes - 1) // lanes * lanes
    products = rows + group * (sizes.D + sizes.Dv) + 2 * block * sizes.Dv
    tiles_ = products + group * (2 * D + Dv)
    # Rows of clean keys are spread over two cache lines more at most.
    copies, clean = tiles_ + 2 * keys * group, keys * (D + 32)
    return Memory(
        scores=0,
        bias=tile,
        keep=2 * tile,
        growth=3 * tile,
        derivative=4 * tile,
        zero=lane_vectors,
        one=lane_vectors + block,
        low=lane_vectors + 2 * block,
        high=lane_vectors + 3 * block,
        cuts=lane_vectors + 4 * block,
        sums=lane_vectors + 5 * block,
        norms=per_group,
        delta=per_group + 2 * group,
        starts=per_group + 3 * group,
        stops=per_group + 3 * group + group // lanes,
        coarse=per_group + 3 * group + 2 * (group // lanes),
        spoilt=per_group + 3 * group + 2 * (group // lanes) + blocks,
        qt=rows,
        gt=rows + group * sizes.D,
        ot=rows + group * (sizes.D + sizes.Dv),
        above=rows + group * (sizes.D + sizes.Dv) + block * sizes.Dv,
        q=products,
        g=products + group * D,
        dq=products + group * (D + Dv),
        p=tiles_,
        ds=tiles_ + keys * group,
        k=copies,
        clean=copies + keys * D,
        pairs=copies + keys * D + clean,
        v=copies + 2 * keys * D + clean,
        size=copies + keys * (2 * D + Dv) + clean,
    )


# One group of rows ----------------------------------------------------------------------------------------------------


@device
def load_group(head, arrays, sequences, gradients, first, end, sizes, memory, at):
    """Put what is needed of the rows [first, end) in memory, and write their delta.

    Rows of queries and of gradients from above are there twice: as they are, transposed, as operands of products, and
    with 0 in place of what is not finite, where a product with a masked key must not spread that; `spoilt` rows of
    gradients are 0 altogether.
    """
    D, Dv, block, lanes = sizes.D, sizes.Dv, sizes.block, sizes.lanes
    columns, value_columns, itemsize = padded(D, lanes), padded(Dv, lanes), memory.itemsize
    h, of_forward, offsets = head.h, sequences.offsets[head.b], gradients.offsets[head.b]
    q, g, out = head.q, matrix(gradients.grad_out, offsets[0], h), matrix(arrays.out, of_forward[4], h)
    grad_lse = column_of(gradients.grad_lse, offsets[1], h)
    delta, nothing, operands = column_of(gradients.delta, offsets[2], h), memory.dtype.type(0), arrays.operands
    ot, pairs = element(memory, at.ot), holds_pairs(address(operands))
    for i in range((end - first + block - 1) // block):
        row = first + i * block
        rows = min(block, end - row)
        width = (rows + lanes - 1) // lanes
        qt, gt = operands_of(i, operands, sizes, memory, at)
        above = element(memory, at.above) if pairs else element(memory, at.gt + i * block * Dv)
        pack.transpose(width, moved(q.data, row * q.row), 0, q.row, q.step, rows, rows, D, qt)
        pack.transpose(width, moved(g.data, row * g.row), 0, g.row, g.step, rows, rows, Dv, above)
        if pairs:
            pack.transpose(width, moved(g.data, row * g.row), 0, g.row, g.step, rows, rows, Dv, gt)
        pack.transpose(width, moved(out.data, row * out.row), 0, out.row, out.step, rows, rows, Dv, ot)
        gradient_tiles.column_dots(width, ot, above, Dv, element(memory, at.delta + i * block))
        norms = at.norms + 2 * i * block
        coarse = read_norms(
            arrays, sequences, head.b, h, row, rows, 1, block, width * lanes, memory, norms, norms + block
        )
        memory[at.coarse + i] = 1 if coarse else 0
        for lane in range(rows):
            if grad_lse.wanted:
                memory[at.delta + i * block + lane] -= read(grad_lse, row + lane)
            write(delta, row + lane, memory[at.delta + i * block + lane])
    rows = end - first
    q_rows, g_rows = element(memory, at.q), element(memory, at.g)
    pack.copy_rows(moved(q.data, first * q.row), q.row, q.step, rows, D, columns, q_rows)
    pack.copy_rows(moved(g.data, first * g.row), g.row, g.step, rows, Dv, value_columns, g_rows)
    gradient_tiles.drop_infinite(q_rows, rows * columns // lanes)
    for r in range(rows):
        line = moved(g_rows, r * value_columns * itemsize)
        spoilt = gradient_tiles.drop_infinite(line, value_columns // lanes)
        memory[at.spoilt + r] = 1 if spoilt else 0
        if spoilt:
            pack.fill_lanes(line, nothing, value_columns // lanes)
    if pairs:
        pack.pair_rows(q_rows, columns * itemsize, itemsize, rows, columns, as_element(q_rows, operands))
        pack.pair_rows(g_rows, value_columns * itemsize, itemsize, rows, value_columns, as_element(g_rows, operands))
    pack.fill_lanes(element(memory, at.dq), nothing, rows * columns // lanes)


@device
def operands_of(i, operands, sizes, memory, at):
    """Where row block i of the queries, and of the gradients from above, is as operands of products."""
    qt, gt = element(memory, at.qt + i * sizes.block * sizes.D), element(memory, at.gt + i * sizes.block * sizes.Dv)
    return as_element(qt, operands), as_element(gt, operands)


@device
def differentiate_group(
    head, member, g, first, end, number, task, bias, sums_k, sums_v, blocks, operands, sizes, settings, memory, at
):  # fmt: skip
    """Stream the keys past the rows [first, end), which `load_group` has put in memory, of the task of a number.

    Leaves their gradients there, and adds those of keys and values to the task's sums, and what `bias_gradient` does;
    g are the gradients from above, and the head is the `member`-th of those that share a key-value head.
    """
    D, Dv, keys, block, lanes = sizes.D, sizes.Dv, sizes.keys, sizes.block, sizes.lanes
    columns, value_columns, itemsize = padded(D, lanes), padded(Dv, lanes), memory.itemsize
    k, v, pairs = in_place(head.k, memory), in_place(head.v, memory), holds_pairs(address(operands))
    p, ds, p_row = element(memory, at.p), element(memory, at.ds), blocks * block * itemsize
    count, low = (end - first + block - 1) // block, task[5]
    group_low, group_high, _, _ = visible(first, end, head.position)
    for tile_number in range(group_low // keys, (group_high + keys - 1) // keys):
        tile = tile_number * keys
        tile_low, tile_high = max(tile, group_low), min(tile + keys, group_high)
        if pairs:
            tile_low -= (tile_low - tile) % 2
        n_tile, loaded = tile_high - tile_low, False
        k_rows = Matrix(p, 0, 0)
        k_tile = v_tile = Matrix(as_element(p, operands), 0, 0)
        for i in range(count):
            row = first + i * block
            rows = min(block, end - row)
            width = (rows + lanes - 1) // lanes
            here = select(head, settings, row, rows, 1, tile, tile + keys, pairs, sizes, memory, at)
            start, stop = here.start - tile_low, here.stop - tile_low
            if here.kept == EMPTY:
                start = stop = 0
                edges.cut(here, width, True, sizes, memory, at)
            else:
                if not loaded:
                    k_plain, k_rows = load_keys(k, tile_low, n_tile, sizes, memory, at)
                    if pairs:
                        k_tile = load_pairs(k, tile_low, n_tile, D, operands, memory, at.pairs)
                        v_tile = load_pairs(v, tile_low, n_tile, Dv, operands, memory, at.v)
                        paired = as_element(k_rows.data, operands)
                        pack.pair_rows(k_rows.data, k_rows.row, itemsize, n_tile, k_rows.row // itemsize, paired)
                    else:
                        v_plain = load_values(v, tile_low, n_tile, sizes, memory, at)
                        k_tile, v_tile = as_operands(k_plain, operands), as_operands(v_plain, operands)
                    loaded = True
                at_tile = start * p_row + i * block * itemsize
                qt, gt = operands_of(i, operands, sizes, memory, at)
                score_gradients(
                    head, settings, here, row, rows, memory[at.coarse + i] != 0, sizes,
                    Matrix(moved(k_tile.data, start * k_tile.row), k_tile.row, k_tile.step),
                    Matrix(moved(v_tile.data, start * v_tile.row), v_tile.row, v_tile.step),
                    qt, gt,
                    element(memory, at.norms + 2 * i * block), element(memory, at.delta + i * block),
                    moved(p, at_tile), moved(ds, at_tile), p_row, memory, at,
                )  # fmt: skip
                weights, from_key, first_key = moved(ds, at_tile), p_row, start
                add_tile(bias, number, task, head, member, here, row, rows, sizes, weights, p_row, memory, at)
                if settings.softcap != 0:
                    gradient_tiles.multiply(width, stop - start, element(memory, at.growth), weights, p_row)
                if pairs:
                    weights, from_key, first_key = element(memory, at.scores), width * lanes * itemsize, start // 2
                    gradient_tiles.pair_keys(width, stop - start, moved(ds, at_tile), p_row, weights)
                of_tile = Matrix(moved(k_rows.data, first_key * k_rows.row), k_rows.row, k_rows.step)
                # All vectors of queries together, or each with the keys that it attends to.
                for w in range(width if here.edged else 1):
                    last = w + 1 if here.edged else width
                    add_to_queries(weights, from_key, of_tile, i, rows, w, last, width, operands, sizes, memory, at)
            for w in range(width):
                of_vector, vector = edges.keys_of_vectors(w, w + 1, width, memory, at), i * (block // lanes) + w
                memory[at.starts + vector] = start + of_vector.start
                memory[at.stops + vector] = start + of_vector.start + of_vector.n
            for low_key, high_key in ((0, start), (stop, n_tile)):
                to, n = low_key * p_row + i * block * itemsize, high_key - low_key
                gradient_tiles.fill(width, moved(p, to), p_row, n, memory.dtype.type(-0.0))
                gradient_tiles.fill(width, moved(ds, to), p_row, n, memory.dtype.type(0))
        if not loaded:
            continue
        add_to_sums(
            g, first, end - first, n_tile, operands, moved(sums_k, (tile_low - low) * columns * itemsize),
            moved(sums_v, (tile_low - low) * value_columns * itemsize), p_row, sizes, memory, at,
        )  # fmt: skip


@device
def add_to_queries(weights, from_key, k, i, rows, first, end, width, operands, sizes, memory, at):
    """dQ += dS K, of the vectors [first, end) of row block i, which has so many rows, and the keys k of a tile.

    The weights, dS, of these keys are `from_key` bytes apart; of pairs, two keys are one.
    """
    lanes, itemsize, columns = sizes.lanes, memory.itemsize, padded(sizes.D, sizes.lanes)
    part, row = edges.keys_of_vectors(first, end, width, memory, at), first * lanes
    key = part.start // 2 if holds_pairs(address(operands)) else part.start
    gradient_tiles.add_product_of_columns(
        as_element(moved(weights, key * from_key + row * itemsize), operands), from_key,
        min(rows, end * lanes) - row, part.n, as_element(moved(k.data, key * k.row), operands), k.row,
        columns // lanes, element(memory, at.dq + (i * sizes.block + row) * columns), columns * itemsize,
    )  # fmt: skip


@device
def vectors_of(key, stop, count, memory, at):
    """The first and the end of `count` vectors of queries that attend to any of the keys [key, stop) of a tile."""
    first, end = count, 0
    for i in range(count):
        if memory[at.starts + i] < stop and memory[at.stops + i] > key:
            first, end = min(first, i), i + 1
    return first, end


@device
def add_to_sums(g, start, rows, n, operands, sums_k, sums_v, p_row, sizes, memory, at):
    """sums_v += P^T dO and sums_k += dS^T Q, of a tile of n keys and a group of so many rows.

    g are the gradients from above, of which the group has those from `start` on.
    """
    lanes, itemsize, pairs = sizes.lanes, memory.itemsize, holds_pairs(address(operands))
    columns, value_columns = padded(sizes.D, lanes), padded(sizes.Dv, lanes)
    count = padded(rows, lanes) // lanes
    for r in range(rows):
        if memory[at.spoilt + r] != 0:
            add_spoilt(g, start + r, r, sums_v, p_row, sizes, memory, at)
    p, ds, size, together = element(memory, at.p), element(memory, at.ds), itemsize, 1
    if pairs:
        size, together = 2, 2
        gradient_tiles.pair_lanes(n, rows, p, p_row)
        gradient_tiles.pair_lanes(n, rows, ds, p_row)
    key = 0
    while key < n:
        first, end = vectors_of(key, min(key + RUN, n), count, memory, at)
        stop = min(key + RUN, n)
        while stop < n and (first, end) == vectors_of(stop, min(stop + RUN, n), count, memory, at):
            stop = min(stop + RUN, n)
        if first < end:
            row = first * lanes
            n_rows, from_tile = min(end * lanes, rows) - row, key * p_row + row * size
            g_rows = element(memory, at.g + row // together * value_columns)
            q_rows = element(memory, at.q + row // together * columns)
            gradient_tiles.add_product(
                as_element(moved(p, from_tile), operands), p_row, itemsize, stop - key, n_rows,
                as_element(g_rows, operands), value_columns * itemsize, value_columns // lanes,
                moved(sums_v, key * value_columns * itemsize), value_columns * itemsize,
            )  # fmt: skip
            gradient_tiles.add_product(
                as_element(moved(ds, from_tile), operands), p_row, itemsize, stop - key, n_rows,
                as_element(q_rows, operands), columns * itemsize, columns // lanes,
                moved(sums_k, key * columns * itemsize), columns * itemsize,
            )  # fmt: skip
        key = stop


@device
def add_spoilt(g, row, r, sums_v, p_row, sizes, memory, at):
    """sums_v += the part of a row whose gradient is not finite, of the keys that it attends to: the r-th of a group."""
    lanes, Dv, itemsize, number = sizes.lanes, sizes.Dv, memory.itemsize, r // sizes.lanes
    pack.copy_rows(moved(g.data, row * g.row), g.row, g.step, 1, Dv, Dv, element(memory, at.above))
    for key in range(int(memory[at.starts + number]), int(memory[at.stops + number])):
        weight = memory[at.p + key * (p_row // itemsize) + r]
        if weight == 0 and math.copysign(1.0, weight) < 0:
            continue
        for d in range(Dv):
            to = (key * padded(Dv, lanes) + d) * itemsize
            put(sums_v, to, get(sums_v, to) + weight * memory[at.above + d])


# The kernel -----------------------------------------------------------------------------------------------------------


@device
def sums_of(sums, task):
    """Address of the sums of a task."""
    return moved(address(sums), task[4] * sums.strides[0])


@device
def do_part(number, task, gradients, bias, arrays, sequences, functions, settings, cut, sizes, memory, at):
    """Write the gradients of the query rows of a task, and its sums."""
    b, shared, low, high, low_row, high_row = task[0], task[1], task[5], task[6], task[8], task[9]
    lanes, rows = sizes.lanes, cut.block * cut.blocks
    group, per_head = arrays.q.shape[0] // arrays.k.shape[0], (high_row - low_row + rows - 1) // rows
    sums_k, sums_v = sums_of(gradients.sums_k, task), sums_of(gradients.sums_v, task)
    nothing, columns = memory.dtype.type(0), padded(sizes.D, lanes)
    pack.fill_lanes(sums_k, nothing, (high - low) * (columns // lanes))
    pack.fill_lanes(sums_v, nothing, (high - low) * (padded(sizes.Dv, lanes) // lanes))
    for unit in range(task[2], task[3]):
        member, first = unit // per_head, low_row + unit % per_head * rows
        h, end = shared * group + member, min(first + rows, high_row)
        head = addressed(head_of(arrays, sequences, functions, settings, b, h, NO_NOTES))
        load_group(head, arrays, sequences, gradients, first, end, sizes, memory, at)
        g = matrix(gradients.grad_out, gradients.offsets[b, 0], h)
        differentiate_group(
            head, member, g, first, end, number, task, bias, sums_k, sums_v, cut.blocks, arrays.operands, sizes,
            settings, memory, at,
        )  # fmt: skip
        gradient_tiles.scale(element(memory, at.dq), (end - first) * (columns // lanes), settings.scale)
        dq = matrix(gradients.query, gradients.offsets[b, 3], h)
        for r in range(end - first):
            line = element(memory, at.dq + r * columns)
            pack.write_row(line, sizes.D, moved(dq.data, (first + r) * dq.row), dq.step)


@device
def add_parts(first, end, tasks, sums, columns, factor, gradient, row, sizes):
    """Write the gradient of keys or values of one head: the sums of its tasks, in order, times a factor.

    `row` is memory for one.
    """
    low, high = tasks[first, 5], tasks[first, 6]
    for number in range(first + 1, end):
        low, high = min(low, tasks[number, 5]), max(high, tasks[number, 6])
    vectors = padded(columns, sizes.lanes) // sizes.lanes
    for key in range(low, high):
        total = row
        if end - first == 1:
            total = moved(sums_of(sums, tasks[first]), (key - low) * sums.strides[0])
        else:
            pack.fill_lanes(row, sums.dtype.type(0), vectors)
            for number in range(first, end):
                task = tasks[number]
                if task[5] <= key < task[6]:
                    part = moved(sums_of(sums, task), (key - task[5]) * sums.strides[0])
                    gradient_tiles.add_vectors(part, vectors, row)
        gradient_tiles.scale(total, vectors, factor)
        pack.write_row(total, columns, moved(gradient.data, key * gradient.row), gradient.step)


@device
def do_tasks(worker, memories, counters, gradients, bias, tables, arrays, sequences, functions, settings, cut):
    """Do chains of tasks until there are none."""
    memory = memories[worker]
    align_stack()
    sizes = Sizes(arrays.q.shape[2], arrays.out.shape[2], cut.keys, cut.block, cut.lanes, 0)
    at = addressed(memory_map(sizes, cut.blocks))
    pack.fill_lanes(element(memory, at.zero), memory.dtype.type(0), cut.block // cut.lanes)
    pack.fill_lanes(element(memory, at.one), memory.dtype.type(1), cut.block // cut.lanes)
    one, helped = memory.dtype.type(1), 0
    while True:
        chain, helped = launch.take(counters, worker, helped, tables.chains.shape[0])
        if chain < 0:
            break
        for place in range(tables.chains[chain, 0], tables.chains[chain, 1]):
            number = tables.order[place, 0]
            task = tables.tasks[number]
            do_part(number, task, gradients, bias, arrays, sequences, functions, settings, cut, sizes, memory, at)
            first, end = tables.heads[task[7], 0], tables.heads[task[7], 1]
            if fetch_add(tables.finished, task[7]) == end - first - 1:
                b, shared, row = task[0], task[1], element(memory, at.q)
                dk = matrix(gradients.key, gradients.offsets[b, 4], shared)
                dv = matrix(gradients.value, gradients.offsets[b, 5], shared)
                add_parts(first, end, tables.tasks, gradients.sums_k, sizes.D, settings.scale, dk, row, sizes)
                add_parts(first, end, tables.tasks, gradients.sums_v, sizes.Dv, one, dv, element(memory, at.g), sizes)


do_all_tasks = by_workers(do_tasks)


@kernel
def differentiate(launcher, memories, counters, gradients, bias, tables, arrays, sequences, functions, settings, cut):
    """`do_tasks`, by as many workers as there are memories."""
    do_all_tasks(launcher, memories, counters, gradients, bias, tables, arrays, sequences, functions, settings, cut)


# From Python ----------------------------------------------------------------------------------------------------------


def operand(kind: str) -> types.Type:
    """What products are made of."""
    return PAIRS if kind == "bfloat16" and target.BFLOAT16 == "dot" else COMPUTED[kind]


def run(
    call: Call,
    gradients: GradientArrays,
    bias: Bias,
    tables: Tables,
    cut: Cut,
    kinds: tuple[str, types.Type],
    workers: int,
    operations: float,
) -> None:
    """Write the gradients of a call whose output and norms have been written; the sums of `gradients` are made here."""
    D, Dv, dtype = call.arrays.q.shape[2], call.arrays.out.shape[2], call.arrays.lse.dtype
    chains, rows, size = len(tables.chains), rows_of_sums(tables.tasks), memory_size(cut, D, Dv)
    k_columns, v_columns = (-(-n // cut.lanes) * cut.lanes for n in (D, Dv))
    start = launch.prepared(entry, kinds, min(workers, chains), chains, operations, size, dtype)
    with launch.working_memory(1, rows * (k_columns + v_columns), dtype) as (sums,):
        sums_k = sums[: rows * k_columns].reshape(rows, k_columns)
        sums_v = sums[rows * k_columns :].reshape(rows, v_columns)
        start(gradients._replace(sums_k=sums_k, sums_v=sums_v), bias, tables, *call, cut)


@functools.lru_cache(maxsize=256)
def memory_size(cut: Cut, D: int, Dv: int) -> int:
    """Elements of a worker's memory: whole cache lines, so that workers do not share one."""
    return -(-memory_map.py_func(Sizes(D, Dv, cut.keys, cut.block, cut.lanes, 0), cut.blocks).size // 16) * 16


def signature(kind: str, operand: types.Type) -> tuple[types.Type, ...]:
    """Of `differentiate`, for a kind of element and an operand, see `narrow`."""
    element_type, table = COMPUTED[kind], types.Array(types.int64, 2, "C")
    return launch.signature_of(
        element_type,
        gradient_types(kind),
        bias_types(element_type),
        types.NamedUniTuple(table, 5, Tables),
        *call_types(kind, operand, kind),
        types.NamedUniTuple(types.int64, 4, Cut),
    )


entry = launch.entry(differentiate, signature)
