"""Cascade attention: many sequences that begin with the same long prefix, for example a system prompt.

    python examples/cascade.py

The keys and values of the prefix are stored once.  All sequences' queries attend to them in one call, as rows of one
sequence; then each attends to the keys that follow in its own sequence; and the log-sum-exp of both makes of the two
results that of attention to all keys at once.  So the prefix is read from memory once instead of once a sequence.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from numba_attn import merge_attention
from numba_attn import scaled_dot_product_attention as attention

Keys = tuple[np.ndarray, np.ndarray]  # keys and values


def cascade(query: np.ndarray, prefix: Keys, suffixes: Keys) -> np.ndarray:
    """Attention of query, (B, L, Hq, D), to prefix, (P, Hkv, D), and suffixes, (B, S, Hkv, D), whose end it is."""
    B, L, Hq, D = query.shape
    # The prefix is before every query, so nothing is masked and it does not matter which sequence a row is from.
    shared, shared_aux = attention(
        query.reshape(B * L, Hq, D), *prefix, enable_gqa=True, layout="BLHD", return_aux=("lse",)
    )
    own, own_aux = attention(
        query, *suffixes, is_causal=True, query_offset="bottom_right", enable_gqa=True, layout="BLHD",
        return_aux=("lse",),
    )  # fmt: skip
    out, _ = merge_attention((shared.reshape(own.shape), own), (shared_aux.lse.reshape(B, L, Hq), own_aux.lse))
    return out


def concatenated(query: np.ndarray, keys: Keys) -> np.ndarray:
    """The same, where each sequence has a copy of the prefix."""
    return attention(query, *keys, is_causal=True, query_offset="bottom_right", enable_gqa=True, layout="BLHD")


def milliseconds(function: Callable[..., np.ndarray], *arguments: object) -> float:
    """The median of some calls, after the first."""
    times = []
    for _ in range(8):
        start = time.perf_counter()
        function(*arguments)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def main(sequences: int = 16, prefix_length: int = 4096, suffix_length: int = 64, new_tokens: int = 4) -> None:
    Hq, Hkv, D = 8, 2, 64
    rng = np.random.default_rng(0)
    query = rng.standard_normal((sequences, new_tokens, Hq, D), dtype=np.float32)
    prefix_key, prefix_value = rng.standard_normal((2, prefix_length, Hkv, D), dtype=np.float32)
    own_key, own_value = rng.standard_normal((2, sequences, suffix_length, Hkv, D), dtype=np.float32)
    prefix, suffixes = (prefix_key, prefix_value), (own_key, own_value)
    whole_key, whole_value = (
        np.concatenate([np.broadcast_to(shared, (sequences, *shared.shape)), own], axis=1)
        for shared, own in zip(prefix, suffixes, strict=True)
    )
    whole = whole_key, whole_value

    error = np.abs(cascade(query, prefix, suffixes) - concatenated(query, whole)).max()
    assert error < 1e-5, f"the two differ by {error}"
    print(f"{sequences} sequences, {prefix_length} shared and {suffix_length} own keys, {new_tokens} queries each")
    for name, time_taken, arrays in (
        ("concatenated", milliseconds(concatenated, query, whole), whole),
        ("cascade", milliseconds(cascade, query, prefix, suffixes), (*prefix, *suffixes)),
    ):
        print(f"{name:>12}: {time_taken:7.2f} ms, {sum(x.nbytes for x in arrays) / 1e6:6.1f} MB of keys and values")
    print(f"They differ by {error:.0e} at most.")


if __name__ == "__main__":
    main()
