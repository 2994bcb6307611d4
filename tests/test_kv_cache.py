"""The cache against plain lists of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kv_tokens import DV, HKV, B, D, held, in_pieces, new, numbers, state, streaming
from tolerances import assert_accurate, same_bits

from numba_attn import KVCache, attention_with_kv_cache, kv_cache, scaled_dot_product_attention


def test_over_capacity_changes_nothing() -> None:
    cache = new(8)
    query, key, value = numbers(18, 5)
    cache.append(key, value, [2, 5, 0])
    before = state(cache)
    with pytest.raises(
        ValueError, match="key must fit in the cache: sequence 1 holds 5 tokens of at most 8, got 4 more"
    ):
        cache.append(key, value, [1, 4, 5])
    with pytest.raises(ValueError, match="sequence 1 holds 5 tokens of at most 8, got 5 more"):
        attention_with_kv_cache(query, cache, key, value)
    assert state(cache) == before
    cache.append(key, value, [5, 3, 5])
    assert cache.lengths.tolist() == [7, 8, 5]


def test_truncate_then_append() -> None:
    """Guessed tokens are taken back, and others come in their place."""
    query, key, value = numbers(19, 10)
    wrong = numbers(20, 4)
    cache = new()
    in_pieces(cache, (query, key, value), [6])
    attention_with_kv_cache(wrong[0], cache, wrong[1], wrong[2])
    cache.truncate(6)
    out = attention_with_kv_cache(query[:, :, 6:], cache, key[:, :, 6:], value[:, :, 6:])
    assert_accurate(out, None, query[:, :, 6:], key, value, is_causal=True, enable_gqa=True, query_offset=6)


@pytest.mark.parametrize(
    "indices",
    [[0, 1, 2, 3, 4, 5], [1, 0, 3, 4, 2, 5], [0] * 6, [5, 0, 0, 1, 3, 3], [1, 2, 3, 4, 5, 0], [1, 1, 0, 2, 5, 4]],
)
@pytest.mark.parametrize("ring", [False, True])
def test_reorder(indices: list[int], ring: bool) -> None:
    cache = KVCache(6, HKV, None if ring else 9, D, DV, **({"window": 3, "sinks": 2} if ring else {}))
    _, key, value = numbers(21, 7, batch=6)
    for i in range(7):
        cache.append(key[:, :, i : i + 1], value[:, :, i : i + 1], [int(i < n) for n in (0, 7, 3, 5, 6, 2)])
    cache.key[5, :, 2:] = np.nan
    before = [(*held(cache, b), cache.totals[b]) for b in range(6)]
    cache.reorder(np.array(indices, np.uint8))
    for b, a in enumerate(indices):
        assert all(same_bits(x, y) for x, y in zip((*held(cache, b), cache.totals[b]), before[a], strict=True))


def test_reorder_copies_only_what_is_held() -> None:
    cache = new(8)
    _, key, value = numbers(22, 3)
    cache.append(key, value, [3, 1, 2])
    cache.key[:, :, 3:] = 7.0
    cache.key[0, :, 3:] = 8.0
    cache.reorder([2, 0, 1])
    assert (cache.key[0, :, 3:] == 8).all() and (cache.key[1:, :, 3:] == 7).all()


def test_reset() -> None:
    cache = new(None, window=2, sinks=1)
    _, key, value = numbers(23, 2)
    for _ in range(3):
        cache.append(key, value)
    for sequences, totals in (([], [6, 6, 6]), (1, [6, 0, 6]), (np.array([2, 1]), [6, 0, 0]), (None, [0, 0, 0])):
        cache.reset(sequences)
        assert cache.totals.tolist() == totals
        assert cache.lengths.tolist() == [min(n, 3) for n in totals]


def test_memory_mapped_buffers(tmp_path: Path) -> None:
    shapes = [("key", (B, HKV, 16, D)), ("value", (B, HKV, 16, DV))]
    buffers = [np.memmap(tmp_path / name, np.float32, "w+", shape=shape) for name, shape in shapes]
    cache = new(16, buffers=tuple(buffers))
    arrays = numbers(24, 10)
    out = in_pieces(cache, arrays, [6, 1, 3])
    assert_accurate(out, None, *arrays, is_causal=True, enable_gqa=True)
    assert cache.key.base is not None and np.shares_memory(cache.key, buffers[0])
    for x in buffers:
        x.flush()
    again = np.memmap(tmp_path / "key", np.float32, "r", shape=(B, HKV, 16, D))
    assert same_bits(np.asarray(again)[:, :, :10], arrays[1])


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_buffers_that_are_tensors(quantize: str | None) -> None:
    torch = pytest.importorskip("torch")
    sizes, dtype = ((D, DV), torch.float32) if quantize is None else ((36, 36), torch.uint8)
    buffers = tuple(torch.zeros(B, HKV, 16, size, dtype=dtype) for size in sizes)
    cache, arrays = new(16, quantize=quantize, buffers=buffers), numbers(28, 10)
    out = in_pieces(cache, arrays, [6, 4])
    assert same_bits(out, in_pieces(new(16, quantize=quantize), arrays, [6, 4]))
    assert cache.key.ctypes.data == buffers[0].data_ptr() and buffers[1][:, :, :10].any()
    with pytest.raises(TypeError, match=r"buffers must be .*, got float64"):
        new(16, quantize=quantize, buffers=tuple(x.double() for x in buffers))


def test_indices_that_are_tensors() -> None:
    torch = pytest.importorskip("torch")
    cache = new()
    cache.append(KEY, VALUE, [2, 1, 0])
    cache.reorder(torch.tensor([1, 0, 1]))
    assert cache.lengths.tolist() == [1, 2, 1]
    cache.reset(torch.tensor(2))
    cache.reset(torch.tensor([1]))
    cache.reset(torch.tensor([]))
    assert cache.lengths.tolist() == [1, 0, 0]


def test_strided_buffers_and_tokens() -> None:
    """Rows before heads in memory, as in (B, L, H, D) arrays."""
    key, value = np.empty((B, 16, HKV, D), np.float32), np.empty((B, 16, HKV, DV), np.float32)
    cache = new(16, buffers=(key.swapaxes(1, 2), value.swapaxes(1, 2)))
    query, *tokens = (np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in numbers(25, 9))
    out = in_pieces(cache, (query, *tokens), [5, 4])
    assert_accurate(out, None, query, *tokens, is_causal=True, enable_gqa=True)
    assert same_bits(key[:, :9], tokens[0].swapaxes(1, 2))


def test_tokens_from_the_cache_itself() -> None:
    cache = new(None, window=4)
    _, key, value = numbers(26, 4)
    cache.append(key, value)
    cache.append(key[:, :, :2], value[:, :, :2])  # places 0 and 1 are positions 4 and 5
    cache.append(cache.key[::-1, :, 1:], cache.value[::-1, :, 1:])
    held_keys = np.concatenate([key[:, :, 1:2], key[::-1][:, :, [1, 2, 3]]], axis=2)
    assert cache.positions.tolist() == [[8, 5, 6, 7]] * B
    for b in range(B):
        assert same_bits(held(cache, b)[0], held_keys[b])


def test_what_a_cache_says_of_itself() -> None:
    cache = KVCache(2, 3, 4, 5, dtype=np.float16)
    assert repr(cache) == "KVCache(B=2, Hkv=3, capacity=4, D=5, Dv=5, dtype=float16, lengths=[0, 0])"
    assert "capacity=7, D=5, Dv=5, dtype=float32, window=4, sinks=3," in repr(KVCache(1, 1, 7, 5, window=4, sinks=3))
    assert cache.nbytes == 2 * 2 * 3 * 4 * 5 * 2
    assert cache.lengths.dtype == cache.totals.dtype == cache.positions.dtype == np.int64
    lengths = cache.lengths
    cache.append(*[np.ones((2, 3, 2, 5), np.float16)] * 2)
    assert lengths.tolist() == [2, 2]
    for view in (cache.lengths, cache.totals):
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1
    assert (cache.window, cache.sinks, cache.capacity, cache.dtype) == (None, 0, 4, np.float16)
    assert kv_cache.KVCache is KVCache


def test_ring_appends_and_cuts() -> None:
    cache = new(None, window=4, sinks=2)
    _, key, value = numbers(17, 7)
    with pytest.raises(
        ValueError, match=r"no longer than the window of 4 .* got 7 tokens for sequence 0, which holds 0"
    ):
        cache.append(key, value)
    cache.append(key[:, :, :6], value[:, :, :6])  # no more than there is room for
    cache.truncate([6, 3, 0])
    cache.append(key[:, :, :5], value[:, :, :5], [1, 0, 5])
    assert cache.totals.tolist() == [7, 3, 5]
    with pytest.raises(ValueError, match=r"lengths must stay .* got 5 for sequence 0, which holds 6 of 7 seen"):
        cache.truncate([5, 3, 5])
    cache.truncate([6, 1, 5])
    assert cache.totals.tolist() == [7, 1, 5] and cache.lengths.tolist() == [6, 1, 5]


# Errors ---------------------------------------------------------------------------------------------------------------

F = np.float32
BUFFER = np.zeros((1, 2, 8, 4), F)
FROZEN = np.zeros((1, 2, 8, 4), F)
FROZEN.flags.writeable = False


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((-1, 2, 8, 4), {}, ValueError, "B must be 0 or more, got -1"),
        ((1, 2.0, 8, 4), {}, TypeError, "Hkv must be integers, got float"),
        ((1, 2, None, 4), {}, TypeError, "capacity must be integers, got NoneType"),
        ((1, 2, 8, -4), {}, ValueError, "D must be 0 or more, got -4"),
        ((1, 2, 2**80, 4), {}, ValueError, f"capacity must be at most {2**63 - 1}, got {2**80}"),
        ((1, 2, None, 4), {"window": 2**80}, ValueError, f"window must be at most {2**63 - 1}, got {2**80}"),
        ((1, 2, 2**62, 4), {}, ValueError, rf"sizes must be .* got \(1, 2, {2**62}, 4\) and .* of float32: Maximum"),
        ((1, 2, 8, 4, "5"), {}, TypeError, "Dv must be integers, got str"),
        ((1, 2, 8, 4), {"window": 0}, ValueError, "window must be 1 or more, got 0"),
        ((1, 2, 8, 4), {"window": (4, 0)}, TypeError, "window must be integers, got tuple"),
        ((1, 2, 8, 4), {"window": 8, "sinks": -1}, ValueError, "sinks must be 0 or more, got -1"),
        ((1, 2, 8, 4), {"window": 8, "sinks": 1}, ValueError, r"capacity must be sinks \+ window = 9, or None, got 8"),
        ((1, 2, 8, 4), {"sinks": 1}, ValueError, "sinks must be 0 without a window, got 1"),
        ((1, 2, 8, 4), {"dtype": np.int32}, TypeError, "dtype must be float32, .* got <class 'numpy.int32'>"),
        ((1, 2, 8, 4), {"dtype": None}, TypeError, "dtype must be float32, .* got None"),
        ((1, 2, 8, 4), {"dtype": "nonsense"}, TypeError, "dtype must be float32, .* got 'nonsense'"),
        ((1, 2, 8, 4), {"dtype": ">f4"}, TypeError, "dtype must be float32, .* got '>f4'"),
        ((1, 2, 8, 4), {"buffers": BUFFER}, TypeError, "buffers must be a pair .* got numpy.ndarray"),
        ((1, 2, 8, 4), {"buffers": (BUFFER, [1])}, TypeError, "buffers must be a NumPy array, got list"),
        ((1, 2, 8, 4), {"buffers": (BUFFER, BUFFER)}, ValueError, "buffers must not share memory"),
        ((1, 2, 8, 4), {"buffers": (BUFFER, FROZEN)}, ValueError, "buffers must be writeable"),
        ((1, 2, 8, 5), {"buffers": (BUFFER, FROZEN)}, ValueError, r"buffers must have shapes \(1, 2, 8, 5\) and"),
        ((1, 2, 8, 4), {"buffers": (BUFFER.astype("e"),) * 2}, TypeError, "buffers must be float32, got float16"),
        ((1, 2, 8, 4), {"buffers": (BUFFER.astype(">f4"),) * 2}, TypeError, "buffers must be float32, got >f4"),
        ((1, 2, 8, 4), {"buffers": (np.broadcast_to(F(0), (1, 2, 8, 4)), BUFFER)}, ValueError, "writeable"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_caches(arguments: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        KVCache(*arguments, **options)


def test_buffers_that_overlap_themselves() -> None:
    x = np.lib.stride_tricks.as_strided(np.zeros(64, F), (1, 2, 8, 4), (0, 0, 16, 4))
    with pytest.raises(ValueError, match="buffers must not overlap themselves"):
        KVCache(1, 2, 8, 4, buffers=(x, BUFFER))


_, KEY, VALUE = numbers(27, 2)


@pytest.mark.parametrize(
    ("method", "argument", "error", "message"),
    [
        ("truncate", [1, 2, 0], ValueError, "lengths must be at most those held, got 2 for sequence 1, which holds 1"),
        ("truncate", [1, 1], ValueError, "lengths must be an integer or have shape"),
        ("truncate", -1, ValueError, "lengths must be between 0 and 32, got -1"),
        ("truncate", 33, ValueError, "lengths must be between 0 and 32, got 33"),
        ("truncate", 1.0, TypeError, "lengths must be integers"),
        ("reorder", [0, 1], ValueError, r"indices must have shape \(3,\), got \(2,\)"),
        ("reorder", [[0, 1, 2]], ValueError, r"indices must .* got shape \(1, 3\)"),
        ("reorder", [[0], [1, 2], []], ValueError, r"indices must be an integer or have shape \(3,\)"),
        ("reorder", np.ma.array([1, 0, 2], mask=[1, 0, 0]), TypeError, "indices must not be a masked array"),
        ("reorder", 1, ValueError, r"indices must have shape \(3,\), got \(\)"),
        ("reorder", [0, 1, 3], ValueError, "indices must be between 0 and 2, got 3"),
        ("reorder", [0, 1, -1], ValueError, "indices must be between 0 and 2, got -1"),
        ("reorder", [0.0, 1, 2], TypeError, "indices must be integers"),
        ("reorder", [0, 1, 2**70], ValueError, f"indices must be between 0 and 2, got {2**70}"),
        ("reset", 3, ValueError, "sequences must be between 0 and 2, got 3"),
        ("reset", [0, -1], ValueError, "sequences must be between 0 and 2, got -1"),
        ("reset", [True, False, False], TypeError, "sequences must be integers"),
        ("reset", [[0, 1]], ValueError, r"sequences must be an integer or have shape .* got shape \(1, 2\)"),
        ("reset", np.array([[0, 1]]), ValueError, r"sequences must be an integer or have shape .* got shape \(1, 2\)"),
        ("reset", np.ma.array([0, 1], mask=[1, 0]), TypeError, "sequences must not be a masked array"),
    ],
    ids=str,
)
def test_bad_changes_change_nothing(method: str, argument: Any, error: type[Exception], message: str) -> None:
    cache = new()
    cache.append(KEY, VALUE, [2, 1, 0])
    before = state(cache)
    with pytest.raises(error, match=message):
        getattr(cache, method)(argument)
    assert state(cache) == before


# Any sequence of changes ----------------------------------------------------------------------------------------------

Token = tuple[np.ndarray, np.ndarray]


class AgainstLists(RuleBasedStateMachine):
    """A cache beside a list of all tokens for each sequence, of which it may hold the sinks and the last only."""

    @initialize(ring=st.booleans(), size=st.integers(1, 6), sinks=st.integers(0, 2))
    def begin(self, ring: bool, size: int, sinks: int) -> None:
        self.window, self.sinks = (size, sinks) if ring else (None, 0)
        self.cache = new(None, window=size, sinks=sinks) if ring else new(2 * size)
        self.cache.key[:], self.cache.value[:] = np.nan, np.nan
        self.lists: list[list[Token]] = [[] for _ in range(B)]
        self.seed = 0

    def fits(self, counts: list[int]) -> bool:
        capacity = self.cache.capacity
        return all(
            len(tokens) + n <= capacity or (self.window is not None and n <= self.window)
            for tokens, n in zip(self.lists, counts, strict=True)
        )

    def extend(self, key: np.ndarray, value: np.ndarray, counts: list[int]) -> None:
        for b, n in enumerate(counts):
            self.lists[b] += [(key[b, :, i], value[b, :, i]) for i in range(n)]

    def fresh(self, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self.seed += 1
        return numbers(self.seed, n)

    @rule(counts=st.lists(st.integers(0, 5), min_size=B, max_size=B), same=st.booleans())
    def append(self, counts: list[int], same: bool) -> None:
        n = max(counts)
        counts = [n] * B if same else counts
        _, key, value = self.fresh(n)
        if self.fits(counts):
            self.cache.append(key, value, None if same else counts)
            self.extend(key, value, counts)
        else:
            with pytest.raises(ValueError, match="key must"):
                self.cache.append(key, value, counts)

    @rule(counts=st.lists(st.integers(0, 4), min_size=B, max_size=B), is_causal=st.booleans(), fails=st.booleans())
    def attend(self, counts: list[int], is_causal: bool, fails: bool) -> None:
        if not self.fits(counts):
            return
        query, key, value = self.fresh(max(counts))
        if fails:
            with pytest.raises(ValueError, match="scale"):
                attention_with_kv_cache(query, self.cache, key, value, counts=counts, scale=np.nan)
            return
        out = attention_with_kv_cache(query, self.cache, key, value, counts=counts, is_causal=is_causal)
        self.extend(key, value, counts)
        for b, n in enumerate(counts):
            total = len(self.lists[b])
            assert not out[b, :, n:].any()
            if n:
                k, v = (np.stack(x, axis=1) for x in zip(*self.lists[b], strict=True))
                mask = streaming(n, total, self.window or total, self.sinks)
                mask = mask if is_causal else np.repeat(self.kept(total)[None], n, axis=0)
                q = query[b, :, :n]
                expected = scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, backend="reference")
                np.testing.assert_allclose(out[b, :, :n], expected, rtol=0, atol=1e-5)

    def kept(self, total: int) -> np.ndarray:
        """(total,) which tokens of a sequence the cache holds."""
        position = np.arange(total)
        return (position < self.sinks) | (position >= total - (self.window or total))

    @rule(cut=st.lists(st.integers(0, 4), min_size=B, max_size=B))
    def truncate(self, cut: list[int]) -> None:
        lengths = [max(0, int(n) - c) for n, c in zip(self.cache.lengths, cut, strict=True)]
        wrapped = [len(tokens) > self.cache.capacity for tokens in self.lists]
        if any(w and n < held for w, n, held in zip(wrapped, lengths, self.cache.lengths, strict=True)):
            with pytest.raises(ValueError, match="dropped"):
                self.cache.truncate(lengths)
            return
        self.cache.truncate(lengths)
        self.lists = [x if w else x[:n] for x, w, n in zip(self.lists, wrapped, lengths, strict=True)]

    @rule(indices=st.lists(st.integers(0, B - 1), min_size=B, max_size=B))
    def reorder(self, indices: list[int]) -> None:
        self.cache.reorder(indices)
        self.lists = [list(self.lists[i]) for i in indices]

    @precondition(lambda self: any(self.lists))
    @rule(sequences=st.one_of(st.none(), st.integers(0, B - 1), st.lists(st.integers(0, B - 1), max_size=B)))
    def reset(self, sequences: Any) -> None:
        self.cache.reset(sequences)
        for b in range(B) if sequences is None else np.atleast_1d(np.asarray(sequences, int)):
            self.lists[b] = []

    @invariant()
    def holds_what_the_lists_do(self) -> None:
        assert self.cache.totals.tolist() == [len(tokens) for tokens in self.lists]
        for b, tokens in enumerate(self.lists):
            (positions,) = np.nonzero(self.kept(len(tokens)))
            assert self.cache.lengths[b] == len(positions)
            held_positions = self.cache.positions[b]
            assert sorted(held_positions[held_positions >= 0]) == positions.tolist()
            for got, which in zip(held(self.cache, b), (0, 1), strict=True):
                expected = [tokens[p][which] for p in positions]
                assert same_bits(got, np.stack(expected, axis=1) if expected else got[:, :0])


TestAgainstLists = AgainstLists.TestCase
TestAgainstLists.settings = settings(max_examples=60, stateful_step_count=25)
