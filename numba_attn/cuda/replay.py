"""Kernels that a call has launched, once more, for arrays that lie elsewhere: what the host does is a few microseconds.

All arguments of all launches are in one piece of memory, with the list of their places that the driver wants before
those of each launch.  In a call only addresses are written there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from numba_attn.cuda import devices
from numba_attn.cuda.launch import Machine

ALIGNMENT = 256  # bytes, of what is in temporary memory


class Replay:
    """What a `Machine` has launched for arrays of the caller's by these names, and no others."""

    def __init__(self, machine: Machine, names: Sequence[str]) -> None:
        self._device = machine.device
        self._launches: list[tuple[tuple[Any, ...], int]] = []  # what the driver takes, and where places begin
        self._operands: list[tuple[int, int, int]] = []  # where a word is, the number of the array, bytes behind it
        self._temporary: list[tuple[int, int]] = []  # where a word is, bytes behind where that memory begins
        self._tables: dict[tuple[Any, ...], list[int]] = {}  # key of a table: where words are
        sizes = np.cumsum([0, *(-(-size // ALIGNMENT) * ALIGNMENT for size in machine.sizes)]).tolist()
        self._taken = sizes[-1]
        pieces: list[np.ndarray] = []
        places: list[np.ndarray] = []
        at = 0
        for function, grid, block, shared, words, moved in machine.started:
            self._launches.append(((function, *grid, *block, shared), 8 * at))
            first = at + len(words)
            places.append(np.arange(at, first))
            pieces += [np.arange(first, first + len(words)), words]
            for position, source, behind in moved:
                if isinstance(source, str):
                    self._operands.append((first + position, names.index(source), behind))
                elif isinstance(source, int):
                    self._temporary.append((first + position, sizes[source] + behind))
                else:
                    self._tables.setdefault(source, []).append(first + position)
            at = first + len(words)
        self._words = np.concatenate(pieces)
        self._places = np.concatenate(places)
        self._free: list[tuple[memoryview, int]] = []  # copies of the words, none of which two calls use at once

    def _copy(self) -> tuple[memoryview, int]:
        """Arguments to write to, and their address."""
        words = self._words.copy()
        words[self._places] = words.ctypes.data + 8 * words[self._places]
        return memoryview(words), words.ctypes.data

    def __call__(self, addresses: Sequence[int], stream: int) -> bool:
        """Whether it was done, on this stream; not if a table is no longer on the device."""
        if not devices.is_current(self._device):
            with devices.on(self._device):
                return self(addresses, stream)
        driver, check = devices.api(), devices.check
        words, base = self._free.pop() if self._free else self._copy()
        for at, number, behind in self._operands:
            words[at] = addresses[number] + behind
        if self._tables:
            machine = Machine(self._device, stream)
            for key, copies in self._tables.items():
                table = machine.table(key)
                if table is None:
                    return False
                for at in copies:
                    words[at] = table.address
        memory = int(check(driver.cuMemAllocAsync(self._taken, stream))) if self._taken else 0
        try:
            for at, behind in self._temporary:
                words[at] = memory + behind
            for launch, first in self._launches:
                check(driver.cuLaunchKernel(*launch, stream, base + first, 0))
        finally:
            if memory:
                check(driver.cuMemFreeAsync(memory, stream))
        self._free.append((words, base))
        return True
