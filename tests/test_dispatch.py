"""Backends, and arrays on a CUDA device, by stand-ins that say that they are there.

Their addresses are invented, so that whatever looked at one would crash.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import foreign
import numpy as np
import pytest
from cases import dtype_of
from foreign import OPERANDS, Described, Interface, arguments

import numba_attn
from numba_attn import dispatch, libraries, scaled_dot_product_attention
from numba_attn.device_array import DeviceArray
from numba_attn.problem import AUX_NAMES, Problem

B, HQ, HKV, LQ, LK, D, DV = foreign.SIZES
NUMBERS = ("alibi_slopes", "sinks", "query_lengths", "kv_lengths", "query_offset")
ADDRESS = np.zeros(12, np.float32).ctypes.data


def attend(given: dict[str, Any], **options: Any) -> Any:
    return scaled_dot_product_attention(**given, enable_gqa=True, is_causal=True, **options)


# On a CUDA device -----------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """The problems of a backend that does nothing else."""
    seen: list[Problem] = []
    module = ModuleType(f"numba_attn.stand_in_{id(seen)}")
    module.forward = seen.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(dispatch._MODULES, "cuda", module.__name__)
    return seen


def on_device(make: Callable[..., Any], numpy: dict[str, Any], *names: str) -> dict[str, Any]:
    """The arrays of these names as new ones on a device."""
    return {name: make(x.shape, x.dtype.name) if name in (names or OPERANDS) else x for name, x in numpy.items()}


def without_mask() -> dict[str, Any]:
    given = arguments()
    del given["attn_mask"]
    return given


LIBRARIES = {"torch": foreign.torch_with_cuda, "cupy": foreign.cupy_with_cuda, "numba.cuda": foreign.numba_cuda}


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = LIBRARIES[request.param]()
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def maker(library: Any) -> Callable[..., Any]:
    return {"torch": "Tensor", "cupy": "empty", "numba.cuda": "device_array"}[library.__name__]  # type: ignore[return-value]


@pytest.mark.parametrize("layout", ["BHLD", "BLHD"])
def test_libraries_on_a_device(library: Any, cuda: list[Problem], layout: str) -> None:
    """Results are new arrays of the library, on the device and the stream of the query."""
    make = getattr(library, maker(library))
    given = arguments()
    if layout == "BLHD":
        given |= {name: given[name].swapaxes(1, 2) for name in OPERANDS}
    given = on_device(make, given, *OPERANDS, "attn_mask")
    out, aux = attend(given, return_aux=AUX_NAMES, layout=layout, backend="cuda" if layout == "BHLD" else None)
    (problem,) = cuda
    assert problem.sizes == (B, HQ, HKV, LQ, LK, D, DV)
    number, stream = {"torch": (1, 77), "cupy": (0, 1000), "numba.cuda": (None, None)}[library.__name__]
    for x in (problem.query, problem.key, problem.value, problem.mask, problem.out, problem.lse, problem.key_weight):
        assert isinstance(x, DeviceArray) and (x.device, x.stream) == (number, stream)
    assert [x.owner for x in (problem.query, problem.key, problem.value)] == [given[name] for name in OPERANDS]
    assert problem.result.owner is out and [x.owner for x in problem.aux] == list(aux)  # type: ignore[union-attr]
    assert all(type(x) is type(given["query"]) for x in (out, *aux))
    rows = (B, HQ, LQ) if layout == "BHLD" else (B, LQ, HQ)
    assert problem.result.shape == (*rows, DV) and problem.aux.lse.shape == rows  # type: ignore[union-attr]
    assert problem.out.shape == (B, HQ, LQ, DV)
    assert all(isinstance(x, np.ndarray) for x in (problem.slopes, problem.sinks, problem.intervals.table))


def test_out_on_a_device(library: Any, cuda: list[Problem]) -> None:
    make = getattr(library, maker(library))
    given, out = on_device(make, without_mask()), make((B, HQ, LQ, DV), "float32")
    assert attend(given, out=out) is out
    assert cuda[0].result.owner is out  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="out must have shape"):
        attend(given, out=make((B, HQ, LQ, DV + 1), "float32"))
    query = make((B, HQ, LQ, D), "float32")
    with pytest.raises(ValueError, match="out must not share memory with query"):
        scaled_dot_product_attention(query, query, query, out=query)
    with pytest.raises(TypeError, match="query and out must be arrays of one library"):
        attend(given, out=np.empty((B, HQ, LQ, DV), np.float32))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_on_a_device(cuda: list[Problem], monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    torch = foreign.torch_with_cuda()
    monkeypatch.setitem(sys.modules, "torch", torch)
    x = torch.Tensor((2, 5, 8), dtype)
    out, aux = scaled_dot_product_attention(x, x, x, return_aux=("lse",))
    assert out.dtype == f"torch.{dtype}" and aux.lse.dtype == "torch.float32"
    assert cuda[0].query.dtype == dtype and cuda[0].query.strides == (80, 16, 2)


def test_tensors_that_are_not_what_their_memory_says(cuda: list[Problem], monkeypatch: pytest.MonkeyPatch) -> None:
    torch = foreign.torch_with_cuda()
    monkeypatch.setitem(sys.modules, "torch", torch)
    x = torch.Tensor((2, 5, 8))
    for change, message in (
        ({"requires_grad": True}, r"\.detach\(\).*scaled_dot_product_attention_vjp"),
        ({"is_quantized": True}, "negated or quantised"),
        ({"negated": True}, "negated or quantised"),
        ({"layout": "sparse"}, "its layout is sparse"),
        ({"dtype": "torch.bits1x8"}, "NumPy has no bits1x8"),
    ):
        wrong = torch.Tensor((2, 5, 8))
        vars(wrong).update(change)
        with pytest.raises(TypeError, match=f"key must be an array that can be read, .*{message}"):
            scaled_dot_product_attention(x, wrong, x)
    torch.version.hip = "6.0"
    with pytest.raises(TypeError, match=r"query must be .* neither the host nor CUDA's"):
        scaled_dot_product_attention(x, x, x)
    assert not cuda


def test_devices_do_not_mix(cuda: list[Problem], monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = foreign.cupy_with_cuda()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    x = cupy.empty((2, 5, 8))
    with cupy.on(1):
        y = cupy.empty((2, 5, 8))
    with pytest.raises(TypeError, match="query and value must be on one device, got CUDA device 0 and CUDA device 1"):
        scaled_dot_product_attention(x, x, y)
    with pytest.raises(TypeError, match="query and attn_mask must be on one device, got CUDA device 0 and host memory"):
        scaled_dot_product_attention(x, x, x, np.ones((5, 5), bool))
    scaled_dot_product_attention(y, y, y)  # while another device is current
    query, result = cuda[0].query, cuda[0].result
    assert query.stream == 1001 and result.device == 1 and result.owner.device.id == 1  # type: ignore[attr-defined]
    host, device = Described(ADDRESS, (3, 4)), Described(1 << 40, (3, 4), device=(2, 0))
    with pytest.raises(TypeError, match="query and key must be on one device, got host memory and CUDA device 0"):
        scaled_dot_product_attention(host, device, host)


def test_kinds_do_not_mix_on_a_device(cuda: list[Problem], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, make in LIBRARIES.items():
        monkeypatch.setitem(sys.modules, name, make())
    one, other = sys.modules["torch"].Tensor((2, 5, 8)), sys.modules["cupy"].empty((2, 5, 8))  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"query and key must be arrays of one library, got .*Tensor and .*ndarray"):
        scaled_dot_product_attention(one, other, one)
    with pytest.raises(TypeError, match=r"query and key must be arrays of one library, got numpy.ndarray and .*Tensor"):
        scaled_dot_product_attention(np.ones((2, 5, 8), np.float32), one, one)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_on_a_device(name: str, cuda: list[Problem]) -> None:
    """They are looked at, which is not possible without the library."""
    given = without_mask()
    out = Interface((B, HQ, LQ, DV), address=2 << 40)
    device = on_device(Interface, given)
    attend(device, out=out)
    assert len(cuda) == 1
    device[name] = Interface(given[name].shape, given[name].dtype)
    with pytest.raises(TypeError, match=f"{name} must be in host memory, .*, got foreign.Interface on a CUDA device"):
        attend(device, out=out)
    with pytest.raises(TypeError, match=f"{name} must be in host memory"):
        attend({**given, name: device[name]})


def test_the_array_interface(cuda: list[Problem]) -> None:
    strided = Interface((2, 3, 4), "f8", 4096, strides=(8, 64, 16), stream=9)
    out = Interface((2, 3, 4), "f8", 8192, version=2)
    assert scaled_dot_product_attention(strided, strided, strided, out=out) is out
    (problem,) = cuda
    assert problem.query.strides == (8, 64, 16) and problem.out.strides == (96, 32, 8)
    query: Any = problem.query
    assert (query.address, query.stream, query.device, query.dtype) == (4096, 9, None, np.float64)
    read_only = Interface((2, 3, 4), "f8", 8192, data=(8192, True))
    with pytest.raises(ValueError, match="out must be writeable"):
        scaled_dot_product_attention(strided, strided, strided, out=read_only)
    with pytest.raises(TypeError, match=r"query must be float32, .*, got \|V2"):  # as bfloat16 is called there
        scaled_dot_product_attention(*[Interface((3, 4), "<V2")] * 3, out=out)
    empty = Interface((2, 0, 4), "f8", 0)
    assert scaled_dot_product_attention(empty, strided, strided, out=empty) is empty
    with pytest.raises(NotImplementedError, match="out must be given, as no library is known that makes a foreign"):
        scaled_dot_product_attention(strided, strided, strided)


def test_broadcast_arrays_of_numba(cuda: list[Problem], monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read by their strides, of which Numba tells nothing."""
    numba = foreign.numba_cuda()
    monkeypatch.setitem(sys.modules, "numba.cuda", numba)
    query, key = numba.device_array((2, 3, 4)), numba.device_array((2, 5, 4), strides=(0, 16, 4))
    assert key.__cuda_array_interface__["strides"] is None
    scaled_dot_product_attention(query, key, key)
    assert cuda[0].query.strides == (48, 16, 4) and cuda[0].key.strides == cuda[0].value.strides == (0, 16, 4)
    whole, broadcast = map(libraries._NUMBA.located, (numba.device_array((2, 5, 4)), key))
    assert whole and broadcast and whole[0] != broadcast[0]


def test_results_of_numba_name_the_stream_of_the_query(cuda: list[Problem], monkeypatch: pytest.MonkeyPatch) -> None:
    numba = foreign.numba_cuda()
    monkeypatch.setitem(sys.modules, "numba.cuda", numba)
    query, key = numba.device_array((2, 3, 4), stream=77), numba.device_array((2, 5, 4), stream=88)
    out, aux = scaled_dot_product_attention(query, key, key, return_aux=("lse",))
    assert out.stream == aux.lse.stream == cuda[0].out.stream == 77 and cuda[0].key.stream == 88  # type: ignore[union-attr]


def test_dlpack_on_a_device(cuda: list[Problem]) -> None:
    query, key = (
        Described(1 << 40, (3, 4), "f2", (1, 3), device=(2, 5)),
        Described(2 << 40, (6, 4), "f2", device=(2, 5)),
    )
    out = Described(3 << 40, (3, 4), "f2", device=(13, 5))
    assert scaled_dot_product_attention(query, key, key, out=out) is out
    view: Any = cuda[0].query[0]
    assert (view.address, view.strides, view.device, view.stream) == (1 << 40, (2, 6), 5, 1)
    assert query.streams == [1] and view.owner is query and view.alive is not None
    assert view.awaited, "the library does not know of the stream"
    with pytest.raises(NotImplementedError, match="out must be given"):
        scaled_dot_product_attention(query, key, key)


def test_namespace_on_a_device(cuda: list[Problem]) -> None:
    class Array(Described):
        def __array_namespace__(self) -> Any:
            return Namespace

    class Namespace:
        float16, float32 = np.float16, np.float32

        @staticmethod
        def empty(shape: tuple[int, ...], dtype: Any, device: Any) -> Array:
            return Array(3 << 40, shape, dtype, device=device)

    x = Array(1 << 40, (3, 4), "f2", device=(2, 5))
    out, aux = scaled_dot_product_attention(x, x, x, return_aux=("lse",))
    assert isinstance(out, Array) and isinstance(aux.lse, Array)
    assert cuda[0].result.dtype == np.float16 and cuda[0].lse.dtype == np.float32  # type: ignore[union-attr]


def test_jax_on_a_device(cuda: list[Problem], monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are new arrays of JAX, which a call waits for: JAX has streams of its own."""
    jax = foreign.jax_with_gpu()
    monkeypatch.setitem(sys.modules, "jax", jax)
    for dtype in (np.float32, np.float16, dtype_of("bfloat16")):
        x = jax.Array((2, 5, 8), dtype)
        out, aux = scaled_dot_product_attention(x, x, x, return_aux=("lse",))
        problem = cuda.pop()
        assert problem.query.dtype == dtype and x.streams == [1] * 3
        for result, view in ((out, problem.result), (aux.lse, problem.lse)):
            assert isinstance(view, DeviceArray) and view.device == 3 and view.awaited and view.stream == 1
            assert type(result) is jax.Array and result in jax.ready and view.owner is result
    x = jax.Array((2, 5, 8))
    with pytest.raises(TypeError, match="out must be an array that can be written to"):
        scaled_dot_product_attention(x, x, x, out=x)
    with pytest.raises(TypeError, match="results in float64 need jax_enable_x64"):
        scaled_dot_product_attention(*[jax.Array((2, 5, 8), "f8")] * 3)
    other = foreign.jax_with_gpu(kind=10)
    monkeypatch.setitem(sys.modules, "jax", other)
    with pytest.raises(TypeError, match=r"query must be .* it is on cuda:3, neither the host nor a CUDA device"):
        scaled_dot_product_attention(*[other.Array((2, 5, 8))] * 3)
    assert not cuda


def test_what_works_in_host_memory_alone() -> None:
    x, lse = Interface((2, 4, 5, 8)), Interface((2, 4, 5))
    tables = numba_attn.rotary_tables(5, 8)
    for call, name in (
        (lambda: numba_attn.apply_rotary(x, *tables), "x"),
        (lambda: numba_attn.apply_rotary(np.ones((5, 8), np.float32), Interface((5, 4)), tables[1]), "cos"),
        (lambda: numba_attn.merge_attention([x], [lse]), r"outs\[0\]"),
        (lambda: numba_attn.attention_with_kv_cache(x, numba_attn.KVCache(2, 4, 10, 8)), "query"),
        (lambda: numba_attn.KVCache(2, 4, 10, 8).append(x, x), "key"),
    ):
        with pytest.raises(
            TypeError, match=f"{name} must be in host memory, .*, got foreign.Interface on a CUDA device"
        ):
            call()


# Backends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_explicit_backend_does_not_fall_back(backend: str, cuda: list[Problem]) -> None:
    x = Interface((2, 5, 8))
    with pytest.raises(
        TypeError, match=f"query must be in host memory, for backend='{backend}', got foreign.Interface"
    ):
        scaled_dot_product_attention(x, x, x, backend=backend)
    assert not cuda


def test_explicit_cuda(cuda: list[Problem]) -> None:
    """What it makes of arrays in host memory is its own affair."""
    x = np.ones((2, 5, 8), np.float32)
    scaled_dot_product_attention(x, x, x, backend="cuda")
    assert len(cuda) == 1


def test_backend_that_cannot_be_used(cuda: list[Problem], monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = sys.modules[dispatch._MODULES["cuda"]]
    reasons = [None, "no driver"]
    monkeypatch.setattr(module, "unavailable", lambda: reasons[-1], raising=False)
    x = Interface((2, 5, 8))
    out = Interface((2, 5, 8), address=2 << 40)
    for backend in ("cuda", None):
        with pytest.raises(NotImplementedError, match="backend 'cuda' cannot be used: no driver"):
            scaled_dot_product_attention(x, x, x, out=out, backend=backend)
    assert not cuda
    reasons.pop()
    scaled_dot_product_attention(x, x, x, out=out)
    assert len(cuda) == 1


@pytest.mark.parametrize("backend", ["gpu", "", 1, b"cpu", ["cpu"], np.array(["cpu", "cuda"])])
def test_no_backend(backend: Any) -> None:
    for x in (np.ones((5, 8)), Interface((5, 8))):
        with pytest.raises(ValueError, match="backend must be None, 'cpu', 'cuda' or 'reference'"):
            scaled_dot_product_attention(x, x, x, backend=backend)


def test_nothing_is_imported(python: Callable[..., str]) -> None:
    loaded = python(
        "import sys; sys.path.insert(0, 'tests')\n"
        "before = set(sys.modules)  # what packages load when the interpreter starts\n"
        "import numpy as np, numba_attn\n"
        "from foreign import InNamespace, Interface\n"
        "x = InNamespace(np.ones((5, 8)))\n"
        "numba_attn.scaled_dot_product_attention(x, x, x, backend='reference')\n"
        "assert 'cuda' not in set(sys.modules) - before\n"
        "try: numba_attn.scaled_dot_product_attention(*[Interface((5, 8))] * 3)\n"
        "except NotImplementedError: pass\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    ).split()
    assert not {"torch", "jax", "cupy", "numba", "ml_dtypes"} & set(loaded)
