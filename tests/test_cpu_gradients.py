"""The contract of gradients on the CPU kernels, with the tiles of the plan and with small ones."""

from __future__ import annotations

import pytest
from gradient_contract import GradientContract

from numba_attn.cpu import backward, bias_gradient

CUTS = [
    "planned",
    "7 keys, 1 block, parts of 1 row",
    pytest.param("16 keys, 2 blocks, parts of 30 rows", marks=pytest.mark.slow),
]


@pytest.fixture(params=CUTS, scope="class", autouse=True)
def tiles(request: pytest.FixtureRequest) -> object:
    """Cut every problem of a test class one way."""
    if request.param == "planned":
        yield
        return
    keys, blocks, rows = (7, 1, 1) if request.param.startswith("7") else (16, 2, 30)
    cut_of = backward.cut_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward, "cut_of", lambda *sizes: cut_of(*sizes)._replace(keys=keys, blocks=blocks))
        patch.setattr(backward, "PART_ROWS", rows)
        patch.setattr(bias_gradient, "PART", rows)
        patch.setattr(bias_gradient, "KEYS", keys)
        yield


class TestCpu(GradientContract):
    backend = "cpu"
