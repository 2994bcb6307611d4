"""The tensor-core kernels as machine code, which needs NVIDIA's compiler but no GPU: nothing may leave the registers.

Where numba-cuda, its NVVM or ptxas is missing, what needs it is skipped.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from numba_attn.cuda import compile
from numba_attn.cuda.combine import Combination, make_combine
from numba_attn.cuda.flash import Configuration, make_flash
from numba_attn.cuda.sequences import PARAMETERS
from numba_attn.cuda.tensorcore import FEW, SOME, choose

TYPES = tuple(PARAMETERS.values())
MANY = 1 << 20
NO_OPTIONS: dict[str, Any] = {
    "mask": "", "general": False, "softcap": False, "alibi": False, "dropout": False, "entropy": False,
}  # fmt: skip
EVERY_OPTION: dict[str, Any] = {
    "mask": "bfloat16", "general": True, "softcap": True, "alibi": True, "dropout": True, "entropy": True,
}  # fmt: skip


@functools.cache
def _missing() -> str | None:
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
    try:
        compile.ptx(make_combine, ("float16", 16, 16, False), TYPES, (8, 0), (32, 1))
    except Exception as error:  # of the package that looks for NVVM
        return f"kernels of CUDA cannot be compiled: {error}"
    return None


@pytest.fixture(autouse=True)
def compiler() -> None:
    if (reason := _missing()) is not None:
        pytest.skip(reason)


def flash(kind: str, D: int, rows: int, cc: tuple[int, int], **options: Any) -> Configuration:
    """What is chosen for a number of packed rows."""
    options = {**NO_OPTIONS, **options}
    tiling = choose(D, D, rows, cc, any(options.values()))
    return Configuration(kind, D, D, *tiling, split=rows <= SOME, **options)


def assemble(make: Any, configuration: Any, cc: tuple[int, int], tmp_path: Path) -> tuple[str, int, int]:
    """PTX, and the registers and spilt bytes of its machine code; -1 where there is no ptxas."""
    text = compile.ptx(make, tuple(configuration), TYPES, cc, (configuration.threads, 1))
    wheels = Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin/ptxas")
    ptxas = next(map(str, wheels), shutil.which("ptxas"))
    if ptxas is None:
        return text, -1, -1
    (tmp_path / "kernel.ptx").write_text(text)
    arguments = ["-v", f"-arch=sm_{cc[0]}{cc[1]}", "kernel.ptx", "-o", "kernel.cubin"]
    done = subprocess.run([ptxas, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    if "Unsupported .version" in done.stderr:  # older than what wrote it
        return text, -1, -1
    assert done.returncode == 0, done.stderr
    spilt = sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr)))
    return text, int(re.findall(r"Used (\d+) registers", done.stderr)[0]), spilt


def check(make: Any, configuration: Any, cc: tuple[int, int], tmp_path: Path, registers: int) -> None:
    text, used, spilt = assemble(make, configuration, cc, tmp_path)
    assert f".target sm_{cc[0]}{cc[1]}" in text
    assert "__local_depot" not in text, "an array of a thread is in memory"
    assert ".extern .func" not in text, "a function is called"
    assert used <= registers and spilt <= 0, (used, spilt)


@pytest.mark.parametrize(
    ("configuration", "cc", "registers"),
    [
        (flash("bfloat16", 128, MANY, (9, 0)), (9, 0), 255),
        (flash("float16", 64, FEW, (8, 9)), (8, 9), 168),
        (Combination("bfloat16", 128, 16, False), (8, 0), 80),
    ],
)
def test_stays_in_registers(configuration: Any, cc: tuple[int, int], registers: int, tmp_path: Path) -> None:
    check(
        make_combine if isinstance(configuration, Combination) else make_flash, configuration, cc, tmp_path, registers
    )


@pytest.mark.slow
@pytest.mark.parametrize("cc", [(8, 0), (8, 9), (9, 0)])
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("rows", [FEW, MANY])
@pytest.mark.parametrize("options", ["no option", "bool mask", "every option"])
def test_every_variant_stays_in_registers(cc: tuple[int, int], D: int, rows: int, options: str, tmp_path: Path) -> None:
    given = {"no option": {}, "bool mask": {"mask": "bool"}, "every option": EVERY_OPTION}[options]
    if options == "bool mask" and (cc != (8, 0) or D not in (64, 128)):
        pytest.skip("between the others")
    if cc == (8, 9) and (D < 128 or options == "every option"):
        pytest.skip("as for 8.0")
    configuration = flash("float16" if D == 64 else "bfloat16", D, rows, cc, **given)
    check(make_flash, configuration, cc, tmp_path, 255)


SCRIPT = """
import sys
from numba_attn.cuda import compile
from numba_attn.cuda.combine import make_combine
from numba_attn.cuda.sequences import PARAMETERS
found = compile.compiled(make_combine, ("float16", 16, 16, False), tuple(PARAMETERS.values()), (8, 0), (32, 1))
assert found.cubin.startswith(b"\\x7fELF") and "combine" in found.name
print("numba" in sys.modules)
"""


def test_machine_code_on_disk(python: Callable[..., str], tmp_path: Path) -> None:
    """The second process loads it, without Numba, unless the file is not whole."""
    run = functools.partial(python, SCRIPT, NUMBA_CACHE_DIR=str(tmp_path))
    assert run().strip() == "True"
    (entry,) = tmp_path.rglob("make_combine-*.cubin")
    assert run().strip() == "False"
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-1])
    assert run().strip() == "True"
    assert entry.read_bytes() == whole


def _make_outside(cuda: Any, ops: Any, value: Any) -> Any:
    def kernel(out):
        ops.store_f32(True, out, ops.f32(3))

    return kernel


def test_kernels_of_others_are_not_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "directory", lambda: tmp_path)
    first = compile.compiled(_make_outside, (1,), ("int64",), (8, 0), (32, 1))
    assert compile.compiled(_make_outside, (1,), ("int64",), (8, 0), (32, 1)) is first
    assert not list(tmp_path.iterdir())
