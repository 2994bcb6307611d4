"""Calls that are like an earlier one, of which checks and layout are not done again."""

from __future__ import annotations

import gc
import inspect
import threading
import weakref
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from cases import SIXTEEN_BITS, dtype_of
from contract import STORAGE
from hypothesis import given
from tolerances import same_bits

from numba_attn import (
    KVCache,
    MultiHeadAttention,
    PagedKVCache,
    attention_with_kv_cache,
    repeats,
    rotary_tables,
    scaled_dot_product_attention,
    threads,
)
from numba_attn.problem import Problem
from numba_attn.storage import QUANTIZED


def normal(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def afresh(*arrays: np.ndarray, **options: Any) -> Any:
    """A call that nothing is known of, and that leaves nothing behind."""
    before = dict(repeats._repeats)
    repeats.forget()
    result = scaled_dot_product_attention(*arrays, **options)
    repeats.forget()
    repeats._repeats.update(before)
    return result


PLAIN: list[dict[str, Any]] = [
    *({}, {"is_causal": True}, {"scale": 0.3}, {"query_offset": 5, "window": (3, None)}, {"window": (None, 0)}),
    *({"layout": "BLHD", "is_causal": True}, {"backend": "cpu"}, {"precision": None, "return_aux": ()}),
    *(
        {"softcap": 0.7},
        {"softcap": 2, "scale": 1},
        {"return_aux": ("entropy", "lse")},
        {"return_aux": ("max_score",), "layout": "BLHD"},
    ),
]


def bits_of_all(result: Any) -> list[np.ndarray]:
    """The output, and the results beside it, of a call."""
    out, aux = result if isinstance(result, tuple) else (result, ())
    return [out, *(x for x in aux if x is not None)]


def all_same_bits(results: Any, others: Any) -> bool:
    of_one, of_other = bits_of_all(results), bits_of_all(others)
    return all(same_bits(x, y) for x, y in zip(of_one, of_other, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float64", *SIXTEEN_BITS])
@pytest.mark.parametrize("options", PLAIN, ids=str)
def test_other_numbers_in_arrays_alike(options: dict[str, Any], dtype: str) -> None:
    """Few rows and many, of every rank and storage: found, and to the bits of a call of its own."""
    shapes = [((2, 4, 3, 16), (2, 2, 40, 16)), ((2, 4, 30, 16), (2, 2, 40, 16)), ((2, 1, 4, 7, 8), (2, 1, 4, 9, 8))]
    shapes += [((6, 20, 8), (3, 20, 8)), ((20, 8), (12, 8)), ((1, 8), (12, 8))]
    for rows, keys in shapes:
        for form in STORAGE.values():
            repeats.forget()
            made = []
            for seed in range(3):
                q, k, v = (normal(*s, dtype=dtype_of(dtype), seed=seed) for s in (rows, keys, keys))
                if options.get("layout") == "BLHD" and len(rows) > 2:
                    q, k, v = (x.swapaxes(-3, -2).copy() for x in (q, k, v))
                arrays = [form(x) for x in (q, k, v)]
                key, _ = repeats.identify(options.get("backend"), arguments(*arrays, enable_gqa=True, **options))
                assert (repeats.find(key) is not None) is (seed > 0), seed
                got = scaled_dot_product_attention(*arrays, enable_gqa=True, **options)
                assert all_same_bits(got, afresh(*arrays, enable_gqa=True, **options))
                made.append(bits_of_all(got))
            assert not any(np.shares_memory(*pair) for n in (1, 2) for pair in zip(made[0], made[n], strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float64", *SIXTEEN_BITS])
@pytest.mark.parametrize("rows", [1, 30])
def test_other_masks_and_places_of_results(rows: int, dtype: str) -> None:
    """Of every broadcast form; the result goes where it is wanted, and nowhere else."""
    q, k, v = (normal(2, 4, n, 16, dtype=dtype_of(dtype), seed=n) for n in (rows, 40, 41))
    v = v[:, :, :40]
    for layout in ("BHLD", "BLHD"):
        arrays = [x if layout == "BHLD" else x.swapaxes(1, 2).copy() for x in (q, k, v)]
        for shape in ((40,), (rows, 1), (4, rows, 40), (2, 1, 1, 40), (1, 4, rows, 40), (2, 4, rows, 40)):
            for form in ("?", "f", dtype):
                repeats.forget()
                for seed in range(3):
                    numbers = normal(*shape, seed=seed)
                    mask = numbers > -0.5 if form == "?" else numbers.astype(dtype_of(form) if len(form) > 1 else form)
                    out = np.full(arrays[0].shape, 7, arrays[0].dtype)
                    options = {"attn_mask": mask, "layout": layout, "return_aux": ("lse",)}
                    expected = afresh(*arrays, **options)
                    given, aux = scaled_dot_product_attention(*arrays, out=out, **options)
                    assert given is out and all_same_bits((out, aux), expected)
                assert len(repeats._repeats) == 1


def test_a_place_that_is_wrong() -> None:
    """Over an operand, read-only, of strides that overlap: after a call of the same form that was right."""
    whole = normal(4, 2, 20, 8)
    q, k, v, out = whole
    mask, shape, strides = np.zeros((2, 20, 20), np.float32), out.shape, out.strides
    for _ in range(2):
        assert scaled_dot_product_attention(q, k, v, out=out) is out
        for operand in (q, k, v):
            before = whole.copy()
            with pytest.raises(ValueError, match="must not share memory"):
                scaled_dot_product_attention(q, k, v, out=operand)
            assert same_bits(whole, before)
    square = normal(2, 20, 20)
    for _ in range(2):
        scaled_dot_product_attention(square, square, square, mask, out=square.copy())
        with pytest.raises(ValueError, match="must not share memory with attn_mask"):
            scaled_dot_product_attention(square, square, square, mask, out=mask)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        scaled_dot_product_attention(q, k, v, out=out)
    with pytest.raises(ValueError, match="overlap itself"):
        scaled_dot_product_attention(q, k, v, out=np.lib.stride_tricks.as_strided(v, shape, (0, *strides[1:])))


@pytest.mark.parametrize("name", ["sinks", "alibi_slopes"])
def test_numbers_of_heads(name: str) -> None:
    """What is in these arrays is a part of what a call is: written to in place, they are others."""
    q, k, v = (normal(2, 4, n, 16, seed=n) for n in (3, 40, 40))
    numbers = np.linspace(-1, 1, 4)
    repeats.forget()
    for n, dtype in enumerate(["f", "d", "e"]):
        given = numbers.astype(dtype)
        for again in range(3):
            got = scaled_dot_product_attention(q, k, v, **{name: given})
            assert same_bits(got, afresh(q, k, v, **{name: given}))
            given += 0 if again == 0 else 1
        assert len(repeats._repeats) == 2 * (n + 1)
    given[1] = np.nan
    for _ in range(2):
        with pytest.raises(ValueError, match="finite"):
            scaled_dot_product_attention(q, k, v, **{name: given})


def arguments(query: Any, key: Any, value: Any, **options: Any) -> dict[str, Any]:
    """Of a call, as `dispatch` gets them."""
    options.pop("backend", None)
    named = inspect.signature(scaled_dot_product_attention).bind(query, key, value, **options)
    named.apply_defaults()
    return {name: x for name, x in named.arguments.items() if name != "backend"}


def test_arguments_of_a_call() -> None:
    """Those that have to be None are some of all that there are: an option more has to be thought of here as well."""
    x = normal(4, 8)
    call = arguments(x, x, x)
    assert len(call) == repeats.ARGUMENTS and set(repeats.ABSENT) < set(call)
    every = set(inspect.signature(Problem.from_call).parameters) - {"cu_seqlens", "differentiable", "score_mod_grad"}
    assert set(call) == every
    assert repeats.identify(None, call)[0] is not None


@pytest.mark.parametrize("dtype", ["float32", "float64", *SIXTEEN_BITS])
@pytest.mark.parametrize("rows", [1, 3, 30])
def test_other_lengths_and_positions(rows: int, dtype: str) -> None:
    """Looked at in each call: where splits of keys begin, and how many there are, follows from them."""
    Lk = 1300
    shapes = (2, 4, rows, 16), (2, 2, Lk, 16), (2, 2, Lk, 16)
    options: list[dict[str, Any]] = [
        *({"kv_lengths": np.array(n)} for n in ([Lk, 0], [5, 700], [513, 512])),
        *(
            {"kv_lengths": np.array([1200, 40]), "query_offset": np.array(n), "is_causal": True}
            for n in ([-3, 30], [1200, 0])
        ),
        *({"query_offset": np.array(n), "window": (600, 9)} for n in ([1250, 0], [600, 601])),
        *({"kv_lengths": n} for n in (800, [0, 900], [1300, 1])),
        *({"query_offset": n, "window": (600, 9)} for n in ([1250, 7], [-2, 600])),
        *({"query_offset": "bottom_right", "kv_lengths": n, "is_causal": True} for n in (700, [1300, 41])),
    ]
    forms = {(*sorted(chosen), type(chosen.get("query_offset")) is str) for chosen in options}
    for seed, chosen in enumerate(options):
        arrays = [normal(*s, dtype=dtype_of(dtype), seed=seed) for s in shapes]
        got = scaled_dot_product_attention(*arrays, enable_gqa=True, **chosen)
        assert same_bits(got, afresh(*arrays, enable_gqa=True, **chosen)), chosen
        for n in (1, 2):
            with threads.limit(n):
                assert same_bits(scaled_dot_product_attention(*arrays, enable_gqa=True, **chosen), got), chosen
    assert len(repeats._repeats) == len(forms)


@pytest.mark.parametrize(
    "bad",
    [
        *({"kv_lengths": np.array(n)} for n in ([5, 41], [-1, 5], [5, 5, 5], [[5, 5]])),
        {"kv_lengths": np.array([5.0, 6.0])},
        *({"kv_lengths": n} for n in ([5, 41], [5.0, 6.0], [[5], [6]], 41, -1, True)),
        {"query_offset": [0, 1 << 62]},
        {"kv_lengths": np.ma.masked_array([5, 6])},
        {"kv_lengths": np.array([5, 6]), "query_offset": np.array([0, 1 << 62])},
        {"kv_lengths": np.array([5, 6]), "query_offset": np.array([0.0, 1.0])},
    ],
    ids=str,
)
def test_lengths_that_are_wrong(bad: dict[str, np.ndarray]) -> None:
    x = normal(2, 3, 40, 8)
    good = {name: np.array([5, 6]) for name in bad}
    for _ in range(2):
        scaled_dot_product_attention(x, x, x, **good)
        with pytest.raises((TypeError, ValueError), match=r"kv_lengths|query_offset"):
            scaled_dot_product_attention(x, x, x, **bad)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"is_causal": True}, {"is_causal": 1}),
        ({"enable_gqa": True}, {"enable_gqa": 1.0}),
        ({"query_offset": 1}, {"query_offset": True}),
        ({"query_offset": 1}, {"query_offset": 1.0}),
        ({"query_offset": "bottom_right"}, {"query_offset": "top_left"}),
        ({"window": (1, 0)}, {"window": (1.0, 0)}),
        ({"window": (1, 0)}, {"window": (1, 0, 0)}),
        ({"scale": 1.0}, {"scale": "1.0"}),
        ({"scale": 1}, {"scale": True}),
        ({"softcap": 1}, {"softcap": np.True_}),
        ({}, {"layout": "LBHD"}),
        ({}, {"backend": "gpu"}),
        ({}, {"precision": "float16"}),
        ({}, {"dropout_p": 1.0}),
        ({}, {"return_aux": ("nothing",)}),
        ({}, {"return_aux": np.array(["lse", "entropy"])}),
        *(
            ({}, {name: wrong})
            for name in ("out", "attn_mask", "sinks", "alibi_slopes")
            for wrong in ([], "x", 1, object())
        ),
        ({"return_aux": ("lse",)}, {"return_aux": "lse"}),
        ({"softcap": 1.0}, {"softcap": True}),
        ({"softcap": 1.0}, {"softcap": -1.0}),
        ({"sinks": np.ones(2)}, {"sinks": np.ones(2, int)}),
        ({"sinks": np.ones(2)}, {"sinks": np.ones((1, 2))}),
        ({"attn_mask": np.ones((4, 4), bool)}, {"attn_mask": np.ones((4, 4), np.uint8)}),
        ({"attn_mask": np.ones((4, 4))}, {"attn_mask": np.ma.ones((4, 4))}),
    ],
)
def test_a_call_that_is_wrong_stays_wrong(first: dict[str, Any], second: dict[str, Any]) -> None:
    x = normal(2, 4, 8)
    scaled_dot_product_attention(x, x, x, **first)
    for _ in range(2):
        with pytest.raises((TypeError, ValueError)):
            scaled_dot_product_attention(x, x, x, **second)


def test_what_is_not_the_same() -> None:
    """Options that change a result, one at a time, after the call without."""
    q, k, v = normal(1, 2, 20, 8), normal(1, 2, 30, 8, seed=1), normal(1, 2, 30, 8, seed=2)
    plain = scaled_dot_product_attention(q, k, v)
    different: list[dict[str, Any]] = [
        *({"attn_mask": np.tri(20, 30, dtype=bool)}, {"kv_lengths": 7}, {"query_lengths": 7}, {"softcap": 0.5}),
        *({"alibi_slopes": np.ones(2)}, {"sinks": np.ones(2)}, {"score_mod": lambda s, b, h, i, j: s + j}),
        *({"mask_mod": lambda b, h, i, j: j < 5}, {"dropout_p": 0.5}, {"is_causal": True}, {"scale": 0.1}),
        *({"window": (3, 3)}, {"query_offset": 3, "is_causal": True}),
    ]
    for options in different:
        for _ in range(2):
            assert not same_bits(scaled_dot_product_attention(q, k, v, **options), plain), options
        assert same_bits(scaled_dot_product_attention(q, k, v), plain)
    assert scaled_dot_product_attention(q, k, v, return_aux=("lse",))[1].lse is not None
    out = np.empty_like(plain)
    assert scaled_dot_product_attention(q, k, v, out=out) is out and same_bits(out, plain)
    drawn = [scaled_dot_product_attention(q, k, v, dropout_p=0.5) for _ in range(2)]
    assert not same_bits(*drawn)


def test_other_kinds_of_arrays() -> None:
    """Of another byte order, of a class of its own, masked: as without a call before."""
    x = normal(2, 20, 8)
    expected = scaled_dot_product_attention(x, x, x)
    swapped = x.astype(x.dtype.newbyteorder())
    for _ in range(2):
        assert same_bits(scaled_dot_product_attention(swapped, swapped, swapped), expected)
    own = x.view(type("Own", (np.ndarray,), {}))
    assert same_bits(np.asarray(scaled_dot_product_attention(own, x, x)), expected)
    with pytest.raises(TypeError, match="masked"):
        scaled_dot_product_attention(np.ma.masked_array(x), x, x)
    with pytest.raises(TypeError, match="one dtype"):
        scaled_dot_product_attention(x, x, x.astype(np.float64))


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("form", STORAGE)
def test_other_strides(form: str, which: int) -> None:
    """Of one array, after a call with the same shapes."""
    arrays = [normal(3, 2, 20, 8, seed=seed) for seed in range(3)]
    scaled_dot_product_attention(*arrays)
    arrays[which] = STORAGE[form](arrays[which])
    for _ in range(2):
        assert same_bits(scaled_dot_product_attention(*arrays), afresh(*arrays))


def test_threads_that_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call is laid out anew for another number of threads."""
    x, made = normal(1, 8, 300, 32), []
    expected = scaled_dot_product_attention(x, x, x)
    monkeypatch.setattr(threads, "count", lambda: made[-1])
    monkeypatch.setattr(
        Problem, "from_call", lambda *_, f=Problem.from_call, **call: (made.append(count), f(**call))[1]
    )
    for count in (1, 3, 1):
        made[:] = [count]
        for _ in range(2):
            assert same_bits(scaled_dot_product_attention(x, x, x), expected)
        assert made == [count, count]


@pytest.mark.parametrize("rows", [1, 20])
def test_arrays_are_not_kept(rows: int) -> None:
    arrays = [normal(2, n, 8, seed=n) for n in (rows, 25, 25)]
    out = scaled_dot_product_attention(*arrays)
    alive = [weakref.ref(x) for x in (*arrays, out)]
    del arrays, out
    gc.collect()
    assert all(x() is None for x in alive)


def test_only_so_many_are_kept() -> None:
    for n in range(1, repeats.MOST + 20):
        x = np.ones((n, 1), np.float32)
        np.testing.assert_allclose(scaled_dot_product_attention(x[:1], x, x), 1, rtol=1e-5)
        assert len(repeats._repeats) <= repeats.MOST


def test_many_threads_at_once() -> None:
    arrays = [normal(3, 2, 40, 8, seed=seed) for seed in range(8)]
    expected = [afresh(x, x, x) for x in arrays]
    wrong = []

    def calls(i: int) -> None:
        for _ in range(50):
            if not same_bits(scaled_dot_product_attention(*[arrays[i]] * 3), expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=calls, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


CACHES: dict[str, Any] = {
    **{name: {"dtype": name} for name in ("float32", "float64", *SIXTEEN_BITS)},
    **{name: {"quantize": name} for name in QUANTIZED},
    "ring": {"capacity": None, "window": 7, "sinks": 2},
    "pages": {"page_size": 4},
    "pages, int8": {"page_size": 4, "quantize": "int8"},
}


@pytest.mark.parametrize("kind", CACHES)
def test_steps_of_decoding(kind: str) -> None:
    """Each like the one before, whatever holds the keys: in two caches alike, or in other pages of one."""
    form = {"dtype": "float32", **CACHES[kind]}
    dtype = form["dtype"] = dtype_of(form["dtype"])
    steps = [(normal(2, 4, 1, 16, dtype=dtype, seed=n), normal(2, 2, 1, 16, dtype=dtype, seed=n)) for n in range(12)]

    def new() -> list[Any]:
        if "page_size" in form:
            pool = PagedKVCache(12, 2, D=16, **form)
            return [pool.batch([pool.add(), pool.add()]) for _ in range(2)]
        return [KVCache(2, 2, **{"capacity": 20, "D": 16, **form}) for _ in range(2)]

    def decoded(forgetful: bool) -> list[np.ndarray]:
        caches, found = new(), []
        for n, (query, key) in enumerate(steps):
            for cache in caches[:: 1 if n % 2 else -1]:
                if forgetful:
                    repeats.forget()
                found.append(attention_with_kv_cache(query, cache, key, key))
        return found

    expected = decoded(True)
    repeats.forget()
    for result, other in zip(decoded(False), expected, strict=True):
        assert same_bits(result, other)
    assert len(repeats._repeats) == (3 if "page_size" in form else 1)


@pytest.mark.parametrize(
    ("rotated", "options"),
    [
        *((False, {}), (True, {}), (True, {"query_offset": 3, "is_causal": True})),
        (False, {"return_aux": ("lse",), "attn_mask": np.tri(9, dtype=bool)}),
    ],
    ids=str,
)
def test_layers(rotated: bool, options: dict[str, Any]) -> None:
    """A layer asks for attention of arrays that it writes later: of these, not of an earlier call's."""
    tables = {"rotary": rotary_tables(20, 8)} if rotated else {}
    layers = [MultiHeadAttention.init(np.random.default_rng(seed), 16, num_heads=2, **tables) for seed in range(2)]
    calls = [(layer, normal(3, 9, 16, seed=seed)) for layer in layers for seed in range(2)]
    expected = []
    for layer, x in calls:
        repeats.forget()
        expected.append(layer(x, **options))
    repeats.forget()
    for (layer, x), result in zip(calls, expected, strict=True):
        assert all_same_bits(layer(x, **options), result)
    assert len(repeats._repeats) == 1
    if rotated:
        with pytest.raises(ValueError, match="position"):
            layers[0](x, **{**options, "query_offset": 12})
        scaled_dot_product_attention(*layers[0].project(x), layout="BLHD", enable_gqa=True, query_offset=12)
        with pytest.raises(ValueError, match="position"):
            layers[0](x, query_offset=12)
        for offset in ([0, 1, 5], [7, 0, 2]):
            # All sequences each time: what is projected with others may come to other bits, as BLAS likes.
            expected_of_each = [layers[0](x, query_offset=n)[b : b + 1] for b, n in enumerate(offset)]
            assert same_bits(layers[0](x, query_offset=np.array(offset)), np.concatenate(expected_of_each))
        with pytest.raises(ValueError, match="query_offset"):
            layers[0](x, query_offset=np.array([0, 1]))


@given(st.data())
def test_any_plain_call_again(data: st.DataObject) -> None:
    """Random shapes and options twice, with other numbers: the second to the bits of a call of its own."""
    B, Hkv, group, Lq, Lk, D, Dv = (data.draw(st.integers(0, n)) for n in (2, 2, 3, 40, 60, 20, 20))
    options: dict[str, Any] = {
        "is_causal": data.draw(st.booleans()),
        "scale": data.draw(st.sampled_from([None, 0.5, -2.0])),
        "query_offset": data.draw(st.integers(-5, 70)),
        "window": data.draw(st.none() | st.tuples(st.none() | st.integers(0, 9), st.none() | st.integers(0, 9))),
        "kv_lengths": None,
        "layout": data.draw(st.sampled_from(["BHLD", "BLHD"])),
        "enable_gqa": True,
        "softcap": data.draw(st.sampled_from([None, None, 2.0])),
        "return_aux": data.draw(st.sampled_from([(), (), ("lse",), ("max_score", "entropy")])),
    }
    wanted = [name for name in ("attn_mask", "sinks", "alibi_slopes", "out") if data.draw(st.integers(0, 3)) == 0]
    dtype = dtype_of(data.draw(st.sampled_from(["float32", "float64", *SIXTEEN_BITS])))
    form = STORAGE[data.draw(st.sampled_from(list(STORAGE)))]
    each = data.draw(st.booleans())
    for seed in range(2):
        if each:
            options["kv_lengths"] = np.random.default_rng([seed, B]).integers(0, Lk + 1, B)
        shapes = (B, Hkv * group, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv)
        arrays = [normal(*s, dtype=dtype, seed=seed) for s in shapes]
        if options["layout"] == "BLHD":
            arrays = [x.swapaxes(1, 2) for x in arrays]
        arrays = [form(x) for x in arrays]
        own = {
            "attn_mask": normal(B, 1, Lq, Lk, seed=seed) > -1,
            "sinks": np.arange(Hkv * group) / 4,
            "alibi_slopes": np.arange(Hkv * group) / 8,
            "out": np.empty((*arrays[0].shape[:-1], Dv), dtype),
        }
        options.update({name: own[name] for name in wanted})
        expected = afresh(*arrays, **{**options, "out": None})
        assert all_same_bits(scaled_dot_product_attention(*arrays, **options), expected)
