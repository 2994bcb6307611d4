"""The command line, `python -m numba_attn` or `numba-attn`: info, run, inspect, bench, warmup.

Nothing but the standard library is imported before a command needs it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import numba_attn
from numba_attn.commands import bench, info, inspect, run, warmup
from numba_attn.commands.common import ARRAYS, AUX_NAMES, REQUIRED, CommandError

Command = Callable[[argparse.Namespace], int]


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
    """What `commands.common.keywords` gathers."""
    command.add_argument("--causal", action="store_true", help="query row i attends to keys up to i + offset")
    command.add_argument("--scale", type=float, help="of the scores; default 1 / sqrt(head size)")
    command.add_argument("--gqa", action="store_true", help="allow more query heads than key-value heads")
    command.add_argument(
        "--window", type=_side, nargs=2, metavar=("LEFT", "RIGHT"), help="keys on either side; 'none' is unbounded"
    )
    command.add_argument("--query-offset", type=_offset, metavar="N|bottom_right", help="key position of query row 0")
    command.add_argument("--softcap", type=float, metavar="C", help="scores s become C * tanh(s / C)")
    command.add_argument("--layout", choices=("BHLD", "BLHD"), default="BHLD", help="heads before or after rows")
    command.add_argument("--backend", choices=tuple(info.BACKENDS), default="cpu", help="default cpu")
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

    command("info", info.run, "show versions, processor, threads, cache and backends")

    attend = command(
        "run",
        run.run,
        "compute attention of arrays in a file",
        f"IN.npz holds {', '.join(REQUIRED)} and optionally {', '.join(ARRAYS[3:])}. What numpy.savez wrote is mapped "
        "into memory, not read. OUT.npz gets out, and appears only when it is complete. Arrays of bfloat16 need "
        "ml_dtypes, and come back from numpy.load as two bytes an element.",
    )
    attend.add_argument("input", type=Path, metavar="IN.npz")
    attend.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.npz")
    _add_keywords(attend)
    attend.add_argument("--dropout-p", type=float, default=0.0, metavar="P", help="drop probabilities; default 0")
    attend.add_argument("--dropout-seed", type=int, metavar="N", help="the same drops the same; default a fresh one")
    attend.add_argument(
        "--aux", choices=AUX_NAMES, action="append", default=[], help="also write this statistic; more by --aux again"
    )
    attend.add_argument("--lse", action="append_const", dest="aux", const="lse", help="the same as --aux lse")

    look = command(
        "inspect",
        inspect.run,
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

    compare = command(
        "bench",
        bench.run,
        "compare speed with NumPy, PyTorch and ONNX Runtime, where installed",
        "Each runs in its own process with its default number of threads, in turns. "
        "The full benchmark is perf/run.py in the source repository.",
    )
    compare.add_argument("--quick", action="store_true", help="fewer shapes and repeats")
    compare.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw a bar chart (needs matplotlib)")

    ahead = command("warmup", warmup.run, "compile every kernel and keep it in the cache")
    ahead.add_argument("--gradients", action="store_true", help="those of gradients too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status: 0, 2 for bad input or usage, as a shell's 130 if interrupted, 141 if not read."""
    try:
        options = _parser().parse_args(argv)
        status: int = options.run(options)
        sys.stdout.flush()
        return status
    except CommandError as error:
        message = str(error)
    except BrokenPipeError:  # nobody reads on, as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python says so when it ends
        return 141
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    except MemoryError as error:
        message = f"not enough memory: {error}"
    except KeyboardInterrupt:
        return 130
    print("numba-attn: error:", *message.split(), file=sys.stderr)
    return 2
