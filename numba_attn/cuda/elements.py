"""Elements of arrays as numbers: 16-bit ones are widened, and rounded to nearest even, by integer arithmetic.

Bits become a number, and a number bits, by a word of dynamic shared memory that each thread has to itself, seen as one
and as the other: no instruction is needed for that which the simulator does not have, and compilers see through it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from numba_attn.cuda.arguments import REALS
from numba_attn.storage import BLOCKS, GROUP, MIDDLE, TOGETHER


def device(cuda: Any) -> Callable[[Any], Any]:
    """The decorator of functions that become part of the kernel that calls them."""
    return cuda.jit(device=True, inline="always")


def make_load(cuda: Any, kind: str, real: type[np.floating]) -> Any:
    """A device function (array, at, words, floats, thread) -> element `at` of an array of that kind, as a `real`."""
    beyond = np.float32(2.0**112)  # what the exponents of float16 lack to those of float32

    if kind == "bfloat16":

        @device(cuda)
        def load_bfloat16(array, at, words, floats, thread):
            words[thread] = np.int64(array[at]) << 16
            return real(floats[thread])

        return load_bfloat16
    if kind == "float16":

        @device(cuda)
        def load_float16(array, at, words, floats, thread):
            bits = np.int64(array[at])
            magnitude = bits & 0x7FFF
            finite = magnitude < 0x7C00
            words[thread] = (bits & 0x8000) << 16 | magnitude << 13 | (0 if finite else 0x7F800000)
            x = floats[thread]
            return real(x * beyond if finite else x)

        return load_float16

    @device(cuda)
    def load_as_it_is(array, at, words, floats, thread):
        return real(array[at])

    return load_as_it_is


def make_load_held(cuda: Any, held: str, real: type[np.floating]) -> Any:
    """A device function (array, row, column, stride, size, words, floats, thread) -> a number of a key or value.

    It is that of a column of the row that starts at `row`, of `size` numbers, held as one of REALS or of QUANTIZED, see
    `numba_attn.storage`.  The stride is from column to column, of the latter from byte to byte.
    """
    load = make_load(cuda, held, real)

    @device(cuda)
    def scale_at(array, at, stride, words, floats, thread):
        low, high = np.int64(array[at]) | np.int64(array[at + stride]) << 8, at + 2 * stride
        words[thread] = low | np.int64(array[high]) << 16 | np.int64(array[high + stride]) << 24
        return floats[thread]

    if held == "int8":

        @device(cuda)
        def load_int8(array, row, column, stride, size, words, floats, thread):
            steps = np.int64(array[row + column * stride])
            scales = (size + GROUP - 1) // GROUP * GROUP
            scale = scale_at(array, row + scales * stride, stride, words, floats, thread)
            return real(np.float32(steps - 256 if steps > 127 else steps) * scale)

        return load_int8
    if held == "int4":
        half = GROUP // 2

        @device(cuda)
        def load_int4(array, row, column, stride, size, words, floats, thread):
            group, place = column // GROUP, column % GROUP
            pair = np.int64(array[row + (group * half + place % half) * stride])
            n = pair >> 4 if place >= half else pair & 15
            codes = (size + GROUP - 1) // GROUP * half
            code = np.int64(array[row + (codes + column // TOGETHER * BLOCKS + column % BLOCKS) * stride])
            scales = codes + (size + TOGETHER - 1) // TOGETHER * BLOCKS
            scale = scale_at(array, row + scales * stride, stride, words, floats, thread)
            return real(np.float32((code >> 3) * (2 * n + (code & 7) - MIDDLE)) * scale)

        return load_int4

    @device(cuda)
    def load_number(array, row, column, stride, size, words, floats, thread):
        return load(array, row + column * stride, words, floats, thread)

    return load_number


def make_store(cuda: Any, kind: str) -> Any:
    """A device function (array, at, x, words, floats, thread) that writes a number to an array of that kind."""
    half = np.float32(0.5)
    real = REALS[kind]

    if kind == "bfloat16":

        @device(cuda)
        def store_bfloat16(array, at, x, words, floats, thread):
            floats[thread] = x
            bits = np.int64(words[thread])
            if bits & 0x7FFFFFFF > 0x7F800000:
                array[at] = 0x7FC0
            else:
                array[at] = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16

        return store_bfloat16
    if kind == "float16":

        @device(cuda)
        def store_float16(array, at, x, words, floats, thread):
            floats[thread] = x
            bits = np.int64(words[thread])
            sign, magnitude = bits >> 16 & 0x8000, bits & 0x7FFFFFFF
            if magnitude > 0x7F800000:
                rounded = 0x7E00
            elif magnitude >= 0x477FF000:  # half a step beyond the largest number
                rounded = 0x7C00
            elif magnitude >= 0x38800000:  # the smallest number with a whole mantissa
                rounded = (magnitude + 0xFFF + (magnitude >> 13 & 1) - 0x38000000) >> 13
            else:
                # One half has the steps of these numbers: adding it rounds.
                words[thread] = magnitude
                floats[thread] = floats[thread] + half
                rounded = np.int64(words[thread]) - 0x3F000000
            array[at] = sign | rounded

        return store_float16

    @device(cuda)
    def store_number(array, at, x, words, floats, thread):
        array[at] = real(x)

    return store_number
