"""Pictures of attention, by matplotlib: weights of chosen rows, entropy of heads and layers, distribution of scores.

Each function draws into `axes` if given, and returns the figure.  matplotlib is imported when one is called; neither
pyplot nor any setting of matplotlib is touched.  To install it:  pip install 'numba_attn[plot]'
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from numba_attn import checks, moments
from numba_attn.calls import DEFAULTS, check_names, prepare
from numba_attn.diagnostics import Report, diagnose, sample
from numba_attn.row_weights import attention_weights, chosen_rows

COLORS = "Blues"
SCALED, UNSCALED, MARK = "#2166ac", "#b0b7bf", "#b2182b"
MOST_LABELS = 48  # on an axis: more cannot be read
MOST_ROWS = 32  # of a picture, unless asked for
MOST_HEADS = 4

_OPTIONS = tuple(name for name in DEFAULTS if name not in ("out", "return_aux", "dropout_p", "dropout_seed"))


def heat_map(
    weights: np.ndarray,
    *,
    query_labels: Sequence[Any] | None = None,
    key_labels: Sequence[Any] | None = None,
    title: str = "",
    axes: Any = None,
) -> Any:
    """The probabilities of one head as colours.

    Parameters
    ----------
    weights : (R, Lk) array
        As `attention_weights` gives them for one sequence and head.
    query_labels, key_labels : R and Lk labels, optional
        Such as tokens, or the numbers of rows; numbers from 0 if None.  Of many, some are shown.
    title : str
    axes : matplotlib Axes, optional

    Returns
    -------
    matplotlib Figure

    Raises
    ------
    ValueError, TypeError
        Shapes that do not fit.
    ModuleNotFoundError
        matplotlib is not installed.
    """
    weights = checks.numpy_array("weights", weights)
    if weights.ndim != 2:
        raise ValueError(f"weights must have 2 axes (rows, keys), got shape {weights.shape}")
    R, Lk = weights.shape
    rows, keys = _labels("query_labels", query_labels, R), _labels("key_labels", key_labels, Lk)
    if axes is None:
        axes = _figure(3 + 0.18 * min(Lk, MOST_LABELS), 2 + 0.18 * min(R, MOST_LABELS)).subplots()
    if weights.size:
        image = axes.imshow(weights, cmap=COLORS, vmin=0, aspect="auto", interpolation="nearest")
        axes.figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01).ax.tick_params(labelsize=7)
    for axis, labels, turned in ((axes.yaxis, rows, 0), (axes.xaxis, keys, 90)):
        step = -(-len(labels) // MOST_LABELS) or 1
        axis.set_ticks(range(0, len(labels), step), labels[::step], fontsize=7, rotation=turned, parse_math=False)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("key", fontsize=8)
    axes.set_ylabel("query row", fontsize=8)
    return axes.figure


def entropy(reports: Report | Sequence[Report], *, title: str = "", axes: Any = None) -> Any:
    """The effective number of keys, exp(entropy), of each head: bars for one report, a map of layers for several.

    Parameters
    ----------
    reports : Report, or a sequence of them
        What `diagnose` has found of each layer, all with as many heads.
    title, axes
        As in `heat_map`.

    Raises
    ------
    ValueError, TypeError, ModuleNotFoundError
        Reports of layers with different numbers of heads; as in `heat_map`.
    """
    layers = list(reports) if isinstance(reports, Iterable) else [reports]
    if not layers or not all(isinstance(report, Report) for report in layers):
        raise TypeError(f"reports must be a Report or a sequence of them, got {reports!r}")
    heads = {report.shape["Hq"] for report in layers}
    if len(heads) > 1:
        raise ValueError(f"reports must be of layers with as many heads, got {sorted(heads)}")
    keys = np.array([report.effective_keys for report in layers])
    axes = _figure(5, 3).subplots() if axes is None else axes
    axes.set_title(title or "effective number of keys, exp(entropy)", fontsize=9)
    axes.set_xlabel("head", fontsize=8)
    axes.tick_params(labelsize=7)
    if not keys.size:
        return axes.figure
    if len(layers) == 1:
        bars = axes.bar(range(keys.shape[1]), keys[0], color=SCALED)
        if keys.shape[1] <= MOST_LABELS // 2:
            axes.bar_label(bars, [f"{n:.3g}" for n in keys[0]], fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        return axes.figure
    image = axes.imshow(keys, cmap=COLORS, vmin=0, aspect="auto")
    axes.set_ylabel("layer", fontsize=8)
    if keys.size <= 200:
        middle = np.nanmax(keys, initial=0) / 2
        for place, n in np.ndenumerate(keys):
            axes.text(*place[::-1], f"{n:.3g}", ha="center", va="center", fontsize=6, color="w" if n > middle else "k")
    axes.figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01).ax.tick_params(labelsize=7)
    return axes.figure


def scores(
    query: np.ndarray,
    key: np.ndarray,
    attn_mask: np.ndarray | None = None,
    *,
    sample_rows: int | None = None,
    seed: int = 0,
    title: str = "",
    axes: Any = None,
    **options: Any,
) -> Any:
    """The distribution of scores over all heads, scale * q . k beside q . k, and the normal one that the scale is for.

    Parameters
    ----------
    query, key, attn_mask, options
        As in `attention_weights`.
    sample_rows, seed
        As in `diagnose`: the scores are those of a sample of rows.
    title, axes
        As in `heat_map`.

    Raises
    ------
    ValueError, TypeError, ModuleNotFoundError
        As in `diagnose`, and in `heat_map`.
    """
    check_names("scores", options, _OPTIONS)
    key = checks.floating_array("key", key)
    run, problem = prepare(query, key, key[..., :0], attn_mask=attn_mask, **options)
    rows = sample(sample_rows, seed, problem.sizes.Lq)
    axes = _figure(5, 3).subplots() if axes is None else axes
    parts = [scores[allowed] for _, scores, allowed in moments.scores_of_rows(run, problem, rows)]
    found = np.concatenate([np.empty(0), *parts])
    found = found[np.isfinite(found)]
    if found.size:
        drawn = [("scaled", found, SCALED)]
        if problem.scale:
            drawn.insert(0, ("unscaled", found / problem.scale, UNSCALED))
        reach = max(4.0, *(float(np.quantile(np.abs(x), 0.98)) for _, x, _ in drawn))
        edges = np.linspace(-reach, reach, 161)
        for name, x, color in drawn:
            share = np.histogram(x, edges)[0] / (x.size * (edges[1] - edges[0]))
            axes.stairs(share, edges, fill=True, color=color, alpha=0.8, label=f"{name}, variance {x.var():.3g}")
        fine = np.linspace(-4, 4, 200)
        normal = np.exp(-(fine**2) / 2) / math.sqrt(2 * math.pi)
        axes.plot(fine, normal, "--", color=MARK, lw=1, label="normal, variance 1")
        axes.legend(fontsize=7, frameon=False)
    axes.set_title(title or "scores q·k, scaled and unscaled", fontsize=9)
    axes.set_yticks([])
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return axes.figure


def inspect(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    attn_mask: np.ndarray | None = None,
    *,
    report: Report | None = None,
    query_rows: Any = None,
    heads: Sequence[int] | None = None,
    sequence: int = 0,
    tokens: Sequence[Any] | None = None,
    **options: Any,
) -> Any:
    """Heat maps of some heads, the entropy of all, and the distribution of scores: one figure.

    Parameters
    ----------
    query, key, value, attn_mask, options
        As in `diagnose`.
    report : Report, optional
        What `diagnose` has found of the same, if it has been called already.
    query_rows : int, slice or ints, optional
        The rows of the heat maps; all, or as many evenly spaced as can be told apart, if None.
    heads, sequence : ints, int
        Whose heat maps; the first four heads of the first sequence.
    tokens : Lk labels of the keys, optional
        And of the rows, if there are as many.

    Returns
    -------
    matplotlib Figure

    Raises
    ------
    ValueError, TypeError, ModuleNotFoundError
        As in `diagnose` and `heat_map`.
    """
    check_names("inspect", options, _OPTIONS)
    _, problem = prepare(query, key, value, attn_mask=attn_mask, **options)
    B, Hq, _, Lq, Lk, _, _ = problem.sizes
    shown = np.arange(min(Hq, MOST_HEADS)) if heads is None else _indices("heads", heads, Hq)
    if not 0 <= checks.integer("sequence", sequence) < max(B, 1):
        raise ValueError(f"sequence must be between 0 and {max(B, 1) - 1}, got {sequence}")
    if report is not None:
        _check_report(report, Hq)
    rows = chosen_rows(slice(None, None, -(-Lq // MOST_ROWS) or 1) if query_rows is None else query_rows, Lq)
    key_labels = _labels("tokens", tokens, Lk)
    query_labels = rows.tolist() if tokens is None or Lq != Lk else [key_labels[row] for row in rows]

    lines = -(-len(shown) // 2)
    figure = _figure(11, 3.2 * lines + 2.8)
    grid = figure.add_gridspec(lines + 1, 2)
    found = diagnose(query, key, value, attn_mask, **options) if report is None else report
    of_heads = attention_weights(query, key, attn_mask, query_rows=rows, **options).reshape(B, Hq, len(rows), Lk)
    for place, h in enumerate(shown if B else ()):
        verdict = (*found.verdicts[h], f"{found.effective_keys[h]:.3g} effective keys")[0]
        heat_map(
            of_heads[sequence, h],
            query_labels=query_labels,
            key_labels=key_labels,
            title=f"head {h}, {verdict}",
            axes=figure.add_subplot(grid[place // 2, place % 2]),
        )
    entropy(found, axes=figure.add_subplot(grid[lines, 0]))
    scores(query, key, attn_mask, axes=figure.add_subplot(grid[lines, 1]), **options)
    return figure


def _check_report(report: Any, Hq: int) -> None:
    if not isinstance(report, Report):
        raise TypeError(f"report must be a Report, got {checks.type_name(report)}")
    if report.shape["Hq"] != Hq:
        raise ValueError(f"report must be of {Hq} heads, got one of {report.shape['Hq']}")


def _indices(name: str, x: Any, n: int) -> np.ndarray:
    flat = np.asarray(x).reshape(-1) if np.size(x) else np.empty(0, np.int64)
    return np.asarray(checks.integers(name, flat, flat.shape, 0, n - 1))


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("numba_attn.plot needs matplotlib: pip install 'numba_attn[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _labels(name: str, labels: Any, n: int) -> list[str]:
    try:
        found = [str(label) for label in (range(n) if labels is None else labels)]
    except TypeError:
        raise TypeError(f"{name} must be {n} labels, got {labels!r}") from None
    if len(found) != n:
        raise ValueError(f"{name} must be {n} labels, got {len(found)}")
    return found
