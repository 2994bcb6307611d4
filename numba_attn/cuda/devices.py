"""Whether there is a CUDA device to compute on, and its driver.

Nothing of NVIDIA's is imported before it is asked for.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

OLDEST = (7, 5)  # compute capability: what the toolkits of CUDA 13 compile for
NUMBA_CUDA = (0, 28, 1)


@functools.cache
def unavailable() -> str | None:
    """Why there is no device to compute on; None if there is one."""
    for part in (_without_packages, _without_device, _without_toolkit):
        if (reason := part()) is not None:
            return reason
    return None


def _without_packages() -> str | None:
    wanted = ".".join(map(str, NUMBA_CUDA))
    try:
        version = metadata.version("numba-cuda")
    except metadata.PackageNotFoundError:
        return f"numba-cuda {wanted} or later is not installed: python -m pip install 'numba-attn[cuda]'"
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < NUMBA_CUDA:
        return f"numba-cuda {wanted} or later is needed, got {version}"
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return "cuda-bindings, a part of numba-cuda, is not installed"
    return None


def _without_device() -> str | None:
    try:
        driver = api()
        count = check(driver.cuDeviceGetCount())
    except Exception as error:  # of the library that looks for it, or of the driver
        return f"there is no NVIDIA driver that works: {_line(error)}"
    if count == 0:
        return "there is no NVIDIA GPU"
    capabilities = [compute_capability(device) for device in range(count)]
    if max(capabilities) < OLDEST:
        return f"the GPU is too old: its compute capability is {max(capabilities)}, {OLDEST} or more is needed"
    return None


def _without_toolkit() -> str | None:
    """NVIDIA's compiler and linker, which `numba-cuda[cu13]` installs if the system has none."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        for library in ("nvvm", "nvJitLink"):
            load_nvidia_dynamic_lib(library)
    except Exception as error:  # each of its own kind
        return f"a library of the CUDA toolkit is missing (python -m pip install 'numba-cuda[cu13]'): {_line(error)}"
    return None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


# The driver -----------------------------------------------------------------------------------------------------------


@functools.cache
def api() -> Any:
    from cuda.bindings import driver

    check(driver.cuInit(0))
    return driver


def check(returned: Any) -> Any:
    """What a function of the driver returns after its status, which must be success."""
    status = returned[0]
    if int(status) != 0:
        raise RuntimeError(f"CUDA driver: {getattr(status, 'name', status)}")
    return returned[1] if len(returned) == 2 else returned[1:]


@functools.cache
def compute_capability(device: int) -> tuple[int, int]:
    driver = api()
    kind = driver.CUdevice_attribute
    names = kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
    major, minor = (check(driver.cuDeviceGetAttribute(name, device)) for name in names)
    return int(major), int(minor)


@functools.cache
def _primary_context(device: int) -> Any:
    """The context that libraries share."""
    return check(api().cuDevicePrimaryCtxRetain(device))


def current_device() -> int:
    """That of the calling thread's context; 0 where it has none."""
    status, number = api().cuCtxGetDevice()
    return int(number) if int(status) == 0 else 0


def is_current(device: int) -> bool:
    """Whether the calling thread has a context, and it is of this device."""
    status, number = api().cuCtxGetDevice()
    return int(status) == 0 and int(number) == device


@contextmanager
def on(device: int) -> Iterator[None]:
    """A context of this device is that of the calling thread."""
    if is_current(device):
        yield
        return
    driver = api()
    check(driver.cuCtxPushCurrent(_primary_context(device)))
    try:
        yield
    finally:
        check(driver.cuCtxPopCurrent())
