"""The tasks of a gradient's pass: data and arithmetic, as `plan` is for the forward pass.

Bits depend on lengths and head sizes, and on the shape of an additive mask: never on threads, nor on what is wanted.
"""

from __future__ import annotations

import functools
from collections import namedtuple
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from numba_attn.cpu import target
from numba_attn.cpu.plan import WIDEST
from numba_attn.cpu.score import Call

# How the problem is cut: keys of a key tile, query rows of a row block, row blocks of a group, lanes of a vector.
Cut = namedtuple("Cut", "keys block blocks lanes")
# tasks (n, 10): sequence, key-value head, the first and the end of its groups of rows, the first row of its sums, the
# keys [low, high) they are of, of which the first may be there for its pair only, which head of all that is, and the
# query rows [low, high) of each head that its groups are of.  order (n, 1): the tasks, chain by chain.  chains (m, 2):
# the first and the end in that order of tasks that are done one after the other.  heads (h, 2): the first task and the
# end.  finished (h, 8): how many parts of each head are, in the first column.
Tables = namedtuple("Tables", "tasks order chains heads finished")

KEYS, MOST_BLOCKS = (144, 8) if target.ISA == "avx512" else (96, 4)  # of a tile, and of a group
# Bytes of the second-level cache for a group of rows: the larger, the fewer times all sums pass through that cache.
# Processors with AVX-512 have a megabyte of it or more, AMD's others half of one, and some a quarter.
GROUP = 1024 * (480 if target.ISA == "avx512" else 256 if target.NAME.startswith("znver") else 128)
PART_ROWS = 1024  # query rows of a part, or more: of a head there are MOST_PARTS
MOST_PARTS = 16
# Where parts of a mask are few, as all heads use them: as many chains of tasks, if each has so many query rows.
LEAST_CHAINS, CHAIN_ROWS = 4, 256
# Where it is small, so many chains, of which each adds to a copy of its own, if all copies have so many bytes at most.
COPIED_CHAINS, COPIED_BYTES = 16, 1 << 22


class Added(NamedTuple):
    """An additive mask with rows: what is added to, and whether each head has its own."""

    places: np.ndarray  # (B, Hkv), in the batch of copies, those of one part of the mask side by side
    by_heads: bool
    parts: int  # that the query rows of every head are cut into
    copies: int  # of each part of the mask's batch


def added_of(shape: tuple[int, ...], places: np.ndarray, Hkv: int, itemsize: int) -> Added:
    """For a mask of shape (places, heads, rows, keys), of whose batch the B sequences use those `places`."""
    batch, heads, rows, keys = shape
    few = min(-(-LEAST_CHAINS // max(batch * heads, 1)), rows // CHAIN_ROWS)
    parts = min(max(rows // PART_ROWS, few, 1), MOST_PARTS)
    # Each part of the batch is that of as many sequences, and their heads, which are numbered here.
    B = len(places)
    users, number = B // max(batch, 1), np.zeros((B, Hkv), np.int64)
    number[np.argsort(places, kind="stable"), :] = np.arange(B)[:, None] % max(users, 1)
    if heads == 1:
        users, number = users * Hkv, number * Hkv + np.arange(Hkv)
    fitting = COPIED_BYTES // max(batch * heads * rows * keys * itemsize, 1)
    copies = max(min(COPIED_CHAINS // max(batch * heads * parts, 1), fitting, users), 1)
    return Added(places[:, None] * copies + number * copies // max(users, 1), heads > 1, parts, copies)


@functools.lru_cache(maxsize=64)
def cut_of(D: int, Dv: int, itemsize: int) -> Cut:
    """Of head sizes alone: what is kept of a group of rows leaves room in cache for key tiles."""
    lanes = target.VECTOR_BYTES // itemsize
    block = WIDEST * lanes
    blocks = GROUP // (block * max(3 * D + 2 * Dv, 1) * itemsize)
    return Cut(keys=KEYS, block=block, blocks=max(1, min(blocks, MOST_BLOCKS)), lanes=lanes)


def tables_of(call: Call, cut: Cut, added: Added | None, in_chains: bool) -> Tables:
    """The tasks of every sequence and key-value head.

    With a mask `added`, those that use the same part of it are a chain, if so wanted; otherwise each is one.
    """
    (Hq, _, _), Hkv = call.arrays.q.shape, call.arrays.k.shape[0]
    group, settings = Hq // max(Hkv, 1), call.settings
    rows, blocks = cut.block * cut.blocks, -(-settings.Lq // cut.block)
    edges = () if added is None else tuple(blocks * i // added.parts * cut.block for i in range(added.parts + 1))
    parts: dict[tuple[int, ...], np.ndarray] = {}
    tasks = []
    for b, position in enumerate(map(tuple, call.sequences.intervals.tolist())):
        if position not in parts:
            parts[position] = parts_of(position, group, settings.left, settings.right, rows, edges)
        each = np.tile(parts[position], (Hkv, 1))
        each[:, 0], each[:, 1] = b, np.repeat(np.arange(Hkv), len(parts[position]))
        each[:, 7] = b * Hkv + each[:, 1]
        tasks.append(each)
    table = np.concatenate(tasks) if tasks else np.empty((0, 10), np.int64)
    lengths = table[:, 6] - table[:, 5]
    table[:, 4] = np.cumsum(lengths) - lengths
    heads = np.searchsorted(table[:, 7], np.arange(len(tasks) * Hkv)[:, None] + np.arange(2))
    order, chains = chains_of(table, added if in_chains else None)
    return Tables(table, order, chains, heads, np.zeros((len(heads), 8), np.int64))


def parts_of(
    position: tuple[int, ...], group: int, left: int, right: int, rows: int, edges: tuple[int, ...]
) -> np.ndarray:
    """The tasks, see Tables, of one key-value head of a sequence: offset, query and key length; `rows` of a group.

    Without `edges`, between which query rows are a task of all heads, parts go from head to head, alike in rows.
    """
    offset, Lq, Lk = position
    if edges:
        ranges = [(low, min(high, Lq)) for low, high in pairwise(edges) if low < min(high, Lq)]
        whole = [(0, group * -(-(high - low) // rows), low, high) for low, high in ranges]
    else:
        per_head = -(-Lq // rows)
        units = group * per_head
        parts = min(max(group * Lq // PART_ROWS, 1), MOST_PARTS) if units else 0
        whole = [(units * part // parts, units * (part + 1) // parts, 0, Lq) for part in range(parts)]
    table = np.zeros((len(whole), 10), np.int64)
    for task, (first, end, low_row, high_row) in zip(table, whole, strict=True):
        per_head = -(-(high_row - low_row) // rows)
        start, stop = low_row + first % per_head * rows, min(high_row, low_row + ((end - 1) % per_head + 1) * rows)
        if first // per_head != (end - 1) // per_head:
            start, stop = low_row, high_row  # of several heads
        low, high = max(0, start + offset - left - 1), min(Lk, stop + offset + right)
        task[2:4] = first, end
        task[5:7] = (low, high) if low < high else (0, 0)
        task[8:10] = low_row, high_row
    return table


def chains_of(tasks: np.ndarray, added: Added | None) -> tuple[np.ndarray, np.ndarray]:
    """The order of tasks and the chains of these, see Tables."""
    if added is None:
        return np.arange(len(tasks))[:, None], np.arange(len(tasks))[:, None] + np.arange(2)
    head = tasks[:, 1] if added.by_heads else np.zeros(len(tasks), np.int64)
    keys = tasks[:, 8], head, added.places[tasks[:, 0], tasks[:, 1]]
    order = np.lexsort(keys)  # stable
    place, shared, row = (x[order] for x in reversed(keys))
    new = (np.diff(place) != 0) | (np.diff(shared) != 0) | (np.diff(row) != 0)
    firsts = np.flatnonzero(np.concatenate([[len(tasks) > 0], new, [len(tasks) > 0]]))
    return order[:, None], np.stack([firsts[:-1], firsts[1:]], axis=1)


def rows_of_sums(tasks: np.ndarray) -> int:
    """Of the sums of all tasks together."""
    return int(tasks[-1, 4] + tasks[-1, 6] - tasks[-1, 5]) if len(tasks) else 0
