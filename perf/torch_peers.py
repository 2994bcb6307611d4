"""PyTorch's two functions: the fused one, and the one that compiles what it is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from cases import Case, dtype_of
from forms import layer_weights, plain_result, upstream
from peer import Peer, Prepared, Unsupported, explicit_mask, joined, only_causal, sequences, within

BFLOAT16 = "bfloat16"


class Torch(Peer):
    """`torch.nn.functional.scaled_dot_product_attention`."""

    packages = ("torch",)
    forms: tuple[str, ...] = ("loop", "padded", "gradient", "backward", "layer")

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)

    def prepare(self, case: Case) -> Prepared:
        import torch

        causal = only_causal(case)
        mask = None if causal else explicit_mask(case)
        call = functools.partial(
            torch.nn.functional.scaled_dot_product_attention,
            *(tensor(x) for x in case.arrays()),
            attn_mask=None if mask is None else tensor(mask),
            is_causal=causal,
            enable_gqa=case.Hkv is not None,
        )
        return Prepared(call, array)

    def prepare_form(self, case: Case, form: str) -> Prepared:
        """Gradients, a layer; or sequences of many lengths in a call for each, or as if all were of the greatest."""
        import torch

        if form in ("gradient", "backward"):
            return _gradient(case, alone=form == "backward")
        if form == "layer":
            state, x = layer_weights(case)
            layer = torch.nn.MultiheadAttention(x.shape[-1], case.Hq, batch_first=True).eval()
            layer.load_state_dict({name: tensor(weight) for name, weight in state.items()})
            operands = [tensor(x)] * 3
            return Prepared(lambda: layer(*operands, need_weights=False), plain_result(case))
        attention = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
        if form == "padded":
            whole = functools.partial(attention, *(tensor(x) for x in case.arrays()))
            return Prepared(whole, lambda out: within(case, array(out)))
        each = [[tensor(one[None]) for one in sequences(case, x)] for x in case.arrays()]
        calls = [functools.partial(attention, *operands) for operands in zip(*each, strict=True)]
        return Prepared(lambda: [call() for call in calls], lambda outs: joined(case, (array(out)[0] for out in outs)))


class FlexAttention(Torch):
    """`flex_attention`, compiled: for what changes single scores, and for masks of which it knows the tiles."""

    forms = ()

    def prepare(self, case: Case) -> Prepared:
        import torch
        from torch.nn.attention.flex_attention import flex_attention

        mods = self._mods(case)
        torch._dynamo.reset()  # or it would compile one function for the shapes of all cases
        compiled = torch.compile(flex_attention, dynamic=False)
        call = functools.partial(compiled, *(tensor(x) for x in case.arrays()), **mods)
        try:
            call()
        except torch._dynamo.exc.TorchDynamoException as error:  # it needs a C++ compiler
            raise Unsupported(f"torch.compile: {str(error).strip().splitlines()[0]}") from error
        return Prepared(call, array)

    def _mods(self, case: Case) -> dict[str, Any]:
        """The case's one peculiarity as `flex_attention` wants it."""
        from torch.nn.attention.flex_attention import create_block_mask

        if case.documents and not case.options:
            ids = tensor(case.document_ids())
            size = {"Q_LEN": case.Lq, "KV_LEN": case.Lk, "device": "cpu"}
            return {"block_mask": create_block_mask(lambda b, h, i, j: ids[i] == ids[j], None, None, **size)}
        if case.options.keys() not in ({"softcap"}, {"alibi_slopes"}, {"score_mod"}):
            raise Unsupported("not asked: neither one change of scores nor a block mask is all there is")
        return {"score_mod": self._score_mod(**case.options)}

    @staticmethod
    def _score_mod(
        softcap: float | None = None,
        alibi_slopes: np.ndarray | None = None,
        score_mod: Callable[..., Any] | None = None,
    ) -> Callable[..., Any]:
        import torch

        if softcap is not None:
            return lambda score, b, h, i, j: softcap * torch.tanh(score / softcap)
        if alibi_slopes is not None:
            slopes = tensor(alibi_slopes)
            return lambda score, b, h, i, j: score - slopes[h] * (i - j).abs()
        assert score_mod is not None
        return score_mod


def _gradient(case: Case, alone: bool) -> Prepared:
    """The output and the gradients of query, key and value, and of a mask, or these alone."""
    import torch

    attention = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=only_causal(case))
    masks = [] if only_causal(case) or (mask := explicit_mask(case)) is None else [mask]
    operands = [tensor(x).requires_grad_() for x in (*case.arrays(), *masks)]
    grad_out = tensor(upstream(case))

    @torch.enable_grad()
    def forward() -> Any:
        return attention(*operands)

    kept = forward() if alone else None

    def call() -> Any:
        out = forward() if kept is None else kept
        return torch.autograd.grad(out, operands, grad_out, retain_graph=alone)

    return Prepared(call, plain_result(case))


def tensor(x: np.ndarray) -> Any:
    """An array as PyTorch's, which for bfloat16 takes no more than the bits."""
    import torch

    if x.dtype.name == BFLOAT16:
        return torch.from_numpy(x.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def array(x: Any) -> np.ndarray:
    """The reverse."""
    import torch

    if x.dtype == torch.bfloat16:
        return np.asarray(x.view(torch.uint16).numpy()).view(dtype_of(BFLOAT16))
    return np.asarray(x.numpy())
