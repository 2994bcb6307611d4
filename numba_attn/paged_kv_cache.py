"""A key-value cache of pages, for many sequences that come, grow, share what they begin with, and go.

A pool of pages is allocated once; a sequence has a table of the pages that its tokens are in, as in vLLM (Kwon et al.,
"Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023).  Sequences that begin alike
share pages, which are copied when one of them writes to the last.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import numpy as np

from numba_attn import checks
from numba_attn.kv_pools import ChannelScales
from numba_attn.page_pool import PagePool
from numba_attn.paged_batch import PagedBatch


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
        self._pool = PagePool(pages, Hkv, page_size, D, Dv, dtype, quantize, channel_scales, buffers)

    @property
    def key(self) -> np.ndarray:
        """(pages, Hkv, page_size, D): the whole array.

        If quantised, rows of bytes, see `numba_attn.storage`.
        """
        return self._pool.key[...]

    @property
    def value(self) -> np.ndarray:
        """(pages, Hkv, page_size, Dv), like `key`."""
        return self._pool.value[...]

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
        """(Hkv, 1, D) and (Hkv, 1, Dv) float32, or None for each: what elements are divided by before that."""
        return self._pool.channel_scales

    @property
    def page_size(self) -> int:
        """Tokens in each page."""
        return self._pool.page_size

    @property
    def capacity(self) -> int:
        """Tokens in all pages."""
        return self._pool.capacity

    @property
    def free_pages(self) -> int:
        """How many pages no sequence has."""
        return len(self._pool.free_pages)

    @property
    def pages_used(self) -> int:
        """How many pages sequences have, each counted once."""
        return len(self._pool.users) - self.free_pages

    @property
    def nbytes(self) -> int:
        """Of both arrays, whole."""
        return self._pool.key.nbytes + self._pool.value.nbytes

    @property
    def sequences(self) -> tuple[int, ...]:
        """Those that are held, in the order in which they were made."""
        return tuple(self._pool.sequences)

    def __len__(self) -> int:
        """How many sequences are held."""
        return len(self._pool.sequences)

    def __repr__(self) -> str:
        (pages, Hkv), (D, Dv) = self.key.shape[:2], self._pool.sizes
        quantized = "" if self.quantize is None else f", quantize={self.quantize!r}"
        return (
            f"PagedKVCache(pages={pages}, Hkv={Hkv}, page_size={self.page_size}, D={D}, Dv={Dv}, "
            f"dtype={self.dtype}{quantized}, free_pages={self.free_pages}, sequences={len(self)})"
        )

    def __copy__(self) -> NoReturn:
        raise TypeError("a PagedKVCache has no shallow copy, as each would give away pages of the other: use deepcopy")

    def length(self, sequence: int) -> int:
        """Tokens that a sequence holds; `ValueError` if there is no such sequence."""
        return self._pool.sequence("sequence", sequence).length

    def pages_of(self, sequence: int) -> tuple[int, ...]:
        """The pages that a sequence is in, in order; `ValueError` if there is no such sequence."""
        return tuple(self._pool.sequence("sequence", sequence).pages)

    def add(self) -> int:
        """Begin an empty sequence, which has no pages yet."""
        return self._pool.begin(array("q"), 0)

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
        source = self._pool.sequence("sequence", sequence)
        kept = source.length if length is None else checks.integer("length", length)
        if not 0 <= kept <= source.length:
            raise ValueError(f"length must be between 0 and {source.length}, which the sequence holds, got {kept}")
        return self._pool.begin(source.pages[: self._pool.pages_for(kept)], kept)

    def free(self, sequences: Any) -> None:
        """Forget sequences, an integer or integers, no two of them equal; pages that no other has become free.

        An integer that is not held, or not any more, is refused (`ValueError`).
        """
        for number, sequence in self._pool.find_idle(_one_by_one(sequences)).items():
            self._pool.cut(sequence, 0)
            del self._pool.sequences[number]

    def truncate(self, sequences: Any, lengths: Any) -> None:
        """Forget the last tokens of sequences: they keep their first `lengths`, for example those that a large model
        accepts of the ones a small model has guessed.

        `sequences` is an integer or integers, no two of them equal; `lengths` an integer or one for each, none above
        what is held (`ValueError`).
        """
        found = self._pool.find_idle(_one_by_one(sequences))
        kept = np.empty(len(found), np.int64)
        kept[:] = checks.integers("lengths", lengths, kept.shape, 0, self.capacity)
        for length, (number, sequence) in zip(kept, found.items(), strict=True):
            if length > sequence.length:
                raise ValueError(
                    f"lengths must be at most those held, got {length} for sequence {number}, which holds "
                    f"{sequence.length}"
                )
        for length, sequence in zip(kept, found.values(), strict=True):
            self._pool.cut(sequence, int(length))

    def batch(self, sequences: Any) -> PagedBatch:
        """These sequences in this order, to append to and attend to: an integer or integers, no two of them equal.

        The batch follows the cache.  A sequence that is not held, or not any more when the batch is used, is refused
        (`ValueError`).
        """
        return PagedBatch(self._pool, tuple(self._pool.find(_one_by_one(sequences))))

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
        wrong = used & ((table < 0) | (table >= self.key.shape[0]))
        if wrong.any():
            b, i = np.argwhere(wrong)[0]
            raise ValueError(
                f"block_table must be between 0 and {self.key.shape[0] - 1} where lengths need it, got {table[b, i]} "
                f"for page {i} of sequence {b}"
            )
        return PagedBatch(self._pool, (), (np.where(used, table, 0)[:, :most].astype(np.int64), held))


def _one_by_one(sequences: Any) -> Iterable[Any]:
    """What should be integers, of an integer or integers."""
    of_objects = isinstance(sequences, np.ndarray) and sequences.dtype.hasobject
    if of_objects or isinstance(sequences, Mapping | str | bytes | bytearray):
        raise TypeError(f"sequences must be an integer or integers, got {checks.type_name(sequences)}")
    return sequences if isinstance(sequences, Iterable) and getattr(sequences, "ndim", 1) > 0 else [sequences]
