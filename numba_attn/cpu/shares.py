"""What a task of the forward pass computes, as row blocks, and what becomes of their states.

A share is some rows of a few heads that share keys.  Its blocks are the rows of one head after the other, cut into as
many as a block has lanes; or, where the rows are few, those of several heads are in one block, one head after the
other, so that no lanes are idle.  What one lane gets never depends on the others.
"""

from __future__ import annotations

from collections import namedtuple

from numba_attn.cpu import pack, plan, softmax
from numba_attn.cpu.jit import device
from numba_attn.cpu.pointers import address, holds_pairs, moved
from numba_attn.cpu.results import any_wanted, statistics_of, write_statistics
from numba_attn.cpu.row_block import divisor_of, kept_size, memory_map, rounded_sums, start_of_results, state_of
from numba_attn.cpu.score import element, matrix
from numba_attn.cpu.tuples import addressed

# The rows [first, end) of so many heads, of which `across` are in a block.
Share = namedtuple("Share", "heads across first end")
# A block: its first head, of those of the share, and how many; its first row, rows of each head, and rows in all.
Block = namedtuple("Block", "head heads row rows count")


evenly, heads_in_block = device(plan.evenly), device(plan.heads_in_block)


@device
def share_of(heads, first, end, alike, sizes):
    """Where heads are not `alike`, each has blocks of its own."""
    across = evenly(heads, heads_in_block(end - first, sizes.block)) if alike else 1
    return Share(heads, across, first, end)


@device
def blocks_of(share, sizes):
    if share.across > 1:
        return (share.heads + share.across - 1) // share.across
    return (share.end - share.first + sizes.block - 1) // sizes.block * share.heads


@device
def block_from(share, head, row, sizes):
    """The block that begins with that row of that head."""
    heads, rows = min(share.across, share.heads - head), min(sizes.block, share.end - row)
    return Block(head, heads, row, rows, rows * heads)


@device
def first_block(share, sizes):
    return block_from(share, 0, share.first, sizes)


@device
def next_block(share, block, sizes):
    row = block.row + sizes.block
    if row < share.end:
        return block_from(share, block.head, row, sizes)
    return block_from(share, block.head + share.across, share.first, sizes)


@device
def width_of(block, sizes):
    """Vectors of queries."""
    return (block.count + sizes.lanes - 1) // sizes.lanes


@device
def keep_states(share, sizes, memory, partial):
    """Copy all states but their queries, of a split of the keys, to its memory."""
    at = addressed(memory_map(sizes))
    size = kept_size(at, sizes)
    for i in range(blocks_of(share, sizes)):
        start = start_of_results(at, sizes, i)
        for j in range(size):
            partial[i * size + j] = memory[start + j]


@device
def join_states(share, sizes, memory, operands, partials):
    """The states of what all splits have come to, in the order of the keys."""
    at = addressed(memory_map(sizes))
    size, block = kept_size(at, sizes), first_block(share, sizes)
    kept, factors = element(memory, at.top), element(memory, at.correction)
    for i in range(blocks_of(share, sizes)):
        width, start, state = (
            width_of(block, sizes),
            start_of_results(at, sizes, i),
            state_of(memory, at, sizes, operands, i),
        )
        for j in range(size):
            memory[start + j] = partials[0, i * size + j]
        for s in range(1, partials.shape[0]):
            other = element(partials[s], i * size)
            of_lanes = moved(other, at.ot_rows * sizes.block * memory.itemsize)
            softmax.join(width, sizes.block * memory.itemsize, state.reference, of_lanes, kept, factors)
            softmax.add_weighed(width, state.ot, sizes.Dv + 1, kept, other, factors)
        block = next_block(share, block, sizes)


@device
def include_sinks(sinks, share, sizes, operands, memory):
    """Add a sink for each head, a logit in base 2, to the states."""
    at, block = addressed(memory_map(sizes)), first_block(share, sizes)
    for i in range(blocks_of(share, sizes)):
        width, state = width_of(block, sizes), state_of(memory, at, sizes, operands, i)
        include_sink(sinks, block, width, state, sizes.Dv + 1, operands, sizes, memory, at)
        block = next_block(share, block, sizes)


@device
def include_sink(sinks, block, width, state, summed, operands, sizes, memory, at):
    """The same for a block, of whose sums of values there are so many rows: whether these had to be corrected."""
    top, correction, unused = element(memory, at.top), element(memory, at.correction), element(memory, at.moments)
    of_lanes = element(memory, at.sums)
    put_sinks(sinks, block, width, memory, at.sums)
    softmax.challenge(width, of_lanes, state.reference, top)
    moves = softmax.move_reference(width, top, state.reference, state.best, state.total, state.moment, correction)
    if moves:
        softmax.rescale(width, state.ot, summed, correction)
    if holds_pairs(address(operands)):
        softmax.add_sinks(width, of_lanes, state.reference, rounded_sums(state, width, sizes), unused)
    softmax.add_sinks(width, of_lanes, state.reference, state.total, state.moment)
    return moves != 0


@device
def put_sinks(sinks, block, width, memory, start):
    """The sink of each lane's head, from `start` on in memory; lanes without a row have the last one's."""
    last = block.head + block.heads - 1
    pack.fill_lanes(element(memory, start), sinks[last], width)
    lane = start
    for head in range(block.head, last):
        sink = sinks[head]
        for _ in range(block.rows):
            memory[lane] = sink
            lane += 1


@device
def write_results(arrays, sequences, settings, b, h, share, sizes, memory, written):
    """Normalise and write the rows of a share from head h on, unless they are, and their statistics.

    Returns whether every result is finite that was written here.
    """
    at, block, operands = addressed(memory_map(sizes)), first_block(share, sizes), arrays.operands
    finite, Dv = True, sizes.Dv
    for i in range(blocks_of(share, sizes)):
        width, state, first = width_of(block, sizes), state_of(memory, at, sizes, operands, i), h + block.head
        out, factors = matrix(arrays.out, sequences.offsets[b, 4], first), element(memory, at.top)
        divisor = divisor_of(state, width, settings, operands, sizes)
        if not written and pack.write_rows(
            width, state.ot, Dv, divisor, settings.gain, factors, moved(out.data, block.row * out.row),
            arrays.out.strides[0], out.row, out.step, block.rows, block.count,
        ):  # fmt: skip
            finite = False
        if any_wanted(statistics_of(arrays, sequences, b, first)):
            lane = start_of_results(at, sizes, i) + at.ot_rows * sizes.block
            for head in range(first, first + block.heads):
                statistics = statistics_of(arrays, sequences, b, head)
                for row in range(block.row, block.row + block.rows):
                    reference, total = memory[lane], memory[lane + sizes.block]
                    moment, best = memory[lane + 2 * sizes.block], memory[lane + 3 * sizes.block]
                    write_statistics(statistics, row, reference, total, moment, best)
                    lane += 1
        block = next_block(share, block, sizes)
    return finite
