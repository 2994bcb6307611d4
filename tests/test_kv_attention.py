"""Attention over a cache against attention over all tokens at once."""

from __future__ import annotations

import pickle
import sys
import types
from typing import Any

import numpy as np
import pytest
from cases import SIXTEEN_BITS, dtype_of
from kv_tokens import DV, HKV, HQ, B, D, held, in_pieces, new, numbers, state, streaming
from tolerances import assert_accurate, same_bits

from numba_attn import KVCache, PagedKVCache, attention_with_kv_cache, block_mask, scaled_dot_product_attention
from numba_attn.cpu import launch

DTYPES = ["float32", "float64", *SIXTEEN_BITS]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [[1] * 20, [20], [7, 1, 1, 8, 3], [0, 19, 1]], ids=str)
def test_pieces_equal_the_whole(dtype: str, sizes: list[int]) -> None:
    arrays = numbers(0, 20, dtype_of(dtype))
    cache = new(dtype=dtype_of(dtype))
    out = in_pieces(cache, arrays, sizes)
    assert_accurate(out, None, *arrays, is_causal=True, enable_gqa=True)
    assert same_bits(cache.key[:, :, :20], arrays[1]) and same_bits(cache.value[:, :, :20], arrays[2])
    assert cache.lengths.tolist() == cache.totals.tolist() == [20] * B


def test_one_piece_is_the_plain_call() -> None:
    query, key, value = numbers(1, 20)
    out = attention_with_kv_cache(query, new(), key, value)
    assert same_bits(out, scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "D"), [(1, 32), (1, 64), (1, 128), (2, 64), (2, 48), (5, 64), (8, 32)])
def test_rows_wherever_they_are(dtype: str, group: int, D: int) -> None:
    """The same bits of more keys than a task has, from rows in order, the other way round, apart, and in pages."""
    rng, n = np.random.default_rng(group), 2600
    query, key, value = (
        rng.standard_normal((1, heads, length, D)).astype(dtype_of(dtype))
        for heads, length in ((group, 1), (1, n), (1, n))
    )
    backwards, apart = ([x[:, :, ::step].repeat(times, axis=axis) for x in (key, value)]
                        for step, times, axis in ((-1, 1, 2), (1, 3, 3)))  # fmt: skip
    forms = [(key, value), [x[:, :, ::-1] for x in backwards], [x[..., ::3] for x in apart]]
    for window in (None, (2307, 0)):
        options: Any = {"window": window, "query_offset": "bottom_right", "enable_gqa": True}
        expected, *others = (scaled_dot_product_attention(query, *x, **options) for x in forms)
        assert_accurate(expected, None, query, key, value, **options)
        for page_size in (7, 16, 100):
            pages = -(-n // page_size)
            cache, table = PagedKVCache(pages, 1, page_size, D, dtype=dtype_of(dtype)), rng.permutation(pages)
            for j in range(0, n, page_size):
                for to, x in ((cache.key, key), (cache.value, value)):
                    to[table[j // page_size], :, : n - j] = x[0, :, j : j + page_size]
            others.append(attention_with_kv_cache(query, cache.tables(table[None], n), window=window))
        assert all(same_bits(x, expected) for x in others)


OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"window": (3, None)},
    "scale": {"scale": 0.5},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": np.linspace(0.1, 0.4, HQ)},
    "sinks": {"sinks": np.linspace(-1, 1, HQ)},
    "backend": {"backend": "reference"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str) -> None:
    arrays = numbers(2, 18)
    out = in_pieces(new(), arrays, [9, 1, 5, 3], **OPTIONS[name])
    options = {k: v for k, v in OPTIONS[name].items() if k != "backend"}
    assert_accurate(out, None, *arrays, is_causal=True, enable_gqa=True, **options)


def test_functions_dropout_and_out_arrive() -> None:
    """They are asked for row i of the query and place j of the cache."""
    query, key, value = numbers(3, 12)
    options: dict[str, Any] = {
        "score_mod": lambda score, b, h, i, j: score + 0.1 * i - 0.2 * j,
        "mask_mod": lambda b, h, i, j: (i + j) % 3 != 0,
        "dropout_p": 0.3,
        "dropout_seed": 5,
        "return_aux": ("lse", "key_weight"),
        "backend": "reference",
    }
    cache, out = new(), np.empty((B, HQ, 4, DV), np.float32)
    cache.append(key[:, :, :8], value[:, :, :8])
    result, aux = attention_with_kv_cache(
        query[:, :, 8:], cache, key[:, :, 8:], value[:, :, 8:], is_causal=False, out=out, **options
    )
    assert result is out
    expected = scaled_dot_product_attention(query[:, :, 8:], key, value, enable_gqa=True, **options)
    assert same_bits((result, aux), expected)
    assert aux.key_weight.shape == (B, HQ, 12)


@pytest.mark.parametrize("window", [None, (2, 4)])
def test_not_causal_sees_all_that_is_held(window: tuple[int, int] | None) -> None:
    query, key, value = numbers(4, 12)
    cache = new()
    cache.append(key[:, :, :7], value[:, :, :7])
    out = attention_with_kv_cache(
        query[:, :, 7:], cache, key[:, :, 7:], value[:, :, 7:], is_causal=False, window=window
    )
    assert_accurate(out, None, query[:, :, 7:], key, value, enable_gqa=True, window=window, query_offset=7)


def test_without_new_tokens_rows_are_the_last() -> None:
    query, key, value = numbers(5, 12)
    cache = new()
    cache.append(key, value, [12, 5, 2])
    before = state(cache)
    out = attention_with_kv_cache(query[:, :, :3], cache)
    assert state(cache) == before
    options = {"is_causal": True, "enable_gqa": True, "kv_lengths": [12, 5, 2], "query_offset": [9, 2, -1]}
    assert_accurate(out, None, query[:, :, :3], key, value, **options)
    assert not out[2, :, 0].any()


def test_sequences_of_their_own_length() -> None:
    """Each gets other numbers of tokens, none at times, and is as if alone."""
    rng = np.random.default_rng(6)
    query, key, value = numbers(6, 40)
    taken, got = [0] * B, [[np.empty((HQ, 0, DV), np.float32)] for _ in range(B)]
    cache = new(40)
    for _ in range(12):
        n = int(rng.integers(1, 5))
        counts = np.minimum(rng.integers(0, n + 1, B), 40 - np.array(taken))
        q, k, v = (np.full((B, x.shape[1], n, x.shape[3]), np.nan, np.float32) for x in (query, key, value))
        for b, count in enumerate(counts):
            for piece, x in ((q, query), (k, key), (v, value)):
                piece[b, :, :count] = x[b, :, taken[b] : taken[b] + count]
        out = attention_with_kv_cache(q, cache, k, v, counts=counts)
        for b, count in enumerate(counts):
            got[b].append(out[b, :, :count])
            assert not out[b, :, count:].any()
            taken[b] += int(count)
    assert cache.lengths.tolist() == taken and len(set(taken)) > 1
    for b, n in enumerate(taken):
        out = np.concatenate(got[b], axis=1)
        assert_accurate(out, None, query[b, :, :n], key[b, :, :n], value[b, :, :n], is_causal=True, enable_gqa=True)


def test_empty_sequences_give_zero() -> None:
    query, key, value = numbers(7, 2)
    cache = new()
    assert not attention_with_kv_cache(query, cache).any()
    out, aux = attention_with_kv_cache(query, cache, key, value, counts=[0, 1, 0], return_aux=("lse",))
    assert not out[[0, 2]].any() and out[1, :, 0].all()
    assert (aux.lse[[0, 2]] == -np.inf).all()
    assert attention_with_kv_cache(np.empty((0, HQ, 1, D), np.float32), KVCache(0, HKV, 4, D)).shape == (0, HQ, 1, D)


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_a_pool_without_pages(quantize: str | None) -> None:
    """Its sequences are empty."""
    query = numbers(7, 9)[0][:2]
    pool = PagedKVCache(0, HKV, 4, D, DV, quantize=quantize)
    empty = KVCache(2, HKV, 0, D, DV, quantize=quantize)
    for batch in (pool.batch([pool.add(), pool.add()]), pool.tables(np.zeros((2, 1), int), 0)):
        for rows in (1, 1, 9):  # the second like the first
            out = attention_with_kv_cache(query[:, :, :rows], batch)
            assert same_bits(out, attention_with_kv_cache(query[:, :, :rows], empty)) and not out.any()
    with pytest.raises(ValueError, match=r"1 pages are needed, .* and 0 are free"):
        attention_with_kv_cache(query[:1, :, :1], pool.batch(0), *(x[:1, :, :1] for x in numbers(7, 1)[1:]))


@pytest.mark.parametrize("ring", [False, True])
def test_unused_capacity_does_not_matter(ring: bool) -> None:
    arrays = numbers(8, 12)
    results = []
    for filling in (0.0, np.nan, np.inf):
        cache = new(None, window=20, sinks=4) if ring else new(24)
        cache.key[:], cache.value[:] = filling, filling
        results.append([in_pieces(cache, arrays, [5, 1, 1]), in_pieces(cache, arrays, [3], counts=[3, 0, 1])])
    assert np.isfinite(results[0][0]).all()
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("counts", [None, [1, 3, 2]])
@pytest.mark.parametrize("n", [3, 20])
def test_work_does_not_grow_with_capacity(n: int, counts: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of 64 GiB costs what one that is full does: as many tasks, of as many multiply-adds."""
    seen, slices = [], launch.slices

    def watched(*work: Any) -> Any:
        seen.append(work)
        return slices(*work)

    monkeypatch.setattr(launch, "slices", watched)
    query, key, value = numbers(9, n)
    results = []
    for capacity in (n, 100_000):
        cache = new(capacity)
        results.append(attention_with_kv_cache(query, cache, key, value, counts=counts))
    first, second = results
    assert same_bits(first, second)
    assert len(seen) == 2 and seen[0] == seen[1]


# Rotary embedding -----------------------------------------------------------------------------------------------------


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, *, position_offset: Any = 0) -> np.ndarray:
    """Halves turned by the angles of their positions: what `numba_attn.rotary.apply_rotary` does."""
    position = np.broadcast_to(position_offset, x.shape[:1])[:, None] + np.arange(x.shape[2])
    if position.min() < 0 or position.max() >= len(cos):
        raise ValueError("position_offset")
    c, s = cos[position][:, None], sin[position][:, None]
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * c - second * s, second * c + first * s], axis=-1).astype(x.dtype)


def tables(n: int) -> tuple[np.ndarray, np.ndarray]:
    angle = np.arange(n)[:, None] * 0.1 ** np.arange(D // 2)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


@pytest.fixture(params=["stand-in", "real"])
def rotary_module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's own, and one that is known to be right."""
    if request.param == "real":
        pytest.importorskip("numba_attn.rotary")
        return
    module = types.ModuleType("numba_attn.rotary")
    module.apply_rotary = rotate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "numba_attn.rotary", module)


@pytest.mark.usefixtures("rotary_module")
@pytest.mark.parametrize("ring", [False, True])
def test_rotary_at_the_positions_of_each_sequence(ring: bool) -> None:
    query, key, value = numbers(10, 24)
    rotary = tables(40)
    turned = [rotate(x, *rotary) for x in (query, key)]
    cache = new(None, window=6, sinks=2) if ring else new(24)
    skipped = [0, 2, 5]
    cache.append(key[:, :, :5] * 0, value[:, :, :5], skipped)  # positions of their own
    outs = []
    for end in range(4, 20, 4):
        q, k, v = ([x[b, :, s + end - 4 : s + end] for b, s in enumerate(skipped)] for x in (query, key, value))
        outs.append(attention_with_kv_cache(np.stack(q), cache, np.stack(k), np.stack(v), rotary=rotary))
    assert cache.totals.tolist() == [16 + s for s in skipped]
    for b, s in enumerate(skipped):
        n = 16 + s
        turned[1][b, :, :s] = 0
        mask = {"attn_mask": streaming(16, n, 6, 2)} if ring else {"is_causal": True, "query_offset": s}
        assert_accurate(
            np.concatenate([out[b] for out in outs], axis=1),
            None,
            turned[0][b, :, s:n],
            turned[1][b, :, :n],
            value[b, :, :n],
            enable_gqa=True,
            **mask,
        )


@pytest.mark.usefixtures("rotary_module")
def test_rotary_of_the_query_alone_and_beyond_the_tables() -> None:
    query, key, value = numbers(11, 4)
    cos, sin = tables(6)
    cache = new()
    cache.append(key, value)
    out = attention_with_kv_cache(query[:, :, :1], cache, rotary=(cos, sin))
    turned = rotate(query[:, :, :1], cos, sin, position_offset=3)
    assert_accurate(out, None, turned, key, value, enable_gqa=True)
    before = state(cache)
    with pytest.raises(ValueError, match="rotary must have a position for each row, got 6, query needs 8"):
        attention_with_kv_cache(query, cache, key, value, rotary=(cos, sin))
    with pytest.raises(ValueError, match="query must have a position of 0 or more for each row with rotary, got -1"):
        attention_with_kv_cache(np.repeat(query, 2, axis=2)[:, :, :5], cache, rotary=(cos, sin))
    with pytest.raises(TypeError, match=r"rotary must be a pair of tables \(cos, sin\), got numpy.ndarray"):
        attention_with_kv_cache(query, cache, key, value, rotary=cos)  # type: ignore[arg-type]
    assert state(cache) == before


# The ring -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[1] * 26, [9, 1, 5, 1, 1, 6, 3], [2, 6, 6, 6, 6], [3, 4, 0, 4, 5, 5, 5]], ids=str)
@pytest.mark.parametrize("sinks", [0, 3])
def test_ring_in_pieces(sizes: list[int], sinks: int) -> None:
    """How tokens come changes nothing: each row sees the sinks, and the last tokens up to itself."""
    window = 9 - sinks
    arrays = numbers(12, sum(sizes))
    cache = new(None, window=window, sinks=sinks)
    out = in_pieces(cache, arrays, sizes)
    assert_accurate(out, None, *arrays, enable_gqa=True, attn_mask=streaming(26, 26, window, sinks))
    assert cache.capacity == 9 and cache.lengths.tolist() == [9] * B and cache.totals.tolist() == [26] * B
    kept = [*range(sinks), *range(26 - window, 26)]
    for b in range(B):
        assert same_bits(held(cache, b)[0], arrays[1][b][:, kept])
        assert sorted(cache.positions[b]) == kept


def test_ring_of_sequences_apart() -> None:
    """One has wrapped, one has not, one is empty; rows are causal or not, with and without new tokens."""
    cache = new(None, window=4, sinks=1)
    old = numbers(13, 9)
    for i in range(9):
        cache.append(old[1][:, :, i : i + 1], old[2][:, :, i : i + 1], [1, i < 2, 0])
    assert cache.positions.tolist() == [[0, 5, 6, 7, 8], [0, 1, -1, -1, -1], [-1] * 5]
    late = attention_with_kv_cache(old[0][:, :, :3], cache)  # rows at 6, 7, 8 see of the last five what is left
    query, key, value = numbers(14, 3)
    for is_causal in (True, False):
        whole = pickle.loads(pickle.dumps(cache))
        out = attention_with_kv_cache(query, whole, key, value, counts=[3, 2, 1], is_causal=is_causal)
        for b, (n, m) in enumerate([(9, 3), (2, 2), (0, 1)]):
            k, v = (np.concatenate([x[b, :, :n], y[b, :, :m]], axis=1) for x, y in ((old[1], key), (old[2], value)))
            mask = streaming(m, n + m, 4, 1) if is_causal else np.repeat(streaming(m, n + m, 4, 1)[-1:], m, axis=0)
            assert_accurate(out[b, :, :m], None, query[b, :, :m], k, v, enable_gqa=True, attn_mask=mask)
            assert not out[b, :, m:].any()
    seen = streaming(3, 9, 4, 1) & (np.isin(np.arange(9), [0, 5, 6, 7, 8]))
    assert_accurate(late[0], None, old[0][0, :, :3], old[1][0], old[2][0], enable_gqa=True, attn_mask=seen)


def test_ring_takes_back_what_it_has_overwritten() -> None:
    cache = new(None, window=4, sinks=1)
    query, key, value = numbers(15, 3)
    for _ in range(3):
        cache.append(key, value)
    before = state(cache)
    for n in (1, 3):
        with pytest.raises(ValueError, match="softcap"):
            attention_with_kv_cache(query[:, :, :n], cache, key[:, :, :n] + 1, value[:, :, :n], softcap=-1.0)
    with pytest.raises(ValueError, match="softcap"):
        attention_with_kv_cache(query, cache, key + 1, value, softcap=-1.0, is_causal=False)
    assert state(cache) == before


@pytest.mark.parametrize(
    "options",
    [
        {"window": (2, 0)},
        {"alibi_slopes": np.ones(HQ)},
        {"score_mod": lambda score, b, h, i, j: score},
        {"mask_mod": lambda b, h, i, j: True},
        {"return_aux": ("lse", "key_weight")},
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_ring_refuses_what_needs_order(options: dict[str, Any]) -> None:
    cache = new(None, window=4)
    query, key, value = numbers(16, 1)
    with pytest.raises(ValueError, match=f"{next(iter(options))}.* out of order"):
        attention_with_kv_cache(query, cache, key, value, **options)
    assert not cache.lengths.any()


# Errors ---------------------------------------------------------------------------------------------------------------

QUERY, KEY, VALUE = numbers(27, 2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"cache": 3}, TypeError, "cache must be a KVCache or a batch of a PagedKVCache, got int"),
        ({"query": [1]}, TypeError, "query must be a NumPy array, got list"),
        ({"query": QUERY[0]}, ValueError, r"query must have shape \(3, Hq, n, 8\), got \(4, 2, 8\)"),
        ({"query": QUERY[:2]}, ValueError, r"query must have shape \(3, Hq, n, 8\), got \(2, 4, 2, 8\)"),
        ({"query": QUERY[..., :4]}, ValueError, r"query must have shape \(3, Hq, n, 8\), got \(3, 4, 2, 4\)"),
        ({"query": QUERY[:, :3]}, ValueError, "query heads must be a multiple of key-value heads, got 3 and 2"),
        ({"query": QUERY[:, :, :1]}, ValueError, "query and key must have the same length, got 1 and 2"),
        ({"query": QUERY.astype(np.float16)}, TypeError, "query must be float32, as the cache is, got float16"),
        ({"key": None}, TypeError, "key must be a NumPy array, got NoneType"),
        ({"value": None}, TypeError, "value must be a NumPy array, got NoneType"),
        ({"key": KEY.astype(np.float64)}, TypeError, "key must be float32, as the cache is, got float64"),
        ({"value": VALUE.astype(np.float64)}, TypeError, "value must be float32, as the cache is, got float64"),
        ({"key": KEY[:, :1]}, ValueError, r"key must have shape \(3, 2, n, 8\), got \(3, 1, 2, 8\)"),
        ({"key": KEY[0]}, ValueError, r"key must have shape \(3, 2, n, 8\), got \(2, 2, 8\)"),
        ({"value": VALUE[..., :5]}, ValueError, r"value must have shape \(3, 2, n, 6\), got \(3, 2, 2, 5\)"),
        ({"value": VALUE[:, :, :1]}, ValueError, "key and value must have the same length, got 2 and 1"),
        ({"counts": 3}, ValueError, "counts must be between 0 and 2, got 3"),
        ({"counts": [1, -1, 0]}, ValueError, "counts must be between 0 and 2, got -1"),
        ({"counts": [1, 1]}, ValueError, r"counts must be an integer or have shape \(3,\), got shape \(2,\)"),
        ({"counts": [2**70, 1, 1]}, ValueError, f"counts must be between 0 and 2, got {2**70}"),
        ({"counts": [1.0, 1, 1]}, TypeError, "counts must be integers"),
        ({"is_causal": 1}, TypeError, "is_causal must be True or False, got int"),
        ({"window": 3}, TypeError, "window must be a pair"),
        ({"scale": np.inf}, ValueError, "scale must be finite"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive"),
        ({"alibi_slopes": np.ones(3)}, ValueError, "alibi_slopes must have shape"),
        ({"sinks": np.ones((2, 2))}, ValueError, "sinks must have shape"),
        ({"score_mod": 3}, TypeError, "score_mod must be a function"),
        ({"mask_mod": lambda b: b}, TypeError, "mask_mod must take 4 arguments"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p must be in"),
        ({"dropout_seed": -1}, ValueError, "dropout_seed must be in"),
        ({"return_aux": "lse"}, TypeError, "return_aux must be a tuple"),
        ({"out": np.zeros((B, HQ, 2, D), np.float32)}, ValueError, r"out must have shape \(3, 4, 2, 6\)"),
        ({"precision": "int8"}, ValueError, "precision must be None or 'bfloat16'"),
        ({"backend": "gpu"}, ValueError, "backend must be"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_bad_calls_change_nothing(changes: dict[str, Any], error: Any, message: str) -> None:
    cache = new()
    cache.append(KEY, VALUE, [2, 1, 0])
    lengths, used = cache.lengths.tolist(), [x.tobytes() for b in range(B) for x in held(cache, b)]
    call = {"query": QUERY, "cache": cache, "key": KEY, "value": VALUE, **changes}
    with pytest.raises(error, match=message):
        attention_with_kv_cache(**call)
    assert cache.lengths.tolist() == lengths
    assert [x.tobytes() for b in range(B) for x in held(cache, b)] == used
    if {"key", "value", "counts"} & set(changes):
        with pytest.raises(error, match=message):
            cache.append(**{name: call.get(name) for name in ("key", "value", "counts")})


@pytest.mark.parametrize("paged", [False, True])
def test_masks_made_for_what_is_held(paged: bool) -> None:
    """Ready-made ones have tables for the tokens, not for all that a cache has room for."""
    x = np.random.default_rng(0).standard_normal((1, 1, 5, 8), dtype=np.float32)
    cache: Any = KVCache(1, 1, 64, 8)
    if paged:
        pages = PagedKVCache(9, 1, 4, 8)
        cache = pages.batch([pages.add()])
    documents = block_mask.documents([0, 0, 1, 1, 1])
    out = attention_with_kv_cache(x, cache, x, x, mask_mod=documents)
    np.testing.assert_array_equal(
        out, scaled_dot_product_attention(x, x, x, is_causal=True, mask_mod=documents, query_lengths=5)
    )
    with pytest.raises(ValueError, match="made for 5 positions"):
        attention_with_kv_cache(x[:, :, :1], cache, x[:, :, :1], x[:, :, :1], mask_mod=documents)
    assert cache.lengths.tolist() == [5]
