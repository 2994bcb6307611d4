"""Which problems the tensor-core kernels compute, and how: from a `Problem` to launches of `flash` and `combine`."""

from __future__ import annotations

import functools
import math
import operator
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from numba_attn import random
from numba_attn.checks import is_bfloat16
from numba_attn.cuda.combine import Combination, make_combine
from numba_attn.cuda.flash import Configuration, make_flash
from numba_attn.cuda.flash_results import STATISTICS_BYTES, part_columns
from numba_attn.cuda.row_results import FAR, LOG2_E
from numba_attn.cuda.sequences import ADDRESSES, PARAMETERS
from numba_attn.problem import STATISTICS, Problem, Sizes

LARGEST_HEAD = 256
LEAST_SCALE = 2.0**-100  # of those by which the largest score can be found before it is scaled
LARGEST_CAP = 2.0**125  # far beyond most scores, and its reciprocal is none of those that a device takes for 0
CHUNK = 256  # keys of a part of few rows; of more rows, as many times more
FEW, SOME = 16, 64  # packed rows that are computed in parts
_TYPES, _IN_ORDER = tuple(PARAMETERS.values()), operator.itemgetter(*PARAMETERS)
_INT32 = 1 << 31
_POSITIONS = 1 << 30


class Where(NamedTuple):
    """The place of an array of a problem on the device."""

    address: int
    strides: tuple[int, ...]  # in bytes


class Launch(NamedTuple):
    """A kernel, what to compile it for, and how to start it."""

    make: Callable[..., Any]
    configuration: tuple[Any, ...]
    argument_types: tuple[str, ...]
    launch_bounds: tuple[int, int]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    arguments: tuple[int | float, ...]

    @property
    def addresses(self) -> tuple[str, ...]:
        """What the first arguments are the addresses of."""
        return ADDRESSES

    def words(self) -> np.ndarray:
        """The arguments in eight bytes each, of which the first are what the kernel takes: (n,) int64."""
        return np.frombuffer(_packing(self.argument_types).pack(*self.arguments), np.int64)


@functools.cache
def _packing(types: tuple[str, ...]) -> struct.Struct:
    return struct.Struct("<" + "".join("f4x" if kind == "float32" else "q" for kind in types))


class Tiling(NamedTuple):
    tiles: int
    row_warps: int
    key_warps: int
    keys: int
    stages: int


def supports(problem: Problem, cc: tuple[Any, ...], where: Callable[[str], Where] | None = None) -> str | None:
    """Why these kernels can not compute a problem on devices of a compute capability; None if they can.

    `where` says where the array of that name is; if not given, it is as far apart as that of the problem, and aligned.
    """
    D, Dv = problem.sizes[-2:]
    if cc[0] < 8:
        return f"compute capability {cc[0]}.{cc[1]} is below 8.0"
    if problem.query.dtype.itemsize != 2:
        return f"{problem.query.dtype} is not of 16 bits"
    for name, n in (("head size", D), ("value head size", Dv)):
        if not 0 < n <= LARGEST_HEAD:
            return f"{name} {n} is not between 1 and {LARGEST_HEAD}"
    for name in ("score_mod", "mask_mod", "block_mask", "key_weight"):
        if getattr(problem, name) is not None:
            return f"{name} is given"
    if problem.storage is not None and (problem.storage.numbers is not None or problem.storage.pages is not None):
        return "keys and values are quantised or in pages"
    return _layout(problem, where or (lambda name: Where(0, getattr(problem, name).strides)))


def _layout(problem: Problem, where: Callable[[str], Where]) -> str | None:
    """Why the arrays' places in memory are none for these kernels."""
    for name in ("query", "key", "value"):
        shape, (address, strides) = getattr(problem, name).shape, where(name)
        if shape[-1] > 1 and strides[-1] != 2:
            return f"elements of a row of {name} are not contiguous"
        between = [stride for stride, n in zip(strides[:-1], shape[:-1], strict=True) if n > 1]
        if address % 16 or any(stride % 16 for stride in between):
            return f"rows of {name} do not begin at multiples of 16 bytes"
        if abs(strides[-2]) >= _INT32:
            return f"rows of {name} are too far apart"
    for name in ("mask", "out", *STATISTICS):
        x = getattr(problem, name)
        if x is not None:
            address, strides = where(name)
            if any(n % x.dtype.itemsize for n in (address, *_used(x.shape, strides))):
                return f"elements of {name} are not at multiples of their size"
    if problem.mask is not None and abs(_used(problem.mask.shape, where("mask").strides)[-1]) >= _INT32:
        return "elements of a row of mask are too far apart"
    B, Hq, Hkv, Lq, Lk, _, _ = problem.sizes
    if len({where(name).strides for name in STATISTICS if getattr(problem, name) is not None}) > 1:
        return "statistics have different strides"
    if max(Lq * (Hq // max(Hkv, 1)), Lk) >= _POSITIONS or B * Hq * max(Lq, 1) * (Lk // CHUNK + 1) >= _INT32:
        return "it has too many rows or keys"
    if problem.slopes is not None and np.abs(problem.intervals.table[:, 0]).max(initial=0) >= _POSITIONS:
        return "positions of alibi_slopes are too large"
    return None


def launches(
    problem: Problem,
    cc: tuple[Any, ...],
    where: Callable[[str], Where],
    upload: Callable[[np.ndarray], int],
    scratch: Callable[[int], int],
    tiling: Callable[[int], Tiling] | None = None,
) -> list[Launch]:
    """The kernels that compute a problem that is supported, one after the other.

    `where` is the place of the array of that name on the device, `upload` copies a small array to it, `scratch` gives
    so many bytes of it.  `tiling`, of a number of rows, takes the place of what is chosen for the device.
    """
    B, Hq, Hkv, Lq, Lk, _, Dv = sizes = problem.sizes
    if B * Hq * Lq == 0:
        return []
    group = Hq // Hkv
    given = _arguments(problem, sizes, where, upload)
    rows = {length * group for _, length, _ in problem.intervals.table.tolist()}
    found: list[Launch] = []
    for fewest, most in ((-1, FEW), (FEW, SOME), (SOME, _INT32 - 1)):
        if not any(fewest < n <= most for n in rows):
            continue
        configuration = _configuration(problem, cc, most, tiling)
        arguments = {**given, "fewest": fewest, "most": most}
        if not configuration.split:
            arguments["blocks"] = -(-Lq * group // configuration.rows)
            grid = B * Hkv * arguments["blocks"]
            found.append(_launch(make_flash, configuration, configuration.shared_bytes, grid, arguments))
            continue
        arguments["chunk"] = max(CHUNK * configuration.rows // FEW, configuration.keys)
        arguments["blocks"] = blocks = max(1, -(-Lk // arguments["chunk"]))
        places = B * Hkv * blocks * configuration.rows
        arguments["parts"] = scratch(places * STATISTICS_BYTES)
        arguments["part_sums"] = scratch(places * 4 * part_columns(Dv))
        found.append(_launch(make_flash, configuration, configuration.shared_bytes, B * Hkv * blocks, arguments))
        combination = Combination(configuration.kind, Dv, configuration.rows, configuration.general)
        found.append(_launch(make_combine, combination, 0, B * Hq * Lq, arguments))
    return found


def _launch(
    make: Callable[..., Any],
    configuration: Configuration | Combination,
    shared_bytes: int,
    blocks: int,
    arguments: dict[str, Any],
) -> Launch:
    return Launch(
        make=make,
        configuration=tuple(configuration),
        argument_types=_TYPES,
        launch_bounds=(configuration.threads, 1),
        grid=(blocks, 1, 1),
        block=(configuration.threads, 1, 1),
        shared_bytes=shared_bytes,
        arguments=_IN_ORDER(arguments),
    )


# Configurations -------------------------------------------------------------------------------------------------------


def _configuration(
    problem: Problem, cc: tuple[Any, ...], rows: int, tiling: Callable[[int], Tiling] | None
) -> Configuration:
    D, Dv = problem.sizes[-2:]
    additive = problem.mask is not None and problem.mask.dtype != bool
    # Scaling can wait until after the largest score is known unless it changes their order or something follows it.
    positive = LEAST_SCALE <= problem.scale < 1 / LEAST_SCALE
    general = additive or problem.softcap is not None or problem.slopes is not None or not positive
    options: dict[str, Any] = {
        "mask": "" if problem.mask is None else kind_of(problem.mask.dtype),
        "general": general,
        "softcap": problem.softcap is not None,
        "alibi": problem.slopes is not None,
        "dropout": problem.dropout is not None,
        "entropy": problem.entropy is not None,
    }
    cut = choose(D, Dv, rows, cc, any(options.values())) if tiling is None else tiling(rows)
    return Configuration(kind_of(problem.query.dtype), D, Dv, *cut, split=rows <= SOME, **options)


def kind_of(dtype: Any) -> str:
    return "bfloat16" if is_bfloat16(dtype) else str(np.dtype(dtype).name)


def shared_limit(cc: tuple[Any, ...]) -> int:
    """Bytes of shared memory that a block may have.  NVIDIA, "CUDA C++ Programming Guide", table of capabilities."""
    return {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}.get(tuple(cc[:2]), 99) * 1024


@functools.lru_cache(maxsize=256)
def choose(D: int, Dv: int, rows: int, cc: tuple[Any, ...], options: bool) -> Tiling:
    """Tiles for a number of packed rows at most; options that take registers leave 16 rows to a warp, not 32.

    Keys of a tile depend on head sizes and device alone, so that no option changes a bit of what it does not concern.
    """
    size, limit = max(D, Dv), shared_limit(cc)
    if rows <= FEW:
        return _staged(Tiling(1, 1, 4, 64, 2), D, Dv, limit)
    if rows <= SOME:
        return _staged(Tiling(1, 4, 1, 32 if size > 128 and limit < 200 << 10 else 64, 2), D, Dv, limit)
    if size <= 128:
        if limit < 100 << 10 and size > 64:
            return Tiling(1, 4, 1, 64, 1)
        tiles = 1 if options else 2
        return _staged(Tiling(tiles, 8 // tiles, 1, 64, 2), D, Dv, limit // 2)
    return Tiling(1, 4, 1, 64 if limit > 200 << 10 else 32, 1)


def _staged(tiling: Tiling, D: int, Dv: int, limit: int) -> Tiling:
    """With one stage if two do not fit."""
    sample = Configuration("", D, Dv, *tiling, False, "", False, False, False, False, False)
    return tiling if sample.shared_bytes <= limit else tiling._replace(stages=1)


# Arguments ------------------------------------------------------------------------------------------------------------


def _arguments(
    problem: Problem, sizes: Sizes, where: Callable[[str], Where], upload: Callable[[np.ndarray], int]
) -> dict[str, Any]:
    """Those that do not depend on tiles, by name."""
    _, Hq, Hkv, Lq, Lk, _, Dv = sizes
    intervals, slopes, sinks = problem.intervals, problem.slopes, problem.sinks
    p, seed = problem.dropout or (0.0, 0)
    unit = min(max(problem.scale, LEAST_SCALE), 1 / LEAST_SCALE) * LOG2_E  # of other scales, nobody asks
    coarse = 2.0 ** math.frexp(unit)[1]
    names = "query", "key", "value", "mask", "out", *STATISTICS
    given = {name: where(name) for name in names if (x := getattr(problem, name)) is not None and x.size}
    strides = {name: _used(getattr(problem, name).shape, given[name].strides) for name in given}
    strides["statistic"] = next((strides[name] for name in STATISTICS if name in given), ())
    inner = {name: (0, 0, 0, *strides.get(name, ()))[-3:] for name in (*names[:5], "statistic")}
    inner["statistic"] = *inner["statistic"][1:], 0
    batch, table = _sequences(problem, sizes, {name: strides.get(name) or None for name in inner})

    return {
        **{name: given[name].address if name in given else 0 for name in names},
        "slopes": 0 if slopes is None else upload(slopes.astype(np.float32)),
        "sinks": 0 if sinks is None else upload(sinks.astype(np.float32)),
        "table": 0 if table is None else upload(table),
        "parts": 0,
        "part_sums": 0,
        **{f"{name}_batch": batch[name] for name in inner},
        **{f"{name}_head": inner[name][0] for name in inner},
        **{f"{name}_row": inner[name][1] for name in inner},
        **{f"{name}_column": inner[name][2] for name in ("mask", "out")},
        "slopes_batch": Hq if slopes is not None and len(slopes) > 1 else 0,
        "offset": int(intervals.table[0, 0]),
        "left": intervals.left,
        "right": intervals.right,
        "threshold": random.threshold(p),
        "heads": Hkv,
        "group": Hq // Hkv,
        "Lq": Lq,
        "Lk": Lk,
        "chunk": 0,
        "padded": int(problem.packed is None),
        "wide": int(Dv % 8 == 0 and _wide(*given["out"], problem.out.shape)),
        "seed_low": _signed(seed & 0xFFFFFFFF),
        "seed_high": _signed(seed >> 32),
        "scale": problem.scale,
        "unit": unit,
        "coarse": coarse,
        "limit": FAR / coarse,
        "cap": min(problem.softcap or 1.0, LARGEST_CAP),
        "gain": 1 / (1 - p),
    }


def _signed(word: int) -> int:
    return word - (word >> 31 << 32)


def _used(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides that are 0 along axes of length 1."""
    return tuple(0 if n == 1 else stride for n, stride in zip(shape, strides, strict=True))


def _sequences(
    problem: Problem, sizes: Sizes, strides: dict[str, tuple[int, ...] | None]
) -> tuple[dict[str, int], np.ndarray | None]:
    """Bytes from sequence to sequence in each array; or a table, if there is no such number or sequences differ."""
    batch = problem.query.shape[:-3]
    table = problem.intervals.table
    if problem.packed is not None:
        starts = dict.fromkeys(strides, problem.packed.query_starts[:-1])
        starts["key"] = starts["value"] = problem.packed.key_starts[:-1]
        places = [
            np.arange(sizes.B) * (step or (0,))[0] if name == "mask" else starts[name] * (step or (0, 0))[1]
            for name, step in strides.items()
        ]
        return dict.fromkeys(strides, 0), np.stack([*table.T, *places], axis=1).astype(np.int64)
    steps = {name: (step or (0,) * len(batch))[: len(batch)] for name, step in strides.items()}
    merged = {name: _merged(batch, step) for name, step in steps.items()}
    alike = [int(table[0, 0]), sizes.Lq, sizes.Lk]
    if None not in merged.values() and all(row == alike for row in table.tolist()):
        return {name: step or 0 for name, step in merged.items()}, None
    index = np.indices(batch or (1,)).reshape(max(len(batch), 1), -1)
    places = [np.array(step or (0,), np.int64) @ index for step in steps.values()]
    return dict.fromkeys(strides, 0), np.stack([*table.T, *places], axis=1).astype(np.int64)


def _merged(batch: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """The one stride of all axes of the batch together; None if there is none."""
    step, reach = 0, 1
    for n, stride in zip(batch[::-1], strides[::-1], strict=True):
        if n == 1:
            continue
        if reach == 1:
            step = stride
        elif stride != step * reach:
            return None
        reach *= n
    return step


def _wide(address: int, strides: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether rows of results can be written 16 bytes at a time."""
    return strides[-1] == 2 and address % 16 == 0 and not any(stride % 16 for stride in _used(shape, strides)[:-1])
