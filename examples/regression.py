"""Training without a framework: gradient descent through a multi-head layer, in NumPy.

    python examples/regression.py

Sequences of random numbers have one token that is marked.  Every row is to give the numbers of that token, so the layer
has to learn where to look and what to take from there.  It begins with random weights, and each step subtracts the
gradient of the mean squared error on new sequences, which `MultiHeadAttention.vjp` takes back through the output
projection, attention and the input projections.  The error is at first about 1, the variance of the numbers, and has to
fall below a ten-thousandth.  What it has learnt is then measured on sequences that it has not seen.

As a module: `train(layer, rng, target)` gives the losses of the steps.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

import numba_attn

MARK = 2.0


class Batch(NamedTuple):
    """Sequences, and what is to be made of them."""

    x: np.ndarray  # (B, L, width): numbers, and in the last place whether the token is marked
    y: np.ndarray  # (B, L, width): in every row the numbers of the marked token
    marked: np.ndarray  # (B,)


def draw(rng: np.random.Generator, B: int, L: int, width: int) -> Batch:
    x = rng.standard_normal((B, L, width), dtype=np.float32)
    marked, sequences = rng.integers(0, L, B), np.arange(B)
    x[..., -1] = 0
    y = np.repeat(x[sequences, marked][:, None], L, axis=1)
    x[sequences, marked, -1] = MARK
    return Batch(x, y, marked)


def train(
    layer: numba_attn.MultiHeadAttention,
    rng: np.random.Generator,
    target: float,
    *,
    rate: float = 1.0,
    most_steps: int = 2000,
    batch: int = 32,
    length: int = 16,
    progress: Callable[[int, list[float]], None] | None = None,
) -> list[float]:
    """The losses of steps of gradient descent, each on new sequences, until one is below the target."""
    losses: list[float] = []
    while len(losses) < most_steps and not (losses and losses[-1] < target):
        x, y, _ = draw(rng, batch, length, layer.sizes.widths[0])
        out, vjp = layer.vjp(x)
        error = out - y
        losses.append(float(np.mean(error * error)))
        _, gradients = vjp(2 / error.size * error)
        for name, parameter in layer.parameters.items():
            parameter -= rate * gradients[name]
        if progress is not None:
            progress(len(losses), losses)
    return losses


def weight_on_the_mark(layer: numba_attn.MultiHeadAttention, batch: Batch) -> np.ndarray:
    """(Hq,): the probability that rows give to the marked token, on average, of each head."""
    query, key, _ = layer.project(batch.x)
    weights = numba_attn.attention_weights(query, key, layout="BLHD", enable_gqa=True)
    return weights[np.arange(len(batch.x)), :, :, batch.marked].mean(axis=(0, 2))


def show_progress(target: float) -> Callable[[int, list[float]], None]:
    """A bar on the terminal: how far the logarithm of the loss has come."""

    def show(step: int, losses: list[float]) -> None:
        done = np.log(losses[0] / losses[-1]) / np.log(losses[0] / target) if losses[0] > target else 1.0
        bar = f"{'#' * int(40 * min(max(done, 0), 1)):40}"
        sys.stderr.write(f"\r[{bar}] step {step}, loss {losses[-1]:.4f} " if losses[-1] > target else "\r\033[K")
        sys.stderr.flush()

    return show


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train a multi-head layer by gradient descent, in NumPy.")
    parser.add_argument("--width", type=int, default=8, help="of the tokens (%(default)s)")
    parser.add_argument("--heads", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--target", type=float, default=0.0001, help="loss to be reached (%(default)s)")
    parser.add_argument("--rate", type=float, default=1.0, help="of the descent (%(default)s)")
    parser.add_argument("--steps", type=int, default=2000, help="at most (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and sequences (%(default)s)")
    options = parser.parse_args(arguments)
    if options.width < 2 or options.steps < 1 or not options.target > 0 or not options.rate > 0:
        parser.error("width must be 2 or more, steps 1 or more, target and rate positive")
    rng = np.random.default_rng(options.seed)
    try:
        layer = numba_attn.MultiHeadAttention.init(rng, options.width, options.heads)
    except ValueError as error:
        parser.error(str(error))

    unseen = draw(np.random.default_rng(options.seed + 1), 200, 16, options.width)
    before = weight_on_the_mark(layer, unseen)
    start = time.perf_counter()
    progress = show_progress(options.target) if sys.stderr.isatty() else None
    losses = train(layer, rng, options.target, rate=options.rate, most_steps=options.steps, progress=progress)
    seconds = time.perf_counter() - start
    if not losses[-1] < options.target:
        sys.exit(f"after {len(losses)} steps the loss is {losses[-1]:.4g}, not below {options.target}")
    after, error = weight_on_the_mark(layer, unseen), layer(unseen.x) - unseen.y
    print(f"loss {losses[0]:.3f} to {losses[-1]:.5f} in {len(losses)} steps, {seconds:.1f} s")
    print(f"on sequences not seen: loss {np.mean(error * error):.5f}")
    for head, (first, last) in enumerate(zip(before, after, strict=True)):
        print(f"head {head}: weight on the marked token {first:.1%} before, {last:.1%} after")


if __name__ == "__main__":
    # BLAS and Numba take turns here, and each has its own threads.  Those of OpenMP, if Numba uses it, would spin for
    # milliseconds after a kernel on the cores that the next product needs.  This is read before the first kernel.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
