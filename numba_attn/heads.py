"""From the inputs of a multi-head layer to query, key and value heads, and from gradients of heads back.

Heads are products with weights, then normalised, then rotated.  Shape letters as in `numba_attn.multihead`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from numba_attn import checks
from numba_attn.parameters import NORMS, PACKED, ROLES, SEPARATE, Parameters, Sizes
from numba_attn.primitives import project, project_adjoint, rms_normalize, rms_normalize_adjoint, rotate

Rotary = tuple[np.ndarray, np.ndarray]


class Product(NamedTuple):
    """One matrix product: an input, and the roles, 0 query, 1 key, 2 value, of the heads that it gives, in a row."""

    x: np.ndarray  # (*batch, L, width)
    roles: tuple[int, ...]
    out: np.ndarray  # (*batch, L, rows of weight)


class Heads(NamedTuple):
    """Memory for heads, and what is to be multiplied to get them."""

    products: list[Product]
    arguments: tuple[int, int, int]  # of the roles: which argument is the input, as a query may be key and value too
    query: np.ndarray  # (*batch, Lq, Hq, D), a view of a product's out, as are the others
    key: np.ndarray  # (*batch, Lk, Hkv, D)
    value: np.ndarray  # (*batch, Lk, Hkv, Dv)

    @property
    def operands(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of attention."""
        return self.query, self.key, self.value


class Offsets(NamedTuple):
    """Positions of the first rows of queries and of keys: an integer each, or one for each sequence."""

    query: Any
    key: Any


def checked_rotary(rotary: Any, D: int) -> tuple[np.ndarray, np.ndarray]:
    """Tables that rotate heads of that size at any position that they have."""
    if not isinstance(rotary, tuple | list) or len(rotary) != 2:
        raise TypeError(f"rotary must be a pair of tables (cos, sin), got {checks.type_name(rotary)}")
    cos, sin = (checks.floating_array(name, x) for name, x in zip(("rotary cos", "rotary sin"), rotary, strict=True))
    if cos.ndim != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > D:
        raise ValueError(
            f"rotary must be two tables (positions, R / 2) with R at most {D}, got shapes {cos.shape} and {sin.shape}"
        )
    return cos, sin


@dataclass(frozen=True, slots=True)
class Projection:
    """How a layer makes heads of its inputs."""

    parameters: Parameters
    sizes: Sizes
    rotary: Rotary | None
    interleaved: bool
    epsilon: float

    def allocate(self, query: Any, key: Any, value: Any) -> Heads:
        """Check the inputs, and reserve memory for their heads: of as few products as inputs and weights allow."""
        arguments = (0, 0, 0) if key is None else (0, 1, 1) if value is None else (0, 1, 2)
        inputs = self._inputs(query, key, value, arguments)
        roles: tuple[tuple[int, ...], ...] = ((0,), (1,), (2,))
        if PACKED in self.parameters:
            roles = {(0, 0, 0): ((0, 1, 2),), (0, 1, 1): ((0,), (1, 2))}.get(arguments, roles)
        products, views = [], []
        for some in roles:
            x, rows = inputs[some[0]], self._rows(some)
            out = np.empty((*x.shape[:-1], rows.stop - rows.start), x.dtype)
            products.append(Product(x, some, out))
            for role in some:
                part = self.sizes.rows[role]
                view = out[..., part.start - rows.start : part.stop - rows.start]
                views.append(view.reshape(*x.shape[:-1], *self.sizes.heads[role]))
        return Heads(products, arguments, *views)

    def check_positions(self, heads: Heads, offsets: Offsets, name: str) -> None:
        """There are angles for all rows; `name` is what the offset of the queries is from."""
        if self.rotary is None:
            return
        positions, unplaced = len(self.rotary[0]), f"{name} must be 0 or more with rotary positions"
        for role, x, offset in (("query", heads.query, offsets.query), ("key", heads.key, offsets.key)):
            if wrong := checks.out_of_positions(role, offset, x.shape[-3], positions, unplaced):
                raise ValueError(wrong)

    def compute(self, heads: Heads, offsets: Offsets, keep: bool = False) -> list[np.ndarray | None]:
        """Write the heads; if `keep`, queries and keys as they were before their normalisation are returned."""
        for x, roles, out in heads.products:
            project(x, self._weight(roles), self._bias(roles), out)
        before: list[np.ndarray | None] = [None, None]
        for role, (x, offset) in enumerate(((heads.query, offsets.query), (heads.key, offsets.key))):
            gain = self.parameters.get(NORMS[role])
            if gain is not None:
                before[role] = x.copy() if keep else None
                rms_normalize(x, gain, self.epsilon, out=x)
            if self.rotary is not None:
                rotate(x, self.rotary, offset, self.interleaved)
        return before

    def adjoint(
        self,
        heads: Heads,
        offsets: Offsets,
        before: list[np.ndarray | None],
        gradients: tuple[np.ndarray, np.ndarray, np.ndarray],
        into: Parameters,
    ) -> dict[str, np.ndarray]:
        """Gradients with respect to the arguments, from those of heads; those of parameters go `into` arrays."""
        grads = [np.array(grad, order="C") for grad in gradients]  # not the caller's
        for role, offset in enumerate(offsets):
            if self.rotary is not None:
                rotate(grads[role], self.rotary, offset, self.interleaved, transposed=True)
            x, name = before[role], NORMS[role]
            if x is not None:
                grads[role], into[name][...] = rms_normalize_adjoint(
                    grads[role], x, self.parameters[name], self.epsilon
                )
        found: dict[str, np.ndarray] = {}
        for x, roles, _ in heads.products:
            for role in roles:
                argument, rows = ROLES[heads.arguments[role]], self.sizes.rows[role]
                if argument not in found:
                    found[argument] = np.zeros(x.shape, x.dtype)
                project_adjoint(
                    grads[role].reshape(*x.shape[:-1], rows.stop - rows.start),
                    x,
                    self._weight((role,)),
                    found[argument],
                    into[PACKED][rows] if PACKED in into else into[SEPARATE[role]],
                    into["in_proj_bias"][rows] if "in_proj_bias" in into else None,
                )
        return found

    def _inputs(self, query: Any, key: Any, value: Any, arguments: tuple[int, int, int]) -> list[np.ndarray]:
        """Of query, key and value heads, checked."""
        if key is None and value is not None:
            raise ValueError("value must not be given without key")
        dtype = self.parameters["out_proj.weight"].dtype
        given = [
            None if x is None and name != "query" else checks.numpy_array(name, x)
            for name, x in zip(ROLES, (query, key, value), strict=True)
        ]
        inputs = []
        for role, argument in enumerate(arguments):
            x, name, width = given[argument], ROLES[argument], self.sizes.widths[role]
            assert x is not None
            if x.dtype != dtype:
                raise TypeError(f"{name} must be {dtype}, as the layer is, got {x.dtype}")
            if x.ndim < 2 or x.shape[-1] != width:
                raise ValueError(f"{name} must have shape (..., length, {width}), got {x.shape}")
            inputs.append(x)
        q, k, v = inputs
        if not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
            raise ValueError(
                "query, key and value must have the same batch axes, "
                f"got {q.shape[:-2]}, {k.shape[:-2]} and {v.shape[:-2]}"
            )
        if k.shape[-2] != v.shape[-2]:
            raise ValueError(f"key and value must have the same length, got {k.shape[-2]} and {v.shape[-2]}")
        return inputs

    def _rows(self, roles: tuple[int, ...]) -> slice:
        """Of packed weights and of the bias."""
        return slice(self.sizes.rows[roles[0]].start, self.sizes.rows[roles[-1]].stop)

    def _weight(self, roles: tuple[int, ...]) -> np.ndarray:
        if PACKED in self.parameters:
            return self.parameters[PACKED][self._rows(roles)]
        return self.parameters[SEPARATE[roles[0]]]

    def _bias(self, roles: tuple[int, ...]) -> np.ndarray | None:
        bias = self.parameters.get("in_proj_bias")
        return None if bias is None else bias[self._rows(roles)]
