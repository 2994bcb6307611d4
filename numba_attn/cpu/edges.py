"""Tiles at the edges of what rows may attend to: causal, window and lengths end within them, for each row elsewhere.

Such a tile of keys is cut into parts, in each of which other vectors of queries attend to anything; the others are left
out of its products.  With W vectors there are 2 W - 1 parts, part j the keys [cuts[j], cuts[j + 1]): the first vector
alone, the first two, and so on to all of them, then all but the first, and so on to the last one alone.  What is left
out are probabilities of -0.0, which change no bit of any sum.
"""

from __future__ import annotations

from collections import namedtuple

from numba_attn.cpu import pack, softmax, tiles
from numba_attn.cpu.jit import device
from numba_attn.cpu.pointers import holds_pairs, moved
from numba_attn.cpu.score import element

STRIDE = 8  # keys by which parts are cut, so that they fill register tiles
# A part: its keys [start, start + n) of the tile, and its vectors [first, end) of the block.
Part = namedtuple("Part", "start n first end")


@device
def cut(tile, width, whole, sizes, memory, at):
    """Put the cuts of a tile in memory; all vectors are in one part if it is to stay whole."""
    n, lanes = tile.stop - tile.start, sizes.lanes
    memory[at.cuts], memory[at.cuts + 2 * width - 1] = 0, n
    for w in range(1, width):
        low = 0 if whole else min(n, int(memory[at.low + w * lanes])) // STRIDE * STRIDE
        memory[at.cuts + w] = low
    last = int(memory[at.cuts + width - 1])
    for w in range(width - 1):
        high = n if whole else int(memory[at.high + (w + 1) * lanes - 1])
        memory[at.cuts + width + w] = max(last, min(n, (high + STRIDE - 1) // STRIDE * STRIDE))


@device
def part_of(number, width, memory, at):
    """The part of that number."""
    start = int(memory[at.cuts + number])
    n = int(memory[at.cuts + number + 1]) - start
    return Part(start, n, max(0, number - width + 1), min(number + 1, width))


@device
def keys_of_vectors(first, end, width, memory, at):
    """Those vectors, of `width`, and the keys that any of them attends to, as a part."""
    start = int(memory[at.cuts + first])
    return Part(start, int(memory[at.cuts + width + end - 1]) - start, first, end)


@device
def exponentiate(k, ahead, tile, width, scale, state, scores, sizes, memory, at):
    """Exponentiate scores where they are made, of a tile with something added to them, part by part.

    The keys that are `ahead` are asked for with those that all rows attend to.  Returns whether that is done, see
    `tiles.probabilities`.
    """
    vector = sizes.lanes * memory.itemsize
    row, pairs = width * vector, holds_pairs(k.data)
    sums, top, moments = element(memory, at.sums), element(memory, at.top), element(memory, at.moments)
    pack.fill_lanes(top, memory.dtype.type(-float("inf")), width)
    pack.fill_lanes(sums, memory.dtype.type(0), width)
    for number in range(2 * width - 1):
        start, n, first, end = part_of(number, width, memory, at)
        if n == 0:
            continue
        asked = ahead.size if end - first == width else 0
        here, p = first * vector, moved(scores, (start // 2 if pairs else start) * row)
        tiles.biased_probabilities(
            end - first, row, moved(k.data, start * k.row), k.row, k.step, n, sizes.D, moved(state.qt, here), scale,
            moved(tile.added, start * tile.row + here), tile.row, moved(state.reference, here),
            moved(sums, here), moved(top, here), moved(p, here), moved(ahead.data, start * sizes.D * asked), asked,
        )  # fmt: skip
        tiles.mask_vectors(first, row, p, n, k.data)
        tiles.mask_vectors(width - end, row, moved(p, end * vector), n, k.data)
    return softmax.take_in(width, top, state.reference, state.best, state.total, sums, state.moment, moments, False)
