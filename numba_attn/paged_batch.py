"""Sequences of a paged cache as the batch that attention works on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np

from numba_attn.kv_pools import ChannelScales, Tokens, stored, tokens_of
from numba_attn.page_pool import PagePool, Sequence
from numba_attn.storage import Storage


class PagedBatch:
    """Sequences of a `PagedKVCache` as the batch that attention works on: what its `batch` and `tables` give.

    It has no tokens of its own: it follows what becomes of its sequences in the cache.

    Examples
    --------
    >>> import numpy as np
    >>> from numba_attn import PagedKVCache
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
        self, pool: PagePool, sequences: tuple[int, ...], given: tuple[np.ndarray, np.ndarray] | None = None
    ) -> None:
        self._pool, self._sequences = pool, sequences
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
        return self._pool.capacity

    @property
    def dtype(self) -> np.dtype:
        """Of keys and values, and of queries that attend to them."""
        return self._pool.dtype

    @property
    def quantize(self) -> str | None:
        """How keys and values are quantised."""
        return self._pool.quantize

    @property
    def channel_scales(self) -> ChannelScales:
        """What elements are divided by before that, as of the cache."""
        return self._pool.channel_scales

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, Hkv, D, Dv)."""
        B = len(self._given[1] if self._given else self._sequences)
        return (B, self._pool.key.shape[1], *self._pool.sizes)

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
        pool, sequences = self._pool, self._growing()
        tokens = tokens_of(key, value, counts, pool.dtype, self.shape, (pool.key, pool.value))
        pool.plan(sequences, tokens.counts)
        return tokens

    @contextmanager
    def appended(self, tokens: Tokens) -> Iterator[None]:
        """The batch with these tokens, for good unless what is done with it raises.

        Until that is done its sequences refuse other changes (`ValueError`); others may change, and any may be forked.
        """
        pool, sequences = self._pool, self._growing()
        plan = pool.plan(sequences, tokens.counts)
        key, value = stored(tokens, pool.quantize, pool.channel_scales)
        before = []
        try:
            for b, (sequence, (kept, taken), n) in enumerate(zip(sequences, plan, tokens.counts, strict=True)):
                before.append((sequence, kept, sequence.pages[kept:], sequence.length))
                sequence.busy = True
                pool.extend(sequence, kept, taken)
                pool.write(sequence, key[b, :, :n], value[b, :, :n])
            yield
        except BaseException:
            for sequence, kept, parted, length in before:
                pool.release(sequence.pages[kept:])
                sequence.pages[kept:], sequence.length = parted, length
            raise
        else:
            for _, _, parted, _ in before:  # not before it is certain that they are not wanted back
                pool.release(parted)
        finally:
            for sequence, *_ in before:
                sequence.busy = False

    def storage(self, whole: bool = False) -> Storage:
        """Where the tokens are; beyond the end of a sequence, up to that of the longest, there may be anything.

        Up to the end of the last page of that if `whole`.
        """
        pool = self._pool
        if self._given:
            pages, Lk = self._given[0].copy(), int(self._given[1].max(initial=0))
        else:
            held = self._held()
            pages = np.zeros((len(held), max((len(s.pages) for s in held), default=0)), np.int64)
            for row, sequence in zip(pages, held, strict=True):
                row[: len(sequence.pages)] = sequence.pages
            Lk = max((s.length for s in held), default=0)
        if whole:
            Lk = pages.shape[1] * pool.page_size
        if not len(pool.key):  # kernels begin at the first page: where there is none, sequences lie on their own
            key, value = (x.reshape(len(pages), x.shape[1], 0, x.shape[3]) for x in (pool.key, pool.value))
            return Storage(key, value, pool.quantize, *pool.sizes, Lk)
        return Storage(pool.key, pool.value, pool.quantize, *pool.sizes, Lk, pages)

    def _held(self) -> list[Sequence]:
        return list(self._pool.find(self._sequences).values())

    def _growing(self) -> list[Sequence]:
        """The sequences, to be appended to."""
        if self._given:
            raise ValueError("key must not be appended to a batch of given tables: the cache takes no pages for it")
        return list(self._pool.find_idle(self._sequences).values())
