"""The reference keeps the contract too, and agrees with the formula written out by hand."""

from __future__ import annotations

import numpy as np
from contract import Contract

from numba_attn import scaled_dot_product_attention


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
