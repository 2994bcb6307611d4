"""A bar that says how far long work is."""

from __future__ import annotations

import sys
import time


class Progress:
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

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._width:
            print(f"\r{'':<{self._width}}\r", end="", file=sys.stderr, flush=True)
