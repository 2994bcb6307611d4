"""What only the CPU kernels promise: the same bits on any threads, work that is skipped, memory that stays small."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest
from cases import PERF, SIXTEEN_BITS, SMALL, dtype_of
from tolerances import compute, exact

from numba_attn import repeats, scaled_dot_product_attention, scaled_dot_product_attention_vjp, threads
from numba_attn.cpu import attention, decode, forward, key_weight, score, shares, target
from numba_attn.cpu.jit import OPTIONS
from numba_attn.cpu.plan import plan, split_keys, splits_of


@pytest.fixture
def two_threads() -> Any:
    before = numba.get_num_threads()
    yield lambda n: numba.set_num_threads(min(n, numba.config.NUMBA_NUM_THREADS))
    numba.set_num_threads(before)


@pytest.mark.parametrize("name", ["8 x 512, D 64, causal", "12 x 128, D 64", "64 of 12 x 17, D 64"])
def test_threads_change_no_bit(name: str, two_threads: Any) -> None:
    case = next(c for c in PERF if c.name == name)
    results = []
    for n in (1, 2, 1):
        two_threads(n)
        results.append(scaled_dot_product_attention(*case.arrays(), **case.keywords()))
    assert all(np.array_equal(results[0], r) for r in results[1:])


def test_repeats_change_no_bit() -> None:
    case = next(c for c in PERF if c.name == "8 x 512, D 64")
    expected = scaled_dot_product_attention(*case.arrays())
    assert all(np.array_equal(scaled_dot_product_attention(*case.arrays()), expected) for _ in range(20))


@pytest.mark.parametrize("options", ["large scores", "alibi", "alibi, window", "alibi and entropy"])
def test_row_blocks_change_no_bit(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row's bits depend on the keys of a tile at most, never on what else is in its block or task."""
    case = next(c for c in SMALL if c.name == "large scores")
    query, key, value = case.arrays()
    # Of which a tile is shortened at its ends, by more for some rows than for all.
    mask = (np.arange(query.shape[2])[:, None] // 10 + np.arange(key.shape[2]) // 20) % 4 == 0

    def attend(first: int, end: int) -> np.ndarray:
        repeats.forget()
        given: dict[str, Any] = dict(case.keywords())
        if options != "large scores":
            slopes = np.full(query.shape[1], 0.7)
            given |= {"alibi_slopes": slopes, "query_offset": first + 150, "attn_mask": mask[first:end], "scale": 1.0}
        if "window" in options:
            given["window"] = (13, 9)
        if "entropy" in options:
            given["return_aux"] = ("entropy",)
        found = scaled_dot_product_attention(query[:, :, first:end], key, value, **given)
        return found[0] if "entropy" in options else found

    whole, rows = attend(0, query.shape[2]), query.shape[2]
    few = decode.MOST_ROWS + 1  # for fewer, products are summed in another order
    for i in range(rows - few + 1):
        assert np.array_equal(attend(i, i + few), whole[:, :, i : i + few])
    for blocks in (1, 2, 5):
        monkeypatch.setattr(
            attention, "plan", lambda *s, n=blocks: (p := plan(*s))._replace(blocks=n, tasks=-(-s[1] // (p.block * n)))
        )
        assert np.array_equal(attend(0, rows), whole)


@pytest.mark.parametrize("aux", [(), ("entropy",)], ids=["lse", "entropy"])
@pytest.mark.parametrize(("Lq", "Lk"), [(130, 130), (70, 300), (300, 70), (37, 97)])
@pytest.mark.parametrize("dtype", ["float32", "float64", *SIXTEEN_BITS])
@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"is_causal": True, "query_offset": "bottom_right"},
        {"is_causal": True, "query_offset": 23, "window": (31, 0)},
        {"window": (60, 3), "query_offset": -11},
        {"window": (150, 70), "query_offset": 40},
        {"kv_lengths": np.array([41, 70]), "window": (None, 9)},
    ],
    ids=str,
)
def test_edges_change_no_bit(options: dict[str, Any], dtype: str, Lq: int, Lk: int, aux: tuple[str, ...]) -> None:
    """Vectors of queries are left out of the products where intervals of keys end: the same as a mask that says so."""
    rng = np.random.default_rng(3)
    query, key, value = (
        rng.standard_normal((2, 2, L, D)).astype(dtype_of(dtype)) for L, D in ((Lq, 48), (Lk, 48), (Lk, 32))
    )
    offset = options.get("query_offset", 0)
    position = np.arange(Lq)[:, None] + (Lk - Lq if offset == "bottom_right" else offset)
    left, right = options.get("window", (None, None))
    right = 0 if options.get("is_causal") else right
    keys, lengths = np.arange(Lk), options.get("kv_lengths", np.array([Lk, Lk]))
    allowed = keys < lengths[:, None, None, None]
    allowed = allowed & ((keys <= position + right) if right is not None else True)
    allowed = allowed & ((keys >= position - left) if left is not None else True)
    found, found_aux = scaled_dot_product_attention(query, key, value, return_aux=("lse", *aux), **options)
    expected, expected_aux = scaled_dot_product_attention(query, key, value, allowed, return_aux=("lse", *aux))
    assert np.array_equal(found, expected)
    for name in ("lse", *aux):
        assert np.array_equal(getattr(found_aux, name), getattr(expected_aux, name))


@pytest.mark.parametrize("Lq", [17, 64])
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "query_offset": -5}, {"kv_lengths": [40, 11]}], ids=str)
@pytest.mark.parametrize("sinks", [None, [0.5, -1.0, 3.0], [60.0, 0.0, -300.0]])
def test_short_sequences_written_at_once_change_no_bit(sinks: Any, options: dict[str, Any], Lq: int) -> None:
    """With sinks that move references and not: as where results are no rows, so that values are summed up first."""
    rng = np.random.default_rng(5)
    query, key, value = (rng.standard_normal((2, 3, L, 32), dtype=np.float32) for L in (Lq, 40, 40))
    given = options | ({} if sinks is None else {"sinks": np.array(sinks, np.float32)})
    aux = ("lse", "max_score", "entropy")
    found, found_aux = scaled_dot_product_attention(query, key, value, return_aux=aux, **given)
    apart = np.empty((2, 3, Lq, 64), np.float32)[..., ::2]
    _, expected_aux = scaled_dot_product_attention(query, key, value, out=apart, return_aux=aux, **given)
    assert np.array_equal(found, apart)
    for name in aux:
        assert np.array_equal(getattr(found_aux, name), getattr(expected_aux, name))
    exact = scaled_dot_product_attention(*(x.astype("d") for x in (query, key, value)), backend="reference", **given)
    np.testing.assert_allclose(found, exact, atol=2e-6)


@pytest.mark.parametrize("slope", [0.01, 0.03, 0.1, 1.0])
@pytest.mark.parametrize("rise", [-3.0, -1.5, -1.0, 0.5])
def test_scores_against_alibi(rise: float, slope: float) -> None:
    """Scores far below 0 that fall as fast as ALiBi makes them rise, or faster: nothing of the first keys is lost."""
    query, value = np.ones((1, 60, 1), np.float32), np.random.default_rng(0).standard_normal((1, 700, 8), np.float32)
    key = (slope * rise * np.arange(700) - 300)[None, :, None].astype(np.float32)
    for offset, causal in ((640, True), (640, False), (900, False), (300, False)):
        given: dict[str, Any] = {"alibi_slopes": np.array([slope]), "query_offset": offset, "is_causal": causal}
        found = scaled_dot_product_attention(query, key, value, scale=1.0, **given)
        exact = scaled_dot_product_attention(query, key, value, scale=1.0, backend="reference", **given)
        np.testing.assert_allclose(found, exact, atol=2e-3)


def test_a_function_of_steep_scores() -> None:
    """What ALiBi adds is known in base 2, and as accurate as in plain NumPy for a function that wants the natural."""

    def squared(score: Any, b: int, h: int, i: int, j: int) -> Any:
        return score + 0.03125 * score * score  # of -80: an error grows by 4

    rng, options = np.random.default_rng(12), {"score_mod": squared, "alibi_slopes": np.full(16, 0.35, np.float32)}
    q, k, v = (rng.standard_normal((1, 16, n, 9)).astype(np.float32) for n in (253, 100, 100))
    truth, rough = exact(q, k, v, **options)["out"], compute(q, k, v, np.float32, **options)["out"]
    errors = [np.sqrt(np.mean((x - truth) ** 2)) for x in (scaled_dot_product_attention(q, k, v, **options), rough)]
    assert errors[0] <= errors[1]


def test_growing_scores() -> None:
    """Scores that rise from key to key, so that the reference maximum is raised again and again."""
    rng = np.random.default_rng(0)
    query = np.ones((1, 40, 4), np.float32)
    key = np.repeat(np.linspace(-300, 300, 700, dtype=np.float32)[None, :, None], 4, axis=2)
    value = rng.standard_normal((1, 700, 5), dtype=np.float32)
    for order in (slice(None), slice(None, None, -1)):
        out = scaled_dot_product_attention(query, key[:, order], value[:, order])
        exact = scaled_dot_product_attention(query, key[:, order], value[:, order], backend="reference")
        np.testing.assert_allclose(out, exact, atol=1e-4)


def test_scores_that_are_minus_infinity(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that is attended to and infinitely far has weight 0, also in a row that has met no other key so far."""
    monkeypatch.setattr(
        attention, "plan", lambda *s: (p := plan(*s))._replace(keys=7, short=0, blocks=1, tasks=-(-s[1] // p.block))
    )
    query, value = np.ones((1, 30, 4), np.float32), np.ones((1, 40, 3), np.float32)
    key = np.full((1, 40, 4), -np.inf, np.float32)
    key[:, 33:] = 1
    mask = np.ones((30, 40), bool)
    mask[::2, :7] = False  # the first tile
    mask[::3, 33:] = False
    out = scaled_dot_product_attention(query, key, value, mask)
    np.testing.assert_array_equal(out, scaled_dot_product_attention(query, key, value, mask, backend="reference"))
    assert (out[0, ::3] == 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("Dv", [16, 32, 48, 64, 112, 128])
def test_results_made_at_once(dtype: Any, Dv: int) -> None:
    """Of keys of one tile, whose results are written as rows, to the bits of those that are transposed first."""
    rng = np.random.default_rng(Dv)
    empty = rng.random((140, 128)) < 0.7
    empty[20:120] = False
    for rows, keys in ((1, 40), (9, 1), (17, 17), (50, 33), (140, 64), (48, 128)):
        query = rng.standard_normal((2, rows, 16)).astype(dtype)
        key, value = (rng.standard_normal((2, keys, n)).astype(dtype) for n in (16, Dv))
        value[:, :, ::3] *= np.finfo(dtype).smallest_subnormal  # results of either sign that are no numbers any more
        options: list[dict[str, Any]] = [{}, {"is_causal": True}, {"window": (3, 0), "query_offset": keys - rows}]
        options += [{"attn_mask": empty[:rows, :keys]}, {"dropout_p": 0.3, "dropout_seed": 1}]
        for chosen in options:
            at_once = scaled_dot_product_attention(query, key, value, **chosen)
            out = np.full((2, rows, Dv, 2), np.nan, dtype)[..., 0]
            scaled_dot_product_attention(query, key, value, out=out, **chosen)
            assert at_once.tobytes() == out.tobytes(), (rows, keys, list(chosen))  # signs of zeros too


def test_many_calls_at_once() -> None:
    """Python threads that call at the same time, the first of them compiling: all get the same bits."""
    case = next(c for c in PERF if c.name == "8 x 512, D 64")
    arrays = case.arrays()
    expected = scaled_dot_product_attention(*arrays)
    results: list[Any] = [None] * 8

    def call(i: int) -> None:
        results[i] = [scaled_dot_product_attention(*arrays) for _ in range(5)]

    callers = [threading.Thread(target=call, args=(i,)) for i in range(len(results))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all(np.array_equal(r, expected) for group in results for r in group)


def test_caller_keeps_its_thread_mask(two_threads: Any) -> None:
    two_threads(1)
    case = next(c for c in PERF if c.name == "8 x 512, D 64")
    scaled_dot_product_attention(*case.arrays())
    assert numba.get_num_threads() == threads.count() == 1


def test_masked_tiles_are_not_read() -> None:
    """Keys outside the interval, and tiles that a bool mask empties, are never touched: they may be absurdly many."""
    few = np.ones((1, 50, 8), np.float32)
    endless = np.broadcast_to(few[:, :1], (1, 1 << 33, 8))
    out = scaled_dot_product_attention(few, endless, endless, window=(3, 3), query_offset=1 << 32)
    np.testing.assert_allclose(out, 1, rtol=1e-6)
    out = scaled_dot_product_attention(few, endless, endless, kv_lengths=9)
    np.testing.assert_allclose(out, 1, rtol=1e-6)


# Heads, Lq, Lk, D, Dv, bytes of an element.
SHAPES = [(1, 1, 1, 1, 1, 4), (8, 2048, 2048, 64, 64, 4), (768, 17, 17, 64, 64, 4), (1, 64, 0, 4096, 64, 8)]
SHAPES += [(8, Lq, 512, 64, 64, 4) for Lq in (512, 240, 230, 1000)]


@pytest.mark.parametrize("workers", [1, 2, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_plan(shape: tuple[int, ...], workers: int) -> None:
    cut = plan(*shape, workers)
    assert min(cut) >= 1
    assert cut.tasks * cut.blocks * cut.block >= shape[1] > (cut.tasks - 1) * cut.blocks * cut.block
    assert cut.keys == plan(*shape, 1).keys, "the keys of a tile decide bits"
    if workers == 2 and shape[0] > 1:
        assert shape[0] * cut.tasks >= 16, "too few tasks to finish together"


@numba.njit(**OPTIONS)
def blocks_of_share(heads, rows, alike, sizes):
    return shares.blocks_of(shares.share_of(heads, 0, rows, alike, sizes), sizes)


@pytest.mark.parametrize("workers", [1, 2, 64])
@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize(("group", "Lq"), [(1, 9), (4, 16), (7, 30), (32, 100), (6, 2000), (8, 4), (64, 2)])
def test_plan_of_heads_that_share_keys(group: int, Lq: int, alike: bool, workers: int) -> None:
    cut = plan(4 * group, Lq, 1 << 16, 128, 128, 4, workers, None, 4, group, alike)
    assert 1 <= cut.heads <= group
    assert cut.across == 1 or (alike and cut.across * Lq <= cut.block), "rows of a block"
    assert cut.heads == 1 or cut.tasks == 1, "all rows of each"
    one = plan(4 * group, Lq, 1 << 16, 128, 128, 4, workers)
    limit = max(one.blocks, 12)  # whose states fit the second-level cache with the keys
    assert cut.states <= limit
    sizes = forward.Sizes(128, 128, cut.keys, cut.block, 16, 0)
    for rows in range(1, Lq + 1 if cut.tasks == 1 else 1):  # of a sequence that may be shorter
        assert blocks_of_share(cut.heads, rows, alike, sizes) <= cut.states, "as many as there is memory for"
    if Lq <= 100:
        fit = max(1, cut.block // Lq) if alike else 1
        many = cut.heads * cut.blocks >= min(group, fit * limit) // 2
        assert many or workers == 64, "each tile of keys is for many rows"
        splits = splits_of(1 << 16, split_keys(4, Lq, 1 << 16, cut.block, cut.keys, cut.split))
        assert 4 * -(-group // cut.heads) * cut.tasks * splits >= min(4 * workers, 48), (
            "too few tasks to finish together"
        )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "large"), [("float32", 2.0**24), ("float64", 2.0**53)])
def test_long_heads_are_added_up_in_parts(dtype: str, large: float, masked: bool) -> None:
    """In one sum, each of many small terms behind a large one would be lost."""
    query, value = np.ones((12, 600), dtype), np.array([[0.0], [1.0]], dtype)
    key = np.zeros((2, 600), dtype)
    key[0, 0], key[0, 256:512], key[1, 0] = large, 1, large + 256
    mask = np.zeros((12, 2), dtype) if masked else None
    out, vjp = scaled_dot_product_attention_vjp(query, key, value, mask, scale=0.125)
    assert np.array_equal(out, np.full((12, 1), 0.5, dtype))
    assert np.array_equal(vjp(np.ones_like(out)).value, np.full((2, 1), 6.0, dtype))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("sinks", [False, True])
def test_weights_of_keys_where_references_differ(rows: int, sinks: bool) -> None:
    """Of few rows, whose scores grow from one part of the keys to the next, far beyond what references of 0 allow."""
    rng = np.random.default_rng(0)
    query, key = np.full((4, rows, 8), 3.0), rng.standard_normal((2, 3000, 8)) + np.linspace(-20, 20, 3000)[:, None]
    options = {"sinks": np.array([480.0, 0, 600, -600])} if sinks else {}
    given = {"enable_gqa": True, "return_aux": ("key_weight",), **options}
    for order in (slice(None), slice(None, None, -1)):
        _, found = scaled_dot_product_attention(query, key[:, order], key[:, order], **given)
        _, expected = scaled_dot_product_attention(query, key[:, order], key[:, order], backend="reference", **given)
        np.testing.assert_allclose(found.key_weight, expected.key_weight, rtol=1e-9, atol=1e-280)


def test_keys_are_split_by_the_sequence_alone() -> None:
    def splits(Hkv: int, rows: int, kv_length: int) -> int:
        keys = split_keys(Hkv, rows, kv_length, 24, 96, 2048)
        assert keys % 96 == 0
        return splits_of(kv_length, keys)

    assert splits(8, 2048, 1 << 20) == splits(1, 16, 4095) == splits(1, 16, 0) == 1
    assert splits(1, 16, 4096) == 2
    assert splits(1, 16, 1 << 33) <= 64
    assert splits(8, 48, 1 << 20) == 4


@pytest.mark.parametrize(("Hq", "Hkv", "Lq"), [(1, 1, 9), (6, 2, 50), (7, 1, 100)])
def test_split_keys_change_no_bit(Hq: int, Hkv: int, Lq: int, two_threads: Any) -> None:
    """Of any number of threads, alone or among many in a batch, and whatever is in what is masked."""
    rng, lengths = np.random.default_rng(0), np.array([9000, 4096, 300, *[5000] * 14])
    query, key, value = (
        rng.standard_normal((len(lengths), H, L, 16), dtype=np.float32) for H, L in ((Hq, Lq), (Hkv, 9000), (Hkv, 9000))
    )
    allowed = np.arange(9000) % 5 != 3
    given: dict[str, Any] = {"enable_gqa": True, "return_aux": ("lse", "entropy"), "sinks": np.linspace(-1, 1, Hq)}
    for mask in (None, allowed):
        results = []
        for n in (1, 2):
            two_threads(n)
            results.append(scaled_dot_product_attention(query, key, value, mask, kv_lengths=lengths, **given))
        (out, aux), (again, _) = results
        assert np.array_equal(out, again)
        exact, aux_exact = scaled_dot_product_attention(
            query, key, value, mask, kv_lengths=lengths, backend="reference", **given
        )
        np.testing.assert_allclose(out, exact, atol=2e-6)
        np.testing.assert_allclose(aux.lse, aux_exact.lse, atol=2e-5)
        np.testing.assert_allclose(aux.entropy, aux_exact.entropy, atol=2e-5)
        for b, n in enumerate(lengths[:4]):
            own = None if mask is None else mask[:n]
            alone, _ = scaled_dot_product_attention(query[b], key[b, :, :n], value[b, :, :n], own, **given)
            assert np.array_equal(alone, out[b])
        poisoned, poison = (x.copy() for x in (key, value)), [np.nan, np.inf]
        key_2, value_2 = poisoned
        for x, bad in zip((key_2, value_2), poison, strict=True):
            for b, n in enumerate(lengths):
                x[b, :, n:] = bad
            if mask is not None:
                x[:, :, ~mask] = bad
        found, _ = scaled_dot_product_attention(query, key_2, value_2, mask, kv_lengths=lengths, **given)
        assert np.array_equal(found, out)


@pytest.mark.parametrize("Lq", [3, 8, 9, 12, 25])
@pytest.mark.parametrize("group", [2, 3, 7])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_rows_of_heads_that_share_keys(dtype: str, group: int, Lq: int) -> None:
    """They may be in one row block; and where they are many, have the bits that they have with keys of their own."""
    rng, Hq, Lk = np.random.default_rng(0), 2 * group, 300
    shapes = (2, Lq, Hq, 24), (2, Lk, 2, 24), (2, Lk, 2, 17)
    query, key, value = (rng.standard_normal(shape).astype(dtype_of(dtype)) for shape in shapes)
    own_key, own_value = (np.repeat(x, group, axis=2) for x in (key, value))
    mask = rng.random((2, 1, Lq, Lk)) < 0.5
    mask[:, :, 1, :] = False
    wanted: dict[str, Any] = {"layout": "BLHD", "return_aux": ("lse", "max_score", "entropy", "key_weight")}
    for options in (
        {},
        {"is_causal": True, "query_offset": "bottom_right", "softcap": 20.0},
        {"attn_mask": mask, "window": (200, None), "query_offset": 250},
        {
            "attn_mask": mask.astype(np.float32),
            "query_lengths": np.array([Lq, Lq - 2]),
            "kv_lengths": np.array([9, Lk]),
        },
        {"alibi_slopes": rng.random(Hq), "sinks": rng.standard_normal(Hq)},
        {"attn_mask": rng.random((2, Hq, Lq, Lk)) < 0.5},
    ):
        out, aux = scaled_dot_product_attention(query, key, value, enable_gqa=True, **wanted, **options)
        apart, aux_apart = scaled_dot_product_attention(query, own_key, own_value, **wanted, **options)
        exact, aux_exact = scaled_dot_product_attention(
            query, own_key, own_value, backend="reference", **wanted, **options
        )
        tolerance = {"float32": 1e-5, "float64": 1e-12, "bfloat16": 2e-2}[dtype]
        np.testing.assert_allclose(out.astype(np.float64), exact.astype(np.float64), atol=tolerance, rtol=tolerance)
        for name in wanted["return_aux"]:
            np.testing.assert_allclose(getattr(aux, name), getattr(aux_exact, name), atol=10 * tolerance)
        if Lq - 2 > decode.MOST_ROWS:  # rows of every sequence
            assert out.tobytes() == apart.tobytes()
            assert all(np.array_equal(getattr(aux, name), getattr(aux_apart, name)) for name in wanted["return_aux"])


@pytest.mark.parametrize("Lq", [1, 2, 3, 8, 12])
@pytest.mark.parametrize("kind", ["bool", "additive", "transposed", "of all rows"])
def test_few_rows_and_a_mask_that_heads_share(kind: str, Lq: int) -> None:
    """Query heads that share keys are done together, as without a mask; also with a mask for each."""
    rng = np.random.default_rng(0)
    query, key, value = (
        rng.standard_normal((2, H, L, 40)).astype(np.float32) for H, L in ((6, Lq), (2, 700), (2, 700))
    )
    mask = rng.random((2, 1, Lq, 700)) < 0.6
    mask[..., -Lq:] = np.tril(np.ones((Lq, Lq), bool))
    if kind == "additive":
        mask = np.where(mask, rng.standard_normal(mask.shape), -np.inf).astype(np.float32)
    elif kind == "transposed":
        mask = np.asfortranarray(mask)
    elif kind == "of all rows":
        mask = mask[:, :, :1]
    shared = scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    exact = scaled_dot_product_attention(query, key, value, mask, enable_gqa=True, backend="reference")
    np.testing.assert_allclose(shared, exact, atol=2e-6)
    for_each = np.broadcast_to(mask, (2, 6, *mask.shape[2:])).copy()
    apart = scaled_dot_product_attention(query, key, value, for_each, enable_gqa=True)
    np.testing.assert_array_equal(shared, apart)


@pytest.mark.parametrize("Lq", [1, 2, 3, 8, 12, 20])
@pytest.mark.parametrize("kind", ["bool", "additive", "transposed", "of all rows", "empty", "slopes", "sinks"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_few_rows_of_heads_that_differ(dtype: str, kind: str, Lq: int) -> None:
    """In masks, slopes or sinks, each of which is that of the lanes of its head."""
    rng, Lk = np.random.default_rng(0), 700
    query, key, value = (
        rng.standard_normal((2, H, L, 40)).astype(dtype_of(dtype)) for H, L in ((8, Lq), (2, Lk), (2, Lk))
    )
    options: dict[str, Any] = {"is_causal": True, "query_offset": "bottom_right", "enable_gqa": True}
    mask = rng.random((2, 8, Lq, Lk)) < 0.6
    # Some have nothing but their last keys, the first ones, or none.
    for b, (low, high) in enumerate([(600, Lk), (0, 90)]):
        mask[b, 1, :, :low] = mask[b, 1, :, high:] = False
    mask[1, 5] = False
    if kind == "slopes":
        options["alibi_slopes"] = np.array([0, 0.001, 3, -0.002, 0.01, 0, 0.3, 0.02]) * [[1], [-0.01]]
    elif kind == "sinks":
        options["sinks"] = np.array([0.0, 3, -30, -200, 60, 1, 2, -1])
    elif kind == "empty":
        mask[:, ::2] = False
        options["attn_mask"] = mask
    elif kind == "additive":
        options["attn_mask"] = np.where(mask, rng.standard_normal(mask.shape), -np.inf).astype(np.float32)
    elif kind == "transposed":
        options["attn_mask"] = np.asfortranarray(mask)
    else:
        options["attn_mask"] = mask[:, :, :1] if kind == "of all rows" else mask
    tolerance = {"float32": 5e-6, "float64": 1e-13, "bfloat16": 2e-2}[dtype]
    for more in ({}, {"softcap": 5.0}, {"return_aux": ("lse", "entropy", "key_weight")}):
        found, exact = (
            scaled_dot_product_attention(query, key, value, **options, **more, backend=backend)
            for backend in ("cpu", "reference")
        )
        if more.get("return_aux"):
            (found, aux), (exact, aux_exact) = found, exact
            for name in more["return_aux"]:
                np.testing.assert_allclose(getattr(aux, name), getattr(aux_exact, name), 10 * tolerance, 10 * tolerance)
        np.testing.assert_allclose(found.astype(np.float64), exact.astype(np.float64), tolerance, tolerance)


@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_mask_that_heads_share(dtype: type[np.floating], additive: bool) -> None:
    """What it leaves of tiles is looked for once, and gives the same bits as a mask for each head.

    Of each sequence, one call after the other: what is noted of one is not taken for that of the next.
    """
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((2, 3, L, 16)).astype(dtype) for L in (150, 400, 400))
    i, j = np.arange(150)[:, None], np.arange(400)
    squares = (i // 50 + j // 100) % 2 == 0
    for first, second in (
        (squares, ~squares),
        (j <= i, j > i + 20),
        (j < 130, j >= 0),
        (i >= j, rng.random(j.size) < 0.5),
    ):
        mask = np.stack([np.broadcast_to(one, (150, 400)) for one in (first, second)])[:, None]
        if additive:
            mask = np.where(mask, np.float32(0), np.float32(-np.inf))
        for_each = np.ascontiguousarray(np.broadcast_to(mask, (2, 3, 150, 400)))
        shared = scaled_dot_product_attention(query, key, value, mask)
        np.testing.assert_array_equal(shared, scaled_dot_product_attention(query, key, value, for_each))


def test_masks_are_noted_where_heads_share_them() -> None:
    def columns(mask_heads: int, Hq: int = 2, L: int = 1000, tile_rows: int = 0) -> int:
        mask = np.broadcast_to(np.uint8(1), (mask_heads, L, L))
        settings = score.Settings(*[0] * 17)._replace(Lq=L, Lk=L, tile_rows=tile_rows)
        return forward.columns_noted(mask, Hq, settings, plan(Hq, L, L, 64, 64, 4, 2))

    keys = plan(2, 1000, 1000, 64, 64, 4, 2).keys
    assert columns(1) == -(-1000 // keys)
    assert columns(0) == columns(2) == columns(1, Hq=1) == columns(1, tile_rows=128) == columns(1, L=1 << 20) == 0


def test_memory_does_not_grow_with_the_lengths() -> None:
    first, *longer = (forward.memory_size(plan(8, L, L, 64, 64, 4, 2), 64, 64, 16) * 4 for L in (4096, 16384, 1 << 20))
    assert max(longer) <= first < 1 << 20


def test_a_task_is_short_enough_to_be_interrupted_after_it() -> None:
    for L in (1 << 17, 1 << 20, 1 << 33):
        cut = plan(8, L, L, 128, 128, 4, 2)
        assert cut.blocks == 1 or cut.blocks * cut.block * L * 256 <= 10**10
        keys = key_weight.cut_keys(8, L, L, 128, cut, 2, 4)
        assert keys.task_keys == cut.keys or keys.task_keys * L * 128 <= 10**10


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1e3, 1e5, 1e9, 1e15])
def test_scores_so_large_that_rounding_exceeds_the_headroom(dtype: type[np.floating], size: float) -> None:
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((2, 300, 24)).astype(dtype) for _ in range(3))
    for options in ({}, {"is_causal": True}, {"softcap": 1e30}, {"return_aux": ("entropy", "key_weight")}):
        result = scaled_dot_product_attention(dtype(size) * query, dtype(size) * key, value, **options)
        out, aux = result if isinstance(result, tuple) else (result, None)
        assert np.isfinite(out).all()
        assert np.abs(out).max() <= np.abs(value).max() * 1.001, "an average of values"
        assert (np.abs(out).max(axis=-1) > 0).all(), "of one at least"
        if aux is not None:
            assert (aux.key_weight >= 0).all()
            np.testing.assert_allclose(aux.key_weight.sum(axis=-1), 300, rtol=1e-5)


@pytest.mark.parametrize("rows", [3, 40])
def test_a_function_meets_no_score_that_is_masked(python: Callable[..., str], rows: int) -> None:
    """One with a loop may not end for an infinite one, as those of keys beyond a window or a length might be."""
    script = f"""
import numpy as np, numba_attn
query, key = np.ones((1, {rows}, 8), np.float32), np.ones((1, 60, 8), np.float32)
def wrapped(score, b, h, i, j):
    while score < -3.0: score += 6.0
    while score > 3.0: score -= 6.0
    return score
padded = key.copy()
padded[:, 50:] = np.inf
for mask in (None, np.ones(60, np.float32)):
    for options in (dict(window=(3, 3)), dict(is_causal=True), dict(mask_mod=lambda b, h, i, j: j < 45)):
        out, expected = (
            numba_attn.scaled_dot_product_attention(query, k, query[:, :1] + key, mask, score_mod=wrapped, **options)
            for k in (padded, key)
        )
        np.testing.assert_array_equal(out, expected)
"""
    python(script, timeout=120)


def test_the_largest_score_where_one_is_infinite() -> None:
    x = np.ones((1, 30, 8))
    options: dict[str, Any] = {"score_mod": lambda score, b, h, i, j: np.inf if i == 3 and j == 7 else score}
    for backend in ("cpu", "reference"):
        _, aux = scaled_dot_product_attention(x, x, x, return_aux=("max_score",), backend=backend, **options)
        assert np.isnan(aux.max_score[0, 3]) and np.isfinite(np.delete(aux.max_score, 3)).all()


@pytest.mark.parametrize("Lq", [1, 5, 20])
def test_how_a_mask_lies_changes_no_bit(Lq: int) -> None:
    """Of keys that are masked at either end, as of padding on the left."""
    rng = np.random.default_rng(4)
    query, key, value = (rng.standard_normal((1, 2, L, 64), dtype=np.float32) for L in (Lq, 511, 511))
    for low, high in ((17, 511), (40, 300), (255, 256), (333, 500)):
        mask = (np.arange(511) >= low) & (np.arange(511) < high) & (rng.random((Lq, 511)) < 0.9)
        apart, backwards = np.zeros((Lq, 1022), bool)[:, ::2], np.zeros((Lq, 511), bool)[:, ::-1]
        apart[...] = backwards[...] = mask
        expected, vjp = scaled_dot_product_attention_vjp(query, key, value, mask)
        gradients = vjp(query)
        for other in (apart, backwards, np.asfortranarray(mask)):
            out, vjp = scaled_dot_product_attention_vjp(query, key, value, other)
            assert np.array_equal(out, expected)
            assert all(np.array_equal(x, y) for x, y in zip(vjp(query)[:3], gradients[:3], strict=True))


@pytest.mark.skipif(target.BFLOAT16 == "amx", reason="tile registers do not sum up what they multiply")
@pytest.mark.parametrize("Lq", [9, 40, 90])
@pytest.mark.parametrize("options", ["plain", "sinks", "causal", "mask", "padding that is not finite"])
def test_a_key_with_all_the_weight_is_not_rounded_twice(Lq: int, options: str) -> None:
    """Outputs of bfloat16 are as near as such numbers are, though its probability is rounded for the product."""
    rng, Lk = np.random.default_rng(Lq), 100
    key, value = (rng.standard_normal((1, 3, Lk, 64)).astype(dtype_of("bfloat16")) for _ in range(2))
    query = (1.25 * key[:, :, rng.integers(0, Lq, Lq)].astype(np.float32)).astype(key.dtype)
    given: dict[str, Any] = {
        "plain": {},
        "sinks": {"sinks": np.full(3, 3.0)},
        "causal": {"is_causal": True, "query_offset": Lk - Lq},
        "mask": {"attn_mask": rng.random((Lq, Lk)) < 0.9},
        "padding that is not finite": {"kv_lengths": [95]},
    }[options]
    expected = scaled_dot_product_attention(
        *(x.astype(np.float64) for x in (query, key, value)), **given, backend="reference"
    )
    if "kv_lengths" in given:
        value[:, :, 95:] = np.nan
    out, aux = scaled_dot_product_attention(query, key, value, **given, return_aux=("lse", "max_score"))
    heavy = aux.max_score > aux.lse - 0.03
    assert heavy.mean() > 0.2
    error = np.abs(out.astype(np.float64) - expected)[heavy]
    assert (error <= np.abs(expected)[heavy] * 2.0**-8 + 5e-4).all()
