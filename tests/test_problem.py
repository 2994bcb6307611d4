"""Bad input: every mistake gives its error, before anything is written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from numba_attn import scaled_dot_product_attention
from numba_attn.checks import overlaps_itself

Q = np.zeros((2, 4, 5, 8), np.float32)
K = np.zeros((2, 4, 7, 8), np.float32)
BUFFER = np.zeros((2, 4, 5, 16), np.float32)

SELF_OVERLAPPING = np.lib.stride_tricks.as_strided(Q, Q.shape, (0, 0, 0, 4))

WRONG: list[tuple[str, tuple[Any, Any, Any], dict[str, Any], type[Exception], str]] = [
    ("list", ([[1.0]], K, K), {}, TypeError, "query must be a NumPy array, got list"),
    ("None", (Q, None, K), {}, TypeError, "key must be a NumPy array, got NoneType"),
    ("masked array", (Q, K, np.ma.array(K)), {}, TypeError, "value must not be a masked array"),
    ("integers", (Q.astype(int), K, K), {}, TypeError, "query must be float32 or float64, got int64"),
    ("half", (Q.astype("f2"), K, K), {}, TypeError, "query must be float32 or float64, got float16"),
    ("complex", (Q, K.astype("c8"), K), {}, TypeError, "key must be float32 or float64"),
    ("objects", (Q, K, K.astype(object)), {}, TypeError, "value must be float32 or float64, got object"),
    ("long double", (Q.astype(np.longdouble), K, K), {}, TypeError, "query must be float32 or float64"),
    ("two dtypes", (Q, K.astype("f8"), K), {}, TypeError, "one dtype, got float32, float64 and float32"),
    ("0-d", (Q[0, 0, 0, 0:1][0:].reshape(()), K, K), {}, ValueError, "query must have at least 2 axes"),
    ("1-d", (Q[0, 0, 0], K, K), {}, ValueError, "query must have at least 2 axes .* got shape \\(8,\\)"),
    ("two ranks", (Q[0], K, K), {}, ValueError, "same number of axes"),
    ("batch", (Q[:1], K, K), {}, ValueError, "same batch axes, got \\(1,\\), \\(2,\\) and \\(2,\\)"),
    ("value heads", (Q, K, K[:, :3]), {}, ValueError, "same number of heads, got 4 and 3"),
    ("value length", (Q, K, K[:, :, :6]), {}, ValueError, "same length, got 7 and 6"),
    ("head size", (Q, K[..., :7], K), {}, ValueError, "same head size, got 8 and 7"),
    ("heads without gqa", (Q, K[:, :2], K[:, :2]), {}, ValueError, "enable_gqa=True"),
    ("heads not a multiple", (Q, K[:, :3], K[:, :3]), {"enable_gqa": True}, ValueError, "multiple"),
    ("no key heads", (Q, K[:, :0], K[:, :0]), {"enable_gqa": True}, ValueError, "multiple"),
    ("gqa not a flag", (Q, K, K), {"enable_gqa": 1}, TypeError, "enable_gqa must be True or False, got int"),
    ("causal not a flag", (Q, K, K), {"is_causal": "yes"}, TypeError, "is_causal must be True or False, got str"),
    ("integer mask", (Q, K, K), {"attn_mask": np.ones((5, 7), int)}, TypeError, "attn_mask must be bool, float32"),
    ("half mask", (Q, K, K), {"attn_mask": np.ones((5, 7), "f2")}, TypeError, "attn_mask must be bool, float32"),
    ("list mask", (Q, K, K), {"attn_mask": [[True]]}, TypeError, "attn_mask must be a NumPy array, got list"),
    ("mask shape", (Q, K, K), {"attn_mask": np.ones((5, 6), bool)}, ValueError, "\\(5, 6\\) does not broadcast to"),
    ("mask rank", (Q, K, K), {"attn_mask": np.ones((1,) * 5, bool)}, ValueError, "does not broadcast to"),
    ("mask empty axis", (Q, K, K), {"attn_mask": np.ones((0, 7), bool)}, ValueError, "does not broadcast to"),
    ("kv_lengths too long", (Q, K, K), {"kv_lengths": [7, 8]}, ValueError, "between 0 and 7, got 8"),
    ("kv_lengths negative", (Q, K, K), {"kv_lengths": -1}, ValueError, "between 0 and 7, got -1"),
    ("kv_lengths shape", (Q, K, K), {"kv_lengths": [7, 7, 7]}, ValueError, "must be an integer or have shape"),
    ("kv_lengths floats", (Q, K, K), {"kv_lengths": [7.0, 7.0]}, TypeError, "kv_lengths must be integers"),
    ("query_lengths too long", (Q, K, K), {"query_lengths": [6, 1]}, ValueError, "must be between 0 and 5"),
    ("query_lengths bool", (Q, K, K), {"query_lengths": True}, TypeError, "query_lengths must be integers"),
    ("offset word", (Q, K, K), {"query_offset": "top"}, ValueError, "bottom_right"),
    ("offset float", (Q, K, K), {"query_offset": 1.5}, TypeError, "query_offset must be integers"),
    ("offset shape", (Q, K, K), {"query_offset": np.zeros((3,), int)}, ValueError, "must be an integer or"),
    ("offset huge", (Q, K, K), {"query_offset": 1 << 60}, ValueError, "query_offset must be between"),
    ("window number", (Q, K, K), {"window": 5}, TypeError, "window must be a pair"),
    ("window triple", (Q, K, K), {"window": (1, 2, 3)}, TypeError, "window must be a pair"),
    ("window negative", (Q, K, K), {"window": (-1, 0)}, ValueError, "window sides must be 0 or more"),
    ("window float", (Q, K, K), {"window": (1.0, 0)}, TypeError, "window must be integers"),
    ("scale nan", (Q, K, K), {"scale": float("nan")}, ValueError, "scale must be finite"),
    ("scale inf", (Q, K, K), {"scale": -np.inf}, ValueError, "scale must be finite"),
    ("scale beyond float32", (Q, K, K), {"scale": 1e39}, ValueError, "scale must be finite, in float32 too"),
    ("scale word", (Q, K, K), {"scale": "1"}, TypeError, "scale must be a real number, got str"),
    ("scale complex", (Q, K, K), {"scale": 1j}, TypeError, "scale must be a real number, got complex"),
    ("dropout 1", (Q, K, K), {"dropout_p": 1.0}, ValueError, "dropout_p must be in \\[0, 1\\)"),
    ("dropout negative", (Q, K, K), {"dropout_p": -0.1}, ValueError, "dropout_p must be in \\[0, 1\\)"),
    ("dropout nan", (Q, K, K), {"dropout_p": float("nan")}, ValueError, "dropout_p must be in \\[0, 1\\)"),
    ("dropout word", (Q, K, K), {"dropout_p": "0"}, TypeError, "dropout_p must be a real number"),
    ("layout", (Q, K, K), {"layout": "LBHD"}, ValueError, "layout must be one of"),
    ("backend", (Q, K, K), {"backend": "gpu"}, ValueError, "backend must be"),
    ("aux word", (Q, K, K), {"return_aux": "lse"}, TypeError, "return_aux must be a tuple"),
    ("aux name", (Q, K, K), {"return_aux": ("loss",)}, ValueError, "return_aux names must be among"),
    ("precision", (Q, K, K), {"precision": "float8"}, ValueError, "precision must be None or"),
    ("out list", (Q, K, K), {"out": []}, TypeError, "out must be a NumPy array"),
    ("out dtype", (Q, K, K), {"out": np.empty(Q.shape)}, TypeError, "out must be float32, as query is, got float64"),
    ("out shape", (Q, K, K), {"out": np.empty((2, 4, 5, 7), "f4")}, ValueError, "out must have shape"),
    ("out byte order", (Q, K, K), {"out": np.empty(Q.shape, ">f4")}, TypeError, "out must be float32"),
    ("out overlaps itself", (Q, K, K), {"out": SELF_OVERLAPPING}, ValueError, "overlap itself"),
    ("out is query", (Q, K, K), {"out": Q}, ValueError, "out must not share memory with query"),
    ("out overlaps", (BUFFER[..., :8], K, K), {"out": BUFFER[..., 4:12]}, ValueError, "share memory with query"),
]  # fmt: skip

TO_COME = {
    "softcap": 30.0,
    "alibi_slopes": np.ones(4, np.float32),
    "sinks": np.ones(4, np.float32),
    "score_mod": lambda s, b, h, i, j: s,
    "mask_mod": lambda b, h, i, j: True,
    "block_mask": object(),
    "dropout_p": 0.5,
    "dropout_seed": 1,
    "precision": "bfloat16",
    "return_aux": ("entropy",),
    "backend": "cuda",
}


@pytest.mark.parametrize(("arrays", "options", "error", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong(arrays: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    out = options.get("out")
    before = out.copy() if isinstance(out, np.ndarray) else None
    with pytest.raises(error, match=message):
        scaled_dot_product_attention(*arrays, **{"backend": "reference", **options})
    if before is not None:
        np.testing.assert_array_equal(out, before)


def test_read_only_out() -> None:
    out = np.empty(Q.shape, np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out must be writeable"):
        scaled_dot_product_attention(Q, K, K, out=out)


@pytest.mark.parametrize("name", TO_COME)
def test_nothing_is_accepted_and_ignored(name: str) -> None:
    with pytest.raises(NotImplementedError, match="not implemented yet"):
        scaled_dot_product_attention(Q, K, K, **{name: TO_COME[name]})


def test_out_beside_an_input_in_one_buffer() -> None:
    out = BUFFER[..., 8:]
    assert scaled_dot_product_attention(BUFFER[..., :8], K, K, out=out) is out


def test_other_byte_order_and_subclasses() -> None:
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, 2, n, 4), dtype=np.float32) for n in (3, 5, 5))
    mask = rng.standard_normal((3, 5))
    expected = scaled_dot_product_attention(query, key, value, mask)
    swapped = [x.astype(x.dtype.newbyteorder(">")) for x in (query, key, value, mask)]
    np.testing.assert_array_equal(scaled_dot_product_attention(*swapped), expected)

    class Kind(np.ndarray):
        pass

    viewed = [x.view(Kind) for x in (query, key, value, mask)]
    assert type(scaled_dot_product_attention(*viewed)) is np.ndarray
    np.testing.assert_array_equal(scaled_dot_product_attention(*viewed), expected)


def test_memory_map(tmp_path: Any) -> None:
    x = np.random.default_rng(0).standard_normal((2, 6, 4), dtype=np.float32)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    expected = scaled_dot_product_attention(x, x, x)
    np.testing.assert_array_equal(scaled_dot_product_attention(mapped, mapped, mapped), expected)


@pytest.mark.parametrize(
    ("array", "overlaps"),
    [
        (np.empty((3, 4)), False),
        (np.empty((3, 4)).T, False),
        (np.empty((3, 8))[::-1, ::2], False),
        (np.broadcast_to(np.empty(4), (3, 4)), True),
        (np.lib.stride_tricks.sliding_window_view(np.empty(9), 3), True),
        (np.lib.stride_tricks.as_strided(np.empty(9), (3, 3), (24, 8)), False),
        (np.broadcast_to(np.empty(4), (0, 4)), False),
        (np.broadcast_to(np.empty(4), (1, 4)), False),
    ],
)
def testoverlaps_itself(array: np.ndarray, overlaps: bool) -> None:
    assert overlaps_itself(array) is overlaps
