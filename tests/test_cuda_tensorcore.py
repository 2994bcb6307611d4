"""The tensor-core kernels in the emulator: what the contract says of 16-bit arrays, on any machine."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cases import SIXTEEN_BITS, SMALL, Case, dtype_of
from contract import STORAGE, attended
from cuda_emulator import Machine, Memory
from tolerances import DEFAULTS, assert_accurate, exact, same_bits

from numba_attn.cuda import tensorcore
from numba_attn.cuda.combine import make_combine
from numba_attn.cuda.flash import Configuration, make_flash
from numba_attn.cuda.sequences import PARAMETERS
from numba_attn.cuda.tensorcore import FEW, SOME, Tiling, Where, choose, shared_limit
from numba_attn.problem import Problem
from numba_attn.storage import Storage

STATISTICS = "lse", "max_score", "entropy"
A100, H100, L40 = (8, 0), (9, 0), (8, 9)


def _small(few: Tiling, some: Tiling, many: Tiling) -> Callable[[int], Tiling]:
    return lambda rows: few if rows <= tensorcore.FEW else some if rows <= tensorcore.SOME else many


# How problems are cut: as planned for a device, or so small that every edge is met.
TILINGS: dict[str, Callable[[int], Tiling] | None] = {
    "planned": None,
    "16 x 16": _small(Tiling(1, 1, 1, 16, 2), Tiling(1, 4, 1, 16, 2), Tiling(1, 1, 1, 16, 2)),
    "32 x 32": _small(Tiling(1, 1, 2, 32, 1), Tiling(2, 2, 2, 32, 1), Tiling(2, 1, 1, 32, 1)),
}


def emulate(
    problem: Problem,
    cc: tuple[int, int] = H100,
    tiling: Callable[[int], Tiling] | None = None,
    counted: bool = False,
) -> Counter[str] | None:
    """Compute a problem in the emulator; returns what it has counted."""
    memory = Memory()
    machine = Machine(memory, counted)

    def where(name: str) -> Where:
        x = getattr(problem, name)
        return Where(memory.address(x), x.strides)

    reason = tensorcore.supports(problem, cc, where)
    assert reason is None, reason
    for launch in tensorcore.launches(problem, cc, where, memory.address, memory.scratch, tiling):
        machine.run(launch)
    for x in (problem.out, problem.lse, problem.max_score, problem.entropy):
        if x is not None:
            memory.copy_back(x)
    return machine.counts


def aligned(x: np.ndarray) -> np.ndarray:
    """The same numbers in rows that begin at multiples of 16 bytes, with NaN between them."""
    wide = np.full((*x.shape[:-1], -(-x.shape[-1] // 8) * 8), np.nan, x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def run(*arrays: np.ndarray, tiling: str = "planned", cc: tuple[int, int] = H100, **options: Any) -> Any:
    problem = Problem.from_call(*map(aligned, arrays), **{**DEFAULTS, "return_aux": (), **options})
    with pytest.MonkeyPatch.context() as patch:
        if tiling != "planned":
            patch.setattr(tensorcore, "CHUNK", 32)
        emulate(problem, cc, TILINGS[tiling])
    return problem.result if problem.aux is None else (problem.result, problem.aux)


def _computed(case: Case) -> bool:
    named = {"score_mod", "mask_mod", "block_mask", "precision"} & set(case.options)
    return case.dtype != "float64" and case.D > 0 and not named


CASES = [case for case in SMALL if _computed(case)]
# Every third one, of which each of the longer tests has others: the emulator takes a second for each.
THIRDS = [pytest.mark.parametrize("case", CASES[n::3], ids=lambda c: c.name) for n in range(3)]
_MOST = [
    *("plain", "odd sizes", "one query", "groups of 4", "causal, offsets", "window, causal, offset", "lengths"),
    *("mask bool", "mask bool reversed", "additive -inf, groups", "alibi per batch, offsets", "sinks and lengths"),
    *("softcap, causal, additive", "dropout, causal, groups"),
]
MOST = pytest.mark.parametrize("case", [c for c in CASES if c.name in _MOST], ids=lambda c: c.name)
_A_FEW = "one query", "lengths", "mask bool", "softcap, causal, additive", "dropout, causal, groups"
A_FEW = pytest.mark.parametrize("case", [c for c in CASES if c.name in _A_FEW], ids=lambda c: c.name)


# NumPy does not know the least number of bfloat16.
UNKNOWN = {"mask additive lowest", "mask additive lowest, left padding"}


def of_type(case: Case, dtype: str) -> Case:
    if dtype != "float16" and case.name in UNKNOWN:
        pytest.skip("the mask is made of NumPy's numbers")
    return dataclasses.replace(case, dtype=dtype)


def check(case: Case, tiling: str, cc: tuple[int, int] = H100) -> None:
    arrays, options = case.arrays(), case.keywords()
    out, aux = run(*arrays, tiling=tiling, cc=cc, return_aux=STATISTICS, **options)
    assert_accurate(out, aux, *arrays, rounded_weights=True, **options)
    empty = ~attended(case).any(axis=-1)
    assert (out[empty] == 0).all() and (aux.max_score[empty] == -np.inf).all() and (aux.entropy[empty] == 0).all()


# Results --------------------------------------------------------------------------------------------------------------


@MOST
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_agrees_with_float64(case: Case, dtype: str) -> None:
    check(of_type(case, dtype), "16 x 16" if dtype == "float16" else "32 x 32")


@pytest.mark.slow
@THIRDS[0]
@pytest.mark.parametrize(("tiling", "dtype"), list(zip(TILINGS, itertools.cycle(SIXTEEN_BITS), strict=False)))
def test_every_option_agrees_with_float64(case: Case, dtype: str, tiling: str) -> None:
    check(of_type(case, dtype), tiling, L40 if case.Lq % 2 else A100)


PLANNED = [
    *(Case(f"D {D}", 1, 140, 130, D, options={"is_causal": True}) for D in (16, 64, 80, 128, 256)),
    Case("a few rows", 4, 1, 600, 128, Hkv=1),
    Case("some rows", 4, 12, 600, 64, Hkv=2, Dv=96, options={"is_causal": True, "query_offset": 500}),
    Case("many rows of groups", 4, 40, 150, 32, Hkv=2, options={"window": (30, 9)}),
]


@pytest.mark.parametrize("cc", [H100, L40])
@pytest.mark.parametrize("case", PLANNED, ids=lambda c: c.name)
def test_planned_tiles(case: Case, cc: tuple[int, int]) -> None:
    """As a device gets them; no access to shared memory in the loop takes a second turn."""
    if cc == L40 and case.D < 128:
        pytest.skip("the same tiles")
    case = of_type(case, SIXTEEN_BITS[-1])
    arrays = case.arrays()
    problem = Problem.from_call(*arrays, **{**DEFAULTS, "return_aux": (), **case.keywords()})
    counts = emulate(problem, cc, counted=True)
    assert_accurate(problem.result, None, *arrays, rounded_weights=True, **case.keywords())
    assert counts is not None and counts["ldmatrix"] and counts["ldmatrix conflicts"] == 0
    if case.Lq > 16 and case.D != 80:
        assert all(n == 0 for name, n in counts.items() if "conflicts" in name), counts


@A_FEW
def test_statistics_change_no_bit(case: Case) -> None:
    case = of_type(case, "float16")
    arrays, options = case.arrays(), case.keywords()
    out, aux = run(*arrays, tiling="32 x 32", return_aux=STATISTICS, **options)
    for names in ((), ("entropy",), ("lse", "max_score")):
        if not names:
            assert same_bits(run(*arrays, tiling="32 x 32", **options), out)
            continue
        result, some = run(*arrays, tiling="32 x 32", return_aux=names, **options)
        assert same_bits(result, out)
        assert all(same_bits(getattr(some, name), getattr(aux, name)) for name in names)


def check_what_is_masked(case: Case, poison: float) -> None:
    (query, key, value), options = case.arrays(), case.keywords()
    expected = run(query, key, value, tiling="32 x 32", return_aux=STATISTICS, **options)
    allowed = attended(case)
    group = case.Hq // key.shape[1]
    unused = ~allowed.reshape(case.B, -1, group, case.Lq, case.Lk).any(axis=(2, 3))
    if not unused.any() and allowed.any(axis=-1).all():
        return
    key[unused] = value[unused] = poison
    query[~allowed.any(axis=-1)] = poison
    assert same_bits(run(query, key, value, tiling="32 x 32", return_aux=STATISTICS, **options), expected)


@A_FEW
def test_what_is_masked_changes_no_bit(case: Case) -> None:
    check_what_is_masked(of_type(case, SIXTEEN_BITS[-1]), np.nan)


@pytest.mark.slow
@THIRDS[1]
def test_what_any_mask_hides_changes_no_bit(case: Case) -> None:
    check_what_is_masked(of_type(case, SIXTEEN_BITS[0]), -np.inf if case.Lk % 2 else np.nan)


def check_nan(case: Case) -> None:
    query, key, value = case.arrays()
    j, options = case.Lk // 2, {**case.keywords(), "tiling": "32 x 32", "return_aux": STATISTICS}
    expected, clean = run(query, key, value, **options)
    touched = attended(case)[..., j]
    for spoilt in (key, value):
        kept = spoilt[:, :, j].copy()
        spoilt[:, :, j] = np.nan
        out, aux = run(query, key, value, **options)
        spoilt[:, :, j] = kept
        assert np.isnan(out[touched]).all()
        assert same_bits(out[~touched], expected[~touched])
        if spoilt is value:
            assert same_bits(aux, clean), "statistics depend on the values"
            continue
        for name in STATISTICS:
            assert np.isnan(getattr(aux, name)[touched]).all(), name
            assert same_bits(getattr(aux, name)[~touched], getattr(clean, name)[~touched]), name


@A_FEW
def test_nan_reaches_exactly_the_rows_that_attend_to_it(case: Case) -> None:
    check_nan(of_type(case, "float16" if case.Lq % 2 else SIXTEEN_BITS[-1]))


@pytest.mark.slow
@THIRDS[2]
def test_nan_reaches_the_rows_that_any_mask_leaves(case: Case) -> None:
    check_nan(of_type(case, SIXTEEN_BITS[0 if case.Lq % 2 else -1]))


def test_infinite_values_reach_the_rows_that_attend_to_them() -> None:
    query, key, value = Case("infinite", 1, 40, 40, 16, dtype="float16").arrays()
    value[0, 0, 7, 3], value[0, 0, 20, 3], value[0, 0, 11, 4] = np.inf, -np.inf, -np.inf
    out = run(query, key, value, tiling="32 x 32", is_causal=True)[0, 0]
    rows = np.arange(40)
    np.testing.assert_array_equal(out[:, 3][rows >= 7], np.where(rows >= 20, np.nan, np.inf)[rows >= 7])
    np.testing.assert_array_equal(out[:, 4][rows >= 11], -np.inf)
    assert np.isfinite(out[:7]).all() and np.isfinite(out[:, 5:]).all()


@pytest.mark.parametrize("rows", [3, 20, 70])  # in parts by several warps, in parts, whole
@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
def test_scores_of_any_size(dtype: str, rows: int) -> None:
    """Where they are so large that any two that differ are far apart, the largest of a row share it."""
    rng = np.random.default_rng(rows)
    query, key = np.zeros((1, rows, 16)), np.zeros((1, 90, 16))
    value = rng.standard_normal((1, 90, 16)).astype(dtype_of(dtype))
    # Products are exact, so that those that are equal stay so; rows have them of either sign.
    query[..., 0], key[..., 0] = rng.choice([-1.5, -1, 1, 1.25], rows), rng.choice([0.5, 1, 1.25, 1.5], 90)
    for exponent in (*range(12, 30), *((32, 60, 90, 120) if dtype == "bfloat16" else ())):
        lower, upper, scale = exponent // 2, exponent - exponent // 2, 4.0 if exponent % 2 else 0.25
        arrays = *(x.astype(value.dtype) for x in (query * 2.0**lower, key * 2.0**upper)), value
        with np.errstate(all="ignore"):
            expected = exact(*arrays, scale=scale)
        out, aux = run(*arrays, tiling="32 x 32", scale=scale, return_aux=STATISTICS)
        atol = 2e-2 if dtype == "bfloat16" else 2e-3
        np.testing.assert_allclose(out.astype(float), expected["out"], atol=atol, err_msg=f"2**{exponent}")
        np.testing.assert_allclose(aux.max_score, expected["max_score"], rtol=1e-6)
        np.testing.assert_allclose(aux.lse, expected["lse"], rtol=1e-6)
        np.testing.assert_allclose(aux.entropy, expected["entropy"], atol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1e-38, 1.7e38, -1.7e38])
def test_smallest_and_largest_scale(scale: float) -> None:
    pytest.importorskip("ml_dtypes")
    query, key, value = Case("scale", 1, 3, 40, 16, dtype="bfloat16").arrays()
    query *= query.dtype.type(2.0**-120)
    out = run(query, key, value, scale=scale)
    np.testing.assert_allclose(out.astype(float), exact(query, key, value, scale=scale)["out"], atol=1e-2)


@pytest.mark.parametrize("softcap", [2.0**-126, 2.0**125, 3e38])
def test_smallest_and_largest_softcap(softcap: float) -> None:
    arrays = Case("softcap", 1, 3, 40, 16, dtype="float16").arrays()
    out, aux = run(*arrays, softcap=softcap, return_aux=STATISTICS)
    assert_accurate(out, aux, *arrays, rounded_weights=True, softcap=softcap)


# Where arrays are -----------------------------------------------------------------------------------------------------


def test_a_sequence_alone_and_in_any_batch() -> None:
    """To the same bits, whether its rows are few, some or many and whatever the padding around it."""
    rng = np.random.default_rng(2)
    lengths, keys = [70, 3, 20, 1, 0], [90, 90, 70, 33, 5]
    query, key, value = (rng.standard_normal((5, H, 90, 16)).astype(np.float16) for H in (4, 2, 2))
    options: dict[str, Any] = {"enable_gqa": True, "return_aux": STATISTICS, "tiling": "32 x 32"}
    options |= {"is_causal": True, "query_offset": "bottom_right", "softcap": 2.0, "sinks": np.ones(4)}
    together, aux = run(query, key, value, query_lengths=lengths, kv_lengths=keys, **options)
    for b, (n, m) in enumerate(zip(lengths, keys, strict=True)):
        assert (together[b, :, n:] == 0).all()
        if n:
            alone, its = run(query[b, :, :n], key[b, :, :m], value[b, :, :m], **options)
            assert same_bits(together[b, :, :n], alone)
            for name in STATISTICS:
                assert same_bits(getattr(aux, name)[b, :, :n], getattr(its, name))


def test_packed_sequences() -> None:
    rng = np.random.default_rng(3)
    starts = np.array([0, 5, 5, 45, 80])
    query, key, value = (rng.standard_normal((80, H, 16)).astype(np.float16) for H in (4, 2, 2))
    call = {**DEFAULTS, "return_aux": ("lse",), "enable_gqa": True, "is_causal": True}
    problem = Problem.from_call(query, key, value, **call, cu_seqlens=(starts, starts))
    assert problem.aux is not None
    emulate(problem, tiling=TILINGS["32 x 32"])
    for one, end in itertools.pairwise(starts):
        if one < end:
            part = (x[one:end].swapaxes(0, 1) for x in (query, key, value))
            alone, aux = run(*part, enable_gqa=True, is_causal=True, return_aux=("lse",), tiling="32 x 32")
            assert same_bits(problem.result[one:end].swapaxes(0, 1), alone)
            assert same_bits(problem.aux.lse[one:end].T, aux.lse)


def test_arrays_anywhere() -> None:
    """Layouts, batches that have no one stride, results that cannot be written 16 bytes at a time."""
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal((2, 2, 1, L, 16)).astype(np.float16) for L in (20, 33, 33)]
    mask = rng.random((2, 1, 1, 20, 33)) < 0.7
    whole = run(*arrays, attn_mask=mask, tiling="16 x 16")
    for i, j in np.ndindex(2, 2):
        one = run(*(x[i, j] for x in arrays), attn_mask=mask[i, 0], tiling="16 x 16")
        assert same_bits(one, whole[i, j])
    apart = [np.swapaxes(np.swapaxes(x, 0, 1).copy(), 0, 1) for x in arrays]
    call = {**DEFAULTS, "return_aux": (), "attn_mask": mask}
    for form in ("transposed", "heads inside"):
        out = STORAGE[form](np.full(whole.shape, 7, np.float16))
        problem = Problem.from_call(*apart, **{**call, "out": out})
        emulate(problem, tiling=TILINGS["16 x 16"])
        assert same_bits(out, whole), form
    rows_first = [x.swapaxes(-3, -2).copy() for x in arrays]
    assert same_bits(run(*rows_first, attn_mask=mask, layout="BLHD", tiling="16 x 16").swapaxes(-3, -2), whole)


def test_cache_of_numbers() -> None:
    """Of which the keys behind those that there are count for nothing."""
    rng = np.random.default_rng(5)
    query, key, value = (rng.standard_normal((2, H, L, 16)).astype(np.float16) for H, L in ((4, 1), (2, 50), (2, 50)))
    expected = run(query, key[:, :, :40], value[:, :, :40], enable_gqa=True, kv_lengths=[40, 9], tiling="32 x 32")
    held = Storage(key, value, None, 16, 16, 40)
    problem = Problem.from_call(query, held, None, **{**DEFAULTS, "return_aux": (), "kv_lengths": [40, 9]})
    emulate(problem, tiling=TILINGS["32 x 32"])
    np.testing.assert_allclose(problem.result.astype(float), expected.astype(float), atol=2e-3)


@pytest.mark.parametrize("form", ["Fortran", "reversed", "steps", "unaligned"])
def test_masks_anywhere(form: str) -> None:
    rng = np.random.default_rng(4)
    arrays = [rng.standard_normal((1, 2, L, 16)).astype(np.float16) for L in (20, 33, 33)]
    mask = rng.random((2, 20, 33)) < 0.7
    expected = run(*arrays, attn_mask=mask, tiling="16 x 16")
    assert same_bits(run(*arrays, attn_mask=STORAGE[form](mask), tiling="16 x 16"), expected)


# What is not computed here --------------------------------------------------------------------------------------------


_PAGES = np.array([[0, 2]])


def _reason(
    cc: tuple[int, int] = H100,
    D: int = 16,
    dtype: Any = np.float16,
    of: Any = None,
    key: Any = None,
    where: dict[str, int] | None = None,
    **options: Any,
) -> str | None:
    x = np.ones((1, 2, 8, D), dtype) if of is None else of
    call = {**DEFAULTS, "return_aux": (), **options}
    problem = Problem.from_call(x, *((x, x) if key is None else (key, None)), **call)
    if where is None:
        return tensorcore.supports(problem, cc)
    return tensorcore.supports(problem, cc, lambda name: Where(where.get(name, 0), getattr(problem, name).strides))


def test_what_is_left_to_other_kernels() -> None:
    assert _reason() is None
    assert "compute capability 7.5" in str(_reason((7, 5)))
    assert "float32 is not of 16 bits" in str(_reason(dtype=np.float32))
    assert "head size 264" in str(_reason(D=264))
    assert "head size 0" in str(_reason(D=0))
    assert "score_mod" in str(_reason(score_mod=lambda score, b, h, i, j: score))
    assert "key_weight" in str(_reason(return_aux=("key_weight",)))
    assert "rows of query" in str(_reason(D=20))
    assert "contiguous" in str(_reason(of=np.ones((1, 2, 16, 8), np.float16).swapaxes(-1, -2)))
    odd = STORAGE["unaligned"](np.zeros((8, 8), np.float32))
    assert "elements of mask" in str(_reason(where={"mask": odd.ctypes.data}, attn_mask=odd))
    far = np.lib.stride_tricks.as_strided(np.zeros(1, np.float32), (8, 8), (0, 1 << 31))
    assert "a row of mask are too far apart" in str(_reason(attn_mask=far))
    assert "rows of key" in str(_reason(where={"key": 8}))
    paged = Storage(np.ones((3, 2, 4, 16), np.float16), np.ones((3, 2, 4, 16), np.float16), None, 16, 16, 8, _PAGES)
    assert "in pages" in str(_reason(key=paged))
    assert "positions" in str(_reason(alibi_slopes=np.ones(2), query_offset=1 << 31))


def test_nothing_to_compute() -> None:
    x = np.ones((0, 2, 8, 16), np.float16)
    assert tensorcore.launches(Problem.from_call(x, x, x, **DEFAULTS), H100, None, None, None) == []  # type: ignore[arg-type]


def test_parameters_are_those_that_are_given() -> None:
    x = np.ones((1, 1, 2, 16), np.float16)
    problem = Problem.from_call(x, x, x, **{**DEFAULTS, "return_aux": ()})
    memory = Memory()
    launches = tensorcore.launches(problem, H100, lambda name: Where(0, x.strides), memory.address, memory.scratch)
    assert [launch.make for launch in launches] == [make_flash, make_combine]
    for launch in launches:
        machine = Machine(memory)
        kernel = launch.make(machine.cuda, machine.ops, *launch.configuration)
        assert list(inspect.signature(kernel).parameters) == list(PARAMETERS)
        words = launch.words()
        scale = list(PARAMETERS).index("scale")
        assert words[scale : scale + 1].view(np.float32)[0] == np.float32(0.25)
        assert words[list(PARAMETERS).index("heads")] == 1


MANY = 1 << 20
NOTHING = "", False, False, False, False, False  # of options


@pytest.mark.parametrize("cc", [(8, 0), (8, 6), (8, 9), (9, 0), (12, 0)])
def test_shared_memory_suffices(cc: tuple[int, int]) -> None:
    for D in (8, 16, 64, 80, 96, 128, 192, 256):
        for Dv in (8, D, 256):
            for rows in (FEW, SOME, MANY):
                for options in (False, True):
                    chosen = Configuration("", D, Dv, *choose(D, Dv, rows, cc, options), rows <= SOME, *NOTHING)
                    assert chosen.shared_bytes <= shared_limit(cc)
                    assert chosen.rows >= min(rows, SOME) and chosen.threads <= 256


def test_keys_of_a_tile_depend_on_no_option() -> None:
    for cc in ((8, 0), (8, 9), (9, 0)):
        for D in (16, 64, 128, 256):
            for rows in (FEW, SOME, MANY):
                assert choose(D, D, rows, cc, False).keys == choose(D, D, rows, cc, True).keys


# The emulator itself --------------------------------------------------------------------------------------------------


def _spoilt(monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Machine], None]) -> np.ndarray:
    """A result of which the kernels ran on a machine that has been changed."""
    made = Machine.__init__

    def make(machine: Machine, *rest: Any) -> None:
        made(machine, *rest)
        spoil(machine)

    monkeypatch.setattr(Machine, "__init__", make)
    x = Case("emulator", 1, 70, 70, 16, dtype="float16").arrays()
    return run(*x, tiling="planned")


def test_a_missing_barrier_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="without a barrier"):
        _spoilt(monkeypatch, lambda machine: setattr(machine.cuda, "syncthreads", lambda: None))


def test_a_missing_wait_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="written without a barrier"):
        _spoilt(monkeypatch, lambda machine: setattr(machine.ops, "wait_for_all_but_last", lambda: None))


def test_an_access_outside_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def everything(machine: Machine) -> None:
        store = machine.ops.store_16
        machine.ops.store_16 = lambda condition, *rest: store(True, *rest)

    with pytest.raises(AssertionError, match="outside the arrays"):
        _spoilt(monkeypatch, everything)
