"""A mask of keys that are padding, as options of attention."""

from __future__ import annotations

from typing import Any

import numpy as np

from numba_attn import checks
from numba_attn.block_mask import and_masks


def without_padding(call: dict[str, Any], padding: Any, batch: tuple[int, ...], Lk: int) -> dict[str, Any]:
    """The options of a call, in which no key is attended to that is padding: (*batch, Lk), True where one is.

    Padding that is at the end only becomes lengths, which cost nothing; any other a mask that is the same for all rows,
    or if there is a mask already, a function.
    """
    padding = checks.numpy_array("key_padding_mask", padding)
    if padding.dtype != bool:
        raise TypeError(f"key_padding_mask must be bool, True where a key is padding, got {padding.dtype}")
    if padding.shape != (*batch, Lk):
        raise ValueError(f"key_padding_mask must have shape {(*batch, Lk)}, got {padding.shape}")
    kept = ~padding
    lengths = kept.sum(axis=-1)
    at_the_end = (kept == (np.arange(Lk) < lengths[..., None])).all()
    if at_the_end and not isinstance(call.get("query_offset"), str):  # which is about the lengths
        lengths = lengths.reshape(-1)
        if call.get("kv_lengths") is not None:
            lengths = np.minimum(lengths, checks.integers("kv_lengths", call["kv_lengths"], batch, 0, Lk))
        return {**call, "kv_lengths": lengths}
    if call.get("attn_mask") is None:
        return {**call, "attn_mask": kept[..., None, None, :]}
    # With a mask for rows and keys, of which one for every sequence would be as large as all scores.
    table = np.ascontiguousarray(kept.reshape(-1, Lk))

    def not_padding(b, h, i, j):  # type: ignore[no-untyped-def]
        return table[b, j]

    mask_mod = call.get("mask_mod")
    return {**call, "mask_mod": not_padding if mask_mod is None else and_masks(mask_mod, not_padding)}
