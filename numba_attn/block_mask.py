"""Masks that know which tiles of the scores they leave empty, and which full; and functions that make masks.

A mask function says whether query row i of head h of sequence b may attend to key j.  It is plain Python, compiled
when it is used: `numba_attn.cpu.user_functions` says what it may contain.

>>> mask = create_block_mask(and_masks(causal, sliding_window(200, 0)), Lq=1024, Lk=1024)
>>> mask
BlockMask(shape=(1, 1, 1024, 1024), block_size=(128, 128), sparsity=0.672)
>>> print(mask.show().replace(" ", "."))
+.......
++......
+++.....
.+++....
..+++...
...+++..
....+++.
.....+++
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from numba_attn import checks
from numba_attn.masks import UNBOUNDED

# What a mask leaves of a tile of scores.
EMPTY, PARTIAL, FULL = 0, 1, 2

MaskMod = Callable[..., Any]
_PARAMETERS = ("b", "h", "i", "j")


class TileLists(NamedTuple):
    """For every row of tiles, which of its tiles are of one kind."""

    counts: np.ndarray
    """(B, Hq, query tiles) int32: how many."""
    indices: np.ndarray
    """(B, Hq, query tiles, key tiles) int32: the key tiles that are, in ascending order, then those that are not."""


@dataclass(frozen=True, eq=False)
class BlockMask:
    """A mask given by a function, with what it leaves of every tile: empty tiles are skipped, full ones not masked.

    Made by `create_block_mask`.

    >>> mask = create_block_mask(causal, Lq=6, Lk=6, block_size=2)
    >>> mask.states[0, 0]
    array([[1, 0, 0],
           [2, 1, 0],
           [2, 2, 1]], dtype=uint8)
    """

    mask_mod: MaskMod
    """(b, h, i, j) -> whether query row i of head h of sequence b may attend to key j."""
    shape: tuple[int, int, int, int]
    """(B, Hq, Lq, Lk); B and Hq may be 1 for a mask that is the same for all of them."""
    block_size: tuple[int, int]
    """Query rows and keys of a tile."""
    states: np.ndarray
    """(B, Hq, query tiles, key tiles) uint8: EMPTY, PARTIAL or FULL."""

    def __post_init__(self) -> None:
        for name, numbers, count, low in (("shape", self.shape, 4, 0), ("block_size", self.block_size, 2, 1)):
            if not isinstance(numbers, tuple) or len(numbers) != count:
                raise TypeError(f"{name} must be a tuple of {count} integers, got {numbers!r}")
            for n in numbers:
                _at_least(name, n, low)
        B, Hq, Lq, Lk = self.shape
        expected = (B, Hq, -(-Lq // self.block_size[0]), -(-Lk // self.block_size[1]))
        if not isinstance(self.states, np.ndarray) or self.states.dtype != np.uint8:
            raise TypeError(f"states must be a uint8 array, got {checks.type_name(self.states)}")
        if self.states.shape != expected:
            raise ValueError(f"states must have shape {expected}, got {self.states.shape}")

    def shared(self, B: int, Hq: int) -> BlockMask:
        """The mask of so many sequences and heads: what is made for one of them is, with b or h of 0, that of all.

        >>> bool(create_block_mask(documents([[0, 0, 1]]), Lq=3, Lk=3).shared(4, 8).mask_mod(3, 7, 0, 1))
        True
        """
        if self.shape[:2] == (B, Hq):
            return self
        mask_mod = _of_first(checks.plain_function(self.mask_mod), int(self.shape[0] > 1), int(self.shape[1] > 1))
        return replace(self, mask_mod=mask_mod)

    @property
    def sparsity(self) -> float:
        """The fraction of the tiles that is empty.

        >>> create_block_mask(causal, Lq=4, Lk=4, block_size=2).sparsity
        0.25
        """
        return float(np.mean(self.states == EMPTY)) if self.states.size else 0.0

    @functools.cached_property
    def partial(self) -> TileLists:
        """The tiles in which the function decides for each element.

        >>> create_block_mask(causal, Lq=6, Lk=6, block_size=2).partial.counts
        array([[[1, 1, 1]]], dtype=int32)
        """
        return _lists(self.states == PARTIAL)

    @functools.cached_property
    def full(self) -> TileLists:
        """The tiles of which every element is attended to.

        >>> counts, indices = create_block_mask(causal, Lq=6, Lk=6, block_size=2).full
        >>> counts[0, 0], indices[0, 0, 2, :2]
        (array([0, 1, 2], dtype=int32), array([0, 1], dtype=int32))
        """
        return _lists(self.states == FULL)

    def to_dense(self, b: int = 0, h: int = 0) -> np.ndarray:
        """(Lq, Lk) bool: which keys each query of one head of one sequence may attend to; slow, in plain Python.

        >>> create_block_mask(causal, Lq=2, Lk=3).to_dense()
        array([[ True, False, False],
               [ True,  True, False]])
        """
        b, h = self._head(b, h)
        function, (_, _, Lq, Lk), (rows, keys) = checks.plain_function(self.mask_mod), self.shape, self.block_size
        dense = np.zeros((Lq, Lk), bool)
        for (row, column), state in np.ndenumerate(self.states[b, h]):
            tile = dense[row * rows : (row + 1) * rows, column * keys : (column + 1) * keys]
            if state == PARTIAL:
                for i, j in np.ndindex(tile.shape):
                    tile[i, j] = bool(function(b, h, row * rows + i, column * keys + j))
            elif state == FULL:
                tile[:] = True
        return dense

    def show(self, b: int = 0, h: int = 0) -> str:
        """The tiles of one head as text, a line for each row of them: " " empty, "+" partial, "#" full.

        >>> print(create_block_mask(prefix_lm(4), Lq=8, Lk=8, block_size=2).show().replace(" ", "."))
        ##..
        ##..
        ##+.
        ###+
        """
        b, h = self._head(b, h)
        return "\n".join("".join(" +#"[state] for state in row) for row in self.states[b, h])

    def _head(self, b: int, h: int) -> tuple[int, int]:
        for name, index, count in zip("bh", (b, h), self.shape, strict=False):
            if not 0 <= checks.integer(name, index) < count:
                raise ValueError(f"{name} must be between 0 and {count - 1}, got {index}")
        return int(b), int(h)

    def __repr__(self) -> str:
        return f"BlockMask(shape={self.shape}, block_size={self.block_size}, sparsity={self.sparsity:.3g})"


def create_block_mask(
    mask_mod: MaskMod,
    B: int = 1,
    Hq: int = 1,
    *,
    Lq: int,
    Lk: int,
    block_size: int | tuple[int, int] = (128, 128),
) -> BlockMask:
    """The mask that a function (b, h, i, j) -> bool gives, evaluated once for every element.

    B and Hq are 1 for a mask that is the same for all sequences, or heads: the function then gets b = 0, or h = 0.
    A tile is `block_size` (query rows, keys), or a square of that side; at the edges, only elements that exist count.
    The function must not depend on anything that changes later.

    >>> create_block_mask(lambda b, h, i, j: i - j < 2 << h, Hq=4, Lq=256, Lk=256, block_size=32)
    BlockMask(shape=(1, 4, 256, 256), block_size=(32, 32), sparsity=0.328)
    """
    sizes = {"B": B, "Hq": Hq, "Lq": Lq, "Lk": Lk}
    shape = tuple(_at_least(name, n, 1 if name in ("B", "Hq") else 0) for name, n in sizes.items())
    if isinstance(block_size, tuple | list):
        if len(block_size) != 2:
            raise ValueError(f"block_size must be an integer or a pair, got {block_size!r}")
        rows, keys = block_size
    else:
        rows = keys = block_size
    tile = _at_least("block_size", rows, 1), _at_least("block_size", keys, 1)
    _check_function("mask_mod", mask_mod)
    B, Hq, Lq, Lk = shape
    check_reach(mask_mod, B, Lq, Lk)

    from numba_attn.cpu import tile_states

    return BlockMask(mask_mod, (B, Hq, Lq, Lk), tile, tile_states.tile_states(mask_mod, (B, Hq, Lq, Lk), tile))


def _of_first(mask_mod: MaskMod, by_sequence: int, by_head: int) -> MaskMod:
    def of_first(b: Any, h: Any, i: Any, j: Any) -> Any:
        return mask_mod(b * by_sequence, h * by_head, i, j)

    return of_first


def _lists(chosen: np.ndarray) -> TileLists:
    order = np.argsort(~chosen, axis=-1, kind="stable")
    return TileLists(chosen.sum(axis=-1, dtype=np.int32), order.astype(np.int32))


def _at_least(name: str, x: Any, low: int) -> int:
    """An integer, no larger than what reaches over every array."""
    return min(checks.at_least(name, x, low), UNBOUNDED)


def _reaching(mask_mod: Any, B: int = UNBOUNDED, L: int = UNBOUNDED) -> MaskMod:
    """A function that has tables for so many sequences and positions, and says so."""
    mask_mod.reach = B, L
    return mask_mod


def _reach(mask_mod: Any) -> tuple[int, int]:
    return getattr(checks.plain_function(mask_mod), "reach", (UNBOUNDED, UNBOUNDED))


def check_reach(mask_mod: Any, B: int, Lq: int, Lk: int) -> None:
    """A ready-made mask must have something for each position that is not padding, as it would read beyond its end."""
    (sequences, positions), L = _reach(mask_mod), max(Lq, Lk)
    if sequences < B:
        raise ValueError(f"mask_mod was made for {sequences} sequences, got a problem of {B}")
    if positions < L and Lq and Lk:
        raise ValueError(f"mask_mod was made for {positions} positions, got a problem of Lq = {Lq} and Lk = {Lk}")


def _check_function(name: str, function: Any) -> None:
    expected = ", ".join(_PARAMETERS)
    python = checks.plain_function(function)
    if not hasattr(python, "__code__"):
        raise TypeError(f"{name} must be a Python or @njit function of ({expected}), got {checks.type_name(function)}")
    checks.parameters(name, python, _PARAMETERS)


# Combinations ---------------------------------------------------------------------------------------------------------


def and_masks(*mask_mods: MaskMod) -> MaskMod:
    """The mask of what all of some masks allow; every one of them is asked about every element.

    >>> mask = and_masks(causal, dilated(2))
    >>> [int(mask(0, 0, 4, j)) for j in range(6)]
    [1, 0, 1, 0, 1, 0]
    """
    return _combined("and_masks", _both, mask_mods)


def or_masks(*mask_mods: MaskMod) -> MaskMod:
    """The mask of what any of some masks allows; every one of them is asked about every element.

    >>> mask = or_masks(causal, prefix_lm(3))
    >>> [int(mask(0, 0, 0, j)) for j in range(6)]
    [1, 1, 1, 0, 0, 0]
    """
    return _combined("or_masks", _either, mask_mods)


def _combined(name: str, combine: Callable[[MaskMod, MaskMod], MaskMod], mask_mods: tuple[MaskMod, ...]) -> MaskMod:
    if not mask_mods:
        raise TypeError(f"{name} must be given at least one mask function")
    for mask_mod in mask_mods:
        _check_function("mask_mod", mask_mod)
    if len(mask_mods) == 1:
        return mask_mods[0]
    reaches = zip(*map(_reach, mask_mods), strict=True)
    return _reaching(functools.reduce(combine, mask_mods), *map(min, reaches))


# Without short circuits, which would keep compilers from evaluating several elements at once.


def _both(first: MaskMod, second: MaskMod) -> MaskMod:
    def both(b, h, i, j):  # type: ignore[no-untyped-def]
        return bool(first(b, h, i, j)) & bool(second(b, h, i, j))

    return both


def _either(first: MaskMod, second: MaskMod) -> MaskMod:
    def either(b, h, i, j):  # type: ignore[no-untyped-def]
        return bool(first(b, h, i, j)) | bool(second(b, h, i, j))

    return either


# Masks ----------------------------------------------------------------------------------------------------------------


def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
    """A query attends to its own position and those before it.

    >>> print(create_block_mask(causal, Lq=5, Lk=5, block_size=1).show().replace(" ", "."))
    #....
    ##...
    ###..
    ####.
    #####
    """
    return j <= i


def sliding_window(left: int | None, right: int | None) -> MaskMod:
    """A query attends from `left` positions before it to `right` after it, None for all of them.

    >>> print(create_block_mask(sliding_window(2, 1), Lq=6, Lk=6, block_size=1).show().replace(" ", "."))
    ##....
    ###...
    ####..
    .####.
    ..####
    ...###
    """
    before, after = (
        UNBOUNDED if n is None else _at_least(name, n, 0)
        for name, n in zip(("left", "right"), (left, right), strict=True)
    )

    def window(b, h, i, j):  # type: ignore[no-untyped-def]
        return (i - j <= before) & (j - i <= after)

    return window


def prefix_lm(prefix_length: Any) -> MaskMod:
    """Causal, but for a prefix to which every query attends; its length is an integer, or an array (B,) of them.

    >>> print(create_block_mask(prefix_lm(3), Lq=6, Lk=6, block_size=1).show().replace(" ", "."))
    ###...
    ###...
    ###...
    ####..
    #####.
    ######
    """
    if isinstance(prefix_length, np.ndarray):
        lengths = _integers("prefix_length", prefix_length, (1,))

        def prefixes(b, h, i, j):  # type: ignore[no-untyped-def]
            return (j < lengths[b]) | (j <= i)

        return _reaching(prefixes, B=len(lengths))
    length = _at_least("prefix_length", prefix_length, 0)

    def prefix(b, h, i, j):  # type: ignore[no-untyped-def]
        return (j < length) | (j <= i)

    return prefix


def documents(ids: Any) -> MaskMod:
    """A query attends to the keys of its own document, for sequences that are packed from several.

    `ids` says which document each position is of: integers (L,), or (B, L) for different ones in each sequence, with
    L at least as many as there are queries, and keys.

    >>> mask = documents(np.array([0, 0, 0, 1, 1, 2]))
    >>> print(create_block_mask(mask, Lq=6, Lk=6, block_size=1).show().replace(" ", "."))
    ###...
    ###...
    ###...
    ...##.
    ...##.
    .....#
    """
    numbers = _integers("ids", ids, (1, 2))
    if numbers.ndim == 1:

        def document(b, h, i, j):  # type: ignore[no-untyped-def]
            return numbers[i] == numbers[j]

        return _reaching(document, L=len(numbers))

    def document_of_sequence(b, h, i, j):  # type: ignore[no-untyped-def]
        return numbers[b, i] == numbers[b, j]

    return _reaching(document_of_sequence, *numbers.shape)


def global_local(n_global: int, window: int) -> MaskMod:
    """The first `n_global` positions attend to all and are attended to by all; the others up to `window` away.

    >>> print(create_block_mask(global_local(1, 1), Lq=6, Lk=6, block_size=1).show().replace(" ", "."))
    ######
    ###...
    ####..
    #.###.
    #..###
    #...##
    """
    count, reach = _at_least("n_global", n_global, 0), _at_least("window", window, 0)

    def is_global_or_local(b, h, i, j):  # type: ignore[no-untyped-def]
        return (i < count) | (j < count) | (abs(i - j) <= reach)

    return is_global_or_local


def dilated(step: int, window: int | None = None) -> MaskMod:
    """A query attends to positions that are a multiple of `step` away, no more than `window` where that is given.

    >>> print(create_block_mask(dilated(2, window=3), Lq=6, Lk=6, block_size=1).show().replace(" ", "."))
    #.#...
    .#.#..
    #.#.#.
    .#.#.#
    ..#.#.
    ...#.#
    """
    stride = _at_least("step", step, 1)
    reach = UNBOUNDED if window is None else _at_least("window", window, 0)

    def is_on_step(b, h, i, j):  # type: ignore[no-untyped-def]
        return (abs(i - j) % stride == 0) & (abs(i - j) <= reach)

    return is_on_step


def tree(parents: Any) -> MaskMod:
    """A node of a tree attends to itself and its ancestors, as in speculative decoding.

    `parents` are integers (L,): each node's parent, -1 for a root; L at least as many as there are queries, and keys.

    >>> print(create_block_mask(tree([-1, 0, 0, 1, 2, 2]), Lq=6, Lk=6, block_size=1).show().replace(" ", "."))
    #.....
    ##....
    #.#...
    ##.#..
    #.#.#.
    #.#..#
    """
    above = _integers("parents", parents, (1,))
    n = len(above)
    if n and not (above.min() >= -1 and above.max() < n):
        raise ValueError(f"parents must be between -1 and {n - 1}, got {above[(above < -1) | (above >= n)][0]}")
    is_ancestor = np.eye(n, dtype=bool)
    nodes, ancestor = np.arange(n), above
    for _ in range(n):  # one generation up each time
        nodes, ancestor = nodes[ancestor >= 0], ancestor[ancestor >= 0]
        is_ancestor[nodes, ancestor] = True
        ancestor = above[ancestor]
    if ancestor.size and (ancestor >= 0).any():
        raise ValueError("parents must not form a cycle")

    def descends(b, h, i, j):  # type: ignore[no-untyped-def]
        return is_ancestor[i, j]

    return _reaching(descends, L=n)


def _integers(name: str, x: Any, axes: tuple[int, ...]) -> np.ndarray:
    """A copy of integers, as int64."""
    numbers = checks.as_array(name, x)
    if numbers.dtype.kind not in "iu":
        if checks.beyond_64_bits(x):
            raise ValueError(f"{name} must be integers of 64 bits, got larger ones")
        raise TypeError(f"{name} must be integers, got {checks.type_name(x)} of {numbers.dtype}")
    if numbers.ndim not in axes:
        raise ValueError(f"{name} must have {' or '.join(map(str, axes))} axes, got shape {numbers.shape}")
    return numbers.astype(np.int64)
