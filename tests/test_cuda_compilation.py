"""The portable kernels as PTX, which needs numba-cuda and NVIDIA's compiler, but no GPU."""

from __future__ import annotations

import re

import mods
import numpy as np
import pytest

from numba_attn.cuda import compile, launch, portable, user_functions
from numba_attn.cuda.arguments import STORED, Numbers, Reals
from numba_attn.cuda.key_weight import make_key_weight
from numba_attn.cuda.scores import Variant
from numba_attn.cuda.simt import make_forward

pytest.importorskip("numba_cuda")
pathfinder = pytest.importorskip("cuda.pathfinder")
try:
    for _library in ("nvvm", "nvJitLink"):
        pathfinder.load_nvidia_dynamic_lib(_library)
except Exception as error:
    pytest.skip(f"no CUDA toolkit: {error}", allow_module_level=True)


def types_of(variant: Variant) -> tuple[object, ...]:
    stored, mask = STORED[variant.kind], STORED[variant.mask or variant.kind]
    held = np.uint8 if variant.held else stored
    tables = np.uint8, np.int64, np.int64
    return launch.argument_types((stored, held, held, mask, stored, *[variant.real] * 7, *tables))


def ptx(make: object, variant: Variant, cc: tuple[int, int] = (8, 0)) -> str:
    return compile.ptx(make, tuple(variant), types_of(variant), cc, (variant.tile.threads, 2))  # type: ignore[arg-type]


def check(code: str, cc: tuple[int, int] = (8, 0)) -> None:
    assert f".target sm_{cc[0]}{cc[1]}" in code
    assert ".extern .func" not in code, "calls something else"
    assert "__local_depot" not in code, "an array that is not in registers"
    entry = re.search(r"\.entry [^(]*\((.*?)\)", code, re.S)
    assert entry is not None
    parameters = re.findall(r"\.param +(?:\.align \d+ +)?\.(\w+)", entry[1])
    assert {*parameters} <= {"u64", "b64", "f64"}, "not all of eight bytes"
    assert len(parameters) == 15 * 7 + len(Numbers._fields) + len(Reals._fields)


def variant_of(kind: str, mask: str | None = None, Lq: int = 100, Dv: int = 64, **rest: object) -> Variant:
    return Variant(kind, mask, portable.tile_of(kind, Lq, Dv), **rest)  # type: ignore[arg-type]


@pytest.mark.parametrize("cc", [(7, 5), (9, 0)])
def test_targets(cc: tuple[int, int]) -> None:
    check(ptx(make_forward, variant_of("float32"), cc), cc)


MANY = [
    *(variant_of("float32", mask) for mask in STORED if mask != "uint8"),
    *(variant_of("float32", None, Lq, Dv) for Lq, Dv in ((1, 64), (100, 8), (100, 32), (1, 128))),
    *(variant_of(kind, dropout=True) for kind in ("float32", "float64", "float16", "bfloat16")),
    *(variant_of("float32", paged=paged, held=held) for paged, held in ((True, None), (True, "int8"), (False, "int4"))),
]
FEW = [variant_of("bfloat16", "bfloat16", dropout=True), variant_of("float64", "float64", Dv=128), MANY[-1]]


@pytest.mark.parametrize("variant", FEW, ids=str)
def test_variants(variant: Variant) -> None:
    check(ptx(make_forward, variant))


@pytest.mark.slow
@pytest.mark.parametrize("variant", MANY[::2], ids=str)
def test_all_variants(variant: Variant) -> None:
    check(ptx(make_forward, variant))
    check(ptx(make_key_weight, variant))


def test_key_weight() -> None:
    check(ptx(make_key_weight, variant_of("float32", "bool")))


def test_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that capture functions and arrays included, also without axes; addresses become part of the kernel."""

    class Buffer:
        address = 0x123456780

    class Machine:
        def __init__(self, device: int, stream: int) -> None: ...

        def upload(self, x: np.ndarray) -> Buffer:
            return Buffer()

        def synchronize(self) -> None: ...

    monkeypatch.setattr(launch, "Machine", Machine)

    def both(b, h, i, j):  # type: ignore[no-untyped-def]
        return mods.prefix(b, h, i, j) and mods.scattered(b, h, i, j)

    factor = np.array(2.5)

    def scaled(score, b, h, i, j):  # type: ignore[no-untyped-def]
        return mods.relative_bias(score, b, h, i, j) * factor[()]

    score_mod, mask_mod = (user_functions.portable("mod", f, 0) for f in (mods.relative_bias, both))
    assert user_functions.portable("mod", mods.relative_bias, 0) is score_mod
    assert user_functions.portable("mod", mods.biased(mods.BIAS.copy()), 0) is score_mod
    assert user_functions.portable("mod", mods.biased(mods.BIAS + 1), 0) is not score_mod
    score_mod = user_functions.portable("mod", scaled, 0)
    code = ptx(make_forward, variant_of("float32", score_mod=score_mod, mask_mod=mask_mod, block_mod=mask_mod))
    check(code)
    assert str(Buffer.address) in code or hex(Buffer.address)[2:] in code.lower()


def test_functions_that_cannot_be_compiled() -> None:
    def unknown(b, h, i, j):  # type: ignore[no-untyped-def]
        return i < undefined  # type: ignore[name-defined]  # noqa: F821

    variant = variant_of("float32", mask_mod=user_functions.portable("mask_mod", unknown, 0))
    with pytest.raises(Exception, match="undefined") as raised:
        ptx(make_forward, variant)
    explained = user_functions.explained(raised.value, tuple(variant))
    assert isinstance(explained, TypeError)
    assert str(explained).endswith("unknown' cannot be compiled: NameError: name 'undefined' is not defined")
    other = RuntimeError("of the driver")
    assert user_functions.explained(other, tuple(variant)) is other
