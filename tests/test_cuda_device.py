"""The contract on the GPU that is there, and arrays in its memory: `python -m pytest -m gpu`."""

from __future__ import annotations

from typing import Any

import mods
import numpy as np
import pytest
from cases import SMALL
from contract import Contract
from tolerances import assert_accurate, same_bits

from numba_attn import scaled_dot_product_attention, varlen_attention
from numba_attn.cuda import attention, portable
from numba_attn.problem import AUX_NAMES

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def _has_a_device() -> None:
    if (reason := attention.unavailable()) is not None:
        pytest.skip(reason)


class TestCuda(Contract):
    backend = "cuda"


class TestPortable(Contract):
    """The kernels that do whatever there is, also where others would be chosen."""

    backend = "cuda"

    @pytest.fixture(autouse=True, scope="class")
    def _portable(self) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "kernels", lambda *problem: portable.run)
            yield


def _torch() -> Any:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    return torch


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_torch_tensors(dtype: str) -> None:
    torch = _torch()
    kind = getattr(torch, dtype)
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, L, 40, device="cuda", dtype=kind) for L in (70, 90, 90))
    out, aux = scaled_dot_product_attention(query, key, value, is_causal=True, return_aux=("lse",))
    assert out.is_cuda and out.dtype == kind and aux.lse.is_cuda
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), is_causal=True
    )
    tolerance = {"float32": 1e-5, "float64": 1e-12}.get(dtype, 1e-2)
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_torch_strides_and_out() -> None:
    torch = _torch()
    query, key, value = torch.randn(3, 50, 2, 4, 32, device="cuda").permute(0, 2, 3, 1, 4)
    contiguous = [x.contiguous() for x in (query, key, value)]
    expected = scaled_dot_product_attention(*contiguous)
    out = torch.empty(2, 4, 32, 50, device="cuda").transpose(-1, -2)
    assert scaled_dot_product_attention(query, key, value, out=out) is out
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_graph() -> None:
    torch = _torch()
    query, key, value, out = (torch.randn(2, 4, 64, 32, device="cuda") for _ in range(4))
    options: dict[str, Any] = {"is_causal": True, "kv_lengths": [64, 20], "out": out}
    scaled_dot_product_attention(query, key, value, **options)
    expected = out.clone()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        scaled_dot_product_attention(query, key, value, **options)
    out.zero_()
    graph.replay()
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


def test_numba_arrays() -> None:
    cuda = pytest.importorskip("numba.cuda")
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((2, 2, 40, 16), dtype=np.float32) for _ in range(3)]
    out = scaled_dot_product_attention(*map(cuda.to_device, arrays), score_mod=mods.relative_bias)
    assert_accurate(out.copy_to_host(), None, *arrays, score_mod=mods.relative_bias)


def test_packed_sequences() -> None:
    rng = np.random.default_rng(2)
    starts = [0, 40, 40, 111]
    arrays = [rng.standard_normal((111, 2, 24), dtype=np.float32) for _ in range(3)]
    results = [
        varlen_attention(*arrays, starts, starts, is_causal=True, backend=backend, return_aux=AUX_NAMES)
        for backend in ("cuda", "reference")
    ]
    for got, expected in zip((results[0][0], *results[0][1]), (results[1][0], *results[1][1]), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_the_same_bits_again() -> None:
    for case in SMALL[::10]:
        arrays, options = case.arrays(), case.keywords()
        one, two = (scaled_dot_product_attention(*arrays, backend="cuda", **options) for _ in range(2))
        assert same_bits(one, two), case.name
