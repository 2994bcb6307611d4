"""Multi-head attention as a layer: projections to query, key and value heads, attention, projection of the result.

    MultiHead(Q, K, V) = Concat(head_1, ..., head_Hq) Wo^T + bo,
    head_i = Attention(Q Wq_i^T + bq_i, K Wk_i^T + bk_i, V Wv_i^T + bv_i)

Vaswani et al., "Attention Is All You Need" (2017), section 3.2.2; weights are transposed here, as PyTorch has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from numba_attn import arrays, checks
from numba_attn.arrays import Array
from numba_attn.calls import DEFAULTS, check_names, checked_call, prepare
from numba_attn.heads import Heads, Offsets, Projection, checked_rotary
from numba_attn.padding import without_padding
from numba_attn.parameters import ROLES, Parameters, Sizes, checked, count, drawn, floating, from_torch, to_torch
from numba_attn.primitives import project, project_adjoint
from numba_attn.problem import Aux

# Options that the layer passes on.
_WITH_CACHE = (
    *("scale", "window", "softcap", "alibi_slopes", "sinks", "score_mod", "mask_mod", "dropout_p", "dropout_seed"),
    *("return_aux", "precision", "backend"),
)
_PLAIN = tuple(name for name in DEFAULTS if name not in ("enable_gqa", "layout", "out", "attn_mask", "is_causal"))
_FOR_VJP = tuple(name for name in _PLAIN if name != "return_aux")
_ON_HOST = "as the layer is"


class InputGradients(NamedTuple):
    """Gradients with respect to what the layer was called with; None for what was None or has none.

    Those of a query that is key and value too are all in `query`, those of a key that is the value too in `key`.
    """

    query: Any = None
    key: Any = None
    value: Any = None
    attn_mask: Any = None
    sinks: Any = None
    alibi_slopes: Any = None


class MultiHeadAttention:
    """A layer of multi-head, grouped-query or multi-query attention: self- or cross-attention.

    Shape letters: B batch (any number of axes, none included), Lq and Lk lengths, E, Ek, Ev and Eo widths of query,
    key, value and result, Hq and Hkv query and key-value heads, D and Dv head sizes.

    Parameters
    ----------
    parameters : mapping from names to float32 or float64 arrays
        Names and layouts are those of `torch.nn.MultiheadAttention`, see `numba_attn.parameters`: "in_proj_weight", or
        "q_proj_weight", "k_proj_weight" and "v_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"; beside
        these "q_norm.weight" and "k_norm.weight", (D,), if heads of query or key are to be normalised.  Biases and
        norms may be left out.  The arrays are held, not copied; they may be written to.
    num_heads, num_kv_heads : int
        Hq, and Hkv, which divides it and is Hq if None; head sizes follow from the shapes of the weights.
    rotary : (cos, sin), optional
        Tables (positions, R / 2) of `rotary_tables`: keys are rotated by their positions from 0, queries from
        query_offset, or by those that a cache says.
    interleaved : bool
        As in `apply_rotary`.
    norm_epsilon : float
        Added to the mean square in the normalisation, which comes before the rotation.

    Raises
    ------
    ValueError, TypeError
        Parameters that do not fit each other, with their names.

    Notes
    -----
    Heads are strided views of what the projections' matrix products, NumPy's BLAS, have written, and attention writes
    where the output projection reads: nothing is copied in between.  BLAS may round differently with another number of
    rows; all else gives the same bits in any batch and on any number of threads.

    `torch.nn.MultiheadAttention(add_zero_attn=True)` is `sinks=np.zeros(num_heads)`.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> layer = MultiHeadAttention.init(rng, 32, num_heads=4, num_kv_heads=2)
    >>> layer
    MultiHeadAttention(E=32, Ek=32, Ev=32, Eo=32, Hq=4, Hkv=2, D=8, Dv=8, dtype=float32)
    >>> x = rng.standard_normal((2, 10, 32), dtype=np.float32)
    >>> layer(x, is_causal=True).shape
    (2, 10, 32)
    """

    def __init__(
        self,
        parameters: Mapping[str, np.ndarray],
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        rotary: tuple[np.ndarray, np.ndarray] | None = None,
        interleaved: bool = False,
        norm_epsilon: float = 1e-6,
    ) -> None:
        held, sizes = checked(parameters, num_heads, num_kv_heads)
        epsilon = checks.number("norm_epsilon", norm_epsilon)
        if not 0 <= epsilon < math.inf:
            raise ValueError(f"norm_epsilon must be finite and 0 or more, got {norm_epsilon}")
        tables = None if rotary is None else checked_rotary(rotary, sizes.D)
        self._projection = Projection(held, sizes, tables, checks.flag("interleaved", interleaved), epsilon)

    @classmethod
    def init(
        cls,
        rng: np.random.Generator,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_size: int | None = None,
        value_size: int | None = None,
        kdim: int | None = None,
        vdim: int | None = None,
        bias: bool = True,
        qk_norm: bool = False,
        dtype: Any = np.float32,
        **options: Any,
    ) -> MultiHeadAttention:
        """A layer with random weights, distributed as those of a new `torch.nn.MultiheadAttention`.

        Parameters
        ----------
        rng : numpy.random.Generator
        embed_dim, kdim, vdim : int
            Widths of query and result, of key and of value; those of key and value are embed_dim if None.
        num_heads, num_kv_heads : int
        head_size, value_size : int
            D and Dv; embed_dim / num_heads, and D, if None.
        bias, qk_norm : bool
            Whether there are biases, of 0, and gains for the normalisation of queries and keys, of 1.
        dtype : float32 or float64
        options
            Of `MultiHeadAttention`.

        Raises
        ------
        ValueError, TypeError
            Sizes or types that do not fit.
        """
        if not isinstance(rng, np.random.Generator):
            raise TypeError(f"rng must be a numpy.random.Generator, got {checks.type_name(rng)}")
        E, Hq = count("embed_dim", embed_dim), count("num_heads", num_heads)
        Hkv = Hq if num_kv_heads is None else count("num_kv_heads", num_kv_heads)
        if head_size is None and E % Hq:
            raise ValueError(f"embed_dim must be a multiple of num_heads, or head_size given, got {E} and {Hq}")
        D = E // Hq if head_size is None else count("head_size", head_size)
        Dv = D if value_size is None else count("value_size", value_size)
        Ek, Ev = (E if n is None else count(name, n) for name, n in (("kdim", kdim), ("vdim", vdim)))
        dtype = floating("dtype", checks.dtype(dtype, expected="float32 or float64"))
        sizes = Sizes(Hq, Hkv, D, Dv, (E, Ek, Ev), E)
        flags = checks.flag("bias", bias), checks.flag("qk_norm", qk_norm)
        return cls(drawn(rng, sizes, *flags, dtype), Hq, Hkv, **options)

    @classmethod
    def from_torch_state(
        cls, state: Mapping[str, Any], num_heads: int, *, prefix: str = "", **options: Any
    ) -> MultiHeadAttention:
        """The layer with the weights of a `torch.nn.MultiheadAttention`, of which PyTorch itself is not needed.

        Parameters
        ----------
        state : mapping from names to arrays, or to what `numpy.asarray` makes arrays of, such as tensors
            A `state_dict`, of the layer or, with a prefix, of a model that has it.
        num_heads : int
            Of which a state says nothing.
        prefix : str
            What the names begin with, for example "encoder.layers.0.self_attn.".
        options
            Of `MultiHeadAttention`.

        Raises
        ------
        NotImplementedError
            A state of a module with add_bias_kv=True.
        ValueError, TypeError
            Weights that are missing, unknown, or do not fit.
        """
        return cls(from_torch(state, prefix), num_heads, **options)

    def to_torch_state(self) -> Parameters:
        """The parameters under the names that `torch.nn.MultiheadAttention` with the same widths has.

        Weights of inputs of one width are packed, and a bias that is missing beside another is zeros; what needs no
        change is the layer's own array.  `ValueError` for a layer that PyTorch does not have: fewer key-value heads,
        heads of other sizes, normalisation.
        """
        return to_torch(self._projection.parameters, self._projection.sizes)

    @property
    def parameters(self) -> Mapping[str, np.ndarray]:
        """The arrays by name; to be changed by writing into them."""
        return MappingProxyType(self._projection.parameters)

    @property
    def sizes(self) -> Sizes:
        """Heads, head sizes and widths."""
        return self._projection.sizes

    @property
    def dtype(self) -> np.dtype:
        """Of parameters, inputs and results."""
        return self._projection.parameters["out_proj.weight"].dtype

    def __repr__(self) -> str:
        Hq, Hkv, D, Dv, (E, Ek, Ev), Eo = self._projection.sizes
        return f"MultiHeadAttention({E=}, {Ek=}, {Ev=}, {Eo=}, {Hq=}, {Hkv=}, {D=}, {Dv=}, dtype={self.dtype})"

    # Forward ----------------------------------------------------------------------------------------------------------

    def forward(
        self,
        query: Array,
        key: Array | None = None,
        value: Array | None = None,
        attn_mask: Any = None,
        *,
        key_padding_mask: Any = None,
        is_causal: bool | None = None,
        cache: Any = None,
        counts: Any = None,
        out: Array | None = None,
        **options: Any,
    ) -> Array | tuple[Array, Aux]:
        """The layer's result; calling the layer does the same.

        Parameters
        ----------
        query : (B, Lq, E), of the layer's dtype; any strides
            Of any library, in host memory; key, value, attn_mask and out are of the same, a mask may be NumPy's.
        key, value : (B, Lk, Ek) and (B, Lk, Ev), optional
            Self-attention without key; without value the key is the value too.
        attn_mask : bool or floating point, broadcasting to (B, Hq, Lq, Lk), optional
            As in `scaled_dot_product_attention`, True = attend: the opposite of PyTorch's module.
        key_padding_mask : (B, Lk) bool, optional
            True where a key is padding, as in PyTorch's module; what is there is never used, NaN included.
        is_causal : bool, optional
            False, and with a cache True, if None.
        cache : KVCache, or what `PagedKVCache.batch` gives, optional
            Self-attention to all that the cache holds and to the new rows, which are appended.  It holds keys as they
            are after normalisation and rotation, and may be of 16 bits or quantised.  B is one axis then, and there is
            no attn_mask or key_padding_mask.
        counts : int or (B,) ints, optional
            With a cache, how many of the rows each sequence has; the rest is padding.
        out : (B, Lq, Eo), optional
            Where to write the result: a C-contiguous array of the layer's dtype that overlaps no parameter.
        options
            Of `scaled_dot_product_attention`, or with a cache of `attention_with_kv_cache`: scale, query_offset,
            window, query_lengths, kv_lengths, softcap, alibi_slopes, sinks, score_mod, mask_mod, block_mask,
            dropout_p, dropout_seed, return_aux, precision, backend.

        Returns
        -------
        (B, Lq, Eo) array of query's library; (out, Aux) if `return_aux` names anything.
            What is a number for each row is (B, Hq, Lq).  A row that attends to nothing is the bias of the output
            projection.

        Raises
        ------
        ValueError, TypeError
            Shapes, values or types that do not fit; nothing has been computed or written then, in a cache neither.
        """
        given = dict(zip(ROLES, _distinct(query, key, value), strict=True)) | {"attn_mask": attn_mask, "out": out}
        caller = arrays.adopt(given, tuple(given), _ON_HOST)
        heads = self._projection.allocate(*(given[name] for name in ROLES))
        if cache is None:
            if counts is not None:
                raise ValueError("counts must be given with a cache; without one there is query_lengths")
            attend = self._attention(heads, given["attn_mask"], key_padding_mask, is_causal, options)
        else:
            if not all(x is None for x in (key, value, attn_mask, key_padding_mask)):
                raise ValueError("cache must be given without key, value, attn_mask and key_padding_mask")
            attend = self._cached_attention(heads, cache, counts, is_causal, options)
        result = self._result(given["out"], heads)
        attended, aux = attend()
        project(attended, *self._output_weights(), result)
        return caller.give(result if aux is None else (result, aux))  # type: ignore[no-any-return]

    __call__ = forward

    def project(
        self,
        query: Array,
        key: Array | None = None,
        value: Array | None = None,
        *,
        query_offset: Any = 0,
    ) -> tuple[Array, Array, Array]:
        """What the layer's attention is of: query, key and value heads in layout "BLHD", normalised and rotated.

        For `diagnose` and `attention_weights`.

        >>> layer = MultiHeadAttention.init(np.random.default_rng(0), 8, num_heads=2)
        >>> query, key, value = layer.project(np.ones((5, 8), np.float32))
        >>> query.shape
        (5, 2, 4)
        """
        given = dict(zip(ROLES, _distinct(query, key, value), strict=True))
        caller = arrays.adopt(given, ROLES, _ON_HOST)
        heads = self._projection.allocate(**given)
        _, problem = prepare(*heads.operands, enable_gqa=True, layout="BLHD", query_offset=query_offset)
        offsets = Offsets(problem.intervals.table[:, 0], 0)
        self._projection.check_positions(heads, offsets, "query_offset")
        self._projection.compute(heads, offsets)
        return caller.give(heads.operands)  # type: ignore[no-any-return]

    # Each of the next two checks, and returns what computes (B, Lq, Hq Dv) and statistics.

    def _attention(
        self, heads: Heads, attn_mask: Any, key_padding_mask: Any, is_causal: Any, options: dict[str, Any]
    ) -> Callable[[], tuple[np.ndarray, Aux | None]]:
        check_names("forward", options, _PLAIN)
        call = _call(heads, attn_mask, key_padding_mask, is_causal, options)
        attend, problem = checked_call(*heads.operands, **call)
        # A call like an earlier one has an integer.
        offset = options.get("query_offset", 0) if problem is None else problem.intervals.table[:, 0]
        offsets = Offsets(offset, 0)
        self._projection.check_positions(heads, offsets, "query_offset")

        def compute() -> tuple[np.ndarray, Aux | None]:
            self._projection.compute(heads, offsets)
            attended, aux = attend()
            if aux is not None:
                aux = Aux(*(None if x is None else x.swapaxes(-1, -2) for x in aux))
            return _joined(attended), aux

        return compute

    def _cached_attention(
        self, heads: Heads, cache: Any, counts: Any, is_causal: Any, options: dict[str, Any]
    ) -> Callable[[], tuple[np.ndarray, Aux | None]]:
        from numba_attn.kv_attention import attention_with_kv_cache
        from numba_attn.kv_cache import KVCache
        from numba_attn.paged_batch import PagedBatch

        if not isinstance(cache, KVCache | PagedBatch):
            raise TypeError(f"cache must be a KVCache or a batch of a PagedKVCache, got {checks.type_name(cache)}")
        check_names("forward with a cache", options, _WITH_CACHE)
        if heads.query.ndim != 4:
            raise ValueError(f"query must have 3 axes with a cache, got {heads.query.ndim - 1}")
        sizes = self.sizes
        expected = (len(heads.query), sizes.Hkv, sizes.D, sizes.Dv)
        if cache.shape != expected:
            raise ValueError(f"cache must be of (B, Hkv, D, Dv) = {expected}, got {cache.shape}")
        is_causal = True if is_causal is None else is_causal
        prepare(*heads.operands, enable_gqa=True, layout="BLHD", is_causal=is_causal, **options)
        views = [x.swapaxes(1, 2) for x in heads.operands]
        new_key, new_value = (x if x.dtype == cache.dtype else np.empty(x.shape, cache.dtype) for x in views[1:])
        cache.checked(new_key, new_value, counts)
        offsets = Offsets(cache.totals.copy(), cache.totals.copy())
        self._projection.check_positions(heads, offsets, "cache")

        def compute() -> tuple[np.ndarray, Aux | None]:
            self._projection.compute(heads, offsets)
            with np.errstate(over="ignore"):
                query, key, value = (x.astype(cache.dtype, copy=False) for x in views)
            attended = np.empty((*heads.query.shape[:-1], sizes.Dv), cache.dtype)
            found = attention_with_kv_cache(
                query, cache, key, value, counts=counts, is_causal=is_causal, out=attended.swapaxes(1, 2), **options
            )
            return _joined(attended).astype(self.dtype, copy=False), found[1] if isinstance(found, tuple) else None

        return compute

    def _output_weights(self) -> tuple[np.ndarray, np.ndarray | None]:
        held = self._projection.parameters
        return held["out_proj.weight"], held.get("out_proj.bias")

    def _result(self, out: Any, heads: Heads) -> np.ndarray:
        shape = (*heads.query.shape[:-2], self.sizes.out_width)
        if out is None:
            return np.empty(shape, self.dtype)
        out = checks.output_array(out, shape, self.dtype, like="the layer")
        if not out.flags.c_contiguous:
            raise ValueError(f"out must be C-contiguous, got strides {out.strides} for shape {shape}")
        for name, x in self.parameters.items():
            if checks.overlap(out, x):
                raise ValueError(f"out must not share memory with {name}")
        return out

    # Gradients --------------------------------------------------------------------------------------------------------

    def vjp(
        self,
        query: Array,
        key: Array | None = None,
        value: Array | None = None,
        attn_mask: Any = None,
        *,
        key_padding_mask: Any = None,
        is_causal: bool | None = None,
        score_mod_grad: Any = None,
        **options: Any,
    ) -> tuple[Array, Callable[..., tuple[InputGradients, Parameters]]]:
        """The layer's result, and the function that takes a gradient back from it: reverse-mode differentiation.

        Parameters
        ----------
        query, key, value, attn_mask, key_padding_mask, is_causal, options
            As in `forward`, without cache, counts, out and return_aux.
        score_mod_grad
            As in `scaled_dot_product_attention_vjp`: the derivative of score_mod.

        Returns
        -------
        out : (B, Lq, Eo) array of query's library
        vjp : function (grad_out, wanted=None)
            Takes the gradient of a loss with respect to out; returns those with respect to the inputs,
            `InputGradients` of that library, and to the parameters, a dict of NumPy's arrays with their names and
            shapes.  `wanted` is as in the function that `scaled_dot_product_attention_vjp` returns.  It may be called
            more than once, but not after inputs or parameters have been written to.

        Raises
        ------
        ValueError, TypeError
            As in `forward`; and from vjp for a gradient that is not of out's shape and dtype.

        Examples
        --------
        >>> import numpy as np
        >>> layer = MultiHeadAttention.init(np.random.default_rng(0), 8, num_heads=2)
        >>> out, vjp = layer.vjp(np.ones((1, 5, 8), np.float32))
        >>> inputs, gradients = vjp(np.ones_like(out))
        >>> for name, x in layer.parameters.items():
        ...     x -= 0.1 * gradients[name]
        """
        from numba_attn.gradients import scaled_dot_product_attention_vjp

        check_names("vjp", options, _FOR_VJP)
        given = {"query": query, "key": key, "value": value, "attn_mask": attn_mask}
        caller = arrays.adopt(given, tuple(given), _ON_HOST)
        heads = self._projection.allocate(*(given[name] for name in ROLES))
        call = _call(heads, given["attn_mask"], key_padding_mask, is_causal, options)
        _, problem = prepare(*heads.operands, **call)
        offsets = Offsets(problem.intervals.table[:, 0], 0)
        self._projection.check_positions(heads, offsets, "query_offset")

        before = self._projection.compute(heads, offsets, keep=True)
        attended, attention_vjp = scaled_dot_product_attention_vjp(
            *heads.operands, **call, **({} if score_mod_grad is None else {"score_mod_grad": score_mod_grad})
        )
        joined = np.ascontiguousarray(_joined(attended))
        weight, bias = self._output_weights()
        out = np.empty((*joined.shape[:-1], len(weight)), joined.dtype)
        project(joined, weight, bias, out)

        def vjp(grad_out: np.ndarray, wanted: Any = None) -> tuple[InputGradients, Parameters]:
            grad_out = checks.numpy_array("grad_out", grad_out)
            if grad_out.dtype != out.dtype:
                raise TypeError(f"grad_out must be {out.dtype}, as the result is, got {grad_out.dtype}")
            if grad_out.shape != out.shape:
                raise ValueError(f"grad_out must have shape {out.shape}, got {grad_out.shape}")
            gradients = {name: np.empty_like(x, order="C") for name, x in self.parameters.items()}
            grad_joined = np.zeros_like(joined)
            project_adjoint(
                grad_out, joined, weight, grad_joined, gradients["out_proj.weight"], gradients.get("out_proj.bias")
            )
            inner = attention_vjp(grad_joined.reshape(attended.shape), wanted=wanted)
            inputs = self._projection.adjoint(heads, offsets, before, (inner.query, inner.key, inner.value), gradients)
            rest = {name: getattr(inner, name) for name in ("attn_mask", "sinks", "alibi_slopes")}
            return caller.give(InputGradients(**inputs, **rest)), gradients

        return caller.give(out), vjp


def _distinct(query: Any, key: Any, value: Any) -> tuple[Any, Any, Any]:
    """None for an array that is the same object as the one before, so that one product does for both."""
    value = None if value is key else value
    return query, None if key is query and value is None else key, value


def _call(
    heads: Heads, attn_mask: Any, key_padding_mask: Any, is_causal: Any, options: dict[str, Any]
) -> dict[str, Any]:
    """The options of attention of heads."""
    call = {**options, "attn_mask": attn_mask, "is_causal": False if is_causal is None else is_causal}
    call |= {"enable_gqa": True, "layout": "BLHD"}
    if key_padding_mask is None:
        return call
    return without_padding(call, key_padding_mask, heads.key.shape[:-3], heads.key.shape[-3])


def _joined(attended: np.ndarray) -> np.ndarray:
    """(B, L, H, D) as (B, L, H D)."""
    *rows, heads, size = attended.shape
    return attended.reshape(*rows, heads * size)
