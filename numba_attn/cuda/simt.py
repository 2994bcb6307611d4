"""The forward pass in plain CUDA: shared memory and barriers, no instruction that a device, or the simulator, may lack.

    out[i] = sum over j of dropout(exp(score[i, j] - m[i])) v[j] / total[i]

A thread block has some query rows of a head; it visits the key tiles that one of them may attend to, with a running
maximum m and total of each row, which every thread keeps for the rows whose scores it has.  The maximum of a row is
found through shared memory, and so are the probabilities multiplied with the values.

A tile starts at a multiple of its size, whatever the mask, and one in which a row attends to nothing leaves that row as
it is.  So a row's result depends neither on the rows beside it nor on the padding around its sequence.

Dao, Fu, Ermon, Rudra and Re, "FlashAttention" (2022); Milakov and Gimelshein, "Online normalizer calculation for
softmax" (2018).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from numba_attn.cuda import arguments
from numba_attn.cuda.elements import device, make_store
from numba_attn.cuda.philox import make_kept
from numba_attn.cuda.scores import PAD, Variant, make_scores


def make_forward(cuda: Any, ops: Any, *fields: Any) -> Any:
    """The kernel of `Variant(*fields)`; it needs no `ops` beside those of `cuda`."""
    variant = Variant(*fields)
    tile, real = variant.tile, variant.real
    rows, keys, columns, across, depth = tile.rows, tile.keys, tile.columns, tile.threads_across, tile.depth
    block_rows, block_keys, block_columns = tile.block_rows, tile.block_keys, tile.block_columns
    threads, side = tile.threads, math.gcd(4, columns)
    unrolled = math.gcd(4, depth)
    group = 4 if keys % 4 == 0 else 1  # keys of a thread that are of one block of random numbers
    some_bits = (1 << group) - 1
    allowed, multiply, finish, key_at, load_held = make_scores(cuda, variant)
    store = make_store(cuda, variant.kind)
    kept_of, dropout = make_kept(cuda), variant.dropout
    zero, one, infinity, masked = real(0), real(1), real(math.inf), real(-0.0)
    word, number = np.dtype(np.uint32), np.dtype(np.float32)
    row_pitch, key_pitch, sum_pitch = block_rows + PAD, block_keys + PAD, across + 1
    QUERY, KEY, VALUE, MASK, OUT = range(5)
    LSE, MAX_SCORE, ENTROPY = arguments.LSE, arguments.MAX_SCORE, arguments.ENTROPY
    OFFSET, QUERY_LENGTH, KV_LENGTH = arguments.OFFSET, arguments.QUERY_LENGTH, arguments.KV_LENGTH
    COLUMNS = arguments.COLUMNS

    @device(cuda)
    def column_of(c, along):
        """The column of a block that is number c of a thread: four side by side, then those of the other threads."""
        return c // side * (across * side) + along * side + c % side

    def forward(
        q, k, v, mask, out, lse, max_score, entropy, key_weight, norms, slopes, sinks, states, pages, table, n, x
    ):  # fmt: skip
        query_stage = cuda.shared.array((depth, row_pitch), real, alignment=16)
        key_stage = cuda.shared.array((depth, key_pitch), real, alignment=16)
        value_stage = cuda.shared.array((depth, block_columns), real, alignment=16)
        probabilities = cuda.shared.array((block_rows, key_pitch), real, alignment=16)
        partial = cuda.shared.array((block_rows, sum_pitch), real, alignment=16)
        words = cuda.shared.array(0, word)
        floats = cuda.shared.array(0, number)

        thread = cuda.threadIdx.x
        down, along = thread // across * rows, thread % across
        task = cuda.blockIdx.x
        column0 = task % n.column_blocks * block_columns
        task //= n.column_blocks
        # The last rows first: where the mask is causal, they have the most keys.
        i0 = (n.row_blocks - 1 - task % n.row_blocks) * block_rows
        head = task // n.row_blocks
        h, b = head % n.Hq, head // n.Hq
        at = b * COLUMNS
        offset, end_row, end_key = table[at + OFFSET], table[at + QUERY_LENGTH], table[at + KV_LENGTH]
        written = end_row if n.packed != 0 else n.Lq
        if i0 >= written:
            return
        q_at = table[at + QUERY] + h * n.query_head
        k_at = table[at + KEY] + h // n.group * n.key_head
        v_at = table[at + VALUE] + h // n.group * n.value_head
        mask_at = table[at + MASK] + h * n.mask_head
        states_at = b * n.states_sequence + h * n.states_head
        scale, softcap = real(x.scale), real(x.softcap)
        slope = slopes[b * n.slopes_sequence + h] if n.has_slopes != 0 else zero

        s = cuda.local.array((rows, keys), real)
        acc = cuda.local.array((rows, columns), real)
        best, total, moment = (
            cuda.local.array(rows, real), cuda.local.array(rows, real), cuda.local.array(rows, real),
        )  # fmt: skip
        for r in range(rows):
            best[r], total[r], moment[r] = -infinity, zero, zero
            for c in range(columns):
                acc[r, c] = zero

        low = max(0, i0 + offset - n.left) // block_keys * block_keys
        high = min(end_key, min(i0 + block_rows, end_row) + offset + n.right) if i0 < end_row else 0
        for j0 in range(low, high, block_keys):
            first_key = j0 + along * keys
            bits = allowed(
                i0 + down, end_row, first_key, end_key, offset, b, h, mask, mask_at, states, states_at,
                n, words, floats, thread,
            )  # fmt: skip
            if cuda.syncthreads_or(np.int32(bits != 0)) == 0:
                continue
            multiply(
                s, q, k, q_at, k_at, i0, end_row, j0, end_key, b, pages, n, query_stage, key_stage,
                words, floats, thread,
            )  # fmt: skip
            for r in range(rows):
                largest = -infinity
                for c in range(keys):
                    if bits >> (r * keys + c) & 1:
                        i, j = i0 + down + r, first_key + c
                        s[r, c] = finish(
                            s[r, c], i, j, b, h, offset, scale, softcap, slope, mask, mask_at, n, words, floats, thread
                        )
                        largest = s[r, c] if s[r, c] > largest else largest
                partial[down + r, along] = largest
            cuda.syncthreads()

            # By itself, as what loops over registers must be short enough for the compiler to unroll it.
            kept = np.int64(0)
            if dropout:
                for place in range(0, rows * keys, group):
                    j = first_key + place % keys
                    some = kept_of(j // 4, i0 + down + place // keys, h, b, n.seed, n.threshold) >> (j % 4)
                    kept |= np.int64(some & some_bits) << place
            for r in range(rows):
                new = best[r]
                for t in range(across):
                    other = partial[down + r, t]
                    new = other if other > new else new
                shift = new if new > -infinity else zero
                if new != best[r]:
                    shrink = real(math.exp(best[r] - shift))
                    moment[r] = shrink * (moment[r] + (best[r] - shift) * total[r]) if shrink != zero else zero
                    total[r] *= shrink
                    for c in range(columns):
                        acc[r, c] *= shrink
                    best[r] = new
                for c in range(keys):
                    p = masked
                    if bits >> (r * keys + c) & 1:
                        p = real(math.exp(s[r, c] - shift))
                        total[r] += p
                        if n.wants_entropy != 0 and p != zero:
                            moment[r] += p * (s[r, c] - shift)
                        if dropout and kept >> (r * keys + c) & 1 == 0:
                            p = p * zero
                    probabilities[down + r, along * keys + c] = p

            for k0 in range(0, min(block_keys, high - j0), depth):
                special = np.int32(0)
                for element in range(thread, depth * block_columns, threads):
                    row, column = element // block_columns, element % block_columns
                    j, y = j0 + k0 + row, zero
                    if j < end_key and column0 + column < n.Dv:
                        place = key_at(j, b, v_at, n.value_row, n.value_page, pages, n)
                        y = load_held(v, place, column0 + column, n.value_column, n.Dv, words, floats, thread)
                        if not (-infinity < y and y < infinity):
                            special = np.int32(1)
                    value_stage[row, column] = y
                if cuda.syncthreads_or(special) != 0:
                    # A value that is not finite must not reach rows that do not attend to it.
                    for kk in range(depth):
                        for r in range(rows):
                            p = probabilities[down + r, k0 + kk]
                            if p != zero or math.copysign(one, p) > zero:
                                for c in range(columns):
                                    acc[r, c] += p * value_stage[kk, column_of(c, along)]
                else:
                    for kk in range(0, depth, unrolled):
                        few = cuda.local.array((rows, unrolled), real)
                        for r in range(rows):
                            for u in range(unrolled):
                                few[r, u] = probabilities[down + r, k0 + kk + u]
                        for u in range(unrolled):
                            for c in range(columns):
                                y = value_stage[kk + u, column_of(c, along)]
                                for r in range(rows):
                                    acc[r, c] += few[r, u] * y
                cuda.syncthreads()  # before the stage, or the probabilities, are written again

        for r in range(rows):
            partial[down + r, along] = total[r]
        cuda.syncthreads()
        for r in range(rows):
            total[r] = zero
            for t in range(across):
                total[r] += partial[down + r, t]
        if n.wants_entropy != 0:
            cuda.syncthreads()
            for r in range(rows):
                partial[down + r, along] = moment[r]
            cuda.syncthreads()
            for r in range(rows):
                moment[r] = zero
                for t in range(across):
                    moment[r] += partial[down + r, t]

        for r in range(rows):
            i = i0 + down + r
            if i < written:
                reference, whole, uncertain = best[r], total[r], moment[r]
                factor = one
                if n.has_sinks != 0:
                    sink = sinks[h]
                    reference = sink if sink > best[r] else best[r]
                    factor = real(math.exp(best[r] - reference))
                    own = real(math.exp(sink - reference))
                    uncertain = factor * (uncertain + (best[r] - reference) * whole) if factor != zero else zero
                    uncertain += own * (sink - reference)
                    whole = factor * total[r] + own
                factor = factor * real(x.gain) / whole if whole != zero else zero
                for c in range(columns):
                    column = column0 + column_of(c, along)
                    if column < n.Dv:
                        place = table[at + OUT] + h * n.out_head + i * n.out_row + column * n.out_column
                        store(out, place, acc[r, c] * factor, words, floats, thread)
                if along == 0 and column0 == 0:
                    if n.wants_lse != 0:
                        place = table[at + LSE] + h * n.lse_head + i * n.lse_row
                        lse[place] = reference + real(math.log(whole)) if whole != zero else -infinity
                    if n.wants_max_score != 0:
                        place = table[at + MAX_SCORE] + h * n.max_score_head + i * n.max_score_row
                        max_score[place] = best[r] if total[r] == total[r] else total[r]
                    if n.wants_entropy != 0:
                        place = table[at + ENTROPY] + h * n.entropy_head + i * n.entropy_row
                        entropy[place] = real(math.log(whole)) - uncertain / whole if total[r] != zero else zero
                    if n.wants_norms != 0:
                        # What probabilities are made of again.  Not the lse: where scores are large, as those of a
                        # row that is masked with -1e9 are, the logarithm of the sum is lost in it.
                        place = 2 * (head * n.Lq + i)
                        norms[place] = reference if whole != zero else zero
                        norms[place + 1] = real(math.log(whole)) if whole != zero else infinity

    return forward
