"""examples/regression.py: it learns, and says so if it does not."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from numba_attn import MultiHeadAttention

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "regression.py"


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


def test_it_reaches_its_target(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    example.main([])
    printed, errors = capsys.readouterr()
    assert errors == ""  # no progress bar where there is no terminal
    first, last, steps = re.match(r"loss ([\d.]+) to ([\d.]+) in (\d+) steps", printed).groups()  # type: ignore[union-attr]
    assert float(last) <= 0.0001 < 0.5 < float(first) and int(steps) < 1000
    shares = [tuple(map(float, pair)) for pair in re.findall(r"token ([\d.]+)% before, ([\d.]+)% after", printed)]
    assert len(shares) == 2 and all(before < 10 and after > 90 for before, after in shares)


def test_weights_on_the_mark(example: ModuleType) -> None:
    """A layer that looks for nothing gives each of 16 keys the same weight."""
    batch = example.draw(np.random.default_rng(0), 5, 16, 8)
    layer = MultiHeadAttention.init(np.random.default_rng(0), 8, 2)
    layer.parameters["in_proj_weight"][...] = 0
    np.testing.assert_allclose(example.weight_on_the_mark(layer, batch), [1 / 16, 1 / 16], rtol=1e-6)
    assert (batch.x[np.arange(5), batch.marked, -1] == example.MARK).all() and not batch.y[..., -1].any()


def test_a_target_out_of_reach(example: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"after 2 steps the loss is 0\.\d+, not below 0\.001"):
        example.main(["--steps", "2", "--target", "0.001"])


def test_progress_bar(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    show = example.show_progress(0.01)
    show(1, [1.0])
    assert f"[{' ' * 40}] step 1, loss 1.0000" in capsys.readouterr().err
    show(2, [1.0, 0.1])
    assert f"[{'#' * 20}{' ' * 20}] step 2, loss 0.1000" in capsys.readouterr().err
    show(3, [1.0, 0.1, 0.005])
    assert capsys.readouterr().err == "\r\033[K"


@pytest.mark.parametrize("bad", [["--width", "1"], ["--heads", "3"], ["--steps", "0"], ["--target", "nan"]], ids=str)
def test_bad_options(example: ModuleType, bad: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        example.main(bad)
    assert "must be" in capsys.readouterr().err
