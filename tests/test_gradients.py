"""The gradient functions as they are called, and the reference's gradients by what a derivative is."""

from __future__ import annotations

import inspect
from typing import Any

import mods
import numpy as np
import pytest
from gradient_contract import GradientContract
from tolerances import same_bits

import numba_attn
from numba_attn import (
    Gradients,
    scaled_dot_product_attention,
    scaled_dot_product_attention_vjp,
    varlen_attention,
    varlen_attention_vjp,
)

B, HQ, HKV, LQ, LK, D, DV = 2, 4, 2, 5, 7, 3, 4
RNG = np.random.default_rng(1)
BIAS = RNG.standard_normal((LQ, LK))
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "causal": {"is_causal": True},
    "window, offset": {"query_offset": "bottom_right", "window": (3, None), "is_causal": True},
    "offsets": {"query_offset": [2, -1], "is_causal": True},
    "scale": {"scale": -0.5},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": RNG.standard_normal(HQ)},
    "alibi": {"alibi_slopes": RNG.random(HQ)},
    "alibi of sequences": {"alibi_slopes": RNG.random((B, HQ)), "query_offset": 2},
    "mask": {"attn_mask": BIAS},
    "mask of keys": {"attn_mask": RNG.standard_normal((B, 1, 1, LK))},
    "mask of rows": {"attn_mask": RNG.standard_normal((1, HQ, LQ, 1))},
    "mask with -inf": {"attn_mask": np.where(RNG.random((LQ, LK)) < 0.5, BIAS, -np.inf)},
    "dropout": {"dropout_p": 0.4, "dropout_seed": 3},
    "lengths, sinks": {"query_lengths": [3, 5], "kv_lengths": [4, 7], "sinks": RNG.standard_normal(HQ)},
    "functions": {"score_mod": mods.by_place, "score_mod_grad": mods.by_place_slope, "mask_mod": mods.scattered},
    "block mask": {"block_mask": mods.blocky(mods.prefix, (1, 1, LQ, LK), (2, 3))},
    "everything": {
        "score_mod": mods.by_place, "score_mod_grad": mods.by_place_slope, "softcap": 2.0, "is_causal": True,
        "attn_mask": RNG.standard_normal((HQ, 1, LK)), "alibi_slopes": RNG.random(HQ), "sinks": RNG.random(HQ),
        "dropout_p": 0.2, "dropout_seed": 1, "kv_lengths": [6, 7], "window": (4, 1), "query_offset": 1,
    },
}  # fmt: skip


def arrays(rng: np.random.Generator) -> dict[str, np.ndarray]:
    shapes = {"query": (B, HQ, LQ, D), "key": (B, HKV, LK, D), "value": (B, HKV, LK, DV)}
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


class TestReference(GradientContract):
    backend = "reference"
    test_gradients_are_batch_invariant = None  # sums of NumPy's, in an order that depends on how many there are


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", OPTIONS)
def test_central_differences(name: str, backend: str) -> None:
    rng = np.random.default_rng(0)
    inputs, options = arrays(rng), {"enable_gqa": True, "return_aux": ("lse",), **OPTIONS[name]}
    inputs |= {n: options.pop(n).copy() for n in ("attn_mask", "sinks", "alibi_slopes") if n in options}
    slope = options.pop("score_mod_grad", None)
    (out, aux), vjp = scaled_dot_product_attention_vjp(**inputs, **options, score_mod_grad=slope, backend=backend)
    grad_out = rng.standard_normal(out.shape)
    grad_lse = np.where(np.isfinite(aux.lse), rng.standard_normal(aux.lse.shape), 0)
    got = vjp(grad_out, grad_lse)

    def loss() -> float:
        out, aux = scaled_dot_product_attention(**inputs, **options, backend=backend)
        return float((out * grad_out).sum() + (np.where(np.isfinite(aux.lse), aux.lse, 0) * grad_lse).sum())

    for argument, x in inputs.items():
        expected, step = np.zeros_like(x), 1e-5
        for place in np.ndindex(x.shape):
            if not np.isfinite(x[place]):
                continue
            middle, sides = x[place], []
            for side in (step, -step):
                x[place] = middle + side
                sides.append(loss())
            x[place], expected[place] = middle, (sides[0] - sides[1]) / (2 * step)
        error = np.abs(getattr(got, argument) - expected).max()
        assert error <= 1e-6 * max(np.abs(expected).max(), 1e-3), (argument, error)


@pytest.mark.parametrize("name", [n for n, o in OPTIONS.items() if not {"query_lengths", "kv_lengths"} & o.keys()])
def test_packed_sequences(name: str) -> None:
    """The gradients of each sequence alone, but for what sequences share."""
    rng = np.random.default_rng(0)
    rows, keys = np.array([0, 3, 3, 8, 10]), np.array([0, 2, 5, 12, 13])
    shapes = (10, HQ, D), (13, HKV, D), (13, HKV, DV)
    query, key, value = (rng.standard_normal(shape) for shape in shapes)
    options = {k: x for k, x in OPTIONS[name].items() if k != "block_mask"}
    if np.ndim(options.get("query_offset", 0)) or np.ndim(options.get("alibi_slopes")) > 1 or "dropout_p" in options:
        pytest.skip("numbers, or random numbers, of each sequence")
    if np.shape(options.get("attn_mask", BIAS))[0] == B:
        pytest.skip("a mask of each sequence")
    out, vjp = varlen_attention_vjp(query, key, value, rows, keys, **options)
    slope = options.pop("score_mod_grad", None)
    assert same_bits(out, varlen_attention(query, key, value, rows, keys, **options))
    grad_out, grad_lse = rng.standard_normal(out.shape), rng.standard_normal(out.shape[:-1])
    got = vjp(grad_out, grad_lse)
    shared: dict[str, Any] = {}
    for b in range(4):
        r, k = slice(rows[b], rows[b + 1]), slice(keys[b], keys[b + 1])
        alone = {**options}
        if "attn_mask" in alone:
            lengths = zip((r.stop - r.start, k.stop - k.start), alone["attn_mask"].shape[-2:], strict=True)
            mask = alone["attn_mask"][(..., *(slice(n if m > 1 else 1) for n, m in lengths))]
            alone["attn_mask"] = mask[0] if mask.ndim == 4 else mask
        if "score_mod" in alone or "mask_mod" in alone:
            alone |= {f: _of_sequence(alone[f], b) for f in ("score_mod", "mask_mod") if f in alone}
        each = (x.swapaxes(0, 1) for x in (query[r], key[k], value[k]))
        _, its = scaled_dot_product_attention_vjp(
            *each, enable_gqa=True, **alone, score_mod_grad=None if slope is None else _of_sequence(slope, b)
        )
        expected = its(grad_out[r].swapaxes(0, 1), grad_lse[r].swapaxes(0, 1))
        for n, part in (("query", r), ("key", k), ("value", k)):
            assert same_bits(getattr(got, n)[part].swapaxes(0, 1), getattr(expected, n)), (b, n)
        for n in ("sinks", "alibi_slopes"):
            if getattr(expected, n) is not None:
                shared[n] = shared.get(n, 0) + getattr(expected, n)
    for n, total in shared.items():
        np.testing.assert_allclose(getattr(got, n), total, rtol=1e-10, atol=1e-12)


def _of_sequence(function: Any, b: int) -> Any:
    """The function as if the only sequence were sequence b."""
    if function.__code__.co_argcount == 5:
        return lambda score, _, h, i, j: function(score, b, h, i, j)
    return lambda _, h, i, j: function(b, h, i, j)


def test_signatures() -> None:
    for name in ("scaled_dot_product_attention", "varlen_attention"):
        forward, vjp = (inspect.signature(getattr(numba_attn, n)) for n in (name, f"{name}_vjp"))
        assert [*forward.parameters, "score_mod_grad"] == [*vjp.parameters]


def test_results_are_those_of_the_forward_function() -> None:
    inputs = arrays(np.random.default_rng(0))
    out, _ = scaled_dot_product_attention_vjp(**inputs, enable_gqa=True)
    assert isinstance(out, np.ndarray)
    (_, aux), vjp = scaled_dot_product_attention_vjp(**inputs, enable_gqa=True, return_aux=("entropy",))
    assert aux.lse is None and aux.entropy is not None
    first, second = vjp(out), vjp(out)
    assert isinstance(first, Gradients) and same_bits(first, second), "a second call gives the same"
    assert first.attn_mask is None and first.sinks is None


X = np.ones((2, 3, 4), np.float32)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"score_mod": mods.nearer_is_more}, ValueError, "score_mod has a gradient only with score_mod_grad"),
    ({"score_mod_grad": mods.unit_slope}, ValueError, "score_mod_grad must be None without a score_mod"),
    ({"score_mod": mods.unit_slope, "score_mod_grad": 3}, TypeError, "score_mod_grad must be a function"),
    ({"score_mod": mods.unit_slope, "score_mod_grad": mods.prefix}, TypeError, "score_mod_grad must take 5 arguments"),
    ({"precision": "bfloat16"}, NotImplementedError, "precision must be None for gradients"),
    ({"is_causal": 1}, TypeError, "is_causal must be True or False"),
]
BAD_ABOVE: list[tuple[tuple[Any, ...], type[Exception], str]] = [
    ((X[0],), ValueError, "grad_out must have shape"),
    ((X.astype(np.float64),), TypeError, "grad_out must be float32"),
    ((1.0,), TypeError, "grad_out must be"),
    ((X, X), ValueError, "grad_lse must have shape"),
    ((X, X[..., 0].astype(np.float64)), TypeError, "grad_lse must be float32"),
    ((X, None, "query"), TypeError, "wanted must be a tuple"),
    ((X, None, ("weights",)), ValueError, "wanted names must be among"),
    ((X, None, ("sinks",)), ValueError, "wanted names 'sinks'"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        scaled_dot_product_attention_vjp(X, X, X, **options)


@pytest.mark.parametrize(("above", "error", "message"), BAD_ABOVE)
def test_bad_gradients_from_above(above: tuple[Any, ...], error: type[Exception], message: str) -> None:
    _, vjp = scaled_dot_product_attention_vjp(X, X, X)
    with pytest.raises(error, match=message):
        vjp(*above)


def test_a_derivative_that_cannot_be_compiled_is_named() -> None:
    functions = {"score_mod": mods.unit_slope, "score_mod_grad": lambda score, b, h, i, j: "x"}
    with pytest.raises(TypeError, match=r"score_mod_grad .* cannot be compiled"):
        scaled_dot_product_attention_vjp(X, X, X, **functions)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": BIAS}, {"enable_gqa": True}])
def test_torch_agrees(options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    inputs = arrays(np.random.default_rng(0))
    if "enable_gqa" not in options:
        inputs["query"] = inputs["query"][:, :HKV].copy()
    tensors = {name: torch.from_numpy(x).requires_grad_() for name, x in inputs.items()}
    tensors |= {"attn_mask": torch.from_numpy(BIAS).requires_grad_()} if "attn_mask" in options else {}
    others = {name: x for name, x in options.items() if name != "attn_mask"}
    theirs = torch.nn.functional.scaled_dot_product_attention(**tensors, **others)
    grad_out = np.random.default_rng(1).standard_normal(tuple(theirs.shape))
    expected = torch.autograd.grad(theirs, list(tensors.values()), torch.from_numpy(grad_out))
    _, vjp = scaled_dot_product_attention_vjp(**inputs, **options)
    got = vjp(grad_out)
    for name, x in zip(tensors, expected, strict=True):
        np.testing.assert_allclose(getattr(got, name), x, rtol=1e-9, atol=1e-12)
