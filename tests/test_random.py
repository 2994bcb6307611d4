"""The random numbers of dropout: those of the published algorithm, and the same whatever else is drawn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from numba_attn.random import kept, philox, threshold

# Counter, key and result, low words first: the known-answer vectors that are published with the algorithm.
KNOWN = {
    "zeros": ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    "ones": ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    "digits of pi": (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_answers(name: str) -> None:
    counter, key, words = KNOWN[name]
    result = philox(np.array(counter, np.uint32), key[0] | key[1] << 32)
    assert result.dtype == np.uint32
    assert result.tolist() == words


def test_many_counters_at_once() -> None:
    counters = np.random.default_rng(0).integers(0, 1 << 32, (3, 5, 4), np.uint32)
    before = counters.copy()
    words = philox(counters, 123)
    assert words.shape == (3, 5, 4)
    for index in np.ndindex(3, 5):
        assert (words[index] == philox(counters[index], 123)).all()
    np.testing.assert_array_equal(counters, before)


def test_every_bit_of_counter_and_seed_counts() -> None:
    """A changed bit changes about half of the bits of the result."""
    start = philox(np.zeros(4, np.uint32), 0)
    changed = [philox(np.zeros(4, np.uint32), 1 << bit) for bit in range(64)]
    for word, bit in itertools.product(range(4), range(32)):
        counter = np.zeros(4, np.uint32)
        counter[word] = 1 << bit
        changed.append(philox(counter, 0))
    flipped = np.bitwise_count(np.array(changed) ^ start).sum(axis=1)
    assert flipped.min() > 32 and flipped.max() < 96 and abs(flipped.mean() - 64) < 2


@pytest.mark.parametrize(
    ("p", "expected"),
    [(0.0, 0), (0.5, 1 << 31), (0.25, 1 << 30), (2.0**-32, 1), (2.0**-40, 0), (1 - 2.0**-32, (1 << 32) - 1)],
)
def test_threshold(p: float, expected: int) -> None:
    assert threshold(p) == expected


def test_all_is_dropped_just_below_one() -> None:
    assert threshold(np.nextafter(1.0, 0.0)) == 1 << 32
    assert not kept(0, 0, (20, 30), float(np.nextafter(1.0, 0.0)), 3).any()


def test_nothing_is_dropped_at_zero() -> None:
    assert kept(0, 0, (20, 30), 0.0, 3).all()


def test_kept_words_are_where_they_are_said_to_be() -> None:
    """Key j of row i of head h of sequence b: word j % 4 of the block with counter (j // 4, i, h, b)."""
    b, h, seed, p = 3, 5, (7 << 32) + 9, 0.4
    which = kept(b, h, (6, 11), p, seed)
    assert which.shape == (6, 11) and which.dtype == bool
    for i, j in np.ndindex(which.shape):
        word = philox(np.array([j // 4, i, h, b], np.uint32), seed)[j % 4]
        assert which[i, j] == (int(word) >= p * 2.0**32)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_fraction(p: float) -> None:
    """Of all, of each row and of each column: within five standard deviations."""
    which = kept(1, 2, (400, 500), p, 42)
    for axis, n in ((None, which.size), (0, 400), (1, 500)):
        assert np.abs(which.mean(axis=axis) - (1 - p)).max() < 5 * np.sqrt(p * (1 - p) / n)


def test_neighbours_are_independent() -> None:
    x = kept(0, 0, (300, 400), 0.5, 1) - 0.5
    others = [x[:, 1:] * x[:, :-1], x[1:] * x[:-1], x[:, 4:] * x[:, :-4], x[1:, 1:] * x[:-1, :-1]]
    for where in ((0, 1, 1), (1, 0, 1), (0, 0, 2), (0, 0, 1 + (1 << 32))):
        others.append(x * (kept(*where[:2], x.shape, 0.5, where[2]) - 0.5))
    for product in others:
        assert abs(product.mean()) < 5 * 0.25 / np.sqrt(product.size)


def test_a_larger_problem_has_the_smaller_as_its_corner() -> None:
    large = kept(2, 3, (33, 47), 0.3, 8)
    for shape in ((1, 1), (5, 4), (33, 46), (20, 45), (0, 7), (7, 0)):
        np.testing.assert_array_equal(kept(2, 3, shape, 0.3, 8), large[: shape[0], : shape[1]])


def test_more_probability_drops_more_of_the_same() -> None:
    some, more = kept(0, 0, (50, 60), 0.2, 8), kept(0, 0, (50, 60), 0.3, 8)
    assert (some | ~more).all() and some.sum() > more.sum()
