"""The portable CUDA kernels and their launcher in Numba's simulator, which takes a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def _has_a_simulator() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a module of Numba may be deprecated in favour of numba-cuda's
        pytest.importorskip("numba.cuda")


def in_simulator(*arguments: str, timeout: float) -> str:
    """What pytest prints in a child process where every launch goes to the simulator."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", *arguments],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stdout[-8000:]}\n{result.stderr[-2000:]}"
    return result.stdout


def test_contract_on_tiny_problems() -> None:
    few = "not TestSmall and not nan_reaches and not rows_without"
    assert "passed" in in_simulator("tests/simulated_cuda.py", "-k", few, timeout=600)


def test_launcher() -> None:
    assert "passed" in in_simulator("tests/simulated_launch.py", timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("others", ["TestSmall", "nan_reaches or rows_without"])
def test_more_of_the_contract(others: str) -> None:
    assert "passed" in in_simulator("tests/simulated_cuda.py", "-k", others, timeout=900)
