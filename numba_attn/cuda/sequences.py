"""The parameters of kernels, and what of them says where a sequence is."""

from __future__ import annotations

from typing import Any

# Of the kernels of this tier, in their order: addresses, strides in bytes, numbers.
PARAMETERS = {
    **dict.fromkeys(
        ("query", "key", "value", "mask", "out", "lse", "max_score", "entropy", "slopes", "sinks"), "int64"
    ),
    **dict.fromkeys(("table", "parts", "part_sums"), "int64"),
    **dict.fromkeys(("query_batch", "query_head", "key_batch", "key_head", "value_batch", "value_head"), "int64"),
    **dict.fromkeys(("mask_batch", "mask_head", "mask_row", "mask_column"), "int64"),
    **dict.fromkeys(("out_batch", "out_head", "out_row", "out_column"), "int64"),
    **dict.fromkeys(("statistic_batch", "statistic_head", "statistic_row", "slopes_batch"), "int64"),
    **dict.fromkeys(("offset", "left", "right", "threshold"), "int64"),
    **dict.fromkeys(("query_row", "key_row", "value_row"), "int32"),
    **dict.fromkeys(("heads", "group", "Lq", "Lk", "blocks", "chunk", "fewest", "most", "padded", "wide"), "int32"),
    **dict.fromkeys(("seed_low", "seed_high"), "int32"),
    **dict.fromkeys(("scale", "unit", "coarse", "limit", "cap", "gain"), "float32"),
}

ADDRESSES = tuple(PARAMETERS)[: tuple(PARAMETERS).index("part_sums") + 1]
"""Names of the parameters that are addresses, the first ones."""

# Of a row of the table of sequences, each an int64: where a sequence stands on its keys and its lengths, then where it
# begins in each array, in bytes.
COLUMNS = ("offset", "query_length", "kv_length", "query", "key", "value", "mask", "out", "statistic")


def make_sequence(cuda: Any, ops: Any) -> Any:
    """A function of the table, the number of a sequence and what holds for all if there is no table; a row of it."""
    i64 = ops.i64
    row_bytes = 8 * len(COLUMNS)

    @cuda.jit(device=True, inline="always")
    def sequence_of(table, sequence, offset, Lq, Lk, query, key, value, mask, out, statistic):
        n = i64(sequence)
        if table == 0:
            return (
                i64(offset), i64(Lq), i64(Lk), i64(n * query), i64(n * key), i64(n * value), i64(n * mask),
                i64(n * out), i64(n * statistic),
            )  # fmt: skip
        at = i64(table + n * row_bytes)
        return (
            ops.load_i64(at), ops.load_i64(i64(at + 8)), ops.load_i64(i64(at + 16)), ops.load_i64(i64(at + 24)),
            ops.load_i64(i64(at + 32)), ops.load_i64(i64(at + 40)), ops.load_i64(i64(at + 48)),
            ops.load_i64(i64(at + 56)), ops.load_i64(i64(at + 64)),
        )  # fmt: skip

    return sequence_of
