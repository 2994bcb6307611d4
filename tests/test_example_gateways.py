"""The gateways to other libraries, where those are installed: values and gradients are theirs."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

GATEWAYS = Path(__file__).parents[1] / "examples" / "gateways"


def gateway(name: str, library: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries, as they are imported
        pytest.importorskip(library)
        sys.path.insert(0, str(GATEWAYS))
        try:
            return importlib.import_module(name)
        finally:
            sys.path.remove(str(GATEWAYS))


def inputs(dtype: Any = np.float64) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((2, 3, L, 8)).astype(dtype) for L in (17, 23, 23)]


def eager(np_like: Any, query: Any, key: Any, value: Any) -> Any:
    """Causal attention, of arrays of a library that is like NumPy."""
    score = np_like.einsum("bhid,bhjd->bhij", query, key) / np.sqrt(query.shape[-1])
    score = np_like.where(np.tri(*score.shape[-2:], dtype=bool), score, -np.inf)
    weight = np_like.exp(score - score.max(axis=-1, keepdims=True))
    return np_like.einsum("bhij,bhjd->bhid", weight / weight.sum(axis=-1, keepdims=True), value)


def test_autograd() -> None:
    attention = gateway("autograd_attention", "autograd").attention
    import autograd
    import autograd.numpy as anp

    def ours(*arrays: Any) -> Any:
        return anp.sum(anp.sin(attention(*arrays, is_causal=True)))

    def theirs(*arrays: Any) -> Any:
        return anp.sum(anp.sin(eager(anp, *arrays)))

    for argnum in range(3):
        got, expected = (autograd.grad(f, argnum)(*inputs()) for f in (ours, theirs))
        np.testing.assert_allclose(got, expected, atol=1e-12)


def test_autograd_drops_the_same() -> None:
    """The result is linear in the values, so the gradient times them is the result."""
    attention = gateway("autograd_attention", "autograd").attention
    import autograd

    query, key, value = inputs()
    np.random.seed(1)  # noqa: NPY002
    loss = autograd.value_and_grad(lambda v: attention(query, key, v, dropout_p=0.5).sum())
    for _ in range(2):
        total, grad = loss(value)
        np.testing.assert_allclose((grad * value).sum(), total, rtol=1e-9)


def test_torch() -> None:
    attention = gateway("torch_attention", "torch").attention
    import torch

    tensors = [torch.from_numpy(x).requires_grad_() for x in inputs()]
    results = []
    for attend in (attention, torch.nn.functional.scaled_dot_product_attention):
        out = attend(*tensors, is_causal=True)
        results.append((out, *torch.autograd.grad(out.sin().sum(), tensors)))
    for got, expected in zip(*results, strict=True):
        np.testing.assert_allclose(got.detach(), expected.detach(), atol=1e-12)


def test_torch_mask_and_sinks() -> None:
    attention = gateway("torch_attention", "torch").attention
    import torch

    query, key, value = (torch.from_numpy(x).requires_grad_() for x in inputs())
    mask = torch.randn(3, 17, 23, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def theirs() -> Any:
        score = query @ key.mT / 8**0.5 + mask
        score = torch.cat([score, sinks[:, None, None].expand(2, 3, 17, 1)], dim=-1)
        return torch.softmax(score, dim=-1)[..., :-1] @ value

    results = []
    for out in (attention(query, key, value, mask, sinks=sinks), theirs()):
        results.append((out, *torch.autograd.grad(out.sin().sum(), (query, key, value, mask, sinks))))
    for got, expected in zip(*results, strict=True):
        np.testing.assert_allclose(got.detach(), expected.detach(), atol=1e-12)


def test_jax() -> None:
    attention = gateway("jax_attention", "jax").attention
    import jax
    import jax.numpy as jnp

    arrays = [jnp.asarray(x) for x in inputs(np.float32)]

    def ours(*arrays: Any) -> Any:
        return jnp.sin(attention(*arrays, True)).sum()

    def theirs(*arrays: Any) -> Any:
        return jnp.sin(eager(jnp, *arrays)).sum()

    for transform in (lambda f: f, jax.jit):
        got, expected = (transform(jax.grad(f, argnums=(0, 1, 2)))(*arrays) for f in (ours, theirs))
        for x, y in zip(got, expected, strict=True):
            np.testing.assert_allclose(x, y, atol=2e-5)


SMALL: dict[str, Any] = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 2, "vocab_size": 99}
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64}
T5 = {"d_model": 48, "d_kv": 8, "d_ff": 64, "num_heads": 6, "num_layers": 2, "vocab_size": 99}
MODELS: dict[str, dict[str, Any]] = {
    "Gemma2": {**GROUPED, "attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 8, "initializer_range": 0.1},
    "T5": T5,
    "Bert": {**SMALL, "intermediate_size": 64},
    "Llama": GROUPED,
    "GptOss": {**GROUPED, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
}


HEADS = {"Bert": "ForMaskedLM", "T5": "ForConditionalGeneration"}


def model_of(name: str) -> Any:
    """A model with random weights."""
    pytest.importorskip("torch")
    gateway("huggingface_attention", "transformers")
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    return getattr(transformers, name + HEADS.get(name, "ForCausalLM"))(config).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padded", [False, True])
def test_transformers(name: str, padded: bool) -> None:
    """Logits of a model that attends eagerly and by us."""
    model = model_of(name)
    import torch

    tokens, mask = torch.randint(0, 99, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    if padded:
        mask[1, 13:] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask}
    if name == "T5":
        inputs["decoder_input_ids"] = tokens[:, ::2]
    logits = []
    for implementation in ("eager", "numba_attn"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            logits.append(model(**inputs).logits)
    kept = mask.bool() if name != "T5" else torch.ones(2, 10, dtype=bool)
    np.testing.assert_allclose(logits[1][kept], logits[0][kept], rtol=1e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Llama", "GptOss", "Gemma2", "T5"])
def test_training_of_transformers(name: str) -> None:
    """Gradients of every weight: those of projections, sinks and relative positions come by way of attention."""
    model = model_of(name)
    import torch

    tokens, gradients = torch.randint(0, 99, (2, 12)), []
    for implementation in ("eager", "numba_attn"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        decoder = {"decoder_input_ids": tokens} if name == "T5" else {}
        model(input_ids=tokens, labels=tokens, **decoder).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for weight, expected in gradients[0].items():
        size = expected.abs().max().item()
        np.testing.assert_allclose(gradients[1][weight], expected, atol=1e-3 * size + 1e-7, err_msg=weight)
