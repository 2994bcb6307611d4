"""A key-value cache of pages, for many sequences that come, grow, share what they begin with, and go.

A pool of pages is allocated once; a sequence has a table of the pages that its tokens are in, as in vLLM (Kwon et al.,
"Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023).  Sequences that begin alike
share pages, which are copied when one of them writes to the last.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import numpy as np

from numba_attn import checks
from numba_attn.kv_cache import (
    ChannelScales,
    Tokens,
    channel_scales_of,
    counts_of,
    dtype_of,
    freeze,
    operand,
    pools,
    size_of,
    stored,
)
from numba_attn.storage import Storage


@dataclass(slots=True, eq=False)
class _Sequence:
    pages: array[int]  # as many as its tokens need
    length: int
    busy: bool = False  # with an append that may be taken back


class PagedKVCache:
    """Keys and values of any number of sequences, in pages that are taken from a pool as they grow.

    Parameters
    ----------
    pages, Hkv, page_size, D, Dv : int
        Pages in all, key-value heads, tokens in each page, head size, value head size (D if None).
    dtype : float32, float64, float16 or bfloat16 (of ml_dtypes)
        Of the keys and values that come in, and of queries.
    quantize : None, "int8" or "int4"
        Keep them as integers and scales, as in `KVCache`.  Not of float64.
    channel_scales : (key, value), optional
        (Hkv, D) and (Hkv, Dv), as in `KVCache`.
    buffers : (key, value), optional
        Arrays to use instead of new ones, np.memmap or tensors for example: writeable, of the shapes and dtype of
        `key` and `value`.  Their contents are not used: the cache begins empty.

    Raises
    ------
    ValueError, TypeError
        Sizes that are negative or do not fit each other, pages of no tokens; dtypes that are not among these.

    Notes
    -----
    Sequences are called by the integers that `add` and `fork` give; none is given again after `free`.  A page is filled
    before another is taken, which is the free one of least number.

    Methods that raise leave the cache as it was.  What is in unused places of pages does not matter, NaN included.

    Examples
    --------
    >>> import numpy as np
    >>> cache = PagedKVCache(8, 1, 4, 2)
    >>> a = cache.add()
    >>> cache.batch([a]).append(np.ones((1, 1, 6, 2), np.float32), np.ones((1, 1, 6, 2), np.float32))
    >>> b = cache.fork(a)
    >>> batch = cache.batch([a, b])
    >>> batch.append(np.ones((2, 1, 3, 2), np.float32), np.ones((2, 1, 3, 2), np.float32), counts=[3, 1])
    >>> batch.lengths
    array([9, 7])
    >>> cache.pages_of(a), cache.pages_of(b)
    ((0, 2, 3), (0, 1))
    >>> cache.free(a)
    >>> cache
    PagedKVCache(pages=8, Hkv=1, page_size=4, D=2, Dv=2, dtype=float32, free_pages=6, sequences=1)
    """

    def __init__(
        self,
        pages: int,
        Hkv: int,
        page_size: int,
        D: int,
        Dv: int | None = None,
        *,
        dtype: Any = np.float32,
        quantize: str | None = None,
        channel_scales: tuple[Any, Any] | None = None,
        buffers: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        pages, Hkv, page_size = size_of("pages", pages), size_of("Hkv", Hkv), size_of("page_size", page_size, 1)
        D = size_of("D", D)
        Dv = D if Dv is None else size_of("Dv", Dv)
        self._page_size, self._sizes = page_size, (D, Dv)
        self._dtype, self._quantize = dtype_of(dtype, quantize), quantize
        self._channel_scales = channel_scales_of(channel_scales, Hkv, self._sizes, quantize)
        self._key, self._value = pools((pages, Hkv, page_size), D, Dv, self._dtype, quantize, buffers)
        self._free = list(range(pages))  # a heap
        self._users = [0] * pages  # of each page: sequences, and appends that may want it back
        self._sequences: dict[int, _Sequence] = {}
        self._next = 0

    @property
    def key(self) -> np.ndarray:
        """(pages, Hkv, page_size, D): the whole array.

        If quantised, rows of bytes, see `numba_attn.storage`.
        """
        return self._key[...]

    @property
    def value(self) -> np.ndarray:
        """(pages, Hkv, page_size, Dv), like `key`."""
        return self._value[...]

    @property
    def dtype(self) -> np.dtype:
        """Of keys and values, and of queries that attend to them."""
        return self._dtype

    @property
    def quantize(self) -> str | None:
        """How keys and values are quantised."""
        return self._quantize

    @property
    def channel_scales(self) -> ChannelScales:
        """(Hkv, 1, D) and (Hkv, 1, Dv) float32, or None for each: what elements are divided by before that."""
        return self._channel_scales

    @property
    def page_size(self) -> int:
        """Tokens in each page."""
        return self._page_size

    @property
    def capacity(self) -> int:
        """Tokens in all pages."""
        return len(self._users) * self.page_size

    @property
    def free_pages(self) -> int:
        """How many pages no sequence has."""
        return len(self._free)

    @property
    def pages_used(self) -> int:
        """How many pages sequences have, each counted once."""
        return len(self._users) - len(self._free)

    @property
    def nbytes(self) -> int:
        """Of both arrays, whole."""
        return self._key.nbytes + self._value.nbytes

    @property
    def sequences(self) -> tuple[int, ...]:
        """Those that are held, in the order in which they were made."""
        return tuple(self._sequences)

    def __len__(self) -> int:
        """How many sequences are held."""
        return len(self._sequences)

    def __repr__(self) -> str:
        (pages, Hkv), (D, Dv) = self._key.shape[:2], self._sizes
        quantized = "" if self._quantize is None else f", quantize={self._quantize!r}"
        return (
            f"PagedKVCache(pages={pages}, Hkv={Hkv}, page_size={self._page_size}, D={D}, Dv={Dv}, "
            f"dtype={self._dtype}{quantized}, free_pages={self.free_pages}, sequences={len(self)})"
        )

    def __copy__(self) -> NoReturn:
        raise TypeError("a PagedKVCache has no shallow copy, as each would give away pages of the other: use deepcopy")

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        freeze(self._channel_scales)

    def length(self, sequence: int) -> int:
        """Tokens that a sequence holds; `ValueError` if there is no such sequence."""
        return self._one("sequence", sequence).length

    def pages_of(self, sequence: int) -> tuple[int, ...]:
        """The pages that a sequence is in, in order; `ValueError` if there is no such sequence."""
        return tuple(self._one("sequence", sequence).pages)

    def add(self) -> int:
        """Begin an empty sequence, which has no pages yet."""
        return self._begun(array("q"), 0)

    def fork(self, sequence: int, length: int | None = None) -> int:
        """Begin a sequence with the tokens of another, the first `length` or all: a prompt that is there already, or a
        beam that parts in two.

        Nothing is copied.  They share pages, and the last, where it is not full, is copied when one of them grows.

        Raises
        ------
        ValueError
            No such sequence, or a length that is not between 0 and its own.
        TypeError
            What is not an integer.
        """
        source = self._one("sequence", sequence)
        kept = source.length if length is None else checks.integer("length", length)
        if not 0 <= kept <= source.length:
            raise ValueError(f"length must be between 0 and {source.length}, which the sequence holds, got {kept}")
        pages = source.pages[: self._pages_for(kept)]
        for page in pages:
            self._users[page] += 1
        return self._begun(pages, kept)

    def free(self, sequences: Any) -> None:
        """Forget sequences, an integer or integers, no two of them equal; pages that no other has become free.

        An integer that is not held, or not any more, is refused (`ValueError`).
        """
        for number, sequence in self._idle(self._find(_one_by_one(sequences))).items():
            self._cut(sequence, 0)
            del self._sequences[number]

    def truncate(self, sequences: Any, lengths: Any) -> None:
        """Forget the last tokens of sequences: they keep their first `lengths`, for example those that a large model
        accepts of the ones a small model has guessed.

        `sequences` is an integer or integers, no two of them equal; `lengths` an integer or one for each, none above
        what is held (`ValueError`).
        """
        found = self._idle(self._find(_one_by_one(sequences)))
        kept = np.empty(len(found), np.int64)
        kept[:] = checks.integers("lengths", lengths, kept.shape, 0, self.capacity)
        for length, (number, sequence) in zip(kept, found.items(), strict=True):
            if length > sequence.length:
                raise ValueError(
                    f"lengths must be at most those held, got {length} for sequence {number}, which holds "
                    f"{sequence.length}"
                )
        for length, sequence in zip(kept, found.values(), strict=True):
            self._cut(sequence, int(length))

    def batch(self, sequences: Any) -> PagedBatch:
        """These sequences in this order, to append to and attend to: an integer or integers, no two of them equal.

        The batch follows the cache.  A sequence that is not held, or not any more when the batch is used, is refused
        (`ValueError`).
        """
        return PagedBatch(self, tuple(self._find(_one_by_one(sequences))))

    def tables(self, block_table: np.ndarray, lengths: Any) -> PagedBatch:
        """Sequences in pages of `key` and `value` that the caller has filled, to attend to but not to append to.

        Parameters
        ----------
        block_table : (B, n) integers
            The pages of each sequence, in order.  Those behind the last that `lengths` needs may be anything.
        lengths : int or (B,) ints
            Tokens of each sequence.

        Raises
        ------
        ValueError
            Shapes that do not fit each other, lengths that are negative or above `capacity` or need more than n pages,
            pages that are not in [0, pages).
        TypeError
            What is not integers, or a table that is not an array.

        Examples
        --------
        >>> cache = PagedKVCache(8, 1, 4, 2)
        >>> batch = cache.tables(np.array([[5, 2, -1], [5, 3, 7]], np.int32), [8, 12])
        >>> batch.storage().pages
        array([[5, 2, 0],
               [5, 3, 7]])
        """
        table = checks.numpy_array("block_table", block_table)
        if table.dtype.kind not in "iu":
            raise TypeError(f"block_table must be integers, got {table.dtype}")
        if table.ndim != 2:
            raise ValueError(f"block_table must have shape (B, n), got {table.shape}")
        B, n = table.shape
        held = np.empty(B, np.int64)
        held[:] = checks.integers("lengths", lengths, (B,), 0, self.capacity)
        needed = -(-held // self.page_size)
        most = needed.max(initial=0)
        if most > n:
            raise ValueError(
                f"block_table must have the pages of all tokens, {most} of {self.page_size} tokens for sequence "
                f"{needed.argmax()} of length {held[needed.argmax()]}, got {n}"
            )
        used = np.arange(n) < needed[:, None]
        wrong = used & ((table < 0) | (table >= len(self._users)))
        if wrong.any():
            b, i = np.argwhere(wrong)[0]
            raise ValueError(
                f"block_table must be between 0 and {len(self._users) - 1} where lengths need it, got {table[b, i]} "
                f"for page {i} of sequence {b}"
            )
        return PagedBatch(self, (), (np.where(used, table, 0)[:, :most].astype(np.int64), held))

    def _begun(self, pages: array[int], length: int) -> int:
        number = self._next
        self._sequences[number] = _Sequence(pages, length)
        self._next += 1
        return number

    def _one(self, name: str, x: Any) -> _Sequence:
        number = checks.integer(name, x)
        if number not in self._sequences:
            raise ValueError(f"{name} must be held by the cache, got {number}, which never was or has been freed")
        return self._sequences[number]

    def _find(self, sequences: Iterable[Any]) -> dict[int, _Sequence]:
        found: dict[int, _Sequence] = {}
        for x in sequences:
            sequence, number = self._one("sequences", x), int(x)
            if number in found:
                raise ValueError(f"sequences must differ from each other, got {number} twice")
            found[number] = sequence
        return found

    def _idle(self, found: dict[int, _Sequence]) -> dict[int, _Sequence]:
        """Sequences that may be changed."""
        for number, sequence in found.items():
            if sequence.busy:
                raise ValueError(f"sequences must not be changed while tokens are appended to them, got {number}")
        return found

    def _pages_for(self, length: int) -> int:
        return -(-length // self._page_size)

    def _plan(self, sequences: list[_Sequence], counts: np.ndarray) -> list[tuple[int, int]]:
        """For each sequence that gets so many tokens how many of its pages it goes on with, and how many it takes.

        It parts with a page that it would write to and others have.  Where all that have a page write to it, that is
        all but the longest, which writes behind what the others hold, so that they could still go back to it.
        """
        plan = [(len(s.pages), 0) for s in sequences]
        users: dict[int, int] = {}
        for b in sorted(range(len(plan)), key=lambda b: sequences[b].length):
            pages, length = sequences[b].pages, sequences[b].length
            kept = len(pages)
            if counts[b] and length % self._page_size:
                left = users.get(pages[-1], self._users[pages[-1]])
                if left > 1:
                    users[pages[-1]] = left - 1
                    kept -= 1
            plan[b] = kept, self._pages_for(length + int(counts[b])) - kept
        needed = sum(taken for _, taken in plan)
        if needed > len(self._free):
            copies = sum(len(s.pages) - kept for s, (kept, _) in zip(sequences, plan, strict=True))
            raise ValueError(
                f"key must fit in the cache: {needed} pages are needed, {copies} of them for copies of shared ones, "
                f"and {len(self._free)} are free"
            )
        return plan

    def _extend(self, sequence: _Sequence, kept: int, taken: int) -> None:
        """Put free pages behind the first `kept`, with copies of the tokens that were there."""
        parted = sequence.pages[kept:]
        sequence.pages[kept:] = array("q", [heapq.heappop(self._free) for _ in range(taken)])
        for page in sequence.pages[kept:]:
            self._users[page] = 1
        for old, new in zip(parted, sequence.pages[kept:], strict=False):
            held = sequence.length % self._page_size
            self._key[new, :, :held], self._value[new, :, :held] = self._key[old, :, :held], self._value[old, :, :held]

    def _write(self, sequence: _Sequence, key: np.ndarray, value: np.ndarray) -> None:
        """Put rows (Hkv, n, columns) behind those held, where pages are there for them."""
        start, position, end = sequence.length, sequence.length, sequence.length + key.shape[1]
        while position < end:
            page, place = sequence.pages[position // self._page_size], position % self._page_size
            n = min(end - position, self._page_size - place)
            rows = slice(position - start, position - start + n)
            self._key[page, :, place : place + n] = key[:, rows]
            self._value[page, :, place : place + n] = value[:, rows]
            position += n
        sequence.length = end

    def _cut(self, sequence: _Sequence, length: int) -> None:
        kept = self._pages_for(length)
        self._release(sequence.pages[kept:])
        del sequence.pages[kept:]
        sequence.length = length

    def _release(self, pages: array[int]) -> None:
        for page in pages:
            self._users[page] -= 1
            if not self._users[page]:
                heapq.heappush(self._free, page)


def _one_by_one(sequences: Any) -> Iterable[Any]:
    """What should be integers, of an integer or integers."""
    of_objects = isinstance(sequences, np.ndarray) and sequences.dtype.hasobject
    if of_objects or isinstance(sequences, Mapping | str | bytes | bytearray):
        raise TypeError(f"sequences must be an integer or integers, got {checks.type_name(sequences)}")
    return sequences if isinstance(sequences, Iterable) and getattr(sequences, "ndim", 1) > 0 else [sequences]


class PagedBatch:
    """Sequences of a `PagedKVCache` as the batch that attention works on: what its `batch` and `tables` give.

    It has no tokens of its own: it follows what becomes of its sequences in the cache.

    Examples
    --------
    >>> import numpy as np
    >>> cache = PagedKVCache(8, 1, 4, 2)
    >>> batch = cache.batch([cache.add(), cache.add()])
    >>> batch.append(np.ones((2, 1, 6, 2), np.float32), np.ones((2, 1, 6, 2), np.float32), counts=[6, 1])
    >>> batch
    PagedBatch(B=2, Hkv=1, D=2, Dv=2, dtype=float32, lengths=[6, 1])
    >>> batch.storage().pages
    array([[0, 1],
           [2, 0]])
    """

    window: ClassVar[int | None] = None  # all tokens are kept
    sinks: ClassVar[int] = 0

    def __init__(
        self, cache: PagedKVCache, sequences: tuple[int, ...], given: tuple[np.ndarray, np.ndarray] | None = None
    ) -> None:
        self._cache, self._sequences = cache, sequences
        self._given = given  # pages and lengths, instead of those of sequences

    @property
    def sequences(self) -> tuple[int, ...]:
        """The integers that the cache calls them by; none if their tables were given."""
        return self._sequences

    @property
    def lengths(self) -> np.ndarray:
        """(B,) int64: tokens that each sequence holds; a copy."""
        return self._given[1].copy() if self._given else np.array([s.length for s in self._held()], np.int64)

    @property
    def totals(self) -> np.ndarray:
        """(B,) int64: the position of the next token of each sequence, which is its length: none is ever dropped."""
        return self.lengths

    @property
    def capacity(self) -> int:
        """Tokens that a sequence may hold if it is alone: those of all pages."""
        return self._cache.capacity

    @property
    def dtype(self) -> np.dtype:
        """Of keys and values, and of queries that attend to them."""
        return self._cache.dtype

    @property
    def quantize(self) -> str | None:
        """How keys and values are quantised."""
        return self._cache.quantize

    @property
    def channel_scales(self) -> ChannelScales:
        """What elements are divided by before that, as of the cache."""
        return self._cache.channel_scales

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, Hkv, D, Dv)."""
        B = len(self._given[1] if self._given else self._sequences)
        return (B, self._cache._key.shape[1], *self._cache._sizes)

    def __repr__(self) -> str:
        B, Hkv, D, Dv = self.shape
        quantized = "" if self.quantize is None else f", quantize={self.quantize!r}"
        lengths = np.array2string(self.lengths, separator=", ", threshold=16)
        return f"PagedBatch(B={B}, Hkv={Hkv}, D={D}, Dv={Dv}, dtype={self.dtype}{quantized}, lengths={lengths})"

    def append(self, key: np.ndarray, value: np.ndarray, counts: Any = None) -> None:
        """Write tokens behind those that each sequence holds.

        Parameters
        ----------
        key, value : (B, Hkv, n, D) and (B, Hkv, n, Dv), of the cache's dtype
        counts : int or (B,) ints in [0, n], optional
            How many of the n tokens, from the first, each sequence gets; all if None.

        Raises
        ------
        ValueError
            Shapes that do not fit, more tokens than there are free pages for, a sequence that has been freed, or a
            batch of given tables.
        TypeError
            Another dtype.
        """
        with self.appended(self.checked(key, value, counts)):
            pass

    # What appending and attending are made of, for `attention_with_kv_cache` too --------------------------------------

    def checked(self, key: Any, value: Any, counts: Any) -> Tokens:
        """What may be appended, or an error."""
        cache, sequences = self._cache, self._growing()
        B, Hkv, *sizes = self.shape
        key, value = (
            operand(name, x, cache.dtype, (B, Hkv, columns), (cache._key, cache._value))
            for name, x, columns in zip(("key", "value"), (key, value), sizes, strict=True)
        )
        n = key.shape[2]
        if value.shape[2] != n:
            raise ValueError(f"key and value must have the same length, got {n} and {value.shape[2]}")
        added = counts_of(counts, len(sequences), n)
        cache._plan(sequences, added)
        return Tokens(key, value, added)

    @contextmanager
    def appended(self, tokens: Tokens) -> Iterator[None]:
        """The batch with these tokens, for good unless what is done with it raises.

        Until that is done its sequences refuse other changes (`ValueError`); others may change, and any may be forked.
        """
        cache, sequences = self._cache, self._growing()
        plan = cache._plan(sequences, tokens.counts)
        key, value = stored(tokens, cache.quantize, cache.channel_scales)
        before = []
        try:
            for b, (sequence, (kept, taken), n) in enumerate(zip(sequences, plan, tokens.counts, strict=True)):
                before.append((sequence, kept, sequence.pages[kept:], sequence.length))
                sequence.busy = True
                cache._extend(sequence, kept, taken)
                cache._write(sequence, key[b, :, :n], value[b, :, :n])
            yield
        except BaseException:
            for sequence, kept, parted, length in before:
                cache._release(sequence.pages[kept:])
                sequence.pages[kept:], sequence.length = parted, length
            raise
        else:
            for _, _, parted, _ in before:  # not before it is certain that they are not wanted back
                cache._release(parted)
        finally:
            for sequence, *_ in before:
                sequence.busy = False

    def storage(self, whole: bool = False) -> Storage:
        """Where the tokens are; beyond the end of a sequence, up to that of the longest, there may be anything.

        Up to the end of the last page of that if `whole`.
        """
        cache = self._cache
        if self._given:
            pages, Lk = self._given[0].copy(), int(self._given[1].max(initial=0))
        else:
            held = self._held()
            pages = np.zeros((len(held), max((len(s.pages) for s in held), default=0)), np.int64)
            for row, sequence in zip(pages, held, strict=True):
                row[: len(sequence.pages)] = sequence.pages
            Lk = max((s.length for s in held), default=0)
        if whole:
            Lk = pages.shape[1] * cache.page_size
        if not len(cache._key):  # kernels begin at the first page: where there is none, sequences lie on their own
            key, value = (x.reshape(len(pages), x.shape[1], 0, x.shape[3]) for x in (cache._key, cache._value))
            return Storage(key, value, cache.quantize, *cache._sizes, Lk)
        return Storage(cache._key, cache._value, cache.quantize, *cache._sizes, Lk, pages)

    def _held(self) -> list[_Sequence]:
        return list(self._cache._find(self._sequences).values())

    def _growing(self) -> list[_Sequence]:
        """The sequences, to be appended to."""
        if self._given:
            raise ValueError("key must not be appended to a batch of given tables: the cache takes no pages for it")
        return list(self._cache._idle(self._cache._find(self._sequences)).values())
