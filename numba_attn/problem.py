"""One call of attention, validated: every check and every error message is here, and nowhere else.

Shape letters, the same in the whole package: B batch, Hq and Hkv query and key-value heads, Lq and Lk lengths, D head
size, Dv value head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from numba_attn import checks
from numba_attn.block_mask import BlockMask, check_reach
from numba_attn.kept import kept
from numba_attn.masks import MOST_OFFSET, UNBOUNDED, KeyIntervals
from numba_attn.storage import Storage

STATISTICS = ("lse", "max_score", "entropy")  # one number for each query row
AUX_NAMES = (*STATISTICS, "key_weight")
_PLACE = ("b", "h", "i", "j")
MOD_PARAMETERS = {"score_mod": ("score", *_PLACE), "score_mod_grad": ("score", *_PLACE), "mask_mod": _PLACE}


class Aux(NamedTuple):
    """Results beside the output, one for each name in `return_aux`; the others are None.

    The first three are (B, Hq, Lq), or (B, Lq, Hq) in layout "BLHD": one number for each query row.
    """

    lse: Any = None
    """log(sum(exp(score))), natural logarithm, the sink included; -inf for a row that attends to nothing."""
    max_score: Any = None
    """The largest score of a key; -inf for a row that attends to nothing, NaN where one is NaN or infinity."""
    entropy: Any = None
    """-sum(p log(p)) of the softmax, in nats, the sink included; 0 for a row that attends to nothing."""
    key_weight: Any = None
    """(B, Hq, Lk), or (B, Lk, Hq): each key's probability, summed over the query rows; dropout left out."""


class Dropout(NamedTuple):
    """Probabilities are dropped as the random numbers of `numba_attn.random` say."""

    p: float
    seed: int  # of 64 bits


class Sizes(NamedTuple):
    """The shape letters of a problem; Lq and Lk are those of the longest sequence."""

    B: int
    Hq: int
    Hkv: int
    Lq: int
    Lk: int
    D: int
    Dv: int


class Packed(NamedTuple):
    """Where sequences begin that lie one behind the other, and where the last one ends."""

    query_starts: np.ndarray  # (B + 1,) int64
    key_starts: np.ndarray  # (B + 1,) int64


class Sequence(NamedTuple):
    """The arrays of one sequence: views, but for key and value of a cache."""

    query: np.ndarray  # (Hq, Lq, D)
    key: np.ndarray  # (Hkv, Lk, D)
    value: np.ndarray  # (Hkv, Lk, Dv)
    mask: np.ndarray | None  # (Hq, Lq, Lk), each axis full or 1
    out: np.ndarray  # (Hq, Lq, Dv)
    lse: np.ndarray | None  # (Hq, Lq)
    max_score: np.ndarray | None
    entropy: np.ndarray | None
    key_weight: np.ndarray | None  # (Hq, Lk)


@dataclass(frozen=True, slots=True)
class Problem:
    """A validated call.  Arrays are views with heads before rows, (*batch, H, L, D), whatever the caller's layout.

    Of packed sequences they are (H, T, D), and `mask` alone has an axis of sequences; key and value of a cache are as
    the `storage` says.  On a CUDA device, query, key, value, mask and results are `DeviceArray`s, all else is NumPy's.
    """

    query: np.ndarray  # (*batch, Hq, Lq, D)
    key: np.ndarray  # (*batch, Hkv, Lk, D)
    value: np.ndarray  # (*batch, Hkv, Lk, Dv)
    storage: Storage | None
    packed: Packed | None
    mask: np.ndarray | None  # bool or float, as many axes as the query, each full or 1: (*batch, Hq, Lq, Lk)
    intervals: KeyIntervals
    scale: float
    softcap: float | None
    slopes: np.ndarray | None  # (B or 1, Hq) float64
    sinks: np.ndarray | None  # (Hq,) float64
    score_mod: Callable[..., Any] | None
    score_mod_grad: Callable[..., Any] | None  # its derivative, for gradients
    mask_mod: Callable[..., Any] | None
    block_mask: BlockMask | None
    dropout: Dropout | None
    bfloat16_products: bool
    out: np.ndarray  # (*batch, Hq, Lq, Dv), to be written
    lse: np.ndarray | None  # (*batch, Hq, Lq), to be written, as are those that follow
    max_score: np.ndarray | None
    entropy: np.ndarray | None
    key_weight: np.ndarray | None  # (*batch, Hq, Lk)
    norms: np.ndarray | None  # (B, Hq, Lq, 2), what kernels make probabilities of again, for gradients
    layout: str  # of the caller's arrays
    result: np.ndarray  # out as the caller gets it
    aux: Aux | None  # likewise

    @property
    def sizes(self) -> Sizes:
        Hq, Lq, D = self.query.shape[-3:]
        if self.storage is not None:
            held = self.storage
            return Sizes(len(self.query), Hq, self.key.shape[1], Lq, held.Lk, D, held.Dv)
        (Hkv, Lk, _), Dv = self.key.shape[-3:], self.value.shape[-1]
        B = math.prod(self.query.shape[:-3])
        if self.packed is not None:
            B = len(self.packed.query_starts) - 1
            Lq, Lk = (int(np.diff(starts).max(initial=0)) for starts in self.packed)
        return Sizes(B, Hq, Hkv, Lq, Lk, D, Dv)

    def first_sequence(self) -> Sequence:
        """The arrays of the first sequence as they are: of packed ones whole, of a cache its own, or its first page."""
        results = self.lse, self.max_score, self.entropy, self.key_weight
        if self.packed is not None:
            mask = None if self.mask is None else self.mask[0]
            return Sequence(self.query, self.key, self.value, mask, self.out, *results)
        first = (0,) * (self.query.ndim - 3)
        held = (0,) if self.storage is not None else first
        return Sequence(
            self.query[first], self.key[held], self.value[held], None if self.mask is None else self.mask[first],
            self.out[first], *(None if x is None else x[first] for x in results),
        )  # fmt: skip

    def sequence(self, b: int) -> Sequence:
        """The arrays of sequence b, whatever holds them."""
        key, value = (self.key, self.value) if self.storage is None else self.storage.dense(b)
        if self.storage is None:
            key, value = self.keys(key, b), self.keys(value, b)
        lse, max_score, entropy = (
            None if x is None else self.rows(x, b) for x in (self.lse, self.max_score, self.entropy)
        )
        mask = None if self.mask is None else self.scores(self.mask, b)
        key_weight = None if self.key_weight is None else self.keys(self.key_weight, b)
        query, out = self.rows(self.query, b), self.rows(self.out, b)
        return Sequence(query, key, value, mask, out, lse, max_score, entropy, key_weight)

    def rows(self, x: np.ndarray, b: int) -> np.ndarray:
        """Of an array (*batch, H, Lq, ...) or (H, T, ...), as the query is, that of sequence b."""
        if self.packed is not None:
            return x[:, slice(*self.packed.query_starts[b : b + 2].tolist())]
        return x[self._index(b)]

    def keys(self, x: np.ndarray, b: int) -> np.ndarray:
        """Of an array (*batch, H, Lk, ...) or (H, T, ...), as the key is, that of sequence b."""
        if self.packed is not None:
            return x[:, slice(*self.packed.key_starts[b : b + 2].tolist())]
        return x[self._index(b)]

    def scores(self, x: np.ndarray, b: int) -> np.ndarray:
        """Of an array with an axis, full or 1, for each of the scores, as the mask is, that of sequence b."""
        if self.packed is None:
            return x[tuple(i if n > 1 else 0 for i, n in zip(self._index(b), x.shape[:-3], strict=True))]
        x = x[b if len(x) > 1 else 0]
        lengths = (int(starts[b + 1] - starts[b]) for starts in self.packed)
        return x[(slice(None), *(slice(n if m > 1 else m) for n, m in zip(lengths, x.shape[1:], strict=True)))]

    def heads_first(self, x: np.ndarray) -> np.ndarray:
        """A view of an array as the caller has them: as the problem has them."""
        return _heads_first(x, self.packed, self.layout)

    def as_given(self, x: np.ndarray) -> np.ndarray:
        """A view of an array as the problem has them: as the caller does."""
        if self.result.ndim == 2:
            return x[0]
        return self.heads_first(x)  # which swaps the same axes

    def _index(self, b: int) -> tuple[int, ...]:
        return tuple(int(i) for i in np.unravel_index(b, self.query.shape[:-3]))

    @classmethod
    def from_call(
        cls,
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any,
        dropout_p: Any,
        is_causal: Any,
        scale: Any,
        enable_gqa: Any,
        *,
        query_offset: Any,
        window: Any,
        query_lengths: Any,
        kv_lengths: Any,
        softcap: Any,
        alibi_slopes: Any,
        sinks: Any,
        score_mod: Any,
        mask_mod: Any,
        block_mask: Any,
        dropout_seed: Any,
        return_aux: Any,
        out: Any,
        layout: Any,
        precision: Any,
        cu_seqlens: tuple[Any, Any] | None = None,
        differentiable: bool = False,
        score_mod_grad: Any = None,
    ) -> Problem:
        """Check the arguments of `numba_attn.scaled_dot_product_attention`, allocate the results, compute nothing.

        `cu_seqlens` are those of `numba_attn.varlen_attention`.  A `differentiable` problem has norms, and
        the `score_mod_grad` of the gradient functions.  The key may be the `Storage` of a cache, without value.
        """
        storage, packed = None, None
        if isinstance(key, Storage):
            storage, key, value = key, key.key, key.value
            query = _operand("query", query)
        else:
            query, key, value = _operand("query", query), _operand("key", key), _operand("value", value)
            _check_alike(query, key, value)
        layout = checks.layout(layout)
        names = _aux_names(return_aux)

        q, k, v = query, key, value
        batch: tuple[int, ...]
        if storage is not None:
            _check_heads(q.shape[1], k.shape[1], True)
            batch, (Hq, Lq), Lk, Dv = q.shape[:1], q.shape[1:3], storage.Lk, storage.Dv
        elif cu_seqlens is not None:
            packed = _packed(q, k, v, *cu_seqlens)
            q, k, v = (x.swapaxes(0, 1) for x in (q, k, v))
            _check_heads_and_sizes(q, k, v, True)
            query_lengths, kv_lengths = (np.diff(starts) for starts in packed)
            batch, Hq, Dv = query_lengths.shape, q.shape[0], v.shape[2]
            Lq, Lk = (int(lengths.max(initial=0)) for lengths in (query_lengths, kv_lengths))
        else:
            q, k, v = (checks.heads_first(x, layout) for x in (query, key, value))
            _check_shapes(q, k, v, checks.flag("enable_gqa", enable_gqa))
            batch, (Hq, Lq), Lk, Dv = q.shape[:-3], q.shape[-3:-1], k.shape[-2], v.shape[-1]
        B = math.prod(batch)
        return_shape = (*query.shape[:-1], Dv)
        result = _result(out, query, return_shape)

        mask = None if attn_mask is None else _mask(attn_mask, (*batch, Hq, Lq, Lk), 4 if packed else query.ndim)
        intervals = _intervals(
            batch, Lq, Lk, query_offset, checks.flag("is_causal", is_causal), window, query_lengths, kv_lengths
        )
        if out is not None:
            for name, x in (("query", query), ("key", key), ("value", value), ("attn_mask", mask)):
                if x is not None and checks.overlap(result, x):
                    raise ValueError(f"out must not share memory with {name}")
        # Each result as the caller gets it: one number a row, or a key, of each head.
        rows = return_shape[:-1]
        keys = (len(key), Hq) if packed else _per_key(rows, Lk, layout)
        numbers = statistics_dtype(query.dtype)
        aux = {name: _empty(query, rows if name != "key_weight" else keys, numbers) for name in names}
        if mask_mod is not None:
            check_reach(mask_mod, B, *intervals.table[:, 1:].max(axis=0, initial=0).tolist())
        if differentiable:
            _check_differentiable(score_mod, score_mod_grad, precision)

        def heads_first(x: np.ndarray) -> np.ndarray:
            return _heads_first(x, packed, layout)

        return cls(
            query=q,
            key=k,
            value=v,
            storage=storage,
            packed=packed,
            mask=mask,
            intervals=intervals,
            scale=_scale(scale, q.shape[-1], q.dtype),
            softcap=_softcap(softcap, q.dtype),
            slopes=_numbers_per_head("alibi_slopes", alibi_slopes, q.dtype, Hq, B),
            sinks=_numbers_per_head("sinks", sinks, q.dtype, Hq, None),
            score_mod=_function("score_mod", score_mod),
            score_mod_grad=_function("score_mod_grad", score_mod_grad),
            mask_mod=_function("mask_mod", mask_mod),
            block_mask=_block_mask(block_mask, B, Hq, Lq, Lk),
            dropout=_dropout(dropout_p, dropout_seed),
            bfloat16_products=_precision(precision, query.dtype),
            out=heads_first(result),
            norms=np.empty((B, Hq, Lq, 2), numbers) if differentiable else None,
            layout=layout,
            result=result,
            aux=Aux(**{name: aux[name] for name in names}) if names else None,
            **{name: None if name not in aux else heads_first(aux[name][..., None])[..., 0] for name in AUX_NAMES},
        )


def statistics_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype of scores, sums and what is made of them: 16-bit problems are computed in float32."""
    return dtype if dtype.itemsize > 2 else np.dtype(np.float32)


# Arrays ---------------------------------------------------------------------------------------------------------------


def _heads_first(x: np.ndarray, packed: Packed | None, layout: str) -> np.ndarray:
    return x.swapaxes(0, 1) if packed else checks.heads_first(x, layout)


def _operand(name: str, x: Any) -> Any:
    """A floating-point array of two or more axes, in native byte order."""
    x = checks.floating(name, checks.array(name, x))
    if x.ndim < 2:
        raise ValueError(f"{name} must have at least 2 axes (length, head size), got shape {x.shape}")
    return x


def _result(out: Any, query: Any, shape: tuple[int, ...]) -> Any:
    if out is None:
        return _empty(query, shape, query.dtype)
    return checks.output_array(out, shape, query.dtype, like="query")


def _empty(query: Any, shape: tuple[int, ...], dtype: np.dtype) -> Any:
    """A new array where the query is."""
    return np.empty(shape, dtype) if isinstance(query, np.ndarray) else query.empty(shape, dtype)


def _per_key(rows: tuple[int, ...], Lk: int, layout: str) -> tuple[int, ...]:
    """The shape of one number a key, from that of one number a row."""
    if len(rows) == 1 or layout == "BHLD":
        return (*rows[:-1], Lk)
    return (*rows[:-2], Lk, rows[-1])


def _check_alike(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> None:
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"query, key and value must have one dtype, got {query.dtype}, {key.dtype} and {value.dtype}")
    if not query.ndim == key.ndim == value.ndim:
        raise ValueError(
            "query, key and value must have the same number of axes, "
            f"got shapes {query.shape}, {key.shape} and {value.shape}"
        )


def _packed(query: np.ndarray, key: np.ndarray, value: np.ndarray, query_starts: Any, key_starts: Any) -> Packed:
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim != 3:
            raise ValueError(f"{name} must have 3 axes (tokens, heads, head size), got shape {x.shape}")
    starts = [
        _starts(name, given, len(x), of)
        for name, given, x, of in (
            ("cu_seqlens_q", query_starts, query, "query"), ("cu_seqlens_k", key_starts, key, "key"),
        )
    ]  # fmt: skip
    if len(starts[0]) != len(starts[1]):
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must be of as many sequences, "
            f"got {len(starts[0]) - 1} and {len(starts[1]) - 1}"
        )
    return Packed(*starts)


def _starts(name: str, starts: Any, T: int, of: str) -> np.ndarray:
    """(B + 1,) int64 that rise from 0 to T."""
    starts = checks.as_array(name, starts)
    if starts.ndim != 1 or not starts.size:
        raise ValueError(f"{name} must have shape (B + 1,), got {starts.shape}")
    flat = np.asarray(checks.integers(name, starts, starts.shape, 0, T)).astype(np.int64)
    if flat[0] != 0:
        raise ValueError(f"{name} must begin with 0, got {flat[0]}")
    if flat[-1] != T:
        raise ValueError(f"{name} must end with the {T} tokens of {of}, got {flat[-1]}")
    if (falls := np.flatnonzero(np.diff(flat) < 0)).size:
        raise ValueError(f"{name} must not decrease, got {flat[falls[0]]} and then {flat[falls[0] + 1]}")
    return flat


def _check_shapes(q: np.ndarray, k: np.ndarray, v: np.ndarray, enable_gqa: bool) -> None:
    if not q.shape[:-3] == k.shape[:-3] == v.shape[:-3]:
        raise ValueError(
            f"query, key and value must have the same batch axes, got {q.shape[:-3]}, {k.shape[:-3]} and {v.shape[:-3]}"
        )
    _check_heads_and_sizes(q, k, v, enable_gqa)


def _check_heads_and_sizes(q: np.ndarray, k: np.ndarray, v: np.ndarray, enable_gqa: bool) -> None:
    Hq, Hkv = q.shape[-3], k.shape[-3]
    if v.shape[-3] != Hkv:
        raise ValueError(f"key and value must have the same number of heads, got {Hkv} and {v.shape[-3]}")
    if v.shape[-2] != k.shape[-2]:
        raise ValueError(f"key and value must have the same length, got {k.shape[-2]} and {v.shape[-2]}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"query and key must have the same head size, got {q.shape[-1]} and {k.shape[-1]}")
    _check_heads(Hq, Hkv, enable_gqa)


def _check_heads(Hq: int, Hkv: int, enable_gqa: bool) -> None:
    if Hq != Hkv:
        if not enable_gqa:
            raise ValueError(
                f"query has {Hq} heads, key and value have {Hkv}: "
                "they must be equal, or enable_gqa=True and query's a multiple"
            )
        if Hkv == 0 or Hq % Hkv:
            raise ValueError(f"query heads must be a multiple of key-value heads, got {Hq} and {Hkv}")


def _mask(mask: Any, scores: tuple[int, ...], rank: int) -> Any:
    """The mask with as many axes as the scores, each of them full or 1; `rank` is that of the caller's query."""
    mask = checks.array("attn_mask", mask)
    if mask.dtype.char not in "?fde" and not checks.is_bfloat16(mask.dtype):
        raise TypeError(f"attn_mask must be bool, float32, float64, float16 or bfloat16, got {mask.dtype}")
    expected = scores if rank > 2 else scores[1:]
    if mask.ndim > len(expected) or any(
        m not in (1, n) for m, n in zip(mask.shape[::-1], expected[::-1], strict=False)
    ):
        raise ValueError(f"attn_mask of shape {mask.shape} does not broadcast to {expected}")
    return mask[(None,) * (len(scores) - mask.ndim)]


# Options --------------------------------------------------------------------------------------------------------------


def _aux_names(names: Any) -> tuple[str, ...]:
    if type(names) is tuple and not names:
        return ()
    if isinstance(names, str) or not isinstance(names, tuple | list | set | frozenset):
        raise TypeError(f"return_aux must be a tuple of names among {AUX_NAMES}, got {names!r}")
    for name in names:
        if not isinstance(name, str) or name not in AUX_NAMES:
            raise ValueError(f"return_aux names must be among {AUX_NAMES}, got {name!r}")
    return tuple(names)


def _dropout(p: Any, seed: Any) -> Dropout | None:
    if type(p) is not float:
        p = checks.number("dropout_p", p)
    if not 0 <= p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {p!r}")
    if seed is not None:
        seed = checks.integer("dropout_seed", seed)
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"dropout_seed must be in [0, 2**64), got {seed}")
    if p == 0:
        return None
    if seed is None:
        # The global generator, so that np.random.seed makes a program repeatable.
        seed = int.from_bytes(np.random.bytes(8), "little")  # noqa: NPY002
    return Dropout(p, seed)


def _precision(precision: Any, dtype: np.dtype) -> bool:
    """Whether products may be those of bfloat16 numbers."""
    if precision is None:
        return checks.is_bfloat16(dtype)
    if not isinstance(precision, str) or precision != "bfloat16":
        raise ValueError(f"precision must be None or 'bfloat16', got {precision!r}")
    if dtype.char != "f" and not checks.is_bfloat16(dtype):
        raise TypeError(f"precision='bfloat16' is for float32 input, got {dtype}")
    return True


def _softcap(softcap: Any, dtype: np.dtype) -> float | None:
    if softcap is None:
        return None
    softcap = checks.number("softcap", softcap)
    info = np.finfo(statistics_dtype(dtype))
    if not float(info.tiny) <= softcap <= float(info.max):
        raise ValueError(f"softcap must be positive and finite, or None for no cap, got {softcap} for {dtype}")
    return softcap


def _numbers_per_head(name: str, x: Any, dtype: np.dtype, Hq: int, B: int | None) -> np.ndarray | None:
    """Finite float64 numbers, (Hq,), or (1 or B, Hq) where there may be some for each sequence (`B` is not None)."""
    if x is None:
        return None
    x = checks.numpy_array(name, x)
    if x.dtype.char not in "fde" and not checks.is_bfloat16(x.dtype):
        raise TypeError(f"{name} must be floating point, got {x.dtype}")
    if x.shape != (Hq,) and (B is None or x.shape != (B, Hq)):
        expected = f"({Hq},)" if B is None else f"({Hq},) or ({B}, {Hq})"
        raise ValueError(f"{name} must have shape {expected}, got {x.shape}")
    x = x.astype(np.float64, order="C")
    fits = np.abs(x) < _largest(dtype)
    if not fits.all():
        raise ValueError(f"{name} must be finite, got {x[~fits][0]} for {dtype}")
    return x if B is None or x.ndim == 2 else x[None]


def _check_differentiable(score_mod: Any, score_mod_grad: Any, precision: Any) -> None:
    if score_mod is not None and score_mod_grad is None:
        raise ValueError(
            "score_mod has a gradient only with score_mod_grad(score, b, h, i, j), its derivative with respect to the "
            "score, got None"
        )
    if score_mod is None and score_mod_grad is not None:
        raise ValueError("score_mod_grad must be None without a score_mod")
    if precision is not None:
        raise NotImplementedError(f"precision must be None for gradients, got {precision!r}")


def _function(name: str, function: Any) -> Callable[..., Any] | None:
    if function is None:
        return None
    expected = MOD_PARAMETERS[name]
    if not callable(function):
        raise TypeError(f"{name} must be a function of ({', '.join(expected)}), got {checks.type_name(function)}")
    python = checks.plain_function(function)
    if not hasattr(python, "__code__"):
        raise TypeError(f"{name} must be a Python or @njit function, got {checks.type_name(function)}")
    checks.parameters(name, python, expected)
    return python  # type: ignore[no-any-return]


def _block_mask(mask: Any, B: int, Hq: int, Lq: int, Lk: int) -> BlockMask | None:
    if mask is None:
        return None
    if not isinstance(mask, BlockMask):
        raise TypeError(f"block_mask must be a BlockMask, got {checks.type_name(mask)}")
    masks = mask.shape
    if masks[2:] != (Lq, Lk) or masks[0] not in (1, B) or masks[1] not in (1, Hq):
        raise ValueError(f"block_mask was made for (B, Hq, Lq, Lk) = {masks}, got a problem of {(B, Hq, Lq, Lk)}")
    return mask.shared(B, Hq)


def _scale(scale: Any, D: int, dtype: np.dtype) -> float:
    if scale is None:
        return 1 / math.sqrt(D) if D else 1.0
    scale = checks.number("scale", scale)
    if not abs(scale) < _largest(dtype):
        raise ValueError(f"scale must be finite, in {dtype} too, got {scale}")
    return scale


def _largest(dtype: np.dtype) -> float:
    """A bound for what scores are made of, with room for a change of base."""
    return float(np.finfo(statistics_dtype(dtype)).max) / 2


def _intervals(
    batch: tuple[int, ...],
    Lq: int,
    Lk: int,
    query_offset: Any,
    is_causal: bool,
    window: Any,
    query_lengths: Any,
    kv_lengths: Any,
) -> KeyIntervals:
    table = interval_table(batch, Lq, Lk, query_offset, query_lengths, kv_lengths)
    left, right = _window(window)
    return KeyIntervals(table, left, 0 if is_causal else right, padded=query_lengths is not None)


def interval_table(
    batch: tuple[int, ...], Lq: int, Lk: int, query_offset: Any, query_lengths: Any, kv_lengths: Any
) -> np.ndarray:
    """That of `masks.KeyIntervals`, from arguments of a call, which are checked."""
    if type(query_offset) is int and query_lengths is None and kv_lengths is None:
        checks.integers("query_offset", query_offset, batch, -MOST_OFFSET, MOST_OFFSET)
        return _uniform_table(math.prod(batch), query_offset, Lq, Lk)
    table = np.empty((math.prod(batch), 3), np.int64)
    table[:, 1] = Lq if query_lengths is None else checks.integers("query_lengths", query_lengths, batch, 0, Lq)
    table[:, 2] = Lk if kv_lengths is None else checks.integers("kv_lengths", kv_lengths, batch, 0, Lk)
    if isinstance(query_offset, str):
        if query_offset != "bottom_right":
            raise ValueError(f"query_offset must be integers or 'bottom_right', got {query_offset!r}")
        table[:, 0] = table[:, 2] - table[:, 1]
    else:
        table[:, 0] = checks.integers("query_offset", query_offset, batch, -MOST_OFFSET, MOST_OFFSET)
    return table


@kept
def _uniform_table(B: int, offset: int, Lq: int, Lk: int) -> np.ndarray:
    """The table of key intervals of sequences that are all alike."""
    table = np.empty((B, 3), np.int64)
    table[:] = offset, Lq, Lk
    return table


def _window(window: Any) -> tuple[int, int]:
    if window is None:
        return UNBOUNDED, UNBOUNDED
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise TypeError(f"window must be a pair (left, right), got {window!r}")
    left, right = (UNBOUNDED if side is None else checks.integer("window", side) for side in window)
    if left < 0 or right < 0:
        raise ValueError(f"window sides must be 0 or more, or None for unbounded, got {tuple(window)}")
    return min(left, UNBOUNDED), min(right, UNBOUNDED)
