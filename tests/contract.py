"""What every backend keeps, written once: a backend's test module subclasses `Contract`."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from cases import SMALL, Case
from mods import blocky, everywhere, nearer_is_more, prefix, relative_bias, scattered
from tolerances import DEFAULTS, assert_accurate, same_bits
from variants import Variants

from numba_attn import Aux
from numba_attn.masks import KeyIntervals
from numba_attn.problem import AUX_NAMES, Problem, statistics_dtype

ALL = pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
_SOME = [
    *("plain", "odd sizes", "causal, offsets", "lengths", "mask bool", "additive -inf, groups"),
    *("alibi per batch, offsets", "block mask of places", "dropout, causal, groups", "float16, additive, window"),
    *("bfloat16, bool, lengths", "everything at once, float32", "everything at once, float16"),
]
SOME = pytest.mark.parametrize("case", [c for c in SMALL if c.name in _SOME], ids=lambda c: c.name)


def attended(case: Case) -> np.ndarray:
    """(B, Hq, Lq, Lk): which keys each query may use.  A block mask is what its function says, whatever its tiles."""
    q, k, v = case.arrays()
    problem = Problem.from_call(q, k, v, **{**DEFAULTS, **case.keywords()})
    allowed = np.ones((case.B, case.Hq, case.Lq, case.Lk), bool)
    intervals: KeyIntervals = problem.intervals
    keys = np.arange(case.Lk)
    for b in range(case.B):
        low, high = intervals.bounds(b, case.Lq)
        allowed[b] &= (low[:, None] <= keys) & (keys < high[:, None])
    if problem.mask is not None:
        mask = problem.mask
        with np.errstate(over="ignore"):
            allowed &= mask if mask.dtype == bool else mask.astype(statistics_dtype(q.dtype)) != -np.inf
    if problem.mask_mod is not None:
        allowed &= everywhere(problem.mask_mod, allowed.shape)
    if problem.block_mask is not None:
        allowed &= everywhere(problem.block_mask.mask_mod, allowed.shape)
    return allowed


class Contract(Variants):
    """Run on `backend`."""

    @ALL
    def test_agrees_with_float64(self, case: Case) -> None:
        arrays, options = case.arrays(), case.keywords()
        before = [x.copy() for x in arrays]
        out, aux = self.run(*arrays, return_aux=AUX_NAMES, **options)
        assert_accurate(out, aux, *arrays, **options)
        assert all(same_bits(x, y) for x, y in zip(arrays, before, strict=True)), "an input was modified"
        assert same_bits(out, self.run(*arrays, **options)), "asking for statistics changed the result"
        for name in AUX_NAMES:
            result, alone = self.run(*arrays, return_aux=(name,), **options)
            assert same_bits(result, out), f"asking for {name} changed the result"
            assert same_bits(alone, Aux(**{name: getattr(aux, name)})), f"{name} depends on what else is asked for"

    @SOME
    def test_statistics_change_no_bit_of_each_other(self, case: Case) -> None:
        arrays, options = case.arrays(), case.keywords()
        out, aux = self.run(*arrays, return_aux=AUX_NAMES, **options)
        for size in (2, 3):
            for names in itertools.combinations(AUX_NAMES, size):
                result, some = self.run(*arrays, return_aux=names, **options)
                assert same_bits(result, out), names
                assert same_bits(some, Aux(**{name: getattr(aux, name) for name in names})), names

    @ALL
    def test_rows_without_keys_are_zero(self, case: Case) -> None:
        options = case.keywords()
        out, aux = self.run(*case.arrays(), return_aux=AUX_NAMES, **options)
        allowed = attended(case)
        empty = ~allowed.any(axis=-1)
        assert (out[empty] == 0).all()
        assert (aux.max_score[empty] == -np.inf).all() and (aux.max_score[~empty] > -np.inf).all()
        assert (aux.entropy[empty] == 0).all()
        assert (aux.key_weight[~allowed.any(axis=-2)] == 0).all()
        if "sinks" in options:
            sinks = np.broadcast_to(options["sinks"][:, None], empty.shape)
            np.testing.assert_allclose(aux.lse[empty], sinks[empty], rtol=4 * np.finfo(aux.lse.dtype).eps)
        else:
            assert (aux.lse[empty] == -np.inf).all()
        assert (aux.lse[~empty] > -np.inf).all()

    @ALL
    @pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
    def test_what_is_masked_changes_no_bit(self, case: Case, poison: float) -> None:
        (query, key, value), options = case.arrays(), case.keywords()
        expected = self.run(query, key, value, return_aux=AUX_NAMES, **options)
        allowed = attended(case)
        # A key is unused by its head if no query of the group attends to it.
        group = case.Hq // key.shape[1]
        unused = ~allowed.reshape(case.B, -1, group, case.Lq, case.Lk).any(axis=(2, 3))
        key, value, query = key.copy(), value.copy(), query.copy()
        key[unused] = value[unused] = poison
        query[~allowed.any(axis=-1)] = poison
        assert same_bits(self.run(query, key, value, return_aux=AUX_NAMES, **options), expected)

    @ALL
    def test_nan_reaches_exactly_the_rows_that_attend_to_it(self, case: Case) -> None:
        query, key, value = case.arrays()
        j = case.Lk // 2
        expected, clean = self.run(query, key, value, return_aux=AUX_NAMES, **case.keywords())
        allowed = attended(case)
        touched = allowed[..., j]
        beside = (allowed & touched[..., None]).any(axis=-2)  # keys of the rows touched
        for spoilt in (key, value):
            if spoilt.shape[-1] == 0:
                continue
            kept = spoilt[:, :, j].copy()
            spoilt[:, :, j] = np.nan
            out, aux = self.run(query, key, value, return_aux=AUX_NAMES, **case.keywords())
            spoilt[:, :, j] = kept
            assert np.isnan(out[touched]).all()
            assert same_bits(out[~touched], expected[~touched])
            if spoilt is value:
                assert same_bits(aux, clean), "statistics depend on the values"
                continue
            for name, got in aux._asdict().items():
                reached = beside if name == "key_weight" else touched
                assert np.isnan(got[reached]).all(), name
                assert same_bits(got[~reached], getattr(clean, name)[~reached]), name

    @SOME
    def test_strides_change_no_bit(self, case: Case) -> None:
        arrays, options = case.arrays(), case.keywords()
        expected = self.run(*arrays, **options)
        for name, form in STORAGE.items():
            given = [form(x) for x in arrays]
            assert all(same_bits(x, y) for x, y in zip(given, arrays, strict=True)), name
            assert same_bits(self.run(*given, **options), expected), name
        if "attn_mask" in options:
            for name, form in STORAGE.items():
                mask = form(options["attn_mask"])
                assert same_bits(self.run(*arrays, **{**options, "attn_mask": mask}), expected), name

    @SOME
    def test_out_in_any_form(self, case: Case) -> None:
        arrays, options = case.arrays(), case.keywords()
        expected = self.run(*arrays, **options)
        for name, form in STORAGE.items():
            out = form(np.full(expected.shape, 7, expected.dtype))
            out.flags.writeable or out.setflags(write=True)
            assert self.run(*arrays, out=out, **options) is out, name
            assert same_bits(out, expected), name

    @SOME
    def test_layout(self, case: Case) -> None:
        arrays, options = case.arrays(), case.keywords()
        out, aux = self.run(*arrays, return_aux=AUX_NAMES, **options)
        rows_first = [x.swapaxes(1, 2).copy() for x in arrays]
        out_rows, aux_rows = self.run(*rows_first, layout="BLHD", return_aux=AUX_NAMES, **options)
        assert same_bits(out_rows.swapaxes(1, 2), out)
        assert same_bits(tuple(x.swapaxes(1, 2) for x in aux_rows), aux)

    def test_ranks(self) -> None:
        rng = np.random.default_rng(1)
        query, key, value = (rng.standard_normal((2, 3, 2, L, 8), dtype=np.float32) for L in (9, 11, 11))
        mask = rng.random((2, 1, 2, 9, 11)) < 0.7
        lengths = np.array([[11, 5, 0], [3, 8, 2]])
        whole = self.run(query, key, value, mask, kv_lengths=lengths)
        assert whole.shape == (2, 3, 2, 9, 8)
        for i, j in np.ndindex(2, 3):
            one = self.run(query[i, j], key[i, j], value[i, j], mask[i, 0], kv_lengths=int(lengths[i, j]))
            assert same_bits(one, whole[i, j])
            for h in range(2):
                alone = self.run(
                    query[i, j, h], key[i, j, h], value[i, j, h], mask[i, 0, h], kv_lengths=int(lengths[i, j])
                )
                assert same_bits(alone, whole[i, j, h])
        # Batch axes that cannot be merged into one without a copy.
        apart = [np.swapaxes(np.swapaxes(x, 0, 1).copy(), 0, 1) for x in (query, key, value)]
        assert same_bits(self.run(*apart, mask, kv_lengths=lengths), whole)

    @pytest.mark.parametrize("shape", ["B", "Hq", "Lq", "Lk", "Dv"])
    def test_empty(self, shape: str) -> None:
        n = dict.fromkeys(("B", "Hq", "Lq", "Lk", "D", "Dv"), 3) | {shape: 0}
        query = np.ones((n["B"], n["Hq"], n["Lq"], n["D"]), np.float32)
        key = np.ones((n["B"], n["Hq"], n["Lk"], n["D"]), np.float32)
        value = np.ones((n["B"], n["Hq"], n["Lk"], n["Dv"]), np.float32)
        out, aux = self.run(query, key, value, return_aux=AUX_NAMES, is_causal=True)
        assert out.shape == (n["B"], n["Hq"], n["Lq"], n["Dv"])
        assert aux.lse.shape == aux.max_score.shape == aux.entropy.shape == out.shape[:-1]
        assert aux.key_weight.shape == (n["B"], n["Hq"], n["Lk"])
        assert (out == (0 if shape == "Lk" else 1)).all()
        if shape == "Lk":
            assert (aux.lse == -np.inf).all() and (aux.max_score == -np.inf).all() and (aux.entropy == 0).all()
        if shape == "Lq":
            assert (aux.key_weight == 0).all()
        options = {
            "softcap": 2.0,
            "alibi_slopes": np.ones(n["Hq"]),
            "sinks": np.full(n["Hq"], 0.5),
            "score_mod": relative_bias,
            "mask_mod": scattered,
            "block_mask": blocky(prefix, (n["B"], n["Hq"], n["Lq"], n["Lk"]), (2, 2)),
            "dropout_p": 0.5,
            "dropout_seed": 0,
        }
        out, aux = self.run(query, key, value, return_aux=AUX_NAMES, **options)
        assert_accurate(out, aux, query, key, value, **options)

    def test_batch_invariance(self) -> None:
        """A sequence's result does not depend on what else is in the batch, nor on the padding around it."""
        rng = np.random.default_rng(2)
        lengths = [70, 33, 90, 1]
        query, key, value = (rng.standard_normal((4, 2, 90, 24), dtype=np.float32) for _ in range(3))
        slopes, sinks = np.array([0.5, 0.125]), np.array([1.0, -1.0])
        for options in ({}, {"softcap": 2.0, "alibi_slopes": slopes, "sinks": sinks, "score_mod": nearer_is_more}):
            options |= {"is_causal": True, "return_aux": AUX_NAMES}
            together, aux = self.run(query, key, value, query_lengths=lengths, kv_lengths=lengths, **options)
            for b, n in enumerate(lengths):
                alone, its = self.run(query[b, :, :n], key[b, :, :n], value[b, :, :n], **options)
                assert same_bits(together[b, :, :n], alone)
                assert same_bits(tuple(x[b, :, :n] for x in aux), its)


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
