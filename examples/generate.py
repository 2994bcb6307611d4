"""Autoregressive decoding with a key-value cache: a model of Llama's shape, with random weights, in NumPy.

    python examples/generate.py --layers 8 --width 512 --heads 8 --steps 128

RMS normalisation, rotary positions, grouped-query attention, SwiGLU: everything of such a model is here but its
training, so what it writes means nothing, and how fast it writes does.  First the same tokens go through it in one
piece and one at a time, which must agree; then it continues a prompt, with a cache of float32, one of bfloat16 (with
`ml_dtypes` installed) and one of integers of 8 bits.

As a module: `generate(Model(Shape(layers=2)), prompt, steps)` gives the tokens and how long they took.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

import numba_attn

EPSILON = np.float32(1e-5)


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    layers: int = 4
    width: int = 256
    heads: int = 8
    kv_heads: int = 2
    vocabulary: int = 1000
    positions: int = 512

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise ValueError(f"width must be a multiple of twice the heads, got {self.width} and {self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv-heads, got {self.heads} and {self.kv_heads}")

    @property
    def head_size(self) -> int:
        return self.width // self.heads


class Layer(NamedTuple):
    """Weights of a layer; products are x @ weight."""

    attention_gain: np.ndarray  # (width,)
    qkv: np.ndarray  # (width, (heads + 2 kv_heads) * head_size)
    projection: np.ndarray  # (width, width)
    feed_gain: np.ndarray  # (width,)
    gate_up: np.ndarray  # (width, 2 hidden)
    down: np.ndarray  # (hidden, width)


class Model:
    """A stack of layers with random weights."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        width, hidden = shape.width, 8 * shape.width // 3

        def matrix(rows: int, columns: int) -> np.ndarray:
            return rng.standard_normal((rows, columns), np.float32) / np.float32(np.sqrt(rows))

        self.shape = shape
        self.embedding = rng.standard_normal((shape.vocabulary, width), np.float32)
        self.layers = [
            Layer(
                attention_gain=np.ones(width, np.float32),
                qkv=matrix(width, (shape.heads + 2 * shape.kv_heads) * shape.head_size),
                projection=matrix(width, width),
                feed_gain=np.ones(width, np.float32),
                gate_up=matrix(width, 2 * hidden),
                down=matrix(hidden, width),
            )
            for _ in range(shape.layers)
        ]
        self.gain = np.ones(width, np.float32)
        self.head = matrix(width, shape.vocabulary)
        # One angle for each position and pair of elements of a head.
        frequency = 10_000.0 ** -(np.arange(0, shape.head_size, 2) / shape.head_size)
        angle = np.arange(shape.positions)[:, None] * frequency
        self.rotary = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)

    def caches(self, sequences: int, **kind: Any) -> list[numba_attn.KVCache]:
        """An empty cache for each layer."""
        shape = self.shape
        size = sequences, shape.kv_heads, shape.positions, shape.head_size
        return [numba_attn.KVCache(*size, **kind) for _ in self.layers]

    def forward(self, tokens: np.ndarray, caches: list[numba_attn.KVCache]) -> np.ndarray:
        """(B, vocabulary) logits of what follows (B, n) tokens, after those that the caches have seen."""
        x = self.embedding[tokens]
        for layer, cache in zip(self.layers, caches, strict=True):
            x = x + self.attention(normalize(x, layer.attention_gain), layer, cache)
            x = x + feed_forward(normalize(x, layer.feed_gain), layer)
        return normalize(x[:, -1], self.gain) @ self.head

    def attention(self, x: np.ndarray, layer: Layer, cache: numba_attn.KVCache) -> np.ndarray:
        B, n, width = x.shape
        heads, kv_heads = self.shape.heads, self.shape.kv_heads
        # One product makes them all; heads are strided views into it.
        qkv = (x @ layer.qkv).astype(cache.dtype, copy=False).reshape(B, n, heads + 2 * kv_heads, -1).swapaxes(1, 2)
        query, key, value = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
        out = numba_attn.attention_with_kv_cache(query, cache, key, value, rotary=self.rotary)
        return out.swapaxes(1, 2).reshape(B, n, width).astype(np.float32, copy=False) @ layer.projection


def normalize(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    """RMS normalisation."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPSILON) * gain


def feed_forward(x: np.ndarray, layer: Layer) -> np.ndarray:
    """SwiGLU: silu(gate) * up, projected down."""
    gate, up = np.split(x @ layer.gate_up, 2, axis=-1)
    return (gate / (1 + np.exp(-gate)) * up) @ layer.down


def choose(logits: np.ndarray, temperature: float, rng: np.random.Generator) -> np.ndarray:
    """(B,) tokens: the likeliest at temperature 0, else drawn from softmax(logits / temperature)."""
    if temperature == 0:
        return logits.argmax(axis=-1)
    # The largest of numbers with Gumbel noise is a draw from their softmax.
    return (logits / temperature + rng.gumbel(size=logits.shape)).argmax(axis=-1)


class Generated(NamedTuple):
    """What a prompt has become."""

    tokens: np.ndarray  # (B, steps)
    prefill_seconds: float
    decode_seconds: float


def generate(
    model: Model,
    prompt: np.ndarray,
    steps: int,
    *,
    cache: dict[str, Any] | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Generated:
    """Continue (B, n) tokens by some steps, with caches of a kind: what `KVCache` is to be called with."""
    rng, caches = np.random.default_rng(seed), model.caches(len(prompt), **(cache or {}))
    tokens = np.empty((len(prompt), steps), np.int64)
    start = time.perf_counter()
    logits = model.forward(prompt, caches)
    prefilled = time.perf_counter()
    for step in range(steps):
        tokens[:, step] = choose(logits, temperature, rng)
        if step + 1 < steps:
            logits = model.forward(tokens[:, step : step + 1], caches)
        if progress:
            progress(step + 1, steps)
    return Generated(tokens, prefilled - start, time.perf_counter() - prefilled)


def disagreement(model: Model, tokens: np.ndarray) -> float:
    """Largest difference of logits between (B, n) tokens in one piece and one at a time."""
    whole, single = model.caches(len(tokens)), model.caches(len(tokens))
    for i in range(tokens.shape[1]):
        stepped = model.forward(tokens[:, i : i + 1], single)
    return float(np.abs(model.forward(tokens, whole) - stepped).max())


def show_progress(done: int, total: int) -> None:
    """A bar on the terminal, wiped when full."""
    bar = f"{'#' * (40 * done // total):40}"
    sys.stderr.write(f"\r[{bar}] {done}/{total} tokens" if done < total else "\r\033[K")
    sys.stderr.flush()


def cache_kinds() -> dict[str, dict[str, Any]]:
    """Those that there are here."""
    kinds: dict[str, dict[str, Any]] = {"float32": {}, "int8": {"quantize": "int8"}}
    try:
        import ml_dtypes
    except ModuleNotFoundError:
        return kinds
    return {**kinds, "bfloat16": {"dtype": ml_dtypes.bfloat16}}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Generate tokens with a random model of Llama's shape.")
    for name in ("layers", "width", "heads", "kv_heads"):
        default = getattr(Shape, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"({default})")
    parser.add_argument("--prompt", type=int, default=64, help="tokens to begin with (%(default)s)")
    parser.add_argument("--steps", type=int, default=64, help="tokens to generate (%(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences at once (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, prompt and draws (%(default)s)")
    options = parser.parse_args(arguments)
    if min(options.layers, options.width, options.heads, options.kv_heads, options.batch) < 1:
        parser.error("sizes must be 1 or more")
    if min(options.prompt, options.steps) < 1 or options.temperature < 0:
        parser.error("prompt and steps must be 1 or more, temperature 0 or more")
    try:
        shape = Shape(
            options.layers,
            options.width,
            options.heads,
            options.kv_heads,
            positions=options.prompt + options.steps,
        )
    except ValueError as error:
        parser.error(str(error))
    model = Model(shape, options.seed)
    rng = np.random.default_rng(options.seed)
    prompt = rng.integers(0, shape.vocabulary, (options.batch, options.prompt))

    difference = disagreement(model, prompt[:, :32])
    if not difference < 1e-3:
        sys.exit(f"in one piece and one at a time differ by {difference:.1e}")
    print(f"prefill and decoding agree: logits differ by at most {difference:.1e}")
    for name, kind in cache_kinds().items():
        generate(model, prompt, 2, cache=kind)  # compiles the kernels, or loads them from disk
        found = generate(
            model,
            prompt,
            options.steps,
            cache=kind,
            temperature=options.temperature,
            seed=options.seed,
            progress=show_progress if sys.stderr.isatty() else None,
        )
        cache_size = sum(cache.nbytes for cache in model.caches(options.batch, **kind))
        print(
            f"{name} cache of {cache_size / 2**20:.1f} MiB: prompt {prompt.size / found.prefill_seconds:.0f} tokens/s, "
            f"generated {found.tokens.size / found.decode_seconds:.0f} tokens/s: "
            f"{' '.join(map(str, found.tokens[0, :8]))} ..."
        )


if __name__ == "__main__":
    # BLAS and Numba take turns here, and each has its own threads.  Those of OpenMP, if Numba uses it, would spin for
    # milliseconds after a kernel on the cores that the next product needs.  This is read before the first kernel.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
