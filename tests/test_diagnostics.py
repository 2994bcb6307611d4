"""Probabilities of chosen rows, and statistics of heads, against the whole matrix of scores."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from typing import Any, NamedTuple

import mods
import numpy as np
import pytest
from cases import SMALL, Case
from contract import ALL, SOME, attended
from tolerances import DEFAULTS, same_bits

from numba_attn import attention_weights, diagnose, moments, reference
from numba_attn.diagnostics import Report
from numba_attn.problem import Problem, statistics_dtype


class Dense(NamedTuple):
    """All scores of a case, in float64: (B, Hq, Lq, Lk)."""

    weights: np.ndarray  # probabilities, before dropout
    products: np.ndarray  # scale * q . k
    largest: float  # of what scores are, finally


def dense(case: Case) -> Dense:
    problem = Problem.from_call(*case.arrays(), **{**DEFAULTS, **case.keywords()})
    weights, products, largest = [], [], [1.0]
    for b in range(case.B):
        sequence = problem.sequence(b)
        for h in range(case.Hq):
            head = reference.attend(problem, sequence, b, h)
            weights.append(head.weight)
            largest += list(np.abs(head.lse[np.isfinite(head.lse)]))
            key = sequence.key[h * len(sequence.key) // case.Hq].astype(np.float64)
            products.append(problem.scale * sequence.query[h].astype(np.float64) @ key.T)
    shape = case.B, case.Hq, case.Lq, case.Lk
    return Dense(np.reshape(weights, shape), np.reshape(products, shape), max(largest))


def without_values(case: Case) -> tuple[list[np.ndarray], dict[str, Any]]:
    return list(case.arrays()[:2]), case.keywords()


# Weights --------------------------------------------------------------------------------------------------------------


@ALL
def test_weights_are_those_of_the_softmax(case: Case) -> None:
    arrays, options = without_values(case)
    rows = [-1, *range(0, case.Lq, 7)]
    weights = attention_weights(*arrays, query_rows=rows, **options)
    expected = dense(case)
    assert weights.dtype == statistics_dtype(arrays[0].dtype)
    slack = 0.02 if options.get("precision") or case.dtype == "bfloat16" else 0
    slack += 20 * expected.largest * np.finfo(weights.dtype).eps
    np.testing.assert_allclose(weights, expected.weights[:, :, rows], atol=slack, rtol=0)
    assert (weights[~attended(case)[:, :, rows]] == 0).all()


@SOME
def test_weights_on_the_reference(case: Case) -> None:
    arrays, options = without_values(case)
    weights = attention_weights(*arrays, query_rows=[2], backend="reference", **{**options, "precision": None})
    np.testing.assert_allclose(weights, dense(case).weights[:, :, [2]], atol=1e-6)


def test_choices_of_rows() -> None:
    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((2, 3, 9, 4)), rng.standard_normal((2, 3, 11, 4))
    everything = attention_weights(query, key, is_causal=True)
    assert everything.shape == (2, 3, 9, 11)
    for rows, same in ((4, [4]), (slice(2, None, 3), [2, 5, 8]), (np.array([-1, 0]), [8, 0]), ((), [])):
        assert same_bits(attention_weights(query, key, is_causal=True, query_rows=rows), everything[:, :, same])
    swapped = attention_weights(query.swapaxes(1, 2), key.swapaxes(1, 2), is_causal=True, layout="BLHD")
    assert same_bits(swapped, everything)
    assert same_bits(attention_weights(query[0], key[0], is_causal=True), everything[0])
    assert same_bits(attention_weights(query[0, 0], key[0, 0], is_causal=True), everything[0, 0])
    five = attention_weights(query[None], key[None], is_causal=True, query_rows=[3])
    assert same_bits(five, everything[None, :, :, [3]])
    for shape in ((2, 0, 9, 4), (0, 3, 9, 4), (2, 3, 0, 4)):
        assert attention_weights(np.ones(shape), np.ones(shape)).shape == (*shape[:2], shape[2], shape[2])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"query_rows": 5}, ValueError, "query_rows must be between -5 and 4, got 5"),
        ({"query_rows": [2**70]}, ValueError, f"query_rows must be between -5 and 4, got {2**70}"),
        ({"query_rows": [0.5]}, TypeError, "query_rows must be integers"),
        ({"query_rows": [[1], [2, 3]]}, ValueError, "query_rows must be an array: "),
        ({"query_rows": [[1]]}, ValueError, "query_rows must be an integer, a slice or"),
        ({"out": None}, TypeError, "attention_weights got an unexpected option 'out'"),
        ({"softcap": -1.0}, ValueError, "softcap must be positive"),
        ({"key": [1.0]}, TypeError, "key must be a NumPy array"),
        ({"attn_mask": np.ones((3, 3), bool)}, ValueError, "attn_mask of shape"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refused_weights(options: dict[str, Any], error: type[Exception], message: str) -> None:
    x = np.ones((5, 2))
    with pytest.raises(error, match=message):
        attention_weights(**{"query": x, "key": x, **options})


# Report ---------------------------------------------------------------------------------------------------------------


def expected_report(case: Case) -> dict[str, np.ndarray]:
    weights, products, _ = dense(case)
    allowed = attended(case)
    rows = allowed.any(axis=-1)
    count = rows.sum(axis=(0, 2))
    sinks = case.options.get("sinks")
    rest = np.where(rows, 1 - weights.sum(axis=-1), 0).clip(0) if sinks is not None else np.zeros(rows.shape)
    with np.errstate(all="ignore"):

        def p_log_p(p: np.ndarray) -> np.ndarray:
            return np.where(p == 0, 0, p * np.log(p))

        def mean(x: np.ndarray) -> np.ndarray:
            return np.where(rows, x, 0).sum(axis=(0, 2)) / count

        entropy = mean(-p_log_p(weights).sum(axis=-1) - p_log_p(rest))
        most = np.maximum(weights.max(axis=-1), rest)
        pairs = allowed.sum(axis=(0, 2, 3))
        products = np.where(allowed, products, 0)
        score_mean = products.sum(axis=(0, 2, 3)) / pairs
        found = {
            "rows": count,
            "entropy": entropy,
            "effective_keys": np.exp(entropy),
            "evenness": np.where(entropy > 1e-3, mean(-np.log(most)) / entropy, np.nan),
            "saturation": mean(weights.max(axis=-1) > 0.99),
            "first_key": mean(weights[..., 0]),
            "key_weight": weights.sum(axis=(0, 2)) / count[:, None],
            "score_mean": score_mean,
            "score_variance": (products**2).sum(axis=(0, 2, 3)) / pairs - score_mean**2,
        }
        return found | ({} if sinks is None else {"sink": mean(rest)})


@ALL
def test_report_is_that_of_the_matrix(case: Case) -> None:
    """With every row in the sample, moments too; and the same without the weights of keys."""
    arrays, options = case.arrays(), case.keywords()
    report = diagnose(*arrays, key_weight=True, sample_rows=1000, **options)
    close = {"float64": 1e-9, "bfloat16": 2e-2}.get(case.dtype, 2e-2 if options.get("precision") else 2e-4)
    for name, expected in expected_report(case).items():
        got = getattr(report, name)
        np.testing.assert_allclose(got, expected, rtol=close, atol=close, err_msg=name, equal_nan=True)
    masked = any(options.get(name) is not None for name in ("attn_mask", "mask_mod", "block_mask"))
    assert report.sampled_rows == (case.Lq if masked else None)
    assert (report.sink is None) == ("sinks" not in options)
    plain = diagnose(*arrays, sample_rows=1000, **options)
    assert plain.key_weight is None
    for name in ("entropy", "first_key", "score_variance", "similarity"):
        assert same_bits(getattr(plain, name), getattr(report, name))


LONG: dict[str, dict[str, Any]] = {
    "everything": {},
    "causal": {"is_causal": True},
    "causal, bottom right": {"is_causal": True, "query_offset": "bottom_right"},
    "causal, offsets": {"is_causal": True, "query_offset": [-300, 170]},
    "narrow window": {"window": (9, 3)},
    "wide window": {"window": (400, 30)},
    "left side": {"window": (None, 20)},
    "right side": {"window": (150, None)},
    "lengths": {"query_lengths": [500, 130], "kv_lengths": [222, 700], "is_causal": True},
    "window beyond the keys": {"window": (5, 5), "query_offset": 600},
}


@pytest.mark.parametrize("name", LONG)
def test_moments_of_many_blocks(name: str) -> None:
    """Ranges of keys that move on over blocks of rows, what no range has being NaN."""
    case = Case(name, 4, 500, 700, 8, B=2, Hkv=2, dtype="float64", options=LONG[name])
    query, key, value = case.arrays()
    expected = expected_report(case)
    allowed = attended(case)
    key[~allowed.reshape(2, 2, 2, 500, 700).any(axis=(2, 3))] = np.nan
    query[~allowed.any(axis=-1)] = np.nan
    report = diagnose(query, key, value, enable_gqa=True, **LONG[name])
    for moment in ("score_mean", "score_variance"):
        np.testing.assert_allclose(getattr(report, moment), expected[moment], rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(report.unscaled_variance, 8 * expected["score_variance"], rtol=1e-11)
    assert report.sampled_rows is None


def test_a_sample_of_rows() -> None:
    """It is the sample that a seed says, in pieces that fit in memory, and near what all rows give."""
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, 2, 900, 16))
    mask = rng.random((900, 900)) < 0.5
    found = [diagnose(query, key, value, mask, seed=seed) for seed in (0, 0, 1)]
    assert found[0].sampled_rows == 16
    assert same_bits(found[0].score_variance, found[1].score_variance)
    assert not same_bits(found[0].score_variance, found[2].score_variance)
    whole = diagnose(query, key, value, mask, sample_rows=900)
    some = diagnose(query, key, value, mask, sample_rows=200)
    np.testing.assert_allclose(some.score_variance, whole.score_variance, rtol=0.1)
    assert not same_bits(some.score_variance, whole.score_variance)
    assert same_bits(some.entropy, whole.entropy)


@pytest.mark.parametrize(
    "case",
    [c for c in SMALL if c.name in ("lengths", "mask bool", "everything at once, float64")],
    ids=lambda case: case.name,
)
def test_what_is_masked_changes_nothing(case: Case) -> None:
    (query, key, value), options = case.arrays(), case.keywords()
    expected = diagnose(query, key, value, key_weight=True, **options)
    allowed = attended(case)
    unused = ~allowed.reshape(case.B, key.shape[1], -1, case.Lq, case.Lk).any(axis=(2, 3))
    key[unused] = value[unused] = np.nan
    query[~allowed.any(axis=-1)] = np.nan
    report = diagnose(query, key, value, key_weight=True, **options)
    assert report.to_dict() == expected.to_dict()


def test_memory_is_not_that_of_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "SCORES", 1 << 16)
    query, key, value = np.random.default_rng(0).standard_normal((3, 2, 3000, 8), dtype=np.float32)
    everything = query.shape[1] * key.shape[1] * 4
    for options in ({"is_causal": True}, {"attn_mask": np.arange(3000) % 3 > 0}):
        diagnose(query, key, value, **options)
        tracemalloc.start()
        diagnose(query, key, value, sample_rows=1000, **options)
        attention_weights(query, key, query_rows=[0, 7], **options)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < everything / 4, f"{peak} bytes"


def test_rows_that_a_finite_mask_leaves_out() -> None:
    """Padding as masks of -1e9 have it is not what a head does."""
    query, key, value = np.random.default_rng(9).standard_normal((3, 2, 40, 8), dtype=np.float32)
    padding = (np.arange(40) >= 25)[:, None]
    got, expected = (
        diagnose(query, key, value, np.where(padding, x, 0).astype(np.float32) + np.zeros(40, np.float32))
        for x in (-1e9, -np.inf)
    )
    assert got.rows.tolist() == [25, 25]
    for name in ("entropy", "saturation", "first_key"):
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=1e-5, err_msg=name)


def test_layouts_and_ranks() -> None:
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, 2, 3, 40, 8))
    report = diagnose(query, key, value, is_causal=True)
    swapped = diagnose(*(x.swapaxes(1, 2) for x in (query, key, value)), is_causal=True, layout="BLHD")
    for field in dataclasses.fields(report):
        if isinstance(x := getattr(report, field.name), np.ndarray):
            np.testing.assert_allclose(getattr(swapped, field.name), x, atol=1e-14, rtol=1e-12)
    assert swapped.shape == report.shape
    one = diagnose(query[0, 0], key[0, 0], value[0, 0])
    assert one.shape["Hq"] == 1 and one.rows.tolist() == [40]


# Verdicts -------------------------------------------------------------------------------------------------------------


def heads(**changes: Any) -> Report:
    """The report on six heads, of which 2 is changed as said: whole arrays (50, 16)."""
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, 6, 50, 16))
    for name, change in changes.items():
        array = {"query": query, "key": key, "value": value}[name]
        array[2] = change(array) if callable(change) else change
    return diagnose(query, key, value)


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, ""),
        ({"value": 0.0}, "dead: the result is zero"),
        ({"key": 0.0}, "uniform: every key has the same weight"),
        (
            {"key": lambda key: 40 * key[2]},
            "saturated: 70% of rows attend to one key; scores spread widely: variance 1",
        ),
        ({"query": lambda query: 3.2 * query[2]}, "scores spread widely: variance 11.7"),
        ({"query": lambda query: 0.05 * query[2]}, "uniform: every key"),
        ({"key": np.nan}, "not finite: results are NaN or infinite"),
        ({"query": 1.0, "key": lambda key: np.eye(50, 16)[:, :1] * 40}, "saturated: 100% of rows"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_verdicts(changes: dict[str, Any], verdict: str) -> None:
    report = heads(**changes)
    assert "; ".join(report.verdicts[2]).startswith(verdict) and bool(verdict) == bool(report.verdicts[2])
    assert not any(report.verdicts[h] for h in (0, 1, 3, 4, 5))
    line = str(report).splitlines()[2 + 2]
    assert line.split("  ")[-1] == ("; ".join(report.verdicts[2]) or "fine")


def test_verdicts_on_the_first_key_sinks_and_twins() -> None:
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, 3, 50, 16))
    query[1], key[1], value[1] = query[0], key[0], -2 * value[0]
    report = diagnose(query, key, value)
    assert report.similarity[1, 0] == pytest.approx(-1) and not any(report.verdicts)
    value[1] *= -1
    assert diagnose(query, key, value).verdicts[1] == ("duplicate: its result is that of head 0",)
    key[2, :, 0], query[2, :, 0] = np.arange(50) == 0, 20
    report = diagnose(query, key, value)
    assert report.verdicts[2] == (f"first key: it has {report.first_key[2]:.0%} of the weight",)
    report = diagnose(query, key, value, sinks=np.array([-9.0, 9.0, -9.0]))
    assert report.verdicts[1][0] == f"sink: it has {report.sink[1]:.0%} of the weight"
    assert diagnose(query, key, value, np.zeros((1, 1), bool)).verdicts == (("no row attends to a key",),) * 3


def test_report_as_text_and_as_json() -> None:
    query, key, value = np.random.default_rng(0).standard_normal((3, 2, 30, 8))
    report = diagnose(query, key, value, mask_mod=mods.not_later, key_weight=True)
    text = str(report).splitlines()
    assert text[0] == "B 1, Hq 2, Hkv 2, Lq 30, Lk 30, D 8, Dv 8, scale 0.3536; scores are those of 16 rows"
    assert text[1].split()[:3] == ["head", "entropy", "keys"] and len(text) == 2 + 2 + 2
    assert text[4].startswith("head 0, keys with most of the weight: 0 ")
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert found["shape"] == {"B": 1, "Hq": 2, "Hkv": 2, "Lq": 30, "Lk": 30, "D": 8, "Dv": 8}
    np.testing.assert_array_equal(found["key_weight"], report.key_weight)
    empty = diagnose(query[:, :0], key, value).to_dict()
    assert empty["entropy"] == [None, None] and empty["rows"] == [0, 0]
    none = diagnose(query, key[:, :0], value[:, :0], key_weight=True)
    assert none.verdicts == (("no row attends to a key",),) * 2 and str(none)
    no_elements = diagnose(query, key, value[..., :0])
    assert np.isnan(no_elements.magnitude).all() and no_elements.verdicts == diagnose(query, key, value).verdicts


@pytest.mark.parametrize("Hkv", [0, 2])
@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"attn_mask": np.tri(9, dtype=bool)}], ids=["exact", "sampled"]
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_report_on_no_heads(Hkv: int, options: dict[str, Any], backend: str) -> None:
    query, key = np.ones((2, 0, 9, 4)), np.ones((2, Hkv, 9, 4))
    report = diagnose(query, key, key, key_weight=True, enable_gqa=True, backend=backend, **options)
    assert report.verdicts == () and len(str(report).splitlines()) == 2
    assert report.score_variance.shape == (0,) and report.similarity.shape == (0, 0)
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sample_rows": 0}, ValueError, "sample_rows must be 1 or more, got 0"),
        ({"seed": -1}, ValueError, "seed must be 0 or more, got -1"),
        ({"seed": 0.5}, TypeError, "seed must be integers"),
        ({"key_weight": 1}, TypeError, "key_weight must be True or False"),
        ({"return_aux": ()}, TypeError, "diagnose got an unexpected option 'return_aux'"),
        ({"scale": np.inf}, ValueError, "scale must be finite"),
        ({"backend": "gpu"}, ValueError, "backend must be"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refused_diagnoses(options: dict[str, Any], error: type[Exception], message: str) -> None:
    x = np.ones((5, 2))
    with pytest.raises(error, match=message):
        diagnose(x, x, x, **options)
