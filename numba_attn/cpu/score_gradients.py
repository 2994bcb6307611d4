"""The probabilities of one row block and one key tile, made anew from norms, and the gradients of their scores."""

from __future__ import annotations

from collections import namedtuple

from numba import types

from numba_attn.block_mask import FULL
from numba_attn.cpu import dropout, edges, gradient_tiles, pack, tiles, user_functions
from numba_attn.cpu.blocks import LINE, LOG2_E
from numba_attn.cpu.jit import device
from numba_attn.cpu.narrow import COMPUTED, STORED
from numba_attn.cpu.pointers import as_element, moved
from numba_attn.cpu.score import (
    COPIES_TILES,
    DERIVATIVE,
    SCORE,
    base_2,
    cap,
    columns_of,
    copies_keys,
    element,
    is_narrow,
    is_plain,
    keys_of,
    settle,
)
from numba_attn.cpu.visible import Matrix

# The arrays of a gradient, (heads, rows, columns) of the first sequence, and where the others start, (B, 6) in bytes:
# what comes from above, grad_lse empty where not given; delta (heads, rows); the gradients, to be written; the sums of
# tasks, rows filled up to whole vectors.
GradientArrays = namedtuple("GradientArrays", "grad_out grad_lse delta query key value sums_k sums_v offsets")


def gradient_types(kind: str) -> types.Type:
    """The type of GradientArrays, for a kind of element, see `narrow`."""
    computed = COMPUTED[kind]
    given = types.Array(STORED[kind], 3, "A", readonly=True, aligned=False)
    written, rows = types.Array(STORED[kind], 3, "A", aligned=False), types.Array(computed, 2, "A")
    above, sums = types.Array(computed, 2, "A", readonly=True), types.Array(computed, 2, "C")
    offsets = types.Array(types.int64, 2, "C")
    return types.NamedTuple([given, above, rows, written, written, written, sums, sums, offsets], GradientArrays)


LONG = 512  # bytes of a row, from which on a tile of a group had better be copied


@device
def padded(columns, lanes):
    """Columns filled up to whole vectors."""
    return (columns + lanes - 1) // lanes * lanes


@device
def spread(columns, itemsize):
    """Columns filled up until rows lie an odd number of cache lines apart: a column of them is all over the cache."""
    return ((columns * itemsize + LINE - 1) // LINE | 1) * LINE // itemsize


@device
def is_better_copied(matrix, columns, itemsize):
    """Whether rows are far apart, as where heads alternate, or so long that they might as well be."""
    length = columns * itemsize
    return COPIES_TILES and (matrix.step != itemsize or abs(matrix.row) > length or length >= LONG)


@device
def load_keys(k, first, n, sizes, memory, at):
    """Rows [first, first + n) of keys: as they are, and `spread` in whole vectors, with 0 for what is not finite."""
    D, lanes, itemsize = sizes.D, sizes.lanes, memory.itemsize
    columns, data = padded(D, lanes), moved(k.data, first * k.row)
    plain = Matrix(as_element(data, memory), k.row, k.step)
    if is_narrow(k) or k.step != itemsize or columns != D or is_better_copied(k, D, itemsize):
        plain = Matrix(element(memory, at.k), columns * itemsize, itemsize)
        pack.copy_rows(data, k.row, k.step, n, D, columns, plain.data)
    clean = Matrix(element(memory, at.clean), spread(D, itemsize) * itemsize, itemsize)
    gradient_tiles.copy_finite(plain.data, plain.row, n, columns // lanes, clean.data, clean.row)
    return plain, clean


@device
def load_pairs(x, first, n, D, operands, memory, at):
    """Rows [first, first + n) of keys or values as operands that are pairs, in place or copied."""
    copied = as_element(element(memory, at), operands)
    copying = copies_keys(x, D, operands)
    if copying:
        pack.copy_rows(moved(x.data, first * x.row), x.row, x.step, n, D, columns_of(D, operands), copied)
    return keys_of(x, first, first, copied, D, operands, copying)


@device
def as_operands(numbers, operands):
    """A matrix of numbers as that of operands, where these are numbers."""
    return Matrix(as_element(numbers.data, operands), numbers.row, numbers.step)


@device
def load_values(v, first, n, sizes, memory, at):
    """Rows [first, first + n) of values, in place or copied."""
    data, itemsize = moved(v.data, first * v.row), memory.itemsize
    if not (is_narrow(v) or is_better_copied(v, sizes.Dv, itemsize)):
        return Matrix(as_element(data, memory), v.row, v.step)
    columns, copied = padded(sizes.Dv, sizes.lanes), element(memory, at.v)
    pack.copy_rows(data, v.row, v.step, n, sizes.Dv, columns, copied)
    return Matrix(copied, columns * itemsize, itemsize)


@device
def probabilities_of_parts(k, qt, tile, width, scale, norms, block, p, p_row, sizes, memory, at):
    """Write the probabilities of a tile with something added to its scores, part by part, see `edges`."""
    vector, masked = sizes.lanes * memory.itemsize, memory.dtype.type(-0.0)
    for number in range(2 * width - 1):
        start, n, first, end = edges.part_of(number, width, memory, at)
        here, of_part = first * vector, moved(p, start * p_row)
        gradient_tiles.biased_probabilities(
            end - first, width * vector, moved(k.data, start * k.row), k.row, k.step, n, sizes.D, moved(qt, here),
            scale, moved(tile.added, start * tile.row + here), tile.row, moved(norms, here), block,
            moved(of_part, here), p_row,
        )  # fmt: skip
        gradient_tiles.fill(first, of_part, p_row, n, masked)
        gradient_tiles.fill(width - end, moved(of_part, end * vector), p_row, n, masked)


@device
def gradients_of_parts(value, gt, width, delta, p, ds, p_row, sizes, memory, at):
    """Write the gradients of the scores of a tile, part by part."""
    vector, nothing = sizes.lanes * memory.itemsize, memory.dtype.type(0)
    for number in range(2 * width - 1):
        start, n, first, end = edges.part_of(number, width, memory, at)
        here, there = first * vector, start * p_row
        gradient_tiles.score_gradients(
            end - first, width * vector, moved(value.data, start * value.row), value.row, value.step, n, sizes.Dv,
            moved(gt, here), moved(delta, here), moved(p, there + here), moved(ds, there + here), p_row,
        )  # fmt: skip
        gradient_tiles.fill(first, moved(ds, there), p_row, n, nothing)
        gradient_tiles.fill(width - end, moved(ds, there + end * vector), p_row, n, nothing)


@device
def score_gradients(
    head, settings, tile, row, rows, coarse, sizes, k, value, qt, gt, norms, delta, p, ds, p_row, memory, at
):  # fmt: skip
    """Write probabilities, as the output has used them, to p, and the gradients of scores to ds; 0 where masked.

    They are those of scores before score_mod, as what is added to them has.  Rows of k and value, and of p and ds,
    `p_row` bytes apart, are those of the tile; qt, gt, norms, of which some may be `coarse`, and delta are the row
    block's.  Cuts of the tile are left in memory, see `edges`, and how capped scores grow with what they were before.
    """
    n, width = tile.stop - tile.start, (rows + sizes.lanes - 1) // sizes.lanes
    block_row = width * sizes.lanes * memory.itemsize
    scores, functions, block = element(memory, at.scores), head.functions, sizes.block * memory.itemsize
    is_changed = functions.codes[SCORE] != 0
    growth, growth_row = element(memory, at.one), 0
    edges.cut(tile, width, not tile.edged, sizes, memory, at)
    plain = settings.softcap == 0 and is_plain(head) and not coarse
    if plain and tile.kept == FULL:
        gradient_tiles.probabilities(
            width, block_row, k.data, k.row, k.step, n, sizes.D, qt, settings.scale_2, tile.added, tile.row,
            norms, block, p, p_row,
        )  # fmt: skip
    elif plain:
        probabilities_of_parts(k, qt, tile, width, settings.scale_2, norms, block, p, p_row, sizes, memory, at)
    else:
        tiles.scores(width, k.data, k.row, k.step, n, sizes.D, qt, scores, k.data, 0)
        natural, unit = cap(settings, width * n, scores), base_2(settings, memory)
        if settings.softcap != 0:
            gradient_tiles.cap_growth(width, scores, n, element(memory, at.growth))
        if is_changed:
            natural, unit = settle(tile, width * n, natural, scores, memory), memory.dtype.type(LOG2_E)
            derivative, across = element(memory, at.derivative), width * sizes.lanes
            gradient_tiles.copy(scores, width * n, derivative)
            user_functions.run_score_pass(
                functions.codes, DERIVATIVE, functions.derivative, derivative, n, across, rows, 1, natural, head.b,
                head.h, row, tile.start,
            )  # fmt: skip
            user_functions.run_score_pass(
                functions.codes, SCORE, functions.score, scores, n, across, rows, 1, natural, head.b, head.h, row,
                tile.start,
            )  # fmt: skip
            growth, growth_row = derivative, block_row
        gradient_tiles.weights(width, scores, n, unit, tile.added, tile.row, norms, block, p, p_row)
    if settings.threshold == 0 and growth_row == 0:
        gradients_of_parts(value, gt, width, delta, p, ds, p_row, sizes, memory, at)
        return
    keep, keep_row = element(memory, at.one), 0
    if settings.threshold != 0:
        keep, keep_row = element(memory, at.keep), block_row
        pack.fill_lanes(keep, settings.gain, width * n)
        dropout.drop(width, keep, n, settings.threshold, settings.seed, head.b, head.h, row, tile.start)
    tiles.scores(width, value.data, value.row, value.step, n, sizes.Dv, gt, scores, value.data, 0)
    gradient_tiles.differentiate(width, scores, n, keep, keep_row, growth, growth_row, delta, p, ds, p_row)
