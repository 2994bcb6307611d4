"""Arrays that are large, or seem so, or end where memory does: offsets of more than 32 bits, files, guarded pages."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import SIXTEEN_BITS
from tolerances import same_bits

from numba_attn import random, scaled_dot_product_attention
from numba_attn.block_mask import EMPTY, FULL, PARTIAL, BlockMask

# Keys before the SPAN that are attended to: more of them than 31 bits can count, and few.  They are multiples of every
# size of key tiles, so that the bits of the results are the same.
FAR, NEAR, SPAN = 576 << 22, 576, 50
ROWS = 6
TESTS = Path(__file__).parent
EVERY_DTYPE = ["float32", "float64", *SIXTEEN_BITS]


def empty_bytes(count: int) -> np.ndarray:
    """Address space, of which only what is used becomes memory."""
    try:
        return np.empty(count, np.uint8)
    except MemoryError:
        pytest.skip(f"{count / 2**30:.1f} GiB of address space are not to be had")


# More elements than 31 bits can count ---------------------------------------------------------------------------------


def rows_of_bytes(tail: np.ndarray, before: int, dtype: str, columns: int) -> np.ndarray:
    """(2, 2, before + SPAN, columns) of numbers that begin one byte after the other, and begin and end with `tail`."""
    room = empty_bytes(before + tail.size)
    room[: tail.size] = room[-tail.size :] = tail
    shape = 2, 2, before + SPAN, columns
    room.flags.writeable = False
    return np.ndarray(shape, dtype, room, strides=(0, 0, 1, 1))


def far_and_near(dtype: str = "float32", **options: Callable[[int], Any]) -> None:
    """Attending to the SPAN keys after FAR others gives the bits of attending to them after NEAR others.

    Options are functions of how many keys are before.
    """
    rng = np.random.default_rng(0)
    query = rng.standard_normal((2, 4, ROWS, 8)).astype(dtype)
    tail = rng.integers(0x36, 0x40, SPAN + 8 + 8, dtype=np.uint8)  # in any order the bytes of small numbers
    results = []
    for before in (NEAR, FAR):
        key, value = (rows_of_bytes(tail, before, dtype, columns) for columns in (8, 5))
        mine = {"query_offset": before + SPAN - 9, "window": (SPAN - 15, 3)}
        mine |= {name: option(before) for name, option in options.items()}
        results.append(
            scaled_dot_product_attention(
                query, key, value, enable_gqa=True, return_aux=("lse", "max_score", "entropy"), **mine
            )
        )
    assert same_bits(*results)
    assert np.isfinite(results[0][1].lse).any()


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_far_keys(dtype: str) -> None:
    far_and_near(dtype)


def test_far_keys_by_lengths() -> None:
    lengths: dict[str, Any] = {"kv_lengths": lambda before: [before + SPAN - 2, before + SPAN - 7]}
    far_and_near(query_offset=lambda _: "bottom_right", query_lengths=lambda _: [ROWS, ROWS - 2], **lengths)
    far_and_near(kv_lengths=lambda _: [30, 7], query_offset=lambda _: 0, window=lambda _: None)


@pytest.mark.parametrize("dtype", ["bool", "float16", "float64"])
def test_far_part_of_a_mask(dtype: str) -> None:
    tail = np.random.default_rng(1).integers(0, 2, SPAN + 8, dtype=np.uint8) * 0x3F

    def mask(before: int) -> np.ndarray:
        room = empty_bytes(before + tail.size)
        room[-tail.size :] = tail
        return np.ndarray((ROWS, before + SPAN), dtype, room, strides=(1 if dtype == "float16" else 0, 1))

    far_and_near(attn_mask=mask)


def test_far_keys_in_other_options() -> None:
    """User functions get indices of 64 bits, and what block masks say of the far tiles is found."""
    near = np.random.default_rng(2).standard_normal(SPAN + ROWS)

    def score_mod(before: int) -> Any:
        place = np.array([before])

        def mod(score: Any, b: int, h: int, i: int, j: int) -> Any:
            return score + near[j - place[0] + i]

        return mod

    def mask_mod(before: int) -> Any:
        def mod(b: int, h: int, i: int, j: int) -> bool:
            return (j + i) % 9 < 4 and (j + h) % 64 > 7

        return mod

    def block_mask(before: int) -> BlockMask:
        states = np.full((1, 1, 3, (before + SPAN + 15) // 16), EMPTY, np.uint8)
        states[0, 0, :, -4:] = [[FULL, EMPTY, PARTIAL, PARTIAL], [PARTIAL, FULL, EMPTY, FULL], [FULL] * 4]
        return BlockMask(mask_mod(before), (1, 1, ROWS, before + SPAN), (2, 16), states)

    far_and_near(score_mod=score_mod)
    far_and_near(mask_mod=mask_mod)
    far_and_near(block_mask=block_mask)
    far_and_near(alibi_slopes=lambda _: np.linspace(-1, 1, 4), sinks=lambda _: np.ones(4), softcap=lambda _: 2.0)


def test_dropout_of_far_keys() -> None:
    """Each row attends to one key, so that it is 0 where that is dropped."""
    rows, p, seed = 64, 0.5, 9
    far = np.broadcast_to(np.float32(1), (2, 2, FAR + rows, 1))
    query = np.zeros((2, 2, rows, 1), np.float32)
    options = {"query_offset": FAR, "window": (0, 0), "dropout_p": p, "dropout_seed": seed}
    out = scaled_dot_product_attention(query, far, far, **options)[..., 0]
    b, h, i = np.indices(out.shape)
    words = random.philox(np.stack([(FAR + i) // 4, i, h, b], axis=-1), seed)
    expected = np.take_along_axis(words, (i % 4)[..., None], axis=-1)[..., 0] >= random.threshold(p)
    assert np.array_equal(out != 0, expected)


def test_more_scores_than_31_bits_can_count() -> None:
    """Of which nearly all are padding."""
    rng = np.random.default_rng(3)
    heads, Lk = 70_000, 40_000
    query = rng.standard_normal((3, 8), dtype=np.float32)
    key, value = (np.full((Lk, 8), np.nan, np.float32) for _ in range(2))
    key[:4], value[:4] = rng.standard_normal((2, 4, 8))
    expected = scaled_dot_product_attention(query, key[:4], value[:4])
    many = (np.broadcast_to(x, (heads, *x.shape)) for x in (query, key, value))
    out = scaled_dot_product_attention(*many, kv_lengths=4)
    assert same_bits(out, np.broadcast_to(expected, out.shape))


# Elements further apart than 31 bits can tell -------------------------------------------------------------------------


@pytest.mark.parametrize("step", [(1 << 31) + 64, (1 << 32) + 64, -(1 << 32) - 64])
@pytest.mark.parametrize("axis", range(4))
def test_strides_of_more_than_31_bits(axis: int, step: int) -> None:
    """Of each array in turn, the output too."""
    rng = np.random.default_rng(4)
    for dtype in ("float32", *SIXTEEN_BITS[:1]):
        arrays = [rng.standard_normal((2, 2, 2, 2)).astype(dtype) for _ in range(5)]
        expected = scaled_dot_product_attention(*arrays[:4])
        for number, x in enumerate(arrays):
            strides = list(x.strides)
            strides[axis] = abs(step)
            far = np.ndarray(x.shape, x.dtype, empty_bytes(abs(step) + x.nbytes), strides=strides)
            far = far if step > 0 else np.flip(far, axis)
            far[...] = x
            given = [*arrays[:number], far, *arrays[number + 1 :]]
            assert same_bits(scaled_dot_product_attention(*given[:4], out=given[4]), expected)


# Memory that is not there ---------------------------------------------------------------------------------------------


def test_large_file_that_is_read_only(tmp_path: Path) -> None:
    """Key and value of 24 MiB each, which come from the disk as they are needed, and stay there as they are."""
    rng = np.random.default_rng(5)
    key, value = rng.standard_normal((2, 2, 48 * 1024, 64), dtype=np.float32)
    query = rng.standard_normal((2, 3, 64), dtype=np.float32)
    path = tmp_path / "keys and values"
    path.write_bytes(key.tobytes() + value.tobytes())
    path.chmod(0o444)
    digest, modified = hashlib.sha256(path.read_bytes()).digest(), path.stat().st_mtime_ns
    mapped = np.memmap(path, np.float32, "r", shape=(2, *key.shape))
    expected = scaled_dot_product_attention(query, key, value)
    assert same_bits(scaled_dot_product_attention(query, mapped[0], mapped[1]), expected)
    with pytest.raises(ValueError, match="out must be writeable"):
        scaled_dot_product_attention(query, key, value, out=mapped[0, :, :3])
    assert hashlib.sha256(path.read_bytes()).digest() == digest and path.stat().st_mtime_ns == modified


# Puts every array between two pages that cannot be read, so that one byte too many ends the process.
GUARDED = """
import ctypes, itertools, mmap, sys
import numpy as np
from numpy.lib.stride_tricks import as_strided
from numba_attn import scaled_dot_product_attention
from cases import dtype_of
from tolerances import same_bits

protect = ctypes.CDLL(None).mprotect
protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
PAGE = mmap.PAGESIZE

def guarded(x, last):
    "The same numbers, at the end or at the beginning of what can be read."
    size = -(-x.nbytes // PAGE) * PAGE
    room = np.frombuffer(mmap.mmap(-1, size + 2 * PAGE), np.uint8)
    start = PAGE + (size - x.nbytes if last else 0)
    placed = room[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    placed[...] = x
    for page in (0, PAGE + size):
        assert protect(room.ctypes.data + page, PAGE, 0) == 0
    return placed

def padded(x, rows):
    "With so many more rows, which cannot be read."
    return as_strided(x, (x.shape[0] + rows, x.shape[1]), x.strides)

FORMS = (
    guarded,
    lambda x, last: guarded(x.T.copy(), last).T,
    lambda x, last: guarded(x[::-1, ::-1].copy(), last)[::-1, ::-1],
)
SIZES = [(1, 1, 1, 1), (3, 5, 7, 3), (17, 33, 16, 16), (5, 130, 64, 33), (50, 97, 24, 40), (200, 70, 33, 17)]
rng = np.random.default_rng(6)
for dtype, precision in [*((name, None) for name in sys.argv[1:]), ("float32", "bfloat16")]:
    for Lq, Lk, D, Dv in SIZES:
        arrays = [rng.standard_normal(shape).astype(dtype_of(dtype)) for shape in ((Lq, D), (Lk, D), (Lk, Dv))]
        masks = None, rng.random((Lq, Lk)) < 0.7, rng.standard_normal((Lq, Lk)).astype(dtype_of(dtype))
        for mask, form, last in itertools.product(masks, FORMS, (False, True)):
            expected = scaled_dot_product_attention(*arrays, mask, precision=precision)
            given = [form(x, last) for x in arrays]
            out = form(expected * 0, last)
            scaled_dot_product_attention(
                *given, None if mask is None else form(mask, last), precision=precision, out=out
            )
            assert same_bits(out, expected)
        expected = scaled_dot_product_attention(*arrays, precision=precision)
        given = [padded(guarded(x, True), rows) for x, rows in zip(arrays, (7, 9, 9))]
        lengths = {"query_lengths": Lq, "kv_lengths": Lk}
        out = scaled_dot_product_attention(*given, precision=precision, **lengths)
        assert same_bits(out[:Lq], expected) and not out[Lq:].any()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no mprotect")
def test_no_byte_beyond_an_array_is_read(python: Callable[..., str]) -> None:
    """Nor one of the padding; the last rows may end where memory does."""
    python(GUARDED, *EVERY_DTYPE, PYTHONPATH=os.pathsep.join([str(TESTS.parent), str(TESTS)]))
