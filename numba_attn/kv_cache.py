"""A contiguous key-value cache for autoregressive decoding.

Everything is allocated once; tokens are written behind those held, and attention reads views of the part in use.  With
a window the cache is a ring: the first tokens stay, as attention sinks (Xiao et al., "Efficient Streaming Language
Models with Attention Sinks", 2023), and of the others the last ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from numba_attn import checks
from numba_attn.kv_pools import (
    ChannelScales,
    Tokens,
    channel_scales_of,
    dtype_of,
    freeze,
    indices_of,
    pools,
    read_only,
    restored,
    size_of,
    stored,
    tokens_of,
)
from numba_attn.storage import Storage


class KVCache:
    """Keys and values of B sequences, which grow on their own.

    Parameters
    ----------
    B, Hkv, capacity, D, Dv : int
        Sequences, key-value heads, tokens that each sequence may hold, head size, value head size (D if None).
    dtype : float32, float64, float16 or bfloat16 (of ml_dtypes)
        Of the keys and values that come in, and of queries.
    quantize : None, "int8" or "int4"
        Keep them as integers of so many bits, of which each token and head has a scale; at "int4", eight elements have
        steps of their own, in another byte: 5 bits for each in all.  Not of float64.  See `numba_attn.storage`.  A few
        query rows of 16 bits, or of precision="bfloat16", are multiplied by such integers as they are: queries, and
        probabilities of some keys, are rounded to 1/65534 of their largest, probabilities of "int4" to 1/14242.
        Elsewhere integers are widened to float32.
    channel_scales : (key, value), optional
        Of a quantised cache: how large each channel is, (Hkv, D) and (Hkv, Dv) positive numbers, such as the largest
        absolute value in some text, or None for either.  Elements are divided by them before they are quantised, so
        that large channels do not cost the others their accuracy.
    buffers : (key, value), optional
        Arrays to use instead of new ones, np.memmap or tensors for example: (B, Hkv, capacity, D) and
        (B, Hkv, capacity, Dv), of this dtype; if quantised uint8, with `storage.row_bytes(quantize, D)` in the place of
        D, and likewise of Dv.  Writeable.  Their contents are not used: the cache begins empty.
    window, sinks : int, optional
        Keep the first `sinks` tokens and the last `window` of the others: `append` never runs out of room, it
        overwrites the oldest.  The capacity is then sinks + window and may be given as None.

    Raises
    ------
    ValueError, TypeError
        Sizes that are negative or do not fit each other; dtypes that are not among these.

    Notes
    -----
    Methods that raise leave the cache as it was.  What is in unused capacity does not matter, NaN included.

    Examples
    --------
    >>> import numpy as np
    >>> cache = KVCache(2, 1, 8, 4)
    >>> cache.append(np.ones((2, 1, 3, 4), np.float32), np.ones((2, 1, 3, 4), np.float32), counts=[3, 1])
    >>> cache
    KVCache(B=2, Hkv=1, capacity=8, D=4, Dv=4, dtype=float32, lengths=[3, 1])
    >>> cache.reorder([0, 0])
    >>> cache.truncate([3, 2])
    >>> cache.lengths
    array([3, 2])
    """

    def __init__(
        self,
        B: int,
        Hkv: int,
        capacity: int | None,
        D: int,
        Dv: int | None = None,
        *,
        dtype: Any = np.float32,
        quantize: str | None = None,
        channel_scales: tuple[Any, Any] | None = None,
        buffers: tuple[np.ndarray, np.ndarray] | None = None,
        window: int | None = None,
        sinks: int = 0,
    ) -> None:
        B, Hkv, D = size_of("B", B), size_of("Hkv", Hkv), size_of("D", D)
        Dv = D if Dv is None else size_of("Dv", Dv)
        self._window = None if window is None else size_of("window", window, 1)
        self._sinks = size_of("sinks", sinks)
        capacity = self._capacity(capacity)
        self._dtype, self._quantize, self._sizes = dtype_of(dtype, quantize), quantize, (D, Dv)
        self._channel_scales = channel_scales_of(channel_scales, Hkv, self._sizes, quantize)
        self._key, self._value = pools((B, Hkv, capacity), D, Dv, self._dtype, quantize, buffers)
        self._totals = np.zeros(B, np.int64)
        self._lengths = np.zeros(B, np.int64)

    def _capacity(self, capacity: Any) -> int:
        if self._window is None:
            if self._sinks:
                raise ValueError(f"sinks must be 0 without a window, got {self._sinks}")
            return size_of("capacity", capacity)
        ring = self._sinks + self._window
        if capacity is not None and size_of("capacity", capacity) != ring:
            raise ValueError(f"capacity must be sinks + window = {ring}, or None, got {capacity}")
        return ring

    @property
    def key(self) -> np.ndarray:
        """(B, Hkv, capacity, D): the whole array, of which the first `lengths[b]` tokens of sequence b are in use.

        If quantised, rows of bytes, see `numba_attn.storage`.
        """
        return self._key[...]

    @property
    def value(self) -> np.ndarray:
        """(B, Hkv, capacity, Dv), like `key`."""
        return self._value[...]

    @property
    def used(self) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values up to the greatest length: (B, Hkv, lengths.max(), D) and (B, Hkv, lengths.max(), Dv).

        Views, or new arrays of this dtype if quantised.
        """
        longest = self._lengths.max(initial=0)
        parts = self._key[:, :, :longest], self._value[:, :, :longest]
        if self._quantize is None:
            return parts
        key, value = (
            restored(x, self._quantize, n, scales)
            for x, n, scales in zip(parts, self._sizes, self._channel_scales, strict=True)
        )
        return key.astype(self._dtype, copy=False), value.astype(self._dtype, copy=False)

    def storage(self, whole: bool = False) -> Storage:
        """What is held, as it is, for `attention_with_kv_cache`; with room for more if `whole`."""
        Lk = self.capacity if whole else int(self._lengths.max(initial=0))
        return Storage(self._key, self._value, self._quantize, *self._sizes, Lk)

    @property
    def lengths(self) -> np.ndarray:
        """(B,) int64: tokens that each sequence holds; a read-only view, which follows the cache."""
        return read_only(self._lengths)

    @property
    def totals(self) -> np.ndarray:
        """(B,) int64: tokens that each sequence has seen, so the position of its next; like `lengths`, unless a window
        has dropped some.
        """
        return read_only(self._totals)

    @property
    def positions(self) -> np.ndarray:
        """(B, lengths.max()) int64: the position in its sequence of the token in each place of `key`, -1 for none.

        They rise from 0, but in a ring, where the place of the oldest has been taken by the newest.

        >>> cache, x = KVCache(1, 1, None, 2, window=3, sinks=1), np.zeros((1, 1, 1, 2), np.float32)
        >>> for _ in range(6):
        ...     cache.append(x, x)
        >>> cache.positions
        array([[0, 4, 5, 3]])
        """
        place, total = np.arange(self._lengths.max(initial=0)), self._totals[:, None]
        if self._window is None:
            return np.where(place < total, place, -1)
        latest = total - 1 - (total - 1 - place) % self._window  # the last position that belongs there
        return np.where(place < np.minimum(total, self._sinks), place, np.where(latest < self._sinks, -1, latest))

    @property
    def capacity(self) -> int:
        """Tokens that each sequence may hold."""
        return int(self._key.shape[2])

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
    def shape(self) -> tuple[int, int, int, int]:
        """(B, Hkv, D, Dv)."""
        return (*self._key.shape[:2], *self._sizes)

    @property
    def window(self) -> int | None:
        """How many of the last tokens are kept; None if all."""
        return self._window

    @property
    def sinks(self) -> int:
        """How many of the first tokens are kept beside the window."""
        return self._sinks

    @property
    def nbytes(self) -> int:
        """Of both arrays, whole."""
        return self._key.nbytes + self._value.nbytes

    def __repr__(self) -> str:
        (B, Hkv, D, Dv), capacity = self.shape, self.capacity
        quantized = "" if self._quantize is None else f", quantize={self._quantize!r}"
        ring = "" if self._window is None else f", window={self._window}, sinks={self._sinks}"
        lengths = np.array2string(self._lengths, separator=", ", threshold=16)
        return (
            f"KVCache(B={B}, Hkv={Hkv}, capacity={capacity}, D={D}, Dv={Dv}, dtype={self.dtype}"
            f"{quantized}{ring}, lengths={lengths})"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        freeze(self._channel_scales)

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
            Shapes that do not fit, or too many tokens: more than there is room for or, with a window, more than the
            window unless there is room.
        TypeError
            Another dtype.
        """
        with self.appended(self.checked(key, value, counts)):
            pass

    def truncate(self, lengths: Any) -> None:
        """Forget the last tokens: sequence b keeps its first `lengths[b]`, for example those that a large model accepts
        of the ones a small model has guessed.

        `lengths` is an integer or (B,) integers, none above what is held.  A sequence of which a window has dropped
        tokens cannot be cut (`ValueError`), as it would need these again.
        """
        kept = np.empty_like(self._lengths)
        kept[:] = checks.integers("lengths", lengths, self._lengths.shape, 0, self.capacity)
        for b in np.flatnonzero(kept != self._lengths):
            if kept[b] > self._lengths[b]:
                raise ValueError(
                    f"lengths must be at most those held, got {kept[b]} for sequence {b}, "
                    f"which holds {self._lengths[b]}"
                )
            if self._totals[b] > self.capacity:
                raise ValueError(
                    f"lengths must stay as they are where the window has dropped tokens, got {kept[b]} for sequence "
                    f"{b}, which holds {self._lengths[b]} of {self._totals[b]} seen"
                )
        self._commit(np.where(kept == self._lengths, self._totals, kept))

    def reorder(self, indices: Any) -> None:
        """Sequence b becomes what sequence `indices[b]` was: the step of a beam search.

        `indices` is (B,) integers in [0, B), of which some may be equal and some missing.  Only tokens held are copied,
        of one sequence at a time, and those of sequences that stay where they are not at all.
        """
        B = len(self._lengths)
        source = indices_of("indices", indices, B)
        if np.shape(indices) != (B,):
            raise ValueError(f"indices must have shape ({B},), got {tuple(np.shape(indices))}")
        pending = {b: int(a) for b, a in enumerate(source) if a != b}
        readers = Counter(pending.values())
        free = [b for b in pending if not readers[b]]
        while free:
            b = free.pop()
            a = pending.pop(b)
            self._write(b, *self._held(a))
            readers[a] -= 1
            if a in pending and not readers[a]:
                free.append(a)
        while pending:  # nothing but cycles: what is set aside of one sequence opens one
            start = b = next(iter(pending))
            aside = [x.copy() for x in self._held(start)]
            while (a := pending.pop(b)) != start:
                self._write(b, *self._held(a))
                b = a
            self._write(b, *aside)
        self._commit(self._totals[source])

    def reset(self, sequences: Any = None) -> None:
        """Empty some sequences, an integer or integers in [0, B), or all."""
        B = len(self._lengths)
        totals = self._totals.copy()
        if sequences is None:
            totals[:] = 0
        else:
            totals[indices_of("sequences", sequences, B)] = 0
        self._commit(totals)

    # What appending is made of, for `attention_with_kv_cache` too -----------------------------------------------------

    def checked(self, key: Any, value: Any, counts: Any) -> Tokens:
        """What may be appended, or an error."""
        tokens = tokens_of(key, value, counts, self._dtype, self.shape, (self._key, self._value))
        added = tokens.counts
        totals = self._totals + added
        for b in np.flatnonzero(totals > self.capacity):
            if self._window is None:
                raise ValueError(
                    f"key must fit in the cache: sequence {b} holds {self._lengths[b]} tokens of at most "
                    f"{self.capacity}, got {added[b]} more"
                )
            if added[b] > self._window:
                raise ValueError(
                    f"key must be no longer than the window of {self._window} where there is no room for it, got "
                    f"{added[b]} tokens for sequence {b}, which holds {self._lengths[b]} of at most {self.capacity}"
                )
        return tokens

    @contextmanager
    def appended(self, tokens: Tokens) -> Iterator[None]:
        """The cache with these tokens, for good unless what is done with it raises."""
        before = self._totals.copy()
        spans = [(b, *span) for b in range(len(before)) for span in self._spans(before[b], tokens.counts[b])]
        # In a ring they are written over others, which are wanted back then.
        lost = [
            (b, place, self._key[b, :, place].copy(), self._value[b, :, place].copy())
            for b, place, _ in spans
            if before[b] + tokens.counts[b] > self.capacity
        ]
        try:
            key, value = stored(tokens, self._quantize, self._channel_scales)
            for b, place, rows in spans:
                self._key[b, :, place], self._value[b, :, place] = key[b, :, rows], value[b, :, rows]
            self._commit(before + tokens.counts)
            yield
        except BaseException:
            for b, place, key, value in lost:
                self._key[b, :, place], self._value[b, :, place] = key, value
            self._commit(before)
            raise

    def _spans(self, total: int, count: int) -> Iterator[tuple[slice, slice]]:
        """Where the next `count` tokens of a sequence that has seen `total` go: places, and rows of what comes."""
        position, end = int(total), int(total + count)
        while position < end:
            place = position
            if self._window is not None and position >= self._sinks:
                place = self._sinks + (position - self._sinks) % self._window
            n = min(end - position, self.capacity - place)
            yield slice(place, place + n), slice(position - total, position - total + n)
            position += n

    def _held(self, b: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of a sequence: views, of what is in use."""
        length = self._lengths[b]
        return self._key[b, :, :length], self._value[b, :, :length]

    def _write(self, b: int, key: np.ndarray, value: np.ndarray) -> None:
        """Make these the first tokens of a sequence, whatever its length."""
        length = key.shape[1]
        self._key[b, :, :length], self._value[b, :, :length] = key, value

    def _commit(self, totals: np.ndarray) -> None:
        self._totals[:] = totals
        np.minimum(totals, self.capacity, out=self._lengths)
