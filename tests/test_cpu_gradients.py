"""The contract of gradients on the CPU kernels, with the tiles of the plan and with small ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gradient_contract import GradientContract, assert_accurate_gradients
from hypothesis import given
from hypothesis import strategies as st
from tolerances import same_bits

import numba_attn
from numba_attn.cpu import backward, gradient_tasks, gradients, launch

CUTS = [
    "planned",
    "7 keys, 1 block, parts of 1 row",
    pytest.param("16 keys, 2 blocks, parts of 30 rows", marks=pytest.mark.slow),
]


@pytest.fixture(params=CUTS, scope="class")
def tiles(request: pytest.FixtureRequest) -> object:
    """Cut every problem of a test class one way."""
    if request.param == "planned":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, *((7, 1, 1) if request.param.startswith("7") else (16, 2, 30)))
        yield


def cut(patch: pytest.MonkeyPatch, keys: int, blocks: int, rows: int) -> None:
    """Make tiles of so many keys, groups of so many row blocks and parts of so many rows."""
    cut_of = gradient_tasks.cut_of
    patch.setattr(gradients, "cut_of", lambda *sizes: cut_of(*sizes)._replace(keys=keys, blocks=blocks))
    patch.setattr(gradient_tasks, "PART_ROWS", rows)
    patch.setattr(gradient_tasks, "CHAIN_ROWS", rows)


@pytest.mark.usefixtures("tiles")
class TestCpu(GradientContract):
    backend = "cpu"


@pytest.mark.parametrize(
    "shape", ["bhij", "1hij", "b1ij", "11ij", "bh1j", "1h1j", "b11j", "111j", "bhi1", "11i1", "1111"]
)
@pytest.mark.parametrize("small", [False, True], ids=["planned", "small"])
def test_masks_of_any_sharing(shape: str, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of different lengths and grouped heads share a mask, whose gradient each of their tasks adds to."""
    if small:
        cut(monkeypatch, 32, 1, 10)
    B, Hq, Hkv, Lq, Lk, D = 3, 4, 2, 70, 90, 8
    rng, sizes = np.random.default_rng(8), {"b": B, "h": Hq, "i": Lq, "j": Lk, "1": 1}
    query, key, value, grad_out = (
        rng.standard_normal((B, H, L, D), dtype=np.float32) for H, L in ((Hq, Lq), (Hkv, Lk), (Hkv, Lk), (Hq, Lq))
    )
    mask = rng.standard_normal([sizes[axis] for axis in shape], dtype=np.float32)
    options = {
        "attn_mask": mask, "enable_gqa": True, "softcap": 3.0, "alibi_slopes": rng.random(Hq),
        "query_lengths": [70, 33, 52], "kv_lengths": [61, 90, 4], "window": (20, 9),
    }  # fmt: skip
    _, vjp = numba_attn.scaled_dot_product_attention_vjp(query, key, value, **options)
    got, above = vjp(grad_out), (grad_out, None)
    assert_accurate_gradients(got, (query, key, value), above, options)
    with numba_attn.threads.limit(1):
        assert same_bits(vjp(grad_out), got)
    assert same_bits(vjp(grad_out, wanted=("query",)).key, got.key)


@pytest.mark.parametrize("constant", [-1e9, "lowest"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rows", [3, 60])
def test_a_constant_added_to_rows_changes_no_probability(rows: int, dtype: type, constant: float | str) -> None:
    """As masks of padding add it: where a row's lse is so large that the logarithm of its sum is lost in it."""
    rng, weights = np.random.default_rng(3), numba_attn.attention_weights
    query, grad_out = rng.standard_normal((2, 2, rows, 16)).astype(dtype)
    key, value = rng.standard_normal((2, 2, 70, 16)).astype(dtype)
    added = np.finfo(dtype).min if constant == "lowest" else constant
    mask = np.where(np.arange(rows) % 3 == 1, added, 0).astype(dtype)[:, None] + np.zeros((rows, 70), dtype)
    calls = [numba_attn.scaled_dot_product_attention_vjp(query, key, value, m) for m in (mask, 0 * mask)]
    pairs = [*zip(*(vjp(grad_out)[:4] for _, vjp in calls), strict=True)]
    pairs += [[weights(query, key, m, query_rows=r) for m in (mask, 0 * mask)] for r in (None, [1])]
    of_keys = [
        numba_attn.scaled_dot_product_attention(query, key, value, m, return_aux=("key_weight",))
        for m in (mask, 0 * mask)
    ]
    pairs.append([aux.key_weight for _, aux in of_keys])
    for got, expected in pairs:
        np.testing.assert_allclose(
            got, expected, rtol=0, atol=30 * np.finfo(dtype).eps * max(1, np.abs(expected).max())
        )


def test_norms_of_few_rows_are_those_of_their_own_sequence() -> None:
    """Whether scores are large, and products to be made again, is found for each sequence by itself."""
    rng, lengths = np.random.default_rng(5), [5, 40, 3, 8]
    query, key, value, grad_out = rng.standard_normal((4, 4, 2, 40, 16), dtype=np.float32)
    query[2] *= 300
    options = {"query_lengths": lengths, "kv_lengths": lengths}
    together = numba_attn.scaled_dot_product_attention_vjp(query, key, value, **options)[1](grad_out)
    for b, n in enumerate(lengths):
        arrays = (x[b, :, :n] for x in (query, key, value))
        _, vjp = numba_attn.scaled_dot_product_attention_vjp(*arrays)
        for name, x in zip(("query", "key", "value"), vjp(grad_out[b, :, :n]), strict=False):
            assert same_bits(getattr(together, name)[b, :, :n], x), (b, name)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"softcap": 1e30}, {"attn_mask": True}], ids=str)
@pytest.mark.parametrize("size", [1e2, 3e4, 1e9])
@pytest.mark.parametrize("rows", [3, 90])
def test_probabilities_of_large_scores_sum_to_one(rows: int, size: float, options: dict[str, Any]) -> None:
    """What is made again of scores, by products in the same order, belongs to the sums of the first time."""
    rng = np.random.default_rng(4)
    key, value = rng.standard_normal((2, 2, 90, 64), dtype=np.float32)
    key = np.float32(size) * key
    query, options = key[:, -rows:], {**options, "query_offset": 90 - rows}
    if "attn_mask" in options:
        options["attn_mask"] = np.float32(size) * rng.standard_normal((rows, 90), dtype=np.float32)
    np.testing.assert_allclose(numba_attn.attention_weights(query, key, **options).sum(axis=-1), 1, rtol=1e-6)
    out, vjp = numba_attn.scaled_dot_product_attention_vjp(query, key, value, **options)
    np.testing.assert_allclose(vjp(np.ones_like(out)).value.sum(axis=1), rows, rtol=1e-5)
    # Each row is that of the key that its score is largest with.
    exact = numba_attn.scaled_dot_product_attention(query, key, value, backend="reference", **options)
    np.testing.assert_allclose(out, exact, rtol=1e-5, atol=1e-6)


@given(
    lengths=st.lists(st.integers(0, 3000), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (8, 8)]),
    by_heads=st.booleans(),
    by_places=st.booleans(),
)
def test_chains_own_what_they_add_to(
    lengths: list[int], heads: tuple[int, int], by_heads: bool, by_places: bool
) -> None:
    """Tasks that add to the same row of a mask, or of a copy, are in one chain, by sequences; all rows are in one."""
    (Hq, Hkv), B, Lq = heads, len(lengths), max(lengths)
    places = np.arange(B) if by_places else np.zeros(B, np.int64)
    shape = int(places[-1]) + 1, Hq if by_heads else 1, Lq, 5
    call = SimpleNamespace(
        arrays=SimpleNamespace(q=np.empty((Hq, Lq, 4)), k=np.empty((Hkv, 5, 4))),
        sequences=SimpleNamespace(intervals=np.array([[0, n, 5] for n in lengths])),
        settings=SimpleNamespace(Lq=Lq, left=Lq, right=5),
    )
    added = gradient_tasks.added_of(shape, places, Hkv, 4)
    assert (added.places // added.copies == places[:, None]).all()
    assert added.copies == 1 or added.copies * 4 * np.prod(shape) <= gradient_tasks.COPIED_BYTES
    tables = gradient_tasks.tables_of(call, gradient_tasks.cut_of(64, 64, 4), added, in_chains=True)
    order = tables.order[:, 0].tolist()
    assert sorted(order) == list(range(len(tables.tasks)))
    assert np.array_equal(np.concatenate([np.arange(*chain) for chain in tables.chains] or [[]]), np.arange(len(order)))
    owner = np.full((shape[0] * added.copies, shape[1], Lq), -1)
    used = np.zeros((B, Hkv, Lq), int)
    for number, (first, end) in enumerate(tables.chains):
        chain = order[first:end]
        assert chain == sorted(chain)
        for b, shared, _, _, _, _, _, _, low, high in tables.tasks[chain]:
            of_mask = owner[added.places[b, shared], shared * (Hq // Hkv) if by_heads else 0, low:high]
            assert np.isin(of_mask, [-1, number]).all()
            of_mask[:] = number
            used[b, shared, low:high] += 1
    assert (used == (np.arange(Lq) < np.array(lengths)[:, None])[:, None]).all()


def test_sums_and_the_memory_of_a_worker_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one has as many elements as the other."""
    rng = np.random.default_rng(9)
    query, above = rng.standard_normal((2, 1, 1, 30, 16), dtype=np.float32)
    key, value = rng.standard_normal((2, 1, 1, 6000, 16), dtype=np.float32)
    _, vjp = numba_attn.scaled_dot_product_attention_vjp(query, key, value)
    expected, asked = vjp(above), []
    working_memory = launch.working_memory

    def watched(*kind: Any) -> Any:
        asked.append(kind)
        return working_memory(*kind)

    monkeypatch.setattr(launch, "working_memory", watched)
    monkeypatch.setattr(backward, "memory_size", lambda *_: 6000 * 32)
    got = vjp(above)
    assert len(asked) == 2 and asked[0] == asked[1]
    assert all(same_bits(x, y) for x, y in zip(got[:3], expected[:3], strict=True))


@pytest.mark.parametrize("most", [1, 2])
def test_a_call_between_slices_of_another(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a signal handler, in the same thread, and of the same shape."""
    rng = np.random.default_rng(10)
    arrays = rng.standard_normal((2, 3, 1, 2, 2500, 8), dtype=np.float32)  # a head is several tasks
    above = rng.standard_normal(arrays.shape[2:], dtype=np.float32)
    (_, vjp), (_, other) = (numba_attn.scaled_dot_product_attention_vjp(*x) for x in arrays)
    expected, slices, calls = vjp(above), launch.slices, []

    def interrupted(*rest: Any) -> Any:
        for counters in slices(*rest):
            yield counters
            if not calls:
                calls.append(1)
                other(above)

    monkeypatch.setattr(launch, "FIRST_SLICE", 1.0)
    monkeypatch.setattr(launch, "SLICE_SECONDS", 0.0)
    monkeypatch.setattr(launch, "slices", interrupted)
    with numba_attn.threads.limit(most):
        got = vjp(above)
    assert calls and all(same_bits(x, y) for x, y in zip(got[:3], expected[:3], strict=True))
