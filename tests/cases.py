"""The one table of problems, used by the tests and by `perf/run.py`.

A `Case` makes its own arrays from its name, so that a test, a benchmark and a peer library in another process all see
the same numbers.
"""

from __future__ import annotations

import importlib
import importlib.util
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mods
import numpy as np

from numba_attn.block_mask import PARTIAL, create_block_mask, documents


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
    dtype: str = "float32"  # or another name that `dtype_of` knows
    mask: str | None = None  # a name of MASKS
    options: dict[str, Any] = field(default_factory=dict)
    tags: frozenset[str] = frozenset()
    documents: int = 0  # that each sequence is packed from, if any: then there is a block mask of them
    forms: tuple[str, ...] = ()  # of the same problem, beside the plain one: what else to measure

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(zlib.crc32(self.name.encode()))

    @property
    def numpy_dtype(self) -> np.dtype:
        return dtype_of(self.dtype)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Query, key and value, N(0, 1)."""
        Hkv, Dv = self.Hkv or self.Hq, self.Dv or self.D
        shapes = (self.B, self.Hq, self.Lq, self.D), (self.B, Hkv, self.Lk, self.D), (self.B, Hkv, self.Lk, Dv)
        rng = self.rng
        return tuple(rng.standard_normal(s).astype(self.numpy_dtype) for s in shapes)  # type: ignore[return-value]

    def keywords(self) -> dict[str, Any]:
        """Every other argument of the call."""
        mask: dict[str, Any] = {} if self.mask is None else {"attn_mask": MASKS[self.mask](self, self.rng)}
        if self.documents:
            mask["block_mask"] = create_block_mask(documents(self.document_ids()), Lq=self.Lq, Lk=self.Lk)
        return {**mask, **({"enable_gqa": True} if self.Hkv else {}), **self.options}

    def document_ids(self) -> np.ndarray:
        """(Lk,) which document each position is of: the last is three times as long as the first."""
        ends = np.cumsum(np.linspace(0.5, 1.5, self.documents) * self.Lk / self.documents)
        return np.searchsorted(np.round(ends[:-1]), np.arange(self.Lk), side="right")

    @property
    def causal(self) -> bool:
        return bool(self.options.get("is_causal"))

    @property
    def flop(self) -> int:
        """Of the two products, over the keys that causal, window, lengths and documents leave; masks do not count."""
        D, Dv = self.D, self.Dv or self.D
        if self.documents:
            return 2 * self.B * self.Hq * (D + Dv) * int((np.bincount(self.document_ids()) ** 2).sum())
        i = np.arange(self.Lq)[:, None]
        offset = self.options.get("query_offset", 0)
        offset = self.Lk - self.Lq if offset == "bottom_right" else offset
        left, right = self.options.get("window") or (None, None)
        low = 0 if left is None else np.maximum(0, i + offset - left)
        right = 0 if self.causal else right
        lengths = np.broadcast_to(self.options.get("kv_lengths", self.Lk), self.B)
        high = lengths if right is None else np.minimum(lengths, i + offset + right + 1)
        attended = np.where(i < self.options.get("query_lengths", self.Lq), np.maximum(0, high - low), 0)
        return 2 * self.Hq * (D + Dv) * int(attended.sum())

    @property
    def kv_bytes(self) -> int:
        """Of keys and values."""
        D = self.D + (self.Dv or self.D)
        return self.B * (self.Hkv or self.Hq) * self.Lk * D * self.numpy_dtype.itemsize


def dtype_of(name: str) -> np.dtype:
    """A dtype by its name, of which NumPy knows that of bfloat16 once ml_dtypes has been imported."""
    if name == "bfloat16":
        importlib.import_module("ml_dtypes")
    return np.dtype(name)


def _blocks(case: Case, size: int) -> np.ndarray:
    """Every other square of size x size is True."""
    i, j = np.arange(case.Lq)[:, None] // size, np.arange(case.Lk) // size
    return (i + j) % 2 == 0


def _padding(case: Case) -> np.ndarray:
    lengths = np.linspace(case.Lk, case.Lk / 4, case.B).astype(int)
    return np.arange(case.Lk) < lengths[:, None, None, None]


def tree_parents(nodes: int) -> np.ndarray:
    """Of a tree in which each node has two children, level by level."""
    return (np.arange(nodes) - 1) // 2


def _tree(case: Case) -> np.ndarray:
    """The queries are the nodes of a tree, whose keys come after those that all of them attend to."""
    ancestors = np.eye(case.Lq, dtype=bool)
    for node, parent in list(enumerate(tree_parents(case.Lq)))[1:]:
        ancestors[node] |= ancestors[parent]
    return np.concatenate([np.ones((case.Lq, case.Lk - case.Lq), bool), ancestors], axis=1)


def _half(case: Case, rng: np.random.Generator, lowest: float) -> np.ndarray:
    return np.where(rng.random((case.Lq, case.Lk)) < 0.5, lowest, 0.5)


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
    "bool tree": lambda c, rng: _tree(c),
    "bool reversed": lambda c, rng: (rng.random((c.Lq, c.Lk)) < 0.5)[::-1, ::-1],
    "additive": lambda c, rng: rng.standard_normal((c.Lq, c.Lk)).astype(c.numpy_dtype),
    "additive zeros": lambda c, rng: np.zeros((c.Lq, c.Lk), c.numpy_dtype),
    "additive with -inf": lambda c, rng: np.where(rng.random((c.Lq, c.Lk)) < 0.5, -np.inf, 1.5).astype(c.numpy_dtype),
    "additive lowest": lambda c, rng: np.where(rng.random((c.Lq, c.Lk)) < 0.5, np.finfo(c.numpy_dtype).min, 0).astype(
        c.numpy_dtype
    ),
    "additive lowest, left padding": lambda c, rng: np.where(
        _padding(c)[..., ::-1], 0, np.finfo(c.numpy_dtype).min
    ).astype(c.numpy_dtype),
    "additive (B,1,1,Lk)": lambda c, rng: np.where(_padding(c), 0, -np.inf).astype(c.numpy_dtype),
    "additive (Hq,Lq,Lk)": lambda c, rng: rng.standard_normal((c.Hq, c.Lq, c.Lk)).astype(c.numpy_dtype),
    "additive (B,1,Lq,1)": lambda c, rng: rng.standard_normal((c.B, 1, c.Lq, 1)).astype(c.numpy_dtype),
    "additive every other": lambda c, rng: rng.standard_normal((c.Lq, 2 * c.Lk)).astype(c.numpy_dtype)[:, ::2],
    "additive float64": lambda c, rng: np.where(rng.random((c.Lq, c.Lk)) < 0.5, -np.inf, rng.standard_normal()),
    "additive float32": lambda c, rng: rng.standard_normal((c.Lq, c.Lk), dtype=np.float32),
    "additive float32 lowest": lambda c, rng: _half(c, rng, np.finfo(np.float32).min).astype(np.float32),
    "additive float64 lowest": lambda c, rng: _half(c, rng, np.finfo(np.float64).min),  # -inf in float32
}

SIXTEEN_BITS = ["float16", *(["bfloat16"] if importlib.util.find_spec("ml_dtypes") else [])]
CAUSAL = {"is_causal": True}
_PERF = frozenset({"perf"})


def _perf(name: str, Hq: int, L: int, D: int, mask: str | None = None, tags: str = "", **rest: Any) -> Case:
    return Case(name, Hq, L, L, D, mask=mask, tags=_PERF | frozenset(tags.split()), **rest)


def _option(name: str, *sizes: int, mask: str | None = None, forms: tuple[str, ...] = (), **rest: Any) -> Case:
    """What costs or saves something, beside the same arrays without it."""
    return _perf(name, *sizes, mask=mask, forms=("plain", *forms), **rest)


def _tilted(score: Any, b: int, h: int, i: int, j: int) -> Any:
    return score + 0.001 * (i - j)


def _slopes(*shape: int) -> np.ndarray:
    """As ALiBi has them, 2 ** (-8 (h + 1) / Hq), and for each sequence others."""
    heads = np.exp2(-8 * np.arange(1, shape[-1] + 1) / shape[-1])
    return (heads if len(shape) == 1 else heads * np.linspace(1, 2, shape[0])[:, None]).astype(np.float32)


def _decode(Hq: int, Hkv: int, Lk: int, D: int, B: int = 1, dtype: str = "float32") -> Case:
    name = f"{'' if dtype == 'float32' else f'{dtype}, '}one token, {_sizes(Hq, Hkv, Lk, D, B)}"
    shared = None if Hkv == Hq else Hkv
    return Case(name, Hq, 1, Lk, D, B=B, Hkv=shared, dtype=dtype, tags=_PERF | {"decode", "reads"})


def _cache(what: str, Hq: int, Lq: int, Hkv: int, Lk: int, D: int, **rest: Any) -> Case:
    shared = None if Hkv == Hq else Hkv
    return Case(f"{what}, {_sizes(Hq, Hkv, Lk, D)}", Hq, Lq, Lk, D, Hkv=shared, tags=_PERF | {"cache", "reads"}, **rest)


def _sizes(Hq: int, Hkv: int, Lk: int, D: int, B: int = 1) -> str:
    return f"{f'{B} of ' if B > 1 else ''}{Hq}/{Hkv} x {Lk}, D {D}"


def _packed() -> Case:
    lengths = np.random.default_rng(0).integers(10, 1000, 64, endpoint=True)
    options = {**CAUSAL, "query_lengths": lengths, "kv_lengths": lengths}
    name = "lengths 10 to 1000, 64 of 8, D 64, causal"
    return _perf(name, 8, 1000, 64, B=64, options=options, forms=("varlen", "loop", "padded"), tags="cache")


def _forms(L: int, D: int) -> tuple[str, ...]:
    """What else is measured of a row of the table: gradients of moderate lengths, what heads do of a great one."""
    if L in (1024, 2048) and D != 80:
        return ("gradient", "backward")
    return ("diagnose",) if (L, D) == (8192, 64) else ()


def _narrow(dtype: str, H: int, L: int, D: int, options: dict[str, Any]) -> Case:
    name = f"{dtype}, {H} x {L}, D {D}{', causal' * bool(options)}"
    forms = ("as float32", *(_forms(L, D) if dtype == "bfloat16" and H == 8 else ()))
    return _perf(name, H, L, D, tags="narrow", dtype=dtype, options=options, forms=forms)


LAST_OF_16384 = {**CAUSAL, "query_offset": 16384 - 16}
# Forms of a cache, and what is done with it.
CACHES = "float32", *SIXTEEN_BITS[1:], "int8", "int4", "int8 float32", "int4 float32", "paged", "masked", "weights"

# What is measured.  "table": the rows of the README's comparison; "model": shapes of a sentence encoder; "narrow": of
# 16-bit types; "variant": what changes scores, probabilities or results; "decode": one new token, with the keys of a
# cache; "cache": what a cache or a batch may look like; "reads": those of both in which reading keys and values, which
# no processor's caches hold, is what takes time.
PERF = [
    *(
        _perf(
            f"{H} x {L}, D {D}{', causal' * bool(options)}", H, L, D, None, "table", options=options, forms=_forms(L, D)
        )
        for D, sizes in [
            (64, [(8, 512), (8, 1024), (8, 2048), (8, 4096), (2, 8192)]),
            (80, [(8, 512), (8, 2048)]),
            (128, [(8, 512), (8, 1024), (8, 2048), (2, 8192)]),
        ]
        for H, L in sizes
        for options in ({}, CAUSAL)
    ),
    _perf("12 x 128, D 64", 12, 128, 64, tags="table model", forms=("layer",)),
    _perf("12 x 128, D 64, causal", 12, 128, 64, options=CAUSAL, tags="table model"),
    _perf("16 of 12 x 128, D 32", 12, 128, 32, B=16, tags="table model", forms=("layer",)),
    _perf("64 of 12 x 17, D 64", 12, 17, 64, B=64, tags="table model", forms=("layer",)),
    _perf("float64, 8 x 1024, D 64", 8, 1024, 64, dtype="float64", tags="table"),
    _option(
        "window 256, 2 x 8192, D 64",
        2,
        8192,
        64,
        options={"is_causal": True, "window": (256, 0)},
        forms=("full causal",),
    ),
    _perf("no mask, 4 of 8 x 1024", 8, 1024, 64, B=4),
    _option("padding mask, 4 of 8 x 1024", 8, 1024, 64, mask="bool (B,1,1,Lk)", B=4),
    _option(
        "padding lengths, 4 of 8 x 1024", 8, 1024, 64, B=4, options={"kv_lengths": np.array([1024, 768, 512, 256])}
    ),
    _option("full lengths, 4 of 8 x 1024", 8, 1024, 64, B=4, options={"kv_lengths": np.array([1024] * 4)}),
    _option("bool all true, 8 x 2048", 8, 2048, 64, mask="bool all true"),
    _option("bool half empty, 8 x 2048", 8, 2048, 64, mask="bool half empty"),
    _option("additive, 8 x 2048", 8, 2048, 64, mask="additive", forms=("gradient", "backward")),
    Case("grouped 8/2 x 2048, D 64", 8, 2048, 2048, 64, Hkv=2, tags=_PERF),
    Case("16 new rows, 32/8 x 16384, D 128", 32, 16, 16384, 128, Hkv=8, options=LAST_OF_16384, tags=_PERF),
    Case("32 rows, 1 x 65536, D 64", 1, 32, 65536, 64, tags=_PERF),
    Case("one query, 8 x 4096, D 64", 8, 1, 4096, 64, tags=_PERF),
    Case("tiny, 1 x 64, D 64", 1, 1, 64, 64, tags=_PERF),
    *(
        _narrow(dtype, H, L, D, options)
        for dtype, D, sizes in [
            ("bfloat16", 64, [(8, 512), (8, 2048), (12, 128), (2, 8192)]),
            ("bfloat16", 128, [(8, 2048)]),
            ("float16", 64, [(8, 2048)]),
        ]
        if dtype in SIXTEEN_BITS
        for H, L in sizes
        for options in ({}, *([CAUSAL] if L == 2048 else []))
    ),
    *(
        _option(f"{name}, 8 x 2048, D 64", 8, 2048, 64, options=options, tags="variant")
        for name, options in {
            "softcap": {"softcap": 50.0},
            "alibi": {"alibi_slopes": _slopes(8)},
            "sinks": {"sinks": np.linspace(-1, 1, 8, dtype=np.float32)},
            "score_mod": {"score_mod": _tilted},
            "dropout 0.1": {"dropout_p": 0.1, "dropout_seed": 1},
            "lse, max_score, entropy": {"return_aux": ("lse", "max_score", "entropy")},
            "key_weight": {"return_aux": ("key_weight",)},
        }.items()
    ),
    _option("documents, 16 in 2 x 8192, D 64", 2, 8192, 64, documents=16, tags="variant"),
    *(
        _decode(*sizes, dtype=dtype)
        for dtype in ("float32", *SIXTEEN_BITS[1:])
        for sizes in [
            (32, 32, 4096, 128),
            (32, 32, 8192, 128),
            (32, 8, 16384, 128),
            (32, 8, 32768, 64),
            (28, 4, 32768, 128),
            (32, 4, 32768, 128),
            (16, 16, 4096, 64, 8),
            (32, 8, 4096, 128, 8),
            (14, 2, 16384, 64, 8),
            (32, 4, 16384, 128, 8),
        ]
    ),
    *(
        case
        for sizes in [(32, 8192, 128), (8, 16384, 128)]
        for case in (
            _cache("caches", 32, 1, *sizes, forms=CACHES),
            _cache("tree of 8", 32, 8, *sizes, mask="bool tree", forms=("function", "token")),
        )
    ),
    _packed(),
]


def _gpu(
    name: str, Hq: int, L: int, D: int, B: int = 1, dtype: str = "bfloat16", rows: int | None = None, **rest: Any
) -> Case:
    name = f"{dtype}, {f'{B} of ' if B > 1 else ''}{name}"
    return Case(name, Hq, L if rows is None else rows, L, D, B=B, dtype=dtype, **rest)


# What `perf/run.py --backend cuda` measures; names say as much as above.  "decode": bound by reading keys and values.
GPU = [
    *(
        _gpu(f"{H} x {L}, D {D}{', causal' * bool(options)}", H, L, D, B, dtype, options=options)
        for dtype, H, L, D, B in [
            ("bfloat16", 16, 8192, 128, 2),
            ("bfloat16", 16, 2048, 128, 8),
            ("bfloat16", 32, 8192, 64, 2),
            ("bfloat16", 8, 8192, 256, 2),
            ("float16", 16, 8192, 128, 2),
            ("float32", 8, 2048, 64, 2),
        ]
        for options in ({}, CAUSAL)
    ),
    _gpu("32/8 x 8192, D 128, causal", 32, 8192, 128, Hkv=8, options=CAUSAL),
    _gpu("16 x 8192, D 128, window 512", 16, 8192, 128, 2, options={"is_causal": True, "window": (512, 0)}),
    _gpu("16 x 8192, D 128, softcap", 16, 8192, 128, 2, options={"softcap": 50.0}),
    _gpu("16 x 8192, D 128, ALiBi, causal", 16, 8192, 128, 2, options={**CAUSAL, "alibi_slopes": _slopes(16)}),
    *(
        _gpu(f"one token, {Hq}/{Hkv} x {L}, D {D}", Hq, L, D, B, rows=1, Hkv=Hkv, tags=frozenset({"decode"}))
        for Hq, Hkv, L, D, B in [(64, 8, 8192, 128, 32), (32, 8, 32768, 128, 1), (32, 32, 4096, 128, 8)]
    ),
]


def _small(name: str, *shape: int, **rest: Any) -> Case:
    return Case(name, *shape, tags=frozenset({"small"}), **rest)


def _variant(name: str, *shape: int, options: dict[str, Any] | None = None, **rest: Any) -> Case:
    """A small case; what is no field of `Case` is an option of the call."""
    fields = {key: rest.pop(key) for key in ("B", "Hkv", "Dv", "dtype", "mask") if key in rest}
    return _small(name, *shape, options={**(options or {}), **rest}, **fields)


def _softcap() -> list[Case]:
    cap = {"softcap": 3.0, "scale": 0.8}
    return [
        _variant("softcap", 2, 40, 70, 16, B=2, options=cap),
        _variant("softcap, causal, additive", 2, 50, 60, 16, mask="additive", is_causal=True, options=cap),
        _variant("softcap, additive with -inf", 2, 30, 60, 16, mask="additive with -inf", options=cap),
        _variant("softcap, window, groups", 4, 50, 60, 16, Hkv=2, window=(9, 4), query_offset=5, options=cap),
        _variant("softcap, lengths", 2, 30, 50, 16, B=3, kv_lengths=[50, 0, 17], query_lengths=25, options=cap),
        _variant("softcap, float64", 2, 30, 50, 24, dtype="float64", options=cap),
        _variant("softcap of large scores", 1, 40, 90, 16, softcap=20.0, scale=30.0),
        _variant("softcap near 0", 1, 20, 50, 16, softcap=0.01),
        _variant("softcap far above the scores", 1, 40, 60, 16, softcap=1e4),
        _variant("softcap, negative scale", 1, 30, 40, 16, mask="bool", softcap=2.0, scale=-1.5),
    ]


def _alibi() -> list[Case]:
    four, batch = {"alibi_slopes": _slopes(4)}, {"alibi_slopes": _slopes(3, 2)}
    bottom_right = {**batch, **CAUSAL, "query_offset": "bottom_right", "kv_lengths": [60, 9, 41]}
    any_sign = np.array([-0.25, 0.0, 1.5], np.float16)
    return [
        _variant("alibi", 4, 40, 60, 16, B=2, options=four),
        _variant("alibi, causal", 4, 60, 60, 16, is_causal=True, options=four),
        _variant("alibi, offset", 4, 30, 60, 16, query_offset=23, options=four),
        _variant("alibi, far offset", 4, 20, 60, 16, query_offset=3000, options=four),
        _variant("alibi per batch", 2, 30, 60, 16, B=3, options=batch),
        _variant("alibi per batch, offsets", 2, 40, 60, 16, B=3, query_offset=[-30, 0, 45], options=batch),
        _variant("alibi, bottom right, lengths", 2, 40, 60, 16, B=3, options=bottom_right),
        _variant("alibi, window, groups", 4, 50, 70, 16, Hkv=2, window=(11, 6), query_offset=9, options=four),
        _variant("alibi, additive, softcap", 4, 30, 50, 16, mask="additive", softcap=2.0, options=four),
        _variant("alibi of any sign", 3, 30, 40, 8, alibi_slopes=any_sign),
        _variant("alibi, float64", 4, 30, 50, 16, dtype="float64", is_causal=True, alibi_slopes=1.0 / _slopes(4)),
    ]


def _sinks() -> list[Case]:
    two, four = {"sinks": np.array([0.5, -1.25], np.float32)}, {"sinks": np.linspace(-3, 4, 4)}
    return [
        _variant("sinks", 2, 40, 60, 16, B=2, options=two),
        _variant("sinks, empty rows", 2, 60, 30, 16, is_causal=True, query_offset="bottom_right", options=two),
        _variant("sinks, no keys", 2, 20, 30, 16, mask="bool none", options=two),
        _variant("sinks and lengths", 2, 30, 40, 16, B=3, kv_lengths=[40, 0, 9], query_lengths=21, options=two),
        _variant("sinks, groups, causal, mask", 4, 50, 50, 16, Hkv=2, mask="bool", is_causal=True, options=four),
        _variant("sinks above and below all scores", 2, 20, 40, 16, sinks=np.array([60.0, -1e4])),
        _variant("sinks, softcap, negative scale", 2, 30, 40, 16, softcap=1.0, scale=-0.7, options=two),
        _variant("sinks, large scores", 2, 30, 90, 16, scale=30.0, options=two),
        _variant("sinks, float64", 4, 30, 40, 16, dtype="float64", options=four),
    ]


def _functions() -> list[Case]:
    near, place, bias = ({"score_mod": f} for f in (mods.nearer_is_more, mods.by_place, mods.relative_bias))
    later, prefix, scattered = ({"mask_mod": f} for f in (mods.not_later, mods.prefix, mods.scattered))
    packed = mods.documents(np.arange(50) // 12, (np.arange(45) + 5) // 15)
    return [
        _variant("score_mod", 2, 40, 50, 16, options=near),
        _variant("score_mod of place", 4, 25, 40, 16, Hkv=2, B=2, options=place),
        _variant("score_mod of an array", 3, 35, 50, 16, options=bias),
        _variant("score_mod, causal, mask", 2, 35, 50, 16, mask="bool", is_causal=True, query_offset=9, options=bias),
        _variant("score_mod, softcap, alibi", 4, 20, 40, 16, softcap=2.0, alibi_slopes=_slopes(4), options=place),
        _variant("score_mod, additive, lengths", 2, 30, 40, 16, B=2, mask="additive", kv_lengths=[40, 9], options=near),
        _variant("score_mod, float64", 2, 30, 40, 16, dtype="float64", options=place),
        _variant("mask_mod", 2, 45, 60, 16, options=prefix),
        _variant("mask_mod, causal by hand", 2, 50, 40, 16, options=later),
        _variant("mask_mod of place, empty rows", 4, 30, 40, 16, Hkv=2, B=2, options=scattered),
        _variant("mask_mod of arrays", 1, 50, 45, 16, mask_mod=packed),
        _variant("mask_mod, window, offset", 2, 40, 45, 16, window=(12, None), query_offset=3, options=prefix),
        _variant("mask_mod, bool, lengths", 2, 35, 40, 16, B=2, mask="bool", kv_lengths=[40, 23], options=prefix),
        _variant("mask_mod, float64", 2, 30, 40, 16, dtype="float64", options=scattered),
        _variant("score_mod, mask_mod, sinks", 2, 30, 45, 16, sinks=np.array([1.0, -1.0]), options={**bias, **prefix}),
    ]


def _block_masks() -> list[Case]:
    mask, P, S = mods.blocky, mods.prefix, mods.scattered
    of_sequence = mask(mods.of_sequence, (3, 1, 30, 45), (5, 6))
    all_partial = mask(P, (1, 1, 40, 50), (16, 16))
    all_partial.states[...] = PARTIAL
    small = {"block_mask": mask(P, (1, 1, 40, 50), (16, 16))}
    return [
        _variant("block mask", 2, 45, 60, 16, B=2, block_mask=mask(P, (1, 1, 45, 60), (16, 16))),
        _variant("block mask of 13 x 7", 2, 45, 60, 16, block_mask=mask(P, (1, 1, 45, 60), (13, 7))),
        _variant("block mask of 1 x 1", 1, 20, 30, 16, block_mask=mask(P, (1, 1, 20, 30), (1, 1))),
        _variant("block mask of one tile", 2, 30, 45, 16, block_mask=mask(P, (1, 1, 30, 45), (64, 128))),
        _variant("block mask, not later", 1, 40, 70, 16, block_mask=mask(mods.not_later, (1, 1, 40, 70), (16, 16))),
        _variant("block mask of places", 4, 30, 45, 16, Hkv=2, B=2, block_mask=mask(S, (2, 4, 30, 45), (13, 7))),
        _variant("block mask of heads", 3, 30, 45, 16, B=2, block_mask=mask(mods.of_head, (1, 3, 30, 45), (4, 7))),
        _variant("block mask of sequences", 2, 30, 45, 16, B=3, block_mask=of_sequence),
        _variant("block mask of partial tiles", 2, 40, 50, 16, block_mask=all_partial),
        _variant("block mask, mask_mod", 2, 40, 50, 16, mask_mod=S, options=small),
        _variant("block mask, score_mod", 2, 40, 50, 16, B=2, score_mod=mods.relative_bias, options=small),
        _variant("block mask, lengths", 2, 40, 50, 16, B=2, kv_lengths=[50, 13], query_lengths=[33, 40], options=small),
        _variant("block mask, causal, bool", 2, 40, 50, 16, mask="bool", is_causal=True, query_offset=4, options=small),
        _variant("block mask, float64", 2, 40, 50, 16, dtype="float64", options=small),
    ]


def _dropout() -> list[Case]:
    some = {"dropout_p": 0.3, "dropout_seed": 7}
    window = {"window": (17, 6), "query_offset": "bottom_right"}
    return [
        _variant("dropout", 2, 40, 61, 16, B=2, dropout_p=0.1, dropout_seed=0),
        _variant("dropout of nearly all", 2, 40, 70, 16, dropout_p=0.9, dropout_seed=(1 << 64) - 1),
        _variant("dropout, causal, groups", 4, 50, 50, 16, Hkv=2, is_causal=True, dropout_p=0.5, dropout_seed=1 << 32),
        _variant("dropout, mask, sinks", 2, 40, 50, 16, mask="bool", sinks=np.ones(2), options=some),
        _variant("dropout, lengths, window", 2, 30, 60, 16, B=2, kv_lengths=[60, 22], options={**some, **window}),
        _variant("dropout, float64", 2, 40, 50, 16, dtype="float64", options=some),
    ]


def _bfloat16_products() -> list[Case]:
    rounded = {"precision": "bfloat16"}
    return [
        _variant("bfloat16 products", 2, 60, 90, 64, B=2, options=rounded),
        _variant("bfloat16 products, odd sizes", 4, 47, 53, 33, Hkv=2, Dv=21, is_causal=True, options=rounded),
        _variant("bfloat16 products, additive", 2, 40, 50, 16, mask="additive", softcap=3.0, options=rounded),
        _variant("bfloat16 products, lengths", 2, 40, 50, 16, B=2, kv_lengths=[50, 0], options=rounded),
        _variant("bfloat16 products, dropout", 2, 40, 50, 16, dropout_p=0.3, dropout_seed=1, options=rounded),
    ]


def _sixteen_bits(dtype: str) -> list[Case]:
    def small(rest: str, *shape: int, **keywords: Any) -> Case:
        return _variant(f"{dtype}{rest}", *shape, dtype=dtype, **keywords)

    capped = {"softcap": 3.0, "alibi_slopes": _slopes(2), "sinks": np.array([0.5, -1.0], np.float32)}
    block_mask = mods.blocky(mods.prefix, (1, 1, 30, 40), (13, 7))
    return [
        small("", 2, 60, 80, 64, B=2),
        small(", odd sizes", 3, 47, 53, 33, Dv=21, B=2),
        small(", one query", 2, 1, 77, 16),
        small(", one query, many keys", 4, 1, 1100, 36, Hkv=2, Dv=64),
        small(", few queries, many keys", 4, 3, 777, 64, Hkv=2, Dv=36),
        small(", few queries, head size 80", 8, 2, 301, 80, Hkv=2, B=2, kv_lengths=[301, 77]),
        small(", one query, bool", 4, 1, 301, 64, Hkv=2, mask="bool"),
        small(", value size 1", 1, 20, 31, 8, Dv=1),
        small(", groups, causal", 4, 50, 50, 16, Hkv=2, is_causal=True),
        small(", additive, window", 2, 40, 50, 16, mask="additive", window=(20, 9)),
        small(", additive with -inf", 2, 40, 50, 16, B=2, mask="additive with -inf"),
        small(", mask beyond its range", 2, 40, 50, 16, mask="additive float32 lowest"),
        small(", mask beyond float32", 2, 40, 50, 16, mask="additive float64 lowest"),
        small(", float64 mask", 2, 40, 50, 16, mask="additive float64"),
        small(", window of odd places", 2, 151, 133, 16, window=(13, 4)),
        small(", bool, lengths", 2, 40, 50, 16, B=2, mask="bool", kv_lengths=[50, 9], query_lengths=[40, 0]),
        small(", large scores", 1, 40, 90, 16, scale=30.0),
        small(", softcap, alibi, sinks", 2, 40, 50, 16, options=capped),
        small(", dropout", 2, 40, 50, 16, dropout_p=0.3, dropout_seed=3),
        small(", score_mod, mask_mod", 2, 30, 40, 16, score_mod=mods.relative_bias, mask_mod=mods.prefix),
        small(", block mask", 2, 30, 40, 16, block_mask=block_mask),
    ]


def _everything(dtype: str) -> Case:
    B, Hq, Lq, Lk = 2, 4, 37, 50
    options = {
        **CAUSAL, "scale": 0.4, "query_offset": [11, 3], "window": (31, 2), "query_lengths": [37, 20],
        "kv_lengths": [50, 33], "softcap": 2.5, "alibi_slopes": _slopes(B, Hq), "sinks": np.linspace(-2, 1, Hq),
        "score_mod": mods.relative_bias, "mask_mod": mods.prefix,
        "block_mask": mods.blocky(mods.scattered, (B, Hq, Lq, Lk), (13, 7)), "dropout_p": 0.2, "dropout_seed": 5,
    }  # fmt: skip
    name, mask = f"everything at once, {dtype}", "additive with -inf"
    return _variant(name, Hq, Lq, Lk, 16, B=B, Hkv=2, Dv=11, dtype=dtype, mask=mask, options=options)


LONG_WINDOW = {"window": (8900, 0), "query_offset": "bottom_right"}
# What the contract of every backend runs: edges of tiles, heads, masks and intervals on small arrays.
SMALL = [
    _small("plain", 2, 70, 90, 64, B=2),
    _small("odd sizes", 3, 67, 53, 33, Dv=21, B=2),
    _small("one query", 2, 1, 77, 16),
    _small("one query, many keys", 4, 1, 1100, 36, Hkv=2, Dv=64),
    _small("one query, many keys, float64", 4, 1, 1100, 36, Hkv=2, Dv=64, dtype="float64"),
    _small("few queries, many keys", 4, 3, 777, 64, Hkv=2, Dv=36),
    _small("one query, 4500 keys", 4, 1, 4500, 20, Hkv=2, Dv=16),
    _variant("few queries, 9000 keys, window", 2, 3, 9000, 8, Hkv=1, B=2, kv_lengths=[9000, 5000], **LONG_WINDOW),
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
    *_softcap(),
    *_alibi(),
    *_sinks(),
    *_functions(),
    *_block_masks(),
    *_dropout(),
    *_bfloat16_products(),
    *(case for dtype in SIXTEEN_BITS for case in _sixteen_bits(dtype)),
    *(_everything(dtype) for dtype in ("float32", "float64", *SIXTEEN_BITS)),
]
