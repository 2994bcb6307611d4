"""ONNX Runtime's three operators, each a model of one node."""

from __future__ import annotations

import functools
import os
import timeit
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from cases import Case
from peer import Peer, Prepared, Unsupported, explicit_mask, only_causal, own_mask, refuse_size, rows_first

# By which a new session takes the other kernel of GroupQueryAttention: neither is the faster everywhere.
FLASH_DISABLED = "ORT_GQA_DISABLE_FLASH_ATTENTION"


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
        query, key, value = (_tokens(x) for x in case.arrays())
        inputs = {"query": query, "key": key, "value": value, **self._masks(case, mask)}
        names = ("query", "key", "value", "bias", "key_padding_mask", "attention_bias")
        session = _session(
            self._threads,
            "MultiHeadAttention",
            [name if name in inputs else "" for name in names],
            inputs,
            domain="com.microsoft",
            num_heads=case.Hq,
            unidirectional=int(causal),
        )
        call = functools.partial(session.run, None, inputs)
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
        session = _session(self._threads, "Attention", list(inputs), inputs, is_causal=int(causal))
        return Prepared(functools.partial(session.run, None, inputs), lambda out: np.asarray(out[0]))


class OnnxGroupQueryAttention(Peer):
    """`com.microsoft.GroupQueryAttention`, which adds the last tokens to a cache (B, Hkv, L, D), in place, first.

    Each row attends to what comes before it: so it can do one token, whole causal problems and trees.
    """

    packages = ("onnxruntime", "onnx")
    forms = ("int8", "int4")

    def __init__(self, threads: int) -> None:
        self._threads = threads

    def prepare(self, case: Case) -> Prepared:
        if case.dtype != "float32":
            raise Unsupported(case.dtype)
        if case.Dv not in (None, case.D):
            raise Unsupported("a value head size of its own")
        tree = case.mask == "bool tree"
        if not (tree or (only_causal(case) and case.Lq == case.Lk) or (case.Lq == 1 and explicit_mask(case) is None)):
            raise Unsupported("neither one token, nor plainly causal, nor a tree")
        refuse_size(case, copies=1)  # one of its kernels forms the scores
        query, key, value = case.arrays()
        return self._prepared(case, (query, key, value), {"past_key": key, "past_value": value})

    def prepare_form(self, case: Case, form: str) -> Prepared:
        """A cache of integers, with a scale for each column of each head: the finer of the two ways that there are."""
        bits = int(form.removeprefix("int"))
        query, key, value = case.arrays()
        cache = {}
        for name, x in (("key", key), ("value", value)):
            cache[f"past_{name}"], cache[f"{name[0]}_scale"] = _quantized(x, bits)
        kinds = dict.fromkeys(("k_quant_type", "v_quant_type"), "PER_CHANNEL")
        prepared = self._prepared(case, (query, key, value), cache, kv_cache_bit_width=bits, **kinds)
        return prepared._replace(bytes=sum(x.nbytes for x in cache.values()))

    def _prepared(
        self, case: Case, arrays: Sequence[np.ndarray], cache: dict[str, np.ndarray], **kind: Any
    ) -> Prepared:
        """The last rows of key and value are those to be added to the cache, which has room for them."""
        names = ("query", "key", "value")
        inputs = {name: _tokens(x[:, :, -case.Lq :]) for name, x in zip(names, arrays, strict=True)} | cache
        inputs["seqlens_k"] = np.full(case.B, case.Lk - 1, np.int32)
        inputs["total_sequence_length"] = np.array(case.Lk, np.int32)
        if (mask := own_mask(case)) is not None:
            inputs["attention_bias"] = np.where(mask, np.float32(0), np.float32(-np.inf))
        order = (
            *(*names, "past_key", "past_value", "seqlens_k", "total_sequence_length"),
            *("cos_cache", "sin_cache", "position_ids", "attention_bias", "head_sink", "k_scale", "v_scale"),
        )
        out = np.empty_like(inputs["query"])
        outputs = {"out": out, "present_key": cache["past_key"], "present_value": cache["past_value"]}
        calls = []
        for disabled in ("0", "1"):
            os.environ[FLASH_DISABLED] = disabled
            session = _session(
                self._threads,
                "GroupQueryAttention",
                [name if name in inputs else "" for name in order],
                inputs,
                {name: x.dtype for name, x in outputs.items()},
                domain="com.microsoft",
                num_heads=case.Hq,
                kv_num_heads=case.Hkv or case.Hq,
                **kind,
            )
            calls.append(_bound(session, inputs, outputs))
        fastest = min(calls, key=lambda call: min(timeit.repeat(call, number=1, repeat=3)))
        return Prepared(fastest, lambda _: out.reshape(case.B, case.Lq, case.Hq, -1).swapaxes(1, 2))


def _tokens(x: np.ndarray) -> np.ndarray:
    """(B, L, H * D) of (B, H, L, D)."""
    return rows_first(x).reshape(x.shape[0], x.shape[2], -1)


def _quantized(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(B, H, L, D) as signed integers, two of 4 bits in a byte, and their scales (H, 1, D)."""
    most = 2 ** (bits - 1) - 1
    scale = np.abs(x).max(axis=(0, 2), keepdims=True) / np.float32(most)
    steps = np.rint(x / scale).astype(np.int8)
    if bits == 4:
        halves = (steps + 8).astype(np.uint8)
        steps = halves[..., ::2] | halves[..., 1::2] << 4
    return np.ascontiguousarray(steps), np.ascontiguousarray(scale[0])


def _bound(session: Any, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> Callable[[], None]:
    """A run on memory that stays where it is, outputs on that of inputs if they are the same arrays."""
    binding = session.io_binding()
    for bind, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
        for name, x in arrays.items():
            bind(name, "cpu", 0, x.dtype, x.shape, x.ctypes.data)
    held = inputs, outputs  # the binding knows only addresses

    def call() -> None:
        session.run_with_iobinding(binding)
        assert held

    return call


def _session(
    threads: int,
    operator: str,
    names: list[str],
    inputs: Mapping[str, np.ndarray],
    outputs: Mapping[str, np.dtype] | None = None,
    **attributes: Any,
) -> Any:
    """A model of one node for such `inputs`; a name "" is an optional one left out.

    Its output is "out", of the type of the first input, unless others are named with their types.
    """
    import onnxruntime
    from onnx import helper

    def described(name: str, dtype: np.dtype, shape: tuple[int, ...] | None = None) -> Any:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), shape)

    while not names[-1]:
        names.pop()
    outputs = outputs or {"out": next(iter(inputs.values())).dtype}
    node = helper.make_node(operator, names, list(outputs), **attributes)
    given = [described(name, x.dtype, x.shape) for name, x in inputs.items()]
    graph = helper.make_graph([node], "attention", given, [described(*item) for item in outputs.items()])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    except onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented as error:
        raise Unsupported(str(error).splitlines()[0]) from error
