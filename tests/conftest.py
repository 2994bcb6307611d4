"""Shared fixtures; seeds are fixed everywhere, and hypothesis prints what reproduces a failure."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

from numba_attn import repeats

ROOT = Path(__file__).parent.parent
# Whose tests take longest, a minute or two each: at the end, one process would be left alone with them.
FIRST = "test_targets.py", "test_cache.py"

hypothesis.settings.register_profile(
    "fixed", derandomize=True, deadline=None, print_blob=True, database=None, max_examples=150
)
hypothesis.settings.load_profile("fixed")


def pytest_report_header() -> str:
    return "seeds: fixed in each test; hypothesis derandomised"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in FIRST)


@pytest.fixture(autouse=True)
def nothing_to_repeat() -> None:
    """Calls of one test are not those of another again, which may have changed what is below them."""
    repeats.forget()


@pytest.fixture
def python() -> Callable[..., str]:
    """Run a script in a fresh interpreter, with a time limit, and return what it prints."""

    def run(script: str, *arguments: str, timeout: float = 240, **environment: str) -> str:
        result = subprocess.run(
            [sys.executable, "-W", "error", "-c", script, *arguments],
            env={**os.environ, **environment},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert result.returncode == 0, f"exit status {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result.stdout

    return run
