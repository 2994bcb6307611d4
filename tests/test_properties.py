"""The whole option space at once: random shapes, types, storage and options, CPU kernels against float64."""

from __future__ import annotations

import hypothesis
import pytest
from hypothesis import given, settings
from strategies import Call, calls, cut_into
from tolerances import assert_accurate

from numba_attn import scaled_dot_product_attention


def check(call: Call) -> None:
    arrays, options, tiles = call
    with cut_into(tiles):
        result = scaled_dot_product_attention(*arrays, **options)
    out, aux = result if options["return_aux"] else (result, None)
    assert aux is None or all((x is not None) == (name in options["return_aux"]) for name, x in aux._asdict().items())
    assert_accurate(out, aux, *arrays, **options)


@given(calls())
def test_random_calls(call: Call) -> None:
    check(call)


@pytest.mark.slow
@settings(hypothesis.settings.get_profile("fixed"), max_examples=4000)
@given(calls())
def test_many_random_calls(call: Call) -> None:
    check(call)
