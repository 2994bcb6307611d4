"""The reference keeps the contract too, and agrees with the formula written out by hand."""

from __future__ import annotations

import math

import mods
import numpy as np
from contract import Contract

from numba_attn import random, scaled_dot_product_attention, scaled_dot_product_attention_vjp
from numba_attn.problem import AUX_NAMES


class TestReference(Contract):
    backend = "reference"


def test_formula() -> None:
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, 5, 4))
    score = query @ key.T / 2
    weight = np.exp(score) / np.exp(score).sum(axis=1, keepdims=True)
    out, aux = scaled_dot_product_attention(query, key, value, backend="reference", return_aux=("lse",))
    np.testing.assert_allclose(out, weight @ value, rtol=1e-13)
    np.testing.assert_allclose(aux.lse, np.log(np.exp(score).sum(axis=1)), rtol=1e-13)


def test_causal_by_hand() -> None:
    value = np.arange(4.0)[:, None]
    zeros = np.zeros((4, 2))
    out = scaled_dot_product_attention(zeros, zeros, value, is_causal=True, backend="reference")
    np.testing.assert_allclose(out[:, 0], [0, 0.5, 1, 1.5])
    out = scaled_dot_product_attention(
        zeros[:2], zeros, value, is_causal=True, query_offset="bottom_right", backend="reference"
    )
    np.testing.assert_allclose(out[:, 0], [1, 1.5])
    out = scaled_dot_product_attention(zeros, zeros, value, window=(1, 0), backend="reference")
    np.testing.assert_allclose(out[:, 0], [0, 0.5, 1.5, 2.5])


def test_every_option_by_hand() -> None:
    """One number after the other, from the words of the interface."""
    rng = np.random.default_rng(1)
    B, Hq, Hkv, Lq, Lk, D, Dv = 2, 4, 2, 7, 10, 3, 2
    query, key, value = (rng.standard_normal(s) for s in ((B, Hq, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv)))
    mask = rng.standard_normal((Hq, Lq, Lk))
    mask[rng.random(mask.shape) < 0.1] = -np.inf
    slopes, sinks = rng.random((B, Hq)), rng.standard_normal(Hq)
    offset, kv_lengths, query_lengths = [2, 0], [10, 8], [7, 5]
    out, aux = scaled_dot_product_attention(
        query,
        key,
        value,
        mask,
        0.25,
        True,
        0.9,
        True,
        query_offset=offset,
        window=(5, 3),
        query_lengths=query_lengths,
        kv_lengths=kv_lengths,
        softcap=1.5,
        alibi_slopes=slopes,
        sinks=sinks,
        score_mod=mods.by_place,
        mask_mod=mods.prefix,
        block_mask=mods.blocky(mods.scattered, (B, Hq, Lq, Lk), (2, 3)),
        dropout_seed=77,
        return_aux=AUX_NAMES,
        backend="reference",
    )
    weights = np.zeros((B, Hq, Lk))
    empty = 0
    for b, h, i in np.ndindex(B, Hq, Lq):
        score = {}
        for j in range(kv_lengths[b]):
            position = i + offset[b]
            seen = i < query_lengths[b] and position - 5 <= j <= position and mask[h, i, j] > -np.inf
            if seen and mods.prefix(b, h, i, j) and mods.scattered(b, h, i, j):
                s = 0.9 * float(query[b, h, i] @ key[b, h // 2, j])
                s = 1.5 * math.tanh(s / 1.5) - slopes[b, h] * abs(position - j) + mask[h, i, j]
                score[j] = float(mods.by_place(s, b, h, i, j))
        empty += not score
        total = math.fsum(math.exp(s) for s in [*score.values(), sinks[h]])
        p = {j: math.exp(s) / total for j, s in score.items()}
        sink = math.exp(sinks[h]) / total
        kept = random.kept(b, h, (Lq, Lk), 0.25, 77)[i]
        expected = sum((p[j] / 0.75 * value[b, h // 2, j] for j in p if kept[j]), np.zeros(Dv))
        np.testing.assert_allclose(out[b, h, i], expected, atol=1e-14)
        np.testing.assert_allclose(aux.lse[b, h, i], math.log(total), atol=1e-14)
        assert math.isclose(aux.max_score[b, h, i], max(score.values(), default=-math.inf), abs_tol=1e-14)
        entropy = -math.fsum(x * math.log(x) for x in [*p.values(), sink])
        np.testing.assert_allclose(aux.entropy[b, h, i], entropy, atol=1e-14)
        for j in p:
            weights[b, h, j] += p[j]
    np.testing.assert_allclose(aux.key_weight, weights, atol=1e-14)
    assert 0 < empty < B * Hq * Lq / 2


def test_large_scores_lose_nothing_of_the_entropy() -> None:
    x, sinks = np.zeros((1, 2, 4)), np.array([-1e30])
    options = {"attn_mask": np.full((2, 2), -1e30), "return_aux": ("entropy",), "backend": "reference"}
    _, aux = scaled_dot_product_attention(x, x, x, **options)
    np.testing.assert_allclose(aux.entropy, np.log(2))
    _, aux = scaled_dot_product_attention(x, x, x, sinks=sinks, **options)
    np.testing.assert_allclose(aux.entropy, np.log(3))
    options.pop("return_aux")
    _, vjp = scaled_dot_product_attention_vjp(x, x, x, sinks=sinks, **options)
    np.testing.assert_allclose(vjp(x, np.ones((1, 2))).sinks, 2 / 3)
