"""examples/generate.py on tiny sizes."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

pytest.importorskip("numba_attn.rotary")

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "generate.py"
TINY = ["--layers", "2", "--width", "32", "--heads", "4", "--kv-heads", "2", "--prompt", "6", "--steps", "5"]


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    """The example, imported from its file."""
    spec = importlib.util.spec_from_file_location(EXAMPLE.stem, EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[EXAMPLE.stem] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[EXAMPLE.stem]


def test_main(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    example.main(TINY)
    printed, errors = capsys.readouterr()
    assert "prefill and decoding agree" in printed
    assert printed.count("tokens/s") == 2 * len(example.cache_kinds())
    assert errors == ""  # no progress bar where there is no terminal
    example.main([*TINY, "--temperature", "0.8", "--batch", "2"])
    printed = capsys.readouterr().out
    assert "float32 cache" in printed and "int8 cache" in printed


def test_generation_without_a_cache(example: ModuleType) -> None:
    """Greedy tokens are those of a model that reads everything anew for each; the bar gets to its end."""
    model = example.Model(example.Shape(layers=2, width=32, heads=4, kv_heads=2, vocabulary=50, positions=16))
    prompt = np.arange(12).reshape(2, 6)
    steps: list[tuple[int, int]] = []
    found = example.generate(model, prompt, 5, progress=lambda *step: steps.append(step))
    assert steps == [(i, 5) for i in range(1, 6)]
    tokens = prompt
    for _ in range(5):
        tokens = np.hstack([tokens, model.forward(tokens, model.caches(2)).argmax(axis=-1)[:, None]])
    assert found.tokens.tolist() == tokens[:, 6:].tolist()


def test_sampling(example: ModuleType) -> None:
    """Draws have the frequencies of the softmax, and a seed repeats them."""
    logits = np.log(np.array([[0.5, 0.3, 0.2]])).repeat(20_000, axis=0)
    drawn = example.choose(logits, 1.0, np.random.default_rng(0))
    np.testing.assert_allclose(np.bincount(drawn) / drawn.size, [0.5, 0.3, 0.2], atol=0.02)
    assert (drawn == example.choose(logits, 1.0, np.random.default_rng(0))).all()
    assert (example.choose(logits, 0.0, np.random.default_rng(0)) == 0).all()


def test_a_model_that_disagrees_is_an_error(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "disagreement", lambda *_: float("nan"))
    with pytest.raises(SystemExit, match="differ by nan"):
        example.main(TINY)


def test_progress_bar(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    example.show_progress(1, 2)
    assert f"[{'#' * 20}{' ' * 20}] 1/2 tokens" in capsys.readouterr().err
    example.show_progress(2, 2)
    assert capsys.readouterr().err == "\r\033[K"


@pytest.mark.parametrize("bad", [["--width", "30"], ["--kv-heads", "3"], ["--steps", "0"], ["--layers", "0"]], ids=str)
def test_bad_sizes(example: ModuleType, bad: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example.main([*TINY, *bad])
    assert "must be" in capsys.readouterr().err
