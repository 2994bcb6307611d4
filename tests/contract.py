"""What every backend keeps, written once: a backend's test module subclasses `Contract`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import SMALL, Case
from tolerances import DEFAULTS, assert_accurate

from numba_attn import scaled_dot_product_attention
from numba_attn.masks import KeyIntervals
from numba_attn.problem import Problem

ALL = pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
SOME = pytest.mark.parametrize(
    "case",
    [
        c
        for c in SMALL
        if c.name in {"plain", "odd sizes", "causal, offsets", "lengths", "mask bool", "additive -inf, groups"}
    ],
    ids=lambda c: c.name,
)


def attended(case: Case) -> np.ndarray:
    """(B, Hq, Lq, Lk): which keys each query may use."""
    q, k, v = case.arrays()
    problem = Problem.from_call(q, k, v, **{**DEFAULTS, **case.keywords()})
    allowed = np.ones((case.B, case.Hq, case.Lq, case.Lk), bool)
    intervals: KeyIntervals = problem.intervals
    keys = np.arange(case.Lk)
    for b in range(case.B):
        low, high = intervals.bounds(b, case.Lq)
        allowed[b] &= (low[:, None] <= keys) & (keys < high[:, None])
    if problem.mask is not None:
        allowed &= problem.mask if problem.mask.dtype == bool else problem.mask != -np.inf
    return allowed


class Contract:
    """Run on `backend`."""

    backend: str

    def run(self, *arrays: np.ndarray, **options: Any) -> Any:
        return scaled_dot_product_attention(*arrays, backend=self.backend, **options)

    @ALL
    def test_agrees_with_float64(self, case: Case) -> None:
        arrays, options = case.arrays(), case.keywords()
        before = [x.copy() for x in arrays]
        out, aux = self.run(*arrays, return_aux=("lse",), **options)
        assert_accurate(out, aux.lse, *arrays, **options)
        assert all(np.array_equal(x, y) for x, y in zip(arrays, before, strict=True)), "an input was modified"
        assert np.array_equal(out, self.run(*arrays, **options)), "asking for lse changed the result"

    @ALL
    def test_rows_without_keys_are_zero(self, case: Case) -> None:
        out, aux = self.run(*case.arrays(), return_aux=("lse",), **case.keywords())
        empty = ~attended(case).any(axis=-1)
        assert (out[empty] == 0).all()
        assert (aux.lse[empty] == -np.inf).all() and (aux.lse[~empty] > -np.inf).all()

    @ALL
    @pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
    def test_what_is_masked_changes_no_bit(self, case: Case, poison: float) -> None:
        (query, key, value), options = case.arrays(), case.keywords()
        expected = self.run(query, key, value, **options)
        allowed = attended(case)
        # A key is unused by its head if no query of the group attends to it.
        group = case.Hq // key.shape[1]
        unused = ~allowed.reshape(case.B, -1, group, case.Lq, case.Lk).any(axis=(2, 3))
        key, value, query = key.copy(), value.copy(), query.copy()
        key[unused] = value[unused] = poison
        query[~allowed.any(axis=-1)] = poison
        assert np.array_equal(self.run(query, key, value, **options), expected)

    @ALL
    def test_nan_reaches_exactly_the_rows_that_attend_to_it(self, case: Case) -> None:
        query, key, value = case.arrays()
        j = case.Lk // 2
        expected = self.run(query, key, value, **case.keywords())
        touched = attended(case)[..., j]
        for spoilt in (key, value):
            if spoilt.shape[-1] == 0:
                continue
            kept = spoilt[:, :, j].copy()
            spoilt[:, :, j] = np.nan
            out = self.run(query, key, value, **case.keywords())
            spoilt[:, :, j] = kept
            assert np.isnan(out[touched]).all()
            assert np.array_equal(out[~touched], expected[~touched])

    @SOME
    def test_strides_change_no_bit(self, case: Case) -> None:
        arrays, options = case.arrays(), case.keywords()
        expected = self.run(*arrays, **options)
        for name, form in STORAGE.items():
            given = [form(x) for x in arrays]
            assert all(np.array_equal(x, y) for x, y in zip(given, arrays, strict=True)), name
            assert np.array_equal(self.run(*given, **options), expected), name
        if "attn_mask" in options:
            for name, form in STORAGE.items():
                mask = form(options["attn_mask"])
                assert np.array_equal(self.run(*arrays, **{**options, "attn_mask": mask}), expected), name

    @SOME
    def test_out_in_any_form(self, case: Case) -> None:
        arrays, options = case.arrays(), case.keywords()
        expected = self.run(*arrays, **options)
        for name, form in STORAGE.items():
            out = form(np.full(expected.shape, 7, expected.dtype))
            out.flags.writeable or out.setflags(write=True)
            assert self.run(*arrays, out=out, **options) is out, name
            assert np.array_equal(out, expected), name

    @SOME
    def test_layout(self, case: Case) -> None:
        arrays, options = case.arrays(), case.keywords()
        out, aux = self.run(*arrays, return_aux=("lse",), **options)
        rows_first = [x.swapaxes(1, 2).copy() for x in arrays]
        out_rows, aux_rows = self.run(*rows_first, layout="BLHD", return_aux=("lse",), **options)
        assert np.array_equal(out_rows.swapaxes(1, 2), out)
        assert np.array_equal(aux_rows.lse.swapaxes(1, 2), aux.lse)

    def test_ranks(self) -> None:
        rng = np.random.default_rng(1)
        query, key, value = (rng.standard_normal((2, 3, 2, L, 8), dtype=np.float32) for L in (9, 11, 11))
        mask = rng.random((2, 1, 2, 9, 11)) < 0.7
        lengths = np.array([[11, 5, 0], [3, 8, 2]])
        whole = self.run(query, key, value, mask, kv_lengths=lengths)
        assert whole.shape == (2, 3, 2, 9, 8)
        for i, j in np.ndindex(2, 3):
            one = self.run(query[i, j], key[i, j], value[i, j], mask[i, 0], kv_lengths=int(lengths[i, j]))
            assert np.array_equal(one, whole[i, j])
            for h in range(2):
                alone = self.run(
                    query[i, j, h], key[i, j, h], value[i, j, h], mask[i, 0, h], kv_lengths=int(lengths[i, j])
                )
                assert np.array_equal(alone, whole[i, j, h])
        # Batch axes that cannot be merged into one without a copy.
        apart = [np.swapaxes(np.swapaxes(x, 0, 1).copy(), 0, 1) for x in (query, key, value)]
        assert np.array_equal(self.run(*apart, mask, kv_lengths=lengths), whole)

    @pytest.mark.parametrize("shape", ["B", "Hq", "Lq", "Lk", "Dv"])
    def test_empty(self, shape: str) -> None:
        n = dict.fromkeys(("B", "Hq", "Lq", "Lk", "D", "Dv"), 3) | {shape: 0}
        query = np.ones((n["B"], n["Hq"], n["Lq"], n["D"]), np.float32)
        key = np.ones((n["B"], n["Hq"], n["Lk"], n["D"]), np.float32)
        value = np.ones((n["B"], n["Hq"], n["Lk"], n["Dv"]), np.float32)
        out, aux = self.run(query, key, value, return_aux=("lse",), is_causal=True)
        assert out.shape == (n["B"], n["Hq"], n["Lq"], n["Dv"]) and aux.lse.shape == out.shape[:-1]
        assert (out == (0 if shape == "Lk" else 1)).all()
        if shape == "Lk":
            assert (aux.lse == -np.inf).all()

    def test_batch_invariance(self) -> None:
        """A sequence's result does not depend on what else is in the batch, nor on the padding around it."""
        rng = np.random.default_rng(2)
        lengths = [70, 33, 90, 1]
        query, key, value = (rng.standard_normal((4, 2, 90, 24), dtype=np.float32) for _ in range(3))
        together = self.run(query, key, value, is_causal=True, query_lengths=lengths, kv_lengths=lengths)
        for b, n in enumerate(lengths):
            alone = self.run(query[b, :, :n], key[b, :, :n], value[b, :, :n], is_causal=True)
            assert np.array_equal(together[b, :, :n], alone)


def _unaligned(x: np.ndarray) -> np.ndarray:
    buffer = np.empty(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    buffer[...] = x
    return buffer


def _spread(x: np.ndarray) -> np.ndarray:
    wide = np.zeros((*x.shape[:-2], 2 * x.shape[-2], 3 * x.shape[-1]), x.dtype)[..., ::2, ::3]
    wide[...] = x
    return wide


def _read_only(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x.flags.writeable = False
    return x


# The same numbers in other places in memory.
STORAGE: dict[str, Any] = {
    "Fortran": np.asfortranarray,
    "transposed": lambda x: x.swapaxes(-1, -2).copy().swapaxes(-1, -2),
    "heads inside": lambda x: np.moveaxis(np.moveaxis(x, -3, -2).copy(), -2, -3) if x.ndim > 2 else x.copy(),
    "reversed": lambda x: x[..., ::-1, ::-1].copy()[..., ::-1, ::-1],
    "steps": _spread,
    "unaligned": _unaligned,
    "read-only": _read_only,
}
