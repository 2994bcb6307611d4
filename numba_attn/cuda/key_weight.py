"""The weight of each key: its probability, summed over the query rows, which takes the sums of whole rows.

    key_weight[j] = sum over i of exp(score[i, j] - m[i] - log(total[i]))

A thread block has some keys of a head and visits the row blocks that may attend to one of them, from first to last.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from numba_attn.cuda import arguments
from numba_attn.cuda.scores import PAD, Variant, make_scores


def make_key_weight(cuda: Any, ops: Any, *fields: Any) -> Any:
    """The kernel of `Variant(*fields)`, with the arguments of the forward one, whose `norms` it reads."""
    variant = Variant(*fields)
    tile, real = variant.tile, variant.real
    rows, keys, across, down_count, depth = tile.rows, tile.keys, tile.threads_across, tile.threads_down, tile.depth
    block_rows, block_keys, threads = tile.block_rows, tile.block_keys, tile.threads
    allowed, multiply, finish, *_ = make_scores(cuda, variant)
    zero = real(0)
    word, number = np.dtype(np.uint32), np.dtype(np.float32)
    row_pitch, key_pitch = block_rows + PAD, block_keys + PAD
    QUERY, KEY, MASK, KEY_WEIGHT = arguments.QUERY, arguments.KEY, arguments.MASK, arguments.KEY_WEIGHT
    OFFSET, QUERY_LENGTH, KV_LENGTH = arguments.OFFSET, arguments.QUERY_LENGTH, arguments.KV_LENGTH
    COLUMNS = arguments.COLUMNS

    def weigh(
        q, k, v, mask, out, lse, max_score, entropy, key_weight, norms, slopes, sinks, states, pages, table, n, x
    ):  # fmt: skip
        query_stage = cuda.shared.array((depth, row_pitch), real, alignment=16)
        key_stage = cuda.shared.array((depth, key_pitch), real, alignment=16)
        partial = cuda.shared.array((down_count, block_keys), real, alignment=16)
        words = cuda.shared.array(0, word)
        floats = cuda.shared.array(0, number)

        thread = cuda.threadIdx.x
        down, along = thread // across, thread % across
        task = cuda.blockIdx.x
        j0 = task % n.key_blocks * block_keys
        head = task // n.key_blocks
        h, b = head % n.Hq, head // n.Hq
        at = b * COLUMNS
        offset, end_row, end_key = table[at + OFFSET], table[at + QUERY_LENGTH], table[at + KV_LENGTH]
        written = end_key if n.packed != 0 else n.Lk
        if j0 >= written:
            return
        q_at = table[at + QUERY] + h * n.query_head
        k_at = table[at + KEY] + h // n.group * n.key_head
        mask_at = table[at + MASK] + h * n.mask_head
        states_at = b * n.states_sequence + h * n.states_head
        scale, softcap = real(x.scale), real(x.softcap)
        slope = slopes[b * n.slopes_sequence + h] if n.has_slopes != 0 else zero

        s = cuda.local.array((rows, keys), real)
        weight = cuda.local.array(keys, real)
        for c in range(keys):
            weight[c] = zero
        first_key = j0 + along * keys
        low = max(0, j0 - n.right - offset) // block_rows * block_rows
        high = min(end_row, j0 + block_keys + n.left - offset) if j0 < end_key else 0
        for i0 in range(low, high, block_rows):
            first_row = i0 + down * rows
            bits = allowed(
                first_row, end_row, first_key, end_key, offset, b, h, mask, mask_at, states, states_at,
                n, words, floats, thread,
            )  # fmt: skip
            if cuda.syncthreads_or(np.int32(bits != 0)) == 0:
                continue
            multiply(
                s, q, k, q_at, k_at, i0, end_row, j0, end_key, b, pages, n, query_stage, key_stage,
                words, floats, thread,
            )  # fmt: skip
            for r in range(rows):
                for c in range(keys):
                    if bits >> (r * keys + c) & 1:
                        i, j = first_row + r, first_key + c
                        score = finish(
                            s[r, c], i, j, b, h, offset, scale, softcap, slope, mask, mask_at, n, words, floats, thread
                        )
                        norm = 2 * (head * n.Lq + i)
                        weight[c] += real(math.exp(score - norms[norm] - norms[norm + 1]))

        for c in range(keys):
            partial[down, along * keys + c] = weight[c]
        cuda.syncthreads()
        for key in range(thread, block_keys, threads):
            if j0 + key < written:
                whole = zero
                for t in range(down_count):
                    whole += partial[t, key]
                key_weight[table[at + KEY_WEIGHT] + h * n.key_weight_head + (j0 + key) * n.key_weight_key] = whole

    return weigh
