"""Block masks: the states of tiles against brute force, ready-made masks against NumPy, combinations, errors."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest

from numba_attn import attention_weights, scaled_dot_product_attention
from numba_attn.block_mask import (
    EMPTY,
    FULL,
    PARTIAL,
    BlockMask,
    and_masks,
    causal,
    create_block_mask,
    dilated,
    documents,
    global_local,
    or_masks,
    prefix_lm,
    sliding_window,
    tree,
)
from numba_attn.cpu import tile_states
from numba_attn.reference import dense

RNG = np.random.default_rng(0)
IDS = np.sort(RNG.integers(0, 6, 64))
PARENTS = np.array([-1] + [int(RNG.integers(-1, n)) for n in range(1, 64)])


def brute_force(attended: np.ndarray, rows: int, keys: int) -> np.ndarray:
    """The states of the tiles of a (Lq, Lk) bool array."""
    tiles = [
        [attended[i : i + rows, j : j + keys] for j in range(0, attended.shape[1], keys)]
        for i in range(0, attended.shape[0], rows)
    ]
    return np.array([[FULL if t.all() else PARTIAL if t.any() else EMPTY for t in row] for row in tiles], np.uint8)


def evaluated(function: Callable[..., Any], Lq: int, Lk: int, b: int = 0, h: int = 0) -> np.ndarray:
    return np.array([[bool(function(b, h, i, j)) for j in range(Lk)] for i in range(Lq)])


def check(function: Callable[..., Any], expected: np.ndarray, block_size: Any = (16, 8)) -> BlockMask:
    """The function gives what is expected, and the mask has its states, and is what it is made of."""
    Lq, Lk = expected.shape
    python = getattr(function, "py_func", function)
    np.testing.assert_array_equal(evaluated(python, Lq, Lk), expected)
    mask = create_block_mask(function, Lq=Lq, Lk=Lk, block_size=block_size)
    assert mask.states.dtype == np.uint8
    np.testing.assert_array_equal(mask.states[0, 0], brute_force(expected, *mask.block_size))
    np.testing.assert_array_equal(mask.to_dense(), expected)
    return mask


def ancestors(parents: np.ndarray, i: int) -> set[int]:
    found = {i}
    while parents[i] >= 0:
        i = int(parents[i])
        found.add(i)
    return found


# Queries down, keys across.
I, J = np.ogrid[:50, :61]  # noqa: E741
READY_MADE: dict[str, tuple[Callable[..., Any], np.ndarray]] = {
    "causal": (causal, I >= J),
    "window": (sliding_window(7, 3), (J >= I - 7) & (J <= I + 3)),
    "window open to the left": (sliding_window(None, 3), J <= I + 3),
    "window open to the right": (sliding_window(0, None), J >= I),
    "window open": (sliding_window(None, None), (I >= 0) & (J >= 0)),
    "prefix": (prefix_lm(20), (J < 20) | (J <= I)),
    "prefixes": (prefix_lm(np.array([20, 3])), (J < 20) | (J <= I)),
    "documents": (documents(IDS), IDS[I] == IDS[J]),
    "documents of a list": (documents(IDS.tolist()), IDS[I] == IDS[J]),
    "documents of a sequence": (documents(np.stack([IDS, IDS[::-1]])), IDS[I] == IDS[J]),
    "global and local": (global_local(5, 6), (I < 5) | (J < 5) | (np.abs(I - J) <= 6)),
    "dilated": (dilated(3), (I - J) % 3 == 0),
    "dilated window": (dilated(4, window=9), ((I - J) % 4 == 0) & (np.abs(I - J) <= 9)),
    "tree": (tree(PARENTS), np.array([[j in ancestors(PARENTS, i) for j in range(61)] for i in range(50)])),
    "and": (and_masks(causal, documents(IDS), dilated(2)), (I >= J) & (IDS[I] == IDS[J]) & ((I - J) % 2 == 0)),
    "and of one": (and_masks(causal), I >= J),
    "or": (or_masks(causal, documents(IDS), prefix_lm(4)), (I >= J) | (IDS[I] == IDS[J]) | (J < 4)),
    "and of or": (and_masks(or_masks(causal, prefix_lm(9)), documents(IDS)), ((I >= J) | (J < 9)) & (IDS[I] == IDS[J])),
    "of two documents": (
        and_masks(documents(IDS), documents(np.arange(64) // 10)),
        (IDS[I] == IDS[J]) & (I // 10 == J // 10),
    ),
    "compiled": (numba.njit(lambda b, h, i, j: i > j), I > J),
    "of integers": (and_masks(lambda b, h, i, j: i & 2, lambda b, h, i, j: j & 1), (I & 2 > 0) & (J & 1 > 0)),
}


@pytest.mark.parametrize("name", READY_MADE)
def test_masks(name: str) -> None:
    check(*READY_MADE[name])


@pytest.mark.parametrize(("Lq", "Lk"), [(1, 1), (1, 40), (40, 1), (32, 32), (33, 31), (50, 61)])
@pytest.mark.parametrize("block_size", [1, 7, (16, 32), (128, 128), (3, 100)])
def test_sizes(Lq: int, Lk: int, block_size: Any) -> None:
    check(READY_MADE["window"][0], READY_MADE["window"][1][:Lq, :Lk], block_size)


def test_tiles_at_the_edge_are_full_without_the_elements_beyond() -> None:
    mask = create_block_mask(lambda b, h, i, j: (i < 10) & (j < 11), Lq=10, Lk=11, block_size=8)
    assert (mask.states == FULL).all()


@pytest.mark.parametrize(("Lq", "Lk"), [(0, 9), (9, 0), (0, 0)])
def test_nothing_to_mask(Lq: int, Lk: int) -> None:
    mask = create_block_mask(causal, B=2, Lq=Lq, Lk=Lk, block_size=4)
    assert mask.states.shape == (2, 1, -(-Lq // 4), -(-Lk // 4))
    assert mask.to_dense(1).shape == (Lq, Lk)
    assert mask.sparsity == 0
    assert mask.partial.counts.shape == mask.states.shape[:3]
    assert mask.full.indices.shape == mask.states.shape
    assert mask.show() == "\n".join([""] * mask.states.shape[2])


def test_sequences_and_heads() -> None:
    lengths = np.array([3, 30])

    def function(b, h, i, j):
        return (j < lengths[b]) & (i - j <= 4 << h)

    mask = create_block_mask(function, 2, 3, Lq=20, Lk=30, block_size=(4, 8))
    assert mask.shape == (2, 3, 20, 30)
    for b, h in np.ndindex(2, 3):
        expected = evaluated(function, 20, 30, b, h)
        np.testing.assert_array_equal(mask.states[b, h], brute_force(expected, 4, 8))
        np.testing.assert_array_equal(mask.to_dense(b, h), expected)
        np.testing.assert_array_equal(dense(mask, b, h), expected)


def test_captured_arrays_may_change_before() -> None:
    ids = np.zeros(30, int)
    function = and_masks(causal, lambda b, h, i, j: ids[i] == ids[j])
    check(function, I[:30] >= J[:, :30])
    ids[:] = np.arange(30) // 5
    check(function, (I[:30] >= J[:, :30]) & (I[:30] // 5 == J[:, :30] // 5))


def test_arrays_given_to_ready_made_masks_are_copied() -> None:
    ids = np.zeros(8, int)
    function = documents(ids)
    ids[:4] = 1
    assert function(0, 0, 0, 7)


def test_large_masks_are_made_by_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same states, with or without Numba's threads."""
    functions = [causal, and_masks(sliding_window(300, 10), documents(np.arange(1000) // 90))]
    together = [create_block_mask(f, Hq=2, Lq=1000, Lk=900, block_size=(64, 48)) for f in functions]
    monkeypatch.setattr(tile_states, "SERIAL_ELEMENTS", 1 << 40)
    for function, mask in zip(functions, together, strict=True):
        alone = create_block_mask(function, Hq=2, Lq=1000, Lk=900, block_size=(64, 48))
        np.testing.assert_array_equal(alone.states, mask.states)


def test_masks_made_at_the_same_time() -> None:
    expected = create_block_mask(causal, Lq=600, Lk=600, block_size=32).states
    made: list[np.ndarray] = []

    def make() -> None:
        made.extend(create_block_mask(causal, Lq=600, Lk=600, block_size=32).states for _ in range(10))

    threads = [threading.Thread(target=make) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 30
    assert all((states == expected).all() for states in made)


# What a mask tells ----------------------------------------------------------------------------------------------------


def test_lists_of_tiles() -> None:
    mask = create_block_mask(READY_MADE["global and local"][0], 1, 2, Lq=50, Lk=61, block_size=4)
    for kind, lists in ((PARTIAL, mask.partial), (FULL, mask.full)):
        assert lists.counts.dtype == lists.indices.dtype == np.int32
        for head in np.ndindex(1, 2):
            for row, states in enumerate(mask.states[head]):
                count, indices = lists.counts[head][row], lists.indices[head][row]
                np.testing.assert_array_equal(indices[:count], np.flatnonzero(states == kind))
                np.testing.assert_array_equal(indices[count:], np.flatnonzero(states != kind))


def test_description() -> None:
    mask = create_block_mask(sliding_window(4, 0), Lq=12, Lk=12, block_size=2)
    assert repr(mask) == "BlockMask(shape=(1, 1, 12, 12), block_size=(2, 2), sparsity=0.583)"
    assert mask.sparsity == 21 / 36
    assert mask.show() == "\n".join(["+     ", "#+    ", "+#+   ", " +#+  ", "  +#+ ", "   +#+"])


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mask_mod": 3}, TypeError, "mask_mod must be a Python or @njit function of (b, h, i, j), got int"),
        ({"mask_mod": lambda i, j: True}, TypeError, "mask_mod must take 4 arguments (b, h, i, j)"),
        ({"mask_mod": lambda *args: True}, TypeError, "mask_mod must take 4 arguments"),
        ({"mask_mod": lambda b, h, i, j: 1.0}, TypeError, "must return True or False, got float64"),
        ({"B": 0}, ValueError, "B must be 1 or more, got 0"),
        ({"Hq": -1}, ValueError, "Hq must be 1 or more, got -1"),
        ({"Lq": -1}, ValueError, "Lq must be 0 or more, got -1"),
        ({"Lk": 1.5}, TypeError, "Lk must be integers, got float"),
        ({"block_size": 0}, ValueError, "block_size must be 1 or more, got 0"),
        ({"block_size": (1, 2, 3)}, ValueError, "block_size must be an integer or a pair"),
        ({"block_size": (1, True)}, TypeError, "block_size must be integers, got bool"),
        ({"mask_mod": documents([0, 0, 1])}, ValueError, "made for 3 positions, got a problem of Lq = 4 and Lk = 4"),
        ({"mask_mod": tree([-1, 0])}, ValueError, "mask_mod was made for 2 positions"),
        ({"mask_mod": prefix_lm(np.array([3, 1])), "B": 3}, ValueError, "made for 2 sequences, got a problem of 3"),
        ({"mask_mod": and_masks(causal, documents([[0] * 5]), tree([-1] * 4)), "Lk": 5}, ValueError, "4 positions"),
        ({"mask_mod": or_masks(documents([[0] * 5]), causal), "B": 2}, ValueError, "made for 1 sequences"),
    ],
)
def test_errors_of_create_block_mask(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        create_block_mask(**{"mask_mod": causal, "Lq": 4, "Lk": 4, **arguments})


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: and_masks(), TypeError, "and_masks must be given at least one mask function"),
        (lambda: or_masks(causal, 3), TypeError, "mask_mod must be a Python or @njit function"),  # type: ignore[arg-type]
        (lambda: sliding_window(-1, None), ValueError, "left must be 0 or more, got -1"),
        (lambda: sliding_window(0, 1.5), TypeError, "right must be integers"),  # type: ignore[arg-type]
        (lambda: prefix_lm(-1), ValueError, "prefix_length must be 0 or more"),
        (lambda: prefix_lm(np.ones(2)), TypeError, "prefix_length must be integers"),
        (lambda: documents(np.ones(4)), TypeError, "ids must be integers, got numpy.ndarray of float64"),
        (lambda: documents(np.ones((1, 2, 3), int)), ValueError, "ids must have 1 or 2 axes, got shape (1, 2, 3)"),
        (lambda: global_local(-1, 2), ValueError, "n_global must be 0 or more"),
        (lambda: global_local(1, -2), ValueError, "window must be 0 or more"),
        (lambda: dilated(0), ValueError, "step must be 1 or more"),
        (lambda: tree([-1, 2]), ValueError, "parents must be between -1 and 1, got 2"),
        (lambda: tree([-2, 0]), ValueError, "parents must be between -1 and 1, got -2"),
        (lambda: tree([-1, 2**70]), ValueError, "parents must be integers of 64 bits, got larger ones"),
        (lambda: tree([1, 0]), ValueError, "parents must not form a cycle"),
        (lambda: documents([[1], [2, 3]]), ValueError, "ids must be an array: "),
        (lambda: documents(np.ma.array([0, 1], mask=[0, 1])), TypeError, "ids must not be a masked array"),
        (lambda: tree([-1, 1]), ValueError, "parents must not form a cycle"),
    ],
)
def test_errors_of_masks(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make()


def test_errors_of_what_a_mask_is_asked() -> None:
    mask = create_block_mask(causal, B=2, Lq=4, Lk=4)
    for method in (mask.show, mask.to_dense):
        with pytest.raises(ValueError, match="b must be between 0 and 1, got 2"):
            method(b=2)
        with pytest.raises(ValueError, match="h must be between 0 and 0, got -1"):
            method(h=-1)
        with pytest.raises(TypeError, match="h must be integers"):
            method(h=0.5)


def test_numbers_beyond_every_array() -> None:
    expected = evaluated(causal, 5, 5)
    check(and_masks(sliding_window(2**70, 0), global_local(2**64, 2**64), dilated(1, 2**70)), expected, 2**63)


def test_a_mask_function_has_tables_for_every_position() -> None:
    x = np.zeros((2, 1, 6, 4), np.float32)
    with pytest.raises(ValueError, match="made for 5 positions, got a problem of Lq = 6 and Lk = 6"):
        scaled_dot_product_attention(x, x, x, mask_mod=documents(np.zeros(5, int)))
    with pytest.raises(ValueError, match="made for 1 sequences, got a problem of 2"):
        scaled_dot_product_attention(x, x, x, mask_mod=and_masks(causal, documents(np.zeros((1, 6), int))))
    out = scaled_dot_product_attention(x, x, x, mask_mod=tree([-1] * 4), query_lengths=[4, 1], kv_lengths=3)
    assert out.shape == x.shape


def test_errors_of_states() -> None:
    for shape, tile in (((1, 4, 4), (2, 2)), ((1, 1, 4, 4), 2), ((1, 1, 4, 4), (2, 2, 2))):
        with pytest.raises(TypeError, match="must be a tuple of"):
            BlockMask(causal, shape, tile, np.zeros((1, 1, 2, 2), np.uint8))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="block_size must be 1 or more, got 0"):
        BlockMask(causal, (1, 1, 4, 4), (2, 0), np.zeros((1, 1, 2, 2), np.uint8))
    with pytest.raises(TypeError, match="states must be a uint8 array"):
        BlockMask(causal, (1, 1, 4, 4), (2, 2), np.zeros((1, 1, 2, 2)))
    with pytest.raises(ValueError, match=re.escape("states must have shape (1, 1, 2, 3), got (1, 1, 2, 2)")):
        BlockMask(causal, (1, 1, 4, 5), (2, 2), np.zeros((1, 1, 2, 2), np.uint8))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("Lq", [3, 20])
def test_what_is_made_for_one_is_that_of_all(Lq: int, backend: str) -> None:
    """The function of a mask of one sequence, or one head, is asked for that one alone: it knows no others."""
    rng = np.random.default_rng(6)
    query, key, value = (rng.standard_normal((3, 2, L, 8), dtype=np.float32) for L in (Lq, 30, 30))
    ids, per_head = rng.integers(0, 3, (1, 30)), np.array([4])
    masks = {
        "sequence": (create_block_mask(documents(ids), Hq=2, Lq=Lq, Lk=30, block_size=16), ids[0, :Lq, None] == ids[0]),
        "head": (
            create_block_mask(lambda b, h, i, j: j <= i + per_head[h], B=3, Lq=Lq, Lk=30, block_size=16),
            np.arange(30) <= np.arange(Lq)[:, None] + 4,
        ),
    }
    for name, (mask, allowed) in masks.items():
        options = {"block_mask": mask, "backend": backend}
        out = scaled_dot_product_attention(query, key, value, **options)
        expected = scaled_dot_product_attention(query, key, value, allowed, backend=backend)
        np.testing.assert_allclose(out, expected, atol=1e-6, err_msg=name)
        weights = attention_weights(query, key, **options)
        np.testing.assert_allclose(weights, attention_weights(query, key, allowed), atol=1e-6, err_msg=name)
