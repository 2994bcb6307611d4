"""The probabilities themselves, of the query rows asked for.

Each row becomes a sequence of its own that has one row.  Of such a problem the weight that each key gets, which kernels
know without the matrix of scores, is the row of probabilities, whatever the options.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from numba_attn import arrays, checks
from numba_attn.arrays import Array
from numba_attn.block_mask import MaskMod, and_masks
from numba_attn.calls import DEFAULTS, check_names, prepare
from numba_attn.problem import Problem, statistics_dtype

_OPTIONS = tuple(name for name in DEFAULTS if name not in ("out", "return_aux"))


def attention_weights(
    query: Array, key: Array, attn_mask: Any = None, *, query_rows: Any = None, **options: Any
) -> Array:
    """The probabilities softmax(scale * Q K^T + mask) of some query rows, as `scaled_dot_product_attention` has them.

    Shape letters: B batch (any number of axes, none included), Hq and Hkv heads, Lq and Lk lengths, D head size, R rows
    asked for.

    Parameters
    ----------
    query : (B, Hq, Lq, D), or (B, Lq, Hq, D) in layout "BLHD"; key : (B, Hkv, Lk, D) likewise
    attn_mask, options
        As in `scaled_dot_product_attention`, without out and return_aux.  Dropout changes nothing: these are the
        probabilities before it.
    query_rows : int, slice or (R,) ints, optional
        Of [-Lq, Lq), the same for all sequences and heads; negative ones count from the end.  All rows if None.

    Returns
    -------
    (B, Hq, R, Lk) array of query's library, in both layouts; (R, Lk) for inputs of rank 2
        Of query's dtype, but float32 for 16 bits.  A row that attends to nothing is 0; with a sink the sum of a row is
        less than 1.

    Raises
    ------
    ValueError, TypeError
        What `scaled_dot_product_attention` refuses, and rows that there are not; nothing has been computed then.

    Notes
    -----
    Time and memory are O(R Lk).  Vaswani et al., "Attention Is All You Need" (2017), equation 1.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.zeros((4, 2), np.float32)
    >>> attention_weights(x, x, is_causal=True, query_rows=[0, -1])
    array([[1.  , 0.  , 0.  , 0.  ],
           [0.25, 0.25, 0.25, 0.25]], dtype=float32)
    """
    check_names("attention_weights", options, _OPTIONS)
    call: dict[str, Any] = {"query": query, "key": key, "attn_mask": attn_mask}
    caller = arrays.adopt(call, tuple(call), on_host="for the weights of rows")
    held = checks.floating_array("key", call["key"])
    run, problem = prepare(call["query"], held, held[..., :0], attn_mask=call["attn_mask"], **options)
    weights = weights_of_rows(run, problem, chosen_rows(query_rows, problem.sizes.Lq))
    result: Array = caller.give(weights[0] if held.ndim == 2 else weights)
    return result


def weights_of_rows(run: Callable[[Problem], object], problem: Problem, rows: np.ndarray) -> np.ndarray:
    """(*batch, Hq, R, Lk) probabilities of the rows (R,) of a problem."""
    single = single_rows(problem, rows)
    run(single)
    assert single.key_weight is not None
    return single.key_weight.swapaxes(-3, -2)


def single_rows(problem: Problem, rows: np.ndarray) -> Problem:
    """The problem in which each of some rows (R,) is a sequence (*batch, R), to find the weights of keys in each."""
    batch, R, (B, Hq, *_, Lk, _, _) = problem.query.shape[:-3], len(rows), problem.sizes

    def for_each_row(x: np.ndarray) -> np.ndarray:  # (*batch, H, L, n) that all rows have
        return np.broadcast_to(x[..., None, :, :, :], (*batch, R, *x.shape[-3:]))

    mask = problem.mask
    if mask is not None:
        mask = mask[..., None, :, :, :] if mask.shape[-2] == 1 else _one_by_one(mask, rows)
    table = np.repeat(problem.intervals.table, R, axis=0)
    table[:, 1] = np.tile(rows, B) < table[:, 1]
    table[:, 0] += np.tile(rows, B)
    slopes, mask_mod, score_mod = problem.slopes, problem.mask_mod, problem.score_mod
    if problem.block_mask is not None:
        block = checks.plain_function(problem.block_mask.mask_mod)
        mask_mod = block if mask_mod is None else and_masks(mask_mod, block)
    return replace(
        problem,
        query=_one_by_one(problem.query, rows),
        key=for_each_row(problem.key),
        value=for_each_row(problem.value[..., :0]),
        mask=mask,
        intervals=replace(problem.intervals, table=table, padded=True),
        slopes=slopes if slopes is None or len(slopes) == 1 else np.repeat(slopes, R, axis=0),
        score_mod=None if score_mod is None else _score_mod_of_rows(score_mod, rows),
        mask_mod=None if mask_mod is None else _mask_mod_of_rows(mask_mod, rows),
        block_mask=None,
        dropout=None,
        out=np.empty((*batch, R, Hq, 1, 0), problem.out.dtype),
        lse=None,
        max_score=None,
        entropy=None,
        key_weight=np.empty((*batch, R, Hq, Lk), statistics_dtype(problem.query.dtype)),
    )


def _one_by_one(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(*batch, R, H, 1, n) of (*batch, H, L, n)."""
    return x[..., rows, :].swapaxes(-3, -2)[..., None, :]


def _score_mod_of_rows(mod: Callable[..., Any], rows: np.ndarray) -> Callable[..., Any]:
    def of_row(score, b, h, i, j):  # type: ignore[no-untyped-def]
        return mod(score, b // rows.size, h, rows[b % rows.size], j)

    return of_row


def _mask_mod_of_rows(mod: MaskMod, rows: np.ndarray) -> MaskMod:
    def of_row(b, h, i, j):  # type: ignore[no-untyped-def]
        return mod(b // rows.size, h, rows[b % rows.size], j)

    return of_row


def chosen_rows(query_rows: Any, Lq: int) -> np.ndarray:
    """(R,) int64 in [0, Lq)."""
    if query_rows is None:
        return np.arange(Lq)
    if isinstance(query_rows, slice):
        return np.arange(Lq)[query_rows]
    query_rows = checks.as_array("query_rows", query_rows)
    if query_rows.ndim > 1:
        raise ValueError(f"query_rows must be an integer, a slice or (R,) integers, got shape {query_rows.shape}")
    flat = query_rows.reshape(-1) if query_rows.size else np.empty(0, np.int64)
    rows = np.asarray(checks.integers("query_rows", flat, flat.shape, -Lq, Lq - 1)).astype(np.int64)
    return np.where(rows < 0, rows + Lq, rows)
