"""A row block of the forward pass: its state, in a worker's memory, and what it does with one tile of keys.

    s = scale * q.k (+ mask),   p = exp(s - m)

The scores of a block and a tile are exponentiated against the row's reference m, which is moved to the largest score,
and what there is rescaled, only where that is far from it.
"""

from __future__ import annotations

import math
from collections import namedtuple

import numpy as np

from numba_attn.block_mask import FULL
from numba_attn.cpu import dropout, edges, pack, softmax, tiles
from numba_attn.cpu.jit import device
from numba_attn.cpu.plan import WIDEST
from numba_attn.cpu.pointers import address, as_bfloat16, as_element, holds_pairs, moved
from numba_attn.cpu.score import ON_TILES, columns_of, element, is_settled, score, slope, steepest
from numba_attn.cpu.stored import gather, is_gathered
from numba_attn.cpu.target import VECTOR_BYTES
from numba_attn.cpu.visible import Matrix

# Where things are in a worker's memory, in elements.
Memory = namedtuple(
    "Memory",
    "scores bias keys values clean rows_k rows_v zero top sums moments correction low high cuts state qt_rows ot_rows "
    "state_size",
)
# The state of a row block, in memory: what it is made of, and what has come of it so far.
State = namedtuple("State", "qt ot reference total moment best")

LANE_VECTORS = 8  # zero, top, sums, moments, correction, low, high: one value a lane; and cuts
STATE_VECTORS = 4  # reference, total, moment, best
STEEP = 4.0  # rise of scores over a tile, by ALiBi, with which its references are moved first


# Memory and state -----------------------------------------------------------------------------------------------------


@device
def memory_map(sizes):
    # Rows and columns filled up to what tile registers hold, and room for a tile that begins anywhere.  Keys are an odd
    # number of 32, as what lies whole pages apart gets in each other's way.
    block, keys = sizes.block, (sizes.keys + 31) // 32 * 32 | 32
    qt_rows, ot_rows = (sizes.D + 15) // 16 * 16, (sizes.Dv + 1 + 15) // 16 * 16
    copied = 2 * keys * block
    values = copied + (keys + 32) * qt_rows
    clean = values + keys * ot_rows + 32
    rows_k = clean + keys * ot_rows // 2 + 32
    rows_v = rows_k + keys * sizes.D
    lanes = (rows_v + keys * sizes.Dv + 15) // 16 * 16
    return Memory(
        scores=0,
        bias=keys * block,
        keys=copied,
        values=values,
        clean=clean,
        rows_k=rows_k,
        rows_v=rows_v,
        zero=lanes,
        top=lanes + block,
        sums=lanes + 2 * block,
        moments=lanes + 3 * block,
        correction=lanes + 4 * block,
        low=lanes + 5 * block,
        high=lanes + 6 * block,
        cuts=lanes + 7 * block,
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
def kept_size(at, sizes):
    """Elements of what has come of a row block, all of its state but the queries: kept of each split of the keys."""
    return (at.ot_rows + STATE_VECTORS) * sizes.block


@device
def start_of_results(at, sizes, i):
    """Where that of row block i begins in memory."""
    return at.state + i * at.state_size + at.qt_rows * sizes.block


# A block and a tile ---------------------------------------------------------------------------------------------------


@device
def rounded_sums(state, width, sizes):
    """Sums of the probabilities of pairs, which are behind the output, see `tiles.accumulate`."""
    return moved(state.ot, sizes.Dv * width * VECTOR_BYTES)


@device
def divisor_of(state, width, settings, operands, sizes):
    """The sums that outputs are divided by: of probabilities as they are multiplied, rounded if they are pairs.

    A key that has nearly all of the weight has nearly all of the rounding, too, which so comes to nothing.  But what is
    dropped counts as well, and where pairs are multiplied by tile registers, their sums are not at hand.
    """
    if holds_pairs(address(operands)) and not ON_TILES and settings.threshold == 0:
        return rounded_sums(state, width, sizes)
    return state.total


@device
def start_block(q, q_head, row, rows, count, state, operands, sizes, memory, at_once):
    """Give a row block its state before the first tile: of `count` rows, of heads with `rows` each, see `shares`."""
    nothing, lowest = memory.dtype.type(0), memory.dtype.type(-math.inf)
    width = (count + sizes.lanes - 1) // sizes.lanes
    if holds_pairs(address(operands)):
        pack.fill_lanes(state.qt, nothing, columns_of(sizes.D, operands) // 2 * width)
    pack.transpose(width, moved(q.data, row * q.row), q_head, q.row, q.step, rows, count, sizes.D, state.qt)
    if not at_once:
        pack.fill_lanes(state.ot, nothing, (sizes.Dv + 1) * width)
    pack.fill_lanes(state.reference, nothing, width)
    pack.fill_lanes(state.total, nothing, width)
    pack.fill_lanes(state.moment, nothing, width)
    pack.fill_lanes(state.best, lowest, width)


@device
def load_tile(head, k, v, low, high, packing, copying, operands, sizes, memory, at):
    """Copy what is not read in place of the keys and values [low, high), of a tile; the matrices that are read then.

    Values are transposed for products where that is worth the `packing`, and those of bfloat16 for all products; others
    are copied, and keys, where `copying` (of keys, of values) says so.
    """
    D, Dv, n, pairs = sizes.D, sizes.Dv, high - low, holds_pairs(address(operands))
    values = as_element(element(memory, at.values), operands)
    if is_gathered(head.k):
        k = gather(head.k, low, n, D, memory, element(memory, at.rows_k))
        v = gather(head.v, low, n, Dv, memory, element(memory, at.rows_v))
    copying_keys, copying_values = copying
    if copying_keys:
        copied = as_element(element(memory, at.keys), operands)
        pack.copy_rows(moved(k.data, low * k.row), k.row, k.step, n, D, columns_of(D, operands), copied)
    v_low, vectors = moved(v.data, low * v.row), vectors_of_values(n, sizes)
    if pairs and ON_TILES:
        pack.transpose_tile(vectors, v_low, v.row, v.step, n, Dv, as_bfloat16(values))
    elif pairs:
        pack.pair_rows(v_low, v.row, v.step, n, Dv, values)
    elif packing:
        pack.transpose_tile(vectors, v_low, v.row, v.step, n, Dv, values)
    elif copying_values:
        pack.copy_rows(v_low, v.row, v.step, n, Dv, Dv, values)
    return k, v


@device
def values_of(v, start, low, high, packing, copying, values, operands, sizes):
    """The values from `start` on: in place, or where `load_tile` has put those of a tile [low, high)."""
    pairs, size = holds_pairs(address(operands)), operands.itemsize
    row = vectors_of_values(high - low, sizes) * sizes.lanes
    if pairs and ON_TILES:
        return Matrix(moved(values, (start - low) * 2), 2, row * 2)
    if pairs:
        return Matrix(moved(values, (start - low) // 2 * sizes.Dv * size), sizes.Dv * size, size)
    if packing:
        return Matrix(moved(values, (start - low) * size), size, row * size)
    if copying:
        return Matrix(moved(values, (start - low) * sizes.Dv * size), sizes.Dv * size, size)
    return Matrix(as_element(moved(v.data, start * v.row), operands), v.row, v.step)


@device
def vectors_of_values(n, sizes):
    """In a column of n transposed values."""
    return (n + 31) // 32 * 32 // sizes.lanes


@device
def exponentiate_tile(
    head, k_tile, ahead, here, i, row, rows, heads, rising, settings, sizes, plain, weighted, state, memory, at
):  # fmt: skip
    """Scores of row block i and a tile, to probabilities below its reference: what `accumulate` takes.

    The block is `rows` of each of the `heads` from this one on.  Keys that are `ahead` may be asked for.  Bit i of
    `rising`, which is returned, is whether scores of the block have been out of its reference's range.
    """
    D, Dv, keys, _, lanes, _ = sizes
    n, width = here.stop - here.start, (rows * heads + lanes - 1) // lanes
    scores = element(memory, at.scores)
    top, sums, moments = element(memory, at.top), element(memory, at.sums), element(memory, at.moments)
    correction = element(memory, at.correction)
    capped = settings.softcap != 0
    steepness = steepest(head, heads, memory)
    options = int(capped) + int(steepness != 0) + int(weighted)
    steep = steepness * keys > STEEP

    done = fused = False
    # Scores that have risen once are expected to go on, but for those that ALiBi makes rise: up to the diagonal, and
    # with a steep slope from the first tile on.
    distance = row + head.position.offset - here.start
    raising = np.bool_(rising >> i & 1 or (steep and distance + rows > 0))
    fusing, full = plain and not raising, here.kept == FULL
    if full:
        fusing = fusing and (options == 0 or (options == 1 and width == WIDEST and (heads == 1 or steepness == 0)))
    else:
        fusing = fusing and not capped and not weighted
    if fusing and full:
        done = fused = exponentiate_whole(
            k_tile, ahead, settings, steepness, n, width, distance, D, weighted, state, scores, memory, at
        )
    if not done:
        here = slope(head, here, row, rows, heads, sizes, memory, at)
        # What is settled cannot be done again.
        raising = raising or is_settled(head, here)
    if fusing and not full:
        done = fused = edges.exponentiate(
            k_tile, ahead, here, width, settings.scale_2, state, scores, sizes, memory, at
        )
    if fusing and not done:
        raising = True
        rising |= (steepness == 0) << i
    while not done:
        unit = score(head, k_tile, ahead, settings, here, row, rows, heads, sizes, state.qt, scores, memory, at)
        moving = 2 if raising else 0
        for _ in range(2):
            if moving == 2:
                softmax.highest(width, scores, n, unit, here.added, here.row, state.reference, top)
                moving = softmax.move_reference(
                    width, top, state.reference, state.best, state.total, state.moment, correction
                )
                if moving:
                    softmax.rescale(width, state.ot, Dv + 1, correction)
        if weighted:
            done = softmax.exponentiate_weighted(
                width, scores, n, unit, here.added, here.row,
                state.reference, state.best, state.total, sums, top, state.moment, moments, raising,
            )  # fmt: skip
        else:
            done = softmax.exponentiate(
                width, scores, n, unit, here.added, here.row,
                state.reference, state.best, state.total, sums, top, state.moment, moments, raising,
            )  # fmt: skip
        if not done:
            rising |= 1 << i
            raising = True
    if settings.threshold != 0:
        dropout.drop(width, scores, n, settings.threshold, settings.seed, head.b, head.h, row, here.start)
    if not fused:
        tiles.pair_up(width, scores, n, k_tile.data)
    return rising


@device
def exponentiate_whole(k, ahead, settings, slope, n, width, distance, D, weighted, state, scores, memory, at):
    """Exponentiate scores where they are made, of a tile in which every row may attend to every key.

    For one option at most, a cap, moments, or ALiBi of one head.  Returns whether that is done, see
    `tiles.probabilities`.
    """
    top, sums, moments = element(memory, at.top), element(memory, at.sums), element(memory, at.moments)
    if weighted:
        return tiles.weighted_probabilities(
            width, k.data, k.row, k.step, n, D, state.qt, settings.scale_2, state.reference, state.best, state.total,
            sums, top, scores, state.moment, moments, ahead.data, ahead.size,
        )  # fmt: skip
    if settings.softcap == 0 and slope == 0:
        return tiles.probabilities(
            width, k.data, k.row, k.step, n, D, state.qt, settings.scale_2, state.reference, state.best, state.total,
            sums, top, scores, ahead.data, ahead.size,
        )  # fmt: skip
    if settings.softcap == 0:
        return tiles.sloped_probabilities(
            width, k.data, k.row, k.step, n, D, state.qt, settings.scale_2, slope, distance, state.reference,
            state.best, state.total, sums, top, scores, ahead.data, ahead.size,
        )  # fmt: skip
    return tiles.capped_probabilities(
        width, k.data, k.row, k.step, n, D, state.qt, settings.scale, settings.softcap, state.reference, state.best,
        state.total, sums, top, scores, ahead.data, ahead.size,
    )  # fmt: skip
