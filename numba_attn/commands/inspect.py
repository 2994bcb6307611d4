"""`numba-attn inspect`: what each head does, in words and in a picture."""

from __future__ import annotations

import argparse
import json
from typing import Any

from numba_attn.commands.common import CommandError, arrays_of, check_output, keywords, need_matplotlib

PICTURES = (".png", ".pdf", ".svg")
DPI = (10, 1200)  # with less, letters are too small for FreeType; with more, a picture takes gigabytes


def run(options: argparse.Namespace) -> int:
    from numba_attn import plot
    from numba_attn.commands import npz
    from numba_attn.diagnostics import diagnose

    if options.output and options.output.suffix not in PICTURES:
        raise CommandError(f"-o must end with one of {', '.join(PICTURES)}, got {options.output}")
    if not DPI[0] <= options.dpi <= DPI[1]:
        raise CommandError(f"--dpi must be between {DPI[0]} and {DPI[1]}, got {options.dpi}")
    if options.output:
        need_matplotlib("-o")
        check_output(options)
    try:
        loaded = npz.load(options.input)
        tokens: Any = loaded.pop("tokens", None)
        call = {**arrays_of(loaded, options), **keywords(options)}
        report = diagnose(**call, key_weight=options.key_weight)
        if options.output:
            choice = {"query_rows": options.rows, "heads": options.heads, "sequence": options.sequence}
            figure = plot.inspect(**call, report=report, tokens=tokens, **choice)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise CommandError(str(error)) from error
    if options.output:
        with npz.replacing(options.output) as file:
            figure.savefig(file, format=options.output.suffix[1:], dpi=options.dpi)
    print(json.dumps(report.to_dict(), indent=2) if options.json else report)
    return 0
