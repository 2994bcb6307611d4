"""Compiled kernels on disk: found again, never stale, never half there, and shared by processes that start at once."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import numba_attn
from numba_attn.cpu import cache

# Of a kernel that is soon compiled, and large enough for the parallel loop.
CALL = """
import numpy as np, numba_attn
x = np.random.default_rng(0).standard_normal((4, 300, 64), dtype=np.float32)
print(float(np.abs(numba_attn.apply_rotary(x, *numba_attn.rotary_tables(300, 64))).sum()))
"""
# Of others, which the tests share a cache for.
ATTENTION = """
import numpy as np, numba_attn
x = np.random.default_rng(0).standard_normal((4, 300, 32), dtype=np.float32)
print(float(np.abs(numba_attn.scaled_dot_product_attention(x, x, x)).sum()))
"""
# What a process looks for in the cache, and what it writes there, whatever others do meanwhile.
RECORDED = """
from numba_attn.cpu import cache
asked, saved = set(), set()
load, save = cache._Entries.load, cache._Entries.save
def noted(names, self, key): names.add(self.path(key).name)
cache._Entries.load = lambda self, key: noted(asked, self, key) or load(self, key)
cache._Entries.save = lambda self, key, compiled: noted(saved, self, key) or save(self, key, compiled)
"""
PACKAGE = Path(numba_attn.__file__).parent


def entries(directory: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*.nbc")}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A cache that one process has filled, which no test may write to; and what the process printed."""
    directory = tmp_path_factory.mktemp("cache")
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(directory)}
    result = subprocess.run(
        [sys.executable, "-c", CALL], env=environment, cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert len(entries(directory)) == 2, "the kernel, and the loop over workers"
    return directory, result.stdout


def copy_of(directory: Path, to: Path) -> Path:
    subprocess.run(["cp", "-r", str(directory), str(to)], check=True)
    return to


def test_found_again(filled: tuple[Path, str], python: Callable[..., str]) -> None:
    directory, printed = filled
    before = entries(directory)
    assert python(CALL, NUMBA_CACHE_DIR=str(directory)) == printed
    assert entries(directory) == before, "compiled again"


def test_a_warm_start_leaves_the_compiler_out(python: Callable[..., str]) -> None:
    """Machine code from disk needs nothing that Numba compiles with; a compilation after it finds all of that."""
    code = f"""{ATTENTION}
import sys
import numba
print("numba.np.arraymath" in sys.modules)
print(numba.njit(lambda x: np.sort(x).sum())(np.arange(3.0)))
print(float(np.abs(numba_attn.scaled_dot_product_attention(x, x, x, score_mod=lambda s, b, h, i, j: s)).sum()))
"""
    expected = python(ATTENTION)
    printed = python(code).split()
    assert printed[:3] == [expected.strip(), "False", "3.0"]
    assert float(printed[3]) == pytest.approx(float(printed[0]))


def test_every_source_counts(filled: tuple[Path, str], tmp_path: Path) -> None:
    """A change in a helper that kernels are compiled from, and in nothing else, is seen."""
    package, directory = tmp_path / "numba_attn", copy_of(filled[0], tmp_path / "cache")
    before = entries(directory)
    subprocess.run(["cp", "-r", str(PACKAGE), str(package)], check=True)
    helper = package / "cpu" / "simd.py"
    source = helper.read_text(encoding="utf-8")
    changed = source.replace("return self.builder.fmul(a, b)", "return self.builder.fsub(a, a)")
    assert changed != source
    helper.write_text(changed, encoding="utf-8")
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(directory), "PYTHONPATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", CALL], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert float(result.stdout) == 0.0
    assert before.items() < entries(directory).items()


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbled", "a directory"])
def test_damaged_entries_are_compiled_again(
    filled: tuple[Path, str], python: Callable[..., str], tmp_path: Path, damage: str
) -> None:
    directory = copy_of(filled[0], tmp_path / "cache")
    (path,) = directory.rglob("turn-*.nbc")
    data = path.read_bytes()
    if damage == "a directory":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({"truncated": data[:-100], "empty": b"", "garbled": data[:5000] + b"x" + data[5001:]}[damage])
    assert python(CALL, NUMBA_CACHE_DIR=str(directory)) == filled[1]
    if damage != "a directory":
        anew = path.read_bytes()
        assert hashlib.sha256(anew[32:]).digest() == anew[:32]


def test_nowhere_to_write(python: Callable[..., str], tmp_path: Path) -> None:
    """A read-only installation of a user without a home: works, compiles in every process, and says so."""
    (tmp_path / "file").touch()
    script = (
        "from numba_attn import cli\nfrom numba_attn.cpu import cache\nassert cache.directory() is None\n"
        + CALL
        + "cli.main(['info'])"
    )
    assert "NUMBA_CACHE_DIR" in python(script, NUMBA_CACHE_DIR=str(tmp_path / "file"))


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may write everywhere")
def test_read_only_directories(python: Callable[..., str], tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    script = f"from numba_attn.cpu import cache\nassert cache.directory() is None, cache.directory()\n{CALL}"
    python(script, NUMBA_CACHE_DIR=str(tmp_path), HOME=str(tmp_path))


def test_a_full_disk_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written = cache._Entries(str(tmp_path / "0123"), "kernel")
    written.save(("key",), [1, 2])
    assert written.load(("key",)) == [1, 2]
    assert written.load(("another key",)) is None

    def full(source: object, to: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "replace", full)
    written.save(("third key",), [3])
    assert written.load(("third key",)) is None
    assert [path.suffix for path in (tmp_path / "0123").iterdir()] == [".nbc"], "a temporary file is left"
    written.flush()
    assert written.load(("key",)) is None


def test_what_other_versions_left_goes_in_time(tmp_path: Path) -> None:
    old, recent, foreign = tmp_path / ("a" * 16), tmp_path / ("b" * 16), tmp_path / "somebody-else-s"
    for directory in (old, recent, foreign):
        directory.mkdir()
        (directory / "work-0.nbc").touch()
    long_ago = time.time() - 2 * cache.UNUSED
    for directory in (old, foreign):
        os.utime(directory, (long_ago, long_ago))
    cache._Entries(str(tmp_path / ("c" * 16)), "work").save(("key",), 1)
    assert not old.exists() and recent.exists() and foreign.exists()


def test_user_functions_are_not_kept(python: Callable[..., str]) -> None:
    """A script that runs every day with functions of its own would fill the disk."""
    script = f"""{RECORDED}
import numpy as np, numba_attn
x = np.random.default_rng(0).standard_normal((4, 300, 32), dtype=np.float32)
slope = 0.5
block_mask = numba_attn.create_block_mask(lambda b, h, i, j: i - j < 70, 1, 1, Lq=300, Lk=300)
numba_attn.scaled_dot_product_attention(x, x, x, block_mask=block_mask, score_mod=lambda s, b, h, i, j: s - slope)
print(len(asked), len(saved))
"""
    python(script)
    asked, saved = python(script.replace("0.5", "0.25")).split()
    assert int(asked) > 0 and int(saved) == 0


RACER = """
import os, sys, time
while not os.path.exists(sys.argv[1]): time.sleep(0.001)
"""


def race(directory: Path, processes: int) -> list[str]:
    """What processes print that start on an empty cache at once."""
    start = directory / "start"
    command = [sys.executable, "-W", "error", "-c", RACER + CALL, str(start)]
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(directory)}
    with contextlib.ExitStack() as stack:
        running = [
            stack.enter_context(
                subprocess.Popen(
                    command,
                    env=environment,
                    cwd=PACKAGE.parent,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for _ in range(processes)
        ]
        try:
            start.touch()
            results = [(*process.communicate(timeout=300), process.returncode) for process in running]
        finally:
            for process in running:
                process.kill()
    for out, error, code in results:
        assert code == 0, f"exit status {code}\n{out}\n{error}"
    return [out for out, _, _ in results]


def test_processes_that_start_at_once(tmp_path: Path) -> None:
    """One compiles, the others wait for it; none fails, and what is left is whole."""
    printed = race(tmp_path, 4)
    assert len(set(printed)) == 1
    assert len(entries(tmp_path)) == 2
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(10))
def test_many_processes_that_start_at_once(tmp_path: Path, attempt: int) -> None:
    assert len(set(race(tmp_path, 16))) == 1


@pytest.mark.slow
def test_warmup_leaves_nothing_to_compile(python: Callable[..., str]) -> None:
    """As for the image of a container: later calls, of every type, write nothing, nor look for what it has not."""
    warm_up = "from numba_attn import cli; cli.main(['warmup', '--json']); print('', *asked)"
    found = set(python(RECORDED + warm_up, timeout=600).splitlines()[-1].split())
    script = f"""{RECORDED}
import ml_dtypes, numpy as np, numba_attn
for dtype in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16):
    for n in (30, 400):
        x = np.ones((4, n, 32), dtype)
        numba_attn.scaled_dot_product_attention(x, x, x, return_aux=("lse", "key_weight"))
        numba_attn.apply_rotary(x, *numba_attn.rotary_tables(n, 32, dtype=x.dtype))
x = np.ones((4, 400, 32), np.float32)
numba_attn.scaled_dot_product_attention(x, x, x, precision="bfloat16")
assert not saved
print(*asked)
"""
    asked = set(python(script).split())
    assert asked and asked <= found
