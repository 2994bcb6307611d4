"""`numba-attn run`: attention of the arrays in a file."""

from __future__ import annotations

import argparse
import inspect
import json
import time
from typing import Any

from numba_attn.commands.common import CommandError, arrays_of, check_output, keywords
from numba_attn.commands.pieces import flop_of, pieces_of
from numba_attn.commands.progress import Progress


def run(options: argparse.Namespace) -> int:
    from numpy import savez

    from numba_attn import dispatch
    from numba_attn.api import scaled_dot_product_attention
    from numba_attn.commands import npz
    from numba_attn.problem import Problem

    check_output(options)
    try:
        arrays = arrays_of(npz.load(options.input), options)
        call = inspect.signature(scaled_dot_product_attention).bind(
            **arrays,
            **keywords(options),
            dropout_p=options.dropout_p,
            dropout_seed=options.dropout_seed,
            return_aux=tuple(options.aux),
        )
        call.apply_defaults()
        forward = dispatch.forward(call.arguments.pop("backend"))
        problem = Problem.from_call(**call.arguments)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise CommandError(str(error)) from error

    with npz.replacing(options.output) as file, Progress("attention") as progress:
        # NumPy's products, unlike the kernels, round a row differently with the number of rows beside it.
        pieces = pieces_of(problem, rows=options.backend != "reference") if progress.wanted else iter([problem])
        flop, done = flop_of(problem), 0
        start = time.perf_counter()
        for piece in pieces:
            forward(piece)
            done += flop_of(piece) if progress.wanted else flop
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
