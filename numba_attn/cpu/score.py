"""The scores of one row block and one key tile: which are wanted, and what they are.

What a mask, a block mask, ALiBi, causal, window and lengths do to a tile is gathered in one tile of numbers that are
added to base-2 scores, -inf where masked; what changes scores otherwise is done to the tile of scores in place.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable

from numba import types

from numba_attn.block_mask import EMPTY, FULL, PARTIAL
from numba_attn.cpu import amx, mask_tiles, softmax, target, tiles, user_functions
from numba_attn.cpu.blocks import LOG2_E
from numba_attn.cpu.jit import device
from numba_attn.cpu.mask_tiles import TRIM
from numba_attn.cpu.narrow import COMPUTED, STORED
from numba_attn.cpu.pointers import address, as_element, get, holds_pairs, moved, pointee_bytes
from numba_attn.cpu.stored import rows_of
from numba_attn.cpu.visible import BOOLEAN, Matrix, Position, glance, mask_tile, none_true, shrink, visible

# Head sizes, keys of a key tile, query rows of a row block, lanes of a vector, and, where these are of several keys,
# elements of a key in a tile of scores, else 0.
Sizes = namedtuple("Sizes", "D Dv keys block lanes stride")
# One head of one sequence: its matrices; how many bytes further the next head's mask is, 0 if it is the same; which it
# is; whether there are ALiBi slopes, and the address of its own, behind which are those of the next heads; its part of
# the block mask, user functions, and notes on its mask.
Head = namedtuple("Head", "q k v mask mask_head mask_kind position b h sloped slopes states functions notes")
# Where in a worker's memory it is noted what a mask leaves of each tile, -1 if nowhere, and how many tiles a row has.
Notes = namedtuple("Notes", "start columns")
NO_NOTES = Notes(-1, 0)
# Keys [start, stop) of a tile, what is added to their scores (`row` bytes from a key's vectors on), whether that is
# anything, and whether intervals of keys end within: `low` and `high`, in memory, tell where for each lane, counted
# from the start.
Tile = namedtuple("Tile", "start stop added row kept edged")
# Elements that come next: where they begin, and the bytes of each, 0 if they are not to be asked for.
Ahead = namedtuple("Ahead", "data size")

# The arrays of a call, (heads, rows, columns) of the first sequence.  lse, max_score and entropy are (heads, rows) and
# norms, see `results`, (heads, rows, 2), empty where not wanted; slopes (1 or B, Hq), sinks (Hq,) and states, see
# BlockMask, are empty where there are none.  operands is empty: its type is that of what products are made of, the
# element type, PAIRS or WORDS.
Arrays = namedtuple("Arrays", "q k v mask out lse max_score entropy norms slopes sinks states operands")
# offsets (B, 10): where in q, k, v, mask, out, statistics, the weights of keys and norms sequences start, in bytes;
# intervals (B, 3), see masks.KeyIntervals; numbers (n, 1): the sequences that are wanted; pages (B, n), see storage.
Sequences = namedtuple("Sequences", "offsets intervals numbers pages")
# The user's functions, compiled: codes (4,), of score_mod, mask_mod, that of the block mask and the derivative of
# score_mod, 0 where there is none; and what each has captured, see `user_functions`.
Functions = namedtuple("Functions", "codes score mask block derivative")
SCORE, MASK, BLOCK, DERIVATIVE = range(4)
# Numbers of a call; mask_kind as in narrow.MASKS; softcap, threshold, tile_rows and page_rows are 0 where there is no
# such thing; packed is whether sequences have no padding in the arrays; Lq and Lk are those of the longest sequence.
Settings = namedtuple(
    "Settings",
    "left right scale scale_2 softcap gain threshold seed tile_rows tile_keys mask_kind packed page_rows page_k page_v "
    "Lq Lk",
)

# All of these.
Call = namedtuple("Call", "arrays sequences functions settings")
# What a kernel is compiled for: a kind of element, an operand of the products, how keys and values are held.
Kinds = tuple[str, types.Type, str]
# A kernel that is ready for a call but for its arrays, and how to make it so for sequences of other lengths.
Run = Callable[[Arrays], None]
Cutting = Callable[[Sequences], Run]

ON_TILES = target.BFLOAT16 == "amx"
# Whether tiles are copied wherever they lie: rows in order are what processors foresee.  Where there are registers for
# many addresses, products ask for rows themselves, see `tiles`.
COPIES_TILES = not target.MANY_REGISTERS
PAIRED_COLUMNS = amx.NUMBERS if ON_TILES else 2


@device
def element(memory, index):
    return moved(address(memory), index * memory.itemsize)


@device
def matrix(array, b_offset, h):
    """Head h of the sequence that starts `b_offset` bytes after an array's first element."""
    return Matrix(moved(address(array), b_offset + h * array.strides[0]), array.strides[1], array.strides[2])


@device
def head_of(arrays, sequences, functions, settings, b, h, notes):
    """Everything about head h of sequence b."""
    offsets, intervals = sequences.offsets, sequences.intervals
    mask, slopes, states = arrays.mask, arrays.slopes, arrays.states
    shared = h // (arrays.q.shape[0] // arrays.k.shape[0])
    # An axis of length 1 is broadcast: the same element for every index.
    mask_head = mask.strides[0] if mask.shape[0] > 1 else 0
    mask_row = mask.strides[1] if mask.shape[1] > 1 else 0
    mask_step = mask.strides[2] if mask.shape[2] > 1 else 0
    number = (b if slopes.shape[0] > 1 else 0) * slopes.shape[1] + h
    return Head(
        q=matrix(arrays.q, offsets[b, 0], h),
        k=rows_of(arrays.k, offsets[b, 1], shared, sequences.pages, b, settings.page_rows, settings.page_k),
        v=rows_of(arrays.v, offsets[b, 2], shared, sequences.pages, b, settings.page_rows, settings.page_v),
        mask=Matrix(moved(address(mask), offsets[b, 3] + h * mask_head), mask_row, mask_step),
        mask_head=mask_head,
        mask_kind=settings.mask_kind if mask.size > 0 else -1,
        position=Position(intervals[b, 0], intervals[b, 2], settings.left, settings.right),
        b=b,
        h=h,
        sloped=slopes.size > 0,
        slopes=moved(address(slopes), number * slopes.itemsize),
        states=states[b if states.shape[0] > 1 else 0, h if states.shape[1] > 1 else 0],
        functions=functions,
        notes=notes,
    )


@device
def head_after(head, arrays, n):
    """The head n after one that shares its keys, but for its queries."""
    states, h = arrays.states, head.h + n
    return Head(
        q=head.q,
        k=head.k,
        v=head.v,
        mask=Matrix(moved(head.mask.data, n * head.mask_head), head.mask.row, head.mask.step),
        mask_head=head.mask_head,
        mask_kind=head.mask_kind,
        position=head.position,
        b=head.b,
        h=h,
        sloped=head.sloped,
        slopes=moved(head.slopes, n * arrays.slopes.itemsize),
        states=states[head.b if states.shape[0] > 1 else 0, h if states.shape[1] > 1 else 0],
        functions=head.functions,
        notes=head.notes,
    )


@device
def rows_ahead(rows, first, following, columns):
    """The rows of an array from `first` on, to be asked for if they follow, and lie side by side."""
    size = pointee_bytes(rows.data)
    beside = rows.row == columns * size and rows.step == size and rows.page_rows == 0
    asked = following and beside
    return Ahead(moved(rows.data, first * rows.row if asked else 0), size if asked else 0)


@device
def is_plain(head):
    """Whether no function changes scores, so that they can be exponentiated where they are made."""
    return head.functions.codes[SCORE] == 0


@device
def select(head, settings, row, rows, heads, start, stop, even, sizes, memory, at):
    """The part of the keys [start, stop) that some of the rows [row, row + rows) may attend to, as a Tile.

    It begins at an `even` number of keys from start if so wanted: at a pair of keys.  The lanes are those rows of this
    head, and of `heads` - 1 after it.
    """
    tile = select_unsloped(head, settings, row, rows, heads, start, stop, even, sizes, memory, at)
    return slope(head, tile, row, rows, heads, sizes, memory, at)


@device
def across(count, sizes):
    """Elements of a key in a tile of `count` query rows."""
    return sizes.stride if sizes.stride != 0 else (count + sizes.lanes - 1) // sizes.lanes * sizes.lanes


@device
def vectors_of(tile, count, sizes):
    """How many vectors the scores of a tile of `count` rows are."""
    return ((tile.stop - tile.start) * across(count, sizes) + sizes.lanes - 1) // sizes.lanes


@device
def slope(head, tile, row, rows, heads, sizes, memory, at):
    """The tile with what ALiBi adds to its scores."""
    if tile.kept == EMPTY or steepest(head, heads, memory) == 0:
        return tile
    count, bias = rows * heads, element(memory, at.bias)
    width, distance = (count + sizes.lanes - 1) // sizes.lanes, row + head.position.offset - tile.start
    mask_tiles.add_alibi(
        width, bias, tile.added, tile.row, tile.stop - tile.start, head.slopes, rows, count, across(count, sizes),
        distance,
    )  # fmt: skip
    return Tile(tile.start, tile.stop, bias, width * sizes.lanes * memory.itemsize, PARTIAL, tile.edged)


@device
def steepest(head, heads, memory):
    """The largest slope, of either sign, of this head's and those of the `heads` - 1 after it."""
    found = memory.dtype.type(0)
    for i in range(heads if head.sloped else 0):
        other = get(head.slopes, i * memory.itemsize)
        if abs(other) > abs(found):
            found = other
    return found


@device
def select_unsloped(head, settings, row, rows, heads, start, stop, even, sizes, memory, at):
    """What `select` does, but for ALiBi."""
    lanes, position = sizes.lanes, head.position
    bias, added, added_row = element(memory, at.bias), element(memory, at.zero), 0
    nothing = Tile(start, start, added, added_row, EMPTY, False)
    some_low, some_high, every_low, every_high = visible(row, row + rows, position)
    origin, start, stop = start, max(start, some_low), min(stop, some_high)
    if start >= stop:
        return nothing
    if even:
        start -= (start - origin) % 2
    width, stride = (rows * heads + lanes - 1) // lanes, across(rows * heads, sizes)
    row_bytes = width * lanes * memory.itemsize
    kept = of_block = FULL
    if settings.tile_rows:
        start, stop, of_block = shrink(
            head.states, settings.tile_rows, settings.tile_keys, row, row + rows, start, stop
        )
        if of_block == EMPTY:
            return nothing
        if even and (start - origin) % 2:
            start, of_block = start - 1, PARTIAL
    if head.mask_kind >= 0:
        start, stop, kept = left_by_mask(head, row, rows, heads, origin, start, stop, stride, sizes, memory, bias)
        if kept == EMPTY:
            return nothing
        if kept == PARTIAL:
            added, added_row = bias, row_bytes
    edged, n = start < every_low or stop > every_high, stop - start
    if edged or n * stride % lanes != 0:  # what is left of a vector is masked
        of_key, p = 0, row + position.offset
        for lane in range(width * lanes):
            memory[at.low + lane] = max(p - position.left, start) - start
            memory[at.high + lane] = max(min(p + position.right + 1, stop), start) - start
            of_key, p = next_lane(of_key, p, row + position.offset, rows, rows * heads, stride)
        low, high = element(memory, at.low), element(memory, at.high)
        mask_tiles.mask_outside(
            width, bias, added, added_row, n, stride, low, high, every_low - start, every_high - start
        )
        added, added_row, kept = bias, row_bytes, PARTIAL
    functions = head.functions
    if functions.codes[MASK] != 0:
        user_functions.run_mask_pass(
            functions.codes, MASK, functions.mask, bias, added_row == 0, n, stride, rows, heads, head.b, head.h, row,
            start,
        )  # fmt: skip
        added, added_row, kept = bias, row_bytes, PARTIAL
    if of_block == PARTIAL:
        user_functions.run_mask_pass(
            functions.codes, BLOCK, functions.block, bias, added_row == 0, n, stride, rows, heads, head.b, head.h, row,
            start,
        )  # fmt: skip
        added, added_row, kept = bias, row_bytes, PARTIAL
    return Tile(start, stop, added, added_row, kept, edged)


@device
def next_lane(lane, p, first, rows, count, stride):
    """The lane of a key behind one, and where its row stands, of `rows` of each head from the first one's place on."""
    if lane + 1 == stride:
        return 0, first
    if lane + 1 >= count:
        return lane + 1, p
    return lane + 1, p + 1 if p + 1 < first + rows else first


@device
def left_by_mask(head, row, rows, heads, origin, start, stop, stride, sizes, memory, bias):
    """Which of the keys [start, stop) of the tile from `origin` on the mask leaves to rows, and how much of them.

    If it is a part, the mask's tile is written to `bias`.  What is noted, if heads have the same mask, is not looked
    for again: a note is 1 + how much + 4 * (start + 512 * stop), from the origin; 0 where there is none.
    """
    mask, kind, notes = head.mask, head.mask_kind, head.notes
    noted, at = 0, notes.start + row // sizes.block * notes.columns + origin // sizes.keys
    if notes.columns > 0:
        noted = int(memory[at])
    if noted > 0:
        start, stop = origin + noted // 4 % 512, origin + noted // 2048
    here, n = Matrix(moved(mask.data, row * mask.row + start * mask.step), mask.row, mask.step), stop - start
    to_head, seen = head.mask_head, heads if head.mask_head != 0 else 1
    kept = noted % 4 - 1 if noted > 0 else glance(here, kind, rows, to_head, seen, n)
    if kept == PARTIAL:
        if noted == 0:
            while n > TRIM and none_true(here, kind, rows, to_head, seen, n - TRIM):
                n -= TRIM
            while n > TRIM and none_true(here, kind, rows, to_head, seen, 0):
                start, n = start + TRIM, n - TRIM
                here = Matrix(moved(here.data, TRIM * mask.step), mask.row, mask.step)
        kept = mask_tile(here, kind, rows, to_head, heads, n, stride, sizes.lanes, bias)
    stop = start + n
    if notes.columns > 0 and noted == 0:
        memory[at] = 1 + kept + 4 * (start - origin + 512 * (stop - origin))
    return start, stop, kept


@device
def is_narrow(matrix):
    """Whether a matrix holds 16-bit numbers, which are widened a tile at a time."""
    return pointee_bytes(matrix.data) == 2


@device
def columns_of(D, operands):
    """Columns of keys that are copied: D, filled up with zeros to whole pairs or rows of tile registers."""
    if not holds_pairs(address(operands)):
        return D
    return (D + PAIRED_COLUMNS - 1) // PAIRED_COLUMNS * PAIRED_COLUMNS


@device
def copies_keys(k, D, operands):
    """Whether keys have to be copied, a tile at a time, for the products."""
    if holds_pairs(address(operands)):
        return ON_TILES or not is_narrow(k) or k.step != 2 or D % 2 != 0
    return is_narrow(k)


@device
def keys_of(k, start, first, copied, D, operands, copying):
    """The keys from `start` on: in place, or where those from `first` on have been copied to."""
    if copying:
        size = 2 if holds_pairs(address(operands)) else operands.itemsize
        row = columns_of(D, operands) * size
        return Matrix(moved(copied, (start - first) * row), row, operands.itemsize)
    step = 4 if holds_pairs(address(operands)) else k.step
    return Matrix(as_element(moved(k.data, start * k.row), operands), k.row, step)


@device
def score(head, k, ahead, settings, tile, row, rows, heads, sizes, qt, scores, memory, at):
    """Write the scores of a tile, of keys k; by what they are to be multiplied to be of base 2.

    Keys that are `ahead` are asked for.
    """
    n, width = tile.stop - tile.start, (rows * heads + sizes.lanes - 1) // sizes.lanes
    tiles.scores(width, k.data, k.row, k.step, n, sizes.D, qt, scores, ahead.data, ahead.size)
    return change(head, settings, tile, row, rows, heads, sizes, scores, memory, at)


@device
def change(head, settings, tile, row, rows, heads, sizes, scores, memory, at):
    """Cap products, and let a function change them; by what they are to be multiplied to be scores of base 2."""
    vectors = vectors_of(tile, rows * heads, sizes)
    functions, natural = head.functions, cap(settings, vectors, scores)
    if functions.codes[SCORE] != 0:
        natural = settle(tile, vectors, natural, scores, memory)
        user_functions.run_score_pass(
            functions.codes, SCORE, functions.score, scores, tile.stop - tile.start, across(rows * heads, sizes), rows,
            heads, natural, head.b, head.h, row, tile.start,
        )  # fmt: skip
        return memory.dtype.type(LOG2_E)
    return base_2(settings, memory)


@device
def cap(settings, vectors, scores):
    """Cap products, if that is wanted; by what they are to be multiplied to be scores."""
    if settings.softcap == 0:
        return settings.scale
    softmax.cap(vectors, scores, settings.scale, settings.softcap)
    return settings.softcap


@device
def base_2(settings, memory):
    """By what products are to be multiplied that have been through `cap`, to be scores of base 2."""
    return settings.scale_2 if settings.softcap == 0 else settings.softcap * memory.dtype.type(LOG2_E)


@device
def adds_numbers(head, tile):
    """Whether what is added to scores does more than mask them."""
    return tile.row != 0 and (head.sloped or head.mask_kind > BOOLEAN)


@device
def is_settled(head, tile):
    """Whether a score_mod gets scores that include numbers that are added to them, of which nothing is left then."""
    return head.functions.codes[SCORE] != 0 and adds_numbers(head, tile)


@device
def settle(tile, vectors, natural, scores, memory):
    """Include what is added to scores in them, for a score_mod; by what they are to be multiplied to be scores.

    What is masked stays in the tile of what is added, and has a score of 0.
    """
    if tile.row == 0:
        return natural
    softmax.settle(vectors, scores, natural, tile.added)
    return memory.dtype.type(1)


def call_types(kind: str, operand: types.Type, held: str) -> tuple[types.Type, ...]:
    """The types of Arrays, Sequences, Functions and Settings, for a kind of element and an operand, see `narrow`.

    Keys and values are `held` as another kind, if they are quantised.
    """
    element_type = COMPUTED[kind]
    given, keys = (types.Array(STORED[name], 3, "A", readonly=True, aligned=False) for name in (kind, held))
    mask = types.Array(types.uint8, 3, "A", readonly=True)
    written, rows = types.Array(STORED[kind], 3, "A", aligned=False), types.Array(element_type, 2, "A")
    states, operands = types.Array(types.uint8, 4, "A", readonly=True), types.Array(operand, 1, "C")
    slopes, sinks = (types.Array(element_type, ndim, "C") for ndim in (2, 1))
    norms = types.Array(element_type, 3, "C")
    arrays = [given, keys, keys, mask, written, rows, rows, rows, norms, slopes, sinks, states, operands]
    table = types.Array(types.int64, 2, "C", readonly=True)
    settings = [types.int64] * 2 + [element_type] * 4 + [types.int64] * 11
    return (
        types.NamedTuple(arrays, Arrays),
        types.NamedUniTuple(table, 4, Sequences),
        types.NamedTuple([types.Array(types.intp, 1, "C"), *[types.Array(types.int64, 1, "C")] * 4], Functions),
        types.NamedTuple(settings, Settings),
    )
