"""How each library is asked for a case: the arrays in its own natural form, made outside of what is timed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from cases import SIXTEEN_BITS, Case
from peer import (
    Peer,
    Prepared,
    Unsupported,
    explicit_mask,
    only_causal,
    own_mask,
    refuse_options,
    refuse_size,
    rows_first,
)
from torch_peers import FlexAttention, Torch


class Ours(Peer):
    """This package."""

    packages = ("numba", "llvmlite", "numpy")

    def prepare(self, case: Case) -> Prepared:
        from numba_attn import scaled_dot_product_attention

        call = functools.partial(scaled_dot_product_attention, *case.arrays(), **case.keywords())
        return Prepared(call, lambda result: result[0] if isinstance(result, tuple) else result)


class OnnxMultiHeadAttention(Peer):
    """ONNX Runtime's own operator, `com.microsoft.MultiHeadAttention`, on (B, L, H * D)."""

    packages = ("onnxruntime", "onnx")

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def prepare(self, case: Case) -> Prepared:
        if case.dtype != "float32":
            raise Unsupported(case.dtype)
        if case.Hkv not in (None, case.Hq):
            raise Unsupported("grouped heads")
        causal = only_causal(case)
        mask = None if causal else explicit_mask(case)
        if causal or mask is not None:  # only the plain case has a kernel without the matrix
            refuse_size(case, copies=2)
        query, key, value = (rows_first(x).reshape(case.B, -1, x.shape[1] * x.shape[3]) for x in case.arrays())
        inputs = {"query": query, "key": key, "value": value, **self._masks(case, mask)}
        names = ("query", "key", "value", "bias", "key_padding_mask", "attention_bias")
        call = _onnx_session(
            self._threads,
            "MultiHeadAttention",
            [name if name in inputs else "" for name in names],
            inputs,
            domain="com.microsoft",
            num_heads=case.Hq,
            unidirectional=int(causal),
        )
        return Prepared(call, lambda out: out[0].reshape(case.B, case.Lq, case.Hq, -1).swapaxes(1, 2))

    @staticmethod
    def _masks(case: Case, mask: np.ndarray | None) -> dict[str, np.ndarray]:
        """One of the operator's two: for keys alone (B, Lk) integers, or a bias for each pair."""
        if mask is None:
            return {}
        if mask.dtype == bool and mask.shape[1:3] == (1, 1):
            return {"key_padding_mask": np.broadcast_to(mask[:, 0, 0], (case.B, case.Lk)).astype(np.int32)}
        if mask.dtype == bool:
            mask = np.where(mask, np.float32(0), np.float32(-np.inf))
        return {"attention_bias": np.ascontiguousarray(np.broadcast_to(mask, (*mask.shape[:2], case.Lq, case.Lk)))}


class OnnxAttention(Peer):
    """The standard ONNX operator `Attention` of opset 23, on (B, H, L, D), in ONNX Runtime."""

    packages = ("onnxruntime", "onnx")

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def prepare(self, case: Case) -> Prepared:
        if case.dtype == "bfloat16":
            raise Unsupported(case.dtype)
        causal = only_causal(case)
        mask = None if causal else explicit_mask(case)
        refuse_size(case, copies=2)
        inputs = dict(zip(("Q", "K", "V"), case.arrays(), strict=True))
        if mask is not None:  # the last two axes must be whole
            whole = np.broadcast_to(mask, (*mask.shape[:2], case.Lq, case.Lk))
            inputs["attn_mask"] = np.ascontiguousarray(whole)
        call = _onnx_session(self._threads, "Attention", list(inputs), inputs, is_causal=int(causal))
        return Prepared(call, lambda out: np.asarray(out[0]))


def _onnx_session(
    threads: int, operator: str, names: list[str], inputs: dict[str, np.ndarray], **attributes: Any
) -> Callable[[], Any]:
    """A model of one node, fed with `inputs`; a name "" is an optional input left out."""
    import onnxruntime
    from onnx import helper

    def described(name: str, x: np.ndarray) -> Any:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)

    while not names[-1]:
        names.pop()
    first = next(iter(inputs.values()))
    output = helper.make_tensor_value_info("out", helper.np_dtype_to_tensor_dtype(first.dtype), None)
    node = helper.make_node(operator, names, ["out"], **attributes)
    graph = helper.make_graph([node], "attention", [described(*item) for item in inputs.items()], [output])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented as error:
        raise Unsupported(str(error).splitlines()[0]) from error
    return functools.partial(session.run, None, inputs)


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
    "jax": Jax,
    "numpy": NumPy,
}
