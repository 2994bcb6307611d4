"""The one table of problems, used by the tests and by `perf/run.py`.

A `Case` makes its own arrays from its name, so that a test, a benchmark and a peer library in another process all see
the same numbers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Case:
    """One call of scaled_dot_product_attention."""

    name: str
    Hq: int
    Lq: int
    Lk: int
    D: int
    B: int = 1
    Hkv: int | None = None
    Dv: int | None = None
    dtype: str = "float32"
    mask: str | None = None  # a name of MASKS
    options: dict[str, Any] = field(default_factory=dict)
    tags: frozenset[str] = frozenset()

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(self.name.encode()))

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Query, key and value, N(0, 1)."""
        Hkv, Dv = self.Hkv or self.Hq, self.Dv or self.D
        shapes = (self.B, self.Hq, self.Lq, self.D), (self.B, Hkv, self.Lk, self.D), (self.B, Hkv, self.Lk, Dv)
        rng = self.rng
        return tuple(rng.standard_normal(s).astype(self.dtype) for s in shapes)  # type: ignore[return-value]

    def keywords(self) -> dict[str, Any]:
        """Every other argument of the call."""
        mask = {} if self.mask is None else {"attn_mask": MASKS[self.mask](self, self.rng)}
        return {**mask, **({"enable_gqa": True} if self.Hkv else {}), **self.options}

    @property
    def causal(self) -> bool:
        return bool(self.options.get("is_causal"))

    @property
    def flop(self) -> int:
        """Of the two products, over the keys that causal, window and lengths leave; masks are not counted off."""
        D, Dv = self.D, self.Dv or self.D
        i, j = np.arange(self.Lq)[:, None], np.arange(self.Lk)
        offset = self.options.get("query_offset", 0)
        offset = self.Lk - self.Lq if offset == "bottom_right" else offset
        left, right = self.options.get("window") or (None, None)
        low = 0 if left is None else np.maximum(0, i + offset - left)
        right = 0 if self.causal else right
        high = self.Lk if right is None else np.minimum(self.Lk, i + offset + right + 1)
        pairs = int(np.maximum(0, high - low + 0 * i).sum()) if Dv and j.size else 0
        lengths = self.options.get("kv_lengths")
        if lengths is not None:
            return int(2 * self.Hq * (D + Dv) * self.Lq * np.sum(lengths))
        return 2 * self.B * self.Hq * (D + Dv) * pairs


def _blocks(case: Case, size: int) -> np.ndarray:
    """Every other square of size x size is True."""
    i, j = np.arange(case.Lq)[:, None] // size, np.arange(case.Lk) // size
    return (i + j) % 2 == 0


def _padding(case: Case) -> np.ndarray:
    lengths = np.linspace(case.Lk, case.Lk / 4, case.B).astype(int)
    return np.arange(case.Lk) < lengths[:, None, None, None]


MASKS: dict[str, Callable[[Case, np.random.Generator], np.ndarray]] = {
    "bool": lambda c, rng: rng.random((c.Lq, c.Lk)) < 0.7,
    "bool all true": lambda c, rng: np.ones((c.Lq, c.Lk), bool),
    "bool half empty": lambda c, rng: _blocks(c, 512),
    "bool small squares": lambda c, rng: _blocks(c, 7),
    "bool none": lambda c, rng: np.zeros((c.Lq, c.Lk), bool),
    "bool (B,1,1,Lk)": lambda c, rng: _padding(c),
    "bool (Lk,)": lambda c, rng: rng.random(c.Lk) < 0.5,
    "bool late keys (Lk,)": lambda c, rng: np.arange(c.Lk) >= c.Lk - 15,
    "bool upper triangle": lambda c, rng: np.arange(c.Lk) > np.arange(c.Lq)[:, None] + 5,
    "bool (Lq,1)": lambda c, rng: rng.random((c.Lq, 1)) < 0.5,
    "bool (1,1)": lambda c, rng: np.ones((1, 1), bool),
    "bool (B,Hq,Lq,Lk)": lambda c, rng: rng.random((c.B, c.Hq, c.Lq, c.Lk)) < 0.3,
    "bool (Hq,1,Lk)": lambda c, rng: rng.random((c.Hq, 1, c.Lk)) < 0.5,
    "bool transposed": lambda c, rng: (rng.random((c.Lk, c.Lq)) < 0.5).T,
    "bool reversed": lambda c, rng: (rng.random((c.Lq, c.Lk)) < 0.5)[::-1, ::-1],
    "additive": lambda c, rng: rng.standard_normal((c.Lq, c.Lk)).astype(c.dtype),
    "additive zeros": lambda c, rng: np.zeros((c.Lq, c.Lk), c.dtype),
    "additive with -inf": lambda c, rng: np.where(rng.random((c.Lq, c.Lk)) < 0.5, -np.inf, 1.5).astype(c.dtype),
    "additive lowest": lambda c, rng: np.where(rng.random((c.Lq, c.Lk)) < 0.5, np.finfo(c.dtype).min, 0).astype(
        c.dtype
    ),
    "additive (B,1,1,Lk)": lambda c, rng: np.where(_padding(c), 0, -np.inf).astype(c.dtype),
    "additive (Hq,Lq,Lk)": lambda c, rng: rng.standard_normal((c.Hq, c.Lq, c.Lk)).astype(c.dtype),
    "additive (B,1,Lq,1)": lambda c, rng: rng.standard_normal((c.B, 1, c.Lq, 1)).astype(c.dtype),
    "additive every other": lambda c, rng: rng.standard_normal((c.Lq, 2 * c.Lk)).astype(c.dtype)[:, ::2],
    "additive float64": lambda c, rng: np.where(rng.random((c.Lq, c.Lk)) < 0.5, -np.inf, rng.standard_normal()),
    "additive float32": lambda c, rng: rng.standard_normal((c.Lq, c.Lk), dtype=np.float32),
}

CAUSAL = {"is_causal": True}
_PERF = frozenset({"perf"})


def _perf(name: str, Hq: int, L: int, D: int, mask: str | None = None, tags: str = "", **rest: Any) -> Case:
    return Case(name, Hq, L, L, D, mask=mask, tags=_PERF | frozenset(tags.split()), **rest)


# What is measured.  "table": the rows of the README's comparison; "model": shapes of a sentence encoder.
PERF = [
    *(
        _perf(f"{H} x {L}, D {D}{', causal' if options else ''}", H, L, D, options=options, tags="table")
        for H, L, D in [
            (8, 512, 64),
            (8, 1024, 64),
            (8, 2048, 64),
            (8, 4096, 64),
            (2, 8192, 64),
            (8, 512, 80),
            (8, 2048, 80),
            (8, 512, 128),
            (8, 2048, 128),
            (2, 8192, 128),
        ]
        for options in ({}, CAUSAL)
    ),
    _perf("12 x 128, D 64", 12, 128, 64, tags="table model"),
    _perf("12 x 128, D 64, causal", 12, 128, 64, options=CAUSAL, tags="table model"),
    _perf("16 of 12 x 128, D 32", 12, 128, 32, B=16, tags="table model"),
    _perf("64 of 12 x 17, D 64", 12, 17, 64, B=64, tags="table model"),
    _perf("float64, 8 x 1024, D 64", 8, 1024, 64, dtype="float64", tags="table"),
    _perf("window 256, 2 x 8192, D 64", 2, 8192, 64, options={"is_causal": True, "window": (256, 0)}),
    _perf("no mask, 4 of 8 x 1024", 8, 1024, 64, B=4),
    _perf("padding mask, 4 of 8 x 1024", 8, 1024, 64, "bool (B,1,1,Lk)", B=4),
    _perf("padding lengths, 4 of 8 x 1024", 8, 1024, 64, B=4, options={"kv_lengths": np.array([1024, 768, 512, 256])}),
    _perf("full lengths, 4 of 8 x 1024", 8, 1024, 64, B=4, options={"kv_lengths": np.array([1024] * 4)}),
    _perf("bool all true, 8 x 2048", 8, 2048, 64, "bool all true"),
    _perf("bool half empty, 8 x 2048", 8, 2048, 64, "bool half empty"),
    _perf("additive, 8 x 2048", 8, 2048, 64, "additive"),
    Case("grouped 8/2 x 2048, D 64", 8, 2048, 2048, 64, Hkv=2, tags=_PERF),
    Case("one query, 8 x 4096, D 64", 8, 1, 4096, 64, tags=_PERF),
    Case("tiny, 1 x 64, D 64", 1, 1, 64, 64, tags=_PERF),
]


def _small(name: str, *shape: int, **rest: Any) -> Case:
    return Case(name, *shape, tags=frozenset({"small"}), **rest)


# What the contract of every backend runs: edges of tiles, heads, masks and intervals on small arrays.
SMALL = [
    _small("plain", 2, 70, 90, 64, B=2),
    _small("odd sizes", 3, 67, 53, 33, Dv=21, B=2),
    _small("one query", 2, 1, 77, 16),
    _small("one key", 2, 33, 1, 16),
    _small("head size 1", 1, 30, 30, 1),
    _small("head size 256", 1, 26, 50, 256, Dv=128),
    _small("value size 1", 1, 20, 31, 8, Dv=1),
    _small("D 0 gives the mean", 1, 5, 9, 0, Dv=4),
    _small("float64", 2, 40, 60, 24, Dv=17, dtype="float64"),
    _small("groups of 4", 8, 25, 40, 16, Hkv=2, B=2),
    _small("multi-query", 6, 19, 40, 16, Hkv=1),
    _small("no scale", 1, 30, 30, 16, options={"scale": 0.0}),
    _small("negative scale", 1, 30, 30, 16, options={"scale": -0.7}),
    _small("large scores", 1, 50, 200, 16, options={"scale": 30.0}),
    _small("causal", 2, 90, 90, 16, options=CAUSAL),
    _small("causal, more queries", 2, 120, 40, 16, options=CAUSAL),
    _small("causal, more keys", 2, 40, 120, 16, options=CAUSAL),
    _small("causal bottom right", 2, 40, 120, 16, options={**CAUSAL, "query_offset": "bottom_right"}),
    _small("causal bottom right, empty rows", 2, 120, 40, 16, options={**CAUSAL, "query_offset": "bottom_right"}),
    _small("causal, offsets", 2, 40, 60, 16, B=3, options={**CAUSAL, "query_offset": np.array([-30, 0, 45])}),
    _small("window", 2, 100, 110, 16, options={"window": (9, 4)}),
    _small("window left", 2, 100, 100, 16, options={"window": (13, None)}),
    _small("window right", 2, 100, 100, 16, options={"window": (None, 3)}),
    _small("window of one", 2, 60, 60, 16, options={"window": (0, 0)}),
    _small("window, causal, offset", 2, 60, 90, 16, options={**CAUSAL, "window": (20, 5), "query_offset": 17}),
    _small("window beyond the keys", 2, 60, 20, 16, options={"window": (5, 5), "query_offset": 30}),
    _small("lengths", 2, 40, 60, 16, B=4, options={"kv_lengths": [60, 1, 0, 33], "query_lengths": [40, 0, 7, 25]}),
    _small("lengths, causal", 2, 40, 60, 16, B=2, options={**CAUSAL, "kv_lengths": [13, 50], "query_lengths": 30}),
    _small(
        "lengths, bottom right",
        2,
        40,
        60,
        8,
        B=2,
        options={**CAUSAL, "kv_lengths": [13, 50], "query_offset": "bottom_right"},
    ),
    *(_small(f"mask {name}", 2, 61, 75, 16, B=2, mask=name) for name in MASKS),
    _small("mask of float64 problem", 2, 30, 45, 16, mask="additive", dtype="float64"),
    _small("bool mask of float64 problem", 2, 30, 45, 16, mask="bool", dtype="float64"),
    _small("float32 mask of float64 problem", 2, 30, 45, 16, mask="additive float32", dtype="float64"),
    _small("mask, causal, window", 2, 80, 80, 16, mask="bool", options={**CAUSAL, "window": (30, None)}),
    _small(
        "additive, causal, lengths", 2, 50, 80, 16, B=2, mask="additive", options={**CAUSAL, "kv_lengths": [80, 20]}
    ),
    _small("additive -inf, groups", 4, 50, 80, 16, Hkv=2, mask="additive with -inf"),
]
