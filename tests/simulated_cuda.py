"""The contract on the portable CUDA kernels in Numba's simulator, which `test_cuda_simulator` runs in a child process.

Threads of CUDA are threads of Python there, a thousand times slower than anything: problems are tiny, and so are tiles,
of four threads, so that every edge is met.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import mods
import numpy as np
import pytest
from cases import SIXTEEN_BITS, SMALL, Case
from contract import Contract
from tolerances import assert_accurate

from numba_attn import KVCache, PagedKVCache, attention_with_kv_cache, scaled_dot_product_attention
from numba_attn.cuda import portable, simulator
from numba_attn.cuda.arguments import Tile
from numba_attn.problem import AUX_NAMES

# What Python says where the kernels' arithmetic meets infinities and NaN; on a device it says nothing.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in (scalar|cast):RuntimeWarning")


def _tiny(name: str, Hq: int, Lq: int, Lk: int, D: int, **rest: Any) -> Case:
    fields = {key: rest.pop(key) for key in ("B", "Hkv", "Dv", "dtype", "mask") if key in rest}
    return Case(f"tiny, {name}", Hq, Lq, Lk, D, options=rest, **fields)


def _everything(dtype: str) -> Case:
    (case,) = (case for case in SMALL if case.name == f"everything at once, {dtype}")
    shape = case.B, case.Hq, 17, 22
    options = {
        **case.options, "query_offset": [6, 1], "window": (13, 2), "query_lengths": [17, 12], "kv_lengths": [22, 13],
        "block_mask": mods.blocky(mods.scattered, shape, (5, 7)),
    }  # fmt: skip
    name = f"tiny, {case.name}"
    return dataclasses.replace(case, name=name, Lq=17, Lk=22, D=5, Dv=6, mask="additive with -inf", options=options)


_LENGTHS = {"kv_lengths": [21, 9, 0], "query_lengths": [19, 0, 12]}
_SLOPES = np.array([[0.5, 0.125], [0.25, -1.0]])
_PREFIX = mods.blocky(mods.prefix, (1, 1, 19, 21), (5, 6))
TINY = [
    _tiny("plain", 2, 19, 21, 5, B=2, Dv=7),
    _tiny("more value columns than a block", 1, 11, 13, 3, Dv=37),
    _tiny("one query", 2, 1, 27, 4),
    _tiny("one key", 1, 18, 1, 4),
    _tiny("D 0", 1, 5, 9, 0, Dv=3),
    _tiny("float64, causal, offsets", 1, 19, 23, 5, B=3, dtype="float64", is_causal=True, query_offset=[-9, 0, 14]),
    _tiny("large scores", 1, 9, 40, 8, scale=30.0),
    _tiny("window, groups", 4, 19, 21, 4, Hkv=2, window=(5, 2), query_offset=4, scale=-0.7),
    _tiny("lengths, bottom right", 1, 19, 21, 4, B=3, is_causal=True, query_offset="bottom_right", **_LENGTHS),
    _tiny("bool, sinks", 2, 19, 21, 4, B=2, mask="bool (B,Hq,Lq,Lk)", sinks=np.array([0.5, -2.0])),
    _tiny("padding mask", 2, 9, 21, 4, B=2, mask="bool (B,1,1,Lk)"),
    _tiny("nothing allowed, sinks", 1, 9, 11, 4, mask="bool none", sinks=np.array([0.5])),
    _tiny("additive with -inf, softcap", 2, 19, 21, 4, mask="additive with -inf", softcap=2.0),
    _tiny("additive lowest", 1, 17, 30, 4, mask="additive lowest"),
    _tiny("additive lowest, left padding", 1, 5, 30, 4, B=2, mask="additive lowest, left padding", sinks=np.zeros(1)),
    _tiny("float64 mask beyond float32", 1, 9, 11, 4, mask="additive float64 lowest"),
    _tiny("additive (B,1,Lq,1)", 2, 9, 11, 4, B=2, mask="additive (B,1,Lq,1)"),
    _tiny("additive every other", 1, 9, 11, 4, mask="additive every other"),
    _tiny("alibi, offsets", 2, 17, 19, 4, B=2, alibi_slopes=_SLOPES, query_offset=[-3, 5]),
    _tiny("functions", 2, 17, 19, 4, B=2, score_mod=mods.by_place, mask_mod=mods.scattered),
    _tiny("block mask, sinks", 2, 19, 21, 4, block_mask=_PREFIX, sinks=np.array([0.0, 3.0])),
    _tiny("dropout, causal, groups", 4, 17, 19, 4, Hkv=2, is_causal=True, dropout_p=0.4, dropout_seed=1 << 40),
    *(_everything(dtype) for dtype in ("float32", "float64", *SIXTEEN_BITS)),
    *(_tiny(f"{dtype}, float64 mask", 1, 17, 19, 4, dtype=dtype, mask="additive float64") for dtype in SIXTEEN_BITS),
]


def _over(test: Callable[..., None], **values: list[Any]) -> Callable[..., None]:
    """A test of the contract with other values of its parameters."""

    @functools.wraps(test)
    def run(self: Contract, **arguments: Any) -> None:
        test(self, **arguments)

    run.pytestmark = [  # type: ignore[attr-defined]
        pytest.mark.parametrize(
            name, values.get(name, given), ids=None if name != "case" else lambda case: case.name
        ).mark
        for name, given in (mark.args for mark in test.pytestmark)  # type: ignore[attr-defined]
    ]
    return run


class Turns:
    """Lets one thread of a block run at a time, each as far as the next barrier, and then in the other order.

    So a barrier that is missing shows: the first thread reads what the others have not written, or the last one what
    they have overwritten.
    """

    def __init__(self, threads: list[Any]) -> None:
        self.order, self.place = threads, 0
        self.turn = {thread: threading.Semaphore(0) for thread in threads}
        self.ended: set[Any] = set()
        self.apart = False  # whether some have come to a barrier that others will not come to
        for thread in threads:
            thread.syncthreads = functools.partial(self.wait, thread)

    def run(self) -> None:
        for thread in self.order:
            thread.start()
        self.turn[self.order[0]].release()
        for thread in self.turn:
            thread.join()

    def begin(self, thread: Any) -> None:
        self.turn[thread].acquire()

    def wait(self, thread: Any) -> None:
        self._next()
        self.turn[thread].acquire()
        if self.apart:
            raise AssertionError("a thread waits for others that have returned, or failed")

    def end(self, thread: Any) -> None:
        self.ended.add(thread)
        self._next()

    def _next(self) -> None:
        self.place += 1
        if self.place == len(self.order):
            self.order, self.place = [thread for thread in self.order[::-1] if thread not in self.ended], 0
            self.apart = bool(self.order and self.ended)
        if self.order:
            self.turn[self.order[self.place]].release()


@pytest.fixture(scope="session", autouse=True)
def turns() -> Iterator[None]:
    """The simulator runs threads by `Turns`, where it would look at all of them again and again: in half the time."""
    from numba.cuda.simulator import kernel

    def run(self: Any, place: tuple[int, ...], *arguments: Any) -> None:
        def target() -> None:
            thread = threading.current_thread()
            block.begin(thread)
            try:
                self._f(*arguments)
            finally:
                block.end(thread)

        threads = [
            kernel.BlockThread(target, self, place, thread, self._debug) for thread in np.ndindex(*self._block_dim)
        ]
        block = Turns(threads)
        block.run()
        failed = [thread.exception for thread in threads if thread.exception]
        for error, traceback in sorted(failed, key=lambda failure: isinstance(failure[0], AssertionError)):
            raise error.with_traceback(traceback)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel.BlockManager, "run", run)
        yield


@pytest.fixture(scope="session", autouse=True)
def tiles() -> Iterator[None]:
    assert simulator.enabled()

    def small(kind: str, Lq: int, Dv: int) -> Tile:
        # Of random numbers for dropout, four keys side by side share some, or do not.
        return Tile(3, 4, 6, 2, 2, 4) if kind != "float64" else Tile(4, 3, 8, 2, 2, 3)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portable, "tile_of", small)
        yield


class TestTiny(Contract):
    backend = "cuda"


class TestSmall(Contract):
    """Every sixth case of the contract, once: a thread of the simulator takes a millisecond."""

    backend = "cuda"

    def test_agrees_with_float64(self, case: Case) -> None:
        arrays, options = case.arrays(), case.keywords()
        out, aux = self.run(*arrays, return_aux=AUX_NAMES, **options)
        assert_accurate(out, aux, *arrays, **options)


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("pages", [False, True])
def test_caches(pages: bool, quantize: str | None) -> None:
    """Contiguous and in pages, as numbers and quantised, against the reference of the same cache."""
    rng = np.random.default_rng(5)
    tokens = [rng.standard_normal((2, 2, 11, size), dtype=np.float32) for size in (5, 35)]
    query = rng.standard_normal((2, 4, 3, 5), dtype=np.float32)
    cache: Any = KVCache(2, 2, 20, 5, 35, quantize=quantize)
    if pages:
        paged = PagedKVCache(9, 2, 3, 5, 35, quantize=quantize)
        cache = paged.batch([paged.add() for _ in range(2)])
    cache.append(*tokens, counts=[11, 6])
    results = [
        attention_with_kv_cache(query, cache, window=(8, 0), return_aux=AUX_NAMES, backend=backend)
        for backend in ("cuda", "reference")
    ]
    for got, expected in zip((results[0][0], *results[0][1]), (results[1][0], *results[1][1]), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"sinks": np.array([0.5], np.float32)}, {"dtype": "float64"}])
def test_weights_of_rows_whose_scores_are_large(options: dict[str, Any]) -> None:
    """All keys of a row masked with a large number share it, as without one."""
    dtype = np.dtype(options.pop("dtype", "float32"))
    query, key, value = (np.random.default_rng(6).standard_normal((1, 9, 4)).astype(dtype) for _ in range(3))
    mask = np.zeros((9, 9), dtype)
    mask[3], mask[5], mask[7] = -1e9 if dtype == np.float32 else -1e17, np.finfo(dtype).min, 1e9
    results = [
        scaled_dot_product_attention(query, key, value, mask, return_aux=("key_weight",), backend=backend, **options)[1]
        for backend in ("cuda", "reference")
    ]
    got, expected = (result.key_weight for result in results)
    # The reference adds masks in float64, where the scores are not lost beside 1e9.
    np.testing.assert_allclose(got.sum(), expected.sum(), rtol=1e-5)
    if not options:
        np.testing.assert_allclose(got.sum(), 9, rtol=1e-5)


def test_weights_where_a_function_leaves_nothing() -> None:
    x = np.random.default_rng(7).standard_normal((1, 5, 4), dtype=np.float32)
    options = {"score_mod": lambda score, b, h, i, j: score if i > 1 else -np.inf, "return_aux": ("key_weight", "lse")}
    _, aux = scaled_dot_product_attention(x, x, x, backend="cuda", **options)  # type: ignore[call-overload]
    np.testing.assert_allclose(aux.key_weight.sum(), 3, rtol=1e-6)


# What is quick of the rest: the others take longer than half a second a case.
_FEW = [case for case in TINY if case.name in ("tiny, plain", "tiny, everything at once, float32")]
_PARAMETERS: dict[str, dict[str, list[Any]]] = {
    "test_agrees_with_float64": {"case": TINY},
    "test_rows_without_keys_are_zero": {"case": TINY},
    "test_what_is_masked_changes_no_bit": {"case": TINY, "poison": [np.nan]},
    "test_nan_reaches_exactly_the_rows_that_attend_to_it": {"case": TINY},
    "test_statistics_change_no_bit_of_each_other": {"case": _FEW[1:]},
    "test_strides_change_no_bit": {"case": _FEW},
    "test_out_in_any_form": {"case": _FEW[:1]},
    "test_layout": {"case": _FEW},
    "test_ranks": {},
    "test_empty": {},
    "test_all_masks_together": {},
    "test_a_sink_is_a_key_without_value": {},
}
for _name in dir(Contract):
    if _name.startswith("test_"):
        _test, _values = getattr(Contract, _name), _PARAMETERS.get(_name)
        setattr(TestTiny, _name, None if _values is None else _over(_test, **_values) if _values else _test)
        if _name != "test_agrees_with_float64":
            setattr(TestSmall, _name, None)
# Those that take seconds here, not minutes.
_QUICK = [case for case in SMALL if case.B * case.Hq * case.Lq * case.Lk * (case.D + (case.Dv or case.D)) <= 600_000]
TestSmall.test_agrees_with_float64.pytestmark = [  # type: ignore[attr-defined]
    pytest.mark.parametrize("case", _QUICK[::6], ids=lambda case: case.name).mark
]
