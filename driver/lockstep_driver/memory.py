"""Device memory: a first-fit allocator, and the buffers that it hands out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import DriverError, OutOfDeviceMemory

#: Every buffer begins on a multiple of this many bytes, which any bus width divides.
ALIGNMENT = 256


@dataclass(frozen=True)
class Buffer:
    """A piece of device memory: byte address, size, and its bytes as the host sees them (uint8[size])."""

    address: int
    data: NDArray[np.uint8]

    def write(self, values: NDArray[np.generic], offset: int = 0) -> None:
        """Copy an array's bytes to ``offset``."""
        raw = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
        if offset < 0 or offset + raw.size > self.data.size:
            raise DriverError(f"{raw.size} bytes at offset {offset} do not fit a buffer of {self.data.size}")
        self.data[offset : offset + raw.size] = raw


class Allocator:
    """First fit over [start, end) of ``memory``."""

    def __init__(self, memory: NDArray[np.uint8], start: int = 0) -> None:
        self._memory = memory
        self._free = [(start, memory.size)]
        self._used: dict[int, int] = {}

    def allocate(self, size: int) -> Buffer:
        """A buffer of at least one byte; raises :class:`OutOfDeviceMemory` naming the bytes that are missing."""
        rounded = -(-max(size, 1) // ALIGNMENT) * ALIGNMENT
        for n, (begin, end) in enumerate(self._free):
            if end - begin >= rounded:
                self._free[n] = (begin + rounded, end)
                if begin + rounded == end:
                    del self._free[n]
                self._used[begin] = rounded
                return Buffer(begin, self._memory[begin : begin + size])
        largest = max((end - begin for begin, end in self._free), default=0)
        raise OutOfDeviceMemory(
            f"a buffer of {size} bytes does not fit device memory of {self._memory.size} bytes: "
            f"{rounded - largest} bytes are missing; open the device with more, as in 'rtl:laptop?memory=256M'"
        )

    def free(self, buffer: Buffer) -> None:
        """Give a buffer back; neighbours merge."""
        size = self._used.pop(buffer.address, None)
        if size is None:
            raise DriverError(f"no buffer begins at {buffer.address:#x}; it was freed before")
        merged: list[tuple[int, int]] = []
        for begin, end in sorted([*self._free, (buffer.address, buffer.address + size)]):
            if merged and merged[-1][1] == begin:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((begin, end))
        self._free = merged
