"""How each library is asked for a case: the arrays in its own natural form, made outside of what is timed.

A peer is made once per process, with the number of threads; `prepare` then gives the call to be timed.  What a library
has no argument for is given to it as an explicit mask, as its users would; what it cannot do at all is `Unsupported`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
from cases import Case

MOST_MEMORY = 4e9  # bytes that a peer may take for its matrices of scores


class Unsupported(Exception):
    """What a library cannot do, in a few words."""


class Prepared(NamedTuple):
    """A call on arrays that are ready."""

    call: Callable[[], Any]
    array: Callable[[Any], np.ndarray]
    """Makes (B, Hq, Lq, Dv) of what the call returns."""


class Peer:
    """A library in its own process."""

    packages: tuple[str, ...]

    def __init__(self, threads: int) -> None:
        """Most libraries take their number of threads from the environment."""

    def prepare(self, case: Case) -> Prepared:
        """Raises Unsupported."""
        raise NotImplementedError


def versions(peer: Peer) -> dict[str, str]:
    """Of the packages that the peer consists of."""
    return {name: metadata.version(name) for name in peer.packages}


# What a case asks for -------------------------------------------------------------------------------------------------


def only_causal(case: Case) -> bool:
    """Whether causal, in its plain top-left form, is all that restricts the keys."""
    return case.causal and case.options.keys() <= {"is_causal"} and case.mask is None


def explicit_mask(case: Case) -> np.ndarray | None:
    """The mask, causal, window and lengths as one array that broadcasts to (B, Hq, Lq, Lk); None if there is none.

    It is bool, True = attend, or additive if the case's own mask is.
    """
    allowed, mask = _allowed(case), _own_mask(case)
    if allowed is None or mask is None:
        return mask if allowed is None else allowed
    return mask & allowed if mask.dtype == bool else np.where(allowed, mask, mask.dtype.type(-np.inf))


def _own_mask(case: Case) -> np.ndarray | None:
    """The case's mask with four axes."""
    mask = case.keywords().get("attn_mask")
    return None if mask is None else np.asarray(mask.reshape((1,) * (4 - mask.ndim) + mask.shape))


def _allowed(case: Case) -> np.ndarray | None:
    """The keys that causal, window and lengths leave; axes on which nothing depends have length 1."""
    _refuse_options(case, {"is_causal", "window", "query_offset", "kv_lengths"})
    query = np.arange(case.Lq)[:, None] + _offset(case)
    key = np.arange(case.Lk)
    left, right = case.options.get("window") or (None, None)
    if case.causal:
        right = 0
    parts = []
    if left is not None:
        parts.append((query - left <= key)[None, None])
    if right is not None:
        parts.append((key <= query + right)[None, None])
    if "kv_lengths" in case.options:
        lengths = np.broadcast_to(case.options["kv_lengths"], case.B)
        parts.append(key < lengths[:, None, None, None])
    return np.asarray(functools.reduce(np.logical_and, parts)) if parts else None


def _offset(case: Case) -> int:
    offset = case.options.get("query_offset", 0)
    if offset == "bottom_right":
        return case.Lk - case.Lq
    if not isinstance(offset, int):
        raise Unsupported("an offset for each sequence")
    return offset


def _refuse_options(case: Case, known: set[str]) -> None:
    if unknown := case.options.keys() - known:
        raise Unsupported(", ".join(sorted(unknown)))


def _refuse_size(case: Case, copies: int) -> None:
    """Of a library that forms the whole matrix of scores, and so many of its size at the same time."""
    needed = copies * case.B * case.Hq * case.Lq * case.Lk * np.dtype(case.dtype).itemsize
    if needed > MOST_MEMORY:
        raise Unsupported(f"{needed / 1e9:.1f} GB for the scores")


def _rows_first(x: np.ndarray) -> np.ndarray:
    """A copy (B, L, H, D) of (B, H, L, D)."""
    return np.ascontiguousarray(x.swapaxes(1, 2))


# The libraries --------------------------------------------------------------------------------------------------------


class Ours(Peer):
    """This package."""

    packages = ("numba", "llvmlite", "numpy")

    def prepare(self, case: Case) -> Prepared:
        from numba_attn import scaled_dot_product_attention

        return Prepared(functools.partial(scaled_dot_product_attention, *case.arrays(), **case.keywords()), np.asarray)


class Torch(Peer):
    """`torch.nn.functional.scaled_dot_product_attention`."""

    packages = ("torch",)

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)

    def prepare(self, case: Case) -> Prepared:
        import torch

        causal = only_causal(case)
        mask = None if causal else explicit_mask(case)
        arrays = [torch.from_numpy(x) for x in case.arrays()]
        call = functools.partial(
            torch.nn.functional.scaled_dot_product_attention,
            *arrays,
            attn_mask=None if mask is None else torch.from_numpy(mask),
            is_causal=causal,
            enable_gqa=case.Hkv is not None,
        )
        return Prepared(call, lambda result: np.asarray(result.numpy()))


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
            _refuse_size(case, copies=2)
        query, key, value = (_rows_first(x).reshape(case.B, -1, x.shape[1] * x.shape[3]) for x in case.arrays())
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
        causal = only_causal(case)
        mask = None if causal else explicit_mask(case)
        _refuse_size(case, copies=2)
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

        _refuse_options(case, {"is_causal", "window", "kv_lengths"})
        _refuse_size(case, copies=2)
        arrays = [jax.numpy.asarray(_rows_first(x)) for x in case.arrays()]
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
        mask = _own_mask(case)
        if mask is not None:
            given["mask" if mask.dtype == bool else "bias"] = mask
        return {name: jax.numpy.asarray(x) for name, x in given.items()}


class NumPy(Peer):
    """The formula written down in NumPy, whose products are its BLAS library's."""

    packages = ("numpy",)

    def prepare(self, case: Case) -> Prepared:
        _refuse_size(case, copies=2)
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
    "onnx_mha": OnnxMultiHeadAttention,
    "onnx_attention": OnnxAttention,
    "jax": Jax,
    "numpy": NumPy,
}
