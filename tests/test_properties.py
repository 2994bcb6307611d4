"""The whole option space at once: random shapes, storage, masks and intervals, CPU kernels against float64."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from contract import STORAGE
from hypothesis import given, settings
from tolerances import assert_accurate

from numba_attn import scaled_dot_product_attention
from numba_attn.cpu import forward, plan

IDENTITY: dict[str, Any] = {"as is": lambda x: x, **STORAGE}


@st.composite
def calls(draw: st.DrawFn) -> tuple[list[np.ndarray], dict[str, Any], Any]:
    """Arrays, options and how to cut the problem."""
    B, Hkv, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    Lq, Lk = draw(st.integers(0, 60)), draw(st.integers(0, 70))
    D, Dv = draw(st.integers(0, 40)), draw(st.integers(0, 40))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def array(*shape: int) -> np.ndarray:
        x = rng.standard_normal(shape).astype(dtype)
        return IDENTITY[draw(st.sampled_from(list(IDENTITY)))](x)  # type: ignore[no-any-return]

    arrays = [array(B, Hkv * group, Lq, D), array(B, Hkv, Lk, D), array(B, Hkv, Lk, Dv)]
    options: dict[str, Any] = {"enable_gqa": group > 1, "is_causal": draw(st.booleans())}
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.0, -1.0, 0.3, 2.0]))
    if draw(st.booleans()):
        sides = st.one_of(st.none(), st.integers(0, 80))
        options["window"] = (draw(sides), draw(sides))
    if draw(st.booleans()):
        offsets = st.integers(-70, 70)
        options["query_offset"] = draw(
            st.one_of(st.just("bottom_right"), offsets, st.lists(offsets, min_size=B, max_size=B))
        )
    if draw(st.booleans()):
        options["kv_lengths"] = draw(st.lists(st.integers(0, Lk), min_size=B, max_size=B))
    if draw(st.booleans()):
        options["query_lengths"] = draw(st.lists(st.integers(0, Lq), min_size=B, max_size=B))
    kind = draw(st.sampled_from(["none", "bool", "additive", "additive with -inf"]))
    if kind != "none":
        rank = draw(st.integers(0, 4))
        full = (B, Hkv * group, Lq, Lk)[4 - rank :]
        shape = tuple(draw(st.sampled_from([n, 1])) for n in full)
        if kind == "bool":
            mask = rng.random(shape) < draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
        else:
            mask = rng.standard_normal(shape).astype(draw(st.sampled_from([np.float32, np.float64])))
            if kind == "additive with -inf":
                mask = np.where(rng.random(shape) < 0.5, mask, mask.dtype.type(-np.inf))
        mask = np.asarray(mask)
        options["attn_mask"] = IDENTITY[draw(st.sampled_from(list(IDENTITY)))](mask) if mask.ndim > 1 else mask
    return arrays, options, draw(st.sampled_from([None, (1, 1), (5, 3), (48, 2)]))


def check(call: tuple[list[np.ndarray], dict[str, Any], Any]) -> None:
    arrays, options, cut = call
    with pytest.MonkeyPatch.context() as patch:
        if cut is not None:
            keys, blocks = cut
            patch.setattr(
                forward,
                "plan",
                lambda *shape: (p := plan.plan(*shape))._replace(
                    keys=keys, blocks=blocks, tasks=-(-shape[1] // (p.block * blocks))
                ),
            )
        out, aux = scaled_dot_product_attention(*arrays, return_aux=("lse",), **options)
    if out.size:
        assert_accurate(out, aux.lse, *arrays, **options)


@given(calls())
def test_random_calls(call: Any) -> None:
    check(call)


@pytest.mark.slow
@settings(hypothesis.settings.get_profile("fixed"), max_examples=4000)
@given(calls())
def test_many_random_calls(call: Any) -> None:
    check(call)
