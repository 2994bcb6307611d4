"""The part of the contract that says what each option is, by what it is equal to, and what dropout does."""

from __future__ import annotations

import itertools
from typing import Any

import mods
import numpy as np
import pytest
from tolerances import assert_accurate, same_bits

from numba_attn import random, scaled_dot_product_attention
from numba_attn.problem import AUX_NAMES

B, HQ, HKV, LQ, LK = 2, 4, 2, 23, 37
SHAPE = B, HQ, LQ, LK


def arrays(dtype: Any = np.float64) -> tuple[np.ndarray, ...]:
    """Query, key and value of random numbers, with two query heads for each key head."""
    rng = np.random.default_rng(3)
    shapes = (B, HQ, LQ, 8), (B, HKV, LK, 8), (B, HKV, LK, 5)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in shapes)


def forbidden_scores(score: Any, b: int, h: int, i: int, j: int) -> Any:
    """Masks as some do it: by a score."""
    return score if (5 * i + 3 * j + b + 2 * h) % 4 < 2 else -np.inf


def allowed_scores(b: int, h: int, i: int, j: int) -> bool:
    return (5 * i + 3 * j + b + 2 * h) % 4 < 2


def same_score(score: Any, b: int, h: int, i: int, j: int) -> Any:
    return score


def always(b: int, h: int, i: int, j: int) -> bool:
    return True


def never(b: int, h: int, i: int, j: int) -> bool:
    return False


# Options for (B, 2, 20 rows or fewer, 400): what adds to scores, changes them or masks them, and together.
_ADDITIVE = np.random.default_rng(7).standard_normal((20, 400)).astype(np.float32)
RISING: dict[str, dict[str, Any]] = {
    "nothing": {},
    "softcap, additive": {"softcap": 100.0, "attn_mask": _ADDITIVE},
    "score_mod": {"score_mod": mods.nearer_is_more},
    "score_mod, additive": {"score_mod": same_score, "attn_mask": _ADDITIVE},
    "score_mod, bool": {"score_mod": mods.nearer_is_more, "attn_mask": _ADDITIVE > -0.5},
    "score_mod, alibi": {"score_mod": same_score, "alibi_slopes": np.array([-0.125, 0.25])},
    "score_mod, softcap, window": {"score_mod": same_score, "softcap": 50.0, "window": (300, 390)},
    "mask_mod, additive": {"mask_mod": mods.scattered, "attn_mask": _ADDITIVE},
    "score_mod, mask_mod, additive": {"score_mod": same_score, "mask_mod": mods.scattered, "attn_mask": _ADDITIVE},
    "block mask, sinks": {"block_mask": None, "sinks": np.zeros(2)},  # made for the number of rows
    "dropout": {"dropout_p": 0.5, "dropout_seed": 1},
}


class Variants:
    """Run on `backend`."""

    backend: str

    def run(self, *arrays: np.ndarray, **options: Any) -> Any:
        return scaled_dot_product_attention(*arrays, backend=self.backend, **options)

    def assert_alike(self, options: dict[str, Any], other: dict[str, Any], dtype: Any = np.float64) -> None:
        """A call has the accurate results of another, which is another way to ask for the same."""
        operands = arrays(dtype)
        out, aux = self.run(*operands, enable_gqa=True, return_aux=AUX_NAMES, **options)
        assert_accurate(out, aux, *operands, enable_gqa=True, **other)

    # What is equal to what ------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_mask_mod_is_a_mask(self, dtype: Any) -> None:
        for mod in (mods.prefix, mods.scattered):
            self.assert_alike({"mask_mod": mod}, {"attn_mask": mods.everywhere(mod, SHAPE)}, dtype)
        i, j = np.arange(LQ)[:, None], np.arange(LK)
        both = mods.everywhere(mods.prefix, SHAPE) & ((i + 3 - 9 <= j) & (j <= i + 3))
        options = {"mask_mod": mods.prefix, "is_causal": True, "window": (9, None), "query_offset": 3}
        self.assert_alike(options, {"attn_mask": both}, dtype)

    @pytest.mark.parametrize("size", [(16, 16), (13, 7), (1, 1), (LQ, LK), (100, 100)])
    def test_block_mask_is_a_mask(self, size: tuple[int, int]) -> None:
        for mod, b, h in (
            (mods.prefix, 1, 1),
            (mods.prefix, B, HQ),
            (mods.of_head, 1, HQ),
            (mods.of_sequence, B, 1),
            (mods.scattered, B, HQ),
        ):
            block = mods.blocky(mod, (b, h, LQ, LK), size)
            self.assert_alike({"block_mask": block}, {"attn_mask": mods.everywhere(mod, SHAPE)})

    def test_all_masks_together(self) -> None:
        given = np.random.default_rng(4).random((B, 1, LQ, LK)) < 0.8
        block = mods.blocky(mods.prefix, (1, 1, LQ, LK), (13, 7))
        options = {"attn_mask": given, "mask_mod": mods.scattered, "block_mask": block}
        both = given & mods.everywhere(mods.prefix, SHAPE) & mods.everywhere(mods.scattered, SHAPE)
        self.assert_alike(options, {"attn_mask": both})

    def test_functions_that_change_nothing(self) -> None:
        self.assert_alike({"score_mod": same_score, "mask_mod": always}, {})
        self.assert_alike({"block_mask": mods.blocky(always, (1, 1, LQ, LK), (8, 8))}, {})
        self.assert_alike({"softcap": 1e9}, {})
        self.assert_alike({"alibi_slopes": np.zeros(HQ), "sinks": np.full(HQ, -1e5)}, {})
        self.assert_alike({"dropout_p": 0.0, "dropout_seed": 5}, {})

    def test_functions_that_forbid_everything(self) -> None:
        nothing = {"attn_mask": np.zeros((1, 1), bool)}
        self.assert_alike({"mask_mod": never}, nothing)
        self.assert_alike({"block_mask": mods.blocky(never, (1, 1, LQ, LK), (8, 8))}, nothing)

    @pytest.mark.parametrize("offset", [0, 11, [-4, 60], "bottom_right"])
    def test_alibi_is_an_additive_mask(self, offset: Any) -> None:
        slopes = np.random.default_rng(5).standard_normal((B, HQ))
        first = np.broadcast_to(LK - LQ if offset == "bottom_right" else offset, B)
        position = np.arange(LQ)[:, None] + first[:, None, None, None]
        bias = -slopes[:, :, None, None] * np.abs(position - np.arange(LK))
        self.assert_alike({"alibi_slopes": slopes, "query_offset": offset}, {"attn_mask": bias})
        same = np.broadcast_to(slopes[0], (B, HQ))
        bias = -same[:, :, None, None] * np.abs(position - np.arange(LK))
        self.assert_alike({"alibi_slopes": slopes[0], "query_offset": offset}, {"attn_mask": bias})

    def test_score_mod_can_be_an_additive_mask(self) -> None:
        distance = np.arange(LQ)[:, None] - np.arange(LK)
        bias = mods.BIAS[np.arange(HQ)[:, None, None], distance % mods.BIAS.shape[1]].astype(np.float64)
        self.assert_alike({"score_mod": mods.relative_bias}, {"attn_mask": bias})
        given = np.random.default_rng(6).standard_normal((LQ, LK))
        self.assert_alike({"score_mod": mods.relative_bias, "attn_mask": given}, {"attn_mask": bias + given})

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_score_of_minus_infinity_is_masked(self, dtype: Any) -> None:
        self.assert_alike({"score_mod": forbidden_scores}, {"mask_mod": allowed_scores}, dtype)

    def test_a_sink_is_a_key_without_value(self) -> None:
        query, key, value = arrays()
        sinks = np.array([0.5, -2.0, 3.0, 0.0])
        out, aux = self.run(query, key, value, enable_gqa=True, return_aux=AUX_NAMES, sinks=sinks)
        wider = [np.concatenate([x, np.zeros_like(x[:, :, :1])], axis=2) for x in (key, value)]
        column = np.concatenate([np.zeros((HQ, LQ, LK)), np.broadcast_to(sinks[:, None, None], (HQ, LQ, 1))], axis=2)
        expected, more = self.run(query, *wider, column, enable_gqa=True, return_aux=AUX_NAMES)
        np.testing.assert_allclose(out, expected, atol=1e-13)
        np.testing.assert_allclose(aux.lse, more.lse, atol=1e-13)
        np.testing.assert_allclose(aux.entropy, more.entropy, atol=1e-13)
        np.testing.assert_allclose(aux.key_weight, more.key_weight[..., :LK], atol=1e-12)
        np.testing.assert_allclose(np.maximum(aux.max_score, sinks[:, None]), more.max_score, atol=1e-13)

    @pytest.mark.parametrize("Lq", [20, 2])
    @pytest.mark.parametrize("name", RISING)
    def test_scores_that_rise(self, name: str, Lq: int) -> None:
        """From key to key, or fall, so that what is known of the maximum must be corrected again and again."""
        rng, options = np.random.default_rng(9), dict(RISING[name])
        if "attn_mask" in options:
            options["attn_mask"] = options["attn_mask"][:Lq]
        if "block_mask" in options:
            options["block_mask"] = mods.blocky(mods.prefix, (1, 1, Lq, 400), (16, 16))
        query, key, value = (rng.standard_normal((1, 2, L, 8), dtype=np.float32) for L in (Lq, 400, 400))
        key = key * np.linspace(0.125, 6, 400, dtype=np.float32)[:, None]
        for order in (slice(None), slice(None, None, -1)):
            operands = query, np.ascontiguousarray(key[:, :, order]), value
            out, aux = self.run(*operands, return_aux=AUX_NAMES, **options)
            assert_accurate(out, aux, *operands, **options)

    def test_statistics_of_the_probabilities(self) -> None:
        """The output is the probabilities where values are unit vectors: the statistics are what they say."""
        query, key, _ = arrays()
        unit = np.broadcast_to(np.eye(LK), (B, HKV, LK, LK))
        options = {"mask_mod": mods.scattered, "enable_gqa": True}
        p, aux = self.run(query, key, unit, return_aux=AUX_NAMES, **options)
        some = p.any(axis=-1)
        assert 0 < np.count_nonzero(~some) < some.size / 4
        logarithm = np.log(p, out=np.zeros_like(p), where=p > 0)
        np.testing.assert_allclose(aux.entropy, -(p * logarithm).sum(axis=-1), atol=1e-13)
        np.testing.assert_allclose(aux.key_weight, p.sum(axis=-2), atol=1e-12)
        np.testing.assert_allclose(aux.max_score[some] - aux.lse[some], np.log(p.max(axis=-1)[some]), atol=1e-13)

    def test_no_option_is_ignored(self) -> None:
        operands = arrays()
        plain = self.run(*operands, enable_gqa=True)
        options = {
            "softcap": 0.5,
            "alibi_slopes": np.full(HQ, 0.25),
            "sinks": np.zeros(HQ),
            "score_mod": mods.by_place,
            "mask_mod": mods.scattered,
            "block_mask": mods.blocky(mods.prefix, (1, 1, LQ, LK), (13, 7)),
            "dropout_p": 0.5,
        }
        for name, option in options.items():
            assert np.abs(self.run(*operands, enable_gqa=True, **{name: option}) - plain).max() > 0.01, name

    def test_batch_axes_are_numbered_as_one(self) -> None:
        """Functions, slopes, block masks and dropout know sequences by their place in the flat batch."""
        flat = [np.concatenate([x] * 3)[:6] for x in arrays()]
        flat[0] = flat[0] + np.arange(6.0)[:, None, None, None] / 8
        options = {
            "enable_gqa": True,
            "alibi_slopes": np.linspace(-1, 1, 6 * HQ).reshape(6, HQ),
            "score_mod": mods.by_place,
            "mask_mod": mods.scattered,
            "block_mask": mods.blocky(mods.of_sequence, (6, 1, LQ, LK), (3, 5)),
            "dropout_p": 0.25,
            "dropout_seed": 11,
            "return_aux": AUX_NAMES,
        }
        expected, aux = self.run(*flat, **options)
        out, nested = self.run(*(x.reshape(3, 2, *x.shape[1:]) for x in flat), **options)
        assert same_bits(out.reshape(expected.shape), expected)
        assert same_bits(tuple(x.reshape(6, *x.shape[2:]) for x in nested), aux)

    def test_problems_without_batch_and_heads(self) -> None:
        query, key, value = (x[0] for x in arrays(np.float32))
        key, value = key.repeat(2, axis=0), value.repeat(2, axis=0)
        of_head = {"alibi_slopes": np.linspace(-1, 1, HQ), "sinks": np.linspace(0, 2, HQ)}
        options = {"score_mod": mods.nearer_is_more, "mask_mod": mods.prefix, "return_aux": AUX_NAMES}
        whole, aux = self.run(query[None], key[None], value[None], **of_head, **options)
        out, its = self.run(query, key, value, **of_head, **options)
        assert same_bits(out, whole[0]) and same_bits(tuple(x[None] for x in its), aux)
        for h in range(HQ):
            own = {name: x[h : h + 1] for name, x in of_head.items()}
            out, its = self.run(query[h], key[h], value[h], **own, **options)
            assert same_bits(out, whole[0, h]) and same_bits(its, tuple(x[0, h] for x in aux))

    # Dropout --------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    @pytest.mark.parametrize("p", [0.125, 0.5, 0.9])
    def test_dropout_drops_what_the_random_numbers_say(self, dtype: Any, p: float) -> None:
        query, key, _ = arrays(dtype)
        unit = np.broadcast_to(np.eye(LK, dtype=dtype), (B, HKV, LK, LK))
        seed = 0xFEDCBA9876543210
        options = {"scale": 0.0, "is_causal": True, "enable_gqa": True, "dropout_p": p, "dropout_seed": seed}
        out = self.run(query, key, unit, **options).astype(np.float64)
        expected = np.empty((B, HQ, LQ, LK))
        for b, h in np.ndindex(B, HQ):
            expected[b, h] = np.tri(LQ, LK) * random.kept(b, h, (LQ, LK), p, seed)
        expected /= np.arange(1, LQ + 1)[:, None] * (1 - p)
        np.testing.assert_allclose(out, expected, rtol=2e-3 if dtype == np.float16 else 1e-6)
        assert abs((out > 0).sum() / (np.tri(LQ, LK).sum() * B * HQ) - (1 - p)) < 0.05

    def test_dropout_seeds(self) -> None:
        operands = arrays(np.float32)
        options = {"enable_gqa": True, "dropout_p": 0.5}
        seeds = [0, 1, 1 << 32, (1 << 64) - 1]
        results = [self.run(*operands, dropout_seed=seed, **options) for seed in seeds]
        again = [self.run(*operands, dropout_seed=np.uint64(seed), **options) for seed in seeds]
        assert same_bits(tuple(results), tuple(again))
        assert not any(same_bits(x, y) for x, y in itertools.combinations(results, 2))

    def test_dropout_without_a_seed(self) -> None:
        operands = arrays(np.float32)
        options = {"enable_gqa": True, "dropout_p": 0.5}
        before = np.random.get_state()  # noqa: NPY002
        try:
            np.random.seed(1)  # noqa: NPY002
            first, second = (self.run(*operands, **options) for _ in range(2))
            np.random.seed(1)  # noqa: NPY002
            repeated = self.run(*operands, **options)
        finally:
            np.random.set_state(before)  # noqa: NPY002
        assert same_bits(first, repeated) and not same_bits(first, second)

    def test_dropout_leaves_the_statistics(self) -> None:
        operands = arrays(np.float32)
        options = {"enable_gqa": True, "return_aux": AUX_NAMES, "sinks": np.zeros(HQ)}
        _, expected = self.run(*operands, **options)
        _, aux = self.run(*operands, dropout_p=0.5, dropout_seed=2, **options)
        assert same_bits(aux, expected)

    def test_dropout_of_none_and_all(self) -> None:
        operands = arrays(np.float32)
        plain = self.run(*operands, enable_gqa=True)
        hardly = self.run(*operands, enable_gqa=True, dropout_p=2.0**-40, dropout_seed=3)
        np.testing.assert_allclose(hardly, plain, rtol=1e-5, atol=1e-6)
        nearly = self.run(*operands, enable_gqa=True, dropout_p=1 - 2.0**-40, dropout_seed=3)
        assert (nearly == 0).all()

    def test_dropout_keeps_the_mean(self) -> None:
        operands = arrays(np.float32)
        plain = self.run(*operands, enable_gqa=True)
        results = [self.run(*operands, enable_gqa=True, dropout_p=0.25, dropout_seed=seed) for seed in range(200)]
        assert np.abs(np.mean(results, axis=0) - plain).max() < 0.25
        assert np.abs(np.mean(results, axis=0) - plain).mean() < 0.02
