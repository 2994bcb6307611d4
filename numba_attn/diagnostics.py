"""What the heads of an attention do, found out without the matrix of scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from numba_attn import checks, moments
from numba_attn.block_mask import and_masks
from numba_attn.calls import DEFAULTS, check_names, prepare
from numba_attn.problem import STATISTICS, Problem, statistics_dtype

SATURATED = 0.99
"""A row whose largest probability is above this is saturated: its softmax has next to no gradient."""
SATURATED_HEAD = 0.5
"""Of its rows, or more, are saturated."""
EVEN_HEAD = 0.95
"""Or more is what the largest probability, as nats, has of the entropy: keys have the same weight, however many."""
FIRST_KEY_HEAD = 0.5
"""Of the weight, or more, is on the first key."""
WIDE, NARROW = 9.0, 0.01
"""Variances of scores, of which 1 is meant: three times the standard deviation, and a tenth."""
DUPLICATE = 0.999
"""The cosine between results of two heads."""

_OPTIONS = tuple(name for name in DEFAULTS if name not in ("out", "return_aux"))


@dataclass(frozen=True, eq=False)
class Report:
    """What `diagnose` has found: a number for each query head, (Hq,) float64, of all sequences and rows together.

    Rows that attend to no key do not count.  What is not there, for want of rows or elements, is NaN.
    """

    shape: dict[str, int]
    """The sizes B, Hq, Hkv, Lq, Lk, D and Dv."""
    scale: float
    """Of the scores."""
    rows: np.ndarray
    """How many rows attend to keys."""
    entropy: np.ndarray
    """Mean of -sum(p log(p)), in nats, a sink included."""
    effective_keys: np.ndarray
    """exp(entropy): among how many keys the weight would be divided so if they had equal parts."""
    evenness: np.ndarray
    """Mean of -log(max(p)) divided by the entropy: 1 where all weights of a row are the same; NaN for no entropy."""
    saturation: np.ndarray
    """The share of rows of which one key has more than 0.99 of the weight."""
    score_mean: np.ndarray
    """Of scale * q . k over the pairs attended to: before a cap, biases and functions."""
    score_variance: np.ndarray
    """Likewise.  It is 1 where elements of q and k are independent, of variance 1, and the scale is 1 / sqrt(D)."""
    unscaled_variance: np.ndarray
    """Of q . k: without scale it is what the softmax would have to bear, D in the same case."""
    sampled_rows: int | None
    """How many rows these three are from; None for all."""
    first_key: np.ndarray
    """The share of the weight that key 0 has."""
    sink: np.ndarray | None
    """The share of the weight that the sink has; None without sinks."""
    magnitude: np.ndarray
    """Root mean square of the result."""
    similarity: np.ndarray
    """(Hq, Hq): the cosine between the results of two heads."""
    key_weight: np.ndarray | None
    """(Hq, Lk): the share of the weight that each key has; None if not asked for."""

    @cached_property
    def verdicts(self) -> tuple[tuple[str, ...], ...]:
        """What is remarkable about each head, most serious first; nothing for most heads of a healthy model."""
        return tuple(tuple(_verdicts(self, h)) for h in range(self.shape["Hq"]))

    def to_dict(self) -> dict[str, Any]:
        """All of it as what JSON has: lists, and None for what is not finite."""
        found = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        return {**found, "verdicts": [list(of_head) for of_head in self.verdicts]}

    def __str__(self) -> str:
        """A table with a line for each head, and what is remarkable."""
        sample = "" if self.sampled_rows is None else f"; scores are those of {self.sampled_rows} rows"
        lines = [
            ", ".join(f"{name} {n}" for name, n in self.shape.items()) + f", scale {self.scale:.4g}" + sample,
            "head  entropy    keys  saturated  first key  score variance  unscaled  verdict",
        ]
        for h in range(self.shape["Hq"]):
            lines.append(
                f"{h:4}  {self.entropy[h]:7.3f}  {self.effective_keys[h]:6.4g}  {self.saturation[h]:9.1%}  "
                f"{self.first_key[h]:9.1%}  {self.score_variance[h]:14.3g}  {self.unscaled_variance[h]:8.3g}  "
                + ("; ".join(self.verdicts[h]) or "fine")
            )
        if self.key_weight is not None and self.shape["Lk"]:
            for h, weight in enumerate(self.key_weight):
                most = ", ".join(f"{j} {weight[j]:.1%}" for j in np.argsort(-weight, kind="stable")[:3])
                lines.append(f"head {h}, keys with most of the weight: {most}")
        return "\n".join(lines)


def diagnose(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    attn_mask: np.ndarray | None = None,
    *,
    key_weight: bool = False,
    sample_rows: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Report:
    """Entropy, saturation, spread of scores and other statistics of each head, with a verdict.

    Parameters
    ----------
    query, key, value, attn_mask, options
        As in `scaled_dot_product_attention`, without out and return_aux.
    key_weight : bool
        Also find the weight of each key, which takes about as long as all the rest.
    sample_rows : int, optional
        Where masks other than causal, window and lengths decide what is attended to, mean and variance of scores are
        those of so many rows, drawn without replacement; a 64th of the rows, and at least 16, if None.  Without such
        masks they are exact.
    seed : int
        Of that draw.

    Returns
    -------
    Report
        `print` makes a table of it, `to_dict` what JSON takes.

    Raises
    ------
    ValueError, TypeError
        What `scaled_dot_product_attention` refuses; nothing has been computed then.

    Notes
    -----
    Everything comes from one pass of attention with the statistics of its rows, and from sums of O(L D^2): of size
    Lq x Lk there is nothing.  The weight of a row's largest key is exp(max_score - lse), that of its first key
    exp(score - lse) with the score of an attention to that key alone.  Rows whose largest score is below -5e5 (float64
    -3e14), as a mask of -1e9 leaves rows of padding, are not counted: what is added to scores is lost in it.

    The variance of scores and its reason for the scale: Vaswani et al., "Attention Is All You Need" (2017), section
    3.2.1.  Weight on the first key: Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (2023).

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> query, key, value = rng.standard_normal((3, 2, 500, 64))
    >>> key[1] = 0
    >>> print(diagnose(query, key, value))
    B 1, Hq 2, Hkv 2, Lq 500, Lk 500, D 64, Dv 64, scale 0.125
    head  entropy    keys  saturated  first key  score variance  unscaled  verdict
       0    5.725   306.3       0.0%       0.2%           0.993      63.6  fine
       1    6.215     500       0.0%       0.2%               0         0  uniform: every key has the same weight
    """
    check_names("diagnose", options, _OPTIONS)
    names = (*STATISTICS, *(("key_weight",) if checks.flag("key_weight", key_weight) else ()))
    run, problem = prepare(query, key, value, attn_mask=attn_mask, return_aux=names, **options)
    rows = sample(sample_rows, seed, problem.sizes.Lq)

    run(problem)
    B, Hq, _, Lq, Lk, _, Dv = problem.sizes
    lse, max_score, entropy = (
        x.reshape(B, Hq, Lq).astype(np.float64) for x in (problem.lse, problem.max_score, problem.entropy)  # type: ignore[union-attr]
    )  # fmt: skip
    attending = ~(max_score <= -1 / (16 * np.finfo(problem.max_score.dtype).eps))  # type: ignore[union-attr]
    count = attending.sum(axis=(0, 2))

    def mean(x: np.ndarray) -> np.ndarray:
        return x.sum(axis=(0, 2), where=attending) / count

    sums = moments.exact(problem)
    sampled = None
    if sums is None:
        sampled, sums = len(rows), moments.sampled(run, problem, rows)
    with np.errstate(all="ignore"):
        largest = np.exp(max_score - lse)
        narrowest = np.maximum(largest, 0 if problem.sinks is None else np.exp(problem.sinks[:, None] - lse))
        mean_entropy = mean(entropy)
        score_mean, variance = sums.moments()
        out = problem.out.reshape(B, Hq, Lq * Dv)
        products = sum((x @ x.T for x in out.astype(statistics_dtype(out.dtype), copy=False)), np.zeros((Hq, Hq)))
        lengths = np.sqrt(np.diagonal(products))
        return Report(
            shape=problem.sizes._asdict(),
            scale=problem.scale,
            rows=count,
            entropy=mean_entropy,
            effective_keys=np.exp(mean_entropy),
            evenness=mean(-np.log(np.minimum(narrowest, 1))) / np.where(mean_entropy < 1e-3, np.nan, mean_entropy),
            saturation=mean(np.where(np.isnan(largest), np.nan, largest > SATURATED)),
            score_mean=score_mean,
            score_variance=variance,
            unscaled_variance=variance / np.square(problem.scale),
            sampled_rows=sampled,
            first_key=mean(np.exp(_first_scores(run, problem) - lse)),
            sink=None if problem.sinks is None else mean(np.exp(problem.sinks[:, None] - lse)),
            magnitude=lengths / np.sqrt(count * Dv),
            similarity=products / (lengths[:, None] * lengths),
            key_weight=None if problem.key_weight is None else _shares(problem.key_weight.reshape(B, Hq, Lk), count),
        )


def sample(sample_rows: Any, seed: Any, Lq: int) -> np.ndarray:
    """Rows in order."""
    wanted = max(16, Lq // 64) if sample_rows is None else checks.at_least("sample_rows", sample_rows, 1)
    seed = checks.at_least("seed", seed, 0)
    return np.sort(np.random.default_rng(seed).choice(Lq, min(wanted, Lq), replace=False))


def _first_scores(run: Callable[[Problem], object], problem: Problem) -> np.ndarray:
    """(B, Hq, Lq): the score of key 0, after everything that changes scores; -inf where it is not attended to."""
    B, Hq, _, Lq, Lk, _, _ = problem.sizes
    scores = np.full(problem.query.shape[:-1], -np.inf, statistics_dtype(problem.query.dtype))
    if Lk:
        table = problem.intervals.table.copy()
        table[:, 2] = table[:, 2].clip(max=1)
        mask_mod = problem.mask_mod
        if problem.block_mask is not None:
            block = checks.plain_function(problem.block_mask.mask_mod)
            mask_mod = block if mask_mod is None else and_masks(mask_mod, block)
        first = replace(
            problem,
            key=problem.key[..., :1, :],
            value=problem.value[..., :1, :0],
            mask=None if problem.mask is None else problem.mask[..., :1],
            intervals=replace(problem.intervals, table=table),
            mask_mod=mask_mod,
            block_mask=None,
            dropout=None,
            out=np.empty((*problem.query.shape[:-1], 0), problem.out.dtype),
            lse=None,
            max_score=scores,
            entropy=None,
            key_weight=None,
        )
        run(first)
    return scores.reshape(B, Hq, Lq).astype(np.float64)


def _shares(weight: np.ndarray, count: np.ndarray) -> np.ndarray:
    return weight.sum(axis=0, dtype=np.float64) / count[:, None]


def _verdicts(report: Report, h: int) -> list[str]:
    if not report.rows[h]:
        return ["no row attends to a key"]
    no_elements = report.shape["Dv"] == 0
    if not (np.isfinite(report.entropy[h]) and (no_elements or np.isfinite(report.magnitude[h]))):
        return ["not finite: results are NaN or infinite"]
    found = []
    if report.magnitude[h] <= 1e-6 * report.magnitude.max(initial=0, where=np.isfinite(report.magnitude)):
        found.append("dead: the result is zero")
    if report.evenness[h] >= EVEN_HEAD:
        found.append("uniform: every key has the same weight")
    if report.saturation[h] >= SATURATED_HEAD:
        found.append(f"saturated: {report.saturation[h]:.0%} of rows attend to one key")
    if report.first_key[h] >= FIRST_KEY_HEAD:
        found.append(f"first key: it has {report.first_key[h]:.0%} of the weight")
    if report.sink is not None and report.sink[h] >= FIRST_KEY_HEAD:
        found.append(f"sink: it has {report.sink[h]:.0%} of the weight")
    if report.score_variance[h] > WIDE:
        found.append(f"scores spread widely: variance {report.score_variance[h]:.3g} where 1 is meant")
    if report.score_variance[h] < NARROW and report.evenness[h] < EVEN_HEAD:
        found.append(f"scores hardly differ: variance {report.score_variance[h]:.2g} where 1 is meant")
    twins = np.flatnonzero(report.similarity[h, :h] > DUPLICATE)
    if twins.size:
        found.append(f"duplicate: its result is that of head {twins[0]}")
    return found


def _plain(x: Any) -> Any:
    if isinstance(x, np.ndarray):
        return _plain(x.tolist())
    if isinstance(x, list):
        return [_plain(item) for item in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
