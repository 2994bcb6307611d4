"""Pictures: that they show what they are of, and that there is a clear error where they cannot be made."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from numba_attn import attention_weights, diagnose, plot


@pytest.fixture
def _matplotlib() -> None:
    pytest.importorskip("matplotlib")


needs_matplotlib = pytest.mark.usefixtures("_matplotlib")


def numbers(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal(shape)


def bytes_of(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=40)
    return file.getvalue()


def texts(labels: Any) -> list[str]:
    return [label.get_text() for label in labels]


@needs_matplotlib
def test_heat_map() -> None:
    weights = attention_weights(*numbers(2, 9, 4), is_causal=True, query_rows=[0, 8])
    figure = plot.heat_map(weights, query_labels=["first", "last"], key_labels="abcdefghi", title="a head")
    axes = figure.axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), weights)
    assert texts(axes.get_yticklabels()) == ["first", "last"] and texts(axes.get_xticklabels()) == list("abcdefghi")
    assert axes.get_title() == "a head" and bytes_of(figure).startswith(b"\x89PNG")
    assert bytes_of(plot.heat_map(np.ones((1, 2)), key_labels=["$\\no$", "$"]))  # not mathematics
    many = plot.heat_map(np.ones((2, 130))).axes[0]
    assert texts(many.get_xticklabels()) == [str(j) for j in range(0, 130, 3)]
    assert bytes_of(plot.heat_map(np.ones((0, 3))))


@needs_matplotlib
def test_entropy_of_heads_and_of_layers() -> None:
    query, key, value = numbers(3, 2, 30, 8)
    reports = [diagnose(scale * query, key, value) for scale in (1, 4, 9)]
    bars = plot.entropy(reports[0]).axes[0].patches
    np.testing.assert_allclose([bar.get_height() for bar in bars], reports[0].effective_keys)
    figure = plot.entropy(reports, title="layers")
    image = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(image, [report.effective_keys for report in reports])
    assert len(figure.axes[0].texts) == 6 and figure.axes[0].get_title() == "layers" and bytes_of(figure)


@needs_matplotlib
def test_scores() -> None:
    """Areas are those of densities: each 1, but for what is out of the picture."""
    query, key = numbers(2, 2, 200, 16)
    figure = plot.scores(query, key, sample_rows=200, is_causal=True)
    axes = figure.axes[0]
    for stairs in axes.patches:
        heights, edges, _ = stairs.get_data()
        assert 0.97 < (heights * np.diff(edges)).sum() <= 1 + 1e-12
    labels = texts(axes.get_legend().get_texts())
    allowed = np.tri(200, dtype=bool)
    products = (query @ key.swapaxes(1, 2))[:, allowed]
    assert labels[0] == f"unscaled, variance {products.var():.3g}"
    assert labels[1] == f"scaled, variance {products.var() / 16:.3g}" and bytes_of(figure)
    assert len(plot.scores(query, key, scale=0.0).axes[0].patches) == 1
    assert not plot.scores(query[:, :0], key).axes[0].patches


@needs_matplotlib
def test_inspect() -> None:
    query, key, value = numbers(3, 2, 5, 12, 8)
    tokens = [f"t{i}" for i in range(12)]
    figure = plot.inspect(
        query, key, value, is_causal=True, query_rows=[3, -1], heads=[4, 0, 2], sequence=1, tokens=tokens
    )
    maps = [axes for axes in figure.axes if axes.images and axes.get_xlabel() == "key"]
    weights = attention_weights(query, key, is_causal=True, query_rows=[3, 11])
    for axes, h in zip(maps, (4, 0, 2), strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), weights[1, h])
        assert axes.get_title().startswith(f"head {h}, ") and texts(axes.get_yticklabels()) == ["t3", "t11"]
    assert len([axes for axes in figure.axes if axes.patches]) == 2 and bytes_of(figure)
    long = plot.inspect(*numbers(3, 100, 8), heads=[])
    assert not any(axes.images for axes in long.axes)
    rows = plot.inspect(*numbers(3, 100, 8)).axes[0]
    assert texts(rows.get_yticklabels()) == [str(i) for i in range(0, 100, 4)]


@needs_matplotlib
@pytest.mark.parametrize("shape", [(0, 2, 9, 4), (1, 0, 9, 4), (1, 2, 0, 4), (1, 2, 9, 0)], ids=str)
def test_pictures_of_nothing(shape: tuple[int, ...]) -> None:
    x = np.ones(shape)
    assert bytes_of(plot.inspect(x, x, x)) and bytes_of(plot.scores(x, x))
    assert bytes_of(plot.entropy([diagnose(x, x, x)] * 2))


@needs_matplotlib
def test_axes_of_the_caller() -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    one, two, three = figure.subplots(1, 3)
    query, key, value = numbers(3, 2, 9, 4)
    assert plot.heat_map(np.ones((2, 2)), axes=one) is figure
    assert plot.entropy(diagnose(query, key, value), axes=two) is figure
    assert plot.scores(query, key, axes=three) is figure
    assert one.images and two.patches and three.patches


X = np.ones((1, 2, 9, 4))
ONE_HEAD = diagnose(X[:, :1], X[:, :1], X[:, :1], backend="reference")
REFUSED: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    (plot.heat_map, (np.ones(3),), {}, ValueError, "weights must have 2 axes"),
    (plot.heat_map, ([[1.0]],), {}, TypeError, "weights must be a NumPy array"),
    (plot.heat_map, (np.ones((2, 3)),), {"key_labels": "ab"}, ValueError, "key_labels must be 3 labels, got 2"),
    (plot.heat_map, (np.ones((2, 3)),), {"query_labels": 5}, TypeError, "query_labels must be 2 labels, got 5"),
    (plot.entropy, (5,), {}, TypeError, "reports must be a Report or a sequence of them, got 5"),
    (plot.entropy, ([],), {}, TypeError, "reports must be a Report"),
    (plot.entropy, ([1],), {}, TypeError, "reports must be a Report"),
    (plot.scores, (X, X), {"sample_rows": 0}, ValueError, "sample_rows must be 1 or more"),
    (plot.scores, (X, X), {"dropout_p": 0.1}, TypeError, "scores got an unexpected option 'dropout_p'"),
    (plot.inspect, (X, X, X), {"sequence": 1}, ValueError, "sequence must be between 0 and 0, got 1"),
    (plot.inspect, (X, X, X), {"heads": [2]}, ValueError, "heads must be between 0 and 1, got 2"),
    (plot.inspect, (X, X, X), {"heads": [2**70]}, ValueError, f"heads must be between 0 and 1, got {2**70}"),
    (plot.inspect, (X, X, X), {"query_rows": 9}, ValueError, "query_rows must be between -9 and 8, got 9"),
    (plot.inspect, (X, X, X), {"tokens": ["a"]}, ValueError, "tokens must be 9 labels, got 1"),
    (plot.inspect, (X, X, X), {"tokens": np.array("a")}, TypeError, r"tokens must be 9 labels, got array\('a'"),
    (plot.inspect, (X, X, X), {"report": 1}, TypeError, "report must be a Report, got int"),
    (plot.inspect, (X, X, X), {"report": ONE_HEAD}, ValueError, "report must be of 2 heads, got one of 1"),
]


@needs_matplotlib
@pytest.mark.parametrize("refused", REFUSED, ids=lambda refused: refused[-1])
def test_refusals(refused: tuple[Any, ...]) -> None:
    function, arguments, options, error, message = refused
    with pytest.raises(error, match=message):
        function(*arguments, **options)


def test_reports_of_different_layers() -> None:
    reports = [diagnose(*numbers(3, heads, 5, 4)) for heads in (1, 2)]
    with pytest.raises(ValueError, match=r"as many heads, got \[1, 2\]"):
        plot.entropy(reports)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"numba_attn\.plot needs matplotlib: pip install 'numba_attn\[plot\]'"
    ):
        plot.heat_map(np.ones((2, 2)))


@needs_matplotlib
def test_pyplot_is_not_touched(python: Callable[..., str]) -> None:
    code = (
        "import sys, numpy as np\n"
        "from numba_attn import plot\n"
        "plot.heat_map(np.ones((2, 2)))\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    assert python(code).strip() == "False"
