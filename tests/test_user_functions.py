"""User functions as passes over a tile: what they may use, what is refused, what is compiled when."""

from __future__ import annotations

import math
import threading
import types as python_types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

from numba_attn.cpu import user_functions
from numba_attn.cpu.jit import OPTIONS
from numba_attn.cpu.pointers import address
from numba_attn.cpu.target import CONVERTS_ONE_BY_ONE
from numba_attn.cpu.user_functions import mask_pass, run_mask_pass, run_score_pass, score_pass

RNG = np.random.default_rng(0)
N, WIDTH, ROWS, HEADS = 7, 32, 7, 3
BLOCKS = [(WIDTH, ROWS, HEADS), (4, 1, 3), (4, 2, 2), (1, 1, 1)]  # many rows and few, all lanes queries or not
B, H, ROW, KEY = 1, 1, 30, 11  # the tile's sequence, first head, first query and first key
IDS = np.repeat(np.arange(40), 3)
GLOBAL_TABLE = RNG.standard_normal((4, 64))
GLOBAL_NUMBER = 0.25
tables = python_types.ModuleType("tables")
tables.weights = RNG.standard_normal(64)  # type: ignore[attr-defined]
tables.number = 3  # type: ignore[attr-defined]


def of_an_alias(score, b, h, i, j):
    module = tables
    return score * module.number


@numba.njit(**OPTIONS)
def score_driver(codes, index, captured, s, n, width, rows, heads, factor, b, h, i, j):
    run_score_pass(codes, index, captured, address(s), n, width, rows, heads, factor, b, h, i, j)


@numba.njit(**OPTIONS)
def mask_driver(codes, index, captured, bias, fresh, n, width, rows, heads, b, h, i, j):
    run_mask_pass(codes, index, captured, address(bias), fresh, n, width, rows, heads, b, h, i, j)


def codes(made: user_functions.Pass) -> np.ndarray:
    """As a kernel holds two passes: the second one is asked for."""
    return np.array([0, made.code[0]], np.intp)


def padded(expected: np.ndarray, width: int) -> np.ndarray:
    """The lanes that are no queries are as the last one that is."""
    return np.concatenate([expected, np.repeat(expected[:, -1:], width - expected.shape[1], axis=1)], axis=1)


def places(rows: int, heads: int) -> list[list[tuple[int, int, int, int]]]:
    """Where the queries of each key are: the rows of one head after the other."""
    return [[(B, H + h, ROW + row, KEY + key) for h in range(heads) for row in range(rows)] for key in range(N)]


def check_score(function: Callable[..., Any], dtype: str) -> None:
    made = score_pass(function, dtype)
    python = getattr(function, "py_func", function)
    factor, tolerance = np.dtype(dtype).type(0.5), 1e-5 if dtype == "f" else 1e-13
    for width, rows, heads in BLOCKS:
        s = RNG.standard_normal((N, width)).astype(dtype)
        natural, at = (s * factor)[:, : rows * heads], places(rows, heads)
        score_driver(codes(made), 1, made.captured, s, N, width, rows, heads, factor, B, H, ROW, KEY)
        expected = np.array(
            [[python(x, *here) for x, here in zip(*of_key, strict=True)] for of_key in zip(natural, at, strict=True)]
        )
        np.testing.assert_allclose(s, padded(expected, width), rtol=tolerance, atol=tolerance)


def check_mask(function: Callable[..., Any], dtype: str, fresh: bool) -> None:
    made = mask_pass(function, dtype)
    python = getattr(function, "py_func", function)
    for width, rows, heads in BLOCKS:
        bias = np.full((N, width), np.nan, dtype) if fresh else RNG.standard_normal((N, width)).astype(dtype)
        given = np.zeros_like(bias) if fresh else bias.copy()
        mask_driver(codes(made), 1, made.captured, bias, fresh, N, width, rows, heads, B, H, ROW, KEY)
        kept = np.array([[python(*at) for at in of_key] for of_key in places(rows, heads)], bool)
        np.testing.assert_array_equal(bias, padded(np.where(kept, given[:, : rows * heads], -np.inf), width))


def relative(score, b, h, i, j):
    return score + 0.1 * (i - j)


def of_a_global(score, b, h, i, j):
    return score * GLOBAL_NUMBER + GLOBAL_TABLE[h, i] - GLOBAL_TABLE.shape[0]


def of_a_module(score, b, h, i, j):
    return score + tables.weights[j] * tables.number


@numba.njit
def jitted_helper(x, at, scale=2):
    return x / scale + tables.weights[at]


def helper(x, twice=False):
    return 2 * x if twice else x


def calls_others(score, b, h, i, j):
    return jitted_helper(score, j) + jitted_helper(score, scale=3, at=i) + helper(h, twice=True)


def calls_an_alias(score, b, h, i, j):
    function = jitted_helper
    return function(score, i)


def has_a_function_inside(score, b, h, i, j):
    def inside(x):
        return x * GLOBAL_TABLE[b, j]

    return inside(score)


def branches(score, b, h, i, j):
    if i < j:
        return -math.inf
    if i - j < 4:
        return score
    return score - 1


def loops(score, b, h, i, j):
    total = 0.0
    for k in range(h + 1):
        total += score * k
    return total


def scalar_functions(score, b, h, i, j):
    x = math.exp(min(score, 1.0)) + np.tanh(score) + abs(i - j) + np.abs(score) + np.maximum(score, 0)
    return x + np.where(i > j, score, 2.0) + np.clip(score, -0.5, 0.5)


def halved_until_small(score, b, h, i, j):
    while score > 0.1:
        score /= 2
    return score


def integers_only(score, b, h, i, j):
    return (i - j) // 2 + b + h


def with_a_number(slope):
    return lambda score, b, h, i, j: score - slope * abs(i - j)


def with_an_array(array):
    def biased(score, b, h, i, j):
        return score + array[(i - j) % 16]

    return biased


def with_a_matrix(matrix):
    return lambda score, b, h, i, j: score + matrix[i, j]


def with_a_tuple(pair):
    def biased(score, b, h, i, j):
        array, number = pair
        return score + array[h] * number

    return biased


SCORE_MODS = [
    *(relative, of_a_global, of_a_module, calls_others, calls_an_alias, has_a_function_inside, branches, loops),
    *(scalar_functions, integers_only, numba.njit(relative)),
    with_a_number(0.5),
    with_a_number(np.float32(0.5)),
    with_an_array(RNG.standard_normal(16)),
    with_an_array(RNG.standard_normal(16).astype("f")[::-1]),
    with_an_array(np.arange(32, dtype=np.int16)[::2]),
    with_an_array(np.arange(16) > 7),
    with_a_matrix(RNG.standard_normal((64, 64))),
    with_a_matrix(RNG.standard_normal((64, 64)).astype("f").T),
    with_a_matrix(np.broadcast_to(RNG.standard_normal(64), (64, 64))),
    with_a_tuple((RNG.standard_normal(4), 3)),
]


@pytest.mark.parametrize("dtype", ["f", "d"])
@pytest.mark.parametrize("function", SCORE_MODS, ids=lambda f: f.__qualname__)
def test_scores_are_what_the_function_says(function: Callable[..., Any], dtype: str) -> None:
    check_score(function, dtype)


def same_document(b, h, i, j):
    return IDS[i] == IDS[j]


def as_an_integer(b, h, i, j):
    return (i >= j) & (j % 2)


def by_head(b, h, i, j):
    return (i + 2 * h + j) % 5 != 0


def of_both(b, h, i, j):
    return same_document(b, h, i, j) or i - j > 20


@pytest.mark.parametrize("dtype", ["f", "d"])
@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("function", [same_document, as_an_integer, by_head, of_both], ids=lambda f: f.__qualname__)
def test_masks_are_what_the_function_says(function: Callable[..., Any], fresh: bool, dtype: str) -> None:
    check_mask(function, dtype, fresh)


@pytest.mark.parametrize(("width", "rows", "heads"), BLOCKS)
def test_padding_lanes_read_nothing_beyond_the_last_query(width: int, rows: int, heads: int) -> None:
    """The function is called for queries only: an array has no more elements than there are queries."""
    seen = np.zeros(ROW + rows)
    seen[-1] = 7
    made = score_pass(lambda score, b, h, i, j: seen[i], "d")
    s = np.zeros((N, width))
    score_driver(made.code, 0, made.captured, s, N, width, rows, heads, 1.0, B, H, ROW, KEY)
    lanes = np.arange(width)
    assert (s == np.where((lanes % rows == rows - 1) | (lanes >= rows * heads), 7, 0)).all()


def test_padding_lanes_have_no_score_of_their_own() -> None:
    """The function meets none that no query has: it may not end for an infinite one."""
    made = score_pass(halved_until_small, "d")
    s = np.where(np.arange(4) < 3, 1.0, np.inf) * np.ones((N, 1))
    score_driver(made.code, 0, made.captured, s, N, 4, 1, 3, 1.0, B, H, ROW, KEY)
    assert (s == 0.5**4).all()


# What is compiled when ------------------------------------------------------------------------------------------------


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each pass that is compiled during the test."""
    made: list[Any] = []
    compile_pass = user_functions.compile_pass

    def counting(*arguments: Any) -> Any:
        made.append(arguments)
        return compile_pass(*arguments)

    monkeypatch.setattr(user_functions, "compile_pass", counting)
    monkeypatch.setattr(user_functions, "_kept", type(user_functions._kept)())
    return made


def test_contents_of_arrays_are_arguments(compiles: list[Any]) -> None:
    array = RNG.standard_normal(16)
    function = with_an_array(array)
    check_score(function, "d")
    array *= 2
    check_score(function, "d")
    check_score(with_an_array(RNG.standard_normal(40)), "d")
    readonly = RNG.standard_normal(16)
    readonly.flags.writeable = False
    check_score(with_an_array(readonly), "d")
    assert len(compiles) == 1
    check_score(with_an_array(RNG.standard_normal(40)[::2]), "d")
    check_score(with_an_array(RNG.standard_normal(40)[::-2]), "d")
    assert len(compiles) == 2
    check_score(with_an_array(RNG.standard_normal(16).astype("f")), "d")
    check_score(with_an_array(array), "f")
    assert len(compiles) == 4


def test_contents_of_arrays_of_helpers_are_arguments(compiles: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):  # the helper, if called from Python, would go on with the first array
        made = score_pass(lambda score, b, h, i, j: jitted_helper(score, j), "d")
        s = np.zeros((N, WIDTH))
        score_driver(made.code, 0, made.captured, s, N, WIDTH, ROWS, HEADS, 1.0, B, H, ROW, KEY)
        np.testing.assert_array_equal(s.T, np.broadcast_to(tables.weights[KEY : KEY + N], (WIDTH, N)))
        monkeypatch.setattr(tables, "weights", RNG.standard_normal(64))
    monkeypatch.setitem(globals(), "GLOBAL_TABLE", RNG.standard_normal((4, 64)))
    check_score(has_a_function_inside, "d")
    GLOBAL_TABLE[:] = 1
    check_score(has_a_function_inside, "d")
    assert len(compiles) == 2


def test_one_array_twice_and_two_arrays(compiles: list[Any]) -> None:
    def make(x, y):
        return lambda score, b, h, i, j: score + x[i] - 2 * y[j]

    x, y = RNG.standard_normal((2, 64))
    check_score(make(x, x), "d")
    check_score(make(x, y), "d")
    assert len(compiles) == 1


def test_numbers_are_constants(compiles: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[Any] = [1, 1.0, True, np.float32(1), np.int64(1), 2, -2]
    for number in numbers:
        check_score(with_a_number(number), "d")
    assert len(compiles) == len(numbers)
    for number in numbers:
        check_score(with_a_number(number), "d")
    assert len(compiles) == len(numbers)
    check_score(of_a_global, "d")
    monkeypatch.setitem(globals(), "GLOBAL_NUMBER", 0.5)
    check_score(of_a_global, "d")
    assert len(compiles) == len(numbers) + 2


def test_numbers_that_compare_equal_are_told_apart(compiles: list[Any]) -> None:
    def make(x):
        return lambda score, b, h, i, j: np.copysign(1, x)

    for number, sign in ((0.0, 1), (-0.0, -1), (math.nan, 1), (-math.nan, 1)):
        made = score_pass(make(number), "d")
        s = np.zeros((1, 4))
        score_driver(made.code, 0, made.captured, s, 1, 4, 4, 1, 1.0, 0, 0, 0, 0)
        assert math.isnan(number) or (s == sign).all()
    assert len(compiles) == 3


def test_few_passes_are_kept(compiles: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_functions, "MOST_KEPT", 2)
    for slope in (1, 2, 1, 3):
        score_pass(with_a_number(slope), "f")
    assert len(compiles) == 3
    score_pass(with_a_number(1), "f")
    assert len(compiles) == 3
    score_pass(with_a_number(2), "f")
    assert len(compiles) == 4
    assert len(user_functions._kept) == 2


def test_threads_that_ask_for_one_pass(compiles: list[Any]) -> None:
    ready, made = threading.Barrier(2), []

    def ask() -> None:
        ready.wait()
        made.append(score_pass(with_a_number(0.75), "f"))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiles) == 1
    assert made[0].code == made[1].code


def test_nothing_is_written(python: Callable[..., str], tmp_path: Path) -> None:
    python(
        "import numpy as np\n"
        "from numba_attn.cpu.user_functions import mask_pass, score_pass\n"
        "ids = np.arange(9)\n"
        "score_pass(lambda score, b, h, i, j: score - i, 'f')\n"
        "mask_pass(lambda b, h, i, j: ids[i] == j, 'f')\n",
        NUMBA_CACHE_DIR=str(tmp_path),
    )
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# Machine code ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [relative, of_a_global, branches, with_an_array(np.ones(16)), same_document])
def test_passes_are_vectors(made: Callable[..., Any]) -> None:
    """Queries are the lanes of vectors, captured arrays or not."""
    make = mask_pass if made is same_document else score_pass
    library = make(made, "f").keep[0]
    assert any(f"<{lanes} x float>" in library.get_llvm_str() for lanes in (4, 8, 16, 32))


WHOLE = np.concatenate([
    [sign * (1 << bit) + by for bit in range(62) for sign in (1, -1) for by in (-1, 0, 1)],
    RNG.integers(-(1 << 54), 1 << 54, 99),
    RNG.integers(-(1 << 63), (1 << 63) - 1, 1 << 12),
    [-(1 << 63), (1 << 63) - 1],
])  # fmt: skip


def test_integers_become_numbers_by_rounding_once() -> None:
    """In vectors, or one by one where these end; every integer."""
    made = score_pass(lambda score, b, h, i, j: float(WHOLE[i]), "d")
    s = np.zeros((1, len(WHOLE)))
    score_driver(codes(made), 1, made.captured, s, 1, len(WHOLE), len(WHOLE), 1, 1.0, 0, 0, 0, 0)
    np.testing.assert_array_equal(s[0], WHOLE.astype(np.float64))
    if CONVERTS_ONE_BY_ONE:
        assert "cvtsi2sd" not in made.keep[0].get_asm_str()


def test_callers_hold_nothing_of_a_pass() -> None:
    made = score_pass(relative, "f")
    s = np.zeros((1, 4), "f")
    score_driver(made.code, 0, made.captured, s, 1, 4, 4, 1, np.float32(1), 0, 0, 0, 0)
    result = next(x for x in score_driver.overloads.values() if "float32" in str(x.signature))
    text = user_functions._definition(result.library.get_llvm_str(), result.fndesc.llvm_func_name)
    assert not any(word in text for word in ("inttoptr", "NRT_", str(made.code[0])))


# Errors ---------------------------------------------------------------------------------------------------------------

A_LIST, OBJECTS, SWAPPED = [1], np.array([None]), np.arange(4).astype(np.dtype(int).newbyteorder())
HALVES, MASKED, NUMBERS = np.ones(4, np.float16), np.ma.masked_array(np.ones(4)), (1.0, 2.0)


def check_positive(x):
    if x < 0:
        raise ValueError(x)
    return x


def from_source(statement: str, **names: Any) -> Any:
    """A function that pytest does not rewrite."""
    exec(f"def mod(score, b, h, i, j):\n    {statement}\n    return score", names)
    return names["mod"]


def recursive(score, b, h, i, j):
    return recursive(score, b, h, i, j)


@numba.njit
def jitted_apply(function, x):
    return function(x)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda score, b, h, i, j: None, "real number, got none"),
        (from_source("if i < j: return"), "real number, got Option"),
        (lambda score, b, h, i, j: i > j, "real number, got bool"),
        (from_source("if i < j: raise ValueError(i)"), "'mod' must not raise"),
        (from_source("assert i > j"), "'mod' must not raise"),
        (lambda score, b, h, i, j: check_positive(score), "'check_positive' must not raise"),
        (lambda score, b, h, i, j: score + NUMBERS[h], "may raise"),
        (lambda score, b, h, i, j: score + undefined, "'undefined' is not defined"),  # type: ignore[name-defined]  # noqa: F821
        (lambda score, b, h, i, j: score + A_LIST[0], "captured list"),
        (lambda score, b, h, i, j: score + OBJECTS[0], "got object"),
        (lambda score, b, h, i, j: score + SWAPPED[0], "native byte order"),
        (lambda score, b, h, i, j: score + HALVES[0], "got float16"),
        (lambda score, b, h, i, j: score + MASKED[0], "masked array"),
        (lambda score, b, h, i, j: score + [1, 2][b], "must not make arrays or lists"),
        (lambda score, b, h, i, j: score.nothing, "attribute 'nothing'"),
        (lambda score, b, h, i, j: score * 1j, "real number, got complex"),
        (recursive, "must not call itself"),
        (from_source("TABLE[0] = 1", TABLE=np.ones(3)), "readonly array"),
        (lambda score, b, h, i, j: jitted_apply(helper, score), "can only be called"),
        (of_an_alias, "attribute of it"),
        (lambda score, b, h, i, j: score + np.random.rand(), "random numbers"),  # noqa: NPY002
    ],
)
def test_what_a_score_mod_must_not_do(function: Callable[..., Any], reason: str) -> None:
    with pytest.raises(TypeError) as error:
        score_pass(function, "f")
    message = str(error.value)
    assert message.startswith(f"score_mod {function.__qualname__!r} cannot be compiled: ")
    assert reason in message
    assert len(message) < 600
    assert "\n" not in message
    assert error.value.__cause__ is not None


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda b, h, i, j: 1.0, "True or False, got float64"),
        (lambda b, h, i, j: None, "True or False, got none"),
        (lambda b, h, i, j: i > undefined, "'undefined' is not defined"),  # type: ignore[name-defined]  # noqa: F821
    ],
)
def test_what_a_mask_mod_must_not_do(function: Callable[..., Any], reason: str) -> None:
    with pytest.raises(TypeError, match=r"mask_mod '.*<lambda>' cannot be compiled: ") as error:
        mask_pass(function, "f")
    assert reason in str(error.value)
