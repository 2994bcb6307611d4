"""The command line, `python -m numba_attn` or `numba-attn`: info, run, inspect, bench, warmup.

Nothing but the standard library is imported before a command needs it.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numba_attn

if TYPE_CHECKING:
    import numpy as np

    from numba_attn.problem import Problem

Command = Callable[[argparse.Namespace], int]

REQUIRED = ("query", "key", "value")
ARRAYS = (*REQUIRED, "attn_mask", "kv_lengths", "query_lengths", "query_offset", "alibi_slopes", "sinks")
AUX_NAMES = ("lse", "max_score", "entropy", "key_weight")
NO_CACHE = "none: no directory is writable (NUMBA_CACHE_DIR names another), so each process compiles kernels anew"


class CommandError(Exception):
    """Something that the user can put right: one line on stderr, no traceback."""


# info -----------------------------------------------------------------------------------------------------------------

# Instruction-set features that decide how fast attention is.
FEATURES = ("avx2", "fma", "avx512f", "avx512bf16", "avx512fp16", "avx512vnni", "amx-bf16", "neon", "bf16", "sve")
BFLOAT16_PRODUCTS = {
    "amx": "products by AMX tiles",
    "dot": "products by AVX-512 dot products",
    "widened": "products as float32, no others are faster here",
}
BACKENDS = {
    "cpu": "numba and llvmlite",
    "cuda": "an NVIDIA GPU with its driver, and numba-cuda",
    "reference": "numpy",
}


def _info(options: argparse.Namespace) -> int:
    info = environment()
    if options.json:
        print(json.dumps(info, indent=2))
        return 0
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in info["versions"].items())
    lines = {"versions": versions, "platform": info["platform"]}
    if info["kernels"] is not None:
        cpu, kernels, threads = info["cpu"], info["kernels"], info["threads"]
        tiles = ", ".join(f"{rows[0]} x {vectors}" for vectors, rows in kernels["register_tiles"].items())
        lines["cpu"] = f"{cpu['name']}, as Numba compiles for it: {' '.join(cpu['features']) or 'no vector features'}"
        lines["kernels"] = f"{kernels['isa']}, {kernels['vector_bytes']}-byte vectors, register tiles {tiles} vectors"
        lines["bfloat16"] = BFLOAT16_PRODUCTS[kernels["bfloat16_products"]]
        lines["threads"] = f"{threads['count']}, threading layer {threads['layer']}"
        lines["cache"] = info["cache"] or NO_CACHE
    for name, backend in info["backends"].items():
        state = "available" if backend["available"] else f"not available: {backend['reason']}; needs {backend['needs']}"
        lines[f"backend {name}"] = state
    for name, text in lines.items():
        print(f"{name:<18}{text}")
    return 0


def environment() -> dict[str, Any]:
    """What decides which code runs here and how fast; what cannot be told without a package that is missing is None."""
    info: dict[str, Any] = {
        "versions": {
            "numba_attn": numba_attn.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in ("numba", "llvmlite", "numpy", "ml_dtypes", "onnx")},
        },
        "platform": platform.platform(),
        "cpu": None,
        "kernels": None,
        "threads": None,
        "cache": None,
        "backends": {name: _availability(name) for name in BACKENDS},
    }
    try:
        from numba_attn import threads
        from numba_attn.cpu import cache, plan, target
    except ImportError:
        return info  # the reason is that of the cpu backend
    compiled_for = target.FEATURES.split(",")
    directory = cache.directory()
    info["cpu"] = {"name": target.NAME, "features": [name for name in FEATURES if f"+{name}" in compiled_for]}
    info["kernels"] = {
        "isa": target.ISA,
        "vector_bytes": target.VECTOR_BYTES,
        "register_tiles": {str(vectors): list(rows) for vectors, rows in plan.HEIGHTS.items()},
        "widest": plan.WIDEST,
        "bfloat16_products": target.BFLOAT16,
    }
    info["threads"] = {"count": threads.count(), "layer": threads.layer()}
    info["cache"] = None if directory is None else str(directory)
    return info


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _availability(backend: str) -> dict[str, Any]:
    try:
        from numba_attn import dispatch

        dispatch.forward(backend)
    except (ImportError, NotImplementedError) as error:
        return {"available": False, "reason": str(error), "needs": BACKENDS[backend]}
    return {"available": True}


# run ------------------------------------------------------------------------------------------------------------------

PIECE_FLOP = 2e10  # a tenth of a second on a few cores: often enough for a bar, too rare to cost anything
WHOLE = ("dropout", "score_mod", "mask_mod", "block_mask", "key_weight")  # what keeps a problem in one piece
ROW_UNIT = 384  # a multiple of the query rows that any kernel takes at once, so that pieces leave no remainders


def _run(options: argparse.Namespace) -> int:
    from numpy import savez

    from numba_attn import _npz, dispatch
    from numba_attn.api import scaled_dot_product_attention
    from numba_attn.problem import Problem

    try:
        arrays = _arrays(_npz.load(options.input), options)
        call = inspect.signature(scaled_dot_product_attention).bind(
            **arrays,
            **_keywords(options),
            dropout_p=options.dropout_p,
            dropout_seed=options.dropout_seed,
            return_aux=tuple(options.aux),
        )
        call.apply_defaults()
        forward = dispatch.forward(call.arguments.pop("backend"))
        problem = Problem.from_call(**call.arguments)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise CommandError(str(error)) from error

    with _npz.replacing(options.output) as file, _Progress("attention") as progress:
        # NumPy's products, unlike the kernels, round a row differently with the number of rows beside it.
        pieces = _pieces(problem, rows=options.backend != "reference") if progress.wanted else iter([problem])
        flop, done = _flop(problem), 0
        start = time.perf_counter()
        for piece in pieces:
            forward(piece)
            done += _flop(piece) if progress.wanted else flop
            progress(done / flop if flop else 1.0)
        seconds = time.perf_counter() - start
        results: dict[str, Any] = {"out": problem.result}
        if problem.aux is not None:
            results |= {name: x for name, x in problem.aux._asdict().items() if x is not None}
        savez(file, **results)

    summary = {
        "input": str(options.input),
        "output": str(options.output),
        "backend": options.backend,
        "dtype": str(problem.result.dtype),
        "shapes": {name: list(x.shape) for name, x in {**arrays, **results}.items() if hasattr(x, "shape")},
        "seconds": seconds,
        "flop": flop,
        "gflops": flop / seconds / 1e9 if flop else 0.0,
        "dropout_seed": None if problem.dropout is None else problem.dropout.seed,
    }
    if options.json:
        print(json.dumps(summary, indent=2))
    else:
        names = " and ".join(f"{name} {x.shape}" for name, x in results.items())
        print(f"{options.output}: {names}, {summary['dtype']}, {seconds:.3g} s, {summary['gflops']:.3g} GFLOP/s")
    return 0


def _arrays(arrays: dict[str, np.ndarray], options: argparse.Namespace) -> dict[str, Any]:
    """What the archive and --query-offset give, checked by name."""
    if missing := [name for name in REQUIRED if name not in arrays]:
        raise CommandError(f"{options.input} has no {', '.join(missing)}; it has {', '.join(arrays) or 'nothing'}")
    if unknown := [name for name in arrays if name not in ARRAYS]:
        raise CommandError(f"{options.input}: unknown {', '.join(unknown)}; known are {', '.join(ARRAYS)}")
    if options.query_offset is None:
        return dict(arrays)
    if "query_offset" in arrays:
        raise CommandError(f"{options.input} has a query_offset: it cannot be combined with --query-offset")
    return {**arrays, "query_offset": options.query_offset}


def _keywords(options: argparse.Namespace) -> dict[str, Any]:
    """What run and inspect have in common, by the names of the function."""
    return {
        "is_causal": options.causal,
        "scale": options.scale,
        "enable_gqa": options.gqa,
        "window": options.window,
        "softcap": options.softcap,
        "layout": options.layout,
        "backend": options.backend,
        "precision": options.precision,
    }


def _flop(problem: Problem) -> int:
    """Of the two products, counting the pairs of query and key that causal, window and lengths leave."""
    Hq, Lq, D = problem.query.shape[-3:]
    bounds = (problem.intervals.bounds(b, Lq) for b in range(len(problem.intervals.table)))
    pairs = sum(int((high - low).sum()) for low, high in bounds)
    return int(2 * Hq * pairs * (D + problem.value.shape[-1]))


def _pieces(problem: Problem, rows: bool) -> Iterator[Problem]:
    """Problems of at most PIECE_FLOP, as far as it can be cut, that write their parts of the results of `problem`.

    It is halved along the first axis that has two units: sequences, key-value heads with the query heads that share
    them, query heads if they share one, and, if `rows`, blocks of query rows.  What depends on which sequence, head or
    row it is by number, or is a sum over rows, is not cut.
    """
    if any(getattr(problem, name) is not None for name in WHOLE):
        yield problem
        return
    Hq, Hkv, rank = problem.query.shape[-3], problem.key.shape[-3], problem.query.ndim
    rows = rows and not problem.intervals.padded  # of which a few may be left of some sequence
    units = [1] * (rank - 3) + [Hq // Hkv if Hkv > 1 else 1] + [ROW_UNIT] * rows
    if _flop(problem) > PIECE_FLOP:
        for axis, unit in enumerate(units):
            length = problem.query.shape[axis]
            middle = (length // unit + 1) // 2 * unit
            # A remainder of few rows would be computed in another way than the whole.
            if 0 < middle <= length - unit:
                yield from _pieces(_part(problem, axis, 0, middle), rows)
                yield from _pieces(_part(problem, axis, middle, length), rows)
                return
    yield problem


def _part(problem: Problem, axis: int, start: int, stop: int) -> Problem:
    """The problem of some sequences, query heads or query rows alone; `axis` is one of the query's."""
    heads = problem.query.ndim - 3

    def part(x: np.ndarray, start: int = start, stop: int = stop) -> np.ndarray:
        return x if x.shape[axis] == 1 else x[(slice(None),) * axis + (slice(start, stop),)]

    key, value, intervals, slopes, sinks = problem.key, problem.value, problem.intervals, problem.slopes, problem.sinks
    if axis < heads:
        batch = problem.query.shape[:heads]
        key, value = part(key), part(value)
        table = part(intervals.table.reshape(*batch, 3))
        intervals = replace(intervals, table=table.reshape(-1, 3))
        if slopes is not None and len(slopes) > 1:
            slopes = part(slopes.reshape(*batch, slopes.shape[1])).reshape(-1, slopes.shape[1])
    elif axis == heads:
        group = problem.query.shape[axis] // key.shape[axis]
        key, value = (part(x, start // group, stop // group) for x in (key, value))
        slopes, sinks = (None if x is None else x[..., start:stop] for x in (slopes, sinks))
    else:
        table = intervals.table.copy()
        table[:, 0] += start
        table[:, 1] = (table[:, 1] - start).clip(0, stop - start)
        intervals = replace(intervals, table=table)
    statistics: dict[str, Any] = {name: part(x) for name in AUX_NAMES if (x := getattr(problem, name)) is not None}
    return replace(
        problem,
        query=part(problem.query),
        key=key,
        value=value,
        mask=None if problem.mask is None else part(problem.mask),
        intervals=intervals,
        slopes=slopes,
        sinks=sinks,
        out=part(problem.out),
        **statistics,
    )


# inspect --------------------------------------------------------------------------------------------------------------

PICTURES = (".png", ".pdf", ".svg")
DPI = (10, 1200)  # with less, letters are too small for FreeType; with more, a picture takes gigabytes


def _inspect(options: argparse.Namespace) -> int:
    from numba_attn import _npz, plot
    from numba_attn.diagnostics import diagnose

    if options.output and options.output.suffix not in PICTURES:
        raise CommandError(f"-o must end with one of {', '.join(PICTURES)}, got {options.output}")
    if not DPI[0] <= options.dpi <= DPI[1]:
        raise CommandError(f"--dpi must be between {DPI[0]} and {DPI[1]}, got {options.dpi}")
    if options.output and importlib.util.find_spec("matplotlib") is None:
        raise CommandError("-o needs matplotlib: pip install 'numba_attn[plot]'")
    try:
        loaded = _npz.load(options.input)
        tokens: Any = loaded.pop("tokens", None)
        call = {**_arrays(loaded, options), **_keywords(options)}
        report = diagnose(**call, key_weight=options.key_weight)
        if options.output:
            choice = {"query_rows": options.rows, "heads": options.heads, "sequence": options.sequence}
            figure = plot.inspect(**call, report=report, tokens=tokens, **choice)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise CommandError(str(error)) from error
    if options.output:
        with _npz.replacing(options.output) as file:
            figure.savefig(file, format=options.output.suffix[1:], dpi=options.dpi)
    print(json.dumps(report.to_dict(), indent=2) if options.json else report)
    return 0


# bench and warmup -----------------------------------------------------------------------------------------------------


def _bench(options: argparse.Namespace) -> int:
    from numba_attn import _bench

    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise CommandError("--plot needs matplotlib: pip install 'numba_attn[plot]'")
    cases, rounds = (_bench.QUICK, 3) if options.quick else (_bench.CASES, 7)
    try:
        with _Progress("bench") as progress:
            report = _bench.compare(cases, rounds, progress)
    except _bench.PeerError as error:
        raise CommandError(str(error)) from error
    if options.json:
        peers = {peer: _version(peer) for peer in report["results"][0]["seconds"]}
        print(json.dumps({"environment": environment(), "peers": peers, **report}, indent=2))
    else:
        print(_bench.table(report))
        print("\nA short comparison; the full benchmark is perf/run.py in the source repository.")
    if options.plot:
        _bench.plot(report, options.plot)
    return 0


def _warmup(options: argparse.Namespace) -> int:
    from numba_attn.cpu import attention, cache, gradients, quantization, rotation

    start = time.perf_counter()
    names = (
        attention.warmup()
        + rotation.warmup()
        + quantization.warmup()
        + (gradients.warmup() if options.gradients else [])
    )
    seconds = time.perf_counter() - start
    directory = cache.directory()
    where = None if directory is None else str(directory)
    if options.json:
        print(json.dumps({"kernels": names, "seconds": seconds, "cache": where}, indent=2))
    else:
        print("\n".join(names))
        print(f"{len(names)} kernels compiled, or found compiled, in {seconds:.1f} s; cache: {where or NO_CACHE}")
    return 0


# The command line -----------------------------------------------------------------------------------------------------


class _Progress:
    """A bar on stderr, if that is a terminal, once the work has taken a second."""

    def __init__(self, label: str) -> None:
        self.wanted = sys.stderr.isatty()
        self._label = label
        self._start = time.monotonic()
        self._width = 0

    def __call__(self, fraction: float) -> None:
        elapsed = time.monotonic() - self._start
        if self.wanted and elapsed > 1 and fraction > 0:
            left = elapsed * (1 - fraction) / fraction
            line = f"{self._label} [{'#' * round(30 * fraction):<30}] {fraction:4.0%}, {left:.0f} s left"
            print(f"\r{line:<{self._width}}", end="", file=sys.stderr, flush=True)
            self._width = max(self._width, len(line))

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._width:
            print(f"\r{'':<{self._width}}\r", end="", file=sys.stderr, flush=True)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message} (see {self.prog} --help)")


def _side(text: str) -> int | None:
    return None if text == "none" else _integer_or("none", text)


def _offset(text: str) -> int | str:
    return text if text == "bottom_right" else _integer_or("bottom_right", text)


def _integer_or(word: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be an integer or {word}, got {text!r}") from None


def _add_keywords(command: argparse.ArgumentParser) -> None:
    """See `_keywords`."""
    command.add_argument("--causal", action="store_true", help="query row i attends to keys up to i + offset")
    command.add_argument("--scale", type=float, help="of the scores; default 1 / sqrt(head size)")
    command.add_argument("--gqa", action="store_true", help="allow more query heads than key-value heads")
    command.add_argument(
        "--window", type=_side, nargs=2, metavar=("LEFT", "RIGHT"), help="keys on either side; 'none' is unbounded"
    )
    command.add_argument("--query-offset", type=_offset, metavar="N|bottom_right", help="key position of query row 0")
    command.add_argument("--softcap", type=float, metavar="C", help="scores s become C * tanh(s / C)")
    command.add_argument("--layout", choices=("BHLD", "BLHD"), default="BHLD", help="heads before or after rows")
    command.add_argument("--backend", choices=tuple(BACKENDS), default="cpu", help="default cpu")
    command.add_argument("--precision", choices=("bfloat16",), help="of the products, where the processor has these")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="numba-attn", description="Attention for NumPy arrays, in Numba.")
    parser.add_argument("--version", action="version", version=f"numba_attn {numba_attn.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Command, text: str, more: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}. {more}")
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print JSON")
        return sub

    command("info", _info, "show versions, processor, threads, cache and backends")

    run = command(
        "run",
        _run,
        "compute attention of arrays in a file",
        f"IN.npz holds {', '.join(REQUIRED)} and optionally {', '.join(ARRAYS[3:])}. What numpy.savez wrote is mapped "
        "into memory, not read. OUT.npz gets out, and appears only when it is complete. Arrays of bfloat16 need "
        "ml_dtypes, and come back from numpy.load as two bytes an element.",
    )
    run.add_argument("input", type=Path, metavar="IN.npz")
    run.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.npz")
    _add_keywords(run)
    run.add_argument("--dropout-p", type=float, default=0.0, metavar="P", help="drop probabilities; default 0")
    run.add_argument("--dropout-seed", type=int, metavar="N", help="the same drops the same; default a fresh one")
    run.add_argument(
        "--aux", choices=AUX_NAMES, action="append", default=[], help="also write this statistic; more by --aux again"
    )
    run.add_argument("--lse", action="append_const", dest="aux", const="lse", help="the same as --aux lse")

    look = command(
        "inspect",
        _inspect,
        "say what each head does: entropy, saturation, spread of scores",
        "IN.npz is as for run, and may hold tokens, labels of the keys. The picture shows some rows of some heads, the "
        "entropy of all heads and the distribution of scores; it needs matplotlib.",
    )
    look.add_argument("input", type=Path, metavar="IN.npz")
    look.add_argument("-o", "--output", type=Path, metavar="REPORT.png", help="also draw a picture, png, pdf or svg")
    look.add_argument(
        "--rows", type=int, nargs="+", metavar="I", help="query rows of the picture; default a few of all"
    )
    look.add_argument("--heads", type=int, nargs="+", metavar="H", help="heads of the picture; default the first four")
    look.add_argument("--sequence", type=int, default=0, metavar="B", help="sequence of the picture; default 0")
    look.add_argument("--dpi", type=int, default=100, help="of the picture, 10 to 1200; default 100")
    look.add_argument("--key-weight", action="store_true", help="also find which keys have most of the weight")
    _add_keywords(look)

    bench = command(
        "bench",
        _bench,
        "compare speed with NumPy, PyTorch and ONNX Runtime, where installed",
        "Each runs in its own process with its default number of threads, in turns. "
        "The full benchmark is perf/run.py in the source repository.",
    )
    bench.add_argument("--quick", action="store_true", help="fewer shapes and repeats")
    bench.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw a bar chart (needs matplotlib)")

    warmup = command("warmup", _warmup, "compile every kernel and keep it in the cache")
    warmup.add_argument("--gradients", action="store_true", help="those of gradients too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0, 2 for bad input or usage, 130 if interrupted."""
    try:
        options = _parser().parse_args(argv)
        status: int = options.run(options)
        return status
    except CommandError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    except MemoryError as error:
        message = f"not enough memory: {error}"
    except KeyboardInterrupt:
        return 130
    print("numba-attn: error:", *message.split(), file=sys.stderr)
    return 2
