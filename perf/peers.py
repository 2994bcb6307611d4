"""How each library is asked for a case: the arrays in its own natural form, made outside of what is timed."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from cases import SIXTEEN_BITS, Case
from forms import FORMS
from onnx_peers import OnnxAttention, OnnxGroupQueryAttention, OnnxMultiHeadAttention
from peer import Peer, Prepared, Unsupported, explicit_mask, own_mask, refuse_options, refuse_size, rows_first
from torch_peers import FlexAttention, Torch


class Ours(Peer):
    """This package."""

    packages = ("numba", "llvmlite", "numpy")
    forms = tuple(FORMS)

    def prepare(self, case: Case) -> Prepared:
        from numba_attn import scaled_dot_product_attention

        arrays = case.arrays()
        read = arrays[1:] if "reads" in case.tags else ()
        call = functools.partial(scaled_dot_product_attention, *arrays, **case.keywords())
        return Prepared(
            call,
            lambda result: result[0] if isinstance(result, tuple) else result,
            sum(x.nbytes for x in read),
            read,
        )

    def prepare_form(self, case: Case, form: str) -> Prepared:
        return FORMS[form](case)


class Jax(Peer):
    """`jax.nn.dot_product_attention` on (B, L, H, D), compiled; its thread count comes from the environment."""

    packages = ("jax", "jaxlib")

    def __init__(self, threads: int) -> None:
        import jax

        config: Any = jax.config
        config.update("jax_platforms", "cpu")
        config.update("jax_enable_x64", True)  # for float64 cases; the others stay float32

    def prepare(self, case: Case) -> Prepared:
        import jax

        if case.dtype == "float16":  # it has no such products with float32 sums on a CPU
            raise Unsupported(case.dtype)
        refuse_options(case, {"is_causal", "window", "kv_lengths", "alibi_slopes"})
        refuse_size(case, copies=2)
        arrays = [jax.numpy.asarray(rows_first(x)) for x in case.arrays()]
        attention = functools.partial(jax.nn.dot_product_attention, is_causal=case.causal, **self._window(case))
        given = self._arrays(case)
        compiled = jax.jit(attention).lower(*arrays, **given).compile()
        return Prepared(
            lambda: compiled(*arrays, **given).block_until_ready(), lambda result: np.asarray(result).swapaxes(1, 2)
        )

    @staticmethod
    def _window(case: Case) -> dict[str, Any]:
        if case.options.get("window") is None:
            return {}
        return {"local_window_size": tuple(case.Lk if side is None else side for side in case.options["window"])}

    @staticmethod
    def _arrays(case: Case) -> dict[str, Any]:
        """Mask and lengths, under the names that JAX has for them."""
        import jax

        given = {}
        if "kv_lengths" in case.options:
            given["key_value_seq_lengths"] = np.broadcast_to(case.options["kv_lengths"], case.B).astype(np.int32)
        mask = own_mask(case)
        if mask is not None:
            given["mask" if mask.dtype == bool else "bias"] = mask
        return {name: jax.numpy.asarray(x) for name, x in given.items()}


class NumPy(Peer):
    """The formula written down in NumPy, whose products are its BLAS library's."""

    packages = ("numpy",)

    def prepare(self, case: Case) -> Prepared:
        if case.dtype in SIXTEEN_BITS:  # of which there are no products in BLAS
            raise Unsupported(case.dtype)
        refuse_size(case, copies=2)
        mask = explicit_mask(case)
        if mask is not None and mask.dtype == bool:
            mask = np.where(mask, 0, -np.inf).astype(case.dtype)
        query, key, value = case.arrays()
        if case.Hkv is not None:  # one more axis: the query heads that share a key-value head
            query = query.reshape(case.B, case.Hkv, -1, case.Lq, case.D)
            key, value = key[:, :, None], value[:, :, None]
            if mask is not None:
                heads = (case.Hkv, -1) if mask.shape[1] > 1 else (1, 1)
                mask = mask.reshape(mask.shape[0], *heads, *mask.shape[2:])
        shape = (case.B, case.Hq, case.Lq, -1)
        return Prepared(
            functools.partial(naive_attention, query, key, value, mask), lambda result: result.reshape(shape)
        )


def naive_attention(query: np.ndarray, key: np.ndarray, value: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """softmax(Q K^T / sqrt(D) + mask) V, with no more temporary arrays than needed."""
    weight = query @ key.swapaxes(-1, -2)
    weight *= weight.dtype.type(query.shape[-1] ** -0.5)
    if mask is not None:
        weight += mask
    weight -= weight.max(axis=-1, keepdims=True)
    np.exp(weight, out=weight)
    weight /= weight.sum(axis=-1, keepdims=True)
    return np.asarray(weight @ value)


PEERS: dict[str, type[Peer]] = {
    "ours": Ours,
    "torch": Torch,
    "flex": FlexAttention,
    "onnx_mha": OnnxMultiHeadAttention,
    "onnx_attention": OnnxAttention,
    "onnx_gqa": OnnxGroupQueryAttention,
    "jax": Jax,
    "numpy": NumPy,
}
