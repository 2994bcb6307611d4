"""Random calls of scaled_dot_product_attention, all of them valid: shapes, types, storage and every option at once."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import hypothesis.strategies as st
import mods
import numpy as np
import pytest
from cases import SIXTEEN_BITS, dtype_of
from contract import STORAGE

from numba_attn.cpu import attention, plan
from numba_attn.problem import AUX_NAMES


@functools.lru_cache(maxsize=None, typed=True)
def among(*values: Any) -> st.SearchStrategy[Any]:
    """One of them: made once, as making and checking such a strategy takes longer than drawing from it."""
    return st.sampled_from(values)


IDENTITY: dict[str, Any] = {"as is": lambda x: x, **STORAGE}
DTYPES = [*(["float32"] * 3), "float64", *SIXTEEN_BITS]
# score_mod, mask_mod, the function of the block mask: few of them, as each is compiled for each dtype.
FUNCTIONS: list[tuple[Callable[..., Any] | None, ...]] = [
    *([(None, None, None)] * 4),
    (mods.relative_bias, None, None),
    (mods.by_place, mods.scattered, None),
    (None, mods.prefix, None),
    (None, None, mods.prefix),
    (mods.by_place, None, mods.scattered),
    (None, mods.scattered, mods.prefix),
]
Call = tuple[list[np.ndarray], dict[str, Any], tuple[int, int] | None]


class Sizes(NamedTuple):
    """Of a problem: batch axes, whether there is an axis of heads, and how long the others are."""

    batch: tuple[int, ...]
    has_heads: bool
    Hkv: int
    group: int
    Lq: int
    Lk: int
    D: int
    Dv: int

    @property
    def scores(self) -> tuple[int, int, int, int]:
        """(B, Hq, Lq, Lk)."""
        return math.prod(self.batch), self.Hkv * self.group, self.Lq, self.Lk

    def shape(self, heads: int, rows: int, columns: int) -> tuple[int, ...]:
        return (*self.batch, *((heads,) if self.has_heads else ()), rows, columns)


@st.composite
def four_axes(draw: st.DrawFn, most_Lq: int, most_Lk: int) -> Sizes:
    B, Hkv, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    Lq, Lk = draw(st.integers(0, most_Lq)), draw(st.integers(0, most_Lk))
    return Sizes((B,), True, Hkv, group, Lq, Lk, draw(st.integers(0, 40)), draw(st.integers(0, 40)))


@st.composite
def any_axes(draw: st.DrawFn, most_Lq: int, most_Lk: int) -> Sizes:
    """Two to five axes, any of them empty, or one of them far longer than all others."""
    few, small, sizes = st.integers(0, 3), st.integers(0, 9), st.integers(0, 40)
    axes = draw(among(2, 3, 4, 4, 5))
    batch = tuple(draw(few) for _ in range(axes - 3))
    Hkv, group = (1, 1) if axes == 2 else (draw(few), draw(st.integers(1, 3)))
    long = draw(among(None, None, "Lq", "Lk", "D", "Dv", "heads", "batch"))
    if long is None:
        Lq, Lk = draw(st.integers(0, most_Lq)), draw(st.integers(0, most_Lk))
        return Sizes(batch, axes > 2, Hkv, group, Lq, Lk, draw(sizes), draw(sizes))
    n = dict.fromkeys(("Lq", "Lk", "D", "Dv"), 0) | {name: draw(small) for name in ("Lq", "Lk", "D", "Dv")}
    if long == "batch" and batch:
        batch = (draw(st.integers(20, 90)), *batch[1:])
    elif long == "heads" and axes > 2:
        Hkv, group = draw(among((1, 40), (30, 1), (8, 5)))
    elif long in n:
        n[long] = draw(st.integers(100, 20 * (most_Lq if long.startswith("L") else 30)))
    return Sizes(batch, axes > 2, Hkv, group, **n)


@st.composite
def calls(draw: st.DrawFn, sizes: Callable[[int, int], st.SearchStrategy[Sizes]] = four_axes) -> Call:
    """Arrays, options and how to cut the problem."""
    functions = draw(among(*FUNCTIONS))
    # The reference calls functions for one element after the other.
    size = draw(sizes(60, 70) if functions == (None, None, None) else sizes(20, 36))
    dtype = dtype_of(draw(among(*DTYPES)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def stored(x: np.ndarray) -> np.ndarray:
        return IDENTITY[draw(among(*IDENTITY))](x) if x.ndim > 1 else x  # type: ignore[no-any-return]

    (B, Hq, Lq, Lk), Hkv = size.scores, size.Hkv
    shapes = size.shape(Hq, Lq, size.D), size.shape(Hkv, Lk, size.D), size.shape(Hkv, Lk, size.Dv)
    arrays = [stored(rng.standard_normal(shape).astype(dtype)) for shape in shapes]
    options: dict[str, Any] = {"enable_gqa": size.group > 1, "is_causal": draw(st.booleans())}
    if draw(st.booleans()):
        options["scale"] = draw(among(0.0, -1.0, 0.3, 2.0))
    options |= intervals(draw, B, Lq, Lk)
    mask = masks(draw, size.shape(Hq, Lq, Lk), rng, dtype)
    if mask is not None:
        options["attn_mask"] = stored(mask)
    options |= variants(draw, size.scores, rng, dtype, functions)
    options["return_aux"] = tuple(name for name in AUX_NAMES if draw(st.booleans()))
    return arrays, options, draw(among(None, (1, 1), (5, 3), (48, 2)))


def intervals(draw: st.DrawFn, B: int, Lq: int, Lk: int) -> dict[str, Any]:
    """Options that leave each row an interval of keys."""
    options: dict[str, Any] = {}
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
    return options


def masks(draw: st.DrawFn, scores: tuple[int, ...], rng: np.random.Generator, dtype: np.dtype) -> np.ndarray | None:
    kind = draw(among("none", "bool", "additive", "additive with -inf"))
    if kind == "none":
        return None
    shape = tuple(draw(among(n, 1)) for n in scores[draw(st.integers(0, len(scores))) :])
    if kind == "bool":
        return np.asarray(rng.random(shape) < draw(among(0.0, 0.1, 0.5, 0.9, 1.0)))
    mask = np.asarray(rng.standard_normal(shape))
    if kind == "additive with -inf":
        mask = np.where(rng.random(shape) < 0.5, mask, -np.inf)
    return mask.astype(draw(among(np.dtype(np.float32), np.dtype(np.float64), dtype)))


def variants(
    draw: st.DrawFn,
    scores: tuple[int, int, int, int],
    rng: np.random.Generator,
    dtype: np.dtype,
    functions: tuple[Callable[..., Any] | None, ...],
) -> dict[str, Any]:
    """Options that change scores or probabilities, and functions."""
    B, Hq = scores[:2]
    score_mod, mask_mod, block_mod = functions
    options: dict[str, Any] = {"score_mod": score_mod, "mask_mod": mask_mod}
    if block_mod is not None:
        size = draw(among((16, 16), (13, 7), (3, 5), (1, 64)))
        shape = scores if block_mod is mods.scattered else (draw(among(1, B)), 1, *scores[2:])
        options["block_mask"] = mods.blocky(block_mod, shape, size)
    if draw(st.booleans()):
        options["softcap"] = draw(among(0.5, 3.0, 50.0))
    if draw(st.booleans()):
        options["alibi_slopes"] = rng.random(draw(among((Hq,), (B, Hq)))).astype(dtype)
    if draw(st.booleans()):
        options["sinks"] = draw(among(1.0, 5.0)) * rng.standard_normal(Hq)
    if draw(st.booleans()):
        options["dropout_p"] = draw(among(0.0, 0.1, 0.5, 0.9))
        options["dropout_seed"] = draw(st.integers(0, 2**64 - 1))
    if dtype.itemsize == 4 and draw(st.integers(0, 3)) == 0:
        options["precision"] = "bfloat16"
    return options


@contextlib.contextmanager
def cut_into(tiles: tuple[int, int] | None) -> Iterator[None]:
    """Problems are computed in tiles of so many keys and tasks of so many row blocks, unless None."""
    with pytest.MonkeyPatch.context() as patch:
        if tiles is not None:
            keys, blocks = tiles
            patch.setattr(
                attention,
                "plan",
                lambda *shape: (p := plan.plan(*shape))._replace(
                    keys=keys, short=2 * keys, blocks=blocks, split=3 * keys, tasks=-(-shape[1] // (p.block * blocks))
                ),
            )
        yield
