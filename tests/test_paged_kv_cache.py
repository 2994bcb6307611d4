"""The cache of pages against plain lists of tokens."""

from __future__ import annotations

import copy
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kv_tokens import DV, HKV, D, numbers
from tolerances import same_bits

from numba_attn import storage
from numba_attn.kv_pools import Tokens
from numba_attn.paged_kv_cache import PagedKVCache

FORMS: list[tuple[Any, str | None]] = [(dtype, None) for dtype in (np.float32, np.float64, np.float16, "bfloat16")]
FORMS += [(dtype, form) for dtype in (np.float32, np.float16, "bfloat16") for form in storage.QUANTIZED]


def new(pages: int = 8, page_size: int = 4, **options: Any) -> PagedKVCache:
    """A pool of which every place has NaN, or bytes that come to it."""
    cache = PagedKVCache(pages, HKV, page_size, D, DV, **options)
    for x in (cache.key, cache.value):
        x[...] = 255 if cache.quantize else np.nan
    return cache


def tokens(seed: int, n: int, batch: int = 1, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    return numbers(seed, n, dtype, batch)[1:]


def filled(cache: PagedKVCache, *lengths: int, seed: int = 1) -> tuple[list[int], tuple[np.ndarray, np.ndarray]]:
    """Sequences of these lengths, and the tokens they were cut from."""
    ids = [cache.add() for _ in lengths]
    both = tokens(seed, max(lengths), len(lengths), cache.dtype)
    cache.batch(ids).append(*both, lengths)
    return ids, both


def bookkeeping(cache: PagedKVCache) -> tuple[Any, ...]:
    sequences = [(i, cache.length(i), cache.pages_of(i)) for i in cache.sequences]
    return sequences, sorted(cache._pool.free_pages), list(cache._pool.users), cache._pool._next


def state(cache: PagedKVCache) -> tuple[Any, ...]:
    return cache.key.tobytes(), cache.value.tobytes(), bookkeeping(cache)


def held(cache: PagedKVCache, sequence: int) -> tuple[np.ndarray, np.ndarray]:
    """(Hkv, length, D) and (Hkv, length, Dv)."""
    return cache.batch(sequence).storage().dense(0)


def read_back(x: np.ndarray, cache: PagedKVCache) -> np.ndarray:
    """Numbers as the cache gives them back."""
    if cache.quantize is None:
        return x
    return storage.dequantize(storage.quantize(x, cache.quantize), cache.quantize, x.shape[-1])


def assert_holds(cache: PagedKVCache, sequence: int, *pieces: tuple[np.ndarray, np.ndarray]) -> None:
    """Pieces are keys (Hkv, n, D) and values (Hkv, n, Dv)."""
    for got, arrays in zip(held(cache, sequence), zip(*pieces, strict=True), strict=True):
        assert same_bits(got, read_back(np.concatenate(arrays, axis=1), cache))


def piece(both: tuple[np.ndarray, np.ndarray], b: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    key, value = both
    return key[b, :, start:stop], value[b, :, start:stop]


@pytest.mark.parametrize(("dtype", "quantize"), FORMS, ids=str)
def test_tokens_come_back(dtype: Any, quantize: str | None) -> None:
    """In whole pages and parts of them, with NaN all around."""
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    cache = new(dtype=dtype, quantize=quantize)
    ids = [cache.add() for _ in range(3)]
    batch, both = cache.batch(ids), tokens(2, 11, 3, dtype)
    done = np.zeros(3, int)
    for counts in ([3, 0, 5], [1, 4, 0], [7, 1, 2]):
        n = max(counts)
        key, value = (np.full((3, HKV, n, size), np.nan, dtype) for size in (D, DV))
        for b, count in enumerate(counts):
            key[b, :, :count], value[b, :, :count] = piece(both, b, done[b], done[b] + count)
        batch.append(key, value, counts)
        done += counts
    assert batch.lengths.tolist() == done.tolist() == [11, 5, 7]
    for b, i in enumerate(ids):
        assert_holds(cache, i, piece(both, b, 0, done[b]))
    rows = batch.storage()
    assert (rows.Lk, rows.numbers, rows.D, rows.Dv) == (11, quantize, D, DV)
    for b in range(3):
        for got, x in zip(rows.dense(b), both, strict=True):
            assert same_bits(got[:, : done[b]], read_back(x[b, :, : done[b]], cache))


def test_pages_are_filled_one_by_one_and_taken_from_the_first() -> None:
    cache = new(9, 4)
    a, b, c = filled(cache, 5, 4, 1)[0]
    assert [cache.pages_of(i) for i in (a, b, c)] == [(0, 1), (2,), (3,)]
    cache.batch([c, a]).append(*tokens(3, 4, 2), counts=[4, 3])
    assert [cache.pages_of(i) for i in (a, b, c)] == [(0, 1), (2,), (3, 4)]
    cache.free([a, c])
    cache.batch(b).append(*tokens(4, 13))
    assert cache.pages_of(b) == (2, 0, 1, 3, 4)
    assert cache.free_pages == 4 and cache.pages_used == 5


def test_storage_of_a_batch() -> None:
    cache = new()
    a, b = filled(cache, 9, 2)[0]
    rows = cache.batch([b, a]).storage()
    assert rows.pages is not None and rows.pages.dtype == np.int64
    assert rows.pages.tolist() == [[3, 0, 0], [0, 1, 2]] and rows.Lk == 9
    assert np.shares_memory(rows.key, cache.key) and np.shares_memory(rows.value, cache.value)
    for sequences, shape in (([], (0, 0)), ([cache.add()], (1, 0))):
        rows = cache.batch(sequences).storage()
        assert rows.pages is not None and (rows.pages.shape, rows.pages.dtype, rows.Lk) == (shape, np.int64, 0)


def test_fork_shares_pages_until_one_writes() -> None:
    cache = new()
    (a,), prompt = filled(cache, 6)
    before = state(cache)
    b = cache.fork(a)
    assert state(cache)[:2] == before[:2]  # nothing is copied
    assert cache.pages_of(b) == cache.pages_of(a) == (0, 1) and cache.pages_used == 2
    more, other = tokens(5, 1), tokens(6, 1)
    cache.batch(b).append(*more)
    assert cache.pages_of(b) == (0, 2) and cache.pages_of(a) == (0, 1)
    cache.batch(a).append(*other)
    assert cache.pages_of(a) == (0, 1)  # by now its own
    assert_holds(cache, a, piece(prompt, 0, 0, 6), piece(other, 0, 0, 1))
    assert_holds(cache, b, piece(prompt, 0, 0, 6), piece(more, 0, 0, 1))


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_all_that_share_a_page_write_at_once(order: tuple[int, ...], quantize: str | None) -> None:
    """The one that has most of it keeps it, and nothing that others have is written over before it is copied."""
    cache = new(quantize=quantize)
    (a,), prompt = filled(cache, 7)
    ids, lengths = (a, cache.fork(a, 5), cache.fork(a, 6)), (7, 5, 6)
    more = tokens(7, 2, 3)
    batch = cache.batch([ids[i] for i in order])
    batch.append(*more)
    assert cache.pages_of(a)[:2] == (0, 1) and cache.pages_used == 5
    for b, i in enumerate(order):
        assert_holds(cache, ids[i], piece(prompt, 0, 0, lengths[i]), piece(more, b, 0, 2))


def test_what_is_shared_and_full_is_not_copied() -> None:
    cache = new()
    (a,), prompt = filled(cache, 6)
    b, c = cache.fork(a, 4), cache.fork(a, 0)
    more = tokens(8, 1, 2)
    cache.batch([b, c]).append(*more)
    assert [cache.pages_of(i) for i in (a, b, c)] == [(0, 1), (0, 2), (3,)]
    assert_holds(cache, b, piece(prompt, 0, 0, 4), piece(more, 0, 0, 1))
    assert_holds(cache, c, piece(more, 1, 0, 1))
    d = cache.fork(a)
    cache.batch([a, d]).append(*tokens(9, 1, 2), counts=0)
    assert cache.pages_of(a) == cache.pages_of(d) == (0, 1)


def test_a_copy_is_of_tokens_held_only() -> None:
    cache = new()
    (a,), _ = filled(cache, 3)
    b = cache.fork(a, 1)
    cache.key[1], cache.value[1] = 7, 7
    cache.batch(b).append(*tokens(10, 1))
    assert cache.pages_of(b) == (1,)
    assert (cache.key[1, :, 2:] == 7).all() and (cache.value[1, :, 2:] == 7).all()


def test_free_and_truncate_give_back_what_no_other_has() -> None:
    cache = new()
    (a, b), both = filled(cache, 9, 8)
    c = cache.fork(a, 5)
    cache.truncate([a, b], [4, 7])
    assert cache.pages_of(a) == (0,) and cache.pages_of(b) == (3, 4) and cache.pages_of(c) == (0, 1)
    assert cache.free_pages == 4
    cache.free(np.array([a], np.uint8))
    assert cache.sequences == (b, c) and len(cache) == 2 and cache.pages_used == 4
    cache.truncate(b, 0)
    assert cache.length(b) == 0 and cache.pages_of(b) == () and cache.pages_used == 2
    assert_holds(cache, c, piece(both, 0, 0, 5))
    cache.free(range(b, c + 1))
    assert cache.free_pages == 8 and cache.sequences == () and not any(cache._pool.users)
    assert cache.add() not in (a, b, c)


def test_truncated_into_a_shared_page() -> None:
    """What comes instead of the tokens that one has dropped is not written over those of the other."""
    cache = new()
    (a,), both = filled(cache, 8)
    b = cache.fork(a)
    cache.truncate(a, 6)
    more = tokens(11, 2)
    cache.batch(a).append(*more)
    assert cache.pages_of(a) == (0, 2)
    assert_holds(cache, a, piece(both, 0, 0, 6), piece(more, 0, 0, 2))
    assert_holds(cache, b, piece(both, 0, 0, 8))


def test_a_full_pool() -> None:
    cache = new(4, 4)
    (a,), _ = filled(cache, 10)
    b = cache.fork(a)
    both = cache.batch([a, b])
    before = state(cache)
    message = "key must fit in the cache: {} pages are needed, {} of them for copies of shared ones, and 1 are free"
    for batch, n, counts, needed, copies in (
        (both, 3, None, 3, 1),
        (both, 3, [3, 0], 2, 1),
        (cache.batch(b), 7, None, 3, 1),
        (cache.batch(cache.sequences), 2**40, [2**40, 1], 2**38 + 1, 1),
    ):
        key, value = (np.broadcast_to(np.float32(1), (batch.shape[0], HKV, n, size)) for size in (D, DV))
        for refused in (batch.append, batch.checked):
            with pytest.raises(ValueError, match=message.format(needed, copies)):
                refused(key, value, counts)
            assert state(cache) == before
    both.append(*tokens(12, 2, 2))  # one copies the page, the other has it to itself then
    assert cache.free_pages == 0
    with pytest.raises(ValueError, match="1 pages are needed, 0 of them for copies of shared ones, and 0 are free"):
        both.append(*tokens(13, 1, 2), counts=[0, 1])
    cache.free(a)
    cache.batch(b).append(*tokens(13, 4))
    assert cache.pages_of(b) in ((0, 1, 2, 3), (0, 1, 3, 2))


def test_tokens_that_no_longer_fit_when_they_are_written() -> None:
    cache = new(2, 4)
    a, b = cache.add(), cache.add()
    batch = cache.batch(a)
    checked = batch.checked(*tokens(14, 8), None)
    cache.batch(b).append(*tokens(15, 1))
    before = state(cache)
    with pytest.raises(ValueError, match="2 pages are needed, 0 of them for copies of shared ones, and 1 are free"):
        with batch.appended(checked):
            pass
    assert state(cache) == before


def test_appended_for_a_while() -> None:
    """Where the body raises everything is as before, the page that all write to included."""
    cache = new()
    (a, b), both = filled(cache, 7, 2)
    c = cache.fork(a, 5)
    batch, more = cache.batch([c, a, b]), tokens(16, 6, 3)
    before = bookkeeping(cache)

    def interrupted() -> None:
        with batch.appended(batch.checked(*more, [2, 6, 1])):
            assert batch.lengths.tolist() == batch.totals.tolist() == [7, 13, 3]
            assert_holds(cache, c, piece(both, 0, 0, 5), piece(more, 0, 0, 2))
            assert_holds(cache, a, piece(both, 0, 0, 7), piece(more, 1, 0, 6))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert bookkeeping(cache) == before
    for i, row, length in ((a, 0, 7), (b, 1, 2), (c, 0, 5)):
        assert_holds(cache, i, piece(both, row, 0, length))
    batch.append(*more, [2, 6, 1])
    for i, row, length, at, n in ((a, 0, 7, 1, 6), (b, 1, 2, 2, 1), (c, 0, 5, 0, 2)):
        assert_holds(cache, i, piece(both, row, 0, length), piece(more, at, 0, n))


def test_other_sequences_may_change_meanwhile() -> None:
    """A page that is copied for one of two is not free as long as the other may want it back."""
    cache = new(4, 4)
    (a,), both = filled(cache, 3)
    b = cache.fork(a)
    batch, more = cache.batch(b), tokens(17, 1)
    made = []

    def body() -> None:
        cache.free(a)
        made.extend([cache.add(), cache.fork(b)])
        cache.batch(made[0]).append(*tokens(18, 8))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        with batch.appended(batch.checked(*more, None)):
            body()
    c, d = made
    assert_holds(cache, b, piece(both, 0, 0, 3))
    assert_holds(cache, d, piece(both, 0, 0, 3), piece(more, 0, 0, 1))
    assert_holds(cache, c, piece(tokens(18, 8), 0, 0, 8))
    assert cache.pages_of(b) == (0,) and cache.free_pages == 0
    cache.free([b, c, d])
    assert cache.free_pages == 4 and not any(cache._pool.users)


def test_sequences_that_are_appended_to_do_not_change_meanwhile() -> None:
    cache = new()
    (a, b), _ = filled(cache, 3, 3)
    batch, more = cache.batch([a]), tokens(19, 1)
    with batch.appended(batch.checked(*more, None)):
        before = state(cache)
        for change in (
            lambda: cache.free([b, a]),
            lambda: cache.truncate([b, a], 1),
            lambda: cache.batch([b, a]).append(*tokens(20, 1, 2)),
        ):
            with pytest.raises(ValueError, match=r"sequences must not be changed while .* got 0"):
                change()
            assert state(cache) == before
    cache.truncate([b, a], 1)
    cache.free([b, a])


def test_a_batch_follows_the_cache() -> None:
    cache = new()
    (a, b), _ = filled(cache, 3, 6)
    batch = cache.batch([b, a])
    lengths = batch.lengths
    cache.truncate(b, 1)
    assert lengths.tolist() == [6, 3] and batch.lengths.tolist() == [1, 3]
    cache.free(a)
    message = "sequences must be held by the cache, got 0, which never was or has been freed"
    before = state(cache)
    for use in (lambda: batch.lengths, batch.storage, lambda: batch.append(*tokens(21, 1, 2)), lambda: repr(batch)):
        with pytest.raises(ValueError, match=message):
            use()
    assert state(cache) == before


def test_memory_mapped_buffers(tmp_path: Path) -> None:
    shapes = [("key", (8, HKV, 4, D)), ("value", (8, HKV, 4, DV))]
    buffers = [np.memmap(tmp_path / name, np.float32, "w+", shape=shape) for name, shape in shapes]
    cache = new(buffers=tuple(buffers))
    (a,), both = filled(cache, 6)
    cache.batch(cache.fork(a)).append(*tokens(22, 1))
    assert_holds(cache, a, piece(both, 0, 0, 6))
    assert np.shares_memory(cache.key, buffers[0])
    for x in buffers:
        x.flush()
    again = np.memmap(tmp_path / "value", np.float32, "r", shape=shapes[1][1])
    assert same_bits(np.asarray(again)[1, :, :2], both[1][0, :, 4:])


def test_copies() -> None:
    """One that had the same pages, and another counter of sequences, would lose some."""
    cache = new()
    (a,), both = filled(cache, 6)
    with pytest.raises(TypeError, match=r"a PagedKVCache has no shallow copy, .* use deepcopy"):
        copy.copy(cache)
    other = copy.deepcopy(cache)
    cache.free(a)
    assert_holds(other, a, piece(both, 0, 0, 6))
    assert other.add() == cache.add()


def test_strided_and_quantised_buffers() -> None:
    """Rows before heads in memory, and bytes."""
    sizes = [storage.row_bytes("int4", size) for size in (D, DV)]
    key, value = (np.zeros((8, 4, HKV, size), np.uint8).swapaxes(1, 2) for size in sizes)
    cache = new(quantize="int4", buffers=(key, value))
    (a,), both = filled(cache, 6)
    assert_holds(cache, a, piece(both, 0, 0, 6))
    assert same_bits(key[1, :, :2], storage.quantize(both[0][0, :, 4:], "int4"))


def test_buffers_that_are_tensors() -> None:
    torch = pytest.importorskip("torch")
    buffers = torch.zeros(8, HKV, 4, D), torch.zeros(8, HKV, 4, DV)
    cache = PagedKVCache(8, HKV, 4, D, DV, buffers=buffers)
    (a,), both = filled(cache, 6)
    assert_holds(cache, a, piece(both, 0, 0, 6))
    assert same_bits(buffers[1][1, :, :2].numpy(), both[1][0, :, 4:])


def test_tokens_from_the_cache_itself() -> None:
    """Two change what they have dropped with each other."""
    cache = new()
    (a, b), both = filled(cache, 3, 3)
    cache.truncate([a, b], 1)
    cache.batch([a, b]).append(cache.key[1::-1, :, 1:3], cache.value[1::-1, :, 1:3])
    assert_holds(cache, a, piece(both, 0, 0, 1), piece(both, 1, 1, 3))
    assert_holds(cache, b, piece(both, 1, 0, 1), piece(both, 0, 1, 3))


def test_tables() -> None:
    cache = new(8, 4)
    rows = numbers(23, 4, batch=8)[1:]
    cache.key[:], cache.value[:] = rows
    table = np.array([[5, 2, -9, 9], [7, 5, 0, 1 << 40], [-1, 8, 8, 8]])
    batch = cache.tables(table, [8, 9, 0])
    assert batch.lengths.tolist() == batch.totals.tolist() == [8, 9, 0] and batch.lengths.dtype == np.int64
    assert batch.shape == (3, HKV, D, DV) and batch.sequences == () and batch.capacity == 32
    found = batch.storage()
    assert found.pages is not None and found.pages.dtype == np.int64 and found.Lk == 9
    assert found.pages.tolist() == [[5, 2, 0], [7, 5, 0], [0, 0, 0]]
    for got, x in zip(found.dense(0), rows, strict=True):
        assert same_bits(got[:, :8], np.concatenate([x[5], x[2]], axis=1))
    table[:], batch.lengths[:], found.pages[:] = -1, 99, 99  # all of them others' copies
    again = batch.storage()
    assert again.pages is not None and again.Lk == 9
    assert again.pages.tolist() == [[5, 2, 0], [7, 5, 0], [0, 0, 0]]
    assert cache.free_pages == 8 and cache.sequences == ()


@pytest.mark.parametrize("dtype", ["i1", "u1", "u8", ">i4"])
def test_tables_of_any_integers(dtype: str) -> None:
    cache = new(300, 2)
    rows = cache.tables(np.array([[3, 100], [7, 77]]).astype(dtype), 3).storage()
    assert rows.pages is not None and rows.pages.tolist() == [[3, 100], [7, 77]]
    empty = cache.tables(np.zeros((0, 3), dtype), [])
    assert empty.lengths.shape == (0,) and empty.storage().Lk == 0


def test_what_a_cache_says_of_itself() -> None:
    cache = PagedKVCache(3, 2, 4, 5, dtype=np.float16)
    cache.batch([cache.add(), cache.add()]).append(*[np.ones((2, 2, 5, 5), np.float16)] * 2, counts=[5, 1])
    start = "PagedKVCache(pages=3, Hkv=2, page_size=4, D=5, Dv=5, dtype=float16"
    assert repr(cache) == f"{start}, free_pages=0, sequences=2)"
    assert (cache.page_size, cache.capacity, cache.dtype, cache.quantize) == (4, 12, np.float16, None)
    assert cache.nbytes == 2 * 3 * 2 * 4 * 5 * 2
    batch = cache.batch([1, 0])
    assert repr(batch) == "PagedBatch(B=2, Hkv=2, D=5, Dv=5, dtype=float16, lengths=[1, 5])"
    assert (batch.window, batch.sinks, batch.capacity, batch.dtype) == (None, 0, 12, np.float16)
    assert batch.shape == (2, 2, 5, 5) and batch.sequences == (1, 0) and batch.quantize is None
    assert batch.lengths.dtype == batch.totals.dtype == np.int64

    cache = PagedKVCache(3, 2, 4, 40, 5, quantize="int4")
    assert repr(cache).endswith("Dv=5, dtype=float32, quantize='int4', free_pages=3, sequences=0)")
    batch = cache.batch([])
    assert repr(batch) == "PagedBatch(B=0, Hkv=2, D=40, Dv=5, dtype=float32, quantize='int4', lengths=[])"
    assert cache.key.shape == (3, 2, 4, 44) and cache.value.shape == (3, 2, 4, 28)
    assert cache.key.dtype == cache.value.dtype == np.uint8 and cache.dtype == np.float32
    assert cache.nbytes == 3 * 2 * 4 * 72


# Errors ---------------------------------------------------------------------------------------------------------------

F = np.float32
BUFFER = np.zeros((8, 2, 4, 4), F)
FROZEN = np.zeros((8, 2, 4, 4), F)
FROZEN.flags.writeable = False


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((-1, 2, 4, 4), {}, ValueError, "pages must be 0 or more, got -1"),
        ((8, 2.0, 4, 4), {}, TypeError, "Hkv must be integers, got float"),
        ((8, 2, 0, 4), {}, ValueError, "page_size must be 1 or more, got 0"),
        ((8, 2, 4, -4), {}, ValueError, "D must be 0 or more, got -4"),
        ((2**80, 2, 4, 4), {}, ValueError, f"pages must be at most {2**63 - 1}, got {2**80}"),
        ((8, 2, 4, 4, "5"), {}, TypeError, "Dv must be integers, got str"),
        ((8, 2, 4, 4), {"dtype": np.int8}, TypeError, "dtype must be float32, .* got <class 'numpy.int8'>"),
        ((8, 2, 4, 4), {"quantize": "int2"}, ValueError, "quantize must be None, 'int8' or 'int4', got 'int2'"),
        ((8, 2, 4, 4), {"quantize": 8}, ValueError, "quantize must be None, 'int8' or 'int4', got 8"),
        ((8, 2, 4, 4), {"quantize": "int8", "dtype": np.float64}, TypeError,
         "dtype must be float32, float16 or bfloat16 of a quantised cache, got float64"),
        ((8, 2, 4, 4), {"buffers": BUFFER}, TypeError, "buffers must be a pair .* got numpy.ndarray"),
        ((8, 2, 4, 4), {"buffers": (BUFFER, BUFFER)}, ValueError, "buffers must not share memory"),
        ((8, 2, 4, 4), {"buffers": (BUFFER, FROZEN)}, ValueError, "buffers must be writeable"),
        ((8, 2, 4, 4), {"buffers": (BUFFER, FROZEN), "quantize": "int8"}, TypeError, "must be uint8, got float32"),
        ((8, 2, 4, 5), {"buffers": (BUFFER, FROZEN)}, ValueError, r"buffers must have shapes \(8, 2, 4, 5\) and"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_caches(arguments: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PagedKVCache(*arguments, **options)


UNKNOWN = "must be held by the cache, got {}, which never was or has been freed"


@pytest.mark.parametrize(
    ("method", "arguments", "error", "message"),
    [
        ("length", (9,), ValueError, "sequence " + UNKNOWN.format(9)),
        ("pages_of", (2,), ValueError, "sequence " + UNKNOWN.format(2)),
        ("pages_of", ([1],), TypeError, "sequence must be integers, got list"),
        ("fork", (-1,), ValueError, "sequence " + UNKNOWN.format(-1)),
        ("fork", (0.0,), TypeError, "sequence must be integers, got float"),
        ("fork", (1, 3), ValueError, "length must be between 0 and 2, which the sequence holds, got 3"),
        ("fork", (1, -1), ValueError, "length must be between 0 and 2, which the sequence holds, got -1"),
        ("fork", (1, "1"), TypeError, "length must be integers, got str"),
        ("free", (2,), ValueError, "sequences " + UNKNOWN.format(2)),
        ("free", ([0, 1, 0],), ValueError, "sequences must differ from each other, got 0 twice"),
        ("free", ([0, 5],), ValueError, "sequences " + UNKNOWN.format(5)),
        ("free", (np.array([[0, 1]]),), TypeError, "sequences must be integers, got numpy.ndarray"),
        ("free", (np.array([0.0]),), TypeError, "sequences must be integers, got numpy.float64"),
        ("free", (np.array(7),), ValueError, "sequences " + UNKNOWN.format(7)),
        ("free", ([True],), TypeError, "sequences must be integers, got bool"),
        ("free", (None,), TypeError, "sequences must be integers, got NoneType"),
        ("free", (np.array([0], object),), TypeError, "sequences must be an integer or integers, got numpy.ndarray"),
        ("truncate", (b"\0", 0), TypeError, "sequences must be an integer or integers, got bytes"),
        ("batch", ({0: 1},), TypeError, "sequences must be an integer or integers, got dict"),
        ("batch", ("",), TypeError, "sequences must be an integer or integers, got str"),
        ("truncate", ([0, 1], [2, 3]), ValueError, "lengths must be at most those held, got 3 for sequence 1, which"),
        ("truncate", ([0, 1], [1]), ValueError, r"lengths must be an integer or have shape \(2,\), got shape \(1,\)"),
        ("truncate", ([0, 1], -1), ValueError, "lengths must be between 0 and 32, got -1"),
        ("truncate", (0, 33), ValueError, "lengths must be between 0 and 32, got 33"),
        ("truncate", (0, 1.0), TypeError, "lengths must be integers"),
        ("truncate", ([1, 1], [0, 0]), ValueError, "sequences must differ from each other, got 1 twice"),
        ("batch", ([0, 0],), ValueError, "sequences must differ from each other, got 0 twice"),
        ("batch", ([0, 2],), ValueError, "sequences " + UNKNOWN.format(2)),
    ],
    ids=str,
)
def test_bad_calls_change_nothing(method: str, arguments: Any, error: type[Exception], message: str) -> None:
    cache = new()
    cache.free(filled(cache, 6, 2, 3)[0][2])
    before = state(cache)
    with pytest.raises(error, match=message):
        getattr(cache, method)(*arguments)
    assert state(cache) == before


KEY, VALUE = tokens(24, 2, 2)


@pytest.mark.parametrize(
    ("key", "value", "counts", "error", "message"),
    [
        (KEY.astype("d"), VALUE, None, TypeError, "key must be float32, as the cache is, got float64"),
        (KEY, VALUE.astype("e"), None, TypeError, "value must be float32, as the cache is, got float16"),
        (KEY.tolist(), VALUE, None, TypeError, "key must be a NumPy array, got list"),
        (KEY[0], VALUE, None, ValueError, r"key must have shape \(2, 2, n, 8\), got \(2, 2, 8\)"),
        (KEY, VALUE[:1], None, ValueError, r"value must have shape \(2, 2, n, 6\), got \(1, 2, 2, 6\)"),
        (KEY, KEY, None, ValueError, r"value must have shape \(2, 2, n, 6\), got \(2, 2, 2, 8\)"),
        (KEY, VALUE[:, :, :1], None, ValueError, "key and value must have the same length, got 2 and 1"),
        (KEY, VALUE, 3, ValueError, "counts must be between 0 and 2, got 3"),
        (KEY, VALUE, [1], ValueError, r"counts must be an integer or have shape \(2,\), got shape \(1,\)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_bad_tokens_change_nothing(
    key: Any, value: Any, counts: Any, error: type[Exception], message: str, quantize: str | None
) -> None:
    cache = new(quantize=quantize)
    batch = cache.batch(filled(cache, 6, 2)[0])
    before = state(cache)
    with pytest.raises(error, match=message):
        batch.append(key, value, counts)
    assert state(cache) == before


TABLE = np.array([[0, 7], [3, 1]])


@pytest.mark.parametrize(
    ("table", "lengths", "error", "message"),
    [
        (TABLE.tolist(), 1, TypeError, "block_table must be a NumPy array, got list"),
        (TABLE.astype(F), 1, TypeError, "block_table must be integers, got float32"),
        (TABLE > 0, 1, TypeError, "block_table must be integers, got bool"),
        (TABLE[0], 1, ValueError, r"block_table must have shape \(B, n\), got \(2,\)"),
        (TABLE, [1, 2, 3], ValueError, r"lengths must be an integer or have shape \(2,\), got shape \(3,\)"),
        (TABLE, [1.0, 2.0], TypeError, "lengths must be integers"),
        (TABLE, [1, -1], ValueError, "lengths must be between 0 and 32, got -1"),
        (TABLE, [33, 1], ValueError, "lengths must be between 0 and 32, got 33"),
        (TABLE, [1, 9], ValueError, "must have the pages of all .*, 3 of 4 tokens for sequence 1 of length 9, got 2"),
        (TABLE + 1, [5, 5], ValueError, "between 0 and 7 where lengths need it, got 8 for page 1 of sequence 0"),
        (TABLE - 2, [0, 8], ValueError, "between 0 and 7 where lengths need it, got -1 for page 1 of sequence 1"),
        (TABLE.astype("u8") + 2**63, 1, ValueError, f"got {2**63} for page 0 of sequence 0"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_tables(table: Any, lengths: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        new().tables(table, lengths)


def test_given_tables_do_not_grow() -> None:
    cache = new()
    batch = cache.tables(TABLE, [1, 5])
    before = state(cache)
    message = "key must not be appended to a batch of given tables"
    with pytest.raises(ValueError, match=message):
        batch.append(KEY, VALUE)
    with pytest.raises(ValueError, match=message):
        with batch.appended(Tokens(KEY, VALUE, np.array([2, 2]))):
            pass
    assert state(cache) == before


# Any sequence of changes ----------------------------------------------------------------------------------------------

Token = tuple[np.ndarray, np.ndarray]
MOST = 5  # sequences
WHICH = st.lists(st.integers(0, MOST - 1), max_size=3, unique=True)
COUNTS = st.lists(st.integers(0, 6), min_size=3, max_size=3)


class AgainstLists(RuleBasedStateMachine):
    """A cache beside a list of the tokens of each sequence."""

    @initialize(pages=st.integers(1, 9), size=st.integers(1, 4), quantize=st.sampled_from([None, None, "int8", "int4"]))
    def begin(self, pages: int, size: int, quantize: str | None) -> None:
        self.cache = new(pages, size, quantize=quantize)
        self.lists: dict[int, list[Token]] = {}
        self.pages, self.seed = pages, 0

    def chosen(self, which: list[int]) -> list[int]:
        ids = list(self.lists)
        return [ids[i] for i in which if i < len(ids)]

    def owners(self) -> Counter[int]:
        """Of each page, how many sequences have it."""
        return Counter(page for i in self.lists for page in self.cache.pages_of(i))

    def needed(self, ids: list[int], counts: list[int]) -> int:
        """Pages that an append takes: to grow, and copies, so that each writes to a page that no other has."""
        size, owners, needed = self.cache.page_size, self.owners(), 0
        writers: Counter[int] = Counter()
        for i, n in zip(ids, counts, strict=True):
            length = len(self.lists[i])
            needed += -(-(length + n) // size) - -(-length // size)
            if n and length % size:
                writers[self.cache.pages_of(i)[-1]] += 1
        return needed + sum(min(n, owners[page] - 1) for page, n in writers.items())

    @precondition(lambda self: len(self.lists) < MOST)
    @rule()
    def add(self) -> None:
        i = self.cache.add()
        assert i not in self.lists
        self.lists[i] = []

    @precondition(lambda self: 0 < len(self.lists) < MOST)
    @rule(which=st.integers(0, MOST - 1), length=st.none() | st.integers(0, 12))
    def fork(self, which: int, length: int | None) -> None:
        source = list(self.lists)[which % len(self.lists)]
        if length is not None and length > len(self.lists[source]):
            with pytest.raises(ValueError, match="length must be between"):
                self.cache.fork(source, length)
            return
        before = self.cache.key.tobytes(), self.cache.free_pages
        self.lists[self.cache.fork(source, length)] = self.lists[source][:length]
        assert (self.cache.key.tobytes(), self.cache.free_pages) == before

    @rule(which=WHICH, counts=COUNTS, same=st.booleans(), fails=st.booleans())
    def append(self, which: list[int], counts: list[int], same: bool, fails: bool) -> None:
        ids, n = self.chosen(which), max(counts)
        counts = [n] * len(ids) if same else counts[: len(ids)]
        batch, before, needed, free = self.cache.batch(ids), state(self.cache), self.needed(ids, counts), self.free()
        self.seed += 1
        key, value = tokens(self.seed, n, len(ids))
        given = None if same else counts
        if needed > len(free):
            with pytest.raises(ValueError, match=f"{needed} pages are needed, .* and {len(free)} are free"):
                batch.append(key, value, given)
            assert state(self.cache) == before
            return
        if fails:
            with pytest.raises(ZeroDivisionError):
                with batch.appended(batch.checked(key, value, given)):
                    raise ZeroDivisionError
            assert bookkeeping(self.cache) == before[2]
            return
        batch.append(key, value, given)
        for b, (i, n) in enumerate(zip(ids, counts, strict=True)):
            self.lists[i] = self.lists[i] + [(key[b, :, j], value[b, :, j]) for j in range(n)]
            if n:
                # No other sequence has the pages that it has written to.
                written = self.cache.pages_of(i)[(len(self.lists[i]) - n) // self.cache.page_size :]
                assert all(self.owners()[page] == 1 for page in written)
        assert set(self.free()) == set(free[needed:])

    def free(self) -> list[int]:
        return sorted(set(range(self.pages)) - set(self.owners()))

    @rule(which=WHICH, cuts=COUNTS)
    def truncate(self, which: list[int], cuts: list[int]) -> None:
        ids = self.chosen(which)
        lengths = [len(self.lists[i]) - cut for i, cut in zip(ids, cuts, strict=False)]
        if any(n < 0 for n in lengths):
            with pytest.raises(ValueError, match="lengths must be between"):
                self.cache.truncate(ids, lengths)
            return
        self.cache.truncate(ids, lengths)
        for i, n in zip(ids, lengths, strict=True):
            self.lists[i] = self.lists[i][:n]

    @rule(which=WHICH)
    def forget(self, which: list[int]) -> None:
        ids = self.chosen(which)
        self.cache.free(ids)
        for i in ids:
            del self.lists[i]
            with pytest.raises(ValueError, match="has been freed"):
                self.cache.free(i)

    @rule()
    def spoil(self) -> None:
        """What no sequence holds is anything."""
        unused = np.ones((self.pages, self.cache.page_size), bool)
        for i, held_tokens in self.lists.items():
            for position in range(len(held_tokens)):
                page, place = divmod(position, self.cache.page_size)
                unused[self.cache.pages_of(i)[page], place] = False
        for x in (self.cache.key, self.cache.value):
            x.swapaxes(1, 2)[unused] = 255 if self.cache.quantize else np.nan

    @invariant()
    def holds_what_the_lists_do(self) -> None:
        assert self.cache.sequences == tuple(self.lists) and len(self.cache) == len(self.lists)
        batch = self.cache.batch(list(self.lists))
        assert batch.lengths.tolist() == batch.totals.tolist() == [len(x) for x in self.lists.values()]
        rows = batch.storage()
        for b, held_tokens in enumerate(self.lists.values()):
            for got, which in zip(rows.dense(b), (0, 1), strict=True):
                if held_tokens:
                    expected = np.stack([x[which] for x in held_tokens], axis=1)
                    assert same_bits(got[:, : len(held_tokens)], read_back(expected, self.cache))

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        owners, free = self.owners(), self.free()
        assert self.cache._pool.users == [owners[page] for page in range(self.pages)]
        assert sorted(self.cache._pool.free_pages) == free
        assert (self.cache.free_pages, self.cache.pages_used) == (len(free), len(owners))
        for i, held_tokens in self.lists.items():
            pages = self.cache.pages_of(i)
            assert len(pages) == len(set(pages)) == -(-len(held_tokens) // self.cache.page_size)

    @invariant()
    def what_is_shared_is_the_same(self) -> None:
        """Two that have a page have the same tokens in it, as far as both go."""
        size = self.cache.page_size
        for i, j in combinations(self.lists, 2):
            for at, (page, other) in enumerate(zip(self.cache.pages_of(i), self.cache.pages_of(j), strict=False)):
                if page == other:
                    both = zip(self.lists[i][: (at + 1) * size], self.lists[j][: (at + 1) * size], strict=False)
                    assert all(a is b for a, b in both)
            at_both_ends = set(enumerate(self.cache.pages_of(i))) & set(enumerate(self.cache.pages_of(j)))
            assert len(at_both_ends) == len(set(self.cache.pages_of(i)) & set(self.cache.pages_of(j)))


TestAgainstLists = AgainstLists.TestCase
TestAgainstLists.settings = settings(max_examples=100, stateful_step_count=30)
