"""A pool of pages of keys and values, and the sequences that have them.

A page has a count of those that use it: sequences, and appends that may want it back.  Of a page that several use, all
but one part with when they write to it.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from numba_attn import checks
from numba_attn.kv_pools import ChannelScales, channel_scales_of, dtype_of, freeze, pools, size_of


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens of which the pages, in order, hold a page full each, and the last what is left."""

    pages: array[int]  # as many as its tokens need
    length: int
    busy: bool = False  # with an append that may be taken back


class PagePool:
    """See `PagedKVCache`, which says what the arguments are."""

    def __init__(
        self,
        pages: Any,
        Hkv: Any,
        page_size: Any,
        D: Any,
        Dv: Any,
        dtype: Any,
        quantize: Any,
        channel_scales: Any,
        buffers: Any,
    ) -> None:
        pages, Hkv = size_of("pages", pages), size_of("Hkv", Hkv)
        self.page_size = size_of("page_size", page_size, 1)
        D = size_of("D", D)
        self.sizes = D, D if Dv is None else size_of("Dv", Dv)
        self.dtype: np.dtype = dtype_of(dtype, quantize)
        self.quantize: str | None = quantize
        self.channel_scales: ChannelScales = channel_scales_of(channel_scales, Hkv, self.sizes, quantize)
        self.key, self.value = pools((pages, Hkv, self.page_size), *self.sizes, self.dtype, quantize, buffers)
        self.sequences: dict[int, Sequence] = {}
        self._next = 0  # what the next sequence is called
        self.free_pages = list(range(pages))  # a heap
        self.users = [0] * pages

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        freeze(self.channel_scales)

    @property
    def capacity(self) -> int:
        """Tokens in all pages."""
        return len(self.users) * self.page_size

    def begin(self, pages: array[int], length: int) -> int:
        """A new sequence of pages that are there already, and so many tokens."""
        for page in pages:
            self.users[page] += 1
        number = self._next
        self.sequences[number] = Sequence(pages, length)
        self._next += 1
        return number

    def sequence(self, name: str, x: Any) -> Sequence:
        """The sequence that is called by this integer, or an error."""
        number = checks.integer(name, x)
        if number not in self.sequences:
            raise ValueError(f"{name} must be held by the cache, got {number}, which never was or has been freed")
        return self.sequences[number]

    def find(self, sequences: Iterable[Any]) -> dict[int, Sequence]:
        """Several, no two of them equal."""
        found: dict[int, Sequence] = {}
        for x in sequences:
            sequence, number = self.sequence("sequences", x), int(x)
            if number in found:
                raise ValueError(f"sequences must differ from each other, got {number} twice")
            found[number] = sequence
        return found

    def find_idle(self, sequences: Iterable[Any]) -> dict[int, Sequence]:
        """Several, that may be changed."""
        found = self.find(sequences)
        for number, sequence in found.items():
            if sequence.busy:
                raise ValueError(f"sequences must not be changed while tokens are appended to them, got {number}")
        return found

    def pages_for(self, length: int) -> int:
        """How many pages so many tokens need."""
        return -(-length // self.page_size)

    def plan(self, sequences: list[Sequence], counts: np.ndarray) -> list[tuple[int, int]]:
        """For each sequence that gets so many tokens how many of its pages it goes on with, and how many it takes.

        It parts with a page that it would write to and others have.  Where all that have a page write to it, that is
        all but the longest, which writes behind what the others hold, so that they could still go back to it.
        """
        plan = [(len(s.pages), 0) for s in sequences]
        users: dict[int, int] = {}
        for b in sorted(range(len(plan)), key=lambda b: sequences[b].length):
            pages, length = sequences[b].pages, sequences[b].length
            kept = len(pages)
            if counts[b] and length % self.page_size:
                left = users.get(pages[-1], self.users[pages[-1]])
                if left > 1:
                    users[pages[-1]] = left - 1
                    kept -= 1
            plan[b] = kept, self.pages_for(length + int(counts[b])) - kept
        needed = sum(taken for _, taken in plan)
        if needed > len(self.free_pages):
            copies = sum(len(s.pages) - kept for s, (kept, _) in zip(sequences, plan, strict=True))
            raise ValueError(
                f"key must fit in the cache: {needed} pages are needed, {copies} of them for copies of shared ones, "
                f"and {len(self.free_pages)} are free"
            )
        return plan

    def extend(self, sequence: Sequence, kept: int, taken: int) -> None:
        """Put free pages behind the first `kept`, with copies of the tokens that were there."""
        parted = sequence.pages[kept:]
        sequence.pages[kept:] = array("q", [heapq.heappop(self.free_pages) for _ in range(taken)])
        for page in sequence.pages[kept:]:
            self.users[page] = 1
        for old, new in zip(parted, sequence.pages[kept:], strict=False):
            held = sequence.length % self.page_size
            self.key[new, :, :held], self.value[new, :, :held] = self.key[old, :, :held], self.value[old, :, :held]

    def write(self, sequence: Sequence, key: np.ndarray, value: np.ndarray) -> None:
        """Put rows (Hkv, n, columns) behind those held, where pages are there for them."""
        start, position, end = sequence.length, sequence.length, sequence.length + key.shape[1]
        while position < end:
            page, place = sequence.pages[position // self.page_size], position % self.page_size
            n = min(end - position, self.page_size - place)
            rows = slice(position - start, position - start + n)
            self.key[page, :, place : place + n] = key[:, rows]
            self.value[page, :, place : place + n] = value[:, rows]
            position += n
        sequence.length = end

    def cut(self, sequence: Sequence, length: int) -> None:
        """Forget all but the first tokens."""
        kept = self.pages_for(length)
        self.release(sequence.pages[kept:])
        del sequence.pages[kept:]
        sequence.length = length

    def release(self, pages: array[int]) -> None:
        """Part with pages, of which those become free that nobody else has."""
        for page in pages:
            self.users[page] -= 1
            if not self.users[page]:
                heapq.heappush(self.free_pages, page)
