"""The weights of a multi-head layer: their names and shapes, those of `torch.nn.MultiheadAttention`, and first values.

Shape letters: E, Ek and Ev widths of the inputs for query, key and value, Eo width of the output, Hq and Hkv heads, D
and Dv head sizes; n = Hq D + Hkv D + Hkv Dv.

    in_proj_weight (n, E)                      rows of query heads, then of key heads, then of value heads; or
    q_proj_weight (Hq D, E), k_proj_weight (Hkv D, Ek), v_proj_weight (Hkv Dv, Ev)
    in_proj_bias (n,)                          optional
    out_proj.weight (Eo, Hq Dv)
    out_proj.bias (Eo,)                        optional
    q_norm.weight (D,), k_norm.weight (D,)     optional, not torch's: gains of RMS normalisation of each head
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from numba_attn import checks

PACKED = "in_proj_weight"
SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
NORMS = ("q_norm.weight", "k_norm.weight")
NAMES = (PACKED, *SEPARATE, "in_proj_bias", "out_proj.weight", "out_proj.bias", *NORMS)
ROLES = ("query", "key", "value")

Parameters = dict[str, np.ndarray]


class Sizes(NamedTuple):
    """Of a layer."""

    Hq: int
    Hkv: int
    D: int
    Dv: int
    widths: tuple[int, int, int]  # E, Ek, Ev
    out_width: int

    @property
    def heads(self) -> tuple[tuple[int, int], ...]:
        """How many and of which size, of query, key and value."""
        return (self.Hq, self.D), (self.Hkv, self.D), (self.Hkv, self.Dv)

    @property
    def rows(self) -> tuple[slice, slice, slice]:
        """Which rows of packed weights, and of the bias, are for query, key and value."""
        q = self.Hq * self.D
        k = q + self.Hkv * self.D
        return slice(0, q), slice(q, k), slice(k, k + self.Hkv * self.Dv)


# Checks ---------------------------------------------------------------------------------------------------------------


def checked(parameters: Any, num_heads: Any, num_kv_heads: Any) -> tuple[Parameters, Sizes]:
    """The parameters of a layer and its sizes, or an error that names what does not fit."""
    if not isinstance(parameters, Mapping):
        raise TypeError(f"parameters must be a mapping from names to arrays, got {checks.type_name(parameters)}")
    if unknown := [name for name in parameters if name not in NAMES]:
        raise ValueError(f"parameters has unknown names {unknown}, known are {', '.join(NAMES)}")
    separate = [name for name in SEPARATE if name in parameters]
    if (PACKED in parameters) == bool(separate) or len(separate) not in (0, 3) or "out_proj.weight" not in parameters:
        raise ValueError(
            f"parameters must have out_proj.weight and either {PACKED} or all of {', '.join(SEPARATE)}, "
            f"got {', '.join(parameters) or 'none'}"
        )
    Hq = count("num_heads", num_heads)
    Hkv = Hq if num_kv_heads is None else count("num_kv_heads", num_kv_heads)
    if Hq % Hkv:
        raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {Hq} and {Hkv}")
    arrays = {name: _array(name, x) for name, x in parameters.items()}
    if len({x.dtype for x in arrays.values()}) > 1:
        raise TypeError(f"parameters must have one dtype, got {', '.join(f'{n} {x.dtype}' for n, x in arrays.items())}")
    sizes = _sizes(arrays, Hq, Hkv)
    for name, expected in shapes(sizes, PACKED in arrays).items():
        if name in arrays and arrays[name].shape != expected:
            raise ValueError(
                f"{name} must have shape {expected} for {Hq} query and {Hkv} key-value heads of {sizes.D}, values of "
                f"{sizes.Dv}, got {arrays[name].shape}"
            )
    return arrays, sizes


def count(name: str, x: Any) -> int:
    return checks.at_least(name, x, 1)


def floating(name: str, dtype: np.dtype) -> np.dtype:
    """One of the dtypes that NumPy's BLAS has."""
    if dtype.char not in "fd":
        reason = ": NumPy multiplies 16-bit matrices without BLAS" if dtype.itemsize == 2 else ""
        raise TypeError(f"{name} must be float32 or float64, got {dtype}{reason}")
    return dtype


def _array(name: str, x: Any) -> np.ndarray:
    x = checks.numpy_array(name, x)
    floating(name, x.dtype)
    axes = 2 if name in (PACKED, *SEPARATE, "out_proj.weight") else 1
    if x.ndim != axes:
        raise ValueError(f"{name} must have {axes} {'axes' if axes > 1 else 'axis'}, got shape {x.shape}")
    return x


def _sizes(arrays: Parameters, Hq: int, Hkv: int) -> Sizes:
    """What the shapes of the products tell, if the numbers of heads divide them."""
    out_width, joined = arrays["out_proj.weight"].shape
    if joined % Hq:
        raise ValueError(f"out_proj.weight must have a multiple of num_heads = {Hq} columns, got {joined}")
    Dv = joined // Hq
    if PACKED in arrays:
        n, E = arrays[PACKED].shape
        D, rest = divmod(n - Hkv * Dv, Hq + Hkv)
        if rest or D < 0:
            raise ValueError(
                f"{PACKED} must have a row for each element of {Hq} query, {Hkv} key and {Hkv} value heads, these last "
                f"of {Dv} as out_proj.weight says, got {n}"
            )
        return Sizes(Hq, Hkv, D, Dv, (E, E, E), out_width)
    D, rest = divmod(len(arrays["q_proj_weight"]), Hq)
    if rest:
        raise ValueError(f"q_proj_weight must have a multiple of num_heads = {Hq} rows, got {D * Hq + rest}")
    E, Ek, Ev = (arrays[name].shape[1] for name in SEPARATE)
    return Sizes(Hq, Hkv, D, Dv, (E, Ek, Ev), out_width)


def shapes(sizes: Sizes, packed: bool) -> dict[str, tuple[int, ...]]:
    """Of all parameters that a layer of these sizes can have."""
    rows = [heads * size for heads, size in sizes.heads]
    separate = {name: (n, width) for name, n, width in zip(SEPARATE, rows, sizes.widths, strict=True)}
    return {
        **({PACKED: (sum(rows), sizes.widths[0])} if packed else separate),
        "in_proj_bias": (sum(rows),),
        "out_proj.weight": (sizes.out_width, sizes.Hq * sizes.Dv),
        "out_proj.bias": (sizes.out_width,),
        **dict.fromkeys(NORMS, (sizes.D,)),
    }


# First values ---------------------------------------------------------------------------------------------------------


def drawn(rng: np.random.Generator, sizes: Sizes, bias: bool, qk_norm: bool, dtype: np.dtype) -> Parameters:
    """First values as torch has them, packed if query, key and value are of one width.

    Input projections are uniform within sqrt(6 / (m + n)), of m columns and n rows (Glorot and Bengio, "Understanding
    the difficulty of training deep feedforward neural networks", 2010), the output projection within 1 / sqrt(m);
    biases are 0, gains 1.
    """
    packed = len(set(sizes.widths)) == 1
    found = {}
    for name, shape in shapes(sizes, packed).items():
        if name in NORMS:
            if qk_norm:
                found[name] = np.ones(shape, dtype)
        elif len(shape) == 1:
            if bias:
                found[name] = np.zeros(shape, dtype)
        else:
            bound = 1 / math.sqrt(max(shape[1], 1)) if name == "out_proj.weight" else math.sqrt(6 / max(sum(shape), 1))
            found[name] = ((2 * rng.random(shape, dtype) - 1) * dtype.type(bound)).astype(dtype)
    return found


# PyTorch --------------------------------------------------------------------------------------------------------------


def from_torch(state: Any, prefix: str) -> Parameters:
    """The parameters among the arrays of a `state_dict` that begin with a prefix."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a mapping from names to arrays, got {checks.type_name(state)}")
    if not isinstance(prefix, str):
        raise TypeError(f"prefix must be a string, got {checks.type_name(prefix)}")
    if other := [name for name in state if not isinstance(name, str)]:
        raise TypeError(f"state must have strings for names, got {other[0]!r}")
    found = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
    if any(found.get(name) is not None for name in ("bias_k", "bias_v")):
        raise NotImplementedError(
            "state has bias_k and bias_v (add_bias_kv=True), one more key and value, which are not implemented"
        )
    # What torch lists without having it is None in hand-made states.
    return {name: np.asarray(checks.on_host(name, x)) for name, x in found.items() if x is not None}


def to_torch(parameters: Parameters, sizes: Sizes) -> Parameters:
    """What a `torch.nn.MultiheadAttention` of these sizes loads: packed weights if widths are one, no bias or two."""
    E = sizes.widths[0]
    plain = sizes.Hq == sizes.Hkv and (sizes.Hq * sizes.D, sizes.Hq * sizes.Dv, sizes.out_width) == (E, E, E)
    if not plain or any(name in parameters for name in NORMS):
        raise ValueError(
            "torch.nn.MultiheadAttention has as many key-value heads as query heads, heads that fill the width of "
            f"query and output, and no normalisation, got {sizes} with {', '.join(parameters)}"
        )
    state = dict(parameters)
    if PACKED not in state and len(set(sizes.widths)) == 1:
        state[PACKED] = np.concatenate([state.pop(name) for name in SEPARATE])
    biases = {"in_proj_bias": 3 * E, "out_proj.bias": E}
    if any(name in state for name in biases):
        dtype = state["out_proj.weight"].dtype
        state = {**{name: np.zeros(n, dtype) for name, n in biases.items()}, **state}
    return state
