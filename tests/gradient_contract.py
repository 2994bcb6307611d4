"""What gradients keep on every backend that has them: a test module subclasses `GradientContract`."""

from __future__ import annotations

from typing import Any

import mods
import numpy as np
import pytest
from cases import Case
from contract import ALL, SOME, STORAGE, attended
from tolerances import DEFAULTS, same_bits

from numba_attn import Gradients, reference, scaled_dot_product_attention, scaled_dot_product_attention_vjp, threads
from numba_attn.checks import is_bfloat16
from numba_attn.gradient_problem import GradientProblem
from numba_attn.problem import Problem, statistics_dtype


def differentiable(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a call, as the gradient functions take them."""
    options = {name: x for name, x in options.items() if name != "precision"}
    if options.get("score_mod") is not None:
        options["score_mod_grad"] = mods.SLOPES[options["score_mod"]]
    return options


def upstream(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Gradients with respect to output and lse, N(0, 1)."""
    rng, rows = np.random.default_rng(5), (case.B, case.Hq, case.Lq)
    grad_out = rng.standard_normal((*rows, case.D if case.Dv is None else case.Dv)).astype(case.numpy_dtype)
    return grad_out, rng.standard_normal(rows).astype(statistics_dtype(case.numpy_dtype))


def exact(
    arrays: tuple[np.ndarray, ...],
    above: tuple[np.ndarray, np.ndarray | None],
    arithmetic: Any,
    options: dict[str, Any],
) -> Gradients:
    """The gradients by plain NumPy in a precision, of inputs that are held in it, or in float64 at least."""
    working = statistics_dtype(arrays[0].dtype)
    held = np.promote_types(working, np.float64 if arithmetic is np.longdouble else arithmetic)
    mask = options.get("attn_mask")
    if mask is not None and mask.dtype != bool:
        with np.errstate(over="ignore"):
            options = {**options, "attn_mask": mask.astype(working).astype(held)}
    options = {**DEFAULTS, **options, "return_aux": ("lse",)}
    problem = Problem.from_call(*(x.astype(held) for x in arrays), **options, differentiable=True)
    gradient = GradientProblem.from_call(problem, *(None if x is None else x.astype(held) for x in above), None)
    reference.backward(gradient, arithmetic)
    mask = gradient.mask if gradient.mask is None else gradient.mask.reshape(np.shape(options["attn_mask"]))
    slopes = gradient.slopes if gradient.slopes is None else gradient.slopes.reshape(options["alibi_slopes"].shape)
    given = map(problem.as_given, (gradient.query, gradient.key, gradient.value))
    reference.forward(problem, arithmetic)
    lse = np.abs(problem.lse[np.isfinite(problem.lse)])
    return Gradients(*given, mask, gradient.sinks, slopes), float(lse.max(initial=0))


def assert_accurate_gradients(
    got: Gradients,
    arrays: tuple[np.ndarray, ...],
    above: tuple[np.ndarray, np.ndarray | None],
    options: dict[str, Any],
) -> None:
    """Hold gradients against float64: see `tolerances`, of which this is the rule, but for sums over many rows.

    Of 16-bit problems the output, rounded, is a part of the result: of delta, and so of all scores' gradients.
    """
    dtype = arrays[0].dtype
    working, eps16 = statistics_dtype(dtype), 2.0**-8 if is_bfloat16(dtype) else 2.0**-11
    truths, score = exact(arrays, above, np.longdouble if dtype == np.float64 else np.float64, options)
    roughs, _ = exact(arrays, above, working.type, options)
    for name, result in got._asdict().items():
        truth, rough = getattr(truths, name), getattr(roughs, name)
        assert (result is None) == (truth is None), name
        if result is None:
            continue
        assert result.shape == truth.shape, name
        rounding = 2.0**-8 if is_bfloat16(result.dtype) else float(np.finfo(result.dtype).eps)
        result, truth, rough = (x.astype(np.float64) for x in (result, truth, rough))
        finite = np.isfinite(truth)
        assert np.array_equal(result[~finite], truth[~finite], equal_nan=True), f"{name}: what is not finite differs"
        if not finite.any():
            continue
        result, truth, rough = result[finite], truth[finite], rough[finite]
        scale, error = max(1.0, float(np.abs(truth).max())), float(np.abs(rough - truth).max())
        # Probabilities are as accurate as the lse; sums are over all rows.
        allowed: Any = (
            2 * error
            + (16 + arrays[0].shape[-2] + score) * float(np.finfo(working).eps) * scale
            + rounding * np.abs(truth)
        )
        if dtype != working:
            bound = float(np.abs(above[0].astype(np.float64)).max(initial=0) * np.sqrt(max(arrays[2].shape[-1], 1)))
            allowed = allowed + 2 * eps16 * np.abs(truth) + eps16 * scale * bound
        excess = np.abs(result - truth) - allowed
        worst = int(np.argmax(excess))
        assert excess[worst] <= 0, (
            f"{name}: error {abs(result[worst] - truth[worst]):.2e} of {truth[worst]:.3g}, plain NumPy has {error:.2e}"
        )


class GradientContract:
    """Run on `backend`."""

    backend: str

    def run(self, case: Case, above: Any = None, arrays: Any = None, **changed: Any) -> Gradients:
        """The gradients of a case, of which arrays and options may be changed."""
        options = differentiable({**case.keywords(), **changed})
        arrays = case.arrays() if arrays is None else arrays
        _, vjp = scaled_dot_product_attention_vjp(*arrays, backend=self.backend, **options)
        return vjp(*(upstream(case) if above is None else above))

    @ALL
    def test_gradients_agree_with_float64(self, case: Case) -> None:
        arrays, options = case.arrays(), differentiable(case.keywords())
        above = upstream(case)
        given = [*arrays, *above, *(x for x in options.values() if isinstance(x, np.ndarray))]
        before = [x.copy() for x in given]
        result, vjp = scaled_dot_product_attention_vjp(*arrays, backend=self.backend, **options)
        plain = {name: x for name, x in options.items() if name != "score_mod_grad"}
        assert same_bits(result, scaled_dot_product_attention(*arrays, backend=self.backend, **plain))
        got = vjp(*above)
        for name, x in zip(got._fields, arrays, strict=False):
            assert getattr(got, name).dtype == x.dtype
        assert_accurate_gradients(got, arrays, above, options)
        assert all(same_bits(x, y) for x, y in zip(given, before, strict=True)), "an input was modified"
        for names in (("query",), ("sinks", "attn_mask"), ("alibi_slopes",)):
            there = [name for name in names if getattr(got, name) is not None]
            some = vjp(*above, wanted=there)
            for name in ("query", "key", "value", *there):
                assert same_bits(getattr(some, name), getattr(got, name)), "what else is wanted changes bits"

    @ALL
    @pytest.mark.parametrize("poison", [np.nan, pytest.param(np.inf, marks=pytest.mark.slow)])
    def test_what_is_masked_changes_no_gradient(self, case: Case, poison: float) -> None:
        query, key, value = (x.copy() for x in case.arrays())
        grad_out, grad_lse = upstream(case)
        expected = self.run(case, (grad_out, grad_lse))
        allowed = attended(case)
        group = case.Hq // key.shape[1]
        unused = ~allowed.reshape(case.B, -1, group, case.Lq, case.Lk).any(axis=(2, 3))
        empty = ~allowed.any(axis=-1)
        key[unused] = value[unused] = poison
        query[empty] = grad_out[empty] = poison
        assert same_bits(self.run(case, (grad_out, grad_lse), (query, key, value)), expected)
        assert (expected.key[unused] == 0).all() and (expected.value[unused] == 0).all()
        assert (expected.query[empty] == 0).all()

    @SOME
    def test_what_is_not_finite_stays_where_it_is_attended_to(self, case: Case) -> None:
        """NaN in a row's gradient from above is in gradients of the keys that it attends to alone."""
        key = case.arrays()[1]
        grad_out, grad_lse = upstream(case)
        expected, allowed = self.run(case, (grad_out, grad_lse)), attended(case)
        rows = np.flatnonzero(allowed[0, 0].any(axis=-1))
        if not rows.size or grad_out.shape[-1] == 0:
            pytest.skip("no row attends to anything")
        row, group = rows[-1], case.Hq // key.shape[1]
        reached = allowed[0, 0, row]
        grad_out[0, 0, row, 0] = np.nan
        got = self.run(case, (grad_out, grad_lse))
        if "dropout_p" not in case.options:
            assert np.isnan(got.value[0, 0, reached, 0]).all()
        assert same_bits(got.value[0, 0, ~reached], expected.value[0, 0, ~reached])
        assert same_bits(got.value[0, 1:], expected.value[0, 1:])
        assert np.isnan(got.query[0, 0, row]).all() or case.D == 0
        assert same_bits(np.delete(got.query[0, :group], row, 1), np.delete(expected.query[0, :group], row, 1))
        assert same_bits(got.key[0, 0, ~reached], expected.key[0, 0, ~reached])

    @SOME
    def test_threads_and_storage_change_no_bit(self, case: Case) -> None:
        arrays, above = case.arrays(), upstream(case)
        expected = self.run(case, above)
        with threads.limit(1):
            assert same_bits(self.run(case, above), expected)
        for name, form in STORAGE.items():
            got = self.run(case, (form(above[0]), above[1]), [form(x) for x in arrays])
            assert same_bits(got, expected), name

    @SOME
    def test_layout_of_gradients(self, case: Case) -> None:
        arrays, (grad_out, grad_lse) = case.arrays(), upstream(case)
        expected = self.run(case, (grad_out, grad_lse))
        rows_first = [x.swapaxes(1, 2).copy() for x in arrays]
        above = grad_out.swapaxes(1, 2).copy(), grad_lse.swapaxes(1, 2).copy()
        got = self.run(case, above, rows_first, layout="BLHD")
        for name in ("query", "key", "value"):
            assert same_bits(getattr(got, name).swapaxes(1, 2), getattr(expected, name)), name
        assert same_bits(got[3:], expected[3:])

    @pytest.mark.parametrize("axis", ["B", "Hq", "Lq", "Lk", "D", "Dv"])
    def test_empty_gradients(self, axis: str) -> None:
        n = dict.fromkeys(("B", "Hq", "Lq", "Lk", "D", "Dv"), 3) | {axis: 0}
        shapes = [(n["B"], n["Hq"], n[rows], n[columns]) for rows, columns in (("Lq", "D"), ("Lk", "D"), ("Lk", "Dv"))]
        arrays = [np.ones(shape, np.float32) for shape in shapes]
        options = {"attn_mask": np.zeros((n["Lq"], n["Lk"]), np.float32), "sinks": np.zeros(n["Hq"], np.float32)}
        out, vjp = scaled_dot_product_attention_vjp(*arrays, backend=self.backend, **options)
        got = vjp(np.ones_like(out), np.ones(out.shape[:-1], np.float32))
        assert [x.shape for x in got[:5]] == [*shapes, options["attn_mask"].shape, options["sinks"].shape]
        assert_accurate_gradients(got, tuple(arrays), (np.ones_like(out), np.ones(out.shape[:-1], np.float32)), options)

    def test_gradients_are_batch_invariant(self) -> None:
        """A sequence's gradients do not depend on what else is in the batch, nor on the padding around it."""
        rng, lengths = np.random.default_rng(2), [70, 133, 150, 1]
        query, key, value, grad_out = (rng.standard_normal((4, 2, 150, 24), dtype=np.float32) for _ in range(4))
        options = {"is_causal": True, "softcap": 2.0, "backend": self.backend}
        lengths_too = {"query_lengths": lengths, "kv_lengths": lengths}
        _, vjp = scaled_dot_product_attention_vjp(query, key, value, **options, **lengths_too)
        together = vjp(grad_out)
        for b, n in enumerate(lengths):
            _, vjp = scaled_dot_product_attention_vjp(*(x[b, :, :n] for x in (query, key, value)), **options)
            alone = vjp(grad_out[b, :, :n])
            for name in ("query", "key", "value"):
                assert same_bits(getattr(together, name)[b, :, :n], getattr(alone, name)), (b, name)
