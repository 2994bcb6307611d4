"""ONNX's own test cases of the two operators, and what they leave open."""

from __future__ import annotations

import importlib
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

import ml_dtypes  # noqa: E402, of onnx
from onnx import helper, parser  # noqa: E402
from onnx.backend.test.case import node as node_tests  # noqa: E402
from onnx.backend.test.runner import Runner  # noqa: E402
from onnx.reference import ReferenceEvaluator  # noqa: E402

import numba_attn.onnx  # noqa: E402

for module in ("attention", "rotaryembedding"):
    # Loading a module makes its cases.  `collect_testcases` would load all of them, and returns those of one operator.
    importlib.import_module(f"{node_tests.__name__}.{module}")
CASES = {
    case.name.removeprefix("test_"): case
    for case in node_tests._NodeTestCases
    if case.model.graph.node[0].op_type in ("Attention", "RotaryEmbedding") and not case.name.endswith("_expanded")
}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float16), BFLOAT16, np.dtype(np.float32), np.dtype(np.float64)]


def run(op: str, *inputs: Any, outputs: tuple[str, ...] = ("Y",), opset: int = 25, **attributes: Any) -> Any:
    """The outputs of one operator that have a name, by our classes; an input that is None is left out."""
    names = ["" if x is None else f"x{i}" for i, x in enumerate(inputs)]
    node = helper.make_node(op, names, outputs, **attributes)
    named = [name for name in outputs if name]
    function = helper.make_function(
        "test", "one", [name for name in names if name], named, [node], [helper.make_opsetid("", opset)]
    )
    feeds = {name: x for name, x in zip(names, inputs, strict=True) if name}
    got = ReferenceEvaluator(function, new_ops=numba_attn.onnx.ops()).run(None, feeds, attributes={})
    return got[0] if len(named) == 1 else got


def normal(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


# ONNX's cases ---------------------------------------------------------------------------------------------------------


def test_cases_are_there() -> None:
    operators = [case.model.graph.node[0].op_type for case in CASES.values()]
    assert (operators.count("Attention"), operators.count("RotaryEmbedding")) >= (93, 8)


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    case = CASES[name]
    evaluator = ReferenceEvaluator(case.model, new_ops=numba_attn.onnx.ops())
    for inputs, expected in case.data_sets:
        got = evaluator.run(None, dict(zip(evaluator.input_names, inputs, strict=True)))
        # Shapes, dtypes and values, these to two units in the last place where they are bfloat16.
        Runner.assert_similar_outputs(expected, got, rtol=case.rtol, atol=case.atol)


# Whole graphs ---------------------------------------------------------------------------------------------------------


def test_graph() -> None:
    model = parser.parse_model("""
        <ir_version: 10, opset_import: ["": 24]>
        layer (float[2, L, 12] x, float[12, 16] wq, float[12, 8] wk, float[12, 8] wv, float[16, 12] wo)
            => (float[2, L, 12] y)
        {
            q = MatMul (x, wq)
            k = MatMul (x, wk)
            v = MatMul (x, wv)
            a = Attention <is_causal = 1, q_num_heads = 4, kv_num_heads = 2> (q, k, v)
            y = MatMul (a, wo)
        }""")
    onnx.checker.check_model(model)
    x, wq, wk, wv, wo = normal(2, 7, 12), normal(12, 16), normal(12, 8), normal(12, 8, seed=1), normal(16, 12)
    feeds = dict(zip(["x", "wq", "wk", "wv", "wo"], (x, wq, wk, wv, wo), strict=True))
    (got,) = ReferenceEvaluator(model, new_ops=numba_attn.onnx.ops()).run(None, feeds)

    q, k, v = ((x @ w).reshape(2, 7, -1, 4).swapaxes(1, 2) for w in (wq, wk, wv))
    k, v = np.repeat(k, 2, axis=1), np.repeat(v, 2, axis=1)
    weight = np.exp(q @ k.swapaxes(2, 3) / 2) * np.tri(7)
    y = (weight / weight.sum(axis=3, keepdims=True) @ v).swapaxes(1, 2).reshape(2, 7, 16) @ wo
    np.testing.assert_allclose(got, y, rtol=1e-4, atol=1e-5)


def test_output_left_out_is_no_input() -> None:
    """Keys that a node does not give away do not become the mask that the next one does not have."""
    model = parser.parse_model("""
        <ir_version: 10, opset_import: ["": 24]>
        twice (float[1, 2, 5, 5] x) => (float[1, 2, 5, 5] y, float[1, 2, 5, 5] scores)
        {
            a, , , scores = Attention (x, x, x)
            y = Attention (a, x, x, , , )
        }""")
    x = normal(1, 2, 5, 5)
    y, scores = ReferenceEvaluator(model, new_ops=numba_attn.onnx.ops()).run(None, {"x": x})
    np.testing.assert_allclose(scores, x @ x.swapaxes(2, 3) / np.sqrt(5), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(y, run("Attention", run("Attention", x, x, x), x, x))


def test_steps_with_a_cache_are_one_step_without() -> None:
    q, k, v = normal(1, 4, 9, 8), normal(1, 2, 9, 8), normal(1, 2, 9, 6)
    options = {"is_causal": 1, "left_window_size": 3}
    whole = run("Attention", q, k, v, **options)
    past = k[:, :, :0], v[:, :, :0]
    for rows in (slice(0, 4), slice(4, 5), slice(5, 9)):
        new = (x[:, :, rows] for x in (q, k, v))
        y, *past = run("Attention", *new, None, *past, outputs=("Y", "keys", "values"), **options)
        np.testing.assert_allclose(y, whole[:, :, rows], rtol=1e-5, atol=1e-6)
        lengths = np.array([rows.stop])
        y = run("Attention", q[:, :, rows], k, v, None, None, None, lengths, **options)
        np.testing.assert_allclose(y, whole[:, :, rows], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(past[0], k)
    np.testing.assert_array_equal(past[1], v)


# Fused ----------------------------------------------------------------------------------------------------------------


def test_attention_is_the_fused_function(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def attention(query: np.ndarray, key: np.ndarray, value: np.ndarray, *args: Any, **options: Any) -> np.ndarray:
        calls.append(options)
        return np.full((*query.shape[:3], value.shape[3]), 7, query.dtype)

    monkeypatch.setattr(numba_attn.onnx, "scaled_dot_product_attention", attention)
    q, k, v = normal(2, 3, 24), normal(2, 5, 24), normal(2, 5, 12)
    for outputs in (("Y",), ("Y", "", "", "scores")):
        result = run("Attention", q, k, v, outputs=outputs, q_num_heads=3, kv_num_heads=3, softcap=2.0)
        y = result if len(outputs) == 1 else result[0]
        assert y.shape == (2, 3, 12) and (y == 7).all()
    assert len(calls) == 2 and all(call.get("backend") is None and call["softcap"] == 2 for call in calls)


@pytest.mark.parametrize("rank", [3, 4])
def test_no_matrix_is_built(rank: int) -> None:
    L = 2048
    x = normal(1, L, 16) if rank == 3 else normal(1, 2, L, 8)
    mask = np.ones((1, L - 300), np.float32)  # short
    options = {"is_causal": 1, **({"q_num_heads": 2, "kv_num_heads": 2} if rank == 3 else {})}
    run("Attention", x, x, x, mask, **options)  # loads the kernels
    tracemalloc.start()
    try:
        run("Attention", x, x, x, mask, **options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < L * L // 4, f"{peak} bytes"


# Masks and lengths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", [None, 2, 3])
def test_nan_beyond_the_lengths(mode: int | None, dtype: Any) -> None:
    q, k, v = (normal(3, 2, n, 8, dtype=dtype) for n in (2, 6, 6))
    lengths = np.array([0, 2, 5])
    options: dict[str, Any] = {"is_causal": 1, "outputs": ("Y",) if mode is None else ("Y", "", "", "scores")}
    if mode is not None:
        options["qk_matmul_output_mode"] = mode
    clean = run("Attention", q, k, v, None, None, None, lengths, **options)
    for b, n in enumerate(lengths):
        k[b, :, n:] = v[b, :, n:] = np.nan
    poisoned = run("Attention", q, k, v, None, None, None, lengths, **options)
    for a, b in zip(clean, poisoned, strict=True):
        np.testing.assert_array_equal(a.astype(np.float64), b.astype(np.float64))
        assert not np.isnan(b.astype(np.float64)).any()
    y = poisoned if mode is None else poisoned[0]
    assert (y[0] == 0).all() and (y[1:] != 0).all()


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 1, 4), (2, 3, 4), (2, 1, 1, 4), (2, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float", "integer"])
def test_short_mask_masks_what_is_beyond(shape: tuple[int, ...], kind: str) -> None:
    q, k, v = normal(2, 2, 3, 8), normal(2, 2, 6, 8), normal(2, 2, 6, 8)
    number = normal(*shape, seed=1)
    mask: Any = {"bool": number > -0.5, "float": number, "integer": (2 * number).astype(np.int8)}[kind]
    beyond = [(0, 0)] * (mask.ndim - 1) + [(0, 2)]
    if kind == "bool":
        longer = np.pad(mask, beyond, constant_values=False)
    else:
        longer = np.pad(mask.astype(np.float32), beyond, constant_values=-np.inf)
    outputs = ("Y", "", "", "scores")
    for lengths in (None, np.array([4, 3])):
        got = run("Attention", q, k, v, mask, None, None, lengths, outputs=outputs, qk_matmul_output_mode=3)
        expected = run("Attention", q, k, v, longer, None, None, lengths, outputs=outputs, qk_matmul_output_mode=3)
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_mask_of_one_key() -> None:
    """It broadcasts in opset 23; later ones see a mask that is short."""
    q, k, v = normal(1, 2, 3, 8), normal(1, 2, 6, 8), normal(1, 2, 6, 8)
    mask = np.array([[True], [False], [True]])
    old, new = (run("Attention", q, k, v, mask, opset=opset) for opset in (23, 24))
    plain = run("Attention", q, k, v)
    assert (old[:, :, 1] == 0).all() and (new[:, :, 1] == 0).all()
    np.testing.assert_allclose(old[:, :, ::2], plain[:, :, ::2], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new[:, :, ::2], np.repeat(v[:, :, :1], 2, axis=2), rtol=1e-5)


# The matrix -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [None, np.array([5, 3])], ids=["", "lengths"])
@pytest.mark.parametrize("window", [(-1, -1), (1, -1), (2, 1)])
@pytest.mark.parametrize("causal", [0, 1])
def test_matrices(causal: int, window: tuple[int, int], lengths: np.ndarray | None) -> None:
    """Of an independent computation, element by element, with a cap, shared heads and a mask."""
    q, k, v = normal(2, 4, 3, 8), normal(2, 2, 6, 8), normal(2, 2, 6, 5)
    bias = normal(4, 3, 6)
    bias[1, 2, :4] = -np.inf
    raw, capped, masked, weight = (np.zeros((2, 4, 3, 6)) for _ in range(4))
    for b, h, i in np.ndindex(2, 4, 3):
        offset = 0 if lengths is None else lengths[b] - 3
        for j in range(6):
            raw[b, h, i, j] = s = 0.3 * float(q[b, h, i] @ k[b, h // 2, j])
            capped[b, h, i, j] = c = 1.5 * np.tanh(s / 1.5)
            seen = (not causal or j <= i + offset) and (lengths is None or j < lengths[b])
            seen = seen and (window[0] < 0 or j >= i + offset - window[0])
            seen = seen and (window[1] < 0 or j <= i + offset + window[1])
            masked[b, h, i, j] = c + bias[h, i, j] if seen else -np.inf
        if (e := np.exp(masked[b, h, i])).any():
            weight[b, h, i] = e / e.sum()
    for mode, expected in enumerate((raw, capped, masked, weight)):
        y, scores = run(
            *("Attention", q, k, v, bias, None, None, lengths),
            outputs=("Y", "", "", "scores"),
            scale=0.3,
            softcap=1.5,
            is_causal=causal,
            left_window_size=window[0],
            right_window_size=window[1],
            qk_matmul_output_mode=mode,
        )
        np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(y, weight @ np.repeat(v, 2, axis=1), rtol=1e-4, atol=1e-5)


# Types ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_of_another_type(dtype: Any, value_dtype: Any) -> None:
    q, k, v = normal(1, 2, 3, 8, dtype=dtype), normal(1, 2, 6, 8, dtype=dtype), normal(1, 2, 6, 8, dtype=value_dtype)
    y, keys, values = run("Attention", q, k, v, outputs=("Y", "keys", "values"))
    assert (y.dtype, keys.dtype, values.dtype) == (dtype, dtype, value_dtype)
    exact = run("Attention", *(x.astype(np.float64) for x in (q, k, v)))
    tolerance = {2: 2e-2 if dtype == BFLOAT16 else 2e-3, 4: 1e-5, 8: 1e-12}[y.dtype.itemsize]
    np.testing.assert_allclose(y.astype(np.float64), exact, rtol=tolerance, atol=tolerance)


def test_softmax_precision() -> None:
    """A softmax in float64 is one, and none is worse than it would be without."""
    q, k, v = (100 * normal(1, 2, 5, 8, seed=i) for i in range(3))
    exact = run("Attention", *(x.astype(np.float64) for x in (q, k, v))).astype(np.float32)
    np.testing.assert_array_equal(run("Attention", q, k, v, softmax_precision=11), exact)
    for precision in (1, 10, 16):
        np.testing.assert_array_equal(run("Attention", q, k, v, softmax_precision=precision), run("Attention", q, k, v))


# Rotary embedding -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("R", [0, 4])
def test_rotation(R: int, interleaved: int, dtype: Any) -> None:
    """Of pairs as of complex numbers, in both layouts."""
    x = normal(2, 3, 5, 8, dtype=dtype)
    half = (R or 8) // 2
    angle = np.arange(11)[:, None] * 0.7 ** np.arange(half)
    caches = np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)
    positions = np.random.default_rng(0).integers(11, size=(2, 5))
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + half) for i in range(half)]
    exact = x.astype(np.float64)
    turn = (caches[0].astype(np.float64) + 1j * caches[1].astype(np.float64))[positions][:, None]
    for i, (a, b) in enumerate(pairs):
        z = (x[..., a].astype(np.float64) + 1j * x[..., b].astype(np.float64)) * turn[..., i]
        exact[..., a], exact[..., b] = z.real, z.imag

    options = {"interleaved": interleaved, "rotary_embedding_dim": R}
    got = run("RotaryEmbedding", x, *caches, positions, **options)
    assert got.dtype == dtype
    tolerance = float(ml_dtypes.finfo(dtype).eps)  # of one rounding, and some
    np.testing.assert_allclose(got.astype(np.float64), exact, rtol=tolerance, atol=tolerance)
    per_position = run("RotaryEmbedding", x, *(cache[positions] for cache in caches), **options)
    np.testing.assert_array_equal(per_position, got)
    flat = x.swapaxes(1, 2).reshape(2, 5, 24)
    rows_first = run("RotaryEmbedding", flat, *caches, positions, num_heads=3, **options)
    np.testing.assert_array_equal(rows_first.reshape(2, 5, 3, 8).swapaxes(1, 2), got)


# Errors ---------------------------------------------------------------------------------------------------------------


def attention_errors() -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    x = normal(1, 2, 3, 4)
    flat = normal(1, 3, 8)
    return {
        "given together": ((x, x, x, None, x), {}),
        "nonpad_kv_seqlen must not": ((x, x, x, None, x, x, np.array([2])), {}),
        "softmax_precision": ((x, x, x), {"softmax_precision": 7}),
        "qk_matmul_output_mode": ((x, x, x), {"qk_matmul_output_mode": 4}),
        "Q must have 3 or 4 axes": ((x[0, 0], x, x), {}),
        "Q of shape .* needs a number of heads": ((flat, flat, flat), {}),
        "K of shape .* needs a number of heads": ((flat, flat, flat), {"q_num_heads": 2, "kv_num_heads": 3}),
        "does not broadcast": ((x, x, x, np.ones((3, 5), bool)), {}),
        "kv_lengths": ((x, x, x, None, None, None, np.array([4])), {}),
        "window sides": ((x, x, x), {"left_window_size": -2}),
    }


@pytest.mark.parametrize("message", attention_errors())
def test_attention_errors(message: str) -> None:
    inputs, attributes = attention_errors()[message]
    with pytest.raises(ValueError, match=message):
        run("Attention", *inputs, **attributes)


def test_rotary_errors() -> None:
    x, cache, positions = normal(2, 3, 5, 8), normal(11, 4), np.zeros((2, 5), np.int64)
    with pytest.raises(ValueError, match="cos_cache must be"):
        run("RotaryEmbedding", x, cache[:, :3], cache, positions)
    with pytest.raises(ValueError, match="sin_cache must be"):
        run("RotaryEmbedding", x, cache[positions], cache)
    for position in (-1, 11):
        with pytest.raises(ValueError, match=f"position_ids must be between 0 and 10, got {position}"):
            run("RotaryEmbedding", x, cache, cache, np.full_like(positions, position))
    with pytest.raises(ValueError, match="an even number"):
        run("RotaryEmbedding", x, cache, cache, positions, rotary_embedding_dim=10)
    with pytest.raises(ValueError, match="needs a number of heads"):
        run("RotaryEmbedding", normal(2, 5, 24), cache, cache, positions)


def test_without_onnx(python: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert python("import sys, numba_attn.onnx; print('onnx' in sys.modules)") == "False\n"
    monkeypatch.setitem(sys.modules, "onnx.reference.op_run", None)
    with pytest.raises(ImportError, match="pip install onnx"):
        numba_attn.onnx.ops()
