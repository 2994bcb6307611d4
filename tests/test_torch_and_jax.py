"""Tensors of torch and arrays of JAX, on the CPU: results of the same kind with the bits of NumPy's, nothing copied."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from cases import dtype_of
from foreign import OPERANDS, SIZES, arguments
from tolerances import same_bits

import numba_attn
from numba_attn import libraries, scaled_dot_product_attention
from numba_attn.cpu import attention
from numba_attn.problem import AUX_NAMES, Problem

B, HQ, HKV, LQ, LK, D, DV = SIZES


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.fixture
def jax(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS", "cpu"))
    return pytest.importorskip("jax")


def tensor(torch: Any, x: np.ndarray) -> Any:
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(x.copy())


@pytest.fixture(params=["torch", "jax"])
def convert(request: pytest.FixtureRequest) -> Callable[[np.ndarray], Any]:
    """From NumPy to one of the libraries."""
    library = request.getfixturevalue(request.param)
    return library.numpy.asarray if request.param == "jax" else lambda x: tensor(library, x)


def plain(x: Any) -> np.ndarray:
    if "torch" in type(x).__module__:
        import torch

        return x.view(torch.int16).numpy().view(dtype_of("bfloat16")) if x.dtype is torch.bfloat16 else x.numpy()
    return np.asarray(x)


@pytest.fixture
def problems(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """Those that reach the CPU kernels."""
    seen: list[Problem] = []
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda problem: (seen.append(problem), forward(problem))[1])
    return seen


def attend(given: dict[str, Any], **options: Any) -> Any:
    return scaled_dot_product_attention(**given, enable_gqa=True, is_causal=True, **options)


def arguments_of(dtype: str) -> dict[str, Any]:
    given = arguments()
    return given | {name: given[name].astype(dtype_of(dtype)) for name in (*OPERANDS, "alibi_slopes", "sinks")}


def address(x: np.ndarray) -> int:
    return x.__array_interface__["data"][0]


# Either ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["BHLD", "BLHD"])
def test_results_are_those_of_numpy(convert: Callable[[np.ndarray], Any], dtype: str, layout: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    given = arguments_of(dtype)
    if layout == "BLHD":
        given |= {name: given[name].swapaxes(1, 2) for name in OPERANDS}
    expected = attend(given, return_aux=AUX_NAMES, layout=layout)
    foreign = {name: convert(x) for name, x in given.items()}
    out, aux = attend(foreign, return_aux=AUX_NAMES, layout=layout)
    query = foreign["query"]
    assert isinstance(aux, numba_attn.Aux) and all(type(x) is type(query) for x in (out, *aux))
    assert out.dtype == query.dtype and out.device == query.device
    assert same_bits((plain(out), *map(plain, aux)), (expected[0], *expected[1]))
    assert type(attend(foreign, layout=layout)) is type(query)


def test_numbers_may_be_of_numpy(convert: Callable[[np.ndarray], Any]) -> None:
    given = arguments()
    foreign = given | {name: convert(given[name]) for name in OPERANDS}
    assert same_bits(plain(attend(foreign)), attend(given))


def test_threads(convert: Callable[[np.ndarray], Any]) -> None:
    given = arguments()
    expected, foreign = attend(given), {name: convert(x) for name, x in given.items()}
    with ThreadPoolExecutor(8) as pool:
        assert all(same_bits(plain(x), expected) for x in pool.map(lambda _: attend(foreign), range(64)))


@pytest.mark.parametrize("shape", [(0, 4, 8), (4, 0, 8), (2, 4, 0)])
def test_without_elements(convert: Callable[[np.ndarray], Any], shape: tuple[int, ...]) -> None:
    x = convert(np.ones(shape, np.float32))
    out, aux = scaled_dot_product_attention(x, x, x, return_aux=("lse",))
    assert type(out) is type(aux.lse) is type(x) and tuple(out.shape) == shape and tuple(aux.lse.shape) == shape[:-1]


def test_without_axes(convert: Callable[[np.ndarray], Any]) -> None:
    with pytest.raises(ValueError, match=r"query must have at least 2 axes .* got shape \(\)"):
        scaled_dot_product_attention(*[convert(np.array(1, np.float32))] * 3)
    given = arguments()
    foreign = {name: convert(given[name]) for name in OPERANDS}
    assert same_bits(plain(attend(foreign, query_offset=convert(np.array(2)))), attend(_operands(), query_offset=2))


def _operands() -> dict[str, Any]:
    given = arguments()
    return {name: given[name] for name in OPERANDS}


def test_the_other_functions(convert: Callable[[np.ndarray], Any]) -> None:
    rng = np.random.default_rng(0)
    starts, tables = np.array([0, 3, 10]), numba_attn.rotary_tables(10, 8)
    query, key, value = rng.standard_normal((3, 10, 2, 8), dtype=np.float32)
    results = []
    for wrap in (np.asarray, convert):
        q, k, v = (wrap(x) for x in (query, key, value))
        out = numba_attn.varlen_attention(q, k, v, wrap(starts), wrap(starts), is_causal=True)
        rotated = numba_attn.apply_rotary(q, *map(wrap, tables), layout="BLHD", position_offset=wrap(np.array(0)))
        merged, lse = numba_attn.merge_attention([q, k], [q[..., 0], k[..., 1]])
        cache = numba_attn.KVCache(10, 2, 2, 8)
        q, k, v = (x[:, :, None] for x in (q, k, v))
        first = numba_attn.attention_with_kv_cache(q, cache, k, v, rotary=tuple(map(wrap, tables)))
        paged = numba_attn.PagedKVCache(10, 2, 4, 8)
        second = numba_attn.attention_with_kv_cache(q, paged.batch([paged.add() for _ in range(10)]), k, v)
        weights = numba_attn.attention_weights(q, k, wrap(np.arange(1) > -1), query_rows=[0])
        found = out, rotated, merged, lse, first, second, weights
        assert all(type(x) is type(q) for x in found)
        results.append(tuple(map(plain, found)))
    assert same_bits(*results)


def test_gradients(convert: Callable[[np.ndarray], Any]) -> None:
    """Of every input there is, as arrays of the library."""
    rng = np.random.default_rng(0)
    given = arguments() | {"attn_mask": rng.standard_normal((LQ, LK), dtype=np.float32)}
    grad_out = rng.standard_normal((B, HQ, LQ, DV), dtype=np.float32)
    grad_lse = rng.standard_normal((B, HQ, LQ), dtype=np.float32)
    results = []
    for wrap in (np.asarray, convert):
        out, vjp = numba_attn.scaled_dot_product_attention_vjp(
            **{name: wrap(x) for name, x in given.items()}, enable_gqa=True, is_causal=True
        )
        gradients = vjp(wrap(grad_out), wrap(grad_lse))
        assert isinstance(gradients, numba_attn.Gradients) and all(type(x) is type(out) for x in gradients)
        results.append(tuple(map(plain, (out, *gradients))))
    assert same_bits(*results)
    assert [x.shape for x in results[1][1:]] == [given[name].shape for name in gradients._fields]
    with pytest.raises(TypeError, match=r"grad_out must be an array of query's library, got numpy\.ndarray"):
        vjp(grad_out)


def test_libraries_do_not_mix(torch: Any, jax: Any) -> None:
    x = np.ones((2, 5, 8), np.float32)
    t, j = torch.from_numpy(x), jax.numpy.asarray(x)
    for arguments_, types in (
        ((t, j, t), r"query and key .* got torch\.Tensor and jaxlib"),
        ((j, j, t), r"query and value .* got jaxlib.* and torch\.Tensor"),
        ((x, t, x), r"query and key .* got numpy\.ndarray and torch\.Tensor"),
        ((t, t, x), r"query and value .* got torch\.Tensor and numpy\.ndarray"),
        ((j, j, j, t[0, :, :5] > 0), r"query and attn_mask .* got jaxlib.* and torch\.Tensor"),
    ):
        with pytest.raises(TypeError, match=types):
            scaled_dot_product_attention(*arguments_)
    with pytest.raises(TypeError, match=r"query and out .* got torch\.Tensor and numpy\.ndarray"):
        scaled_dot_product_attention(t, t, t, out=np.empty_like(x))


# torch ----------------------------------------------------------------------------------------------------------------

VIEWS: dict[str, Callable[[Any], Any]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "part": lambda x: x.repeat(1, 1, 1, 3)[..., 1::3],
    "broadcast": lambda x: x[:1, :1].expand(x.shape),
    "double": lambda x: x.double(),
    "bfloat16, transposed": lambda x: x.bfloat16().transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("view", VIEWS)
def test_no_copy_of_tensors(torch: Any, problems: list[Problem], view: str) -> None:
    if "bfloat16" in view:
        pytest.importorskip("ml_dtypes")
    x = {name: VIEWS[view](torch.from_numpy(x)) for name, x in _operands().items()}
    out = torch.full((B, LQ, HQ, DV), 7, dtype=x["query"].dtype).transpose(1, 2)
    assert attend(x, out=out) is out
    problem = problems[0]
    for seen, given in ((problem.query, x["query"]), (problem.key, x["key"]), (problem.value, x["value"]),
                        (problem.out, out)):  # fmt: skip
        assert address(seen) == given.data_ptr()
        assert seen.strides == tuple(step * given.itemsize for step in given.stride())
    expected = attend({name: plain(y) for name, y in x.items()})
    assert same_bits(plain(out.contiguous()), expected)
    result = attend(x)
    assert address(problems[-1].result) == result.data_ptr()


def test_out_over_an_input(torch: Any) -> None:
    x = torch.zeros(2, 5, 8)
    with pytest.raises(ValueError, match="out must not share memory with query"):
        scaled_dot_product_attention(x, x, x, out=x[:])
    with pytest.raises(TypeError, match="out must be float32, as query is, got float64"):
        scaled_dot_product_attention(x, x, x, out=x.double())
    with pytest.raises(ValueError, match="out must not overlap itself"):
        scaled_dot_product_attention(x, x, x, out=torch.zeros(1, 1, 1).expand(2, 5, 8))


def test_torch_knows_that_out_was_written(torch: Any) -> None:
    """So it refuses gradients that would need what was there before."""
    x, weight = torch.ones(2, 5, 8), torch.ones(2, 5, 8, requires_grad=True)
    out = torch.ones(2, 5, 8)
    product = (weight * out).sum()
    scaled_dot_product_attention(x, x, x, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        out = torch.empty(2, 5, 8)
        assert scaled_dot_product_attention(x, x, x, out=out) is out


def test_parameters(torch: Any) -> None:
    """A subclass; without gradients, it is a tensor like others."""
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    parameter = torch.nn.Parameter(x, requires_grad=False)
    out = scaled_dot_product_attention(parameter, x, parameter)
    assert type(out) is torch.Tensor and torch.equal(out, scaled_dot_product_attention(x, x, x))
    with torch.inference_mode():
        assert torch.equal(scaled_dot_product_attention(x * 1, x * 1, x * 1), out)


def unreadable(torch: Any) -> Iterator[tuple[Any, str]]:
    x = torch.ones(2, 5, 8)
    yield x.clone().requires_grad_(), r"requires gradients, .*\.detach\(\), .* scaled_dot_product_attention_vjp"
    yield torch.nn.Parameter(x), "requires gradients"
    yield x.to_sparse(), "its layout is torch.sparse_coo"
    yield x.bfloat16().to_sparse(), "its layout is torch.sparse_coo"
    yield x.to_mkldnn(), "its layout is torch._mkldnn"
    yield torch.view_as_complex(torch.ones(2, 5, 8, 2)).conj().imag, "negative bit"
    yield x.to("meta"), "on device meta"
    yield x.to(torch.float8_e4m3fn), "Float8"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "QInt8"
        yield torch.nested.nested_tensor([x[0], x[1]]), ""
        yield torch.nested.nested_tensor([x[0], x[1]], layout=torch.jagged), ""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        fake = torch.empty(2, 5, 8)
    yield fake, ""


def test_tensors_that_cannot_be_read(torch: Any) -> None:
    good = torch.ones(2, 5, 8)
    for wrong, message in unreadable(torch):
        with pytest.raises(TypeError, match=f"key must be an array that can be read, got torch.*: .*{message}"):
            scaled_dot_product_attention(good, wrong, good)
    with pytest.raises(TypeError, match="query must be an array that can be read"):
        torch.vmap(lambda x: scaled_dot_product_attention(x, x, x))(good)
    for dtype, name in ((torch.complex64, "complex64"), (torch.int32, "int32"), (torch.bool, "bool")):
        with pytest.raises(TypeError, match=f"query must be float32, .*, got {name}"):
            scaled_dot_product_attention(good.to(dtype), good, good)


# JAX ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_no_copy_of_arrays_of_jax(jax: Any, problems: list[Problem], dtype: str) -> None:
    x = {name: jax.numpy.asarray(x, dtype) for name, x in _operands().items()}
    attend(x)
    for seen, given in zip((problems[0].query, problems[0].key, problems[0].value), x.values(), strict=True):
        assert address(seen) == given.unsafe_buffer_pointer() and seen.dtype == given.dtype
        assert not seen.flags.writeable


def test_float64_of_jax(jax: Any) -> None:
    with jax.experimental.enable_x64() if not hasattr(jax, "enable_x64") else jax.enable_x64(True):
        x = jax.numpy.ones((2, 5, 8), "float64")
        out, aux = scaled_dot_product_attention(x, x, x, return_aux=("lse",))
        assert out.dtype == aux.lse.dtype == np.float64
    with pytest.raises(TypeError, match=r"query must be .* results in float64 need jax_enable_x64"):
        scaled_dot_product_attention(x, x, x)


def test_arrays_of_jax_are_not_written(jax: Any) -> None:
    x = jax.numpy.zeros((2, 5, 8))
    with pytest.raises(TypeError, match=r"out must be an array that can be written to, got jaxlib.* immutable"):
        scaled_dot_product_attention(x, x, x, out=jax.numpy.ones((2, 5, 8)))
    with pytest.raises(TypeError, match=r"out must be an array that can be written to"):
        numba_attn.apply_rotary(x, *numba_attn.rotary_tables(5, 8), out=x)


def test_tracing(jax: Any) -> None:
    x = jax.numpy.ones((2, 5, 8))

    def attention(x: Any) -> Any:
        return scaled_dot_product_attention(x, x, x)

    for transformed in (jax.jit(attention), jax.vmap(attention), jax.grad(lambda x: attention(x).sum())):
        with pytest.raises(TypeError, match=r"query must be .* kernels are not traced: call outside of jit"):
            transformed(x)
    with pytest.raises(TypeError, match=r"kv_lengths must be .* kernels are not traced"):
        jax.jit(lambda n: scaled_dot_product_attention(*[np.ones((5, 8))] * 3, kv_lengths=n))(3)
    called = jax.jit(lambda x: 2 * jax.pure_callback(attention, jax.ShapeDtypeStruct(x.shape, x.dtype), x))
    assert same_bits(plain(called(x)), plain(2 * attention(x)))


def test_arrays_of_jax_that_cannot_be_read(jax: Any) -> None:
    gone = jax.numpy.zeros((2, 5, 8))
    gone.delete()
    for wrong, message in ((gone, "deleted"), (jax.random.key(0), "PRNGKey")):
        with pytest.raises(TypeError, match=f"query must be an array that can be read, got jax.*{message}"):
            scaled_dot_product_attention(wrong, wrong, wrong)


def test_devices_of_jax(jax: Any, python: Callable[..., str]) -> None:
    """Of several on the CPU, results are on that of the query; what is on more than one is refused."""
    python(
        "import jax, numpy as np, numba_attn\n"
        "from jax.sharding import Mesh, NamedSharding, PartitionSpec\n"
        "one, two = jax.devices()\n"
        "x = jax.device_put(np.ones((2, 5, 8), np.float32), two)\n"
        "attention = numba_attn.scaled_dot_product_attention\n"
        "out, aux = attention(x, x, x, return_aux=('lse',), backend='reference')\n"
        "assert out.devices() == aux.lse.devices() == {two}\n"
        "x = jax.device_put(x, NamedSharding(Mesh([one, two], 'x'), PartitionSpec('x')))\n"
        "try: attention(x, x, x, backend='reference')\n"
        "except TypeError as error: assert 'it is on 2 devices' in str(error)\n"
        "else: raise AssertionError",
        JAX_PLATFORMS="cpu",
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
    )


def test_classes_are_looked_up_once(torch: Any) -> None:
    """By a dict, whatever is loaded later."""
    x = torch.ones(3)
    assert libraries.library_of(x) is libraries.library_of(torch.nn.Parameter(x)) is libraries._known[torch.Tensor]
