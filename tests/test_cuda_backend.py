"""The CUDA backend where there is no GPU: what it says then, and what it cannot do at all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from numba_attn import scaled_dot_product_attention
from numba_attn.cuda import devices, launch, portable, simulator
from numba_attn.cuda.arguments import COLUMNS, KV_LENGTH, Numbers, Reals, Tile

X = np.ones((1, 2, 3, 4), np.float32)


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    caches = devices.unavailable, devices.api, devices.compute_capability
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def driver(count: int = 1, capability: tuple[int, int] = (9, 0), status: int = 0) -> SimpleNamespace:
    """So much of a driver as is asked for a device."""
    return SimpleNamespace(
        cuDeviceGetCount=lambda: (status, count),
        cuDeviceGetAttribute=lambda attribute, device: (0, capability[attribute]),
        CUdevice_attribute=SimpleNamespace(
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=0, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=1
        ),
    )


def without(monkeypatch: pytest.MonkeyPatch, *parts: str) -> None:
    for part in parts:
        monkeypatch.setattr(devices, f"_without_{part}", lambda: None)


def test_it_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_without_packages", lambda: "numba-cuda 0.28.1 or later is not installed: try again")
    with pytest.raises(NotImplementedError, match=r"backend 'cuda' cannot be used: numba-cuda 0\.28\.1 or later"):
        scaled_dot_product_attention(X, X, X, backend="cuda")


@pytest.mark.parametrize(
    ("version", "reason"),
    [(None, "is not installed: python -m pip install 'numba-attn"), ("0.22.1", "or later is needed, got 0.22.1")],
)
def test_packages(monkeypatch: pytest.MonkeyPatch, version: str | None, reason: str) -> None:
    def of(name: str) -> str:
        if version is None:
            raise devices.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(devices.metadata, "version", of)
    assert reason in (devices.unavailable() or "")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (driver(count=0), "there is no NVIDIA GPU"),
        (driver(status=999), "there is no NVIDIA driver that works: CUDA driver: 999"),
        (driver(capability=(6, 1)), "the GPU is too old: its compute capability is (6, 1), (7, 5) or more is needed"),
    ],
)
def test_devices(monkeypatch: pytest.MonkeyPatch, given: Any, reason: str) -> None:
    without(monkeypatch, "packages", "toolkit")
    monkeypatch.setattr(devices, "api", lambda: given)
    assert reason in (devices.unavailable() or "")
    monkeypatch.setattr(devices, "api", lambda: driver())
    assert reason in (devices.unavailable() or ""), "asked once"


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise OSError("libcuda.so.1: cannot open\nshared object file")

    without(monkeypatch, "packages", "toolkit")
    monkeypatch.setattr(devices, "api", missing)
    reason = "there is no NVIDIA driver that works: libcuda.so.1: cannot open shared object file"
    assert devices.unavailable() == reason


def test_no_toolkit(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "packages", "device")
    monkeypatch.setitem(__import__("sys").modules, "cuda.pathfinder", None)
    assert "a library of the CUDA toolkit is missing (python -m pip install" in (devices.unavailable() or "")


def test_words_of_a_launch() -> None:
    numbers = Numbers._make(range(100, 100 + len(Numbers._fields)))
    buffers = [launch.Buffer(1 << 63, np.uint16, 5), launch.Buffer(16, np.float64)]
    words = launch.words_of(buffers, numbers, Reals(0.5, 0.0, -2.0))
    assert words[:14].view(np.uint64).tolist() == [
        *(0, 0, 5, 2, 1 << 63, 5, 2),
        *(0, 0, 1 << 40, 8, 16, 1 << 40, 8),
    ]
    assert words[14:-3].tolist() == list(numbers)
    assert words[-3:].view(np.float64).tolist() == [0.5, 0.0, -2.0]


def test_the_order_of_sums_depends_on_the_type_alone() -> None:
    """A sequence's bits must not depend on how many rows a batch has: so neither may the keys of a tile."""
    for kind in ("float32", "float64", "float16", "bfloat16"):
        tiles = [portable.tile_of(kind, Lq, Dv) for Lq in (1, 16, 17, 5000) for Dv in (1, 16, 64, 128, 300)]
        assert len({(t.keys, t.threads_across, t.depth) for t in tiles}) == 1
        assert all(
            t.block_keys % t.depth == 0 and t.threads == 256 and shared_bytes(kind, t) <= 48 * 1024 for t in tiles
        )


def shared_bytes(kind: str, tile: Tile) -> int:
    pad, itemsize = 4, 8 if kind == "float64" else 4
    stages = tile.depth * (tile.block_rows + tile.block_keys + 2 * pad + tile.block_columns)
    probabilities, sums = tile.block_rows * (tile.block_keys + pad), tile.block_rows * (tile.threads_across + 1)
    return itemsize * (stages + probabilities + sums) + 4 * tile.threads


def test_columns_of_the_table() -> None:
    assert (COLUMNS, KV_LENGTH) == (12, 11)


def test_simulator_is_asked_for_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("1", True), ("0", False), ("", False)):
        monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", value)
        assert simulator.enabled() is expected
