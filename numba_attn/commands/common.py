"""What several commands need: their errors, arrays and options, and what is installed."""

from __future__ import annotations

import argparse
import importlib.util
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

REQUIRED = ("query", "key", "value")
ARRAYS = (*REQUIRED, "attn_mask", "kv_lengths", "query_lengths", "query_offset", "alibi_slopes", "sinks")
AUX_NAMES = ("lse", "max_score", "entropy", "key_weight")
NO_CACHE = "none: no directory is writable (NUMBA_CACHE_DIR names another), so each process compiles kernels anew"


class CommandError(Exception):
    """Something that the user can put right: one line on stderr, no traceback."""


def arrays_of(arrays: dict[str, np.ndarray], options: argparse.Namespace) -> dict[str, Any]:
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


def keywords(options: argparse.Namespace) -> dict[str, Any]:
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


def check_output(options: argparse.Namespace) -> None:
    """The output must not take the place of the input, which may be all that there is of it."""
    if options.output.exists() and options.output.samefile(options.input):
        raise CommandError(f"-o must not be the input, got {options.output}")


def need_matplotlib(option: str) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise CommandError(f"{option} needs matplotlib: pip install 'numba_attn[plot]'")


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
