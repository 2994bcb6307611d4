"""What a peer is, and what a case asks of it.

A peer is made once per process, with the number of threads; `prepare` then gives the call to be timed.  What a library
has no argument for is given to it as an explicit mask, as its users would; what it cannot do at all is `Unsupported`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
from cases import Case

MOST_MEMORY = 4e9  # bytes that a peer may take for its matrices of scores


class Unsupported(Exception):
    """What a library cannot do, in a few words."""


class Prepared(NamedTuple):
    """A call on arrays that are ready."""

    call: Callable[[], Any]
    array: Callable[[Any], np.ndarray]
    """Makes (B, Hq, Lq, Dv) of what the call returns."""
    bytes: int = 0
    """Of keys and values as they are kept, if reading them is what takes time."""
    read: tuple[np.ndarray, ...] = ()
    """Those arrays, of which reading alone is measured too."""


class Peer:
    """A library in its own process."""

    packages: tuple[str, ...]
    forms: tuple[str, ...] = ()
    """Of those that a case may have, what the library has too."""

    def __init__(self, threads: int) -> None:
        """Most libraries take their number of threads from the environment."""

    def prepare(self, case: Case) -> Prepared:
        """Raises Unsupported."""
        raise NotImplementedError

    def prepare_form(self, case: Case, form: str) -> Prepared:
        """The same for one of `forms`."""
        raise NotImplementedError


def versions(peer: Peer) -> dict[str, str]:
    """Of the packages that the peer consists of."""
    return {name: metadata.version(name) for name in peer.packages}


# What a case asks for -------------------------------------------------------------------------------------------------


def only_causal(case: Case) -> bool:
    """Whether causal, in its plain top-left form, is all that restricts the keys."""
    return case.causal and case.options.keys() <= {"is_causal"} and case.mask is None and not case.documents


def explicit_mask(case: Case) -> np.ndarray | None:
    """All that changes or restricts the scores as one array that broadcasts to (B, Hq, Lq, Lk); None if nothing does.

    It is bool, True = attend, or additive if the case's own mask is, or what stands for it.
    """
    allowed, mask = _allowed(case), own_mask(case)
    if allowed is None or mask is None:
        return mask if allowed is None else allowed
    return mask & allowed if mask.dtype == bool else np.where(allowed, mask, mask.dtype.type(-np.inf))


def own_mask(case: Case) -> np.ndarray | None:
    """The case's mask, or its documents or ALiBi as one, with four axes; not causal, window and lengths."""
    asked = [case.mask is not None, case.documents > 0, "alibi_slopes" in case.options]
    if sum(asked) > 1:
        raise Unsupported("several masks together")
    if case.documents:
        ids = case.document_ids()
        return np.asarray(ids[:, None] == ids)[None, None]
    if "alibi_slopes" in case.options:
        slopes = np.asarray(case.options["alibi_slopes"], case.numpy_dtype).reshape(-1, case.Hq, 1, 1)
        distance = np.abs(np.arange(case.Lq)[:, None] + _offset(case) - np.arange(case.Lk))
        return np.asarray(-slopes * distance.astype(case.numpy_dtype))
    mask = case.keywords().get("attn_mask")
    return None if mask is None else np.asarray(mask.reshape((1,) * (4 - mask.ndim) + mask.shape))


def _allowed(case: Case) -> np.ndarray | None:
    """The keys that causal, window and lengths leave; axes on which nothing depends have length 1."""
    refuse_options(case, {"is_causal", "window", "query_offset", "kv_lengths", "alibi_slopes"})
    query = np.arange(case.Lq)[:, None] + _offset(case)
    key = np.arange(case.Lk)
    left, right = case.options.get("window") or (None, None)
    if case.causal:
        right = 0
    parts = []
    if left is not None:
        parts.append((query - left <= key)[None, None])
    if right is not None:
        parts.append((key <= query + right)[None, None])
    if "kv_lengths" in case.options:
        lengths = np.broadcast_to(case.options["kv_lengths"], case.B)
        parts.append(key < lengths[:, None, None, None])
    return np.asarray(functools.reduce(np.logical_and, parts)) if parts else None


def _offset(case: Case) -> int:
    offset = case.options.get("query_offset", 0)
    if offset == "bottom_right":
        return case.Lk - case.Lq
    if not isinstance(offset, int):
        raise Unsupported("an offset for each sequence")
    return offset


def refuse_options(case: Case, known: set[str]) -> None:
    """What a library has no argument for, and is no mask."""
    if unknown := case.options.keys() - known:
        raise Unsupported(", ".join(sorted(unknown)))


def refuse_size(case: Case, copies: int) -> None:
    """Of a library that forms the whole matrix of scores, and so many of its size at the same time."""
    needed = copies * case.B * case.Hq * case.Lq * case.Lk * case.numpy_dtype.itemsize
    if needed > MOST_MEMORY:
        raise Unsupported(f"{needed / 1e9:.1f} GB for the scores")


def rows_first(x: np.ndarray) -> np.ndarray:
    """A copy (B, L, H, D) of (B, H, L, D)."""
    return np.ascontiguousarray(x.swapaxes(1, 2))


# Sequences of different lengths ---------------------------------------------------------------------------------------


def within(case: Case, x: np.ndarray) -> np.ndarray:
    """(B, H, L, size), with 0 behind the end of each sequence."""
    return np.where((np.arange(x.shape[2]) < lengths(case)[:, None])[:, None, :, None], x, x.dtype.type(0))


def joined(case: Case, sequences: Iterable[np.ndarray]) -> np.ndarray:
    """(B, H, L, size) of one (H, length, size) for each sequence."""
    out = np.zeros((case.B, case.Hq, case.Lq, case.Dv or case.D), case.numpy_dtype)
    for b, x in enumerate(sequences):
        out[b, :, : x.shape[1]] = x
    return out


def sequences(case: Case, x: np.ndarray) -> list[np.ndarray]:
    """(H, length, size) of each sequence of (B, H, L, size), views."""
    return [one[:, :length] for one, length in zip(x, lengths(case), strict=True)]


def lengths(case: Case) -> np.ndarray:
    """(B,), of queries and keys alike."""
    return np.broadcast_to(case.options["kv_lengths"], case.B)
