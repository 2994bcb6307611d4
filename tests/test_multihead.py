"""The layer: against PyTorch's, against its own formula, its gradients against differences."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tolerances import same_bits

import numba_attn
from numba_attn import KVCache, MultiHeadAttention, PagedKVCache, apply_rotary, rotary_tables
from numba_attn import scaled_dot_product_attention as attention

ATOL = {np.float32: 2e-6, np.float64: 1e-13}


def layer_of(seed: int = 0, E: int = 24, num_heads: int = 4, num_kv_heads: int = 2, **options: Any) -> Any:
    """A layer of random weights, biases and gains."""
    options = {"dtype": np.float64, **options}
    layer = MultiHeadAttention.init(np.random.default_rng(seed), E, num_heads, num_kv_heads, **options)
    rng = np.random.default_rng(seed + 1)
    for name, x in layer.parameters.items():
        if x.ndim == 1:
            x[...] = rng.standard_normal(x.shape) + ("norm" in name)
    return layer


def numbers(*shape: int, seed: int = 5, dtype: Any = np.float64) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def by_formula(layer: Any, query: np.ndarray, key: np.ndarray, value: np.ndarray, **options: Any) -> np.ndarray:
    """The layer written down, of (B, L, E) arrays, with a copy at every step."""
    held, (Hq, Hkv, D, Dv, *_) = layer.parameters, layer.sizes
    names = "q_proj_weight", "k_proj_weight", "v_proj_weight"
    rows = np.cumsum([Hq * D, Hkv * D])
    weights = np.split(held["in_proj_weight"], rows) if "in_proj_weight" in held else [held[name] for name in names]
    biases = np.split(held["in_proj_bias"], rows) if "in_proj_bias" in held else [0, 0, 0]
    heads = []
    for x, weight, bias, H in zip((query, key, value), weights, biases, (Hq, Hkv, Hkv), strict=True):
        y = x @ weight.T + bias
        heads.append(np.ascontiguousarray(y.reshape(*y.shape[:-1], H, -1).swapaxes(-3, -2)))
    for i, name in enumerate(("q_norm.weight", "k_norm.weight")):
        if name in held:
            heads[i] = heads[i] / np.sqrt((heads[i] ** 2).mean(axis=-1, keepdims=True) + 1e-6) * held[name]
    if "rotary" in options:
        cos, sin, interleaved, offset = options.pop("rotary")
        heads[0] = apply_rotary(heads[0], cos, sin, interleaved=interleaved, position_offset=offset)
        heads[1] = apply_rotary(heads[1], cos, sin, interleaved=interleaved)
    out: Any = attention(*heads, enable_gqa=True, backend="reference", **options)
    joined = out.swapaxes(-3, -2).reshape(*query.shape[:-1], Hq * Dv)
    return joined @ held["out_proj.weight"].T + held.get("out_proj.bias", 0)


# Forward --------------------------------------------------------------------------------------------------------------


LAYERS: dict[str, dict[str, Any]] = {
    "plain": {"num_kv_heads": 4},
    "grouped": {},
    "multi-query": {"num_kv_heads": 1},
    "no bias": {"bias": False},
    "norms": {"qk_norm": True},
    "head sizes": {"head_size": 10, "value_size": 3},
    "widths": {"kdim": 11, "vdim": 7},
    "keys alike, values not": {"vdim": 7, "qk_norm": True},
    "float32": {"dtype": np.float32, "qk_norm": True},
}


FORMS = [  # an input has one width
    (name, form)
    for form in ("self", "key is value", "cross", "cross without batch")
    for name, options in LAYERS.items()
    if form.startswith("cross") or not {"kdim", "vdim"} & set(options)
]


@pytest.mark.parametrize(("name", "form"), FORMS)
def test_is_its_formula(name: str, form: str) -> None:
    layer = layer_of(**LAYERS[name])
    E, Ek, Ev = layer.sizes.widths
    x, y, z = (numbers(2, L, n, seed=n, dtype=layer.dtype) for L, n in ((9, E), (13, Ek), (13, Ev)))
    if form == "cross without batch":
        x, y, z = x[0], y[0], z[0]
    given, all_three = {"self": ((x,), (x, x, x)), "key is value": ((x, y), (x, y, y))}.get(form, ((x, y, z),) * 2)
    for options in ({}, {"is_causal": True, "query_offset": 2}, {"softcap": 2.0, "window": (3, 1), "scale": -0.7}):
        expected = by_formula(layer, *all_three, **options)
        np.testing.assert_allclose(layer(*given, **options), expected, atol=ATOL[layer.dtype.type] * 20, rtol=1e-6)
    if form == "self":
        assert same_bits(layer(x, x, x), layer(x)) and same_bits(layer(x, x), layer(x))
    if form == "key is value":
        assert same_bits(layer(x, y, y), layer(x, y))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(interleaved: bool) -> None:
    """Keys are at their positions from 0, queries at those from their offset."""
    tables = rotary_tables(30, 4, dtype=np.float64)
    layer = layer_of(rotary=tables, interleaved=interleaved, qk_norm=True)
    x, y = numbers(3, 7, 24), numbers(3, 12, 24, seed=6)
    for offset, first in ((0, 0), (5, 5), ([0, 3, 8], [0, 3, 8]), ("bottom_right", 5)):
        rotary = (*tables, interleaved, first)
        expected = by_formula(layer, x, y, y, rotary=rotary, is_causal=True, query_offset=offset)
        np.testing.assert_allclose(layer(x, y, is_causal=True, query_offset=offset), expected, atol=1e-12)


def test_options_reach_attention() -> None:
    layer, x = layer_of(), numbers(2, 9, 24)
    bias, slopes, sinks = numbers(1, 4, 9, 9), np.array([0.5, 0.1, 0, -0.2]), np.arange(4.0)

    def fewer(b: int, h: int, i: int, j: int) -> bool:
        return (i + j + h) % 3 > 0

    options = {"attn_mask": bias, "alibi_slopes": slopes, "sinks": sinks, "mask_mod": fewer, "kv_lengths": [9, 5]}
    np.testing.assert_allclose(layer(x, **options), by_formula(layer, x, x, x, **options), atol=1e-12)
    expected = by_formula(layer, x, x, x, dropout_p=0.4, dropout_seed=3)
    np.testing.assert_allclose(layer(x, dropout_p=0.4, dropout_seed=3), expected, atol=1e-12)


def test_statistics() -> None:
    layer, x = layer_of(), numbers(2, 9, 24)
    names = "lse", "max_score", "entropy", "key_weight"
    out, aux = layer(x, return_aux=names, is_causal=True)
    assert same_bits(out, layer(x, is_causal=True))
    heads = layer.project(x)
    _, expected = attention(*heads, enable_gqa=True, layout="BLHD", is_causal=True, return_aux=names)
    assert same_bits(aux, tuple(y.swapaxes(1, 2) for y in expected)) and aux.lse.shape == (2, 4, 9)


PADDING = {
    "at the end": [[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 0]],
    "in front": [[1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]],
    "scattered": [[0, 1, 0, 0, 1, 0, 1], [0, 0, 1, 0, 0, 0, 0]],
    "everything": [[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]],
}


@pytest.mark.parametrize("name", PADDING)
@pytest.mark.parametrize("batch", [True, False])
def test_key_padding_mask(name: str, batch: bool) -> None:
    """It is a mask, combined with whatever else there is; NaN in padding is never used."""
    layer = layer_of()
    x, y, padding = numbers(2, 5, 24), numbers(2, 7, 24, seed=6), np.array(PADDING[name], bool)
    if not batch:
        x, y, padding = x[0], y[0], padding[0]
    allowed = ~padding[..., None, None, :]
    spoilt = np.where(padding[..., None], np.nan, y)

    def fewer(b: int, h: int, i: int, j: int) -> bool:
        return (i + j + h) % 3 > 0

    bias = numbers(5, 7)
    for options in (
        {},
        {"is_causal": True, "query_offset": "bottom_right"},
        {"attn_mask": bias},
        {"attn_mask": bias > -1, "mask_mod": fewer},
        {"kv_lengths": 6, "mask_mod": fewer},
    ):
        mask = options.get("attn_mask", np.ones((1, 1), bool))
        both = mask & allowed if mask.dtype == bool else np.where(allowed, mask, -np.inf)
        expected = by_formula(layer, x, y, y, **{**options, "attn_mask": both})
        out = layer(x, spoilt, key_padding_mask=padding, **options)
        np.testing.assert_allclose(out, expected, atol=1e-12)


def test_nothing_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads are views of what the products wrote, and attention writes where the last product reads."""
    seen: dict[str, np.ndarray] = {}
    matmul, calls = np.matmul, []

    def spy(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> np.ndarray:
        calls.append((a, out))
        return matmul(a, b, out=out)

    from numba_attn.cpu import attention as cpu

    forward = cpu.forward

    def watch(problem: Any) -> None:
        seen.update(query=problem.query, key=problem.key, value=problem.value, out=problem.out)
        forward(problem)

    monkeypatch.setattr(np, "matmul", spy)
    monkeypatch.setattr(cpu, "forward", watch)
    x, out = numbers(2, 9, 24), np.empty((2, 9, 24))
    assert layer_of()(x, out=out) is out
    assert len(calls) == 2
    (first, made), (read, written) = calls
    assert np.shares_memory(first, x) and np.shares_memory(written, out)
    assert all(np.shares_memory(made, seen[name]) for name in ("query", "key", "value"))
    assert np.shares_memory(read, seen["out"])


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0), (0,)])
def test_empty(shape: tuple[int, ...]) -> None:
    layer = layer_of(qk_norm=True)
    assert layer(np.empty((*shape, 24))).shape == (*shape, 24)


def test_inputs_of_any_strides() -> None:
    layer, x = layer_of(), numbers(2, 9, 24)
    expected = layer(x)
    for y in (np.asfortranarray(x), np.repeat(x, 2, axis=2)[..., ::2], x[:, ::-1][:, ::-1]):
        np.testing.assert_allclose(layer(y), expected, atol=1e-14)
    frozen = x.copy()
    frozen.flags.writeable = False
    assert same_bits(layer(frozen), expected) and same_bits(layer(x[:, None]), expected[:, None])


def test_init_is_distributed_as_pytorchs() -> None:
    layer = MultiHeadAttention.init(np.random.default_rng(0), 128, 4)
    held = layer.parameters
    assert list(held) == ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
    for name, bound in (("in_proj_weight", np.sqrt(6 / (4 * 128))), ("out_proj.weight", 1 / np.sqrt(128))):
        assert held[name].dtype == np.float32 and 0.99 * bound < np.abs(held[name]).max() <= bound
        assert abs(held[name].mean()) < bound / 50
    assert not held["in_proj_bias"].any() and not held["out_proj.bias"].any()
    other = MultiHeadAttention.init(np.random.default_rng(0), 128, 4, kdim=64, bias=False, dtype=np.float64)
    assert sorted(other.parameters) == ["k_proj_weight", "out_proj.weight", "q_proj_weight", "v_proj_weight"]


# Cache ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
def test_decoding_is_the_whole(interleaved: bool) -> None:
    tables = rotary_tables(16, 6, dtype=np.float64)
    layer = layer_of(rotary=tables, interleaved=interleaved, qk_norm=True)
    x = numbers(2, 10, 24)
    expected = layer(x, is_causal=True)
    paged = PagedKVCache(9, 2, 4, 6, dtype=np.float64)
    for cache in (KVCache(2, 2, 10, 6, dtype=np.float64), paged.batch([paged.add(), paged.add()])):
        parts = [layer(x[:, i:j], cache=cache) for i, j in itertools.pairwise((0, 4, 5, 6, 10))]
        np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, atol=1e-12)


def test_caches_of_fewer_bits() -> None:
    layer, x = layer_of(dtype=np.float32), numbers(2, 10, 24, dtype=np.float32)
    expected = layer(x, is_causal=True)
    for options in ({"dtype": np.float16}, {"quantize": "int8"}):
        out = layer(x, cache=KVCache(2, 2, 10, 6, **options))
        assert out.dtype == np.float32 and 1e-7 < np.abs(out - expected).max() < 0.05


def test_cache_of_sequences_of_different_lengths() -> None:
    layer, x = layer_of(), numbers(2, 6, 24)
    cache = KVCache(2, 2, 10, 6, dtype=np.float64)
    out, aux = layer(x, cache=cache, counts=[6, 4], return_aux=("lse",))
    expected, statistics = layer(x, is_causal=True, return_aux=("lse",))
    np.testing.assert_allclose(out[0], expected[0], atol=1e-13)
    np.testing.assert_allclose(out[1, :4], expected[1, :4], atol=1e-13)
    assert same_bits(out[1, 4:], np.broadcast_to(layer.parameters["out_proj.bias"], (2, 24)))
    np.testing.assert_allclose(aux.lse[0], statistics.lse[0], atol=1e-13)
    assert cache.lengths.tolist() == [6, 4]


# PyTorch --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("widths", [{}, {"kdim": 11, "vdim": 7}, {"vdim": 7}], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_agrees_with_torch(torch: Any, dtype: Any, widths: dict[str, int], bias: bool) -> None:
    torch.manual_seed(0)
    options = {"bias": bias, "batch_first": True, "dtype": getattr(torch, np.dtype(dtype).name)}
    module = torch.nn.MultiheadAttention(24, 4, **widths, **options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    layer = MultiHeadAttention.from_torch_state(module.state_dict(), 4)
    x = numbers(3, 8, 24, dtype=dtype)
    y, z = numbers(3, 8, widths.get("kdim", 24), dtype=dtype), numbers(3, 8, widths.get("vdim", 24), dtype=dtype)
    padding = np.array([[False] * 8, [False] * 6 + [True] * 2, [False, True] * 4])
    earlier = np.tri(8, dtype=bool)

    def theirs(*arrays: np.ndarray, **more: Any) -> np.ndarray:
        with torch.no_grad():
            return module(*(torch.from_numpy(a) for a in arrays), need_weights=False, **more)[0].numpy()

    atol = ATOL[dtype]
    for arrays in [(x, y, z)] + [(x, x, x)] * (not widths):
        np.testing.assert_allclose(layer(*arrays), theirs(*arrays), atol=atol)
        masked = theirs(*arrays, key_padding_mask=torch.from_numpy(padding))
        np.testing.assert_allclose(layer(*arrays, key_padding_mask=padding), masked, atol=atol)
        causal = theirs(*arrays, attn_mask=torch.from_numpy(~earlier), is_causal=True)
        np.testing.assert_allclose(layer(*arrays, is_causal=True), causal, atol=atol)
        np.testing.assert_allclose(layer(*arrays, earlier), causal, atol=atol)
        both = theirs(*arrays, attn_mask=torch.from_numpy(~earlier), key_padding_mask=torch.from_numpy(padding))
        np.testing.assert_allclose(layer(*arrays, is_causal=True, key_padding_mask=padding), both, atol=atol)


def test_add_zero_attn_is_a_sink(torch: Any) -> None:
    torch.manual_seed(0)
    module = torch.nn.MultiheadAttention(24, 4, add_zero_attn=True, batch_first=True, dtype=torch.float64)
    layer, x = MultiHeadAttention.from_torch_state(module.state_dict(), 4), numbers(2, 5, 24)
    with torch.no_grad():
        expected = module(*[torch.from_numpy(x)] * 3, need_weights=False)[0].numpy()
    np.testing.assert_allclose(layer(x, sinks=np.zeros(4)), expected, atol=1e-13)


def test_torch_loads_our_state(torch: Any) -> None:
    for options in ({}, {"kdim": 11, "vdim": 7}, {"bias": False}):
        layer = layer_of(num_kv_heads=4, **options)
        module = torch.nn.MultiheadAttention(24, 4, batch_first=True, dtype=torch.float64, **options)
        module.load_state_dict({name: torch.from_numpy(x) for name, x in layer.to_torch_state().items()})
        x, y, z = (numbers(2, 5, n) for n in layer.sizes.widths)
        with torch.no_grad():
            expected = module(*(torch.from_numpy(a) for a in (x, y, z)), need_weights=False)[0].numpy()
        np.testing.assert_allclose(layer(x, y, z), expected, atol=1e-13)


def test_tensors(torch: Any) -> None:
    """Results are tensors, with the bits of NumPy's; gradients of parameters are as these are."""
    layer, x, mask = layer_of(qk_norm=True), numbers(2, 5, 24), numbers(4, 5, 5)
    t, bias = torch.from_numpy(x), torch.from_numpy(mask)
    out = torch.empty(2, 5, 24, dtype=torch.float64)
    assert layer(t, attn_mask=bias, out=out) is out and same_bits(out.numpy(), layer(x, attn_mask=mask))
    for given, arrays in (((t,), (x,)), ((t, t + 1), (x, x + 1))):
        (result, aux), (expected, statistics) = (layer(*some, return_aux=("lse",)) for some in (given, arrays))
        assert same_bits((result.numpy(), aux.lse.numpy()), (expected, statistics.lse))
        assert same_bits(tuple(y.numpy() for y in layer.project(*given)), layer.project(*arrays))
    (result, vjp), (expected, theirs) = layer.vjp(t, attn_mask=bias), layer.vjp(x, attn_mask=mask)
    (inputs, parameters), gradients = vjp(result), theirs(expected)
    assert same_bits((inputs.query.numpy(), inputs.attn_mask.numpy()), (gradients[0].query, gradients[0].attn_mask))
    assert all(same_bits(parameters[name], grad) for name, grad in gradients[1].items())
    step = layer(t, cache=KVCache(2, 2, 5, 6, dtype=np.float64))
    assert same_bits(step.numpy(), layer(x, cache=KVCache(2, 2, 5, 6, dtype=np.float64)))
    with pytest.raises(TypeError, match=r"query and key must be arrays of one library, got torch\.Tensor and numpy"):
        layer(t, x)


def test_states() -> None:
    """What a state becomes, and is again, without PyTorch."""
    layer = layer_of(num_kv_heads=4)
    state = layer.to_torch_state()
    assert all(state[name] is x for name, x in layer.parameters.items())
    model = {f"block.attn.{name}": x for name, x in state.items()} | {"block.norm.weight": np.ones(24)}
    again = MultiHeadAttention.from_torch_state(model, 4, prefix="block.attn.")
    assert all(again.parameters[name] is x for name, x in state.items())
    parts = dict(
        zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), np.split(state["in_proj_weight"], 3), strict=True)
    )
    separate = MultiHeadAttention({**parts, "out_proj.weight": state["out_proj.weight"]}, 4)
    x = numbers(2, 5, 24)
    packed = separate.to_torch_state()
    assert list(packed) == ["out_proj.weight", "in_proj_weight"] and same_bits(
        packed["in_proj_weight"], state["in_proj_weight"]
    )
    np.testing.assert_allclose(separate(x), MultiHeadAttention(packed, 4)(x), atol=1e-13)
    one_bias = MultiHeadAttention({**packed, "out_proj.bias": np.ones(24)}, 4).to_torch_state()
    assert same_bits(one_bias["in_proj_bias"], np.zeros(72))
    for other in (layer_of(), layer_of(num_kv_heads=4, qk_norm=True), layer_of(num_kv_heads=4, head_size=5)):
        with pytest.raises(ValueError, match=r"torch\.nn\.MultiheadAttention has"):
            other.to_torch_state()


# Gradients ------------------------------------------------------------------------------------------------------------


def differences(function: Any, x: np.ndarray, count: int = 12) -> Iterator[tuple[tuple[int, ...], float]]:
    """Some derivatives of a function of what is in x, by central differences."""
    rng = np.random.default_rng(7)
    for flat in rng.choice(x.size, min(count, x.size), replace=False):
        place, step = np.unravel_index(flat, x.shape), 1e-5
        before = x[place]
        x[place] = before + step
        above = function()
        x[place] = before - step
        below = function()
        x[place] = before
        yield place, (above - below) / (2 * step)


def check_gradients(layer: Any, arguments: tuple[np.ndarray, ...], **options: Any) -> None:
    out, vjp = layer.vjp(*arguments, **options)
    np.testing.assert_allclose(out, layer.forward(*arguments, **options), atol=1e-12)
    direction = numbers(*out.shape, seed=8)

    def loss() -> float:
        return float((layer.forward(*arguments, **options) * direction).sum())

    inputs, parameters = vjp(direction)
    assert list(parameters) == list(layer.parameters)
    pairs = [(layer.parameters[name], grad) for name, grad in parameters.items()]
    pairs += [(x, getattr(inputs, name)) for x, name in zip(arguments, ("query", "key", "value"), strict=False)]
    pairs += [
        (options[name], getattr(inputs, name)) for name in ("attn_mask", "sinks", "alibi_slopes") if name in options
    ]
    for x, grad in pairs:
        assert grad.shape == x.shape and grad.dtype == x.dtype
        for place, expected in differences(loss, x):
            assert abs(grad[place] - expected) <= 1e-6 * max(np.abs(grad).max(), 1e-3), (place, grad[place], expected)
    again = vjp(direction)
    assert all(same_bits(again[1][name], grad) for name, grad in parameters.items())
    assert same_bits(again[0].query, inputs.query)


ROTARY = {"rotary": rotary_tables(20, 4, dtype=np.float64)}
DIFFERENTIATED = {
    **{name: options for name, options in LAYERS.items() if name != "float32"},
    "rotary": ROTARY,
    "rotary, interleaved, norms": {**ROTARY, "interleaved": True, "qk_norm": True},
}


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_gradients_are_differences(name: str) -> None:
    layer = layer_of(**DIFFERENTIATED[name])
    E, Ek, Ev = layer.sizes.widths
    x, y, z = (numbers(2, L, n, seed=n) for L, n in ((5, E), (7, Ek), (7, Ev)))
    check_gradients(layer, (x, y, z), is_causal=True, query_offset=2)
    if Ek == Ev:
        check_gradients(layer, (x, y))
    if E == Ek == Ev:
        check_gradients(layer, (x,), is_causal=True)
        check_gradients(layer, (x[0],), window=(2, 2))


def test_gradients_of_options() -> None:
    layer, x = layer_of(), numbers(2, 5, 24)
    padding = np.array([[False] * 5, [False] * 3 + [True] * 2])
    options = {"attn_mask": numbers(4, 1, 5), "alibi_slopes": numbers(4), "sinks": numbers(4), "softcap": 1.5}
    check_gradients(layer, (x,), key_padding_mask=padding, **options)
    check_gradients(layer, (x,), key_padding_mask=padding[:, ::-1])


@pytest.mark.parametrize("padding", [np.nan, np.inf])
@pytest.mark.parametrize("how", ["lengths", "key_padding_mask"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_padding_has_no_part_in_gradients(padding: float, how: str, qk_norm: bool) -> None:
    layer, above = layer_of(qk_norm=qk_norm), numbers(2, 5, 24, seed=3)
    x, y = numbers(2, 5, 24, seed=1), numbers(2, 7, 24, seed=2)
    options: dict[str, Any] = {"kv_lengths": [7, 4]}
    y[1, 4:] = 0
    if how == "lengths":
        options["query_lengths"], x[1, 3:], above[1, 3:] = [5, 3], 0, 0
    else:
        options = {"key_padding_mask": np.arange(7) >= np.array([[7], [4]])}
    expected = layer.vjp(x, y, **options)[1](above)
    y[1, 4:] = padding
    if how == "lengths":
        x[1, 3:] = padding
    inputs, parameters = layer.vjp(x, y, **options)[1](above)
    assert same_bits(inputs.query, expected[0].query) and same_bits(inputs.key, expected[0].key)
    for name, grad in parameters.items():
        np.testing.assert_allclose(grad, expected[1][name], atol=1e-12, err_msg=name)


def test_one_array_as_several_arguments() -> None:
    """Given as three arguments it has three gradients, whose sum is the one that it has as one."""
    layer, x = layer_of(), numbers(2, 5, 24)
    direction = numbers(2, 5, 24, seed=8)
    (one, held), (three, same) = (layer.vjp(*given)[1](direction) for given in ((x,), (x, x, x)))
    np.testing.assert_allclose(three.query + three.key + three.value, one.query, atol=1e-12)
    assert one.key is None and one.value is None
    for name, grad in held.items():
        np.testing.assert_allclose(same[name], grad, atol=1e-12)


def test_refusals_of_vjp() -> None:
    layer, x = layer_of(), numbers(2, 5, 24)
    out, vjp = layer.vjp(x)
    with pytest.raises(ValueError, match=r"grad_out must have shape \(2, 5, 24\), got \(5, 24\)"):
        vjp(out[0])
    with pytest.raises(TypeError, match="grad_out must be float64, as the result is, got float32"):
        vjp(out.astype(np.float32))
    for name in ("return_aux", "cache", "out", "layout"):
        with pytest.raises(TypeError, match=f"vjp got an unexpected option '{name}'"):
            layer.vjp(x, **{name: None})


# Refusals -------------------------------------------------------------------------------------------------------------


def packed(**changes: Any) -> dict[str, Any]:
    """Parameters of a layer of two heads of 4, with changes; None takes one away."""
    held: dict[str, Any] = {"in_proj_weight": np.ones((24, 8)), "out_proj.weight": np.ones((8, 8))}
    return {name: x for name, x in {**held, **changes}.items() if x is not None}


BAD_PARAMETERS = [
    (packed(weight=np.ones(3)), ValueError, r"unknown names \['weight'\]"),
    (packed(**{"out_proj.weight": None}), ValueError, r"must have out_proj\.weight and either"),
    (packed(in_proj_weight=None), ValueError, "either in_proj_weight or all of q_proj_weight"),
    (packed(q_proj_weight=np.ones((8, 8))), ValueError, "either in_proj_weight or all"),
    (packed(in_proj_weight=np.ones((24, 8, 1))), ValueError, "in_proj_weight must have 2 axes"),
    (packed(in_proj_bias=np.ones((24, 1))), ValueError, "in_proj_bias must have 1 axis"),
    (packed(in_proj_bias=np.ones(8)), ValueError, r"in_proj_bias must have shape \(24,\)"),
    (packed(in_proj_weight=np.ones((25, 8))), ValueError, "in_proj_weight must have a row for each element"),
    (packed(**{"out_proj.weight": np.ones((8, 7))}), ValueError, r"out_proj\.weight must have a multiple"),
    (packed(**{"out_proj.bias": np.ones(7)}), ValueError, r"out_proj\.bias must have shape \(8,\)"),
    (packed(**{"q_norm.weight": np.ones(8)}), ValueError, r"q_norm\.weight must have shape \(4,\)"),
    (packed(in_proj_weight=[[1.0]]), TypeError, "in_proj_weight must be a NumPy array, got list"),
    (packed(in_proj_weight=np.ones((24, 8), int)), TypeError, "in_proj_weight must be float32 or float64, got int64"),
    (packed(in_proj_weight=np.ones((24, 8), np.float16)), TypeError, "got float16: NumPy multiplies 16-bit"),
    (packed(in_proj_bias=np.ones(24, np.float32)), TypeError, "must have one dtype"),
    ([1], TypeError, "parameters must be a mapping"),
]  # fmt: skip


@pytest.mark.parametrize(("held", "error", "message"), BAD_PARAMETERS, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_parameters(held: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MultiHeadAttention(held, 2)


BAD_LAYERS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"num_heads": 0}, ValueError, "num_heads must be 1 or more, got 0"),
    ({"num_heads": 2.0}, TypeError, "num_heads must be integers, got float"),
    ({"num_kv_heads": 3}, ValueError, "num_heads must be a multiple of num_kv_heads, got 2 and 3"),
    ({"rotary": np.ones((2, 2))}, TypeError, "rotary must be a pair of tables"),
    ({"rotary": rotary_tables(9, 8)}, ValueError, r"rotary must be two tables \(positions, R / 2\) with R at most 4"),
    ({"rotary": (np.ones((2, 2)), np.ones((3, 2)))}, ValueError, "rotary must be two tables"),
    ({"interleaved": 1}, TypeError, "interleaved must be True or False"),
    ({"norm_epsilon": -1.0}, ValueError, "norm_epsilon must be finite and 0 or more"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_LAYERS, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_layers(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MultiHeadAttention(packed(), **{"num_heads": 2, **options})


BAD_INIT: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rng": 0}, TypeError, "rng must be a numpy.random.Generator, got int"),
    ({"embed_dim": 9}, ValueError, "embed_dim must be a multiple of num_heads, or head_size given, got 9 and 2"),
    ({"embed_dim": 0}, ValueError, "embed_dim must be 1 or more"),
    ({"kdim": -1}, ValueError, "kdim must be 1 or more"),
    ({"dtype": np.float16}, TypeError, "dtype must be float32 or float64, got float16"),
    ({"dtype": None}, TypeError, "dtype must be float32 or float64, got None"),
    ({"dtype": ">f4"}, TypeError, "dtype must be float32 or float64, got '>f4'"),
    ({"bias": None}, TypeError, "bias must be True or False"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_INIT, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_init(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MultiHeadAttention.init(**{"rng": np.random.default_rng(0), "embed_dim": 8, "num_heads": 2, **options})


def test_bad_states() -> None:
    state = packed()
    with pytest.raises(NotImplementedError, match="state has bias_k and bias_v"):
        MultiHeadAttention.from_torch_state({**state, "bias_k": np.ones((1, 1, 8))}, 2)
    with pytest.raises(ValueError, match="got none"):
        MultiHeadAttention.from_torch_state(state, 2, prefix="attn.")
    with pytest.raises(TypeError, match="state must be a mapping"):
        MultiHeadAttention.from_torch_state([], 2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="state must have strings for names, got 1"):
        MultiHeadAttention.from_torch_state({1: 2}, 2)  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="prefix must be a string"):
        MultiHeadAttention.from_torch_state(state, 2, prefix=1)  # type: ignore[arg-type]


def test_states_of_tensors_that_do_not_fit(torch: Any) -> None:
    module = torch.nn.MultiheadAttention(24, 4)
    with pytest.raises(TypeError, match=r"in_proj_weight must be .* it requires gradients"):
        MultiHeadAttention.from_torch_state(dict(module.named_parameters()), 4)
    pytest.importorskip("ml_dtypes")
    with pytest.raises(TypeError, match="in_proj_weight must be float32 or float64, got bfloat16"):
        MultiHeadAttention.from_torch_state(module.bfloat16().state_dict(), 4)


X = np.ones((2, 5, 24))
BAD_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"query": [1.0]}, TypeError, "query must be a NumPy array"),
    ({"query": None}, TypeError, "query must be a NumPy array, got NoneType"),
    ({"query": X.astype(np.float32)}, TypeError, "query must be float64, as the layer is, got float32"),
    ({"query": X[..., :5]}, ValueError, r"query must have shape \(\.\.\., length, 24\), got \(2, 5, 5\)"),
    ({"query": X[0, 0]}, ValueError, "query must have shape"),
    ({"value": X}, ValueError, "value must not be given without key"),
    ({"key": X[0]}, ValueError, "must have the same batch axes"),
    ({"key": X, "value": X[:, :2]}, ValueError, "key and value must have the same length, got 5 and 2"),
    ({"is_causal": 1}, TypeError, "is_causal must be True or False"),
    ({"attn_mask": np.ones((3, 3), bool)}, ValueError, "attn_mask of shape"),
    ({"key_padding_mask": np.ones((2, 4), bool)}, ValueError, r"key_padding_mask must have shape \(2, 5\)"),
    ({"key_padding_mask": np.ones((2, 5))}, TypeError, "key_padding_mask must be bool, True where a key is padding"),
    ({"layout": "BHLD"}, TypeError, "forward got an unexpected option 'layout'"),
    ({"scales": 1.0}, TypeError, "forward got an unexpected option 'scales'"),
    ({"counts": 3}, ValueError, "counts must be given with a cache"),
    ({"query_offset": -1}, ValueError, "query_offset must be 0 or more with rotary positions, got -1"),
    ({"query_offset": 4}, ValueError, "rotary must have a position for each row, got 8, query needs 9"),
    ({"key": np.ones((2, 9, 24))}, ValueError, "got 8, key needs 9"),
    ({"out": np.empty((2, 5, 8))}, ValueError, r"out must have shape \(2, 5, 24\)"),
    ({"out": np.empty((2, 5, 24), np.float32)}, TypeError, "out must be float64, as the layer is"),
    ({"out": np.empty((2, 5, 48))[..., ::2]}, ValueError, "out must be C-contiguous"),
    ({"cache": 1}, TypeError, "cache must be a KVCache"),
    ({"cache": KVCache(2, 2, 9, 6, dtype=np.float64), "key": X}, ValueError, "cache must be given without key"),
    ({"cache": KVCache(2, 2, 9, 6), "kv_lengths": 3}, TypeError, "unexpected option 'kv_lengths'"),
    ({"cache": KVCache(2, 2, 9, 8)}, ValueError, r"cache must be of \(B, Hkv, D, Dv\) = \(2, 2, 6, 6\), got"),
    ({"cache": KVCache(2, 2, 4, 6)}, ValueError, "key must fit in the cache"),
    ({"cache": KVCache(2, 2, 9, 6), "softcap": -1.0}, ValueError, "softcap must be positive"),
    ({"cache": KVCache(2, 2, 9, 6), "query": X[0]}, ValueError, "query must have 3 axes with a cache"),
    ({"cache": KVCache(2, 2, 9, 6), "query": np.ones((2, 9, 24))}, ValueError, "got 8, query needs 9"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_calls(monkeypatch: pytest.MonkeyPatch, call: dict[str, Any], error: type[Exception], message: str) -> None:
    """Each is refused before anything is computed."""
    layer = layer_of(rotary=rotary_tables(8, 6, dtype=np.float64))
    monkeypatch.setattr(np, "matmul", None)
    with pytest.raises(error, match=message):
        layer(**{"query": X, **call})
    assert "cache" not in call or not isinstance(call["cache"], KVCache) or not call["cache"].lengths.any()


def test_results_must_not_be_written_over_parameters() -> None:
    layer = MultiHeadAttention.init(np.random.default_rng(0), 24, 4, dtype=np.float64)
    with pytest.raises(ValueError, match=r"out must not share memory with out_proj\.weight"):
        layer(np.ones((24, 24)), out=layer.parameters["out_proj.weight"])


def test_parameters_are_replaced_in_place_only() -> None:
    layer = layer_of()
    with pytest.raises(TypeError):
        layer.parameters["out_proj.bias"] = np.ones(3)
    layer.parameters["out_proj.bias"][...] = 7
    assert (layer(np.zeros((1, 24)), kv_lengths=0) == 7).all()
    assert layer.sizes.heads == ((4, 6), (2, 6), (2, 6)) and numba_attn.MultiHeadAttention is MultiHeadAttention
