"""Bad input: every mistake gives its error, before anything is written."""

from __future__ import annotations

import functools
import re
from typing import Any

import mods
import numpy as np
import pytest
from numba import njit

from numba_attn import Aux, scaled_dot_product_attention
from numba_attn.checks import overlaps_itself
from numba_attn.problem import AUX_NAMES, MOD_PARAMETERS

Q = np.zeros((2, 4, 5, 8), np.float32)
K = np.zeros((2, 4, 7, 8), np.float32)
BUFFER = np.zeros((2, 4, 5, 16), np.float32)

SELF_OVERLAPPING = np.lib.stride_tricks.as_strided(Q, Q.shape, (0, 0, 0, 4))

DOUBLES = tuple(x.astype("f8") for x in (Q, K, K))
HALVES = tuple(x.astype("f2") for x in (Q, K, K))

Wrong = tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]


def _wrong_numbers(name: str) -> list[Wrong]:
    """Of an option with a number for each head."""
    cases: list[tuple[str, Any, type[Exception], str]] = [
        ("list", [1.0] * 4, TypeError, f"{name} must be a NumPy array, got list"),
        ("number", 1.0, TypeError, f"{name} must be a NumPy array, got float"),
        ("integers", np.ones(4, int), TypeError, f"{name} must be floating point, got int64"),
        ("flags", np.ones(4, bool), TypeError, f"{name} must be floating point, got bool"),
        ("complex", np.ones(4, complex), TypeError, f"{name} must be floating point, got complex128"),
        ("masked", np.ma.array(np.ones(4)), TypeError, f"{name} must not be a masked array"),
        ("0-d", np.array(1.0), ValueError, f"{name} must have shape \\(4,\\)"),
        ("too few", np.ones(3), ValueError, f"{name} must have shape \\(4,\\).*, got \\(3,\\)"),
        ("too many axes", np.ones((1, 2, 4)), ValueError, f"{name} must have shape"),
        *(
            (str(bad), np.array([0, bad, 1, 2], np.float32), ValueError, f"{name} must be finite, got {bad}")
            for bad in (np.nan, np.inf, -np.inf)
        ),
    ]
    return [(f"{name} {kind}", (Q, K, K), {name: value}, error, text) for kind, value, error, text in cases]


class _Callable:
    def __call__(self, *arguments: Any) -> bool:
        return True


def _wrong_functions(name: str) -> list[Wrong]:
    """Of an option that is a function."""
    expected = ", ".join(MOD_PARAMETERS[name])
    cases: list[tuple[str, Any, str]] = [
        ("array", np.ones((5, 7), bool), f"{name} must be a function of \\({expected}\\), got numpy.ndarray"),
        ("word", "causal", f"{name} must be a function of .* got str"),
        ("flag", True, f"{name} must be a function of .* got bool"),
        ("of nothing", lambda: 0.0, f"{name} must take .* arguments \\({expected}\\), got '<lambda>' with 0"),
        ("of 3", lambda h, i, j: 0.0, f"{name} must take .* with 3"),
        ("of 6", lambda s, b, h, i, j, n: 0.0, f"{name} must take .* with 6"),
        ("of any number", lambda *arguments: 0.0, f"{name} must take"),
        ("of keywords", lambda s, b, h, i, **rest: 0.0, f"{name} must take"),
        ("of keyword-only", lambda s, b, h, i, *, j: 0.0, f"{name} must take"),
        ("compiled, of 2", njit(lambda i, j: i >= j), f"{name} must take .* with 2"),
        ("built in", max, f"{name} must be a Python or @njit function, got builtin_function_or_method"),
        ("ufunc", np.add, f"{name} must be a Python or @njit function, got numpy.ufunc"),
        ("object", _Callable(), f"{name} must be a Python or @njit function, got test_problem._Callable"),
        ("partial", functools.partial(mods.prefix, 0), f"{name} must be a Python or @njit function"),
    ]
    return [(f"{name} {kind}", (Q, K, K), {name: value}, TypeError, text) for kind, value, text in cases]


WRONG: list[Wrong] = [
    ("list", ([[1.0]], K, K), {}, TypeError, "query must be a NumPy array, got list"),
    ("None", (Q, None, K), {}, TypeError, "key must be a NumPy array, got NoneType"),
    ("masked array", (Q, K, np.ma.array(K)), {}, TypeError, "value must not be a masked array"),
    ("integers", (Q.astype(int), K, K), {}, TypeError, "query must be float32, float64, float16 or bfloat16, got i"),
    ("half and single", (Q.astype("f2"), K, K), {}, TypeError, "one dtype, got float16, float32 and float32"),
    ("two of 16 bits", (Q.view("f2"), K, K), {}, TypeError, "one dtype, got float16, float32 and float32"),
    ("complex", (Q, K.astype("c8"), K), {}, TypeError, "key must be float32, float64, float16 or bfloat16"),
    ("objects", (Q, K, K.astype(object)), {}, TypeError, "value must be float32, .*, got object"),
    ("long double", (Q.astype(np.longdouble), K, K), {}, TypeError, "query must be float32, .*, got "),
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
    ("byte mask", (Q, K, K), {"attn_mask": np.ones((5, 7), np.uint8)}, TypeError, "attn_mask must be .*, got uint8"),
    ("16-bit mask", (Q, K, K), {"attn_mask": np.ones((5, 7), np.int16)}, TypeError, "attn_mask must be .*, got int16"),
    ("complex mask", (Q, K, K), {"attn_mask": np.ones((5, 7), "c8")}, TypeError, "attn_mask must be .*, got complex64"),
    ("list mask", (Q, K, K), {"attn_mask": [[True]]}, TypeError, "attn_mask must be a NumPy array, got list"),
    ("mask shape", (Q, K, K), {"attn_mask": np.ones((5, 6), bool)}, ValueError, "\\(5, 6\\) does not broadcast to"),
    ("mask rank", (Q, K, K), {"attn_mask": np.ones((1,) * 5, bool)}, ValueError, "does not broadcast to"),
    ("mask empty axis", (Q, K, K), {"attn_mask": np.ones((0, 7), bool)}, ValueError, "does not broadcast to"),
    ("kv_lengths too long", (Q, K, K), {"kv_lengths": [7, 8]}, ValueError, "between 0 and 7, got 8"),
    ("kv_lengths negative", (Q, K, K), {"kv_lengths": -1}, ValueError, "between 0 and 7, got -1"),
    ("kv_lengths wider", (Q, K, K), {"kv_lengths": [2**70, 1]}, ValueError, f"between 0 and 7, got {2**70}"),
    ("kv_lengths unsigned", (Q, K, K), {"kv_lengths": [2**63, 0]}, ValueError, f"between 0 and 7, got {2**63}"),
    ("kv_lengths objects", (Q, K, K), {"kv_lengths": np.array([7, 7], object)}, TypeError, "numpy.ndarray of object"),
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
    ("aux names", (Q, K, K), {"return_aux": ("lse", "loss")}, ValueError, "names must be among .* got 'loss'"),
    ("aux empty name", (Q, K, K), {"return_aux": ("",)}, ValueError, "return_aux names must be among"),
    ("aux flag", (Q, K, K), {"return_aux": True}, TypeError, "return_aux must be a tuple"),
    ("aux None", (Q, K, K), {"return_aux": None}, TypeError, "return_aux must be a tuple"),
    ("aux of numbers", (Q, K, K), {"return_aux": (1,)}, ValueError, "return_aux names must be among"),
    ("aux generator", (Q, K, K), {"return_aux": (x for x in ["lse"])}, TypeError, "return_aux must be a tuple"),
    ("aux empty word", (Q, K, K), {"return_aux": ""}, TypeError, "return_aux must be a tuple"),
    ("precision", (Q, K, K), {"precision": "float8"}, ValueError, "precision must be None or"),
    ("precision type", (Q, K, K), {"precision": np.float32}, ValueError, "precision must be None or"),
    ("precision of doubles", DOUBLES, {"precision": "bfloat16"}, TypeError, "is for float32 input, got float64"),
    ("precision of halves", HALVES, {"precision": "bfloat16"}, TypeError, "is for float32 input, got float16"),
    ("softcap 0", (Q, K, K), {"softcap": 0}, ValueError, "softcap must be positive and finite, or None .* got 0"),
    ("softcap negative", (Q, K, K), {"softcap": -30.0}, ValueError, "softcap must be positive and finite"),
    ("softcap inf", (Q, K, K), {"softcap": np.inf}, ValueError, "softcap must be positive and finite"),
    ("softcap nan", (Q, K, K), {"softcap": np.nan}, ValueError, "softcap must be positive and finite"),
    ("softcap word", (Q, K, K), {"softcap": "30"}, TypeError, "softcap must be a real number, got str"),
    ("softcap flag", (Q, K, K), {"softcap": True}, TypeError, "softcap must be a real number, got bool"),
    ("softcap complex", (Q, K, K), {"softcap": 1j}, TypeError, "softcap must be a real number, got complex"),
    *(case for name in ("alibi_slopes", "sinks") for case in _wrong_numbers(name)),
    ("slopes shape", (Q, K, K), {"alibi_slopes": np.ones((1, 4))}, ValueError, "or \\(2, 4\\), got \\(1, 4\\)"),
    ("slopes transposed", (Q, K, K), {"alibi_slopes": np.ones((4, 2))}, ValueError, "have shape .* got \\(4, 2\\)"),
    ("sinks per batch", (Q, K, K), {"sinks": np.ones((2, 4))}, ValueError, "shape \\(4,\\), got \\(2, 4\\)"),
    ("sinks of key heads", (Q, K[:, :2], K[:, :2]), {"sinks": np.ones(2), "enable_gqa": True}, ValueError, "\\(4,\\)"),
    *(case for name in ("score_mod", "mask_mod") for case in _wrong_functions(name)),
    ("score_mod without score", (Q, K, K), {"score_mod": lambda b, h, i, j: 0.0}, TypeError, "'<lambda>' with 4"),
    ("mask_mod with score", (Q, K, K), {"mask_mod": lambda s, b, h, i, j: True}, TypeError, "'<lambda>' with 5"),
    ("block_mask array", (Q, K, K), {"block_mask": np.ones((5, 7), bool)}, TypeError, "must be a BlockMask, got numpy"),
    ("block_mask function", (Q, K, K), {"block_mask": mods.prefix}, TypeError, "must be a BlockMask, got func"),
    *(
        (f"block_mask {shape}", (Q, K, K), {"block_mask": mods.blocky(mods.prefix, shape, (4, 4))}, ValueError,
         f"block_mask was made for .* = {re.escape(str(shape))}, got a problem of \\(2, 4, 5, 7\\)")
        for shape in ((1, 1, 7, 5), (1, 1, 5, 8), (1, 1, 6, 7), (3, 1, 5, 7), (1, 2, 5, 7), (4, 2, 5, 7))
    ),
    ("dropout flag", (Q, K, K), {"dropout_p": True}, TypeError, "dropout_p must be a real number, got bool"),
    ("dropout above 1", (Q, K, K), {"dropout_p": 1.5}, ValueError, "dropout_p must be in \\[0, 1\\)"),
    ("seed negative", (Q, K, K), {"dropout_seed": -1}, ValueError, "dropout_seed must be in \\[0, 2.*, got -1"),
    ("seed of 65 bits", (Q, K, K), {"dropout_seed": 1 << 64, "dropout_p": 0.5}, ValueError, "dropout_seed must be in"),
    ("seed float", (Q, K, K), {"dropout_seed": 1.0}, TypeError, "dropout_seed must be integers, got float"),
    ("seed flag", (Q, K, K), {"dropout_seed": False}, TypeError, "dropout_seed must be integers, got bool"),
    ("seed word", (Q, K, K), {"dropout_seed": "1"}, TypeError, "dropout_seed must be integers, got str"),
    ("out list", (Q, K, K), {"out": []}, TypeError, "out must be a NumPy array"),
    ("out dtype", (Q, K, K), {"out": np.empty(Q.shape)}, TypeError, "out must be float32, as query is, got float64"),
    ("out shape", (Q, K, K), {"out": np.empty((2, 4, 5, 7), "f4")}, ValueError, "out must have shape"),
    ("out byte order", (Q, K, K), {"out": np.empty(Q.shape, ">f4")}, TypeError, "out must be float32"),
    ("out overlaps itself", (Q, K, K), {"out": SELF_OVERLAPPING}, ValueError, "overlap itself"),
    ("out is query", (Q, K, K), {"out": Q}, ValueError, "out must not share memory with query"),
    ("out in key", (Q, K, K.copy()), {"out": K[:, :, :5]}, ValueError, "out must not share memory with key"),
    ("out in value", (Q, K.copy(), K), {"out": K[:, :, 2:]}, ValueError, "out must not share memory with value"),
    ("out in mask", (Q, K, K), {"attn_mask": BUFFER[..., :7], "out": BUFFER[..., 6:14]}, ValueError, "with attn_mask"),
    ("out overlaps", (BUFFER[..., :8], K, K), {"out": BUFFER[..., 4:12]}, ValueError, "share memory with query"),
]  # fmt: skip


@pytest.mark.parametrize(("arrays", "options", "error", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong(arrays: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    """Where `out` is not what is wrong, one that would fit is given, and stays as it was."""
    if "out" not in options and all(isinstance(x, np.ndarray) and x.ndim for x in arrays):
        query, _, value = arrays
        options = {**options, "out": np.full((*query.shape[:-1], value.shape[-1]), 7, query.dtype)}
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


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": np.float32(3)},
        {"softcap": 5},
        {"alibi_slopes": np.ones(4, np.float16)},
        {"alibi_slopes": np.ones((2, 4), ">f4")},
        {"alibi_slopes": np.ones((4, 2)).T},
        {"sinks": np.ones(8, np.float32)[::2]},
        {"sinks": np.ones(4, ">f8")},
        {"score_mod": njit(mods.nearer_is_more)},
        {"mask_mod": njit(mods.not_later)},
        {"mask_mod": lambda b, h, i, j=0: True},
        {"block_mask": mods.blocky(mods.prefix, (2, 4, 5, 7), (3, 2))},
        {"block_mask": mods.blocky(mods.prefix, (2, 1, 5, 7), (3, 2))},
        {"dropout_p": 0},
        {"dropout_p": np.float32(0.5)},
        {"dropout_p": 0.5, "dropout_seed": (1 << 64) - 1},
        {"dropout_p": 0.5, "dropout_seed": np.uint64((1 << 64) - 1)},
        {"precision": "bfloat16"},
        {"attn_mask": np.ones((5, 7), np.float16)},
        {"return_aux": []},
    ],
    ids=lambda options: next(iter(options)),
)
def test_accepted(options: dict[str, Any]) -> None:
    out = np.full(Q.shape, 7, Q.dtype)
    assert scaled_dot_product_attention(Q, K, K, out=out, backend="reference", **options) is out
    assert (out == 0).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits(dtype: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    query, key, value = (x.astype(dtype) for x in (Q, K, K))
    slopes = np.ones(4, dtype)
    out, aux = scaled_dot_product_attention(
        query, key, value, np.ones((5, 7), dtype), alibi_slopes=slopes, sinks=slopes, return_aux=AUX_NAMES,
        backend="reference",
    )  # fmt: skip
    assert out.dtype == query.dtype
    assert all(x.dtype == np.float32 for x in aux)
    with pytest.raises(TypeError, match=f"out must be {dtype}, as query is, got float32"):
        scaled_dot_product_attention(query, key, value, out=Q.copy(), backend="reference")
    with pytest.raises(TypeError, match=f"one dtype, got {dtype}, {dtype} and float32"):
        scaled_dot_product_attention(query, key, K, backend="reference")


def test_the_two_types_of_sixteen_bits_do_not_mix() -> None:
    pytest.importorskip("ml_dtypes")
    with pytest.raises(TypeError, match="one dtype, got float16, bfloat16 and bfloat16"):
        scaled_dot_product_attention(Q.astype("f2"), K.astype("bfloat16"), K.astype("bfloat16"))


def test_other_types_of_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    small = [x.astype(ml_dtypes.float8_e4m3fn) for x in (Q, K, K)]
    with pytest.raises(TypeError, match="query must be float32, float64, float16 or bfloat16, got float8_e4m3fn"):
        scaled_dot_product_attention(*small)


@pytest.mark.parametrize("layout", ["BHLD", "BLHD"])
@pytest.mark.parametrize("names", [("lse",), ["entropy", "max_score"], {"key_weight"}, AUX_NAMES[::-1], ("lse", "lse")])
def test_statistics_that_are_named(names: Any, layout: str) -> None:
    arrays = [x if layout == "BHLD" else x.swapaxes(1, 2) for x in (Q, K, K)]
    result = scaled_dot_product_attention(*arrays, return_aux=names, layout=layout, backend="reference")
    assert isinstance(result, tuple)
    _, aux = result
    assert isinstance(aux, Aux)
    assert {name for name, x in aux._asdict().items() if x is not None} == set(names)
    for name in names:
        lengths = 7 if name == "key_weight" else 5
        x = getattr(aux, name)
        assert x.shape == ((2, 4, lengths) if layout == "BHLD" else (2, lengths, 4)) and x.dtype == np.float32


def test_no_statistics_no_tuple() -> None:
    assert isinstance(scaled_dot_product_attention(Q, K, K, return_aux=(), backend="reference"), np.ndarray)


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
