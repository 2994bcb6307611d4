"""Arrays of other libraries in host memory, by stand-ins that speak DLPack, and what cannot be read at all."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from cases import dtype_of
from foreign import OPERANDS, SIZES, Described, Exported, ExportedOfOld, InNamespace, Interface, arguments
from tolerances import same_bits

import numba_attn
from numba_attn import arrays, scaled_dot_product_attention
from numba_attn.cpu import attention
from numba_attn.problem import AUX_NAMES, Problem

B, HQ, HKV, LQ, LK, D, DV = SIZES
NUMBERS = ("alibi_slopes", "sinks", "query_lengths", "kv_lengths", "query_offset")


def attend(given: dict[str, Any], **options: Any) -> Any:
    return scaled_dot_product_attention(**given, enable_gqa=True, is_causal=True, **options)


def plain(x: Any) -> np.ndarray:
    return x.x if isinstance(x, Exported) else x


@pytest.fixture
def problems(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """Those that reach the CPU kernels."""
    seen: list[Problem] = []
    forward = attention.forward
    monkeypatch.setattr(attention, "forward", lambda problem: (seen.append(problem), forward(problem))[1])
    return seen


# In host memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Exported, ExportedOfOld, InNamespace])
@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
def test_results_are_those_of_numpy(kind: Any, backend: str | None) -> None:
    given = arguments()
    expected, expected_aux = attend(given, return_aux=AUX_NAMES, backend=backend)
    out, aux = attend({name: kind(x) for name, x in given.items()}, return_aux=AUX_NAMES, backend=backend)
    made = InNamespace if kind is InNamespace else np.ndarray
    assert isinstance(aux, numba_attn.Aux) and all(type(x) is made for x in (out, *aux))
    assert same_bits((plain(out), *map(plain, aux)), (expected, *expected_aux))


@pytest.mark.parametrize("name", [*NUMBERS, "attn_mask"])
def test_some_arrays_of_numpy(name: str) -> None:
    given = arguments()
    other = {name_: Exported(x) if name_ != name else x for name_, x in given.items()}
    assert same_bits(attend(other), attend(given))


VIEWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.swapaxes(2, 3).copy().swapaxes(2, 3),
    "every other": lambda x: np.repeat(x, 2, axis=3)[..., ::2],
    "backwards": lambda x: x[:, :, ::-1].copy()[:, :, ::-1],
    "heads inside": lambda x: np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2),
    "broadcast": lambda x: np.broadcast_to(x[:1, :1], x.shape),
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
}


@pytest.mark.parametrize("view", VIEWS)
def test_nothing_is_copied(view: str, problems: list[Problem]) -> None:
    given = arguments()
    operands = {name: VIEWS[view](given[name]) for name in OPERANDS}
    given |= {name: Exported(x) for name, x in operands.items()}
    out = np.empty((B, HQ, LQ, DV), np.float32)
    exported = Exported(out)
    assert attend(given, out=exported) is exported
    assert same_bits(out, attend({**given, **operands}))
    problem = problems[0]
    for x, y in ((problem.query, operands["query"]), (problem.key, operands["key"]), (problem.value, operands["value"]),
                 (problem.out, out), (problem.result, out)):  # fmt: skip
        assert x.__array_interface__["data"][0] == y.__array_interface__["data"][0] and x.strides == y.strides


def test_mixed_with_a_call_of_numpy(problems: list[Problem]) -> None:
    given = arguments()
    attend(given)
    assert problems[0].query.base is given["query"] or problems[0].query is given["query"]


def test_memory_lives_as_long_as_a_view() -> None:
    class Owner(np.ndarray):
        pass

    x = np.ones((3, 4), np.float32).view(Owner)
    alive = weakref.ref(x)
    view = arrays.view("x", Exported(x))[1:, None]
    del x
    gc.collect()
    assert alive() is not None and (view == 1).all()
    del view
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("shape", [(B, HQ, 0, D), (0, HQ, LQ, D), (B, 0, LQ, D)])
def test_without_elements(shape: tuple[int, ...]) -> None:
    x = np.ones(shape, np.float32)
    out = scaled_dot_product_attention(InNamespace(x), InNamespace(x), InNamespace(x))
    assert isinstance(out, InNamespace) and out.x.shape == shape
    described = Described(0, shape)
    assert scaled_dot_product_attention(described, described, described).shape == shape


def test_threads() -> None:
    given = arguments()
    expected = attend(given)
    exported = {name: Exported(x) for name, x in given.items()}
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: attend(exported), range(64)))
    assert all(same_bits(x, expected) for x in results)


@pytest.mark.parametrize("mistake", ["no axes", "one axis", "integers"])
def test_checks_are_those_of_numpy(mistake: str) -> None:
    given = arguments()
    x = given["query"]
    wrong = {"no axes": x[0, 0, 0, :1].reshape(()), "one axis": x[0, 0, 0], "integers": x.astype(int)}[mistake]
    errors = []
    for query in (wrong, Exported(wrong)):
        operands = {name: x if type(query) is np.ndarray else Exported(x) for name, x in given.items()}
        with pytest.raises((TypeError, ValueError)) as error:
            attend({**operands, "query": query})
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


def test_out_that_cannot_be_written() -> None:
    out = np.zeros((B, HQ, LQ, DV), np.float32)
    read_only = out[...]
    read_only.flags.writeable = False
    for wrong, kind in (
        (Exported(read_only), Exported),
        (described(out, flags=1), described),  # read-only
        (described(out, flags=2), described),  # a copy
        (ExportedOfOld(out), ExportedOfOld),  # nobody knows
    ):
        with pytest.raises(ValueError, match="out must be writeable"):
            attend({name: kind(x) for name, x in arguments().items()}, out=wrong)
    query = np.zeros((B, HQ, LQ, DV), np.float32)
    with pytest.raises(ValueError, match="out must not share memory with query"):
        scaled_dot_product_attention(Exported(query), Exported(query), Exported(query), out=Exported(query[:]))
    assert (out == 0).all()


def described(x: np.ndarray, **options: Any) -> Described:
    made = Described(
        x.__array_interface__["data"][0], x.shape, x.dtype, tuple(s // x.itemsize for s in x.strides), **options
    )
    made.alive = x  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize(
    "options",
    [{}, {"version": None}, {"version": (1, 9)}, {"flags": 1}, {"flags": 3}, {"device": (3, 0)}, {"device": (11, 0)}],
    ids=str,
)
def test_what_capsules_say(options: dict[str, Any]) -> None:
    x = np.arange(24, dtype=np.float64).reshape(2, 3, 4)
    view = arrays.view("x", described(x.swapaxes(0, 2), **options))
    assert view.dtype == np.float64 and view.strides == x.swapaxes(0, 2).strides and same_bits(view, x.swapaxes(0, 2))
    assert view.flags.writeable == (options.get("flags", 0) == 0 and options.get("version", 1) is not None)
    address = x.ctypes.data
    without_strides = arrays.view("x", Described(address - 8, x.shape, "f8", offset=8, **options))
    assert same_bits(without_strides, x)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "?", "i1", "i8", "u2"])
def test_numbers_of_capsules(dtype: str) -> None:
    x = np.arange(6).reshape(2, 3).astype(dtype)
    for kind in (Exported, described):
        view = arrays.view("x", kind(x))
        assert view.dtype == x.dtype and same_bits(view, x)


def test_bfloat16() -> None:
    pytest.importorskip("ml_dtypes")
    bits = np.random.default_rng(0).standard_normal((3, B, HQ, LQ, D)).astype(dtype_of("bfloat16")).view(np.uint16)
    views = [x.swapaxes(1, 2) for x in bits]
    operands = [described(x, code=4) for x in views]
    expected = scaled_dot_product_attention(*(x.view(dtype_of("bfloat16")) for x in views))
    out = scaled_dot_product_attention(*operands)
    assert out.dtype == expected.dtype and same_bits(out, expected)


def test_bfloat16_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    x = described(np.zeros((3, 4), np.uint16), code=4)
    with pytest.raises(TypeError, match=r"query must be .*: bfloat16 needs .* pip install 'numba_attn\[bf16\]'"):
        scaled_dot_product_attention(x, x, x)


class Raising(Exported):
    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError("not today")


class NoCapsule(Exported):
    def __dlpack__(self, **options: Any) -> Any:
        return 7


ADDRESS = np.zeros(4096, np.float64).ctypes.data
UNREADABLE: dict[str, tuple[Any, str]] = {
    "vectors": (Described(ADDRESS, (3, 4), lanes=4), "NumPy has no vectors of 4 float32"),
    "handles": (Described(ADDRESS, (3, 4), code=3, bits=64), "NumPy has no DLPack's type 3"),
    "float8": (Described(ADDRESS, (3, 4), code=10, bits=8), "NumPy has no DLPack's type 10"),
    "four bits": (Described(ADDRESS, (3, 4), code=0, bits=4), "NumPy has no int4"),
    "bits": (Described(ADDRESS, (3, 4), code=6, bits=1), "NumPy has no bool1"),
    "float24": (Described(ADDRESS, (3, 4), bits=24), "NumPy has no float24"),
    "DLPack 2": (Described(ADDRESS, (3, 4), version=(2, 0)), r"DLPack 2\.0 is not understood"),
    "used capsule": (Described(ADDRESS, (3, 4), name=b"used_dltensor"), "not given a DLPack capsule"),
    "no capsule": (NoCapsule(np.zeros((3, 4))), "not given a DLPack capsule"),
    "metal": (Described(ADDRESS, (3, 4), device=(8, 0)), "device of DLPack's type 8"),
    "no memory": (Described(0, (3, 4)), r"it has no memory, for shape \(3, 4\)"),
    "no memory on a device": (Described(0, (3, 4), device=(2, 0)), r"it has no memory, for shape \(3, 4\)"),
    "raises": (Raising(np.zeros((3, 4))), "not today"),
    "no interface": (Interface((3, 4), typestr="<x4"), ""),
    "masked": (Interface((3, 4), mask=Interface((3, 4), "?")), "it is masked"),
    "byte order": (Interface((3, 4), ">f4"), "byte order"),
    "NULL": (Interface((3, 4), address=0), r"it has no memory, for shape \(3, 4\)"),
}


@pytest.mark.parametrize("mistake", UNREADABLE)
def test_what_cannot_be_read(mistake: str) -> None:
    """By an error that names the argument and the class."""
    wrong, message = UNREADABLE[mistake]
    name = f"{type(wrong).__module__}.{type(wrong).__qualname__}"
    with pytest.raises(TypeError, match=f"query must be an array that can be read, got {name}: .*{message}"):
        scaled_dot_product_attention(wrong, wrong, wrong)
    given = arguments()
    with pytest.raises(TypeError, match=f"kv_lengths must be an array that can be read, got {name}: .*{message}"):
        attend({**given, "kv_lengths": wrong})


def test_kinds_do_not_mix() -> None:
    given = arguments()
    exported = {name: Exported(x) for name, x in given.items()}
    for name in ("key", "value", "attn_mask"):
        for leader, other, types in (
            (given, Exported(given[name]), "numpy.ndarray and foreign.Exported"),
            (exported, ExportedOfOld(given[name]), "foreign.Exported and foreign.ExportedOfOld"),
            (exported, Interface(given[name].shape), "foreign.Exported and foreign.Interface"),
            (exported, [1.0], "foreign.Exported and list"),
        ):
            with pytest.raises(TypeError, match=f"query and {name} must be arrays of one library, got {types}"):
                attend({**leader, name: other})
    with pytest.raises(TypeError, match=r"query and key must be .* foreign.Exported and numpy.ndarray"):
        attend({**exported, "key": given["key"]})
    out = np.empty((B, HQ, LQ, DV), np.float32)
    with pytest.raises(TypeError, match=r"query and out must be .* foreign.Exported and numpy.ndarray"):
        attend(exported, out=out)
    with pytest.raises(TypeError, match=r"query and out must be .* numpy.ndarray and foreign.Exported"):
        attend(given, out=Exported(out))
    with pytest.raises(TypeError, match=r"query and key must be .* list and foreign.Exported"):
        attend({**exported, "query": [1.0]})


# The other functions --------------------------------------------------------------------------------------------------


def test_varlen_attention() -> None:
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, 10, 2, 8), dtype=np.float32)
    starts = np.array([0, 4, 10])
    expected = numba_attn.varlen_attention(query, key, value, starts, starts)
    out = numba_attn.varlen_attention(*map(InNamespace, (query, key, value)), Exported(starts), starts)
    assert isinstance(out, InNamespace) and same_bits(out.x, expected)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_attention_with_kv_cache(quantize: str | None) -> None:
    rng = np.random.default_rng(0)
    query, key, value = rng.standard_normal((3, 2, 4, 6, 8), dtype=np.float32)
    tables = numba_attn.rotary_tables(6, 8)
    results = []
    for wrap in (np.asarray, InNamespace):
        cache = numba_attn.KVCache(2, 4, 10, 8, quantize=quantize)
        cache.append(wrap(key[:, :, :2]), wrap(value[:, :, :2]), counts=wrap(np.array([2, 1])))
        given = [wrap(x[:, :, 2:6]) for x in (query, key, value)]
        out, aux = numba_attn.attention_with_kv_cache(
            given[0], cache, *given[1:], counts=wrap(np.array([4, 3])), rotary=tuple(map(wrap, tables)),
            return_aux=("lse",),
        )  # fmt: skip
        assert type(out) is type(aux.lse) is type(given[0])
        results.append((plain(out), plain(aux.lse), cache.lengths))
    assert same_bits(*results)
    out = InNamespace(np.empty((2, 4, 1, 8), np.float32))
    assert numba_attn.attention_with_kv_cache(InNamespace(query[:, :, :1]), cache, out=out) is out
    with pytest.raises(TypeError, match="query and key must be arrays of one library"):
        numba_attn.attention_with_kv_cache(given[0], cache, key, value)


def test_merge_attention() -> None:
    rng = np.random.default_rng(0)
    outs, lses = rng.standard_normal((3, 2, 5, 8), dtype=np.float32), rng.standard_normal((3, 2, 5), dtype=np.float32)
    expected = numba_attn.merge_attention(outs, lses)
    got = numba_attn.merge_attention(map(InNamespace, outs), map(InNamespace, lses))
    assert all(isinstance(x, InNamespace) for x in got) and same_bits(tuple(map(plain, got)), expected)
    with pytest.raises(TypeError, match=r"outs\[0\] and outs\[1\] must be .* numpy.ndarray and foreign.Exported"):
        numba_attn.merge_attention([outs[0], Exported(outs[1])], [lses[0], Exported(lses[1])])
    with pytest.raises(TypeError, match=r"outs\[1\] and lses\[1\] must be .* foreign.Exported and numpy.ndarray"):
        numba_attn.merge_attention([Exported(outs[0]), Exported(outs[1])], [Exported(lses[0]), lses[1]])


def test_apply_rotary() -> None:
    x = np.random.default_rng(0).standard_normal((2, 4, 5, 8), dtype=np.float32)
    tables = numba_attn.rotary_tables(9, 8)
    offset = np.array([1, 3])
    expected = numba_attn.apply_rotary(x, *tables, position_offset=offset)
    out = numba_attn.apply_rotary(InNamespace(x), *tables, position_offset=Exported(offset))
    assert isinstance(out, InNamespace) and same_bits(out.x, expected)
    positions = Exported(np.arange(9.0))
    assert same_bits(numba_attn.rotary_tables(positions, 8), tables)
    place = Exported(x)
    assert numba_attn.apply_rotary(place, *map(Exported, tables), position_offset=offset, out=place) is place
    assert same_bits(x, expected)
