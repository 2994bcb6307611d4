"""`numba-attn bench`: a short comparison with what is installed."""

from __future__ import annotations

import argparse
import json

from numba_attn.commands.common import CommandError, need_matplotlib, version
from numba_attn.commands.info import environment
from numba_attn.commands.progress import Progress


def run(options: argparse.Namespace) -> int:
    from numba_attn.commands import comparison

    if options.plot:
        need_matplotlib("--plot")
    cases, rounds = (comparison.QUICK, 3) if options.quick else (comparison.CASES, 7)
    try:
        with Progress("bench") as progress:
            report = comparison.compare(cases, rounds, progress)
    except comparison.PeerError as error:
        raise CommandError(str(error)) from error
    if options.json:
        peers = {peer: version(peer) for peer in report["results"][0]["seconds"]}
        print(json.dumps({"environment": environment(), "peers": peers, **report}, indent=2))
    else:
        print(comparison.table(report))
        print("\nA short comparison; the full benchmark is perf/run.py in the source repository.")
    if options.plot:
        comparison.plot(report, options.plot)
    return 0
